"""Norms are right up to 1e8 elements, in every layout, without overflow in half types, whatever torch's settings are."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.linalg import vector_norm

from cases import BASE, OPTIONS, Options, make_grads, make_params
from fastlars import LARS, lars, norms
from fastlars.backends import fused_cpu
from fastlars.dtypes import real
from harness import IMPLEMENTATIONS, buffers_of, ignore_nothing_adapted, implementations, loop_over, pairs, set_grads
from reference import norm, to_array, trust_ratio

pytestmark = ignore_nothing_adapted
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PROMISE = 1e-5
# With one value everywhere, all rounding errors of a sum have the same sign for a long time. These were the worst values
# found, for a row of elements that are not adjacent and for 1e8 elements.
CONSTANT, CONSTANT_1E8 = 1.2829, 0.9963

foreach_or_not = pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


def exact_norm(tensor: Tensor) -> float:
    """For tensors too large for a float64 copy."""
    return sum(piece.double().square().sum().item() for piece in tensor.flatten().split(1 << 20)) ** 0.5


def relative_error(actual: Tensor, expected: float) -> float:
    return abs(actual.item() / expected - 1)


# ---------------------------------------------------------------- sizes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_rows_and_pieces(dtype: torch.dtype) -> None:
    sizes = [1, 2, 1023, 1024, 1025, 4095, 4096, 4097, 8191, 8192, 3 * 4096 + 7]
    sizes += [around + more for around in (1 << 20, 2 << 20) for more in (-1, 0, 1)]
    tensors = [torch.rand(size).to(dtype) for size in sizes]
    for tensor in tensors:
        tensor[-1] = 1000.0  # a tail that is left out or counted twice shows at any size
    actual = norms.norms(tensors, foreach=False)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for tensor, value in zip(tensors, actual, strict=True):
        assert relative_error(value, norm(to_array(tensor))) < PROMISE


@pytest.mark.slow
def test_1e8_elements() -> None:
    value = torch.tensor(CONSTANT_1E8)
    param = torch.nn.Parameter(torch.full((10**8,), CONSTANT_1E8))
    param.grad = torch.ones(()).expand(10**8)  # the gradient of sum(); |g| = 1e4
    expected = value.double().item() * 1e4
    ratio = LARS([param], **BASE).trust_ratios()["0.0"]
    denominator = 1e4 + BASE["weight_decay"] * expected
    assert ratio == pytest.approx(BASE["trust_coefficient"] * expected / denominator, rel=PROMISE)
    assert abs(fused_cpu._norm(param.detach()) / expected - 1) < PROMISE / 2
    half = param.detach().bfloat16()
    assert relative_error(norms.norms([half], foreach=False), half[0].item() * 1e4) < PROMISE
    # Why norms.py has its own norm. One thread, because several share the error.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert relative_error(vector_norm(param.detach()), expected) > 100 * PROMISE
    finally:
        torch.set_num_threads(threads)


def test_the_norm_of_the_fused_step() -> None:
    """Up to the number of rows that one dot product adds."""
    for size in (0, 1000, 10_007, 20_000, 65 * 4093, 65 * 4099, fused_cpu.ROWS * 1024, fused_cpu.ROWS * 1024 + 1023):
        for constant in (CONSTANT, CONSTANT_1E8, 2.0249):
            tensor = torch.full((size,), constant)
            expected = norm(to_array(tensor))
            assert abs(fused_cpu._norm(tensor) - expected) <= PROMISE / 2 * expected


@implementations
@pytest.mark.parametrize("denominator", ["separate", "joint"])
@loop_over("size", [4096, 4097, 10_007, fused_cpu.SMALL, 1 << 18, (1 << 20) + 1])
def test_norms_in_a_step(size: int, denominator: str, implementation: Options) -> None:
    """An implementation may take norms in another way. With lr = 1e6 a parameter shows its ratio to 1e-7."""
    options = {**BASE, "lr": 1e6, "trust_denominator": denominator}
    for constant in (CONSTANT, 0.6, CONSTANT_1E8):
        param = torch.nn.Parameter(torch.full((size,), constant))
        param.grad = torch.rand(size) + 0.5
        w, g = to_array(param), to_array(param.grad)
        LARS([param], **options, **implementation).step()
        moved = w - 1e6 * trust_ratio(w, g, **options) * (g + BASE["weight_decay"] * w)
        assert relative_error(param[-1].detach(), moved[-1]) < PROMISE


# ---------------------------------------------------------------- layouts
# shape of the contiguous tensor, and the view of it; all but one have more than one row of the norm
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "channels_last": ((16, 8, 9, 9), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "channels_last_3d": ((4, 8, 5, 9, 9), lambda x: x.contiguous(memory_format=torch.channels_last_3d)),
    "transposed": ((65, 130), lambda x: x.t()),
    "strided_row": ((8192,), lambda x: x[::2]),
    "strided": ((3, 8194), lambda x: x[:, ::2]),
    "columns": ((100, 130), lambda x: x[:, 3:101]),
    "offset": ((9000,), lambda x: x[3:]),
    "permuted": ((3, 4, 10, 11, 12), lambda x: x.permute(3, 0, 4, 2, 1)),
    "permuted_with_gaps": ((3, 4, 10, 11, 12), lambda x: x.permute(3, 0, 4, 2, 1)[1:, :, ::2]),
    "ones_inside": ((1, 90, 1, 91, 1), lambda x: x.transpose(1, 3)),
    "one_row_with_gaps": ((1, 1, 20000), lambda x: x[:, :, ::2]),
    # a dimension of size 1 may have any stride
    "odd_stride_of_one": ((9000,), lambda x: x.as_strided((90, 1, 100), (100, 7, 1))),
    "expanded": ((), lambda x: x.expand(70, 80)),
    "expanded_rows": ((90, 1), lambda x: x.expand(90, 91)),
    "expanded_first": ((91,), lambda x: x.expand(90, 91)),
    "large_with_gaps": ((2, 700, 1700), lambda x: x[:, :, :1601]),
    "large_expanded": ((1, 1), lambda x: x.expand(2, (1 << 20) + 3)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    shape, view = LAYOUTS[layout]
    for dtype in DTYPES:
        for values in (torch.full(shape, CONSTANT), torch.rand(shape) + 0.5):
            tensor = view(values.to(dtype))
            assert relative_error(norms.norms([tensor], foreach=False), norm(to_array(tensor))) < PROMISE, dtype
        # as the gradient of a step
        param = torch.nn.Parameter(torch.ones(tensor.shape, dtype=dtype))
        param.grad = tensor
        expected = trust_ratio(to_array(param), to_array(tensor), **BASE)
        assert LARS([param], **BASE).trust_ratios()["0.0"] == pytest.approx(expected, rel=PROMISE), dtype


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_strided_row_is_as_right_as_a_contiguous_one(dtype: torch.dtype) -> None:
    """torch adds elements that are not adjacent one by one, and is off by 8e-6 after 1024 of these."""
    for value in (0.50782, 2.0249):
        tensor = torch.full((2048,), value, dtype=dtype)[::2]
        assert relative_error(norms.norms([tensor], foreach=False), norm(to_array(tensor))) < PROMISE / 2


def test_views_that_are_negated_or_conjugated_later() -> None:
    values = torch.rand(6000, dtype=torch.complex64)
    for tensor in (values.conj(), values.conj().imag):
        actual = norms.norms([real(tensor)], foreach=False)
        assert relative_error(actual, norm(to_array(tensor))) < PROMISE


# ---------------------------------------------------------------- half types, cancellation
@implementations
@loop_over("dtype value", [(torch.float16, 300.0), (torch.bfloat16, 300.0), (torch.bfloat16, 1e15)])
@pytest.mark.parametrize("denominator", ["separate", "joint"])
def test_half_types_do_not_overflow(
    denominator: str, dtype: torch.dtype, value: float, implementation: Options
) -> None:
    """|g| is 3e5, beyond float16. In bfloat16 a running sum stops at 256 times the value added."""
    param = torch.nn.Parameter(torch.full((10**6,), 2.0, dtype=dtype))
    param.grad = torch.full_like(param, value)
    options = {**BASE, "trust_denominator": denominator}
    optimizer = LARS([param], **options, **implementation)
    expected = trust_ratio(to_array(param), to_array(param.grad), **options)
    assert optimizer.trust_ratios()["0.0"] == pytest.approx(expected, rel=PROMISE)
    optimizer.step()
    w, g = 2.0, param.grad[0].item()
    moved = w - options["lr"] * expected * (g + options["weight_decay"] * w)
    torch.testing.assert_close(param.detach(), torch.full_like(param, moved), rtol=torch.finfo(dtype).eps, atol=0.0)


@foreach_or_not
@loop_over("sign", [1.0, -1.0])
@loop_over("dtype", DTYPES[:3])
def test_joint_norm_where_gradient_and_decay_cancel(dtype: torch.dtype, sign: float, foreach: bool) -> None:
    """Computed from |g|, |w| and their dot product it would be NaN, or off by 0.6 (float32)."""
    decay = 0.05
    params = [torch.rand(size).add(0.5).to(dtype) for size in (5, 4097, 70_000)]
    grads = [(-sign * decay * w.double() * (1 + 1e-3 * torch.rand(w.shape))).to(dtype) for w in params]
    actual = norms.joint_norms(params, grads, sign, decay, foreach)
    for w, g, value in zip(params, grads, actual, strict=True):
        assert relative_error(value, norm(to_array(g) * sign + decay * to_array(w))) < 1e-4


class Elsewhere(Tensor):
    """A CPU tensor that claims not to be one."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta")


