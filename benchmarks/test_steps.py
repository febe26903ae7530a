"""Times of optimizer steps with pytest-benchmark. `nox -s bench` runs it, with pytest's options after `--`.

Choose cases with `-k "resnet50 and weights"`. To compare two versions on one machine, run the first with
`--benchmark-autosave` and the second with `--benchmark-compare --benchmark-compare-fail=median:10%`. To compare optimizers,
use `performance.py`, because here they run one after the other.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from benchmarks.optimizers import ADAPTED, CONTENDERS, groups_of
from benchmarks.performance import parameters
from benchmarks.rounds import synchronize
from benchmarks.shapes import MODELS

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module", params=[(device, model) for device in DEVICES for model in MODELS], ids="-".join)
def params(request: pytest.FixtureRequest) -> list[nn.Parameter]:
    """The parameters of one model at a time, because the largest models take gigabytes."""
    device, model = request.param
    return parameters(MODELS[model].shapes(), torch.device(device))


@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("name", list(CONTENDERS))
def test_step(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, params: list[nn.Parameter], adapted: str, name: str
) -> None:
    """Time the optimizer alone. With "weights", biases and norms are not adapted, as in real use."""
    contender, device = CONTENDERS[name], params[0].device
    if contender.is_missing:
        pytest.skip(f"{name} is not installed")
    benchmark.group = f"step, {', '.join(request.node.callspec.params['params'])}, {adapted} adapted"
    step = contender.stepper(groups_of(params, adapted))

    def whole() -> None:
        step()
        synchronize(device)

    for _ in range(2):  # create buffers and compile
        whole()
    benchmark(whole)
