"""What a state dict must be before it is loaded: whatever does not fit is refused whole, with the place and the rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import sharding
from .convert import foreign_key


def check_saved_state(optimizer: Optimizer, state_dict: Any) -> None:
    """Raise for what torch would load in part, or fail at with an error that names no place."""
    saved_groups, states = groups_and_states(state_dict)
    groups = optimizer.param_groups
    sizes, ours = ([len(group["params"]) for group in each] for each in (saved_groups, groups))
    if sizes != ours:
        raise ValueError(
            f"the state dict has {len(sizes)} param groups with {sizes} parameters, this optimizer {len(ours)} with {ours}; "
            "build the groups as they were, or sort what was saved with fastlars.convert_state_dict(state_dict, optimizer, "
            "params=...)"
        )
    params: dict[int | str, Tensor] = {}
    for i, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        names, count = saved.get("param_names"), len(group["params"])
        named = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        if names is not None and not (named and len(names) == count):
            raise ValueError(f"param group {i}: param_names must be a list of {count} texts, got {names!r}")
        for j, (key, param) in enumerate(zip(saved["params"], group["params"], strict=True)):
            where = f"parameter {j} of param group {i}"
            if params.setdefault(key, param) is not param:
                raise ValueError(
                    f"{where} has the key {key!r} of an earlier parameter; keys must differ as parameters do"
                )
            _check_state(states.get(key, {}), param, where)
    for key, state in states.items():  # of what is no parameter's: hooks keep things of their own there
        if key not in params and isinstance(state, dict) and "momentum_buffer" in state:
            raise ValueError(
                f"the state dict has a momentum_buffer under {key!r}, which is not among the keys of its param groups, "
                f"{list(params)[:3]} and so on: it would be lost; rename or remove it"
            )


def groups_and_states(state_dict: Any) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    """The two parts of a state dict; raises for what is none."""
    got = list(state_dict) if isinstance(state_dict, dict) else type(state_dict).__name__
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"a state dict of an optimizer must have the keys 'state' and 'param_groups', got {got}")
    groups, states = state_dict["param_groups"], state_dict["state"]
    if not isinstance(groups, (list, tuple)) or not isinstance(states, dict):
        raise TypeError(
            "the state dict must have a dict under 'state' and a list under 'param_groups', got "
            f"{type(states).__name__} and {type(groups).__name__}"
        )
    for i, group in enumerate(groups):
        keys = group.get("params") if isinstance(group, dict) else None
        if not isinstance(keys, (list, tuple)) or not all(isinstance(key, (int, str)) for key in keys):
            raise TypeError(f"param group {i} of the state dict must be a dict with a list of keys under 'params'")
    return list(groups), states


def _check_state(state: Any, param: Tensor, where: str) -> None:
    if not isinstance(state, dict):
        raise TypeError(f"the state of {where} must be a dict, got {type(state).__name__}")
    if key := foreign_key(state, param):
        raise ValueError(
            f"the state of {where} holds {key} and no momentum_buffer: another optimizer made it, and momentum would begin "
            "anew unnoticed; convert it with fastlars.convert_state_dict(state_dict, optimizer), or load "
            "{**state_dict, 'state': {}}"
        )
    buffer = state.get("momentum_buffer")
    if buffer is None:
        return
    if not isinstance(buffer, Tensor):
        raise TypeError(f"momentum_buffer of {where} must be a tensor, got {type(buffer).__name__}")
    fits = buffer.is_complex() if param.is_complex() else buffer.is_floating_point()
    if buffer.shape != param.shape or not fits:
        raise ValueError(
            f"momentum_buffer of {where} must have shape {tuple(param.shape)} and kind {param.dtype}, got "
            f"{tuple(buffer.shape)} and {buffer.dtype}; was the state dict saved for other parameters?"
        )
    if sharding.any_sharded([buffer]) != sharding.any_sharded([param]):
        raise TypeError(
            f"momentum_buffer of {where} must be a DTensor exactly if the parameter is one; save and load through "
            "torch.distributed.checkpoint.state_dict, which distributes what it loads"
        )
    # a step would fail in its middle
    if buffer.layout is not torch.strided or any(
        n > 1 and stride == 0 for n, stride in zip(buffer.shape, buffer.stride())
    ):
        raise ValueError(
            f"momentum_buffer of {where} must have memory of its own for every element, got layout {buffer.layout} or an "
            "expanded tensor; save a dense copy"
        )
