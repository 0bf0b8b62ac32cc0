"""Skips computing the gradient of frozen rows of a Linear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._entries.bits import count_true
from .._entries.entry_set import evenly_spaced
from .._errors import UnsupportedParameterError
from .._held.held import HeldParameters
from .._held.parameter import FrozenParameter
from .._held.site import Site
from .._ranks.sharding import is_sharded
from .._torch import has_memory, has_module_hooks_for_all, is_replica, is_transformed, outside_tracing
from .gradient import mark_clean
from .hook_set import HookSet, held_on, hook_sets_on, uncalled_owners

Rows: TypeAlias = "slice | Tensor"
"""Some rows of a matrix: a slice if they are evenly spaced, else their indices."""


@dataclass(frozen=True, slots=True)
class FreeRows:
    """The rows of a Linear for which a gradient is computed.

    Attributes:
        weight: The rows of the weight.
        bias: The entries of the bias; None if all of it trains, or there is none.
        is_all: Whether all frozen entries of the weight are in other rows, so that its gradient is clean already.
    """

    weight: Rows
    bias: Rows | None
    is_all: bool


class SkipFrozenRows:
    """After the forward of a Linear: make its backward skip the gradient of frozen rows.

    The output stays the same. Its autograd graph is replaced by a function whose backward multiplies only the free
    columns of the output's gradient. The module itself is not changed, so threads, copies and errors are no concern.
    """

    def __init__(self) -> None:
        self._planned: tuple[list[FrozenParameter], FreeRows | None] | None = None

    def __call__(self, module: nn.Linear, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        inputs = args[0] if args else kwargs["input"]
        is_usable = _is_plain(output) and _is_plain(inputs) and output.requires_grad and self._is_own(module)
        rows = self._rows(module) if is_usable else None
        if rows is None:
            return None
        inputs = inputs.to(output.dtype)  # the output has lower precision under autocast
        result: Tensor = _WithoutFrozenRows.apply(  # type: ignore[no-untyped-call]  # torch's own is not typed
            output.detach(), inputs, module._parameters["weight"], module._parameters["bias"], rows
        )
        return result

    def _is_own(self, module: nn.Linear) -> bool:
        """Return whether the output is what nn.Linear computed from the module's own parameters, unchanged.

        Other forward hooks run after this one, unless someone has moved one before it.
        """
        if torch.compiler.is_compiling() or is_transformed() or is_replica(module) or "forward" in vars(module):
            return False
        if next(iter(module._forward_hooks.values())) is not self or has_module_hooks_for_all():
            return False
        weight = module._parameters.get("weight")
        if weight is None or "bias" not in module._parameters:  # computed at each forward, as in pruning
            return False
        are_own = all(_is_known(module, key) for key in ("weight", "bias"))  # in functional_call they may not be
        return are_own and weight.requires_grad and not is_sharded(weight)

    def _rows(self, module: nn.Linear) -> FreeRows | None:
        held, of_bias = held_on(module, "weight"), held_on(module, "bias")
        if self._planned is None or [*held, *of_bias] != self._planned[0]:
            with outside_tracing():  # make_fx can trace what is done with the rows, and not how they are found
                self._planned = [*held, *of_bias], _free_rows(held, of_bias)
        return self._planned[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_planned": None}


def _is_known(module: nn.Module, key: str) -> bool:
    """Return whether a module has the parameter that every handle on it knows."""
    found = module._parameters[key]
    return all(hooks.known.get(key, found) is found for hooks in hook_sets_on(module))


def _is_plain(tensor: Any) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_nested


def _free_rows(held: list[FrozenParameter], of_bias: list[FrozenParameter]) -> FreeRows | None:
    """Return the rows that train, or None if no row of the weight is frozen entirely any more."""
    frozen = [each.frozen_rows for each in held]
    if not any(bool(rows.any()) for rows in frozen):
        return None
    is_all = all(each.frozen_count == count_true(rows) * each.shape[1] for each, rows in zip(held, frozen, strict=True))
    bias = _rows(~reduce(torch.logical_or, (each.frozen_rows for each in of_bias))) if of_bias else None
    return FreeRows(_rows(~reduce(torch.logical_or, frozen)), bias, is_all)


def _rows(free: Tensor) -> Rows:
    positions = free.nonzero().flatten()
    span = evenly_spaced(positions) if len(positions) else slice(0, 0)
    return positions if span is None else span


class _WithoutFrozenRows(torch.autograd.Function):
    """Returns the output of a Linear unchanged; its backward computes the gradients of the input and the free rows."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *computed_from: Any) -> Tensor:
        inputs, weight, _bias, rows = computed_from
        ctx.mark_dirty(output)  # unlike a view, it may be written to in place later, as ReLU does
        ctx.save_for_backward(inputs, weight if ctx.needs_input_grad[1] else None)
        ctx.weight, ctx.rows = weight, rows
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        rows: FreeRows = ctx.rows
        flat = gradient.reshape(-1, gradient.shape[-1])
        _, of_inputs, of_weight, of_bias, _ = ctx.needs_input_grad
        return (
            None,
            gradient @ weight.to(gradient.dtype).conj() if of_inputs else None,
            _gradient_of_weight(flat, inputs.reshape(-1, inputs.shape[-1]), ctx.weight, rows) if of_weight else None,
            _gradient_of_bias(flat, rows) if of_bias else None,
            None,
        )


