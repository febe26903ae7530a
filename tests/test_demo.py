"""The demo: it runs, refuses files it cannot read in one line, and gives every method the same search."""

from __future__ import annotations

import csv
import gzip
import struct
import subprocess
import sys
from pathlib import Path

import pytest

for module in ("sklearn", "matplotlib", "rich"):
    pytest.importorskip(module, reason="the demo has its own dependencies: group demo")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # benchmarks/ is no part of the package; it is run from the repository root

from benchmarks.demo.__main__ import main
from benchmarks.demo.data import FILES, IMAGES_MAGIC, LABELS_MAGIC, DataError, idx_digits, read_idx
from benchmarks.demo.search import Grid, next_trials, search
from benchmarks.demo.training import Method, Protocol, Result, Run

SGD, LARS = Method("SGD", bias_lr=None, first_lr=1.0), Method("LARS", bias_lr=None, first_lr=1.0)


def idx(magic: int, shape: tuple[int, ...], values: bytes) -> bytes:
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + values


def images(count: int, height: int = 12, width: int = 8) -> bytes:
    return idx(IMAGES_MAGIC, (count, height, width), bytes(i % 251 for i in range(count * height * width)))


def labels(count: int) -> bytes:
    return idx(LABELS_MAGIC, (count,), bytes(i % 10 for i in range(count)))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small whole data set; the train files gzipped, the test files not."""
    for which, count in (("train", 200), ("test", 30)):
        for kind, content in (("images", images(count)), ("labels", labels(count))):
            name = FILES[f"{which} {kind}"]
            if which == "train":
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (tmp_path / name).write_bytes(content)
    return tmp_path


def test_idx_files_are_read_gzipped_or_not(directory: Path) -> None:
    dataset = idx_digits(directory)
    assert dataset.train.images.shape == (160, 1, 12, 8)
    assert dataset.batches == (5, 20, 80, 160)
    assert [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)] == [160, 40, 30]
    assert dataset.test.labels.tolist() == [i % 10 for i in range(30)]
    assert dataset.train.labels.bincount().tolist() == [16] * 10


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "found 0"),
        (images(3)[:15], "found 15"),
        (images(3)[:-1], "promises 3 x 12 x 8 = 288 bytes, found 287"),
        (images(3) + b"x", "found 289"),
        (labels(300), "must start with 0x00000803 (unsigned bytes, dimensions: 3), found 0x00000801"),
        (idx(0x00000D03, (1, 2, 2), b"1234"), "found 0x00000d03"),
        (gzip.compress(images(3))[:-9], "gzip"),
        (gzip.compress(images(3))[:-4] + b"1234", "gzip"),
        (b"\x1f\x8bno gzip file", "gzip"),
    ],
    ids=["empty", "header", "truncated", "too long", "labels", "floats", "truncated gzip", "wrong length", "not gzip"],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_idx(path, IMAGES_MAGIC)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert found in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("test labels", labels(29), "found 29 labels for the 30 images"),
        ("test labels", idx(LABELS_MAGIC, (30,), b"\x0a" * 30), "labels must be 0 to 9, found 10"),
        ("test images", images(30, height=9), "found 12 x 8 and 9 x 8"),
        ("test images", idx(IMAGES_MAGIC, (30, 0, 8), b""), "must hold images"),
        ("train labels", idx(LABELS_MAGIC, (200,), bytes(200)), "found 0 of digit 1"),
        ("train images", idx(IMAGES_MAGIC, (200, 12, 8), bytes(200 * 12 * 8)), "only pixels of 0"),
        ("test labels", None, "must exist, also as"),
    ],
    ids=["counts", "label 10", "sizes", "no pixels", "a digit missing", "blank", "missing"],
)
def test_files_that_do_not_fit_together(directory: Path, name: str, content: bytes | None, found: str) -> None:
    path = directory / FILES[name]
    if content is None:
        path.unlink()
    else:
        path.with_name(f"{path.name}.gz").unlink(missing_ok=True)
        path.write_bytes(content)
    with pytest.raises(DataError, match=found) as error:
        idx_digits(directory)
    assert "\n" not in str(error.value)


def test_bad_data_ends_with_status_2_and_one_line(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = directory / FILES["test labels"]
    path.write_bytes(path.read_bytes()[:-1])
    for data in (directory, tmp_path / "nowhere"):
        assert main(["--data", str(data), "--out", str(tmp_path / "out")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"demo: {data}")
        assert err.count("\n") == 1


def test_an_output_directory_that_cannot_be_made_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def accuracy_peaks_at(peak: dict[Method, float], seen: list[Run]):  # type: ignore[no-untyped-def]
    """A stand-in for training: accuracy falls with the distance, in octaves, from each method's best lr."""

    def train(runs: list[Run]) -> list[Result]:
        seen.extend(runs)
        return [Result(r, 90 - abs(r.lr / peak[r.method] - peak[r.method] / r.lr), 0.0, 0.0) for r in runs]

    return train


