"""The trial ledger: append-only JSONL, fsynced, one writer. What a search resumes from, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raydeep.disk import append_line, read_lines
from raydeep.errors import JobError

SCHEMA_VERSION = 2


class Ledger:
    """What became of each trial, in the order it was known.

    The first line holds what the trials' meaning depends on. Then there is a line for each rung that a trial came
    through (`event: rung`), and one for its end (`event: end`, `status: done` or
    `failed`, `stopped`: why). Times (`seconds`, `cpu_seconds`, `overhead_seconds`, `at`) are all that two searches of
    one seed on one actor differ in.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """Open or start a ledger.

        Args:
            path: of `ledger.jsonl`.
            facts: what the trials' meaning depends on (space, seed, dense model); must not change.

        Raises:
            JobError: the ledger belongs to another search.
        """
        self.path = path
        lines = read_lines(path)
        if not lines:
            append_line(path, {"schema": SCHEMA_VERSION, **facts})
        else:
            old = {k: v for k, v in lines[0].items() if k != "schema"}
            changed = sorted(k for k in {*old, *facts} if old.get(k) != facts.get(k))
            if lines[0].get("schema") != SCHEMA_VERSION or changed:
                raise JobError(
                    f"{path}: made by another search (differs in {', '.join(changed) or 'schema'}); start a new run"
                )
        self.lines = [row for row in lines if "trial" in row]
        self.rows: dict[int, dict[str, Any]] = {row["trial"]: row for row in self.lines if row["event"] == "end"}
        self.rungs = {(row["trial"], row["rung"]) for row in self.lines if row["event"] == "rung"}

    def add(self, *rows: dict[str, Any]) -> None:
        """Append lines; once written they never change, and a trial has one for each rung and one end."""
        for row in rows:
            assert row["trial"] not in self.rows, f"trial {row['trial']} is in the ledger already"
            if row["event"] == "rung":
                rung = (row["trial"], row["rung"])
                assert rung not in self.rungs, f"trial {row['trial']} has rung {row['rung']} already"
                self.rungs.add(rung)
            else:
                self.rows[row["trial"]] = row
            self.lines.append(row)
        append_line(self.path, *rows)

    def done(self) -> list[dict[str, Any]]:
        """The ends of finished trials, by number."""
        return [row for _, row in sorted(self.rows.items()) if row["status"] == "done"]

    def failed(self) -> list[dict[str, Any]]:
        """The ends of failed trials, by number."""
        return [row for _, row in sorted(self.rows.items()) if row["status"] == "failed"]
