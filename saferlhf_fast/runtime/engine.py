"""DeepSpeed: processes, sharding, precision, optimiser, schedule.

Stages know it through this file alone (and checkpoint/).

One CPU process needs no launcher; `torchrun` and `deepspeed` give many. A loss handed to `Engine.backward`
must already be divided by the count over *all* micro-batches and *all* ranks, so that the sum over
micro-batches and ranks is the loss of the global batch: gradients then do not depend on how the batch was
split. DeepSpeed averages over ranks, which `backward` undoes; it would also divide by its accumulation count,
which is why the accumulation boundary is ours (`managed_gradient_accumulation: false`: every `step()` is
one).
"""

import contextlib
import logging
import math
import os
import random
import socket
import sys
import warnings
from datetime import timedelta

import numpy
import torch

from ..errors import UserError
from . import optimizers, watchdog
from .collectives import (
    all_gather,
    all_reduce,
    any_rank,
    barrier,
    device,
    gather_objects,
    not_finite,
    rank,
    world_size,
)

__all__ = [
    "Engine",
    "Frozen",
    "all_gather",
    "all_reduce",
    "any_rank",
    "barrier",
    "device",
    "finish",
    "gather_objects",
    "gathered",
    "imported_deepspeed",
    "learning_rate_factor",
    "not_finite",
    "precision",
    "rank",
    "seed_all",
    "settings",
    "shards_frozen",
    "start",
    "started",
    "world_size",
    "written",
]


def precision(cfg):
    """Torch dtype of the weights in forward and backward, for an Engine config."""
    name = cfg.precision
    if name == "auto":
        name = "bf16" if torch.cuda.is_available() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def start(cfg, seed):
    """Joins the processes (idempotent) and seeds this one; call first in every stage.

    Every rank gets the same seed: models and data orders must agree. Sampling has a seed for each sequence.
    """
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    # No launcher, or what accelerate leaves behind in one process, without an address: DeepSpeed would go
    # looking for mpi4py.
    alone = (
        "RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1" and "MASTER_ADDR" not in os.environ
    )
    if alone:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    deepspeed = _deepspeed()
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if not torch.distributed.is_initialized():
        _join(deepspeed, cfg.timeout)
    # a child process would take them for a launcher's, and our port
    if alone:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    watchdog.begin(60 * cfg.timeout)
    seed_all(seed)


def _join(deepspeed, minutes):
    """Makes the process group; UserError when not all ranks have come in time.

    A collective's own limit lies behind that of the watch, which knows who is to blame. Groups that DeepSpeed
    makes take the limit from torch's defaults.
    """
    limit = timedelta(minutes=minutes, seconds=30)
    c10d = torch.distributed.distributed_c10d
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = limit
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False, timeout=limit
        )
    except torch.distributed.DistError as error:
        raise UserError(
            f"engine.timeout: expected {world_size()} processes to find each other at "
            f"{os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {minutes:g} minutes, got: {str(error).splitlines()[0]}; "
            "saferlhf-fast info --cluster finds out who is missing"
        ) from error


