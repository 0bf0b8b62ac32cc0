"""GPT-2, written out so that figures do not depend on a library of models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of a GPT-2; the defaults are those of the model with 124 million parameters.

    Attributes:
        vocabulary: How many tokens there are.
        context: The longest sequence.
        width: Features of a token.
        heads: Attention heads, among which the width is divided.
        layers: How many blocks.
    """

    vocabulary: int = 50_257
    context: int = 1024
    width: int = 768
    heads: int = 12
    layers: int = 12


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Let every token attend to those before it."""
        query, key, value = (self._split(part) for part in self.c_attn(tokens).chunk(3, dim=-1))
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.c_proj(seen.transpose(1, 2).flatten(2))
        return output

    def _split(self, features: Tensor) -> Tensor:
        return torch.unflatten(features, -1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Attention and a perceptron, each with a layer norm before it and a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Add the outputs of attention and perceptron to the tokens."""
        tokens = tokens + self.attn(self.ln_1(tokens))
        output: Tensor = tokens + self.mlp(self.ln_2(tokens))
        return output


class GPT2(nn.Module):
    """GPT-2 without dropout; embedding and head share their weight."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width = architecture.width
        self.wte = nn.Embedding(architecture.vocabulary, width)
        self.wpe = nn.Embedding(architecture.context, width)
        self.h = nn.Sequential(*(Block(width, architecture.heads) for _ in range(architecture.layers)))
        self.ln_f = nn.LayerNorm(width)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of each next token, (batch, length, vocabulary)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        features = self.h(self.wte(tokens) + self.wpe(positions))
        return functional.linear(self.ln_f(features), self.wte.weight)
