"""When a run writes a checkpoint, and which one it resumes from; see the package's docstring."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from ...config import fingerprint, inputs
from ...config.load import to_dict
from ...errors import DiskError, UserError
from ...version import __version__
from .. import console, disk, engine, preemption, run_lock
from ..provenance import set_aside_by, versions
from . import compatibility, manifest, shards
from .state import flatten, generators, restore, set_generators
from .writer import CheckpointWriter, failure

if TYPE_CHECKING:
    from typing import Self

    from ..run_state import TrainingConfig

Score = tuple[float, ...]


class HasState(Protocol):
    """What a checkpoint can hold besides models: numbers, texts and tensors in dicts and lists."""

    def state_dict(self) -> Mapping[str, Any]:
        """The values to write."""

    def load_state_dict(self, values: Any) -> object:
        """Takes the values of a checkpoint."""


class Checkpoints:
    """Writes a run's checkpoints when they are due, and finds the one to resume from.

    As a context it also ends the run on SIGTERM and SIGUSR1, with a checkpoint at the end of the step.
    """

    def __init__(
        self,
        cfg: "TrainingConfig",
        stage: str,
        folder: str | Path,
        models: Mapping[str, engine.Engine],
        state: Mapping[str, HasState],
        export_metadata: Mapping[str, Callable[[Path], object] | None] | None = None,
    ) -> None:
        """Writes nothing yet.

        Args:
            cfg: Config of the stage.
            stage: Name of the stage.
            folder: Folder of the run.
            models: The trained models by name.
            state: Everything else by name; equal on all ranks, since only rank 0's is written.
            export_metadata: By a model's name, what writes the other files of an export (config, tokenizer)
                into a folder.
        """
        self.cfg, self.stage, self.folder = cfg, stage, Path(folder)
        self.models, self.state, self.export_metadata = models, state, export_metadata or {}
        # the checkpoint that is being written: its files, and its step with its manifest
        self.files: CheckpointWriter | None = None
        self.pending: tuple[int, dict[str, Any]] | None = None
        self.last = time.monotonic()
        self.score: Score | None = None
        # rank 0 holds the run's folder
        self.locks = run_lock.locks_on(self.folder) if engine.rank() == 0 else []
        self.ending = False  # the run ends anyway: checkpoint.required does not matter any more

    def __enter__(self) -> "Self":
        preemption.listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        preemption.ignore()
        # after an error the other ranks may be gone: what was written stays uncommitted
        if self.files is not None and kind is not None:
            self.files.wait()

    # ------------------------------------------------------------ writing

    def after_step(self, step: int, score: Score | None = None) -> None:
        """Writes a checkpoint when one is due; every rank must call it at the end of each step.

        Args:
            step: Steps done, from 1.
            score: Of an evaluation in this step; higher is better.

        Raises:
            Preempted: A signal has asked some rank to end the run; the checkpoint is written.
            UserError: Another process writes to the run's folder now.
        """
        self.score = self.score if score is None else score
        due, asked = self._is_due(step), preemption.requested() is not None
        busy = self.files is not None and self.files.is_busy()
        lost = any(lock.is_lost(look=due or asked) for lock in self.locks)
        stop, due, busy, lost = engine.any_rank([asked, due, busy, lost])
        if lost:
            self._end_without_folder()
        self.ending = stop
        if self.files is not None and (not busy or stop):
            self._settle()
        if due or stop:
            self.save(step)
        if stop:
            self._settle()
            raise preemption.Preempted(step, manifest.newest_committed(self.folder))

    def finish(self) -> None:
        """Waits for a checkpoint that is still being written; every rank must call it after the last step.

        The run's model comes next, so a checkpoint that could not be written only gets a warning.

        Raises:
            UserError: Another process writes to the run's folder now.
        """
        self.ending = True
        self._settle()
        if engine.any_rank([any(lock.is_lost(look=True) for lock in self.locks)])[0]:
            self._end_without_folder()

    def _end_without_folder(self) -> NoReturn:
        """Raises the UserError that the run has lost its folder, on every rank."""
        if self.files is not None:
            self.files.error = "the folder is another run's"  # the background writes no further file
        reason = next((str(lock.loss()) for lock in self.locks if lock.reason), "")
        raise UserError(engine.gather_objects(reason)[0])

    def save(self, step: int) -> None:
        """Writes a checkpoint, or begins to write it in the background; every rank must call it.

        Args:
            step: Steps done, from 1.

        Raises:
            DiskError: It could not be written, and `checkpoint.required` is true.
        """
        self._settle()
        folder = manifest.folder_of(self.folder, step)
        files = self.files = CheckpointWriter(folder, self.cfg.checkpoint.asynchronous)
        if engine.rank() == 0:
            try:
                manifest.discard(folder)
            except OSError as error:
                files.error = failure(folder, error)
        engine.barrier()
        for name, model in self.models.items():
            shards.save(model, folder, name, files)
        files.put_json(f"rank-{engine.rank():05d}.json", generators())
        if engine.rank() == 0:
            tree, tensors = flatten({name: holder.state_dict() for name, holder in self.state.items()})
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

    def _is_due(self, step: int) -> bool:
        """Whether the settings ask for a checkpoint after this step."""
        settings = self.cfg.checkpoint
        return bool(settings.interval and step % settings.interval == 0) or bool(
            settings.minutes and time.monotonic() - self.last > 60 * settings.minutes
        )

    def _settle(self) -> None:
        """Waits until all ranks have written, and commits; if one has failed, all give the checkpoint up.

        Raises:
            DiskError: The checkpoint could not be written, and the settings require it.
        """
        if self.files is None:
            return
        assert self.pending is not None, "files are written for a manifest"
        files, (step, values) = self.files, self.pending
        files.wait()
        lost = any(lock.is_lost(look=True) for lock in self.locks)
        reports = engine.gather_objects((files.written, files.error, lost))
        if reports[0][2]:
            self._end_without_folder()
        errors = [f"rank {rank}: {error}" for rank, (_, error, _) in enumerate(reports) if error]
        folder = manifest.folder_of(self.folder, step)
        if engine.rank() == 0:
            if not errors:
                try:
                    manifest.write(
                        folder,
                        {
                            **values,
                            "files": {
                                name: entry for written, *_ in reports for name, entry in written.items()
                            },
                        },
                    )
                except OSError as error:
                    errors = [failure(folder, error)]
            try:
                if errors:
                    manifest.discard(folder)
                else:
                    manifest.prune(self.folder, self.cfg.checkpoint.keep, self.cfg.checkpoint.keep_best)
            except OSError as error:  # no reason to stop the run
                console.warn(f"an old checkpoint could not be deleted: {error}")
        errors = engine.gather_objects(errors)[0]
        self.files = self.pending = None
        if errors:
            self._report(step, errors, self.cfg.checkpoint.required and not self.ending)

    def _report(self, step: int, errors: list[str], stop: bool) -> None:
        """Says that a checkpoint was not written, in a warning or, to stop, in a DiskError on every rank."""
        line = f"checkpoint of step {step} was not written ({'; '.join(errors)})"
        if stop:
            raise DiskError(f"{line}; checkpoint.required is true")
        newest = manifest.newest_committed(self.folder)
        kept = f"the one of step {newest[0]} is kept: {newest[1]}" if newest else "there is none so far"
        console.warn(f"{line}; the run continues, {kept}")

    # ------------------------------------------------------------ resuming

    def resume(self) -> int:
        """Restores the state of the checkpoint that the settings name.

        Every rank must call it, before the first step.

        Returns:
            The step of the checkpoint; 0 when the run starts from the beginning.

        Raises:
            UserError: The checkpoint cannot be used, or belongs to other settings, inputs or models.
        """
        if self.cfg.resume is None:
            return 0
        newest = self._find()
        if newest is None:
            before = set_aside_by(self.folder)
            console.say(
                f"resume: no checkpoint in {manifest.root(self.folder)}; the run starts from the beginning"
                + (f", the unfinished run before it is in {before}" if before else "")
            )
            return 0
        folder, values = newest
        for name, model in self.models.items():
            shards.load(model, folder, name, values["universal"])
        self._restore(folder)
        if engine.rank() == 0:
            manifest.set_aside(self.folder, values["step"])
            source, target = folder.parent.parent / "best", self.folder / "best"
            # a checkpoint of another run: that run's best weights are beside its checkpoints
            if source.is_dir() and not target.exists():
                disk.copy_folder(source, target)
        engine.barrier()
        self.last = time.monotonic()
        console.say(f"resume: step {values['step']} from {folder}, written {values['written']}")
        return values["step"]

    def _find(self) -> tuple[Path, dict[str, Any]] | None:
        """Folder and manifest of the newest checkpoint that is complete, the same on all ranks.

        It prints for each newer one why it is not used. None when there is no checkpoint.
        """
        auto = self.cfg.resume == "auto"
        candidates = (
            [path for _, path in manifest.listed(self.folder)]
            if auto
            else [Path(str(self.cfg.resume)).expanduser()]
        )
        candidates = engine.gather_objects(candidates)[0]
        reasons: list[str] = []
        damaged = False
        for folder in candidates:
            values, why = self._look(folder)
            if why is None:
                for reason in reasons:
                    console.say(f"resume: not {reason}")
                assert values is not None, "a checkpoint without a problem has a manifest"
                self._require_same_run(folder, values)
                return folder, values
            if not auto:
                raise UserError(f"resume: {why}")
            damaged = damaged or manifest.is_committed(folder)
            reasons.append(why)
        if damaged:
            raise UserError(
                f"resume: no checkpoint in {manifest.root(self.folder)} can be used: {'; '.join(reasons)}; "
                "overwrite=true without resume starts from the beginning"
            )
        for reason in reasons:
            console.say(f"resume: not {reason}")
        return None

    def _look(self, folder: Path) -> tuple[dict[str, Any] | None, str | None]:
        """A checkpoint's manifest, if it can be read, and why the checkpoint cannot be used; None if it can.

        The ranks share the reading, and all get the same answer.
        """
        values: dict[str, Any] | None = None
        why: str | None = None
        if engine.rank() == 0:
            try:
                values = manifest.read(folder)
                why = self._incompatibility(folder, values)
            except UserError as error:
                why = str(error)
        values, why = engine.gather_objects((values, why))[0]
        if values is None or why is not None:
            return values, why
        reports = engine.gather_objects(manifest.problem(folder, values, engine.rank(), engine.world_size()))
        return values, next((line for line in reports if line), None)

    def _incompatibility(self, folder: Path, values: Mapping[str, Any]) -> str | None:
        """Why this run cannot read a checkpoint, whatever its files hold; None when it can."""
        if values["stage"] != self.stage:
            return f"{folder}: of the stage {values['stage']}, expected {self.stage}"
        sharded = any(kind["zero_stage"] for kind in values["models"].values())
        if values["world_size"] != engine.world_size() and sharded and not values["universal"]:
            return (
                f"{folder}: written by {values['world_size']} processes, this run has {engine.world_size()}; "
                f"saferlhf-fast checkpoint convert {folder} makes it one for any number"
            )
        return None

    def _require_same_run(self, folder: Path, values: Mapping[str, Any]) -> None:
        """Raises UserError when settings, inputs or models are not those of the checkpoint."""
        changes: list[str] = []
        if engine.rank() == 0:
            now = fingerprint.hashes(inputs.listed(self.cfg))
            changes = compatibility.differences(
                values["config"], to_dict(self.cfg), values["world_size"], engine.world_size(), now
            )
            changes += [
                f"{key}: its content has changed" for key in now if values["inputs"].get(key) != now[key]
            ]
            kinds = {name: _kind(model) for name, model in self.models.items()}
            changes += [] if kinds == values["models"] else [f"models: {values['models']} then, {kinds} now"]
        compatibility.require_compatible(folder, engine.gather_objects(changes)[0])

    def _restore(self, folder: Path) -> None:
        """Gives the state besides the models, and the random generators, the values of a checkpoint."""
        from safetensors.torch import load_file

        tree = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "state.safetensors")
        for name, values in restore(tree, tensors).items():
            self.state[name].load_state_dict(values)
        path = folder / f"rank-{engine.rank():05d}.json"
        # there is none for a rank beyond the number of processes that wrote the checkpoint
        if path.exists():
            set_generators(json.loads(path.read_text(encoding="utf-8")))


def started_inputs(folder: str | Path) -> dict[str, str]:
    """Hashes of a run's inputs as they were when it began, by key; empty where they are not recorded."""
    path = Path(folder) / "started.json"
    return json.loads(path.read_text(encoding="utf-8"))["inputs"] if path.exists() else {}


def _kind(model: engine.Engine) -> dict[str, Any]:
    """What must be the same when a model's shards are read again."""
    kind = {
        "zero_stage": model.zero_stage,
        "precision": model.precision,
        "weights": sum(getattr(p, "ds_numel", p.numel()) for p in model.module.parameters()),
    }
    # Weights of 4 bits are in no checkpoint: they are quantised anew, and must be the same.
    base = getattr(model.module, "base_hash", lambda: None)()
    return kind if base is None else {**kind, "base": base}
