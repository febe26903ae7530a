"""Time the steps of all optimizers interleaved, and store the results. `nox -s performance` also updates the page."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from .counting import bytes_moved, host_microseconds, launches_and_host_reads
from .optimizers import ADAPTED, CONTENDERS, PEERS, Contender, groups_of
from .results import FOLDER, Results, Row, case_table, save
from .rounds import COPY_ELEMENTS, Clock, Step, interleave, synchronize, yardsticks
from .shapes import MODELS, Shape

REAL = ", weights adapted"  # the end of a case's name if LARS does not adapt biases and norms, as in real use
PACKAGES = ("torch", "fastlars", "numpy", "triton", *PEERS)


def parameters(shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Parameters of these shapes with gradients, the same every time."""
    torch.manual_seed(0)
    params = []
    for shape in shapes:
        values = [torch.randn(shape, device=device).to(dtype) for _ in range(2)]
        params.append(Parameter(values[0].mul_(0.02)))
        params[-1].grad = values[1].mul_(1e-3)
    return params


def warm_up(
    contender: Contender, params: Sequence[Parameter], adapted: str, case: str, device: torch.device
) -> tuple[Row, Step]:
    """Take the first steps, and count everything but time."""
    if contender.package:  # other packages may write to gradients, so they get copies; their parameters share memory
        own = [Parameter(param.detach()) for param in params]
        for mine, param in zip(own, params, strict=True):
            mine.grad = param.grad.clone()
        params = own
    versions = [param.grad._version for param in params]
    step = contender.stepper(groups_of(params, adapted))
    step()
    synchronize(device)
    row = Row(case, contender.name, len(params), sum(p.numel() for p in params), [])
    row.writes_grad = versions != [param.grad._version for param in params]
    if device.type == "cuda" and contender.fused_bytes is not None:
        row.bytes_moved = contender.fused_bytes * row.elements * params[0].itemsize // 4
    elif not contender.compiled:  # the operations of Triton kernels and of compiled code cannot be counted
        row.bytes_moved = bytes_moved(step)
    row.launches, row.host_reads = launches_and_host_reads(step, device)
    row.host_us = host_microseconds(step, device)
    return row, step


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, versions and date. `load` is the machine's load average when the run began."""
    installed = {package.name.lower().replace("-", "_"): package.version for package in distributions()}
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.exists() else None
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device.type,
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: installed[package] for package in PACKAGES if package in installed},
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
    }
    if device.type == "cuda":
        facts |= {"device_name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def _git(*command: str) -> str:
    """The output of a git command in this checkout, or empty if there is no git or no checkout."""
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.performance", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--adapted", nargs="+", choices=ADAPTED, default=ADAPTED, metavar="WHAT")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=25.0, metavar="S", help="for the rounds of one case")
    parser.add_argument("--device", choices=["cpu", "cuda", "vulkan"], default="cpu", help="(default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="with tiny tensors, whose times mean nothing")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="(default: benchmarks/results)")
    options = parser.parse_args(arguments)
    if options.out == FOLDER and (options.rehearse or options.dtype != "float32"):
        parser.error("--rehearse and --dtype need --out: the page shows what lies in benchmarks/results")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit status 1 if an optimizer failed. Optimizers that are not installed are left out."""
    options = parse(arguments)
    if options.device == "vulkan":
        import torchvulkan  # noqa: PLC0415, F401  it registers the device
    device = torch.device(options.device)
    clock, bandwidth = Clock(device), yardsticks(device, 64 if options.rehearse else COPY_ELEMENTS)
    skipped = {name: "not installed" for name in options.only if CONTENDERS[name].is_missing}
    results, failed = Results(describe(device), {"seconds": options.seconds}, skipped=skipped), False
    print(results.machine, *(f"{name} is not installed" for name in skipped), sep="\n")
    for model in options.models:
        shapes = MODELS[model].shapes()
        if options.rehearse:
            shapes = [tuple(min(size, 8) for size in shape) for shape in shapes]
        params = parameters(shapes, device, getattr(torch, options.dtype))
        for adapted in options.adapted:
            case = MODELS[model].title + (REAL if adapted == "weights" else "")
            rows, steps = [], {}
            for name in (name for name in options.only if name not in results.skipped):
                try:
                    row, steps[name] = warm_up(CONTENDERS[name], params, adapted, case, device)
                    rows.append(row)
                except Exception as error:  # noqa: BLE001  the others still run
                    results.skipped[name] = f"{case}: {type(error).__name__}: {error}"
                    print(f"{name} failed, {results.skipped[name]}")
                    failed = True
            for name, (step, moved) in bandwidth.items():
                rows.append(Row(case, name, len(params), sum(p.numel() for p in params), [], moved))
                steps[name] = step
            times = interleave(steps, clock, options.seconds)
            for row in rows:
                row.ms = times[row.contender]
            results.rows += rows
            save(results, options.out / f"step_time-{options.device}.json")
            print(*case_table(results, case), sep="\n", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
