"""Stage dpo: direct preference optimisation of a policy against its frozen starting model.

    saferlhf-fast dpo model=DIR data=FILE output=DIR

The loss is −log σ(β · (Δ_chosen − Δ_rejected)), Δ = log π_θ(y | x) − log π_ref(y | x), summed over the tokens
of the response. Every response token counts, the first one and the end of the sequence included.

Source: Rafailov et al. (2023), arXiv 2305.18290, equation 7.
"""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..models import backbone, quantized
from ..models.causal_lm import load_causal_lm
from ..models.export_files import export_metadata_writer
from ..models.lora import add_lora
from ..models.packing import pack_sequences, response_rows
from ..models.policy import Policy, sequence_sums
from ..models.tokenizer import load_tokenizer
from ..runtime import console, engine
from ..runtime.run_folder import finish_run, open_run
from .example_loading import example_loader, longest_of
from .losses import dpo_loss
from .stage_helpers import held_out_split, refuse_long, save_policy
from .supervised import SupervisedTask, total_steps, train_supervised

if TYPE_CHECKING:
    import torch

    from ..config.stages import DPOConfig
    from ..data.examples import PairExample


def batch_loss(
    policy: Policy | engine.Engine,
    reference: "Callable[..., torch.Tensor]",
    examples: "Sequence[PairExample]",
    beta: float,
) -> "tuple[torch.Tensor, dict[str, torch.Tensor]]":
    """Σ −log σ(β · (Δ_chosen − Δ_rejected)) over some pairs, and sums of what is reported.

    Args:
        policy: A Policy, or an engine that holds one.
        reference: The frozen starting policy.
        examples: Pairs; the first response of each is the chosen one.
        beta: β, the strength of the pull towards the reference.

    Returns:
        (the sum in nats, sums over pairs by name: implied rewards β · Δ, accuracy, margin).
    """
    n = len(examples)
    rows = [e.first_ids for e in examples] + [e.second_ids for e in examples]
    positions = [response_rows(e.prompt_length, len(ids)) for e, ids in zip([*examples] * 2, rows)]
    packed = pack_sequences(rows, positions, engine.device())
    logp_B, ref_B = (sequence_sums(model(packed), packed) for model in (policy, reference))
    losses, margin = dpo_loss(logp_B[:n], logp_B[n:], ref_B[:n], ref_B[n:], beta=beta)
    better, worse = (beta * (logp_B - ref_B)).detach().view(2, n)
    return losses.sum(), {
        "reward": (better + worse).sum(),
        "better_sample_reward": better.sum(),
        "worse_sample_reward": worse.sum(),
        "reward_accuracy": (margin > 0).float().sum(),
        "reward_margin": margin.detach().sum(),
    }


def train(cfg: "DPOConfig", restart: bool = False) -> dict[str, Any]:
    """Runs the stage dpo; every rank must call it.

    Writes the kept model to <output>/model, metrics and checkpoints.

    Args:
        cfg: Settings of the stage.
        restart: As in `run_folder.open_run`.

    Returns:
        The summary of the run: steps, losses (nats per pair), accuracies, the kept step, counts of the data.

    Raises:
        UserError: If settings, model or data do not fit together.
        NonFinite: If too many steps in a row gave numbers that are not finite.

    Source:
        Rafailov et al. (2023), Direct Preference Optimization, arXiv 2305.18290.
    """
    engine.start(cfg.engine, cfg.seed)
    tokenizer = load_tokenizer(cfg.model, trust_remote_code=cfg.trust_remote_code)
    load = example_loader(cfg, cfg.preference, tokenizer, cfg.template)
    examples, report = load(cfg.data)
    examples, held_out = held_out_split(cfg, examples, load)
    lm = load_causal_lm(
        cfg.model,
        tokenizer=tokenizer,
        trust_remote_code=cfg.trust_remote_code,
        allow_pickle=cfg.allow_pickle,
        **quantized.options_of_base(cfg.lora, cfg.engine),
    )
    refuse_long(cfg, lm.config, longest_of(examples, held_out))
    reference = engine.Frozen(Policy(copy.deepcopy(lm), cfg.engine.packing), cfg.engine)
    if cfg.train.gradient_checkpointing:
        backbone.recompute_activations(lm)
    if cfg.lora.rank:
        lm = add_lora(lm, cfg.lora)
    folder = open_run("dpo", cfg, restart)
    for line in report.lines():
        console.say(line)
    policy = engine.Engine(
        Policy(lm, cfg.engine.packing),
        cfg.optim,
        cfg.engine,
        total_steps(len(examples), cfg.train, engine.world_size()),
    )
    task = SupervisedTask(
        weigh=lambda e: 1,
        tokens=lambda e: len(e.first_ids) + len(e.second_ids),
        write_export_metadata=export_metadata_writer(policy.module, tokenizer),
        loss=lambda model, batch: batch_loss(model, reference, batch, cfg.beta),
        save=lambda path: save_policy(policy, path, tokenizer, {"stage": "dpo", "model": cfg.model}),
    )
    summary = train_supervised(policy, task, examples, held_out, cfg, folder, "dpo")
    summary |= {"examples": len(examples), "held_out": len(held_out), "data": report.as_dict()}
    finish_run(folder, summary)
    return summary
