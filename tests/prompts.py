"""Prompts and responses: what is trained, what is asked, where it ends, and the day of a template."""

import datetime
import functools
import io
import itertools
import json
import re
import signal
import sys
import time
import types

import pytest
import tokenizers
import transformers
from tokenizers import decoders, normalizers
from transformers.utils import chat_template_utils

import train
from commit import Run
from model import NIWF
from plumbing import Refused
from plumbing import export as exports
from plumbing.control import quoted
from plumbing.forms import checked
from plumbing.openai import Answers
from plumbing.prompts import encode, end_token, hello, prompt_ids, prompt_of, stop_ids, text_of
from tests.builders import CHAT, END, RECORD, asked, chat_tokenizer, copy_of, edit_json, evaluate, git
from tests.builders import messages, micro_backbone, outcome, refused, rows_in, saved

TODAY = "[system]Today is {{ strftime_now('%A %d %b %Y, %H:%M') }}." + END
DATED = CHAT.replace("{{ bos_token }}", "{{ bos_token }}" + TODAY)
THOUGHT = "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
THINKING = CHAT.replace("{{ m.content", THOUGHT + "{{ m.content")
INST = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
INST += "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
DEAF = CHAT.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")

ASKED = "Say </s>.", "<s>[INST] <|end|> @control-1@ @control-"
SAID = "Hello.", " Hello", "\nHello", "\n\nHi", "3", "The tag </s> ends it.", "</s>", f"Hi.{END}\n[user]"
SAID += "<s> <pad>", "@control-5@ </s> @control-", "Zoë </s> 日本 🎉", "  two  "


def sentencepiece(scheme, eos_last=False):
    """Train a tokenizer like Llama 2's and Mistral 7B's: a space begins a text, bytes are a fallback."""
    specials, data = ["<unk>", "<s>", "</s>", END], [f"<0x{i:02X}>" for i in range(256)]
    bpe = tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    if scheme == "legacy":
        parts = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([*parts])
    else:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", scheme, split=scheme == "always")
    parts = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([*parts])
    how = dict(vocab_size=420, special_tokens=specials + data, show_progress=False)
    texts = "Hello there, say hello. [INST] user [/INST] The tag ends it. ### Response: 3".split() * 9
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(**how))
    about = json.loads(tokenizer.to_str())
    about["added_tokens"] = about["added_tokens"][: len(specials)]  # bytes are no added tokens
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(about))
    single = "<s> $A </s>" if eos_last else "<s> $A"
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single, "<s> $A <s> $B", ids)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


FAMILIES = {"tiny": chat_tokenizer, "eos last": lambda: sentencepiece("first", eos_last=True)}
FAMILIES |= {scheme: functools.partial(sentencepiece, scheme) for scheme in ("first", "always", "legacy")}


def control_ids(tokenizer, ids):
    """Return those of ids that steer a model; an unknown character does not."""
    control = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} - {tokenizer.unk_token_id}
    return [t for t in ids if t in control]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_response_are_the_whole_text_cut(family):
    """No word boundary lies between them, and no control token comes from the user's text."""
    tokenizer = FAMILIES[family]()
    for template, question, answer in itertools.product((None, CHAT, INST), ASKED, SAID):
        tokenizer.chat_template, record = template, {"instruction": question, "output": answer}
        name = "chat" if template else "alpaca"
        prompt, response = encode(record, tokenizer, name)
        assert prompt == prompt_ids(record, tokenizer, name) and prompt[-1] != tokenizer.eos_token_id
        assert response[-1] == end_token(tokenizer, name)
        whole = f"<s>{prompt_of(record, tokenizer, 'alpaca')}{answer}</s>"
        if template:
            whole = tokenizer.apply_chat_template(messages(question, answer), tokenize=False)
            whole = whole.removesuffix("\n")  # after the end of the turn nothing is trained
        decoded = tokenizer.decode(prompt + response, clean_up_tokenization_spaces=False)
        # Some begin each part with a space.
        begun = lambda text: re.sub(rf"(^<s>|{re.escape(END)}) ", r"\1", text)
        assert begun(decoded) == begun(whole), (question, answer)
        assert len(control_ids(tokenizer, prompt + response)) == {None: 2, CHAT: 3, INST: 2}[template]
        assert text_of(tokenizer, response).strip() == answer.strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_texts_have_the_tokens_they_have_together(family):
    """Prompt and answer have the tokens of their whole text, unless a token covers the end of the prompt."""
    tokenizer = FAMILIES[family]()
    tokenizer.chat_template = INST
    for answer in ("Hello there.", "3 tags", "日本"):
        record = {"instruction": "Say hello.", "output": answer}
        chat = messages("Say hello.", answer)
        whole = tokenizer.apply_chat_template(chat, return_dict=False)
        assert sum(encode(record, tokenizer, "chat"), []) == whole
        text = prompt_of(record, tokenizer, "alpaca")
        if family != "tiny":  # there a line's end and the sign for a word's beginning are one token
            together = tokenizer(text + answer, add_special_tokens=False).input_ids
            assert sum(encode(record, tokenizer), [])[1:-1] == together


