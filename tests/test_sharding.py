"""Sharded tensors step like whole tensors, with one all-reduce per sharded mesh dimension."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import ranks as ranks_module
import sharded
from cases import OPTIONS, Options
from harness import IMPLEMENTATIONS, ignore_nothing_adapted, implementations
from ranks import Group

pytestmark = [
    ignore_nothing_adapted,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]
ranks = ranks_module.fixture(2, 4)

CHOSEN = [
    "large_eps",  # not the same if all norms are wrong by one factor
    "momentum",
    "dampening",
    "nesterov-joint",
    "unadapted",
    "clip-paper",
    "everything",
    "everything_but_joint",
    "skip_nonfinite",
]
GRIDS = {2: ["flat"], 4: ["flat", "grid"]}


def in_turn(values: Sequence[Any]) -> list[tuple[Any, Options]]:
    """Each with one of the implementations."""
    return list(zip(values, itertools.cycle(IMPLEMENTATIONS.values()), strict=False))


@pytest.mark.parametrize(("name", "implementation"), in_turn(CHOSEN), ids=str)
def test_equals_reference(ranks: Group, name: str, implementation: Options) -> None:
    for layouts in GRIDS[ranks.world]:
        ranks.run(sharded.equals_reference, layouts, "dense", {**OPTIONS[name], **implementation})


@pytest.mark.parametrize("history", ["zero_first", "missing", "late", "never", "tiny"])
def test_any_history_of_gradients_equals_reference(ranks: Group, history: str) -> None:
    for name in ("dampening", "nesterov-joint", "skip_nonfinite"):
        ranks.run(sharded.equals_reference, GRIDS[ranks.world][-1], history, OPTIONS[name])


@implementations
def test_steps_with_gradients_that_are_not_finite_are_skipped(ranks: Group, implementation: Options) -> None:
    for name in ("skip_nonfinite", "everything"):
        for layouts in GRIDS[ranks.world]:
            ranks.run(sharded.equals_reference, layouts, "nonfinite", {**OPTIONS[name], **implementation})


DTYPES = [torch.float64, torch.bfloat16, torch.float16, torch.complex64]


@pytest.mark.parametrize(("dtype", "implementation"), in_turn(DTYPES), ids=str)
def test_any_dtype_equals_reference(ranks: Group, dtype: torch.dtype, implementation: Options) -> None:
    ranks.run(sharded.equals_reference, "flat", "dense", {**OPTIONS["nesterov-joint"], **implementation}, dtype)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", ["momentum", "joint", "unadapted", "skip_nonfinite"])
def test_one_all_reduce_a_sharded_dimension_and_eight_bytes_a_tensor(ranks: Group, name: str, groups: int) -> None:
    tensors = {"flat": [7], "grid": [5, 4, 1]}  # sharded along each dimension
    for layouts in GRIDS[ranks.world]:
        for calls in ranks.run(sharded.equals_reference, layouts, "missing", OPTIONS[name], torch.float32, groups):
            for step in calls:
                # and eight for the flags of skip_nonfinite
                expected = [("allreduce_", 8 * n + 8) for n in tensors[layouts]]
                assert step == (expected if name != "unadapted" else [])


@pytest.mark.parametrize("name", ["momentum", "nesterov-joint"])
def test_gradients_of_any_layout(ranks: Group, name: str) -> None:
    ranks.run(sharded.grads_of_any_layout, OPTIONS[name])


@pytest.mark.parametrize("name", ["momentum", "joint"])
def test_gradients_on_some_ranks_only(ranks: Group, name: str) -> None:
    for calls in ranks.run(sharded.grads_on_some_ranks, OPTIONS[name]):
        assert [len(step) for step in calls] == [1, 1]


@pytest.mark.parametrize("history", ["dense", "missing"])
def test_ranks_outside_a_mesh(ranks: Group, history: str) -> None:
    if ranks.world == 4:
        for name in ("momentum", "joint", "skip_nonfinite"):
            ranks.run(sharded.on_some_ranks, history, OPTIONS[name])


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("adapt", [True, False])
def test_ranks_outside_a_mesh_that_hold_other_tensors(ranks: Group, adapt: bool, listed: bool) -> None:
    if ranks.world == 4:
        ranks.run(sharded.on_some_ranks_and_not_alike, adapt, listed)


def test_a_mesh_dimension_of_one_rank_costs_nothing(ranks: Group) -> None:
    ranks.run(sharded.of_one_rank, OPTIONS["momentum"])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_all_ranks_skip_alike(ranks: Group, joint: bool, scaled: bool) -> None:
    ranks.run(sharded.skips_alike, joint, scaled)


@pytest.mark.parametrize("asks", ["found_inf", "skip_nonfinite"])
@pytest.mark.parametrize("adapt", [True, False])
def test_one_rank_stops_all(ranks: Group, asks: str, adapt: bool) -> None:
    ranks.run(sharded.stops_alike, asks, {**OPTIONS["momentum"], "adapt": adapt})


def test_the_message_has_the_dtype_of_sharded_norms(ranks: Group) -> None:
    ranks.run(sharded.plain_tensors_of_another_dtype)


@pytest.mark.parametrize("foreach", [False, True])
def test_no_temporary_of_parameter_size(ranks: Group, foreach: bool) -> None:
    ranks.run(sharded.is_written_where_it_is, OPTIONS["nesterov"], {"foreach": foreach})


@pytest.mark.parametrize("name", ["momentum", "nesterov-joint", "clip"])
def test_trust_ratios_are_those_of_the_whole_tensors(ranks: Group, name: str) -> None:
    ratios = ranks.run(sharded.trust_ratios, OPTIONS[name])
    assert all(each == ratios[0] for each in ratios)


def test_wrong_input_raises_before_anything_changes(ranks: Group) -> None:
    ranks.run(sharded.wrong_input)


@implementations
def test_the_functional(ranks: Group, implementation: Options) -> None:
    ranks.run(sharded.functional, implementation)


def test_version_counters(ranks: Group) -> None:
    ranks.run(sharded.versions)


def test_range_and_precision_of_the_norms(ranks: Group) -> None:
    ranks.run(sharded.large_and_small_numbers)
    ranks.run(sharded.precision)
