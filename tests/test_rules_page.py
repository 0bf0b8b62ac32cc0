"""The pages on rules and errors say what is so: tables, drawings, and every error, word for word."""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import nn

import freezehooks
from freezehooks import FreezeError, freeze_entries, parse_region, parse_rule
from freezehooks._entries.select import select
from freezehooks._rules.patterns.pattern import Pattern
from freezehooks._rules.spec import rules_of

PACKAGE: Final = Path(freezehooks.__file__).parent
DOCS: Final = Path(__file__).parents[1] / "docs"
LANGUAGE: Final = (DOCS / "rules.md").read_text()
ERRORS: Final = (DOCS / "errors.md").read_text()

# --------------------------------------------------------------------------------------------------------------------
# Tables


def _rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, row by row, without its head."""
    lines = LANGUAGE.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    return [[cell.strip().replace(r"\|", "|") for cell in row] for row in rows][2:]


def _codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize(
    "index", [code for row in _rows("Indices") for code in _codes(row[0])], ids=lambda index: str(index)
)
def test_every_index_in_the_table_selects_what_torch_selects(index: str) -> None:
    weight = torch.arange(144).view(8, 2, 3, 3)
    chosen = select(parse_region(index), weight)
    flipped = re.sub(r"::-1", ":", index).replace("6:1:-2", "2:7:2")  # torch has no slices that run backward
    expected = eval(f"weight[{flipped}]", {"weight": weight})
    assert weight[chosen].tolist() == expected.flatten().sort().values.tolist()


@pytest.mark.parametrize(("text", "python"), _rows("In Python"), ids=[row[0] for row in _rows("In Python")])
def test_text_and_python_in_the_table_say_the_same(text: str, python: str) -> None:
    (said,) = _codes(python)
    rules = tuple(parse_rule(code) for code in _codes(text))
    assert rules == rules_of(eval(said, vars(freezehooks)))


def _model_of_the_examples() -> nn.ModuleDict:
    conv = nn.Conv2d(2, 4, 3)
    nn.init.zeros_(conv.weight)  # equal slices, for `tied`
    head = nn.Linear(4, 4)
    head.weight.data[0] = 0
    layers = {"layer1": nn.ModuleDict({"conv1": nn.Conv2d(2, 2, 3, bias=False)}), "decoder": nn.Linear(4, 4)}
    more = {"fc": nn.Linear(8, 2), "lstm": nn.LSTM(3, 5), "attn": nn.MultiheadAttention(4, 2), "bn": nn.BatchNorm2d(4)}
    return nn.ModuleDict({"conv": conv, "head": head, "wte": nn.Embedding(50_260, 1), **layers, **more})


@pytest.mark.parametrize("rule", [_codes(row[0])[0] for row in _rows("Examples")])
def test_every_example_freezes_something(rule: str) -> None:
    assert len(freeze_entries(_model_of_the_examples(), rule)) > 0


def test_every_operator_in_the_table_binds_as_it_says() -> None:
    assert [_codes(row[0])[0] for row in _rows("Operators")] == ["~a", "a & b", "a | b"]
    assert parse_region("0 | ~1 & 2") == parse_region("0 | ((~1) & 2)")


@pytest.mark.parametrize("name", [name for name in freezehooks.__all__ if name.islower() and name != "entries"])
def test_every_word_of_the_language_is_on_the_page(name: str) -> None:
    assert f"`{name}" in LANGUAGE or f"{name}(" in LANGUAGE


# --------------------------------------------------------------------------------------------------------------------
# Drawings

DRAWINGS: Final = re.findall(r"```text\n(weight.*?)```", LANGUAGE, re.DOTALL)


def _drawn(block: str) -> tuple[torch.Tensor, dict[str, str]]:
    """A drawing's weight, and the drawing under each of its regions, in reading order.

    The weight consists of ones, in the shape that the first line names, or of the numbers in the first column.
    """
    first, *rows = [line for line in block.splitlines() if line]
    shape = first.removeprefix("weight of shape ")
    names = rows.pop(0) if shape != first else first.removeprefix("weight")
    numbers = [[float(number) for number in re.findall(r"(?<!\S)-?[\d.]*\d", row)] for row in rows]
    weight = torch.ones(ast.literal_eval(shape)) if shape != first else torch.tensor(numbers)
    columns = zip(*(re.findall(r"(?:[#.] )*[#.](?=   |$)", row) for row in rows), strict=True)
    regions = re.split(r"\s{3,}", names.strip())
    return weight, {region: " ".join(column) for region, column in zip(regions, columns, strict=True)}


@pytest.mark.parametrize("block", DRAWINGS, ids=[f"drawing {n}" for n in range(len(DRAWINGS))])
def test_every_drawing_shows_what_its_regions_freeze(block: str) -> None:
    weight, drawn = _drawn(block)
    assert drawn
    for region, picture in drawn.items():
        chosen = select(parse_region(region), weight).flatten().tolist()
        assert picture.split() == ["#" if frozen else "." for frozen in chosen], region


def test_every_pattern_is_drawn() -> None:
    drawn = " ".join(region for block in DRAWINGS for region in _drawn(block)[1])
    assert [name for name in Pattern.known if name not in drawn] == []


# --------------------------------------------------------------------------------------------------------------------
# Errors: the code on the page raises the message on the page

SETUP: Final = re.findall(r"```python\n(.*?)```", ERRORS, re.DOTALL)[0]


def _examples() -> Iterator[tuple[str, str]]:
    """Each snippet on the page, from the start or the last error on, with the message printed under it."""
    for block in re.findall(r"```pycon\n(.*?)```", ERRORS, re.DOTALL):
        code = ""
        for example in doctest.DocTestParser().get_examples(block):
            code += example.source
            if example.want:
                yield code, example.want.strip()
                code = ""
        assert not code, "code without a message"


EXAMPLES: Final = list(_examples())


@pytest.mark.parametrize(("code", "printed"), EXAMPLES, ids=[printed[:60] for _, printed in EXAMPLES])
def test_every_error_is_printed_as_the_page_says(code: str, printed: str) -> None:
    names: dict[str, Any] = {}
    exec(SETUP, names)
    *before, last = code.splitlines(keepends=True)
    exec("".join(before), names)
    with pytest.raises(FreezeError) as raised:
        exec(last, names)
    pattern = ".*".join(map(re.escape, printed.split("…")))
    assert re.fullmatch(pattern, f"{type(raised.value).__name__}: {raised.value}")


def test_every_message_is_preceded_by_what_to_do() -> None:
    before = [part.rstrip().rpartition("\n\n")[2] for part in ERRORS.split("```pycon\n")[:-1]]
    assert [text for text in before if not re.fullmatch(r"[A-Z`].*[.:]", text, re.DOTALL)] == []


# --------------------------------------------------------------------------------------------------------------------
# No message is missing

SOURCES: Final = [
    *("_rules/region", "_rules/rule", "_rules/reader", "_rules/parser", "_rules/spec", "_rules/ties"),
    *(f"_rules/patterns/{name}" for name in ("__init__", "pattern", "kernels", "matrices", "magnitudes", "within")),
    *(
        "_entries/select",
        "_held/copies",
        "_held/fixed",
        "_held/tied",
        "_held/parameter",
        "_held/violation",
        "_held/value",
        "_held/supported",
        "_held/saved",
        "_held/site",
        "_held/names",
        "_held/resolve",
        "_held/trained",
        "_held/remaining",
        "_ranks/agreement",
    ),
]
RAISE: Final = {
    "error",
    "unexpected",
    "expect",
    "_number",
    *(kind.__name__ for kind in FreezeError.__subclasses__()),
}

NO_MESSAGE: Final = {
    "a shape in a rule's text": "<{} of shape {}>",
    "how a violation prints, which a drift error lists": "`{}[{}]` holds {} instead of {} ({} drifted)",
    "what to do about it": "nest fewer lists",
    "labels without a shape, as a nested tensor has them": "labels must be a dense tensor of integers, found {}",
    "a list of values too deep for any tensor": "a list of values is nested at most {} deep",
    "the topic of a comparison between ranks, which no message shows": "in the first forward",
}


def _text(node: ast.expr) -> str | None:
    """A string literal, with {} for what is filled in, or None if the expression is not one."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{[^}]*\}", "{}", node.value)
    return None


