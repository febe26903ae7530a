"""Each dialect is the LARS that it is named after, and differs from it where its entry says so."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import dialects_table
import sources
from fastlars import DIALECTS, LARS
from fastlars.dialects import ABOUT
from fastlars.options import NAMES
from harness import loop_over
from reference import Array, norm, to_array
from sources import SOURCES, Direction, M, Momentum, Source, torch_sgd

# lr changes, so that its place shows, and exceeds 1, so that all clips show
LRS = (0.5, 2.0, 0.25, 0.0, 1.5, 0.1, 3.0)
RNG = np.random.default_rng(0)
W = RNG.standard_normal((3, 5))
GRADS = RNG.standard_normal((len(LRS), 3, 5))

# tensors of one run: initial values, and the gradient of each step
TENSORS: dict[str, tuple[Array, Array]] = {
    "dense": (W, GRADS),
    "small gradient": (W, 1e-3 * GRADS),
    "opposite gradient": (W, -0.05 * W * (1 + 0.1 * GRADS)),  # |g + decay * w| far from |g| + decay * |w|
    "zero parameter": (0 * W, GRADS),
    "zero gradient": (W, 0 * GRADS),
    "zero gradient at times": (W, GRADS * (np.arange(len(LRS)) % 3 != 0)[:, None, None]),
}


def ours(w: Array, grads: Array, lrs: Sequence[float] = LRS, **options: Any) -> list[tuple[Array, Array]]:
    """Parameter and buffer after each step, starting from a copy of w."""
    param = torch.nn.Parameter(torch.tensor(w))
    optimizer = LARS([param], lr=1.0, momentum=M, **options)
    states = []
    for g, lr in zip(grads, lrs, strict=True):
        param.grad = torch.tensor(g)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        states.append((to_array(param), to_array(optimizer.state[param]["momentum_buffer"])))
    return states


def theirs(
    source: Source, w: Array, grads: Array, decay: float, c: float, nesterov: bool = False
) -> list[tuple[Array, Array]]:
    v = None
    states = []
    for g, lr in zip(grads, LRS, strict=True):
        w, v = source.momentum(w, source.direction(w, g, lr, decay, c), v, lr, nesterov, 0.0)
        states.append((w, v))
    return states


def assert_equal(ours: list[tuple[Array, Array]], theirs: list[tuple[Array, Array]], where: str) -> None:
    for step, states in enumerate(zip(ours, theirs, strict=True)):
        for what, one, other in zip(("parameter", "buffer"), *states, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-13, err_msg=f"{where}: {what} after step {step}")


def test_every_row_says_something_new_and_has_a_source() -> None:
    assert DIALECTS.keys() == ABOUT.keys() == {source.dialect for source in SOURCES.values()}
    assert all(options.keys() <= set(NAMES) - {"lr"} for options in DIALECTS.values())
    assert len({tuple(sorted(options.items())) for options in DIALECTS.values()}) == len(DIALECTS)


@pytest.mark.parametrize(
    ("name", "nesterov"),
    [
        (name, nesterov)
        for name, source in SOURCES.items()
        for nesterov in (False, True)
        if source.nesterov or not nesterov
    ],
)
def test_a_row_is_the_formula_of_its_source(name: str, nesterov: bool) -> None:
    source = SOURCES[name]
    row = DIALECTS[source.dialect]
    # ratios on either side of lr, so that a clip shows, and the dialect's own coefficient
    for c in (0.1, 5.0, row.get("trust_coefficient", 0.001)):
        for decay, implementation in ((0.05, {"foreach": False}), (1e-4, {"foreach": True}), (0.05, {"fused": True})):
            options = {**row, "trust_coefficient": c, "weight_decay": decay, "nesterov": nesterov}
            for kind, (w, grads) in TENSORS.items():
                if kind not in source.differs_on:
                    expected = theirs(source, w, grads, decay, c, nesterov)
                    assert_equal(ours(w, grads, **options, **implementation), expected, f"{kind}, {c=}, {decay=}")


@loop_over("source", SOURCES.values())
def test_without_weight_decay_a_row_adapts_what_its_source_adapts(source: Source) -> None:
    options = {**DIALECTS[source.dialect], "trust_coefficient": 0.1}
    options.setdefault("adapt", False)  # as None means here, except that the first step would warn
    assert_equal(ours(W, GRADS, **options), theirs(source, W, GRADS, 0.0, 0.1), "no decay")


@loop_over("dialect", DIALECTS)
def test_a_group_that_is_not_adapted_stays_so_in_every_row(dialect: str) -> None:
    param = torch.nn.Parameter(torch.tensor(W))
    optimizer = LARS([{"params": [param], "adapt": False}], lr=0.5, momentum=M, **DIALECTS[dialect])
    param.grad = torch.tensor(GRADS[0])
    optimizer.step()
    np.testing.assert_allclose(to_array(param), W - 0.5 * GRADS[0], rtol=1e-14)


# ---------------------------------------------------------------- where a source differs from its row
class Difference(NamedTuple):
    dialect: str
    direction: Direction
    w: Array
    g: Array
    theirs: Array  # after one step
    ours: Array
    dampening: float = 0.0
    momentum: Momentum = torch_sgd


LR, DECAY, C = 2.0, 0.05, 0.1
G = GRADS[0]


def adapted(w: Array, g: Array) -> Array:
    return w - LR * C * norm(w) / (norm(g) + DECAY * norm(w)) * (g + DECAY * w)


DIFFERENCES: dict[str, Difference] = {
    "timm zero gradient": Difference("bolts", sources.timm, W, 0 * G, theirs=W - LR * DECAY * W, ours=W),
    "torchlars zero gradient": Difference("torchlars", sources.torchlars, W, 0 * G, theirs=W - LR * DECAY * W, ours=W),
    "solo-learn vectors": Difference(
        "torchlars", sources.solo_learn_excluding, W[0], G[0], theirs=W[0] - LR * G[0], ours=adapted(W[0], G[0])
    ),
    "pytorch_optimizer vectors": Difference(
        "pytorch_optimizer", sources.pytorch_optimizer, W[0], G[0], theirs=W[0] - LR * G[0], ours=adapted(W[0], G[0])
    ),
    "pytorch_optimizer zero gradient": Difference(
        "pytorch_optimizer", sources.pytorch_optimizer, W, 0 * G, theirs=W - LR * C * W, ours=W
    ),
    "pytorch_optimizer first step": Difference(
        "pytorch_optimizer", sources.pytorch_optimizer, W, G, theirs=W + 0.75 * (adapted(W, G) - W), ours=adapted(W, G),
        dampening=0.25, momentum=sources.from_zeros,
    ),
    "paper zero parameter": Difference("paper", sources.paper, 0 * W, G, theirs=0 * W, ours=-LR * G),
    "paper zero gradient": Difference("paper", sources.paper, W, 0 * G, theirs=W - LR * C * W, ours=W),
    "mlperf zero gradient": Difference("mlperf", sources.mlperf, W, 0 * G, theirs=W - LR * DECAY * W, ours=W),
    "timm_larc zero gradient": Difference("timm_larc", sources.timm_larc, W, 0 * G, theirs=W - DECAY * W, ours=W),
    "timm_larc zero parameter": Difference("timm_larc", sources.timm_larc, 0 * W, G, theirs=-G, ours=-LR * G),
}  # fmt: skip


def test_every_difference_in_the_table_is_tested_here() -> None:
    told = [(dialect, case) for dialect, about in ABOUT.items() for case in about.differs]
    assert sorted(told) == sorted((difference.dialect, case) for case, difference in DIFFERENCES.items())


@loop_over("difference", DIFFERENCES.values())
def test_a_source_differs_as_its_row_says(difference: Difference) -> None:
    w, g, dampening = difference.w, difference.g, difference.dampening
    d = difference.direction(w, g, LR, DECAY, C)
    np.testing.assert_allclose(difference.momentum(w, d, None, LR, False, dampening)[0], difference.theirs, rtol=1e-12)
    options = {**DIALECTS[difference.dialect], "weight_decay": DECAY, "trust_coefficient": C, "dampening": dampening}
    ((stepped, _),) = ours(w, g[None], [LR], **options)
    np.testing.assert_allclose(stepped, difference.ours, rtol=1e-7)  # written without eps, which some dialects have


# ---------------------------------------------------------------- the page
def test_the_page_shows_these_rows() -> None:
    shown = dialects_table.PAGE.read_text(encoding="utf-8")
    assert shown == dialects_table.page(), "run: python tests/dialects_table.py"
    assert all(f"`{name}`" in shown for name in DIALECTS)
