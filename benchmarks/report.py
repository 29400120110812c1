"""Write the tables of benchmarks/README.md, and the summary of README.md, from the saved results: `make bench-report`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, where NAME.json lies in results/ (`results` is the
summary); all else is left alone.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

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


WHOLE = "onnxruntime (whole), batch 1, 1 thread: times as fast as "


class Line(NamedTuple):
    """A line of the summary: what stands in results, as {0}, {1} … of both texts."""

    about: str
    text: str
    values: list[tuple[str, str]]  # file, name of the row


SUMMARY = [
    Line(
        "50 pictures a class of CIFAR-10, the same 1,000 steps",
        "{0:.1f}% without augmentation, {1:.1f}% with flip and crop, {2:.1f}% with AutoAugment",
        [("scarce", f"cifar10: {name}") for name in ("none", "basic", "autoaugment")],
    ),
    Line(
        "Augmentation on one core, 32 and 224 pixels",
        "{0:.1f} and {1:.0f} times as fast as Kornia's own pipeline, {2:.0f} and {3:.1f} times torchvision's",
        [
            ("augment", f"{px} px: over {peer}")
            for peer in ("Kornia's AugmentationSequential", "torchvision.transforms.v2 a sample")
            for px in (32, 224)
        ],
    ),
    Line(
        "Streaming CIFAR-10 to a worker",
        "{0:.1f} times as many pictures a second as torch's DataLoader with the same decoder",
        [("ingest", "CIFAR-10 PNG stream / DataLoader, same decoder")],
    ),
    Line(
        "LeNet-300-100 and LeNet-5 on MNIST",
        "{0:.0f}× smaller at {1:.2f}% error (float {2:.2f}%), and {3:.0f}× at {4:.2f}% ({5:.2f}%)",
        [
            (f"compress-{file}", f"{name}: {what}")
            for file, name in (("lenet_300_100", "LeNet-300-100"), ("lenet5", "LeNet-5"))
            for what in ("bytes, float32", "test error (", "test error of")
        ],
    ),
    Line(
        "ResNet-20 on CIFAR-10, 4-bit weights and activations",
        "{0:.2f} points below float; {1:.2f} above Brevitas after as many steps. 3 and 2 bits miss their targets",
        [("compress-bits", "W4A4, 5 epochs: points"), ("compress-brevitas", "W4A4: ours above brevitas")],
    ),
    Line(
        "ResNet-18 on photographs, a quarter of the MACs, 8 bits",
        "{0:.0f}× smaller, {1:.0f} times as fast as PyTorch and {2:.1f} times onnxruntime float (batch 1, one thread), "
        "{3:.2f} points lower",
        [
            ("compress-photos", f"{WHOLE}{name}" if name.startswith("dense") else name)
            for name in ("bytes, float32 over file", "dense torch eager", "dense onnxruntime float", "points lost")
        ],
    ),
    Line(
        "Search on Fashion-MNIST (one seed)",
        "{0:.0%} of the CPU seconds that plain Ray Tune takes to its hypervolume by random search, {1:.0%} with "
        "Optuna's TPE",
        [("search-front", f"CPU seconds to the final hypervolume of Ray Tune, {p}") for p in ("random", "Optuna")],
    ),
    Line(
        "Search on 2, 4 and 8 nodes, raylets of one machine whose steps sleep",
        "{0:.0%}, {1:.0%} and {2:.0%} of ideal throughput",
        [("scale", f"{nodes} nodes") for nodes in (2, 4, 8)],
    ),
    Line(
        "Search and training on three raylets, {0:.0f} kill -9 of workers, nodes and drivers",
        "{1:.0f} trials lost, weights bit-identical, {2:.0%} of the time effective",
        [("soak", name) for name in ("recoveries", "trials lost", "effective time")],
    ),
    Line(
        "Batch prediction on two cores, ResNet-18 at 224 pixels, and 28 pixels with a tiny network",
        "{0:.2f} and {1:.2f} times a plain onnxruntime loop a core (CPU seconds)",
        [("predict", f"{case}: raydeep over the loop, a core, by CPU seconds") for case in ("inference", "overhead")],
    ),
]  # fmt: skip


def summary() -> str:
    """The lines of SUMMARY as Markdown.

    Raises:
        SystemExit: a result has no one row of such a beginning.
    """
    lines = ["| | |", "| --- | --- |"]
    for line in SUMMARY:
        values = []
        for file, name in line.values:
            rows = json.loads((HERE / "results" / f"{file}.json").read_text())["results"]
            found = [row for row in rows if row["name"] == name] or [
                row for row in rows if row["name"].startswith(name)
            ]
            if len(found) != 1:
                raise SystemExit(f"results/{file}.json: {len(found)} rows begin with {name!r}, expected one")
            values.append(found[0]["value"])
        lines.append(f"| {line.about.format(*values)} | {line.text.format(*values)} |")
    return "\n".join(lines)


def put(text: str, name: str, whole: str, page: Path) -> str:
    """The text with what stands at a name replaced."""
    found = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not found.search(text):
        raise SystemExit(f"{page}: no place for {name}: <!-- {name} --> … <!-- /{name} -->")
    return found.sub(lambda match: f"{match[1]}{whole}\n{match[2]}", text)


def main() -> None:
    page = HERE / "README.md"
    text = page.read_text()
    for file in sorted((HERE / "results").glob("*.json")):
        text = put(text, file.stem, table(json.loads(file.read_text())), page)
    page.write_text(text)
    front = HERE.parent / "README.md"
    front.write_text(put(front.read_text(), "results", summary(), front))


if __name__ == "__main__":
    main()
