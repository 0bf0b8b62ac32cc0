"""Files for the tests of the command line: checkpoints, rules, and what must never be executed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from freezehooks.cli import main


class Folder:
    """A folder of checkpoints and rules, and the command line in it.

    Args:
        path: Where it is.
        capture: pytest's capsys.
    """

    def __init__(self, path: Path, capture: Any) -> None:
        self.path = path
        self._capture = capture

    def checkpoint(self, name: str, /, **tensors: Any) -> str:
        """Save tensors, their names with `__` for a dot, and return the path."""
        return self.saved(name, {key.replace("__", "."): tensor for key, tensor in tensors.items()})

    def saved(self, name: str, content: Any) -> str:
        path = str(self.path / name)
        if name.endswith(".safetensors"):
            pytest.importorskip("safetensors.torch").save_file(content, path)
        else:
            torch.save(content, path)
        return path

    def text(self, name: str, content: str) -> str:
        (self.path / name).write_text(content, encoding="utf-8")
        return str(self.path / name)

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run a command and return its exit code and what it printed: its answer, or its error if the code is 2."""
        self._capture.readouterr()
        code = main(list(arguments))
        out, error = self._capture.readouterr()
        assert error.count("\n") == (code == 2), error
        return code, error if code == 2 else out


class Hostile:
    """Executed by a pickle that is loaded unsafely: creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def ramp(*shape: int) -> Tensor:
    """Numbers from 1 on, in the given shape."""
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape)
