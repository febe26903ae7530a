"""Whoever brings another library's option name, or misspells ours, hears ours; a tag that merely looks like one passes."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from fastlars import LARS
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
# what users write into groups for themselves
LOOK_ALIKES = {"lr0": "lr", "used": "fused", "damping": "dampening", "lrs": "lr", **MISSPELT}


def param() -> Parameter:
    return Parameter(torch.ones(3))


def make(**group: Any) -> LARS:
    return LARS([{"params": [param()], **group}], lr=0.5, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("name", FOREIGN)
def test_other_libraries_names_are_refused_wherever_they_are_given(name: str) -> None:
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


def test_the_names_of_the_libraries_that_people_come_from() -> None:
    """Their signatures, written down apart from the table: timm, torchlars, apex, solo-learn, FAIR's, TF, MXNet."""
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
    with warnings.catch_warnings():  # whose groups have it already knows
        warnings.simplefilter("error")
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        copy.deepcopy(optimizer).step()
