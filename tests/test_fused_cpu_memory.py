"""The fused CPU step computes in little memory, which it makes once: what steps leave there changes no other step."""

import gc
import threading
import weakref
from collections import deque

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cases import OPTIONS
from fastlars import LARS, fused_cpu, lars
from harness import set_grads

SHAPES = [(3, 5), (64,), (3, 5), (20_000,), (7, 9), (64,)]


@pytest.fixture(autouse=True)
def no_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(fused_cpu, "_SPARE", deque(maxlen=fused_cpu._SPARE.maxlen))


def make(shapes: list[tuple[int, ...]], seed: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    params, grads = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    return params, grads, [torch.zeros(shape) for shape in shapes]


def step(lists: tuple[list[Tensor], ...], fused: bool = True) -> None:
    lars(*lists, lr=0.5, momentum=0.9, weight_decay=0.1, fused=fused or None, foreach=None if fused else False)


def assert_equal(left: tuple[list[Tensor], ...], right: tuple[list[Tensor], ...]) -> None:
    for one, other in zip(left, right, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def expected(shapes: list[tuple[int, ...]], seed: int, steps: int = 1) -> tuple[list[Tensor], ...]:
    """After steps in a workspace of their own."""
    lists = make(shapes, seed)
    for _ in range(steps):
        fused_cpu._SPARE.clear()
        step(lists)
    fused_cpu._SPARE.clear()
    return lists


def test_no_temporary_above_4_mib() -> None:
    shapes = [(1 << 23,), (2048, 1024), *[(32, 32)] * 1000, *[(64,)] * 50]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for name in ("momentum", "joint", "nesterov"):
        optimizer = LARS(params, **OPTIONS[name])
        set_grads(params, [torch.randn_like(p) for p in params])
        optimizer.step()
        fused_cpu._SPARE.clear()  # the workspaces count
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            optimizer.step()
        allocated = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        live = peak = 0
        for size in allocated:
            live += size
            peak = max(peak, live)
        # two workspaces; the sum of a gradient and its decay
        limit = 3.25 if name == "joint" else 2.25
        assert allocated and 2 * 2**20 <= peak <= limit * 2**20, f"{name}: {peak / 2**20:.2f} MiB"


def test_steps_share_one_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several optimizers and shapes, each of whose views are made once."""
    made: list[int] = []
    workspace = fused_cpu._Workspace
    monkeypatch.setattr(fused_cpu, "_Workspace", lambda: made.append(1) or workspace())
    wanted = [expected(shapes, seed, steps=3) for seed, shapes in enumerate([SHAPES, SHAPES[::-1], [(5,)] * 9])]
    runs = [make(shapes, seed) for seed, shapes in enumerate([SHAPES, SHAPES[::-1], [(5,)] * 9])]
    made.clear()
    for i in range(3):
        for run in runs:
            step(run)
        if i == 0:
            stacks = dict(fused_cpu._SPARE[0].stacks)
    assert made == [1] and fused_cpu._SPARE[0].stacks == stacks
    for run, other in zip(runs, wanted, strict=True):
        assert_equal(run, other)


def test_fewer_tensors_of_a_shape_than_before() -> None:
    """As of a layer that is frozen for a while: what is left of the others takes no part."""
    for count in (9, 4, 9, 1):
        lists = make([(3, 5)] * count, seed=count)
        wanted = make([(3, 5)] * count, seed=count)
        step(lists)
        step(wanted, fused=False)
        for one, other in zip(lists, wanted, strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b)


def test_views_are_few_and_a_workspace_goes_without_the_garbage_collector() -> None:
    for size in range(1, 2 * fused_cpu.STACKS):
        step(make([(size,)] * 2, seed=0))
    assert 1 <= len(fused_cpu._SPARE[0].stacks) <= fused_cpu.STACKS
    gc.collect()
    gc.disable()
    try:
        workspace = weakref.ref(fused_cpu._SPARE[0])
        fused_cpu._SPARE.clear()
        assert workspace() is None
    finally:
        gc.enable()


def test_threads_that_step_at_the_same_time() -> None:
    wanted = [expected(SHAPES, seed, steps=20) for seed in range(4)]
    runs = [make(SHAPES, seed) for seed in range(4)]
    start = threading.Barrier(4)

    def work(run: tuple[list[Tensor], ...]) -> None:
        start.wait()
        for _ in range(20):
            step(run)

    threads = [threading.Thread(target=work, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run, other in zip(runs, wanted, strict=True):
        assert_equal(run, other)
    assert len(fused_cpu._SPARE) == 1


class StepsWithin(TorchDispatchMode):
    """Makes a step of other tensors in the middle of a step."""

    def __init__(self, lists: tuple[list[Tensor], ...]) -> None:
        super().__init__()
        self.lists = lists
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen += 1
        if self.seen == 12:
            step(self.lists)
        return func(*args, **(kwargs or {}))


def test_a_step_within_a_step() -> None:
    wanted, inner_wanted = expected(SHAPES, 0, steps=2), expected(SHAPES[::-1], 1)
    lists, inner = make(SHAPES, 0), make(SHAPES[::-1], 1)
    step(lists)
    with StepsWithin(inner) as mode:
        step(lists)
    assert mode.seen > 12
    assert_equal(lists, wanted)
    assert_equal(inner, inner_wanted)


@pytest.mark.parametrize("spare", [False, True], ids=["first", "later"])
def test_what_a_mode_sees_it_sees_being_made(spare: bool) -> None:
    """Its tensors may be no real ones, and a graph that it traces would hold memory that other steps write."""
    if spare:
        step(make(SHAPES, 0))
    before = list(fused_cpu._SPARE)
    seen: list[str] = []

    class Sees(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    lists = make(SHAPES, 1)
    with Sees():
        step(lists)
    assert seen.count("empty.memory_format") == 2 and list(fused_cpu._SPARE) == before
    with FakeTensorMode(), pytest.raises(Exception, match=r"(?i)fake"):
        step(lists)
    assert list(fused_cpu._SPARE) == before
    lists = make(SHAPES, 1)
    step(lists)
    assert_equal(lists, expected(SHAPES, 1))


def test_where_torch_cannot_tell_of_modes_no_workspace_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    lists = make(SHAPES, 0)
    step(lists)
    assert not fused_cpu._SPARE
    assert_equal(lists, expected(SHAPES, 0))


@pytest.mark.parametrize("first", ["inference_mode", "no_grad"])
def test_whatever_the_first_step_is_in(first: str) -> None:
    """A tensor that inference mode has made cannot be written outside of it."""
    lists = make(SHAPES, 0)
    with getattr(torch, first)():
        step(lists)
    step(lists)
    with torch.inference_mode():
        step(lists)
    step(lists)
    assert_equal(lists, expected(SHAPES, 0, steps=4))


def test_a_step_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workspace goes with it."""
    step(make(SHAPES, 0))

    def fails(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_fused_sgd_", fails)
        with pytest.raises(KeyboardInterrupt):
            step(make(SHAPES, 0))
    lists = make(SHAPES, 1)
    step(lists)
    assert_equal(lists, expected(SHAPES, 1))
