"""A network in the middle of compression, as trials go on from it, and what they do in their process, rung by rung."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from raydeep import mirror, remote
from raydeep.compress import pack, plan, state
from raydeep.compress.common import Common
from raydeep.config import Augment, Job, Quantize, Recover, Search, Train
from raydeep.data.augment import Augmenter
from raydeep.data.batches import Batches
from raydeep.data.resident import Dataset
from raydeep.errors import ModelError, StorageError
from raydeep.model import artifact, layers
from raydeep.ops import searching
from raydeep.search import trial
from raydeep.search.engine import Engine
from raydeep.search.ledger import Ledger
from raydeep.search.trial import Bench, load_predictions, save_predictions, settle, trial_folder
from raydeep.search.work import Work
from raydeep.train import checkpoint, losses
from raydeep.train.loop import fit

Row = dict[str, Any]
S, W, A, LR = "prune.sparsity", "quantize.weight_bits", "quantize.activation_bits", "train.lr"
FOUR_BITS: Row = {S: 0.5, W: 4, A: 8}


def trained(name: str, args: Row, digits: Dataset, epochs: int) -> plan.Dense:
    spec = artifact.make_spec(name, args, digits.classes, digits.shape, digits.mean, digits.std)
    torch.manual_seed(0)
    model = artifact.build(spec)
    if epochs:
        cfg = Train(epochs=epochs, batch_size=64, lr=0.1, precision="float32")
        batches = Batches(digits.train, Augmenter(Augment(), digits.mean, digits.std), cfg.batch_size, seed=0)
        fit(model, losses.cross_entropy(), batches, cfg)
    return plan.Dense(*artifact.freeze(model.eval(), spec, fold=False))


@pytest.fixture(scope="module")
def dense(digits: Dataset) -> plan.Dense:
    """A small network with BatchNorm, two epochs old."""
    return trained("seed", {"width": 8}, digits, 2)


@pytest.fixture(scope="module")
def residual(digits: Dataset) -> plan.Dense:
    return trained("resnet8", {"width": 8}, digits, 1)


def recipe(values: Row, epochs: int) -> Job:
    job = Job(train=Train(batch_size=64, precision="float32"), quantize=Quantize(calibration_rows=128))
    return job.with_values({"recover.epochs": epochs, "recover.lr": 0.02, **values})


# states

KINDS: dict[str, Row] = {
    "float": {},
    "masked": {S: 0.7},
    "2:4": {"prune.kind": "2:4", W: 8},
    "quantized": {W: 4, A: 4},
    "affine": {W: 4, A: 8, "quantize.scheme": "affine"},
    "power of two": {W: 4, A: 8, "quantize.power_of_two": True},
    "masked and quantized": {S: 0.8, W: 3, A: 8, "quantize.edge_bits": None},
    "narrowed": {"prune.kind": "channels", S: 0.5},
    "narrowed and quantized": {"prune.kind": "channels", S: 0.5, W: 4, A: 8},
    "allocated": {W: {"average": 4}, A: 8},
}


@pytest.mark.parametrize(
    ("kind", "epochs"), [*((kind, 0) for kind in KINDS), ("masked and quantized", 1), ("narrowed and quantized", 1)]
)
def test_a_state_comes_back_from_its_file_bit_for_bit(residual, digits, tmp_path, monkeypatch, kind, epochs):
    seen: list[torch.nn.Module] = []

    def watched(model: torch.nn.Module, spec: Row) -> state.State:
        seen.append(model)
        return state.snapshot(model, spec)

    monkeypatch.setattr(plan, "snapshot", watched)
    made = plan.make(recipe(KINDS[kind], epochs), residual, digits, seed=1)
    (tmp_path / "state").write_bytes(state.to_bytes(made.state))
    again = state.read(tmp_path / "state")
    assert (again.spec, again.layers) == (made.state.spec, made.state.layers)
    model = state.rebuild(again)
    assert model.training
    assert all(p.requires_grad for p in model.parameters() if p.is_floating_point())
    inputs = torch.from_numpy(digits.val.images[:64].copy()).permute(0, 3, 1, 2).float() / 128 - 1
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs), seen[0].eval()(inputs))
    assert pack.pack(*artifact.freeze(model.eval(), again.spec)) == made.packed
    assert bool(again.spec["widths"]) == ("narrowed" in kind)
    found = [entry for entry in again.layers.values() if entry["mask"]]
    assert bool(found) == (kind in ("masked", "2:4", "masked and quantized"))


def test_bytes_of_a_state_are_a_function_of_it(dense, digits):
    made = plan.make(recipe(FOUR_BITS, 0), dense, digits, seed=1)
    assert state.to_bytes(made.state) == state.to_bytes(made.state)


@pytest.fixture(scope="module")
def bytes_of_a_state(dense: plan.Dense, digits: Dataset) -> bytes:
    return state.to_bytes(plan.make(recipe(FOUR_BITS, 0), dense, digits, seed=1).state)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"\xff" * len(data),
        lambda data: b"\x80\x04K\x01.",  # a pickle
        lambda data: data.replace(b'"version\\":1', b'"version\\":9').replace(b'\\"version\\": 1', b'\\"version\\": 9'),
        lambda data: data.replace(b"raydeep", b"raydeeq"),
        lambda data: save({"x": torch.zeros(2)}),
        lambda data: save({"x": torch.zeros(2)}, {"raydeep": "no json"}),
        lambda data: save({"x": torch.zeros(2)}, {"raydeep": "[1]"}),
        lambda data: save({"x": torch.zeros(2)}, {"raydeep": '{"version": 1}'}),
    ],
)
def test_a_damaged_or_foreign_file_is_named(tmp_path, bytes_of_a_state, damage):
    path = tmp_path / "state-1.safetensors"
    path.write_bytes(damage(bytes_of_a_state))
    with pytest.raises(
        ModelError, match=r"state-1\.safetensors: (not the state of a trial, or damaged|a state of vers)"
    ):
        state.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"state-1\.safetensors: not the state of a trial"):
        state.read(tmp_path / "state-1.safetensors")


@settings(max_examples=150)
@given(st.data())
def test_a_flipped_byte_of_the_head_never_comes_out_as_another_error(tmp_path_factory, bytes_of_a_state, data):
    raw = bytearray(bytes_of_a_state)
    size = int.from_bytes(raw[:8], "little")
    raw[data.draw(st.integers(0, 8 + size - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(raw)
    try:
        state.read(path)
    except ModelError:
        return


@pytest.mark.parametrize("kind", ["masked", "masked and quantized", "power of two"])
def test_float_weights_of_a_state_thaw_what_is_masked_included(residual, digits, kind):
    made = plan.make(recipe(KINDS[kind], 0), residual, digits, seed=1)
    found = made.state.dense()
    assert found is not None
    spec, tensors = found
    assert spec == residual.spec
    model = artifact.thaw(spec, tensors)
    assert set(tensors) == set(model.state_dict())
    assert sum(int((t == 0).sum()) for name, t in tensors.items() if name.endswith("conv1.weight")) == 0
    latent = dict(layers.compressible(state.rebuild(made.state)))
    for name, module in layers.compressible(model):
        assert torch.equal(module.weight, layers.raw_weight(latent[name]))
    right = (plan.predictions(model, digits, digits.val, 512) == digits.val.labels).mean()
    assert right > 0.6
    plan.make(recipe({S: 0.3}, 0), plan.Dense(*found), digits, seed=1)  # another recipe begins there


def test_a_narrowed_network_has_no_weights_to_give(residual, digits):
    assert plan.make(recipe(KINDS["narrowed"], 0), residual, digits, seed=1).state.dense() is None


@pytest.mark.parametrize("kind", ["2:4", "masked and quantized", "narrowed and quantized"])
def test_training_goes_on_from_a_state(residual, digits, kind):
    first = plan.make(recipe(KINDS[kind], 1), residual, digits, seed=1)
    more = plan.make(recipe(KINDS[kind], 2), residual, digits, seed=1, before=first.state)
    assert [row["epoch"] for row in more.history] == [1, 2]
    assert more.state.spec == first.state.spec
    assert more.state.layers == first.state.layers
    assert more.state.tensors.keys() == first.state.tensors.keys()
    masks = [name for name, tensor in first.state.tensors.items() if tensor.dtype == torch.bool]
    assert bool(masks) == (not kind.startswith("narrowed"))
    assert all(torch.equal(first.state.tensors[name], more.state.tensors[name]) for name in masks)
    changed = [n for n, t in first.state.tensors.items() if n.endswith(("weight", state.ORIGINAL))]
    assert any(not torch.equal(first.state.tensors[n], more.state.tensors[n]) for n in changed)
    assert more.history[-1]["train_loss"] < first.history[-1]["train_loss"]

    def right(made: plan.Made) -> float:
        return float((plan.score(made.packed, digits, digits.val, 512) == digits.val.labels).mean())

    assert right(more) >= right(first) - 0.01


# a bench


class Kill(BaseException):
    """As of a process that is gone: no handler of exceptions sees it."""


def bench_of(job: Job, run: Path, dense: plan.Dense, digits: Dataset) -> Bench:
    return Bench(job, run, digits, Common(dense, digits, job.seed), {"bytes": 10_000})


@pytest.fixture
def compressing(job: Job) -> Job:
    return job.model_copy(
        update={
            "recover": Recover(epochs=3, lr=0.02),
            "quantize": Quantize(calibration_rows=128),
            "search": Search(rungs=(0, 1, 3), space={S: [0.0, 0.5, 0.9], W: [None, 4], A: [None, 8]}),
        }
    )


def works(values: Row, ladder: tuple[int, ...] = (0, 1, 3), number: int = 0) -> list[Work]:
    """The rungs of a trial, as the engine would ask for them; what they found is filled in by `through`."""
    return [Work(number, values, 11 + number, k, epochs, ladder[k - 1] if k else 0) for k, epochs in enumerate(ladder)]


def through(bench: Bench, pieces: list[Work]) -> list[Row]:
    rows: list[Row] = []
    for work in pieces:
        last = rows[-1] if rows else None
        row = bench.do(work._replace(score=last and last["val_accuracy"], start=last["start"] if last else "dense"))
        assert row["error"] is None, row["error"]
        rows.append(row)
    return rows


def packed_at(run: Path, trial: int, rung: int) -> bytes:
    return (trial_folder(run, trial) / f"model-{rung}.rdz").read_bytes()


def test_a_pruned_four_bit_network_is_trained_in_rungs(compressing, dense, digits, tmp_path):
    bench = bench_of(compressing, tmp_path, dense, digits)
    rows: list[Row] = []
    for work in works(FOUR_BITS):
        row = bench.do(work._replace(score=rows[-1]["val_accuracy"] if rows else None))
        rows.append(row)
        assert (row["status"], row["error"], row["start"]) == ("done", None, "dense")
        folder = trial_folder(tmp_path, 0)
        packed = packed_at(tmp_path, 0, work.rung)
        assert hashlib.sha256(packed).hexdigest() == row["artifact_sha256"]
        predicted = plan.score(packed, digits, digits.val, 512)
        assert float((predicted == digits.val.labels).mean()) == row["val_accuracy"]
        name = f"predictions-{work.rung}"
        assert np.array_equal(load_predictions(folder, name)["val"], predicted)
        assert len(packed) == row["bytes"]
        assert row["compression_ratio"] == 10_000 / row["bytes"]
        assert json.loads((folder / "config.json").read_text()) == {"seed": 11, "config": FOUR_BITS}
    assert [row["sparsity"] for row in rows] == pytest.approx([0.5] * 3, abs=0.01)
    assert rows[2]["val_accuracy"] > rows[0]["val_accuracy"] + 0.02
    assert len({row["artifact_sha256"] for row in rows}) == 3
    assert all(row["seconds"] > 0 < row["cpu_seconds"] for row in rows)
    files = {file.name for file in folder.iterdir()}
    of_rungs = {name.format(k) for k in range(3) for name in ("model-{}.rdz", "predictions-{}.safetensors")}
    assert files == {"config.json", "state-1.safetensors", "state-2.safetensors", *of_rungs}


def test_rungs_are_the_work_of_one_training_cut_in_parts(compressing, dense, digits, tmp_path):
    """The last rung is what plan.make does from the state of the one before."""
    bench = bench_of(compressing, tmp_path, dense, digits)
    through(bench, works(FOUR_BITS))
    first, last = (state.read(trial_folder(tmp_path, 0) / f"state-{k}.safetensors") for k in (1, 2))
    job = compressing.with_values({**FOUR_BITS, "recover.epochs": 2})
    made = plan.make(job, dense, digits, 11, common=bench.common, before=first)
    assert made.state.tensors.keys() == last.tensors.keys()
    assert all(torch.equal(made.state.tensors[name], last.tensors[name]) for name in last.tensors)


def test_a_trial_goes_on_on_another_node(compressing, dense, digits, on, bucket, tmp_path):
    """Each rung where nothing of the one before is; a neighbour's weights come from a third node."""
    pieces = works(FOUR_BITS)
    whole = through(bench_of(compressing, tmp_path / "shared", dense, digits), pieces)
    rows: list[Row] = []
    for work, node in zip(pieces, "abc", strict=True):
        on(node)
        run = mirror.place(bucket) / "run"
        rows.append(bench_of(compressing, run, dense, digits).do(
            work._replace(score=rows[-1]["val_accuracy"] if rows else None)
        ))  # fmt: skip
    assert [row["artifact_sha256"] for row in rows] == [row["artifact_sha256"] for row in whole]
    on("d")
    run = mirror.place(bucket) / "run"
    own = {file.name for file in trial_folder(tmp_path / "shared", 0).iterdir()}
    assert set(mirror.names(trial_folder(run, 0))) == own
    bench = bench_of(compressing, run, dense, digits)
    weights = bench._weights("t000")
    assert weights is not None
    assert any(not torch.equal(weights.tensors[name], dense.tensors[name]) for name in weights.tensors)
    assert bench._weights("t007") is None

    done = [{"trial": 0, "rung": 1, "artifact_sha256": rows[1]["artifact_sha256"]}]
    for _ in range(2):
        searching.settle_all(run, done)
        assert (
            hashlib.sha256((trial_folder(run, 0) / "model.rdz").read_bytes()).hexdigest() == whole[1]["artifact_sha256"]
        )
    searching.clean(run)
    left = ["config.json", "model.rdz", "predictions.safetensors"]
    assert mirror.names(trial_folder(run, 0)) == left
    on("e")
    run = mirror.place(bucket) / "run"
    searching.settle_all(run, done)
    assert sorted(path.name for path in trial_folder(run, 0).iterdir()) == left[1:]


