"""A model as a torch module again: the same logits, trainable, and back into a model folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from raydeep import mirror
from raydeep.compress import pack
from raydeep.data.batches import eval_batches
from raydeep.deploy import folder, loading, runtimes
from raydeep.disk import check_sums, read_json, write_json, write_sums
from raydeep.errors import ArtifactError, ModelError
from raydeep.model import artifact


@pytest.fixture
def copied(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the compressed model's folder, to break."""
    return Path(shutil.copytree(small_run / "models" / "t000", tmp_path / "t000"))


def pictures(digits, rows: int = 64) -> torch.Tensor:
    return torch.from_numpy(digits.train.images[:rows].copy())


@pytest.mark.parametrize("label", ["dense", "t000"])
def test_a_loaded_network_gives_the_verified_models_logits(small_run, digits, label):
    net = loading.load(small_run / "models" / label)
    assert not net.training
    about = net.raydeep
    assert (about.classes, about.shape) == (digits.classes, (8, 8, 1))
    assert (about.mean, about.std) == (digits.mean, digits.std)
    spec, tensors = pack.unpack((small_run / "models" / label / "model.rdz").read_bytes())
    [batch] = eval_batches(digits.test, spec["mean"], spec["std"], 512)
    with torch.no_grad():
        x = about.to_input(digits.test.images)
        assert torch.equal(x, batch.images)
        assert torch.equal(net(x), artifact.thaw(spec, tensors)(x))
        onnx = runtimes.open_onnx(small_run / "models" / label / "model.onnx")(digits.test.images)
        assert np.allclose(net(x).numpy(), onnx, atol=1e-3)


def train(net: nn.Module, digits, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9)
    x, labels = net.raydeep.to_input(pictures(digits)), torch.tensor(digits.train.labels[:64])
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("keep", [False, True])
def test_a_compressed_network_trains_on(small_run, digits, keep):
    net = loading.load(small_run / "models" / "t000", keep_zeros=keep).train()
    zeros = {
        name: module.weight == 0 for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    assert sum(int(zero.sum()) for zero in zeros.values()) > 300
    losses = train(net, digits, 30)
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())
    assert losses[-1] < 0.7 * losses[0]
    still = [bool((net.get_submodule(name).weight[zero] == 0).all()) for name, zero in zeros.items() if zero.any()]
    assert all(still) is keep
    assert not keep or len(still) > 2


def test_a_network_that_trained_on_is_a_model_folder_again(small_run, digits, tmp_path):
    net = loading.load(small_run / "models" / "t000", keep_zeros=True).train()
    train(net, digits, 3)
    out = loading.save(net, tmp_path / "tuned")
    assert net.training
    check_sums(out)
    x = net.eval().raydeep.to_input(digits.test.images)
    again = loading.load(out)
    with torch.no_grad():
        assert torch.allclose(again(x), net(x), atol=1e-5)
        found = runtimes.open_onnx(out / "model.onnx")(digits.test.images).argmax(1)
        assert (found == net(x).argmax(1).numpy()).mean() > 0.99
    with pytest.raises(ModelError, match="tuned: exists"):
        loading.save(net, out)


def test_a_dense_network_that_trained_on_is_a_start_for_a_search(small_run, digits, tmp_path):
    net = loading.load(small_run / "models" / "dense").train()
    train(net, digits, 3)
    spec, _ = artifact.load_model(artifact.dense_folder(loading.save(net, tmp_path / "tuned")))
    assert (spec["layers"], spec["folded"]) == ({}, [])  # what --from asks for
    assert spec == artifact.load_model(small_run / "models" / "dense")[0]


def test_a_network_that_can_not_be_saved_stays_in_its_mode(small_run, tmp_path, monkeypatch):
    net = loading.load(small_run / "models" / "dense").train()

    def refuse(*args: object, **how: object) -> None:
        raise ModelError("no")

    monkeypatch.setattr(artifact, "freeze", refuse)
    with pytest.raises(ModelError, match="no"):
        loading.save(net, tmp_path / "x")
    assert net.training


def test_save_wants_a_loaded_network(tmp_path):
    with pytest.raises(ModelError, match="expected a network of raydeep"):
        loading.save(nn.Linear(2, 2), tmp_path / "x")


def test_pictures_of_another_shape_are_refused(small_run):
    net = loading.load(small_run / "models" / "dense")
    with pytest.raises(ModelError, match=r"torch.float32 \[1, 8, 8, 1\]: expected torch.uint8 \[N, 8, 8, 1\]"):
        net.raydeep.to_input(torch.zeros(1, 8, 8, 1))
    with pytest.raises(ModelError, match="expected"):
        net.raydeep.to_input(np.zeros((1, 9, 8, 1), np.uint8))


# which folder is meant


def test_a_run_stands_for_its_answer(small_run, tmp_path):
    assert folder.find(str(small_run)) == small_run / "models" / "t000"
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    write_json(run / "front.json", {"models": [], "answer": "dense"})
    assert folder.find(run) == run / "models" / "dense"
    write_json(run / "front.json", {"models": [{"label": "t000"}, {"label": "t007"}], "answer": None})
    with pytest.raises(ModelError, match=r"a run with 2 models.*name one: models/t000, models/t007"):
        folder.find(run)


def test_a_changed_file_is_named(copied):
    data = bytearray((copied / "model.rdz").read_bytes())
    data[len(data) // 2] ^= 1
    (copied / "model.rdz").write_bytes(data)
    with pytest.raises(ModelError, match=r"model.rdz: missing or changed"):
        loading.load(copied)
    write_sums(copied)
    with pytest.raises(ArtifactError, match=r"model.rdz: "):
        loading.load(copied)
    (copied / "model.rdz").unlink()
    write_sums(copied)
    with pytest.raises(ModelError, match=r"model.rdz: missing"):
        loading.load(copied)


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(ModelError, match="not a model folder"):
        loading.load(tmp_path)


def test_a_model_in_a_bucket_is_fetched(small_run, bucket, on, digits):
    place = mirror.place(f"{bucket}/run")
    shutil.copytree(small_run, place)
    mirror.push_folder(place)
    on("b")
    net = loading.load(f"{bucket}/run/models/t000")
    assert net.raydeep.classes == digits.classes
    on("c")
    assert folder.find(f"{bucket}/run") == mirror.place(f"{bucket}/run") / "models" / "t000"
    assert read_json(mirror.place(f"{bucket}/run") / "models" / "t000" / "spec.json")["classes"] == digits.classes
