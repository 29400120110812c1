"""What workers agree on beside gradients: checkpoints, ends, storage, who is stuck and whose loss is not finite."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from raydeep.config import Augment, Train
from raydeep.data.augment import Augmenter
from raydeep.data.batches import Batches
from raydeep.data.resident import Pixels
from raydeep.errors import TrainError
from raydeep.train import control, losses
from raydeep.train.control import Control, Votes, Watch, Wish
from raydeep.train.loop import fit
from raydeep.train.saver import Saver
from raydeep.train.worker import probe

CFG = Train(epochs=1, batch_size=8, lr=0.05, precision="float32")


class Poisoned(nn.Module):
    """A network whose loss is NaN on one worker at one step."""

    def __init__(self, rank: int | None, step: int = 2) -> None:
        super().__init__()
        self.layer, self.rank, self.step = nn.Linear(16, 3), rank, step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x.flatten(1))
        if self.training:
            self.step -= 1
            if self.step == -1 and self.rank in (None, dist.get_rank()):
                out = out * float("nan")
        return out


def batches(rank: int, world: int) -> Batches:
    numbers = np.random.default_rng(0)
    data = Pixels(numbers.integers(0, 256, (40, 4, 4, 1), np.uint8), numbers.integers(0, 3, 40))
    return Batches(data, Augmenter(Augment(), [0.3], [0.4]), 8, 7, rank=rank, world=world)


def poisoned(folder: Path, rank: int, who: int | None) -> str:
    torch.manual_seed(0)
    mine = Control(origins=lambda rows: [f"picture {row}" for row in rows])
    with pytest.raises(TrainError) as caught:
        fit(Poisoned(who), losses.cross_entropy(), batches(rank, 2), CFG, control=mine)
    return str(caught.value)


def worker(rank: int, folder: Path) -> None:
    """One of two processes; leaves what it saw."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    seen: dict[str, Any] = {}
    votes = Votes()
    casts = [Wish(save=rank == 1), Wish(), Wish(failed=rank == 0), Wish(), Wish()]
    seen["votes"] = [tuple(votes.cast(wish)) for wish in casts]
    seen["now"] = tuple(votes.now(Wish(leave=rank == 1)))
    seen["one"] = poisoned(folder, rank, 1)
    seen["all"] = poisoned(folder, rank, None)
    (folder / "shared").mkdir(exist_ok=True)
    if rank == 1:
        (folder / "shared" / ".probe-1-0a0b0c0d").touch()  # of an attempt that was killed while it looked
    probe(folder / "shared", votes, f"node{rank}")
    votes.gather(None)  # both have tidied up
    seen["left"] = [path.name for path in (folder / "shared").iterdir()]
    with pytest.raises(TrainError) as caught:
        probe(folder / f"own{rank}", votes, f"node{rank}")
    seen["unshared"] = str(caught.value)

    class Full(Saver):
        def _write(self, *_: Any) -> None:
            self.error = "the disk of rank 0 is full"

    saver = (Full if rank == 0 else Saver)(folder / "full", sharded=False)
    torch.manual_seed(0)
    cfg = CFG.model_copy(update={"checkpoint_steps": 1})
    with pytest.raises(TrainError) as caught:
        fit(Poisoned(7), losses.cross_entropy(), batches(rank, 2), cfg, saver=saver)
    seen["full"] = str(caught.value)
    wishes, told = iter([Wish()]), Wish(leave=rank == 1)
    leaver = Control(wishes=lambda: next(wishes, told))
    saver = Saver(folder / "leave")
    try:
        fit(Poisoned(7), losses.cross_entropy(), batches(rank, 2), CFG, saver=saver, control=leaver)
        seen["left early"] = False
    except SystemExit:
        seen["left early"] = True
    except RuntimeError as err:  # the other one is gone
        seen["left early"] = str(err)[:40]
    seen["saved"] = sorted(path.name for path in (folder / "leave").glob("step-*"))
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
    os._exit(0)  # the group of a worker that left can't be taken down in order


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("control")
    multiprocessing.spawn(worker, args=(folder,), nprocs=2)  # type: ignore[attr-defined]
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in (0, 1)]


