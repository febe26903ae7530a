"""param_groups holds every parameter once, in the group that its rules say."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

from fastlars import DIALECTS, LARS, param_groups
from fastlars.schedules import warmup_cosine

# most of these models have no normalisation layers; test_bias_lr.py tests the warning
pytestmark = pytest.mark.filterwarnings("ignore:param_groups. this model has no normalisation layers")


class Scaling(nn.Module):
    """A parameter of the given shape and name."""

    def __init__(self, *shape: int, name: str = "weight") -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class ChannelNorm(Scaling):
    """A custom normalisation layer."""


class PreNorm(nn.Module):
    """Named like a normalisation layer, but it wraps something else."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((4, 4))
        self.inner = nn.Linear(4, 4)


class Rescaler(nn.RMSNorm):
    """A normalisation layer only by its base class."""


class Affine(Scaling):
    """A gain per channel whose name is neither norm nor weight."""


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    model[1].weight = model[0].weight
    return model


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[:2].requires_grad_(False)
    return model


class Doubled(nn.Module):
    """A parametrization without parameters of its own."""

    def forward(self, original: Tensor) -> Tensor:
        return 2 * original


def doubled(module: nn.Module, name: str = "weight") -> nn.Module:
    return register_parametrization(module, name, Doubled())


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # importing Inductor warns, and nothing is run


