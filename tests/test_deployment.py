"""The files that deploy raydeep: image, `ray up`, KubeRay. No engine, Kubernetes or cloud: schemas, linters, mocks."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonpatch
import kubernetes_validate
import pytest
import typer
import yaml
from jsonschema import Draft202012Validator, ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli
from referencing import Registry, Resource
from test_architecture import blocks, commands, pins

import raydeep
from raydeep.cli import app
from raydeep.config import load_job
from raydeep.train.cluster import RAY_ENV

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
DOCKERFILE = CLUSTER / "Dockerfile"
RAY_UP = {path.stem: path for path in sorted((CLUSTER / "ray-up").glob("*.yaml"))}
KUBERAY = CLUSTER / "kuberay"
OVERLAYS = ["overlays/cpu/job", "overlays/cpu/cluster", "overlays/gpu/job", "overlays/gpu/cluster"]
ROOTS = ["base/shared", *OVERLAYS]
PAGES = [KUBERAY / "README.md", CLUSTER / "ray-up" / "README.md"]
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
KUBERNETES = "1.37"
IN_IMAGE = Path("/opt/raydeep")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def everything(value: Any) -> Iterator[Any]:
    """A tree's nodes, itself first."""
    yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from everything(child)


# kustomize


def render(folder: Path) -> list[dict[str, Any]]:
    """What `kustomize build` makes of a folder: the part of it that these files use, and nothing else."""
    spec = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert (spec.pop("apiVersion"), spec.pop("kind")) == ("kustomize.config.k8s.io/v1beta1", "Kustomization")
    assert set(spec) <= {"resources", "namespace", "images", "patches"}, "not known to this renderer"
    found: list[dict[str, Any]] = []
    for entry in spec["resources"]:
        path = (folder / entry).resolve()
        found += render(path) if path.is_dir() else [part for part in yaml.safe_load_all(path.read_text()) if part]
    for item in spec.get("patches", []):
        assert set(item) == {"target", "patch"}, "not known to this renderer"
        assert set(item["target"]) == {"kind"}, "not known to this renderer"
        hits = [at for at, part in enumerate(found) if part["kind"] == item["target"]["kind"]]
        assert hits, f"{folder}: a patch meets nothing"
        for at in hits:
            found[at] = jsonpatch.apply_patch(found[at], yaml.safe_load(item["patch"]))
    for part in found:
        if "namespace" in spec:
            key = "name" if part["kind"] == "Namespace" else "namespace"
            part["metadata"][key] = spec["namespace"]
        for container in containers(part):
            for image in spec.get("images", []):
                if container["image"].split(":")[0] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return found


def containers(tree: Any) -> list[dict[str, Any]]:
    """All containers in a tree."""
    lists = [node.get(key) or [] for node in everything(tree) if isinstance(node, dict) for key in CONTAINERS]
    return [container for found in lists for container in found]


CONTAINERS = ("containers", "initContainers")


def pods(tree: Any) -> list[dict[str, Any]]:
    """The specs of all pods in a tree."""
    return [node for node in everything(tree) if isinstance(node, dict) and "containers" in node]


@cache
def _rendered(folder: str) -> str:
    return json.dumps(render(KUBERAY / folder))


def rendered(folder: str) -> list[dict[str, Any]]:
    """A copy of what a folder renders to."""
    found: list[dict[str, Any]] = json.loads(_rendered(folder))
    return found


def the(kind: str, folder: str) -> dict[str, Any]:
    """The one resource of a kind in a folder."""
    (found,) = (part for part in rendered(folder) if part["kind"] == kind)
    return found


def ray_cluster(folder: str) -> dict[str, Any]:
    """The spec of the RayCluster in an overlay, or in its RayJob."""
    (found,) = (part for part in rendered(folder) if part["kind"] in ("RayCluster", "RayJob"))
    return found["spec"] if found["kind"] == "RayCluster" else found["spec"]["rayClusterSpec"]


