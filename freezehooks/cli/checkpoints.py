"""Open a checkpoint: a path -> the tensors in the file, by name. Nothing in a file is ever executed."""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from .._errors import CheckpointError
from .._held.names import unwrapped
from .._ranks.sharding import is_sharded

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
            tensors there, or those of two models.
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
        CheckpointError: Without the names of wrappers, two names of a file are one.
    """
    ours, theirs = _by_core(tensors, others), _by_core(others, tensors)
    paired = dict(_pair(names, theirs[core]) for core, names in ours.items() if core in theirs)
    paired |= {name: name for name in tensors if name in others}
    return {name: paired[name] for name in tensors if name in paired}


def _by_core(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the names that one file alone has, under what they are without the names of wrappers."""
    found: dict[str, list[str]] = {}
    for name in tensors:
        if name not in others:
            found.setdefault(unwrapped(name), []).append(name)
    return found


def _pair(ours: Sequence[str], theirs: Sequence[str]) -> tuple[str, str]:
    advice = "save both models with the same wrappers"
    if len(theirs) > 1:
        raise CheckpointError(f"`{ours[0]}` may be `{theirs[0]}` or `{theirs[1]}` of the other file", advice)
    if len(ours) > 1:
        raise CheckpointError(f"`{theirs[0]}` of the other file may be `{ours[0]}` or `{ours[1]}`", advice)
    return ours[0], theirs[0]


# --------------------------------------------------------------------------------------------------------------------
# Files


def _check_is_file(path: str) -> None:
    if os.path.isdir(path):
        raise CheckpointError(f"`{path}` is a folder", f"name the file inside it{_files_in(path)}")
    if not os.path.exists(path):
        raise CheckpointError(f"there is no file `{path}`", "check the path")


def _files_in(path: str) -> str:
    try:
        inside = sorted(entry.name for entry in Path(path).iterdir() if entry.is_file())
    except OSError:  # it may not be read
        return ""
    return f"; it holds {', '.join(inside[:5]) or 'no files'}"


def _load_torch(path: str) -> Any:
    """Load what torch.save wrote, by the unpickler that makes tensors and builtins and nothing else."""
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_is_stored_plainly(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch has to say of old formats is no help here
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refused(path, str(error)), _SAVE_TENSORS) from None
    except OSError as error:
        raise CheckpointError(f"`{path}` cannot be read ({error.strerror or error})", "check the file") from None
    except Exception as error:  # whatever the unpickler meets in a file that is no checkpoint
        if lacks_memory(error):
            raise
        raise CheckpointError(
            f"`{path}` is no checkpoint, or part of it is missing ({_first_line(error)})",
            "give a file that torch.save wrote, or one that ends in .safetensors; copy it again if it was cut short",
        ) from None


def lacks_memory(error: Exception) -> bool:
    """Return whether Python, or torch, has asked for more memory than there is."""
    return isinstance(error, MemoryError) or bool(re.search("allocate memory|tried to allocate", str(error)))


def _check_is_stored_plainly(path: str) -> None:
    """Refuse an archive that somebody has packed anew: mapped into memory, its bytes would be taken for numbers."""
    with zipfile.ZipFile(path) as archive:
        packed = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
    numbers = next((name for name in packed if "/data/" in name), None)  # the others are read, and are unpacked then
    if numbers is not None:
        raise CheckpointError(
            f"`{path}` is compressed (`{numbers}` in it), as torch.save never does",
            "load it and save it again: torch.save(torch.load(path, weights_only=True), path)",
        )


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
    usual = [key for key in _USUAL_KEYS if isinstance(loaded, Mapping) and _named_tensors(loaded.get(key))]
    if len(usual) > 1:
        first, second = usual[:2]
        raise CheckpointError(f"`{path}` holds tensors under `{first}` and `{second}`", f"say which: --key {first}")
    found = _named_tensors(loaded[usual[0]] if usual else loaded)
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
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        advice = "save dense tensors: `to_dense()`, `dequantize()`"
        raise CheckpointError(f"`{name}` of `{path}` is {_oddity(tensor)}", advice)
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.contiguous() if 0 in plain.stride() else plain


def _oddity(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "nested"
    return "on the meta device" if tensor.is_meta else f"{tensor.dtype} in layout {tensor.layout}"
