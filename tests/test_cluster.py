"""The whole path on a real local Ray: as a user types it, one process tree a command."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from commands import ray_processes, run, start, wait_for

from raydeep.disk import read_lines

pytestmark = pytest.mark.cluster

JOBS = Path(__file__).parent.parent / "jobs"
TRIALS = 8
SMALL = [
    "--set", "train.epochs=12", "--set", "recover.epochs=2", "--set", f"search.trials={TRIALS}",
    "--set", "search.startup_trials=4", "--set", "export.latency_rounds=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def killed_and_resumed(home: Path) -> tuple[Path, list[dict], str]:
    """A digits search whose driver is killed (kill -9) mid-search, then resumed: run, ledger before, output."""
    storage = home / "runs"
    process = start(home, "search", str(JOBS / "digits.yaml"), "--set", f"storage={storage}", *SMALL)

    def ledger() -> list[dict]:
        rows = [row for path in storage.glob("digits-*/ledger.jsonl") for row in read_lines(path)]
        return [row for row in rows if "trial" in row]

    wait_for(lambda: len(ledger()) >= 2 or process.poll() is not None, 300, "two trials")
    assert process.poll() is None, process.stdout.read()  # type: ignore[union-attr]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not ray_processes(home), 60, "Ray to follow its driver")
    before = ledger()
    assert 2 <= len(before) < TRIALS
    [folder] = storage.glob("digits-*")
    code, said = run(home, "search", "--resume", str(folder))
    assert code == 0, said
    return folder, before, said


def test_resume_repeats_no_trial(killed_and_resumed: tuple[Path, list[dict], str]) -> None:
    folder, before, _ = killed_and_resumed
    rows = [row for row in read_lines(folder / "ledger.jsonl") if "trial" in row]
    assert rows[: len(before)] == before
    ends = [row for row in rows if row["event"] == "end"]
    assert sorted(row["trial"] for row in ends) == list(range(TRIALS))
    assert len({json.dumps(row["config"], sort_keys=True) for row in ends}) == TRIALS
    assert {row["status"] for row in ends} == {"done"}
    rungs = [(row["trial"], row["rung"]) for row in rows if row["event"] == "rung"]
    assert len(rungs) == len(set(rungs)) > TRIALS  # some went on
    assert not list((folder / "trials").glob("t*/state-*")), "what trials go on from is left behind"


def test_the_front_is_verified_and_reported(killed_and_resumed: tuple[Path, list[dict], str]) -> None:
    folder, _, said = killed_and_resumed
    front = json.loads((folder / "front.json").read_text())
    rows = {row["trial"]: row for row in read_lines(folder / "ledger.jsonl") if row.get("event") == "end"}
    assert front["dense"]["test_accuracy"] > 0.9
    assert front["models"]
    assert front["unverified"] == []
    for model in front["models"]:
        trial = rows[model["trial"]]
        files = {path.name for path in (folder / "models" / model["label"]).iterdir()}
        assert {"spec.json", "model.safetensors", "model.rdz", "model.onnx", "verify.json", "SHA256SUMS"} <= files
        assert (folder / "models" / model["label"] / "model.rdz").stat().st_size == model["bytes"] == trial["bytes"]
        assert model["val_accuracy"] == trial["val_accuracy"]
        assert "test_accuracy" not in trial, "the search has seen the test split"
        assert model["packed_differ"] == 0
        assert model["onnx_differ"] * 500 <= model["rows"]
        assert model["label"] in said
    assert (folder / "report.html").stat().st_size > 1_000_000
    gallery = json.loads((folder / "gallery.json").read_text())
    assert gallery["wrong"] == round((1 - front["dense"]["test_accuracy"]) * gallery["rows"])
    assert bool(gallery["wrong"]) == bool(gallery["errors"])
    assert gallery["augmentation"]["changes"]
    epochs = [row["epoch"] for row in read_lines(folder / "metrics.jsonl")]
    assert epochs == list(range(1, 13))


def test_predict_labels_pictures_with_a_model_of_the_front(
    home: Path, killed_and_resumed: tuple[Path, list[dict], str]
) -> None:
    from sklearn.datasets import load_digits

    from raydeep.data.decode import encode_png

    folder = killed_and_resumed[0]
    label = json.loads((folder / "front.json").read_text())["models"][0]["label"]
    digits = load_digits()
    pictures = home / "pictures"
    pictures.mkdir()
    for i in range(30):
        pixels = (digits.images[i] * (255 / 16)).round().astype("uint8")
        (pictures / f"{i:02d}.png").write_bytes(encode_png(pixels))
    code, said = run(home, "predict", str(folder / "models" / label), str(pictures), "--json")
    assert code == 0, said
    found = [json.loads(line)["label"] for line in said.splitlines()]
    assert sum(a == str(b) for a, b in zip(found, digits.target[:30], strict=True)) >= 25


def test_export_writes_a_trial_that_is_not_on_the_front(
    home: Path, killed_and_resumed: tuple[Path, list[dict], str]
) -> None:
    folder = killed_and_resumed[0]
    front = {m["trial"] for m in json.loads((folder / "front.json").read_text())["models"]}
    other = next(n for n in range(TRIALS) if n not in front)
    code, said = run(home, "export", str(folder), "--trial", str(other))
    assert code == 0, said
    assert json.loads((folder / "models" / f"t{other:03d}" / "verify.json").read_text())["verified"] is True


def test_a_failed_trial_is_recorded_and_the_search_goes_on(
    home: Path, killed_and_resumed: tuple[Path, list[dict], str]
) -> None:
    storage = home / "failing"
    code, said = run(
        home, "search", str(JOBS / "digits.yaml"), "--from", str(killed_and_resumed[0]), "--set", f"storage={storage}",
        "--set", "search.space={recover.lr: [0.02, 1e12]}", "--set", "search.trials=2", "--set", "recover.epochs=2",
        "--set", "search.scheduler=none",
        "--set", "export.latency_rounds=3",
    )  # fmt: skip
    assert code == 0, said
    assert "1 trials finished, 1 failed" in said
    rows = [row for row in read_lines(next(storage.glob("digits-*/ledger.jsonl"))) if row.get("event") == "end"]
    failed = [row for row in rows if row["status"] == "failed"]
    assert [row["config"] for row in failed] == [{"recover.lr": 1e12}]
    assert "TrainError: the loss is not finite" in failed[0]["error"]


def test_a_search_is_not_overwritten_by_train(home: Path, killed_and_resumed: tuple[Path, list[dict], str]) -> None:
    code, said = run(home, "train", "--resume", str(killed_and_resumed[0]))
    assert code == 2
    assert "the run of a search" in said


@pytest.mark.slow  # the same of streamed data is in test_cluster_data.py, of the loop alone in test_loop.py
def test_order_and_result_do_not_depend_on_the_number_of_workers(home: Path) -> None:
    epochs = {}
    for workers in (1, 2):
        storage = home / f"w{workers}"
        code, said = run(
            home, "train", str(JOBS / "digits.yaml"), "--set", f"storage={storage}", "--set", "train.epochs=2",
            "--set", f"scaling.workers={workers}", "--set", "export.latency_rounds=3",
        )  # fmt: skip
        assert code == 0, said
        [folder] = storage.glob("digits-*")
        epochs[workers] = read_lines(folder / "metrics.jsonl")
    for one, two in zip(epochs[1], epochs[2], strict=True):
        assert one["order_hash"] == two["order_hash"]
        assert one["train_loss"] == pytest.approx(two["train_loss"], abs=1e-4)
        assert one["val_rows"] == two["val_rows"] == 269


def test_a_loss_that_is_not_finite_is_one_error(home: Path) -> None:
    code, said = run(
        home, "train", str(JOBS / "digits.yaml"), "--set", f"storage={home / 'nan'}", "--set", "train.lr=1e9",
        "--set", "train.warmup_epochs=0",
    )  # fmt: skip
    assert code == 2, said
    assert "error: the loss is not finite at epoch 1" in said
    assert "train.lr" in said
    assert "Traceback" not in said


def test_nothing_is_left_running(home: Path) -> None:
    wait_for(lambda: not ray_processes(home), 60, "Ray to stop")
    assert ray_processes(home) == []
