"""The server: what OpenAI's clients are answered, and that nothing a stranger sends stops it."""

import contextlib
import itertools
import json
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading

import pytest
import torch

import eval as evaluation
from commit import Run
from field import Region, unsquash
from plumbing import asking, server
from plumbing.openai import Wrong, read_request, send_until
from plumbing.plane import Plane
from plumbing.records import read_records
from tests.builders import HERE, asked, copy_of, evaluate, git, load_in_double, messages, run_quietly
from tests.builders import wait_until


class Echo:
    """In place of a run: answers with the last message, and counts."""

    answered = 0
    warm_up = draw_plane = lambda self: None
    models = lambda self: {"object": "list", "data": [{"id": "auto", "name": "auto"}]}

    def answer(self, request, tell):
        if request["model"] != "auto":
            raise Wrong("no such model", 404)
        text = request["messages"][-1]["content"]
        if text == "fail":
            raise ValueError("one line\nand another")
        tell({"niwf": {"version": None, "name": "base"}})
        tell({"text": text})
        self.answered += 1
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        tell({"finish_reason": "stop", "usage": usage})


@contextlib.contextmanager
def serving(answers, host="127.0.0.1"):
    """Serve in this process, until the block ends."""
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
    """Return what `eval.py --web` serves of a run folder. In double precision no likeliest token is as near
    to the next as rounding."""
    served = []
    with pytest.MonkeyPatch.context() as m:
        load_in_double(m)
        m.setattr(asking, "serve", lambda answers, host, port: served.append(answers))
        evaluate(folder, "--web --max-new-tokens 5")
    return served[0]


@pytest.fixture(scope="session")
def echo():
    with serving(Echo()) as found:
        yield found


