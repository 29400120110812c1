"""The GPU benchmarks in their tiny mode on the CPU, without data sets; and that they need no Ray."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks" / "gpu"
ABSENT = {"ray", "pyarrow", "onnxruntime", "optuna", "sklearn", "plotly", "scipy", "onnx", "typer"}
LAUNCH = """
import json, os, runpy, sys
blocked = set(json.loads(sys.argv.pop(1)))
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *args):
        return None if name.split(".")[0] in blocked else self.finder.find_spec(name, *args)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.argv.pop(0)
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
assert not blocked & {name.split(".")[0] for name in sys.modules}
"""


def script(name: str, *options: str) -> list[str]:
    """What a script prints, where Ray and all that is not in its list of needs can't be imported."""
    command = [sys.executable, "-c", LAUNCH, json.dumps(sorted(ABSENT)), str(FOLDER / name), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def values(whole: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["value"] for row in whole["results"]}


def check_cifar10(lines: list[str]) -> dict[str, Any]:
    """Check the JSON of a tiny training; returns its provenance."""
    whole = json.loads(lines[-1])
    facts = whole["provenance"]
    assert whole["benchmark"] == "gpu-cifar10"
    assert facts["foreign_modules"] == []
    assert facts["data"] == "made up"
    assert {"device", "cuda", "versions", "recipe", "widths", "warm_up_s", "read_s", "reference"} <= facts.keys()
    seeds = facts["seeds"]
    assert [one["seed"] for one in seeds] == [0, 1]
    for one in seeds:
        assert 0.3 < one["accuracy"] <= 1  # chance is 0.1
        assert one["train_s"] > 0
        assert one["images_per_s"] == pytest.approx(facts["train_rows"] / one["train_s"])
        assert one["peak_bytes"] > 0
        assert one["compilations"] == 0
    found = values(whole)
    assert found["accuracy, mean"] == pytest.approx(50 * sum(one["accuracy"] for one in seeds), rel=1e-4)
    assert found["seeds of at least 94%"] == sum(one["accuracy"] >= 0.94 for one in seeds) / 2
    return facts


def test_cifar10_learns_and_tells_what_it_measured():
    lines = script("cifar10.py", "--tiny", "--device", "cpu", "--json")
    assert [json.loads(line)["seed"] for line in lines[:2]] == [0, 1]
    facts = check_cifar10(lines)
    assert facts["recipe"]["compile"] is False
    assert facts["cuda"] is None


def test_throughput_measures_each_part():
    whole = json.loads(script("throughput.py", "--tiny", "--device", "cpu")[-1])
    assert whole["benchmark"] == "gpu-throughput"
    assert whole["provenance"]["foreign_modules"] == []
    rows = [row for row in whole["results"] if "what" in row]
    assert {row["what"] for row in rows} == {"augment", "step", "fit"}
    assert {row["side"] for row in rows} == {32, 48}
    assert all(row["value"] > 0 and row["peak_bytes"] > 0 for row in rows)
    for row in rows:
        if row["what"] != "augment":
            assert sum(row["shares"].values()) == pytest.approx(1)
            assert min(row["shares"].values()) >= 0
            assert row["shares"]["step"] > 0.2
    assert all(row["shares"]["augment"] == 0 for row in rows if row["what"] == "step")
    assert all(row["shares"]["augment"] > 0 for row in rows if row["what"] == "fit" and row["kind"] == "autoaugment")


@pytest.mark.gpu
def test_cifar10_runs_on_cuda():
    facts = check_cifar10(script("cifar10.py", "--tiny", "--device", "cuda", "--json"))
    assert facts["recipe"]["compile"] is True
    assert facts["recipe"]["precision"] == "bfloat16"
    assert facts["cuda"]


# the parts


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules `common` and `network`."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import common
    import network

    return common, network


def test_whitened_patches_are_uncorrelated(parts):
    common, network = parts
    images = torch.from_numpy(common.made_up(200).images).permute(0, 3, 1, 2).float() / 255 - 0.5
    model = network.Fast(widths=(8, 8, 8))
    network.whiten(model, images)
    with torch.no_grad():
        out = model.whiten(images).transpose(0, 1).flatten(1)
    count = len(out) // 2
    moments = out[:count] @ out[:count].T / out.shape[1]
    assert torch.equal(out[count:], -out[:count])
    assert (moments - torch.diag(moments.diag())).abs().max() < 0.02
    assert moments.diag().max() == pytest.approx(1, abs=0.02)
    assert not model.whiten.weight.requires_grad


def test_the_network_takes_both_sizes_and_starts_near_no_opinion(parts):
    model = parts[1].Fast(widths=(8, 16, 16)).eval()
    for side in (32, 48):
        with torch.no_grad():
            logits = model(torch.randn(4, 3, side, side))
        assert logits.shape == (4, 10)
        assert logits.abs().max() < 2


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_compiled_in_bfloat16_the_gradient_is_finite(parts, channels_last):
    common, network = parts
    pixels = common.made_up(64)
    model = network.Fast(widths=(8, 16, 16))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.compile(model)(torch.from_numpy(pixels.images).permute(0, 3, 1, 2) / 128 - 1)
    torch.nn.functional.cross_entropy(logits.float(), torch.from_numpy(pixels.labels)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_pictures_are_read_as_torchvision_keeps_them(parts, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 3, 32, 32), np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for i, name in enumerate(names):
        part = {"data": pixels[2 * i : 2 * i + 2].reshape(2, -1), "labels": [i, 9 - i]}
        (folder / name).write_bytes(pickle.dumps(part))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    train, test = parts[0].cifar10(tmp_path)
    assert np.array_equal(train.images, pixels[:10].transpose(0, 2, 3, 1))
    assert train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert np.array_equal(test.images, pixels[10:].transpose(0, 2, 3, 1))
    assert test.labels.dtype == np.int64


def test_a_folder_without_pictures_is_refused(parts, tmp_path):
    with pytest.raises(SystemExit, match="neither cifar-10-batches-py nor train-"):
        parts[0].cifar10(tmp_path)
