"""The pages of docs/frameworks: each runs from top to bottom as a program, before its tests look at the results.

These files run only in the nox session `frameworks`, with one environment per framework. The suite does not collect them.
"""

import runpy
from pathlib import Path
from typing import Any

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "frameworks"


@pytest.fixture(scope="module")
def blocks(request: pytest.FixtureRequest) -> list[str]:
    """The Python of the module's page, with each block at its line number on the page."""
    page = PAGES / f"{request.path.stem.removeprefix('test_')}.md"
    found, block = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines()):
        if line == "```python":
            found.append("\n" * (number + 1))
        elif block and line != "```":
            found[-1] += line + "\n"
        block = line == "```python" or (block and line != "```")
    assert found, f"{page.name} shows no Python"
    return found


@pytest.fixture(scope="module")
def page(blocks: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The names that the page defines. Tracebacks show the page's line numbers."""
    program = ""
    for block in blocks:
        program += block[program.count("\n") :]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        Path("page.py").write_text(program, encoding="utf-8")
        yield runpy.run_path("page.py")
