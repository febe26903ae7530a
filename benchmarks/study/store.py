"""Every run in one CSV, a line each, written when the run ends: what a killed study goes on from, and what is rendered."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from benchmarks.demo.training import Protocol, Result, Run

from .methods import PROTOCOLS

# What a file holds runs of, alike in all lines: runs of another protocol, data set or torch are never mixed with them.
ORIGIN = ("protocol", "data", "train_images", "torch")
SETTINGS = (
    *("split", "images", "optimizer", "options", "clip", "bias_lr", "adapt_all", "batch_norm", "batch", "lr", "seed"),
    *("epochs", "warmup_epochs", "momentum", "weight_decay"),
)
OUTCOME = ("accuracy_percent", "loss", "seconds", "trust_ratios")
HEADER = (*ORIGIN, *SETTINGS, *OUTCOME)


class StoreError(Exception):
    """A store that cannot be gone on from, or lacks runs. The message says the way out."""


class Store:
    """Results by run, in memory and in a file.

    Args:
        path: The CSV; made with its folder at the first run.
        protocol: What all runs have in common.
        origin: What the runs of this study have under ORIGIN.
        images: How many the validation and the test split have.

    Raises:
        StoreError: If the file holds runs of another origin, or is no store.
    """

    def __init__(self, path: Path, protocol: Protocol, origin: Mapping[str, str], images: tuple[int, int]) -> None:
        self.path, self.protocol, self.images = path, protocol, images
        self._rows = {_settings_of(row): row for row in read(path)}
        self.origin = dict(origin)
        for row in self._rows.values():
            found = {name: row[name] for name in ORIGIN}
            if found != origin:
                different = ", ".join(f"{k} {found[k]} and not {origin[k]}" for k in ORIGIN if found[k] != origin[k])
                raise StoreError(f"{path}: holds runs of {different}; move it away or give another --out")

    @classmethod
    def recorded(cls, path: Path) -> Self:
        """The store as it lies there, of whatever origin; StoreError if it has no runs."""
        rows = read(path)
        if not rows:
            raise StoreError(f"{path}: holds no runs; train some")
        images = {row["split"]: int(row["images"]) for row in rows}
        origin = {name: rows[0][name] for name in ORIGIN}
        if origin["protocol"] not in PROTOCOLS:
            raise StoreError(f"{path}: holds runs of protocol {origin['protocol']}, which is not known here")
        return cls(path, PROTOCOLS[origin["protocol"]], origin, (images.get("validation", 0), images.get("test", 0)))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def seconds(self) -> float:
        return sum(float(row["seconds"]) for row in self._rows.values())

    def __contains__(self, run: Run) -> bool:
        return self._key(run) in self._rows

    def result(self, run: Run) -> Result:
        row = self._rows[self._key(run)]
        ratios = json.loads(row["trust_ratios"]) if row["trust_ratios"] else {}
        return Result(run, float(row["accuracy_percent"]), float(row["loss"]), float(row["seconds"]), ratios)

    def results(self, runs: Sequence[Run]) -> list[Result]:
        if missing := [run for run in runs if run not in self]:
            raise StoreError(f"{self.path}: lacks {len(missing)} of {len(runs)} runs, such as {missing[0]}; train them")
        return [self.result(run) for run in runs]

    def add(self, result: Result) -> None:
        """Append one line, which is on the disk when this returns: what a kill can lose is a run not yet ended."""
        ratios = {layer: [float(f"{ratio:.4g}") for ratio in values] for layer, values in result.trust_ratios.items()}
        outcome = (
            repr(result.accuracy),
            repr(result.loss),
            f"{result.seconds:.2f}",
            json.dumps(ratios, separators=(",", ":")) if ratios else "",
        )
        key = self._key(result.run)
        row = dict(zip(HEADER, (*(self.origin[name] for name in ORIGIN), *key, *outcome), strict=True))
        text = io.StringIO()
        writer = csv.DictWriter(text, HEADER, lineterminator="\n")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists() or not _whole_lines(self.path):
            self.path.write_bytes(b"")
            writer.writeheader()
        else:
            _drop_torn_line(self.path)
        writer.writerow(row)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())
        self._rows[key] = row

    def _key(self, run: Run) -> tuple[str, ...]:
        method, protocol = run.method, self.protocol
        values = (
            *("test" if run.final else "validation", self.images[run.final]),
            *(method.optimizer, json.dumps(dict(method.options)), method.clip, method.bias_lr),
            *(int(method.adapt_all), int(method.batch_norm), run.batch, run.lr, run.seed),
            *(protocol.epochs, protocol.warmup_epochs, protocol.momentum, protocol.weight_decay),
        )
        return tuple("" if value is None else str(value) for value in values)

    def only(self, used: Sequence[Run]) -> None:
        """Raise StoreError if there is a run that is not among those used."""
        if extra := self._rows.keys() - {self._key(run) for run in used}:
            raise StoreError(f"{self.path}: holds {len(extra)} runs that the protocol does not ask for: {min(extra)}")


def read(path: Path) -> list[dict[str, str]]:
    """The whole lines of a store; a last one that a kill cut off does not count. None where there is no file."""
    lines = _whole_lines(path) if path.exists() else b""
    reader = csv.DictReader(io.StringIO(lines.decode("utf-8"), newline=""))
    if lines and tuple(reader.fieldnames or ()) != HEADER:
        raise StoreError(f"{path}: is no store of this study, its first line differs; give another --out")
    return list(reader)


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _drop_torn_line(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(len(_whole_lines(path)))


def _settings_of(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in SETTINGS)
