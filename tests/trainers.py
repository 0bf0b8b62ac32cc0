"""The frameworks that train a model with few weights: a zoo, like that of models.

Each builds its model and its trainer in the way that its section of docs/frameworks.md shows.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

from freezehooks import FrozenEntries, MaskedOptimizer, freeze_entries

from .zoo import Held

SPEC = "0.weight[1] = 0.5\n2.weight[:, :2]"

AfterStep = Callable[[], None]


class Framework(ABC):
    """One training in a framework.

    Args:
        folder: Where the framework may write.
        frozen: Whether entries are frozen.
        compact: Whether the optimizer is compact.

    Attributes:
        package: The package to install.
        has_compact: Whether the optimizer is torch's, so that it can be compact.
        frozen: The handle; None if nothing is frozen.
    """

    package: ClassVar[str]
    has_compact: ClassVar[bool] = True

    def __init__(self, folder: Path, *, frozen: bool = True, compact: bool = False) -> None:
        pytest.importorskip(self.package)
        torch.manual_seed(1)
        self.folder = folder
        self.frozen: FrozenEntries | None = None
        self.compact = compact
        self.model: Any = self.make_model()
        self.held = self.what_is_held()
        self.build(frozen)

    def make_model(self) -> Any:
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

    def what_is_held(self) -> dict[str, Held]:
        """The meaning of the rules, by plain indexing."""
        first, last = self.model[0].weight, self.model[2].weight
        return {"0.weight": _held(first, 1, 0.5), "2.weight": _held(last, (slice(None), slice(2)))}

    @abstractmethod
    def build(self, frozen: bool) -> None:
        """Freeze, if asked for, and build the optimizer and the trainer."""

    @abstractmethod
    def fit(self, epochs: int, after_step: AfterStep) -> None:
        """Train, and call a function after each step."""

    def check(self) -> None:
        """Check the handle's promise."""
        assert self.frozen is not None
        self.frozen.assert_frozen(guarded=self.has_compact)

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a checkpoint as the framework does."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Resume from a checkpoint."""

    def weights(self) -> dict[str, Tensor]:
        """The parameters by the names that `held` has for them."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    def masked(self, frozen: bool, model: Any) -> Optimizer:
        """AdamW, plain or masked."""
        optimizer: Optimizer = AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
        if frozen:
            self.frozen = freeze_entries(model, SPEC)
            optimizer = MaskedOptimizer(optimizer, self.frozen, compact=self.compact)
        return optimizer


def _held(weight: Tensor, where: Any, value: float | None = None) -> Held:
    frozen, values = torch.zeros_like(weight, dtype=torch.bool), weight.detach().clone()
    frozen[where] = True
    if value is not None:
        values[where] = value
    return Held(frozen, values)


def _numbers() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(24, 4, generator=generator), torch.randint(3, (24,), generator=generator)


def _loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*_numbers()), batch_size=8)


class _Followed:
    """Call a function after each step of any optimizer of torch inside the block."""

    def __init__(self, after_step: AfterStep) -> None:
        self._handle = register_optimizer_step_post_hook(lambda *_: after_step())

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()


class Ignite(Framework):
    package = "ignite"

    def build(self, frozen: bool) -> None:
        from ignite.engine import create_supervised_trainer

        self.optimizer = self.masked(frozen, self.model)
        self.trainer = create_supervised_trainer(self.model, self.optimizer, nn.CrossEntropyLoss())

    def fit(self, epochs: int, after_step: AfterStep) -> None:
        with _Followed(after_step):
            self.trainer.run(_loader(), max_epochs=self.trainer.state.epoch + epochs)

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "frozen": self.frozen, "trainer": self.trainer}

    def save(self, folder: Path) -> None:
        from ignite.handlers import Checkpoint, DiskSaver

        Checkpoint(self._parts(), DiskSaver(folder))(self.trainer)

    def load(self, folder: Path) -> None:
        from ignite.handlers import Checkpoint

        (path,) = folder.glob("*.pt")
        Checkpoint.load_objects(self._parts(), torch.load(path, weights_only=True))


class Skorch(Framework):
    package = "skorch"

    def build(self, frozen: bool) -> None:
        from skorch import NeuralNetClassifier

        self.net = NeuralNetClassifier(
            self.model,
            criterion=nn.CrossEntropyLoss,
            optimizer=AdamW,
            optimizer__weight_decay=0.1,
            lr=0.05,
            batch_size=8,
            train_split=None,
            verbose=0,
        ).initialize()
        if frozen:
            self.frozen = freeze_entries(self.net.module_, SPEC)
            self.frozen.guard(self.net.optimizer_, compact=self.compact)

    def fit(self, epochs: int, after_step: AfterStep) -> None:
        with _Followed(after_step):
            self.net.partial_fit(*_numbers(), epochs=epochs)

    def save(self, folder: Path) -> None:
        self.net.save_params(f_params=folder / "model.pt", f_optimizer=folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        self.net.load_params(f_params=folder / "model.pt", f_optimizer=folder / "optimizer.pt")


class Fastai(Framework):
    package = "fastai"

    def build(self, frozen: bool) -> None:
        from fastai.data.core import DataLoaders
        from fastai.learner import Learner
        from fastai.optimizer import OptimWrapper

        loaders = DataLoaders(_loader(), _loader())
        optimizer = OptimWrapper(opt=self.masked(frozen, self.model))
        self.learner = Learner(loaders, self.model, loss_func=nn.CrossEntropyLoss(), opt_func=optimizer)
        self.learner.logger = lambda *_: None

    def fit(self, epochs: int, after_step: AfterStep) -> None:
        with _Followed(after_step):
            self.learner.fit(epochs, 0.05, wd=0.1)

    def save(self, folder: Path) -> None:
        self.learner.save(folder / "learner")

    def load(self, folder: Path) -> None:
        self.learner.create_opt()
        self.learner.load(folder / "learner", weights_only=True)


class FastaiOwn(Fastai):
    """With fastai's own optimizer, which is not one of torch's."""

    has_compact = False

    def build(self, frozen: bool) -> None:
        from fastai.callback.core import Callback
        from fastai.data.core import DataLoaders
        from fastai.learner import Learner
        from fastai.optimizer import Adam

        self.learner = Learner(
            DataLoaders(_loader(), _loader()), self.model, loss_func=nn.CrossEntropyLoss(), opt_func=Adam
        )
        self.learner.logger = lambda *_: None
        if frozen:
            self.frozen = handle = freeze_entries(self.model, SPEC)
            self.learner.add_cb(Callback(after_step=lambda self: handle.impose()))

    def fit(self, epochs: int, after_step: AfterStep) -> None:
        from fastai.callback.core import Callback

        self.learner.fit(epochs, 0.05, wd=0.1, cbs=[Callback(after_step=lambda self: after_step())])


class Keras(Framework):
    package = "keras"
    has_compact = False

    def make_model(self) -> Any:
        import keras

        keras.utils.set_random_seed(1)
        layers = keras.Input((4,)), keras.layers.Dense(6, activation="relu", name="a"), keras.layers.Dense(3, name="b")
        model = keras.Sequential(layers)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.AdamW(0.05, weight_decay=0.1), loss)
        return model

    def what_is_held(self) -> dict[str, Held]:
        first, last = self.weights()["a/kernel"], self.weights()["b/kernel"]
        return {"a/kernel": _held(first, 1, 0.5), "b/kernel": _held(last, (slice(None), slice(2)))}

    def weights(self) -> dict[str, Tensor]:
        return {"/".join(each.path.split("/")[-2:]): each.value for each in self.model.trainable_variables}

    def build(self, frozen: bool) -> None:
        if frozen:
            self.frozen = freeze_entries(self.model, "*a/kernel[1] = 0.5\n*b/kernel[:, :2]")

    def fit(self, epochs: int, after_step: AfterStep) -> None:
        from keras.callbacks import LambdaCallback

        frozen = self.frozen
        hold = [LambdaCallback(on_train_batch_end=lambda batch, logs: frozen.impose())] if frozen is not None else []
        watch = LambdaCallback(on_train_batch_end=lambda batch, logs: after_step())
        inputs, classes = (numbers.numpy() for numbers in _numbers())
        self.model.fit(inputs, classes, 8, epochs, verbose=0, shuffle=False, callbacks=[*hold, watch])

    def save(self, folder: Path) -> None:
        self.model.save(folder / "model.keras")

    def load(self, folder: Path) -> None:
        import keras

        self.model = keras.saving.load_model(folder / "model.keras")
        self.build(frozen=True)


class Opacus(Framework):
    package = "opacus"

    def build(self, frozen: bool) -> None:
        import opacus

        self.private, self.optimizer, self.loader = opacus.PrivacyEngine().make_private(
            module=self.model,
            optimizer=self.masked(frozen, self.model),
            data_loader=_loader(),
            noise_multiplier=0.5,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )

    def fit(self, epochs: int, after_step: AfterStep) -> None:
        for _ in range(epochs):
            torch.manual_seed(3)  # of the noise
            for inputs, classes in self.loader:
                self.optimizer.zero_grad()
                nn.functional.cross_entropy(self.private(inputs), classes).backward()
                if self.frozen is None:  # by hand: Opacus clips by the norms of all entries
                    for name, part in self.held.items():
                        self.model.get_parameter(name).grad_sample.masked_fill_(part.frozen, 0)
                self.optimizer.step()
                after_step()

    def save(self, folder: Path) -> None:
        torch.save([self.private.state_dict(), self.optimizer.state_dict()], folder / "both.pt")

    def load(self, folder: Path) -> None:
        model, optimizer = torch.load(folder / "both.pt")
        self.private.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)


class HuggingFace(Framework):
    """The Trainer, on a model that is built from a configuration, with the callback as it is."""

    package = "transformers"
    spec: ClassVar[str] = "transformer.wte[~12:]\ntransformer.h.0.mlp.c_fc[:, 1] = 0.5"
    options: ClassVar[dict[str, Any]] = {}

    def make_model(self) -> Any:
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes: dict[str, Any] = {"vocab_size": 160, "n_positions": 8, "n_embd": 32, "n_layer": 1, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=4, eos_token_id=4, pad_token_id=0))

    def what_is_held(self) -> dict[str, Held]:
        gpt2 = self.model.transformer
        names = "transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"
        return {
            names[0]: _held(gpt2.wte.weight, slice(12)),
            names[1]: _held(gpt2.h[0].mlp.c_fc.weight, (slice(None), 1), 0.5),
        }

    def build(self, frozen: bool) -> None:
        from freezehooks.integrations.transformers import FreezeEntriesCallback

        self.callbacks: list[Any] = [FreezeEntriesCallback(self.spec, compact=self.compact)] if frozen else []
        self.checkpoint: Path | None = None
        self.epochs = 0

    def fit(self, epochs: int, after_step: AfterStep) -> None:
        from transformers import TrainerCallback

        watch = type("Watch", (TrainerCallback,), {"on_step_end": lambda *_, **__: after_step()})()
        self.epochs += epochs
        arguments: dict[str, Any] = {
            "output_dir": str(self.folder),
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.1,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "epoch",
            "logging_strategy": "no",
            **self.options,
        }
        if self.checkpoint is not None:
            arguments["resume_from_checkpoint"] = str(self.checkpoint)
        trainer = self.trainer(arguments, [*self.callbacks, watch])
        trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))
        if self.callbacks:
            self.frozen = self.callbacks[0].frozen

    def trainer(self, arguments: dict[str, Any], callbacks: list[Any]) -> Any:
        from transformers import Trainer, TrainingArguments

        tokens = torch.randint(20, (12, 6), generator=torch.Generator().manual_seed(5))
        data: Any = [{"input_ids": row, "labels": row} for row in tokens]
        return Trainer(self.model, TrainingArguments(**arguments), train_dataset=data, callbacks=callbacks)

    def check(self) -> None:
        assert self.frozen is not None  # the callback has removed its hooks
        assert not self.frozen.attached
        assert self.frozen.violations() == ()

    def save(self, folder: Path) -> None:
        (checkpoint,) = self.folder.glob("checkpoint-*")
        shutil.copytree(checkpoint, folder / checkpoint.name)

    def load(self, folder: Path) -> None:
        (self.checkpoint,) = folder.glob("checkpoint-*")
        self.epochs = 1


class BitsAndBytes(HuggingFace):
    """8-bit AdamW of bitsandbytes; the Trainer keeps the moments of embeddings in 32 bits."""

    package = "bitsandbytes"
    has_compact = False
    options: ClassVar[dict[str, Any]] = {"optim": "adamw_bnb_8bit"}


class TorchAO(HuggingFace):
    """8-bit AdamW of torchao, whose step is not compiled here: that takes a minute on a CPU."""

    package = "torchao"
    has_compact = False
    options: ClassVar[dict[str, Any]] = {"optim": "adamw_torch_8bit"}

    def fit(self, epochs: int, after_step: AfterStep) -> None:
        with torch.compiler.set_stance("force_eager"):
            super().fit(epochs, after_step)


class TorchAO4bit(TorchAO):
    options: ClassVar[dict[str, Any]] = {"optim": "adamw_torch_4bit"}


def _tokenizer() -> Any:
    """A tokenizer of whole words that is made in memory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "eos_token": "[EOS]",
    }
    words = [*special.values(), *(f"w{n}" for n in range(155))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8, **special)


