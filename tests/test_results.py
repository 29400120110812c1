"""Tables of measurements say what the saved results say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/report.py on a copy of the pages."""
    found = importlib.util.spec_from_file_location("bench_report", ROOT / "benchmarks" / "report.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    here = tmp_path / "benchmarks"
    here.mkdir()
    (here / "results").symlink_to(ROOT / "benchmarks" / "results")
    for page in ("README.md", "benchmarks/README.md"):
        (tmp_path / page).write_text((ROOT / page).read_text())
    monkeypatch.setattr(module, "HERE", here)
    return module


def test_the_tables_are_those_that_make_bench_report_writes(report, tmp_path):
    report.main()
    for page in ("README.md", "benchmarks/README.md"):
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), f"{page}: make bench-report"


def test_no_table_is_empty():
    for page in ("README.md", "benchmarks/README.md"):
        found = re.findall(r"<!-- ([\w-]+) -->\n(.*?)<!-- /\1 -->", (ROOT / page).read_text(), re.DOTALL)
        assert found
        assert [name for name, table in found if not table.strip()] == []


def test_a_table_that_was_changed_by_hand_is_seen(report, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(page.read_text().replace("35.8%", "75.8%"))
    report.main()
    assert page.read_text() == (ROOT / "README.md").read_text()
    assert "35.8%" in page.read_text()


def test_a_result_that_is_gone_is_told(report, monkeypatch):
    line = report.SUMMARY[0]
    monkeypatch.setattr(report, "SUMMARY", [line._replace(values=[("scarce", "cifar10: no such")])])
    with pytest.raises(SystemExit, match=r"results/scarce\.json: 0 rows begin with 'cifar10: no such', expected one"):
        report.summary()
