"""What an optimizer keeps between steps saves time and changes nothing: how groups are sorted, workspaces, their views."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cases import MEMORY, OPTIONS, Subclass
from fastlars import LARS, backends
from fastlars.backends import FUSED_CPU, staging
from fastlars.backends.layouts import find_shared_memory, storage_of
from harness import buffers_of, set_grads

SHAPES: list[tuple[int, ...]] = [(3, 5), (64,), (3, 5), (20_000,), (7, 9), (64,)]
OPTION = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}


def make(shapes: list[tuple[int, ...]], seed: int = 0, **options: Any) -> LARS:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    set_grads(params, [torch.randn(shape, generator=generator) for shape in shapes])
    return LARS(params, **OPTION, **options)


def params_of(optimizer: LARS) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_as_without_memory(optimizer: LARS, shapes: list[tuple[int, ...]], steps: int, seed: int = 0) -> None:
    other = make(shapes, seed)
    for _ in range(steps):
        other._memory = type(other._memory)()
        other.step()
    for actual, expected in zip(
        [*params_of(optimizer), *buffers_of(optimizer)], [*params_of(other), *buffers_of(other)], strict=True
    ):
        assert torch.equal(actual, expected)


# ---------------------------------------------------------------- dispatch
@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Calls since the last clear: `serves` inspects tensors, `guard` builds a guard."""
    calls: list[str] = []
    serves, guard = type(FUSED_CPU).serves, backends.metadata_guard
    monkeypatch.setattr(type(FUSED_CPU), "serves", lambda *args: (calls.append("serves"), serves(*args))[1])
    monkeypatch.setattr(backends, "metadata_guard", lambda tensors: (calls.append("guard"), guard(tensors))[1])
    return calls


def test_a_group_is_sorted_twice_and_then_known(asked: list[str]) -> None:
    optimizer = make([(3, 5)] * 4)
    for calls in (["serves"], ["serves", "guard"], [], [], []):
        asked.clear()
        optimizer.step()
        assert asked == calls
    assert_as_without_memory(optimizer, [(3, 5)] * 4, steps=5)


@pytest.mark.parametrize("changed", [*MEMORY, "expanded", "subclass"])
def test_a_known_group_is_sorted_again_when_a_gradient_changes(changed: str, asked: list[str]) -> None:
    make_grad = {
        **MEMORY,
        "expanded": lambda x: x[:1].expand(4, 6),
        "subclass": lambda x: x.as_subclass(Subclass),
    }[changed]
    optimizer = make([(8,), (4, 6), (200, 200)])
    for _ in range(4):
        optimizer.step()
    asked.clear()
    optimizer.step()
    assert not asked
    param = params_of(optimizer)[1]
    grad = make_grad(torch.randn(4, 6))
    if grad.dtype != param.dtype:
        param.grad_dtype = None if hasattr(param, "grad_dtype") else pytest.skip("gradients have the parameter's dtype")
    param.grad = grad
    before = [p.detach().clone() for p in params_of(optimizer)]
    optimizer.step()
    assert bool(asked) == (changed not in ("contiguous", "offset"))
    assert not any(torch.equal(p, old) for p, old in zip(params_of(optimizer), before, strict=True))


def test_a_parameter_listed_twice_is_sorted_each_time_and_builds_few_guards(asked: list[str]) -> None:
    """torch's guard accepts no list that holds a tensor twice."""
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    params[0].grad = params[1].grad = torch.ones(5)
    optimizer = LARS(params, **OPTION)
    for _ in range(9):
        optimizer.step()
    assert asked.count("serves") == 9 and asked.count("guard") <= 4


def test_without_the_guard_of_torch_every_step_sorts(monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    optimizer = make(SHAPES)
    for _ in range(4):
        optimizer.step()
    assert asked.count("serves") == 4
    assert_as_without_memory(optimizer, SHAPES, steps=4)


def test_an_interrupted_guard_leaves_no_wrong_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make(SHAPES)
    for _ in range(3):
        optimizer.step()

    def fails(_: object) -> None:
        raise KeyboardInterrupt

    grads = [p.grad for p in params_of(optimizer)]
    with monkeypatch.context() as patch:
        patch.setattr(backends, "metadata_guard", fails)
        for _ in range(3):  # gradients of one tensor less, so another list
            params_of(optimizer)[-1].grad = None
            before = [p.detach().clone() for p in params_of(optimizer)]
            try:
                optimizer.step()
            except KeyboardInterrupt:
                assert all(torch.equal(p, old) for p, old in zip(params_of(optimizer), before, strict=True))
    set_grads(params_of(optimizer), grads)
    before = [p.detach().clone() for p in params_of(optimizer)]
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(params_of(optimizer), before, strict=True))


