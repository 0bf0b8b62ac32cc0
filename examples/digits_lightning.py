"""Train digits with a dilated convolution whose kernel center is always 0, through the Lightning callback.

The last 3x3 convolution looks 5 pixels to every side and never at the pixel itself. AdamW with weight decay would
move a center that merely starts at 0; the callback holds it there, and the picture shows it. The run saves the weights
before and after, and the rule, to look into with the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from freezehooks import freeze_entries
from freezehooks.integrations.lightning import FreezeEntries


class Digits(pl.LightningModule):
    """3x3 convolutions, a dilated one, a 1x1 to ten classes, averaged over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.cnn2 = nn.Conv2d(16, 16, kernel_size=3, padding=1)
        self.cnn3 = nn.Conv2d(16, 8, kernel_size=3, padding=1)
        self.cnn4_dilation = nn.Conv2d(8, 16, kernel_size=3, padding=5, dilation=5)
        self.cnn5 = nn.Conv2d(16, 10, kernel_size=1)
        self.farthest = 0.0

    def forward(self, images: Tensor) -> Tensor:
        for convolution in (self.cnn1, self.cnn2, self.cnn3, self.cnn4_dilation):
            images = torch.relu(convolution(images))
        return torch.mean(self.cnn5(images), dim=(2, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, *args: Any) -> None:
        center = self.cnn4_dilation.weight[:, :, 1, 1]
        self.farthest = max(self.farthest, center.abs().max().item())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-3, weight_decay=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train digits with a dilated convolution that never sees its center.")
    parser.add_argument("--rule", default="cnn4_dilation.weight[center] = 0", help="what to freeze (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training digits (%(default)s)")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="the folder to write to (%(default)s)")
    options = parser.parse_args()
    outputs: Path = options.outputs
    outputs.mkdir(parents=True, exist_ok=True)

    pl.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    train, held_out = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.8, 0.2])

    model, freeze = Digits(), FreezeEntries(options.rule)
    with freeze_entries(model, options.rule):  # the rule's values, before any training
        torch.save(model.state_dict(), outputs / "digits_start.pt")
    trainer = pl.Trainer(
        max_epochs=options.epochs, callbacks=[freeze], accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=512))

    trainer.save_checkpoint(outputs / "digits.ckpt")
    rules = [str(rule) for rule in freeze.rules]
    (outputs / "rules.yaml").write_text("".join(f"- {json.dumps(rule)}\n" for rule in rules))  # JSON text is YAML text

    frozen = freeze.frozen
    assert frozen is not None  # there since the start of fit
    print(frozen)
    print(f"accuracy on {len(held_out)} held-out digits: {trainer.callback_metrics['accuracy']:.1%}")
    print(f"farthest a center of cnn4_dilation was from 0 after any step: {model.farthest}")
    for name in frozen:
        frozen.plot(name, outputs / f"{name}.png")
        print(f"kernels drawn in {outputs / name}.png")
    print("\nLook into what was saved:")
    beside = os.path.relpath(Path(sys.executable).with_name("freezehooks"))
    program = "freezehooks" if shutil.which("freezehooks") else beside
    print(f"  {program} show {outputs}/digits.ckpt")
    print(f"  {program} verify {outputs}/digits.ckpt --rules {outputs}/rules.yaml --against {outputs}/digits_start.pt")
    print(f"  {program} diff {outputs}/digits_start.pt {outputs}/digits.ckpt --limit 0")


if __name__ == "__main__":
    main()
