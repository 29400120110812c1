"""The command line's door to prediction."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raydeep import mirror
from raydeep.cli_cluster import Sets
from raydeep.errors import JobError, RaydeepError, shown

if TYPE_CHECKING:
    from raydeep.deploy.predict import Prediction


def predict(
    model: Annotated[str, typer.Argument(help="Model folder (RUN/models/t012), a run with one answer, or an address")],
    source: Annotated[
        list[str],
        typer.Argument(
            help="Pictures, folders of them, Parquet, tars, tables, shards, addresses of these, torchvision:NAME, …"
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line")] = False,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Label on Ray, all cores, into this Parquet file or s3:// address"),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only pictures of this split: train, val or test")] = None,
    top: Annotated[int, typer.Option(min=1, help="With --out: likeliest classes that a row lists")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that the network takes at once")] = 32,
    workers: Annotated[int | None, typer.Option(min=1, help="With --out: processes; one a core unless given")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --out")] = False,
    sets: Sets = None,
) -> None:
    """Label pictures with an exported model. Exit code 2 if some can't be read: the others are labelled."""
    from raydeep.ops import predicting

    if out is not None and as_json:
        raise JobError("--json prints lines, --out writes a file: give one of them")

    def took(folder: Path) -> None:
        if folder != mirror.place(model, "MODEL").expanduser():
            typer.echo(f"model      {mirror.name(folder)}", err=True)

    if out is None:
        rows = predicting.predict(model, source, split=split, batch_size=batch_size, sets=sets or [], took=took)
        bad = _print(rows, as_json)
    else:
        from raydeep.ops.console import Ui

        ui = Ui()
        found = predicting.predict(
            model, source, out=out, split=split, batch_size=batch_size, sets=sets or [], top=top, workers=workers,
            force=force, ui=ui, took=took, mute=True,
        )  # fmt: skip
        ui.say(f"predictions  {mirror.name(found.path)}")
        bad = found.bad
    if bad:
        raise RaydeepError(
            f"{bad} of the pictures can't be read; the others are labelled"
            f"{'' if out is None else ' (column error says why)'}"
        )


def _print(rows: Iterable[Prediction], as_json: bool) -> int:
    """A line a picture; gives how many can't be read."""
    bad = 0
    for row in rows:
        bad += row.error is not None
        if as_json:
            typer.echo(json.dumps(row._asdict()))
        elif row.error is not None:
            typer.echo(f"{shown(row.path)}\tcan't be read: {shown(row.error)}", err=True)
        else:
            typer.echo(f"{shown(row.path)}\t{shown(str(row.label))}\t{row.probability:.4f}")
    return bad
