"""Stages reward and cost: a score model from preferences.

One code; the cost model adds the safety-sign terms.

    saferlhf-fast reward model=DIR data=FILE output=DIR
    saferlhf-fast cost   model=DIR data=FILE output=DIR

Scores: reward R, higher is more helpful; cost C, higher is more harmful and C > 0 means unsafe.
Source: Safe RLHF (arXiv 2310.12773), equations 5 and 6, and its reference implementation.
"""

import contextlib

import torch

from ..models.packing import end_row, pack_sequences
from .losses import cost_loss, reward_loss, token_wise


def pair_loss(model, examples, kind, regularization, per_token):
    """-> (loss summed over pairs, {name: sum}). model: a ScoreModel or an engine that holds one.

    In a PairExample the first response is the better (reward) or the safer (cost) one.
    """
    from ..runtime import engine

    n = len(examples)
    rows = [e.first_ids for e in examples] + [e.second_ids for e in examples]
    packed = pack_sequences(
        rows, [range(len(ids)) if per_token else end_row(len(ids)) for ids in rows], engine.device()
    )
    scores_N = model(packed)
    ends_B = (packed.cu_seqlens[1:] - 1).long()
    end_B = scores_N.index_select(0, ends_B)
    first, second = end_B[:n], end_B[n:]
    signs = (
        torch.tensor(
            [[e.sign_first for e in examples], [e.sign_second for e in examples]],
            device=end_B.device,
            dtype=end_B.dtype,
        )
        if kind == "cost"
        else None
    )
    if per_token:
        loss = token_wise(scores_N.split([len(ids) for ids in rows]), rows, n, signs, regularization)
    elif kind == "cost":
        loss = cost_loss(first, second, signs[0], signs[1], regularization=regularization)
    else:
        loss = reward_loss(first, second, regularization=regularization)
    right = first > second if kind == "reward" else first < second
    both = end_B.detach().view(2, n)
    stats = {
        "accuracy": right.float().sum(),
        f"{kind}_mean": both.mean(0).sum(),
        f"{kind}_square": both.square().mean(0).sum(),
    }
    if kind == "cost":
        stats["accuracy_sign"] = ((end_B.view(2, n) * signs) > 0).float().mean(0).sum()
    return loss * n, stats


def train_reward(cfg, restart=False):
    """Runs the stage reward -> summary.

    The model lies in <output>/model. restart: as in `run_folder.open_run`.
    """
    return _train(cfg, "reward", restart)


def train_cost(cfg, restart=False):
    """Runs the stage cost -> summary. The model lies in <output>/model. restart: as in `run_folder.open_run`."""
    return _train(cfg, "cost", restart)


def _train(cfg, kind, restart):
    from ..config.load import to_dict
    from ..data.examples import preference_examples
    from ..models import backbone, multi_adapter
    from ..models.export_files import export_metadata_writer
    from ..models.lora import add_lora
    from ..models.score_checkpoint import check_score_export, save_score_model
    from ..models.score_model import load_score_model
    from ..models.tokenizer import load_tokenizer
    from ..runtime import console, engine
    from ..runtime.metrics import Metrics
    from ..runtime.run_folder import finish_run, open_run
    from .stage_helpers import held_out_split, refuse_long
    from .supervised import SupervisedTask, total_steps, train_supervised

    engine.start(cfg.engine, cfg.seed)
    tokenizer = load_tokenizer(cfg.model, trust_remote_code=cfg.trust_remote_code)

    def load(source):
        return preference_examples(source, tokenizer, cfg.template, cfg.train.max_length, cfg.seed, kind)

    examples, report = load(cfg.data)
    examples, held_out = held_out_split(cfg, examples, load)
    score = load_score_model(
        cfg.model,
        new_head=True,
        tokenizer=tokenizer,
        trust_remote_code=cfg.trust_remote_code,
        allow_pickle=cfg.allow_pickle,
    )
    refuse_long(
        cfg, score.config, max(len(ids) for e in examples + held_out for ids in (e.first_ids, e.second_ids))
    )
    keep = {"drop_bias": cfg.drop_bias, "keep_bias": not cfg.drop_bias}
    check_score_export(score, tokenizer, **keep)  # refused now, not after hours of training
    if cfg.train.gradient_checkpointing:
        backbone.recompute_activations(score.backbone)
    score.packs &= cfg.engine.packing
    if cfg.lora.rank:
        score = add_lora(score, cfg.lora)
    folder = open_run(kind, cfg, restart)
    for line in report.lines():
        console.say(line)
    trained = engine.Engine(
        score, cfg.optim, cfg.engine, total_steps(len(examples), cfg.train, engine.world_size())
    )

    def save(path):
        merged = cfg.lora.rank or trained.module.score.bias is not None
        state = trained.state_dict() if trained.sharded and not merged else None
        with trained.gathered() if merged else contextlib.nullcontext():
            if engine.rank() == 0:
                save_score_model(
                    path,
                    trained.module,
                    tokenizer,
                    kind=kind,
                    state_dict=state,
                    **keep,
                    card={"stage": kind, "model": cfg.model, "data": report.as_dict()},
                )
                if cfg.lora.rank and trained.module.score.bias is None and trained.module.normalizer is None:
                    multi_adapter.save_score(path / "adapter", trained.module, cfg.model)
        engine.barrier()

    task = SupervisedTask(
        weigh=lambda e: 1,
        tokens=lambda e: len(e.first_ids) + len(e.second_ids),
        save=save,
        write_export_metadata=export_metadata_writer(trained.module, tokenizer),
        loss=lambda model, batch: pair_loss(model, batch, kind, cfg.regularization, cfg.loss == "token"),
    )
    metrics = Metrics(folder, cfg.log, to_dict(cfg), kind)
    summary = train_supervised(trained, task, examples, held_out, cfg, folder, metrics, kind)
    metrics.close()
    if cfg.baseline and held_out and engine.rank() == 0:
        from .tfidf_baseline import tfidf_accuracy

        summary = {**summary, **tfidf_accuracy(examples, held_out, tokenizer, kind)}
    summary = {**summary, "examples": len(examples), "held_out": len(held_out), "data": report.as_dict()}
    finish_run(folder, summary)
    return summary
