"""The figures on the pages are those of the stored runs. Speed and accuracy are claimed nowhere else without a ground."""

import math
import re
import statistics
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the demo has its own dependencies: group demo")

from benchmarks import render
from benchmarks.demo import __main__ as demo
from benchmarks.demo import figure, outcome
from benchmarks.optimizers import PEERS, YARDSTICK
from benchmarks.shapes import MODELS

CPU = render.runs_on("cpu")[0]
PAGES = render.pages()
RUNS, TRIALS = outcome.read(render.DOCS / "demo" / "runs.csv"), outcome.read(demo.STORED)
BEST = outcome.chosen(TRIALS, outcome.batches(RUNS))

# a multiple, a time, a rate or a tenth of a percent
FIGURE = re.compile(r"(?:[\d.]+ to )?[\d.]+ times|\d+\.\d+ %|[\d.]+ (?:ms|us|GB/s|steps/s)\b")
GROUNDS = {
    ("README.md", "2.5 to 3.3 times"): "compared below",
    ("README.md", "1.6 to 1.8 times"): "compared below",
    ("README.md", "4.3 to 5.3 times"): "compared below",
    ("bytes.md", "5 times"): "arithmetic",
    ("recipes.md", "75.9 %"): "published: MLPerf, its source is named there",
    ("study.md", "86.9 %"): "compared by test_study.py",
    ("troubleshooting.md", "0.01 %"): "arithmetic: lr * trust_coefficient",
    ("which-lr.md", "2.3 times"): "arithmetic, which the page's code shows",
}


def read(page: str) -> str:
    return " ".join((render.ROOT / page).read_text("utf-8").split())


@pytest.mark.parametrize("path", list(PAGES), ids=lambda path: path.name)
def test_a_page_shows_what_is_stored(path: Path) -> None:
    assert path.read_text("utf-8") == PAGES[path], "run python -m benchmarks.render"


def test_no_other_figure_is_typed_by_hand() -> None:
    # precision.md says of each figure how it was measured
    pages = [render.ROOT / "README.md", *(page for page in render.DOCS.rglob("*.md") if page.name != "precision.md")]
    texts = {page.name: re.sub("<!-- measured: .*?<!-- end", "", read(str(page))) for page in pages}
    found = {(name, figure) for name, text in texts.items() for figure in FIGURE.findall(text)}
    assert found == GROUNDS.keys(), "let a program write it, or a test compare it; else give the ground"


def test_the_demo_ran_at_the_lrs_of_the_search_and_its_picture_is_of_these_runs() -> None:
    ran = sorted((run["name"], int(run["batch"]), float(run["lr"])) for run in RUNS)
    assert ran == sorted((*key, lr) for key, (_, lr) in BEST.items() for _ in range(3)), "three seeds"
    picture = (render.DOCS / "demo" / "demo.png").read_bytes()
    assert f"tEXtSource\0{figure.drawn_from(RUNS)}".encode() in picture, "run python -m benchmarks.demo --out docs/demo"
    lost = {name: outcome.mean(RUNS, name, 32) - outcome.mean(RUNS, name, 1152) for name in ("LARS", "SGD")}
    assert lost["LARS"] < 2.5 and lost["SGD"] > 5, "LARS stays level while SGD falls"


def test_readme_says_how_much_faster_than_other_lars_and_its_picture_is_of_this_run(tmp_path: Path) -> None:
    render.picture(CPU, tmp_path / "speed.svg")
    (source,) = re.findall("<dc:source>.*</dc:source>", (tmp_path / "speed.svg").read_text("utf-8"))
    assert source in (render.DOCS / "speed.svg").read_text("utf-8"), "run python -m benchmarks.render"
    assert all(CPU.ratio(case, peer, render.DEFAULT) > 1 for case in CPU.cases for peer in PEERS)

    def span(names: list[str], to: str) -> str:
        models = [case for case in render.real_cases(CPU) if MODELS["small"].title not in case]
        ratios = [CPU.ratio(case, name, to) for case in models for name in names]
        return f"{min(ratios):.1f} to {max(ratios):.1f} times"

    text, peers = read("README.md"), ["lightly", "timm"]
    assert f"a step {span(peers, render.DEFAULT)} as fast as lightly's or timm's on a CPU" in text
    assert f"fastlars takes {span([render.DEFAULT], YARDSTICK)} as long" in text
    assert f"lightly and timm {span(peers, YARDSTICK)}.](docs/speed.svg)" in text
    assert ("fastlars has not run on a GPU yet" in text) == (not render.runs_on("cuda"))


def test_what_the_page_on_lr_says_of_the_search() -> None:
    text = read("docs/which-lr.md")
    lrs = {batch: lr for (name, batch), (_, lr) in BEST.items() if name == "LARS"}
    power = statistics.linear_regression([*map(math.log, lrs)], [*map(math.log, lrs.values())]).slope
    assert f"LARS's best lr grows as batch to the power {power:.1f}, between square-root and linear scaling" in text
    for biases, bias_lr in (("lr 0.1", "0.1"), ("the weights' lr", "same")):
        tried = [t for t in TRIALS if (t["optimizer"], t["batch"], t["bias_lr"]) == ("LARS", "1152", bias_lr)]
        means = {round(float(t["lr"])): f"{float(t['accuracy_percent']):.1f} " for t in tried}
        row = "| ".join(means.get(lr, "") for lr in (8, 16, 32, 64, 128, 181, 256))
        assert f"| biases at {biases} | {row}|" in text
