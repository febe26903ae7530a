"""One list of options, the same in the class, the function, the param groups and the documentation."""

import inspect
import typing
from typing import Any

import pytest
import torch

from fastlars import LARS, lars
from fastlars.options import Options

# positional arguments of code written for Lightning Bolts' LARS
BOLTS = ["params", "lr", "momentum", "dampening", "weight_decay", "nesterov", "trust_coefficient", "eps"]
TENSORS = ["params", "grads", "momentum_buffers"]
OF_A_SCALER = ["grad_scale", "found_inf"]


def parameters(of: Any) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(of).parameters.items() if name != "self"}


def test_names_order_and_defaults_are_the_same_everywhere() -> None:
    of_class, of_function, fields = parameters(LARS), parameters(lars), parameters(Options)
    names = list(Options._fields)
    assert list(fields) == names
    assert list(of_class) == ["params", *names, "dialect"]  # it stands for some of them
    assert list(of_function) == [*TENSORS, *names, *OF_A_SCALER, "compensations"]
    for name in names[1:]:
        default = Options._field_defaults[name]
        for where in (of_class, of_function, fields):
            # `is` for truth values, because 0 == False
            assert where[name].default == default and type(where[name].default) is type(default), name
    assert all(of_function[name].default is None for name in (*OF_A_SCALER, "compensations"))
    # lr has no default: the class has torch's marker, because a group may have its own
    for where in (of_function, fields):
        assert where["lr"].default is inspect.Parameter.empty
    assert repr(of_class["lr"].default) == "<required parameter>"


def test_kinds() -> None:
    of_class = parameters(LARS)
    assert list(of_class)[:8] == BOLTS
    for name, parameter in of_class.items():
        by_position = name in BOLTS
        expected = inspect.Parameter.POSITIONAL_OR_KEYWORD if by_position else inspect.Parameter.KEYWORD_ONLY
        assert parameter.kind is expected, name
    # TorchScript has no keyword-only arguments with defaults
    assert {p.kind for p in parameters(lars).values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_the_class_and_its_init_show_the_same_signature() -> None:
    """A decorator of __init__ must not show (*args, **kwargs), because command-line parsers and editors read the signature."""
    assert parameters(LARS) == parameters(LARS.__init__)
    assert LARS.__init__.__qualname__ == "LARS.__init__"


def test_annotations_name_the_same_kinds_of_values() -> None:
    """In different spellings: TorchScript needs Optional[bool], other files use bool | None."""
    of_the_class = typing.get_type_hints(LARS.__init__, localns={"ParamsT": object})
    of_the_function, of_the_options = typing.get_type_hints(lars), typing.get_type_hints(Options)
    for name in Options._fields:
        assert of_the_class[name] == of_the_function[name] == of_the_options[name], name


@pytest.mark.parametrize("named", [False, True])
def test_group_keys_are_the_options(named: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    (group,) = LARS([("weight", weight)] if named else [weight], lr=0.1, adapt=True).param_groups
    names = {"param_names"} if named else set()
    assert group.keys() == {"params", *Options._fields} | names
    assert {name: group[name] for name in Options._fields} == Options(0.1)._asdict() | {"adapt": True}


def test_help_explains_every_option() -> None:
    described = inspect.getdoc(LARS)
    arguments = described[described.index("Args:") : described.index("Raises:")]
    for name in ("params", *Options._fields):
        assert f"\n    {name}: " in arguments, name
    for name in (*TENSORS[:1], "lr", *OF_A_SCALER, "compensations"):
        assert f"    {name}: " in inspect.getdoc(lars)
