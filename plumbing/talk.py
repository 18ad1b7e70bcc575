"""A prompt to talk to, a text that comes in pieces, and what may be asked on a command line."""

import contextlib
import os
import sys

import torch

from plumbing import Refused
from plumbing.command import Parser, number, output_file
from plumbing.prompts import prompt_ids, text_of

COMMANDS = "/versions, /use NAME, /auto, /base, /system TEXT or /quit"


def parse_questions(doc, argv=None):
    """Parse the command line of eval.py, whose docstring is `doc`."""
    p = Parser(doc, prog="eval.py")
    add = p.add_argument
    add("--run", nargs="+", help="run folder, or several for mean and deviation [the latest under runs/]")
    add("--backbone", help="where the run's backbone lies now [where it was]")
    add("--device", help="cpu, cuda, mps [what is there]")
    add("--device-map", choices=["auto"], help="spread a backbone over all GPUs, then memory, then disk")
    about = "who answers a prompt like none learned: the nearest version or the bare backbone"
    add("--outside", choices=["nearest", "base"], default="nearest", help=about)
    add("--version", nargs="+", metavar="NAME", help="measure under these, or let the first of them answer")
    add("--like", metavar="FILE", help="ask who has the lowest loss on these labelled records")
    add = p.add_argument_group("what is measured").add_argument
    add("--json", type=output_file, metavar="FILE", help="write what was measured")
    about = "count the validation prompts that are answered exactly right; print SHOW of each task"
    add("--exact-match", nargs="?", type=number(int, 0), const=0, metavar="SHOW", help=about)
    add = p.add_argument_group("answers").add_argument
    add("--prompt", help="an instruction to answer, instead of measuring")
    add("--input", default="", help="the input that goes with --prompt")
    add("--talk", action="store_true", help="answer what is typed or piped in, line after line")
    add("--system", default="", metavar="TEXT", help="the system message that goes before either")
    about = "where an answer is cut off [128; for --exact-match where the longest that was trained ends]"
    add("--max-new-tokens", type=number(int, 1, 10**6), help=about)
    add("--temperature", type=number(float, 0, 100), default=0.0, help="of draws; 0: the likeliest tokens")
    about = "draw from the likeliest tokens that together have this probability"
    add("--top-p", type=number(float, 0, 1), default=1.0, help=about)
    add("--seed", type=number(int, 0, 2**31), default=0, help="of the draws")
    add("--web", action="store_true", help="open a page to talk to; OpenAI's clients can ask there, too")
    add("--port", type=number(int, 0, 65535), default=8765, help="of --web; 0: any that is free")
    add("--host", default="127.0.0.1", help="of --web; any but this lets other machines ask")
    args = p.parse_args(argv)
    said = lambda name: getattr(args, name) != p.get_default(name)
    if why := next((why for why, found in impossible(args, said).items() if found), None):
        p.error(why)
    if args.exact_match is None:
        args.max_new_tokens = args.max_new_tokens or 128
    return args


def impossible(args, said):
    """Return {why it cannot be: whether it is asked for}. said(name): whether an option has another value
    than its default."""
    ways = args.talk + args.web + (args.prompt is not None)
    elsewhere, measures = args.web or not ways, args.json or said("exact_match")
    answers, greedy = ways or said("exact_match"), not args.temperature
    return {
        "--prompt asks once, --talk and --web go on: one of them": ways > 1,
        "--prompt, --talk and --web go with one run folder": ways and len(args.run or ()) > 1,
        "--run names a folder twice": len({*map(os.path.realpath, args.run or ())}) < len(args.run or ()),
        "--json and --exact-match measure: without --prompt, --talk and --web": ways and measures,
        "--max-new-tokens goes with answers, or --exact-match": said("max_new_tokens") and not answers,
        "--temperature goes with --prompt, --talk or --web": args.temperature and not ways,
        "--seed goes with a --temperature, and --prompt or --talk": said("seed") and (elsewhere or greedy),
        "--input goes with --prompt": args.input and args.prompt is None,
        "--host and --port go with --web": (said("host") or said("port")) and not args.web,
        "--system goes with --prompt or --talk": args.system and elsewhere,
        "--top-p goes with a --temperature": args.top_p < 1 and greedy,
        "--version goes with --prompt or --talk; on a page, whoever asks chooses": args.version and args.web,
        "--like goes with --prompt or --talk, not --version": args.like and (args.version or elsewhere),
    }


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


def answer_prompt(run, tokenizer, stream, max_new_tokens, choose, prompt, asked):
    """Print the answer to one prompt as it comes; then say which version gave it, and how sure the routing
    is. stream, asked: see asking.py."""
    ids, found = prompt_ids(prompt, tokenizer, run.template, run.day), []
    steps = stream(ids, lambda who, _: found.append(who), asked, max_new_tokens, choose)
    with contextlib.closing(steps):
        for piece in pieces(tokenizer, steps):
            print(piece, end="", flush=True)
    who = found[0]
    note = f"version {who['version'][:12]}" if who["version"] else "the bare backbone"
    if who["asked"]:
        note += ", as asked"
    else:
        note += f"; nearest region: {who['nearest']}, {100 * who['probability']:.1f} % sure"
        note += "" if who["known"] else "; no version has learned such a prompt"
    print(f"\n\n[{note}]")


def talk(ask, entries, named, bare, history_of, system, asked):
    """Answer one line of input after another, until there is none.

    ask(prompt, asked) prints an answer; asked is who gives it: None is whoever the prompt is routed to,
    `bare` the backbone, named(NAME) a version. entries: those of the versions. history_of(text): see
    `system_message`."""
    history = history_of(system)
    if not (sys.stdin and sys.stdout):
        raise Refused("--talk: there is no standard input or output")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    sys.stdin.reconfigure(errors="replace")  # bytes that are no text are no reason to stop
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
