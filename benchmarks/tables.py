"""Results as tables in the terminal; a pipe gets the same without colours, wide enough not to be cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .optimizers import CONTENDERS, OURS, YARDSTICK
from .results import COPY, READ, Results, Row

PIPE_WIDTH = 160


@dataclass(frozen=True)
class Column:
    """One column of a table of rows; empty text where there is nothing to say."""

    header: str
    text: Callable[[Results, Row], str]


def number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def mib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.1f}"


def title(contender: str) -> str:
    """As tables call it; a result may know names that this version does not."""
    return CONTENDERS[contender].title if contender in CONTENDERS else contender


def _title(_results: Results, row: Row) -> str:
    return title(row.contender) + (" *" if row.writes_grad else "")


STEP_COLUMNS = (
    Column("optimizer", _title),
    Column("bytes/param", lambda _, row: number(row.bytes_per_parameter, ".1f")),
    Column("ms", lambda _, row: number(row.median, ".3g" if row.median < 100 else ".0f")),
    Column("GB/s", lambda _, row: number(row.gb_s, ".1f")),
    Column("of copy", lambda results, row: percent(results.share_of_copy(row))),
    Column("x SGD fused", lambda results, row: number(results.relative(row, YARDSTICK))),
    Column("launches", lambda _, row: number(row.launches, "d")),
    Column("host reads", lambda _, row: number(row.host_reads, "d")),
    Column("host us", lambda _, row: number(row.host_us, ".0f")),
    Column("extra MiB", lambda _, row: mib(row.peak_extra_bytes)),
)
STEP_NOTE = (
    "bytes/param: read and written by the step's operations, nothing cached; floor 20, with norms 28 in float32. of copy: "
    "share of the bandwidth of a 256 MiB copy in the same rounds. x SGD fused: median of the ratios round by round. "
    "host us: until a step returns on an idle GPU. extra MiB: held at most by a step beyond what it found. *: writes to .grad. And one more read: the same, and the time in "
    "which parameters and gradients are read once more, as fast as torch.sum reads 256 MiB in that round."
)
TRAINING_COLUMNS = (
    Column("optimizer", _title),
    Column("ms a training step", lambda _, row: number(row.median, ".1f")),
    Column("x SGD fused", lambda results, row: number(results.ratio(row.case, row.contender, YARDSTICK), ".3f")),
    Column("very first step, s", lambda _, row: number((row.first_step_ms or 0) / 1e3, ".3f")),
)
TRAINING_NOTE = (
    "A training step is forward, backward, optimizer step and zero_grad. Very first step: the optimizer's alone, with what it "
    "makes, loads or compiles."
)


def filled(results: Results, rows: list[Row], columns: tuple[Column, ...]) -> list[tuple[str, list[str]]]:
    """Headers and texts of the columns in which there is something to say."""
    texts = [(column.header, [column.text(results, row) for row in rows]) for column in columns]
    return [(header, column) for header, column in texts if any(column)]


def heading(results: Results, case: str) -> str:
    row = results.of_case(case)[0]
    measured = [(name, results.find(case, name)) for name in (COPY, READ)]
    bandwidth = "".join(f", {name} {number(row.gb_s, '.1f')} GB/s" for name, row in measured if row is not None)
    return f"{case}: {row.tensors:,} tensors, {row.elements / 1e6:,.1f} M parameters{bandwidth}, {len(row.ms)} rounds"


def rows_of(results: Results, case: str) -> list[Row]:
    """The contenders, and after fused SGD what it and one more read of parameters and gradients take."""
    rows = results.of_case(case)
    more = results.and_a_read(case, YARDSTICK)
    if more is not None:
        place = [row.contender for row in rows].index(YARDSTICK) + 1
        rows.insert(place, replace(more, contender=f"{title(YARDSTICK)} and one more read"))
    return rows


def markdown(header: list[str], rows: list[list[str]], numbers: set[int]) -> Iterator[str]:
    """Lines of a table of a page; ``numbers`` are the columns that stand at the right."""
    yield "| " + " | ".join(header) + " |"
    yield "| " + " | ".join("---:" if i in numbers else "---" for i in range(len(header))) + " |"
    for row in rows:
        yield "| " + " | ".join(cell.replace("*", r"\*") for cell in row) + " |"
    yield ""


def terminal_table(results: Results, case: str, columns: tuple[Column, ...] = STEP_COLUMNS) -> Table:
    rows = rows_of(results, case)
    table = Table(box=box.SIMPLE, title=Text(heading(results, case)), title_justify="left")
    texts = filled(results, rows, columns)
    for i, (header, _) in enumerate(texts):
        table.add_column(header, justify="left" if i == 0 else "right", no_wrap=True)
    for i, row in enumerate(rows):
        table.add_row(*(column[i] for _, column in texts), style="bold" if row.contender in OURS else None)
    return table


def console() -> Console:
    screen = Console(highlight=False, markup=False)
    return screen if screen.is_terminal else Console(highlight=False, markup=False, width=PIPE_WIDTH)
