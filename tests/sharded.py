"""What test_sharding.py runs on every rank: hand-made sharded tensors next to the float64 reference of whole tensors."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import fastlars
from cases import LR_FACTORS, OPTIONS, Options, make_grads, nonfinite, tolerance
from fastlars import LARS
from fastlars.sharding import is_divided
from ranks import Rank
from recording import Recorder
from reference import Array, ReferenceLARS

try:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
except ImportError:  # torch 2.4
    from torch.distributed._tensor import DTensor, Partial, Replicate, Shard, distribute_tensor


@dataclass(frozen=True)
class Layout:
    """A tensor's shape and place: the name of a mesh and a placement for each of its dimensions; no mesh: a plain tensor."""

    shape: tuple[int, ...]
    mesh: str = ""
    placements: tuple[Any, ...] = ()


# one-dimensional, over all ranks
FLAT = [
    Layout((6, 4), "all", (Shard(0),)),
    Layout((5, 3), "all", (Shard(0),)),  # uneven
    Layout((1, 3), "all", (Shard(0),)),  # only rank 0 has elements of it
    Layout((3, 0), "all", (Shard(0),)),
    Layout((3, 7), "all", (Shard(1),)),
    Layout((), "all", (Replicate(),)),
    Layout((7,), "all", (Replicate(),)),
    Layout((8, 3, 3, 3), "all", (Shard(0),)),
    Layout((140, 131), "all", (Shard(0),)),
    Layout((4, 5)),
    Layout((9,)),
]
# of two dimensions and of both of their kinds: four ranks
GRID = [
    Layout((6, 4), "grid", (Shard(0), Shard(1))),
    Layout((6, 4), "grid", (Shard(0), Shard(0))),
    Layout((5, 3), "grid", (Replicate(), Shard(0))),
    Layout((5, 3), "grid", (Shard(1), Replicate())),
    Layout((3, 2), "grid", (Replicate(), Replicate())),
    Layout((1, 3), "rows", (Shard(0),)),
    Layout((4, 3), "columns", (Shard(0),)),
    Layout((8,), "all", (Shard(0),)),
    Layout((2, 2), "again", (Shard(0), Replicate())),
    Layout((4, 5)),
]
LAYOUTS = {"flat": FLAT, "grid": GRID, "rows": [layout for layout in GRID if layout.mesh in ("grid", "rows", "")]}

_meshes: dict[str, DeviceMesh] = {}


def meshes(rank: Rank) -> dict[str, DeviceMesh]:
    """Meshes by name, created once, because each is a process group."""
    if not _meshes:
        _meshes["all"] = init_device_mesh(rank.device, (rank.world,), mesh_dim_names=("all",))
        if rank.world == 4:
            grid = _meshes["grid"] = init_device_mesh(rank.device, (2, 2), mesh_dim_names=("rows", "columns"))
            _meshes["rows"], _meshes["columns"] = grid["rows"], grid["columns"]
            _meshes["first two"] = DeviceMesh(rank.device, [0, 1])
            # other process groups with the same ranks
            _meshes["again"] = init_device_mesh(rank.device, (2, 2), mesh_dim_names=("again", "and_again"))
    return _meshes


