"""What the documentation shows runs: every docstring's examples, and README's Python, read from top to bottom."""

import csv
import doctest
import importlib
import pkgutil
import pydoc
import re
import runpy
import statistics
import sys
from pathlib import Path

import pytest
import torch

import fastlars
import pages
from fastlars.options import NAMES

MODULES = ["fastlars", *(f"fastlars.{module.name}" for module in pkgutil.iter_modules(fastlars.__path__))]
# docs/frameworks has packages of its own, and sessions that run it
PAGES = [pages.ROOT / "README.md", *sorted((pages.ROOT / "docs").glob("*.md"))]


def examples(module: str) -> list[doctest.DocTest]:
    namespace = {"torch": torch, "fastlars": fastlars}
    finder = doctest.DocTestFinder(exclude_empty=True)
    try:
        found = finder.find(importlib.import_module(module), extraglobs=namespace)
    except ModuleNotFoundError as error:  # Triton is not everywhere
        pytest.skip(str(error))
    return [test for test in found if test.examples]


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    runner = doctest.DocTestRunner()
    for test in examples(module):
        runner.run(test)
    assert runner.failures == 0, capsys.readouterr().out


def test_every_public_function_and_class_has_an_example() -> None:
    """A way of looking for them that finds none would pass every one."""
    shown = {
        test.name
        for module in ("functional", "groups", "optimizer", "plots", "schedules")
        for test in examples(f"fastlars.{module}")
    }
    assert shown >= {
        "fastlars.functional.lars",
        "fastlars.groups.param_groups",
        "fastlars.optimizer.LARS",
        "fastlars.optimizer.LARS.trust_ratios",
        "fastlars.plots.trust_ratios",
        "fastlars.schedules.linear_scaling",
        "fastlars.schedules.sqrt_scaling",
        "fastlars.schedules.warmup_cosine",
        "fastlars.schedules.warmup_polynomial",
    }


def test_help_teaches() -> None:
    """What a newcomer must know is there: formula, scale of lr, groups, every option with its meaning, an example."""
    text = pydoc.plain(pydoc.render_doc(fastlars.LARS))
    lines = [line.removeprefix(" |").strip() for line in text.splitlines()]
    assert text.index("ratio = trust_coefficient * |w|") < text.index("Args:") < text.index("Methods defined here")
    for taught in ("no drop-in for SGD", "of the order of 1 to 30", "fastlars.param_groups", "arXiv 1708.03888"):
        assert taught in text, taught
    for option in ("params", *NAMES):
        assert any(line.startswith(f"{option}: ") and len(line) > len(option) + 12 for line in lines), option
    assert ">>> optimizer = fastlars.LARS(groups, lr=4.8, momentum=0.9)" in lines


# torch's own: that scripting is deprecated, and from inside its compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as one program: later blocks may use what earlier ones have made. Errors show the page's line numbers."""
    program, session = pages.examples(page, "python"), pages.examples(page, "pycon")
    for module in ("matplotlib", "tensorboard"):
        if module in program or (module == "matplotlib" and "fastlars.plots" in program):
            pytest.importorskip(module, reason="pages have their own dependencies: group pages")
    if "torch.jit.script" in program and sys.version_info >= (3, 14):
        pytest.skip("TorchScript does not support this Python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    if program:
        Path("page.py").write_text(program, encoding="utf-8")
        runpy.run_path("page.py")
    if session:
        runner = doctest.DocTestRunner()
        with torch.random.fork_rng():
            runner.run(doctest.DocTestParser().get_doctest(session, {}, page.name, str(page), 0))
        assert runner.failures == 0, f"see above; {page}"


def test_the_pages_show_something() -> None:
    """A way of looking for them that finds none would pass every one."""
    shown = {page.stem for page in PAGES if pages.examples(page, "python") + pages.examples(page, "pycon")}
    assert shown >= {"README", "modes", "groups", "schedules", "ratios", "which-lr", "troubleshooting"}


def test_links_lead_to_files() -> None:
    """As on a code host, where nothing is built; Sphinx looks at the headings that they name."""
    texts = [pages.ROOT / "README.md", pages.ROOT / "CONTRIBUTING.md", *sorted((pages.ROOT / "docs").rglob("*.md"))]
    links = [
        (text, link) for text in texts for link in re.findall(r"\]\((?!https:)([^)#\s]+)", text.read_text("utf-8"))
    ]
    assert len(links) > 50
    assert not [(text.name, link) for text, link in links if not (text.parent / link).exists()]


def test_contributing_shows_every_session() -> None:
    contributing = (pages.ROOT / "CONTRIBUTING.md").read_text("utf-8")
    noxfile = (pages.ROOT / "noxfile.py").read_text("utf-8")
    sessions = re.findall(r"^@nox\.session\n(?:@.*\n)*def (\w+)", noxfile, re.MULTILINE)
    assert "quick" in sessions
    assert not [name for name in sessions if not re.search(rf'-s "?{name}\b', contributing)]


def test_the_wrong_lrs_of_the_demo_are_those_of_its_runs() -> None:
    """The table of docs/which-lr.md, from docs/demo/runs.csv."""
    with (pages.ROOT / "docs" / "demo" / "runs.csv").open(encoding="utf-8", newline="") as file:
        runs = [
            run
            for run in csv.DictReader(file)
            if (run["phase"], run["optimizer"], run["batch"]) == ("search", "LARS", "1152")
        ]
    lines = (pages.ROOT / "docs" / "which-lr.md").read_text("utf-8").splitlines()
    (lrs,), *rows = (
        [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines if line.startswith(f"| {start}")]
        for start in ("LARS, lr", "biases at lr 0.1", "biases at the weights' lr")
    )
    for bias_lr, (row,) in zip(("0.1", "same"), rows, strict=True):
        for lr, shown in zip(lrs, row, strict=True):
            seeds = [
                float(run["accuracy_percent"])
                for run in runs
                if run["bias_lr"] == bias_lr and round(float(run["lr"])) == int(lr)
            ]
            assert shown == (f"{statistics.mean(seeds):.1f}" if seeds else ""), (bias_lr, lr)
