"""`train_only`: the named regions train, other entries of those parameters are kept, and nothing else trains."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from freezehooks import (
    FreezeError,
    FrozenEntries,
    MaskedOptimizer,
    RegionError,
    Rule,
    SpecError,
    StateMismatchError,
    TargetError,
    UnguardedError,
    freeze_entries,
    tied,
    train_only,
    zeros,
)

from .claims import held_twice, same_bits


class _Language(nn.Module):
    """An embedding, a block with a buffer, and a head: tied to the embedding or a matrix of its own."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(8, 4)
        self.block = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.lm_head = nn.Linear(4, 8, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.norm(self.block(self.wte(tokens))))
        return out


NEW: Final = "wte[5:]\nlm_head[5:]"


def _backward(model: nn.Module) -> None:
    tokens = torch.tensor([0, 3, 5, 6, 7, 1])
    model(tokens).square().mean().backward()


def _train(model: nn.Module, optimizer: Any, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        _backward(model)
        optimizer.step()


def _changed(before: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the mask of the entries that changed in each parameter, by name."""
    return {name: found.detach() != before[name] for name, found in model.named_parameters(remove_duplicate=False)}


def _numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters(remove_duplicate=False)}


def _assert_only_new_rows_moved(before: dict[str, Tensor], model: nn.Module) -> None:
    for name, moved in _changed(before, model).items():
        if name in ("wte.weight", "lm_head.weight"):
            assert moved[5:].any(), name
            assert not moved[:5].any(), name
        else:
            assert not moved.any(), name


MAKERS: Final[dict[str, Callable[[Any], Optimizer]]] = {
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.1),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
either_mode = pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])
tied_or_not = pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])


# --------------------------------------------------------------------------------------------------------------------
# What trains


@makers
@either_mode
@tied_or_not
def test_the_named_regions_train_and_nothing_else(
    make: Callable[[Any], Optimizer], compact: bool, is_tied: bool
) -> None:
    model = _Language(tied=is_tied)
    before = _numbers(model)
    frozen = train_only(model, NEW)
    optimizer = MaskedOptimizer(make(model.parameters()), frozen, compact=compact)
    _train(model, optimizer)
    frozen.assert_frozen()
    _assert_only_new_rows_moved(before, model)


@makers
@either_mode
def test_what_trains_does_so_as_beside_constants(make: Callable[[Any], Optimizer], compact: bool) -> None:
    model = _Language()
    reference = copy.deepcopy(model)
    optimizer = MaskedOptimizer(make(model.parameters()), train_only(model, NEW), compact=compact)
    rows = {name: reference.get_parameter(name).detach()[5:].clone().requires_grad_() for name in _TABLES}
    plain = make(list(rows.values()))
    for _ in range(20):
        _train(model, optimizer, 1)
        reference.zero_grad()
        _backward(reference)
        for name, row in rows.items():
            gradient = reference.get_parameter(name).grad
            assert gradient is not None
            row.grad = gradient[5:].clone()
        plain.step()
        for name, row in rows.items():
            reference.get_parameter(name).data[5:] = row.detach()
    for name in _TABLES:
        assert same_bits(model.get_parameter(name), reference.get_parameter(name))


_TABLES: Final = ("wte.weight", "lm_head.weight")


def test_the_rules_say_what_keeps() -> None:
    model = _Language()
    frozen = train_only(model, "wte[5:]\nlm_head[5:, :2 ]\nblock.weight")
    assert list(map(str, frozen.rules)) == ["wte.weight[~5:] = keep", "lm_head.weight[~(5:, :2)] = keep"]
    assert str(frozen).splitlines()[-1] == "3 other parameters do not train"
    assert str(frozen.trainable()) == "trainable entries: 34 of 92 (36.96 %)"
    assert model.block.weight.requires_grad


def test_several_rules_of_one_parameter_unite() -> None:
    model = _Language()
    frozen = train_only(model, "wte[5:]\nwte[:, 0]\nwt?[0]")
    assert list(map(str, frozen.rules)) == ["wte.weight[~(5: | (:, 0) | 0)] = keep"]
    expected = torch.ones(8, 4, dtype=torch.bool)
    expected[5:], expected[:, 0], expected[0] = False, False, False
    assert frozen["wte.weight"].frozen.equal(expected)


def test_the_complement_of_a_complement_is_written_without_it() -> None:
    frozen = train_only(_Language(), "wte[~:5]")
    assert list(map(str, frozen.rules)) == ["wte.weight[:5] = keep"]


def test_a_parameter_that_is_named_whole_in_any_way_has_no_rule() -> None:
    model = _Language()
    frozen = train_only(model, ["wte", "wte[5:]", "lm_head[:4]", "lm_head[4:]", "block.*"])
    assert list(frozen) == []
    assert [name for name, each in model.named_parameters() if not each.requires_grad] == ["norm.weight", "norm.bias"]
    assert str(frozen) == "2 other parameters do not train"
    MaskedOptimizer(SGD(model.parameters(), lr=0.1), frozen)
    frozen.remove()
    assert str(frozen) == "nothing is frozen"
    assert all(each.requires_grad for each in model.parameters())


def _first_rows(parameter: Tensor) -> Tensor:
    rows = torch.zeros_like(parameter, dtype=torch.bool)
    rows[:2] = True
    return rows


def _mask() -> Tensor:
    mask = torch.zeros(8, 4, dtype=torch.bool)
    mask[:2] = True
    return mask


@pytest.mark.parametrize("region", [_mask(), _first_rows], ids=["mask", "function"])
def test_masks_and_functions_say_what_trains(region: Any) -> None:
    model = _Language()
    frozen = train_only(model, {"wte": region})
    assert frozen["wte.weight"].frozen.equal(~_mask())
    both = train_only(_Language(), [{"wte": region}, "wte[7]"])
    expected = ~_mask()
    expected[7] = False
    assert both["wte.weight"].frozen.equal(expected)
    assert "wte.weight[<" in str(both)


def test_a_mask_of_all_entries_is_the_whole_parameter() -> None:
    frozen = train_only(_Language(), {"wte": torch.ones(8, 4, dtype=torch.bool)})
    assert list(frozen) == []


def test_one_name_of_a_tied_parameter_is_enough_and_two_unite() -> None:
    one = _Language(tied=True)
    assert train_only(one, "lm_head[5:]")["lm_head.weight"].frozen_count == 20
    assert one.wte.weight.requires_grad
    two = train_only(_Language(tied=True), "lm_head[5:]\nwte[0]")
    assert list(map(str, two.rules)) == ["wte.weight[~(5: | 0)] = keep"]


def test_bare_tensors() -> None:
    weights = {name: nn.Parameter(torch.ones(4)) for name in ("a", "b", "c")}
    weights["c"].requires_grad_(False)
    frozen = train_only(weights, "a[2:]")
    assert [each.requires_grad for each in weights.values()] == [True, False, False]
    frozen.remove()
    assert [each.requires_grad for each in weights.values()] == [True, True, False]
    frozen.attach()
    assert [each.requires_grad for each in weights.values()] == [True, False, False]


def test_buffers_and_integers_are_left_alone() -> None:
    model = _Language()
    model.register_parameter("codes", nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False))
    frozen = train_only(model, "wte[5:]")
    _backward(model)
    assert model.norm.running_mean is not None
    assert bool(model.norm.running_mean.any())
    frozen.remove()
    assert not model.get_parameter("codes").requires_grad


# --------------------------------------------------------------------------------------------------------------------
# Attaching and removing


def _requires(model: nn.Module) -> dict[str, bool]:
    return {name: each.requires_grad for name, each in model.named_parameters()}


def test_removal_gives_back_what_required_a_gradient_before_and_attaching_sets_it_again() -> None:
    model = _Language()
    model.block.bias.requires_grad_(False)
    before = _requires(model)
    frozen = train_only(model, NEW)
    held = _requires(model)
    assert [name for name, requires in held.items() if requires] == list(_TABLES)
    frozen.remove()
    assert _requires(model) == before
    frozen.remove()
    frozen.attach()
    assert _requires(model) == held
    with frozen:
        assert _requires(model) == held
    assert _requires(model) == before
    assert not model.block._load_state_dict_post_hooks


@pytest.mark.parametrize("way", ["copied", "pickled"])
@pytest.mark.parametrize("spec", [NEW, "wte"], ids=["regions", "whole"])
def test_a_copy_is_given_back_by_a_handle_of_its_own(way: str, spec: str) -> None:
    model = _Language()
    before = _requires(model)
    frozen = train_only(model, spec)
    held = _requires(model)
    other = copy.deepcopy(model) if way == "copied" else pickle.loads(pickle.dumps(model))
    (found,) = FrozenEntries.of(other)
    found.remove()
    assert _requires(other) == before
    assert _requires(model) == held
    assert FrozenEntries.of(other) == ()
    found.attach()
    assert _requires(other) == held
    frozen.remove()
    assert _requires(other) == held
    assert _requires(model) == before


def test_a_handle_found_in_a_part_or_a_wrapper_gives_its_parameters_back() -> None:
    model = _Language()
    train_only(model, NEW)
    for handle in FrozenEntries.of(nn.Sequential(copy.deepcopy(model))):
        handle.remove()
    (part,) = FrozenEntries.of(model.block)
    part.remove()
    assert model.block.weight.requires_grad
    assert not model.norm.weight.requires_grad


def test_left_over_gradients_let_no_optimizer_step_what_does_not_train() -> None:
    model = _Language()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    _train(model, optimizer, 2)
    _backward(model)
    before = _numbers(model)
    frozen = train_only(model, NEW)
    frozen.guard(optimizer)
    optimizer.step()
    _assert_only_new_rows_moved(before, model)
    frozen.remove()
    _backward(model)
    before = _numbers(model)
    frozen.attach()
    optimizer.step()
    _assert_only_new_rows_moved(before, model)


def test_loading_leaves_it_as_it_is() -> None:
    model = _Language()
    frozen = train_only(model, NEW)
    held = _requires(model)
    model.load_state_dict(_Language().state_dict())
    assert _requires(model) == held
    model.load_state_dict(
        {name: nn.Parameter(each) for name, each in _float_state(_Language()).items()}, assign=True, strict=False
    )
    assert _requires(model) == held
    frozen.remove()
    assert all(_requires(model).values())


def _float_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: each for name, each in model.state_dict().items() if each.is_floating_point() and "running" not in name
    }


@held_twice
def test_of_two_handles_the_last_one_gives_back() -> None:
    model = _Language()
    first, second = train_only(model, NEW), train_only(model, "wte[5:]\nlm_head[6:]")
    assert list(second) == list(_TABLES)
    first.remove()
    assert not model.block.weight.requires_grad
    second.remove()
    assert all(_requires(model).values())


@held_twice
def test_of_two_handles_the_first_may_go_last() -> None:
    model = _Language()
    first, second = train_only(model, NEW), train_only(model, "wte[5:]")
    assert not model.lm_head.weight.requires_grad
    second.remove()
    assert _requires(model)["lm_head.weight"]
    assert not _requires(model)["block.weight"]
    first.remove()
    assert all(_requires(model).values())


def test_thawing_all_entries_leaves_the_others_untrained_until_removal() -> None:
    model = _Language()
    frozen = train_only(model, NEW)
    frozen.thaw("*")
    assert frozen.attached
    assert not model.block.weight.requires_grad
    frozen.remove()
    assert not frozen.attached
    assert model.block.weight.requires_grad


def test_what_requires_a_gradient_again_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    frozen = train_only(model, "0[0]")
    assert str(frozen).splitlines()[-1] == "3 other parameters do not train"
    model[1].bias.requires_grad_()
    assert str(frozen).splitlines()[-1] == "2 other parameters do not train"
    with pytest.raises(UnguardedError, match=r"train_only did not name `1\.bias`, which requires a gradient now; call"):
        frozen.assert_frozen(guarded=False)
    model[1].bias.requires_grad_(False)
    frozen.assert_frozen(guarded=False)
    model[1].bias.requires_grad_()
    frozen.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("target", ["1.weight", "1", "1.*", "1.weight[0]"])
def test_thawing_what_was_not_named_is_refused_with_what_to_do(target: str) -> None:
    frozen = train_only(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "0[0]")
    with pytest.raises(
        TargetError, match=r"^no entry of `1\.\w+` is frozen: train_only did not name it.*; remove\(\) the"
    ):
        frozen.thaw(target)


def test_scripted_modules_inside_do_not_train_either() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated in later releases
        model = nn.Sequential(nn.Embedding(5, 2), torch.jit.script(nn.Linear(2, 2)))
    frozen = train_only(model, "0[3:]")
    assert [each.requires_grad for each in model.parameters()] == [True, False, False]
    frozen.remove()
    assert all(each.requires_grad for each in model.parameters())


# --------------------------------------------------------------------------------------------------------------------
# Saving


@either_mode
@pytest.mark.parametrize(
    "spec",
    [NEW, "wte[zeros]", {"wte": _mask()}, {"wte": lambda weight: weight.abs() < 0.5}, [{"wte": _mask()}, "wte[zeros]"]],
    ids=["index", "zeros", "mask", "function", "mask_and_zeros"],
)
def test_a_run_resumes_where_it_stopped(spec: Any, compact: bool) -> None:
    def started(state: dict[str, Any] | None, weights: dict[str, Any]) -> tuple[nn.Module, FrozenEntries, Any]:
        model = _Language()
        model.load_state_dict(weights)
        frozen = train_only(model, spec, state=state)
        return model, frozen, MaskedOptimizer(AdamW(model.parameters(), lr=0.1), frozen, compact=compact)

    origin = _Language()
    origin.wte.weight.data[4:6] = 0
    model, frozen, optimizer = started(None, origin.state_dict())
    _train(model, optimizer)
    saved = copy.deepcopy((frozen.state_dict(), model.state_dict(), optimizer.state_dict()))
    resumed, again, its_optimizer = started(saved[0], saved[1])
    its_optimizer.load_state_dict(saved[2])
    assert list(map(str, again.rules)) == list(map(str, frozen.rules))
    _train(model, optimizer)
    _train(resumed, its_optimizer)
    for (name, first), second in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert same_bits(first, second), name


def _sparse() -> Any:
    """A model with one weight without zeros, one with some, and one of only zeros."""
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data[0] = 0
    model[2].weight.data.zero_()
    return model


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_what_a_wildcard_skipped_does_not_train_on_resuming_and_what_it_named_whole_does(wrapped: bool) -> None:
    model = _sparse()
    frozen = train_only(model, "*.weight[zeros]")
    expected = _requires(model)
    assert [name for name, requires in expected.items() if requires] == ["1.weight", "2.weight"]
    state = frozen.state_dict()
    resumed: Any = nn.DataParallel(_sparse()) if wrapped else _sparse()
    for parameter in resumed.parameters():
        parameter.data.fill_(1)  # none of them is zero anymore
    again = train_only(resumed, "*.weight[zeros]", state=state)
    assert _requires(resumed.module if wrapped else resumed) == expected
    (held,) = again.values()
    assert held.frozen.equal(frozen["1.weight"].frozen)


def test_a_state_of_a_run_in_which_a_parameter_did_not_train_is_refused() -> None:
    state = train_only(_Language(), "wte[5:]").state_dict()
    for more in ("block", "block[0]", "*[zeros]\nblock.weight[diagonal]"):
        model = _Language()
        with pytest.raises(
            StateMismatchError,
            match=r"saved under other rules: `block\.weight` did not train, and `block.* = keep` names it",
        ):
            train_only(model, f"wte[5:]\n{more}", state=state)
        assert all(_requires(model).values())


def test_a_state_of_other_rules_is_refused_and_changes_nothing() -> None:
    state = train_only(_Language(), "wte[5:]").state_dict()
    model = _Language()
    for spec in (NEW, "wte[6:]", "lm_head"):
        with pytest.raises(StateMismatchError, match="saved under other rules"):
            train_only(model, spec, state=state)
    with pytest.raises(StateMismatchError, match="the state cannot be read"):
        train_only(model, NEW, state={"weights": 1})
    assert all(_requires(model).values())


def test_rules_of_a_handle_are_rules_of_freeze_entries() -> None:
    frozen = train_only(_Language(), NEW)
    again = freeze_entries(_Language(), "\n".join(map(str, frozen.rules)), state=frozen.state_dict())
    assert again["wte.weight"].frozen.equal(frozen["wte.weight"].frozen)


# --------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("", SpecError, "`spec` names nothing to train; name a region, as in train_only"),
        ([], SpecError, "names nothing"),
        ("wte[5:] = 0", SpecError, r"rule `wte\[5:\] = 0` gives a value, .*; leave the value out"),
        ({"wte": tied(0)}, SpecError, r"rule `wte = tied\(0\)` gives a value"),
        ({"wte": (_mask(), 1.0)}, SpecError, "gives a value"),
        ("wtx[5:]", TargetError, "did you mean `wte`"),
        ("norm.running_mean", SpecError, "`norm.running_mean` is a buffer, which no optimizer trains; leave it out"),
        ("wte[8:]", RegionError, r"rule `wte\[8:\] = keep`: the region selects no entry"),
        ("wte[5:]\nwte[9]", RegionError, r"rule `wte\[9\] = keep`: index 9 is out of range"),
        (Rule("wte", zeros), RegionError, "selects no entry"),
        ({"wte": _mask()[:3]}, RegionError, "a mask must"),
        ("block.bias[0]", SpecError, "`block.bias` requires no gradient, so none of it would train; name"),
    ],
)
def test_bad_input_is_refused_before_the_first_change(spec: Any, error: type[FreezeError], message: str) -> None:
    model = _Language()
    model.block.bias.requires_grad_(False)
    _backward(model)
    before = _requires(model)
    with pytest.raises(error, match=message):
        train_only(model, spec)
    assert _requires(model) == before
    assert model.block.weight.grad is not None
    assert FrozenEntries.of(model) == ()


def test_a_model_must_be_a_module_or_a_mapping() -> None:
    with pytest.raises(SpecError, match=r"found Parameter; call train_only\(model, spec\)"):
        train_only(nn.Parameter(torch.ones(2)), "weight")  # type: ignore[arg-type]
