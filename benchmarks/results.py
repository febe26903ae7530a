"""What a run leaves behind: raw samples and counts. Medians, ratios and bandwidths are computed from them, never stored."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

FORMAT = 1
COPY, READ = "copy", "read"  # the rows that measure the bandwidth of copying and of reading, one each in each case
ELSEWHERE = "elsewhere"  # the folder of runs on hosts other than that of the page
SERIES = ("tensors", "elements")  # what grows in scaling.py; its cases are named "series: ..."
FLOOR = 20  # bytes a float32 parameter: read p, g, v; write p, v
TWO_PASSES = 28  # and p and g once more, for the norms


@dataclass
class Row:
    """One contender on one case. `ms` has one number a round; rounds of the rows of one case are the same rounds."""

    case: str
    contender: str
    tensors: int
    elements: int
    ms: list[float]
    bytes_moved: int | None = None  # by one step; None for a whole training step
    peak_extra_bytes: int | None = None  # held at most by one step beyond what it found
    launches: int | None = None  # on a GPU
    host_reads: int | None = None  # on a GPU: copies to the host, each of which waits for the device
    host_us: float | None = None  # on a GPU: microseconds until a step returns
    writes_grad: bool = False
    first_step_ms: float | None = None

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
    """One run of one benchmark."""

    benchmark: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # contender: why

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(row.case for row in self.rows))

    def of_case(self, case: str) -> list[Row]:
        """The contenders' rows; not those of the copy and the read."""
        return [row for row in self.rows if row.case == case and row.contender not in (COPY, READ)]

    def find(self, case: str, contender: str) -> Row | None:
        return next((row for row in self.rows if (row.case, row.contender) == (case, contender)), None)

    def ratio(self, case: str, contender: str, to: str) -> float | None:
        """The median, over the rounds, of a contender's time in units of another's in the same round."""
        row = self.find(case, contender)
        return None if row is None else self.relative(row, to)

    def relative(self, row: Row, to: str) -> float | None:
        """`ratio` of a row."""
        other = self.find(row.case, to)
        return None if other is None else statistics.median(a / b for a, b in zip(row.ms, other.ms, strict=True))

    def and_a_read(self, case: str, contender: str) -> Row | None:
        """A contender whose step is followed by another read of parameters and gradients, at the bandwidth of the round."""
        row, read = self.find(case, contender), self.find(case, READ)
        if row is None or read is None or row.bytes_moved is None or read.bytes_moved is None:
            return None
        more = row.bytes_moved * (TWO_PASSES - FLOOR) // FLOOR
        ms = [step + more / read.bytes_moved * whole for step, whole in zip(row.ms, read.ms, strict=True)]
        return replace(row, ms=ms, bytes_moved=row.bytes_moved + more)

    def share_of_copy(self, row: Row) -> float | None:
        copy = self.find(row.case, COPY)
        if copy is None or copy.gb_s is None or row.gb_s is None:
            return None
        return row.gb_s / copy.gb_s


def fingerprint(*numbers: object) -> str:
    """What a picture says of the numbers that it was drawn from, so that a test can tell an old one."""
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]


def save(results: Results, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, **asdict(results)}
    rows = content.pop("rows")
    for row in rows:
        row["ms"] = [float(f"{value:.5g}") for value in row["ms"]]
    # a line a row: the file is read in diffs
    head = json.dumps(content, indent=1)
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{head[:-2]},\n "rows": [\n{body}\n ]\n}}\n', encoding="utf-8")


def load(path: Path) -> Results:
    """Read what `save` wrote.

    Raises:
        ValueError: if the file is something else; the message is one line.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.pop("format")
        if found != FORMAT:
            raise ValueError(f"{path}: format must be {FORMAT}, got {found}; measure again")
        return Results(**{**content, "rows": [Row(**row) for row in content["rows"]]})
    except (OSError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: must be a result of this benchmark suite: {error}") from None


def load_all(folder: Path) -> list[Results]:
    return [load(path) for path in sorted(folder.glob("*.json"))]


def find(all_results: Iterable[Results], benchmark: str, device: str) -> Results | None:
    """The float32 run of a benchmark on a device."""
    for results in all_results:
        same = results.benchmark == benchmark and results.machine["device"] == device
        if same and results.settings.get("dtype", "float32") == "float32":
            return results
    return None
