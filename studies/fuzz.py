"""Damage a run folder at random. Every command then works or says in one line why not, and touches nothing
else.

    python -m studies.fuzz                 # 2,000 damaged run folders, a command on each
    python -m studies.fuzz 1 --start 317   # number 317 again
    python -m studies.fuzz kills           # 60 kills of a training, which still ends with the same bits

A *world* is a folder with four run folders and things beside and inside them that are not ours. `damage`
changes files, links and folders, or writes version files that lie under their true hash. `judge` compares the
whole world before and after: what is not ours is as it was, and no version is lost that no `rollback` was
asked to remove.
"""

import collections
import contextlib
import copy
import faulthandler
import hashlib
import io
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import traceback

HERE = pathlib.Path(__file__).resolve().parent.parent

import huggingface_hub
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save

import commit
from plumbing.command import Parser
import eval as evaluation
import synthetic
import train

PROGRAMS = {"commit": commit.main, "train": train.main, "eval": evaluation.main, "synthetic": synthetic.main}
SECONDS = 10  # no command on a run folder of this size takes as long: it waits for something
OURS = re.compile(
    r"manifest\.json|log\.jsonl|training\.safetensors|data|versions|(versions|data)/orphans(/.*)?"
    r"|versions/[0-9a-f]{64}\.safetensors|data/(alpaca|code|third)\.(val|logits)\.json"
    r"|(versions/|data/)?\.[^/]*\.niwf-tmp"
)
FOREIGN = {
    "notes.txt": "mine",
    "x.tmp": "mine",
    "data/mine.json": "[]",
    "data/mine.train.json": "[]",
    "data/poems.val.json": "[]",
    "versions/readme.md": "mine",
    "versions/weights.safetensors": "mine",
    "versions/x.safetensors.tmp": "mine",
    "sub/.manifest.json.1.niwf-tmp": "mine",
}


class Stuck(Exception):
    """A command took too long."""


# -------------------------------------------------------------------------------------------------- the world


@contextlib.contextmanager
def offline():
    """Within this block nothing is asked of a network: a damaged manifest may name any backbone."""

    def refuse(*args, **kwargs):
        raise OSError("no network in here")

    constants = huggingface_hub.constants
    before = socket.create_connection, constants.HF_HUB_OFFLINE
    socket.create_connection, constants.HF_HUB_OFFLINE = refuse, True
    try:
        yield
    finally:
        socket.create_connection, constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def quiet():
    """Within this block nothing is printed, and who asks is answered y. Gives stdout and stderr."""
    out, err, stdin = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO("y\n" * 9)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield out, err
    finally:
        sys.stdin = stdin


def options(base, task, out, *more):
    """A training of four steps on the backbone and the data in `base`."""
    small = (
        "--device cpu --examples 16 --val-examples 4 --batch 8 --grad-accum 1 --lr 0.02 --epochs 2 --bases 4"
    )
    small += " --top-k 2 --rank 2 --field-hidden 8 --coord-dim 4 --anchors 8 --template chat"
    data = base / "data" / f"{task}.json"
    named = ["--task", task, "--backbone", base / "backbone", "--data", data, "--out", out]
    return [str(x) for x in (*named, *small.split(), *more)]


def interrupted(command, step):
    """Train until Ctrl-C is pressed in this step."""
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def press(*args, **kwargs):
        steps.append(1)
        if len(steps) == step:
            signal.raise_signal(signal.SIGINT)
        return clip(*args, **kwargs)

    torch.nn.utils.clip_grad_norm_ = press
    try:
        train.main(command)
    except KeyboardInterrupt:
        pass
    finally:
        torch.nn.utils.clip_grad_norm_ = clip


CHAT = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<s>assistant\n{% endif %}"


