"""The examples of the documentation run: every docstring's, and each page's Python from top to bottom."""

import doctest
import importlib
import inspect
import json
import pkgutil
import pydoc
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


def examples(module: str) -> list[doctest.DocTest]:
    namespace = {"torch": torch, "fastlars": fastlars}
    finder = doctest.DocTestFinder(exclude_empty=True)
    try:
        found = finder.find(importlib.import_module(module), extraglobs=namespace)
    except ModuleNotFoundError as error:  # Triton is not everywhere
        pytest.skip(str(error))
    return [test for test in found if test.examples]


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(
    module: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if module == "fastlars.plots":
        pytest.importorskip("matplotlib", reason="an extra")
    monkeypatch.chdir(tmp_path)  # pictures are saved there
    monkeypatch.setenv("MPLBACKEND", "Agg")
    runner = doctest.DocTestRunner()
    for test in examples(module):
        runner.run(test)
    assert runner.failures == 0, capsys.readouterr().out


def public_names() -> dict[str, Any]:
    """What `fastlars` and its public modules export, and what LARS adds to torch's Optimizer."""
    found: dict[str, Any] = {}
    for name in fastlars.__all__:
        value = getattr(fastlars, name)
        inside = value.__all__ if inspect.ismodule(value) else []
        found |= {f"{name}.{inner}": getattr(value, inner) for inner in inside} or {name: value}
    methods = {name: value for name, value in vars(fastlars.LARS).items() if callable(value)}
    return found | {f"LARS.{name}": value for name, value in methods.items() if not name.startswith("_")}


PUBLIC = public_names()


@pytest.mark.parametrize("name", list(PUBLIC))
def test_a_public_name_is_documented(name: str) -> None:
    """With every argument, return value and error, and an example, which runs above. The reference page shows it."""
    value = PUBLIC[name]
    reference = (pages.ROOT / "docs" / "reference.md").read_text("utf-8")
    assert re.search(rf"\b{name.removeprefix('LARS.')}\b", reference)
    if isinstance(value, dict):  # data, described in a comment that Sphinx reads and shown in the example of its module
        source = (Path(fastlars.__file__).parent / f"{name.lower()}.py").read_text("utf-8")
        assert re.search(rf"^#: .*\n(#: .*\n)*{name}\b", source, re.MULTILINE)
        assert any(name in example.source for test in examples(f"fastlars.{name.lower()}") for example in test.examples)
        return
    described = inspect.getdoc(value) or ""
    sections = re.split(r"^(Args|Returns|Raises|Example|Source):", described, flags=re.MULTILINE)
    contents = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert len(sections[0]) > 30 and {"Raises", "Example"} <= contents.keys()
    signature = inspect.signature(value)
    # lars refers to LARS for its options
    left_out = {"self", *(NAMES[1:] if name == "lars" else ())}
    for argument in signature.parameters.keys() - left_out:
        assert f"\n    {argument}: " in contents["Args"], argument
    assert ("Returns" in contents) == (signature.return_annotation not in ("None", None)) or inspect.isclass(value)
    shown = [test for test in examples(value.__module__) if test.name == f"{value.__module__}.{value.__qualname__}"]
    assert shown and not any(doctest.SKIP in example.options for test in shown for example in test.examples)


def test_public_names_are_found() -> None:
    """A search that finds nothing would pass every test."""
    assert PUBLIC.keys() >= {"LARS", "LARS.step", "LARS.load_state_dict", "lars", "DIALECTS", "schedules.warmup_cosine"}
    assert len(PUBLIC) >= 14 and "LARS.zero_grad" not in PUBLIC  # torch's


def test_help_teaches() -> None:
    """What a newcomer must know: formula, scale of lr, groups, every option with its meaning, an example."""
    text = pydoc.plain(pydoc.render_doc(fastlars.LARS))
    lines = [line.removeprefix(" |").strip() for line in text.splitlines()]
    assert text.index("ratio = trust_coefficient * |w|") < text.index("Args:") < text.index("Methods defined here")
    for taught in (
        "not a drop-in replacement for SGD",
        "a typical ``lr`` is 1 to 30",
        "fastlars.param_groups",
        "arXiv 1708.03888",
    ):
        assert taught in text, taught
    for option in ("params", *NAMES):
        assert any(line.startswith(f"{option}: ") and len(line) > len(option) + 12 for line in lines), option
    assert ">>> optimizer = fastlars.LARS(groups, lr=4.8, momentum=0.9)" in lines


# torch's own warnings: scripting is deprecated, and from inside its compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page as one program, in which later blocks may use earlier ones. Errors show the page's line numbers."""
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
    """A search that finds nothing would pass every test."""
    shown = {page.stem for page in PAGES if pages.examples(page, "python") + pages.examples(page, "pycon")}
    assert shown >= {"README", "modes", "groups", "schedules", "ratios", "which-lr", "troubleshooting"}


def test_links_lead_to_files() -> None:
    """As on a code host, without a build. Sphinx checks the headings that links name."""
    texts = [pages.ROOT / "README.md", pages.ROOT / "CONTRIBUTING.md", *sorted((pages.ROOT / "docs").rglob("*.md"))]
    links = [
        (text, link) for text in texts for link in re.findall(r"\]\((?!https:)([^)#\s]+)", text.read_text("utf-8"))
    ]
    assert len(links) > 50
    assert not [(text.name, link) for text, link in links if not (text.parent / link).exists()]


def test_pictures_have_text_alternatives() -> None:
    texts = [pages.ROOT / "README.md", *sorted((pages.ROOT / "docs").rglob("*.md"))]
    shown = [
        (text.parent / picture, alternative)
        for text in texts
        for alternative, picture in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", text.read_text("utf-8"))
    ]
    drawn = [text.parent / file for text in texts for file in re.findall(r":file: (\S+\.svg)", text.read_text("utf-8"))]
    shown += [
        (
            file,
            "".join(
                re.findall(
                    r'<svg role="img" aria-labelledby="([^"]+)".*?<title id="\1">([^<]+)</title>',
                    file.read_text("utf-8"),
                    re.DOTALL,
                )[0][1:]
            ),
        )
        for file in drawn
    ]
    assert not [(file.name, alternative) for file, alternative in shown if len(alternative) < 60]
    pictures = {
        file.resolve()
        for suffix in ("png", "svg")
        for file in (pages.ROOT / "docs").rglob(f"*.{suffix}")
        if "_build" not in file.parts
    }
    assert {file.resolve() for file, _ in shown} == pictures


# The authors of each paper, because a wrong digit leads to another paper.
PAPERS = {
    "1404.5997": "Krizhevsky",
    "1706.02677": "Goyal",
    "1708.03888": "LARS|You|paper",
    "1910.01500": "Mattson",
    "2002.05709": "Chen",
    "2006.07733": "Grill",
    "2102.06356": "Nado",
    "2103.03230": "Zbontar",
    "2105.04906": "Bardes",
    "2111.06377": "He et al",
}


def test_links_to_elsewhere_say_where_they_lead() -> None:
    """Nothing is downloaded. Papers need their authors next to the number, and issue links their number."""
    files = [
        pages.ROOT / "README.md",
        *(pages.ROOT / "docs").rglob("*.md"),
        *Path(fastlars.__file__).parent.glob("*.py"),
    ]
    found = set()
    for file in files:
        text = file.read_text("utf-8")
        for paper in re.finditer(r"(?:arXiv[: ]|arxiv\.org/abs/)([0-9.]+[0-9])", text):
            found.add(paper[1])
            assert re.search(PAPERS[paper[1]], text[max(0, paper.start() - 200) : paper.end()]), (file.name, paper[1])
        for label, link in re.findall(r"\[([^]]+)\]\((http[^)]*)\)", text):
            assert re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]+(/[\w./-]*)?", link), (file.name, link)
            if issue := re.search(r"/([\w-]+)/(?:issues|pull)/(\d+)$", link):
                assert label == f"{issue[1]}#{issue[2]}", (file.name, link)
    assert found == PAPERS.keys()


