"""From a record to the tokens of a prompt and of its response, and back to text.

Three rules hold for every template and tokenizer. What is trained is the tokens of the whole text, cut where
the prompt ends. What a user wrote never becomes a control token, whatever it reads like. And a chat template
that asks for the day is always told the run's, so that its text is the same tomorrow.
"""

import contextlib
import datetime
import functools
import hashlib
import json
import types

from transformers.utils import chat_template_utils

from plumbing import Refused
from plumbing.control import control_tokens, ids_of, quoted, unquote


def today():
    """Return the day that a chat template would be told now, in ISO's form."""
    return chat_template_utils.datetime.now().strftime("%Y-%m-%d")


def asks_for_day(tokenizer, template):
    """Return whether prompts depend on the day: only the tokenizer's own template can ask for it."""
    return template == "chat" and "strftime_now" in str(tokenizer.chat_template)


def render_chat(messages, tokenizer, day, **how):
    """Return what a tokenizer's chat template makes of messages on a day, None: today, at midnight. Raises
    Refused if it has none, or fails."""
    if not tokenizer.chat_template:
        raise Refused("--template chat: the backbone's tokenizer has no chat template; alpaca needs none")
    clock = chat_template_utils.datetime  # transformers passes on no function, so its clock is replaced
    try:  # in a sandbox: a template is no code that could do more than write
        midnight = datetime.datetime.fromisoformat(day or today())
        chat_template_utils.datetime = types.SimpleNamespace(now=lambda: midnight)
        return tokenizer.apply_chat_template(messages, tokenize=False, **how)
    except Exception as e:  # a template raises what it likes
        which = f"the chat that ends with {unquote(messages[-1]['content'], tokenizer)[:40]!r}"
        why = f"the tokenizer's template cannot write {which} ({unquote(str(e), tokenizer)})"
        raise Refused(f"--template chat: {why}") from e
    finally:
        chat_template_utils.datetime = clock


def render(record, tokenizer, template, day, answered=False):
    """Return the text of a record's prompt and, if `answered`, what follows it: the answer, and what a chat
    template adds to it. Raises Refused as `render_chat` does; if the template alpaca has no place for all of
    the record; and if with the answer a template writes the prompt differently, so that what is trained would
    not be what is asked."""
    asked, given = unquote(record["instruction"], tokenizer)[:40], record.get("input")
    if template == "alpaca":
        if kept := next((key for key in ("history", "tools") if record.get(key)), None):
            system = [m["role"] for m in record.get("history") or ()] == ["system"]
            kept = "a system message" if system else kept
            raise Refused(f"{asked!r} has {kept}, which alpaca has no place for: --template chat takes it")
        given = f"\n\n### Input:\n{given}" if given else ""
        prompt = f"### Instruction:\n{record['instruction']}{given}\n\n### Response:\n"
        return prompt, record["output"] if answered else ""
    messages, tools = [*(record.get("history") or ())], record.get("tools") or None
    messages.append({"role": "user", "content": record["instruction"] + (f"\n\n{given}" if given else "")})
    prompt = render_chat(messages, tokenizer, day, tools=tools, add_generation_prompt=True)
    if not answered:
        return prompt, ""
    messages.append({"role": "assistant", "content": record["output"]})
    whole = render_chat(messages, tokenizer, day, tools=tools)
    if not whole.startswith(prompt):
        raise Refused(f"--template chat: the template writes {asked!r} otherwise once it is answered")
    return prompt, whole[len(prompt) :]


def end_token(tokenizer, template):
    """Return the id that ends a response: EOS, or what a chat template ends an assistant's turn with. Raises
    Refused if that is no token of its own, so that generation could not stop at it."""
    if template == "alpaca":
        return tokenizer.eos_token_id
    chat = [{"role": role, "content": "Hello."} for role in ("system", "user", "assistant")]
    for messages in (chat[1:], chat):  # some templates cannot do without a system message
        with contextlib.suppress(Refused):
            ending = render_chat(messages, tokenizer, None).rpartition("Hello.")[2]
            break
    else:
        raise Refused("--template chat: the tokenizer's template cannot write a prompt and its answer")
    found, control = ids_of(ending, tokenizer), control_tokens(tokenizer).values()
    added = [t for t in found if t in control] or [t for t in found if t in tokenizer.added_tokens_decoder]
    if not added:
        raise Refused(f"--template chat: the template ends an answer with {ending!r}: no special token")
    return added[0]


def stop_ids(backbone, tokenizer, template):
    """The ids at which an answer ends: the token that ends a trained one, and those that the backbone's
    generation_config names, since transformers' `generate` stops there, too."""
    named = backbone.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({end_token(tokenizer, template), *named} - {None})


