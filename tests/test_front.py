"""Which trials of a search are exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raydeep.config import Job
from raydeep.disk import write_json
from raydeep.ops import front
from raydeep.recipe import Export
from raydeep.report import words
from raydeep.report.folder import read_run
from raydeep.run import Run
from raydeep.tuning import Search


@pytest.fixture
def exported(tmp_path: Path) -> Any:
    """Labels of what is exported of trials given as (accuracy, bytes); the dense model has 0.95."""

    def choose(points: list[tuple[float, int]], most: int, **search: Any) -> tuple[list[str], dict[str, str]]:
        write_json(tmp_path / "provenance.json", {"reference": {"val_accuracy": 0.95}})
        job = Job(search=Search(**search), export=Export(max_models=most))
        rows = [{"trial": i, "val_accuracy": a, "bytes": b} for i, (a, b) in enumerate(points)]
        chosen, best = front._front(Run(tmp_path, job), rows)
        return [f"t{row['trial']:03d}" for row in chosen], best

    return choose


POINTS = [(0.96, 900), (0.955, 800), (0.945, 300), (0.90, 200), (0.80, 100), (0.70, 500)]


def test_the_smallest_that_is_close_to_the_dense_model_is_always_there(exported):
    assert exported(POINTS, 1)[0] == ["t002", "t004"]
    assert exported(POINTS, 2)[0] == ["t000", "t002", "t004"]
    assert exported(POINTS, 9)[0] == ["t000", "t001", "t002", "t003", "t004"]


def test_the_best_under_each_constraint_are_there(exported):
    found, best = exported(POINTS, 1, constraints=("accuracy >= 0.95", "bytes <= 250"))
    assert best == {"accuracy >= 0.95": "t001", "bytes <= 250": "t003"}
    assert {"t001", "t003"} <= set(found)


def test_one_objective_has_one_model_and_a_search_without_trials_none(exported):
    assert exported(POINTS, 8, objectives=["accuracy"])[0] == ["t000"]
    assert exported([], 8) == ([], {})


def test_close_to_the_dense_model_is_the_cheapest_by_what_the_search_asks_for(tmp_path):
    write_json(tmp_path / "provenance.json", {"reference": {"val_accuracy": 0.95}})
    rows = [
        {"trial": i, "val_accuracy": a, "bytes": b, "macs": m}
        for i, (a, b, m) in enumerate([(0.96, 300, 9000), (0.945, 900, 400), (0.5, 500, 100)])
    ]
    for objectives, kept in ((["accuracy", "macs"], "t001"), (["accuracy", "bytes"], "t000")):
        job = Job(search=Search(objectives=objectives), export=Export(max_models=1))
        chosen, _ = front._front(Run(tmp_path, job), rows)
        assert kept in [f"t{row['trial']:03d}" for row in chosen]
    measured = {"test_accuracy": 0.9, "compression_ratio": 2.0, "latency_ratio": 1.0}
    models = [row | measured | {"label": f"t{row['trial']:03d}"} for row in rows]
    told = {"dense": {"val_accuracy": 0.95, "test_accuracy": 0.95}, "models": models}
    assert front.verdict(told | {"objectives": {"accuracy": "max", "macs": "min"}}).startswith("t001:")
    assert front.verdict(told | {"objectives": {"accuracy": "max", "bytes": "min"}}).startswith("t000:")


@pytest.mark.parametrize(
    ("objectives", "expected"),
    [
        ({"accuracy": "max", "latency": "min"}, "t002"),
        ({"accuracy": "max", "bytes": "min"}, "t001"),
        ({"accuracy": "max"}, "t000"),
        ({"worst_class": "max", "accuracy": "max"}, "t000"),
    ],
)
def test_predict_verdict_and_report_take_the_same_model(tmp_path, objectives, expected):
    """Of five, each has its own best: the third is fastest, the second smallest, the first most accurate."""
    points = [(0.96, 900, 0.9), (0.945, 300, 0.8), (0.942, 600, 0.2), (0.96, 950, 0.9), (0.50, 100, 0.1)]
    rest = {"test_accuracy": 0.9, "compression_ratio": 2.0, "latency_ratio": 1.0, "verified": True}
    models = [
        {"label": f"t{i:03d}", "trial": i, "val_accuracy": a, "bytes": b, "latency_ms": ms, **rest}
        for i, (a, b, ms) in enumerate(points)
    ]
    for rows in (models, models[::-1]):
        told = {"dense": {"val_accuracy": 0.95, "test_accuracy": 0.95}, "models": rows, "objectives": objectives}
        write_json(tmp_path / "front.json", told)
        (tmp_path / "job.yaml").write_text(f"search: {{objectives: {json.dumps(objectives)}}}\n")
        picked = words.pick(read_run(tmp_path))
        assert picked is not None
        assert [front._answer(told), front.verdict(told)[:4], picked["label"]] == [expected] * 3
