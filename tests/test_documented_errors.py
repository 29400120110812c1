"""Every error that a public function documents is raised in a test.

The docstrings of raydeep are read for `Raises:`. A pair of function and error counts as tested if a `with raises(`
block of a test has the function's name in it and expects the error. The others stand in one of two tables: DIRECT
calls the function here, ELSEWHERE names the test, or the hostile case, that reaches it through another one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hostile.table import CASES

from raydeep import errors
from raydeep.config import Data, Job

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# Functions that have a name in common with others: a test of those would count for them.
COMMON = {"find", "load", "predict", "read", "code", "check", "of", "search", "train", "compress", "choose", "verify"}


def documented() -> list[tuple[str, str]]:
    """(`module.function`, error) of every public function, method and class with `Raises:`."""
    found = []
    for path in sorted((ROOT / "raydeep").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT / "raydeep").with_suffix("").parts)

        def walk(node: Any, prefix: str) -> None:
            for child in node.body:
                if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and child.name[0] != "_":
                    told = re.search(r"^Raises:\n((?:    .*\n?)+)", ast.get_docstring(child) or "", re.MULTILINE)
                    names = re.findall(r"^    (\w+):", told[1], re.MULTILINE) if told else []
                    found.extend((f"{prefix}.{child.name}", name) for name in names)
                    if isinstance(child, ast.ClassDef):
                        walk(child, f"{prefix}.{child.name}")

        walk(ast.parse(path.read_text()), module)
    return found


def kinds(name: str) -> set[str]:
    """The error and those that are kinds of it: a test that expects one of them tells."""
    base = getattr(errors, name, None)
    if base is None:
        return {name}
    return {other for other, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, base)}


def raised(text: str) -> set[str]:
    return set(re.findall(r"\b(\w+Error|SystemExit|KeyboardInterrupt)\b", text))


def blocks(test: ast.FunctionDef) -> list[tuple[set[str], set[str]]]:
    """Of each `with raises(` of a test: the names in its block, the errors that it expects.

    Where `raises` is given a parameter, these are all errors that the test and its parameters name.
    """
    found = []
    for block in (node for node in ast.walk(test) if isinstance(node, ast.With)):
        heads = [item.context_expr for item in block.items]
        expects = [head for head in heads if isinstance(head, ast.Call) and ast.unparse(head.func) == "pytest.raises"]
        inside = [node for head in [*heads, *block.body] if head not in expects for node in ast.walk(head)]
        names = {getattr(node, "attr", getattr(node, "id", "")) for node in inside}
        if expects:
            found.append((names, raised(ast.unparse(expects[0].args[0])) or raised(ast.unparse(test))))
    return found


FUNCTIONS = {
    f"{path.relative_to(TESTS)}::{node.name}": node
    for path in TESTS.rglob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
}
BLOCKS = [block for node in FUNCTIONS.values() for block in blocks(node)]


class Hostile(NamedTuple):
    """A case of tests/hostile, which its one test runs."""

    group: str
    name: str


def gone(folder: Path) -> Data:
    return Data(source="folder", path=str(folder / "gone"))


def of_sizes(**facts: Any) -> Any:
    from raydeep.data.shards import Manifest

    empty = dict.fromkeys(("classes", "mode", "store", "mean", "std", "splits", "quarantined", "hash"))
    return Manifest(**{**empty, "path": Path("x"), "size_range": (4, 4, 8, 8), **facts})  # type: ignore[arg-type]


def away(folder: Path) -> Any:
    from raydeep.data.files import Files

    (folder / "in").mkdir()
    (folder / "in" / "link").symlink_to("/etc/passwd")
    return Files(str(folder / "in")).probe("link")


def labels_of(*values: Any) -> Any:
    from raydeep.data import rows

    return rows.labels_of_list(lambda i: f"row {i}", values)


def call(module: str, name: str, *args: Any, **more: Any) -> Any:
    import importlib

    made = importlib.import_module(f"raydeep.{module}")
    for part in name.split("."):
        made = getattr(made, part)
    return made(*args, **more)


# `module.function`, error → a call that raises it, in a fresh folder
DIRECT: dict[tuple[str, str], Callable[[Path], Any]] = {
    ("api.search", "DataError"): lambda f: call("api", "search", Job(data=gone(f), storage=str(f)), quiet=True),
    ("compress.masks.choose", "JobError"): lambda f: call("compress.masks", "choose", {"a": torch.rand(4)}, 0.99),
    ("compress.masks.kept_in_all", "JobError"): lambda f: call(
        "compress.masks", "kept_in_all", {"a": torch.Size([2]), "b": torch.Size([2])}, 0.75
    ),
    ("compress.channels.choose", "JobError"): lambda f: call(
        "compress.channels", "choose", [SimpleNamespace(scores=np.arange(8.0), blocks=1)],
        SimpleNamespace(after=lambda cuts, lost: 100.0 - sum(lost), target="macs"), 0.5, 1,
    ),
    ("compress.pack.table", "ArtifactError"): lambda f: call("compress.pack", "table", b"no"),
    ("compress.pack.overhead", "ArtifactError"): lambda f: call("compress.pack", "overhead", b"no"),
    ("config.read_yaml", "JobError"): lambda f: call("config", "read_yaml", f / "gone.yaml"),
    ("data.decode.read_file", "DataError"): lambda f: call(
        "data.decode", "read_file", SimpleNamespace(seek=lambda at, end=0: 2**30)
    ),
    ("data.fast.fetch", "DataError"): lambda f: call(
        "data.fast", "fetch", [call("data.fast", "Parts", str(f / "gone"), 0, 0, np.zeros(1, np.int64))],
        call("data.fast", "Format", "encoded", (8, 8), (8, 8, 1), None),
    ),
    ("data.files.Files.entries", "DataError"): lambda f: call("data.files", "Files", str(f / "gone")).entries(),
    ("data.files.Files.folders", "DataError"): lambda f: call("data.files", "Files", str(f / "gone")).folders(),
    ("data.files.Files.picture", "DataError"): lambda f: call("data.files", "Files", "memory9://x").picture("y"),
    ("data.files.Files.probe", "DataError"): away,
    ("data.files.open_files", "DataError"): lambda f: call("data.files", "open_files", gone(f)),
    ("data.guess.source_of", "DataError"): lambda f: call("data.guess", "source_of", str(f / "gone")),
    ("data.inspection.verify", "DataError"): lambda f: call("data.inspection", "verify", f),
    ("data.rows.labels_of_list", "DataError"): lambda f: labels_of([1]),
    ("data.rows.code", "DataError"): lambda f: call("data.rows", "code", "x", [labels_of(0, 0.5)], None),
    ("data.rows.parse_names", "DataError"): lambda f: call("data.rows", "parse_names", "classes.json", b'["a", ""]'),
    ("data.shards.Manifest.side", "DataError"): lambda f: of_sizes().side(Data()),
    ("data.shards.read_manifest", "DataError"): lambda f: call("data.shards", "read_manifest", f),
    ("data.sources.fingerprint", "DataError"): lambda f: call("data.sources", "fingerprint", gone(f)),
    ("data.tables.parquet", "DataError"): lambda f: call(
        "data.tables", "parquet", Data(source="parquet", path=str(f))
    ),
    ("data.tables.images", "DataError"): lambda f: call("data.tables", "images", Data(source="images", path=str(f))),
    ("data.tables.read_table", "DataError"): lambda f: call(
        "data.tables", "read_table", call("data.files", "Files", str(f)), "gone.csv", Data()
    ),
    ("data.tars.scan", "DataError"): lambda f: call(
        "data.tars", "scan", call("data.files", "Files", str(f)), "gone.tar", "label"
    ),
    ("data.unlabelled.open_pictures", "DataError"): lambda f: call(
        "data.unlabelled", "open_pictures", [str(f / "gone")], ["a", "b"], Data()
    ),
    ("deploy.predict.Model.open", "ModelError"): lambda f: call("deploy.predict", "Model.open", f),
    ("data.tars.webdataset", "DataError"): lambda f: call(
        "data.tars", "webdataset", Data(source="webdataset", path=str(f))
    ),
    ("data.vision.vision", "DataError"): lambda f: call(
        "data.vision", "vision", Data(source="torchvision:Nothing", path=str(f))
    ),
    ("ops.front.export_trial", "RaydeepError"): lambda f: call(
        "ops.front", "export_trial", SimpleNamespace(path=f, name="x"), 7, None
    ),
    ("ops.probes.read_data", "RaydeepError"): lambda f: call(
        "ops.probes", "read_data", {"data": gone(f).model_dump(), "shards": None}
    ),
    ("ops.runs.listing", "RaydeepError"): lambda f: call("ops.runs", "listing", f / "gone", 0.0),
    ("remote.no_secret", "RaydeepError"): lambda f: call("remote", "no_secret", "s3://key:secret@bucket", "data.path"),
    ("report.folder.read_run", "RaydeepError"): lambda f: call("report.folder", "read_run", f),
    ("safeyaml.load_yaml", "JobError"): lambda f: call("safeyaml", "load_yaml", "a: 1\na: 2\n"),
    ("data.files.Files.open", "OSError"): lambda f: call("data.files", "Files", str(f)).open("gone"),
    ("data.files.Files.open", "DataError"): lambda f: call("data.files", "Files", "memory9://x").open("y"),
    ("data.sharding.write", "DataError"): lambda f: call("data.sharding", "write", gone(f), f / "out", None, None),
    ("ops.runs.find", "RaydeepError"): lambda f: call("ops.runs", "find", str(f / "gone")),
    ("own.find", "RaydeepError"): lambda f: call("own", "find", "train.loss", "gone_module:x", errors.RaydeepError),
    ("remote.split", "RaydeepError"): lambda f: call("remote", "split", "s3:///folder", "storage"),
    ("remote.check", "RaydeepError"): lambda f: call("remote", "check", "ftp://x/y", "storage"),
    ("train.cluster.join", "ResourceError"): lambda f: call("train.cluster", "join", "127.0.0.1:9"),
    ("train.pipeline.Pipeline.backward", "TrainError"): lambda f: call(
        "train.pipeline", "Pipeline.backward", SimpleNamespace(micro=4, micros=2),
        [SimpleNamespace(images=torch.zeros(3, 1))], None, 3, None,
    ),
}  # fmt: skip

REFUSED = "test_cli.py::test_a_job_that_cannot_run_is_refused_before_a_run_folder_is_made"
NO_JOB = "test_own.py::test_a_stage_refuses_what_is_no_job"
PREDICTED = "test_predict.py::test_what_can_not_be_read_is_named"
NOT_FINITE = "test_cluster.py::test_a_loss_that_is_not_finite_is_one_error"
# `module.function`, error → the test or the case that reaches it through another function
ELSEWHERE: dict[tuple[str, str], str | Hostile] = {
    ("api.train", "JobError"): NO_JOB,
    ("api.train", "DataError"): REFUSED,
    ("api.train", "TrainError"): NOT_FINITE,
    ("api.train", "RaydeepError"): "test_cli.py::test_a_run_is_not_resumed_on_other_data",
    ("api.search", "JobError"): NO_JOB,
    ("api.search", "ModelError"): Hostile("artifacts", "the spec of another network"),
    ("api.search", "TrainError"): NOT_FINITE,
    ("api.search", "RaydeepError"): "test_cluster.py::test_a_search_is_not_overwritten_by_train",
    ("compress.codecs.Stream.code", "ArtifactError"):
        "hostile/test_pack_fuzz.py::test_mutated_files_are_refused_or_whole_models",
    ("compress.masks.scores_of", "JobError"): "test_own.py::test_a_score_that_ranks_nothing_is_refused",
    ("compress.plan.check", "JobError"): "test_own.py::test_a_score_that_ranks_nothing_is_refused",
    ("data.custom.custom", "DataError"): "test_own.py::test_a_source_that_gives_no_pictures_is_refused",
    ("data.sharding.write_shard", "DataError"):
        "test_streamed.py::test_pictures_of_many_sizes_cannot_be_stored_as_pixels",
    ("data.streamed.Streamed.read", "DataError"): "test_streamed.py::test_a_shard_that_was_replaced_is_noticed",
    ("deploy.loading.save", "ExportError"): "test_deploy.py::test_a_network_without_onnx_form_is_refused_by_name",
    ("deploy.batch.predict_source", "DataError"): PREDICTED,
    ("deploy.batch.predict_source", "ModelError"): Hostile("artifacts", "fewer classes than outputs"),
    ("deploy.predict.Model.run", "ArtifactError"): Hostile("artifacts", "model.onnx of random bytes"),
    ("ops.gallery.write", "OSError"): "test_gallery.py::test_a_run_does_not_fail_of_a_picture",
    ("ops.predicting.predict", "JobError"): "test_predict.py::test_arguments_are_checked_before_anything_is_read",
    ("ops.predicting.predict", "ModelError"): "test_predict.py::test_a_folder_that_is_no_model_is_refused",
    ("ops.predicting.predict", "DataError"): PREDICTED,
    ("ops.predicting.predict", "ResourceError"): "test_documented_errors.py::test_a_function_raises_what_it_documents",
    ("model.artifact.predict", "ModelError"):
        "test_cluster_search.py::test_a_search_ends_with_the_others_and_says_what_happened",
    ("ops.searching.search", "RaydeepError"):
        "test_documented_errors.py::test_a_search_that_ray_ended_early_is_no_search",
    ("ops.searching.search", "KeyboardInterrupt"):
        "test_documented_errors.py::test_a_search_that_ray_ended_early_is_no_search",
    ("run.Run.front", "RaydeepError"): "test_own.py::test_a_run_tells_its_front_or_that_it_has_none",
    ("train.launch.train", "RaydeepError"): "test_cluster_faults.py::test_a_worker_that_raises_is_told_first",
    ("train.losses.of", "JobError"): "test_own.py::test_a_loss_that_can_not_be_trained_with_is_refused",
    ("train.loop.fit", "SystemExit"):
        "test_loop.py::test_a_worker_told_to_leave_at_an_epochs_last_step_leaves_its_checkpoint",
}  # fmt: skip


def by_name(function: str, error: str) -> bool:
    """Whether a `with raises(` block has the function's name and expects the error."""
    name = function.rpartition(".")[2]
    own = function.split(".")[-2]
    return any(
        name in names and expected & kinds(error) and (name not in COMMON or own in names) for names, expected in BLOCKS
    )


