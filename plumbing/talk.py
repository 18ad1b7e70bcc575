"""A prompt to talk to, and a text that comes in pieces."""

import contextlib
import os
import sys

import torch

from plumbing import Refused
from plumbing.prompts import prompt_ids, text_of

COMMANDS = "/versions, /use NAME, /auto, /base, /system TEXT or /quit"


def pieces(tokenizer, steps):
    """Yield the text of one response, stripped, in pieces as its tokens come. Hold back what may still
    change: what the last token alone says, half a character, spaces that may be the last."""
    ids, text, said = [], "", 0
    for tokens in steps:
        ids += tokens.values()
        before, text = text, text_of(tokenizer, ids)
        sure = os.path.commonprefix([before, text]).rstrip("\ufffd").strip()
        yield sure[said:]
        said = max(said, len(sure))
    yield text.strip()[said:]


def answer_prompt(run, tokenizer, stream, how, prompt, asked=None):
    """Print the answer to one prompt as it comes; then say which version gave it, and how sure the routing
    is. stream, asked: see `stream_answer` in eval.py. how: what it takes besides."""
    ids, found = prompt_ids(prompt, tokenizer, run.template, run.day), []
    steps = stream(ids, found.append, asked, **how)
    with contextlib.closing(steps):
        for piece in pieces(tokenizer, steps):
            print(piece, end="", flush=True)
    who = found[0]
    note = f"version {who['version'][:12]}" if who["version"] else "the bare backbone"
    if who["asked"]:
        note += ", as asked"
    else:
        note += f"; nearest region: {who['nearest']}, {100 * who['probability']:.1f} % sure; "
        note += f"the coordinate is {'inside' if who['inside'] else 'outside'} it"
    print(f"\n\n[{note}]")


def talk(ask, entries, named, bare, history_of, system="", asked=None):
    """Answer one line of input after another, until there is none.

    ask(prompt, asked) prints an answer; asked is who gives it: None is whoever the prompt is routed to,
    `bare` the backbone, named(NAME) a version. entries: those of the versions. history_of(text): see
    `system_message`."""
    history = history_of(system)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    for end in (sys.stdin, sys.stdout):
        end.reconfigure(errors="replace")  # bytes that are no text are no reason to stop
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  `input` then edits lines and keeps a history
        print(f"Ask something, or say {COMMANDS}. Ctrl-C stops an answer.")
    while True:
        try:
            line = input("> " if terminal else "").strip()
            command, _, name = line.partition(" ")
            if command == "/quit":
                return
            elif command == "/versions":
                print("\n".join(f"{e['hash'][:12]}  {e['task']}" for e in entries))
            elif command == "/use":
                asked = named(name.strip())
            elif command in ("/auto", "/base"):
                asked = bare if command == "/base" else None
            elif command == "/system":
                history = history_of(name.strip())
            elif command.startswith("/"):
                raise Refused(f"{command}: no such command; say {COMMANDS}")
            elif line:
                ask({"instruction": line, "history": history}, asked)
                print()
        except (Refused, torch.OutOfMemoryError) as e:
            print(f"[{Refused(e)}]")
        except EOFError:
            return print(end="\n" if terminal else "")
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\n[stopped; /quit or Ctrl-D leaves]")
