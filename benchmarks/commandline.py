"""What the programs of this folder have in common: options, the beginning and the end of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from . import machine
from .optimizers import CONTENDERS, present
from .results import Results, save

FOLDER = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parser(module: str, description: str, contenders: tuple[str, ...], rounds: int) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=description)
    result.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=list(CONTENDERS),
        default=list(contenders),
        help=f"optimizers, of: {', '.join(CONTENDERS)} (default: {'all' if len(contenders) == len(CONTENDERS) else ', '.join(contenders)})",
    )
    result.add_argument("--rounds", type=_positive, default=rounds, metavar="N", help="at most (default: %(default)s)")
    result.add_argument(
        "--seconds",
        type=float,
        default=25.0,
        metavar="S",
        help="for the rounds of one case; slow cases make fewer rounds, at least 5 (default: %(default)s)",
    )
    result.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    result.add_argument("--dtype", choices=list(DTYPES), default="float32", help="(default: %(default)s)")
    result.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help=f"(default: benchmarks/results/{module}-DEVICE.json, with -DTYPE if not float32)",
    )
    return result


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {value}")
    return value


def begin(benchmark: str, options: argparse.Namespace, console: Console) -> tuple[Results, list[str]]:
    """Empty results, and who of those asked for can run."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"{benchmark}: --device cuda needs an NVIDIA GPU that this torch can use, found none")
    device = torch.device(options.device)
    settings = {"dtype": options.dtype, "rounds": options.rounds, "seconds": options.seconds}
    names, skipped = present(options.only)
    results = Results(benchmark, machine.describe(device), settings, skipped=skipped)
    console.print(machine.sentence(results.machine))
    for name, reason in skipped.items():
        console.print(f"skipped: {name}: {reason}")
    return results, names


def end(results: Results, options: argparse.Namespace, console: Console) -> None:
    suffix = "" if options.dtype == "float32" else f"-{options.dtype}"
    path = options.out or FOLDER / f"{results.benchmark}-{options.device}{suffix}.json"
    save(results, path)
    console.print(f"Written: {path if options.out else path.relative_to(FOLDER.parents[1])}", soft_wrap=True)
