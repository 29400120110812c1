"""What `make mutation` found: a table a file, and the survivors that README.md beside this does not explain.

Exit code 1 if there are such.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
MUTANTS = HERE.parent.parent / "mutants"
STATUS = {0: "survived", 1: "killed", 3: "killed", 33: "no tests", 36: "timeout", -24: "timeout", 24: "timeout",
          152: "timeout", 255: "timeout", 5: "no tests"}  # fmt: skip
CONTEXT = 3  # tokens beside a change


def change(old: str, new: str) -> str:
    """A mutation in few words: what was replaced, with a little of what stands beside it."""
    a, b = (re.findall(r"\w+|\s+|[^\w\s]", line.strip()) for line in (old, new))
    head = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest = min(len(a), len(b)) - head
    tail = next((i for i in range(rest) if a[-1 - i] != b[-1 - i]), rest)

    def cut(tokens: list[str]) -> str:
        return (
            "".join(tokens[max(0, head - CONTEXT) : len(tokens) - max(0, tail - CONTEXT)]).strip().replace("|", "\\|")
        )

    return f"`{cut(a)}` → `{cut(b)}`"


def function(name: str) -> str:
    """Of a mutant: module.x_function__mutmut_N, or module.xǁClassǁmethod__mutmut_N."""
    return re.sub(r"^.*\.x(?:_|ǁ)|__mutmut_\d+$", "", name).replace("ǁ", ".")


def rows(file: Path, names: list[str]) -> list[str]:
    """The table rows of mutants of a mutated file: in which function, and what was changed."""
    parts = re.split(r"^ *def (x\S+?__mutmut_\w+)(?=\()", file.read_text(), flags=re.MULTILINE)
    bodies = dict(zip(parts[1::2], (part.splitlines() for part in parts[2::2]), strict=True))
    found = []
    for name in names:
        short = name.rpartition(".")[2]
        old, new = bodies[re.sub(r"\d+$", "orig", short)], bodies[short]
        changed = next((a, b) for a, b in zip(old, new, strict=False) if a != b)
        found.append(f"| {function(name)} | {change(*changed)} |")
    return found


def main() -> int:
    """Print the tables."""
    explained = (HERE / "README.md").read_text()
    unexplained = []
    print("| file | mutants | killed | timeout | no tests | survived | score |\n| --- |" + " ---: |" * 6)
    for file in sorted(MUTANTS.rglob("*.meta")):
        codes = json.loads(file.read_text())["exit_code_by_key"]
        if not codes:
            continue
        count = Counter(STATUS.get(code, f"code {code}") for code in codes.values())
        caught = count["killed"] + count["timeout"]
        told = [len(codes), *(count.pop(kind, 0) for kind in ("killed", "timeout", "no tests", "survived"))]
        name = file.relative_to(MUTANTS).with_suffix("")
        print(f"| {name} | {' | '.join(map(str, told))} | {caught / len(codes):.1%} |")
        if count:
            unexplained.append(f"{name}: neither killed nor survived: {dict(count)}")
        alive = [name for name, code in codes.items() if STATUS.get(code) in ("survived", "no tests")]
        unexplained += [row for row in rows(file.with_suffix(""), alive) if row not in explained]
    for row in unexplained:
        print(row)
    print(f"{len(unexplained)} survivors that {HERE / 'README.md'} does not explain")
    return bool(unexplained)


if __name__ == "__main__":
    sys.exit(main())