def test_options_that_change_change_the_backend() -> None:
    optimizer = make(SHAPES)
    names: list[set[str]] = []
    for options in ({}, {}, {"foreach": True}, {"foreach": False}, {"foreach": None, "fused": True}, {"adapt": False}):
        optimizer.param_groups[0].update(options)
        for _ in range(3):
            optimizer.step()
        places = optimizer._memory.assignments["param group 0"]._places
        names.append({f"{type(place.backend).__name__} {place.backend.name}" for place in places})
    fused, foreach, single = {"FusedCPU fused"}, {"Foreach foreach"}, {"Single single"}
    assert names == [fused, fused, foreach, single, fused, {"TorchSGD fused"}]


# ---------------------------------------------------------------- the workspace of the fused CPU step
def test_no_temporary_above_4_mib() -> None:
    shapes = [(1 << 23,), (2048, 1024), *[(32, 32)] * 1000, *[(64,)] * 50]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for name in ("momentum", "joint", "nesterov"):
        optimizer = LARS(params, **OPTIONS[name])
        set_grads(params, [torch.randn_like(p) for p in params])
        optimizer.step()
        optimizer._memory.assignments.clear()  # the workspace counts
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            optimizer.step()
        allocated = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        live = peak = 0
        for size in allocated:
            live += size
            peak = max(peak, live)
        # two workspaces, and the sum of a gradient and its decay
        limit = 3.25 if name == "joint" else 2.25
        assert allocated and 2 * 2**20 <= peak <= limit * 2**20, f"{name}: {peak / 2**20:.2f} MiB"


def plans_of(optimizer: LARS) -> list[Any]:
    return [place.plan for each in optimizer._memory.assignments.values() for place in each._places]


def test_a_workspace_is_no_larger_than_its_tensors() -> None:
    """Groups of single layers, as for rates that differ by layer, would take 2 MiB each."""
    small = [(3, 5), (64,), (3, 5)]
    for shapes, elements in ((small, 2 * (15 + 64 + 15)), ([(20_000,)], 20_000)):
        optimizer = make(shapes, nesterov=True)
        optimizer.step()
        (plan,) = plans_of(optimizer)
        assert plan.grads.untyped_storage().nbytes() == 4 * elements


@pytest.mark.parametrize("options", [{}, {"foreach": True, "skip_nonfinite": True}], ids=["fused", "foreach"])
def test_the_plan_of_a_known_group_is_made_twice_and_then_kept(options: dict[str, Any]) -> None:
    optimizer = make(SHAPES, **options)
    for _ in range(2):
        optimizer.step()
    plans, views = plans_of(optimizer), [dict(vars(plan)) for plan in plans_of(optimizer)]
    for _ in range(3):
        optimizer.step()
    for plan, after, held in zip(plans, plans_of(optimizer), views, strict=True):
        assert after is plan and all(vars(plan)[name] is each for name, each in held.items())


def test_memory_goes_with_its_optimizer_without_the_garbage_collector() -> None:
    optimizer = make(SHAPES)
    for _ in range(3):
        optimizer.step()
    plan = weakref.ref(plans_of(optimizer)[0])
    param = weakref.ref(params_of(optimizer)[0])
    gc.collect()
    gc.disable()
    try:
        params_of(optimizer)[1].grad = None  # another list
        optimizer.step()
        assert plan() is None
        plan = weakref.ref(plans_of(optimizer)[0])
        optimizer._memory = type(optimizer._memory)()
        assert plan() is None
    finally:
        gc.enable()
    del optimizer
    gc.collect()
    assert param() is None, "a guard or a plan keeps no tensor alive"