def test_votes_are_heard_by_all_one_step_later(seen):
    nothing, save, failed = ([*Wish()], [*Wish(save=True)], [*Wish(failed=True)])
    for worker in seen:
        assert worker["votes"] == [nothing, save, nothing, failed, nothing]
        assert worker["now"] == [*Wish(leave=True)]


def test_a_loss_that_is_not_finite_on_one_worker_names_it_and_its_pictures(seen):
    rows = batches(1, 2).rows(0, 2)
    for worker in seen:
        assert worker["one"].startswith("the loss is not finite at epoch 1, step 3: ")
        names = ", ".join(f"picture {row}" for row in rows)
        assert worker["one"].endswith(f"Only rank 1 of 2 has such a loss; its batch: {names}")


def test_a_loss_that_is_not_finite_on_all_workers_blames_none(seen):
    for worker in seen:
        assert "step 3" in worker["all"]
        assert "Only" not in worker["all"]


def test_storage_that_is_not_shared_is_refused_on_all_workers(seen):
    for rank, worker in enumerate(seen):
        assert worker["left"] == []
        assert f"own{rank} is not shared by all nodes: node0 does not see what node1 writes" in worker["unshared"]
        assert "set storage=FOLDER" in worker["unshared"]


def test_a_checkpoint_that_fails_on_one_worker_stops_all_with_its_error(seen):
    assert [worker["full"] for worker in seen] == ["the disk of rank 0 is full"] * 2


def test_a_worker_that_is_told_to_leave_does_so_after_a_checkpoint(seen):
    assert seen[1]["left early"] is True
    assert seen[0]["left early"] is not True
    assert seen[1]["saved"] == ["step-000000003"]


# one process


def stall(folder: Path, timeout_s: float) -> list[int]:
    ended: list[int] = []
    over = threading.Event()

    def end(code: int) -> None:
        ended.append(code)
        over.set()

    watch = Watch(folder, timeout_s, "here", end)
    watch.at("waits for the others", 41)
    if not over.wait(10):
        watch.close()
    return ended


def test_a_stall_says_who_waits_where(tmp_path):
    silent = {
        "rank": 1, "node": "there", "pid": 7, "stage": "computes", "step": 40, "idle_s": 0.1, "time": time.time() - 60
    }  # fmt: skip
    (tmp_path / "rank-1.json").write_text(json.dumps(silent))
    assert stall(tmp_path, 0.2) == [75]
    said = control.say_stall(json.loads((tmp_path / "stalled.json").read_text()))
    lines = said.splitlines()
    assert lines[0].startswith("no training step was done for 0.2 s (scaling.stall_timeout_s)")
    assert f"rank 0 (here, process {os.getpid()}), step 41: waits for the others, at " in lines[1]
    assert "threading.py" in lines[1]
    assert "in wait" in lines[1]
    assert lines[2].startswith("  rank 1 (there, process 7) does not answer: last heard of 6")


def test_steps_that_are_done_keep_the_watch_quiet(tmp_path):
    ended: list[int] = []
    watch = Watch(tmp_path, 0.4, "here", ended.append)
    for step in range(8):
        time.sleep(0.1)
        watch.at("computes", step)
    watch.close()
    assert ended == []
    assert not (tmp_path / "stalled.json").exists()


def test_the_step_that_was_reached_is_known_to_the_next_attempt(tmp_path):
    watch = Watch(tmp_path, 60)
    assert watch.before == 0
    watch.at("computes", 123_456)
    watch.close()
    again = Watch(tmp_path, 60)
    again.close()
    assert again.before == 123_456


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match=r"storage .*file/deep: node0 can't write there: Not a directory; free space"):
        probe(tmp_path / "file" / "deep", Votes(), "node0")
