"""The report page, made from synthetic run folders. No cluster, no torch."""

import json
from pathlib import Path

import pytest
import runfolders
from runfolders import (
    CLASSES,
    EPOCHS,
    FACTS,
    FAILED,
    GALLERY,
    LADDER,
    PICTURE,
    TRIALS,
    Page,
    choose,
    dump,
    ledger,
    make_run,
    put,
)  # fmt: skip

from raydeep.errors import RaydeepError
from raydeep.report import parallel, tables
from raydeep.report.folder import Run, read_run
from raydeep.report.page import write_report
from raydeep.report.plots import axes, frame
from raydeep.report.search import volume
from raydeep.report.words import answer, duration, size, times


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "digits-1")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Page:
    return Page(write_report(run_dir))


def test_every_finished_trial_is_a_point_and_the_front_is_the_front(run_dir: Path, page: Page) -> None:
    points, done = page.data["points"], read_run(run_dir).done
    assert points["trial"] == [row["trial"] for row in done]
    assert {len(points[key]) for key in points if key != "config"} == {TRIALS - FAILED}
    assert {len(column) for column in points["config"].values()} == {TRIALS - FAILED}
    assert points["config"]["quantize.activation_bits"].count("none") > 0
    expected = [row["trial"] for row in choose(done)]
    assert [points["trial"][i] for i in page.data["front"]][::-1] == expected  # the most accurate first
    assert f"{FAILED} trials failed and are not drawn" in page.text


def test_front_table_has_every_model_and_leads_to_its_point(run_dir: Path, page: Page) -> None:
    front = json.loads((run_dir / "front.json").read_text())
    rows = {row[0].removesuffix("answer"): row for row in page.rows if len(row) == 10}
    assert set(rows) - {"Model"} == {"dense"} | {row["label"] for row in front["models"]}
    for model in front["models"]:
        cells = rows[model["label"]]
        assert cells[1] == f"{100 * model['test_accuracy']:.1f}%"
        assert cells[3] == size(model["bytes"])
        assert cells[5] == f"{model['latency_ratio']:.2f}× ± 0.21"
    linked = [int(attrs["data-point"]) for _, attrs in page.of("tr") if "data-point" in attrs]
    labels = [page.data["points"]["label"][i] for i in linked[1 : len(front["models"]) + 1]]
    assert linked[0] == -1
    assert sorted(labels) == sorted(row["label"] for row in front["models"])
    assert sorted(linked[len(labels) + 1 :]) == list(range(TRIALS - FAILED))  # the table of all trials
    assert sum(attrs.get("class") == "choose" for _, attrs in page.of("button")) == len(linked)


def test_trials_are_listed_by_what_they_took(run_dir: Path, page: Page) -> None:
    head = next(row for row in page.rows if row[:2] == ["Trial", "CPU time"])
    rows = [row for row in page.rows if len(row) == len(head) and row is not head]
    lines = {f"t{row['trial']:03d}": row for row in ledger(run_dir) if row.get("event") == "end"}
    assert len(rows) == TRIALS
    assert [lines[row[0]]["cpu_seconds"] for row in rows] == sorted(r["cpu_seconds"] for r in lines.values())[::-1]
    assert rows[0][1:4] == ["1.5\u00a0s", "6.0\u00a0s", "9"]
    assert {row[0]: row[-1] for row in rows}["t041"] == "failed at rung 1"
    assert ("Worker time in epochs", "32.8\u00a0s") in tables.cost(read_run(run_dir))


