"""Per-sample gradients, as Opacus stores them on parameters: frozen entries do not count in their norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.optim import SGD, Optimizer

from freezehooks import MaskedOptimizer, UnsupportedParameterError, freeze_entries

from .claims import held_twice, same_bits
from .draws import randn

# torch's, for modules whose input needs no gradient; Opacus's users see it too
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

_SAMPLES = 5


class GradSamples:
    """Imitates what Opacus does to a model of linear layers: it stores per-sample gradients on every parameter.

    A backward hook of the module computes them from what the forward hook saw; several passes make a list.
    """

    def __init__(self, model: nn.Module, *, norms: bool = False) -> None:
        self.norms = norms
        for parameter in model.parameters():
            parameter.grad_sample = None  # type: ignore[attr-defined]  # as Opacus does
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self.keep)
                module.register_full_backward_hook(self.make)

    def keep(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        module.activations = args[0].detach()

    def make(self, module: Any, grad_input: Any, grad_output: tuple[Tensor, ...]) -> None:
        backprops = grad_output[0].detach()
        self.leave(module.weight, torch.einsum("ni,nj->nij", backprops, module.activations))
        self.leave(module.bias, backprops)

    def leave(self, parameter: Any, samples: Tensor) -> None:
        if self.norms:
            parameter._norm_sample = samples.flatten(1).norm(dim=1)
        elif parameter.grad_sample is None:
            parameter.grad_sample = samples
        else:
            before = parameter.grad_sample
            parameter.grad_sample = [*(before if isinstance(before, list) else [before]), samples]


class PrivateOptimizer(Optimizer):
    """Clips per-sample gradients, sums, adds noise and steps, like Opacus's `DPOptimizer`, without `__init__`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.original_optimizer = optimizer
        self.norms: list[Tensor] = []

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.original_optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.original_optimizer.state

    @property
    def defaults(self) -> Any:  # type: ignore[override]
        return self.original_optimizer.defaults

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        samples = [p.grad_sample if isinstance(p.grad_sample, Tensor) else torch.cat(p.grad_sample) for p in parameters]
        norms = torch.stack([each.flatten(1).norm(dim=1) for each in samples]).norm(dim=0)
        self.norms.append(norms)
        for parameter, each in zip(parameters, samples, strict=True):
            parameter.grad = torch.einsum("i,i...", (0.5 / (norms + 1e-6)).clamp(max=1.0), each)
            parameter.grad += randn(*parameter.shape, seed=1)
        return self.original_optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad_sample = None
        self.original_optimizer.zero_grad(set_to_none)


def _model() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def _batch(seed: int = 0) -> Tensor:
    return randn(_SAMPLES, 4, seed=seed)


SPEC = "0.weight[0] = 0.5\n0.weight[1:, 1]\n2.bias[1] = 0"


@pytest.mark.parametrize("passes", [1, 3], ids=["one_pass", "virtual_steps"])
@pytest.mark.parametrize("handles", [1, 2], ids=["one_handle", "two_handles"])
@pytest.mark.parametrize("warm", [False, True], ids=["", "after_a_step"])
@held_twice
def test_the_gradient_of_each_sample_is_clean_when_backward_returns(warm: bool, handles: int, passes: int) -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    for _ in range(handles - 1):
        freeze_entries(model, "0.weight[0] = 0.5")
    if warm:
        model(_batch()).sum().backward()
    GradSamples(model)
    for seed in range(passes):
        model(_batch(seed)).square().sum().backward()
    for name, parameter in model.named_parameters():
        found = parameter.grad_sample  # type: ignore[attr-defined]  # Opacus's
        for samples in [found] if passes == 1 else found:
            assert samples.shape == (_SAMPLES, *parameter.shape)
            held = frozen[name].frozen if name in frozen else torch.zeros_like(parameter, dtype=torch.bool)
            assert same_bits(samples[:, held], torch.zeros(_SAMPLES, int(held.sum())))
            assert bool((samples[:, ~held] != 0).all())


