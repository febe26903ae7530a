"""The dialects of LARS, as data."""

from __future__ import annotations

from typing import Any

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
