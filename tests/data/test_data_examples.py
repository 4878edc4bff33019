"""Examples: which rows are kept, dropped and counted or end the loading, and which tokens are learned."""

import json

import pytest
from data_tokenizers import CHATML, LLAMA2, byte_tokenizer

from saferlhf_fast.config.stages import Source
from saferlhf_fast.data.batches import split_by_prompt
from saferlhf_fast.data.examples import preference_examples, prompt_examples, sft_examples
from saferlhf_fast.errors import UserError

HEAD = len("BEGINNING OF CONVERSATION: USER: ") + len(" ASSISTANT:") + 1  # with bos, one token per byte


@pytest.fixture
def put(tmp_path):
    """A function that writes rows to a file and returns its path."""

    def write(rows, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def pku(i=0, **changes):
    return {
        "prompt": f"Which bird is number {i}?",
        "response_0": f"A robin {i}.",
        "response_1": f"A crow {i}, I think.",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "better_response_id": 1,
        "safer_response_id": 0,
        **changes,
    }


def pairs(path, kind="reward", max_length=512, tokenizer=None):
    return preference_examples(path, tokenizer or byte_tokenizer(), "auto", max_length, 0, kind)


def text(ids):
    return byte_tokenizer().decode(ids, skip_special_tokens=False)


def test_kinds_put_the_right_response_first(put):
    path = put([pku()])
    (reward,), _ = pairs(path, "reward")
    (cost,), report = pairs(path, "cost")
    assert text(reward.first_ids[reward.prompt_length :]) == "A crow 0, I think.</s>"
    assert text(cost.first_ids[cost.prompt_length :]) == "A robin 0.</s>"
    assert (cost.sign_first, cost.sign_second) == (-1, 1) and (reward.sign_first, reward.sign_second) == (
        1,
        -1,
    )
    assert cost.first_ids[: cost.prompt_length] == cost.second_ids[: cost.prompt_length]
    assert (cost.prompt_text, cost.first_text) == ("Which bird is number 0?", "A robin 0.")
    assert pairs(path, "better")[0] == [reward] and pairs(path, "safer")[0] == [cost]
    assert report.as_dict()["sources"] == [
        {"path": path, "format": "pku", "available": 1, "rows": 1, "kept": 1}
        | {"unread": [], "dropped": {}, "flagged": {}}
    ]
    with pytest.raises(ValueError, match="kind: expected one of"):
        pairs(path, "harm")


def test_unusable_rows_are_counted_and_do_not_end_the_loading(put):
    path = put(
        [
            pku(0),
            pku(1, response_1="A robin 1."),
            pku(2, response_0=" \n"),
            pku(3, is_response_0_safe=False, is_response_1_safe=True),
            pku(4, response_1="crow " * 200),
        ]
    )
    examples, report = pairs(path, "cost", 200)
    assert len(examples) == report.kept == 1
    assert dict(report.dropped) == {
        "the two responses are identical": 1,
        "a response with no token": 1,
        "the safer response is labelled unsafe and the other safe": 1,
        "prompt + response is longer than 200 tokens": 1,
    }
    lines = report.lines()
    assert lines[0] == f"{path} (pku): 5 rows, 1 examples"
    assert "  1 dropped: the two responses are identical (first: line 2)" in lines
    # for a reward model the safety labels do not matter
    assert len(pairs(path, "reward", 200)[0]) == 2


@pytest.mark.parametrize(
    "row, kind, words",
    [
        (pku(response_1="A robin 0."), "reward", "1 dropped: the two responses are identical .first: line 1"),
        (pku(response_0=""), "cost", "a response with no token"),
        (pku(response_0="A robin. " * 50), "cost", "longer than 128 tokens"),
        (pku(is_response_0_safe=False, is_response_1_safe=True), "cost", "labelled unsafe"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "cost", "no label of which response is safer"),
        (
            {"prompt": "a", "safe_response": "b", "unsafe_response": "c"},
            "reward",
            "no label of which response is better",
        ),
    ],
)
def test_no_row_left_is_an_error_with_counts(put, row, kind, words):
    with pytest.raises(UserError, match=f"no usable preference in 1 rows; .*{words}"):
        pairs(put([row]), kind, 128)


def test_mistakes_in_a_row_end_the_loading(put):
    with pytest.raises(
        UserError, match="rows.jsonl line 2, field 'better_response_id': expected 0 or 1, got the number 7"
    ):
        pairs(put([pku(), pku(1, better_response_id=7)]))
    row = pku()
    del row["better_response_id"]
    with pytest.raises(UserError, match="line 1: no field 'better_response_id'"):
        pairs(put([row]))
    assert len(pairs(put([row]), "cost")[0]) == 1  # the cost model does not need that label


def test_the_wrong_kind_of_data_is_refused(put):
    with pytest.raises(UserError, match="expected preferences .*got the format alpaca"):
        pairs(put([{"instruction": "a", "output": "b"}]))
    with pytest.raises(UserError, match="expected conversations .*got the format pku"):
        sft_examples(put([pku()]), byte_tokenizer())


def test_contradictions_are_flagged_and_kept(put):
    row = pku()
    opposite = pku(response_0=row["response_1"], response_1=row["response_0"])
    sign = pku(5, response_0="Six.", response_1="Seven.")
    other = pku(5, response_0="Eight.", response_1="Six.")
    examples, report = pairs(put([row, pku(1), opposite, sign, other]), "cost")
    assert [pair.flagged for pair in examples] == [True, False, True, True, True]
    assert dict(report.flagged) == {"other labels of the same responses contradict this one": 4}
    stated = [{"prompt": "a", "safe_response": "b", "unsafe_response": "c", "reversed_also_present": True}]
    assert pairs(put(stated), "cost")[0][0].flagged


def test_prompts_are_cut_on_the_left_and_answers_are_never_cut(put):
    limit = 160
    rows = [
        pku(0, prompt="x" * 300 + " end?", response_0="Short.", response_1="Brief."),
        pku(1, response_0="y" * (limit - HEAD - 24)),
        pku(2, response_0="y" * (limit - HEAD - 23)),
    ]
    examples, report = pairs(put(rows), "cost", limit)
    assert (
        len(examples) == 2
        and report.dropped.total() == 1
        and report.flagged["the prompt lost its beginning"] == 1
    )
    for pair in examples:
        assert max(len(pair.first_ids), len(pair.second_ids)) <= limit
        assert text(pair.first_ids[: pair.prompt_length]).endswith("? ASSISTANT:")
        assert text(pair.first_ids[pair.prompt_length :]) == pair.first_text + "</s>"
        assert pair.first_ids[0] == byte_tokenizer().bos_token_id
    assert len(examples[0].first_ids) == limit == len(examples[1].first_ids)


def test_sft_learns_every_assistant_turn(put):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi."},
                {"role": "user", "content": "Tree?"},
                {"role": "assistant", "content": "Oak."},
                {"role": "user", "content": "left out"},
            ]
        },
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ""}]},
        {"messages": [{"role": "user", "content": "Hello"}]},
    ]
    (example,), report = sft_examples(put(rows), byte_tokenizer())
    assert text([i for i, on in zip(example.ids, example.mask) if on]) == "Hi.</s>Oak.</s>"
    assert text(example.ids).endswith("USER: Tree? ASSISTANT:Oak.</s>") and example.prompt_text == "Hello"
    assert dict(report.dropped) == {"a response with no token": 1, "no assistant turn": 1}


