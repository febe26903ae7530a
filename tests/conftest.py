"""Fixtures and settings for every test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

import ranks


@pytest.fixture(scope="session")
def process_groups() -> Iterator[Callable[..., ranks.Group]]:
    """process_groups(world, device="cpu"): processes that all tests of a session share, started on first use."""
    with ExitStack() as stack:
        made: dict[tuple[int, str], ranks.Group] = {}

        def of(world: int, device: str = "cpu") -> ranks.Group:
            if (world, device) not in made:
                made[world, device] = stack.enter_context(ranks.group(world, device))
            return made[world, device]

        yield of
