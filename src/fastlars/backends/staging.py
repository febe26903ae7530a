"""Flat copies of tensors, for foreach steps that cannot run in place.

These are steps that the device may skip, and steps of half types. Half types are computed in float32 and rounded once. All
copies of a kind share one flat tensor, so copying, rounding and selecting take a few operations, however many tensors there
are. A bucket's plan keeps the copies. Lists of more than 32 MiB of float32 are updated chunk by chunk, and chunks share memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlars.buckets import Bucket
from fastlars.dtypes import is_half
from fastlars.formula import sign
from fastlars.norms import chunks, norms

from .layouts import are_laid_out_alike

LIMIT = 1 << 23  # elements of a chunk; a larger tensor is a chunk of its own

# A step takes parameters, gradients, momentum buffers and their indices in the bucket. It updates all but the gradients.
Step = Callable[[list[Tensor], list[Tensor], list[Tensor], list[int]], None]


class Copies(NamedTuple):
    """One or more copies of each tensor of a chunk."""

    rows: Tensor  # one row per kind: parameters, compensations, momentum buffers
    of_kind: list[Tensor]  # the rows one by one
    views: list[Tensor]  # every copy in the shape of its tensor, row by row


class Staging:
    """Memory for copies of one list of tensors. It keeps the shapes but not the tensors."""

    def __init__(self) -> None:
        """Allocate nothing yet, because most lists need no copies."""
        self._chunks: list[list[int]] = []
        self._layouts: list[tuple[torch.Size, tuple[int, ...], int]] = []
        self._made: dict[tuple[Any, ...], Copies] = {}
        self._flat: dict[tuple[Any, ...], Tensor] = {}

    def step(self, bucket: Bucket, skip: Tensor | None, step: Step) -> None:
        """Update copies of a bucket's tensors and write them back, unless the 0-dim bool tensor ``skip`` is true."""
        self._prepare(bucket.params)
        for i, places in enumerate(self._chunks):
            params, grads, buffers, compensations = bucket.at(places)
            written = params + compensations + buffers
            wide, new, old, read = self._room(bucket, i, gated=skip is not None)
            torch._foreach_copy_(wide.views + read, written + grads[: len(read)])
            if compensations:
                wide.of_kind[0].add_(wide.of_kind[1])
            step(wide.views[: len(params)], read or grads, wide.views[-len(buffers) :] if buffers else [], places)
            if new is not wide:
                new.rows.copy_(wide.rows)
                if compensations:
                    new.of_kind[1].copy_(wide.of_kind[0].sub_(new.of_kind[0]))
            if skip is not None:
                # select in the tensors' own dtype, because a round trip through float32 changes the bits of a NaN
                torch._foreach_copy_(old.views, written)
                torch.where(skip, old.rows, new.rows, out=new.rows)
            torch._foreach_copy_(written, new.views)

    def reserve(self, bucket: Bucket) -> None:
        """Allocate the memory for `step` before any bucket is updated, because memory may run out halfway through a step."""
        self._prepare(bucket.params)
        for i in range(len(self._chunks)):
            self._room(bucket, i, gated=bool(bucket.options.skip_nonfinite))

    def _room(self, bucket: Bucket, chunk: int, *, gated: bool) -> tuple[Copies, Copies, Copies, list[Tensor]]:
        """The copies to update, copies for the rounded results, copies of the old values, and copies of half-type gradients.

        Where a step does not need separate results or old values, the same copies are returned again.
        """
        like, kinds = bucket.params[0], 1 + bool(bucket.compensations) + bool(bucket.momentum_buffers)
        half, dtype = is_half(like.dtype), torch.float32 if is_half(like.dtype) else like.dtype
        wide = self._copies("step", chunk, kinds, like, dtype)
        new = self._copies("result", chunk, kinds, like, like.dtype) if half else wide
        old = self._copies("old", chunk, kinds, like, like.dtype) if gated else new
        # convert half-type gradients, because foreach operations take few launches only if all dtypes are equal
        read = self._copies("grads", chunk, 1, like, dtype).views if is_half(bucket.grads[0].dtype) else []
        return wide, new, old, read

    def joint_norms(self, bucket: Bucket) -> Tensor:
        """Compute `norms.joint_norms` of a bucket of half-precision tensors, in float32 copies."""
        self._prepare(bucket.params)
        options, result = bucket.options, []
        for i, places in enumerate(self._chunks):
            params, grads, _, _ = bucket.at(places)
            weights, directions = (
                self._copies(purpose, i, 1, params[0], torch.float32) for purpose in ("step", "grads")
            )
            torch._foreach_copy_(weights.views + directions.views, params + grads)
            # |s g + decay w| is |g + s decay w|, where s is 1 or -1
            directions.rows.add_(weights.rows, alpha=sign(options) * options.weight_decay)
            result.append(norms(directions.views, foreach=True))
        return torch.cat(result)

    def _prepare(self, params: list[Tensor]) -> None:
        if not self._chunks:
            self._chunks = chunks(params, LIMIT)
            for param in params:
                # keep the strides of dense tensors, because otherwise foreach operations take one launch per tensor
                dense = param if are_laid_out_alike(param) else torch.empty(param.shape, device="meta")
                self._layouts.append((param.shape, dense.stride(), param.numel()))

    def _copies(self, purpose: str, chunk: int, kinds: int, like: Tensor, dtype: torch.dtype) -> Copies:
        """``kinds`` copies of each tensor of a chunk. All chunks use the same memory, but each purpose has its own."""
        key = (purpose, chunk, kinds, dtype)
        if key in self._made:
            return self._made[key]
        layouts = [self._layouts[i] for i in self._chunks[chunk]]
        sizes = [numel for _, _, numel in layouts]
        flat = self._flat.get((purpose, kinds, dtype))
        if flat is None:
            largest = max(sum(self._layouts[i][2] for i in places) for places in self._chunks)
            flat = self._flat[purpose, kinds, dtype] = like.new_empty(kinds * largest, dtype=dtype)
        rows = flat[: kinds * sum(sizes)].view(kinds, -1)
        of_kind = list(rows.unbind())
        views = [
            piece.as_strided(shape, stride)
            for row in of_kind
            for piece, (shape, stride, _) in zip(row.split_with_sizes(sizes), layouts)
        ]
        self._made[key] = Copies(rows, of_kind, views)
        return self._made[key]
