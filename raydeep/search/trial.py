"""What a trial does in its process: one rung of compression, or of training and compression. Knows no Ray."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
import traceback
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raydeep import mirror
from raydeep.config import Job
from raydeep.disk import read_json, write_bytes, write_json
from raydeep.errors import StorageError
from raydeep.search.work import Work, label

if TYPE_CHECKING:
    from raydeep.compress.common import Common
    from raydeep.compress.plan import Dense, Made
    from raydeep.compress.state import State
    from raydeep.data.resident import Dataset
    from raydeep.train.checkpoint import Checkpoint

KEPT = 4  # rungs of a population's member, for others to copy


def trial_folder(run: Path, trial: int | str) -> Path:
    """Where a trial, by its number or label, leaves its packed file, predictions and what it goes on from."""
    return run / "trials" / (trial if isinstance(trial, str) else label(trial))


def save_predictions(folder: Path, name: str = "predictions", **splits: np.ndarray) -> None:
    """Write `predictions.safetensors`: classes, int64 of shape [rows], of each split given."""
    from safetensors.numpy import save

    write_bytes(folder / f"{name}.safetensors", save(splits))


def load_predictions(folder: Path, name: str = "predictions") -> dict[str, np.ndarray]:
    """Read `predictions.safetensors`."""
    from safetensors.numpy import load

    return load((folder / f"{name}.safetensors").read_bytes())


OF_A_RUNG = ("model-{}.rdz", "predictions-{}.safetensors", "sensitivity-{}.json")  # kept until the search is over

SETTLED = tuple(name.replace("-{}", "") for name in OF_A_RUNG)


def settle(run: Path, trial: int, rung: int) -> None:
    """A trial is over and the model of this rung is its own: the files lose their number, those of other rungs go."""
    folder = trial_folder(run, trial)
    for name, settled in zip(OF_A_RUNG, SETTLED, strict=True):
        if (folder / name.format(rung)).exists():
            os.replace(folder / name.format(rung), folder / settled)
        for other in folder.glob(name.format("*")):
            other.unlink()


def limit_memory(limit: int | None) -> None:
    """Let this process take so many bytes more than it has: then allocations fail, and not the machine (Linux)."""
    status = Path("/proc/self/status")
    if limit is not None and status.exists():
        import resource

        has = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, (has * 1024 + limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


class Bench:
    """Where trials are worked on, one rung after another."""

    def __init__(
        self, job: Job, run: Path, data: Dataset, common: Common, dense: dict[str, Any], device: str = "cpu"
    ) -> None:
        """Begin.

        Args:
            job: of the search.
            run: its run folder.
            data: the decoded splits.
            common: what trials share; its dense model is what compression starts from.
            dense: measures of the dense model: `bytes`, and `latency_ms` where latency is an objective.
            device: where trials train.
        """
        self.job, self.run, self.data, self.common, self.device = job, run, data, common, device
        self.dense = dense
        self.predicted: dict[str, np.ndarray] = {}  # of this piece of work: hash of a packed file → classes
        self.keeps = True  # not on the further workers of a trial that has several

    def do(self, work: Work) -> dict[str, Any]:
        """Work a rung through; an error is a result too: the process lives on."""
        start, cpu = time.perf_counter(), time.process_time()
        self.predicted.clear()
        try:
            measured = self._train(work) if self.job.search.trains else self._compress(work)
            if self.keeps:
                mirror.push_folder(trial_folder(self.run, work.trial))
            found = {"status": "done", "error": None, **measured}
        except StorageError:  # not the trial's fault: another process, perhaps of another node, tries again
            raise
        except Exception:  # whatever one trial does, the search goes on; the traceback is in the ledger
            found = {"status": "failed", "error": traceback.format_exc(limit=8)}
        return {**found, "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}

    # compression

    def _compress(self, work: Work) -> dict[str, Any]:
        from raydeep.compress import state

        folder = self.folder(work)
        if work.before:
            mirror.fetch(folder / f"state-{work.rung - 1}.safetensors")
            before = state.read(folder / f"state-{work.rung - 1}.safetensors")
            made, start = self._make(work, work.epochs - work.before, self.common.dense, before), work.start
        else:
            made, start = self._begin(work)
        if work.epochs and self.keeps:
            write_bytes(folder / f"state-{work.rung}.safetensors", state.to_bytes(made.state))
            if work.rung > 1:
                mirror.drop(folder / f"state-{work.rung - 2}.safetensors")
        return {"start": start, **self._keep(work, made)}

    def _begin(self, work: Work) -> tuple[Made, str]:
        """The first rung, or the first with training, from the better of two starts."""
        nearest = self._weights(work.neighbour) if work.neighbour else None
        if work.epochs == 0:
            made = self._make(work, 0, self.common.dense)
            if nearest is not None:
                other = self._make(work, 0, nearest)
                if self._accuracy(other) > self._accuracy(made):
                    return other, str(work.neighbour)
            return made, "dense"
        start = work.start
        if nearest and work.score is not None and self._accuracy(self._make(work, 0, nearest)) > work.score:
            start = str(work.neighbour)
        begun = nearest if start == work.neighbour else self._weights(start)
        if begun is None:  # its files are gone: the search was over once
            begun, start = self.common.dense, "dense"
        return self._make(work, work.epochs, begun), start

    def _make(self, work: Work, epochs: int, dense: Dense, before: State | None = None) -> Made:
        from raydeep.compress import plan

        values = {**work.values, "recover.epochs": epochs}
        if epochs == 0 and self.job.quantize.epochs and self.job.search.scheduler != "none":
            values["quantize.epochs"] = 0
        job = self.job.with_values(values)
        return plan.make(job, dense, self.data, work.seed, self.device, common=self.common, before=before)

    def _weights(self, name: str) -> Dense | None:
        """The float weights that a trial has now, or the dense model's; None of a trial that has none to give."""
        from raydeep.compress import state
        from raydeep.compress.plan import Dense

        if name == "dense":
            return self.common.dense
        folder = trial_folder(self.run, name)
        files = [folder / file for file in mirror.names(folder) if fnmatch(file, "state-*.safetensors")]
        newest = max(files, key=lambda file: int(file.stem[6:]), default=None)
        found = state.read(newest).dense() if newest is not None and mirror.fetch(newest) else None
        return None if found is None else Dense(*found)

    def _accuracy(self, made: Made) -> float:
        return float((self._predict(made.packed) == self.data.val.labels).mean())

    # training

    def _train(self, work: Work) -> dict[str, Any]:
        import torch

        from raydeep.compress import pack, plan
        from raydeep.data.augment import Augmenter
        from raydeep.data.batches import Batches
        from raydeep.model import artifact
        from raydeep.train import checkpoint, losses, parallel
        from raydeep.train.loop import fit
        from raydeep.train.saver import Saver

        folder, data = self.folder(work), self.data
        job = self.job.with_values(work.values)
        cfg = job.train
        epochs = self.job.search.ladder(cfg.epochs)[-1]
        spec = artifact.make_spec(job.model.name, job.model.args, data.classes, data.shape, data.mean, data.std)
        torch.manual_seed(work.seed)
        model = artifact.build(spec).to(self.device)
        rank, world = parallel.rank_world()
        batches = Batches(
            data.train, Augmenter(job.augment, data.mean, data.std), cfg.batch_size, work.seed, rank=rank, world=world,
            accumulate=cfg.accumulate, drop_last=cfg.drop_last, device=self.device,
        )  # fmt: skip
        resume, start = self._resume(work, folder)
        fit(
            model, losses.of(cfg), batches, cfg, epochs=epochs, until=work.epochs,
            seed=work.seed, saver=Saver(folder / "checkpoints", keep=1), resume=resume,
        )  # fmt: skip
        last = checkpoint.latest(folder / "checkpoints")
        pbt = self.job.search.scheduler == "pbt"
        if last is not None and self.keeps and pbt:  # others may copy it, whatever comes next here
            self._keep_rung(last.path, folder, work.rung)
        frozen = artifact.freeze(model.eval().cpu(), spec, fold=False)
        if job.prune.active or job.quantize.weight_bits is not None:
            made = plan.make(job, plan.Dense(*frozen), data, work.seed, self.device)
        else:
            from raydeep.compress.state import snapshot

            made = plan.Made(pack.pack(*artifact.freeze(model, spec)), snapshot(model, spec), [], {})
        return {"start": start, **self._keep(work, made)}

    def _resume(self, work: Work, folder: Path) -> tuple[Checkpoint | None, str]:
        """The checkpoint that a rung begins from, or was cut off at; and a donor's label, if it was that one's."""
        from raydeep.train import checkpoint

        own = checkpoint.latest(folder / "checkpoints")
        if work.donor is None:
            return own, "scratch"
        theirs = trial_folder(self.run, work.donor) / f"rung-{work.rung - 1}"
        mirror.pull(theirs, exact=True)
        if not theirs.exists():
            return own, "scratch"
        cut_off = own is not None and (own.moment.epoch > work.before or own.moment.step)  # inside this rung
        return (own if cut_off else checkpoint.load(theirs)), work.donor

    @staticmethod
    def _keep_rung(path: Path, folder: Path, rung: int) -> None:
        mirror.drop(folder / f"rung-{rung - KEPT}")
        target, aside = folder / f"rung-{rung}", folder / f".rung-{rung}.part"
        if not target.exists():
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(path, aside)
            os.replace(aside, target)

    # both

    def folder(self, work: Work) -> Path:
        """The trial's folder; emptied if it holds another trial of that number, which a kill has cut off."""
        folder = trial_folder(self.run, work.trial)
        if not self.keeps:
            return folder
        file = folder / "config.json"
        about = {"seed": work.seed, "config": work.values}
        mirror.pull(folder, lambda name: name == file.name, exact=True)
        if work.rung == 0 and folder.exists() and not (file.exists() and read_json(file) == about):
            mirror.drop(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, about)
        return folder

    def _predict(self, packed: bytes) -> np.ndarray:
        """Classes of the validation split; of the same file only once."""
        from raydeep.compress import plan

        name = hashlib.sha256(packed).hexdigest()
        if name not in self.predicted:
            self.predicted[name] = plan.score(packed, self.data, self.data.val, self.job.train.eval_batch_size)
        return self.predicted[name]

    def _keep(self, work: Work, made: Made) -> dict[str, Any]:
        """Measure the packed model; write it and what it predicts under the rung's number (see `settle`)."""
        from raydeep.compress import cost, pack
        from raydeep.model import artifact

        val, labels = self._predict(made.packed), self.data.val.labels
        right = val == labels
        spec, tensors = pack.unpack(made.packed)
        model = artifact.thaw(spec, tensors)
        counted, weights = cost.count(tensors), cost.weights(tensors)
        dense = cost.weights(artifact.build({**spec, "widths": {}}).state_dict()).parameters
        found = {
            "val_accuracy": float(right.mean()),
            "worst_class_accuracy": min(float(right[labels == k].mean()) for k in np.unique(labels)),
            "bytes": len(made.packed),
            "macs": cost.macs(model, tuple(spec["input"])),
            "compression_ratio": self.dense["bytes"] / len(made.packed),
            "sparsity": 1 - weights.nonzeros / dense,  # zero or gone
            "parameters": counted.parameters,
            "nonzeros": counted.nonzeros,
            "artifact_sha256": hashlib.sha256(made.packed).hexdigest(),
        }
        folder = trial_folder(self.run, work.trial)
        if not self.keeps:
            return found
        if self.dense.get("latency_ms"):
            found["latency_ms"] = self._latency(folder, made.packed, val)
        model_file, _, sensitivity_file = (folder / name.format(work.rung) for name in OF_A_RUNG)
        save_predictions(folder, f"predictions-{work.rung}", val=val)
        if made.sensitivity:
            write_json(sensitivity_file, made.sensitivity)
        write_bytes(model_file, made.packed)
        return found

    def _latency(self, folder: Path, packed: bytes, predicted: np.ndarray) -> float:
        """Milliseconds of the exported model, by the ratio to the dense one that is timed in turns with it."""
        from raydeep.deploy import export, forms, timing
        from raydeep.deploy.runtimes import open_onnx

        aside = folder / ".latency"
        shutil.rmtree(aside, ignore_errors=True)
        mirror.pull(self.run / "models" / "dense")
        try:
            export.write_model(aside, packed, sample=forms.sample(self.data, predicted), cfg=self.job.export)
            calls = [open_onnx(path / "model.onnx") for path in (self.run / "models" / "dense", aside)]
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        example = self.data.val.read([[np.arange(self.job.export.batch_sizes[0]) % len(self.data.val.labels)]])
        timed = timing.interleaved(calls, next(iter(example)), self.job.export.latency_rounds)
        ratio, _ = timing.ratio(*timed)
        return float(f"{self.dense['latency_ms'] / ratio:.4g}") if math.isfinite(ratio) and ratio > 0 else math.nan