def test_a_search_on_gpus_tells_of_their_time(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "job.yaml").write_text("scaling: {use_gpu: true}\nsearch: {gpus_per_trial: 0.5}\n")
    metrics = (run / "metrics.jsonl").read_text().replace('"device": "cpu"', '"device": "cuda"')
    (run / "metrics.jsonl").write_text(metrics)
    page = Page(write_report(run))
    head = next(row for row in page.rows if row[:1] == ["Trial"] and "GPU time" in row)
    rows = [row for row in page.rows if len(row) == len(head) and row is not head and row[0][:1] == "t"]
    assert rows[0][1:4] == ["1.5\u00a0s", "3.0\u00a0s", "6.0\u00a0s"]
    figures = dict(tables.cost(read_run(run)))
    seconds = sum(row["seconds"] for row in ledger(run) if row.get("event") == "end")
    assert figures["GPU time of trials"] == duration(seconds / 2)
    assert figures["GPU time in epochs"] == duration(2 * 0.41 * EPOCHS)
    waits = page.data["input"]["waiting"]
    assert waits[-1] == pytest.approx(1 - (0.001 + 0.1 + 0.2) / 0.41, abs=1e-3)  # a GPU's queue hides its waits


def test_pictures_of_a_run(run_dir: Path, page: Page) -> None:
    shown = [(attrs["alt"], attrs["src"]) for _, attrs in page.of("img")]
    assert [alt for alt, _ in shown] == [
        "4, as it is", "4 0.6 + 8 0.4, as trained on in epoch 0", "8, as it is", "8, as trained on in epoch 0",
        "true 8, taken for 1, 98%", "true 8, taken for 1, 51%", "true 3, taken for 9, 100%",
    ]  # fmt: skip
    assert {src for _, src in shown} == {PICTURE}
    assert "Of the 5 pictures that the dense model labels wrongly, of 360, those" in page.text


def test_pictures_that_are_none_stay_out(tmp_path: Path) -> None:
    run, page = make_run(tmp_path / "run"), None
    bad = ["https://example.org/x.png", "data:image/svg+xml;base64,AAAA", PICTURE + '" onerror="x', None, 7]
    errors = [GALLERY["errors"][0] | {"picture": picture} for picture in bad]
    preview = GALLERY["augmentation"] | {"pictures": [[PICTURE, bad[0]], [bad[1], PICTURE]]}
    for gallery in ({"errors": errors, "augmentation": preview}, {"errors": [{}], "augmentation": {}}, {}):
        dump(run / "gallery.json", gallery)
        page = Page(write_report(run))
        assert page.of("img") == []
        assert "surest errors" not in page.text
    dump(run / "gallery.json", {"augmentation": GALLERY["augmentation"] | {"changes": False}})
    page = Page(write_report(run))
    assert page.of("img") == []
    assert "the job augments nothing" in page.text


def test_where_the_time_of_an_epoch_went(page: Page) -> None:
    found = page.data["input"]
    assert found["waiting"][9] == pytest.approx(0.02 / 0.41, abs=1e-4)
    assert found["waiting"][0] == pytest.approx(0.002 / 0.40, abs=1e-4)  # the first batch's wait is told apart
    assert found["augment"][9] == pytest.approx(0.1 / 0.41, abs=1e-4)
    assert all(
        sum(parts) == pytest.approx(1, abs=1e-3)
        for parts in zip(*(found[key] for key in ("waiting", "augment", "step", "rest")), strict=True)
    )
    assert found["mean"]["waiting"] == pytest.approx(sum(found["waiting"]) / EPOCHS, abs=1e-4)


def test_parallel_coordinates_have_an_axis_a_key_and_a_measure(run_dir: Path, page: Page) -> None:
    found = {axis["name"]: axis for axis in page.data["parallel"]}
    keys = ["prune.sparsity", "quantize.weight_bits", "quantize.activation_bits", "distill.enabled"]
    assert list(found) == [*keys, "val_accuracy", "bytes"]
    assert {len(axis["at"]) for axis in found.values()} == {TRIALS - FAILED}
    points = page.data["points"]
    assert [text for _, text in found["quantize.activation_bits"]["ticks"]] == ["4", "8", "none"]
    at = dict(zip(points["config"]["quantize.weight_bits"], found["quantize.weight_bits"]["at"], strict=True))
    assert at == {"2": 0.0, "3": pytest.approx(1 / 3, abs=1e-3), "4": pytest.approx(2 / 3, abs=1e-3), "8": 1.0}
    best, worst = (points["val_accuracy"].index(pick(points["val_accuracy"])) for pick in (max, min))
    assert (found["val_accuracy"]["at"][best], found["val_accuracy"]["at"][worst]) == (1.0, 0.0)
    low, high = found["bytes"]["ends"]
    assert (low, high) == (min(points["bytes"]), max(points["bytes"]))
    middle = found["bytes"]["at"][best]
    assert low * (high / low) ** middle == pytest.approx(points["bytes"][best], rel=1e-3)


