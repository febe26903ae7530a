"""What tests do repeatedly: set gradients, read buffers, and step next to the reference."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import HISTORIES, LR_FACTORS, PAIRWISE, STEPS, Options, kahan_tolerance, pairwise, tolerance
from devices import settle
from fastlars import LARS
from fastlars.backends import fused_cpu
from reference import ReferenceLARS, is_adapted

IMPLEMENTATIONS: dict[str, Options] = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
option_sets = pytest.mark.parametrize("name", PAIRWISE)
Test = Callable[..., None]


def pairs(names: str, *columns: Iterable[Any]) -> pytest.MarkDecorator:
    """Cases in which any two values of two columns meet."""
    # functions by name, because their repr differs between processes
    return pytest.mark.parametrize(names.split(), pairwise(*columns), ids=lambda x: None if callable(x) else str(x))


def loop_over(names: str, values: Iterable[Any]) -> Callable[[Test], Test]:
    """Like `pytest.mark.parametrize`, but as one case, for values that take one code path. A failure names its values."""

    def decorate(test: Test) -> Test:
        given = names.split()
        rows = [value if len(given) > 1 else (value,) for value in values]

        @functools.wraps(test)
        def loop(**others: Any) -> None:
            for row in rows:
                chosen = dict(zip(given, row, strict=True))
                try:
                    test(**others, **chosen)
                except Exception as error:
                    error.add_note(f"with {chosen}")
                    raise

        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name not in given]
        loop.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return loop

    return decorate


# the warning itself is tested in test_unadapted.py
ignore_nothing_adapted = pytest.mark.filterwarnings("ignore:LARS adapts no parameter:UserWarning")


def mixed_grads(params: Sequence[Tensor], step: int, offset: int) -> list[Tensor | None]:
    """A different history for every tensor. The offset shifts them over the layouts."""
    names = list(HISTORIES)
    return [HISTORIES[names[(i + offset) % len(names)]](param, step, i) for i, param in enumerate(params)]


def set_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    settle()


@contextlib.contextmanager
def stacked(up_to: int, at_once: int = fused_cpu.STACK) -> Iterator[None]:
    """Set other limits of the fused CPU step: the size up to which tensors are stacked, and the size of a stack."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_cpu, "SMALL", up_to)
        patch.setattr(fused_cpu, "STACK", at_once)
        yield


def buffers_of(optimizer: torch.optim.Optimizer, key: str = "momentum_buffer") -> list[Tensor | None]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p].get(key) if p in optimizer.state else None for p in params]


def assert_equals(reference: ReferenceLARS, optimizer: LARS, what: str) -> None:
    settle()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, (param, buffer) in enumerate(zip(params, buffers_of(optimizer), strict=True)):
        where = f"{what}, tensor {i} of shape {tuple(param.shape)} and {param.dtype}"
        pairs = [("parameter", param, reference.params[i], reference.param_sizes[i])]
        expected = reference.momentum_buffers[i]
        if expected is not None:
            assert buffer is not None, where
            pairs.append(("momentum_buffer", buffer, expected, reference.buffer_sizes[i]))
        elif buffer is not None:
            assert not buffer.any(), f"{where}: a buffer before the first step must be zeros"
        for name, actual, value, size in pairs:
            torch.testing.assert_close(
                actual.detach().resolve_conj().cpu().to(torch.complex128 if actual.is_complex() else torch.float64),
                torch.as_tensor(value),
                msg=lambda text, what=f"{where}: {name}": f"{what}: {text}",
                equal_nan=True,
                **tolerance(actual.dtype, size),
            )
    assert_compensated(reference, optimizer, what)


def assert_compensated(reference: ReferenceLARS, optimizer: LARS, what: str) -> None:
    """Half-precision parameters plus their compensations equal the reference; other dtypes have no compensations."""
    kept = iter(buffers_of(optimizer, "compensation"))
    i = 0
    for group in optimizer.param_groups:
        on = is_adapted(group) if group["kahan_sum"] is None else group["kahan_sum"]
        for param, compensation in zip(group["params"], kept, strict=False):
            half = param.dtype in (torch.float16, torch.bfloat16)
            assert (compensation is not None) == bool(on and half and param in optimizer.state), what
            if compensation is not None:
                assert compensation.dtype == param.dtype
                if param.device.type == "vulkan":
                    i += 1
                    continue  # torchvulkan rounds 0-dim factors of half-precision tensors, so the sum is off by 1e-4
                total = param.detach().cpu().double() + compensation.cpu().double()
                limit = kahan_tolerance(param.dtype, reference.param_sizes[i])
                expected = torch.as_tensor(reference.params[i] + reference.compensations[i])
                torch.testing.assert_close(total, expected, rtol=0, atol=limit, equal_nan=True)
            i += 1


def run(
    groups: list[dict[str, Any]],
    options: Options,
    grads_of: Callable[[Sequence[Tensor], int], Sequence[Tensor | None]],
    implementation: Options,
    steps: int = STEPS,
) -> LARS:
    """Step both optimizers from equal values, with an lr that changes every step."""
    optimizer = LARS(groups, **options, **implementation)
    reference = ReferenceLARS(groups, **options)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    lrs = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for lr, group, reference_group in zip(lrs, optimizer.param_groups, reference.groups, strict=True):
            group["lr"] = reference_group["lr"] = lr * LR_FACTORS[step % len(LR_FACTORS)]
        before = [p.detach().clone() for p in params]
        grads = grads_of(params, step)
        set_grads(params, grads)
        reference.step(grads)
        optimizer.step()
        assert_equals(reference, optimizer, f"{options}, step {step}")
        for param, grad, old in zip(params, grads, before, strict=True):
            if grad is None:
                assert torch.equal(param, old), "a tensor without a gradient is left alone"
        kept = buffers_of(optimizer, "compensation")
        reference.realign(params, started(reference, buffers_of(optimizer)), kept)
    return optimizer


def started(reference: ReferenceLARS, buffers: Sequence[Tensor | None]) -> list[Tensor | None]:
    """For the reference, the zeros of a tensor that has not stepped are not a buffer."""
    return [None if old is None else new for old, new in zip(reference.momentum_buffers, buffers, strict=True)]
