"""Interleaved timing: in each round every contender takes one step, in a new order.

pytest-benchmark times one contender after the other, so a slow minute counts against the contender that ran in it. Here a
disturbance hits all contenders, and ratios are taken within a round. On a GPU, events on the device are timed.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping

import torch

from .results import COPY, READ

Step = Callable[[], object]

COPY_ELEMENTS = 64 << 20  # float32: 256 MiB, more than any cache
FEWEST_ROUNDS = 5
HEAD_START = 5.0  # ms for which a GPU waits before each step, at least, so that the host gets ahead of it
CYCLES = 2_000_000  # of a GPU in a ms, at most


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle. On a CPU it is."""
    getattr(torch, device.type).synchronize()


class Clock:
    """Times one call in milliseconds, with events on a GPU, else with the wall clock.

    On a GPU, reading 256 MiB flushes the L2 cache before each call, and the device waits 1.5 times as long as the host's
    first call took. In training, too, the host is ahead: it launches the step while the device is at the backward pass.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._head_starts: dict[Step, float] = {}
        if device.type == "cuda":
            self._flush = torch.zeros(COPY_ELEMENTS, device=device)

    def time(self, step: Step) -> float:
        begun = time.perf_counter()
        if self.device.type != "cuda":
            step()
            synchronize(self.device)
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


def yardsticks(device: torch.device, elements: int = COPY_ELEMENTS) -> dict[str, tuple[Step, int]]:
    """What measures the bandwidth of copying and of reading, and the bytes that each moves."""
    source, target = (make(elements, dtype=torch.float32, device=device) for make in (torch.ones, torch.zeros))
    return {COPY: (lambda: target.copy_(source), 2 * 4 * elements), READ: (source.sum, 4 * elements)}


def interleave(steps: Mapping[str, Step], clock: Clock, seconds: float, rounds: int = 31) -> dict[str, list[float]]:
    """Milliseconds of each step in each round.

    A first round is not counted. There are `rounds` at most; after `seconds` it stops, once there are FEWEST_ROUNDS.
    """
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
