"""lightly: in its SimCLR our LARS replaces its own, including the state."""

import copy
from typing import Any

import pytest
import torch
from lightly.utils import lars

import fastlars


@pytest.fixture
def in_float64(page: dict[str, Any]) -> Any:
    """In float64, so that rounding does not matter. lightly's LARS shares no line with ours."""
    globals_of_page = page["train"].__globals__
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals_of_page, "images", page["images"].double())
        yield


def trained(page: dict[str, Any], kind: Any, epochs: int = 10) -> tuple[Any, torch.optim.Optimizer, list[float]]:
    model = page["SimCLR"]().double()
    optimizer = page["make_optimizer"](model, kind)
    return model, optimizer, page["train"](model, optimizer, epochs)


def difference(model: torch.nn.Module, other: torch.nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def contrastive_loss(page: dict[str, Any], model: torch.nn.Module) -> float:
    """Over fixed views that are not used in training."""
    model, views = copy.deepcopy(model), [page["images"][:, :, i : i + 8, 4 - i : 12 - i] for i in range(5)]
    losses = [page["NTXentLoss"](temperature=0.5)(model(a), model(b)) for a in views for b in views if a is not b]
    return torch.stack(losses).mean().item()


def test_it_learns(page: dict[str, Any]) -> None:
    loss = [contrastive_loss(page, model) for model in (page["SimCLR"](), page["model"])]
    assert loss[1] < loss[0] - 0.15
    assert type(page["optimizer"]) is fastlars.LARS


def test_it_is_the_training_of_lightlys_own(page: dict[str, Any], in_float64: Any) -> None:
    (ours, _, losses), (theirs, _, their_losses) = trained(page, fastlars.LARS), trained(page, lars.LARS)
    assert difference(ours, page["SimCLR"]().double()) > 1e-2
    assert difference(ours, theirs) < 1e-10
    assert losses == pytest.approx(their_losses, rel=1e-10)


def test_a_checkpoint_of_lightly_resumes(page: dict[str, Any], in_float64: Any) -> None:
    model, theirs, _ = trained(page, lars.LARS, epochs=2)
    twin = copy.deepcopy(model)
    ours = page["make_optimizer"](twin)
    before = theirs.state_dict()
    ours.load_state_dict(copy.deepcopy(before))
    assert all(
        torch.equal(ours.state_dict()["state"][i][k], v) for i, s in before["state"].items() for k, v in s.items()
    )
    page["train"](model, theirs, 2)
    page["train"](twin, ours, 2)
    assert len(before["state"]) > 0 and difference(model, twin) < 1e-10


def test_only_what_decays_is_adapted(page: dict[str, Any]) -> None:
    names = [group["name"] for group in page["optimizer"].param_groups]
    assert names == ["simclr", "simclr_no_weight_decay"]
    page["optimizer"].zero_grad()
    page["model"](page["images"]).square().sum().backward()
    adapted = page["optimizer"].param_groups[0]["params"]
    assert len(page["optimizer"].trust_ratios()) == len(adapted) == sum(p.ndim > 1 for p in page["model"].parameters())
