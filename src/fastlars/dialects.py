"""The dialects of LARS, as option values and as notes for the documentation's table.

Example:
    >>> fastlars.DIALECTS["simclr"]
    {'eps': 0.0, 'adapt': True, 'trust_denominator': 'joint', 'lr_in_momentum': True}
    >>> optimizer = fastlars.LARS([torch.nn.Parameter(torch.ones(3))], lr=0.3, dialect="simclr", eps=1e-6)
    >>> optimizer.param_groups[0]["trust_denominator"], optimizer.param_groups[0]["eps"]
    ('joint', 1e-06)
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from .options import Options

#: Option values that reproduce the LARS of other papers and packages, as in ``LARS(groups, lr=0.3, dialect="simclr")``.
#: A group with ``adapt=False`` is not adapted, even if its dialect has ``adapt=True``.
DIALECTS: dict[str, dict[str, Any]] = {
    "bolts": {},
    "torchlars": {"adapt": True},
    "pytorch_optimizer": {"eps": 0.0, "adapt": True},
    "paper": {"eps": 0.0, "adapt": True, "lr_in_momentum": True},
    "mlperf": {"eps": 1e-7, "adapt": True, "lr_in_momentum": True},
    "larc": {"trust_coefficient": 0.02, "adapt": True, "trust_clip": True},
    "timm_larc": {"trust_clip": True},
    "byol": {"eps": 0.0, "adapt": True, "trust_denominator": "joint"},
    "simclr": {"eps": 0.0, "adapt": True, "trust_denominator": "joint", "lr_in_momentum": True},
}


_DEFAULTS = Options(0.0)._asdict()
_FORMULA = ("trust_clip", "trust_denominator", "lr_in_momentum")
_NUMBERS = ("trust_coefficient", "eps")


def options_of(dialect: Any, where: str) -> dict[str, Any]:
    """A copy of a dialect's options, or an empty dict for None. Error messages begin with ``where``."""
    if dialect is None:
        return {}
    if not isinstance(dialect, str) or dialect not in DIALECTS:
        nearest = max(DIALECTS, key=lambda name: difflib.SequenceMatcher(None, str(dialect).lower(), name).ratio())
        raise ValueError(
            f"{where}: there is no dialect {dialect!r}; did you mean {nearest!r}? The dialects are {', '.join(DIALECTS)}"
        )
    return dict(DIALECTS[dialect])


def dialect_of(options: Options) -> str | None:
    """The dialect with the formula of these options. None for the default formula and for unknown formulas.

    If several dialects have this formula, prefer one whose ``trust_coefficient`` and ``eps`` are also equal.
    """
    values = options._asdict()
    if all(values[name] == _DEFAULTS[name] for name in _FORMULA):
        return None
    rows = {dialect: {**_DEFAULTS, **row} for dialect, row in DIALECTS.items()}
    alike = [dialect for dialect, row in rows.items() if all(row[name] == values[name] for name in _FORMULA)]
    return max(alike, key=lambda dialect: sum(rows[dialect][name] == values[name] for name in _NUMBERS), default=None)


class About(NamedTuple):
    """What the documentation says about a dialect in addition to its options."""

    used_by: str
    source: str  # where its formula is defined
    differs: Mapping[str, str] = MappingProxyType({})  # case -> how the original differs from fastlars in it


_DECAYS = "a tensor with zero gradient moves by lr * weight_decay * w, without a ratio. Here it does not move"

ABOUT: dict[str, About] = {
    "bolts": About(
        "Lightning Bolts, quadra, lightly; timm `lars`",
        "lightning-bolts 0.7, `pl_bolts/optimizers/lars.py`",
        {"timm zero gradient": f"timm: {_DECAYS}"},
    ),
    "torchlars": About(
        "torchlars, solo-learn; with other coefficients apex `LARC(clip=False)`, timm `always_adapt=True`",
        "torchlars 0.1, `adaptive_lr.cc`",
        {
            "torchlars zero gradient": f"torchlars and timm: {_DECAYS}",
            "solo-learn vectors": "solo-learn, `exclude_bias_n_norm`: 1-dimensional tensors are not decayed either. Use "
            "`param_groups`",
        },
    ),
    "pytorch_optimizer": About(
        "pytorch_optimizer",
        "pytorch_optimizer 4.1, `optimizer/lars.py`",
        {
            "pytorch_optimizer vectors": "tensors of at most one dimension are neither adapted nor decayed. Use "
            "`param_groups`",
            "pytorch_optimizer zero gradient": "a decayed tensor with zero gradient moves by lr * trust_coefficient * w. Here "
            "it does not move",
            "pytorch_optimizer first step": "dampening applies to the first step too",
        },
    ),
    "paper": About(
        "the paper",
        "arXiv 1708.03888, Eq. 6 and Algorithm 1",
        {
            "paper zero parameter": "read literally, the paper never moves a tensor that is zero. Here it moves by lr * g",
            "paper zero gradient": "read literally, a tensor with zero gradient moves by lr * trust_coefficient * w. Here it "
            "does not move",
        },
    ),
    "mlperf": About(
        "MLPerf's ResNet-50 in TensorFlow 2",
        "mlcommons/training, `resnet-tf2/tensorflow2/lars_optimizer.py`, where Keras turns `epsilon=0` into 1e-7",
        {"mlperf zero gradient": _DECAYS},
    ),
    "larc": About("LARC of NVIDIA apex", "apex, `apex/parallel/LARC.py`, until apex removed it in 2025"),
    "timm_larc": About(
        "timm `larc`",
        "timm 1.0, `timm/optim/lars.py`",
        {
            "timm_larc zero gradient": "a tensor with zero gradient moves by lr * weight_decay * w, at most weight_decay * w. "
            "Here it does not move",
            "timm_larc zero parameter": "if lr > 1, a tensor that is zero moves by g. Here it moves by lr * g",
        },
    ),
    "byol": About(
        "BYOL, Barlow Twins, VICReg, MoCo v3, MAE",
        "deepmind-research, `byol/utils/optimizers.py`; facebookresearch/moco-v3, `moco/optimizer.py`",
    ),
    "simclr": About(
        "SimCLR, optax `lars`",
        "google-research/simclr, `tf2/lars_optimizer.py`; optax 0.2, `alias.py`",
    ),
}
