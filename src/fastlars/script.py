"""The step in TorchScript, which knows neither classes nor fused kernels: one group, the same formula and update."""

from typing import Dict, List, Optional, Tuple  # noqa: UP035  TorchScript reads these spellings in every version

import torch
from torch import Tensor

from .backends.eager import single_tensor_update
from .dtypes import is_conjugate, is_half, norm_dtype, real
from .formula import Number, coefficients, is_adapted, on_device, scalar_lr, sign
from .norms import joint_norms, norms
from .options import Options


def scripted_step(
    params: List[Tensor],
    grads: List[Tensor],
    momentum_buffers: List[Optional[Tensor]],
    options: Options,
    grad_scale: Optional[Tensor],
    found_inf: Optional[Tensor],
) -> None:
    """As `step.step`: measure all, decide, move all."""
    if options.fused is not None and options.fused:
        raise RuntimeError("fused=True cannot be scripted; leave fused=None or use foreach=True")
    if grad_scale is not None:
        grads = [_unscaled(grad, grad_scale) for grad in grads]
    buckets = _buckets(params, grads, momentum_buffers, options)
    numbers = [_numbers(params, grads, momentum_buffers, places, options) for places in buckets]
    skip: Optional[Tensor] = None
    if found_inf is not None:
        skip = found_inf.reshape(()) != 0
    if options.skip_nonfinite:
        for grad in grads:
            flag = ~norms([real(grad)], foreach=False).isfinite().all()
            skip = flag if skip is None else skip | on_device(flag, skip)
    for places, (b, c) in zip(buckets, numbers):
        _move(params, grads, momentum_buffers, places, b, c, options, skip)


def _buckets(
    params: List[Tensor], grads: List[Tensor], momentum_buffers: List[Optional[Tensor]], options: Options
) -> List[List[int]]:
    """Places of tensors of one device and dtype, all at their first step or none."""
    places: Dict[str, List[int]] = {}
    for i, param in enumerate(params):
        first_step = options.momentum != 0 and momentum_buffers[i] is None
        key = f"{first_step} {is_conjugate(param)} {param.device} {param.dtype} {grads[i].dtype}"
        if key not in places:
            places[key] = []
        places[key].append(i)
    return list(places.values())


def _numbers(
    params: List[Tensor],
    grads: List[Tensor],
    momentum_buffers: List[Optional[Tensor]],
    places: List[int],
    options: Options,
) -> Tuple[List[Tensor], List[Tensor]]:
    """The factors b and c of the tensors of a bucket."""
    # autograd keeps what a norm was taken of, and the update writes it
    weights = [real(params[i].clone() if options.differentiable else params[i]) for i in places]
    directions = [real(grads[i]) for i in places]
    like = weights[0]
    lr = scalar_lr(options.lr, like)
    first_step = options.momentum != 0 and momentum_buffers[places[0]] is None
    pair: Optional[Tuple[Tensor, Tensor]] = None
    if is_adapted(options):
        if options.trust_denominator == "joint":
            pair = (
                norms(weights, foreach=False),
                joint_norms(weights, directions, sign(options), options.weight_decay, foreach=False),
            )
        else:
            pair = (norms(weights, foreach=False), norms(directions, foreach=False))
    b, c = coefficients(pair, lr, first_step, options)
    return _unbind(b, len(places), norm_dtype(like.dtype)), _unbind(c, len(places), norm_dtype(like.dtype))


def _unbind(numbers: Number, n: int, dtype: torch.dtype) -> List[Tensor]:
    return list(torch.as_tensor(numbers).to(dtype).expand(n).unbind())


def _move(
    params: List[Tensor],
    grads: List[Tensor],
    momentum_buffers: List[Optional[Tensor]],
    places: List[int],
    b: List[Tensor],
    c: List[Tensor],
    options: Options,
    skip: Optional[Tensor],
) -> None:
    """Update the tensors of a bucket; half types and gated steps on copies, as in backends/eager.py."""
    old = [params[i] for i in places]
    if options.momentum != 0:
        for i in places:
            buffer = momentum_buffers[i]
            made = torch.zeros_like(params[i]) if buffer is None else buffer
            momentum_buffers[i] = made
            old.append(made)
    half = is_half(old[0].dtype)
    dtype = torch.float32 if half else old[0].dtype
    on_copies = skip is not None or half or is_conjugate(old[0])
    new = [tensor.resolve_conj().to(dtype, copy=True) for tensor in old] if on_copies else old
    n = len(places)
    weights, buffers = [real(w) for w in new[:n]], [real(v) for v in new[n:]]
    step_size = scalar_lr(options.lr, weights[0])
    if options.lr_in_momentum:
        step_size = scalar_lr(1.0, weights[0])
    if options.foreach is not None and options.foreach:
        directions = [real(grads[i]).to(weights[0].dtype) for i in places]
        _multi_tensor_update(weights, directions, buffers, b, c, step_size, options)
    else:
        single_tensor_update(weights, [real(grads[i]) for i in places], buffers, b, c, step_size, options)
    if on_copies:
        for target, source in zip(old, new):
            source = source.to(target.dtype)  # noqa: PLW2901  chosen in the target's dtype, for the bits of a NaN
            target.copy_(source if skip is None else torch.where(on_device(skip, target), target, source))


def _multi_tensor_update(
    params: List[Tensor],
    grads: List[Tensor],
    momentum_buffers: List[Tensor],
    b: List[Tensor],
    c: List[Tensor],
    step_size: Number,
    options: Options,
) -> None:
    """Out of place, and then written tensor by tensor.

    TorchScript takes a foreach op in place for a write to its list, not to the tensors there, and drops it if the list
    was made in the script and is not used again.
    """
    directions = torch._foreach_mul(grads, b)
    if options.weight_decay != 0:
        directions = torch._foreach_addcmul(directions, params, c)
    if options.momentum != 0:
        velocities = torch._foreach_add(torch._foreach_mul(momentum_buffers, options.momentum), directions)
        for buffer, velocity in zip(momentum_buffers, velocities):
            buffer.copy_(velocity)
        if options.nesterov:
            directions = torch._foreach_add(directions, velocities, alpha=options.momentum)
        else:
            directions = velocities
    for param, direction in zip(params, directions):
        param.addcmul_(direction, torch.as_tensor(-step_size))


def _unscaled(grad: Tensor, grad_scale: Tensor) -> Tensor:
    inverse = on_device(grad_scale, grad).to(torch.float32).reciprocal()
    dtype = torch.float32 if grad.dtype == torch.float16 else grad.dtype
    return (grad.to(dtype) * inverse).to(dtype)
