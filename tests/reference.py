"""LARS in NumPy, in float64 and complex128. The tests compare every implementation with it.

Written from You, Gitman, Ginsburg, arXiv 1708.03888 (Eq. 6, Algorithm 1) and the table of options, in the paper's
notation: w parameter, g gradient, lam trust ratio, d direction, v momentum. It imports nothing of the package.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

Array = np.ndarray
DEFAULTS: dict[str, Any] = {
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "trust_coefficient": 0.001,
    "eps": 1e-8,
    "adapt": None,
    "trust_clip": False,
    "trust_denominator": "separate",
    "lr_in_momentum": False,
    "skip_nonfinite": False,
    "maximize": False,
}
# accepted so that an optimizer's param_groups can be passed as they are; they do not change the numbers
EXECUTION = {"foreach", "differentiable", "fused", "kahan_sum", "initial_lr", "param_names", "name"}


def to_array(value: Any) -> Array:
    """A float64 or complex128 copy of a tensor (any dtype, layout, device), array or nested list."""
    if isinstance(value, torch.Tensor):
        wide = torch.complex128 if value.is_complex() else torch.float64
        value = value.detach().cpu().to(wide).resolve_conj().resolve_neg().numpy()
    array = np.array(value)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def norm(x: Array) -> float:
    """L2 norm of the whole tensor, scaled by the largest element so that no square under- or overflows."""
    largest = size(x)
    if largest == 0.0 or not np.isfinite(largest):
        return largest
    return largest * float(np.sqrt(np.sum(np.abs(x / largest) ** 2)))


def size(x: Array) -> float:
    """Largest absolute value, 0 for an empty tensor."""
    return float(np.max(np.abs(x))) if x.size else 0.0


def is_adapted(options: Mapping[str, Any]) -> bool:
    adapt = options.get("adapt")
    return options.get("weight_decay", 0.0) != 0 if adapt is None else bool(adapt)


def trust_ratio(w: Array, g: Array, **options: Any) -> float:
    """lam of one tensor, 1 if nothing is scaled. g is after grad_scale and maximize. lr matters only to trust_clip."""
    o = {**DEFAULTS, **options}
    joint = o["trust_denominator"] == "joint"
    w_norm = norm(w)
    g_norm = norm(g + o["weight_decay"] * w) if joint else norm(g)
    if not is_adapted(o) or w_norm == 0 or g_norm == 0:
        return 1.0
    denominator = g_norm + o["eps"] if joint else g_norm + o["weight_decay"] * w_norm + o["eps"]
    lam = o["trust_coefficient"] * w_norm / denominator
    if o["trust_clip"]:
        lr = float(o["lr"])
        lam = min(lam / lr, 1.0) if lr != 0 else 1.0
    return lam


def direction(w: Array, g: Array, compensation: Array | float = 0.0, **options: Any) -> Array:
    """d of one tensor. Norms are of w, which the model sees, and the decay is of w + compensation."""
    o = {**DEFAULTS, **options}
    decayed = g + o["weight_decay"] * (w + compensation)
    if not is_adapted(o):
        return decayed
    if o["trust_denominator"] == "separate" and (norm(w) == 0 or norm(g) == 0):
        return g
    return trust_ratio(w, g, **o) * decayed


class ReferenceLARS:
    """A whole optimizer: ``ReferenceLARS([{"params": [...], "lr": 0.1}, ...])``. Keywords are options of all groups.

    ``params`` and ``momentum_buffers`` are flat, in the order of the groups. A buffer is None before a tensor's first step
    with momentum. Steps do not round: after one, ``params`` holds the sums of parameters and compensations, which `store`
    splits and `realign` sets. ``groups`` holds the options, which every step reads. ``param_sizes`` and ``buffer_sizes``
    hold the largest number that the last step added up for each tensor. Implementations round relative to it.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]], **options: Any) -> None:
        self.groups: list[dict[str, Any]] = []
        self.params: list[Array] = []
        self.group_of: list[dict[str, Any]] = []
        for given in groups:
            group = {**DEFAULTS, **options, **given}
            params = [to_array(param) for param in group.pop("params")]
            unknown, missing = group.keys() - DEFAULTS.keys() - EXECUTION - {"lr"}, {"lr"} - group.keys()
            if unknown or missing:
                raise TypeError(f"unknown options {sorted(unknown)}, missing options {sorted(missing)}")
            self.groups.append(group)
            self.params += params
            self.group_of += [group] * len(params)
        self.momentum_buffers: list[Array | None] = [None] * len(self.params)
        self.compensations: list[Array | float] = [0.0] * len(self.params)
        self._measure_sizes()

    def store(self, dtype: torch.dtype) -> None:
        """Round parameters and buffers to a dtype, and keep the rounding errors of the parameters."""

        def rounded(x: Array) -> Array:
            return to_array(torch.as_tensor(x).to(dtype))

        for i, w in enumerate(self.params):
            self.params[i] = rounded(w + self.compensations[i])
            self.compensations[i] = rounded(w + self.compensations[i] - self.params[i])
        self.momentum_buffers = [None if v is None else rounded(v) for v in self.momentum_buffers]

    def realign(
        self,
        params: Sequence[Any],
        momentum_buffers: Sequence[Any] | None = None,
        compensations: Sequence[Any] | None = None,
    ) -> None:
        """Continue from these values, so that the next comparison shows the error of one step. No buffers: all None."""
        buffers = [None] * len(self.params) if momentum_buffers is None else momentum_buffers
        kept = [None] * len(self.params) if compensations is None else compensations
        self.compensations = [0.0 if c is None else to_array(c) for c, _ in zip(kept, self.params, strict=True)]
        self.params = [to_array(param) for param, _ in zip(params, self.params, strict=True)]
        self.momentum_buffers = [None if v is None else to_array(v) for v, _ in zip(buffers, self.params, strict=True)]

    def step(self, grads: Sequence[Any], *, grad_scale: Any = 1.0, found_inf: Any = False) -> None:
        """One step. grads: flat like ``params``, None for a tensor without a gradient."""
        self._measure_sizes()
        if float(found_inf) != 0:
            return
        # non-finite gradients are legitimate inputs, and the tests turn warnings into errors
        with np.errstate(all="ignore"):
            scaled = [None if grad is None else to_array(grad) / float(grad_scale) for grad in grads]
            guarded = [g for g, o in zip(scaled, self.group_of, strict=True) if o["skip_nonfinite"] and g is not None]
            skip = not all(np.isfinite(norm(g)) for g in guarded)
            for i, (g, o) in enumerate(zip(scaled, self.group_of, strict=True)):
                if g is not None and not (skip and o["skip_nonfinite"]):
                    self._step_one(i, -g if o["maximize"] else g, {**o, "lr": float(o["lr"])})

    def _step_one(self, i: int, g: Array, o: dict[str, Any]) -> None:
        w, v, lr, momentum = self.params[i], self.momentum_buffers[i], o["lr"], o["momentum"]
        d = direction(w, g, self.compensations[i], **o)
        d_size = trust_ratio(w, g, **o) * max(size(g), o["weight_decay"] * size(w))
        self.param_sizes[i] = max(size(w), lr * d_size)
        w, self.compensations[i] = w + self.compensations[i], 0.0
        if momentum == 0:
            self.params[i] = w - lr * d
            return
        v_size = 0.0 if v is None else momentum * size(v)
        if o["lr_in_momentum"]:
            v = lr * d if v is None else momentum * v + (1 - o["dampening"]) * lr * d
            self.params[i] = w - (lr * d + momentum * v if o["nesterov"] else v)
        else:
            v = d if v is None else momentum * v + (1 - o["dampening"]) * d
            self.params[i] = w - lr * (d + momentum * v if o["nesterov"] else v)
        self.momentum_buffers[i] = v
        self.buffer_sizes[i] = max(v_size, d_size * (lr if o["lr_in_momentum"] else 1.0))
        self.param_sizes[i] = max(self.param_sizes[i], v_size * (1.0 if o["lr_in_momentum"] else lr))

    def _measure_sizes(self) -> None:
        self.param_sizes = [size(w) for w in self.params]
        self.buffer_sizes = [0.0 if v is None else size(v) for v in self.momentum_buffers]