@foreach_or_not
@loop_over("dtype", DTYPES)
def test_what_runs_on_accelerators(dtype: torch.dtype, foreach: bool) -> None:
    """The values too: half types go through float32."""
    params, grads = ([(torch.rand(size) * 300).to(dtype) for size in (5, 4097, 70_000)] for _ in range(2))
    there = [[tensor.as_subclass(Elsewhere) for tensor in tensors] for tensors in (params, grads)]
    expected = [
        [norm(to_array(w)) for w in params],
        *(
            [norm(sign * to_array(g) + 0.5 * to_array(w)) for w, g in zip(params, grads, strict=True)]
            for sign in (1, -1)
        ),
    ]
    actual = [norms.norms(there[0], foreach), *(norms.joint_norms(*there, sign, 0.5, foreach) for sign in (1.0, -1.0))]
    for vector, values in zip(actual, expected, strict=True):
        assert vector.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # torch's own norm, which is less exact on CPU
        torch.testing.assert_close(
            vector.as_subclass(Tensor).double(), torch.tensor(values).double(), rtol=1e-4, atol=0.0
        )


@loop_over(
    "sizes expected",
    [
        ([1 << 23, 1 << 23], [[0, 1]]),
        ([1 << 23, (1 << 23) + 1], [[0], [1]]),
        ([1 << 25, 3, 4], [[0], [1, 2]]),
        ([3, 1 << 24, 4, 1 << 24], [[0], [1], [2], [3]]),
        ([1 << 23, 0, 1 << 22, 1 << 22, 0, 1, 5], [[0, 1, 2, 3, 4], [5, 6]]),
        ([], []),
    ],
)
def test_buckets_hold_64_mib_of_float32(sizes: list[int], expected: list[list[int]]) -> None:
    assert norms.chunks([torch.empty(size, device="meta") for size in sizes]) == expected