def materials(base):
    """A micro backbone and three small sets of records: Alpaca's, TRL's in lines, and chats."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(HERE / "assets" / "tiny")
    tokenizer.chat_template = CHAT
    torch.manual_seed(7)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, head_dim=8, max_position_embeddings=256
    )
    heads = dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=None)
    config = transformers.MistralConfig(vocab_size=len(tokenizer), **sizes, **heads)
    for part in (transformers.MistralForCausalLM(config), tokenizer):
        part.save_pretrained(base / "backbone")
    records = json.loads((HERE / "assets" / "data" / "alpaca.train.json").read_text())
    (base / "data").mkdir()
    message = lambda role, content: {"role": role, "content": content}
    asked = lambda r: f"{r['instruction']} {r['input']}"
    pair = lambda r: [message("user", asked(r)), message("assistant", r["output"])]
    alpaca, code, third = (records[i : i + 40] for i in (0, 40, 80))
    code = [json.dumps({"prompt": asked(r), "completion": r["output"]}) for r in code]
    third = [{"messages": [message("system", "Be brief."), *pair(r), *pair(r)]} for r in third]
    for task, text in (
        ("alpaca", json.dumps(alpaca)),
        ("code", "\n".join(code)),
        ("third", json.dumps(third)),
    ):
        (base / "data" / f"{task}.json").write_text(text)


def build(base):
    """The world to be damaged, in `base`/world:

    run     alpaca, code under the exact lock, a composition of both
    other   the same alpaca, third, and a composition: what `merge` takes in
    first   alpaca alone
    halted  alpaca, and a training of code that was stopped
    proj    somebody's project, with names that look like ours; target: what links lead to"""
    world = base / "world"
    with quiet(), offline():
        materials(base)
        train.main(options(base, "alpaca", world / "first"))
        for name, task in (("run", "code"), ("other", "third")):
            folder = shutil.copytree(world / "first", world / name)
            train.main(options(base, task, folder, "--lock"))
            commit.main(
                [
                    "compose",
                    "alpaca",
                    task,
                    "--weights",
                    ".5",
                    ".5",
                    "--name",
                    f"with-{task}",
                    "--run",
                    str(folder),
                ]
            )
        shutil.copytree(world / "first", world / "halted")
        interrupted(options(base, "code", world / "halted", "--lock"), 3)
    assert (world / "halted" / "training.safetensors").exists()
    project = {"data/mine.train.json": "[]", "x.tmp": "mine", f"versions/{'0' * 64}.safetensors": "mine"}
    project |= {
        "versions/a.safetensors": "mine",
        "data/code.val.json": "[]",
        ".x.1.niwf-tmp": "mine",
        "runs/x": "mine",
    }
    for folder in ("run", "other", "first", "halted", "proj", "target"):
        for name, text in (project if folder in ("proj", "target") else FOREIGN).items():
            (world / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (world / folder / name).write_text(text)
    return world


def snapshot(folder, prefix=""):
    """{path: contents, link or kind} of everything under a folder. Links are not followed."""
    found = {}
    for entry in os.scandir(folder):
        path = prefix + entry.name
        if entry.is_symlink():
            found[path] = f"link to {os.readlink(entry.path)}"
        elif entry.is_file():
            with open(entry.path, "rb", buffering=0) as f:
                found[path] = f.read()
        else:
            found[path] = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
            if entry.is_dir():
                found |= snapshot(entry.path, path + "/")
    return found


def restore(world, whole):
    """Make a world what it was: cheaper by far than a copy each time."""
    now = snapshot(world)
    for name in sorted((k for k in now if now[k] != whole.get(k)), reverse=True):
        path = world / name
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for name in sorted(k for k in whole if whole[k] != now.get(k)):
        kind, path = whole[name], world / name
        if isinstance(kind, bytes):
            path.write_bytes(kind)
        elif isinstance(kind, str):
            path.symlink_to(kind.removeprefix("link to "))
        else:
            path.mkdir() if kind == stat.S_IFDIR else os.mkfifo(path)


def without_locks(found):
    """A run folder may keep its empty `.lock`."""
    runs = ("run", "other", "first", "halted")
    return {
        k: v for k, v in found.items() if not (k.endswith("/.lock") and k.split("/")[0] in runs and v == b"")
    }


def run_command(program, argv):
    """-> ("worked", what it printed), ("refused", its one line) or ("failed", a traceback)."""

    def ring(*args):
        raise Stuck

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True, file=sys.__stderr__)  # what no signal can end
    try:
        with quiet() as (out, err), torch.set_grad_enabled(program != "eval"):
            PROGRAMS[program](argv)
        return "worked", out.getvalue()
    except SystemExit as e:
        if program == "commit" and argv[0] == "verify" and e.code == 1:
            text = " ".join(line for line in out.getvalue().splitlines() if not line.endswith("  ok"))
        else:
            text = e.code if isinstance(e.code, str) else err.getvalue().removesuffix("\n")
    except commit.Refused as e:
        text = str(e)
    except OSError as e:
        if e.errno is None:  # not the operating system's own
            return "failed", traceback.format_exc()
        text = str(e)
    except BaseException:
        return "failed", traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if len(text.splitlines()) != 1 or not text.isprintable():
        return "failed", f"not one line: {text!r}"
    return "refused", text


