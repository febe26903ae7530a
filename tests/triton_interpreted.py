"""The Triton kernels on CPU tensors, under Triton's interpreter, equal the reference.

test_triton.py runs this file in a separate process, which imports triton with TRITON_INTERPRET=1. Chunks are small here, so
that small tensors have many.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastlars
import harness
from cases import OPTIONS, PAIRWISE, SPECIAL, kahan_tolerance, make_grads, make_params, neighbours, nonfinite
from fastlars import LARS, backends
from fastlars.backends import triton
from fastlars.backends.eager import SINGLE
from fastlars.buckets import Bucket, Group, Norms
from fastlars.compiled import joint_operator
from fastlars.options import Options
from fastlars.step import step as take_step
from harness import buffers_of, ignore_nothing_adapted, mixed_grads, set_grads
from properties import STEPS, UNSHUFFLED, Kind, assert_same_bits, bits_after, examples, kinds, options, shuffles
from reference import ReferenceLARS

pytestmark = ignore_nothing_adapted
# a chunk and one element, a masked chunk, zeros, 0-dim, empty, strides, an address between two 16-byte lines
KINDS = ["vector_1025", "matrix", "zeros", "scalar", "empty", "channels_last", "offset"]


class Interpreted(triton.Triton):
    """Use the backend for CPU tensors in every group, because torch's own SGD must not hide it."""

    served = 0

    def wants(self, params: list[Tensor], options: Options, gated: bool) -> bool:
        return True

    def update(self, bucket: Bucket, norms: Norms, gate: Tensor | None) -> None:
        self.served += len(bucket.params)
        super().update(bucket, norms, gate)


INTERPRETED = Interpreted("cpu")