def test_versions_and_counts_on_the_pages() -> None:
    def read(*path: str) -> str:
        return pages.ROOT.joinpath(*path).read_text("utf-8")

    cells = re.findall(r'^    \("(3\.\d+)", "([\d.]+)", ', read("noxfile.py"), re.MULTILINE)
    pythons, torches = ({tuple(map(int, cell[i].split("."))) for cell in cells} for i in (0, 1))
    first, *others = sorted(torches)
    names = [".".join(map(str, first)), *(f"{major}.{minor}" for major, minor, _ in others)]
    support = read("docs", "support.md")
    assert f"| {', '.join(names[:-1])} and {names[-1]};" in support
    assert f"| {'.'.join(map(str, min(pythons)))} to {'.'.join(map(str, max(pythons)))} |" in support
    assert {tuple(map(int, name.split(".")))[:2] for name in names} == {torch[:2] for torch in torches}

    reliability = read("docs", "reliability.md")
    (cases,) = re.findall(r"^QUICK, CASES = \d+, (\d+)$", read("tests", "test_fuzz_state_dicts.py"), re.MULTILINE)
    assert f"suite runs {cases} cases" in " ".join(reliability.split())
    assert f"three steps for {len(json.loads(read('tests', 'golden.json'))['cases'])} sets of options" in reliability


def test_contributing_shows_every_session() -> None:
    contributing = (pages.ROOT / "CONTRIBUTING.md").read_text("utf-8")
    noxfile = (pages.ROOT / "noxfile.py").read_text("utf-8")
    sessions = re.findall(r"^@nox\.session\n(?:@.*\n)*def (\w+)", noxfile, re.MULTILINE)
    assert "quick" in sessions
    assert not [name for name in sessions if not re.search(rf'-s "?{name}\b', contributing)]
