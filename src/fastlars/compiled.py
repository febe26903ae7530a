"""Custom operators for torch.compile. Inductor calls them as a whole and does not decompose them.

Inductor stacks the results of ``_foreach_norm`` with one copy kernel per result, and on a CPU it traces a dozen operations for
each norm. So `norms` and `joint_norms` are operators that take lists. `realized` is a copy, for rounding in old torch versions.
Everything else is plain arithmetic that Inductor can fuse.

The operators are registered with a plain ``Library``, because each call of a ``torch.library.custom_op`` would also check
that its results share no memory with its inputs. That check takes 0.3 ms for a model's list of tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import norms as exact
from .buckets import Bucket
from .compat import COMPILES_BITS
from .dtypes import norm_dtype, reals
from .formula import Number, is_adapted

# Devices for which Inductor generates code. On others, the compiler backend (openxla) would split a graph at our operators.
_DEVICES = ("cpu", "cuda", "xpu")

# The most elements and tensors of a chunk in a graph for the CPU. Parameters and gradients of a chunk take up to 24 MiB, which
# many caches hold. With more tensors Inductor becomes slow, because it tries to fuse every pair of updates in a chunk.
CACHED = 3 << 20
TOGETHER = 32

LIBRARY: Any = torch.library.Library("fastlars", "DEF")  # type: ignore[no-untyped-call]  # torch's
LIBRARY.define("norms(Tensor[] tensors) -> Tensor")
LIBRARY.define("joint_norms(Tensor[] params, Tensor[] grads, float sign, float weight_decay) -> Tensor")
LIBRARY.define("realized(Tensor vector) -> Tensor")


def _norms(tensors: list[Tensor]) -> Tensor:
    return exact.norms(tensors, foreach=True)


def joint_operator(params: list[Tensor], grads: list[Tensor], sign: float, weight_decay: float) -> Tensor:
    """Two rows, |w| and |sign * g + weight_decay * w| of each tensor. `backends/triton.py` replaces this on CUDA."""
    return torch.stack([_norms(params), exact.joint_norms(params, grads, sign, weight_decay, foreach=True)])


def _one_for_each(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=norm_dtype(tensors[0].dtype))


def _two_for_each(params: list[Tensor], *_: object) -> Tensor:
    return params[0].new_empty(2, len(params), dtype=norm_dtype(params[0].dtype))


for _name, _kernel, _fake in (
    ("norms", _norms, _one_for_each),
    ("joint_norms", joint_operator, _two_for_each),
    ("realized", torch.clone, torch.empty_like),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlars::{_name}", _fake, lib=LIBRARY)


def is_traced(tensor: Tensor) -> bool:
    """Whether work on this tensor is traced into a graph that supports our operators.

    False if autograd is on, because autograd cannot differentiate our operators.
    """
    return torch.compiler.is_compiling() and not torch.is_grad_enabled() and tensor.device.type in _DEVICES


def is_measured_by_chunks(bucket: Bucket) -> bool:
    """Whether norms are computed just before each chunk of tensors is updated, while they are in a CPU's cache."""
    options, param = bucket.options, bucket.params[0]
    return is_traced(param) and param.is_cpu and is_adapted(options) and not options.skip_nonfinite


def norms(tensors: list[Tensor], foreach: bool) -> Tensor:
    """Compute `norms.norms` of these tensors. In a graph, this is one custom operator."""
    if is_traced(tensors[0]):
        in_graph: Tensor = torch.ops.fastlars.norms.default(tensors)
        return in_graph
    return exact.norms(tensors, foreach)


