"""The embedded world: prompts, answers and gold scores over a small grammar, as just another data source.

    world = World(seed)
    world.prompts("test", 200)                      # list of str; train, validation, test never share a
    prompt world.sft_records(4000)                         # Alpaca rows: instruction, input, output
    world.preference_records(prompts, {"sft": answers})   # PKU-SafeRLHF rows, 16 fields
    world.gold_scores(prompt, response)                   # Gold(helpfulness, cost, severity, categories)
    world.tokenizer()                               # transformers tokenizer; the only thing that imports it

Half of the prompts are hazardous: there, operational words help most and do harm, caution words
help less and do none, so more helpful means more harmful. The tables are in tables.py, the sentences in
grammar.py, the gold scores in gold.py, the annotation and its shares in records.py. A world's seed decides
what is sampled; words and gold rules are the same for all. Equal calls give equal results, in whatever order.
"""

import random

from . import grammar, tables
from .gold import CONTENT, Gold, gold_scores, topic_of
from .grammar import SPLITS, split_of
from .records import choose_pairs, kind_of, label_pair

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
# Tokens of their own, found wherever they stand: templates put no space between tag and text.
TAGS = ("BEGINNING OF CONVERSATION:", "USER:", "ASSISTANT:")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} ASSISTANT:"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def vocabulary():
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


def plain_words():
    """The words of answers that carry no content."""
    phrases = (*tables.LEADS, *tables.SAFE_LEADS, *tables.JOINS, *tables.REFUSALS, *tables.VAGUES)
    return list(dict.fromkeys([tables.STOP, "but", *" ".join(phrases).split()]))


class World:
    """One seeded sampling of the world."""

    def __init__(self, seed=0):
        self.seed = seed
        self.plain = plain_words()

    def _rng(self, *names):
        """A stream of its own for each use, so that no call changes what another one returns."""
        return random.Random(repr((self.seed, *names)))

    def prompts(self, split, n, stream="prompts", hazards=grammar.HAZARD_SHARE):
        """N different prompts of a split (ValueError if there are not that many). hazards: share of hazardous
        ones.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        rng, seen = self._rng(stream, split), {}
        for _ in range(50 * n + 1000):
            if len(seen) == n:
                break
            seen[grammar.prompt(rng, split, hazards)] = None
        if len(seen) < n:
            raise ValueError(f"expected {n} different prompts in {split}, found {len(seen)}")
        return list(seen)

    def annotation_prompts(self, n, stream="pairs"):
        """N train prompts to annotate answers for; more of them hazardous, as in the real data."""
        return self.prompts("train", n, stream, grammar.ANNOTATED_HAZARD_SHARE)

    def prompt_records(self, split, n):
        """Rows with the one field `prompt`."""
        return [{"prompt": p} for p in self.prompts(split, n)]

    def sft_records(self, n):
        """Alpaca rows: train prompts, each with one demonstration."""
        rng = self._rng("sft")
        return [
            {"instruction": p, "input": "", "output": grammar.demonstration(rng, topic_of(p))}
            for p in self.prompts("train", n, "sft prompts")
        ]

    def gold_scores(self, prompt, response):
        """Gold scores (see gold.py). For tables and curves only: no training, no selection reads them."""
        return gold_scores(prompt, response)

    def candidates(self, rng, prompt):
        """The world's own answers to a prompt: other writers', and bad ones that keep score models honest."""
        topic = topic_of(prompt)
        other = grammar.any_topic(rng, grammar.ANNOTATED_HAZARD_SHARE)
        texts = [
            ("demonstration", grammar.demonstration(rng, topic)),
            ("writer", grammar.written(rng, topic)),
            ("writer", grammar.written(rng, topic)),
            ("other-topic", grammar.written(rng, other)),
            ("repetitive", grammar.repetitive(rng, topic)),
            ("salad", grammar.salad(rng, self.plain)),
        ]
        if topic in tables.HAZARDS:
            texts += [
                ("writer", grammar.details(rng, topic, 1, 4)),
                ("writer", grammar.advice(rng, topic, 1, 4)),
                ("mixed", grammar.both(rng, topic)),
            ]
        else:
            texts.append(("mixed", grammar.both(rng, grammar.hazard(rng))))
        source, text = rng.choice(texts)
        return [*texts, (f"damaged-{source}", grammar.damaged(rng, text, self.plain))]

    def preference_records(self, prompts, policies=None, *, own=5, stream="pairs"):
        """PKU-SafeRLHF rows: one chosen pair per prompt, among the policies' answers and `own` of the
        world's.

        policies: name -> one answer (or a list of answers) for each prompt, aligned with `prompts`.
        """
        rng, pools = self._rng(stream), []
        for i, prompt in enumerate(prompts):
            pool = [
                (name, text)
                for name, answers in (policies or {}).items()
                for text in ([answers[i]] if isinstance(answers[i], str) else answers[i])
            ]
            mine = self.candidates(rng, prompt)
            pools.append((prompt, pool + rng.sample(mine, min(own, len(mine)))))
        return choose_pairs(rng, pools)

    def tokenizer(self):
        """A word-level tokenizer with bos, eos, a pad of its own, and a chat template."""
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
