"""Draw docs/bytes.svg, what each float32 step reads and writes: `python -m benchmarks.passes`.

The operations are data here; a test holds them to what `counting.py` counts of the running steps.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

PICTURE = Path(__file__).parent.parent / "docs" / "bytes.svg"
NORMS = (
    "w>",
    "g>",
)  # each operation: what it reads > what it writes. w: parameter, g: gradient, v: buffer, d: temporary


class Row(NamedTuple):
    """A step: its operations in their order."""

    label: str
    operations: tuple[str, ...]
    remark: str = ""

    @property
    def bytes(self) -> int:
        """A float32 parameter's share, with nothing in a cache."""
        return 4 * sum(len(operation) - 1 for operation in self.operations)


ROWS = (
    Row("torch SGD(fused=True)", ("wgv>wv",)),
    Row("fastlars fused", (*NORMS, "wgv>wv"), "20 where a cache serves the second read"),
    Row("fastlars foreach, single", (*NORMS, "v>v", "gv>v", "wv>v", "wv>w")),
    Row("LARS as a loop of PyTorch operations", (*NORMS, "wg>d", "d>d", "v>v", "dv>v", "wv>w")),
)
BOX, GAP, ROW, LEFT = 26, 7, 66, 4
WIDTH = LEFT + max(BOX * row.bytes // 4 + GAP * len(row.operations) for row in ROWS)
COLOURS = {"norm": ("#E69F00", "#000"), "read": ("#9AD0F2", "#000"), "write": ("#0072B2", "#fff")}
ALTERNATIVE = "Bytes a float32 parameter: " + "; ".join(
    f"{row.label} {row.bytes}" + (f" ({row.remark})" if row.remark else "") for row in ROWS
)


def draw() -> str:
    """The picture, to stand in a page whose text colour it takes."""
    height = ROW * len(ROWS) + 26
    style = f"display:block;width:100%;max-width:{WIDTH * 5 // 4}px;margin:1em 0"
    lines = [
        f'<svg role="img" aria-labelledby="bytes-title" viewBox="0 0 {WIDTH} {height}" style="{style}"',
        '  font-family="sans-serif" font-size="13" xmlns="http://www.w3.org/2000/svg">',
        f'<title id="bytes-title">{escape(ALTERNATIVE)}.</title>',
    ]
    for i, row in enumerate(ROWS):
        top = ROW * i
        remark = f'<tspan font-weight="normal"> bytes{escape("; " + row.remark if row.remark else "")}</tspan>'
        lines.append(
            f'<text x="{LEFT}" y="{top + 15}" fill="currentColor">{escape(row.label)}: '
            f'<tspan font-weight="bold">{row.bytes}</tspan>{remark}</text>'
        )
        x = LEFT
        for operation in row.operations:
            read, write = operation.split(">")
            for name, kind in [(name, "read" if write else "norm") for name in read] + [
                (name, "write") for name in write
            ]:
                lines += _box(x, top + 23, kind, name)
                x += BOX
            x += GAP
    x = LEFT
    for kind, text in (("norm", "read for a norm"), ("read", "read"), ("write", "written")):
        lines += _box(x, height - 22, kind, "", size=14)
        lines.append(f'<text x="{x + 20}" y="{height - 10}" fill="currentColor">{text}</text>')
        x += 50 + 7 * len(text)
    return "\n".join([*lines, "</svg>", ""])


def _box(x: int, y: int, kind: str, name: str, size: int = BOX) -> list[str]:
    fill, ink = COLOURS[kind]
    box = f'<rect x="{x}" y="{y}" width="{size - 2}" height="{size - 2}" rx="3" fill="{fill}"/>'
    text = f'<text x="{x + size // 2 - 1}" y="{y + 17}" text-anchor="middle" fill="{ink}">{name}</text>'
    return [box, text] if name else [box]


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
