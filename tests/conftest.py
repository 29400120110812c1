"""Fixtures that the test files share: the digits, once a session, and picture folders in tmp_path."""

from __future__ import annotations

import secrets
import shutil
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
