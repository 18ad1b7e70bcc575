"""What is refused, in one line, with every byte still there: a table of bad inputs over all readers.

Each is tried in the world that `studies/fuzz.py` builds: run folders with files inside and beside them that
are not ours. Then what must work all the same.
"""

import collections
import contextlib
import itertools
import json
import os
import pathlib
import re
import shutil

import pytest
import torch

from studies import fuzz
from tests.builders import RECORD, edit_json

ABSENT, NAN, INF = object(), float("nan"), float("inf")
DEEP = "[" * 100_000
SURROGATE = "a \ud800 b"
MANIFEST, VERSION = r"manifest\.json", r"manifest\.json|safetensors|[0-9a-f]{12}"

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
    return lambda folder: edit_json(folder / file, lambda tree: put(tree, path, value))


def content(file, data):
    def damage(folder):
        (folder / file).unlink(missing_ok=True)
        if data is not ABSENT:
            (folder / file).write_bytes(data if isinstance(data, bytes) else data.encode())

    return damage


def moved(file, back=None):
    """Move what is at `file` elsewhere; `back` makes something in its place, a link to it if not given."""

    def damage(folder):
        path, aside = folder / file, folder.parent / "target" / "moved" / pathlib.Path(file).name
        aside.parent.mkdir(exist_ok=True)
        if path.exists():
            path.rename(aside)
        back(path) if back else path.symlink_to(aside)

    return damage


dangling = lambda path: path.symlink_to(path.with_name("none"))


def version_path(folder, number):
    about = json.loads((folder / "manifest.json").read_text())
    return f"versions/{(about['versions'] + about['compositions'])[number]['hash']}.safetensors"


def version_file(number, change):
    """Return the damage that `change`(name of the file of a version) gives."""
    return lambda folder: change(version_path(folder, number))(folder)


def lying(number, change):
    """Apply change(header, tensors) to a version file, which lies under its true hash."""
    return lambda folder: fuzz.forge(folder, number, change)


def in_state(key, change=None, **metadata):
    """Change one tensor or some metadata of the saved state of a training."""

    def edit(about, tensors):
        name = next((k for k in sorted(tensors) if re.search(key, k)), None)
        replace(change, name)(about, tensors) if change else None
        about |= {k: v for k, v in metadata.items() if v is not None}
        for k in [k for k, v in metadata.items() if v is None]:
            about.pop(k, None)

    return lambda folder: fuzz.rewrite(folder / "training.safetensors", edit)


def replace(change, *keys):
    """Let change(tensor) replace these tensors, or all whose names begin so; None removes them."""

    def edit(head, tensors):
        for key in [k for k in tensors if k.startswith(keys)]:
            new = change(tensors.pop(key))
            tensors |= {} if new is None else {key: new}

    return edit


def named(value):
    text = "absent" if value is ABSENT else "computed" if callable(value) else ascii(value)
    return text if len(text) < 30 else f"{text[:20]}...{len(text)}"


# The manifest's rows.
PATHS = ["../../evil", "a/b", "..", "*", "", "code\n", "a\0b", SURROGATE, "-x", "a b", "x" * 65]
NO_TASK, NO_TEXT = [*PATHS, 7, None, []], [ABSENT, 7, None, [], {}]
NO_HASH = [ABSENT, 7, None, "", "0" * 63, "0" * 65, "g" * 64, "../" + "0" * 64, "0" * 64 + "\n"]
NO_HASH += [lambda e: e["hash"].upper(), lambda e: "../versions/" + e["hash"], lambda e: e["hash"][:12]]
NO_NUMBER = [ABSENT, "3", None, [], NAN, INF, -INF, -1.5, 10**400]
NO_COUNT = ["1", None, -1, 1.5, NAN]
NO_DICT, NO_LIST = [ABSENT, None, 7, "x", []], [ABSENT, None, 7, "x", {}]