@pytest.fixture
def no_noise(capfd):
    """See that nothing is printed."""
    yield
    assert capfd.readouterr() == ("", "")


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
    """Read until the server closes. Return (status, headers, body)."""
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
    """Return the bytes of a request. A header that is None is left out."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    about = {"Host": "HERE", "Content-Type": "application/json", "Content-Length": len(body)}
    about |= {key.replace("_", "-"): value for key, value in headers.items()}
    lines = [f"{key}: {value}" for key, value in about.items() if value is not None]
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode() + body


def ask(found, body):
    """Return the answer to a request: an object, or the list of them that are streamed."""
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


def get(path, host="HERE", more="", found=None):
    """Return the bytes of a request for a page; or, of a server, its reply."""
    raw = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{more}\r\n".encode()
    return send(found, here(raw, found)) if found else raw


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
    "tools": [[{"type": "function"}], "x"],
    "functions": [[{"name": "x"}]],
    "logit_bias": [{"1": 5}],
    "frequency_penalty": [1, "x"],
    "presence_penalty": [-0.5],
    "logprobs": [True, 1],
    "response_format": [{"type": "json_object"}, "text"],
    "stop": [7, [""], [7], ["a"] * 5, "", "x" * 501],
}
CONTENT = [None, 7, {}, [], ["x"], [{"type": "image_url", "image_url": {"url": "http://x/"}}]]
CONTENT += [[{"type": "text"}], "\udfff", [{"type": "text", "text": "\ud800"}]]
DEEP = b"[" * 500_000
BODIES = [b"", b"[]", b"null", b"{", DEEP, b'"\xff"', b'{"x":' + DEEP, b'{"model": NaN}', b"{} {}"]
BODIES += ['{"a": 1}'.encode("utf-16"), b'{"model": "auto", "model": "base"}']
BODIES += [b'{"seed": ' + b"9" * 9000 + b"}", b'{"model": "auto", "messages": [], "temperature": 1e999}']
HOSTS = "evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost:1", "", "HERE, HERE"
HOSTS += "1.2.3.4", None, "HERE\r\nHost: evil.example"
ORIGINS = "http://evil.example", "null", "https://HERE", "http://HERE.evil.example", "http://localhost:1", ""
TYPES = "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None
LENGTHS = "-1", "x", "1e3", "+5", "٣", "9" * 5000
PATHS = "/nowhere", "/../train", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/nobody", "/assets/tiny"
PATHS += "/" + "a" * 9000, "/v1/chat/completions"
NO_METHODS = "DELETE / HTTP/1.1", "HEAD / HTTP/1.1", "\x16\x03\x01 \x02 HTTP/1.1", "BREW /pot HTTP/1.1"
NO_LINES = "GET", "GET / HTTP/1.1 x", "GET / HTTP/x", "PRI * HTTP/2.0", "\x80\xff" * 20, "GET / FTP/1.1"


def hostile_cases():
    """Yield (name, bytes, status)."""
    for key, value in [(key, value) for key, values in FIELD.items() for value in values]:
        yield f"{key} {value!r:.20}", post(say(**{key: value})), 404 if value == "nobody" else 400
    yield from ((f"content {content!r:.30}", post(say(content)), 400) for content in CONTENT)
    yield "an assistant's turn last", post(say() | {"messages": messages("a", "b")}), 400
    yield from ((f"no {key}", post({k: v for k, v in say().items() if k != key}), 400) for key in say())
    yield from ((f"body {body[:20]}", post(body), 400) for body in BODIES)
    yield from ((f"Host {host!r}", post(say(), Host=host), 403) for host in HOSTS)
    yield "a page for another Host", get("/", "evil.example"), 403
    yield from ((f"Origin {origin!r}", post(say(), Origin=origin), 403) for origin in ORIGINS)
    yield "a question before a request of another site", b"OPTIONS / HTTP/1.1\r\nHost: HERE\r\n\r\n", 501
    yield from ((f"Content-Type {kind}", post(say(), Content_Type=kind), 415) for kind in TYPES)
    yield from ((f"Content-Length {n:.9}", post(say(), Content_Length=n), 400) for n in LENGTHS)
    yield "no Content-Length", post(say(), Content_Length=None), 411
    yield "Content-Length twice", post(say(), Content_Length="3\r\nContent-Length: 4"), 411
    yield "chunks", post(b"2\r\n{}\r\n0\r\n\r\n", Content_Length=None, Transfer_Encoding="chunked"), 411
    yield "both lengths", post(say(), Transfer_Encoding="chunked"), 411
    yield "more than 1 MiB", post(b" " * (2**20 + 1)), 413
    yield "said to be more than 1 MiB", post(b"", Content_Length=10**12), 413
    yield from ((f"path {path:.20}", get(path), 404) for path in PATHS)
    yield "POST to the page", post(say(), path="/"), 404
    for line in (*NO_METHODS, *NO_LINES):
        status = 501 if line in NO_METHODS else (400, 505)
        yield f"line {line[:9]!r}", f"{line}\r\nHost: HERE\r\n\r\n".encode("latin-1"), status
    yield "a long line", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414
    yield "a long header", get("/", more=f"X: {'a' * 70_000}\r\n"), 431
    yield "many headers", get("/", more="X: 1\r\n" * 200), 431
    yield "HTTP/0.9", b"GET /\r\n\r\n", 403
    yield "an error of ours", post(say("fail")), 500
    yield "an error of ours, streaming", post(say("fail", stream=True)), 500


HOSTILE = [*hostile_cases()]


def is_refused(reply, status):
    """See that a reply is OpenAI's error object, in one line, and tells nothing of our insides."""
    found, headers, body = reply
    error = json.loads(body)["error"]
    said = error["message"]
    assert found in (status if isinstance(status, tuple) else [status]), error
    assert {*error} == {"message", "type", "param", "code"} and headers["Content-Type"] == "application/json"
    assert said.isprintable() and "Traceback" not in said and ".py" not in said
    assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("name,raw,status", HOSTILE, ids=[name for name, *_ in HOSTILE])
