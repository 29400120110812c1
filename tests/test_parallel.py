"""However the training is spread over workers, it is the same training: float64 parity, and checkpoints that travel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from raydeep.config import Augment, Scaling, Train
from raydeep.data.augment import Augmenter
from raydeep.data.batches import Batches, Micro, eval_batches
from raydeep.data.resident import Pixels
from raydeep.model import zoo
from raydeep.train import checkpoint, fsdp, losses, parallel
from raydeep.train.loop import fit
from raydeep.train.metrics import Score, evaluate
from raydeep.train.saver import Saver

TOLERANCE = 1e-9
ROWS, BATCH, STEPS = 101, 16, 6
CFG = Train(epochs=1, batch_size=BATCH, lr=0.05, precision="float32", clip_norm=0.5, checkpoint_steps=3)
LOSS = losses.cross_entropy(0.1)

# name → (network, train keys, scaling keys) of a run on two workers
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddp": ("plain", {}, {}),
    "ddp, accumulation": ("plain", {"accumulate": 3}, {}),
    "ddp, averaged weights": ("plain", {"ema": 0.9}, {}),
    "ddp, muon": ("plain", {"optimizer": "muon"}, {}),
    "ddp, SyncBatchNorm": ("norms", {}, {"sync_batchnorm": True}),
    "pipeline, 1f1b": ("plain", {"accumulate": 4}, {"strategy": "pipeline"}),
    "pipeline, gpipe": ("plain", {"accumulate": 2}, {"strategy": "pipeline", "pipeline_schedule": "gpipe"}),
    "pipeline, adamw": ("plain", {"accumulate": 4, "optimizer": "adamw", "ema": 0.9}, {"strategy": "pipeline"}),
    "fsdp": ("plain", {}, {"strategy": "fsdp"}),
    "fsdp, accumulation": ("plain", {"accumulate": 3}, {"strategy": "fsdp"}),
    "fsdp, adamw, averaged weights": ("plain", {"optimizer": "adamw", "ema": 0.9}, {"strategy": "fsdp"}),
}


class Double(Batches):
    """Batches in float64."""

    def _micro(self, *parts: Any) -> Micro:
        micro = super()._micro(*parts)
        return micro._replace(images=micro.images.double())


class Block(nn.Module):
    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.Sequential(Block(7, kind == "norms"), Block(7, kind == "norms"))  # 7: no multiple of the workers
    net = nn.Sequential(nn.Conv2d(1, 7, 3), blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(28, 5))
    return net.double()


def pixels() -> Pixels:
    numbers = np.random.default_rng(0)
    return Pixels(numbers.integers(0, 256, (ROWS, 8, 8, 1), np.uint8), numbers.integers(0, 5, ROWS))


def train(case: str, folder: Path, resume: Path | None = None) -> list[dict[str, Any]]:
    """Train a case as `train_as` does."""
    return train_as(*CASES[case], folder, resume)


def train_as(
    kind: str, keys: dict[str, Any], scaling: dict[str, Any], folder: Path, resume: Path | None = None
) -> list[dict[str, Any]]:
    """Train on the process group that is there; leaves checkpoints of steps 3 and 6 in `folder`."""
    cfg, data = CFG.model_copy(update=keys), pixels()
    strategy = parallel.strategy(Scaling.model_validate({"workers": 2, **scaling}))
    rank, world = strategy.data_rank, strategy.data_world

    def score(strategy: parallel.Strategy) -> Score:
        part = eval_batches(data, [0.3], [0.4], 17, rank, world)  # 3 batches of rank 0's rows, 3 of rank 1's
        return evaluate(strategy, (m._replace(images=m.images.double()) for m in part), ROWS)

    batches = Double(
        data, Augmenter(Augment(mixup=0.2), [0.3], [0.4]), BATCH, 7, rank=rank, world=world, accumulate=cfg.accumulate
    )
    saver = Saver(folder, sharded=strategy.sharded)
    before = checkpoint.load(resume) if resume is not None else None
    return fit(
        network(kind), LOSS, batches, cfg, strategy=strategy, evaluate=score, saver=saver, resume=before,
    )  # fmt: skip


def worker(rank: int, folder: Path) -> None:
    """One of two processes, joined by gloo over the loopback interface."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for case in CASES:
        history = train(case, folder / "two" / case)
        torch.save(history, folder / f"{case}-{rank}.pt")
        train(case, folder / "from one" / case, resume=folder / "one" / case / "step-000000003")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each case trained by one process and by two, and by each from the other's checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("parallel")
    for case in CASES:
        torch.save(train(case, folder / "one" / case), folder / f"{case}-alone.pt")
    multiprocessing.spawn(worker, args=(folder,), nprocs=2)  # type: ignore[attr-defined]
    for case in CASES:
        train(case, folder / "from two" / case, resume=folder / "two" / case / "step-000000003")
    return folder


