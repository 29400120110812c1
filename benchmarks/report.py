"""Write the tables of benchmarks/README.md from the saved results: `make bench-report`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, where NAME.json lies in results/; all else is left alone.
"""

from __future__ import annotations

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
    origin = whole["provenance"]
    hardware, versions = origin["hardware"], origin["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchvision", "kornia", "ray", "pyarrow"))
    lines += [
        "",
        f"{hardware['cores']} cores of {hardware['cpu']}, {', '.join(hardware['gpus']) or 'no GPU'}; raydeep "
        f"{origin['raydeep']}, Python {versions['python']}, {packages}; {origin['created'][:10]}"
        f"{'; quick' if origin['quick'] else ''}.",
    ]
    return "\n".join(lines)


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