# ----------------------------------------------------------------------------------------------------- damage

HOSTILE = [None, True, False, 0, 1, -1, 7, 2.5, 1e308, float("nan"), float("inf"), 10**30]
HOSTILE += ["", "x", "\n", "..", "*", "../../evil", "/etc", "\ud800", "\0", "a" * 300, "0" * 64]
HOSTILE += [[], {}, [[]], [None], {"x": {}}]


def slots_of(value):
    """Every (container, key) in a JSON value."""
    found = []
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            found += slots_of(value[key])
    return found


def damage_json(r, value):
    """A JSON value with one thing in it changed."""
    value = copy.deepcopy(value)
    slots = slots_of(value)
    if not slots or r.random() < 0.02:
        return r.choice(HOSTILE)
    where, key = r.choice(slots)
    old, kind = (
        where[key],
        r.choice(["hostile", "hostile", "delete", "repeat", "copy", "nudge", "wrap", "rename"]),
    )
    if kind == "delete":
        del where[key]
    elif kind == "repeat" and isinstance(where, list):
        where.insert(key, copy.deepcopy(old))
    elif kind == "copy":
        there, other = r.choice(slots)
        where[key] = copy.deepcopy(there[other])
    elif kind == "nudge" and isinstance(old, (int, float)):
        where[key] = r.choice([old + 1, old - 1, -old, old * 2, old + 0.5, str(old)])
    elif kind == "nudge" and isinstance(old, str):
        where[key] = r.choice(
            [old.upper(), old[:-1], old + "\n", f"../{old}", old + "x", f"{old[:4]}\x1b[2J"]
        )
    elif kind == "wrap":
        where[key] = r.choice([[old], {"x": old}, str(old)])
    elif kind == "rename" and isinstance(where, dict):
        where[f"{key}x"] = where.pop(key)
    else:
        where[key] = r.choice(HOSTILE)
    return value


