"""Unusual but legal gradients and histories: every implementation takes the step that torch's SGD would scale."""

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fastlars
from cases import Options, tolerance
from fastlars import LARS
from harness import IMPLEMENTATIONS, assert_equals, buffers_of, ignore_nothing_adapted, implementations, set_grads
from reference import ReferenceLARS

pytestmark = ignore_nothing_adapted
OPTIONS: Options = {"lr": 0.5, "weight_decay": 0.05, "trust_coefficient": 0.1}
MOMENTA: dict[str, Options] = {
    "plain": {"momentum": 0.0},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}
momenta = pytest.mark.parametrize("momentum", MOMENTA.values(), ids=MOMENTA)
SHAPES = [(3, 4), (5,), (2, 2), (20_000,)]


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def equals_reference(params: list[Tensor], grads: list[Tensor], buffers: list[Any], options: Options) -> None:
    """One functional step. The reference reads shared memory before anything is written."""
    names = {key: value for key, value in options.items() if key not in ("foreach", "fused")}
    reference = ReferenceLARS([{"params": params}], **names)
    reference.realign(params, buffers)
    reference.step(grads)
    with torch.no_grad():
        fastlars.lars(params, grads, buffers, **options)
    for i, (param, buffer) in enumerate(zip(params, buffers, strict=True)):
        wide = torch.complex128 if param.is_complex() else torch.float64
        for name, actual, expected, size in (
            ("parameter", param, reference.params[i], reference.param_sizes[i]),
            ("buffer", buffer, reference.momentum_buffers[i], reference.buffer_sizes[i]),
        ):
            if expected is not None and actual is not None:
                torch.testing.assert_close(
                    actual.detach().to(wide),
                    torch.as_tensor(expected),
                    msg=lambda text, what=f"{name} {i}": f"{what}: {text}",
                    **tolerance(actual.dtype, size),
                )


# ---------------------------------------------------------------- real gradients of complex parameters
@implementations
def test_a_real_gradient_of_a_complex_parameter(implementation: Options) -> None:
    """Also of shape (..., 2), which is not a list of pairs. torch's SGD treats its imaginary part as zero."""
    for momentum, adapt in itertools.product(MOMENTA.values(), (True, False)):
        options = {**OPTIONS, **momentum, "adapt": adapt, **implementation}
        params = [torch.complex(a, b) for a, b in zip(tensors(), tensors(seed=1), strict=True)]
        equals_reference(params, tensors(seed=2), [torch.zeros_like(p) for p in params], options)


# ---------------------------------------------------------------- gradients that share memory
@implementations
@pytest.mark.parametrize("of", ["param", "buffer", "next element of param", "element of param before"])
def test_a_gradient_that_shares_memory(of: str, implementation: Options) -> None:
    """With its own parameter or momentum buffer. The gradient is read before that memory is written."""
    for momentum, adapt, dtype in itertools.product(MOMENTA.values(), (True, False), (torch.float32, torch.bfloat16)):
        options = {**OPTIONS, **momentum, "adapt": adapt, **implementation}
        if of == "buffer" and options["momentum"] == 0:
            continue
        if "element" in of and options.get("fused") and not adapt:
            continue  # torch's own kernel, which is wrong there
        params, buffers = tensors(dtype), tensors(dtype, seed=1)
        grads = [(v if of == "buffer" else p).detach() for p, v in zip(params, buffers, strict=True)]
        if "element" in of:
            storages = [torch.cat([p.flatten(), p.flatten()[:1] * 3]) for p in params]
            views = [[s[:-1].view(p.shape), s[1:].view(p.shape)] for s, p in zip(storages, params, strict=True)]
            params, grads = map(list, zip(*(pair if "next" in of else pair[::-1] for pair in views), strict=True))
        equals_reference(params, grads, buffers, options)


# ---------------------------------------------------------------- buffers of another dtype
@implementations
def test_a_buffer_of_another_dtype_keeps_its_precision(implementation: Options) -> None:
    """As after ``model.bfloat16()`` in mid-run. A skipped step changes no bit of it."""
    dtypes = [(torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.float16)]
    for (dtype, wide), momentum, adapt in itertools.product(dtypes, ("momentum", "nesterov"), (True, False)):
        for found_inf in (None, torch.zeros(()), torch.ones(())):
            results = []
            for how in (IMPLEMENTATIONS["single"], implementation):
                params, buffers = tensors(dtype), tensors(wide, seed=1)
                options = {**OPTIONS, **MOMENTA[momentum], "adapt": adapt, **how}
                fastlars.lars(params, tensors(dtype, seed=2), [*buffers], found_inf=found_inf, **options)
                results.append([*params, *buffers])
            skipped = found_inf is not None and bool(found_inf)
            expected = [*tensors(dtype), *tensors(wide, seed=1)] if skipped else results[0]
            for actual, each in zip(results[1], expected, strict=True):
                assert torch.equal(actual, each), (dtype, wide, momentum, adapt, found_inf)


