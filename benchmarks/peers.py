"""The peers of compress.py: brevitas' quantized layers, plain torch-pruning, and the runtimes of photos."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dense
import harness
import torch
import torch.nn.functional as F
from torch import nn

from raydeep.compress import cost, pack, plan, quantize
from raydeep.data.augment import Augmenter
from raydeep.data.batches import Batches, eval_batches
from raydeep.model import artifact, zoo
from raydeep.train import losses
from raydeep.train.loop import fit
from raydeep.train.metrics import evaluate


class BrevitasBlock(nn.Module):
    """zoo.BasicBlock in brevitas' layers: activations are quantized where ours are, at what convolutions read."""

    def __init__(self, plain: zoo.BasicBlock, conv: Callable[..., nn.Module], relu: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(plain.conv1), plain.bn1
        self.conv2, self.bn2 = conv(plain.conv2), plain.bn2
        self.shortcut: nn.Module = nn.Identity()
        if isinstance(plain.shortcut, nn.Sequential):
            self.shortcut = nn.Sequential(conv(plain.shortcut[0]), plain.shortcut[1])
        self.relu1, self.relu2 = relu(), relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """NCHW → NCHW."""
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class Brevitas(nn.Module):
    """zoo.CifarResNet in brevitas' layers, as its documentation has them: learned scales, weights a channel."""

    def __init__(self, plain: zoo.CifarResNet, bits: int, steps: int) -> None:
        """Take over the weights of a float network.

        Args:
            plain: the network.
            bits: of weights and activations; 8 in the first and last layer, as ours.
            steps: forward passes that set the first scales of activations.
        """
        import brevitas.nn as qnn
        from brevitas.inject.enum import ScalingImplType
        from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

        super().__init__()
        learned = ScalingImplType.PARAMETER_FROM_STATS

        def conv(of: nn.Conv2d, width: int = bits) -> nn.Module:
            made = qnn.QuantConv2d(
                of.in_channels, of.out_channels, of.kernel_size, of.stride, of.padding, bias=False,
                weight_quant=Int8WeightPerChannelFloat.let(bit_width=width, scaling_impl_type=learned),
            )  # fmt: skip
            made.load_state_dict({"weight": of.weight.detach()}, strict=False)
            return made

        def relu(width: int = bits) -> nn.Module:
            return qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat.let(bit_width=width, collect_stats_steps=steps))

        self.inputs = qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat.let(bit_width=8, collect_stats_steps=steps))
        self.conv1, self.bn1, self.relu = conv(plain.conv1, 8), plain.bn1, relu()
        self.blocks = nn.Sequential(*(BrevitasBlock(block, conv, relu) for block in plain.blocks))
        self.pooled = qnn.QuantIdentity(act_quant=Uint8ActPerTensorFloat.let(bit_width=8, collect_stats_steps=steps))
        self.fc = qnn.QuantLinear(
            plain.fc.in_features, plain.fc.out_features, bias=True,
            weight_quant=Int8WeightPerChannelFloat.let(bit_width=8, scaling_impl_type=learned),
        )  # fmt: skip
        self.fc.load_state_dict({k: v.detach() for k, v in plain.fc.state_dict().items()}, strict=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """NCHW → NK."""
        x = self.blocks(self.relu(self.bn1(self.conv1(self.inputs(x)))))
        return self.fc(self.pooled(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))


def _train(model: nn.Module, one: Any, pictures: Any, seed: int, epochs: int, lr: float) -> None:
    batches = Batches(pictures.train, Augmenter(one.augment, pictures.mean, pictures.std), one.train.batch_size, seed)
    fit(model, losses.cross_entropy(one.train.label_smoothing), batches, one.train, epochs=epochs, lr=lr, seed=seed)


def _accuracy(model: nn.Module, pictures: Any) -> float:
    part = eval_batches(pictures.test, pictures.mean, pictures.std, 500)
    return evaluate(model.eval(), part, len(pictures.test.labels)).accuracy


def brevitas(args: Any) -> list[dict[str, Any]]:
    """Accuracy after the same steps, and the seconds of a step in turns, at 4, 3 and 2 bits."""
    import os

    os.environ.setdefault("BREVITAS_JIT", "0")
    data, cache = harness.data_folder(args), Path(args.cache).resolve()
    one, pictures, start = dense.dense("resnet20", data, cache, 0, args.dense_epochs)
    one = one.with_values({"train.precision": "float32", "distill.enabled": False, **args.values})
    epochs, lr = args.epochs or 2, 0.02
    rows = []
    for bits in (4, 3, 2):
        ours_job = one.with_values({
            "quantize.weight_bits": bits, "quantize.activation_bits": bits, "recover.epochs": epochs, "recover.lr": lr,
        })  # fmt: skip
        ours = plan.compress(ours_job, start, pictures, 0)
        labelled = plan.calibration_batches(pictures, 512, 0)
        images = plan.training_inputs(pictures, one.augment, 512, 0)  # ours start from and end on the same
        torch.manual_seed(0)
        theirs = Brevitas(artifact.thaw(*start).requires_grad_(True), bits, len(images)).train()  # type: ignore[arg-type]
        with torch.no_grad():
            for x in images:
                theirs(x)
        _train(theirs, one, pictures, 0, epochs, lr)
        quantize.reestimate_batchnorm(theirs, images)
        accuracy = 100 * _accuracy(theirs, pictures)
        mine = 100 * ours.test_accuracy
        rows.append(harness.result(f"W{bits}A{bits}: ours, test accuracy", mine, "%", n=1))
        rows.append(harness.result(f"W{bits}A{bits}: brevitas, test accuracy", accuracy, "%", n=1))
        rows.append(harness.result(f"W{bits}A{bits}: ours above brevitas", mine - accuracy, "points", ">= 0.0", n=1))
        rows.append(_steps(ours_job, start, theirs, labelled, bits, 6 if args.quick else 20))
    return rows


def _steps(job: Any, start: plan.Dense, theirs: nn.Module, labelled: Any, bits: int, rounds: int) -> dict[str, Any]:
    """Forward and backward of 128 pictures and the optimizer's step, ours and theirs in turns."""
    torch.manual_seed(0)
    ours = artifact.thaw(*start).requires_grad_(True).train()
    quantize.prepare(ours, job.quantize, [x for x, _ in labelled])
    images, labels = labelled[0][0][:128], labelled[0][1][:128]

    def step(model: nn.Module) -> Callable[[], None]:
        model = model.train().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)

        def run() -> None:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    times = harness.interleaved({"ours": step(ours), "brevitas": step(theirs)}, rounds, warmup=2)
    value, half = harness.ratio(times["ours"], times["brevitas"])
    return harness.result(
        f"W{bits}A{bits}: seconds of a step, ours / brevitas", value, "ratio", "<= 0.9", n=rounds, spread=half / value
    )


