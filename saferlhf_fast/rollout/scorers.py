"""What scores a response, by the kind that a ScorerSpec names.

A scorer is called with a rollout and a slice of its rows and gives scores_b, fp32, one for each of them. It
is asked about the dummy sequence of a pass without rows too, since sharded models need every rank; what it
says of that is left out by who asks.
"""

import copy
from dataclasses import dataclass
from typing import Any

from ..data.examples import retokenize
from ..models.folders import refuse_short_context
from ..models.packing import end_row, pack_sequences
from ..models.score_model import load_score_model
from ..models.tokenizer import load_tokenizer, same_tokenizer
from ..runtime import engine


@dataclass(frozen=True)
class ScoreModelScorer:
    """A frozen score model with its own tokenizer; text is re-tokenised where that differs from the actor's."""

    model: engine.Frozen
    tokenizer: Any
    template: str
    retokenizes: bool

    def __call__(self, rollout, rows):
        """-> scores_b of some rows of a rollout, fp32."""
        if not self.retokenizes or rows.start == rows.stop:
            return self.model(rollout.packed(rows, at_end=True))
        ids = retokenize(
            [p.messages for p in rollout.prompts[rows]],
            rollout.texts[rows],
            self.tokenizer,
            self.template,
            ended=rollout.ended[rows],
            max_length=getattr(self.model.module.backbone.config, "max_position_embeddings", None),
        )
        return self.model(pack_sequences(ids, [end_row(len(row)) for row in ids], rollout.device))


def load_score_model_scorer(spec, tokenizer, cfg):
    """-> (ScoreModelScorer, its ScoreModel in fp32, from which a critic may start)."""
    own = load_tokenizer(spec.path, trust_remote_code=cfg.trust_remote_code)
    score = load_score_model(
        spec.path, tokenizer=own, trust_remote_code=cfg.trust_remote_code, allow_pickle=cfg.allow_pickle
    )
    differs = not same_tokenizer(tokenizer, own)
    if not differs:  # else texts are cut to what it can read
        refuse_short_context(spec.path, score.config, cfg.max_length, "max_length")
    score.packs &= cfg.engine.packing
    return ScoreModelScorer(
        engine.Frozen(copy.deepcopy(score), cfg.engine), own, cfg.template, differs
    ), score


KINDS = {"score_model": load_score_model_scorer}
"""{kind of a ScorerSpec: (spec, tokenizer of the policy, config of the stage) -> (scorer, ScoreModel or None)}."""


def load_scorer(spec, tokenizer, cfg):
    """Loads what a ScorerSpec names, for texts of a policy with `tokenizer` -> (scorer, ScoreModel in fp32
    from which a critic may start, or None where it is none).
    """
    return KINDS[spec.kind](spec, tokenizer, cfg)
