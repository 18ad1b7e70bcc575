"""Damage a run folder at random. Every command then works or says in one line why not, and touches nothing
else.

    python -m studies.fuzz                 # 2,000 damaged run folders, a command on each
    python -m studies.fuzz 1 --start 317   # number 317 again

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
import stat
import sys
import tempfile
import traceback
from unittest import mock

import huggingface_hub
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save

import commit
import eval as evaluation
import synthetic
import train
from plumbing.command import Parser, run_program

HERE = pathlib.Path(__file__).resolve().parent.parent
PROGRAMS = {"commit": commit.main, "train": train.main, "eval": evaluation.main, "synthetic": synthetic.main}
SECONDS = 10  # no command on a run folder of this size takes as long: it waits for something
OURS = re.compile(
    r"manifest\.json|log\.jsonl|training\.safetensors|data|versions|(versions|data)/orphans(/.*)?"
    r"|versions/[0-9a-f]{64}\.safetensors|data/(alpaca|code|third)\.(val|logits)\.json"
    r"|(versions/|data/)?\.[^/]*\.niwf-tmp"
)
FOREIGN = "notes.txt x.tmp data/mine.json data/mine.train.json data/poems.val.json versions/readme.md"
FOREIGN += " versions/weights.safetensors versions/x.safetensors.tmp sub/.manifest.json.1.niwf-tmp"
PROJECT = f"data/mine.train.json x.tmp versions/{'0' * 64}.safetensors versions/a.safetensors"
PROJECT += " data/code.val.json .x.1.niwf-tmp runs/x"
RUNS = "run", "other", "first", "halted"


class Stuck(Exception):
    """A command took too long."""


@contextlib.contextmanager
def offline():
    """Within this block nothing is asked of a network: a damaged manifest may name any backbone."""
    with mock.patch("socket.create_connection", side_effect=OSError("no network in here")):
        with mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True):
            yield


@contextlib.contextmanager
def quiet():
    """Within this block nothing is printed, and who asks is answered y. Gives stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "stdin", io.StringIO("y\n" * 9)):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield out, err


def options(base, task, out, *more):
    """A training of four steps on the backbone and the data in `base`."""
    small = "--device cpu --examples 16 --val-examples 4 --batch 8 --grad-accum 1 --lr 0.02 --epochs 2"
    small += " --bases 4 --top-k 2 --rank 2 --field-hidden 8 --coord-dim 4 --anchors 8 --template chat"
    data = base / "data" / f"{task}.json"
    named = ["--task", task, "--backbone", base / "backbone", "--data", data, "--out", out]
    return [str(x) for x in (*named, *small.split(), *more)]


def interrupted(command, step):
    """Train until Ctrl-C is pressed in this step."""
    clip, steps = torch.nn.utils.clip_grad_norm_, iter(range(1, step))

    def press(*args, **kwargs):
        if next(steps, None) is None:
            signal.raise_signal(signal.SIGINT)
        return clip(*args, **kwargs)

    with mock.patch("torch.nn.utils.clip_grad_norm_", press), contextlib.suppress(KeyboardInterrupt):
        train.main(command)


CHAT = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<s>assistant\n{% endif %}"


