"""Every figure that was measured is the stored one: rendered again, or counted again here. And every other has a ground.

README and docs are searched for numbers with a unit. What stands between the comments of `benchmarks.render`, or on a page that a
program writes, is compared with a new rendering; any other number must be in a table below, with what holds it.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
import sys
from pathlib import Path

import pytest

for module in ("rich", "matplotlib"):
    pytest.importorskip(module, reason="the benchmarks have their own dependencies: group bench")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(ROOT))  # benchmarks/ is no part of the package; it is run from the repository root

from benchmarks.commandline import FOLDER
from benchmarks.demo.report import HEADER, drawn_from, read_csv
from benchmarks.promises import DEFAULT
from benchmarks.readme import accuracies

from benchmarks import figure, long_run, render
from benchmarks.demo.training import METHODS
from benchmarks.optimizers import CONTENDERS, YARDSTICK
from benchmarks.results import ELSEWHERE, find, load_all
from benchmarks.shapes import MODELS

STORED, ELSEWHERE_STORED = load_all(FOLDER), load_all(FOLDER / ELSEWHERE)
PAGES = render.pages(STORED, ELSEWHERE_STORED, DOCS)
RUNS = read_csv(DOCS / "demo" / "runs.csv")


# Pages


@pytest.mark.parametrize("path", list(PAGES), ids=lambda path: path.name)
def test_a_page_shows_what_is_stored(path: Path) -> None:
    assert path.read_text("utf-8") == PAGES[path], "run python -m benchmarks.render"


def test_what_is_stored_is_shown() -> None:
    """Without any of the files a page would be another."""
    assert [path.name for path in PAGES] == ["performance.md", "README.md", "distributed.md"]
    for left_out in [*STORED, *ELSEWHERE_STORED]:
        here, there = ([run for run in runs if run is not left_out] for runs in (STORED, ELSEWHERE_STORED))
        fewer = render.pages(here, there, DOCS)
        changed = {path.name for path in PAGES if fewer.get(path) != PAGES[path]}
        assert changed, left_out.benchmark
        assert left_out in STORED or changed == {"performance.md", "README.md"}
    # .csv and .md: the long run's, below
    assert {path.suffix for path in FOLDER.rglob("*") if path.is_file()} == {".json", ".csv", ".md"}


@pytest.mark.parametrize("device", render.DEVICES)
def test_the_picture_of_the_performance_page_is_of_these_results(device: str) -> None:
    picture, step_time = DOCS / f"performance-{device}.svg", find(STORED, "step_time", device)
    assert picture.exists() == (step_time is not None)
    if step_time is not None:
        drawn = figure.drawn_from(step_time, find(STORED, "scaling", device))
        assert f"<dc:identifier>{drawn}</dc:identifier>" in picture.read_text("utf-8"), (
            "run python -m benchmarks.render"
        )


def test_the_table_of_the_demo_is_that_of_its_runs() -> None:
    table = (DOCS / "demo" / "table.md").read_text("utf-8")
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert shown[0] == list(HEADER)
    expected = []
    for batch in dict.fromkeys(run["batch"] for run in RUNS):
        for method in METHODS:
            key = (batch, method.optimizer, "same" if method.bias_lr is None else f"{method.bias_lr:g}")
            search = [
                run
                for run in RUNS
                if (run["phase"], run["batch"], run["optimizer"], run["bias_lr"]) == ("search", *key)
            ]
            lrs = sorted({float(run["lr"]) for run in search})
            (best,) = {float(run["lr"]) for run in search if run["chosen"] == "1"}
            chosen = [float(run["accuracy_percent"]) for run in search if float(run["lr"]) == best]
            test = accuracies([run for run in RUNS if run["phase"] == "final"], *key)
            edge = "" if lrs[0] < best < lrs[-1] else " *"
            numbers = (statistics.mean(chosen), statistics.mean(test), statistics.stdev(test))
            expected.append([*key, str(len(lrs)), f"{best:.3g}{edge}", *(f"{value:.1f}" for value in numbers)])
    assert shown[2:] == expected


def test_the_picture_of_the_demo_is_of_its_runs() -> None:
    picture = (DOCS / "demo" / "demo.png").read_bytes()
    assert f"tEXtSource\0{drawn_from(RUNS)}".encode() in picture, (
        "python -m benchmarks.demo --out docs/demo writes all three"
    )


def test_the_long_run_of_the_page_is_that_of_its_blocks() -> None:
    with (FOLDER / "long_run.csv").open(newline="", encoding="utf-8") as file:
        blocks = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    for block in blocks:
        block["step"] = int(block["step"])
    text, faults = long_run.summary(blocks)
    shown = (FOLDER / "long_run.md").read_text("utf-8").splitlines()
    assert not faults
    expected = text.splitlines()
    assert shown[0].split(" steps")[0] == expected[0].split(" steps")[0]
    for line, again in zip(shown[2:], expected[2:], strict=True):  # load and date are those of that day
        # the file is rounded to five digits
        assert numbers(line) == pytest.approx(numbers(again), rel=5e-3), line
        assert re.sub(r"[\d.,]+", "", line) == re.sub(r"[\d.,]+", "", again)


def numbers(line: str) -> list[float]:
    return [float(found) for found in re.findall(r"\d[\d.]*(?:e-\d+)?", line.replace(",", "").rstrip("."))]


# Sentences


def final(batch: str, optimizer: str, bias_lr: str) -> list[float]:
    return accuracies([run for run in RUNS if run["phase"] == "final"], batch, optimizer, bias_lr)


def test_what_readme_says_of_the_demo() -> None:
    mean = {
        (batch, optimizer, lr): statistics.mean(final(batch, optimizer, lr))
        for batch in ("32", "1152")
        for optimizer in ("SGD", "LARS")
        for lr in ("same", "0.1")
    }
    readme = (ROOT / "README.md").read_text("utf-8")
    said = readme[readme.index("With a separate lr for the biases") :].split("\n\n")[0].replace("\n", " ")
    assert "LARS loses little when the whole training set is one batch" in said
    assert 0 < mean["32", "LARS", "0.1"] - mean["1152", "LARS", "0.1"] < 2.5
    assert mean["32", "SGD", "same"] - mean["1152", "SGD", "same"] > 5
    assert "the same knob does not help SGD" in said
    assert mean["1152", "SGD", "0.1"] < mean["1152", "SGD", "same"]
    assert "With one lr for all tensors LARS is no better than SGD there" in said
    assert mean["1152", "LARS", "same"] - mean["1152", "SGD", "same"] < statistics.stdev(final("1152", "LARS", "same"))
    assert "of its five seeds two failed at batch 32 and one at 144" in said
    for batch, failed in (("32", 2), ("144", 1)):
        assert (
            sorted(accuracy < 50 for accuracy in final(batch, "LARS", "same"))
            == [False] * (5 - failed) + [True] * failed
        )
        search = [
            float(run["accuracy_percent"])
            for run in RUNS
            if (run["phase"], run["chosen"], run["batch"]) == ("search", "1", batch)
            and (run["optimizer"], run["bias_lr"]) == ("LARS", "same")
        ]
        assert len(search) == 5 and min(search) > 95, "all seeds of the search had trained"
    assert "Where they trained, all four are alike at the smallest batch" in said
    mean["32", "LARS", "same"] = statistics.mean(one for one in final("32", "LARS", "same") if one > 50)
    at_32 = [value for (batch, _, _), value in mean.items() if batch == "32"]
    assert max(at_32) - min(at_32) < 1


def test_what_readme_and_lightly_say_of_speed() -> None:
    """Faster than every other LARS, on every model; README says Fast, docs/frameworks/lightly.md that it is faster."""
    results = find(STORED, "step_time", "cpu")
    assert results is not None
    peers = [name for name, contender in CONTENDERS.items() if contender.package]
    for case in results.cases:
        ours = results.ratio(case, DEFAULT, YARDSTICK)
        others = [ratio for name in peers if (ratio := results.ratio(case, name, YARDSTICK)) is not None]
        assert ours is not None and len(others) == len(peers) == 3 and ours < min(others), case


def test_what_the_page_on_lr_says_of_the_demo() -> None:
    best = {
        int(run["batch"]): float(run["lr"])
        for run in RUNS
        if (run["phase"], run["optimizer"], run["bias_lr"], run["chosen"]) == ("search", "LARS", "0.1", "1")
    }
    batches, lrs = [math.log(batch) for batch in best], [math.log(lr) for lr in best.values()]
    power = statistics.linear_regression(batches, lrs).slope
    text = (DOCS / "which-lr.md").read_text("utf-8").replace("\n", " ")
    assert f"LARS's best lr grows as batch to the power {power:.1f}: between root and linear" in text
    assert f"{int(RUNS[0]['epochs'])} epochs each" in text and len(best) == 4 and "at four batches" in text
    mean = {
        lr: statistics.mean(
            float(run["accuracy_percent"]) for run in RUNS if at_largest(run) and float(run["lr"]) == lr
        )
        for lr in {float(run["lr"]) for run in RUNS if at_largest(run)}
    }
    lrs = sorted(mean)
    best = lrs.index(max(lrs, key=mean.__getitem__))
    assert "With the biases at 0.1 the best lr can be missed by half for a point or two" in text
    assert all(
        mean[lrs[best]] - mean[lrs[i]] < 2 and max(lrs[i] / lrs[best], lrs[best] / lrs[i]) > 1.4
        for i in (best - 1, best + 1)
    )


def at_largest(run: dict[str, str]) -> bool:
    return (run["phase"], run["optimizer"], run["bias_lr"], run["batch"]) == ("search", "LARS", "0.1", "1152")


def test_what_is_said_of_the_picture_of_ratios() -> None:
    ratios: dict[str, list[float]] = {}
    rows = read_csv(DOCS / "trust-ratios.csv")
    for row in rows:
        ratios.setdefault(row["tensor"], []).append(float(row["ratio"]))
    picture = (DOCS / "trust-ratios.png").read_bytes()
    assert f"tEXtSource\0{drawn_from(rows)}".encode() in picture, (
        "run python -m benchmarks.demo.ratios docs/trust-ratios.png"
    )

    def between(values: list[float]) -> str:
        return f"between {min(values):.2g} and {max(values):.2g}"

    first, lowest, last = ([f(row) for row in ratios.values()] for f in (lambda row: row[0], min, lambda row: row[-1]))
    text = (DOCS / "ratios.md").read_text("utf-8").replace("\n", " ")
    assert f"fall from {between(first)} to {between(lowest)} in the first steps" in text
    assert all(row.index(min(row)) < 8 for row in ratios.values())
    assert f"lowest in the last layer, then rise to {between(last)}; the biases are grey" in text
    assert min(ratios, key=lambda name: min(ratios[name])) == list(ratios)[-1] == "output.weight"
    assert all(name.endswith("weight") for name in ratios)


def test_what_the_page_on_several_processes_counts() -> None:
    resnet = MODELS["resnet50"]
    text = (DOCS / "distributed.md").read_text("utf-8").replace("\n", " ")
    assert f"all of ResNet-50's {resnet.tensors} tensors under FSDP2" in text
    assert (
        f"one all-reduce of {(8 * resnet.tensors + 8) / 1e3:.1f} kB a step; their gradients, which torch reduces, are {4 * resnet.elements / 1e6:.0f} MB"
        in text
    )
    measured = find(STORED, "distributed", "cpu")
    assert measured is not None and {row.bytes_moved for row in measured.rows} == {None, 8 * resnet.tensors + 8}


# The rest

# A number with a unit, or a number of times.
UNIT = r"ms|us|s|GB/s|GB|MB|MiB|kB|GiB|%|points?|seconds?|minutes?|hours?|times|steps/s|x(?= faster| as)"
WORDS = "half|twice|two|three|four|five|six|seven|eight|nine|ten|twenty|a hundred|a thousand|a third|a quarter|several"
FIGURE = re.compile(
    rf"(?<![\w.])[0-9][0-9.,]*(?:e-?[0-9]+)?\s?(?:{UNIT})(?![\w])|\b(?:{WORDS})(?: an?)? (?:seconds?|minutes?|hours?|times)\b"
)

# Those that nobody measured, or that a test holds: page, the figure, what holds it.
GROUNDS = {
    ("README.md", "30 %"): "advice, from the recipes",
    ("bytes.md", "five times"): "arithmetic; bytes.svg is held by test_benchmarks",
    ("bytes.md", "1 MiB"): "a constant of fused_cpu.py; test_fused_cpu_memory::test_no_temporary_above_4_mib",
    ("dialects.md", "1 MiB"): "a constant of norms.py; test_norms::test_joint_norm_on_cpu_in_pieces",
    ("dialects.md", "64 MiB"): "a constant of norms.py; test_side_effects::test_temporaries_fit_a_bucket",
    ("distributed.md", "1.3 kB"): "above",
    ("distributed.md", "102 MB"): "above",
    ("index.md", "five minutes"): "a promise",
    ("modes.md", "eight times"): "a default of torch 2.4: cache_size_limit of its compiler",
    ("recipes.md", "75.9 %"): "published: MLPerf, its source is named there",
    ("reliability.md", "three times"): "a constant of test_fuzz_state_dicts",
    ("reliability.md", "five minutes"): "how long a command takes, for orientation",
    ("reliability.md", "ten minutes"): "an argument of the command",
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
    if page.name in ("performance.md", "table.md", "study.md") or page.parent.name == "study":
        return ""  # compared as a whole, those of the study by its own tests
    text = page.read_text("utf-8")
    for begin, end in ((render.BEGIN, render.END), ("```{}", "```")):
        first, last = (re.escape(line).replace(r"\{\}", r"[^\n]*") for line in (begin, end))
        text = re.sub(f"^{first}$.*?^{last}$", "", text, flags=re.DOTALL | re.MULTILINE)
    return " ".join(text.splitlines())
