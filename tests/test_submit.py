"""What goes to a cluster with a job, and how a job is followed there: no cluster here, a job server made of threads."""

from __future__ import annotations

import asyncio
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from raydeep.cli import app
from raydeep.errors import JobError, RaydeepError
from raydeep.ops import bundle, submit

ROOT = Path(__file__).parent.parent
JOB = ROOT / "jobs" / "digits.yaml"


# the bundle


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with all that must not travel."""
    root = tmp_path / "project"
    wanted = {"job.yaml": "name: x\n", "nets/__init__.py": "", "nets/mine.py": "def make(): ...\n", "one.py": "x = 1\n"}
    unwanted = [
        ".git/hooks.py", ".venv/lib/a.py", "env/pyvenv.cfg", "env/lib/b.py", "__pycache__/c.py", "node_modules/d.py",
        "photos/cat/1.jpg", "photos/labels.csv", "runs/x-1/provenance.json", "runs/x-1/odd.py",
        "shards/dataset.json", "shards/train-00000.parquet", "shards/odd.py", "models/t0/spec.json", "models/t0/odd.py",
        ".env", ".secret.py", "secrets.yaml", "raydeep/sections.py", "raydeep/cli.py", "big.bin",
    ]  # fmt: skip
    for name, text in {**wanted, **dict.fromkeys(unwanted, "no")}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_bundle_is_the_job_and_python_files(project: Path, tmp_path: Path) -> None:
    packed = bundle.pack(project, project / "job.yaml", tmp_path / "b.zip")
    with zipfile.ZipFile(packed.path) as archive:
        assert sorted(archive.namelist()) == ["job.yaml", "nets/__init__.py", "nets/mine.py", "one.py"]
        assert archive.read("nets/mine.py") == b"def make(): ...\n"
    assert (packed.job, packed.files, packed.bytes) == ("job.yaml", 4, (tmp_path / "b.zip").stat().st_size)


def test_the_same_files_make_the_same_bundle(project: Path, tmp_path: Path) -> None:
    first = bundle.pack(project, project / "job.yaml", tmp_path / "a.zip").path.read_bytes()
    os.utime(project / "one.py", (0, 0))
    assert bundle.pack(project, project / "job.yaml", tmp_path / "b.zip").path.read_bytes() == first


def test_what_is_included_goes_whole(project: Path) -> None:
    found = bundle.files(project, project / "job.yaml", ["photos", "big.bin"])
    assert {"photos/cat/1.jpg", "photos/labels.csv", "big.bin", "one.py"} <= set(found)


def test_a_job_from_elsewhere_stands_at_the_top(project: Path, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("name: y\n")
    packed = bundle.pack(project, tmp_path / "other.yaml", tmp_path / "b.zip")
    assert packed.job == "other.yaml"
    assert "other.yaml" in zipfile.ZipFile(packed.path).namelist()


def test_links_out_of_the_project_do_not_travel(project: Path, tmp_path: Path) -> None:
    (tmp_path / "private.py").write_text("key = 1\n")
    (project / "link.py").symlink_to(tmp_path / "private.py")
    (project / "inner.py").symlink_to(project / "one.py")
    found = bundle.files(project, project / "job.yaml")
    assert "link.py" not in found
    assert found["inner.py"] == project / "one.py"


@pytest.mark.parametrize(
    ("limits", "kind"),
    [
        ({"MAX_BYTES": 50_000}, "larger than"),
        ({"MAX_RAW_BYTES": 50_000}, "larger than"),
        ({"MAX_FILES": 3}, "more than 3"),
    ],
)
def test_a_bundle_that_is_too_large_names_its_largest_files(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], kind: str
) -> None:
    (project / "big.bin").write_bytes(os.urandom(100_000))
    for key, value in limits.items():
        monkeypatch.setattr(bundle, key, value)
    with pytest.raises(RaydeepError, match=kind) as told:
        bundle.pack(project, project / "job.yaml", tmp_path / "b.zip", ["big.bin"])
    assert "MAX_FILES" in limits or "big.bin (0.1 MiB)" in str(told.value)


def test_the_limit_is_what_is_promised() -> None:
    assert bundle.MAX_BYTES == 90 * 2**20


@pytest.mark.parametrize("include", ["nothing", "../private.py", "/etc/passwd"])
def test_only_what_is_in_the_project_can_be_included(project: Path, include: str) -> None:
    with pytest.raises(RaydeepError, match=f"--include {include}: expected a file or folder below"):
        bundle.files(project, project / "job.yaml", [include])


# the job


def test_the_command_of_a_job_survives_a_shell() -> None:
    options = ["--set", "search.space={recover.lr: [0.1, 0.2]}", "--set", "name=$(touch x); 'y'"]
    command = submit.entrypoint("search", "my jobs/a.yaml", options)
    assert shlex.split(command) == ["raydeep", "search", "my jobs/a.yaml", *options]
    assert shlex.split(submit.entrypoint("train", "a.yaml", [], "/opt/venv/bin/python")) == [
        "/opt/venv/bin/python", "-m", "raydeep.cli", "train", "a.yaml",
    ]  # fmt: skip


def test_the_environment_is_that_of_the_file_for_ray_job_submit() -> None:
    assert yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text()) == submit.RUNTIME_ENV


class Client:
    """A job server: its log grows by what `script` says, and connections to it break where it says so."""

    def __init__(self, log: str, breaks: list[int | str], status: str = "SUCCEEDED", code: int | None = 0) -> None:
        self.log, self.breaks, self.end, self.code = log, breaks, status, code
        self.connections = 0
        self.ended = threading.Event()
        self.stopped = False
        self.submitted: dict[str, object] = {}

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        status = self.end if self.ended.is_set() else "RUNNING"
        return SimpleNamespace(
            status=JobStatus(status), driver_exit_code=self.code if self.ended.is_set() else None, message="it is so",
            start_time=1000, end_time=4000, entrypoint="raydeep search", job_id=job_id,
        )  # fmt: skip

    def get_job_logs(self, job_id: str) -> str:
        return self.log

    def stop_job(self, job_id: str) -> bool:
        self.stopped, self.end, self.code = True, "STOPPED", None
        self.ended.set()
        return True

    async def tail_job_logs(self, job_id: str):
        point = self.breaks[self.connections] if self.connections < len(self.breaks) else None
        self.connections += 1
        upto = point if isinstance(point, int) else len(self.log)
        for start in range(0, upto, 7):
            yield self.log[start : min(start + 7, upto)]
            await asyncio.sleep(0)
        if point == "silent":
            self.ended.set()
            await asyncio.sleep(3600)
        if point == "interrupt":
            raise KeyboardInterrupt
        if point is not None:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        self.ended.set()


LOG = "".join(f"line {i}: ✓ ünïcode\n" for i in range(40))


@pytest.mark.parametrize("breaks", [[], [0], [100, 30, 400], [0, 0, 699, "silent"]])
def test_a_log_is_printed_once_whatever_its_connections_do(
    breaks: list[int | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "AGAIN_S", 0.0)
    monkeypatch.setattr(submit, "SILENT_S", 0.1)
    client, out = Client(LOG, breaks), io.StringIO()
    found = submit.Follower(client, "j", out).run()  # type: ignore[arg-type]
    assert out.getvalue() == LOG
    assert client.connections == max(len(breaks), 1) + (bool(breaks) and "silent" not in breaks)
    assert submit.result(found) == 0


def test_lines_that_a_dead_connection_swallowed_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "AGAIN_S", 0.0)
    monkeypatch.setattr(submit, "SILENT_S", 0.1)

    class Swallows(Client):
        async def tail_job_logs(self, job_id: str):
            self.connections += 1
            if self.connections == 1:
                yield self.log[:100]
                await asyncio.sleep(3600)  # neither a line nor an end comes through any more
            yield self.log
            self.ended.set()

    client, out = Swallows(LOG, []), io.StringIO()
    submit.Follower(client, "j", out).run()  # type: ignore[arg-type]
    assert out.getvalue() == LOG
    assert client.connections == 2


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", 137, 137), ("FAILED", None, 1), ("STOPPED", None, 143)],
)
def test_the_exit_code_is_the_jobs_own(status: str, code: int | None, expected: int) -> None:
    client, said = Client("", [], status, code), []
    client.ended.set()
    assert submit.follow(client, "j", said.append, lambda: True) == expected  # type: ignore[arg-type]
    assert f"j {status.lower()} after 3 s, exit code {expected}" in said[0]
    assert ("it is so" in " ".join(said)) == (code is None)  # the log tells the rest


@pytest.mark.parametrize(
    ("answer", "stops"), [(True, True), (False, False), (KeyboardInterrupt, False), (EOFError, False)]
)
def test_ctrl_c_asks_and_detaches_unless_told_to_stop(answer: object, stops: bool) -> None:
    client, said = Client(LOG, ["interrupt"]), []

    def ask() -> bool:
        if isinstance(answer, bool):
            return answer
        raise answer  # type: ignore[misc]

    code = submit.follow(client, "j", said.append, ask)  # type: ignore[arg-type]
    assert client.stopped is stops
    assert code == (143 if stops else None)
    assert ("raydeep submit --logs j" in said[-1]) is not stops


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_log_is_silent_is_heard_at_once(kind: signal.Signals) -> None:
    """In a process of its own, as Python's handlers and asyncio's take turns."""
    script = f"""
