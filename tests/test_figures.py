"""Every measured figure on a page is the stored one, rendered or counted again here. Every other figure has a source."""

from __future__ import annotations

import csv
import math
import re
import statistics
import sys
from pathlib import Path

import pytest

for module in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(module, reason="the benchmarks have their own dependencies: groups bench and demo")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(ROOT))  # benchmarks/ is not part of the package and is run from the repository root

from benchmarks import long_run, render
from benchmarks.demo import __main__ as demo
from benchmarks.demo import figure, outcome
from benchmarks.optimizers import YARDSTICK
from benchmarks.shapes import MODELS

STORED, ELSEWHERE = render.stored_in(render.FOLDER), render.stored_in(render.FOLDER / "elsewhere")
PAGES = render.pages(STORED, ELSEWHERE)
RUNS, TRIALS = outcome.read(DOCS / "demo" / "runs.csv"), outcome.read(demo.STORED)


@pytest.mark.parametrize("path", list(PAGES), ids=lambda path: path.name)
def test_a_page_shows_what_is_stored(path: Path) -> None:
    assert path.read_text("utf-8") == PAGES[path], "run python -m benchmarks.render"


def test_the_demo_ran_at_the_lrs_of_the_search_and_its_picture_is_of_these_runs() -> None:
    best = outcome.chosen(TRIALS, outcome.batches(RUNS))
    ran = {(run["name"], int(run["batch"])): (run["bias_lr"], float(run["lr"])) for run in RUNS}
    biases = {key: "same" if method.bias_lr is None else f"{method.bias_lr:g}" for key, (method, _) in best.items()}
    assert ran == {key: (biases[key], lr) for key, (_, lr) in best.items()}
    assert len(RUNS) == 3 * len(ran), "three seeds"
    picture = (DOCS / "demo" / "demo.png").read_bytes()
    assert f"tEXtSource\0{figure.drawn_from(RUNS)}".encode() in picture, "run python -m benchmarks.demo --out docs/demo"
    means = {name: [outcome.mean(RUNS, name, batch) for batch in outcome.batches(RUNS)] for name in ("LARS", "SGD")}
    assert means["LARS"][0] - means["LARS"][-1] < 2.5 and means["SGD"][0] - means["SGD"][-1] > 5  # "level", "falls"


def test_the_long_run_of_the_page_is_that_of_its_blocks() -> None:
    with (render.FOLDER / "long_run.csv").open(newline="", encoding="utf-8") as file:
        blocks = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    for block in blocks:
        block["step"] = int(block["step"])
    about = {"versions": {"torch": "0"}, "load": 0, "cores": 0, "date": ""}  # on that day
    text, faults = long_run.summary(blocks, about)
    shown, expected = (render.FOLDER / "long_run.md").read_text("utf-8").splitlines(), text.splitlines()
    assert not faults
    for line, again in zip(shown[2:], expected[2:], strict=True):
        found = [
            [float(n) for n in re.findall(r"[\d.]+\d(?:e-\d+)?|\d", each.replace(",", ""))] for each in (line, again)
        ]
        assert found[0] == pytest.approx(found[1], rel=5e-3), line  # the file is rounded to five digits


def test_ours_is_faster_than_every_other_lars() -> None:
    """README's first sentence and its picture's text say so, and docs/frameworks/lightly.md."""
    results = render.find(STORED, "cpu")
    assert results is not None
    for case in results.cases:
        ours, *peers = (
            results.ratio(case, n, YARDSTICK) for n in (render.DEFAULT, "lightly", "timm", "pytorch_optimizer")
        )
        assert ours < min(peers), case
    text = (ROOT / "README.md").read_text("utf-8")
    models = [case for case in results.cases if MODELS["small"].title not in case]
    faster = [results.ratio(case, peer, render.DEFAULT) for case in models for peer in ("lightly", "timm")]
    assert f"a step {min(faster):.1f} to {max(faster):.1f} times as fast as lightly's or timm's on a CPU" in text
    (alternative,) = re.findall(r"!\[([^]]*)\]\(docs/speed.svg\)", text)
    ours, peers = (
        {f"{results.ratio(case, name, YARDSTICK):.1f}" for case in models for name in names}
        for names in ([render.DEFAULT], ["lightly", "timm"])
    )
    assert f"fastlars takes {min(ours)} to {max(ours)} times as long" in alternative
    assert f"lightly and timm {min(peers)} to {max(peers)} times" in alternative
    assert ("fastlars has not run on a GPU yet" in text) == (render.find(STORED, "cuda") is None)


def test_what_the_page_on_lr_says_of_the_search() -> None:
    text = (DOCS / "which-lr.md").read_text("utf-8")
    best = {
        int(key[1]): lr for key, (_, lr) in outcome.chosen(TRIALS, outcome.batches(RUNS)).items() if key[0] == "LARS"
    }
    power = statistics.linear_regression(
        [math.log(batch) for batch in best], [math.log(lr) for lr in best.values()]
    ).slope
    assert f"LARS's best lr grows as batch to the power {power:.1f}: between root and linear" in text.replace("\n", " ")
    (lrs,), *rows = (
        [
            [cell.strip() for cell in line.split("|")[2:-1]]
            for line in text.splitlines()
            if line.startswith(f"| {start}")
        ]
        for start in ("LARS, lr", "biases at lr 0.1", "biases at the weights' lr")
    )
    for bias_lr, (row,) in zip(("0.1", "same"), rows, strict=True):
        tried = [t for t in TRIALS if (t["optimizer"], t["batch"], t["bias_lr"]) == ("LARS", "1152", bias_lr)]
        means = {round(float(t["lr"])): f"{float(t['accuracy_percent']):.1f}" for t in tried}
        assert row == [means.get(int(lr), "") for lr in lrs]


