"""The exceptions of freezehooks: one small tree, each also a subclass of the builtin that fits it."""

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
        """Return the same error with `context` before its fact and `detail` in parentheses after it."""
        behind = f" ({detail})" if detail else ""
        return type(self)(f"{context}: {self.fact}{behind}", self.advice)


_LONGEST: Final = 160
"""The most characters of an argument that a message shows."""


def shortened(text: object) -> str:
    """Return a text as a message shows it: with its middle left out if it is long, like a list of many indices.

    Example:
        >>> shortened("conv.weight[0] = 1")
        'conv.weight[0] = 1'
        >>> len(shortened(list(range(5000))))
        160
    """
    whole, half = str(text), _LONGEST // 2
    return whole if len(whole) <= _LONGEST else f"{whole[:half]}…{whole[1 - half :]}"


def shown(found: object) -> str:
    """Return an object as a message shows it: the way Python prints it, shortened."""
    try:
        return shortened(repr(found))
    except Exception:  # an integer of thousands of digits, or a third-party class whose repr fails
        return f"{type(found).__name__}, which cannot be printed"


@contextmanager
def error_context(context: str, detail: str = "") -> Iterator[None]:
    """Add `context` before the fact of an error raised in the block, and `detail` in parentheses after it."""
    try:
        yield
    except FreezeError as error:
        raise error.within(context, detail) from error.__cause__


class RuleSyntaxError(FreezeError, ValueError):
    """Text that is not a rule; the message names the column."""


class SpecError(FreezeError, TypeError):
    """An argument that cannot be understood: as rules, a region, a value, a handle or an optimizer."""


class TargetError(FreezeError, KeyError):
    """A target that matches no parameter of the model."""


class RegionError(FreezeError, ValueError):
    """A region that does not fit the parameter, or that selects none of its entries."""


class FrozenValueError(FreezeError, ValueError):
    """A value that does not fit the region's shape or the parameter's dtype."""


class RuleConflictError(FreezeError, ValueError):
    """Two rules that ask for different values at the same entry."""


class UnsupportedParameterError(FreezeError, TypeError):
    """A parameter whose entries freezehooks has no way to hold."""


class OptimizerMismatchError(FreezeError, ValueError):
    """An optimizer that holds none of the frozen parameters."""


class UnsupportedOptimizerError(FreezeError, TypeError):
    """An optimizer that cannot be compacted to the free entries."""


class ParameterChangedError(FreezeError, RuntimeError):
    """A frozen parameter that has since been removed, or replaced by one that cannot be frozen in the same way."""


class StateMismatchError(FreezeError, RuntimeError):
    """A saved state that was made under other rules, or for another model."""


class CheckpointError(FreezeError, ValueError):
    """A file that cannot be read as a model's tensors, or only by running code that it contains."""


class DriftError(FreezeError, RuntimeError):
    """Frozen entries that no longer hold their values."""


class UnguardedError(FreezeError, RuntimeError):
    """Frozen entries that hold their values now, while a hook or a guard that would keep them there is missing."""
