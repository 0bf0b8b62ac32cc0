"""Training only new rows of an embedding, from the Trainer to the command line: trained, saved, resumed, verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("safetensors")

from freezehooks.integrations.transformers import FreezeEntriesCallback  # after the skips

from .checkpoints import Folder
from .claims import same_bits
from .test_transformers import OLD, SAVING, VOCABULARY, _gpt2, _trainer

NEW: Final = {True: [f"transformer.wte[{OLD}:]"], False: [f"transformer.wte[{OLD}:]", f"lm_head[{OLD}:]"]}
"""What trains, by whether the head is tied to the embedding."""


@pytest.fixture
def folder(tmp_path: Path, capsys: Any) -> Folder:
    return Folder(tmp_path, capsys)


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(path / "model.safetensors")
    return found


def _train(tied: bool, base: Path, folder: Path, resume: str | None = None) -> dict[str, Tensor]:
    """Train the new rows of the model in `base`, save it in `folder`, and return what was saved."""
    model = type(_gpt2(tied=tied)).from_pretrained(base)
    callback = FreezeEntriesCallback(train_only=NEW[tied], compact=True)
    trainer = _trainer(model, folder / "training", callback, **SAVING)
    trainer.train(resume_from_checkpoint=resume)
    model.save_pretrained(folder / "saved")
    return _tensors(folder / "saved")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_only_the_new_rows_differ_from_the_pretrained_model(tied: bool, folder: Folder) -> None:
    base, path = folder.path / "base", folder.path / "through"
    _gpt2(tied=tied).save_pretrained(base)
    saved, before = _train(tied, base, path), _tensors(base)
    again = _train(tied, base, folder.path / "resumed", str(path / "training" / "checkpoint-3"))
    assert list(saved) == list(before) == list(again)
    for name, tensor in saved.items():
        assert same_bits(tensor, again[name]), f"{name} differs in the resumed run"
        kept = slice(OLD) if len(tensor) == VOCABULARY and tensor.dim() == 2 else slice(None)
        assert same_bits(tensor[kept], before[name][kept]), name
        assert kept == slice(None) or bool((tensor[OLD:] != before[name][OLD:]).any())

    rules = [argument for rule in NEW[tied] for argument in ("--train-only", rule)]
    verify = ("verify", "--against", str(base / "model.safetensors"), *rules)
    for checkpoint in (path / "saved", path / "training" / "checkpoint-6", folder.path / "resumed" / "saved"):
        code, said = folder.run(*verify, str(checkpoint / "model.safetensors"))
        assert code == 0, said
        assert said.endswith("0 other tensors were not looked at\n")
    saved["transformer.ln_f.bias"][0] += 1
    code, said = folder.run(*verify, folder.saved("other.safetensors", saved))
    assert code == 1
    assert "NO  transformer.ln_f.bias" in said
