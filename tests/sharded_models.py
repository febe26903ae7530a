"""What test_distributed.py runs on every rank: models sharded by torch, next to the whole model on each rank."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastlars
from fastlars import LARS
from fastlars.sharding import is_divided
from harness import set_grads
from ranks import Rank
from reference import ReferenceLARS
from sharded import Collectives, DTensor, Replicate, local_of

try:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
except ImportError:  # torch 2.4 and 2.5
    from torch.distributed._composable.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

STEPS = 3
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
OPTIONS = {"lr": 0.5, "momentum": 0.9, "trust_coefficient": 0.1}
_meshes: dict[tuple[str, tuple[int, ...]], DeviceMesh] = {}
_groups: dict[str, Any] = {}


def mesh(rank: Rank, *shape: int) -> DeviceMesh:
    key = (rank.device, shape)
    if key not in _meshes:
        names = {1: ("data",), 2: ("data", "model")}[len(shape)]
        _meshes[key] = init_device_mesh(rank.device, shape, mesh_dim_names=names)
    return _meshes[key]


class Net(nn.Module):
    """Hidden sizes that tensor parallelism can divide. `second` is uneven over ranks, and most ranks hold nothing of `last`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 8)
        self.norm = nn.LayerNorm(8)
        self.second = nn.Linear(8, 5)
        self.third = nn.Linear(5, 8)
        self.last = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.second(torch.relu(self.norm(self.first(x))))
        return self.last(torch.relu(self.third(hidden)))  # type: ignore[no-any-return]


def new_model(rank: Rank) -> Net:
    torch.manual_seed(0)
    return Net().to(rank.device)


def new_optimizer(model: nn.Module, **options: Any) -> LARS:
    groups = fastlars.param_groups(model, weight_decay=0.05, bias_lr=0.1)
    return LARS(groups, **{**OPTIONS, **options})


