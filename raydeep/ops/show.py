"""Runs on the terminal: the table of a storage folder, and one run on one screen."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from raydeep import mirror
from raydeep.errors import RaydeepError
from raydeep.ops import runs
from raydeep.ops.console import Ui
from raydeep.report import folder, tables, words

STYLES = {"running": "green", "failed": "red", "damaged": "red", "stopped": "yellow", "unknown": "yellow"}
COLUMNS = ("run", "kind", "status", "progress", "dense", "answer", "smallest", "age")


def age(seconds: float | None) -> str:
    """How long ago, in one unit: 3 min, 2 days."""
    if seconds is None:
        return ""
    for unit, scale in (("day", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= scale:
            count = int(seconds // scale)
            return f"{count} {unit}{'s' if unit == 'day' and count > 1 else ''}"
    return f"{int(seconds)} s"


def cells(row: runs.Row) -> list[str]:
    """One row of the table of runs, as text, by COLUMNS."""
    return [
        row.name, row.kind or "", row.status, progress(row), _percent(row.test_accuracy, row.val_accuracy),
        _model(row.answer, row.answer_test_accuracy, row.answer_bytes),
        _model(row.smallest, row.smallest_test_accuracy, row.smallest_bytes), age(row.age_s),
    ]  # fmt: skip


def progress(row: runs.Row) -> str:
    """Trials of a search once there are any, else epochs."""
    done, total, what = row.trials, row.trials_of, "trials"
    if not done and not (row.trials is not None and row.status == "finished"):
        done, total, what = row.epochs, row.epochs_of, "epochs"
    if done is None:
        return ""
    failed = f", {row.trials_failed} failed" if what == "trials" and row.trials_failed else ""
    return f"{done}{'' if total is None else f'/{total}'} {what}{failed}"


def _model(label: str | None, accuracy: float | None, size: int | None) -> str:
    return f"{_percent(accuracy, None)} at {words.size(size)}".strip() if label else ""


def _percent(test: float | None, val: float | None) -> str:
    if test is not None:
        return f"{test:.2%}"
    return "" if val is None else f"{val:.2%} val"


def table(rows: Sequence[runs.Row], where: str, ui: Ui) -> None:
    """Print the runs of a storage folder, and below them what there is to say about those that went wrong."""
    if not rows:
        ui.say(f"no runs in {where}")
        return
    out = Table(header_style="bold", box=None, pad_edge=False)
    for column in COLUMNS:
        out.add_column(column, justify="left" if column in ("run", "kind", "status") else "right", overflow="fold")
    for row in rows:
        name, kind, status, *rest = cells(row)
        out.add_row(Text(name), kind, Text(status, STYLES.get(status, "")), *(Text(text) for text in rest))
    ui.console.print(out, soft_wrap=False)
    told = [row for row in rows if row.detail and row.status not in ("running", "finished")]
    if told:
        ui.say("")
    for row in told:
        ui.say(f"{row.name}: {row.detail}")
    ui.say("")
    ui.say(f"{len(rows)} run{'' if len(rows) == 1 else 's'} in {where}; more of one: raydeep show RUN")


def facts(path: Path, now: float) -> dict[str, Any]:
    """All that `raydeep show` tells of a run, as plain values.

    Raises:
        RaydeepError: the folder is no run, or one of its files can't be parsed.
    """
    row = runs.read(path, now)
    run = folder.read_run(path)
    assert row is not None  # read_run would have raised
    if row.status == "damaged":
        raise RaydeepError(f"{row.path}: {row.detail}; restore the file, or start a new run")
    headline, detail = words.answer(run)
    models = [r for r in [run.dense, *run.models] if r]
    known = run.provenance.get("dataset")
    return {
        **asdict(row),
        "headline": headline,
        "explained": detail,
        "command": run.provenance.get("command"),
        "dataset": known if isinstance(known, dict) else {},
        "job_values": run.job,
        "start": run.provenance.get("start"),
        "front": models,
        "best": (run.front or {}).get("best") or {},
        "unverified": (run.front or {}).get("unverified") or [],
        "cost": dict(tables.cost(run)),
        "next": _next(row, models),
    }


def _next(row: runs.Row, models: list[dict[str, Any]]) -> dict[str, str]:
    """What can be typed now, by what it does."""
    path = shlex.quote(row.path)
    if row.status == "running":
        return {"look again": f"raydeep show {path}"}
    if row.status != "finished":
        return {"go on": f"raydeep {row.kind} --resume {path}", "page so far": f"raydeep report {path}"}
    label = row.answer or (models[-1]["label"] if models else "dense")
    model = shlex.quote(f"{row.path}/models/{label}")
    out = {"label pictures": f"raydeep predict {model} PICTURES…"}
    if row.kind == "train":
        out["compress"] = f"raydeep search {path}/job.yaml --from {path}"
    else:
        out["another trial"] = f"raydeep export {path} --trial N"
    return out | {"compare": f"raydeep report {path} OTHER_RUN"}


def show(path: Path, now: float, ui: Ui) -> None:
    """Print one run on one screen."""
    found = facts(path, now)
    row = runs.Row(**{name: found[name] for name in runs.Row.__dataclass_fields__})
    ago = f"{age(row.age_s)} ago" if row.age_s is not None else ""
    status = row.status + (f" ({row.detail})" if row.detail else "")
    ui.say("   ".join(part for part in (row.name, row.kind, status, progress(row), ago) if part))
    ui.say("")
    ui.say(found["headline"])
    ui.say(found["explained"])
    ui.say("")
    for name, value in _job(found["job_values"], found["dataset"], row.kind or "", found["start"]):
        ui.say(f"{name:<10} {value}")
    dense, models = (found["front"] or [None])[0], found["front"][1:]
    if dense is not None and dense.get("label") == "dense":
        ui.say("")
        try:
            ui.front(dense, models)
        except (KeyError, TypeError, ValueError) as err:
            raise RaydeepError(f"{row.path}/front.json: a model's row lacks what it should hold: {err!r}") from None
        ui.say("")
    for limit, label in found["best"].items():
        ui.say(f"best with {limit}: {label}")
    ui.say(f"{'cost':<10} {', '.join(f'{name}: {value}' for name, value in found['cost'].items()) or '–'}")
    if found["front"]:
        ui.say(f"{'models':<10} {row.path}/models/")
    if mirror.exists(path / "report.html"):
        ui.say(f"{'report':<10} {row.path}/report.html")
    for what, command in found["next"].items():
        ui.say(f"{what + ':':<16} {command}")


def _job(job: dict[str, Any], dataset: dict[str, Any], kind: str, start: str | None) -> list[tuple[str, str]]:
    """The job in a few lines; `start`: the run whose dense model it took."""
    model, data, train, search = (
        part if isinstance(part := job.get(name), dict) else {} for name in ("model", "data", "train", "search")
    )
    rows, shape, classes = (dataset.get(key) for key in ("rows", "image", "classes"))
    source = [str(data.get("source", "?")), *([str(data["path"])] if data.get("path") else [])]
    if isinstance(rows, dict):
        source.append(", ".join(f"{n} {split}" for split, n in rows.items()) + " pictures")
    if isinstance(shape, list) and isinstance(classes, list):
        source.append(f"{'×'.join(map(str, shape))}, {len(classes)} classes")
    taught = [f"{train[key]} {said}" for key, said in (("epochs", "epochs"), ("optimizer", "")) if key in train]
    if "batch_size" in train:
        taught.append(f"batches of {train['batch_size']}")
    out = [
        ("data", "; ".join(source)),
        ("training", "; ".join([str(model.get("name", "?")), ", ".join(map(str.strip, taught))])),
    ]
    if start:
        out[1] = ("training", f"{model.get('name', '?')}; as in {start}")
    if kind == "search":
        space = search.get("space")
        aims = search.get("objectives")
        out.append((
            "search",
            f"{search.get('trials', '?')} trials of {', '.join(space) if isinstance(space, dict) else '?'}; "
            f"{', '.join(f'{name} {mode}' for name, mode in aims.items()) if isinstance(aims, dict) else ''}",
        ))  # fmt: skip
    return out
