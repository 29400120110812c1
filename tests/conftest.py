"""Fixtures that the test files share: the digits, once a session, and picture folders in tmp_path."""

from __future__ import annotations

import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.fs as pafs
import pytest
from hypothesis import settings
from PIL import Image

from raydeep.config import Augment, Data, Job, Model, Train

if TYPE_CHECKING:  # what imports torch is imported by the fixtures that need it
    from raydeep.data.resident import Dataset
    from raydeep.data.shards import Manifest

settings.register_profile("raydeep", deadline=None, derandomize=True, max_examples=40, database=None)
settings.load_profile("raydeep")

WritePictures = Callable[..., Path]

# A background job of a shell ignores Ctrl-C, and the commands that tests start and interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small networks run faster so, and the same everywhere."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits_manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The digits as shards, with the default data section. Read only: all tests share them."""
    from raydeep.data.shards import write_dataset

    return write_dataset(Data(), tmp_path_factory.mktemp("digits") / "dataset")


@pytest.fixture(scope="session")
def digits(digits_manifest: Manifest) -> Dataset:
    """The decoded digits. Read only: all tests share them."""
    from raydeep.data.splits import read_dataset

    data = read_dataset(digits_manifest, Data())
    for split in (data.train, data.val, data.test):
        split.images.flags.writeable = split.labels.flags.writeable = False
    return data


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job for the digits that trains one epoch of a narrow seed network; its runs go to tmp_path/runs."""
    return Job(
        name="tiny",
        storage=str(tmp_path / "runs"),
        augment=Augment(),
        model=Model(name="seed", args={"width": 8}),
        train=Train(epochs=1, batch_size=64, lr=0.05, precision="float32"),
    )


@pytest.fixture
def write_pictures() -> WritePictures:
    """Writes `{class: count}` pictures of noise as class folders below a root, which it gives back."""

    def write(
        root: Path, counts: dict[str, int], *, size: tuple[int, int] = (8, 8), mode: str = "RGB", suffix: str = ".png"
    ) -> Path:
        rng = np.random.default_rng(len(counts))
        width, height = size
        for name, count in counts.items():
            folder = root / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (height, width) if mode == "L" else (height, width, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:03d}{suffix}")
        return root

    return write


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder with a short path (Ray's sockets live in it), away from any other Ray."""
    path = Path(tempfile.mkdtemp(prefix="rd"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def write_many() -> WritePictures:
    """Writes so many small pictures of noise in two class folders below a root, which it gives back."""

    def write(root: Path, count: int) -> Path:
        pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
        for i in range(count):
            file = root / ("cat", "dog")[i % 2] / f"{i:05d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(file)
        return root

    return write


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A local S3 server; its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_server(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> pafs.S3FileSystem:
    """The same as this process and those that it starts find it in their environment."""
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    return pafs.S3FileSystem(
        endpoint_override=s3_endpoint.removeprefix("http://"), scheme="http", allow_bucket_creation=True
    )


@pytest.fixture
def new_bucket(s3_server: pafs.S3FileSystem) -> Callable[[], str]:
    """Makes buckets; gives their names."""

    def make() -> str:
        name = f"bucket-{secrets.token_hex(4)}"
        s3_server.create_dir(name)
        return name

    return make


@pytest.fixture
def bucket(new_bucket: Callable[[], str]) -> str:
    """The address of a folder in a new bucket."""
    return f"s3://{new_bucket()}/some"


@pytest.fixture
def on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Goes to a node, by a name: one that has a cache of its own. At first it is a."""

    def go(node: str) -> None:
        monkeypatch.setenv("RAYDEEP_CACHE", str(tmp_path / f"node-{node}"))

    go("a")
    return go


@pytest.fixture(scope="session")
def small_run(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two verified models of the digits: dense, and t000, pruned by half and of 4 bits. Read only."""
    import torch

    from raydeep.compress import pack, plan
    from raydeep.data.augment import Augmenter
    from raydeep.data.batches import Batches
    from raydeep.deploy import card, export, verify
    from raydeep.disk import write_json
    from raydeep.machine import provenance
    from raydeep.model import artifact
    from raydeep.train import losses
    from raydeep.train.loop import fit

    values = {
        "prune.sparsity": 0.5, "quantize.weight_bits": 4, "quantize.activation_bits": 8, "recover.epochs": 1,
        "recover.lr": 0.05, "recover.batch_size": 32,
    }  # fmt: skip
    job = Job(name="small", model=Model(name="seed", args={"width": 8}))
    spec = artifact.make_spec("seed", {"width": 8}, digits.classes, digits.shape, digits.mean, digits.std)
    torch.manual_seed(0)
    model = artifact.build(spec)
    batches = Batches(digits.train, Augmenter(Augment(), digits.mean, digits.std), 32, seed=0)
    fit(model, losses.cross_entropy(), batches, Train(epochs=3, batch_size=32, lr=0.1))
    dense = plan.Dense(*artifact.freeze(model.eval(), spec, fold=False))
    run = tmp_path_factory.mktemp("runs") / "small-0101"
    packed = {
        "dense": pack.pack(*dense),
        "t000": plan.compress(job.with_values(values), dense, digits, seed=0).packed,
    }
    facts = provenance(0) | {"dataset": {"hash": "0" * 64, "rows": {"train": 1168}, "image": [8, 8, 1]}}
    candidates = []
    for label, data in packed.items():
        export.write_model(run / "models" / label, data)
        result = plan.measure(data, digits, 512)
        candidates.append(verify.Candidate(run / "models" / label, result.val_predictions, result.test_predictions))
    quick = job.export.model_copy(update={"latency_rounds": 3, "batch_sizes": (1,)})
    found = verify.verify(candidates, run / "models" / "dense", digits, cfg=quick)
    assert all(facts["verified"] for facts in found.values())
    for label in packed:
        trial = None if label == "dense" else {"trial": 0, "config": values}
        card.complete(run / "models" / label, card.about(job, label, facts, trial))
    rows = [{"label": "t000", "val_accuracy": found["t000"]["val_accuracy"]}]
    write_json(run / "front.json", {"dense": found["dense"], "models": rows, "answer": "t000"})
    return run
