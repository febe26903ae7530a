"""Learning rates for large-batch training: schedules with warm-up and decay, and rules that scale lr with the batch.

Each schedule is a torch LambdaLR. Call its ``step()`` once after every optimizer step. Every group has its own peak lr, and the
same factor scales all of them. A tensor lr is written in place, so a compiled or captured step sees it without recompiling.
"""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["linear_scaling", "sqrt_scaling", "warmup_cosine", "warmup_polynomial"]


def linear_scaling(lr: float, batch_size: int, base_batch_size: int = 256) -> float:
    """Scale lr linearly with the batch size: lr * batch_size / base_batch_size.

    Args:
        lr: the lr for ``base_batch_size``.
        batch_size: number of images (or of other items that the loss averages over) per optimizer step, across all devices and
            accumulated batches.
        base_batch_size: the batch size that ``lr`` is for. Default: 256, as in SimCLR, BYOL, Barlow Twins, VICReg, MoCo v3
            and MAE.

    Returns:
        The lr for ``batch_size``.

    Raises:
        ValueError: if a batch size is not > 0.

    Example:
        >>> fastlars.schedules.linear_scaling(0.3, batch_size=4096)  # SimCLR
        4.8

    Source: Goyal et al., *Accurate, Large Minibatch SGD*, arXiv 1706.02677.
    """
    return lr * _batches(batch_size, base_batch_size)


def sqrt_scaling(lr: float, batch_size: int, base_batch_size: int = 256) -> float:
    """Scale lr with the square root of the batch size: lr * sqrt(batch_size / base_batch_size).

    Args:
        lr: the lr for ``base_batch_size``.
        batch_size: number of images per optimizer step, over all devices and accumulated batches.
        base_batch_size: the batch size that ``lr`` is for. Default: 256. SimCLR's 0.075 * sqrt(batch) needs 1.

    Returns:
        The lr for ``batch_size``.

    Raises:
        ValueError: if a batch size is not > 0.

    Example:
        >>> fastlars.schedules.sqrt_scaling(0.075, batch_size=4096, base_batch_size=1)  # SimCLR
        4.8

    Source: Krizhevsky, *One weird trick for parallelizing convolutional neural networks*, arXiv 1404.5997; Chen et al.,
    arXiv 2002.05709, appendix B.1.
    """
    return lr * math.sqrt(_batches(batch_size, base_batch_size))


def _batches(batch_size: int, base_batch_size: int) -> float:
    for name, value in (("batch_size", batch_size), ("base_batch_size", base_batch_size)):
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
    return batch_size / base_batch_size


