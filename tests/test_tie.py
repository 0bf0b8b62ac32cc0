"""Tied entries: the copies in a parameter stay equal, and train like a layer that has only one."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from freezehooks import (
    FrozenEntries,
    FrozenValueError,
    MaskedOptimizer,
    RegionError,
    Rule,
    RuleConflictError,
    RuleSyntaxError,
    SpecError,
    StateMismatchError,
    UnsupportedParameterError,
    entries,
    freeze_entries,
    mirrored,
    parse_rule,
    symmetric,
    tied,
)
from freezehooks.layers import SharedKernelConv2d

from .claims import same_bits
from .draws import randn
from .operations import Ops
from .test_optimizer_matrix import CASES, Case

SPEC = "weight = tied(0)\nbias = tied(0)"
ELEMENTWISE = [case for case in CASES if not case.mixes]


def _pair() -> tuple[SharedKernelConv2d, Any]:
    """A layer with one kernel, and a plain depthwise convolution that starts from it."""
    torch.manual_seed(3)
    shared = SharedKernelConv2d(4, 3, padding=1)
    return shared, shared.to_conv()


def _loss(layer: nn.Module, seed: int) -> Tensor:
    images = randn(2, 4, 6, 6, seed=seed)
    return torch.sum((torch.tanh(layer(images)) - images.roll(1, 1)) ** 2)


def _copies_are_one(conv: Any) -> bool:
    return all(same_bits(each, each[:1].expand(each.shape)) for each in (conv.weight, conv.bias))


def _step(layer: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    _loss(layer, seed).backward()
    optimizer.step()


def _momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("case", ELEMENTWISE, ids=[case.name for case in ELEMENTWISE])
def test_tied_kernels_train_exactly_like_the_layer_that_has_one(case: Case) -> None:
    shared, conv = _pair()
    frozen = freeze_entries(conv, SPEC)
    tied_optimizer = MaskedOptimizer(case.make(list(conv.parameters())), frozen)
    optimizer = case.make(list(shared.parameters()))
    start = conv.weight.detach().clone()
    for seed in range(5):
        _step(shared, optimizer, seed)
        _step(conv, tied_optimizer, seed)
        assert _copies_are_one(conv)
        if case.kernel == "fused":  # rounds the tail of a tensor differently, and nine numbers are all tail
            torch.testing.assert_close(conv.weight[:1], shared.weight, rtol=1e-5, atol=1e-6)
        else:
            assert same_bits(conv.weight.grad[1:2], shared.weight.grad)  # type: ignore[arg-type]  # it has one
            assert same_bits(conv.weight[:1], shared.weight)
            assert same_bits(conv.bias[:1], shared.bias)  # type: ignore[arg-type]  # it has one
    assert bool((conv.weight != start).all())
    frozen.assert_frozen()


def test_gradients_that_accumulate_are_summed_once_each() -> None:
    shared, conv = _pair()
    freeze_entries(conv, SPEC)
    for layer in (shared, conv):
        for seed in range(3):
            _loss(layer, seed).backward()
    torch.testing.assert_close(conv.weight.grad[2:3], shared.weight.grad)
    assert same_bits(conv.weight.grad, conv.weight.grad[:1].expand(4, 1, 3, 3))


def test_a_gradient_from_before_tying_is_summed() -> None:
    shared, conv = _pair()
    for layer in (shared, conv):
        _loss(layer, 0).backward()
    freeze_entries(conv, SPEC)
    torch.testing.assert_close(conv.weight.grad[:1], shared.weight.grad)
    assert same_bits(conv.bias.grad, conv.bias.grad[:1].expand(4))


def test_tying_in_mid_training_makes_the_moments_one() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    optimizer = AdamW(conv.parameters(), lr=0.05)
    for seed in range(3):
        _step(conv, optimizer, seed)
    assert not _copies_are_one(conv)
    frozen = freeze_entries(conv, "weight = tied(0, start=mean)\nbias = tied(0, start=first)")
    masked = MaskedOptimizer(optimizer, frozen)
    for name in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[conv.weight][name]
        assert same_bits(moment, moment[:1].expand(moment.shape))
    for seed in range(3):
        _step(conv, masked, seed)
        assert _copies_are_one(conv)


@pytest.mark.parametrize("start", ["first", "mean"])
def test_copies_that_differ_start_from_what_the_rule_says(start: str) -> None:
    linear = nn.Linear(2, 3)
    rows = linear.weight.detach().clone()
    freeze_entries(linear, {"weight": (..., tied(0, start=start))})
    expected = rows[:1] if start == "first" else rows.mean(0, keepdim=True)
    assert same_bits(linear.weight, expected.expand(3, 2))


def test_copies_that_differ_are_refused_where_the_rule_does_not_say() -> None:
    linear = nn.Linear(2, 3)
    before = linear.weight.detach().clone()
    message = (
        r"rule `weight = tied\(1\)`: the 2 slices along dimension 1 differ, by up to .*; write `tied\(1, start=first\)`"
    )
    with pytest.raises(FrozenValueError, match=message):
        freeze_entries(linear, "weight = tied(1)")
    assert same_bits(linear.weight, before)
    assert FrozenEntries.of(linear) == ()


def test_a_tie_composes_with_entries_frozen_alike_in_every_copy() -> None:
    _, conv = _pair()
    frozen = freeze_entries(conv, f"{SPEC}\nweight[center] = 0\nweight[:, :, 0, 0]")
    corner = conv.weight[0, 0, 0, 0].item()
    optimizer = MaskedOptimizer(AdamW(conv.parameters(), lr=0.1, weight_decay=0.1), frozen)
    for seed in range(3):
        _step(conv, optimizer, seed)
        assert _copies_are_one(conv)
        assert conv.weight[:, 0, 1, 1].tolist() == [0] * 4
        assert conv.weight[:, 0, 0, 0].tolist() == [corner] * 4
        assert same_bits(conv.weight.grad[:, 0, 1, 1], torch.zeros(4))
    assert frozen["weight"].frozen_count == 8


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("weight[0] = 0", r"rules `weight\[0\] = 0` and `weight = tied\(0\)` disagree about entry \[1, 0, 0, 0\]"),
        (
            "weight[:, 0, 0, 0] = 0\nweight[2, 0, 1, 1] = 3",
            r"`weight\[2, 0, 1, 1\] = 3` and `weight = tied\(0\)` disagree",
        ),
        ("weight = tied(1)", r"`weight = tied\(0\)` and `weight = tied\(1\)` both tie `weight`; leave one"),
    ],
    ids=["one_copy", "another_entry", "two_ties"],
)
def test_rules_that_do_not_fit_a_tie_are_refused(rule: str, message: str) -> None:
    _, conv = _pair()
    with pytest.raises(RuleConflictError, match=message):
        freeze_entries(conv, f"weight = tied(0)\n{rule}")
    frozen = freeze_entries(conv, "weight = tied(0)")
    with pytest.raises(RuleConflictError):
        freeze_entries(conv, rule)
    assert FrozenEntries.of(conv)[0].rules == frozen.rules


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Rule("w", entries[0], tied(0)), RegionError, r"`tied\(0\)` is for a whole tensor, .*; leave the"),
        (lambda: tied(0, start="median"), RegionError, "`start` of `tied` must be first or mean, found 'median'"),
        (lambda: tied(0.5), SpecError, r"`dim` of `tied` must be an integer, found 0\.5; write"),  # type: ignore[arg-type]
        (
            lambda: parse_rule("w = tied"),
            RuleSyntaxError,
            r"column 5: `tied` takes other arguments; write `tied\(dim, groups=1\)`",
        ),
        (lambda: parse_rule("w = tied(x)"), RuleSyntaxError, "column 5: `dim` of `tied` must be an integer, found 'x'"),
        (lambda: parse_rule("w = tied(0, stop=1)"), RuleSyntaxError, "column 5: `tied` takes other arguments; write"),
        (lambda: parse_rule("w = tied(0, start=all)"), RuleSyntaxError, "column 5: `start` of `tied` must be first or"),
        (
            lambda: freeze_entries(nn.Linear(2, 2), "weight = tied(2)"),
            RegionError,
            "dimension 2 is out of range .* use 0",
        ),
    ],
    ids=["region", "start", "dim", "no_dim", "no_integer", "no_start", "bad_start", "out_of_range"],
)
def test_what_cannot_be_tied_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("text", ["w = tied(0)", "w = tied(-1)", "w = tied(1, start=first)", "w = tied(2, start=mean)"])
def test_a_tie_round_trips_through_text(text: str) -> None:
    assert str(parse_rule(text)) == text
    assert parse_rule(str(parse_rule(text))) == parse_rule(text)
    assert hash(parse_rule(text)) == hash(parse_rule(text))


def test_a_stray_write_to_one_copy_is_a_violation_and_undone() -> None:
    _, conv = _pair()
    frozen = freeze_entries(conv, SPEC)
    conv.weight.data[2, 0, 1, 1] = 9
    (violation,) = frozen.violations()
    assert (violation.count, violation.index, violation.found) == (1, (2, 0, 1, 1), 9)
    conv(torch.ones(1, 4, 5, 5))
    frozen.assert_frozen(guarded=False)


def test_loading_copies_that_agree_is_followed_and_others_are_refused() -> None:
    _, conv = _pair()
    freeze_entries(conv, SPEC)
    conv.load_state_dict({"weight": torch.full((4, 1, 3, 3), 2.0), "bias": torch.zeros(4)})
    assert conv.weight.unique().tolist() == [2]
    with pytest.raises(FrozenValueError, match=r"the 4 slices .* differ, .* \(loaded into `weight`\)"):
        conv.load_state_dict(nn.Conv2d(4, 4, 3, groups=4).state_dict())


def test_copies_and_pickles_of_the_model_stay_tied() -> None:
    _, conv = _pair()
    freeze_entries(conv, SPEC)
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        (frozen,) = FrozenEntries.of(twin)
        optimizer = MaskedOptimizer(SGD(twin.parameters(), lr=0.01, momentum=0.9), frozen)
        for seed in range(2):
            _step(twin, optimizer, seed)
            assert _copies_are_one(twin)
        assert not same_bits(twin.weight, conv.weight)


def test_a_saved_state_says_that_it_was_tied() -> None:
    _, conv = _pair()
    stream = io.BytesIO()
    torch.save(freeze_entries(conv, f"{SPEC}\nweight[center] = 0").state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    again = copy.deepcopy(_pair()[1])
    freeze_entries(again, f"{SPEC}\nweight[center] = 0", state=state).assert_frozen(guarded=False)
    with pytest.raises(StateMismatchError, match="saved under other rules"):
        freeze_entries(_pair()[1], "weight[center] = 0", state=state)


def test_removal_lets_the_copies_go_and_leaves_no_hook() -> None:
    _, conv = _pair()
    frozen = freeze_entries(conv, SPEC)
    optimizer = MaskedOptimizer(SGD(conv.parameters(), lr=0.01), frozen)
    frozen.remove()
    assert not conv.weight._backward_hooks
    assert not conv.weight._post_accumulate_grad_hooks
    _step(conv, optimizer, 0)
    assert not _copies_are_one(conv)
    with pytest.raises(FrozenValueError, match="differ"):
        frozen.attach()
    assert not frozen.attached


def test_a_compiled_model_stays_tied() -> None:
    torch.compiler.reset()
    shared, conv = _pair()
    frozen = freeze_entries(conv, SPEC)
    _loss(torch.compile(conv, fullgraph=True, backend="aot_eager"), 0).backward()  # type: ignore[arg-type]
    _loss(shared, 0).backward()
    torch.testing.assert_close(conv.weight.grad[:1], shared.weight.grad)
    frozen.assert_frozen(guarded=False)


def test_a_conversion_that_swaps_the_parameter_keeps_the_sum() -> None:
    linear = nn.Linear(3, 4)
    freeze_entries(linear, "weight = tied(0, start=first)")
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        linear.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    linear(torch.randn(2, 3, dtype=torch.float64)).square().sum().backward()
    assert linear.weight.grad is not None
    assert same_bits(linear.weight.grad, linear.weight.grad[:1].expand(4, 3))


def test_sparse_gradients_of_a_tied_parameter_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    freeze_entries(embedding, "weight = tied(0, start=first)")
    message = r"rule `weight = tied\(0, start=first\)`: a tied parameter needs dense gradients, found .*; make"
    with pytest.raises(UnsupportedParameterError, match=message):
        embedding(torch.tensor([1, 2])).sum().backward()


def test_a_thawed_tie_lets_the_copies_part_and_holds_the_rest() -> None:
    _, conv = _pair()
    frozen = freeze_entries(conv, "weight = tied(0)\nbias[0] = 1")
    optimizer = MaskedOptimizer(AdamW(conv.parameters(), lr=0.1), frozen)
    _step(conv, optimizer, 0)
    frozen.thaw("weight")
    assert not conv.weight._backward_hooks
    _step(conv, optimizer, 1)
    assert not same_bits(conv.weight[0], conv.weight[1])
    frozen.assert_frozen()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_copies_stay_one_in_another_dtype_and_layout(dtype: torch.dtype) -> None:
    _, conv = _pair()
    freeze = freeze_entries(conv.to(memory_format=torch.channels_last), SPEC)
    conv.to(dtype)
    optimizer = MaskedOptimizer(AdamW(conv.parameters(), fused=True, weight_decay=0.1), freeze)
    for _ in range(3):
        optimizer.zero_grad()
        conv(torch.randn(1, 4, 5, 5, dtype=dtype)).square().sum().backward()
        optimizer.step()
        assert _copies_are_one(conv)


def test_a_summed_gradient_is_not_summed_again() -> None:
    shared, conv = _pair()
    frozen = freeze_entries(conv, SPEC)
    optimizer = MaskedOptimizer(SGD(conv.parameters(), lr=0.0), frozen)
    for layer in (shared, conv):
        _loss(layer, 0).backward()
    frozen.remove()
    frozen.attach()
    optimizer.step()
    assert same_bits(conv.weight.grad[1:2], shared.weight.grad)  # type: ignore[arg-type]  # it has one


def test_a_gradient_set_by_hand_is_summed_by_the_step() -> None:
    weight = nn.Parameter(torch.zeros(3, 1))
    optimizer = MaskedOptimizer(SGD([weight], lr=1.0), freeze_entries({"weight": weight}, {"weight": tied(0)}))
    weight.grad = torch.tensor([[0.0], [1.0], [2.0]])
    optimizer.step()
    assert weight.tolist() == [[-3], [-3], [-3]]


def test_parameters_tied_to_one_another_later_are_summed_once() -> None:
    models: Any = nn.ModuleList([_pair()[1], _pair()[1]])
    shared, _ = _pair()
    freeze_entries(models, "*.weight = tied(0)")
    models[1].weight = models[0].weight
    _loss(models[0], 0)
    _loss(models[1], 0)
    _loss(models[0], 0).backward()
    _loss(shared, 0).backward()
    torch.testing.assert_close(models[0].weight.grad[:1], shared.weight.grad)


def test_a_tied_tensor_saves_without_a_warning() -> None:
    _, conv = _pair()
    freeze_entries(conv, SPEC)
    torch.save({"weight": conv.weight}, io.BytesIO())


def test_an_empty_dimension_is_refused() -> None:
    with pytest.raises(RegionError, match="dimension 0 has size 0: there is no slice to tie"):
        freeze_entries({"w": nn.Parameter(torch.empty(0, 3))}, "w = tied(0)")


def test_a_gradient_set_by_hand_before_a_state_is_loaded_is_summed() -> None:
    layer = nn.Linear(3, 2, bias=False)
    frozen = freeze_entries(layer, "weight = tied(0, start=first)")
    optimizer = MaskedOptimizer(torch.optim.SGD(layer.parameters(), lr=1.0), frozen)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    frozen.load_state_dict(frozen.state_dict())
    optimizer.step()
    assert torch.allclose(before - layer.weight, torch.full((2, 3), 3.0))


# --------------------------------------------------------------------------------------------------------------------
# Which entries are tied

_LABELS = torch.tensor([[0, 7, -1, 0], [7, 2, -1, 2], [-1, -1, -1, 5], [0, 7, 7, 2]])
_WAYS: list[tuple[str, Any, list[list[int]]]] = [
    ("groups", tied(0, groups=2, start="first"), [[0, 1, 2, 3], [0, 1, 2, 3], [8, 9, 10, 11], [8, 9, 10, 11]]),
    ("groups of the last", tied(-1, groups=2, start="first"), [[n, n, n + 2, n + 2] for n in (0, 4, 8, 12)]),
    ("mirrored", mirrored(0, start="first"), [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7], [0, 1, 2, 3]]),
    ("mirrored last", mirrored(-1, start="first"), [[n, n + 1, n + 1, n] for n in (0, 4, 8, 12)]),
    ("symmetric", symmetric(start="first"), [[0, 1, 2, 3], [1, 5, 6, 7], [2, 6, 10, 11], [3, 7, 11, 15]]),
    ("labels", tied(_LABELS, start="first"), [[0, 1, 2, 0], [1, 5, 6, 5], [8, 9, 10, 11], [0, 1, 1, 5]]),
]


@pytest.mark.parametrize(("tie", "first"), [way[1:] for way in _WAYS], ids=[way[0] for way in _WAYS])
@pytest.mark.parametrize("make", [_momentum, _adamw], ids=["SGD", "AdamW"])
def test_entries_that_are_one_train_as_one(tie: Any, first: list[list[int]], make: Any) -> None:
    torch.manual_seed(4)
    layer = nn.Linear(4, 4, bias=False)
    one = nn.Parameter(
        layer.weight.detach().flatten()[torch.tensor(first)].flatten().clone()
    )  # of which the first count
    frozen = freeze_entries(layer, Rule("weight", value=tie))
    optimizer, plain = MaskedOptimizer(make([layer.weight]), frozen), make([one])
    where = torch.tensor(first).flatten()
    for seed in range(20):
        images = randn(6, 4, seed=seed)
        for weight, each in ((layer.weight, optimizer), (one[where].view(4, 4), plain)):
            each.zero_grad()
            torch.tanh(images @ weight.T).pow(3).sum().backward()
            each.step()
        assert same_bits(layer.weight, layer.weight.flatten()[where].view(4, 4))
        torch.testing.assert_close(layer.weight.flatten(), one[where], rtol=1e-4, atol=1e-6)  # another order of sums
    frozen.assert_frozen()


@pytest.mark.parametrize(("tie", "first"), [way[1:] for way in _WAYS], ids=[way[0] for way in _WAYS])
def test_the_gradient_of_entries_that_are_one_is_their_sum(tie: Any, first: list[list[int]]) -> None:
    layer = nn.Linear(4, 4, bias=False)
    frozen = freeze_entries(layer, Rule("weight", value=tie))
    numbers = torch.arange(16.0).view(4, 4) ** 2  # whole numbers: exact in any order
    (layer.weight * numbers).sum().backward()
    where = torch.tensor(first).flatten()
    sums = torch.zeros(16).index_add(0, where, numbers.flatten())
    assert same_bits(layer.weight.grad, sums[where].view(4, 4))  # type: ignore[arg-type]  # it has one
    frozen.remove()


@pytest.mark.parametrize(("tie", "first"), [way[1:] for way in _WAYS], ids=[way[0] for way in _WAYS])
def test_entries_that_are_one_start_from_their_mean(tie: Any, first: list[list[int]]) -> None:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data.copy_(torch.arange(16.0).view(4, 4))
    freeze_entries(layer, Rule("weight", value=tie.starting_from("mean")))
    where = torch.tensor(first).flatten()
    counts = torch.zeros(16).index_add(0, where, torch.ones(16))
    means = torch.zeros(16).index_add(0, where, torch.arange(16.0)) / counts
    torch.testing.assert_close(layer.weight.flatten(), means[where])


@pytest.mark.parametrize(
    ("tie", "shape", "message"),
    [
        (
            tied(0, groups=3),
            (4, 4),
            r"`tied\(0, groups=3\)` needs dimension 0 to be a multiple of 3, found 4 .*; choose",
        ),
        (mirrored(2), (4, 4), r"dimension 2 is out of range for a tensor of 2 dimensions .*; use 0 to 1"),
        (mirrored(0), (1, 4), "dimension 0 has no two slices to mirror"),
        (symmetric, (4, 3), "`symmetric` needs square last two dimensions of 2 or more, found 4 x 3"),
        (symmetric, (4,), "`symmetric` needs square last two dimensions of 2 or more, found 4"),
        (tied(_LABELS[:2]), (4, 4), r"labels must have the parameter's shape \(4, 4\), found \(2, 4\) .*; give"),
        (tied(_LABELS.float()), (4, 4), r"labels must be integers from -1 on, found torch\.float32 .*; give"),
        (tied(_LABELS - 1), (4, 4), "labels must be integers from -1 on, found torch.int64"),
        (
            tied(_LABELS.to("meta")),
            (4, 4),
            "labels must be a dense tensor of integers, found torch.strided on meta .*; con",
        ),
        (tied(_LABELS.to_sparse()), (4, 4), "labels must be a dense tensor of integers, found torch.sparse_coo on "),
        (tied(np.full((4, 4), "a")), (4, 4), r"labels must be a dense tensor of integers, found ndarray of <U1"),
        (tied(torch.arange(16).view(4, 4)), (4, 4), r"no two entries are tied .*; correct the labels"),
    ],
)
def test_entries_that_cannot_be_one_are_refused(tie: Any, shape: tuple[int, ...], message: str) -> None:
    weight = torch.zeros(shape, requires_grad=True)
    with pytest.raises(RegionError, match=message):
        freeze_entries({"w": weight}, Rule("w", value=tie))


def test_labels_say_where_they_start_from() -> None:
    assert str(Rule("w", value=tied(_LABELS, start="mean"))) == "w = tied(<labels of shape (4, 4)>, start=mean)"
    with pytest.raises(
        FrozenValueError, match=r'label differ, .*`tied\(labels, start="first"\)` or `tied\(labels, start="mean"\)`$'
    ):
        freeze_entries(nn.Linear(4, 4), Rule("weight", value=tied(_LABELS)))


@pytest.mark.parametrize("given", [torch.Tensor.int, lambda labels: labels.cpu().numpy()], ids=["tensor", "array"])
def test_a_state_saved_with_other_labels_is_refused(given: Any) -> None:
    def freeze(labels: Any, state: Any = None) -> dict[str, Any]:
        model = nn.Linear(4, 4)
        model.weight.data.fill_(1)
        return freeze_entries(model, {"weight": tied(labels)}, state=state).state_dict()

    state = freeze(given(_LABELS))
    for other in (torch.zeros_like(_LABELS), _LABELS.T, _LABELS.where(_LABELS != -1, 9)):
        with pytest.raises(
            StateMismatchError, match=r"rule `weight = tied\(<labels .*: it was saved with other labels"
        ):
            freeze(given(other), state)
    freeze(_LABELS.where(_LABELS != 7, 3), state)  # another number for the same class


@pytest.mark.parametrize(
    "tie", [tied(0, start="mean"), tied(torch.zeros(10, 3, dtype=torch.int64), start="mean")], ids=["slices", "labels"]
)
def test_copies_that_are_one_stay_as_they_are_where_the_rule_says_mean(tie: Any) -> None:
    layer = nn.Linear(3, 10, bias=False)
    layer.weight.data.fill_(0.1)  # ten times which, a tenth of which is another number
    assert not same_bits(layer.weight.sum() / 30, torch.tensor(0.1))
    frozen = freeze_entries(layer, Rule("weight", value=tie))
    layer.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()})
    assert same_bits(layer.weight, torch.full((10, 3), 0.1))
    frozen.assert_frozen(guarded=False)


def test_groups_are_for_slices_and_not_for_labels() -> None:
    with pytest.raises(
        RegionError, match="`groups` of `tied` is for slices along a dimension; give each group labels of its own"
    ):
        tied(_LABELS, groups=2)


def test_a_symmetric_matrix_composes_with_a_frozen_diagonal() -> None:
    layer = nn.Linear(3, 3, bias=False)
    frozen = freeze_entries(layer, "weight = symmetric(start=mean)\nweight[diagonal] = 0")
    optimizer = MaskedOptimizer(_adamw(layer.parameters()), frozen)
    for seed in range(3):
        optimizer.zero_grad()
        layer(randn(2, 3, seed=seed)).pow(2).sum().backward()
        optimizer.step()
    assert same_bits(layer.weight, layer.weight.T)
    assert same_bits(layer.weight.diagonal(), torch.zeros(3))
    with pytest.raises(
        RuleConflictError, match=r"disagree about entry .* in each entry of the last two dimensions and"
    ):
        freeze_entries(nn.Linear(3, 3), "weight = symmetric(start=mean)\nweight[0, 1] = 0")


@pytest.mark.parametrize("tie", ["tied(0)", "tied(0, groups=2)", "mirrored(1)", "symmetric"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adafactor], ids=["by entry", "mixing"])
def test_a_step_with_ties_asks_no_number_of_a_tensor(tie: str, make: Any) -> None:
    def questions(spec: str) -> int:
        layer = nn.Linear(4, 4)
        frozen = freeze_entries(layer, spec)
        optimizer = MaskedOptimizer(make(layer.parameters(), lr=0.1), frozen)
        found = 0
        for _ in range(3):
            optimizer.zero_grad()
            with Ops() as ops:
                layer(torch.ones(2, 4)).sum().backward()
                optimizer.step()
            found = ops.counts["_local_scalar_dense"]
        return found

    with_mean = tie.replace(")", ", start=mean)") if ")" in tie else f"{tie}(start=mean)"
    assert questions(f"weight = {with_mean}") == questions("")
