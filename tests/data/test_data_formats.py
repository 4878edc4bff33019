"""Every record format: it is recognised by its columns and read; mistakes are refused with row and field."""

import pytest

from saferlhf_fast.data.columns import extra_columns
from saferlhf_fast.data.files import Row
from saferlhf_fast.data.formats import FORMATS, format_of
from saferlhf_fast.data.messages import with_message_lists
from saferlhf_fast.data.records import Conversation, Dropped, Preference, Prompt, prompt_text
from saferlhf_fast.errors import UserError

Q, A, B = "Which bird sings at night?", "The nightingale.", "No bird does."
PKU_V0 = {
    "prompt": Q,
    "response_0": A,
    "response_1": B,
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}
PKU = {
    **PKU_V0,
    "prompt_source": "x",
    "response_0_source": "x",
    "response_1_source": "x",
    "response_0_harm_category": {},
    "response_1_harm_category": {},
    "response_0_severity_level": 0,
    "response_1_severity_level": 2,
    "response_0_sha256": "",
    "response_1_sha256": "",
}
SINGLE = {
    key: PKU[key]
    for key in (
        "prompt",
        "response_0",
        "response_1",
        "prompt_source",
        "response_0_source",
        "response_1_source",
        "better_response_id",
        "response_0_sha256",
        "response_1_sha256",
    )
}
SAFE_OVER = {
    "prompt": Q,
    "safe_response": A,
    "unsafe_response": B,
    "count": 2,
    "reversed_also_present": False,
    "safe_response_also_labelled_unsafe": True,
    "unsafe_response_also_labelled_safe": False,
}
EVAL = {
    "instruction": Q,
    "reference_output": A,
    "outputs": {
        "m1": {"output": B, "preference": 1.9},
        "m2": {"output": "I do not know.", "preference": 1.5},
        "m3": {"output": "Many.", "preference": 1.0},
    },
}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": Q},
]
HH = "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: " + Q + "\n\nAssistant: "


def records(fields, name="auto", untyped=False):
    row = with_message_lists(Row(fields, "f.jsonl line 1", untyped))
    name, form = format_of([row], name, "f.jsonl")
    extra = extra_columns([row], form)
    return name, [extra.apply(row, record) for record in form.parse(row)]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def refused(fields, name="auto", untyped=False):
    with pytest.raises(UserError) as caught:
        records(fields, name, untyped)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("row", [PKU, PKU_V0])
def test_pku_rows_become_preferences(row):
    name, (record,) = records(row)
    assert name == "pku"
    assert record == Preference((user(Q),), (A, B), "f.jsonl line 1", better=1, safer=0, signs=(-1, 1))


def test_pku_rows_from_csv_are_read_from_text():
    _, (record,) = records({key: str(value) for key, value in PKU_V0.items()}, untyped=True)
    assert (record.better, record.safer, record.signs) == (1, 0, (-1, 1))


def test_other_formats_of_preferences_become_preferences():
    assert records(SINGLE)[0] == "pku-single"
    assert records(SINGLE)[1] == [Preference((user(Q),), (A, B), "f.jsonl line 1", better=1)]
    name, (record,) = records(SAFE_OVER)
    assert name == "safe-over-unsafe" and record.flagged and record.better is None
    assert (record.safer, record.signs, record.responses) == (0, (-1, 1), (A, B))
    assert not records({**SAFE_OVER, "safe_response_also_labelled_unsafe": False})[1][0].flagged
    name, preferences = records(EVAL)
    assert name == "alpaca-eval" and [record.better for record in preferences] == [1, None, 0]
    assert [record.tie for record in preferences] == [False, True, False]
    auto_j = {"scenario": "x", "label": 1, "prompt": Q, "response 1": A, "response 2": B}
    assert records(auto_j) == ("auto-j", [Preference((user(Q),), (A, B), "f.jsonl line 1", better=1)])
    assert records({**auto_j, "label": 2})[1][0].tie
    assert records({"instruction": "Name it:", "input": Q, "chosen": A, "rejected": B}) == (
        "alpaca-preference",
        [Preference((user(f"Name it: {Q}"),), (A, B), "f.jsonl line 1", better=0)],
    )


