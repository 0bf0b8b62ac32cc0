"""Per-sample gradients, which libraries for private training store on a parameter beside its gradient.

Opacus computes them in module hooks, clips each by its norm, and makes the gradient from the result: frozen entries
must not count in the norms.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .._errors import UnsupportedParameterError
from .._held.parameter import FrozenParameter

_SAMPLES: Final = "grad_sample"
"""The attribute with the per-sample gradients: a tensor of shape ``(samples, *shape)``, a list of those, or None."""

_NORMS: Final = "_norm_sample"
"""The attribute with the norms of per-sample gradients that are not stored themselves."""


def has_samples(parameter: Tensor) -> bool:
    """Return whether a parameter has per-sample gradients, or their norms."""
    kept = parameter.__dict__
    return _SAMPLES in kept or _NORMS in kept


def clean_samples(parameter: Tensor, frozen: FrozenParameter) -> None:
    """Make every per-sample gradient exactly +0.0 at the frozen entries.

    Raises:
        UnsupportedParameterError: The norms were computed already, with the frozen entries, or entries are tied.
    """
    _check_kept(parameter, frozen)
    samples = parameter.__dict__.get(_SAMPLES)
    if isinstance(samples, list):
        samples[:] = [_cleaned(each, frozen) for each in samples]
    elif samples is not None:
        setattr(parameter, _SAMPLES, _cleaned(samples, frozen))


def _check_kept(parameter: Tensor, frozen: FrozenParameter) -> None:
    kept = parameter.__dict__
    if kept.get(_NORMS) is not None:
        raise UnsupportedParameterError(
            f"`{frozen.name}` has the norms of per-sample gradients (`{_NORMS}`), in which its frozen entries count",
            "keep the gradients themselves: in Opacus, make_private(grad_sample_mode='hooks')",
        )
    if frozen.ties and kept.get(_SAMPLES) is not None:
        raise UnsupportedParameterError(
            f"`{frozen.name}` has per-sample gradients (`{_SAMPLES}`), and its tied copies would each count in their "
            "norms",
            "use a layer with one kernel from freezehooks.layers instead of the rule that ties",
        )


@torch.no_grad()
def _cleaned(samples: Tensor, frozen: FrozenParameter) -> Tensor:
    if samples.shape[1:] != frozen.shape:
        return samples
    if samples._is_view() or samples.requires_grad or samples.is_inference():  # shared memory, or in a graph
        return samples.masked_fill(frozen.frozen, 0)
    return samples.masked_fill_(frozen.frozen, 0)
