"""The page: one self-contained HTML file, made from a run folder alone."""

from __future__ import annotations

from pathlib import Path

import jinja2
from plotly.offline import get_plotlyjs

from raydeep.disk import write_bytes
from raydeep.report import pictures, search, tables, words
from raydeep.report.folder import Run, read_run
from raydeep.report.plots import plot_data


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder, whole or not at all.

    Reads only the folder. The page loads nothing: plotly.js stands in it, and its content security policy
    forbids the rest.

    Args:
        run_dir: Run folder; what it does not hold yet is left out of the page.

    Returns:
        Path of the page.

    Raises:
        RaydeepError: If the folder is no run, or one of its whole files can't be parsed.
    """
    run_dir = Path(run_dir)
    path = run_dir / "report.html"
    write_bytes(path, render(read_run(run_dir), run_dir.name).encode())
    return path


def templates() -> jinja2.Environment:
    """What the templates of the pages are rendered with."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # tojson escapes <, >, & and ' so that no text can close the <script> block
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {
        "percent": words.percent,
        "size": words.size,
        "times": words.times,
        "speed": words.speed,
        "bits": words.bits,
        "duration": words.duration,
        "sentence": words.sentence,
        "short": lambda value: "" if value is None else f"{value:.6g}",
    }
    return environment


def render(run: Run, folder: str) -> str:
    """The page of a run as text; `folder` names the run where its provenance does not."""
    headline, detail = words.answer(run)
    data = plot_data(run)
    rungs = data["points"]["rungs"]
    drawn = any(data[name] for name in ("curves", "confusion", "layers", "volume", "input")) or data["points"]["bytes"]
    page = templates().get_template("page.html.j2")
    return page.render(
        title=str(run.job.get("name") or folder),
        run_id=str(run.provenance.get("id") or folder),
        skipped=run.skipped,
        headline=headline,
        detail=detail,
        data=data,
        words={measure["name"]: measure["words"] for measure in data["measures"]},
        aim=search.aim(run),
        hollow=any(n and n > 1 for n in rungs) and any(rungs[i] == 1 for i in data["front"]),
        progress=search.progress(run),
        volume=search.volume(run),
        best=search.best(run),
        failed=len(run.failed),
        last_epoch=run.metrics[-1] if run.metrics else {},
        epochs=len(run.metrics),
        models=tables.models(run, data),
        swept=tables.swept(run),
        compressed=tables.compressed(run),
        verification=tables.verification(run),
        split=str((run.evaluation or {}).get("split") or "test"),
        trials=tables.trials(run, data),
        most_trials=tables.MOST_TRIALS,
        errors=pictures.errors(run),
        augmentation=pictures.augmentation(run),
        input_verdict=str(run.provenance.get("input") or ""),
        per_class=tables.per_class(data["confusion"]) if data["confusion"] else [],
        failures=tables.failures(run),
        cost=tables.cost(run),
        provenance=tables.provenance(run),
        at_commit=bool(run.provenance.get("git_commit")),
        command=str(run.provenance.get("command") or ""),
        job_text=run.job_text,
        plotly_js=get_plotlyjs() if drawn else "",
    )
