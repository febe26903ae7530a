"""Custom operators for torch.compile, which Inductor does not decompose.

Inductor, its usual backend, stacks the results of ``_foreach_norm`` with one copy kernel per result, and on a CPU traces
a dozen operations for each norm. So a graph has one operator for the norms of a list. Everything else stays arithmetic
that Inductor fuses.

The operators are registered with a plain ``Library``. Each call of a ``torch.library.custom_op`` also checks that its
results share no memory with its inputs, which takes 0.3 ms for a model's list of tensors.
"""

from typing import Any

import torch
from torch import Tensor

from . import norms as exact
from .compat import COMPILES_BITS
from .dtypes import norm_dtype

# Devices for which Inductor generates code. Other backends (openxla) do not know our operators, which would split a graph.
_DEVICES = ("cpu", "cuda", "xpu")

_LIBRARY: Any = torch.library.Library("fastlars", "DEF")  # type: ignore[no-untyped-call]  # torch's
_LIBRARY.define("norms(Tensor[] tensors) -> Tensor")
_LIBRARY.define("joint_norms(Tensor[] params, Tensor[] grads, float sign, float weight_decay) -> Tensor")
_LIBRARY.define("realized(Tensor vector) -> Tensor")


def _norms(tensors: list[Tensor]) -> Tensor:
    return exact.norms(tensors, foreach=True)


def _joint_norms(params: list[Tensor], grads: list[Tensor], sign: float, weight_decay: float) -> Tensor:
    return exact.joint_norms(params, grads, sign, weight_decay, foreach=True)


def _one_for_each(tensors: list[Tensor], *_: object) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=norm_dtype(tensors[0].dtype))


for _name, _kernel, _fake in (
    ("norms", _norms, _one_for_each),
    ("joint_norms", _joint_norms, _one_for_each),
    ("realized", torch.clone, torch.empty_like),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlars::{_name}", _fake, lib=_LIBRARY)


def is_traced(tensor: Tensor) -> bool:
    """Whether work on this tensor is traced into a graph that supports our operators.

    False with autograd on, because it cannot differentiate our operators.
    """
    return torch.compiler.is_compiling() and not torch.is_grad_enabled() and tensor.device.type in _DEVICES


def norms(tensors: list[Tensor], foreach: bool) -> Tensor:
    """Like `norms.norms`."""
    if is_traced(tensors[0]):
        in_graph: Tensor = torch.ops.fastlars.norms.default(tensors)
        return in_graph
    return exact.norms(tensors, foreach)


def joint_norms(params: list[Tensor], grads: list[Tensor], sign: float, weight_decay: float, foreach: bool) -> Tensor:
    """Like `norms.joint_norms`."""
    if is_traced(params[0]):
        in_graph: Tensor = torch.ops.fastlars.joint_norms.default(params, grads, sign, weight_decay)
        return in_graph
    return exact.joint_norms(params, grads, sign, weight_decay, foreach)


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 tensor rounded to a half type. Graphs round the bits, because Inductor drops a conversion and its inverse."""
    if not torch.compiler.is_compiling():
        return tensor.to(dtype).to(tensor.dtype)
    if tensor.is_cpu and not COMPILES_BITS:
        half: Tensor = torch.ops.fastlars.realized.default(tensor.to(dtype))
        return half.to(tensor.dtype)
    return tensor.to(dtype).view(torch.int16).bitwise_or(0).view(dtype).to(tensor.dtype)


def unbind(vector: Tensor) -> list[Tensor]:
    """The numbers of a vector as 0-dim tensors.

    In a graph the vector is materialised first, because Inductor would recompute it in the loop over each tensor.
    """
    if is_traced(vector):
        on_cpu = vector.is_cpu  # on other devices setting strides is enough and costs no operator
        vector = (
            torch.ops.fastlars.realized.default(vector) if on_cpu else vector.as_strided(vector.shape, vector.stride())
        )
    return list(vector.unbind())
