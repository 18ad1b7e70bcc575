"""Read records: a JSON list, or a record a line, in one of several forms."""

import json
import re

from plumbing import Refused
from plumbing.files import parse_json, read_text, validate

MESSAGES = [{"role": re.compile(r"\w+"), "content": str}]


def read_records(path, template="alpaca", own=False):
    """The records of a JSON list or, where the text does not begin as one, of JSON lines; see `plain_record`.
    own: the file is ours, a list. Refused with the file, the number of the record and that of its line."""
    text = read_text(path, own)
    if own or text.lstrip().startswith("["):
        found = parse_json(text, path)
        if not isinstance(found, list):
            raise Refused(f"{path}: expected a JSON list of records")
        rows = [(f"{path}: record {i}", record) for i, record in enumerate(found, 1)]
    else:  # not splitlines: a JSON text may hold other line breaks
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        lines = [(f"{path}: record {i} (line {n})", line) for i, (n, line) in enumerate(lines, 1)]
        rows = [(where, parse_json(line, where)) for where, line in lines]
    if not rows:
        raise Refused(f"{path}: expected a JSON list of records, or JSON lines, and there are none")
    return [plain_record(record, where, template) for where, record in rows]


def plain_record(record, where, template):
    """A record as the rest of the program has it: {"instruction": the last prompt, "output": the response,
    and perhaps "input", "kind", "history": messages before}. It comes so (Alpaca); or with prompt and
    completion, texts or lists of messages (TRL); or with messages, of which the last is the response.
    Refused: it has none of these whole, or a history, which the template alpaca has no place for."""
    if not isinstance(record, dict):
        raise Refused(f"{where} is not a JSON object")
    trl, messages = "prompt" in record and "instruction" not in record, record.get("messages")
    asked, said = ("prompt", "completion") if trl else ("instruction", "output")
    if messages is None and all(isinstance(record.get(key), list) for key in (asked, said)):
        messages = record[asked] + record[said]
    if messages is not None:
        validate(messages, MESSAGES, f"{where}: messages")
        if [m["role"] for m in messages[-2:]] != ["user", "assistant"]:
            raise Refused(f"{where}: the last two messages are not of user and assistant")
        *history, prompt, response = messages
        plain = {"instruction": prompt["content"], "output": response["content"], "history": history}
    else:
        for key in (asked, said):
            if not isinstance(record.get(key), str):
                raise Refused(f"{where} has no text under {key!r}")
        plain = {"instruction": record[asked], "output": record[said]} if trl else record
    plain |= {"kind": record["kind"]} if "kind" in record else {}
    for key in ("input", "kind"):
        if not isinstance(plain.get(key, ""), str):
            raise Refused(f"{where} has something other than text under {key!r}")
    validate(plain.get("history", []), MESSAGES, f"{where}: history")
    try:
        json.dumps(plain, ensure_ascii=False).encode()
    except ValueError:
        raise Refused(f"{where} holds half a character (a lone surrogate)") from None
    if plain.get("history") and template == "alpaca":
        raise Refused(f"{where} is a chat of more than a prompt and its answer: --template chat takes it")
    return plain
