"""Checks exported models in a clean process: are the files the models that were scored, and how fast are they?

`verify` starts `python -m raydeep.deploy.verify REQUEST`, which loads nothing but the files.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raydeep.errors import ExportError
from raydeep.run import hardware, write_json

if TYPE_CHECKING:
    from raydeep.config import Export
    from raydeep.data.resident import Dataset, Split

ONNX_ROWS_PER_DIFFERENCE = 500  # at most one prediction in so many may differ between ONNX and the packed file
ROUND_S = 0.02  # seconds of calls a model and round
BATCH = 512


class Candidate(NamedTuple):
    """A model folder, and what its model predicted when it was scored."""

    folder: Path
    val_predictions: np.ndarray  # int64 of shape [rows]
    test_predictions: np.ndarray


def verify(
    candidates: list[Candidate],
    dense: Path,
    data: Dataset,
    *,
    cfg: Export | None = None,
    rounds: int | None = None,
    batch_size: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Re-load each model folder in a clean process; write its `verify.json`.

    Args:
        candidates: the folders to check.
        dense: folder of the dense model, timed in the same run.
        data: for its val and test splits; what is streamed is read anew, from the shards.
        cfg: the export section.
        rounds: instead of cfg.latency_rounds.
        batch_size: instead of cfg.batch_sizes.

    Returns:
        Folder name → facts of verify.json; `verified` is False where predictions differ too much.

    Raises:
        ExportError: the process died.
    """
    from raydeep.config import Export
    from raydeep.data.splits import in_process

    cfg = cfg or Export()
    with tempfile.TemporaryDirectory(prefix="raydeep-") as name:
        work = Path(name)
        request = {
            "folders": [str(c.folder) for c in candidates], "dense": str(dense),
            "splits": {"val": in_process(data.val), "test": in_process(data.test)},
            "predictions": {
                "val": [c.val_predictions for c in candidates], "test": [c.test_predictions for c in candidates]
            },
            "rounds": rounds or cfg.latency_rounds, "batch_size": batch_size or cfg.batch_sizes[0],
            "out": str(work / "out.json"),
        }  # fmt: skip
        (work / "request").write_bytes(pickle.dumps(request))  # from this process to its own child
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNE_", "OMP_", "PYTHONSTARTUP"))}
        done = subprocess.run(
            [sys.executable, "-m", "raydeep.deploy.verify", str(work / "request")],
            env=clean, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode or not (work / "out.json").exists():
            said = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise ExportError(f"the verification process ended with {done.returncode}: {' '.join(said)}")
        found = json.loads((work / "out.json").read_text())
    from raydeep.model.artifact import write_sums

    for candidate, facts in zip(candidates, found, strict=True):
        write_json(candidate.folder / "verify.json", facts)
        write_sums(candidate.folder)
    return {c.folder.name: facts for c, facts in zip(candidates, found, strict=True)}


def _main(request_path: str) -> None:
    import torch

    from raydeep.model import artifact

    torch.set_num_threads(1)
    request = pickle.loads(Path(request_path).read_bytes())
    splits: dict[str, Split] = request["splits"]
    folders = [Path(f) for f in request["folders"]]
    dense = Path(request["dense"])
    few = np.arange(min(request["batch_size"], len(splits["test"].labels)))
    [example] = splits["test"].read([[few]])
    timed = [dense, *(folder for folder in folders if folder != dense)]  # the dense model's ratio to itself is 1
    times = dict(zip(timed, latencies(timed, example, request["rounds"]), strict=True))
    dense_bytes = (dense / "model.safetensors").stat().st_size
    out = []
    for i, folder in enumerate(folders):
        artifact.check_sums(folder)
        facts: dict[str, Any] = {
            "bytes": (folder / "model.rdz").stat().st_size,
            "onnx_bytes": (folder / "model.onnx").stat().st_size,
            "dense_bytes": dense_bytes,
            "rows": 0, "packed_differ": 0, "onnx_differ": 0,
        }  # fmt: skip
        for name, split in splits.items():
            packed, onnx = _packed_predictions(folder, split), _onnx_predictions(folder, split)
            facts["rows"] += len(split.labels)
            facts["packed_differ"] += int((packed != request["predictions"][name][i]).sum())
            facts["onnx_differ"] += int((onnx != packed).sum())
            facts[f"{name}_accuracy"] = float((packed == split.labels).mean())
            facts[f"{name}_accuracy_onnx"] = float((onnx == split.labels).mean())
        facts["verified"] = (
            facts["packed_differ"] == 0 and facts["onnx_differ"] * ONNX_ROWS_PER_DIFFERENCE <= facts["rows"]
        )
        ratios = times[dense] / times[folder]
        low, high = np.percentile(ratios, [25, 75])
        facts |= {
            "latency_ms": float(np.median(times[folder]) * 1e3),
            "dense_latency_ms": float(np.median(times[dense]) * 1e3),
            "latency_ratio": float(np.median(ratios)),
            "latency_spread": float((high - low) / 2),
            "latency_batch_size": len(example), "latency_rounds": len(ratios), "runtime": "onnxruntime, 1 thread",
            "hardware": hardware(),
        }  # fmt: skip
        out.append(facts)
    Path(request["out"]).write_text(json.dumps(out))


def _packed_predictions(folder: Path, split: Split) -> np.ndarray:
    from raydeep.compress import pack
    from raydeep.data.batches import eval_batches
    from raydeep.model import artifact

    spec, tensors = pack.unpack((folder / "model.rdz").read_bytes())
    batches = eval_batches(split, spec["mean"], spec["std"], BATCH)
    return artifact.predict(artifact.thaw(spec, tensors), (micro.images for micro in batches))


def _onnx_predictions(folder: Path, split: Split) -> np.ndarray:
    from raydeep.data.resident import in_order

    run = open_onnx(folder / "model.onnx")
    return np.concatenate([run(images).argmax(1) for images in split.read([in_order(len(split.labels), BATCH)])])


def open_onnx(path: Path) -> Any:
    """A function of uint8 NHWC pictures that gives float32 logits NK; one thread.

    Raises:
        ExportError: onnxruntime can't load the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as err:  # onnxruntime's own kinds share no public base
        raise ExportError(f"{path}: onnxruntime can't load it: {err}") from None
    return lambda images: session.run(None, {"images": images})[0]


def latencies(folders: list[Path], example: np.ndarray, rounds: int) -> np.ndarray:
    """Seconds a call, models interleaved: float64 of shape [models, rounds]; one warm-up round is dropped."""
    runs = [open_onnx(folder / "model.onnx") for folder in folders]
    calls = []
    for run in runs:
        start = time.perf_counter()
        for _ in range(5):
            run(example)
        calls.append(max(1, int(ROUND_S / max(1e-6, (time.perf_counter() - start) / 5))))
    times = np.zeros((len(runs), rounds + 1))
    for r in range(rounds + 1):
        for m, run in enumerate(runs):
            start = time.perf_counter()
            for _ in range(calls[m]):
                run(example)
            times[m, r] = (time.perf_counter() - start) / calls[m]
    return times[:, 1:]


if __name__ == "__main__":
    _main(sys.argv[1])
