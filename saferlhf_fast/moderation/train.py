"""Stage moderation: a moderator from labelled answers, then its thresholds and quality on held-out ones.

    saferlhf-fast moderation train model=DIR data=FILE output=DIR train.eval_fraction=0.1

The loop is that of every supervised stage (training/supervised.py); losses.py has the loss. Thresholds,
temperatures and the page of quality come from the held-out data and are computed on rank 0 with the saved
model. Without held-out data the moderator is saved untuned: every threshold is 0.5.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.moderation_examples import ModerationExample, moderation_examples
from ..data.pair_template import pair_name
from ..errors import UserError, require
from ..models import backbone, quantized
from ..models.encoders import is_encoder
from ..models.export_files import export_metadata_writer
from ..models.folders import local_copy, quiet, readable, refuse_large_vocabulary
from ..models.lora import add_lora
from ..models.moderator import ModeratorModel, pooling_of
from ..models.moderator_files import moderator_from_backbone, save_moderator
from ..models.moderator_spec import Calibration, ModeratorSpec
from ..models.ngrams import bags_of
from ..models.packing import end_row, pack_sequences
from ..models.tokenizer import load_tokenizer
from ..runtime import console, engine
from ..runtime.run_folder import finish_run, open_run
from ..training.stage_helpers import held_out_split, raise_together, refuse_long, written_by_rank_0
from ..training.supervised import SupervisedTask, total_steps, train_supervised
from .held_out import without_overlap
from .labels import Labels, label_set_of, labels_of, require_label_set
from .losses import moderation_losses

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from ..config.setting_types import Data
    from ..config.stages import ModerationConfig

FEW = 10
"""Positives of a category below which its figures mean little; a warning names it."""


def train(cfg: "ModerationConfig", restart: bool = False) -> dict[str, Any]:
    """Runs the stage: writes the kept moderator to <output>/model, and its quality beside it.

    Every rank must call it.

    Args:
        cfg: Settings of the stage.
        restart: As in `run_folder.open_run`.

    Returns:
        The summary of the run.

    Raises:
        UserError: If settings, model or data do not fit together.
        NonFinite: If too many steps in a row gave numbers that are not finite.
    """
    engine.start(cfg.engine, cfg.seed)
    config = _config_of(cfg)
    pairs = is_encoder(config)
    tokenizer = load_tokenizer(cfg.model, trust_remote_code=cfg.trust_remote_code, pairs=pairs)
    template = pair_name(cfg.template, pairs)

    def load(source: "Data") -> tuple[list[ModerationExample], dict[str, int]]:
        return moderation_examples(source, tokenizer, template, cfg.train.max_length, cfg.seed)

    examples, counts = load(cfg.data)
    examples, held_out = held_out_split(cfg, examples, load)
    if cfg.train.eval_data is not None:
        held_out = without_overlap(examples, held_out, cfg.overlap)
    spec = spec_of(cfg, config, examples, pairs)
    if held_out:
        require("thresholds", "eval", "sklearn")
        require_label_set(held_out, spec, "train.eval_data")
    labels = labels_of(examples, spec)
    model = _model(cfg, spec, tokenizer, labels, examples)
    refuse_long(cfg, model.config, max(len(e.ids) for e in examples + held_out), model.form.first)
    states = {} if cfg.train_backbone else pooled_states(model, examples + held_out, cfg)
    if cfg.lora.rank:
        model = add_lora(model, cfg.lora)
    folder = open_run("moderation", cfg, restart)
    _say(counts, labels, spec)
    trained = engine.Engine(
        model, cfg.optim, cfg.engine, total_steps(len(examples), cfg.train, engine.world_size())
    )
    card = {"stage": "moderation", "model": cfg.model, "data": counts, "label set": spec.label_set or None}
    task = SupervisedTask(
        weigh=lambda example: 1,
        tokens=lambda example: len(example.ids),
        save=partial(_save, trained, tokenizer, cfg, card),
        write_export_metadata=export_metadata_writer(trained.module, tokenizer),
        loss=_loss_of(spec, states),
    )
    summary = train_supervised(trained, task, examples, held_out, cfg, folder, "moderation")
    summary |= {"examples": len(examples), "held_out": len(held_out), "data": counts}
    if held_out:
        summary |= _tuned_on_rank_0(folder, held_out, cfg)
    finish_run(folder, summary)
    return summary


def spec_of(
    cfg: "ModerationConfig",
    config: "PretrainedConfig",
    examples: Sequence[ModerationExample],
    pairs: bool,
) -> ModeratorSpec:
    """What the moderator of a config predicts: the labels that its data have.

    Args:
        cfg: Settings of the stage.
        config: The backbone's.
        examples: Training examples.
        pairs: Whether the backbone reads pairs of texts.

    Raises:
        UserError: The data have several label sets, or not the wanted one.
    """
    label_set, categories = label_set_of(examples, cfg.label_set)
    sources = sorted({example.source for example in examples}) if cfg.source_heads else []
    return ModeratorSpec(
        label_set=label_set,
        categories=categories,
        refusal=any(example.refusal is not None for example in examples),
        sources=tuple(sources) if len(sources) > 1 else (),
        pooling=pooling_of(config, cfg.pooling),
        pairs=pairs,
        template=cfg.template,
        max_length=cfg.train.max_length,
        buckets=cfg.buckets if cfg.features == "ngrams" else 0,
        rate=cfg.ngram_learning_rate / cfg.optim.learning_rate,
    )


def _config_of(cfg: "ModerationConfig") -> "PretrainedConfig":
    from transformers import AutoConfig

    folder = local_copy(cfg.model, cfg.allow_pickle)
    with readable(cfg.model, "model"), quiet():
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=cfg.trust_remote_code)


def _model(
    cfg: "ModerationConfig",
    spec: ModeratorSpec,
    tokenizer: "PreTrainedTokenizerBase",
    labels: Labels,
    examples: Sequence[ModerationExample],
) -> ModeratorModel:
    """The moderator before its first step, without adapters."""
    model = moderator_from_backbone(
        cfg.model,
        spec,
        trust_remote_code=cfg.trust_remote_code,
        allow_pickle=cfg.allow_pickle,
        **quantized.options_of_base(cfg.lora, cfg.engine),
    )
    refuse_large_vocabulary(cfg.model, tokenizer, model.backbone.get_input_embeddings().weight.shape[0])
    model.head.set_shares(labels.positive_X, labels.negative_X, cfg.weight_cap)
    if model.ngrams is not None:
        model.ngrams.count_documents((e.prompt_text, e.response_text) for e in examples)
    if not cfg.train_backbone:
        model.backbone.requires_grad_(False)
    elif cfg.train.gradient_checkpointing:
        backbone.recompute_activations(model.backbone)
    if not cfg.engine.packing:
        model.form = model.form.unpacked()
    return model


@torch.no_grad()
def pooled_states(
    model: ModeratorModel, examples: Sequence[ModerationExample], cfg: "ModerationConfig"
) -> dict[int, torch.Tensor]:
    """{id of an example: its pooled state [H] on the CPU}, of a backbone that is not trained."""
    from ..models.packing import pack_into_microbatches

    states: dict[int, torch.Tensor] = {}
    model = model.to(engine.device(), engine.precision(cfg.engine)).eval()
    for rows in pack_into_microbatches([len(e.ids) for e in examples], cfg.train.pass_tokens())[0]:
        batch = [examples[i] for i in rows]
        for example, state in zip(batch, model.pooled(_packed(batch)).float().cpu()):
            states[id(example)] = state
    model.to("cpu", torch.float32)
    return states


def _packed(batch: Sequence[ModerationExample]) -> Any:
    return pack_sequences(
        [e.ids for e in batch],
        [end_row(len(e.ids)) for e in batch],
        engine.device(),
        [e.second_at for e in batch],
    )


def _loss_of(
    spec: ModeratorSpec, states: dict[int, torch.Tensor]
) -> Callable[[Any, Sequence[ModerationExample]], tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """(model, examples) -> (sum of losses, sums by name), as SupervisedTask takes it."""

    def loss(model: Any, batch: Sequence[ModerationExample]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        device = engine.device()
        labels = Labels(*(tensor.to(device) for tensor in labels_of(batch, spec)))
        bags = None
        if spec.buckets:
            texts = [e.prompt_text for e in batch], [e.response_text for e in batch]
            bags = bags_of(*texts, spec.buckets).to(device)
        source_S = None
        if spec.sources:
            source_S = torch.tensor([spec.source_index(e.source) for e in batch], device=device)
        if states:
            pooled_SH = torch.stack([states[id(e)] for e in batch]).to(device)
            logits_SX = model(None, bags, source_S, pooled_SH)
        else:
            logits_SX = model(_packed(batch), bags, source_S)
        module = getattr(model, "module", model)
        losses = moderation_losses(logits_SX, labels, module.head.log_weight, spec)
        sums = {f"loss_{head}": values.sum() for head, values in losses.items()}
        return torch.stack(list(sums.values())).sum(), sums

    return loss


def _save(
    trained: engine.Engine,
    tokenizer: "PreTrainedTokenizerBase",
    cfg: "ModerationConfig",
    card: dict[str, Any],
    path: Path,
) -> None:
    """Writes the moderator into a folder, with adapters merged; every rank must call it."""
    gather = cfg.lora.rank > 0
    state = trained.state_dict() if trained.sharded and not gather else None
    with trained.gathered() if gather else contextlib.nullcontext():
        error = written_by_rank_0(
            lambda: save_moderator(path, trained.module, tokenizer, Calibration(), card, state)
        )
    raise_together(error)


def _tuned_on_rank_0(
    folder: Path, held_out: Sequence[ModerationExample], cfg: "ModerationConfig"
) -> dict[str, Any]:
    """Thresholds and quality on the held-out data, in the saved model and beside it; on every rank."""
    from .tune import tune_and_report

    line, summary = None, {}
    if engine.rank() == 0:
        try:
            summary = tune_and_report(folder, held_out, cfg)
        except UserError as error:
            line = str(error)
    line, summary = engine.gather_objects((line, summary))[0]
    if line is not None:
        raise UserError(line)
    return summary


def _say(counts: dict[str, int], labels: Labels, spec: ModeratorSpec) -> None:
    """Says what the data have, and names categories that the moderator cannot learn."""
    console.say(
        f"moderation: {counts['labelled']} labelled of {counts['records']} records, {counts['truncated']} "
        f"truncated; {len(spec.categories)} categories of {spec.label_set or 'no label set'}"
        f"{', refusal' if spec.refusal else ''}"
    )
    positive = dict(zip(spec.outputs, labels.positive_X.int().tolist()))
    known = dict(zip(spec.outputs, labels.known_SX.sum(0).tolist()))
    absent = [name for name, count in positive.items() if not count and known[name]]
    unknown = [name for name, count in known.items() if not count]
    few = [f"{name} ({count})" for name, count in positive.items() if 0 < count < FEW]
    if unknown:
        console.warn(f"no label in training: {', '.join(unknown)}")
    if absent:
        console.warn(f"no positive in training, so never predicted: {', '.join(absent)}")
    if few:
        console.warn(f"fewer than {FEW} positives in training: {', '.join(few)}")