def test_a_hostile_request_is_one_line_and_the_server_serves_on(echo, capfd, name, raw, status):
    """A hostile request gets OpenAI's error object, in one line, and the server answers the next request."""
    before = echo.answers.answered
    is_refused(send(echo, here(raw, echo)), status)
    assert echo.answers.answered == before, "a refused request was answered"
    assert ask(echo, say("still there"))["choices"][0]["message"]["content"] == "still there"
    said = capfd.readouterr()
    assert said.err == ("[ValueError: one line and another]\n" if "of ours" in name else "") and not said.out


@pytest.mark.parametrize("raw", [b"", b"\r\n", b"GE", b"GET / HTTP/1.1\r\nHo"])
def test_half_a_request_is_told_so(echo, no_noise, raw):
    """A client that sends half a request is told so, and the server answers the next request."""
    nothing = [] if raw.strip() else [IndexError, ConnectionError]  # of no request it may not be told
    with contextlib.suppress(*nothing):
        is_refused(send(echo, raw, end=True), (400, 403))
    is_refused(send(echo, here(post(say()), echo)[:-5], end=True), 408)
    assert ask(echo, say())["choices"][0]["message"]["content"] == "Hi."


def test_a_slow_request_is_ended(echo, monkeypatch, no_noise):
    """A request whose bytes come too slowly is ended with status 408, so that it cannot hold its place."""
    raw = here(post(say(), Content_Length=1000), echo)
    with monkeypatch.context() as m, contextlib.ExitStack() as stack:
        m.setattr(server, "PATIENCE", 3)
        connection = stack.enter_context(socket.create_connection(echo.server_address[:2], timeout=300))
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
    assert ask(echo, say())["object"] == "chat.completion"


