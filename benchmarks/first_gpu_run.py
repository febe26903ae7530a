"""One run that tells whether fastlars is right and fast on a GPU: the CUDA tests, then step times, launches and host time.

    python -m benchmarks.first_gpu_run

Run it from the root of a checkout, in an environment with torch 2.11 or later and the Triton that comes with it. If fastlars
is not installed there, `src` of the checkout is used. pytest and numpy are needed for the tests alone: without them the
measurements still run. It takes 8 minutes at most.

Each part runs in a process of its own with a time limit, so a crash or a hang ends that part only. What a part had found
until then is kept. Two files are written, `report.txt` to read and `report.json` with every sample.

`--device cpu` and `--device vulkan` rehearse the same program on small tensors, on a machine without a GPU. On a busy machine
`--minutes 20` gives the parts more time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MINUTES = 8.0
CONTENDERS = ("sgd-fused", "sgd-foreach", "fastlars-fused", "fastlars-foreach", "quadra-loop")
COMPILED = ("sgd-fused", "fastlars-compiled")
MODELS = ("resnet50", "vit_b", "vit_l")
DTYPES = ("float32", "bfloat16")
KEPT = 4000  # characters of the output of a part that failed
Data = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """What one process does, and for how many of the seconds of a run of `MINUTES` at most."""

    name: str
    seconds: float
    run: Callable[[str], Iterator[Data]]  # device -> what it finds, piece by piece

    @property
    def is_case(self) -> bool:
        return self.name.startswith(("step: ", "compiled: "))


@dataclass
class Outcome:
    """What came of a part. `result` is "passed", "failed", "timed out" or "not run"."""

    name: str
    result: str
    seconds: float = 0.0
    reason: str = ""
    found: Data = field(default_factory=dict)


# ---------------------------------------------------------------- the parts, each in its own process
def describe(device: str) -> Iterator[Data]:
    """The machine and its versions; whether Triton compiles and launches one of our kernels."""
    import torch  # noqa: PLC0415  the first process needs no torch

    import fastlars  # noqa: PLC0415

    yield {"torch": torch.__version__, "python": sys.version.split()[0], "fastlars": fastlars.__version__}
    yield {"fastlars is installed": "site-packages" in str(fastlars.__file__)}
    where = open_device(device)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(where)
        yield {"device": properties.name, "memory GiB": round(properties.total_memory / 2**30, 1)}
        yield {"capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
    else:
        yield {"device": device}
    if importlib.util.find_spec("triton"):
        import triton  # noqa: PLC0415

        yield {"triton": triton.__version__}
    param = torch.nn.Parameter(torch.ones(1000, device=where))
    for name, options in {"default": {}, "fused=True": {"fused": True}}.items():
        try:
            param.grad = torch.ones_like(param)
            begun = time.perf_counter()
            optimizer = fastlars.LARS([param], lr=1.0, momentum=0.9, adapt=True, **options)
            optimizer.step()
            float(param[0])
            shown = repr(optimizer).splitlines()[1].rpartition(", ")[2]
            yield {f"first step, {name}": f"{shown}, {time.perf_counter() - begun:.1f} s"}
        except Exception as error:  # noqa: BLE001  whatever it is, the report has to say it
            yield {f"first step, {name}": f"{type(error).__name__}: {error}"}


def run_tests(device: str) -> Iterator[Data]:
    """The tests under the device's mark; on a CPU one file, to rehearse."""
    missing = [name for name in ("pytest", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        raise NotRunError(f"{' and '.join(missing)} not installed here; pip install {' '.join(missing)}")
    files = [
        str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if f"mark.{device}" in file.read_text("utf-8")
    ]
    selected = [*files, str(ROOT / "tests" / "test_devices.py"), "-m", device]
    if device == "cpu":
        selected = [str(ROOT / "tests" / "test_reference.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    process = subprocess.Popen(
        [*command, "--tb=short", "--maxfail=30", *dict.fromkeys(selected)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:  # line by line, so that a part that is stopped has said how far it came
        lines.append(line.rstrip())
        yield {"output": "\n".join(lines)[-10 * KEPT :]}
    failed = process.wait()
    yield {"summary": next((line.strip("= ") for line in reversed(lines) if line.strip("= ")), "")}
    if failed:
        raise RuntimeError(f"pytest ended with {failed}")


def bandwidth(device: str) -> Iterator[Data]:
    """What the device copies and reads, in GB/s; a step is compared with it."""
    from .rounds import COPY, READ, Clock, Copy, interleave  # noqa: PLC0415

    where = open_device(device)
    copy = Copy(where)
    steps = {COPY: synchronized(copy, where), READ: synchronized(copy.read, where)}
    ms = interleave(steps, Clock(where), rounds=31, seconds=5.0)
    yield {"copy GB/s": round(copy.bytes_moved / statistics.median(ms[COPY]) / 1e6, 1)}
    yield {"read GB/s": round(copy.bytes_read / statistics.median(ms[READ]) / 1e6, 1), "ms": ms}


def steps_of(model: str, dtype: str, names: Sequence[str]) -> Callable[[str], Iterator[Data]]:
    """All contenders on the tensors of a model. One that fails is left out, and said."""

    def run(device: str) -> Iterator[Data]:
        import torch  # noqa: PLC0415

        from .counting import launches_and_host_reads  # noqa: PLC0415
        from .optimizers import CONTENDERS as CANDIDATES  # noqa: PLC0415
        from .optimizers import groups_of  # noqa: PLC0415
        from .rounds import Clock, interleave  # noqa: PLC0415
        from .shapes import MODELS as SHAPES  # noqa: PLC0415

        where = open_device(device)
        shapes = SHAPES[model].shapes()
        if device != "cuda":  # to rehearse
            shapes = [tuple(min(size, 8) for size in shape) for shape in shapes]
        params = []
        for shape in shapes:
            params.append(torch.nn.Parameter(torch.randn(shape, device=where).mul_(0.02).to(getattr(torch, dtype))))
            params[-1].grad = torch.randn(shape, device=where).mul_(1e-3).to(getattr(torch, dtype))
        elements = sum(param.numel() for param in params)
        yield {"model": model, "dtype": dtype, "tensors": len(params), "elements": elements}
        steps: dict[str, Callable[[], object]] = {}
        rows: dict[str, Data] = {name: {} for name in names}
        for name in names:
            try:
                begun = time.perf_counter()
                step = CANDIDATES[name].stepper(groups_of(params, "all"))
                synchronized(step, where)()
                rows[name]["first step s"] = round(time.perf_counter() - begun, 3)
                synchronized(step, where)()  # makes what is kept from step to step
                rows[name]["host us"] = host_microseconds(step, where)
                rows[name]["launches"], rows[name]["host reads"] = launches_and_host_reads(step, where)
                steps[name] = synchronized(step, where)
            except Exception as error:  # noqa: BLE001  the others still run
                rows[name]["error"] = f"{type(error).__name__}: {error}"[:KEPT]
            yield {"rows": rows}
        for name, ms in interleave(steps, Clock(where), rounds=31, seconds=8.0).items():
            rows[name]["ms"] = [float(f"{value:.5g}") for value in ms]
        yield {"rows": rows}
        if errors := [name for name in names if "error" in rows[name]]:
            raise RuntimeError(f"these did not run: {', '.join(errors)}")

    return run


def open_device(device: str) -> Any:
    """The device, which a package of its own may have to register first."""
    import torch  # noqa: PLC0415

    if device == "vulkan":
        import torchvulkan  # noqa: PLC0415, F401
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no NVIDIA GPU here")
    return torch.device(device)


def synchronized(step: Callable[[], object], device: Any) -> Callable[[], object]:
    """`step`, and for devices that `Clock` times by the wall, the wait for it."""
    import torch  # noqa: PLC0415

    if device.type == "cpu":
        return step

    def whole() -> None:
        step()
        getattr(torch, device.type).synchronize()

    return whole if device.type != "cuda" else step


def host_microseconds(step: Callable[[], object], device: Any) -> float:
    """Until a step returns while the device is idle, median of 21."""
    import torch  # noqa: PLC0415

    samples = []
    for _ in range(21):
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        begun = time.perf_counter()
        step()
        samples.append((time.perf_counter() - begun) * 1e6)
    return round(statistics.median(samples), 1)


class NotRunError(Exception):
    """A part cannot run here; the message says why, and the way out."""


# Their limits add up to more than the whole run may take: a part also ends when the run's time is up. Few parts need theirs.
PARTS = [
    Part("machine", 60, describe),
    Part("bandwidth", 30, bandwidth),
    Part("tests", 180, run_tests),
    *(Part(f"step: {model}, float32", 45, steps_of(model, "float32", CONTENDERS)) for model in MODELS),
    *(Part(f"step: {model}, bfloat16", 40, steps_of(model, "bfloat16", CONTENDERS)) for model in MODELS),
    *(
        Part(f"compiled: {model}, {dtype}", 90, steps_of(model, dtype, COMPILED))
        for dtype in DTYPES
        for model in MODELS
    ),
]


# ---------------------------------------------------------------- the process that starts them
def start(part: Part, device: str, limit: float, folder: Path) -> Outcome:
    """Run a part in a process of its own, and end it, with all that it started, after `limit` seconds."""
    if limit < 5:
        return Outcome(part.name, "not run", reason="the time of the whole run was up")
    found, output = folder / "found.json", folder / "output.txt"
    found.unlink(missing_ok=True)
    environment = dict(os.environ)
    if importlib.util.find_spec("fastlars") is None:
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        )
    command = [
        sys.executable,
        "-m",
        "benchmarks.first_gpu_run",
        "--device",
        device,
        "--part",
        part.name,
        "--to",
        str(found),
    ]
    begun = time.monotonic()
    with output.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    outcome = Outcome(part.name, "passed", round(time.monotonic() - begun, 1), found=_read(found))
    outcome.reason = outcome.found.pop("reason", "")
    if code is None:
        outcome.result, outcome.reason = "timed out", f"stopped after {limit:.0f} s"
    elif code == NOT_RUN:
        outcome.result = "not run"
    elif code != 0:
        said = output.read_text(encoding="utf-8", errors="replace").strip()
        outcome.result = "failed"
        outcome.reason = outcome.reason or f"ended with {code}: {said[-KEPT:]}"
    return outcome


NOT_RUN = 3  # exit status


def _read(found: Path) -> Data:
    return json.loads(found.read_text(encoding="utf-8")) if found.exists() else {}  # type: ignore[no-any-return]


def run_part(part: Part, device: str, to: Path) -> int:
    """In the process of a part: write what it finds after each piece, so that a kill loses little."""
    data: Data = {}

    def write() -> None:
        partial = to.with_suffix(".part")
        partial.write_text(json.dumps(data), encoding="utf-8")
        partial.replace(to)

    try:
        for piece in part.run(device):
            data |= piece
            write()
    except NotRunError as reason:
        data["reason"] = str(reason)
        write()
        return NOT_RUN
    except Exception as error:  # noqa: BLE001  whatever it is, the report has to say it
        traceback.print_exc()
        data["reason"] = f"{type(error).__name__}: {error}"[:KEPT]
        write()
        return 1
    return 0


# ---------------------------------------------------------------- the report
def report(device: str, outcomes: Sequence[Outcome]) -> str:
    """Everything that a reader needs first, as text."""
    lines = [f"fastlars, first run on {device}", ""]
    if device != "cuda":
        lines += ["A rehearsal on small tensors: the times mean nothing.", ""]
    for outcome in outcomes:
        reason = outcome.reason.strip().splitlines()
        lines.append(
            f"{outcome.result:>9}  {outcome.seconds:6.1f} s  {outcome.name}" + (f": {reason[-1]}" if reason else "")
        )
    for outcome in outcomes:
        if outcome.name in ("machine", "bandwidth"):
            lines += ["", outcome.name, *(f"  {key}: {value}" for key, value in outcome.found.items() if key != "ms")]
        elif outcome.name == "tests":
            lines += ["", "tests", f"  {outcome.found.get('summary', 'no summary: the tests did not finish')}"]
            said = outcome.found.get("output", "").splitlines()
            lines += [f"  {line}" for line in said if line.startswith(("FAILED", "ERROR"))]
            if outcome.result == "timed out":
                lines += [f"  {line}" for line in said[-5:]]
        elif "rows" in outcome.found:
            lines += ["", *_table(outcome)]
    return "\n".join(lines) + "\n"


def _table(outcome: Outcome) -> list[str]:
    rows = outcome.found["rows"]
    times = {name: row["ms"] for name, row in rows.items() if "ms" in row}
    lines = [f"{outcome.name}: {outcome.found['tensors']} tensors, {outcome.found['elements']:,} elements"]
    lines.append(f"  {'':<18}{'ms':>9}{'x SGD':>8}{'launches':>10}{'reads':>7}{'host us':>10}{'first s':>9}")
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"  {name:<18}{row['error'].splitlines()[0][:100]}")
            continue
        ms = times.get(name)
        ratio = (
            statistics.median(a / b for a, b in zip(ms, times["sgd-fused"], strict=True))
            if ms and "sgd-fused" in times
            else None
        )
        cells = [
            (statistics.median(ms) if ms else None, 9, ".3f"),
            (ratio, 8, ".2f"),
            (row.get("launches"), 10, "d"),
            (row.get("host reads"), 7, "d"),
            (row.get("host us"), 10, ".0f"),
            (row.get("first step s"), 9, ".2f"),
        ]
        lines.append(f"  {name:<18}" + "".join(_cell(*cell) for cell in cells))
    return lines


def _cell(value: float | None, width: int, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if every part passed, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_gpu_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu", "vulkan"], default="cuda", help="(default: %(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help="for the whole run, which the parts share (default: %(default)s)",
    )
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts whose names begin so (default: all)")
    parser.add_argument(
        "--out", type=Path, default=Path("first_gpu_run"), metavar="FOLDER", help="(default: %(default)s)"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        return run_part(next(part for part in PARTS if part.name == options.part), options.device, options.to)

    end = time.monotonic() + 60 * options.minutes
    outcomes: list[Outcome] = []
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            if options.only and not part.name.startswith(tuple(options.only)):
                continue
            limit = min(part.seconds * options.minutes / MINUTES, end - time.monotonic())
            outcomes.append(start(part, options.device, limit, Path(folder)))
            print(f"{outcomes[-1].result}: {part.name}, {outcomes[-1].seconds:.0f} s", flush=True)
            # after each part: the run itself may be stopped
            content = {"format": 1, "device": options.device, "parts": [asdict(outcome) for outcome in outcomes]}
            (options.out / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            (options.out / "report.txt").write_text(report(options.device, outcomes), encoding="utf-8")
    print(f"\n{report(options.device, outcomes)}\nWritten: report.txt and report.json in {options.out}")
    return 0 if all(outcome.result == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
