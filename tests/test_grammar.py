"""Rules and their text convert to each other, and text that is not a rule is rejected with the column."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freezehooks import (
    FrozenValueError,
    Region,
    Rule,
    RuleSyntaxError,
    SpecError,
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
    tril,
    triu,
    zeros,
)
from freezehooks._errors import shortened
from freezehooks._rules.parser import parse_value
from freezehooks._rules.rule import Keep
from freezehooks._rules.spec import rules_of

from .strategies import regions, rule_like_texts, rules, targets, values

many = settings(max_examples=200, deadline=None)

# --------------------------------------------------------------------------------------------------------------------
# Round trips


@given(rules())
@many
def test_a_rule_read_from_its_own_text_is_the_same_rule(rule: Rule) -> None:
    assert parse_rule(str(rule)) == rule


@given(regions())
@many
def test_a_region_read_from_its_own_text_is_the_same_region(region: Region) -> None:
    assert parse_region(str(region)) == region


@given(values())
@many
def test_a_value_survives_its_text_to_the_last_bit(value: Keep | float) -> None:
    rule = Rule("w", center, value)
    found = parse_rule(str(rule)).value
    assert repr(found) == repr(rule.value)


@given(st.lists(rules(), max_size=4))
@many
def test_rules_joined_by_line_breaks_are_read_in_their_order(listed: list[Rule]) -> None:
    assert rules_of("\n".join(map(str, listed))) == tuple(listed)


@pytest.mark.parametrize("text", ["w = -0.0", "w = -0", "w=-.0", "w[center] = -0e0"])
def test_minus_zero_keeps_its_sign(text: str) -> None:
    rule = parse_rule(text)
    again = parse_rule(str(rule)).value
    assert rule.value == 0
    assert isinstance(again, float)
    assert math.copysign(1, again) == -1


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Rule("w"), "w = keep"),
        (Rule("w", ...), "w = keep"),
        (Rule("w", entries[()]), "w = keep"),
        (Rule("w", entries[:, ::2, 1:, -1:5:-1], 0), "w[:, ::2, 1:, -1:5:-1] = 0"),
        (Rule("w", entries[..., [0, -2]], 0.5), "w[..., [0, -2]] = 0.5"),
        (Rule("w", entries[range(2)], -0.0), "w[[0, 1]] = -0"),
        (Rule("w", ~entries[0, 1] | center & ~border, 1), "w[~(0, 1) | center & ~border] = 1"),
        (Rule("w", ~(center | border), 1), "w[~(center | border)] = 1"),
        (Rule("w", center & (border & zeros), 1), "w[center & (border & zeros)] = 1"),
        (Rule("w", cross(3)), "w[cross(3)] = keep"),
        (Rule("w", cross(2) | triu(0) | diagonal(-1)), "w[cross | triu | diagonal(-1)] = keep"),
        (Rule("w", smallest(0.5) | nm(2, 4), 1e-30), "w[smallest(0.5) | nm(2, 4)] = 1e-30"),
        (
            Rule("w", torch.ones(2, 3, dtype=torch.bool), torch.ones(6)),
            "w[<tensor of shape (2, 3)>] = <tensor of shape (6,)>",
        ),
        (Rule("w", torch.isinf), "w[<isinf>] = keep"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_rule_prints_as_people_write_it(rule: Rule, text: str) -> None:
    assert str(rule) == text


# --------------------------------------------------------------------------------------------------------------------
# What text means


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("cnn4_dialation.weight[:, :, 1, 1] = 0", Rule("cnn4_dialation.weight", entries[:, :, 1, 1], 0)),
        ("conv.weight[0, 1, 2, 1] = 1", Rule("conv.weight", entries[0, 1, 2, 1], 1)),
        ("features.*.weight[center] = 0", Rule("features.*.weight", center, 0)),
        ("conv3d[~cross] = 0", Rule("conv3d", ~cross, 0)),
        ("wte[~50257:]", Rule("wte", ~entries[50257:], keep)),
        ("head[zeros]", Rule("head", zeros, keep)),
        ("decoder[triu(1)] = 0", Rule("decoder", triu(1), 0)),
        ("bn.weight = 1", Rule("bn.weight", ..., 1)),
        ("conv.weight[12] = 0", Rule("conv.weight", entries[12], 0)),
        ("w", Rule("w")),
        ("w = keep", Rule("w")),
        ("w[...]=keep", Rule("w")),
        ("  w [ center ]  =  + 0.5 ", Rule("w", center, 0.5)),
        ("w=-1e-3", Rule("w", ..., -0.001)),
        ("w[[0, 2,], -1:] = 2.", Rule("w", entries[[0, 2], -1:], 2)),
        ("w[0,]", Rule("w", entries[0])),
        ("w[(0, 1)]", Rule("w", entries[0, 1])),
        ("w[(((center)))]", Rule("w", center)),
        ("w[[]]", Rule("w", entries[[]])),
        ("w[~~center]", Rule("w", ~~center)),
        ("w[center | border & zeros]", Rule("w", center | (border & zeros))),
        ("w[(center | border) & zeros]", Rule("w", (center | border) & zeros)),
        ("w[center | border | zeros]", Rule("w", (center | border) | zeros)),
        ("w[~center & border]", Rule("w", (~center) & border)),
        ("w[(0, 1) | ~(2, 3)]", Rule("w", entries[0, 1] | ~entries[2, 3])),
        ("w[cross(3) | cross | cross()]", Rule("w", cross(3) | cross | cross)),
        ("w[tril(-1)] = 0", Rule("w", tril(-1), 0)),
        ("w[diagonal] = 1", Rule("w", diagonal(0), 1)),
        ("w[smallest(0.5)] = 0", Rule("w", smallest(0.5), 0)),
        ("w[nm(2, 4)] = 0", Rule("w", nm(2, 4), 0)),
        ("w[nm(2, 4,)] = 0", Rule("w", nm(2, 4), 0)),
    ],
    ids=lambda part: part.strip() if isinstance(part, str) else "",
)
def test_text_means_the_rule_that_python_says(text: str, rule: Rule) -> None:
    assert parse_rule(text) == rule


@given(targets(), st.sampled_from(["", " ", "\t "]))
@many
def test_white_space_between_the_parts_means_nothing(target: str, space: str) -> None:
    text = f"{space}{target}{space}[{space}0{space},{space}-1{space}:{space}]{space}={space}-{space}2{space}"
    assert parse_rule(text) == Rule(target, entries[0, -1:], -2)


# --------------------------------------------------------------------------------------------------------------------
# Text that is not a rule


@given(st.text(max_size=40) | rule_like_texts())
@settings(max_examples=500, deadline=None)
def test_random_text_raises_nothing_but_the_rule_error(text: str) -> None:
    for parse in (parse_rule, parse_region, parse_value, rules_of):
        try:
            parse(text)
        except RuleSyntaxError as error:
            column = re.search(r": column (\d+): ", str(error))
            assert column is not None
            assert 1 <= int(column.group(1)) <= len(text) + 1


@pytest.mark.parametrize("opening", ["~", "(", "0|", "0&", "(~", "["])
def test_deep_nesting_is_the_rule_error_too(opening: str) -> None:
    with pytest.raises(RuleSyntaxError, match=r"column \d+"):
        parse_rule(f"w[{opening * 100_000}")


_AMBIGUOUS = "put an index with commas into parentheses, as in `~(0, 1)` or `(0, 1) | (2, 3)`"

_NO_RULES = [
    ("w[center]=symmetric", "column 11: `symmetric` is for a whole tensor, found a region; leave the brackets out"),
    ("w[0] = tied(0)", "column 8: `tied(0)` is for a whole tensor, found a region; leave the brackets out"),
    ("", "column 1: expected a parameter's name"),
    ("[0] = 1", "column 1: expected a parameter's name"),
    ("= 1", "column 1: expected a parameter's name"),
    ("w[0 = 1", "column 5: expected `]` to close the region, found `=`"),
    ("w[center", "column 9: expected `]` to close the region, found the end"),
    ("w[0 1]", "column 5: expected `]` to close the region, found `1`"),
    ("w[0))", "column 4: expected `]` to close the region, found `)`"),
    ("w[(0]", "column 5: expected `)` to close the parenthesis, found `]`"),
    ("w[cross(3]", "column 10: expected `)` to close the pattern's arguments, found `]`"),
    ("w[nm(2 4)]", "column 8: expected `)` to close the pattern's arguments, found `4`"),
    ("w[]", "column 3: expected an index (integer, slice, `...`, list of integers) or a pattern, found `]`"),
    ("w[~]", "column 4: expected an index (integer, slice, `...`, list of integers) or a pattern, found `]`"),
    ("w[0, ~1]", "column 6: expected an index (integer, slice, `...`, list of integers) or a pattern, found `~`"),
    ("w[0, center]",
     "column 6: expected an index (integer, slice, `...`, list of integers) or a pattern, found `center`"),
    ("w[1.5]", "column 3: expected an index (integer, slice, `...`, list of integers) or a pattern, found `1.5`"),
    ("w[[0, x]]", "column 7: expected an integer, found `x`"),
    ("w[[0:2]]", "column 5: expected `]` to close the list, found `:`"),
    ("w[[0, 1", "column 8: expected `]` to close the list, found the end"),
    ("w[smallest(x)]", "column 12: unknown pattern `x`; use one of center"),
    ("w = x", "column 5: expected a value: a number, a list of numbers, `keep` or `tied(dim)`, found `x`"),
    ("w =", "column 4: expected a value: a number, a list of numbers, `keep` or `tied(dim)`, found the end"),
    ("w = nan",
     "column 5: expected a value: a number, a list of numbers, `keep` or `tied(dim)`, found `nan`; give a finite n"),
    ("w = -keep", "column 6: expected a value: a number, a list of numbers, `keep` or `tied(dim)`, found `keep`"),
    ("w = 1 2", "column 7: expected the end of the rule, found `2`"),
    ("w x", "column 3: expected the end of the rule, found `x`"),
    ("w[0][1]",
     "column 5: expected the end of the rule, found `[`; write the whole region in one pair of brackets, as in `[0"),
    ("w = 0, v = 1",
     "column 6: expected the end of the rule, found `,`; write one rule a line, or give a list of rules"),
    ("w = 0; v = 1", "column 6: ';' has no meaning here; write one rule a line, or give a list of rules"),
    ("w == 0",
     "column 4: expected a value: a number, a list of numbers, `keep` or `tied(dim)`, found `=`; write one `=`"),
    ("w = 1e999", "column 5: `1e999` is too large for any floating-point number"),
    ("w = -1e999", "column 6: `1e999` is too large for any floating-point number"),
    ("w[0 @ 1]", "column 5: '@' has no meaning here"),
    ("w = 1 # one", "column 7: '#' has no meaning here"),
    ("w = \u0663", "column 5: '\u0663' has no meaning here"),
    (f"w[{'9' * 1001}]", "column 3: an integer of more than 1000 digits is not a position in a tensor"),
    (f"w[-{'1' * 1001}:]", "column 4: an integer of more than 1000 digits is not a position in a tensor"),
    ("w[~(0)" + "|~(0)" * 30, "column 109: a region holds at most 64 operators and parentheses, found 92; "
     "use a list of integers, or pass a bool mask as the region"),
    ("w[~0, 1]", f"column 3: `~` beside a comma is ambiguous; {_AMBIGUOUS}"),
    ("w[0 & 1, 2]", f"column 5: `&` beside a comma is ambiguous; {_AMBIGUOUS}"),
    ("w[0, 1 & center]", f"column 8: `&` beside a comma is ambiguous; {_AMBIGUOUS}"),
    ("w[(0, 1), 2]", f"column 3: `(` beside a comma is ambiguous; {_AMBIGUOUS}"),
    ("w[center, 1]", f"column 3: `center` beside a comma is ambiguous; {_AMBIGUOUS}"),
    ("w[:, ... | 2]", "column 6: `...` cannot be in a union; write `:`"),
    ("w[0 & 1, 2]", f"column 5: `&` beside a comma is ambiguous; {_AMBIGUOUS}"),
    ("w[random(0.5)]", "column 3: pattern `random` got 1 argument; write `random(fraction, seed=...)`"),
    ("w[random(0.5, 1)]", "column 3: pattern `random` got 2 arguments; write `random(fraction, seed=...)`"),
    ("w[random(0.5, seed=x)]", "column 20: unknown pattern `x`"),
    ("w[band(-1, 0)]",
     "column 3: `lower` of `band` must be an integer, 0 or more, found -1; write `band(lower, upper)`"),
    ("w[block_diagonal(0)]", "column 3: `n` of `block_diagonal` must be a positive integer, found 0"),
    ("w[largest(0)]", "column 3: `fraction` of `largest` must be a number above 0, at most 1, found 0"),
    ("w[each(diagonal, 4)]",
     "column 3: `k` of `each` must be a positive integer, found Diagonal; write `each(k, region)`"),
    ("w = []",
     "column 5: a list of values must contain at least one number, or lists of equal lengths; write for instance"),
    ("w = [1, [2]]", "column 5: a list of values must contain at least one number, or lists of equal lengths"),
    ("w = [[1, 2], [3]]", "column 5: a list of values must contain at least one number, or lists of equal lengths"),
    ("w = [1, 1e999]", "column 9: `1e999` is too large for any floating-point number"),
    ("w = 1+2", "column 6: expected the end of the rule, found `+`"),
    ("w = mirrored", "column 5: `mirrored` takes other arguments; write `mirrored(dim)`, perhaps with `start=first`"),
    ("w = symmetric(1)", "column 5: `symmetric` takes other arguments; write `symmetric`, perhaps with"),
    ("w = tied(0, groups=0)", "column 5: `groups` of `tied` must be 1 or more, found 0; write `tied(0, groups=2)`"),
    ("w[~middle]", "column 4: unknown pattern `middle`; use one of center, cross, border, diagonal, triu, tril, "),
    ("w[0 | center(1)]", "column 7: pattern `center` got 1 argument; write `center`"),
    ("w[cross(1, 2)]", "column 3: pattern `cross` got 2 arguments; write `cross(dims=2)`"),
    ("w[smallest]", "column 3: pattern `smallest` got 0 arguments; write `smallest(fraction)`"),
    ("w[nm(2)]", "column 3: pattern `nm` got 1 argument; write `nm(n, m)`"),
    ("w[cross(0)]", "column 3: `dims` of `cross` must be a positive integer, found 0"),
    ("w[triu(1.5)]", "column 3: `k` of `triu` must be an integer, found 1.5"),
    ("w[smallest(-0.5)]", "column 3: `fraction` of `smallest` must be a number above 0, at most 1, found -0.5"),
    ("w[smallest(1e999)]", "column 3: `fraction` of `smallest` must be a number above 0, at most 1, found inf"),
    ("w[nm(4, 2)]", "column 3: pattern `nm(4, 2)` freezes nothing: 4 of every 2 stay free; give n < m"),
    ("w[..., ...]", "column 3: an index takes at most one `...`; write the other dimensions out as `:`"),
    ("w[center | ::0]", "column 12: a slice step must not be 0; leave it out to take every position"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), _NO_RULES, ids=[text[:30] or "nothing" for text, _ in _NO_RULES])
def test_text_that_is_no_rule_is_refused_with_rule_and_column(text: str, message: str) -> None:
    with pytest.raises(RuleSyntaxError, match=re.escape(f"rule `{shortened(text)}`: {message}")):
        parse_rule(text)


def test_the_column_counts_in_the_text_that_the_message_shows() -> None:
    for text in ("w = x", "   w = x", "\n\tw = x  "):
        with pytest.raises(RuleSyntaxError, match=re.escape("rule `w = x`: column 5: ")):
            parse_rule(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 1: expected an index"),
        ("0]", "column 2: expected the end of the region, found `]`"),
        ("center = 0", "column 8: expected the end of the region, found `=`"),
    ],
)
def test_a_region_s_text_holds_a_region_and_no_more(text: str, message: str) -> None:
    with pytest.raises(RuleSyntaxError, match=re.escape(message)):
        parse_region(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 1: expected a value: a number, a list of numbers, `keep` or `tied(dim)`, found the end"),
        ("1 + 1", "column 3: expected the end of the value, found `+`"),
        ("kept", "column 1: expected a value: a number, a list of numbers, `keep` or `tied(dim)`, found `kept`"),
    ],
)
def test_a_value_s_text_holds_a_value_and_no_more(text: str, message: str) -> None:
    with pytest.raises(RuleSyntaxError, match=re.escape(message)):
        parse_value(text)


@pytest.mark.parametrize("parse", [parse_rule, parse_region, parse_value])
@pytest.mark.parametrize("text", [None, 0, b"w", center], ids=lambda text: type(text).__name__)
def test_only_text_is_parsed(parse: Callable[[Any], Any], text: Any) -> None:
    with pytest.raises(SpecError, match=f"a (rule|region|value) must be text, found {type(text).__name__}; write"):
        parse(text)


# --------------------------------------------------------------------------------------------------------------------
# Specs

_A, _B, _C = Rule("a", center, 0), Rule("b.*"), Rule("c", ~entries[0, 1], -2)
_MASK = torch.ones(3, dtype=torch.bool)
_NUMBERS = torch.zeros(2)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param("", (), id="no text"),
        pytest.param(" \n\t\n# only a comment\n", (), id="blank lines and a comment"),
        pytest.param([], (), id="empty list"),
        pytest.param({}, (), id="empty mapping"),
        pytest.param([[], {}, "", ()], (), id="empty specs in a list"),
        pytest.param(_A, (_A,), id="a rule"),
        pytest.param("a[center] = 0", (_A,), id="text"),
        pytest.param("a[center] = 0\n\n  b.*  # all of it\n# c\r\nc[~(0, 1)] = -2#", (_A, _B, _C), id="lines"),
        pytest.param({"a": (center, 0), "b.*": ...}, (_A, _B), id="mapping"),
        pytest.param({"a": ("center", "0"), "c": ["~(0, 1)", "-2"]}, (_A, _C), id="mapping of texts"),
        pytest.param({"a": ("center", "keep"), "b.*": "..."}, (Rule("a", center), _B), id="mapping to text regions"),
        pytest.param(
            {"a": _MASK, "b": (_MASK, _NUMBERS)}, (Rule("a", _MASK), Rule("b", _MASK, _NUMBERS)), id="tensors"
        ),
        pytest.param({"a": torch.isinf}, (Rule("a", torch.isinf),), id="function"),
        pytest.param({"a": [3, 7, 11]}, (Rule("a", entries[[3, 7, 11]]),), id="list of integers"),
        pytest.param({"a": [np.int64(0), np.int8(2)]}, (Rule("a", entries[[0, 2]]),), id="integers of NumPy"),
        pytest.param({"a": list(torch.tensor([0, 2]))}, (Rule("a", entries[[0, 2]]),), id="integers of torch"),
        pytest.param({"a": ([0, 2], 1)}, (Rule("a", entries[[0, 2]], 1),), id="list of integers and value"),
        pytest.param([_A, "b.*", {"c": (~entries[0, 1], -2)}], (_A, _B, _C), id="list of every kind"),
        pytest.param([[_A, ["b.*"]], ("c[~(0, 1)] = -2",)], (_A, _B, _C), id="nested"),
        pytest.param(iter([_A, "b.*\nc[~(0, 1)] = -2"]), (_A, _B, _C), id="iterator"),
        pytest.param([_A, "a[center] = 0"], (_A, _A), id="the same twice"),
    ],
)
def test_a_spec_says_its_rules_in_order(spec: Any, expected: tuple[Rule, ...]) -> None:
    assert rules_of(spec) == expected


@pytest.mark.parametrize(
    ("spec", "found"),
    [(None, "NoneType"), (0, "int"), (b"w = 0", "bytes"), (_MASK, "Tensor"), (torch.nn.Linear(1, 1), "Linear"),
     (center, "Center"), ([_A, None], "NoneType"), (["w = 0", [[3.5]]], "float")],
    ids=["None", "int", "bytes", "tensor", "module", "region", "None in a list", "number in nested lists"],
)  # fmt: skip
def test_a_spec_of_another_kind_is_refused(spec: Any, found: str) -> None:
    advice = 'write "conv.weight[center] = 0" or {"conv.weight": (center, 0)}'
    expected = f"`spec` must be text, a Rule, a mapping or an iterable of those, found {found}; {advice}"
    with pytest.raises(SpecError, match=re.escape(expected)):
        rules_of(spec)


@pytest.mark.parametrize("what", [[True, False], [True, False, True], ([True, False], 1)], ids=repr)
def test_a_list_of_bools_is_no_mask(what: Any) -> None:
    with pytest.raises(
        SpecError, match=r"a mask must be a bool tensor, found the list \[True.*; give torch\.tensor\(mask"
    ):
        rules_of({"w": what})


@pytest.mark.parametrize(
    ("what", "count"), [((), 0), ((center,), 1), ([center, 0, 1], 3)], ids=["nothing", "one part", "three parts"]
)
def test_a_mapping_s_item_has_a_region_and_a_value(what: Any, count: int) -> None:
    message = f"a mapping's item is a region or (region, value), found {count} items for 'w'"
    with pytest.raises(SpecError, match=re.escape(message)):
        rules_of({"w": what})


@pytest.mark.parametrize("target", ["", "a b", "w[0]", "w = 0", "w#", "a\n", None, 3, b"w", ("w",)], ids=repr)
def test_a_target_is_a_name(target: Any) -> None:
    for make in (Rule, lambda target: rules_of({target: center})):
        with pytest.raises(SpecError, match=re.escape(f"brackets, `=` or `#`, found {target!r}; write")):
            make(target)


@pytest.mark.parametrize("spec", ["a\nb[", ["a", "b["], {"a": "...", "b": "("}], ids=["text", "list", "mapping"])
def test_one_line_that_is_no_rule_spoils_the_spec(spec: Any) -> None:
    with pytest.raises(RuleSyntaxError, match=r"column [23]: expected"):
        rules_of(spec)


# --------------------------------------------------------------------------------------------------------------------
# Rules as values


@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, math.nan, 10**400, -Fraction(10**400)], ids=["inf", "-inf", "nan", "int", "fraction"]
)
def test_a_rule_s_number_is_finite(value: Any) -> None:
    with pytest.raises(FrozenValueError, match="the value of `w` must be finite, found"):
        Rule("w", center, value)


@pytest.mark.parametrize("value", [1, 1.0, Fraction(1), torch.tensor(1.0).numpy()[()]], ids=lambda v: type(v).__name__)
def test_a_rule_s_number_is_a_float_whatever_number_it_was(value: Any) -> None:
    rule = Rule("w", center, value)
    assert type(rule.value) is float
    assert rule == Rule("w", center, 1.0)


_few_rules = st.builds(
    Rule,
    st.sampled_from(["v", "w"]),
    st.sampled_from([center, ~center, entries[0], entries[0, :], entries[:, 0], entries[[0]], cross(2), cross]),
    st.sampled_from([0.0, -0.0, 1, 1.0, keep]),
)


@given(_few_rules, _few_rules)
@many
def test_rules_are_equal_where_their_texts_are(first: Rule, second: Rule) -> None:
    assert (first == second) == (str(first) == str(second))
    copy = Rule(first.target, first.region, first.value)
    assert first == copy
    assert hash(first) == hash(copy)
    assert first != second or hash(first) == hash(second)


_ONE = Rule("w", entries[0], 1)


@pytest.mark.parametrize(
    "other",
    [Rule("v", entries[0], 1), Rule("w", entries[1], 1), Rule("w", entries[0], 2), Rule("w", entries[0]), "w[0] = 1"],
    ids=str,
)
def test_rules_differ_in_target_region_or_value(other: Any) -> None:
    assert other != _ONE


def test_minus_zero_is_another_value_than_zero() -> None:
    """They differ in their bits, so two such rules on one entry disagree and must not compare equal."""
    assert Rule("w", center, -0.0) != Rule("w", center, 0.0)
    assert len({Rule("w", center, -0.0), Rule("w", center, 0.0)}) == 2


def test_tensors_and_functions_in_rules_compare_by_which_object_they_are() -> None:
    assert Rule("w", _MASK, _NUMBERS) == Rule("w", _MASK, _NUMBERS)
    assert hash(Rule("w", _MASK, _NUMBERS)) == hash(Rule("w", _MASK, _NUMBERS))
    assert Rule("w", _MASK) != Rule("w", _MASK.clone())
    assert Rule("w", _MASK, _NUMBERS) != Rule("w", _MASK, _NUMBERS.clone())
    assert Rule("w", torch.isinf) == Rule("w", torch.isinf)
    assert Rule("w", torch.isinf) != Rule("w", torch.isnan)


@given(rules())
@many
def test_a_rule_survives_pickle_and_copy(rule: Rule) -> None:
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert copy.deepcopy(rule) == rule


def test_a_rule_whose_region_is_a_function_keeps_its_text_through_pickle_and_copy() -> None:
    rule = Rule("w", lambda parameter: parameter < 0, -0.0)
    for again in (pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule)):
        assert str(again) == str(rule) == "w[<<lambda>>] = -0"
        assert str(pickle.loads(pickle.dumps(again))) == str(rule)


def test_a_rule_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        _ONE.target = "v"  # type: ignore[misc]  # what is tested