def weights(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / f"step-{step:09d}", check=True).weights()


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


@pytest.mark.parametrize("case", CASES)
def test_two_workers_train_as_one(trained, case):
    alone, both = weights(trained / "one" / case), weights(trained / "two" / case)
    assert furthest(alone, both) < TOLERANCE
    moved = {k: v for k, v in network(CASES[case][0]).state_dict().items() if v.is_floating_point()}
    assert furthest({k: alone[k] for k in moved}, moved) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_two_workers_tell_the_same_as_one(trained, case):
    alone, *both = (torch.load(trained / f"{case}-{who}.pt") for who in ("alone", 0, 1))
    for history in both:
        for row, other in zip(history, alone, strict=True):
            assert row["train_loss"] == pytest.approx(other["train_loss"], abs=TOLERANCE)
            assert row["val_loss"] == pytest.approx(other["val_loss"], abs=1e-6)  # evaluated in float32
            assert row["val_accuracy"] == other["val_accuracy"]
            assert row["order_hash"] == other["order_hash"]
            assert (row["workers"], other["workers"]) == (2, 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["from one", "from two"])
def test_a_checkpoint_goes_on_at_another_number_of_workers(trained, case, way):
    assert furthest(weights(trained / way / case), weights(trained / "one" / case)) < TOLERANCE


def test_accumulation_is_the_same_training(trained):
    assert furthest(weights(trained / "one" / "ddp"), weights(trained / "one" / "ddp, accumulation")) < TOLERANCE


@pytest.mark.parametrize("case", ["fsdp", "pipeline, 1f1b"])
def test_a_partitioned_model_is_checkpointed_in_parts(trained, case):
    files = sorted((trained / "two" / case / "step-000000006").glob("*.safetensors"))
    assert len(files) == 2
    assert all(file.stat().st_size < 0.8 * sum(other.stat().st_size for other in files) for file in files)
    assert len(list((trained / "two" / "ddp" / "step-000000006").glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("name", "count"), [("resnet20", 9), ("torchvision:vit_b_16", 12), ("torchvision:mobilenet_v3_small", 13)]
)
def test_networks_are_sharded_by_block(name, count):
    if name.startswith("torchvision:"):
        import torchvision

        net = getattr(torchvision.models, name.removeprefix("torchvision:"))(weights=None, num_classes=10)
    else:
        net = zoo.build(name, {}, 10, (32, 32, 3))
    assert len(fsdp.blocks(net)) == count


@pytest.mark.parametrize("mean", [3.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batchnorm_over_workers_bears_large_means(mean, dtype):
    """One worker of one: torch's own result."""
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(4)
    mine = parallel.sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4)), torch.device("cpu"))
    x = (torch.randn(16, 4, 5, 5) + mean).to(dtype)
    found, wanted = mine(x), theirs(x.float())
    assert found.dtype == dtype
    assert (found.float() - wanted).abs().max() < (0.02 if dtype == torch.bfloat16 else 1e-3)
    assert torch.allclose(mine[0].running_var, theirs.running_var, rtol=1e-3)


def test_a_networks_batchnorm_is_replaced_under_the_same_names():
    net = network("norms")
    keys = list(net.state_dict())
    parallel.sync_batchnorm(net, torch.device("cpu"))
    assert list(net.state_dict()) == keys
    assert sum(type(module).__name__ == "_SyncBatchNorm" for module in net.modules()) == 2