def _strings(node: ast.AST) -> Iterator[str]:
    """The strings in some code, leaving out docstrings, what is filled into others, and those in `in_words`."""
    for child in ast.iter_child_nodes(node):
        text = _text(child) if isinstance(child, ast.expr) else None
        if text is not None:
            yield text
        elif not (_is_docstring(child) or _says_words(child)):
            yield from _strings(child)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _says_words(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.endswith("in_words")


def _messages(source: str) -> set[str]:
    """The texts of a module's errors: all arguments of its raising calls, and every other string of several words."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    raising = [call for call in calls if getattr(call.func, "id", getattr(call.func, "attr", None)) in RAISE]
    given = {text for call in raising for text in _strings(call) if re.search(r"[a-z]{3}|`.*`", text)}
    return given | {text for text in _strings(tree) if re.search(r"[a-z]+ (\{\} )*[a-z]+", text) and "(?P<" not in text}


def _is_shown(message: str) -> bool:
    """Whether a line of the page contains the message, with anything for what is filled in."""
    pattern = ".*".join(map(re.escape, message.split("{}")))
    return any(re.search(pattern, line) for line in ERRORS.splitlines() if not line.startswith((">>>", "...")))


def test_the_search_for_messages_finds_them_and_sees_a_missing_one() -> None:
    code = '"""Doc of two words."""\nraise SpecError(f"`x` must be {kind}, found {y}", "write it")\nfact = "it is odd"'
    code += '\ndef in_words():\n    return "on the border"'
    assert _messages(code) == {"`x` must be {}, found {}", "write it", "it is odd"}
    assert not _is_shown("a message that {} nobody wrote")
    assert _is_shown("index {} is out of range for dimension {} of size {}")
    assert len({text for name in SOURCES for text in _messages(_source(name))}) > 120


def _source(name: str) -> str:
    return (PACKAGE / f"{name}.py").read_text()


@pytest.mark.parametrize("name", SOURCES)
def test_no_message_is_missing_from_the_page(name: str) -> None:
    found = _messages(_source(name)) - set(NO_MESSAGE.values())
    assert sorted(message for message in found if not _is_shown(message)) == []


def test_every_exception_to_the_search_is_still_in_the_code() -> None:
    found = {text for name in SOURCES for text in _messages(_source(name))}
    assert sorted(set(NO_MESSAGE.values()) - found) == []


KINDS: Final = [kind.__name__ for kind in FreezeError.__subclasses__()]
RAISED: Final = [kind for kind in KINDS if any(f"{kind}(" in _source(name) for name in SOURCES)]


@pytest.mark.parametrize("kind", RAISED)
def test_every_kind_of_error_that_freezing_raises_is_shown(kind: str) -> None:
    assert re.search(rf"^{kind}: |`{kind}`", ERRORS, re.MULTILINE)
