"""Boundaries that memory would not keep: import order, who may import Ray, and that the README tells the truth."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from raydeep.cli import app
from raydeep.config import load_job, parse_job, valid_keys

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "raydeep").rglob("*.py"))
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
    *sorted(page for page in ROOT.glob("*/README.md") if page.parent.name[0] != "."),
]  # fmt: skip
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))

# A module may import from its own package and from those left of it.
ORDER = [
    "__init__", "errors", "disk", "own", "remote", "safeyaml", "fields", "recipe", "sections", "tuning", "config",
    "machine", "mirror", "lock", "run", "data", "model", "train", "compress", "deploy", "search", "report", "ops",
    "api", "cli_cluster", "cli_predict", "cli_runs", "cli",
]  # fmt: skip
MAX_LINES = 400


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def package(module: str) -> str:
    """`raydeep.data.order` → `data`; `raydeep` itself → `__init__`."""
    return [*module.split("."), "__init__"][1]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a module imports when it runs, inside functions too."""
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if is_type_checking(node):
            stack.extend(node.orelse)  # type: ignore[attr-defined]
            continue
        stack.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: write the whole name of the package"
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                target = ROOT / Path(*dotted.split("."))
                is_module = target.is_dir() or target.with_suffix(".py").is_file()
                yield node.lineno, dotted if is_module else str(node.module)


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    return ((line, module) for line, module in imports(path) if module.split(".")[0] == "raydeep")


def test_imports_point_one_way():
    wrong = []
    for path in MODULES:
        own = package(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for line, module in own_imports(path):
            if ORDER.index(package(module)) > ORDER.index(own):
                wrong.append(f"{name(path)}:{line} imports {module}")
    assert wrong == []


def test_the_order_names_every_package():
    found = {path.stem if path.is_file() else path.name for path in (ROOT / "raydeep").iterdir() if path.name[0] != "_"}
    assert found - {"py"} == set(ORDER) - {"__init__"}


@pytest.mark.parametrize(
    ("folder", "other", "allowed"),
    [
        ("report", "search", {"raydeep.search.pareto", "raydeep.search.objectives"}),
        ("report", "train", set()),
        ("deploy", "train", set()),
        ("model", "data", set()),
        (
            "search",
            "train",
            {f"raydeep.train.{part}" for part in ("checkpoint", "loop", "losses", "parallel", "saver")},
        ),
    ],
)
def test_packages_that_keep_apart(folder, other, allowed):
    found = {module for path in (ROOT / "raydeep" / folder).glob("*.py") for _, module in own_imports(path)}
    assert {module for module in found if package(module) == other} <= allowed


def test_few_modules_import_ray():
    users = {name(path) for path in MODULES if any(module.split(".")[0] == "ray" for _, module in imports(path))}
    assert users == {
        "raydeep/data/stream.py",
        "raydeep/deploy/batch.py",
        "raydeep/ops/doctor.py",
        "raydeep/train/backend.py",
        "raydeep/train/cluster.py",
        "raydeep/train/launch.py",
        "raydeep/train/worker.py",
        "raydeep/search/scheduler.py",
        "raydeep/search/tune.py",
        "raydeep/ops/submit.py",
    }


def test_the_scan_of_imports_sees_functions_and_skips_type_checking(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ray\nelse:\n    import a\n"
        "def f():\n    from raydeep.data import order\n    import ray.train\n"
    )
    assert {module for _, module in imports(path)} == {"typing", "a", "raydeep.data.order", "ray.train"}


def test_predictions_need_neither_torch_nor_ray():
    code = "import sys, raydeep.deploy.predict; print(sorted({'torch', 'ray', 'kornia'} & sys.modules.keys()))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


def test_no_module_grows_beyond_a_sitting():
    lines = {name(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


# job files


def test_there_are_jobs():
    assert ROOT / "jobs" / "digits.yaml" in JOBS


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_loads(path):
    needs_path = yaml.safe_load(path.read_text()).get("data", {}).get("source") in ("folder", "parquet")
    job = load_job(path, ["data.path=x"] if needs_path else [])
    assert job.name.replace("-", "_") == path.stem


def test_the_job_for_gpus_is_one_for_sharded_models_too():
    path = ROOT / "jobs" / "imagenet_resnet50.yaml"
    [shown] = re.findall(r"… (--set scaling.strategy=fsdp.*)", path.read_text())
    sets = ["data.path=x", *(word for word in shlex.split(shown) if word != "--set")]
    assert load_job(path, sets).scaling.strategy == "fsdp"
    assert load_job(path, ["data.path=x", "scaling.workers=[4, 8]"]).scaling.elastic


# what the pages say


def blocks(page: Path, *kinds: str) -> list[str]:
    """The fenced code blocks of a page, of the languages named."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for kind, text in found if kind in kinds]


def commands(page: Path, program: str) -> list[list[str]]:
    """Commands in code blocks and in `inline code`, split as a shell does, without the program's name."""
    shown = (text.replace("\\\n", " ") for text in blocks(page, "", "sh", "bash", "console", "shell"))
    lines = [line for text in shown for line in text.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", page.read_text())
    found = (re.match(rf"\s*(?:\$ )?(?:\.venv/bin/)?{program} (.+)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


def test_the_readme_shows_both_commands_that_a_newcomer_needs():
    assert {"demo", "test"} <= {words[0] for words in commands(ROOT / "README.md", "make")}
    assert len(commands(ROOT / "README.md", "raydeep")) >= 5


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_of_a_page_exists(page):
    doors = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in commands(page, "raydeep"):
        assert words[0] in doors, f"raydeep {' '.join(words)}"
        options = {option for param in doors[words[0]].params for option in param.opts}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= options, words
        for option, value in pairwise(words):
            if option == "--set":
                assert value.split("=")[0] in [*valid_keys(), "section.key"], words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_make_target_of_a_page_exists(page):
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page, "make"):
        assert {word for word in words if "=" not in word} <= targets, words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_path_of_a_page_exists(page):
    text = page.read_text()
    not_ours = {".git", ".venv", "build", "dist", "runs", "site"}
    top = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name not in not_ours)
    paths = {ROOT / path for path in re.findall(rf"(?<![\w./-])((?:{top})/[\w./*-]*\w)", text)}
    paths |= {page.parent / link for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)}
    missing = [str(path) for path in paths if not (list(ROOT.glob(name(path))) if "*" in str(path) else path.exists())]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_job_of_a_page_loads(page):
    for text in blocks(page, "yaml"):
        assert parse_job(yaml.safe_load(text), name(page)).model.name


# what is installed


def pins() -> dict[str, str]:
    lines = [line.split(" #")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {canonicalize_name(k): v for k, _, v in (line.partition("==") for line in lines if line and line[0] != "#")}


def test_constraints_pin_plain_versions_from_the_index():
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    assert "@" not in text
    assert all(re.fullmatch(r"[\w.!+-]+", version) for version in pins().values())


def test_constraints_pin_all_that_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    found = pins()
    assert [str(need) for need in wanted if found.get(canonicalize_name(need.name), "0") not in need.specifier] == []
