"""What an output folder holds when a stage is about to use it: facts only; run_decision.py decides by them.

A fact is worked out once, when it is first read. A RunState describes one moment: a stage that has read its
models for minutes makes a new one when it opens its folder. Nothing is written, and torch is not imported.
"""

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from saferlhf_fast.config import fingerprint, inputs
from saferlhf_fast.config.load import to_dict
from saferlhf_fast.runtime.checkpoint import compatibility, manifest
from saferlhf_fast.runtime.folder_claims import is_bookkeeping
from saferlhf_fast.runtime.provenance import process_count, read_json

if TYPE_CHECKING:
    from saferlhf_fast.config.stages import (
        DemoConfig,
        DPOConfig,
        EvaluateConfig,
        ModerationConfig,
        PPOConfig,
        PreferenceConfig,
        SFTConfig,
    )

    TrainingConfig = SFTConfig | PreferenceConfig | DPOConfig | PPOConfig | ModerationConfig
    OutputConfig = TrainingConfig | EvaluateConfig | DemoConfig

SAVED = ("model", "best", "step-*", "checkpoints/*/" + manifest.NAME)
"""The valuable content of a run folder: models, and checkpoints that were finished."""


def is_ours(folder: str | Path) -> bool:
    """Whether a folder is a run folder of this package, the only kind that is ever deleted."""
    folder = Path(folder).expanduser()
    try:
        return (folder / "config.yaml").is_file() and "saferlhf-fast" in read_json(folder / "versions.json")
    except OSError:
        # the checks in run_folder.py report what is wrong with the folder
        return False


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The settings of a run folder, with `stage`; {} where its config.yaml is missing or no mapping."""
    try:
        settings = yaml.safe_load((Path(folder) / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


@dataclasses.dataclass(frozen=True)
class RunState:
    """The output folder of a stage's config, and what the stage is to do.

    The config's own `resume` and `overwrite` have no effect here: run_decision.py takes them from Request.
    Reading a fact may raise OSError where the folder cannot be read.

    Attributes:
        stage: Name of the stage.
        cfg: Its config, with an output (see run_folder.with_output).
    """

    stage: str
    cfg: "OutputConfig"

    # ------------------------------------------------------------ what the stage is to do

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The stage's settings, as they are written to config.yaml."""
        return to_dict(self.cfg)

    @cached_property
    def sources(self) -> tuple[tuple[str, str, str], ...]:
        """(key, value, kind) of each model and data source that the settings name."""
        return tuple(inputs.listed(self.cfg))

    @cached_property
    def recipe(self) -> str:
        """The hash of stage and settings."""
        return fingerprint.recipe_hash(self.stage, self.settings, self.sources)

    @cached_property
    def input_hashes(self) -> dict[str, str]:
        """{key: hash of the content} of the local inputs; every one of them is read for it."""
        return fingerprint.hashes(self.sources)

    def anew(self) -> "RunState":
        """A RunState of this moment. What the stage is to do, and its hashes, are not worked out again."""
        state = RunState(self.stage, self.cfg)
        known = ("settings", "sources", "recipe", "input_hashes")
        state.__dict__.update((name, self.__dict__[name]) for name in known if name in self.__dict__)
        return state

    # ------------------------------------------------------------ what the folder holds

    @cached_property
    def output(self) -> str:
        """The output as the settings name it."""
        assert self.cfg.output is not None, "with_output has named an output folder"
        return self.cfg.output

    @cached_property
    def folder(self) -> Path:
        """The output folder, with ~ replaced by the home folder."""
        return Path(self.output).expanduser()

    @cached_property
    def is_ours(self) -> bool:
        """Whether it is a run folder of this package; False, not OSError, where it cannot be read."""
        return is_ours(self.folder)

    @cached_property
    def content(self) -> Literal["absent", "empty", "file", "link", "foreign", "run"]:
        """What is at the output's path.

        A "file" is no folder, a "link" leads to no folder, a "run" is a run folder of this package, and any
        other folder that is not empty is "foreign".
        """
        if not self.folder.exists():
            return "link" if self.folder.is_symlink() else "absent"
        if not self.folder.is_dir():
            return "file"
        if self.is_ours:
            return "run"
        return "foreign" if any(not is_bookkeeping(p.name) for p in self.folder.iterdir()) else "empty"

    @cached_property
    def ending(self) -> Literal["unfinished", "damaged", "finished"]:
        """How the folder's run ended.

        "damaged" means that its finished.json cannot be read.
        """
        if self.finished:
            return "finished"
        return "damaged" if (self.folder / "finished.json").exists() else "unfinished"

    @cached_property
    def started(self) -> dict[str, Any]:
        """The content of started.json; empty when the file cannot be read."""
        return read_json(self.folder / "started.json")

    @cached_property
    def finished(self) -> dict[str, Any]:
        """The content of finished.json; empty when the file cannot be read."""
        return read_json(self.folder / "finished.json")

    @cached_property
    def settings_there(self) -> dict[str, Any]:
        """The settings of the folder's run, with `stage`; {} where its config.yaml cannot be read."""
        return read_settings(self.folder)

    @cached_property
    def has_checkpoint(self) -> bool:
        """Whether the folder's run has a finished checkpoint; its files may have been damaged since."""
        return any(manifest.is_committed(path) for _, path in manifest.listed(self.folder))

    @cached_property
    def has_saved(self) -> bool:
        """Whether the folder's run has saved anything worth keeping."""
        return any(next(self.folder.glob(name), None) for name in SAVED)

    @cached_property
    def own_input(self) -> tuple[str, str] | None:
        """(key, value) of an input of the stage that is in the folder, or is the folder; None without one."""
        real = self.folder.resolve()
        for key, value, _ in self.sources:
            path = Path(value).expanduser()
            if path.exists() and (path.resolve() == real or real in path.resolve().parents):
                return key, value
        return None

    @cached_property
    def holds_working_directory(self) -> bool:
        """Whether this process was started in the folder, or in one inside it."""
        here = Path.cwd()
        return self.folder.resolve() in (here, *here.parents)

    # ------------------------------------------------------------ the folder's run compared with the stage

    @cached_property
    def same_stage(self) -> bool:
        """Whether the folder's run is one of this stage."""
        return self.settings_there.get("stage") == self.stage

    @cached_property
    def same_settings(self) -> bool:
        """Whether the folder's run was started with exactly these settings, by this or another stage.

        The stages reward and cost have the same settings.
        """
        stage = self.started.get("stage")
        if stage is None:  # started.json cannot be read
            return False
        recipe = (
            self.recipe
            if stage == self.stage
            else fingerprint.recipe_hash(stage, self.settings, self.sources)
        )
        return self.started.get("recipe") == recipe

    @cached_property
    def same_start(self) -> bool:
        """Whether the folder's run was started by this stage with exactly these settings."""
        return self.started.get("stage") == self.stage and self.same_settings

    @cached_property
    def is_done_but_for_inputs(self) -> bool:
        """Whether the folder holds the finished run of this stage and exactly these settings.

        The content of its inputs is not compared.
        """
        return self.finished.get("stage") == self.stage and self.finished.get("recipe") == self.recipe

    @cached_property
    def is_done(self) -> bool:
        """Whether the folder holds the finished run of this stage, with exactly these settings and inputs."""
        return self.is_done_but_for_inputs and self.finished.get("inputs") == self.input_hashes

    @cached_property
    def changed(self) -> list[str]:
        """Changed settings that change the result of the folder's run, as "train.epochs: 2 then, 3 now"."""
        processes = read_json(self.folder / "versions.json").get("processes", process_count())
        return compatibility.differences(
            self.settings_there,
            self.settings,
            processes,
            process_count(),
            [key for key, _, _ in self.sources],
        )

    def holds(self, path: str | Path) -> bool:
        """Whether a path is inside the folder."""
        return self.folder.resolve() in Path(path).expanduser().resolve().parents

    def resumes(self, resume: str | None) -> bool:
        """Whether a stage with this `resume` would resume from a checkpoint of this folder.

        Args:
            resume: None, "auto" or the folder of a checkpoint, as in the settings.
        """
        if resume is None or not self.is_ours or self.ending != "unfinished":
            return False
        if resume == "auto":
            return self.has_checkpoint
        return manifest.root(self.folder).resolve() in Path(resume).expanduser().resolve().parents
