"""One job file, one typed tree: what loads, and what each refusal says."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from raydeep.config import MAX_JOB_BYTES, Job, load_job, valid_keys
from raydeep.errors import JobError


@pytest.fixture
def write(tmp_path: Path):
    """Writes a job file."""

    def make(text: str | bytes) -> Path:
        path = tmp_path / "job.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


def refusal(path: Path, *sets: str) -> str:
    with pytest.raises(JobError) as caught:
        load_job(path, sets)
    return str(caught.value)


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_an_empty_file_is_the_defaults(write, text):
    job = load_job(write(text))
    assert job == Job()
    assert (job.data.source, job.train.epochs, job.prune.sparsity, job.scaling.workers) == ("digits", 10, 0.0, 1)


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("1E-2", 0.01), ("2e0", 2.0), (".5", 0.5), ("1", 1.0)])
def test_numbers_in_scientific_notation_are_floats(write, text, value):
    assert load_job(write(f"train: {{lr: {text}}}")).train.lr == value
    assert load_job(write(""), [f"train.lr={text}"]).train.lr == value


def test_an_override_beats_the_file_and_the_last_one_wins(write):
    path = write("train: {epochs: 3, lr: 0.5}\nquantize: {weight_bits: 4}")
    job = load_job(path, ["train.epochs=5", "train.epochs=7", "quantize.weight_bits=none", "data.mode=grey"])
    assert (job.train.epochs, job.train.lr, job.quantize.weight_bits, job.data.mode) == (7, 0.5, None, "grey")


def test_an_override_fills_a_section_that_the_file_leaves_empty(write):
    assert load_job(write("train:\n  # epochs: 3\n"), ["train.epochs=5"]).train.epochs == 5


def test_a_search_space_is_overridden_by_its_dotted_key(write):
    space = load_job(write(""), ["search.space.prune.sparsity=[0.1, 0.2]"]).search.space
    assert space == {"prune.sparsity": [0.1, 0.2]}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("train.epochs", "--set train.epochs: expected section.key=value"),
        ("=3", "--set =3: expected section.key=value"),
        ("train.lr=[1", "--set train.lr=[1: line 1: not valid YAML"),
        ("train.lr=!!python/object:x y", "tags (tag:yaml.org,2002:python/object:x) are not allowed"),
        ("train.epoch=3", "train.epoch is not a key of a job; did you mean train.epochs?"),
        ("train.lr=fast", "train.lr: found 'fast', expected a valid number"),
    ],
)
def test_a_bad_override_is_named(write, sets, message):
    assert message in refusal(write(""), sets)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("train: {epoch: 3}", "train.epoch is not a key of a job; did you mean train.epochs? Valid here: epochs, "),
        ("trian: {epochs: 3}", "trian is not a key of a job; did you mean train? Valid here: name, seed, storage, "),
        ("train: {sparsity: 0.5}", "train.sparsity is not a key of a job; did you mean prune.sparsity?"),
        ("epochs: 3", "epochs is not a key of a job; did you mean train.epochs?"),
        ("batch_size: 3", "batch_size is not a key of a job; did you mean train.batch_size?"),
    ],
)
def test_an_unknown_key_names_the_nearest_and_the_valid_ones(write, text, nearest):
    path = write(text)
    assert refusal(path).startswith(f"{path}: {nearest}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize: {weight_bits: 33}", "quantize.weight_bits: found 33, expected a whole number of bits from 2 to 8"),
        ("quantize: {weight_bits: 1}", "quantize.weight_bits: found 1, expected a whole number of bits"),
        ("quantize: {weight_bits: true}", "quantize.weight_bits: found True, expected a whole number of bits"),
        ("quantize: {weight_bits: 4.0}", "quantize.weight_bits: found 4.0, expected a whole number of bits"),
        ("prune: {sparsity: 1.0}", "prune.sparsity: found 1.0, expected less than 1"),
        ("prune: {sparsity: -0.1}", "prune.sparsity: found -0.1, expected greater than or equal to 0"),
        ("prune: {sparsity: .nan}", "prune.sparsity: found nan"),
        ("train: {lr: .inf}", "train.lr: found inf, expected a finite number"),
        ("train: {lr: 0}", "train.lr: found 0, expected greater than 0"),
        ("train: {epochs: many}", "train.epochs: found 'many', expected a valid integer"),
        ("train: {optimizer: lion}", "train.optimizer: found 'lion', expected 'sgd', 'adamw' or 'muon'"),
        ("augment: {scale: [0.9]}", "augment.scale: found [0.9], expected two numbers: [low, high]"),
        ("augment: {scale: [1.1, 0.9]}", "augment.scale: found [1.1, 0.9], expected [low, high] with 0 < low <= high"),
        ("augment: {scale: [1, .inf]}", "augment.scale: found [1, inf]"),
        ("name: ../x", "name: found '../x'"),
        ("train: 5", "train: found 5"),
        (
            "quantize: {activation_bits: 4}",
            "quantize.activation_bits needs quantize.weight_bits (integer kernels need both)",
        ),
        (
            "prune: {sparsity: 0.5, schedule: iterative, rounds: 4}\nrecover: {epochs: 3}",
            "prune.schedule iterative: recover.epochs 3 can't be shared out to prune.rounds 4",
        ),
        ("prune: {kind: channels, rewind: weights}", "prune: rewind weights needs the network as wide as it was"),
        ("prune: {kind: channels, score: lamp}", "prune: score lamp ranks single weights"),
        ("prune: {kind: '4:2'}", "prune.kind: found '4:2', expected weights, channels, or N:M"),
        (
            "quantize: {weight_bits: {average: 9}}",
            "quantize.weight_bits: found {'average': 9}, expected a whole number",
        ),
        ("data: {source: folder}", "data.source folder needs data.path (--set data.path=FOLDER)"),
        ("data: {source: parquet}", "data.source parquet needs data.path"),
        (
            "train: {batch_size: 11, accumulate: 3}\nscaling: {workers: 4}",
            "train.batch_size 11 is less than scaling.workers 4 × train.accumulate 3: raise it to 12 or more",
        ),
        (
            "scaling: {workers: 0}",
            "scaling.workers: found 0, expected a number of workers from 1 to 4096, or [min, max]",
        ),
        ("scaling: {workers: [2, 1]}", "scaling.workers: found [2, 1], expected a number of workers"),
        ("scaling: {workers: [1, 2, 3]}", "scaling.workers: found [1, 2, 3], expected a number of workers"),
        ("scaling: {workers: true}", "scaling.workers: found True, expected a number of workers"),
        ("scaling: {strategy: pipeline, workers: [1, 2]}", "scaling: strategy pipeline needs a fixed number"),
        ("scaling: {strategy: pipeline, workers: 3, stages: 2}", "scaling: workers 3 is no multiple of stages 2"),
        ("scaling: {strategy: pipeline, workers: 3, cut_points: [a]}", "scaling: 3 stages need 2 cut_points, found 1"),
        ("scaling: {stages: 2}", "scaling: stages needs strategy pipeline, found ddp"),
        ("scaling: {strategy: fsdp, sync_batchnorm: true}", "scaling: sync_batchnorm needs strategy ddp, found fsdp"),
        (
            "scaling: {strategy: pipeline, workers: 2}\ntrain: {accumulate: 1}",
            "train.accumulate 1 micro-batches can't fill a pipeline of 2 stages; raise it to 2 or more",
        ),
        (
            "scaling: {strategy: pipeline, workers: 2}\ntrain: {accumulate: 3}",
            "scaling.strategy pipeline needs micro-batches of one size: train.drop_last true, and train.batch_size "
            "(now 128) a multiple of replicas × train.accumulate = 3",
        ),
        (
            "scaling: {strategy: pipeline, workers: 2}\ntrain: {accumulate: 4, batch_size: 4}",
            "scaling.strategy pipeline: train.batch_size 4 makes micro-batches of 1 rows; they must have 2 or more",
        ),
        (
            "scaling: {strategy: pipeline, workers: 2}\ntrain: {accumulate: 4, batch_size: 12}\naugment: {mixup: 0.2}",
            "scaling.strategy pipeline: train.batch_size 12 makes micro-batches of 3 rows; they must have 2 or more,",
        ),
        (
            "scaling: {strategy: fsdp}\ntrain: {channels_last: true}",
            "train.channels_last true needs scaling.strategy ddp",
        ),
        (
            "scaling: {strategy: fsdp}\ntrain: {optimizer: muon}",
            "train.optimizer muon needs the whole network on a worker: use scaling.strategy ddp",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(write, text, message):
    path = write(text)
    assert refusal(path).startswith(f"{path}: {message}")


def test_all_errors_of_a_file_are_told_at_once(write):
    message = refusal(write("train: {epochs: x, batch: 3}\nseed: -1"))
    assert "train.epochs: found 'x'" in message
    assert "did you mean train.batch_size?" in message
    assert "seed: found -1" in message


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("train.clip_norm", "train: {clip_norm: none}"),
        ("data.limit_per_class", "data: {limit_per_class: none}"),
        ("data.image_size", "data: {image_size: none}"),
        ("recover.batch_size", "recover: {batch_size: none}"),
        ("search.concurrent", "search: {concurrent: none}"),
        ("quantize.weight_bits", "quantize: {weight_bits: none}"),
        ("quantize.edge_bits", "quantize: {edge_bits: none}"),
    ],
)
def test_none_is_the_word_for_off_wherever_the_descriptions_use_it(write, key, text):
    section, _, name = key.partition(".")
    job = load_job(write(text))
    assert getattr(getattr(job, section), name) is None


CHAIN = list(zip("abcdefgh", "bcdefghi", strict=True))


def bomb(width: int) -> str:
    """The 'billion laughs': each list holds the one before it `width` times."""
    return "a: &a [x,x]\n" + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * width)}]\n" for p, c in CHAIN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  lr: 1\n  lr: 2", "line 3: key 'lr' stands twice"),
        ("train: {lr: 1}\ntrain: {lr: 2}", "line 2: key 'train' stands twice"),
        ("name: x\na: !!python/object:os.system x", "line 2: tags (tag:yaml.org,2002:python/object:os.system)"),
        ("train: !!python/object/apply:os.system [ls]", "line 1: tags (tag:yaml.org,2002:python/object/apply:os.sys"),
        ("name: !!str x", "line 1: tags (tag:yaml.org,2002:str) are not allowed in a job"),
        ("name: !own x", "line 1: tags (!own) are not allowed in a job"),
        ("a: &a {lr: 1}\ntrain:\n  <<: *a", "line 3: merge keys (<<) are not allowed in a job"),
        (bomb(9), "line 9: too many nested values or aliases for a job"),
        (bomb(6), "aliases expand to too many values for a job"),
        ("a: &x [*x]", "line 1: not valid YAML: found unconstructable recursive node"),
        ("a: &x {b: *x}", "line 1: not valid YAML: found unconstructable recursive node"),
        ("&x {train: *x}", "aliases expand to too many values for a job"),
        ("[" * 100_000, "line 1: too many nested values or aliases for a job"),
        ("#" * MAX_JOB_BYTES + "#", "larger than 262,144 bytes: that is no job file"),
        (b"name: \xff\xfe", "can't be read as text: 'utf-8' codec can't decode byte 0xff"),
        (b"name: a\0b", "not valid YAML: unacceptable character"),
        ("name: [unclosed", "line 1: not valid YAML: expected ',' or ']'"),
        ("name: a\n---\nname: b", "line 2: not valid YAML: but found another document"),
        ("? [a]\n: 1", "line 1: a key must be plain text"),
        ("- train\n- data", "expected KEY: VALUE lines, found list"),
        ("hello", "expected KEY: VALUE lines, found str"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_hostile_or_broken_yaml_is_refused_by_line(write, text, message):
    path = write(text)
    assert refusal(path).startswith(f"{path}: {message}")


def test_a_few_aliases_are_allowed(write):
    job = load_job(write("train: {lr: &lr 0.5}\nrecover: {lr: *lr}"))
    assert job.recover.lr == job.train.lr == 0.5


def test_a_missing_job_file_is_named(tmp_path):
    assert refusal(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: no such job file"


def test_a_folder_is_no_job_file(tmp_path):
    assert refusal(tmp_path).startswith(f"{tmp_path}: can't be read as text")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{prune.sparsity: [0.5, 1.5]}", "search.space.prune.sparsity: prune.sparsity: found 1.5"),
        ("{quantize.weight_bits: [4, 9]}", "search.space.quantize.weight_bits: quantize.weight_bits: found 9"),
        ("{distill.enabled: [true, 4]}", "search.space.distill.enabled: distill.enabled: found 4"),
        ("{prune.sparsty: [0.5]}", "search.space.prune.sparsty: prune.sparsty is not a key of a job"),
        ("{prune.sparsity: []}", "search.space.prune.sparsity: found [], it has no choices"),
        (
            "{export.max_models: [3]}",
            "search.space.export.max_models can't be searched; the sections that can: prune, ",
        ),
        ("{prune: [0.5]}", "search.space.prune is a section, expected a key of it, such as prune.kind"),
        ("{prune.sparsity: 0.5}", "search.space.prune.sparsity: found 0.5, expected a list of choices, "),
        ("{quantize.activation_bits: [none, 4]}", "search.space.quantize.activation_bits"),  # weights stay float
    ],
)
def test_the_choices_of_a_search_are_checked_like_the_keys_themselves(write, space, message):
    path = write(f"search: {{space: {space}}}")
    assert refusal(path).startswith(f"{path}: {message}")


def test_none_among_the_choices_is_no_text(write):
    job = load_job(write("search: {space: {quantize.weight_bits: [none, 4]}}"))
    assert job.search.space["quantize.weight_bits"] == [None, 4]


def test_with_values_sets_dotted_keys_and_checks_how_they_go_together():
    job = Job().with_values({"prune.sparsity": 0.9, "quantize.weight_bits": 4, "quantize.activation_bits": 8})
    assert (job.prune.sparsity, job.quantize.weight_bits, job.quantize.activation_bits) == (0.9, 4, 8)
    assert job.train == Job().train
    with pytest.raises(JobError, match=r"needs quantize\.weight_bits"):
        Job().with_values({"quantize.activation_bits": 8})


def test_a_resolved_job_loads_equal(write):
    job = load_job(
        write(""),
        [
            "train.lr=1e-5", "train.clip_norm=0.5", "augment.scale=[0.9, 1.1]", "name='2024'", "storage='no'",
            "data.limit_per_class=10", "model.args={width: 8}", "search.space.quantize.weight_bits=[none, 4]",
        ],
    )  # fmt: skip
    assert load_job(write(yaml.safe_dump(job.model_dump(mode="json")))) == job


def test_a_job_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Job().train.epochs = 3


def test_the_json_schema_is_one_and_agrees_with_the_loader():
    schema = Job.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    tree = Job().model_dump(mode="json")
    assert validator.is_valid(tree)
    assert not validator.is_valid({**tree, "epochs": 3})
    assert not validator.is_valid({**tree, "prune": {"sparsity": 1.0}})


def test_valid_keys_are_those_of_a_resolved_job():
    tree = Job().model_dump()
    leaves = {f"{s}.{k}" for s, values in tree.items() if isinstance(values, dict) for k in values}
    assert set(valid_keys()) == leaves | set(tree)


# secrets


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIA123:hunter2/x@bucket/photos", "s3://bucket/photos?secret_key=hunter2", "gs://me:hunter2@bucket/x",
        "https://me:hunter2@host/photos", "ftp://hunter2@host/x",
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["data.path", "storage"])
def test_a_secret_in_an_address_is_refused_and_not_repeated(write, key, address):
    told = refusal(write("data: {source: folder, path: x}\n"), f"{key}={address}")
    assert key in told
    assert "hunter2" not in told


@pytest.mark.parametrize("address", ["s3://bucket/photos", "https://host/a@b/photos", "memory://x"])
def test_addresses_without_a_secret_are_taken(write, address):
    assert load_job(write("data: {source: folder}\n"), [f"data.path={address}"]).data.path == address
