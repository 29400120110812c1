"""The Python interface, and parts of a job that are the user's own code: those that README shows, and bad ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import raydeep
from raydeep.compress import masks, plan, prune
from raydeep.config import Data, Job, Prune, Train, load_job, parse_job
from raydeep.data import shards, sources
from raydeep.data.augment import Augmenter
from raydeep.data.batches import Batches, Micro
from raydeep.data.resident import Pixels
from raydeep.errors import DataError, JobError, ModelError, RaydeepError, ResourceError
from raydeep.model import artifact, layers, zoo
from raydeep.train import losses
from raydeep.train.loop import fit

README = Path(__file__).resolve().parents[1] / "README.md"
[MINE] = [text for text in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "class Scans" in text]
Write = Callable[[str], str]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module that can be imported, and gives its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> str:
        name = f"mine_{abs(hash((text, tmp_path)))}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return name

    return write


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """60 pictures of 8×8: those of class 1 are bright."""
    labels = np.arange(60) % 2
    noise = np.random.default_rng(0).integers(0, 100, (60, 8, 8))
    np.savez(tmp_path / "scans.npz", pixels=(noise + 120 * labels[:, None, None]).astype(np.uint8), labels=labels)
    return tmp_path / "scans.npz"


# the interface


def test_functions_stand_where_packages_of_their_names_are():
    code = """
        import raydeep
        from raydeep.train import losses
        import raydeep.search.pareto, raydeep.compress.masks
        from raydeep import compress, search, train
        print(*(f"{f.__module__}.{f.__name__}" for f in (raydeep.train, compress, search)), losses.__name__)
    """
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    ).stdout
    assert said.split() == ["raydeep.api.train", "raydeep.api.compress", "raydeep.api.search", "raydeep.train.losses"]


def test_importing_raydeep_imports_nothing_heavy():
    code = "import raydeep, sys; print(sorted({'torch', 'ray', 'numpy', 'pydantic'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_is_there_and_documented():
    for name in raydeep.__all__:
        assert getattr(raydeep, name).__doc__, name
        assert name in dir(raydeep)
    with pytest.raises(AttributeError, match="module 'raydeep' has no attribute 'sarch'"):
        raydeep.sarch  # noqa: B018


@pytest.mark.parametrize("stage", [raydeep.train, raydeep.compress, raydeep.search], ids=lambda stage: stage.__name__)
def test_a_stage_refuses_what_is_no_job(stage, tmp_path, job):
    with pytest.raises(JobError, match="needs a job, or a run to resume"):
        stage()
    with pytest.raises(JobError, match=r"expected a raydeep.Job, found str; raydeep.load_job\(PATH\) reads"):
        stage("jobs/digits.yaml")
    with pytest.raises(RaydeepError, match="not a run folder"):
        stage(resume=tmp_path)
    run = raydeep.Run.create(job, "raydeep train job.yaml")
    with pytest.raises(JobError, match=r"train\.epochs was 1, now 2"):
        stage(job.model_copy(update={"train": job.train.model_copy(update={"epochs": 2})}), resume=run)
    if stage is not raydeep.train:
        with pytest.raises(JobError, match="goes on with its own dense model"):
            stage(job, resume=run, start=tmp_path)


def test_compress_goes_on_with_no_search(job):
    search = job.model_copy(update={"search": job.search.model_copy(update={"trials": 9})})
    run = raydeep.Run.create(search, "raydeep search job.yaml")
    with pytest.raises(JobError, match=r"search\.trials was 9, now 1"):
        raydeep.compress(resume=run)


def test_a_ray_of_the_callers_own_is_left_alone(job, tmp_path, monkeypatch):
    import ray

    from raydeep.train import cluster

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: pytest.fail("the caller's Ray was ended"))
    with (
        pytest.raises(ResourceError, match="this process is connected to a Ray already, which this would end"),
        cluster.cluster(job, tmp_path / "ray.log"),
    ):
        raise AssertionError("there is no Ray")


def test_a_run_tells_its_front_or_that_it_has_none(job):
    run = raydeep.Run.create(job, lambda name: f"raydeep train {name}/job.yaml")
    assert json.loads((run.path / "provenance.json").read_text())["command"] == f"raydeep train {run.path}/job.yaml"
    for look in ("front", "dense"):
        with pytest.raises(RaydeepError, match=r"has no front\.json yet; finish it with --resume"):
            getattr(run, look)
    (run.path / "front.json").write_text('{"dense": {"label": "dense"}, "models": [{"label": "t001"}]}')
    assert (run.dense["label"], [row["label"] for row in run.front]) == ("dense", ["t001"])


# what README shows


def test_the_parts_of_the_readme_are_short():
    tops = re.split(r"^(?=def |class )", MINE, flags=re.MULTILINE)[1:]
    lines = {top.split("(")[0].split(":")[0]: len([line for line in top.splitlines() if line.strip()]) for top in tops}
    assert set(lines) == {"def network", "class Scans", "def focal", "def scaled"}
    assert max(lines.values()) < 15


def test_the_parts_of_the_readme_train_and_prune(mine, scans):
    name = mine(MINE)
    manifest = shards.write_dataset(Data(source=f"{name}:Scans", path=str(scans)), scans.parent / "dataset")
    assert (manifest.classes, manifest.rows("train")) == (["0", "1"], 48)
    held = np.load(scans)
    data = Pixels(held["pixels"][..., None], held["labels"])
    job = parse_job(
        {
            "model": {"name": f"{name}:network", "args": {"width": 4}}, "prune": {"score": f"{name}:scaled"},
            "train": {"epochs": 4, "batch_size": 20, "lr": 0.05, "loss": f"{name}:focal"},
        }, "README",
    )  # fmt: skip
    spec = artifact.make_spec(job.model.name, job.model.args, ["0", "1"], (8, 8, 1), [0.5], [0.25])
    plan.check(job, spec)
    net = artifact.build(spec)
    batches = Batches(data, Augmenter(job.augment, [0.5], [0.25]), 20, 0)
    history = fit(net, losses.of(job.train), batches, job.train)
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    prune.prepare(net, job.prune.model_copy(update={"sparsity": 0.5}), recovers=False)
    fan_in = {name: module.weight[0].numel() for name, module in layers.compressible(net)}
    kept = {name: int((module.weight != 0).sum()) for name, module in layers.compressible(net)}
    assert sum(kept.values()) == sum(module.weight.numel() for _, module in layers.compressible(net)) // 2
    assert len(fan_in) == 3


def test_the_job_of_the_readme_names_its_parts():
    [text] = [t for t in re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL) if "mine:Scans" in t]
    job = parse_job(yaml.safe_load(text), "README")
    assert (job.train.loss, job.prune.score, job.data.source) == ("mine:focal", "mine:scaled", "mine:Scans")


# losses


def test_a_loss_of_ones_own_is_taken_of_both_labels_of_a_mixed_picture(mine):
    name = mine("def loss(logits, labels):\n    return logits.gather(1, labels[:, None])[:, 0]")
    loss = losses.of(Train(loss=f"{name}:loss"))
    logits = torch.tensor([[1.0, 5.0], [2.0, 7.0]])
    labels, other = torch.tensor([0, 1]), torch.tensor([1, 0])
    plain = Micro(images=torch.zeros(2, 1, 2, 2), labels=labels, valid=2)
    assert loss(logits, plain).tolist() == [1.0, 7.0]
    mixed = plain._replace(other_labels=other, weight=torch.tensor([0.75, 0.5]))
    assert loss(logits, mixed).tolist() == [0.75 * 1 + 0.25 * 5, 0.5 * 7 + 0.5 * 2]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return (logits ** 2).mean()", r"gives a tensor of shape \(\) for 4 pictures, expected one loss a picture"),
        ("return 1.0", r"gives float for 4 pictures"),
        ("return labels * 0.5", r"does not depend on the logits: it can't be trained with"),
        ("return logits.sum(1) / 0", r"gives \[.*(inf|nan).*\] on small logits"),
        ("raise ValueError('no\\nmore')", r"fails on logits of shape \(4, 3\): no$"),
    ],
)
def test_a_loss_that_can_not_be_trained_with_is_refused(mine, body, told):
    name = mine(f"def loss(logits, labels):\n    {body}")
    with pytest.raises(JobError, match=rf"^train.loss {name}:loss {told}"):
        losses.check(f"{name}:loss", 3)


def test_label_smoothing_belongs_to_cross_entropy():
    with pytest.raises(JobError, match=r"label_smoothing belongs to loss cross_entropy, found loss mine:focal"):
        parse_job({"train": {"loss": "mine:focal", "label_smoothing": 0.1}}, "job.yaml")


# scores


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return [1]", r"found NoneType for layer 0, expected a dict with a tensor of shape \(2, 4\)"),
        ("return {n: w[0] for n, w in weights.items()}", r"found \(4,\) for layer 0"),
        ("return dict(weights)", r"scores of layer 0 are negative or not finite; the largest stay"),
        ("return {n: w / 0 for n, w in weights.items()}", r"scores of layer 0 are negative or not finite"),
        ("raise KeyError('x')", r"fails: 'x'"),
    ],
)
def test_a_score_that_ranks_nothing_is_refused(mine, body, told):
    name = mine(f"def score(model, weights, batches):\n    {body}")
    net = nn.Sequential(nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(8.0).reshape(2, 4) - 3)
    with pytest.raises(JobError, match=rf"^prune.score {name}:score:? {told}"):
        prune.prepare(net, Prune(score=f"{name}:score", sparsity=0.5), recovers=False)


def test_a_score_of_ones_own_may_use_gradients(mine):
    name = mine("""
        import torch
        def score(model, weights, batches):
            loss = sum(torch.nn.functional.cross_entropy(model(x), y) for x, y in batches)
            grads = torch.autograd.grad(loss, list(weights.values()))
            return {n: (w * g).abs() for (n, w), g in zip(weights.items(), grads)}
    """)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x, y = torch.randn(16, 4), torch.arange(16) % 2
    weights = {"0": net[0].weight, "2": net[2].weight}
    with torch.no_grad():
        found = masks.scores_of(f"{name}:score", net, weights, [(x, y)])
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(weights.values()))
    for (layer, weight), grad in zip(weights.items(), grads, strict=True):
        torch.testing.assert_close(found[layer], (weight * grad).abs().detach())
        assert not found[layer].requires_grad


def test_a_score_of_ones_own_ranks_no_channels():
    with pytest.raises(JobError, match=r"score mine:score ranks single weights: use kind weights or N:M"):
        parse_job({"prune": {"kind": "channels", "score": "mine:score"}}, "job.yaml")


# sources


SPLITS = """
    import io
    import numpy as np
    from PIL import Image

    class Held:
        classes = ["cat", "dog"]
        def __init__(self, rows): self.rows = rows
        def __len__(self): return self.rows
        def __getitem__(self, i):
            image = Image.fromarray(np.full((6, 5, 3), 40 * i, np.uint8))
            if i % 3 == 0: return image, np.int64(i % 2)
            if i % 3 == 1: return np.asarray(image), i % 2
            out = io.BytesIO(); image.save(out, "PNG")
            return out.getvalue(), i % 2

    def open(path): return {"train": Held(6), "test": Held(4)}
