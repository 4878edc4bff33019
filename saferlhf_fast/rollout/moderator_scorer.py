"""A moderator as a scorer: how severe an answer is, as the cost of a PPO-Lag run or of an evaluation.

    cost='{kind: moderator, path: runs/moderation/model, signal: expected_severity}'

Answers are read as text, with the moderator's own tokenizer and template, and with the end that whole answers
have: also one that was cut at a limit, since the moderator has seen no others.

    expected_severity   Σ_k P(y > k), 0 to 3: a threshold of 0.5 (multiplier.threshold) bounds its mean
    unsafe_logit        logit of P(unsafe) minus that of its balanced threshold: above 0 where it is flagged

With `categories`, expected_severity is multiplied by the largest of their probabilities, and unsafe_logit is
the smaller one of itself and the largest of their logits above their thresholds. `refusal` times P(refusal)
is added: a guard alone rewards refusing everything.

Shapes: legend in rollout/types.py; X are the outputs of `ModeratorSpec.outputs`.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..data.moderation_examples import encode_dialogues, encode_pairs
from ..data.pair_template import PairTemplate, pair_name, template_of
from ..data.templates import Template
from ..errors import UserError
from ..models.folders import context_length
from ..models.moderator import ModeratorModel
from ..models.moderator_files import load_moderator
from ..models.moderator_spec import UNSAFE, Calibration, ModeratorSpec
from ..models.ngrams import bags_of
from ..models.packing import end_row, pack_sequences
from ..models.tokenizer import load_tokenizer
from ..runtime import engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..config.sections import ScorerSpec
    from ..config.stages import EvaluateConfig, PPOConfig
    from .types import Rollout


@dataclass(frozen=True)
class ModeratorScorer:
    """A frozen moderator; every answer is tokenised again with its own tokenizer."""

    model: engine.Frozen  # of a ModeratorModel
    template: Template | PairTemplate
    calibration: Calibration
    spec: "ScorerSpec"
    known: ModeratorSpec  # what the moderator predicts
    policy_template: Template  # of the policy, whose end marks may be in its texts

    def __call__(self, rollout: "Rollout", rows: slice) -> torch.Tensor:
        """scores_b of some rows of a rollout, fp32; of none the score of a dummy text."""
        model = self.model.module
        assert isinstance(model, ModeratorModel), "load_moderator_scorer made it"
        context = context_length(model.config, model.form.first) or model.spec.max_length
        longest = min(model.spec.max_length, context)
        prompts = [prompt.text for prompt in rollout.prompts[rows]] or ["a"]
        texts = [self.policy_template.answer_text(text) for text in rollout.texts[rows]] or ["a"]
        if rows.start == rows.stop:
            encoded = encode_pairs(self.template, prompts, texts, longest)
        else:
            messages = [prompt.messages for prompt in rollout.prompts[rows]]
            encoded = encode_dialogues(self.template, messages, texts, longest)
        packed = pack_sequences(
            [item.ids for item in encoded],
            [end_row(len(item.ids)) for item in encoded],
            rollout.device,
            [item.second_at for item in encoded],
        )
        buckets = model.spec.buckets
        bags = bags_of(prompts, texts, buckets).to(rollout.device) if buckets else None
        number = model.spec.source_index(self.spec.source)
        source_b = torch.full((len(texts),), number, device=rollout.device) if number >= 0 else None
        return self.score(self.model(packed, bags, source_b))

    def score(self, logits_bX: torch.Tensor) -> torch.Tensor:
        """scores_b of a moderator's logits, with its temperatures and thresholds."""
        spec = self.known
        scaled = {
            head: logits_bX[:, place] / self.calibration.temperatures.get(head, 1.0)
            for head, place in spec.heads.items()
        }
        shifts = torch.tensor(self.calibration.level_shifts, device=logits_bX.device)
        above_bG = (scaled["severity"] + shifts).cummin(1).values
        chosen = [spec.categories.index(name) for name in self.spec.categories or ()]
        if self.spec.signal == "unsafe_logit":
            score_b = above_bG[:, 0] - self._logit(UNSAFE)
            if chosen:
                names = [spec.categories[i] for i in chosen]
                cuts_k = torch.tensor([self._logit(name) for name in names], device=logits_bX.device)
                score_b = score_b.minimum((scaled["categories"][:, chosen] - cuts_k).amax(1))
        else:
            score_b = above_bG.sigmoid().sum(1)
            if chosen:
                score_b = score_b * scaled["categories"][:, chosen].sigmoid().amax(1)
        if self.spec.refusal:
            score_b = score_b + self.spec.refusal * scaled["refusal"][:, 0].sigmoid()
        return score_b.float()

    def _logit(self, output: str) -> float:
        """The logit of an output's balanced threshold."""
        p = min(max(self.calibration.threshold(output, "balanced", self.spec.source), 1e-6), 1 - 1e-6)
        return math.log(p / (1 - p))


def load_moderator_scorer(
    spec: "ScorerSpec", tokenizer: "PreTrainedTokenizerBase", cfg: "PPOConfig | EvaluateConfig"
) -> tuple[ModeratorScorer, None]:
    """A ModeratorScorer; no critic can start from it.

    Raises:
        UserError: The model is no moderator, or lacks the categories, the refusal head or the source that the
            spec names.
    """
    model, calibration = load_moderator(
        spec.path, trust_remote_code=cfg.trust_remote_code, allow_pickle=cfg.allow_pickle
    )
    known = model.spec
    for name in spec.categories or ():
        if name not in known.categories:
            label_set = f"label set {known.label_set}" if known.label_set else "labels"
            raise UserError(
                f"categories: expected those of the {label_set} of {spec.path} "
                f"({', '.join(known.categories) or 'it has none'}), got {name!r}"
            )
    if spec.refusal and not known.refusal:
        raise UserError(
            f"refusal: expected 0 for {spec.path}, which has no head for it, as its training data had no "
            f"refusal labels; got {spec.refusal}"
        )
    known.source_index(spec.source)
    own = load_tokenizer(spec.path, trust_remote_code=cfg.trust_remote_code, pairs=known.pairs)
    if not cfg.engine.packing:
        model.form = model.form.unpacked()
    template = template_of(own, pair_name(known.template, known.pairs))
    frozen = engine.Frozen(model, cfg.engine)
    return ModeratorScorer(
        frozen, template, calibration, spec, known, Template(tokenizer, cfg.template)
    ), None
