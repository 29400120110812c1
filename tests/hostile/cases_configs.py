"""Job files, --set, job names and code of a user's own; refused before anything starts."""

from __future__ import annotations

from pathlib import Path

from hostile.harness import Case, Stock
from hostile.parts import Make, all_of, file, sparse

OWN = "model: {name: 'own:net'}\ndata: {path: shards}\n"
MADE = ("runs", "runs/datasets", "__pycache__", "__pycache__/*")


def job(name: str, text: str | bytes | Make, says: str) -> Case:
    """A job file, job.yaml; what looks at it first is the same for all commands."""
    make = text if callable(text) else file("job.yaml", text)
    return Case("configs", name, "raydeep train job.yaml", says, make)


def sets(name: str, value: str, says: str, argv: tuple[str, ...] | None = None, leaves: tuple[str, ...] = ()) -> Case:
    command = f"raydeep train job.yaml --set '{value}'"
    return Case(
        "configs", name, command, says, all_of(linked, file("job.yaml", "data: {path: shards}\n")), 2, leaves, argv=argv
    )


def linked(folder: Path, stock: Stock) -> None:
    """The digits as shards, so that no case has to make them."""
    (folder / "shards").symlink_to(stock.dataset)


def own(name: str, code: str, says: str) -> Case:
    """A network of the user's own: own.py beside the job."""

    def make(folder: Path, stock: Stock) -> None:
        file("job.yaml", OWN)(folder, stock)
        file("own.py", code)(folder, stock)
        linked(folder, stock)

    return Case("configs", name, "raydeep train job.yaml", says, make, leaves=MADE)


def named(name: str, value: str) -> Case:
    return Case(
        "run names", name, "raydeep train job.yaml", r"job.yaml: name: found", file("job.yaml", f"name: {value}\n")
    )


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)

