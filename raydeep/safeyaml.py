"""YAML for jobs: no tags, no duplicate keys, size, depth and aliases bounded; `3e-4` is a float, `2:4` text."""

from __future__ import annotations

import re
from typing import Any

import yaml

from raydeep.errors import JobError

MAX_JOB_BYTES = 256 * 1024
MAX_ALIASES = 64
MAX_NODES = 20_000
MAX_DEPTH = 32


class _Loader(yaml.SafeLoader):
    """YAML without tags, duplicate keys or floods of aliases; `3e-4` is a float."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.aliases = self.nodes = self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        self.nodes += 1
        if isinstance(event, yaml.AliasEvent):
            self.aliases += 1
        if self.aliases > MAX_ALIASES or self.nodes > MAX_NODES or self.depth > MAX_DEPTH:
            raise JobError(f"line {event.start_mark.line + 1}: too many nested values or aliases for a job")
        if getattr(event, "tag", None) is not None:
            raise JobError(f"line {event.start_mark.line + 1}: tags ({event.tag}) are not allowed in a job")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise JobError(f"line {key_node.start_mark.line + 1}: a key must be plain text")
            if key in seen:
                raise JobError(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice")
            if key == "<<":
                raise JobError(f"line {key_node.start_mark.line + 1}: merge keys (<<) are not allowed in a job")
            seen.add(key)
        return super().construct_mapping(node, deep=True)


_Loader.yaml_implicit_resolvers = {  # a copy, so that yaml.SafeLoader itself stays as it is
    first: [(tag, exp) for tag, exp in pairs if tag.rpartition(":")[2] not in ("float", "int", "timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF)|\.(nan|NaN))$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(  # as YAML 1.2: 2:4 is text, not 124
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)


def load_yaml(text: str) -> Any:
    """Load YAML safely: no tags, no duplicate keys, size, depth and aliases bounded.

    Raises:
        JobError: with the line and what is wrong there.
    """
    if len(text.encode(errors="replace")) > MAX_JOB_BYTES:
        raise JobError(f"larger than {MAX_JOB_BYTES:,} bytes: that is no job file")
    try:
        loader = _Loader(text)
        tree = loader.get_single_data()
        if _size(tree) > MAX_NODES:
            raise JobError("aliases expand to too many values for a job")
        return tree
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise JobError(
            f"{where}not valid YAML: {getattr(err, 'problem', None) or ' '.join(str(err).split())}"
        ) from None
    except (RecursionError, ValueError) as err:
        raise JobError(f"not valid YAML: {err}") from None


def _size(tree: Any, budget: int = MAX_NODES) -> int:
    """Number of values in the expanded tree, counted no further than just past `budget`."""
    count, stack = 0, [tree]
    while stack and count <= budget:
        item = stack.pop()
        count += 1
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return count
