"""Convolutions whose kernel is the output of a network, and a function to run any module with given parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._entries.select import select
from .._errors import RegionError, SpecError, TargetError
from .._rules.parser import parse_region


class _SynthesizedConv(nn.Module):
    """The base class of the synthesized convolutions of 1, 2 and 3 dimensions."""

    _plain: type[Any]

    def __init__(
        self,
        generator: nn.Module,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        frozen: tuple[Any, Any] | None = None,
    ) -> None:
        super().__init__()
        # A plain convolution on the meta device checks, normalizes and shows the arguments. Inside a tuple it is not
        # registered as a submodule, so that it is not in `state_dict()` or `parameters()`.
        as_plain = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        self._shape_of = (self._plain(*as_plain, device="meta"),)
        self.generator = generator
        self.width = self.weight_shape.numel() + (out_channels if self._conv.bias is not None else 0)
        self._check_generator()
        self._constants = None if frozen is None else _constants(frozen, self.weight_shape)

    @property
    def _conv(self) -> Any:
        """The plain convolution on the meta device, for its shapes and options."""
        return self._shape_of[0]

    @property
    def weight_shape(self) -> torch.Size:
        """The shape of one synthesized kernel, ``(out, in/groups, *kernel)``."""
        return torch.Size(self._conv.weight.shape)

    def forward(self, input: Tensor, code: Tensor) -> Tensor:  # noqa: A002  # the name that convolutions give it
        """Convolve the input with the kernel that the generator computes from the code.

        Args:
            input: The input.
            code: One code for the whole batch, or one for each sample.

        Shape:
            - input: ``(batch, in, *positions)``; with one code the batch may be left out.
            - code: ``(features,)`` or ``(batch, features)``.
            - output: ``(batch, out, *positions)``.

        Raises:
            RegionError: The generator's output has another width, or there is neither one code nor one for each sample.
        """
        channels, spatial = self._conv.in_channels, len(self._conv.kernel_size)
        if input.ndim not in (spatial + 1, spatial + 2) or input.shape[-spatial - 1] != channels:
            raise RegionError(
                f"an input of shape {tuple(input.shape)}, expected {channels} channels before {spatial} dimensions",
                f"give (batch, {channels}, *positions)",
            )
        weight, bias = self.synthesize_kernel(code)
        if code.ndim == 1:
            return self._convolve(input, weight, bias, self._conv.groups)
        if input.ndim != spatial + 2 or len(input) != len(code):
            raise RegionError(
                f"{len(code)} codes for an input of shape {tuple(input.shape)}", "give one code, or one for each sample"
            )
        return self._convolve_each(input, weight, bias)

    def _convolve_each(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        """Convolve every sample with its own kernel, with the samples as groups of one convolution."""
        batch = len(input)
        if not batch:  # a convolution needs groups; any kernel gives the right shape
            return self._convolve(input, weight.sum(0), None if bias is None else bias.sum(0), self._conv.groups)
        kernels, biases = weight.flatten(0, 1), None if bias is None else bias.flatten()
        output = self._convolve(input.flatten(0, 1).unsqueeze(0), kernels, biases, batch * self._conv.groups)
        return torch.squeeze(torch.unflatten(output, 1, (batch, self._conv.out_channels)), 0)

    def synthesize_kernel(self, code: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the kernel, with its frozen entries, and the bias that the generator computes from one or more codes.

        Shape:
            - code: ``(features,)`` or ``(batch, features)``.
            - kernel: ``(out, in/groups, *kernel)`` or ``(batch, out, in/groups, *kernel)``; bias likewise.

        Raises:
            RegionError: The code has other dimensions, or the generator's output another width.
        """
        if code.ndim not in (1, 2):
            raise RegionError(f"a code of shape {tuple(code.shape)}", "give (features,) or (batch, features)")
        generated: Tensor = self.generator(code)
        if generated.shape != (*code.shape[:-1], self.width):
            raise self._wrong_width(f"made {tuple(generated.shape)} of a code of shape {tuple(code.shape)}")
        # not by the tensor's method, which torch.compile of 2.6 to 2.11 cannot trace under torch.set_default_device
        weight = torch.unflatten(generated[..., : self.weight_shape.numel()], -1, self.weight_shape)
        if self._constants is not None:
            where, values = self._constants
            weight = torch.where(where.to(weight.device), values.to(weight.device, weight.dtype), weight)
        return weight, None if self._conv.bias is None else generated[..., self.weight_shape.numel() :]

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:  # noqa: A002
        conv, padding = self._conv, self._conv.padding
        if conv.padding_mode != "zeros":
            padding_twice = conv._reversed_padding_repeated_twice
            input, padding = nn.functional.pad(input, padding_twice, mode=conv.padding_mode), 0  # noqa: A001
        output: Tensor = self._function(input, weight, bias, conv.stride, padding, conv.dilation, groups)
        return output

    _function: Callable[..., Tensor]

    def _check_generator(self) -> None:
        """Reject a generator of another width if its last layer shows it; otherwise the first forward does."""
        last = list(self.generator.children())[-1] if isinstance(self.generator, nn.Sequential) else self.generator
        if isinstance(last, nn.Linear) and last.out_features != self.width:
            raise self._wrong_width(f"has {last.out_features} outputs")

    def _wrong_width(self, found: str) -> RegionError:
        bias = f" and {self.width - self.weight_shape.numel()} of a bias" if self._conv.bias is not None else ""
        return RegionError(
            f"the generator {found}, expected {self.width}: {self.weight_shape.numel()} entries of a kernel of shape "
            f"{tuple(self.weight_shape)}{bias}",
            f"give its last layer {self.width} outputs",
        )

    def extra_repr(self) -> str:
        """Return what a plain convolution shows."""
        return str(self._conv.extra_repr())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        anchor = next(self.generator.parameters(), None)
        if self._constants is not None and anchor is not None and not anchor.is_meta:
            where, values = self._constants
            self._constants = where.to(anchor.device), values.to(anchor.device)
        return self