@pytest.mark.parametrize("folder", ROOTS)
def test_kustomize_renders_what_the_tests_look_at(folder):
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl here; the tests have a renderer of their own")
    said = subprocess.run(["kubectl", "kustomize", KUBERAY / folder], capture_output=True, text=True, check=True).stdout
    order = lambda parts: sorted(parts, key=lambda part: (part["kind"], part["metadata"]["name"]))  # noqa: E731
    assert order(list(yaml.safe_load_all(said))) == order(rendered(folder))


# schemas


@cache
def schemas() -> tuple[dict[str, Any], Registry]:
    """KubeRay's kinds, and Kubernetes' own that they refer to."""
    ours = json.loads((ROOT / "tests" / "schemas" / "kuberay-v1.7.0.json").read_text())
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{KUBERNETES}.0-local-strict"
    theirs = json.loads((folder / "_definitions.json").read_text())
    uri = "https://kubernetes.io/api/_definitions.json"
    registry = Registry().with_resources([(ours["$id"], Resource.from_contents(ours)), (uri, _resource(theirs))])
    return ours, registry


def _resource(schema: dict[str, Any]) -> Any:
    from referencing.jsonschema import DRAFT202012

    return Resource.from_contents(schema, default_specification=DRAFT202012)


def validate(part: dict[str, Any]) -> None:
    """Refuse a resource that its schema does not allow, unknown keys too.

    Raises:
        ValidationError: it does not fit.
    """
    if not part["apiVersion"].startswith("ray.io/"):
        kubernetes_validate.validate(part, KUBERNETES, strict=True)
        return
    ours, registry = schemas()
    schema = {"$ref": f"{ours['$id']}#/$defs/{part['kind']}"}
    Draft202012Validator(schema, registry=registry).validate(part)


@pytest.mark.parametrize("folder", ROOTS)
def test_every_resource_fits_its_schema(folder):
    parts = rendered(folder)
    assert {part["kind"] for part in parts} & {"RayJob", "RayCluster", "NetworkPolicy"}
    for part in parts:
        validate(part)  # raises; that it does is the mutations' test below


def _rename(key: str) -> Callable[[dict[str, Any]], None]:
    """Misspell a key wherever it is."""

    def change(part: dict[str, Any]) -> None:
        hits = [node for node in everything(part) if isinstance(node, dict) and key in node]
        assert hits, key
        for node in hits:
            node[key[:-1] + ("x" if key[-1] != "x" else "y")] = node.pop(key)

    return change


@pytest.mark.parametrize(
    ("folder", "kind", "key"),
    [
        ("overlays/cpu/job", "RayJob", key)
        for key in (
            "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "submitterPodTemplate", "rayClusterSpec",
            "entrypoint", "activeDeadlineSeconds", "runtimeEnvYAML", "backoffLimit",
        )
    ]
    + [
        ("overlays/gpu/cluster", "RayCluster", key)
        for key in (
            "authOptions", "mode", "autoscalerOptions", "idleTimeoutSeconds", "version", "headGroupSpec",
            "rayStartParams", "workerGroupSpecs", "minReplicas", "groupName", "template", "volumeMounts", "emptyDir",
            "sizeLimit",
            "runAsNonRoot", "allowPrivilegeEscalation", "automountServiceAccountToken", "resources", "tolerations",
        )
    ]
    + [("base/shared", "NetworkPolicy", "podSelector"), ("base/shared", "NetworkPolicy", "policyTypes")]
    + [("base/shared", "PersistentVolumeClaim", "accessModes")],
)  # fmt: skip
def test_a_misspelt_key_is_refused(folder, kind, key):
    part = the(kind, folder)
    _rename(key)(part)
    with pytest.raises(ValidationError):
        validate(part)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("authOptions", "mode"), "tokens"),
        (("autoscalerOptions", "version"), "v3"),
        (("enableInTreeAutoscaling",), "yes"),
        (("workerGroupSpecs", 0, "maxReplicas"), "8"),
        (("headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("headGroupSpec", "template", "spec", "containers", 0, "ports", 0, "containerPort"), "6379"),
    ],
)
def test_a_wrong_value_is_refused(where, value):
    part = the("RayCluster", "overlays/cpu/cluster")
    node: Any = part["spec"]
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    with pytest.raises(ValidationError):
        validate(part)


