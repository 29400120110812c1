"""The model card: front matter that the Hub reads, facts that the folder holds, and a script that needs no raydeep."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCardData
from PIL import Image

from raydeep.config import Data, Export, Job, Model, parse_job
from raydeep.deploy import card, verify
from raydeep.disk import check_sums, json_bytes, read_json, write_bytes, write_summed, write_sums
from raydeep.errors import JobError
from raydeep.model import artifact
from raydeep.ops.predicting import predict

THREE = ("onnxruntime", "numpy", "pillow")
# Refuses every import of what is installed, but for the three packages and what they import themselves.
GUARD = """
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED | sys.stdlib_module_names and not name.startswith("_"):
            raise ImportError(f"{name} is not among what the card asks for")
sys.meta_path.insert(0, Guard())
sys.path.append(SITE)
"""


def parts(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a card."""
    match = re.fullmatch(r"---\n(.*?)---\n(.*)", (folder / "README.md").read_text(), re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1]), match[2]


def script(folder: Path) -> str:
    [found] = re.findall(r"```python\n(.*?)```", parts(folder)[1], re.DOTALL)
    return str(found)


# what it says


@pytest.mark.parametrize("label", ["dense", "t000"])
def test_the_front_matter_is_what_the_hub_reads(small_run, label):
    folder = small_run / "models" / label
    front, _ = parts(folder)
    facts = read_json(folder / "verify.json")
    assert front["license"] == "unknown"
    assert front["pipeline_tag"] == "image-classification"
    assert "onnx" in front["tags"]
    assert ("quantized" in front["tags"]) is (label == "t000")
    assert front["datasets"] == ["digits"]
    assert front["metrics"] == ["accuracy"]
    [model] = front["model-index"]
    [result] = model["results"]
    assert model["name"] == f"small-{label}"
    assert result["task"]["type"] == "image-classification"
    assert result["dataset"] == {"type": "digits", "name": "digits", "split": "test", "revision": "0" * 64}
    assert result["metrics"] == [
        {"type": "accuracy", "name": "Test accuracy", "value": round(facts["test_accuracy_onnx"], 6)}
    ]


def test_the_hubs_own_reader_takes_the_front_matter(small_run):
    front, _ = parts(small_run / "models" / "t000")
    data = ModelCardData(**front)
    [result] = data.eval_results
    assert (result.task_type, result.dataset_name, result.metric_type) == ("image-classification", "digits", "accuracy")
    assert yaml.safe_load(str(data))["model-index"][0]["results"][0]["metrics"][0]["type"] == "accuracy"


def test_the_card_says_what_was_measured_and_where_it_comes_from(small_run):
    folder = small_run / "models" / "t000"
    _, text = parts(folder)
    facts, known = read_json(folder / "verify.json"), read_json(folder / "about.json")
    assert f"| test accuracy | {facts['test_accuracy_onnx']:.2%} of 179 |" in text
    worst = facts["worst_class"]
    assert f"| worst class, {worst['name']} | {worst['accuracy']:.2%} of {worst['rows']} |" in text
    assert f"{facts['latency_ms']:.3g} ms, batch 1, onnxruntime, 1 thread" in text
    assert "The gate passed" in text
    assert f"| `model.rdz` | {(folder / 'model.rdz').stat().st_size:,} |" in text
    assert "Trained on **digits**: 1,168 train pictures" in text
    assert "Classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in text
    assert f"commit `{known['git_commit']}`" in text or known["git_commit"] is None
    [recipe] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    told = yaml.safe_load(recipe)
    assert told["prune"] == {"sparsity": 0.5}
    assert told["quantize"] == {"weight_bits": 4, "activation_bits": 8}
    assert told["seed"] == 0
    assert "No licence was stated" in text
    check_sums(folder)
    assert "about.json" in (folder / "SHA256SUMS").read_text()


def test_a_card_before_verification_promises_nothing(small_run, tmp_path):
    folder = tmp_path / "t000"
    shutil.copytree(small_run / "models" / "t000", folder)
    for name in ("about.json", "verify.json"):
        (folder / name).unlink()
    text = card.card(*artifact.load_model(folder), folder)
    front = yaml.safe_load(text.split("---\n")[1])
    assert "model-index" not in front
    assert "Not verified yet" in text


