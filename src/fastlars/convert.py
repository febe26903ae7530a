"""Convert the state of other optimizers. The conversion finds each parameter's momentum and changes its unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .groups import unwrapped

# State keys of momentum that LARS can continue with.
MOMENTUM = ("momentum_buffer", "mu", "state1", "trace")
# State keys of optimizers without such momentum: Adam's family, RMSprop and Adadelta, Adagrad, ASGD, Rprop.
OTHERS = ("exp_avg", "square_avg", "sum", "ax", "prev")
# The key under which bitsandbytes saves its state, such as state1.
NESTED = "__bnb_optimizer_quant_state__"


def foreign_key(state: Mapping[str, Any], param: Tensor) -> str | None:
    """The key that shows that another optimizer made this state. None if LARS or torch's SGD may have made it.

    Only a tensor of the parameter's shape under a known name counts, because hooks may keep other entries in the state.
    The result is also None if there is a momentum buffer.
    """
    if "momentum_buffer" in state:
        return None
    state = _flat(state)
    return next((key for key in (*MOMENTUM, *OTHERS) if _is_like(state.get(key), param)), None)


def groups_and_states(state_dict: Any) -> tuple[list[Mapping[str, Any]], Mapping[Any, Any]]:
    """The param groups and states of a state dict. Raises if it is not a state dict."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        got = list(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(
            f"an optimizer's state dict must have the keys 'state' and 'param_groups', got {got}{_hint(state_dict)}"
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
    """For a whole checkpoint, a note that names the entry with the optimizer's state dict."""
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
    """Convert the state dict of another optimizer into one that ``optimizer`` can load.

    Momentum continues where the other optimizer left it. It is converted to the unit that the groups of ``optimizer``
    need. With ``lr_in_momentum``, a buffer holds the change of the parameter, and otherwise this change divided by lr.
    Options come from ``optimizer``, but lr is the saved one unless ``keep_lr``. If both optimizers use the same dialect,
    training resumes exactly.

    Supported state keys are ``momentum_buffer`` (LARS itself, from one dialect to another; torch's SGD; timm; apex and
    torchlars; pytorch_optimizer; bitsandbytes' PytorchLARS), ``mu`` (Barlow Twins, VICReg, MoCo v3, MAE, BYOL), ``trace``
    (optax.lars, whose momentum includes lr and has the opposite sign) and ``state1`` (32-bit bitsandbytes, a sum of
    gradients without ratios, which is clipped to max_unorm times the parameter's norm, as bitsandbytes does in every step).

    Args:
        state_dict: what the other optimizer's ``state_dict()`` returned. If you write it by hand, as for optax, it needs
            no "param_groups", and its keys are positions: ``{"state": {0: {"trace": tensor}, ...}}``.
        optimizer: the optimizer that will load the result. It is not changed. Its groups may differ from the saved ones.
        params: the parameters in the order of the other optimizer, such as ``model.parameters()``. If None (default),
            parameters are matched by name if both optimizers have names (without prefixes such as ``module.`` that
            wrappers add). Otherwise they are matched by position, which needs groups of equal sizes.
        keep_lr: whether to keep the lr of ``optimizer`` (default: False). If True, buffers are multiplied by the saved
            lr and divided by the kept one, so momentum changes the parameters as much as before. Use it if lr has another
            meaning in the other optimizer, as in SGD.

    Returns:
        A new state dict that shares no tensors with the old one.

    Raises:
        ValueError: if ``state_dict`` is not a state dict; if a state has no momentum that LARS can continue with; if
            parameters do not fit or cannot be matched; if momentum is saved under a key that no parameter has; if the
            parameters of one group were saved with several lrs; if buffers would be divided by an lr of 0.
        TypeError: if an entry of ``state_dict`` has the wrong type.

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
                f"param group {i} can have one lr, but its parameters were saved with {sorted(lrs)}; split it, or pass "
                "keep_lr=True"
            )
        if not keep_lr and lrs:
            packed["lr"] = torch.full_like(group["lr"], *lrs) if isinstance(group["lr"], Tensor) else lrs.pop()
        for j, (index, p) in enumerate(zip(packed["params"], group["params"], strict=True)):
            buffer = _buffer(saved_of[p], p, packed, keep_lr, f"parameter {j} of param group {i}")
            entry = {} if buffer is None else {"momentum_buffer": buffer}
            kept = saved_of[p].state.get("compensation")
            if isinstance(kept, Tensor):  # in every dialect, a compensation has the unit of the weights
                entry["compensation"] = kept.clone()
            if entry:
                state[index] = entry
    return {"state": state, "param_groups": groups}


class _Saved(NamedTuple):
    """The saved state and the saved group of one parameter."""

    state: Mapping[str, Any]
    group: Mapping[str, Any]


def _match(state_dict: Mapping[str, Any], optimizer: Optimizer, params: list[Tensor] | None) -> dict[Tensor, _Saved]:
    """Every parameter of ``optimizer`` with its saved state and group."""
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
        raise ValueError(f"params must have the {len(saved)} parameters of the state dict, got {len(params)}")
    param_of: dict[int | str, Tensor] = {}
    for key, param in zip(keys, params, strict=True):
        if param_of.setdefault(key, param) is not param:
            raise ValueError(f"the state dict has two parameters under the key {key!r}; keys must differ")
    saved_of = dict(zip(params, saved, strict=True))
    if lacking := [i for i, p in enumerate(ours) if p not in saved_of]:
        raise ValueError(
            f"params must have all {len(ours)} parameters of the optimizer, {len(lacking)} are missing, the first at "
            f"position {lacking[0]}"
        )
    known = set(ours)
    if left_over := [i for i, p in enumerate(params) if p not in known and saved[i].state]:
        raise ValueError(
            f"the optimizer must have every parameter with saved state, {len(left_over)} are missing, the first at "
            f"position {left_over[0]} of params; add them, or remove their state"
        )
    return saved_of


def _keys_by_hand(states: Any, count: int, named: bool) -> list[Any]:
    """The keys of all parameters of a state dict without groups: positions, or names if ``states`` has names as keys."""
    texts = [key for key in states if isinstance(key, str)] if isinstance(states, Mapping) else []
    if not texts:
        return list(range(count))
    if not named:
        raise ValueError(
            f"without param_groups the keys of 'state' must be positions, got {texts[0]!r}; use integers (JSON turns them "
            "into strings), or build the optimizer from named parameters and leave out params"
        )
    return texts


def _check_states(keys: list[int | str], states: Mapping[Any, Any]) -> None:
    """Raise for states that are not dicts, and for states that belong to no parameter."""
    known = set(keys)
    for key, state in states.items():
        if not isinstance(state, Mapping):
            if key in known:  # hooks may keep their own entries
                raise TypeError(f"the state under {key!r} must be a dict, got {type(state).__name__}")
        elif key not in known and any(isinstance(_flat(state).get(name), Tensor) for name in (*MOMENTUM, *OTHERS)):
            raise ValueError(
                f"the state dict has optimizer state under {key!r}, which is not among the keys of its parameters "
                f"({keys[:3]} and so on), so it would be lost; restore or remove the key (JSON turns numbers into strings)"
            )


def _in_saved_order(groups: Sequence[Mapping[str, Any]], our_groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """The optimizer's parameters in saved order, matched by name if both sides have names, else by position."""
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
            f"the state dict and the optimizer name their parameters differently: {differing[0]!r} is a name that only one "
            "of them has, or that several parameters have; pass params, the parameters in the order of the state dict, as "
            "in params=model.parameters()"
        )
    sizes, our_sizes = ([len(group["params"]) for group in each] for each in (groups, our_groups))
    if sizes != our_sizes:
        raise ValueError(
            f"the groups of the state dict have {sizes} parameters, those of the optimizer {our_sizes}; pass params, "
            "the parameters in the order of the state dict, as in params=model.parameters()"
        )
    return ours


