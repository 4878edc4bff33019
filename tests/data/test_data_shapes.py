"""The same data in the shapes in which people and tools write it, and columns that change what it means."""

import json

import pytest
from data_tokenizers import CHATML, byte_tokenizer

from saferlhf_fast.config.stages import Source
from saferlhf_fast.data.columns import extra_columns
from saferlhf_fast.data.examples import preference_examples, prompt_examples, sft_examples
from saferlhf_fast.data.files import Row
from saferlhf_fast.data.formats import FORMATS, format_of
from saferlhf_fast.data.messages import ROLES, with_message_lists
from saferlhf_fast.data.sources import load_sources
from saferlhf_fast.errors import UserError

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
PIRATE = "You are a pirate."


def parsed(*rows, untyped=False):
    """(names of unread columns, records) of rows."""
    rows = [with_message_lists(Row(row, f"f line {i}", untyped)) for i, row in enumerate(rows, 1)]
    _, form = format_of(rows, "auto", "f")
    extra = extra_columns(rows, form)
    return extra.unread, [extra.apply(row, record) for row in rows for record in form.parse(row)]


def turns(record):
    return [(item["role"], item["content"]) for item in record.messages]


BOTH = [("user", "Hi"), ("assistant", "Yo")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Yo"]}},
        {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Yo"], "weight": None}},
        {"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Yo"]}},
        {"messages": json.dumps(TALK)},
        {"messages": str(TALK)},
        {"messages": str(TALK).replace("}, {", "}\n {")},
        {"conversations": json.dumps(SHARED)},
        {"prompt": str(TALK[:1]), "completion": str(TALK[1:])},
        {"prompt": TALK[0], "completion": TALK[1]},
        {
            "messages": [
                {**TALK[0], "from": None, "value": None},
                {**SHARED[1], "role": None, "content": None},
            ]
        },
        {"messages": [{"role": " USER", "content": ["H", {"text": "i"}]}, {"role": "Bot", "content": "Yo"}]},
        {"messages": [{"role": "user", "content": {"type": "text", "text": "Hi"}}, TALK[1]]},
        {"messages": [{"role": "user", "content": {"type": ["text"], "text": ["Hi"]}}, TALK[1]]},
        *({"messages": [TALK[0], {"role": name, "content": "Yo"}]} for name in ROLES["assistant"]),
        *({"messages": [{"role": name, "content": "Hi"}, TALK[1]]} for name in ROLES["user"]),
    ],
)
def test_messages_in_every_shape(row):
    unread, (record,) = parsed(row)
    assert turns(record) == BOTH and unread == ()


def test_pairs_of_messages_in_every_shape():
    for sides in (
        {"chosen": {"role": ["user", "assistant"], "content": ["Hi", "Yo"]}},
        {"chosen": json.dumps(TALK)},
        {"chosen": str(TALK)},
    ):
        _, (record,) = parsed({**sides, "rejected": [TALK[0], {"role": "ai", "content": "No"}]})
        assert (turns(record), record.responses) == (BOTH[:1], ("Yo", "No"))
    # Texts that only begin like messages are texts.
    for text in ('[{"role": "user"', "{'content': 'x'} is Python", '[{"role": 1}] and more'):
        _, (record,) = parsed({"prompt": text, "chosen": "Yo", "rejected": "No"})
        assert turns(record) == [("user", text)]