def test_joint_norm_over_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on accelerators, with code that also runs on CPU."""
    monkeypatch.setattr(norms, "chunks", functools.partial(norms.chunks, limit=100))
    params = [torch.rand(size) for size in (40, 40, 40, 300, 0, 100, 1)]
    grads = [torch.rand_like(w) for w in params]
    for foreach in (False, True):
        actual = norms._joint_norms_by_chunks(params, grads, 1.0, 0.05, foreach)
        expected = [norm(to_array(g) + 0.05 * to_array(w)) for w, g in zip(params, grads, strict=True)]
        torch.testing.assert_close(actual, torch.tensor(expected), rtol=PROMISE, atol=0.0)


@pytest.mark.parametrize("layout", ["plain", "two_pieces", *LAYOUTS])
def test_joint_norm_on_cpu_in_pieces(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameter and gradient each in its own layout. The pieces of both must match."""
    shape, view = LAYOUTS.get(layout, ((3, 70, 41) if layout == "plain" else (1500,), lambda x: x))
    for dtype in DTYPES[1:3]:
        param = view(torch.rand(shape).to(dtype))
        limit = 1000 if param.numel() < 1 << 17 else 1 << 17
        monkeypatch.setattr(norms._joint_row_norms, "__defaults__", (limit,))
        random = torch.rand(param.shape).to(dtype)
        for w, g in ((param, random), (random, param)):
            actual = norms.joint_norms([w], [g], -1.0, 0.5, foreach=False)
            assert relative_error(actual, norm(0.5 * to_array(w) - to_array(g))) < PROMISE, dtype