"""


def test_a_source_of_ones_own_gives_splits_and_pictures_of_each_kind(mine):
    name = mine(SPLITS)
    source = sources.open_source(Data(source=f"{name}:open"))
    assert source.classes == ["cat", "dog"]
    assert [row.split for row in source.rows] == ["train"] * 6 + ["test"] * 4
    assert [row.label for row in source.rows] == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    pixels, array, file = source.read(source.rows[i] for i in (3, 1, 2))
    assert pixels.shape == array.shape == (6, 5, 3)
    assert (pixels == 120).all()
    assert (array == 40).all()
    assert file[:4] == b"\x89PNG"


def test_facts_of_a_source_of_ones_own_change_with_its_module_and_files(mine, tmp_path):
    (tmp_path / "held").mkdir()
    cfg = Data(source=f"{mine(SPLITS)}:open", path=str(tmp_path / "held"))
    first = sources.fingerprint(cfg)
    assert sources.fingerprint(cfg) == first
    (tmp_path / "held" / "a.bin").write_bytes(b"1")
    assert sources.fingerprint(cfg) != first
    assert sources.fingerprint(Data(source=f"{mine(SPLITS + '    # changed')}:open", path=cfg.path)) != first


def test_a_dataset_that_has_grown_is_opened_anew_in_the_same_process(mine, tmp_path):
    name = mine("""
        import pathlib
        def open(path): return [(p.read_bytes(), p.stem[0]) for p in sorted(pathlib.Path(path).iterdir())]
    """)
    (tmp_path / "held").mkdir()
    cfg = Data(source=f"{name}:open", path=str(tmp_path / "held"))
    for file in ("a1", "b1"):
        (tmp_path / "held" / file).write_bytes(b"x")
    assert len(sources.open_source(cfg).rows) == 2
    (tmp_path / "held" / "a2").write_bytes(b"y")
    assert len(sources.open_source(cfg).rows) == 3


def test_a_source_may_be_any_callable(mine):
    name = mine("""
        import functools
        class Opener:
            def __call__(self, path): return [(b"", "a"), (b"", "b")]
        one, two = Opener(), functools.partial(Opener(), )
    """)
    for part in ("one", "two"):
        cfg = Data(source=f"{name}:{part}")
        assert sources.open_source(cfg).classes == ["a", "b"]
        assert len(sources.fingerprint(cfg)) == 1


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("def open(path): return 7", "its factory gave a int; expected a dataset"),
        ("def open(path): return {'all': []}", "its factory gave the splits all; expected train, and val and test"),
        ("def open(path): return {'train': [], 'test': 3}", "its factory gave a int for test; expected a dataset"),
        ("def open(path): raise OSError('gone')", "its factory failed: gone"),
        ("def open(path): return [(b'', 0), b'']", "#1: a bytes; expected"),
        ("def open(path): return [(b'', 0), (b'', 1.5)]", r"#1: label 1\.5; expected integers from 0, or strings"),
        ("def open(path): return [(b'', 0), (b'', 0)]", "all labels are the same"),
        ("def open(path): return range(3)", "#0: a int; expected"),
        ("open = 3", "open is a int, expected a function or a class"),
        ("close = 3", "has no open"),
        ("import no_such_thing", "can't import mine_.*: No module named 'no_such_thing'"),
        ("1 / 0", "fails when it is imported: division by zero"),
    ],
)
def test_a_source_that_gives_no_pictures_is_refused(mine, body, told):
    with pytest.raises(DataError, match=told):
        sources.open_source(Data(source=f"{mine(body)}:open"))


def test_pictures_that_are_none_are_told_by_row_and_the_others_are_read(mine):
    name = mine("""
        import numpy as np
        class Held(list):
            targets = [0, 1, 0]
            def __getitem__(self, i):
                if i == 1: raise OSError("torn\\npage")
                return [np.zeros((2, 2), np.float32), None, np.zeros((2, 2), np.uint8)][i], 0
        def open(path): return Held([0, 0, 0])
    """)
    source = sources.open_source(Data(source=f"{name}:open"))
    first, second, third = source.read(source.rows)
    assert str(first) == "no picture but a float32 array; expected bytes of a file, a PIL image or uint8 pixels"
    assert str(second) == f"{name}:open all#1: can't be read: torn"
    assert third.shape == (2, 2)


def test_a_network_of_ones_own_that_is_no_function_is_refused(mine):
    with pytest.raises(ModelError, match=r"model.name mine_\d+:net: net is a int, expected a function or a class"):
        zoo.build(f"{mine('net = 3')}:net", {}, 2, (8, 8, 1))


@pytest.mark.parametrize("text", ["no", "a:b:c", "3a:b", "a.b", "torchvision:", "a: b"])
@pytest.mark.parametrize("key", ["data.source", "train.loss", "prune.score"])
def test_what_is_no_name_of_a_part_is_refused(key, text):
    with pytest.raises(JobError, match=rf"{key}: found '{re.escape(text)}', expected "):
        load_job(Path(__file__).parents[1] / "jobs" / "digits.yaml", [f"{key}='{text}'"])


# all of it, on Ray


@pytest.mark.cluster
def test_a_search_from_python_with_parts_of_ones_own(tmp_path, scans, home):
    [text] = [t for t in re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL) if "mine:Scans" in t]
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "job.yaml").write_text(text)
    (tmp_path / "go.py").write_text(
        textwrap.dedent("""
        import raydeep

        sets = ["train.epochs=2", "train.batch_size=16", "recover.epochs=1", "search.trials=3", "scaling.workers=2"]
        run = raydeep.search(raydeep.load_job("job.yaml", sets), quiet=True)
        print(run.path, run.dense["label"], *(row["label"] for row in run.front), sep="\\n")
    """)
    )
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_TMPDIR": str(home)}
    done = subprocess.run(
        [sys.executable, "go.py"], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    path, dense, *front = done.stdout.split()
    assert dense == "dense"
    assert front
    provenance = json.loads((Path(path) / "provenance.json").read_text())
    assert provenance["command"] == f"raydeep search {path}/job.yaml"
    job = Job.model_validate(raydeep.load_job(Path(path) / "job.yaml").model_dump())
    assert (job.train.loss, job.prune.score) == ("mine:focal", "mine:scaled")
