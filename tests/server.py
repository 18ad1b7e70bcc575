"""The server: what OpenAI's clients are answered, and that nothing a stranger sends stops it."""

import contextlib
import itertools
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import types

import pytest
import torch

import eval as evaluation
from commit import Run
from field import Region, unsquash
from plumbing import server
from plumbing.plane import Plane
from plumbing.openai import Wrong, send_until
from tests.answers import asked
from tests.builders import copy_of, load_in_double, messages, run_quietly

HERE = pathlib.Path(__file__).parent.parent
DEFAULTS = types.SimpleNamespace(max_new_tokens=5, temperature=0.0, top_p=1.0)


class Echo:
    """In place of a run: answers with the last message, and counts."""

    answered = 0

    def warm_up(self):
        pass

    def models(self):
        return {"object": "list", "data": [{"id": "auto", "name": "auto"}]}

    def draw_plane(self):
        return {"versions": []}

    def answer(self, request, tell):
        if request["model"] != "auto":
            raise Wrong("no such model", 404)
        text = request["messages"][-1]["content"]
        if text == "fail":
            raise ValueError("one line\nand another")
        tell({"niwf": {"version": None, "name": "base"}})
        tell({"text": text})
        self.answered += 1
        tell(
            {
                "finish_reason": "stop",
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            }
        )


@contextlib.contextmanager
def serving(answers, host="127.0.0.1"):
    """A server in this process, which is gone afterwards."""
    found = server.Server(answers, host, 0)
    loops = [threading.Thread(target=run) for run in (found.serve_forever, found.work)]
    for loop in loops:
        loop.start()
    try:
        yield found
    finally:
        found.shutdown()
        found.line.put(None)
        for loop in loops:
            loop.join()
        found.server_close()


def answers_of(folder):
    """What `eval.py --web` serves of a run folder. In double precision no likeliest token is as near to the
    next as rounding."""
    served = []
    with pytest.MonkeyPatch.context() as m:
        load_in_double(m)
        m.setattr(evaluation, "serve", lambda answers, host, port: served.append(answers))
        evaluation.main(["--run", str(folder), "--device", "cpu", "--web", "--max-new-tokens", "5"])
    return served[0]


@pytest.fixture(scope="session")
def echo():
    with serving(Echo()) as found:
        yield found


@pytest.fixture(scope="session")
def of_two(two):
    with serving(answers_of(two)) as found:
        yield found


@pytest.fixture(scope="session")
def of_chat(chat):
    with serving(answers_of(chat)) as found:
        yield found


def port_of(found):
    return found.server_address[1]


def read_reply(connection):
    """What comes until the server closes: (status, headers, body)."""
    data = b"".join(iter(lambda: connection.recv(2**16), b""))
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    return int(lines[0].split()[1]), dict(line.split(": ", 1) for line in lines[1:]), body


def send(found, raw, end=False):
    """Send bytes to a server, and the end of them if asked; return its reply."""
    with socket.create_connection(found.server_address[:2], timeout=300) as connection:
        with contextlib.suppress(ConnectionError):  # it may refuse before it has all
            connection.sendall(raw)
        if end:
            connection.shutdown(socket.SHUT_WR)
        return read_reply(connection)


