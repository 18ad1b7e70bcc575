"""What is refused, in one line, with every byte still there: tables of bad inputs over all readers."""

import collections
import itertools
import json
import os
import pathlib
import re
import shutil

import pytest
import torch

from studies import fuzz
from tests.builders import RECORD

HERE = pathlib.Path(__file__).parent.parent

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None


# What is refused, in one line, with every byte still there.
#
# A table of bad inputs over all readers. Each is tried in the world that `studies/fuzz.py` builds: run
# folders with files inside and beside them that are not ours. Then what must work all the same, and the
# environment: no room, no memory, no right to write.

ABSENT, NAN, INF = object(), float("nan"), float("inf")
DEEP = "[" * 100_000
SURROGATE = "a \ud800 b"
CLOCK = {"date": "2026-01-01 00:00:00"}
MANIFEST, VERSION, STATE = (
    r"manifest\.json",
    r"manifest\.json|safetensors|[0-9a-f]{12}",
    r"training\.safetensors",
)

# folder: the run folder that `damage` is called with; commands: what must refuse it, see `argv_of`
Case = collections.namedtuple("Case", "name folder damage commands match")


def put(tree, path, value):
    """Set what "a.0.b" names in a JSON value, or remove it."""
    *way, last = [int(k) if k.isdigit() else k for k in path.split(".")]
    for key in way:
        tree = tree[key]
    if value is ABSENT:
        del tree[last]
    else:
        tree[last] = value(tree) if callable(value) else value


def in_json(file, path, value):
    def damage(folder):
        tree = json.loads((folder / file).read_text())
        put(tree, path, value)
        (folder / file).write_text(json.dumps(tree))

    return damage


def content(file, data):
    def damage(folder):
        (folder / file).unlink(missing_ok=True)
        if data is not ABSENT:
            (folder / file).write_bytes(data if isinstance(data, bytes) else data.encode())

    return damage


def moved(file, *, back=None, where="target"):
    """What is at `file` goes elsewhere; `back` makes something in its place, a link to it if not given."""

    def damage(folder):
        path, aside = folder / file, folder.parent / where / "moved"
        aside = aside / path.name
        aside.parent.mkdir(exist_ok=True)
        if path.exists():
            path.rename(aside)
        back(path) if back else path.symlink_to(aside)

    return damage


def dangling(path):
    path.symlink_to(path.with_name("none"))


def version_path(folder, number):
    about = json.loads((folder / "manifest.json").read_text())
    entry = (about["versions"] + about["compositions"])[number]
    return pathlib.Path("versions", f"{entry['hash']}.safetensors")


def version_file(number, change):
    """`change`(name of the file of a version) gives the damage."""
    return lambda folder: change(version_path(folder, number))(folder)


def lying(number, change):
    return lambda folder: fuzz.forge(folder, number, change)


def in_head(number, path, value):
    return lying(number, lambda head, tensors: put(head, path, value))


def in_tensors(number, key, change):
    """`change`(tensor) replaces a tensor; None removes it."""

    def edit(head, tensors):
        new = change(tensors[key])
        tensors[key] = new
        if new is None:
            del tensors[key]

    return lying(number, edit)


def in_state(key, change=None, **metadata):
    """The saved state of a training with one tensor or some of its metadata changed."""

    def damage(folder):
        path = folder / "training.safetensors"
        about, tensors = fuzz.read_tensors(path)
        key_of = next((k for k in sorted(tensors) if re.search(key, k)), None)
        if change:
            new = change(tensors.pop(key_of))
            tensors |= {} if new is None else {key_of: new}
        about = {k: v for k, v in (about | metadata).items() if v is not None}
        path.write_bytes(fuzz.save({k: t.contiguous() for k, t in tensors.items()}, about))

    return damage


def named(value):
    text = "absent" if value is ABSENT else "computed" if callable(value) else ascii(value)
    return text if len(text) < 30 else f"{text[:20]}...{len(text)}"


# ---------------------------------------------------------------------------------------- the manifest's rows

PATHS = ["../../evil", "a/b", "..", "*", "", "code\n", "a\0b", SURROGATE, "-x", "a b", "x" * 65]
NO_TASK, NO_TEXT = [*PATHS, 7, None, []], [ABSENT, 7, None, [], {}]
NO_HASH = [ABSENT, 7, None, "", "0" * 63, "0" * 65, "g" * 64, "../" + "0" * 64, "0" * 64 + "\n"]
NO_HASH += [lambda e: e["hash"].upper(), lambda e: "../versions/" + e["hash"], lambda e: e["hash"][:12]]
NO_NUMBER = [ABSENT, "3", None, [], NAN, INF, -INF, -1.5, 10**400]
NO_COUNT = ["1", None, -1, 1.5, NAN]
NO_DICT, NO_LIST = [ABSENT, None, 7, "x", []], [ABSENT, None, 7, "x", {}]

