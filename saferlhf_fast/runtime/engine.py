"""Trained and frozen models under DeepSpeed, which does sharding, precision, optimiser and schedule.

Stages use DeepSpeed and the processes through this file alone, and through checkpoint/. One CPU process needs
no launcher; `torchrun` and `deepspeed` start many.

A loss that is passed to `Engine.backward` must already be divided by the count over *all* micro-batches and
*all* ranks, so that the sum over micro-batches and ranks is the loss of the global batch: gradients then do
not depend on how the batch was split. DeepSpeed averages over ranks, which `backward` undoes. DeepSpeed would
also divide by its accumulation count; therefore `managed_gradient_accumulation` is false, and every `step()`
ends an accumulation.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from ..errors import UserError
from . import optimizers
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
from .deepspeed_config import learning_rate_factor, precision, settings, shards_frozen
from .deepspeed_library import imported_deepspeed, quiet
from .process_group import finish, seed_all, start, started

if TYPE_CHECKING:
    from typing import Self

    from ..config.sections import Engine as EngineConfig
    from ..config.sections import Optimizer

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
    "not_finite",
    "precision",
    "rank",
    "seed_all",
    "start",
    "started",
    "world_size",
    "written",
]


class StepResult(TypedDict):
    """What an optimiser step reports.

    Attributes:
        grad_norm: Norm of the gradients before clipping, over all ranks; a 0-d tensor or a number.
        lr: Learning rate of the step.
        skipped: DeepSpeed left the step out on all ranks, because a gradient was not finite. Never true in
            fp16, where DeepSpeed finds its loss scale that way; such steps are only counted.
    """

    grad_norm: float | torch.Tensor
    lr: float
    skipped: bool


class Engine:
    """One trained model under DeepSpeed.

    Calling it runs the module's forward. `backward(loss)` adds gradients, `step()` applies them.

    Attributes:
        deepspeed: DeepSpeed's engine.
        sharded: Whether ZeRO-3 spreads the weights over the devices.
        unguarded: Whether DeepSpeed would apply gradients that are not finite (see `local_norm`).
        skipped_steps: Steps that were left out or discarded so far.
    """

    def __init__(
        self, module: torch.nn.Module, optim: "Optimizer", cfg: "EngineConfig", total_steps: int
    ) -> None:
        """Makes the optimiser and the schedule, and moves the model to this process's device.

        Args:
            module: The model, in fp32 on the CPU.
            optim: The optimiser's settings.
            cfg: The engine's settings.
            total_steps: Optimiser steps of the whole run, for the schedule.

        Raises:
            UserError: The settings ask for fp16 without a GPU, or for an optimiser that cannot be used.
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
        with quiet(), optimizers.untouched(optimizer):
            self.deepspeed, *_ = imported_deepspeed().initialize(
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

    def _clip_unsharded(self) -> None:
        """Replaces DeepSpeed's clipping for ZeRO-0 in fp32, which does not store the norm."""
        self.deepspeed._global_grad_norm = torch.nn.utils.clip_grad_norm_(
            self.module.parameters(), self.max_grad_norm or float("inf")
        )

    def local_norm(self) -> torch.Tensor | None:
        """Norm of this rank's gradients, to be checked with `not_finite` before `step`.

        Returns:
            A 0-d tensor; None where DeepSpeed itself leaves out a step whose gradients are not finite.
        """
        if not self.unguarded:
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    @property
    def module(self) -> Any:
        """The model itself."""
        return self.deepspeed.module

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.deepspeed.get_lr()[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's forward."""
        return self.deepspeed(*args, **kwargs)

    def train(self, mode: bool = True) -> "Self":
        """Switches the model to training mode, or with False to evaluation mode."""
        self.deepspeed.train(mode)
        return self

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of a loss.

        A module whose base is shared with other models may have a method `before_backward`, which switches
        the base to its own adapter first.

        Args:
            loss: 0-d; this micro-batch's share of the global batch's loss (see the file's docstring).
        """
        getattr(self.module, "before_backward", lambda: None)()
        self.deepspeed.backward(loss * world_size(), scale_wrt_gas=False)

    def step(self) -> StepResult:
        """Clips the gradients, updates the weights, and sets the gradients to zero."""
        lr, before = self.lr, self.deepspeed.skipped_steps
        self.deepspeed.step()
        self.skipped_steps += self.deepspeed.skipped_steps - before
        norm = self.deepspeed.get_global_grad_norm()
        skipped = self.deepspeed.skipped_steps > before and self.precision != "float16"
        return {"grad_norm": float("nan") if norm is None else norm, "lr": lr, "skipped": skipped}

    def discard(self) -> None:
        """Clears the gradients without a step: weights, optimiser and schedule stay; every rank must call it.

        ZeRO keeps gradients in several places, which DeepSpeed clears when their norm is not finite. Under
        ZeRO this method makes DeepSpeed believe that it is not.
        """
        if self.zero_stage == 0:
            self.deepspeed.optimizer.zero_grad()
            self.deepspeed.zero_grad()
        else:
            before = self.deepspeed.skipped_steps
            with _norms_counted_as_invalid(self.deepspeed.optimizer):
                self.deepspeed.step()
            assert self.deepspeed.skipped_steps == before + 1, (
                "DeepSpeed stepped on gradients that it was to discard"
            )
        self.skipped_steps += 1

    def gathered(self) -> AbstractContextManager[None]:
        """Context in which every rank has all weights; without ZeRO-3 it always has."""
        return gathered(self.module, self.sharded)

    def state_dict(self) -> dict[str, Any] | None:
        """All weights by name, on the CPU; every rank must call it.

        Under ZeRO-3 they are gathered one by one, so that no device holds the whole model.

        Returns:
            The weights on rank 0, None on the others.
        """
        weights: dict[int, torch.Tensor | None] = {}  # gathered ones, by the parameter's id
        ids: dict[str, int] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            ids[name] = id(parameter)  # tied weights have several names
            if self.sharded and id(parameter) not in weights:
                with imported_deepspeed().zero.GatheredParameters([parameter], modifier_rank=None):
                    weights[id(parameter)] = parameter.detach().cpu().clone() if rank() == 0 else None
        if rank() != 0:
            return None
        return {
            name: weights[ids[name]] if ids.get(name) in weights else tensor.detach().cpu().clone()
            for name, tensor in self.module.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Replaces the weights by those of rank 0; every rank must call it.

        Only for the end of a run: the optimiser's own fp32 copies are not changed.

        Args:
            state: What `state_dict` returned; only rank 0's is read.
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
                    assert state is not None, "rank 0 has the weights"
                    parameter.data.copy_(state[name])


@contextlib.contextmanager
def _norms_counted_as_invalid(optimizer: Any) -> Iterator[None]:
    """Context in which a ZeRO optimiser takes every gradient norm for not finite.

    Its step then clears the gradients and changes nothing else. DeepSpeed has no public call for that; the
    optimiser looks a function of its module up by name, which is replaced here.
    """
    module: Any = sys.modules[type(optimizer).__module__]
    original = module.is_invalid_grad_norm
    module.is_invalid_grad_norm = lambda norm: True
    try:
        yield
    finally:
        module.is_invalid_grad_norm = original


def gathered(module: torch.nn.Module, sharded: bool) -> AbstractContextManager[None]:
    """Context in which every rank has all weights of a module; changes to them are lost.

    Args:
        module: The module.
        sharded: Whether ZeRO-3 spreads its weights over the devices; without it the context does nothing.
    """
    if not sharded:
        return contextlib.nullcontext()
    return imported_deepspeed().zero.GatheredParameters(list(module.parameters()), modifier_rank=None)


def written(parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager[None]:
    """Context in which weights that ZeRO-3 has sharded are gathered; rank 0's changes go to every rank.

    Args:
        parameters: The weights to gather.
    """
    return imported_deepspeed().zero.GatheredParameters(parameters, modifier_rank=0)


def _shard(module: torch.nn.Module, cfg: "EngineConfig", config: Mapping[str, Any]) -> None:
    """Gives each rank its share of every weight, one weight at a time: no device holds the whole model."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(precision(cfg))
    with quiet():
        imported_deepspeed().zero.Init(module=module, config_dict_or_path=config)


class Frozen:
    """A model that is not trained: reference, reward, cost.

    Its weights are sharded, or complete on each device: see `shards_frozen`.
    """

    def __init__(self, module: torch.nn.Module, cfg: "EngineConfig") -> None:
        """Moves the model to this process's device, in the engine's precision.

        Args:
            module: The model, on the CPU; its weights no longer require gradients.
            cfg: The engine's settings.
        """
        module.requires_grad_(False)
        self.sharded = shards_frozen(cfg)
        if self.sharded:
            _shard(module.eval(), cfg, settings(cfg, None))
        module = module.eval().to(device=device(), dtype=precision(cfg))
        if self.sharded:
            with quiet():
                self.call, *_ = imported_deepspeed().initialize(
                    model=module, config=settings(cfg, None), dist_init_required=False
                )
            self.call.eval()
        else:
            self.call = module
        self.module = module

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's forward without gradients."""
        return self.call(*args, **kwargs)
