"""The examples of the documentation run: every docstring's, and each page's Python from top to bottom."""

import doctest
import inspect
import pkgutil
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlars
import pages
from fastlars.options import NAMES

MODULES = ["fastlars", *(f"fastlars.{module.name}" for module in pkgutil.iter_modules(fastlars.__path__))]
# docs/frameworks needs packages of its own, and has its own sessions
PAGES = [pages.ROOT / "README.md", *sorted((pages.ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, pages.ROOT / "CONTRIBUTING.md", *(pages.ROOT / "docs").glob("*/*.md")]


def read(*path: str) -> str:
    return pages.ROOT.joinpath(*path).read_text("utf-8")


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "fastlars.plots":
        pytest.importorskip("matplotlib", reason="an extra")
    module = pytest.importorskip(name)  # Triton is not everywhere
    monkeypatch.chdir(tmp_path)  # pictures are saved there
    monkeypatch.setenv("MPLBACKEND", "Agg")
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(module, extraglobs={"torch": torch, "fastlars": fastlars}):
        runner.run(test)
    assert runner.failures == 0, capsys.readouterr().out


def public_names() -> dict[str, Any]:
    """What `fastlars` and its public modules export, and what LARS adds to torch's Optimizer."""
    found: dict[str, Any] = {}
    for name in fastlars.__all__:
        value = getattr(fastlars, name)
        inside = value.__all__ if inspect.ismodule(value) else []
        found |= {f"{name}.{inner}": getattr(value, inner) for inner in inside} or {name: value}
    return found | {f"LARS.{name}": value for name, value in vars(fastlars.LARS).items() if name[0] != "_"}


@pytest.mark.parametrize(("name", "value"), public_names().items())
def test_a_public_name_is_documented(name: str, value: Any) -> None:
    """With every argument, return value and error, and an example, which runs above. The reference page shows it."""
    assert re.search(rf"\b{name.removeprefix('LARS.')}(?![\w.])", read("docs", "reference.md"))
    if isinstance(value, dict):
        return  # data, which Sphinx reads a comment of
    sections = re.split(r"^(Args|Returns|Raises|Example|Source):", inspect.getdoc(value) or "", flags=re.MULTILINE)
    contents = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert len(sections[0]) > 30 and "Raises" in contents and ">>> " in contents["Example"]
    signature = inspect.signature(value)
    left_out = {"self", *(NAMES[1:] if name == "lars" else ())}  # lars refers to LARS for its options
    for argument in signature.parameters.keys() - left_out:
        assert f"\n    {argument}: " in contents["Args"], argument
    assert ("Returns" in contents) == (signature.return_annotation not in ("None", None)) or inspect.isclass(value)


# torch's own warnings: scripting is deprecated, and from inside its compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page as one program, in which later blocks may use earlier ones. Errors show the page's line numbers."""
    program, session = pages.examples(page, "python"), pages.examples(page, "pycon")
    assert bool(program or session) == bool(re.search(r"^```py(thon|con)$", page.read_text("utf-8"), re.MULTILINE))
    for module in ("matplotlib", "tensorboard"):
        if module in program or (module == "matplotlib" and "fastlars.plots" in program):
            pytest.importorskip(module, reason="pages have their own dependencies: group pages")
    if "torch.jit.script" in program and sys.version_info >= (3, 14):
        pytest.skip("TorchScript does not support this Python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    Path("page.py").write_text(program, encoding="utf-8")
    runpy.run_path("page.py")
    runner = doctest.DocTestRunner()
    with torch.random.fork_rng():
        runner.run(doctest.DocTestParser().get_doctest(session, {}, page.name, str(page), 0))
    assert runner.failures == 0, f"see above; {page}"


def test_links_lead_to_files() -> None:
    """As on a code host, without a build. Sphinx checks the headings that links name."""
    local = re.compile(r"\]\((?!https:)([^)#\s]+)")
    files = [page.parent / link for page in LINKED for link in local.findall(page.read_text("utf-8"))]
    assert len(files) > 50
    assert not [file for file in files if not file.exists()]


def test_pictures_have_text_alternatives() -> None:
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    alternatives = re.findall(r"!\[([^]]*)\]\(", text)
    for file in re.findall(r":file: (\S+\.svg)", text):
        alternatives += re.findall(r"<title id=\S+>([^<]*)<", read("docs", file)) or [""]
    assert len(alternatives) >= 7 and min(map(len, alternatives)) >= 60


def test_versions_on_the_page_are_those_of_nox() -> None:
    cells = re.findall(r'^    \("(3\.\d+)", "([\d.]+)", ', read("noxfile.py"), re.MULTILINE)
    support = read("docs", "support.md")
    (tested,) = re.findall(r"^\| torch \|.*\| (.*?);", support, re.MULTILINE)
    assert re.findall(r"\d+\.\d+", tested) == list(dict.fromkeys(torch[: torch.rindex(".")] for _, torch in cells))
    pythons = sorted({python for python, _ in cells})
    assert f"| {pythons[0]} to {pythons[-1]} |" in support


def test_contributing_shows_every_session() -> None:
    sessions = re.findall(r"^@nox\.session.*\n(?:@.*\n)*def (\w+)", read("noxfile.py"), re.MULTILINE)
    shown = re.findall(r'-s "?(\w+)', read("CONTRIBUTING.md"))
    assert "quick" in sessions and set(sessions) <= set(shown)
