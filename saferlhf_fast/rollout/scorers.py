"""What scores a response, by the kind that a ScorerSpec names.

A scorer is called with a rollout and a slice of its rows and gives scores_b, fp32, one for each of them. It
also runs on the dummy micro-batch of a pass without rows, since sharded models need every rank; the caller
leaves that score out.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.examples import retokenize_split
from ..data.pair_template import pair_name, template_of
from ..data.templates import Template
from ..models.encoders import reads_pairs
from ..models.folders import context_length, refuse_short_context
from ..models.moderator_files import refuse_moderator
from ..models.packing import end_row, pack_sequences
from ..models.score_model import ScoreModel, load_score_model
from ..models.tokenizer import load_tokenizer, same_tokenizer
from ..runtime import engine
from .moderator_scorer import load_moderator_scorer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..config.sections import ScorerSpec
    from ..config.stages import EvaluateConfig, PPOConfig
    from .types import Rollout

Scorer = Callable[["Rollout", slice], "Tensor"]
"""(rollout, slice of its rows) -> scores_b, fp32."""


@dataclass(frozen=True)
class ScoreModelScorer:
    """A frozen score model; text is re-tokenised where its tokenizer differs from the actor's."""

    model: engine.Frozen  # of a ScoreModel, or of a ScoreOnSharedBase
    tokenizer: "PreTrainedTokenizerBase"
    template: str
    retokenizes: bool  # always, where it reads pairs of texts
    policy_template: Template | None = None  # of the policy, whose end marks may be in its texts

    def __call__(self, rollout: "Rollout", rows: slice) -> "Tensor":
        """scores_b of some rows of a rollout, fp32."""
        if not self.retokenizes or rows.start == rows.stop:
            return self.model(rollout.packed(rows, at_end=True))
        texts = rollout.texts[rows]
        template, score = template_of(self.tokenizer, self.template), self.model.module
        assert isinstance(score, ScoreModel), "a score model on a shared base has the actor's tokenizer"
        split = retokenize_split(
            [p.messages for p in rollout.prompts[rows]],
            texts if self.policy_template is None else [self.policy_template.answer_text(t) for t in texts],
            template,
            ended=rollout.ended[rows],
            max_length=context_length(score.config, score.form.first),
        )
        ids = [head + tail for head, tail in split]
        seconds = [len(head) if template.marks_second else None for head, _ in split]
        return self.model(pack_sequences(ids, [end_row(len(row)) for row in ids], rollout.device, seconds))


def load_score_model_scorer(
    spec: "ScorerSpec", tokenizer: "PreTrainedTokenizerBase", cfg: "PPOConfig | EvaluateConfig"
) -> tuple[ScoreModelScorer, ScoreModel]:
    """A ScoreModelScorer, and its ScoreModel in fp32, from which a critic may start."""
    refuse_moderator(spec.path, "a score model")
    pairs = reads_pairs(spec.path, cfg.trust_remote_code)
    own = load_tokenizer(spec.path, trust_remote_code=cfg.trust_remote_code, pairs=pairs)
    score = load_score_model(
        spec.path, tokenizer=own, trust_remote_code=cfg.trust_remote_code, allow_pickle=cfg.allow_pickle
    )
    differs = pairs or not same_tokenizer(tokenizer, own)
    if not differs:  # else texts are cut to the model's context
        refuse_short_context(spec.path, score.config, cfg.max_length, "max_length")
    if not cfg.engine.packing:
        score.form = score.form.unpacked()
    frozen = engine.Frozen(copy.deepcopy(score), cfg.engine)
    policy_template = Template(tokenizer, cfg.template) if differs else None
    return ScoreModelScorer(frozen, own, pair_name(cfg.template, pairs), differs, policy_template), score


KINDS: Mapping[str, Callable[..., tuple[Scorer, ScoreModel | None]]] = {
    "score_model": load_score_model_scorer,
    "moderator": load_moderator_scorer,
}
"""{kind of a ScorerSpec: its loader}; a loader has `load_scorer`'s arguments and result."""


def load_scorer(
    spec: "ScorerSpec", tokenizer: "PreTrainedTokenizerBase", cfg: "PPOConfig | EvaluateConfig"
) -> tuple[Scorer, ScoreModel | None]:
    """Loads what a ScorerSpec names.

    Args:
        spec: Kind and path.
        tokenizer: Of the policy whose texts are scored.
        cfg: The stage's config.

    Returns:
        The scorer, and its ScoreModel in fp32, from which a critic may start; None where it has none.
    """
    return KINDS[spec.kind](spec, tokenizer, cfg)
