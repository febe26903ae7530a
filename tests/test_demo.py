"""The demo: it runs, rejects unreadable files with one line, and gives every method the same search."""

import contextlib
import gzip
import io
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the demo has its own dependencies: group demo")

from rich.console import Console

from benchmarks import study
from benchmarks.demo import __main__ as program
from benchmarks.demo import outcome
from benchmarks.demo.data import FILES, IMAGES_MAGIC, LABELS_MAGIC, Cut, idx_digits
from benchmarks.demo.search import search
from benchmarks.demo.training import METHODS, Method, Protocol, Result, Run

CUT = Cut(4096, 4096, 0.8, (32, 8, 2, 1), pool=2)


def images(count: int) -> bytes:
    return struct.pack(">4I", IMAGES_MAGIC, count, 12, 8) + bytes(i % 251 for i in range(count * 12 * 8))


def labels(count: int) -> bytes:
    return struct.pack(">2I", LABELS_MAGIC, count) + bytes(i % 10 for i in range(count))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small complete data set, with gzipped images and plain labels."""
    for which, count in (("train", 200), ("test", 30)):
        (tmp_path / f"{FILES[which][0]}.gz").write_bytes(gzip.compress(images(count)))
        (tmp_path / FILES[which][1]).write_bytes(labels(count))
    return tmp_path


def test_idx_files_are_read_gzipped_or_not(directory: Path) -> None:
    dataset = idx_digits(directory, CUT)
    assert dataset.train.images.shape == (160, 1, 6, 4) and dataset.batches == (5, 20, 80, 160)
    assert [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)] == [160, 40, 30]
    assert dataset.test.labels.tolist() == [i % 10 for i in range(30)]
    assert dataset.train.labels.bincount().tolist() == [16] * 10
    assert abs(dataset.train.images.mean()) < 1e-5 and abs(dataset.train.images.std() - 1) < 1e-3


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (labels(30)[:-1], "promises 38 bytes, found 37"),
        (images(30), "must start with 0x00000801 (are images and labels swapped?), found 0x00000803"),
        (gzip.compress(labels(30))[:-9], "found: Compressed file ended"),
        (labels(29), "must hold a label for each of 30 images, found 29"),
    ],
    ids=["truncated", "images", "truncated gzip", "one label too few"],
)
def test_a_wrong_file_is_one_clear_line(content: bytes, found: str, directory: Path, capsys: Any) -> None:
    path = directory / FILES["test"][1]
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        study.main(["--data", str(directory), "--out", str(directory / "study.csv")])
    *_, line = capsys.readouterr().err.splitlines()
    assert f"error: {path}: " in line and found in line


def test_a_best_lr_on_the_edge_moves_the_grid_and_all_get_as_many_trials() -> None:
    """Training is replaced: accuracy falls with the distance from each optimizer's best lr."""
    peak = {"SGD": 1 / 32, "LARS": 32.0, "AdamW": 2.0**20}
    sgd, lars, adamw = (Method(optimizer, bias_lr=None, first_lr=1.0) for optimizer in peak)

    def train(runs: list[Run]) -> list[Result]:
        return [Result(run, -abs(run.lr - peak[run.method.optimizer]), 0.0, 0.0) for run in runs]

    found = search([sgd, lars], [32], Protocol(first_trials=3), train)
    # 1/2, 1, 2, then 4 to 64 or 1/4 to 1/64, then a half-step to either side
    for grid, best in ((found[32, sgd], 1 / 32), (found[32, lars], 32.0)):
        assert (grid.best_lr, grid.is_inside, len(grid.trials)) == (best, True, 3 + 5 + 2)
    grid = search([adamw], [32], Protocol(first_trials=3, most_trials=5), train)[32, adamw]
    assert len(grid.trials) == 5 + 2 and not grid.is_inside, "it stops growing"


def test_the_search_and_the_runs_are_written_and_read_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is real except the processes: joblib trains in this one."""
    monkeypatch.setattr("joblib.parallel_config", lambda *_, **options: contextlib.nullcontext())
    protocol = Protocol(2, 1, first_trials=3, most_trials=3, search_seeds=(100,), test_seeds=(0, 1))
    dataset, screen, runs = replace(idx_digits(directory, CUT), batches=(80, 160)), io.StringIO(), []
    for searching in (True, False):
        program.demo(dataset, protocol, directory, Console(file=screen, width=100), searching=searching)
        runs.append([{**row, "seconds": ""} for row in outcome.read(directory / "runs.csv")])
        monkeypatch.setattr(program, "STORED", directory / "lrs.csv")
    assert runs[0] == runs[1] and len(runs[0]) == 2 * 3 * 2  # batches, rows, seeds
    assert len(outcome.read(directory / "lrs.csv")) == 2 * len(METHODS) * 5
    assert "did not train" in screen.getvalue() and "\x1b" not in screen.getvalue()
    assert (directory / "demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
