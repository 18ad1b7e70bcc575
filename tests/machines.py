"""The environment: help, signals, little memory, full disks, folders that cannot be written."""

import importlib.util
import io
import os
import re
import signal
import subprocess
import sys

import pytest

from plumbing.command import Parser, run_program
from studies import fuzz
from tests.builders import HERE, PROGRAMS, evaluate, refused
from tests.hostile import argv_of, refuses, untouched, works

try:
    import resource
except ImportError:  # Windows
    resource = None


def says_in_one_line(code, err, match):
    """See that a program that ended badly has printed one line, apart from its progress."""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "step/s" not in line]
    assert code != 0 and "Traceback" not in err and len(lines) == 1 and re.search(match, lines[0]), err


@pytest.mark.parametrize("program", ["commit", "train", "eval", "synthetic"])
def test_ctrl_c_while_torch_is_imported_is_one_line(program, tmp_path):
    """Ctrl-C ends a program in one line while torch is being imported; a module in its place says when that
    has begun."""
    source = "import time\nprint('begun', flush=True)\nfor _ in range(600):\n    time.sleep(1)"
    (tmp_path / "torch.py").write_text(source)
    how = dict(cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    how["env"] = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, str(HERE / f"{program}.py"), "--help"], **how)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=6000)[1]
    says_in_one_line(process.returncode, err, f"{program}.py: stopped")


def test_a_closed_pipe_ends_a_command_without_a_word(two):
    """A command whose reader has gone, as with `| head`, ends without printing an error."""
    command = [sys.executable, str(HERE / "commit.py"), "log", "--run", str(two)]
    ours, its = os.pipe()
    os.close(ours)
    process = subprocess.run(command, stdout=its, stderr=subprocess.PIPE, text=True, timeout=6000)
    os.close(its)
    assert (process.stderr, process.returncode) == ("", 1)