def test_calls_of_tools_are_read():
    call = {"name": "add", "arguments": {"a": 1}}
    calls = [{"type": "function", "function": call}]
    for name, shared in (("messages", False), ("conversations", True)):
        said = (
            {"from": "function_call", "value": json.dumps(call)}
            if shared
            else {"role": "assistant", "content": None, "tool_calls": calls}
        )
        result = {"role": "observation", "content": "2", "tool_call_id": "x"}
        _, (record,) = parsed({name: [TALK[0], said, result, TALK[1]], "tools": "[]"})
        assert record.messages[1] == {"role": "assistant", "content": "", "tool_calls": calls}
        assert record.messages[2] == {"role": "tool", "content": "2", "tool_call_id": "x"}
    # OpenAI's older form, with and without words
    for words, older in ((None, call), ("", json.dumps(call)), ("I add.", call)):
        said = {"role": "assistant", "content": words, "function_call": older}
        unread, (record,) = parsed({"messages": [TALK[0], said, TALK[0], TALK[1]]})
        assert record.messages[1]["content"] == (words or "") and unread == ()
        assert record.messages[1]["tool_calls"] == calls
    with pytest.raises(UserError, match=r"conversations\[1\].value': expected a call"):
        parsed({"conversations": [SHARED[0], {"from": "function_call", "value": "add 1"}]})


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Go on", "output": "Yo"},
        {"conversations": [{"from": "human", "value": "Go on"}, SHARED[1]]},
        {"messages": [{"role": "user", "content": "Go on"}, TALK[1]]},
        {"prompt": "Go on", "completion": "Yo"},
        {"prompt": "Go on", "response": "Yo"},
        {"prompt": "Go on", "chosen": "Yo", "rejected": "No"},
        {"instruction": "Go on", "chosen": "Yo", "rejected": "No"},
        {"prompt": "Go on", "response_0": "Yo", "response_1": "No", "better_response_id": 0},
        {"chosen": "\n\nHuman: Go on\n\nAssistant: Yo", "rejected": "\n\nHuman: Go on\n\nAssistant: No"},
        {"prompt": "Go on"},
        {"question": "Go on"},
    ],
)
def test_system_and_history_columns_are_used_in_every_format(row):
    history = [["first", "second"]]
    expected = [("system", PIRATE), ("user", "first"), ("assistant", "second"), ("user", "Go on")]
    for more in (
        {"system": PIRATE, "history": history},
        {"system_prompt": PIRATE, "system": None, "history": history},
        {"system": PIRATE, "history": [TALK[0] | {"content": "first"}, TALK[1] | {"content": "second"}]},
        {"system": PIRATE, "history": json.dumps(history)},
    ):
        unread, (record,) = parsed({**row, **more})
        assert turns(record)[:4] == expected and unread == ()
        assert not getattr(record, "meta", {})
    # Nothing to say in this row, and a column of that name with something else in it.
    _, (plain,) = parsed({**row, "system": "", "history": []})
    assert turns(plain)[0] == ("user", "Go on")
    unread, (plain,) = parsed({**row, "history": "x" * 300})
    assert turns(plain)[0] == ("user", "Go on") and unread == ("history",)


def test_two_different_system_messages_are_refused():
    own = [{"role": "system", "content": PIRATE}, *TALK]
    assert turns(parsed({"messages": own, "system": PIRATE + "\n"})[1][0])[1:] == BOTH
    with pytest.raises(UserError, match="f line 1: the column 'system' and the dialogue have two different"):
        parsed({"messages": own, "system": "Be brief."})
    with pytest.raises(UserError, match="f line 1: the columns system, system_prompt differ"):
        parsed({"messages": TALK, "system": "Be brief.", "system_prompt": PIRATE})


