"""From a record to the tokens of a prompt and of its response, and back to text."""

from plumbing import Refused


def messages_of(record):
    """A record's prompt as a chat. An input follows its instruction, after an empty line."""
    given = f"\n\n{record['input']}" if record.get("input") else ""
    return [*record.get("history", ()), {"role": "user", "content": record["instruction"] + given}]


def render_chat(messages, tokenizer, **how):
    """The text that the tokenizer's chat template makes of messages. Refused: it has none, or that fails."""
    if not tokenizer.chat_template:
        raise Refused("--template chat: the backbone's tokenizer has no chat template; alpaca needs none")
    try:  # in a sandbox: a template is no code that could do more than write
        return tokenizer.apply_chat_template(messages, tokenize=False, **how)
    except Exception as e:  # a template raises what it likes
        which = f"the chat that ends with {messages[-1]['content'][:40]!r}"
        raise Refused(f"--template chat: the tokenizer's template cannot write {which} ({e})") from e


def render_answer(messages, answer, tokenizer):
    """The text that continues a chat's prompt: the answer, and what ends it. Refused: see `render_chat`; with
    the answer the template writes the prompt differently, so that what is trained is not what is asked."""
    prompt = render_chat(messages, tokenizer, add_generation_prompt=True)
    whole = render_chat([*messages, {"role": "assistant", "content": answer}], tokenizer)
    if not whole.startswith(prompt):
        asked = messages[-1]["content"][:40]
        raise Refused(f"--template chat: the template writes {asked!r} otherwise once it is answered")
    return whole[len(prompt) :]


def end_token(tokenizer, template):
    """The id that ends a response: EOS, or what a chat template ends an assistant's turn with. Refused: that
    is no token of its own, so that generation could not stop at it."""
    if template == "alpaca":
        return tokenizer.eos_token_id
    said = "Hello."
    ending = render_answer([{"role": "user", "content": said}], said, tokenizer).rpartition(said)[2]
    for token in tokenizer(ending, add_special_tokens=False).input_ids:
        if token in tokenizer.added_tokens_decoder:
            return token
    raise Refused(f"--template chat: the template ends an answer with {ending!r}: no special token")


def prompt_of(record, tokenizer, template):
    """The text of the prompt of a record, or of an instruction alone. template "alpaca": Alpaca's without its
    preamble, which says the same before every instruction. "chat": the tokenizer's chat template, up to where
    the answer begins."""
    record = {"instruction": record} if isinstance(record, str) else record
    if template == "chat":
        return render_chat(messages_of(record), tokenizer, add_generation_prompt=True)
    given = f"\n\n### Input:\n{record['input']}" if record.get("input") else ""
    return f"### Instruction:\n{record['instruction']}{given}\n\n### Response:\n"


def prompt_ids(record, tokenizer, template):
    """Its tokens. A chat template writes the token that begins a sequence itself."""
    text = prompt_of(record, tokenizer, template)
    return tokenizer(text, add_special_tokens=template == "alpaca").input_ids


def encode(record, tokenizer, template="alpaca"):
    """A record as `read_records` gives it -> (prompt ids, response ids that end with `end_token`). Refused:
    the chat template has no such token, or fails; see `render_answer`."""
    prompt, end = prompt_ids(record, tokenizer, template), end_token(tokenizer, template)
    if template == "alpaca":
        return prompt, tokenizer(record["output"], add_special_tokens=False).input_ids + [end]
    response = render_answer(messages_of(record), record["output"], tokenizer)
    response = tokenizer(response, add_special_tokens=False).input_ids
    if end not in response:
        raise Refused(f"--template chat: {tokenizer.decode(end)!r} does not end every answer")
    return prompt, response[: len(response) - response[::-1].index(end)]  # often a line break follows it


def pad_of(tokenizer):
    """The id that padding is made of. It is masked, so any will do."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def text_of(tokenizer, ids):
    """The text of a response, to the letter."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