class FusedLARS(LARS):
    """Counts what the kernels step, because any other backend would be right too."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    served = 0

    def step(self, closure: None = None) -> None:
        INTERPRETED.served = 0
        super().step(closure)
        self.served = INTERPRETED.served
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        assert self.served == sum(INTERPRETED.serves([p], [p.grad], []) for p in params)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "CHUNK", 1024)
    monkeypatch.setattr(triton, "BLOCK", 2)
    monkeypatch.setattr(harness, "LARS", FusedLARS)
    monkeypatch.setattr(backends, "BACKENDS", [INTERPRETED, SINGLE])
    # the interpreter converts to bfloat16 by truncation, which doubles the error of the parameter, and so of its compensation
    monkeypatch.setattr(harness, "kahan_tolerance", lambda dtype, size: 4 * kahan_tolerance(dtype, size))


SETS = [*PAIRWISE, *SPECIAL]
HALF = (torch.bfloat16, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in SETS] + [(name, HALF[i % 2]) for i, name in enumerate(SETS[::3])],
)
def test_equals_reference(name: str, dtype: torch.dtype) -> None:
    offset = SETS.index(name)
    params = make_params(dtype, layouts=KINDS)
    harness.run([{"params": params}], OPTIONS[name], lambda ps, step: mixed_grads(ps, step, offset), {}, steps=3)


def test_equals_reference_in_a_few_steps() -> None:
    for name, dtype in (("nesterov-joint", torch.float32), ("clip-paper", torch.bfloat16)):
        params = make_params(dtype, layouts=["vector_1025", "scalar", "channels_last"])
        harness.run([{"params": params}], OPTIONS[name], lambda ps, step: make_grads("late", ps, step), {}, steps=3)


def test_the_joint_norms_of_graphs_take_one_read_where_the_kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    class Counting(Interpreted):
        def measure(self, bucket: Bucket, now: bool) -> Norms:
            measured.append(len(bucket.params))
            return super().measure(bucket, now)

    monkeypatch.setattr(triton, "TRITON", Counting("cpu"))
    for dtype in (*triton.DTYPES, torch.float64):
        params = [param.detach() for param in make_params(dtype, layouts=["vector_1025", "scalar", "channels_last"])]
        grads = [torch.full_like(param, 0.3) for param in params]
        for sign in (1.0, -1.0):
            found = triton.joint_norms(params, grads, sign, 0.1)
            torch.testing.assert_close(found, joint_operator(params, grads, sign, 0.1))
            again = triton.joint_norms(params, grads, sign, 0.2)
            assert not torch.equal(found, again), "the table of the first call is not what it returned"
    assert measured == [3] * 12, "float64 is not served"


anything = st.lists(kinds(triton.DTYPES), min_size=1, max_size=4)


@pytest.mark.slow
@examples(3)
@given(anything, options())
def test_equals_reference_for_any_tensors_and_options(tensors: list[Kind], chosen: dict[str, Any]) -> None:
    params = [tensor.param() for tensor in tensors]
    harness.run([{"params": params}], chosen, lambda _, step: [tensor.grad(step) for tensor in tensors], {}, STEPS)


@pytest.mark.slow
@examples(3)
@given(anything, options(), st.data())
def test_order_groups_and_checkpoints_change_no_bit(
    tensors: list[Kind], chosen: dict[str, Any], data: st.DataObject
) -> None:
    expected = bits_after(tensors, chosen, {}, UNSHUFFLED)
    assert_same_bits(expected, bits_after(tensors, chosen, {}, data.draw(shuffles(len(tensors)))), "shuffled")


@pytest.mark.slow
def test_gradients_may_have_another_dtype() -> None:
    options = {**OPTIONS["momentum-joint"], "kahan_sum": False}
    for dtype, grad_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        params = make_params(dtype, layouts=["vector_1025", "matrix"])
        grads = [g.to(grad_dtype) for g in make_grads("dense", params, 0) if g is not None]
        reference = ReferenceLARS([{"params": params}], **options)
        buffers: list[Tensor | None] = [torch.zeros_like(p) for p in params]
        INTERPRETED.served = 0
        with torch.no_grad():
            fastlars.lars(list(params), grads, buffers, **options)
        assert INTERPRETED.served == 2
        reference.step(grads)
        optimizer = LARS(params, **options)
        for param, buffer in zip(params, buffers, strict=True):
            optimizer.state[param]["momentum_buffer"] = buffer
        harness.assert_equals(reference, optimizer, f"{dtype} with {grad_dtype}")


@pytest.mark.slow
def test_many_tensors_and_many_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [*torch.randint(1, 40, (200,), generator=generator).tolist(), 10_000]
    params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    optimizer = harness.run(
        [{"params": params}], OPTIONS["momentum"], lambda ps, step: make_grads("dense", ps, step), {}, steps=2
    )
    assert optimizer.served == 201


@pytest.mark.slow
def test_norms_are_those_of_the_whole_tensors() -> None:
    params = make_params(torch.float32, layouts=["vector_4097", "offset", "zeros"])
    grads = [g for g in make_grads("dense", params, 0) if g is not None]
    options = Options(lr=0.5, weight_decay=0.05, trust_denominator="joint", skip_nonfinite=True)
    bucket = Bucket(INTERPRETED, [0, 1, 2], list(params), grads, [], [], options, grad_scale=torch.tensor(4.0))
    norms = INTERPRETED.measure(bucket, True)
    vectors = [(p.detach(), g / 4 + 0.05 * p.detach(), g / 4) for p, g in zip(params, grads, strict=True)]
    for norm, of in zip((norms.param, norms.direction, norms.grad), zip(*vectors, strict=True), strict=True):
        assert norm is not None and norm.shape == (3,)
        torch.testing.assert_close(norm.double(), torch.stack([x.double().norm() for x in of]), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_writes_only_its_own_elements() -> None:
    params = make_params(torch.float32)
    before = [neighbours(p) for p in params]
    assert any(outside.numel() for outside in before)
    optimizer = FusedLARS(params, **OPTIONS["momentum-joint"])
    for step in range(2):
        set_grads(params, make_grads("same_strides", params, step))
        optimizer.step()
    assert optimizer.served == len(params) - 2, "all but strided and columns"
    for param, outside in zip(params, before, strict=True):
        assert torch.equal(neighbours(param), outside)


def test_offsets_are_64_bits() -> None:
    # A tensor of 2^33 elements, of which only the last chunk exists. Its address is set back by the size of its offset.
    n, chunk = 1024, 1 << 23
    w, g, v = (torch.randn(n, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = v * 0.9 + g * 0.5 + w * 0.25
    expected_w = w - 0.1 * expected
    kernels = triton._kernels()
    addresses = [x.data_ptr() - chunk * n * x.element_size() for x in (w, g, v)]
    rows = torch.tensor([*addresses, 0, (chunk + 1) * n, -chunk, 1, 0])
    row_of_chunk = torch.zeros(1, dtype=torch.int32)
    sums = torch.zeros(1, 3)
    kernels.partial_sums[(1,)](
        rows, row_of_chunk, sums, None, w, g, 0.0,
        CHUNK=n, ADAPTED=True, JOINT=False, GRAD_NORM=True, MAXIMIZE=False,
    )  # fmt: skip
    torch.testing.assert_close(sums[0, [0, 2]], torch.stack([w.square().sum(), g.square().sum()]))
    kernels.update[(1,)](
        rows, row_of_chunk, None, None, None, None, None, w, g, 0.1, 0.9, 0.5, 1.0, 0.0, 0.5,
        CHUNK=n, ADAPTED=False, JOINT=False, CLIP=False, DECAYS=True, MOMENTUM=True, NESTEROV=False, LR_IN_MOMENTUM=False,
        MAXIMIZE=False, KAHAN=False,
    )  # fmt: skip
    torch.testing.assert_close(v, expected)
    torch.testing.assert_close(w, expected_w)


class OtherHalf:
    """Stands in for `sharding.Sharded`: another rank holds the second half of each tensor, and may have a reason to skip."""

    def __init__(self, params: list[Tensor], grads: list[Tensor], options: Options, skips: bool) -> None:
        directions = [g + options.weight_decay * p for p, g in zip(params, grads, strict=True)]
        vectors = (params, directions if options.trust_denominator == "joint" else grads)
        self.norms = [torch.stack([x.norm() for x in tensors]) for tensors in vectors]
        self.skips = torch.tensor(skips)

    def local(self, group: Group) -> Group:
        return group

    def exchange(
        self, buckets: list[Bucket], measured: list[Norms], _: None, nonfinite: Tensor | None
    ) -> tuple[list[Norms], None, Tensor]:
        self.nonfinite = nonfinite  # what the other ranks get
        (known,) = measured
        assert known.param is not None and known.direction is not None
        both = [known.param.hypot(self.norms[0]), known.direction.hypot(self.norms[1])]
        # columns of an exchange, which is float64 if one of the tensors is
        param, direction = torch.stack(both, dim=1).double().unbind(dim=1)
        return (
            [known._replace(param=param, direction=direction)],
            None,
            self.skips if nonfinite is None else self.skips | nonfinite,
        )

    def finish(self, groups: list[Group], stepped: list[Group]) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("scale", [None, 8.0])
@pytest.mark.parametrize("name", ["dampening", "nesterov-joint", "clip-paper", "skip_nonfinite"])
def test_parts_of_sharded_tensors_take_the_norms_of_the_whole(name: str, scale: float | None) -> None:
    options = Options(**OPTIONS[name])
    grad_scale = None if scale is None else torch.tensor(scale)
    wholes = [torch.randn(2100, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    reference = ReferenceLARS([{"params": wholes[:2]}], **OPTIONS[name])
    mine, others = zip(*(w.chunk(2) for w in wholes), strict=True)
    params = [w.clone() for w in mine[:2]]
    grads = [g * (scale or 1.0) for g in mine[2:]]
    group = Group(params, grads, [None, None], [], options)
    INTERPRETED.served = 0
    for reason in ("none", "none", "there", "here") if options.skip_nonfinite else ("none", "none"):
        others_now = [torch.as_tensor(whole, dtype=torch.float32)[1050:] for whole in reference.params]
        shards: Any = OtherHalf(others_now, list(others[2:]), options, reason == "there")
        if reason == "here":
            grads[1][-1] = float("nan")
        before = [p.clone() for p in params]
        take_step([group], grad_scale, None, shards)
        assert (shards.nonfinite is not None and bool(shards.nonfinite)) == (reason == "here")
        if reason == "none":
            reference.step(wholes[2:])
            for param, whole in zip(params, reference.params, strict=True):
                torch.testing.assert_close(param.double(), torch.as_tensor(whole)[:1050], rtol=1e-5, atol=1e-6)
        else:
            assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True)), reason
    assert INTERPRETED.served == (8 if options.skip_nonfinite else 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skip_nonfinite", "everything", "everything_but_joint"])
def test_skip_nonfinite_leaves_its_groups_alone(name: str) -> None:
    groups = [
        {"params": make_params(torch.float32, layouts=["matrix", "empty", "conv"], seed=1)},
        {"params": make_params(torch.bfloat16, layouts=["scalar"], seed=2), "adapt": False, "lr_in_momentum": False},
        {"params": make_params(torch.float32, layouts=["matrix", "scalar"], seed=3), "skip_nonfinite": False},
        # not one of our kernels: what it finds stops them, and the other way round
        {"params": make_params(torch.float64, layouts=["matrix"], seed=4)},
    ]
    options = {"momentum": 0.9, **OPTIONS[name], "skip_nonfinite": True}
    optimizer = harness.run(groups, options, lambda ps, step: [nonfinite(p, step, i) for i, p in enumerate(ps)], {})
    params = [p for i in (0, 1, 3) for p in optimizer.param_groups[i]["params"]]
    before = [p.detach().clone() for p in params]
    # what one group finds stops the others, in any order
    for bad in range(len(params)):
        everything = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [torch.ones_like(p) for p in everything]
        if not params[bad].numel():
            continue
        next(g for g, p in zip(grads, everything, strict=True) if p is params[bad]).view(-1)[-1] = float("nan")
        set_grads(everything, grads)
        optimizer.step()
        for param, old in zip(params, before, strict=True):
            assert torch.equal(param, old)
    # a group that does not ask stops no other
    grads = [torch.ones_like(p) for p in everything]
    next(g for g, p in zip(grads, everything, strict=True) if p is optimizer.param_groups[2]["params"][0]).fill_(
        torch.nan
    )
    set_grads(everything, grads)
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True) if p.numel())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["momentum", "nesterov-joint", "unadapted", "clip-paper", "maximize"])
def test_grad_scale_and_found_inf(name: str) -> None:
    params = make_params(torch.float32, layouts=KINDS)
    optimizer = FusedLARS(params, **OPTIONS[name])
    reference = ReferenceLARS([{"params": params}], **OPTIONS[name])
    optimizer.grad_scale = torch.tensor([1024.0])
    for step, found_inf in enumerate((torch.tensor([1.0]), torch.tensor(False), torch.tensor(0.0))):
        optimizer.found_inf = found_inf
        grads = [None if g is None else g * 1024 for g in make_grads("dense", params, step)]
        if found_inf:
            grads[0] = torch.full_like(params[0], float("inf"))
        set_grads(params, grads)
        reference.step(grads, grad_scale=1024.0, found_inf=found_inf)
        optimizer.step()
        harness.assert_equals(reference, optimizer, f"{name}, step {step}")
        reference.realign(params, harness.started(reference, buffers_of(optimizer)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scale"),
    [
        *[(name, 2.0**100) for name in ("momentum", "unadapted", "everything")],
        *[(name, 2.0**10) for name in ("nesterov-joint", "clip-paper")],
    ],
)
def test_a_power_of_two_as_grad_scale_changes_no_bit(name: str, scale: float) -> None:
    """Not even if the squares of the scaled gradients overflow."""
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for grad_scale in (None, torch.tensor(scale)):
            params = make_params(dtype, layouts=KINDS)
            optimizer = FusedLARS(params, **OPTIONS[name])
            optimizer.grad_scale, optimizer.found_inf = grad_scale, torch.tensor(0.0)
            for step in range(2):
                set_grads(
                    params, [g * (1.0 if grad_scale is None else scale) for g in make_grads("dense", params, step)]
                )
                optimizer.step()
            assert optimizer.served == len(params)
            results.append([*params, *(buffer for buffer in buffers_of(optimizer) if buffer is not None)])
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["momentum", "clip-paper"])
def test_a_tensor_lr_counts_as_a_float(name: str) -> None:
    results: list[list[Tensor]] = []
    for lr in (0.3, torch.tensor(0.3), torch.tensor([0.3], dtype=torch.float64)):
        params = make_params(torch.float32, layouts=KINDS)
        optimizer = FusedLARS(params, **{**OPTIONS[name], "lr": lr})
        for step in range(2):
            set_grads(params, make_grads("dense", params, step))
            optimizer.step()
        results.append([p.detach().clone() for p in params])
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # the interpreter takes a float in double precision


def test_joint_norm_of_zero_keeps_the_decay() -> None:
    param = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = FusedLARS([param], lr=1.0, weight_decay=0.5, trust_denominator="joint")
    set_grads([param], [torch.tensor([-1.5, -2.0])])
    optimizer.step()
    assert param.tolist() == [3.0, 4.0]


@pytest.mark.slow
def test_side_effects() -> None:
    params = make_params(torch.float32, layouts=KINDS)
    grads = make_grads("dense", params, 0)
    copies = [g.clone() for g in grads if g is not None]
    optimizer = FusedLARS(params, **OPTIONS["momentum"])
    versions, grad_versions = [p._version for p in params], [g._version for g in grads if g is not None]
    set_grads(params, grads)
    optimizer.step()
    assert optimizer.served == len(params)
    for i, param in enumerate(params):
        buffer = buffers_of(optimizer)[i]
        assert param._version > versions[i] and buffer is not None and buffer._version > 0
        assert torch.equal(param.grad, copies[i]) and param.grad._version == grad_versions[i]
    # as checkpoint libraries do
    params = make_params(torch.float32, layouts=KINDS)
    before = [p.detach().clone() for p in params]
    optimizer = FusedLARS(params, **{**OPTIONS["momentum"], "lr": 0.0})
    set_grads(params, make_grads("zero", params, 0))
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert not any(buffer.any() for buffer in buffers_of(optimizer) if buffer is not None)
