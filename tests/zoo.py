"""A zoo of awkward models: what is frozen in each, by rules and, independently of the library, by plain indexing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from freezehooks import Rule, center, entries

from .draws import rand


@dataclass(frozen=True)
class Held:
    """The entries of one parameter that must hold, and a tensor of the parameter's shape with their values."""

    frozen: Tensor
    values: Tensor


@dataclass(frozen=True)
class Animal:
    """A model, a batch for it, a spec, and the meaning of that spec."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Any, ...]]
    spec: Any
    indices: dict[str, list[tuple[Any, Any]]]
    """For each parameter: an index of the tensor, and the value there (None: what it holds now)."""

    dtype: torch.dtype = field(default=torch.float32)

    def model(self) -> nn.Module:
        return self.build()

    def held(self, model: nn.Module) -> dict[str, Held]:
        """Compute from the unfrozen model what must hold from the moment of freezing on."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        held = {}
        for name, wanted in self.indices.items():
            values = parameters[name].detach().clone()
            mask = torch.zeros_like(values, dtype=torch.bool)
            for index, value in wanted:
                mask[index] = True
                values[index] = values[index] if value is None else torch.as_tensor(value, dtype=values.dtype)
            held[name] = Held(mask, values)
        return held

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        output = model(*batch)
        # not a plain sum of squares: every output must have a different gradient
        weights = torch.linspace(0.5, 1.5, output.numel(), device=output.device, dtype=output.dtype)
        return torch.sum((output.flatten() - 0.3) ** 2 * weights)


class CalledTwice(nn.Module):
    """Calls one layer twice in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(torch.tanh(self.layer(x))))


class TiedLanguageModel(nn.Module):
    """Embedding and head share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.head(torch.tanh(self.embedding(tokens))))


class SelfAttention(nn.Module):
    """Uses `out_proj` without ever calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.attention(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    """Keeps its parameters in a second, flat list."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.lstm(x)[0])