def _names(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of all parameters without wrappers' prefixes. Empty if any parameter has no name."""
    names = [name for group in groups for name in group.get("param_names", group["params"])]
    return [unwrapped(name) for name in names] if all(isinstance(name, str) for name in names) else []


def _buffer(saved: _Saved, param: Tensor, target: Mapping[str, Any], keep_lr: bool, where: str) -> Tensor | None:
    """The momentum buffer of one parameter in the unit of its target group, or None if no momentum was saved."""
    state, group = _flat(saved.state), saved.group
    # if there is also a state2, state1 is the first moment of an Adam-like optimizer, which LARS cannot use
    key = next((key for key in MOMENTUM if state.get(key) is not None and "state2" not in state), None)
    if key is None:
        if others := [key for key, value in state.items() if key != "compensation" and _is_like(value, param)]:
            raise ValueError(
                f"the state of {where} must hold one of {', '.join(MOMENTUM)}, got {', '.join(others)}, with which LARS "
                "cannot continue; do not load it, because LARS builds its own momentum within 1 / (1 - momentum) steps"
            )
        return None
    buffer = state[key]
    if not _is_like(buffer, param) or not (buffer.is_floating_point() or buffer.is_complex()):
        raise ValueError(
            f"{key} of {where} must be a floating tensor of shape {tuple(param.shape)}, got {_kind(buffer)}; check "
            "the order and layout of the parameters (8-bit state cannot be converted)"
        )

    with_lr = key == "trace" or bool(group.get("lr_in_momentum", False))
    lr = float(target["lr"])
    have = 1.0 if with_lr else float(group.get("lr", lr)) if keep_lr else lr
    want = 1.0 if target.get("lr_in_momentum", False) else lr
    if want == 0 and have != 0:
        raise ValueError(
            f"lr must not be 0, because the {key} of {where} is divided by it; set the lr that the run continues with"
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


def _kind(value: object) -> str:
    return f"{tuple(value.shape)} and {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
