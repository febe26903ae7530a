"""Option names of other libraries, and misspelt option names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .advice import advise
from .options import NAMES

_GROUPS = (
    "param groups decide what is adapted and decayed: use fastlars.param_groups(model, weight_decay), which leaves out "
    "biases and normalisation tensors, or write adapt=False and weight_decay=0 into a group"
)
# The option names of other LARS optimizers, each with our option, or with a sentence if we have none.
FOREIGN = {
    "eta": "trust_coefficient",  # Barlow Twins, VICReg, solo-learn
    "eeta": "trust_coefficient",  # SimCLR, MLPerf, ColossalAI
    "trust_coef": "trust_coefficient",  # torchlars
    "trust_coeff": "trust_coefficient",  # timm
    "lars_coeff": "trust_coefficient",  # Paddle
    "lars_weight_decay": "weight_decay",
    "epsilon": "eps",  # TensorFlow, Paddle, MXNet
    "wd": "weight_decay",  # MXNet
    "learning_rate": "lr",  # Keras, optax, Paddle, MXNet
    "use_nesterov": "nesterov",  # TensorFlow
    "always_adapt": "adapt",  # timm
    "clip_lr": "trust_clip",  # solo-learn
    "clip": "trust_clip",  # apex LARC
    "lars_exclude": "write adapt=False into the group",
    "exclude_bias_n_norm": _GROUPS,  # solo-learn
    "weight_decay_filter": _GROUPS,  # Barlow Twins, VICReg
    "lars_adaptation_filter": _GROUPS,
    "exclude_from_weight_decay": _GROUPS,  # SimCLR, Paddle
    "exclude_from_layer_adaptation": _GROUPS,
    "skip_list": _GROUPS,  # MLPerf
    "weight_decay_mask": _GROUPS,  # optax
    "trust_ratio_mask": _GROUPS,
    "classic_momentum": 'for True, pass dialect="simclr"; a ratio of the momentum buffer (False) is not available',  # SimCLR
    "max_unorm": "a cap on SGD's step is not available, and trust_clip=True comes nearest",  # bitsandbytes
}


def foreign_name(key: object) -> str | None:
    """A sentence with our name for another library's option, or None if the key is not such an option."""
    ours = FOREIGN.get(key) if isinstance(key, str) else None
    if ours is None:
        return None
    return f"{key!r} is called {ours} here" if ours in NAMES else f"{key!r} is not an option of LARS; {ours}"


def check_call(keys: Iterable[str]) -> None:
    """Raise for an argument that is another library's option or misspelt. Python raises for any other unknown name."""
    for key in keys:
        if sentence := foreign_name(key):
            raise TypeError(sentence)
        if name := nearest_name(key):
            raise TypeError(f"{key!r} is not an option of LARS; did you mean {name!r}?")


def check_keys(keys: Iterable[object], where: str, way_out: str = "") -> None:
    """Raise for a group key that is another library's option. Only warn about a misspelt one, which may be a user's own key."""
    for key in keys:
        if sentence := foreign_name(key):
            raise ValueError(f"{where}: {sentence}{way_out}")
        if isinstance(key, str) and (name := nearest_name(key)):
            advise(f"{where}: {key!r} is not an option of LARS and has no effect; did you mean {name!r}?")


_KNOWN = (*NAMES, "dialect")


def nearest_name(key: str) -> str | None:
    """The option that an unknown key probably means, or None for keys that schedulers and users add."""
    if key in _KNOWN or any(key.startswith(f"{name}_") or key.endswith(f"_{name}") for name in NAMES):
        return None  # companions of an option, such as initial_lr, max_momentum, weight_decay_scale
    # a short name must match more closely, because it resembles many words
    candidates = [(name, 0.74 if len(name) > 5 else 0.8) for name in _KNOWN]
    ratios = {name: difflib.SequenceMatcher(None, key.lower(), name).ratio() for name in _KNOWN}
    close = [name for name, cutoff in candidates if ratios[name] >= cutoff]
    return max(close, key=ratios.__getitem__, default=None)
