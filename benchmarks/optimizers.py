"""Everyone who runs: torch's SGD, every implementation of ours, and the other LARS for PyTorch, as their users get them.

All get the same hyper-parameters and one group, in which every LARS adapts every tensor, but pytorch_optimizer's, which
leaves vectors out. lr is so small that the tensors hardly change, however many steps are timed.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from fastlars import LARS

YARDSTICK = "sgd-fused"
LOOP = "quadra-loop"
OPTIONS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}


class HostReadLoop(Optimizer):
    """A minimal LARS of Lightning Bolts' kind; stands for Bolts, quadra and lightly, who share their loop.

    Tensor by tensor in torch operations, with norms that Python reads (``if norm != 0``): on a GPU the host waits
    for the device at every tensor. The formula is that of fastlars' defaults.
    """

    def __init__(self, params: list[Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            for param in group["params"]:
                direction = self._scaled(param, param.grad, group["weight_decay"])
                state = self.state[param]
                if "momentum_buffer" in state:
                    velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(direction)
                else:
                    velocity = state["momentum_buffer"] = direction.clone()
                param.add_(velocity, alpha=-group["lr"])

    @staticmethod
    def _scaled(param: torch.Tensor, grad: torch.Tensor, weight_decay: float) -> torch.Tensor:
        param_norm, grad_norm = torch.norm(param), torch.norm(grad)
        if param_norm != 0 and grad_norm != 0:
            ratio = 0.001 * param_norm / (grad_norm + weight_decay * param_norm + 1e-8)
            return grad.add(param, alpha=weight_decay).mul_(ratio)
        return grad


@dataclass(frozen=True)
class Contender:
    """One optimizer as it is timed."""

    name: str  # on the command line and in the results
    title: str  # in tables and figures
    make: Callable[[list[Parameter]], Optimizer]
    package: str = ""  # the distribution that a peer comes with; ours and torch's have none
    fused_bytes: int | None = None  # a float32 parameter, where operations cannot be counted: in a Triton kernel

    def missing(self) -> str:
        """Why a peer cannot run here; empty where it can."""
        if not self.package:
            return ""
        try:
            version(self.package)
        except PackageNotFoundError:
            return f"{self.package} is not installed"
        try:
            self.make([Parameter(torch.zeros(1))])
        except Exception as error:  # noqa: BLE001  a broken installation of somebody else's package raises anything
            return f"{self.package} does not import here: {type(error).__name__}: {error}"
        return ""


def _peer(module: str, name: str, params: list[Parameter], **options: Any) -> Optimizer:
    with warnings.catch_warnings():  # of their imports
        warnings.simplefilter("ignore")
        optimizer: Optimizer = getattr(importlib.import_module(module), name)(params, **OPTIONS, **options)
    return optimizer


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(YARDSTICK, "torch SGD(fused=True)", lambda params: SGD(params, **OPTIONS, fused=True)),
        Contender("sgd-foreach", "torch SGD(foreach=True)", lambda params: SGD(params, **OPTIONS, foreach=True)),
        Contender("sgd-loop", "torch SGD(foreach=False)", lambda params: SGD(params, **OPTIONS, foreach=False)),
        Contender(
            "fastlars-fused", "fastlars fused", lambda params: LARS(params, **OPTIONS, fused=True), fused_bytes=28
        ),
        Contender("fastlars-foreach", "fastlars foreach", lambda params: LARS(params, **OPTIONS, foreach=True)),
        Contender("fastlars-single", "fastlars single", lambda params: LARS(params, **OPTIONS, foreach=False)),
        Contender(LOOP, "quadra loop", lambda params: HostReadLoop(params, **OPTIONS)),
        Contender("lightly", "lightly", partial(_peer, "lightly.utils.lars", "LARS"), package="lightly"),
        Contender("timm", "timm", partial(_peer, "timm.optim", "Lars"), package="timm"),
        Contender(
            *("pytorch_optimizer", "pytorch_optimizer", partial(_peer, "pytorch_optimizer", "LARS")),
            package="pytorch_optimizer",
        ),
    )
}
OURS = tuple(name for name in CONTENDERS if name.startswith("fastlars"))
PEERS = tuple(contender.package for contender in CONTENDERS.values() if contender.package)


def present(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Those of `names` that can run here, and why the others cannot."""
    reasons = {name: CONTENDERS[name].missing() for name in names}
    return [name for name in names if not reasons[name]], {name: why for name, why in reasons.items() if why}