IN_MANIFEST = {
    "format": [ABSENT, 0, 2, "1", None, []],
    "more": [1],
    "backbone": [ABSENT, None, [], {}, "tiny"],
    "backbone.name": [ABSENT, 7, None, []],
    "backbone.fingerprint": [ABSENT, 7, None, []],
    "settings": [*NO_DICT, {}],
    "settings.rank": [ABSENT, 0, -1, "2", 2.5, None, NAN],
    "settings.alpha": [ABSENT, "16", None, NAN, INF, -1],
    "settings.coord_dim": [ABSENT, 0, "4", None],
    "settings.pool": [ABSENT, "all", 7, None],
    "settings.probe": [ABSENT, "none", 7, None],
    "settings.fixed_coordinate": [True, "no", None, 2.5],
    "settings.template": [ABSENT, "mine", 7, None],
    "settings.targets": ["", "q_proj,", "a b", 7, None],
    "settings.more": [1],
    "versions": NO_LIST,
    "versions.1": [None, 7, "x", [], {}],
    "versions.1.hash": NO_HASH,
    "versions.1.task": [ABSENT, *NO_TASK, "alpaca", "with-code"],
    "versions.1.lock": [ABSENT, "first", "composed", "x", 7, None],
    "versions.1.date": [*NO_TEXT, "", "yesterday", "2026-01-01 00:00:00\n"],
    "versions.1.more": [1],
    "versions.0.lock": ["exact", "none", "soft"],
    "compositions": NO_LIST,
    "compositions.0": [None, 7, [], {}],
    "compositions.0.hash": NO_HASH[:8],
    "compositions.0.task": ["../../evil", "*", "", "code", 7, None],
    "compositions.0.lock": [ABSENT, "exact", 7],
    "results": NO_LIST,
    "results.1": [None, 7, "x", [], {}],
    "results.1.task": [ABSENT, "poems", "alpaca", 7, None],
    "results.1.version": [ABSENT, "0" * 64, 7, None],
    "results.1.base": NO_DICT,
    "results.1.stored": [*NO_DICT, {}],
    "results.1.stored.code": NO_NUMBER,
    "results.1.routed.code": NO_NUMBER,
    "results.1.base.alpaca": ["3", None, NAN],
    "results.1.stored.poems": [3.0],
    "results.1.routing": NO_DICT,
    "results.1.routing.code": [ABSENT, None, 7],
    "results.1.routing.code.code": NO_COUNT,
    "results.1.inside.code": [ABSENT, None],
    "results.1.inside.code.code": NO_COUNT,
    "results.1.identical.code": [ABSENT, None, 7, [], [3], [5, 3], [-1, 3], ["3", 3], [1, 2, 3]],
    "results.1.gating.code": [ABSENT, None, {}, {"sets": "x", "bases": 1}, {"sets": NAN, "bases": 1}],
    "results.1.drift": [ABSENT, None, 7],
    "results.1.drift.code": [None, {}],
    "results.1.more": [1],
}
WHOLE = ["", "null", "7", "[]", "{}", '"x"', "NaN", DEEP, '{"format":' * 100_000, "{", "x" * 9, "1" * 5000]
WHOLE += ['{"format": ' + "1" * 5000 + "}"]
WHOLE += [b"\xff\xfe\0", b"\0" * 99, '"\\ud800"', b'{"format": 1, "x": "\xff"}']


def twice(kind, number):
    return lambda m: m[kind].append(m[kind][number])


def emptied(m):
    m["versions"], m["compositions"], m["results"] = [], [], []


MANIFEST_EDITS = {
    "a version twice": twice("versions", 1),
    "a composition twice": twice("compositions", 0),
    "a row twice": twice("results", 1),
    "versions in another order": lambda m: m["versions"].reverse(),
    "rows in another order": lambda m: m["results"].reverse(),
    "the first version left out": lambda m: m["versions"].pop(0),
    "no versions, and their files are there": emptied,
    "a version among the compositions": lambda m: m["compositions"].append(m["versions"].pop()),
    "a composition among the versions": lambda m: m["versions"].append(m["compositions"].pop()),
    "an unknown version": lambda m: m["versions"].append({**m["versions"][1], "hash": "0" * 64, "task": "x"}),
}
CONTRADICTIONS = {  # what only the version files tell
    "versions.1.task": ["poems"],
    "versions.1.lock": ["soft", "none"],
    "compositions.0.task": ["poems"],
    "settings.rank": [3, 10**12],
    "settings.coord_dim": [5, 10**12],
    "settings.probe": ["adapted"],
    "settings.template": ["alpaca"],
    "settings.targets": ["q_proj"],
}


def edited(change):
    def damage(folder):
        about = json.loads((folder / "manifest.json").read_text())
        change(about)
        (folder / "manifest.json").write_text(json.dumps(about))

    return damage


def manifest_cases():
    # One function reads the manifest. So every case goes through `log` and one of the others in turn.
    others = itertools.cycle("merge verify show rollback compose export into eval answers train".split())
    values = [(path, v) for path, vs in IN_MANIFEST.items() for v in vs]
    rows = [(f"{path} {named(v)}", in_json("manifest.json", path, v)) for path, v in values]
    rows += [(f"manifest {named(text)}", content("manifest.json", text)) for text in WHOLE]
    for name, damage in rows:
        yield Case(name, "run", damage, f"log {next(others)}", MANIFEST)
    for name, change in MANIFEST_EDITS.items():
        yield Case(name, "run", edited(change), "verify merge eval", f"{VERSION}|versions")
    for path, values in CONTRADICTIONS.items():
        for v in values:
            damage = in_json("manifest.json", path, v)
            name, match = f"the files say not {path} {named(v)}", f"{VERSION}|exact lock"
            yield Case(name, "run", damage, "verify merge", match)


# ---------------------------------------------------------------------------------------------- version files

