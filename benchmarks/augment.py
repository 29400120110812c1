"""Augmentation throughput against Kornia's and torchvision's own pipelines, and how far the pixels are apart.

All peers start from one uint8 batch and end with normalised float32, with parameters drawn a sample, on one thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from PIL import Image, ImageOps

from raydeep.config import Augment
from raydeep.data import colour, geometry, order
from raydeep.data.augment import DRAWS, Augmenter, to_input

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
DEGREES, SHEAR, TRANSLATE, SCALE, CROP = 15.0, 5.0, 0.05, (0.8, 1.2), 0.125
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.4, 0.1
FLIP = Augment(horizontal_flip=0.5)
AFFINE = Augment(rotation=DEGREES, shear=SHEAR, translate=TRANSLATE, scale=SCALE)
SHIFT = Augment(crop=CROP)
JITTER = Augment(brightness=BRIGHTNESS, contrast=CONTRAST, saturation=SATURATION, hue=HUE)
MOVES = AFFINE.model_copy(update={"horizontal_flip": 0.5, "crop": CROP})
ALL = MOVES.model_copy(
    update={"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}
)  # fmt: skip
SIZES = ((32, 256, 5.0), (224, 64, 4.0))  # side, batch, least ratio to Kornia


def photos(folder: Path, side: int, count: int) -> torch.Tensor:
    """The first photographs, spread over the classes: uint8 [count, side, side, 3]."""
    files = sorted((folder / "caltech101-10" / "train").glob("*/*.jpg"))
    files = files[:: max(1, len(files) // count)][:count]
    images = [ImageOps.fit(Image.open(f).convert("RGB"), (side, side), Image.Resampling.BILINEAR) for f in files]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels[torch.arange(count) % len(pixels)]


def in_turn(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Our own steps, one resample and one product for each instead of one for all."""
    side = images.shape[1]
    x = images
    for cfg in (FLIP, AFFINE, SHIFT):
        theta = geometry.normalised(geometry.affine(cfg, u, side, side), side, side)
        x = geometry.resample(x, theta, "zeros", projective=False).permute(0, 2, 3, 1)
    x = x.permute(0, 3, 1, 2) / 255
    for name in ("brightness", "contrast", "saturation", "hue"):
        x = colour.apply(x, colour.draw(Augment(**{name: getattr(JITTER, name)}), u, 3))
    return (x - x.new_tensor(MEAN).view(-1, 1, 1)) / x.new_tensor(STD).view(-1, 1, 1)


def kornia_pipeline(images: torch.Tensor) -> Callable[[], Any]:
    """Kornia's containers: the same operations, parameters a sample."""
    import kornia.augmentation as K

    side = images.shape[1]
    steps = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.RandomAffine(DEGREES, (TRANSLATE, TRANSLATE), SCALE, (-SHEAR, SHEAR, -SHEAR, SHEAR), p=1.0),
        K.RandomCrop((side, side), padding=int(side * CROP), p=1.0),
        K.ColorJitter(BRIGHTNESS, CONTRAST, SATURATION, HUE, p=1.0),
        K.Normalize(MEAN, STD),
        data_keys=["input"],
        same_on_batch=False,
    )
    return lambda: steps(images.permute(0, 3, 1, 2).contiguous().float().div_(255))