def test_axes_of_ranges_of_conditional_keys_and_of_names() -> None:
    configs = [{"a": 0.001}, {"a": 0.1, "b": {"x": 1}}, {"a": 0.01, "b": True}, None, {"a": 0.01, "b": False}]
    rows = [{"config": config, "trial": i} for i, config in enumerate(configs)]
    space = {"a": {"low": 0.001, "high": 0.1, "log": True}, "b": {"choices": [True, False, {"x": 1}], "when": {}}}
    a, b = parallel.axes(Run({}, "", {}, facts={"space": space}), rows, [])
    assert a["at"] == [0.0, 1.0, 0.5, None, 0.5]
    assert a["ticks"] == [[0.0, "0.001"], [0.2386, "0.003"], [0.5, "0.01"], [0.7386, "0.03"], [1.0, "0.1"]]
    assert [text for _, text in b["ticks"]] == ["–", "false", "true", "x: 1"]
    assert b["at"] == [0.0, 1.0, 0.56, None, 0.12]
    assert parallel.axes(Run({}, "", {}), rows[:1], []) == []


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.5, 0.98, False, [0.5, 0.6, 0.7, 0.8, 0.9]),
        (3, 3, False, [3]),
        (1, 10, False, [2, 4, 6, 8, 10]),
        (2900, 21000, True, [5000, 10000, 20000]),
        (0.0181, 0.0197, True, [0.0185, 0.019, 0.0195]),
        (1e-5, 0.3, True, [1e-5, 1e-4, 1e-3, 0.01, 0.1]),
        (7, 29, True, [10, 20]),
    ],
)
def test_marks_of_an_axis(low: float, high: float, log: bool, expected: list[float]) -> None:
    assert parallel.steps(low, high, log) == pytest.approx(expected)


def test_layers_of_every_model_are_drawn_and_those_of_the_first_stand_in_the_table(run_dir: Path, page: Page) -> None:
    models = json.loads((run_dir / "front.json").read_text())["models"]
    drawn = page.data["layers"]
    assert sorted(m["label"] for m in drawn) == sorted(m["label"] for m in models)
    assert [m["bits"] for m in drawn] == [[b, b] for b in (_bits_of(models, m["label"]) for m in drawn)]
    assert drawn[0]["loss"] == [{"2": 0.5, "8": 0}, {}]
    rows = {row[0]: row for row in page.rows if row[0] in ("conv<1>", "fc")}
    bits = _bits_of(models, drawn[0]["label"])
    assert rows["conv<1>"][1:4] == ["32×1×3×3", "288", "28,800"]
    assert rows["fc"][5:] == [str(bits), "float", f"{1280 * bits // 8:,}"]


def _bits_of(models: list[dict], label: str) -> int:
    return next(m["weight_bits"] for m in models if m["label"] == label)


def test_page_is_whole_and_loads_nothing(run_dir: Path, page: Page) -> None:
    assert len(page.html.encode()) < 6_000_000
    loads = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "action", "data") if key in a]
    assert [address for address in loads if not address.startswith("data:image/png;base64,")] == []
    assert "default-src 'none'" in page.html
    assert "@import" not in page.html.split("</style>")[0]
    assert "url(" not in page.html.split("</style>")[0]
    assert [path.name for path in run_dir.iterdir() if path.name[0] == "."] == []
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for name in (
        "sha256:9b1e4c07d2",
        "AMD EPYC 7R13, 2 cores",
        "raydeep search jobs/digits.yaml",
        "0f3c9a7d51e24b6f8a90",
    ):
        assert name in page.text


