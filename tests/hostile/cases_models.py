"""Model folders given to predict and to search, runs given to report and resume, checkpoints given to a training."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hostile.cases_configs import linked
from hostile.harness import Case, MiB, Stock
from hostile.parts import (
    Make,
    a_dataset,
    a_run,
    all_of,
    changed,
    cut,
    encoded,
    file,
    link,
    model,
    put,
    removed,
    sparse,
)  # fmt: skip
from raydeep import disk

PREDICT = "raydeep predict model x.png"
LOAD = "from raydeep.deploy.loading import load; load('model')"
PAGE = ("run/report.html",)


def artifact(name: str, make: Make, says: str, command: str = PREDICT, code: int = 2, peak: int = 150 * MiB) -> Case:
    """A model folder, model/, and a picture."""
    job = "model: {name: seed, args: {width: 2}}\ndata: {path: shards}\n"
    whole = all_of(
        model, file("x.png", encoded()), *([file("job.yaml", job), linked] if "job.yaml" in command else []), make
    )
    return Case("artifacts", name, command, says, whole, code, peak=peak, python=command.startswith("from "))


def spec(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Make:
    return changed("model/spec.json", change)


def with_sums(make: Make) -> Make:
    """What was done to a model, with checksums that fit it."""

    def whole(folder: Path, stock: Stock) -> None:
        make(folder, stock)
        disk.write_sums(folder / "model")

    return whole


def onnx_with(change: Callable[[Any], None]) -> Make:
    def make(folder: Path, stock: Stock) -> None:
        import onnx

        found = onnx.load(folder / "model" / "model.onnx")
        change(found)
        (folder / "model" / "model.onnx").write_bytes(found.SerializeToString())

    return with_sums(make)


def outside(found: Any) -> None:
    import onnx

    tensor = found.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../../../etc/passwd"


def lying_header(size: int) -> bytes:
    """A safetensors file whose header claims `size` bytes, or a tensor far beyond its end."""
    text = json.dumps({"0.weight": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}).encode()
    return struct.pack("<Q", size or len(text)) + text


def flipped(name: str) -> Make:
    """One bit in the middle of a file is another."""

    def make(folder: Path, stock: Stock) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return make


class Owned:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch owned",)


def packed(header: list[Any], blob: bytes = b"") -> bytes:
    import zlib

    from raydeep.compress import pack

    deflate = zlib.compressobj(9, wbits=-15, zdict=pack.WORDS)
    body = pack.MAGIC + deflate.compress(json.dumps(header).encode()) + deflate.flush() + blob
    return body + struct.pack("<I", zlib.crc32(body))


def report(name: str, make: Make, says: str, code: int = 2, command: str = "raydeep report run") -> Case:
    leaves = PAGE if code == 0 and "report" in command else ("run/.lock",) if "run --" in f"{command} --" else ()
    return Case(
        "runs", name, command, says, all_of(a_run, make), code, leaves, ("run/job.yaml",) * ("--force" in command)
    )


def line(name: str, text: str) -> Make:
    def make(folder: Path, stock: Stock) -> None:
        with (folder / "run" / name).open("a") as out:
            out.write(text)

    return make


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
DEEP = b"[" * 200_000
CHECKPOINT = (
    "from pathlib import Path; from raydeep.train.checkpoint import latest; "
    "found = latest(Path('checkpoints'), print); found.weights(); print(found.path.name)"
)
OLD, NEW = "checkpoints/step-000000001", "checkpoints/step-000000002"


def checkpoint(name: str, make: Make, says: str = r"step-000000002 is torn or changed.*\nstep-000000001\n$") -> Case:
    """Two whole checkpoints; something happens to the newer one."""

    def both(folder: Path, stock: Stock) -> None:
        for name in (OLD, NEW):
            shutil.copytree(stock.checkpoint, folder / name)

    return Case("checkpoints", name, CHECKPOINT, "(?s)" + says, all_of(both, make), 0, python=True)


def resummed(name: str, data: bytes) -> Make:
    """Other bytes in a checkpoint's file, and its checksum made to fit."""

    def make(folder: Path, stock: Stock) -> None:
        (folder / NEW / name).write_bytes(data)
        state = json.loads((folder / NEW / "state.json").read_text())
        state["sha256"][name] = disk.sha256_file(folder / NEW / name)
        (folder / NEW / "state.json").write_text(json.dumps(state))

    return make


