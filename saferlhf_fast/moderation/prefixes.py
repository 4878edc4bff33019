"""Scores of an answer's prefixes, so that a generation could be stopped."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..data.moderation_examples import Encoded
from ..models.encoders import is_encoder
from ..models.ngrams import bags_of
from ..models.packing import pack_sequences

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .moderator import Moderator


def prefix_logits(
    moderator: "Moderator", encoded: Encoded, prompt: str, every: int, source: str | None
) -> "tuple[list[int], NDArray[np.float64]]":
    """The logits after every so many tokens of an answer, without its end.

    Args:
        moderator: The moderator.
        encoded: Prompt and answer.
        prompt: The prompt, for the n-grams.
        every: Tokens between two scores.
        source: The source whose heads judge.

    Returns:
        (tokens of each prefix, logits_SX).
    """
    start, total = encoded.prompt_length, len(encoded.ids) - encoded.prompt_length
    places = list(range(every, total, every))
    spec = moderator.model.spec
    if not places:
        return [], np.zeros((0, len(spec.outputs)))
    ids = encoded.ids
    texts = moderator.tokenizer.batch_decode(
        [ids[start : start + count] for count in places], skip_special_tokens=True
    )
    if spec.pooling != "last" or is_encoder(moderator.model.config):
        prompts = [prompt] * len(places)  # read as whole answers, with the end that these models know
        return places, moderator.logits(moderator.encode(prompts, texts), prompts, texts, source)
    device = next(moderator.model.parameters()).device
    positions = [start + count - 1 for count in places]
    packed = pack_sequences([ids], [positions], device, [encoded.second_at])
    bags = bags_of([prompt] * len(places), texts, spec.buckets).to(device) if spec.buckets else None
    number = spec.source_index(source)
    source_S = torch.full((len(places),), number, device=device) if number >= 0 else None
    with torch.inference_mode():
        logits_SX = moderator.model(packed, bags, source_S)
    return places, logits_SX.double().cpu().numpy()