@pytest.mark.parametrize(("function", "error"), documented(), ids=str)
def test_every_documented_error_is_raised_in_a_test(function, error):
    where = ELSEWHERE.get((function, error))
    if isinstance(where, Hostile):
        assert where in {(case.group, case.name) for case in CASES}
    elif where is not None:
        assert where in FUNCTIONS
    else:
        assert (function, error) in DIRECT or by_name(function, error), "no test of this error: add one to DIRECT"


def test_the_tables_hold_what_is_documented():
    assert {*DIRECT, *ELSEWHERE} <= {*documented()}


@pytest.mark.parametrize(("function", "error"), DIRECT, ids=str)
def test_a_function_raises_what_it_documents(function, error, tmp_path):
    with pytest.raises(getattr(errors, error, OSError)) as told:
        DIRECT[function, error](tmp_path)
    assert len(str(told.value)) > 20


def test_reading_through_ray_says_what_a_task_found_and_when_no_cpu_is_free(monkeypatch):
    from raydeep.data import stream

    class Ray:
        found: Any = None

        def wait(self, refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
            return (refs, []) if self.found else ([], refs)

        def get(self, ref: Any) -> Any:
            return self.found

        def available_resources(self) -> dict[str, float]:
            return {"CPU": 0.0}

        cluster_resources = available_resources

    ray = Ray()
    monkeypatch.setattr(stream, "ray", ray)
    monkeypatch.setattr(stream, "_fetch", SimpleNamespace(remote=lambda unit, form: 0))
    with pytest.raises(errors.ResourceError, match=r"no pictures were decoded for .* of 0 CPUs 0 are free"):
        next(stream.engine([[]], None, 1))  # type: ignore[list-item, arg-type]
    ray.found = errors.DataError("a shard is missing")
    with pytest.raises(errors.DataError, match="a shard is missing"):
        next(stream.engine([[]], None, 1))  # type: ignore[list-item, arg-type]


def test_no_run_is_stored_where_ray_removes_it(tmp_path, monkeypatch):
    from raydeep.config import Job
    from raydeep.run import storage_folder

    monkeypatch.delenv("RAYDEEP_STORAGE", raising=False)
    (tmp_path / "_ray_pkg_1").mkdir()
    monkeypatch.chdir(tmp_path / "_ray_pkg_1")
    with pytest.raises(errors.RaydeepError, match="which Ray removes after the job; set storage=/FOLDER"):
        storage_folder(Job())


def test_a_run_that_is_not_in_its_bucket_is_named(bucket):
    from raydeep import mirror
    from raydeep.run import fetch_light

    with pytest.raises(errors.RaydeepError, match=rf"{bucket}/gone: not a run \(no job.yaml\)"):
        fetch_light(mirror.place(f"{bucket}/gone"))


@pytest.mark.parametrize(("ended", "error"), [([], errors.RaydeepError), ([{"trial": 0}], KeyboardInterrupt)])
def test_a_search_that_ray_ended_early_is_no_search(monkeypatch, job, tmp_path, ended, error):
    """`search` with nothing behind it: no trial has run, or Ray Tune has ended quietly on Ctrl-C."""
    from contextlib import nullcontext

    from raydeep.compress import common
    from raydeep.ops import searching
    from raydeep.search import engine, ledger, tune

    record = SimpleNamespace(path=tmp_path / "ledger.jsonl", done=lambda: ended, failed=list)
    stage = nullcontext(SimpleNamespace(text=""))
    monkeypatch.setattr(ledger, "Ledger", lambda path, facts: record)
    monkeypatch.setattr(engine, "Engine", lambda *parts: SimpleNamespace(stopped=None, finished=False))
    monkeypatch.setattr(common, "Common", lambda *parts: SimpleNamespace(prepare=lambda job: None, sent=dict))
    monkeypatch.setattr(tune, "callbacks", lambda *parts: [])
    monkeypatch.setattr(tune, "run_trials", lambda *parts: None)
    monkeypatch.setattr(searching, "measures", lambda *parts: {})
    (tmp_path / "model.safetensors").write_bytes(b"")
    run = SimpleNamespace(path=tmp_path, name="x", model=lambda label: tmp_path, note=lambda **facts: None)
    with pytest.raises(error):
        searching.search(job, run, None, None, None, "", 1, SimpleNamespace(stage=lambda name: stage))  # type: ignore[arg-type]
