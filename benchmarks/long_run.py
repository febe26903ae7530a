"""100,000 steps of a convex problem under each implementation: memory, time, and how far they drift apart.

Least squares with mini-batches, a matrix that the fused step takes alone and small ones that it stacks. A float64 run stands
beside them; every window each implementation starts from its values, goes its own way, and is compared at the window's end.
So does torch's SGD, whose steps tell how fast the machine is at the time. Memory, drift and slowdown have bounds, beyond which
this exits with 1. Writes long_run.csv, a line a block, and long_run.md, which docs/reliability.md shows.
"""

from __future__ import annotations

import argparse
import csv
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import Parameter

from fastlars import LARS

from . import machine
from .commandline import FOLDER

IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
YARDSTICK = "torch SGD"
OPTIONS: dict[str, Any] = {"lr": 2.0, "momentum": 0.9, "weight_decay": 1e-4}
INPUTS, HIDDEN, ROWS, BATCHES = 128, 100, 32, 16
WINDOW = 100  # steps between two comparisons
LARGEST_DRIFT = 1e-5  # of a tensor's norm, in a window
LARGEST_GROWTH = 8.0  # MiB of the process, after the first tenth
LARGEST_SLOWDOWN = 1.3  # of a step, in steps of torch's SGD, from the second tenth to the last


class Run:
    """One optimizer with parameters of its own. The model is x @ matrix * scale + shift."""

    def __init__(self, dtype: torch.dtype, make: Callable[[list[Parameter]], torch.optim.Optimizer]) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(INPUTS, HIDDEN), (HIDDEN,), (HIDDEN,)]
        self.params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
        data = torch.randn(BATCHES, ROWS, INPUTS, generator=generator)
        truth = torch.randn(INPUTS, HIDDEN, generator=generator)
        noise = torch.randn(BATCHES, ROWS, HIDDEN, generator=generator)
        self.inputs, self.targets = data.to(dtype), (data @ truth + noise).to(dtype)
        self.optimizer = make(self.params)
        self.microseconds: list[float] = []

    @torch.no_grad()
    def step(self, number: int, lr: float) -> None:
        """The gradients of the mean square are written out: only the optimizer's part is to be timed, and it is most of it."""
        matrix, *shifts = self.params
        batch = self.inputs[number % BATCHES]
        error = (batch @ matrix + sum(shifts) - self.targets[number % BATCHES]) / ROWS
        matrix.grad = batch.t() @ error
        for shift in shifts:
            shift.grad = error.sum(0)
        self.optimizer.param_groups[0]["lr"] = lr
        # processor time: this program need not have the machine for itself
        start = time.thread_time()
        self.optimizer.step()
        self.microseconds.append((time.thread_time() - start) * 1e6)

    @torch.no_grad()
    def loss(self) -> float:
        matrix, *shifts = self.params
        return float((self.inputs @ matrix + sum(shifts) - self.targets).square().mean())

    def tensors(self) -> list[Tensor]:
        """Parameters, then momentum buffers."""
        buffers = [self.optimizer.state[param]["momentum_buffer"] for param in self.params]
        return [param.detach() for param in self.params] + buffers

    def drift(self, truth: Run) -> float:
        """The largest difference of a parameter, relative to its norm."""
        pairs = zip(self.params, truth.params, strict=True)
        return max(float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs)

    def align(self, truth: Run) -> None:
        for mine, right in zip(self.tensors(), truth.tensors(), strict=True):
            mine.copy_(right)