@pytest.fixture
def put(tmp_path):
    """Writes rows to a file -> its path."""

    def write(rows, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("gap", [None, float("nan")])
@pytest.mark.parametrize("no, yes", [(False, True), (0, 1), (0.0, 1.0)])
@pytest.mark.parametrize("column", ["label", "kto_tag"])
@pytest.mark.parametrize(
    "row", [{"prompt": "Hi {}", "completion": "Yo"}, {"instruction": "Hi {}", "output": "Yo"}]
)
def test_answers_that_the_label_does_not_want_are_not_learned(put, row, column, no, yes, gap):
    first, *_ = row
    rows = [{**row, first: f"Hi {i}", column: value} for i, value in enumerate((yes, no, gap))]
    examples, report = sft_examples(put(rows), byte_tokenizer())
    assert [example.prompt_text for example in examples] == ["Hi 0", "Hi 2"]
    assert report.dropped == {f"the label says that the answer is not wanted ({column})": 1}
    # A label that is something else is named.
    rows[1][column] = 7
    examples, report = sft_examples(put(rows), byte_tokenizer())
    assert len(examples) == 3 and report.lines()[1] == f"  columns that are not used: {column}"


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("key, off, on", [("weight", 0, 1), ("weight", 0.0, None), ("train", False, True)])
def test_turns_with_weight_0_are_not_learned(put, template, key, off, on):
    tokenizer = byte_tokenizer(template=template)

    def learned(*weights):
        messages = []
        for name, weight in zip(("one", "two", "three"), weights):
            messages += [TALK[0], {"role": "assistant", "content": name, key: weight}]
        (example,), _ = sft_examples(put([{"messages": messages}]), tokenizer)
        assert "one" in tokenizer.decode(example.ids)
        text = tokenizer.decode([i for i, is_on in zip(example.ids, example.mask) if is_on])
        return [name for name in ("one", "two", "three") if name in text]

    assert learned(off, on, off) == ["two"] and learned(on, off, on) == ["one", "three"]
    with pytest.raises(UserError, match="1 dropped: all assistant turns have the weight 0"):
        learned(off, off, off)
    with pytest.raises(UserError, match=rf"messages\[1\].{key}': expected 0 or 1 .*got the number 0.5"):
        learned(0.5, on, on)


def test_columns_that_nobody_reads_are_named_once(put):
    row = {"messages": [{**TALK[0], "mood": "calm"}, TALK[1]], "images": [], "none": None, "id": 1}
    _, report = sft_examples(put([row, {**row, "late": 2}]), byte_tokenizer())
    assert report.lines()[1:] == ["  columns that are not used: images, id, late, messages[].mood"]
    assert report.as_dict()["sources"][0]["unread"] == ["images", "id", "late", "messages[].mood"]
    pair = {"prompt": "Hi", "chosen": "Yo", "rejected": "No", "margin": 2, "conversations": SHARED}
    assert preference_examples(put([pair]), byte_tokenizer())[1].sources[0].unread == (
        "margin",
        "conversations",
    )
    # A prompt keeps short fields.
    (prompt,), report = prompt_examples(
        put([{"prompt": "Hi", "kind": "x", "essay": "y" * 999}]), byte_tokenizer()
    )
    assert prompt.meta == {"kind": "x"} and report.sources[0].unread == ("essay",)
    for name, form in FORMATS.items():
        read = {*form.columns, *form.optional}
        assert not {"system", "history"} & read, f"{name} must leave these to columns.py"


def test_the_input_of_an_instruction_without_an_output_belongs_to_the_prompt(put):
    rows = [{"instruction": "Add", "input": "1 2"}, {"instruction": "Hi", "input": "", "kind": "x"}]
    examples, report = prompt_examples(put(rows), byte_tokenizer())
    assert [example.text for example in examples] == ["Add 1 2", "Hi"]
    assert [example.meta for example in examples] == [{}, {"kind": "x"}] and not report.sources[0].unread


@pytest.mark.parametrize(
    "more",
    [
        {"system": PIRATE},
        {"history": [["a", "b"]]},
        {"tools": [{"type": "function"}]},
        {"system_prompt": "x"},
    ],
)
def test_a_document_is_no_dialogue(put, more):
    (example,), report = sft_examples(put([{"text": "Once upon", **more}]), byte_tokenizer(bos=False))
    assert byte_tokenizer(bos=False).decode(example.ids) == "Once upon</s>"
    assert report.sources[0].unread == tuple(more)


@pytest.mark.parametrize(
    "part", [{"text": "Hi", "image": "x"}, {"type": "text", "text": "Hi", "image_url": {"url": "x"}}]
)
def test_a_part_that_is_more_than_text_is_refused(part):
    with pytest.raises(UserError, match=r"content\[0\]': expected .* text alone, got one with 'image"):
        parsed({"messages": [{"role": "user", "content": [part]}, TALK[1]]})
    empty = {key: value if key in ("text", "type") else None for key, value in part.items()}
    assert turns(parsed({"messages": [{"role": "user", "content": [empty]}, TALK[1]]})[1][0]) == BOTH


@pytest.mark.parametrize("name, suffix", [("messages", "jsonl"), ("chosen", "json")])
def test_a_message_with_a_key_twice_is_refused(tmp_path, name, suffix):
    text = '{"%s": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a", "content": "b"}]'
    path = tmp_path / f"a.{suffix}"
    path.write_text(
        text % name + (', "rejected": [{"role": "user", "content": "Hi"}]}' if name == "chosen" else "}")
    )
    examples = sft_examples if name == "messages" else preference_examples
    with pytest.raises(UserError, match=rf"field '{name}\[1\]': expected each key once, got 'content' twice"):
        examples(str(path), byte_tokenizer())


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", [None, CHATML])
def test_a_lone_text_column_is_learned_as_it_is(put, bos, template):
    tokenizer = byte_tokenizer(bos=bos, template=template)
    begin = "<s>" if bos else ""
    rows = [{"text": f"{begin}Once upon a time"}, {"text": "The end.</s>", "source": "x"}, {"text": " "}]
    examples, report = sft_examples(put(rows), tokenizer)
    assert [tokenizer.decode(example.ids).replace(" ", "") for example in examples] == [
        f"{begin}Onceuponatime</s>",
        f"{begin}Theend.</s>",
    ]
    assert all(example.mask == [False] * bos + [True] * (len(example.ids) - bos) for example in examples)
    assert report.dropped == {"a response with no token": 1} and report.sources[0].unread == ("source",)


ROWS = [{"prompt": "a, b; c", "response": "é\n2"}, {"prompt": "d", "response": "e"}]


def csv_text(delimiter, head=""):
    cells = [["prompt", " response"], *([f'"{value}"' for value in row.values()] for row in ROWS)]
    return head + "\r\n".join(delimiter.join(line) for line in cells) + "\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    "name, text",
    [
        *(("a.csv", csv_text(delimiter)) for delimiter in ",;\t|"),
        ("a.csv", csv_text("^", "sep=^\r\n")),
        ("a.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)),
        ("a.json", json.dumps(ROWS, ensure_ascii=False, indent=1)),
    ],
)
def test_every_delimiter_and_unicode_encoding(tmp_path, name, text, encoding):
    (tmp_path / name).write_bytes(text.encode(encoding))
    (loaded,) = load_sources(str(tmp_path / name))
    assert [row.fields for row in loaded.rows] == ROWS


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.csv", "a,b,a\n1,2,3\n", ["line 1", "each column once", "'a' twice"]),
        ("a.csv", "\n\na;a\n1;2\n", ["line 3", "'a' twice"]),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', ["line 2", "each column once", "'a' twice"]),
        ("a.json", '[{"a": 1},\n {"a": 1, "a": 3}]', ["row 2", "'a' twice"]),
        ("a.csv", 'a,b\n1,2\n"c" d,e\n', ["line 3:", "not CSV"]),
        ("a.csv", 'a,b\n\n"1\n2\n3",4\n"c" d,e\n', ["line 6:", "not CSV"]),
        ("a.csv", 'a,b\n1,"2\n3" x\n', ["line 3:", "not CSV", "begins in line 2"]),
        ("a.csv", "a,b\n" + "1,2\n" * 20 + '"open,2\n' + "1,2\n" * 50, ["line 22:", "is opened here"]),
        ("a.csv", 'a,b\n"1\n""2""",3\n"x\ny","z\n' + "1,2\n" * 9, ["line 5:", "begins in line 4"]),
        ("a.csv", 'a,b\n"1\n2",3\n"4\n5",6,7\n', ["line 4:", "2 columns, got 3"]),
        ("a.csv", 'a,b\n"1\n2",3\n"4\n5"\n', ["line 4:", "2 columns, got 1"]),
    ],
)
def test_mistakes_name_the_right_line(tmp_path, name, text, words):
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        with pytest.raises(UserError) as caught:
            load_sources(str(tmp_path / name))
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_damaged_utf_16_names_the_line(tmp_path):
    (tmp_path / "a.csv").write_bytes("a,b\n1,2\n3,".encode("utf-16") + b"\x00\xdc\x0a\x00")
    with pytest.raises(UserError, match="line 3: expected UTF-16 text"):
        load_sources(str(tmp_path / "a.csv"))


