"""Licences of what an SBOM lists, and which of them ask more of who passes the packages on: `make sbom`."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

# Copyleft, and licences that allow less than open source does.
STRICT = re.compile(r"GPL|MPL|EPL|CDDL|EUPL|Mozilla|Proprietary|NVIDIA|LicenseRef", re.IGNORECASE)
CLASSIFIER = re.compile(r"^License :: (OSI Approved :: )?")


def names(component: dict[str, Any]) -> str:
    """What a component says of its licence, in few words."""
    found = []
    for one in component.get("licenses", []):
        said = one.get("expression") or one["license"].get("id") or one["license"].get("name", "")
        line = CLASSIFIER.sub("", said.strip().splitlines()[0] if said.strip() else "")
        if line and line not in found:
            found.append(line[:60])
    return "; ".join(found) or "not stated"


def main(sbom: Path) -> None:
    """Print them."""
    by_name = defaultdict(list)
    for component in json.loads(sbom.read_text())["components"]:
        by_name[names(component)].append(f"{component['name']} {component.get('version', '')}".strip())
    print(f"{sbom}: {sum(map(len, by_name.values()))} components")
    for name, components in sorted(by_name.items(), key=lambda item: -len(item[1])):
        told = ", ".join(sorted(components)) if STRICT.search(name) or name == "not stated" else ""
        print(f"{len(components):4}  {name}{': ' if told else ''}{told}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
