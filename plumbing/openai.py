"""Chat completions as OpenAI's clients speak them: what a request may say, and what is answered.

Beside OpenAI's own fields an answer has the field "niwf": which version gives it and how sure that is, see
`who_answers` in asking.py; "coordinate", where the prompt lies in the plane of `draw_plane`; and "gating",
for every adapted layer the bases that run and their weights. What a request leaves unsaid is as on the
command line: the likeliest tokens are taken, where OpenAI's own default is a temperature of 1. Without a seed
every answer is drawn anew.
"""

import contextlib
import dataclasses
import pathlib
import queue
import secrets
import time
from collections.abc import Callable

import torch

from plumbing import Refused, forms
from plumbing.files import AUTO, BASE, is_text, parse_json
from plumbing.passes import context_of, room_for, sampler
from plumbing.prompts import prompt_ids, refuse_left_out
from plumbing.talk import pieces

ROLES = {role: forms.ROLES[role] for role in ("system", "developer", "user", "assistant")}


class Wrong(Refused):
    """An error that is sent as OpenAI's error object, with an HTTP status."""

    def __init__(self, message, status=400, param=None, code=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self):
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


# ------------------------------------------------------------------------------------------------- a request


def between(low, high, *kinds):
    """Return a test: a number of one of these types, no bool, in [low, high]."""
    return lambda value: type(value) in kinds and low <= value <= high


def are_stops(value):
    stops = value if isinstance(value, list) else [value]
    return len(stops) <= 4 and all(is_text(stop) and 0 < len(stop) <= 500 for stop in stops)


COUNT = between(1, 10**6, int), "a whole number from 1 to 1000000"
NONE = lambda x: x in ([], {}), "empty, and this server does nothing with it"
# The fields that change an answer, each with a test and what it says if it is wrong; null is as if not said.
FIELDS = {
    "model": (is_text, "the id of a model, see /v1/models"),
    "messages": (lambda m: isinstance(m, list) and m, "a list of messages"),
    "stream": (lambda x: type(x) is bool, "true or false"),
    "stream_options": (lambda x: isinstance(x, dict), "an object"),
    "temperature": (between(0, 2, int, float), "a number from 0 to 2"),
    "top_p": (between(0, 1, int, float), "a number from 0 to 1"),
    "max_tokens": COUNT,
    "max_completion_tokens": COUNT,
    "seed": (between(-(2**63), 2**63 - 1, int), "a whole number of 64 bits"),
    "n": (between(1, 1, int), "1: one answer is computed at a time"),
    "stop": (are_stops, "a text of at most 500 characters, or a list of up to four"),
    "tools": NONE,
    "functions": NONE,
    "logit_bias": NONE,
    "frequency_penalty": (between(0, 0, int, float), "0: nothing is penalised"),
    "presence_penalty": (between(0, 0, int, float), "0: nothing is penalised"),
    "logprobs": (lambda x: x is False, "false: none are sent"),
    "response_format": (lambda x: x == {"type": "text"}, 'the only one there is, {"type": "text"}'),
}


def message_of(message, where):
    """Return a message as {"role", "content": a text}. Raises Wrong if it is none that can be written."""
    if not isinstance(message, dict) or message.get("role") not in [*ROLES]:
        raise Wrong(f"{where}: it has no role out of {', '.join(ROLES)}", param=where)
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in parts]
    if not texts or not all(map(is_text, texts)):
        raise Wrong(f"{where}: its content is no text", param=where)
    return {"role": ROLES[message["role"]], "content": "".join(texts)}


