"""Run by torchrun, from test_torchrun.py: the demo's distributed trainings, in which processes are killed at set places.

The argument is a JSON file with the data set's file, the command-line arguments of each mode, and the kills. torchrun starts
a new attempt after each kill. An attempt goes through all modes, and those that have finished end at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.demo import distributed

if TYPE_CHECKING:
    from ranks import Rank  # imported with pytest, which torchrun's processes need not import


def arm(place: str, step: int) -> None:
    """Kill this process at this place of this step of the next training."""
    now = 0
    resume, cross_entropy = distributed.resume, distributed.functional.cross_entropy
    write_data, rename = FileSystemWriter.write_data, Path.rename

    def kill(here: str) -> None:
        if (here, now) == (place, step):
            sys.stdout.write(f"attempt {attempt}: rank {rank} is killed {place}, step {step}\n")
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def counting_resume(*args: Any) -> int:
        nonlocal now
        now = resume(*args)
        return now

    def counting_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal now
        now += 1
        loss = cross_entropy(*args, **kwargs)
        loss.register_hook(lambda _: kill("in backward"))
        return loss

    def write_half(writer: FileSystemWriter, *args: Any, **kwargs: Any) -> Any:
        result = write_data(writer, *args, **kwargs)
        if now == step:
            file = Path(writer.path) / f"__{rank}_0.distcp"
            os.truncate(file, file.stat().st_size // 2)
            kill("in writing a checkpoint")
        return result

    def rename_later(path: Path, target: Path) -> Path:
        if path.name == "unfinished":
            kill("before renaming a checkpoint")
        return rename(path, target)

    distributed.resume = counting_resume
    distributed.functional.cross_entropy = counting_loss
    register_optimizer_step_pre_hook(lambda *_: kill("before the optimizer's step"))
    if place == "in writing a checkpoint":
        FileSystemWriter.write_data = write_half
    Path.rename = rename_later


def trains(_: Rank, folder: str, arguments: list[str]) -> None:
    """One of the demo's trainings, in a process of `ranks`, which starts faster than one of torchrun's."""
    dataset = torch.load(Path(folder) / "dataset", weights_only=False)
    distributed.train(dataset, distributed.parse(arguments), torch.device("cpu"))


def leaves_often() -> None:
    """Join a job of one process and leave it at once after an exchange, over and over."""
    for _ in range(30):
        device = distributed.start()
        for _ in range(3):
            torch.distributed.all_reduce(torch.ones((), device=device))
        distributed.stop(device)


class StoppedError(Exception):
    """On all ranks at once, unlike a killed rank."""


def stops_and_goes_on(rank: Rank, folder: str, arguments: list[str]) -> None:
    """Train twice, once stopped after step 6; in a process of `ranks`."""
    dataset = torch.load(Path(folder) / "dataset", weights_only=False)
    save = distributed.save

    def save_and_stop(folder: Path, step: int, training: distributed.Training) -> None:
        save(folder, step, training)
        if step == 6:
            raise StoppedError

    def train(name: str) -> None:
        options = distributed.parse([*arguments, "--checkpoint", str(Path(folder) / name)])
        distributed.train(dataset, options, torch.device("cpu"))

    train("whole")
    distributed.save = save_and_stop
    with contextlib.suppress(StoppedError):
        train("stopped")
    distributed.save = save
    train("stopped")


if __name__ == "__main__":
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    job = json.loads(Path(sys.argv[1]).read_text())
    dataset = torch.load(job["dataset"], weights_only=False)
    planned = job["kills"][attempt] if attempt < len(job["kills"]) else None
    device = distributed.start()
    for mode, arguments in job["trainings"].items():
        if planned is not None and (planned["mode"], planned["rank"]) == (mode, rank):
            arm(planned["place"], planned["step"])
        distributed.train(dataset, distributed.parse(arguments), device)
    distributed.stop(device)
