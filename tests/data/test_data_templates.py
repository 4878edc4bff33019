"""Templates: their texts, the learned tokens, the prefix property, prompts cut on the left."""

import pytest
from data_tokenizers import CHATML, LLAMA2, THINKING, byte_tokenizer, space_tokenizer

from saferlhf_fast.data.examples import retokenize
from saferlhf_fast.data.templates import Template
from saferlhf_fast.errors import UserError

TALK = (
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there."},
    {"role": "user", "content": "Which tree?"},
    {"role": "assistant", "content": "The oak."},
)


def shown(tokenizer, ids, mask=None):
    """The text of all ids, or of those under the mask."""
    return tokenizer.decode([i for i, on in zip(ids, mask) if on] if mask else ids, skip_special_tokens=False)


def encoded(template, messages):
    """(ids, mask) of a dialogue: mask is True on the tokens of all assistant turns and their ends."""
    return template.encode_pieces([template.pieces(messages)])[0]


def test_the_template_safe_rlhf_writes_the_text_of_the_reference():
    tokenizer = byte_tokenizer()
    template = Template(tokenizer, "safe-rlhf")
    assert shown(tokenizer, template.encode_prompts([TALK[:1]])[0]) == (
        "<s>BEGINNING OF CONVERSATION: USER: Hello ASSISTANT:"
    )
    ids, mask = encoded(template, TALK)
    assert shown(tokenizer, ids) == (
        "<s>BEGINNING OF CONVERSATION: USER: Hello ASSISTANT:Hi there.</s>"
        "USER: Which tree? ASSISTANT:The oak.</s>"
    )
    assert shown(tokenizer, ids, mask) == "Hi there.</s>The oak.</s>"
    assert template.stop_ids == (tokenizer.eos_token_id,)


def test_the_system_text_is_put_before_the_user_text():
    tokenizer = byte_tokenizer()
    messages = ({"role": "system", "content": "Be brief."}, *TALK[:1])
    assert shown(tokenizer, Template(tokenizer, "safe-rlhf").encode_prompts([messages])[0]) == (
        "<s>BEGINNING OF CONVERSATION: USER: Be brief.\n\nHello ASSISTANT:"
    )


def test_the_template_none_adds_no_tags():
    tokenizer = byte_tokenizer(bos=False)
    ids, mask = encoded(Template(tokenizer, "none"), TALK)
    assert shown(tokenizer, ids) == "HelloHi there.</s>\nWhich tree?The oak.</s>"
    assert shown(tokenizer, ids, mask) == "Hi there.</s>The oak.</s>"


def test_auto_takes_the_chat_template_of_the_tokenizer():
    assert Template(byte_tokenizer()).name == "safe-rlhf"
    assert Template(byte_tokenizer(template=CHATML)).name == "tokenizer"
    with pytest.raises(UserError, match="no chat template"):
        Template(byte_tokenizer(), "tokenizer")
    with pytest.raises(UserError, match="expected one of auto"):
        Template(byte_tokenizer(), "vicuna")


def test_a_chat_template_gives_the_text_of_apply_chat_template():
    tokenizer = byte_tokenizer(bos=False, template=CHATML)
    template = Template(tokenizer)
    ids, mask = encoded(template, TALK)
    # The line break after the end of the last turn is not generated, so it is left out.
    assert shown(tokenizer, ids) == tokenizer.apply_chat_template(list(TALK), tokenize=False).rstrip()
    assert shown(tokenizer, ids, mask) == "Hi there.<|im_end|>The oak.<|im_end|>"
    assert set(template.stop_ids) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert (
        shown(tokenizer, template.encode_prompts([TALK[:1]])[0][-template.tag_length :])
        == "<|im_start|>assistant\n"
    )


def test_a_chat_template_that_writes_bos_and_spaces_is_followed():
    tokenizer = byte_tokenizer(template=LLAMA2)
    ids, mask = encoded(Template(tokenizer), TALK)
    assert shown(tokenizer, ids) == tokenizer.apply_chat_template(list(TALK), tokenize=False)
    assert shown(tokenizer, ids, mask) == " Hi there. </s> The oak. </s>"
    assert ids[0] == tokenizer.bos_token_id != ids[1]


