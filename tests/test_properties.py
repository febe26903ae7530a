"""Properties for any tensors, options and histories. hypothesis searches for counterexamples."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import harness
from cases import Options
from fastlars import LARS
from harness import IMPLEMENTATIONS, buffers_of, ignore_nothing_adapted, set_grads
from properties import (
    HALF,
    STEPS,
    UNSHUFFLED,
    Kind,
    assert_same_bits,
    bits_after,
    examples,
    kinds,
    options,
    shuffles,
)

pytestmark = ignore_nothing_adapted


@examples(120)
@given(st.lists(kinds(), min_size=1, max_size=5), options())
def test_every_implementation_equals_the_reference(tensors: list[Kind], chosen: Options) -> None:
    for implementation in IMPLEMENTATIONS.values():
        harness.run(
            [{"params": [tensor.param() for tensor in tensors]}],
            chosen,
            lambda _, step: [tensor.grad(step) for tensor in tensors],
            implementation,
            STEPS,
        )


# ---------------------------------------------------------------- scale
# Without decay a step is lr * trust_coefficient * |w| * g / |g|. Left out is what depends on the scale of g: eps, a clip,
# and tensors of zeros, which take g as it is.
SCALE_FREE: Options = {"weight_decay": 0.0, "adapt": True, "trust_clip": False, "eps": 0.0}
OF_ONE: dict[str, Any] = {"scale": 1.0, "grad_scale": 1.0}


def stepped(
    tensors: Sequence[Kind], chosen: Options, implementation: Options, scale: float = 1.0
) -> tuple[list[Parameter], list[Tensor | None]]:
    params = [tensor.param() for tensor in tensors]
    optimizer = LARS(params, **chosen, **implementation)
    for step in range(STEPS):
        set_grads(params, [None if (g := tensor.grad(step)) is None else g * scale for tensor in tensors])
        optimizer.step()
    return params, buffers_of(optimizer)


@examples(60)
@given(
    st.lists(kinds(**OF_ONE), min_size=1, max_size=4),
    options(**SCALE_FREE, lr=0.5, trust_coefficient=0.01),  # no step as long as its tensor, which would become zero
    st.integers(-10, 10),
)
def test_a_power_of_two_on_the_loss_changes_no_bit(tensors: list[Kind], chosen: Options, power: int) -> None:
    # float16 has too little range
    power = max(-3, min(3, power)) if any(tensor.dtype == torch.float16 for tensor in tensors) else power
    for implementation in IMPLEMENTATIONS.values():
        plain, scaled = (stepped(tensors, chosen, implementation, scale) for scale in (1.0, 2.0**power))
        assert_same_bits(plain[0] + plain[1], scaled[0] + scaled[1], f"{implementation}, 2^{power}")


@examples(40)
@given(
    st.lists(kinds((torch.float64, torch.float32, torch.complex64), **OF_ONE), min_size=1, max_size=4),
    options(**{**SCALE_FREE, "lr": 0.5, "momentum": 0.9}),
    st.floats(1e-4, 1e4),
)
def test_any_factor_on_the_loss_changes_rounding_only(tensors: list[Kind], chosen: Options, factor: float) -> None:
    for implementation in IMPLEMENTATIONS.values():
        plain, scaled = (stepped(tensors, chosen, implementation, scale)[0] for scale in (1.0, factor))
        for tensor, before, after in zip(tensors, plain, scaled, strict=True):
            # steps are at most a few norms long; one more number is rounded in each, the gradient
            largest = 10 * float(tensor.param().detach().norm())
            assert float((before - after).detach().norm()) <= 32 * torch.finfo(tensor.dtype).eps * largest, (
                implementation
            )


@examples(40)
@given(kinds(**OF_ONE, history=("dense",)), options(**{**SCALE_FREE, "momentum": 0.0}))
def test_the_relative_size_of_a_step_is_lr_times_trust_coefficient(tensor: Kind, chosen: Options) -> None:
    for implementation in IMPLEMENTATIONS.values():
        param, grad = tensor.param(), tensor.grad(0)
        wide = torch.complex128 if tensor.dtype.is_complex else torch.float64
        before = param.detach().clone().to(wide)
        assert grad is not None
        optimizer = LARS([param], **chosen, **implementation)
        set_grads([param], [grad])
        optimizer.step()
        moved = float((param.detach().to(wide) - before).norm())
        expected = chosen["lr"] * chosen["trust_coefficient"] * float(before.norm())
        if not grad.any():  # no direction
            expected = 0.0
        rounding = torch.finfo(tensor.dtype).eps * (float(before.norm()) + 32 * expected)
        assert abs(moved - expected) <= rounding, implementation


# ---------------------------------------------------------------- bits
@st.composite
def alike(draw: st.DrawFn) -> list[Kind]:
    """Many tensors of few kinds, so that the fused step stacks them."""
    few = draw(st.lists(kinds(dtypes=(torch.float32, torch.float32, torch.float32, *HALF)), min_size=1, max_size=3))
    dense = st.sampled_from(["dense", "dense", "offset"])
    return [
        Kind(**{**vars(kind), "seed": seed, "layout": draw(dense), "grad_layout": draw(dense)})
        for kind in few
        for seed in range(draw(st.integers(1, 12)))
    ]


@examples(60)
@given(alike(), options(), st.data())
def test_order_groups_checkpoints_and_threads_change_no_bit(
    tensors: list[Kind], chosen: Options, data: st.DataObject
) -> None:
    way = data.draw(shuffles(len(tensors)))
    for implementation in IMPLEMENTATIONS.values():
        expected = bits_after(tensors, chosen, implementation, UNSHUFFLED)
        assert_same_bits(expected, bits_after(tensors, chosen, implementation, way), f"{implementation}")


@examples(20)
@given(st.lists(kinds(), min_size=1, max_size=6), options(), st.data())
def test_order_groups_and_checkpoints_change_no_bit_in_any_layout(
    tensors: list[Kind], chosen: Options, data: st.DataObject
) -> None:
    way = {**data.draw(shuffles(len(tensors))), "threads": 1}
    for implementation in IMPLEMENTATIONS.values():
        expected = bits_after(tensors, chosen, implementation, UNSHUFFLED)
        assert_same_bits(expected, bits_after(tensors, chosen, implementation, way), f"{implementation}")
