"""From the names in rules to the parameters of a model, and to every place that holds one of them."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._errors import ParameterChangedError, SpecError, TargetError, UnsupportedParameterError
from .._ranks.sharding import is_sharded, local


@dataclass(frozen=True, slots=True)
class Site:
    """One place that holds a parameter: a module and an attribute of it, or a mapping and a key of it."""

    owner: nn.Module | Mapping[str, Tensor]
    key: str

    @property
    def is_whole(self) -> bool:
        """Whether the owner has its parameters: not so a module that is just being copied, and holds its handle."""
        return not isinstance(self.owner, nn.Module) or "_parameters" in vars(self.owner)

    def tensor(self) -> Tensor:
        """Return the tensor that stands here now.

        Raises:
            ParameterChangedError: None does.
        """
        found = self.find()
        if found is None:
            raise gone(self.key, self.owner)
        return found

    def find(self) -> Tensor | None:
        """Return the tensor that stands here now, or None."""
        return parameter_of(self.owner, self.key) if isinstance(self.owner, nn.Module) else self.owner.get(self.key)

    def computed(self) -> Tensor:
        """Return what the owner computes with: the tensor that stands here, under the mask where it was pruned."""
        mask = self.owner._buffers.get(f"{self.key}_mask") if isinstance(self.owner, nn.Module) else None
        return self.tensor() if mask is None else self.tensor() * mask


def gone(name: str, owner: object) -> ParameterChangedError:
    """Return the error for a frozen parameter that is no longer where it was."""
    return ParameterChangedError(
        f"the frozen parameter `{name}` is gone from {type(owner).__name__}",
        "remove the frozen entries before the parameter is deleted, renamed or parametrized",
    )


def parameter_of(module: nn.Module, key: str) -> Tensor | None:
    """Return the parameter that goes by `key`, also after torch.nn.utils.prune has renamed it, or None."""
    found = module._parameters.get(key)  # not getattr: pruning leaves a computed tensor under the parameter's name
    if found is None and f"{key}_mask" in module._buffers:
        return module._parameters.get(f"{key}_orig")
    return found


class Targets:
    """The names that rules may use for a model, each with the sites of the parameter it stands for.

    Args:
        model: A module, or a mapping from name to leaf tensor.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        self.sites: dict[str, Site] = dict(_sites(model))
        self._computed = dict(_computed_tensors(model))
        by_tensor: dict[int, list[str]] = {}
        for name, site in self.sites.items():
            by_tensor.setdefault(id(site.find()), []).append(name)
        self._aliases = {name: names for names in by_tensor.values() for name in names}

    def names_of(self, name: str) -> list[str]:
        """Return every name of the parameter that `name` stands for; a tied parameter has several."""
        return self._aliases[name]

    def find(self, target: str) -> list[str]:
        """Return the names of the parameters that a rule's target speaks of, each parameter once.

        Raises:
            TargetError: It speaks of none.
            UnsupportedParameterError: It speaks of a tensor that is computed from other parameters.
        """
        names = matching(target, [*self.sites, *self._computed]) or self._matching_unwrapped(target)
        for name in names:
            if name in self._computed:
                fact, advice = self._computed[name]
                raise UnsupportedParameterError(f"`{name}` is no parameter: {fact}", advice)
        if not names:
            raise self._unknown(target)
        return list(dict.fromkeys(self._aliases[name][0] for name in names))

    def _matching_unwrapped(self, target: str) -> list[str]:
        """Return what a target speaks of, where it or the model has names of wrappers and the other has not.

        Raises:
            TargetError: Without the names of wrappers, two parameters have one name.
        """
        found = matching_unwrapped(target, [*self.sites, *self._computed])
        known: dict[str, str] = {}
        for name in found:
            other = known.setdefault(unwrapped(name), name)
            if self._aliases.get(name) != self._aliases.get(other):
                raise TargetError(f"`{target}` may be `{other}` or `{name}`", "write the whole name")
        return found

    def _unknown(self, target: str) -> TargetError:
        known = [*self.sites, *(name.removesuffix(".weight") for name in self.sites if name.endswith(".weight"))]
        kind = "matches no parameter" if {"*", "?"} & set(target) else "is no parameter of the model"
        close = difflib.get_close_matches(target, known, n=3) or known[:5]
        listed = ", ".join(f"`{name}`" for name in close)
        return TargetError(f"`{target}` {kind}", f"did you mean {listed}?" if close else "the model has no parameters")


