"""torch_xla: its sharded tensors, the number of compilations, and host reads. `nox -s xla` runs all of it.

XLA records operations, and compiles and runs them at `torch_xla.sync()`. It does not recompile a graph that it has seen. Its
own metrics count compilations, transfers to the host, and operations that fall back to the CPU.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import pages
from cases import make_grads, make_params
from devices import DEVICES
from fastlars import LARS, param_groups, schedules
from harness import buffers_of, set_grads

OPTIONS = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.05, "trust_coefficient": 0.1}


# ---------------------------------------------------------------- on every machine
def test_an_xla_sharded_tensor_is_a_whole_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch_xla's class, which inherits from DTensor, keeps the whole tensor and forwards operations to it."""
    module = pytest.importorskip("torch.distributed.tensor")
    if not hasattr(module, "DTensor"):
        pytest.skip("private before torch 2.5")

    class XLAShardedTensor(module.DTensor):  # type: ignore[name-defined, misc]
        __slots__ = ["global_tensor"]
        __torch_function__ = torch._C._disabled_torch_function_impl

        def __new__(cls, whole: Tensor, requires_grad: bool = False) -> Any:
            wrapper = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, whole.shape, whole.stride(), dtype=whole.dtype, device=whole.device, requires_grad=requires_grad
            )
            wrapper.global_tensor = whole.detach()
            return wrapper

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            plain = tree_map_only(cls, lambda tensor: tensor.global_tensor, (args, kwargs or {}))
            return tree_map_only(Tensor, cls, func(*plain[0], **plain[1]))

    spmd = ModuleType("torch_xla.distributed.spmd")
    spmd.XLAShardedTensor = XLAShardedTensor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, spmd.__name__, spmd)

    (plain,) = make_params(torch.float32, layouts=["matrix"])
    wrapped = torch.nn.Parameter(XLAShardedTensor(plain.detach().clone()))
    expected, optimizer = LARS([plain], **OPTIONS), LARS([wrapped], **OPTIONS)
    for step in range(3):
        set_grads([plain], make_grads("dense", [plain], step))
        wrapped.grad = XLAShardedTensor(plain.grad) if step % 2 else plain.grad
        assert optimizer.trust_ratios() == pytest.approx(expected.trust_ratios(), rel=1e-6)
        expected.step()
        optimizer.step()
        torch.testing.assert_close(wrapped.global_tensor, plain.detach())


# ---------------------------------------------------------------- with torch_xla
on_xla = pytest.mark.skipif("xla" not in DEVICES, reason="needs torch_xla")


@pytest.mark.xla
@on_xla
@pytest.mark.parametrize("lr", [0.7, torch.tensor(0.7)], ids=["float", "tensor"])
def test_a_changing_lr_compiles_nothing_and_nothing_is_read(lr: Any) -> None:
    """xm.optimizer_step and a scheduler, as docs/devices.md shows: the first steps compile, later ones do not.

    XLA may compile once more for a float lr of exactly 1 or equal to momentum, because equal numbers are one input.
    """
    import torch_xla  # noqa: PLC0415  not everywhere
    from torch_xla.core import xla_model as xm  # noqa: PLC0415
    from torch_xla.debug import metrics  # noqa: PLC0415

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4)).to(
        DEVICES["xla"]
    )
    optimizer = LARS(param_groups(model, weight_decay=1e-4), lr=lr, momentum=0.9)
    scheduler = schedules.warmup_cosine(optimizer, warmup_steps=4, total_steps=20)
    data = torch.randn(32, 8).to(DEVICES["xla"])
    seen = set()
    for step in range(20):
        if step == 3:
            torch_xla.sync(wait=True)
            metrics.clear_all()
        optimizer.zero_grad()
        model(data).square().mean().backward()
        seen.add(float(optimizer.param_groups[0]["lr"]))
        xm.optimizer_step(optimizer)
        scheduler.step()
        torch_xla.sync()
    torch_xla.sync(wait=True)
    assert len(seen) > 15
    assert metrics.metric_data("ExecuteTime")[0] >= 15, "steps run in the background, the last may not be counted yet"
    assert metrics.metric_data("CompileTime") is None, "a later step was compiled"
    assert metrics.metric_data("TransferFromDeviceTime") is None, "a step was read on the host"
    assert not [name for name in metrics.counter_names() if name.startswith("aten::")], "operations ran on the CPU"
    assert all(buffer is not None and buffer.device.type == "xla" for buffer in buffers_of(optimizer))
    float(next(model.parameters()).detach().sum())
    assert metrics.metric_data("TransferFromDeviceTime")[0] == 1, "what this test looks at does count reads"


@pytest.mark.xla
@on_xla
def test_complex128_is_refused_because_it_would_not_move() -> None:
    (param,) = make_params(torch.complex128, layouts=["matrix"], device=DEVICES["xla"])
    optimizer = LARS([param], **OPTIONS)
    set_grads([param], [torch.ones_like(param)])
    with pytest.raises(
        RuntimeError, match=r"torch.complex128 cannot be written on XLA.*use complex64\. Nothing has changed"
    ):
        optimizer.step()


@pytest.mark.xla
@on_xla
def test_the_page_runs(tmp_path: Path) -> None:
    program = tmp_path / "page.py"
    program.write_text(pages.examples(pages.ROOT / "docs" / "devices.md", "py"), encoding="utf-8")
    shown = runpy.run_path(str(program))
    assert shown["model"].weight.device.type == "xla" and shown["optimizer"].state


@pytest.mark.xla
@on_xla
def test_sharded_tensors_step_as_whole_ones() -> None:
    """Over four devices, with sharded and with whole gradients, in a separate process."""
    environment = {**os.environ, "CPU_NUM_DEVICES": "4"}
    program = pages.ROOT / "tests" / "xla_sharded.py"
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{kind} gradients, 4 devices: equal" for kind in ("plain", "sharded", "backward")
    ]