import asyncio, os, signal, sys, threading
sys.path.insert(0, {str(Path(__file__).parent)!r})
from raydeep import cli
from raydeep.ops import submit
from test_submit import Client, LOG
class Silent(Client):
    async def tail_job_logs(self, job_id):
        yield LOG[:100]
        threading.Timer(0.3, os.kill, (os.getpid(), {int(kind)})).start()
        await asyncio.sleep(3600)
signal.signal(signal.SIGTERM, cli._terminated)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
code = submit.follow(Silent("", []), "j", print, lambda: False)
print("left" if code is None else code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "left", done.stdout + done.stderr
    assert "raydeep submit --logs j goes back to it" in done.stdout


def test_a_job_that_is_not_there_is_one_error() -> None:
    client = Client("", [])
    client.get_job_info = lambda _: (_ for _ in ()).throw(RuntimeError("Request failed with status code 404: x"))  # type: ignore[method-assign]
    with pytest.raises(RaydeepError, match="nope: the job server knows no such job"):
        submit.details(client, "nope")  # type: ignore[arg-type]


def test_a_job_server_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "AGAIN_S", 0.01)
    client = Client("", [])
    client.get_job_info = lambda _: (_ for _ in ()).throw(ConnectionError("refused"))  # type: ignore[method-assign]
    with pytest.raises(
        RaydeepError, match=r"j: the job server has not answered for 0 s \(refused\).*--logs j goes back"
    ):
        submit.details(client, "j", patience_s=0.05)  # type: ignore[arg-type]


