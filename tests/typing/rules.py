"""Rules and regions, read from text and written in Python."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import assert_type

from freezehooks import (
    Region,
    Rule,
    border,
    center,
    cross,
    diagonal,
    entries,
    keep,
    nm,
    parse_region,
    parse_rule,
    smallest,
    tied,
    tril,
    triu,
    zeros,
)


def read_from_text() -> tuple[Rule, Region]:
    assert_type(parse_rule("conv.weight[center] = 0"), Rule)
    assert_type(parse_region("~center | 0"), Region)
    assert_type(str(parse_rule("bias")), str)
    return parse_rule("bias"), parse_region("zeros")


def joined(mask: Tensor) -> list[Region]:
    return [
        entries[0, ..., ::2] & ~center,
        entries[[0, 2]] | border,
        parse_region("center") | cross(3),
        ~(zeros & smallest(0.5)),
        nm(2, 4) | diagonal(1) | triu(1) | tril(-1),
    ]


def written_in_python(mask: Tensor) -> list[Rule]:
    return [
        Rule("weight"),
        Rule("weight", center, 0),
        Rule("weight", mask, mask.float()),
        Rule("weight", lambda weight: weight > 0, keep),
        Rule("weight", value=tied(0, start="mean")),
    ]


def wrong_rules(rule: Rule) -> None:
    Rule()  # type: ignore[call-arg]
    Rule("weight", center, 0, 0)  # type: ignore[call-arg]
    parse_rule(rule)  # type: ignore[arg-type]
    parse_region(center)  # type: ignore[arg-type]
    smallest("half")  # type: ignore[arg-type]
    nm(2)  # type: ignore[call-arg]
    tied("0")  # type: ignore[arg-type]
    tied(0, "mean")  # type: ignore[call-arg, arg-type]
    rule.target = "bias"  # type: ignore[misc]
    text: str = parse_rule("bias")  # type: ignore[assignment]
    del text
