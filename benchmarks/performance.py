"""Measure steps with all contenders interleaved, into benchmarks/results: `nox -s performance` makes the page from it."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import Parameter

from .counting import bytes_moved, host_microseconds, launches_and_host_reads
from .optimizers import ADAPTED, CONTENDERS, PEERS, YARDSTICK, Contender, groups_of, title
from .rounds import COPY, READ, Clock, Copy, Results, Row, Step, interleave, save
from .shapes import MODELS, Shape

FOLDER = Path(__file__).parent / "results"
REAL = ", weights adapted"  # how a case ends in which LARS leaves biases and norms alone, as users have it
PACKAGES = ("torch", "fastlars", "numpy", "triton", *PEERS)


def parameters(shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Parameters of these shapes with gradients, the same every time."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        values = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2)]
        param = Parameter(values[0].mul_(0.02))
        param.grad = values[1].mul_(1e-3)
        params.append(param)
    return params


def measure(
    case: str,
    params: Sequence[Parameter],
    adapted: str,
    names: Sequence[str],
    clock: Clock,
    copy: Copy,
    **length: Any,
) -> list[Row]:
    """A row for each contender, one for the copy and one for the read.

    All contenders step the same parameters and gradients, except that a peer gets gradients of its own.
    `adapted` is one of ADAPTED, `names` are of CONTENDERS, `length` is `rounds` and `seconds` of `interleave`.
    """
    rows: list[Row] = []
    steps: dict[str, Step] = {}
    for name in names:
        row, steps[name] = _warm_up(CONTENDERS[name], params, adapted, case, clock.device)
        rows.append(row)
    times = interleave(steps, clock, **length, copy=copy)
    rows = [replace(row, ms=times[row.contender]) for row in rows]
    elements = sum(p.numel() for p in params)
    bandwidths = {COPY: Copy.bytes_moved, READ: Copy.bytes_read}
    return [*rows, *(Row(case, name, len(params), elements, times[name], moved) for name, moved in bandwidths.items())]


def _warm_up(
    contender: Contender, params: Sequence[Parameter], adapted: str, case: str, device: torch.device
) -> tuple[Row, Step]:
    """The first steps, on which everything but time is counted."""
    if contender.package:  # a peer may write to its gradients
        params = [_with_own_grad(param) for param in params]
    versions = [param.grad._version for param in params]
    step = contender.stepper(groups_of(params, adapted))
    step()
    synchronize(device)
    writes_grad = versions != [param.grad._version for param in params]
    elements = sum(p.numel() for p in params)
    # neither a Triton kernel nor compiled code is made of operations that can be counted
    moved = None if contender.compiled else bytes_moved(step)
    if device.type == "cuda" and contender.fused_bytes is not None:
        moved = contender.fused_bytes * elements * params[0].itemsize // 4
    launches, host_reads = launches_and_host_reads(step, device)
    row = Row(
        *(case, contender.name, len(params), elements, [], moved, launches, host_reads),
        *(host_microseconds(step, device), writes_grad),
    )
    return row, step


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _with_own_grad(param: Parameter) -> Parameter:
    """A parameter in the same memory, with a copy of the gradient."""
    own = Parameter(param.detach())
    own.grad = None if param.grad is None else param.grad.clone()
    return own


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, versions and date; `load` is how busy the machine was when the run began."""
    installed = {package.name.lower().replace("-", "_"): package.version for package in distributions()}
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device.type,
        "device_name": _cpu_name(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: installed[package] for package in PACKAGES if package in installed},
        "commit": _commit(),
    }
    if device.type == "cuda":
        facts |= {"device_name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's commit, with a + if files that git tracks have changed since."""
    answers = []
    for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        answers.append(done.stdout.strip())
    return (answers[0] or "unknown") + ("+" if answers[1] else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.performance", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=31, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=25.0, metavar="S", help="for the rounds of one case")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="(default: benchmarks/results)")
    options = parser.parse_args(arguments)
    length = {"rounds": options.rounds, "seconds": options.seconds}
    device, console = torch.device(options.device), Console(highlight=False, markup=False, soft_wrap=True)
    clock, copy = Clock(device), Copy(device)
    reasons = {name: CONTENDERS[name].missing() for name in options.only}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    console.print(*(f"skipped: {reason}" for reason in skipped.values()), sep="\n")
    names = [name for name in options.only if name not in skipped]
    results = Results("step_time", describe(device), length, skipped=skipped)
    for model in options.models:
        params = parameters(MODELS[model].shapes(), device)
        for adapted in ADAPTED:
            case = MODELS[model].title + (REAL if adapted == "weights" else "")
            rows = measure(case, params, adapted, names, clock, copy, **length)
            results.rows += rows
            for row in rows:
                ratio = results.relative(row, YARDSTICK)
                beside = "" if ratio is None else f", {ratio:.2f} times {title(YARDSTICK)}"
                console.print(f"{case}: {title(row.contender)} {row.median:.3g} ms{beside}")
    save(results, options.out / f"step_time-{options.device}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