def test_the_renderer_says_what_it_does_not_know(tmp_path):
    (tmp_path / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: []\nnamePrefix: x\n"
    )
    with pytest.raises(AssertionError, match="not known"):
        render(tmp_path)


# KubeRay: what holds in every file


@pytest.mark.parametrize("folder", OVERLAYS)
def test_requests_are_limits(folder):
    found = [
        node["resources"] for node in everything(rendered(folder)) if isinstance(node, dict) and "resources" in node
    ]
    assert len(found) == len(containers(rendered(folder))) + 1  # and the autoscaler's
    for resources in found:
        assert resources["requests"] == resources["limits"]
        assert {"cpu", "memory"} <= set(resources["limits"])


@pytest.mark.parametrize("folder", OVERLAYS)
def test_no_pod_has_rights_it_does_not_need(folder):
    user, group = user_of_image()
    assert pods(rendered(folder))
    for pod in pods(rendered(folder)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (user, group)
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        head = pod["serviceAccountName"] == "raydeep-head"
        assert pod["automountServiceAccountToken"] is head, "only the autoscaler speaks to Kubernetes"
        assert head == any(container["name"] == "ray-head" for container in pod["containers"])
    autoscaler = ray_cluster(folder)["autoscalerOptions"]
    for container in [*containers(rendered(folder)), autoscaler]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True,
        }  # fmt: skip
    assert not any(key in str(rendered(folder)) for key in ("hostNetwork", "hostPath", "privileged"))


def test_accounts_exist_and_hold_no_token_by_themselves():
    accounts = {p["metadata"]["name"]: p for p in rendered("base/shared") if p["kind"] == "ServiceAccount"}
    used = {pod["serviceAccountName"] for folder in OVERLAYS for pod in pods(rendered(folder))}
    assert used == set(accounts)
    assert all(account["automountServiceAccountToken"] is False for account in accounts.values())
    assert the("Namespace", "base/shared")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("folder", OVERLAYS)
def test_nodes_share_a_volume_and_have_memory_for_objects(folder):
    claim = the("PersistentVolumeClaim", "base/shared")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    spec = ray_cluster(folder)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        shm = mounts["/dev/shm"]["emptyDir"]
        assert shm["medium"] == "Memory"
        memory = pod["containers"][0]["resources"]["limits"]["memory"]
        assert int(shm["sizeLimit"].removesuffix("Gi")) < int(memory.removesuffix("Gi")), "it counts towards the limit"
    assert environment()["RAYDEEP_STORAGE"] == "/shared"


