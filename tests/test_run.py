"""The run folder's files, whole or absent; and sizing, which refuses with numbers."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from raydeep import disk
from raydeep.config import Job
from raydeep.errors import RaydeepError, ResourceError
from raydeep.run import Run, locate
from raydeep.train import sizing
from raydeep.tuning import Search


def write_half(path: Path) -> None:
    with disk.atomic(path) as aside:
        aside.write_bytes(b"half")
        raise ZeroDivisionError


def test_an_atomic_file_appears_under_its_name_alone(tmp_path):
    target = tmp_path / "deep" / "file.json"
    with disk.atomic(target) as aside:
        aside.write_bytes(b"new")
        assert not target.exists()
        assert aside.parent == target.parent
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["file.json"]


def test_an_exception_leaves_neither_the_file_nor_what_was_beside_it(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_half(tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_an_exception_leaves_the_old_file_as_it_was(tmp_path):
    disk.write_bytes(tmp_path / "file", b"old")
    with pytest.raises(ZeroDivisionError):
        write_half(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_json_comes_back(tmp_path):
    value = {"a": [1, 2.5, None, "é"]}
    disk.write_json(tmp_path / "x.json", value)
    assert disk.read_json(tmp_path / "x.json") == value


def test_missing_and_broken_json_is_named(tmp_path):
    with pytest.raises(RaydeepError, match=r"x\.json: no such file"):
        disk.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(RaydeepError, match=r"x\.json: not valid JSON"):
        disk.read_json(tmp_path / "x.json")


def test_lines_come_back_in_order(tmp_path):
    rows = [{"trial": i} for i in range(3)]
    for row in rows:
        disk.append_line(tmp_path / "log.jsonl", row)
    assert disk.read_lines(tmp_path / "log.jsonl") == rows


def test_a_torn_last_line_is_left_out_and_the_next_one_is_whole(tmp_path):
    log = tmp_path / "log.jsonl"
    disk.append_line(log, {"trial": 0})
    with log.open("a") as file:
        file.write('{"trial": 1, "acc')
    assert disk.read_lines(log) == [{"trial": 0}]
    disk.append_line(log, {"trial": 2})
    assert disk.read_lines(log) == [{"trial": 0}, {"trial": 2}]


def test_lines_that_are_no_objects_or_no_text_are_left_out(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'12\n\xff\xfe\n{"trial": 3}\n[1]\n')
    assert disk.read_lines(log) == [{"trial": 3}]


def test_a_missing_log_has_no_lines(tmp_path):
    assert disk.read_lines(tmp_path / "log.jsonl") == []


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert disk.sha256_file(tmp_path / "file") == expected


def test_a_created_run_opens_with_the_same_job(job: Job):
    made = Run.create(job, "raydeep train job.yaml")
    assert made.path.parent == Path(job.storage)
    assert re.fullmatch(rf"{job.name}-\d{{4}}-\d{{6}}-[0-9a-f]{{4}}", made.path.name)
    opened = Run.open(made.path)
    assert opened.job == job
    assert opened.path == made.path
    assert opened.model("t003") == made.path / "models" / "t003"


def test_the_job_of_a_run_is_resolved(job: Job):
    made = Run.create(job, "raydeep train job.yaml")
    tree = yaml.safe_load((made.path / "job.yaml").read_text())
    assert tree["train"]["momentum"] == job.train.momentum  # a default, written out
    assert tree["model"]["args"] == {"width": 8}


def test_two_runs_of_a_job_do_not_share_a_folder(job: Job):
    assert Run.create(job, "").path != Run.create(job, "").path


def test_provenance_names_command_versions_hardware_and_seed(job: Job):
    made = Run.create(job.model_copy(update={"seed": 7}), "raydeep train job.yaml")
    facts = json.loads((made.path / "provenance.json").read_text())
    assert (facts["id"], facts["command"], facts["seed"]) == (made.path.name, "raydeep train job.yaml", 7)
    assert {"python", "torch", "ray", "numpy", "onnxruntime"} <= facts["versions"].keys()
    assert facts["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert facts["hardware"]["memory_bytes"] > 2**28
    assert facts["hardware"]["cpu"]


def test_notes_are_added_to_the_provenance(job: Job):
    made = Run.create(job, "raydeep train job.yaml")
    made.note(dataset={"rows": 3})
    facts = disk.read_json(made.path / "provenance.json")
    assert facts["dataset"] == {"rows": 3}
    assert facts["command"] == "raydeep train job.yaml"


def test_a_run_is_found_by_its_name_where_jobs_keep_theirs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Run.create(Job(name="a"), "raydeep train job.yaml")
    assert Run.open(made.path.name).path == made.path
    assert locate(f"{made.path.name}/models/t000") == made.path / "models" / "t000"
    assert locate(f"{made.path.name}/../x") == Path(f"{made.path.name}/../x")
    assert locate("other/models") == Path("other/models")
    here = tmp_path / made.path.name  # what is there as it is written comes first
    here.mkdir()
    assert locate(here.name) == Path(here.name)
    with pytest.raises(RaydeepError, match="not a run folder"):
        Run.open(here.name)
    with pytest.raises(RaydeepError, match="MODEL: a\0b: no path has a NUL in it"):
        locate("a\0b", "MODEL")


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, name):
    with pytest.raises(RaydeepError, match=r"not a run folder \(no job.yaml\)"):
        Run.open(tmp_path / name)


def test_storage_that_can_not_be_made_is_refused(tmp_path, job: Job):
    (tmp_path / "file").write_text("")
    with pytest.raises(RaydeepError, match=r"storage: can't make .*; set storage=FOLDER"):
        Run.create(job.model_copy(update={"storage": str(tmp_path / "file")}), "")


def test_a_plan_leaves_cpus_for_data_tasks():
    assert sizing.plan(4, 2, 1, Search()) == sizing.Plan(num_cpus=6, concurrent_trials=4)
    assert sizing.plan(4, 2, 1, Search(concurrent=3)).concurrent_trials == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"cores": 2, "workers": 4, "cpus_per_worker": 1, "search": Search()},
            r"workers 4 × cpus_per_worker 1 = 4 CPUs, but this machine has 2; .*\(workers: at most 2\)",
        ),
        (
            {"cores": 4, "workers": 3, "cpus_per_worker": 1.5, "search": Search(), "where": "the cluster"},
            r"= 4.5 CPUs, but the cluster has 4; .*\(workers: at most 2\)",
        ),
        (
            {"cores": 8, "workers": 2, "cpus_per_worker": 1, "search": Search(), "use_gpu": True, "gpus": 1},
            "scaling.workers 2 needs 2 GPUs, but this machine has 1",
        ),
        (
            {"cores": 8, "workers": 1, "cpus_per_worker": 1, "search": Search(), "use_gpu": True},
            "needs 1 GPUs, but this machine has 0",
        ),
        (
            {"cores": 2, "workers": 1, "cpus_per_worker": 1, "search": Search(concurrent=3)},
            "search.concurrent 3: this machine has 2 CPUs, room for 2 trials of search.cpus_per_trial 1; lower it",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_its_numbers(arguments, message):
    with pytest.raises(ResourceError, match=message):
        sizing.plan(**arguments)


def test_a_worker_larger_than_the_machine_gets_no_advice_on_workers():
    with pytest.raises(ResourceError, match=r"= 3 CPUs, but this machine has 2; lower one of them$"):
        sizing.plan(2, 1, 3, Search())


@pytest.mark.parametrize(("cores", "workers", "cpus"), [(8, 4, 2), (1, 2, 0.5), (55, 50, 1.1)])
def test_a_plan_that_takes_all_cpus_is_accepted(cores, workers, cpus):
    assert sizing.plan(cores, workers, cpus, Search(concurrent=cores)).num_cpus == cores + sizing.SPARE_CPUS


def test_gpus_are_asked_for_only_if_used():
    assert sizing.plan(4, 2, 1, Search(), gpus=0, use_gpu=False).concurrent_trials == 4
    assert sizing.plan(4, 2, 1, Search(concurrent=2), gpus=2, use_gpu=True).concurrent_trials == 2


@pytest.mark.parametrize(
    ("search", "room"),
    [
        (Search(cpus_per_trial=0.5), 8),
        (Search(cpus_per_trial=3), 1),
        (Search(gpus_per_trial=0.25), 4),
        (Search(gpus_per_trial=0.25, cpus_per_trial=2), 2),
        (Search(workers_per_trial=2), 1),  # one GPU each, of two
    ],
)
def test_the_room_for_trials_is_that_of_their_share(search, room):
    gpus = 2 if search.workers_per_trial > 1 else 1
    use_gpu = search.gpus_per_trial < 1 or search.workers_per_trial > 1
    assert sizing.plan(4, 1, 1, search, gpus=gpus, use_gpu=use_gpu).concurrent_trials == room


def test_a_trial_without_room_is_refused_with_its_numbers():
    with pytest.raises(ResourceError, match=r"no trial has room: search.cpus_per_trial 8, but this machine has 4 CPUs"):
        sizing.plan(4, 1, 1, Search(cpus_per_trial=8))
    with pytest.raises(ResourceError, match=r"search.workers_per_trial 3, but the cluster has 8 CPUs and 2 GPUs"):
        sizing.plan(8, 1, 1, Search(workers_per_trial=3), gpus=2, use_gpu=True, where="the cluster")


def test_trials_that_take_a_gpu_each_run_at_most_one_a_gpu():
    assert sizing.plan(16, 1, 1, Search(), gpus=2, use_gpu=True).concurrent_trials == 2


def test_a_run_takes_one_process_at_a_time(job) -> None:
    made = Run.create(job, "raydeep train")
    with (
        made.locked(),
        pytest.raises(RaydeepError, match=f"process {os.getpid()} of .* works on this run"),
        Run.open(made.path).locked(),
    ):
        pass
    with made.locked():  # free again
        assert (made.path / ".lock").exists()


def test_a_ray_that_does_not_start_is_one_error(job, tmp_path, monkeypatch):
    import ray

    from raydeep.train import cluster

    def slow(**options: object) -> None:
        raise Exception("The current node timed out during startup.\nmore")

    monkeypatch.setattr(ray, "init", slow)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(ResourceError, match=r"^Ray does not start on this machine: The .* startup\. Is it over"),
        cluster.cluster(job, tmp_path / "ray.log"),
    ):
        raise AssertionError("there is no Ray")
