"""Measure what docs/performance.md shows, contenders interleaved, into benchmarks/results: `nox -s performance`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from . import machine
from .measuring import measure, parameters, synchronize
from .models import train_once, training
from .optimizers import ADAPTED, CONTENDERS, LOOP, YARDSTICK, groups_of, title
from .rounds import Clock, Copy, Results, Row, interleave, save
from .shapes import MODELS

FOLDER = Path(__file__).parent / "results"
TRAINERS = (YARDSTICK, "fastlars-fused", "fastlars-foreach", LOOP)


def step_time(options: argparse.Namespace, names: list[str], clock: Clock) -> Iterator[list[Row]]:
    """The step alone, on the shapes of real models: with their usual param groups, and with every tensor adapted."""
    copy = Copy(clock.device)
    for model in options.models:
        params = parameters(MODELS[model].shapes(), clock.device)
        for adapted in ADAPTED:
            case = MODELS[model].title + (", weights adapted" if adapted == "weights" else "")
            yield measure(case, params, adapted, names, clock, copy, rounds=options.rounds, seconds=options.seconds)


def training_step(options: argparse.Namespace, names: list[str], clock: Clock) -> Iterator[list[Row]]:
    """Forward, backward, optimizer and zero_grad; small images on a CPU, so that the optimizer's share can be seen."""
    image, batches = (224, (16, 64, 256)) if clock.device.type == "cuda" else (32, (8,))
    for batch in batches:
        params, loss = training(batch, image, clock.device)
        loss().backward()  # what torch loads for any model and any optimizer is nobody's first step
        torch.optim.SGD(params, lr=0.0).step()
        rows, steps = [], {}
        for name in (name for name in names if name in TRAINERS):
            optimizer = CONTENDERS[name].make(groups_of(params, "weights"))
            synchronize(clock.device)
            begun = time.perf_counter()
            optimizer.step()
            synchronize(clock.device)
            first = (time.perf_counter() - begun) * 1e3
            case = f"ResNet-50, batch {batch}, {image} pixels, weights adapted"
            rows.append(Row(case, name, len(params), sum(map(torch.numel, params)), [], first_step_ms=first))
            steps[name] = partial(train_once, optimizer, loss)
        times = interleave(steps, clock, options.rounds, options.seconds)
        yield [replace(row, ms=times[row.contender]) for row in rows]


BENCHMARKS = {function.__name__: function for function in (step_time, training_step)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.performance", description=__doc__)
    parser.add_argument("benchmarks", nargs="*", metavar="NAME", help=f"of: {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=31, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=25.0, metavar="S", help="for the rounds of one case")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="(default: benchmarks/results)")
    options = parser.parse_args(arguments)
    if unknown := set(options.benchmarks) - BENCHMARKS.keys():
        parser.error(f"benchmarks must be of {', '.join(BENCHMARKS)}, got {', '.join(sorted(unknown))}")
    clock, console = Clock(torch.device(options.device)), Console(highlight=False, markup=False)
    reasons = {name: CONTENDERS[name].missing() for name in options.only}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    for name, reason in skipped.items():
        console.print(f"skipped: {name}: {reason}", soft_wrap=True)
    for benchmark in options.benchmarks or BENCHMARKS:
        settings = {"rounds": options.rounds, "seconds": options.seconds}
        results = Results(benchmark, machine.describe(clock.device), settings, skipped=skipped)
        for rows in BENCHMARKS[benchmark](options, [name for name in options.only if name not in skipped], clock):
            results.rows += rows
            for row in rows:
                ratio = results.relative(row, YARDSTICK)
                beside = "" if ratio is None else f", {ratio:.2f} times {title(YARDSTICK)}"
                console.print(f"{row.case}: {title(row.contender)} {row.median:.3g} ms{beside}", soft_wrap=True)
        if results.rows:
            save(results, options.out / f"{benchmark}-{options.device}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
