"""trust_ratios(): the values that the step uses, at no cost to other steps, and their plot."""

import copy
import itertools
import math
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlars
import pages
from cases import BASE, make_grads, make_params
from fastlars import LARS, param_groups
from harness import implementations, loop_over, set_grads

LAYOUTS = ["matrix", "vector", "conv", "zeros"]


def make(**options: Any) -> tuple[LARS, list[nn.Parameter]]:
    params = make_params(torch.float64, layouts=LAYOUTS)
    named = [(name, param) for name, param in zip(LAYOUTS, params, strict=True)]
    return LARS(named, **{**BASE, **options}), params


class Ops(TorchDispatchMode):
    """Counts every operation of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------- values
@loop_over("decay", [0.05, 0.0])
@loop_over("denominator", ["separate", "joint"])
@loop_over("clip", [False, True])
@implementations
def test_they_are_what_the_step_scales_by(implementation: Any, clip: bool, denominator: str, decay: float) -> None:
    """Without momentum w - w_old = -lr * ratio * (g + decay * w), so the step shows the ratio."""
    optimizer, params = make(
        trust_clip=clip, trust_denominator=denominator, weight_decay=decay, adapt=True, **implementation
    )
    set_grads(params, make_grads("dense", params, 0))
    before = [param.detach().clone() for param in params]
    ratios = optimizer.trust_ratios()
    assert list(ratios) == LAYOUTS
    optimizer.step()
    for name, old, param in zip(LAYOUTS, before, params, strict=True):
        direction = param.grad + decay * old
        seen = (old - param.detach()).norm() / (BASE["lr"] * direction.norm())
        assert ratios[name] == pytest.approx(float(seen), rel=1e-9), name
    assert ratios["zeros"] == 1.0  # not scaled


def test_names_that_two_groups_share_stay_apart() -> None:
    generator, discriminator = nn.Linear(3, 2), nn.Linear(2, 1)
    groups = [group for net in (generator, discriminator) for group in param_groups(net, 0.1, bias_lr="same")]
    optimizer = LARS(groups, lr=1.0)
    for param in (*generator.parameters(), *discriminator.parameters()):
        param.grad = torch.ones_like(param)
    assert list(optimizer.trust_ratios()) == ["weight", "weight (2.0)"]


# ---------------------------------------------------------------- cost
@implementations
def test_steps_without_a_call_cost_nothing(implementation: Any) -> None:
    """A step's operations are the same before and after a call of trust_ratios()."""
    counts = []
    optimizer, params = make(momentum=0.9, **implementation)
    for step in range(4):
        set_grads(params, make_grads("dense", params, step))
        if step == 2:
            optimizer.trust_ratios()
        with Ops() as ops:
            optimizer.step()
        counts.append(ops.count)
    assert counts[1] == counts[2] == counts[3]


@implementations
def test_a_call_changes_and_keeps_nothing(implementation: Any) -> None:
    optimizer, params = make(momentum=0.9, **implementation)
    attributes = set(vars(optimizer))
    for step in range(2):
        set_grads(params, make_grads("dense", params, step))
        tensors = [*params, *(p.grad for p in params), *(v for s in optimizer.state.values() for v in s.values())]
        before = [(tensor._version, tensor.detach().clone()) for tensor in tensors]
        state = copy.deepcopy(optimizer.state_dict())
        first, second = optimizer.trust_ratios(), optimizer.trust_ratios()
        assert first == second and all(type(value) is float for value in first.values())
        assert all(
            t._version == version and torch.equal(t, old) for t, (version, old) in zip(tensors, before, strict=True)
        )
        assert equal(optimizer.state_dict(), state)
        optimizer.step()
        assert {key for state in optimizer.state.values() for key in state} == {"momentum_buffer"}
        assert len(vars(optimizer).keys() - attributes - {"_looked_for_adapted"}) == 0


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(torch.equal(first, second)) if isinstance(first, Tensor) else first == second


# ---------------------------------------------------------------- picture
@pytest.fixture
def plots() -> Any:
    pytest.importorskip("matplotlib", reason="an extra").use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415  an extra

    yield fastlars.plots
    pyplot.close("all")


def cells(ax: Any) -> list[list[Any]]:
    """The colour of each cell in the picture, row by row from the top."""
    (mesh,) = ax.collections
    rows, columns = (size - 1 for size in mesh.get_coordinates().shape[:2])
    colours = mesh.to_rgba(mesh.get_array().reshape(rows, columns))
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # from the top
    return [[tuple(colour) for colour in row] for row in colours]


def legend(ax: Any) -> dict[str, Any]:
    found = ax.get_legend()
    if found is None:
        return {}
    return {t.get_text(): p.get_facecolor() for t, p in zip(found.get_texts(), found.get_patches(), strict=True)}


