"""The published settings in docs/recipes.md are those of their sources, and what the page builds trains."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastlars import LARS

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
IMAGES = 1_281_167


class Published(NamedTuple):
    """From the sources that the page names, written down apart from it."""

    lrs: tuple[float, ...]  # of weights; of biases and normalisation
    momentum: float
    weight_decay: float
    joint: bool
    lr_in_momentum: bool
    warmup_steps: int
    total_steps: int
    eps: float = 0.0
    cosine: bool = True
    end_factor: float = 0.0


RECIPES: dict[str, Published] = {
    "MLPerf ResNet-50, supervised": Published(
        (21.2, 21.2), 0.94, 2.5e-5, False, True, 16 * 40, 16 * 40 + 2267, eps=1e-7, cosine=False, end_factor=1e-4 / 21.2
    ),
    "SimCLR": Published((4.8, 4.8), 0.9, 1e-6, True, True, 3120, 31200),
    "BYOL": Published((3.2, 3.2), 0.9, 1.5e-6, True, False, 3120, 312000),
    "Barlow Twins: two lrs": Published((1.6, 0.0384), 0.9, 1e-6, True, False, 6250, 625000, end_factor=0.001),
    "VICReg": Published((1.6, 1.6), 0.9, 1e-6, True, False, 6250, 625000, end_factor=0.001),
    "MoCo v3, ResNet-50": Published((9.6, 9.6), 0.9, 1e-6, True, False, 3120, 31200),
    "MAE: linear probe": Published((6.4, 6.4), 0.9, 0.0, True, False, 780, 7020),
}


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, Any]]:
    """The names that each section's code has made, sections in the page's order and in one namespace."""
    text = PAGE.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    found = {}
    for section in text.split("\n## "):
        title, programs = (
            section.splitlines()[0],
            re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE),
        )
        for program in programs:
            exec(compile(program, f"{PAGE.name}: {title}", "exec"), namespace)  # noqa: S102  the page's own
            found[title] = dict(namespace)
    return found


def test_every_recipe_of_the_page_is_checked(built: dict[str, dict[str, Any]]) -> None:
    assert list(built)[1:] == list(RECIPES)


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_is_the_published_one(title: str, built: dict[str, dict[str, Any]]) -> None:
    published, optimizer, scheduler = RECIPES[title], built[title]["optimizer"], built[title]["scheduler"]
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


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_trains(title: str, built: dict[str, dict[str, Any]]) -> None:
    names = built[title]
    model, inputs = names["model"], torch.randn(8, 3, 8, 8)
    if title.startswith("MAE"):
        model, inputs = names["head"], torch.randn(8, 768)
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for _ in range(2):
        names["optimizer"].zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), torch.arange(8)).backward()
        names["optimizer"].step()
        names["scheduler"].step()
    assert all(p.isfinite().all() for p in parameters.values())
    # a bias before a BatchNorm has no gradient but rounding
    moved = {name for name, p in parameters.items() if not torch.equal(p, before[name])}
    assert moved >= set(parameters) - {"0.bias"}
