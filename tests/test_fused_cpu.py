"""The fused CPU step is exact for every tensor. Tensors that torch's kernel computes wrong take another path."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cases import MEMORY, OPTIONS, PAIRWISE, SPECIAL, Options, Subclass, make_grads, tolerance
from fastlars import LARS, lars
from fastlars.backends import FUSED_CPU, eager, fused_cpu, split, wanted
from fastlars.buckets import Bucket, Group, Norms
from fastlars.options import Options as AllOptions
from harness import ignore_nothing_adapted, loop_over, run, set_grads, stacked
from reference import ReferenceLARS

pytestmark = ignore_nothing_adapted

SERVED = {("contiguous", "contiguous"), ("contiguous", "offset"), ("offset", "contiguous"), ("offset", "offset")}
SERVED |= {("transposed", "transposed")}

# param, grad, buffer; only gradients come as negative views, and test_exactness.py has mixed dtypes
FLOAT32 = [name for name in MEMORY if name not in ("float64", "bfloat16")]
TRIPLES = [x for x in itertools.product(FLOAT32, repeat=3) if "negative" not in (x[0], x[2])]
TRIPLES += [("float64",) * 3, ("bfloat16",) * 3]


def serves(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor] | None = None) -> bool:
    return FUSED_CPU.serves(params, grads, buffers or [])


@pytest.mark.parametrize("param", MEMORY)
def test_truth_table_of_serves(param: str) -> None:
    plain = torch.randn(3)
    for other in MEMORY:
        p, x = MEMORY[param](torch.randn(4, 6)), MEMORY[other](torch.randn(4, 6))
        expected = (param, other) in SERVED
        assert serves([p], [x]) == expected, other
        assert serves([p], [p], [x]) == expected, other
        assert serves([p], [x], [p]) == expected, other
        # one tensor decides for the whole list
        assert serves([plain, p], [plain, x], [plain, p]) == expected, other
        assert serves([p, plain], [x, plain], [p, plain]) == expected, other


def test_serves_only_equal_sizes() -> None:
    p, longer = torch.randn(4, 6), torch.randn(5, 6)
    assert not serves([p], [longer]) and not serves([longer], [p])
    assert not serves([p], [p], [longer]) and not serves([p], [p], [longer.view(6, 5)[:4]])


def test_serves_no_expanded_tensor_and_no_subclass() -> None:
    p = torch.randn(4, 6)
    expanded, subclass = torch.randn(4, 1).expand(4, 6), p.as_subclass(Subclass)
    assert not serves([p], [expanded], [p]) and not serves([expanded], [expanded], [expanded])
    assert not serves([subclass], [p], [p]) and not serves([p], [subclass], [p])
    assert serves([torch.nn.Parameter(p)], [p], [p])


def test_serves_the_cpu_only() -> None:
    assert not serves([torch.empty(4, 6, device="meta")], [torch.empty(4, 6, device="meta")])


def test_serves_no_view_with_a_sign_bit_even_of_one_element() -> None:
    """It is contiguous."""
    p, negative = torch.randn(1), torch.tensor([1.0 + 2.0j]).conj().imag
    assert negative.is_neg() and negative.is_contiguous()
    assert not serves([p], [negative]) and not serves([p], [p], [negative])


def test_dimensions_of_size_1_have_no_layout() -> None:
    p = torch.randn(8, 3, 1, 1)
    channels_last = p.clone(memory_format=torch.channels_last).as_strided(p.shape, (3, 1, 3, 3))
    assert serves([p], [channels_last], [p])
    transposed = [torch.randn(24).as_strided((4, 1, 6), (1, stride, 4)) for stride in (1, 4, 99)]
    for one, other in itertools.permutations(transposed, 2):
        assert serves([one], [other], [one]) and not serves([one], [other.contiguous()])


LAYOUT_OPTIONS = ["momentum", "joint", "nesterov", "base", "everything", "momentum-unadapted", "nesterov-joint"]


@pytest.mark.parametrize("name", LAYOUT_OPTIONS)
def test_every_layout_of_param_grad_and_buffer(name: str) -> None:
    """Each with one of the option sets, because only layouts decide who serves a tensor."""
    for layouts in TRIPLES[LAYOUT_OPTIONS.index(name) :: len(LAYOUT_OPTIONS)]:
        one_step(layouts, OPTIONS[name])


def one_step(layouts: tuple[str, str, str], options: Options) -> None:
    generator = torch.Generator().manual_seed(0)
    p, g, v = (MEMORY[x](torch.randn(4, 6, generator=generator)) for x in layouts)
    reference = ReferenceLARS([{"params": [p]}], **options)
    reference.realign([p], [v])
    reference.step([g])
    before = g.clone()
    lars([p], [g], [v], fused=True, **options)
    wide = torch.float64
    what = "-".join(layouts)
    pairs = [(p, reference.params[0], reference.param_sizes[0])]
    if "momentum" in options:
        pairs.append((v, reference.momentum_buffers[0], reference.buffer_sizes[0]))
    for actual, expected, size in pairs:
        torch.testing.assert_close(
            actual.to(wide),
            torch.as_tensor(expected),
            msg=lambda text: f"{what}: {text}",
            **tolerance(actual.dtype, size),
        )
    assert torch.equal(g, before), what


@pytest.fixture
def tiny_limits() -> Iterator[None]:
    """Limits so small that small tensors go through every loop: stacks, blocks, and their remainders."""
    with stacked(up_to=16, at_once=50):
        yield


@pytest.mark.parametrize("name", [*PAIRWISE, *SPECIAL])
def test_equals_reference_through_every_loop(name: str, tiny_limits: None) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 4), (16,), (2, 3), (2, 3), (200,), (100,), (129,), (7, 5, 3), (1000,), *[(3, 5)] * 7, (64,), (0,)]
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    channels_last = torch.randn(4, 8, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    params.append(torch.nn.Parameter(channels_last))
    run([{"params": params}], OPTIONS[name], lambda ps, step: make_grads("missing", ps, step), {"fused": True})


@pytest.mark.parametrize("name", ["momentum-joint", "clip", "nesterov"])
def test_equals_reference_at_real_sizes(name: str) -> None:
    """Past every real limit, with and without a remainder."""
    generator = torch.Generator().manual_seed(0)
    sizes = [fused_cpu.SMALL, fused_cpu.SMALL + 1, fused_cpu.STACK + 3, 5 * fused_cpu.STACK]
    params = [torch.nn.Parameter(torch.rand(size, generator=generator)) for size in sizes]
    run([{"params": params}], OPTIONS[name], lambda ps, step: make_grads("dense", ps, step), {"fused": True}, 2)


@pytest.mark.parametrize("name", ["momentum", "nesterov-joint", "base"])
@pytest.mark.parametrize("size", [40, 40_000], ids=["stacked", "alone"])
def test_parts_of_a_tensor_step_by_the_norms_of_the_whole(size: int, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    whole, grad = (torch.randn(size, generator=generator) for _ in range(2))
    options = OPTIONS[name]
    reference = ReferenceLARS([{"params": [whole]}], **options)
    reference.step([grad])
    decay = options["weight_decay"] if options.get("trust_denominator") == "joint" else 0.0
    lengths = [float(x.double().norm()) for x in (whole, grad.double() + decay * whole.double())]
    parts, grads = (list(x.clone().split(size // 2)) for x in (whole, grad))
    buffers: list[Tensor | None] = [None, None] if options.get("momentum") else []
    norms = Norms(*(torch.tensor([length] * 2) for length in lengths))
    plan = FUSED_CPU.plan(parts)
    bucket = Bucket(FUSED_CPU, [0, 1], parts, grads, buffers, [], AllOptions(**options), bool(buffers), plan=plan)
    FUSED_CPU.measure(bucket, now=False)  # makes the buffers
    FUSED_CPU.update(bucket, norms, None)
    expected = torch.as_tensor(reference.params[0]).float()
    torch.testing.assert_close(torch.cat(parts), expected, **tolerance(torch.float32, reference.param_sizes[0]))


@pytest.mark.parametrize(
    ("shapes", "option", "calls"),
    [
        ([(32, 32)] * 200 + [(64,)] * 50, {}, 1),
        ([(64, 64)] * 64, {}, 1),  # a workspace that is full to the last element
        ([(64, 64)] * 64, {"nesterov": True, "momentum": 0.9}, 1),
        ([(64, 64)] * 65, {}, 2),
        ([(32, 32)] * 300, {}, 2),
        ([(64,)] + [(64, 64)] * 64, {}, 2),
        ([(128, 97)] * 5, {}, 5),  # too large
        ([(10_007,)] * 5, {}, 5),  # cannot be divided into rows
        ([(96, 128)] * 21, {}, 1),
        ([(1 << 20,)], {}, 1),
        ([(1 << 20,)], {"momentum": 0.9}, 1),
        ([(1 << 20,)], {"momentum": 0.9, "nesterov": True}, 4),
        ([(5,), (0,), (1 << 14,)], {}, 3),
        ([(1,), (), (1,)], {}, 1),
    ],
    ids=str,
)
def test_a_step_takes_few_calls(
    shapes: list[tuple[int, ...]], option: Options, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small tensors together, up to what fits in cache; others alone, and in blocks only if necessary."""
    params = [torch.ones(shape) for shape in shapes]
    kernel, sizes = torch._fused_sgd_, []

    def counted(params: list[Tensor], *args: object, **kwargs: object) -> None:
        sizes.append(sum(p.numel() for p in params))
        kernel(params, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "_fused_sgd_", counted)
    lars(
        params, [torch.ones_like(p) for p in params], [None] * len(params), 0.5, weight_decay=0.1, fused=True, **option
    )
    assert len(sizes) == calls and sum(sizes) == sum(p.numel() for p in params)


