"""timm: an optimizer from its factory trains like LARS made by hand, bit for bit, and like timm's own within rounding."""

from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, list_optimizers

import fastlars


def plain_loop(
    page: dict[str, Any], model: torch.nn.Module, make_optimizer: Any, lrs: tuple[float, float], steps: int = 16
) -> torch.nn.Module:
    """The page's training in plain torch. ``make_optimizer`` gets the matrices and the vectors."""
    dtype = next(model.parameters()).dtype
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = make_optimizer([{"params": matrices, "weight_decay": 1e-4}, {"params": vectors}])
    for step in range(steps):
        factor = step / 4 if step < 4 else (1 - step / 16) ** 2
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr * factor
        batch = slice(64 * ((step + 1) % 4), 64 * ((step + 1) % 4) + 64)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(page["images"][batch].to(dtype)), page["labels"][batch]).backward()
        optimizer.step()
    return model


def ours(groups: Any) -> torch.optim.Optimizer:
    return fastlars.LARS(groups, lr=0.0, momentum=0.9)


@pytest.mark.parametrize(("model", "lrs"), [("model", (4.0, 4.0)), ("model_2", (4.0, 0.1))])
def test_the_factory_and_its_schedule_are_the_plain_loop(page: dict[str, Any], model: str, lrs: Any) -> None:
    expected = plain_loop(page, page["make_model"](), ours, lrs)
    for (name, p), (_, q) in zip(page[model].named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", ["model", "model_2"])
def test_it_learns(page: dict[str, Any], name: str) -> None:
    loss = [
        torch.nn.functional.cross_entropy(model(page["images"]), page["labels"]).item()
        for model in (page["make_model"](), page[name])
    ]
    assert loss[0] > 1.3 and loss[1] < 1.1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lars", {}),
        ("nlars", {"nesterov": True}),
        ("larc", {"trust_clip": True}),
        ("nlarc", {"trust_clip": True, "nesterov": True}),
    ],
)
@pytest.mark.parametrize("zero_init", [False, True])
def test_timms_own_lars_trains_the_same(page: dict[str, Any], name: str, options: Any, zero_init: bool) -> None:
    """An implementation that shares no line with ours, in float64, so that rounding does not matter.

    Blocks that start with a zero scale give convolutions zero gradients. timm decays those, and we do not.
    """

    def timms(groups: Any) -> torch.optim.Optimizer:
        return create_optimizer_v2(groups, name, lr=0.0)

    def with_options(groups: Any) -> torch.optim.Optimizer:
        return fastlars.LARS(groups, lr=0.0, momentum=0.9, **options)

    trained = []
    for make_optimizer in (timms, with_options):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=4, zero_init_last=zero_init).double()
        trained.append(plain_loop(page, model, make_optimizer, (4.0, 0.1), steps=5))
    difference = max((p - q).abs().max().item() for p, q in zip(*map(parameters, trained), strict=True))
    assert difference > 1e-6 if zero_init else difference < 1e-12


def parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return list(model.parameters())


def test_the_name_is_free_and_ours() -> None:
    assert {"fastlars", "lars", "nlars", "larc", "nlarc"} <= set(list_optimizers())
    assert timm.optim.get_optimizer_class("fastlars") is fastlars.LARS
    assert timm.optim.get_optimizer_class("lars") is not fastlars.LARS


def test_options_lookahead_and_names_are_as_the_page_says(page: dict[str, Any]) -> None:
    model, batch = page["make_model"](), (page["images"][:8], page["labels"][:8])
    torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    made = create_optimizer_v2(model, "lookahead_fastlars", lr=1.0, weight_decay=1e-4, trust_coefficient=0.01)
    assert type(made) is timm.optim.Lookahead and type(made._base_optimizer) is fastlars.LARS
    assert [group["trust_coefficient"] for group in made.param_groups] == [0.01, 0.01]
    assert [group["momentum"] for group in made.param_groups] == [0.9, 0.9]
    assert {name.split(".")[0] for name in made._base_optimizer.trust_ratios()} == {"1"}

    with_names = page["optimizer_2"].param_groups[0]["param_names"]
    assert [dict(model.named_parameters())[name].ndim for name in with_names] == [4] * (len(with_names) - 1) + [2]

    with pytest.warns(UserWarning, match="LARS adapts no parameter"):
        create_optimizer_v2(model, "fastlars", lr=1.0).step()