# ---------------------------------------------------------------- surroundings
@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# torch.device as a context manager is the same as torch.set_default_device, and is restored
SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}
NAMES = ["momentum-clip", "dampening", "nesterov-joint", "paper-maximize", "unadapted", "no_decay-paper"]
NAMES += ["everything", "everything_but_joint", "clip_at_one"]


def step_twice(options: Options, dtype: torch.dtype, surroundings: Callable[[], Any]) -> list[Any]:
    params = make_params(dtype, layouts=["scalar", "matrix", "strided", "vector_4097", "zeros"])
    grads = [make_grads("dense", params, step) for step in range(2)]
    with surroundings():
        optimizer = LARS(params, **options)
        for step in range(2):
            set_grads(params, grads[step])
            ratios = optimizer.trust_ratios()
            optimizer.step()
    return [ratios, *[p.detach() for p in params], *[b for b in buffers_of(optimizer) if b is not None]]


def assert_same_bits(actual: list[Any], expected: list[Any]) -> None:
    assert actual[0] == expected[0]
    for left, right in zip(actual[1:], expected[1:], strict=True):
        assert left.dtype == right.dtype and left.device == right.device and torch.equal(left, right)


@pairs("name surroundings how", NAMES, SURROUNDINGS, IMPLEMENTATIONS)
def test_same_bits_in_all_surroundings(name: str, surroundings: str, how: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.complex64):
        for lr in (OPTIONS[name]["lr"], torch.tensor(OPTIONS[name]["lr"])):
            options = {**OPTIONS[name], **IMPLEMENTATIONS[how], "lr": lr}
            plain = step_twice(options, dtype, contextlib.nullcontext)
            assert_same_bits(step_twice(options, dtype, SURROUNDINGS[surroundings]), plain)


@implementations
@loop_over("extra", [{}, {"trust_clip": True}, {"adapt": False}])
def test_whole_numbers_as_options(extra: Options, implementation: Options) -> None:
    numbers = {"lr": 1, "weight_decay": 1, "eps": 0, "trust_coefficient": 1, "momentum": 0, "dampening": 0, **extra}
    floats = {key: value if isinstance(value, bool) else float(value) for key, value in numbers.items()}
    for dtype in DTYPES:
        results = [
            step_twice({**options, **implementation}, dtype, contextlib.nullcontext) for options in (numbers, floats)
        ]
        assert_same_bits(*results)


# ---------------------------------------------------------------- grad_scale
@pairs("name dtype how", NAMES, [*DTYPES, torch.complex64], IMPLEMENTATIONS)
def test_power_of_two_as_grad_scale(name: str, dtype: torch.dtype, how: str) -> None:
    """The same bits as without a scale, except that scaled float16 gradients go through float32, not torch's SGD."""
    results = []
    torch_sgd = dtype == torch.float16 and OPTIONS[name].get("adapt") is False
    for scale in (1.0 if torch_sgd else None, 0.125, 64.0):
        params = [p.detach() for p in make_params(dtype)]
        buffers: list[Tensor | None] = [None] * len(params)
        for step in range(2):
            grads = [g * (scale or 1.0) for g in make_grads("dense", params, step)]
            grad_scale = None if scale is None else torch.full((1,), scale)
            lars(params, grads, buffers, **OPTIONS[name], **IMPLEMENTATIONS[how], grad_scale=grad_scale)
        results.append([{}, *params, *[b for b in buffers if b is not None]])
    for result in results[1:]:
        assert_same_bits(result, results[0])