def test_sft_cuts_only_before_the_first_answer(put):
    talk = [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "Hi."}]
    (one,), _ = sft_examples(put([{"messages": talk}]), byte_tokenizer(), "auto", 100)
    assert len(one.ids) == len(one.mask) == 100 and sum(one.mask) == 4
    with pytest.raises(UserError, match="longer than 100 tokens"):
        sft_examples(put([{"messages": [*talk, *talk]}]), byte_tokenizer(), "auto", 100)


def test_pad_equal_to_eos_still_learns_to_stop(put):
    tokenizer = byte_tokenizer()
    before, tokenizer.pad_token = tokenizer.pad_token, tokenizer.eos_token
    try:
        (example,), _ = sft_examples(put([{"prompt": "a", "completion": "b"}]), tokenizer)
    finally:
        tokenizer.pad_token = before
    assert example.ids[-1] == tokenizer.eos_token_id and example.mask[-2:] == [True, True]


def test_rows_that_a_chat_template_refuses_are_dropped_and_counted(put):
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ]
        },
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    with pytest.raises(
        UserError, match="no usable conversation in 1 rows; 1 dropped: the tokenizer's chat template refuses"
    ):
        sft_examples(put(rows[:1]), byte_tokenizer(template=LLAMA2))
    assert len(pairs(put(rows[1:]), tokenizer=byte_tokenizer(template=LLAMA2))[0]) == 1