def part_of(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> Tensor:
    """This rank's shard of a whole tensor, found without DTensor."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return whole.new_empty(0)
    for i, placement in enumerate(placements):
        if placement.is_shard():
            chunks = whole.chunk(mesh.size(i), placement.dim)
            empty = whole.narrow(placement.dim, 0, 0)
            whole = chunks[coordinate[i]] if coordinate[i] < len(chunks) else empty
    return whole


def place(whole: Tensor, layout: Layout, rank: Rank) -> Tensor:
    """The whole tensor, plain or distributed. Nothing is sent."""
    if not layout.mesh:
        return whole
    mesh = meshes(rank)[layout.mesh]
    local = part_of(whole, mesh, layout.placements).clone()
    return DTensor.from_local(  # type: ignore[no-any-return]
        local, mesh, layout.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def local_of(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Collectives(TorchDispatchMode):
    """Records the collectives inside a block, with their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
            self.calls.append((func.name().split("::")[1], size))
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------- laid out by hand
@dataclass
class Setup:
    """The same tensors twice: whole for the reference, and as this rank holds them."""

    layouts: list[Layout]
    wholes: list[Tensor]
    params: list[torch.nn.Parameter]
    optimizer: LARS
    reference: ReferenceLARS

    def set_grads(self, rank: Rank, grads: Sequence[Tensor | None]) -> None:
        for param, grad, layout in zip(self.params, grads, self.layouts, strict=True):
            param.grad = None if grad is None else place(grad, layout, rank)

    def check(self, rank: Rank, what: str, steps: int) -> None:
        buffers = [self.optimizer.state.get(p, {}).get("momentum_buffer") for p in self.params]
        for i, layout in enumerate(self.layouts):
            where = f"{what}: tensor {i}, {layout}"
            pairs = [(self.params[i].detach(), self.reference.params[i], self.reference.param_sizes[i])]
            expected = self.reference.momentum_buffers[i]
            if expected is not None and buffers[i] is not None:
                assert isinstance(buffers[i], DTensor) == bool(layout.mesh), where
                pairs.append((buffers[i], expected, self.reference.buffer_sizes[i]))
            for tensor, whole, size in pairs:
                self._check_one(rank, tensor, whole, layout, where, steps * size)

    def _check_one(self, rank: Rank, tensor: Tensor, whole: Array, layout: Layout, where: str, size: float) -> None:
        expected = torch.as_tensor(whole)
        if layout.mesh:
            assert isinstance(tensor, DTensor), where
            assert tensor.placements == layout.placements, where
            expected = part_of(expected, meshes(rank)[layout.mesh], layout.placements)
        local = local_of(tensor)
        torch.testing.assert_close(
            local.cpu().to(expected.dtype),
            expected,
            msg=lambda text: f"{where}: {text}",
            equal_nan=True,
            **tolerance(tensor.dtype, size),
        )


def setup(rank: Rank, layouts: list[Layout], groups: int, dtype: torch.dtype, options: Options) -> Setup:
    generator = torch.Generator().manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    wholes = [torch.randn(layout.shape, generator=generator, dtype=wide).to(rank.device, dtype) for layout in layouts]
    params = [torch.nn.Parameter(place(whole, layout, rank)) for whole, layout in zip(wholes, layouts, strict=True)]
    optimizer = LARS([{"params": params[i::groups]} for i in range(groups)], **options)
    # in the order of the layouts, which does not depend on the options
    reference = ReferenceLARS(
        [{"params": wholes}], **{k: v for k, v in options.items() if k not in ("foreach", "fused")}
    )
    return Setup(layouts, wholes, params, optimizer, reference)


def equals_reference(
    rank: Rank, layouts: str, history: str, options: Options, dtype: torch.dtype = torch.float32, groups: int = 1
) -> list[list[tuple[str, int]]]:
    """Step next to the reference. Returns the collectives of each step."""
    s = setup(rank, LAYOUTS[layouts], groups, dtype, options)
    calls = []
    for step in range(3):
        lr = options["lr"] * LR_FACTORS[step]
        for group in (*s.optimizer.param_groups, *s.reference.groups):
            group["lr"] = lr
        if history == "nonfinite":
            # only the last element, which another rank may hold
            grads: list[Tensor | None] = [nonfinite(whole, step, i) for i, whole in enumerate(s.wholes)]
        else:
            grads = make_grads(history, s.wholes, step)
        s.reference.step(grads)
        s.set_grads(rank, grads)
        kept = [None if p.grad is None else local_of(p.grad).clone() for p in s.params]
        with Collectives() as collectives:
            s.optimizer.step()
        calls.append(collectives.calls)
        s.check(rank, f"{options}, {history}, step {step}", 2 * (step + 1))
        for param, grad in zip(s.params, kept, strict=True):
            if grad is not None:  # it is not written
                torch.testing.assert_close(local_of(param.grad), grad, rtol=0, atol=0, equal_nan=True)
    return calls


def grads_of_any_layout(rank: Rank, options: Options) -> None:
    """Gradients that autograd left replicated or partial count like sharded ones."""
    mesh = meshes(rank)["all"]
    layout = Layout((5, 4), "all", (Shard(0),))
    for placement in (Replicate(), Partial(), Shard(1)):
        s = setup(rank, [layout, layout], 1, torch.float32, options)
        for step in range(2):
            grads = make_grads("dense", s.wholes, step)
            s.reference.step(grads)
            for param, grad in zip(s.params, grads, strict=True):
                assert grad is not None
                local = grad / rank.world if placement.is_partial() else part_of(grad, mesh, (placement,)).clone()
                param.grad = DTensor.from_local(
                    local, mesh, (placement,), run_check=False, shape=grad.shape, stride=grad.stride()
                )
            s.optimizer.step()
            s.check(rank, f"{placement}, step {step}", 2 * (step + 1))


def grads_on_some_ranks(rank: Rank, options: Options) -> list[list[tuple[str, int]]]:
    """A rank without a gradient takes part, leaves its shard alone, and contributes the norm of its shard of the parameter.

    For the other ranks its shard of the gradient is zero.
    """
    layout = Layout((8, 3), "all", (Shard(0),))
    plain = Layout((4, 2))
    s = setup(rank, [layout, plain, layout, Layout((1, 3), "all", (Shard(0),))], 2, torch.float32, options)
    calls = []
    for step in range(2):
        # rank 0 has no gradient of tensor 0, and the last rank has none at all (it holds nothing of tensor 3 anyway)
        has = [rank.rank != 0, rank.rank != rank.world - 1, rank.rank != rank.world - 1, rank.rank != rank.world - 1]
        has[0] &= rank.rank != rank.world - 1 or rank.world == 2
        grads = [g for g in make_grads("dense", s.wholes, step) if g is not None]
        there = [
            [r != 0 and (r != rank.world - 1 or rank.world == 2), *[r != rank.world - 1] * 3] for r in range(rank.world)
        ]
        assert there[rank.rank] == has
        seen = [grad.clone() for grad in grads]
        for i in (0, 2):
            for r, chunk in enumerate(seen[i].chunk(rank.world)):
                if not there[r][i]:
                    chunk.zero_()
        before = [local_of(p).clone() for p in s.params]
        s.reference.step(seen)
        s.set_grads(rank, [g if there[rank.rank][i] else None for i, g in enumerate(grads)])
        with Collectives() as collectives:
            s.optimizer.step()
        calls.append(collectives.calls)
        for i, p in enumerate(s.params):
            if not there[rank.rank][i]:
                assert torch.equal(local_of(p), before[i])
                assert p not in s.optimizer.state or rank.world == 0
        # the norms of the next step are those of the current values
        present = [i for i in range(4) if there[rank.rank][i]]
        for i in present:
            expected = torch.as_tensor(s.reference.params[i])
            if s.layouts[i].mesh:
                expected = part_of(expected, meshes(rank)["all"], (Shard(0),))
            torch.testing.assert_close(local_of(s.params[i]).double().cpu(), expected, rtol=1e-5, atol=1e-5)
        wholes = [gather(rank, p, layout) for p, layout in zip(s.params, s.layouts, strict=True)]
        buffers = list(s.reference.momentum_buffers)
        s.reference.realign(wholes, buffers)
    return calls


def gather(rank: Rank, param: Tensor, layout: Layout) -> Tensor:
    local = param.detach()
    return local.full_tensor() if isinstance(local, DTensor) else local  # type: ignore[no-any-return]


def skips_alike(rank: Rank, joint: bool, scaled: bool) -> None:
    """If one rank's gradient is not finite, no rank steps any group that asks, sharded or plain. Other groups step.

    That also holds if a scaler has found nothing.
    """
    kind = {"trust_denominator": "joint"} if joint else {}
    layouts = [Layout((8, 3), "all", (Shard(0),)), Layout((4, 2)), Layout((6,), "all", (Replicate(),))]
    for bad in range(len(layouts)):
        wholes = [torch.ones(layout.shape, device=rank.device) for layout in layouts]
        params = [torch.nn.Parameter(place(w, layout, rank)) for w, layout in zip(wholes, layouts, strict=True)]
        careless = torch.nn.Parameter(place(wholes[0], layouts[0], rank))
        optimizer = LARS(
            [
                {"params": params[:1], "weight_decay": 0.1, "skip_nonfinite": True, **kind},
                {"params": params[1:], "weight_decay": 0.0, "adapt": False, "skip_nonfinite": True},
                {"params": [careless], "weight_decay": 0.1, **kind},
            ],
            lr=0.5,
            momentum=0.9,
        )
        if scaled:
            optimizer.found_inf = torch.zeros(1, device=rank.device)
        for step in range(2):
            for param in [*params, careless]:
                param.grad = torch.ones_like(param)
            if step == 0 and rank.rank == rank.world - 1:
                local_of(params[bad].grad).view(-1)[-1] = torch.nan
            before = [local_of(p).clone() for p in [*params, careless]]
            optimizer.step()
            changed = [not torch.equal(local_of(p), old) for p, old in zip([*params, careless], before, strict=True)]
            assert changed == [step == 1] * 3 + [True], (bad, step, changed)


def on_some_ranks(rank: Rank, history: str, options: Options) -> None:
    """Ranks outside a tensor's mesh hold nothing of it and take no part in its all-reduce. All ranks step what they hold."""
    layouts = [Layout((6, 4), "first two", (Shard(0),)), Layout((8, 3), "all", (Shard(0),)), Layout((4, 2))]
    s = setup(rank, layouts, 1, torch.float32, options)
    for step in range(3):
        grads = make_grads(history, s.wholes, step)
        s.reference.step(grads)
        s.set_grads(rank, grads)
        with Collectives() as collectives:
            s.optimizer.step()
        assert sorted(collectives.calls) == [("allreduce_", 8 + 8)] * (2 if rank.rank < 2 else 1)
        s.check(rank, f"{history}, step {step}", 2 * (step + 1))


def on_some_ranks_and_not_alike(rank: Rank, adapt: bool, listed: bool) -> None:
    """Ranks send the same, even if some hold no float64 tensor, do not list it, or have nothing adapted."""
    layouts = [Layout((6, 4), "first two", (Shard(0),)), Layout((8, 3), "all", (Shard(0),))]
    wide, narrow = (
        torch.nn.Parameter(place(torch.ones(layout.shape, dtype=dtype, device=rank.device), layout, rank))
        for layout, dtype in zip(layouts, (torch.float64, torch.float32), strict=True)
    )
    groups = [{"params": [wide]}] if listed or rank.rank < 2 else []
    groups.append({"params": [narrow], "adapt": adapt})
    optimizer = LARS(groups, lr=0.5, weight_decay=0.1, trust_coefficient=0.1)
    wide.grad, narrow.grad = torch.ones_like(wide), torch.ones_like(narrow)
    with Collectives() as collectives:
        optimizer.step()
    assert collectives.calls == [("allreduce_", 16 + 16)] * (rank.rank < 2) + [("allreduce_", 8 + 8)] * adapt
    # lr times ratio times direction: 0.5 * (0.1 / 1.1) * 1.1, without the ratio 0.5 * 1.1
    for param, expected in ((wide, 0.95), (narrow, 0.95 if adapt else 0.45)):
        torch.testing.assert_close(local_of(param), torch.full_like(local_of(param), expected))


def of_one_rank(rank: Rank, options: Options) -> None:
    """A mesh dimension of one rank sends nothing."""
    mesh = init_device_mesh(rank.device, (rank.world, 1), mesh_dim_names=("many", "one"))
    _meshes.setdefault("of one", mesh)
    s = setup(rank, [Layout((6, 4), "of one", (Shard(0), Shard(1)))], 1, torch.float32, options)
    grads = make_grads("dense", s.wholes, 0)
    s.reference.step(grads)
    s.set_grads(rank, grads)
    with Collectives() as collectives:
        s.optimizer.step()
    assert collectives.calls == [("allreduce_", 8 + 8)]
    s.check(rank, "of one rank", 2)


def stops_alike(rank: Rank, asks: str, options: Options) -> None:
    """If one rank has a reason to skip, all skip, even if no norm of a sharded tensor is needed."""
    layouts = [Layout((8, 3), "all", (Shard(0),)), Layout((4, 2))]
    params = [place(torch.ones(layout.shape, device=rank.device), layout, rank) for layout in layouts]
    buffers: list[Tensor | None] = [None, None]
    for step in range(2):
        grads = [place(torch.ones(layout.shape, device=rank.device), layout, rank) for layout in layouts]
        stops = step == 0 and rank.rank == rank.world - 1
        more: Options = {}
        if asks == "found_inf":
            more["found_inf"] = torch.tensor([float(stops)], device=rank.device)
        else:
            more["skip_nonfinite"] = True
            if stops:
                local_of(grads[0]).view(-1)[-1] = torch.inf
        before = [local_of(p).clone() for p in params]
        with Collectives() as collectives:
            fastlars.lars(params, grads, buffers, **options, **more)
        assert [name for name, _ in collectives.calls] == ["allreduce_"]
        changed = [not torch.equal(local_of(p), old) for p, old in zip(params, before, strict=True)]
        assert changed == [step == 1] * 2
        assert all(bool(local_of(b).any()) == (step == 1) for b in buffers if b is not None)


def plain_tensors_of_another_dtype(rank: Rank) -> None:
    """The message has the dtype of the sharded norms, whatever plain tensors there are."""
    for dtype, other, size in (
        (torch.float32, torch.float64, 4),
        (torch.float64, torch.float32, 8),
        (torch.complex128, torch.float32, 8),
    ):
        layout = Layout((8, 3), "all", (Shard(0),))
        sharded = torch.nn.Parameter(place(torch.ones(8, 3, dtype=dtype, device=rank.device), layout, rank))
        plain = torch.nn.Parameter(torch.ones(4, dtype=other, device=rank.device))
        optimizer = LARS([sharded, plain], lr=0.5, weight_decay=0.1)
        sharded.grad, plain.grad = torch.ones_like(sharded), torch.ones_like(plain)
        with Collectives() as collectives:
            optimizer.step()
        assert collectives.calls == [("allreduce_", 2 * size + 2 * size)]


def is_written_where_it_is(rank: Rank, options: Options, implementation: Options) -> None:
    """No copies of tensors in steps that cannot be skipped."""
    layout = Layout((400, 64), "all", (Shard(0),))
    param = torch.nn.Parameter(place(torch.ones(400, 64, device=rank.device), layout, rank))
    optimizer = LARS([param], **options, **implementation)
    for step in range(2):
        param.grad = torch.ones_like(param)
        with Recorder() if step == 1 else contextlib.nullcontext() as recorder:
            optimizer.step()
    assert recorder is not None and recorder.peak < 400 * 64 / rank.world / 10


def trust_ratios(rank: Rank, options: Options) -> dict[str, float]:
    """The ratios of the whole tensors, on every rank."""
    layouts = LAYOUTS["flat"] + (LAYOUTS["grid"] if rank.world == 4 else [])
    s = setup(rank, layouts, 2, torch.float32, options)
    whole = LARS([{"params": [torch.nn.Parameter(w) for w in s.wholes[i::2]]} for i in range(2)], **options)
    grads = make_grads("dense", s.wholes, 0)
    s.set_grads(rank, grads)
    for i in range(2):
        for param, grad in zip(whole.param_groups[i]["params"], grads[i::2], strict=True):
            param.grad = grad
    if rank.world > 1:  # on one rank every tensor is whole
        with pytest.raises(
            RuntimeError, match=r"trust ratios of sharded tensors need a step, .* call trust_ratios\(\) after step"
        ):
            s.optimizer.trust_ratios()
    of_the_step = whole.trust_ratios()
    s.optimizer.step()
    whole.step()
    expected = whole.trust_ratios()
    divided = {
        f"{i}.{j}" for i in range(2) for j, p in enumerate(s.optimizer.param_groups[i]["params"]) if is_divided(p)
    }
    assert divided or rank.world == 1
    expected |= {name: ratio for name, ratio in of_the_step.items() if name in divided}
    if rank.rank == 0:  # this rank alone, because with an exchange it would wait for the others
        assert s.optimizer.trust_ratios().keys() == expected.keys()
        with s.optimizer.relative_steps() as steps:
            pass
        assert set(steps.values()) == {0.0}
    s.optimizer.zero_grad(set_to_none=False)  # the ratios of the last step do not need gradients
    whole.zero_grad(set_to_none=False)
    ratios = s.optimizer.trust_ratios()
    expected |= {name: ratio for name, ratio in whole.trust_ratios().items() if name not in divided}
    assert list(ratios) == list(expected)
    torch.testing.assert_close(ratios, expected, rtol=1e-5, atol=0)
    assert repr(s.optimizer) == repr(whole), "the elements of whole tensors, the same implementation"
    return ratios


def wrong_input(rank: Rank) -> None:
    layout = Layout((8, 3), "all", (Shard(0),))
    mesh = meshes(rank)["all"]
    whole = torch.ones(8, 3, device=rank.device)
    options: Options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}

    def refused(error: type[Exception], message: str, param: Any, grad: Any, buffer: Any = None, **more: Any) -> None:
        p = torch.nn.Parameter(param)
        other = torch.nn.Parameter(whole.clone())
        optimizer = LARS([other, p], **options, **more)
        # set_ refuses tensors that do not fit, but hooks do not
        other.grad = torch.ones_like(other)
        if grad is not None:
            p.grad = grad
        if buffer is not None:
            optimizer.state[p]["momentum_buffer"] = buffer
        before = [local_of(t).clone() for t in (p, other)]
        with pytest.raises(error, match=message):
            optimizer.step()
        assert all(torch.equal(local_of(t), old) for t, old in zip((p, other), before, strict=True))

    distributed = place(whole, layout, rank)
    refused(RuntimeError, "must be a DTensor of its placements.*state_dict", distributed, distributed, whole)
    replicated = place(whole, Layout((8, 3), "all", (Replicate(),)), rank)
    refused(RuntimeError, "must be a DTensor of its placements", distributed, distributed, replicated)
    # the same placements on a mesh of the ranks in another order
    turned = DeviceMesh(rank.device, list(reversed(range(rank.world))))
    elsewhere = DTensor.from_local(local_of(distributed).clone(), turned, (Shard(0),), run_check=False)
    refused(RuntimeError, "must be a DTensor of its placements", distributed, distributed, elsewhere)
    for param, buffer in ((whole, distributed), (distributed, whole)):
        optimizer = LARS([torch.nn.Parameter(param.clone())], **options)
        saved = optimizer.state_dict()
        saved["state"] = {0: {"momentum_buffer": buffer}}
        with pytest.raises(TypeError, match="must be a DTensor exactly if the parameter is one"):
            optimizer.load_state_dict(saved)
        assert not optimizer.state
    partial = DTensor.from_local(whole, mesh, (Partial(),), run_check=False)
    refused(RuntimeError, "redistribute it first", partial, partial)
    refused(RuntimeError, "differentiable=True", distributed, distributed, differentiable=True)
    # what torch refuses as .grad reaches the functional form
    plain = "the gradient or momentum_buffer of a plain parameter of shape \\(8, 3\\) is a DTensor"
    for grads, buffers, error, message in (
        ([distributed, distributed], [None, None], TypeError, plain),
        ([distributed, whole], [None, distributed], TypeError, plain),
        ([whole, whole], [None, None], RuntimeError, "must be a DTensor on its mesh.*got Tensor"),
        ([elsewhere, whole], [None, None], RuntimeError, "must be a DTensor on its mesh"),
    ):
        params = [distributed.clone(), whole.clone()]
        with pytest.raises(error, match=message):
            fastlars.lars(params, grads, buffers, **options)
        assert torch.equal(local_of(params[0]), local_of(distributed)) and torch.equal(params[1], whole)


