"""Interleaved timing: in each round every contender makes one step, in an order that changes from round to round.

What disturbs a machine for a while then disturbs all contenders, and ratios are taken round by round. pytest-benchmark is
not used because it times one contender after the other, so that a slow minute counts against whoever ran in it.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from .results import COPY, READ

Step = Callable[[], object]

COPY_ELEMENTS = 64 << 20  # float32: 256 MiB, more than any cache
FEWEST_ROUNDS = 5
HEAD_START = 5.0  # ms for which a GPU waits before each step, at least, so that the host gets ahead of it
CYCLES = 2_000_000  # of a GPU in a ms, at most


class Clock(Protocol):
    """Times one call, in milliseconds."""

    device: torch.device

    def time(self, step: Step) -> float: ...


class CPUClock:
    """The wall clock. Caches hold whatever the contender before has left there."""

    device = torch.device("cpu")

    def time(self, step: Step) -> float:
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3


class CUDAClock:
    """Events on the device. Before each call the L2 cache is flushed by reading 256 MiB, and the host gets a head start.

    It is half as long again as the host's first call took. Without it the time would be the host's, for which nobody waits
    in training: it launches the step while the device is at the backward pass. A step that reads on the host waits there,
    and its time has all of that in it. What the host takes is measured by itself, in `counting.py`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.zeros(COPY_ELEMENTS, dtype=torch.float32, device=device)
        self._head_starts: dict[Step, float] = {}

    def time(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.sum()  # written lines would go back to memory while the step runs
        if step in self._head_starts:
            torch.cuda._sleep(int(self._head_starts[step] * CYCLES))  # type: ignore[no-untyped-call]
        start.record()
        begun = time.perf_counter()
        step()
        self._head_starts.setdefault(step, max(HEAD_START, 1.5e3 * (time.perf_counter() - begun)))
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def clock_for(device: torch.device) -> Clock:
    return CUDAClock(device) if device.type == "cuda" else CPUClock()


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


@dataclass(frozen=True)
class Length:
    """How long to go on: `rounds`, but no longer than `seconds` once there are a few."""

    rounds: int
    seconds: float


def interleave(
    steps: Mapping[str, Step], clock: Clock, length: Length, copy: Copy | None = None
) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round (and of `copy` and its read, if given), after one that is not counted."""
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
        for done in range(length.rounds):
            if done >= FEWEST_ROUNDS and time.perf_counter() - start > length.seconds:
                break
            shuffle(order)
            for name in order:
                samples[name].append(clock.time(steps[name]))
    finally:
        gc.enable()
    return samples