NO_SIZE = [ABSENT, 0, -1, "2", 2.5, None, NAN, 10**30]
IN_HEAD = {  # of code, the second version, which reads the first
    "task": [ABSENT, "poems", "../../evil", 7, None],
    "lock": [ABSENT, "first", "soft", "composed", 7],
    "reads": [ABSENT, None, "x", [], [7], ["0" * 64], [None], {}, lambda h: 2 * h["reads"]],
    "writes": [*NO_SIZE, 3, 5],
    "top_k": [*NO_SIZE, 99],
    "n": NO_SIZE,
    "tau": [ABSENT, NAN, INF, -INF, -1.0, "2", None, 10**400],
    "anchors": [ABSENT, 7, "8", None, -8],
    "fixed": [True, "no", None],
    "config": [ABSENT, None, 7, "x", []],
    "more": [1],
}
IN_FIRST_HEAD = {"lock": ["exact", "none"], "reads": [["0" * 64], None], "top_k": [99], "tau": [NAN]}
IN_FIRST_HEAD |= {"fixed": [True]}
IN_COMPOSITION = {
    "task": [ABSENT, "poems", "../x"],
    "lock": [ABSENT, "exact"],
    "reads": [ABSENT, None, [], ["0" * 64] * 2, 7, lambda h: h["reads"][:1], lambda h: [["x"]] * 2],
    "weights": [ABSENT, None, [], [1], [1, 1, 1], [NAN, 1], [INF, 1], ["1", 1], [None, 1], [0, 0], "11"],
    "more": [1],
}
METADATA = [None, {}, {"x": "1"}, *({"version": t} for t in ("", "{", "null", "[]", "7", '"x"', "NaN", DEEP))]
BANK = "bank.model.layers.1.self_attn.q_proj"


def nan_in(t):
    t = t.clone()
    t.view(-1)[0] = NAN
    return t


def cut(t):
    return t[: len(t) - 1].clone()


def gone(t):
    return None


def longer(t):
    return torch.cat([t, t[:1]])


def infinite(t):
    return t * 0 + INF


def narrow(t):
    return t[..., :3].clone()


def flat(t):
    return t.flatten()


def lopsided(t):
    return t + torch.triu(t + 1, 1)


doubled, single, half, integer = (getattr(torch.Tensor, kind) for kind in ("double", "float", "half", "long"))
IN_TENSORS = {  # of code: 8 anchors, 2 layers, 8 logits of which 4 are its own, d = 4
    "anchors": [gone, nan_in, cut, longer, doubled, narrow, lambda t: t + 2, lambda t: t[:0].clone()],
    "snapshot": [gone, nan_in, cut, half, narrow, lambda t: t[0].clone(), lambda t: t[:, :1].clone()],
    "region.mean": [gone, nan_in, cut, single],
    "region.cov": [gone, nan_in, cut, single, torch.neg, torch.zeros_like, infinite, lopsided],
    "field.w1.weight": [gone, nan_in, cut, half, lambda t: t.T.clone()],
    "field.w3.weight": [gone, nan_in, cut, longer],
    "field.norm.bias": [gone, nan_in, longer],
    f"{BANK}.A": [gone, nan_in, cut, longer, doubled, integer, narrow, lambda t: t[:, :1].clone()],
    f"{BANK}.B": [gone, nan_in, cut, infinite, narrow, lambda t: t[0].clone()],
}
IN_FIRST_TENSORS = {
    "dynamics.gru.weight_ih": [gone, nan_in, cut],
    "dynamics.w_z.weight": [gone, nan_in, torch.Tensor.double],
    "dynamics.z0": [gone, nan_in, longer],
    "dynamics.mean": [gone, nan_in, longer],
    "dynamics.deviation": [gone, nan_in, torch.zeros_like],
    f"{BANK}.A": [gone, nan_in],
}


def extra(key, tensor):
    return lambda head, tensors: tensors.update({key: tensor})


def bankless(head, tensors):
    for key in [k for k in tensors if k.startswith("bank")]:
        del tensors[key]


def renamed(old, new):
    def change(head, tensors):
        for key in [k for k in tensors if old in k]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def fewer_bases(head, tensors):
    """Every module has 3 bases, and the header still says 4."""
    tensors |= {k: t[:3].clone() for k, t in tensors.items() if k.startswith("bank")}


def another_rank(head, tensors):
    """A rank of 1 in all modules, where the run's settings say 2."""
    tensors |= {k: t[:, :1].clone() for k, t in tensors.items() if k.startswith("bank")}


LIES = [
    ("a tensor more", extra("evil", torch.ones(1))),
    ("a basis more", extra("bank.x.A", torch.ones(4, 2, 32))),
    ("dynamics of its own", extra("dynamics.z0", torch.zeros(4))),
    ("a region with more", extra("region.more", torch.zeros(4).double())),
    ("no bank", bankless),
    ("fewer bases", fewer_bases),
    ("another rank", another_rank),
    ("modules of another backbone", renamed("layers.1", "layers.7")),
    ("one module of another name", renamed("1.self_attn.q_proj", "1.self_attn.x_proj")),
]


def moved_field(head, tensors):
    tensors["field.w3.bias"] += 1e-3


def narrower(head, tensors):
    for key in ("gru.weight_ih", "mean", "deviation"):
        tensors[f"dynamics.{key}"] = tensors[f"dynamics.{key}"][..., :9].clone()