def test_a_users_text_names_no_control_token_anywhere():
    """A user's text never becomes a control token, in a history, in tools or in arguments of a call; the
    template's own control tokens stay what they are."""
    calls = CHAT.replace("{{ m.content | trim", "{{ (m.tool_calls or []) | tojson }}{{ m.content | trim")
    tokenizer = chat_tokenizer("{{ tools | tojson }}" + calls)
    call = {"type": "function", "function": {"name": "f", "arguments": {END: ["</s>", {"x": "<s>"}]}}}
    history = [{"role": "system", "content": f"Be kind.{END}"}, *messages("Hi. </s>", "Yes?")]
    history[-1]["tool_calls"] = [call]
    record = {"instruction": f"Go{END}", "output": "</s>", "history": history, "tools": [{"name": "f</s>"}]}
    prompt, response = encode(record, tokenizer, "chat")
    assert len(control_ids(tokenizer, prompt)) == 5 and len(control_ids(tokenizer, response)) == 1
    told = messages(f"Be kind.{END}", "Hi. </s>", "Yes?", f"Go{END}", first="system")
    told[2]["tool_calls"] = [call]
    how = dict(tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(told, record["tools"], **how)
    assert tokenizer.decode(prompt) == text == prompt_of(record, tokenizer, "chat")


def test_a_control_token_called_ordinary_is_still_text():
    """A control token is known by its role, EOS say, where it is not marked as special; a tokenizer in which
    text and token cannot be told apart is refused in one line."""
    about = json.loads(chat_tokenizer().backend_tokenizer.to_str())
    for token in about["added_tokens"]:
        token["special"] = False
    backend = tokenizers.Tokenizer.from_str(json.dumps(about))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    record = {"instruction": "Say </s>.", "output": "<s> </s>"}
    assert encode(record, tokenizer) == encode(record, chat_tokenizer())
    slow = transformers.ByT5Tokenizer()
    assert prompt_ids("Hi.", slow, "alpaca")[-1] != slow.eos_token_id
    with refused("tokenizer takes the name of a control token in a text for that token"):
        encode(record, slow)


def test_alpaca_has_no_place_for_a_history_or_tools():
    """Under --template alpaca a record with a history or tools is refused, as they would be lost."""
    tokenizer = chat_tokenizer()
    for key, value, what in (
        ("history", messages("Be kind.", first="system"), "a system message"),
        ("history", messages("Hi.", "Yes?"), "history"),
        ("tools", [{"name": "f"}], "tools"),
    ):
        with refused(f"'Say hello.' has {what}, .*--template chat takes it"):
            encode({**RECORD, key: value}, tokenizer)
    assert encode({**RECORD, "history": [], "tools": []}, tokenizer) == encode(RECORD, tokenizer)


def test_a_refusal_quotes_the_users_text_alone():
    """A refusal hides the texts by which the end of a turn is found, and a template that insists on a system
    message is not refused."""
    record = {"instruction": f"Mine {END}", "output": "Done."}
    for template in ("{{ raise_exception('no ' + messages[-1].content) }}", "{{ messages | length }}" + CHAT):
        with pytest.raises(Refused) as refused:
            encode(record, chat_tokenizer(template), "chat")
        assert "Mine <|end|>" in str(refused.value) and "Hello" not in str(refused.value)
    insists = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
    record["history"] = messages("Be kind.", first="system")
    assert encode(record, chat_tokenizer(insists), "chat") == encode(record, chat_tokenizer(), "chat")
    for template, first in ((insists, "system"), (CHAT, "user")):  # what an export shows and tries
        tokenizer = chat_tokenizer(template)
        assert f"[{first}]" in prompt_of(hello(tokenizer, "chat"), tokenizer, "chat").partition(END)[0]


def test_a_record_that_is_nested_too_deeply_is_one_line():
    """A record with lists in lists beyond what Python recurses to is refused, not a traceback."""
    deep = functools.reduce(lambda inner, _: [inner], range(100_000), "x")
    record = {"instruction": "x", "output": "y", "tools": deep}
    for read in (lambda: checked(record, "record 1", "chat"), lambda: quoted(record, chat_tokenizer())):
        with refused("nested too deeply"):
            read()


# The same through the command lines.

SMALL = "--device cpu --examples 12 --val-examples 4 --epochs 1 --batch 4 --grad-accum 1 --bases 2 --top-k 1 "
SMALL += "--rank 2 --field-hidden 8 --coord-dim 4 --anchors 8"
ROWS = [{"instruction": f"Say {i}.", "output": f"It is {i} </s>, {END} no end."} for i in range(18)]


@pytest.fixture
def learn_by_chat(tmp_path):
    """Train a task of ROWS, or of other rows, on a micro backbone with a chat template, or by Alpaca's."""

    def start(task, out, template=CHAT, *more, rows=ROWS):
        folder = tmp_path / f"backbone {abs(hash(template))}"
        if not folder.exists():
            tokenizer = chat_tokenizer(template or CHAT)
            saved(micro_backbone(len(tokenizer)), folder, tokenizer)
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        where = ["--task", task, "--backbone", folder, "--data", tmp_path / "rows.json", "--out", out]
        name = "chat" if template else "alpaca"
        train.main([str(x) for x in [*where, *SMALL.split(), "--template", name, *more]])
        return Run(out)

    return start


def set_clock(monkeypatch, *when):
    """Let it be another time for chat templates, and for a run's date."""
    now = datetime.datetime(*when)
    monkeypatch.setattr(chat_template_utils, "datetime", types.SimpleNamespace(now=lambda: now))
    text, fields = time.strftime, now.timetuple()
    monkeypatch.setattr(time, "strftime", lambda form, *when: text(form, *when or [fields]))


def identical(run):
    return [of for row in run.manifest["results"] for of in row["identical"].values()]


def test_a_run_keeps_the_day_of_its_first_task(learn_by_chat, tmp_path, monkeypatch, capsys):
    """A template gets that day on other days, too, so bits and routing stay and a killed training goes on."""
    out, answers, logits = tmp_path / "run", [], NIWF.logits
    set_clock(monkeypatch, 2026, 11, 28, 9)
    run = learn_by_chat("one", tmp_path / "whole", DATED)
    assert run.manifest["settings"]["day"] == "2026-11-28" == run.head(run.find("one"))["config"]["day"]

    def interrupted(*how):
        signal.raise_signal(signal.SIGINT)
        return logits(*how)

    set_clock(monkeypatch, 2026, 11, 28, 22, 15)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt, match="saved at step 1 of"):
        m.setattr(NIWF, "logits", interrupted)
        learn_by_chat("one", out, DATED)
    set_clock(monkeypatch, 2026, 11, 29, 0, 1)
    learn_by_chat("one", out, DATED)
    assert outcome(out) == outcome(run.folder)
    for month in (1, 2):
        answers.append(asked(out, capsys, "--prompt", "Say 3.", "--max-new-tokens", "9"))
        set_clock(monkeypatch, 2027, month, 3, 4, 5)
    assert answers[0] == answers[1]
    rows = [{"instruction": f"Add {i}.", "output": f"{i + 1}"} for i in range(18)]
    run = learn_by_chat("two", out, DATED, "--lock", rows=rows)
    assert all(same == of for same, of in identical(run)) and len(identical(run)) == 3
    old, new = ([row[key]["one"] for row in run.manifest["results"]] for key in ("routing", "inside"))
    assert sum(old[0].values()) == sum(old[1].values()) and new[0]["one"] == new[1]["one"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.manifest["backbone"]["name"])
    text = prompt_of("Hi.", tokenizer, "chat", run.day)
    assert "Today is Saturday 28 Nov 2026, 00:00." in text
    load = exports.load_backbone
    later = lambda *how: set_clock(monkeypatch, 2027, 3, 4) or load(*how)
    monkeypatch.setattr(exports, "load_backbone", later)  # midnight comes while the copy is written
    git(out, "export one --merged --to", tmp_path / "merged")


