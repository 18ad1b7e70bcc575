"""Reading records: forms, keys that change what is asked, encodings, and the account of every record."""

import argparse
import functools
import gzip
import json
import pathlib
import random
import re

import pytest

import train
from plumbing.records import load_data, prompt_key, read_records
from tests import builders
from tests.builders import CHAT, END, HERE, RECORD, chat_tokenizer, messages, refused

ASKED, ANSWER = messages("Say hello.", "Hello.")
HELLO = {"instruction": "Say hello.", "output": "Hello."}
BE_KIND = messages("Be kind.", first="system")
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "hello"}}}
SPELLED = {**CALL, "function": {"name": "look_up", "arguments": '{"word": "hello"}'}}  # as OpenAI has it
CALLED = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "A word."}]
SHARE = [{"from": "human", "value": "Say hello."}, {"from": "gpt", "value": "Hello."}]
PARTS = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]
FRAMED = "### Instruction:\nSay hello.\n\n### Response:\n"

# fmt: off
FORMS = [  # a record, and what the rest of the program has of it
    (RECORD, RECORD),
    ({**RECORD, "messages": None, "more": 1, "input": None}, HELLO),
    ({"prompt": "Say hello.", "completion": "Hello."}, HELLO),
    ({"prompt": [ASKED], "completion": [ANSWER]}, HELLO),
    ({"prompt": [ASKED], "completion": "Hello."}, HELLO),
    ({"messages": [ASKED, ANSWER], "kind": "greet", "prompt": "Say hello."}, {**HELLO, "kind": "greet"}),
    ({"messages": [*BE_KIND, ANSWER, ASKED, ANSWER]}, {**HELLO, "history": [*BE_KIND, ANSWER]}),
    ({"instruction": "a\u2028b\x85c", "output": "d"}, {"instruction": "a\u2028b\x85c", "output": "d"}),
    # keys that change what is asked
    ({**HELLO, "system": "Be kind."}, {**HELLO, "history": BE_KIND}),
    ({"system_prompt": "Be kind.", "question": "Say hello.", "response": "Hello."},
     {**HELLO, "history": BE_KIND}),
    ({"messages": [ASKED, ANSWER], "system": "Be kind."}, {**HELLO, "history": BE_KIND}),
    ({"messages": [*BE_KIND, ASKED, ANSWER], "system": "Be kind."}, {**HELLO, "history": BE_KIND}),
    ({**RECORD, "system": "", "tools": "[]", "images": [], "history": []}, RECORD),
    ({"messages": [ASKED, ANSWER], "tools": [TOOL]}, {**HELLO, "tools": [TOOL]}),
    ({"conversations": SHARE, "tools": json.dumps([TOOL])}, {**HELLO, "tools": [TOOL]}),
    ({"instruction": "Say.", "context": "hello", "response": "Hello.", "category": "x"},
     {"instruction": "Say.", "input": "hello", "output": "Hello."}),
    ({"prompt": "Say.", "input": "", "context": "hello", "completion": "Hello."},
     {"instruction": "Say.", "input": "hello", "output": "Hello."}),
    ({"input": "Say hello.", "output": "Hello."}, HELLO),
    ({"instruction": "", "input": "Say hello.", "output": "Hello."}, HELLO),
    ({"question": "苹果还是梨? A or B?", "choices": ["苹果", "梨", "A", "B"], "answer": "A"},
     {"instruction": "苹果还是梨? A or B?", "output": "A"}),
    ({"query": "Say hello.", "response": "Hello.", "history": [["Hi.", "Yes?"]], "system": "Be kind."},
     {**HELLO, "history": [*BE_KIND, *messages("Hi.", "Yes?")]}),
    ({**RECORD, "prompt": FRAMED, "text": FRAMED + "Hello."}, RECORD),
    # ShareGPT, and messages as they are met
    ({"conversations": SHARE, "id": 7}, HELLO),
    ({"messages": json.dumps([ASKED, {**ANSWER, "thinking": ""}])}, HELLO),
    ({"conversation": [{"from": "system", "value": "Be kind."}, *SHARE]}, {**HELLO, "history": BE_KIND}),
    ({"conversations": [SHARE[1], *SHARE]}, {**HELLO, "history": [ANSWER]}),
    ({"conversations": [{"from": "function_call", "value": json.dumps(CALL["function"])},
                        {"from": "observation", "value": "A word."}, *SHARE]}, {**HELLO, "history": CALLED}),
    ({"messages": [{**ASKED, "name": None, "tool_calls": None}, {**ANSWER, "tool_calls": []}]}, HELLO),
    ({"messages": [{**CALLED[0], "content": None, "tool_calls": [SPELLED]}, CALLED[1], ASKED, ANSWER]},
     {**HELLO, "history": CALLED}),
    ({"messages": [{"role": "assistant", "content": "Yes?", "reasoning_content": "Hm.", "weight": 0}, ASKED,
                   {**ANSWER, "weight": 1}]},
     {**HELLO, "history": [{"role": "assistant", "content": "Yes?", "reasoning_content": "Hm."}]}),
    ({"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": ["Hello."]}]}, HELLO),
]
# fmt: on