def read_request(body):
    """Return what a body asks for: the fields above that it has, and "messages" as `message_of` makes them.
    Other fields are ignored. Raises Refused as `parse_json` does, and Wrong if one of these is wrong."""
    found = parse_json(body, "the body")
    if not isinstance(found, dict):
        raise Wrong("the body: it is no JSON object")
    asked = {key: found[key] for key in FIELDS if found.get(key) is not None}
    for key in ("model", "messages", *asked):
        if key not in asked:
            raise Wrong(f"{key}: it is missing", param=key)
        fits, what = FIELDS[key]
        if not fits(asked[key]):
            raise Wrong(f"{key}: {ascii(asked[key])[:60]} is not {what}", param=key)
    asked["messages"] = [message_of(m, f"messages[{i}]") for i, m in enumerate(asked["messages"])]
    if asked["messages"][-1]["role"] != "user":
        raise Wrong("messages: the last is not the user's", param="messages")
    return asked


class Job:
    """A request that waits in line, and the events of its answer, see `Answers.answer`."""

    def __init__(self, request):
        self.request, self.events, self.gone = request, queue.SimpleQueue(), False

    def tell(self, event):
        """Pass on an event. Raises ConnectionError once whoever asked has gone away."""
        if self.gone:
            raise ConnectionAbortedError
        self.events.put(event)


# ------------------------------------------------------------------------------------------------- an answer


def send_until(texts, stops, send):
    """Send pieces of text, each as soon as it cannot begin one of `stops`, up to the first of those. Return
    whether there was one."""
    held = ""
    for text in texts:
        held += text
        if found := [held.index(stop) for stop in stops if stop in held]:
            send(held[: min(found)])
            return True
        begun = [n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])]
        sure = len(held) - max(begun, default=0)
        send(held[:sure])
        held = held[sure:]
    send(held)
    return False


