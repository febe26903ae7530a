"""Every measured figure on a page is the stored one, rendered or counted again here. Every other figure has a source."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import pytest

for module in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(module, reason="the benchmarks have their own dependencies: groups bench and demo")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

from benchmarks import render
from benchmarks.demo import __main__ as demo
from benchmarks.demo import figure, outcome
from benchmarks.optimizers import PEERS, YARDSTICK
from benchmarks.shapes import MODELS

CPU = render.runs_on("cpu")[0]
PAGES = render.pages()
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


def test_the_picture_of_readme_is_of_this_run(tmp_path: Path) -> None:
    render.picture(CPU, tmp_path / "speed.svg")
    (source,) = re.findall("<dc:source>.*</dc:source>", (tmp_path / "speed.svg").read_text("utf-8"))
    assert source in (DOCS / "speed.svg").read_text("utf-8"), "run python -m benchmarks.render"


def test_no_compiled_step_copies_single_numbers() -> None:
    """As docs/performance.md says of its counts."""
    cells = json.loads((render.FOLDER / "compiled" / "launches.json").read_text("utf-8"))["cells"]
    counted = [cell for cases in cells.values() for by_dtype in cases.values() for cell in by_dtype.values()]
    assert counted and not any(cell["on_one_element"] for cell in counted)


def test_ours_is_faster_than_every_other_lars() -> None:
    """README's first sentence and the text of its picture, of real models; docs/frameworks/lightly.md says that it is faster."""
    for case in CPU.cases:
        assert all(CPU.ratio(case, peer, render.DEFAULT) > 1 for peer in PEERS), case
    text = (ROOT / "README.md").read_text("utf-8")
    models = [case for case in render.real_cases(CPU) if MODELS["small"].title not in case]
    faster = [CPU.ratio(case, peer, render.DEFAULT) for case in models for peer in ("lightly", "timm")]
    assert f"a step {min(faster):.1f} to {max(faster):.1f} times as fast as lightly's or timm's on a CPU" in text
    (alternative,) = re.findall(r"!\[([^]]*)\]\(docs/speed.svg\)", text)
    ours, peers = (
        {f"{CPU.ratio(case, name, YARDSTICK):.1f}" for case in models for name in names}
        for names in ([render.DEFAULT], ["lightly", "timm"])
    )
    assert f"fastlars takes {min(ours)} to {max(ours)} times as long" in alternative
    assert f"lightly and timm {min(peers)} to {max(peers)} times" in alternative
    assert ("fastlars has not run on a GPU yet" in text) == (not render.runs_on("cuda"))


def test_what_the_page_on_lr_says_of_the_search() -> None:
    text = (DOCS / "which-lr.md").read_text("utf-8")
    best = {
        int(key[1]): lr for key, (_, lr) in outcome.chosen(TRIALS, outcome.batches(RUNS)).items() if key[0] == "LARS"
    }
    power = statistics.linear_regression(
        [math.log(batch) for batch in best], [math.log(lr) for lr in best.values()]
    ).slope
    assert (
        f"LARS's best lr grows as batch to the power {power:.1f}, between square-root and linear scaling"
        in text.replace("\n", " ")
    )
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
    shapes = MODELS["resnet50"].shapes()
    tensors, elements = len(shapes), sum(map(math.prod, shapes))
    text = (DOCS / "distributed.md").read_text("utf-8").replace("\n", " ")
    assert f"all of ResNet-50's {tensors} tensors under FSDP2" in text
    sent, reduced = f"{(8 * tensors + 8) / 1e3:.1f} kB", f"{4 * elements / 1e6:.0f} MB"
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
    ("README.md", "1.8 times"): "above",
    ("README.md", "3.3 times"): "above",
    ("README.md", "5.3 times"): "above",
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
    """Without what programs write or run. (CONTRIBUTING, which is not searched, shows what commands have printed.)"""
    if page.name in ("precision.md", "table.md", "study.md") or page.parent.name == "study":
        return ""  # compared as a whole, those of the study by its own tests
    text = page.read_text("utf-8")
    for begin, end in ((render.BEGIN, render.END), ("```{}", "```")):
        first, last = (re.escape(line).replace(r"\{\}", r"[^\n]*") for line in (begin, end))
        text = re.sub(f"^{first}$.*?^{last}$", "", text, flags=re.DOTALL | re.MULTILINE)
    return " ".join(text.splitlines())
