"""What the stages' plans consist of: models, phases with their parts in bytes, and the turns of a pass.

A phase is a sum of parts (`PARTS`); a stage's peak is its largest phase. Where several things run one after
the other (passes of a step, optimiser steps of several models), each is one turn; the largest turn counts.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch

from ...config.sections import ScorerSpec, scorer_spec
from ...config.stage_table import STAGE_SPECS
from ...runtime import deepspeed_config
from . import pass_memory, sizes, zero_memory

if TYPE_CHECKING:
    from ...config.sections import Lora, Optimizer
    from ...config.stages import StageConfig
    from .trace import Footprint

NODE, NVLINK, NETWORK = 8, 450.0, 50.0
"""GPUs of a node, and GB/s that a GPU can send: through the NVLink of an H100 or H200 (900 GB/s in both
directions together), and at 400 Gb/s to other nodes."""

PARTS = ("weights", "gradients", "optimiser", "buffers", "activations", "logits", "cache")
"""What a phase's bytes are used for; buffers are DeepSpeed's (buckets, gathered weights)."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ANY = 1 << 30  # predicted tokens: as many as a sequence has

Parts = Mapping[str, int]
"""{name of PARTS: bytes}; a part that is missing is 0."""
ConfigT = TypeVar("ConfigT", bound="StageConfig", covariant=True)


