"""Distributed tensors over a group of this process alone. test_sharding.py, which is slow, has more ranks."""

from collections.abc import Iterator

import pytest
import torch

import ranks
import sharded
from cases import OPTIONS
from harness import IMPLEMENTATIONS, ignore_nothing_adapted
from ranks import Rank

pytestmark = [
    ignore_nothing_adapted,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    # torch's own warnings, from its own code
    pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch"),
]


@pytest.fixture(scope="module")
def rank() -> Iterator[Rank]:
    with ranks.one_rank() as rank:
        yield rank
        sharded._meshes.clear()


@pytest.mark.parametrize(
    ("name", "history", "implementation"),
    [
        ("large_eps", "dense", "single"),
        ("dampening", "late", "foreach"),
        ("nesterov-joint", "missing", "fused"),
        ("unadapted", "dense", "single"),
        ("clip-paper", "zero_first", "fused"),
        ("everything", "nonfinite", "foreach"),
    ],
)
def test_equals_reference_without_a_message(rank: Rank, name: str, history: str, implementation: str) -> None:
    options = {**OPTIONS[name], **IMPLEMENTATIONS[implementation]}
    assert sharded.equals_reference(rank, "flat", history, options) == [[]] * 3


def test_gradients_of_any_layout(rank: Rank) -> None:
    sharded.grads_of_any_layout(rank, OPTIONS["nesterov-joint"])


def test_trust_ratios_are_those_of_the_whole_tensors(rank: Rank) -> None:
    sharded.trust_ratios(rank, OPTIONS["momentum"])


def test_wrong_input_raises_before_anything_changes(rank: Rank) -> None:
    sharded.wrong_input(rank)


def test_version_counters(rank: Rank) -> None:
    sharded.versions(rank)


@pytest.mark.parametrize("foreach", [False, True])
def test_no_temporary_of_parameter_size(rank: Rank, foreach: bool) -> None:
    sharded.is_written_where_it_is(rank, OPTIONS["nesterov"], {"foreach": foreach})


def test_range_and_precision_of_the_norms(rank: Rank) -> None:
    sharded.large_and_small_numbers(rank)
    sharded.precision(rank)
