"""The step in TorchScript, which knows neither classes nor fused kernels: one group, tensor by tensor.

``foreach=True`` runs the same loop: TorchScript takes a foreach op in place for a write to its list, not to the tensors
there, and out of place one costs temporaries of parameter size.
"""

from typing import List, Optional  # noqa: UP035  TorchScript reads these spellings in every version

import torch
from torch import Tensor

from .backends.eager import single_tensor_update
from .dtypes import is_conjugate, is_half, real
from .formula import coefficients, is_adapted, on_device, scalar_lr, sign
from .norms import joint_norm, norm
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
    fused = options.fused  # TorchScript narrows names only
    if fused is not None and fused:
        raise RuntimeError("fused=True cannot be scripted; leave fused=None or use foreach=True")
    if grad_scale is not None:
        grads = [_unscaled(grad, grad_scale) for grad in grads]
    b: List[Tensor] = []
    c: List[Tensor] = []
    skip: Optional[Tensor] = None if found_inf is None else found_inf.reshape(()) != 0
    for i, param in enumerate(params):
        first_step = options.momentum != 0 and momentum_buffers[i] is None
        # autograd keeps what a norm was taken of, and the update writes it
        b_i, c_i = _coefficients(param.clone() if options.differentiable else param, grads[i], first_step, options)
        b.append(b_i)
        c.append(c_i)
        if options.skip_nonfinite:
            flag = ~norm(real(grads[i])).isfinite()
            skip = flag if skip is None else skip | on_device(flag, skip)

    for i, param in enumerate(params):
        old = [param]
        if options.momentum != 0:
            buffer = momentum_buffers[i]
            made = torch.zeros_like(param) if buffer is None else buffer
            momentum_buffers[i] = made
            old.append(made)
        # half types and gated steps on copies, as in backends/eager.py
        half = is_half(param.dtype)
        on_copies = skip is not None or half or is_conjugate(param)
        dtype = torch.float32 if half else param.dtype
        new = [tensor.resolve_conj().to(dtype, copy=True) for tensor in old] if on_copies else old
        written = [real(tensor) for tensor in new]
        step_size = scalar_lr(options.lr, written[0])
        if options.lr_in_momentum:
            step_size = scalar_lr(1.0, written[0])
        single_tensor_update(written[:1], [real(grads[i])], written[1:], [b[i]], [c[i]], step_size, options)
        if on_copies:
            for target, source in zip(old, new):
                value = source.to(target.dtype)
                target.copy_(value if skip is None else torch.where(on_device(skip, target), target, value))


def _coefficients(param: Tensor, grad: Tensor, first_step: bool, options: Options) -> List[Tensor]:
    w, g = real(param), real(grad)
    lr = scalar_lr(options.lr, w)
    if not is_adapted(options):
        b, c = coefficients(None, lr, first_step, options)
    elif options.trust_denominator == "joint":
        b, c = coefficients((norm(w), joint_norm(w, g, sign(options), options.weight_decay)), lr, first_step, options)
    else:
        b, c = coefficients((norm(w), norm(g)), lr, first_step, options)
    return [torch.as_tensor(b), torch.as_tensor(c)]


def _unscaled(grad: Tensor, grad_scale: Tensor) -> Tensor:
    inverse = on_device(grad_scale, grad).to(torch.float32).reciprocal()
    dtype = torch.float32 if grad.dtype == torch.float16 else grad.dtype
    return (grad.to(dtype) * inverse).to(dtype)
