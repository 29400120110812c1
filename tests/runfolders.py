"""Run folders made by hand, as commands leave them, and what tests ask of the pages made from them. No torch."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

TRIALS, FAILED, EPOCHS = 60, 2, 40
DENSE_BYTES = 312_000
CLASSES = list("0123456789")
VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


def make_run(
    folder: Path,
    *,
    classes: list[str] = CLASSES,
    error: str = "RuntimeError: out of memory",
    search: bool = True,
) -> Path:
    """A run folder as a finished search (or training) of the digits leaves it."""
    rng = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.yaml").write_text(
        "name: digits\nseed: 1\nmodel:\n  name: resnet8\ntrain:\n  epochs: 40\nsearch:\n  trials: 60\n"
    )
    provenance = {
        "id": "digits-20260102-030405",
        "raydeep": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        "command": "raydeep search jobs/digits.yaml",
        "versions": {"python": "3.11.2", "torch": "2.15.0", "ray": "2.60.0", "onnxruntime": "1.32.0"},
        "hardware": {"cpu": "AMD EPYC 7R13", "cores": 2, "memory_bytes": 8_320_000_000, "gpus": []},
        "git_commit": "0f3c9a7d51e24b6f8a90",
        "seed": 1,
        "reference": {"val_accuracy": 0.9889, "worst_class_accuracy": 0.9, "bytes": DENSE_BYTES, "macs": 347_392},
        "dataset": {
            "hash": "sha256:9b1e4c07d2",
            "classes": classes,
            "rows": {"train": 1257, "val": 180, "test": 360},
            "image": [8, 8, 1],
        },
    }
    dump(folder / "provenance.json", provenance)
    with (folder / "metrics.jsonl").open("w") as file:
        for epoch in range(1, EPOCHS + 1):
            row = {
                "stage": "train",
                "epoch": epoch,
                "epochs": EPOCHS,
                "step": 18 * epoch,
                "train_loss": 0.05 + 2.1 * math.exp(-epoch / 5) + rng.uniform(0, 0.03),
                "val_loss": 0.09 + 2.0 * math.exp(-epoch / 6) + rng.uniform(0, 0.03),
                "val_accuracy": 0.985 - 0.8 * math.exp(-epoch / 4) + rng.uniform(-0.004, 0.004),
                "lr": 0.1,
                "seconds": 0.41,
                "images_per_s": 3050.0,
                "order_hash": "ab12",
                "device": "cpu",
                "workers": 2,
                "start_s": 0.01 if epoch == 1 else None,
                "meter": {
                    "read_s": 0.3, "decode_s": 0.1, "wait_s": 0.002 * epoch, "transfer_s": 0.001, "augment_s": 0.1,
                    "step_s": 0.2,
                },
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
    models: list[dict] = []
    if search:
        done = write_ledger(folder, rng, error)
        models = [front_row(row, rng) for row in choose(done)[::-2]]
    dense = {
        "label": "dense",
        "trial": None,
        "val_accuracy": 0.9889,
        "test_accuracy": 0.9861,
        "bytes": DENSE_BYTES,
        "onnx_bytes": 318_000,
        "compression_ratio": 1.0,
        "latency_ms": 0.131,
        "latency_ratio": 1.0,
        "latency_spread": 0.0,
        "sparsity": 0.0,
        "weight_bits": None,
        "activation_bits": None,
        "distill": False,
        "verified": True,
        "packed_differ": 0,
        "onnx_differ": 0,
        "rows": 360,
    }
    dump(folder / "front.json", {"dense": dense, "models": models})
    k = len(classes)
    confusion = [[36 if i == j else 0 for j in range(k)] for i in range(k)]
    for i, j, n in [(8, 1, 3), (3, 9, 1), (5, 9, 1)]:
        if i < k and j < k:
            confusion[i][i] -= n
            confusion[i][j] += n
    dump(folder / "evaluation.json", {"split": "test", "confusion": confusion})
    dump(folder / "gallery.json", GALLERY)
    return folder


# 2 × 2 pixels, grey
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAAAAABX3VL4AAAADklEQVR42m"
    "NgaGD47wAABEQBwPcCr6kAAAAASUVORK5CYII="
)
GALLERY = {
    "split": "test", "rows": 360, "wrong": 5,
    "errors": [
        {"index": 7, "true": 3, "predicted": 9, "probability": 0.9961, "picture": PICTURE},
        {"index": 9, "true": 8, "predicted": 1, "probability": 0.98, "picture": PICTURE},
        {"index": 12, "true": 8, "predicted": 1, "probability": 0.51, "picture": PICTURE},
    ],
    "augmentation": {
        "heads": ["original", "epoch 0"], "labels": [4, 8], "captions": [["4", "8"], ["4 0.6 + 8 0.4", "8"]],
        "pictures": [[PICTURE] * 2] * 2, "changes": True,
    },
}  # fmt: skip


LADDER = (0, 1, 9)  # epochs after each rung
FACTS = {
    "schema": 2, "space": {"prune.sparsity": [0.0, 0.9]}, "objectives": {"accuracy": "max", "bytes": "min"},
    "constraints": [], "scheduler": "halving", "seed": 1,
}  # fmt: skip


def write_ledger(folder: Path, rng: random.Random, error: str) -> list[dict]:
    """As the engine writes it: every third trial comes through rung 1, every ninth through rung 2.

    Trial 17 fails at rung 0, trial 41 at rung 1. Every sixth begins rung 1 from trial 1's weights.
    """
    lines, finals = [], []
    for trial in range(TRIALS):
        config = {
            "prune.sparsity": rng.choice([0.0, 0.5, 0.7, 0.8, 0.9, 0.95]),
            "quantize.weight_bits": rng.choice([2, 3, 4, 8]),
            "quantize.activation_bits": rng.choice([None, 4, 8]),
            "distill.enabled": rng.random() < 0.5,
        }
        kept, bits = 1 - config["prune.sparsity"], config["quantize.weight_bits"]
        loss = 0.25 / bits**2.5 + 0.002 / kept**1.2 + abs(rng.gauss(0, 0.006)) - 0.002 * config["distill.enabled"]
        accuracy = max(0.11, 0.988 - loss - (0.3 if bits == 2 and kept < 0.2 else 0))
        packed = int(900 + DENSE_BYTES * kept * (bits + 1.6 * (kept < 1)) / 32 * rng.uniform(0.9, 1.0))
        common = {"trial": trial, "config": config, "seed": trial}
        rungs = 0 if trial == 17 else 1 if trial == 41 else 3 if trial % 9 == 0 else 2 if trial % 3 == 0 else 1
        for rung in range(rungs):
            measures = {
                "rung": rung, "epochs": LADDER[rung], "start": "t001" if rung and trial % 6 == 0 else "dense",
                "val_accuracy": round(accuracy - 0.02 * (rungs - 1 - rung), 4), "worst_class_accuracy": 0.8,
                "bytes": packed, "macs": 347_392, "compression_ratio": DENSE_BYTES / packed, "sparsity": 1 - kept,
                "parameters": 78_000, "nonzeros": int(78_000 * kept),
            }  # fmt: skip
            times = {"seconds": 1.0 + rung, "cpu_seconds": 0.5 + rung, "at": 3.0 + len(lines)}
            volume = {"hypervolume": round(60 - 60 / (1 + len(lines)), 4)}
            lines.append({**common, "event": "rung", **measures, **times, **volume})
        failed = trial in (17, 41)
        stopped = f"failed at rung {rungs}" if failed else f"not promoted from rung {rungs - 1}"
        finals.append(
            {
                **common,
                "event": "end",
                "status": "failed" if failed else "done",
                "stopped": "through all rungs" if rungs == 3 else stopped,
                "error": error if failed else None,
                "rungs": rungs,
                **(measures if rungs else {}),
                "hypervolume": 60.0,
                "seconds": sum(1.0 + rung for rung in range(rungs)),
                "cpu_seconds": 0.5 * rungs,
                "at": 400.0,
            }
        )
    put(folder, [FACTS, *lines, *finals])
    return [line for line in finals if line["status"] == "done"]


def put(folder: Path, lines: list[dict]) -> None:
    with (folder / "ledger.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def ledger(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def choose(done: list[dict]) -> list[dict]:
    """The front by brute force: an oracle apart from raydeep.search.pareto."""

    def beaten(a: dict) -> bool:
        return any(
            b["bytes"] <= a["bytes"]
            and b["val_accuracy"] >= a["val_accuracy"]
            and (b["bytes"], b["val_accuracy"]) != (a["bytes"], a["val_accuracy"])
            for b in done
        )

    return sorted((row for row in done if not beaten(row)), key=lambda row: row["bytes"])


def front_row(row: dict, rng: random.Random) -> dict:
    config = row["config"]
    return {
        "label": f"t{row['trial']:03d}",
        **{key: row[key] for key in ("trial", "val_accuracy", "bytes", "compression_ratio")},
        "test_accuracy": round(row["val_accuracy"] - rng.uniform(-0.003, 0.008), 4),
        "onnx_bytes": 90_000,
        "latency_ms": 0.021,
        "latency_ratio": rng.uniform(0.8, 6.5),
        "latency_spread": 0.21,
        "sparsity": row["sparsity"],
        "weight_bits": config["quantize.weight_bits"],
        "activation_bits": config["quantize.activation_bits"],
        "distill": config["distill.enabled"],
        "verified": True,
        "packed_differ": 0,
        "onnx_differ": 0,
        "rows": 360,
        "layers": layer_rows(config["quantize.weight_bits"], row["sparsity"]),
        "sensitivity": {"conv<1>": {"2": 0.5, "8": 0.0}},
    }


def layer_rows(bits: int, sparsity: float) -> list[dict]:
    return [
        {
            "layer": name, "shape": shape, "parameters": math.prod(shape), "macs": 100 * math.prod(shape),
            "nonzeros": round(math.prod(shape) * (1 - sparsity)), "weight_bits": bits, "activation_bits": None,
            "bytes": math.prod(shape) * bits // 8,
        }
        for name, shape in (("conv<1>", [32, 1, 3, 3]), ("fc", [10, 128]))
    ]  # fmt: skip


def dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


class Page(HTMLParser):
    """What the tests ask of a page: elements, their nesting, and the text of scripts and table rows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(self.html)
        self.close()
        assert self.open == [], f"elements left open: {self.open}"
        embedded = [t for t, (_, a) in zip(self.scripts, self.of("script"), strict=True) if a.get("id") == "run-data"]
        assert len(embedded) == 1
        self.data = json.loads(embedded[0])

    def of(self, tag: str) -> list[tuple[str, dict]]:
        return [item for item in self.tags if item[0] == tag]

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.text += data
            if "td" in self.open or "th" in self.open:
                self.rows[-1][-1] += data
