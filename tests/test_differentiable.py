"""differentiable=True: autograd runs through several steps, to parameters, buffers, gradients and lr, checked by gradcheck."""

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from cases import OPTIONS, PAIRWISE, SPECIAL, Options
from fastlars import LARS
from harness import ignore_nothing_adapted, pairs

pytestmark = ignore_nothing_adapted
STEPS = 3


def steps(
    options: Options,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: float | Tensor,
    momentum_buffers: Sequence[Tensor] = (),
    cls: Any = LARS,
) -> list[Tensor]:
    """New parameters and buffers as functions of all arguments. Gradient i belongs to step i // len(params)."""
    new = [param.clone() for param in params]
    if options.get("kahan_sum"):  # no effect for these dtypes, and refused with differentiable
        options = {**options, "kahan_sum": None}
    optimizer = cls(new, **{**options, "lr": lr}, differentiable=True)
    for param, buffer in zip(new, momentum_buffers, strict=False):
        optimizer.state[param]["momentum_buffer"] = buffer.clone()
    for start in range(0, len(grads), len(params)):
        for param, grad in zip(new, grads[start:], strict=False):
            param.grad = grad
        optimizer.step()
    return [*new, *(optimizer.state[param]["momentum_buffer"] for param in new if optimizer.state[param])]