def post(body, found=None, path="/v1/chat/completions", **headers):
    """The bytes of a request. A header that is None is left out."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    about = {"Host": "HERE", "Content-Type": "application/json", "Content-Length": len(body)}
    about |= {key.replace("_", "-"): value for key, value in headers.items()}
    lines = [f"{key}: {value}" for key, value in about.items() if value is not None]
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode() + body


def ask(found, body):
    """The answer to a request: an object, or the list of them that are streamed."""
    status, headers, body = send(found, here(post(body), found))
    if headers["Content-Type"] == "text/event-stream":
        *events, done = body.decode().removesuffix("\n\n").split("\n\n")
        assert status == 200 and done == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]
    return json.loads(body)


def here(raw, found):
    return raw.replace(b"HERE", f"127.0.0.1:{port_of(found)}".encode())


def say(text="Hi.", model="auto", **more):
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


# ------------------------------------------------------------------------------------- what must be refused

GET = "GET {} HTTP/1.1\r\nHost: {}\r\n{}\r\n"
FIELD = {
    "model": [7, [], {}, "nobody", "\ud800"],
    "messages": ["x", [], {}, 7, [7], [{}], [{"role": "user"}], [{"role": "god", "content": "x"}]],
    "stream": ["yes", 1],
    "stream_options": [True],
    "temperature": ["hot", -1, 2.1, True, 1e308],
    "top_p": ["x", -0.1, 1.1],
    "max_tokens": [0, -1, 1.5, "9", 10**30],
    "max_completion_tokens": [0],
    "seed": [1.5, "x", 2**63],
    "n": [2, 0],
    "stop": [7, [""], [7], ["a"] * 5, "", "x" * 501],
}
CONTENT = [
    None,
    7,
    {},
    [],
    ["x"],
    [{"type": "image_url", "image_url": {"url": "http://x/"}}],
    [{"type": "text"}],
]
CONTENT += ["\udfff", [{"type": "text", "text": "\ud800"}]]


def hostile_cases():
    """(name, bytes, status)"""
    for key, values in FIELD.items():
        for value in values:
            yield f"{key} {value!r:.20}", post(say(**{key: value})), 404 if value == "nobody" else 400
    for content in CONTENT:
        yield f"content {content!r:.30}", post(say(content)), 400
    yield "an assistant's turn last", post(say() | {"messages": messages("a", "b")}), 400
    for key in ("model", "messages"):
        yield f"no {key}", post({k: v for k, v in say().items() if k != key}), 400
    deep = b"[" * 500_000
    bodies = {
        "nothing": b"",
        "a list": b"[]",
        "null": b"null",
        "no JSON": b"{",
        "deep": deep,
        "no UTF-8": b'"\xff"',
    }
    bodies |= {
        "deep in a field": b'{"x":' + deep,
        "not a number": b'{"model": NaN}',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
    }
    bodies |= {
        "a key twice": b'{"model": "auto", "model": "base"}',
        "a huge number": b'{"seed": ' + b"9" * 9000 + b"}",
    }
    bodies |= {"infinity": b'{"model": "auto", "messages": [], "temperature": 1e999}', "two": b"{} {}"}
    for name, body in bodies.items():
        yield f"body: {name}", post(body), 400
    for name in (
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "localhost:1",
        "",
        "HERE, HERE",
        "1.2.3.4",
    ):
        yield f"Host {name!r}", post(say(), Host=name), 403
    yield "no Host", post(say(), Host=None), 403
    yield "Host twice", post(say(), Host="HERE\r\nHost: evil.example"), 403
    yield "a page for another Host", GET.format("/", "evil.example", "").encode(), 403
    for origin in (
        "http://evil.example",
        "null",
        "https://HERE",
        "http://HERE.evil.example",
        "http://localhost:1",
        "",
    ):
        yield f"Origin {origin!r}", post(say(), Origin=origin), 403
    yield "a question before a request of another site", b"OPTIONS / HTTP/1.1\r\nHost: HERE\r\n\r\n", 501
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None):
        yield f"Content-Type {kind}", post(say(), Content_Type=kind), 415
    for length in ("-1", "x", "1e3", "+5", "٣", "9" * 5000):
        yield f"Content-Length {length:.9}", post(say(), Content_Length=length), 400
    yield "no Content-Length", post(say(), Content_Length=None), 411
    yield "Content-Length twice", post(say(), Content_Length="3\r\nContent-Length: 4"), 411
    yield "chunks", post(b"2\r\n{}\r\n0\r\n\r\n", Content_Length=None, Transfer_Encoding="chunked"), 411
    yield "both lengths", post(say(), Transfer_Encoding="chunked"), 411
    yield "more than 1 MiB", post(b" " * (2**20 + 1)), 413
    yield "said to be more than 1 MiB", post(b"", Content_Length=10**12), 413
    for path in (
        "/nowhere",
        "/../train",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/models/nobody",
        "/assets/tiny",
        "/" + "a" * 9000,
    ):
        yield f"path {path:.20}", GET.format(path, "HERE", "").encode(), 404
    yield "an answer is no page", GET.format("/v1/chat/completions", "HERE", "").encode(), 404
    yield "POST to the page", post(say(), path="/"), 404
    for line in ("DELETE / HTTP/1.1", "HEAD / HTTP/1.1", "\x16\x03\x01 \x02 HTTP/1.1", "BREW /pot HTTP/1.1"):
        yield f"line {line[:6]!r}", f"{line}\r\nHost: HERE\r\n\r\n".encode(), 501
    for line in (
        "GET",
        "GET / HTTP/1.1 x",
        "GET / HTTP/x",
        "PRI * HTTP/2.0",
        "\x80\xff" * 20,
        "GET / FTP/1.1",
    ):
        yield f"line {line[:9]!r}", f"{line}\r\nHost: HERE\r\n\r\n".encode("latin-1"), (400, 505)
    yield "a long line", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414
    yield "a long header", GET.format("/", "HERE", f"X: {'a' * 70_000}\r\n").encode(), 431
    yield "many headers", GET.format("/", "HERE", "X: 1\r\n" * 200).encode(), 431
    yield "HTTP/0.9", b"GET /\r\n\r\n", 403
    yield "an error of ours", post(say("fail")), 500
    yield "an error of ours, streaming", post(say("fail", stream=True)), 500


HOSTILE = [*hostile_cases()]


def test_the_table_of_hostile_requests_is_long():
    assert len({raw for _, raw, _ in HOSTILE}) == len(HOSTILE) >= 40


def is_refused(reply, status):
    """See that a reply is OpenAI's error object, in one line, and tells nothing of our insides."""
    found, headers, body = reply
    error = json.loads(body)["error"]
    assert found in (status if isinstance(status, tuple) else [status]), error
    assert {*error} == {"message", "type", "param", "code"} and headers["Content-Type"] == "application/json"
    assert (
        error["message"].isprintable()
        and "Traceback" not in error["message"]
        and ".py" not in error["message"]
    )
    assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("name,raw,status", HOSTILE, ids=[name for name, *_ in HOSTILE])