def torchvision_pipeline(images: torch.Tensor, policy: Any = None) -> Callable[[], torch.Tensor]:
    """torchvision.transforms.v2, a sample at a time, as a data loader does."""
    from torchvision.transforms import v2

    side = images.shape[1]
    moves = [
        v2.RandomHorizontalFlip(0.5),
        v2.RandomAffine(DEGREES, (TRANSLATE, TRANSLATE), SCALE, (-SHEAR, SHEAR, -SHEAR, SHEAR),
                        interpolation=v2.InterpolationMode.BILINEAR),
        v2.RandomCrop(side, padding=int(side * CROP)),
        v2.ColorJitter(BRIGHTNESS, CONTRAST, SATURATION, HUE),
    ]  # fmt: skip
    steps = v2.Compose(
        [*([policy] if policy else moves), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    )
    pictures = images.permute(0, 3, 1, 2).contiguous()
    return lambda: torch.stack([steps(picture) for picture in pictures])


def throughput(folder: Path, side: int, batch: int, least: float, rounds: int) -> list[dict[str, Any]]:
    """The ratios at one size."""
    import kornia.augmentation.auto as auto
    from torchvision.transforms import v2

    images = photos(folder, side, batch)
    u = torch.from_numpy(order.draws(0, 0, 0, batch, DRAWS))
    plain = images.permute(0, 3, 1, 2).contiguous().float()
    grid = torch.nn.functional.affine_grid(torch.eye(2, 3).repeat(batch, 1, 1), list(plain.shape), align_corners=True)
    space = torch.empty_like(plain)
    trivial = auto.TrivialAugment()

    def ours(cfg: Augment) -> Callable[[], torch.Tensor]:
        augmenter = Augmenter(cfg, MEAN, STD)
        return lambda: augmenter(images, u)

    peers: dict[str, Callable[[], Any]] = {
        "raydeep": ours(ALL),
        "kornia": kornia_pipeline(images),
        "torchvision a sample": torchvision_pipeline(images),
        "raydeep, each step in turn": lambda: in_turn(images, u),
        "one bilinear resample alone": lambda: torch.nn.functional.grid_sample(plain, grid, align_corners=True),
        "one copy of the float batch": lambda: space.copy_(plain),
        "raydeep flip + crop": ours(FLIP.model_copy(update={"crop": CROP})),
        "raydeep no augmentation": lambda: to_input(images, MEAN, STD),
        "raydeep trivialaugment": ours(Augment(policy="trivialaugment")),
        "raydeep randaugment": ours(Augment(policy="randaugment")),
        "raydeep autoaugment": ours(Augment(policy="autoaugment")),
        "torchvision trivialaugment": torchvision_pipeline(images, v2.TrivialAugmentWide()),
        "kornia trivialaugment, one for the batch": lambda: trivial(plain / 255),
    }
    times = harness.interleaved(peers, rounds, warmup=2)
    print(f"\n{side} px, batch {batch}, one thread, {rounds} rounds")
    at = f"{side} px"
    results = [
        harness.result(f"{at}: {name}", batch / timing.median_s, "images/s", spread=timing.spread, n=rounds)
        for name, timing in times.items()
    ]
    for name, slow, fast, target in (
        ("over Kornia's AugmentationSequential", "kornia", "raydeep", f">= {least}"),
        ("over torchvision.transforms.v2 a sample", "torchvision a sample", "raydeep", None),
        ("fused over each step in turn", "raydeep, each step in turn", "raydeep", None),
        ("share of one resample's speed", "one bilinear resample alone", "raydeep", None),
        ("trivialaugment over torchvision's", "torchvision trivialaugment", "raydeep trivialaugment", None),
    ):
        value, spread = harness.ratio(times[slow], times[fast])
        results.append(harness.result(f"{at}: {name}", value, "ratio", target, spread=spread, n=rounds))
    return results


def one_by_one(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Kornia's geometry, an operation at a time, with our parameters: float32 [B, C, H, W]."""
    import kornia.geometry.transform as warp

    rows, _, height, width = x.shape
    signed = (2 * u - 1).float()
    x = torch.where((u[:, 0] < 0.5)[:, None, None, None], warp.hflip(x), x)
    centre = torch.tensor([[(width - 1) / 2, (height - 1) / 2]]).expand(rows, 2)
    angles = signed[:, 14:16] * math.radians(SHEAR)
    x = warp.warp_affine(x, warp.get_shear_matrix2d(centre, angles[:, 0], angles[:, 1])[:, :2], (height, width))
    low, high = (math.log(v) for v in SCALE)
    x = warp.scale(x, torch.exp(low + (high - low) * u[:, 3]).float()[:, None].expand(-1, 2))
    x = warp.rotate(x, -signed[:, 2] * DEGREES)
    x = warp.translate(x, signed[:, 16:18] * TRANSLATE * torch.tensor([width, height]))
    shift = torch.round((2 * u[:, [8, 13]] - 1) * CROP * torch.tensor([width, height])).float()
    return warp.translate(x, shift)


def colours_one_by_one(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Kornia's colour operations, each of which cuts to [0, 1], with our parameters: float32 [B, 3, H, W]."""
    import kornia.enhance as enhance
    from kornia.color import rgb_to_yuv, yuv_to_rgb

    signed = (2 * u - 1).float()
    x = enhance.adjust_brightness_accumulative(x, 1 + BRIGHTNESS * signed[:, 9])
    x = enhance.adjust_contrast_with_mean_subtraction(x, 1 + CONTRAST * signed[:, 10])
    x = enhance.adjust_saturation_with_gray_subtraction(x, 1 + SATURATION * signed[:, 11])
    angle = 2 * math.pi * HUE * signed[:, 12, None, None]
    y, a, b = rgb_to_yuv(x).unbind(1)
    turned = [y, torch.cos(angle) * a - torch.sin(angle) * b, torch.sin(angle) * a + torch.cos(angle) * b]
    return yuv_to_rgb(torch.stack(turned, 1)).clamp(0, 1)


def tolerances(folder: Path, count: int) -> list[dict[str, Any]]:
    """How far our pixels are from Kornia's operations one after another, on photographs, in [0, 1]."""
    images = photos(folder, 224, count)
    u = torch.from_numpy(order.draws(1, 0, 0, count, DRAWS))
    x = images.permute(0, 3, 1, 2) / 255

    def ours(cfg: Augment, batch: torch.Tensor) -> torch.Tensor:
        return Augmenter(cfg, [0.0] * 3, [1.0] * 3)(batch, u)

    inside = one_by_one(torch.ones_like(x), u) > 0.9999
    moved = (ours(MOVES, images) - one_by_one(x, u)).abs()[inside].mean().item()
    changed = (ours(JITTER, images) - colours_one_by_one(x, u)).abs().mean().item()
    pale = images // 4 + 96  # nothing saturates: then the product is exact
    rounded = (ours(JITTER, pale) - colours_one_by_one(pale.permute(0, 3, 1, 2) / 255, u)).abs().max().item()
    print(f"\nmean absolute difference to Kornia's operations one by one, {count} photographs of 224 px, in [0, 1]")
    return [
        harness.result("geometry: one resample, not five (inside)", moved, "mean abs", "<= 0.03", n=count),
        harness.result("colour: cut to [0, 1] once, not four times", changed, "mean abs", "<= 0.01", n=count),
        harness.result("colour: nothing saturates, largest", rounded, "max abs", "<= 1e-05", n=count),
    ]


def main() -> None:
    """Run all of it."""
    args = harness.arguments(__doc__)
    folder = harness.data_folder(args, "caltech101-10")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = []
    for side, batch, least in SIZES:
        results += throughput(folder, side, batch, least, rounds=7 if args.quick else 25)
    results += tolerances(folder, 64 if args.quick else 256)
    harness.finish("augment", results, args, threads=1, data="caltech101-10 photographs, scaled and cropped")


if __name__ == "__main__":
    main()