def randn(shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(tuple(shape), dtype=dtype, requires_grad=True)


def check(options: Options, shape: Sequence[int], dtype: torch.dtype, *, tensor_lr: bool, late: bool) -> None:
    """late: the steps are not the tensor's first, and its buffer is an input."""
    late = late and bool(options.get("momentum"))
    inputs = [randn(shape, dtype) for _ in range(1 + STEPS + late)]
    lr = torch.tensor(options["lr"] or 0.1, dtype=torch.float64, requires_grad=tensor_lr)

    def run(param: Tensor, lr: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        rate = lr if tensor_lr else lr.item()
        return tuple(steps(options, [param], rest[:STEPS], rate, rest[STEPS:]))

    assert gradcheck(run, (inputs[0], lr, *inputs[1:]), fast_mode=True)


@pairs("name late tensor_lr", PAIRWISE, [True, False], [True, False])
def test_gradients_through_steps(name: str, late: bool, tensor_lr: bool) -> None:
    torch.manual_seed(0)
    # the last one: more than a row of the norms
    for shape, dtype in (
        ((5, 3), torch.float64),
        ((2, 3), torch.complex128),
        ((), torch.float64),
        ((3, 700), torch.float64),
    ):
        check(OPTIONS[name], shape, dtype, tensor_lr=tensor_lr, late=late)


@pytest.mark.parametrize("name", ["momentum", "nesterov-joint", "dampening-unadapted", "everything"])
def test_every_entry_of_the_jacobian(name: str) -> None:
    """gradcheck's fast mode, above, takes one random direction."""
    torch.manual_seed(0)
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    inputs = (randn((2, 2)), randn((3,)), lr, *(randn(shape) for shape in ((2, 2), (3,)) * 2))
    assert gradcheck(lambda p, q, lr, *grads: tuple(steps(OPTIONS[name], [p, q], grads, lr)), inputs)


# ---------------------------------------------------------------- zero norms
@pairs("name zero tensor_lr", [*PAIRWISE, *SPECIAL], ["param", "grad", "both"], [True, False])
def test_zero_norms(name: str, zero: str, tensor_lr: bool) -> None:
    """The formula jumps there. The derivative is that of the branch taken: d = g, or with decay."""
    # without eps, a division by zero in the branch not taken would make the derivative NaN
    for size, eps in ((3, 1e-8), (3, 0.0), (1500, 0.0)):
        options = {**OPTIONS[name], "lr": OPTIONS[name]["lr"] or 0.1, "eps": eps}
        param = torch.linspace(1, 2, size, dtype=torch.float64).mul(zero == "grad").requires_grad_()
        grad = torch.linspace(-1, 2, size, dtype=torch.float64).mul(zero == "param").requires_grad_()
        lr = torch.tensor(options["lr"], dtype=torch.float64, requires_grad=tensor_lr)
        new, *buffers = steps(options, [param], [grad], lr if tensor_lr else lr.item())
        inputs = [param, grad, lr] if tensor_lr else [param, grad]
        derivatives = torch.autograd.grad(new.sum(), inputs, retain_graph=True, allow_unused=True)
        assert all(d is not None and d.isfinite().all() for d in derivatives)
        for buffer in buffers:
            of_buffer = torch.autograd.grad(buffer.sum(), inputs, retain_graph=True, allow_unused=True)
            assert all(d is None or d.isfinite().all() for d in of_buffer)

        adapted = options.get("adapt", options.get("weight_decay", 0.0) != 0)
        decay = options.get("weight_decay", 0.0)
        joint = options.get("trust_denominator") == "joint"
        if adapted and joint and zero == "grad" and decay != 0:
            continue  # |g + weight_decay * w| is not zero, so this is the regular case
        factor = 1 + options["momentum"] if options.get("nesterov") else 1.0
        sign = -1.0 if options.get("maximize") else 1.0
        decayed = decay if not adapted or joint else 0.0
        assert_equal(derivatives[0], 1 - options["lr"] * factor * decayed)
        assert_equal(derivatives[1], -options["lr"] * factor * sign)
        if tensor_lr:
            expected = -factor * (sign * grad + decayed * param).sum()
            assert_equal(derivatives[2], expected.item())


def assert_equal(actual: Tensor, expected: float) -> None:
    torch.testing.assert_close(actual, torch.full_like(actual, expected), rtol=1e-12, atol=1e-12)


def test_a_zero_norm_beside_others_and_later() -> None:
    """A zero tensor in the list, and a zero gradient in the second step. No NaN reaches the others."""
    torch.manual_seed(0)
    for name in PAIRWISE:
        params = [randn((3,)), torch.zeros(3, dtype=torch.float64, requires_grad=True)]
        grads = [
            randn((3,)),
            randn((3,)),
            torch.zeros(3, dtype=torch.float64, requires_grad=True),
            randn((3,)),
            randn((3,)),
        ]
        lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        out = steps(OPTIONS[name], params, [*grads, randn((3,))], lr)
        for derivative in torch.autograd.grad(sum(x.square().sum() for x in out), [*params, *grads, lr]):
            assert derivative.isfinite().all(), name


# ---------------------------------------------------------------- beside torch's SGD
@pytest.mark.parametrize("tensor_lr", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.25, "maximize": True},
    ],
    ids=str,
)
def test_unadapted_groups_have_the_derivatives_of_torch_sgd(options: Options, tensor_lr: bool) -> None:
    """From given buffers, because torch's SGD detaches the buffer that it creates in a first step.

    One step if lr has a gradient and momentum is not Nesterov's, because torch's second step overwrites what autograd saved.
    """
    torch.manual_seed(0)
    if tensor_lr and "requires_grad" not in inspect.getsource(sys.modules[torch.optim.SGD.__module__]):
        pytest.skip("this torch's SGD takes no lr with a gradient")
    options = {**options, "weight_decay": 0.05}
    count = 1 if tensor_lr and options.get("momentum") and not options.get("nesterov") else STEPS
    inputs = [randn((5, 3)) for _ in range(1 + count)]
    first_buffers = [randn((5, 3))] if options.get("momentum") else []
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=tensor_lr)
    results = []
    for cls, extra in ((LARS, {"adapt": False}), (torch.optim.SGD, {})):
        rate = lr if tensor_lr else 0.3
        out = steps({**options, **extra}, inputs[:1], inputs[1:], rate, first_buffers, cls)
        used = [*inputs, *first_buffers, *([lr] if tensor_lr else [])]
        results.append([*out, *torch.autograd.grad(sum(x.square().sum() for x in out), used)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- the same numbers
@pytest.mark.parametrize("name", [*PAIRWISE, *SPECIAL])
def test_the_numbers_are_those_of_an_ordinary_step(name: str) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        param, grads = torch.randn(5, 3, dtype=dtype), [torch.randn(5, 3, dtype=dtype) for _ in range(STEPS)]
        ordinary = param.clone()
        # differentiable keeps no compensation
        optimizer = LARS([ordinary], **{**OPTIONS[name], "kahan_sum": False}, foreach=False)
        optimizer._looked_for_adapted = True  # no warning that such steps are rounded away
        for grad in grads:
            ordinary.grad = grad
            optimizer.step()
        new = steps(OPTIONS[name], [param.requires_grad_()], grads, OPTIONS[name]["lr"])[0]
        assert new.requires_grad and torch.equal(new, ordinary), dtype


def test_what_was_given_is_not_written() -> None:
    for name in PAIRWISE:
        tensors = [randn((5, 3)) for _ in range(1 + STEPS)]
        copies, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
        steps(OPTIONS[name], tensors[:1], tensors[1:], 0.3)
        assert all(torch.equal(*pair) for pair in zip(tensors, copies, strict=True))
        assert [t._version for t in tensors] == versions


def test_a_hypergradient_trains_the_learning_rate() -> None:
    """lr is learned by descending the loss after five steps. Its derivative equals finite differences."""
    target = torch.tensor([3.0, -1.0], dtype=torch.float64)

    def loss_after(log_lr: Tensor) -> Tensor:
        param = torch.ones(2, dtype=torch.float64, requires_grad=True)
        w = param.clone()
        optimizer = LARS([w], lr=log_lr.exp(), momentum=0.5, trust_coefficient=0.1, adapt=True, differentiable=True)
        for _ in range(5):
            (w.grad,) = torch.autograd.grad((w - target).square().sum(), w, create_graph=True)
            optimizer.step()
        return (w - target).square().sum()

    log_lr = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    assert gradcheck(loss_after, (log_lr,))
    before = loss_after(log_lr).item()
    for _ in range(20):
        (hypergradient,) = torch.autograd.grad(loss_after(log_lr), log_lr)
        log_lr = (log_lr - 0.05 * hypergradient.clamp(-1, 1)).detach().requires_grad_()
    assert loss_after(log_lr).item() < 0.9 * before
