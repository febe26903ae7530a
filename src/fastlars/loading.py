"""Checks of a state dict before it is loaded. Any mismatch rejects the whole state dict with an error that names the place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import sharding
from .backends.layouts import find_shared_memory, own_every_element
from .convert import foreign_key, groups_and_states

# the keys under which a step stores its state tensors
STATE = ("momentum_buffer", "compensation")


def check_saved_state(optimizer: Optimizer, state_dict: Any) -> None:
    """Raise for mismatches that torch would load in part or would report without naming the place."""
    saved_groups, states = groups_and_states(state_dict)
    groups = optimizer.param_groups
    sizes, ours = ([len(group["params"]) for group in each] for each in (saved_groups, groups))
    if sizes != ours:
        raise ValueError(
            f"the state dict has {len(sizes)} param groups with {sizes} parameters, this optimizer {len(ours)} with {ours}; "
            "build the groups as when it was saved, or regroup the state with "
            "fastlars.convert_state_dict(state_dict, optimizer, params=...)"
        )
    params: dict[int | str, Tensor] = {}
    for i, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        names, count = saved.get("param_names"), len(group["params"])
        named = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        if names is not None and not (named and len(names) == count):
            raise ValueError(f"param group {i}: param_names must be a list of {count} strings, got {names!r}")
        for j, (key, param) in enumerate(zip(saved["params"], group["params"], strict=True)):
            where = f"parameter {j} of param group {i}"
            if params.setdefault(key, param) is not param:
                raise ValueError(
                    f"{where} has the key {key!r} of an earlier parameter; every parameter needs its own key"
                )
            _check_state(states.get(key, {}), param, where)
    _check_own_memory(params, states)
    for key, state in states.items():  # other keys may be from hooks, but must not hold LARS's state
        if key not in params and isinstance(state, dict) and (found := [name for name in STATE if name in state]):
            raise ValueError(
                f"the state dict has a {found[0]} under {key!r}, which is not among the keys of its param groups "
                f"({list(params)[:3]} and so on), so it would be lost; rename or remove it"
            )


def _check_own_memory(params: dict[int | str, Tensor], states: Mapping[Any, Any]) -> None:
    """Raise if updating one parameter would also write another parameter or its state."""
    made = {
        f"the {name} under key {key!r}": sharding.local(states[key][name])
        for name in STATE
        for key in params
        if states.get(key, {}).get(name) is not None
    }
    owners = [*made, *(f"the parameter of key {key!r}" for key in params)]
    tensors = [*made.values(), *map(sharding.local, params.values())]
    if shared := find_shared_memory(tensors, len(made)):
        raise ValueError(
            f"{owners[shared[0]]} of the state dict shares memory with {owners[shared[1]]}, so a step would write "
            "both; load a copy, as in copy.deepcopy(state_dict), or save a clone of each buffer"
        )


def _check_state(state: Any, param: Tensor, where: str) -> None:
    if not isinstance(state, dict):
        raise TypeError(f"the state of {where} must be a dict, got {type(state).__name__}")
    if key := foreign_key(state, param):
        raise ValueError(
            f"the state of {where} holds {key} and no momentum_buffer: another optimizer saved it, and momentum would "
            "silently start from zero; convert it with fastlars.convert_state_dict(state_dict, optimizer), or load "
            "{**state_dict, 'state': {}} to start without momentum"
        )
    for name in STATE:
        if state.get(name) is not None:
            _check_tensor(name, state[name], param, where)


def _check_tensor(name: str, buffer: Any, param: Tensor, where: str) -> None:
    if not isinstance(buffer, Tensor):
        raise TypeError(f"{name} of {where} must be a tensor, got {type(buffer).__name__}")
    fits = buffer.is_complex() if param.is_complex() else buffer.is_floating_point()
    if buffer.shape != param.shape or not fits:
        raise ValueError(
            f"{name} of {where} must be a {'complex' if param.is_complex() else 'floating'} tensor of shape "
            f"{tuple(param.shape)}, got {tuple(buffer.shape)} and {buffer.dtype}; was the state dict saved for other "
            "parameters?"
        )
    sharding.check_saved_buffer(buffer, param, f"{name} of {where}")
    own = sharding.local(buffer)
    # otherwise a step would fail halfway
    if own.layout is not torch.strided or not own_every_element(own):
        raise ValueError(
            f"{name} of {where} must have its own memory for every element, got layout {own.layout} or an "
            "expanded or overlapping tensor; save a dense copy"
        )
