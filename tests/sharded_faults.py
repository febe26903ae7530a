"""What test_sharding_faults.py runs on every rank."""

import pytest
import torch

from cases import Options
from fastlars import LARS
from ranks import Rank
from sharded import DTensor, Layout, Replicate, Shard, local_of, place


def loads_only_what_it_can_step(rank: Rank) -> None:
    """A buffer with other placements, or on a mesh of the ranks in another order."""
    whole = torch.ones(8, 3, device=rank.device)
    param = torch.nn.Parameter(place(whole, Layout((8, 3), "all", (Shard(0),)), rank))
    turned = torch.distributed.device_mesh.DeviceMesh(rank.device, list(reversed(range(rank.world))))
    elsewhere = DTensor.from_local(torch.zeros(8 // rank.world, 3), turned, (Shard(0),), run_check=False)
    for buffer in (
        place(whole, Layout((8, 3), "all", (Replicate(),)), rank),
        place(whole, Layout((8, 3), "all", (Shard(1),)), rank),
        elsewhere,
    ):
        optimizer = LARS([param], lr=0.5, momentum=0.9, weight_decay=0.1)
        saved = optimizer.state_dict()
        saved["state"] = {0: {"momentum_buffer": buffer}}
        with pytest.raises(ValueError, match="must have the mesh and placements of its parameter"):
            optimizer.load_state_dict(saved)
        assert not optimizer.state
    saved["state"] = {0: {"momentum_buffer": torch.zeros_like(param)}}
    optimizer.load_state_dict(saved)
    param.grad = torch.ones_like(param)
    optimizer.step()


def frozen_with_a_gradient_on_one_rank(rank: Rank, implementation: Options) -> None:
    """The other ranks' shards of the parameter count, whether or not it requires gradients."""
    values = torch.arange(1.0, 25.0).view(8, 3)
    param = torch.nn.Parameter(place(values, Layout((8, 3), "all", (Shard(0),)), rank), requires_grad=False)
    optimizer = LARS([param], lr=1.0, trust_coefficient=0.1, eps=0.0, adapt=True, **implementation)
    if rank.rank == 0:
        param.grad = torch.ones_like(param)
    before = local_of(param).clone()
    optimizer.step()
    moved = float((local_of(param) - before).norm())
    assert moved == pytest.approx(0.1 * float(values.norm()) if rank.rank == 0 else 0.0, rel=1e-5)
