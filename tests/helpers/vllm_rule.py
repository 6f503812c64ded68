"""How vLLM decides whether a chat template takes content as parts, written anew from its description.

vLLM hands images to a template as parts ("openai") only if it finds, in the template's syntax tree, a loop over the
content of a message of `messages`; else it joins everything to one string ("string").
"""

from __future__ import annotations

from collections import deque

import jinja2.nodes
from transformers.utils.chat_template_utils import _cached_compile_jinja_template


def content_format(template: str) -> str:
    tree = _cached_compile_jinja_template(template).environment.parse(template)
    lists, waiting = ["messages"], deque(["messages"])
    while waiting:
        name = waiting.popleft()
        for assignment in tree.find_all(jinja2.nodes.Assign):
            if _is(assignment.node, name):
                assert isinstance(assignment.target, jinja2.nodes.Name)
                assert len(lists) < 1000, "vLLM would search for ever: two names are assigned to each other"
                if assignment.target.name != name:
                    lists.append(assignment.target.name)
                    waiting.append(assignment.target.name)
    loops = list(tree.find_all(jinja2.nodes.For))
    items = [loop.target.name for loop in loops if any(_is(loop.iter, name) for name in lists)]
    return "openai" if any(_is(loop.iter, item, "content") for loop in loops for item in items) else "string"


def _is(node: jinja2.nodes.Node, name: str, key: str | None = None) -> bool:
    """Whether a node is a variable, or one of its keys, behind any filters, tests and slices."""
    if isinstance(node, (jinja2.nodes.Filter, jinja2.nodes.Test)):
        return node.node is not None and _is(node.node, name, key)
    if isinstance(node, jinja2.nodes.Getitem) and isinstance(node.arg, jinja2.nodes.Slice):
        return _is(node.node, name, key)
    if key is None:
        return isinstance(node, jinja2.nodes.Name) and node.name == name
    if isinstance(node, jinja2.nodes.Getitem):
        return _is(node.node, name) and isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == key
    return isinstance(node, jinja2.nodes.Getattr) and _is(node.node, name) and node.attr == key
