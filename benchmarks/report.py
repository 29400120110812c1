"""Write the tables of benchmarks/README.md from the saved results: `make bench-report`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, where NAME.json lies in results/; all else is left alone.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(whole: dict[str, Any]) -> str:
    """One saved result as Markdown: a row a measurement, then where it comes from."""
    if all("columns" in row for row in whole["results"]):
        return "\n".join([*wide(whole["results"]), "", origin(whole)])
    faults = all("happened" in row for row in whole["results"])
    lines = ["| measured | value | unit | ± | n | target |", "| --- | ---: | --- | ---: | ---: | --- |"]
    if faults:
        lines = ["| fault | what happened | steps again | final weights |", "| --- | --- | ---: | --- |"]
    for row in whole["results"]:
        if faults:
            lines.append(f"| {row['name']} | {row['happened']} | {row['value']:.0f} | {row['weights']} |")
            continue
        spread = f"{row['spread']:.0%}" if "spread" in row else f"{row['std']:.2g}" if "std" in row else ""
        met = f"{row['target']}: {'met' if row['met'] else '**missed**'}" if "target" in row else ""
        value = number(row["value"])
        lines.append(f"| {row['name']} | {value} | {row['unit']} | {spread} | {row.get('n', '')} | {met} |")
    return "\n".join([*lines, "", origin(whole)])


def wide(rows: list[dict[str, Any]]) -> list[str]:
    """Rows that name their own columns: a table for each part, under its name."""
    lines: list[str] = []
    for part, group in itertools.groupby(rows, key=lambda row: row["part"]):
        found = list(group)
        heads = list(dict.fromkeys(head for row in found for head in row["columns"]))
        lines += ["", f"*{part}*", "", f"| | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
        lines += [f"| {row['name']} | {' | '.join(row['columns'].get(head, '') for head in heads)} |" for row in found]
    return lines


def origin(whole: dict[str, Any]) -> str:
    """Where a result comes from."""
    told = whole["provenance"]
    hardware, versions = told["hardware"], told["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchvision", "kornia", "ray", "pyarrow"))
    return (
        f"{hardware['cores']} cores of {hardware['cpu']}, {', '.join(hardware['gpus']) or 'no GPU'}; raydeep "
        f"{told['raydeep']}, Python {versions['python']}, {packages}; {told['created'][:10]}"
        f"{'; quick' if told['quick'] else ''}."
    )


def main() -> None:
    page = HERE / "README.md"
    text = page.read_text()
    for file in sorted((HERE / "results").glob("*.json")):
        found = re.compile(rf"(<!-- {file.stem} -->\n).*?(<!-- /{file.stem} -->)", re.DOTALL)
        if not found.search(text):
            raise SystemExit(f"{page}: no place for {file.name}: <!-- {file.stem} --> … <!-- /{file.stem} -->")
        whole = table(json.loads(file.read_text()))
        text = found.sub(lambda match, whole=whole: f"{match[1]}{whole}\n{match[2]}", text)  # type: ignore[misc]
    page.write_text(text)


if __name__ == "__main__":
    main()
