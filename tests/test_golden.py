"""The numbers of tests/golden.json. After a change of numbers, run `python tests/golden.py` and add an entry to CHANGELOG.md.

float64 values hold everywhere, to 1e-12. float32 bits hold exactly with torch 2.13 and later on x86-64 with AVX2 or AVX512,
which agree. Older versions and other processors round in another order. There each number holds to one unit in the last
place per step, of the largest number of its tensor.
"""

import json

import pytest
import torch

import golden
from cases import OPTIONS
from harness import IMPLEMENTATIONS, ignore_nothing_adapted, loop_over

pytestmark = ignore_nothing_adapted

GOLDEN = json.loads(golden.PATH.read_text(encoding="utf-8"))
INPUTS, CASES = GOLDEN["inputs"], GOLDEN["cases"]
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
SAME_BITS = VERSION >= (2, 13) and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
cases = pytest.mark.parametrize("name", CASES)


def assert_within_a_unit_a_step(actual: list[float], expected: list[float], name: str) -> None:
    _, sizes = golden.float64(INPUTS, CASES[name]["options"])
    limit = golden.STEPS * torch.finfo(torch.float32).eps
    wrong = [row for row in zip(actual, expected, sizes, strict=True) if not abs(row[0] - row[1]) <= limit * row[2]]
    assert not wrong


@cases
def test_float64_is_the_reference(name: str) -> None:
    assert golden.float64(INPUTS, CASES[name]["options"])[0] == pytest.approx(CASES[name]["float64"], rel=1e-12)


@cases
@loop_over("implementation", IMPLEMENTATIONS)
def test_float32_bits(name: str, implementation: str) -> None:
    expected = CASES[name]["float32"][implementation]
    actual = golden.float32(INPUTS, CASES[name]["options"], IMPLEMENTATIONS[implementation])
    if SAME_BITS:
        assert golden.to_hex(actual) == expected
    assert_within_a_unit_a_step(actual, golden.from_hex(expected), name)


@cases
@loop_over("implementation", IMPLEMENTATIONS)
def test_the_bits_are_those_of_the_right_numbers(name: str, implementation: str) -> None:
    """The recorded numbers are right, not merely what came out."""
    bits = golden.from_hex(CASES[name]["float32"][implementation])
    assert_within_a_unit_a_step(bits, CASES[name]["float64"], name)


def test_the_file_is_of_these_cases() -> None:
    assert {name: case["options"] for name, case in CASES.items()} == {name: OPTIONS[name] for name in golden.NAMES}
    assert json.dumps(golden.inputs()["shapes"]) == json.dumps(INPUTS["shapes"])
    assert golden.PATH.stat().st_size < 1 << 16