def materials(base):
    """A micro backbone and three small sets of records: Alpaca's, TRL's in lines, and chats."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(HERE / "assets" / "tiny")
    tokenizer.chat_template = CHAT
    torch.manual_seed(7)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256)
    config = transformers.MistralConfig(**sizes, sliding_window=None)
    for part in (transformers.MistralForCausalLM(config), tokenizer):
        part.save_pretrained(base / "backbone")
    records = json.loads((HERE / "assets" / "data" / "alpaca.train.json").read_text())
    asked = [f"{r['instruction']} {r['input']}" for r in records]
    message = lambda role, content: {"role": role, "content": content}
    pair = lambda i: [message("user", asked[i]), message("assistant", records[i]["output"])]
    code = [{"prompt": asked[i], "completion": records[i]["output"]} for i in range(40, 80)]
    third = [{"messages": [message("system", "Be brief."), *pair(i), *pair(i)]} for i in range(80, 120)]
    texts = {"alpaca": json.dumps(records[:40]), "code": "\n".join(map(json.dumps, code))}
    (base / "data").mkdir()
    for task, text in (texts | {"third": json.dumps(third)}).items():
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
            composed = ["compose", "alpaca", task, "--weights", ".5", ".5", "--name", f"with-{task}"]
            commit.main([*composed, "--run", str(folder)])
        shutil.copytree(world / "first", world / "halted")
        interrupted(options(base, "code", world / "halted", "--lock"), 3)
    assert (world / "halted" / "training.safetensors").exists()
    for folder in (*RUNS, "proj", "target"):
        for name in (FOREIGN if folder in RUNS else PROJECT).split():
            (world / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (world / folder / name).write_text("mine")
    return world


def snapshot(folder, prefix=""):
    """{path: contents, link or kind} of everything under a folder. Links are not followed."""
    found = {}
    for entry in os.scandir(folder):
        path = prefix + entry.name
        if entry.is_symlink():
            found[path] = f"link to {os.readlink(entry.path)}"
        elif entry.is_file():
            found[path] = pathlib.Path(entry.path).read_bytes()
        else:
            found[path] = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
            found |= snapshot(entry.path, path + "/") if entry.is_dir() else {}
    return found


def restore(world, whole):
    """Make a world what it was: cheaper by far than a copy each time."""
    now = snapshot(world)
    changed = sorted(k for k in now.keys() | whole.keys() if now.get(k) != whole.get(k))
    for path in [world / name for name in reversed(changed) if name in now]:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for path, kind in [(world / name, whole[name]) for name in changed if name in whole]:
        if isinstance(kind, bytes):
            path.write_bytes(kind)
        elif isinstance(kind, str):
            path.symlink_to(kind.removeprefix("link to "))
        else:
            path.mkdir() if kind == stat.S_IFDIR else os.mkfifo(path)


def without_locks(found):
    """A run folder may keep its empty `.lock`."""
    locks = {f"{run}/.lock" for run in RUNS}
    return {k: v for k, v in found.items() if k not in locks or v != b""}


def run_command(program, argv):
    """-> ("worked", what it printed), ("refused", its one line) or ("failed", a traceback)."""

    def ring(*_):
        raise Stuck

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True, file=sys.__stderr__)  # what no signal can end
    try:
        with quiet() as (out, err), torch.set_grad_enabled(program != "eval"):
            PROGRAMS[program](argv)
        return "worked", out.getvalue()
    except SystemExit as e:
        text = e.code if isinstance(e.code, str) else err.getvalue().removesuffix("\n")
        if argv[:1] == ["verify"] and e.code == 1:
            text = " ".join(line for line in out.getvalue().splitlines() if not line.endswith("  ok"))
    except (commit.Refused, OSError) as e:
        text = traceback.format_exc() if getattr(e, "errno", 0) is None else str(e)  # not the system's own
    except BaseException:
        text = traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return ("refused" if len(text.splitlines()) == 1 and text.isprintable() else "failed"), text


HOSTILE = [None, True, False, 0, 1, -1, 7, 2.5, 1e308, float("nan"), float("inf"), 10**30]
HOSTILE += ["", "x", "\n", "..", "*", "../../evil", "/etc", "\ud800", "\0", "a" * 300, "0" * 64]
HOSTILE += [[], {}, [[]], [None], {"x": {}}]


def slots_of(value):
    """Every (container, key) in a JSON value."""
    keys = [*value] if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [slot for key in keys for slot in ((value, key), *slots_of(value[key]))]


def damage_json(r, value):
    """A JSON value with one thing in it changed."""
    value = copy.deepcopy(value)
    slots = slots_of(value)
    if not slots or r.random() < 0.02:
        return r.choice(HOSTILE)
    (where, key), (there, other) = r.choice(slots), r.choice(slots)
    how = r.choice(["delete", "more", *["set"] * 5])
    old, nudged = where[key], HOSTILE
    if isinstance(old, (int, float)):
        nudged = [old + 1, old - 1, -old, old * 2, old + 0.5]
    elif isinstance(old, str):
        nudged = [old.upper(), old[:-1], old + "\n", f"../{old}", old + "x", f"{old[:4]}\x1b[2J"]
    if how == "delete":
        del where[key]
    elif how == "more" and isinstance(where, list):
        where.insert(key, copy.deepcopy(old))
    elif how == "more":
        where[f"{key}x"] = where.pop(key)
    else:
        copied, wrapped = copy.deepcopy(there[other]), [[old], {"x": old}, str(old)]
        where[key] = r.choice([copied, *map(r.choice, (HOSTILE, HOSTILE, nudged, wrapped))])
    return value


def damage_tensors(r, tensors):
    """One tensor of a dict changed, gone or in place of another, in place."""
    key = r.choice(sorted(tensors))
    t = tensors.pop(key)
    changed, flat = [t, t.flatten(), t * -1e20, t + 1e-3], t.flatten().clone()
    changed += [t.to(r.choice([torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]))]
    changed += [torch.cat([t, t[:1]]), t[: len(t) // 2]] if t.dim() else []
    if len(flat):
        flat[r.randrange(len(flat))] = r.choice([float("nan"), float("inf"), -1e30, -1.0, 0.0])
        changed += [flat.view(t.shape)] * 2
    if r.random() < 0.9:
        name = r.choice([key] * 8 + [f"{key}x", r.choice(sorted(tensors) or [key])])
        tensors[name] = r.choice(changed[name == key :])


def read_tensors(path):
    """-> metadata, tensors of a safetensors file."""
    with safe_open(path, "pt") as f:
        return f.metadata(), {k: f.get_tensor(k) for k in f.keys()}


def write_tensors(path, tensors, metadata):
    """Write a safetensors file. -> its hash"""
    data = save({k: t.clone().contiguous() for k, t in tensors.items()}, metadata)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def rewrite(path, change):
    """Change a safetensors file: change(metadata, tensors), in place."""
    metadata, tensors = read_tensors(path)
    change(metadata, tensors)
    write_tensors(path, tensors, metadata)


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
        renamed[entry["hash"]] = write_tensors(path, tensors, metadata)
        path.rename(path.with_stem(renamed[entry["hash"]]))
    for old, new in renamed.items():
        text = text.replace(old, new)
    manifest.write_text(text)


def lie(r, folder):
    """A version file that lies under its true hash."""

    def change(head, tensors):
        if tensors and r.random() < 0.5:
            return damage_tensors(r, tensors)
        text = json.dumps(damage_json(r, head))
        lies = [{}, {"x": text}, {"version": text[:-1]}, {"version": "[" * 50_000}]
        return r.choice([{"version": text}] * 36 + lies)

    forge(folder, r.randrange(3), change)


def edit_json(r, folder):
    """A change in the manifest or in a task's validation files."""
    data = [p for p in our_files(folder) if p.parent.name == "data"]
    path = r.choice([folder / "manifest.json"] * 3 + data)
    text = json.dumps(damage_json(r, json.loads(path.read_text())))
    path.write_text(r.choice(["[" * 50_000, text + "x", text[:-1]]) if r.random() < 0.05 else text)


