"""The patterns: regions with names. A new one is a class in one of these files. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..._errors import RegionError
from . import kernels, magnitudes, matrices, randomness, within  # noqa: F401  # importing them registers patterns
from .pattern import Pattern


def pattern_named(name: str, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None) -> Pattern:
    """Return the pattern of the given name.

    Raises:
        RegionError: There is none of that name, or it takes other arguments.
    """
    kind = Pattern.known.get(name)
    if kind is None:
        raise RegionError(f"unknown pattern `{name}`", f"use one of {', '.join(Pattern.known)}, or an index")
    return kind.of(*arguments, **(named or {}))