def functional(rank: Rank, implementation: Options) -> None:
    """The functional form takes sharded tensors too, and makes sharded buffers."""
    layouts = [Layout((5, 3), "all", (Shard(0),)), Layout((4, 2)), Layout((7,), "all", (Replicate(),))]
    options = {**OPTIONS["dampening"], "momentum": 0.9, **implementation}
    s = setup(rank, layouts, 1, torch.float32, options)
    params = [p.detach() for p in s.params]
    buffers: list[Tensor | None] = [None] * len(layouts)
    for step in range(2):
        grads = [g for g in make_grads("dense", s.wholes, step) if g is not None]
        s.reference.step(grads)
        kept = list(buffers)
        laid_out = [place(g, layout, rank) for g, layout in zip(grads, layouts, strict=True)]
        with Collectives() as collectives:
            fastlars.lars(params, laid_out, buffers, **options)
        assert [name for name, _ in collectives.calls] == ["allreduce_"], (
            "not what each operation on DTensors would send"
        )
        assert step == 0 or all(new is old for new, old in zip(buffers, kept, strict=True))
        for param, buffer in zip(s.params, buffers, strict=True):
            s.optimizer.state[param]["momentum_buffer"] = buffer
        s.check(rank, f"functional, step {step}", 2 * (step + 1))


