"""What an output folder holds when a stage is about to use it: facts only; run_decision.py says what follows
from them.

A fact is worked out when it is first asked for, and once. A RunState is of one moment: a stage that has read
its models for minutes looks anew when it opens its folder. Nothing is written, and torch is not imported.
"""

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from saferlhf_fast.config import fingerprint, inputs
from saferlhf_fast.config.load import to_dict
from saferlhf_fast.runtime.checkpoint import compatibility, manifest
from saferlhf_fast.runtime.provenance import process_count, read_json

SAVED = ("model", "best", "step-*", "checkpoints/*/" + manifest.NAME)
"""What a run folder holds that hours went into: models, and checkpoints that were finished."""


def is_ours(folder):
    """Tells whether a folder is a run folder of this package: the only kind that is ever deleted."""
    folder = Path(folder).expanduser()
    try:
        return (folder / "config.yaml").is_file() and "saferlhf-fast" in read_json(folder / "versions.json")
    except OSError:
        # whoever checks an output, or a place, says what is wrong with it
        return False


def read_settings(folder):
    """Returns the settings of a run folder, with `stage`; {} where its config.yaml cannot be read as such."""
    try:
        settings = yaml.safe_load((Path(folder) / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


@dataclasses.dataclass(frozen=True)
class RunState:
    """The output folder of a stage's config, beside what the stage is to do.

    The config's own `resume` and `overwrite` play no part: they are asked for in run_decision.py.

    Reading a fact may raise OSError where the folder cannot be looked at.
    """

    stage: str
    cfg: Any

    # ------------------------------------------------------------ what the stage is to do

    @cached_property
    def settings(self):
        """The stage's settings as they are written."""
        return to_dict(self.cfg)

    @cached_property
    def sources(self):
        """(key, value, kind) of each model and data source that the settings name."""
        return tuple(inputs.listed(self.cfg))

    @cached_property
    def recipe(self):
        """The hash of stage and settings."""
        return fingerprint.recipe_hash(self.stage, self.settings, self.sources)

    @cached_property
    def input_hashes(self):
        """{key: hash of the content} of the local inputs, which are read whole for it."""
        return fingerprint.hashes(self.sources)

    # ------------------------------------------------------------ what lies there

    @cached_property
    def folder(self):
        """The output folder, with ~ written out."""
        return Path(self.cfg.output).expanduser()

    @cached_property
    def is_ours(self):
        """Whether it is a run folder of this package; False, not OSError, where that cannot be seen."""
        return is_ours(self.folder)

    @cached_property
    def content(self):
        """Absent · empty · file (it is no folder) · link (to no folder) · foreign (another's) · run (a run
        folder of ours).
        """
        if not self.folder.exists():
            return "link" if self.folder.is_symlink() else "absent"
        if not self.folder.is_dir():
            return "file"
        if self.is_ours:
            return "run"
        return "foreign" if any(self.folder.iterdir()) else "empty"

    @cached_property
    def ending(self):
        """None (the run there is unfinished) · damaged (its finished.json cannot be read) · whole (it is
        finished).
        """
        if self.finished:
            return "whole"
        return "damaged" if (self.folder / "finished.json").exists() else "none"

    @cached_property
    def started(self):
        """started.json; an empty mapping when there is none that can be read."""
        return read_json(self.folder / "started.json")

    @cached_property
    def finished(self):
        """finished.json; an empty mapping when there is none that can be read."""
        return read_json(self.folder / "finished.json")

    @cached_property
    def settings_there(self):
        """The settings of the run there, with `stage`, as its config.yaml has them; {} where they cannot be
        read.
        """
        return read_settings(self.folder)

    @cached_property
    def has_checkpoint(self):
        """Whether the run there has a checkpoint that was finished, which does not say that it is whole."""
        return any(manifest.is_committed(path) for _, path in manifest.listed(self.folder))

    @cached_property
    def has_saved(self):
        """Whether the run there has saved anything worth keeping."""
        return any(next(self.folder.glob(name), None) for name in SAVED)

    @cached_property
    def own_input(self):
        """(key, value) of an input of the stage that lies in the folder, or is the folder; None when none
        does.
        """
        real = self.folder.resolve()
        for key, value, _ in self.sources:
            path = Path(value).expanduser()
            if path.exists() and (path.resolve() == real or real in path.resolve().parents):
                return key, value
        return None

    @cached_property
    def holds_working_directory(self):
        """Whether this process was started in the folder, or in one inside it."""
        here = Path.cwd()
        return self.folder.resolve() in (here, *here.parents)

    # ------------------------------------------------------------ what lies there, against what is to be done

    @cached_property
    def same_stage(self):
        """Whether the run there is one of this stage."""
        return self.settings_there.get("stage") == self.stage

    @cached_property
    def same_settings(self):
        """Whether the run there was started with these very settings, be it by another stage (reward and cost
        share theirs).
        """
        stage = self.started.get("stage")
        recipe = (
            self.recipe
            if stage == self.stage
            else fingerprint.recipe_hash(stage, self.settings, self.sources)
        )
        return self.started.get("recipe") == recipe

    @cached_property
    def same_start(self):
        """Whether the run there was started by this stage with these very settings."""
        return self.started.get("stage") == self.stage and self.same_settings

    @cached_property
    def is_done_but_for_inputs(self):
        """Whether the finished run of this stage and these very settings lies there, whatever its inputs
        held.
        """
        return self.finished.get("stage") == self.stage and self.finished.get("recipe") == self.recipe

    @cached_property
    def is_done(self):
        """Whether the finished run of this stage, these very settings and inputs with this very content lies
        there.
        """
        return self.is_done_but_for_inputs and self.finished.get("inputs") == self.input_hashes

    @cached_property
    def changed(self):
        """["train.epochs: 2 then, 3 now", …]: settings of the run there that have changed, in ways that
        change its result.
        """
        processes = read_json(self.folder / "versions.json").get("processes", process_count())
        return compatibility.differences(
            self.settings_there,
            self.settings,
            processes,
            process_count(),
            [key for key, _, _ in self.sources],
        )

    def holds(self, path):
        """Whether a path lies in the folder."""
        return self.folder.resolve() in Path(path).expanduser().resolve().parents

    def resumes(self, resume):
        """Whether a stage with this `resume` finds a checkpoint of its own folder to go on from.

        resume: None, "auto" or the folder of a checkpoint, as in the settings.
        """
        if resume is None or not self.is_ours or self.ending != "none":
            return False
        if resume == "auto":
            return self.has_checkpoint
        return manifest.root(self.folder).resolve() in Path(resume).expanduser().resolve().parents
