"""Read rules for the command line: from a text file, from YAML, and from its own arguments."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from .._errors import RuleSyntaxError, SpecError, error_context
from .._rules.rule import Rule
from .._rules.spec import rules_of

_FORMS: Final = "write a list of rules, or `target: region` or `target: [region, value]` a line"


def add_rules_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command take rules."""
    parser.add_argument(
        "--rules", metavar="FILE", action="append", default=[], help="rules: one a line, or YAML in .yaml or .yml"
    )
    parser.add_argument(
        "--rule", metavar="RULE", action="append", default=[], help="one rule, such as 'conv[center] = 0'; repeatable"
    )


def asked_rules(options: argparse.Namespace) -> list[Rule]:
    """Return the rules that the arguments speak of, those of the files first, each once.

    Raises:
        FreezeError: A file or a rule that cannot be read; a file without rules.
    """
    files = (rule for path in options.rules for rule in read_rules(path))
    return list(dict.fromkeys([*files, *rules_of(options.rule)]))


def needed_rules(options: argparse.Namespace) -> list[Rule]:
    """Return the rules that the arguments speak of.

    Raises:
        SpecError: They speak of none.
    """
    rules = asked_rules(options)
    if not rules:
        raise SpecError("there is no rule to go by", "give --rules FILE, or --rule 'conv.weight[center] = 0'")
    return rules


def read_rules(path: str) -> list[Rule]:
    """Return the rules in a file.

    Args:
        path: YAML where it ends in .yaml or .yml; any other file is text, one rule a line.

    Raises:
        FreezeError: The file cannot be read, or holds no rule; the message names the file, and the rule.
    """
    text = _text_of(path)
    with error_context(f"`{path}`"):
        is_yaml = path.endswith((".yaml", ".yml"))
        rules = list(_rules_in_yaml(text) if is_yaml else _rules_in_text(text))
        if not rules:
            raise SpecError("the file holds no rule", "write one a line, such as `conv.weight[center] = 0`")
    return rules


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SpecError(f"the rules file `{path}` cannot be read ({error.strerror})", "check --rules") from None
    except ValueError:
        raise RuleSyntaxError(f"the rules file `{path}` is no text in UTF-8", "check --rules") from None


def _rules_in_text(text: str) -> Iterator[Rule]:
    for number, line in enumerate(text.splitlines(), 1):
        with error_context(f"line {number}"):
            yield from rules_of(line)


# --------------------------------------------------------------------------------------------------------------------
# YAML


def _rules_in_yaml(text: str) -> Iterator[Rule]:
    content = _content_of(text)
    if isinstance(content, dict) and len(content) == 1 and next(iter(content)) in ("rules", "spec"):
        (content,) = content.values()
    yield from _rules_in(content)


def _rules_in(content: Any) -> Iterable[Rule]:
    match content:
        case str():
            return _rules_in_text(content)
        case list():
            return _rules_in_list(content)
        case dict():
            return [rule for target, what in content.items() for rule in _rules_in_item(target, what)]
    raise SpecError(f"expected rules, found {_kind(content)}", _FORMS)


def _rules_in_list(content: list[Any]) -> Iterator[Rule]:
    for number, item in enumerate(content, 1):
        with error_context(f"item {number}"):
            if not isinstance(item, str | dict):
                raise SpecError(f"expected a rule or a mapping, found {_kind(item)}", _FORMS)
            yield from _rules_in(item)


def _rules_in_item(target: Any, what: Any) -> tuple[Rule, ...]:
    with error_context(f"rule for `{target}`"):
        parts = what if isinstance(what, list) else [what]
        if not isinstance(target, str) or not all(isinstance(part, str) for part in parts):
            wrong = next((part for part in [target, *parts] if not isinstance(part, str)), None)
            raise SpecError(f"expected text, found {_kind(wrong)}", _FORMS)
        if not all(parts):
            raise SpecError("the region or the value is empty", "write `...` for the whole tensor")
        return rules_of({target: tuple(parts) if isinstance(what, list) else what})


def _kind(content: Any) -> str:
    names = {list: "a list", dict: "a mapping", type(None): "nothing"}
    return names.get(type(content), f"a {type(content).__name__}")


def _content_of(text: str) -> Any:
    """Return what YAML says, every scalar as the text that it was.

    Raises:
        RuleSyntaxError: It is no YAML, or says more than texts, lists and mappings.
    """
    try:
        import yaml
    except ImportError:
        raise SpecError(
            "to read YAML takes the package PyYAML, which is not installed",
            'run `pip install "freezehooks[cli]"`, or write the rules into a text file, one a line',
        ) from None
    from .plain_yaml import PlainLoader

    try:
        return yaml.load(text, PlainLoader)  # noqa: S506 - it descends from SafeLoader
    except yaml.YAMLError as error:
        raise RuleSyntaxError(f"the YAML cannot be read ({' '.join(str(error).split())})", _FORMS) from None
    except RecursionError:
        raise RuleSyntaxError("the YAML is nested too deeply", _FORMS) from None
