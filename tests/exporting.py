"""Whether this release of torch can export a frozen model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

needs_to_tell_exports = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="before torch 2.7 nothing tells that a model is exported"
)


def skip_unless_exported(strict: bool) -> None:
    """Skip a test if torch itself cannot export a model that has hooks, as 2.9 cannot in strict mode."""
    if not _exports_hooked_models(strict):
        pytest.skip("this torch exports no model with hooks on it and on a layer of it, whatever they do")


@cache
def _exports_hooked_models(strict: bool) -> bool:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    for module in (model, model[0]):
        module.register_forward_hook(_pass_by)
        module.register_forward_pre_hook(_pass_by)
    try:
        torch.export.export(model, (torch.zeros(2, 3),), strict=strict)
    except torch._dynamo.exc.UserError:
        return False
    return True


def _pass_by(*arguments: Any) -> None:
    """Be a hook that does nothing."""
