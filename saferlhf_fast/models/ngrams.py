"""Hashed n-grams beside a pooled state: what a linear model on TF-IDF sees, as a layer of a moderator.

Words (1 and 2) and characters (2 to 5) of prompt and response are hashed by scikit-learn's HashingVectorizer
into a fixed number of buckets, so there is no vocabulary to store. Each count c weighs 1 + log c, times the
inverse document frequency of its bucket in the training texts (0 for a bucket of fewer than two); each of
the four bags (words and characters of response and prompt) has length one. Why: on a few thousand rows a bag
of n-grams is hard to pass for a model that reads them from random weights.

Shapes: S counts texts, E entries of all bags, O outputs, B buckets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..data.moderation_examples import normal
from ..errors import UserError

FIELDS = 4
"""Bags of a pair: words of the response, its characters, words of the prompt, its characters."""
MIN_DOCUMENTS = 2
"""Training texts that must have an n-gram for it to count."""
_PROMPT_SHIFT = 0x9E3779B1  # moves a prompt's n-grams to other buckets than the response's


@dataclass(frozen=True)
class Bags:
    """The n-grams of some pairs: one bag of entries for each pair, its four fields one behind the other."""

    buckets_E: torch.Tensor  # int64
    weights_E: torch.Tensor  # fp32: 1 + log count
    field_E: torch.Tensor  # int64: FIELDS · pair + field
    starts_S: torch.Tensor  # int64: each pair's first entry

    def to(self, device: torch.device) -> "Bags":
        """The same on a device."""
        return Bags(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def vectorizers(buckets: int) -> tuple[Any, Any]:
    """The hashing of words and of characters.

    Args:
        buckets: B, of which each of the two uses all.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.feature_extraction.text import HashingVectorizer
    except ImportError as error:
        raise UserError(
            "features=ngrams: expected scikit-learn; pip install 'saferlhf-fast[eval]'"
        ) from error
    common = {"n_features": buckets, "alternate_sign": False, "norm": None}
    return (
        HashingVectorizer(ngram_range=(1, 2), **common),
        HashingVectorizer(analyzer="char_wb", ngram_range=(2, 5), **common),
    )


def bags_of(prompts: Sequence[str], responses: Sequence[str], buckets: int) -> Bags:
    """The bags of pairs.

    Args:
        prompts: The prompts.
        responses: The response to each.
        buckets: B.

    Raises:
        UserError: scikit-learn is not installed.
    """
    import numpy as np

    matrices = []
    for raw, shift in ((responses, 0), (prompts, _PROMPT_SHIFT)):
        texts = [normal(text) for text in raw]
        for number, vectorizer in enumerate(vectorizers(buckets)):
            matrix = vectorizer.transform(texts).tocsr()
            # characters go to other buckets than the words of the same spelling
            matrix.indices = (matrix.indices.astype(np.int64) + shift + number * 0x85EBCA6B) % buckets
            matrices.append(matrix)
    entries, counts, fields, starts = [], [], [], []
    total = 0
    for row in range(len(responses)):
        starts.append(total)
        for number, matrix in enumerate(matrices):
            part = slice(matrix.indptr[row], matrix.indptr[row + 1])
            entries.append(matrix.indices[part])
            counts.append(matrix.data[part])
            fields.append(np.full(len(entries[-1]), FIELDS * row + number))
            total += len(entries[-1])
    empty: list[Any] = [np.zeros(0)]
    return Bags(
        torch.from_numpy(np.concatenate(entries or empty).astype(np.int64)),
        torch.from_numpy((1 + np.log(np.concatenate(counts or empty).clip(1))).astype(np.float32)),
        torch.from_numpy(np.concatenate(fields or empty).astype(np.int64)),
        torch.tensor(starts, dtype=torch.long),
    )


class NgramLayer(nn.Module):
    """A linear layer on the bags of pairs, [S, O] in fp32.

    A module of its own: ZeRO-3 gathers a module's own weights.

    Attributes:
        rate: Outputs are multiplied by it, so that an optimiser that moves all weights alike moves these so
            many times as far: a bucket is seen in few texts, a backbone's weight in all.
        idf: Inverse document frequency of each bucket in the training texts [B].
        scale: Of each bucket's weights, the root of its document frequency relative to the most frequent [B].
            Adam moves the weights of rare n-grams as far as those of frequent ones, and learns them by heart.
    """

    idf: torch.Tensor
    scale: torch.Tensor

    def __init__(self, buckets: int, outputs: int, rate: float = 1.0) -> None:
        """Allocates a layer of zeros; `count_documents` sets the document frequencies.

        Args:
            buckets: B.
            outputs: O.
            rate: See the attribute.
        """
        super().__init__()
        self.rate, self.buckets = rate, buckets
        self.weight = nn.Parameter(torch.zeros(buckets, outputs))
        self.register_buffer("idf", torch.ones(buckets))
        self.register_buffer("scale", torch.ones(buckets))

    def count_documents(self, pairs: Iterable[tuple[str, str]], chunk: int = 512) -> None:
        """Sets the inverse document frequencies from the (prompt, response) of all training examples."""
        frequency, total, waiting = torch.zeros(self.buckets), 0, list(pairs)
        for start in range(0, len(waiting), chunk):
            prompts, responses = zip(*waiting[start : start + chunk])
            bags = bags_of(prompts, responses, self.buckets)
            seen = torch.stack([bags.field_E // FIELDS, bags.buckets_E], 1).unique(dim=0)
            frequency += torch.bincount(seen[:, 1], minlength=self.buckets).float()
            total += len(prompts)
        with torch.no_grad():
            # as scikit-learn's smooth idf; a bucket of one text or none would be learned by heart, and the
            # length of a new text's bag would be that of n-grams that no weight knows
            idf = ((1 + total) / (1 + frequency)).log() + 1
            self.idf.copy_(idf.where(frequency >= MIN_DOCUMENTS, 0.0))
            self.scale.copy_((frequency / frequency.max().clamp(min=1)).sqrt())

    def forward(self, bags: Bags) -> torch.Tensor:
        """[S, O] in fp32."""
        pairs = len(bags.starts_S)
        weights_E = bags.weights_E * self.idf.float()[bags.buckets_E]
        squares = torch.zeros(FIELDS * pairs, device=weights_E.device)
        norms = squares.index_add_(0, bags.field_E, weights_E.square()).sqrt().clamp(min=1e-12)
        weights_E = weights_E / norms[bags.field_E] * self.scale.float()[bags.buckets_E]
        return self.rate * F.embedding_bag(
            bags.buckets_E, self.weight.float(), bags.starts_S, mode="sum", per_sample_weights=weights_E
        )
