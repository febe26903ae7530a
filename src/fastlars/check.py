"""Look for common mistakes in a model and its optimizer before training."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .formula import is_adapted, rounds_away
from .groups import has_normalisation
from .options import NAMES, Options, values_of
from .sharding import local

# SGD rarely uses a larger lr, and tensors that are not adapted take SGD steps.
LARGEST_SGD_LR = 1.0
# Without a warm-up, training often diverges if steps are larger than this part of a tensor's norm. `_no_warmup` divides steps
# by 1 - momentum before it compares them.
LARGEST_FIRST_STEP = 0.02
# With smaller relative steps the loss hardly falls. An lr of 0.1, which is usual for SGD, gives 1e-4.
SMALLEST_STEP = 1.5e-4
_SHOWN = 4  # a printed finding lists at most this many tensor names


class Finding(NamedTuple):
    """One probable mistake."""

    name: str  # also a heading on the documentation page "When something looks wrong"
    sentence: str
    way_out: str
    tensors: tuple[str, ...] = ()  # names of the tensors concerned, or group and position, such as "0.3"


class Findings(list[Finding]):
    """A list of findings that prints as text."""

    def __repr__(self) -> str:
        """Return the findings as text, one paragraph each."""
        return "\n".join(map(_paragraph, self)) or "no findings"


def check(model: nn.Module, optimizer: Optimizer) -> Findings:
    """Look for common mistakes before ``model`` trains with ``optimizer``.

    Call it once, after you have built the optimizer and the schedule and before the first step. It looks for

    - parameters of the model that are in no group and would never train;
    - an optimizer that adapts no tensor, which is SGD at LARS's lr;
    - biases and other tensors that are not adapted, at an lr far above SGD's, in a model without normalisation layers;
    - adapted tensors that are zero, whose first step is lr * gradient without a trust ratio;
    - a large lr without warm-up;
    - an lr of SGD's size, with which adapted tensors hardly change;
    - half-precision weights that lose most of each step to rounding.

    It tests whether parameters are zero, which synchronises with the GPU. Each process checks only its own shard of a
    sharded tensor, without communication.

    Args:
        model: the module that trains, wrapped or not.
        optimizer: a :class:`fastlars.LARS`, wrapped or not.

    Returns:
        A list of findings, the most serious first, or an empty list. Each finding has ``name``, ``sentence``, ``way_out``
        and ``tensors``, the names of the tensors concerned.

    Raises:
        TypeError: if ``model`` is not a module, or ``optimizer`` is not a LARS.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> groups = fastlars.param_groups(model, weight_decay=1e-4, bias_lr="same")
        >>> optimizer = fastlars.LARS(groups, lr=8.0)
        >>> fastlars.check(model, optimizer)
        biases at LARS's lr: 2 tensors are not adapted and take plain SGD steps at lr 8, which is far too
        large in a model without normalisation layers. Give them their own lr: param_groups(model,
        weight_decay, bias_lr=0.1). (0.bias, 2.bias)
        >>> fastlars.check(model, fastlars.LARS(fastlars.param_groups(model, 1e-4, bias_lr=0.1), lr=8.0))
        no findings
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be the module that trains, got {type(model).__name__}")
    groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [{}])
    if not all(group.keys() >= {"params", *NAMES} for group in groups):
        raise TypeError(f"optimizer must be a fastlars.LARS, got {type(optimizer).__name__}")
    seen = _Seen(model, optimizer, groups)
    return Findings(finding for find in _CHECKS for finding in find(seen))