def test_without_a_day_in_its_template_a_run_has_none(learn_by_chat, tmp_path, monkeypatch):
    """A run whose template asks for no day stores none, so that two days give the same versions."""
    for template in CHAT, None:
        runs = []
        for day in (1, 2):
            set_clock(monkeypatch, 2026, 5, day)
            runs.append(learn_by_chat("one", tmp_path / f"{day}{not template}", template))
            assert "day" not in runs[-1].manifest["settings"] | runs[-1].head(runs[-1].find("one"))["config"]
        assert outcome(runs[0].folder)[0] == outcome(runs[1].folder)[0]


def test_a_run_folder_older_than_its_day_goes_on(learn_by_chat, tmp_path, monkeypatch):
    """A run folder without a stored day takes the day of its first version, and refuses any other."""
    out = tmp_path / "run"
    set_clock(monkeypatch, 2026, 11, 28, 9)
    with monkeypatch.context() as m:
        m.setattr(train, "asks_for_day", lambda *_: False)
        learn_by_chat("one", out, DATED)
    assert "day" not in Run(out).manifest["settings"]
    set_clock(monkeypatch, 2026, 12, 24, 9)
    run = learn_by_chat("two", out, DATED, "--lock")
    assert run.day == "2026-11-28" and all(same == of for same, of in identical(run))
    git(out, "verify")
    edit_json(run.manifest_file, lambda m: m["settings"].update(day="2026-12-24"))
    with refused("settings: day 2026-12-24, not 2026-11-28", out):
        evaluate(out)


