"""torch_xla: its sharded tensors."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cases import make_grads, make_params
from fastlars import LARS
from harness import set_grads

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