def _constants(frozen: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the mask of the constant entries of the kernel, and a tensor of the kernel's shape with the constants."""
    if not isinstance(frozen, tuple) or len(frozen) != 2:
        raise SpecError(f"`frozen` must be a region and a value, found {frozen!r}", "write frozen=(center, 0)")
    region, value = frozen
    where = select(parse_region(region) if isinstance(region, str) else region, torch.ones(shape, device="cpu"))
    number = torch.as_tensor(value, dtype=torch.float64 if isinstance(value, int | float) else None, device="cpu")
    if not bool(number.isfinite().all()):
        raise RegionError("the value of `frozen` is not finite", "give finite numbers")
    if number.ndim and number.shape != shape:
        raise RegionError(
            f"the value of `frozen` has shape {tuple(number.shape)}, expected a number or {tuple(shape)}",
            "give a tensor of the weight's shape",
        )
    return where, number.detach().expand(shape).clone()


def synthesize(module: nn.Module, parameters: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Run a module with given tensors in place of some of its parameters.

    It is `torch.func.functional_call` with names and shapes checked first. Gradients flow to the tensors and to the
    network that computed them; the module's own parameters are left alone.

    Args:
        module: Any module.
        parameters: Tensors by the names of the parameters that they replace, of the same shapes.
        args: The positional arguments of the module.
        kwargs: The keyword arguments of the module.

    Returns:
        What the module returns.

    Raises:
        TargetError: A name is not that of a parameter of the module.
        RegionError: A tensor has another shape than the parameter.

    Example:
        >>> import torch
        >>> from freezehooks.layers import synthesize
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> synthesize(layer, {"weight": torch.tensor([[1.0, 10.0]])}, torch.tensor([[3.0, 4.0]]))
        tensor([[43.]])
    """
    own = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in parameters.items():
        if name not in own:
            known = f"its parameters are {', '.join(own)}"
            raise TargetError(f"`{name}` is not a parameter of {type(module).__name__}", known)
        if not isinstance(tensor, Tensor):
            raise SpecError(
                f"`{name}` must be a tensor, found {type(tensor).__name__}", "convert it with torch.as_tensor"
            )
        if tensor.shape != own[name].shape:
            raise RegionError(
                f"`{name}` has shape {tuple(own[name].shape)}, found a tensor of shape {tuple(tensor.shape)}",
                "give a tensor of the parameter's shape",
            )
    # as views: hooks would mistake another module's parameter for a replacement in this one, and write into it
    given = {name: tensor.view_as(tensor) for name, tensor in parameters.items()}
    return torch.func.functional_call(module, given, args, kwargs)


_DOCUMENTATION = """Convolve with a kernel and a bias that a network computes from a code.

    ``output = conv(input, where(frozen, value, generator(code)))``. Gradients flow to the generator, the code and the
    input. With one code for each sample the batch runs as one grouped convolution, not as a loop.

    Args:
        generator: A network from a code to ``width`` numbers: the entries of the weight, row by row, then those of the
            bias, unless bias=False.
        in_channels: As for `torch.nn.{plain}`.
        out_channels: As there.
        kernel_size: As there.
        frozen: A region and a value, for entries of the kernel that are constant: they hold the value exactly, and
            pass no gradient to the generator. The value is a number or a tensor of the weight's shape.
        stride: As there, and so are padding, dilation, groups, bias and padding_mode. Device and dtype are the
            generator's.

    Attributes:
        width: How many numbers the generator must return.

    Shape:
        - input: ``(batch, in, *positions)``; code: ``(features,)`` or ``(batch, features)``.
        - output: ``(batch, out, *positions)``.

    Raises:
        RegionError: The generator has another width, found now or in the first forward; or the region does not fit
            the kernel.
        SpecError: `frozen` is not a region and a value.

    Example:
        >>> import torch
        >>> from freezehooks.layers import {name}
        >>> conv = {name}(torch.nn.Linear(4, {width}), 2, 3, kernel_size=1)
        >>> conv(torch.ones(5, 2{ones}), torch.ones(5, 4)).shape
        torch.Size([5, 3{ones}])
    """


class SynthesizedConv1d(_SynthesizedConv):
    __doc__ = _DOCUMENTATION.format(plain="Conv1d", name="SynthesizedConv1d", width=9, ones=", 4")
    _plain = nn.Conv1d
    _function = staticmethod(nn.functional.conv1d)


class SynthesizedConv2d(_SynthesizedConv):
    __doc__ = _DOCUMENTATION.format(plain="Conv2d", name="SynthesizedConv2d", width=9, ones=", 4, 4")
    _plain = nn.Conv2d
    _function = staticmethod(nn.functional.conv2d)


class SynthesizedConv3d(_SynthesizedConv):
    __doc__ = _DOCUMENTATION.format(plain="Conv3d", name="SynthesizedConv3d", width=9, ones=", 4, 4, 4")
    _plain = nn.Conv3d
    _function = staticmethod(nn.functional.conv3d)
