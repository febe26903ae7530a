"""100,000 steps of a convex problem under each implementation: memory, time, and how far they drift from float64.

Least squares with mini-batches. A float64 run goes beside them; every window each implementation starts from its values and is compared
with it at the end. torch's SGD runs in turn and shows how fast the machine is at the time. This exits with 1 if a bound breaks. It
writes long_run.csv, a line a block, and long_run.md, which docs/reliability.md shows.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch.nn import Parameter

from fastlars import LARS

from .performance import describe
from .results import FOLDER

OPTIONS: dict[str, Any] = {"lr": 2.0, "momentum": 0.9, "weight_decay": 1e-4}
IMPLEMENTATIONS = {name: partial(LARS, **OPTIONS, foreach=name == "foreach") for name in ("single", "foreach")}
IMPLEMENTATIONS["fused"] = partial(LARS, **OPTIONS, fused=True)
YARDSTICK = "torch SGD"
INPUTS, HIDDEN, ROWS, BATCHES = 128, 100, 32, 16
WINDOW = 100  # steps between two comparisons
LARGEST_DRIFT = 1e-5  # of a tensor's norm, in a window
LARGEST_GROWTH = 8.0  # MiB of the process, after the first tenth
HEADER = """\
| implementation | processor time of a step, second tenth | last tenth | slowdown beside SGD | largest drift in 100 steps, of a tensor's norm |
| --- | --- | --- | --- | --- |"""
LARGEST_SLOWDOWN = 1.3  # of a step, in steps of torch's SGD, from the second tenth to the last


class Run:
    """One optimizer with parameters of its own. The model is x @ matrix + two shifts."""

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
        """The gradients of the mean square are written out, so that most of the time is the optimizer's."""
        matrix, *shifts = self.params
        batch = self.inputs[number % BATCHES]
        error = (batch @ matrix + sum(shifts) - self.targets[number % BATCHES]) / ROWS
        matrix.grad = batch.t() @ error
        for shift in shifts:
            shift.grad = error.sum(0)
        self.optimizer.param_groups[0]["lr"] = lr
        start = time.thread_time()  # processor time: the machine may have other work
        self.optimizer.step()
        self.microseconds.append((time.thread_time() - start) * 1e6)

    @torch.no_grad()
    def drift(self, truth: Run) -> float:
        """The largest difference of a parameter, relative to its norm. Then the values of `truth` are taken over."""
        pairs = list(zip(self.params, truth.params, strict=True))
        found = max(float((mine.double() - right).norm() / right.norm()) for mine, right in pairs)
        for mine, right in pairs:
            mine.copy_(right)
            self.optimizer.state[mine]["momentum_buffer"].copy_(truth.optimizer.state[right]["momentum_buffer"])
        return found


def block_by_block(steps: int) -> list[dict[str, Any]]:
    truth = Run(torch.float64, IMPLEMENTATIONS["single"])
    runs = {name: Run(torch.float32, make) for name, make in IMPLEMENTATIONS.items()}
    yardstick = Run(torch.float32, partial(torch.optim.SGD, momentum=OPTIONS["momentum"], foreach=False))
    length = max(WINDOW, steps // 100 // WINDOW * WINDOW)
    blocks: list[dict[str, Any]] = []
    for block in track(range(steps // length), "steps"):
        drifts = dict.fromkeys(runs, 0.0)
        for number in range(block * length, (block + 1) * length):
            lr = OPTIONS["lr"] * min(1.0, (number + 1) / (0.05 * steps)) * (1 - number / steps) ** 2
            for run in (truth, *runs.values()):
                run.step(number, lr)
            yardstick.step(number, lr / 100)  # of which SGD's steps are a good part of the way
            if (number + 1) % WINDOW == 0:
                drifts = {name: max(drifts[name], run.drift(truth)) for name, run in runs.items()}
        gc.collect()
        with torch.no_grad():
            loss = (truth.inputs @ truth.params[0] + sum(truth.params[1:]) - truth.targets).square().mean().item()
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
        row = {"step": (block + 1) * length, "loss": loss, "resident_mib": memory, "objects": len(gc.get_objects())}
        for name, run in runs.items():
            row |= {f"{name}_us": statistics.median(run.microseconds), f"{name}_drift": drifts[name]}
        row[f"{YARDSTICK}_us"] = statistics.median(yardstick.microseconds)
        for run in (truth, *runs.values(), yardstick):
            run.microseconds.clear()
        blocks.append(row)
    return blocks


def summary(blocks: list[dict[str, Any]], about: dict[str, Any]) -> tuple[str, list[str]]:
    """The table of the page, and what is beyond its bound."""
    tenth = max(1, len(blocks) // 10)
    early, late = blocks[tenth : 2 * tenth] or blocks, blocks[-tenth:]
    key = {name: [statistics.median(b[name] for b in part) for part in (early, late)] for name in blocks[0]}
    lines = [
        f"{blocks[-1]['step']:,} steps, one thread, torch {about['versions']['torch'].split('+')[0]},",
        f"load {about['load']} on {about['cores']} cores, {about['date']}.\n",
        HEADER,
    ]
    sgd = key[f"{YARDSTICK}_us"]
    (before, after), objects = key["resident_mib"], key["objects"]
    faults = [f"memory grew by {after - before:.1f} MiB"] if after - before > LARGEST_GROWTH else []
    for name in IMPLEMENTATIONS:
        first, last = key[f"{name}_us"]
        drift, slowdown = max(b[f"{name}_drift"] for b in blocks), last / first / (sgd[1] / sgd[0])
        lines.append(f"| {name} | {first:.0f} us | {last:.0f} us | {slowdown:.2f} | {drift:.1e} |")
        if not drift <= LARGEST_DRIFT:
            faults.append(f"{name} drifted by {drift:.1e} in {WINDOW} steps, more than {LARGEST_DRIFT:.0e}")
        if not slowdown <= LARGEST_SLOWDOWN:
            faults.append(f"{name} became slower, {slowdown:.2f} times what SGD did, more than {LARGEST_SLOWDOWN}")
    lines += [
        f"| {YARDSTICK} | {sgd[0]:.0f} us | {sgd[1]:.0f} us | | |\n",
        f"Memory of the process: {before:.1f} MiB in the second tenth, {after:.1f} MiB in the last.",
        f"Python's objects: {objects[0]:,.0f} and {objects[1]:,.0f}.",
        f"Mean square: {blocks[0]['loss']:.1f} after {blocks[0]['step']:,} steps, {blocks[-1]['loss']:.4f} at the end.\n",
    ]
    return "\n".join(lines), faults


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_run", description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, metavar="N", help="at least 1000 (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="(default: benchmarks/results)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # small tensors: threads would wait for each other, for milliseconds on a busy machine
    blocks = block_by_block(max(1000, options.steps))
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "long_run.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, blocks[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in b.items()} for b in blocks)
    text, faults = summary(blocks, describe(torch.device("cpu")))
    (options.out / "long_run.md").write_text(text, encoding="utf-8")
    print(text, *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
