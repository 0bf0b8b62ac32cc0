"""Under DistributedDataParallel frozen entries hold on every rank, and the free ones train as in one process."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from freezehooks import FreezeError, MaskedOptimizer, UnguardedError, freeze_entries, tied, train_only

from .parallel import SPEC, OneProcess, adamw, batch, build, loss_of, my_part, train, wholes
from .ranks import on_ranks


def assert_ranks_agree(model: nn.Module) -> None:
    """Claim: every parameter is the same on every rank, bit for bit."""
    for name, tensor in wholes(model).items():
        ranks = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, tensor.contiguous())
        assert all(torch.equal(ranks[0], other) for other in ranks), name


@on_ranks(
    2,
    {
        "frozen before": {"before": True},
        "frozen after": {"before": False},
        "gradient_as_bucket_view": {"before": False, "gradient_as_bucket_view": True},
        "static_graph": {"before": False, "static_graph": True},
        "static_graph with views, frozen before": {
            "before": True,
            "static_graph": True,
            "gradient_as_bucket_view": True,
        },
        "find_unused_parameters": {"before": False, "find_unused_parameters": True},
        "many buckets": {"before": False, "bucket_cap_mb": 1e-4},
    },
)
def test_entries_hold_and_the_rest_trains_as_in_one_process(before: bool, **options: Any) -> None:
    core = build()
    frozen = freeze_entries(core, SPEC) if before else None
    model = DistributedDataParallel(core, **options)
    frozen = frozen or freeze_entries(model, [_prefixed(rule) for rule in SPEC])
    reference = OneProcess().train()
    optimizer = MaskedOptimizer(adamw(model), frozen)
    train(model, optimizer, reference)
    reference.assert_same(model)
    assert_ranks_agree(model)
    frozen.assert_frozen()


_ALONE = "up[5:]\ndown.weight[:, 2:5]\nlast.bias"


@on_ranks(
    2,
    {
        "before": {"before": True},
        "find_unused_parameters": {"before": False, "find_unused_parameters": True},
        "static_graph": {"before": False, "static_graph": True},
    },
)
def test_what_is_named_trains_alone_and_alike_on_every_rank(before: bool, **options: Any) -> None:
    core = build()
    frozen = train_only(core, _ALONE) if before else None
    model = DistributedDataParallel(core, **options)
    frozen = frozen or train_only(model, _ALONE)
    optimizer = MaskedOptimizer(adamw(model), frozen)
    plain = build()
    one = MaskedOptimizer(adamw(plain), train_only(plain, _ALONE))
    for step in range(3):
        for each, stepping, part in ((model, optimizer, my_part(batch(step))), (plain, one, batch(step))):
            stepping.zero_grad()
            loss_of(each(part)).backward()
            stepping.step()
    frozen.assert_frozen()
    assert_ranks_agree(model)
    for (name, tensor), other in zip(core.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(tensor, other, msg=name)
        assert tensor.requires_grad == other.requires_grad == (name in ("up.weight", "down.weight", "last.bias"))


@on_ranks(2, {"model": {"inside": False}, "a part of it": {"inside": True}})
def test_what_a_reducer_would_wait_for_is_refused(inside: bool) -> None:
    model: Any = DistributedDataParallel(build())
    model = nn.ModuleDict({"net": model}) if inside else model
    with pytest.raises(
        FreezeError,
        match=r"`conv\.weight` is not to train, and DistributedDataParallel, which has wrapped it already, would wait "
        r"for its gradient; call train_only before wrapping, or wrap with find_unused_parameters=True",
    ):
        train_only(model, "net.up[5:]" if inside else "up[5:]")
    assert all(each.requires_grad for each in model.parameters())
    train_only(model, dict.fromkeys(model.parameters(), ...)).remove()  # nothing stops training


def _prefixed(rule: Any) -> Any:
    return f"module.{rule}" if isinstance(rule, str) else {f"module.{name}": how for name, how in rule.items()}


@on_ranks(
    2,
    {
        "without module.": {"prefix": ""},
        "with module.": {"prefix": "module."},
        "with _orig_mod.": {"prefix": "_orig_mod."},
        "with _checkpoint_wrapped_module.": {"prefix": "_checkpoint_wrapped_module."},
    },
)
def test_wrappers_may_be_left_out_of_names_and_written(prefix: str) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model: Any = build()
    if prefix == "_checkpoint_wrapped_module.":
        model.up = checkpoint_wrapper(model.up)
    model = torch.compile(model) if prefix == "_orig_mod." else DistributedDataParallel(model)
    inside = prefix == "_checkpoint_wrapped_module."
    target = f"up.{prefix}weight" if inside else f"{prefix}up.weight"
    for name in (target, "up.weight"):
        with freeze_entries(model, f"{name}[0] = 0.5") as frozen:
            assert len(frozen) == 1
            assert (wholes(model)["up.weight"][0] == 0.5).all()
            assert "up.weight" in frozen


@on_ranks(2, {"plain": {}, "views": {"gradient_as_bucket_view": True}})
def test_gradients_accumulate_without_synchronisation(**options: Any) -> None:
    model = DistributedDataParallel(build(), **options)
    frozen = freeze_entries(model, SPEC)
    optimizer = MaskedOptimizer(adamw(model), frozen)
    reference = OneProcess()
    for step in range(3):
        for part in my_part(batch(step)).chunk(2)[:-1]:
            with model.no_sync():
                (loss_of(model(part)) / 2).backward()
            reference.assert_clean(model)
        (loss_of(model(my_part(batch(step)).chunk(2)[-1])) / 2).backward()
        reference.assert_clean(model)
        optimizer.step()
        optimizer.zero_grad()
    reference.train().assert_same(model)
    assert_ranks_agree(model)


def _bf16(state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
    """Compress as `bf16_compress_hook` does, which torch keeps for NCCL alone."""
    compressed = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    dist.all_reduce(compressed)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer().copy_(compressed))
    return done


def _compress(model: DistributedDataParallel, how: str) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if how == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif how == "bf16":
        model.register_comm_hook(
            None, lambda state, bucket: _bf16(state, bucket)
        )  # torch reads annotations, not their text
    else:
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=0.5
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


@on_ranks(
    2,
    {
        "fp16": {"how": "fp16"},
        "bf16": {"how": "bf16"},
        "bf16 with views": {"how": "bf16", "gradient_as_bucket_view": True},
        "PowerSGD": {"how": "PowerSGD"},
        "PowerSGD with views": {"how": "PowerSGD", "gradient_as_bucket_view": True},
        "PowerSGD, static_graph": {"how": "PowerSGD", "static_graph": True},
    },
)
def test_gradients_are_clean_behind_communication_hooks(how: str, **options: Any) -> None:
    """Even if a hook sends an approximation, which is not zero at scattered frozen entries."""
    torch.manual_seed(0)
    core: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    scattered = torch.rand(64, 64) < 0.3
    spec = [{"0.weight": (scattered, 0.125)}, "2.weight[:, :20]"]
    reference = OneProcess(spec, model=core)
    reference.frozen.remove()
    model = DistributedDataParallel(core, **options)
    _compress(model, how)
    frozen = freeze_entries(model, spec)
    optimizer = MaskedOptimizer(adamw(model), frozen)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model(torch.randn(16, 64, generator=generator))).backward()
        reference.assert_clean(model)
        optimizer.step()
        reference.assert_held(wholes(model))
    assert_ranks_agree(model)


@on_ranks(2)
def test_compact_state_trains_the_same() -> None:
    model = DistributedDataParallel(build())
    frozen = freeze_entries(model, SPEC)
    optimizer = MaskedOptimizer(adamw(model), frozen, compact=True)
    reference = OneProcess().train()
    train(model, optimizer, reference)
    reference.assert_same(model)
    assert_ranks_agree(model)
    moments = [state["exp_avg"].numel() for state in optimizer.inner.state.values() if "exp_avg" in state]
    assert sum(moments) == sum(parameter.numel() for parameter in model.parameters()) - frozen.frozen_count


@on_ranks(2)
def test_clipping_by_norm_sees_the_free_entries_alone() -> None:
    model = DistributedDataParallel(build())
    reference = OneProcess().train(clip=0.01)
    optimizer = MaskedOptimizer(adamw(model), freeze_entries(model, SPEC))
    train(model, optimizer, reference, before_step=lambda: _clip(model))
    reference.assert_same(model)


def _clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


_DIFFERENT: dict[str, dict[str, Any]] = {
    "another number": {"specs": ("up.weight[0] = 0", "up.weight[0] = 1"), "says": "up.weight"},
    "another region": {"specs": ("up.weight[0] = 0", "up.weight[1] = 0"), "says": "up.weight"},
    "another parameter": {"specs": ("up.weight[0] = 0", "down.weight[0] = 0"), "says": "down.weight"},
    "another mask": {
        "specs": tuple({"up.bias": (torch.arange(7) < n, 0.0)} for n in (2, 3)),
        "says": "up.bias",
    },
    "another tensor as value": {
        "specs": tuple({"up.bias": (torch.arange(7) < 2, torch.full((7,), float(n)))} for n in (2, 3)),
        "says": "up.bias",
    },
    "another array": {
        "specs": tuple({"up.bias": np.arange(7) < n} for n in (2, 3)),
        "says": "up.bias",
    },
    "other labels": {
        "specs": tuple({"up.bias": tied(torch.arange(7) // n, start="mean")} for n in (2, 3)),
        "says": "up.bias",
    },
    "a rule more": {"specs": ("up.weight[0] = 0", "up.weight[0] = 0\nup.bias[0] = 1"), "says": "up.bias"},
}


@on_ranks(2, _DIFFERENT)
def test_rules_that_differ_between_ranks_are_refused_on_every_rank(specs: tuple[Any, Any], says: str) -> None:
    model = DistributedDataParallel(build())
    before = wholes(build())
    with pytest.raises(FreezeError, match=says):
        freeze_entries(model, specs[dist.get_rank()])
    assert all(torch.equal(before[name], tensor) for name, tensor in wholes(model).items())
    total = torch.ones(1)
    dist.all_reduce(total)  # the group is as usable as before
    assert total.item() == 2
    freeze_entries(model, specs[0]).remove()


@on_ranks(2)
def test_rules_that_differ_before_wrapping_are_refused_in_the_first_forward() -> None:
    core = build()
    freeze_entries(core, ("up.weight[0] = 0", "up.weight[0] = 1")[dist.get_rank()])
    model = DistributedDataParallel(core)
    with pytest.raises(FreezeError, match=r"up\.weight"):
        model(my_part(batch(0)))


@on_ranks(2)
def test_a_rank_that_freezes_nothing_is_named() -> None:
    model = DistributedDataParallel(nn.Linear(3, 2))  # no other test asks about this one
    if dist.get_rank() == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("freezehooks._ranks.agreement._longest_wait", lambda: timedelta(seconds=2))
            with pytest.raises(FreezeError, match=r"rank 1 .*every rank"):
                freeze_entries(model, "weight[0] = 0")
    dist.barrier()


@on_ranks(2)
def test_a_rank_may_evaluate_first_without_the_others() -> None:
    core = nn.Linear(3, 2)
    frozen = freeze_entries(core, "weight[0] = 0")
    model = DistributedDataParallel(core)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("freezehooks._ranks.agreement._longest_wait", lambda: timedelta(seconds=2))
        if dist.get_rank() == 0:
            with torch.no_grad():
                model(torch.ones(1, 3))
    dist.barrier()
    model(torch.ones(1, 3)).sum().backward()
    frozen.assert_frozen(guarded=False)


@on_ranks(2)
def test_a_rank_may_have_no_batch_at_all() -> None:
    core = nn.Linear(3, 2)
    frozen = freeze_entries(core, "weight[0] = 0")
    model = DistributedDataParallel(core)
    optimizer = MaskedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), frozen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("freezehooks._ranks.agreement._longest_wait", lambda: timedelta(seconds=2))
        with model.join():
            for _ in range(3 if dist.get_rank() == 0 else 0):
                model(torch.ones(1, 3)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    frozen.assert_frozen()
    assert not core.weight[0].any()
    dist.barrier()


@on_ranks(2)
def test_a_rank_may_freeze_a_plain_model_of_its_own() -> None:
    """For instance for evaluation: no rank waits for the others."""
    if dist.get_rank() == 0:
        freeze_entries(build(), "up.weight[0] = 0").assert_frozen(guarded=False)
    dist.barrier()


@on_ranks(2)
def test_a_step_that_calls_no_hooks_is_refused_in_the_next_forward() -> None:
    model = DistributedDataParallel(build())
    frozen = freeze_entries(model, [_prefixed(rule) for rule in SPEC])
    optimizer = adamw(model)
    frozen.guard(optimizer)
    optimizer.step = [].clear  # type: ignore[assignment, method-assign]  # on purpose
    with pytest.raises(UnguardedError, match="was replaced by"):
        model(my_part(batch(0)))
