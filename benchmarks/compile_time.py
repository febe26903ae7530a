"""How long `torch.compile(optimizer.step)` takes to come to rest: cold, beside torch's SGD of the same implementation.

Each sample is a process of its own with empty caches, and counts the first two steps: torch's SGD makes its momentum buffers in
the first and compiles again for the second. Run from the repository root, then `python -m benchmarks.render`.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import machine
from .commandline import FOLDER
from .optimizers import CONTENDERS
from .results import Results, Row, save
from .shapes import MODELS, Shape
from .tables import console

FUSED = ("sgd-fused", "fastlars-fused")
FOREACH = ("sgd-foreach", "fastlars-foreach")
CASES: dict[str, tuple[list[Shape], tuple[str, ...]]] = {
    "100 tensors of 32x32": ([(32, 32)] * 100, FUSED),
    "1000 tensors of 32x32": ([(32, 32)] * 1000, FUSED),
    MODELS["resnet50"].title: (MODELS["resnet50"].shapes(), FUSED + FOREACH),
}
_SAMPLE = "from benchmarks.compile_time import first_steps; first_steps({case!r}, {contender!r})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    parser.add_argument("--out", type=Path, default=FOLDER / "compile_time-cpu.json", metavar="FILE.json")
    options = parser.parse_args(arguments)
    results = Results("compile_time", machine.describe(torch.device("cpu")), {"rounds": options.rounds})
    screen = console()
    for case in options.cases:
        shapes, contenders = CASES[case]
        samples: dict[str, list[float]] = {contender: [] for contender in contenders}
        for _ in range(options.rounds):
            for contender in contenders:
                samples[contender].append(_in_a_process(case, contender))
        for contender, ms in samples.items():
            row = Row(case, contender, len(shapes), sum(map(math.prod, shapes)), ms)
            results.rows.append(row)
            screen.print(f"{case}, {contender}: {row.median / 1e3:.3g} s")
    save(results, options.out)
    return 0


def _in_a_process(case: str, contender: str) -> float:
    """Milliseconds of the first two compiled steps, with caches that are empty and thrown away."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        command = [sys.executable, "-W", "ignore", "-c", _SAMPLE.format(case=case, contender=contender)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def first_steps(case: str, contender: str) -> None:
    """Print their milliseconds: what `_in_a_process` runs."""
    params = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in CASES[case][0]]
    for param in params:
        param.grad = torch.randn_like(param)
    step = torch.compile(CONTENDERS[contender].make(params).step)
    start = time.perf_counter()
    step()
    step()
    print((time.perf_counter() - start) * 1e3)


if __name__ == "__main__":
    sys.exit(main())