def version_cases():
    # `verify`, `merge`, `export` and what loads a version use one function, too.
    tables = ((0, IN_FIRST_HEAD, IN_FIRST_TENSORS), (1, IN_HEAD, IN_TENSORS), (2, IN_COMPOSITION, {}))
    for number, heads, tensors in tables:
        others = itertools.cycle((["eval", ""], ["merge", "", "export"], ["merge", ""])[number])
        values = [(key, v) for key, vs in heads.items() for v in vs]
        rows = [(f"head {number} {key} {named(v)}", in_head(number, key, v)) for key, v in values]
        for key, changes in tensors.items():
            for i, change in enumerate(changes):
                rows.append((f"tensor {number} {key} {i}", in_tensors(number, key, change)))
        for name, damage in rows:
            yield Case(name, "run", damage, f"verify {next(others)}", VERSION)
    for i, metadata in enumerate(METADATA):
        for number in (1, 2):
            damage = lying(number, lambda head, tensors, m=metadata: {} if m is None else m)
            yield Case(f"metadata {number} {i}", "run", damage, "verify merge log", VERSION)
    for name, change in LIES:
        yield Case(name, "run", lying(1, change), "verify merge eval", VERSION)
    evil = lying(2, extra("evil", torch.ones(1)))
    yield Case("a composition with a tensor", "run", evil, "verify merge", VERSION)
    yield Case("dynamics for another backbone", "run", lying(0, narrower), "eval train", "backbone")
    yield Case("a moved field", "run", lying(1, moved_field), "verify", VERSION)


# ----------------------------------------------------------------------- files and folders in place of others

MAKERS = {"a link": None, "a dangling link": dangling, "a folder": pathlib.Path.mkdir, "a pipe": os.mkfifo}
VAL, LOGITS = "data/alpaca.val.json", "data/alpaca.logits.json"
PLACES = {  # what is in the place of which of our files
    "a link": ["manifest.json", "versions", "data", VAL, LOGITS],
    "a dangling link": ["manifest.json", "versions", "data", VAL, ".lock", "log.jsonl"],
    "a folder": ["manifest.json", VAL, LOGITS, "log.jsonl"],
    "a pipe": ["manifest.json", VAL, LOGITS, "log.jsonl", ".lock"],
    "a file": ["versions", "data"],
}
READ_BY = {"manifest.json": "log merge train", ".lock": "rollback train", "log.jsonl": "train"}
READ_BY |= {"versions": "verify merge rollback train"}
NO_RECORDS = ["", "{}", "[]", "null", "7", DEEP, b"\xff\xfe", "[{", "[null]", "[7]", '["x"]', "[[]]"]
NOT_TEXT = [{"output": 7}, {"instruction": []}, {"input": []}, {"output": SURROGATE}, {"kind": []}]
NO_RECORDS += [json.dumps([RECORD, {**RECORD, **bad}]) for bad in NOT_TEXT]
DIGEST = "0123456789abcdef"
NO_DIGESTS = ["", "{}", "[]", "null", DEEP, b"\xff", "[1, 2, 3]", json.dumps([DIGEST])]
NOT_DIGESTS = [DIGEST[1:], DIGEST + "0", "x" * 16, None, DIGEST[:15] + "\n", DIGEST.upper()]
NO_DIGESTS += [json.dumps([digest] * 4) for digest in NOT_DIGESTS]


def orphans_lead_elsewhere(where):
    def damage(folder):
        (folder / where / "orphans").symlink_to(folder.parent / "target")
        (folder / "versions" / f"{'1' * 64}.safetensors").write_text("mine")
        (folder / "data" / "third.val.json").write_text("[]")

    return damage


def file_cases():
    for what, names in PLACES.items():
        for name in names:
            damage = moved(name, back={**MAKERS, "a file": pathlib.Path.touch}[what])
            yield Case(f"{name} is {what}", "run", damage, READ_BY.get(name, "merge eval"), re.escape(name))
    lost, commands = content("manifest.json", ABSENT), "log verify merge into merged eval train rollback"
    yield Case("the manifest is lost", "run", lost, commands, "run")
    for where, command in (("versions", "compose"), ("data", "train")):
        damage = orphans_lead_elsewhere(where)
        yield Case(f"{where}/orphans lead elsewhere", "run", damage, command, "orphans")
    for what, make in MAKERS.items():
        damage = version_file(1, lambda name, make=make: moved(name, back=make))
        yield Case(f"version file is {what}", "run", damage, "verify merge eval", VERSION)
    for i, data in enumerate((ABSENT, b"", b"x" * 99, b"\xff" * 8 + b"{}", b"\x08" + bytes(7) + b"[[[[[[[[")):
        for number in (1, 2):
            damage = version_file(number, lambda name, data=data: content(name, data))
            yield Case(f"version file {number} damaged {i}", "run", damage, "verify merge", VERSION)
    for name, texts in (("data/code.val.json", NO_RECORDS), ("data/code.logits.json", NO_DIGESTS)):
        for i, text in enumerate([ABSENT, *texts]):
            command, match = ("eval", "answers", "merge", "train")[i % 4], r"code\.(val|logits)\.json"
            yield Case(f"{name} {named(text)}", "run", content(name, text), command, match)
    damage = in_json("data/code.val.json", "1", ABSENT)
    yield Case("fewer records than digests", "run", damage, "eval merge", r"code\.(logits|val)\.json")
    damage = content("data/third.val.json", json.dumps([RECORD]))
    yield Case("records that merge would overwrite", "run", damage, "into", r"third\.val\.json")
    for kind in ("val", "logits"):  # of an earlier task, which are read when the training has ended
        damage = content(f"data/alpaca.{kind}.json", ABSENT)
        yield Case(f"a lost {kind} file", "halted", damage, "resume", rf"alpaca\.{kind}\.json")


# ------------------------------------------------------------------------------------- an unfinished training


