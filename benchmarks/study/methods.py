"""The protocol as data: what is compared, and what is the same for all. docs/study.md says it in words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.demo.data import Cut
from benchmarks.demo.training import Method, Protocol
from fastlars import DIALECTS

# Of MNIST's 60000 training images: batches of 256, 1024, 4096 and 8192, and images halved to 14 x 14 pixels.
CUT = Cut(train=32768, validation=10000, share=0.8, parts=(128, 32, 8, 4), pool=2)

# By version, which every stored run carries: a change of anything here or in training.py that changes runs is a new version.
PROTOCOLS = {
    "1": Protocol(
        epochs=5,
        warmup_epochs=1,
        neighbours=2,
        most_trials=15,
        search_seeds=(100, 101, 102),
        test_seeds=(0, 1, 2, 3, 4),
        first_stride=2,
        ratios_an_epoch=4,
    ),
    "quick": Protocol(
        epochs=2,
        warmup_epochs=1,
        neighbours=2,
        most_trials=6,
        search_seeds=(100,),
        test_seeds=(0, 1),
        first_stride=2,
        ratios_an_epoch=4,
    ),
}

BIAS_KNOB, CLIP_KNOB = "own lr of other tensors", "threshold"
OWN_LR = {"SGD": 0.1, "LARS": 0.1, "AdamW": 0.001}  # customary ones, not searched: LARS's other tensors take SGD's step
CLIP = 1.0  # the customary one, not searched


def batches(protocol: Protocol, train_images: int) -> tuple[int, ...]:
    """Smallest first; a quick run has the two largest."""
    found = tuple(train_images // part for part in CUT.parts)
    return found[-2:] if protocol is PROTOCOLS["quick"] else found


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    name: str
    method: Method
    knobs: tuple[str, ...]  # beyond the lr that is searched, and what all have: momentum, decay, schedule


def _own(method: Method) -> Method:
    return replace(method, bias_lr=OWN_LR[method.optimizer])


def _options(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(options.items()))


# Where the first grid lies comes from a pilot of single runs, and costs trials at most.
BASE = {
    "SGD": Method("SGD", None, 0.2),
    "SGD with Nesterov": Method("SGD", None, 0.2, _options(nesterov=True)),
    "SGD with clipping": Method("SGD", None, 1.6, clip=CLIP, first_lr_power=0.5),
    "AdamW": Method("AdamW", None, 0.032, first_lr_power=0.25),
    "LARS": Method("LARS", None, 128.0, first_lr_power=0.6),
}
MAIN = tuple(
    Row(name, _own(method), (BIAS_KNOB, CLIP_KNOB) if method.clip else (BIAS_KNOB,)) for name, method in BASE.items()
)
ONE_LR_FIRST = {"AdamW": 0.064, "LARS": 16.0}
ONE_LR = tuple(
    Row(name, replace(method, first_lr=ONE_LR_FIRST.get(name, method.first_lr)), (CLIP_KNOB,) if method.clip else ())
    for name, method in BASE.items()
)

# Dialects whose options differ in eps alone, which is far below any norm here, share a row; adapt is what the groups say.
SHARED = {"LARS": ("bolts", "torchlars", "pytorch_optimizer"), "paper": ("paper", "mlperf")}
FAMILY_FIRST = {"larc": 16.0, "timm_larc": 32.0, "byol": 128.0, "simclr": 128.0, "paper": 128.0}


def _dialect(name: str) -> Method:
    options = {option: value for option, value in DIALECTS[name].items() if option != "adapt"}
    return replace(_own(BASE["LARS"]), options=_options(**options), first_lr=FAMILY_FIRST[name])


FAMILY = (
    *(Row(f"dialect {' and '.join(SHARED.get(name, (name,)))}", _dialect(name), (BIAS_KNOB,)) for name in FAMILY_FIRST),
    Row("all tensors adapted", replace(BASE["LARS"], adapt_all=True, first_lr=64.0), ()),
)
NORM_FIRST = {"SGD with clipping": 0.8, "LARS": 32.0}
BATCH_NORM = tuple(
    replace(
        row,
        method=replace(row.method, batch_norm=True, first_lr=NORM_FIRST.get(row.name, row.method.first_lr)),
    )
    for row in MAIN
)
AT_LARGEST = (*FAMILY, *ONE_LR)
