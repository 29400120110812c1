"""The command line, in this process: what a user can mend is one message and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from raydeep import __version__, cli
from raydeep.config import Job, load_job
from raydeep.data.guess import source_of
from raydeep.errors import JobError
from raydeep.run import Run
from raydeep.train import launch

COMMANDS = (
    "train", "compress", "search", "shard", "export", "report", "predict", "preview", "data", "schema", "doctor",
    "runs", "show", "submit",
)  # fmt: skip


class Said(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Raydeep = Callable[..., Said]


@pytest.fixture
def raydeep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Raydeep:
    """Runs a command in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))  # main puts the current folder there
    monkeypatch.setitem(sys.modules, "ray", None)  # nothing here may come as far as starting it

    def run(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["raydeep", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def train(raydeep, tmp_path, job, digits_manifest) -> Raydeep:
    """`raydeep train` of a tiny job whose digits are sharded already, with `--set` values."""
    tree = job.model_dump(mode="json")
    tree["data"]["path"] = str(digits_manifest.path)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))

    def run(*sets: str) -> Said:
        return raydeep("train", "job.yaml", *(part for value in sets for part in ("--set", value)))

    return run


def refusal(said: Said) -> str:
    """The message of a command that was refused in good order."""
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert said.err.count("error:") == 1
    assert "Traceback" not in said.out + said.err
    return said.err.removeprefix("error: ").rstrip("\n")


def runs(folder: Path) -> list[str]:
    """Run folders in the storage of the tiny job."""
    return [path.name for path in (folder / "runs").glob("*") if path.name != "datasets"]


@pytest.mark.parametrize(
    ("sets", "parts"),
    [
        (["train.epoch=3"], ["job.yaml: train.epoch is not a key of a job; did you mean train.epochs?"]),
        (["quantize.weight_bits=33"], ["quantize.weight_bits: found 33, expected a whole number of bits from 2 to 8"]),
        (["prune.sparsity=1.0"], ["prune.sparsity: found 1.0, expected less than 1"]),
        (["train.batch_size=4096"], ["train.batch_size 4096 is larger than the train split of 1,439 rows; lower it"]),
        (["recover.batch_size=4096"], ["recover.batch_size 4096 is larger than the train split of 1,439 rows"]),
        (["data.limit_per_class=3"], ["train.batch_size 64 is larger than the train split of 30 rows"]),
        (
            ["data.image_size=512", "data.memory_bytes=1048576", "data.cache=resident"],
            ["more than data.memory_bytes 1,048,576; raise it"],
        ),
        (["data.path=gone", "data.source=folder"], ["data.path: gone is not a folder", "--set data.path=FOLDER"]),
        (["model.name=resnet21"], ["model.name 'resnet21' is unknown; did you mean", "resnet20"]),
        (["model.name=own:net"], ["model.name own:net: can't import own"]),
        (["model.args={height: 3}"], ["model.name seed: its factory failed", "check model.args"]),
        (["model.name=lenet5", "model.args={}"], ["model.name lenet5 needs pictures of 16×16 or more, found 8×8"]),
        (["storage=job.yaml"], ["storage: can't make", "set storage=FOLDER"]),
        (["storage=job.yaml", "data.path=null"], ["storage: can't make", "set storage=FOLDER"]),
    ],
    ids=lambda value: " ".join(value) if value and "=" in value[0] else "",
)
def test_a_job_that_cannot_run_is_refused_before_a_run_folder_is_made(train, tmp_path, sets, parts):
    message = refusal(train(*sets))
    for part in parts:
        assert part in message
    assert runs(tmp_path) == []


def test_more_workers_than_cores_are_refused_before_a_run_folder_is_made(train, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "usable_cores", lambda: 2)
    message = refusal(train("scaling.workers=4"))
    assert message.startswith("scaling.workers 4 × cpus_per_worker 1 = 4 CPUs, but this machine has 2")
    assert message.endswith("(workers: at most 2)")
    assert runs(tmp_path) == []


