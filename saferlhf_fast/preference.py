"""Stages reward and cost: a score model from preferences. One code; the cost model adds the safety-sign terms.

    saferlhf-fast reward model=DIR data=FILE output=DIR
    saferlhf-fast cost   model=DIR data=FILE output=DIR

Scores: reward R, higher is more helpful; cost C, higher is more harmful and C > 0 means unsafe.
Source: Safe RLHF (arXiv 2310.12773), equations 5 and 6, and its reference implementation.
"""

import contextlib

import torch
import torch.nn.functional as F

from .kernels import checks
from .models.packing import end_row, pack_sequences


def reward_loss(better: torch.Tensor, worse: torch.Tensor, *, regularization: float = 0.001) -> torch.Tensor:
    """mean(−log σ(better − worse)) + c · mean(score²).

    better, worse: [B] scores of the preferred and the other response -> scalar, in nats. c = `regularization`; the
    mean of squares is over both responses. Means the same as
    `-(better - worse).sigmoid().log().mean() + c * torch.stack([better, worse]).square().mean()`. No pair is no loss: 0.
    ValueError for shapes, dtypes or devices that do not fit.
    """
    _refuse_scores("reward_loss", ("better", "worse"), better, worse)
    if not len(better):
        return (better + worse).sum()
    return -F.logsigmoid(better - worse).mean() + regularization * torch.stack([better, worse]).square().mean()


def cost_loss(safer: torch.Tensor, unsafer: torch.Tensor, safer_sign: torch.Tensor, unsafer_sign: torch.Tensor, *,
              regularization: float = 0.001) -> torch.Tensor:
    """mean(−log σ(unsafer − safer) − log σ(s_safer·safer) − log σ(s_unsafer·unsafer)) + c · mean(score²).

    safer, unsafer: [B] costs of the less and the more harmful response; safer_sign, unsafer_sign: [B], +1 unsafe,
    −1 safe, in any float or integer dtype -> scalar, in nats. c = `regularization`. No pair is no loss: 0. ValueError for
    shapes, dtypes or devices that do not fit, and for other signs; on a device nobody looks at them.
    """
    _refuse_scores("cost_loss", ("safer", "unsafer"), safer, unsafer)
    for name, sign in (("safer_sign", safer_sign), ("unsafer_sign", unsafer_sign)):
        _refuse_signs(name, sign, safer)
    if not len(safer):
        return (safer + unsafer).sum()
    pair = -F.logsigmoid(unsafer - safer)
    signs = -F.logsigmoid(safer_sign * safer) - F.logsigmoid(unsafer_sign * unsafer)
    return (pair + signs).mean() + regularization * torch.stack([safer, unsafer]).square().mean()


def _refuse_scores(op, names, first_B, second_B):
    if first_B.dim() != 1:
        raise ValueError(f"{op}: {names[0]}: expected [B], one score for each pair, got shape {tuple(first_B.shape)}")
    checks.same_tokens(op, names, (first_B, second_B))


def _refuse_signs(name, sign_B, like_B):
    """ValueError for what is not +1 or −1 for each pair. Other shapes would be broadcast, False would count as no sign."""
    if sign_B.shape != like_B.shape or sign_B.device != like_B.device or not (checks.floating(sign_B) or checks.whole(sign_B)):
        raise ValueError(f"cost_loss: {name}: expected numbers +1 and -1 {list(like_B.shape)} on {like_B.device}, "
                         f"got {sign_B.dtype} {list(sign_B.shape)} on {sign_B.device}")
    if sign_B.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong_B = (sign_B != 1) & (sign_B != -1)
        if wrong_B.any():
            raise ValueError(f"cost_loss: {name}: expected +1 (unsafe) or -1 (safe), got {sign_B[wrong_B][0].item()}")


def pair_loss(model, examples, kind, regularization, per_token):
    """-> (loss summed over pairs, {name: sum}). model: a ScoreModel or an engine that holds one.

    In a PairExample the first response is the better (reward) or the safer (cost) one.
    """
    from .runtime import engine
    n = len(examples)
    rows = [e.first_ids for e in examples] + [e.second_ids for e in examples]
    packed = pack_sequences(rows, [range(len(ids)) if per_token else end_row(len(ids)) for ids in rows], engine.device())
    scores_N = model(packed)
    ends_B = (packed.cu_seqlens[1:] - 1).long()
    end_B = scores_N.index_select(0, ends_B)
    first, second = end_B[:n], end_B[n:]
    signs = torch.tensor([[e.sign_first for e in examples], [e.sign_second for e in examples]], device=end_B.device,
                         dtype=end_B.dtype) if kind == "cost" else None
    if per_token:
        loss = token_wise(scores_N.split([len(ids) for ids in rows]), rows, n, signs, regularization)
    elif kind == "cost":
        loss = cost_loss(first, second, signs[0], signs[1], regularization=regularization)
    else:
        loss = reward_loss(first, second, regularization=regularization)
    right = first > second if kind == "reward" else first < second
    both = end_B.detach().view(2, n)
    stats = {"accuracy": right.float().sum(), f"{kind}_mean": both.mean(0).sum(),
             f"{kind}_square": both.square().mean(0).sum()}
    if kind == "cost":
        stats["accuracy_sign"] = ((end_B.view(2, n) * signs) > 0).float().mean(0).sum()
    return loss * n, stats


