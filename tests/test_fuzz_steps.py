"""After any operation on a live optimizer, a step equals the float64 reference, or it raises and nothing changes.

The suite runs some fixed cases. With FASTLARS_PROPERTIES_SECONDS=N new ones run for N seconds (`nox -s properties`). A failure
prints its number, and `fuzz_steps.run(number)` repeats it.
"""

import random
import time
import warnings

import fuzz_steps
from harness import ignore_nothing_adapted
from properties import SECONDS

pytestmark = ignore_nothing_adapted
CASES = 150


def test_every_step_is_right_or_none() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LARS adapts no parameter")
        if SECONDS:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                fuzz_steps.run(random.randrange(1 << 40))
            return
        steps = sum(fuzz_steps.run(number) for number in range(CASES))
    assert steps > 2 * CASES, "most operations are no errors"
