"""What every stage of a recipe has: the base class of their settings. Nothing here imports torch."""

from dataclasses import field, fields
from typing import Literal, TypeVar

from .sections import Engine
from .setting_types import Seed, settings_class

Group = TypeVar("Group")


@settings_class(frozen=True, kw_only=True)
class StageConfig:
    """What every stage of a recipe has. Stages inherit from it, and from nothing else."""

    seed: Seed = 42
    """Seed of everything random."""
    overwrite: bool = False
    """Replace an existing output folder."""
    resume: str | None = None
    """Resume from a checkpoint: auto takes the newest complete one in <output>/checkpoints, or starts from
    the beginning where there is none; else the folder of one."""
    template: Literal["auto", "tokenizer", "safe-rlhf", "none"] = "auto"
    """Conversation template: auto (the tokenizer's own, else safe-rlhf), tokenizer, safe-rlhf, or none."""
    trust_remote_code: bool = False
    """Run Python code from the model's folder or Hub repository."""
    allow_pickle: bool = False
    """Read .bin files (pickles) where a model has no .safetensors; only tensors are read from them."""
    engine: Engine = field(default_factory=Engine)

    def groups(self, kind: type[Group]) -> dict[str, Group]:
        """Returns {name: settings} of the groups of one class from sections.py.

        A stage may have none, one, or several of them (PPO has two optimisers).
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, kind)}
