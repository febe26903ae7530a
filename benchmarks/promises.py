"""What fastlars promises of its step, as data: the page says of each whether the measured run kept it."""

from __future__ import annotations

from dataclasses import dataclass

from .optimizers import LOOP, YARDSTICK
from .results import COPY, Results
from .shapes import MODELS

DEFAULT = "fastlars-fused"  # what a CPU user gets, and with fused=True a GPU user


@dataclass(frozen=True)
class Promise:
    """A bound of time against another contender, on one model."""

    model: str
    against: str
    at_most: float | None = None  # times the other's time
    at_least: float | None = None  # times as fast as the other
    aim: float | None = None
    form = ".2f"  # of what was measured

    @property
    def case(self) -> str:
        return MODELS[self.model].title

    @property
    def bound(self) -> str:
        if self.at_most is not None:
            return f"at most {self.at_most:.2f} times its time" + (f" (aim {self.aim:.2f})" if self.aim else "")
        return f"at least {self.at_least:.1f} times as fast"

    def measured(self, results: Results) -> float | None:
        if self.at_most is not None:
            return results.ratio(self.case, DEFAULT, self.against)
        return results.ratio(self.case, self.against, DEFAULT)

    def kept(self, value: float) -> bool:
        return value <= self.at_most if self.at_most is not None else value >= (self.at_least or 0)


class Bandwidth(Promise):
    """A share of the bandwidth of the copy in the same rounds."""

    @property
    def bound(self) -> str:
        return f"at least {self.at_least:.2f} of its bandwidth"

    def measured(self, results: Results) -> float | None:
        row = results.find(self.case, DEFAULT)
        return None if row is None else results.share_of_copy(row)


class HostTime(Promise):
    """Microseconds until a step returns on an idle GPU."""

    form = ".0f"

    @property
    def bound(self) -> str:
        return f"at most {self.at_most:.0f} us for a step"

    def measured(self, results: Results) -> float | None:
        row = results.find(self.case, DEFAULT)
        return None if row is None else row.host_us


PROMISES: dict[str, tuple[Promise, ...]] = {
    "cpu": (
        Promise("resnet50", YARDSTICK, at_most=1.40, aim=1.28),
        Promise("vit_b", YARDSTICK, at_most=1.45, aim=1.28),
        Promise("small", YARDSTICK, at_most=1.80, aim=1.0),
        Promise("resnet50", LOOP, at_least=1.9),
        Promise("vit_b", LOOP, at_least=2.0),
        Promise("small", LOOP, at_least=5.0),
    ),
    "cuda": (
        Promise("resnet50", YARDSTICK, at_most=1.40, aim=1.25),
        Promise("vit_b", YARDSTICK, at_most=1.40),
        Promise("vit_l", YARDSTICK, at_most=1.40),
        *(Bandwidth(model, COPY, at_least=0.85) for model in ("resnet50", "vit_b", "vit_l")),
        HostTime("resnet50", "host", at_most=250),
    ),
}
