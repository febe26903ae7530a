"""Run 100,000 steps with each implementation, and measure whether memory grows and how far results drift from float64.

The gradients are those of a quadratic function whose minimum changes from batch to batch. A float64 run takes the same steps.
At the start of every window, each implementation gets the values of the float64 run, and at the end it is compared with that
run. The exit status is 1 if a bound is exceeded. The results are written to the file that docs/reliability.md shows.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import Parameter

from fastlars import LARS

from .performance import describe
from .results import FOLDER

LR = 20.0
IMPLEMENTATIONS = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
SHAPES, BATCHES = ((128, 100), (100,), (100,)), 16
WINDOW = 100  # steps between two comparisons
LARGEST_DRIFT = 1e-5  # in a window, relative to a tensor's norm
LARGEST_GROWTH = 8.0  # MiB of the process after the first tenth of the steps


class Run:
    """One optimizer and its own parameters."""

    def __init__(self, dtype: torch.dtype, **implementation: bool) -> None:
        torch.manual_seed(0)
        self.params = [Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
        self.minima = [[torch.randn(shape).to(dtype) for shape in SHAPES] for _ in range(BATCHES)]
        self.optimizer = LARS(self.params, lr=LR, momentum=0.9, weight_decay=1e-4, **implementation)

    def step(self, number: int, lr: float) -> None:
        for param, minimum in zip(self.params, self.minima[number % BATCHES], strict=True):
            param.grad = param.detach() - minimum
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()

    @torch.no_grad()
    def drift(self, truth: Run) -> float:
        """The largest relative difference of a parameter from `truth`, whose values it then takes."""
        pairs = list(zip(self.params, truth.params, strict=True))
        found = max(float((mine.double() - right).norm() / right.norm()) for mine, right in pairs)
        for mine, right in pairs:
            mine.copy_(right)
            self.optimizer.state[mine]["momentum_buffer"].copy_(truth.optimizer.state[right]["momentum_buffer"])
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_run", description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER / "long_run.md", metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # with small tensors, threads would wait for each other
    truth = Run(torch.float64, foreach=False)
    runs = {name: Run(torch.float32, **which) for name, which in IMPLEMENTATIONS.items()}
    drifts: dict[str, list[float]] = {name: [] for name in runs}
    memory: list[float] = []
    for number in range(options.steps):
        lr = LR * min(1.0, (number + 1) / (0.05 * options.steps)) * (1 - number / options.steps) ** 2
        for run in (truth, *runs.values()):
            run.step(number, lr)
        if (number + 1) % WINDOW == 0:
            for name, run in runs.items():
                drifts[name].append(run.drift(truth))
        if (number + 1) % (options.steps // 10) == 0:
            gc.collect()
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20)
    about, words = (
        describe(torch.device("cpu")),
        ", ".join(f"{name} {max(found):.1e}" for name, found in drifts.items()),
    )
    text = f"""\
- {options.steps:,} steps, torch {about["versions"]["torch"].split("+")[0]}, {about["date"]}
- Largest drift in {WINDOW} steps, of a tensor's norm: {words}
- Memory of the process: {memory[0]:.1f} MiB after the first tenth, {memory[-1]:.1f} MiB at the end
"""
    options.out.write_text(text, encoding="utf-8")
    print(text)
    steady = all(drift <= LARGEST_DRIFT for found in drifts.values() for drift in found)  # False for NaN
    return int(not steady or memory[-1] - memory[0] > LARGEST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