def damage_tensors(r, tensors):
    """One tensor of a dict changed, in place."""
    key = r.choice(sorted(tensors))
    t = tensors[key].clone()
    kind = r.choice(
        ["drop", "extra", "flat", "longer", "shorter", "type", "value", "value", "scale", "noise", "swap"]
    )
    if kind == "drop":
        del tensors[key]
    elif kind == "extra":
        tensors[f"{key}x"] = t
    elif kind == "swap":
        other = r.choice(sorted(tensors))
        tensors[key], tensors[other] = tensors[other].clone(), t
    elif kind == "type":
        tensors[key] = t.to(r.choice([torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]))
    elif kind == "value" and t.numel():
        flat = t.flatten()
        flat[r.randrange(len(flat))] = r.choice([float("nan"), float("inf"), -1e30, -1.0, 0.0])
        tensors[key] = flat.view(t.shape)
    elif kind in ("longer", "shorter") and t.dim():
        tensors[key] = torch.cat([t, t[:1]]) if kind == "longer" else t[: len(t) // 2].clone()
    else:
        tensors[key] = {"scale": t * -1e20, "noise": t + 1e-3}.get(kind, t.flatten())


def read_tensors(path):
    """-> metadata, tensors of a safetensors file."""
    with safe_open(path, "pt") as f:
        return f.metadata(), {k: f.get_tensor(k) for k in f.keys()}


def forge(folder, number, change):
    """Rewrite version or composition `number` so that it lies under its true hash; what names it follows.

    change(header, tensors) changes either in place, or returns the metadata to write."""
    manifest = folder / "manifest.json"
    text, about = manifest.read_text(), json.loads(manifest.read_text())
    renamed = {}
    for i, entry in enumerate(about["versions"] + about["compositions"]):
        path = folder / "versions" / f"{entry['hash']}.safetensors"
        metadata, tensors = read_tensors(path)
        for old, new in renamed.items():
            metadata["version"] = metadata["version"].replace(old, new)
        if i == number:
            head = json.loads(metadata["version"])
            metadata = change(head, tensors)
            metadata = {"version": json.dumps(head, sort_keys=True)} if metadata is None else metadata
        data = save({k: t.contiguous() for k, t in tensors.items()}, metadata)
        renamed[entry["hash"]] = hashlib.sha256(data).hexdigest()
        path.unlink()
        path.with_stem(renamed[entry["hash"]]).write_bytes(data)
    for old, new in renamed.items():
        text = text.replace(old, new)
    manifest.write_text(text)


def lie(r, folder):
    """A version file that lies under its true hash."""

    def change(head, tensors):
        if tensors and r.random() < 0.5:
            return damage_tensors(r, tensors)
        text = json.dumps(damage_json(r, head))
        if r.random() < 0.1:
            return r.choice([{}, {"x": text}, {"version": text[:-1]}, {"version": "[" * 50_000}])
        return {"version": text}

    forge(folder, r.randrange(3), change)


def edit_json(r, folder):
    """A change in the manifest or in a task's validation files."""
    path = r.choice([folder / "manifest.json"] * 3 + sorted((folder / "data").glob("*.*.json")))
    text = json.dumps(damage_json(r, json.loads(path.read_text())))
    path.write_text(r.choice(["[" * 50_000, text + "x", text[:-1]]) if r.random() < 0.05 else text)


def edit_state(r, folder):
    """A change in the state of the unfinished training."""
    path = folder / "training.safetensors"
    metadata, tensors = read_tensors(path)
    if r.random() < 0.5:
        damage_tensors(r, tensors)
    elif r.random() < 0.5:
        metadata["step"] = r.choice(["-1", "1", "4", "999", "1.5", "nan", "", "x", "9" * 30])
    else:
        metadata["about"] = json.dumps(damage_json(r, json.loads(metadata["about"])))
    path.write_bytes(save({k: t.contiguous() for k, t in tensors.items()}, metadata))


def our_files(folder):
    found = [p for p in sorted(folder.rglob("*")) if OURS.fullmatch(p.relative_to(folder).as_posix())]
    return [p for p in found if p.is_file() and not p.is_symlink()]


def edit_bytes(r, folder):
    """A file with flipped, lost or added bytes."""
    path = r.choice(our_files(folder))
    data = bytearray(path.read_bytes())
    kind = r.choice(["flip", "truncate", "append", "empty", "overwrite"])
    at = r.randrange(len(data) + 1)
    if kind == "flip" and data:
        data[at - 1] ^= 1 << r.randrange(8)
    elif kind == "overwrite":
        data[at : at + 16] = r.randbytes(16)
    else:
        data = {"truncate": data[:at], "append": data + r.randbytes(9)}.get(kind, bytearray())
    path.write_bytes(data)


def edit_tree(r, folder):
    """A file or folder that is gone, elsewhere, swapped, a link, a pipe or of another kind."""
    path = r.choice(our_files(folder) + [folder / "versions", folder / "data", folder / ".lock"])
    target = folder.parent / "target"
    kind = r.choice(
        ["remove", "swap", "rename", "folder", "link", "link", "dangling", "loop", "pipe", "project"]
    )
    aside = target / f"moved-{path.name}"
    if path.exists():
        path.rename(aside)
    if kind in ("remove", "rename"):
        aside.rename(path.with_name(f"{path.name}.old")) if kind == "rename" and aside.exists() else None
    elif kind == "swap" and aside.is_file():
        other = r.choice(our_files(folder) or [aside])
        path.write_bytes(other.read_bytes())
        other.write_bytes(aside.read_bytes())
    elif kind == "folder":
        (path / "x").mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(
            {"dangling": target / "none", "loop": path, "project": target.parent / "proj"}.get(kind, aside)
        )


def add_litter(r, folder):
    """What a killed command may have left, and what only looks like it."""
    place = folder / r.choice(["", "versions", "data"])
    names = [
        f".manifest.json.{r.randrange(99)}.niwf-tmp",
        f".{'0' * 64}.safetensors.7.niwf-tmp",
        "manifest.json.tmp",
    ]
    names += [f"{r.randbytes(32).hex()}.safetensors"] * 3 + ["code.val.json", "third.logits.json"]
    path = place / r.choice(names)
    content = next(p for p in (folder.parent / "other" / "versions").glob("*.safetensors") if p.is_file())
    if path.is_file() or not path.exists():  # a pipe would wait for a reader
        path.write_bytes(r.choice([content.read_bytes(), r.randbytes(40), b""]))


def damage(r, folder, unfinished):
    """One to three changes to a run folder. -> their names"""
    kinds = [lie, lie, edit_json, edit_json, edit_bytes, edit_tree, add_litter] + [
        edit_state
    ] * 4 * unfinished
    chosen = sorted(r.choices(kinds, k=r.choice([1, 1, 2, 3])), key=[*kinds].index)
    for kind in chosen:
        with contextlib.suppress(Exception):  # an earlier change may have left nothing for this one to change
            kind(r, folder)
    return [kind.__name__ for kind in chosen]


# ---------------------------------------------------------------------------------------------------- judging

WRITERS = ("rollback", "compose", "merge", "into", "train", "resume")
KINDS = (
    "log show verify verify rollback compose merge merge into export eval answers train resume resume".split()
)


def command_of(r, kind, base, world):
    """-> program, argv, the run folder to be damaged, the one that may be written"""
    run, other, halted = (world / name for name in ("run", "other", "halted"))
    at = ["--run", str(run)]
    names = ["alpaca", "code", "with-code"]
    if kind in ("log", "verify"):
        return "commit", [kind, *at] + r.choice([[], ["--json"]]), run, run
    if kind == "show":
        return "commit", ["show", r.choice(names), *at], run, run
    if kind == "rollback":
        return "commit", ["rollback", r.choice(names), *at] + r.choice([[], ["--cascade"]]), run, run
    if kind == "compose":
        return "commit", ["compose", "alpaca", "code", "--weights", ".5", "1", "--name", "new", *at], run, run
    if kind in ("merge", "into"):
        return "commit", ["merge", str(other), *at], other if kind == "merge" else run, run
    if kind == "export":
        more = r.choice([[], ["--merged"]])
        return "commit", ["export", r.choice(names), "--to", str(world / "lora"), *more, *at], run, run
    if kind == "eval":
        return "eval", [*at, "--json", str(world / "out.json"), "--device", "cpu"], run, run
    if kind == "answers":
        more = [["--exact-match", "2"], ["--version", r.choice(names)], ["--prompt", "Say x."]]
        return "eval", [*at, *r.choice(more), "--max-new-tokens", "2", "--device", "cpu"], run, run
    folder, task = (run, "third") if kind == "train" else (halted, "code")
    return "train", options(base, task, folder, "--lock"), folder, folder


def entries_of(found, name):
    """{hash: entry} of a run folder in a snapshot; none if its manifest cannot be read."""
    try:
        manifest = json.loads(found[f"{name}/manifest.json"])
        return {e["hash"]: e for kind in ("versions", "compositions") for e in manifest[kind]}
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


def judge(before, after, kind, name, worked):
    """What was lost or touched that should not have been, a line each. `name`: the folder that may change."""
    before, after = without_locks(before), without_locks(after)
    made = {"export": "lora", "merged": "lora", "eval": "out.json"}.get(kind)
    task = {"train": "third", "resume": "code"}.get(kind)
    then, now = entries_of(before, name), entries_of(after, name)
    removed = {h for h in then if h not in now} if kind == "rollback" and worked else set()
    tasks = {task, *(then[h]["task"] for h in removed)}
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) == after.get(path) or (worked and path.split("/")[0] == made):
            continue
        folder, _, rest = path.partition("/")
        may = folder == name and kind in WRITERS and OURS.fullmatch(rest) and (worked or kind == "train")
        if may and path in before and rest.startswith("data/") and not rest.endswith("niwf-tmp"):
            may = rest.split("/")[1].rsplit(".", 2)[0] in tasks
        if not may:
            yield f"{path} was {'made' if path not in before else 'changed' if path in after else 'lost'}"
    kept = {v for k, v in after.items() if k.startswith(f"{name}/versions/")}
    for path, content in before.items():
        match = re.fullmatch(rf"{name}/versions/([0-9a-f]{{64}})\.safetensors", path)
        if match and content not in kept and match[1] not in removed:
            yield f"{path} is lost"
    for digest in then.keys() - now.keys() - removed:
        yield f"{name}: the manifest no longer names {digest[:12]}"