def names(ax: Any) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def test_rows_columns_and_colours(plots: Any) -> None:
    history = {0: {"a": 1e-4, "b": 1e-3}, 10: {"a": 1e-2, "b": 1e-3}, 40: {"a": 1e-3, "b": 1e-1}}
    ax = plots.trust_ratios(history)
    assert names(ax) == ["a", "b"]
    (mesh,) = ax.collections
    assert mesh.get_coordinates()[0, :, 0].tolist() == [-5, 5, 25, 55]  # half-way between the steps
    seen = cells(ax)
    cmap, scale = mesh.cmap, lambda ratio: (math.log10(ratio) + 4) / 3  # 1e-4 to 1e-1, a log scale
    for row, name in zip(seen, "ab", strict=True):
        for colour, step in zip(row, history, strict=True):
            assert colour == pytest.approx(cmap(scale(history[step][name])), abs=0.01)
    assert legend(ax) == {}
    assert ax.get_xlabel() == "step" and ax.figure.axes[1].get_ylabel() == "trust ratio"


def test_no_ratio_is_grey_and_not_finite_is_red(plots: Any) -> None:
    history = {1: {"w": 1e-3, "late": math.nan}, 2: {"w": math.inf}, 3: {"w": 1e-2, "late": 2e-2}}
    ax = plots.trust_ratios(history, names=["w", "bias", "late"])
    assert names(ax) == ["w", "bias", "late"]
    shown = legend(ax)
    assert list(shown) == ["no ratio: not adapted, or no gradient", "ratio not finite"]
    grey, red = shown.values()
    seen = cells(ax)
    assert [[{grey: "grey", red: "red"}.get(colour, "scale") for colour in row] for row in seen] == [
        ["scale", "red", "scale"],
        ["grey", "grey", "grey"],
        ["red", "grey", "scale"],
    ]


def test_one_step_one_ratio_and_axes_of_the_user(plots: Any) -> None:
    from matplotlib import pyplot  # noqa: PLC0415

    figure, (left, right) = pyplot.subplots(1, 2)
    assert plots.trust_ratios({7: {"w": 0.5}}, ax=right) is right
    assert len(left.collections) == 0 and len(right.collections) == 1
    figure.canvas.draw()


def test_names_are_readable_whatever_their_number(plots: Any) -> None:
    """No names overlap or leave the picture, the first and many others are there, and a dollar sign is not a formula."""
    for count in (1, 30, 80, 300):
        history = {step: {f"encoder.layers.{i}.cost$.weight": 1e-3 * (1 + i) for i in range(count)} for step in (0, 5)}
        ax = plots.trust_ratios(history)
        ax.figure.canvas.draw()
        boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
        assert len(boxes) == count if count <= 80 else len(boxes) == 75
        assert all(above.y0 >= below.y1 - 1 for above, below in itertools.pairwise(boxes))
        assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
        assert ax.get_window_extent().width > 200
        ticks = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(ticks))


@loop_over(
    "history rows message",
    [
        ({}, None, "no ratio to draw in 0 steps and 0 rows; record optimizer.trust_ratios"),
        ({0: {}, 1: {}}, None, "no ratio to draw in 2 steps and 0 rows"),
        ({0: {"a": 1.0}}, ["A"], "no ratio to draw in 1 steps and 1 rows; .* take names from its keys"),
        ({0: {"a": math.nan}}, None, "no ratio to draw"),
        ({5: {"a": 1.0}, 3: {"a": 1.0}}, None, r"the steps of history must increase, got \[5, 3\]"),
    ],
)
def test_histories_without_a_ratio_are_refused(history: Any, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastlars.plots.trust_ratios(history, names=rows)


@pytest.mark.slow
def test_without_matplotlib_the_package_works_and_the_plot_names_it() -> None:
    code = """
import sys
sys.modules["matplotlib"] = sys.modules["triton"] = None  # importing them fails
import torch, fastlars
w = torch.nn.Parameter(torch.ones(3))
w.grad = torch.ones(3)
optimizer = fastlars.LARS([("w", w)], lr=1.0, adapt=True)
optimizer.step()
try:
    fastlars.plots.trust_ratios({0: optimizer.trust_ratios()})
except ImportError as error:
    assert "matplotlib" in str(error), error
else:
    raise AssertionError("drawn without matplotlib")
assert "numpy" not in vars(fastlars.plots)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_tensorboard_shows_what_the_page_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="group pages").use("Agg")
    pytest.importorskip("tensorboard", reason="group pages")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    monkeypatch.chdir(tmp_path)
    Path("page.py").write_text(pages.examples(pages.ROOT / "docs/ratios.md", "python"), encoding="utf-8")
    history = runpy.run_path("page.py")["history"]
    assert list(history) == [0, 100, 200, 300] and Path("ratios.png").stat().st_size > 5000
    events = EventAccumulator("runs/lars").Reload()
    assert set(events.Tags()["scalars"]) == {"trust_ratio/0.weight", "trust_ratio/2.weight"}
    for name in ("0.weight", "2.weight"):
        shown = {event.step: event.value for event in events.Scalars(f"trust_ratio/{name}")}
        assert shown == pytest.approx({step: ratios[name] for step, ratios in history.items()}, rel=1e-6)


def test_sparse_gradients_are_refused_as_in_a_step() -> None:
    w = torch.nn.Parameter(torch.ones(3, 2))
    w.grad = torch.ones(3, 2).to_sparse()
    optimizer = LARS([w], lr=1.0, adapt=True)
    with pytest.raises(RuntimeError, match="LARS needs dense gradients"):
        optimizer.trust_ratios()
