"""What holds for every test."""

import pytest

from fastlars import known_lists


@pytest.fixture(autouse=True)
def no_list_is_known() -> None:
    """Lists are found by the `id` of a tensor, which one of a test before may have had."""
    known_lists._known.cache_clear()
