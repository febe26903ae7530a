"""Stored results (raw samples and counts), and the medians, ratios, bandwidths and tables that are computed from them."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .optimizers import YARDSTICK, title

FOLDER = Path(__file__).parent / "results"
COPY, READ = "copy", "read"  # the rows that measure the bandwidth of copying and of reading, one each in each case
FLOOR = 20  # bytes per float32 parameter to read p, g and v and to write p and v
TWO_PASSES = 28  # bytes if p and g are read once more, for the norms


@dataclass
class Row:
    """One optimizer in one case. `ms` has one number per round, and all rows of a case share their rounds."""

    case: str
    contender: str
    tensors: int
    elements: int
    ms: list[float]
    bytes_moved: int | None = None  # by one step; None if they cannot be counted
    launches: int | None = None  # on a GPU
    host_reads: int | None = None  # copies from a GPU to the host, each of which waits for the device
    host_us: float | None = None  # on a GPU, microseconds until a step returns
    writes_grad: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def gb_s(self) -> float | None:
        return None if self.bytes_moved is None else self.bytes_moved / self.median / 1e6

    @property
    def bytes_per_parameter(self) -> float | None:
        return None if self.bytes_moved is None else self.bytes_moved / self.elements


@dataclass
class Results:
    """One run of `performance`."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # optimizer -> reason

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(row.case for row in self.rows))

    def of_case(self, case: str) -> list[Row]:
        """The rows of the optimizers, without the rows of the copy and the read."""
        return [row for row in self.rows if row.case == case and row.contender not in (COPY, READ)]

    def find(self, case: str, contender: str) -> Row | None:
        return next((row for row in self.rows if (row.case, row.contender) == (case, contender)), None)

    def ratio(self, case: str, contender: str, to: str) -> float | None:
        """The median over the rounds of an optimizer's time divided by another's in the same round."""
        row = self.find(case, contender)
        return None if row is None else self.relative(row, to)

    def relative(self, row: Row, to: str) -> float | None:
        """Like `ratio`, for a row."""
        other = self.find(row.case, to)
        return None if other is None else statistics.median(a / b for a, b in zip(row.ms, other.ms, strict=True))

    def and_a_read(self, case: str, contender: str) -> Row | None:
        """An optimizer's row, plus the time to read parameters and gradients once more, at the bandwidth of each round."""
        row, read = self.find(case, contender), self.find(case, READ)
        if row is None or read is None or row.bytes_moved is None or read.bytes_moved is None:
            return None
        more = row.bytes_moved * (TWO_PASSES - FLOOR) // FLOOR
        ms = [step + more / read.bytes_moved * whole for step, whole in zip(row.ms, read.ms, strict=True)]
        return replace(row, ms=ms, bytes_moved=row.bytes_moved + more)


def save(results: Results, path: Path) -> None:
    content = asdict(results)
    rows = content.pop("rows")
    for row in rows:
        row["ms"] = [float(f"{value:.5g}") for value in row["ms"]]
    # one line per row, because people read the file in diffs
    head = json.dumps(content, indent=1)
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "rows": [\n{body}\n ]\n}}\n', encoding="utf-8")


def load(path: Path) -> Results:
    content = json.loads(path.read_text(encoding="utf-8"))
    return Results(**{**content, "rows": [Row(**row) for row in content["rows"]]})


def fingerprint(*numbers: object) -> str:
    """Stored in a picture to identify the numbers it was drawn from, so that a test can detect a stale one."""
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]


def number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


COLUMNS: dict[str, Callable[[Results, Row], str]] = {
    "optimizer": lambda _, row: title(row.contender) + (r" \*" if row.writes_grad else ""),
    "bytes/param": lambda _, row: number(row.bytes_per_parameter, ".1f"),
    "ms": lambda _, row: number(row.median, ".3g" if row.median < 100 else ".0f"),
    "GB/s": lambda _, row: number(row.gb_s, ".1f"),
    "x SGD fused": lambda results, row: number(results.relative(row, YARDSTICK)),
    "launches": lambda _, row: number(row.launches, "d"),
    "host reads": lambda _, row: number(row.host_reads, "d"),
    "host us": lambda _, row: number(row.host_us, ".0f"),
}


def table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Lines of a Markdown table. The columns after the first hold numbers."""
    yield "| " + " | ".join(header) + " |"
    yield "| " + " | ".join(["---", *["---:"] * (len(header) - 1)]) + " |"
    yield from ("| " + " | ".join(row) + " |" for row in rows)
    yield ""


def case_table(results: Results, case: str) -> Iterator[str]:
    """The table of a case, without columns that are empty."""
    rows = results.of_case(case)
    if (more := results.and_a_read(case, YARDSTICK)) is not None:
        place = [row.contender for row in rows].index(YARDSTICK) + 1
        rows.insert(place, replace(more, contender=f"{title(YARDSTICK)} and one more read"))
    bandwidths = [(name, row) for name in (COPY, READ) if (row := results.find(case, name)) is not None]
    about = f"{case}: {rows[0].tensors:,} tensors, {rows[0].elements / 1e6:,.1f} M parameters"
    about += "".join(f", {name} {number(row.gb_s, '.1f')} GB/s" for name, row in bandwidths)
    yield f"**{about}, {len(rows[0].ms)} rounds**\n"
    texts = {header: [text(results, row) for row in rows] for header, text in COLUMNS.items()}
    filled = {header: column for header, column in texts.items() if any(column)}
    yield from table(list(filled), [list(row) for row in zip(*filled.values(), strict=True)])