def readable(folder):
    try:
        return bool(commit.Run(folder))
    except (commit.Refused, OSError):
        return False


def one(base, whole, seed, number):
    """Damage number `number`, and a command on what it left. -> kind, outcome, complaints"""
    r = random.Random(f"{seed}/{number}")
    world = base / "world"
    kind = r.choice(KINDS)
    program, argv, damaged, written = command_of(r, kind, base, world)
    changes = damage(r, damaged, damaged.name == "halted")
    before, read = snapshot(world), readable(written)
    outcome, text = run_command(program, argv)
    complaints = [text] if outcome == "failed" else []
    told = (
        outcome == "worked" or "not finite at step" in text
    )  # the training had begun, and its state is kept
    complaints += judge(before, snapshot(world), kind, written.name, told)
    complaints += [f"{written.name} cannot be read any more"] * (read and not readable(written))
    restore(world, whole)
    return kind, outcome, [f"after {', '.join(changes)}: {c}" for c in complaints]


def fuzz(n, seed, folder, start=0):
    """n damaged run folders, made in `folder`. -> {(kind of command, outcome): count}, [what went wrong]"""
    base, cwd = pathlib.Path(folder).resolve(), os.getcwd()
    whole = snapshot(build(base))
    counts, wrong = collections.Counter(), []
    os.chdir(base)
    try:
        with offline():
            for number in range(start, start + n):
                kind, outcome, complaints = one(base, whole, seed, number)
                counts[kind, outcome] += 1
                wrong += [f"{kind}, --seed {seed} --start {number}, {c}" for c in complaints]
    finally:
        os.chdir(cwd)
    return counts, wrong


