"""The step in torch's own operations, in place: v = m v + b g + c w and w -= q v. Every device, dtype and mode.

`Single` goes tensor by tensor and is the one to read; `Foreach` does the same over lists. Complex tensors come as real
views. q, the step size, is lr, or 1 where lr is in the momentum buffer. Bytes a float32 parameter: 44, as torch's SGD.
"""

from typing import cast

import torch
from torch import Tensor

from fastlars.buckets import Bucket, Norms
from fastlars.compat import default_foreach
from fastlars.compiled import joint_norms, norms, rounded, unbind
from fastlars.dtypes import is_conjugate, is_half, norm_dtype, real
from fastlars.formula import Number, coefficients, is_adapted, on_device, scalar_lr, sign
from fastlars.norms import chunks
from fastlars.options import Options

from .layouts import on_cpu


def measure(bucket: Bucket, foreach: bool) -> Norms:
    """The norms that the options of a bucket ask for."""
    options = bucket.options
    adapted = is_adapted(options)
    if not adapted and not options.skip_nonfinite:
        return Norms()
    params = [real(param) for param in bucket.params]
    if options.differentiable:
        # autograd keeps what a norm was taken of, and the update writes it
        params = [param.clone() for param in params]
    grads = [real(grad) for grad in bucket.grads]
    joint = adapted and options.trust_denominator == "joint"
    grad_norm = None if joint and not options.skip_nonfinite else norms(grads, foreach)
    if not adapted:
        return Norms(grad=grad_norm)
    direction_norm = grad_norm
    if joint:
        direction_norm = joint_norms(params, grads, sign(options), options.weight_decay, foreach)
    return Norms(norms(params, foreach), direction_norm, grad_norm)


def make_buffers(bucket: Bucket) -> list[Tensor]:
    """The momentum buffers of a bucket, zeros at its first step; empty without momentum."""
    if len(bucket.momentum_buffers) > 0 and bucket.momentum_buffers[0] is None:
        bucket.momentum_buffers[:] = [torch.zeros_like(param) for param in bucket.params]
    return cast("list[Tensor]", bucket.momentum_buffers)


def copies(tensors: list[Tensor], dtype: torch.dtype, foreach: bool) -> list[Tensor]:
    """Copies in ``dtype``."""
    if torch.compiler.is_compiling():
        # no memory in a graph: conversions become part of the loops that read them
        return [tensor.clone() if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]
    new = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if len(new) > 0:  # foreach ops refuse empty lists
        write_back(new, tensors, None, foreach)
    return new


def write_back(targets: list[Tensor], sources: list[Tensor], skip: Tensor | None, foreach: bool) -> None:
    """Write the sources into the targets, unless the 0-dim bool tensor ``skip`` is true."""
    # not in a graph, where it would be a kernel a tensor, and a copy of each is part of the list kernel
    if foreach and skip is None and not torch.compiler.is_compiling():
        torch._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources):
        # chosen in the target's dtype: a NaN that went through float32 and back has other bits
        target.copy_(source if skip is None else torch.where(skip, target, source.to(target.dtype)))


def add_halves(tensors: list[Tensor], halves: list[Tensor], sign: int, foreach: bool) -> None:
    """Add tensors of half types to float32 ones, or subtract them."""
    if foreach:
        torch._foreach_add_(tensors, copies(halves, tensors[0].dtype, True), alpha=sign)
        return
    for tensor, half in zip(tensors, halves):
        tensor.add_(half, alpha=sign)


def rounding_errors(tensors: list[Tensor], stored: list[Tensor], foreach: bool) -> list[Tensor]:
    """What float32 tensors lost when they were stored in half types; may be the same tensors, changed."""
    if torch.compiler.is_compiling():
        return [tensor - rounded(tensor, half.dtype) for tensor, half in zip(tensors, stored)]
    add_halves(tensors, stored, -1, foreach)
    return tensors


