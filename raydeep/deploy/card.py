"""The model card: what a model is, what it was made for, how to run it, what it costs, where it comes from.

It begins with the front matter that the Hugging Face Hub reads, and is made from nothing but the files of its folder:
spec.json and export.json, and once they are there verify.json (what was measured) and about.json (where it comes from).
"""

from __future__ import annotations

import html
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from raydeep.compress import cost
from raydeep.config import Job
from raydeep.data.decode import ALPHA_MODES, GREY_MODES
from raydeep.deploy import gate
from raydeep.disk import json_bytes, read_json, write_summed
from raydeep.fields import TORCHVISION
from raydeep.model import artifact
from raydeep.remote import SCHEME

RECIPE = {"model", "augment", "train", "prune", "quantize", "distill", "recover"}
MANY_CLASSES = 50  # of more, the card names so many


def about(job: Job, label: str, provenance: dict[str, Any], trial: dict[str, Any] | None = None) -> dict[str, Any]:
    """Where a model comes from: what its about.json holds. No path of this machine is among it.

    Args:
        job: of the run.
        label: of the model in the run.
        provenance: of the run.
        trial: the ledger's row of its trial; None: the dense model.
    """
    values = {} if trial is None else dict(trial["config"])
    recipe = job.with_values(values).model_dump(mode="json", include=RECIPE, exclude_defaults=True)
    recipe, values = _without_paths(recipe), _without_paths(values)
    for section, key in ((recipe.get("distill", {}), "teacher"), (values, "distill.teacher")):
        if key in section:
            section[key] = _last(section[key])
    known = provenance.get("dataset", {})
    start = provenance.get("start")
    if start:  # trained by another run, whose job says how
        recipe.pop("train", None)
    return {
        "name": f"{job.name}-{label}", "job": job.name, "label": label, "trial": trial and trial["trial"],
        "license": job.export.license, "seed": job.seed, "values": values, "recipe": recipe,
        "dense_from": _last(str(start)) if start else None,
        "dataset": {"name": dataset_name(job), **{k: known.get(k) for k in ("hash", "rows", "image")}},
        "raydeep": provenance.get("raydeep"), "git_commit": provenance.get("git_commit"),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def dataset_name(job: Job) -> str:
    """What to call a job's data: its source, or the last part of its path."""
    if job.data.path is None or job.data.source.startswith(TORCHVISION):
        return job.data.source.removeprefix(TORCHVISION)
    return _last(job.data.path)


def _without_paths(value: Any) -> Any:
    """A value of a job; of absolute paths and of addresses in it, at any depth, only the last part."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(inner) for inner in value]
    if isinstance(value, str) and (value[:1] in ("/", "~") or SCHEME.match(value)):
        return _last(value)
    return value


def _last(path: str) -> str:
    return path.split("?")[0].rstrip("/").rpartition("/")[2] or path


def complete(folder: Path, facts: dict[str, Any]) -> None:
    """Write about.json and the card anew; the folder's checksums hold at every moment.

    Args:
        folder: of a model, verified or not.
        facts: see `about`.
    """
    write_summed(folder, {"about.json": json_bytes(facts)})
    write_summed(folder, {"README.md": card(*artifact.load_model(folder), folder).encode()})


def card(spec: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> str:
    """The README of a model folder.

    Args:
        spec: of the frozen network.
        tensors: of the frozen network.
        folder: of the model: what is known of it is read there.
    """
    known, measured, exported = (_facts(folder / f"{name}.json") for name in ("about", "verify", "export"))
    front = yaml.safe_dump(_front_matter(spec, known, measured), sort_keys=False, allow_unicode=True)
    height, width, channels = spec["input"]
    parts = [
        f"# {_text(known.get('name') or spec['model']['name'])}: {spec['model']['name']}, "
        f"{len(spec['classes'])} classes",
        f"An image classifier made by raydeep. Input: uint8 pictures of shape [N, {height}, {width}, {channels}] "
        f"({'grey' if channels == 1 else 'RGB'}); the normalisation is inside. Output: logits of shape "
        f"[N, {len(spec['classes'])}].",
        *_data(spec, known), *_measured(measured), *_size(spec, tensors, folder, exported),
        "## Use\n\nA picture file, with nothing but onnxruntime, numpy and Pillow (in this folder, "
        f"`python label.py picture.jpg`):\n\n```python\n{script(spec)}```",
        *_limits(spec, known, measured), *_origin(known),
    ]  # fmt: skip
    return f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n"


def _facts(file: Path) -> dict[str, Any]:
    return dict(read_json(file)) if file.is_file() else {}


def _text(value: str) -> str:
    """A name that someone else chose, as Markdown shows it."""
    return html.escape(" ".join(str(value).split())).replace("|", "&#124;").replace("`", "&#96;")


def _front_matter(spec: dict[str, Any], known: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """What the Hub reads: huggingface.co/docs/hub/model-cards, and its model-index for results."""
    bits = _bits(spec)
    data = known.get("dataset", {})
    front: dict[str, Any] = {
        "license": known.get("license", "unknown"), "library_name": "onnxruntime",
        "pipeline_tag": "image-classification",
        "tags": ["raydeep", "onnx", "image-classification", *(["quantized"] if bits else [])],
    }  # fmt: skip
    if data:
        front["datasets"] = [data["name"]]
    front["metrics"] = ["accuracy"]
    if data and "test_accuracy_onnx" in measured:
        metric = {"type": "accuracy", "name": "Test accuracy", "value": round(measured["test_accuracy_onnx"], 6)}
        dataset = {"type": data["name"], "name": data["name"], "split": "test", "revision": data["hash"]}
        task = {"type": "image-classification", "name": "Image classification"}
        front["model-index"] = [
            {"name": known["name"], "results": [{"task": task, "dataset": dataset, "metrics": [metric]}]}
        ]
    return front


def _bits(spec: dict[str, Any]) -> list[int]:
    return sorted({entry["weight_bits"] for entry in spec["layers"].values() if "weight_bits" in entry})


def _data(spec: dict[str, Any], known: dict[str, Any]) -> list[str]:
    height, width, _ = spec["input"]
    lines = ["## Intended data", ""]
    if data := known.get("dataset"):
        rows = ", ".join(f"{count:,} {split}" for split, count in (data["rows"] or {}).items())
        lines += [f"Trained on **{_text(data['name'])}**: {rows} pictures (content hash `{data['hash']}`)."]
    names = ", ".join(_text(name) for name in spec["classes"][:MANY_CLASSES])
    more = (
        f" and {len(spec['classes']) - MANY_CLASSES:,} more, see spec.json"
        if len(spec["classes"]) > MANY_CLASSES
        else ""
    )
    fit = (
        "scaled to that size on their shorter side, and cropped to the centre square"
        if height == width
        else "of that size"
    )
    lines += [
        f"Pictures of {height}×{width} pixels, turned upright, {fit}.", "",
        f"Classes: {names}{more}",
    ]  # fmt: skip
    return ["\n".join(lines)]


def _measured(measured: dict[str, Any]) -> list[str]:
    if not measured:
        return ["## Metrics\n\nNot verified yet: there is no verify.json in this folder."]
    worst = measured.get("worst_class")
    rows = [
        ("test accuracy", f"{measured['test_accuracy_onnx']:.2%} of {measured['test_rows']:,}"),
        ("test accuracy of model.rdz", f"{measured['test_accuracy']:.2%}"),
        ("validation accuracy", f"{measured['val_accuracy_onnx']:.2%} of {measured['val_rows']:,}"),
    ]  # fmt: skip
    if worst:
        rows.append((f"worst class, {_text(worst['name'])}", f"{worst['accuracy']:.2%} of {worst['rows']:,}"))
    rows += [
        ("latency", f"{measured['latency_ms']:.3g} ms, batch {measured['latency_batch_size']}, {measured['runtime']}"),
        ("against the dense model", f"{measured['latency_ratio']:.2f}× the speed, ± {measured['latency_spread']:.0%}"),
    ]  # fmt: skip
    said = "passed" if measured["verified"] else f"**refused**: {_text(measured['refused'])}"
    lines = [
        "## Metrics", "", "| measured in a clean process | |", "| --- | ---: |",
        *(f"| {name} | {value} |" for name, value in rows), "",
        f"On {_text(measured['hardware']['cpu'])}, the median of {measured['latency_rounds']} rounds. The gate "
        f"{said}: of {measured['rows']:,} predictions the packed file gave {measured['packed_differ']:,} other than "
        f"when it was scored (0 may differ), the ONNX file {measured['onnx_differ']:,} other than the packed file "
        f"(at most {gate.DIFFER_SHARE:.0%} of each split may, and accuracy by {gate.ACCURACY_SHARE:.1%}; of a small "
        "split one prediction). Accuracies are those of model.onnx, unless another file is named. More: `verify.json`.",
    ]  # fmt: skip
    return ["\n".join(lines)]


def _size(spec: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path, exported: dict[str, Any]) -> list[str]:
    counted = cost.count(tensors)
    form = f" Form of the ONNX file: {exported['form']}, for {exported['target']}." if exported else ""
    lines = [
        "## Size", "",
        f"{counted.parameters:,} parameters, {counted.sparsity:.1%} zeros, weight bits: "
        f"{', '.join(map(str, _bits(spec))) or 'float32'}.{form}", "", "| file | bytes |", "| --- | ---: |",
        *(f"| `{path.name}` | {path.stat().st_size:,} |" for path in sorted(folder.glob("model.*"))),
    ]  # fmt: skip
    return ["\n".join(lines)]


def _limits(spec: dict[str, Any], known: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    lines = [
        "## Limits", "",
        f"- Every picture gets one of the {len(spec['classes'])} classes, also one that shows none of them; the "
        "probability is a softmax that was not calibrated.",
        "- Accuracy holds for pictures like those above. Other cameras, places or times were not measured, nor was "
        "fairness between groups of people.",
    ]  # fmt: skip
    if measured:
        share, rows = measured["test_accuracy_onnx"], measured["test_rows"]
        error = (share * (1 - share) / rows) ** 0.5
        lines.append(f"- Test accuracy has a standard error of {error:.2%} (binomial, {rows:,} pictures).")
    if known.get("license", "unknown") == "unknown":
        lines.append("- No licence was stated (job key `export.license`); that of the data may bind its users.")
    return ["\n".join(lines)]


def _origin(known: dict[str, Any]) -> list[str]:
    if not known:
        return []
    recipe = yaml.safe_dump({"seed": known["seed"], **known["recipe"]}, sort_keys=False, allow_unicode=True)
    commit = f", commit `{known['git_commit']}`" if known["git_commit"] else ""
    trial = f"trial {known['trial']} of a search" if known["trial"] is not None else "the dense model"
    if known.get("dense_from"):
        trial += f", the dense model from `{_text(known['dense_from'])}`"
    return [
        f"## Provenance\n\nraydeep {known['raydeep']}{commit}, {known['created']}; job `{known['job']}`, {trial}. What "
        f"the job sets, its other keys at their defaults:\n\n```yaml\n{recipe}```"
    ]


def _tuple(names: tuple[str, ...]) -> str:
    quoted = ", ".join(f'"{name}"' for name in names)
    return f"({quoted})"


def script(spec: dict[str, Any]) -> str:
    """Labels a picture file as `raydeep predict` does, without raydeep: at most 20 lines."""
    height, width, _ = spec["input"]
    scale = """\
if picture.size != (width, height):
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side)).resize((width, height), Image.Resampling.BILINEAR)
"""
    return f"""\
import json, sys
import numpy as np, onnxruntime
from PIL import Image, ImageOps
spec = json.load(open("spec.json"))
height, width, channels = spec["input"]
picture = ImageOps.exif_transpose(Image.open(sys.argv[1]))
grey = picture.mode in {_tuple(GREY_MODES)} or picture.mode[0] == "I"
if picture.mode[0] == "I":  # 16 bits
    picture = Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype("uint8"))
if picture.mode in {_tuple(ALPHA_MODES)} or "transparency" in picture.info:
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture.convert("RGBA"))
picture = picture.convert("L" if grey else "RGB")
{scale if height == width else ""}\
pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB")).reshape(1, height, width, channels)
logits = onnxruntime.InferenceSession("model.onnx").run(None, {{"images": pixels}})[0][0].astype(np.float64)
odds = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
print(spec["classes"][odds.argmax()], f"{{odds.max():.4f}}")
"""
