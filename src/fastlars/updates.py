"""The two implementations in torch's own operations: v = m v + b g + c w and w -= q v, in place.

For real tensors of one device and dtype (complex ones come as real views). q, the step size, is lr, or 1 where lr is in the
momentum buffer. Bytes a float32 parameter: 44, as torch's SGD.
"""

from typing import List  # noqa: UP035  TorchScript reads these spellings only

import torch
from torch import Tensor

from .coefficients import Number
from .options import Options


def _single_tensor_lars(
    params: List[Tensor],
    grads: List[Tensor],
    momentum_buffers: List[Tensor],
    b: List[Tensor],
    c: List[Tensor],
    step_size: Number,
    options: Options,
) -> None:
    """Tensor by tensor: every device, dtype and mode, and the one to read."""
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


def _multi_tensor_lars(
    params: List[Tensor],
    grads: List[Tensor],
    momentum_buffers: List[Tensor],
    b: List[Tensor],
    c: List[Tensor],
    step_size: Number,
    options: Options,
) -> None:
    """The same over whole lists: a few launches on CUDA from torch 2.11 on, no temporary of parameter size.

    With the 0-dim tensors as the first factor: those of the second are few launches in later versions only, and before 2.11
    all are one a tensor.
    """
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


def _scripted_multi_tensor_lars(
    params: List[Tensor],
    grads: List[Tensor],
    momentum_buffers: List[Tensor],
    b: List[Tensor],
    c: List[Tensor],
    step_size: Number,
    options: Options,
) -> None:
    """The same in TorchScript, out of place and then written, tensor by tensor.

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