class Single:
    """Tensor by tensor: serves everything, and every other backend equals it."""

    name = "single"
    takes_scale = False
    traceable = True
    mixes_first_steps = False
    foreach = False

    def wants(self, params: list[Tensor], options: Options, gated: bool) -> bool:  # noqa: ARG002
        """Always: it takes what no other backend serves."""
        return True

    def serves(self, params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor]) -> bool:  # noqa: ARG002
        """Everything."""
        return True

    def plan(self, params: list[Tensor]) -> None:
        """Nothing."""

    def measure(self, bucket: Bucket, now: bool) -> Norms:  # noqa: ARG002
        """All norms, at once."""
        make_buffers(bucket)  # memory may run out, so before anything moves
        return measure(bucket, self.foreach)

    def update(self, bucket: Bucket, norms: Norms, gate: Tensor | None) -> None:
        """In place; half types and gated steps on copies, which are rounded once and written back, or not.

        A factor of 0 in place of a gate would not do, because 0 * NaN is NaN.
        """
        params, grads, options = bucket.params, bucket.grads, bucket.options
        b, c = self._coefficients(bucket, norms)
        buffers = make_buffers(bucket)
        dtype = torch.float32 if is_half(params[0].dtype) else params[0].dtype
        # a conjugate view cannot be written through its real view, which is a copy
        if gate is None and dtype == params[0].dtype and not is_conjugate(params[0]):
            self._step(params, grads, buffers, b, c, options)
            return
        skip = None if gate is None else on_device(gate, params[0]) != 0
        for places in chunks(params) if self.foreach else [[i] for i in range(len(params))]:
            old = [params[i] for i in places]
            old_buffers = [buffers[i] for i in places] if options.momentum != 0 else []
            compensations = [bucket.compensations[i] for i in places] if len(bucket.compensations) > 0 else []
            new, new_buffers = copies(old, dtype, self.foreach), copies(old_buffers, dtype, self.foreach)
            if compensations:
                add_halves(new, compensations, 1, self.foreach)
            directions = [grads[i] for i in places]
            if self.foreach and is_half(directions[0].dtype):
                directions = copies(directions, dtype, True)  # foreach ops are one launch only among equal dtypes
            self._step(new, directions, new_buffers, [b[i] for i in places], [c[i] for i in places], options)
            write_back(old + old_buffers, new + new_buffers, skip, self.foreach)
            new_buffers, directions = [], []  # freed before more is made
            if compensations:
                write_back(compensations, rounding_errors(new, old, self.foreach), skip, self.foreach)
            new = []

    def _coefficients(self, bucket: Bucket, norms: Norms) -> tuple[list[Tensor], list[Tensor]]:
        like = real(bucket.params[0])
        pair = None if norms.param is None or norms.direction is None else (norms.param, norms.direction)
        lr = scalar_lr(bucket.options.lr, like)
        b, c = coefficients(pair, lr, bucket.is_first_step, bucket.options)
        return _unbind(b, len(bucket.params), like), _unbind(c, len(bucket.params), like)

    def _step(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor],
        b: list[Tensor],
        c: list[Tensor],
        options: Options,
    ) -> None:
        params, grads = [real(param) for param in params], [real(grad) for grad in grads]
        buffers = [real(buffer) for buffer in buffers]
        step_size = 1.0 if options.lr_in_momentum else scalar_lr(options.lr, params[0])
        update = _multi_tensor_update if self.foreach else single_tensor_update
        update(params, grads, buffers, b, c, step_size, options)


class Foreach(Single):
    """The same over lists: a few launches on CUDA from torch 2.11 on, no temporary of parameter size."""

    name = "foreach"
    foreach = True

    def wants(self, params: list[Tensor], options: Options, gated: bool) -> bool:  # noqa: ARG002
        """Where it is asked for, by torch's rule for the default, and off the CPU for what fused kernels leave."""
        if options.fused:
            return not all(on_cpu(params))
        if options.foreach is None and options.fused is None and not options.differentiable:
            return default_foreach(params)
        return bool(options.foreach)

    def serves(self, params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor]) -> bool:  # noqa: ARG002
        """All but conjugate and negative views, to which foreach ops do not write."""
        if any([is_conjugate(param) for param in params]):  # noqa: C419  old compilers trace no generators
            return False
        # they do not come in graphs
        return torch.compiler.is_compiling() or not any(map(Tensor.is_neg, params + momentum_buffers))


def single_tensor_update(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    b: list[Tensor],
    c: list[Tensor],
    step_size: Number,
    options: Options,
) -> None:
    """The update, to be read; TorchScript compiles it too."""
    decays = options.weight_decay != 0
    for i, param in enumerate(params):
        grad = grads[i]
        # autograd keeps what it reads, and both are written below
        weight = param.clone() if options.differentiable else param
        if options.momentum != 0:
            buffer = momentum_buffers[i].mul_(options.momentum).addcmul_(grad, b[i])
            if decays:
                buffer.addcmul_(weight, c[i])
        if options.momentum == 0 or options.nesterov:
            if decays:
                param.addcmul_(weight, -step_size * c[i])
            param.addcmul_(grad, -step_size * b[i])
        if options.momentum != 0:
            scale = -step_size * options.momentum if options.nesterov else -step_size
            velocity = momentum_buffers[i].clone() if options.differentiable else momentum_buffers[i]
            if isinstance(scale, Tensor):
                param.addcmul_(velocity, scale)
            else:
                param.add_(velocity, alpha=scale)


def _multi_tensor_update(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    b: list[Tensor],
    c: list[Tensor],
    step_size: Number,
    options: Options,
) -> None:
    # 0-dim tensors are the first factor because those of the second are few launches in later versions only. Before torch
    # 2.11 all are one launch a tensor.
    decays = options.weight_decay != 0
    if options.momentum != 0:
        torch._foreach_mul_(momentum_buffers, options.momentum)
        torch._foreach_addcmul_(momentum_buffers, b, grads)
        if decays:
            torch._foreach_addcmul_(momentum_buffers, c, params)
    if options.momentum == 0 or options.nesterov:
        if decays:
            torch._foreach_addcmul_(params, torch._foreach_mul(c, -step_size), params)
        torch._foreach_addcmul_(params, torch._foreach_mul(b, -step_size), grads)
    if options.momentum != 0:
        scale = -step_size * options.momentum if options.nesterov else -step_size
        if isinstance(scale, Tensor):
            torch._foreach_addcmul_(params, [scale] * len(params), momentum_buffers)
        else:
            torch._foreach_add_(params, momentum_buffers, alpha=scale)


def _unbind(numbers: Number, n: int, like: Tensor) -> list[Tensor]:
    """One 0-dim tensor for each of n, on the device of ``like`` and in the dtype of its norms."""
    dtype = norm_dtype(like.dtype)
    if isinstance(numbers, Tensor):
        if numbers.dim() == 1:  # norms had it, in their dtype
            return unbind(numbers)
        numbers = numbers.to(dtype)
    else:
        numbers = torch.full((), numbers, dtype=dtype, device=like.device)
    return unbind(numbers.expand(n))


SINGLE, FOREACH = Single(), Foreach()
