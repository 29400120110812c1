"""What augmentation would do on a GPU, without one: fake CUDA tensors know device and shape but hold nothing.

So only steps that no sample's draws switch on or off can be followed: blur, erasing, policies and resampling are not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raydeep.config import Augment
from raydeep.data import colour, constants, order
from raydeep.data.augment import DRAWS, Augmenter

RECIPES: dict[str, dict[str, Any]] = {
    "none": {},
    "flip and crop": {"horizontal_flip": 0.5, "crop": 0.125, "padding": "reflection"},
    "colour": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2},
    "mixing": {"mixup": 0.2, "cutmix": 1.0},
}


class Waits(TorchDispatchMode):
    """Notes every operation for which the CPU waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        kinds = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        copies = "copy" in func.name() and len(kinds) > 1 and not self._non_blocking(func, args, kwargs)
        reads = "cuda" in kinds and any(word in func.name() for word in ("_local_scalar_dense", "nonzero"))
        if copies or reads:
            self.found.append(func.name())
        return out

    @staticmethod
    def _non_blocking(func: Any, args: Any, kwargs: Any) -> bool:
        names = [argument.name for argument in func._schema.arguments]
        return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("non_blocking"))


def waits(cfg: Augment) -> list[str]:
    """What a second batch waits for."""
    augmenter = Augmenter(cfg, [0.5, 0.4, 0.3], [0.2, 0.2, 0.2])
    host = torch.from_numpy(augmenter.shape_draws(order.draws(0, 0, 0, 16, DRAWS)))
    watch = Waits()
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(16, 32, 32, 3, dtype=torch.uint8, device="cuda")
        labels = torch.empty(16, dtype=torch.int64, device="cuda")
        numbers = torch.empty(16, DRAWS, dtype=torch.float64, device="cuda")
        augmenter.mix(augmenter(images, numbers, host), labels, numbers)
        with watch:
            x, _, _ = augmenter.mix(augmenter(images, numbers, host), labels, numbers)
    assert x.device.type == "cuda"
    return watch.found


@pytest.fixture(autouse=True)
def no_fakes_stay() -> Any:
    """Constants are made once a device: no fake one must reach another test."""
    caches = (constants.constant, colour._yuv)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_augmentation_never_waits_for_the_device(recipe):
    assert waits(Augment(**recipe)) == []


def test_a_constant_is_made_once():
    one, other = (constants.constant((1.0, 2.0), torch.float32, torch.device("cpu")) for _ in range(2))
    assert one is other
    assert np.array_equal(one, [1, 2])


def test_a_constant_made_inside_inference_serves_training_too():
    with torch.inference_mode():
        two = constants.constant((2.0,), torch.float32, torch.device("cpu"))
    weight = torch.ones(1, requires_grad=True)
    (two * weight).sum().backward()
    assert weight.grad == 2
