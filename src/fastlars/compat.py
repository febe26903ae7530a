"""Everything that depends on the torch version. tests/test_private_names.py lists the undocumented names in this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._jit_internal import is_scripting as is_scripting  # noqa: PLC0414  behind torch.jit.is_scripting, which has no type
from torch.autograd.graph import increment_version
from torch.optim import optimizer as _optimizer

# A decorator to leave graphs, since torch 2.1. Unlike torch.compiler.disable, it imports torch._dynamo only in a call.
outside_graphs = torch._disable_dynamo  # type: ignore[attr-defined]
use_grad_for_differentiable = _optimizer._use_grad_for_differentiable  # since 1.13
required = _optimizer.required  # in every version; torch's optimizers no longer use it, but users know its message

_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

# Since 2.6, optimizers take (name, parameter) pairs and keep group["param_names"].
NAMED_PARAMETERS = _TORCH >= (2, 6)
# Whether Inductor on CPU compiles operations on the bits of half types. torch 2.4 generates invalid C++, and 2.13 works.
COMPILES_BITS = _TORCH >= (2, 13)


def bump_versions(tensors: list[Tensor]) -> None:
    """Bump the version counters that autograd checks, after kernels that do not bump them."""
    if _TORCH >= (2, 8):
        increment_version(tensors)
        return
    for tensor in tensors:
        increment_version(tensor)


def metadata_guard(tensors: list[Tensor]) -> Callable[..., bool] | None:
    """A function that checks in one call that tensors have the same metadata as these. None if this torch version lacks it.

    Metadata means type, dtype, device, layout, sizes, strides and the number of tensors. torch.compile guards the inputs of
    its graphs with the same function, which takes a sixth of the time of a Python loop. A list that holds a tensor twice
    never passes. Nested tensors may abort the process, but the gradient of a plain parameter is never nested.
    """
    sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    try:
        guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    except (AttributeError, TypeError):
        return None
    return guards.check


def operations_are_seen() -> bool:
    """Whether a dispatch mode or a torch.func transform is intercepting operations, for example for tracing or fake tensors.

    True if this torch version cannot tell.
    """
    try:
        return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None
    except AttributeError:
        return True


def default_foreach(params: list[Tensor]) -> bool:
    """Whether torch's own optimizers default to foreach for these tensors."""
    return _optimizer._default_to_fused_or_foreach(params, differentiable=False, use_fused=False)[1]
