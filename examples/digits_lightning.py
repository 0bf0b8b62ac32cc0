"""Train digits with a dilated convolution whose kernel center is always 0, through the Lightning callback.

The last 3x3 convolution looks 5 pixels to every side and never at the pixel itself. The same network is trained twice
from the same weights: plain, and with the rule. A picture shows one kernel of both over the epochs. The run also leaves
files for the command line: the weights before and after training, and the rule.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
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


class KeepKernel(pl.Callback):
    """Keep a copy of one kernel, before training and after each epoch."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kernels: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.keep(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.keep(pl_module)
        print(".", end="", flush=True)

    def keep(self, model: nn.Module) -> None:
        self.kernels.append(model.get_parameter(self.name)[0, 0].detach().clone())


def train(model: Digits, epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    train, held_out = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.8, 0.2])
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=512))
    return trainer


def draw(title: str, frozen: Tensor, rows: dict[str, list[Tensor]], path: Path) -> None:
    """Draw a kernel over the epochs, a row for each training, with a frame around each frozen entry."""
    last = len(next(iter(rows.values()))) - 1
    epochs = sorted({0, min(1, last), last // 4, last})
    limit = max(float(kernel.abs().max()) for kernels in rows.values() for kernel in kernels)
    figure = Figure(figsize=(1.6 * len(epochs) + 0.8, 1.75 * len(rows) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(len(rows), len(epochs), squeeze=False)
    for row, (label, kernels) in enumerate(rows.items()):
        for axis, epoch in zip(axes[row], epochs, strict=True):
            kernel = kernels[epoch]
            axis.imshow(kernel, cmap=colormaps["RdBu"], vmin=-limit, vmax=limit)
            axis.set(xticks=[], yticks=[])
            for y, x in torch.ones_like(frozen).nonzero().tolist():
                shade = "white" if abs(kernel[y, x]) > 0.6 * limit else "black"
                axis.text(x, y, f"{kernel[y, x]:.2f}", ha="center", va="center", fontsize=9, color=shade)
                if frozen[y, x] and row:
                    axis.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, linewidth=2.5))
            if row == 0:
                axis.set_title("before training" if epoch == 0 else f"epoch {epoch}", fontsize=10)
        axes[row][0].set_ylabel(label, fontsize=11)
    figure.savefig(path, dpi=110)


def silence() -> None:
    """Leave out what Lightning says about hardware and settings, and the table that is printed here already."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train digits with a dilated convolution that never sees its center.")
    parser.add_argument("--rule", default="cnn4_dilation.weight[center] = 0", help="what to freeze (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training digits (%(default)s)")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="the folder to write to (%(default)s)")
    options = parser.parse_args()
    outputs: Path = options.outputs
    outputs.mkdir(parents=True, exist_ok=True)
    silence()
    torch.set_num_threads(1)  # so small a network gains nothing from more, and on a busy machine they slow it down

    pl.seed_everything(0, verbose=False)
    plain, model = Digits(), Digits()
    model.load_state_dict(plain.state_dict())  # both trainings start from the same weights
    with freeze_entries(model, options.rule) as frozen:  # the rule's values, before any training
        torch.save(model.state_dict(), outputs / "digits_start.pt")
        print(frozen)
        name = next(iter(frozen))
        entries = frozen[name].frozen[0, 0]

    plain_kernel, kernel = KeepKernel(name), KeepKernel(name)
    print(f"\nplain training, {options.epochs} epochs ", end="")
    plain_trainer = train(plain, options.epochs, plain_kernel)
    print(f"\ntraining with the rule, {options.epochs} epochs ", end="")
    freeze = FreezeEntries(options.rule)
    trainer = train(model, options.epochs, freeze, kernel)

    trainer.save_checkpoint(outputs / "digits.ckpt")
    rules = [str(rule) for rule in freeze.rules]
    (outputs / "rules.yaml").write_text("".join(f"- {json.dumps(rule)}\n" for rule in rules))  # JSON text is YAML text

    print(f"\n\n{'':52}{'plain':>8}{'frozen':>8}")
    told = (plain_trainer, trainer)
    print(f"{'accuracy on 359 held-out digits':52}" + "".join(f"{t.callback_metrics['accuracy']:8.1%}" for t in told))
    print(f"{'farthest a center of cnn4_dilation was from 0':52}{plain.farthest:8.3f}{model.farthest:8.3f}")
    pictures = {"one kernel over the epochs": outputs / "kernel_over_epochs.png"}
    title = f"one kernel, trained plain and with the rule {frozen[name].rules[0]}"
    draw(title, entries, {"plain": plain_kernel.kernels, "frozen": kernel.kernels}, outputs / "kernel_over_epochs.png")
    assert freeze.frozen is not None  # there since the start of fit
    for each in freeze.frozen:
        pictures[f"all kernels of {each}"] = outputs / f"{each}.png"
        freeze.frozen.plot(each, outputs / f"{each}.png")
    print()
    for what, path in pictures.items():
        print(f"{what + ':':52}{path}")
    print("\nLook into what was saved:")
    beside = os.path.relpath(Path(sys.executable).with_name("freezehooks"))
    program = "freezehooks" if shutil.which("freezehooks") else beside
    print(f"  {program} show {outputs}/digits.ckpt")
    print(f"  {program} verify {outputs}/digits.ckpt --rules {outputs}/rules.yaml --against {outputs}/digits_start.pt")
    print(f"  {program} diff {outputs}/digits_start.pt {outputs}/digits.ckpt --limit 0")


if __name__ == "__main__":
    main()
