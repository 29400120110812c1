"""What the pages show is true: each block is run, loaded or listed with its reason, and the site builds.

`sh` blocks are run as they stand, in order, each page in a folder of its own that holds what the pages assume
(`workplace`). What is changed about them stands here, and nothing else is:

- RUN is the run folder that the page's last command printed; at the start of a page, one of a training.
- RUN/models/t012, a model of some front, is RUN/models/dense.
- train, compress and search take QUICK as well: fewer epochs and trials of the same job. In `python` blocks the numbers
  of `train.epochs=…`, `recover.epochs=…` and `search.trials=…` are 1, 1 and 2.
- What trained RUN, `raydeep train jobs/digits.yaml`, is run once for all pages.
- A command that NOT_RUN names is left out; that its options and keys exist is checked by tests/test_architecture.py.

`python` blocks are run with the arguments RUN/models/dense and a file of pictures. `yaml` blocks are loaded, their
networks built and their recipes checked. `csv` is a table that `raydeep shard` reads. `text` is what a command says.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from raylets import Raylets

from raydeep import __version__
from raydeep.config import Job, parse_job, valid_keys
from raydeep.fields import Section

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_RAY = ["docs/index.md", "docs/data.md", "docs/clusters.md", "CONTRIBUTING.md"]
ON_RAY = [*(f"docs/{name}.md" for name in ("training", "compression", "search", "artifacts", "python")), "README.md"]
PAGES = [*WITHOUT_RAY, *ON_RAY]
KINDS = {"sh", "python", "yaml", "csv", "text"}
TRAINING = "raydeep train jobs/digits.yaml"
QUICK = [
    "train.epochs=2", "recover.epochs=1", "search.trials=2", "scaling.workers=1", "export.latency_rounds=3",
    "export.batch_sizes=[1]",
]  # fmt: skip
NOT_RUN = {
    r"^make ": "starts what this is a part of, or downloads packages; .ci/run does the same",
    r"^python3 -m venv|^\.venv/bin/pip|^\. \.venv": "downloads packages; .ci/run does the same from a clean checkout",
    r"^\.venv/bin/python -m pytest": "these tests",
    r"^raydeep search jobs/digits\.yaml$": "the whole demo: tests/test_cluster.py; docs/search.md runs it from a RUN",
    r"--resume ": "a run that was killed: tests/test_cluster.py, tests/test_cluster_faults.py",
    r"^raydeep (train|search|compress) jobs/(photos|fashion_mnist)": "minutes an epoch on two cores",
    r"torchvision:": "downloads; tests/test_sources.py reads each of its formats",
    r"s3://": "needs a bucket: tests/test_cluster_storage.py",
    r"^cluster/local\.sh|^\. /tmp/raydeep-|^raydeep submit": "a cluster of its own: tests/test_cluster_jobs.py",
    r"--address HOST": "a cluster of several nodes: tests/test_cluster_doctor.py",
}


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return re.findall(r"^[ ]*```(\w*)\n(.*?)^[ ]*```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of a block: one a line, comments left out, continued lines joined."""
    found = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in found if line]


def is_run(command: str) -> bool:
    return not any(re.search(pattern, command) for pattern in NOT_RUN)


def modules(page: str) -> dict[str, str]:
    """Python blocks that the text before them says to save as a module: its name → its code."""
    found = re.findall(r"`(\w+)\.py`[^`]*\n```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return dict(found)


def pieces(page: str) -> int:
    """Commands and programs of a page that are run."""
    found = blocks(page)
    return sum(kind == "python" for kind, _ in found) + sum(
        is_run(command) for kind, text in found if kind == "sh" for command in commands(text)
    )


def page_id(page: str) -> str:
    return Path(page).stem


# no block escapes


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_is_of_a_kind_that_is_tested(page: str) -> None:
    text = (ROOT / page).read_text()
    assert len(blocks(page)) * 2 == len(re.findall(r"^[ ]*```", text, re.MULTILINE)), "a fence that is not closed"
    assert {kind for kind, _ in blocks(page)} <= KINDS


def test_every_page_is_tested() -> None:
    written = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in PAGES if page.startswith("docs/")} == written