def state_cases():
    steps = ("-1", "0", "1", "4", "999", "1.5", "nan", "", "x", "9" * 30, None)
    rows = [(f"step {ascii(s)}", in_state("x", step=s)) for s in steps]
    abouts = ("", "{", "null", "[]", "7", DEEP, "{}", '{"task": "code"}', None)
    rows += [(f"about {named(a)}", in_state("x", about=a)) for a in abouts]
    changes = [gone, nan_in, cut, longer, doubled, half, flat, infinite]
    for key in ("^bank.*q_proj.A$", "^exp_avg.field.w1.weight$"):
        rows += [(f"{key} {i}", in_state(key, change)) for i, change in enumerate(changes)]
    rows += [("a negative second moment", in_state("^exp_avg_sq.field.w3.weight$", lambda t: t - 1))]
    for s in (-1.0, 999.0, NAN):
        rows += [(f"moments at step {s}", in_state("^step.*", lambda t, s=s: t * 0 + s))]
    for i, data in enumerate((b"", b"nonsense", b"\xff" * 99, b"\x02" + bytes(7) + b"{}")):
        rows += [(f"damaged {i}", content("training.safetensors", data))]
    rows += [(f"is {what}", moved("training.safetensors", back=make)) for what, make in MAKERS.items()]
    rows += [("a tensor more", in_more_state)]
    rows += [("truncated", lambda folder: os.truncate(folder / "training.safetensors", 5000))]
    for name, damage in rows:
        yield Case(f"state: {name}", "halted", damage, "resume", STATE)
    for task, commands in (("of another task", "train"), ("other commands", "rollback-first into")):
        yield Case(f"state: {task}", "halted", lambda folder: None, commands, "training")


def in_more_state(folder):
    path = folder / "training.safetensors"
    about, tensors = fuzz.read_tensors(path)
    path.write_bytes(fuzz.save(tensors | {"evil": torch.ones(1)}, about))


# -------------------------------------------------------------------------------------------------- backbones

MODELING = """
import pathlib
pathlib.Path("ran").write_text("this folder's Python was run")
from transformers import MistralConfig as EvilConfig, MistralForCausalLM as EvilModel
"""


def with_auto_map(folder):
    names = {"AutoConfig": "modeling.EvilConfig", "AutoModelForCausalLM": "modeling.EvilModel"}
    in_json("config.json", "auto_map", names)(folder)
    in_json("config.json", "model_type", "evil")(folder)
    (folder / "modeling.py").write_text(MODELING)


