"""The state of other optimizers as LARS's: whose momentum it is, of which parameter, and in which unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .groups import unwrapped

# Where optimizers keep momentum that LARS can go on with.
MOMENTUM = ("momentum_buffer", "mu", "state1", "trace")
# Signs of those that have none: Adam's kin, RMSprop and Adadelta, Adagrad, ASGD, Rprop.
OTHERS = ("exp_avg", "square_avg", "sum", "ax", "prev")
# Into which bitsandbytes puts state1 and what else it has, when it saves.
NESTED = "__bnb_optimizer_quant_state__"


def foreign_key(state: Mapping[str, Any], param: Tensor) -> str | None:
    """The key in a parameter's state that shows that another optimizer made it; None if LARS or torch's SGD may have.

    Hooks keep things of their own in the state. A sign is only a tensor like the parameter, under a known name, where
    there is no momentum buffer.
    """
    if "momentum_buffer" in state:
        return None
    state = _flat(state)
    return next((key for key in (*MOMENTUM, *OTHERS) if _is_like(state.get(key), param)), None)


def groups_and_states(state_dict: Any) -> tuple[list[Mapping[str, Any]], Mapping[Any, Any]]:
    """The two parts of a state dict; raises for anything else."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        got = list(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(
            f"a state dict of an optimizer must have the keys 'state' and 'param_groups', got {got}{_hint(state_dict)}"
        )
    groups, states = state_dict["param_groups"], state_dict["state"]
    if not isinstance(groups, (list, tuple)) or not isinstance(states, Mapping):
        raise TypeError(
            "the state dict must have a dict under 'state' and a list under 'param_groups', got "
            f"{type(states).__name__} and {type(groups).__name__}"
        )
    for i, group in enumerate(groups):
        keys = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(keys, (list, tuple)) or not all(isinstance(key, (int, str)) for key in keys):
            raise TypeError(f"param group {i} of the state dict must be a dict with a list of keys under 'params'")
    return list(groups), states


def _hint(state_dict: Any) -> str:
    """Where in a whole checkpoint the optimizer's state dict is."""
    entries = state_dict.items() if isinstance(state_dict, Mapping) else ()
    found = next((key for key, value in entries if isinstance(value, Mapping) and "param_groups" in value), None)
    return "" if found is None else f"; this looks like a whole checkpoint, pass its entry {found!r}"


@torch.no_grad()
def convert_state_dict(
    state_dict: Mapping[str, Any],
    optimizer: Optimizer,
    *,
    params: Iterable[Tensor] | None = None,
    keep_lr: bool = False,
) -> dict[str, Any]:
    """The state dict of another optimizer, as one that ``optimizer.load_state_dict`` takes.

    The momentum goes on where the other optimizer left it, in the unit that the groups of ``optimizer`` need: with
    ``lr_in_momentum`` what the parameter moves by, else that divided by lr. Options are those of ``optimizer``, but lr
    is the saved one. If both are of the same dialect, the run goes on exactly.

    Known are ``momentum_buffer`` (LARS itself, from one dialect to another; torch's SGD; timm; apex and torchlars;
    pytorch_optimizer; bitsandbytes' PytorchLARS), ``mu`` (Barlow Twins, VICReg, MoCo v3, MAE, BYOL), ``trace``
    (optax.lars: with lr in it, negated) and ``state1`` (bitsandbytes, 32 bits: a sum of gradients without ratios; it is
    cut to max_unorm times the parameter's norm, as every step of theirs cuts it).

    Args:
        state_dict: what ``state_dict()`` returned. Written by hand, as for optax, it needs no "param_groups"; the keys
            are positions then: ``{"state": {0: {"trace": tensor}, ...}}``.
        optimizer: the one that will load the result; it is not changed. Its groups may be other ones than those saved.
        params: the parameters in the order in which the other optimizer had them, as of ``model.parameters()``. None:
            by their names if both optimizers have them (``module.`` and the like, which wrappers add, do not count), else
            by position, which needs groups of equal sizes.
        keep_lr: keep the lr that ``optimizer`` has. Buffers are then scaled by saved lr / lr, so that momentum moves
            the parameters as far as it did; for optimizers in which lr means something else, as in SGD.

    Returns:
        A new state dict; it shares no tensors with the old one.

    Raises:
        ValueError: for what is no state dict, state without momentum that LARS could go on with, parameters that do not
            fit or cannot be told apart, momentum under a key of no parameter, several saved lr in one group of
            ``optimizer``, and lr 0 where buffers must be divided by it.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fastlars.LARS([w], lr=0.1, momentum=0.9, dialect="byol")
        >>> saved = {"state": {0: {"mu": torch.full((2,), 0.5)}}, "param_groups": [{"lr": 0.3, "params": [0]}]}
        >>> optimizer.load_state_dict(fastlars.convert_state_dict(saved, optimizer))
        >>> optimizer.state[w]["momentum_buffer"], optimizer.param_groups[0]["lr"]
        (tensor([0.5000, 0.5000]), 0.3)
    """
    saved_of = _match(state_dict, optimizer, None if params is None else list(params))
    groups = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, Tensor]] = {}
    for i, (group, packed) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        lrs = {float(saved.group["lr"]) for p in group["params"] if "lr" in (saved := saved_of[p]).group}
        if not keep_lr and len(lrs) > 1:
            raise ValueError(
                f"param group {i} has parameters whose saved lr are {sorted(lrs)}; split it, or pass keep_lr"
            )
        if not keep_lr and lrs:
            packed["lr"] = torch.full_like(group["lr"], *lrs) if isinstance(group["lr"], Tensor) else lrs.pop()
        for j, (index, p) in enumerate(zip(packed["params"], group["params"], strict=True)):
            buffer = _buffer(saved_of[p], p, packed, keep_lr, f"parameter {j} of param group {i}")
            entry = {} if buffer is None else {"momentum_buffer": buffer}
            kept = saved_of[p].state.get("compensation")
            if isinstance(kept, Tensor):  # in units of the weights, whatever the dialect
                entry["compensation"] = kept.clone()
            if entry:
                state[index] = entry
    return {"state": state, "param_groups": groups}