def joint_norms(
    params: list[Tensor], grads: list[Tensor], sign: float, weight_decay: float, foreach: bool
) -> tuple[Tensor, Tensor]:
    """Compute |w| and |sign * g + weight_decay * w| of each tensor. In a graph, one custom operator computes both."""
    if is_traced(params[0]):
        param_norm, direction_norm = torch.ops.fastlars.joint_norms.default(params, grads, sign, weight_decay).unbind()
        return param_norm, direction_norm
    return exact.norms(params, foreach), exact.joint_norms(params, grads, sign, weight_decay, foreach)


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 tensor whose values are rounded to a half type. The result is float32 too.

    In a graph, an operation between the two conversions keeps Inductor from removing both.
    """
    if not torch.compiler.is_compiling():
        return tensor.to(dtype).to(tensor.dtype)
    if tensor.is_cpu and not COMPILES_BITS:
        half: Tensor = torch.ops.fastlars.realized.default(tensor.to(dtype))
        return half.to(tensor.dtype)
    return tensor.to(dtype).view(torch.int16).bitwise_or(0).view(dtype).to(tensor.dtype)


def unbind(b: Tensor, c: Tensor, step_size: Number) -> tuple[list[Tensor], list[Tensor], Number]:
    """The numbers of two vectors as 0-dim tensors, and the step size.

    In a graph, Inductor must store the vectors first. Otherwise it computes a tensor's numbers again for each of its elements.
    On a CPU, each chunk also stores the step size. If all updates read one tensor, Inductor tries to fuse every pair of them,
    which takes a quarter of the compile time.
    """
    if is_traced(b):
        if b.is_cpu and isinstance(step_size, Tensor):
            b, c, size = _stored(torch.stack([b, c, step_size.expand(len(b))])).unbind()
            step_size = size[0]
        else:
            b, c = _stored(b), _stored(c)
    return list(b.unbind()), list(c.unbind()), step_size


def _stored(tensor: Tensor) -> Tensor:
    """The same tensor. Inductor stores it in memory, because `as_strided` needs memory to view."""
    return tensor.as_strided(tensor.shape, tensor.stride())


def update_in_graph(bucket: Bucket, b: list[Tensor], c: list[Tensor], step_size: Number, skip: Tensor | None) -> None:
    """Update a bucket as `backends/eager.py` does, but with operations that Inductor compiles well.

    Inductor puts a foreach operation and its operands into one list kernel. A list kernel has at most 250 reads and writes, so
    each result is written only once. A skipped step adds -0.0, which changes no number. Choosing between old and new values at
    the end would take two more writes per tensor.
    """

    def unless_skipped(new: Tensor, instead: float | Tensor = -0.0) -> Tensor:
        return new if skip is None else torch.where(skip, instead, new)

    options, dtype = bucket.options, b[0].dtype
    params, grads, buffers, compensations = bucket.at(list(range(len(bucket.params))))
    params, grads, buffers = reals(params), reals(grads), reals(buffers)
    weights = [param.to(dtype) for param in params]
    if compensations:
        weights = [weight + compensation for weight, compensation in zip(weights, compensations)]
    moves = [grad.to(dtype) * factor for grad, factor in zip(grads, b)]
    if options.weight_decay != 0:
        moves = [move + weight * factor for move, weight, factor in zip(moves, weights, c)]
    if options.momentum != 0:
        old = [buffer.to(dtype) for buffer in buffers]
        kept = [unless_skipped(v * options.momentum, v) for v in old]
        velocities = list(torch._foreach_add(kept, [unless_skipped(move) for move in moves]))
        for buffer, velocity in zip(buffers, velocities):
            buffer.copy_(velocity)
        if options.nesterov:
            moves = [move + velocity * options.momentum for move, velocity in zip(moves, velocities)]
        else:
            moves = velocities
    moves = [unless_skipped(move * -step_size) for move in moves]
    if not compensations:
        torch._foreach_add_(params, moves)
        return
    for param, new, compensation in zip(params, torch._foreach_add(weights, moves), compensations):
        error = (new - rounded(new, param.dtype)).to(param.dtype)
        compensation.copy_(unless_skipped(error, compensation))
        param.copy_(unless_skipped(new.to(param.dtype), param))