def test_hh_dialogues_become_preferences_over_the_last_answer():
    name, (record,) = records({"chosen": HH + A, "rejected": HH + B})
    assert name == "hh" and record.responses == (A, B) and record.better == 0
    assert record.messages == (user("Hello"), assistant("Hi."), user(Q))
    assert records({"chosen": HH + A, "rejected": HH.replace("Hi.", "Ho.") + B})[1] == [
        Dropped("the two dialogues differ before the last answer", "f.jsonl line 1")
    ]
    assert isinstance(records({"chosen": HH + A, "rejected": "\n\nHuman: Hello"}, "hh")[1][0], Dropped)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q, "chosen": A, "rejected": B},
        {"prompt": [user(Q)], "chosen": [assistant(A)], "rejected": [assistant(B)]},
        {"prompt": [user(Q)], "chosen": A, "rejected": B},
        {"chosen": [user(Q), assistant(A)], "rejected": [user(Q), assistant(B)]},
        {"prompt": Q, "chosen": [user(Q), assistant(A)], "rejected": [user(Q), assistant(B)]},
        {"prompt": Q, "chosen": [assistant(A)], "rejected": [assistant(B)]},
        {
            "conversations": [{"from": "human", "value": Q}],
            "chosen": {"from": "gpt", "value": A},
            "rejected": {"from": "gpt", "value": B},
        },
    ],
)
def test_chosen_and_rejected_become_a_preference(row):
    assert records(row) == ("preference", [Preference((user(Q),), (A, B), "f.jsonl line 1", better=0)])


def test_chosen_and_rejected_of_different_dialogues_are_dropped():
    assert isinstance(
        records({"chosen": [user("Hello"), assistant(A)], "rejected": [user(Q), assistant(B)]})[1][0], Dropped
    )
    assert isinstance(records({"chosen": [user(Q)], "rejected": [user(Q), assistant(B)]})[1][0], Dropped)


def test_text_parts_are_joined_as_a_chat_template_writes_them():
    from data_tokenizers import byte_tokenizer

    template = (
        "{% for m in messages %}{{ '<|im_start|>' }}{% if m['content'] is string %}{{ m['content'] }}{% else "
        "%}"
        "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor "
        "%}"
        "{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    )
    parts = [{"type": "text", "text": "Which bird "}, {"type": "text", "text": "sings?\n", "image": None}]
    talk = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": A}]},
    ]
    _, (record,) = records({"messages": talk})
    assert record == Conversation((user("Which bird sings?\n"), assistant(A)), "f.jsonl line 1")
    render = byte_tokenizer(bos=False, template=template).apply_chat_template
    assert render(talk, tokenize=False) == render(list(record.messages), tokenize=False)
    assert records({"prompt": talk[:1], "chosen": talk[1:], "rejected": [assistant(B)]})[1][0].responses == (
        A,
        B,
    )
    assert records({"conversations": [{"from": "human", "value": parts}, {"from": "gpt", "value": A}]})[
        1
    ] == [record]
    assert records({"prompt": talk[:1]})[1] == [Prompt(record.messages[:1], "f.jsonl line 1")]