IN_MANIFEST = {  # places in the manifest: what cannot stand there
    "format": [ABSENT, 0, 2, "1", None, []],
    "more settings.more versions.1.more results.1.more": [1],
    "backbone": [ABSENT, None, [], {}, "tiny"],
    "backbone.name backbone.fingerprint": NO_TEXT,
    "settings results.1.stored": [*NO_DICT, {}],
    "settings.rank": [ABSENT, 0, -1, "2", 2.5, None, NAN],
    "settings.alpha": [ABSENT, "16", None, NAN, INF, -1],
    "settings.coord_dim": [ABSENT, 0, "4", None],
    "settings.pool settings.probe settings.template": [ABSENT, "none", 7, None],
    "settings.fixed_coordinate": [True, "no", None, 2.5],
    "settings.targets": ["", "q_proj,", "a b", 7, None],
    "versions compositions results": NO_LIST,
    "versions.1 compositions.0 results.1": [None, 7, "x", [], {}],
    "versions.1.hash compositions.0.hash": NO_HASH,
    "versions.1.task": [ABSENT, *NO_TASK, "alpaca", "with-code"],
    "versions.1.lock": [ABSENT, "first", "composed", "x", 7, None],
    "versions.1.date": [*NO_TEXT, "", "yesterday", "2026-01-01 00:00:00\n"],
    "versions.0.lock": ["exact", "none", "soft"],
    "compositions.0.task": ["../../evil", "*", "", "code", 7, None],
    "compositions.0.lock": [ABSENT, "exact", 7],
    "results.1.task": [ABSENT, "poems", "alpaca", 7, None],
    "results.1.version": [ABSENT, "0" * 64, 7, None],
    "results.1.base results.1.routing": NO_DICT,
    "results.1.stored.code results.1.routed.code": NO_NUMBER,
    "results.1.base.alpaca": ["3", None, NAN],
    "results.1.stored.poems": [3.0],
    "results.1.routing.code results.1.inside.code results.1.drift": [ABSENT, None, 7],
    "results.1.routing.code.code results.1.inside.code.code": NO_COUNT,
    "results.1.routing.code": [{}, {"code": 10**6}],
    "results.1.identical.code": [ABSENT, None, 7, [], [3], [5, 3], [-1, 3], ["3", 3], [1, 2, 3]],
    "results.1.gating.code": [ABSENT, None, {}, {"sets": "x", "bases": 1}, {"sets": NAN, "bases": 1}],
    "results.1.drift.code": [None, {}],
}
WHOLE = ["", "null", "7", "[]", "{}", '"x"', "NaN", DEEP, '{"format":' * 100_000, "{", "x" * 9, "1" * 5000]
WHOLE += ['{"format": ' + "1" * 5000 + "}"]
WHOLE += [b"\xff\xfe\0", b"\0" * 99, '"\\ud800"', b'{"format": 1, "x": "\xff"}']

MANIFEST_EDITS = {
    "a version twice": lambda m: m["versions"].append(m["versions"][1]),
    "a composition twice": lambda m: m["compositions"].append(m["compositions"][0]),
    "a row twice": lambda m: m["results"].append(m["results"][1]),
    "versions in another order": lambda m: m["versions"].reverse(),
    "rows in another order": lambda m: m["results"].reverse(),
    "the first version left out": lambda m: m["versions"].pop(0),
    "no versions, and their files are there": lambda m: m.update(versions=[], compositions=[], results=[]),
    "a version among the compositions": lambda m: m["compositions"].append(m["versions"].pop()),
    "a composition among the versions": lambda m: m["versions"].append(m["compositions"].pop()),
    "an unknown version": lambda m: m["versions"].append({**m["versions"][1], "hash": "0" * 64, "task": "x"}),
}
CONTRADICTIONS = {  # what only the version files tell
    "versions.1.task compositions.0.task": ["poems"],
    "versions.1.lock": ["soft", "none"],
    "settings.rank settings.coord_dim": [3, 10**12],
    "settings.probe": ["adapted"],
    "settings.template": ["alpaca"],
    "settings.targets": ["q_proj"],
}


