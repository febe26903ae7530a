"""One optimizer step.

It sorts tensors into buckets, computes norms, decides which groups are skipped, and updates the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import split
from .buckets import Group, Norms
from .formula import on_device
from .sharding import Sharded


def step(
    groups: list[Group],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    shards: Sharded | None = None,
) -> None:
    """Update the parameters of all groups, and store new momentum buffers and compensations in the groups' lists.

    All buckets are measured before any is updated, because one gradient that is not finite skips every group with
    ``skip_nonfinite``, and because all sharded tensors exchange their norms together.
    """
    local = groups if shards is None else [shards.local(group) for group in groups]
    buckets_of = [split(group, grad_scale, found_inf) for group in local]
    buckets = [bucket for each in buckets_of for bucket in each]

    # 1. Measure all buckets. No parameter changes here.
    norms = [bucket.backend.measure(bucket, shards is not None) for bucket in buckets]

    # 2. Decide which groups are skipped. All ranks reach the same decision.
    gated = [known for bucket, known in zip(buckets, norms) if bucket.options.skip_nonfinite]
    skip = any_nonfinite(gated, found_inf) if gated else found_inf
    if shards is not None:
        norms, found_inf, skip = shards.exchange(buckets, norms, found_inf, skip)

    # 3. Update.
    for bucket, known in zip(buckets, norms):
        bucket.backend.update(bucket, known, skip if bucket.options.skip_nonfinite else found_inf)

    for group, each in zip(local, buckets_of):
        for bucket in each:
            if len(bucket.indices) < len(group.params):  # otherwise the backend wrote into the group's own lists
                for i, buffer in zip(bucket.indices, bucket.momentum_buffers):
                    group.momentum_buffers[i] = buffer
                for i, compensation in zip(bucket.indices, bucket.compensations):
                    group.compensations[i] = compensation
    if shards is not None:
        shards.finish(groups, local)


def any_nonfinite(norms: list[Norms], found_inf: Tensor | None) -> Tensor:
    """Whether ``found_inf`` is set or a gradient norm is not finite, as a 0-dim bool tensor."""
    flags = [~known.grad.isfinite().all() for known in norms if known.grad is not None]
    if found_inf is not None:
        flags.append(found_inf.reshape(()) != 0)
    return torch.stack([on_device(flag, flags[0]) for flag in flags]).any()
