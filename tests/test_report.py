"""The report page, made from synthetic run folders. No cluster, no torch."""

import html
import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from raydeep.errors import RaydeepError
from raydeep.report.folder import read_run
from raydeep.report.page import write_report
from raydeep.report.plots import frame
from raydeep.report.words import answer, duration, size, times

TRIALS, FAILED, EPOCHS = 60, 2, 40
DENSE_BYTES = 312_000
CLASSES = list("0123456789")
VOID = {"meta", "link", "br", "img", "input", "hr"}


def make_run(
    folder: Path,
    *,
    classes: list[str] = CLASSES,
    error: str = "RuntimeError: out of memory",
    search: bool = True,
) -> Path:
    """A run folder as a finished search (or training) of the digits leaves it."""
    rng = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.yaml").write_text(
        "name: digits\nseed: 1\nmodel:\n  name: resnet8\ntrain:\n  epochs: 40\nsearch:\n  trials: 60\n"
    )
    provenance = {
        "id": "digits-20260102-030405",
        "raydeep": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        "command": "raydeep search jobs/digits.yaml",
        "versions": {"python": "3.11.2", "torch": "2.15.0", "ray": "2.60.0", "onnxruntime": "1.32.0"},
        "hardware": {"cpu": "AMD EPYC 7R13", "cores": 2, "memory_bytes": 8_320_000_000, "gpus": []},
        "git_commit": "0f3c9a7d51e24b6f8a90",
        "seed": 1,
        "dataset": {
            "hash": "sha256:9b1e4c07d2",
            "classes": classes,
            "rows": {"train": 1257, "val": 180, "test": 360},
            "image": [8, 8, 1],
        },
    }
    dump(folder / "provenance.json", provenance)
    with (folder / "metrics.jsonl").open("w") as file:
        for epoch in range(1, EPOCHS + 1):
            row = {
                "stage": "train",
                "epoch": epoch,
                "epochs": EPOCHS,
                "step": 18 * epoch,
                "train_loss": 0.05 + 2.1 * math.exp(-epoch / 5) + rng.uniform(0, 0.03),
                "val_loss": 0.09 + 2.0 * math.exp(-epoch / 6) + rng.uniform(0, 0.03),
                "val_accuracy": 0.985 - 0.8 * math.exp(-epoch / 4) + rng.uniform(-0.004, 0.004),
                "lr": 0.1,
                "seconds": 0.41,
                "images_per_s": 3050.0,
                "order_hash": "ab12",
            }
            file.write(json.dumps(row) + "\n")
    models: list[dict] = []
    if search:
        done = write_ledger(folder, rng, error)
        models = [front_row(row, rng) for row in choose(done)[::-2]]
    dense = {
        "label": "dense",
        "trial": None,
        "val_accuracy": 0.9889,
        "test_accuracy": 0.9861,
        "bytes": DENSE_BYTES,
        "onnx_bytes": 318_000,
        "compression_ratio": 1.0,
        "latency_ms": 0.131,
        "latency_ratio": 1.0,
        "latency_spread": 0.0,
        "sparsity": 0.0,
        "weight_bits": None,
        "activation_bits": None,
        "distill": False,
        "verified": True,
        "packed_differ": 0,
        "onnx_differ": 0,
        "rows": 360,
    }
    dump(folder / "front.json", {"dense": dense, "models": models})
    k = len(classes)
    confusion = [[36 if i == j else 0 for j in range(k)] for i in range(k)]
    for i, j, n in [(8, 1, 3), (3, 9, 1), (5, 9, 1)]:
        if i < k and j < k:
            confusion[i][i] -= n
            confusion[i][j] += n
    dump(folder / "evaluation.json", {"split": "test", "confusion": confusion})
    return folder


