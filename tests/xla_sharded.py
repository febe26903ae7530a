"""LARS on tensors that xs.mark_sharding has divided over XLA devices. A program, because SPMD is a mode of the whole process."""

import torch
import torch_xla
from torch import Tensor
from torch_xla.distributed import spmd as xs

from fastlars import LARS

OPTIONS = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.05, "trust_coefficient": 0.1}

torch_xla.runtime.use_spmd()
xla, count = torch_xla.device(), torch_xla.runtime.global_runtime_device_count()
mesh = xs.Mesh(range(count), (count, 1), ("rows", "columns"))


def divided(tensor: Tensor) -> Tensor:
    return xs.mark_sharding(tensor.detach().to(xla), mesh, ("rows", "columns"))  # type: ignore[no-any-return]


for grads in ("plain", "sharded", "backward"):
    whole = torch.nn.Parameter(torch.randn(8, 4))
    param = torch.nn.Parameter(divided(whole))
    assert type(param).__name__ == "XLAShardedTensor"
    expected, optimizer = LARS([whole], **OPTIONS), LARS([param], **OPTIONS)
    assert "adapted, single" in repr(optimizer)
    for _ in range(3):
        whole.grad = torch.randn(8, 4)
        if grads == "backward":
            param.grad = None
            (param * whole.grad.to(xla)).sum().backward()
        else:
            param.grad = divided(whole.grad) if grads == "sharded" else whole.grad.to(xla)
        (ratio,), (right,) = optimizer.trust_ratios().values(), expected.trust_ratios().values()
        assert abs(ratio - right) < 1e-5 * right
        expected.step()
        optimizer.step()
        torch_xla.sync()
        torch.testing.assert_close(param.global_tensor.cpu(), whole.detach(), rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]
    print(f"{grads} gradients, {count} devices: equal")  # noqa: T201  a program
