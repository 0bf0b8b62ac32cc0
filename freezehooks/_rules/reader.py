"""Reads the text of a rule, a region or a value token by token. Does not import torch."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from .._errors import RuleSyntaxError, SpecError, shortened

_TOKEN: Final = re.compile(
    r"""(?P<space>\s+)
      | (?P<imaginary>(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?[jJ])
      | (?P<number>(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)
      | (?P<integer>\d+)
      | (?P<name>[^\W\d]\w*)
      | (?P<sign>\.\.\.|[-+:,\[\]()~|&=])""",
    re.VERBOSE | re.ASCII,
)

_MOST_OPERATORS: Final = 64

_EXAMPLES: Final = {
    "rule": "`conv.weight[:, :, 1, 1] = 0`, one rule a line",
    "region": "`:, :, 1, 1` or `center`",
    "value": "`0.5`",
}


A_VALUE: Final = "a value: a number, a list of numbers, `keep` or `tied(dim)`"
"""What is expected after ``=``."""

_ONE_A_LINE: Final = "write one rule a line, or give a list of rules"

_ADVICE: Final = {
    ("", ";"): _ONE_A_LINE,
    ("the end of the rule", ","): _ONE_A_LINE,
    ("the end of the rule", "["): "write the whole region in one pair of brackets, as in `[0, 1]`",
    (A_VALUE, "="): "write one `=`",
    (A_VALUE, "nan"): "give a finite number",
    (A_VALUE, "inf"): "give a finite number",
}
"""The advice for frequent mistakes, by what was expected and what was found."""


class Token(NamedTuple):
    """A word, a number or a sign, with its column in the text, counted from 0."""

    kind: str
    text: str
    column: int


class Reader:
    """A cursor over the tokens of a text; every error names the text and the column.

    Args:
        text: What to read; surrounding white space is ignored.
        kind: What the text is: a "rule", a "region" or a "value".

    Raises:
        SpecError: It is not text.
    """

    def __init__(self, text: str, kind: str) -> None:
        if not isinstance(text, str):
            raise SpecError(
                f"a {kind} must be text, found {type(text).__name__}", f"write for instance {_EXAMPLES[kind]}"
            )
        self.kind = kind
        self.text = text.strip()
        self.tokens: list[Token] = []
        self.next = 0

    def tokenize(self, start: int) -> None:
        """Split the text after a column into tokens, followed by one that marks the end."""
        position = start
        while position < len(self.text):
            found = _TOKEN.match(self.text, position)
            if found is None:
                sign = self.text[position]
                raise self.error(position, f"{sign!r} has no meaning here", _ADVICE.get(("", sign), self.example))
            if found.lastgroup != "space":
                self.tokens.append(Token(str(found.lastgroup), found.group(), position))
            position = found.end()
        self.tokens.append(Token("end", "", len(self.text)))
        self._refuse_depth()

    def _refuse_depth(self) -> None:
        """Raise if a region is nested so deeply that parsing it might exceed Python's recursion limit."""
        nested = [token for token in self.tokens if token.text in ("~", "|", "&", "(")]
        if len(nested) > _MOST_OPERATORS:
            raise self.error(
                nested[_MOST_OPERATORS].column,
                f"a region holds at most {_MOST_OPERATORS} operators and parentheses, found {len(nested)}",
                "use a list of integers, or pass a bool mask as the region",
            )

    def peek(self, ahead: int = 0) -> Token:
        """Return the next token, or one further ahead; past the end, the end token."""
        return self.tokens[min(self.next + ahead, len(self.tokens) - 1)]

    def advance(self) -> Token:
        """Return the next token and move past it."""
        token = self.peek()
        self.next += 1
        return token

    def take(self, sign: str) -> bool:
        """Move past the next token if it is the given sign, and return whether it was."""
        taken = self.peek().text == sign
        self.next += taken
        return taken

    def expect(self, sign: str, meaning: str) -> None:
        """Move past the next token, which must be the given sign."""
        if not self.take(sign):
            raise self.unexpected(meaning)

    def expect_end(self) -> None:
        """Raise if there is anything left to read."""
        if self.peek().kind != "end":
            raise self.unexpected(f"the end of the {self.kind}")

    @property
    def example(self) -> str:
        """The advice of an error: an example of valid text."""
        return f"write for instance {_EXAMPLES[self.kind]}"

    def unexpected(self, expected: str) -> RuleSyntaxError:
        """Return the error for a next token that is not the expected one."""
        token = self.peek()
        found = f"`{shortened(token.text)}`" if token.text else "the end"
        advice = _ADVICE.get((expected, token.text), self.example)
        return self.error(token.column, f"expected {expected}, found {found}", advice)

    def error(self, column: int, fact: str, advice: str = "") -> RuleSyntaxError:
        """Return the error for something wrong at a column; the message counts columns from 1."""
        return RuleSyntaxError(f"{self.kind} `{shortened(self.text)}`: column {column + 1}: {fact}", advice)