class Sees(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kept", [False, True], ids=["first", "later"])
def test_memory_under_a_mode_is_not_kept(kept: bool) -> None:
    """It may not be real memory, and existing memory would be a constant in a graph that the mode traces."""
    optimizer = make(SHAPES)
    for _ in range(3 * kept):
        optimizer.step()
    before = plans_of(optimizer)
    with Sees():
        optimizer.step()
    assert all(plan is old for plan, old in zip(plans_of(optimizer), before, strict=True))
    fake = make(SHAPES)
    with FakeTensorMode(), pytest.raises(Exception, match=r"(?i)fake"):
        fake.step()
    assert not plans_of(fake)
    optimizer.step()
    assert_as_without_memory(optimizer, SHAPES, steps=2 + 3 * kept)


def test_a_captured_step_uses_no_memory_that_a_later_step_may_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay of the CUDA graph would write to it, although it belongs to others by then."""
    optimizer = make(SHAPES, foreach=True, skip_nonfinite=True)
    for _ in range(3):
        optimizer.step()
    before = plans_of(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "is_capturing", lambda: True)
        for plan in before:
            patch.setattr(plan, "_flat", None)  # whoever reads its memory raises
            patch.setattr(plan, "_made", None)
        optimizer.step()
        assert all(plan is old for plan, old in zip(plans_of(optimizer), before, strict=True))
    optimizer.step()
    assert all(plan is old for plan, old in zip(plans_of(optimizer), before, strict=True))


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "grad": lambda function: torch.func.grad(function)(torch.ones(3)),
    "vjp": lambda function: torch.func.vjp(function, torch.ones(3)),
    "vmap": lambda function: torch.func.vmap(torch.func.grad(function))(torch.ones(2, 3)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_step_within_a_transform(transform: str) -> None:
    """A transform treats a tensor from outside as one that must not be written."""
    optimizer = make(SHAPES)
    for _ in range(3):
        optimizer.step()
    before = plans_of(optimizer)

    def function(x: Tensor) -> Tensor:
        optimizer.step()
        return x.sum()

    for _ in range(2):
        TRANSFORMS[transform](function)
        assert all(plan is old for plan, old in zip(plans_of(optimizer), before, strict=True))
    assert_as_without_memory(optimizer, SHAPES, steps=5)


def test_where_torch_cannot_tell_of_modes_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    optimizer = make(SHAPES)
    optimizer.step()
    assert not plans_of(optimizer)
    assert_as_without_memory(optimizer, SHAPES, steps=1)


def test_a_first_step_in_inference_mode_leaves_memory_that_can_be_written() -> None:
    """A tensor created in inference mode cannot be written outside it."""
    optimizer = make(SHAPES)
    for param in params_of(optimizer):
        optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    assert_as_without_memory(optimizer, SHAPES, steps=2)


def test_what_a_step_that_fails_leaves_in_its_memory_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make(SHAPES)
    for _ in range(3):
        optimizer.step()

    def fails(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_fused_sgd_", fails)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    optimizer.step()
    assert_as_without_memory(optimizer, SHAPES, steps=4)


@pytest.mark.parametrize("foreach", [False, True])
def test_a_shifted_gradient_is_found_in_a_known_group(foreach: bool) -> None:
    """Its metadata equals that of earlier gradients. Single and foreach would overwrite it before reading it."""
    memory = torch.arange(1.0, 10.0)
    results = []
    for shares in (True, False):
        param = torch.nn.Parameter(torch.zeros(0))
        param.data = memory.clone()[:8]
        optimizer = LARS([param], **OPTION, nesterov=True, foreach=foreach)
        for _ in range(4):
            param.grad = torch.ones(8)
            optimizer.step()
        whole = torch.cat([param.detach(), torch.ones(1)])
        param.data = whole[:8]
        param.grad = whole[1:] if shares else whole[1:].clone()
        optimizer.step()
        results.append(param.detach().clone())
    assert torch.equal(*results)


def test_where_pointers_are_no_addresses_only_tensors_of_one_storage_share_memory() -> None:
    """Two meta tensors begin at 0. On XLA all do, and on MPS and Vulkan pointers are handles that lie close together."""
    one, other = (torch.empty(4, device="meta") for _ in range(2))
    assert find_shared_memory([one, other], 1) is None
    assert find_shared_memory([one[:2], one[2:]], 1) is None
    assert find_shared_memory([other, one, one[1:]], 2) == (1, 2)
    assert storage_of(one) == storage_of(one[1:].detach()) != storage_of(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_that_runs_out_for_copies_does_so_before_anything_moves(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"foreach": True, "skip_nonfinite": dtype == torch.float32}
    optimizer = make(SHAPES)
    params = [torch.nn.Parameter(torch.ones(8, dtype=dtype))]
    set_grads(params, [torch.ones_like(params[0])])
    optimizer.add_param_group({"params": params, **options})
    before = [p.detach().clone() for p in params_of(optimizer)]

    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(staging.Staging, "_copies", fails)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params_of(optimizer), before, strict=True)) and not optimizer.state
