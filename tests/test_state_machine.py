"""Whatever happens to a model, in whatever order: frozen entries hold, and free ones train like a plain model's."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
import torch
from hypothesis import HealthCheck, assume, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor
from torch.optim import Optimizer

from freezehooks import (
    FrozenEntries,
    MaskedOptimizer,
    OptimizerMismatchError,
    ParameterChangedError,
    Rule,
    RuleConflictError,
    freeze_entries,
)

from .claims import held_twice
from .draws import randn
from .reference import (
    AVERAGE,
    COUNTERS,
    DTYPES,
    KINDS,
    REGIONS,
    VALUES,
    Drawn,
    ForwardError,
    Hold,
    Images,
    Kind,
    Net,
    Piece,
    Reference,
    Words,
    copied,
    differ,
    mark,
    parameters_by_name,
    put_parameter,
    stepped,
    take_over,
)

EXAMPLES: Final = int(os.environ.get("FREEZEHOOKS_EXAMPLES", "0"))
"""How many random histories to try in each run, different ones each time; 0 for the same few each time."""

# --------------------------------------------------------------------------------------------------------------------
# What is drawn

_drawn = st.builds(Drawn, st.integers(0, 7), st.sampled_from(sorted(REGIONS)), st.sampled_from(VALUES))
_rules = st.lists(_drawn, min_size=1, max_size=3)
_picks = st.integers(0, 5)
_seldom = st.sampled_from([False, False, True])

UNDO: Final = ("nothing", "look", "save", "step", "step", "load_the_rest", "load_the_rest")
"""The events that correct stray writes."""


@dataclass(eq=False)
class Stepper:
    """An optimizer of the frozen model beside the plain one of the reference, and which handles guard it."""

    kind: Kind
    face: Optimizer
    plain: Optimizer
    compact: bool
    guards: list[Hold] = field(default_factory=list)
    settled: set[tuple[Hold, str]] = field(default_factory=set)
    """The frozen entries whose state is known to have its initial values."""

    @property
    def guarded(self) -> Optimizer:
        """What to pass to `guard`: compact mode needs the optimizer itself."""
        return self.face.inner if isinstance(self.face, MaskedOptimizer) and self.compact else self.face

    @property
    def active(self) -> list[Hold]:
        return [hold for hold in self.guards if hold.attached]


# --------------------------------------------------------------------------------------------------------------------
# The machine


def event(**drawn: Any) -> Callable[[Callable[..., None]], Any]:
    """Make a rule of an event; often only the next event shows its effect."""

    def decorate(happen: Callable[..., None]) -> Any:
        def happen_then(self: Lives, then: str, **known: Any) -> None:
            happen(self, **known)
            self.everything_holds()
            if then != "nothing":
                getattr(self, f"_{then}")()

        happen_then.__name__ = happen.__name__
        return rule(then=st.sampled_from(["nothing", "train", "look", "save"]), **drawn)(happen_then)

    return decorate


class Lives(RuleBasedStateMachine):
    """A model, its optimizers and handles beside a reference, through everything that may happen to them."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = torch.Generator().manual_seed(0)
        self.dtype = torch.float32
        self.steppers: list[Stepper] = []
        self.checkpoints: list[dict[str, Tensor]] = []
        self.optimizer_states: list[tuple[int, list[dict[str, Any]], list[dict[str, Any]]]] = []
        self.generation = 0
        self.left_behind: tuple[Net, dict[str, Tensor]] | None = None

    @initialize(net=st.sampled_from([Images, Words]), data=st.data(), rules=_rules)
    def build(self, net: type[Net], data: Any, rules: list[Drawn]) -> None:
        torch.manual_seed(1)
        self.model: Net = net()
        self.reference = Reference(copy.deepcopy(self.model))
        self.keys = list(self.model.state_dict())
        self.names = list(self.parameters)
        self._make_optimizers(data)
        self._freeze(rules, guarded=True)

    @property
    def parameters(self) -> dict[str, Any]:
        return parameters_by_name(self.model)

    @property
    def holds(self) -> list[Hold]:
        return self.reference.holds

    def _random(self, shape: torch.Size) -> Tensor:
        return randn(*shape, seed=self.numbers).to(self.dtype)

    def _name(self, pick: int) -> str:
        return self.names[pick % len(self.names)]

    def _held_name(self, pick: int) -> str:
        """Name a parameter, one that a handle holds as long as there is one."""
        names = [name for hold in self.holds for name in hold.pieces] or self.names
        return names[pick % len(names)]

    def _hold(self, pick: int) -> Hold:
        return self.holds[pick % len(self.holds)]

    def _stepper(self, pick: int) -> Stepper:
        return self.steppers[pick % len(self.steppers)]

    # Optimizers

    def _make_optimizers(self, data: Any) -> None:
        cut = len(self.names) // 2
        split = data.draw(
            st.sampled_from([[self.names], [self.names[:cut], self.names[cut:]], [self.names, self.names[cut - 1 :]]])
        )
        self.steppers = []
        self.generation += 1
        for names in split:
            kind = KINDS[data.draw(st.sampled_from(sorted(KINDS)))]
            compact = kind.can_be_compact and data.draw(st.booleans())
            self._make_optimizer(kind, names, compact=compact, masked=data.draw(st.booleans()))

    def _make_optimizer(self, kind: Kind, names: list[str], *, compact: bool, masked: bool) -> None:
        optimizer, plain = (
            kind.make([model.get_parameter(name) for name in names]) for model in (self.model, self.reference.model)
        )
        guards = [hold for hold in self.holds if set(hold.pieces) & set(names)]
        if masked:
            optimizer = MaskedOptimizer(optimizer, [hold.handle for hold in guards], compact=compact)
        stepper = Stepper(kind, optimizer, plain, compact)
        self.steppers.append(stepper)
        for hold in guards:
            self._guard(stepper, hold)

    def _guards_itself(self, stepper: Stepper, hold: Hold) -> bool:
        """Return whether a wrapper was given the handle when it was made or copied."""
        face = stepper.face
        known = face.frozen if isinstance(face, MaskedOptimizer) and face.compact == stepper.compact else ()
        return any(handle is hold.handle for handle in known)

    def _names_of(self, stepper: Stepper) -> list[str | None]:
        """Name the parameters of an optimizer, in its order; None for those that the model has lost."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return [names.get(id(parameter)) for parameter in stepped(stepper.face)]

    def _steps(self, stepper: Stepper, hold: Hold) -> bool:
        return bool(set(hold.pieces) & set(self._names_of(stepper)))

    def _guard(self, stepper: Stepper, hold: Hold) -> None:
        if not self._steps(stepper, hold):
            with pytest.raises(OptimizerMismatchError, match="steps none of the frozen parameters"):
                hold.handle.guard(stepper.guarded, compact=stepper.compact)
            return
        if not self._guards_itself(stepper, hold):
            hold.handle.guard(stepper.guarded, compact=stepper.compact)
        if hold not in stepper.guards:
            stepper.guards.append(hold)
            self._settle(hold, [stepper])

    def _settle(self, hold: Hold, steppers: list[Stepper] | None = None) -> None:
        """Record that the state at the frozen entries has its initial values; for all optimizers by default."""
        for stepper in self.steppers if steppers is None else steppers:
            if hold in stepper.active:
                stepper.settled |= {(hold, name) for name in hold.pieces}

    @event(data=st.data())
    def make_other_optimizers(self, data: Any) -> None:
        self._make_optimizers(data)

    @event(pick=_picks)
    def add_a_group_of_what_no_optimizer_steps(self, pick: int) -> None:
        stepper = self._stepper(pick)
        known = {name for each in self.steppers for name in self._names_of(each)}
        missing = [name for name in self.names if name not in known]
        if not missing or not stepper.kind.can_grow:
            return
        self.generation += 1
        for optimizer, model in ((stepper.face, self.model), (stepper.plain, self.reference.model)):
            optimizer.add_param_group({"params": [model.get_parameter(name) for name in missing]})
        for hold in self.holds:
            if self._steps(stepper, hold):
                self._guard(stepper, hold)

    @precondition(lambda self: self.holds)
    @event(pick=_picks, of=_picks)
    def guard_or_no_longer(self, pick: int, of: int) -> None:
        stepper, hold = self._stepper(pick), self._hold(of)
        if hold not in stepper.guards:
            self._guard(stepper, hold)
        elif self._steps(stepper, hold) and not isinstance(stepper.face, MaskedOptimizer):
            hold.handle.guard(stepper.face).remove()
            stepper.guards.remove(hold)
            stepper.settled -= {(hold, name) for name in hold.pieces}

    @event(pick=_picks)
    def make_compact(self, pick: int) -> None:
        stepper = self._stepper(pick)
        if stepper.kind.can_be_compact and stepper.guards:
            stepper.compact = True
            for hold in stepper.guards:
                if self._steps(stepper, hold):
                    self._guard(stepper, hold)

    # Training

    def _loss(self, model: Net, batch: Tensor) -> tuple[Tensor, Tensor]:
        output = model(batch)
        weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)
        return torch.sum(torch.tanh(output - 0.3) * weights), output

    def _forward(self) -> tuple[Tensor, Tensor]:
        """Compute the losses of both models, whose outputs are equal: frozen entries have their values in a forward."""
        batch = self.model.batch(self.numbers, self.dtype)
        self.reference.impose()
        (loss, output), (expected_loss, expected) = (
            self._loss(model, batch) for model in (self.model, self.reference.model)
        )
        assert not bool(differ(output, expected).any()), "the forward computes with other numbers"
        self._imposed()
        return loss, expected_loss

    def _imposed(self) -> None:
        for hold in self.reference.attached:
            hold.stray.clear()

    def _backward(self, *losses: Tensor) -> None:
        for loss in losses:
            loss.backward()
        self.reference.clean_gradients()
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                for hold in self.reference.attached:
                    hold.stray_gradients.pop(name, None)

    def _step(self, stepper: Stepper) -> None:
        stepper.face.step()
        self.reference.step(stepper.plain, guarded=stepper.active)
        self._stepped(stepper)

    def _stepped(self, stepper: Stepper) -> None:
        active = stepper.active
        for name in {name for name in self._names_of(stepper) if name is not None}:
            for hold in self.reference.attached:
                if name not in hold.pieces:
                    continue
                if hold not in active:
                    mark(hold.stray, name, counted=stepper.kind.is_counted)
                    continue
                if stepper.kind.decays_through_gradient or hold.stray_gradients.get(name) is False:
                    stepper.settled.discard((hold, name))
                if not stepper.compact:
                    hold.stray.pop(name, None)
                    if hold.stray_gradients.get(name):
                        del hold.stray_gradients[name]
                elif hold.stray.get(name):
                    del hold.stray[name]
        if stepper.compact and self.dtype is torch.bfloat16:
            self._take_over_roundings(stepper)

    def _take_over_roundings(self, stepper: Stepper) -> None:
        """Continue from the numbers of the frozen model: kernels for flat tensors round half precision differently."""
        for name, parameter in self.reference.parameters.items():
            if name in self._names_of(stepper):
                parameter.data.copy_(self.parameters[name].data)
        ours = copy.deepcopy(stepper.face.state_dict()["state"])
        for index, parameter in enumerate(stepped(stepper.plain)):
            if index in ours:
                stepper.plain.state[parameter] = ours[index]
        self.reference.impose()

    @rule(set_to_none=st.booleans(), of_model=st.booleans())
    def zero_gradients(self, set_to_none: bool, of_model: bool) -> None:
        if of_model:
            self.model.zero_grad(set_to_none)
            self.reference.model.zero_grad(set_to_none)
        else:
            for stepper in self.steppers:
                stepper.face.zero_grad(set_to_none)
                stepper.plain.zero_grad(set_to_none)
        for hold in self.reference.attached:
            for name in list(hold.stray_gradients):
                gradient = self.parameters[name].grad
                if gradient is None or not bool(gradient.any()):
                    del hold.stray_gradients[name]

    def _train(self) -> None:
        self.model.zero_grad()
        self.reference.model.zero_grad()
        self._backward(*self._forward())
        self._check_gradients()
        for stepper in self.steppers:
            self._step(stepper)

    @rule()
    def train(self) -> None:
        self._train()

    @event(pick=_picks, closure=st.booleans())
    def step(self, pick: int, closure: bool) -> None:
        if closure:
            self._step_with_a_closure(self._stepper(pick))
        else:
            self._step(self._stepper(pick))

    def _step_with_a_closure(self, stepper: Stepper) -> None:
        batch = self.model.batch(self.numbers, self.dtype)
        seen: list[Tensor] = []

        def closure(model: Net) -> Tensor:
            model.zero_grad()
            loss, output = self._loss(model, batch)
            loss.backward()
            seen.append(output)
            return loss

        for hold in self.reference.attached:
            hold.stray_gradients.clear()
        stepper.face.step(lambda: closure(self.model))  # type: ignore[arg-type,return-value]  # torch wants a float
        self.reference.impose()
        self.reference.step(stepper.plain, (), lambda: closure(self.reference.model), stepper.active)
        self._imposed()
        self._stepped(stepper)
        assert not bool(differ(*seen).any()), "the closure computes with other numbers"

    @event(losses=st.integers(1, 2), look_between=st.booleans(), interrupt=st.booleans())
    def accumulate(self, losses: int, look_between: bool, interrupt: bool) -> None:
        if interrupt:
            with pytest.raises(ForwardError):
                self.model(self.model.batch(self.numbers, self.dtype), interrupt=True)
        pairs = [self._forward() for _ in range(losses)]
        if look_between:
            with torch.no_grad():
                self._forward()
        for pair in pairs:
            self._backward(*pair)
            self._check_gradients()

    def _look(self) -> None:
        with torch.no_grad():
            self._forward()
        for hold in self.reference.attached:
            hold.handle.assert_frozen(guarded=False)

    # Freezing

    def _pieces(self, rules: list[Drawn]) -> tuple[list[Rule], dict[str, list[Piece]]]:
        spec: list[Rule] = []
        pieces: dict[str, list[Piece]] = {}
        for drawn in rules:
            name = self._name(drawn.target)
            rule, piece = drawn.resolve(name, self.parameters[name].detach())
            spec.append(rule)
            pieces.setdefault(name, []).append(piece)
        return spec, pieces

    def _conflicts(self, pieces: dict[str, list[Piece]]) -> bool:
        """Return whether some rules disagree, among themselves or with what is held, apart from rounding."""
        found: list[bool] = []
        for name, own in pieces.items():
            others = [piece for hold in self.reference.attached for piece in hold.pieces.get(name, ())]
            pairs = [(own[i], own[j]) for i in range(len(own)) for j in range(i)]
            across = [(mine, other) for mine in own for other in others]
            for first, second in [*pairs, *across]:
                answers = {first.disagrees(second, dtype) for dtype in DTYPES}
                assume(len(answers) == 1)
                found.extend(answers)
            found.extend(bool((m.frozen & o.frozen).any()) and m.keeps != o.keeps for m, o in across)
        return any(found)

    @precondition(lambda self: len(self.holds) < 3)
    @event(rules=_rules, guarded=st.sampled_from([True, True, True, False]))
    def freeze(self, rules: list[Drawn], guarded: bool) -> None:
        self._freeze(rules, guarded)

    def _freeze(self, rules: list[Drawn], guarded: bool) -> None:
        spec, pieces = self._pieces(rules)
        if self._conflicts(pieces):
            with pytest.raises(RuleConflictError, match="disagree"):
                freeze_entries(self.model, spec)
            return
        hold = Hold(freeze_entries(self.model, spec), pieces)
        hold.save()
        self.holds.append(hold)
        self.reference.impose()
        self.reference.clean_gradients()
        for stepper in self.steppers if guarded else ():
            self._guard(stepper, hold)

    @precondition(lambda self: self.holds)
    @event(pick=_picks, which=_picks, everything=_seldom, trained=st.booleans())
    def thaw(self, pick: int, which: int, everything: bool, trained: bool) -> None:
        hold = self._hold(pick)
        if trained:
            self._train()
        names = list(hold.pieces)
        name = names[which % len(names)]
        with self._releasing(hold, names if everything else [name]):
            hold.handle.thaw("*" if everything else name)
            for each in names if everything else [name]:
                del hold.pieces[each]
        if not hold.pieces:
            assert not hold.handle.attached
            self._forget(hold)

    def _forget(self, hold: Hold) -> None:
        self.holds.remove(hold)
        for stepper in self.steppers:
            if hold in stepper.guards:
                stepper.guards.remove(hold)

    @precondition(lambda self: self.holds)
    @event(pick=_picks, trained=st.booleans())
    def remove_or_attach(self, pick: int, trained: bool) -> None:
        hold = self._hold(pick)
        if trained:
            self._train()
        if hold.attached:
            self._remove(hold)
        else:
            self._attach(hold)

    def _remove(self, hold: Hold) -> None:
        with self._releasing(hold, list(hold.pieces)):
            hold.handle.remove()
            hold.attached = False

    def _attach(self, hold: Hold) -> None:
        if self._conflicts(hold.pieces):
            with pytest.raises(RuleConflictError, match="disagree"):
                hold.handle.attach()
            return
        hold.stray.clear()
        hold.stray_gradients.clear()
        hold.handle.attach()
        hold.attached = True
        self.reference.impose()
        self.reference.clean_gradients()
        self._settle(hold)

    @contextmanager
    def _releasing(self, hold: Hold, names: list[str]) -> Iterator[None]:
        """Check what a handle thaws: it continues from its values, with fresh moments."""
        before = {name: self.reference.frozen(name) for name in names} if hold.attached else {}
        values = {name: hold.values(name, self.parameters[name].dtype) for name in names}
        guarding = [stepper for stepper in self.steppers if hold in stepper.active]
        self._settle(hold)
        yield
        for name, frozen in before.items():
            released = frozen & ~self.reference.frozen(name)
            if name not in hold.stray:
                assert not bool(differ(self.parameters[name], values[name])[released].any()), f"{name} lost its values"
            for stepper in self.steppers:
                self._release_state(stepper, name, released, starts=stepper in guarding)
                if stepper in guarding and name in self._names_of(stepper):
                    self.reference.release(stepper.plain, name, released)
            take_over(self.reference.parameters[name], self.parameters[name], released)
        for name in names:
            hold.stray.pop(name, None)
            hold.stray_gradients.pop(name, None)

    def _release_state(self, stepper: Stepper, name: str, released: Tensor, *, starts: bool) -> None:
        theirs = stepper.plain.state.get(self.reference.parameters[name], {})
        for index, each in enumerate(self._names_of(stepper)):
            if each == name:
                for key, value in stepper.face.state_dict()["state"].get(index, {}).items():
                    if key not in COUNTERS:
                        if starts and key != AVERAGE:
                            assert bool((value[released] == stepper.kind.starts.get(key, 0.0)).all()), (
                                f"{key} of {name}"
                            )
                        theirs[key][released] = value[released]

    @contextmanager
    def _losing(self, names: list[str]) -> Iterator[None]:
        """Replace the parameters of these names: no handle holds the old ones, and optimizers still step them.

        The reference's old ones continue with the numbers of the frozen model's.
        """
        lost = [(self.parameters[name], self.reference.parameters[name], self.reference.frozen(name)) for name in names]
        for name, (_, _, frozen) in zip(names, lost, strict=True):
            for stepper in self.steppers:
                self._release_state(stepper, name, frozen, starts=False)
                if name in self._names_of(stepper):
                    self.reference.release(stepper.plain, name, self.reference.frozen(name, stepper.active))
        yield
        for ours, theirs, frozen in lost:
            take_over(theirs, ours, frozen)

    # Saving and loading

    def _save(self) -> None:
        saved = self.model.state_dict()
        self._imposed()
        expected = self.reference.model.state_dict()
        assert list(saved) == list(expected) == self.keys
        for name, value in saved.items():
            assert not bool(differ(value, expected[name]).any()), f"{name} was saved with other numbers"
        self.checkpoints.append({name: value.clone() for name, value in saved.items()})

    def _checkpoint(self, pick: int) -> dict[str, Tensor]:
        """Return one that was saved, or one of a stranger."""
        if pick and self.checkpoints:
            return self.checkpoints[pick % len(self.checkpoints)]
        checkpoint = {name: self._random(value.shape) for name, value in self.reference.model.state_dict().items()}
        if "embedding.weight" in checkpoint:
            checkpoint["head.weight"] = checkpoint["embedding.weight"]
        return checkpoint

    def _load(self, checkpoint: dict[str, Tensor], **how: bool) -> None:
        with self._losing(self.names if how.get("assign") else []):
            for model in (self.model, self.reference.model):
                model.load_state_dict({name: value.clone() for name, value in checkpoint.items()}, **how)
                model.tie()
        self.reference.follow_loading(self.names)
        self._imposed()
        for stepper in self.steppers:
            if stepper.kind is KINDS["asgd"]:  # its average has the former values until the next step
                stepper.settled.clear()

    @event(pick=_picks, how=st.sampled_from(["strict", "strict", "part", "assign", "assign"]), data=st.data())
    def load(self, pick: int, how: str, data: Any) -> None:
        checkpoint = self._checkpoint(pick)
        if how == "strict":
            self._load(checkpoint, strict=True)
        elif how == "part":
            self._load_all_but(self._held_name(pick), checkpoint)
        else:
            self._load_by_assigning(checkpoint)
            if not data.draw(_seldom):
                self._make_optimizers(data)

    def _load_by_assigning(self, checkpoint: dict[str, Tensor]) -> None:
        self._load(checkpoint, strict=True, assign=True)
        self.dtype = next(iter(checkpoint.values())).dtype
        for hold in self.reference.attached:
            hold.stray_gradients.clear()

    def _load_all_but(self, name: str, checkpoint: dict[str, Tensor]) -> None:
        sources = [p.source for h in self.reference.attached for ps in h.pieces.values() for p in ps if p.keeps]
        assume(all(source.dtype == self.dtype for source in sources if isinstance(source, Tensor)))
        left_out = ["embedding.weight", "head.weight"] if name == "embedding.weight" else [name]
        self._load({name: value for name, value in checkpoint.items() if name not in left_out}, strict=False)

    @event()
    def save_optimizers_and_handles(self) -> None:
        plain = [copy.deepcopy(stepper.face.state_dict()) for stepper in self.steppers]
        compact = [
            copy.deepcopy(face.state_dict(compact=True)) if isinstance(face, MaskedOptimizer) else state
            for face, state in zip((stepper.face for stepper in self.steppers), plain, strict=True)
        ]
        self.optimizer_states.append((self.generation, plain, compact))
        for hold in self.holds:
            hold.save()

    @event(pick=_picks, how=st.sampled_from(["saved", "saved_compact", "of_plain_ones"]))
    def load_optimizers(self, pick: int, how: str) -> None:
        plain = small = [copy.deepcopy(stepper.plain.state_dict()) for stepper in self.steppers]
        known = [state for state in self.optimizer_states if state[0] == self.generation]
        if known and how != "of_plain_ones":
            _, plain, small = known[pick % len(known)]
        for stepper, whole, flat in zip(self.steppers, plain, small, strict=True):
            # an optimizer that no handle guards now is a plain one, and takes plain states
            self._load_the_optimizer(stepper, flat if how == "saved_compact" and stepper.active else whole, whole)

    def _load_the_optimizer(self, stepper: Stepper, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        stepper.face.load_state_dict(copy.deepcopy(ours))
        stepper.plain.load_state_dict(copy.deepcopy(theirs))
        stepper.settled = {(hold, name) for hold in stepper.active for name in hold.pieces}

    @precondition(lambda self: self.holds)
    @event(pick=_picks, of=_picks)
    def load_a_handle(self, pick: int, of: int) -> None:
        hold = self._hold(pick)
        known = [(state, pieces) for state, pieces in hold.saved if list(pieces) == list(hold.pieces)]
        if not known:
            return
        state, pieces = known[of % len(known)]
        others = [other for other in self.reference.attached if other is not hold]
        assume(not any(set(other.pieces) & set(pieces) for other in others))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the state frees")  # after an optimizer's state was loaded
            hold.handle.load_state_dict(copy.deepcopy(state))
        before = {name: hold.frozen(name) for name in hold.pieces}
        hold.pieces = copied(pieces)
        for stepper in self.steppers if hold.attached else ():
            for name in before if hold in stepper.active else ():
                if name in self._names_of(stepper):
                    self.reference.release(stepper.plain, name, before[name] & ~hold.frozen(name))
        if hold.attached:
            hold.stray.clear()
            hold.stray_gradients.clear()
            self.reference.impose()
            self.reference.clean_gradients()
            self._settle(hold)

    # Copies

    @event(pickled=st.booleans())
    def go_on_with_a_copy(self, pickled: bool) -> None:
        for stepper in self.steppers:
            for handle in stepper.face.frozen if isinstance(stepper.face, MaskedOptimizer) else ():
                assume(not handle or set(handle) & set(self._names_of(stepper)))
        snapshot = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        ours = self.model, [stepper.face for stepper in self.steppers], [hold.handle for hold in self.holds]
        theirs = self.reference.model, [stepper.plain for stepper in self.steppers]
        self.left_behind = self.model, snapshot
        duplicate: Any = (lambda item: pickle.loads(pickle.dumps(item))) if pickled else copy.deepcopy
        self.model, faces, handles = duplicate(ours)
        self.reference.model, plains = duplicate(theirs)
        self.reference.released.clear()  # a copy has lost the hooks that knew of it
        for hold, handle in zip(self.holds, handles, strict=True):
            hold.handle = handle
            hold.stray_gradients.clear()  # torch leaves gradients behind
        for stepper, face, plain in zip(self.steppers, faces, plains, strict=True):
            stepper.face, stepper.plain = face, plain
            guards, stepper.guards = stepper.guards, []
            for hold in guards:  # those of a plain optimizer are left behind too
                self._guard(stepper, hold)
        assert len(FrozenEntries.of(self.model)) == len(list(self.reference.attached))

    # Disturbances

    @event(dtype=st.sampled_from(DTYPES))
    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.reference.model.to(dtype)
        self.dtype = dtype
        for hold in self.reference.attached:
            for name in hold.pieces:
                mark(hold.stray, name, counted=False)
        for stepper in self.steppers:
            self._load_the_optimizer(stepper, stepper.face.state_dict(), stepper.plain.state_dict())
        self.reference.impose()

    @rule(pick=_picks, how=st.sampled_from(["data", "storage"]), then=st.sampled_from(UNDO))
    def write_astray_unseen(self, pick: int, how: str, then: str) -> None:
        self._write_astray(self._held_name(pick), how, then)

    @rule(pick=_picks, then=st.sampled_from(UNDO))
    def write_astray(self, pick: int, then: str) -> None:
        self._write_astray(self._held_name(pick), "no_grad", then)

    def _write_astray(self, name: str, how: str, then: str) -> None:
        numbers = self._random(self.parameters[name].shape)
        for parameter in (self.parameters[name], self.reference.parameters[name]):
            _write(parameter, numbers, how)
        self._stray(name, counted=how == "no_grad")
        self.reference.impose()
        self.everything_holds()
        self._undo(then, name)

    def _undo(self, then: str, name: str) -> None:
        if then == "step":
            for stepper in self.steppers:
                self._step(stepper)
        elif then == "load_the_rest":
            self._load_all_but(name, self._checkpoint(0))
        elif then != "nothing":
            getattr(self, f"_{then}")()

    def _stray(self, name: str, *, counted: bool) -> None:
        for hold in self.reference.attached:
            if name in hold.pieces:
                mark(hold.stray, name, counted=counted)

    @event(pick=_picks, first=st.sampled_from(["look", "save", "ask", "freeze"]), data=st.data())
    def put_another_parameter(self, pick: int, first: str, data: Any) -> None:
        name = self._name(pick)
        numbers = self._random(self.parameters[name].shape)
        with self._losing([name]):
            for model in (self.model, self.reference.model):
                put_parameter(model, name, numbers.clone())
        self.reference.follow_loading([name])
        for hold in self.holds:
            hold.stray_gradients.pop(name, None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f"`{name}` was replaced")
            self._meet(name, first, data)
        if not data.draw(_seldom):
            self._make_optimizers(data)

    def _meet(self, name: str, first: str, data: Any) -> None:
        """Make the library notice a parameter that was replaced."""
        if first == "freeze" and len(self.holds) < 3:
            self._freeze(data.draw(_rules), guarded=False)
        elif first in ("look", "save"):
            getattr(self, f"_{first}")()
        for hold in self.reference.attached:
            hold.handle.violations()
            if name in hold.pieces:
                hold.stray.pop(name, None)

    @rule()
    def call_with_anothers_parameters(self) -> None:
        stranger = copy.deepcopy(self.reference.model)
        for parameter in stranger.parameters():
            parameter.data.copy_(self._random(parameter.shape))
        given, batch = parameters_by_name(stranger), self.model.batch(self.numbers, self.dtype)
        before = {name: parameter.detach().clone() for name, parameter in given.items()}
        output = torch.func.functional_call(self.model, dict(given), (batch,))
        assert not bool(differ(output, stranger(batch)).any()), "the call computes with other numbers"
        for name, parameter in given.items():
            assert not bool(differ(parameter, before[name]).any()), f"another's {name} was written to"
            assert not parameter._post_accumulate_grad_hooks, f"another's {name} is hooked"  # type: ignore[attr-defined]
        self.everything_holds()

    @rule(name=st.sampled_from(["mix", "head"]), then=st.sampled_from(["nothing", "train"]))
    def replace_a_module_for_a_while(self, name: str, then: str) -> None:
        owner = getattr(self.model, name)
        setattr(self.model, name, copy.deepcopy(owner))
        for stepper in self.steppers:
            held = [each for hold in stepper.active for frozen in hold.handle.values() for each in frozen.names]
            if any(each.startswith(f"{name}.") for each in held):
                with pytest.raises(ParameterChangedError, match="no longer in the model"):
                    stepper.face.step()
        setattr(self.model, name, owner)
        self.everything_holds()
        if then == "train":
            self._train()

    @precondition(lambda self: EXAMPLES > 0 and hasattr(torch.compiler, "is_exporting"))
    @rule()
    def export(self) -> None:
        program = torch.export.export(self.model, (self.model.batch(self.numbers, self.dtype),))
        self._imposed()
        for name, value in program.state_dict.items():
            expected = self.reference.model.state_dict()[name]
            assert not bool(differ(value, expected).any()), f"{name} was exported with other numbers"
        self.everything_holds()

    @rule(
        pick=_picks, how=st.sampled_from(["new", "no_grad", "data"]), then=st.sampled_from(["step", "step", "nothing"])
    )
    def set_a_gradient(self, pick: int, how: str, then: str) -> None:
        name = self._held_name(pick)
        numbers = self._random(self.parameters[name].shape)
        how = "new" if self.parameters[name].grad is None else how
        for parameter in (self.parameters[name], self.reference.parameters[name]):
            if how == "new":
                parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(numbers)
            else:
                _write(parameter.grad, numbers, how)
        for hold in self.reference.attached:
            if name in hold.pieces:
                mark(hold.stray_gradients, name, counted=how != "data")
        self.everything_holds()
        self._undo(then, name)

    @event(pick=_picks)
    def turn_requires_grad(self, pick: int) -> None:
        name = self._name(pick)
        if name != "mix.bias":  # something must train
            for parameter in (self.parameters[name], self.reference.parameters[name]):
                parameter.requires_grad_(not parameter.requires_grad)

    # Invariants

    @invariant()
    def everything_holds(self) -> None:
        self._check_parameters()
        self._check_gradients()
        free = {name: ~self.reference.frozen(name) for name in self.names}
        for stepper in self.steppers:
            self._check_state(stepper, free)
        for hold in self.holds:
            self._check_handle(hold)
        if self.left_behind is not None:
            model, snapshot = self.left_behind
            for name, parameter in parameters_by_name(model).items():
                assert not bool(differ(parameter, snapshot[name]).any()), f"{name} of the original was written to"

    def _check_parameters(self) -> None:
        assert list(self.parameters) == self.names
        reference = self.reference.parameters
        for name, parameter in self.parameters.items():
            theirs = reference[name]
            free = ~self.reference.frozen(name)
            assert not bool(differ(parameter, theirs)[free].any()), f"free entries of {name}"
            for hold in self.reference.attached:
                if name in hold.pieces and name not in hold.stray:
                    assert not hold.drifted(name, parameter), f"frozen entries of {name}"

    def _check_gradients(self) -> None:
        reference = self.reference.parameters
        for name, parameter in self.parameters.items():
            ours, theirs = parameter.grad, reference[name].grad
            assert (ours is None) == (theirs is None), f"gradient of {name}"
            if ours is None or theirs is None:
                continue
            free = ~self.reference.frozen(name)
            assert not bool(differ(ours, theirs)[free].any()), f"gradient at free entries of {name}"
            for hold in self.reference.attached:
                if name in hold.pieces and name not in hold.stray_gradients:
                    dirty = differ(ours, torch.zeros_like(ours))[hold.frozen(name)]
                    assert not bool(dirty.any()), f"gradient at frozen entries of {name}"

    def _check_state(self, stepper: Stepper, free: dict[str, Tensor]) -> None:
        ours, theirs = stepper.face.state_dict()["state"], stepper.plain.state_dict()["state"]
        for index, name in enumerate(self._names_of(stepper)):
            own, expected = ours.get(index, {}), theirs.get(index, {})
            assert list(own) == list(expected), f"state of {name}"
            for key, value in own.items():
                differs = differ(torch.as_tensor(value), torch.as_tensor(expected[key]))
                trained = differs if name is None or key in COUNTERS else differs[free[name]]
                assert not bool(trained.any()), f"{key} of {name}"
                if name is not None and key not in COUNTERS:
                    self._check_frozen_state(stepper, name, key, value)

    def _check_frozen_state(self, stepper: Stepper, name: str, key: str, value: Tensor) -> None:
        what = f"{key} of {name}"
        for hold in stepper.active:
            if name in hold.pieces and key != AVERAGE and (stepper.compact or (hold, name) in stepper.settled):
                start = torch.full_like(value, stepper.kind.starts.get(key, 0.0))
                assert not bool((value != start)[hold.frozen(name)].any()), f"{what} at frozen entries"
            elif name in hold.pieces and key == AVERAGE and (hold, name) in stepper.settled and not stepper.compact:
                assert not hold.drifted(name, value), f"{what} at frozen entries"

    def _check_handle(self, hold: Hold) -> None:
        assert hold.handle.attached == hold.attached
        assert [hold.handle[name].name for name in hold.pieces] == list(hold.handle)
        parameters = self.parameters
        drifted = {name for name in hold.pieces if hold.drifted(name, parameters[name])}
        assert {violation.name for violation in hold.handle.violations()} == drifted
        for name in hold.pieces:
            assert bool((hold.handle[name].frozen == hold.frozen(name)).all())


def _write(tensor: Any, numbers: Tensor, how: str) -> None:
    if how == "data":
        tensor.data.copy_(numbers)
    elif how == "storage":
        tensor.data = torch.empty_like(tensor).copy_(numbers)
    else:
        with torch.no_grad():
            tensor.add_(numbers)


@held_twice
@pytest.mark.parametrize("number", range(5))
def test_whatever_happens_frozen_entries_hold_and_free_ones_train_like_a_plain_models(number: int) -> None:
    """In several short runs, since within one Hypothesis likes to vary what it has drawn before."""
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Lives if EXAMPLES else seed(number)(Lives),
        settings=settings(
            max_examples=EXAMPLES or 15,
            stateful_step_count=25,
            deadline=None,
            database=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        ),
    )
