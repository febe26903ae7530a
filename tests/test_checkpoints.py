"""Code for the LARS of Bolts, quadra or lightly changes only its import. Their checkpoints, and torch SGD's, resume exactly.

Their constructors and state dicts are written here as data: lightning-bolts 0.7, quadra 2, lightly 1.5.
"""

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from cases import BASE, OPTIONS, STEPS, Options, make_grads, make_params
from fastlars import LARS
from harness import IMPLEMENTATIONS, assert_equals, buffers_of, ignore_nothing_adapted, loop_over, pairs, set_grads
from reference import ReferenceLARS

pytestmark = ignore_nothing_adapted

LAYOUTS = ["matrix", "conv", "scalar", "empty", "vector_4097", "zeros"]
OPTION_SETS: dict[str, Options] = {
    "plain": BASE,
    "momentum": OPTIONS["momentum"],
    "dampening": OPTIONS["dampening"],
    "nesterov_joint": OPTIONS["nesterov-joint"],
    "paper": {**OPTIONS["momentum-paper"], "skip_nonfinite": True},
    "unadapted": OPTIONS["dampening-unadapted"],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.float64]
# name, default; the same in all three except for lr, which lightly requires in the call
PEERS = {
    "lr": None,
    "momentum": 0,
    "dampening": 0,
    "weight_decay": 0,
    "nesterov": False,
    "trust_coefficient": 0.001,
    "eps": 1e-8,
}


def go_on(optimizer: torch.optim.Optimizer, steps: Iterable[int], history: str = "late") -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        set_grads(params, make_grads(history, params, step))
        optimizer.step()


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


def bits(tensors: Sequence[Tensor | None]) -> list[list[int] | None]:
    return [None if t is None else t.detach().reshape(-1).view(torch.uint8).tolist() for t in tensors]


def all_bits(optimizer: torch.optim.Optimizer) -> list[list[int] | None]:
    return bits([p for group in optimizer.param_groups for p in group["params"]]) + bits(buffers_of(optimizer))


