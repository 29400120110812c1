"""Scaling: a search and the data plane on 1 to 16 raylets of this machine, and 8 to 512 GPUs on paper.

Nodes are raylets with logical CPUs, work is a sleep as long as the real work would take: what is left is what the
driver, the ledger, the planning and Ray cost, and where they stop scaling. `--only` runs parts; with --save the others
keep their saved rows.

    search   trials through the real engine, ledger and Tune loop, by number of nodes
    ceiling  trials that do nothing: how many rungs a second one driver gets through, and from which load on it is full
    engine   the engine and ledger alone, without Ray, by number of trials
    plan     what a worker computes before an epoch, by rows and workers
    stream   pictures through Ray's tasks, by number of nodes
    files    what is looked at or written all the time
    votes    the all-reduce of 12 bytes that every step of a training begins
    model    ResNet-50 on paper: scale_model.py
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import scale_data as data
import scale_model as model
import scale_search as search

Rows = Iterator[dict[str, Any]]
NODES = [1, 2, 4, 8, 16]


def search_part(args: Any) -> Rows:
    """The search by number of nodes."""
    seconds = search.lengths(Path(args.ledger)) if args.ledger else None
    yield from search.rows(args.nodes or ([1, 4] if args.quick else NODES), args.window, args.stretch, seconds)


def ceiling_part(args: Any) -> Rows:
    """Trials that do nothing."""
    yield from search.ceiling_rows(*((300, ["tpe"]) if args.quick else (1000, ["random", "tpe"])))


def engine_part(args: Any) -> Rows:
    """The engine alone."""
    yield from search.engine_rows([100, 300] if args.quick else [100, 300, 1000])


def plan_part(args: Any) -> Rows:
    """Planning."""
    sets, worlds = (["60,000", "1.28 M"], [1, 512]) if args.quick else (list(data.SETS), [1, 8, 64, 512])
    yield from data.plan_rows(sets, worlds, 3)


def stream_part(args: Any) -> Rows:
    """Streaming."""
    nodes = args.nodes or ([1, 4] if args.quick else NODES[:-1])  # of 16 two cores say nothing
    yield from data.stream_rows(nodes, 2 if args.quick else 3, 40 if args.quick else 100)


def files_part(_: Any) -> Rows:
    """Files."""
    yield from data.file_rows(50)


def votes_part(args: Any) -> Rows:
    """Votes."""
    yield from data.vote_rows([2, 4] if args.quick else [2, 4, 8], 100)


PARTS: dict[str, Callable[[Any], Rows]] = {
    "search": search_part, "ceiling": ceiling_part, "engine": engine_part, "plan": plan_part, "stream": stream_part,
    "files": files_part, "votes": votes_part,
}  # fmt: skip


def measured(rows: list[dict[str, Any]]) -> model.Measured:
    """What the model takes from the rows; what is not among them stays as it is."""
    found: dict[str, float] = {}
    for row in rows:
        if row["part"] == "plan" and row["name"].startswith("1.28 M rows, streamed, 512"):
            found["order_s"] = row["everyone_s"]
        elif row["part"] == "stream":  # of the most nodes; copying fills the machine, and changes where tasks go
            found |= {"unit_cpu_s": row["cpu_s"]} if "MiB" in row["name"] else {"away": row["away"]}
        elif row["part"] == "votes" and row["name"].startswith("2 "):  # more than the cores wait for each other
            found["hop_s"] = row["hop_s"]
    return model.Measured()._replace(**found)


def main() -> None:
    """Run the parts."""
    args = harness.arguments(
        __doc__,
        only={"nargs": "+", "choices": [*PARTS, "model"], "default": [*PARTS, "model"], "help": "parts; all"},
        nodes={"nargs": "+", "type": int, "help": f"of search and stream ({' '.join(map(str, NODES))})"},
        window={"type": float, "default": 0, "help": "seconds of the search that are measured (30; --quick: 10)"},
        stretch={"type": float, "default": 1, "help": "steps of the search are so many times as long"},
        ledger={"metavar": "FILE", "help": "a search whose median rungs are the steps (else those of the digits)"},
    )
    args.window = args.window or (10 if args.quick else 30)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that clusters are stopped
    saved = harness.RESULTS / "scale.json"
    old = json.loads(saved.read_text())["results"] if saved.exists() and args.save else []
    found = {(row["part"], row["name"]): row for row in old}
    order = [*PARTS, *model.PARTS]
    for part in args.only:
        made = PARTS[part](args) if part in PARTS else iter(model.rows(measured(list(found.values()))))
        try:
            for row in made:
                found[row["part"], row["name"]] = row
        finally:  # what is done is kept
            rows = sorted(found.values(), key=lambda row: (order.index(row["part"]), row.get("nodes", 0)))  # stable
            harness.finish("scale", rows, args)


if __name__ == "__main__":
    main()