def test_a_hostile_request_is_one_line_and_the_server_serves_on(echo, capfd, name, raw, status):
    before = echo.answers.answered
    is_refused(send(echo, here(raw, echo)), status)
    assert echo.answers.answered == before, "a refused request was answered"
    assert ask(echo, say("still there"))["choices"][0]["message"]["content"] == "still there"
    said = capfd.readouterr()
    assert said.err == ("[ValueError: one line and another]\n" if "of ours" in name else "") and not said.out


@pytest.mark.parametrize(
    "raw,replies", [(b"", False), (b"\r\n", False), (b"GE", True), (b"GET / HTTP/1.1\r\nHo", True)]
)
def test_half_a_request_is_told_so(echo, capfd, raw, replies):
    if replies:
        is_refused(send(echo, raw, end=True), (400, 403))
    else:
        with contextlib.suppress(IndexError, ConnectionError):
            is_refused(send(echo, raw, end=True), 400)
    is_refused(send(echo, here(post(say()), echo)[:-5], end=True), 408)
    assert ask(echo, say())["choices"][0]["message"]["content"] == "Hi." and not capfd.readouterr().err


def test_a_slow_request_is_ended(echo, monkeypatch, capfd):
    """A byte comes now and then, and the request never ends."""
    monkeypatch.setattr(server, "PATIENCE", 0.5)
    raw = here(post(say(), Content_Length=1000), echo)
    with socket.create_connection(echo.server_address[:2], timeout=300) as connection:
        connection.sendall(raw[:-5])
        connection.settimeout(0.1)
        for byte in itertools.repeat(b" "):
            with contextlib.suppress(TimeoutError):
                assert connection.recv(1, socket.MSG_PEEK)
                break
            with contextlib.suppress(ConnectionError):
                connection.send(byte)
        connection.settimeout(300)
        is_refused(read_reply(connection), 408)
    assert ask(echo, say())["object"] == "chat.completion" and not capfd.readouterr().err


def test_a_thousand_connections_leave_room_for_one_that_asks(echo, capfd):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 4096 if limits[1] == resource.RLIM_INFINITY else min(4096, limits[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(enough, limits[0]), limits[1]))
    try:
        with contextlib.ExitStack() as idle:
            for _ in range(1000):
                idle.enter_context(socket.create_connection(echo.server_address[:2], timeout=300))
            assert ask(echo, say())["object"] == "chat.completion"
            assert threading.active_count() < server.CONNECTIONS + 20
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert ask(echo, say())["object"] == "chat.completion" and not capfd.readouterr().err


class Endless(Echo):
    """Answers for as long as somebody listens."""

    def __init__(self):
        self.log, self.ended = [], threading.Semaphore(0)

    def answer(self, request, tell):
        name = request["messages"][-1]["content"]
        self.log.append(f"begin {name}")
        try:
            tell({"niwf": {"version": None}})
            while name != "short":
                tell({"text": "x"})
                threading.Event().wait(0.001)
            super().answer(request, tell)
        finally:
            self.log.append(f"end {name}")
            self.ended.release()