def test_parquet_columns_that_are_there_twice_are_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="each column once, got 'a' twice"):
        load_sources(str(tmp_path / "a.parquet"))


def test_renaming_onto_a_column_is_refused_and_swapping_is_not(put):
    path = put([{"a": 1, "b": 2}])
    for columns in ({"a": "b"}, {"b": "a"}, {"a": "c", "b": "c"}):
        with pytest.raises(UserError, match="line 1: columns renames '.' to '.', but the row has two"):
            load_sources(Source(path, columns=columns))
    (loaded,) = load_sources(Source(path, columns={"a": "b", "b": "a"}))
    assert loaded.rows[0].fields == {"b": 1, "a": 2}


PKU = {"prompt": "Hi", "response_0": "Yo", "response_1": "No", "is_response_0_safe": True}
PKU |= {"is_response_1_safe": False, "better_response_id": 0, "safer_response_id": 0}


@pytest.mark.parametrize("untyped", [False, True])
def test_labels_as_pandas_writes_them(untyped):
    row = {**PKU, "better_response_id": 1.0, "safer_response_id": 0.0, "is_response_1_safe": 0.0}
    row = {key: str(value) for key, value in row.items()} if untyped else row
    _, (record,) = parsed(row, untyped=untyped)
    assert (record.better, record.safer, record.signs) == (1, 0, (-1, 1))