def test_a_chat_template_that_treats_the_last_turn_differently_is_followed():
    tokenizer = byte_tokenizer(bos=False, template=THINKING)
    ids, mask = encoded(Template(tokenizer), TALK)
    assert shown(tokenizer, ids, mask) == "Hi there.<|im_end|><think></think>The oak.<|im_end|>"


def test_a_refusal_of_the_chat_template_is_reported():
    with pytest.raises(UserError, match="refuses the conversation .only user and assistant, please"):
        Template(byte_tokenizer(template=LLAMA2)).encode_prompts(
            [({"role": "system", "content": "x"}, TALK[0])]
        )


def test_an_answer_that_repeats_the_question_is_located():
    tokenizer = byte_tokenizer(bos=False, template=CHATML)
    echo = tuple({"role": role, "content": "Hi"} for role in ("user", "assistant", "user", "assistant"))
    ids, mask = encoded(Template(tokenizer), echo)
    assert shown(tokenizer, ids, mask) == "Hi<|im_end|>Hi<|im_end|>"
    assert mask[-3:] == [True] * 3 and not any(mask[:20])


@pytest.mark.parametrize(
    "name, tokenizer",
    [
        ("safe-rlhf", byte_tokenizer()),
        ("none", byte_tokenizer()),
        ("safe-rlhf", space_tokenizer()),
        ("tokenizer", byte_tokenizer(template=CHATML)),
        ("tokenizer", byte_tokenizer(template=LLAMA2)),
        ("tokenizer", byte_tokenizer(template=THINKING)),
    ],
)
def test_prompt_ids_are_a_prefix_of_the_dialogues(name, tokenizer):
    template = Template(tokenizer, name)
    for turns in (2, 4):
        messages = TALK[:turns]
        prompt = template.encode_prompts([messages[:-1]])[0]
        text = template.response_text(messages[:-1], messages[-1]["content"])
        response = template.end(template.encode_responses([text])[0])
        ids, mask = encoded(template, messages)
        assert ids == prompt + response
        assert mask[len(prompt) :] == [True] * len(response)


def test_sentencepiece_puts_no_space_behind_the_tag():
    tokenizer = space_tokenizer()
    assert tokenizer.tokenize("oak") == ["▁", "o", "a", "k"]
    template = Template(tokenizer, "safe-rlhf")
    assert tokenizer.convert_ids_to_tokens(template.encode_responses(["oak", "\noak", ""])[0]) == [
        "o",
        "a",
        "k",
    ]
    expected = tokenizer("BEGINNING OF CONVERSATION: USER: Hello ASSISTANT:Hi there.")["input_ids"]
    assert encoded(template, TALK[:2])[0] == [*expected, tokenizer.eos_token_id]


def test_truncation_keeps_the_end_and_the_tag():
    tokenizer = byte_tokenizer()
    template = Template(tokenizer, "safe-rlhf")
    ids = template.encode_prompts([({"role": "user", "content": "x" * 500 + " the end?"},)])[0]
    assert shown(tokenizer, template.truncate_prompt(ids, 40)) == "<s>" + "x" * 19 + " the end? ASSISTANT:"
    assert template.truncate_prompt(ids, len(ids)) == ids
    # only bos and the 10 tokens of the tag fit
    assert template.truncate_prompt(ids, 11) is None


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused():
    with pytest.raises(UserError, match="no end-of-sequence token"):
        Template(byte_tokenizer(eos=None))


def test_retokenize_gives_the_ids_of_the_dialogue():
    tokenizer = byte_tokenizer()
    dialogues = retokenize(
        [TALK[:1], TALK[:1]], ["Hi there.", "Hi"], tokenizer, "safe-rlhf", ended=[True, False]
    )
    assert dialogues[0] == encoded(Template(tokenizer, "safe-rlhf"), TALK[:2])[0]
    assert shown(tokenizer, dialogues[1]) == "<s>BEGINNING OF CONVERSATION: USER: Hello ASSISTANT:Hi"
    (short,) = retokenize([TALK[:1]], ["Hi there."], tokenizer, "safe-rlhf", max_length=30)
    assert shown(tokenizer, short) == "<s>R: Hello ASSISTANT:Hi there.</s>"
    (long,) = retokenize([TALK[:1]], ["Hi there." * 9], tokenizer, "safe-rlhf", max_length=30)
    assert len(long) == 30 and "ASSISTANT:Hi there." in shown(tokenizer, long)
