"""Test fastlars on a GPU in one run, with the CUDA tests and with measurements of step time, launches and host time.

    python -m benchmarks.first_gpu_run

Run it from the root of a checkout, whose `src` it uses, in an environment with torch 2.11 or later and the Triton that comes
with it. Only the tests need pytest and numpy. Without them the measurements still run. The run takes 8 minutes at most.

Each part is a command with a time limit, so a crash or a hang ends only that part. Its output and results up to then are kept.
The run writes two files, `report.txt` to read and `report.json` with every sample.

`--device cpu` and `--device vulkan` rehearse the same commands on tiny tensors. `--minutes 20` helps on a busy machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MINUTES = 8.0
EAGER = ("sgd-fused", "sgd-foreach", "fastlars-fused", "fastlars-foreach", "quadra-loop")
COMPILED = ("sgd-fused", "fastlars-compiled")
MODELS = ("resnet50", "vit_b", "vit_l")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Part:
    """A Python command, and its share of a run of `MINUTES`, in seconds."""

    name: str
    seconds: float
    arguments: Sequence[str]


def parts(device: str) -> list[Part]:
    """The parts of a run. Those that give the quickest answers come first."""

    def steps(kind: str, seconds: float, model: str, dtype: str, contenders: Sequence[str]) -> Part:
        measure = ["-m", "benchmarks.performance", "--device", device, "--models", model, "--dtype", dtype]
        measure += ["--adapted", "weights", "--seconds", "3", "--only", *contenders]
        measure += [] if device == "cuda" else ["--rehearse"]
        return Part(f"{kind}: {model}, {dtype}", seconds, measure)

    files = [file for file in sorted((ROOT / "tests").glob("test_*.py")) if f"mark.{device}" in file.read_text("utf-8")]
    chosen = [*dict.fromkeys([*map(str, files), "tests/test_devices.py"]), "-m", device]
    if device == "cpu":  # a rehearsal runs one file
        chosen = ["tests/test_reference.py"]
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=30", "--continue-on-collection-errors"]
    cases = [(model, dtype) for dtype in DTYPES for model in MODELS]
    return [
        *(steps("steps", 18, *case, EAGER) for case in cases),
        Part("tests", 120, ["-m", "pytest", *options, *chosen]),
        *(steps("compiled", 45 if case[0] == "vit_l" else 40, *case, COMPILED) for case in cases),
    ]


def run(part: Part, limit: float, folder: Path) -> dict[str, Any]:
    """Run a part. After `limit` seconds, end it and all processes that it started."""
    outcome: dict[str, Any] = {"name": part.name, "result": "passed", "limit": round(limit, 1)}
    missing = [name for name in ("pytest", "numpy") if importlib.util.find_spec(name) is None]
    if "pytest" in part.arguments and missing:
        return outcome | {"result": "not run", "seconds": 0.0, "output": f"pip install {' '.join(missing)}"}
    arguments, output, begun = [*part.arguments], folder / "output.txt", time.monotonic()
    if "benchmarks.performance" in arguments:
        arguments += ["--out", str(folder)]
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with output.open("w", encoding="utf-8") as stream:
        how: dict[str, Any] = {"stdout": stream, "stderr": subprocess.STDOUT, "start_new_session": True}
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        process = subprocess.Popen([sys.executable, "-u", *arguments], cwd=ROOT, env=environment, **how)
        try:
            if process.wait(timeout=limit) != 0:
                outcome["result"] = "failed"
        except subprocess.TimeoutExpired:
            outcome["result"] = "timed out"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outcome["seconds"] = round(time.monotonic() - begun, 1)
    outcome["output"] = output.read_text(encoding="utf-8", errors="replace")
    outcome["measured"] = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]
    return outcome


def report(device: str, outcomes: Sequence[dict[str, Any]]) -> str:
    """The result of each part, then the end of each part's output."""
    lines = [f"fastlars, first run on {device}", ""]
    if device != "cuda":
        lines += ["A rehearsal on tiny tensors: the times mean nothing.", ""]
    for each in outcomes:
        lines.append(f"{each['result']:>9}  {each['seconds']:6.1f} of {each['limit']:5.1f} s  {each['name']}")
    for each in outcomes:
        lines += ["", f"==== {each['name']}: {each['result']}", *each["output"].splitlines()[-60:]]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if every part passed, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_gpu_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu", "vulkan"], default="cuda", help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for the whole run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("first_gpu_run"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[dict[str, Any]] = []
    end = time.monotonic()
    for part in parts(options.device):
        end += part.seconds * options.minutes / MINUTES  # the next part may use the time that is left
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(run(part, end - time.monotonic(), Path(folder)))
        print(f"{outcomes[-1]['result']}: {part.name}, {outcomes[-1]['seconds']:.0f} s", flush=True)
        # write the reports after each part, because the run itself may be stopped
        content = {"format": 2, "device": options.device, "parts": outcomes}
        (options.out / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (options.out / "report.txt").write_text(report(options.device, outcomes), encoding="utf-8")
    print(f"\n{report(options.device, outcomes)}\nWritten: report.txt and report.json in {options.out}")
    return 0 if all(outcome["result"] == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