def share_of_macs(packed: bytes) -> float:
    """Multiply-accumulates of a packed model, as a share of those of its network before it was narrowed."""
    spec, tensors = pack.unpack(packed)
    shape = tuple(spec["input"])
    return cost.macs(artifact.thaw(spec, tensors), shape) / cost.macs(artifact.build({**spec, "widths": {}}), shape)


def torch_pruning(one: Any, seed: int, epochs: int, args: Any) -> tuple[float, float]:
    """As its documentation has it: group magnitude, steps until half of the MACs are gone, then fine-tuning.

    Returns:
        Test accuracy and the share of MACs that is left.
    """
    import torch_pruning as tp

    data, cache = harness.data_folder(args), Path(args.cache).resolve()
    _, pictures, start = dense.dense("resnet20", data, cache, seed, args.dense_epochs)
    model = artifact.thaw(*start).requires_grad_(True)
    height, width, channels = pictures.shape
    example = torch.zeros(1, channels, height, width)
    full = cost.macs(model, pictures.shape)
    pruner = tp.pruner.MagnitudePruner(
        model, example, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.9,
        iterative_steps=200, ignored_layers=[model.fc], global_pruning=True,
    )  # fmt: skip
    while cost.macs(model, pictures.shape) > 0.5 * full:
        pruner.step()
    _train(model, one, pictures, seed, epochs, one.recover.lr)
    return _accuracy(model, pictures), cost.macs(model, pictures.shape) / full


