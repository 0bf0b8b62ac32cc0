"""`freeze_entries` with every form of a spec, and the handle read like a dict and as a context manager."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from freezehooks import (
    FreezeError,
    FrozenEntries,
    FrozenParameter,
    RegionError,
    Rule,
    Violation,
    center,
    cross,
    entries,
    freeze_entries,
    keep,
    tied,
    train_only,
    zeros,
)


def half(parameter: Tensor) -> Tensor:
    return parameter > parameter.median()


def every_form_of_a_spec(model: nn.Module, mask: Tensor) -> None:
    assert_type(freeze_entries(model, "conv.weight[center] = 0"), FrozenEntries)
    assert_type(freeze_entries(model, Rule("conv.weight", center | ~cross, 0.5)), FrozenEntries)
    assert_type(freeze_entries(model, {"conv.weight": entries[:, :, 1, 1]}), FrozenEntries)
    assert_type(freeze_entries(model, {"conv.weight": (mask, 0), "head": (half, keep)}), FrozenEntries)
    assert_type(freeze_entries(model, ["conv.weight[0]", Rule("head", zeros), {"bias": mask}]), FrozenEntries)
    assert_type(freeze_entries(model, (rule for rule in [Rule("depthwise", value=tied(0))])), FrozenEntries)
    assert_type(freeze_entries(model, []), FrozenEntries)


def models_and_bare_tensors(conv: nn.Conv2d, tensors: dict[str, Tensor], named: Mapping[str, nn.Parameter]) -> None:
    assert_type(freeze_entries(conv, "weight"), FrozenEntries)
    assert_type(freeze_entries(tensors, "w[0] = 1"), FrozenEntries)
    assert_type(freeze_entries(conv, "weight", replace=True), FrozenEntries)
    assert_type(freeze_entries(named, "w[0] = 1", state=torch.load("frozen.pt", weights_only=True)), FrozenEntries)


def the_handle_reads_like_a_dict(frozen: FrozenEntries) -> Mapping[str, FrozenParameter]:
    assert_type(frozen["conv.weight"], FrozenParameter)
    assert_type(frozen.get("conv.weight"), FrozenParameter | None)
    assert_type(iter(frozen), Iterator[str])
    assert_type(len(frozen), int)
    assert_type(list(frozen.items()), list[tuple[str, FrozenParameter]])
    assert_type(list(frozen.keys()), list[str])
    assert_type([part.frozen for part in frozen.values()], list[Tensor])
    assert_type("conv.weight" in frozen, bool)
    return dict(frozen)


def the_handle_is_no_mapping(frozen: FrozenEntries) -> Mapping[str, FrozenParameter]:
    return frozen  # type: ignore[return-value]


def what_a_part_says(part: FrozenParameter) -> None:
    assert_type(part.values, Tensor)
    assert_type(part.rules, tuple[Rule, ...])
    assert_type(part.frozen_count + part.free_count, int)
    assert_type(part.nbytes, int)
    assert_type(part.name, str)


def what_the_handle_says(frozen: FrozenEntries, copy: nn.Module) -> None:
    assert_type(frozen.violations(), tuple[Violation, ...])
    assert_type(frozen.rules, tuple[Rule, ...])
    assert_type(frozen.attached, bool)
    assert_type(frozen.attach(), FrozenEntries)
    frozen.thaw("wte[:100]")
    frozen.thaw(Rule("wte", zeros))
    assert_type(frozen.state_dict(), dict[str, Any])
    assert_type(train_only(copy, {"weight": "5:"}, state=frozen.state_dict()), FrozenEntries)
    assert_type(FrozenEntries.of(copy), tuple[FrozenEntries, ...])


def a_block_that_holds(model: nn.Module) -> int:
    with freeze_entries(model, "conv.weight = 0") as frozen:
        assert_type(frozen, FrozenEntries)
        frozen.assert_frozen()
    return frozen.frozen_count  # reached: the block swallows no exception


def errors_are_the_fitting_builtins_too(error: RegionError) -> tuple[FreezeError, ValueError]:
    return error, error


def wrong_specs_and_models(model: nn.Module, conv: nn.Conv2d, frozen: FrozenEntries) -> None:
    freeze_entries(model)  # type: ignore[call-arg]
    train_only(model)  # type: ignore[call-arg]
    train_only(model, "weight", replace=True)  # type: ignore[call-arg]
    freeze_entries(model, None)  # type: ignore[arg-type]
    freeze_entries(model, 0)  # type: ignore[arg-type]
    freeze_entries(model.parameters(), "weight")  # type: ignore[arg-type]
    freeze_entries({"w": 1.0}, "w")  # type: ignore[dict-item]
    freeze_entries(conv.weight, "weight")  # type: ignore[arg-type]
    freeze_entries(model, "weight", {})  # type: ignore[call-arg]
    freeze_entries(model, "weight", state=Path("frozen.pt"))  # type: ignore[arg-type]
    frozen["weight"] = frozen["bias"]  # type: ignore[index]
    frozen[0]  # type: ignore[index]
    frozen.thaw(0)  # type: ignore[arg-type]
    frozen.attached = True  # type: ignore[misc]