def test_a_thousand_trials_with_all_their_pictures_stay_below_6_mb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runfolders, "TRIALS", 1000)
    run = make_run(tmp_path / "run")
    page = write_report(run)
    assert json.loads(Page(page).scripts[0])["points"]["trial"][-1] == 999
    assert page.stat().st_size + 300_000 < 6_000_000  # gallery.json is smaller than that
    assert "The 200 dearest of 1000." in Page(page).text


def test_text_from_the_folder_stays_text(tmp_path: Path) -> None:
    evil = "</script><b>\"'&{{ 7*7 }}<!--"
    run = make_run(tmp_path / "run", classes=[evil, *CLASSES[1:]], error=f"ValueError: {evil}")
    (run / "job.yaml").write_text(f"name: digits # {evil}\n")
    front = json.loads((run / "front.json").read_text())
    front["models"][0]["label"] = evil
    dump(run / "front.json", front)
    provenance = json.loads((run / "provenance.json").read_text())
    dump(run / "provenance.json", provenance | {"command": evil, "id": evil, "versions": {evil: evil}})
    page = Page(write_report(run))  # parses with every element closed
    assert page.of("b") == []
    assert len(page.of("script")) == 4
    assert page.data["confusion"]["classes"][0] == evil
    assert page.text.count(evil) >= 7
    assert "7*7" in page.html


@pytest.mark.parametrize(
    ("change", "accuracy", "expected"),
    [
        (
            {"latency_ratio": 6.24},
            0.981,
            "At 98.1% test accuracy, 7.6\u00a0kB: 41× smaller and 6.2× faster than the dense model.",
        ),
        ({"latency_ratio": 0.8}, 0.981, "41× smaller but 1.2× slower than the dense model."),
        ({"latency_ratio": 0.97}, 0.981, "41× smaller than the dense model and as fast."),
        ({"latency_ratio": 1.4, "compression_ratio": 0.5}, 0.981, "1.4× faster but 2.0× larger than the dense model."),
        ({"latency_ratio": 1.0, "compression_ratio": 1.0}, 0.981, "as large and as fast as the dense model."),
        (
            {"latency_ratio": None},
            0.981,
            "At 98.1% test accuracy, 7.6\u00a0kB: 41× smaller than the dense model.",
        ),
        (
            {"latency_ratio": 6.0},
            0.9,
            "No compressed model stays within 1 point of the dense model’s 98.9% validation",
        ),
        ({"verified": False}, 0.981, "98.6% test accuracy at 312\u00a0kB."),
    ],
)
def test_answer(tmp_path: Path, change: dict, accuracy: float, expected: str) -> None:
    run = make_run(tmp_path / "run")
    front = json.loads((run / "front.json").read_text())
    model = (
        front["models"][0]
        | {"test_accuracy": accuracy, "val_accuracy": accuracy, "bytes": 7600, "compression_ratio": 41.05}
        | change
    )
    larger = model | {"label": "larger", "bytes": 9000, "val_accuracy": accuracy + 0.001}
    dump(run / "front.json", {"dense": front["dense"], "models": [model, larger]})
    headline, detail = answer(read_run(run))
    assert expected in headline
    assert "With 360 test images, one standard error of an accuracy is ±" in detail