_WRAPPERS: Final = re.compile(r"(^|(?<=\.))(module|_orig_mod|_checkpoint_wrapped_module)\.")
"""The names under which DataParallel and its kin, torch.compile and activation checkpointing hold what they wrap."""


def unwrapped(name: str) -> str:
    """Return a name without the names of wrappers in it."""
    return _WRAPPERS.sub("", name)


def matching(target: str, names: list[str]) -> list[str]:
    """Return the names a target speaks of: those it matches, else the weights of the modules it matches."""
    pattern = re.compile(fnmatch.translate(target))
    weights = [name for name in names if name.endswith(".weight")]
    return [name for name in names if pattern.fullmatch(name)] or [
        name for name in weights if pattern.fullmatch(name.removesuffix(".weight"))
    ]


def matching_unwrapped(target: str, names: list[str]) -> list[str]:
    """Return the names a target speaks of once the names of wrappers are left out of both."""
    found = set(matching(unwrapped(target), [unwrapped(name) for name in names]))
    return [name for name in names if unwrapped(name) in found]


def _sites(model: nn.Module | Mapping[str, Tensor]) -> Iterator[tuple[str, Site]]:
    if not isinstance(model, nn.Module):
        for name, tensor in model.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise SpecError(
                    f"`model` must be a module or a mapping from name to tensor, found the item {name!r}: "
                    f"{type(tensor).__name__}",
                    "give leaf tensors by name",
                )
            yield name, Site(model, name)
        return
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{key}".lstrip("."), Site(module, key)


def _computed_tensors(model: nn.Module | Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Name the tensors that look like parameters but are computed anew from others, each with why and what to do."""
    if not isinstance(model, nn.Module):
        return
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for key in getattr(module, "parametrizations", {}) if parametrize.is_parametrized(module) else ():
            yield (
                f"{dot}{key}",
                (
                    "it is parametrized, so computed anew at every access",
                    "remove the parametrization (torch.nn.utils.parametrize.remove_parametrizations), "
                    f"or freeze `{dot}parametrizations.{key}.*`",
                ),
            )
        for key, suffix in _RENAMED.findall("\n".join(module._parameters)):
            if isinstance(vars(module).get(key), Tensor):
                yield (
                    f"{dot}{key}",
                    (
                        f"a hook computes it from `{dot}{key}{suffix}`",
                        "remove that hook first (torch.nn.utils.prune.remove, remove_weight_norm, "
                        f"remove_spectral_norm), or freeze `{dot}{key}{suffix}`",
                    ),
                )


_RENAMED: Final = re.compile(r"^(.+)(_orig|_v)$", re.MULTILINE)
"""How torch's older hooks rename the parameter they compute from: pruning and spectral norm, weight norm."""


# --------------------------------------------------------------------------------------------------------------------
# Parameters that cannot be held


def check_supported(parameter: Tensor) -> None:
    """Refuse a parameter whose entries no mechanism here can hold.

    Raises:
        UnsupportedParameterError: With what was found and the way out.
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
        lambda p: is_traceable_wrapper_subclass(p),
        "the parameter is a tensor subclass ({parameter.__class__.__name__}) whose memory is not one plain tensor",
        "freeze before the model is quantised or sharded",
    ),
    (lambda p: p.is_meta, "the parameter is on the meta device and has no numbers yet", "materialise it, then freeze"),
    (
        lambda p: p.is_quantized or not (p.is_floating_point() or p.is_complex()) or p.element_size() == 1,
        "the parameter holds {parameter.dtype}, which no optimizer trains",
        "name floating-point parameters alone",
    ),
    (
        lambda p: p.layout != torch.strided,
        "the parameter's layout is {parameter.layout}",
        "only dense (strided) parameters can be held; convert it with `to_dense()`",
    ),
    (
        lambda p: any(step == 0 and size > 1 for step, size in zip(p.stride(), p.shape, strict=True)),
        "the parameter is expanded: several of its entries share one place in memory",
        "make it contiguous first",
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


def check_wrappers(model: nn.Module | Mapping[str, Tensor]) -> None:
    """Refuse a model wrapped in FSDP1, or DeepSpeed: what the optimizer steps are not its parameters.

    Raises:
        UnsupportedParameterError: It is.
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
