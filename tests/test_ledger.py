"""The ledger: its lines never change, each comes once, and it belongs to one search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raydeep.errors import JobError
from raydeep.search.ledger import SCHEMA_VERSION, Ledger

FACTS = {"seed": 3, "space": {"prune.sparsity": [0.5]}}


def rung(trial: int, rung: int = 0, **more: Any) -> dict[str, Any]:
    return {"trial": trial, "event": "rung", "rung": rung, **more}


def end(trial: int, status: str = "done") -> dict[str, Any]:
    return {"trial": trial, "event": "end", "status": status}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def on_disk(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_first_line_says_what_the_others_depend_on(path: Path) -> None:
    ledger = Ledger(path, FACTS)
    assert on_disk(path) == [{"schema": SCHEMA_VERSION, **FACTS}]
    assert (ledger.lines, ledger.rows, ledger.rungs, ledger.path) == ([], {}, set(), path)


def test_lines_are_on_disk_when_add_returns_and_come_back_when_it_is_opened_again(path: Path) -> None:
    rows = [rung(0), rung(1, val_accuracy=0.5), rung(1, 1), end(1), end(0, "failed")]
    ledger = Ledger(path, FACTS)
    ledger.add(*rows[:2])
    assert on_disk(path)[1:] == rows[:2]
    ledger.add(*rows[2:])
    assert on_disk(path)[1:] == rows
    again = Ledger(path, FACTS)
    for found in (ledger, again):
        assert found.lines == rows
        assert found.rows == {1: rows[3], 0: rows[4]}
        assert found.rungs == {(0, 0), (1, 0), (1, 1)}
    assert on_disk(path)[1:] == rows  # opening writes nothing


def test_ends_are_told_by_number_and_status(path: Path) -> None:
    ledger = Ledger(path, FACTS)
    ledger.add(end(4), end(1, "failed"), end(2), end(0, "failed"), rung(9))
    assert ledger.done() == [end(2), end(4)]
    assert ledger.failed() == [end(0, "failed"), end(1, "failed")]


def test_a_line_that_a_kill_has_torn_is_left_out_and_closed_off(path: Path) -> None:
    Ledger(path, FACTS).add(rung(0), rung(1))
    path.write_bytes(path.read_bytes()[:-9])
    ledger = Ledger(path, FACTS)
    assert ledger.lines == [rung(0)]
    ledger.add(rung(1))
    assert Ledger(path, FACTS).lines == [rung(0), rung(1)]


@pytest.mark.parametrize("reopened", [False, True])
def test_nothing_is_written_twice(path: Path, reopened: bool) -> None:
    ledger = Ledger(path, FACTS)
    ledger.add(rung(0), rung(1), end(1))
    if reopened:
        ledger = Ledger(path, FACTS)
    before = path.read_bytes()
    with pytest.raises(AssertionError, match=r"^trial 1 is in the ledger already$"):
        ledger.add(rung(1, 1))
    with pytest.raises(AssertionError, match=r"^trial 1 is in the ledger already$"):
        ledger.add(end(1))
    with pytest.raises(AssertionError, match=r"^trial 0 has rung 0 already$"):
        ledger.add(rung(0))
    assert path.read_bytes() == before
    ledger.add(rung(0, 1), end(0))
    assert ledger.rungs == {(0, 0), (1, 0), (0, 1)}


@pytest.mark.parametrize(
    ("facts", "keys"),
    [
        ({**FACTS, "seed": 4}, "seed"),
        ({"seed": 3}, "space"),
        ({**FACTS, "sampler": "tpe"}, "sampler"),
        ({"seed": 4, "sampler": "tpe"}, "sampler, seed, space"),
    ],
)
def test_the_ledger_of_another_search_is_refused_with_the_keys(path: Path, facts: dict[str, Any], keys: str) -> None:
    Ledger(path, FACTS).add(rung(0))
    before = path.read_bytes()
    with pytest.raises(JobError) as caught:
        Ledger(path, facts)
    assert str(caught.value) == f"{path}: made by another search (differs in {keys}); start a new run"
    assert path.read_bytes() == before


def test_another_schema_is_refused(path: Path) -> None:
    for head in ({"schema": SCHEMA_VERSION + 1, **FACTS}, FACTS):
        path.write_text(json.dumps(head) + "\n")
        with pytest.raises(JobError, match=r"made by another search \(differs in schema\); start a new run"):
            Ledger(path, FACTS)
