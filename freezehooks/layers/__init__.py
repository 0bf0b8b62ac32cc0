"""Convolutions whose kernel is masked, shared between channels, or the output of a network."""

from .masked import MaskedConv1d, MaskedConv2d, MaskedConv3d
from .shared import SharedKernelConv1d, SharedKernelConv2d, SharedKernelConv3d
from .synthesized import SynthesizedConv1d, SynthesizedConv2d, SynthesizedConv3d, synthesize

__all__ = [
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "SharedKernelConv1d",
    "SharedKernelConv2d",
    "SharedKernelConv3d",
    "SynthesizedConv1d",
    "SynthesizedConv2d",
    "SynthesizedConv3d",
    "synthesize",
]
