"""Real data files, if their folder exists (SAFERLHF_DATA or ../shared): each loads with the expected counts.

The tests check only counts and structure; they copy nothing of these files.
"""

import random

import pytest
from kit import shared

from saferlhf_fast.data.examples import preference_examples, prompt_examples, sft_examples
from saferlhf_fast.errors import UserError

ROOT = shared()
pytestmark = pytest.mark.skipif(ROOT is None, reason="no folder of real data (SAFERLHF_DATA or ../shared)")
LIMIT = 512


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "models" / "stories260k")


def path(name):
    file = ROOT / "data" / name
    if not file.is_file():
        pytest.skip(f"{name} does not exist")
    return str(file)


@pytest.mark.parametrize(
    "name, rows, kept",
    [
        ("instruct/alpaca_en_demo.json.gz", 999, 588),
        ("instruct/alpaca_eval_set_davinci003.json.gz", 805, 712),
        ("instruct/alpaca_safety_subset_1904.json.gz", 1904, 1510),
        ("instruct/lima.json.gz", 1029, 162),
        ("instruct/safety_only_instructions_2483.json.gz", 2483, 2347),
        ("instruct/stanford_alpaca_seed_tasks.jsonl", 175, 156),
    ],
)
def test_instruction_files_have_the_expected_counts(tokenizer, name, rows, kept):
    examples, report = sft_examples(path(name), tokenizer, "auto", LIMIT)
    assert report.sources[0].rows == rows and len(examples) == kept == rows - report.dropped.total()
    assert all(
        len(e.ids) == len(e.mask) <= LIMIT and e.ids[0] == 1 and e.ids[-1] == 2 and e.mask[-2:] == [True] * 2
        for e in examples
    )


@pytest.mark.parametrize(
    "name, kind, records, kept, flagged",
    [
        ("preference/pku_saferlhf_safe_over_unsafe.jsonl.gz", "cost", 2821, 2557, 620),
        ("preference/pku_saferlhf_dual_32.json", "reward", 32, 27, 0),
        ("preference/pku_saferlhf_dual_32.json", "cost", 32, 27, 0),
        ("preference/hh_rlhf_harmless.jsonl.gz", "reward", 1700, 1491, 0),
        ("preference/autoj_testdata_pairwise.jsonl.gz", "reward", 1392, 339, None),
        ("preference/dpo_en_demo.json.gz", "better", 300, 33, 0),
    ],
)
def test_preference_files_have_the_expected_counts(tokenizer, name, kind, records, kept, flagged):
    examples, report = preference_examples(path(name), tokenizer, "auto", LIMIT, 0, kind)
    assert len(examples) == kept == records - report.dropped.total()
    assert flagged is None or sum(pair.flagged for pair in examples) == flagged
    tag = tokenizer(" ASSISTANT:", add_special_tokens=False)["input_ids"][-9:]
    for pair in examples:
        assert max(len(pair.first_ids), len(pair.second_ids)) <= LIMIT
        assert pair.first_ids[: pair.prompt_length] == pair.second_ids[: pair.prompt_length]
        assert pair.first_ids[pair.prompt_length - len(tag) : pair.prompt_length] == tag
        assert pair.first_ids[-1] == pair.second_ids[-1] == 2
    # The tokens of a response decode to its whole text.
    for pair in random.Random(0).sample(examples, min(20, len(examples))):
        assert tokenizer.decode(pair.first_ids[pair.prompt_length : -1]) in (
            pair.first_text,
            pair.first_text[1:],
        )


def test_most_pairs_of_alpaca_eval_do_not_fit(tokenizer):
    examples, report = preference_examples(
        path("preference/alpaca_eval_gpt4turbo_prefs.jsonl.gz"), tokenizer, "auto", LIMIT
    )
    assert dict(report.dropped) == {
        "prompt + response is longer than 512 tokens": 5399,
        "the label is a tie": 13,
        "a response with no token": 2,
    }
    assert len(examples) == 785 == 6199 - report.dropped.total()


@pytest.mark.parametrize(
    "name, kept",
    [
        ("prompts_safety/advbench_harmful_behaviors.csv", 520),
        ("prompts_safety/beavertails_evaluation_700.json", 700),
        ("prompts_safety/xstest_prompts_450.csv", 450),
        ("prompts_safety/safe_rlhf_gpt4_eval_problems.json", 83),
        ("preference/pku_saferlhf_safe_over_unsafe.jsonl.gz", 728),
    ],
)
def test_prompt_files_have_the_expected_counts(tokenizer, name, kept):
    examples, _ = prompt_examples(path(name), tokenizer, "auto", LIMIT // 2)
    assert len(examples) == kept and all(len(example.ids) <= LIMIT // 2 for example in examples)


def test_nested_prompts_are_refused_in_one_line(tokenizer):
    with pytest.raises(UserError, match="no known format has the columns"):
        prompt_examples(path("prompts_safety/harmfulqa_1960.json.gz"), tokenizer)