def test_another_trial_of_that_number_leaves_nothing_in_the_bucket(compressing, dense, digits, on, bucket):
    run = mirror.place(bucket) / "run"
    through(bench_of(compressing, run, dense, digits), works(FOUR_BITS)[:2])
    on("b")
    run = mirror.place(bucket) / "run"
    through(bench_of(compressing, run, dense, digits), works({**FOUR_BITS, S: 0.9})[:1])
    assert mirror.names(trial_folder(run, 0)) == ["config.json", "model-0.rdz", "predictions-0.safetensors"]


def test_a_bucket_that_is_gone_is_not_the_trials_fault(compressing, dense, digits, on, bucket, monkeypatch):
    def gone(*_: object) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr(remote, "put", gone)
    bench = bench_of(compressing, mirror.place(bucket) / "run", dense, digits)
    with pytest.raises(StorageError, match="NETWORK"):
        bench.do(works(FOUR_BITS)[0])


def test_a_settled_trial_has_the_files_of_its_best_rung(compressing, dense, digits, tmp_path):
    bench = bench_of(compressing, tmp_path, dense, digits)
    rows = through(bench, works(FOUR_BITS))
    for _ in range(2):  # the second time nothing is left to do
        settle(tmp_path, 0, 1)
        folder = trial_folder(tmp_path, 0)
        assert hashlib.sha256((folder / "model.rdz").read_bytes()).hexdigest() == rows[1]["artifact_sha256"]
        assert float((load_predictions(folder)["val"] == digits.val.labels).mean()) == rows[1]["val_accuracy"]
        assert not [*folder.glob("model-*"), *folder.glob("predictions-*")]