# the door


@pytest.fixture
def server():
    """A job server that answers with the status code it is told; gives its address and the list to set."""
    says = [403]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(says[0])
            self.end_headers()
            self.wfile.write(b'{"ray_version": "2.1.0"}')

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}", says
        http.shutdown()


@pytest.mark.parametrize(
    ("status", "env", "message"),
    [
        (401, {}, "asks for a token, RAY_AUTH_MODE is not set to token; set RAY_AUTH_MODE=token"),
        (403, {"RAY_AUTH_MODE": "token"}, "refuses the token in {home}/token; set"),
        (200, {"RAY_AUTH_MODE": "token"}, "runs Ray 2.1.0, here is"),
        (500, {"RAY_AUTH_MODE": "token"}, "no job server answers there"),
    ],
)
def test_a_job_server_that_refuses_is_one_error(
    server, tmp_path: Path, status: int, env: dict[str, str], message: str
) -> None:
    address, says = server
    says[0] = status
    (tmp_path / "token").write_text("abc-secret-abc")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-m", "raydeep.cli", "submit", str(JOB), "--address", address],
        env={**clean, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), **env}, cwd=tmp_path, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert f"error: {address}: {message.format(home=tmp_path)}" in said
    assert "Traceback" not in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a job file, or one of"),
        ([str(JOB), "--logs", "x"], "needs a job file, or one of"),
        (["--status", "x", "--stop", "x"], "needs a job file, or one of"),
        ([str(JOB), "--stage", "dance"], "--stage dance: expected search, train, compress, doctor"),
        ([str(JOB)], "no cluster named: give --address"),
        ([str(JOB), "--address", "ray://head:10001"], "expected the address of the job server, as http://HOST:8265"),
        ([str(JOB), "--address", "head:6379"], "expected the address of the job server"),
        ([str(JOB), "--address", "http://127.0.0.1:9", "--set", "train.epoch=1"], "did you mean train.epochs"),
        (["missing.yaml", "--address", "http://127.0.0.1:9"], "missing.yaml: no such job file"),
        ([str(JOB), "--address", "http://127.0.0.1:9"], "http://127.0.0.1:9: no job server answers there"),
        ([str(JOB), "--address", "http://127.0.0.1:9", "--stage", "doctor", "--resume", "x"], "takes --set only"),
    ],
)
def test_what_can_not_be_submitted_is_one_error(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["submit", *arguments])
    assert isinstance(done.exception, RaydeepError)
    assert message in re.sub(r"\s+", " ", str(done.exception))


