"""What README shows is run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from raydeep.compress import pack
from raydeep.deploy import export
from raydeep.model import artifact

README = Path(__file__).resolve().parents[1] / "README.md"
ALONE = """import sys
for name in ("torch", "raydeep", "ray", "PIL", "onnx"):
    sys.modules[name] = None  # importing it raises ImportError
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of three classes."""
    spec = artifact.make_spec("resnet8", {"width": 4}, ["cat", "dog", "owl"], (16, 16, 3), [0.5] * 3, [0.25] * 3)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "t000"
    export.write_model(path, pack.pack(*artifact.freeze(artifact.build(spec).eval(), spec)))
    return path


def script() -> str:
    [found] = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "session" in code]
    return found


def label(folder: Path, pictures: np.ndarray, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "label.py").write_text(ALONE + script())
    np.save(tmp_path / "pictures.npy", pictures)
    command = [sys.executable, str(tmp_path / "label.py"), str(folder), str(tmp_path / "pictures.npy")]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)


def test_the_script_of_the_readme_labels_pictures_without_raydeep(folder, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), np.uint8)
    done = label(folder, pictures, tmp_path)
    assert done.returncode == 0, done.stderr
    spec, tensors = artifact.load_model(folder)
    inputs = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    expected = artifact.thaw(spec, tensors)(inputs).softmax(1)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in rows] == [spec["classes"][k] for k in expected.argmax(1)]
    assert np.allclose([float(odds) for _, odds in rows], expected.amax(1).numpy(), atol=2e-4)


def test_the_script_of_the_readme_refuses_other_pictures(folder, tmp_path):
    done = label(folder, np.zeros((2, 8, 8, 3), np.uint8), tmp_path)
    assert done.returncode == 1
    assert "expected uint8 pictures of [16, 16, 3], found uint8 (8, 8, 3)" in done.stderr


def test_the_script_is_as_short_as_promised():
    assert len([line for line in script().splitlines() if line.strip()]) <= 20
