"""From norms to the two numbers a tensor: the formula of LARS and every option that enters it.

With s = -1 when maximizing and else 1, r = lr if lr_in_momentum else 1, and k = 1 on a tensor's first step or
without momentum, else 1 - dampening, every variant of LARS is

    direction = b * grad + c * param        b = k * r * ratio * s        c = k * r * ratio * decay

Source: You, Gitman, Ginsburg, arXiv 1708.03888, Eq. 6 and Algorithm 1.
"""

from __future__ import annotations

from typing import Any, Optional, Tuple, Union  # noqa: UP035  TorchScript reads these spellings only

import torch
from torch import Tensor

from .norms import norm_dtype
from .options import Options

# The formula takes norms as tensors of any shape or, where the host knows them, as numbers.
Number = Union[float, Tensor]


def is_adapted(options: Options) -> bool:
    """Whether steps are scaled by the trust ratio: as ``adapt`` says, else exactly where there is weight decay."""
    if options.adapt is None:
        return options.weight_decay != 0
    return options.adapt


def where(condition: Any, if_true: Number, if_false: Number) -> Number:
    """`torch.where` for numbers too; at least one of the two is a tensor where the condition is."""
    if isinstance(condition, Tensor):
        return torch.where(condition, if_true, if_false)
    return if_true if condition else if_false


def is_nonzero(param_norm: Number, direction_norm: Number) -> Any:
    """Whether there is a ratio to take. Not `> 0`: a NaN norm must reach the parameters, as it does in the formula."""
    return (param_norm != 0) & (direction_norm != 0)


def trust_ratio(param_norm: Number, direction_norm: Number, lr: Number, options: Options) -> Number:
    """lam, the trust ratio. ``direction_norm`` is |g| for "separate" and |g + weight_decay * w| for "joint"."""
    nonzero = is_nonzero(param_norm, direction_norm)
    denominator = direction_norm + options.eps
    if options.trust_denominator == "separate":
        denominator = denominator + options.weight_decay * param_norm
    # the inner `where`: no division by 0 on the side that is not taken, whose gradient would be NaN
    ratio = options.trust_coefficient * param_norm / where(nonzero, denominator, 1.0)
    if options.trust_clip:
        # min(ratio / lr, 1), and 1 at lr = 0
        ratio = where(ratio >= lr, 1.0, ratio / where(lr > 0, lr, 1.0))
    return where(nonzero, ratio, 1.0)


def coefficients(
    norms: Optional[Tuple[Number, Number]], lr: Number, first_step: bool, options: Options
) -> Tuple[Number, Number]:
    """The factors b of the gradient and c of the parameter, in the shape of the norms.

    ``norms`` are the param norm and the direction norm; None for tensors that are not adapted.
    """
    ratio: Number = 1.0 if norms is None else trust_ratio(norms[0], norms[1], lr, options)
    if options.momentum != 0 and not first_step:
        ratio = ratio * (1 - options.dampening)
    if options.lr_in_momentum:
        ratio = ratio * lr
    c = ratio * options.weight_decay
    if norms is not None and options.trust_denominator == "separate":
        c = where(is_nonzero(*norms), c, 0.0)
    return ratio * sign(options), c


def on_device(value: Tensor, like: Tensor) -> Tensor:
    """A 1-element tensor as a 0-dim tensor on ``like``'s device."""
    # a non-blocking copy to the CPU would be read there before it has arrived
    return value.reshape(()).to(device=like.device, non_blocking=like.device.type != "cpu")


def scalar_lr(lr: Union[float, Tensor], like: Tensor) -> Union[float, Tensor]:
    """A tensor lr as a 0-dim tensor on ``like``'s device, in the dtype of its norms; a float as it is."""
    return on_device(lr, like).to(norm_dtype(like.dtype)) if isinstance(lr, Tensor) else lr


def sign(options: Options) -> float:
    """The factor s that makes a gradient the one to descend along."""
    return -1.0 if options.maximize else 1.0
