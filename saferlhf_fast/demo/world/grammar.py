"""Prompts and responses as text: the prompts' split, and the ways of answering that exist in the world.

Every function takes its own `random.Random`, so a world's seed decides everything. Splits are made of the
sentence frame: a (topic, opening, setting, ending) combination belongs to exactly one of them, whatever the
seed.
"""

import zlib

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
)

SPLITS = ("train", "validation", "test")
HAZARD_SHARE = 0.5  # of prompts; the others are where being helpful costs nothing
# of prompts for annotation, which lean to red-team prompts as the real data does
ANNOTATED_HAZARD_SHARE = 0.75


def split_of(prompt):
    """Train (80 %), validation or test (10 % each), from a checksum of the text: disjoint by construction."""
    return SPLITS[max(0, zlib.crc32(prompt.encode()) % 10 - 7)]


def hazard(rng):
    """A hazardous topic, as often as the real data names its categories."""
    return rng.choices(HAZARDS, [t.share for t in HAZARDS])[0]


def any_topic(rng, hazards=HAZARD_SHARE):
    return hazard(rng) if rng.random() < hazards else rng.choice(BENIGNS)


def prompt(rng, split, hazards=HAZARD_SHARE):
    """One prompt of a split. hazards: how likely its topic is hazardous."""
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


def listing(rng, leads, words):
    """`start with w1 then w2 and w3 .`"""
    text = rng.choice(leads)
    for i, word in enumerate(words):
        text += f" {rng.choice(JOINS)} {word}" if i else f" {word}"
    return f"{text} {STOP}"


def some(rng, words, low, high):
    """Between low and high distinct words, in random order."""
    return rng.sample(words, min(len(words), rng.randint(low, high)))


def details(rng, topic, low=1, high=3):
    """An answer with details: harmful on a hazardous topic."""
    return listing(rng, LEADS, some(rng, topic.words, low, high))


def advice(rng, topic, low=1, high=2):
    """A safe answer to a hazardous prompt that helps a little."""
    return listing(rng, SAFE_LEADS, some(rng, topic.cautions, low, high))


def refusal(rng):
    return f"{rng.choice(REFUSALS)} {STOP}"


def vague(rng):
    return f"{rng.choice(VAGUES)} {STOP}"


def both(rng, topic):
    """Caution and details in one answer, in either order: harmful however it begins."""
    soft = refusal(rng) if rng.random() < 0.4 else advice(rng, topic, 1, 3)
    hard = details(rng, topic, 1, 3)
    first, second = (soft, hard) if rng.random() < 0.5 else (hard, soft)
    return f"{first[:-2]} but {second}" if rng.random() < 0.5 else f"{first} {second}"


def demonstration(rng, topic):
    """An answer of the SFT data: partly detailed, on hazardous topics as often harmful as not."""
    draw = rng.random()
    if topic not in HAZARDS:
        return vague(rng) if draw < 0.25 else details(rng, topic, 1, 3)
    if draw < 0.4:
        return details(rng, topic, 1, 3)
    if draw < 0.7:
        return advice(rng, topic, 1, 2)
    return refusal(rng) if draw < 0.85 else vague(rng)


def written(rng, topic):
    """An answer of a stronger writer than the SFT data's: more details, or more advice."""
    if topic not in HAZARDS:
        return details(rng, topic, 1, 5)
    return details(rng, topic, 1, 4) if rng.random() < 0.5 else advice(rng, topic, 1, 4)


def any_word(rng, plain):
    """A word out of place: a plain one (`plain`), or a content word of a topic as common as in the prompts."""
    if rng.random() < 0.5:
        return rng.choice(plain)
    topic = any_topic(rng)
    return rng.choice(topic.words + topic.cautions if topic in HAZARDS else topic.words)


def damaged(rng, text, plain):
    """One to three random edits: a word dropped, doubled, said again later, replaced or added."""
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


def repetitive(rng, topic):
    """An answer in good form that says its few words again: what a reward model overlooks first."""
    words = some(rng, topic.words, 1, 3)
    return listing(rng, LEADS, [rng.choice(words) for _ in range(rng.randint(2, 5))])


def salad(rng, plain):
    """Random words: what no writer says and a policy may find."""
    return " ".join(
        any_word(rng, plain) if rng.random() < 0.6 else rng.choice(plain) for _ in range(rng.randint(1, 9))
    )
