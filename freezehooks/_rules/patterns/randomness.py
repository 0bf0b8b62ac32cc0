"""Patterns that choose by chance: by a number drawn for each entry, the same on every machine. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from .pattern import Fraction, FractionPattern, Integer, Selector, Tensor

_BITS = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Random(FractionPattern):
    """So many of a parameter's entries as a fraction says, chosen by chance. Made by `random`."""

    name = "random"
    fraction: Fraction
    seed: Integer = field(kw_only=True)

    def select(self, parameter: Tensor, selector: Selector) -> Tensor:
        """Return True at the entries of least draw."""
        seed, count = _mixed(_mixed(self.seed & _BITS) ^ self.seed >> 32 & _BITS), self.count(parameter.numel())
        return selector.least_drawn(parameter, count, lambda positions: _mixed(positions ^ seed))

    def in_words(self, outside: bool = False) -> str:
        """Return ``among the 50 % chosen by chance with seed 1``."""
        side = "outside" if outside else "among"
        return f"{side} the {self.percent} chosen by chance with seed {self.seed}"


def _mixed(number: Tensor) -> Tensor:
    """Return 32 bits that depend on all bits of a number, each on every one; no two numbers below 2**32 have the same.

    Integers alone, and none above 63 bits, so that every device and every release of torch gives the same. The high
    half of a larger number is mixed first.

    References:
        Mueller, https://stackoverflow.com/a/12996028
    """
    number = (number ^ number >> 32) & _BITS
    for _ in range(2):
        number = (number >> 16 ^ number) * 0x45D9F3B & _BITS
    return number >> 16 ^ number


def random(fraction: float, *, seed: int) -> Random:
    """Select entries by chance: the same for the same seed and shape, on every machine.

    Args:
        fraction: How many of the parameter's entries, as a fraction above 0 and at most 1; rounded to whole entries.
        seed: Which choice; two parameters of one shape get the same entries.

    Raises:
        RegionError: The fraction is outside that range, or the seed is no integer.

    Example:
        >>> from freezehooks import random
        >>> str(random(0.5, seed=1))
        'random(0.5, seed=1)'
    """
    return Random(fraction, seed=seed)