class Hardware(NamedTuple):
    """What a plan is made for."""

    gpus: int
    memory: int  # bytes of each
    device: str = "cuda"  # or cpu: one process for each of `gpus`
    node: int = NODE  # GPUs of a node
    nvlink: float = NVLINK  # GB/s that a GPU can send to others of its node
    network: float = NETWORK  # and to other nodes


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of a stage."""

    role: str
    start: str  # the folder or name whose configuration it has
    blueprint: sizes.Blueprint
    count: sizes.Count
    states: zero_memory.States
    trained: bool
    optim: "Optimizer | None" = None  # of a trained model


class Phase(NamedTuple):
    """A phase of a stage with the bytes of each part."""

    name: str
    parts: Parts

    @property
    def total(self) -> int:
        """Bytes on one device."""
        return sum(self.parts.values())


class StageModels(Generic[ConfigT]):
    """Plans the models of a stage, and records the most that the passes of each model take.

    Attributes:
        models: The models, in the order in which the stage loads them.
        use: {role: {"activations": bytes, "logits": bytes, "cache": bytes}}: the maximum of each.
        spec: The stage's row in config/stage_table.py.
        device: "cuda" or "cpu".
        precision: Number format of the weights, with `auto` resolved.
        width: Bytes of a weight.
    """

    def __init__(
        self, name: str, kind: str, cfg: ConfigT, hardware: Hardware, earlier: Mapping[str, Any]
    ) -> None:
        """Starts without models.

        Args:
            name: What the recipe calls the stage.
            kind: The kind of stage.
            cfg: Its config.
            hardware: What it runs on.
            earlier: {output folder: its config} of the stages before it in the same recipe.
        """
        self.name, self.kind, self.cfg, self.hardware, self.earlier = name, kind, cfg, hardware, earlier
        self.spec, self.device = STAGE_SPECS[kind], hardware.device
        precision = cfg.engine.precision
        self.precision = ("bf16" if self.device == "cuda" else "fp32") if precision == "auto" else precision
        self.width = DTYPES[self.precision].itemsize
        self.models: list[Model] = []
        self.use: dict[str, dict[str, int]] = {}

    def add(
        self,
        role: str,
        key: str,
        kind: str,
        optim: "Optimizer | None" = None,
        lora: "Lora | None" = None,
        checkpointing: bool = False,
        shared: bool = False,
    ) -> Model:
        """Adds a model and returns it.

        Args:
            role: What the model is called.
            key: The setting that names the model.
            kind: "policy" or "score".
            optim: The settings of its optimiser; None when it is frozen.
            lora: Its adapters.
            checkpointing: Whether activations are recomputed in the backward pass.
            shared: Whether its base belongs to another model, so that it owns only its adapter and its head.
        """
        start = _path_at(self.cfg, key)
        config, remote = sizes.config_of(
            start, f"{self.name}.{key}", self.earlier, self.cfg.trust_remote_code
        )
        blueprint = sizes.Blueprint(
            config,
            kind,
            DTYPES[self.precision],
            remote,
            checkpointing and optim is not None,
            adapter_of(lora),
            self.cfg.engine.packing,
            self.spec.family != "ppo",
            self._bits() if key == "model" else None,  # a whole score model keeps its precision
        )
        count = sizes.count(blueprint)
        if shared:
            own = count.trained if blueprint.lora else 0
            count = count._replace(
                all=own, trained=own, largest=min(own, count.largest), small=0, buffers=0, quantized=0
            )
        zero = self._zero(optim)
        if optim is None:
            states = zero_memory.frozen(count, self.width, zero, self.hardware.gpus, self.device == "cpu")
        else:
            states = zero_memory.trained(
                count, self.width, zero, self.hardware.gpus, optim.kind, self.device == "cpu"
            )
        self.models.append(Model(role, start, blueprint, count, states, optim is not None, optim))
        self.use[role] = dict.fromkeys(("activations", "logits", "cache"), 0)
        return self.models[-1]

    def _bits(self) -> int | None:
        """Returns the bits of the linear layers of the base; None where the stage quantises none."""
        lora = getattr(self.cfg, "lora", None)
        return None if lora is None else lora.bits

    def _zero(self, optim: "Optimizer | None") -> dict[str, int]:
        settings = dataclasses.replace(self.cfg.engine, precision=self.precision)
        return zero_memory.zero_settings(deepspeed_config.settings(settings, optim))

    def zero(self, model: Model) -> dict[str, int]:
        """Returns a model's `zero_memory.zero_settings`."""
        return self._zero(model.optim)

    def footprint(
        self, model: Model, lengths: tuple[int, ...], predicted: int | str, **options: Any
    ) -> "Footprint":
        """Measures a pass of a model, and records it in `use`.

        Args:
            model: The model.
            lengths: Tokens of each sequence.
            predicted: Which positions the head reads, as in `pass_memory.predicted_rows`.
            **options: As in `pass_memory.footprint_of_pass`.
        """
        footprint = pass_memory.footprint_of_pass(model.blueprint, lengths, predicted, self.device, **options)
        activations = footprint.peak - footprint.head - footprint.gradients
        self.note(model, activations=activations, logits=footprint.head)
        return footprint

    def note(self, model: Model, **parts: int) -> None:
        """Records the maximum of what a model takes."""
        for name, size in parts.items():
            self.use[model.role][name] = max(self.use[model.role][name], size)

    def resident(self, loaded: Sequence[Model] | None = None, late: bool = True) -> dict[str, int]:
        """Returns the parts of what models take for the whole run.

        Args:
            loaded: The models; None: all of the stage.
            late: Whether to count what the first step allocates.
        """
        total = dict.fromkeys(PARTS, 0)
        for states in [model.states for model in (self.models if loaded is None else loaded)]:
            total["weights"] += states.weights
            total["optimiser"] += states.optimizer - (0 if late else states.late)
            if states.sharded:
                total["gradients"] += states.gradients
                total["buffers"] += states.bucket
            if self.device == "cpu":  # a CPU has no other memory to offload to
                total["optimiser"] += states.host
        return total


def adapter_of(lora: "Lora | None") -> tuple[()] | tuple[int, str | tuple[str, ...]]:
    """Returns what a Blueprint says of the adapters that a Lora config describes."""
    if lora is None or not lora.rank:
        return ()
    targets = lora.target_modules
    return lora.rank, targets if isinstance(targets, str) else tuple(targets)


