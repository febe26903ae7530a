"""Each dialect is the LARS it is named after."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Options, make_grads, make_params
from fastlars import DIALECTS, LARS
from fastlars.options import NAMES
from harness import ignore_nothing_adapted, implementations, run


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
