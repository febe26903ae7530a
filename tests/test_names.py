"""Another library's option name, or a misspelt one, raises an error that gives ours. A tag that only looks like one passes."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from fastlars import DIALECTS, LARS
from fastlars.names import FOREIGN
from fastlars.options import NAMES

MISSPELT = {
    "trust_coefficent": "trust_coefficient",
    "weight_deacy": "weight_decay",
    "momentun": "momentum",
    "LR": "lr",
    "Nesterov": "nesterov",
    "adapted": "adapt",
    "lrinmomentum": "lr_in_momentum",
}
# keys that users write into groups for their own use
LOOK_ALIKES = {"lr0": "lr", "used": "fused", "damping": "dampening", "lrs": "lr", **MISSPELT}


def param() -> Parameter:
    return Parameter(torch.ones(3))


def make(**group: Any) -> LARS:
    return LARS([{"params": [param()], **group}], lr=0.5, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("name", FOREIGN)
def test_other_libraries_names_are_refused_everywhere(name: str) -> None:
    ours = FOREIGN[name]
    sentence = f"'{name}' is called {ours} here" if ours in NAMES else f"'{name}' is not an option of LARS; "
    with pytest.raises(TypeError, match=f"^{sentence}"):
        LARS([param()], lr=0.5, **{name: 0.1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^param group 0: {sentence}"):
        make(**{name: 0.1})
    optimizer = make()
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    with pytest.raises(ValueError, match=f"^param group 1: {sentence}"):
        optimizer.add_param_group({"params": [param()], name: 0.1})
    saved["param_groups"][0][name] = 0.1
    with pytest.raises(ValueError, match=f"^param group 0: {sentence}.*convert_state_dict"):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict() == before


def test_the_table_has_the_names_of_other_libraries() -> None:
    """Their signatures, written down separately from the table: timm, torchlars, apex, solo-learn, FAIR's, TF, MXNet."""
    theirs = [
        "eta",
        "trust_coef",
        "trust_coeff",
        "eeta",
        "epsilon",
        "wd",
        "lars_exclude",
        "exclude_bias_n_norm",
        "always_adapt",
        "clip_lr",
        "clip",
        "weight_decay_filter",
        "lars_adaptation_filter",
    ]
    assert FOREIGN.keys() >= set(theirs)
    assert not FOREIGN.keys() & set(NAMES)
    assert all(ours in NAMES or ours.count(" ") > 3 for ours in FOREIGN.values())


@pytest.mark.parametrize(("key", "meant"), MISSPELT.items())
def test_a_misspelt_argument_is_an_error_with_the_nearest_name(key: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"^'{key}' is not an option of LARS; did you mean '{meant}'"):
        LARS([param()], lr=0.5, **{key: 0.1})  # type: ignore[arg-type]


@pytest.mark.parametrize(("key", "meant"), LOOK_ALIKES.items())
def test_a_group_key_that_looks_like_an_option_warns_and_passes(key: str, meant: str) -> None:
    message = f"param group 0: '{key}' is not an option of LARS and has no effect; did you mean '{meant}'"
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer = make(**{key: "mine"})
    assert [warning.filename for warning in caught] == [__file__]
    assert optimizer.param_groups[0][key] == "mine"
    other = make()
    with pytest.warns(UserWarning, match=message):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0][key] == "mine"
    with warnings.catch_warnings():  # no warning for a key that the groups already have
        warnings.simplefilter("error")
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        copy.deepcopy(optimizer).step()


# ---------------------------------------------------------------- dialect=
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dialect_by_name_gives_its_options(dialect: str) -> None:
    rows = [
        LARS([param()], lr=0.5, dialect=dialect),
        LARS([param()], lr=0.5, **DIALECTS[dialect]),
        LARS([{"params": [param()], "dialect": dialect}], lr=0.5),
    ]
    first, *others = [[{**g, "params": None} for g in o.param_groups] for o in rows]
    assert all(other == first for other in others)
    assert "dialect" not in rows[0].param_groups[0]  # only options are kept


def test_given_options_override_the_dialect() -> None:
    (group,) = LARS([param()], lr=0.5, dialect="simclr", eps=1e-8, lr_in_momentum=False).param_groups
    assert (group["eps"], group["lr_in_momentum"], group["trust_denominator"]) == (1e-8, False, "joint")
    (group,) = LARS([param()], 0.5, 0.9, 0.0, 0.1, False, 0.002, 1e-8, dialect="larc").param_groups  # by position
    assert (group["trust_coefficient"], group["eps"], group["trust_clip"]) == (0.002, 1e-8, True)
    groups = LARS([{"params": [param()], "adapt": False, "dialect": "byol"}], lr=0.5, dialect="paper").param_groups
    assert (groups[0]["adapt"], groups[0]["trust_denominator"], groups[0]["lr_in_momentum"]) == (False, "joint", True)
    assert LARS([param()], lr=0.5, adapt=True, dialect=None).param_groups[0]["eps"] == 1e-8
    with pytest.raises(TypeError, match="multiple values for argument 'momentum'"):
        LARS([param()], 0.5, 0.9, momentum=0.9, dialect="byol")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("misspelt", "nearest"), [("simlcr", "simclr"), ("SimCLR", "simclr"), ("LARC", "larc"), (3, "")]
)
def test_a_misspelt_dialect_raises_with_the_nearest_name(misspelt: Any, nearest: str) -> None:
    message = f"there is no dialect {misspelt!r}; did you mean '{nearest}.* The dialects are bolts, "
    with pytest.raises(ValueError, match=f"^LARS: {message}"):
        LARS([param()], lr=0.5, dialect=misspelt)
    with pytest.raises(ValueError, match=f"^param group 0: {message}"):
        make(dialect=misspelt)
    with pytest.raises(TypeError, match="'dialct' is not an option of LARS; did you mean 'dialect'"):
        LARS([param()], lr=0.5, dialct="simclr")  # type: ignore[call-arg]


def test_repr_names_the_dialect() -> None:
    """By the formula, so also after loading and if numbers are overridden. The default's formula has no name."""
    for dialect, row in DIALECTS.items():
        named = f"adapted as in {dialect}, " in repr(LARS([param()], lr=0.5, weight_decay=0.1, dialect=dialect))
        assert named == bool(row.keys() & {"trust_clip", "trust_denominator", "lr_in_momentum"}), dialect
    optimizer = LARS([param()], lr=0.5, dialect="simclr", eps=1e-6)
    other = LARS([param()], lr=0.5, adapt=True)
    other.load_state_dict(optimizer.state_dict())
    assert "adapted as in simclr, fused\n        lr=0.5, eps=1e-06, adapt=True, " in repr(other)
    assert ", adapted, fused\n" in repr(LARS([param()], lr=0.5, weight_decay=0.1))
    assert "as in" not in repr(
        LARS([param()], lr=0.5, dialect="larc", trust_denominator="joint")
    )  # no dialect has this formula