@pytest.mark.parametrize("values", [{S: 0.9999}, {S: 7}, {"prune.kind": "2:4", S: "x"}])
def test_what_raises_is_a_failed_result_with_its_traceback(compressing, dense, digits, tmp_path, values):
    bench = bench_of(compressing, tmp_path, dense, digits)
    row = bench.do(works(values)[0])
    assert row["status"] == "failed"
    assert "Traceback (most recent call last)" in row["error"]
    assert "JobError" in row["error"]
    assert S in row["error"]
    assert row["seconds"] > 0
    assert bench.do(works({W: 4})[0])["status"] == "done"  # the process lives on


def test_a_lost_state_is_a_failed_result(compressing, dense, digits, tmp_path):
    bench = bench_of(compressing, tmp_path, dense, digits)
    through(bench, works(FOUR_BITS)[:2])
    file = trial_folder(tmp_path, 0) / "state-1.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    row = bench.do(works(FOUR_BITS)[2])
    assert row["status"] == "failed"
    assert "state-1.safetensors: not the state of a trial, or damaged" in row["error"]


def killed_at(n: int, monkeypatch: pytest.MonkeyPatch, do: Callable[[], Any]) -> bool:
    """Do it, and be killed at the n-th file that is written; whether there were so many."""
    count = 0

    def write(path: Path, data: bytes) -> None:
        nonlocal count
        count += 1
        if count == n:
            path.with_name(f".{path.name}.1.part").write_bytes(data[: len(data) // 2])  # as disk.atomic leaves it
            raise Kill
        real(path, data)

    real = trial.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(trial, "write_bytes", write)
        try:
            do()
        except Kill:
            return True
    return False


@pytest.mark.parametrize("rung", [0, 1, 2])
def test_after_a_kill_a_rung_done_again_is_the_same(compressing, dense, digits, tmp_path, monkeypatch, rung):
    pieces = works(FOUR_BITS)
    before = bench_of(compressing, tmp_path / "before", dense, digits)
    whole = through(before, pieces[:rung])
    work = pieces[rung]._replace(score=whole[-1]["val_accuracy"] if whole else None)
    if rung:
        shutil.copytree(before.run, tmp_path / "whole")
    whole.append(bench_of(compressing, tmp_path / "whole", dense, digits).do(work))
    kills = 0
    for n in range(1, 9):
        run = tmp_path / f"killed{n}"
        if rung:
            shutil.copytree(before.run, run)
        bench = bench_of(compressing, run, dense, digits)
        if not killed_at(n, monkeypatch, lambda bench=bench: bench.do(work)):
            break
        kills += 1
        again = bench_of(compressing, run, dense, digits).do(work)
        assert again["artifact_sha256"] == whole[rung]["artifact_sha256"]
        assert again["val_accuracy"] == whole[rung]["val_accuracy"]
        assert hashlib.sha256(packed_at(run, 0, rung)).hexdigest() == whole[rung]["artifact_sha256"]
    assert kills == (2 if rung == 0 else 3)  # predictions, model and, of what is trained, the state


def test_a_folder_of_another_configuration_is_emptied_and_the_own_kept(compressing, dense, digits, tmp_path):
    bench = bench_of(compressing, tmp_path, dense, digits)
    through(bench, works({S: 0.9}))
    folder = trial_folder(tmp_path, 0)
    (folder / "left").write_text("over")
    through(bench, works({S: 0.9})[:1])
    assert (folder / "left").exists()
    through(bench, works({S: 0.5})[:1])  # its number is given again
    assert not (folder / "left").exists()
    assert not list(folder.glob("state-*"))
    (folder / "left").write_text("over")
    bench.do(works({S: 0.5})[0]._replace(seed=99))
    assert not (folder / "left").exists()


def test_a_further_worker_writes_nothing(compressing, dense, digits, tmp_path):
    bench = bench_of(compressing, tmp_path, dense, digits)
    bench.keeps = False
    row = bench.do(works(FOUR_BITS)[0])
    assert row["status"] == "done"
    assert not (tmp_path / "trials").exists()


def test_bench_and_engine_go_through_a_whole_search(compressing, dense, digits, tmp_path):
    search = Search(
        rungs=(0, 1, 2), trials=6, reduction=2, space={S: [0.5, 0.8], W: [4, 8], A: [8]}, sampler="random",
    )  # fmt: skip
    job = compressing.model_copy(update={"search": search})
    bench = bench_of(job, tmp_path, dense, digits)
    reference = {"val_accuracy": 0.9, "bytes": 10_000}
    engine = Engine(job, Ledger(tmp_path / "ledger.jsonl", {}), reference)
    seen = set()
    while (work := engine.peek()) is not None:
        engine.begin(work)
        seen.add(work.neighbour is not None)
        engine.take(work, bench.do(work))
    engine.finish()
    rows = engine.ledger.done()
    assert len(rows) == 4  # configurations in all
    assert sum(row["rungs"] >= 2 for row in rows) >= 2
    assert max(row["rungs"] for row in rows) == 3
    assert seen == {False, True}
    for row in rows:
        packed = packed_at(tmp_path, row["trial"], row["rung"])
        assert hashlib.sha256(packed).hexdigest() == row["artifact_sha256"]


# warm starts


def test_a_trial_starts_from_a_neighbour_only_if_that_scores_better(compressing, dense, digits, tmp_path):
    young = trained("seed", {"width": 8}, digits, 0)
    fast = compressing.model_copy(update={"recover": Recover(epochs=3, lr=0.1)})
    bench = bench_of(fast, tmp_path, young, digits)
    through(bench, works(FOUR_BITS))  # three epochs from an untrained network
    work = works({S: 0.5}, number=1)[0]
    cold, warm = bench.do(work), bench.do(work._replace(neighbour="t000"))
    assert (cold["start"], warm["start"]) == ("dense", "t000")
    assert warm["val_accuracy"] > cold["val_accuracy"] + 0.2
    # without training the dense model was better before: now it begins from the neighbour's weights after all
    first = works({S: 0.5}, number=2)[1]._replace(score=cold["val_accuracy"])
    assert [bench.do(first._replace(neighbour=n))["start"] for n in (None, "t000")] == ["dense", "t000"]
    assert bench.do(first._replace(neighbour="t000", score=1.0))["start"] == "dense"
    assert bench.do(first._replace(neighbour="t777"))["start"] == "dense"  # gone, or narrowed
    own = bench.do(first._replace(start="t000", score=0.5))
    assert own["start"] == "t000"
    assert own["val_accuracy"] > cold["val_accuracy"] + 0.2
    good = bench_of(compressing, tmp_path / "good", dense, digits)
    through(good, works({S: 0.9, W: 4, A: 8})[:2])
    assert good.do(works({W: 8}, number=1)[0]._replace(neighbour="t000"))["start"] == "dense"


def test_a_packed_file_is_scored_once(compressing, dense, digits, tmp_path, monkeypatch):
    bench = bench_of(compressing, tmp_path, dense, digits)
    through(bench, works(FOUR_BITS)[:2])
    scored: list[bytes] = []
    real = plan.score
    monkeypatch.setattr(plan, "score", lambda packed, *rest: scored.append(packed) or real(packed, *rest))
    assert bench.do(works({W: 4}, number=1)[0]._replace(neighbour="t000"))["error"] is None
    assert len(scored) == len(set(scored)) == 2  # from the dense model, and from the neighbour


def test_what_trials_share_is_sent_without_the_data(compressing, dense, digits):
    job = compressing.model_copy(update={"prune": compressing.prune.model_copy(update={"score": "taylor"})})
    whole = Common(dense, digits, 3).prepare(job)
    sent = pickle.loads(pickle.dumps(whole.sent()))
    assert sent.data is None
    there = sent.receive(digits, "cpu")
    rows = job.quantize.calibration_rows
    assert set(there.known) == set(whole.known) > set()
    assert all(
        torch.equal(a, b) for a, b in zip(there.inputs(job.augment, rows), whole.inputs(job.augment, rows), strict=True)
    )
    assert all(torch.equal(score, whole.taylor(rows)[name]) for name, score in there.taylor(rows).items())
    for (x, y), (u, v) in zip(there.labelled(rows), whole.labelled(rows), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


# without rungs


def test_without_rungs_a_trial_has_its_own_epochs(compressing, dense, digits, tmp_path):
    search = Search(scheduler="none", space={"recover.epochs": [0, 1, 2], W: [4]})
    bench = bench_of(compressing.model_copy(update={"search": search}), tmp_path, dense, digits)
    for epochs in (0, 1):
        row = bench.do(Work(epochs, {"recover.epochs": epochs, W: 4}, 11, 0, epochs, 0))
        job = compressing.with_values({"recover.epochs": epochs, W: 4})
        made = plan.make(job, dense, digits, 11, common=bench.common)
        assert row["artifact_sha256"] == hashlib.sha256(made.packed).hexdigest()
        assert len(made.history) == epochs


def test_without_rungs_quantization_aware_epochs_stay_without_recovery(compressing, dense, digits, tmp_path):
    quantize = Quantize(epochs=1, weight_bits=4, calibration_rows=128)
    job = compressing.model_copy(
        update={
            "quantize": quantize,
            "search": Search(scheduler="none", space={S: [0.5]}),
            "recover": Recover(epochs=0),
        }
    )
    row = bench_of(job, tmp_path, dense, digits).do(Work(0, {S: 0.5}, 11, 0, 0, 0))
    made = plan.make(job.with_values({S: 0.5}), dense, digits, 11, common=Common(dense, digits, job.seed))
    assert len(made.history) == 1
    assert row["artifact_sha256"] == hashlib.sha256(made.packed).hexdigest()


# trials that train


def training(job: Job, **search: Any) -> Job:
    search = {"rungs": (1, 2, 3), "space": {LR: [0.02, 0.05, 0.1], "train.ema": [0.0, 0.9]}, **search}
    return job.model_copy(update={"search": Search(**search), "train": job.train.model_copy(update={"epochs": 3})})


def fitted(
    job: Job, digits: Dataset, values: Row, seed: int, until: int, resume: checkpoint.Checkpoint | None = None
) -> dict[str, torch.Tensor]:
    """The weights after one training of so many of three epochs."""
    cfg = job.with_values(values).train
    spec = artifact.make_spec(job.model.name, job.model.args, digits.classes, digits.shape, digits.mean, digits.std)
    torch.manual_seed(seed)
    model = artifact.build(spec)
    batches = Batches(digits.train, Augmenter(job.augment, digits.mean, digits.std), cfg.batch_size, seed)
    fit(model, losses.cross_entropy(), batches, cfg, epochs=3, until=until, seed=seed, resume=resume)
    return model.state_dict()


def weights_of(run: Path, number: int = 0) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(trial_folder(run, number) / "checkpoints")
    assert found is not None
    return found.weights()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("values", [{LR: 0.05}, {LR: 0.02, "train.ema": 0.9}], ids=str)
def test_a_trial_that_trains_goes_on_bit_for_bit(job, digits, tmp_path, values):
    job = training(job)
    pieces = works(values, (1, 2, 3))
    rows = [bench_of(job, tmp_path, None, digits).do(work) for work in pieces]  # type: ignore[arg-type]
    assert [row["error"] for row in rows] == [None] * 3
    assert [row["start"] for row in rows] == ["scratch"] * 3
    whole = fitted(job, digits, values, 11, 3)
    assert same(weights_of(tmp_path), whole)
    assert not same(weights_of(tmp_path), fitted(job, digits, values, 11, 2))
    packed = packed_at(tmp_path, 0, 2)
    assert hashlib.sha256(packed).hexdigest() == rows[-1]["artifact_sha256"]
    model = artifact.build(pack.unpack(packed)[0] | {"folded": []})
    model.load_state_dict(whole)
    right = float((plan.predictions(model, digits, digits.val, 512) == digits.val.labels).mean())
    assert right == pytest.approx(rows[-1]["val_accuracy"], abs=0.01)  # BatchNorm is folded in the file


def test_a_trial_that_trains_and_then_prunes(job, digits, tmp_path):
    job = training(job).model_copy(update={"recover": Recover(epochs=1)})
    row = bench_of(job, tmp_path, None, digits).do(works({LR: 0.05, S: 0.8, W: 4}, (1, 2, 3))[0])  # type: ignore[arg-type]
    assert row["error"] is None
    assert row["sparsity"] == pytest.approx(0.8, abs=0.02)
    spec, _ = pack.unpack(packed_at(tmp_path, 0, 0))
    assert {entry["weight_bits"] for entry in spec["layers"].values()} == {4, 8}
    assert same(weights_of(tmp_path), fitted(job, digits, {LR: 0.05}, 11, 1))  # it trains on from before pruning


def test_after_a_kill_in_the_middle_of_an_epoch_a_trial_goes_on_bit_for_bit(job, digits, tmp_path, monkeypatch):
    job = training(job)
    job = job.model_copy(update={"train": job.train.model_copy(update={"checkpoint_steps": 5})})
    pieces = works({LR: 0.05}, (1, 2, 3))
    bench = bench_of(job, tmp_path, None, digits)  # type: ignore[arg-type]
    whole = [bench_of(job, tmp_path / "whole", None, digits).do(work) for work in pieces[:2]]  # type: ignore[arg-type]
    assert bench.do(pieces[0])["error"] is None
    steps = 0

    def step(*args: Any, **more: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 13:
            raise Kill
        return real(*args, **more)

    real = torch.optim.SGD.step
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        with pytest.raises(Kill):
            bench.do(pieces[1])
    cut = checkpoint.latest(trial_folder(tmp_path, 0) / "checkpoints")
    assert cut is not None
    assert cut.moment.epoch == 1
    assert 0 < cut.moment.step < 13
    again = bench_of(job, tmp_path, None, digits).do(pieces[1])  # type: ignore[arg-type]
    assert again["artifact_sha256"] == whole[1]["artifact_sha256"]
    assert same(weights_of(tmp_path), weights_of(tmp_path / "whole"))
    once_more = bench_of(job, tmp_path, None, digits).do(pieces[1])  # type: ignore[arg-type]  # its line was lost
    assert once_more["artifact_sha256"] == whole[1]["artifact_sha256"]


def test_a_member_of_a_population_goes_on_from_its_donor(job, digits, tmp_path):
    job = training(job, scheduler="pbt", space={LR: [0.02, 0.05, 0.1]})
    bench = bench_of(job, tmp_path, None, digits)  # type: ignore[arg-type]
    mine, theirs = works({LR: 0.02}, (1, 2, 3), 0), works({LR: 0.1}, (1, 2, 3), 1)
    for work in (mine[0], *theirs):  # the donor is further by now
        assert bench.do(work)["error"] is None
    row = bench.do(mine[1]._replace(values={LR: 0.05}, donor="t001"))
    assert (row["error"], row["start"]) == (None, "t001")
    given = checkpoint.load(trial_folder(tmp_path, 1) / "rung-0")
    assert given.moment.epoch == 1
    assert same(weights_of(tmp_path), fitted(job, digits, {LR: 0.05}, 11, 2, given))
    assert not same(weights_of(tmp_path), fitted(job, digits, {LR: 0.05}, 11, 2))
    last = bench.do(mine[2]._replace(values={LR: 0.05}))
    assert (last["error"], last["start"]) == (None, "scratch")
    own = checkpoint.load(trial_folder(tmp_path, 0) / "rung-1")
    assert same(weights_of(tmp_path), fitted(job, digits, {LR: 0.05}, 11, 3, own))


# files


def test_predictions_come_back(tmp_path):
    save_predictions(trial_folder(tmp_path, 3), val=np.arange(4), test=np.arange(3) * 2)
    found = load_predictions(tmp_path / "trials" / "t003")
    assert found["val"].tolist() == [0, 1, 2, 3]
    assert found["test"].tolist() == [0, 2, 4]
    assert found["val"].dtype == np.int64
    assert trial_folder(tmp_path, "t003") == trial_folder(tmp_path, 3)
