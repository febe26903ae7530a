"""Interleaved timing. In each round every optimizer takes one step, in a new order.

pytest-benchmark times one optimizer after the other, so a slow minute counts against the optimizer that ran in it. Here a
disturbance affects all optimizers, and ratios are taken within a round. On a GPU, events on the device are timed.
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
HEAD_START = 5.0  # ms that a GPU at least waits before each step, to let the host get ahead of it
CYCLES = 2_000_000  # a GPU runs at most this many cycles per ms


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle. On a CPU this does nothing."""
    getattr(torch, device.type).synchronize()


class Clock:
    """Times one call in milliseconds, with events on a GPU, else with the wall clock.

    On a GPU, reading 256 MiB flushes the L2 cache before each call. The device then waits 1.5 times as long as the first call
    took on the host. This puts the host ahead, as in training, where it launches the step during the backward pass.
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
        self._flush.sum()  # only reads, because written cache lines would go back to memory while the step runs
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
    """The calls that measure the bandwidth of copying and of reading, and the bytes that each of them moves."""
    source, target = (make(elements, dtype=torch.float32, device=device) for make in (torch.ones, torch.zeros))
    return {COPY: (lambda: target.copy_(source), 2 * 4 * elements), READ: (source.sum, 4 * elements)}


def interleave(steps: Mapping[str, Step], clock: Clock, seconds: float, rounds: int = 31) -> dict[str, list[float]]:
    """Milliseconds of each step in each round.

    Every step first runs once without being counted. At most `rounds` rounds follow. They stop after `seconds`, but not
    before there are FEWEST_ROUNDS.
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
