"""Known vulnerabilities and yanked releases among what raydeep is installed with: `make audit`.

Looked at are the pins of constraints.txt and what is installed beside this Python. Two clients do the asking, pip-audit
for vulnerabilities and uv for yanked releases, of the index that each is set up for. A mirror may keep neither: so each
is first asked for a release that is known to be bad, and unless it says so, its silence means nothing.

Exit code: 0 clean; 1 something was found, or a floor is undercut; 3 nothing was found, but not all data could be had.
"""

from __future__ import annotations

import importlib.metadata as metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from raydeep.ops import health

ROOT = Path(__file__).parent.parent
UV = str(Path(sys.executable).parent / "uv")
PIP_AUDIT = [UV, "tool", "run", "--quiet", "--constraints", str(ROOT / ".ci" / "tools.txt"), "--from", "pip-audit",
             "pip-audit", "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]  # fmt: skip
VULNERABLE, YANKED = "jinja2==3.1.2", "attrs==21.1.0"  # CVE-2024-22195 and others; not importable on Python 3.4
# Least version of what reads or runs what others made; below it, an advisory concerns how raydeep uses the package.
FLOORS = {name: (".".join(map(str, at)), why) for name, (at, why) in health.FLOORS.items()}
FLOORS["pyarrow"] = ("14.0.1", "CVE-2023-47248: a Parquet file could run code")


def pins() -> list[str]:
    """NAME==VERSION of each pin and of each installed distribution, but raydeep itself."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = {line.split(";")[0].strip() for line in lines if "==" in line and not line.startswith("#")}
    found |= {f"{canonicalize_name(d.metadata['Name'])}=={d.version}" for d in metadata.distributions()}
    return sorted(pin for pin in found if not pin.startswith("raydeep=="))


def vulnerable(wanted: list[str]) -> dict[str, list[str]]:
    """Each release with known vulnerabilities → their names.

    Raises:
        OSError: the index gives no such data.
    """
    done = subprocess.run([*PIP_AUDIT, "--requirement", "/dev/stdin"], input="\n".join(wanted), text=True,
                          capture_output=True)  # fmt: skip
    try:
        told = json.loads(done.stdout[done.stdout.index("{") :])["dependencies"]
    except ValueError:
        raise OSError(done.stderr.strip().splitlines()[-1:] or "pip-audit gave no answer") from None
    return {f"{d['name']}=={d['version']}": [v["id"] for v in d["vulns"]] for d in told if d.get("vulns")}


def yanked(wanted: list[str]) -> dict[str, list[str]]:
    """Each yanked release → why.

    Raises:
        OSError: the index doesn't answer.
    """
    done = subprocess.run([UV, "pip", "compile", "--no-deps", "--no-header", "-"], input="\n".join(wanted), text=True,
                          capture_output=True)  # fmt: skip
    if done.returncode:
        raise OSError(done.stderr.strip().splitlines()[-1])
    return {pin: [why] for pin, why in re.findall(r"`(\S+?)` is yanked(?: \(reason: (.*)\))?", done.stderr)}


def undercut() -> list[str]:
    """Floors that what is installed, or what pyproject.toml allows, lies below."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = {canonicalize_name(r.name): r for r in map(Requirement, project["dependencies"])}
    found = []
    for name, (floor, why) in FLOORS.items():
        least = min(Version(part.version) for part in allowed[name].specifier if part.operator in (">=", "=="))
        for what, version in ((f"{name} {metadata.version(name)} is installed", Version(metadata.version(name))),
                              (f"pyproject.toml allows {name} {least}", least)):  # fmt: skip
            if version < Version(floor):
                found.append(f"{what}, below {floor}: {why}")
    return found


def main() -> int:
    """Ask, and tell."""
    wanted, bad, blind = pins(), undercut(), False
    for what, ask, known in (("vulnerabilities", vulnerable, VULNERABLE), ("yanked releases", yanked, YANKED)):
        try:
            if not ask([known]):
                raise OSError(f"it does not know of {known}")
            found = ask(wanted)
        except OSError as err:
            blind = True
            print(f"{what}: no data: the index that this machine is set up for gives none ({err})")
            continue
        print(f"{what}: {len(found)} in {len(wanted)} releases")
        bad += [f"{pin}: {', '.join(filter(None, why)) or what}" for pin, why in found.items()]
    for name, (floor, why) in FLOORS.items():
        print(f"floor {name} >= {floor} ({why}): {metadata.version(name)} is installed")
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 3 if blind else 0


if __name__ == "__main__":
    sys.exit(main())
