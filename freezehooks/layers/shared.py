"""Depthwise convolutions with one kernel and one bias for all channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._errors import FrozenValueError, RegionError, SpecError

if TYPE_CHECKING:
    from typing_extensions import Self


class _SharedKernelConv(nn.modules.conv._ConvNd):
    """The base class of the shared-kernel convolutions of 1, 2 and 3 dimensions."""

    _plain: type[Any]

    def __init__(
        self,
        channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise SpecError(f"`channels` must be a positive integer, found {channels!r}", "give the number of channels")
        as_plain = (1, 1, kernel_size, stride, padding, dilation, 1, bias, padding_mode)
        super().__init__(*as_plain, device, dtype)  # type: ignore[call-arg,arg-type]  # nn.Conv1d to 3d come next
        self.in_channels = self.out_channels = self.groups = channels
        self._copies = (channels, *[-1] * (self.weight.ndim - 1))

    @property
    def channels(self) -> int:
        """How many channels the kernel is applied to."""
        return self.in_channels

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that convolutions give it
        """Convolve every channel with the shared kernel."""
        spatial, channels = len(self.kernel_size), self.groups
        if input.ndim <= spatial or input.shape[-spatial - 1] != channels:
            raise RegionError(
                f"an input of shape {tuple(input.shape)} has no {channels} channels before {spatial} dimensions",
                f"give (batch, {channels}, *positions), or make the layer for other `channels`",
            )
        # a view without copies: autograd sums the gradients of all channels on the shared kernel
        weight, bias = self.weight.expand(self._copies), self.bias
        return self._conv_forward(input, weight, bias if bias is None else bias.expand(channels))

    @classmethod
    def from_conv(cls, conv: nn.modules.conv._ConvNd) -> Self:
        """Make the layer from a plain depthwise convolution whose kernels are all equal.

        Raises:
            SpecError: It is not a depthwise convolution of this number of dimensions.
            FrozenValueError: Its kernels, or its biases, are not all equal.
        """
        depthwise = isinstance(conv, cls._plain) and conv.groups == conv.in_channels == conv.out_channels
        if not depthwise:
            raise SpecError(
                f"expected a depthwise {cls._plain.__name__} (groups = in_channels = out_channels), found {conv!r}",
                "make one kernel for each channel first",
            )
        for name, parameter in conv.named_parameters(recurse=False):
            if not _all_equal(parameter):
                raise _disagreement(name, parameter)
        options: dict[str, Any] = {
            name: getattr(conv, name) for name in ("stride", "padding", "dilation", "padding_mode")
        }
        like: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        layer = cls(conv.in_channels, conv.kernel_size, bias=conv.bias is not None, **options, **like)
        layer.load_state_dict(conv.state_dict())
        return layer

    def to_conv(self) -> Any:
        """Make a plain depthwise convolution with an equal kernel for every channel."""
        options = {name: getattr(self, name) for name in ("stride", "padding", "dilation", "padding_mode", "groups")}
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        channels = self.channels, self.channels
        conv = self._plain(*channels, self.kernel_size, bias=self.bias is not None, **options, **like)
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                getattr(conv, name).copy_(parameter.expand(getattr(conv, name).shape))
        return conv

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also accept the checkpoint of a plain depthwise convolution, if all of its kernels are equal."""
        *_, error_messages = args
        for name, parameter in self.named_parameters(recurse=False):
            found = state_dict.get(prefix + name)
            if isinstance(found, Tensor) and found.shape == (self.channels, *parameter.shape[1:]):
                if _all_equal(found):
                    state_dict[prefix + name] = found[:1].clone()  # with assign=True it becomes the weight
                else:
                    error_messages.append(str(_disagreement(prefix + name, found)))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _all_equal(slices: Tensor) -> bool:
    return bool((slices == slices[:1]).all())


def _disagreement(name: str, slices: Tensor) -> FrozenValueError:
    gap = (slices - slices[:1]).detach().abs().max().item()
    return FrozenValueError(
        f"`{name}` differs between its {len(slices)} channels, by up to {gap:g}",
        "make them equal first, for instance to their mean",
    )


_DOCUMENTATION = """Convolve every channel with one kernel and add one bias.

    ``output[:, c] = bias + kernel * input[:, c]`` for every channel c, as in a depthwise `torch.nn.{plain}` whose
    kernels are all the same. It runs as a grouped convolution over an expanded view, without copies; the gradient of
    the kernel is the sum over the channels, equal to ``conv.weight.grad.sum(0, keepdim=True)`` of the plain one.

    Args:
        channels: The number of channels of both input and output.
        kernel_size: As for `torch.nn.{plain}`.
        stride: As there, and so are padding, dilation, bias, padding_mode, device and dtype. Weight and bias are
            initialized as those of a depthwise `torch.nn.{plain}`.

    Shape:
        - weight: ``(1, 1, *kernel)``; bias: ``(1,)``. A checkpoint of a plain depthwise convolution loads if its
          kernels are all equal.
        - Input and output: ``(batch, channels, *positions)`` or ``(channels, *positions)``.

    Raises:
        SpecError: `channels` is not a positive integer.
        RegionError: An input has another number of channels.

    Example:
        >>> import torch
        >>> from freezehooks.layers import {name}
        >>> blur = {name}(3, kernel_size=3, padding=1)
        >>> blur(torch.ones(2, 3{ones})).shape
        torch.Size([2, 3{ones}])
        >>> blur.weight.numel()
        {numel}
    """


class SharedKernelConv1d(_SharedKernelConv, nn.Conv1d):
    __doc__ = _DOCUMENTATION.format(plain="Conv1d", name="SharedKernelConv1d", ones=", 5", numel=3)
    _plain = nn.Conv1d


class SharedKernelConv2d(_SharedKernelConv, nn.Conv2d):
    __doc__ = _DOCUMENTATION.format(plain="Conv2d", name="SharedKernelConv2d", ones=", 5, 5", numel=9)
    _plain = nn.Conv2d


class SharedKernelConv3d(_SharedKernelConv, nn.Conv3d):
    __doc__ = _DOCUMENTATION.format(plain="Conv3d", name="SharedKernelConv3d", ones=", 5, 5, 5", numel=27)
    _plain = nn.Conv3d
