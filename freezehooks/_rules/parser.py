"""Parses rules from text. Does not import torch.

    rule    =  target [ "[" region "]" ] [ "=" value ]
    region  =  index | pattern | "~" region | region "&" region | region "|" region | "(" region ")"
    index   =  item { "," item }            an item is "...", a list of integers, or a union: span { "|" span }
    span    =  integer | slice
    pattern =  name [ "(" arguments ")" ]   each name is a class in `patterns`; an argument is a number or a region
    value   =  number | list | "keep" | tie
    tie     =  name [ "(" arguments ")" ]   each name is a class in `ties`; an argument is a number or a word

An argument may be named, as in `random(0.5, seed=1)` and `tied(0, start=mean)`.

`parse_rule(str(rule)) == rule` holds for every rule that has a text form.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable
from types import EllipsisType
from typing import Any, TypeAlias, TypeVar

from .._errors import FrozenValueError, RegionError, RuleSyntaxError, SpecError
from .patterns import pattern_named
from .reader import A_VALUE, Reader
from .region import MOST_DIGITS, WHOLE, And, Index, IndexItem, Not, Or, Region, Slice, Union, indexed
from .rule import MOST_DIMENSIONS, TARGET, Keep, Numbers, Rule, keep
from .ties import Tie, tie_named

_Part = TypeVar("_Part")

Value: TypeAlias = "Keep | Tie | Numbers | float | complex"
"""A value that can be written as text."""


class _Parser(Reader):
    """Reads one rule by recursive descent, with a method for each line of the grammar."""

    def rule(self) -> Rule:
        found = TARGET.match(self.text)
        if found is None:
            raise self.error(0, "expected a parameter's name", self.example)
        self.tokenize(found.end())
        region: Region = WHOLE
        if self.take("["):
            region = self.region()
            self.expect("]", "`]` to close the region")
        has_value, at = self.take("="), self.next
        value = self.value() if has_value else keep
        self.expect_end()
        return self._built(Rule, found.group(), region, value, at=at)

    def only(self, part: Callable[[_Parser], _Part]) -> _Part:
        """Read text that holds one part of a rule, such as its region, and nothing else."""
        self.tokenize(0)
        found = part(self)
        self.expect_end()
        return found

    # A region is either an index with commas, or operators over operands whose commas are in parentheses.

    def region(self) -> Region:
        start = self.next
        first = self._either()
        if self.peek().text != ",":
            return first
        self._refuse_operators(start)
        items: list[IndexItem] = [self._as_item(first, start)]
        while self.take(","):
            if self.peek().text in ("]", ")", ""):
                break
            items.append(self._union())
        if self.peek().text == "&":
            self._refuse_operators(start, through=self.next)
        return self._built(indexed, tuple(items), at=start)

    def _refuse_operators(self, start: int, through: int | None = None) -> None:
        """Raise if an operator or a pattern is beside a comma, where precedence would be unclear."""
        tokens = self.tokens[start : self.next if through is None else through + 1]
        for token in tokens:
            if token.text in ("~", "&", "(") or token.kind == "name":
                advice = "put an index with commas into parentheses, as in `~(0, 1)` or `(0, 1) | (2, 3)`"
                raise self.error(token.column, f"`{token.text}` beside a comma is ambiguous", advice)

    def _as_item(self, region: Region, start: int) -> IndexItem:
        """Return the first item of an index with commas, given the region that it was read as."""
        items = [item for leaf in region.leaves() if isinstance(leaf, Index) for item in leaf.items]
        return items[0] if len(items) == 1 else self._joined(items, start)

    def _union(self) -> IndexItem:
        start, items = self.next, [self._item()]
        while self.take("|"):
            items.append(self._item())
        return items[0] if len(items) == 1 else self._joined(items, start)

    def _joined(self, items: list[IndexItem], start: int) -> Union:
        spans: list[int | Slice] = []
        for item in items:
            if isinstance(item, EllipsisType | Union):
                raise self.error(self.tokens[start].column, "`...` cannot be in a union", "write `:`")
            spans.extend(item if isinstance(item, tuple) else (item,))
        return Union(tuple(spans))

    def _either(self) -> Region:
        region = self._both()
        while self.take("|"):
            region = Or(region, self._both())
        return region

    def _both(self) -> Region:
        region = self._negated()
        while self.take("&"):
            region = And(region, self._negated())
        return region

    def _negated(self) -> Region:
        depth = 0
        while self.take("~"):
            depth += 1
        region = self._operand()
        for _ in range(depth):
            region = Not(region)
        return region

    def _operand(self) -> Region:
        start = self.next
        if self.take("("):
            region = self.region()
            self.expect(")", "`)` to close the parenthesis")
            return region
        if self.peek().kind == "name":
            return self._built(pattern_named, *self._pattern(), at=start)
        return self._built(Index, (self._item(),), at=start)

    def _pattern(self) -> tuple[str, list[Any], dict[str, Any]]:
        return self.advance().text, *self._arguments(self._pattern_argument, "the pattern's arguments")

    def _arguments(self, read: Callable[[], Any], what: str) -> tuple[list[Any], dict[str, Any]]:
        """Read the arguments in parentheses, if there are any, and return the unnamed and the named ones."""
        unnamed: list[Any] = []
        named: dict[str, Any] = {}
        if self.take("("):
            while self.peek().text != ")":
                if self.peek().kind == "name" and self.peek(1).text == "=":
                    name = self.advance().text
                    self.advance()
                    named[name] = read()
                else:
                    unnamed.append(read())
                if not self.take(","):
                    break
            self.expect(")", f"`)` to close {what}")
        return unnamed, named

    def _pattern_argument(self) -> Any:
        is_signed = self.peek().text in ("+", "-")
        if self.peek(is_signed).kind in ("number", "integer") and self.peek(is_signed + 1).text in (",", ")"):
            return self._number("a number")
        return self._either()

    def _item(self) -> IndexItem:
        if self.take("..."):
            return ...
        if self.take("["):
            return self._integers()
        start = self._optional_integer()
        if not self.take(":"):
            if start is None:
                raise self.unexpected("an index (integer, slice, `...`, list of integers) or a pattern")
            return start
        stop = self._optional_integer()
        return Slice(start, stop, self._optional_integer() if self.take(":") else None)

    def _integers(self) -> tuple[int, ...]:
        integers: list[int] = []
        while self.peek().text != "]":
            integer = self._optional_integer()
            if integer is None:
                raise self.unexpected("an integer")
            integers.append(integer)
            if not self.take(","):
                break
        self.expect("]", "`]` to close the list")
        return tuple(integers)

    def _optional_integer(self) -> int | None:
        if self.peek().kind == "integer":
            return self._to_integer(1)
        if self.peek().text == "-" and self.peek(1).kind == "integer":
            self.advance()
            return self._to_integer(-1)
        return None

    def _to_integer(self, sign: int) -> int:
        token = self.advance()
        if len(token.text) > MOST_DIGITS:
            fact = f"an integer of more than {MOST_DIGITS} digits is not a position in a tensor"
            raise self.error(token.column, fact)
        return sign * int(token.text)

    def value(self) -> Value:
        start = self.next
        if self.take("keep"):
            return keep
        if self.peek().text in Tie.known:
            name = self.advance().text
            arguments, named = self._arguments(self._tie_argument, f"`{name}`")
            return self._built(tie_named, name, arguments, named, at=start)
        if self.take("["):
            return self._built(Numbers.of, self._values(), at=start)
        return self._finite_number(A_VALUE)

    def _tie_argument(self) -> int | str:
        if self.peek().kind == "name":
            return self.advance().text
        integer = self._optional_integer()
        if integer is None:
            raise self.unexpected("a dimension")
        return integer

    def _values(self, depth: int = 1) -> list[Any]:
        """Read what is between the brackets of a list: numbers, or lists of them."""
        values: list[Any] = []
        if depth > MOST_DIMENSIONS:
            raise self.error(self.peek().column, f"a list of values is nested at most {MOST_DIMENSIONS} deep")
        while self.peek().text != "]":
            values.append(self._values(depth + 1) if self.take("[") else self._finite_number("a number"))
            if not self.take(","):
                break
        self.expect("]", "`]` to close the list")
        return values

    def _finite_number(self, expected: str) -> float | complex:
        """Read a finite number, real or complex."""
        number = self._real_or_imaginary(expected)
        if isinstance(number, float) and self.peek().text in ("+", "-") and self.peek(1).kind == "imaginary":
            number = complex(number, self._real_or_imaginary(expected).imag)
        if not cmath.isfinite(number):
            token = self.tokens[self.next - 1]
            raise self.error(token.column, f"`{token.text}` is too large for any floating-point number")
        return number

    def _real_or_imaginary(self, expected: str) -> float | complex:
        is_signed = self.peek().text in ("+", "-")
        if self.peek(is_signed).kind != "imaginary":
            return self._number(expected, float)
        sign = "-" if self.peek().text == "-" else "+"
        self.next += is_signed
        return complex(0.0, float(sign + self.advance().text[:-1]))

    def _number(self, expected: str, of_integer: Callable[[str], float] = int) -> float:
        sign = "-" if self.take("-") else "+"
        if sign == "+":
            self.take("+")
        token = self.peek()
        if token.kind not in ("number", "integer"):
            raise self.unexpected(expected)
        self.advance()
        return float(sign + token.text) if token.kind == "number" else of_integer(sign + token.text)

    def _built(self, kind: Callable[..., _Part], *parts: Any, at: int) -> _Part:
        """Build a region or a value, and add the column to the error if it rejects its arguments."""
        try:
            return kind(*parts)
        except RuleSyntaxError:
            raise
        except (RegionError, FrozenValueError, SpecError) as error:
            raise self.error(self.tokens[at].column, error.fact, error.advice) from None


def parse_rule(text: str) -> Rule:
    """Read one rule.

    Args:
        text: For instance ``"conv.weight[:, :, 1, 1] = 0"``.

    Raises:
        RuleSyntaxError: The text is not a rule; the message names the column, counted from 1.
        SpecError: The argument is not text.

    Example:
        >>> from freezehooks import parse_rule
        >>> parse_rule("wte[~50257:]")
        Rule(target='wte', region=Not(operand=Index(items=(Slice(start=50257, stop=None, step=None),))), value=keep)
    """
    return _Parser(text, "rule").rule()


def parse_region(text: str) -> Region:
    """Read a region, the text between a rule's brackets: ``parse_region("~center | border")``.

    Raises:
        RuleSyntaxError: The text is not a region; the message names the column, counted from 1.
        SpecError: The argument is not text.

    Example:
        >>> from freezehooks import center, entries, parse_region
        >>> parse_region("~center | 0") == ~center | entries[0]
        True
    """
    return _Parser(text, "region").only(_Parser.region)


def parse_value(text: str) -> Value:
    """Read a value, the text after a rule's ``=``: a number, a list of numbers, `keep` or a tie such as `tied(0)`.

    Raises:
        RuleSyntaxError: The text is not a value; the message names the column, counted from 1.
    """
    return _Parser(text, "value").only(_Parser.value)
