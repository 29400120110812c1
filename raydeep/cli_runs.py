"""The command line's doors to runs that are there: list them, look at one, write its page, compare some."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from raydeep import mirror
from raydeep.cli_cluster import AsJson
from raydeep.errors import RaydeepError

RUN = "Run folder, its address, or the name of a run in the storage of jobs"


def runs(
    storage: Annotated[
        str | None, typer.Argument(help="Folder or address that holds runs; else where jobs keep theirs")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first: how they stand, what came of them."""
    from dataclasses import asdict

    from raydeep.ops import runs as ops
    from raydeep.ops import show
    from raydeep.ops.console import Ui

    folder = ops.storage(storage)
    fresh = storage is None and mirror.address(folder) is None and not folder.exists()
    rows = [] if fresh else ops.listing(folder, time.time())
    if as_json:
        found = {"storage": mirror.name(folder), "runs": [asdict(row) for row in rows]}
        typer.echo(json.dumps(found, indent=2))
    else:
        show.table(rows, mirror.name(folder), Ui())


def show(run: Annotated[str, typer.Argument(metavar="RUN", help=RUN)], as_json: AsJson = False) -> None:
    """Show one run: answer, models, cost and what to type next."""
    from raydeep.ops import runs as ops
    from raydeep.ops import show as screen
    from raydeep.ops.console import Ui

    path = ops.find(run)
    if as_json:
        typer.echo(json.dumps(screen.facts(path, time.time()), indent=2))
    else:
        screen.show(path, time.time(), Ui())


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help=RUN)],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of two runs or more: the page to write [compare.html]")
    ] = None,
) -> None:
    """Write a run's report.html anew; of two or more, compare them.

    From the run folders alone.
    """
    from raydeep.ops import runs as ops

    paths = [ops.find(run) for run in runs]
    if len(paths) > 1:
        from raydeep.report.compare import write_comparison

        for path in paths:
            ops.fetch(path)
        typer.echo(write_comparison(paths, out or Path("compare.html"), [mirror.name(path) for path in paths]))
        return
    from raydeep.report.page import write_report
    from raydeep.run import fetch_light

    if out is not None:
        raise RaydeepError("--out names the page that compares runs; that of one run is always RUN/report.html")
    fetch_light(paths[0])
    page = write_report(paths[0])
    mirror.push(page)
    typer.echo(page)
