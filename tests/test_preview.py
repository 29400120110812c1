"""The contact sheet: its pictures are those of a training, its captions say what they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from raydeep.config import Augment
from raydeep.data import order, preview
from raydeep.data.augment import DRAWS, Augmenter

CLASSES = ["cat", "dog", "a name far too long to stand under a picture of its size"]
LABELS = np.array([0, 1, 2])


def pictures(height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, height, width, channels), np.uint8)


def sheet(cfg: Augment, images: np.ndarray, columns: int = 3) -> Image.Image:
    channels = images.shape[-1]
    augmenter = Augmenter(cfg, [0.3] * channels, [0.2] * channels)
    return preview.contact_sheet(images, LABELS, CLASSES, augmenter, seed=5, columns=columns)


def holds(found: Image.Image, picture: np.ndarray, scale: int) -> bool:
    """Whether a picture stands on the sheet, enlarged, to the pixel."""
    if picture.shape[-1] == 1:
        picture = picture.repeat(3, 2)
    wanted = np.kron(picture, np.ones((scale, scale, 1), np.uint8))
    height, width = wanted.shape[:2]
    pixels = np.asarray(found)
    starts = np.argwhere((pixels == wanted[0, 0]).all(2))
    return any(np.array_equal(pixels[y : y + height, x : x + width], wanted) for y, x in starts)


@pytest.mark.parametrize(("height", "width", "channels", "scale"), [(8, 8, 3, 20), (20, 10, 1, 8), (170, 200, 3, 1)])
def test_originals_and_augmented_pictures_stand_on_the_sheet(height, width, channels, scale):
    images, cfg = pictures(height, width, channels), Augment(horizontal_flip=0.5, crop=0.25)
    found = sheet(cfg, images)
    assert found.mode == "RGB"
    assert all(holds(found, picture, scale) for picture in images)
    augmenter = Augmenter(cfg, [0.0] * channels, [1.0] * channels)
    for epoch in range(2):
        numbers = torch.from_numpy(order.draws(5, epoch, 0, 3, DRAWS))
        unit = augmenter(torch.from_numpy(images), numbers).permute(0, 2, 3, 1).numpy()
        assert all(holds(found, picture, scale) for picture in (unit * 255).round().astype(np.uint8))


def test_the_sheet_is_the_same_each_time_and_wider_with_more_columns():
    images, cfg = pictures(8, 8, 3), Augment(policy="trivialaugment", mixup=0.4, cutmix=1.0)
    assert sheet(cfg, images).tobytes() == sheet(cfg, images).tobytes()
    assert sheet(cfg, images, 6).width > sheet(cfg, images, 2).width
    assert sheet(cfg, images, 1).height == sheet(cfg, images, 6).height


def test_captions_name_both_classes_of_a_mixed_picture():
    own, other = torch.tensor([0, 1, 0, 1, 0, 2]), torch.tensor([1, 0, 1, 0, 0, 2])
    weight = torch.tensor([0.62, 0.31, 0.97, 0.01, 0.5, 1.0])
    found = preview._captions(own, other, weight, ["cat", "dog", "bird"])
    assert found == ["cat 0.6 + dog 0.4", "dog 0.3 + cat 0.7", "cat", "cat", "cat", "bird"]
    assert preview._captions(own, None, None, ["cat", "dog", "bird"]) == [""] * 6


def test_the_pictures_that_come_in_may_be_read_only():
    images = pictures(8, 8, 3)
    images.flags.writeable = False
    assert sheet(Augment(erasing=1), images).width > 0