class _Seen:
    """The model, groups and names that the checks look at."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
        self.model = model
        self.groups = groups
        self.started = len(optimizer.state) > 0
        self.names = {param: name for name, param in model.named_parameters()}
        for i, group in enumerate(groups):
            for j, param in enumerate(group["params"]):
                self.names.setdefault(param, f"{i}.{j}")

    def of(self, *, adapted: bool, where: Callable[[dict[str, Any], Tensor], bool]) -> tuple[str, ...]:
        """Names of the trainable tensors in adapted (or unadapted) groups for which ``where`` is true."""
        return tuple(
            self.names[param]
            for group in self.groups
            if _is_adapted(group) == adapted
            for param in group["params"]
            if param.requires_grad and not is_lazy(param) and where(group, param)
        )


def _not_in_the_optimizer(seen: _Seen) -> Iterator[Finding]:
    known = {param for group in seen.groups for param in group["params"]}
    left_out = tuple(n for n, p in seen.model.named_parameters() if p.requires_grad and p not in known)
    if left_out:
        yield Finding(
            "parameters in no group",
            f"{_count(left_out, 'is', 'are')} in no param group and will never be updated",
            "Once all layers exist, build the groups from the whole model, param_groups(model, weight_decay), or freeze "
            "these tensors with requires_grad_(False)",
            left_out,
        )


def _nothing_is_adapted(seen: _Seen) -> Iterator[Finding]:
    if not any(_is_adapted(group) for group in seen.groups):
        yield Finding(
            "nothing is adapted",
            "LARS adapts no tensor, so this is SGD at LARS's lr",
            "Set weight_decay, build the groups with param_groups(model, weight_decay), or pass adapt=True",
        )


def _biases_too_fast(seen: _Seen) -> Iterator[Finding]:
    fast = seen.of(adapted=False, where=lambda group, _: _peak_lr(group) > LARGEST_SGD_LR)
    if fast and not has_normalisation(seen.model) and any(map(_is_adapted, seen.groups)):
        lr = max(_peak_lr(group) for group in seen.groups if not _is_adapted(group))
        yield Finding(
            "biases at LARS's lr",
            f"{_count(fast, 'is not adapted and takes', 'are not adapted and take')} plain SGD steps at lr {lr:g}, which is "
            "far too large in a model without normalisation layers",
            "Give them their own lr: param_groups(model, weight_decay, bias_lr=0.1)",
            fast,
        )


def _starts_at_zero(seen: _Seen) -> Iterator[Finding]:
    zero = seen.of(adapted=True, where=lambda group, p: float(group["lr"]) > LARGEST_SGD_LR and _is_zero(p))
    if zero:
        yield Finding(
            "a tensor that starts at zero",
            f"{_count(zero, 'is', 'are')} zero, so the first step is lr * gradient, without a trust ratio",
            "Warm up (schedules), exclude them from adaptation and give them their own lr "
            "(param_groups(..., exclude_from_adaptation=[...], bias_lr=0.1)), or start them at small random numbers",
            zero,
        )


def _no_warmup(seen: _Seen) -> Iterator[Finding]:
    # skip groups with trust_clip (LARC), whose step is bounded by the trust coefficient at any lr
    adapted = [group for group in seen.groups if _is_adapted(group) and not group["trust_clip"]]
    bounds = {_relative_step(g, float(g["lr"])) / (1 - g["momentum"]): float(g["lr"]) for g in adapted}
    largest = max(bounds, default=0.0)
    if largest > LARGEST_FIRST_STEP and not seen.started:
        yield Finding(
            "no warm-up",
            f"training begins at lr {bounds[largest]:g}, which moves fresh weights by up to {largest:.1%} per step",
            "Warm up over 5 to 30 % of the run: schedules.warmup_cosine(optimizer, total_steps // 10, total_steps)",
        )


def _lr_of_sgd(seen: _Seen) -> Iterator[Finding]:
    adapted = [g for g in seen.groups if _is_adapted(g) and not g["trust_clip"] and g["params"]]
    largest = max((_relative_step(group, _peak_lr(group)) for group in adapted), default=1.0)
    if 0 < largest < SMALLEST_STEP:
        yield Finding(
            "the loss is flat",
            f"a step moves adapted tensors by only {largest:.2g} of their norm, because lr is of SGD's size",
            "At LARS's trust_coefficient of 0.001, use an lr of 1 to 30, such as 8",
        )


def _half_precision(seen: _Seen) -> Iterator[Finding]:
    def is_stuck(group: dict[str, Any], param: Tensor) -> bool:
        return rounds_away(param.dtype, _relative_step(group, _peak_lr(group)), Options(*values_of(group)))

    stuck = seen.of(adapted=True, where=is_stuck)
    if stuck:
        yield Finding(
            "half-precision weights hardly move",
            f"{_count(stuck, 'is', 'are')} stored in half precision, which rounds away most of a step of this size",
            "Leave kahan_sum at None, or keep parameters in float32 and compute under torch.autocast",
            stuck,
        )


_CHECKS: tuple[Callable[[_Seen], Iterator[Finding]], ...] = (
    _not_in_the_optimizer,
    _nothing_is_adapted,
    _biases_too_fast,
    _starts_at_zero,
    _no_warmup,
    _lr_of_sgd,
    _half_precision,
)


def _is_adapted(group: dict[str, Any]) -> bool:
    return is_adapted(Options(*values_of(group)))


def _peak_lr(group: dict[str, Any]) -> float:
    """The peak lr. A schedule keeps it in the group as ``initial_lr``. Without a schedule it is ``lr``."""
    return float(group.get("initial_lr", group["lr"]))


def _relative_step(group: dict[str, Any], lr: float) -> float:
    """How much a step at this lr changes an adapted tensor, relative to its norm and without momentum."""
    return float(group["trust_coefficient"]) * (1.0 if group["trust_clip"] else lr)


def _is_zero(param: Tensor) -> bool:
    part = local(param.detach())
    return part.numel() > 0 and not part.is_meta and not bool(part.any())


def _count(tensors: tuple[str, ...], singular: str, plural: str) -> str:
    return f"1 tensor {singular}" if len(tensors) == 1 else f"{len(tensors)} tensors {plural}"


def _paragraph(finding: Finding) -> str:
    names = ", ".join(finding.tensors[:_SHOWN]) + (", ..." if len(finding.tensors) > _SHOWN else "")
    text = f"{finding.name}: {finding.sentence}. {finding.way_out}." + (f" ({names})" if names else "")
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
