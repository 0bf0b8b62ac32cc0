"""Opens checkpoints: reads the tensors in a file by name, without ever executing anything in it."""

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
from .._ranks.sharding import is_sharded

_USUAL_KEYS: Final = ("state_dict", "model", "model_state_dict", "module", "state")
"""The keys under which training scripts and frameworks save a model's tensors, beside those of the optimizer."""


def open_checkpoint(path: str, key: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file by name, reading their data lazily if the format allows.

    Args:
        path: A safetensors file, or one that torch.save wrote.
        key: The key of the tensors in the file, with dots between nested keys. Left out: they are at the top level, or
            under one of the usual keys.

    Raises:
        CheckpointError: There is no such file, it cannot be read without executing code in it, or it has no tensors
            there, or those of two models.
    """
    loaded = load_file(path)
    content = _at(key, loaded, path) if key else _at_usual_key(loaded, path)
    found = _named_tensors(content)
    if not found:
        where, advice = (f" under `{key}`", "correct --key") if key else ("", "say where they are: --key KEY")
        raise CheckpointError(f"`{path}` holds no tensors by name{where}: {_listed(content)}", advice)
    return {name: _plain(name, tensor, path) for name, tensor in found.items()}


def load_file(path: str) -> Any:
    """Return the content of a file, which may consist of tensors and builtins only.

    Raises:
        CheckpointError: There is no such file, or it cannot be read without executing code in it.
    """
    _check_is_file(path)
    return _load(path)


def is_freezable(tensor: Tensor) -> bool:
    """Return whether a rule may freeze a tensor: whether its dtype can be trained."""
    return tensor.is_floating_point() or tensor.is_complex()


def _check_is_file(path: str) -> None:
    if os.path.isdir(path):
        try:
            inside = sorted(entry.name for entry in Path(path).iterdir() if entry.is_file())
            held = f"; it holds {', '.join(inside[:5]) or 'no files'}"
        except OSError:  # no permission to read it
            held = ""
        raise CheckpointError(f"`{path}` is a folder", f"name the file inside it{held}")
    if path.endswith(".index.json"):
        raise CheckpointError(
            f"`{path}` lists the files of a checkpoint and holds no tensors", "name one of those files"
        )
    if not os.path.exists(path):
        raise CheckpointError(f"there is no file `{path}`", "check the path")


def _load(path: str) -> Any:
    is_safetensors = path.endswith(".safetensors")
    try:
        return _load_safetensors(path) if is_safetensors else _load_torch(path)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|[Uu]nsupported (?:global|class):?)(?: GLOBAL)? ([\w.]+)", str(error))
        what = f"holds more than tensors: it asks for `{asked[1]}`" if asked else "is not a checkpoint of tensors only"
        advice = "save only its tensors: torch.save(model.state_dict(), path)"
        raise CheckpointError(f"`{path}` {what}, and nothing of it was executed", advice) from None
    except OSError as error:
        raise CheckpointError(f"`{path}` cannot be read ({error.strerror or error})", "check the file") from None
    except Exception as error:  # a file that is not a checkpoint may raise anything
        if lacks_memory(error):
            raise
        kind = "file of safetensors" if is_safetensors else "checkpoint"
        said = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:160].rstrip(": ")
        raise CheckpointError(
            f"`{path}` is not a {kind}, or is incomplete ({said})",
            "give a file that torch.save wrote, or one that ends in .safetensors; copy it again if it was cut short",
        ) from None


def lacks_memory(error: Exception) -> bool:
    """Return whether an error means that memory has run out."""
    return isinstance(error, MemoryError) or bool(re.search("allocate memory|tried to allocate", str(error)))


def _check_is_stored_plainly(path: str) -> None:
    """Reject a compressed archive: torch maps it into memory, and would read compressed bytes as numbers."""
    with zipfile.ZipFile(path) as archive:
        packed = [item.filename for item in archive.infolist() if item.compress_type != zipfile.ZIP_STORED]
    numbers = next((name for name in packed if "/data/" in name), None)  # other items are read, so may be compressed
    if numbers is not None:
        raise CheckpointError(
            f"`{path}` is compressed (`{numbers}` in it), as torch.save never does",
            "load it and save it again: torch.save(torch.load(path, weights_only=True), path)",
        )


def _load_torch(path: str) -> Any:
    """Load what torch.save wrote, with the unpickler that creates only tensors and builtins."""
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_is_stored_plainly(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warnings about old formats do not help here
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _load_safetensors(path: str) -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise CheckpointError(
            f"reading `{path}` needs the package safetensors, which is not installed",
            'run `pip install "freezehooks[cli]"`',
        ) from None
    return safetensors.torch.load_file(path)


def _at(key: str, loaded: Any, path: str) -> Any:
    content = loaded
    for step in [key] if isinstance(loaded, Mapping) and key in loaded else key.split("."):
        if not isinstance(content, Mapping) or step not in content:
            fact = f"`{path}` has no `{step}` on the way to `{key}`: {_listed(content)}"
            raise CheckpointError(fact, "correct --key")
        content = content[step]
    return content


def _at_usual_key(loaded: Any, path: str) -> Any:
    """Return what is under the one usual key with tensors or, if there is none, everything that was loaded."""
    usual = [key for key in _USUAL_KEYS if isinstance(loaded, Mapping) and _named_tensors(loaded.get(key))]
    if len(usual) > 1:
        first, second = usual[:2]
        raise CheckpointError(f"`{path}` holds tensors under `{first}` and `{second}`", f"say which: --key {first}")
    return loaded[usual[0]] if usual else loaded


def _named_tensors(content: Any) -> dict[str, Tensor]:
    items = content.items() if isinstance(content, Mapping) else ()
    return {name: item for name, item in items if isinstance(name, str) and isinstance(item, Tensor)}


def _listed(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"there is a {type(content).__name__}"
    keys = ", ".join(f"`{key}` ({type(item).__name__})" for key, item in list(content.items())[:8])
    more = f" and {len(content) - 8} more" if len(content) > 8 else ""
    return f"its keys are {keys}{more}" if keys else "it is empty"


def _plain(name: str, tensor: Tensor, path: str) -> Tensor:
    """Return a plain dense tensor, each entry of which has memory of its own."""
    if is_sharded(tensor) or type(tensor) not in (Tensor, nn.Parameter):
        raise CheckpointError(
            f"`{name}` of `{path}` is a {type(tensor).__name__}, of which the file may hold only a shard",
            "save the full state_dict: torch.distributed.checkpoint.state_dict.get_model_state_dict gathers it",
        )
    if tensor.is_meta:
        raise CheckpointError(
            f"`{name}` of `{path}` is on the meta device, and has no numbers", "save the model after it was loaded"
        )
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        stored = "nested" if tensor.is_nested else f"{tensor.dtype} in layout {tensor.layout}"
        raise CheckpointError(f"`{name}` of `{path}` is {stored}", "save dense tensors: `to_dense()`, `dequantize()`")
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.contiguous() if 0 in plain.stride() else plain