def _texts(step: int) -> list[str]:
    return [" ".join(f"w{(n * step * m + m) % 155}" for m in range(1, 6)) for n in range(1, 13)]


class TRL(HuggingFace):
    package = "trl"

    def trainer(self, arguments: dict[str, Any], callbacks: list[Any]) -> Any:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(
            model=self.model,
            args=SFTConfig(**arguments, max_length=8, gradient_checkpointing=False),
            train_dataset=Dataset.from_dict({"text": _texts(3)}),
            processing_class=_tokenizer(),
            callbacks=callbacks,
        )


class SentenceTransformers(HuggingFace):
    package = "sentence_transformers"
    spec = "*word_embeddings[~12:]\n*intermediate.dense[1] = 0.5"

    def make_model(self) -> Any:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
        from transformers import BertConfig, BertModel

        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 128,
        }
        with tempfile.TemporaryDirectory() as folder:
            BertModel(BertConfig(vocab_size=160, **sizes, max_position_embeddings=8, pad_token_id=0)).save_pretrained(
                folder
            )
            _tokenizer().save_pretrained(folder)
            return SentenceTransformer(modules=[Transformer(folder), Pooling(32)], device="cpu")

    def what_is_held(self) -> dict[str, Held]:
        named = self.weights()
        words = next(name for name in named if name.endswith("word_embeddings.weight"))
        dense = next(name for name in named if name.endswith("intermediate.dense.weight"))
        return {words: _held(named[words], slice(12)), dense: _held(named[dense], 1, 0.5)}

    def trainer(self, arguments: dict[str, Any], callbacks: list[Any]) -> Any:
        from datasets import Dataset
        from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        return SentenceTransformerTrainer(
            model=self.model,
            args=SentenceTransformerTrainingArguments(**arguments),
            train_dataset=Dataset.from_dict({"anchor": _texts(3), "positive": _texts(5)}),
            loss=MultipleNegativesRankingLoss(self.model),
            callbacks=callbacks,
        )


FRAMEWORKS: dict[str, type[Framework]] = {
    "ignite": Ignite,
    "skorch": Skorch,
    "fastai": Fastai,
    "fastai_own": FastaiOwn,
    "keras": Keras,
    "opacus": Opacus,
    "transformers": HuggingFace,
    "bitsandbytes": BitsAndBytes,
    "torchao_8bit": TorchAO,
    "torchao_4bit": TorchAO4bit,
    "trl": TRL,
    "sentence_transformers": SentenceTransformers,
}