# ---------------------------------------------------------------- torch's SGD, bit for bit
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("what", ["late gradient", "negative zeros"])
def test_unadapted_groups_have_the_bits_of_sgd(what: str, foreach: bool) -> None:
    for momentum, dtype in itertools.product(MOMENTA.values(), BITS):
        options = {
            "lr": 0.37,
            "weight_decay": 0.0 if what == "negative zeros" else 0.05,
            **momentum,
            "foreach": foreach,
        }
        runs = []
        for make in (torch.optim.SGD, functools.partial(LARS, adapt=False)):
            params = [Parameter(p) for p in tensors(dtype)]
            optimizer = make(params, **options)
            for step in range(4):
                grads: list[Tensor | None] = [*tensors(dtype, seed=step + 1)]
                if what == "negative zeros":
                    grads[0] = torch.full_like(params[0], -0.0)
                elif step < 2:
                    grads[-1] = None
                set_grads(params, grads)
                optimizer.step()
            runs.append([t.detach().view(BITS[dtype]) for t in [*params, *buffers_of(optimizer)] if t is not None])
        for i, (sgd, ours) in enumerate(zip(*runs, strict=True)):
            assert torch.equal(sgd, ours), f"{momentum}, {dtype}, tensor {i}"


# ---------------------------------------------------------------- leaves outside no_grad
@momenta
def test_functional_steps_of_leaves_outside_no_grad(momentum: Options) -> None:
    """They are not recorded, in any implementation."""
    for implementation in IMPLEMENTATIONS.values():
        options = {**OPTIONS, **momentum, "adapt": True, **implementation}
        results = []
        for params in ([Parameter(p) for p in tensors()], tensors()):
            buffers: list[Tensor | None] = [*tensors(seed=1)]
            fastlars.lars([*params], tensors(seed=2), buffers, **options)
            results.append([*params, *buffers])
        assert all(map(torch.equal, *results)) and all(p.is_leaf for p in results[0])


@momenta
@pytest.mark.parametrize("call", ["lars", "LARS"])
def test_a_differentiable_step_of_leaves_is_refused_whole(call: str, momentum: Options) -> None:
    params, buffers = [Parameter(p) for p in tensors()], tensors(seed=1)
    before = copy.deepcopy([*params, *buffers])
    options = {**OPTIONS, **momentum, "differentiable": True}
    optimizer = LARS(params, **options)
    for param, grad, buffer in zip(params, tensors(seed=2), buffers, strict=True):
        param.grad, optimizer.state[param]["momentum_buffer"] = grad, buffer
    with pytest.raises(RuntimeError, match="cannot update a leaf that requires gradients"):
        optimizer.step() if call == "LARS" else fastlars.lars([*params], tensors(seed=2), [*buffers], **options)
    assert all(map(torch.equal, before, [*params, *buffers]))


# ---------------------------------------------------------------- a parameter that comes twice
@pytest.mark.parametrize("adapt", [True, False])
@momenta
def test_a_parameter_listed_twice_steps_alike_in_every_implementation(momentum: Options, adapt: bool) -> None:
    """One step after the other with one buffer, as in torch's single-tensor SGD."""
    results = []
    for implementation in IMPLEMENTATIONS.values():
        for shape in ((3, 4), (20_000,)):
            p = Parameter(torch.linspace(-1, 2, torch.Size(shape).numel()).view(shape))
            with pytest.warns(UserWarning, match="duplicate"):
                optimizer = LARS([p, p], **{**OPTIONS, **momentum, "adapt": adapt, **implementation})
            for step in range(3):
                p.grad = torch.full(shape, 0.1 * (step + 1))
                optimizer.step()
            results.append(p.detach())
    assert torch.equal(results[0], results[2]) and torch.equal(results[0], results[4])
    assert torch.equal(results[1], results[3]) and torch.equal(results[1], results[5])


def test_the_reference_is_used() -> None:
    """The comparison above finds a wrong step."""
    params = tensors()
    reference = ReferenceLARS([{"params": params}], **OPTIONS)
    optimizer = LARS([Parameter(p.clone()) for p in params], **{**OPTIONS, "lr": 0.6})
    set_grads(optimizer.param_groups[0]["params"], tensors(seed=1))
    reference.step(tensors(seed=1))
    optimizer.step()
    with pytest.raises(AssertionError):
        assert_equals(reference, optimizer, "")
