"""Checks exported models in a clean process: are the files the models that were scored, and how fast are they?

`verify` starts `python -m raydeep.deploy.verify REQUEST`, which loads nothing but the files.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raydeep.deploy import gate
from raydeep.deploy.runtimes import OPENERS, Run, check_runtimes
from raydeep.deploy.timing import Timed, interleaved, ratio
from raydeep.disk import json_bytes, read_json, write_summed
from raydeep.errors import ArtifactError, ExportError
from raydeep.machine import hardware, usable_cores

if TYPE_CHECKING:
    from raydeep.config import Export
    from raydeep.data.resident import Dataset, Split

BATCH = 512  # of the packed model, as when it was scored
ONNX_BATCH = 128
UNVERIFIED = ".unverified"


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
    cfg: Export,
) -> dict[str, dict[str, Any]]:
    """Re-load each model folder in a clean process; write its `verify.json`.

    A model whose ONNX file does not pass the gate (gate.py) gets the exact form, and is checked again. One that
    fails still is left under `<folder>.unverified`.

    Args:
        candidates: the folders to check.
        dense: folder of the dense model, timed in the same run.
        data: for its val and test splits; what is streamed is read anew, from the shards.
        cfg: the export section.

    Returns:
        Name of the folder, as it was → facts of verify.json. `verified` says whether it passed, `refused` why not,
        `folder` where it is now.

    Raises:
        ExportError: the process died.
        RaydeepError: a runtime is not installed.
    """
    from raydeep.deploy.export import make_exact

    check_runtimes(cfg)
    found = _in_clean_process(candidates, dense, data, cfg)
    again = [c for c, f in zip(candidates, found, strict=True) if not f["verified"] and not f["packed_differ"]]
    again = [c for c in again if make_exact(c.folder)]
    if again:
        anew = dict(zip([c.folder for c in again], _in_clean_process(again, dense, data, cfg), strict=True))
        found = [anew.get(c.folder, f) for c, f in zip(candidates, found, strict=True)]
    return {c.folder.name: _conclude(c.folder, facts) for c, facts in zip(candidates, found, strict=True)}


def _conclude(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    write_summed(folder, {"verify.json": json_bytes(facts)})
    return {**facts, "folder": str(folder if facts["verified"] else withdraw(folder))}


def withdraw(folder: Path) -> Path:
    """Take a model folder's final name from it: `<folder>.unverified`, which replaces an older one."""
    aside = folder.with_name(folder.name + UNVERIFIED)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    return aside


