"""Learning-rate schedules of large-batch training: linear warm-up, then polynomial or cosine decay to 0.

Each returns torch's own LambdaLR, to be stepped once after every optimizer step. A tensor lr is written in place, so a
compiled or captured step follows the schedule without recompiling.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["warmup_cosine", "warmup_polynomial"]


def warmup_polynomial(optimizer: Optimizer, warmup_steps: int, total_steps: int, power: float = 2.0) -> LambdaLR:
    """Warm-up, then lr * (1 - progress) ** power: MLPerf's schedule for LARS, with power 2.

    Args:
        optimizer: its groups' present lr is what the warm-up reaches at step ``warmup_steps``.
        warmup_steps: steps of linear growth, from lr / warmup_steps to lr; 0 for none.
        total_steps: steps of the whole run; lr is 0 from there on.
        power: power of the decay, > 0; 1 is linear.

    Returns:
        A scheduler whose ``step()`` is to be called after every ``optimizer.step()``.

    Raises:
        ValueError: unless 0 <= warmup_steps < total_steps and power > 0.

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
    return _warmup(optimizer, warmup_steps, total_steps, functools.partial(_polynomial, power))


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Warm-up, then lr * (1 + cos(pi * progress)) / 2: the schedule of SimCLR, BYOL, Barlow Twins and MoCo v3.

    Args:
        optimizer: its groups' present lr is what the warm-up reaches at step ``warmup_steps``.
        warmup_steps: steps of linear growth, from lr / warmup_steps to lr; 0 for none.
        total_steps: steps of the whole run; lr is 0 from there on.

    Returns:
        A scheduler whose ``step()`` is to be called after every ``optimizer.step()``.

    Raises:
        ValueError: unless 0 <= warmup_steps < total_steps.

    Example:
        >>> optimizer = fastlars.LARS([torch.nn.Parameter(torch.ones(3))], lr=8.0, weight_decay=1e-4)
        >>> scheduler = fastlars.schedules.warmup_cosine(optimizer, warmup_steps=10, total_steps=100)

    Source: Chen et al., *A Simple Framework for Contrastive Learning of Visual Representations*, arXiv 2002.05709.
    """
    return _warmup(optimizer, warmup_steps, total_steps, _cosine)


def _warmup(optimizer: Optimizer, warmup_steps: int, total_steps: int, decay: Any) -> LambdaLR:
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"0 <= warmup_steps < total_steps must hold, got warmup_steps={warmup_steps} and total_steps={total_steps}"
        )
    # partials and not closures: schedulers are pickled
    return LambdaLR(optimizer, functools.partial(_factor, warmup_steps, total_steps, decay))


def _factor(warmup_steps: int, total_steps: int, decay: Any, step: int) -> float:
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return float(decay(min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)))


def _polynomial(power: float, progress: float) -> float:
    return float((1 - progress) ** power)


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2