def manifest_cases():
    # One function reads the manifest. So every case goes through `log` and one of the others in turn.
    others = itertools.cycle("merge verify show rollback compose export into eval answers train".split())
    values = [(path, v) for paths, vs in IN_MANIFEST.items() for path in paths.split() for v in vs]
    rows = [(f"{path} {named(v)}", in_json("manifest.json", path, v)) for path, v in values]
    rows += [(f"manifest {named(text)}", content("manifest.json", text)) for text in WHOLE]
    for name, damage in rows:
        yield Case(name, "run", damage, f"log {next(others)}", MANIFEST)
    for name, change in MANIFEST_EDITS.items():
        damage = lambda folder, change=change: edit_json(folder / "manifest.json", change)
        yield Case(name, "run", damage, "verify merge eval", f"{VERSION}|versions")
    for path, v in [(path, v) for paths, vs in CONTRADICTIONS.items() for path in paths.split() for v in vs]:
        name, damage = f"the files say not {path} {named(v)}", in_json("manifest.json", path, v)
        yield Case(name, "run", damage, "verify merge", f"{VERSION}|exact lock")


# Version files.
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
ONE = torch.ones(1)


def nan_in(t):
    t = t.clone()
    t.view(-1)[0] = NAN
    return t


def renamed(old, new):
    def change(head, tensors):
        for key in [k for k in tensors if old in k]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def extra(key, tensor):
    return lambda head, tensors: tensors.update({key: tensor})


gone, longer, cut = (lambda t: None), (lambda t: torch.cat([t, t[:1]])), (lambda t: t[: len(t) - 1].clone())
flat, narrow, infinite = torch.flatten, (lambda t: t[..., :3].clone()), (lambda t: t * 0 + INF)
lopsided, thin = (lambda t: t + torch.triu(t + 1, 1)), (lambda t: t[:, :1].clone())
doubled, single, half, integer = (getattr(torch.Tensor, kind) for kind in ("double", "float", "half", "long"))
IN_TENSORS = {  # of code: 8 anchors, 2 layers, 8 logits of which 4 are its own, d = 4
    "anchors": [gone, nan_in, cut, longer, doubled, narrow, lambda t: t + 2, lambda t: t[:0].clone()],
    "snapshot": [gone, nan_in, cut, half, narrow, thin, lambda t: t[0].clone()],
    "region.mean": [gone, nan_in, cut, single, lambda t: t + 1e200],
    "region.cov": [gone, nan_in, cut, single, torch.neg, torch.zeros_like, infinite, lopsided],
    "field.w1.weight": [gone, nan_in, cut, half, lambda t: t.T.clone()],
    "field.w3.weight": [gone, nan_in, cut, longer],
    "field.norm.bias": [gone, nan_in, longer],
    f"{BANK}.A": [gone, nan_in, cut, longer, doubled, integer, narrow, thin],
    f"{BANK}.B": [gone, nan_in, cut, infinite, narrow, lambda t: t[0].clone()],
}
IN_FIRST_TENSORS = {
    "dynamics.gru.weight_ih": [gone, nan_in, cut],
    "dynamics.w_z.weight": [gone, nan_in, doubled],
    "dynamics.z0": [gone, nan_in, longer],
    "dynamics.mean": [gone, nan_in, longer],
    "dynamics.deviation": [gone, nan_in, torch.zeros_like],
    f"{BANK}.A": [gone, nan_in],
}


def smaller(head, tensors):
    """Let a version's coordinates have a dimension less, in all of its parts."""
    along = {"anchors": 1, "region.mean": 0, "region.cov": 1, "field.w1.weight": 1, "field.norm.weight": 0}
    for key, axis in {**along, "field.norm.bias": 0}.items():
        tensors[key] = tensors[key].narrow(axis, 0, 3).clone()
    tensors["region.cov"] = tensors["region.cov"][:3].clone()


LIES = [
    ("coordinates of another dimension", smaller),
    ("a tensor more", extra("evil", ONE)),
    ("a basis more", extra("bank.x.A", torch.ones(4, 2, 32))),
    ("dynamics of its own", extra("dynamics.z0", torch.zeros(4))),
    ("a region with more", extra("region.more", torch.zeros(4).double())),
    ("no bank", replace(gone, "bank")),
    ("fewer bases", replace(lambda t: t[:3].clone(), "bank")),  # and the header still says 4
    ("another rank", replace(thin, "bank")),  # the run's settings say 2
    ("modules of another backbone", renamed("layers.1", "layers.7")),
    ("one module of another name", renamed("1.self_attn.q_proj", "1.self_attn.x_proj")),
]


