"""Data that the tests share: option sets, parameter layouts, gradient histories, and the only table of tolerances.

Values are drawn on the CPU in double precision from fixed seeds, then cast, so they are the same in every dtype and on every
device.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Options = dict[str, Any]
Layout = Callable[..., Tensor]
History = Callable[[Tensor, int, int], Tensor | None]

REAL: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX: tuple[torch.dtype, ...] = (torch.complex64, torch.complex128)
STEPS = 4
# lr_in_momentum differs from the default only while lr changes; checkpoint libraries and warm-ups pass 0
LR_FACTORS: tuple[float, ...] = (1.0, 0.5, 0.0, 1.5)

# ---------------------------------------------------------------- options
# Each step is a few per cent of a parameter's norm. With the default trust_coefficient rounding would hide a wrong ratio.
BASE: Options = {"lr": 0.5, "weight_decay": 0.05, "trust_coefficient": 0.1}

# each on top of BASE; dampening and nesterov add the momentum that they need
FEATURES: dict[str, Options] = {
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.25},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "no_decay": {"weight_decay": 0.0},
    "adapt": {"adapt": True},
    "unadapted": {"adapt": False},
    "joint": {"trust_denominator": "joint"},
    "clip": {"trust_clip": True},
    "paper": {"lr_in_momentum": True},
    "skip_nonfinite": {"skip_nonfinite": True},
    "maximize": {"maximize": True},
    "kahan": {"kahan_sum": True},
    "no_kahan": {"kahan_sum": False},
}

_EVERYTHING = ("nesterov", "no_decay", "adapt", "clip", "joint", "paper", "maximize", "skip_nonfinite")

SPECIAL: dict[str, Options] = {
    "defaults": {"lr": 0.5},
    "dampening_without_momentum": {**BASE, "dampening": 0.25},
    "large_dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.9, "weight_decay": 1e-4},
    "large_eps": {**BASE, "eps": 0.5},
    "large_eps_joint": {**BASE, "eps": 0.5, "trust_denominator": "joint"},
    # exactly 1, which a check for decay must not mistake for none
    "large_decay": {**BASE, "weight_decay": 1.0, "momentum": 0.9, "nesterov": True},
    "large_decay_joint_maximize": {**BASE, "weight_decay": 2.0, "trust_denominator": "joint", "maximize": True},
    "clip_at_one": {**BASE, "lr": 0.01, "trust_clip": True, "momentum": 0.9},
    "clip_at_one_joint": {**BASE, "lr": 0.01, "trust_clip": True, "trust_denominator": "joint"},
    "zero_lr": {**BASE, "lr": 0.0, "momentum": 0.9},
    "zero_lr_clip": {**BASE, "lr": 0.0, "momentum": 0.9, "trust_clip": True},
    "zero_lr_paper": {**BASE, "lr": 0.0, "momentum": 0.9, "lr_in_momentum": True},
    # lr > 1: a zero norm's ratio of 1 must not be clipped to 1 / lr
    "large_lr_clip": {**BASE, "lr": 2.0, "trust_clip": True},
    "large_lr_clip_joint": {**BASE, "lr": 2.0, "trust_clip": True, "trust_denominator": "joint"},
    "bolts": {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-4},
    "mlperf": {"lr": 2.0, "momentum": 0.9, "weight_decay": 5e-5, "eps": 1e-9, "lr_in_momentum": True},
    "larc": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "trust_coefficient": 0.02, "trust_clip": True},
    "byol": {"lr": 0.2, "momentum": 0.9, "weight_decay": 1.5e-6, "trust_denominator": "joint"},
}


def is_valid(options: Options) -> bool:
    """nesterov needs momentum and no dampening. skip_nonfinite with momentum needs no dampening."""
    momentum, dampening = options.get("momentum", 0.0), options.get("dampening", 0.0)
    if options.get("nesterov") and momentum == 0:
        return False
    return not (dampening and momentum and (options.get("nesterov") or options.get("skip_nonfinite")))


def _combine(*names: str) -> Options:
    return {key: value for options in (BASE, *(FEATURES[name] for name in names)) for key, value in options.items()}


def _named_options() -> dict[str, Options]:
    """BASE, each feature alone, each pair, all features but one, and the special sets, without repeats."""
    candidates = [("base", dict(BASE))]
    candidates += [(name, _combine(name)) for name in FEATURES]
    for pair in itertools.combinations(FEATURES, 2):
        # what float32 cannot show meets the others in PAIRWISE
        if pair != ("adapt", "unadapted") and not {"skip_nonfinite", "kahan", "no_kahan"} & set(pair):
            candidates.append(("-".join(pair), _combine(*pair)))
    candidates.append(("everything", _combine(*_EVERYTHING)))
    for left_out in _EVERYTHING:
        names = [name for name in _EVERYTHING if name != left_out]
        # nesterov brings the momentum; the flipped set must keep it
        candidates.append((f"everything_but_{left_out}", {"momentum": 0.9} | _combine(*names)))
    candidates += SPECIAL.items()
    named: dict[str, Options] = {}
    for name, options in candidates:
        if is_valid(options) and options not in named.values():
            named[name] = options
    return named


OPTIONS: dict[str, Options] = _named_options()


def pairwise(*columns: Iterable[Any], valid: Callable[..., bool] = lambda *_: True) -> list[tuple[Any, ...]]:
    """A few valid rows in which any two values that may be combined appear together at least once.

    If the code treats two options together, one of these rows shows it, whatever the values of the others.
    """
    values = [list(column) for column in columns]
    everything = itertools.product(*(range(len(column)) for column in values))
    rows = {row: set(itertools.combinations(enumerate(row), 2)) for row in everything if valid(*_row(values, row))}
    missing = set().union(*rows.values())
    chosen = []
    while missing:
        chosen.append(max(rows, key=lambda row: len(rows[row] & missing)))
        missing -= rows[chosen[-1]]
    return [_row(values, row) for row in chosen]


def _row(values: Sequence[Sequence[Any]], places: Sequence[int]) -> tuple[Any, ...]:
    return tuple(column[place] for column, place in zip(values, places, strict=True))


# options that have an effect only together
_MOMENTUM = (FEATURES["momentum"], FEATURES["nesterov"], FEATURES["dampening"], {"momentum": 0.0})
_DECAY = ({}, {**FEATURES["no_decay"], **FEATURES["adapt"]}, FEATURES["unadapted"], FEATURES["no_decay"])
_KAHAN = ({}, FEATURES["kahan"], FEATURES["no_kahan"])
_TOGETHER = ("momentum", "nesterov", "dampening", "no_decay", "adapt", "unadapted", "kahan", "no_kahan")
# every other feature, off and on
_ALONE = [({}, options) for name, options in FEATURES.items() if name not in _TOGETHER]


def _together(*chosen: Options) -> Options:
    return {key: value for options in (BASE, *chosen) for key, value in options.items()}


# any two values of any two columns; most tests use these
PAIRWISE: dict[str, Options] = {
    # kahan_sum in turn, which adds no row: every value meets all of momentum and of decay
    f"pairwise_{i}": _together(*chosen, _KAHAN[(_MOMENTUM.index(chosen[0]) + _DECAY.index(chosen[1])) % 3])
    for i, chosen in enumerate(pairwise(_MOMENTUM, _DECAY, *_ALONE, valid=lambda *chosen: is_valid(_together(*chosen))))
}
OPTIONS |= PAIRWISE


def all_options() -> Iterator[Options]:
    """Every valid combination of all options, for one exhaustive test in a loop, without ids."""
    values: dict[str, tuple[Any, ...]] = {
        "momentum": (0.0, 0.9),
        "dampening": (0.0, 0.25),
        "weight_decay": (0.0, 0.05),
        "nesterov": (False, True),
        "adapt": (None, True, False),
    }
    columns = [[{name: value} for value in of] for name, of in values.items()]
    yield from filter(is_valid, itertools.starmap(_together, itertools.product(*columns, *_ALONE)))


# ---------------------------------------------------------------- parameters
def _randn(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(tuple(shape), generator=generator, dtype=wide).to(dtype=dtype, device=device)


def _layout(*shape: int, view: Callable[[Tensor], Tensor] = lambda storage: storage) -> Layout:
    """The view is made on the device, because moving a strided view there would make it dense."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
        return view(_randn(shape, generator, dtype, device))

    return make


