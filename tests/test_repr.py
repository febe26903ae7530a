"""repr fits a screen, reads nothing from a device, and shows what runs and what is adapted."""

from typing import Any

import pytest
import torch
from torch import nn

from cases import make_params
from fastlars import LARS, param_groups
from fastlars.backends import preferred, wanted
from fastlars.options import Options
from harness import set_grads
from recording import Recorder, fake_cuda


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4))


def test_a_usual_optimizer() -> None:
    groups = param_groups(net(), 5e-5, bias_lr=0.1)
    assert (
        repr(LARS(groups, lr=4.800000000000001, momentum=0.9, nesterov=True))
        == """\
LARS (
    Parameter Group 0: 2 tensors, 248 elements, adapted, fused
        lr=4.8, momentum=0.9, weight_decay=5e-05, nesterov=True, adapt=True
    Parameter Group 1: 4 tensors, 28 elements, not adapted, single (torch's SGD)
        lr=0.1, momentum=0.9, nesterov=True, adapt=False
)"""
    )


def test_it_fits_a_screen() -> None:
    everything = {
        "momentum": 0.9,
        "weight_decay": 1e-5,
        "nesterov": True,
        "trust_coefficient": 0.0123456789,
        "eps": 0.0,
        "trust_clip": True,
        "trust_denominator": "joint",
        "lr_in_momentum": True,
        "skip_nonfinite": True,
        "maximize": True,
        "initial_lr": torch.tensor(8.0),
        "note": "a word of the user's " * 20,
        "betas": list(range(1000)),
    }
    groups = [{"params": make_params(torch.float32, seed=i), **everything, "lr": i / 3} for i in range(60)]
    lines = repr(LARS(groups, lr=torch.tensor(1 / 3))).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 50
    assert lines[1].startswith("    Parameter Group 0: ") and "lr=tensor(0), " in lines[2]
    assert any("52 more like these: see param_groups" in line for line in lines)
    assert sum("Parameter Group 59:" in line for line in lines) == 1
    for key in everything:
        assert sum(f" {key}=" in line for line in lines) == 8, key


def test_groups_that_differ_in_their_tensors_only_are_one_entry() -> None:
    params = make_params(torch.float32, layouts=["matrix", "vector", "conv"])
    groups: list[dict[str, Any]] = [{"params": [p]} for p in params] + [{"params": make_params(torch.float32), "lr": 2}]
    lines = repr(LARS(groups, lr=1.0, weight_decay=0.1)).splitlines()
    assert lines[1] == "    Parameter Groups 0 to 2, alike: 3 tensors, 238 elements, adapted, fused"
    assert lines[3].startswith("    Parameter Group 3: 15 tensors, ")
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"weight_decay": 0.1}, "adapted, fused 13, single 2"),  # strided and columns are not dense
        ({"weight_decay": 0.1, "foreach": True}, "adapted, foreach"),
        ({"weight_decay": 0.1, "foreach": False}, "adapted, single"),
        ({"adapt": True}, "adapted, fused 13, single 2"),
        ({"weight_decay": 0.1, "adapt": False}, "not adapted, single (torch's SGD)"),
        ({"weight_decay": 0.1, "adapt": False, "lr_in_momentum": True}, "not adapted, single"),
        ({}, "not adapted, single (torch's SGD)"),
    ],
)
def test_what_runs(options: dict[str, Any], what: str) -> None:
    """Each tensor is counted under the backend that steps it."""
    params = make_params(torch.float32)
    optimizer = LARS(params, lr=1.0, **options)
    assert repr(optimizer).splitlines()[1].split("elements, ")[1] == what
    if "fused" in what:
        backends = wanted(params, Options(lr=1.0, **options))
        sent = [preferred(backends, p, torch.zeros_like(p), torch.zeros_like(p)).name for p in params]
        assert what == f"adapted, fused {sent.count('fused')}, single {sent.count('single')}"


def test_half_types_are_not_called_fused() -> None:
    assert "adapted, single" in repr(LARS(make_params(torch.bfloat16), lr=1.0, weight_decay=0.1))


def test_kahan_sums_show_where_they_run() -> None:
    told = {
        kahan_sum: repr(LARS(make_params(torch.bfloat16), lr=1.0, adapt=False, kahan_sum=kahan_sum)).splitlines()
        for kahan_sum in (None, True)
    }
    assert told[None][1].endswith("not adapted, single (torch's SGD)")
    assert told[True][1].endswith("not adapted, single, Kahan sums for half precision")
    assert "kahan_sum=True" in told[True][2]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_modules() -> None:
    model = torch.nn.LazyLinear(3)
    optimizer = LARS(model.parameters(), lr=1.0, weight_decay=0.1)
    assert "Parameter Group 0: 2 tensors, 0 elements, adapted, not yet initialized" in repr(optimizer)
    model(torch.ones(1, 2))
    assert "Parameter Group 0: 2 tensors, 9 elements, adapted, fused" in repr(optimizer)


def test_frozen_and_empty() -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = LARS([*param_groups(model, 0.1), {"params": [], "param_names": []}], lr=1.0)
    lines = repr(optimizer).splitlines()
    assert lines[1].startswith("    Parameter Group 0: 2 tensors (1 frozen), 248 elements")
    assert lines[3].startswith("    Parameter Group 1: 4 tensors (1 frozen), 28 elements")
    assert lines[5] == "    Parameter Group 2: 0 tensors, 0 elements, not adapted"


def test_nothing_is_read_from_a_device() -> None:
    with fake_cuda():
        lr = torch.full((), 0.1, device="cuda")
        params = [nn.Parameter(torch.ones(3, 3, device="cuda"))]
        optimizer = LARS(params, lr=lr, weight_decay=0.1)
        optimizer.param_groups[0]["initial_lr"] = lr.clone()
        with Recorder() as recorder:
            text = repr(optimizer)
        assert recorder.reads == [] and recorder.arrivals == []
    assert "lr=tensor on cuda:0, weight_decay=0.1, initial_lr=tensor on cuda:0" in text
    assert "lr=tensor(0.1)," in repr(LARS(make_params(torch.float32), lr=torch.tensor(0.1), weight_decay=0.1))


def test_it_changes_nothing() -> None:
    params = make_params(torch.float32)
    optimizer = LARS(params, lr=1.0, weight_decay=0.1, momentum=0.9)
    set_grads(params, [torch.zeros_like(p) for p in params])
    before = list(optimizer.param_groups[0].items())
    once = repr(optimizer)
    assert repr(optimizer) == once
    assert list(optimizer.param_groups[0].items()) == before and not optimizer.state
