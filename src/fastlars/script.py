"""The step for TorchScript, which supports neither our classes nor fused kernels.

It uses the same functions for the formula and the update as `backends/eager.py`.
"""

from typing import List, Optional, Tuple  # noqa: UP035  every TorchScript version reads these spellings

import torch
from torch import Tensor

from .backends.eager import single_tensor_update
from .dtypes import is_conjugate, is_half, real
from .formula import coefficients, is_adapted, on_device, scalar_lr, sign, unscaled
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
    """Like `step.step`, compute all norms, decide whether the step is skipped, then update all tensors."""
    fused = options.fused  # TorchScript narrows only local variables
    if fused is not None and fused:
        raise RuntimeError("fused=True cannot be scripted; leave fused=None or use foreach=True")
    kahan_sum = options.kahan_sum
    if kahan_sum is not None and kahan_sum:
        raise RuntimeError(
            "kahan_sum=True cannot be scripted; leave kahan_sum=None, which keeps no compensation in scripts"
        )
    # make gradients of complex parameters complex, else a last dimension of 2 could pass for real and imaginary parts
    grads = [g.to(p.dtype) if p.is_complex() and not g.is_complex() else g for p, g in zip(params, grads)]
    if grad_scale is not None:
        grads = [unscaled(grad, grad_scale) for grad in grads]
    buffers: List[Tensor] = []
    b: List[Tensor] = []
    c: List[Tensor] = []
    skip: Optional[Tensor] = None if found_inf is None else found_inf.reshape(()) != 0
    for i, param in enumerate(params):
        first_step = False
        if options.momentum != 0:
            buffer = momentum_buffers[i]
            first_step = buffer is None
            made = torch.zeros_like(param) if buffer is None else buffer
            momentum_buffers[i] = made
            buffers.append(made)
        # clone if differentiable, because autograd saves the norm's input, which the update overwrites
        b_i, c_i = _coefficients(param.clone() if options.differentiable else param, grads[i], first_step, options)
        b.append(b_i)
        c.append(c_i)
        if options.skip_nonfinite:
            flag = ~norms([real(grads[i])], foreach=False).isfinite().all()
            skip = flag if skip is None else skip | on_device(flag, skip)

    for i, param in enumerate(params):
        old = [param] + buffers[i : i + 1]  # noqa: RUF005  TorchScript does not unpack into lists
        new = [_writable(tensor, skip is not None) for tensor in old]
        w, v = real(new[0]), [real(tensor) for tensor in new[1:]]
        step_size = scalar_lr(options.lr, w)
        if options.lr_in_momentum:
            step_size = scalar_lr(1.0, w)
        single_tensor_update([w], [real(grads[i])], v, [b[i]], [c[i]], step_size, options)
        for target, source in zip(old, new):
            if skip is not None or is_half(target.dtype) or is_conjugate(target):
                value = source.to(target.dtype)
                target.copy_(value if skip is None else torch.where(on_device(skip, target), target, value))


def _writable(tensor: Tensor, gated: bool) -> Tensor:
    """The tensor itself, or a copy for half types, gated steps and conjugate views, as in backends/eager.py."""
    half = is_half(tensor.dtype)
    if not (gated or half or is_conjugate(tensor)):
        return tensor
    return tensor.resolve_conj().to(torch.float32 if half else tensor.dtype, copy=True)


def _coefficients(param: Tensor, grad: Tensor, first_step: bool, options: Options) -> List[Tensor]:
    w, g = real(param), real(grad)
    pair: Optional[Tuple[Tensor, Tensor]] = None
    if is_adapted(options):
        joint = options.trust_denominator == "joint"
        of_direction = (
            joint_norms([w], [g], sign(options), options.weight_decay, foreach=False)
            if joint
            else norms([g], foreach=False)
        )
        pair = (norms([w], foreach=False)[0], of_direction[0])
    b, c = coefficients(pair, scalar_lr(options.lr, w), first_step, options)
    return [torch.as_tensor(b), torch.as_tensor(c)]
