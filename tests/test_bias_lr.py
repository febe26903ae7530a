"""Tensors that are not adapted have their own lr, and there is a warning if LARS's lr is left without normalisation layers."""

import warnings
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fastlars import LARS, param_groups
from fastlars.schedules import warmup_cosine, warmup_polynomial


class RMSScale(nn.Module):
    """A normalisation layer that cannot be recognised."""


class FrozenBatchNorm2d(nn.Module):
    """Like torchvision's: neither torch's class nor a name that ends in Norm."""


def mlp(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), *more, nn.Linear(3, 2))


def warned(model: Any, **options: Any) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        param_groups(model, 0.1, **options)
    return caught


@pytest.mark.parametrize("own", [0.05, torch.tensor(0.05), 0])
def test_biases_get_their_own_lr(own: float | Tensor) -> None:
    """Schedules keep it in proportion. A tensor is kept, not copied."""
    adapted, rest = param_groups(mlp(), 0.1, bias_lr=own, unadapted={"momentum": 0.5})
    assert rest["lr"] is own and "lr" not in adapted
    optimizer = LARS([adapted, rest], lr=8.0, momentum=0.9)
    assert [(group["lr"], group["momentum"]) for group in optimizer.param_groups] == [(8.0, 0.9), (own, 0.5)]
    before = float(own)
    warmup_polynomial(optimizer, 4, 10)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([2.0, before / 4])


def test_same_keeps_the_lr_of_lars() -> None:
    for options in ({"bias_lr": "same"}, {}):
        _, rest = param_groups(mlp(nn.LayerNorm(3)), 0.1, **options)
        assert "lr" not in rest and LARS([rest], lr=8.0).param_groups[0]["lr"] == 8.0


@pytest.mark.parametrize(
    ("model", "warns"),
    [
        (mlp(), True),
        (mlp(RMSScale()), True),
        (mlp(weight_norm(nn.Linear(3, 3))), True),  # it normalises weights, not activations
        (mlp(nn.BatchNorm1d(3)), False),
        (mlp(nn.BatchNorm1d(3, affine=False)), False),
        (mlp(nn.InstanceNorm1d(3)), False),
        (mlp(FrozenBatchNorm2d()), False),
        (mlp().named_parameters(), False),  # names alone cannot tell
        (nn.Linear(4, 3, bias=False), False),  # no tensor takes an lr that is too large
        (nn.ParameterList([torch.ones(3)]), False),  # all of it is SGD
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, bool) else str(value),
)
def test_when_it_warns(model: Any, warns: bool) -> None:
    caught = warned(model)
    assert len(caught) == warns
    for warning in caught:
        assert warning.category is UserWarning and warning.filename == __file__
        assert all(way_out in str(warning.message) for way_out in ("bias_lr=0.1", 'bias_lr="same"'))


@pytest.mark.parametrize("chosen", [{"bias_lr": "same"}, {"bias_lr": 8.0}, {"unadapted": {"lr": 0.1}}], ids=str)
def test_no_warning_after_a_choice(chosen: Any) -> None:
    assert not warned(mlp(), **chosen)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bias_lr": "own"}, ValueError, "bias_lr must be a number, a tensor or \"same\", got 'own'"),
        ({"bias_lr": -0.1}, ValueError, "param_groups: bias_lr must be a finite number >= 0, got -0.1"),
        ({"bias_lr": True}, TypeError, "bias_lr must be a finite number >= 0, got True"),
        ({"bias_lr": torch.ones(2)}, ValueError, r"Tensor bias_lr must be 1-element .* got shape \(2,\)"),
        ({"bias_lr": "same", "unadapted": {"lr": 1.0}}, ValueError, "both set an lr; leave one out"),
    ],
)
def test_wrong_bias_lrs_are_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        param_groups(mlp(), 0.1, **options)


@pytest.mark.parametrize("norm", [True, False])
def test_a_net_without_normalisation_trains_only_with_its_own_bias_lr(norm: bool) -> None:
    """Digits in one batch. With bias_lr=0.1 networks with and without norm layers train; with one lr, only with them."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    accuracy = {}
    for bias_lr in (0.1, "same"):
        torch.manual_seed(0)
        layers = [nn.Linear(64, 64), *([nn.BatchNorm1d(64)] if norm else []), nn.ReLU(), nn.Linear(64, 10)]
        model = nn.Sequential(*layers)
        optimizer = LARS(param_groups(model, 5e-5, bias_lr=bias_lr), lr=30.0, momentum=0.9)
        scheduler = warmup_cosine(optimizer, 5, 50)
        for _ in range(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            scheduler.step()
        model.eval()
        accuracy[bias_lr] = float((model(images).argmax(1) == labels).float().mean())
    assert accuracy[0.1] > 0.9
    assert (accuracy["same"] > 0.9) == norm
