"""Lines and branches of raydeep that the fast tests run, a package a row; reads what `coverage json` writes."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

LEAST = 12  # modules that are named


def table(found: dict[str, dict]) -> str:
    """Markdown: packages, then the modules with the smallest share."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    modules = []
    for name, file in found.items():
        facts = file["summary"]
        row = [facts[key] for key in ("num_statements", "covered_lines", "num_branches", "covered_branches")]
        parts = Path(name).parts
        for key in (parts[1] if len(parts) > 2 else "raydeep", "all"):
            sums[key] = [a + b for a, b in zip(sums[key], row, strict=True)]
        modules.append((facts["percent_covered"], name, facts["missing_lines"]))
    lines = ["| package | statements | lines | branches |", "| --- | ---: | ---: | ---: |"]
    for key in [*sorted(sums.keys() - {"all"}), "all"]:
        statements, covered, branches, taken = sums[key]
        lines.append(
            f"| {key} | {statements:,} | {covered / max(1, statements):.1%} | {taken / max(1, branches):.1%} |"
        )
    lines += ["", "| module | lines and branches | lines not run |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {share:.1f}% | {missing} |" for share, name, missing in sorted(modules)[:LEAST]]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())["files"]))
