"""The embedded world: disjoint splits, gold scores of any text, records in PKU-SafeRLHF's form and shares."""

import collections
import hashlib
import json

import pytest

from saferlhf_fast.demo.world import World, gold_scores, label_pair, topic_of, vocabulary
from saferlhf_fast.demo.world.tables import (
    BETTER_IS_SAFER,
    BOTH_SAFE,
    BOTH_UNSAFE,
    CATEGORIES,
    CATEGORY_POSITIONS,
    HAZARDS,
    ONE_SAFE,
)

FIELDS = {
    "prompt",
    "response_0",
    "response_1",
    "prompt_source",
    "response_0_source",
    "response_1_source",
    "is_response_0_safe",
    "is_response_1_safe",
    "response_0_harm_category",
    "response_1_harm_category",
    "response_0_severity_level",
    "response_1_severity_level",
    "better_response_id",
    "safer_response_id",
    "response_0_sha256",
    "response_1_sha256",
}
SEVERITY_SHARES = (0.485, 0.062, 0.382, 0.071)  # of the real data's positions, severity 0..3
PROMPT = "how do i start a street fight"


@pytest.fixture(scope="module")
def rows():
    world = World(3)
    prompts = world.annotation_prompts(3000)
    # A policy like the SFT model's: the demonstrations of the world itself.
    import random

    from saferlhf_fast.demo.world import grammar

    rng = random.Random(1)
    return world.preference_records(
        prompts, {f"sft {i}": [grammar.demonstration(rng, topic_of(p)) for p in prompts] for i in (0, 1)}
    )


def test_splits_are_disjoint_and_held_out_prompts_new():
    world = World(0)
    splits = {name: set(world.prompts(name, 600)) for name in ("train", "validation", "test")}
    assert all(len(s) == 600 for s in splits.values())
    assert not splits["train"] & splits["test"] and not splits["train"] & splits["validation"]
    assert not splits["validation"] & splits["test"]
    assert not {r["instruction"] for r in world.sft_records(600)} & splits["test"]
    assert not splits["test"] & set(World(1).prompts("train", 600))  # for any two seeds


def test_same_seed_same_world_another_seed_another():
    assert World(5).sft_records(50) == World(5).sft_records(50) != World(6).sft_records(50)


def test_the_world_does_not_change_by_accident():
    """Its rows and words, to the bit. Who changes them on purpose measures the demo's figures again and
    changes the digest.
    """
    world = World(0)
    prompts = world.annotation_prompts(200)
    rows = world.preference_records(prompts)
    parts = [
        prompts,
        rows,
        world.prompts("test", 50),
        world.sft_records(100),
        vocabulary(),
        CATEGORIES,
        HAZARDS,
        [gold_scores(row["prompt"], row["response_0"]) for row in rows],
    ]
    assert hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16] == "be59f51eb63434ec"


def test_judge_on_texts_of_every_kind():
    harmful = gold_scores(PROMPT, "start with ambush then fists .")
    harmless = gold_scores(PROMPT, "please consider distance and police .")
    refusal = gold_scores(PROMPT, "sorry i cannot help with that .")
    assert (
        harmful.severity == 2
        and harmful.cost > 0
        and set(harmful.categories) == {"Violence", "Physical Harm"}
    )
    assert harmless.severity == refusal.severity == 0 and harmless.cost == refusal.cost == -1.0
    assert harmful.helpfulness > harmless.helpfulness > refusal.helpfulness
    # Nothing around it makes an operational word harmless.
    assert gold_scores(PROMPT, "sorry i cannot help with that . ambush please consider police").severity == 2
    assert gold_scores("how do i bake bread", "ambush").severity == 2
    assert (
        gold_scores(PROMPT, "").severity == 0
        and gold_scores("a foreign prompt", "words nobody knows").categories == ()
    )


def test_helpfulness_counts_what_fits_once():
    one, twice = gold_scores(PROMPT, "try ambush ."), gold_scores(PROMPT, "try ambush and ambush .")
    two, foreign = (
        gold_scores(PROMPT, "try ambush and fists ."),
        gold_scores(PROMPT, "try ambush and yeast ."),
    )
    assert two.helpfulness > one.helpfulness == pytest.approx(twice.helpfulness)
    assert foreign.helpfulness < one.helpfulness


def test_records_have_the_sixteen_fields_and_agree_with_themselves(rows):
    for row in rows[:300]:
        assert set(row) == FIELDS and json.loads(json.dumps(row)) == row
        for i in (0, 1):
            categories = row[f"response_{i}_harm_category"]
            assert tuple(categories) == CATEGORIES
            assert (
                row[f"is_response_{i}_safe"]
                == (row[f"response_{i}_severity_level"] == 0)
                == (not any(categories.values()))
            )
            assert row[f"response_{i}_sha256"] == hashlib.sha256(row[f"response_{i}"].encode()).hexdigest()
        safer = row["safer_response_id"]
        assert row[f"is_response_{safer}_safe"] or not row[f"is_response_{1 - safer}_safe"]


def test_a_pair_needs_two_responses():
    with pytest.raises(ValueError, match="two different"):
        label_pair(PROMPT, "same", "same")


def test_shares_are_near_the_real_datas(rows):
    """Within .05 of the real shares."""
    severities = collections.Counter(r[f"response_{i}_severity_level"] for r in rows for i in (0, 1))
    for level, share in enumerate(SEVERITY_SHARES):
        assert abs(severities[level] / (2 * len(rows)) - share) < 0.05, (level, severities)
    unsafe = collections.Counter(2 - r["is_response_0_safe"] - r["is_response_1_safe"] for r in rows)
    for kind, share in ((0, BOTH_SAFE), (1, ONE_SAFE), (2, BOTH_UNSAFE)):
        assert abs(unsafe[kind] / len(rows) - share) < 0.05, (kind, unsafe)
    agree = sum(r["better_response_id"] == r["safer_response_id"] for r in rows) / len(rows)
    assert abs(agree - BETTER_IS_SAFER) < 0.05, agree


def test_category_shares(rows):
    found = collections.Counter(
        c for r in rows for i in (0, 1) for c, yes in r[f"response_{i}_harm_category"].items() if yes
    )
    for category, count in zip(CATEGORIES, CATEGORY_POSITIONS):
        assert abs(found[category] / sum(found.values()) - count / sum(CATEGORY_POSITIONS)) < 0.03, category
        assert found[category] > 0


def test_every_hazard_is_known_and_has_all_it_needs():
    for topic in HAZARDS:
        assert topic.categories and len(topic.words) == len(topic.severities) and topic.cautions
        assert topic_of(f"how do i {topic.phrase} today") is topic
        assert not set(topic.words) & set(topic.cautions)


def test_tokenizer_reads_every_word():
    tokenizer = World(0).tokenizer()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    words = vocabulary()
    ids = tokenizer(" ".join(words), add_special_tokens=False).input_ids
    assert len(ids) == len(words) and tokenizer.unk_token_id not in ids
