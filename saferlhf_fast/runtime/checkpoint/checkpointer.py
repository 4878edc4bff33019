"""When a run writes its state, and from what it goes on; see the package's docstring."""

import json
import shutil
import time
from pathlib import Path

from ...config import fingerprint, inputs
from ...config.load import to_dict
from ...errors import UserError
from ...version import __version__
from .. import console, engine, preemption
from ..provenance import set_aside_by, versions
from . import compatibility, manifest, shards
from .state import flatten, generators, restore, set_generators
from .writer import CheckpointWriter


class Checkpoints:
    """Writes a run's checkpoints when they are due, finds the one to go on from, and ends the run when it is
    told to.

    A context: within it SIGTERM and SIGUSR1 mean "write a checkpoint at the end of this step and leave".
    """

    def __init__(self, cfg, stage, folder, models, state, export_metadata=None):
        """cfg: of the stage · folder: of the run · models: {name: engine.Engine} · state: {name: object with
        state_dict() and load_state_dict(values)}, the same on all ranks; rank 0's is kept · export_metadata:
        {model's name: function that writes what else an export needs (config, tokenizer) into a folder}.
        """
        self.cfg, self.stage, self.folder = cfg, stage, Path(folder)
        self.models, self.state, self.export_metadata = models, state, export_metadata or {}
        self.files = self.pending = None  # what is being written, and its manifest
        self.last, self.score = time.monotonic(), None

    def __enter__(self):
        preemption.listen()
        return self

    def __exit__(self, kind, error, trace):
        preemption.ignore()
        # the others may be gone: what was written stays uncommitted
        if self.files is not None and kind is not None:
            self.files.wait()
        return False

    # ------------------------------------------------------------ writing

    def after_step(self, step, score=None):
        """Call at the end of each step on every rank. score: of an evaluation in this step, a tuple of
        numbers, higher is better. Writes a checkpoint when one is due; raises signals.Preempted when the run
        was told to end.
        """
        self.score = self.score if score is None else score
        due = self._is_due(step)
        stop, due, busy = engine.any_rank(
            [preemption.asked() is not None, due, self.files is not None and self.files.is_busy()]
        )
        if self.files is not None and (not busy or stop):
            self._settle()
        if due or stop:
            self.save(step)
        if stop:
            self._settle()
            raise preemption.Preempted(step, manifest.folder_of(self.folder, step))

    def finish(self):
        """Call after the last step: waits for what is still being written."""
        self._settle()

    def save(self, step):
        """Writes a checkpoint now, or begins to; every rank must call it."""
        self._settle()
        folder = manifest.folder_of(self.folder, step)
        files = self.files = CheckpointWriter(folder, self.cfg.checkpoint.asynchronous)
        if engine.rank() == 0:
            try:
                manifest.discard(folder)
            except OSError as error:
                files.error = f"{folder}: {error}"
        engine.barrier()
        for name, model in self.models.items():
            shards.save(model, folder, name, files)
        files.put_json(f"rank-{engine.rank():05d}.json", generators())
        if engine.rank() == 0:
            tree, tensors = flatten({name: part.state_dict() for name, part in self.state.items()})
            files.put_json("state.json", tree)
            files.put_tensors("state.safetensors", tensors)
            for name, write in self.export_metadata.items():
                if write is not None:
                    files.put_folder(f"{name}/hf", write)
        self.pending = (
            step,
            {
                "stage": self.stage,
                "step": step,
                "world_size": engine.world_size(),
                "universal": False,
                "models": {name: _kind(model) for name, model in self.models.items()},
                "score": self.score,
                "config": to_dict(self.cfg),
                "inputs": started_inputs(self.folder),
                "versions": versions(self.cfg),
                "saferlhf-fast": __version__,
                "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            },
        )
        self.last, self.score = time.monotonic(), None
        if self.cfg.checkpoint.asynchronous:
            files.start()
        else:
            self._settle()

    def _is_due(self, step):
        settings = self.cfg.checkpoint
        return bool(settings.interval and step % settings.interval == 0) or bool(
            settings.minutes and time.monotonic() - self.last > 60 * settings.minutes
        )

    def _settle(self):
        """Commits what was written, once all ranks have; all of them give it up when one could not."""
        if self.files is None:
            return
        files, (step, values) = self.files, self.pending
        files.wait()
        reports = engine.gather_objects((files.written, files.error))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(reports) if error]
        folder = manifest.folder_of(self.folder, step)
        if engine.rank() == 0:
            if not errors:
                try:
                    manifest.write(
                        folder,
                        {
                            **values,
                            "files": {name: said for written, _ in reports for name, said in written.items()},
                        },
                    )
                except OSError as error:
                    errors = [f"{folder}: {error}"]
            if errors:
                console.warn(
                    f"checkpoint of step {step} was not written ({'; '.join(errors)}); the run goes on, and "
                    f"the one "
                    "before is kept"
                )
            try:
                if errors:
                    manifest.discard(folder)
                else:
                    manifest.prune(self.folder, self.cfg.checkpoint.keep, self.cfg.checkpoint.keep_best)
            except OSError as error:  # not worth a run
                console.warn(f"an old checkpoint could not be deleted: {error}")
        engine.barrier()
        self.files = self.pending = None

    # ------------------------------------------------------------ going on

    def resume(self):
        """Takes over the state of the checkpoint that the recipe asks for -> its step; 0 when the run starts
        anew.

        Every rank must call it, before the first step.
        """
        if self.cfg.resume is None:
            return 0
        found = self._find()
        if found is None:
            before = set_aside_by(self.folder)
            console.say(
                f"resume: no checkpoint in {manifest.root(self.folder)}; the run starts anew"
                + (f", the unfinished one before it lies in {before}" if before else "")
            )
            return 0
        folder, values = found
        for name, model in self.models.items():
            shards.load(model, folder, name, values["universal"])
        self._restore(folder)
        if engine.rank() == 0:
            manifest.set_aside(self.folder, values["step"])
            best, mine = folder.parent.parent / "best", self.folder / "best"
            # of another run: its best weights lie beside its checkpoints
            if best.is_dir() and not mine.exists():
                shutil.copytree(best, mine)
        engine.barrier()
        self.last = time.monotonic()
        console.say(f"resume: step {values['step']} from {folder}, written {values['written']}")
        return values["step"]

    def _find(self):
        """-> (folder, manifest) of the newest checkpoint that is whole; says why not a newer one.

        The same on all ranks.
        """
        auto = self.cfg.resume == "auto"
        candidates = (
            [path for _, path in manifest.listed(self.folder)]
            if auto
            else [Path(self.cfg.resume).expanduser()]
        )
        candidates = engine.gather_objects(candidates)[0]
        passed, damaged = [], False
        for folder in candidates:
            values, why = self._look(folder)
            if why is None:
                for line in passed:
                    console.say(f"resume: not {line}")
                self._refuse_others(folder, values)
                return folder, values
            if not auto:
                raise UserError(f"resume: {why}")
            damaged = damaged or manifest.is_committed(folder)
            passed.append(why)
        if damaged:
            raise UserError(
                f"resume: no checkpoint in {manifest.root(self.folder)} can be used: {'; '.join(passed)}; "
                "overwrite=true without resume starts anew"
            )
        for line in passed:
            console.say(f"resume: not {line}")
        return None

    def _look(self, folder):
        """-> (manifest, None), or (None or manifest, why it cannot be used).

        Ranks share the reading and agree.
        """
        values = why = None
        if engine.rank() == 0:
            try:
                values = manifest.read(folder)
                why = self._unfit(folder, values)
            except UserError as error:
                why = str(error)
        values, why = engine.gather_objects((values, why))[0]
        if why is not None:
            return values, why
        reports = engine.gather_objects(manifest.problem(folder, values, engine.rank(), engine.world_size()))
        return values, next((line for line in reports if line), None)

    def _unfit(self, folder, values):
        """Why this run cannot read a checkpoint that may be whole; None when it can."""
        if values["stage"] != self.stage:
            return f"{folder}: of the stage {values['stage']}, expected {self.stage}"
        sharded = any(kind["zero_stage"] for kind in values["models"].values())
        if values["world_size"] != engine.world_size() and sharded and not values["universal"]:
            return (
                f"{folder}: written by {values['world_size']} processes, this run has {engine.world_size()}; "
                f"saferlhf-fast checkpoint convert {folder} makes it one for any number"
            )
        return None

    def _refuse_others(self, folder, values):
        """UserError when settings, inputs or models are not those of the checkpoint."""
        found = []
        if engine.rank() == 0:
            now = fingerprint.hashes(inputs.listed(self.cfg))
            found = compatibility.differences(
                values["config"], to_dict(self.cfg), values["world_size"], engine.world_size(), now
            )
            found += [
                f"{key}: its content has changed" for key in now if values["inputs"].get(key) != now[key]
            ]
            kinds = {name: _kind(model) for name, model in self.models.items()}
            found += [] if kinds == values["models"] else [f"models: {values['models']} then, {kinds} now"]
        compatibility.refuse(folder, engine.gather_objects(found)[0])

    def _restore(self, folder):
        from safetensors.torch import load_file

        tree = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "state.safetensors")
        for name, part in restore(tree, tensors).items():
            self.state[name].load_state_dict(part)
        mine = folder / f"rank-{engine.rank():05d}.json"
        # a run of more processes than the checkpoint's has new ones
        if mine.exists():
            set_generators(json.loads(mine.read_text(encoding="utf-8")))


class ResumableDict(dict):
    """A few values that a checkpoint keeps: numbers, texts, tensors, lists, dicts."""

    def state_dict(self):
        return dict(self)

    def load_state_dict(self, values):
        self.update(values)


def started_inputs(folder):
    """Hashes of a run's inputs as they were when it began."""
    path = Path(folder) / "started.json"
    return json.loads(path.read_text(encoding="utf-8"))["inputs"] if path.exists() else {}


def _kind(model):
    """What must be the same when a model's shards are read again."""
    return {
        "zero_stage": model.zero_stage,
        "precision": model.precision,
        "weights": sum(getattr(p, "ds_numel", p.numel()) for p in model.module.parameters()),
    }
