"""Warnings that point at the user's code, not at fastlars or torch."""

from __future__ import annotations

import sys
import warnings


def advise(message: str) -> None:
    """Warn at the innermost line outside fastlars and torch.

    The stack depth varies, because torch wraps step(), and schedulers and hooks wrap it again.
    """
    frame, level = sys._getframe(1), 2  # stacklevel 1 is this function
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "fastlars"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
