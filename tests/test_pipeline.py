"""Networks cut into stages: the parts together are the whole, of balanced cost, and train as the whole does."""

from __future__ import annotations

import os
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from test_parallel import TOLERANCE, furthest, network, train_as, weights
from torch import multiprocessing, nn

from raydeep.errors import ModelError
from raydeep.model import zoo
from raydeep.train import stages

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


def test_more_stages_than_places_are_refused():
    with pytest.raises(ModelError, match=r"scaling.stages 9: the network can be cut in \d places"):
        stages.cut(Twice(), (2, 1, 4, 4), 9)


# more workers than two

LARGER = {
    "three stages": ({"accumulate": 4}, {"strategy": "pipeline", "workers": 3}),
    "two replicas of two stages": ({"accumulate": 2}, {"strategy": "pipeline", "workers": 4, "stages": 2}),
}


def worker(rank: int, folder: Path, case: str, world: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/{case} rendezvous", rank=rank, world_size=world)
    train_as("plain", *LARGER[case], folder / case)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(("case", "world"), [("three stages", 3), ("two replicas of two stages", 4)])
def test_more_workers_train_as_one(tmp_path, case, world):
    train_as("plain", *LARGER[case], tmp_path / "alone")
    multiprocessing.spawn(worker, args=(tmp_path, case, world), nprocs=world)  # type: ignore[attr-defined]
    assert furthest(weights(tmp_path / "alone"), weights(tmp_path / case)) < TOLERANCE
    files = list((tmp_path / case / "step-000000006").glob("*.safetensors"))
    assert 1 < len(files) <= world
