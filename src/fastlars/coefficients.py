"""From norms to the two numbers a tensor: the formula of LARS and every option that enters it.

With s = 1 / grad_scale (negative when maximizing), r = lr if lr_in_momentum else 1, and k = 1 on a tensor's first step or
without momentum, else 1 - dampening, every variant of LARS is

    direction = b * grad + c * param        b = k * r * ratio * s        c = k * r * ratio * decay

Source: You, Gitman, Ginsburg, arXiv 1708.03888, Eq. 6 and Algorithm 1.
"""

from __future__ import annotations

from typing import Optional, Tuple, Union  # noqa: UP035  TorchScript reads these spellings only

import torch
from torch import Tensor

from .norms import norm_dtype
from .options import Options


def is_adapted(options: Options) -> bool:
    """Whether steps are scaled by the trust ratio: as ``adapt`` says, else exactly where there is weight decay."""
    if options.adapt is None:
        return options.weight_decay != 0
    return options.adapt


def trust_ratio(
    param_norm: Tensor, direction_norm: Tensor, lr: Union[float, Tensor], options: Options
) -> Tuple[Tensor, Tensor]:
    """Trust ratio and effective weight decay of each tensor, from norms of any shape.

    ``direction_norm`` is |g| for "separate" and |g + weight_decay * w| for "joint".
    """
    # `!= 0` and not `> 0`: a NaN norm must reach the parameters, as it does in the formula
    nonzero = (param_norm != 0) & (direction_norm != 0)
    denominator = direction_norm + options.eps
    if options.trust_denominator == "separate":
        denominator = denominator + options.weight_decay * param_norm
    # the inner `where`: no division by 0 on the side that is not taken, whose gradient would be NaN
    ratio = options.trust_coefficient * param_norm / torch.where(nonzero, denominator, 1.0)
    if options.trust_clip:
        # min(ratio / lr, 1), and 1 at lr = 0
        clipped = ratio >= lr
        # ones_like and not 1.0: `where` of two numbers has the default dtype
        ratio = torch.where(clipped, 1.0, ratio) / torch.where(clipped, torch.ones_like(ratio), lr)
    ratio = torch.where(nonzero, ratio, 1.0)
    decay = torch.full_like(ratio, options.weight_decay)
    if options.trust_denominator == "separate":
        decay = torch.where(nonzero, decay, 0.0)
    return ratio, decay


def scalar_lr(lr: Union[float, Tensor], like: Tensor) -> Union[float, Tensor]:
    """A tensor lr as a 0-dim tensor on ``like``'s device; a float as it is."""
    if isinstance(lr, Tensor):
        return lr.reshape(()).to(device=like.device, non_blocking=True)
    return lr


def gradient_scale(grad_scale: Optional[Tensor], maximize: bool, like: Tensor) -> Optional[Tensor]:
    """The factor s that makes a raw gradient the one to descend along, on ``like``'s device; None where it is 1."""
    if grad_scale is not None:
        scale = grad_scale.reshape(()).to(device=like.device, dtype=torch.float32, non_blocking=True).reciprocal()
        return -scale if maximize else scale
    if maximize:
        return torch.full((), -1.0, dtype=torch.float32, device=like.device)
    return None


def coefficients(
    norms: Optional[Tensor], like: Tensor, scale: Optional[Tensor], first_step: bool, options: Options
) -> Tuple[Tensor, Tensor]:
    """The factors b of the gradients and c of the parameters, on ``like``'s device, in the dtype its norms have.

    ``norms`` holds param norms in row 0 and direction norms in row 1, shape (>= 2, n); None for tensors that are not
    adapted. b and c have shape (n,), or () without norms.
    """
    dtype = norm_dtype(like.dtype)
    lr = scalar_lr(options.lr, like)
    if norms is None:
        ratio = torch.ones((), dtype=dtype, device=like.device)
        decay = torch.full_like(ratio, options.weight_decay)
    else:
        ratio, decay = trust_ratio(norms[0], norms[1], lr, options)
    if options.momentum != 0 and not first_step:
        ratio = ratio * (1 - options.dampening)
    if options.lr_in_momentum:
        ratio = ratio * lr
    c = ratio * decay
    b = ratio if scale is None else ratio * scale
    return b.to(dtype), c.to(dtype)
