"""Gradients of single samples, which libraries for private training leave on a parameter beside its gradient.

Opacus computes them in hooks of modules, clips each by its norm, and makes the gradient from what comes out: frozen
entries must not count in the norms.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .._errors import UnsupportedParameterError
from .._held.parameter import FrozenParameter

_SAMPLES: Final = "grad_sample"
"""Where they lie: a tensor of shape ``(samples, *shape)``, a list of such, or None before there is one."""

_NORMS: Final = "_norm_sample"
"""Where the norms of those lie that nobody keeps."""


def has_samples(parameter: Tensor) -> bool:
    """Return whether somebody keeps gradients of single samples on a parameter, or their norms."""
    kept = parameter.__dict__
    return _SAMPLES in kept or _NORMS in kept


def clean_samples(parameter: Tensor, frozen: FrozenParameter) -> None:
    """Make the gradient of every single sample exactly +0.0 at the frozen entries.

    Raises:
        UnsupportedParameterError: The frozen entries count in norms that were taken already, or copies are tied.
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
            f"`{frozen.name}` has the norms of the gradients of single samples (`{_NORMS}`), in which its frozen "
            "entries count",
            "keep the gradients themselves: in Opacus, make_private(grad_sample_mode='hooks')",
        )
    if frozen.ties and kept.get(_SAMPLES) is not None:
        raise UnsupportedParameterError(
            f"`{frozen.name}` has gradients of single samples (`{_SAMPLES}`), and its tied copies would each count in "
            "their norms",
            "use a layer with one kernel, as those of freezehooks.layers are, in place of the rule that ties",
        )


@torch.no_grad()
def _cleaned(samples: Tensor, frozen: FrozenParameter) -> Tensor:
    if samples.shape[1:] != frozen.shape:
        return samples
    if samples._is_view() or samples.requires_grad or samples.is_inference():  # somebody else's memory, or a graph's
        return samples.masked_fill(frozen.frozen, 0)
    return samples.masked_fill_(frozen.frozen, 0)
