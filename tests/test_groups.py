"""param_groups holds every parameter once, sorted as it says; each dialect is the LARS it is named after."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import Options, make_grads, make_params
from fastlars import DIALECTS, LARS, param_groups
from fastlars.options import NAMES
from harness import ignore_nothing_adapted, implementations, run


class Scaling(nn.Module):
    """A parameter of the shape and name given."""

    def __init__(self, *shape: int, name: str = "weight") -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class ChannelNorm(Scaling):
    """A home-made normalisation layer."""


class PreNorm(nn.Module):
    """Named as a normalisation layer, but what it wraps is none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((4, 4))
        self.inner = nn.Linear(4, 4)


class Rescaler(nn.RMSNorm):
    """A normalisation layer by its base class alone."""


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    model[1].weight = model[0].weight
    return model


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[:2].requires_grad_(False)
    return model


# model, the names of its adapted parameters
MODELS: dict[str, tuple[nn.Module, list[str]]] = {
    "conv_bn": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), ["0.weight", "2.weight"]),
    "transformer": (
        nn.TransformerEncoderLayer(8, 2, 16),
        ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"],
    ),
    "attention": (
        nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
    ),
    "lstm": (nn.LSTM(4, 3, proj_size=2), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
    "embedding": (nn.Embedding(5, 4), ["weight"]),
    "tied": (tied(), ["0.weight"]),
    "frozen": (frozen(), ["0.weight", "2.weight"]),
    "norms_of_matrices": (
        nn.Sequential(nn.LayerNorm((4, 4)), nn.RMSNorm((4, 4)), Rescaler((4, 4)), ChannelNorm(4, 1)),
        [],
    ),
    "nested_norms": (
        nn.Sequential(nn.Sequential(PreNorm()), nn.ModuleDict({"a": PreNorm()})),
        ["0.0.inner.weight", "1.a.inner.weight"],
    ),
    "bias_of_a_matrix": (nn.Sequential(Scaling(4, 4, name="bias"), Scaling(4, 4, name="bias_k")), ["1.bias_k"]),
    "scalar": (nn.Sequential(Scaling(), nn.PReLU(), Scaling(0, 3)), ["2.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_stands_once_with_its_name(model: str) -> None:
    module, adapted = MODELS[model]
    groups = param_groups(module, weight_decay=0.1)
    named = dict(module.named_parameters())
    pairs = [pair for group in groups for pair in group["params"]]
    assert sorted(name for name, _ in pairs) == sorted(named)
    assert all(named[name] is param for name, param in pairs)
    assert {name for group in groups if group["adapt"] for name, _ in group["params"]} == set(adapted)
    assert all(group["params"] and group["weight_decay"] == (0.1 if group["adapt"] else 0) for group in groups)

    optimizer = LARS(groups, lr=0.1)
    kept = [(n, p) for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)]
    assert [(name, id(param)) for name, param in kept] == [(name, id(param)) for name, param in pairs]
    for param in named.values():
        param.grad = torch.randn_like(param)
    assert list(optimizer.trust_ratios()) == [name for name in named if name in adapted]
    optimizer.step()


def test_frozen_parameters_are_there_to_be_unfrozen() -> None:
    model = frozen()
    optimizer = LARS(param_groups(model, 0.1), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    for moved in ([4, 5], [0, 1, 2, 3, 4, 5]):
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        assert [i for i, p in enumerate(model.parameters()) if not torch.equal(p, before[i])] == moved
        model.requires_grad_(True)
        optimizer.zero_grad()


@pytest.mark.parametrize("given", ["module", "list", "generator"])
def test_named_parameters_do_as_well_as_a_module(given: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    source = {"module": model, "list": list(model.named_parameters()), "generator": model.named_parameters()}[given]
    adapted, rest = param_groups(source, 0.1)
    assert [name for name, _ in adapted["params"]] == ["0.weight"]
    assert [name for name, _ in rest["params"]] == ["0.bias", "1.weight", "1.bias"]
    # twice the same tensor: once, under its first name
    twice = [*model.named_parameters(), ("again", model[0].weight)]
    assert [len(group["params"]) for group in param_groups(twice, 0.1)] == [1, 3]


def test_options_of_the_group_that_is_not_adapted() -> None:
    model = nn.Linear(4, 3)
    unadapted = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01}
    adapted, rest = LARS(param_groups(model, 0.2, unadapted=unadapted), lr=8.0, momentum=0.9).param_groups
    assert (adapted["lr"], adapted["momentum"], adapted["weight_decay"], adapted["adapt"]) == (8.0, 0.9, 0.2, True)
    assert (rest["lr"], rest["momentum"], rest["weight_decay"], rest["adapt"]) == (0.1, 0.5, 0.01, False)
    assert unadapted == {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01}
    with pytest.raises(ValueError, match="param group 1: 'momentun' is not an option of LARS; did you mean 'momentum'"):
        LARS(param_groups(model, 0.2, unadapted={"momentun": 0.5}), lr=8.0)
    with pytest.raises(ValueError, match="param group 0: weight_decay must be a finite number >= 0, got -1"):
        LARS(param_groups(model, -1), lr=8.0)


def test_without_weight_decay_the_weights_are_still_adapted() -> None:
    model = nn.Linear(4, 3)
    optimizer = LARS(param_groups(model, 0.0), lr=1.0)
    model(torch.ones(1, 4)).sum().backward()
    assert list(optimizer.trust_ratios()) == ["weight"]
    optimizer.step()  # no warning that nothing is adapted


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (nn.Linear(2, 2).parameters(), TypeError, r"pass model.named_parameters\(\)"),
        (nn.Linear(2, 2).state_dict(), TypeError, r"pass model.named_parameters\(\)"),
        ([(0, nn.Parameter(torch.ones(2)))], TypeError, r"pass model.named_parameters\(\)"),
        ([(nn.Parameter(torch.ones(2)), "weight")], TypeError, r"pass model.named_parameters\(\)"),
        ([("weight", "bias")], TypeError, r"pass model.named_parameters\(\)"),
        (nn.ReLU(), ValueError, "got no parameters; pass a module that has some"),
        ([], ValueError, "got no parameters"),
    ],
)
def test_errors(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        param_groups(source, 0.1)


# ---------------------------------------------------------------- dialects
@ignore_nothing_adapted
@implementations
@pytest.mark.parametrize(
    "options", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {}], ids=["momentum", "nesterov", "plain"]
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_equal_the_reference(dialect: str, options: Options, implementation: Options) -> None:
    """lr changes every step, which tells apart where it enters."""
    assert DIALECTS[dialect].keys() <= set(NAMES) - {"lr"}
    groups = [
        {"params": make_params(torch.float64, seed=1), "weight_decay": 0.05},
        {"params": make_params(torch.float64, seed=2), "weight_decay": 0.0},
    ]

    def grads_of(params: Any, step: int) -> list[Tensor | None]:
        return make_grads("late", params, step)

    # a ratio on either side of lr, so that a clip shows
    for coefficient in (0.1, 5.0):
        run(
            groups,
            {"lr": 0.5, "trust_coefficient": coefficient, **options, **DIALECTS[dialect]},
            grads_of,
            implementation,
        )


def test_dialects_differ_where_they_should() -> None:
    results = {}
    for name, dialect in DIALECTS.items():
        params = make_params(torch.float64, layouts=["matrix"])
        optimizer = LARS(params, lr=0.5, momentum=0.9, weight_decay=0.05, trust_coefficient=0.1, **dialect)
        for step in range(3):
            params[0].grad = make_grads("dense", params, step)[0]
            optimizer.param_groups[0]["lr"] = 0.5 / (step + 1)
            optimizer.step()
        results[name] = tuple(params[0].detach().reshape(-1).tolist())
    assert results.pop("mlperf") == results["paper"]  # two names for one
    assert len(set(results.values())) == len(results) == len(DIALECTS) - 1
