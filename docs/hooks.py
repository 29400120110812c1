"""Hooks of mkdocs: tables of job keys from the models themselves, and the pages that lie beside what they are about.

`<!-- keys: SECTION -->` in a page becomes a table of the section's keys. The pages of `nav` that are not in docs/ are
taken from the repository's root, with the files that they link to; links between them and docs/ hold in both places.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import normpath
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

from raydeep.config import Job
from raydeep.fields import Section
from raydeep.tuning import Choices, Range

KEYS = re.compile(r"<!-- keys: (\w+) -->")
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=(?:#[^)\s]*)?\))")
BESIDE: dict[str, type[BaseModel]] = {"Choices": Choices, "Range": Range}  # values of search.space, no sections
HOME = {"README.md": "index.md"}  # the root's is for the code host; the site has a start page of its own


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages of nav that lie in the repository's root, and the files that any page links to."""
    root = Path(config.config_file_path).parent
    for page in _pages(config.nav):
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, abs_src_path=str(root / page)))
    for file in list(files.documentation_pages()):
        for link in LINK.findall(file.content_string):
            there = _in_root(file, link, root)
            ours = (root / there).is_file() and not there.startswith("docs/") and there not in HOME
            if ours and files.get_file_from_path(there) is None:
                files.append(File.generated(config, there, abs_src_path=str(root / there)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them, and the tables of keys."""
    root = Path(config.config_file_path).parent

    def link(found: re.Match[str]) -> str:
        there = _in_root(page.file, found[0], root).removeprefix("docs/")
        there = HOME.get(there, there)
        if files.get_file_from_path(there) is None:
            return found[0]
        return "/".join([".."] * page.file.src_uri.count("/") + [there])

    return KEYS.sub(lambda found: table(found[1]), LINK.sub(link, markdown))


def _pages(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for item in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _pages(item)


def _in_root(file: File, link: str, root: Path) -> str:
    """What a page links to, as a path below the repository's root."""
    beside = "docs" if (root / "docs" / file.src_uri).is_file() else ""
    return normpath(f"{beside}/{file.src_uri}/../{link}").lstrip("/")


# tables of keys


def table(name: str) -> str:
    """The keys of a section: name, default, what it takes, meaning. `job` has those of no section."""
    rows = "".join(
        f'<tr id="{key}"><td><code>{key}</code></td><td>{default}</td><td>{takes}</td><td>{meaning}</td></tr>\n'
        for key, default, takes, meaning in _rows(name)
    )
    head = "<tr><th>Key</th><th>Default</th><th>Takes</th><th>Meaning</th></tr>"
    return f'<div class="keys"><table><thead>{head}</thead><tbody>\n{rows}</tbody></table></div>'


def _rows(name: str) -> Iterator[tuple[str, str, str, str]]:
    if name in BESIDE:
        yield from _of(BESIDE[name], "")
    elif name == "job":
        yield from _of(Job, "", sections=False)
    else:
        kind = Job.model_fields[name].annotation
        assert isinstance(kind, type)
        assert issubclass(kind, Section)
        yield from _of(kind, f"{name}.")


def _of(kind: type[BaseModel], prefix: str, sections: bool = True) -> Iterator[tuple[str, str, str, str]]:
    schema = kind.model_json_schema()
    for key, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            if sections:
                yield from _of(inner, f"{prefix}{key}.")
            continue
        default = (
            "needed"
            if field.is_required()
            else f"<code>{html.escape(_value(key, field.get_default(call_default_factory=True)))}</code>"
        )
        takes = _takes(schema["properties"][key], schema.get("$defs", {}))
        yield prefix + key, default, takes, _words(field.description or "")


def _value(key: str, value: Any) -> str:
    text: str = yaml.safe_dump(
        _plain(value), default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True
    )
    text = text.removesuffix("...\n").strip().replace("null", "none")
    if key.endswith("_bytes") and isinstance(value, int):
        text += f" ({value // 2**20} MiB)"
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _words(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def _takes(schema: dict[str, Any], kinds: dict[str, Any]) -> str:
    """What a value must be, from its JSON schema."""
    if "$ref" in schema:
        properties = kinds[schema["$ref"].rpartition("/")[2]]["properties"]
        return f"<code>{{{', '.join(f'{name}: …' for name in properties)}}}</code>"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_takes(one, kinds) for one in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"<code>{value}</code>" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return f"<code>[{', '.join(['…'] * len(schema['prefixItems']))}]</code>"
        return f"list of {_takes(schema.get('items', {}), kinds)}"
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "<code>true</code>, <code>false</code>",
        "object": "mapping",
        "null": "<code>none</code>",
    }
    return words.get(schema.get("type", ""), "any value") + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f", {low:,} to {high:,}" if high < 1e5 else f", {low:,} or more"
    parts = [f" ≥ {low:,}" if low is not None else "", f" > {above:,}" if above is not None else ""]
    parts += [
        f", ≤ {high:,}" if high is not None else "",
        f", < {below:,}" if below is not None and below < 1e5 else "",
    ]
    return "".join(parts)
