"""Patterns that choose at random, by a hash of each position that is the same on every machine. No torch import."""

from __future__ import annotations

from dataclasses import dataclass, field

from .pattern import Fraction, FractionPattern, Integer, Selector, Tensor

_BITS = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Random(FractionPattern):
    """A fraction of a parameter's entries, chosen at random. Made by `random`."""

    name = "random"
    fraction: Fraction
    seed: Integer = field(kw_only=True)

    def select(self, parameter: Tensor, selector: Selector) -> Tensor:
        """Return True at the entries with the least draws."""
        seed, count = _mixed(_mixed(self.seed & _BITS) ^ self.seed >> 32 & _BITS), self.count(parameter.numel())
        return selector.least_drawn(parameter, count, lambda positions: _mixed(positions ^ seed))

    def in_words(self, outside: bool = False) -> str:
        """Return ``among the 50 % chosen at random with seed 1``."""
        side = "outside" if outside else "among"
        return f"{side} the {self.percent} chosen at random with seed {self.seed}"


def _mixed(number: Tensor) -> Tensor:
    """Hash a number to 32 bits, each of which depends on all of its bits; numbers below 2**32 never collide.

    It computes with integers of at most 63 bits, so that every device and every release of torch returns the same.
    The high half of a larger number is mixed in first.

    References:
        Mueller, https://stackoverflow.com/a/12996028
    """
    number = (number ^ number >> 32) & _BITS
    for _ in range(2):
        number = (number >> 16 ^ number) * 0x45D9F3B & _BITS
    return number >> 16 ^ number


def random(fraction: float, *, seed: int) -> Random:
    """Select entries at random; the same seed and shape select the same entries on every machine.

    Args:
        fraction: How many of the parameter's entries, as a fraction above 0 and at most 1; rounded to whole entries.
        seed: Which selection; two parameters of the same shape get the same one.

    Raises:
        RegionError: The fraction is outside that range, or the seed is not an integer.

    Example:
        >>> from freezehooks import random
        >>> str(random(0.5, seed=1))
        'random(0.5, seed=1)'
    """
    return Random(fraction, seed=seed)
