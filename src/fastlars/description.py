"""The text of `repr`: the backend of each group, whether it is adapted, and its options that are not defaults."""

from __future__ import annotations

import collections
import itertools
import numbers
import reprlib
import textwrap
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from .backends import preferred, wanted
from .backends.torch_sgd import is_torch_sgd
from .dialects import dialect_of
from .formula import is_adapted, is_compensated
from .options import NAMES, Options, values_of
from .sharding import local

WIDTH = 100
MOST = 8  # at most this many entries are shown, because more would not fit on a screen
_HIDDEN = {"params", "param_names", "foreach", "fused"}  # the backend's name shows the last two


def describe(groups: list[dict[str, Any]]) -> str:
    """The lines between the parentheses of `repr`. Neighbouring groups that differ only in their tensors share an entry."""
    described = [(_kind(group, Options(*values_of(group))), _options(group), group) for group in groups]
    entries: list[str] = []
    end = 0
    for (kind, shown), alike in itertools.groupby(described, key=lambda entry: entry[:2]):
        members = [group for _, _, group in alike]
        start, end = end, end + len(members)
        which = f"Group {start}" if len(members) == 1 else f"Groups {start} to {end - 1}, alike"
        lines = [f"Parameter {which}: {_count(members)}, {kind}", *textwrap.wrap(shown, WIDTH - 8)]
        entries.append(textwrap.indent("\n    ".join(lines), "    "))
    if len(entries) > MOST:
        left_out = f"    ... {len(entries) - MOST} more like these: see param_groups"
        entries = [*entries[: MOST - 1], left_out, entries[-1]]
    return "\n".join(entries)


def _count(groups: list[dict[str, Any]]) -> str:
    params = [param for group in groups for param in group["params"]]
    frozen = sum(not param.requires_grad for param in params)
    of_which = f" ({frozen} frozen)" if frozen else ""
    tensors = "1 tensor" if len(params) == 1 else f"{len(params)} tensors"
    return f"{tensors}{of_which}, {sum(param.numel() for param in params if not is_lazy(param)):,} elements"


def _kind(group: dict[str, Any], options: Options) -> str:
    kind = "adapted" if is_adapted(options) else "not adapted"
    if is_adapted(options) and (dialect := dialect_of(options)):
        kind = f"adapted as in {dialect}"
    if not group["params"]:
        return kind
    params = [local(param) for param in group["params"] if not is_lazy(param)]
    if not params:
        return f"{kind}, not yet initialized"
    backends = wanted(params, options)
    # pass the parameter as its own gradient, which may not exist yet, but usually has the same layout
    runs = collections.Counter(preferred(backends, param, param, None).name for param in params)
    what_runs = ", ".join(runs if len(runs) == 1 else (f"{name} {count}" for name, count in runs.items()))
    if any(is_compensated(param.dtype, options) for param in params):
        what_runs += ", Kahan sums for half precision"
    return f"{kind}, {what_runs}" + (" (torch's SGD)" if is_torch_sgd(params, options) else "")


def _options(group: dict[str, Any]) -> str:
    defaults = Options(0.0)._asdict()
    shown = ["lr", *(name for name in NAMES[1:] if group[name] != defaults[name])]
    shown += [key for key in group if key not in NAMES]
    return ", ".join(f"{key}={_value(group[key])}" for key in shown if key not in _HIDDEN)


def _value(value: Any) -> str:
    if isinstance(value, Tensor):
        # reading a value on an accelerator would synchronise
        known = value.device.type == "cpu" and value.numel() == 1
        return f"tensor({value.item():g})" if known else f"tensor on {value.device}"
    if isinstance(value, numbers.Real) and not isinstance(value, int):
        return f"{float(value):g}"
    return reprlib.repr(value)