# what an attacker or a bad day brings


@pytest.mark.parametrize("job_id", ["../x", "a/logs", "a?b=c", "a#b", "a b", "x\r\nHost: evil", "", "é" * 300])
def test_an_id_that_none_can_be_is_refused_before_it_is_sent(job_id: str) -> None:
    with pytest.raises(JobError, match="is no id of a job"):
        submit.details(Client("", []), job_id)  # type: ignore[arg-type]


def test_a_job_that_was_followed_is_not_said_to_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that starts again answers 404 at first: that is a lost server."""
    monkeypatch.setattr(submit, "AGAIN_S", 0.0)
    monkeypatch.setattr(submit, "LOST_S", 5.0)
    client, answers = Client(LOG, []), iter([True, False, True])
    whole = client.get_job_info

    def flaky(job_id: str) -> SimpleNamespace:
        if not next(answers, True):
            raise RuntimeError("Request failed with status code 404: no such job")
        return whole(job_id)

    client.get_job_info = flaky  # type: ignore[method-assign]
    out = io.StringIO()
    assert submit.result(submit.Follower(client, "j", out).run()) == 0  # type: ignore[arg-type]
    assert out.getvalue() == LOG


def test_links_in_a_circle_and_pipes_do_not_travel(project: Path) -> None:
    (project / "self.py").symlink_to("self.py")
    (project / "gone.py").symlink_to("nowhere.py")
    os.mkfifo(project / "pipe.py")
    assert {"self.py", "gone.py", "pipe.py"}.isdisjoint(bundle.files(project, project / "job.yaml"))
    for include in ("self.py", "pipe.py"):
        with pytest.raises(RaydeepError, match="--include"):
            bundle.files(project, project / "job.yaml", [include])


def test_a_name_that_is_no_text_is_one_error(project: Path, tmp_path: Path) -> None:
    (project / os.fsdecode(b"bad\xff.py")).write_text("x = 1\n")
    with pytest.raises(RaydeepError, match="rename the file"):
        bundle.pack(project, project / "job.yaml", tmp_path / "b.zip")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("env_vars: [A]", "env_vars: expected NAME"),
        ("env_vars: {AWS_KEY: x, A: 1, B: 2}", 'env_vars: expected NAME: "TEXT" lines, A, B is none'),
        ("- a", "expected KEY: VALUE lines"),
        ("working_dir: .", "working_dir: expected config, env_vars, .*--include"),
        ("pips: [torch]", "pips: expected config, env_vars"),
        ("pip: [torch]", "packages are part of the nodes' environment"),
        ("py_executable: 5", "py_executable: expected a path"),
    ],
)
def test_a_runtime_environment_with_nonsense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "env.yaml").write_text(text)
    with pytest.raises(JobError, match=message):
        submit._environment(tmp_path / "env.yaml")


@pytest.mark.parametrize("address", ["http://me:hunter2@127.0.0.1:9", "me:hunter2@127.0.0.1:9", "ray://hunter2@head"])
def test_a_password_in_an_address_is_not_repeated(address: str) -> None:
    with pytest.raises(RaydeepError) as told:
        submit.connect(address)
    assert "hunter2" not in str(told.value)


def test_a_job_file_that_looks_like_an_option_is_none() -> None:
    assert submit.entrypoint("search", "-x.yaml", []) == "raydeep search ./-x.yaml"


def test_a_folder_that_is_gone_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script = f"cd {tmp_path / 'gone'} && rmdir {tmp_path / 'gone'} && {sys.executable} -m raydeep.cli schema"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the folder that this runs in is gone")