def test_a_folder_with_a_torn_picture_is_refused_by_its_name(train, tmp_path, write_pictures):
    photos = write_pictures(tmp_path / "photos", {"cat": 10, "dog": 10})
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    torn = photos / "cat" / "torn.jpg"
    Image.fromarray(pixels).save(torn)
    torn.write_bytes(torn.read_bytes()[:2000])
    message = refusal(train("data.source=folder", "data.path=photos"))
    assert message.startswith("1 of 21 pictures can't be read (4.8%, allowed 1.0%): cat/torn.jpg: can't be decoded")
    listed = Path(message.split("All are listed in ")[1].split(";")[0])
    assert json.loads(listed.read_text())["origin"] == "cat/torn.jpg"
    assert runs(tmp_path) == []


def test_a_job_file_that_is_missing_is_named(raydeep):
    assert refusal(raydeep("search", "gone.yaml")) == "gone.yaml: no such job file"


@pytest.mark.parametrize("command", ["train", "compress", "search"])
def test_a_stage_needs_a_job_or_a_run(raydeep, tmp_path, command):
    assert refusal(raydeep(command)) == f"raydeep {command} needs a job file, or --resume RUN"


@pytest.mark.parametrize("how", ["set", "file"])
def test_a_changed_job_does_not_resume_a_run(raydeep, job, tmp_path, how):
    run = Run.create(job, "raydeep train")
    before = (run.path / "job.yaml").read_text()
    if how == "set":
        given = ["--set", "train.lr=0.7", "--set", "scaling.workers=2"]
    else:
        given = [str(tmp_path / "job.yaml")]
        changed = job.with_values({"train.lr": 0.7, "scaling.workers": 2}).model_copy(update={"search": job.search})
        Path(given[0]).write_text(yaml.safe_dump(changed.model_dump(mode="json")))
    message = refusal(raydeep("train", *given, "--resume", run.path))
    assert message.startswith(f"{run.path}: began with another job: train.lr was {job.train.lr}, now 0.7; ")
    assert "scaling.workers was 1, now 2" in message
    assert "--force" in message
    assert (run.path / "job.yaml").read_text() == before


def test_a_run_goes_on_with_a_changed_job_by_force_only(job):
    run = Run.create(job, "raydeep train")
    changed = job.model_copy(update={"train": job.train.model_copy(update={"lr": 0.7}), "storage": "elsewhere"})
    with pytest.raises(JobError, match=r"train\.lr was"):
        run.take(changed)
    (run.path / "front.json").write_text("{}")
    again = Run.open(run.path)
    again.take(again.job, force=True)
    assert (run.path / "front.json").exists()  # nothing has changed
    run.take(changed, force=True)
    assert not (run.path / "front.json").exists()  # it was of the job before
    again = Run.open(run.path)
    assert (again.job.train.lr, again.job.storage) == (0.7, job.storage)
    [noted] = json.loads((run.path / "provenance.json").read_text())["changed_jobs"]
    assert noted == [f"train.lr was {job.train.lr}, now 0.7"]
    again.take(again.job)  # its own job needs no force


def test_a_run_is_not_resumed_on_other_data(raydeep, job, digits_manifest):
    given = job.model_copy(update={"data": job.data.model_copy(update={"path": str(digits_manifest.path)})})
    run = Run.create(given, "raydeep train")
    run.note(dataset={"hash": "0" * 64})
    message = refusal(raydeep("train", "--resume", run.path))
    assert f"{digits_manifest.path}: not the data that {run.path} began with" in message
    assert "start a new run" in message
    assert json.loads((run.path / "provenance.json").read_text())["dataset"] == {"hash": "0" * 64}


@pytest.mark.parametrize("arguments", [["train", "--resume"], ["export", "--trial", "0"], ["report"]])
def test_a_folder_that_is_no_run_is_named(raydeep, tmp_path, arguments):
    message = refusal(raydeep(*arguments, tmp_path))
    assert message.startswith(str(tmp_path))
    assert "not a run folder" in message


