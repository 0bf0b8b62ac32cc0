"""Convolutions that have only some taps of their kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._entries.select import select
from .._errors import RegionError, SpecError
from .._rules.parser import parse_region
from .._rules.region import Region


class _MaskedConv(nn.modules.conv._ConvNd):
    """The base class of the masked convolutions of 1, 2 and 3 dimensions.

    The mask is a plain attribute rather than a buffer, so that a plain convolution's checkpoint loads strictly, and
    model averaging, which sums buffers, finds no bool tensor.
    """

    mask: Tensor
    bias_at: str | Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | Region | str,
        bias_at: str | Tensor = "everywhere",
    ) -> None:
        as_plain = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(*as_plain, device, dtype)  # type: ignore[call-arg,arg-type]  # nn.Conv1d to 3d come next
        self.bias_at = _checked_positions(bias_at)
        drawn = torch.ones_like(self.weight, device="cpu") if self.weight.is_meta else self.weight.detach()
        self.mask = _full_mask(mask, drawn)  # on the meta device a mask would have no numbers
        self._scale_to_taps()

    def reset_parameters(self) -> None:
        """Initialize weight and bias as a plain convolution does, scaled to the number of taps that exist."""
        super().reset_parameters()
        if hasattr(self, "mask"):  # the base class calls this before the mask is set
            self._scale_to_taps()

    @torch.no_grad()
    def _scale_to_taps(self) -> None:
        taps = self.mask.flatten(1).sum(1).clamp(min=1)
        scale = (self.mask[0].numel() / taps).sqrt().to(self.weight.device, self.weight.dtype)
        self.weight.mul_(scale.view(-1, *[1] * (self.weight.ndim - 1)))
        if self.bias is not None:
            self.bias.mul_(scale)
        self._clear_absent_taps()

    def _clear_absent_taps(self) -> None:
        if not self.weight.is_meta:
            self.weight.data.masked_fill_(~self.mask.to(self.weight.device), 0)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that convolutions give it
        """Convolve with the taps that the mask has, and add the bias where `bias_at` says."""
        # `where` and not a product, in which an inf in an absent tap's gradient would become nan
        weight = torch.where(self.mask.to(self.weight.device), self.weight, self.weight.new_zeros(()))
        if self.bias is None or (isinstance(self.bias_at, str) and self.bias_at == "everywhere"):
            return self._conv_forward(input, weight, self.bias)
        output = self._conv_forward(input, weight, None)
        bias = self.bias.to(output.dtype).view(-1, *[1] * len(self.kernel_size))
        if isinstance(self.bias_at, Tensor):
            return output + torch.where(self._positions(self.bias_at, output), bias, bias.new_zeros(()))
        # An empty neighborhood gives exactly 0, however the convolution rounds, with the convolution's gradient.
        return torch.where(self._responds(input), output + bias, output - output.detach())

    def _positions(self, bias_at: Tensor, output: Tensor) -> Tensor:
        spatial = output.shape[output.ndim - len(self.kernel_size) :]
        if bias_at.shape not in (spatial, (self.out_channels, *spatial)):
            raise RegionError(
                f"`bias_at` has shape {tuple(bias_at.shape)}, the output has positions {tuple(spatial)}",
                "give a bool for each output position, or for each output channel and position",
            )
        return bias_at.to(output.device)

    def _responds(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the output positions where at least one existing tap sees an input that is not 0.

        Shape:
            ``(batch, out, *positions)``, or without the batch dimension, bool.
        """
        taps = self.mask.to(self.weight.device, self.weight.real.dtype)
        seen = self._conv_forward((input.detach() != 0).to(taps.dtype), taps, None)
        return seen > 0.5

    def extra_repr(self) -> str:
        """Return what a plain convolution shows, with the number of taps and `bias_at`."""
        taps = f"taps={int(self.mask.sum())}/{self.mask.numel()}"
        bias_at = "positions" if isinstance(self.bias_at, Tensor) else repr(self.bias_at)
        return f"{super().extra_repr()}, {taps}, bias_at={bias_at}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if not self.weight.is_meta:
            self.mask = self.mask.to(self.weight.device)
            if isinstance(self.bias_at, Tensor):
                self.bias_at = self.bias_at.to(self.weight.device)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._clear_absent_taps()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(prefix + "weight")
        if isinstance(found, Tensor) and found.shape == self.weight.shape and not found.is_meta:
            # a copy: with assign=True the caller's own tensor would become the weight
            state_dict[prefix + "weight"] = found.detach().masked_fill(~self.mask.to(found.device), 0)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _full_mask(mask: Any, weight: Tensor) -> Tensor:
    """Convert a mask or a region to a bool tensor of the weight's shape."""
    if isinstance(mask, Region | str):
        return select(parse_region(mask) if isinstance(mask, str) else mask, weight)
    if not isinstance(mask, Tensor):
        raise SpecError(
            f"`mask` must be a tensor or a region, found {type(mask).__name__}",
            "give a tensor with a 1 for each tap that exists, or a region such as `cross`",
        )
    if mask.shape not in (weight.shape[2:], weight.shape):
        raise RegionError(
            f"`mask` has shape {tuple(mask.shape)}, expected the kernel's {tuple(weight.shape[2:])} "
            f"or the weight's {tuple(weight.shape)}",
            "give a 1 for each tap that exists and a 0 for each other",
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise RegionError("`mask` holds values other than 0 and 1", "give 1 for each tap that exists, 0 for each other")
    if not bool(mask.any()):
        raise RegionError("`mask` has no tap: it is 0 everywhere", "give at least one 1")
    return mask.detach().to(weight.device, torch.bool).expand(weight.shape).clone()


def _checked_positions(bias_at: Any) -> str | Tensor:
    if isinstance(bias_at, Tensor) and bias_at.dtype == torch.bool:
        return bias_at.detach().clone()
    if isinstance(bias_at, str) and bias_at in ("everywhere", "response"):
        return bias_at
    found = f"a tensor of {bias_at.dtype}" if isinstance(bias_at, Tensor) else repr(bias_at)
    raise SpecError(
        f'`bias_at` must be "everywhere", "response" or a bool tensor of output positions, found {found}',
        "leave it out to add the bias everywhere",
    )


_DOCUMENTATION = """Convolve with a kernel that has only some of its taps.

    The output is that of the plain convolution whose weight is ``where(mask, weight, 0)``. An absent tap contributes
    nothing, its gradient is exactly 0, and it stays 0 under every optimizer without any wrapper: it starts at 0, and
    its moments and its decay are 0. The parameter is never replaced, so the optimizer may be created at any time.

    Args:
        in_channels: As for `torch.nn.{plain}`, and so are out_channels, kernel_size, stride, padding, dilation, groups,
            bias, padding_mode, device and dtype. Weight and bias are initialized as there, scaled to the taps that
            exist.
        mask: Which taps exist: a tensor of zeros and ones (1 = tap present) of the kernel's shape or of the weight's, a
            region (`cross`, `~center`, `entries[...]`), or a region's text.
        bias_at: Where the bias is added: "everywhere"; "response", at output positions where an existing tap sees an
            input that is not 0, so that an empty neighborhood gives exactly 0; or a bool tensor of output positions.

    Shape:
        - mask: ``(*kernel)`` or ``(out, in/groups, *kernel)``.
        - bias_at: ``(*positions)`` or ``(out, *positions)``, the output's positions.
        - Input and output as for `torch.nn.{plain}`.

    Raises:
        RegionError: The mask has another shape, other values or no tap; or it is `cross` or `center` and the kernel is
            even.
        SpecError: The mask is neither a tensor nor a region, or `bias_at` is none of the three.

    Example:
        >>> import torch
        >>> from freezehooks import cross
        >>> from freezehooks.layers import {name}
        >>> conv = {name}(1, 1, kernel_size=3, mask="~center", bias=False)
        >>> int(conv.mask.sum())
        {taps}
        >>> conv(torch.ones(1, 1{ones})).shape
        torch.Size([1, 1{shape}])
    """


class MaskedConv1d(_MaskedConv, nn.Conv1d):
    __doc__ = _DOCUMENTATION.format(plain="Conv1d", name="MaskedConv1d", taps=2, ones=", 5", shape=", 3")


class MaskedConv2d(_MaskedConv, nn.Conv2d):
    __doc__ = _DOCUMENTATION.format(plain="Conv2d", name="MaskedConv2d", taps=8, ones=", 5, 5", shape=", 3, 3")


class MaskedConv3d(_MaskedConv, nn.Conv3d):
    __doc__ = _DOCUMENTATION.format(plain="Conv3d", name="MaskedConv3d", taps=26, ones=", 5, 5, 5", shape=", 3, 3, 3")