def system_message(text, tokenizer, template, day):
    """Return a prompt's history with this system message, if any. Raises Refused if a template takes none."""
    if not text:
        return []
    if template == "alpaca":
        raise Refused("the template alpaca has no place for a system message: --template chat takes it")
    record = {"instruction": text, "history": [{"role": "system", "content": text}]}
    refuse_left_out([record], tokenizer, template, day)
    return record["history"]


def refuse_left_out(records, tokenizer, template, day, where="--template chat"):
    """Raise Refused if a chat template leaves out a system message, or what a tool said, of these records. Of
    each role it tries one message that opens a chat, and one further on."""
    if template == "alpaca" or not tokenizer.chat_template:
        return  # `render` refuses such records
    places, mark = {}, "5309182764"
    for record in records:
        for i, message in enumerate(record.get("history") or ()):
            if message["role"] in ("system", "tool"):
                places.setdefault((message["role"], i > 0), (record, i))
    for (role, later), (record, i) in places.items():
        history = [{**m, "content": mark} if j == i else m for j, m in enumerate(record["history"])]
        if mark not in prompt_of({**record, "history": history}, tokenizer, template, day):
            what = f"leaves out a message of the role {role!r}{' after the first' * later}"
            raise Refused(f"{where}: the tokenizer's template {what}")


def prompt_of(record, tokenizer, template, day=None):
    """The text of the prompt of a record, or of an instruction alone. template "alpaca": Alpaca's without its
    preamble, which says the same before every instruction. "chat": the tokenizer's chat template, up to where
    the answer begins. day: what a chat template is told that asks for it (ISO); None is today."""
    return unquote(render(quoted(record, tokenizer), tokenizer, template, day)[0], tokenizer)


def hello(tokenizer, template, day=None):
    """Return a record that a template can write: some insist on a system message."""
    record = {"instruction": "Say hello."}
    try:
        prompt_of(record, tokenizer, template, day)
    except Refused:
        record["history"] = [{"role": "system", "content": "Be brief."}]
    return record


@functools.lru_cache(maxsize=4)
def first_ids(tokenizer, template):
    """Return what begins every prompt, mostly BOS; a chat template writes that itself. What a tokenizer puts
    after a text, EOS say, has no place in a prompt: nothing would be left to say."""
    if template == "chat":
        return []
    alone, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return whole[: next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)]


def prompt_ids(record, tokenizer, template, day=None):
    """Return the tokens of `prompt_of`."""
    text, _ = render(quoted(record, tokenizer), tokenizer, template, day)
    return first_ids(tokenizer, template) + ids_of(text, tokenizer)


def following_ids(prompt, first, answer, tokenizer):
    """The tokens of a text after a prompt, whose tokens are `first`: those of both together, without these.
    Where one token would cover the end of the prompt and the beginning of the answer, they are those of the
    answer alone; or, as SentencePiece begins every text with a space, of the answer after another text."""
    both = ids_of(prompt + answer, tokenizer)
    if both[: len(first)] == first:
        return both[len(first) :]
    text = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    for before in ("", "\n", "a", "."):
        start, whole = ids_of(before, tokenizer), ids_of(before + answer, tokenizer)
        rest = whole[len(start) :]
        if start + rest == whole and text(first + rest) == text(both):
            return rest
    return ids_of(answer, tokenizer)


def encode(record, tokenizer, template="alpaca", day=None):
    """A record as `read_records` gives it -> (prompt ids, response ids that end with `end_token`). All that a
    chat template writes into an answer, the tags of an empty thought say, belongs to the response. Raises
    Refused as `render` and `end_token` do, and if the answer does not end with that token."""
    prompt, answer = render(quoted(record, tokenizer), tokenizer, template, day, answered=True)
    first = ids_of(prompt, tokenizer)
    response, end = following_ids(prompt, first, answer, tokenizer), end_token(tokenizer, template)
    prompt = first_ids(tokenizer, template) + first
    if template == "alpaca":
        return prompt, response + [end]
    if end not in response:
        raise Refused(f"--template chat: {tokenizer.decode(end)!r} does not end every answer")
    return prompt, response[: len(response) - response[::-1].index(end)]  # often a line break follows it


def digest_of_prompts(tokenizer, template, day):
    """Return a digest of the tokens of a prompt and its answer: another template writes other ones."""
    example = encode({**hello(tokenizer, template, day), "output": "Hello."}, tokenizer, template, day)
    return hashlib.sha256(json.dumps(example).encode()).hexdigest()[:16]


def pad_of(tokenizer):
    """Return the id that padding is made of. It is masked, so any will do."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def text_of(tokenizer, ids):
    """Return the text of a response, to the letter."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
