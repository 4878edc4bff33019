"""Chat templates: ids, learned tokens and ends are the template's own, for those that TRL carries and for one
of each kind that is known to be difficult; tools; answers that bring their end.
"""

import importlib.util
import json
import re
from pathlib import Path

import jinja2
import pytest
from data_tokenizers import CHATML, byte_tokenizer
from tokenizers import pre_tokenizers

from saferlhf_fast.data.examples import UNLEARNED_END, prompt_examples, retokenize, sft_examples
from saferlhf_fast.data.pairs import preference_examples
from saferlhf_fast.data.templates import Template
from saferlhf_fast.data.token_places import place_of, tokenize_with_places
from saferlhf_fast.errors import UserError
from saferlhf_fast.rollout.engines.stop_strings import StopStrings

_TRL = importlib.util.find_spec("trl")
TRL = sorted((Path(_TRL.origin).parent / "chat_templates").glob("*.jinja")) if _TRL and _TRL.origin else []
SPECIAL = re.compile(
    r"<[|｜][^<>|｜{}' ]+[|｜]>|<\w+_of_turn>|<end_of_utterance>|<\|?turn\|?>|<\|?channel\|?>"
)


def say(role, content, **further):
    return {"role": role, "content": content, **further}


def talk(*contents):
    """A dialogue, the user first."""
    return [say(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]


PLAIN = talk("hi", "one", "more", "two")
DIALOGUES = [
    PLAIN,
    [say("system", "be brief"), *PLAIN],
    talk("hi", "one\n", "more", " two \n\n", "x", "three "),
    talk("hi", "<think>\nr1\n</think>\n\none", "more", "<think>\nr2\n</think>\n\ntwo"),
    talk("hi", "hi", "hi", "hi", "assistant\n", "<"),
    [
        PLAIN[0],
        say("assistant", "one", reasoning_content="r1"),
        PLAIN[2],
        say("assistant", "two", reasoning_content="r2"),
    ],
]


def tokenizer_of(template):
    return byte_tokenizer(template=template, more=tuple(sorted(set(SPECIAL.findall(template)))))


def spans(tokenizer, ids, mask):
    """Texts of the runs under a mask."""
    found, run = [], []
    for i, on in zip([*ids, 0], [*map(bool, mask), False]):
        if on:
            run.append(i)
        elif run:
            found.append(tokenizer.decode(run))
            run = []
    return found


def encoded(tokenizer, messages):
    """(ids, mask, learned texts) of a dialogue."""
    template = Template(tokenizer)
    ids, mask = template.encode_pieces([template.pieces(messages)])[0]
    return ids, mask, spans(tokenizer, ids, mask)


def own(tokenizer, messages, template=None, parts=False, **settings):
    """apply_chat_template; parts: this template reads contents as lists of parts alone."""
    given = [
        {**item, "content": [{"type": "text", "text": item["content"]}] if parts else item["content"]}
        for item in messages
    ]
    return tokenizer.apply_chat_template(given, chat_template=template, return_dict=True, **settings)


def has_marks(template):
    return re.search(r"{%-?\s*generation", template) is not None


def first_stop(template, ids):
    """How many of a response's ids a rollout would have at its end."""
    marks = StopStrings(template.tokenizer, template.stop_texts)
    return next(
        n for n in range(1, len(ids) + 1) if ids[n - 1] in template.stop_ids or marks.completed(ids[:n])
    )


def rows(folder, *items):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("path", TRL or [None], ids=lambda path: path.stem if path else "none")
def test_templates_of_trl(path):
    """Ids of `apply_chat_template`; TRL's mask, but for the tag and the white space that it counts in."""
    if path is None:
        pytest.skip("trl is not installed")
    text = path.read_text(encoding="utf-8")
    training = path.with_name(f"{path.stem}_training.jinja")
    marked = training.read_text(encoding="utf-8") if training.exists() else text
    tokenizer = tokenizer_of(text)
    template = Template(tokenizer)
    parts = path.stem.startswith(("idefics3", "smolvlm", "llava_next"))
    for messages in DIALOGUES:
        try:
            whole = own(tokenizer, messages, parts=parts)["input_ids"]
        except jinja2.TemplateError:  # no system text in this template
            assert path.stem.startswith("gemma")
            with pytest.raises(UserError, match="chat template refuses"):
                template.pieces(messages)
            continue
        ids, mask, learned = encoded(tokenizer, messages)
        n = len(ids) - (path.stem == "glm4moe")  # nothing is behind its last answer
        assert ids == whole[:n] + [tokenizer.eos_token_id] * (len(ids) - n)
        prompt = own(tokenizer, messages[:-1], parts=parts, add_generation_prompt=True)["input_ids"]
        assert template.encode_prompts([messages[:-1]])[0] == prompt
        answers = [m["content"].split("</think>")[-1].strip() for m in messages if m["role"] == "assistant"]
        assert len(learned) == len(answers) and all(map(str.__contains__, learned, answers))
        if not has_marks(marked):
            continue
        trl = own(tokenizer, messages, marked, parts, return_assistant_tokens_mask=True)
        theirs = spans(tokenizer, ids, trl["assistant_masks"][: len(ids)])
        if marked == text:
            assert mask == [bool(on) for on in trl["assistant_masks"][: len(ids)]]
        elif trl["input_ids"][: len(ids)] == ids:
            for mine, other in zip(learned, theirs, strict=True):
                before, found, after = other.rpartition(mine)
                assert found and not after.strip() and before in template._chat.tag


@pytest.mark.parametrize("path", TRL or [None], ids=lambda path: path.stem if path else "none")
def test_what_is_scored_ends_where_a_rollout_stops(path, tmp_path):
    if path is None:
        pytest.skip("trl is not installed")
    tokenizer = tokenizer_of(path.read_text(encoding="utf-8"))
    template = Template(tokenizer)
    (pair,), _ = preference_examples(
        rows(tmp_path, {"prompt": "hi", "chosen": "one > two", "rejected": "<b>no</b>"}), tokenizer
    )
    for ids, answer in ((pair.first_ids, "one > two"), (pair.second_ids, "<b>no</b>")):
        response = ids[pair.prompt_length :]
        assert first_stop(template, response) == len(response) and answer in tokenizer.decode(response)
    (dialogue,), _ = sft_examples(rows(tmp_path, {"prompt": "hi", "completion": "one > two"}), tokenizer)
    assert dialogue.ids == pair.first_ids and dialogue.mask[-1]


def wrapped(mark, last=None, tag="<|assistant|>\n", opens=""):
    """A template with a mark behind each message, another one behind the last, and a tag that opens more."""
    last = mark if last is None else last
    return (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
        f"{{{{ ('{last}' if loop.last and not add_generation_prompt else '{mark}') }}}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '" + tag + opens + "' }}{% endif %}"
    ).replace("\n", "\\n")


KINDS = {
    "one more token at the end": (
        wrapped("<|end|>\n", "<|end|>\n</s>"),
        ["one<|end|>", "two<|end|>"],
        "<|end|>",
    ),
    "another mark at the end": (
        wrapped("<|end|>", "<|return|>"),
        ["one<|end|>", "two<|return|>"],
        "<|return|>",
    ),
    "a mark of several tokens": (wrapped("[[END>>\n"), ["one[[END>>", "two[[END>>"], "[[END>>"),
    "a mark of special tokens": (
        wrapped("<|x|><|end|>\n"),
        ["one<|x|><|end|>", "two<|x|><|end|>"],
        "<|end|>",
    ),
    "nothing behind an answer": (wrapped("\n", ""), ["one", "two</s>"], "</s>"),
    "the end of the dialogue alone": (wrapped("\n", "</s>"), ["one", "two</s>"], "</s>"),
    "several tokens at the end alone": (wrapped("\n", "\nEND"), ["one", "two\nEND"], "END"),
    "nothing behind the last answer": (wrapped("<|end|>\n", ""), ["one<|end|>", "two<|end|>"], "<|end|>"),
    "thoughts that the prompt opens": (
        wrapped("<|end|>\n", opens="<think>\n"),
        ["one<|end|>", "two<|end|>"],
        "<|end|>",
    ),
    "end of sequence as the mark": (wrapped("</s>"), ["one</s>", "two</s>"], "</s>"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_templates(kind, tmp_path):
    text, expected, end = KINDS[kind]
    more = ("<|user|>", "<|assistant|>", "<|end|>", "<|return|>", "<|x|>")
    tokenizer = byte_tokenizer(template=text, more=more)
    template = Template(tokenizer)
    for space in ("", "\n", " \n"):  # answers are not trimmed
        ids, _, learned = encoded(tokenizer, talk("hi", "one" + space, "more", "two"))
        assert learned == [expected[0].replace("one", "one" + space), expected[1]]
        whole = own(tokenizer, talk("hi", "one" + space, "more", "two"))["input_ids"]
        common = min(len(ids), len(whole))
        assert ids[:common] == whole[:common]
    stops = {*tokenizer.convert_ids_to_tokens(list(template.stop_ids)), *template.stop_texts}
    assert stops == {"</s>", end}
    answer = "a > b>> [["
    (pair,), _ = preference_examples(
        rows(tmp_path, {"prompt": "q", "chosen": answer, "rejected": "b"}), tokenizer
    )
    response = pair.first_ids[pair.prompt_length :]
    assert first_stop(template, response) == len(response)
    assert tokenizer.decode(response) == expected[1].replace("two", answer)
    # an answer that brings its end is as one without
    for brought in (end, end + "\n", "</s>", end + "</s>"):
        again, _ = preference_examples(
            rows(tmp_path, {"prompt": "q", "chosen": answer + brought, "rejected": "b" + brought}), tokenizer
        )
        assert again[0].first_ids == pair.first_ids and again[0].second_ids == pair.second_ids
        (dialogue,), _ = sft_examples(
            rows(tmp_path, {"prompt": "q", "completion": answer + brought}), tokenizer
        )
        assert dialogue.ids == pair.first_ids
    with pytest.raises(UserError, match="a response with no token"):
        preference_examples(rows(tmp_path, {"prompt": "q", "chosen": "a", "rejected": end}), tokenizer)
    assert retokenize([talk("q")], [answer], tokenizer) == [pair.first_ids]
    (cut,) = retokenize([talk("q")], [answer], tokenizer, ended=[False])
    assert tokenizer.decode(cut[pair.prompt_length :]) == answer


def test_generation_marks_that_leave_out_the_end_are_flagged(tmp_path):
    text = CHATML.replace(
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}",
        "{{ '<|im_start|>' + m['role'] + '\n' }}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{{ '<|im_end|>\n' }}",
    )
    (dialogue,), report = sft_examples(rows(tmp_path, {"messages": talk("hi", "one")}), tokenizer_of(text))
    tokenizer = tokenizer_of(text)
    by_trl = own(tokenizer, talk("hi", "one"), return_assistant_tokens_mask=True)["assistant_masks"]
    assert dialogue.mask == [bool(on) for on in by_trl[: len(dialogue.ids)]]
    assert UNLEARNED_END in " ".join(report.lines())


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_sentencepiece_spaces_are_the_tokenizers_own(scheme):
    text = (
        "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' "
        "else ' ' + m['content'] + eos_token }}{% endfor %}"
    )
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "</s>", *"▁[]/INSTabcdefghijklmnopqrstuvwxyz", "▁t", "w▁"]
    core = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(dict.fromkeys(letters))}, [("▁", "t")], unk_token="<unk>"
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    core.add_special_tokens(["<unk>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = text
    ids, mask, learned = encoded(tokenizer, PLAIN)
    assert ids == own(tokenizer, PLAIN)["input_ids"]
    assert [span.replace(" ", "").replace("▁", "") for span in learned] == ["one</s>", "two</s>"]
    assert Template(tokenizer).encode_prompts([PLAIN[:3]])[0] == own(tokenizer, PLAIN[:3])["input_ids"]


def test_a_tokenizer_without_places_gives_the_same():
    tokenizer = byte_tokenizer()
    text, borders = "aé<|im_end|>日本 b", [1, 2, 12, 14]
    (fast,) = tokenize_with_places(tokenizer, [text], [borders])

    class Slow:
        is_fast = False

        def __call__(self, texts, **settings):
            return tokenizer(texts, **settings)

    (made,) = tokenize_with_places(Slow(), [text], [borders])
    assert made[0] == fast[0]
    for begin in borders:
        for end in borders:
            if begin < end:
                assert place_of(made[1], begin, end) == place_of(fast[1], begin, end)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOLS = (
    "{% if tools %}{{ '<|system|>\n' + (tools | tojson) + '<|end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ '<|call|>' + c['function']['name'] }}"
    "{% for k, v in c['function']['arguments'].items() %}{{ ' ' + k + '=' + v }}{% endfor %}{% endfor %}"
    "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def test_tool_calls_are_learned_and_results_are_not(tmp_path):
    tokenizer = byte_tokenizer(template=TOOLS, more=("<|end|>", "<|call|>"))
    messages = [
        say("user", "rain?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        say("tool", "sunny", tool_call_id="1"),
        say("assistant", "It is sunny."),
        say("user", "thanks"),
        say("assistant", "bye"),
    ]
    as_json = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    declared = [{"type": "function", "function": {"name": "weather"}}]
    for call in (CALL, as_json):
        row = {
            "messages": [messages[0], {**messages[1], "tool_calls": [call]}, *messages[2:]],
            "tools": declared,
        }
        (dialogue,), _ = sft_examples(rows(tmp_path, row), tokenizer)
        assert spans(tokenizer, dialogue.ids, dialogue.mask) == [
            "<|call|>weather city=Rome<|end|>",
            "It is sunny.<|end|>",
            "bye<|end|>",
        ]
        assert json.dumps(declared) in tokenizer.decode(dialogue.ids)
    (prompt,), _ = prompt_examples(rows(tmp_path, row), tokenizer)
    assert "<|call|>weather" in tokenizer.decode(prompt.ids) and json.dumps(declared) in tokenizer.decode(
        prompt.ids
    )
    # a template without a place for them refuses, with a count
    for template, name in ((CHATML, "auto"), (None, "safe-rlhf")):
        with pytest.raises(UserError, match="does not show tool calls|has no place for tools"):
            sft_examples(rows(tmp_path, {"messages": messages}), byte_tokenizer(template=template), name)
    with pytest.raises(UserError, match=r"tool_calls\[0\]': expected a call with the name of a function"):
        sft_examples(
            rows(tmp_path, {"messages": [messages[0], {**messages[1], "tool_calls": [3]}]}), tokenizer
        )
    with pytest.raises(UserError, match="an answer with tool calls"):
        preference_examples(
            rows(tmp_path, {"chosen": messages[:2], "rejected": messages[:1] + messages[-1:]}), tokenizer
        )


@pytest.mark.parametrize(
    "row, read",
    [
        ({"instruction": "Hi", "output": "Yo"}, sft_examples),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}, sft_examples),
        ({"prompt": "Hi", "chosen": "Yo", "rejected": "No"}, preference_examples),
        ({"prompt": "Hi"}, prompt_examples),
    ],
)
def test_system_columns(row, read, tmp_path):
    tokenizer = byte_tokenizer(template=CHATML)
    for column in ("system", "system_prompt"):
        (example,), _ = read(rows(tmp_path, {**row, column: "Be a pirate."}), tokenizer)
        ids = example.first_ids if read is preference_examples else example.ids
        assert tokenizer.decode(ids).startswith(
            "<|im_start|>system\nBe a pirate.<|im_end|>\n<|im_start|>user\nHi"
        )
    (example,), _ = read(rows(tmp_path, {**row, "system": None}), tokenizer)
    with pytest.raises(UserError, match="row 1, field 'system': expected text|field 'system': expected text"):
        read(rows(tmp_path, {**row, "system": 3}), tokenizer)