@dataclasses.dataclass
class Answers:
    """What a server answers. named(NAME): a version and its gating, bare: the same of the bare backbone,
    stream: `stream_answer`, see asking.py. defaults: what a request does not say: max_new_tokens,
    temperature, top_p."""

    run: object
    backbone: torch.nn.Module
    tokenizer: object
    stream: Callable
    named: Callable
    bare: tuple
    plane: object  # see plane.py
    defaults: object

    def warm_up(self):
        """Answer something, because a first pass is slow, and for whoever asks first it should not be."""
        with contextlib.suppress(Refused):  # a template may insist on a system message
            hello = [{"role": "user", "content": "Hello."}]
            self.answer({"model": AUTO, "messages": hello, "max_tokens": 2}, lambda _: None)

    def models(self):
        """Return the list of models: auto, base, and every version and composition under its hash."""
        known = [{"id": name, "name": name, "created": 0} for name in (AUTO, BASE)]
        for e in self.run.entries:
            created = 0
            with contextlib.suppress(ValueError, OverflowError):  # what has a date's characters may be none
                created = int(time.mktime(time.strptime(e["date"], "%Y-%m-%d %H:%M:%S")))
            known.append({"id": e["hash"], "name": e["task"], "created": created})
        return {"object": "list", "data": [{**m, "object": "model", "owned_by": "niwf"} for m in known]}

    def draw_plane(self):
        """Return what a page draws: the outline of every version's region in the plane, whose version every
        basis of the bank is, and what a request may leave unsaid."""
        run, versions, owners = self.run, [], []
        for i, v in enumerate(run.versions):
            outline = [[round(x, 4) for x in point] for point in self.plane.outline(v.region).tolist()]
            versions.append({"id": v.hash, "name": v.task, "lock": v.lock, "outline": outline})
            owners += [i] * (v.writes if run.speaker(i) is v else 0)
        settings, layers = run.manifest["settings"], len(run.versions[0].snapshot[0])
        about = {"template": run.template, "layers": layers, "bare": settings["bare_layers"]}
        about |= {"backbone": pathlib.PurePath(run.manifest["backbone"]["name"]).name, "bases": owners}
        about |= {"temperature": self.defaults.temperature, "max_tokens": self.defaults.max_new_tokens}
        compositions = [{"id": c.hash, "name": c.task} for c in run.compositions]
        return {**about, "versions": versions, "compositions": compositions}

    def asked(self, name):
        """Return who is to answer, as `stream_answer` takes it. Raises Wrong if there is no such model."""
        try:
            return None if name == AUTO else self.bare if name == BASE else self.named(name)
        except Refused:
            why = f"model: there is no {name[:80]!r}, see /v1/models"
            raise Wrong(why, 404, "model", "model_not_found") from None

    def prompt(self, messages):
        """Return the tokens of a chat in the run's own template, and how many may follow. Raises Refused as
        `prompt_ids` does, and Wrong if there is no room for any."""
        how = self.tokenizer, self.run.template, self.run.day
        history = [m for m in messages[:-1] if m["content"] or m["role"] != "system"]
        record = {"instruction": messages[-1]["content"], "history": history}
        refuse_left_out([record], *how)
        ids = prompt_ids(record, *how)
        try:
            return ids, room_for(len(ids), context_of(self.backbone) or 2048)
        except Refused as e:
            raise Wrong(f"messages: {e}", param="messages", code="context_length_exceeded") from None

    @torch.no_grad()
    def answer(self, request, tell):
        """Answer a request (see `read_request`). tell gets one event after another: {"niwf": ...} as soon as
        the prompt is read, {"text": ...} after every token, and at last {"finish_reason", "usage"}. What it
        raises stops the answer. Raises Refused or Wrong, with nothing told, if there can be none."""
        say, new = request.get, []
        asked, (ids, room) = self.asked(request["model"]), self.prompt(request["messages"])
        longest = say("max_completion_tokens", say("max_tokens", self.defaults.max_new_tokens))
        how = say("temperature", self.defaults.temperature), say("top_p", self.defaults.top_p)
        longest, choose = min(longest, room), sampler(*how, say("seed", secrets.randbelow(2**31)))

        def place(who, gating):
            (at,) = self.plane.at(who.pop("u")).tolist()
            rows = zip(*(t[0].tolist() for t in gating)) if gating else ()
            bases = [[[i, round(w, 4)] for i, w in zip(*row)] for row in rows]  # [L][K]: a basis, its weight
            tell({"niwf": {**who, "coordinate": [round(x, 4) for x in at], "gating": bases}})

        with contextlib.closing(self.stream(ids, place, asked, longest, choose)) as steps:
            texts = pieces(self.tokenizer, (new.append(step) or step for step in steps))
            stops = [stop] if isinstance(stop := say("stop", []), str) else stop
            stopped = send_until(texts, stops, lambda text: tell({"text": text}))
        counts = {"prompt_tokens": len(ids), "completion_tokens": len(new)}
        ended = "stop" if stopped or len(new) < longest else "length"
        tell({"finish_reason": ended, "usage": {**counts, "total_tokens": sum(counts.values())}})


# ------------------------------------------------------------------------------------- what is sent of it


def begin(kind):
    """Return what every object that is sent of an answer begins with."""
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time())}


def completion(events):
    """Return a whole answer, made of the events of `Answers.answer`, as one object."""
    said = {key: value for event in events for key, value in event.items()}
    text = "".join(event.get("text", "") for event in events)
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None}
    choice["finish_reason"] = said["finish_reason"]
    about = begin("chat.completion") | {"model": said["niwf"]["version"] or BASE}
    return {**about, "choices": [choice], "usage": said["usage"], "niwf": said["niwf"]}


def chunks(events, request):
    """Yield the objects of a stream, as the events of `Answers.answer` come."""
    said = begin("chat.completion.chunk")

    def chunk(delta, finish=None, **more):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**said, "choices": [choice], **more}

    for event in events:
        if "niwf" in event:
            said["model"] = event["niwf"]["version"] or BASE
            yield chunk({"role": "assistant", "content": ""}, niwf=event["niwf"])
        if event.get("text"):
            yield chunk({"content": event["text"]})
        if "finish_reason" in event:
            yield chunk({}, event["finish_reason"])
            if request.get("stream_options", {}).get("include_usage") is True:
                yield {**said, "choices": [], "usage": event["usage"]}