def batch(rank: Rank, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(8, 7, generator=generator).to(rank.device)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------- ways to shard; each returns how many ranks share the batch
def _layers(model: Net) -> list[nn.Module]:
    return [model.first, model.second, model.third, model.last]


def shard_all(rank: Rank, model: Net, over: DeviceMesh | None = None, **policies: Any) -> None:
    over = over or mesh(rank, rank.world)
    for layer in _layers(model):
        fully_shard(layer, mesh=over, **policies)
    fully_shard(model, mesh=over, **policies)


def fsdp(rank: Rank, model: Net) -> None:
    shard_all(rank, model)


def frozen(rank: Rank, model: Net) -> None:
    model.second.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    shard_all(rank, model)


def mixed_precision(rank: Rank, model: Net) -> None:
    shard_all(rank, model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def cpu_offload(rank: Rank, model: Net) -> None:
    shard_all(rank, model, offload_policy=CPUOffloadPolicy(pin_memory=rank.device == "cuda"))


def hsdp(rank: Rank, model: Net) -> None:
    shard_all(rank, model, mesh(rank, 2, rank.world // 2))


def several_meshes(rank: Rank, model: Net) -> None:
    for layer in (model.first, model.second):
        fully_shard(layer, mesh=mesh(rank, 2, rank.world // 2))
    fully_shard(model, mesh=mesh(rank, rank.world))


def some_plain(rank: Rank, model: Net) -> None:
    fully_shard(model.first, mesh=mesh(rank, rank.world))
    fully_shard(model.third, mesh=mesh(rank, rank.world))


def tensor_parallel(rank: Rank, model: Net, over: DeviceMesh | None = None) -> None:
    plan = {
        "first": ColwiseParallel(output_layouts=Replicate()),
        "second": RowwiseParallel(input_layouts=Replicate()),
        "third": ColwiseParallel(),
        "last": RowwiseParallel(),
    }
    parallelize_module(model, over or mesh(rank, rank.world), plan)


def tensor_parallel_and_fsdp(rank: Rank, model: Net) -> None:
    both = mesh(rank, 2, rank.world // 2)
    tensor_parallel(rank, model, both["model"])
    shard_all(rank, model, both["data"])


# name -> how, how many ranks share the batch, sharded mesh dimensions
WAYS: dict[str, tuple[Callable[[Rank, Net], None], Callable[[int], int], Callable[[int], int]]] = {
    "fsdp": (fsdp, lambda world: world, lambda _: 1),
    "frozen": (frozen, lambda world: world, lambda _: 1),
    "mixed_precision": (mixed_precision, lambda world: world, lambda _: 1),
    "cpu_offload": (cpu_offload, lambda world: world, lambda _: 1),
    "hsdp": (hsdp, lambda world: world, lambda world: 1 if world > 2 else 0),
    "several_meshes": (several_meshes, lambda world: world, lambda world: 2 if world > 2 else 1),
    "some_plain": (some_plain, lambda world: world, lambda _: 1),
    "tensor_parallel": (tensor_parallel, lambda _: 1, lambda _: 1),
    "tensor_parallel_and_fsdp": (tensor_parallel_and_fsdp, lambda _: 2, lambda world: 2 if world > 2 else 1),
}


def shares(rank: Rank, x: Tensor, spread: int) -> Tensor:
    """This rank's part of a batch that so many ranks share. Neighbouring ranks have the same part."""
    return x.chunk(spread)[rank.rank * spread // rank.world]


def backward(rank: Rank, model: nn.Module, x: Tensor, spread: int = 1) -> None:
    model(x).square().mean().backward()
    for param in model.parameters():
        if spread > 1 and param.grad is not None and not isinstance(param, DTensor):
            torch.distributed.all_reduce(param.grad)
            param.grad /= spread


def equals_whole(rank: Rank, way: str, options: dict[str, Any], compiled: bool = False) -> dict[str, float]:
    """A sharded model steps like the reference with the same gradients, and trains like the whole model."""
    shard, spread_of, dims_of = WAYS[way]
    spread = spread_of(rank.world)
    model, whole = new_model(rank), new_model(rank)
    shard(rank, model)
    for param, mine in zip(whole.parameters(), model.parameters(), strict=True):
        param.requires_grad_(mine.requires_grad)
    optimizer, whole_optimizer = new_optimizer(model, **options), new_optimizer(whole, **options)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    wholes = [p for group in whole_optimizer.param_groups for p in group["params"]]
    reference = ReferenceLARS(
        [{k: v for k, v in g.items() if k not in ("foreach", "fused")} for g in whole_optimizer.param_groups]
    )
    step_function = torch.compile(optimizer.step) if compiled else optimizer.step
    ratios: dict[str, float] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        whole_optimizer.zero_grad()
        x = batch(rank, step)
        backward(rank, model, shares(rank, x, spread), spread)
        backward(rank, whole, x)
        whole_ratios = whole_optimizer.trust_ratios()

        grads = [None if p.grad is None else full(p.grad).clone() for p in params]
        reference.step([None if grad is None else grad.cpu() for grad in grads])
        if way == "mixed_precision":
            set_grads(wholes, grads)  # gradients are bfloat16, and differ from the whole model's
        with Collectives() if not compiled else contextlib.nullcontext() as collectives:
            step_function()
        ratios = optimizer.trust_ratios()
        assert list(ratios) == list(whole_ratios)
        rtol = 0.2 if "mixed" in way else 1e-4
        for names, group in zip(optimizer._names(), optimizer.param_groups, strict=True):
            for name, param in zip(names, group["params"], strict=True):
                if name in ratios and is_divided(param):  # of this step; the others belong to the weights after it
                    torch.testing.assert_close(ratios[name], whole_ratios[name], rtol=rtol, atol=0)
        whole_optimizer.step()
        if collectives is not None:
            reductions = [call for call in collectives.calls if call[0] == "allreduce_"]
            assert len(reductions) == len(collectives.calls) == dims_of(rank.world), (way, step, collectives.calls)
        for i, (param, one) in enumerate(zip(params, wholes, strict=True)):
            where = f"{way}, step {step}, tensor {i}"
            value = full(param).detach().cpu()
            torch.testing.assert_close(
                value, one.detach().cpu(), rtol=1e-4, atol=1e-5, msg=lambda t, w=where: f"{w}: {t}"
            )
            torch.testing.assert_close(
                value.double(),
                torch.as_tensor(reference.params[i]),
                rtol=1e-5,
                atol=1e-6,
                msg=lambda t, w=where: f"{w}: {t}",
            )
            if param.grad is None:
                assert not optimizer.state.get(param)
            else:
                assert type(optimizer.state[param]["momentum_buffer"]) is type(param.data)
    return ratios


def half_precision_equals_whole(rank: Rank, way: str) -> None:
    """Steps of 0.1 % in bfloat16 with the gradients of the sharded model: its sums are those of the whole model."""
    shard, spread_of, _ = WAYS[way]
    model, whole = (new_model(rank).bfloat16() for _ in range(2))
    shard(rank, model)
    optimizer, whole_optimizer = (new_optimizer(each, lr=1e-3, momentum=0.9) for each in (model, whole))
    for step in range(20):
        optimizer.zero_grad()
        backward(rank, model, shares(rank, batch(rank, step).bfloat16(), spread_of(rank.world)), spread_of(rank.world))
        set_grads(list(whole.parameters()), [full(p.grad).clone() for p in model.parameters()])
        optimizer.step()
        whole_optimizer.step()
    for (name, param), one in zip(model.named_parameters(), whole.parameters(), strict=True):
        kept, expected = (o.state[p].get("compensation") for o, p in ((optimizer, param), (whole_optimizer, one)))
        assert (kept is None) == (expected is None) == (param.ndim < 2), name
        value, total = full(param).detach().double(), one.detach().double()
        if kept is not None:
            assert type(kept) is type(param.data) and kept.dtype == torch.bfloat16, name
            assert not isinstance(kept, DTensor) or kept.placements == param.placements, name
            assert full(kept).any(), name
            value, total = value + full(kept).double(), total + expected.double()
        # norms are summed in another order: in some steps the compensation is rounded the other way
        limit = torch.finfo(torch.bfloat16).eps ** 2 * float(total.abs().max())
        torch.testing.assert_close(value, total, rtol=0, atol=limit, msg=lambda t, w=f"{way}, {name}": f"{w}: {t}")


# ---------------------------------------------------------------- plain tensors, refusals
def data_parallel_accumulates(rank: Rank) -> None:
    """Two batches per step, the first without a gradient exchange. It trains like the whole model on the whole batch."""
    model, whole = new_model(rank), new_model(rank)
    parallel = DistributedDataParallel(model)
    optimizer, whole_optimizer = new_optimizer(model), new_optimizer(whole)
    for step in range(STEPS):
        optimizer.zero_grad()
        whole_optimizer.zero_grad()
        first, second = batch(rank, step).chunk(2)
        with parallel.no_sync():
            backward(rank, parallel, shares(rank, first, rank.world))
        backward(rank, parallel, shares(rank, second, rank.world))
        backward(rank, whole, first)
        backward(rank, whole, second)
        with Collectives() as collectives:
            optimizer.step()
        whole_optimizer.step()
        assert collectives.calls == []
        for param, one in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(param, one, rtol=1e-4, atol=1e-5)


def zero_redundancy(rank: Rank) -> None:
    """Whole tensors, each stepped on one rank, train like the whole model."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: PLC0415  it imports much

    model, whole = new_model(rank), new_model(rank)
    options = {**OPTIONS, "weight_decay": 0.05, "nesterov": True}
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=LARS, **options)
    whole_optimizer = LARS(whole.parameters(), **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        whole_optimizer.zero_grad()
        x = batch(rank, step)
        backward(rank, model, shares(rank, x, rank.world), rank.world)
        backward(rank, whole, x)
        optimizer.step()
        whole_optimizer.step()
        for param, one in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(param, one, rtol=1e-4, atol=1e-5)
    assert 0 < len(optimizer.optim.state) < len(list(model.parameters()))


def zero_redundancy_skips(rank: Rank) -> None:
    """Deciding rank by rank would skip half a step, so it is refused everywhere. What the page recommends instead works."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: PLC0415  as above

    model = new_model(rank)
    options = {**OPTIONS, "weight_decay": 0.05}
    for groups in (model.parameters(), [{"params": model.parameters(), "skip_nonfinite": True}]):
        asked = {"skip_nonfinite": True} if not isinstance(groups, list) else {}
        with pytest.raises(ValueError, match="param group 0: skip_nonfinite=True under ZeroRedundancyOptimizer"):
            ZeroRedundancyOptimizer(groups, optimizer_class=LARS, **options, **asked)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=LARS, **options)
    before = [p.detach().clone() for p in model.parameters()]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.param_groups[0]["skip_nonfinite"] = True
    with pytest.raises(ValueError, match="before step"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    # its process group is no reason to refuse it elsewhere
    LARS(model.parameters(), **options, skip_nonfinite=True).step()


def refuses_flat_parameters(rank: Rank) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: PLC0415

    for use_orig_params in (False, True):
        model = new_model(rank)
        before = LARS(model.parameters(), **OPTIONS, adapt=True)
        flat = FullyShardedDataParallel(
            model,
            use_orig_params=use_orig_params,
            device_id=torch.device(rank.device, rank.rank if rank.device == "cuda" else None),
        )
        for group in ("a group", "all, with names"):
            with pytest.raises(RuntimeError, match=r"param group 0: .* FullyShardedDataParallel.* fully_shard"):
                LARS([{"params": flat.parameters()}] if group == "a group" else flat.named_parameters(), **OPTIONS)
        if use_orig_params:
            # the same parameters, which FSDP has sliced
            for param in model.parameters():
                param.grad = torch.zeros_like(param)
            with pytest.raises(RuntimeError, match="fully_shard"):
                before.step()
            assert not before.state


# ---------------------------------------------------------------- checkpoints
def _state(model: nn.Module, optimizer: LARS, flat: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def train_with_checkpoint(
    rank: Rank, way: str, folder: str, kind: str, loads: bool, options: dict[str, Any]
) -> tuple[list[list[float]], list[bytes]]:
    """Four steps with a checkpoint after the second, which is written there or loaded at the start.

    Returns the values of all whole tensors of model and optimizer, and the bits of this rank's shards.
    """
    model = new_model(rank)
    spread = 1
    if way != "whole":
        WAYS[way][0](rank, model)
        spread = WAYS[way][1](rank.world)
    # set differently what loading must restore
    optimizer = new_optimizer(model, **(options if not loads else {"lr": 7.0, "momentum": 0.5, "eps": 1.0}))
    flat = kind == "flattened"
    if loads:
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        before = [full(p).clone() for p in model.parameters()]
        state = _state(model, optimizer, flat)
        assert all(torch.equal(full(p), old) for p, old in zip(model.parameters(), before, strict=True))
        checkpoint.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(
            model, optimizer, state["optimizer"], options=StateDictOptions(flatten_optimizer_state_dict=flat)
        )
        for group, whole in zip(
            optimizer.param_groups, new_optimizer(new_model(rank), **options).param_groups, strict=True
        ):
            assert {k: v for k, v in group.items() if k != "params"} == {
                k: v for k, v in whole.items() if k != "params"
            }
    future = None
    for step in range(2 if loads else 0, 4):
        if step == 2 and not loads:
            if kind == "async":
                # it gathers during training, on its own process group
                if "async" not in _groups:
                    _groups["async"] = torch.distributed.new_group(backend="gloo")
                state = _state(model, optimizer, flat)
                future = checkpoint.async_save(state, checkpoint_id=folder, process_group=_groups["async"])
                if TORCH < (2, 8):
                    future.result()  # torch 2.4 and 2.6 write CPU tensors in place, without a copy
            else:
                checkpoint.save(_state(model, optimizer, flat), checkpoint_id=folder)
        optimizer.zero_grad()
        backward(rank, model, shares(rank, batch(rank, step), spread), spread)
        optimizer.step()
    if future is not None:
        future.result()
    buffers = [optimizer.state[p]["momentum_buffer"] for group in optimizer.param_groups for p in group["params"]]
    tensors = [*model.parameters(), *buffers]
    return (
        [full(t).detach().double().cpu().flatten().tolist() for t in tensors],
        [local_of(t).detach().cpu().numpy().tobytes() for t in tensors],
    )


def half_precision_checkpoint(rank: Rank, way: str, folder: str, flat: bool, loads: bool) -> dict[str, list[bytes]]:
    """The bits of all whole tensors of a bfloat16 training as a checkpoint is written, or after it is loaded."""
    model = new_model(rank).bfloat16()
    if way != "whole":
        WAYS[way][0](rank, model)
    optimizer = new_optimizer(model, lr=1e-3)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    if loads:
        state = _state(model, optimizer, flat)
        checkpoint.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    else:
        for step in range(3):
            for param in model.parameters():
                param.grad = torch.full_like(param, 0.5 + step)
            optimizer.step()
        checkpoint.save(_state(model, optimizer, flat), checkpoint_id=folder)
    found = {}
    for name, param in model.named_parameters():
        entry = optimizer.state[param]
        assert all(type(each) is type(param.data) and each.dtype == torch.bfloat16 for each in entry.values()), name
        tensors = [param.detach(), *(entry[key] for key in sorted(entry))]
        found[name] = [full(each).cpu().view(torch.int16).numpy().tobytes() for each in tensors]
    for param in model.parameters():
        param.grad = torch.full_like(param, 1.0)
    optimizer.step()  # which refuses what is not laid out as its parameter
    return found