def photos(args: Any, compressed: Callable[..., Any]) -> list[dict[str, Any]]:
    """Accuracy and latency of the narrow integer ResNet-18, verified in a clean process as every model is."""
    from raydeep.deploy import export, forms, verify

    values = {
        "prune.kind": "channels", "prune.sparsity": 0.75, "recover.epochs": args.epochs or 20, "recover.lr": 0.02,
        "quantize.weight_bits": 8, "quantize.activation_bits": 8, "quantize.epochs": 3 if not args.quick else 1,
        "distill.enabled": True, "export.latency_rounds": 15, "export.batch_sizes": [1, 64],
        "export.torch_compile": not args.quick, **args.values,
    }  # fmt: skip
    one, before, found = compressed("photos", 0, values, args)
    data, cache = harness.data_folder(args), Path(args.cache).resolve()
    _, pictures, start = dense.dense("photos", data, cache, 0, args.dense_epochs)
    with tempfile.TemporaryDirectory(prefix="raydeep-") as folder:
        home = Path(folder)
        export.write_model(home / "dense", pack.pack(*start))
        sample = forms.sample(pictures, found.val_predictions)
        export.write_model(home / "small", found.packed, sample=sample, cfg=one.export)
        print((home / "small" / "export.json").read_text())
        candidates = [
            verify.Candidate(home / "dense", before.val_predictions, before.test_predictions),
            verify.Candidate(home / "small", found.val_predictions, found.test_predictions),
        ]
        facts = verify.verify(candidates, home / "dense", pictures, cfg=one.export)
    print(json.dumps(facts["small"], indent=1))
    return _photo_rows(before, found, pictures, facts["small"])


def _photo_rows(before: Any, found: Any, pictures: Any, facts: dict[str, Any]) -> list[dict[str, Any]]:
    rows = len(pictures.val.labels) + len(pictures.test.labels)

    def accuracy(val: float, test: float) -> float:
        return 100 * (val * len(pictures.val.labels) + test * len(pictures.test.labels)) / rows

    full = accuracy(before.val_accuracy, before.test_accuracy)
    onnx = accuracy(facts["val_accuracy_onnx"], facts["test_accuracy_onnx"])
    out = [
        harness.result("dense float, accuracy on all held-out pictures", full, "%", n=rows),
        harness.result("narrow and 8 bits, model.onnx in onnxruntime", onnx, "%", n=rows),
        harness.result("points lost", full - onnx, "points", "<= 1.0", n=rows),
        harness.result("share of MACs", share_of_macs(found.packed), "of dense"),
        harness.result("bytes, float32 over file", facts["dense_bytes"] / facts["bytes"], "ratio"),
    ]
    best: dict[str, float] = {}
    for row in facts["latency"]:
        if row["threads"] != 1:
            continue
        for key, against in (("ratio_to_dense_torch", "torch eager"), ("ratio_to_dense_onnx", "onnxruntime float")):
            name = f"{row['runtime']} ({row['form']}), batch {row['batch']}, 1 thread: times as fast as dense {against}"
            out.append(harness.result(name, row[key], "ratio", n=row["rounds"], spread=row["spread"] / row[key]))
            best[against] = max(best.get(against, 0.0), row[key])
    out.append(harness.result("the better batch, against torch eager", best["torch eager"], "ratio", ">= 12.0"))
    out.append(harness.result("the better batch, against onnxruntime", best["onnxruntime float"], "ratio", ">= 5.0"))
    return out