@pytest.mark.parametrize("stream", [True, False])
def test_one_answer_is_computed_at_a_time_and_a_client_that_goes_away_stops_its_answer(stream):
    """Three ask. The second goes away while it waits; the third is answered when the first has gone."""
    with serving(Endless()) as found, contextlib.ExitStack() as stack:
        raw = [here(post(say(name, stream=stream)), found) for name in ("long", "gone", "short")]
        first, second, third = (
            stack.enter_context(socket.create_connection(found.server_address[:2], timeout=300)) for _ in raw
        )
        first.sendall(raw[0])
        while found.answers.log != ["begin long"]:
            threading.Event().wait(0.01)
        second.sendall(raw[1])
        while not found.line.qsize():
            threading.Event().wait(0.01)
        third.sendall(raw[2])
        second.close()
        while found.line.qsize() < 2 or len([1 for until in found.open.values() if until is None]) > 2:
            threading.Event().wait(0.01)
        assert found.answers.log == ["begin long"]
        first.close()
        assert read_reply(third)[0] == 200
        assert found.answers.log == ["begin long", "end long", "begin short", "end short"]


# --------------------------------------------------------------------------------------- what is answered


def test_an_answer_is_what_eval_py_prints_and_says_who_gave_it(two, of_two, monkeypatch, capsys):
    run = Run(two)
    load_in_double(monkeypatch)
    for text in (
        "Name three fruits.",
        "How do I sort names in Python?",
        "naïve 🙂 </s> <|end|>\0",
        " ",
        "x " * 40,
    ):
        shown, note = asked(two, capsys, "--prompt", text, "--max-new-tokens", "5")
        found = ask(of_two, say(text, frobnicate=[1], user=None, temperature=None))
        (choice,), usage, who = found["choices"], found["usage"], found["niwf"]
        assert choice["message"] == {"role": "assistant", "content": shown} and choice["index"] == 0
        assert f"[version {found['model'][:12]}; nearest region: {who['nearest']}, " in note
        assert f"{100 * who['probability']:.1f} % sure" in note and who["version"] == found["model"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 5
        assert choice["finish_reason"] == ("length" if usage["completion_tokens"] == 5 else "stop")
        assert len(who["coordinate"]) == 2 and {len(row) for row in who["gating"]} == {2}
        events = ask(of_two, say(text, stream=True, stream_options={"include_usage": True}))
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert events[0]["niwf"] == who and all("niwf" not in event for event in events[1:])
        texts = [e["choices"][0]["delta"].get("content", "") for e in events[:-1]]
        assert "".join(texts) == shown and {e["id"] for e in events} == {events[0]["id"]}
        assert events[-2]["choices"][0]["finish_reason"] == choice["finish_reason"]
        assert events[-1]["choices"] == [] and events[-1]["usage"] == usage
    for entry in run.entries:
        shown, _ = asked(two, capsys, "--prompt", "Hi.", "--version", entry["task"], "--max-new-tokens", "5")
        for name in (entry["task"], entry["hash"], entry["hash"][:9]):
            found = ask(of_two, say(model=name))
            assert found["choices"][0]["message"]["content"] == shown and found["model"] == entry["hash"]
            assert found["niwf"]["asked"] and found["niwf"]["name"] == entry["task"]
    bare = ask(of_two, say(model="base"))
    assert bare["model"] == "base" and bare["niwf"]["version"] is None and bare["niwf"]["gating"] == []


def test_every_version_and_composition_is_a_model(two, tmp_path):
    import commit

    out = copy_of(two, tmp_path)
    commit.main(["compose", "alpaca", "code", "--weights", ".5", ".5", "--name", "AB", "--run", str(out)])
    answers, entries = answers_of(out), Run(out).entries
    with serving(answers) as found:
        status, _, body = send(found, here(GET.format("/v1/models", "HERE", "").encode(), found))
        listed = json.loads(body)["data"]
        assert status == 200 and [m["id"] for m in listed] == ["auto", "base", *(e["hash"] for e in entries)]
        assert [m["name"] for m in listed[2:]] == ["alpaca", "code", "AB"]
        for name in (entries[0]["hash"], "alpaca"):
            raw = here(GET.format(f"/v1/models/{name}", "HERE", "").encode(), found)
            assert json.loads(send(found, raw)[2]) == listed[2] and listed[2]["created"] > 1e9
        composed = ask(found, say(model="AB"))["niwf"]
        assert composed["name"] == "AB" and len(composed["gating"][0]) == 4
        _, _, body = send(found, here(GET.format("/plane", "HERE", "").encode(), found))
        plane = json.loads(body)
        assert plane["bases"] == [0] * 4 + [1] * 4 and [v["name"] for v in plane["versions"]] == [
            "alpaca",
            "code",
        ]
        assert plane["compositions"][0]["name"] == "AB" and len(plane["versions"][0]["outline"]) == 64


def test_a_seed_a_temperature_and_a_stop_do_what_openai_says(of_chat):
    """The bare backbone of this run says x for ever; at a high temperature it says anything."""
    text = lambda **how: ask(of_chat, say(model="base", **{"max_tokens": 4, **how}))["choices"][0]
    drawn = [text(temperature=2, seed=seed)["message"]["content"] for seed in (0, 0, 1, -1, 2**63 - 1)]
    assert drawn[0] == drawn[1] and len({*drawn}) > 1
    assert text(temperature=2, top_p=0, seed=3) == text() == text(temperature=0)
    assert text()["message"]["content"] == "x x x x" and text()["finish_reason"] == "length"
    for stop in (" x x", [" x x"], ["never said", "x x x", " x x"]):
        content = "" if "x x x" in stop else "x"
        assert text(stop=stop)["message"]["content"] == content and text(stop=stop)["finish_reason"] == "stop"
    assert text(stop=[])["message"]["content"] == text(stop=["xx"])["message"]["content"] == "x x x x"
    assert text(max_completion_tokens=1)["message"]["content"] == "x"
    events = ask(of_chat, say(model="base", stream=True, stop=" x x"))
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == "x"


def test_pieces_are_held_back_while_they_may_begin_a_stop():
    for text, stops in (
        ("abcabd.", ["abd"]),
        ("aaab", ["aab"]),
        ("xyz", ["zz"]),
        ("", ["a"]),
        ("abab", ["b", "ab"]),
    ):
        for cuts in itertools.product((False, True), repeat=max(len(text) - 1, 0)):
            pieces, sent = [""], []
            for letter, cut in zip(text, (*cuts, False)):
                pieces[-1] += letter
                pieces += [""] * cut
            places = [text.index(stop) for stop in stops if stop in text]
            assert send_until(pieces, stops, sent.append) == bool(places)
            assert "".join(sent) == text[: min(places, default=None)]


def test_a_chat_is_written_in_the_run_s_own_template(of_two, of_chat):
    """A run with --template alpaca has no place for what was said before; one with --template chat has."""
    said = say() | {"messages": messages("a", "b", "c")}
    told = say() | {"messages": messages("Be kind.", "c", first="system")}
    for wrong in (said, told):
        error = ask(of_two, wrong)["error"]
        assert "alpaca" in error["message"] and error["type"] == "invalid_request_error"
    parts = say([{"type": "text", "text": "Say"}, {"type": "text", "text": "x."}])
    for right in (
        said,
        told,
        parts,
        told | {"messages": [{"role": "developer", "content": "x"}, said["messages"][0]]},
    ):
        found = ask(of_chat, right)
        assert found["choices"][0]["message"]["content"] == "Hello." and found["niwf"]["name"] == "chats"
    more = ask(of_chat, said)["usage"]["prompt_tokens"] - ask(of_chat, say("c"))["usage"]["prompt_tokens"]
    assert more > 10


def test_a_prompt_that_leaves_no_room_is_refused_and_an_answer_ends_where_the_context_does(of_chat):
    error = ask(of_chat, say("x " * 3000))["error"]
    assert error["code"] == "context_length_exceeded"
    found = ask(of_chat, say("x", model="base", max_tokens=10**6))
    assert found["usage"]["total_tokens"] == 256 and found["choices"][0]["finish_reason"] == "length"
    long = ask(of_chat, say("a" * 900_000))["error"]
    assert long["code"] == "context_length_exceeded"


def test_the_public_openai_client_is_answered(two, of_two):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port_of(of_two)}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()][:2] == ["auto", "base"]
    how = {"messages": [{"role": "user", "content": "Name three fruits."}], "max_tokens": 5, "temperature": 0}
    whole = client.chat.completions.create(model="auto", **how)
    assert whole.niwf["name"] in ("alpaca", "code") and whole.usage.prompt_tokens > 0
    stream = client.chat.completions.create(
        model="auto", stream=True, stream_options={"include_usage": True}, **how
    )
    chunks = [*stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage
    assert chunks[0].niwf == whole.niwf
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.chat.completions.create(model="nobody", **how)
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="auto", **how | {"temperature": 9})
    assert e.value.param == "temperature"
    client.close()


