"""A server for one run folder, on the standard library's: a page to talk to, and what `openai.py` speaks.

Whoever connects is not trusted. A connection has a thread of its own; where there are too many, the one that
has not asked for longest is closed. Requests wait in line for the main thread, which computes one answer at a
time; a client that goes away stops its answer. Everything here is for pages of this server alone.
"""

import base64
import contextlib
import hashlib
import http.server
import ipaddress
import itertools
import json
import math
import queue
import re
import socket
import socketserver
import sys
import threading
import time
import urllib.parse

from plumbing import HOME, Refused
from plumbing.openai import Job, Wrong, chunks, completion, read_request

PAGE = HOME / "assets" / "page.html"
CONNECTIONS = 64  # open at a time, each with a thread
PATIENCE = 10.0  # seconds that a client has to send a request; one read or write may take twice as long
LARGEST = 2**20  # bytes in the body of a request
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
HEADERS |= {"Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer"}


def page_policy(page):
    """Return the Content-Security-Policy of a page: its one script, its one style, and this server alone. No
    text can be made HTML."""
    parts = {tag: re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1] for tag in ("script", "style")}
    digest = {tag: hashlib.sha256(part.encode()).digest() for tag, part in parts.items()}
    own = "; ".join(f"{tag}-src 'sha256-{base64.b64encode(d).decode()}'" for tag, d in digest.items())
    rest = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"{rest}; frame-ancestors 'none'; require-trusted-types-for 'script'; {own}"


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Accepts connections in `serve_forever`, and computes answers in `work`. answers: see `Answers`."""

    allow_reuse_address, daemon_threads, request_queue_size = True, True, 128

    def __init__(self, answers, host, port):
        known = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        self.address_family, *_, address = known[0]
        super().__init__(address, Handler)
        self.answers, self.host, self.line = answers, host, queue.SimpleQueue()
        self.slots, self.lock = threading.Semaphore(CONNECTIONS), threading.Lock()
        self.open = {}  # connections, and when the time of each ends; None: it may take as long as it takes
        page, models = PAGE.read_text(encoding="utf-8"), answers.models()
        policy = {"Content-Security-Policy": page_policy(page)}
        self.found = {"/": (page.encode(), "text/html; charset=utf-8", policy)}
        self.found |= {"/plane": (answers.draw_plane(),), "/v1/models": (models,)}
        self.found |= {f"/v1/models/{m[key]}": (m,) for m in models["data"] for key in ("name", "id")}

    def next_job(self):
        """Return what is next in line. Wait a second at a time: a signal that comes just before a wait is
        seen when the wait ends."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self.line.get(timeout=1)

    def work(self):
        """Compute one answer after another, until there is None in line."""
        while job := self.next_job():
            try:
                if not job.gone:
                    self.answers.answer(job.request, job.tell)
            except Exception as e:
                if not isinstance(e, Refused):
                    self.handle_error()
                    e = Wrong(f"the answer failed: {type(e).__name__}", 500)
                job.events.put(e if isinstance(e, Wrong) else Wrong(e))

    def handle_error(self, *connection):
        """Print the error that is being handled in one line. That a client breaks off is no error:
        the thread of its connection then raises some OSError, and `work` a ConnectionError."""
        e = sys.exc_info()[1]
        if not isinstance(e, OSError if connection else ConnectionError):
            print(Refused(f"[{type(e).__name__}: {e}"[:300] + "]"), file=sys.stderr, flush=True)

    def grant(self, connection, seconds):
        """Give a connection so many seconds from now to send its request; with None as many as it takes."""
        with self.lock:
            self.open[connection] = seconds and time.monotonic() + seconds

    def hurry(self, late, most=None):
        """Stop reading from connections whose time ends before `late`, from at most `most`, the oldest first.
        Their threads then see an end, and answer what has come so far. Return how many there were."""
        with self.lock:
            found = [c for c, until in self.open.items() if until and until < late][:most]
            for connection in found:
                self.open[connection] = None
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)
        return len(found)

    def service_actions(self):
        """Stop reading from those whose time is up. The standard library calls this twice a second."""
        self.hurry(time.monotonic())

    def process_request(self, connection, address):
        """Give a connection a thread. If none is free, the one that has waited longest is ended for it."""
        if not self.slots.acquire(blocking=False):
            if not self.hurry(math.inf, 1) or not self.slots.acquire(timeout=1):
                with contextlib.suppress(OSError):
                    connection.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\n\r\n")
                    connection.shutdown(socket.SHUT_WR)
                    connection.settimeout(0.1)
                    late = time.monotonic() + 0.5
                    while time.monotonic() < late and connection.recv(2**16):
                        pass  # To close with something unread would undo the reply, see `Handler.finish`.
                return self.shutdown_request(connection)
        self.grant(connection, PATIENCE)
        super().process_request(connection, address)

    def shutdown_request(self, connection):
        """Close a connection, and give back its place if it had one. This is called once, in all cases."""
        super().shutdown_request(connection)
        with self.lock, contextlib.suppress(KeyError):
            del self.open[connection]
            self.slots.release()


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection, one request."""

    timeout, disable_nagle_algorithm = 2 * PATIENCE, True  # of one read or write; all of a request has less
    default_request_version = "HTTP/1.0"
    version_string = lambda self: "niwf"

    def log_message(self, *_):
        """Keep no log of requests."""

    def reply(self, status, body, kind="application/json", more=()):
        """Send a whole reply."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.begin(status, kind, {"Content-Length": len(body), **dict(more)})
        self.wfile.write(body)

    def begin(self, status, kind, more=()):
        """Send the headers of a reply."""
        self.send_response(status)
        for key, value in {"Content-Type": kind, **HEADERS, **dict(more)}.items():
            self.send_header(key, value)
        self.end_headers()

    def send_error(self, code, message=None, explain=None):
        """Send what the standard library finds wrong with a request as OpenAI's error object."""
        text = message or http.HTTPStatus(code).phrase
        self.reply(code, Wrong(f"no request that is known here: {text}", code).body())

    def finish(self):
        """Wait a moment until the client has closed: with something unread, closing would undo the reply."""
        with contextlib.suppress(OSError):
            super().finish()
            self.connection.shutdown(socket.SHUT_WR)
            self.server.grant(self.connection, 1.0)
            while self.connection.recv(2**16):
                pass

    def check_origin(self):
        """Raise Wrong unless a request is meant for this server, and comes from no other site. A name that
        somebody lets point here (DNS rebinding) stands in Host."""
        address, port = self.connection.getsockname()[:2]
        address = address.removeprefix("::ffff:")  # so a server for IPv6 sees a client of IPv4
        names = {name.lower() for name in ("localhost", self.server.host, address)}
        hosts = {f"[{name}]" if ":" in name else name for name in names}
        hosts = {f"{name}:{port}" for name in hosts} | (hosts if port == 80 else set())
        said, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if len(said) != 1 or said[0].lower() not in hosts:
            raise Wrong(f"Host {', '.join(said)[:80]!r} is not this server: {', '.join(sorted(hosts))}", 403)
        if any(origin.lower() != f"http://{said[0].lower()}" for origin in origins):
            raise Wrong(f"Origin {', '.join(origins)[:80]!r} is another site", 403)

    def read_body(self):
        """Return the body of a request. Raises Wrong if it is no JSON, too large, or does not come."""
        kind, lengths = self.headers.get_content_type(), self.headers.get_all("Content-Length", [])
        if kind != "application/json":
            raise Wrong(f"Content-Type: {kind[:80]!r} is not application/json", 415)
        if self.headers.get("Transfer-Encoding") or len(lengths) != 1:
            raise Wrong("Content-Length: it must be there once, to tell where the body ends", 411)
        if not re.fullmatch("[0-9]{1,18}", lengths[0]):
            raise Wrong(f"Content-Length: {lengths[0][:80]!r} is no length")
        if int(lengths[0]) > LARGEST:
            raise Wrong(f"the body: {lengths[0]} bytes are more than {LARGEST}", 413)
        body = self.rfile.read(int(lengths[0]))
        if len(body) < int(lengths[0]):
            raise Wrong(f"the body: {len(body)} bytes came of {lengths[0]}", 408)
        return body

    def route(self):
        """Answer one request."""
        path, found = urllib.parse.unquote(self.path.partition("?")[0]), self.server.found
        try:
            self.check_origin()
            if self.command == "GET" and path in found:
                self.reply(200, *found[path])
            elif self.command == "POST" and path == "/v1/chat/completions":
                self.complete()
            else:
                raise Wrong(f"{self.command} {path[:80]}: there is nothing at this path", 404)
        except Refused as e:
            e = e if isinstance(e, Wrong) else Wrong(e)
            self.reply(e.status, e.body())

    do_GET = do_POST = route

    def complete(self):
        """Put a request in line, and send its answer as it comes, or when it is whole."""
        job = Job(read_request(self.read_body()))
        self.server.grant(self.connection, None)
        self.server.line.put(job)
        try:
            if job.request.get("stream"):
                self.send_stream(chunks(self.events(job), job.request))
            else:
                self.reply(200, completion([*self.events(job)]))
        finally:
            job.gone = True

    def events(self, job):
        """Yield the events of an answer as they come. Raises ConnectionError once the client has gone, and
        Wrong if there is no answer."""
        event = {}
        while "finish_reason" not in event:
            with contextlib.suppress(queue.Empty):
                event = job.events.get(timeout=0.2)
                if isinstance(event, Wrong):
                    raise event
                yield event
            self.connection.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                if not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionAbortedError
            self.connection.settimeout(self.timeout)

    def send_stream(self, found):
        """Send objects as server-sent events. What goes wrong once there was one is the last of them."""
        send = lambda text: self.wfile.write(f"data: {text}\n\n".encode())
        first = next(found)
        self.begin(200, "text/event-stream")
        try:
            for chunk in itertools.chain([first], found):
                send(json.dumps(chunk))
            send("[DONE]")
        except Wrong as e:
            send(json.dumps(e.body()))


def serve(answers, host, port):
    """Serve until Ctrl-C. Raises Refused if the address cannot be had."""
    try:
        server = Server(answers, host, port)
    except (OSError, UnicodeError) as e:
        raise Refused(f"--host {host} --port {port}: {getattr(e, 'strerror', None) or e}") from None
    answers.warm_up()
    address, port = server.server_address[:2]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        print(f"Whoever can reach {address} can ask: there is no password, and nothing is encrypted.")
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}/ is open; Ctrl-C closes it", flush=True)
    try:
        server.work()
    finally:
        server.shutdown()
        server.server_close()
