"""A list of tensors that came before is asked in one call whether it still is what it was, and never confused with another."""

import contextlib
import weakref
from collections import Counter
from types import ModuleType

import pytest
import torch
from torch import Tensor

from cases import MEMORY, OPTIONS, Subclass
from fastlars import LARS, fused_cpu, known_lists, lars
from harness import loop_over, set_grads


def in_one_call(monkeypatch: pytest.MonkeyPatch, lists: list[list[Tensor]]) -> bool:
    """Whether a list is known: what does not ask `serves` has not looked at the tensors one by one."""
    asked: list[bool] = []
    serves = fused_cpu.serves
    monkeypatch.setattr(fused_cpu, "serves", lambda *args: asked.append(serves(*args)) or asked[-1])
    fused_cpu.plan(*lists)
    monkeypatch.setattr(fused_cpu, "serves", serves)
    return not asked


@loop_over("place", range(3))
@pytest.mark.parametrize("changed", [*MEMORY, "shape", "expanded", "subclass", "meta", "another_order"])
def test_a_list_that_is_known_is_served_as_one_that_is_not(
    changed: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a tensor has become since the last step."""
    make = {
        **MEMORY,
        "shape": lambda x: torch.cat([x, x]),
        "expanded": lambda x: x[:1].expand(4, 6),
        "subclass": lambda x: x.as_subclass(Subclass),
        "meta": lambda x: x.to("meta"),
        "another_order": lambda x: x.view(6, 4),
    }
    lists = [[torch.randn(shape) for shape in [(8,), (4, 6), (200, 200)]] for _ in range(3)]
    for _ in range(4):
        assert fused_cpu.plan(*lists) == ({(8,): [0], (4, 6): [1]}, [2])
    assert in_one_call(monkeypatch, lists)
    lists[place][1] = make[changed](torch.randn(4, 6))
    for _ in range(4):  # known again after a while, where it is served
        assert (fused_cpu.plan(*lists) is not None) == (changed in ("contiguous", "offset"))
    assert in_one_call(monkeypatch, lists) == (changed in ("contiguous", "offset"))


def test_a_known_list_whose_tensors_all_changed_together() -> None:
    """So that they still are alike: the plan is made anew, by sizes and memory order."""
    plans = []
    lists = [[torch.nn.Parameter(torch.randn(4, 6))] for _ in range(3)]
    for change in (lambda x: x, lambda x: torch.cat([x, x]), lambda x: x.t().contiguous().t(), lambda x: x.double()):
        for (tensor,) in lists:
            tensor.data = change(tensor.data)
        plans.append([fused_cpu.plan(*lists) for _ in range(4)])
    first, larger, transposed, wide = plans
    assert first == [({(4, 6): [0]}, [])] * 4 and larger == [({(8, 6): [0]}, [])] * 4
    assert transposed == [({(8, 6): []}, [0])] * 4 and wide == [None] * 4


def test_the_groups_of_an_optimizer_are_looked_at_twice_and_then_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that comes once costs no guard, and a step of known groups neither looks nor plans."""
    calls: Counter[str] = Counter()

    def count(module: ModuleType, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (calls.update([name]), function(*args))[1])

    count(fused_cpu, "serves")
    count(fused_cpu, "_plan")
    count(known_lists, "metadata_guard")
    params = [torch.nn.Parameter(torch.randn(3, 5)) for _ in range(4)]
    set_grads(params, [torch.randn(3, 5) for _ in params])
    optimizer = LARS([{"params": params[:2]}, {"params": params[2:]}], **OPTIONS["momentum"])
    optimizer.step()
    assert calls == {"serves": 2, "_plan": 2}
    for _ in range(4):
        optimizer.step()
    assert calls == {"serves": 4, "_plan": 4, "metadata_guard": 2}


@pytest.mark.parametrize("size", [5, 20_000], ids=["stacked", "alone"])
@pytest.mark.parametrize("first", [2, 3])
def test_lists_of_as_many_tensors_in_other_numbers_are_not_confused(first: int, size: int) -> None:
    """Three params and their gradients are as many tensors as two with buffers."""
    params, grads, buffers = ([torch.full((size,), value) for _ in range(3)] for value in (1.0, 1.0, 0.0))
    for count in (first, first, 5 - first):
        before = [param.clone() for param in params]
        momentum = 0.9 if count == 2 else 0.0
        lars(params[:count], grads[:count], buffers[:count] if momentum else [], 1.0, momentum, adapt=True)
        assert [not torch.equal(x, y) for x, y in zip(params, before, strict=True)] == [True, True, count == 3]


def test_what_is_known_stays_whole_when_an_error_comes_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, or another thread, while a guard is made: a plan goes with its own guard."""
    lists = [[torch.randn(5), torch.randn(20_000)] for _ in range(3)]
    for _ in range(3):
        fused_cpu.plan(*lists)
    large = [each[1] for each in lists]

    def fails(_: object) -> None:
        raise KeyboardInterrupt

    for each in lists:
        each[1] = torch.randn(7)
    with monkeypatch.context() as patch:
        patch.setattr(known_lists, "metadata_guard", fails)
        for _ in range(3):
            with contextlib.suppress(KeyboardInterrupt):
                assert fused_cpu.plan(*lists) == ({(5,): [0], (7,): [1]}, [])
    for each, tensor in zip(lists, large, strict=True):
        each[1] = tensor
    assert fused_cpu.plan(*lists) == ({(5,): [0]}, [1])


def test_a_list_that_never_stays_the_same_makes_few_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with one gradient of two parameters, which torch's guard does not take."""
    made: list[int] = []
    guard = known_lists.metadata_guard
    monkeypatch.setattr(known_lists, "metadata_guard", lambda tensors: made.append(1) or guard(tensors))
    params, grad = [torch.randn(5), torch.randn(5)], torch.randn(5)
    for _ in range(9):
        assert fused_cpu.plan(params, [grad, grad]) == ({(5,): [0, 1]}, [])
    assert len(made) <= 3


def test_a_parameter_that_comes_twice_has_one_buffer() -> None:
    """Torch takes it, with a warning: both of its steps are those of one momentum buffer."""
    param, expected = torch.nn.Parameter(torch.ones(1)), torch.ones(1)
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = LARS([param, param], lr=0.1, momentum=0.9, adapt=False)
    buffer = torch.zeros(1)
    for _ in range(3):
        param.grad = torch.ones(1)
        optimizer.step()
        for _ in range(2):
            buffer = 0.9 * buffer + 1.0
            expected = expected - 0.1 * buffer
    torch.testing.assert_close(param.detach(), expected)


def test_lists_that_are_known_are_few_and_keep_no_tensor_alive() -> None:
    dead = []
    for _ in range(200):
        param = torch.randn(3)
        for _ in range(3):
            fused_cpu.plan([param], [param.clone()])
        dead.append(weakref.ref(param))
        del param
    assert not any(reference() is not None for reference in dead)
    assert known_lists._known.cache_info().currsize <= 128


def test_without_the_guard_of_torch_every_list_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    lists = [[torch.randn(8)] for _ in range(3)]
    for _ in range(4):
        assert fused_cpu.plan(*lists) == ({(8,): [0]}, [])
        assert not in_one_call(monkeypatch, lists)


@pytest.mark.parametrize("size", [24, 20_004], ids=["stacked", "alone"])
@pytest.mark.parametrize("change", ["transposed", "columns", "float64", "larger"])
def test_steps_go_on_right_when_a_parameter_changes_its_memory(change: str, size: int) -> None:
    """As by `model.to(...)`, between steps of a list that is known."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size // 6, 6, generator=generator) for _ in range(8)]
    make = {**MEMORY, "columns": lambda x: torch.cat([x, x], dim=1)[:, :6], "larger": lambda x: torch.cat([x, x])}[
        change
    ]
    results = []
    for known in (True, False):
        param = torch.nn.Parameter(values[0].clone())
        optimizer = LARS([param], **OPTIONS["momentum"])
        for step, grad in enumerate(values[1:]):
            if step == 4:
                param.data = make(param.data)
                if change == "larger":
                    optimizer.state[param]["momentum_buffer"] = make(optimizer.state[param]["momentum_buffer"])
                else:
                    optimizer.state[param]["momentum_buffer"] = optimizer.state[param]["momentum_buffer"].to(
                        param.dtype
                    )
            param.grad = make(grad).to(param.dtype) if change == "larger" and step >= 4 else grad.to(param.dtype)
            if not known:
                known_lists._known.cache_clear()
            optimizer.step()
        results.append(param.detach().clone())
    assert torch.equal(results[0], results[1]) and results[0].isfinite().all()
