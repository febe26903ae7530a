"""The demo: it runs, rejects unreadable files with one line, and gives every method the same search."""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

for module in ("sklearn", "matplotlib", "rich"):
    pytest.importorskip(module, reason="the demo has its own dependencies: group demo")


from rich.console import Console

from benchmarks import study
from benchmarks.demo import __main__ as program
from benchmarks.demo import outcome, training
from benchmarks.demo.data import FILES, IMAGES_MAGIC, LABELS_MAGIC, Cut, DataError, Dataset, idx_digits, read_idx
from benchmarks.demo.search import Grid, next_trials, search
from benchmarks.demo.training import METHODS, Method, Protocol, Result, Run

CUT = Cut(4096, 4096, 0.8, (32, 8, 2, 1), pool=2)


def idx(magic: int, shape: tuple[int, ...], values: bytes) -> bytes:
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + values


def images(count: int, height: int = 12, width: int = 8) -> bytes:
    return idx(IMAGES_MAGIC, (count, height, width), bytes(i % 251 for i in range(count * height * width)))


def labels(count: int) -> bytes:
    return idx(LABELS_MAGIC, (count,), bytes(i % 10 for i in range(count)))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small complete data set, with gzipped train files and plain test files."""
    for which, count in (("train", 200), ("test", 30)):
        for name, content in zip(FILES[which], (images(count), labels(count)), strict=True):
            zipped = which == "train"
            (tmp_path / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    return tmp_path


def test_idx_files_are_read_gzipped_or_not(directory: Path) -> None:
    dataset = idx_digits(directory, CUT)
    assert dataset.train.images.shape == (160, 1, 6, 4)
    assert dataset.batches == (5, 20, 80, 160)
    assert [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)] == [160, 40, 30]
    assert dataset.test.labels.tolist() == [i % 10 for i in range(30)]
    assert dataset.train.labels.bincount().tolist() == [16] * 10
    assert abs(dataset.train.images.mean()) < 1e-5 and abs(dataset.train.images.std() - 1) < 1e-3


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "found 0x"),
        (images(3)[:-1], "promises 304 bytes, found 303"),
        (labels(300), "must start with 0x00000803 (are images and labels swapped?), found 0x00000801"),
        (gzip.compress(images(3))[:-9], "found: Compressed file ended"),
        (None, "No such file"),
    ],
    ids=["empty", "truncated", "labels", "truncated gzip", "none"],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, content: bytes | None, found: str) -> None:
    path = tmp_path / "images"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_idx(path, IMAGES_MAGIC)
    assert str(error.value).startswith(str(path)) and found in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (study.main, ["--data", "{}"], "must hold a label for each of 30 images, found 29"),
        (program.main, ["--out", "{}/file/out"], "Not a directory"),
    ],
)
def test_bad_data_and_a_bad_folder_end_with_status_2_and_a_message(
    main: Callable[[list[str]], int], arguments: list[str], message: str, directory: Path, capsys: Any
) -> None:
    (directory / FILES["test"][1]).write_bytes(labels(29))
    (directory / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main([argument.format(directory) for argument in arguments])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "") and message in err


METHOD = Method("SGD", bias_lr=None, first_lr=1.0)


def peaks_at(peak: dict[Method, float]) -> Callable[[list[Run]], list[Result]]:
    """A stand-in for training: accuracy falls with the distance, in octaves, from each method's best lr."""
    return lambda runs: [Result(r, 90 - abs(r.lr / peak[r.method] - peak[r.method] / r.lr), 0.0, 0.0) for r in runs]


def test_a_best_lr_on_the_edge_moves_the_grid_and_all_get_as_many_trials() -> None:
    other = replace(METHOD, optimizer="LARS")
    grids = search([METHOD, other], [32], Protocol(first_trials=3), peaks_at({METHOD: 1 / 32, other: 32.0}))
    sgd, lars = grids[32, METHOD], grids[32, other]
    assert (sgd.best_lr, lars.best_lr) == (1 / 32, 32.0) and sgd.is_inside and lars.is_inside
    # 1/2, 1, 2, then 4 to 64 or 1/4 to 1/64, then a half-step to either side
    assert len(sgd.trials) == len(lars.trials) == 3 + 5 + 2
    grid = search([METHOD], [32], Protocol(first_trials=3, most_trials=5), peaks_at({METHOD: 2.0**20}))[32, METHOD]
    assert len(grid.trials) == 5 + 2 and not grid.is_inside, "it stops growing"


def test_equal_accuracies_are_told_apart_by_the_loss() -> None:
    run = Run(METHOD, 32, 1.0, 100)
    grid = Grid(1.0, {k: [Result(run, 98.0, loss, 0.0)] for k, loss in ((-2, 0.3), (0, 0.1), (2, float("inf")))})
    assert grid.best == 0
    assert next_trials([grid], Protocol(first_trials=3)) == [[-1, 1]]


def test_the_search_and_the_runs_are_written_and_read_again(directory: Path, tmp_path: Path) -> None:
    """Everything is real except the processes: training runs in this one."""

    def here(runs: list[Run], protocol: Protocol, dataset: Dataset, finished: Callable[[Result], None]) -> list[Result]:
        results = [training.train(run, protocol, dataset) for run in runs]
        for result in results:
            finished(result)
        return results

    protocol = Protocol(2, 1, first_trials=3, most_trials=3, search_seeds=(100,), test_seeds=(0, 1))
    dataset = replace(idx_digits(directory, CUT), batches=(80, 160))
    screen = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "train_all", here)
        program.demo(dataset, protocol, tmp_path, Console(file=screen, width=100), searching=True)
        patch.setattr(program, "STORED", tmp_path / "lrs.csv")
        first = outcome.read(tmp_path / "runs.csv")
        program.demo(dataset, protocol, tmp_path, Console(file=screen, width=100), searching=False)
    again = outcome.read(tmp_path / "runs.csv")
    assert [{**row, "seconds": ""} for row in first] == [{**row, "seconds": ""} for row in again]
    assert {row["seed"] for row in again} == {"0", "1"} and len(again) == 2 * 3 * 2  # batches, rows, seeds
    searched = outcome.read(tmp_path / "lrs.csv")
    tried = {tuple(row[name] for name in ("batch", "optimizer", "bias_lr")) for row in searched}
    assert len(tried) == 2 * len(METHODS) and len(searched) == len(tried) * 5
    assert "did not train" in screen.getvalue() and "\x1b" not in screen.getvalue()
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
