"""The step of sharded tensors. It updates local shards with the norms of whole tensors. Only this file uses DTensor.

Each step exchanges norms once. Every rank writes the squared norms of its shards into a table with two columns, for the param
norm and the direction norm. The table has one row per sharded tensor of all adapted groups, in the optimizer's order, even if
this rank has no elements or no gradient for it. For each mesh dimension along which tensors are sharded, one all-reduce adds
the rows of these tensors. Dimensions with one rank, or along which nothing is sharded, need no communication. Dimensions of
different meshes with the same ranks share one all-reduce. The last row holds flags that ask to skip the step. The all-reduce
adds them too, so all ranks of a dimension reach the same decision.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import compress
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .buckets import Bucket, Group, Norms
from .compat import bump_versions
from .dtypes import norm_dtype, real
from .formula import is_adapted
from .norms import norms
from .options import Options

# DTensor's module since torch 2.5, and in 2.4. Not imported here, because a program that has loaded neither has no DTensors.
_MODULES = ("torch.distributed.tensor", "torch.distributed._tensor")
_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
_XLA = "torch_xla.distributed.spmd"


def dtensor() -> Any:
    """The class DTensor, or None if the program has not loaded it."""
    for name in _MODULES:
        if name in sys.modules and (kind := getattr(sys.modules[name], "DTensor", None)) is not None:
            return kind
    return None


def any_sharded(params: Iterable[Any]) -> bool:
    """Whether any of these is a DTensor. Every step calls this, so it looks at each type only once.

    torch_xla's XLAShardedTensor does not count. It inherits from DTensor, but represents the whole tensor. XLA splits the
    computation and adds the collectives itself, so LARS's norms of such a tensor are already global.
    """
    return any(map(_is_dtensor, set(map(type, params))))


def is_sharded(tensor: Any) -> bool:
    """Whether this tensor is a DTensor, in the sense of `any_sharded`."""
    return _is_dtensor(type(tensor))


def _is_dtensor(cls: type) -> bool:
    if cls is Tensor or cls is torch.nn.Parameter:
        # return before reading sys.modules, because Dynamo would guard its size and each import would recompile the step
        return False
    kind, by_class_only = dtensor(), getattr(sys.modules.get(_XLA), "XLAShardedTensor", ())
    return kind is not None and issubclass(cls, kind) and not issubclass(cls, by_class_only)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor. Other tensors are returned unchanged."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # otherwise autograd would record the shard as a view
        part: Any = tensor.to_local()  # type: ignore[attr-defined]
    return part if type(part) is Tensor else part.wait()  # wait for a pending collective


def local_of(item: Any) -> Any:
    """The `local` shard of a tensor, which may come as a (name, tensor) pair."""
    return local(item[1] if isinstance(item, tuple) else item)


def _divides(mesh: Any, i: int, placement: Any) -> bool:
    """Whether this rank has only a part of a tensor along a mesh dimension."""
    # every placement except Replicate counts, because Shard is not the only one that divides tensors
    return not placement.is_replicate() and mesh.size(i) > 1 and mesh.get_coordinate() is not None


def is_divided(tensor: Any) -> bool:
    """Whether this tensor's norms depend on shards of it, or of its gradient, that other ranks hold."""
    if not is_sharded(tensor):
        return False
    layouts = [tensor, tensor.grad] if is_sharded(tensor.grad) else [tensor]
    return any(_divides(each.device_mesh, i, p) for each in layouts for i, p in enumerate(each.placements))


def check_not_flattened(params: Iterable[Any], where: str) -> None:
    """Raise for parameters of FSDP1, which flattens or slices the tensors whose norms LARS needs."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    for i, item in enumerate(params):
        param = item[1] if isinstance(item, tuple) else item
        if getattr(param, "_fsdp_flattened", False):
            raise RuntimeError(
                f"{where}: the parameter at position {i} belongs to FullyShardedDataParallel, which flattens tensors, so "
                "LARS cannot take the norms of whole tensors; shard the model with fully_shard "
                "(torch.distributed.fsdp, in torch 2.4 and 2.5 torch.distributed._composable.fsdp) instead"
            )


def check_not_divided(where: str) -> None:
    """Raise for skip_nonfinite inside torch's ZeroRedundancyOptimizer, where each rank updates only some of the tensors."""
    frame: FrameType | None = sys._getframe() if _ZERO in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__") == _ZERO:
            raise ValueError(
                f"{where}: skip_nonfinite=True under ZeroRedundancyOptimizer would let each rank decide for its own "
                "tensors, so only some of them would be skipped; leave it out and check the gradients, which DDP makes equal "
                "on all ranks, before step() (see Several processes, ZeRO in the documentation)"
            )
        frame = frame.f_back


