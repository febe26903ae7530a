"""Checks of a group and its tensors at construction, on load, and before a step writes anything.

Without these checks, torch's kernels would raise in the middle of a step for tensors that cannot be written or do not
fit each other, and for numbers that the parameters' dtype cannot hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .backends.layouts import own_every_element
from .buckets import Bucket
from .dtypes import is_half
from .formula import is_adapted
from .options import Options, check_options, check_tensor_lr, values_of


def check_group(options: Mapping[str, Any], params: Iterable[Any], where: str) -> None:
    """Raise if options break a rule or do not fit these parameters, given as tensors or (name, tensor) pairs."""
    check_options(options, where)
    tensors: list[Tensor] = []
    for i, item in enumerate(params):
        param = item[1] if isinstance(item, tuple) else item
        if not isinstance(param, Tensor):
            continue  # torch raises
        if not (param.is_floating_point() or param.is_complex()):
            raise TypeError(
                f"{where}: parameters must be floating or complex tensors, got {param.dtype} at position {i}; "
                "leave it out of the optimizer or convert it"
            )
        if not is_lazy(param) and (reason := _unwritable(param, f"the parameter at position {i}")):
            raise ValueError(f"{where}: {reason}")
        tensors.append(param)
    lr, on_meta = options["lr"], all(param.is_meta for param in tensors[:1])
    limit = check_numbers(options, narrowest_dtype({param.dtype for param in tensors}), where)
    check_lr(lr, math.inf if isinstance(lr, Tensor) else limit, on_meta, where)


def check_no_leaves(params: list[Tensor]) -> None:
    """Raise for leaves that require gradients. Autograd rejects them too late, after the first buffer has been written."""
    for i, param in enumerate(params):
        if param.is_leaf and param.requires_grad:
            raise RuntimeError(
                f"differentiable=True cannot update a leaf that requires gradients, got one at position {i}; pass its "
                "clone(), or leave differentiable=False"
            )


def narrowest_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype with the smallest range, or float64 if there are none."""
    return min(dtypes, key=lambda dtype: torch.finfo(dtype).max, default=torch.float64)


def check_numbers(options: Mapping[str, Any], narrowest: torch.dtype, where: str) -> float:
    """Raise for options that would overflow in the update. Returns the largest number that the update can compute with."""
    # adapted groups compute half types in float32
    wide = is_half(narrowest) and is_adapted(Options(*values_of(options)))
    limit = torch.finfo(torch.float32 if wide else narrowest).max
    for name in ("lr", "dampening", "weight_decay"):
        if not isinstance(options[name], Tensor) and abs(options[name]) > limit:
            raise ValueError(
                f"{where}: {name} must be at most {limit:g} for parameters of {narrowest}, got {options[name]:g}"
            )
    return limit


def check_lr(lr: Any, limit: float, on_meta: bool, where: str) -> None:
    """Check the lr of a group. Each step calls this, because schedules overwrite lr and tensors can be resized in place."""
    if isinstance(lr, Tensor):
        check_tensor_lr(lr, where)
        if lr.is_meta and not on_meta:
            raise ValueError(
                f"{where}: Tensor lr must hold a number, got one on the meta device; create it on a real one"
            )
        # read only a CPU tensor of a wider dtype, which torch's SGD converts to the parameters' dtype, where it may overflow
        if not (lr.is_cpu and type(lr) is Tensor and torch.finfo(lr.dtype).max > limit):
            return
        lr = lr.item()
    # infinities and NaN pass, as in torch, because they become visible in the weights
    if limit < abs(float(lr)) < math.inf:
        raise ValueError(f"{where}: lr must be at most {limit:g} for these parameters, got {lr:g}")


def check_grad(grad: Tensor) -> None:
    """Raise for a gradient that LARS cannot read."""
    if reason := _sparse(grad):
        raise RuntimeError(reason)


def _sparse(grad: Tensor) -> str | None:
    if grad.layout is torch.strided and not grad.is_nested:
        return None
    return (
        f"LARS needs dense gradients, got one of layout {grad.layout} and shape {tuple(grad.shape)}; use "
        "nn.Embedding(sparse=False), or another optimizer for that parameter"
    )


def check_fit(param: Tensor, grad: Tensor, buffer: Tensor | None, compensation: Tensor | None, where: str) -> None:
    """Raise if the gradient or state does not fit the parameter."""
    if reason := _misfit(param, grad, buffer, compensation):
        raise RuntimeError(f"{where}: {reason}. Nothing has changed")


def _misfit(param: Tensor, grad: Tensor, buffer: Tensor | None, compensation: Tensor | None) -> str | None:
    """The reason why the gradient or state does not fit the parameter, or None if both fit."""
    what = f"a parameter of shape {tuple(param.shape)}"
    if reason := _sparse(grad) or _unwritable(param, what):
        return reason
    if param.dtype == torch.complex128 and param.device.type == "xla":
        return f"{what} and dtype {param.dtype} cannot be written on XLA through view_as_real; use complex64"
    for name, tensor in (("momentum_buffer", buffer), ("compensation", compensation)):
        if tensor is not None and (reason := _unwritable(tensor, f"the {name} of {what}")):
            return reason
    for name, tensor in (("gradient", grad), ("momentum buffer", buffer), ("compensation", compensation)):
        if tensor is None:
            continue
        if tensor.shape != param.shape:
            return (
                f"{what} has a {name} of shape {tuple(tensor.shape)}; after resizing a parameter, recompute its gradient "
                "and delete its state (optimizer.state.pop(param))"
            )
        if tensor.device != param.device:
            return f"{what} on {param.device} has a {name} on {tensor.device}; move it to {param.device}"
        if tensor.is_complex() and not param.is_complex():
            return f"{what} and dtype {param.dtype} has a {name} of {tensor.dtype}; take its real part"
    if compensation is not None and compensation.dtype != param.dtype:
        return (
            f"{what} and dtype {param.dtype} has a compensation of {compensation.dtype}; replace it with "
            "torch.zeros_like(param)"
        )
    if buffer is not None and param.is_complex() and not buffer.is_complex():
        return f"{what} and dtype {param.dtype} has a momentum buffer of {buffer.dtype}; convert it to {param.dtype}"
    return None


def _unwritable(tensor: Tensor, what: str) -> str | None:
    """The reason why a parameter or buffer cannot be written in place, or None if it is writable."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"{what} must be dense, got one of layout {tensor.layout}; convert it with to_dense()"
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return f"{what} was created in inference mode and cannot be written outside it; replace it with its clone()"
    if not own_every_element(tensor):
        return (
            f"{what} must have its own memory for every element, got an expanded or overlapping tensor; replace it with "
            "its contiguous()"
        )
    return None


def is_capturing() -> bool:
    """Whether a CUDA graph is capturing the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]  # torch's


def check_captured(bucket: Bucket, where: str) -> None:
    """Raise if a captured step would create state, which every replay of the CUDA graph would reset to zeros."""
    for state in (bucket.momentum_buffers, bucket.compensations):
        for i, tensor in zip(bucket.indices, state):
            if tensor is None and bucket.params[0].is_cuda:
                raise RuntimeError(
                    f"{where}: capturing a LARS step needs an eager step of the same tensors before it, which creates their "
                    f"momentum buffers and compensations; tensor {i} of those with a gradient has none. Nothing has changed"
                )