PLACES = ["list.json", "lines.jsonl", "lines.json", "windows.txt", "pretty.jsonl", "within"]


@pytest.mark.parametrize("name", PLACES)
def test_records_of_all_forms_come_in_a_list_or_in_lines(tmp_path, name):
    """Every form of record is read alike from a list, from lines, and from an object that has the list."""
    rows = [row for row, _ in FORMS]
    empty_line = "\r\n\r\n" if name == "windows.txt" else "\n\n"
    text = empty_line.join(json.dumps(r, ensure_ascii=False, indent=name[:1] == "p" or None) for r in rows)
    if name in ("list.json", "within"):
        text = "\n" + json.dumps(rows if name == "list.json" else {"version": 1, "data": rows})
    (tmp_path / name).write_bytes(text.encode())
    found = read_records(tmp_path / name, "chat")
    for (row, plain), one in zip(FORMS, found, strict=True):
        assert one == plain, row
    (tmp_path / "again.json").write_text(json.dumps(found))  # as a run folder keeps them
    assert read_records(tmp_path / "again.json", "chat", own=True) == found


# fmt: off
BAD_RECORDS = [
    ({"prompt": "x"}, "has no text under 'completion'"),
    ({"text": "x", "id": 3}, "has no text under 'instruction' .it has 'text', 'id'"),
    ({**RECORD, "output": None}, "has no text under 'output'"),
    ({**RECORD, "instruction": None}, "has no text under 'instruction'"),
    ({**RECORD, "output": ["a", "b"]}, r"instruction and output\[1\]: 'a' is not a message"),
    ({"prompt": ["x"], "completion": "y"}, r"prompt and completion\[0\]: 'x' is not a message"),
    ({"prompt": "x", "completion": "y", "kind": 3}, "something other than text under 'kind'"),
    ({"instruction": "x", "context": ["y"], "response": "z"}, "something other than text under 'context'"),
    ({"prompt": [ASKED], "completion": [{"role": "assistant"}]}, "'content' is missing"),
    ({"messages": []}, "holds no messages"),
    ({"messages": [ANSWER]}, "before the last answer stands nothing"),
    ({"messages": [ASKED, ANSWER, ASKED]}, "the last message is of 'user', not of the assistant"),
    ({"conversations": SHARE[:1], "chosen": SHARE[1]}, "'chosen' and 'rejected' are not learned"),
    ({"messages": [ANSWER, ANSWER]}, "before the last answer stands a message of 'assistant'"),
    ({"messages": [ASKED, *CALLED, ANSWER]}, "before the last answer stands a message of 'tool'"),
    ({"messages": "Say hello."}, "messages: 'Say hello.' holds no messages"),
    ({"conversation": [{"input": "x", "output": "y"}]}, "'role' is missing .it has 'input', 'output'"),
    ({"messages": [ASKED, None]}, r"messages\[1\]: None is not a message"),
    ({"messages": [ASKED, {**ANSWER, "content": None}]}, r"messages\[1\]: 'content' is missing"),
    ({"messages": [ASKED, {**ANSWER, "content": "\ud800"}]}, "half a character"),
    ({"messages": [{**ASKED, "role": ""}, ANSWER]}, r"messages\[0\]: role: '' is none of system, .*user"),
    ({"conversations": [{"from": "Ann", "value": "x"}, SHARE[1]]}, r"\[0\]: role: 'Ann' is none of"),
    ({"messages": [ASKED, {**ANSWER, "tool_calls": [CALL]}]}, "the answer has 'tool_calls'"),
    ({"messages": [ASKED, {**ANSWER, "thinking": "Hm."}]}, "the answer has 'thinking'"),
    ({"messages": [ASKED, {**ANSWER, "weight": 0.5}]}, "the last message: weight is 0.5"),
    ({"messages": [{**ASKED, "images": ["x.png"]}, ANSWER]}, r"messages\[0\] has 'images', which"),
    ({"messages": [{**ASKED, "content": [*PARTS, {"type": "image_url"}]}, ANSWER]}, "'image_url' is no text"),
    ({"conversations": [{"from": "function_call", "value": "look up"}, *SHARE]}, "'look up' is no tool call"),
    ({**RECORD, "history": [["Hi."]]}, r"history\[0\]"),
    ({**RECORD, "history": -1}, r"history\[0\]"),
    ({**RECORD, "history": [ASKED, ANSWER]}, "--template chat takes it"),
    ({"messages": [*BE_KIND, ASKED, ANSWER]}, "has a system message.*--template chat takes it"),
    ({**RECORD, "system": "Be kind."}, "has a system message.*--template chat takes it"),
    ({**RECORD, "tools": [TOOL]}, "has 'tools'.*--template chat takes it"),
    ({**RECORD, "tools": "look_up"}, "tools: 'look_up' is not a list of schemas"),
    ({"messages": [*BE_KIND, ASKED, ANSWER], "system": "Be rude."}, "has 'system' beside what is asked"),
    ({"messages": [ASKED, ANSWER], "context": "In French."}, "has 'context' beside what is asked"),
    ({**RECORD, "question": "Say bye."}, "has 'question' beside what is asked"),
    ({**RECORD, "choices": ["hello", "bye"]}, "has 'choices' beside what is asked"),
    ({**RECORD, "article": "It is late."}, "has 'article' beside what is asked"),
    ({**RECORD, "text": "Hello."}, "has 'text' beside what is asked"),  # to be repeated
    ({**RECORD, "tools": '[{"most": 1e999}]'}, "a number that JSON cannot write"),
    ({**RECORD, "choices": {"text": ["bye"], "label": [1]}}, "has 'choices' beside what is asked"),
    ({"question": "2 + 2, in 1984?", "choices": ["1", "4", "8"], "answer": "4"}, "has 'choices' beside"),
    ({**RECORD, "Input": "In French."}, "has 'Input' in place of 'input'"),
    ({**RECORD, " Tools": [TOOL]}, "has ' Tools' in place of 'tools'"),
    *(({**RECORD, key: ["x"]}, f"has {key!r}, which would be lost")
      for key in ("image", "images", "videos", "audio", "documents", "suffix", "functions", "thinking")),
    ({"prompt": "x", "chosen": "y", "rejected": "z"}, "a pair of 'chosen' and 'rejected' without an output"),
    ({"prompt": [ASKED], "chosen": [ANSWER], "rejected": [ANSWER]}, "a pair of 'chosen' and 'rejected'"),
    ({**RECORD, "weight": 0.5}, "weight is 0.5"),
    ([], "is not a JSON object"),
]
# fmt: on