def test_names_of_others_break_neither_the_front_matter_nor_the_page(small_run, tmp_path):
    folder = Path(shutil.copytree(small_run / "models" / "dense", tmp_path / "dense"))
    known = read_json(folder / "about.json")
    known["dataset"]["name"] = "x: [y\n--- | <b>`"
    spec, tensors = artifact.load_model(folder)
    spec["classes"] = ["<script>", "a|b", "`c`", "---", *spec["classes"][4:]]
    write_bytes(folder / "about.json", json_bytes(known))
    text = card.card(spec, tensors, folder)
    write_bytes(folder / "README.md", text.encode())
    front, body = parts(folder)
    assert front["datasets"] == [known["dataset"]["name"]]
    assert "<script>" not in body
    assert "<b>" not in body
    assert "a&#124;b" in body


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (Data(), "digits"),
        (Data(source="torchvision:FashionMNIST", path="/home/someone/data"), "FashionMNIST"),
        (Data(source="folder", path="/home/someone/my_photos/"), "my_photos"),
        (Data(source="parquet", path="s3://bucket/deep/fashion?region=eu-1"), "fashion"),
    ],
)
def test_a_card_names_data_and_no_path(data, name):
    assert card.dataset_name(Job(data=data)) == name
    args = {"weights": "/home/someone/w.pt", "deep": [{"from": "~someone/x/y.pt", "url": "s3://bucket/z"}], "width": 8}
    job = Job(data=data, model=Model(name="own:net", args=args))
    trial = {"trial": 1, "config": {"model.args": args, "quantize.weight_bits": 4}}
    facts = card.about(job, "dense", {}, trial)
    assert facts["recipe"]["model"] == {
        "name": "own:net", "args": {"weights": "w.pt", "deep": [{"from": "y.pt", "url": "z"}], "width": 8}
    }  # fmt: skip
    assert facts["values"] == {"model.args": facts["recipe"]["model"]["args"], "quantize.weight_bits": 4}
    assert "someone" not in str(facts)
    assert "bucket" not in str(facts)


def test_a_teacher_is_named_without_its_path():
    job = Job().with_values({"distill.teacher": "/home/someone/runs/big-1"})
    facts = card.about(job, "t001", {}, {"trial": 1, "config": {"distill.teacher": "/home/someone/runs/big-1"}})
    assert (facts["recipe"]["distill"]["teacher"], facts["values"]["distill.teacher"]) == ("big-1", "big-1")


def test_a_licence_is_a_key_of_the_job():
    assert parse_job({"export": {"license": "cc-by-4.0"}}, "x").export.license == "cc-by-4.0"
    assert card.about(Job(export=Export(license="mit")), "dense", {})["license"] == "mit"
    for wrong in ("Apache 2.0", "", "mit\nx: y"):
        with pytest.raises(JobError, match=r"export\.license"):
            parse_job({"export": {"license": wrong}}, "x")


def test_the_worst_class_is_the_one_with_the_smallest_share():
    labels, predicted = np.array([0, 0, 1, 1, 1, 3]), np.array([0, 1, 1, 0, 0, 3])
    assert verify.worst_class(predicted, labels, list("abcd")) == {"name": "b", "accuracy": 1 / 3, "rows": 3}


# a folder stays whole


