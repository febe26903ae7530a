"""Random tensors, options and histories for hypothesis, and for how long it searches. See `test_properties.py`.

The suite runs a fixed set of examples. With FASTLARS_PROPERTIES_SECONDS=N each property is tried on new random examples
for N seconds (`nox -s properties`). A failing example is shrunk and printed.
"""

import contextlib
import io
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import harness
from cases import COMPLEX, REAL, Options, is_valid
from fastlars import LARS
from fastlars.backends import fused_cpu
from harness import set_grads, stacked

STEPS = 3

SECONDS = float(os.environ.get("FASTLARS_PROPERTIES_SECONDS", "0"))
EXAMPLES_A_ROUND = 200  # in the long profile, between two looks at the clock
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


def examples(number: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Decorate a `given` test with this many fixed examples, or with new ones until the time is up."""
    common: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": QUIET}

    def decorate(test: Callable[[], None]) -> Callable[[], None]:
        if not SECONDS:
            return settings(max_examples=number, derandomize=True, **common)(test)
        thorough = settings(max_examples=EXAMPLES_A_ROUND, print_blob=True, **common)(test)

        def by_the_clock() -> None:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                thorough()

        return by_the_clock

    return decorate


# ---------------------------------------------------------------- tensors
# around the widths of vector instructions, a row of norms, a stacked tensor, a chunk of the Triton kernels
EDGES = [*range(10), 15, 16, 17, 31, 33, 63, 65, 1000, 1023, 1024, 1025, 2047, 2049, 4095, 4096, 4097, 5000, 12_289]
KINDS = ("dense", "permuted", "every_second", "narrowed", "offset")
GRADIENTS = (*["dense"] * 5, "missing", "zero", "sparse_in_value")
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kind:
    """A tensor's shape, dtype, memory layout and values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    grad_layout: str
    seed: int
    scale: float
    grad_scale: float
    history: tuple[str, ...]  # names of GRADIENTS, one per step

    def param(self) -> Parameter:
        """A new tensor of the same values."""
        return Parameter(laid_out(self._values(self.seed, self.scale), self.layout))

    def grad(self, step: int) -> Tensor | None:
        """The gradient of a step."""
        what = self.history[step]
        if what == "missing":
            return None
        values = self._values(self.seed + 1000 * (step + 1), self.grad_scale)
        if what == "zero":
            values = torch.zeros_like(values)
        elif what == "sparse_in_value":
            values = torch.where(values.abs() > self.grad_scale, values, torch.zeros_like(values))
        return laid_out(values, self.grad_layout)

    def _values(self, seed: int, scale: float) -> Tensor:
        wide = torch.complex128 if self.dtype.is_complex else torch.float64
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(self.shape, generator=generator, dtype=wide) * scale).to(self.dtype)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in other memory."""
    if layout == "permuted":
        order = list(reversed(range(values.dim())))
        return values.permute(order).contiguous().permute(order)
    if layout == "every_second" and values.dim():
        return values.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "narrowed" and values.dim():
        return torch.cat([values, values], dim=0).narrow(0, values.size(0) // 2, values.size(0)).copy_(values)
    if layout == "offset":
        return torch.cat([values.new_zeros(3), values.reshape(-1)])[3:].view(values.shape)
    return values.clone()


shapes = st.one_of(
    st.lists(st.integers(0, 6), max_size=4).map(tuple), st.sampled_from(EDGES).map(lambda size: (size,))
)  # fmt: skip


@st.composite
def kinds(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = REAL + COMPLEX, **fixed: Any) -> Kind:
    dtype = draw(st.sampled_from(list(dtypes)))
    powers = st.integers(-3, 2) if dtype == torch.float16 else st.integers(-6, 4)
    return Kind(
        **{
            "shape": draw(shapes),
            "dtype": dtype,
            "layout": draw(st.sampled_from(KINDS)),
            "grad_layout": draw(st.sampled_from(KINDS)),
            "seed": draw(st.integers(0, 999)),
            "scale": draw(st.sampled_from([0.0, *[1.0] * 4, 10.0 ** draw(powers)])),
            "grad_scale": 10.0 ** draw(powers),
            "history": tuple(draw(st.lists(st.sampled_from(GRADIENTS), min_size=STEPS, max_size=STEPS))),
            **fixed,
        }
    )


# ---------------------------------------------------------------- options
def numbers(*usual: float) -> st.SearchStrategy[float]:
    """Mostly usual values with equal chances, else any from 0 to 1."""
    return st.sampled_from(usual) | st.sampled_from(usual) | st.floats(1e-6, 1.0)


booleans = st.booleans()
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "lr": numbers(0.0, 0.3, 0.5, 1.0, 20.0),
    "momentum": numbers(0.0, 0.5, 0.9, 0.99).filter(lambda momentum: momentum < 1),
    "dampening": numbers(0.0, 0.25, 0.9),
    "weight_decay": numbers(0.0, 1e-4, 0.05, 2.0),
    "nesterov": booleans,
    "trust_coefficient": numbers(0.001, 0.1, 1.0),
    "eps": st.sampled_from([0.0, 1e-8, 1e-3, 0.5]),
    "adapt": st.sampled_from([None, True, False]),
    "trust_clip": booleans,
    "trust_denominator": st.sampled_from(["separate", "joint"]),
    "lr_in_momentum": booleans,
    "skip_nonfinite": booleans,
    "maximize": booleans,
}


def options(**fixed: Any) -> st.SearchStrategy[Options]:
    """All options at random except `fixed`. Options that exclude each other are dropped."""
    strategies = {name: strategy for name, strategy in OPTIONS.items() if name not in fixed}
    taken_back = st.permutations([("dampening", 0.0), ("nesterov", False), ("skip_nonfinite", False)])
    return st.builds(_made_valid, st.fixed_dictionaries(strategies), taken_back, st.just(fixed))


def _made_valid(drawn: Options, taken_back: list[tuple[str, Any]], fixed: Options) -> Options:
    chosen = {**drawn, **fixed}
    for name, value in taken_back:
        if not is_valid(chosen):
            chosen[name] = value
    return chosen


# ---------------------------------------------------------------- bits
@st.composite
def shuffles(draw: st.DrawFn, n: int) -> dict[str, Any]:
    """Another order and grouping of n tensors, another place to save, and other stacks in the fused step."""
    return {
        "order": draw(st.permutations(range(n))),
        "cuts": sorted(draw(st.sets(st.integers(1, max(1, n - 1)), max_size=3))),
        "saved_after": draw(st.sets(st.integers(0, STEPS - 1))),
        "threads": draw(st.sampled_from([1, 1, 2, 3])),
        "stack": draw(st.sampled_from([fused_cpu.STACK, 6000, 5000])),
    }


UNSHUFFLED: dict[str, Any] = {"cuts": [], "saved_after": (), "threads": 1, "stack": fused_cpu.STACK}


def bits_after(tensors: Sequence[Kind], chosen: Options, implementation: Options, way: dict[str, Any]) -> list[Any]:
    """Parameters, then buffers, in the order of `tensors` for every arrangement."""
    order = way.get("order", range(len(tensors)))
    bounds = [0, *way["cuts"], len(tensors)]
    groups = [list(order[a:b]) for a, b in itertools.pairwise(bounds)]

    def made(values: Sequence[Tensor] | None = None) -> tuple[list[Parameter], LARS]:
        params = [tensor.param() for tensor in tensors]
        with torch.no_grad():
            for param, value in zip(params, values or params, strict=True):
                param.copy_(value)
        return params, harness.LARS(
            [{"params": [params[i] for i in group]} for group in groups], **chosen, **implementation
        )

    with limits(way["threads"], way["stack"]):
        params, optimizer = made()
        for step in range(STEPS):
            set_grads(params, [tensor.grad(step) for tensor in tensors])
            optimizer.step()
            if step in way["saved_after"]:
                file = io.BytesIO()
                torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                params, optimizer = made(saved["params"])
                optimizer.load_state_dict(saved["optimizer"])
    states = [optimizer.state[param].get("momentum_buffer") if param in optimizer.state else None for param in params]
    return [*params, *states]


@contextlib.contextmanager
def limits(threads: int, stack: int) -> Iterator[None]:
    before = torch.get_num_threads()
    with stacked(up_to=5000, at_once=stack):  # at most a stack
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def assert_same_bits(left: Sequence[Tensor | None], right: Sequence[Tensor | None], what: str) -> None:
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        assert (a is None) == (b is None), (what, i)
        if a is not None and b is not None:
            as_bytes = [
                t.detach().resolve_conj().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
                for t in (a, b)
            ]
            assert torch.equal(*as_bytes), f"{what}: tensor {i} of shape {tuple(a.shape)} and {a.dtype}"
