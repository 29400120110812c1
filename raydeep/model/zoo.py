"""Networks by name.

Contract of MODELS: `(num_classes, in_channels, image_size, **args) -> nn.Module`, image_size = (H, W); the
module maps float NCHW to logits NK.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from raydeep import own
from raydeep.errors import ModelError

# Some torchvision networks average BatchNorm over 100 steps, for ImageNet's long epochs. With few data an epoch has
# 20 steps: the averages lag behind the weights, and the network validates at chance while it learns.
BN_MOMENTUM = 0.1
SMALL_SIDE = 64  # torchvision's stems halve the picture 4 to 5 times: below this they get a stride of 1


def seed(num_classes: int, in_channels: int, image_size: tuple[int, int], width: int = 32) -> nn.Module:
    """Conv32-Pool-Conv64-Pool-Dense128-Dense K: the network this project grew from."""
    height, wide = image_size
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (height // 4) * (wide // 4), 4 * width), nn.ReLU(),
        nn.Linear(4 * width, num_classes),
    )  # fmt: skip


def lenet_300_100(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """Two hidden layers, 300 and 100 (LeCun et al., 1998)."""
    pixels = in_channels * image_size[0] * image_size[1]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, num_classes)
    )


def lenet5(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """LeNet-5 as the compression literature has it (431k parameters on MNIST; arXiv 1510.00149)."""
    side = [((n - 4) // 2 - 4) // 2 for n in image_size]
    if min(side) < 1:
        raise ModelError(f"model.name lenet5 needs pictures of 16×16 or more, found {image_size[0]}×{image_size[1]}")
    return nn.Sequential(
        nn.Conv2d(in_channels, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(50 * side[0] * side[1], 500), nn.ReLU(), nn.Linear(500, num_classes),
    )  # fmt: skip


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (arXiv 1512.03385), projected where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """NCHW → NCHW."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of depth 6n + 2 (arXiv 1512.03385, section 4.2), shortcuts projected."""

    def __init__(self, depth: int, num_classes: int, in_channels: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                out = width * 2**stage
                blocks.append(BasicBlock(channels, out, 2 if stage and not block else 1))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """NCHW → NK."""
        x = self.pool(self.blocks(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(x, 1))


def _cifar(depth: int) -> Callable[..., nn.Module]:
    def make(num_classes: int, in_channels: int, image_size: tuple[int, int], width: int = 16) -> nn.Module:
        return CifarResNet(depth, num_classes, in_channels, width)

    return make


MODELS: dict[str, Callable[..., nn.Module]] = {
    "seed": seed,
    "lenet_300_100": lenet_300_100,
    "lenet5": lenet5,
    "resnet8": _cifar(8),
    "resnet20": _cifar(20),
    "resnet56": _cifar(56),
}


def build(name: str, args: dict[str, Any], num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Build a network.

    Args:
        name: a key of MODELS, a torchvision classifier, or `package.module:factory`.
        args: further keyword arguments of the factory.
        num_classes: K.
        shape: of a picture: height, width, channels.

    Raises:
        ModelError: unknown name, wrong arguments, or a network that can't take such pictures.
    """
    height, width, channels = shape
    if ":" in name:
        factory = own.find("model.name", name, ModelError)
    elif name in MODELS:
        factory = MODELS[name]
    else:
        factory = _torchvision(name)
    try:
        model = factory(num_classes=num_classes, in_channels=channels, image_size=(height, width), **args)
    except ModelError:
        raise
    except (Exception, SystemExit) as err:  # a user's own code may raise anything, or try to end the process
        raise ModelError(
            f"model.name {name}: its factory failed: {err or type(err).__name__}; check model.args"
        ) from err
    if not isinstance(model, nn.Module):
        raise ModelError(f"model.name {name}: its factory gave {type(model).__name__}, expected a torch.nn.Module")
    state = model.state_dict(keep_vars=True)
    if len({id(value) for value in state.values()}) < len(state):
        raise ModelError(
            f"model.name {name}: a layer or weight stands in it under two names, which raydeep can't prune "
            f"or save; call the one layer twice instead"
        )
    check_shape(model, name, num_classes, shape)
    return model


def check_shape(model: nn.Module, name: str, num_classes: int, shape: tuple[int, int, int]) -> None:
    height, width, channels = shape
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, channels, height, width))
    except Exception as err:  # a user's own code may raise anything
        reason = (str(err) or type(err).__name__).splitlines()[0]
        raise ModelError(f"model.name {name} can't take pictures of {height}×{width}×{channels}: {reason}") from None
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, num_classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(f"model.name {name} gives {found}, expected logits of shape (2, {num_classes})")
    model.train(training)


def _torchvision(name: str) -> Callable[..., nn.Module]:
    from torchvision import models

    names = [n for n in models.list_models() if "." not in n and "/" not in n]
    classifiers = [n for n in models.list_models(module=models) if n in names]
    if name not in classifiers:
        near = difflib.get_close_matches(name, [*MODELS, *classifiers], 3, 0.5) or list(MODELS)
        raise ModelError(
            f"model.name {name!r} is unknown; did you mean {', '.join(near)}? Valid: {', '.join(MODELS)}, a "
            f"torchvision classifier, or your own as package.module:factory"
        )

    def make(num_classes: int, in_channels: int, image_size: tuple[int, int], **args: Any) -> nn.Module:
        if name.startswith("vit_"):
            args = {"image_size": image_size[0], **args}
        if name in ("googlenet", "inception_v3"):
            args = {"aux_logits": False, "init_weights": True, **args}
        model = models.get_model(name, weights=None, num_classes=num_classes, **args)
        _adapt(model, in_channels, min(image_size))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
                module.momentum = max(module.momentum, BN_MOMENTUM)
        return model

    return make


def _adapt(model: nn.Module, in_channels: int, side: int) -> None:
    """Fit the first convolution to the pictures' channels, and the stem to small pictures."""
    name, first = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    small = side < SMALL_SIDE and first.kernel_size[0] == first.kernel_size[1] and first.kernel_size[0] <= 11
    if small and isinstance(getattr(model, "maxpool", None), nn.MaxPool2d):
        model.maxpool = nn.Identity()
    if first.in_channels == in_channels and not small:
        return
    stem: dict[str, Any] = {"kernel_size": first.kernel_size, "stride": first.stride, "padding": first.padding}
    if small:
        stem = {"kernel_size": 3, "stride": 1, "padding": 1}
    new = nn.Conv2d(in_channels, first.out_channels, bias=first.bias is not None, **stem)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