def resident_mib() -> float:
    """Of this process, now; its highest so far where the system does not tell."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_run", description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, metavar="N", help="at least 1000 (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="(default: benchmarks/results)")
    options = parser.parse_args(arguments)
    if options.steps < 1000:
        parser.error(f"--steps must be >= 1000, got {options.steps}")
    torch.set_num_threads(1)  # small tensors: threads would wait for each other, for milliseconds on a busy machine
    screen = Console()
    blocks = block_by_block(options.steps, screen)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "long_run.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, blocks[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in b.items()} for b in blocks)
    text, faults = summary(blocks)
    (options.out / "long_run.md").write_text(text, encoding="utf-8")
    screen.print(text)
    for fault in faults:
        screen.print(f"[bold red]{fault}")
    return 1 if faults else 0


def block_by_block(steps: int, screen: Console) -> list[dict[str, Any]]:
    truth = Run(torch.float64, lambda params: LARS(params, **OPTIONS, foreach=False))
    runs = {
        name: Run(torch.float32, partial(LARS, **OPTIONS, **implementation))
        for name, implementation in IMPLEMENTATIONS.items()
    }
    yardstick = Run(torch.float32, partial(torch.optim.SGD, momentum=OPTIONS["momentum"], foreach=False))
    length = max(WINDOW, steps // 100 // WINDOW * WINDOW)
    blocks: list[dict[str, Any]] = []
    for block in track(range(steps // length), "steps", console=screen, disable=not screen.is_terminal):
        drifts = dict.fromkeys(runs, 0.0)
        for number in range(block * length, (block + 1) * length):
            lr = OPTIONS["lr"] * min(1.0, (number + 1) / (0.05 * steps)) * (1 - number / steps) ** 2
            for run in (truth, *runs.values()):
                run.step(number, lr)
            yardstick.step(number, lr / 100)  # of which SGD's steps are a good part of the way
            if (number + 1) % WINDOW == 0:
                for name, run in runs.items():
                    drifts[name] = max(drifts[name], run.drift(truth))
                    run.align(truth)
        gc.collect()
        row: dict[str, Any] = {"step": (block + 1) * length, "loss": truth.loss(), "resident_mib": resident_mib()}
        row["objects"] = len(gc.get_objects())
        for name, run in runs.items():
            row |= {f"{name}_us": statistics.median(run.microseconds), f"{name}_drift": drifts[name]}
        row[f"{YARDSTICK}_us"] = statistics.median(yardstick.microseconds)
        for run in (truth, *runs.values(), yardstick):
            run.microseconds.clear()
        blocks.append(row)
    return blocks


def summary(blocks: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """The table of the page, and what is beyond its bound."""
    tenth = max(1, len(blocks) // 10)
    early, late = blocks[tenth : 2 * tenth] or blocks, blocks[-tenth:]

    def medians(key: str) -> tuple[float, float]:
        return statistics.median(b[key] for b in early), statistics.median(b[key] for b in late)

    about = machine.describe(torch.device("cpu"))
    lines = [
        f"{blocks[-1]['step']:,} steps, one thread, torch {about['versions']['torch'].split('+')[0]},",
        f"load {about['load']} on {about['cores']} cores, {about['date']}.",
        "",
        "| implementation | processor time of a step, second tenth | last tenth | slowdown beside SGD | largest drift in 100 steps, of a tensor's norm |",
        "| --- | --- | --- | --- | --- |",
    ]
    yardstick = medians(f"{YARDSTICK}_us")
    faults: list[str] = []
    for name in IMPLEMENTATIONS:
        first, last = medians(f"{name}_us")
        drift = max(b[f"{name}_drift"] for b in blocks)
        slowdown = last / first / (yardstick[1] / yardstick[0])
        lines.append(f"| {name} | {first:.0f} us | {last:.0f} us | {slowdown:.2f} | {drift:.1e} |")
        if not drift <= LARGEST_DRIFT:
            faults.append(f"{name} drifted by {drift:.1e} in {WINDOW} steps, more than {LARGEST_DRIFT:.0e}")
        if not slowdown <= LARGEST_SLOWDOWN:
            faults.append(f"{name} became slower, {slowdown:.2f} times what SGD did, more than {LARGEST_SLOWDOWN}")
    lines.append(f"| {YARDSTICK} | {yardstick[0]:.0f} us | {yardstick[1]:.0f} us | | |")
    (first, last), objects = medians("resident_mib"), medians("objects")
    lines += [
        "",
        f"Memory of the process: {first:.1f} MiB in the second tenth, {last:.1f} MiB in the last.",
        f"Python's objects: {objects[0]:,.0f} and {objects[1]:,.0f}.",
        f"Mean square: {blocks[0]['loss']:.1f} after {blocks[0]['step']:,} steps, {blocks[-1]['loss']:.4f} at the end.",
        "",
    ]
    if last - first > LARGEST_GROWTH:
        faults.append(f"memory grew by {last - first:.1f} MiB, more than {LARGEST_GROWTH:.0f}")
    return "\n".join(lines), faults


if __name__ == "__main__":
    sys.exit(main())
