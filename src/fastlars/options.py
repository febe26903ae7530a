"""The options of LARS, with their names, order, defaults and rules."""

import math
import numbers
from operator import itemgetter
from typing import Any, Mapping, NamedTuple, Optional, Union  # noqa: UP035  TorchScript reads only these spellings

import torch
from torch import Tensor


class Options(NamedTuple):
    """The options of one param group. The field names are keys of checkpoints and must never change."""

    lr: Union[float, Tensor]
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    trust_coefficient: float = 0.001
    eps: float = 1e-8
    adapt: Optional[bool] = None
    trust_clip: bool = False
    trust_denominator: str = "separate"
    lr_in_momentum: bool = False
    skip_nonfinite: bool = False
    maximize: bool = False
    foreach: Optional[bool] = None
    differentiable: bool = False
    fused: Optional[bool] = None
    kahan_sum: Optional[bool] = None


NAMES = Options._fields
values_of = itemgetter(*NAMES)  # the values of a param group, in the order of `Options`
TRUST_DENOMINATORS = ("separate", "joint")
_NON_NEGATIVE = ("momentum", "weight_decay", "trust_coefficient", "eps")
_BOOLEAN = ("nesterov", "trust_clip", "lr_in_momentum", "skip_nonfinite", "maximize", "differentiable")
_OPTIONAL_BOOLEAN = ("adapt", "foreach", "fused", "kahan_sum")


def check_options(options: Mapping[str, Any], where: str) -> None:
    """Raise for the first option that breaks its rule.

    ``where`` says in error messages where the options come from, such as "param group 1".
    """
    check_lr(options["lr"], where)
    for name in _NON_NEGATIVE:
        _check_number(name, options[name], where, minimum=0.0)
    if options["momentum"] >= 1:
        raise ValueError(
            f"{where}: momentum must be < 1, got {options['momentum']}, because the buffer must forget old gradients; "
            "0.9 is usual"
        )
    _check_number("dampening", options["dampening"], where)
    for name in _BOOLEAN + _OPTIONAL_BOOLEAN:
        value, optional = options[name], name in _OPTIONAL_BOOLEAN
        # accept 0 and 1, because config files and old checkpoints write booleans like this
        if not (isinstance(value, int) and value in (0, 1)) and not (optional and value is None):
            rule = "None, True or False" if optional else "True or False"
            raise TypeError(f"{where}: {name} must be {rule}, got {value!r}")
    if options["trust_denominator"] not in TRUST_DENOMINATORS:
        rule = " or ".join(repr(value) for value in TRUST_DENOMINATORS)
        raise ValueError(f"{where}: trust_denominator must be {rule}, got {options['trust_denominator']!r}")

    _check_together(options, where)


def _check_together(options: Mapping[str, Any], where: str) -> None:
    momentum, dampening = options["momentum"], options["dampening"]
    if options["nesterov"] and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"{where}: nesterov=True needs momentum > 0 and dampening == 0, "
            f"got momentum={momentum} and dampening={dampening}"
        )
    if options["skip_nonfinite"]:
        check_can_be_skipped(momentum, dampening, f"{where}: skip_nonfinite=True")
    pairs = [(name, "differentiable") for name in ("foreach", "fused", "kahan_sum")]
    for first, second in [*pairs, ("fused", "foreach")]:
        if options[first] and options[second]:
            raise ValueError(f"{where}: {first}=True and {second}=True exclude each other; set only one of them")


def check_can_be_skipped(momentum: float, dampening: float, what: str) -> None:
    """Raise for dampening in a step that the device may skip. ``what`` names the option that allows skipping."""
    if momentum != 0 and dampening != 0:
        raise ValueError(
            f"{what} with momentum needs dampening == 0, got dampening={dampening}, because dampening starts after a "
            "tensor's first step and only the device knows whether that step was skipped"
        )


def check_lr(lr: Any, where: str, name: str = "lr") -> None:
    """Raise unless lr is a number >= 0 or a 1-element tensor."""
    if not isinstance(lr, Tensor):
        _check_number(name, lr, where, minimum=0.0)
        return
    check_tensor_lr(lr, where, name)
    # do not read a value on an accelerator, because that would synchronise, and schedulers overwrite the value anyway
    if lr.device.type == "cpu":
        _check_number(name, lr.item(), where, minimum=0.0)


def check_tensor_lr(lr: Tensor, where: str, name: str = "lr") -> None:
    """Raise for a tensor whose shape, dtype or layout does not suit an lr."""
    if lr.numel() != 1 or not lr.is_floating_point() or lr.layout != torch.strided:
        raise ValueError(
            f"{where}: Tensor {name} must be 1-element and of a floating dtype, got shape {tuple(lr.shape)} and {lr.dtype}"
            + ("" if lr.layout == torch.strided else f" of layout {lr.layout}; make it dense")
        )


def _check_number(name: str, value: Any, where: str, minimum: float = -math.inf) -> None:
    rule = "must be a finite number" + (" >= 0" if minimum == 0 else "")
    # Python numbers and numpy scalars pass. Fractions, Decimals and 0-dim arrays do not, because torch's operators
    # would raise for them in the middle of a step.
    exact = isinstance(value, numbers.Rational) and not isinstance(value, numbers.Integral)
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or exact:
        raise TypeError(f"{where}: {name} {rule}, got {value!r}")
    if isinstance(value, numbers.Integral) and abs(int(value)) >= 2**63:
        raise ValueError(f"{where}: {name} {rule}, got {value}, an integer beyond 64 bits; give a float")
    if not (math.isfinite(value) and float(value) >= minimum):
        raise ValueError(f"{where}: {name} {rule}, got {value}")


def check_no_module(params: Any, where: str) -> None:
    """Raise for a module instead of parameters. Some modules are iterable, and torch's error would not name the mistake."""
    if isinstance(params, torch.nn.Module):
        raise TypeError(
            f"{where}: LARS takes parameters, got a {type(params).__name__}; pass model.parameters(), or "
            "fastlars.param_groups(model, weight_decay), which does not adapt biases and normalisation tensors"
        )