@pytest.mark.parametrize("bad, message", BAD_RECORDS)
def test_a_bad_record_is_named_by_its_number_and_its_line(tmp_path, bad, message):
    """A record that cannot be used in full is refused with its number, its line and the fault."""
    lines = f"{json.dumps(RECORD)}\n\n{json.dumps(bad)}"
    for text, where in ((json.dumps([RECORD, bad]), "record 2"), (lines, r"record 2 \(line 3\)")):
        (tmp_path / "bad.jsonl").write_text(text)
        with refused(rf"bad\.jsonl: {where}.*{message}"):
            read_records(tmp_path / "bad.jsonl")


ENCODINGS = "utf-8 utf-8-sig utf-16 utf-16-le utf-16-be utf-32 utf-32-le utf-32-be".split()
TEXT = json.dumps([{**RECORD, "output": "Grüße"}], ensure_ascii=False)
LINE = json.dumps(RECORD)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_file_is_read_in_every_unicode_encoding(tmp_path, encoding):
    """A file in UTF-8, UTF-16 or UTF-32 gives the same records, with byte order marks or without."""
    (tmp_path / "x").write_bytes(TEXT.encode(encoding))
    assert read_records(tmp_path / "x")[0]["output"] == "Grüße"
    joined = f"\ufeff{LINE}\r\n\r\n\ufeff{LINE}\r{LINE}\n"
    (tmp_path / "joined").write_bytes(joined.encode(encoding))
    assert read_records(tmp_path / "joined") == [RECORD] * 3