# ------------------------------------------------------------------------------------- the page, the plane


def test_the_page_is_for_this_server_alone_and_no_text_becomes_html(echo):
    status, headers, body = send(echo, here(GET.format("/?x", "HERE", "").encode(), echo))
    page, policy = body.decode(), headers["Content-Security-Policy"]
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=| style=", page
    )
    outside = [url for url in re.findall(r"\w+://[^\s\"']+", page) if url != "http://www.w3.org/2000/svg"]
    assert not outside and page.count("<script") == page.count("<style") == 1
    assert headers["X-Content-Type-Options"] == "nosniff" and "niwf" == headers["Server"]


def test_other_names_of_this_machine_are_let_in_by_host_alone():
    """The address that a connection came to is the server's own, whatever it was bound to."""
    with serving(Echo(), "localhost") as found:
        port = port_of(found)
        for host in ("localhost", "LOCALHOST"):
            raw = post(say(), Host=f"{host}:{port}", Origin=f"http://{host}:{port}")
            assert send(found, raw)[0] == 200
        assert send(found, post(say(), Host=f"nobody:{port}"))[0] == 403


def test_the_plane_is_where_means_differ_most_under_the_pooled_covariance():
    """Two Gaussians whose means differ along one axis, on which they are narrow: it becomes the first. Of the
    others the widest becomes the second. On either the pooled deviation is 1."""
    torch.manual_seed(0)
    cov = torch.diag(torch.tensor([0.04, 9.0, 1.0], dtype=torch.double))
    mean = torch.tensor([[-1.0, 0, 0], [1, 0, 0]], dtype=torch.double)
    regions = [Region(m, cov, 1.0, 9) for m in mean]
    plane = Plane.of(regions)
    wanted = torch.tensor([[5.0, 0, 0], [0, 1 / 3, 0]], dtype=torch.double)
    torch.testing.assert_close(plane.axes.abs(), wanted)
    z = torch.tanh(torch.randn(5, 3) / 2)
    torch.testing.assert_close(plane.at(unsquash(z)).abs(), (unsquash(z.double()) @ wanted.T).abs())
    outline = plane.outline(regions[0]) - plane.axes @ mean[0]
    torch.testing.assert_close(
        outline.norm(dim=1), torch.full((64,), 2.4477, dtype=torch.double), atol=1e-4, rtol=0
    )
    share = (torch.randn(20_000, 2).norm(dim=1) < outline[0].norm()).double().mean()
    assert 0.94 < float(share) < 0.96
    alone, line = Plane.of(regions[:1]), Plane.of([Region(m[:1], cov[:1, :1], 1.0, 9) for m in mean])
    torch.testing.assert_close(
        alone.axes.abs(), torch.tensor([[0, 1 / 3, 0], [0, 0, 1.0]], dtype=torch.double)
    )
    assert line.axes.shape == (2, 1) and line.at(z[:, :1])[:, 1].abs().max() == 0
    three = [*regions, Region(torch.tensor([0, 0, 5.0], dtype=torch.double), cov, 1.0, 9)]
    assert Plane.of(three).axes[:, 1].abs().max() < 1e-9  # nothing differs along the widest


def test_the_server_opens_where_it_says_and_closes_with_one_line(two, capsys):
    command = [
        sys.executable,
        str(HERE / "eval.py"),
        "--web",
        "--port",
        "0",
        "--run",
        str(two),
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = re.match(r"http://127\.0\.0\.1:(\d+)/ is open", process.stdout.readline())
        port = int(address[1])
        with socket.create_connection(("127.0.0.1", port), timeout=300) as connection:
            connection.sendall(post(say(), Host=f"127.0.0.1:{port}"))
            assert read_reply(connection)[0] == 200
        line = run_quietly(evaluation.main, ["--run", str(two), "--web", "--port", str(port)], capsys)
        assert f"--port {port}" in line
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=300)[1].strip() == "eval.py: stopped"
    finally:
        process.kill()
    for wrong in ("--talk", "--prompt x", "--version code", "--system x", "--host 256.1.1.1", "--port 65536"):
        run_quietly(evaluation.main, ["--run", str(two), "--web", *wrong.split()], capsys)
