"""Common mistakes of the first day raise errors that name the fix."""

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import SWALR

import fastlars
from fastlars import LARS, param_groups

MODELS = [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2)), nn.ModuleList([nn.Linear(3, 2)])]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_a_model_in_place_of_its_parameters(model: Any) -> None:
    message = f"LARS takes parameters, got a {type(model).__name__}; pass model.parameters(), or fastlars.param_groups"
    with pytest.raises(TypeError, match=f"LARS: {message}".replace("(", r"\(").replace(")", r"\)")):
        LARS(model, lr=1.0)
    with pytest.raises(TypeError, match="param group 0: LARS takes parameters, got a"):
        LARS([{"params": model}], lr=1.0)
    LARS(nn.ParameterList(model.parameters()).parameters(), lr=1.0)


def test_a_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    with pytest.raises(ImportError, match=r"cannot be imported .*pip install 'fastlars\[plot\]'"):
        fastlars.plots.trust_ratios({0: {"w": 1.0}})


def test_a_state_dict_of_other_groups() -> None:
    """From a run whose parameters were in one group. The fix works."""
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    saved = LARS(model.parameters(), lr=2.0, momentum=0.9, adapt=True)
    model(torch.ones(1, 3)).sum().backward()
    saved.step()
    optimizer = LARS(param_groups(model, 0.1), lr=2.0, momentum=0.9)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"1 param groups with \[4\] parameters, this optimizer 2 with \[1, 3\]; .*"
                       r"fastlars.convert_state_dict\(state_dict, optimizer, params=...\)"):  # fmt: skip
        optimizer.load_state_dict(saved.state_dict())
    assert optimizer.state_dict() == before
    optimizer.load_state_dict(fastlars.convert_state_dict(saved.state_dict(), optimizer, params=model.parameters()))
    for param in model.parameters():
        assert torch.equal(optimizer.state[param]["momentum_buffer"], saved.state[param]["momentum_buffer"])


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [(OneCycleLR, {"max_lr": [8.0, 0.1], "total_steps": 10}), (SWALR, {"swa_lr": [8.0, 0.1], "anneal_epochs": 1})],
    ids=["OneCycleLR", "SWALR"],
)
def test_schedulers_that_overwrite_all_groups_take_a_list(scheduler: Any, options: dict[str, Any]) -> None:
    """As the pages show: the biases keep their own lr."""
    optimizer = LARS(param_groups(nn.Linear(3, 2), 0.1, bias_lr=0.1), lr=8.0, momentum=0.9)
    schedule = scheduler(optimizer, **options)
    lrs = []
    for _ in range(9):
        optimizer.step()
        schedule.step()
        lrs.append([group["lr"] for group in optimizer.param_groups])
    assert max(lrs) == pytest.approx([8.0, 0.1])
    assert all(rest / lr == pytest.approx(0.1 / 8.0) for lr, rest in lrs)


def test_excluded_tensors_are_still_in_the_optimizer_and_the_name_says_so() -> None:
    model = nn.ModuleDict({"online": nn.Linear(3, 2), "target": nn.Linear(3, 2)})
    with pytest.raises(TypeError, match="unexpected keyword argument 'exclude'"):
        param_groups(model, 0.1, exclude="target.*")  # type: ignore[call-arg]
    groups = param_groups(model, 0.1, bias_lr=0.1, exclude_from_adaptation="target.*")
    assert [name for name, _ in groups[1]["params"]] == ["online.bias", "target.weight", "target.bias"]