def _path_at(cfg: object, key: str) -> str:
    """Returns the path that a setting gives, by itself or as a scorer. key: dotted, through lists too."""
    for step in key.split("."):
        cfg = cfg[int(step)] if isinstance(cfg, list) else getattr(cfg, step)
    assert isinstance(cfg, (str, ScorerSpec)), f"{key}: expected a path or a scorer, got {cfg!r}"
    return scorer_spec(cfg).path


def add(*parts: Parts, **more: int) -> dict[str, int]:
    """Adds up parts."""
    return {name: sum(some.get(name, 0) for some in (*parts, more)) for name in PARTS}


def worst(name: str, turns: Iterable[Parts]) -> Phase:
    """Returns the phase that is the largest of several turns.

    Args:
        name: The phase's name.
        turns: What runs one after the other, at least one.
    """
    return Phase(name, max(turns, key=lambda parts: sum(parts.values())))


# ---------------------------------------------------------------- phases that stages share


def resident_gradients(models: Sequence[Model], filling: bool = False) -> Parts:
    """Returns gradients and buckets, from the first backward pass of a step to its end.

    Args:
        models: The models that are trained.
        filling: Whether it is that first pass. Gradients that stay as they are then accumulate one by one,
            and are counted in the pass's footprint.
    """
    states = [model.states for model in models if not model.states.sharded]
    return {
        "gradients": sum(s.gradients for s in states if not (filling and s.unpartitioned_gradients)),
        "buffers": sum(s.bucket for s in states),
    }


def forward(model: Model, footprint: "Footprint") -> Parts:
    """Returns the turn of a forward pass.

    Args:
        model: The model that runs.
        footprint: The pass, as `StageModels.footprint` measures it.
    """
    return {
        "activations": footprint.forward - footprint.head,
        "logits": footprint.head,
        "buffers": model.states.gathered + model.states.fetching + model.states.unpacking,
    }


def saved_activations(model: Model, footprint: "Footprint") -> Parts:
    """Returns what a forward pass leaves for backward.

    Args:
        model: The model that runs.
        footprint: The pass, as `StageModels.footprint` measures it.
    """
    return {"activations": footprint.saved, "buffers": model.states.gathered}


def backward(model: Model, footprint: "Footprint") -> Iterator[Parts]:
    """Yields the turns of a backward pass: in the middle, and at its end, when ZeRO reduces what is left.

    Args:
        model: The model that is trained.
        footprint: The pass, as `StageModels.footprint` measures it.
    """
    yield {
        "activations": footprint.backward - footprint.head - footprint.gradients,
        "logits": footprint.head,
        "gradients": footprint.gradients,
        "buffers": model.states.gathered + model.states.backward + model.states.unpacking,
    }
    yield {"buffers": model.states.epilogue}


def scoring_pass(
    stage: StageModels[Any],
    model: Model,
    lengths: tuple[int, ...],
    predicted: int | str,
    shape: pass_memory.Shape = (),
) -> Parts:
    """Returns the turn of a pass without gradient.

    Args:
        stage: The stage.
        model: The model that runs.
        lengths: Tokens of each sequence.
        predicted: Which positions the head reads, as in `pass_memory.predicted_rows`.
        shape: The sampling distribution that is scored.
    """
    return forward(model, stage.footprint(model, lengths, predicted, train=False, shape=shape))


def loading(stage: StageModels[Any]) -> Phase:
    """Returns the phase in which DeepSpeed takes over each model, next to those loaded before it."""
    turns = []
    for i, model in enumerate(stage.models):
        before = stage.resident(stage.models[:i], late=False)
        turns.append(add(before, {"weights": model.states.load}))
    return worst("loading", turns)


def stepping(stage: StageModels[Any]) -> Phase:
    """Returns the phase of the optimisers' steps, one model after the other.

    Models whose step is still to come have their gradients.
    """
    turns, trained = [], [model for model in stage.models if model.trained]
    for i, model in enumerate(trained):
        turns.append(add(stage.resident(), resident_gradients(trained[i:]), {"gradients": model.states.step}))
    return worst("optimiser step", turns)
