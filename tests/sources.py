"""The LARS of the papers and packages in DIALECTS, each in its own terms, in float64 NumPy.

`w` parameter, `g` gradient, `v` momentum buffer (None before the first step), `c` trust coefficient, `decay` weight decay.
"""

from collections.abc import Callable
from typing import NamedTuple

from reference import Array, norm

M = 0.9  # momentum
Direction = Callable[..., Array]
Momentum = Callable[..., tuple[Array, Array]]


# ---------------------------------------------------------------- directions: (w, g, lr, decay, c) -> d
def bolts(w: Array, g: Array, lr: float, decay: float, c: float) -> Array:
    if decay != 0 and norm(w) != 0 and norm(g) != 0:
        return c * norm(w) / (norm(g) + norm(w) * decay + 1e-8) * (g + decay * w)
    return g


def solo_learn(w: Array, g: Array, lr: float, decay: float, c: float) -> Array:
    if norm(w) != 0 and norm(g) != 0:
        return c * norm(w) / (norm(g) + norm(w) * decay + 1e-8) * (g + decay * w)
    return g


def solo_learn_excluding(w: Array, g: Array, lr: float, decay: float, c: float) -> Array:
    return g if w.ndim == 1 else solo_learn(w, g, lr, decay, c)


def torchlars(w: Array, g: Array, lr: float, decay: float, c: float, eps: float = 1e-8) -> Array:
    adaptive_lr = 1.0
    if norm(w) > 0 and norm(g) > 0:
        adaptive_lr = norm(w) / (norm(g) + decay * norm(w) + eps) * c
    return (g + decay * w) * adaptive_lr


def pytorch_optimizer(w: Array, g: Array, lr: float, decay: float, c: float) -> Array:
    if w.ndim <= 1:
        return g
    denominator = norm(g) + decay * norm(w)
    return (g + decay * w) * (c * norm(w) / denominator if norm(w) > 0 and denominator > 0 else 1.0)


def paper(w: Array, g: Array, lr: float, decay: float, c: float) -> Array:
    return c * norm(w) / (norm(g) + decay * norm(w)) * (g + decay * w)


def mlperf(w: Array, g: Array, lr: float, decay: float, c: float) -> Array:
    return torchlars(w, g, lr, decay, c, eps=1e-7)


def apex(w: Array, g: Array, lr: float, decay: float, c: float) -> Array:
    if norm(w) == 0 or norm(g) == 0:
        return g
    local_lr = c * norm(w) / (norm(g) + norm(w) * decay + 1e-8)
    return (g + decay * w) * (min(local_lr, lr) / lr if lr else 1.0)


def timm(w: Array, g: Array, lr: float, decay: float, c: float) -> Array:
    return torchlars(w, g, lr, decay, c) if decay != 0 else g


def timm_larc(w: Array, g: Array, lr: float, decay: float, c: float) -> Array:
    if decay == 0:
        return g
    ratio = c * norm(w) / (norm(g) + norm(w) * decay + 1e-8) if norm(w) > 0 and norm(g) > 0 else 1.0
    return (g + decay * w) * (min(ratio / lr, 1.0) if lr else 1.0)


def joint(w: Array, g: Array, lr: float, decay: float, c: float) -> Array:
    update = g + decay * w
    q = c * norm(w) / norm(update) if norm(w) > 0 and norm(update) > 0 else 1.0
    return q * update


# ---------------------------------------------------------------- momentum: (w, d, v, lr, nesterov, dampening) -> w, v
def torch_sgd(w: Array, d: Array, v: Array | None, lr: float, nesterov: bool, dampening: float) -> tuple[Array, Array]:
    v = d if v is None else M * v + (1 - dampening) * d
    return w - lr * (d + M * v if nesterov else v), v


def from_zeros(w: Array, d: Array, v: Array | None, lr: float, nesterov: bool, dampening: float) -> tuple[Array, Array]:
    v = (0.0 if v is None else M * v) + (1 - dampening) * d
    return w - lr * (d + M * v if nesterov else v), v


def classic(w: Array, d: Array, v: Array | None, lr: float, nesterov: bool, dampening: float) -> tuple[Array, Array]:
    v = (0.0 if v is None else M * v) + lr * d
    return w - (M * v + lr * d if nesterov else v), v


# ---------------------------------------------------------------- the rows and their sources
class Source(NamedTuple):
    dialect: str
    direction: Direction
    momentum: Momentum
    nesterov: bool  # whether it has that
    differs_on: tuple[str, ...] = ()  # of TENSORS


ZERO_GRADIENT = ("zero gradient", "zero gradient at times")
SOURCES: dict[str, Source] = {
    "bolts": Source("bolts", bolts, torch_sgd, True),
    "timm": Source("bolts", timm, torch_sgd, True, ZERO_GRADIENT),
    "torchlars": Source("torchlars", torchlars, torch_sgd, True, ZERO_GRADIENT),
    "solo-learn": Source("torchlars", solo_learn, torch_sgd, True),
    "pytorch_optimizer": Source("pytorch_optimizer", pytorch_optimizer, from_zeros, True, ZERO_GRADIENT),
    "paper": Source("paper", paper, classic, False, ("zero parameter", *ZERO_GRADIENT)),
    "mlperf": Source("mlperf", mlperf, classic, True, ZERO_GRADIENT),
    "apex": Source("larc", apex, torch_sgd, True),
    "timm_larc": Source("timm_larc", timm_larc, torch_sgd, True, ("zero parameter", *ZERO_GRADIENT)),
    "moco-v3": Source("byol", joint, from_zeros, False),
    "simclr": Source("simclr", joint, classic, True),
}
