"""Finds rules that were probably meant for each of several stacked matrices, such as the gates of an LSTM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import nn

from .._errors import shortened
from .._rules.patterns.matrices import MatrixPattern
from .._rules.region import And, Index, Not, Or, Region
from .held import HeldParameters
from .site import Site


def misread_stacks(held: HeldParameters) -> Iterator[str]:
    """Yield a note for each rule whose pattern applies to a stack of matrices as a whole, not to each of them."""
    for name, sites in held.sites_by_name().items():
        count, what = max(map(_stacked, sites))
        for rule in held.frozen.by_name[name].rules if count > 1 else ():
            pattern = _matrix_pattern(rule.region)
            if pattern is not None:
                rows, columns = held.frozen.by_name[name].shape
                yield (
                    f"rule `{shortened(rule)}`: `{name}` stacks {count} {what} of shape ({rows // count}, {columns}), "
                    f"and `{pattern}` is that of the whole of shape ({rows}, {columns}); write "
                    f"`each({count}, {pattern})` for the same in each"
                )


_GATES: Final = (((nn.LSTM, nn.LSTMCell), 4), ((nn.GRU, nn.GRUCell), 3))


def _stacked(site: Site) -> tuple[int, str]:
    """Return how many matrices the parameter at a site stacks, and what they are called."""
    owner, key = site.owner, site.key
    if isinstance(owner, nn.MultiheadAttention) and key == "in_proj_weight":
        return 3, "projections"
    gates = next((count for kinds, count in _GATES if isinstance(owner, kinds)), 1)
    return gates if key.startswith(("weight_ih", "weight_hh")) else 1, "gates"


def _matrix_pattern(region: object) -> MatrixPattern | None:
    """Return a matrix pattern in a region, or None; one that is combined with an index by `&` does not count."""
    if isinstance(region, MatrixPattern):
        return region
    if isinstance(region, Not):
        return _matrix_pattern(region.operand)
    if isinstance(region, And) and (_is_index(region.left) or _is_index(region.right)):
        return None
    return _matrix_pattern(region.left) or _matrix_pattern(region.right) if isinstance(region, And | Or) else None


def _is_index(region: Region) -> bool:
    return all(isinstance(leaf, Index) for leaf in region.leaves())
