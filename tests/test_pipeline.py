"""Networks cut into stages: the parts together are the whole, of balanced cost, and train as the whole does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from test_parallel import TOLERANCE, furthest, network, train_as, weights
from torch import multiprocessing, nn

from raydeep.config import Scaling, Train
from raydeep.data.batches import Micro
from raydeep.errors import ModelError, TrainError
from raydeep.model import zoo
from raydeep.train import losses, parallel, stages

NETWORKS = {
    "seed": lambda: zoo.build("seed", {"width": 8}, 10, (32, 32, 3)),
    "resnet20": lambda: zoo.build("resnet20", {}, 10, (32, 32, 3)),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
    "densenet121": lambda: torchvision.models.densenet121(num_classes=10),
}


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(1, 4))
def test_the_dearest_part_is_as_cheap_as_can_be(costs, parts):
    if parts > len(costs):
        return

    def dearest(cuts: tuple[int, ...]) -> int:
        return max(sum(costs[a:b]) for a, b in pairwise([0, *cuts, len(costs)]))

    found = stages.balance(costs, parts)
    assert len(found) == parts - 1
    assert found == sorted(set(found))
    assert all(0 < cut < len(costs) for cut in found)
    assert dearest(tuple(found)) == min(map(dearest, combinations(range(1, len(costs)), parts - 1)))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("count", [2, 4])
def test_the_stages_together_are_the_network(name, count):
    torch.manual_seed(0)
    net = NETWORKS[name]()
    keys = list(net.state_dict())
    x = torch.rand(3, 3, 32, 32)
    parts = stages.cut(net, (3, 3, 32, 32), count)
    assert len(parts) == count
    assert net.training
    for part, following in pairwise(parts):
        assert [v.shape for v in part.outputs] == [v.shape for v in following.inputs]
    together = [key for part in parts for key in part.module.state_dict()]
    assert sorted(together) == sorted(keys)
    for part in parts:
        part.module.eval()
    value: tuple[torch.Tensor, ...] = (x,)
    for part in parts:
        assert [v.shape for v in value] == [v.shape for v in part.inputs]
        out = part.module(*value)
        value = out if isinstance(out, tuple) else (out,)
    net.eval()
    with torch.no_grad():
        assert torch.equal(value[0], net(x))


def test_stages_are_of_about_equal_cost():
    costs = [part.cost for part in stages.cut(NETWORKS["resnet20"](), (8, 3, 32, 32), 3)]
    assert max(costs) < 1.25 * sum(costs) / 3


def test_cut_points_name_where_stages_begin():
    net = NETWORKS["resnet20"]()
    parts = stages.cut(net, (2, 3, 32, 32), 3, ["blocks.3", "blocks.5"])
    blocks = [{".".join(key.split(".")[:2]) for key in part.module.state_dict()} for part in parts]
    assert blocks[1] == {"blocks.3", "blocks.4"}
    assert "blocks.2" in blocks[0]
    assert "blocks.5" in blocks[2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["layer9"], "the network runs no module layer9; near: "),
        (["4", "2.0"], "not in the order in which the network runs"),
        (["2.0.norm"], "can't be cut before 2.0.norm: more than a tensor crosses"),
    ],
)
def test_wrong_cut_points_are_named(names, message):
    net = network("norms")
    net = nn.Sequential(net[0], nn.ReLU(), *net[1:]).float()
    with pytest.raises(ModelError, match=message):
        stages.cut(net, (2, 1, 8, 8), len(names) + 1, names)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1)) if x.sum() > 0 else self.layer(x.flatten(1) * 2)


class Twice(nn.Module):
    """One layer is run at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(self.layer(x.flatten(1)).relu()))


def test_a_network_that_can_not_be_traced_is_refused_with_what_works():
    with pytest.raises(ModelError, match=r"can't be traced.*use scaling.strategy ddp or fsdp"):
        stages.cut(Branching(), (2, 1, 4, 4), 2)


def test_a_shared_layer_stays_in_one_stage():
    first, second = stages.cut(Twice(), (2, 1, 4, 4), 2)
    assert not set(first.module.state_dict()) & set(second.module.state_dict())


class Shared(nn.Module):
    """The weight of the first layer is used again after the second, by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.linear(self.middle(self.first(x.flatten(1))), self.first.weight))


def test_a_shared_weight_stays_in_one_stage_and_an_unused_one_keeps_its_name():
    first, second = (set(part.module.state_dict()) for part in stages.cut(Shared(), (2, 1, 4, 4), 2))
    assert not first & second
    assert first | second == set(Shared().state_dict())


def test_a_layer_under_two_names_is_not_cut_apart():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    net[3].weight = net[1].weight
    with pytest.raises(ModelError, match="can be cut in 0 places"):
        stages.cut(net, (2, 1, 4, 4), 2)


class Noisy(nn.Module):
    """A block whose traced form would depend on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.layer(x), 0.5, self.training)