def test_what_is_not_run_is_shown_and_has_its_reason() -> None:
    shown = [line for page in PAGES for kind, text in blocks(page) if kind == "sh" for line in commands(text)]
    unused = [pattern for pattern in NOT_RUN if not any(re.search(pattern, line) for line in shown)]
    assert unused == []
    assert all(NOT_RUN.values())
    assert sum(map(is_run, shown)) >= 15


# a place where they are run


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data in each of the forms that the pages name."""
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("samples"), np.random.default_rng(0)
    rows = []
    for label, name in enumerate(("cat", "dog", "owl")):
        for folder in ("my_photos", "my_table"):
            (root / folder / name).mkdir(parents=True)
        for i in range(24):
            low = rng.integers(0, 256, (5, 6, 3), np.uint8)
            picture = Image.fromarray(low).resize((96, 80), Image.Resampling.BICUBIC)
            out = io.BytesIO()
            picture.save(out, "JPEG")
            for folder in ("my_photos", "my_table"):
                (root / folder / name / f"{i:03d}.jpg").write_bytes(out.getvalue())
            rows.append((out.getvalue(), label, name, f"{name}/{i:03d}.jpg"))
    [header] = [text.splitlines()[0] for kind, text in blocks("docs/data.md") if kind == "csv"]
    with (root / "my_table" / "labels.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, header.split(","), extrasaction="ignore")
        table.writeheader()
        for i, (_, _, name, path) in enumerate(rows):
            split = ("train", "train", "val", "test")[i % 4]
            table.writerow({"image": path, "label": name, "split": split})
    (root / "my_parquet").mkdir()
    pictures, labels, _, _ = zip(*rows, strict=True)
    pq.write_table(pa.table({"image": list(pictures), "label": list(labels)}), root / "my_parquet" / "data.parquet")
    (root / "my_tars").mkdir()
    with tarfile.open(root / "my_tars" / "pictures.tar", "w") as tar:
        for i, (data, label, _, _) in enumerate(rows):
            for suffix, body in (("jpg", data), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    (root / "new_pictures").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (9, 11), np.uint8)).save(root / "new_pictures" / f"{i}.png")
    np.save(root / "pictures.npy", np.zeros((2, 8, 8, 1), np.uint8))
    bin_ = root / "bin"
    bin_.mkdir()
    sets = shlex.join(part for text in QUICK for part in ("--set", text))
    (bin_ / "raydeep").write_text(
        f"#!/bin/sh\ncase $1 in train|compress|search) quick='{sets}';; *) quick=;; esac\n"
        f'exec {shlex.quote(sys.executable)} -m raydeep.cli "$@" $quick\n'
    )
    (bin_ / "raydeep").chmod(0o755)
    return root


def printed(said: str) -> str:
    """The last run folder that a command printed; none: ""."""
    return (re.findall(r"^  run +(\S+)$", said, re.MULTILINE) or [""])[-1]


class Workplace:
    """A folder in which a page's blocks are run, one after another."""

    def __init__(self, path: Path, samples: Path, env: dict[str, str], trained: str = "") -> None:
        for name in ("my_photos", "my_table", "my_parquet", "my_tars", "new_pictures"):
            (path / name).symlink_to(samples / name)
        for name in ("jobs", "cluster"):
            (path / name).symlink_to(ROOT / name)
        paths = os.pathsep.join([str(samples / "bin"), env["PATH"]])
        self.path, self.samples, self.trained = path, samples, trained
        self.run = printed(trained)
        self.env = {**env, "PATH": paths, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}

    def do(self, command: list[str]) -> str:
        done = subprocess.run(
            command, cwd=self.path, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}"
        self.run = printed(done.stdout) or self.run
        return done.stdout

    def sh(self, command: str) -> str:
        if command == TRAINING and self.run:
            return self.trained
        command = command.replace("/models/t012", "/models/dense")
        return self.do(["bash", "-euc", re.sub(r"\bRUN\b", lambda _: self.run, command)])

    def python(self, code: str, number: int) -> str:
        script = self.path / f"block_{number}.py"
        for key, count in (("train.epochs", 1), ("recover.epochs", 1), ("search.trials", 2)):
            code = re.sub(rf'"{key}=\d+"', f'"{key}={count}"', code)
        script.write_text(code)
        return self.do([sys.executable, script.name, f"{self.run}/models/dense", str(self.samples / "pictures.npy")])

    def play(self, page: str) -> list[str]:
        """Run all of a page; what each command and each program said."""
        said = []
        for name, code in modules(page).items():
            (self.path / f"{name}.py").write_text(code)
        for number, (kind, text) in enumerate(blocks(page)):
            if kind == "sh":
                said += [self.sh(command) for command in commands(text) if is_run(command)]
            elif kind == "python":
                said.append(self.python(text, number))
        return said


