"""Param groups for a model, and the dialects of LARS as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

#: Option values that make LARS the one of other papers and packages, as in ``LARS(groups, lr=0.3, **DIALECTS["simclr"])``.
DIALECTS: dict[str, dict[str, Any]] = {
    # Lightning Bolts, quadra, lightly: the default
    "bolts": {},
    # You, Gitman, Ginsburg, arXiv 1708.03888, Algorithm 1; MLPerf's ResNet-50 reference adds eps 0
    "paper": {"lr_in_momentum": True, "eps": 0.0},
    "mlperf": {"lr_in_momentum": True, "eps": 0.0},
    # NVIDIA apex
    "larc": {"trust_clip": True},
    # BYOL, Barlow Twins, VICReg, MoCo v3, MAE: which tensors are adapted goes by their groups, not by decay
    "byol": {"trust_denominator": "joint", "adapt": True, "eps": 0.0},
    # SimCLR, optax
    "simclr": {"trust_denominator": "joint", "adapt": True, "eps": 0.0, "lr_in_momentum": True},
}

_NORMALISATION = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def param_groups(
    model: nn.Module | Iterable[tuple[str, Tensor]], weight_decay: float, *, unadapted: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Two param groups: weight matrices and kernels, adapted; biases and normalisation tensors, not adapted.

    Args:
        model: a module, or named parameters as of ``model.named_parameters()``.
        weight_decay: for the adapted group, >= 0; the other one has none.
        unadapted: options for the group that is not adapted, such as ``{"lr": 0.1}``: its tensors take lr * g unscaled,
            which at LARS's learning rates ruins networks without normalisation layers.

    Returns:
        A group with ``adapt=True`` and one with ``adapt=False``, names kept, without those that would be empty. Not
        adapted are tensors of at most one dimension, those named "bias", and, for a module, all parameters of its
        normalisation layers. A parameter that several modules share stands once. Frozen parameters are in their
        groups, so that they can be unfrozen later.

    Raises:
        ValueError: if there is no parameter at all.
        TypeError: for parameters without names.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> adapted, rest = fastlars.param_groups(model, weight_decay=1e-4, unadapted={"lr": 0.1})
        >>> [name for name, _ in adapted["params"]], [name for name, _ in rest["params"]]
        (['0.weight'], ['0.bias', '1.weight', '1.bias'])
    """
    named = list(model.named_parameters()) if isinstance(model, nn.Module) else list(model)
    if not all(map(_is_named_parameter, named)):
        raise TypeError("param_groups needs a module or (name, parameter) pairs; pass model.named_parameters()")
    if not named:
        raise ValueError("param_groups got no parameters; pass a module that has some, or its named_parameters()")

    normalisation: set[Tensor] = set()
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, _NORMALISATION) or type(module).__name__.endswith("Norm"):
                normalisation.update(module.parameters(recurse=False))

    seen: set[Tensor] = set()
    adapted: list[tuple[str, Tensor]] = []
    rest: list[tuple[str, Tensor]] = []
    for name, param in named:
        if param in seen:
            continue
        seen.add(param)
        alone = param.ndim <= 1 or name.rpartition(".")[2] == "bias" or param in normalisation
        (rest if alone else adapted).append((name, param))
    groups = [
        {"params": adapted, "weight_decay": weight_decay, "adapt": True},
        {"params": rest, "weight_decay": 0.0, "adapt": False, **(unadapted or {})},
    ]
    return [group for group in groups if group["params"]]


def _is_named_parameter(item: object) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Tensor)
