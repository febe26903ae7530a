"""Everything that depends on the torch version. tests/test_private_names.py lists what torch does not document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._jit_internal import is_scripting  # torch.jit's own, for which it has no type
from torch.autograd.graph import increment_version
from torch.optim.optimizer import (
    _default_to_fused_or_foreach,  # since 2.0
    _use_grad_for_differentiable,  # since 1.13
    required,  # since the beginning; torch's optimizers no longer use it, its message is what users know
)

__all__ = [
    "COMPILES_BITS",
    "NAMED_PARAMETERS",
    "bump_versions",
    "default_foreach",
    "is_scripting",
    "metadata_guard",
    "operations_are_seen",
    "outside_graphs",
    "required",
    "use_grad_for_differentiable",
]

# Lazy, unlike torch.compiler.disable, which imports torch._dynamo at once: since 2.1, what torch's fused optimizers use.
outside_graphs = torch._disable_dynamo  # type: ignore[attr-defined]
use_grad_for_differentiable = _use_grad_for_differentiable

_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

# Optimizers take (name, parameter) pairs and keep group["param_names"] from 2.6 on.
NAMED_PARAMETERS = _TORCH >= (2, 6)
# Inductor compiles operations on the bits of half types on CPU; 2.4 writes C++ that does not compile, 2.13 is tested.
COMPILES_BITS = _TORCH >= (2, 13)


def bump_versions(tensors: list[Tensor]) -> None:
    """Tell autograd that these were written, for kernels that do not."""
    if _TORCH >= (2, 8):
        increment_version(tensors)
        return
    for tensor in tensors:
        increment_version(tensor)


def metadata_guard(tensors: list[Tensor]) -> Callable[..., bool] | None:
    """What tells whether as many tensors have the types, dtypes, devices, layouts, sizes and strides of these, in one call.

    torch.compile asks the inputs of its graphs so, and it takes a sixth of the time of asking each from Python. Lists that
    hold a tensor twice are never the same; at nested tensors, which autograd gives to no plain parameter, it may abort.
    None where torch has it no more.
    """
    sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    try:
        guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    except (AttributeError, TypeError):
        return None
    return guards.check


def operations_are_seen() -> bool:
    """Whether a dispatch mode or a transform of torch.func takes what torch computes now: to trace it, or on fake tensors.

    True where torch cannot tell.
    """
    try:
        return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None
    except AttributeError:
        return True


def default_foreach(params: list[Tensor]) -> bool:
    """Whether the foreach implementation is the default for these tensors: torch's own rule."""
    return _default_to_fused_or_foreach(params, differentiable=False, use_fused=False)[1]
