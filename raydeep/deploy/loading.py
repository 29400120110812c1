"""A model of raydeep as a torch module, to go on training, and back into a model folder.

N: pictures; C, H, W: channels, height, width; K: classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from raydeep.compress import pack
from raydeep.data.augment import to_input
from raydeep.deploy import export, folder
from raydeep.errors import ArtifactError, ModelError
from raydeep.model import artifact, layers


class About(NamedTuple):
    """What `model.raydeep` says of a loaded network."""

    classes: list[str]  # K names, in the order of the logits
    shape: tuple[int, int, int]  # height, width, channels of a picture
    mean: list[float]  # a channel, of pictures in [0, 1]
    std: list[float]
    spec: dict[str, Any]  # as in spec.json

    def to_input(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Uint8 pictures of shape [N, H, W, C] → what the network takes, float32 [N, C, H, W].

        Raises:
            ModelError: another shape or dtype.
        """
        images = torch.tensor(images) if isinstance(images, np.ndarray) else images
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise ModelError(f"pictures of {images.dtype} {list(images.shape)}: expected torch.uint8 [N, {wanted}]")
        return to_input(images, self.mean, self.std)


def load(model: str | Path, *, keep_zeros: bool = False) -> nn.Module:
    """The network of a model folder, rebuilt from its packed file: in eval mode, on the CPU, every weight trainable.

    It is the plain network: float32 pictures [N, C, H, W], normalised with `model.raydeep.mean` and `.std`
    (`model.raydeep.to_input` makes them from uint8 ones), in, float32 logits [N, K] out. In eval mode it predicts what
    the verified model does. Weights are float32 at the values that the packed file has for them; training moves them
    off their grid. Inputs that were quantized still are, with gradients straight through and a step that learns (LSQ,
    arXiv 1902.08153). BatchNorm that was folded into a convolution is gone: in train mode nothing is left of it.

    Args:
        model: a model folder, a run with one answer, or the s3:// address of either; see `folder.find`.
        keep_zeros: weights that are zero, by pruning or by rounding, stay zero in training: layers that have some get
            a mask, as a parametrization of `weight`. Otherwise nothing is added, and they train like the others.

    Raises:
        ModelError: no model folder, a file is missing or changed, or the network can't be built.
        ArtifactError: the packed file is broken.
        RaydeepError: the address is none, or can't be read.
    """
    path = folder.find(model)
    try:
        spec, tensors = pack.unpack((path / "model.rdz").read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path / 'model.rdz'}: missing; export the model again") from None
    except ArtifactError as err:
        raise ArtifactError(f"{path / 'model.rdz'}: {err}") from None
    net = artifact.thaw(spec, tensors).requires_grad_(True)
    if keep_zeros:
        for _, layer in list(layers.compressible(net)):
            kept = layers.raw_weight(layer) != 0
            if not bool(kept.all()):
                layers.add_mask(layer).mask.copy_(kept)
    height, width, channels = spec["input"]
    net.raydeep = About(spec["classes"], (height, width, channels), spec["mean"], spec["std"], spec)  # type: ignore[assignment]
    return net


def save(model: nn.Module, out: str | Path) -> Path:
    """Write a network of `load` as a model folder: packed, ONNX in its exact form, card, checksums; not verified.

    Of a dense model (`RUN/models/dense`) the folder is one that `raydeep search --from` takes.

    Args:
        model: of `load`, trained since.
        out: the new folder; it appears when it is whole.

    Raises:
        ModelError: `model` is not of `load`, or `out` exists.
        ExportError: the network can't be written as ONNX.
    """
    about, path = getattr(model, "raydeep", None), Path(out).expanduser()
    if not isinstance(about, About):
        raise ModelError("save: expected a network of raydeep.load, with its attribute `raydeep`")
    if path.exists():
        raise ModelError(f"{path}: exists; name a new folder or remove it")
    training = model.training
    try:
        spec, tensors = artifact.freeze(model.eval(), {**about.spec, "folded": [], "layers": {}}, fold=False)
    finally:
        model.train(training)
    export.write_model(path, pack.pack({**spec, "folded": about.spec["folded"]}, tensors))
    return path
