"""What an export answers to some prompts, kept beside it, and asked again of whoever serves the export."""

import contextlib
import http.client
import json
import os
import socket
import threading
import urllib.parse

from plumbing import Refused
from plumbing.files import NAME, SHA, parse_json, read_json, validate
from plumbing.passes import continuations, decode, positions_of
from plumbing.prompts import pad_of, prompt_ids, prompt_of, stop_ids, text_of

PROMPTS, TOKENS = 8, 32  # how many; where an answer is cut off, as rounding can change long ones
WAIT, LARGEST = 300, 2**20  # seconds and bytes that one answer of a server may take
ANSWER = {"prompt": str, "answer": str, "base": str}
EXPECTED = {"format": 1, "model": NAME, "version": SHA, "end_id": range(2**31), "max_tokens": range(1, 4097)}
EXPECTED |= {"answers": [ANSWER]}


# ------------------------------------------------------------------------------------------ what is expected


def questions(run, entry, backbone, tokenizer):
    """Return {text: its tokens} of eight validation prompts of a version, or of those that a composition
    joins. The text is such that a server, which reads it with the tokenizer, reads what was trained: some
    prompts, such as those in which a user wrote the name of a control token, have no such text."""
    tasks = [entry["task"]]
    if entry["lock"] == "composed":
        tasks = [run.find(digest)["task"] for digest in run.head(entry)["reads"]]
    found, bos, room = {}, tokenizer.bos_token or "", positions_of(backbone) or 2**31
    for record in [record for task in tasks for record in run.validation(task)]:
        how = record, tokenizer, run.template, run.day
        text, ids = prompt_of(*how), prompt_ids(*how)
        for asked in (text, text.removeprefix(bos)):  # a chat template may write what the tokenizer adds
            if tokenizer(asked).input_ids == ids and len(ids) + TOKENS <= room:
                found[asked] = ids
    return dict([*found.items()][:: max(1, len(found) // PROMPTS)][:PROMPTS])


def greedy_answers(backbone, tokenizer, template, asked):
    """Return a backbone's greedy answers to `questions`, cut off after TOKENS tokens."""
    if not asked:
        return []
    ends = stop_ids(backbone, tokenizer, template)
    steps = decode(backbone, pad_of(tokenizer), [*asked.values()], ends, TOKENS)
    return [text_of(tokenizer, new) for new in continuations(len(asked), steps)]


def write_expected(path, about, end_id, asked, bare, answers):
    """Write what a server must answer. bare: what the backbone answers without the version, by which one
    sees that a server serves the backbone alone."""
    rows = [dict(zip(ANSWER, row)) for row in zip(asked, answers, bare)]
    head = {"format": 1, "model": about["task"], "version": about["version"]}
    head |= {"end_id": end_id, "max_tokens": TOKENS, "answers": rows}
    path.write_text(json.dumps(head, indent=1), encoding="utf-8")


# ------------------------------------------------------------------------------------------- asking a server


def ask_server(at, path, model=None):
    """Ask a server what an export's expected.json says. Return ([{"prompt", "answer", "found", "wrong": what
    is, or ""}], text). model: under which name the export is served; None is its task.

    Prompts go to /v1/completions, which takes a text as it is: they are in the run's template already, and
    /v1/chat/completions would put them into the server's a second time. Raises Refused if the file is not
    such a file, or the server gives no answer that can be read, see `text_from`."""
    expected = validate(read_json(path, own=False), EXPECTED, path)
    if not expected["answers"]:
        raise Refused(f"{path}: answers: there is none")
    how = {"model": model or expected["model"], "max_tokens": expected["max_tokens"], "temperature": 0}
    # OpenAI's protocol has no names for these two, but vLLM and SGLang need them: a backbone's own
    # generation_config may name a penalty, and another token at which answers end.
    more = {"repetition_penalty": 1.0, "stop_token_ids": [expected["end_id"]]}
    rows, lines = [], []
    for number, row in enumerate(expected["answers"], 1):
        reply = post(at, {**how, **more, "prompt": row["prompt"]})
        if reply[0].status in (400, 422):  # a server that takes OpenAI's names alone
            reply = post(at, {**how, "prompt": row["prompt"]})
        found = text_from(at, *reply)
        wrong = difference(found.strip(), row["answer"].strip(), row["base"].strip())
        rows.append({"prompt": row["prompt"], "answer": row["answer"], "found": found, "wrong": wrong})
        lines.append(f"{number}  {wrong or 'the same'}")
    same = sum(not row["wrong"] for row in rows)
    lines.append(f"{same} of {len(rows)} answers are those of version {expected['version'][:12]}")
    return rows, "\n".join(lines)


def difference(found, wanted, base):
    """Return in one line where an answer parts from the one that is wanted, or "" if it is the same."""
    if found == wanted:
        return ""
    shared = os.path.commonprefix([found, wanted])
    parts = [text[len(shared) :][:40] for text in (wanted, found)]
    line = "after {!r} expected {!r}, got {!r}".format(shared[-40:], *parts)
    return line + ", which is the base model's answer: the version is not in use" * (found == base)


def address_of(at):
    """Return the parts of a server's address. Raises Refused if it is none."""
    try:
        url = urllib.parse.urlsplit(at)
        plain = url.scheme in ("http", "https") and url.hostname and not (url.query or url.fragment)
        if not plain or url.username is not None or url.port == 0:
            raise ValueError
    except ValueError:
        raise Refused(f"--at {at!r}: give an address such as http://127.0.0.1:8000") from None
    return url


def post(at, body):
    """Return what a server answers to a body: its head, and at most LARGEST + 1 bytes. Raises Refused if it
    cannot be reached, speaks no HTTP, or takes more than WAIT seconds."""
    url, late = address_of(at), []
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname, url.port, timeout=WAIT)

    def hang_up(sock):  # A timeout alone would let a server send a byte now and then, for ever.
        late.append(sock)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    try:
        with contextlib.closing(connection):
            connection.connect()
            timer = threading.Timer(WAIT, hang_up, [connection.sock])
            timer.daemon = True
            timer.start()
            try:
                path = url.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
                header = {"Content-Type": "application/json"}
                connection.request("POST", path, json.dumps(body).encode(), header)
                reply = connection.getresponse()
                data = reply.read(LARGEST + 1)
            finally:
                timer.cancel()
        if late:
            raise TimeoutError
    except (OSError, http.client.HTTPException, ValueError) as e:
        slow = late or isinstance(e, TimeoutError)
        why = f"no whole answer within {WAIT} s" if slow else f"{type(e).__name__}: {str(e)[:200]}"
        raise Refused(f"--at {at}: no answer ({why})") from e
    return reply, data


def text_from(at, reply, data):
    """Return the text in what `post` gives. Raises Refused if the server sends elsewhere, sends more than
    LARGEST bytes, says that something is wrong, or sends no JSON, or one without a text."""
    if 300 <= reply.status < 400:
        to = reply.getheader("Location", "nowhere")[:200]
        why = f"it sends on to {to}, which is not followed: give that address if it is right"
    elif len(data) > LARGEST:
        why = f"an answer of more than {LARGEST} bytes"
    elif reply.status != 200:
        hint = "; --model says under which name the export is served, and /v1/completions must be there"
        hint *= reply.status == 404
        why = f"it says {reply.status} {reply.reason[:40]}: {data.decode('utf-8', 'replace')[:200]}{hint}"
    else:
        why = f"the answer has no text under choices[0].text: {ascii(data[:60])[2:-1]}"
        with contextlib.suppress(KeyError, IndexError, TypeError):
            text = parse_json(data, f"--at {at}")["choices"][0]["text"]
            if isinstance(text, str):
                return text
    raise Refused(f"--at {at}: {why}")