class _Saved(NamedTuple):
    """What a state dict holds of one parameter."""

    state: Mapping[str, Any]
    group: Mapping[str, Any]


def _match(state_dict: Mapping[str, Any], optimizer: Optimizer, params: list[Tensor] | None) -> dict[Tensor, _Saved]:
    """Every parameter of ``optimizer`` with what was saved of it."""
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(state_dict, Mapping) and "param_groups" not in state_dict and "state" in state_dict:
        count = len(ours if params is None else params)
        named = params is None and bool(_names(optimizer.param_groups))
        state_dict = {**state_dict, "param_groups": [{"params": _keys_by_hand(state_dict["state"], count, named)}]}
    groups, states = groups_and_states(state_dict)
    keys = [key for group in groups for key in group["params"]]
    _check_states(keys, states)
    saved = [_Saved(states.get(key, {}), group) for group in groups for key in group["params"]]
    if params is None:
        params = _in_saved_order(groups, optimizer.param_groups)
    if len(params) != len(saved):
        raise ValueError(f"params has {len(params)} parameters, the state dict {len(saved)}")
    param_of: dict[int | str, Tensor] = {}
    for key, param in zip(keys, params, strict=True):
        if param_of.setdefault(key, param) is not param:
            raise ValueError(f"the state dict has two parameters under the key {key!r}; keys must differ")
    saved_of = dict(zip(params, saved, strict=True))
    if lacking := [i for i, p in enumerate(ours) if p not in saved_of]:
        raise ValueError(
            f"params lacks {len(lacking)} of the optimizer's {len(ours)} parameters, the first at {lacking[0]}"
        )
    known = set(ours)
    if left_over := [i for i, p in enumerate(params) if p not in known and saved[i].state]:
        raise ValueError(
            f"the optimizer lacks {len(left_over)} parameters that have saved state, the first at {left_over[0]}"
        )
    return saved_of


def _keys_by_hand(states: Any, count: int, named: bool) -> list[Any]:
    """The keys of all parameters where no group lists them: positions or, if ``named``, names."""
    texts = [key for key in states if isinstance(key, str)] if isinstance(states, Mapping) else []
    if not texts:
        return list(range(count))
    if not named:
        raise ValueError(
            f"without param_groups the keys of 'state' must be positions, got {texts[0]!r}; use integers (JSON turns them "
            "into text), or build the optimizer of named parameters and leave out params"
        )
    return texts


