"""The LARS formula with all its options. It turns the norms of a tensor into the two factors b and c.

Every variant of LARS computes

    direction = b * grad + c * param        b = k * r * ratio * s        c = k * r * ratio * decay

Here s is -1 when maximizing, otherwise 1. r is lr with lr_in_momentum, otherwise 1. k is 1 on a tensor's first step or
without momentum, otherwise 1 - dampening. The ratio is 1 for tensors that are not adapted. decay is weight_decay, but 0 for
an adapted tensor if a norm is 0 and trust_denominator is "separate".

Source: You, Gitman, Ginsburg, arXiv 1708.03888, Eq. 6 and Algorithm 1.
"""

from typing import TYPE_CHECKING, Optional, Tuple, Union  # noqa: UP035  TorchScript reads only these spellings

import torch
from torch import Tensor

from .compat import is_scripting
from .dtypes import is_half, norm_dtype
from .options import Options

# A `Number` is a tensor of any shape or a Python number. TorchScript reads annotations when it compiles and needs one type per
# name, so in scripts every `Number` is a tensor.
if TYPE_CHECKING:
    Number = Union[float, Tensor]
    Condition = Union[bool, Tensor]
else:
    Number = Condition = Tensor


def is_adapted(options: Options) -> bool:
    """Whether the trust ratio scales steps. If ``adapt`` is None, it does if ``weight_decay != 0``."""
    adapt = options.adapt
    return options.weight_decay != 0 if adapt is None else adapt


def is_compensated(dtype: torch.dtype, options: Options) -> bool:
    """Whether the step keeps the rounding errors of this dtype. By default it does for half types in adapted groups."""
    if not is_half(dtype) or options.differentiable:
        return False
    kahan_sum = options.kahan_sum
    return is_adapted(options) if kahan_sum is None else bool(kahan_sum)


def rounds_away(dtype: torch.dtype, relative_step: float, options: Options) -> bool:
    """Whether most of a step of this relative size is lost, because this dtype rounds and no compensation keeps the error."""
    return is_half(dtype) and not is_compensated(dtype, options) and relative_step < torch.finfo(dtype).eps


def where(condition: Condition, if_true: Number, if_false: float) -> Number:
    """`torch.where` that also takes numbers."""
    if isinstance(condition, Tensor):
        return torch.where(condition, if_true, if_false)
    else:  # noqa: RET505  TorchScript skips the branch of another type, but not code after a return
        return if_true if condition else if_false


def is_nonzero(param_norm: Number, direction_norm: Number) -> Condition:
    """Whether both norms are nonzero. The test is not `> 0`, because a NaN norm must reach the parameters."""
    return (param_norm != 0) & (direction_norm != 0)


def trust_ratio(nonzero: Condition, param_norm: Number, direction_norm: Number, lr: Number, options: Options) -> Number:
    """The trust ratio. ``direction_norm`` is |g| for "separate" and |g + weight_decay * w| for "joint".

    ``nonzero`` is the result of `is_nonzero`. It is an argument because one caller needs it as well.
    """
    denominator = direction_norm + options.eps
    if options.trust_denominator == "separate":
        denominator = denominator + options.weight_decay * param_norm
    if options.differentiable or options.eps == 0:
        # avoid dividing by 0 in the unused branch, because tensors would get a NaN gradient and Python numbers would raise
        denominator = where(nonzero, denominator, 1.0)
    ratio = options.trust_coefficient * param_norm / denominator
    if options.trust_clip:
        # min(ratio / lr, 1), and 1 at lr = 0; NaN stays NaN
        is_smaller = (ratio < lr) | (ratio != ratio)  # noqa: PLR0124  isnan for numbers and tensors
        ratio = where(is_smaller, ratio / where(lr > 0, lr, 1.0), 1.0)
    return where(nonzero, ratio, 1.0)


def coefficients(
    norms: Optional[Tuple[Number, Number]], lr: Number, first_step: bool, options: Options
) -> Tuple[Number, Number]:
    """The factors b of the gradient and c of the parameter, in the shape of the norms.

    ``norms`` holds the param norm and the direction norm. It is None for tensors that are not adapted.
    """
    if norms is not None:
        nonzero = is_nonzero(norms[0], norms[1])
        ratio = _scaled(trust_ratio(nonzero, norms[0], norms[1], lr, options), lr, first_step, options)
        c = ratio * options.weight_decay
        if options.trust_denominator == "separate":
            c = where(nonzero, c, 0.0)
    else:
        ratio = _scaled(torch.ones_like(torch.as_tensor(lr)) if is_scripting() else 1.0, lr, first_step, options)
        c = ratio * options.weight_decay
    return -ratio if options.maximize else ratio, c


def _scaled(ratio: Number, lr: Number, first_step: bool, options: Options) -> Number:
    """The ratio times k and r of the formula above. Factors of 1 are left out, because each product costs an operation."""
    if options.momentum != 0 and options.dampening != 0 and not first_step:
        ratio = ratio * (1 - options.dampening)
    if options.lr_in_momentum:
        ratio = ratio * lr
    return ratio


def sign(options: Options) -> float:
    """The factor s, which is -1 when maximizing, else 1."""
    return -1.0 if options.maximize else 1.0


def on_device(value: Tensor, like: Tensor) -> Tensor:
    """A 1-element tensor as a 0-dim tensor on ``like``'s device."""
    # copies to the CPU block, because the host could read a non-blocking copy before it is complete
    return value.reshape(()).to(device=like.device, non_blocking=like.device.type != "cpu")


def unscaled(grad: Tensor, grad_scale: Tensor) -> Tensor:
    """A gradient divided by grad_scale, bit for bit like ``GradScaler.unscale_``."""
    inverse = on_device(grad_scale, grad).to(torch.float32).reciprocal()
    # unscale float16 gradients into float32, because small ones would underflow in float16
    dtype = torch.float32 if grad.dtype == torch.float16 else grad.dtype
    # convert again at the end, because the product of two 0-dim tensors has the wider dtype
    return (grad.to(dtype) * inverse).to(dtype)


def scalar_lr(lr: Union[float, Tensor], like: Tensor) -> Number:
    """Convert a tensor lr to a 0-dim tensor on ``like``'s device, in the dtype of ``like``'s norms.

    A float is returned unchanged, except in TorchScript, where it becomes a 0-dim tensor too.
    """
    if isinstance(lr, Tensor):
        return on_device(lr, like).to(norm_dtype(like.dtype))
    elif is_scripting():  # noqa: RET505  as in `where`
        return torch.full((), lr, dtype=norm_dtype(like.dtype), device=like.device)
    else:
        return lr
