"""Faults around a step: processes that die, errors inside a step, numbers at the ends of their range, 64-bit indices."""

import contextlib
import copy
import itertools
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fastlars
import pages
from cases import BASE, OPTIONS, Options, make_grads, make_params, pairwise
from fastlars import LARS, norms
from fastlars.backends import eager, fused_cpu, layouts, triton
from harness import IMPLEMENTATIONS, buffers_of, ignore_nothing_adapted, implementations, loop_over, run, set_grads

pytestmark = ignore_nothing_adapted
INF, NAN = float("inf"), float("nan")


# ---------------------------------------------------------------- kill -9 while a checkpoint is written
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_a_run_survives_kill_9_during_a_write(tmp_path: Path) -> None:
    """The page's own program is killed repeatedly and ends with the bits of an undisturbed run."""
    program = tmp_path / "train.py"
    program.write_text(pages.examples(pages.ROOT / "docs" / "checkpoints.md", "python"), encoding="utf-8")
    source = Path(fastlars.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}

    # Die inside torch.save, after some of the bytes, so that every write leaves a torn file.
    dying = tmp_path / "dying.py"
    dying.write_text(
        "import os, runpy, signal, sys, torch\n"
        "save, survived = torch.save, [int(sys.argv[1])]\n"
        "def torn(obj, file):\n"
        "    save(obj, file)\n"
        "    survived[0] -= 1\n"
        "    if survived[0] < 0:\n"
        "        with open(file, 'r+b') as half:\n"
        "            half.truncate(os.path.getsize(file) // 2)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = torn\n"
        f"runpy.run_path({str(program)!r})\n",
        encoding="utf-8",
    )

    def killed_after(writes: int) -> None:
        command = [sys.executable, str(dying), str(writes)]
        process = subprocess.run(command, cwd=folders[1], env=environment, capture_output=True, text=True, check=False)
        assert process.returncode == -signal.SIGKILL, process.stderr

    folders = [tmp_path / "undisturbed", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    for writes in (0, 3):
        killed_after(writes)
    for folder in folders:
        with contextlib.chdir(folder), torch.random.fork_rng():
            runpy.run_path(str(program))
    ends = [torch.load(folder / "run.pt", weights_only=True) for folder in folders]
    assert ends[0]["step"] == ends[1]["step"] > 3
    for a, b in zip(*(leaves(end) for end in ends), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def leaves(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)


# ---------------------------------------------------------------- errors in a step
def fails(*_: object, **__: object) -> Any:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def disturbed(options: Options) -> tuple[LARS, list[Parameter]]:
    """Two groups with state, and a tensor that has had no gradient yet."""
    params = make_params(torch.float32, layouts=["matrix", "conv", "vector", "strided", "vector_4097"])
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = LARS(groups, **{**BASE, "momentum": 0.9, **options})
    for step in range(2):
        grads = make_grads("dense", params, step)
        set_grads(params, [*grads[:-1], None if step == 0 else grads[-1]])
        if step == 0:
            optimizer.step()
    return optimizer, params


def everything(optimizer: LARS, params: list[Parameter]) -> list[Any]:
    tensors = [t for p in params for t in (p, p.grad)] + buffers_of(optimizer)
    return [None if t is None else t.detach().clone() for t in tensors]


def changes_nothing(optimizer: LARS, params: list[Parameter], error: type[Exception]) -> None:
    """No value changes. A momentum buffer may have been created, with zeros."""
    before = everything(optimizer, params)
    with pytest.raises(error):
        optimizer.step()
    for old, new in zip(before, everything(optimizer, params), strict=True):
        if old is None:
            assert new is None or not new.any()
        else:
            assert torch.equal(old, new)


@implementations
@pytest.mark.parametrize("name", ["norms", "joint_norms"])
def test_no_memory_for_the_norms(name: str, implementation: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    joint = name == "joint_norms"
    chosen = {"trust_denominator": "joint" if joint else "separate", "skip_nonfinite": not joint}
    # strided tensors of a fused step take the single path; the failing norms are theirs, or those of skip_nonfinite
    optimizer, params = disturbed({**chosen, **implementation})
    twin = copy.deepcopy(optimizer)
    set_grads([p for group in twin.param_groups for p in group["params"]], [p.grad for p in params])
    with monkeypatch.context() as patch:
        for module in (eager, fused_cpu):
            patch.setattr(module, name, fails, raising=module is eager)
        changes_nothing(optimizer, params, RuntimeError)
    for each in (optimizer, twin):
        each.step()
    # not bit for bit, because deepcopy makes strided tensors dense, and the fused step treats those differently
    torch.testing.assert_close(*([p for group in o.param_groups for p in group["params"]] for o in (optimizer, twin)))


@implementations
def test_no_memory_for_a_new_momentum_buffer(implementation: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = disturbed(implementation)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros_like", fails)
        changes_nothing(optimizer, params, RuntimeError)
    optimizer.step()


def test_no_memory_in_the_fused_step_before_its_first_tensor_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """It measures and updates tensor by tensor, small ones first and together."""
    for sizes, failing in (([20_000], "_norm"), ([20, 20, 20_000], "vector_norm"), ([20, 20_000], "coefficients")):
        params = [Parameter(torch.randn(size)) for size in sizes]
        optimizer = LARS(params, **BASE, momentum=0.9, fused=True)
        set_grads(params, [torch.ones_like(p) for p in params])
        with monkeypatch.context() as patch:
            patch.setattr(fused_cpu, failing, fails)
            changes_nothing(optimizer, params, RuntimeError)
        optimizer.step()


@implementations
def test_sparse_gradients(implementation: Options) -> None:
    optimizer, params = disturbed(implementation)
    fresh = Parameter(torch.ones(3, 4))
    optimizer.add_param_group({"params": [fresh]})
    fresh.grad = fresh.detach().to_sparse()
    changes_nothing(optimizer, params, RuntimeError)
    assert fresh not in optimizer.state


@implementations
@loop_over("skip_nonfinite", [False, True])
def test_a_gradient_on_another_device(skip_nonfinite: bool, implementation: Options) -> None:
    """torch refuses it as .grad. The functional form finds it while it measures."""
    options = {**BASE, "momentum": 0.9, "skip_nonfinite": skip_nonfinite, **implementation}
    params = [torch.ones(20), torch.ones(3, 4), torch.ones(20_000)]
    for bad in range(3):
        grads = [torch.ones_like(p) for p in params]
        grads[bad] = grads[bad].to("meta")
        buffers: list[Tensor | None] = [torch.ones_like(p) for p in params]
        with pytest.raises((RuntimeError, NotImplementedError)):
            fastlars.lars(params, grads, buffers, **options)
        assert all(p.eq(1).all() for p in params) and all(b is not None and b.eq(1).all() for b in buffers)


# ---------------------------------------------------------------- NaN and inf
@loop_over(
    "name of value how",
    pairwise(
        ["momentum", "joint", "nesterov", "clip", "unadapted", "paper"],
        ["gradient", "weight"],
        [NAN, INF, -INF],
        IMPLEMENTATIONS,
    ),
)
def test_nan_and_inf_stay_in_their_tensor(name: str, of: str, value: float, how: str) -> None:
    """NaN or inf shows in that tensor, whichever way it is computed, and its neighbours step as if it were not there."""
    sizes = [(20,), (20,), (20_000,), (3, 4), (3, 4)]
    results = []
    for bad in (None, 0, 2, 3):
        generator = torch.Generator().manual_seed(0)
        params = [Parameter(torch.randn(size, generator=generator)) for size in sizes]
        grads = [torch.randn(size, generator=generator) for size in sizes]
        if bad is not None:
            target = grads[bad] if of == "gradient" else params[bad].data
            target.view(-1)[0] = value
        optimizer = LARS(params, **OPTIONS[name], **IMPLEMENTATIONS[how])
        set_grads(params, grads)
        optimizer.step()
        results.append(params)
        for i, (param, expected) in enumerate(zip(params, results[0], strict=True)):
            if i == bad:
                assert not param.isfinite().all()
            else:
                assert torch.equal(param, expected), i


@implementations
@loop_over("size", [20, 20_000])
@loop_over("momentum", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_without_decay_no_weight_enters_the_step(momentum: Options, size: int, implementation: Options) -> None:
    """0 * inf would be NaN. An inf stays inf, and an infinite ratio moves by inf."""
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(size, generator=generator) for _ in range(2))
    weight[0] = INF
    options: Options = {"lr": 0.5, "lr_in_momentum": True, **momentum, **implementation}  # torch's SGD fails the second
    param = Parameter(weight.clone())
    optimizer = LARS([param], **options, adapt=False)
    set_grads([param], [grad])
    optimizer.step()
    torch.testing.assert_close(param.detach(), weight - 0.5 * grad * (1.9 if "nesterov" in momentum else 1.0))
    param = Parameter(torch.full((size,), 1e30))
    optimizer = LARS([param], **options, adapt=True, trust_denominator="joint")
    set_grads([param], [grad])
    optimizer.step()
    assert torch.equal(param, -INF * grad.sign())


@loop_over("value", [NAN, INF, -1.0])
@implementations
def test_an_invalid_lr_is_refused_at_once(value: float, implementation: Options) -> None:
    param = Parameter(torch.ones(3))
    for lr in (value, torch.tensor(value)):
        with pytest.raises(ValueError, match="lr must be a finite number >= 0"):
            LARS([param], lr=lr, **implementation)
    # a schedule may write it later without a check, and it shows in the weights
    optimizer = LARS([param], **{**BASE, "momentum": 0.9}, **implementation)
    param.grad = torch.ones(3)
    optimizer.param_groups[0]["lr"] = NAN
    optimizer.step()
    assert param.isnan().all()


# ---------------------------------------------------------------- the ends of the range
@implementations
@pytest.mark.parametrize("name", ["momentum", "joint", "base", "nesterov-paper"])
def test_norms_from_1e_minus_15_to_1e15(name: str, implementation: Options) -> None:
    for size in (3, 20_000):
        for w_scale, g_scale in itertools.product([1e-15, 1.0, 1e15], repeat=2):
            generator = torch.Generator().manual_seed(0)
            params = [Parameter(torch.randn(size, generator=generator) * w_scale)]
            run(
                [{"params": params}],
                {**OPTIONS[name], "eps": 0.0},
                lambda ps, step, by=g_scale: [g * by for g in make_grads("dense", ps, step) if g is not None],
                implementation,
                steps=3,
            )


@implementations
@loop_over("size", [3, 20_000])
@loop_over("denominator", ["separate", "joint"])
def test_float32_squares_that_underflow_make_a_norm_of_zero(
    size: int, denominator: str, implementation: Options
) -> None:
    """Gradients and weights of 1e-30: the tensor takes the plain gradient. In float64 they are ordinary numbers."""
    options: Options = {"lr": 1.0, "weight_decay": 0.0, "adapt": True, "trust_denominator": denominator, "eps": 0.0}
    for dtype, w_scale, g_scale in itertools.product((torch.float32, torch.float64), (1e-30, 1.0), (1e-30, 1e-40, 1.0)):
        if w_scale == g_scale == 1.0:
            continue
        param = Parameter(torch.full((size,), w_scale, dtype=dtype))
        grad = torch.full((size,), g_scale, dtype=dtype)
        optimizer = LARS([param], **options, **implementation)
        before = param.detach().clone()
        set_grads([param], [grad])
        optimizer.step()
        step_length = 1.0 if dtype == torch.float32 else 0.001 * w_scale / g_scale
        torch.testing.assert_close(param.detach(), before - grad * step_length, rtol=1e-6, atol=1e-45)


@implementations
@loop_over("size", [3, 20_000])
def test_float32_squares_that_overflow_make_a_norm_of_inf(size: int, implementation: Options) -> None:
    """A gradient of 1e30 does not move an adapted tensor and counts as not finite. A weight of 1e30 is lost."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, generator=generator)
    for options in (
        {},
        {"skip_nonfinite": True},
        {"momentum": 0.9},
        {"trust_clip": True},
        {"trust_denominator": "joint"},
    ):
        param = Parameter(weight.clone())
        optimizer = LARS([param], **{**BASE, **options}, **implementation)
        set_grads([param], [torch.full((size,), 1e30)])
        optimizer.step()
        assert torch.equal(param, weight), options
        set_grads([param], [torch.ones(size)])
        optimizer.step()
        assert param.isfinite().all() and not torch.equal(param, weight)
    # float64 has room for it
    params = [Parameter(weight.double() * 1e30)]
    run([{"params": params}], BASE, lambda ps, _: [torch.full_like(ps[0], 1e30)], implementation)
    param = Parameter(weight * 1e30)
    optimizer = LARS([param], **BASE, **implementation)
    set_grads([param], [torch.ones(size)])
    optimizer.step()
    assert not param.isfinite().any(), "and shows"


@implementations
@loop_over("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_denormals(dtype: torch.dtype, implementation: Options) -> None:
    """A gradient, weight or lr * ratio below the smallest normal number. Only rounding makes it 0."""
    smallest = torch.finfo(dtype).smallest_normal
    for w_scale, g_scale in itertools.product((smallest / 4, 1.0), repeat=2):
        params = [Parameter((torch.arange(1.0, 40.0).double() / 20 * w_scale).to(dtype))]
        grads = [(torch.arange(40.0, 1.0, -1.0).double() / 20 * g_scale).to(dtype)]
        # without adaptation, if norms are too small for float32
        adapt = dtype == torch.float16
        run([{"params": params}], {**BASE, "adapt": adapt, "momentum": 0.9}, lambda *_, g=grads: g, implementation)


@implementations
def test_float16_at_its_limits(implementation: Options) -> None:
    """Norms above 65504 are right. A step that leaves the range gives inf, as in torch's SGD."""
    largest = torch.finfo(torch.float16).max
    for size in (40, 20_000):
        params = [Parameter(torch.full((size,), value, dtype=torch.float16)) for value in (largest, 60000.0, 6e-8, 1.0)]
        grads = [torch.full((size,), value, dtype=torch.float16) for value in (1.0, largest, 6e-8, -largest)]
        run([{"params": params}], {**BASE, "momentum": 0.9, "lr": 0.2}, lambda *_, g=grads: g, implementation)
    param = Parameter(torch.full((40,), -largest, dtype=torch.float16))
    optimizer = LARS([param], lr=1.0, adapt=True, trust_coefficient=0.1, **implementation)
    set_grads([param], [torch.ones(40, dtype=torch.float16)])
    optimizer.step()
    assert (param == -INF).all()


# ---------------------------------------------------------------- past 2^31 elements
HUGE = (1 << 31) + 4096 + 3


def test_tables_of_huge_tensors() -> None:
    """Sizes and ends are 64-bit. The chunks of 2^43 elements would overflow 32 bits, and no machine can hold them."""
    sizes = (HUGE, 5, 3 * HUGE)
    table = triton._new_table(torch.device("cpu"), (1 << 45, *range(2, 13)), sizes)
    rows = table.rows.view(3, 8).tolist()
    chunks = [-(-size // triton.CHUNK) for size in sizes]
    assert [row[4] for row in rows] == list(sizes)
    assert [row[5:7] for row in rows] == [[0, chunks[0]], [chunks[0], chunks[0] + 1], [chunks[0] + 1, sum(chunks)]]
    assert rows[0][0] == 1 << 45
    assert table.chunk_tensor.bincount().tolist() == chunks


def test_blocks_and_stacks_of_huge_tensors() -> None:
    """Shapes are enough: wherever they are cut, every element is in exactly one piece."""
    with torch.device("meta"):
        huge = torch.empty(HUGE)
        assert sum(block.numel() for block in torch.split(fused_cpu._flat(huge), fused_cpu.STACK)) == HUGE
        assert layouts.are_laid_out_alike(huge.view(1, -1))
        assert not layouts.are_laid_out_alike(torch.empty(2, HUGE)[:, ::2])
        assert norms.chunks([huge, torch.empty(3), huge]) == [[0], [1], [2]]
    plan = fused_cpu.Plan([torch.empty(1 << 12, 1)] * 130 + [torch.empty(3)])
    stacks = [stack for full in plan.stacks for stack in full]
    assert len(plan.stacks) == 3 and not plan.alone and sorted(i for s in stacks for i in s.places) == list(range(131))
    assert all(sum(stack.grads.numel() for stack in full) <= fused_cpu.STACK for full in plan.stacks)


def test_the_norm_of_more_than_2_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """With shapes only: the measured pieces cover everything."""
    pieces: list[int] = []

    def norms_of_rows(tensor: Tensor, _row: int) -> Tensor:
        pieces.append(tensor.numel())
        return tensor.new_empty(1)

    monkeypatch.setattr(norms, "_norms_of_rows", norms_of_rows)
    with torch.device("meta"):
        for tensor in (
            torch.empty(HUGE, dtype=torch.bfloat16),
            torch.empty(HUGE),
            torch.empty(2, HUGE)[:, :-1],
            torch.empty(1, 2, HUGE)[:, :, ::2],
        ):
            pieces.clear()
            assert norms._row_norms(tensor).dim() == 1
            assert sum(pieces) == tensor.numel() > 1 << 31
