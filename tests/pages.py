"""The examples of the documentation's pages."""

from pathlib import Path

ROOT = Path(__file__).parent.parent


def examples(page: Path, language: str) -> str:
    """The fenced blocks of one language as one text. Other lines are blank, so line numbers match the page."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        lines.append(line if inside and line != "```" else "")
        inside = line == f"```{language}" or (inside and line != "```")
    return "\n".join(lines).rstrip()