def test_predict_needs_a_model_folder(raydeep, tmp_path):
    message = refusal(raydeep("predict", tmp_path, "picture.png"))
    assert message == f"{tmp_path}: not a model folder (no spec.json), nor a finished run; see RUN/models/"


def test_predict_tells_the_model_that_a_run_stands_for_and_checks_it_once(raydeep, small_run, tmp_path, monkeypatch):
    from raydeep.deploy import folder

    checked, real = [], folder.check_sums
    monkeypatch.setattr(folder, "check_sums", lambda path, *read: (checked.append(path), real(path, *read)))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    said = raydeep("predict", small_run, "a.png")
    assert (said.code, said.out.split("\t")[0]) == (0, "a.png")
    assert said.err == f"model      {small_run / 'models' / 't000'}\n"
    assert checked == [small_run / "models" / "t000"]
    assert raydeep("predict", small_run / "models" / "t000", "a.png").err == ""
    message = refusal(raydeep("predict", small_run, "a.png", "--split", "dev"))
    assert message == "split 'dev': expected train, val, test; leave it out for all pictures"


def test_a_user_who_stops_a_command_is_told_how_to_go_on(raydeep, train, monkeypatch):
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("raydeep.ops.datasets.prepare", stop)
    said = train()
    assert said.code == 130
    assert said.err.endswith("stopped; no run was begun\n")
    run = Run.create(load_job(Path("job.yaml")), "raydeep train job.yaml").path
    said = raydeep("train", "--resume", run)
    assert said.err.endswith(f"stopped; go on: raydeep train --resume {run}\n")


def test_a_user_who_stops_a_run_is_told_what_goes_on_with_it(train, monkeypatch, tmp_path):
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    from raydeep.train import cluster

    monkeypatch.setattr(cluster, "cluster", stop)
    said = train()
    assert said.code == 130
    [run] = (tmp_path / "runs").iterdir()
    assert said.err.endswith(f"stopped; go on: raydeep train --resume {run}\n")


def test_shard_writes_a_dataset_once(raydeep, tmp_path):
    first = raydeep("shard", "digits", "out", "--set", "data.val_fraction=0.2")
    assert first.code == 0
    assert "1,259 train, 359 val, 179 test, 10 classes, 0 in quarantine" in first.out
    facts = (tmp_path / "out" / "dataset.json").read_bytes()
    assert refusal(raydeep("shard", "digits", "out")) == "out: exists and is not empty; name a new folder or remove it"
    assert (tmp_path / "out" / "dataset.json").read_bytes() == facts


def test_shard_takes_a_folder_of_class_folders(raydeep, tmp_path, write_pictures):
    write_pictures(tmp_path / "photos", {"cat": 10, "dog": 10})
    said = raydeep("shard", "photos", "out")
    assert (said.code, said.err) == (0, "")
    assert "16 train, 2 val, 2 test, 2 classes" in said.out


def test_shard_into_a_place_that_cannot_be_is_refused(raydeep, tmp_path):
    (tmp_path / "file").touch()
    assert "file" in refusal(raydeep("shard", "digits", "file/out"))


def test_shard_of_something_that_is_not_there_is_refused(raydeep, tmp_path):
    assert refusal(raydeep("shard", "gone", "out")).startswith("data.path: gone is not a folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "source"),
    [
        (["cat/1.png", "dog/1.png"], "folder"),
        (["train-0.parquet", "classes.json"], "parquet"),
        (["1.png", "labels.csv"], "images"),
        (["1.png", "labels.parquet"], "images"),
        (["labels.jsonl", "pictures/1.png"], "images"),
        (["train-0.tar"], "webdataset"),
    ],
)
def test_shard_guesses_what_a_folder_holds(tmp_path, files, source):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert source_of(str(tmp_path)) == {"source": source, "path": str(tmp_path)}
    assert source_of("torchvision:FakeData") == {"source": "torchvision:FakeData"}


