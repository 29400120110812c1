"""What `make mutation` found: a table a file, and the survivors that README.md beside this does not explain.

Exit code 1 if there are such.
"""

from __future__ import annotations

import json
import re
import subprocess
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


def survivors(names: list[str]) -> dict[str, str]:
    """Mutant → the row that explains it."""
    found = {}
    for name in names:
        said = subprocess.run(
            [str(Path(sys.executable).parent / "mutmut"), "show", name], capture_output=True, text=True, check=True
        ).stdout  # fmt: skip
        old, new = ("".join(re.findall(rf"^\{sign}(?!\{sign}{{2}})(.*)$", said, re.MULTILINE)) for sign in "-+")
        found[name] = f"| {function(name)} | {change(old, new)} |"
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
            print(f"unclear: {dict(count)}")
        alive = [name for name, code in codes.items() if STATUS.get(code) not in ("killed", "timeout")]
        unexplained += [row for row in survivors(alive).values() if row not in explained]
    for row in unexplained:
        print(row)
    print(f"{len(unexplained)} survivors that {HERE / 'README.md'} does not explain")
    return bool(unexplained)


if __name__ == "__main__":
    sys.exit(main())