def _in_clean_process(candidates: list[Candidate], dense: Path, data: Dataset, cfg: Export) -> list[dict[str, Any]]:
    from raydeep.data.splits import in_process

    with tempfile.TemporaryDirectory(prefix="raydeep-") as name:
        work = Path(name)
        request = {
            "folders": [str(c.folder) for c in candidates], "dense": str(dense),
            "splits": {"val": in_process(data.val), "test": in_process(data.test)},
            "predictions": {
                "val": [c.val_predictions for c in candidates], "test": [c.test_predictions for c in candidates]
            },
            "cfg": cfg.model_dump(), "out": str(work / "out.json"),
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
        found: list[dict[str, Any]] = json.loads((work / "out.json").read_text())
        return found


def _main(request_path: str) -> None:
    import torch

    from raydeep.config import Export
    from raydeep.model import artifact

    torch.set_num_threads(1)
    request = pickle.loads(Path(request_path).read_bytes())
    cfg = Export(**request["cfg"])
    splits: dict[str, Split] = request["splits"]
    folders = [Path(f) for f in request["folders"]]
    dense = Path(request["dense"])
    for folder in {dense, *folders}:
        artifact.check_sums(folder)
    out = []
    for i, folder in enumerate(folders):
        predicted = {name: request["predictions"][name][i] for name in splits}
        out.append(_same(folder, splits, predicted, cfg.runtimes))
    rows, compiled = _latency([dense, *(f for f in folders if f != dense)], splits["test"], cfg)
    dense_bytes = (dense / "model.safetensors").stat().st_size
    for folder, facts in zip(folders, out, strict=True):
        mine = [{**row, "form": facts.get("form", "float")} for row in rows[folder]]
        others = [] if folder == dense else [{**row, "form": "dense"} for row in rows[dense]]
        quoted = mine[0]  # onnxruntime, the first batch size, one thread
        baseline = rows[dense][0]
        facts |= {
            "dense_bytes": dense_bytes, "latency": [*mine, *others, *rows["baselines"]],
            "latency_ms": quoted["median_ms"], "dense_latency_ms": baseline["median_ms"],
            "latency_ratio": quoted["ratio_to_dense_onnx"], "latency_spread": quoted["spread"],
            "latency_batch_size": quoted["batch"], "latency_rounds": quoted["rounds"],
            "runtime": "onnxruntime, 1 thread", "hardware": hardware(),
        }  # fmt: skip
        if compiled is not None:
            facts["torch_compile_failed"] = compiled
    Path(request["out"]).write_text(json.dumps(out))


def _same(
    folder: Path, splits: dict[str, Split], predicted: dict[str, np.ndarray], runtimes: tuple[str, ...]
) -> dict[str, Any]:
    """Whether packed file and ONNX file predict as they should."""
    facts: dict[str, Any] = {
        "bytes": (folder / "model.rdz").stat().st_size, "onnx_bytes": (folder / "model.onnx").stat().st_size,
        "rows": 0, "packed_differ": 0, "onnx_differ": 0, "runtimes": {},
    }  # fmt: skip
    refused = []
    if (folder / "export.json").exists():
        facts["form"] = read_json(folder / "export.json")["form"]
    packed: dict[str, np.ndarray] = {}
    for name, split in splits.items():
        packed[name] = _packed_predictions(folder, split)
        facts["rows"] += len(split.labels)
        differ = int((packed[name] != predicted[name]).sum())
        facts["packed_differ"] += differ
        facts[f"{name}_accuracy"] = float((packed[name] == split.labels).mean())
        facts[f"{name}_rows"] = len(split.labels)
        if differ:
            refused.append(f"packed file, {name}: {differ} predictions are not those that were scored")
    for runtime in runtimes:
        run = OPENERS[runtime](folder / "model.onnx", 1)
        about: dict[str, Any] = {"differ": 0}
        for name, split in splits.items():
            found = _onnx_predictions(run, split)
            about["differ"] += int((found != packed[name]).sum())
            about[f"{name}_accuracy"] = float((found == split.labels).mean())
            reason = gate.refusal(packed[name], found, split.labels)
            if reason is not None:
                refused.append(f"{runtime}, {name}: {reason}")
        facts["runtimes"][runtime] = about
    facts["worst_class"] = worst_class(
        packed["test"], splits["test"].labels, read_json(folder / "spec.json")["classes"]
    )
    first = facts["runtimes"].get("onnxruntime") or next(iter(facts["runtimes"].values()))
    facts |= {"onnx_differ": first["differ"]} | {f"{n}_accuracy_onnx": first[f"{n}_accuracy"] for n in splits}
    return {**facts, "verified": not refused, "refused": "; ".join(refused) or None}


def worst_class(predicted: np.ndarray, labels: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """The class with the smallest share of right predictions: its name, accuracy and rows; the first of several.

    Args:
        predicted: int64 of shape [rows].
        labels: int64 of shape [rows].
        classes: their names.
    """
    rows = np.bincount(labels, minlength=len(classes))
    right = np.bincount(labels[predicted == labels], minlength=len(classes))
    shares = np.where(rows > 0, right / np.maximum(rows, 1), 2.0)
    worst = int(shares.argmin())
    return {"name": classes[worst], "accuracy": float(shares[worst]), "rows": int(rows[worst])}


def _packed_predictions(folder: Path, split: Split) -> np.ndarray:
    from raydeep.data.batches import eval_batches
    from raydeep.model import artifact

    spec, tensors = _unpack(folder)
    batches = eval_batches(split, spec["mean"], spec["std"], BATCH)
    return artifact.predict(artifact.thaw(spec, tensors), (micro.images for micro in batches))


def _unpack(folder: Path) -> tuple[dict[str, Any], Any]:
    from raydeep.compress import pack

    try:
        return pack.unpack((folder / "model.rdz").read_bytes())
    except ArtifactError as err:
        raise ArtifactError(f"{folder / 'model.rdz'}: {err}") from None


def _onnx_predictions(run: Run, split: Split) -> np.ndarray:
    from raydeep.data.resident import in_order

    return np.concatenate([run(images).argmax(1) for images in split.read([in_order(len(split.labels), ONNX_BATCH)])])


def _latency(folders: list[Path], split: Split, cfg: Export) -> tuple[dict[Any, list[dict[str, Any]]], str | None]:
    """Latency rows of each folder, the dense one first, and of the `baselines`; why torch.compile failed, or None."""
    import torch

    rows: dict[Any, list[dict[str, Any]]] = {folder: [] for folder in folders} | {"baselines": []}
    dense, failed = folders[0], None
    few = np.arange(max(cfg.batch_sizes)) % len(split.labels)
    [pictures] = split.read([[few]])
    runtimes = ("onnxruntime", *(r for r in cfg.runtimes if r != "onnxruntime"))
    for batch in cfg.batch_sizes:
        for threads in sorted({1, usable_cores()}):
            torch.set_num_threads(threads)
            calls: dict[tuple[Any, str], Any] = {
                (folder, runtime): OPENERS[runtime](folder / "model.onnx", threads)
                for runtime in runtimes
                for folder in folders
            }
            calls["baselines", "eager"] = _torch(dense)
            if cfg.torch_compile and failed is None:
                try:
                    compiled = _torch(dense, compile=True)
                    compiled(pictures[:batch])
                    calls["baselines", "compiled"] = compiled
                except Exception as err:  # no C++ compiler, or a network that it can't take: a missing row
                    failed = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
            rounds = cfg.latency_rounds if threads == 1 else max(3, cfg.latency_rounds // 3)
            found = interleaved(list(calls.values()), pictures[:batch], rounds)
            timed = dict(zip(calls, found, strict=True))
            for (whose, kind), one in timed.items():
                row = _row(one, timed[dense, "onnxruntime"], timed["baselines", "eager"], batch, threads)
                if ("baselines", "compiled") in timed:
                    row["ratio_to_dense_compiled"] = ratio(timed["baselines", "compiled"], one)[0]
                about = {"runtime": "torch", "form": kind} if whose == "baselines" else {"runtime": kind}
                rows[whose].append({**about, **row})
    torch.set_num_threads(1)
    for folder in folders:
        rows[folder].sort(key=lambda r: runtimes.index(r["runtime"]))  # stable: batches and threads stay in order
    return rows, failed


def _row(found: Timed, dense_onnx: Timed, dense_torch: Timed, batch: int, threads: int) -> dict[str, Any]:
    to_onnx, spread = ratio(dense_onnx, found)
    return {
        "batch": batch, "threads": threads, **found.facts(), "ratio_to_dense_onnx": to_onnx,
        "ratio_to_dense_torch": ratio(dense_torch, found)[0], "spread": spread,
    }  # fmt: skip


def _torch(folder: Path, compile: bool = False) -> Run:
    """The packed network in torch: uint8 NHWC pictures → logits."""
    import torch

    from raydeep.deploy.export import Deployed
    from raydeep.model import artifact

    spec, tensors = _unpack(folder)
    net: Any = Deployed(artifact.thaw(spec, tensors), spec["mean"], spec["std"]).eval()
    if compile:
        net = torch.compile(net)

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = net(torch.from_numpy(images)).numpy()
            return logits

    return run


if __name__ == "__main__":
    _main(sys.argv[1])