# model, and the names of its adapted parameters
MODELS: dict[str, tuple[nn.Module, list[str]]] = {
    "conv_bn": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), ["0.weight", "2.weight"]),
    "transformer": (
        nn.TransformerEncoderLayer(8, 2, 16),
        ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"],
    ),
    "attention": (
        nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
    ),
    "lstm": (nn.LSTM(4, 3, proj_size=2), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
    "embedding": (nn.Embedding(5, 4), ["weight"]),
    "tied": (tied(), ["0.weight"]),
    "frozen": (frozen(), ["0.weight", "2.weight"]),
    "norms_of_matrices": (
        nn.Sequential(nn.LayerNorm((4, 4)), nn.RMSNorm((4, 4)), Rescaler((4, 4)), ChannelNorm(4, 1)),
        [],
    ),
    "nested_norms": (
        nn.Sequential(nn.Sequential(PreNorm()), nn.ModuleDict({"a": PreNorm()})),
        ["0.0.inner.weight", "1.a.inner.weight"],
    ),
    "bias_of_a_matrix": (nn.Sequential(Scaling(4, 4, name="bias"), Scaling(4, 4, name="bias_k")), ["1.bias_k"]),
    "scalar": (nn.Sequential(Scaling(), nn.PReLU(), Scaling(0, 3)), ["2.weight"]),
    # class token, LayerScale in channels-first nets, global response norm, and one matrix of one row
    "vectors_of_many_dimensions": (
        nn.Sequential(Scaling(1, 1, 4, name="cls_token"), Affine(4, 1, 1, name="layer_scale"),
                      Affine(1, 1, 1, 4, name="gamma"), nn.Linear(4, 1)),
        ["3.weight"],
    ),
    "parametrized": (
        nn.Sequential(doubled(nn.Linear(4, 3)), doubled(nn.Linear(4, 1)), doubled(nn.LayerNorm((4, 4))),
                      weight_norm(nn.Linear(4, 3)), doubled(Scaling(4, 4, name="bias"), "bias")),
        ["0.parametrizations.weight.original", "1.parametrizations.weight.original",
         "3.parametrizations.weight.original1"],
    ),
    "meta": (nn.Sequential(nn.Linear(4, 3, device="meta"), nn.LayerNorm(3, device="meta")), ["0.weight"]),
    "compiled": (compiled(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm((3, 3)))), ["_orig_mod.0.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_occurs_once_with_its_name(model: str) -> None:
    module, adapted = MODELS[model]
    groups = param_groups(module, weight_decay=0.1)
    named = dict(module.named_parameters())
    pairs = [pair for group in groups for pair in group["params"]]
    assert sorted(name for name, _ in pairs) == sorted(named)
    assert all(named[name] is param for name, param in pairs)
    assert {name for group in groups if group["adapt"] for name, _ in group["params"]} == set(adapted)
    assert all(group["params"] and group["weight_decay"] == (0.1 if group["adapt"] else 0) for group in groups)

    optimizer = LARS(groups, lr=0.1)
    kept = [(n, p) for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)]
    assert [(name, id(param)) for name, param in kept] == [(name, id(param)) for name, param in pairs]
    for param in named.values():
        param.grad = torch.randn_like(param)
    if model != "meta":  # it has no values
        assert list(optimizer.trust_ratios()) == [name for name in named if name in adapted]
    optimizer.step()


def test_frozen_parameters_are_included() -> None:
    model = frozen()
    optimizer = LARS(param_groups(model, 0.1), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    for moved in ([4, 5], [0, 1, 2, 3, 4, 5]):
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        assert [i for i, p in enumerate(model.parameters()) if not torch.equal(p, before[i])] == moved
        model.requires_grad_(True)
        optimizer.zero_grad()


@pytest.mark.parametrize("given", ["module", "list", "generator"])
def test_named_parameters_work_like_a_module(given: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    source = {"module": model, "list": list(model.named_parameters()), "generator": model.named_parameters()}[given]
    adapted, rest = param_groups(source, 0.1)
    assert [name for name, _ in adapted["params"]] == ["0.weight"]
    assert [name for name, _ in rest["params"]] == ["0.bias", "1.weight", "1.bias"]
    # the same tensor twice, so once, under its first name
    twice = [*model.named_parameters(), ("again", model[0].weight)]
    assert [len(group["params"]) for group in param_groups(twice, 0.1)] == [1, 3]
    assert names_of(param_groups(twice, 0.1)) == ["0.weight"]


def test_options_of_the_group_that_is_not_adapted() -> None:
    model = nn.Linear(4, 3)
    unadapted = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01}
    adapted, rest = LARS(param_groups(model, 0.2, unadapted=unadapted), lr=8.0, momentum=0.9).param_groups
    assert (adapted["lr"], adapted["momentum"], adapted["weight_decay"], adapted["adapt"]) == (8.0, 0.9, 0.2, True)
    assert (rest["lr"], rest["momentum"], rest["weight_decay"], rest["adapt"]) == (0.1, 0.5, 0.01, False)
    assert unadapted == {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01}
    with pytest.warns(
        UserWarning, match="param group 1: 'momentun' is not an option of LARS .* did you mean 'momentum'"
    ):
        LARS(param_groups(model, 0.2, unadapted={"momentun": 0.5}), lr=8.0)
    with pytest.raises(ValueError, match="param group 0: weight_decay must be a finite number >= 0, got -1"):
        LARS(param_groups(model, -1), lr=8.0)


def test_without_weight_decay_the_weights_are_still_adapted() -> None:
    model = nn.Linear(4, 3)
    optimizer = LARS(param_groups(model, 0.0), lr=1.0)
    model(torch.ones(1, 4)).sum().backward()
    assert list(optimizer.trust_ratios()) == ["weight"]
    optimizer.step()  # no warning that nothing is adapted


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (nn.Linear(2, 2).parameters(), TypeError, r"pass model.named_parameters\(\)"),
        (nn.Linear(2, 2).state_dict(), TypeError, r"pass model.named_parameters\(\)"),
        ([(0, nn.Parameter(torch.ones(2)))], TypeError, r"pass model.named_parameters\(\)"),
        ([(nn.Parameter(torch.ones(2)), "weight")], TypeError, r"pass model.named_parameters\(\)"),
        ([("weight", "bias")], TypeError, r"pass model.named_parameters\(\)"),
        (nn.ReLU(), ValueError, "got no parameters; pass a module that has some"),
        ([], ValueError, "got no parameters"),
        (
            [("weight", nn.Parameter(torch.ones(2))), ("weight", nn.Parameter(torch.ones(2)))],
            ValueError,
            r"two parameters are named 'weight'; .* head.named_parameters\(prefix=\"head\"\)",
        ),
    ],
)
def test_errors(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        param_groups(source, 0.1)


# ---------------------------------------------------------------- exclude, adapt
class VisionTransformer(nn.Module):
    """The names and shapes of one, without the computation."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.words = nn.Embedding(7, 8)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, bias=False) for _ in range(2)])
        self.head = nn.Linear(8, 7)
        self.head.weight = self.words.weight


MATRICES = [
    f"blocks.{i}.{name}"
    for i in range(2)
    for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
]
DEFAULT = ["pos_embed", "patch_embed.weight", "words.weight", *MATRICES]
# patterns to exclude, and the names that they remove from the default
EXCLUDES: dict[str, tuple[Any, list[str]]] = {
    "nothing": ((), []),
    "pattern": ("*pos_embed", ["pos_embed"]),
    "name": ("patch_embed.weight", ["patch_embed.weight"]),
    "what_is_left_out_anyway": ("cls_token", []),
    "several": (["pos_embed", "blocks.1.*"], ["pos_embed", *MATRICES[4:]]),
    "question_mark": ("blocks.?.linear1.weight", [MATRICES[2], MATRICES[6]]),
    "choice": ("blocks.[1-9].linear1.weight", [MATRICES[6]]),
    "generator": ((name for name in ("pos_embed", "words.*")), ["pos_embed", "words.weight"]),
    "class": (nn.Embedding, ["words.weight"]),
    # the embedding again, under its other owner
    "class_of_tied_weights": (nn.Linear, [*(f"blocks.{i}.{n}.weight" for i in range(2) for n in
                                            ("self_attn.out_proj", "linear1", "linear2")), "words.weight"]),
    "classes_and_patterns": ({nn.Embedding, "*_embed*"}, ["pos_embed", "patch_embed.weight", "words.weight"]),
    "base_class": (nn.modules.conv._ConvNd, ["patch_embed.weight"]),
    # only parameters directly in the module, not those of layers inside it
    "class_of_a_block": (nn.MultiheadAttention, [MATRICES[0], MATRICES[4]]),
}  # fmt: skip


def names_of(groups: list[dict[str, Any]], adapt: bool = True) -> list[str]:
    return [name for group in groups if group["adapt"] is adapt for name, _ in group["params"]]


@pytest.mark.parametrize("case", EXCLUDES)
def test_exclude(case: str) -> None:
    exclude, taken = EXCLUDES[case]
    model = VisionTransformer()
    groups = param_groups(model, 0.1, exclude_from_adaptation=exclude)
    assert names_of(groups) == [name for name in DEFAULT if name not in taken]
    assert {*names_of(groups, adapt=False), *names_of(groups)} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    "wrap",
    [
        compiled,
        nn.Sequential,  # not a wrapper, so names change, and patterns with them
        lambda model: nn.ModuleDict({"module": model}),  # the names that DistributedDataParallel gives
        lambda model: compiled(nn.ModuleDict({"module": model})),
        lambda model: nn.ModuleDict({"module": compiled(model)}),
    ],
    ids=["compile", "Sequential", "DDP", "compile(DDP)", "DDP(compile)"],
)
def test_patterns_reach_through_wrappers(wrap: Any) -> None:
    model = wrap(VisionTransformer())
    is_wrapper = not isinstance(model, nn.Sequential)
    pattern = "pos_embed" if is_wrapper else "0.pos_embed"
    groups = param_groups(model, 0.1, exclude_from_adaptation=[pattern, nn.Embedding])
    assert len(names_of(groups)) == len(DEFAULT) - 2
    assert [name for name in names_of(groups, adapt=False) if name.endswith("pos_embed")] == [
        name for name, _ in model.named_parameters() if name.endswith("pos_embed")
    ]  # names are kept as the module gives them
    compiled_layer = nn.Sequential(compiled(nn.Linear(3, 3)), nn.Linear(3, 3))
    assert names_of(param_groups(compiled_layer, 0.1, exclude_from_adaptation="0.weight")) == ["1.weight"]


@pytest.mark.parametrize(
    ("exclude", "error", "message"),
    [
        (
            "pos_emb",
            ValueError,
            "exclude_from_adaptation: 'pos_emb' matches no parameter; the nearest are 'pos_embed', ",
        ),
        ("*.pos_embed", ValueError, r"'\*.pos_embed' matches no parameter; the nearest are 'pos_embed', "),
        ("Head.*", ValueError, r"'Head.\*' matches no parameter; the nearest are 'head."),
        (["pos_embed", "nowhere"], ValueError, "'nowhere' matches no parameter"),
        ("", ValueError, "'' matches no parameter"),
        (nn.GRU, ValueError, "'GRU' matches no parameter; the nearest are '"),
        (nn.EmbeddingBag, ValueError, "'EmbeddingBag' matches no parameter; the nearest are 'Embedding', "),
        (nn.ModuleList, ValueError, "'ModuleList' matches no parameter"),
        (
            nn.Linear(2, 2),
            TypeError,
            "object is not iterable|exclude_from_adaptation must hold name patterns and module classes",
        ),
        (
            [nn.Linear(2, 2)],
            TypeError,
            "exclude_from_adaptation must hold name patterns and module classes, got Linear",
        ),
        (int, TypeError, "exclude_from_adaptation must hold name patterns and module classes, got <class 'int'>"),
        ([None], TypeError, "exclude_from_adaptation must hold name patterns and module classes, got None"),
    ],
)
def test_an_exclude_that_excludes_nothing_is_an_error(exclude: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        param_groups(VisionTransformer(), 0.1, exclude_from_adaptation=exclude)


def test_classes_need_the_module() -> None:
    named = VisionTransformer().named_parameters()
    with pytest.raises(
        TypeError, match="exclude_from_adaptation: Embedding needs a module; pass the model, not named parameters"
    ):
        param_groups(named, 0.1, exclude_from_adaptation=nn.Embedding)


def test_adapt_replaces_the_rule_but_not_exclude() -> None:
    model = nn.Sequential(nn.LayerNorm((4, 4)), Scaling(1, 1, 4, name="cls_token"), nn.Linear(4, 4))
    assert names_of(param_groups(model, 0.1)) == ["2.weight"]
    by_ndim = param_groups(model, 0.1, adapt=lambda _, param: param.ndim > 1)
    assert names_of(by_ndim) == ["0.weight", "0.bias", "1.cls_token", "2.weight"]
    by_name = param_groups(model, 0.1, adapt=lambda name, _: name.endswith("bias"), exclude_from_adaptation="0.*")
    assert names_of(by_name) == ["2.bias"]
    everything = param_groups(model, 0.1, adapt=lambda name, param: True)
    assert [group["adapt"] for group in everything] == [True]
    for answer in (None, 1, torch.tensor(True), "yes"):
        with pytest.raises(TypeError, match=r"adapt must return True or False .* got .* for '0.weight'"):
            param_groups(model, 0.1, adapt=lambda name, param, answer=answer: answer)


@pytest.mark.parametrize("key", ["params", "adapt"])
def test_unadapted_accepts_only_options(key: str) -> None:
    with pytest.raises(ValueError, match=f"unadapted must hold options of the group .* got '{key}'; leave it out"):
        param_groups(nn.Linear(2, 2), 0.1, unadapted={key: True})


def test_barlow_twins_two_learning_rates() -> None:
    """Each parameter's lr over a schedule, as in the authors' program: two groups by dimensions, with two peaks."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2, bias=False))
    scale = 2048 / 256
    groups = param_groups(model, 1e-6, adapt=lambda _, p: p.ndim != 1, bias_lr=0.0048 * scale)
    optimizer = LARS(groups, lr=0.2 * scale, momentum=0.9, **DIALECTS["byol"] | {"adapt": None})
    scheduler = warmup_cosine(optimizer, 10, 100, end_factor=0.001)
    for step in range(100):
        if step < 10:
            share = (step + 1) / 10
        else:
            q = 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))
            share = q + 0.001 * (1 - q)
        lrs = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]}
        expected = {n: share * scale * (0.0048 if p.ndim == 1 else 0.2) for n, p in model.named_parameters()}
        assert lrs == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        scheduler.step()
