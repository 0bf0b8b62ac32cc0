"""The site: `make docs` builds it with warnings as errors, and fetches nothing."""

from __future__ import annotations

import re
from importlib.metadata import version as version_of
from typing import Any

from docutils import nodes
from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

project = "freezehooks"
author = "The freezehooks developers"
project_copyright = author
version = release = version_of("freezehooks")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["copy.js"]
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 3  # pages link to one another's headings
highlight_language = "text"  # a bare block in a docstring is a formula, not Python

default_role = "code"  # docstrings write `name` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_custom_sections = ["Shape"]
napoleon_use_ivar = True  # an attribute that is a property too has one entry, the property's

# Python's and torch's own names have no page here, and nothing is fetched to find theirs.
nitpick_ignore_regex = [(r"py:.*", r"(?!freezehooks).*")]

PRIVATE = re.compile(r"freezehooks\.(layers\.)?_\w+(?:\.\w+)*\.(\w+)")
"""The name of a public object by the private file that defines it, as annotations say it."""


def link_public_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: Element) -> Element | None:
    """Lead an annotation's name, which says the private file, to the public one."""
    private = PRIVATE.fullmatch(node.get("reftarget", ""))
    if private is None:
        return None
    public = f"freezehooks.{private[1] or ''}{private[2]}"
    domain = env.domains.python_domain
    found: Any = domain.resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, text)
    return found or text  # what is not public shows without a link


def link_literals(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Lead a public name that is written as code, such as `freeze_entries`, to its place in the API pages."""
    objects = app.env.domains.python_domain.objects
    for literal in list(doctree.findall(nodes.literal)):
        found = objects.get(f"freezehooks.{literal.astext().removesuffix('()')}")
        if found is None or isinstance(literal.parent, nodes.reference | nodes.title):
            continue
        link = make_refnode(app.builder, page, found.docname, found.node_id, literal.deepcopy())
        literal.replace_self(link)


def keep_colons(*event: Any) -> None:
    """Put a dash for the colon before which Napoleon would expect a type: in a value's text, and below `Returns`."""
    _, what, *_, lines = event
    for n, line in enumerate(lines):
        if (what in ("data", "property") and n == 0) or (n and lines[n - 1].strip() == "Returns:"):
            lines[n] = line.replace(": ", " \N{EN DASH} ", 1)


def setup(app: Sphinx) -> None:
    """Register the hooks."""
    app.connect("missing-reference", link_public_name)
    app.connect("doctree-resolved", link_literals)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # before Napoleon