def moved(folder: Path, stock: Stock) -> None:
    shutil.move(folder / NEW, folder / "elsewhere")
    (folder / NEW).symlink_to(folder / "elsewhere")
    (folder / "elsewhere" / "tensors.safetensors").write_bytes(b"")


def a_file_instead(folder: Path, stock: Stock) -> None:
    shutil.rmtree(folder / NEW)
    (folder / NEW).write_text("x")


CASES = [
    # what predict takes
    artifact("no model folder", lambda folder, stock: shutil.rmtree(folder / "model"), "model"),
    artifact("a picture for a model", file("y.png", encoded()), "y.png", "raydeep predict y.png x.png"),
    artifact("spec.json changed, checksums not", changed("model/spec.json", lambda s: {**s, "mean": [0]}, sums=False),
             "spec.json: missing or changed since it was written"),
    artifact("model.onnx cut off", cut("model/model.onnx"), "model.onnx: missing or changed"),
    artifact("model.onnx cut off, checksums made to fit", with_sums(cut("model/model.onnx")), "not an ONNX file|can't load"),
    artifact("model.onnx of random bytes", put("model/model.onnx", np.random.default_rng(0).bytes(5000), sums=True),
             "not an ONNX file"),
    artifact("model.onnx that keeps weights in ../../etc/passwd", onnx_with(outside), "is kept in another file"),
    artifact("model.onnx with another input", onnx_with(lambda m: setattr(m.graph.input[0], "name", "x")),
             "can't load|does not take"),
    artifact("no SHA256SUMS", removed("model/SHA256SUMS"), "no SHA256SUMS"),
    artifact("an empty SHA256SUMS", put("model/SHA256SUMS", b""), "SHA256SUMS does not name it"),
    artifact("SHA256SUMS that names files elsewhere", put("model/SHA256SUMS", b"0" * 64 + b"  ../../etc/passwd\n"),
             "passwd: missing or changed"),
    artifact("SHA256SUMS that is no text", put("model/SHA256SUMS", bytes(range(256))), "model"),
    artifact("SHA256SUMS of 3 GiB", sparse("model/SHA256SUMS", 3 * 1024 * MiB), "model"),
    artifact("spec.json that is a list", spec(lambda s: [s]), "spec.json"),  # type: ignore[arg-type, return-value]
    artifact("spec.json nested 200,000 deep", put("model/spec.json", DEEP, sums=True), "spec.json: not valid JSON"),
    artifact("spec.json without input", spec(lambda s: {k: v for k, v in s.items() if k != "input"}), "spec.json"),
    artifact("input of 10^9 × 10^9", spec(lambda s: {**s, "input": [10**9, 10**9, 1]}), "spec.json: not the spec"),
    artifact("input of another size", spec(lambda s: {**s, "input": [16, 16, 1]}), "does not take what spec.json says"),
    artifact("input as text", spec(lambda s: {**s, "input": ["8", "8", "1"]}), "spec.json: not the spec"),
    artifact("fewer classes than outputs", spec(lambda s: {**s, "classes": ["a"]}), "gives .* spec.json names 1 classes"),
    artifact("classes that clear the terminal", spec(lambda s: {**s, "classes": ["\x1b[2J\x1b[31m"] * 10}),
             r"x.png\t\\x1b\[2J", code=0),
    artifact("classes that are numbers", spec(lambda s: {**s, "classes": list(range(10))}), "spec.json: not the spec"),
    # what load and --from take
    artifact("model.rdz cut in the middle", with_sums(cut("model/model.rdz")), "model.rdz: .*torn or changed", LOAD),
    artifact("model.rdz cut to 3 bytes", with_sums(cut("model/model.rdz", 0.002)), "model.rdz: not a packed", LOAD),
    artifact("model.rdz that claims 2^40 weights",
             put("model/model.rdz", packed([{}, [["w", "float32", [2**20, 2**20], "dense", 0]]]), sums=True),
             "model.rdz: .*claims", LOAD),
    artifact("model.rdz whose header inflates to 1 GiB", put("model/model.rdz", packed(["x" * 64 * MiB]), sums=True),
             "model.rdz: .*header", LOAD),
    artifact("model.rdz with an empty spec", put("model/model.rdz", packed([{}, []]), sums=True), "spec", LOAD),
    artifact("model.rdz of a network that runs code",
             put("model/model.rdz", packed([{"version": 1, "model": {"name": "os:system", "args": {}}, "classes": ["a"],
                                             "input": [8, 8, 1]}, []]), sums=True), "os:system", LOAD),
    artifact("model.rdz with the spec of a wider network",
             put("model/model.rdz", packed([{"version": 1, "model": {"name": "seed", "args": {"width": 8}}, "input":
             [8, 8, 1], "classes": ["a", "b"], "mean": [0.5], "std": [0.2], "widths": {}, "folded": [], "layers": {}},
             []]), sums=True), "tensors do not fit seed", LOAD),
    artifact("safetensors cut off", with_sums(cut("model/model.safetensors")), "model.safetensors",
             "raydeep search job.yaml --from model"),
    artifact("safetensors whose header claims 2^60 bytes", put("model/model.safetensors", lying_header(2**60), sums=True),
             "model.safetensors", "raydeep search job.yaml --from model"),
    artifact("safetensors with a tensor of 4 TiB", put("model/model.safetensors", lying_header(0), sums=True),
             "model.safetensors", "raydeep search job.yaml --from model"),
    artifact("a pickle that would run, called safetensors",
             put("model/model.safetensors", pickle.dumps(Owned()), sums=True), "model.safetensors",
             "raydeep search job.yaml --from model"),
    artifact("the spec of another network", spec(lambda s: {**s, "model": {"name": "resnet8", "args": {}}}),
             "its network is", "raydeep search job.yaml --from model"),
    artifact("a folder without a model", file("empty/x", ""), "neither a run with models/dense nor a model folder",
             "raydeep search job.yaml --from empty"),
    # datasets
    *(
        Case("artifacts", name, f"raydeep data {command} shards", says, all_of(a_dataset, make), usage=command == "verify")
        for name, command, make, says in [
            ("a shard cut off", "info", cut("shards/train-00000.parquet"), "missing or not .* bytes"),
            ("a shard with one other byte", "verify", flipped("shards/train-00000.parquet"), "not readable|sha256"),
            ("dataset.json nested 200,000 deep", "info", put("shards/dataset.json", DEEP), "not valid JSON"),
            ("dataset.json of a future schema", "info", changed("shards/dataset.json", lambda d: {**d, "schema": 99}),
             "schema 99, expected"),
            ("dataset.json with a shard elsewhere", "info", changed("shards/dataset.json", lambda d: json.loads(
                json.dumps(d).replace("train-00000", "../train-00000"))), "dataset.json"),
            ("dataset.json with counts as text", "info", changed("shards/dataset.json", lambda d: json.loads(
                json.dumps(d).replace('"rows": ', '"rows": "x", "y": '))), "dataset.json"),
        ]
    ),
    # runs
    report("a whole run", line("metrics.jsonl", ""), "report.html", 0),
    report("no run", lambda folder, stock: shutil.rmtree(folder / "run"), "run"),
    report("job.yaml is a billion laughs", put("run/job.yaml", LAUGHS.encode()), "job.yaml"),
    report("job.yaml with a tag", put("run/job.yaml", b"name: !!python/object/apply:os.system ['touch owned']\n"),
           "job.yaml.*tags"),
    report("front.json nested 200,000 deep", put("run/front.json", DEEP), "front.json"),
    report("front.json cut off", cut("run/front.json"), "front.json: not readable as JSON"),
    report("front.json that is a list", put("run/front.json", b"[]"), "front.json: expected a JSON object"),
    report("front.json with numbers as texts", put("run/front.json", b'{"dense": 1, "models": [{"bytes": "x"}, 3]}'),
           "report.html", 0),
    report("evaluation.json of wrong shape", put("run/evaluation.json", b'{"confusion": [[1, 2], [3]]}'), "report.html", 0),
    report("evaluation.json with a matrix of text", put("run/evaluation.json", b'{"confusion": "x"}'), "report.html", 0),
    report("ledger.jsonl nested 200,000 deep", line("ledger.jsonl", "[" * 200_000 + "\n{}\n"), "report.html", 0),
    report("ledger.jsonl with trials of every kind",
           line("ledger.jsonl", '{"trial": "x"}\n{"trial": 1e300}\n{"trial": 1, "config": 3}\n'), "report.html", 0),
    report("metrics.jsonl with NaN and texts", line("metrics.jsonl", '{"epoch": NaN}\n{"epoch": 2, "val_accuracy": "x"}\n'),
           "report.html", 0),
    report("provenance.json that closes the script",
           changed("run/provenance.json", lambda p: {**p, "command": "</script><script>alert(1)</script>"}),
           "report.html", 0),
    report("job.yaml is gone, and so is provenance.json", all_of(removed("run/job.yaml"), removed("run/provenance.json")),
           "is not a run folder"),
    report("report.html is a folder", lambda folder, stock: (folder / "run" / "report.html").mkdir(), "report.html"),
    report("a damaged run, shown", put("run/job.yaml", LAUGHS.encode()), "job.yaml", command="raydeep show run"),
    report("a damaged run, listed", put("run/job.yaml", b"- no\n"), "damaged", 0, "raydeep runs ."),
    report("a name that clears the terminal, listed",
           all_of(put("run/job.yaml", b'name: "\\e[2J\\e[31m"\n'), put("run/provenance.json", b"{")), "damaged|run", 0,
           "raydeep runs ."),
    report("a run with a cut job, resumed", cut("run/job.yaml", 0.9), "job.yaml", command="raydeep train --resume run"),
    report("a run of another schema, resumed", put("run/job.yaml", b"name: x\ntrain: {epoks: 3}\n"),
           "did you mean train.epochs", command="raydeep train --resume run"),
    report("a search, resumed as a training", line("job.yaml", "data: {path: SHARDS}\n"), "the run of a search",
           command="raydeep train --resume run"),
    report("provenance.json cut off, resumed", cut("run/provenance.json"), "provenance.json",
           command="raydeep search --resume run --force --set data.path=shards"),
    report("a lock that is a link", all_of(link("run/.lock", "../precious"), file("precious", "x" * 100)), r"\.lock",
           command="raydeep export run --trial 0"),
    report("a trial that is not there, exported", line("ledger.jsonl", ""), "trial|dataset",
           command="raydeep export run --trial 7"),
    # checkpoints
    checkpoint("tensors cut off", cut(f"{NEW}/tensors.safetensors")),
    checkpoint("tensors that are gone", removed(f"{NEW}/tensors.safetensors")),
    checkpoint("one file more", file(f"{NEW}/more.safetensors", b"")),
    checkpoint("state.json cut off", cut(f"{NEW}/state.json")),
    checkpoint("state.json nested 200,000 deep", put(f"{NEW}/state.json", DEEP)),
    checkpoint("state.json that is a list", put(f"{NEW}/state.json", b"[]")),
    checkpoint("state.json without a moment", changed(f"{NEW}/state.json", lambda s: {**s, "moment": None})),
    checkpoint("state.json with a checksum elsewhere",
               changed(f"{NEW}/state.json", lambda s: {**s, "sha256": {"../../etc/passwd": "0" * 64}})),
    checkpoint("state.json of a future format", changed(f"{NEW}/state.json", lambda s: {**s, "format": 99})),
    checkpoint("a link to a folder elsewhere", moved),
    checkpoint("a file where a folder is expected",
               a_file_instead),
    checkpoint("a header that lies, checksum made to fit", resummed("tensors.safetensors", lying_header(2**60))),
    checkpoint("a pickle that would run, checksum made to fit", resummed("tensors.safetensors", pickle.dumps(Owned()))),
]  # fmt: skip