@pytest.mark.parametrize("digits", [400, 5000])
def test_integers_of_any_length(put, tmp_path, digits):
    """Where nobody reads them they do not matter; where they are read, the line and the field are named."""
    huge = "1" + "0" * digits
    for name, text in (
        ("a.jsonl", '{{"prompt": "Hi", "completion": "Yo", "n": {}}}\n'),
        ("a.json", '[{{"prompt": "Hi", "completion": "Yo", "n": {}}}]'),
        ("a.csv", "prompt,completion,n\nHi,Yo,{}\n"),
    ):
        (tmp_path / name).write_text(text.format(huge))
        examples, report = sft_examples(str(tmp_path / name), byte_tokenizer())
        assert len(examples) == 1 and report.sources[0].unread == ("n",)
    evaluation = {"instruction": "Hi", "reference_output": "Yo", "output": "No", "preference": 1}
    for fields in (PKU, evaluation):
        for field in fields:
            text = json.dumps({**fields, field: 987}).replace("987", huge)
            (tmp_path / "b.jsonl").write_text(text)
            with pytest.raises(UserError, match=f"line 1, field '{field}': expected .* got the number 1000"):
                preference_examples(str(tmp_path / "b.jsonl"), byte_tokenizer())
    cells = [str({**PKU, "better_response_id": huge}[name]) for name in PKU]
    (tmp_path / "c.csv").write_text(",".join(PKU) + "\n" + ",".join(cells) + "\n")
    with pytest.raises(UserError, match="line 2, field 'better_response_id': expected 0 or 1, got the text"):
        preference_examples(str(tmp_path / "c.csv"), byte_tokenizer())
