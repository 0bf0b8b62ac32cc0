"""Reads rules for the command line from text files, from YAML, and from the arguments."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from .._errors import RuleSyntaxError, SpecError, error_context
from .._rules.rule import Rule
from .._rules.spec import rules_of

_FORMS: Final = "write a list of rules, or `target: region` or `target: [region, value]` a line"

_TAGS: Final = {"scalar": "str", "sequence": "seq", "mapping": "map"}
"""The tag that YAML gives to a node of each kind if none is written."""


def given_rules(options: argparse.Namespace) -> list[Rule]:
    """Return the rules that the arguments give, those in files first, each once.

    Raises:
        FreezeError: A file or a rule cannot be read, or a file has no rules.
    """
    files = (rule for path in options.rules for rule in read_rules(path))
    return list(dict.fromkeys([*files, *rules_of(options.rule)]))


def read_rules(path: str) -> list[Rule]:
    """Return the rules in a file.

    Args:
        path: The path; a file that ends in .yaml or .yml is YAML, any other is text with one rule a line.

    Raises:
        FreezeError: The file cannot be read, or has no rules; the message names the file and the rule.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SpecError(f"the rules file `{path}` cannot be read ({error.strerror})", "check --rules") from None
    except ValueError:
        raise RuleSyntaxError(f"the rules file `{path}` is not text in UTF-8", "check --rules") from None
    with error_context(f"`{path}`"):
        rules = list(_rules_in(_rules_of_yaml(text) if path.endswith((".yaml", ".yml")) else text))
        if not rules:
            raise SpecError("the file holds no rule", "write one a line, such as `conv.weight[center] = 0`")
    return rules


def _rules_in(content: Any, expected: str = "rules") -> Iterator[Rule]:
    """Yield the rules of a text, a mapping, or a list of these; an error names the line, target or item."""
    match content:
        case str():
            for number, line in enumerate(content.splitlines(), 1):
                with error_context(f"line {number}"):
                    yield from rules_of(line)
        case dict():
            for target, what in content.items():
                with error_context(f"rule for `{target}`"):
                    yield from rules_of({target: _region_and_value(what)})
        case list() if expected == "rules":
            for number, item in enumerate(content, 1):
                with error_context(f"item {number}"):
                    yield from _rules_in(item, "a rule or a mapping")
        case _:
            raise SpecError(f"expected {expected}, found {_kind(content)}", _FORMS)


def _region_and_value(what: Any) -> Any:
    texts = what if isinstance(what, list) else [what]
    for text in texts:
        if not isinstance(text, str):
            raise SpecError(f"expected text, found {_kind(text)}", _FORMS)
        if not text:
            raise SpecError("the region or the value is empty", "write `...` for the whole tensor")
    return what


def _kind(content: Any) -> str:
    return "a list" if isinstance(content, list) else "a mapping" if isinstance(content, dict) else "nothing"


def _rules_of_yaml(text: str) -> Any:
    """Parse YAML, with every scalar as text; a mapping whose only key is `rules` or `spec` is replaced by its item.

    Raises:
        RuleSyntaxError: It is not YAML, or contains more than text, lists and mappings.
    """
    try:
        import yaml
    except ImportError:
        raise SpecError(
            "reading YAML needs the package PyYAML, which is not installed",
            'run `pip install "freezehooks[cli]"`, or write the rules into a text file, one a line',
        ) from None
    try:
        node = yaml.compose(text, yaml.BaseLoader)  # a tree of nodes, in which tags create no objects
        content = None if node is None else _plain(node, set())
    except (yaml.YAMLError, ValueError) as error:
        raise RuleSyntaxError(f"the YAML cannot be read ({' '.join(str(error).split())})", _FORMS) from None
    except RecursionError:
        raise RuleSyntaxError("the YAML is nested too deeply", _FORMS) from None
    if isinstance(content, dict) and list(content) in (["rules"], ["spec"]):
        (content,) = content.values()
    return content


def _plain(node: Any, seen: set[int]) -> Any:
    """Convert a node to text, a list or a dict.

    Aliases are rejected since nested ones could expand without end, and equal keys since YAML drops the first silently.
    """
    where = f"in line {node.start_mark.line + 1}"
    if id(node) in seen:
        raise ValueError(f"anchors and aliases have no meaning here, {where}")
    seen.add(id(node))
    if node.tag != f"tag:yaml.org,2002:{_TAGS[node.id]}":
        raise ValueError(f"the tag {node.tag!r} has no meaning here, and nothing was made of it, {where}")
    if node.id != "mapping":
        return node.value if node.id == "scalar" else [_plain(item, seen) for item in node.value]
    keys = [_plain(key, seen) for key, _ in node.value]
    if not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
        raise ValueError(f"a key is not text, or is written twice, {where}")
    return dict(zip(keys, (_plain(item, seen) for _, item in node.value), strict=True))