@pytest.mark.parametrize(
    ("objectives", "headline", "detail"),
    [
        (
            {"accuracy": "max", "latency": "min"},
            "At 98.0% test accuracy, 0.05\u00a0ms a picture: 2.0× faster and 10.0× smaller than the dense model.",
            "Model fast is the fastest of the front",
        ),
        (
            {"accuracy": "max", "macs": "min"},
            "At 98.2% test accuracy, 86.8\u00a0k MACs: 4.0× fewer MACs and 10.0× smaller but 2.0× slower than",
            "Model few is the one with the fewest MACs of the front whose",
        ),
        (
            {"accuracy": "max", "worst_class": "max"},
            "98.5% test accuracy: 0.1 points below the model of the job’s own settings.",
            "Model best has the highest validation accuracy of those found (98.9%; the job’s own 98.9%)",
        ),
    ],
)
def test_answer_is_to_what_the_search_was_after(tmp_path: Path, objectives: dict, headline: str, detail: str) -> None:
    run = make_run(tmp_path / "run")
    put(run, [FACTS | {"objectives": objectives}])
    front = json.loads((run / "front.json").read_text())
    base = front["models"][0] | {"compression_ratio": 10.0, "bytes": 31_200, "macs": 347_392, "val_accuracy": 0.98}
    models = [
        base | {"label": "fast", "test_accuracy": 0.98, "latency_ms": 0.05, "latency_ratio": 2.0},
        base | {"label": "few", "test_accuracy": 0.982, "latency_ms": 0.2, "latency_ratio": 0.5, "macs": 86_848},
        base | {"label": "best", "test_accuracy": 0.985, "val_accuracy": 0.989, "latency_ms": 0.1},
    ]
    dump(run / "front.json", {"dense": front["dense"], "models": models})
    found = answer(read_run(run))
    assert found[0].startswith(headline)
    assert found[1].startswith(detail)


