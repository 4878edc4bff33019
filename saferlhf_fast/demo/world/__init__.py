"""The embedded world: prompts, answers and gold scores over a small grammar, as just another data source.

    world = World(seed)
    world.prompts("test", 200)                            # texts; no prompt is in two splits
    world.sft_records(4000)                               # Alpaca rows: instruction, input, output
    world.preference_records(prompts, {"sft": answers})   # PKU-SafeRLHF rows, 16 fields
    world.gold_scores(prompt, response)                   # Gold(helpfulness, cost, severity, categories)
    world.tokenizer()                                     # the one call that imports transformers

Half of the prompts are hazardous. For them operational words help most and are harmful, and caution words
help less and are harmless, so more helpful means more harmful. The tables are in tables.py, the sentences in
grammar.py, the gold scores in gold.py, the annotation and its shares in records.py. A world's seed decides
what is sampled; words and gold rules are the same for all seeds. Equal calls give equal results, in whatever
order.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from . import grammar, tables
from .gold import CONTENT, Gold, gold_scores, topic_of
from .grammar import SPLITS, split_of
from .records import choose_pairs, kind_of, label_pair
from .tables import Hazard, Topic

__all__ = [
    "World",
    "Gold",
    "gold_scores",
    "label_pair",
    "kind_of",
    "split_of",
    "topic_of",
    "vocabulary",
    "SPLITS",
]

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
# Each is one token, also without spaces around it: templates put no space between tag and text.
TAGS = ("BEGINNING OF CONVERSATION:", "USER:", "ASSISTANT:")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} ASSISTANT:"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def vocabulary() -> list[str]:
    """All words of the world, content first, each once."""
    phrases = (
        *tables.LEADS,
        *tables.SAFE_LEADS,
        *tables.JOINS,
        *tables.REFUSALS,
        *tables.VAGUES,
        *tables.OPENINGS,
        *(t.phrase for t in tables.HAZARDS + tables.BENIGNS),
        *tables.SETTINGS,
        *tables.ENDINGS,
    )
    return list(dict.fromkeys([*sorted(CONTENT), tables.STOP, "but", *" ".join(phrases).split()]))


def plain_words() -> list[str]:
    """The words of answers that carry no content."""
    phrases = (*tables.LEADS, *tables.SAFE_LEADS, *tables.JOINS, *tables.REFUSALS, *tables.VAGUES)
    return list(dict.fromkeys([tables.STOP, "but", *" ".join(phrases).split()]))


def _topic(prompt: str) -> Topic:
    topic = topic_of(prompt)
    if topic is None:
        raise ValueError(f"expected a prompt of the world, got {prompt!r}")
    return topic


def _texts(answer: str | Sequence[str]) -> Sequence[str]:
    return [answer] if isinstance(answer, str) else answer


class World:
    """One seeded sampling of the world."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.plain = plain_words()

    def _rng(self, *names: str) -> random.Random:
        """A separate stream for each use, so that no call changes what another one returns."""
        return random.Random(repr((self.seed, *names)))

    def prompts(
        self, split: str, n: int, stream: str = "prompts", hazards: float = grammar.HAZARD_SHARE
    ) -> list[str]:
        """Different prompts of a split.

        Args:
            split: "train", "validation" or "test".
            n: how many.
            stream: name of the random stream; another name gives another sample.
            hazards: share of hazardous ones.

        Raises:
            ValueError: there is no such split, or it has fewer prompts.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        rng = self._rng(stream, split)
        seen: dict[str, None] = {}
        for _ in range(50 * n + 1000):
            if len(seen) == n:
                break
            seen[grammar.prompt(rng, split, hazards)] = None
        if len(seen) < n:
            raise ValueError(f"expected {n} different prompts in {split}, found {len(seen)}")
        return list(seen)

    def annotation_prompts(self, n: int, stream: str = "pairs") -> list[str]:
        """Train prompts whose answers are annotated; as in the real data, more of them are hazardous."""
        return self.prompts("train", n, stream, grammar.ANNOTATED_HAZARD_SHARE)

    def prompt_records(self, split: str, n: int) -> list[dict[str, str]]:
        """Rows with one field, `prompt`."""
        return [{"prompt": p} for p in self.prompts(split, n)]

    def sft_records(self, n: int) -> list[dict[str, str]]:
        """Alpaca rows: train prompts, each with one demonstration."""
        rng = self._rng("sft")
        return [
            {"instruction": p, "input": "", "output": grammar.demonstration(rng, _topic(p))}
            for p in self.prompts("train", n, "sft prompts")
        ]

    def gold_scores(self, prompt: str, response: str) -> Gold:
        """Gold scores, as in gold.py, for tables and curves: neither training nor selection reads them."""
        return gold_scores(prompt, response)

    def candidates(self, rng: random.Random, prompt: str) -> list[tuple[str, str]]:
        """Answers of the world to a prompt: good ones, and bad ones that score models have to recognise.

        Args:
            rng: what is drawn from.
            prompt: of the world.

        Returns:
            (source, text) of each.

        Raises:
            ValueError: the prompt is not of the world.
        """
        topic = _topic(prompt)
        other = grammar.any_topic(rng, grammar.ANNOTATED_HAZARD_SHARE)
        texts = [
            ("demonstration", grammar.demonstration(rng, topic)),
            ("writer", grammar.written(rng, topic)),
            ("writer", grammar.written(rng, topic)),
            ("other-topic", grammar.written(rng, other)),
            ("repetitive", grammar.repetitive(rng, topic)),
            ("salad", grammar.salad(rng, self.plain)),
        ]
        if isinstance(topic, Hazard):
            texts += [
                ("writer", grammar.details(rng, topic, 1, 4)),
                ("writer", grammar.advice(rng, topic, 1, 4)),
                ("mixed", grammar.both(rng, topic)),
            ]
        else:
            texts.append(("mixed", grammar.both(rng, grammar.hazard(rng))))
        source, text = rng.choice(texts)
        return [*texts, (f"damaged-{source}", grammar.damaged(rng, text, self.plain))]

    def preference_records(
        self,
        prompts: Sequence[str],
        policies: Mapping[str, Sequence[str | Sequence[str]]] | None = None,
        *,
        own: int = 5,
        stream: str = "pairs",
    ) -> list[dict[str, Any]]:
        """One annotated pair of answers per prompt, as far as a prompt has two that differ in helpfulness.

        Args:
            prompts: of the world.
            policies: {name: one answer, or a list of answers, for each prompt, in the order of `prompts`}.
            own: how many of the world's own answers to each prompt are added.
            stream: name of the random stream.

        Returns:
            PKU-SafeRLHF rows of 16 fields.
        """
        rng, pools = self._rng(stream), []
        for i, prompt in enumerate(prompts):
            pool = [(name, text) for name, answers in (policies or {}).items() for text in _texts(answers[i])]
            candidates = self.candidates(rng, prompt)
            pools.append((prompt, pool + rng.sample(candidates, min(own, len(candidates)))))
        return choose_pairs(rng, pools)

    def tokenizer(self) -> Any:
        """A word-level tokenizer of transformers with bos, eos, a separate pad token and a chat template."""
        from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = {w: i for i, w in enumerate([*SPECIALS, *vocabulary()])}
        inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            clean_up_tokenization_spaces=False,
        )
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer
