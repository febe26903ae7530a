"""Param groups for a model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .advice import advise
from .options import check_lr

_NORMALISATION = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The names that torch gives to a layer's weight. parametrize renames it to `original`, and the new weight_norm calls the
# direction `original1`. prune and the old spectral_norm rename it to `weight_orig`, and the old weight_norm to `weight_v`.
_PARAMETRIZED = re.compile(r"\bparametrizations\.(\w+)\.original1?$|\b(\w+)_orig$|\b(weight)_v$")

# A name pattern or a module class.
Exclude: TypeAlias = str | type[nn.Module]
# The lr of tensors that are not adapted: a number, a tensor, or "same" for LARS's lr.
BiasLR: TypeAlias = float | Tensor | str


def param_groups(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    weight_decay: float,
    *,
    bias_lr: BiasLR | None = None,
    exclude_from_adaptation: Exclude | Iterable[Exclude] = (),
    adapt: Callable[[str, Tensor], bool] | None = None,
    unadapted: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Split parameters into two param groups: adapted weight matrices and kernels, and the rest, which is not adapted.

    The rest consists of

    - biases, the tensors named "bias";
    - vectors, the tensors with at most one dimension longer than 1, such as the gains of normalisation layers, LayerScale
      and class tokens. A tensor named "weight" with more than one dimension, as in ``Linear(n, 1)``, counts as a matrix,
      even if torch's parametrizations, weight norm, spectral norm or pruning rename it;
    - all tensors directly in a normalisation layer, which is one of torch's or a module whose class name ends in "Norm";
    - the tensors that ``exclude_from_adaptation`` selects.

    Args:
        model: a module, which may be wrapped by DistributedDataParallel or torch.compile, or named parameters such as
            ``model.named_parameters()``. With named parameters, the tensors of normalisation layers are recognised only by
            their shapes.
        weight_decay: weight decay of the adapted group, >= 0. The other group has none.
        bias_lr: lr of the tensors that are not adapted, >= 0, as a number or a 1-element tensor. They take plain SGD steps,
            so an lr of SGD's size suits them, and 0.1 is a good start. "same" gives them LARS's lr, as in most published
            recipes, whose networks have normalisation layers. Without such layers, LARS's lr ruins training. None (default)
            is like "same", but warns if ``model`` is a module without normalisation layers.
        exclude_from_adaptation: further tensors that are not adapted, as one item or several. An item may be a name
            pattern, such as ``"*pos_embed"`` or ``"head.*"``. It works like Python's ``fnmatch``, so "*" also matches dots,
            and it may match a name with or without the prefixes that wrappers add. An item may also be a module class, such
            as ``nn.Embedding``, which selects the parameters directly in modules of that class. The selected tensors still
            train, in the second group. To leave tensors out of the optimizer, pass only the modules that should train.
        adapt: a function that takes a name and a parameter and returns whether to adapt it. It replaces the first three
            rules above. ``adapt=lambda name, param: param.ndim > 1`` is the rule of MoCo v3, MAE and Barlow Twins.
        unadapted: further options for the group that is not adapted, such as ``{"momentum": 0.5}``.

    Returns:
        A group with ``adapt=True`` and one with ``adapt=False``, both with (name, parameter) pairs. An empty group is left out.
        Every parameter is in exactly one group. A shared parameter has its first name. Frozen parameters are included,
        because you may unfreeze them later. A step does not change parameters without a gradient.

    Raises:
        ValueError: if there are no parameters, if two have the same name, or if a lazy module has not run yet; if an
            ``exclude_from_adaptation`` matches nothing (the error gives the nearest names); if ``bias_lr`` is out of
            range, or given together with an "lr" in ``unadapted``; if ``unadapted`` has "adapt" or "params".
        TypeError: if parameters have no names; if an ``exclude_from_adaptation`` is neither a pattern nor a class, or is a
            class although ``model`` is not a module; if ``adapt`` returns neither True nor False.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> adapted, rest = fastlars.param_groups(model, weight_decay=1e-4, bias_lr=0.1)
        >>> [name for name, _ in adapted["params"]], [name for name, _ in rest["params"]]
        (['0.weight'], ['0.bias', '1.weight', '1.bias'])
    """
    named = _named_parameters(model)
    for key in ("params", "adapt"):
        if key in (unadapted or {}):
            raise ValueError(f"unadapted must hold options of the group that is not adapted, got {key!r}; leave it out")
    of_the_rest = {"weight_decay": 0.0, "adapt": False, **_lr_of_the_rest(bias_lr, unadapted), **(unadapted or {})}
    excluded = _excluded(model, named, exclude_from_adaptation)
    of_norms = _of_normalisation_layers(model)

    groups: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
    for name, param in named:
        chosen = adapt(name, param) if adapt else not (_is_bias_or_vector(name, param) or param in of_norms)
        if not isinstance(chosen, bool):
            raise TypeError(f"adapt must return True or False for every parameter, got {chosen!r} for {name!r}")
        groups[chosen and param not in excluded].append((name, param))
    both = [
        {"params": groups[True], "weight_decay": weight_decay, "adapt": True},
        {"params": groups[False], **of_the_rest},
    ]
    if bias_lr is None and "lr" not in of_the_rest and all(groups.values()) and not has_normalisation(model):
        advise(
            "param_groups: this model has no normalisation layers, and its biases and other tensors that are not adapted "
            "will take plain SGD steps at LARS's lr, which ruins training. Pass bias_lr=0.1, or another lr of SGD's size. "
            'If you do want LARS\'s lr for them, pass bias_lr="same".'
        )
    return [group for group in both if group["params"]]


