"""What can go wrong: one small tree of exceptions, each also the builtin that fits it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing_extensions import Self


class FreezeError(Exception):
    """Base of every error that freezehooks raises.

    Args:
        fact: What was found and what was expected.
        advice: What to do next; may be empty.
    """

    def __init__(self, fact: str, advice: str = "") -> None:
        super().__init__(fact, advice)
        self.fact = fact
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.fact}; {self.advice}" if self.advice else self.fact

    def within(self, context: str, detail: str = "") -> Self:
        """Return the same error with `context` before its fact and `detail` in parentheses behind it."""
        behind = f" ({detail})" if detail else ""
        return type(self)(f"{context}: {self.fact}{behind}", self.advice)


_LONGEST: Final = 160
"""How many characters of something that was given a message shows."""


def shortened(text: object) -> str:
    """Return a text as a message shows it: without its middle where it is long, as that of a mask or of many indices.

    Example:
        >>> shortened("conv.weight[0] = 1")
        'conv.weight[0] = 1'
        >>> len(shortened(list(range(5000))))
        160
    """
    whole, half = str(text), _LONGEST // 2
    return whole if len(whole) <= _LONGEST else f"{whole[:half]}…{whole[1 - half :]}"


def shown(found: object) -> str:
    """Return how a message shows what was found in the place of something else: as Python prints it, shortened."""
    try:
        return shortened(repr(found))
    except Exception:  # an integer of thousands of digits, or whatever a class of somebody else's does
        return f"{type(found).__name__}, which cannot be printed"


@contextmanager
def error_context(context: str, detail: str = "") -> Iterator[None]:
    """Put `context` before the fact of an error inside the block, and `detail` in parentheses behind it."""
    try:
        yield
    except FreezeError as error:
        raise error.within(context, detail) from error.__cause__


class RuleSyntaxError(FreezeError, ValueError):
    """Text that is no rule; the message names the column."""


class SpecError(FreezeError, TypeError):
    """An argument that cannot be understood: as rules, a region, a value, a handle or an optimizer."""


class TargetError(FreezeError, KeyError):
    """A target that names no parameter of the model."""


class RegionError(FreezeError, ValueError):
    """A region that does not fit the parameter, or selects nothing of it."""


class FrozenValueError(FreezeError, ValueError):
    """A value that does not fit the region's shape or the parameter's dtype."""


class RuleConflictError(FreezeError, ValueError):
    """Two rules that ask for different values at the same entry."""


class UnsupportedParameterError(FreezeError, TypeError):
    """A parameter whose entries no mechanism here can hold."""


class OptimizerMismatchError(FreezeError, ValueError):
    """An optimizer that holds none of the frozen parameters."""


class UnsupportedOptimizerError(FreezeError, TypeError):
    """An optimizer that cannot hold the free entries alone."""


class ParameterChangedError(FreezeError, RuntimeError):
    """A frozen parameter that has since been removed, or replaced by one that cannot be held in its place."""


class StateMismatchError(FreezeError, RuntimeError):
    """A saved state made under other rules, or for another model."""


class CheckpointError(FreezeError, ValueError):
    """A file that cannot be read as a model's tensors, or not without executing what it says."""


class DriftError(FreezeError, RuntimeError):
    """Frozen entries that no longer hold their values."""


class UnguardedError(FreezeError, RuntimeError):
    """Frozen entries that hold their values now, while something that is to hold them is missing."""
