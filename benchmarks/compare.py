"""Compare two runs of a benchmark: exit status 1 if one of ours has become slower than the margin allows, 2 if they do not compare.

Compared are ratios to the yardstick of the same run, so that a slower machine is no regression.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from .optimizers import OURS, YARDSTICK
from .results import Results, load
from .tables import console, title


@dataclass(frozen=True)
class Change:
    """A ratio to the yardstick, before and after."""

    case: str
    contender: str
    before: float
    after: float

    @property
    def relative(self) -> float:
        return self.after / self.before - 1


def changes(before: Results, after: Results) -> list[Change]:
    """Of our contenders, in the cases that both runs have."""
    found = []
    for case in after.cases:
        for contender in OURS:
            old, new = (results.ratio(case, contender, YARDSTICK) for results in (before, after))
            if old is not None and new is not None:
                found.append(Change(case, contender, old, new))
    return found


def why_not(before: Results, after: Results) -> str:
    """What makes two runs incomparable; empty if nothing does."""
    if before.benchmark != after.benchmark:
        return f"the runs must be of one benchmark, got {before.benchmark} and {after.benchmark}"
    for key in ("device", "device_name", "threads"):
        if before.machine[key] != after.machine[key]:
            return f"the runs must have the same {key}, got {before.machine[key]} and {after.machine[key]}"
    if before.settings.get("dtype") != after.settings.get("dtype"):
        return "the runs must have the same dtype"
    if not changes(before, after):
        return "the runs have no case in common in which fastlars and torch's fused SGD both ran"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    parser.add_argument(
        "--margin", type=float, default=10.0, metavar="PERCENT", help="slower by more is a regression (default: 10)"
    )
    options = parser.parse_args(arguments)
    try:
        before, after = load(options.before), load(options.after)
    except ValueError as error:
        return _fail(str(error))
    if reason := why_not(before, after):
        return _fail(reason)

    table = Table(
        box=box.SIMPLE, title=f"{after.benchmark}: times the time of {title(YARDSTICK)}", title_justify="left"
    )
    for header in ("case", "optimizer", "before", "after", "change", ""):
        table.add_column(header, justify="left" if header in {"case", "optimizer", ""} else "right", no_wrap=True)
    slower = []
    for change in changes(before, after):
        if 100 * change.relative > options.margin:
            slower.append(change)
        table.add_row(
            change.case,
            title(change.contender),
            f"{change.before:.2f}",
            f"{change.after:.2f}",
            f"{100 * change.relative:+.1f} %",
            "slower" if slower and slower[-1] is change else "",
        )
    screen = console()
    screen.print(table)
    screen.print(f"{len(slower)} slower by more than {options.margin:g} %")
    return 1 if slower else 0


def _fail(message: str) -> int:
    print(f"compare: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
