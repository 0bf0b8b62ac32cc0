"""Text <-> rules. Plain Python, no tensors.

    rule    =  target [ "[" region "]" ] [ "=" value ]
    region  =  index | pattern | "~" region | region "&" region | region "|" region | "(" region ")"
    index   =  item { "," item }            an item is an integer, a slice, "..." or a list of integers
    pattern =  name [ "(" numbers ")" ]     each name is a class in `patterns`
    value   =  number | "keep" | "tied" "(" dimension [ "," "start" "=" ( "first" | "mean" ) ] ")"

`parse_rule(str(rule)) == rule` holds for every rule that text can say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from .._errors import RegionError
from .patterns import pattern_named
from .reader import Reader
from .region import MOST_DIGITS, WHOLE, And, Index, IndexItem, Not, Or, Region, Slice
from .rule import TARGET, Keep, Rule, Tied, keep

_Part = TypeVar("_Part")


class _Parser(Reader):
    """Read one rule by recursive descent, a method for each line of the grammar."""

    def rule(self) -> Rule:
        found = TARGET.match(self.text)
        if found is None:
            raise self.error(0, "expected a parameter's name", self.example)
        self.tokenize(found.end())
        region: Region = WHOLE
        if self.take("["):
            region = self.region()
            self.expect("]", "`]` to close the region")
        value = self.value() if self.take("=") else keep
        self.expect_end()
        return Rule(found.group(), region, value)

    def only(self, part: Callable[[_Parser], _Part]) -> _Part:
        """Read text that is one part of a rule and no more."""
        self.tokenize(0)
        found = part(self)
        self.expect_end()
        return found

    # A region's text is an index with commas, or operators over parts that hold none outside parentheses.

    def region(self) -> Region:
        start = self.next
        first = self._either()
        if self.peek().text != ",":
            return first
        self._refuse_operators(start)
        items = list(first.items) if isinstance(first, Index) else []
        while self.take(","):
            if self.peek().text in ("]", ")", ""):
                break
            items.append(self._item())
        if self.peek().text in ("|", "&"):
            self._refuse_operators(start, through=self.next)
        return self._built(Index, tuple(items), at=start)

    def _refuse_operators(self, start: int, through: int | None = None) -> None:
        """Raise where an operator or a pattern stands beside a comma: which binds tighter is anybody's guess."""
        tokens = self.tokens[start : self.next if through is None else through + 1]
        for token in tokens:
            if token.text in ("~", "|", "&", "(") or token.kind == "name":
                advice = "put an index with commas into parentheses, as in `~(0, 1)` or `(0, 1) | (2, 3)`"
                raise self.error(token.column, f"`{token.text}` beside a comma is ambiguous", advice)

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

    def _pattern(self) -> tuple[str, tuple[float, ...]]:
        name = self.advance().text
        arguments: list[float] = []
        if self.take("("):
            while self.peek().text != ")":
                arguments.append(self._number("a number"))
                if not self.take(","):
                    break
            self.expect(")", "`)` to close the pattern's arguments")
        return name, tuple(arguments)

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
            raise self.error(token.column, f"an integer of more than {MOST_DIGITS} digits is no position in a tensor")
        return sign * int(token.text)

    def value(self) -> Keep | Tied | float:
        start = self.next
        if self.take("keep"):
            return keep
        if self.take("tied"):
            return self._built(Tied, *self._tied(), at=start)
        number = self._number("a value: a number, `keep` or `tied(dim)`", float)
        if math.isinf(number):
            token = self.tokens[self.next - 1]
            raise self.error(token.column, f"`{token.text}` is too large for any floating-point number")
        return number

    def _tied(self) -> tuple[int, str | None]:
        self.expect("(", "`(` and a dimension")
        dim = self._optional_integer()
        if dim is None:
            raise self.unexpected("a dimension")
        start = None
        if self.take(","):
            self.expect("start", "`start`")
            self.expect("=", "`=`")
            start = self.advance().text
        self.expect(")", "`)` to close `tied`")
        return dim, start

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
        """Build a region or a value; where it refuses its parts, say at which column they stand."""
        try:
            return kind(*parts)
        except RegionError as error:
            raise self.error(self.tokens[at].column, error.fact, error.advice) from None


def parse_rule(text: str) -> Rule:
    """Read one rule.

    Args:
        text: For instance ``"conv.weight[:, :, 1, 1] = 0"``.

    Raises:
        RuleSyntaxError: The text is no rule; the message names the column, counted from 1.
        SpecError: It is no text at all.

    Example:
        >>> from freezehooks import parse_rule
        >>> parse_rule("wte[~50257:]")
        Rule(target='wte', region=Not(operand=Index(items=(Slice(start=50257, stop=None, step=None),))), value=keep)
    """
    return _Parser(text, "rule").rule()


def parse_region(text: str) -> Region:
    """Read what stands between a rule's brackets: ``parse_region("~center | border")``.

    Raises:
        RuleSyntaxError: The text is no region; the message names the column, counted from 1.
        SpecError: It is no text at all.

    Example:
        >>> from freezehooks import center, entries, parse_region
        >>> parse_region("~center | 0") == ~center | entries[0]
        True
    """
    return _Parser(text, "region").only(_Parser.region)


def parse_value(text: str) -> Keep | Tied | float:
    """Read what stands behind a rule's ``=``: a number, `keep` or `tied(dim)`.

    Raises:
        RuleSyntaxError: The text is neither; the message names the column, counted from 1.
    """
    return _Parser(text, "value").only(_Parser.value)
