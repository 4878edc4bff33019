"""The run of the stages reward and cost: data, model, loop, saved score model; pair_loss.py has the loss."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.stage_table import STAGE_SPECS
from ..data.pair_template import pair_name
from ..errors import UserError
from ..models import backbone, multi_adapter, quantized
from ..models.encoders import reads_pairs
from ..models.export_files import export_metadata_writer
from ..models.lora import add_lora
from ..models.score_checkpoint import check_score_export, save_score_model
from ..models.score_model import load_score_model
from ..models.tokenizer import load_tokenizer
from ..runtime import console, engine
from ..runtime.run_folder import finish_run, open_run
from .example_loading import example_loader, longest_of
from .held_out_pairs import compare_with_tfidf, comparison_lines
from .pair_loss import pair_loss
from .stage_helpers import held_out_split, raise_together, refuse_long, written_by_rank_0
from .supervised import SupervisedTask, total_steps, train_supervised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..config.stages import PreferenceConfig


def train_score_model(cfg: "PreferenceConfig", kind: str, restart: bool) -> dict[str, Any]:
    """Runs the stage reward or cost.

    Args:
        cfg: Settings of the stage.
        kind: "reward" or "cost".
        restart: As in `run_folder.open_run`.

    Returns:
        The summary of the run.
    """
    engine.start(cfg.engine, cfg.seed)
    pairs = reads_pairs(cfg.model, cfg.trust_remote_code)
    tokenizer = load_tokenizer(cfg.model, trust_remote_code=cfg.trust_remote_code, pairs=pairs)
    template = pair_name(cfg.template, pairs)
    load = example_loader(cfg, kind, tokenizer, template)
    examples, report = load(cfg.data)
    examples, held_out = held_out_split(cfg, examples, load)
    score = load_score_model(
        cfg.model,
        new_head=True,
        pooling=cfg.pooling,
        tokenizer=tokenizer,
        trust_remote_code=cfg.trust_remote_code,
        allow_pickle=cfg.allow_pickle,
        **quantized.options_of_base(cfg.lora, cfg.engine),
    )
    if cfg.loss == "token" and score.pooling != "last":
        raise UserError(
            f"loss: expected sequence with pooling {score.pooling}, which gives one score for each sequence; "
            "got token"
        )
    refuse_long(cfg, score.config, longest_of(examples, held_out), score.form.first)
    # before training: a model that cannot be saved must not cost hours
    check_score_export(score, tokenizer, drop_bias=cfg.drop_bias, keep_bias=not cfg.drop_bias)
    if cfg.train.gradient_checkpointing:
        backbone.recompute_activations(score.backbone)
    if not cfg.engine.packing:
        score.form = score.form.unpacked()
    if cfg.lora.rank:
        score = add_lora(score, cfg.lora)
    folder = open_run(kind, cfg, restart)
    for line in report.lines():
        console.say(line)
    if held_out:
        console.say(f"held out: {len(held_out)} of {len(examples) + len(held_out)} pairs")
    trained = engine.Engine(
        score, cfg.optim, cfg.engine, total_steps(len(examples), cfg.train, engine.world_size())
    )
    card = {"stage": kind, "model": cfg.model, "data": report.as_dict()}
    task = SupervisedTask(
        weigh=lambda e: 1,
        tokens=lambda e: len(e.first_ids) + len(e.second_ids),
        save=_saver(trained, tokenizer, cfg, kind, card),
        write_export_metadata=export_metadata_writer(trained.module, tokenizer),
        loss=lambda model, batch: pair_loss(model, batch, kind, cfg.regularization, cfg.loss == "token"),
    )
    summary = train_supervised(trained, task, examples, held_out, cfg, folder, kind)
    if held_out:
        shown = ("eval/loss", "eval/accuracy", "eval/accuracy_sign")
        console.say("evaluation: " + ", ".join(f"{k[5:]} {summary[k]:.3f}" for k in shown if k in summary))
    if cfg.baseline and held_out:
        budget = cfg.train.pass_tokens(STAGE_SPECS[kind].sequences)
        compared = compare_with_tfidf(trained, examples, held_out, tokenizer, kind, budget)
        for line in comparison_lines(compared.get("comparison", {})):
            console.say(line)
        summary |= compared
    summary |= {"examples": len(examples), "held_out": len(held_out), "data": report.as_dict()}
    finish_run(folder, summary)
    return summary


def _saver(
    trained: engine.Engine,
    tokenizer: "PreTrainedTokenizerBase",
    cfg: "PreferenceConfig",
    kind: str,
    card: dict[str, Any],
) -> Callable[[Path], None]:
    """A function that writes the score model into a folder, with its adapter where there is one.

    Every rank must call that function.
    """

    def save(path: Path) -> None:
        model = trained.module
        # merging adapters, and reading a bias, needs the gathered weights
        gather = cfg.lora.rank or model.score.bias is not None
        state = trained.state_dict() if trained.sharded and not gather else None

        def write() -> None:
            save_score_model(
                path,
                model,
                tokenizer,
                kind=kind,
                state_dict=state,
                drop_bias=cfg.drop_bias,
                keep_bias=not cfg.drop_bias,
                card=card,
            )
            if cfg.lora.rank and multi_adapter.can_be_adapter(model):
                multi_adapter.save_score(path / "adapter", model, cfg.model)

        with trained.gathered() if gather else contextlib.nullcontext():
            error = written_by_rank_0(write)
        raise_together(error)

    return save
