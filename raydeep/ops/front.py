"""The front of a run as folders: exported, verified in a clean process, written to front.json and reported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydeep import mirror
from raydeep.disk import read_json, read_lines, sha256_file, write_json
from raydeep.errors import RaydeepError
from raydeep.fields import Average
from raydeep.ops.console import Ui
from raydeep.run import Run

if TYPE_CHECKING:
    from raydeep.data.resident import Dataset
    from raydeep.deploy.verify import Candidate


def finish(run: Run, data: Dataset, trials: list[dict[str, Any]], ui: Ui) -> list[dict[str, Any]]:
    """Export the front, verify it, write front.json and the report, print the table; gives its models' rows."""
    with run.working():
        return _finish(run, data, trials, ui)


def _finish(run: Run, data: Dataset, trials: list[dict[str, Any]], ui: Ui) -> list[dict[str, Any]]:
    from raydeep.deploy import verify
    from raydeep.report.page import write_report

    with ui.stage("export") as stage:
        chosen, best = _front(run, trials)
        candidates = [_candidate(run, "dense", data)]
        for i, row in enumerate(chosen):
            stage.update(i, len(chosen), f"model t{row['trial']:03d}")
            candidates.append(export_trial(run, row["trial"], data))
        stage.text = f"{len(chosen)} models of the front" if chosen else "the dense model"
    with ui.stage("verify") as stage:
        facts = verify.verify(candidates, run.model("dense"), data, cfg=run.job.export)
        good = [row for row in chosen if facts[f"t{row['trial']:03d}"]["verified"]]
        bad = [f"t{row['trial']:03d}" for row in chosen if row not in good]
        sound = len(good) + facts["dense"]["verified"]
        stage.text = f"{sound} of {len(candidates)} predict in a clean process exactly as when scored"
        if not facts["dense"]["verified"]:
            bad.append("dense")
        for label, trial in [("dense", None), *((f"t{row['trial']:03d}", row) for row in chosen)]:
            _sign(run, Path(facts[label]["folder"]), label, trial)
    front: dict[str, Any] = {
        "dense": front_row(run, "dense", None, facts["dense"]),
        "models": [front_row(run, f"t{r['trial']:03d}", r, facts[f"t{r['trial']:03d}"]) for r in good],
        "unverified": [{"label": label, **facts[label]} for label in bad],
        "objectives": dict(run.job.search.objectives),
        "best": {name: label for name, label in best.items() if label not in bad},
    }
    front["answer"] = _answer(front)
    write_json(run.path / "front.json", front)
    report = write_report(run.path)
    mirror.drop(run.path / "ray")
    run.save()
    ui.say("")
    ui.front(front["dense"], front["models"])
    ui.say("")
    for label in bad:
        ui.say(f"left out: {label}: {facts[label]['refused']}; see {facts[label]['folder']}")
    if not facts["dense"]["verified"]:
        raise RaydeepError(
            f"{run.model('dense')}: the network does not predict the same in a clean process; does it draw random "
            f"numbers in eval mode?"
        )
    for row in front["models"] if run.job.search.trains else []:
        values = next(trial["config"] for trial in trials if trial["trial"] == row["trial"])
        ui.say(f"{row['label']}: {' '.join(f'{key}={value}' for key, value in values.items())}")
    if front["models"]:
        ui.say(verdict(front))
    for name, label in front["best"].items():
        ui.say(f"best with {name}: {label}")
    ui.say(f"report     {mirror.name(report)}")
    ui.say(f"models     {mirror.name(run.path / 'models')}")
    if mirror.address(run.path) is not None:
        ui.say(f"here       {run.path}")
    return front["models"]


