"""Text <-> rules. Plain Python, no tensors.

    rule    =  target [ "[" region "]" ] [ "=" value ]
    region  =  index | pattern | "~" region | region "&" region | region "|" region | "(" region ")"
    index   =  item { "," item }            an item is an integer, a slice, "..." or a list of integers
    pattern =  name [ "(" numbers ")" ]
    value   =  number | "keep" | "tied" "(" dimension [ "," "start" "=" ( "first" | "mean" ) ] ")"

`parse_rule(str(rule)) == rule` holds for every rule that text can say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from .._errors import RegionError, RuleSyntaxError, SpecError
from .region import WHOLE, And, Index, IndexItem, Not, Or, Pattern, Region, Slice
from .rule import TARGET, Keep, Rule, Tied, keep

_Part = TypeVar("_Part")


_TOKEN: Final = re.compile(
    r"""(?P<space>\s+)
      | (?P<number>(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)
      | (?P<integer>\d+)
      | (?P<name>[^\W\d]\w*)
      | (?P<sign>\.\.\.|[-+:,\[\]()~|&=])""",
    re.VERBOSE | re.ASCII,
)


_MOST_OPERATORS: Final = 64
_MOST_DIGITS: Final = 1000  # of an integer; Python itself refuses to read a few thousand

_EXAMPLES: Final = {
    "rule": "`conv.weight[:, :, 1, 1] = 0`, one rule a line",
    "region": "`:, :, 1, 1` or `center`",
    "value": "`0.5`",
}


class _Token(NamedTuple):
    kind: str
    text: str
    column: int


class _Parser:
    """Read one rule by recursive descent, a method for each line of the grammar."""

    def __init__(self, text: str, kind: str) -> None:
        if not isinstance(text, str):
            raise SpecError(
                f"a {kind} must be text, found {type(text).__name__}", f"write for instance {_EXAMPLES[kind]}"
            )
        self.kind = kind
        self.text = text.strip()
        self.tokens: list[_Token] = []
        self.next = 0

    def rule(self) -> Rule:
        found = TARGET.match(self.text)
        if found is None:
            raise self._error(0, "expected a parameter's name", self._example)
        self._tokenize(found.end())
        region: Region = WHOLE
        if self._take("["):
            region = self.region()
            self._expect("]", "`]` to close the region")
        value = self.value() if self._take("=") else keep
        self._expect_end()
        return Rule(found.group(), region, value)

    def only(self, part: Callable[[_Parser], _Part]) -> _Part:
        """Read text that is one part of a rule and no more."""
        self._tokenize(0)
        found = part(self)
        self._expect_end()
        return found

    # A region's text is an index with commas, or operators over parts that hold none outside parentheses.

    def region(self) -> Region:
        start = self.next
        first = self._either()
        if self._peek().text != ",":
            return first
        self._refuse_operators(start)
        items = list(first.items) if isinstance(first, Index) else []
        while self._take(","):
            if self._peek().text in ("]", ")", ""):
                break
            items.append(self._item())
        if self._peek().text in ("|", "&"):
            self._refuse_operators(start, through=self.next)
        return self._built(Index, tuple(items), at=start)

    def _refuse_operators(self, start: int, through: int | None = None) -> None:
        """Raise where an operator or a pattern stands beside a comma: which binds tighter is anybody's guess."""
        tokens = self.tokens[start : self.next if through is None else through + 1]
        for token in tokens:
            if token.text in ("~", "|", "&", "(") or token.kind == "name":
                advice = "put an index with commas into parentheses, as in `~(0, 1)` or `(0, 1) | (2, 3)`"
                raise self._error(token.column, f"`{token.text}` beside a comma is ambiguous", advice)

    def _either(self) -> Region:
        region = self._both()
        while self._take("|"):
            region = Or(region, self._both())
        return region

    def _both(self) -> Region:
        region = self._negated()
        while self._take("&"):
            region = And(region, self._negated())
        return region

    def _negated(self) -> Region:
        depth = 0
        while self._take("~"):
            depth += 1
        region = self._operand()
        for _ in range(depth):
            region = Not(region)
        return region

    def _operand(self) -> Region:
        start = self.next
        if self._take("("):
            region = self.region()
            self._expect(")", "`)` to close the parenthesis")
            return region
        if self._peek().kind == "name":
            return self._built(Pattern, *self._pattern(), at=start)
        return self._built(Index, (self._item(),), at=start)

    def _pattern(self) -> tuple[str, tuple[float, ...]]:
        name = self._advance().text
        arguments: list[float] = []
        if self._take("("):
            while self._peek().text != ")":
                arguments.append(self._number("a number"))
                if not self._take(","):
                    break
            self._expect(")", "`)` to close the pattern's arguments")
        return name, tuple(arguments)

    def _item(self) -> IndexItem:
        if self._take("..."):
            return ...
        if self._take("["):
            return self._integers()
        start = self._optional_integer()
        if not self._take(":"):
            if start is None:
                raise self._unexpected("an index (integer, slice, `...`, list of integers) or a pattern")
            return start
        stop = self._optional_integer()
        return Slice(start, stop, self._optional_integer() if self._take(":") else None)

    def _integers(self) -> tuple[int, ...]:
        integers: list[int] = []
        while self._peek().text != "]":
            integer = self._optional_integer()
            if integer is None:
                raise self._unexpected("an integer")
            integers.append(integer)
            if not self._take(","):
                break
        self._expect("]", "`]` to close the list")
        return tuple(integers)

    def _optional_integer(self) -> int | None:
        if self._peek().kind == "integer":
            return self._to_integer(1)
        if self._peek().text == "-" and self._peek(1).kind == "integer":
            self._advance()
            return self._to_integer(-1)
        return None

    def _to_integer(self, sign: int) -> int:
        token = self._advance()
        if len(token.text) > _MOST_DIGITS:
            raise self._error(token.column, f"an integer of more than {_MOST_DIGITS} digits is no position in a tensor")
        return sign * int(token.text)

    def value(self) -> Keep | Tied | float:
        start = self.next
        if self._take("keep"):
            return keep
        if self._take("tied"):
            return self._built(Tied, *self._tied(), at=start)
        number = self._number("a value: a number, `keep` or `tied(dim)`", float)
        if math.isinf(number):
            token = self.tokens[self.next - 1]
            raise self._error(token.column, f"`{token.text}` is too large for any floating-point number")
        return number

    def _tied(self) -> tuple[int, str | None]:
        self._expect("(", "`(` and a dimension")
        dim = self._optional_integer()
        if dim is None:
            raise self._unexpected("a dimension")
        start = None
        if self._take(","):
            self._expect("start", "`start`")
            self._expect("=", "`=`")
            start = self._advance().text
        self._expect(")", "`)` to close `tied`")
        return dim, start

    def _number(self, expected: str, of_integer: Callable[[str], float] = int) -> float:
        sign = "-" if self._take("-") else "+"
        if sign == "+":
            self._take("+")
        token = self._peek()
        if token.kind not in ("number", "integer"):
            raise self._unexpected(expected)
        self._advance()
        return float(sign + token.text) if token.kind == "number" else of_integer(sign + token.text)

    # Tokens

    def _tokenize(self, start: int) -> None:
        position = start
        while position < len(self.text):
            found = _TOKEN.match(self.text, position)
            if found is None:
                raise self._error(position, f"{self.text[position]!r} has no meaning here", self._example)
            if found.lastgroup != "space":
                self.tokens.append(_Token(str(found.lastgroup), found.group(), position))
            position = found.end()
        self.tokens.append(_Token("end", "", len(self.text)))
        self._refuse_depth()

    def _refuse_depth(self) -> None:
        """Raise before a region is nested so deeply that Python's own call stack would give out."""
        nested = [token for token in self.tokens if token.text in ("~", "|", "&", "(")]
        if len(nested) > _MOST_OPERATORS:
            raise self._error(
                nested[_MOST_OPERATORS].column,
                f"a region holds at most {_MOST_OPERATORS} operators and parentheses, found {len(nested)}",
                "use a list of integers, or pass a bool mask as the region",
            )

    def _peek(self, ahead: int = 0) -> _Token:
        return self.tokens[min(self.next + ahead, len(self.tokens) - 1)]

    def _advance(self) -> _Token:
        token = self._peek()
        self.next += 1
        return token

    def _take(self, sign: str) -> bool:
        taken = self._peek().text == sign
        self.next += taken
        return taken

    def _expect(self, sign: str, meaning: str) -> None:
        if not self._take(sign):
            raise self._unexpected(meaning)

    def _expect_end(self) -> None:
        if self._peek().kind != "end":
            raise self._unexpected(f"the end of the {self.kind}")

    def _built(self, kind: Callable[..., _Part], *parts: Any, at: int) -> _Part:
        """Build a region or a value; where it refuses its parts, say at which column they stand."""
        try:
            return kind(*parts)
        except RegionError as error:
            raise self._error(self.tokens[at].column, error.fact, error.advice) from None

    @property
    def _example(self) -> str:
        return f"write for instance {_EXAMPLES[self.kind]}"

    def _unexpected(self, expected: str) -> RuleSyntaxError:
        token = self._peek()
        found = f"`{token.text}`" if token.text else "the end"
        return self._error(token.column, f"expected {expected}, found {found}", self._example)

    def _error(self, column: int, fact: str, advice: str = "") -> RuleSyntaxError:
        return RuleSyntaxError(f"{self.kind} `{self.text}`: column {column + 1}: {fact}", advice)


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


# --------------------------------------------------------------------------------------------------------------------
# Specs


Spec: TypeAlias = "str | Rule | Mapping[str, Any] | Iterable[Any]"
"""What rules can be read from: text, a rule, {target: region} or {target: (region, value)}, or several of those."""


def rules_of(spec: Spec) -> tuple[Rule, ...]:
    """Return the rules that `spec` says, in its order.

    Args:
        spec: Text (a rule a line; ``#`` begins a comment), a `Rule`, a mapping ``{target: region}`` or
            ``{target: (region, value)}``, or an iterable of those.

    Raises:
        RuleSyntaxError: Text that is no rule.
        SpecError: Anything else that cannot be read as rules.
    """
    return tuple(_iterate_rules(spec))


def _iterate_rules(spec: Any) -> Iterator[Rule]:
    if isinstance(spec, Rule):
        yield spec
    elif isinstance(spec, str):
        lines = (line.split("#", 1)[0].strip() for line in spec.splitlines())
        yield from map(parse_rule, filter(None, lines))
    elif isinstance(spec, Mapping):
        yield from (_rule_of_item(target, what) for target, what in spec.items())
    elif isinstance(spec, Iterable) and not hasattr(spec, "shape") and not isinstance(spec, bytes):
        for part in spec:
            yield from _iterate_rules(part)
    else:
        raise SpecError(
            f"`spec` must be text, a Rule, a mapping or an iterable of those, found {type(spec).__name__}",
            'write "conv.weight[center] = 0" or {"conv.weight": (center, 0)}',
        )


def _rule_of_item(target: Any, what: Any) -> Rule:
    if isinstance(what, tuple | list):
        if len(what) != 2:
            raise SpecError(
                f"a mapping's item is a region or (region, value), found {len(what)} parts for {target!r}",
                "write {target: (region, value)}; a list of rules takes several of one target",
            )
        region, value = what
    elif isinstance(what, Tied):
        region, value = WHOLE, what
    else:
        region, value = what, keep
    return Rule(target, _parsed(parse_region, region), _parsed(parse_value, value))


def _parsed(parse: Callable[[str], Any], part: Any) -> Any:
    return parse(part) if isinstance(part, str) else part
