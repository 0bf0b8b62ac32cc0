"""On several ranks inside Lightning and Accelerate: DistributedDataParallel and FSDP2, checkpoints, resuming."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from freezehooks import MaskedOptimizer, freeze_entries

from .parallel import FIXED, OneProcess, adamw, batch, build, loss_of, my_part, wholes
from .ranks import folder, on_ranks
from .test_sharded import shard

pytest.importorskip("lightning")
pytest.importorskip("accelerate")

_RULES = [
    {f"net.{name}": how for name, how in rule.items()} if isinstance(rule, dict) else f"net.{rule}" for rule in FIXED
]
_STEPS = 3
_TWO = {"data_parallel_size": 2, "tensor_parallel_size": 1}


def _lightning_module() -> Any:
    import lightning
    from torch.distributed.fsdp import FSDPModule

    class Module(lightning.LightningModule):  # type: ignore[misc]  # in a function: Lightning is optional
        def __init__(self) -> None:
            super().__init__()
            self.net: Any = build()

        def configure_model(self) -> None:
            mesh = self.device_mesh
            if mesh is not None and not isinstance(self.net, FSDPModule):
                shard(self.net, mesh=mesh["data_parallel"])

        def training_step(self, images: list[Tensor], index: int) -> Tensor:
            return loss_of(self.net(images[0]))

        def configure_optimizers(self) -> Any:
            return adamw(self)

        def train_dataloader(self) -> Any:
            images = torch.cat([my_part(batch(step)) for step in range(_STEPS)])
            return DataLoader(TensorDataset(images), batch_size=len(images) // _STEPS)

    return Module()


def _fit(strategy: Any, callback: Any, epochs: int, path: Path | None = None) -> tuple[Any, Any]:
    import lightning

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[callback],
        use_distributed_sampler=False,  # the module shares the batches out itself
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = _lightning_module()
    trainer.fit(module, ckpt_path=path, weights_only=False)
    return trainer, module


@on_ranks(
    2,
    {
        "DDPStrategy": {"name": "DDPStrategy"},
        "ModelParallelStrategy": {"name": "ModelParallelStrategy", **_TWO, "save_distributed_checkpoint": True},
        "ModelParallelStrategy, one file": {
            "name": "ModelParallelStrategy",
            **_TWO,
            "save_distributed_checkpoint": False,
        },
    },
)
def test_lightning_trains_saves_and_resumes_as_one_process(name: str, **options: Any) -> None:
    from lightning.pytorch import strategies

    from freezehooks.integrations.lightning import FreezeEntries

    reference = OneProcess(FIXED).train(_STEPS)
    trainer, module = _fit(getattr(strategies, name)(**options), FreezeEntries(_RULES), 1)
    reference.assert_same(module.net)
    path = folder() / f"{name}{options}.ckpt"
    trainer.save_checkpoint(path)
    dist.barrier()
    _, resumed = _fit(getattr(strategies, name)(**options), FreezeEntries(_RULES), 2, path)
    reference.train(_STEPS)  # an epoch sees the same batches again
    reference.assert_same(resumed.net)


@contextmanager
def _accelerator(kind: str, **options: Any) -> Iterator[Any]:
    """Make an Accelerator. On the CPU it uses FSDP2 only if told to after it was made."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(True)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        if kind == "FSDP2":
            patch.setenv("ACCELERATE_USE_FSDP", "true")
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)
            accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        else:
            accelerator = Accelerator(cpu=True)
        try:
            yield accelerator
        finally:
            AcceleratorState._reset_state(True)


def _steps(accelerator: Any, model: nn.Module, optimizer: Any, reference: OneProcess, start: int = 0) -> None:
    for step in range(start, start + _STEPS):
        optimizer.zero_grad()
        accelerator.backward(loss_of(model(my_part(batch(step)))))
        reference.assert_clean(model)
        optimizer.step()
        reference.assert_held(wholes(model))


@on_ranks(2)
def test_accelerate_prepares_ddp() -> None:
    with _accelerator("DDP") as accelerator:
        core = build()
        frozen = freeze_entries(core, FIXED)
        model, optimizer = accelerator.prepare(core, MaskedOptimizer(adamw(core), frozen))
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        reference = OneProcess(FIXED).train()
        _steps(accelerator, model, optimizer, reference)
        reference.assert_same(model)
        accelerator.save_state(folder() / "accelerate ddp")
        _steps(accelerator, model, optimizer, reference, _STEPS)
        accelerator.load_state(folder() / "accelerate ddp")
        reference.assert_same(model)
        _steps(accelerator, model, optimizer, reference.train(start=_STEPS), _STEPS)
        reference.assert_same(model)


@on_ranks(
    2,
    {
        f"{'ram-efficient' if ram else 'plain'} loading, {kind}": {
            "cpu_ram_efficient_loading": ram,
            "state_dict_type": kind,
        }
        for ram in (False, True)
        for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
    },
)
def test_accelerate_prepares_fsdp2(**options: Any) -> None:
    from accelerate.utils import load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer

    with _accelerator("FSDP2", **options) as accelerator:
        core = build()
        frozen = freeze_entries(core, FIXED)
        model, optimizer = accelerator.prepare(core, MaskedOptimizer(adamw(core), frozen))
        reference = OneProcess(FIXED).train()
        _steps(accelerator, model, optimizer, reference)
        reference.assert_same(model)
        path = folder() / f"accelerate {options}"
        path.mkdir(exist_ok=True)
        plugin = accelerator.state.fsdp_plugin
        save_fsdp_model(plugin, accelerator, model, path)
        save_fsdp_optimizer(plugin, accelerator, optimizer, model, path)
        dist.barrier()
        _steps(accelerator, model, optimizer, reference, _STEPS)
        load_fsdp_model(plugin, accelerator, model, path)
        load_fsdp_optimizer(plugin, accelerator, optimizer, model, path)
        reference.assert_same(model)
        _steps(accelerator, model, optimizer, reference.train(start=_STEPS), _STEPS)
        reference.assert_same(model)