def version_cases():
    # `verify`, `merge`, `export` and what loads a version use one function, too.
    tables = ((0, IN_FIRST_HEAD, IN_FIRST_TENSORS), (1, IN_HEAD, IN_TENSORS), (2, IN_COMPOSITION, {}))
    for number, heads, changes in tables:
        others = itertools.cycle((["eval", ""], ["merge", "", "export"], ["merge", ""])[number])
        for key, value in [(key, v) for key, vs in heads.items() for v in vs]:
            damage = lying(number, lambda head, tensors, key=key, value=value: put(head, key, value))
            name = f"head {number} {key} {named(value)}"
            yield Case(name, "run", damage, f"verify {next(others)}", VERSION)
        for key, i, change in [(key, i, c) for key, cs in changes.items() for i, c in enumerate(cs)]:
            damage = lying(number, replace(change, key))
            yield Case(f"tensor {number} {key} {i}", "run", damage, f"verify {next(others)}", VERSION)
    for i, metadata in enumerate(METADATA):
        for number in (1, 2):
            damage = lying(number, lambda head, tensors, m=metadata: {} if m is None else m)
            yield Case(f"metadata {number} {i}", "run", damage, "verify merge log", VERSION)
    for name, change in LIES:
        yield Case(name, "run", lying(1, change), "verify merge eval", VERSION)
    yield Case("a composition with a tensor", "run", lying(2, extra("evil", ONE)), "verify merge", VERSION)
    sized = "dynamics.gru.weight_ih", "dynamics.mean", "dynamics.deviation"
    narrower = replace(lambda t: t[..., :9].clone(), *sized)
    yield Case("dynamics for another backbone", "run", lying(0, narrower), "eval train", "backbone")
    moved_field = lying(1, replace(lambda t: t + 1e-3, "field.w3.bias"))
    yield Case("a moved field", "run", moved_field, "verify", VERSION)


# Files and folders in place of others.
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
            damage = moved(name, {**MAKERS, "a file": pathlib.Path.touch}[what])
            yield Case(f"{name} is {what}", "run", damage, READ_BY.get(name, "merge eval"), re.escape(name))
    lost, commands = content("manifest.json", ABSENT), "log verify merge into merged eval train rollback"
    yield Case("the manifest is lost", "run", lost, commands, "run")
    for where, command in (("versions", "compose"), ("data", "train")):
        damage = orphans_lead_elsewhere(where)
        yield Case(f"{where}/orphans lead elsewhere", "run", damage, command, "orphans")
    for what, make in MAKERS.items():
        damage = version_file(1, lambda name, make=make: moved(name, make))
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


# An unfinished training.


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
    rows += [(f"is {what}", moved("training.safetensors", make)) for what, make in MAKERS.items()]
    rows += [("a tensor more", lambda f: fuzz.rewrite(f / "training.safetensors", extra("evil", ONE)))]
    rows += [("truncated", lambda folder: os.truncate(folder / "training.safetensors", 5000))]
    for name, damage in rows:
        yield Case(f"state: {name}", "halted", damage, "resume", r"training\.safetensors")
    for task, commands in (("of another task", "train"), ("other commands", "rollback-first into")):
        yield Case(f"state: {task}", "halted", lambda folder: None, commands, "training")


# Backbones.
MODELING = """
import pathlib
pathlib.Path("ran").write_text("this folder's Python was run")
from transformers import MistralConfig as EvilConfig, MistralForCausalLM as EvilModel
"""

AUTO_MAP = {"AutoConfig": "modeling.EvilConfig", "AutoModelForCausalLM": "modeling.EvilModel"}