def _lr_of_the_rest(bias_lr: BiasLR | None, unadapted: Mapping[str, Any] | None) -> dict[str, Any]:
    if bias_lr is not None and "lr" in (unadapted or {}):
        raise ValueError(f"bias_lr={bias_lr!r} and unadapted={unadapted!r} both set an lr; leave one out")
    if isinstance(bias_lr, str) and bias_lr != "same":
        raise ValueError(f'bias_lr must be a number, a tensor or "same", got {bias_lr!r}')
    if bias_lr is None or isinstance(bias_lr, str):
        return {}
    check_lr(bias_lr, "param_groups", "bias_lr")
    return {"lr": bias_lr}


def has_normalisation(model: nn.Module | Iterable[tuple[str, Tensor]]) -> bool:
    """Whether a module has normalisation layers, with or without parameters.

    Also True for an iterable of named parameters, which does not reveal the layers.
    """
    return not isinstance(model, nn.Module) or any(map(_normalises, model.modules()))


def _normalises(module: nn.Module) -> bool:
    kind = type(module)
    # weight norm and spectral norm (torch.nn.utils) do not count, because they normalise weights, not activations
    named = "norm" in kind.__name__.lower() and not kind.__module__.startswith("torch.nn.utils")
    return isinstance(module, _NORMALISATION) or named


def _named_parameters(model: nn.Module | Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The (name, parameter) pairs of a model. A shared parameter is listed once, under its first name."""
    named = list(model.named_parameters()) if isinstance(model, nn.Module) else list(model)
    if not all(map(_is_named_parameter, named)):
        raise TypeError("param_groups needs a module or (name, parameter) pairs; pass model.named_parameters()")
    if not named:
        raise ValueError("param_groups got no parameters; pass a module that has some, or its named_parameters()")
    if lazy := [name for name, param in named if is_lazy(param)]:
        raise ValueError(
            f"param_groups needs the shapes of parameters, and {lazy[0]!r} has none yet; run the model once, because a lazy "
            "module takes its shapes from its first input"
        )
    first_names: dict[Tensor, str] = {}
    for name, param in named:
        first_names.setdefault(param, name)
    by_name: dict[str, Tensor] = {}
    for param, name in first_names.items():
        if name in by_name:
            raise ValueError(
                f"two parameters are named {name!r}; give named_parameters() a prefix, as in "
                'head.named_parameters(prefix="head")'
            )
        by_name[name] = param
    return list(by_name.items())


def _is_named_parameter(item: object) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Tensor)


def _is_bias_or_vector(name: str, param: Tensor) -> bool:
    leaf = unwrapped(name).rpartition(".")[2]
    is_vector = sum(size != 1 for size in param.shape) <= 1
    return leaf == "bias" or param.ndim <= 1 or (is_vector and leaf != "weight")


def _of_normalisation_layers(model: nn.Module | Iterable[tuple[str, Tensor]]) -> set[Tensor]:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    layers = [each for each in modules if isinstance(each, _NORMALISATION) or type(each).__name__.endswith("Norm")]
    return {param for layer in layers for param in _own_parameters(layer)}


def _own_parameters(module: nn.Module) -> Iterator[Tensor]:
    """Parameters directly in the module, or moved by torch.nn.utils.parametrize into a submodule."""
    yield from module.parameters(recurse=False)
    if isinstance(parametrizations := getattr(module, "parametrizations", None), nn.ModuleDict):
        yield from parametrizations.parameters()


def _excluded(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    named: list[tuple[str, Tensor]],
    items: Exclude | Iterable[Exclude],
) -> set[Tensor]:
    excluded: set[Tensor] = set()
    for item in [items] if isinstance(items, (str, type)) else items:
        if isinstance(item, str):
            wanted, known = item, [name for name, _ in named]
            found = {p for n, p in named if fnmatchcase(n, wanted) or fnmatchcase(unwrapped(n), wanted)}
        elif isinstance(item, type) and issubclass(item, nn.Module):
            if not isinstance(model, nn.Module):
                raise TypeError(
                    f"exclude_from_adaptation: {item.__name__} needs a module; pass the model, not named parameters"
                )
            owners = [module for module in model.modules() if next(_own_parameters(module), None) is not None]
            wanted, known = item.__name__, [type(module).__name__ for module in owners]
            found = {p for module in owners if isinstance(module, item) for p in _own_parameters(module)}
        else:
            raise TypeError(f"exclude_from_adaptation must hold name patterns and module classes, got {item!r}")
        if not found:
            nearest = ", ".join(map(repr, _nearest(wanted, known)))
            raise ValueError(f"exclude_from_adaptation: {wanted!r} matches no parameter; the nearest are {nearest}")
        excluded |= found
    return excluded


def _nearest(wanted: str, known: Iterable[str]) -> list[str]:
    """The three names that are most similar to ``wanted``."""
    literal = re.sub(r"[*?]|\[.*?\]", "", wanted.lower())  # wildcards are not part of a name

    def likeness(name: str) -> float:
        matcher = difflib.SequenceMatcher(None, literal, name.lower(), autojunk=False)
        return sum(block.size for block in matcher.get_matching_blocks() if block.size > 1) + matcher.ratio()

    return sorted(dict.fromkeys(known), key=likeness, reverse=True)[:3]


def unwrapped(name: str) -> str:
    """A parameter's name without the parts that DDP, torch.compile, FSDP, parametrize and prune add."""
    return _PARAMETRIZED.sub(r"\1\2\3", _WRAPPERS.sub("", name))
