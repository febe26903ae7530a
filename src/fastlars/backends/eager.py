"""The step in torch's own operations, for every device, dtype and mode.

For a parameter w, gradient g and momentum buffer v, it computes v = m v + b g + c w and w -= q v in place. Here m is momentum,
q is lr (or 1 with lr_in_momentum), and b and c come from `formula.py`. `Single` updates one tensor at a time. `Foreach`
does the same with lists of tensors. Complex tensors are updated through real views. With momentum and weight decay, the update
reads and writes 44 bytes per float32 element, as many as torch's SGD. The norms read 8 more bytes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastlars.buckets import Bucket, Norms
from fastlars.compat import default_foreach
from fastlars.compiled import (
    CACHED,
    TOGETHER,
    is_measured_by_chunks,
    is_traced,
    joint_norms,
    norms,
    rounded,
    unbind,
    update_in_graph,
)
from fastlars.dtypes import is_conjugate, is_half, norm_dtype, real, reals
from fastlars.formula import Number, coefficients, is_adapted, on_device, scalar_lr, sign
from fastlars.norms import chunks
from fastlars.options import Options

from .layouts import on_cpu
from .staging import Staging, Step


def measure(bucket: Bucket, foreach: bool) -> Norms:
    """Compute the norms that the options of a bucket require."""
    options = bucket.options
    adapted = is_adapted(options)
    if not adapted and not options.skip_nonfinite:
        return Norms()
    params = reals(bucket.params)
    if options.differentiable:
        # autograd saves the norm's input, so use clones, which the update does not overwrite
        params = [param.clone() for param in params]
    grads = reals(bucket.grads)
    if adapted and options.trust_denominator == "separate":
        if params[0].dtype == grads[0].dtype:
            param_norm, direction_norm = norms(params + grads, foreach).chunk(2)
        else:
            param_norm, direction_norm = norms(params, foreach), norms(grads, foreach)
        return Norms(param_norm, direction_norm, direction_norm)
    grad_norm = norms(grads, foreach) if options.skip_nonfinite else None
    if not adapted:
        return Norms(grad=grad_norm)
    if foreach and bucket.plan is not None and is_half(params[0].dtype) and not params[0].is_cpu:
        return Norms(norms(params, foreach), bucket.plan.joint_norms(bucket), grad_norm)
    param_norm, direction_norm = joint_norms(params, grads, sign(options), options.weight_decay, foreach)
    return Norms(param_norm, direction_norm, grad_norm)


def make_state(bucket: Bucket) -> tuple[list[Tensor], list[Tensor]]:
    """The momentum buffers and compensations of a bucket. Missing ones are created as zeros."""
    for made in (bucket.momentum_buffers, bucket.compensations):
        for i, tensor in enumerate(made):
            if tensor is None:
                made[i] = torch.zeros_like(bucket.params[i])
    return cast("tuple[list[Tensor], list[Tensor]]", (bucket.momentum_buffers, bucket.compensations))


class Single:
    """Updates tensor by tensor. It supports all tensors and options, and every other backend must match its results."""

    name = "single"
    takes_scale = False
    traceable = True
    mixes_first_steps = False
    foreach = False

    def wants(self, params: list[Tensor], options: Options, gated: bool) -> bool:  # noqa: ARG002
        """True, because this backend is the fallback for tensors that no other backend serves."""
        return True

    def serves(self, params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor]) -> bool:  # noqa: ARG002
        """True for all tensors."""
        return True

    def plan(self, params: list[Tensor]) -> None:
        """Return None, because this backend needs no plan."""

    def measure(self, bucket: Bucket, now: bool) -> Norms:
        """Compute all norms. In graphs for the CPU, leave them to `update` unless ``now`` is True."""
        make_state(bucket)  # before any update, because memory may run out
        return Norms() if not now and is_measured_by_chunks(bucket) else measure(bucket, self.foreach)

    def update(self, bucket: Bucket, norms: Norms, gate: Tensor | None) -> None:
        """Update all tensors. If `measure` left the norms, compute those of a chunk of tensors, then update the chunk."""
        if norms.param is not None or not is_measured_by_chunks(bucket):
            self._update(bucket, norms, gate)
            return
        for places in chunks(bucket.params, CACHED, TOGETHER):
            chunk = bucket.part(places)
            self._update(chunk, measure(chunk, self.foreach), gate)

    def _update(self, bucket: Bucket, norms: Norms, gate: Tensor | None) -> None:
        """Update in place, or for half types and gated steps in copies, which are written back unless the step is skipped.

        Multiplying the update by 0 would not always skip the step, because 0 * NaN is NaN.
        """
        params, buffers, options = bucket.params, make_state(bucket)[0], bucket.options
        like = real(params[0])
        pair = None if norms.param is None or norms.direction is None else (norms.param, norms.direction)
        lr = scalar_lr(options.lr, like)
        factor_b, factor_c = coefficients(pair, lr, bucket.is_first_step, options)
        step_size = 1.0 if options.lr_in_momentum else lr
        b, c, step_size = _unbind(factor_b, factor_c, step_size, len(params), like)
        skip = None if gate is None else on_device(gate, params[0]) != 0
        # a conjugate view is not updated in place, because its real view is a copy and writes to it would be lost
        in_place = not is_conjugate(params[0])
        traced = in_place and is_traced(like)
        if traced and (skip is not None or is_half(params[0].dtype)):
            update_in_graph(bucket, b, c, step_size, skip)
            return
        tensor_update = _multi_tensor_update if self.foreach else single_tensor_update

        def step(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], places: list[int]) -> None:
            w, g, v = reals(params), reals(grads), reals(buffers)
            tensor_update(w, g, v, [b[i] for i in places], [c[i] for i in places], step_size, options)

        every = list(range(len(params)))
        if in_place and skip is None and not is_half(params[0].dtype):
            step(params, bucket.grads, buffers, every)
        elif bucket.plan is not None:
            bucket.plan.step(bucket, skip, step)
        else:
            for places in [every] if self.foreach else [[i] for i in every]:
                _step_new(bucket, places, skip, step, self.foreach)


class Foreach(Single):
    """The step of `Single` with foreach operations, which take few launches on CUDA since torch 2.11.

    The update needs temporaries of the parameters' size only for half types, and for steps that may be skipped.
    """

    name = "foreach"
    foreach = True

    def wants(self, params: list[Tensor], options: Options, gated: bool) -> bool:  # noqa: ARG002
        """True with ``foreach=True``, and by default where torch's optimizers use foreach.

        With ``fused=True``, this backend is the fallback for tensors off the CPU.
        """
        if options.fused:
            return not all(on_cpu(params))
        if options.foreach is None and options.fused is None and not options.differentiable:
            return default_foreach(params)
        return bool(options.foreach)

    def serves(self, params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor]) -> bool:  # noqa: ARG002
        """False for conjugate and negative views, which foreach operations cannot write, and for buffers of another dtype."""
        if any([is_conjugate(param) for param in params]):  # noqa: C419  old compilers cannot trace generators
            return False
        # `Staging` would round buffers of another dtype to the parameter's, and torch's foreach SGD would fail halfway
        if any([param.dtype != buffer.dtype for param, buffer in zip(params, momentum_buffers)]):  # noqa: C419  as above
            return False
        # graphs never contain negative views
        return torch.compiler.is_compiling() or not any(map(Tensor.is_neg, params + momentum_buffers))

    def measure(self, bucket: Bucket, now: bool) -> Norms:
        """Compute all norms, and leave none to `update`."""
        if bucket.plan is not None and (is_half(bucket.params[0].dtype) or bucket.options.skip_nonfinite):
            bucket.plan.reserve(bucket)
        return super().measure(bucket, now)

    def plan(self, params: list[Tensor]) -> Any:  # noqa: ARG002
        """Create memory for copies of the tensors, or return None in a graph, which needs none."""
        return None if torch.compiler.is_compiling() else Staging()


def _step_new(bucket: Bucket, places: list[int], skip: Tensor | None, step: Step, foreach: bool) -> None:
    """Update copies and write them back, in operations that autograd and compilers can trace."""
    params, grads, buffers, compensations = bucket.at(places)
    dtype = torch.float32 if is_half(params[0].dtype) else params[0].dtype
    old = params + buffers
    new = [(tensor.resolve_conj() if tensor.is_complex() else tensor).to(dtype, copy=True) for tensor in old]
    weights = new[: len(params)]
    for weight, compensation in zip(weights, compensations):
        weight.add_(compensation)
    if foreach and is_half(grads[0].dtype):
        grads = [grad.to(dtype) for grad in grads]
    step(weights, grads, new[len(params) :], places)
    errors = [weight - rounded(weight, param.dtype) for weight, param in zip(weights, params)] if compensations else []
    for target, source in zip(old + compensations, new + errors):
        # choose in the target's dtype, because a round trip through float32 changes the bits of a NaN
        target.copy_(source if skip is None else torch.where(skip, target, source.to(target.dtype)))


def single_tensor_update(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    b: list[Tensor],
    c: list[Tensor],
    step_size: Number,
    options: Options,
) -> None:
    """The update, tensor by tensor. TorchScript compiles this function too."""
    decays = options.weight_decay != 0
    # outside the loop, which compilers unroll
    scale = -step_size * options.momentum if options.nesterov else -step_size
    for i, param in enumerate(params):
        grad = grads[i]
        # clone the tensors that autograd saves, because the update overwrites them
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
    # Pass 0-dim tensors as the first factor, because this order takes few launches since torch 2.11, and the other order only
    # in later versions. Before torch 2.11 either order takes one launch per tensor.
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


def _unbind(
    factor_b: Number, factor_c: Number, step_size: Number, n: int, like: Tensor
) -> tuple[list[Tensor], list[Tensor], Number]:
    """Each factor as n 0-dim tensors, on the device of ``like`` and in the dtype of its norms, and the step size."""
    if isinstance(factor_b, Tensor) and isinstance(factor_c, Tensor) and factor_b.dim() == 1:
        # computed from norms, so already on that device and in that dtype
        return unbind(factor_b, factor_c, step_size)
    dtype = norm_dtype(like.dtype)
    b, c = [
        factor.to(dtype) if isinstance(factor, Tensor) else torch.full((), factor, dtype=dtype, device=like.device)
        for factor in (factor_b, factor_c)
    ]
    return list(b.expand(n).unbind()), list(c.expand(n).unbind()), step_size


SINGLE, FOREACH = Single(), Foreach()
