"""Models that torch shards over ranks train like the whole model on one rank, for every way of sharding."""

from pathlib import Path

import pytest
import torch

import ranks as ranks_module
import sharded
import sharded_models
from cases import OPTIONS
from harness import IMPLEMENTATIONS, ignore_nothing_adapted
from ranks import Group

pytestmark = [
    ignore_nothing_adapted,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]
ranks = ranks_module.fixture(2, 4)


@pytest.mark.parametrize("way", sharded_models.WAYS)
def test_equals_the_whole_model(ranks: Group, way: str) -> None:
    if way != "tensor_parallel" and not ranks_module.FULLY_SHARDS_ON_CPU and ranks.device == "cpu":
        pytest.skip("fully_shard works on CPU from torch 2.9 on")
    ratios = ranks.run(sharded_models.equals_whole, way, {})
    assert all(each == ratios[0] for each in ratios)


@pytest.mark.parametrize(
    ("name", "implementation"), [("nesterov-joint", "single"), ("everything", "foreach"), ("everything", "fused")]
)
def test_every_implementation_equals_the_whole_model(ranks: Group, name: str, implementation: str) -> None:
    way = "fsdp" if ranks_module.FULLY_SHARDS_ON_CPU or ranks.device == "cuda" else "tensor_parallel"
    options = {**OPTIONS[name], **IMPLEMENTATIONS[implementation]}
    ranks.run(
        sharded_models.equals_whole, way, {key: options[key] for key in options.keys() - {"weight_decay", "adapt"}}
    )


def test_a_compiled_step_equals_the_whole_model(ranks: Group) -> None:
    if ranks.world > 2:
        pytest.skip("compiling takes long, and two ranks show what four would")
    way = "fsdp" if ranks_module.FULLY_SHARDS_ON_CPU or ranks.device == "cuda" else "tensor_parallel"
    ranks.run(sharded_models.equals_whole, way, {}, True)


@pytest.mark.parametrize("way", ["fsdp", "tensor_parallel", "tensor_parallel_and_fsdp"])
def test_a_model_in_half_precision_equals_the_whole_model(ranks: Group, way: str) -> None:
    if way != "tensor_parallel" and not ranks_module.FULLY_SHARDS_ON_CPU and ranks.device == "cpu":
        pytest.skip("fully_shard works on CPU from torch 2.9 on")
    ranks.run(sharded_models.half_precision_equals_whole, way)


def test_data_parallel_accumulation_equals_the_whole_model(ranks: Group) -> None:
    ranks.run(sharded_models.data_parallel_accumulates)


def test_zero_redundancy_equals_the_whole_model(ranks: Group) -> None:
    ranks.run(sharded_models.zero_redundancy)


def test_skip_nonfinite_is_refused_under_zero_redundancy(ranks: Group) -> None:
    ranks.run(sharded_models.zero_redundancy_skips)


def test_flat_parameters_are_refused(ranks: Group) -> None:
    ranks.run(sharded_models.refuses_flat_parameters)


@pytest.mark.slow
def test_sharded_parameters_keep_compensations(ranks: Group, tmp_path: Path) -> None:
    ranks.run(sharded.keeps_compensations, str(tmp_path))
