"""Rejects parameters and models whose entries freezehooks has no way to hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._errors import UnsupportedParameterError
from .._ranks.sharding import is_sharded, local
from .._torch import is_tensor_subclass


def check_supported(parameter: Tensor) -> None:
    """Reject a parameter whose entries freezehooks has no way to hold.

    Raises:
        UnsupportedParameterError: It is one; the message says why and what to do.
    """
    for found, fact, advice in _REFUSALS:
        if found(local(parameter)) or (found(parameter) and not is_sharded(parameter)):
            raise UnsupportedParameterError(fact.format(parameter=parameter), advice)


_REFUSALS: Final[tuple[tuple[Callable[[Tensor], bool], str, str], ...]] = (
    (is_lazy, "the parameter is lazy and has no shape yet", "run one forward first, then freeze"),
    (
        lambda p: getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False),
        "the parameter is of FSDP1, which joins many tensors into one flat parameter",
        "use FSDP2 (torch.distributed.fsdp.fully_shard) or DistributedDataParallel",
    ),
    (
        lambda p: hasattr(p, "ds_id") or hasattr(p, "_hp_mapping"),
        "the parameter is one of DeepSpeed ZeRO, which steps copies of it that it keeps elsewhere",
        "use FSDP2 (torch.distributed.fsdp.fully_shard) or DistributedDataParallel",
    ),
    (
        is_tensor_subclass,
        "the parameter is a tensor subclass ({parameter.__class__.__name__}) whose memory is not one plain tensor",
        "freeze before the model is quantized or sharded",
    ),
    (lambda p: p.is_meta, "the parameter is on the meta device and has no numbers yet", "materialize it, then freeze"),
    (
        lambda p: p.is_quantized or not (p.is_floating_point() or p.is_complex()) or p.element_size() == 1,
        "the parameter holds {parameter.dtype}, which no optimizer trains",
        "name floating-point parameters only",
    ),
    (
        lambda p: p.layout != torch.strided,
        "the parameter's layout is {parameter.layout}",
        "only dense (strided) parameters can be held; convert it with `to_dense()`",
    ),
    (
        lambda p: any(step == 0 and size > 1 for step, size in zip(p.stride(), p.shape, strict=True)),
        "the parameter is expanded: several of its entries share memory",
        "make it contiguous first",
    ),
    (
        lambda p: _overlaps_itself(p),
        "the parameter overlaps itself: several of its entries share memory",
        "give the model a `clone()` of it first",
    ),
    (
        lambda p: p.is_conj() or p.is_neg(),
        "the parameter is a lazy conjugate or negative: its entries are not what is in memory",
        "call `resolve_conj().resolve_neg()` on it first",
    ),
    (
        lambda p: p.is_inference(),
        "the parameter was made under torch.inference_mode, so nothing may write into it",
        "make the model outside inference mode",
    ),
    (
        lambda p: not p.is_leaf,
        "the tensor is computed from others (it has a grad_fn), so no optimizer steps it",
        "name the leaf tensors it is computed from",
    ),
)


def _overlaps_itself(tensor: Tensor) -> bool:
    """Return whether several entries share memory, as in what `unfold` and `as_strided` return."""
    dimensions = sorted((step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    reach, is_apart = 0, True
    for step, size in dimensions:
        is_apart = is_apart and step > reach
        reach += step * (size - 1)
    if is_apart or not tensor.numel():
        return False
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")  # the strides interleave: compare all offsets
    for step, size in dimensions:
        offsets = offsets.unsqueeze(-1) + step * torch.arange(size, device="cpu")
    return len(offsets.unique()) < offsets.numel()


def check_wrappers(model: nn.Module | Mapping[str, Tensor]) -> None:
    """Reject a model wrapped in FSDP1 or DeepSpeed, whose optimizer steps tensors other than its parameters.

    Raises:
        UnsupportedParameterError: The model is wrapped in one of them.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    kinds = {kind.__name__ for module in modules for kind in type(module).__mro__}
    if "DeepSpeedEngine" in kinds:
        raise UnsupportedParameterError(
            "the model is a DeepSpeedEngine, whose ZeRO steps copies of the parameters that it keeps elsewhere",
            "use FSDP2 (torch.distributed.fsdp.fully_shard) or DistributedDataParallel",
        )
    if "FullyShardedDataParallel" in kinds:
        raise UnsupportedParameterError(
            "the model is wrapped in FSDP1 (FullyShardedDataParallel), which joins many parameters into a flat one",
            "use FSDP2 (torch.distributed.fsdp.fully_shard) or DistributedDataParallel",
        )
