"""All cases, and the table of them in README.md: `cd tests && python -m hostile.table` writes it anew."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hostile import cases_configs, cases_models, cases_paths, cases_pictures, cases_tables
from hostile.harness import Case, MiB
from raydeep.errors import shown

CASES: list[Case] = [
    *cases_pictures.CASES, *cases_tables.CASES, *cases_configs.CASES, *cases_models.CASES, *cases_paths.CASES,
]  # fmt: skip
PAGE = Path(__file__).with_name("README.md")
MARK = "<!-- cases -->\n"


def cell(text: str) -> str:
    """Text of others in a cell of a table, as code."""
    short = shown(text) if len(text) <= 100 else f"{shown(text[:97])}…"
    return f"`{short.replace('|', '∣').replace('`', 'ˋ')}`"


def table() -> str:
    """Markdown: how many cases each group has, then every case."""
    groups = Counter(case.group for case in CASES)
    lines = ["| group | cases |", "| --- | ---: |", *(f"| {group} | {count} |" for group, count in groups.items())]
    lines += [f"| all | {len(CASES)} |", ""]
    lines += ["| group | what is given | command | what it says matches | exit | MiB |"]
    lines += ["| --- | --- | --- | --- | ---: | ---: |"]
    for case in CASES:
        words = "raydeep " + " ".join(case.argv) if case.argv is not None else case.command
        name = shown(case.name).replace("|", "∣")
        row = (case.group, name, cell(words), cell(case.says), case.code, case.peak // MiB)
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """README.md with the table as it is now."""
    return PAGE.read_text().partition(MARK)[0] + MARK + table()


if __name__ == "__main__":
    PAGE.write_text(page())