def test_what_differs_between_training_and_evaluation_follows_the_mode():
    depth = torchvision.ops.StochasticDepth(0.5, "row")
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), depth, Noisy(), nn.Linear(16, 3))
    first, second = (part.module for part in stages.cut(net, (64, 1, 4, 4), 2))
    x = torch.rand(64, 1, 4, 4)
    assert not torch.equal(second(first(x)), second(first(x)))
    for module in (net, first, second):
        module.eval()
    assert torch.equal(second(first(x)), net(x))


class Unruly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.dropout(self.layer(x.flatten(1)), 0.5, self.training))


def test_a_network_that_itself_differs_between_the_modes_is_refused():
    net = Unruly().eval()
    with pytest.raises(ModelError, match="dropout is not the same in training and evaluation"):
        stages.cut(net, (2, 1, 4, 4), 2)
    assert not any(module.training for module in net.modules())


class Streams(nn.Module):
    """Two streams: a single tensor crosses at the ends only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.one, self.other = (nn.ModuleList(nn.Linear(16, 16) for _ in range(4)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = y = self.first(x.flatten(1))
        for one, other in zip(self.one, self.other, strict=True):
            x, y = one(x) + y, other(y)
        return x * y


def test_more_than_a_tensor_crosses_where_the_stages_need_it():
    parts = stages.cut(Streams(), (2, 1, 4, 4), 4)
    assert max(len(part.outputs) for part in parts) == 2
    assert all(next(part.module.parameters(), None) is not None for part in parts)


@pytest.mark.parametrize("names", [["1"], ["4"]])
def test_a_stage_without_parameters_is_refused(names):
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3), nn.ReLU())
    with pytest.raises(ModelError, match="a stage would have no parameters to train"):
        stages.cut(net, (2, 1, 4, 4), 2, names)
    parts = stages.cut(net, (2, 1, 4, 4), 2)
    assert all(list(part.module.parameters()) for part in parts)


def test_more_stages_than_places_are_refused():
    with pytest.raises(ModelError, match=r"scaling.stages 9: the network can be cut in \d places"):
        stages.cut(Twice(), (2, 1, 4, 4), 9)


# more workers than two: one spawn, since each costs seconds

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {  # name → (workers, train keys, scaling keys)
    "three stages": (3, {"accumulate": 4}, {}),
    "two replicas of two stages": (4, {"accumulate": 2}, {"stages": 2}),
    "two replicas, gpipe": (4, {"accumulate": 4}, {"stages": 2, "pipeline_schedule": "gpipe"}),
}
ROWS = (1, 8, 11)  # of predictions: a pipeline holds 8 a replica


def scaling(world: int, keys: dict[str, Any]) -> dict[str, Any]:
    return {"strategy": "pipeline", "workers": world, **keys}


def residual() -> nn.Module:
    torch.manual_seed(0)
    return zoo.build("resnet8", {"width": 4}, 5, (8, 8, 3)).double()


def images(rows: int, channels: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, channels, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def micros(channels: int, seed: int, sizes: Sequence[int] = (4, 4)) -> list[Micro]:
    return [
        Micro(images(rows, channels, seed + i), torch.arange(rows) % 5, rows) for i, rows in enumerate(sizes)
    ]  # fmt: skip


def half() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def two_by_two(rank: int) -> dict[str, Any]:
    """What one of four workers finds: predictions around a step, whose replicas take different pictures."""
    strategy = parallel.strategy(Scaling.model_validate(scaling(4, {"stages": 2})))
    cfg, loss = Train(batch_size=16, accumulate=2, precision="bfloat16"), losses.cross_entropy()
    part = strategy.prepare(residual(), cfg, (3, 8, 8))
    found: dict[str, Any] = {"at": (strategy.data_rank, strategy.data_world)}
    part.eval()
    found["before"] = [strategy.predict(images(rows, 3, rows)) for rows in ROWS]
    part.train()
    mine = micros(3, 2 * strategy.data_rank)
    found["loss"] = strategy.backward(mine, loss, 16, nullcontext)
    found["gradients"] = {name: p.grad.clone() for name, p in part.named_parameters() if p.grad is not None}
    found["finite"] = strategy.finite()
    strategy.clip(0.01)
    found["clipped"] = {name: p.grad.clone() for name, p in part.named_parameters() if p.grad is not None}
    if rank == 1:
        next(p for p in part.parameters() if p.grad is not None).grad[:] = torch.nan  # type: ignore[index]
    found["still finite"] = strategy.finite()
    strategy.sync_buffers()
    part.eval()
    found["after"] = [strategy.predict(images(rows, 3, rows)) for rows in ROWS]
    found["state"] = {name: value.clone() for name, value in part.state_dict().items()}
    try:
        strategy.backward(micros(3, 0, (6, 2)), loss, 16, nullcontext)
    except TrainError as err:
        found["error"] = str(err)
    return found | in_bfloat16()


def in_bfloat16() -> dict[str, Any]:
    """Gradients with and without autocast, and predictions after it; in float32, as autocast leaves float64 alone."""
    strategy = parallel.strategy(Scaling.model_validate(scaling(4, {"stages": 2})))
    part = strategy.prepare(residual().float(), Train(batch_size=16, accumulate=2, precision="bfloat16"), (3, 8, 8))
    part.eval()  # BatchNorm stays as it is
    gradients = []
    for precision in (nullcontext, half):
        part.zero_grad()
        mine = [micro._replace(images=micro.images.float()) for micro in micros(3, 0)]
        strategy.backward(mine, losses.cross_entropy(), 16, precision)
        gradients.append({name: p.grad.clone() for name, p in part.named_parameters() if p.grad is not None})
    return {"off by": furthest(*gradients), "in float32": strategy.predict(images(8, 3, 8).float())}


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for world in (4, 3):
        if rank < world:
            meeting = f"file://{folder}/rendezvous-{world}"
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
            for name, (workers, train, keys) in LAYOUTS.items():
                if workers == world:
                    train_as("plain", train, scaling(world, keys), folder / name)
            if world == 4:
                torch.save(two_by_two(rank), folder / f"{rank}.pt")
            dist.barrier()
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the workers left."""
    folder = tmp_path_factory.mktemp("pipeline")
    multiprocessing.spawn(worker, args=(folder,), nprocs=4)  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="module")