def test_a_best_lr_on_the_edge_moves_the_grid_and_all_get_as_many_trials() -> None:
    protocol = Protocol(first_trials=3, most_trials=15, search_seeds=(100, 101))
    seen: list[Run] = []
    grids = search([SGD, LARS], [32, 64], protocol, accuracy_peaks_at({SGD: 1.0, LARS: 32.0}, seen))
    for batch in (32, 64):
        sgd, lars = grids[batch, SGD], grids[batch, LARS]
        assert (sgd.best_lr, lars.best_lr) == (1.0, 32.0)
        assert sgd.is_inside
        assert lars.is_inside
        # 1/2, 1, 2, then 4 to 64 for LARS, then a half-step to either side
        assert len(sgd.trials) == len(lars.trials) == 3 + 5 + 2
        assert {10 - 1, 10, 10 + 1} <= set(lars.trials)
    assert len(seen) == len(set(seen)) == 2 * 2 * 10 * 2


def test_the_grid_moves_down_as_well_and_refines_between_neighbours() -> None:
    grids = search([SGD], [32], Protocol(first_trials=3), accuracy_peaks_at({SGD: 2**-3.5}, []))
    assert grids[32, SGD].best_lr == pytest.approx(2**-3.5)
    assert grids[32, SGD].is_inside


def test_a_grid_stops_growing_and_says_that_its_best_is_on_the_edge() -> None:
    grids = search([SGD], [32], Protocol(first_trials=3, most_trials=5), accuracy_peaks_at({SGD: 2.0**20}, []))
    assert len(grids[32, SGD].trials) == 5 + 2
    assert not grids[32, SGD].is_inside


def test_equal_accuracies_are_told_apart_by_the_loss() -> None:
    run = Run(SGD, 32, 1.0, 100)
    grid = Grid(1.0, {k: [Result(run, 98.0, loss, 0.0)] for k, loss in ((-2, 0.3), (0, 0.1), (2, float("inf")))})
    assert grid.best == 0
    assert next_trials([grid], first=3, most=15) == [[-1, 1]]


def test_quick_run_writes_everything(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    command = [sys.executable, "-W", "error", "-m", "benchmarks.demo"]
    arguments = ["--quick", "--data", str(directory), "--out", str(out)]
    ended = subprocess.run(
        [*command, *arguments], check=False, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=300
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    assert "\x1b" not in ended.stdout  # no terminal: no control characters
    assert max(map(len, ended.stdout.splitlines())) <= 80 or str(out) in ended.stdout
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    with (out / "runs.csv").open(newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    final = [run for run in runs if run["phase"] == "final"]
    assert {run["split"] for run in final} == {"test"}
    assert {run["split"] for run in runs if run["phase"] == "search"} == {"validation"}
    assert {run["seed"] for run in final}.isdisjoint(run["seed"] for run in runs if run["phase"] == "search")
    assert len(final) == 2 * 4 * 2  # batches, methods, seeds
    assert all(0 <= float(run["accuracy_percent"]) <= 100 for run in runs)

    table = (out / "table.md").read_text(encoding="utf-8")
    assert table.count("\n| 80 | ") == table.count("\n| 160 | ") == 4
    assert "says nothing about the optimizers" in table
