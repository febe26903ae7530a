"""The tables of docs/dialects.md, from DIALECTS. `python tests/dialects_table.py` writes them into the page."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastlars.dialects import ABOUT, DIALECTS
from fastlars.options import Options

PAGE = Path(__file__).parent.parent / "docs" / "dialects.md"
BEGIN = "<!-- written by tests/dialects_table.py from src/fastlars/dialects.py; edit that -->"
END = "<!-- end -->"


def rows(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    lines = [list(header), ["---"] * len(list(header)), *map(list, body)]
    # `|` would end the cell
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def ratio(o: Options) -> str:
    norms = "|g + decay w|" if o.trust_denominator == "joint" else "(|g| + decay |w| + eps)"
    value = (
        f"{o.trust_coefficient:g} |w| / {norms.replace('eps', f'{o.eps:g}') if o.eps else norms.replace(' + eps', '')}"
    )
    return f"min({value} / lr, 1)" if o.trust_clip else value


def adapted(o: Options) -> str:
    return "all" if o.adapt else "where weight_decay is not 0"


def zero_norm(o: Options) -> str:
    return "g + decay w" if o.trust_denominator == "joint" else "g"


def momentum(o: Options) -> str:
    buffer, param = ("v = m v + lr d", "w -= v") if o.lr_in_momentum else ("v = m v + d", "w -= lr v")
    return f"`{buffer}`<br>`{param}`"


def written(options: dict[str, Any]) -> str:
    return ", ".join(f"`{key}={value!r}`" for key, value in options.items()) or "none: the default"


def tables() -> str:
    of = {name: Options(0.0)._replace(**options) for name, options in DIALECTS.items()}
    whose = rows(
        ("dialect", "the LARS of", "options"),
        ((f"`{name}`", ABOUT[name].used_by, written(options)) for name, options in DIALECTS.items()),
    )
    what = rows(
        ("dialect", "trust ratio", "d if a norm is 0", "momentum and step", "adapted unless the group says otherwise"),
        ((f"`{name}`", f"`{ratio(o)}`", f"`{zero_norm(o)}`", momentum(o), adapted(o)) for name, o in of.items()),
    )
    sources = "\n".join(
        line
        for name, about in ABOUT.items()
        for line in (f"- `{name}`: {about.source}.", *(f"    - {text}." for text in about.differs.values()))
    )
    return f"{whose}\n\n## What each computes\n\n{what}\n\n## Sources, and how their code differs\n\n{sources}"


def page() -> str:
    """The page with these tables in it."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