def test_a_thousand_connections_leave_room_for_one_that_asks(echo, no_noise):
    """Beside a thousand idle connections a request is answered, and the server's threads stay few."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 4096 if limits[1] == resource.RLIM_INFINITY else min(4096, limits[1])
    if enough < 1500:
        pytest.skip("too few files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(enough, limits[0]), limits[1]))
    try:
        with contextlib.ExitStack() as idle:
            for _ in range(1000):
                idle.enter_context(socket.create_connection(echo.server_address[:2], timeout=300))
            assert ask(echo, say())["object"] == "chat.completion"
            assert threading.active_count() < server.CONNECTIONS + 20
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert ask(echo, say())["object"] == "chat.completion"


def test_one_too_many_is_told_so(monkeypatch, no_noise):
    """A request for which there is no place is answered with status 503, and its own bytes are read first: to
    close a connection with bytes unread resets it, and the answer is lost."""
    monkeypatch.setattr(server, "CONNECTIONS", 0)
    client, connection = socket.socketpair()
    with serving(Echo()) as found, client:
        client.sendall(post(say("x" * 1000)))
        found.process_request(connection, None)
        assert b"".join(iter(lambda: client.recv(100), b"")).startswith(b"HTTP/1.0 503 ")


class Endless(Echo):
    """Answers for as long as somebody listens."""

    def __init__(self):
        self.log = []

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


@pytest.mark.parametrize("stream", [True, False])
def test_answers_come_one_at_a_time_and_stop_with_the_client(stream):
    """Three ask. The second goes away while it waits; the third is answered when the first has gone."""
    with serving(Endless()) as found, contextlib.ExitStack() as stack:
        raw = [here(post(say(name, stream=stream)), found) for name in ("long", "gone", "short")]
        connect = lambda: socket.create_connection(found.server_address[:2], timeout=300)
        first, second, third = (stack.enter_context(connect()) for _ in raw)
        first.sendall(raw[0])
        wait_until(lambda: found.answers.log == ["begin long"])
        second.sendall(raw[1])
        wait_until(lambda: found.line.qsize())
        third.sendall(raw[2])
        second.close()
        asking = lambda: [1 for until in list(found.open.values()) if until is None]
        wait_until(lambda: found.line.qsize() >= 2 and len(asking()) <= 2)
        assert found.answers.log == ["begin long"]
        first.close()
        assert read_reply(third)[0] == 200
        wait_until(lambda: len(found.answers.log) > 3)  # the reply is there before the answer has ended
        assert found.answers.log == ["begin long", "end long", "begin short", "end short"]


TEXTS = "Name three fruits.", "How do I sort names in Python?", "naïve 🙂 </s> <|end|>\0", " ", "x " * 40


def streamed(events):
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_is_what_eval_py_prints_and_says_who_gave_it(two, of_two, monkeypatch, capsys, text):
    """The server gives the text of eval.py, whole or streamed, and names the version that gave it."""
    load_in_double(monkeypatch)
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
    assert streamed(events[:-1]) == shown and {e["id"] for e in events} == {events[0]["id"]}
    assert events[-2]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert events[-1]["choices"] == [] and events[-1]["usage"] == usage


def test_every_version_and_composition_is_a_model(two, tmp_path, monkeypatch, capsys):
    """Each version and composition is asked by name, hash or its start, and answers as eval.py prints."""
    load_in_double(monkeypatch)
    out = copy_of(two, tmp_path)
    git(out, "compose alpaca code --weights .5 .5 --name AB")
    answers, entries = answers_of(out), Run(out).entries
    with serving(answers) as server:
        page = lambda path: json.loads(get(path, found=server)[2])
        listed, plane = page("/v1/models")["data"], page("/plane")
        assert [m["id"] for m in listed] == ["auto", "base", *(e["hash"] for e in entries)]
        assert [m["name"] for m in listed[2:]] == ["alpaca", "code", "AB"] and listed[2]["created"] > 1e9
        assert page(f"/v1/models/{entries[0]['hash']}") == page("/v1/models/%61lpaca") == listed[2]
        for entry in entries:
            how = "--prompt Hi. --max-new-tokens 5 --version".split()
            shown, _ = asked(out, capsys, *how, entry["task"])
            for name in (entry["task"], entry["hash"], entry["hash"][:9]):
                found = ask(server, say(model=name))
                assert found["choices"][0]["message"]["content"] == shown and found["model"] == entry["hash"]
                assert found["niwf"]["asked"] and found["niwf"]["name"] == entry["task"]
        assert len(found["niwf"]["gating"][0]) == 4  # of AB, which is the last
        bare = ask(server, say(model="base"))
    assert bare["model"] == "base" and bare["niwf"]["version"] is None and bare["niwf"]["gating"] == []
    assert plane["bases"] == [0] * 4 + [1] * 4 and plane["compositions"][0]["name"] == "AB"
    assert [v["name"] for v in plane["versions"]] == ["alpaca", "code"]
    assert len(plane["versions"][0]["outline"]) == 64


def test_a_seed_a_temperature_and_a_stop_do_what_openai_says(of_chat):
    """The bare backbone of this run says x for ever; at a high temperature it says anything."""

    def text(**how):
        (choice,) = ask(of_chat, say(model="base", **{"max_tokens": 4, **how}))["choices"]
        return choice["message"]["content"], choice["finish_reason"]

    drawn = [text(temperature=2, seed=seed) for seed in (0, 0, 1, -1, 2**63 - 1)]
    assert drawn[0] == drawn[1] and len({*drawn}) > 1
    whole = text()
    assert whole == ("x x x x", "length") == text(temperature=2, top_p=0, seed=3) == text(temperature=0)
    for stop in (" x x", [" x x"], ["never said", "x x x", " x x"]):
        assert text(stop=stop) == ("" if "x x x" in stop else "x", "stop")
    assert text(stop=[]) == text(stop=["xx"]) == whole and text(max_completion_tokens=1)[0] == "x"
    assert streamed(ask(of_chat, say(model="base", stream=True, stop=" x x"))) == "x"


STOPS = [("abcabd.", ["abd"]), ("aaab", ["aab"]), ("xyz", ["zz"]), ("", ["a"]), ("abab", ["b", "ab"])]


@pytest.mark.parametrize("text, stops", STOPS)
def test_pieces_are_held_back_while_they_may_begin_a_stop(text, stops):
    """A streamed text ends before its first stop, however it is cut into pieces, and loses nothing else."""
    places = [text.index(stop) for stop in stops if stop in text]
    for cuts in itertools.product(("", "|"), repeat=max(len(text) - 1, 0)):
        pieces, sent = "".join(map("".join, zip(text, (*cuts, "")))).split("|"), []
        assert send_until(pieces, stops, sent.append) == bool(places)
        assert "".join(sent) == text[: min(places, default=None)]


def test_a_chat_is_written_in_the_run_s_own_template(of_two, of_chat):
    """A run with --template alpaca has no place for what was said before; one with --template chat has."""
    said = say() | {"messages": messages("a", "b", "c")}
    told = say() | {"messages": messages("Be kind.", "c", first="system")}
    for wrong, what in ((said, "history"), (told, "a system message")):
        error = ask(of_two, wrong)["error"]
        assert f"has {what}, which alpaca" in error["message"] and error["type"] == "invalid_request_error"
    parts = say([{"type": "text", "text": "Say"}, {"type": "text", "text": "x."}])
    developer = told | {"messages": [{"role": "developer", "content": "x"}, said["messages"][0]]}
    for right in (said, told, parts, developer):
        found = ask(of_chat, right)
        assert found["choices"][0]["message"]["content"] == "Hello." and found["niwf"]["name"] == "chats"
    more = ask(of_chat, said)["usage"]["prompt_tokens"] - ask(of_chat, say("c"))["usage"]["prompt_tokens"]
    assert more > 10


def test_prompt_and_answer_must_fit_into_the_context(of_chat):
    """A prompt longer than the context is refused with OpenAI's code, and an answer stops at its limit."""
    for long in ("x " * 3000, "a" * 900_000):
        assert ask(of_chat, say(long))["error"]["code"] == "context_length_exceeded"
    found = ask(of_chat, say("x", model="base", max_tokens=10**6))
    assert found["usage"]["total_tokens"] == 256 and found["choices"][0]["finish_reason"] == "length"