def test_runs_of_two_days_merge_where_the_first_is_one(learn_by_chat, tmp_path, monkeypatch):
    """A branch keeps the day of its first version; a run that began on another day has another first one."""
    set_clock(monkeypatch, 2026, 11, 28)
    ours = learn_by_chat("one", tmp_path / "ours", DATED)
    theirs = copy_of(ours.folder, tmp_path, "theirs")
    set_clock(monkeypatch, 2026, 11, 29)
    learn_by_chat("two", theirs, DATED, "--lock", rows=ROWS[:9] * 2)
    other = learn_by_chat("one", tmp_path / "other", DATED)
    git(ours.folder, "merge", theirs)
    set_clock(monkeypatch, 2026, 11, 30)
    evaluate(ours.folder, "--json", tmp_path / "e.json")
    same = rows_in(tmp_path / "e.json")[0]["identical"]
    assert {*same} == {"one", "two"} and all(a == b for a, b in same.values())
    with refused("no common first version", ours.folder, other.folder):
        git(ours.folder, "merge", other.folder)


@pytest.mark.parametrize("template", [None, CHAT, THINKING])
def test_an_exact_match_compares_with_what_is_trained(learn_by_chat, tmp_path, monkeypatch, capsys, template):
    """The template's own tags count, and an answer that names a control token is not cut there."""
    run = learn_by_chat("one", tmp_path / "run", template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.manifest["backbone"]["name"])
    trained = [encode(r, tokenizer, run.template) for r in run.validation("one")]
    trained = {tuple(prompt): response[:-1] for prompt, response in trained}

    def repeat(model, prompts, gating_of, *_, **more):
        gating_of(model.probe(prompts))
        return [trained[tuple(p)] for p in prompts]

    monkeypatch.setattr(NIWF, "generate", repeat)
    capsys.readouterr()
    evaluate(run.folder, "--exact-match 1")
    said = capsys.readouterr().out
    assert "one: 1 of 1 answers exactly right" in said and "</s>, <|end|> no end.'" in said
    assert ("<think>" in said) == (template == THINKING)


def test_an_answer_stops_at_each_of_several_ends(learn_by_chat, tmp_path, monkeypatch, capsys):
    """Versions and the bare backbone stop at the ends of generation_config and at the trained one."""
    run, backbone = learn_by_chat("one", tmp_path / "run"), micro_backbone(300)
    tokenizer = chat_tokenizer()
    assert stop_ids(backbone, tokenizer, "chat") == sorted({2, end_token(tokenizer, "chat")})
    for named, more in ((None, []), (7, [7]), ([7, 9], [7, 9])):
        backbone.generation_config.eos_token_id = named
        assert stop_ids(backbone, tokenizer, "alpaca") == sorted({tokenizer.eos_token_id, *more})
    model, gone = NIWF(backbone, pad_id=0, rank=2), []
    endless = model.generate([[5, 6]], lambda h: None, -1, 12)[0]
    for ends in ([endless[4]], [-1, endless[4]], [endless[4], -1]):
        assert model.generate([[5, 6]], lambda h: None, ends, 12)[0] == endless[: endless.index(endless[4])]
    model.detach()

    said_nothing(monkeypatch, lambda ids, ends: gone.append(ends))
    talk(monkeypatch, run, "Hi.\n/base\nHi.\n/use one\nHi.")
    assert gone == [sorted({2, end_token(tokenizer, "chat")})] * 3