@pytest.mark.parametrize(
    "row, name, messages",
    [
        ({"messages": [*TALK, assistant(A)]}, "messages", (*TALK, assistant(A))),
        (
            {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
            "sharegpt",
            (user(Q), assistant(A)),
        ),
        ({"prompt": Q, "completion": A}, "prompt-completion", (user(Q), assistant(A))),
        ({"prompt": [user(Q)], "completion": [assistant(A)]}, "prompt-completion", (user(Q), assistant(A))),
        (
            {"instruction": "Name it:", "input": Q, "output": A},
            "alpaca",
            (user(f"Name it: {Q}"), assistant(A)),
        ),
        ({"instruction": Q, "input": None, "output": A}, "alpaca", (user(Q), assistant(A))),
        (
            {"instruction": Q, "output": A, "history": [["Hello", "Hi."]]},
            "alpaca",
            (user("Hello"), assistant("Hi."), user(Q), assistant(A)),
        ),
        ({"prompt": Q, "response": A, "is_safe": True}, "qa", (user(Q), assistant(A))),
        (
            {"instruction": Q, "instances": [{"input": "", "output": A}]},
            "alpaca-seed",
            (user(Q), assistant(A)),
        ),
    ],
)
def test_conversations_of_every_format_are_read(row, name, messages):
    assert records(row) == (name, [Conversation(messages, "f.jsonl line 1")])


def test_prompt_lists_become_prompts():
    assert records({"prompt": Q, "category": "birds", "n": 3, "long": "x" * 999, "none": None}) == (
        "prompts",
        [Prompt((user(Q),), "f.jsonl line 1", {"category": "birds", "n": 3})],
    )
    for column in ("goal", "question", "instruction"):
        assert records({column: Q})[1][0].messages == (user(Q),)
    assert records({"prompt": [*TALK, assistant(A)]})[1][0].messages == tuple(TALK)
    assert prompt_text((user(Q),)) == Q
    assert prompt_text(tuple(TALK[1:3])) == "user: Hello\nassistant: Hi."


@pytest.mark.parametrize(
    "row, words",
    [
        ({**PKU, "better_response_id": 2}, ["'better_response_id'", "0 or 1", "number 2"]),
        ({**PKU, "safer_response_id": -1}, ["'safer_response_id'", "0 or 1", "-1"]),
        ({**PKU, "better_response_id": True}, ["'better_response_id'", "0 or 1", "true"]),
        ({**PKU, "better_response_id": "0"}, ["'better_response_id'", "0 or 1", 'text "0"']),
        ({**PKU, "better_response_id": 1.5}, ["'better_response_id'", "1.5"]),
        ({**PKU, "safer_response_id": None}, ["'safer_response_id'", "null"]),
        ({**PKU, "is_response_0_safe": 2}, ["'is_response_0_safe'", "true or false", "number 2"]),
        ({**PKU, "response_1": 5}, ["'response_1'", "expected text", "number 5"]),
        ({**PKU, "prompt": None}, ["'prompt'", "expected text", "null"]),
        ({**PKU, "prompt": "half \ud83d"}, ["'prompt'", "surrogate", "ud83d"]),
        (
            {key: PKU[key] for key in PKU if key != "safer_response_id"},
            ["no field 'safer_response_id'", "better_response_id"],
        ),
        (
            {**EVAL, "outputs": {"m": {"output": A, "preference": 3}}},
            ["outputs.m.preference", "1 to 2", "number 3"],
        ),
        ({**EVAL, "outputs": {"m": {"output": A, "preference": None}}}, ["outputs.m.preference", "null"]),
        ({**EVAL, "outputs": {"m": {"output": None, "preference": 1}}}, ["outputs.m.output", "null"]),
        ({**EVAL, "outputs": []}, ["'outputs'", "a list"]),
        ({"chosen": A, "rejected": B}, ["no field 'prompt'"]),
        ({"prompt": Q, "chosen": A, "rejected": None}, ["'rejected'"]),
        ({"messages": Q}, ["'messages'", "list of messages"]),
        ({"messages": []}, ["'messages'", "empty list"]),
        ({"messages": [Q]}, ["messages[0]", "role and content"]),
        ({"messages": [{"role": "narrator", "content": Q}]}, ["messages[0].role", "narrator"]),
        ({"messages": [{"role": ["user"], "content": Q}]}, ["messages[0].role", "a list"]),
        ({"messages": [{"role": "user"}]}, ["messages[0].content", "null"]),
        (
            {"messages": [user([{"type": "text", "text": "See"}, {"type": "image"}])]},
            ["messages[0].content[1]", "expected a part of type text", 'type "image"', "cannot be read yet"],
        ),
        (
            {"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}])]},
            ["content[0]", 'type "image_url"'],
        ),
        (
            {"messages": [user([{"type": "text", "text": 3}])]},
            ["messages[0].content[0].text", "expected text", "number 3"],
        ),
        ({"messages": [user([3])]}, ["messages[0].content[0]", "type: text", "number 3"]),
        ({"messages": [user([])]}, ["an empty list"]),
        ({"instruction": Q, "output": 3}, ["'output'", "number 3"]),
        ({"instruction": Q, "output": A, "history": [["alone"]]}, ["history[0]", "question, answer"]),
        ({"instruction": Q, "instances": A}, ["'instances'"]),
        ({"sentence": Q}, ["no known format", "sentence"]),
        ({}, ["no known format"]),
    ],
)
def test_mistakes_name_row_and_field(row, words):
    message = refused(row)
    assert message.startswith("f.jsonl") and all(word in message for word in words), message


def test_a_row_that_lacks_a_field_is_an_error_of_that_row():
    rows = [
        Row(PKU_V0, "f line 1"),
        Row({key: PKU_V0[key] for key in PKU_V0 if key != "response_1"}, "f line 2"),
    ]
    _, form = format_of(rows, "auto", "f")
    list(form.parse(rows[0]))
    with pytest.raises(UserError, match="f line 2: no field 'response_1'; the row has prompt"):
        list(form.parse(rows[1]))


def test_a_format_can_be_chosen_by_name():
    assert (
        records({"prompt": Q, "response_0": A, "response_1": B, "better_response_id": 0}, "prompts")[0]
        == "prompts"
    )
    assert "expected a format among auto, pku" in refused(PKU, "pkuu")


def test_every_format_is_documented():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name in FORMATS if f"`{name}`" not in text] == []