def test_the_public_openai_client_is_answered(two, of_two):
    """OpenAI's own client lists models, gets answers whole and streamed, and raises its own errors."""
    openai = pytest.importorskip("openai")
    how = {"api_key": "none", "max_retries": 0, "http_client": openai.DefaultHttpxClient(trust_env=False)}
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port_of(of_two)}/v1", **how)
    assert [m.id for m in client.models.list()][:2] == ["auto", "base"]
    how = {"messages": [{"role": "user", "content": "Name three fruits."}], "max_tokens": 5, "temperature": 0}
    whole = client.chat.completions.create(model="auto", **how)
    assert whole.niwf["name"] in ("alpaca", "code") and whole.usage.prompt_tokens > 0
    more = how | {"stream": True, "stream_options": {"include_usage": True}}
    chunks = [*client.chat.completions.create(model="auto", **more)]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage
    assert chunks[0].niwf == whole.niwf
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.chat.completions.create(model="nobody", **how)
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="auto", **how | {"temperature": 9})
    assert e.value.param == "temperature"
    client.close()


def test_the_page_asks_nobody_else_and_makes_no_html(echo):
    """The page loads nothing from elsewhere and makes no HTML of a text, so an answer cannot run code."""
    status, headers, body = get("/?x", found=echo)
    page, policy = body.decode(), headers["Content-Security-Policy"]
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    inner = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=| style="
    assert not re.search(inner, page)
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