CASES = [
    job("a billion laughs", LAUGHS, "line .*too many nested values or aliases|aliases expand"),
    job("a tag that makes an object", "name: !!python/object/apply:os.system ['touch owned']\n",
        "tags .* are not allowed"),
    job("a tag of a standard type", "seed: !!int '3'\n", "tags .* are not allowed"),
    job("a key twice", "name: a\nname: b\n", "key 'name' stands twice"),
    job("merge keys", "a: &a {name: x}\n<<: *a\n", "merge keys|not a key"),
    job("tabs", "name:\tx\n\tseed: 1\n", "line 1: not valid YAML"),
    job("NUL", b"name: x\0y\n", "job.yaml: not valid YAML"),
    job("an escape sequence", "name: \"\\e[2J\"\n", "name: found"),
    job("no UTF-8", b"name: caf\xe9\n", "job.yaml: can't be read as text"),
    job("UTF-16", "name: x\n".encode("utf-16"), "job.yaml"),
    job("10 MB", lambda folder, stock: (folder / "job.yaml").write_bytes(b"# x\n" * 2_500_000), "larger than 262,144"),
    job("8 GiB that are not there", sparse("job.yaml", 8 * 2**30), "larger than|not valid"),
    job("lists nested 100,000 deep", "name: " + "[" * 100_000, "too many nested|not valid"),
    job("mappings nested 10,000 deep", "".join(f"{' ' * 0}{{a: " for _ in range(10_000)), "too many nested|not valid"),
    job("a list of jobs", "- name: x\n", "expected KEY: VALUE lines, found list"),
    job("two documents", "name: x\n---\nname: y\n", "not valid YAML"),
    job("a key that is a list", "? [a, b]\n: 1\n", "a key must be plain text"),
    job("a key that is a number", "1: x\n", "not a key of a job|1"),
    job("a key that is nothing", "~: x\n", "job.yaml"),
    job("a section that is a text", "train: fast\n", "train: found 'fast'"),
    job("a key close to another", "train: {epoch: 3}\n", "did you mean train.epochs"),
    job("a key like Python's own", "__class__: {__init__: x}\n", "__class__ is not a key of a job"),
    job("a key that clears the terminal", "\"\\e[2J\\e[31m\": 1\n", "is not a key of a job"),
    job("NaN for a rate", "train: {lr: .nan}\n", "train.lr: found nan"),
    job("infinity for a rate", "train: {lr: .inf}\n", "train.lr: found inf"),
    job("a number of 5,000 digits", f"train: {{epochs: {'9' * 5000}}}\n", "job.yaml"),
    job("10^18 epochs as a float", "train: {epochs: 1.0e+300}\n", "train.epochs"),
    job("a negative size of batch", "train: {batch_size: -1}\n", "train.batch_size: found -1"),
    job("true for a number", "train: {epochs: yes}\n", "train.epochs: found True, expected no true"),
    job("4 × 10^9 workers", "scaling: {workers: 4000000000}\n", "scaling.workers: found 4000000000"),
    job("an empty choice in a space", "search: {space: {prune.sparsity: []}}\n", "search.space.prune.sparsity"),
    job("a space whose low is above its high", "search: {space: {prune.sparsity: {low: 0.9, high: 0.1}}}\n",
        "search.space.prune.sparsity"),
    job("a space of keys that can't be searched", "search: {space: {storage: [a, b]}}\n", "search.space.storage can't"),
    job("a space with a condition on itself",
        "search: {space: {prune.sparsity: {choices: [0.1], when: {prune.sparsity: [0.1]}}}}\n", "search"),
    job("constraints that are code", "search: {constraints: ['__import__(\"os\").system(\"touch owned\") > 0']}\n",
        "search.constraints"),
    job("an objective that is none", "search: {objectives: [beauty]}\n", "search.objectives"),
    job("a picture size of 10^9", "data: {image_size: 1000000000}\n", "data.image_size"),
    job("10^12 synthetic rows", "data: {source: synthetic, rows: 1000000000000}\n", "data.rows"),
    job("a source that is a path", "data: {source: ../../etc}\n", "data.source: found"),
    job("a class of torchvision that is code", "data: {source: 'torchvision:os.system', path: x}\n", "data.source"),
    job("a class of torchvision that is none", "data: {source: 'torchvision:VisionDataset', path: .}\n",
        "VisionDataset"),
    job("a NUL in a path", "data: {source: folder, path: \"a\\0b\"}\n", "data.path"),
    job("credentials in a path", "data: {source: folder, path: 's3://key:secret@bucket/x'}\n",
        "^(?!.*secret@).*credentials"),
    sets("no value", "train.epochs", "--set train.epochs: expected section.key=value"),
    sets("no key", "=3", "--set =3: expected section.key=value"),
    sets("a key below a value", "name.x.y=3", "name is not a section|name"),
    sets("dots alone", "..=3", "--set|key of a job"),
    sets("YAML with a tag", "name=!!python/name:os.system", "tags .* are not allowed"),
    sets("Python's own names", "model.args.__class__=1", "its factory failed", leaves=("runs", "runs/datasets")),
    sets("a value that is no UTF-8", "name=caf\\xe9", "unacceptable character", ("train", "job.yaml", "--set", "name=caf\udce9")),
    sets("a key with an escape sequence", "\\e[2J=1", "not a key", ("train", "job.yaml", "--set", "\x1b[2J=1")),
    own("a module that is not there", "", "own:net: own has no net|own:net"),
    own("a module with an error", "1 / 0\n", "own:net"),
    own("a module that ends the process", "import sys; sys.exit(0)\n", "own:net"),
    own("a factory that is no function", "net = 3\n", "own:net"),
    own("a factory that raises", "def net(*a, **k): raise KeyError('x')\n", "own:net"),
    own("a factory that ends the process", "import os, sys\ndef net(*a, **k): sys.exit(3)\n", "own:net"),
    own("a factory that gives no network", "def net(*a, **k): return 'net'\n", "own:net"),
    own("a network with other outputs",
        "from torch import nn\ndef net(*a, **k): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n", "own:net"),
    own("a network that recurses for ever", "def net(*a, **k): return net(*a, **k)\n", "own:net"),
    own("a module that is no Python", "def net(:\n", "own:net"),
    Case("configs", "a module name that is a path", "raydeep train job.yaml", "can't import|fails when",
         all_of(linked, file("job.yaml", "model: {name: '../../own:net'}\ndata: {path: shards}\n")), leaves=MADE),
    Case("configs", "a network of 10^11 weights", "raydeep train job.yaml", "model",
         all_of(linked, file("job.yaml", "model: {name: seed, args: {width: 100000}}\ndata: {path: shards}\n")),
         leaves=MADE),
    named("..", ".."), named("a slash", "a/b"), named("a climb", "../../x"), named("a line break", '"a\\nb"'),
    named("a leading dash", "-rf"), named("empty", '""'), named("65 characters", "a" * 65),
    named("Arabic digits", "٣٤"), named("a home", "~root"), named("a number", "3"), named("a NUL", '"a\\0"'),
]  # fmt: skip
