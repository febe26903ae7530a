"""check() finds mistakes before training and says how to fix them, and finds none in what the documentation recommends."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastlars
import pages
from fastlars import LARS, check, param_groups
from fastlars.check import _CHECKS
from fastlars.schedules import warmup_cosine
from recipes_table import RUNS, build


def mlp(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), *more, nn.ReLU(), nn.Linear(3, 2))


def good(model: nn.Module, lr: float = 8.0, warm: bool = True, **options: Any) -> LARS:
    optimizer = LARS(param_groups(model, 1e-4, bias_lr=0.1), **{"lr": lr, "momentum": 0.9, **options})
    if warm:
        warmup_cosine(optimizer, 10, 100)
    return optimizer


def headless() -> tuple[nn.Module, LARS]:
    model = mlp()
    optimizer = good(model)
    model.append(nn.Linear(2, 2))  # created after the optimizer
    return model, optimizer


def with_(model: nn.Module, optimizer: Callable[[nn.Module], LARS]) -> tuple[nn.Module, LARS]:
    return model, optimizer(model)


def zero_head() -> nn.Module:
    model = mlp()
    nn.init.zeros_(model[-1].weight)
    return model


# finding -> a model and optimizer with only that mistake, its tensors, and the same with the mistake fixed
CASES: dict[str, tuple[Callable[[], tuple[nn.Module, LARS]], tuple[str, ...], Callable[[], tuple[nn.Module, LARS]]]] = {
    "parameters in no group": (headless, ("3.weight", "3.bias"), lambda: with_(headless()[0], good)),
    "nothing is adapted": (
        lambda: with_(mlp(), lambda m: LARS(m.parameters(), lr=0.1)),
        (),
        lambda: with_(mlp(), lambda m: good(m, lr=0.5, warm=False)),
    ),
    "biases at LARS's lr": (
        lambda: with_(mlp(), lambda m: LARS(param_groups(m, 1e-4, bias_lr="same"), lr=8.0)),
        ("0.bias", "2.bias"),
        lambda: with_(mlp(), lambda m: LARS(param_groups(m, 1e-4, bias_lr=0.1), lr=8.0)),
    ),
    "a tensor that starts at zero": (
        lambda: with_(zero_head(), lambda m: good(m, momentum=0.0, warm=False)),
        ("2.weight",),
        lambda: with_(zero_head(), lambda m: good(m, momentum=0.0)),
    ),
    "no warm-up": (lambda: with_(mlp(), lambda m: good(m, warm=False)), (), lambda: with_(mlp(), good)),
    "the loss is flat": (lambda: with_(mlp(), lambda m: good(m, lr=0.1)), (), lambda: with_(mlp(), good)),
    "half-precision weights hardly move": (
        lambda: with_(mlp().bfloat16(), lambda m: good(m, lr=5.0, kahan_sum=False)),
        ("0.weight", "2.weight"),
        lambda: with_(mlp().bfloat16(), lambda m: good(m, lr=5.0)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_finding_and_its_fix(name: str) -> None:
    broken, tensors, fixed = CASES[name]
    (finding,) = check(*broken())
    assert (finding.name, finding.tensors) == (name, tensors)
    assert len(finding.sentence) > 40 and len(finding.way_out) > 40
    assert not check(*fixed())


def test_every_check_has_a_case_and_an_entry_on_the_page_in_its_order() -> None:
    assert len(CASES) == len(_CHECKS)
    headings = re.findall(r"^## (.*)$", (pages.ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    assert [heading.lower() for heading in headings[: len(CASES)]] == [name.lower() for name in CASES]


@pytest.mark.parametrize("name", RUNS)
def test_recipes_have_no_findings(name: str) -> None:
    """With normalisation layers, at their published lr."""
    model = mlp(nn.BatchNorm1d(3))
    assert not check(model, build(name, model)[0])


def test_no_findings_without_a_mistake() -> None:
    """Biases that start at zero, frozen parameters, normalisation layers at LARS's lr, LARC, a run that has started, meta."""
    model = mlp(nn.LayerNorm(3))
    nn.init.zeros_(model[0].bias)
    model[0].weight.requires_grad_(False).zero_()
    assert not check(model, good(model))
    optimizer = LARS(param_groups(model, 1e-4), lr=8.0, momentum=0.9)
    assert [finding.name for finding in check(model, optimizer)] == ["no warm-up"]
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert not check(model, optimizer)
    assert not check(model, LARS(param_groups(model, 1e-4), lr=0.1, momentum=0.9, dialect="larc"))
    meta = mlp().to("meta")
    assert not check(meta, good(meta))


def test_it_prints_readably() -> None:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(9)])
    nn.init.zeros_(model[0].weight)
    optimizer = LARS(param_groups(model, 1e-4, bias_lr="same"), lr=8.0, momentum=0.9)
    findings = check(model, optimizer)
    assert [f.name for f in findings] == ["biases at LARS's lr", "a tensor that starts at zero", "no warm-up"]
    lines = str(findings).splitlines()
    assert max(map(len, lines)) <= 100 and "(0.bias, 1.bias, 2.bias, 3.bias, ...)" in lines[2]
    assert sum(line.startswith(tuple(f.name for f in findings)) for line in lines) == 3
    assert str(check(model, good(model))[1:]) == "[]" and str(fastlars.check(mlp(), good(mlp()))[:0]) == "[]"


def test_through_wrappers() -> None:
    class Wrapper(torch.optim.Optimizer):
        """Like Accelerate's."""

        def __init__(self, optimizer: LARS) -> None:
            self.optimizer = optimizer

        param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]
        state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]

    model = torch.compile(mlp(), backend="eager")
    optimizer = good(model, warm=False)
    assert [finding.name for finding in check(model, Wrapper(optimizer))] == ["no warm-up"]


@pytest.mark.parametrize(
    ("model", "optimizer", "message"),
    [
        (mlp(), torch.optim.SGD(mlp().parameters(), lr=0.1), "optimizer must be a fastlars.LARS, got SGD"),
        (mlp(), "LARS", "optimizer must be a fastlars.LARS, got str"),
        (list(mlp().parameters()), None, "model must be the module that trains, got list"),
    ],
)
def test_wrong_arguments_are_refused(model: Any, optimizer: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        check(model, optimizer)