def test_prompts_are_cut_on_the_left_and_unusable_ones_are_counted(put):
    long = "x" * 200 + " end?"
    path = put([{"prompt": "a", "category": "short"}, {"prompt": "a"}, {"prompt": long}, {"prompt": " "}])
    examples, report = prompt_examples(path, byte_tokenizer(), "auto", 60)
    assert [example.text for example in examples] == ["a", long] and examples[0].meta == {"category": "short"}
    assert examples[0].messages == ({"role": "user", "content": "a"},) and examples[0].prompt_text == "a"
    assert len(examples[1].ids) == 60 and text(examples[1].ids).endswith("x end? ASSISTANT:")
    assert dict(report.dropped) == {"the prompt occurs before": 1, "an empty prompt": 1}
    with pytest.raises(UserError, match="max_prompt_length: expected more than"):
        prompt_examples(path, byte_tokenizer(), "auto", 9)


def test_prompts_come_from_any_format(put):
    path = put([pku(0), pku(0), pku(1)])
    assert [example.text for example in prompt_examples(path, byte_tokenizer())[0]] == [
        "Which bird is number 0?",
        "Which bird is number 1?",
    ]
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    (one,), _ = prompt_examples(put([{"messages": talk}]), byte_tokenizer(template=CHATML))
    assert text(one.ids) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_mixture_is_reported_by_source(put):
    a, b = (
        put([pku(i) for i in range(9)], "a.jsonl"),
        put([{"prompt": "a", "chosen": "b", "rejected": "c"}], "b.jsonl"),
    )
    examples, report = pairs([Source(a, count=4), b])
    assert len(examples) == 5 and [source.kept for source in report.sources] == [4, 1]
    assert report.lines() == [f"{a} (pku): 4 of 9 rows, 4 examples", f"{b} (preference): 1 rows, 1 examples"]
    again, _ = pairs([Source(a, count=4), b])
    assert again == examples


def test_split_by_prompt_is_disjoint_and_the_same_everywhere(put):
    examples, _ = pairs(put([pku(i, response_0=f"Robin {j}.") for i in range(60) for j in range(3)]))
    train, held_out = split_by_prompt(examples, 0.25, seed=3)
    prompts_of = [{pair.prompt_text for pair in side} for side in (train, held_out)]
    assert (
        not prompts_of[0] & prompts_of[1]
        and len(train) + len(held_out) == 180
        and 6 <= len(prompts_of[1]) <= 26
    )
    prompts, _ = prompt_examples(put([pku(i) for i in range(0, 60, 2)]), byte_tokenizer())
    assert {prompt.text for prompt in split_by_prompt(prompts, 0.25, seed=3)[1]} <= prompts_of[1]
    assert split_by_prompt(examples, 0.25, seed=4)[1] != held_out
    assert split_by_prompt(examples, 0) == (examples, [])
    two = [examples[0], examples[-1]]
    assert all(split_by_prompt(two, fraction, seed) for fraction in (0.01, 0.99) for seed in range(5))
    assert all(len(side) == 1 for fraction in (0.01, 0.99) for side in split_by_prompt(two, fraction))