def write_ledger(folder: Path, rng: random.Random, error: str) -> list[dict]:
    lines: list[dict] = [{"schema": 1, "space": {}}]
    for trial in range(TRIALS):
        config = {
            "prune.sparsity": rng.choice([0.0, 0.5, 0.7, 0.8, 0.9, 0.95]),
            "quantize.weight_bits": rng.choice([2, 3, 4, 8]),
            "quantize.activation_bits": rng.choice([None, 4, 8]),
            "distill.enabled": rng.random() < 0.5,
        }
        kept, bits = 1 - config["prune.sparsity"], config["quantize.weight_bits"]
        loss = 0.25 / bits**2.5 + 0.002 / kept**1.2 + abs(rng.gauss(0, 0.006)) - 0.002 * config["distill.enabled"]
        accuracy = max(0.11, 0.988 - loss - (0.3 if bits == 2 and kept < 0.2 else 0))
        packed = int(900 + DENSE_BYTES * kept * (bits + 1.6 * (kept < 1)) / 32 * rng.uniform(0.9, 1.0))
        failed = trial in (17, 41)
        lines.append(
            {
                "trial": trial,
                "status": "failed" if failed else "done",
                "config": config,
                "seed": trial,
                "val_accuracy": None if failed else round(accuracy, 4),
                "test_accuracy": None if failed else round(accuracy - rng.uniform(-0.003, 0.008), 4),
                "bytes": None if failed else packed,
                "compression_ratio": None if failed else DENSE_BYTES / packed,
                "sparsity": None if failed else 1 - kept,
                "parameters": 78_000,
                "nonzeros": int(78_000 * kept),
                "seconds": rng.uniform(2.5, 4.0),
                "cpu_seconds": rng.uniform(2.4, 3.9),
                "artifact_sha256": "00ff",
                "error": f"Traceback (most recent call last):\n  File x, line 1\n{error}" if failed else None,
            }
        )
    with (folder / "ledger.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return [line for line in lines[1:] if line["status"] == "done"]


def choose(done: list[dict]) -> list[dict]:
    """The front by brute force: an oracle apart from raydeep.search.pareto."""

    def beaten(a: dict) -> bool:
        return any(
            b["bytes"] <= a["bytes"]
            and b["val_accuracy"] >= a["val_accuracy"]
            and (b["bytes"], b["val_accuracy"]) != (a["bytes"], a["val_accuracy"])
            for b in done
        )

    return sorted((row for row in done if not beaten(row)), key=lambda row: row["bytes"])


def front_row(row: dict, rng: random.Random) -> dict:
    config = row["config"]
    return {
        "label": f"t{row['trial']:03d}",
        **{key: row[key] for key in ("trial", "val_accuracy", "test_accuracy", "bytes", "compression_ratio")},
        "onnx_bytes": 90_000,
        "latency_ms": 0.021,
        "latency_ratio": rng.uniform(0.8, 6.5),
        "latency_spread": 0.21,
        "sparsity": row["sparsity"],
        "weight_bits": config["quantize.weight_bits"],
        "activation_bits": config["quantize.activation_bits"],
        "distill": config["distill.enabled"],
        "verified": True,
        "packed_differ": 0,
        "onnx_differ": 0,
        "rows": 360,
        "layers": layer_rows(config["quantize.weight_bits"], row["sparsity"]),
        "sensitivity": {"conv<1>": {"2": 0.5, "8": 0.0}},
    }


def layer_rows(bits: int, sparsity: float) -> list[dict]:
    return [
        {
            "layer": name, "shape": shape, "parameters": math.prod(shape), "macs": 100 * math.prod(shape),
            "nonzeros": round(math.prod(shape) * (1 - sparsity)), "weight_bits": bits, "activation_bits": None,
            "bytes": math.prod(shape) * bits // 8,
        }
        for name, shape in (("conv<1>", [32, 1, 3, 3]), ("fc", [10, 128]))
    ]  # fmt: skip


def dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


class Page(HTMLParser):
    """What the tests ask of a page: elements, their nesting, and the text of scripts and table rows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(self.html)
        self.close()
        assert self.open == [], f"elements left open: {self.open}"
        embedded = [t for t, (_, a) in zip(self.scripts, self.of("script"), strict=True) if a.get("id") == "run-data"]
        assert len(embedded) == 1
        self.data = json.loads(embedded[0])

    def of(self, tag: str) -> list[tuple[str, dict]]:
        return [item for item in self.tags if item[0] == tag]

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.text += data
            if "td" in self.open or "th" in self.open:
                self.rows[-1][-1] += data


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
    assert [points["trial"][i] for i in page.data["front"]] == expected
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
    assert [path.name for path in run_dir.iterdir() if "tmp" in path.name] == []
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


PROBE = """<script>
const plot = document.getElementById("plot-front"), rows = [...document.querySelectorAll("tr[data-point]")];
const current = () => rows.filter((row) => row.getAttribute("aria-current")).map((row) => row.dataset.point);
const drawn = () => plot.querySelectorAll(".scatterlayer .point").length;
const seen = {drawn: drawn(), title: plot.layout.yaxis.title.text};
rows[2].dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
seen.by_row = [current(), drawn(), document.getElementById("readout").textContent];
plot.emit("plotly_click", {points: [{customdata: Number(rows[1].dataset.point)}]});
seen.by_plot = current();
document.querySelector("[data-accuracy=test_accuracy]").click();
seen.test_title = plot.layout.yaxis.title.text;
seen.test_y = plot.data[1].y;
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
    assert seen["test_y"] == [points["test_accuracy"][i] for i in page.data["front"]]
    assert seen["plots"] == 5
    label, bits, table_bits, bars = seen["layers"]
    chosen = next(m for m in page.data["layers"] if m["label"] == label)
    assert (bits, table_bits) == (chosen["bits"], [str(b) for b in chosen["bits"]])
    assert bars == 3 * len(chosen["layer"])
    assert seen["markup"] == 0