@pytest.mark.parametrize("compact", [False, True], ids=["", "compact"])
@pytest.mark.parametrize("face", ["masked_outside", "masked_inside", "guard"])
def test_private_training_clips_by_the_free_entries_alone(face: str, compact: bool) -> None:
    model, alike = _model(), _model()
    frozen, reference_held = freeze_entries(model, SPEC), freeze_entries(alike, SPEC)
    GradSamples(model)
    GradSamples(alike)
    inner = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    private = PrivateOptimizer(MaskedOptimizer(inner, frozen, compact=compact) if face == "masked_inside" else inner)
    optimizer: Optimizer = MaskedOptimizer(private, frozen, compact=compact) if face == "masked_outside" else private
    if face == "guard":
        frozen.guard(private, compact=compact)
    reference = PrivateOptimizer(SGD(alike.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1))
    for seed in range(3):
        optimizer.zero_grad()
        model(_batch(seed)).square().sum().backward()
        optimizer.step()
        frozen.assert_frozen()
        reference.zero_grad()
        alike(_batch(seed)).square().sum().backward()
        for name, parameter in alike.named_parameters():
            if name in reference_held:  # by hand
                parameter.grad_sample[:, reference_held[name].frozen] = 0  # type: ignore[attr-defined]  # Opacus's
        reference.step()
        reference_held.impose()
        assert same_bits(private.norms[-1], reference.norms[-1])
    for name, parameter in model.named_parameters():
        free = ~frozen[name].frozen if name in frozen else torch.ones_like(parameter, dtype=torch.bool)
        assert same_bits(parameter[free], alike.get_parameter(name)[free])


def test_two_models_in_one_pass_of_which_one_keeps_samples() -> None:
    first, second = _model(), _model()
    for model in (first, second):
        freeze_entries(model, SPEC)
    GradSamples(second)
    for models in ((first, second), (second, first)):
        sum((model(_batch()).square().sum() for model in models), torch.zeros(())).backward()
        samples: Any = second[0].weight
        found = samples.grad_sample if isinstance(samples.grad_sample, Tensor) else samples.grad_sample[-1]
        assert not bool(found[:, 0].any())


def test_samples_that_are_somebody_elses_memory_are_not_written_to() -> None:
    model: Any = nn.Linear(4, 3)
    freeze_entries(model, "weight[0]")
    seen = torch.ones(2, _SAMPLES, 3, 4)

    def leave(module: Any, grad_input: Any, grad_output: Any) -> None:
        module.weight.grad_sample = seen[0]
        module.bias.grad_sample = torch.ones(1).expand(_SAMPLES, 3)

    model.register_full_backward_hook(leave)
    model(_batch()).sum().backward()
    assert not bool(model.weight.grad_sample[:, 0].any())
    assert bool((seen == 1).all())


@pytest.mark.parametrize(
    ("norms", "spec", "message"),
    [
        (True, SPEC, r"`[02]\.\w+` has the norms of per-sample gradients .*; keep the gradients themselves"),
        (
            False,
            "0.weight = tied(0, start=first)",
            r"`0\.weight` has per-sample gradients .*; use a layer with one",
        ),
    ],
    ids=["norms", "tied"],
)
def test_norms_in_which_frozen_entries_count_are_refused(norms: bool, spec: str, message: str) -> None:
    model = _model()
    freeze_entries(model, spec)
    GradSamples(model, norms=norms)
    loss = model(_batch()).sum()
    with pytest.raises(UnsupportedParameterError, match=message):
        loss.backward()


def test_samples_by_expanded_weights_are_refused() -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    compute: Callable[[Tensor], Tensor] = call_for_per_sample_grads(model)
    with pytest.raises(
        UnsupportedParameterError, match=r"`0\.weight` .* torch's expanded weights, .*; use Opacus's own hooks"
    ):
        compute(_batch())
    frozen.remove()
    compute(_batch()).sum().backward()
