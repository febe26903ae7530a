"""What is known of a list of tensors that came before: asked in one call whether they still are what they were.

Asking each tensor of each step takes longer than the step of small tensors on a CPU, and than all launches on a GPU.
"""

from functools import lru_cache
from itertools import chain
from typing import Any, Callable, List, Optional, Tuple, TypeVar, cast  # noqa: UP035  as in functional.py

from torch import Tensor

from .compat import metadata_guard

_T = TypeVar("_T")


class _Known:
    """What was found of a list, for as long as a guard says that its tensors have the same metadata."""

    came_before = False
    guarded: Optional[Tuple[Callable[..., bool], Any]] = None  # written at once: other threads may read it


@lru_cache(maxsize=128)
def _known(find: Callable[..., Any], first: int, params: int, tensors: int) -> _Known:  # noqa: ARG001  where lists share this key, it costs time only
    return _Known()


def known(find: Callable[..., Optional[_T]], params: List[Tensor], *others: List[Tensor]) -> Optional[_T]:
    """``find(params, *others)``, which depends on the metadata of the tensors only. What is false is asked anew each time."""
    tensors = list(chain(params, *others))
    # with the number of params: a guard does not see where they end
    of_list = _known(find, id(params[0]), len(params), len(tensors))
    guarded = of_list.guarded
    if guarded is not None and guarded[0](*tensors):
        return cast(_T, guarded[1])
    found = find(params, *others)
    # A guard is made when a list comes for the second time, and not where the last one has just failed: making it takes as
    # long as asking twice.
    guard = metadata_guard(tensors) if found and of_list.came_before and guarded is None else None
    of_list.guarded = None if guard is None else (guard, found)
    of_list.came_before = guarded is None
    return found
