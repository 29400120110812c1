"""make audit, make sbom and make mutation: what they say and how they exit, with made answers of their clients."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def audit() -> ModuleType:
    return load(".ci/audit.py")


@pytest.fixture
def client(audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program in the place of uv (which runs pip-audit, too)."""

    def put(code: str) -> None:
        file = tmp_path / "uv"
        file.write_text(f"#!{sys.executable}\nimport sys\nwanted = sys.stdin.read().split()\n{code}\n")
        file.chmod(0o755)
        monkeypatch.setattr(audit, "UV", str(file))
        monkeypatch.setattr(audit, "PIP_AUDIT", [str(file)])

    return put


def test_every_pin_and_every_installed_package_is_looked_at_but_raydeep(audit: ModuleType) -> None:
    pins = audit.pins()
    assert set((ROOT / "constraints.txt").read_text().split()) <= set(pins)
    assert any(pin.startswith("ray==") for pin in pins)
    assert not any(pin.startswith("raydeep==") for pin in pins)


TOLD = {"dependencies": [
    {"name": "a", "version": "1", "vulns": []}, {"name": "b", "version": "2", "vulns": [{"id": "X-1"}, {"id": "X-2"}]},
    {"name": "c", "skip_reason": "not found"},
]}  # fmt: skip


def test_vulnerable_releases_are_those_that_pip_audit_names(audit: ModuleType, client: Callable[[str], None]) -> None:
    client(f"print('some words'); print({json.dumps(json.dumps(TOLD))})")
    assert audit.vulnerable(["a==1", "b==2", "c==3"]) == {"b==2": ["X-1", "X-2"]}
    client("sys.exit('no route')")
    with pytest.raises(OSError, match="no route"):
        audit.vulnerable(["a==1"])


def test_yanked_releases_are_those_that_uv_warns_of(audit: ModuleType, client: Callable[[str], None]) -> None:
    client('for pin in wanted:\n    print(f"warning: `{pin}` is yanked (reason: \\"broken\\")", file=sys.stderr)')
    assert audit.yanked(["a==1", "b==2"]) == {"a==1": ['"broken"'], "b==2": ['"broken"']}
    client("print('a==1')")
    assert audit.yanked(["a==1"]) == {}
    client("sys.exit('no index')")
    with pytest.raises(OSError, match="no index"):
        audit.yanked(["a==1"])


def none(_: list[str]) -> dict[str, list[str]]:
    return {}


def only_known(wanted: list[str]) -> dict[str, list[str]]:
    """Of an index that has data, and nothing bad among what is asked for."""
    return {pin: ["bad"] for pin in wanted} if len(wanted) == 1 else {}


def everything(wanted: list[str]) -> dict[str, list[str]]:
    return {pin: ["X-1"] for pin in wanted}


def down(_: list[str]) -> dict[str, list[str]]:
    raise OSError("no route")


@pytest.mark.parametrize(
    ("vulnerable", "yanked", "code", "said"),
    [
        (only_known, only_known, 0, "vulnerabilities: 0 in "),
        (none, only_known, 3, "vulnerabilities: no data"),  # silence about a known one is no answer
        (only_known, down, 3, "yanked releases: no data: the index"),
        (down, down, 3, "vulnerabilities: no data"),
        (everything, only_known, 1, "ray=="),
        (none, everything, 1, "vulnerabilities: no data"),  # what was found counts, whatever could not be had
    ],
)
def test_clean_bad_and_no_data_have_exit_codes_of_their_own(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    vulnerable: Any, yanked: Any, code: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(audit, "vulnerable", vulnerable)
    monkeypatch.setattr(audit, "yanked", yanked)
    assert audit.main() == code
    assert said in "".join(capsys.readouterr())


def test_floors_hold_and_one_that_does_not_is_told(audit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"ray", "torch", "pyarrow"} <= set(audit.FLOORS)
    assert audit.undercut() == []
    monkeypatch.setattr(audit, "FLOORS", {"ray": ("999", "X-1")})
    installed, allowed = audit.undercut()
    assert "is installed, below 999: X-1" in installed
    assert allowed.startswith("pyproject.toml allows ray 2")


def test_licences_are_counted_and_strict_ones_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    components = [
        {"name": "a", "version": "1", "licenses": [{"license": {"id": "MIT"}}]},
        {"name": "b", "version": "2", "licenses": [{"license": {"name": "License :: OSI Approved :: MIT"}}]},
        {"name": "c", "version": "3", "licenses": [{"expression": "LGPL-2.1-only OR MIT"}]},
        {"name": "d", "version": "4"},
    ]
    file = tmp_path / "sbom.json"
    file.write_text(json.dumps({"components": components}))
    load(".ci/licences.py").main(file)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "   2  MIT", "   1  LGPL-2.1-only OR MIT: c 3", "   1  not stated: d 4",
    ]  # fmt: skip


def test_mutations_are_told_in_few_words() -> None:
    report = load("tests/mutation/report.py")
    assert report.change("for a in zip(x, y, strict=True):", "for a in zip(x, y, ):") == "`y, strict=True):` → `y, ):`"
    assert report.change("  if (base <= point):", "  if (base < point):") == "`base <= point)` → `base < point)`"
    assert report.change("a | b", "a & b") == r"`a \| b` → `a & b`"
    assert report.function("raydeep.search.ledger.xǁLedgerǁ__init____mutmut_3") == "Ledger.__init__"
    assert report.function("raydeep.data.order.x__rng__mutmut_12") == "_rng"
