"""The report page, made from synthetic run folders. No cluster, no torch."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from runfolders import (
    CLASSES,
    EPOCHS,
    FACTS,
    FAILED,
    LADDER,
    TRIALS,
    Page,
    choose,
    dump,
    ledger,
    make_run,
    put,
)  # fmt: skip

from raydeep.errors import RaydeepError
from raydeep.report.folder import read_run
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
        assert cells[5] == f"{times(model['latency_ratio'])} ± 0.21"
    linked = [int(attrs["data-point"]) for _, attrs in page.of("tr") if "data-point" in attrs]
    labels = [page.data["points"]["label"][i] for i in linked if i >= 0]
    assert linked[0] == -1
    assert sorted(labels) == sorted(row["label"] for row in front["models"])
    assert all(attrs["tabindex"] == "0" for _, attrs in page.of("tr") if "data-point" in attrs)


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
    assert loads == []
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
    assert len(page.of("script")) == 3
    assert page.data["confusion"]["classes"][0] == evil
    assert page.text.count(evil) >= 7
    assert "7*7" in page.html


@pytest.mark.parametrize(
    ("change", "accuracy", "expected"),
    [
        (
            {"latency_ratio": 6.24},
            0.981,
            "At 98.1% test accuracy, 7.6\u00a0kB: 41× smaller and 6.2× the speed of the ",
        ),
        ({"latency_ratio": 0.8}, 0.981, "41× smaller and 0.8× the speed of the dense model, so slower."),
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
    assert not any("data-point" in attrs for _, attrs in page.tags)


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
    assert f"on the 360 validation and test images, predicts differently only 2 by {label} (onnx)." in text


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


PROBE = """<script>
const plot = document.getElementById("plot-front"), rows = [...document.querySelectorAll("tr[data-point]")];
const current = () => rows.filter((row) => row.getAttribute("aria-current")).map((row) => row.dataset.point);
const drawn = () => plot.querySelectorAll(".scatterlayer .point").length;
const seen = {drawn: drawn(), title: plot.layout.yaxis.title.text};
rows[2].dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
seen.by_row = [current(), drawn(), document.getElementById("readout").textContent];
plot.emit("plotly_click", {points: [{customdata: Number(rows[1].dataset.point)}]});
seen.by_plot = current();
const choose = (axis, name) => {
  const box = document.getElementById("axis-" + axis);
  box.value = name;
  box.dispatchEvent(new Event("change"));
};
const front = () => plot.data.find((trace) => trace.name === "front");
seen.sizes = plot.data.slice(0, 2).map((trace) => [trace.name, trace.x.length, trace.marker.size]);
seen.line = front().mode;
choose("y", "test_accuracy");
seen.test_title = plot.layout.yaxis.title.text;
seen.test_y = front().y;
choose("x", "worst_class_accuracy");
seen.heading = document.getElementById("h-front").textContent;
seen.no_line = front().mode;
const volume = document.getElementById("plot-volume");
seen.volume = [volume.data[0].x.at(-1)];
document.querySelector("[data-over=trials]").click();
seen.volume.push(volume.data[0].x.at(-1), volume.data[0].y.length);
const layers = document.getElementById("layers-of"), layerPlot = document.getElementById("plot-layers");
layers.value = "1";
layers.dispatchEvent(new Event("change"));
seen.layers = [layers.options[1].textContent, layerPlot.data[0].y,
  [...document.querySelectorAll("#layers-table tbody tr")].map((row) => row.children[5].textContent),
  layerPlot.querySelectorAll(".barlayer .point").length];
window.dispatchEvent(new Event("beforeprint"));
window.dispatchEvent(new Event("afterprint"));
seen.plots = document.querySelectorAll(".js-plotly-plot").length;
seen.markup = document.querySelectorAll("b").length;
const probe = Object.assign(document.createElement("pre"), {id: "probe", textContent: JSON.stringify(seen)});
document.body.append(probe);
</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_browser_draws_every_point_and_links_rows_without_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", classes=["</script><b>", *CLASSES[1:]])
    page = Page(write_report(run))
    copy = tmp_path / "probe.html"
    copy.write_text(page.html.replace("</body>", PROBE), encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=8000"
    )
    done = subprocess.run(
        ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert probe is not None
    seen = json.loads(html.unescape(probe.group(1)))
    linked = [attrs["data-point"] for _, attrs in page.of("tr") if "data-point" in attrs]
    points = page.data["points"]
    assert seen["drawn"] == TRIALS - FAILED + 1  # trials, front among them, and dense
    assert seen["by_row"][:2] == [[linked[2]], TRIALS - FAILED + 2]  # and the ring
    assert f"model {points['label'][int(linked[2])]}: test " in seen["by_row"][2]
    assert "prune.sparsity" in seen["by_row"][2]
    assert seen["by_plot"] == [linked[1]]
    assert (seen["title"], seen["test_title"]) == ("validation accuracy", "test accuracy")
    short = sum(page.data["points"]["rungs"][i] == 1 for i in range(TRIALS - FAILED) if i not in page.data["front"])
    rest = TRIALS - FAILED - len(page.data["front"]) - short
    assert seen["sizes"] == [["stopped at rung 0", short, 5], ["trained further", rest, 8]]
    tested = [points["test_accuracy"][i] for i in page.data["front"][::-1]]
    assert seen["test_y"] == [y for y in tested if y is not None]
    assert (seen["line"], seen["no_line"]) == ("lines+markers", "markers")
    assert seen["heading"] == "Test accuracy against accuracy of the worst class"
    assert "epochs " in seen["by_row"][2]
    assert "began from " in seen["by_row"][2]
    lines = page.data["volume"]["at"]
    assert seen["volume"] == [lines[-1], TRIALS - 1, len(lines)]
    assert seen["plots"] == 6
    label, bits, table_bits, bars = seen["layers"]
    chosen = next(m for m in page.data["layers"] if m["label"] == label)
    assert (bits, table_bits) == (chosen["bits"], [str(b) for b in chosen["bits"]])
    assert bars == 3 * len(chosen["layer"])
    assert seen["markup"] == 0