# name -> constructor(generator, dtype, device="cpu"); all work for the dtypes in REAL and COMPLEX, and none overlaps itself
LAYOUTS: dict[str, Layout] = {
    "scalar": _layout(),
    "one_element": _layout(1),
    "empty": _layout(0),
    "empty_matrix": _layout(3, 0),
    "vector": _layout(7),
    "matrix": _layout(3, 5),
    # one past a power of two: the masked tail of a vector loop or of a kernel's block
    "vector_1025": _layout(1025),
    "vector_4097": _layout(4097),
    "conv": _layout(8, 3, 3, 3),
    "channels_last": _layout(8, 3, 3, 3, view=lambda x: x.contiguous(memory_format=torch.channels_last)),
    "transposed": _layout(5, 3, view=lambda x: x.t()),
    # not dense: the neighbours in its storage must keep their bits (see neighbours)
    "strided": _layout(66, view=lambda x: x[::2]),
    "columns": _layout(6, 9, view=lambda x: x[:, 2:7]),
    # three elements in, so dense but not aligned for 16-byte loads
    "offset": _layout(40, view=lambda x: x[3:36]),
    # |w| = 0
    "zeros": _layout(9, view=lambda x: x.zero_()),
}


def make_params(
    dtype: torch.dtype, *, layouts: Sequence[str] = tuple(LAYOUTS), seed: int = 0, device: str | torch.device = "cpu"
) -> list[torch.nn.Parameter]:
    """New leaf parameters, one per layout. For a second copy call it again, because deepcopy makes strided views dense."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(LAYOUTS[name](generator, dtype, device)) for name in layouts]


def neighbours(tensor: Tensor) -> Tensor:
    """A copy of the elements of a tensor's storage that are not its own. They must be the same after a step."""
    storage = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.detach().untyped_storage())
    outside = torch.ones(storage.shape, dtype=torch.bool, device=tensor.device)
    outside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(0)
    return storage[outside]