@pytest.mark.parametrize("folder", OVERLAYS)
def test_rays_versions_and_settings(folder):
    spec = ray_cluster(folder)
    assert spec["rayVersion"] == pins()["ray"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "work goes to the workers"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP", "nothing is put on the internet"
    options = {option.removeprefix("--") for option in ray_options("start")}
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        assert set(group["rayStartParams"]) <= options
        assert group["template"]["spec"]["restartPolicy"] == "Never", "autoscaler v2: a pod is one Ray node"


def test_a_job_runs_on_the_cluster_that_the_other_file_describes():
    for device in ("cpu", "gpu"):
        assert ray_cluster(f"overlays/{device}/job") == ray_cluster(f"overlays/{device}/cluster")


@pytest.mark.parametrize("folder", OVERLAYS)
def test_images_are_of_this_version(folder):
    device = folder.split("/")[1]
    found = {container["image"] for container in containers(rendered(folder))}
    assert {image.rpartition(":")[2] for image in found} == {f"{raydeep.__version__}-{device}"}
    gpus = [c["resources"]["limits"].get("nvidia.com/gpu") for c in containers(ray_cluster(folder)["workerGroupSpecs"])]
    assert gpus == (["1"] if device == "gpu" else [None])
    tolerated = [pod.get("tolerations") for pod in pods(ray_cluster(folder)["workerGroupSpecs"])]
    assert [bool(one) for one in tolerated] == [device == "gpu"]


@pytest.mark.parametrize("folder", [folder for folder in OVERLAYS if folder.endswith("job")])
def test_the_job_is_one_that_raydeep_takes(folder):
    spec = the("RayJob", folder)["spec"]
    words = shlex.split(spec["entrypoint"])
    job = loads(words)
    assert job.scaling.use_gpu == ("gpu" in folder)
    assert Path(job.storage).is_relative_to("/shared")
    assert job.scaling.min_workers <= ray_cluster(folder)["workerGroupSpecs"][0]["minReplicas"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] == 0
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["ttlSecondsAfterFinished"] > 0
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())


def test_the_ports_of_ray_are_closed_to_others():
    policy = the("NetworkPolicy", "base/shared")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    (mark,) = policy["podSelector"]["matchLabels"].items()
    from_ray, from_submitter, from_operator = policy["ingress"]
    assert "ports" not in from_ray
    assert from_submitter["ports"] == from_operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    for rule in (from_ray, from_submitter):
        for peer in rule["from"]:
            assert set(peer) == {"podSelector"}, "of this namespace only"
            assert mark in peer["podSelector"]["matchLabels"].items()
    (peer,) = from_operator["from"]
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kuberay-system"}
    assert "-n kuberay-system" in PAGES[0].read_text()
    for folder in OVERLAYS:
        templates = [
            n for n in everything(rendered(folder)) if isinstance(n, dict) and "containers" in n.get("spec", {})
        ]
        assert templates
        for template in templates:
            assert mark in template["metadata"]["labels"].items(), "else the policy does not see it"
        for submitter in (t for t in templates if t["spec"]["containers"][0]["name"] == "ray-job-submitter"):
            wanted = from_submitter["from"][0]["podSelector"]["matchLabels"].items()
            assert wanted <= submitter["metadata"]["labels"].items()


# ray up