def versions(rank: Rank) -> None:
    """Version counters of written tensors move, so a stale backward raises."""
    param = torch.nn.Parameter(place(torch.ones(8, 3, device=rank.device), Layout((8, 3), "all", (Shard(0),)), rank))
    optimizer = LARS([param], lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        loss = param.square().sum()
        param.grad = torch.ones_like(param)
        buffer = optimizer.state[param].get("momentum_buffer")
        old = (param._version, 0 if buffer is None else buffer._version, param.grad._version)
        optimizer.step()
        assert param._version > old[0]
        assert optimizer.state[param]["momentum_buffer"]._version > old[1]
        assert param.grad._version == old[2]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def large_and_small_numbers(rank: Rank) -> None:
    """Norms of 1e18 and 1e-18, at the limits of float32 squares."""
    for factor in (1e18, 1e-18):
        s = setup(rank, [Layout((5, 3), "all", (Shard(0),))], 1, torch.float32, {**OPTIONS["base"], "eps": 0.0})
        with torch.no_grad():
            local_of(s.params[0]).mul_(factor)
        s.reference.realign([s.wholes[0].double() * factor])
        grads = [make_grads("dense", s.wholes, 0)[0] * factor]
        s.reference.step(grads)
        s.set_grads(rank, grads)
        s.optimizer.step()
        expected = part_of(torch.as_tensor(s.reference.params[0]), meshes(rank)["all"], (Shard(0),))
        torch.testing.assert_close(local_of(s.params[0]).double().cpu(), expected, rtol=1e-5, atol=1e-6 * factor)


def precision(rank: Rank) -> None:
    """The norm of a large tensor whose shards differ by orders of magnitude, to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(1 << 20, generator=generator).to(rank.device)
    whole[: 1 << 18] *= 1e-3
    grad = torch.randn(1 << 20, generator=generator).to(rank.device)
    param = torch.nn.Parameter(place(whole, Layout((1 << 20,), "all", (Shard(0),)), rank))
    param.grad = place(grad, Layout((1 << 20,), "all", (Shard(0),)), rank)
    optimizer = LARS([param], lr=1.0, weight_decay=0.1, trust_coefficient=0.1, eps=0.0)
    if rank.world > 1:
        optimizer.step()  # of which these are
    (ratio,) = optimizer.trust_ratios().values()
    w, g = whole.double().norm().item(), grad.double().norm().item()
    assert abs(ratio / (0.1 * w / (g + 0.1 * w)) - 1) < 1e-6


def keeps_compensations(rank: Rank, folder: str) -> None:
    """Each rank keeps the compensation of its shard as a DTensor, which checkpoints can redistribute."""
    mesh = init_device_mesh(rank.device, (rank.world,))
    whole = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).to(rank.device, torch.bfloat16)
    plain, sharded = torch.nn.Parameter(whole.clone()), torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    one, many = (LARS([p], lr=3e-3, momentum=0.9, adapt=True) for p in (plain, sharded))
    for step in range(3):
        (plain.grad,) = make_grads("dense", [plain], step)
        sharded.grad = distribute_tensor(plain.grad, mesh, [Shard(0)])
        one.step()
        many.step()
    kept = many.state[sharded]["compensation"]
    assert isinstance(kept, DTensor) and kept.placements == sharded.placements and kept._version > 0
    assert kept.full_tensor().any()
    total = sharded.detach().full_tensor().double() + kept.full_tensor().double()
    expected = plain.detach().double() + one.state[plain]["compensation"].double()
    torch.testing.assert_close(total, expected, rtol=torch.finfo(torch.bfloat16).eps ** 2, atol=1e-7)

    checkpoint.save({"kept": kept}, checkpoint_id=folder)
    other = distribute_tensor(torch.zeros_like(whole), mesh, [Shard(1)])
    checkpoint.load({"kept": other}, checkpoint_id=folder)
    assert torch.equal(other.full_tensor(), kept.full_tensor())
    many.state[sharded]["compensation"] = other
    with pytest.raises(
        RuntimeError, match=r"the compensation of a DTensor parameter .* must be a DTensor of its placements"
    ):
        many.step()
