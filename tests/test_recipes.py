"""Each recipe is what its authors published, every value can be overridden by name, and it trains or warns with the fix."""

import warnings
from typing import Any, NamedTuple

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import recipes_table
from fastlars import LARS, recipes
from fastlars.options import NAMES
from recipes_table import RUNS, build


class Published(NamedTuple):
    """From the sources that the docstrings name, written down separately from the recipes."""

    lrs: tuple[float, float]  # of weights, and of biases and normalisation
    momentum: float
    weight_decay: float
    joint: bool
    lr_in_momentum: bool
    warmup_steps: int
    total_steps: int
    eps: float = 0.0
    cosine: bool = True
    end_factor: float = 0.0


PUBLISHED: dict[str, Published] = {
    "mlperf": Published(
        (21.2, 21.2), 0.94, 2.5e-5, False, True, 16 * 40, 16 * 40 + 2267, eps=1e-7, cosine=False, end_factor=1e-4 / 21.2
    ),
    "simclr": Published((4.8, 4.8), 0.9, 1e-6, True, True, 3120, 31200),
    "byol": Published((3.2, 3.2), 0.9, 1.5e-6, True, False, 3120, 312000),
    "barlow_twins": Published((1.6, 0.0384), 0.9, 1e-6, True, False, 6250, 625000, end_factor=0.001),
    "vicreg": Published((1.6, 1.6), 0.9, 1e-6, True, False, 6250, 625000, end_factor=0.001),
    "moco_v3": Published((9.6, 9.6), 0.9, 1e-6, True, False, 3120, 31200),
    "mae_probe": Published((6.4, 6.4), 0.9, 0.0, True, False, 780, 7020),
}
# a run: recipe, arguments, and the lr, weight decay, warm-up and total steps published for it
OTHER_RUNS: list[tuple[str, dict[str, int], tuple[float, float, int, int]]] = [
    ("byol", {"epochs": 300}, (4.8, 1e-6, 3120, 93600)),
    ("byol", {"epochs": 100}, (7.2, 1e-6, 3120, 31200)),
    ("moco_v3", {"epochs": 300}, (4.8, 1e-6, 3120, 93600)),
    ("moco_v3", {"epochs": 1000}, (4.8, 1.5e-6, 3120, 312000)),
    ("vicreg", {"epochs": 100, "batch_size": 512, "steps_per_epoch": 2502}, (0.6, 1e-6, 25020, 250200)),
    ("simclr", {"batch_size": 256, "steps_per_epoch": 5004}, (0.3, 1e-6, 50040, 500400)),
    ("mlperf", {"batch_size": 4096, "steps_per_epoch": 313}, (10.0, 2e-4, 1565, 14702)),
    ("mlperf", {"batch_size": 65536, "steps_per_epoch": 20}, (24.699, 1e-4, 620, 1753)),
    # unpublished, so the nearest by ratio
    ("byol", {"epochs": 200}, (4.8, 1e-6, 3120, 62400)),
    ("mlperf", {"batch_size": 16384, "steps_per_epoch": 79, "epochs": 50}, (14.339, 2.5e-5, 711, 3950)),
]


def shape_of(scheduler: Any) -> tuple[int, int]:
    warmup, total, _, _ = scheduler.lr_lambdas[0].args
    return warmup, total