def test_checksums_hold_whenever_the_writing_stops(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    write_sums(tmp_path)
    from raydeep import disk

    held, real = [], disk.write_bytes

    def write(path: Path, data: bytes) -> None:
        real(path, data)
        check_sums(tmp_path)
        held.append(path.name)

    monkeypatch.setattr(disk, "write_bytes", write)
    write_summed(tmp_path, {"b": b"new", "c": b"c"})
    assert held == ["SHA256SUMS", "b", "c", "SHA256SUMS"]
    assert [line.split()[1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()] == ["a", "b", "c"]


# the script


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, digits) -> list[Path]:
    """Picture files of every kind that raydeep treats in a way of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    digit = np.kron(digits.test.images[0, :, :, 0], np.ones((3, 3), np.uint8))
    wide = np.concatenate([digit[:, :5], digit, digit[:, 10:]], 1)
    grey = Image.fromarray(wide)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {
        "small.png": Image.fromarray(digits.test.images[1, :, :, 0]), "wide.png": grey, "rgb.jpg": grey.convert("RGB"),
        "palette.gif": grey.convert("P"), "deep.png": Image.fromarray(wide.astype(np.uint16) * 257),
        "alpha.png": Image.merge("RGBA", [grey, grey, grey, Image.fromarray(255 - wide)]),
        "grey-alpha.png": Image.merge("LA", [grey, Image.fromarray(255 - wide)]), "bits.png": grey.convert("1"),
        "cmyk.jpg": grey.convert("CMYK"),
    }  # fmt: skip
    for name, picture in found.items():
        picture.save(folder / name)
    grey.convert("RGB").save(folder / "turned.jpg", exif=exif)
    return sorted(folder.iterdir())


def label(python: list[str], folder: Path, picture: Path) -> str:
    done = subprocess.run([*python, str(picture)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def expected(folder: Path, picture: Path) -> str:
    [row] = predict(folder, picture)
    assert row.error is None
    return f"{row.label} {row.probability:.4f}"


def test_the_script_is_short_and_asks_for_three_packages(small_run):
    text = script(small_run / "models" / "t000")
    assert len(text.splitlines()) <= 20
    assert max(map(len, text.splitlines())) <= 120
    named = {
        name for line in re.findall(r"^(?:from|import) (.*)", text, re.MULTILINE) for name in re.split(r"[ ,]+", line)
    }
    assert {"json", "sys", "numpy", "onnxruntime", "PIL"} <= named


def test_the_script_needs_three_packages_and_predicts_what_raydeep_does(small_run, pictures, tmp_path):
    """In a process that refuses all other imports; test_..._alone below has a real environment."""
    folder = small_run / "models" / "t000"
    allowed = {"onnxruntime", "numpy", "PIL", "flatbuffers", "google", "packaging", "sympy", "mpmath", "coloredlogs"}
    guard = GUARD.replace("ALLOWED", repr(allowed)).replace("SITE", repr(sysconfig.get_paths()["purelib"]))
    several = "import sys\nfor path in sys.argv[1:]:\n    sys.argv[1:] = [path]\n    exec(SCRIPT)\n"
    (tmp_path / "label.py").write_text(guard + several.replace("SCRIPT", repr(script(folder))))
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(tmp_path / "label.py"), *map(str, pictures)],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [expected(folder, picture) for picture in pictures]
    assert len({line.split()[0] for line in done.stdout.splitlines()}) > 1
    (tmp_path / "label.py").write_text(guard + "import torch")
    done = subprocess.run([sys.executable, "-I", "-S", str(tmp_path / "label.py")], capture_output=True, text=True)
    assert "torch is not among what the card asks for" in done.stderr


@pytest.mark.slow
def test_the_script_runs_where_the_three_packages_are_alone(small_run, pictures, tmp_path):
    folder = small_run / "models" / "t000"
    python = tmp_path / "env" / "bin" / "python"
    uv = [sys.executable, "-m", "uv"]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([*uv, "venv", "-q", "--python", sys.executable, str(tmp_path / "env")], check=True, env=env)
    pins = [f"{name}=={metadata.version(name)}" for name in THREE]
    subprocess.run([*uv, "pip", "install", "-q", "--python", str(python), *pins], check=True, env=env)
    listed = subprocess.run(
        [*uv, "pip", "list", "--python", str(python)], check=True, env=env, capture_output=True, text=True
    )
    assert "torch" not in listed.stdout
    assert "raydeep" not in listed.stdout
    (tmp_path / "label.py").write_text(script(folder))
    for picture in pictures:
        assert label([str(python), "-I", str(tmp_path / "label.py")], folder, picture) == expected(folder, picture)
