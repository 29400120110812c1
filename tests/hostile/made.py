"""What hostile cases are made from: a whole model, dataset and run; and a job server that says yes."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

from hostile.harness import Stock

CLASSES = [str(digit) for digit in range(10)]
JOB = {"name": "tiny", "model": {"name": "seed", "args": {"width": 2}}, "train": {"epochs": 1, "batch_size": 64}}


@contextmanager
def stock(folder: Path) -> Iterator[Stock]:
    """Make all of it below a folder; the server ends with the block."""
    import torch

    from raydeep.compress import pack
    from raydeep.config import Data
    from raydeep.data.shards import write_dataset
    from raydeep.deploy import export
    from raydeep.model import artifact
    from raydeep.train.checkpoint import Moment, State
    from raydeep.train.saver import Saver

    dataset = write_dataset(Data(), folder / "shards").path
    spec = artifact.make_spec("seed", {"width": 2}, CLASSES, (8, 8, 1), [0.5], [0.25])
    torch.manual_seed(0)
    packed = pack.pack(*artifact.freeze(artifact.build(spec).eval(), spec))
    export.write_model(folder / "model", packed)
    net = artifact.build(spec)
    saver = Saver(folder / "checkpoints")
    saver.save(Moment(1, 0, 0.0, 1, 1, 0.5), State(net, torch.optim.SGD(net.parameters(), momentum=0.9)))
    saver.wait()
    [checkpoint] = (folder / "checkpoints").glob("step-*")
    run = write_run(folder / "run", folder / "model", dataset)
    with job_server() as server:
        yield Stock(folder / "model", dataset, run, checkpoint, server)


def write_run(path: Path, model: Path, dataset: Path) -> Path:
    """A run folder as a search of one trial leaves it, as far as files are looked at before Ray starts."""
    path.mkdir()
    (path / "job.yaml").write_text(yaml.safe_dump({**JOB, "storage": "runs"}, sort_keys=False))
    values = {"val_accuracy": 0.9, "test_accuracy": 0.9, "bytes": 900, "onnx_bytes": 4000, "sparsity": 0.5}
    row = {
        **values, "label": "dense", "trial": None, "latency_ms": 0.1, "latency_ratio": 1.0, "latency_spread": 0.1,
        "verified": True, "packed_differ": 0, "onnx_differ": 0, "rows": 359, "compression_ratio": 1.0,
        "weight_bits": None, "activation_bits": None, "distill": False,
    }  # fmt: skip
    facts = {"hash": "0" * 64, "classes": CLASSES, "rows": {}, "image": [8, 8, 1], "path": str(dataset)}
    whole = {
        "provenance.json": {"id": "run", "command": "raydeep search job.yaml", "versions": {}, "dataset": facts},
        "front.json": {"dense": row, "models": [{**row, "label": "t000", "trial": 0, "weight_bits": 4}]},
        "evaluation.json": {"split": "test", "accuracy": 0.9, "confusion": [[4] * 10] * 10},
    }
    lines = {
        "metrics.jsonl": [{"stage": "train", "epoch": 1, "epochs": 1, "train_loss": 1.0, "val_accuracy": 0.9}],
        "ledger.jsonl": [
            {"schema": 2, "space": {}, "objectives": {"accuracy": "max", "bytes": "min"}, "constraints": []},
            {**values, "trial": 0, "status": "done", "config": {"prune.sparsity": 0.5}, "val_accuracy": 0.9},
        ],
    }
    for name, value in whole.items():
        (path / name).write_text(json.dumps(value))
    for name, rows in lines.items():
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(model, path / "models" / "dense")
    return path


@contextmanager
def job_server() -> Iterator[str]:
    """A job server that takes every bundle and says of every job that it has succeeded; its address."""
    import ray

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/api/version":
                said = {"version": "4", "ray_version": ray.__version__, "ray_commit": "x", "session_name": "s"}
                self._say(200, said)
            elif "/packages/" in self.path:
                self._say(404, {})
            else:
                details = {"type": "SUBMISSION", "entrypoint": "raydeep", "status": "SUCCEEDED", "job_id": "01"}
                self._say(200, {"logs": ""} if self.path.endswith("/logs") else details)

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._say(200, {})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._say(200, {"job_id": "01", "submission_id": asked["submission_id"]})

        def _say(self, status: int, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
