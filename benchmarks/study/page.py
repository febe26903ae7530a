"""docs/study.md, written from a store: every figure on the page comes from there, the sentences with figures too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .methods import CLIP, CUT, FAMILY, MAIN, OWN_LR, PROTOCOLS, SHARED
from .outcome import Outcome, study
from .store import Store

NAME = "study.md"
HEAD = """\
<!-- Written by `python -m benchmarks.study --render` from benchmarks/results/study.csv; edit benchmarks/study/page.py. -->

# A large-batch study
"""
QUESTION = """\
At a fixed number of epochs, how does accuracy fall as the batch grows, and how narrow is the lr that works?
"""


def text(outcome: Outcome | None, store: Store | None) -> str:
    parts = [HEAD, QUESTION]
    if outcome is None or store is None:
        parts.append("Not run yet.\n")
    parts.append(protocol())
    return "\n".join(parts)


def write(store: Store, folder: Path) -> str:
    """The page and its pictures; says what was written."""
    outcome = recorded(store)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(text(outcome, store), encoding="utf-8")
    return f"{folder / NAME}"


def recorded(store: Store) -> Outcome:
    """What the store holds, searched again; StoreError if a run is missing or not of the study."""
    train_images = int(store.origin["train_images"])
    outcome = study(
        store.protocol, tuple(train_images // part for part in CUT.parts), lambda _, runs: store.results(runs)
    )
    store.only(outcome.runs())
    return outcome


def protocol() -> str:
    """What was fixed before the first full run."""
    return "\n".join(_protocol())


def _protocol() -> Iterator[str]:
    fixed = PROTOCOLS["1"]
    batches = [CUT.train // part for part in CUT.parts]
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

**Training.** {fixed.epochs} epochs at batches of {", ".join(map(str, batches))}: {_steps(batches, fixed.epochs)} steps.
Linear warm-up over {fixed.warmup_epochs} epoch, then polynomial decay with power 2 to 0, of all lrs alike. Momentum
{fixed.momentum:g} (AdamW: betas 0.9 and 0.999). Weight decay {fixed.weight_decay:g} on weights (AdamW: its own, decoupled one), none
on biases and norms, which LARS does not adapt. A seed sets the initial weights and the order of the images, alike for all methods
and lrs. One thread a run, float32.

**Methods, table 1.** {"; ".join(row.name for row in MAIN)}.

**Knobs.** Searched: the lr of the weights, for every method. LARS's biases cannot take its lr, so they have their own, and then so
have everyone's: {OWN_LR["SGD"]:g} for the SGDs and LARS, {OWN_LR["AdamW"]:g} for AdamW, customary values that are not searched.
Clipping has one knob more, its threshold: {CLIP:g} for the norm of all gradients, the customary value, not searched. LARS has
`trust_coefficient`, which multiplies lr and stays at its default.

**The other tables, at batch {batches[-1]}.** Table 2: {"; ".join(row.name for row in FAMILY)}; and the methods of table 1 with one
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
*tie*; with this many comparisons, one in twenty is chance. At batch {batches[-1]}, LARS meets each of the others in the variant, own
lr for the biases or one lr for all, that is better on validation; LARS itself is that of table 1. The lr *plateau* is the range of tried lrs around the best whose mean
validation accuracy is within 1 point of it, none left out; "at least" where it reaches the grid's edge.
"""


def _steps(batches: list[int], epochs: int) -> str:
    *first, last = [str(epochs * CUT.train // batch) for batch in batches]
    return f"{', '.join(first)} and {last}"


def _shared() -> str:
    return "; ".join(", ".join(names) for names in SHARED.values())
