"""Warnings that name the user's line, not one of ours or torch's."""

from __future__ import annotations

import sys
import warnings


def advise(message: str) -> None:
    """Warn at the line of the program that called into fastlars, through whatever torch wraps around it.

    torch wraps step(), and schedulers and hooks wrap it again.
    """
    frame, level = sys._getframe(1), 2  # levels of `warn`: this function has 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "fastlars"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
