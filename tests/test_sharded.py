"""With parameters sharded by FSDP2 and tensor parallelism, every entry is as in one process."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from freezehooks import DriftError, FreezeError, FrozenEntries, MaskedOptimizer, UnguardedError, freeze_entries

from .claims import same_bits
from .parallel import (
    FIXED,
    SPEC,
    STEPS,
    OneProcess,
    adamw,
    batch,
    build,
    computes_in_shards,
    loss_of,
    my_part,
    train,
    whole,
    wholes,
)
from .ranks import folder, on_ranks

LAYERS = ("conv", "norm", "up", "down", "last")


def shard(model: nn.Module, layers: tuple[str, ...] = LAYERS, **options: Any) -> Any:
    """Apply FSDP2 to the layers one by one and to the root."""
    for name in layers:
        fully_shard(model.get_submodule(name), **options)
    return fully_shard(model, **options)


def frozen_and_sharded(first: str, spec: Any = SPEC, **options: Any) -> tuple[Any, FrozenEntries]:
    model = build()
    if first == "frozen":
        frozen = freeze_entries(model, spec)
        return shard(model, **options), frozen
    shard(model, **options)
    return model, freeze_entries(model, spec)


def part_here(parameter: Any) -> Tensor:
    """Return the memory of a parameter's shard on this rank."""
    local: Tensor = parameter.data._local_tensor
    return local


def write_astray(parameters: Iterable[nn.Parameter]) -> None:
    """Overwrite every shard, as user code may between two steps."""
    for parameter in parameters:
        part_here(parameter)[...] = 9.0


def write_astray_where_frozen(model: nn.Module, reference: OneProcess) -> None:
    """Overwrite only the frozen entries of every shard."""
    for name, parameter in model.named_parameters():
        if name in reference.held:
            frozen = reference.held[name].frozen.chunk(dist.get_world_size())
            if dist.get_rank() < len(frozen):
                part_here(parameter)[frozen[dist.get_rank()]] = 9.0


def reshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