@pytest.mark.parametrize("path", RAY_UP.values(), ids=lambda path: path.stem)
def test_ray_up_takes_the_file(path):
    validate_config(prepare_config(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize(
    "wrong",
    ["idle_timeout_minute: 5", "docker: {imag: x}", "auth: {ssh_usr: x}", "max_workers: many", "file_mount: {}"],
)
def test_ray_up_refuses_a_mistake(wrong):
    config = {**yaml.safe_load(RAY_UP["aws"].read_text()), **yaml.safe_load(wrong)}
    with pytest.raises((ValidationError, AssertionError)):
        validate_config(prepare_config(config))


def test_there_are_three():
    assert set(RAY_UP) == {"aws", "gcp", "on-prem"}


@pytest.mark.parametrize("path", RAY_UP.values(), ids=lambda path: path.stem)
def test_ray_up_starts_what_kuberay_starts(path):
    config = prepare_config(yaml.safe_load(path.read_text()))
    kube = ray_cluster("overlays/cpu/cluster")
    group = kube["workerGroupSpecs"][0]
    types = config["available_node_types"]
    cpu = types.get("cpu") or types["local.cluster.node"]
    assert (cpu["min_workers"], cpu["max_workers"]) == (group["minReplicas"], group["maxReplicas"])
    assert config["max_workers"] == group["maxReplicas"]
    assert config["idle_timeout_minutes"] * 60 == kube["autoscalerOptions"]["idleTimeoutSeconds"]
    said = re.search(r"`scaling.workers: \[(\d+), (\d+)\]`", path.read_text())
    assert said is not None
    assert (int(said[1]), int(said[2])) == (cpu["min_workers"], cpu["max_workers"])
    if path.stem != "on-prem":
        assert set(types) == {"head", "cpu", "gpu"}
        assert types["head"]["resources"] == {"CPU": 0}
        assert types["cpu"]["resources"] == {"CPU": int(containers(group)[0]["resources"]["limits"]["cpu"])}
        assert types["gpu"]["resources"]["GPU"] == 1
        assert types["gpu"]["docker"]["worker_image"].endswith("-gpu")


@pytest.mark.parametrize("path", RAY_UP.values(), ids=lambda path: path.stem)
def test_ray_up_asks_for_the_token_and_opens_nothing(path):
    config = prepare_config(yaml.safe_load(path.read_text()))
    options = " ".join(config["docker"]["run_options"])
    for setting in ("RAY_AUTH_MODE=token", "RAY_ENABLE_UV_RUN_RUNTIME_ENV=0", "RAYDEEP_STORAGE=/shared"):
        assert f"-e {setting}" in options
    assert "-v /mnt/shared:/shared" in options
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "--num-cpus=0" in start
    assert config["head_setup_commands"] == config["worker_setup_commands"], "nothing is installed but by the image"
    assert len(config["head_setup_commands"]) == 1
    assert "IpPermissions" not in config["provider"].get("security_group", {})


@pytest.mark.parametrize("path", RAY_UP.values(), ids=lambda path: path.stem)
def test_commands_of_ray_up_are_shell_and_ray(path):
    config = prepare_config(yaml.safe_load(path.read_text()))
    lines = [line for key, value in config.items() if key.endswith("_commands") for line in value]
    for line in lines:
        subprocess.run(["bash", "-n", "-c", line], check=True)
        for words in re.findall(r"ray (start|stop)\b([^;]*)", line):
            assert {word.split("=")[0] for word in words[1].split() if word[0] == "-"} <= ray_options(words[0]), line


def test_aws_launches_its_nodes_on_a_mock(tmp_path, monkeypatch):
    """`ray up` as far as the cloud: role, key, network, group, and an instance of each type."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # 15 s for a role that a mock has at once
    (tmp_path / ".ssh").mkdir()
    moto = pytest.importorskip("moto")
    with moto.mock_aws():
        import boto3
        from ray.autoscaler._private.aws import config as aws
        from ray.autoscaler._private.aws import utils
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        utils.resource_cache.cache_clear()  # clients of other tests know other keys
        utils.client_cache.cache_clear()
        config = prepare_config(yaml.safe_load(RAY_UP["aws"].read_text()))
        region = config["provider"]["region"]
        config = aws.bootstrap_aws(config)
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for kind, node_type in config["available_node_types"].items():
            tags = {"ray-node-type": "worker", "ray-user-node-type": kind}
            provider.create_node(copy.deepcopy(node_type["node_config"]), tags, 1)
        ec2 = boto3.client("ec2", region_name=region)
        found = [node for group in ec2.describe_instances()["Reservations"] for node in group["Instances"]]
        groups = {
            group["GroupName"]: group["IpPermissions"] for group in ec2.describe_security_groups()["SecurityGroups"]
        }
        utils.resource_cache.cache_clear()
        utils.client_cache.cache_clear()
    kinds = {tag["Value"]: node for node in found for tag in node["Tags"] if tag["Key"] == "ray-user-node-type"}
    assert {kind: node.get("InstanceLifecycle") for kind, node in kinds.items()} == {
        "head": None, "cpu": "spot", "gpu": "spot",
    }  # fmt: skip
    assert all(node["MetadataOptions"]["HttpTokens"] == "required" for node in found)
    from_outside = [rule for rule in groups["raydeep"] if rule["IpRanges"]]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in from_outside] == [(22, 22)]


def test_gcp_nodes_are_instances_of_its_api():
    """Against the API's own description, where the extra `gcp` is installed."""
    google = pytest.importorskip("googleapiclient")
    folder = Path(google.__file__).parent / "discovery_cache" / "documents"
    known = json.loads((folder / "compute.v1.json").read_text())["schemas"]

    def check(value: Any, schema: dict[str, Any], where: str) -> None:
        schema = known[schema["$ref"]] if "$ref" in schema else schema
        expected = {"object": dict, "array": list, "boolean": bool}.get(schema["type"], (str, int))
        assert isinstance(value, expected), where
        assert value in schema.get("enum", [value]), where
        if isinstance(value, list):
            for item in value:
                check(item, schema["items"], where)
        elif isinstance(value, dict):
            assert set(value) <= set(schema["properties"]), where
            for key, item in value.items():
                check(item, schema["properties"][key], f"{where}.{key}")

    for kind, node_type in yaml.safe_load(RAY_UP["gcp"].read_text())["available_node_types"].items():
        check(node_type["node_config"], {"$ref": "Instance"}, kind)


# the image


@cache
def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and what they are given."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(first, rest) for first, rest in lines]


def given(instruction: str) -> list[str]:
    return [rest for first, rest in instructions() if first == instruction]


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for line in given("ENV") for pair in shlex.split(line))


def user_of_image() -> tuple[int, int]:
    user, _, group = given("USER")[-1].partition(":")
    return int(user), int(group)


def test_hadolint_finds_nothing_in_the_image():
    program = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert program is not None
    said = subprocess.run([program, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout + said.stderr) == (0, "")


def test_all_that_the_image_copies_is_there_and_not_ignored():
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines(), "the list says what comes in, not what stays out"
    copied = {word for line in given("COPY") for word in shlex.split(line)[:-1]}
    assert [path for path in copied if not (ROOT / path).exists()] == []
    assert let_in == copied
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml", "constraints.txt", "raydeep"} <= copied


def test_the_image_installs_what_constraints_pin():
    runs = [line for line in given("RUN") if "pip install" in line]
    for line in runs:
        subprocess.run(["bash", "-n", "-c", line], check=True)
        for command in re.findall(r"pip install[^&]*", line):
            assert re.search(r"(-c|--constraint) constraints\.txt", command), command
    assert {"setuptools", "uv"} <= set(pins()), "what builds and what installs"
    assert any("-b constraints.txt" in line for line in runs)
    told = subprocess.run([sys.executable, "-m", "uv", "pip", "install", "--help"], capture_output=True, text=True)
    for option in {word for line in runs for word in re.findall(r"--[a-z-]+", line)} - {
        "--no-cache-dir",
        "--constraint",
    }:
        assert option in told.stdout + "--version", option


def test_the_image_has_what_its_users_need():
    install = " ".join(given("RUN"))
    for package in ("wget", "rsync", "openssh-client"):  # KubeRay's probes; the head of `ray up`
        assert package in install
    assert user_of_image() == (1000, 1000), "the first user of cloud images: the token stays readable"
    assert [word for word in ("--uid 1000", "--gid 1000") if word not in install] == []
    assert given("ENTRYPOINT") == [], "KubeRay and `ray up` bring commands of their own"
    assert given("HEALTHCHECK")[0].endswith('["raydeep", "--version"]')
    assert environment()["HOME"] == "/home/ray", "`ray up` reads it"
    assert environment()["RAY_AUTH_MODE"] == "token"
    version = re.search(r"python:(\d+)\.(\d+)-slim", " ".join(given("ARG")))
    assert version is not None
    assert (int(version[1]), int(version[2])) >= (3, 11)


def test_the_image_gives_workers_what_raydeep_sets_on_one_machine():
    ours = {key: value for key, value in RAY_ENV.items() if key.startswith("MALLOC_") or "_UV_" in key}
    assert len(ours) >= 3
    assert ours.items() <= environment().items()


# what the files say


def ray_options(command: str) -> set[str]:
    return {option for param in ray_cli.commands[command].params for option in param.opts}


def loads(words: list[str]) -> Any:
    """The job of a command line of raydeep, whose file lies in the image."""
    assert words[0] == "raydeep"
    doors = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {option for param in doors[words[1]].params for option in param.opts}
    assert {word for word in words if word.startswith("--")} <= options, words
    path = Path(words[2])
    assert (str(IN_IMAGE), "jobs jobs") == (given("WORKDIR")[0], given("COPY")[-1])
    return load_job(
        ROOT / path.relative_to(IN_IMAGE), [value for option, value in pairwise(words) if option == "--set"]
    )


def test_no_file_names_another_version():
    tags = {tag for path in FILES for tag in re.findall(r"\braydeep:(\S+?)(?=[\s`]|$)", path.read_text())}
    assert tags == {f"{raydeep.__version__}-cpu", f"{raydeep.__version__}-gpu"}
    assert [name(path) for path in FILES if re.search(r":latest\b|newTag: latest", path.read_text())] == []


@pytest.mark.parametrize("path", [*RAY_UP.values(), *sorted(KUBERAY.rglob("*.yaml"))], ids=name)
def test_what_must_be_edited_is_marked(path):
    lines = path.read_text().splitlines()
    placeholders = r"registry\.example|ami-0{8}|fs-0{8}|192\.0\.2|my-project|edit-me|10\.0\.0\.|storageClassName"
    for at, line in enumerate(lines):
        if re.search(placeholders, line):
            assert "EDIT" in "".join(lines[max(0, at - 4) : at + 1]), f"{name(path)}:{at + 1}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_is_a_screen_and_honest(page):
    text = page.read_text()
    assert len(text.splitlines()) <= 50
    assert "`EDIT`" in text
    assert re.search(r"\*\*[^*]*nothing here has run yet\.\*\*|\*\*[^*]*nothing\nhere has run yet\.\*\*", text)
    assert pins()["ray"].startswith("2.60")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_of_a_page_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:\s]+)\)", text)
    paths = {page.parent / link for link in links}
    paths |= {page.parent / path for path in re.findall(r"`((?:base|overlays)/[\w/*.-]*)`", text)}
    paths |= {ROOT / path for path in re.findall(r"(?<![\w./-])((?:cluster|tests)/[\w./-]*\w)", text)}
    assert [str(path) for path in paths if not list(ROOT.glob(name(path)))] == []
    for folder in re.findall(r"kubectl (?:apply|delete) -k (\S+)", text):
        assert render(ROOT / folder)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_of_a_page_exist(page):
    joined = [re.sub(r"\\\n\s*", "", text) for text in blocks(page, "sh")]
    for line in (line for text in joined for line in text.splitlines() if line):
        subprocess.run(["bash", "-n", "-c", line], check=True)
        words = shlex.split(line, comments=True)
        inner = [shlex.split(word) for word in words if word.startswith("ray ")]
        for command in [words, *inner]:
            if not command or command[0] != "ray":
                continue
            assert command[1] in ray_cli.commands, line
            if command[1] == "job":
                door = ray_cli.commands["job"].commands[command[2]]
                options = {option for param in door.params for option in param.opts}
                own = command[3 : command.index("--")] if "--" in command else command[3:]
            else:
                options, own = ray_options(command[1]), command[2:]
            assert {word for word in own if word.startswith("-")} <= options, line
            if "--" in command:
                assert loads(command[command.index("--") + 1 :])
        if words[:2] == ["docker", "build"]:
            assert (ROOT / words[words.index("-f") + 1]).is_file()
    assert commands(page, "kubectl") or commands(page, "ray")


def test_the_schema_says_where_it_is_from():
    said = schemas()[0]["$comment"]
    assert "v1.7.0" in said
    assert "Apache-2.0" in said
    assert re.search(r"\b[0-9a-f]{40}\b", said)
    assert "--version 1.7.0" in PAGES[0].read_text()
