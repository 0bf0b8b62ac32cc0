"""Open a checkpoint: a path -> the tensors in the file, by name. Nothing in a file is ever executed."""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from .._errors import CheckpointError
from .._shards import is_sharded
from .._targets import unwrapped

_USUAL_KEYS: Final = ("state_dict", "model", "model_state_dict", "module", "state")
"""Where training scripts and frameworks put a model's tensors, beside the optimizer's."""

_SAVE_TENSORS: Final = "save its tensors alone: torch.save(model.state_dict(), path)"


def open_checkpoint(path: str, key: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file by name, without reading numbers that nobody looks at where the format allows.

    Args:
        path: A file of safetensors, or one that torch.save wrote.
        key: Under which key of the file the tensors are, with dots between nested keys. Left out: at the top, or
            under one of the usual keys.

    Raises:
        CheckpointError: There is no such file, it cannot be read without executing what it says, or it holds no
            tensors there.
    """
    _check_is_file(path)
    loaded = _load_safetensors(path) if path.endswith(".safetensors") else _load_torch(path)
    found = _tensors_at(loaded, key, path) if key else _tensors_of(loaded, path)
    return {name: _plain(name, tensor, path) for name, tensor in found.items()}


def freezable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those tensors that rules may speak of: numbers that an optimizer could train."""
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() or tensor.is_complex()}


def counterparts(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, str]:
    """Pair the names of two files: each name of the first that the second knows, perhaps but for names of wrappers.

    Raises:
        CheckpointError: Without the names of wrappers, two names of the second file are one.
    """
    by_core: dict[str, list[str]] = {}
    for name in others:
        by_core.setdefault(unwrapped(name), []).append(name)
    return {name: other for name in tensors if (other := _counterpart(name, others, by_core)) is not None}


def _counterpart(name: str, others: Mapping[str, Tensor], by_core: Mapping[str, list[str]]) -> str | None:
    found = [name] if name in others else by_core.get(unwrapped(name), [])
    if len(found) > 1:
        raise CheckpointError(
            f"`{name}` may be `{found[0]}` or `{found[1]}` of the other file", "save both models with the same wrappers"
        )
    return found[0] if found else None


# --------------------------------------------------------------------------------------------------------------------
# Files


def _check_is_file(path: str) -> None:
    if os.path.isdir(path):
        inside = sorted(entry.name for entry in Path(path).iterdir() if entry.is_file())
        listed = ", ".join(inside[:5]) or "no files"
        raise CheckpointError(f"`{path}` is a folder", f"name the file inside it; it holds {listed}")
    if not os.path.exists(path):
        raise CheckpointError(f"there is no file `{path}`", "check the path")


def _load_torch(path: str) -> Any:
    """Load what torch.save wrote, by the unpickler that makes tensors and builtins and nothing else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch has to say of old formats is no help here
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refused(path, str(error)), _SAVE_TENSORS) from None
    except OSError as error:
        raise CheckpointError(f"`{path}` cannot be read ({error.strerror or error})", "check the file") from None
    except Exception as error:  # whatever the unpickler meets in a file that is no checkpoint
        raise CheckpointError(
            f"`{path}` is no checkpoint, or part of it is missing ({_first_line(error)})",
            "give a file that torch.save wrote, or one that ends in .safetensors; copy it again if it was cut short",
        ) from None


def _refused(path: str, message: str) -> str:
    asked = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"[Uu]nsupported (?:global|class):? ([\w.]+)", message)
    if asked:
        return f"`{path}` holds more than tensors: it asks for `{asked.group(1)}`, and nothing of it was executed"
    return f"`{path}` is no checkpoint of tensors alone, and nothing of it was executed"


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0][:160]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _load_safetensors(path: str) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(
            f"to read `{path}` takes the package safetensors, which is not installed",
            'run `pip install "freezehooks[cli]"`',
        ) from None
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"`{path}` is no file of safetensors, or part of it is missing ({_first_line(error)})", "copy it again"
        ) from None


# --------------------------------------------------------------------------------------------------------------------
# Inside a file


def _tensors_of(loaded: Any, path: str) -> dict[str, Tensor]:
    places = [loaded.get(key) for key in _USUAL_KEYS] if isinstance(loaded, Mapping) else []
    for place in [*places, loaded]:
        found = _named_tensors(place)
        if found:
            return found
    raise CheckpointError(f"`{path}` holds no tensors by name: {_listed(loaded)}", "say where they are: --key KEY")


def _tensors_at(loaded: Any, key: str, path: str) -> dict[str, Tensor]:
    place = loaded
    parts = [key] if isinstance(loaded, Mapping) and key in loaded else key.split(".")
    for part in parts:
        if not isinstance(place, Mapping) or part not in place:
            raise CheckpointError(f"`{path}` has no `{part}` on the way to `{key}`: {_listed(place)}", "correct --key")
        place = place[part]
    found = _named_tensors(place)
    if not found:
        raise CheckpointError(f"`{path}` holds no tensors by name under `{key}`: {_listed(place)}", "correct --key")
    return found


def _named_tensors(place: Any) -> dict[str, Tensor]:
    items = place.items() if isinstance(place, Mapping) else ()
    return {name: item for name, item in items if isinstance(name, str) and isinstance(item, Tensor)}


def _listed(place: Any) -> str:
    if not isinstance(place, Mapping):
        return f"there is a {type(place).__name__}"
    keys = ", ".join(f"`{key}` ({type(item).__name__})" for key, item in list(place.items())[:8])
    more = f" and {len(place) - 8} more" if len(place) > 8 else ""
    return f"its keys are {keys}{more}" if keys else "it is empty"


def _plain(name: str, tensor: Tensor, path: str) -> Tensor:
    """Return a tensor that shares nothing with those of other names but memory, each entry at its own place."""
    if is_sharded(tensor) or type(tensor) not in (Tensor, nn.Parameter):
        raise CheckpointError(
            f"`{name}` of `{path}` is a {type(tensor).__name__}, of which the file may hold a part only",
            "save the full state_dict: torch.distributed.checkpoint.state_dict.get_model_state_dict gathers it",
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        found = "on the meta device" if tensor.is_meta else f"{tensor.dtype} in layout {tensor.layout}"
        raise CheckpointError(f"`{name}` of `{path}` is {found}", "save dense tensors: `to_dense()`, `dequantize()`")
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.contiguous() if 0 in plain.stride() else plain
