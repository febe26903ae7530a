"""Sharded tensors with buffers or gradients that no training loop makes."""

import pytest
import torch

import ranks as ranks_module
import sharded_faults
from cases import Options
from harness import ignore_nothing_adapted, implementations
from ranks import Group

pytestmark = [
    ignore_nothing_adapted,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]
ranks = ranks_module.fixture(2)


def test_loads_only_what_it_can_step(ranks: Group) -> None:
    ranks.run(sharded_faults.loads_only_what_it_can_step)


@implementations
def test_frozen_parameters_count_in_the_norm(ranks: Group, implementation: Options) -> None:
    ranks.run(sharded_faults.frozen_with_a_gradient_on_one_rank, implementation)