def found(four: Path) -> list[dict[str, Any]]:
    return [torch.load(four / f"{rank}.pt") for rank in range(4)]


@pytest.fixture(scope="module")
def whole() -> tuple[nn.Module, float]:
    """One process: the residual network with the gradient of the step, and its loss; BatchNorm a micro-batch."""
    net = residual()
    total = 0.0
    for micro in micros(3, 0) + micros(3, 2):
        part = losses.cross_entropy()(net(micro.images), micro).sum() / 16
        part.backward()
        total += part.item()
    return net, total


@pytest.mark.parametrize("name", LAYOUTS)
def test_more_workers_train_as_one(tmp_path, four, name):
    world, train, _ = LAYOUTS[name]
    train_as("plain", train, {}, tmp_path)
    assert furthest(weights(tmp_path), weights(four / name)) < TOLERANCE
    files = list((four / name / "step-000000006").glob("*.safetensors"))
    assert 1 < len(files) <= world


def test_workers_are_replicas_of_stages(found):
    assert [f["at"] for f in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    states = [f["state"].keys() for f in found]
    assert states[:2] == states[2:]
    assert sorted([*states[0], *states[1]]) == sorted(residual().state_dict())


def test_a_step_has_the_gradient_and_the_loss_of_the_whole(found, whole):
    net, loss = whole
    assert sum(f["loss"].item() for f in found) == pytest.approx(loss, abs=1e-12)
    assert [f["loss"].item() for f in found[::2]] == [0, 0]
    expected = {name: p.grad for name, p in net.named_parameters()}
    for replica in (found[:2], found[2:]):
        assert furthest(replica[0]["gradients"] | replica[1]["gradients"], expected) < 1e-12


def test_the_gradient_is_clipped_over_the_stages(found, whole):
    before = torch.cat([p.grad.flatten() for p in whole[0].parameters()]).norm()
    for f in found:
        assert furthest(f["clipped"], {k: g * (0.01 / (before + 1e-6)) for k, g in f["gradients"].items()}) < 1e-12


def test_one_stage_that_is_not_finite_is_heard_of_by_all(found):
    assert [f["finite"] for f in found] == [True] * 4
    assert [f["still finite"] for f in found] == [False] * 4


@pytest.mark.parametrize("when", ["before", "after"])
def test_every_worker_predicts_as_the_whole_network(found, when):
    net = residual().eval()
    if when != "before":
        net.load_state_dict(found[0]["state"] | found[1]["state"])
        assert not torch.equal(net.bn1.running_mean, residual().bn1.running_mean)
    for i, rows in enumerate(ROWS):
        with torch.no_grad():
            expected = net(images(rows, 3, rows))
        for f in found:
            assert f[when][i].shape == expected.shape
            assert (f[when][i] - expected).abs().max() < 1e-12


def test_autocast_is_for_training_only(found):
    with torch.no_grad():
        expected = residual().float().eval()(images(8, 3, 8).float())
    for f in found:
        assert 1e-4 < f["off by"] < 1
        assert (f["in float32"] - expected).abs().max() < 1e-6


def test_micro_batches_of_other_sizes_are_refused(found):
    for f in found:
        assert "needs 2 micro-batches of 4 rows, found [6, 2]: make train.batch_size a multiple" in f["error"]