def warmup_polynomial(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, power: float = 2.0, *, end_factor: float = 0.0
) -> LambdaLR:
    """Warm up linearly, then decay as lr * (1 - progress) ** power. MLPerf uses this for LARS, with power 2.

    Args:
        optimizer: the optimizer whose lr is scheduled. The current lr of each group is its peak, which the warm-up reaches
            at step ``warmup_steps``. If an earlier scheduler left ``initial_lr`` in the group (it is saved with the
            optimizer), the peak is that value, as in torch's schedulers.
        warmup_steps: number of steps in which lr grows linearly from peak / warmup_steps to the peak, or 0 for no warm-up.
            A tenth of the run, ``total_steps // 10``, is a good start.
        total_steps: number of steps of the whole run. After the last step, lr stays at ``end_factor`` times its peak.
        power: power of the decay, > 0 (default: 2). With 1 the decay is linear.
        end_factor: the final lr as a fraction of the peak, 0 to 1 (default: 0). The whole decay is scaled to end there, not
            cut off. MLPerf's code ends at an lr of 0.0001, which is ``end_factor=1e-4 / lr``.

    Returns:
        A scheduler. Call its ``step()`` after every ``optimizer.step()``.

    Raises:
        ValueError: unless 0 <= warmup_steps < total_steps, power > 0 and 0 <= end_factor <= 1.
        TypeError: if a number of steps is not an integer.

    Example:
        >>> optimizer = fastlars.LARS([torch.nn.Parameter(torch.ones(3))], lr=8.0, weight_decay=1e-4)
        >>> scheduler = fastlars.schedules.warmup_polynomial(optimizer, warmup_steps=2, total_steps=6)
        >>> for _ in range(6):
        ...     optimizer.step()
        ...     print(optimizer.param_groups[0]["lr"])
        ...     scheduler.step()
        4.0
        8.0
        8.0
        4.5
        2.0
        0.5

    Source: Mattson et al., *MLPerf Training Benchmark*, arXiv 1910.01500.
    """
    if not power > 0:
        raise ValueError(f"power must be > 0, got {power}")
    return _warmup(optimizer, warmup_steps, total_steps, end_factor, functools.partial(_polynomial, power))


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int, *, end_factor: float = 0.0) -> LambdaLR:
    """Warm up linearly, then decay as lr * (1 + cos(pi * progress)) / 2. SimCLR, BYOL, Barlow Twins and MoCo v3 use this.

    Args:
        optimizer: the optimizer whose lr is scheduled. The current lr of each group is its peak, which the warm-up reaches
            at step ``warmup_steps``. If an earlier scheduler left ``initial_lr`` in the group (it is saved with the
            optimizer), the peak is that value, as in torch's schedulers.
        warmup_steps: number of steps in which lr grows linearly from peak / warmup_steps to the peak, or 0 for no warm-up.
            A tenth of the run, ``total_steps // 10``, is a good start.
        total_steps: number of steps of the whole run. After the last step, lr stays at ``end_factor`` times its peak.
        end_factor: the final lr as a fraction of the peak, 0 to 1 (default: 0). It is 0 in SimCLR, BYOL and MoCo v3, and
            0.001 in Barlow Twins and VICReg.

    Returns:
        A scheduler. Call its ``step()`` after every ``optimizer.step()``.

    Raises:
        ValueError: unless 0 <= warmup_steps < total_steps and 0 <= end_factor <= 1.
        TypeError: if a number of steps is not an integer.

    Example:
        >>> optimizer = fastlars.LARS([torch.nn.Parameter(torch.ones(3))], lr=8.0, weight_decay=1e-4)
        >>> scheduler = fastlars.schedules.warmup_cosine(optimizer, warmup_steps=10, total_steps=100)

    Source: Chen et al., *A Simple Framework for Contrastive Learning of Visual Representations*, arXiv 2002.05709.
    """
    return _warmup(optimizer, warmup_steps, total_steps, end_factor, _cosine)


def _warmup(optimizer: Optimizer, warmup_steps: int, total_steps: int, end_factor: float, decay: Any) -> LambdaLR:
    for name, steps in (("warmup_steps", warmup_steps), ("total_steps", total_steps)):
        # a fraction of the run, such as 0.1, would silently mean 0.1 steps and so no warm-up
        if not isinstance(steps, numbers.Integral) or isinstance(steps, bool):
            raise TypeError(
                f"{name} must be a whole number of optimizer steps, an int, got {steps!r}; for a tenth of the run "
                "write total_steps // 10"
            )
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"0 <= warmup_steps < total_steps must hold, got warmup_steps={warmup_steps} and total_steps={total_steps}"
        )
    if not 0 <= end_factor <= 1:
        raise ValueError(f"end_factor must be 0 to 1, a share of lr, got {end_factor}")
    # partials, not closures, because schedulers are pickled
    return LambdaLR(optimizer, functools.partial(_factor, warmup_steps, total_steps, end_factor, decay))


def _factor(warmup_steps: int, total_steps: int, end_factor: float, decay: Any, step: int) -> float:
    if step < warmup_steps:
        return min((step + 1) / warmup_steps, 1.0)  # fractional steps, as in scheduler.step(2.5), may pass the peak
    left = decay(min((step - warmup_steps) / (total_steps - warmup_steps), 1.0))
    return float(end_factor + (1 - end_factor) * left)


def _polynomial(power: float, progress: float) -> float:
    return float((1 - progress) ** power)


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2
