"""Cost against size: 10 to 10,000 tensors of 10 M elements together, and 100 tensors of 1 M to 500 M (CPU: 100 M) together."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from . import commandline
from .measuring import measure
from .optimizers import LOOP, OURS, YARDSTICK
from .results import SERIES
from .tables import STEP_NOTE, console, terminal_table
from .timing import Copy, Length, clock_for

CHOICE = (YARDSTICK, *OURS, LOOP)
TENSORS = (10, 100, 1000, 10_000)
FIXED_TOTAL = 10_000_000
ELEMENTS = (1_000_000, 10_000_000, 100_000_000, 500_000_000)
FIXED_COUNT = 100
LARGEST_ON_CPU = 100_000_000


def cases(series: str, device: str) -> list[tuple[str, int, int]]:
    """Name, tensors and elements."""
    if series == "tensors":
        pairs = [(tensors, FIXED_TOTAL) for tensors in TENSORS]
    else:
        largest = LARGEST_ON_CPU if device == "cpu" else max(ELEMENTS)
        pairs = [(FIXED_COUNT, elements) for elements in ELEMENTS if elements <= largest]
    return [(f"{series}: {tensors:,} of {elements // tensors:,}", tensors, elements) for tensors, elements in pairs]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = commandline.parser("scaling", __doc__, CHOICE, rounds=21)
    parser.set_defaults(seconds=12.0)
    parser.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES), help="(default: both)")
    options = parser.parse_args(arguments)
    device, screen = torch.device(options.device), console()
    results, names = commandline.begin("scaling", options, screen)
    clock, copy, length = clock_for(device), Copy(device), Length(options.rounds, options.seconds)
    for series in options.series:
        for case, tensors, elements in cases(series, options.device):
            shapes = [(elements // tensors,)] * tensors
            results.rows += measure(case, shapes, names, clock, copy, length, commandline.DTYPES[options.dtype])
            screen.print(terminal_table(results, case))
    screen.print(STEP_NOTE)
    commandline.end(results, options, screen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
