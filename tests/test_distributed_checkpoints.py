"""Checkpoints of torch.distributed.checkpoint resume: bit for bit on the same ranks, within rounding on others."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import sharded_models
from cases import Options
from fastlars import LARS
from harness import ignore_nothing_adapted
from ranks import FULLY_SHARDS_ON_CPU, Group

pytestmark = [
    pytest.mark.slow,
    ignore_nothing_adapted,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]
WAY = "fsdp" if FULLY_SHARDS_ON_CPU else "tensor_parallel"
NESTEROV: Options = {"nesterov": True, "lr_in_momentum": True}
DAMPENING: Options = {"dampening": 0.25, "trust_denominator": "joint"}


KINDS = [("plain", NESTEROV), ("flattened", DAMPENING), ("async", NESTEROV)]
kinds = pytest.mark.parametrize(("kind", "options"), KINDS, ids=[kind for kind, _ in KINDS])


def resume(
    of: Callable[[int], Group],
    folder: Path,
    saved_on: int,
    ways: list[tuple[int, str]],
    way_saved: str,
    kind: str,
    options: Options,
) -> None:
    run = sharded_models.train_with_checkpoint
    values, _ = of(saved_on).run(run, way_saved, str(folder), kind, False, options)[0]
    for world, way in ways:
        for resumed, _ in of(world).run(run, way, str(folder), kind, True, options):
            for mine, expected in zip(resumed, values, strict=True):
                torch.testing.assert_close(torch.tensor(mine), torch.tensor(expected), rtol=1e-4, atol=1e-6)


@kinds
def test_other_ranks_resume_within_rounding(
    process_groups: Callable[[int], Group], tmp_path: Path, kind: str, options: Options
) -> None:
    # tensor parallelism of torch 2.4 does not support one rank
    on_one = [(1, WAY), (1, "whole")] if FULLY_SHARDS_ON_CPU else [(1, "whole")]
    resume(process_groups, tmp_path / "4", 4, [(2, WAY), *on_one], WAY, kind, options)
    resume(process_groups, tmp_path / "2", 2, [(4, WAY)], WAY, kind, options)
    resume(process_groups, tmp_path / "1", 1, [(4, WAY)], on_one[0][1], kind, options)


@pytest.mark.version
@kinds
def test_the_same_ranks_resume_without_a_changed_bit(
    process_groups: Callable[[int], Group], tmp_path: Path, kind: str, options: Options
) -> None:
    run = sharded_models.train_with_checkpoint
    saved = process_groups(2).run(run, WAY, str(tmp_path), kind, False, options)
    resumed = process_groups(2).run(run, WAY, str(tmp_path), kind, True, options)
    assert [bits for _, bits in resumed] == [bits for _, bits in saved]


@pytest.mark.parametrize("flat", [False, True], ids=["plain", "flattened"])
def test_half_precision_moves_to_other_ranks_without_a_changed_bit(
    process_groups: Callable[[int], Group], tmp_path: Path, flat: bool
) -> None:
    run = sharded_models.half_precision_checkpoint
    saved, *others = process_groups(2).run(run, WAY, str(tmp_path), flat, False)
    assert others == [saved]
    assert sum(len(tensors) == 3 for tensors in saved.values()) == 4, "each weight has a compensation"
    for world, way in ((4, WAY), (2, WAY), (1, "whole")):
        for loaded in process_groups(world).run(run, way, str(tmp_path), flat, True):
            assert loaded == saved, (world, way)


@pytest.mark.filterwarnings("ignore:TypedStorage:UserWarning")  # of torch 2.4's own
@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")
@pytest.mark.parametrize("flat", [False, True], ids=["plain", "flattened"])
def test_a_checkpoint_from_before_kahan_sum(tmp_path: Path, flat: bool) -> None:
    """Without the key and without compensations: loaded in part, the group keeps what it says and sums start at zero."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def trained(steps: int) -> tuple[torch.nn.Module, LARS]:
        model = torch.nn.Linear(4, 3, dtype=torch.bfloat16)
        optimizer = LARS(model.parameters(), lr=3e-3, momentum=0.9, adapt=True, kahan_sum=True)
        for step in range(steps):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.5 + step)
            optimizer.step()
        return model, optimizer

    saved_model, saved = trained(2)
    old = get_optimizer_state_dict(saved_model, saved, options=options)
    new = {"kahan_sum", "compensation"}
    for entry in [old] if flat else [*old["state"].values(), *old["param_groups"]]:
        for key in [key for key in entry if key.split(".")[-1] in new]:
            del entry[key]
    checkpoint.save(old, checkpoint_id=tmp_path)
    model, optimizer = trained(0)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    with pytest.raises(checkpoint.api.CheckpointException, match=r"Missing key .*\.(kahan_sum|compensation)"):
        checkpoint.load(state, checkpoint_id=tmp_path)
    planner = checkpoint.DefaultLoadPlanner(allow_partial_load=True)
    checkpoint.load(state, checkpoint_id=tmp_path, planner=planner)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    assert optimizer.param_groups[0]["kahan_sum"] is True
    for p, of_saved in zip(model.parameters(), saved_model.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], saved.state[of_saved]["momentum_buffer"])
        assert optimizer.state[p]["momentum_buffer"].any() and not optimizer.state[p]["compensation"].any()