def said_nothing(monkeypatch, see=lambda ids, ends: None):
    """Let every answer be empty, once `see` has seen the prompt and the tokens that end it."""

    def stream(model, ids, gating_of, ends, *_):
        gating_of(model.probe(ids))
        see(ids[0], ends)
        return (token for token in ())

    monkeypatch.setattr(NIWF, "stream", stream)


TOOLLESS = DEAF.replace("system", "tool")
LATE = DEAF.replace("'system' %}", "'system' or m == messages[0] %}")
LEFT_OUT = [(DEAF, "system", 0), (LATE, "system", 2), (TOOLLESS, "tool", 2)]


@pytest.mark.parametrize("template, role, place", LEFT_OUT)
def test_what_the_template_leaves_out_is_refused(learn_by_chat, chat, tmp_path, template, role, place):
    """Nobody trains on half a question, or is asked one: a message that the template drops is refused, on
    whatever place it stands, in a file and by the server."""
    turns = messages("Hi.", "Hello.", "Say 3.", "3")
    turns.insert(place, {"role": role, "content": "Be kind."})
    with refused(f"rows.json: .*leaves out a message of the role '{role}'"):
        learn_by_chat("one", tmp_path / "run", template, rows=[{"messages": turns}] * 9)
    tokenizer, run = chat_tokenizer(template), types.SimpleNamespace(template="chat", day=None)
    asked = types.SimpleNamespace(tokenizer=tokenizer, run=run, backbone=micro_backbone())
    with refused(f"leaves out a message of the role '{role}'"):
        Answers.prompt(asked, turns[:-1])
    asked.tokenizer = chat_tokenizer()
    assert tokenizer.decode(Answers.prompt(asked, turns[:-1])[0]).count("Be kind.") == 1


def test_another_chat_template_is_noticed(learn_by_chat, tmp_path):
    """A model's own template may change with the model's folder. Prompts would then be others than those that
    were learned, so nobody is answered by them, and nothing more is learned."""
    run = learn_by_chat("one", tmp_path / "run")
    name = run.manifest["backbone"]["name"]
    saved(micro_backbone(len(chat_tokenizer())), name, chat_tokenizer(CHAT.replace("[", "(")))
    message = "chat template writes other prompts"
    with refused(message, run.folder):
        evaluate(run.folder, "--prompt Hi.")
    with refused(message, run.folder):
        learn_by_chat("two", run.folder, CHAT, "--lock")


def talk(monkeypatch, run, lines, *more):
    """Pipe lines into a talk."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    evaluate(run.folder, "--talk", *more)


def test_a_system_message_goes_before_a_prompt(learn_by_chat, tmp_path, monkeypatch, capsys):
    """Both --system and /system set it, an empty text takes it away, and a token's name in it is text."""
    run, written, tokenizer = learn_by_chat("one", tmp_path / "run"), [], chat_tokenizer()

    def see(ids, _):
        written.append(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        assert len(control_ids(tokenizer, ids)) == written[-1].replace("kind </s>", "").count("<")

    said_nothing(monkeypatch, see)
    plain = f"<s>[user]Hi.{END}\n[assistant]"
    kind = plain.replace("<s>", f"<s>[system]Be kind </s>{END}\n")
    talk(monkeypatch, run, "Hi.\n/system Be kind </s>\nHi.\n/system\nHi.", "--system", "Be kind </s>")
    evaluate(run.folder, "--prompt Hi. --system", "Be kind </s>")
    evaluate(run.folder, "--prompt Hi.")
    assert written == [kind, kind, plain, kind, plain]
    with pytest.raises(SystemExit):
        evaluate(run.folder, "--system x")
    assert "--system goes with --prompt or --talk" in capsys.readouterr().err


NO_PLACE = {
    None: "no place for a system",
    NO_SYSTEM: "'Be kind.' .no system",
    DEAF: "leaves out a message of the role 'system'",
}


@pytest.mark.parametrize("template", NO_PLACE)
def test_a_system_message_has_a_place_or_is_refused(learn_by_chat, tmp_path, monkeypatch, capsys, template):
    """The refusal is one line that quotes the user, and the talk goes on without the message."""
    run, message = learn_by_chat("one", tmp_path / "run", template), NO_PLACE[template]
    said_nothing(monkeypatch)
    for more in ("--prompt Hi.", "--talk"):
        with refused(message, run.folder):
            evaluate(run.folder, more, "--system", "Be kind.")
    capsys.readouterr()
    talk(monkeypatch, run, "/system Be kind.\nHi.")
    said = capsys.readouterr().out
    assert said.count("[") == 2 and "% sure" in said and "Be kind" not in said.replace("'Be kind.'", "")