def test_closed_ends_are_no_traceback(two, monkeypatch):
    """The shell may close a program's output or input: `>&-`, `<&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    run_program(lambda: print("unheard"))
    for stdin in (io.StringIO("Hi."), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        with refused("there is no standard input or output", two):
            evaluate(two, "--talk")


@pytest.mark.parametrize("program", ["train", "synthetic"])
def test_without_a_terminal_no_bar_is_drawn(program, micro, tmp_path, monkeypatch, capsys):
    """Where the output is no terminal, no bar is drawn, and the last step is told in a plain line."""
    monkeypatch.chdir(tmp_path)
    argv = "--variant clf --methods fixedmask --tasks 2 --steps 5".split()
    if program == "train":
        argv = micro("alpaca", "run", *"--examples 32 --val-examples 8 --epochs 1".split())
    ours, its = os.pipe()
    with open(its, "w") as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        PROGRAMS[program].main(argv)
    with open(ours, newline="") as pipe:
        err, out = pipe.read(), capsys.readouterr().out
    assert "\r" not in err + out and not re.search(r"/s\]|%\|", err)
    assert len(re.findall("^(step 2/2|clf fixedmask seed 0) ", out, re.MULTILINE)) == 1


GROUPS = "answers synthetic neurons memory compose sequence styles report pictures make_tiny digits support "
GROUPS += "settings sure depths architectures"
GROUPS = dict.fromkeys([*GROUPS.split(), "commit log", "commit verify"], ["options"])
GROUPS |= dict.fromkeys(
    [f"bench {c}" for c in "niwf decode first-token ftn growth memory".split()], ["options"]
)
GROUPS |= dict.fromkeys(
    "stream kinds variants fuzz commit bench found".split(), ["positional arguments", "options"]
)
GROUPS |= {f"commit {c}": GROUPS["commit"] for c in "show rollback compose merge export".split()}
GROUPS["train"] = ["optimisation", "bank, field and coordinate (sections 3.1-3.3)", "commitment and locks"]
GROUPS["eval"] = ["options", "what is measured", "answers"]


@pytest.mark.parametrize("command", GROUPS)
def test_help_explains_every_option_and_has_an_example(command, monkeypatch, capsys):
    """The --help of every command explains each option, states numeric defaults, and shows examples."""
    program, *argv = command.split()
    module = importlib.import_module(program if program in PROGRAMS else f"studies.{program}")
    asked, show = [], Parser.print_help
    monkeypatch.setattr(Parser, "print_help", lambda self: [asked.append(self), show(self)])
    with pytest.raises(SystemExit) as e:
        module.main([*argv, "--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0 and "\x1b" not in text
    for group in GROUPS[command]:
        assert re.search(rf"^{re.escape(group)}.*:$", text, re.MULTILINE), group
    examples, ours = text.partition("\nexamples:\n")[2].splitlines(), rf"    python (-m studies\.)?{program}"
    assert examples and all(re.match(rf"{ours}(\.py)?( |$)", line) for line in examples)
    for action in asked[0]._actions:
        assert action.help and (not action.option_strings or action.option_strings[0] in text), action
        if type(action.default) in (int, float):
            assert re.search(r"\[.+\]$", asked[0]._get_formatter()._expand_help(action)), action


def train_limited(argv, limit, value):
    """Train in a process that has no HOME and may not go beyond a limit."""

    def limit_it():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(limit, (value, value))

    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "HF_HOME", "XDG_CACHE_HOME")}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    how = dict(preexec_fn=limit_it, env=env, capture_output=True, text=True, timeout=600)
    return subprocess.run([sys.executable, str(HERE / "train.py"), *argv], **how)


@pytest.mark.skipif(not resource, reason="no limits here")
def test_a_full_disk_is_one_line_and_the_training_goes_on_later(base, world):
    """No file may be as large as a version or the state of a training. There is no HOME either."""
    command, before = fuzz.options(base, "code", world / "first", "--lock"), fuzz.snapshot(world)
    process = train_limited(command, resource.RLIMIT_FSIZE, 20_000)
    says_in_one_line(process.returncode, process.stderr, "train.py: .*(large|space)")
    after = fuzz.snapshot(world)
    assert fuzz.entries_of(after, "first") == fuzz.entries_of(before, "first")
    written = "first/log.jsonl", "first/manifest.json"
    assert all(after.get(k) == v for k, v in before.items() if k not in written)
    assert not [k for k in after if k.endswith(".niwf-tmp") and k not in before]
    works("train", command)
    assert fuzz.outcome_of(world / "first") == fuzz.outcome_of(world / "run")


@pytest.mark.skipif(sys.platform != "linux", reason="no such limit here")
def test_little_memory_is_one_line(base, world):
    """A training that gets too little memory ends in one line that says so, and no file changes."""
    command = fuzz.options(base, "third", world / "new", *"--rank 4096 --bases 4096 --top-k 1".split())
    with untouched(world):
        process = train_limited(command, resource.RLIMIT_DATA, 2**31)
    says_in_one_line(process.returncode, process.stderr, "train.py: not enough memory")


def only_readers_work(base, world, match, system=False):
    """See that commands that write refuse to, that others work, and that nothing changes."""
    with untouched(world):
        for command in ("rollback", "compose", "into", "train"):
            refuses(*argv_of(command, base, world / "run"), match, system)
        for command in ("log", "verify", "eval"):
            works(*argv_of(command, base, world / "run"))


def test_a_run_folder_that_cannot_be_written_is_one_line(base, world):
    """In a read-only run folder, commands that write are refused in one line, and those that read work."""
    folders = [world / "run" / part for part in (".", "versions", "data")]
    for folder in folders:
        folder.chmod(0o555)
    try:
        if os.access(folders[0], os.W_OK):
            pytest.skip("root writes everywhere")
        only_readers_work(base, world, "denied|read-only|cannot", system=True)
    finally:
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.skipif(not importlib.util.find_spec("fcntl"), reason="no fcntl here")
def test_a_second_process_is_refused_until_the_first_ends(base, world):
    """While a process writes to a run folder others may read it, but not write until it has ended."""
    run, hold = ascii(str(world / "run")), "print(flush=True), time.sleep(600)"
    script = f"import commit, time\nwith commit.Run({run}).exclusive(): {hold}"
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=HERE)
    try:
        holder.stdout.readline()
        only_readers_work(base, world, "another process is at work")
    finally:
        holder.kill()
        holder.wait()
    works(*argv_of("rollback", base, world / "run"))
