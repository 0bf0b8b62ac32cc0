"""YAML that says texts, lists and mappings and nothing else. The one file that needs PyYAML."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.events import AliasEvent
from yaml.nodes import MappingNode


class PlainLoader(yaml.SafeLoader):
    """Refuse what a rules file has no use for: anchors and aliases, tags, and a key that is written twice.

    A nest of aliases expands without end, and of two equal keys YAML silently drops the first.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as in PyYAML; so that `0` and `no` stay text

    def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: D102 - as in PyYAML
        event = self.peek_event()
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
            raise _error("anchors and aliases have no meaning here", event)
        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):
            raise _error(f"the tag {tag!r} has no meaning here, and nothing was made of it", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: D102
        seen = set()
        for key, _ in node.value:
            if key.value in seen if isinstance(key.value, str) else True:
                raise _error("a key is no text, or is written twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]


def _error(problem: str, at: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, at.start_mark)