def our_files(folder):
    found = [p for p in sorted(folder.rglob("*")) if OURS.fullmatch(p.relative_to(folder).as_posix())]
    return [p for p in found if p.is_file() and not p.is_symlink()]


def edit_bytes(r, folder):
    """A file with flipped, lost or added bytes."""
    path = r.choice(our_files(folder))
    data = bytearray(path.read_bytes())
    at, noise = r.randrange(len(data) + 1), r.randbytes(16)
    flipped = data[:at] + bytes(b ^ 1 << r.randrange(8) for b in data[at : at + 1]) + data[at + 1 :]
    path.write_bytes(r.choice([flipped, data[:at], data + noise, b"", data[:at] + noise + data[at + 16 :]]))


def edit_tree(r, folder):
    """A file or folder that is gone, or has another file, a link or a pipe in its place."""
    path = r.choice(our_files(folder) + [folder / "versions", folder / "data", folder / ".lock"])
    aside = folder.parent / "target" / f"moved-{path.name}"
    kind = r.choice(["remove", "swap", "link", "loop", "pipe"])
    if path.exists():
        path.rename(aside)
    if kind == "swap" and aside.is_file():
        other = r.choice(our_files(folder) or [aside])
        path.write_bytes(other.read_bytes())
        other.write_bytes(aside.read_bytes())
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("link", "loop"):
        path.symlink_to(aside if kind == "link" else path)