def _gradient_of_weight(gradient: Tensor, inputs: Tensor, weight: Tensor, rows: FreeRows) -> Tensor:
    zeros = gradient.new_zeros(weight.shape, dtype=weight.dtype)
    found = _spread(gradient[:, rows.weight].T @ inputs.conj(), rows.weight, zeros)
    if rows.is_all and not found.requires_grad and has_memory(found):
        mark_clean(weight, found)
    return found


def _gradient_of_bias(gradient: Tensor, rows: FreeRows) -> Tensor:
    if rows.bias is None:
        return gradient.sum(0)
    return _spread(gradient[:, rows.bias].sum(0), rows.bias, gradient.new_zeros(gradient.shape[1]))


def _spread(gradient: Tensor, rows: Rows, zeros: Tensor) -> Tensor:
    """Write the gradient of some rows into zeros, in a way that autograd can differentiate."""
    zeros[rows] = gradient.to(zeros.dtype)
    return zeros


# --------------------------------------------------------------------------------------------------------------------
# On a module


def skip_frozen_rows(module: nn.Module, hooks: HookSet) -> None:
    """Make a module skip the gradient of frozen rows, if it supports that."""
    if "weight" in hooks.names and _reason_against(module, [hooks.frozen.by_name[hooks.names["weight"]]]) is None:
        hooks.call_after_forward(module, SkipFrozenRows())


def skip_gradients_of(held: HeldParameters) -> None:
    """Skip the gradients of frozen rows from the next installation of hooks on, in the parameters that support it.

    Raises:
        UnsupportedParameterError: No parameter supports it; the message says why.
    """
    reasons = dict(_reasons(held))
    if None not in reasons.values():
        said = "; ".join(f"of `{name}`: {reason}" for name, reason in reasons.items()) or "nothing is frozen"
        raise UnsupportedParameterError(
            f"no gradient can be skipped ({said})",
            "leave skip_gradients out, or freeze whole rows of an nn.Linear: `head.weight[:-16]`",
        )
    held.frozen.skips_gradients = True


def skipped_on(held: HeldParameters) -> list[str]:
    """Return the names of the parameters whose gradients of frozen rows are skipped."""
    return [name for name, reason in _reasons(held) if reason is None] if held.frozen.skips_gradients else []


def _reasons(held: HeldParameters) -> Iterator[tuple[str, str | None]]:
    """Yield for each parameter the reason why its gradient is needed entirely, or None if some can be skipped."""
    uncalled = uncalled_owners(held.model) if isinstance(held.model, nn.Module) else {}
    for name, frozen in held.frozen.by_name.items():
        sites = [site for other, site in held.sites if other == name]
        found = [_reason_at(site, frozen, uncalled) for site in sites]
        yield name, None if None in found else found[0]


def _reason_at(site: Site, frozen: FrozenParameter, uncalled: dict[nn.Module, Any]) -> str | None:
    if not isinstance(site.owner, nn.Module):
        return "a bare tensor has no forward"
    if site.owner in uncalled:
        return f"{type(uncalled[site.owner][0][0]).__name__} computes with it without calling its module"
    if site.key != "weight":
        return "the rows of a weight are skipped, and those of the bias beside it"
    return _reason_against(site.owner, [frozen])


def _reason_against(module: nn.Module, held: list[FrozenParameter]) -> str | None:
    if not isinstance(module, nn.Linear):
        return f"it belongs to {type(module).__name__}, and only nn.Linear gains from it"
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return f"{type(module).__name__} has a forward of its own"
    if module._parameters.get("weight") is None:
        return "it is computed at each forward"
    if any(each.ties for each in held):
        return "entries that are tied need every gradient"
    return None if any(bool(each.frozen_rows.any()) for each in held) else "no row of it is frozen entirely"