def test_every_recipe_is_checked() -> None:
    assert list(PUBLISHED) == list(RUNS) and set(RUNS) == set(recipes.__all__)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_the_published_one(name: str) -> None:
    published = PUBLISHED[name]
    optimizer, scheduler = build(name)
    assert isinstance(optimizer, LARS)
    adapted, rest = optimizer.param_groups
    assert (adapted["initial_lr"], rest["initial_lr"]) == pytest.approx(published.lrs, rel=1e-12)
    assert (adapted["adapt"], rest["adapt"]) == (True, False)
    assert (adapted["weight_decay"], rest["weight_decay"]) == (published.weight_decay, 0.0)
    for group in (adapted, rest):
        assert group["momentum"] == published.momentum and group["trust_coefficient"] == 0.001
        assert (group["trust_denominator"] == "joint") == published.joint
        assert group["lr_in_momentum"] == published.lr_in_momentum and group["eps"] == published.eps
        assert not group["nesterov"] and group["dampening"] == 0 and not group["trust_clip"]

    factor = scheduler.lr_lambdas[0]
    warmup, total = published.warmup_steps, published.total_steps
    assert factor(warmup - 1) == factor(warmup) == 1.0 and factor(warmup // 2 - 1) == pytest.approx(0.5)
    assert factor((warmup + total) // 2) == pytest.approx(
        published.end_factor + (1 - published.end_factor) * (0.5 if published.cosine else 0.25), rel=1e-3
    )
    assert factor(total - 1) == pytest.approx(published.end_factor, rel=0.1, abs=1e-5) and factor(total - 2) > factor(
        total - 1
    )


@pytest.mark.parametrize(("name", "run", "expected"), OTHER_RUNS)
def test_values_that_depend_on_batch_and_epochs(
    name: str, run: dict[str, int], expected: tuple[float, float, int, int]
) -> None:
    optimizer, scheduler = build(name, **run)
    adapted = optimizer.param_groups[0]
    assert adapted["initial_lr"] == pytest.approx(expected[0], rel=1e-4)
    assert (adapted["weight_decay"], *shape_of(scheduler)) == expected[1:]


# ---------------------------------------------------------------- every value by name
@pytest.mark.parametrize("name", RUNS)
def test_every_value_can_be_given(name: str) -> None:
    given: dict[str, Any] = {
        "lr": 2.0, "bias_lr": 0.25, "weight_decay": 0.125, "momentum": 0.5, "eps": 1e-3, "trust_coefficient": 0.02,
        "trust_clip": True, "lr_in_momentum": True, "trust_denominator": "separate", "skip_nonfinite": True,
        "kahan_sum": True,
    }  # fmt: skip
    assert {*NAMES, *given} <= {*recipes.Values.__annotations__, "adapt"}
    optimizer, scheduler = build(name, **given, warmup_epochs=0.5, end_factor=0.25, epochs=20, steps_per_epoch=10)
    adapted, rest = optimizer.param_groups
    assert (adapted["initial_lr"], rest["initial_lr"]) == (2.0, 0.25)
    for key in given.keys() - {"lr", "bias_lr", "weight_decay"}:
        assert adapted[key] == rest[key] == given[key], key
    assert adapted["weight_decay"] == 0.125
    assert shape_of(scheduler) == (5, 200) and scheduler.lr_lambdas[0](200) == 0.25


def test_groups_and_dialect_can_be_given() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    optimizer, _ = build("simclr", model, exclude_from_adaptation="2.*", dialect="paper")
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 5]
    assert optimizer.param_groups[0]["trust_denominator"] == "separate"
    optimizer, _ = build("byol", model, adapt=lambda name, param: "2." in name)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]
    lr = torch.tensor(4.0)
    optimizer, _ = build("mlperf", model, lr=lr, power=1.0)
    assert optimizer.param_groups[0]["lr"] is lr and float(lr) == pytest.approx(4.0 / 640)


@pytest.mark.parametrize(
    ("name", "values", "error", "message"),
    [
        ("simclr", {"weight_deacy": 0.1}, TypeError, "simclr: 'weight_deacy' is not a value .* did you mean 'weight_decay'"),
        ("simclr", {"warmup": 5}, TypeError, "'warmup' is not a value of a recipe; did you mean 'warmup_epochs'"),
        ("simclr", {"eta": 0.1}, TypeError, "'eta' is called trust_coefficient here"),
        ("simclr", {"power": 2.0}, TypeError, "'power' is not a value of a recipe"),  # not for a cosine
        ("byol", {"momentum": -1.0}, ValueError, "momentum must be a finite number >= 0, got -1.0"),
        ("byol", {"epochs": 10}, ValueError, "byol: the warm-up of 10 epochs, 3120 steps, must be shorter .* warmup_epochs"),
        ("moco_v3", {"epochs": 0}, ValueError, "must be > 0, got 0"),
        ("mlperf", {"batch_size": 0}, ValueError, "must be > 0, got 0"),
        ("simclr", {"batch_size": -1}, ValueError, "batch_size must be > 0, got -1"),
        ("simclr", {"steps_per_epoch": 312.5}, TypeError, "total_steps must be a whole number of optimizer steps"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(name: str, values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(name, **values)


# ---------------------------------------------------------------- it trains
@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_trains_or_warns_with_the_way_out(name: str) -> None:
    """60 steps at the published lr, digits in one batch. Barlow Twins sets the lr of biases that the others warn about."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)

    def accuracy(norm: bool, **values: Any) -> float:
        torch.manual_seed(0)
        layers = [nn.Linear(64, 64), *([nn.BatchNorm1d(64)] if norm else []), nn.ReLU(), nn.Linear(64, 10)]
        model = nn.Sequential(*layers)
        optimizer, scheduler = build(name, model, epochs=60, steps_per_epoch=1, warmup_epochs=6, **values)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            scheduler.step()
        model.eval()
        return float((model(images).argmax(1) == labels).float().mean())

    assert accuracy(norm=True) > 0.85
    if name == "barlow_twins":
        assert accuracy(norm=False) > 0.75
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accuracy(norm=False)
    assert [warning.filename for warning in caught] == [recipes_table.__file__]  # the file that calls the recipe
    assert all(way_out in str(caught[0].message) for way_out in ("bias_lr=0.1", 'bias_lr="same"'))
    assert accuracy(norm=False, bias_lr=0.1) > 0.75


# ---------------------------------------------------------------- the page
def test_the_page_shows_what_the_recipes_build() -> None:
    shown = recipes_table.PAGE.read_text(encoding="utf-8")
    assert shown == recipes_table.page(), "run: python tests/recipes_table.py"