# ------------------------------------------------------------------------------------------------------ kills

SCRIPT = "import sys, train; train.SAVE_EVERY = 0; train.main(sys.argv[1:])"


def start(base, folder, epochs):
    command = [sys.executable, "-c", SCRIPT, *options(base, "code", folder, "--lock", "--epochs", epochs)]
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, **silent)


def outcome_of(folder):
    """What must not depend on how often a training was killed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return [v["hash"] for v in manifest["versions"]], manifest["results"]


def starts_of(folder):
    """The steps that trainings of code began at."""
    rows = [
        json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if line.endswith("}")
    ]
    return [row["start"] for row in rows if "start" in row and row.get("task") == "code"]


def kill_once(r, base, folder, epochs, seconds, how):
    """Start the training and end it at a random moment, often after its first step. -> was it running?"""
    before, process = len(starts_of(folder)), start(base, folder, epochs)
    if r.random() < 2 / 3:
        while process.poll() is None and len(starts_of(folder)) == before:
            time.sleep(0.01)
        time.sleep(r.uniform(0, 0.4 * seconds))
    else:
        time.sleep(r.uniform(0, seconds))
    running = process.poll() is None
    process.send_signal(how)
    process.wait()
    return running


def kills(n, seed, folder, epochs=60):
    """n kills, up to eight before a training may end. -> kills that led to equal bits, resumed starts"""
    r, base = random.Random(seed), pathlib.Path(folder).resolve()
    world = build(base)
    whole = shutil.copytree(world / "first", base / "whole")
    began = time.time()
    assert start(base, whole, epochs).wait() == 0
    seconds, signals = time.time() - began, [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    done = equal = resumed = 0
    while done < n:
        killed = shutil.copytree(world / "first", base / f"killed-{len([*base.iterdir()])}")
        here = 0
        for _ in range(min(8, n - done)):
            if not kill_once(r, base, killed, epochs, seconds, signals[(done + here) % 3]):
                break
            here += 1
        ended = start(base, killed, epochs).wait() == 0
        same = ended and outcome_of(killed) == outcome_of(whole)
        done, equal = done + here, equal + here * same
        resumed += sum(step > 0 for step in starts_of(killed))
        print(
            f"{done:4} kills, {equal} of them to equal bits, {resumed} starts from a saved state", flush=True
        )
    return equal, resumed


def main(argv=None):
    p = Parser(__doc__, prog="fuzz.py")
    p.add_argument("what", nargs="?", default="2000", help="how many run folders to damage [2000], or: kills")
    p.add_argument("count", nargs="?", type=int, default=60, help="how many kills")
    p.add_argument("--seed", type=int, default=0, help="of what is damaged, and when it is killed")
    p.add_argument("--start", type=int, default=0, help="the first number")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "kills":
            equal, resumed = kills(args.count, args.seed, folder)
            print(f"{equal} of {args.count} kills to equal bits, {resumed} resumed from a saved state")
            sys.exit(equal < args.count)
        counts, wrong = fuzz(int(args.what), args.seed, folder, args.start)
    for line in wrong:
        print(line)
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:10}" + "".join(f"{counts[kind, o]:6} {o}" for o in ("worked", "refused", "failed")))
    took = time.time() - began
    print(f"{sum(counts.values())} run folders damaged in {took:.0f} s, {len(wrong)} things wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
