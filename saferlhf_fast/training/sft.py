"""Stage sft: next-token cross-entropy over the assistant's tokens.

    saferlhf-fast sft model=DIR data=FILE output=DIR

The loss is −mean log π_θ(y_t | x, y_<t), averaged over all trained tokens of the global batch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data.token_cache import SFT
from ..models import backbone, quantized
from ..models.causal_lm import load_causal_lm
from ..models.export_files import export_metadata_writer
from ..models.lora import add_lora
from ..models.policy import Policy, pack_trained
from ..models.tokenizer import load_tokenizer
from ..runtime import console, engine
from ..runtime.run_folder import finish_run, open_run
from .example_loading import example_loader, longest_of
from .stage_helpers import held_out_split, refuse_long, save_policy
from .supervised import SupervisedTask, total_steps, train_supervised

if TYPE_CHECKING:
    import torch

    from ..config.stages import SFTConfig
    from ..data.examples import SFTExample


def sft_loss(
    policy: Policy | engine.Engine, examples: "Sequence[SFTExample]"
) -> "tuple[torch.Tensor, dict[str, torch.Tensor]]":
    """−Σ log π_θ(y_t | x, y_<t) over the trained tokens of some examples.

    Args:
        policy: A Policy, or an engine that holds one.
        examples: Dialogues with a mask of the tokens to train on.

    Returns:
        (the sum in nats, an empty dict).
    """
    return -policy(pack_trained(examples, engine.device())).sum(), {}


def train(cfg: "SFTConfig", restart: bool = False) -> dict[str, Any]:
    """Runs the stage sft; every rank must call it.

    Writes the kept model to <output>/model, metrics and checkpoints.

    Args:
        cfg: Settings of the stage.
        restart: As in `run_folder.open_run`.

    Returns:
        The summary of the run: steps, losses (nats per token), the kept step, counts of the data.

    Raises:
        UserError: If settings, model or data do not fit together.
        NonFinite: If too many steps in a row gave numbers that are not finite.

    Source:
        The first stage of Dai et al. (2023), Safe RLHF, arXiv 2310.12773.
    """
    engine.start(cfg.engine, cfg.seed)
    tokenizer = load_tokenizer(cfg.model, trust_remote_code=cfg.trust_remote_code)
    load = example_loader(cfg, SFT, tokenizer, cfg.template)
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
    if cfg.train.gradient_checkpointing:
        backbone.recompute_activations(lm)
    if cfg.lora.rank:
        lm = add_lora(lm, cfg.lora)
    folder = open_run("sft", cfg, restart)
    for line in report.lines():
        console.say(line)
    policy = engine.Engine(
        Policy(lm, cfg.engine.packing),
        cfg.optim,
        cfg.engine,
        total_steps(len(examples), cfg.train, engine.world_size()),
    )
    task = SupervisedTask(
        weigh=lambda e: sum(e.mask[1:]),
        tokens=lambda e: len(e.ids),
        loss=sft_loss,
        write_export_metadata=export_metadata_writer(policy.module, tokenizer),
        save=lambda path: save_policy(policy, path, tokenizer, {"stage": "sft", "model": cfg.model}),
    )
    summary = train_supervised(policy, task, examples, held_out, cfg, folder, "sft")
    summary |= {"examples": len(examples), "held_out": len(held_out), "data": report.as_dict()}
    finish_run(folder, summary)
    return summary