def _front(run: Run, trials: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Trials on the front of the search's objectives, export.max_models at most, and the best under each constraint.

    The best ones are among them, and the one that answers the search; the order is that of the first objective, best
    first.
    """
    from raydeep.search import pareto
    from raydeep.search.objectives import Objectives

    if not trials:
        return [], {}
    objectives = Objectives.of(run.job.search)
    found = objectives.front(trials)
    best = objectives.best(trials)
    dense = read_json(run.path / "provenance.json").get("reference", {}).get("val_accuracy", 0.0)
    answer = objectives.answer([trials[i] for i in found], dense)
    kept = [*pareto.spread(found, run.job.export.max_models), *best.values()]
    kept += [] if answer is None else [trials.index(answer)]
    order = sorted(dict.fromkeys(kept), key=lambda i: (objectives.point(trials[i]), i))
    return [trials[i] for i in order], {name: f"t{trials[i]['trial']:03d}" for name, i in best.items()}


def _candidate(run: Run, label: str, data: Dataset) -> Candidate:
    """A model with what it predicted when it was scored; the test split, which no search sees, is scored now."""
    from raydeep.compress import plan
    from raydeep.deploy.verify import Candidate
    from raydeep.search.trial import load_predictions, save_predictions

    folder = run.path / "trials" / label
    found = load_predictions(folder)
    if "test" not in found:
        packed = (folder / "model.rdz").read_bytes()
        found["test"] = plan.score(packed, data, data.test, run.job.train.eval_batch_size)
        save_predictions(folder, val=found["val"], test=found["test"])
    return Candidate(run.model(label), found["val"], found["test"])


def export_trial(run: Run, trial: int, data: Dataset) -> Candidate:
    """Write the model folder of a trial; the form of its ONNX file is chosen on pictures of `data`.

    Raises:
        RaydeepError: the run has no such trial.
    """
    from raydeep.deploy import export, forms
    from raydeep.search.trial import SETTLED

    label = f"t{trial:03d}"
    file = run.path / "trials" / label / "model.rdz"
    mirror.pull(file.parent, lambda name: name in SETTLED)
    if not file.is_file():
        raise RaydeepError(f"{run.name}: no finished trial {trial} (no {file.relative_to(run.path)})")
    settled = _settled(run, trial)
    if settled is not None and settled.get("artifact_sha256") != sha256_file(file):
        raise RaydeepError(f"{file}: not the file that trial {trial} wrote (its sha256 differs from the ledger's)")
    candidate = _candidate(run, label, data)
    sample = forms.sample(data, candidate.val_predictions)
    export.write_model(run.model(label), file.read_bytes(), sample=sample, cfg=run.job.export)
    return candidate


def _sign(run: Run, folder: Path, label: str, trial: dict[str, Any] | None) -> None:
    """Write into a model folder where it comes from, and its card anew, with what was measured."""
    from raydeep.deploy import card

    card.complete(folder, card.about(run.job, label, read_json(run.path / "provenance.json"), trial))


def _settled(run: Run, trial: int) -> dict[str, Any] | None:
    """The last row that the ledger has of a trial."""
    rows = [row for row in read_lines(run.path / "ledger.jsonl") if row.get("trial") == trial]
    return rows[-1] if rows else None


def front_row(run: Run, label: str, trial: dict[str, Any] | None, facts: dict[str, Any]) -> dict[str, Any]:
    """One row of front.json: what the search chose, and what the clean process measured."""
    job = run.job if trial is None else run.job.with_values(trial["config"])
    row = {
        "label": label, "trial": None if trial is None else trial["trial"],
        "val_accuracy": facts["val_accuracy"], "test_accuracy": facts["test_accuracy"],
        "bytes": facts["bytes"] if trial else facts["dense_bytes"], "onnx_bytes": facts["onnx_bytes"],
        "sparsity": trial["sparsity"] if trial else 0.0,
        "weight_bits": _bits(job.quantize.weight_bits) if trial else None,
        "activation_bits": job.quantize.activation_bits if trial else None,
        "distill": job.distill.enabled if trial else False,
        **{k: facts[k] for k in (
            "latency_ms", "latency_ratio", "latency_spread", "verified", "packed_differ", "onnx_differ", "rows",
        )},
    }  # fmt: skip
    row["compression_ratio"] = facts["dense_bytes"] / row["bytes"]
    if trial is not None:
        row |= {"macs": trial["macs"]} if "macs" in trial else {}
        row |= _layers(run, label)
    return row


def _bits(asked: int | Average | None) -> float | None:
    return asked.average if isinstance(asked, Average) else asked


def _layers(run: Run, label: str) -> dict[str, Any]:
    """What each layer costs, the average bits of all weights, and what the allocation of bits was made from."""
    from raydeep.compress import cost

    rows = cost.per_layer((run.path / "trials" / label / "model.rdz").read_bytes())
    file = run.path / "trials" / label / "sensitivity.json"
    bits = sum((row["weight_bits"] or 32) * row["parameters"] for row in rows) / sum(row["parameters"] for row in rows)
    return {"layers": rows, "average_bits": bits, "sensitivity": read_json(file) if file.exists() else None}


def _answer(front: dict[str, Any]) -> str | None:
    """The model that a run stands for: of a search that of `verdict`, of a training the dense one; None: there is none.

    `raydeep predict RUN` takes it.
    """
    if not front["models"]:
        return "dense"
    best = _best(front)
    return None if best is None else str(best["label"])


def _best(front: dict[str, Any]) -> dict[str, Any] | None:
    """The row of the model that answers the search, as the report finds it (report.words.pick)."""
    from raydeep.search.objectives import Objectives

    return Objectives(front["objectives"], []).answer(front["models"], front["dense"]["val_accuracy"])


def verdict(front: dict[str, Any]) -> str:
    """One sentence: the model that answers the search, chosen on validation, with its test accuracy."""
    dense, best = front["dense"], _best(front)
    if best is None:
        return "no model of the front is within 1 point of the dense model's validation accuracy"
    return (
        f"{best['label']}: {best['test_accuracy']:.2%} test accuracy (dense {dense['test_accuracy']:.2%}) in "
        f"{best['bytes']:,} bytes: {best['compression_ratio']:.1f}× smaller, {best['latency_ratio']:.2f}× the speed"
    )


def export(run: Run, trial: int, ui: Ui) -> Path:
    """Export one trial of a finished search, verified against the run's data."""
    from raydeep.data import shards, splits
    from raydeep.deploy import verify

    dataset = mirror.place(read_json(run.path / "provenance.json").get("dataset", {}).get("path", ""))
    mirror.pull(dataset)
    with run.locked(), ui.stage("export") as stage:
        data = splits.read_dataset(shards.load_manifest(dataset, check_hashes=True), run.job.data)
        candidate = export_trial(run, trial, data)
        facts = verify.verify([candidate], run.model("dense"), data, cfg=run.job.export)[candidate.folder.name]
        if not facts["verified"]:
            raise RaydeepError(f"{facts['folder']}: {facts['refused']}; don't deploy it")
        _sign(run, candidate.folder, candidate.folder.name, _settled(run, trial))
        stage.text = (
            f"{candidate.folder.name}: {facts['test_accuracy']:.2%} test accuracy, {facts['bytes']:,} bytes, "
            f"{facts['latency_ratio']:.2f}× the speed of the dense model"
        )
    mirror.push_folder(candidate.folder, last="SHA256SUMS")
    ui.say(f"model      {mirror.name(candidate.folder)}")
    return candidate.folder