@pytest.mark.parametrize("page", WITHOUT_RAY, ids=page_id)
def test_pages_whose_commands_need_no_ray(page: str, samples: Path, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    place = Workplace(tmp_path, samples, env)
    assert len(place.play(page)) == pieces(page)
    if page == "docs/data.md":
        for name in ("shards", "table_shards", "parquet_shards", "tar_shards"):
            facts = json.loads((tmp_path / name / "dataset.json").read_text())
            assert sum(split["rows"] for split in facts["splits"].values()) == 72
            assert facts["size_range"] == ([64] * 4 if name == "shards" else [80, 96, 80, 96])
        assert (tmp_path / "preview.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def on_ray(home: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], str]]:
    """The environment of one Ray for all pages, and what a training on it said."""
    raylets = Raylets(home / "ray", tokens=False)
    raylets.env["PYTHONPATH"] = str(ROOT)
    try:
        raylets.start("--num-cpus", "2")
        env = {**raylets.env, "RAY_ADDRESS": raylets.address, "RAYDEEP_STORAGE": str(home / "storage")}
        place = Workplace(tmp_path_factory.mktemp("first"), samples, env)
        yield env, place.sh(TRAINING)
    finally:
        raylets.stop()


@pytest.mark.cluster
@pytest.mark.parametrize("page", ON_RAY, ids=page_id)
def test_pages_whose_commands_need_ray(
    page: str, on_ray: tuple[dict[str, str], str], samples: Path, tmp_path: Path
) -> None:
    place = Workplace(tmp_path, samples, *on_ray)
    assert len(place.play(page)) == pieces(page)
    if page in ("docs/artifacts.md", "docs/search.md"):  # a run of a training, one of a search
        assert undocumented(Path(place.run)) == set()
    if page == "docs/artifacts.md":
        columns = pq.read_schema(tmp_path / "predictions.parquet").names
        assert [name for name in columns if f"`{name}`" not in (ROOT / page).read_text()] == []


def undocumented(run: Path) -> set[str]:
    """Files of a run and keys in them that docs/artifacts.md does not name."""
    text = (ROOT / "docs" / "artifacts.md").read_text()
    words = set(re.findall(r"[\w.]+", " ".join(re.findall(r"`([^`\n]+)`", text))))
    found = {path.name for path in run.iterdir()} | {path.name for path in (run / "models" / "dense").iterdir()}
    front = json.loads((run / "front.json").read_text())
    found |= {*front, *front["dense"], *(key for row in front["models"] for key in row)}
    found |= set(json.loads((run / "models" / "dense" / "spec.json").read_text()))
    verified = json.loads((run / "models" / "dense" / "verify.json").read_text())
    found |= {*verified, *(key for row in verified["latency"] for key in row)}
    for name in ("metrics.jsonl", "ledger.jsonl"):
        if (run / name).exists():
            found |= {key for line in (run / name).read_text().splitlines() for key in json.loads(line)}
    dataset = json.loads(
        (Path(json.loads((run / "provenance.json").read_text())["dataset"]["path"]) / "dataset.json").read_text()
    )
    return {name for name in found | set(dataset) if name not in words and not name.startswith(".")}


# jobs


JOBS = [(page, text) for page in PAGES for kind, text in blocks(page) if kind == "yaml"]


@pytest.mark.parametrize(("page", "text"), JOBS, ids=[f"{page_id(page)}-{i}" for i, (page, _) in enumerate(JOBS)])
def test_jobs_that_are_shown_load_and_go_with_their_networks(
    page: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raydeep.compress import plan
    from raydeep.model import artifact

    for name, code in modules(page).items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    job = parse_job(yaml.safe_load(text), page)
    spec = artifact.make_spec(job.model.name, job.model.args, list("0123456789"), (32, 32, 3), [0.5] * 3, [0.2] * 3)
    artifact.build(spec)
    plan.check(job, spec)


# errors


def messages() -> list[str]:
    """Every string of the source, `…` for what is filled in."""
    found = []
    for path in (ROOT / "raydeep").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def errors(page: str) -> list[str]:
    """What stands in a page's table of errors."""
    table = (ROOT / page).read_text().partition("| message | what mends it |")[2].partition("\n\n")[0]
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


def test_errors_that_are_shown_are_those_of_the_source() -> None:
    source = messages()
    shown = [(page, message) for page in PAGES for message in errors(page)]
    assert len(shown) >= 40
    for page, message in shown:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
        assert any(pattern.search(text) for text in source), f"{page}: {message}"


def test_variables_that_are_read_are_documented() -> None:
    source = "".join(path.read_text() for path in (ROOT / "raydeep").rglob("*.py"))
    read = set(re.findall(r"environ(?:\.get\(|\[)\"((?:RAYDEEP|RAY|MLFLOW)_[A-Z_]+)\"", source))
    index = (ROOT / "docs" / "index.md").read_text()
    assert {"RAY_ADDRESS", "RAYDEEP_STORAGE", "RAYDEEP_CACHE"} <= read
    assert {name for name in read if f"`{name}`" not in index} - {
        "RAY_AUTH_MODE",
        "RAY_JOB_CONFIG_JSON_ENV_VAR",
    } == set()


# the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built as `make docs` does."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout
    return out


def test_every_key_stands_in_one_table_with_its_meaning(site: Path) -> None:
    text = "".join(path.read_text() for path in site.rglob("*.html"))
    cell = "<td>(.*?)</td>"
    rows = re.findall(rf'<tr id="([\w.]+)"><td><code>\1</code></td>{cell * 3}</tr>', text)
    sections = {name for name, field in Job.model_fields.items() if is_section(field.annotation)}
    expected = {*valid_keys(), "search.target.constraints", "search.target.stall"} - {*sections, "search.target"}
    found = [key for key, *_ in rows]
    assert sorted(key for key in found if key in expected) == sorted(expected)
    assert set(found) - expected == {"choices", "when", "low", "high", "log", "step", "points"}  # of search.space
    assert [key for key, default, takes, meaning in rows if not (default and takes and meaning)] == []


def is_section(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def test_a_table_says_what_the_model_says(site: Path) -> None:
    text = (site / "training.html").read_text()
    assert (
        '<tr id="train.optimizer"><td><code>train.optimizer</code></td><td><code>sgd</code></td>'
        "<td><code>sgd</code>, <code>adamw</code>, <code>muon</code></td>" in text
    )
    assert "<td>number &gt; 0</td>" in text or "<td>number > 0</td>" in text


def test_the_site_fetches_nothing(site: Path) -> None:
    for path in site.rglob("*.html"):
        tags = re.findall(r"<(?:link|script|img|iframe|source)\b[^>]*>", path.read_text())
        fetched = [tag for tag in tags if re.search(r"(?:href|src)=.?(?:https?:)?//", tag) and "canonical" not in tag]
        assert fetched == [], path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(.?(?:https?:)?//|@import", path.read_text()), path


def test_search_knows_every_page(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    known = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert known == {path.relative_to(site).as_posix() for path in site.rglob("*.html")} - {"404.html"}


# the other files


def test_the_citation_is_of_this_version_and_licence() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= found.keys()  # those that the format demands
    assert found["cff-version"] == "1.2.0"
    assert found["type"] == "software"
    assert found["version"] == __version__
    assert found["license"] == project["license"] == "Apache-2.0"
    assert all(author.get("name") or author.get("family-names") for author in found["authors"])


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License")
    assert [number for number in range(1, 10) if not re.search(rf"^   {number}\. ", text, re.MULTILINE)] == []
    assert "END OF TERMS AND CONDITIONS" in text


def test_contributing_names_the_targets_and_markers_that_there_are() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    markers = [line.partition(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]]
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [name for name in [*markers, *targets] if f"| `{name}` |" not in text] == []
    from test_architecture import ORDER

    assert f"`{' ← '.join(ORDER[1:])}`" in text