def test_what_the_page_on_several_processes_counts() -> None:
    resnet = MODELS["resnet50"]
    text = (DOCS / "distributed.md").read_text("utf-8").replace("\n", " ")
    assert f"all of ResNet-50's {resnet.tensors} tensors under FSDP2" in text
    sent, reduced = f"{(8 * resnet.tensors + 8) / 1e3:.1f} kB", f"{4 * resnet.elements / 1e6:.0f} MB"
    assert f"all-reduce of {sent} per step. The gradients that torch reduces take {reduced}" in text


# a number with a unit, or a multiple
UNIT = r"ms|us|s|GB/s|GB|MB|MiB|kB|GiB|%|points?|seconds?|minutes?|hours?|times|steps/s|x(?= faster| as)"
WORDS = "half|twice|two|three|four|five|six|seven|eight|nine|ten|twenty|a hundred|a thousand|a third|a quarter|several"
FIGURE = re.compile(
    rf"(?<![\w.])[0-9][0-9.,]*(?:e-?[0-9]+)?\s?(?:{UNIT})(?![\w])|\b(?:{WORDS})(?: an?)? (?:seconds?|minutes?|hours?|times)\b"
)

# figures that nobody measured, or that a test checks: page, figure, what checks it
GROUNDS = {
    ("README.md", "0.2 GB"): "the size of torch's CPU wheel, as in CONTRIBUTING.md",
    ("README.md", "1.5 times"): "above",
    ("README.md", "2.5 times"): "above",
    ("README.md", "4.5 times"): "above",
    ("README.md", "5 GB"): "the size of torch's wheels with CUDA, as in CONTRIBUTING.md",
    ("README.md", "six minutes"): "the budget of the quick suite, a rule of CONTRIBUTING.md",
    ("bytes.md", "5 times"): "arithmetic; bytes.svg is held by test_benchmarks",
    ("bytes.md", "1 MiB"): "a constant of fused_cpu.py; test_memory::test_no_temporary_above_4_mib",
    ("cheat-sheet.md", "30 %"): "advice, from the recipes",
    ("devices.md", "15 seconds"): "measured by hand on XLA's CPU device, once, as the page says",
    ("devices.md", "eight minutes"): "the limit of benchmarks/first_gpu_run.py",
    ("dialects.md", "1 MiB"): "a constant of norms.py; test_norms::test_joint_norm_on_cpu_in_pieces",
    ("dialects.md", "64 MiB"): "a constant of norms.py; test_side_effects::test_temporaries_fit_a_bucket",
    ("distributed.md", "1.3 kB"): "above",
    ("distributed.md", "102 MB"): "above",
    ("index.md", "five minutes"): "a promise",
    ("recipes.md", "75.9 %"): "published: MLPerf, its source is named there",
    ("reliability.md", "ten minutes"): "an argument of the command",
    ("schedules.md", "30 %"): "advice, from the recipes",
    ("troubleshooting.md", "8 %"): "arithmetic: lr * trust_coefficient / (1 - momentum)",
    ("troubleshooting.md", "30 %"): "advice, from the recipes",
    ("troubleshooting.md", "0.01 %"): "arithmetic: lr * trust_coefficient",
    ("troubleshooting.md", "a hundred times"): "arithmetic: lr 10 against 0.1",
    ("which-lr.md", "1 %"): "arithmetic: lr * trust_coefficient",
    ("which-lr.md", "10 %"): "arithmetic: 1 / (1 - momentum) times that; chance among ten digits",
    ("which-lr.md", "2.3 times"): "arithmetic: 1 / sqrt(1 - 0.9**2); the page's code shows it",
}


def test_no_other_figure_is_typed_by_hand() -> None:
    pages = [ROOT / "README.md", *DOCS.rglob("*.md")]
    found = {(page.name, figure) for page in pages for figure in FIGURE.findall(written_by_hand(page))}
    assert sorted(found - GROUNDS.keys()) == [], "let a program write it, or a test compare it; else give the ground"
    assert sorted(GROUNDS.keys() - found) == [], "is no longer there"


def written_by_hand(page: Path) -> str:
    """Without text that programs write or run. CONTRIBUTING, which is not searched, shows what commands printed."""
    if page.name in ("performance.md", "precision.md", "table.md", "study.md") or page.parent.name == "study":
        return ""  # compared as a whole, or by the study's own tests
    text = page.read_text("utf-8")
    for begin, end in ((render.BEGIN, render.END), ("```{}", "```")):
        first, last = (re.escape(line).replace(r"\{\}", r"[^\n]*") for line in (begin, end))
        text = re.sub(f"^{first}$.*?^{last}$", "", text, flags=re.DOTALL | re.MULTILINE)
    return " ".join(text.splitlines())