def with_code(file, **entries):
    def damage(folder):
        edit_json(folder / file, lambda about: about.update(entries))
        (folder / "modeling.py").write_text(MODELING)
        (folder / "tokenizer.json").unlink() if "Evil" in entries.values() else None

    return damage


def in_weights(change):
    return lambda folder: fuzz.rewrite(folder / "model.safetensors", lambda _, tensors: change(tensors))


def weights_elsewhere(folder, pickled):
    """Put the weights into a pickle, or into files that an index names."""
    path = folder / "model.safetensors"
    _, tensors = fuzz.read_tensors(path)
    path.unlink()
    if pickled:
        return torch.save(tensors, folder / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../../../../etc/passwd")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


TOKENIZER = dict(auto_map={"AutoTokenizer": ["modeling.Evil", None]}, tokenizer_class="Evil")
NORM = "model.norm.weight"
BACKBONES = [
    ("auto_map", with_code("config.json", auto_map=AUTO_MAP, model_type="evil")),
    ("a tokenizer with code", with_code("tokenizer_config.json", **TOKENIZER)),
    ("only pytorch_model.bin", lambda folder: weights_elsewhere(folder, True)),
    ("an empty folder", lambda folder: [path.unlink() for path in folder.iterdir()]),
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
    ("an index that leads elsewhere", lambda folder: weights_elsewhere(folder, False)),
    ("no tokenizer", lambda folder: [p.unlink() for p in folder.glob("tokenizer*")]),
    ("tokenizer broken", content("tokenizer.json", "{")),
    ("tokenizer empty", content("tokenizer.json", "{}")),
    ("no end of sequence", in_json("tokenizer_config.json", "eos_token", None)),
    ("more tokens than rows", in_json("config.json", "vocab_size", 300)),
]

# Options.
HUGE = ["10" + "0" * n for n in (12, 30, 400)]
BAD_NUMBERS = {  # options: what none of them can be
    "--lr": ["inf", "nan", "-1", "x", "", "1e999"],
    "--alpha --margin --lambda-lock": ["inf", "nan", "-1"],
    "--lambda-sep": ["inf", "nan"],
    "--quantile": ["0", "1.1", "nan", "inf"],
    "--rank": ["0", "-1", "2.5", "nan", "inf", *HUGE],
    "--bases": ["0", "-1", "x", *HUGE],
    "--top-k": ["0", "99", *HUGE],
    "--seed": ["-1", "1.5", "nan", *HUGE],
    "--coord-dim --field-hidden --anchors": ["0", *HUGE],
    "--batch --grad-accum --epochs --val-examples": ["0"],
    "--examples": ["0", "-1"],
    "--max-len": ["7", "x"],
    "--lock": ["maybe", ""],
    "--pool": ["all"],
    "--template": ["alpaca", "mine"],
    "--targets": ["q_proj", "x", "q_proj,x", ","],
    "--probe": ["adapted"],
    "--device": ["cpu:x", "cpu:", "tpu", "meta", "cuda:x", "cuda:99", ":0", "a b"],
}
TRAIN_ARGUMENTS = [f"{o} {v}" for options, vs in BAD_NUMBERS.items() for o in options.split() for v in vs]
TRAIN_ARGUMENTS += """--frobnicate x | --task ../x | --task=a/b | --task=-x | --task= | --task with-code
    --task base | --task 0123456789ab | --task Alpaca
    --rank 3 | --top-k 5 | --out proj | --out target | --out notes.txt | --out notes.txt/x | --data proj
    --data none | --data notes.txt | --data pipe | --backbone tiny | --backbone none/such
    --backbone none.gguf | --backbone notes.txt | --backbone proj""".replace("\n", "|").split("|")
ARGUMENTS = {
    "eval": """--device cpu:x | --device tpu | --outside x | --exact-match -1 | --max-new-tokens 0
        --version nobody | --version nobody --prompt x | --prompt x --run run first | --run none | --run proj
        --run notes.txt | --run target | --run run none | --json none/x.json | --json proj | --json notes.txt
        --json list.json | --json run/manifest.json | --json code.json | --json run/data/code.val.json
        --json run/log.jsonl | --json link.json | --json package.json | --json pipe | --frobnicate
        --max-new-tokens 1{0} | --exact-match x | --prompt \udcff | --prompt x --input \udcff
        --version \udcff | --like code.json | --like none --prompt x | --like proj --prompt x
        --like notes.txt --prompt x | --like list.json --prompt x | --like pipe --prompt x
        --like code.json --prompt x --version alpaca | --device-map x | --prompt x --json new.json
        --prompt x --exact-match | --input x | --talk --input x | --port 1 | --prompt x --host x | --seed 1
        --prompt x --seed 1 | --max-new-tokens 3 | --run run ./run | --json {0}{0}{0}{0}{0}{0}{0}{0}.json""",
    "commit": """frobnicate | log --run none | log --run proj | log --run notes.txt | verify --run target
        show | show nobody | show --run proj alpaca | rollback alpaca | rollback nobody
        rollback alpaca --run proj | rollback x --run none | compose alpaca code --weights nan 1 --name x
        log --frobnicate | compose --weights 1 --name x
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
    "synthetic": """--seeds 0 | --seeds x | --tasks 1 | --steps 0 | --workers 0 | --first-seed -1
        --first-seed 1{0} | --steps 1{0} | --seeds 1{0} | --methods x | --variant x | --experiment 3
        --json none/x.json | --json proj | --json notes.txt | --json list.json | --json run/manifest.json
        --experiment 2 --tasks 7 | --experiment 2 --methods ewc | --frobnicate | --experiment 2 --b-std -1
        --experiment 2 --b-std inf | --steps 1e3""",
}


def option_cases():
    """Yield (name, program, arguments, what the one line says); `{0}` is a row of zeros."""
    for text in TRAIN_ARGUMENTS:
        option, value = re.match(r"\s*(--[\w-]+)[ =]?(.*?)\s*$", text).groups()
        arguments, match = [f"{option}={value}"], f"{option}|{re.escape(value or option)}"
        yield f"train {text.strip()[:40]}", "train", arguments if "=" in text else [option, value], match
    for program, table in ARGUMENTS.items():
        for text in re.split(r"[|\n]", table.format("0" * 30)):
            yield f"{program} {' '.join(text.split())[:60]}", program, text.split(), r"\w"


CASES = [*manifest_cases(), *version_cases(), *file_cases(), *state_cases()]
OPTIONS = [*option_cases()]

WORDS = {  # commands of commit.py and eval.py, in the world
    "show": "show alpaca",
    "rollback": "rollback with-code",
    "rollback-first": "rollback alpaca",
    "compose": "compose alpaca code --weights .5 .5 --name new",
    "export": "export alpaca --to lora",
    "merged": "export with-code --to lora --merged",
    "into": "merge other",
    "eval": "--device cpu",
    "answers": "--device cpu --exact-match 1 --max-new-tokens 2",
}


def argv_of(command, base, bad):
    """Return the program and argv of a command that reads the run folder `bad`."""
    if command in ("train", "resume"):
        return "train", fuzz.options(base, {"train": "third", "resume": "code"}[command], bad, "--lock")
    if command == "merge":
        return "commit", ["merge", str(bad), "--run", "first"]
    words = WORDS.get(command, command).split()
    return "eval" if words[0] == "--device" else "commit", [*words, "--run", str(bad)]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Make the materials, and the world that every case is tried in. Its name is no hindrance."""
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
    """Give a test the world, and undo what it leaves there."""
    monkeypatch.chdir(base / "world")
    with fuzz.offline():
        yield base / "world"
    fuzz.restore(base / "world", whole)


def refuses(program, argv, match, system=False):
    """See that a command refuses in one line that matches; `system`: it may be the operating system's."""
    outcome, text = fuzz.run_command(program, [str(a) for a in argv])
    assert outcome == "refused", f"{program} {argv[:3]}: {text[-3000:]}"
    assert re.search(match, text, re.I), f"{program} {argv[:3]} says: {text}"
    assert system or not text.startswith("[Errno"), f"{program} {argv[:3]} says: {text}"


@contextlib.contextmanager
def untouched(world):
    """See that what runs in this block leaves every byte as it is."""
    before = fuzz.without_locks(fuzz.snapshot(world))
    yield
    after = fuzz.without_locks(fuzz.snapshot(world))
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    assert not changed, f"changed, made or lost: {changed}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage_on_disk_is_refused_and_no_byte_changes(base, world, case):
    """Commands refuse a damaged run folder in one line that names the damaged part, and change no byte."""
    case.damage(world / case.folder)
    with untouched(world):
        for command in case.commands.split():
            refuses(*argv_of(command, base, world / case.folder), case.match)


@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: case[0])
def test_impossible_options_are_refused_and_touch_nothing(base, world, case):
    """An option that cannot be is refused in one line, and no file is made, changed or lost."""
    _, program, arguments, match = case
    if program == "train":
        arguments = [*fuzz.options(base, "third", world / "run", "--lock"), *arguments]
    elif program != "synthetic" and "--run" not in arguments:
        arguments = [*arguments, "--run", "run"]
    with untouched(world):
        refuses(program, arguments, match, system=True)


UNUSABLE = [{"output": " "}, {"output": "x " * 999}, {"kind": []}]
UNUSABLE = [json.dumps([{**RECORD, **bad}] * 30) for bad in UNUSABLE]
NO_DATA = [ABSENT, *NO_RECORDS, *UNUSABLE, "NaN"]
NO_DATA += [json.dumps([{**RECORD, "output": "é"}], ensure_ascii=False).encode("latin-1")]


@pytest.mark.parametrize("text", NO_DATA, ids=named)
def test_data_that_cannot_be_learned_is_refused(base, world, text):
    """Data without usable records is refused in one line, and no run folder is made or changed."""
    content("mine.json", text)(world)
    with untouched(world):
        for out, option in (("run", "--data"), ("new", "--val-data")):
            argv = fuzz.options(base, "third", out, "--lock", option, "mine.json")
            refuses("train", argv, r"mine\.json|no usable records")


@pytest.mark.parametrize("name, damage", BACKBONES, ids=[name for name, _ in BACKBONES])
def test_an_untrusted_backbone_is_refused_and_never_run(base, world, name, damage):
    """A backbone that is damaged or brings its own Python is refused, and none of its code is run."""
    shutil.copytree(base / "backbone", world / "backbone")
    damage(world / "backbone")
    with untouched(world):
        refuses("train", fuzz.options(base, "third", "new", "--backbone", "backbone"), "backbone")


def works(program, argv):
    outcome, text = fuzz.run_command(program, [str(a) for a in argv])
    assert outcome == "worked", f"{program} {argv[:3]}: {text[-3000:]}"


COMMANDS = "log verify show rollback compose export merged merge into eval answers train resume".split()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_works_and_touches_only_our_files(base, world, command):
    """Every command works beside files of strangers, and writes only files that belong to it."""
    folder = world / {"merge": "other", "resume": "halted"}.get(command, "run")
    before = fuzz.snapshot(world)
    works(*argv_of(command, base, folder))
    written = "first" if command == "merge" else folder.name
    assert not [*fuzz.judge(before, fuzz.snapshot(world), command, written, True)]


def test_our_older_results_are_overwritten(base, world):
    """Results that we wrote earlier are written anew, and a refused training leaves no new folder."""
    for _ in range(2):
        works("eval", ["--run", "run", "--json", "results.json", "--device", "cpu"])
    assert json.loads((world / "results.json").read_text())["rows"][0]["tasks"] == ["alpaca", "code"]
    with untouched(world):
        refuses("train", fuzz.options(base, "third", "deep/down/new", "--data", "none"), "no such file")


def test_a_command_that_writes_tidies_up_what_is_ours(base, world):
    """A command that writes moves unnamed versions aside and sweeps our temporary files; one that reads does
    neither."""
    run, stranger = world / "run", world / "other" / version_path(world / "other", 1)
    unnamed = {f"{'1' * 64}.safetensors": b"whatever", stranger.name: stranger.read_bytes()}
    ours = [".manifest.json", f"versions/.{'1' * 64}.safetensors", "data/.code.val.json"]
    kept = "manifest.json.tmp .notes.txt.7.tmp niwf-tmp data/x.niwf-tmp sub/.x.7.niwf-tmp"
    paths = [run / name for name in [*(f"{name}.7.niwf-tmp" for name in ours), *kept.split()]]
    written = dict.fromkeys(paths, b"x") | {run / "versions" / name: data for name, data in unnamed.items()}
    for path, data in written.items():
        path.write_bytes(data)
    with untouched(world):
        works("commit", ["log", "--run", "run"])
    works(*argv_of("compose", base, run))
    assert {p.name: p.read_bytes() for p in (run / "versions" / "orphans").iterdir()} == unnamed
    assert [path.exists() for path in paths] == [False] * 3 + [True] * 5


def test_merge_copies_the_files_of_its_tasks_and_no_others(base, world):
    """A merge brings the data of its tasks, and overwrites none of a task whose name begins alike."""
    ours, theirs = world / "first" / "data", world / "other" / "data"
    files = lambda: {p.name: p.read_bytes() for p in ours.iterdir() if p.is_file()}
    more = ["--lock", "--data", base / "data" / "code.json"]
    works("train", fuzz.options(base, "third.x", world / "first", *more))
    (theirs / "third.x.val.json").write_text("[]")
    before = files()
    works("commit", ["merge", "other", "--run", "first"])
    added = {p.name: p.read_bytes() for p in theirs.glob("third.[vl]*.json") if p.name != "third.x.val.json"}
    assert len(added) == 2 and files() == before | added


@pytest.mark.parametrize("more, match", [([], "finite at step"), (["--epochs=1", "--batch=16"], "finite")])
def test_a_training_that_is_no_longer_finite_is_refused(base, world, more, match):
    """Every basis is chosen, so each is 1e6 after a step; in an MLP the product of three such updates is
    infinite. Where there is one step its loss is finite, and what it made gives no perplexity: then the run
    folder can at least be read."""
    boundless = "--alpha 1e6 --lr 1e6 --top-k 4".split()
    refuses("train", fuzz.options(base, "third", "new", *boundless, *more), match)
    assert more or not [*fuzz.entries_of(fuzz.snapshot(world), "new"), *world.glob("new/versions/*")]
    if (world / "new").exists():
        works("commit", ["log", "--run", "new"])


@pytest.mark.parametrize("name", ["a\tb", "a\nb", "a\x7fb", "a\udcff", "a 'b' \u2028"], ids=ascii)
@pytest.mark.parametrize("option", ["--out", "--backbone"])
def test_a_folder_of_any_name_is_refused_or_can_be_used_again(base, world, option, name):
    """A folder with an odd name is refused and nothing changes, or later commands can open it again."""
    shutil.copytree(base / "backbone", world / name) if option == "--backbone" else None
    before = fuzz.snapshot(world)
    outcome, text = fuzz.run_command("train", fuzz.options(base, "third", "new", option, name))
    assert outcome == "worked" or (outcome == "refused" and fuzz.snapshot(world) == before), text
    if outcome == "worked":
        for command in ("verify", "eval"):
            works(*argv_of(command, base, name if option == "--out" else "new"))


def test_a_stopped_first_training_is_a_run_and_goes_on(base, world):
    """A stopped first training leaves a readable run, and goes on to the outcome of an undisturbed run."""
    command = fuzz.options(base, "alpaca", "new")
    with fuzz.quiet():
        fuzz.interrupted(command, 2)
    about = json.loads((world / "new" / "manifest.json").read_text())
    assert about["versions"] == [] and (world / "new" / "training.safetensors").exists()
    works("train", command)
    assert fuzz.outcome_of(world / "new") == fuzz.outcome_of(world / "first")


def test_100_damaged_run_folders(tmp_path):
    """In 100 cases of random damage a command works or refuses in one line, and no file is lost."""
    counts, wrong = fuzz.fuzz(100, 0, tmp_path)
    assert not wrong, "\n".join(wrong)
