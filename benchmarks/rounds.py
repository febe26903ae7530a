"""Interleaved timing: in each round every contender makes one step, in an order that changes from round to round.

pytest-benchmark times one contender after the other, so a slow minute counts against whoever ran in it. Here whatever
disturbs the machine disturbs all contenders, and ratios are taken within a round. On a GPU events on the device are timed.
What is stored are raw samples and counts; medians, ratios and bandwidths are computed from them.
"""

from __future__ import annotations

import gc
import hashlib
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], object]

FORMAT = 1
COPY, READ = "copy", "read"  # the rows that measure the bandwidth of copying and of reading, one each in each case
FLOOR = 20  # bytes a float32 parameter: read p, g, v; write p, v
TWO_PASSES = 28  # and p and g once more, for the norms
COPY_ELEMENTS = 64 << 20  # float32: 256 MiB, more than any cache
FEWEST_ROUNDS = 5
HEAD_START = 5.0  # ms for which a GPU waits before each step, at least, so that the host gets ahead of it
CYCLES = 2_000_000  # of a GPU in a ms, at most


class Clock:
    """Times one call, in milliseconds: by the wall on a CPU, by events on a GPU.

    On a GPU, reading 256 MiB flushes the L2 cache before each call, and the device waits 1.5 times as long as the host's
    first call took. In training, too, the host is ahead: it launches the step while the device is at the backward pass.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._head_starts: dict[Step, float] = {}
        if device.type == "cuda":
            self._flush = torch.zeros(COPY_ELEMENTS, device=device)

    def time(self, step: Step) -> float:
        if self.device.type != "cuda":
            begun = time.perf_counter()
            step()
            return (time.perf_counter() - begun) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()  # reads: written lines would go back to memory while the step runs
        if step in self._head_starts:
            torch.cuda._sleep(int(self._head_starts[step] * CYCLES))
        start.record()
        begun = time.perf_counter()
        step()
        self._head_starts.setdefault(step, max(HEAD_START, 1.5e3 * (time.perf_counter() - begun)))
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


class Copy:
    """The yardsticks of bandwidth: x.copy_(y) of 256 MiB, which reads and writes them, and x.sum(), which reads them."""

    bytes_moved = 2 * 4 * COPY_ELEMENTS
    bytes_read = 4 * COPY_ELEMENTS

    def __init__(self, device: torch.device) -> None:
        self._from = torch.ones(COPY_ELEMENTS, dtype=torch.float32, device=device)
        self._to = torch.zeros(COPY_ELEMENTS, dtype=torch.float32, device=device)

    def __call__(self) -> None:
        self._to.copy_(self._from)

    def read(self) -> None:
        self._from.sum()


def interleave(
    steps: Mapping[str, Step], clock: Clock, rounds: int, seconds: float, copy: Copy | None = None
) -> dict[str, list[float]]:
    """Milliseconds of each step, and of `copy` and its read if given, in each round.

    A first round is not counted. There are `rounds` at most; after `seconds` it stops, once there are FEWEST_ROUNDS.
    """
    if copy is not None:
        steps = {**steps, COPY: copy, READ: copy.read}
    for step in steps.values():
        clock.time(step)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(rounds):
            if done >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
                break
            shuffle(order)
            for name in order:
                samples[name].append(clock.time(steps[name]))
    finally:
        gc.enable()
    return samples


@dataclass
class Row:
    """One contender on one case. `ms` has one number a round; rounds of the rows of one case are the same rounds."""

    case: str
    contender: str
    tensors: int
    elements: int
    ms: list[float]
    bytes_moved: int | None = None  # by one step; None for a whole training step
    launches: int | None = None  # on a GPU
    host_reads: int | None = None  # on a GPU: copies to the host, each of which waits for the device
    host_us: float | None = None  # on a GPU: microseconds until a step returns
    writes_grad: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def gb_s(self) -> float | None:
        return None if self.bytes_moved is None else self.bytes_moved / self.median / 1e6

    @property
    def bytes_per_parameter(self) -> float | None:
        return None if self.bytes_moved is None else self.bytes_moved / self.elements


@dataclass
class Results:
    """One run of one benchmark."""

    benchmark: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # contender: why

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(row.case for row in self.rows))

    def of_case(self, case: str) -> list[Row]:
        """The contenders' rows; not those of the copy and the read."""
        return [row for row in self.rows if row.case == case and row.contender not in (COPY, READ)]

    def find(self, case: str, contender: str) -> Row | None:
        return next((row for row in self.rows if (row.case, row.contender) == (case, contender)), None)

    def ratio(self, case: str, contender: str, to: str) -> float | None:
        """The median, over the rounds, of a contender's time in units of another's in the same round."""
        row = self.find(case, contender)
        return None if row is None else self.relative(row, to)

    def relative(self, row: Row, to: str) -> float | None:
        """`ratio` of a row."""
        other = self.find(row.case, to)
        return None if other is None else statistics.median(a / b for a, b in zip(row.ms, other.ms, strict=True))

    def and_a_read(self, case: str, contender: str) -> Row | None:
        """A contender whose step is followed by another read of parameters and gradients, at the bandwidth of the round."""
        row, read = self.find(case, contender), self.find(case, READ)
        if row is None or read is None or row.bytes_moved is None or read.bytes_moved is None:
            return None
        more = row.bytes_moved * (TWO_PASSES - FLOOR) // FLOOR
        ms = [step + more / read.bytes_moved * whole for step, whole in zip(row.ms, read.ms, strict=True)]
        return replace(row, ms=ms, bytes_moved=row.bytes_moved + more)

    def share_of_copy(self, row: Row) -> float | None:
        copy = self.find(row.case, COPY)
        return None if copy is None or copy.gb_s is None or row.gb_s is None else row.gb_s / copy.gb_s


def save(results: Results, path: Path) -> None:
    content = {"format": FORMAT, **asdict(results)}
    rows = content.pop("rows")
    for row in rows:
        row["ms"] = [float(f"{value:.5g}") for value in row["ms"]]
    # a line a row: the file is read in diffs
    head = json.dumps(content, indent=1)
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "rows": [\n{body}\n ]\n}}\n', encoding="utf-8")


def load(path: Path) -> Results:
    content = json.loads(path.read_text(encoding="utf-8"))
    if (found := content.pop("format")) != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT}, got {found}; measure again")
    return Results(**{**content, "rows": [Row(**row) for row in content["rows"]]})


def fingerprint(*numbers: object) -> str:
    """Stored in a picture to identify the numbers it was drawn from, so that a test can detect a stale one."""
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]