@loop_over("scale", [1e-15, 1e-11, 1e-9, 1e-4, 1e6])
def test_any_size_of_the_trust_ratio(scale: float) -> None:
    """dampening = 1 - b loses digits of a small b."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=generator) for size in (20_000, 20)]
    grads = [torch.randn(size, generator=generator) for size in (20_000, 20)]
    options: Options = {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": scale}
    reference = ReferenceLARS([{"params": params}], **options)
    reference.step(grads)
    buffers: list[Tensor | None] = [None, None]
    lars(params, grads, buffers, fused=True, **options)
    # relative to the size of the buffer, which is far below other tests' tolerances at such ratios
    for actual, expected in zip(buffers, reference.momentum_buffers, strict=True):
        assert actual is not None
        wanted = torch.as_tensor(expected)
        assert (actual.double() - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("trust_coefficient", [1e-2, 1e-5])
@pytest.mark.parametrize("size", [20, 20_000], ids=["stacked", "alone"])
def test_a_power_of_two_on_a_gradient_changes_no_bit(size: int, trust_coefficient: float) -> None:
    """The kernel takes 1 - b in double precision. Of a small b it would keep more digits the larger the ratio is."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        param, grad = (torch.randn(size, generator=generator) for _ in range(2))
        results = []
        for scale in (1.0, 2.0**-8, 2.0**8):
            w, v = param.clone(), torch.full_like(param, trust_coefficient)
            lars(
                [w], [grad * scale], [v], 1.0, 0.9, trust_coefficient=trust_coefficient, eps=0.0, adapt=True, fused=True
            )
            results.append(torch.cat([w, v]))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]), seed