def _check_states(keys: list[int | str], states: Mapping[Any, Any]) -> None:
    """Raise for states that are none, and for those that no parameter would get."""
    known = set(keys)
    for key, state in states.items():
        if key in known and not isinstance(state, Mapping):
            raise TypeError(f"the state under {key!r} must be a dict, got {type(state).__name__}")
        if key in known or not isinstance(state, Mapping):
            continue  # hooks keep things of their own there
        if any(isinstance(_flat(state).get(name), Tensor) for name in (*MOMENTUM, *OTHERS)):
            raise ValueError(
                f"the state dict has optimizer state under {key!r}, which is not among the keys of its parameters, "
                f"{keys[:3]} and so on, so it would be lost; restore or remove the key (JSON turns numbers into text)"
            )


def _in_saved_order(groups: Sequence[Mapping[str, Any]], our_groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """Our parameters in the order of the saved ones: by their names if both have some, else by position."""
    ours = [p for group in our_groups for p in group["params"]]
    names, our_names = _names(groups), _names(our_groups)
    if names and our_names:
        by_name = dict(zip(our_names, ours, strict=True))
        if names == our_names:
            return ours
        if len(by_name) == len(ours) and sorted(names) == sorted(our_names):
            return [by_name[name] for name in names]
        differing = sorted(set(names) ^ set(our_names)) or names
        raise ValueError(
            f"the state dict and the optimizer name their parameters differently, {differing[0]!r} is one name that only "
            "one of them has or that several parameters have; pass params, the parameters in the order of the state dict, "
            "as in params=model.parameters()"
        )
    sizes, our_sizes = ([len(group["params"]) for group in each] for each in (groups, our_groups))
    if sizes != our_sizes:
        raise ValueError(
            f"the groups of the state dict have {sizes} parameters, those of the optimizer {our_sizes}; pass params, "
            "the parameters in the order of the state dict, as in params=model.parameters()"
        )
    return ours


def _names(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of all parameters, without what wrappers add; none if one has no name."""
    names = [name for group in groups for name in group.get("param_names", group["params"])]
    return [unwrapped(name) for name in names] if all(isinstance(name, str) for name in names) else []


def _buffer(saved: _Saved, param: Tensor, target: Mapping[str, Any], keep_lr: bool, where: str) -> Tensor | None:
    """The momentum buffer of one parameter in the unit of its target group; None where nothing was saved."""
    state, group = _flat(saved.state), saved.group
    # with a state2, state1 is the first moment of Adam's kin
    keys = [key for key in MOMENTUM if state.get(key) is not None and "state2" not in state]
    key = keys[0] if keys else None
    if key is None:
        if others := [key for key, value in state.items() if key != "compensation" and _is_like(value, param)]:
            raise ValueError(
                f"the state of {where} holds {', '.join(others)}, and none of {', '.join(MOMENTUM)}: no momentum that "
                "LARS could go on with; do not load it, LARS builds its own within 1 / (1 - momentum) steps"
            )
        return None
    buffer = state[key]
    if not _is_like(buffer, param) or not (buffer.is_floating_point() or buffer.is_complex()):
        raise ValueError(
            f"{key} of {where} must be a floating tensor of shape {tuple(param.shape)}, got {_told(buffer)}; are the "
            "parameters in the right order and layout, and the state not one of 8 bits?"
        )

    with_lr = key == "trace" or bool(group.get("lr_in_momentum", False))
    lr = float(target["lr"])
    have = 1.0 if with_lr else float(group.get("lr", lr)) if keep_lr else lr
    want = 1.0 if target.get("lr_in_momentum", False) else lr
    if want == 0 and have != 0:
        raise ValueError(
            f"lr is 0, by which the {key} of {where} must be divided; give the lr that the run goes on with"
        )
    factor = (-1.0 if key == "trace" else 1.0) * (1.0 if have == want else have / want)
    if (limit := group.get("max_unorm", 0.02 if key == "state1" else 0.0)) > 0:
        norm = float(torch.linalg.vector_norm(buffer))
        factor *= min(1.0, limit * float(torch.linalg.vector_norm(param.detach())) / norm) if norm > 0 else 1.0
    converted: Tensor = buffer * factor
    return converted


def _flat(state: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = state.get(NESTED)
    return {**state, **nested} if isinstance(nested, Mapping) else state


def _is_like(value: object, param: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == param.shape


def _told(value: object) -> str:
    return f"{tuple(value.shape)} and {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