def damage(r, folder):
    """One to three changes to a run folder. -> their names"""
    kinds = [lie, edit_json, edit_bytes, edit_tree]
    chosen = sorted(r.choices(kinds, (2, 2, 1, 1), k=r.choice([1, 1, 2, 3])), key=kinds.index)
    for kind in chosen:
        with contextlib.suppress(Exception):  # an earlier change may have left nothing for this one to change
            kind(r, folder)
    return [kind.__name__ for kind in chosen]


WRITERS = ("rollback", "compose", "merge", "into", "train", "resume")
KINDS = "log show verify verify rollback compose merge merge into export eval answers train resume resume"


def command_of(r, kind, base, world):
    """-> program, argv, the run folder to be damaged, the one that may be written"""
    run, other, halted = (world / name for name in ("run", "other", "halted"))
    if kind in ("train", "resume"):
        folder, task = (run, "third") if kind == "train" else (halted, "code")
        return "train", options(base, task, folder, "--lock"), folder, folder
    name, at = r.choice(["alpaca", "code", "with-code"]), ["--run", str(run)]
    if kind in ("eval", "answers"):
        more = [["--exact-match", "2"], ["--version", name], ["--prompt", "Say x."]]
        how = r.choice(more) if kind == "answers" else ["--json", str(world / "out.json")]
        return "eval", [*at, *how, "--max-new-tokens", "2", "--device", "cpu"], run, run
    argv = {
        "show": ["show", name],
        "rollback": ["rollback", name, *r.choice([[], ["--cascade"]])],
        "compose": "compose alpaca code --weights .5 1 --name new".split(),
        "merge": ["merge", str(other)],
        "into": ["merge", str(other)],
        "export": ["export", name, "--to", str(world / "lora"), *r.choice([[], ["--merged"]])],
    }.get(kind, [kind, *r.choice([[], ["--json"]])])
    return "commit", [*argv, *at], other if kind == "merge" else run, run


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
    with contextlib.suppress(commit.Refused, OSError):
        return bool(commit.Run(folder))
    return False


def one(base, whole, seed, number):
    """Damage number `number`, and a command on what it left. -> kind, outcome, complaints"""
    r = random.Random(f"{seed}/{number}")
    world = base / "world"
    kind = r.choice(KINDS.split())
    program, argv, damaged, written = command_of(r, kind, base, world)
    changes = damage(r, damaged)
    before, read = snapshot(world), readable(written)
    outcome, text = run_command(program, argv)
    complaints = [text] if outcome == "failed" else []
    told = outcome == "worked" or "not finite at step" in text  # a training had begun, and its state is kept
    complaints += judge(before, snapshot(world), kind, written.name, told)
    complaints += [f"{written.name} cannot be read any more"] * (read and not readable(written))
    restore(world, whole)
    return kind, outcome, [f"after {', '.join(changes)}: {c}" for c in complaints]


def fuzz(n, seed, folder, start=0):
    """n damaged run folders, made in `folder`. -> {(kind of command, outcome): count}, [what went wrong]"""
    base = pathlib.Path(folder).resolve()
    whole, counts, wrong = snapshot(build(base)), collections.Counter(), []
    with contextlib.chdir(base), offline():
        for number in range(start, start + n):
            kind, outcome, complaints = one(base, whole, seed, number)
            counts[kind, outcome] += 1
            wrong += [f"{kind}, --seed {seed} --start {number}, {c}" for c in complaints]
    return counts, wrong


def outcome_of(folder):
    """What must not depend on how often a training was stopped."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return [v["hash"] for v in manifest["versions"]], manifest["results"]


def main(argv=None):
    p = Parser(__doc__, prog="fuzz.py")
    p.add_argument("count", nargs="?", type=int, default=2000, help="how many run folders to damage")
    p.add_argument("--seed", type=int, default=0, help="of what is damaged")
    p.add_argument("--start", type=int, default=0, help="the first number")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        counts, wrong = fuzz(args.count, args.seed, folder, args.start)
    for line in wrong:
        print(line)
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:10}" + "".join(f"{counts[kind, o]:6} {o}" for o in ("worked", "refused", "failed")))
    print(f"{sum(counts.values())} run folders damaged, {len(wrong)} things wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    run_program(main)
