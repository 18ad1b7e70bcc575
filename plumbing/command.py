"""What the command lines of all programs share: options in a table, numbers in a range, files of results."""

import argparse
import json
import os
import pathlib
import platform
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import torch
import transformers
from safetensors import SafetensorError

from plumbing import HOME, Refused
from plumbing.files import atomic, is_text, read_json, temporary
from plumbing.processes import joined_processes


# Options that name something. An empty name is none, and would be taken for an option that is not given.
NAMES = "run out data val_data backbone device like push json at model expected".split()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Show every default in one way, " [default]", unless the help text says it in words."""

    def _get_help_string(self, action):
        plain = type(action.default) in (int, float, str) and action.default not in ("", argparse.SUPPRESS)
        return f"{action.help} [%(default)s]" if plain and "[" not in action.help else action.help


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, and takes text only. Its --help begins and ends
    with what a program's docstring says: the first sentences, and the command lines that it is for."""

    def __init__(self, doc, **how):
        super().__init__(formatter_class=HelpFormatter, **how)
        self.color = False  # Python 3.14 has it on
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse takes -1e6 for an option
        program = re.escape(self.prog).replace(r"\.py", r"(\.py)?", 1)
        mine = re.compile(rf"    python (-m studies\.)?{program}\b")
        examples = [line for line in doc.splitlines() if mine.match(line)]
        self.description = self.description or doc.partition("\n\n")[0]
        notes = [textwrap.fill(self.epilog, 100)] if self.epilog else []
        self.epilog = "\n\n".join([*notes, "\n".join(["examples:", *examples])])

    def parse_known_args(self, args=None, namespace=None):
        for text in sys.argv[1:] if args is None else args:
            if not is_text(text):  # Python reads a byte that is no UTF-8 as half a surrogate pair
                self.error(f"{ascii(text)} is not text")
        found, rest = super().parse_known_args(args, namespace)
        for key in NAMES:  # as where a shell's variable is not set
            if getattr(found, key, None) == "":
                self.error(f"--{key.replace('_', '-')}: its value is empty")
        return found, rest

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def number(kind, low, high=1e9):
    """Return an argparse type: a number of this kind in [low, high], which leaves out nan and inf."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of type {kind.__name__}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: at least {low:g}, at most {high:g}")
        return value

    return parse


class Option(NamedTuple):
    """A line of a table {title: {flag: Option}}. how: for `add_argument`. preset: what takes the place of the
    default where a preset is asked for. fixed: whether the value that a run's first task had stays."""

    how: dict
    help: str
    default: object = None
    preset: object = None
    fixed: bool = False


def column(table, field):
    """Return {name: value} of one field of all options that have one."""
    options = [line for part in table.values() for line in part.items()]
    found = {flag[2:].replace("-", "_"): getattr(option, field) for flag, option in options}
    return {key: value for key, value in found.items() if value is not None and value is not False}


def add_options(parser, table):
    """Give a parser the options, a group for each part of the table. One with a default is absent from what
    is parsed if it is not said, so that `fill_in` knows what was said."""
    for title, options in table.items():
        group = parser.add_argument_group(title)
        for flag, (how, text, default, *_) in options.items():
            if default is not None:
                text, how = f"{text} [{default}]", {**how, "default": argparse.SUPPRESS}
            group.add_argument(flag, help=text, **how)


def fill_in(args, defaults, preset, fixed, where):
    """Fill in what was not said: what a first task fixed, then the preset, then the defaults. Raises Refused,
    naming `where`, if what was said is not what was fixed."""
    for key, value in {**defaults, **preset, **fixed}.items():
        given = getattr(args, key, value)
        if key in fixed and given != value:
            option = f"--{key.replace('_', '-')} {given}"
            raise Refused(f"{option} does not fit {where}: its first task fixed {value}")
        setattr(args, key, given)


def output_file(text):
    """Check a JSON file to write results to, before anything is computed; an argparse type. An older file of
    results may be replaced, any other file may not."""
    path = pathlib.Path(text).resolve()  # of a link, what it leads to
    try:
        if path.exists() and not {"command", "rows"} <= {*read_json(path, own=False)}:
            raise ValueError
        trial = temporary(path)  # `atomic` writes under a name as long as this one
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as e:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written ({e.strerror})") from None
    except (Refused, ValueError, TypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is there and holds no results of this program") from None
    return path


def provenance():
    """Return what a result depends on besides its options: date, revision, versions, machine."""
    git = ["git", "-C", HOME, "rev-parse", "HEAD"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = None
    cpus = pathlib.Path("/proc/cpuinfo")  # Sums differ in their last bits between models of processors.
    model = re.search(r"^model name\s*: (.*)", cpus.read_text() if cpus.exists() else "", re.MULTILINE)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "git": revision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "processor": model[1] if model else platform.processor(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }


def write_results(path, program, argv, indent=None, **content):
    """Write a file of results, if one was asked for: the command that made it, what it depends on besides,
    and the content."""
    if not path:
        return
    command = shlex.join(["python", *program.split(), *(sys.argv[1:] if argv is None else argv)])
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)  # JSON has no Infinity, no NaN
    with atomic(path) as tmp:
        tmp.write_text(json.dumps({"command": command, **provenance(), **content}, indent=indent))


def run_program(main):
    """Run a program's `main`. An error that the user can mend, and Ctrl-C, end in one line and not in a
    traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for out in filter(None, (sys.stdout, sys.stderr)):  # None: the shell has closed it
        out.reconfigure(errors="replace")  # a terminal that cannot show a letter is no reason to stop
    name = pathlib.Path(sys.argv[0]).name
    try:
        with joined_processes():
            main()
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # as in `log | head`: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (Refused, OSError, SafetensorError, MemoryError) as e:
        raise SystemExit(f"{name}: {' '.join(str(e).split()) or 'not enough memory'}") from None
    except RuntimeError as e:
        if "memory" not in str(e):
            raise
        raise SystemExit(f"{name}: not enough memory ({str(e).splitlines()[0]})") from None
    except KeyboardInterrupt as e:
        raise SystemExit(f"\n{name}: {str(e) or 'stopped'}") from None