def with_tokenizer_code(folder):
    (folder / "tokenizer.json").unlink()
    in_json("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["modeling.Evil", None]})(folder)
    in_json("tokenizer_config.json", "tokenizer_class", "Evil")(folder)
    (folder / "modeling.py").write_text(MODELING)


def pickled(folder):
    about, tensors = fuzz.read_tensors(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def in_weights(change):
    def damage(folder):
        about, tensors = fuzz.read_tensors(folder / "model.safetensors")
        change(tensors)
        (folder / "model.safetensors").write_bytes(fuzz.save(tensors, about))

    return damage


def emptied_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def sharded_elsewhere(folder):
    about, tensors = fuzz.read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../../../../etc/passwd")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NORM = "model.norm.weight"
BACKBONES = [
    ("auto_map", with_auto_map),
    ("a tokenizer with code", with_tokenizer_code),
    ("only pytorch_model.bin", pickled),
    ("an empty folder", emptied_folder),
    ("no weights", content("model.safetensors", ABSENT)),
    ("no config", content("config.json", ABSENT)),
    ("config broken", content("config.json", "{")),
    ("config a list", content("config.json", "[]")),
    ("config nested", content("config.json", DEEP)),
    ("config not text", content("config.json", b"\xff\xfe")),
    ("unknown type", in_json("config.json", "model_type", "evil")),
    ("type a number", in_json("config.json", "model_type", 7)),
    ("not a language model", in_json("config.json", "model_type", "vit")),
    ("heads that do not fit", in_json("config.json", "num_attention_heads", 0)),
    ("hidden size as text", in_json("config.json", "hidden_size", "32")),
    ("another shape", in_json("config.json", "intermediate_size", 49)),
    ("a layer more", in_json("config.json", "num_hidden_layers", 4)),
    ("weights truncated", lambda folder: os.truncate(folder / "model.safetensors", 5000)),
    ("weights of zeros", content("model.safetensors", bytes(99))),
    ("a missing tensor", in_weights(lambda t: t.pop(NORM))),
    ("a tensor of another shape", in_weights(lambda t: t.update({NORM: t[NORM][:9].clone()}))),
    ("an index that leads elsewhere", sharded_elsewhere),
    ("no tokenizer", lambda folder: [p.unlink() for p in folder.glob("tokenizer*")]),
    ("tokenizer broken", content("tokenizer.json", "{")),
    ("tokenizer empty", content("tokenizer.json", "{}")),
    ("no end of sequence", in_json("tokenizer_config.json", "eos_token", None)),
    ("more tokens than rows", in_json("config.json", "vocab_size", 300)),
]

# ---------------------------------------------------------------------------------------------------- options

HUGE = ["10" + "0" * n for n in (12, 30, 400)]
BAD_NUMBERS = {
    "--lr": ["inf", "nan", "-1", "x", "", "1e999"],
    "--alpha": ["inf", "nan", "-1"],
    "--margin": ["inf", "nan", "-1"],
    "--lambda-lock": ["inf", "nan", "-1"],
    "--lambda-sep": ["inf", "nan"],
    "--quantile": ["0", "1.1", "nan", "inf"],
    "--rank": ["0", "-1", "2.5", "nan", "inf", *HUGE],
    "--bases": ["0", "-1", "x", *HUGE],
    "--top-k": ["0", "99", *HUGE],
    "--seed": ["-1", "1.5", "nan", *HUGE],
    "--coord-dim": ["0", *HUGE],
    "--field-hidden": ["0", *HUGE],
    "--anchors": ["0", *HUGE],
    "--batch": ["0"],
    "--grad-accum": ["0"],
    "--epochs": ["0"],
    "--examples": ["0", "-1"],
    "--val-examples": ["0"],
    "--max-len": ["7", "x"],
    "--lock": ["maybe", ""],
    "--pool": ["all"],
    "--template": ["alpaca", "mine"],
    "--targets": ["q_proj", "x", "q_proj,x", ","],
    "--probe": ["adapted"],
    "--device": ["cpu:x", "cpu:", "tpu", "meta", "cuda:x", "cuda:99", ":0", "a b"],
}
TRAIN_ARGUMENTS = [f"{option} {value}" for option, values in BAD_NUMBERS.items() for value in values]
TRAIN_ARGUMENTS += """--frobnicate x | --task ../x | --task=a/b | --task=-x | --task= | --task with-code
    --rank 3 | --top-k 5 | --out proj | --out target | --out notes.txt
    --out notes.txt/x | --data proj | --data notes.txt | --data none | --data pipe | --backbone tiny
    --backbone none/such | --backbone none.gguf | --backbone notes.txt
    --backbone proj""".replace("\n", "|").split("|")
ARGUMENTS = {
    "eval": """--device cpu:x | --device tpu | --outside x | --exact-match -1 | --max-new-tokens 0 | --bench 0
        --version nobody | --version nobody --prompt x | --prompt x --run run first | --run none | --run proj
        --run notes.txt | --run target | --run run none | --json none/x.json | --json proj | --json notes.txt
        --json list.json | --json run/manifest.json | --json code.json | --json run/data/code.val.json
        --json run/log.jsonl | --json link.json | --json package.json | --json pipe | --frobnicate
        --max-new-tokens 1{0} | --exact-match x | --prompt \udcff | --prompt x --input \udcff
        --version \udcff | --like code.json | --like none --prompt x | --like proj --prompt x
        --like notes.txt --prompt x | --like list.json --prompt x | --like pipe --prompt x
        --like code.json --prompt x --version alpaca
        --device-map x""",
    "commit": """frobnicate | log --run none | log --run proj | log --run notes.txt | verify --run target
        show | show nobody | show --run proj alpaca | rollback alpaca | rollback nobody
        rollback alpaca --run proj | rollback x --run none | compose alpaca code --weights nan 1 --name x
        log --frobnicate
        compose alpaca code --weights inf 1 --name x | compose alpaca code --weights 0 0 --name x
        compose alpaca code --weights 1 --name x | compose alpaca code --weights x 1 --name x
        compose alpaca --weights 1 1 --name x | compose alpaca --weights 1e400 --name x
        compose alpaca --weights 1 --name ../x | compose alpaca --weights 1 --name code
        compose alpaca --weights 1 --name= | compose with-code --weights 1 --name x
        compose alpaca nobody --weights 1 1 --name x | compose alpaca --name x
        compose --like none --name x | compose --like list.json --name x | compose --like notes.txt --name x
        compose --like pipe --name x | compose --like code.json --name code | compose --like code.json
        compose with-code --like code.json --name x | compose --like code.json --name x --run proj
        compose alpaca --weights 1 --like code.json --name x
        compose --like code.json --name x --backbone none
        compose alpaca --weights 1 --name x --run proj | merge none | merge proj | merge notes.txt
        merge target | merge other --run proj | merge other --run none | merge other --run notes.txt | merge
        export alpaca --to proj | export alpaca --to notes.txt | export alpaca --to notes.txt/x
        export alpaca --to run | export alpaca --to= | export alpaca --to link.json | export nobody --to lora
        export alpaca --to lora --run proj | export alpaca | export alpaca --to run/versions
        export alpaca --to lora --push x | export alpaca --to lora --push a/b | verify --at http://127.0.0.1:1
        verify --expected notes.txt | verify --model x | verify --at x --expected notes.txt
        verify --at x --expected none | verify --at= --expected list.json
        verify --at x --expected link.json | verify --at x --expected list.json""",
    "synthetic": """--seeds 0 | --seeds x | --tasks 1 | --steps 0 | --workers 0 | --b-std -1 | --b-std nan
        --b-std inf | --search 0 1 | --search 1 nan | --search inf 1 | --first-seed -1 | --first-seed 1{0}
        --steps 1{0} | --seeds 1{0} | --methods x | --variant x | --experiment 3 | --inputs x
        --json none/x.json | --json proj | --json notes.txt | --json list.json | --json run/manifest.json
        --experiment 2 --tasks 7 | --experiment 2 --methods ewc | --figures notes.txt | --frobnicate
        --experiment 2 --m0 0 | --experiment 2 --generator 0 | --b-std 0""",
}


def option_cases():
    """(name, program, arguments, what the one line says); `{0}` is a row of zeros."""
    for text in TRAIN_ARGUMENTS:
        option, value = re.match(r"\s*(--[\w-]+)[ =]?(.*?)\s*$", text).groups()
        arguments = [f"{option}={value}"] if "=" in text else [option, value]
        match = f"{option}|{re.escape(value or option)}"
        yield f"train {' '.join(arguments)[:40]}", "train", arguments, match
    for program, table in ARGUMENTS.items():
        for text in re.split(r"[|\n]", table.format("0" * 30)):
            yield f"{program} {' '.join(text.split())[:60]}", program, text.split(), r"\w"


# ------------------------------------------------------------------------------------------------- the checks

CASES = [*manifest_cases(), *version_cases(), *file_cases(), *state_cases()]
OPTIONS = [*option_cases()]


def argv_of(command, base, world, bad):
    """-> program, argv of a command that reads the run folder `bad`"""
    at, first = ["--run", str(bad)], str(world / "first")
    return {
        "log": ("commit", ["log", *at]),
        "verify": ("commit", ["verify", *at]),
        "show": ("commit", ["show", "alpaca", *at]),
        "rollback": ("commit", ["rollback", "with-code", *at]),
        "rollback-first": ("commit", ["rollback", "alpaca", *at]),
        "compose": ("commit", ["compose", "alpaca", "code", "--weights", ".5", ".5", "--name", "new", *at]),
        "export": ("commit", ["export", "alpaca", "--to", str(world / "lora"), *at]),
        "merged": ("commit", ["export", "with-code", "--to", str(world / "lora"), "--merged", *at]),
        "merge": ("commit", ["merge", str(bad), "--run", first]),
        "into": ("commit", ["merge", str(world / "other"), *at]),
        "eval": ("eval", [*at, "--device", "cpu"]),
        "answers": ("eval", [*at, "--device", "cpu", "--exact-match", "1", "--max-new-tokens", "2"]),
        "train": ("train", fuzz.options(base, "third", bad, "--lock")),
        "resume": ("train", fuzz.options(base, "code", bad, "--lock")),
    }[command]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The materials, and the world that every case is tried in. Its name is no hindrance."""
    folder = tmp_path_factory.mktemp("bad") / "a wörld"
    world = fuzz.build(folder)
    (world / "notes.txt").write_text("mine")
    (world / "list.json").write_text("[]")  # somebody's, though every record in it is one of ours
    (world / "package.json").write_text('{"name": "x", "config": {"port": 1}, "command": "x"}')
    (world / "code.json").write_text(json.dumps([RECORD]))
    (world / "link.json").symlink_to(world / "target" / "x.tmp")
    os.mkfifo(world / "pipe")
    return folder


@pytest.fixture(scope="session")
def whole(base):
    return fuzz.snapshot(base / "world")


@pytest.fixture
def world(base, whole, monkeypatch):
    """The world. What a test leaves in it is undone."""
    monkeypatch.chdir(base / "world")
    with fuzz.offline():
        yield base / "world"
    fuzz.restore(base / "world", whole)


def refuses(program, argv, match, system=False):
    """The command refuses in one line that matches; `system`: it may be the operating system's."""
    outcome, text = fuzz.run_command(program, [str(a) for a in argv])
    assert outcome == "refused", f"{program} {argv[:3]}: {text[-3000:]}"
    assert re.search(match, text, re.I), f"{program} {argv[:3]} says: {text}"
    assert system or not text.startswith("[Errno"), f"{program} {argv[:3]} says: {text}"


def unchanged(world, before):
    after, before = fuzz.without_locks(fuzz.snapshot(world)), fuzz.without_locks(before)
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    assert not changed, f"changed, made or lost: {changed}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_damaged_on_disk_is_refused_and_every_byte_is_still_there(base, world, case):
    case.damage(world / case.folder)
    before = fuzz.snapshot(world)
    for command in case.commands.split():
        refuses(*argv_of(command, base, world, world / case.folder), case.match)
    unchanged(world, before)


@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: case[0])
def test_options_that_cannot_be_are_refused_before_anything_is_touched(base, world, case):
    before, (_, program, arguments, match) = fuzz.snapshot(world), case
    if program == "train":
        arguments = [*fuzz.options(base, "third", world / "run", "--lock"), *arguments]
    elif program != "synthetic" and "--run" not in arguments:
        arguments = [*arguments, "--run", "run"]
    refuses(program, arguments, match, system=True)
    unchanged(world, before)


UNUSABLE = [
    json.dumps([{**RECORD, **bad}] * 30) for bad in ({"output": " "}, {"output": "x " * 999}, {"kind": []})
]
NO_DATA = [
    ABSENT,
    *NO_RECORDS,
    *UNUSABLE,
    "NaN",
    json.dumps([{**RECORD, "output": "é"}], ensure_ascii=False).encode("latin-1"),
]


@pytest.mark.parametrize("text", NO_DATA, ids=named)
def test_data_that_cannot_be_learned_is_refused(base, world, text):
    content("mine.json", text)(world)
    before = fuzz.snapshot(world)
    for out, option in (("run", "--data"), ("new", "--val-data")):
        argv = fuzz.options(base, "third", out, "--lock", option, "mine.json")
        refuses("train", argv, r"mine\.json|no usable records")
    unchanged(world, before)


@pytest.mark.parametrize("name,damage", BACKBONES, ids=[name for name, _ in BACKBONES])
def test_a_backbone_that_cannot_be_trusted_is_refused_and_nothing_of_it_is_run(base, world, name, damage):
    folder = pathlib.Path(shutil.copytree(base / "backbone", world / "backbone"))
    damage(folder)
    before = fuzz.snapshot(world)
    refuses("train", fuzz.options(base, "third", "new", "--backbone", "backbone"), "backbone")
    unchanged(world, before)


# --------------------------------------------------------------------------------------------- what must work


def works(program, argv):
    outcome, text = fuzz.run_command(program, [str(a) for a in argv])
    assert outcome == "worked", f"{program} {argv[:3]}: {text[-3000:]}"
    return text


ALL_COMMANDS = "log verify show rollback compose export merged merge into eval answers train resume"


@pytest.mark.parametrize("command", ALL_COMMANDS.split())
def test_every_command_works_and_touches_nothing_that_is_not_ours(base, world, command):
    folder = world / {"merge": "other", "resume": "halted"}.get(command, "run")
    before = fuzz.snapshot(world)
    works(*argv_of(command, base, world, folder))
    written = "first" if command == "merge" else folder.name
    assert not [*fuzz.judge(before, fuzz.snapshot(world), command, written, True)]


def test_older_results_of_ours_are_written_again_and_no_folder_is_made_for_nothing(base, world):
    for _ in range(2):
        works("eval", ["--run", "run", "--json", "results.json", "--device", "cpu"])
    assert json.loads((world / "results.json").read_text())["rows"][0]["tasks"] == ["alpaca", "code"]
    before = fuzz.snapshot(world)
    refuses("train", fuzz.options(base, "third", "deep/down/new", "--data", "none"), "no such file")
    unchanged(world, before)


def test_a_version_that_nothing_names_is_moved_aside_by_the_next_command_that_writes(base, world):
    run, unnamed = world / "run", {f"{'1' * 64}.safetensors": b"whatever"}
    stranger = world / "other" / version_path(world / "other", 1)
    unnamed[stranger.name] = stranger.read_bytes()
    for name, data in unnamed.items():
        (run / "versions" / name).write_bytes(data)
    works("commit", ["log", "--run", "run"])
    assert all((run / "versions" / name).exists() for name in unnamed), "a command that reads moves nothing"
    works(*argv_of("compose", base, world, run))
    assert {p.name: p.read_bytes() for p in (run / "versions" / "orphans").iterdir()} == unnamed


def test_only_our_own_temporary_files_are_swept(base, world):
    run, kept = (
        world / "run",
        ["manifest.json.tmp", ".notes.txt.7.tmp", "niwf-tmp", "data/x.niwf-tmp", "sub/.x.7.niwf-tmp"],
    )
    ours = [
        ".manifest.json.7.niwf-tmp",
        f"versions/.{'1' * 64}.safetensors.7.niwf-tmp",
        "data/.code.val.json.7.niwf-tmp",
    ]
    for name in ours + kept:
        (run / name).write_text("x")
    works(*argv_of("compose", base, world, run))
    assert [name for name in ours + kept if (run / name).exists()] == kept


def test_merge_copies_the_files_of_its_tasks_and_no_others(base, world):
    ours, theirs = world / "first" / "data", world / "other" / "data"
    files = lambda: {p.name: p.read_bytes() for p in ours.iterdir() if p.is_file()}
    more = ["--lock", "--data", base / "data" / "code.json"]
    works("train", fuzz.options(base, "third.x", world / "first", *more))
    (theirs / "third.x.val.json").write_text("[]")
    before = files()
    works("commit", ["merge", "other", "--run", "first"])
    added = {p.name: p.read_bytes() for p in theirs.glob("third.[vl]*.json") if p.name != "third.x.val.json"}
    assert len(added) == 2 and files() == before | added


# Every basis is chosen, so each is 1e6 after a step; in an MLP the product of three such updates is infinite.
BOUNDLESS = "--alpha 1e6 --lr 1e6 --top-k 4".split()


def test_a_training_that_leaves_the_finite_numbers_stops_and_commits_nothing(base, world):
    argv = fuzz.options(base, "third", "new", *BOUNDLESS)
    refuses("train", argv, "finite at step")
    assert not fuzz.entries_of(fuzz.snapshot(world), "new") and not [*world.glob("new/versions/*")]


def test_a_last_step_that_leaves_the_finite_numbers_leaves_a_run_folder_that_can_be_read(base, world):
    """The loss is finite at every step, and what the last one made gives perplexities that are no numbers."""
    argv = fuzz.options(base, "third", "new", *BOUNDLESS, *"--epochs 1 --batch 16".split())
    refuses("train", argv, "finite")
    if (world / "new").exists():
        works("commit", ["log", "--run", "new"])


@pytest.mark.parametrize("name", ["a\tb", "a\nb", "a\x7fb", "a\udcff", "a 'b' \u2028"], ids=ascii)
@pytest.mark.parametrize("option", ["--out", "--backbone"])
def test_a_folder_of_any_name_is_refused_or_can_be_used_again(base, world, option, name):
    shutil.copytree(base / "backbone", world / name) if option == "--backbone" else None
    before = fuzz.snapshot(world)
    outcome, text = fuzz.run_command("train", fuzz.options(base, "third", "new", option, name))
    folder = name if option == "--out" else "new"
    if outcome == "worked":
        works("commit", ["verify", "--run", folder])
        works("eval", ["--run", folder, "--device", "cpu"])
    else:
        assert outcome == "refused", text
        unchanged(world, before)


def test_a_first_training_that_is_stopped_is_a_run_folder_and_goes_on(base, world):
    command = fuzz.options(base, "alpaca", "new")
    with fuzz.quiet():
        fuzz.interrupted(command, 2)
    about = json.loads((world / "new" / "manifest.json").read_text())
    assert about["versions"] == [] and (world / "new" / "training.safetensors").exists()
    works("train", command)
    assert fuzz.outcome_of(world / "new") == fuzz.outcome_of(world / "first")


def test_100_damaged_run_folders(tmp_path):
    counts, wrong = fuzz.fuzz(100, 0, tmp_path)
    assert not wrong, "\n".join(wrong)
