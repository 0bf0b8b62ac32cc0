"""Buffers: what a module keeps beside its parameters, as BatchNorm keeps its running statistics."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from freezehooks import (
    FrozenEntries,
    MaskedOptimizer,
    OptimizerMismatchError,
    ParameterChangedError,
    TargetError,
    UnguardedError,
    UnsupportedParameterError,
    freeze_entries,
)

from .claims import same_bits
from .draws import randn
from .exporting import needs_to_tell_exports, skip_unless_exported
from .ranks import on_ranks

STATISTICS = ("running_mean", "running_var")


def _model() -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].running_mean.copy_(torch.tensor([0.1, -0.0, 0.3, 0.4]))
    return model


def _batch(seed: int = 0) -> Tensor:
    return randn(8, 3, seed=seed)


SPEC = "1.running_mean[:2]\n1.running_var[3] = 0.7"


class _Twins:
    """A frozen model and a plain one that goes through the same events."""

    def __init__(self) -> None:
        self.plain, self.model = _model(), _model()
        self.kept = self.model[1].running_mean[:2].clone()
        self.frozen = freeze_entries(self.model, SPEC)

    def assert_hold(self, model: Any = None) -> None:
        """Claim: the frozen entries hold bit for bit, and the others are what they are without freezing."""
        mean, var = (getattr((model or self.model)[1], name) for name in STATISTICS)
        assert same_bits(mean[:2], self.kept.to(mean.dtype))
        assert same_bits(var[3], torch.tensor(0.7, dtype=var.dtype))
        plain_mean, plain_var = (getattr(self.plain[1], name) for name in STATISTICS)
        assert same_bits(mean[2:], plain_mean[2:].to(mean.dtype))
        assert same_bits(var[:3], plain_var[:3].to(var.dtype))


# In and after a forward


def test_running_statistics_hold_before_and_after_a_forward_in_training_mode() -> None:
    twins = _Twins()
    for seed in range(5):
        twins.plain(_batch(seed))
        twins.model(_batch(seed))
        twins.assert_hold()
    assert twins.model[1].num_batches_tracked.item() == 5


def test_they_hold_after_the_forward_of_the_module_alone_and_inside_another_hook() -> None:
    twins, seen = _Twins(), []
    twins.model[1].register_forward_hook(lambda module, args, output: seen.append(module.running_mean.clone()))
    hidden = torch.randn(8, 4)
    twins.plain[1](hidden)
    twins.model[1](hidden)
    twins.assert_hold()
    assert same_bits(seen[0][:2], twins.kept)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_they_hold_under_no_grad_and_inference_mode(mode: Callable[[], Any]) -> None:
    twins = _Twins()
    with mode():
        twins.plain(_batch())
        twins.model(_batch())
    twins.assert_hold()
    twins.plain(_batch(1))
    twins.model(_batch(1)).sum().backward()
    twins.assert_hold()


def test_a_forward_that_fails_leaves_them_held() -> None:
    twins = _Twins()

    def fail(module: nn.Module, args: Any, output: Tensor) -> None:
        raise RuntimeError("stop")

    twins.model[1].register_forward_hook(fail)
    twins.plain(_batch())
    with pytest.raises(RuntimeError, match="stop"):
        twins.model(_batch())
    twins.assert_hold()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_they_hold_where_checkpointing_runs_the_forward_once_more(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    twins = _Twins()
    for model in (twins.plain, twins.model):
        batch = _batch().requires_grad_()
        checkpoint(model, batch, use_reentrant=use_reentrant).sum().backward()
    twins.assert_hold()


def test_a_forward_in_evaluation_mode_computes_with_the_values_after_a_stray_write() -> None:
    twins = _Twins()
    expected = twins.model.eval()(_batch())
    twins.model[1].running_mean.data[:2] = 9
    assert same_bits(twins.model(_batch()), expected)
    twins.assert_hold()


def test_resetting_and_averaging_anew_leaves_them_held() -> None:
    twins = _Twins()
    for model in (twins.plain, twins.model):
        torch.optim.swa_utils.update_bn([_batch(seed) for seed in range(3)], model)
    twins.assert_hold()


def test_gradients_and_steps_are_those_of_an_unfrozen_model() -> None:
    twins = _Twins()
    for seed in range(3):
        for model in (twins.plain, twins.model):
            model.zero_grad()
            (model(_batch(seed)) * model(_batch(seed + 9)).detach()).sum().backward()
            for parameter in model.parameters():
                parameter.data.sub_(parameter.grad, alpha=0.1)
    for plain, held in zip(twins.plain.parameters(), twins.model.parameters(), strict=True):
        assert same_bits(plain.detach(), held.detach())
    twins.assert_hold()


def test_instance_statistics_hold() -> None:
    norm: Any = nn.InstanceNorm1d(3, track_running_stats=True)
    freeze_entries(norm, "running_mean[0] = 2")
    norm(torch.randn(4, 3, 5))
    assert norm.running_mean[0].item() == 2
    assert norm.running_mean[1].item() != 0


def test_all_four_of_a_channel_freeze_what_the_layer_computes_there() -> None:
    model = _model()
    freeze_entries(model, "\n".join(f"1.{name}[0]" for name in ("weight", "bias", *STATISTICS)))
    hidden = torch.randn(8, 4)
    before = model.eval()[1](hidden)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for seed in range(3):
        optimizer.zero_grad()
        model.train()(_batch(seed)).square().sum().backward()
        optimizer.step()
    after = model.eval()[1](hidden)
    assert same_bits(after[:, 0], before[:, 0])
    assert not torch.equal(after[:, 1], before[:, 1])


class _Average(nn.Module):
    """Keeps a running average by assignment, or in place."""

    average: Tensor

    def __init__(self, assigns: bool, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("average", torch.arange(3.0), persistent=persistent)
        self.assigns = assigns

    def forward(self, x: Tensor) -> Tensor:
        shift = x - self.average
        moved = 0.5 * self.average + 0.5 * x.detach().mean(0)
        if self.assigns:
            self.average = moved
        else:
            self.average.copy_(moved)
        return shift


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("assigns", [True, False])
def test_a_buffer_that_the_forward_writes_or_assigns_holds(assigns: bool, persistent: bool) -> None:
    plain, model = _Average(assigns, persistent), _Average(assigns, persistent)
    frozen = freeze_entries(model, "average[1:]")
    for seed in range(3):
        plain(_batch(seed))
        model(_batch(seed))
        assert same_bits(model.average[1:], torch.tensor([1.0, 2.0]))
        assert same_bits(model.average[0], plain.average[0])
        frozen.assert_frozen()


def test_a_buffer_assigned_under_inference_mode_holds_in_the_next_forward() -> None:
    model = _Average(assigns=True)
    freeze_entries(model, "average[1:]")
    with torch.inference_mode():
        model(_batch())
    assert same_bits(model.average[1:], torch.tensor([1.0, 2.0]))
    model(_batch())
    assert same_bits(model.average[1:], torch.tensor([1.0, 2.0]))


def test_a_buffer_assigned_in_another_shape_is_refused() -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            self.cache = torch.ones(3)
            return x

    model = Grows()
    freeze_entries(model, "cache[0]")
    with pytest.raises(ParameterChangedError, match=r"`cache` had shape \(2,\) when it was frozen and has \(3,\) now"):
        model(_batch())


class _Owner(nn.Module):
    """Writes to a buffer of a child that has no forward."""

    store: Any

    def __init__(self) -> None:
        super().__init__()
        self.store = nn.Module()
        self.store.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.store.seen
        self.store.seen = self.store.seen + x.detach().sum(0)
        return out


@pytest.mark.parametrize("wrap", [lambda owner: owner, lambda owner: nn.Sequential(owner)])
def test_a_buffer_of_a_container_holds_around_the_forward_that_uses_it(wrap: Callable[[nn.Module], nn.Module]) -> None:
    owner: Any = _Owner()
    frozen = freeze_entries(wrap(owner), "*.seen[1]" if wrap(owner) is not owner else "store.seen[1]")
    for seed in range(3):
        owner(_batch(seed))
        assert owner.store.seen[1].item() == 0
        assert owner.store.seen[0].item() != 0
    frozen.assert_frozen()
    owner._forward_hooks.clear()
    with pytest.raises(UnguardedError, match="missing is the forward hook of `"):
        frozen.assert_frozen()


def test_a_buffer_that_the_model_around_moves_holds_after_the_model_s_forward() -> None:
    class Around(nn.Module):
        inner: Any

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(x, self.inner.running_mean, self.inner.running_var, training=True)

    model = Around()
    freeze_entries(model, "inner.running_mean[0]")
    model(_batch())
    assert model.inner.running_mean[0].item() == 0
    assert model.inner.running_mean[1].item() != 0


def test_a_copy_that_shares_memory_for_one_call_leaves_them_held() -> None:
    twins = _Twins()
    hidden = torch.randn(8, 4)
    twins.plain[1](hidden)
    replica = twins.model[1]._replicate_for_data_parallel()
    replica._parameters = dict(twins.model[1]._parameters)
    replica(hidden)
    twins.assert_hold()


def test_buffers_of_a_functional_call_belong_to_the_caller() -> None:
    twins = _Twins()
    given = {name: tensor.detach().clone() for name, tensor in twins.model.state_dict().items()}
    given["1.running_mean"].fill_(5)
    torch.func.functional_call(twins.model, given, _batch())
    assert (given["1.running_mean"] != 5).all()
    twins.assert_hold()
    own = {name: tensor.detach().clone() for name, tensor in twins.model.named_parameters()}
    torch.func.functional_call(twins.model, own, _batch())
    twins.plain(_batch())
    twins.assert_hold()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_forward_holds(backend: str) -> None:
    twins = _Twins()
    compiled = torch.compile(twins.model, backend=backend, fullgraph=True)
    for seed in range(3):
        twins.plain(_batch(seed)).sum().backward()
        compiled(_batch(seed)).sum().backward()
        twins.assert_hold()


@pytest.mark.parametrize("assigns", [True, False])
def test_a_compiled_forward_that_writes_or_assigns_holds(assigns: bool) -> None:
    model = _Average(assigns)
    freeze_entries(model, "average[1:]")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        compiled(_batch(seed))
        assert same_bits(model.average[1:], torch.tensor([1.0, 2.0]))


@needs_to_tell_exports
@pytest.mark.parametrize("strict", [True, False])
def test_a_program_exported_in_training_mode_is_refused(strict: bool) -> None:
    skip_unless_exported(strict)
    model = _model()
    freeze_entries(model, SPEC)
    with pytest.raises(
        UnsupportedParameterError,
        match=r"nothing would hold `1\.running_mean`, `1\.running_var` in a program that is exported or traced in "
        r"training mode; export the model in evaluation mode, model\.eval\(\), or call remove\(\) first",
    ):
        torch.export.export(model, (_batch(),), strict=strict)


@needs_to_tell_exports
@pytest.mark.parametrize("strict", [True, False])
def test_a_program_exported_in_evaluation_mode_has_the_values(strict: bool) -> None:
    skip_unless_exported(strict)
    model = _model()
    freeze_entries(model, SPEC)
    expected = model.eval()(_batch())
    model[1].running_mean.data[:2] = 9
    program = torch.export.export(model, (_batch(),), strict=strict)
    assert torch.allclose(program.module()(_batch()), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*deprecated")
def test_a_program_traced_in_training_mode_is_refused() -> None:
    model = _model()
    freeze_entries(model, SPEC)
    with pytest.raises(UnsupportedParameterError, match="exported or traced in training mode"):
        torch.jit.trace(model, (_batch(),))
    expected = model.eval()(_batch())
    assert torch.allclose(torch.jit.trace(model, (_batch(),))(_batch()), expected)


@on_ranks(2, {"frozen before": {"before": True}, "frozen after": {"before": False}})
def test_buffers_hold_and_agree_under_distributed_data_parallel(before: bool) -> None:
    core, plain = _model(), DistributedDataParallel(_model())
    kept = core[1].running_mean[:2].clone()
    if before:
        freeze_entries(core, SPEC)
    model = DistributedDataParallel(core)
    if not before:
        freeze_entries(model, SPEC)
    for seed in range(3):
        for each in (plain, model):
            each(_batch(seed + 10 * dist.get_rank())).sum().backward()
        assert same_bits(core[1].running_mean[:2], kept)
        assert same_bits(core[1].running_var[3], torch.tensor(0.7))
        assert same_bits(core[1].running_mean[2:], plain.module[1].running_mean[2:])
        assert same_bits(core[1].running_var[:3], plain.module[1].running_var[:3])


# Saving and loading


def test_saving_is_exact_after_a_stray_write_and_keys_are_plain() -> None:
    twins = _Twins()
    twins.model[1].running_mean.fill_(9)
    state = twins.model.state_dict()
    assert same_bits(state["1.running_mean"][:2], twins.kept)
    assert list(state) == list(twins.plain.state_dict())


@pytest.mark.parametrize("assign", [True, False])
def test_keep_follows_a_load_and_a_number_is_imposed_on_it(assign: bool) -> None:
    twins = _Twins()
    loaded = {name: torch.full_like(tensor, 3) for name, tensor in twins.plain.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twins.model.load_state_dict(loaded, assign=assign)
        twins.plain.load_state_dict(loaded)
        twins.kept = torch.full((2,), 3.0)
        twins.assert_hold()
        twins.plain(_batch())
        twins.model(_batch())
    twins.assert_hold()


def test_a_load_that_leaves_a_buffer_out_leaves_it_held() -> None:
    twins = _Twins()
    twins.model[1].running_mean.fill_(9)
    twins.model.load_state_dict({"0.weight": torch.zeros(4, 3)}, strict=False)
    assert same_bits(twins.model[1].running_mean[:2], twins.kept)


def test_a_resumed_run_holds_what_the_first_held() -> None:
    twins = _Twins()
    twins.model(_batch())
    file = io.BytesIO()
    torch.save({"model": twins.model.state_dict(), "frozen": twins.frozen.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    model = _model()
    frozen = freeze_entries(model, SPEC, state=saved["frozen"])
    model.load_state_dict(saved["model"])
    model(_batch(1))
    twins.model(_batch(1))
    for name in STATISTICS:
        assert same_bits(getattr(model[1], name), getattr(twins.model[1], name))
    other = freeze_entries(_model(), SPEC)
    other.load_state_dict(frozen.state_dict())
    assert same_bits(other["1.running_mean"].values, twins.kept)


def _pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
def test_a_copy_holds_on_its_own(copied: Callable[[nn.Module], Any]) -> None:
    twins = _Twins()
    other = copied(twins.model)
    before = twins.model[1].running_mean.clone()
    twins.plain(_batch())
    other(_batch())
    twins.assert_hold(other)
    assert same_bits(twins.model[1].running_mean, before)
    (frozen,) = FrozenEntries.of(other)
    frozen.remove()
    other(_batch())
    assert not torch.equal(other[1].running_mean[:2], twins.kept)
    assert not other[1]._forward_hooks
    assert not other[1]._forward_hooks_always_called


# Moving, replacing


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_they_hold_in_another_dtype_and_back(dtype: torch.dtype) -> None:
    twins = _Twins()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twins.model.to(dtype)
        assert same_bits(twins.model[1].running_mean[:2], twins.kept.to(dtype))
        twins.plain.to(dtype)(_batch().to(dtype))
        twins.model(_batch().to(dtype))
        twins.assert_hold()
        twins.plain.float()
        twins.model.float()
        twins.model.state_dict()
    assert same_bits(twins.model[1].running_mean[:2], twins.kept)


def test_a_stray_write_is_no_news_once_the_model_was_converted() -> None:
    twins = _Twins()
    twins.model[1].running_mean.fill_(9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twins.model.double()
        assert "1.running_mean" in {violation.name for violation in twins.frozen.violations()}
        twins.model.eval()(_batch().double())
    assert same_bits(twins.model[1].running_mean[:2], twins.kept.double())


def test_keep_follows_a_buffer_that_is_put_in_another_s_place_outside_a_forward() -> None:
    twins = _Twins()
    twins.model[1].running_mean = torch.full((4,), 5.0)
    twins.model(_batch())
    assert same_bits(twins.model[1].running_mean[:2], torch.full((2,), 5.0))


def test_they_hold_through_the_meta_device(device: torch.device) -> None:
    twins = _Twins()
    state = twins.model.state_dict()
    twins.model.to("meta").to_empty(device=device)
    twins.model.load_state_dict(state)
    twins.plain(_batch())
    twins.model(_batch())
    twins.assert_hold()


def test_a_buffer_that_is_gone_says_so() -> None:
    twins = _Twins()
    del twins.model[1].running_mean
    with pytest.raises(ParameterChangedError, match=r"`1\.running_mean` is gone from BatchNorm1d"):
        twins.model(_batch())


# Checking and thawing


def test_tables_and_checks_name_buffers_and_nothing_of_them_is_unguarded() -> None:
    twins = _Twins()
    twins.frozen.assert_frozen()
    report = twins.frozen.report()
    assert report.holds
    assert report.parts["1.running_mean"].missing == ()
    assert "1.running_var   (4,)   1.running_var[3] = 0.7" in str(twins.frozen)
    assert list(twins.frozen) == ["1.running_mean", "1.running_var"]
    assert twins.frozen["1.running_mean"].frozen.tolist() == [True, True, False, False]
    twins.model[1].running_var.data[3] = 1
    (violation,) = twins.frozen.violations()
    assert (violation.name, violation.index, violation.found) == ("1.running_var", (3,), 1.0)


@pytest.mark.parametrize("kept", ["_forward_hooks", "_forward_pre_hooks"])
def test_a_hook_that_was_taken_off_is_missed(kept: str) -> None:
    twins = _Twins()
    getattr(twins.model[1], kept).clear()
    with pytest.raises(UnguardedError, match=r"missing is the forward hook.* of `1\.running_mean`, `1\.running_var`"):
        twins.frozen.assert_frozen()
    twins.frozen.remove()
    twins.frozen.attach().assert_frozen()


def test_a_buffer_is_not_counted_among_what_trains() -> None:
    model = _model()
    before = sum(parameter.numel() for parameter in model.parameters())
    assert freeze_entries(model, SPEC).trainable().trainable == before
    assert freeze_entries(model, "1.weight[0]").trainable().trainable == before - 1


def test_removal_leaves_no_trace() -> None:
    plain, model = _model(), _model()
    frozen = freeze_entries(model, SPEC)
    model(_batch())
    frozen.remove()
    for name, module in model.named_modules():
        before, now = vars(plain.get_submodule(name)), vars(module)
        assert {key: value for key, value in now.items() if "hooks" in key} == {
            key: value for key, value in before.items() if "hooks" in key
        }
    plain(_batch())
    for model_ in (plain, model):
        model_[1].running_mean.zero_()
        model_(_batch())
    assert same_bits(plain[1].running_mean, model[1].running_mean)


def test_thawing_the_buffers_alone_takes_off_what_holds_them_after_the_forward() -> None:
    model = _model()
    frozen = freeze_entries(model, f"{SPEC}\n1.weight[0] = 1")
    frozen.thaw("*.running_*")
    assert list(frozen) == ["1.weight"]
    assert not model[1]._forward_hooks
    before = model[1].running_mean.clone()
    model(_batch())
    assert not (model[1].running_mean == before).any()
    frozen.assert_frozen(guarded=False)


def test_as_a_context_they_are_held_inside_alone() -> None:
    model = _model()
    with freeze_entries(model, SPEC):
        model(_batch())
        assert model[1].running_var[3].item() == pytest.approx(0.7)
    model(_batch())
    assert model[1].running_var[3].item() != pytest.approx(0.7)


def test_an_earlier_handle_that_holds_a_buffer_otherwise_is_met() -> None:
    model = _model()
    freeze_entries(model, "1.running_var[3] = 0.7")
    with pytest.raises(ValueError, match=r"an earlier handle holds `1\.running_var` at other values"):
        freeze_entries(model, "1.running_var[3] = 1")
    freeze_entries(model, "1.running_var[3] = 1", replace=True)
    model(_batch())
    assert model[1].running_var[3].item() == 1


# Optimizers


@pytest.mark.parametrize("compact", [True, False])
def test_an_optimizer_is_guarded_beside_buffers_and_for_buffers_alone(compact: bool) -> None:
    twins = _Twins()
    plain = torch.optim.AdamW(twins.plain.parameters(), 0.1)
    optimizer = MaskedOptimizer(torch.optim.AdamW(twins.model.parameters(), 0.1), twins.frozen, compact=compact)
    for seed in range(3):
        for model, stepping in ((twins.plain, plain), (twins.model, optimizer)):
            stepping.zero_grad()
            model(_batch(seed)).square().sum().backward()
            stepping.step()
        twins.assert_hold()
    for first, second in zip(twins.plain.parameters(), twins.model.parameters(), strict=True):
        assert same_bits(first.detach(), second.detach())
    twins.frozen.assert_frozen()


def test_an_optimizer_of_other_parameters_is_refused_beside_buffers() -> None:
    frozen = freeze_entries(_model(), f"{SPEC}\n1.weight[0]")
    with pytest.raises(OptimizerMismatchError, match=r"steps none of the frozen parameters \(1\.weight\)"):
        frozen.guard(torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1))
    with pytest.raises(
        UnguardedError, match=r"a guarded optimizer of `1\.weight`$|a guarded optimizer of `1\.weight`;"
    ):
        frozen.assert_frozen()


def test_a_buffer_that_an_optimizer_steps_is_held_as_a_parameter_is() -> None:
    model: Any = nn.Module()
    model.register_buffer("scale", torch.ones(3, requires_grad=True))
    frozen = freeze_entries(model, "scale[0] = 2")
    with pytest.raises(UnguardedError, match="a guarded optimizer of `scale`"):
        frozen.assert_frozen()
    optimizer = MaskedOptimizer(torch.optim.SGD([model.scale], 0.1, weight_decay=0.1), frozen)
    model.scale.square().sum().backward()
    assert model.scale.grad[0].item() == 0
    optimizer.step()
    assert model.scale[0].item() == 2
    frozen.assert_frozen()


# Names


def test_a_wildcard_that_matches_parameters_matches_no_buffer() -> None:
    assert list(freeze_entries(_model(), "*")) == [name for name, _ in _model().named_parameters()]
    assert list(freeze_entries(_model(), "1.*")) == ["1.weight", "1.bias"]


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("*.running_*", ["1.running_mean", "1.running_var"]),
        ("*.running_var", ["1.running_var"]),
        ("module.1.running_mean", ["1.running_mean"]),
        ("1.?un*", ["1.running_mean", "1.running_var"]),
    ],
)
def test_a_target_that_matches_no_parameter_matches_floating_buffers(target: str, names: list[str]) -> None:
    assert list(freeze_entries(_model(), target)) == names
    assert list(freeze_entries(nn.DataParallel(_model()), target)) == [f"module.{name}" for name in names]


def test_a_wildcard_over_buffers_leaves_integers_out() -> None:
    assert list(freeze_entries(nn.BatchNorm1d(2, affine=False), "*")) == ["running_mean", "running_var"]


@pytest.mark.parametrize("target", ["1.num_batches_tracked", "*.num_*"])
def test_an_integer_buffer_is_refused(target: str) -> None:
    with pytest.raises(
        UnsupportedParameterError,
        match=r"`1\.num_batches_tracked` is a buffer of torch\.int64; name parameters, or floating-point buffers",
    ):
        freeze_entries(_model(), f"{target} = 0")


def test_a_buffer_that_two_modules_share_has_two_names() -> None:
    model: Any = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[1].running_mean = model[0].running_mean
    frozen = freeze_entries(model, "1.running_mean[0] = 4")
    assert frozen["0.running_mean"].names == ("0.running_mean", "1.running_mean")
    model(torch.randn(5, 2))
    assert model[0].running_mean[0].item() == 4


def test_a_misspelled_buffer_is_told_what_is_near() -> None:
    with pytest.raises(
        TargetError, match=r"`1\.runing_mean` is not a parameter of the model; did you mean `1\.running_mean`"
    ):
        freeze_entries(_model(), "1.runing_mean = 0")


def test_a_bare_mapping_is_as_it_was() -> None:
    tensors = {"weight": torch.ones(2, requires_grad=True), "running_mean": torch.zeros(2)}
    assert list(freeze_entries(tensors, "*")) == ["weight", "running_mean"]
