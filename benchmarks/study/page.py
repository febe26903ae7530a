"""docs/study.md, written from a store: every figure on the page comes from there, the sentences with figures too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from . import figure
from .methods import AT_LARGEST, BATCH_NORM, CLIP, CUT, FAMILY, MAIN, ONE_LR, OWN_LR, PROTOCOLS, SHARED, Row, batches
from .outcome import Outcome, study
from .report import LARS, LARS_NORM, LARS_ONE_LR, WITHIN, Difference, cells, comparisons, plateau_words, rival
from .store import Store

NAME = "study.md"
PICTURES = "study"
WIDER = 5.0  # points of the best
HEAD = """\
<!-- Written by `python -m benchmarks.study --render` from benchmarks/results/study.csv; edit benchmarks/study/page.py. -->

# A large-batch study
"""
QUESTION = """\
At a fixed number of epochs, how does accuracy fall as the batch grows, and how narrow is the lr that works? Five methods, four
batches, an equal search for each: [the protocol](#the-protocol) was fixed first.
"""
CONCLUSION = """\
None of this says that only LARS can do it. Nado et al., *A Large Batch Optimizer Reality Check*
([arXiv 2102.06356](https://arxiv.org/abs/2102.06356)), tuned Nesterov momentum on ResNet-50 and Adam on BERT, with all their knobs,
at the batches for which LARS and LAMB were made, and matched both. Here each method has one searched knob and a small budget, the
network is small and the data are digits, and the biases' lr of 0.1 is the one that this repository's demo had used on other digits.
Longer warm-up, other betas or another threshold may close the gaps.

**When LARS is worth it.** Where the epochs are given and the batch is so large that only tens of steps are left, and above all in a
network without normalisation. At batch 256 nothing is gained; at 4096 and 8192 LARS is a few points ahead of AdamW and of clipping,
with batch-norm by less. Plain SGD's ties at larger batches, with intervals of tens of points, are seeds of which some fail and some do
not. The lr that works becomes narrow for everyone: LARS's plateau is as wide as clipping's, and at batch 256 narrower than AdamW's.

**What it takes.** LARS's lr is not for the biases: with one lr for all tensors it falls behind AdamW and clipping. Give the tensors that
are not adapted an lr of their own (`param_groups(..., bias_lr=0.1)`), or adapt them too, which here is as good and has no
second knob. LARC gives up little, and hardly minds its lr; with timm's coefficient its clipping leaves steps that are too small for so
few of them. With lr inside the momentum (`paper`, `simclr`) and this few steps, the default is better.
"""


def write(store: Store, folder: Path, conclusion: str = "") -> str:
    """The page, and its pictures in a folder beside it; says what was written.

    Args:
        store: What it is made from.
        folder: Where it goes.
        conclusion: What a reader makes of it, without figures: of the committed store, CONCLUSION, which a test holds to it.
    """
    outcome = recorded(store)
    pictures = figure.draw(outcome, folder / PICTURES)
    (folder / NAME).write_text(text(outcome, store, pictures, conclusion), encoding="utf-8")
    return f"{folder / NAME}, and {', '.join(name for name, _ in pictures)} in {folder / PICTURES}"


def text(outcome: Outcome, store: Store, pictures: Sequence[tuple[str, str]], conclusion: str) -> str:
    parts = [HEAD, *_came_out(outcome), *([conclusion] if conclusion else []), *_pictures(pictures)]
    return "\n".join([*parts, *_tables(outcome), *_protocol(), *_repeat(store)])


def recorded(store: Store) -> Outcome:
    """What the store holds, searched again; StoreError if a run is missing or not of the study."""
    at = batches(store.protocol, int(store.origin["train_images"]))
    outcome = study(store.protocol, at, lambda _, runs: store.results(runs))
    store.only(outcome.runs())
    return outcome


def _came_out(outcome: Outcome) -> Iterator[str]:
    quick = outcome.protocol is PROTOCOLS["quick"]
    yield (
        "**A quick run: it proves that the program works, and says nothing about the optimizers.**\n"
        if quick
        else QUESTION
    )
    largest = outcome.largest
    places = {
        f"batch {batch}": dict(comparisons(outcome, LARS, _rivals(outcome, batch), batch)) for batch in outcome.batches
    }
    places[f"{largest}, batch-norm"] = dict(comparisons(outcome, LARS_NORM, BATCH_NORM, largest))
    met = [(place, other, gap) for place, gaps in places.items() for other, gap in gaps.items()]
    yield f"""\
## What came out

In brackets and in the table: LARS minus the other, in points of test accuracy, mean and 95 % interval of {_seeds(outcome)} paired seeds.
"""
    one_lr = dict(comparisons(outcome, LARS_ONE_LR, ONE_LR, largest))
    yield _share("loses", "worse", met)
    yield f"- **With one lr for all tensors**, batch {largest}, LARS is {_by_verdict(one_lr)}."
    yield _share("ties", "tie", met)
    family = dict(comparisons(outcome, LARS, FAMILY, largest))
    yield f"- **In its family**, batch {largest}, LARS's default is {_by_verdict(family)}."
    failed = [
        f"{row.name} at batch {batch}{' with batch-norm' if row.method.batch_norm else ''}"
        for batch in outcome.batches
        for row in (*MAIN, *AT_LARGEST, *BATCH_NORM)
        if (batch, row.method) in outcome.grids and outcome.failed(batch, row)
    ]
    yield f"- **Failed rows**, with a best lr on the edge of the largest grid: {'; '.join(failed) or 'none'}."
    yield f"- **LARS wins** in {sum(gap.verdict == 'better' for _, _, gap in met)} of {len(met)} comparisons:"
    yield ""
    yield from _table(
        ["method", *places],
        [[row.name, *(_cell(gaps, row.name) for gaps in places.values())] for row in MAIN if row is not LARS],
    )
    yield "**The lr plateau**, as the factor between its ends:\n"
    widths = [(outcome.batches[0], WITHIN, ""), (largest, WITHIN, ""), (largest, WIDER, " (added after the run)")]
    yield from _table(
        ["method", *(f"batch {batch}, within {within:g}{_points(within)}{note}" for batch, within, note in widths)],
        [[row.name, *(plateau_words(outcome.grids[b, row.method], w) for b, w, _ in widths)] for row in MAIN],
    )


def _share(title: str, verdict: str, met: Sequence[tuple[str, Row, Difference]]) -> str:
    found = [m for m in met if m[2].verdict == verdict]
    return f"- **LARS {title}** in {len(found)} of {len(met)} comparisons{_listed(found)}."


def _points(within: float) -> str:
    return " point" if within == 1 else " points"


def _cell(gaps: dict[Row, Difference], name: str) -> str:
    found = [(row, gap) for row, gap in gaps.items() if row.name == name]
    return "; ".join(
        f"{gap}{'' if gap.verdict == 'better' else f', {gap.verdict}'}{' (one lr)' if row in ONE_LR else ''}"
        for row, gap in found
    )


def _rivals(outcome: Outcome, batch: int) -> list[Row]:
    found = [rival(outcome, batch, row) for row in MAIN if row is not LARS]
    return [row for row in found if row is not None]


def _seeds(outcome: Outcome) -> int:
    return len(outcome.protocol.test_seeds)


def _listed(met: Sequence[tuple[str, Row, Difference]]) -> str:
    by_place: dict[str, list[str]] = {}
    for place, other, gap in met:
        variant = ", one lr for all" if other in ONE_LR else ""
        by_place.setdefault(place, []).append(f"{other.name}{variant} ({gap})")
    return "".join(f"; {place}: {', '.join(others)}" for place, others in by_place.items()).replace("; ", ": ", 1)


def _by_verdict(gaps: dict[Row, Difference]) -> str:
    parts = []
    for verdict, words in (("worse", "worse than"), ("tie", "tied with"), ("better", "better than")):
        if found := [f"{other.name} ({gap})" for other, gap in gaps.items() if gap.verdict == verdict]:
            parts.append(f"{words} {', '.join(found)}")
    return "; ".join(parts) or "not compared: it failed"


def _pictures(pictures: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield from (f"![{words}]({PICTURES}/{name})\n" for name, words in pictures)


COLUMNS = ("knobs", "trials", "lr", "plateau", "valid.", "test", "lowest to highest")


def _tables(outcome: Outcome) -> Iterator[str]:
    yield f"""\
## The tables

Accuracy in percent. knobs: how many beyond momentum, decay and schedule, the searched lr among them. plateau: the factor between the
ends of the range of lrs within {WITHIN:g} point of the best. valid.: mean of the search seeds at the best lr. test: mean of
{_seeds(outcome)} fresh seeds.

Table 1: every batch, own lr for the biases.
"""
    yield from _table(
        ["batch", "steps", "method", *COLUMNS],
        [
            [str(batch), str(outcome.steps(batch)), row.name, *cells(outcome, batch, row)]
            for batch in outcome.batches
            for row in MAIN
        ],
    )
    batch = outcome.largest
    yield f"Table 2: the rest of LARS's family at batch {batch}, and one lr for all tensors.\n"
    rows = [("LARS, default (table 1)", LARS), *((row.name, row) for row in FAMILY)]
    rows += [(f"{row.name}, one lr for all", row) for row in ONE_LR]
    gaps = dict(comparisons(outcome, LARS, [row for _, row in rows], batch))
    yield from _table(
        ["method", *COLUMNS, "LARS minus it"],
        [
            [name, *cells(outcome, batch, row), _cell({row: gaps[row]}, row.name) if row in gaps else ""]
            for name, row in rows
        ],
    )
    yield f"Table 3: batch {batch}, with batch-norm.\n"
    yield from _table(["method", *COLUMNS], [[row.name, *cells(outcome, batch, row)] for row in BATCH_NORM])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "| " + " | ".join("---" if name == "method" else "---:" for name in header) + " |"
    yield from ("| " + " | ".join(row) + " |" for row in rows)
    yield ""


def _repeat(store: Store) -> Iterator[str]:
    minutes = store.seconds / 2 / 60
    yield f"""\
## Repeat it

    python -m nox -s study -- --data FOLDER    # train; stopped or killed, it goes on where it was
    python -m benchmarks.study --render        # this page and its pictures, from benchmarks/results/study.csv

Every run, with all settings, is a line of `benchmarks/results/study.csv`: {len(store)} runs, which took {minutes:.0f} minutes in two
processes of one thread each, with torch {store.origin["torch"]}; data: {store.origin["data"]} (the start of the files' SHA-256). A test
searches them again by the protocol's rules, and fails if a run is missing or too many, or if this page says
anything else than they do.
"""


def _protocol() -> Iterator[str]:
    """What was fixed before the first full run."""
    fixed = PROTOCOLS["1"]
    at = batches(fixed, CUT.train)
    seeds = ", ".join(map(str, fixed.search_seeds)), ", ".join(map(str, fixed.test_seeds))
    yield f"""\
## The protocol

It was written down before the first full run, as the history of this file shows. Single runs with another seed and other numbers
of steps had shown where to begin each grid. A first start was stopped after two minutes, when seeds were seen to differ by tens of
points, and a third search seed added; nothing else was changed. It is the same for every method unless a line says otherwise.

**Data.** MNIST-format files. {CUT.train} of the training images train, {CUT.validation} others choose the lr, and the files' test
images are the test. The images are halved to 14 x 14 pixels, by averaging, so that the study takes about an hour on two cores;
pixels are standardised with mean and deviation of those that train.

**Network.** Two convolutions of 3 x 3 and stride 2 with 8 and 16 channels, two linear layers, ReLU; cross-entropy. It has no
normalisation layers, which leaves an optimizer less room for error; table 3 repeats the largest batch with batch-norm after each
convolution.

**Training.** {fixed.epochs} epochs at batches of {", ".join(map(str, at))}: {_steps(at, fixed.epochs)} steps.
Linear warm-up over {fixed.warmup_epochs} epoch, then polynomial decay with power 2 to 0, of all lrs alike. Momentum
{fixed.momentum:g} (AdamW: betas 0.9 and 0.999). Weight decay {fixed.weight_decay:g} on weights (AdamW: its own, decoupled one), none
on biases and norms, which LARS does not adapt. A seed sets the initial weights and the order of the images, alike for all methods
and lrs. One thread a run, float32.

**Methods, table 1.** {"; ".join(row.name for row in MAIN)}.

**Knobs.** Searched: the lr of the weights, for every method. LARS's biases cannot take its lr, so they have their own, and then so
have everyone's: {OWN_LR["SGD"]:g} for the SGDs and LARS, {OWN_LR["AdamW"]:g} for AdamW, customary values that are not searched.
Clipping has one knob more, its threshold: {CLIP:g} for the norm of all gradients, the customary value, not searched. LARS has
`trust_coefficient`, which multiplies lr and stays at its default.

**The other tables, at batch {at[-1]}.** Table 2: {"; ".join(row.name for row in FAMILY)}; and the methods of table 1 with one
lr for all tensors. Dialects that differ in eps alone share a row ({_shared()}). Table 3: the methods of table 1 in the network
with batch-norm.

**The lr.** A first grid of {fixed.first_trials} lrs, a factor of 2 apart. It moves until the best has {fixed.neighbours} tried
neighbours on either side; then one lr more on either side of the best, a factor of 1.4 from it. At a batch, every method of tables
1 and 2 gets the same number of trials (those of table 3 among themselves): where one grid must move, all others grow. No grid grows
past {fixed.most_trials} lrs before the last two; a best without its neighbours then is a failed row, which the tables say and the
test never sees. The best is that with the highest mean validation accuracy of seeds {seeds[0]}; between equals the lower loss
decides. A run whose loss is no longer finite ends there and counts as it is.

**The test.** {len(fixed.test_seeds)} fresh seeds, {seeds[1]}, at the chosen lr. Only these runs read the test images, once each, when
they have ended.

**What counts as what.** Two methods are compared seed by seed, which share weights and order: the mean of the
{len(fixed.test_seeds)} differences and its 95 % interval (Student's t). *Better* or *worse* is an interval without 0, all else is a
*tie*; with this many comparisons, one in twenty is chance. At batch {at[-1]}, LARS meets each of the others in the variant, own
lr for the biases or one lr for all, that is better on validation; LARS itself is that of table 1. The lr *plateau* is the range of tried lrs around the best whose mean
validation accuracy is within 1 point of it, none left out; "at least" where it reaches the grid's edge.
"""


def _steps(at: Sequence[int], epochs: int) -> str:
    *first, last = [str(epochs * CUT.train // batch) for batch in at]
    return f"{', '.join(first)} and {last}"


def _shared() -> str:
    return "; ".join(", ".join(names) for names in SHARED.values())
