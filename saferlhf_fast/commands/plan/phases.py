"""What the stages' plans are put together from: models, moments and their parts in bytes, and the turns that
a pass takes.

A moment is a sum of parts (`PARTS`); a stage's peak is its largest moment. What runs one after the other
(passes of a step, optimiser steps of several models) counts by its worst turn.
"""

import dataclasses
from typing import NamedTuple

import torch

from ...config.sections import scorer_spec
from ...config.stage_table import STAGE_SPECS
from ...runtime import engine as engine_module
from . import pass_memory, sizes, zero_memory

NODE, NVLINK, NETWORK = 8, 450.0, 50.0
"""GPUs per node and GB/s that a GPU can send: by NVLink of an H100 or H200 (900 GB/s both ways together), and 400 Gb/s to other
nodes."""

PARTS = ("weights", "gradients", "optimiser", "buffers", "activations", "logits", "cache")
"""What a moment's bytes are spent on; buffers are DeepSpeed's (buckets, gathered weights)."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ANY = 1 << 30  # asked-for tokens: as many as a sequence has


class Hardware(NamedTuple):
    """What a plan is made for."""

    gpus: int
    memory: int  # bytes of each
    device: str = "cuda"  # or cpu: one process for each of `gpus`
    node: int = NODE  # GPUs of a node
    nvlink: float = NVLINK  # GB/s that a GPU can send to others of its node
    network: float = NETWORK  # and to other nodes


class Model(NamedTuple):
    """A model of a stage."""

    role: str
    start: str  # the folder or name whose configuration it has
    blueprint: sizes.Blueprint
    count: sizes.Count
    states: zero_memory.States
    trained: bool


class Phase(NamedTuple):
    """A point of a stage with the bytes of each part."""

    name: str
    parts: dict

    @property
    def total(self):
        """Bytes on one device."""
        return sum(self.parts.values())


class StageModels:
    """Makes the models of a stage and keeps the worst that each was seen to take."""

    def __init__(self, name, kind, cfg, hardware, earlier):
        self.name, self.kind, self.cfg, self.hardware, self.earlier = name, kind, cfg, hardware, earlier
        self.spec, self.device = STAGE_SPECS[kind], hardware.device
        precision = cfg.engine.precision
        self.precision = ("bf16" if self.device == "cuda" else "fp32") if precision == "auto" else precision
        self.width = DTYPES[self.precision].itemsize
        self.models, self.use = [], {}

    def add(self, role, key, kind, optim=None, lora=None, checkpointing=False, shared=False):
        """-> Model, the last of `models`. key: the setting that names it · optim: its Optimizer; None: frozen
        · shared: its base belongs to another model, so that adapter and head alone are its own.
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
        )
        count = sizes.count(blueprint)
        if shared:
            own = count.trained if blueprint.lora else 0
            count = count._replace(all=own, trained=own, largest=min(own, count.largest), small=0, buffers=0)
        zero = self._zero(optim)
        if optim is None:
            made = zero_memory.frozen(count, self.width, zero, self.hardware.gpus, self.device == "cpu")
        else:
            made = zero_memory.trained(
                count, self.width, zero, self.hardware.gpus, optim.kind, self.device == "cpu"
            )
        self.models.append(Model(role, start, blueprint, count, made, optim is not None))
        self.use[role] = dict.fromkeys(("activations", "logits", "cache"), 0)
        return self.models[-1]

    def _zero(self, optim):
        settings = dataclasses.replace(self.cfg.engine, precision=self.precision)
        return zero_memory.zero_settings(engine_module.settings(settings, optim))

    def zero(self, model):
        """`zero_settings` of a model."""
        return self._zero(self.cfg.optim if model.trained else None)

    def footprint(self, model, lengths, asked, **options):
        """-> Footprint of a pass of a model, noted in `use`."""
        made = pass_memory.of_pass(model.blueprint, lengths, asked, self.device, **options)
        self.note(model, activations=made.peak - made.head - made.gradients, logits=made.head)
        return made

    def note(self, model, **parts):
        """Remembers the worst of what a model takes."""
        for name, size in parts.items():
            self.use[model.role][name] = max(self.use[model.role][name], size)

    def resident(self, done=None, late=True):
        """Parts of what all models (or those in `done`) have for the whole run. late: with what the first
        step brings.
        """
        made = [model.states for model in (self.models if done is None else done)]
        total = dict.fromkeys(PARTS, 0)
        for part in made:
            total["weights"] += part.weights
            total["optimiser"] += part.optimizer - (0 if late else part.late)
            if part.sharded:
                total["gradients"] += part.gradients
                total["buffers"] += part.bucket
            if self.device == "cpu":  # there is no other memory to offload to
                total["optimiser"] += part.host
        return total


def adapter_of(lora):
    """A Lora config -> what a Blueprint says of it."""
    if lora is None or not lora.rank:
        return ()
    targets = lora.target_modules
    return lora.rank, targets if isinstance(targets, str) else tuple(targets)


def _path_at(cfg, key):
    """The path that a setting gives, by itself or as a scorer; key: dotted, through lists too."""
    for part in key.split("."):
        cfg = cfg[int(part)] if isinstance(cfg, list) else getattr(cfg, part)
    return scorer_spec(cfg).path


def add(*parts, **more):
    """Sum of parts."""
    return {name: sum(part.get(name, 0) for part in (*parts, more)) for name in PARTS}


def worst(name, candidates):
    """The largest of several turns of a moment -> Phase."""
    return Phase(name, max(candidates, key=lambda parts: sum(parts.values())))


# ---------------------------------------------------------------- moments that stages share


def resident_gradients(models, filling=False):
    """Gradients and buckets from the first backward pass of a step to its end. filling: during that first
    pass, where gradients that stay as they are come one by one, and are in the pass's footprint.
    """
    parts = [model.states for model in models if not model.states.sharded]
    return {
        "gradients": sum(p.gradients for p in parts if not (filling and p.whole)),
        "buffers": sum(p.bucket for p in parts),
    }


def forward(model, made):
    """Turns of a forward pass."""
    return {
        "activations": made.forward - made.head,
        "logits": made.head,
        "buffers": model.states.gathered + model.states.fetching,
    }


def saved_activations(model, made):
    """What a forward pass leaves for backward."""
    return {"activations": made.saved, "buffers": model.states.gathered}


def backward(model, made):
    """Turns of a backward pass: in the middle, and at its end, when ZeRO reduces what is left."""
    yield {
        "activations": made.backward - made.head - made.gradients,
        "logits": made.head,
        "gradients": made.gradients,
        "buffers": model.states.gathered + model.states.backward,
    }
    yield {"buffers": model.states.epilogue}


def asking(roles, model, lengths, asked, shape=()):
    """A pass without gradient. shape: of the scored distribution (see `pass_memory.of_pass`)."""
    return forward(model, roles.footprint(model, lengths, asked, train=False, shape=shape))


def loading(roles):
    """Each model on its way to DeepSpeed, beside those that are there."""
    turns = []
    for i, model in enumerate(roles.models):
        before = roles.resident(roles.models[:i], late=False)
        turns.append(add(before, {"weights": model.states.load}))
    return worst("loading", turns)


def stepping(roles):
    """The optimisers' steps, one model after the other; those to come still hold their gradients."""
    turns, trained = [], [model for model in roles.models if model.trained]
    for i, model in enumerate(trained):
        turns.append(add(roles.resident(), resident_gradients(trained[i:]), {"gradients": model.states.step}))
    return worst("optimiser step", turns)