# ---------------------------------------------------------------- gradients
def _dense(param: Tensor, step: int, index: int, scale: float = 1.0) -> Tensor:
    """Strides as autograd gives them: the parameter's if it is dense, else contiguous."""
    generator = torch.Generator().manual_seed(10_000 + 100 * step + index)
    values = _randn(param.shape, generator, torch.complex128 if param.is_complex() else torch.float64, "cpu")
    return torch.empty_like(param, requires_grad=False).copy_(values * scale)


def _zero(param: Tensor, _step: int, _index: int) -> Tensor:
    return torch.zeros_like(param, requires_grad=False)


def _other_layout(param: Tensor, step: int, index: int) -> Tensor:
    """The values of dense, in other strides than the parameter's (0-dim tensors have no others)."""
    grad = _dense(param, step, index)
    if grad.dim() == 4:
        dense = param.is_contiguous()
        return grad.contiguous(memory_format=torch.channels_last if dense else torch.contiguous_format)
    if grad.dim() == 2:
        return grad.t().contiguous().t() if param.is_contiguous() else grad.contiguous()
    return grad.repeat_interleave(2)[::2] if grad.dim() == 1 and param.is_contiguous() else grad


def _same_strides(param: Tensor, step: int, index: int) -> Tensor:
    """The parameter's strides even if it is not dense, because equal strides alone do not make a flat loop right."""
    grad = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device=param.device)
    return grad.copy_(_dense(param, step, index))


def nonfinite(param: Tensor, step: int, index: int) -> Tensor:
    """Dense, but tensor 0 (not an empty one) holds an inf in step 1 and a NaN in step 2, for skip_nonfinite."""
    grad = _dense(param, step, index)
    if index == 0 and step in (1, 2):
        grad[(-1,) * grad.dim()] = torch.inf if step == 1 else torch.nan
    return grad


# name -> history(param, step, index): the gradient of tensor number index in a step, or None
HISTORIES: dict[str, History] = {
    "dense": _dense,
    "zero": _zero,
    # what checkpoint libraries do before loading
    "zero_first": lambda p, step, i: _zero(p, step, i) if step == 0 else _dense(p, step, i),
    "never": lambda _p, _step, _i: None,
    "missing": lambda p, step, i: None if (step + i) % 3 == 0 else _dense(p, step, i),
    # a tensor's first step need not be the optimizer's; dampening must not apply in step 2
    "late": lambda p, step, i: None if step < 2 and i % 2 == 0 else _dense(p, step, i),
    "other_layout": _other_layout,
    "same_strides": _same_strides,
    # 1e-6 is subnormal in float16; the sum of squares of 1e3 overflows float16
    "tiny": lambda p, step, i: _dense(p, step, i, 1e-6),
    "large": lambda p, step, i: _dense(p, step, i, 1e3),
}


def make_grads(history: str, params: Sequence[Tensor], step: int) -> list[Tensor | None]:
    return [HISTORIES[history](param, step, index) for index, param in enumerate(params)]


# One tensor of shape (4, 6) in every memory layout that a parameter, gradient or buffer may have.
MEMORY: dict[str, Layout] = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.t().contiguous().t(),
    "columns": lambda x: torch.cat([x, x], dim=1)[:, :6],
    "every_second": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "offset": lambda x: torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(4, 6),
    "negative": lambda x: torch.complex(x, -x).conj().imag,  # a view whose sign bit is not in memory
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
}


class Subclass(Tensor):
    pass


# ---------------------------------------------------------------- tolerance
# Units of the dtype's eps for one step from equal values, relative to the largest number added up (the reference's
# param_sizes and buffer_sizes). Half types: arithmetic in float32, then v and w are each rounded once, half an eps; w
# may read v after its rounding: one eps together. Others: two norms of up to 4097 elements and some ten operations.
_EPS_UNITS = dict.fromkeys(REAL + COMPLEX, 32) | {torch.bfloat16: 1, torch.float16: 1}


def tolerance(dtype: torch.dtype, size: float = 1.0) -> dict[str, float]:
    """rtol and atol for torch.testing.assert_close; size: the reference's param_sizes[i] or buffer_sizes[i]."""
    info = torch.finfo(dtype)
    relative = _EPS_UNITS[dtype] * info.eps
    # the last term: the spacing of subnormal numbers, which float16 reaches with tiny gradients
    return {"rtol": relative, "atol": relative * size + info.smallest_normal * info.eps}


def kahan_tolerance(dtype: torch.dtype, size: float) -> float:
    """The same for the sum of a half-precision parameter and its compensation, absolute.

    Rounding takes up to half an eps from the parameter, and of that again half an eps is lost; float32 adds its own.
    """
    info = torch.finfo(dtype)
    of_float32 = _EPS_UNITS[torch.float32] * torch.finfo(torch.float32).eps
    return (info.eps**2 / 4 + of_float32) * size + info.smallest_normal * info.eps / 2