class BareParameter(nn.Module):
    """Owns a parameter of no dimensions beside a matrix, both at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.matrix = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix) * self.scale


def _images(channels: int, *size: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(2, channels, *size),)


def _scattered(shape: tuple[int, ...], fraction: float, seed: int) -> Tensor:
    return rand(*shape, seed=seed) < fraction


_DENSE = _scattered((16, 12), 0.5, seed=1)
_FEW = _scattered((24, 20), 0.03, seed=2)
_CROSS = torch.tensor([[False, True, False], [True, True, True], [False, True, False]])
_TARGETS = torch.arange(24.0).view(4, 2, 3) / 7

ZOO = [
    Animal(
        "conv2d_center",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=5, dilation=5)),
        _images(2, 6, 6),
        "2.weight[center] = 0",
        {"2.weight": [((..., 1, 1), 0.0)]},
    ),
    Animal(
        "one_weight_at_1",
        lambda: nn.Conv2d(3, 1, 3),
        _images(3, 5, 5),
        "weight[0, 1, 2, 1] = 1",
        {"weight": [((0, 1, 2, 1), 1.0)]},
    ),
    Animal(
        "conv1d_bias_and_tensor_values",
        lambda: nn.Conv1d(2, 4, 3),
        _images(2, 7),
        [Rule("weight", entries[...], _TARGETS), "bias[1:] = 0.1"],
        {"weight": [(..., _TARGETS)], "bias": [(slice(1, None), 0.1)]},
    ),
    Animal(
        "conv3d_grouped_cross",
        lambda: nn.Conv3d(4, 4, 3, groups=2),
        _images(4, 4, 4, 4),
        "weight[~cross] = 0",
        {"weight": [(~_CROSS.expand(4, 2, 3, 3, 3), 0.0)]},
    ),
    Animal(
        "channels_last",
        lambda: nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]  # torch's stubs
        _images(3, 6, 6),
        [{"weight": (_scattered((8, 3, 3, 3), 0.4, seed=3), -0.5)}],
        {"weight": [(_scattered((8, 3, 3, 3), 0.4, seed=3), -0.5)]},
    ),
    Animal(
        "dense_zeros",
        lambda: nn.Linear(12, 16),
        lambda: (torch.randn(3, 12),),
        {"weight": (_DENSE, 0)},
        {"weight": [(_DENSE, 0.0)]},
    ),
    Animal(
        "dense_keep_and_function",
        lambda: nn.Linear(12, 16),
        lambda: (torch.randn(3, 12),),
        {"weight": lambda parameter: _DENSE.to(parameter.device)},
        {"weight": [(_DENSE, None)]},
    ),
    Animal(
        "few_at_minus_zero",
        lambda: nn.Linear(20, 24),
        lambda: (torch.randn(3, 20),),
        {"weight": (_FEW, -0.0)},
        {"weight": [(_FEW, -0.0)]},
    ),
    Animal(
        "several_rules",
        lambda: nn.Linear(6, 5),
        lambda: (torch.randn(3, 6),),
        "weight[0] = 0.25\nweight[1:3, ::2]\nweight[[3, 4], 1] = -2",
        {"weight": [(0, 0.25), ((slice(1, 3), slice(None, None, 2)), None), (([3, 4], 1), -2.0)]},
    ),
    Animal(
        "matrix_alone",
        lambda: nn.Linear(12, 16, bias=False),
        lambda: (torch.randn(3, 12),),
        {"weight": (_DENSE, 0.5)},
        {"weight": [(_DENSE, 0.5)]},
    ),
    Animal(
        "embedding_old_rows",
        lambda: nn.Sequential(nn.Embedding(10, 3), nn.Linear(3, 2)),
        lambda: (torch.randint(10, (4, 5)),),
        "0[~7:]",
        {"0.weight": [(slice(7), None)]},
    ),
    Animal(
        "tied_second_name",
        TiedLanguageModel,
        lambda: (torch.randint(9, (3, 4)),),
        "head[2:5] = 0.5",
        {"head.weight": [(slice(2, 5), 0.5)], "embedding.weight": [(slice(2, 5), 0.5)]},
    ),
    Animal(
        "tied_both_names",
        TiedLanguageModel,
        lambda: (torch.randint(9, (3, 4)),),
        "embedding[0]\nhead[1] = 0",
        {"embedding.weight": [(0, None), (1, 0.0)]},
    ),
    Animal(
        "attention_out_proj",
        SelfAttention,
        lambda: (torch.randn(2, 3, 4),),
        "attention.out_proj[triu(1)] = 0",
        {"attention.out_proj.weight": [(torch.ones(4, 4, dtype=torch.bool).triu(1), 0.0)]},
    ),
    Animal(
        "lstm_recurrent_weight",
        Recurrent,
        lambda: (torch.randn(2, 3, 3),),
        "lstm.weight_hh_l0[:4] = 0\nlstm.bias_ih_l0[4:8] = 1",
        {"lstm.weight_hh_l0": [(slice(4), 0.0)], "lstm.bias_ih_l0": [(slice(4, 8), 1.0)]},
    ),
    Animal(
        "called_twice",
        CalledTwice,
        lambda: (torch.randn(3, 4),),
        "layer[diagonal] = 1",
        {"layer.weight": [((range(4), range(4)), 1.0)]},
    ),
    Animal(
        "norms",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.LayerNorm(6)),
        lambda: (torch.randn(5, 4),),
        "1.weight = 1\n2.bias[::3] = -1",
        {"1.weight": [(..., 1.0)], "2.bias": [(slice(None, None, 3), -1.0)]},
    ),
    Animal(
        "no_dimensions",
        BareParameter,
        lambda: (torch.randn(4, 5),),
        "scale = 0.3\nmatrix[:, -1]",
        {"scale": [((), 0.3)], "matrix": [((slice(None), -1), None)]},
    ),
    Animal(
        "transposed_conv_border",
        lambda: nn.ConvTranspose2d(3, 2, 3),
        _images(3, 4, 4),
        Rule("weight", ~center, 0.125),
        {"weight": [(torch.tensor([[True, True, True], [True, False, True], [True] * 3]).expand(3, 2, 3, 3), 0.125)]},
    ),
]

IDS = [animal.name for animal in ZOO]