def clones(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Groups of copied parameters and nothing else, so that every option must come from the state dict."""
    return [{"params": [Parameter(p.detach().clone()) for p in group["params"]]} for group in optimizer.param_groups]


def by_state_dict(optimizer: LARS) -> LARS:
    restored = LARS(clones(optimizer), lr=9.0, momentum=0.5, trust_coefficient=0.7)
    restored.load_state_dict(through_a_file(optimizer.state_dict()))
    return restored


WAYS: dict[str, Callable[[LARS], LARS]] = {
    "state_dict": by_state_dict,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "deepcopy": copy.deepcopy,
}


# ---------------------------------------------------------------- of this optimizer
@pairs("chosen dtype way how", OPTION_SETS, DTYPES, WAYS, IMPLEMENTATIONS)
def test_a_round_trip_at_any_step_changes_no_bit(chosen: str, dtype: torch.dtype, way: str, how: str) -> None:
    for saved_at in range(STEPS):
        groups: list[dict[str, Any]] = [
            {"params": make_params(dtype, layouts=LAYOUTS, seed=1), "name": "first"},
            {"params": make_params(dtype, layouts=LAYOUTS, seed=2), "weight_decay": 0.3, "lr": torch.tensor(0.25)},
        ]
        optimizer = LARS(groups, **OPTION_SETS[chosen], **IMPLEMENTATIONS[how])
        go_on(optimizer, range(saved_at))
        restored = WAYS[way](optimizer)
        assert [g.keys() for g in restored.param_groups] == [g.keys() for g in optimizer.param_groups]
        assert restored.param_groups[1]["lr"] is not optimizer.param_groups[1]["lr"]
        for each in (optimizer, restored):
            go_on(each, range(saved_at, STEPS - 1))
            each.param_groups[1]["lr"].mul_(0.5)  # as a scheduler writes it; a float in place of the tensor would raise
            go_on(each, range(STEPS - 1, STEPS))
        assert all_bits(restored) == all_bits(optimizer)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@loop_over("dtype", [torch.float32, torch.bfloat16])
def test_state_and_keys_are_the_frozen_format(momentum: float, dtype: torch.dtype) -> None:
    optimizer = LARS(make_params(dtype), lr=0.1, momentum=momentum, weight_decay=0.1)
    go_on(optimizer, range(4), "never")
    assert optimizer.state_dict()["state"] == {}
    go_on(optimizer, range(1), "missing")
    state = optimizer.state_dict()["state"]
    keys = ["momentum_buffer"] * (momentum != 0) + ["compensation"] * (dtype == torch.bfloat16)
    assert {key for entry in state.values() for key in entry} == set(keys)
    assert 0 not in state  # it has had no gradient
    assert set(optimizer.state_dict()["param_groups"][0]) == {
        "params", "lr", "momentum", "dampening", "weight_decay", "nesterov", "trust_coefficient", "eps", "adapt",
        "trust_clip", "trust_denominator", "lr_in_momentum", "skip_nonfinite", "maximize", "foreach", "differentiable",
        "fused", "kahan_sum",
    }  # fmt: skip


@pytest.mark.parametrize("way", [WAYS["pickle"], WAYS["deepcopy"]], ids=["pickle", "deepcopy"])
def test_lr_is_still_required_after_a_copy(way: Callable[[LARS], LARS]) -> None:
    optimizer = way(LARS([{"params": make_params(torch.float32), "lr": 0.1}]))
    with pytest.raises(ValueError, match="didn't specify a value of required optimization parameter lr"):
        optimizer.add_param_group({"params": make_params(torch.float32)})
    optimizer.add_param_group({"params": make_params(torch.float32), "lr": 0.2})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_hooks_around_loading_are_called_and_may_rename_keys() -> None:
    """A checkpoint of Barlow Twins or VICReg, with buffers named mu and the trust coefficient named eta."""
    optimizer = LARS(make_params(torch.float32, layouts=LAYOUTS), **OPTION_SETS["momentum"])
    go_on(optimizer, range(2))
    saved = through_a_file(optimizer.state_dict())
    for state in saved["state"].values():
        state["mu"] = state.pop("momentum_buffer")
    saved["param_groups"][0]["eta"] = saved["param_groups"][0].pop("trust_coefficient")

    def rename(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        group = {**state_dict["param_groups"][0]}
        group["trust_coefficient"] = group.pop("eta")
        state = {i: {"momentum_buffer": state["mu"]} for i, state in state_dict["state"].items()}
        return {"state": state, "param_groups": [group]}

    calls = []
    restored = LARS(clones(optimizer), lr=9.0)
    restored.register_load_state_dict_pre_hook(rename)
    restored.register_load_state_dict_post_hook(calls.append)
    restored.load_state_dict(saved)
    assert calls == [restored]
    for each in (optimizer, restored):
        go_on(each, range(2, STEPS))
    assert all_bits(restored) == all_bits(optimizer)


def test_keys_that_a_state_dict_lacks_keep_their_values() -> None:
    model = torch.nn.Linear(3, 2)
    mine = {
        "momentum": 0.8, "weight_decay": 0.3, "nesterov": True, "trust_coefficient": 0.02, "eps": 1e-3, "adapt": True,
        "trust_clip": True, "trust_denominator": "joint", "lr_in_momentum": True, "skip_nonfinite": True,
        "maximize": True, "foreach": True,
    }  # fmt: skip
    # the group's values, not the call's, which differ
    optimizer = LARS([{"params": model.named_parameters(), **mine}], lr=0.1)
    before = dict(optimizer.param_groups[0])
    optimizer.load_state_dict({"state": {}, "param_groups": [{"lr": 0.5, "params": [0, 1]}]})
    after = optimizer.param_groups[0]
    assert {**after} == {**before, "lr": 0.5}
    assert after["param_names"] == ["weight", "bias"]


# ---------------------------------------------------------------- of Bolts, quadra, lightly
def test_constructor_accepts_their_arguments() -> None:
    parameters = list(inspect.signature(LARS).parameters.values())
    assert [p.name for p in parameters[: len(PEERS) + 1]] == ["params", *PEERS]
    assert {p.name: p.default for p in parameters[2 : len(PEERS) + 1]} == {k: v for k, v in PEERS.items() if k != "lr"}
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[len(PEERS) + 1 :])
    values = (0.2, 0.9, 0, 1e-4, True, 0.02, 1e-6)
    params = make_params(torch.float32)
    for optimizer in (LARS(params, *values), LARS(params, **dict(zip(PEERS, values, strict=True)))):
        assert tuple(optimizer.param_groups[0][name] for name in PEERS) == values
    optimizer = LARS([{"params": params[:2], "weight_decay": 0}, {"params": params[2:]}], 0.2, weight_decay=1e-4)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 1e-4]


# the group keys of their state dicts; quadra keeps the last two on self, so no checkpoint has them
FORMATS = {
    "bolts_and_lightly": tuple(PEERS),
    "quadra": tuple(PEERS)[:5],
    "quadra_with_a_scheduler": (*tuple(PEERS)[:5], "initial_lr"),
}


MOMENTUM: list[Options] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.25},
    {"momentum": 0.9, "nesterov": True},
]


@pairs("options of how", MOMENTUM, FORMATS, IMPLEMENTATIONS)
def test_their_checkpoints_resume(options: Options, of: str, how: str) -> None:
    keys = FORMATS[of]
    values = {**PEERS, "lr": 0.5, "initial_lr": 0.5, "trust_coefficient": 0.1, "eps": 1e-6, **options}
    params = make_params(torch.float64, layouts=LAYOUTS)
    groups = [{"params": params[:3], "weight_decay": 0.05}, {"params": params[3:], "weight_decay": 0}]
    reference = ReferenceLARS(groups, **values)
    for step in range(2):
        reference.step(make_grads("late", params, step))
    # they keep no state without momentum, nor for tensors without a gradient, so "late" sometimes has none
    buffers = {i: torch.as_tensor(v) for i, v in enumerate(reference.momentum_buffers) if v is not None}
    assert len(buffers) == (len(params) // 2 if options else 0)
    saved = {
        "state": {i: {"momentum_buffer": buffer} for i, buffer in buffers.items()},
        "param_groups": [
            {**{key: values[key] for key in keys}, "weight_decay": 0.05, "params": [0, 1, 2]},
            {**{key: values[key] for key in keys}, "weight_decay": 0, "params": [3, 4, 5]},
        ],
    }
    with torch.no_grad():
        for param, value in zip(params, reference.params, strict=True):
            param.copy_(torch.as_tensor(value))

    optimizer = LARS(groups, lr=9.0, trust_coefficient=0.1, eps=1e-6, **IMPLEMENTATIONS[how])
    optimizer.load_state_dict(through_a_file(saved))
    for step in range(2, 5):
        grads = make_grads("late", params, step)
        set_grads(params, grads)
        reference.step(grads)
        optimizer.step()
        assert_equals(reference, optimizer, f"step {step}")


# ---------------------------------------------------------------- of torch's SGD
SGD_OPTIONS: dict[str, Options] = {
    "plain": {},
    "decay": {"weight_decay": 0.05},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.25, "weight_decay": 0.05},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "maximize": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05, "maximize": True},
    "tensor_lr": {"lr": torch.tensor(0.5), "momentum": 0.9},
}


def goes_on_as_sgd(
    sgd: torch.optim.SGD, edit: Callable[[dict[str, Any]], None] = lambda _: None, history: str = "late"
) -> LARS:
    optimizer = LARS(clones(sgd), lr=9.0, weight_decay=0.7, trust_coefficient=0.7, adapt=False)
    saved = through_a_file(sgd.state_dict())
    edit(saved)
    optimizer.load_state_dict(saved)
    for step in range(2, STEPS + 1):
        for each in (sgd, optimizer):
            go_on(each, [step], history)
        assert all_bits(optimizer) == all_bits(sgd), f"step {step}"
    return optimizer


@pairs("of dtype foreach", SGD_OPTIONS, DTYPES, [None, False, True])
def test_checkpoints_of_sgd_resume(of: str, dtype: torch.dtype, foreach: bool | None) -> None:
    sgd = torch.optim.SGD(make_params(dtype, layouts=LAYOUTS), **{"lr": 0.5, **SGD_OPTIONS[of]}, foreach=foreach)
    # torch._foreach_mul_ rounds its factor to a half dtype on CPU and mul_ does not. So in torch's SGD with momentum, whether
    # one tensor is at its first step changes the bits of the others
    history = "dense" if foreach and dtype.itemsize == 2 else "late"
    go_on(sgd, range(2), history)
    group = goes_on_as_sgd(sgd, history=history).param_groups[0]
    assert (group["adapt"], group["trust_coefficient"], group["foreach"]) == (False, 0.7, foreach)


def test_checkpoints_of_older_versions_of_sgd_resume() -> None:
    """They wrote an entry for every tensor, None without a buffer, and had no maximize, foreach or fused."""

    def edit(saved: dict[str, Any]) -> None:
        saved["state"] = {i: {"momentum_buffer": None} for i in range(len(LAYOUTS))}
        for key in ("maximize", "foreach", "differentiable", "fused"):
            saved["param_groups"][0].pop(key, None)

    sgd = torch.optim.SGD(make_params(torch.float32, layouts=LAYOUTS), lr=0.5, weight_decay=0.1)
    go_on(sgd, range(2))
    assert buffers_of(goes_on_as_sgd(sgd, edit)) == [None] * len(LAYOUTS)

    sgd = torch.optim.SGD(make_params(torch.float32, layouts=LAYOUTS), lr=0.5, momentum=0.9, dampening=0.5)
    goes_on_as_sgd(sgd, edit)


@loop_over("options", SGD_OPTIONS.values())
def test_checkpoints_of_fused_sgd_resume(options: Options) -> None:
    # no late gradients, because torch's fused SGD raises if only some tensors are at their first step
    sgd = torch.optim.SGD(make_params(torch.float32, layouts=LAYOUTS), **{"lr": 0.5, **options}, fused=True)
    go_on(sgd, range(2), "dense")
    assert goes_on_as_sgd(sgd, history="dense").param_groups[0]["fused"] is True


def test_a_wrapper_that_would_not_pass_on_its_state_is_refused() -> None:
    """Like LightningOptimizer: of the optimizer's class, with its attributes, but without param groups of its own."""

    class Wrapper:
        def __init__(self, optimizer: LARS) -> None:
            self._optimizer = optimizer
            self.__class__ = type("WrapperLARS", (Wrapper, LARS), {})

        def __getattr__(self, name: str) -> Any:
            return getattr(self._optimizer, name)

    optimizer = LARS([torch.nn.Parameter(torch.ones(2))], lr=0.5, momentum=0.9, weight_decay=0.1)
    saved = {**optimizer.state_dict(), "state": {0: {"momentum_buffer": torch.ones(2)}}}
    wrapper: Any = Wrapper(optimizer)
    with pytest.raises(RuntimeError, match=r"WrapperLARS wraps an optimizer.*self\.optimizers\(\)\.optimizer\.load"):
        wrapper.load_state_dict(saved)
    assert not optimizer.state and vars(wrapper).keys() == {"_optimizer"}
    optimizer.load_state_dict(saved)
    assert optimizer.state
