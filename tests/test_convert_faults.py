"""Converted momentum reaches the parameter it was saved for, or is refused. It is never lost or given to another one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fastlars import LARS, convert_state_dict

NAMES = [f"{i}.weight" for i in range(11)]  # "10.weight" sorts before "2.weight"


def values(i: int) -> Tensor:
    return torch.full((2,), float(i))


def optimizer_of(names: list[str] | None) -> LARS:
    params = [Parameter(torch.ones(2)) for _ in NAMES]
    return LARS(params if names is None else zip(names, params, strict=True), 0.1, momentum=0.9, adapt=True)


def saved_under(keys: list[Any], groups: dict[str, Any] | None = None) -> dict[str, Any]:
    """Momentum i of parameter i under keys[i], written by hand if there are no groups."""
    state_dict: dict[str, Any] = {"state": {key: {"mu": values(i)} for i, key in enumerate(keys)}}
    if groups is not None:
        state_dict["param_groups"] = [{"lr": 0.1, "params": list(range(len(keys))), **groups}]
    return state_dict


def text_order(state_dict: dict[str, Any]) -> dict[str, Any]:
    """In the order of json.dumps(sort_keys=True)."""
    return {**state_dict, "state": dict(sorted(state_dict["state"].items()))}


POSITIONS = list(range(11))
TEXTS = [str(i) for i in POSITIONS]
WRAPPED = [f"module.{name}" for name in NAMES]
BACKWARDS = {"param_names": WRAPPED[::-1], "params": POSITIONS[::-1]}


@pytest.mark.parametrize(
    ("names", "state_dict"),
    [
        (NAMES, saved_under(POSITIONS, {"param_names": WRAPPED})),
        (NAMES, saved_under(POSITIONS, BACKWARDS)),
        (WRAPPED, saved_under(POSITIONS, {"param_names": NAMES})),
        (NAMES, text_order(saved_under(WRAPPED))),
        (NAMES, saved_under(POSITIONS, {})),
        (None, saved_under(POSITIONS, {"param_names": NAMES})),
        (None, saved_under(POSITIONS)),
        (["same"] * 11, saved_under(POSITIONS, {"param_names": ["same"] * 11})),
    ],
    ids=["wrapped", "backwards", "unwrapped", "keys", "ours only", "theirs only", "by hand", "ambiguous but equal"],
)
def test_momentum_goes_to_its_parameter(names: list[str] | None, state_dict: dict[str, Any]) -> None:
    optimizer = optimizer_of(names)
    optimizer.load_state_dict(convert_state_dict(state_dict, optimizer))
    for i, param in enumerate(optimizer.param_groups[0]["params"]):
        assert torch.equal(optimizer.state[param]["momentum_buffer"], values(i)), i


LOST = "which is not among the keys of its parameters"
DIFFERENT = "name their parameters differently"


@pytest.mark.parametrize(
    ("names", "state_dict", "message"),
    [
        (None, saved_under(TEXTS, {}), f"optimizer state under '0', {LOST}"),
        (None, saved_under(TEXTS), "keys of 'state' must be positions, got '0'; use integers"),
        (None, text_order(saved_under(NAMES)), "keys of 'state' must be positions, got '0.weight'"),
        (NAMES, text_order(saved_under(TEXTS)), DIFFERENT),
        (None, saved_under([i + 1 for i in POSITIONS], {}), f"optimizer state under 11, {LOST}"),
        (None, saved_under([i + 1 for i in POSITIONS]), f"optimizer state under 11, {LOST}"),
        (None, {"state": {77: {"exp_avg": values(0)}}}, f"optimizer state under 77, {LOST}"),
        (NAMES, saved_under(POSITIONS, {"param_names": [f"net.{n}" for n in NAMES]}), DIFFERENT),
        (["same"] * 11, saved_under(POSITIONS, {"param_names": ["same", *NAMES[1:]]}), DIFFERENT),
        (None, saved_under([0], {"params": [0] * 11}), "two parameters under the key 0"),
        (None, None, "must have the keys 'state' and 'param_groups', got NoneType"),
        (
            None,
            {"model": {}, "optimizer": saved_under(POSITIONS, {})},
            r"got \['model', 'optimizer'\]; this looks like a whole checkpoint, pass its entry 'optimizer'",
        ),
    ],
)
def test_ambiguous_momentum_is_refused(names: list[str] | None, state_dict: Any, message: str) -> None:
    optimizer = optimizer_of(names)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state_dict, optimizer)


def test_string_keys_are_refused_with_params_too() -> None:
    """The order of string keys in a dict is not that of the parameters."""
    optimizer = optimizer_of(NAMES)
    with pytest.raises(ValueError, match=r"must be positions, got '0\.weight'"):
        convert_state_dict(text_order(saved_under(NAMES)), optimizer, params=optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("state", [None, 5, torch.ones(2)], ids=lambda state: type(state).__name__)
def test_a_state_must_be_a_dict(state: Any) -> None:
    with pytest.raises(TypeError, match="the state under 0 must be a dict"):
        convert_state_dict({"state": {0: state}}, optimizer_of(None))


def test_a_parameter_listed_twice_has_one_state() -> None:
    param = Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = LARS([param, param], 0.1, momentum=0.9, adapt=True)
    state_dict = {"state": {0: {"mu": values(3)}}, "param_groups": [{"lr": 0.1, "params": [0, 0]}]}
    optimizer.load_state_dict(convert_state_dict(state_dict, optimizer))
    assert torch.equal(optimizer.state[param]["momentum_buffer"], values(3))


def test_load_state_dict_recognises_a_whole_checkpoint_too() -> None:
    optimizer = optimizer_of(None)
    with pytest.raises(ValueError, match="looks like a whole checkpoint, pass its entry 'optimizer'"):
        optimizer.load_state_dict({"model": {}, "optimizer": optimizer.state_dict()})
