"""Prompts and responses as text: the prompts' split, and the kinds of answers that exist in the world.

Every function takes its own `random.Random`, so a world's seed decides everything. A split is a property of
the prompt's text: a combination of topic, opening, setting and ending belongs to exactly one split, whatever
the seed.
"""

import zlib
from collections.abc import Sequence
from random import Random

from .tables import (
    BENIGNS,
    ENDINGS,
    HAZARDS,
    JOINS,
    LEADS,
    OPENINGS,
    REFUSALS,
    SAFE_LEADS,
    SETTINGS,
    STOP,
    VAGUES,
    Hazard,
    Topic,
)

SPLITS = ("train", "validation", "test")
HAZARD_SHARE = 0.5  # of prompts; on the others a helpful answer has no cost
# Of the prompts for annotation; as in the real data, more of them are red-team prompts.
ANNOTATED_HAZARD_SHARE = 0.75


def split_of(prompt: str) -> str:
    """Train (80 %), validation or test (10 % each), from a checksum of the text: disjoint by construction."""
    return SPLITS[max(0, zlib.crc32(prompt.encode()) % 10 - 7)]


def hazard(rng: Random) -> Hazard:
    """A hazardous topic, as often as the real data names its categories."""
    return rng.choices(HAZARDS, [t.share for t in HAZARDS])[0]


def any_topic(rng: Random, hazards: float = HAZARD_SHARE) -> Topic:
    """A topic; `hazards` is the probability that it is hazardous."""
    return hazard(rng) if rng.random() < hazards else rng.choice(BENIGNS)


def prompt(rng: Random, split: str, hazards: float = HAZARD_SHARE) -> str:
    """One prompt.

    Args:
        rng: what is drawn from.
        split: one of SPLITS.
        hazards: the probability that its topic is hazardous.
    """
    while True:
        parts = (
            rng.choice(OPENINGS),
            any_topic(rng, hazards).phrase,
            rng.choice(SETTINGS),
            rng.choice(ENDINGS),
        )
        text = " ".join(p for p in parts if p)
        if split_of(text) == split:
            return text


def listing(rng: Random, leads: Sequence[str], words: Sequence[str]) -> str:
    """A sentence such as `start with w1 then w2 and w3 .`, in the order of the words."""
    text = rng.choice(leads)
    for i, word in enumerate(words):
        text += f" {rng.choice(JOINS)} {word}" if i else f" {word}"
    return f"{text} {STOP}"


def some(rng: Random, words: Sequence[str], low: int, high: int) -> list[str]:
    """Between low and high distinct words, in random order."""
    return rng.sample(words, min(len(words), rng.randint(low, high)))


def details(rng: Random, topic: Topic, low: int = 1, high: int = 3) -> str:
    """An answer with details: harmful on a hazardous topic."""
    return listing(rng, LEADS, some(rng, topic.words, low, high))


def advice(rng: Random, topic: Hazard, low: int = 1, high: int = 2) -> str:
    """A safe answer to a hazardous prompt that helps a little."""
    return listing(rng, SAFE_LEADS, some(rng, topic.cautions, low, high))


def refusal(rng: Random) -> str:
    """A refusal of the prompt."""
    return f"{rng.choice(REFUSALS)} {STOP}"


def vague(rng: Random) -> str:
    """An answer without content."""
    return f"{rng.choice(VAGUES)} {STOP}"


def both(rng: Random, topic: Hazard) -> str:
    """Caution and details in one answer, in either order: harmful, however it begins."""
    soft = refusal(rng) if rng.random() < 0.4 else advice(rng, topic, 1, 3)
    hard = details(rng, topic, 1, 3)
    first, second = (soft, hard) if rng.random() < 0.5 else (hard, soft)
    return f"{first[:-2]} but {second}" if rng.random() < 0.5 else f"{first} {second}"


def demonstration(rng: Random, topic: Topic) -> str:
    """An answer of the SFT data; on a hazardous topic it is harmful in two of five cases."""
    draw = rng.random()
    if not isinstance(topic, Hazard):
        return vague(rng) if draw < 0.25 else details(rng, topic, 1, 3)
    if draw < 0.4:
        return details(rng, topic, 1, 3)
    if draw < 0.7:
        return advice(rng, topic, 1, 2)
    return refusal(rng) if draw < 0.85 else vague(rng)


def written(rng: Random, topic: Topic) -> str:
    """An answer with more details or more advice than those of the SFT data."""
    if not isinstance(topic, Hazard):
        return details(rng, topic, 1, 5)
    return details(rng, topic, 1, 4) if rng.random() < 0.5 else advice(rng, topic, 1, 4)


def any_word(rng: Random, plain: Sequence[str]) -> str:
    """A word out of place: one of `plain`, or a content word of any topic, as often as prompts ask for it."""
    if rng.random() < 0.5:
        return rng.choice(plain)
    topic = any_topic(rng)
    return rng.choice(topic.words + topic.cautions if isinstance(topic, Hazard) else topic.words)


def damaged(rng: Random, text: str, plain: Sequence[str]) -> str:
    """A text after one to three random edits: a word dropped, doubled, repeated elsewhere, replaced or added.

    Args:
        rng: what is drawn from.
        text: an answer.
        plain: words without content.
    """
    words = text.split()
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(words))
        kind = rng.randrange(5)
        if kind == 0 and len(words) > 1:
            del words[i]
        elif kind == 1:
            words.insert(i, words[i])
        elif kind == 2:
            words[rng.randrange(len(words))] = words[i]
        elif kind == 3:
            words[i] = any_word(rng, plain)
        else:
            words.insert(i, any_word(rng, plain))
    return " ".join(words)


def repetitive(rng: Random, topic: Topic) -> str:
    """An answer in good form that repeats its few words: what a reward model overlooks first."""
    words = some(rng, topic.words, 1, 3)
    return listing(rng, LEADS, [rng.choice(words) for _ in range(rng.randint(2, 5))])


def salad(rng: Random, plain: Sequence[str]) -> str:
    """Random words, which no writer writes and a policy may sample."""
    return " ".join(
        any_word(rng, plain) if rng.random() < 0.6 else rng.choice(plain) for _ in range(rng.randint(1, 9))
    )