@pytest.mark.parametrize("name", ["momentum", "base", "nesterov", "joint", "momentum-unadapted"])
@loop_over("size", [10, 20_000])
def test_version_counters_move(name: str, size: int) -> None:
    param = torch.nn.Parameter(torch.randn(size))
    optimizer = LARS([param], fused=True, **OPTIONS[name])
    (param**2).sum().backward()
    stale = (param**2).sum()  # autograd saves the current parameter
    versions = []
    for _ in range(2):
        buffer = optimizer.state[param].get("momentum_buffer") if param in optimizer.state else None
        versions.append((param._version, 0 if buffer is None else buffer._version))
        optimizer.step()
    versions.append((param._version, 0 if buffer is None else buffer._version))
    assert versions[0][0] < versions[1][0] < versions[2][0]
    assert buffer is None or versions[1][1] < versions[2][1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@pytest.mark.parametrize("name", ["momentum", "joint", "nesterov", "base", "clip-paper", "dampening"])
def test_regrouping_and_permuting_changes_no_bit(name: str) -> None:
    """A small tensor is computed in a stack, whether or not others have its shape, in any order."""
    shapes = [(3, 5), (64,), (5000,), (12_289,), (3, 5), (10, 10, 10), (64,), (3, 5), (20000,)]

    def states(order: list[int], per_group: int) -> dict[int, Tensor]:
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        groups = [order[i : i + per_group] for i in range(0, len(order), per_group)]
        optimizer = LARS([{"params": [params[i] for i in group]} for group in groups], fused=True, **OPTIONS[name])
        for step in range(3):
            set_grads(params, make_grads("dense", params, step))
            optimizer.step()
        return dict(enumerate(p.detach() for p in params))

    expected = states(list(range(9)), 9)
    for order, per_group in [([7, 3, 1, 0, 8, 2, 6, 5, 4], 9), (list(range(9)), 1), ([6, 5, 4, 3, 2, 1, 0, 7, 8], 3)]:
        for i, param in states(order, per_group).items():
            assert torch.equal(param, expected[i]), (order, per_group, shapes[i])


def test_is_the_default_on_cpu_and_only_there() -> None:
    param = torch.nn.Parameter(torch.randn(4))
    assert "fused" in repr(LARS([param], lr=1.0, weight_decay=0.1))
    for options in ({"foreach": False}, {"fused": False}, {"differentiable": True}):
        assert "adapted, single" in repr(LARS([param], lr=1.0, weight_decay=0.1, **options))
    assert "foreach" in repr(LARS([param], lr=1.0, weight_decay=0.1, foreach=True))
    # torch's SGD is fused only on request
    assert "not adapted, single" in repr(LARS([param], lr=1.0))
    assert "not adapted, fused" in repr(LARS([param], lr=1.0, fused=True))


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_trust_ratios_with_every_implementation(options: Options) -> None:
    """The fused step measures during the update. trust_ratios() before it must measure by itself."""
    params = [torch.nn.Parameter(torch.tensor([3.0, 4.0])), torch.nn.Parameter(torch.ones(20_000))]
    params[0].grad = torch.tensor([0.0, 2.0])
    optimizer = LARS([("a", params[0]), ("b", params[1])], lr=1.0, trust_coefficient=0.1, adapt=True, **options)
    assert optimizer.trust_ratios() == {"a": pytest.approx(0.25)}


def test_a_group_over_several_devices_is_not_fused_by_default() -> None:
    """Its tensors on accelerators would take kernels that nobody requested."""
    params = [torch.nn.Parameter(torch.ones(4, device=device)) for device in ("cpu", "meta")]
    assert "adapted, single" in repr(LARS(params, lr=1.0, weight_decay=0.1))


def test_a_list_that_is_one_bucket_is_not_sorted() -> None:
    """Sorting takes as long as the step of small tensors."""
    params, others = [[torch.ones(4), torch.ones(2, 3)] for _ in range(2)]
    for momentum, buffers in (
        (0.9, [None, None]),
        (0.9, others),
        (0.0, [None, None]),
        (0.0, []),
        (0.0, [others[1], None]),
    ):
        options = AllOptions(1.0, momentum, weight_decay=0.1)
        (bucket,) = split(Group(params, params, list(buffers), [], options))
        assert bucket.backend is FUSED_CPU and bucket.params is params and bucket.indices == [0, 1]
        assert bucket.momentum_buffers == (list(buffers) if momentum else [])
    late = split(Group(params, params, [others[0], None], [], AllOptions(1.0, 0.9, weight_decay=0.1)))
    assert [(bucket.backend.name, bucket.indices) for bucket in late] == [("fused", [0]), ("fused", [1])]


def test_foreach_is_the_default_if_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "default_foreach", lambda params: params[0].device.type == "meta")
    meta, cpu = [torch.ones(4, device="meta")], [torch.ones(4)]
    for adapt in (True, False):
        options = AllOptions(1.0, adapt=adapt)
        assert wanted(meta, options)[0].name == "foreach"
        assert wanted(cpu, options)[0].name == ("fused" if adapt else "single")
        for chosen in ({"foreach": False}, {"fused": False}, {"differentiable": True}):
            assert wanted(meta, options._replace(**chosen))[0].name == "single"
        assert wanted(cpu, options._replace(foreach=True))[0].name == "foreach"