# fmt: off
NOT_RECORDS = [
    (TEXT.encode("latin-1"), r"line 1 is not UTF-8 \(byte 0xfc\).*iconv"),
    (b"\xef\xbb\xbf\n" + TEXT.encode("latin-1"), r"line 2 is not UTF-8 \(byte 0xfc\)"),
    (gzip.compress(TEXT.encode(), mtime=0), "packed with gzip: unpack it first"),
    (b"PK\x03\x04rest", "packed with zip"),
    (b"PAR1rest", r"is Parquet: write it as JSON lines first: pandas.read_parquet\('x'\)"),
    (b"ARROW1\0\0", "is Arrow"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
    (b"instruction,output\na,b\n", r"is a table: .*pandas.read_csv\('x'\)"),
    (b'"prompt","completion"\r\n"a","b"\r\n', "is a table"),
    (b"<!doctype html>", "not readable as JSON: it begins with '<!doctype html>'"),
    (TEXT.encode("utf-16") + b"x", "not UTF-16.*truncated"),
    (f"{LINE}\n{LINE[:20]}\0{LINE[20:]}".encode(), "line 2 holds a NUL byte"),
    (f"{LINE}\n".encode() + b"\0" * 9, "line 2 holds a NUL byte"),
    (f"{LINE}\n\n{LINE[:-1]}".encode(), r"record 2 \(line 3\): not readable as JSON"),
    (f"{LINE},\n{LINE}".encode(), r"record 2 \(line 1\).*no comma between"),
    (f"[{LINE},\n]".encode(), "not readable as JSON .*line"),
    (b'{"prompt": "a", "prompt": "b"}', r"record 1 \(line 1\): .*JSON \('prompt' is there twice\)"),
    (b'[{"prompt": "a", "prompt": "b"}]', "'prompt' is there twice"),
    (b'{"prompt": "a", "completion": NaN}', "NaN is no number"),
    (b" \n\n", "there are none"), (b"[]", "expected a JSON list of records"), (b"", "there are none"),
    (b'{"chosen": [{"role": "user"}], "rejected": [{"role": "user"}]}', "a pair of 'chosen' and 'rejected'"),
    (f'{{"train": [{LINE}], "test": [{LINE}]}}'.encode(), "more than one list of records .'train', 'test'"),
    (b'{"instruction": ["a", "b"], "output": ["c", "d"]}', "holds columns in place of records"),
    (b'{"instruction": {"0": "a"}, "output": {"0": "c"}}', "holds columns in place of records"),
    (None, "no such file"), (pathlib.Path.mkdir, "a folder: name a file in it"),
]
# fmt: on


@pytest.mark.parametrize("data, message", NOT_RECORDS)
def test_a_file_of_another_format_is_refused_by_its_name(tmp_path, data, message):
    """A file that holds no records is refused by its name, and the line gives the reason."""
    path = tmp_path / "x"
    if data is not None:
        data(path) if callable(data) else path.write_bytes(data)
    with refused(rf"x.*{message}"):
        read_records(path)


tiny_tokenizer = functools.cache(builders.tiny_tokenizer)


def divided(tmp_path, capsys, rows, val=None, tokenizer=None, **more):
    """Return training prompts and answers, validation records, and the lines that were printed."""
    how = dict(task="x", backbone="tiny", seed=0, examples=64, val_examples=16, max_len=64, template="alpaca")
    for name, some in (("data", rows), ("val_data", val)):
        how[name] = some and tmp_path / f"{name}.jsonl"
        if some:
            how[name].write_text("\n".join(json.dumps(row) for row in some))
    tokenizer = tokenizer or tiny_tokenizer()
    capsys.readouterr()
    examples, held = load_data(argparse.Namespace(**how | more), tokenizer)
    text = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    printed = capsys.readouterr().out
    for line in re.findall(r"jsonl: (\d+ read: .*)", printed):
        read, *parts = [int(n) for n in re.findall(r"(?:^|, )(\d+) ", line.replace(" read: ", " read, "))]
        assert read == sum(parts), line
    return [(text(p), text(r)) for p, r in examples], held, printed


def say(n, answer="Hello."):
    return {"instruction": f"Say {n}.", "output": answer}


def test_every_record_read_is_accounted_for(tmp_path, capsys):
    """Each record read is counted once, as used or as left out, and no validation prompt is trained on."""
    rows = [say(i) for i in range(90)] + [say(0), say(1)] + [say(0, " "), say(95, "")]
    rows += [say(i, "word " * 99) for i in range(96, 99)] + [{**say(i), "label": False} for i in range(3)]
    examples, held, line = divided(tmp_path, capsys, rows)
    assert len(examples) == 64 and "100 read: 64 training, " in line and "2 repeats" in line
    assert "3 labelled false" in line and "not needed (--examples 64)" in line and "ignored" not in line
    examples, held, line = divided(tmp_path, capsys, rows, examples=999)
    assert "2 empty" in line and "3 over 64 tokens" in line and "needed" not in line
    val = rows[:20] * 2 + [say(99)]
    examples, held, line = divided(tmp_path, capsys, rows, val, examples=999, val_examples=5)
    assert "21 asked in" in line
    assert "41 read: 5 validation, 20 repeats, 16 not needed (--val-examples 5)" in line
    assert {prompt for prompt, _ in examples}.isdisjoint(f"### Instruction:\nSay {i}." for i in range(20))
    rows = [say(i, "word " * 99) for i in range(12)] + [say(20), say(21)]
    for seed in range(4):  # validation goes on until a record is usable
        examples, held, line = divided(tmp_path, capsys, rows, seed=seed)
        assert len(examples) == len(held) == 1 and "12 over 64 tokens" in line


def test_all_answers_to_a_prompt_are_kept_on_one_side(tmp_path, capsys):
    """Distinct answers are all used, on one side, and every prompt has its turn before a second answer."""
    rows = [say(i, f"Hello {j}.") for i in range(10) for j in range(6)]
    examples, held, line = divided(tmp_path, capsys, rows)
    assert "60 read: 54 training, 6 validation\n" in line
    assert {r["instruction"] for r in held}.isdisjoint(re.findall(r"Say \d", p)[0] + "." for p, _ in examples)
    assert len({*examples}) == 54 and len({r["output"] for r in held}) == 6
    assert len({prompt for prompt, _ in examples[:9]}) == 9
    joke = [say(0, f"Joke {i}.") for i in range(24)]
    with refused("no usable records for training: .*all ask the same.*--val-data"):
        divided(tmp_path, capsys, joke)
    examples, held, line = divided(tmp_path, capsys, joke, [say(1)])
    assert len(examples) == 24 and "24 read: 24 training\n" in line


def test_a_prompt_is_all_that_is_asked(tmp_path):
    """System, tools, input and history tell prompts apart; the answer and other keys do not."""
    rows = [{**say(0), **more} for more in ({}, {"system": "Be kind."}, {"tools": [TOOL]}, {"input": "x"})]
    rows += [{**say(0), "history": [["Hi.", "Yes?"]]}, {**say(0), "id": 3}]
    (tmp_path / "x").write_text(json.dumps(rows))
    assert len({prompt_key(r) for r in read_records(tmp_path / "x", "chat")}) == 5


def test_the_embedded_records_keep_their_order(tmp_path, capsys):
    """Prompts in alphabetical order are shuffled with the seed; validation records keep the file's order."""
    data = HERE / "assets" / "data"
    records = json.loads((data / "code.train.json").read_text())
    records.sort(key=lambda r: (r["instruction"], r["input"]))
    random.Random(3).shuffle(records)
    examples, held, line = divided(tmp_path, capsys, None, task="code", seed=3)
    assert [answer for _, answer in examples] == [r["output"] for r in records[:64]]
    assert held == json.loads((data / "code.val.json").read_text())[:16]
    assert "4000 read: 64 training, 3936 not needed (--examples 64)" in line


def test_labels_leave_out_what_must_not_be_learned(tmp_path, capsys):
    """A file whose labels all say yes or no is KTO's; labels of classes are ignored by name."""
    for good, bad in ((True, False), (1, 0), ("true", "False"), (1, -1)):
        two = {"completion": "No.", "label": bad}, {"completion": "Yes.", "label": good}
        rows = [{"prompt": f"Say {i}.", **two[i % 2]} for i in range(40)]
        examples, held, line = divided(tmp_path, capsys, rows)
        assert "40 read: 18 training, 2 validation, 20 labelled false\n" in line
        assert {answer for _, answer in examples} | {r["output"] for r in held} == {"Yes."}
    rows = [{**say(i), "label": i % 3, "id": i, "source": "x", "\n": 1} for i in range(40)]
    examples, held, line = divided(tmp_path, capsys, rows)
    assert "36 training" in line and "          ignored: '\\n', id, label, source\n" in line
    chats = [{"messages": [*messages(f"Say {i}."), {**ANSWER, "weight": i % 2}]} for i in range(40)]
    assert "20 with weight 0" in divided(tmp_path, capsys, chats)[2]


def test_chats_reach_the_template_whole(tmp_path, capsys):
    """System messages, calls and results of tools are written; that the last answer is learned is said."""
    calls = "{{ m.tool_calls | tojson if m.tool_calls }}" + END
    tokenizer = chat_tokenizer("{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT.replace(END, calls))
    rows = [{"messages": [*BE_KIND, *CALLED, *messages(f"Say {i}.", "Hello.")]} for i in range(30)]
    how = dict(template="chat", max_len=256)
    examples, held, line = divided(tmp_path, capsys, rows, tokenizer=tokenizer, **how)
    for text in ("Be kind.", "look_up", "A word."):
        assert all(text in prompt for prompt, _ in examples)
    assert "          30 chats hold several answers: the last of each is learned\n" in line
    for more in ({"tools": [TOOL]}, {"messages": [*CALLED, *messages("Say it.", "Hello.")]}):
        rows = [{"messages": messages(f"Say {i}.", "Hello."), **more} for i in range(30)]
        with refused(r"has 'tool(s|_calls)', which the tokenizer's chat template does not"):
            divided(tmp_path, capsys, rows, tokenizer=chat_tokenizer(), **how)


def test_own_data_is_held_out_by_prompt(micro, tmp_path, capsys):
    """The command line keeps a tenth of the prompts for validation, as plain records."""
    rows = [{**RECORD, "instruction": f"Say {i}.", "id": i} for i in range(40)] * 2
    (tmp_path / "mine.json").write_text(json.dumps(rows), encoding="utf-16")
    out = tmp_path / "run"
    train.main(micro("mine", out, "--data", tmp_path / "mine.json"))
    held_out = json.loads((out / "data" / "mine.val.json").read_text())
    assert len({r["instruction"] for r in held_out}) == 4 and all({*r} == {*RECORD} for r in held_out)
    printed = capsys.readouterr().out
    assert "mine.json: 80 read: 36 training, 4 validation, 40 repeats\n          ignored: id\n" in printed
    assert "hardly finds" not in printed


def test_few_prompts_are_said_to_make_no_region(tmp_path, capsys):
    """Ten answers to nine prompts: a region fitted to nine is not trusted, and that is said."""
    rows = [{**RECORD, "instruction": f"Say {max(i, 1)}.", "output": f"{i}"} for i in range(10)]
    line = divided(tmp_path, capsys, rows, val=[{**RECORD, "instruction": "Say what."}])[2]
    assert "          a region fitted to 9 prompts hardly finds new ones: give 10 or more\n" in line


def test_the_validation_of_a_run_folder_is_read_strictly(tmp_path):
    """What we wrote ourselves is a list of plain records; anything else there is damage."""
    lies = [({"prompt": "x", "completion": "y"}, "no text under 'instruction'")]
    lies += [
        (RECORD | {"tools": 3}, "list of schemas"),
        (RECORD | {"history": [["a", "b"]]}, r"history\[0\]"),
    ]
    for row, message in lies:
        (tmp_path / "x.json").write_text(json.dumps([row]))
        with refused(message):
            read_records(tmp_path / "x.json", "chat", own=True)
    (tmp_path / "x.json").write_text(json.dumps([{**RECORD, "history": []}]))  # as earlier versions wrote it
    assert read_records(tmp_path / "x.json", own=True) == [RECORD]