def ipv6_takes_ipv4():
    """Return whether a socket that listens on all addresses of IPv6 here can be reached over IPv4."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as listening:
        listening.bind(("::", 0))
        listening.listen()
        socket.create_connection(("127.0.0.1", listening.getsockname()[1]), timeout=5).close()
        return True
    return False


@pytest.mark.skipif(not ipv6_takes_ipv4(), reason="no IPv6 here, or none that takes IPv4")
def test_a_server_for_ipv6_knows_its_ipv4_address():
    """Where a server listens on all addresses, one of IPv4 is let in under its own name."""
    with serving(Echo(), "::") as found, socket.create_connection(("127.0.0.1", port_of(found))) as client:
        client.sendall(post(say(), Host=f"127.0.0.1:{port_of(found)}"))
        assert read_reply(client)[0] == 200


def no_thread():
    raise RuntimeError("can't start new thread")


def test_when_no_thread_can_start_no_place_is_lost(monkeypatch, capfd):
    """A connection that gets no thread is closed, and its place is free again."""
    with serving(Echo()) as found:
        with monkeypatch.context() as m:
            m.setattr(socketserver.ThreadingMixIn, "process_request", lambda *_: no_thread())
            for _ in range(server.CONNECTIONS + 1):
                with socket.create_connection(found.server_address[:2], timeout=300) as client:
                    with contextlib.suppress(ConnectionError):
                        assert client.recv(1) == b""
        wait_until(lambda: not found.open)  # which comes just after a client has seen the end
        assert ask(found, say())["choices"][0]["message"]["content"] == "Hi."
    assert capfd.readouterr().err.count("can't start new thread") == server.CONNECTIONS + 1


def test_an_error_of_ours_is_printed(monkeypatch, capfd):
    """A file that is gone while the server runs is an error of ours, not a client that broke off."""

    def gone(*_):
        raise FileNotFoundError("versions/x")

    answers = Echo()
    answers.answer = gone
    with serving(answers) as found:
        assert "the answer failed: FileNotFoundError" in ask(found, say())["error"]["message"]
    assert "FileNotFoundError: versions/x" in capfd.readouterr().err


def test_messages_are_asked_as_they_are_trained(tmp_path):
    """The same messages have one form, whether they are learned from or asked: roles, and texts in parts."""
    parts = [{"type": "text", "text": text} for text in ("Name", " it.")]
    said = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    (tmp_path / "x.json").write_text(
        json.dumps([{"messages": [*said, {"role": "assistant", "content": "x"}]}])
    )
    (record,) = read_records(tmp_path / "x.json", "chat")
    asked = read_request(json.dumps({"model": "auto", "messages": said}))["messages"]
    assert asked == [*record["history"], {"role": "user", "content": record["instruction"]}]


def test_the_plane_is_where_means_differ_most(double):
    """The axis along which two narrow Gaussians differ becomes the first, and the widest of the others the
    second; on either the pooled deviation is 1."""
    torch.manual_seed(0)
    cov, mean = torch.diag(torch.tensor([0.04, 9.0, 1.0])), torch.tensor([[-1.0, 0, 0], [1, 0, 0]])
    regions = [Region(m, cov, 1.0, 9) for m in mean]
    plane, wanted = Plane.of(regions), torch.tensor([[5.0, 0, 0], [0, 1 / 3, 0]])
    torch.testing.assert_close(plane.axes.abs(), wanted)
    z = torch.tanh(torch.randn(5, 3) / 2)
    torch.testing.assert_close(plane.at(unsquash(z)).abs(), (unsquash(z) @ wanted.T).abs())
    radius = (plane.outline(regions[0]) - plane.axes @ mean[0]).norm(dim=1)
    torch.testing.assert_close(radius, torch.full((64,), 2.4477), atol=1e-4, rtol=0)
    assert 0.94 < float((torch.randn(20_000, 2).norm(dim=1) < radius[0]).double().mean()) < 0.96
    alone, line = Plane.of(regions[:1]), Plane.of([Region(m[:1], cov[:1, :1], 1.0, 9) for m in mean])
    torch.testing.assert_close(alone.axes.abs(), torch.tensor([[0, 1 / 3, 0], [0, 0, 1.0]]))
    assert line.axes.shape == (2, 1) and line.at(z[:, :1])[:, 1].abs().max() == 0
    three = [*regions, Region(torch.tensor([0, 0, 5.0]), cov, 1.0, 9)]
    assert Plane.of(three).axes[:, 1].abs().max() < 1e-9  # nothing differs along the widest


def test_the_server_opens_where_it_says_and_ends_in_one_line(two, capsys):
    """The server opens at the address it prints, and a taken port, a bad option or Ctrl-C gives one line."""
    command = [sys.executable, str(HERE / "eval.py"), *"--web --port 0 --device cpu --run".split(), str(two)]
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