def test_train_only(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", search=False)))
    assert "98.6% test accuracy at 312\u00a0kB." in page.text
    assert page.data["points"]["bytes"] == []
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert "plot-front" not in ids
    assert {"plot-loss", "plot-accuracy", "plot-confusion", "h-models"} <= ids


def test_half_finished_search(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("front.json", "evaluation.json", "provenance.json"):
        (run / name).unlink()
    assert answer(read_run(run))[0].startswith("Not finished: all 60 trials ran, their front is not exported")
    (run / "job.yaml").write_text("search:\n  trials: 64\n")
    page = Page(write_report(run))
    assert "Not finished: 60 of 64 trials so far." in page.text
    assert page.data["dense"] is None
    assert len(page.data["points"]["bytes"]) == TRIALS - FAILED
    assert "h-models" not in {attrs.get("id") for _, attrs in page.tags}


def test_search_that_goes_on_counts_each_trial_by_its_best_rung(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "front.json").unlink()
    lines = ledger(run)
    rungs = [line for line in lines if line.get("event") == "rung"]
    better = {**rungs[0], "rung": 7, "val_accuracy": 0.2, "seconds": 10.0}  # trial 0 got worse
    put(run, [FACTS, *rungs, better, *(line for line in lines if line.get("trial") in (1, 17) and "rungs" in line)])
    found = read_run(run)
    assert (len(found.done), [row["trial"] for row in found.failed]) == (59, [17])
    assert len(found.going) == 58
    first = found.trials[0]
    assert first["val_accuracy"] == max(row["val_accuracy"] for row in rungs if row["trial"] == 0)
    assert first["seconds"] == 1 + 2 + 3 + 10
    page = Page(write_report(run))
    assert "Not finished: 60 of 60 trials begun, 2 of them ended." in page.text
    assert len(page.data["points"]["bytes"]) == 59
    assert page.data["dense"]["macs"] == 347_392  # provenance.json has the dense model's measures
    assert ["not ended yet", "58"] in page.rows


def test_ledger_of_schema_1(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    new = ("event", "stopped", "rungs", "rung", "epochs", "start", "worst_class_accuracy", "macs", "hypervolume", "at")
    ends = [row for row in ledger(run) if row.get("event") == "end"]
    old = [{k: v for k, v in row.items() if k not in new} | {"test_accuracy": 0.9} for row in ends]
    expected = Page(write_report(run)).data["front"]
    put(run, [{"schema": 1, "space": {}}, *old])
    page = Page(write_report(run))
    assert page.data["front"] == expected
    assert len(page.data["points"]["bytes"]) == TRIALS - FAILED
    assert page.data["axes"] == {"x": "bytes", "y": "val_accuracy"}
    assert page.data["volume"] is None
    assert "h-search" not in {attrs.get("id") for _, attrs in page.tags}
    assert f"{FAILED} trials failed and are not drawn" in page.text


def test_how_the_search_went(run_dir: Path, page: Page) -> None:
    rungs = [row for row in ledger(run_dir) if row.get("event") == "rung"]
    for k, epochs in enumerate(LADDER):
        through = sum(row["rung"] == k for row in rungs)
        assert [str(k), str(epochs), str(through), f"{1 + k}.0\u00a0s", f"{0.5 + k}\u00a0s"] in page.rows
    for reason, trials in (("through all rungs", "7"), ("failed at rung 0", "1"), ("not promoted from rung 0", "38")):
        assert [reason, trials] in page.rows
    others = len({row["trial"] for row in rungs if row["start"] == "t001"})
    assert f"2 trials failed. {others} of 59 trials began a rung from another trial’s weights." in page.text
    assert "Starting and stopping" not in page.text
    drawn = page.data["volume"]
    assert (drawn["at"][:2], drawn["trials"][-1], len(drawn["value"])) == ([3, 4], 59, len(rungs))
    assert "in points of accuracy × doublings of size. A model as accurate as the dense one at half its" in page.text


def test_workers_of_trials_and_a_hypervolume_of_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rungs = [row for row in ledger(run) if row.get("event") == "rung"][:3]
    took = zip(rungs, (20, 30, 31), strict=True)
    put(run, [FACTS, *(row | {"seconds": 40.0, "overhead_seconds": seconds} for row, seconds in took)])
    text = Page(write_report(run)).text
    assert "workers of a trial took a median of 30.0\u00a0s a rung, 68% of the time in trials." in text
    put(run, [FACTS, rungs[0]])
    page = Page(write_report(run))
    assert page.data["volume"] is None
    assert "plot-volume" not in {attrs.get("id") for _, attrs in page.tags}
    put(run, [FACTS, *(row | {"hypervolume": 0.0} for row in rungs)])
    page = Page(write_report(run))
    assert "It stayed 0: no trial lies beyond that corner." in page.text
    assert "plot-volume" not in {attrs.get("id") for _, attrs in page.tags}


def test_front_is_that_of_the_objectives_and_constraints(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "front.json").unlink()
    rung = {"event": "rung", "rung": 0, "epochs": 1, "config": {}, "start": "scratch"}
    measured = [  # accuracy, worst class, bytes, ms
        (0.95, 0.50, 900, 4.0),
        (0.97, 0.80, 1000, 3.0),  # beaten in both objectives by the next
        (0.96, 0.90, 2000, 2.0),
        (0.90, 0.70, 3000, 1.0),
        (0.99, 0.99, 4000, None),  # can't be judged
    ]
    lines = [
        {**rung, "trial": i, "val_accuracy": a, "worst_class_accuracy": w, "bytes": b, "latency_ms": ms}
        for i, (a, w, b, ms) in enumerate(measured)
    ]
    put(run, [FACTS | {"objectives": {"latency": "min", "worst_class": "max"}}, *lines])
    page = Page(write_report(run))
    assert page.data["front"] == [3, 2]
    one = "covers 10 by itself"  # or 20, where the corner lies at twice the dense model's latency
    assert "doublings of latency × points of accuracy of the worst class" in volume(read_run(run))
    assert (one in volume(read_run(run))) == ("at its latency" in volume(read_run(run)))
    assert page.data["axes"] == {"x": "latency_ms", "y": "worst_class_accuracy"}
    offered = {a["value"] for tag, a in page.tags if tag == "option"}
    assert {"val_accuracy", "worst_class_accuracy", "bytes", "latency_ms"} <= offered
    assert "macs" not in offered
    assert "the trials that no other beats in latency and accuracy of the worst class." in page.text
    put(run, [FACTS | {"constraints": ["accuracy >= 0.955"]}, *lines])
    page = Page(write_report(run))
    assert page.data["front"] == [4, 1]
    assert "of the trials with accuracy ≥\u00a095.5%, the trials that no other beats" in page.text
    put(run, [FACTS | {"constraints": ["latency <= 0.5"]}, *lines])
    page = Page(write_report(run))
    assert page.data["front"] == [3]
    assert "No trial has latency ≤\u00a00.5\u00a0ms. On the front are, of those nearest to it," in page.text


@pytest.mark.parametrize(
    ("objectives", "x", "y"),
    [
        (["val_accuracy", "bytes"], "bytes", "val_accuracy"),
        (["bytes", "val_accuracy"], "bytes", "val_accuracy"),
        (["macs", "bytes"], "bytes", "macs"),
        (["val_accuracy", "worst_class_accuracy"], "worst_class_accuracy", "val_accuracy"),
        (["latency_ms"], "latency_ms", "val_accuracy"),
        (["val_accuracy", "latency_ms", "bytes"], "latency_ms", "val_accuracy"),
    ],
)
def test_axes(objectives: list[str], x: str, y: str) -> None:
    present = ["val_accuracy", "worst_class_accuracy", "bytes", "macs", "latency_ms"]
    assert axes(objectives, present) == {"x": x, "y": y}
    assert axes(objectives, ["val_accuracy", "bytes"]) == {"x": "bytes", "y": "val_accuracy"}


def test_best_under_each_constraint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    front = json.loads((run / "front.json").read_text())
    lines = ledger(run)
    put(run, [FACTS | {"constraints": ["accuracy >= 0.97", "bytes <= 1_000"]}, *lines[1:]])
    model = front["models"][0]
    dump(run / "front.json", front | {"best": {"accuracy >= 0.97": model["label"], "gone >= 1": "t999"}})
    rows = Page(write_report(run)).rows
    measures = [f"{100 * model['test_accuracy']:.1f}%", f"{100 * model['val_accuracy']:.1f}%", size(model["bytes"])]
    assert ["accuracy ≥\u00a097%", model["label"], *measures] in rows
    assert ["size ≤\u00a01,000 bytes", "no verified model meets it"] in rows
    assert ["gone >= 1", "t999", "–", "–", "–"] in rows


def test_sweep_shows_what_was_swept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "job.yaml").write_text("train:\n  lr: 0.05\nmodel:\n  name: seed\n  args: {}\n")
    front = json.loads((run / "front.json").read_text())
    front["models"] = [model | {"sparsity": 0.0} for model in front["models"]]
    dump(run / "front.json", front)
    config = {"train.lr": 0.1, "model.args": {"width": 8}, "augment.policy": None}
    lines = [row | {"config": config} if "config" in row else row for row in ledger(run)]
    space = {"train.lr": {"low": 0.1, "high": 1}, "model.args": [], "augment.policy": [], "augment.crop": []}
    put(run, [FACTS | {"space": space}, *lines[1:]])
    page = Page(write_report(run))
    head = next(row for row in page.rows if row[0] == "Model")
    assert head[-5:] == ["Speed", *space]
    rows = {row[0].removesuffix("answer"): row[6:] for row in page.rows if len(row) == len(head)}
    assert rows["dense"] == ["0.05", "{}", "–", "–"]
    assert rows[front["models"][0]["label"]] == ["0.1", "width: 8", "none", "–"]
    put(run, [FACTS | {"space": space | {"prune.sparsity": [0.5]}}, *lines[1:]])
    assert next(row for row in Page(write_report(run)).rows if row[0] == "Model")[-1] == "Distilled"


def test_only_a_job(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: digits\n")
    page = Page(write_report(tmp_path))
    assert "Nothing measured yet." in page.text
    assert len(page.scripts) == 1  # no plot, so no plotly


def test_model_without_a_trial_is_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "ledger.jsonl").unlink()
    front = json.loads((run / "front.json").read_text())
    front["models"] = [front["models"][-1] | {"label": "compressed", "trial": None}]
    dump(run / "front.json", front)
    page = Page(write_report(run))
    assert page.data["points"]["label"] == ["compressed"]
    assert page.data["front"] == [0]


def test_torn_repeated_and_unreadable_lines(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    metrics, ledger = run / "metrics.jsonl", run / "ledger.jsonl"
    again = {
        "stage": "train",
        "epoch": EPOCHS,
        "epochs": EPOCHS,
        "val_accuracy": 0.5,
        "val_loss": float("nan"),
    }
    metrics.write_text(metrics.read_text() + json.dumps(again) + '\n{"stage": "train", "epo')
    ledger.write_bytes(b"\xff{\n" + ledger.read_bytes())
    exported = {row["trial"] for row in json.loads((run / "front.json").read_text())["models"]}
    other = next(row["trial"] for row in read_run(run).done if row["trial"] not in exported)
    with ledger.open("a") as file:
        file.write(json.dumps({"trial": other, "status": "failed"}) + "\n")
    page = Page(write_report(run))
    (curve,) = page.data["curves"]
    assert len(curve["epoch"]) == EPOCHS
    assert (curve["val_accuracy"][-1], curve["val_loss"][-1]) == (0.5, None)
    assert len(page.data["points"]["bytes"]) == TRIALS - FAILED - 1
    assert "1 unreadable line in ledger.jsonl left out." in page.text
    assert "metrics.jsonl left out" not in page.text


def test_models_that_fail_verification_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    front = json.loads((run / "front.json").read_text())
    front["models"][0]["verified"] = False
    dump(run / "front.json", front)
    page, label = Page(write_report(run)), front["models"][0]["label"]
    assert f"behaves like the model it was made from: check {label}." in page.text
    assert f"{label}not verified" in [row[0] for row in page.rows]


def test_files_that_differ_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    front = json.loads((run / "front.json").read_text())
    front["models"][0]["onnx_differ"] = 2
    dump(run / "front.json", front)
    text, label = Page(write_report(run)).text, front["models"][0]["label"]
    assert "on the 360 validation and test images, predicts the same as its model; " in text
    assert f"predictions that differ: 2 by {label} (onnx)." in text


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(
        RaydeepError, match=r"is not a run folder: it has neither job\.yaml nor provenance\.json"
    ) as err:
        write_report(tmp_path)
    assert str(tmp_path) in str(err.value)
    with pytest.raises(RaydeepError, match="no such folder; expected a run folder"):
        write_report(tmp_path / "absent")
    (tmp_path / "job.yaml").write_text("name: x\n")
    (tmp_path / "front.json").write_text("{")
    with pytest.raises(RaydeepError, match=r"front\.json: not readable as JSON"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_words() -> None:
    assert [size(n) for n in (999, 1000, 12_345, 999_960, 3_000_000)] == [
        "999\u00a0B",
        "1.0\u00a0kB",
        "12.3\u00a0kB",
        "1.0\u00a0MB",
        "3.0\u00a0MB",
    ]
    assert [times(x) for x in (0.8, 6.24, 41.3, None, float("nan"))] == ["0.8×", "6.2×", "41×", "–", "–"]
    assert [duration(s) for s in (3.14, 135, 9000)] == [
        "3.1\u00a0s",
        "2\u00a0min 15\u00a0s",
        "2\u00a0h 30\u00a0min",
    ]
    assert frame([0.98, 0.97, 0.96, 0.95, 0.1]) == 0.88
    assert frame([0.98, 0.1, 0.1, 0.1]) is None
    assert frame([]) is None
    assert frame([0.98, 0.97, 0.96, 0.95], [0.1, 0.1, 0.1]) == 0.88  # those given up early may lie outside
    assert frame([0.98, 0.97, 0.96, 0.95], [0.9]) is None
