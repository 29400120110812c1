"""The trial ledger: append-only JSONL, fsynced, one writer. What a search resumes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raydeep.errors import JobError
from raydeep.run import append_line, read_lines

SCHEMA_VERSION = 1


class Ledger:
    """Finished and failed trials of a search, in the order they ended."""

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
        self.rows: dict[int, dict[str, Any]] = {row["trial"]: row for row in lines if "trial" in row}

    def add(self, row: dict[str, Any]) -> None:
        """Append a trial; once written it is never changed."""
        assert row["trial"] not in self.rows, f"trial {row['trial']} is in the ledger already"
        append_line(self.path, row)
        self.rows[row["trial"]] = row

    def done(self) -> list[dict[str, Any]]:
        """The finished trials, by number."""
        return [row for _, row in sorted(self.rows.items()) if row["status"] == "done"]

    def failed(self) -> list[dict[str, Any]]:
        """The failed trials, by number."""
        return [row for _, row in sorted(self.rows.items()) if row["status"] == "failed"]
