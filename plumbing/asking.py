"""Who answers a prompt, and how it is asked: on a page, in a talk, or once.

Everywhere `asked` is who is to answer: a version and its gating as a function of h_bar, or None, and then the
prompt is routed.
"""

import functools

from plumbing.files import BASE
from plumbing.openai import Answers
from plumbing.passes import context_of, room_for, sampler
from plumbing.plane import Plane
from plumbing.prompts import stop_ids, system_message
from plumbing.server import serve
from plumbing.talk import answer_prompt, talk


def answering(run, found, outside):
    """Return the version that answers each row of a Route; None is the bare backbone."""
    sent = zip(found.choice.tolist(), found.known().tolist())
    return [run.versions[i] if known or outside == "nearest" else None for i, known in sent]


def who_answers(run, h_bar, asked, outside):
    """Return the gating of one prompt, h_bar [1, features], and who answers it:

    version, name          its hash and name (in a shared bank: whose address is asked); None: the backbone
    asked                  whether it was asked for
    nearest, probability   the likeliest region, and how likely it is
    known                  whether that region is likelier than the background
    u                      artanh of the coordinate [1, d]"""
    gating, found = run.routed(h_bar, outside)
    (version,) = answering(run, found, outside)
    if asked:
        version, gating = asked[0], asked[1](h_bar)
    who = {"version": version and version.hash, "name": version.task if version else BASE}
    who |= {"asked": bool(asked), "nearest": run.versions[found.choice[0]].task}
    who |= {"probability": float(found.probability[0]), "known": bool(found.known()[0]), "u": found.u}
    return gating, who


def stream_answer(run, model, tokenizer, outside, prompt, tell, asked, max_new_tokens, choose):
    """Stream the answer to one prompt (tokens) as `NIWF.stream` does. tell(who, gating) is called before the
    first token, see `who_answers`. The answer ends where the backbone's context does. Raises Refused as
    `room_for` does."""
    room = room_for(len(prompt), context_of(model.backbone))
    longest = min(max_new_tokens, room or max_new_tokens)

    def gating_of(h_bar):
        gating, who = who_answers(run, h_bar, asked, outside)
        tell(who, gating)
        return gating

    ends = stop_ids(model.backbone, tokenizer, run.template)
    return model.stream([prompt], gating_of, ends, longest, choose, run.probe_gating())


def answer_as_asked(run, model, tokenizer, named, bare, asked, args):
    """Serve a page, talk, or answer one prompt, as the options say. named(NAME): the version of that name and
    its gating; bare: the same of the bare backbone."""
    stream = functools.partial(stream_answer, run, model, tokenizer, args.outside)
    if args.web:
        plane = Plane.of([v.region for v in run.versions])
        answers = Answers(run, model.backbone, tokenizer, stream, named, bare, plane, args)
        return serve(answers, args.host, args.port)
    choose = sampler(args.temperature, args.top_p, args.seed)
    ask = functools.partial(answer_prompt, run, tokenizer, stream, args.max_new_tokens, choose)
    history_of = functools.partial(system_message, tokenizer=tokenizer, template=run.template, day=run.day)
    if args.talk:
        return talk(ask, run.entries, named, bare, history_of, args.system, asked)
    return ask({"instruction": args.prompt, "input": args.input, "history": history_of(args.system)}, asked)