def started():
    """True between `start` and `finish`."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def finish():
    """Waits for the other ranks at the end of a program; the process group goes with the process.

    Taking it down by hand while DeepSpeed still holds on to it aborted one of some ten runs ("terminate
    called without an active exception", exit code −6).
    """
    if started():
        barrier()
        watchdog.end()


def seed_all(seed):
    """Seeds Python's, numpy's and torch's generators."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _deepspeed():
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed announces each engine at INFO; a warning of its own still comes through.
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has new ones for; nobody who trains can do
    # anything about it.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.utils.logger.addFilter(_tells)
    if not torch.cuda.is_available():
        # Shared-memory collectives are compiled for 35 s inside init_distributed on the CPU; gloo does
        # without. Set before it is asked for: asking would try out the compiler on every op, and show its
        # complaints.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    return deepspeed


def imported_deepspeed():
    """DeepSpeed as stages have it, for reading its files without a process group."""
    return _deepspeed()


def _tells(record):
    """False for DeepSpeed's warning that it has not tried an optimiser of ours with ZeRO:

    tests/runtime/test_optimizers.py has.
    """
    return "untested optimizer" not in record.getMessage()


# ---------------------------------------------------------------- trained models


def settings(cfg, optim):
    """DeepSpeed's configuration for an Engine and an Optimizer config (None: a frozen model)."""
    dtype = precision(cfg)
    config = {
        # ours are lists of any length; DeepSpeed only counts with it
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": _clipping(cfg, optim) if optim else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_optimization": {
            "stage": cfg.zero_stage if optim else 3 if shards_frozen(cfg) else 0,
            "overlap_comm": False,
        },
    }
    zero = config["zero_optimization"]
    if zero["stage"] and optim and cfg.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if zero["stage"] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        if cfg.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
    for key, value in (cfg.config or {}).items():
        config[key] = (
            {**config[key], **value}
            if isinstance(value, dict) and isinstance(config.get(key), dict)
            else value
        )
    return config


def shards_frozen(cfg):
    """True when an Engine config spreads the frozen models over the devices."""
    return cfg.zero_stage == 3 if cfg.frozen == "auto" else cfg.frozen == "sharded"


def _clipping(cfg, optim):
    """0 switches clipping off, but ZeRO-0 in fp32 measures the norm only while it clips."""
    return optim.max_grad_norm or (1e30 if cfg.zero_stage == 0 else 0.0)


def learning_rate_factor(optim, total_steps):
    """Step (from 0) -> factor on the peak learning rate. The first step already moves: (1 / warm-up steps)."""
    warmup = math.ceil(optim.warmup_ratio * total_steps)

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if optim.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1.0 - done if optim.schedule == "linear" else 1.0

    return factor


class Engine:
    """One trained model under DeepSpeed.

    Calling it runs the module's forward. `backward(loss)` adds gradients, `step()` applies them.
    """

    def __init__(self, module, optim, cfg, total_steps):
        """module: nn.Module in fp32 on the CPU · optim: Optimizer config · cfg: Engine config · total_steps:

        of the whole run, for the schedule.
        """
        if precision(cfg) == torch.float16 and not torch.cuda.is_available():
            raise UserError(
                "engine.precision: expected fp32 or bf16 without a GPU, where DeepSpeed has no fp16; got fp16"
            )
        optimizer = optimizers.build(module, optim, cfg.zero_stage)
        if cfg.zero_stage == 3:
            _shard(module, cfg, settings(cfg, optim))
        module = module.to(device())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(optim, total_steps))
        with _quiet(), optimizers.untouched(optimizer):
            self.deepspeed, *_ = _deepspeed().initialize(
                model=module,
                optimizer=optimizer,
                lr_scheduler=schedule,
                config=settings(cfg, optim),
                dist_init_required=False,
            )
        self.deepspeed.clip_fp32_gradients = self._clip_unsharded
        self.zero_stage, self.precision = cfg.zero_stage, str(precision(cfg)).removeprefix("torch.")
        self.sharded = cfg.zero_stage == 3
        self.unguarded = cfg.zero_stage == 0 and precision(cfg) == torch.float32
        self.max_grad_norm = optim.max_grad_norm
        self.skipped_steps = 0

    def _clip_unsharded(self):
        """DeepSpeed's clipping for ZeRO-0 in fp32, which forgets the norm: ours keeps it where DeepSpeed
        looks.
        """
        self.deepspeed._global_grad_norm = torch.nn.utils.clip_grad_norm_(
            self.module.parameters(), self.max_grad_norm or float("inf")
        )

    def local_norm(self):
        """Norm of this rank's gradients, 0-d, to be looked at before `step` (`not_finite`); None where
        DeepSpeed looks itself and leaves out a step whose gradients are not finite.
        """
        if not self.unguarded:
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    @property
    def module(self):
        return self.deepspeed.module

    @property
    def lr(self):
        """Learning rate of the next step."""
        return self.deepspeed.get_lr()[0]

    def __call__(self, *args, **kwargs):
        return self.deepspeed(*args, **kwargs)

    def train(self, mode=True):
        self.deepspeed.train(mode)
        return self

    def backward(self, loss):
        """loss: scalar, this micro-batch's share of the global batch's loss (see the file's docstring).

        A module whose weights stand on a base that others use too may have a `before_backward` to make it its
        own.
        """
        getattr(self.module, "before_backward", lambda: None)()
        self.deepspeed.backward(loss * world_size(), scale_wrt_gas=False)

    def step(self):
        """Clips, updates, zeroes the gradients -> {"grad_norm" (maybe a 0-d tensor), "lr", "skipped"}.

        skipped: DeepSpeed left the step out on all ranks, because a gradient was not finite. In fp16 that is
        how it finds its loss scale, and it is only counted.
        """
        lr, before = self.lr, self.deepspeed.skipped_steps
        self.deepspeed.step()
        self.skipped_steps += self.deepspeed.skipped_steps - before
        norm = self.deepspeed.get_global_grad_norm()
        skipped = self.deepspeed.skipped_steps > before and self.precision != "float16"
        return {"grad_norm": float("nan") if norm is None else norm, "lr": lr, "skipped": skipped}

    def discard(self):
        """Forgets the gradients and leaves weights, optimiser and schedule as they are; every rank must call
        it.

        ZeRO keeps gradients in several places, which DeepSpeed clears when their norm is not finite: so it is
        told.
        """
        if self.zero_stage == 0:
            self.deepspeed.optimizer.zero_grad()
            self.deepspeed.zero_grad()
        else:
            before = self.deepspeed.skipped_steps
            with _norms_counted_as_invalid(self.deepspeed.optimizer):
                self.deepspeed.step()
            assert self.deepspeed.skipped_steps == before + 1, (
                "DeepSpeed stepped on gradients that it was to forget"
            )
        self.skipped_steps += 1

    def gathered(self):
        """Context in which every rank sees whole weights (ZeRO-3 shards them; else nothing happens)."""
        return gathered(self.module, self.sharded)

    def state_dict(self):
        """Full weights on the CPU on rank 0, None elsewhere; every rank must call it.

        Under ZeRO-3 they are gathered one by one: no device holds the model whole.
        """
        parts, names = {}, {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            names[name] = id(parameter)  # tied weights have several names
            if self.sharded and id(parameter) not in parts:
                with _deepspeed().zero.GatheredParameters([parameter], modifier_rank=None):
                    parts[id(parameter)] = parameter.detach().cpu().clone() if rank() == 0 else None
        if rank() != 0:
            return None
        return {
            name: parts[names[name]] if names.get(name) in parts else tensor.detach().cpu().clone()
            for name, tensor in self.module.state_dict().items()
        }

    def load_state_dict(self, state):
        """Replaces the weights by rank 0's `state` (as `state_dict` gave it); every rank must call it.

        Only for the end of a run: the optimiser's own fp32 copies are not touched.
        """
        if not self.sharded:
            if rank() == 0:
                self.module.load_state_dict(state)
            if world_size() > 1:
                for tensor in self.module.state_dict().values():
                    torch.distributed.broadcast(tensor, 0)
            return
        for name, parameter in self.module.named_parameters():
            with written([parameter]):
                if rank() == 0:
                    parameter.data.copy_(state[name])


@contextlib.contextmanager
def _norms_counted_as_invalid(optimizer):
    """Context in which a ZeRO optimiser takes every gradient norm for not finite: its step clears the
    gradients and changes nothing else. DeepSpeed has no public call for that; the optimiser asks a function
    of its module by name.
    """
    module = sys.modules[type(optimizer).__module__]
    own = module.is_invalid_grad_norm
    module.is_invalid_grad_norm = lambda norm: True
    try:
        yield
    finally:
        module.is_invalid_grad_norm = own


def gathered(module, sharded):
    """Context with the whole weights of a module that ZeRO-3 may have sharded."""
    if not sharded:
        return contextlib.nullcontext()
    return _deepspeed().zero.GatheredParameters(list(module.parameters()), modifier_rank=None)


def written(parameters):
    """Context in which rank 0's changes to weights that ZeRO-3 has sharded count on every rank."""
    return _deepspeed().zero.GatheredParameters(parameters, modifier_rank=0)


def _shard(module, cfg, config):
    """Hands each rank its part of every weight, one weight at a time: the device never holds the model whole."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(precision(cfg))
    with _quiet():
        _deepspeed().zero.Init(module=module, config_dict_or_path=config)


class Frozen:
    """A model that is only asked: reference, reward, cost.

    Sharded or whole on each device: see `shards_frozen`.
    """

    def __init__(self, module, cfg):
        module.requires_grad_(False)
        self.sharded = shards_frozen(cfg)
        if self.sharded:
            _shard(module.eval(), cfg, settings(cfg, None))
        module = module.eval().to(device=device(), dtype=precision(cfg))
        if self.sharded:
            with _quiet():
                self.call, *_ = _deepspeed().initialize(
                    model=module, config=settings(cfg, None), dist_init_required=False
                )
            self.call.eval()
        else:
            self.call = module
        self.module = module

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)


@contextlib.contextmanager
def _quiet():
    """Without DeepSpeed's prints while it sets itself up; what goes to stderr stays."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