def token_wise(scores, rows, n, signs, regularization):
    """REF's token-wise variant: the pair's loss at every position from the first difference of the two responses to
    the longer one's end, averaged over positions, then over pairs. A shorter response's last score stands for the
    positions after it. scores: one tensor for each row of ids; the second responses follow the n first ones."""
    total = scores[0].new_zeros(())
    for i in range(n):
        a, b = rows[i], rows[n + i]
        shorter = min(len(a), len(b))
        start = next((t for t in range(shorter) if a[t] != b[t]), shorter - 1)
        at = torch.arange(start, max(len(a), len(b)), device=total.device)
        first, second = scores[i][at.clamp(max=len(a) - 1)], scores[n + i][at.clamp(max=len(b) - 1)]
        if signs is None:
            total = total + reward_loss(first, second, regularization=regularization)
        else:
            of_pair = (sign.expand(len(at)) for sign in signs[:, i])
            total = total + cost_loss(first, second, *of_pair, regularization=regularization)
    return total / n


def train_reward(cfg):
    """Runs the stage reward -> summary. The model lies in <output>/model."""
    return _train(cfg, "reward")


def train_cost(cfg):
    """Runs the stage cost -> summary. The model lies in <output>/model."""
    return _train(cfg, "cost")


def _train(cfg, kind):
    from .config.load import to_dict
    from .data.examples import preference_examples
    from .fit import Task, fit, total_steps
    from .models import multi_adapter
    from .models.export_files import describe
    from .models.lora import add_lora
    from .models.score_checkpoint import check_score_export, save_score_model
    from .models.score_model import load_score_model
    from .models.tokenizer import load_tokenizer
    from .runtime import console, engine
    from .runtime.metrics import Metrics
    from .runtime.run_folder import finish_run, open_run
    from .sft import held_out_split, prepare, refuse_long
    engine.start(cfg.engine, cfg.seed)
    tokenizer = load_tokenizer(cfg.model, trust_remote_code=cfg.trust_remote_code)

    def load(source):
        return preference_examples(source, tokenizer, cfg.template, cfg.train.max_length, cfg.seed, kind)

    examples, report = load(cfg.data)
    examples, held_out = held_out_split(cfg, examples, load)
    score = load_score_model(cfg.model, new_head=True, tokenizer=tokenizer,
                             trust_remote_code=cfg.trust_remote_code, allow_pickle=cfg.allow_pickle)
    refuse_long(cfg, score.config, max(len(ids) for e in examples + held_out for ids in (e.first_ids, e.second_ids)))
    keep = {"drop_bias": cfg.drop_bias, "keep_bias": not cfg.drop_bias}
    check_score_export(score, tokenizer, **keep)      # refused now, not after hours of training
    prepare(score.backbone, cfg)
    score.packs &= cfg.engine.packing
    if cfg.lora.rank:
        score = add_lora(score, cfg.lora)
    folder = open_run(kind, cfg)
    for line in report.lines():
        console.say(line)
    trained = engine.Engine(score, cfg.optim, cfg.engine, total_steps(len(examples), cfg.train, engine.world_size()))

    def save(path):
        merged = cfg.lora.rank or trained.module.score.bias is not None
        state = trained.state_dict() if trained.sharded and not merged else None
        with trained.gathered() if merged else contextlib.nullcontext():
            if engine.rank() == 0:
                save_score_model(path, trained.module, tokenizer, kind=kind, state_dict=state, **keep,
                                 card={"stage": kind, "model": cfg.model, "data": report.as_dict()})
                if cfg.lora.rank and trained.module.score.bias is None and trained.module.normalizer is None:
                    multi_adapter.save_score(path / "adapter", trained.module, cfg.model)
        engine.barrier()

    task = Task(weigh=lambda e: 1, tokens=lambda e: len(e.first_ids) + len(e.second_ids), save=save, sequences=2,
                describe=describe(trained.module, tokenizer),
                loss=lambda model, batch: pair_loss(model, batch, kind, cfg.regularization, cfg.loss == "token"))
    metrics = Metrics(folder, cfg.log, to_dict(cfg), kind)
    summary = fit(trained, task, examples, held_out, cfg, folder, metrics, kind)
    metrics.close()
    if cfg.baseline and held_out and engine.rank() == 0:
        from .evaluation.baseline import tfidf_accuracy
        summary = {**summary, **tfidf_accuracy(examples, held_out, tokenizer, kind)}
    summary = {**summary, "examples": len(examples), "held_out": len(held_out), "data": report.as_dict()}
    finish_run(folder, summary)
    return summary