def check_saved_buffer(buffer: Tensor, param: Tensor, what: str) -> None:
    """Raise for a saved buffer that is not distributed like its parameter, because every step would fail."""
    if any_sharded([buffer]) != any_sharded([param]):
        raise TypeError(
            f"{what} must be a DTensor exactly if the parameter is one; save and load through "
            "torch.distributed.checkpoint.state_dict, which distributes what it loads"
        )
    if any_sharded([param]) and not _is_laid_out_as(buffer, param):
        raise ValueError(
            f"{what} must have the mesh and placements of its parameter, {param.placements}, got "  # type: ignore[attr-defined]
            f"{buffer.placements}; redistribute it, or save and load through torch.distributed.checkpoint.state_dict"  # type: ignore[attr-defined]
        )


def sharded(groups: Sequence[tuple[Sequence[Tensor], Options]]) -> Sharded | None:
    """The `Sharded` of all groups of an optimizer, or None if no tensor is sharded."""
    return Sharded(groups) if any(any_sharded(params) for params, _ in groups) else None


class Sharded:
    """The sharded tensors of one step: their local shards, and the exchange of norms."""

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], Options]]) -> None:
        """Take all params of an optimizer, with or without gradients. All ranks must pass the same ones in the same order."""
        self._kind = dtensor()
        self._dims: dict[tuple[Any, ...], tuple[frozenset[int], ...]] = {}
        # the ranks of a mesh dimension -> (its process group, its device type)
        self._joined: dict[frozenset[int], tuple[Any, str]] = {}
        self._rows: dict[frozenset[int], list[int]] = {}
        self._options: list[Options] = []  # for each row, the options of its group
        self._parts: list[Tensor] = []  # for each row, this rank's shard
        self._sharded: set[int] = set()  # ids of all parameters that are DTensors
        self._part_of: dict[int, Tensor] = {}  # id of a parameter -> this rank's shard
        self._row: dict[int, int] = {}  # id of a shard -> its row in the table
        self._skips = any(options.skip_nonfinite for _, options in groups)
        self._whole_norms: Tensor | None = None  # from the last exchange, one row per tensor
        for params, options in groups:
            for param in params:
                if is_sharded(param):
                    self._sharded.add(id(param))
                    self._add(param, options)

    def _add(self, param: Any, options: Options) -> None:
        if options.differentiable:
            raise RuntimeError("differentiable=True needs whole tensors, got a DTensor; set it to False")
        dims = self._sharded_dims(param)
        if not dims or not is_adapted(options):
            return
        # call `local` once, because each call makes a new view, and shards are found by their id
        part = self._part_of[id(param)] = local(param)
        row = len(self._parts)
        self._row[id(part)] = row
        self._parts.append(part)
        self._options.append(options)
        for ranks in dims:
            self._rows[ranks].append(row)

    def _sharded_dims(self, param: Any) -> tuple[frozenset[int], ...]:
        """The mesh dimensions along which a tensor is sharded, each as a set of ranks."""
        mesh, placements = param.device_mesh, param.placements
        if (mesh, placements) in self._dims:
            return self._dims[mesh, placements]
        dims = []
        for i, placement in enumerate(placements):
            if placement.is_partial():
                raise RuntimeError(
                    f"LARS cannot update a parameter with placements {placements}; redistribute it first"
                )
            if not _divides(mesh, i, placement):
                continue
            group = mesh.get_group(i)
            ranks = frozenset(torch.distributed.get_process_group_ranks(group))
            # dimensions are kept in order of appearance, which is the same on all these ranks, so their collectives match
            self._joined.setdefault(ranks, (group, mesh.device_type))
            self._rows.setdefault(ranks, [])
            dims.append(ranks)
        self._dims[mesh, placements] = tuple(dims)
        return tuple(dims)

    def local(self, group: Group) -> Group:
        """The group with local shards instead of sharded tensors. Gradients are first redistributed to match parameters."""
        params, grads = group.params, group.grads
        buffers = group.momentum_buffers if group.options.momentum != 0 else []
        for param, grad, buffer in zip(params, grads, buffers or [None] * len(params), strict=True):
            self._check(param, grad, buffer, "momentum_buffer")
        for param, grad, compensation in zip(params, grads, group.compensations):  # compensations may be empty
            self._check(param, grad, compensation, "compensation")
        laid_out: list[Any] = [
            grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
            if is_sharded(param) and not _is_laid_out_as(grad, param)
            else grad
            for param, grad in zip(params, grads, strict=True)
        ]
        return group._replace(
            params=[self._part_of[id(param)] if id(param) in self._part_of else local(param) for param in params],
            grads=[local(grad) for grad in laid_out],
            momentum_buffers=[None if buffer is None else local(buffer) for buffer in buffers],
            compensations=[None if each is None else local(each) for each in group.compensations],
        )

    def _check(self, param: Any, grad: Any, buffer: Any, name: str) -> None:
        if not is_sharded(param):
            if is_sharded(grad) or is_sharded(buffer):
                raise TypeError(
                    f"the gradient or {name} of a plain parameter of shape {tuple(param.shape)} is a DTensor; "
                    "make both plain (full_tensor) or distribute the parameter"
                )
            return
        if not is_sharded(grad) or grad.device_mesh != param.device_mesh:
            raise RuntimeError(
                f"the gradient of a DTensor parameter of shape {tuple(param.shape)} must be a DTensor on its mesh, "
                f"{param.device_mesh}; got {getattr(grad, 'device_mesh', type(grad).__name__)}"
            )
        if buffer is not None and not (is_sharded(buffer) and _is_laid_out_as(buffer, param)):
            raise RuntimeError(
                f"the {name} of a DTensor parameter of shape {tuple(param.shape)} must be a DTensor of its "
                f"placements, {param.placements}; load checkpoints through torch.distributed.checkpoint.state_dict"
            )

    def finish(self, groups: Sequence[Group], stepped: Sequence[Group]) -> None:
        """After the step, store new state as DTensors, and bump the version counters of all DTensors that changed."""
        written: list[Tensor] = []
        for group, local_group in zip(groups, stepped, strict=True):
            sharded = [id(param) in self._sharded for param in group.params]
            written += compress(group.params, sharded)
            for whole, parts in (
                (group.momentum_buffers, local_group.momentum_buffers),
                (group.compensations, local_group.compensations),
            ):
                for i, part in enumerate(parts):
                    if part is not None and whole[i] is None:  # a skipped first step may not have made a buffer
                        whole[i] = self._like(group.params[i], part) if sharded[i] else part
                written += [made for made in compress(whole[: len(parts)], sharded) if made is not None]
        bump_versions(written)

    def _like(self, param: Any, buffer: Any) -> Any:
        layout = {"shape": param.shape, "stride": param.stride()}
        return self._kind.from_local(buffer, param.device_mesh, param.placements, run_check=False, **layout)

    def exchange(
        self, buckets: Sequence[Bucket], measured: list[Norms], found_inf: Tensor | None, nonfinite: Tensor | None
    ) -> tuple[list[Norms], Tensor | None, Tensor | None]:
        """Combine the norms of shards into norms of whole tensors, and combine the skip flags. Every rank must call it.

        Args:
            buckets: the buckets of the step.
            measured: this rank's norms of each bucket.
            found_inf: 1-element tensor, not 0 if this rank must skip the step. It is None on all ranks or on none.
            nonfinite: the same for groups with ``skip_nonfinite``, or ``found_inf`` if this rank has no gradients in them.

        Returns:
            The norms of whole tensors, and ``found_inf`` and ``nonfinite`` of all ranks together, as 0-dim tensors. If there is
            nothing to exchange, the arguments are returned unchanged.
        """
        # Decide for each mesh dimension separately whether it needs an all-reduce, because all its ranks must decide the same.
        # One decision for all dimensions could differ between ranks, because some ranks are not in every mesh.
        asked = [ranks for ranks in self._joined if self._rows[ranks] or self._skips or found_inf is not None]
        if not asked:
            return measured, found_inf, nonfinite
        table = self._table(buckets, measured, found_inf, nonfinite)
        for ranks in asked:
            rows, (group, device_type) = self._rows[ranks], self._joined[ranks]
            alone = len(rows) == len(self._parts)
            index = None if alone else _index((*rows, len(self._parts)), table.device)
            message = table if index is None else table[index]
            # move to the mesh's device, because shards may be offloaded to the CPU
            message = message.to(device_type, self._dtype(rows))
            torch.distributed.all_reduce(message, group=group)
            message = message.to(table.device, table.dtype)
            if index is not None:
                table[index] = message
            else:
                table = message
        flags = table[-1] != 0
        self._whole_norms = whole = table.sqrt()
        return (
            [self._whole(bucket, known, whole) for bucket, known in zip(buckets, measured, strict=True)],
            None if found_inf is None else flags[0],
            flags[1],
        )

    def known_norms(self, param: Tensor) -> Tensor | None:
        """Param norm and direction norm of a whole sharded tensor from the last exchange, or None for other tensors."""
        part = self._part_of.get(id(param))
        return None if part is None or self._whole_norms is None else self._whole_norms[self._row[id(part)]]

    def _table(
        self,
        buckets: Sequence[Bucket],
        measured: Sequence[Norms],
        found_inf: Tensor | None,
        nonfinite: Tensor | None,
    ) -> Tensor:
        """This rank's squared norms, one row per tensor, and a last row for the flags."""
        device = self._device(buckets)
        dtype = self._dtype(range(len(self._parts)))
        pieces = [torch.zeros(1, 2, device=device)]  # the row of the flags, which the indexing below moves to the end
        count = 1
        place = [0] * len(self._parts)
        for bucket, known in zip(buckets, measured, strict=True):
            if known.param is not None and known.direction is not None:
                pieces.append(torch.stack([known.param, known.direction], dim=1))
                for param in bucket.params:
                    if id(param) in self._row:
                        place[self._row[id(param)]] = count
                    count += 1
        for row in range(len(self._parts)):
            if place[row] != 0:
                continue
            # this rank has no gradient for the tensor, but ranks that have one need the norm of the whole parameter
            norm = norms([real(self._parts[row])], foreach=False)
            options = self._options[row]
            decayed = norm * options.weight_decay if options.trust_denominator == "joint" else torch.zeros_like(norm)
            pieces.append(torch.stack([norm, decayed], dim=1))
            place[row] = count
            count += 1
        table = torch.cat([piece.to(device=device, dtype=dtype) for piece in pieces])
        table = table[_index((*place, 0), device)].square_()
        for i, flag in enumerate((found_inf, nonfinite)):
            if flag is not None:
                table[-1, i] = flag.reshape(()) != 0
        return table

    def _dtype(self, rows: Iterable[int]) -> torch.dtype:
        """The dtype of a message with the norms of these rows. All ranks that exchange the message choose the same dtype."""
        wide = any(norm_dtype(self._parts[row].dtype.to_real()) == torch.float64 for row in rows)
        return torch.float64 if wide else torch.float32

    def _device(self, buckets: Sequence[Bucket]) -> torch.device:
        if self._parts:
            return self._parts[0].device
        return next((bucket.params[0].device for bucket in buckets), torch.device("cpu"))

    def _whole(self, bucket: Bucket, known: Norms, whole: Tensor) -> Norms:
        if known.param is None or known.direction is None:
            return known
        norms_here = torch.stack([known.param, known.direction], dim=1)
        n = whole.size(0)
        place = [self._row.get(id(param), n + i) for i, param in enumerate(bucket.params)]
        if all(index >= n for index in place):
            return known
        both = torch.cat([whole.to(norms_here), norms_here])
        param, direction = both[_index(tuple(place), both.device)].t().contiguous().unbind()
        return known._replace(param=param, direction=direction)


def _is_laid_out_as(tensor: Any, param: Any) -> bool:
    return tensor.placements == param.placements and tensor.device_mesh == param.device_mesh  # type: ignore[no-any-return]


def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.tensor(places, dtype=torch.int64, device=device)
    return _kept_index(places, device)


@lru_cache(maxsize=64)  # cached, because building an index copies from the host, which a CUDA graph cannot capture
def _kept_index(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(places, dtype=torch.int64, device=device)