def test_shard_can_store_pixels_at_another_size(raydeep, tmp_path, write_pictures):
    write_pictures(tmp_path / "photos", {"cat": 10, "dog": 10}, size=(30, 20))
    said = raydeep("shard", "photos", "out", "--resize", "12", "--store", "decoded")
    assert (said.code, said.err) == (0, "")
    facts = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (facts["store"], facts["size_range"], facts["mode"]) == ("decoded", [12, 12, 12, 12], "rgb")
    assert "expected 'encoded' or 'decoded'" in refusal(raydeep("shard", "photos", "other", "--store", "zip"))


def test_data_info_shows_counts_and_balance(raydeep, digits_manifest):
    said = raydeep("data", "info", digits_manifest.path)
    assert (said.code, said.err) == (0, "")
    assert digits_manifest.hash in said.out
    assert "pictures   1,797, 8×8 pixels, grey, stored encoded" in said.out
    counts = digits_manifest.splits["train"]["class_counts"]
    row = next(line for line in said.out.splitlines() if line.startswith("3 "))
    assert row.split()[1] == str(counts[3])
    assert json.loads(raydeep("data", "info", digits_manifest.path, "--json").out)["rows"] == 1797


def test_data_verify_says_that_all_is_well_or_what_is_not(raydeep, tmp_path, write_pictures):
    write_pictures(tmp_path / "photos", {"cat": 10, "dog": 10})
    assert raydeep("shard", "photos", "out").code == 0
    said = raydeep("data", "verify", "out")
    assert (said.code, said.err) == (0, "")
    assert "0 problems, 0 pairs" in said.out
    file = tmp_path / "out" / "val-00000.parquet"
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)
    said = raydeep("data", "verify", "out")
    assert said.code == 2
    assert f"error: {file.relative_to(tmp_path)}: its sha256 is not that of dataset.json" in said.out
    found = json.loads(raydeep("data", "verify", "out", "--json").out)
    assert found["problems"]


@pytest.mark.parametrize("command", ["info", "verify"])
def test_data_needs_a_dataset_folder(raydeep, tmp_path, command):
    message = refusal(raydeep("data", command, tmp_path))
    wanted = "not a dataset (it has no dataset.json); make one with: raydeep shard SOURCE OUT"
    assert message == f"{tmp_path}: {wanted}"
    assert "no such folder" in refusal(raydeep("data", command, tmp_path / "gone"))


def test_preview_draws_pictures_of_train(raydeep, tmp_path, job, digits_manifest):
    tree = job.model_dump(mode="json")
    tree["data"]["path"] = str(digits_manifest.path)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    said = raydeep("preview", "job.yaml", "--out", "sheet.png", "--rows", "3", "--set", "augment.rotation=30")
    assert (said.code, said.err) == (0, "")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width > 7 * 100
    assert len(np.unique(np.asarray(sheet))) > 20
    assert runs(tmp_path) == []


def test_download_is_a_flag(raydeep, tmp_path):
    message = refusal(raydeep("shard", "torchvision:MNIST", "out", "--set", f"data.path={tmp_path}"))
    assert "--download" in message
    assert not (tmp_path / "out").exists()


def test_schema_prints_the_schema_of_a_job(raydeep):
    said = raydeep("schema")
    assert said.code == 0
    assert json.loads(said.out) == Job.model_json_schema()


def test_version(raydeep):
    assert raydeep("--version") == Said(0, f"raydeep {__version__}\n", "")


def test_each_command_is_told_in_one_whole_line(raydeep, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = raydeep("--help").out.split("Commands:")[1].strip().splitlines()
    assert len(shown) >= 14
    assert [line for line in shown if "..." in line or not line.endswith(".")] == []


@pytest.mark.parametrize("arguments", [["--help"], ["search", "--help"]])
def test_help_is_quick_because_it_imports_neither_torch_nor_ray(arguments):
    code = (
        "import sys\nfrom raydeep.cli import main\n"
        f"sys.argv = {['raydeep', *arguments]!r}\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'ray', 'kornia', 'numpy'} & sys.modules.keys()), file=sys.stderr)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stderr == "0 []\n"
    assert "Usage:" in said.stdout
    if arguments == ["--help"]:
        assert all(f"\n  {command} " in said.stdout for command in COMMANDS)