_BOTH = {"frozen first": {"first": "frozen"}, "sharded first": {"first": "sharded"}}
_WAYS: dict[str, dict[str, Any]] = {
    "layers": {},
    "layers resharded after forward": {"reshard_after_forward": True},
    "layers kept whole after forward": {"reshard_after_forward": False},
    "root alone": {"layers": ()},
    "root alone, resharded": {"layers": (), "reshard_after_forward": True},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


_WHOLE_OR_COMPACT = {"whole state": {"compact": False}, "compact": {"compact": True}}


def crossed(*tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return every combination of cases."""
    if len(tables) == 1:
        return tables[0]
    rest = crossed(*tables[1:])
    return {f"{a}, {b}": {**tables[0][a], **rest[b]} for a in tables[0] for b in rest}


@computes_in_shards
@on_ranks(2, crossed(_BOTH, _WAYS))
def test_fsdp2_trains_as_one_process(first: str, **options: Any) -> None:
    model, frozen = frozen_and_sharded(first, **options)
    reference = OneProcess().train()
    optimizer = MaskedOptimizer(adamw(model), frozen)
    train(model, optimizer, reference)
    reference.assert_same(model)
    frozen.assert_frozen()


@computes_in_shards
@on_ranks(2, _BOTH)
def test_the_audit_misses_the_hook_on_the_whole_model_and_only_where_it_can_know(first: str) -> None:
    model, frozen = frozen_and_sharded(first)
    model(batch(0))
    frozen.assert_frozen(guarded=False)
    for handle in [*FrozenEntries.of(model), *FrozenEntries.of(model.up)]:
        handle.assert_frozen(guarded=False)
    model._forward_pre_hooks.clear()
    with pytest.raises(UnguardedError, match="missing is the forward hook of"):
        frozen.assert_frozen(guarded=False)


@on_ranks(2)
def test_shards_are_uneven_and_empty_here() -> None:
    model = shard(build())
    rows = {name: part_here(parameter).shape[0] for name, parameter in model.named_parameters()}
    expected = {"up.weight": (4, 3), "down.weight": (2, 1), "last.weight": (1, 0)}
    for name, by_rank in expected.items():
        assert rows[name] == by_rank[dist.get_rank()]


@computes_in_shards
@on_ranks(
    2,
    {
        "SGD with momentum": {"kind": "SGD", "momentum": 0.9, "weight_decay": 0.1},
        "Adagrad": {"kind": "Adagrad", "weight_decay": 0.1},
        "ASGD": {"kind": "ASGD", "weight_decay": 0.1},
        "NAdam": {"kind": "NAdam", "weight_decay": 0.1},
        "AdamW, foreach": {"kind": "AdamW", "foreach": True},
        "AdamW, fused": {"kind": "AdamW", "fused": True},
    },
)
def test_fsdp2_trains_as_one_process_under_other_optimizers(kind: str, **options: Any) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.05, **options)
        return made

    model, frozen = frozen_and_sharded("sharded")
    reference = OneProcess(make=make).train()
    train(model, MaskedOptimizer(make(model), frozen), reference)
    reference.assert_same(model)


@on_ranks(2)
def test_slices_that_lie_on_several_ranks_are_not_tied() -> None:
    model, frozen = frozen_and_sharded("frozen", "up.weight = tied(0, start=mean)")
    assert len(frozen) == 1
    with pytest.raises(FreezeError, match=r"up\.weight.*several ranks"):
        model(my_part(batch(0)))
    with pytest.raises(FreezeError, match=r"up\.weight.*several ranks"):
        frozen_and_sharded("sharded", "up.weight = tied(0, start=mean)")


@computes_in_shards
@on_ranks(2, _BOTH)
def test_a_handle_speaks_of_this_ranks_part_and_counts_the_whole(first: str) -> None:
    model, frozen = frozen_and_sharded(first)
    model(my_part(batch(0)))
    whole_frozen = OneProcess().frozen
    for name, part in whole_frozen.items():
        parts = part.frozen.chunk(dist.get_world_size())
        here = parts[dist.get_rank()] if dist.get_rank() < len(parts) else part.frozen[:0]
        assert torch.equal(frozen[name].frozen, here)
        assert frozen[name].frozen_count == part.frozen_count
    assert str(frozen) == str(whole_frozen)


@computes_in_shards
@on_ranks(2, _BOTH)
def test_shards_are_thawed_let_go_and_held_again(first: str) -> None:
    model, frozen = frozen_and_sharded(first)
    optimizer = MaskedOptimizer(adamw(model), frozen)
    reference = OneProcess()
    held = reference.held
    train(model, optimizer, reference.train(1), 1)
    frozen.thaw("up")
    reference.frozen.thaw("up")
    reference.held = {name: part for name, part in held.items() if name != "up.weight"}
    train(model, optimizer, reference.train(1, 1), 1, 1)
    frozen.remove()
    reference.frozen.remove()
    still, reference.held = reference.held, {}
    train(model, optimizer, reference.train(1, 2), 1, 2)
    frozen.attach()
    reference.frozen.attach()
    reference.held = still
    train(model, optimizer, reference.train(1, 3), 1, 3)
    reference.assert_same(model)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(7, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 7, bias=False, dtype=torch.float64)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Any:
        return self.head(torch.tanh(self.words(words)))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)

    def forward(self, sequence: Tensor) -> Any:
        return self.attention(sequence, sequence, sequence, need_weights=False)[0]


_UNUSUAL: dict[str, dict[str, Any]] = {
    "weights tied to one another": {"kind": _Tied, "layers": (), "spec": "head.weight[:5]"},
    "attention in the root's group": {
        "kind": _Attention,
        "layers": (),
        "spec": ["attention.out_proj.weight[0] = 0.5", "attention.in_proj_weight[::2]"],
    },
    "attention in a group of its own": {
        "kind": _Attention,
        "layers": ("attention",),
        "spec": ["attention.out_proj.weight[0] = 0.5", "attention.in_proj_weight[::2]"],
    },
}


@computes_in_shards
@on_ranks(2, crossed(_BOTH, _UNUSUAL))
def test_fsdp2_over_unusual_modules_trains_as_one_process(
    first: str, kind: type[nn.Module], layers: tuple[str, ...], spec: Any
) -> None:
    model = kind()
    frozen = freeze_entries(model, spec) if first == "frozen" else None
    shard(model, layers)
    frozen = frozen or freeze_entries(model, spec)
    optimizer = MaskedOptimizer(adamw(model), frozen)
    reference = OneProcess(spec, model=kind())
    for step in range(4):
        if step == 2:
            write_astray_where_frozen(model, reference)
        generator = torch.Generator().manual_seed(step)
        words = torch.randint(7, (4, 3), generator=generator)
        inputs = words if kind is _Tied else torch.randn(4, 3, 4, dtype=torch.float64, generator=generator)
        for one, steps, part in ((model, optimizer, my_part(inputs)), (reference.model, reference.optimizer, inputs)):
            steps.zero_grad()
            loss_of(one(part)).backward()
            steps.step()
    reference.assert_same(model)


@computes_in_shards
@on_ranks(2, _BOTH)
def test_a_part_of_a_sharded_model_is_frozen_by_itself(first: str) -> None:
    rules = ["weight[:, ::3] = -0.0", "bias[6] = 1"]
    model: Any = build()
    frozen = freeze_entries(model.up, rules) if first == "frozen" else None
    shard(model)
    frozen = frozen or freeze_entries(model.up, rules)
    reference = OneProcess([f"up.{rule}" for rule in rules]).train()
    train(model, MaskedOptimizer(adamw(model), frozen), reference)
    reference.assert_same(model)


@computes_in_shards
@on_ranks(2, _BOTH)
def test_a_stray_write_is_undone_before_layers_are_prefetched(first: str) -> None:
    model, frozen = frozen_and_sharded(first)
    model.conv.set_modules_to_forward_prefetch([model.norm, model.up])
    model.norm.set_modules_to_forward_prefetch([model.down, model.last])
    optimizer = MaskedOptimizer(adamw(model), frozen)
    reference = OneProcess().train(1)
    train(model, optimizer, reference, 1)
    for step in (1, 2):
        write_astray_where_frozen(model, reference)
        train(model, optimizer, reference, 1, step)
    reference.train(2, 1).assert_same(model)


clips_in_float64 = pytest.mark.skipif(
    torch.__version__ < "2.11", reason="before torch 2.11 sharded gradients in float64 are clipped by a float32 number"
)


@clips_in_float64
@computes_in_shards
@on_ranks(2, _BOTH)
def test_fsdp2_accumulates_and_clips_as_one_process(first: str) -> None:
    model, frozen = frozen_and_sharded(first)
    optimizer = MaskedOptimizer(adamw(model), frozen)
    reference = OneProcess().train(clip=0.01)
    for step in range(3):
        halves = my_part(batch(step)).chunk(2)
        for half, last in zip(halves, (False, True), strict=True):
            model.set_requires_gradient_sync(last)
            (loss_of(model(half)) / 2).backward()
        reference.assert_clean(model)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
    reference.assert_same(model)


@computes_in_shards
@on_ranks(2, _BOTH)
def test_fsdp2_in_mixed_precision_keeps_the_values_exactly(first: str) -> None:
    """The forward computes with values rounded to bfloat16; what is stored and stepped is not rounded."""

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model: Any = build(dtype=torch.float32)
    frozen = freeze_entries(model, SPEC) if first == "frozen" else None
    shard(model, mp_policy=policy)
    frozen = frozen or freeze_entries(model, SPEC)
    optimizer = MaskedOptimizer(sgd(model), frozen)
    reference = OneProcess(make=sgd, model=build(dtype=torch.float32)).train()
    train(model, optimizer, reference, share=lambda images: my_part(images).float())
    reference.assert_same(model, tolerance=0.05)


@computes_in_shards
@on_ranks(2, _BOTH)
def test_fsdp2_with_activation_checkpointing(first: str) -> None:
    model: Any = build()
    frozen = freeze_entries(model, SPEC) if first == "frozen" else None
    for name in ("up", "down"):
        setattr(model, name, checkpoint_wrapper(getattr(model, name)))
    shard(model)
    frozen = frozen or freeze_entries(model, SPEC)  # names without `_checkpoint_wrapped_module.`
    reference = OneProcess().train()
    train(model, MaskedOptimizer(adamw(model), frozen), reference)
    reference.assert_same(model)


_NUMBERS = ["conv.weight[center] = 0.5", "up.weight[:, ::3] = -0.0", "up.bias[6] = 1", "last.weight[:, 1:] = 0.25"]


@computes_in_shards
@on_ranks(
    2, {"frozen before loading": {"spec": _NUMBERS, "first": True}, "frozen after": {"spec": SPEC, "first": False}}
)
def test_fsdp2_from_the_meta_device(spec: Any, first: bool) -> None:
    with torch.device("meta"):
        model: Any = build()
    shard(model).to_empty(device="cpu")
    frozen = freeze_entries(model, spec) if first else None
    set_model_state_dict(model, build().state_dict(), options=StateDictOptions(full_state_dict=True))
    frozen = frozen or freeze_entries(model, spec)
    reference = OneProcess(spec)
    reference.assert_same(model)
    train(model, MaskedOptimizer(adamw(model), frozen), reference.train())
    reference.assert_same(model)


@on_ranks(2)
def test_fsdp2_freezes_nothing_on_the_meta_device() -> None:
    with torch.device("meta"):
        model: Any = build()
    with pytest.raises(FreezeError, match=r"meta device.*materialize it"):
        freeze_entries(shard(model), "up.weight[0] = 1")


@computes_in_shards
@on_ranks(2, crossed(_BOTH, _WAYS))
def test_a_stray_write_into_a_shard_is_undone_before_the_next_forward(first: str, **options: Any) -> None:
    """Forward, backward and the shard itself are those of the values."""
    model, frozen = frozen_and_sharded(first, **options)
    optimizer = MaskedOptimizer(adamw(model), frozen)
    reference = OneProcess().train(1)
    train(model, optimizer, reference, 1)
    for step in (1, 2):
        write_astray_where_frozen(model, reference)
        optimizer.zero_grad()
        images = batch(step).requires_grad_()
        expected = batch(step).requires_grad_()
        output = model(my_part(images))
        wanted = reference.model(expected)
        torch.testing.assert_close(output, my_part(wanted), rtol=1e-9, atol=1e-9)
        loss_of(output).backward()
        reference.optimizer.zero_grad()
        loss_of(wanted).backward()
        assert images.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(my_part(images.grad), 2 * my_part(expected.grad), rtol=1e-9, atol=1e-9)
        reference.assert_held(wholes(model))
        optimizer.step()
        reference.optimizer.step()
    reference.assert_same(model)


@computes_in_shards
@on_ranks(2, crossed(_BOTH, _WHOLE_OR_COMPACT, {"layers": {}, "root alone": {"layers": ()}}))
def test_a_stray_write_is_undone_by_the_step(first: str, compact: bool, **options: Any) -> None:
    model, frozen = frozen_and_sharded(first, **options)
    optimizer = MaskedOptimizer(adamw(model), frozen, compact=compact)
    reference = OneProcess()
    for write in (write_astray, _add_to_all):
        loss_of(model(my_part(batch(0)))).backward()
        write(model.parameters())
        optimizer.step()
        reference.assert_held(wholes(model))


@torch.no_grad()
def _add_to_all(parameters: Iterable[nn.Parameter]) -> None:
    """Write to whole parameters instead of their shards."""
    for parameter in parameters:
        parameter.add_(1)


@computes_in_shards
@on_ranks(2, crossed(_BOTH, {"layers": {}, "root alone": {"layers": ()}}))
def test_what_is_saved_holds_also_after_evaluation_and_a_stray_write(first: str, **options: Any) -> None:
    """After a forward without backward FSDP2 leaves whole parameters in the modules, and saves the shards."""
    model, _ = frozen_and_sharded(first, **options)
    reference = OneProcess()
    shards = list(model.parameters())
    with torch.no_grad():
        model(my_part(batch(0)))
        model(my_part(batch(0)))
    write_astray(shards)
    reference.assert_held(model.state_dict())
    with torch.no_grad():
        model(my_part(batch(0)))
    write_astray(shards)
    saved: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    reference.assert_held(saved)


@computes_in_shards
@on_ranks(2, crossed(_BOTH, {"layers": {}, "root alone": {"layers": ()}}))
def test_an_optimizer_guarded_after_evaluation_is_guarded(first: str, **options: Any) -> None:
    model, frozen = frozen_and_sharded(first, **options)
    inner = adamw(model)
    with torch.no_grad():
        model(my_part(batch(0)))
    optimizer = MaskedOptimizer(inner, frozen)
    reshard(model)
    reference = OneProcess().train()
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model(my_part(batch(step)))).backward()
        with torch.no_grad():
            model(my_part(batch(step)))  # leaves whole parameters in the modules
        optimizer.step()
        reshard(model)  # or else torch computes with those from before the step
    reference.assert_same(model)


@computes_in_shards
@on_ranks(2, _BOTH)
def test_freezing_in_mid_training_zeroes_the_moments(first: str) -> None:
    """Earlier momentum would move the entries."""
    model, frozen = frozen_and_sharded(first)
    frozen.remove()
    optimizer = adamw(model)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model(my_part(batch(step)))).backward()
        optimizer.step()
    numbers = freeze_entries(model, _NUMBERS)
    masked = MaskedOptimizer(optimizer, numbers)
    reference = OneProcess(_NUMBERS)
    train(model, masked, reference, 2)
    for name, parameter in model.named_parameters():
        if name in reference.held:
            moment = whole(optimizer.state[parameter]["exp_avg"])[reference.held[name].frozen]
            assert same_bits(moment, torch.zeros_like(moment))


@on_ranks(2)
def test_drift_in_a_shard_is_found_and_put_right() -> None:
    model, frozen = frozen_and_sharded("sharded", ["up.weight = 0.5", "last.weight[0, 0] = 1"])
    frozen.assert_frozen(guarded=False)
    assert frozen.violations() == ()
    write_astray(model.parameters())
    with pytest.raises(DriftError, match=r"up\.weight"):
        frozen.assert_frozen(guarded=False)
    frozen.impose()
    frozen.assert_frozen(guarded=False)
    assert (whole(model.up.weight) == 0.5).all()


@computes_in_shards
@on_ranks(2)
def test_removal_lets_sharded_entries_train() -> None:
    model, frozen = frozen_and_sharded("sharded", "up.weight = 0.5")
    optimizer = MaskedOptimizer(adamw(model), frozen)
    frozen.remove()
    loss_of(model(my_part(batch(0)))).backward()
    optimizer.step()
    assert (whole(model.up.weight) != 0.5).any()
    assert not model.up.weight._post_accumulate_grad_hooks


@on_ranks(2)
def test_regions_take_half_the_memory_on_each_of_two_ranks() -> None:
    torch.manual_seed(0)
    scattered = torch.rand(64, 64) < 0.5
    model: Any = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    alone = freeze_entries(nn.Linear(64, 64), {"weight": (scattered, 0.5)}).nbytes
    frozen = freeze_entries(shard(model, ("0", "1")), {"0.weight": (scattered, 0.5)})
    assert 0 < frozen.nbytes <= 0.55 * alone
    assert freeze_entries(model, "1.weight[:, 3] = 0\n1.weight[::2, 5:9] = 0.5").nbytes == 0


_COMPACT: dict[str, dict[str, Any]] = {
    "AdamW": {"kind": "AdamW", "weight_decay": 0.1},
    "AdamW, foreach": {"kind": "AdamW", "weight_decay": 0.1, "foreach": True},
    "AdamW, fused": {"kind": "AdamW", "weight_decay": 0.1, "fused": True},
    "SGD with momentum": {"kind": "SGD", "momentum": 0.9, "weight_decay": 0.1, "foreach": True},
    "ASGD": {"kind": "ASGD", "weight_decay": 0.1},
}


def _made(model: nn.Module, kind: str, **options: Any) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.05, **options)
    return made


@computes_in_shards
@on_ranks(2, crossed(_BOTH, _COMPACT))
def test_each_rank_may_hold_the_free_entries_of_its_shard_alone(first: str, **options: Any) -> None:
    model, frozen = frozen_and_sharded(first)
    reference = OneProcess(make=lambda each: _made(each, **options)).train(4)
    optimizer = MaskedOptimizer(_made(model, **options), frozen, compact=True)
    train(model, optimizer, reference, 4)
    reference.assert_same(model)
    frozen.assert_frozen()
    for parameter, state in optimizer.inner.state.items():
        held = [part for part, its in frozen.held() if its is parameter]
        free = part_here(parameter).numel() - sum(int(part.frozen.sum()) for part in held)
        assert all(item.shape == (free,) for item in state.values() if isinstance(item, Tensor) and item.ndim)


@clips_in_float64
@computes_in_shards
@on_ranks(2)
def test_compact_shards_are_clipped_by_the_norm_of_all_free_entries() -> None:
    model, frozen = frozen_and_sharded("frozen")
    reference = OneProcess().train(clip=0.01)
    optimizer = MaskedOptimizer(adamw(model), frozen, compact=True)

    def clip() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    train(model, optimizer, reference, before_step=clip)
    reference.assert_same(model)


@computes_in_shards
@on_ranks(2)
def test_compact_shards_may_move_to_other_memory() -> None:
    """FSDP2 of torch 2.9 moves uneven shards in the first forward, and `model.to()` moves all of them in any release.

    After it, a step reads the weights that are there, not those that it wrote last.
    """
    torch.manual_seed(0)
    models: Any = [fully_shard(nn.Sequential(nn.Linear(4, 6, bias=False)).double()) for _ in range(2)]
    still, moved = models
    moved.load_state_dict(still.state_dict())
    for model in models:
        optimizer = MaskedOptimizer(adamw(model), freeze_entries(model, "0.weight[:4] = 0"), compact=True)
        for _ in range(3):
            if model is moved:
                model._apply(torch.clone)
            with torch.no_grad():
                model[0].weight.mul_(3)
            optimizer.zero_grad()
            model(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        assert len(optimizer.inner.state[model[0].weight]) == 3
    assert same_bits(whole(moved[0].weight), whole(still[0].weight))


def _full_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{n}.{name}": whole(item) for n, own in state.items() for name, item in own.items()}


@computes_in_shards
@on_ranks(2, _BOTH)
def test_a_compact_state_dict_is_that_of_whole_shards(first: str) -> None:
    model, frozen = frozen_and_sharded(first)
    optimizer = MaskedOptimizer(adamw(model), frozen, compact=True)
    reference = OneProcess().train()
    train(model, optimizer, reference)
    saved = optimizer.state_dict()
    for number, parameter in enumerate(model.parameters()):
        for name in ("exp_avg", "exp_avg_sq"):
            item = saved["state"][number][name]
            assert (item.placements, item.shape) == (parameter.placements, parameter.shape)
    expected = _full_state(reference.optimizer)
    found = _full_state(optimizer)
    assert found.keys() == expected.keys()
    for name, item in expected.items():
        assert torch.allclose(found[name], item, 1e-9, 1e-9), name
    with pytest.raises(FreezeError, match="needs whole parameters, found a sharded one"):
        optimizer.state_dict(compact=True)


@computes_in_shards
@on_ranks(2, {"compact": {"compact": True}, "whole": {"compact": False}})
def test_a_compact_run_resumes_on_shards(compact: bool) -> None:
    model, frozen = frozen_and_sharded("sharded")
    optimizer = MaskedOptimizer(adamw(model), frozen, compact=True)
    reference = OneProcess().train(2 * STEPS)
    train(model, optimizer, reference)
    weights, state = get_state_dict(model, optimizer)
    again, held = frozen_and_sharded("sharded")
    other = MaskedOptimizer(adamw(again), held, compact=compact)
    set_state_dict(again, other, model_state_dict=weights, optim_state_dict=state)
    train(again, other, reference, start=STEPS)
    reference.assert_same(again)


@computes_in_shards
@on_ranks(2)
def test_compact_shards_thaw_and_freeze_in_mid_training() -> None:
    runs = []
    for compact in (False, True):
        model, frozen = frozen_and_sharded("sharded")
        optimizer = MaskedOptimizer(adamw(model), frozen, compact=compact)
        reference = OneProcess()
        train(model, optimizer, reference)
        frozen.thaw("up.weight")
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model(my_part(batch(step)))).backward()
            optimizer.step()
        later = freeze_entries(model, "up.weight[:, 4] = 0.25")
        later.guard(optimizer)
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model(my_part(batch(step)))).backward()
            optimizer.step()
        later.assert_frozen()
        runs.append(wholes(model))
    for name, expected in runs[0].items():
        assert torch.allclose(runs[1][name], expected, 1e-9, 1e-9), name


@computes_in_shards
@on_ranks(2)
def test_new_rows_of_a_sharded_embedding_have_a_state_of_their_size() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(40, 4), nn.Linear(4, 4))
    fully_shard(model)
    frozen = freeze_entries(model, "0.weight[~-6:]")
    optimizer = MaskedOptimizer(adamw(model), frozen, compact=True)
    before = whole(model[0].weight).clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.tensor([[1, 35, 39, 34]])).square().sum().backward()
        optimizer.step()
    after = whole(model[0].weight)
    assert same_bits(after[:34], before[:34])
    assert not bool((after[[34, 35, 39]] == before[[34, 35, 39]]).any())
    rows = 0 if dist.get_rank() == 0 else 6
    assert optimizer.inner.state[model[0].weight]["exp_avg"].shape == (4 * rows,)


@on_ranks(2)
def test_compact_state_of_shards_is_refused_where_an_optimizer_looks_at_all_entries_together() -> None:
    model, frozen = frozen_and_sharded("sharded")
    with pytest.raises(FreezeError, match="entries of one rank alone"):
        MaskedOptimizer(torch.optim.LBFGS(model.parameters()), frozen, compact=True)


_DIFFERENT: dict[str, dict[str, Any]] = {
    "another number": {"specs": ("up.weight[0] = 0", "up.weight[0] = 1"), "says": r"up\.weight"},
    "numbers chosen on one rank": {"specs": ("up.weight[smallest(0.5)]", "up.weight[0]"), "says": r"up\.weight"},
    "another parameter": {"specs": ("up.weight[0] = 0", "down.weight[zeros]"), "says": r"down\.weight"},
    "another mask": {"specs": tuple({"up.bias": (torch.arange(7) < n, 0)} for n in (2, 3)), "says": r"up\.bias"},
    "a rule more": {"specs": ("up.weight[0] = 0", "up.weight[0] = 0\nup.bias[0] = 1"), "says": r"up\.bias"},
}


@on_ranks(2, _DIFFERENT)
def test_sharded_rules_that_differ_between_ranks_are_refused_on_every_rank(specs: tuple[Any, Any], says: str) -> None:
    model = shard(build())
    before = wholes(model)
    with pytest.raises(FreezeError, match=says):
        freeze_entries(model, specs[dist.get_rank()])
    assert all(torch.equal(before[name], tensor) for name, tensor in wholes(model).items())
    freeze_entries(model, specs[0]).remove()


def _assert_refused_in_the_first_forward(layers: tuple[str, ...]) -> None:
    model = build()
    freeze_entries(model, ("up.weight[0] = 0", "up.weight[0] = 1")[dist.get_rank()])
    shard(model, layers)
    with pytest.raises(FreezeError, match=r"up\.weight"):
        model(my_part(batch(0)))


@on_ranks(2)
def test_rules_that_differ_before_sharding_are_refused_in_the_first_forward() -> None:
    _assert_refused_in_the_first_forward(LAYERS)


@computes_in_shards  # its first forward gathers the whole before it refuses
@on_ranks(2)
def test_rules_that_differ_before_sharding_of_the_root_alone_are_refused_in_the_first_forward() -> None:
    _assert_refused_in_the_first_forward(())


# Saving and loading


@computes_in_shards
@on_ranks(2, crossed(_BOTH, {"full": {"full": True}, "sharded": {"full": False}}))
def test_state_dicts_are_plain_and_load_both_ways(first: str, full: bool) -> None:
    options = StateDictOptions(full_state_dict=full)
    model, frozen = frozen_and_sharded(first)
    reference = OneProcess().train()
    train(model, MaskedOptimizer(adamw(model), frozen), reference)
    saved: Any = get_model_state_dict(model, options=options)
    assert list(saved) == list(build().state_dict())
    reference.assert_held(saved)
    copied = {name: tensor.clone() for name, tensor in saved.items()}

    plain = shard(build(seed=5))
    set_model_state_dict(plain, copied, options=options)
    reference.assert_same(plain)

    other, _ = frozen_and_sharded(first, _NUMBERS)
    given = shard(build(seed=5))
    set_model_state_dict(other, get_model_state_dict(given, options=options), options=options)
    expected = OneProcess(_NUMBERS, model=build(seed=5))
    expected.assert_same(other)


@computes_in_shards
@on_ranks(2, crossed(_BOTH, {"full": {"full": True}, "sharded": {"full": False}}))
def test_kept_values_follow_what_is_loaded(first: str, full: bool) -> None:
    model, frozen = frozen_and_sharded(first)
    given = build(seed=5)
    options = StateDictOptions(full_state_dict=full)
    state = given.state_dict() if full else get_model_state_dict(shard(build(seed=5)))
    set_model_state_dict(model, state, options=options)
    frozen.assert_frozen(guarded=False)
    expected = given.state_dict()
    assert torch.equal(whole(model.down.bias), expected["down.bias"])
    assert torch.equal(whole(model.down.weight), expected["down.weight"])
    optimizer = MaskedOptimizer(adamw(model), frozen)
    loss_of(model(my_part(batch(0)))).backward()
    optimizer.step()
    assert torch.equal(whole(model.down.bias), expected["down.bias"])


@on_ranks(2)
def test_the_state_of_a_handle_goes_between_one_process_and_several() -> None:
    reference = OneProcess()
    _, frozen = frozen_and_sharded("sharded")
    torch.save(frozen.state_dict(), folder() / f"frozen {dist.get_rank()}.pt")
    saved = torch.load(folder() / f"frozen {dist.get_rank()}.pt", weights_only=True)
    one = build(seed=5)
    freeze_entries(one, SPEC, state=saved)
    reference.assert_held(wholes(one))
    several = shard(build(seed=5))
    freeze_entries(several, SPEC, state=reference.frozen.state_dict())
    reference.assert_held(wholes(several))


@computes_in_shards
@on_ranks(2, _BOTH)
def test_loading_by_assignment_is_followed(first: str) -> None:
    model, frozen = frozen_and_sharded(first, FIXED)
    model.load_state_dict(shard(build(seed=5)).state_dict(), assign=True)
    frozen.assert_frozen(guarded=False)
    reference = OneProcess(FIXED, model=build(seed=5))
    reference.assert_same(model)
    train(model, MaskedOptimizer(adamw(model), frozen), reference.train())
    reference.assert_same(model)


checkpoint: Any = import_module("torch.distributed.checkpoint")  # exports nothing explicitly


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": moments}, checkpoint_id=path)


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.load({"model": weights, "optimizer": moments}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def _resumed(path: Path, model: nn.Module, frozen: FrozenEntries, *, compact: bool = False) -> MaskedOptimizer:
    optimizer = MaskedOptimizer(adamw(model), frozen, compact=compact)
    _load(path, model, optimizer)
    return optimizer


def _load_alone(folder: Path, name: str = "of two ranks") -> None:
    model = build(seed=5)
    frozen = freeze_entries(model, FIXED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it loads in a single process
        optimizer = _resumed(folder / name, model, frozen)
    reference = OneProcess(FIXED).train(5)
    reference.assert_held(wholes(model))
    train(model, optimizer, reference, 2, 3, share=lambda images: images)
    reference.assert_same(model)


def _save_alone(folder: Path) -> None:
    reference = OneProcess(FIXED).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _save(folder / "of one process", reference.model, reference.optimizer)


@computes_in_shards
@on_ranks(2, after=_load_alone)
def test_a_checkpoint_of_two_ranks_resumes_on_two_and_on_one() -> None:
    model, frozen = frozen_and_sharded("sharded", FIXED)
    optimizer = MaskedOptimizer(adamw(model), frozen)
    reference = OneProcess(FIXED).train()
    train(model, optimizer, reference)
    _save(folder() / "of two ranks", model, optimizer)
    other = shard(build(seed=5))
    optimizer = _resumed(folder() / "of two ranks", other, freeze_entries(other, FIXED))
    reference.assert_same(other)
    train(other, optimizer, reference.train(2, 3), 2, 3)
    reference.assert_same(other)


@computes_in_shards
@on_ranks(2, after=partial(_load_alone, name="compact of two ranks"))
def test_a_compact_checkpoint_of_two_ranks_resumes_on_two_and_on_one() -> None:
    model, frozen = frozen_and_sharded("sharded", FIXED)
    optimizer = MaskedOptimizer(adamw(model), frozen, compact=True)
    reference = OneProcess(FIXED).train()
    train(model, optimizer, reference)
    _save(folder() / "compact of two ranks", model, optimizer)
    other = shard(build(seed=5))
    held = freeze_entries(other, FIXED)
    optimizer = _resumed(folder() / "compact of two ranks", other, held, compact=True)
    reference.assert_same(other)
    train(other, optimizer, reference.train(2, 3), 2, 3)
    reference.assert_same(other)


@computes_in_shards
@on_ranks(4, before=_save_alone)
def test_a_checkpoint_of_one_process_resumes_compact_on_four_ranks() -> None:
    model = shard(build(seed=5))
    optimizer = _resumed(folder() / "of one process", model, freeze_entries(model, FIXED), compact=True)
    reference = OneProcess(FIXED).train()
    train(model, optimizer, reference.train(2, 3), 2, 3)
    reference.assert_same(model)


@computes_in_shards
@on_ranks(2, before=_save_alone)
def test_a_checkpoint_of_one_process_resumes_on_two_ranks() -> None:
    model = shard(build(seed=5))
    optimizer = _resumed(folder() / "of one process", model, freeze_entries(model, FIXED))
    reference = OneProcess(FIXED).train()
    reference.assert_same(model)
    train(model, optimizer, reference.train(2, 3), 2, 3)
    reference.assert_same(model)


# Tensor parallelism

_PLANS: dict[str, dict[str, Any]] = {
    "by columns": {"plan": {"up": ColwiseParallel(output_layouts=Replicate())}},
    "by rows": {"plan": {"down": RowwiseParallel(input_layouts=Replicate())}},
    "by columns, then rows": {"plan": {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}},
}


_SPLIT: dict[str, dict[str, Any]] = {"frozen first": {"first": "frozen"}, "split first": {"first": "split"}}


@on_ranks(2, crossed(_SPLIT, _PLANS, _WHOLE_OR_COMPACT))
def test_tensor_parallel_trains_as_one_process(first: str, plan: Any, compact: bool) -> None:
    model = build()
    frozen = freeze_entries(model, SPEC) if first == "frozen" else None
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    frozen = frozen or freeze_entries(model, SPEC)
    optimizer = MaskedOptimizer(adamw(model), frozen, compact=compact)
    reference = OneProcess().train()
    train(model, optimizer, reference, share=lambda images: images)
    reference.assert_same(model)
    frozen.assert_frozen(guarded=False)
    for name in plan:
        part_here(model.get_submodule(name).weight)[...] = 9.0
    reference.assert_held(model.state_dict())


@on_ranks(2)
def test_an_embedding_split_by_rows_has_clean_gradients() -> None:
    """Its gradient is replicated on every rank, while the weight is sharded."""
    plain = nn.Embedding(7, 4, dtype=torch.float64)
    words = torch.tensor([1, 2, 6, 6])
    reference = OneProcess("weight[~5:]", model=plain)
    model = nn.Embedding(7, 4, dtype=torch.float64)
    model.load_state_dict(plain.state_dict())
    parallelize_module(model, init_device_mesh("cpu", (2,)), RowwiseParallel(input_layouts=Replicate()))
    optimizer = MaskedOptimizer(adamw(model), freeze_entries(model, "weight[~5:]"))
    for _ in range(3):
        for one, steps in ((plain, reference.optimizer), (model, optimizer)):
            steps.zero_grad()
            loss_of(one(words)).backward()
            reference.assert_clean(one)
            steps.step()
    reference.assert_same(model)


@on_ranks(2, crossed({"held": {"thaws": False}, "thawed": {"thaws": True}}, _WHOLE_OR_COMPACT))
def test_a_norm_over_a_split_sequence_has_clean_gradients(thaws: bool, compact: bool) -> None:
    """Its gradient is partial, while the parameter is replicated: a step sums it over the ranks."""
    rules = "weight[1] = 0.5\nbias[2:]"
    plain = nn.LayerNorm(4, dtype=torch.float64)
    reference = OneProcess(rules, model=plain)
    model = nn.LayerNorm(4, dtype=torch.float64)
    parallelize_module(model, init_device_mesh("cpu", (2,)), SequenceParallel(use_local_output=True))
    frozen = freeze_entries(model, rules)
    optimizer = MaskedOptimizer(adamw(model), frozen, compact=compact)
    for step in range(6):
        if thaws and step == 3:
            for handle in (frozen, reference.frozen):
                handle.thaw("weight")
            del reference.held["weight"]
        sequence = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for one, steps, part in (
            (plain, reference.optimizer, sequence),
            (model, optimizer, sequence.chunk(2, 1)[dist.get_rank()]),
        ):
            steps.zero_grad()
            (one(part) - sequence.mean()).square().sum().backward()
            reference.assert_clean(one)
            steps.step()
    reference.assert_same(model)
    weight = part_here(model.weight)
    summed = weight.clone()
    dist.all_reduce(summed)
    assert same_bits(summed, 2 * weight)  # the ranks agree


@computes_in_shards
@on_ranks(4, crossed(_SPLIT, _WHOLE_OR_COMPACT))
def test_fsdp2_over_tensor_parallel_trains_as_one_process(first: str, compact: bool) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model: Any = build()
    frozen = freeze_entries(model, SPEC) if first == "frozen" else None
    parallelize_module(model, mesh["tensor"], _PLANS["by columns, then rows"]["plan"])
    shard(model, mesh=mesh["data"])
    frozen = frozen or freeze_entries(model, SPEC)
    optimizer = MaskedOptimizer(adamw(model), frozen, compact=compact)
    reference = OneProcess().train()
    train(model, optimizer, reference, share=lambda images: images.chunk(2)[mesh["data"].get_local_rank()])
    reference.assert_same(model)
    saved: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    reference.assert_held(saved)
    write_astray(model.parameters())
    reference.assert_held(model.state_dict())


@computes_in_shards
@on_ranks(4, _BOTH)
def test_hybrid_shards_train_as_one_process(first: str) -> None:
    """Replicas of shards: a mesh of two dimensions under FSDP2 alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, frozen = frozen_and_sharded(first, mesh=mesh)
    reference = OneProcess().train()
    train(model, MaskedOptimizer(adamw(model), frozen), reference)
    reference.assert_same(model)


# Errors


@on_ranks(
    2,
    {
        f"{what}, use_orig_params={original}": {"inner": what == "the module inside", "use_orig_params": original}
        for what in ("the wrapper", "the module inside")
        for original in (False, True)
    },
)
def test_fsdp1_is_refused_and_the_way_out_named(inner: bool, use_orig_params: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel(build(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    model: nn.Module = wrapped.module if inner else wrapped
    rule = "up.weight[0] = 0" if use_orig_params or not inner else "_flat_param = 0"
    with pytest.raises(FreezeError, match=r"FSDP1.*fully_shard"):
        freeze_entries(model, rule)


def _zero_3(model: nn.Module) -> None:
    model.weight.ds_id = 0  # type: ignore[union-attr]


def _zero_1(model: nn.Module) -> None:
    model.weight._hp_mapping = None  # type: ignore[union-attr]


@pytest.mark.parametrize("mark", [_zero_3, _zero_1])
def test_deepspeed_is_refused_and_the_way_out_named(mark: Any) -> None:
    layer = nn.Linear(3, 2)
    mark(layer)
    with pytest.raises(FreezeError, match=r"DeepSpeed.*FSDP2"):
        freeze_entries(layer, "weight[0] = 0")


def test_a_deepspeed_engine_is_refused() -> None:
    engine = type("DeepSpeedEngine", (nn.Sequential,), {})(nn.Linear(3, 2))
    with pytest.raises(FreezeError, match=r"DeepSpeed.*FSDP2"):
        freeze_entries(engine, "0.weight[0] = 0")
