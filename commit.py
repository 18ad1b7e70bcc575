"""Git for capabilities: what is committed stays, on disk and in what it answers.

Committing a task writes an immutable *version*: the bases it wrote, its field, its region, *anchors* in
that region and a *snapshot* of the field on them. One sentence holds for everything here: commit = freeze
what a capability occupies; everything else stays writable. There are two ways to keep that promise, and
`train.py --lock` chooses:

exact   Addresses do not move: the probe is bare and the dynamics freeze at the first commit. Contents do not
        change: a later version may read committed bases but has a field and bases of its own to write.
        Nothing committed has a gradient, a moment or decay, so a stored capability stays bit-identical.
soft    The paper, Eqs. (9)-(13): one live bank, field and dynamics; a penalty holds the field's logits on the
        anchors. The bases and the dynamics move freely, and forgetting is what it is measured to be.
none    The same live bank, field and dynamics with no penalty at all.

    python commit.py log                      # the versions of a run folder, newest first
    python commit.py show VERSION             # all about one; VERSION is a task or the start of a hash
    python commit.py verify                   # every hash; every anchor recomputed and compared bit for bit
    python commit.py rollback VERSION [--cascade]             # take it out, and those that stand on it
    python commit.py compose A B --weights .5 .5 --name AB    # a gating over both, which owns no bases
    python commit.py merge OTHER_RUN          # versions learned elsewhere from the same first one
    python commit.py export VERSION --to DIR  # an ordinary LoRA adapter in PEFT's format
    python commit.py export VERSION --to DIR --merged         # the backbone with that update in its weights

None of these trains or needs data. `export` reads the backbone's shape and tokenizer, with `--merged` its
weights, too; the others do without the backbone. All take `--run DIR` (default: the latest under runs/) and
`--json`. Whatever they do, every other version stays what it was, to the last bit.

A run folder holds `manifest.json`, `versions/<sha256>.safetensors` (named by content, as in git), for every
task `data/<task>.val.json` and `data/<task>.logits.json`, `training.safetensors` while a task is being
trained, and `log.jsonl`. It trusts nobody: what is read is validated whole before it is used, no symbolic
link is followed, and nothing is removed but what the manifest named and the temporary files of a killed
command. Writes are atomic.

Held here: sections 3.5 and 3.6 of the NIWF paper, and what it calls versioning.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while torch is being imported: one line, no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"\ncommit.py: stopped\n") and 130))

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import re
import shutil
import sys
import time

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from plumbing import Refused  # first: it sets what torch and the Hub's client read when imported

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from field import CoordinateDynamics, Region, WeightField, route, take_snapshot, top_k_gating
from model import NIWF
from plumbing.backbone import fingerprint, is_backbone, load_backbone, place_of
from plumbing.export import write_adapter, write_merged
from plumbing.targets import layer_numbers, named_targets
from plumbing.processes import first_alone
from plumbing.command import Parser, number, run_program
from plumbing.files import NAME, SHA, atomic, atomic_folder, check_name, put_aside, read_json, refuse_constant
from plumbing.files import validate
from plumbing.prompts import pad_of
from plumbing.records import read_records

# ---------------------------------------------------------------------------- what is on disk, and reading it

DATE = re.compile(r"[\d :-]{19}", re.ASCII)
COUNT, COUNT_OR_0 = range(1, 2**31), range(2**31)
POSITIVE = lambda x: type(x) in (int, float) and 0 < x < 1e300
NOT_NEGATIVE = lambda x: x == 0 and type(x) in (int, float) or POSITIVE(x)

# fmt: off
SETTINGS = {"rank": COUNT, "alpha": NOT_NEGATIVE, "coord_dim": COUNT, "pool": ("prompt", "sequence"),
            "probe": ("bare", "adapted"), "fixed_coordinate": bool,
            "template": ("alpaca", "chat"), "targets": str}  # options that a run's first task fixes
LATER = {"template": "alpaca", "targets": "all"}  # settings that older run folders lack, and what they were
LACKING = [lacking for n in range(1, len(LATER) + 1) for lacking in itertools.combinations(LATER, n)]
OLD_SETTINGS = [{k: form for k, form in SETTINGS.items() if k not in lacking} for lacking in LACKING]
ENTRY = {"hash": SHA, "task": NAME, "lock": ("first", "exact", "soft", "none"), "date": DATE}
DRIFT = ("inside_at_commit", "inside_now", "moved", "spread", "lock_loss", "top_k_kept")
PERPLEXITIES, COUNTS = {NAME: POSITIVE}, {NAME: {NAME: COUNT_OR_0}}
RESULT = {"task": NAME, "version": SHA, "base": PERPLEXITIES, "stored": PERPLEXITIES, "routed": PERPLEXITIES,
          "routing": COUNTS, "inside": COUNTS, "identical": {NAME: [COUNT_OR_0]},
          "gating": {NAME: {"sets": POSITIVE, "bases": POSITIVE}},
          "drift": {NAME: dict.fromkeys(DRIFT, NOT_NEGATIVE)}}
MANIFEST = {"format": 1, "backbone": (None, {"name": str, "fingerprint": SHA}),
            "settings": ({}, *OLD_SETTINGS, SETTINGS), "versions": [ENTRY], "results": [RESULT],
            "compositions": [{**ENTRY, "lock": "composed"}]}
VERSION = {"task": NAME, "lock": ENTRY["lock"], "reads": [SHA], "writes": COUNT, "top_k": COUNT, "n": COUNT,
           "tau": NOT_NEGATIVE, "anchors": COUNT, "fixed": bool, "config": {NAME: (None, bool, float, str)}}
COMPOSITION = {"task": NAME, "lock": "composed", "reads": [SHA], "weights": [float]}
# fmt: on


KINDS = r"manifest\.json|training\.safetensors|[0-9a-f]{64}\.safetensors|\w[\w.-]*\.(val|logits)\.json"
TEMPORARY = re.compile(rf"\.({KINDS})\.\d+\.niwf-tmp")  # what a killed command of ours can leave


# --------------------------------------------------------------------------------------------------- versions


def write_version(folder, head, tensors):
    """Write a version file under the hash of its contents, which is returned."""
    # One metadata key: safetensors does not promise an order, and the bytes are the name.
    tensors = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    data = save(tensors, {"version": json.dumps(head, sort_keys=True)})
    digest = hashlib.sha256(data).hexdigest()
    with atomic(folder / f"{digest}.safetensors") as tmp:
        tmp.write_bytes(data)
    return digest


def map_tensors(path):
    """The tensors of a safetensors file, mapped into memory: what is not read takes none."""
    with safe_open(path, "pt") as f:
        return {key: f.get_tensor(key) for key in f.keys()}


def read_version_file(path, tensors=False):
    """A version file's header, and its tensors if asked: then its hash is checked first. Refused: it is
    missing, its contents no longer have the hash that is its name, or its header has not the form of one."""
    if not path.is_file() or path.is_symlink():
        raise Refused(f"{path}: this version is listed in the manifest, but its file is missing")
    try:
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest() if tensors else path.stem
        if digest != path.stem:
            raise ValueError(f"its contents hash to {digest[:12]}")
        with safe_open(path, "pt") as f:
            head = json.loads(f.metadata()["version"], parse_constant=refuse_constant)
        found = map_tensors(path) if tensors else {}
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise Refused(f"{path}: corrupted version file ({e}); restore it from a copy") from None
    form = COMPOSITION if isinstance(head, dict) and head.get("lock") == "composed" else VERSION
    return validate(head, form, path), found


@dataclasses.dataclass
class Version:
    """One committed capability. The bank of a run holds the bases of its versions in order of commitment.

    source: its tensors, "anchors" [count, d], "snapshot" [count, L, N], "field.*", and "bank.*", the bases it
    wrote, keyed as in AdapterBank; or the file that holds them, which is mapped into memory when one of them
    is first asked for: a version that nobody asks takes hardly any."""

    task: str
    lock: str  # how it was trained: "exact", "soft", "none"; "first" had nothing to protect
    reads: list  # hashes of the versions whose bases its field may choose, before its own
    top_k: int
    dynamics: CoordinateDynamics  # under the exact lock, that of the run's first version
    region: Region
    source: dict | pathlib.Path
    shapes: dict  # of one basis of each key
    writes: int  # how many bases it wrote
    layers: int  # L, rows of gating
    config: dict  # the options it was trained with
    index: torch.Tensor  # [N]: for each logit of its field, the number of the basis in the bank
    hash: str = ""  # the name of its file, once it has one

    @functools.cached_property
    def tensors(self):
        return self.source if isinstance(self.source, dict) else map_tensors(self.source)

    @property
    def anchors(self):
        return self.tensors["anchors"]

    @property
    def snapshot(self):
        return self.tensors["snapshot"]

    @functools.cached_property
    def bases(self):
        return part_of(self.tensors, "bank")

    @property
    def own(self):
        """Numbers, in the bank, of the bases that it wrote."""
        return self.index[-self.writes :]

    @functools.cached_property
    def field(self):
        """Phi, when it is first asked for."""
        return field_of(self.tensors)

    def gating(self, z):
        """z [B, d] -> (indices into the bank, weights), both [B, L, K]."""
        indices, weights = top_k_gating(self.field.to(z.device)(z), self.top_k)
        return self.index.to(indices.device)[indices], weights

    def save(self, folder):
        """Write it to `folder` under the hash of its contents, which is set."""
        kept = {key: t for key, t in self.tensors.items() if not key.startswith("dynamics.")}
        tensors = kept | {"region.mean": self.region.mean, "region.cov": self.region.cov}
        if not self.reads:  # the coordinate space belongs to a version that stands on no other
            tensors |= {f"dynamics.{k}": t for k, t in self.dynamics.state_dict().items()}
        head = {key: getattr(self, key) for key in ("task", "lock", "reads", "writes", "top_k", "config")}
        head |= {"tau": self.region.tau, "n": self.region.n}
        head |= {"anchors": len(self.anchors), "fixed": self.dynamics.fixed}
        self.hash = write_version(folder, head, tensors)

    @classmethod
    def load(cls, path, earlier=()):
        """Read a version. earlier: those before it in its run, which it may read. Refused: see
        `read_version_file`; it reads what is not there; its tensors do not fit its header, each other or the
        run's first version."""
        head, tensors = read_version_file(path, tensors=True)
        known = {v.hash: v for v in earlier}
        parts = {name: part_of(tensors, name) for name in {key.partition(".")[0] for key in tensors}}
        lost = [h for i, h in enumerate(head["reads"]) if h not in known or h in head["reads"][:i]]
        if lost or head["lock"] == "composed":
            raise Refused(f"{path}: composed, or reads {''.join(lost)[:12]}, which is not here, or twice")
        start = sum(v.writes for v in earlier) if head["lock"] in ("first", "exact") else 0
        own = torch.arange(start, start + head["writes"])
        index = torch.cat([*(known[h].own for h in head["reads"]), own])
        try:
            check_tensors(head, tensors, parts, bases=len(index), first=earlier[0] if earlier else None)
            field_of(tensors)
            dynamics = earlier[0].dynamics if head["reads"] else None
            if not dynamics:
                features, d = parts["dynamics"]["gru.weight_ih"].shape[1], len(tensors["region.mean"])
                dynamics = CoordinateDynamics(features, d, head["fixed"]).requires_grad_(False)
                dynamics.load_state_dict(parts["dynamics"])
        except (KeyError, ValueError, RuntimeError, IndexError) as e:
            raise Refused(f"{path}: its tensors do not fit: {e}") from None
        region = Region(**{k: t.clone() for k, t in parts["region"].items()}, tau=head["tau"], n=head["n"])
        same = {key: head[key] for key in ("task", "lock", "reads", "top_k", "config")}
        same |= {"writes": head["writes"], "layers": tensors["snapshot"].shape[1]}
        shapes = {key: (*t.shape[1:],) for key, t in parts["bank"].items()}
        # What was read to be checked is let go.
        about = {"dynamics": dynamics, "region": region, "index": index, "hash": path.stem}
        return cls(**same, **about, source=path, shapes=shapes)


def part_of(tensors, part):
    """The tensors whose keys begin with a part's name, keyed by the rest."""
    found = [(key.partition("."), t) for key, t in tensors.items()]
    return {rest: t for (name, _, rest), t in found if name == part}


def field_of(tensors):
    """The field in a version's tensors, with a copy of its weights. RuntimeError: they do not fit."""
    (_, layers, bases), (hidden, d) = tensors["snapshot"].shape, tensors["field.w1.weight"].shape
    with torch.device("meta"):  # nothing is drawn, nothing is filled
        field = WeightField(layers, bases, d, hidden)
    own = {key: t.clone() for key, t in part_of(tensors, "field").items()}
    field.load_state_dict(own, assign=True)
    return field.requires_grad_(False)


def check_tensors(head, tensors, parts, bases, first):
    """ValueError: the tensors of a version file, by key and by part, do not fit its header, each other, N =
    `bases` (those that it writes and reads) or the run's first version. Field and dynamics check their own
    shapes when loaded."""
    wanted = {"bank", "field", "region", "anchors", "snapshot", *(() if head["reads"] else ["dynamics"])}
    modules = {key[:-2] for key in parts["bank"]}
    keys = {"bank": {f"{m}.{p}" for m in modules for p in "AB"}, "region": {"mean", "cov"}}
    keys |= {"anchors": {""}, "snapshot": {""}}
    if {*parts} != wanted or any({*parts[part]} != known for part, known in keys.items()):
        raise ValueError("some are missing, or unknown")
    (_, layers, _), (hidden, d) = tensors["snapshot"].shape, parts["field"]["w1.weight"].shape
    shapes = {"snapshot": (head["anchors"], layers, bases), "anchors": (head["anchors"], d)}
    shapes |= {"region.mean": (d,), "region.cov": (d, d), "field.w3.weight": (layers * bases, hidden)}
    one_basis = {key: t.shape[1:] for key, t in parts["bank"].items()}
    rank = min(shape[0] for shape in one_basis.values())
    of_first = first.shapes if first else {key: (rank, *shape[1:]) for key, shape in one_basis.items()}
    shapes |= {f"bank.{key}": (head["writes"], *shape) for key, shape in of_first.items()}
    for key in sorted({*shapes, *tensors}):
        t, kind = tensors[key], torch.float64 if key.startswith("region.") else torch.float32
        if t.dtype != kind or t.shape != shapes.get(key, t.shape) or not t.numel() or not t.isfinite().all():
            raise ValueError(f"{key} is {t.dtype} {(*t.shape,)}, not {kind} {shapes.get(key, '')} or finite")
    cov = tensors["region.cov"]
    if not torch.allclose(cov, cov.T) or torch.linalg.cholesky_ex(cov)[1]:
        raise ValueError("region.cov is no covariance")
    if tensors["anchors"].abs().max() > 1:
        raise ValueError("anchors lie outside [-1, 1]")
    if "dynamics.deviation" in tensors and tensors["dynamics.deviation"].min() <= 0:
        raise ValueError("dynamics.deviation is not positive")
    if first and head["fixed"] != first.dynamics.fixed:
        raise ValueError("fixed is not what the first version has")
    if layers not in (1, len({*layer_numbers(modules).values()})) or head["top_k"] > bases:
        raise ValueError(f"snapshot has {layers} layers, or top_k is more than {bases}")


@dataclasses.dataclass
class Composition:
    """A gating over several versions, each with a weight: Delta W is their weighted sum. It owns no bases and
    no region, so no prompt is routed to it; it is asked for by name."""

    task: str
    reads: list  # hashes of the versions
    weights: list
    versions: list = ()  # those themselves, in a run folder that is loaded
    hash: str = ""
    lock = "composed"

    def gating(self, h_bar):
        """h_bar [B, features] -> (indices into the bank, weights), both [B, L, sum of the K]."""
        parts = [v.gating(v.dynamics(h_bar)) for v in self.versions]
        layers = max(indices.shape[1] for indices, _ in parts)
        indices = [indices.expand(-1, layers, -1) for indices, _ in parts]
        weights = [share * w.expand(-1, layers, -1) for share, (_, w) in zip(self.weights, parts)]
        return torch.cat(indices, -1), torch.cat(weights, -1)

    def save(self, folder):
        """As `Version.save`."""
        self.hash = write_version(folder, {key: getattr(self, key) for key in COMPOSITION}, {})

    @classmethod
    def load(cls, path, versions):
        """As `Version.load`; versions: all of the run."""
        (head, tensors), known = read_version_file(path, tensors=True), {v.hash: v for v in versions}
        weights = head.get("weights", [])
        if tensors or len(head["reads"]) != len(weights) or not any(weights) or {*head["reads"]} - {*known}:
            raise Refused(
                f"{path}: reads: not versions of this run, or not as many weights, or it has tensors"
            )
        return cls(head["task"], head["reads"], weights, [known[h] for h in head["reads"]], path.stem)


# ------------------------------------------------------------------------------------------------ run folders


FOLDERS = ("versions", "versions/orphans", "data", "data/orphans")
FILES = ("manifest.json", "log.jsonl", "training.safetensors", ".lock")


class Run:
    """A run folder: one backbone, the settings fixed by its first task, and its versions in the order of
    commitment.

    Under the exact lock every version stands for itself. Under the soft lock and none, versions share one
    live bank, field and dynamics: the last version holds their present state, and answers for all
    (`speaker`)."""

    def __init__(self, folder):
        """Refused: see `read`."""
        self.folder, self.held = pathlib.Path(folder), False  # held: within `exclusive`
        self.read()

    def read(self):
        """Take the manifest from disk; no version is loaded then. Refused: the folder is not ours, holds a
        symbolic link where a file of ours belongs, or a manifest that is not whole."""
        self.versions, self.compositions = [], []
        self.manifest = {"format": 1, "backbone": None, "settings": {}}
        self.manifest |= {"versions": [], "results": [], "compositions": []}
        for name in FOLDERS + FILES:
            path = self.folder / name
            plain = path.is_dir if name in FOLDERS else path.is_file
            if path.is_symlink() or path.exists() and not plain():  # in this order: it may just be made
                raise Refused(f"{path}: a link, or no plain {'folder' if name in FOLDERS else 'file'}")
        path = self.manifest_file
        if path.exists():
            self.manifest = read_json(path)
            self.check_manifest()
            if self.manifest["settings"]:
                for key, value in LATER.items():
                    self.manifest["settings"].setdefault(key, value)
            if not self.tasks and self.unnamed([]) and not (self.folder / "training.safetensors").exists():
                raise Refused(
                    f"{path}: names no version, but versions/ holds some: restore it, or move them away"
                )
        elif self.folder.exists() and (not self.folder.is_dir() or {*os.listdir(self.folder)} - {".lock"}):
            raise Refused(f"{self.folder}: not a run folder (no manifest.json); nothing is written there")

    def check_manifest(self):
        """Refused: the manifest has not the form of one, or its parts contradict each other."""
        validate(self.manifest, MANIFEST, self.manifest_file)
        for why, found in self.contradictions().items():
            if found:
                raise Refused(f"{self.manifest_file}: {why}")

    def contradictions(self):
        """{what could be wrong with a manifest whose parts have the right form: is it}."""
        versions, rows = self.manifest["versions"], self.manifest["results"]
        tasks, locks = {v["hash"]: v["task"] for v in versions}, [v["lock"] for v in versions]
        whole = not self.entries or versions and self.manifest["settings"] and self.manifest["backbone"]
        orders = (
            ["first", *["exact"] * (len(locks) - 1)],
            ["first", *(k for k in locks[1:] if k in ("soft", "none"))],
        )
        twice = lambda values: len(values) > len({*values})
        holes = lambda row: (
            any(
                {*row[key]} != {*row["base"]}
                for key in ("stored", "routed", "routing", "inside", "identical", "gating")
            )
            or any(t not in row["inside"][t] or len(row["identical"][t]) != 2 for t in row["base"])
            or any(same > of for same, of in row["identical"].values())
        )
        return {
            "two versions have one name": twice([e["task"] for e in self.entries]),
            "two versions have one hash": twice([e["hash"] for e in self.entries]),
            f"versions cannot have the locks {locks}": locks and locks not in orders,
            "versions, settings or backbone are missing": not whole,
            "results: rows in another order than versions": [v["hash"] for v in versions if self.measured(v)]
            != [row["version"] for row in rows],
            "results: a row of another task": any(tasks.get(row["version"]) != row["task"] for row in rows),
            "results: a row without its task": any(row["task"] not in row["base"] for row in rows),
            "results: a row of unknown tasks": any({*row["base"]} - {*tasks.values()} for row in rows),
            "results: a row with holes": any(holes(row) for row in rows),
        }

    @property
    def manifest_file(self):
        return self.folder / "manifest.json"

    @property
    def tasks(self):
        """Names of the committed tasks, in order."""
        return [v["task"] for v in self.manifest["versions"]]

    @property
    def entries(self):
        """The manifest's entries of all versions and compositions."""
        return self.manifest["versions"] + self.manifest["compositions"]

    @property
    def shared(self):
        """Do all versions share one live bank, field and dynamics?"""
        return bool(self.manifest["versions"]) and self.manifest["versions"][-1]["lock"] in ("soft", "none")

    @property
    def template(self):
        """How prompts are written, see `prompt_of`."""
        return self.manifest["settings"]["template"]

    def path(self, digest):
        """The file of a version."""
        return self.folder / "versions" / f"{digest}.safetensors"

    def measured(self, entry):
        """Is there a row of results for a version?"""
        return any(row["version"] == entry["hash"] for row in self.manifest["results"])

    def data_file(self, task, kind):
        """kind "val": the validation records that the task is measured on, now and after every later task.
        "logits": digests of the logits that each had when the task was committed."""
        return self.folder / "data" / f"{task}.{kind}.json"

    def files(self, entry):
        """The files that a version or composition has."""
        data = [self.data_file(entry["task"], kind) for kind in ("val", "logits")]
        return [self.path(entry["hash"])] + data * (entry["lock"] != "composed")

    def validation(self, task):
        """Those records. Refused: they are not there, or not whole."""
        return read_records(self.data_file(task, "val"), self.template, own=True)

    def digests(self, task):
        """Those digests. Refused: they are not there, or not one for each record."""
        path = self.data_file(task, "logits")
        digests = validate(read_json(path), [re.compile("[0-9a-f]{16}")], path)
        if len(digests) != (records := len(self.validation(task))):
            raise Refused(f"{path}: {len(digests)} digests for {records} validation records")
        return digests

    def find(self, name):
        """The manifest's entry for a task name or the start of a hash, as in git. Refused: none, or more than
        one."""
        by_name = [e for e in self.entries if e["task"] == name]
        found = by_name or [e for e in self.entries if len(name) >= 4 and e["hash"].startswith(name.lower())]
        if len(found) != 1:
            which = "no version is" if not found else "more than one version is"
            raise Refused(f"{self.folder}: {which} called {name!r}; see `python commit.py log`")
        return found[0]

    def head(self, entry):
        """What the file of an entry says of itself. Refused: see `read_version_file`; or the manifest says
        otherwise."""
        head, _ = read_version_file(self.path(entry["hash"]))
        self.agree(entry, head["task"], head["lock"])
        return head

    def agree(self, entry, task, lock):
        """Refused: a version's file says that it is of another task or lock than the manifest's entry."""
        if (task, lock) != (entry["task"], entry["lock"]):
            said = f"{entry['task']} with lock {entry['lock']}"
            raise Refused(f"{self.manifest_file}: {said}, but its file is {task} with {lock}")

    def read_version(self, entry, earlier):
        """The version or composition of an entry, and see that its data files are whole. earlier: the
        versions before it. Refused: see `head`, `load`, `validation`, `digests`."""
        path, kind = self.path(entry["hash"]), Composition if entry["lock"] == "composed" else Version
        version = kind.load(path, earlier)
        self.agree(entry, version.task, version.lock)
        if kind is Composition:
            return version
        (self.digests if self.measured(entry) else self.validation)(entry["task"])
        if not earlier:
            (rank, _), d = next(iter(version.shapes.values())), len(version.region.mean)
            fixed = version.dynamics.fixed
            made = LATER | version.config
            made |= {"rank": rank, "coord_dim": d, "fixed_coordinate": fixed}
            for key, value in self.manifest["settings"].items():
                if made.get(key) != value:
                    raise Refused(f"{self.manifest_file}: settings: {key} {value}, not {made.get(key)}")
        return version

    @contextlib.contextmanager
    def exclusive(self):
        """Within this block no other process changes the run folder. The lock dies with its process. Refused:
        it is taken, or see `read`. If nothing comes of the block, no empty folder is left."""
        self.read()
        with contextlib.ExitStack() as held:
            self.lock(held)
            self.read()  # as the other process may just have left it
            self.held = True
            held.callback(setattr, self, "held", False)
            yield self

    @first_alone
    def lock(self, held):
        """Take the lock of `exclusive`, until the stack `held` is closed. Refused: it is taken."""
        made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        f = held.enter_context(open(self.folder / ".lock", "a"))
        if fcntl:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(f"{self.folder}: another process is at work on it; wait") from None
        held.callback(self.leave, made)

    def leave(self, made):
        """If nothing came of it, remove the lock file and the folders that were made."""
        if [p.name for p in self.folder.iterdir()] == [".lock"]:
            (self.folder / ".lock").unlink()
            with contextlib.suppress(OSError):
                for folder in made:
                    folder.rmdir()

    @first_alone
    def save(self, removed=()):
        """Write the manifest, once it is seen that it can be read again; then remove files that it no longer
        names, and tidy up after killed commands."""
        self.check_manifest()
        with atomic(self.manifest_file) as tmp:
            tmp.write_text(json.dumps(self.manifest, indent=1), encoding="utf-8")
        litter = [p for part in (".", "versions", "data") for p in (self.folder / part).glob(".*.niwf-tmp")]
        for path in [*removed, *(p for p in litter if TEMPORARY.fullmatch(p.name))]:
            if path.is_file() and not path.is_symlink():
                path.unlink()
        for path in self.unnamed([e["hash"] for e in self.entries]):
            put_aside(path)

    def unnamed(self, hashes):
        """Version files that are not among `hashes`: a command was killed before the manifest could name
        them, or after it no longer did."""
        files = [p for p in (self.folder / "versions").glob("*.safetensors") if SHA.fullmatch(p.stem)]
        return [p for p in files if p.stem not in hashes and p.is_file() and not p.is_symlink()]

    def commit(self, version):
        """Add a version: its file first, then the manifest that names it. A kill in between leaves an unnamed
        file, which the same training writes again under the same name."""
        version.save(self.folder / "versions")
        listed = self.manifest["compositions" if isinstance(version, Composition) else "versions"]
        date = time.strftime("%Y-%m-%d %H:%M:%S")
        listed.append({"hash": version.hash, "task": version.task, "lock": version.lock, "date": date})
        self.save()

    # What a version answers.

    def open_backbone(self, name, device, device_map=None):
        """Load the backbone. -> (backbone, tokenizer). If it has another name than it had, the manifest
        takes the new one; whoever holds the folder (`exclusive`) saves it. Raises Refused if the run folder
        belongs to another backbone."""
        backbone, tokenizer = load_backbone(name, device, device_map)
        owner = self.manifest["backbone"]
        if not owner:
            self.manifest["backbone"] = {"name": place_of(name), "fingerprint": fingerprint(backbone)}
        elif not is_backbone(backbone, owner["fingerprint"]):
            raise Refused(f"{self.folder} belongs to another backbone than {name}: {owner['name']}")
        elif owner["name"] not in (name, place_of(name)):
            with contextlib.nullcontext() if (held := self.held) else self.exclusive():
                self.manifest["backbone"]["name"] = place_of(name)
                if not held:
                    self.save()
        return backbone, tokenizer

    def open_model(self, backbone, tokenizer, targets=None):
        """The backbone with a bank that holds what the run has committed. targets: what to adapt, in a run
        that has no version yet; the others adapt what their first does."""
        settings, versions = self.manifest["settings"], self.read_versions()
        if versions:
            targets = named_targets(backbone, {key.rpartition(".")[0] for key in versions[0].shapes})
        model = NIWF(backbone, pad_of(tokenizer), settings["rank"], settings["alpha"], targets)
        self.load(model, versions)
        return model

    def read_versions(self):
        """All versions, in order. Refused: see `read_version`."""
        versions = []
        for entry in self.manifest["versions"]:
            versions.append(self.read_version(entry, versions))
        return versions

    def load(self, model, versions=None):
        """Put the bases of all versions, which are read unless given, read-only into the model's empty
        bank."""
        self.versions, self.compositions = versions or self.read_versions(), []
        for i, v in enumerate(self.versions):
            if self.speaker(i) is v:
                if v.shapes != model.bank.basis_shapes() or v.dynamics.gru.input_size != model.features:
                    raise Refused(f"{self.path(v.hash)}: made for other modules than this backbone has")
                model.bank.commit(v.writes, lambda v=v: v.bases)
            v.dynamics.to(model.device)
        self.compositions = [self.read_version(e, self.versions) for e in self.manifest["compositions"]]

    def speaker(self, i):
        """The version whose field and bases answer for version i. This is all the difference that the locks
        make to answers."""
        return self.versions[-1 if self.shared else i]

    def probe_gating(self):
        """Gating of pass 1: off, or, with --probe adapted, what the last version has at z_0."""
        last, adapted = self.versions[-1], self.manifest["settings"]["probe"] == "adapted"
        return last.gating(last.dynamics.z0[None]) if adapted else None

    def stored(self, i, h_bar):
        """Gating of task i when it is *given* that task i is asked for: its own dynamics, as they were
        committed, and what now lies at that address. Under the exact lock this cannot change."""
        return self.speaker(i).gating(self.versions[i].dynamics(h_bar))

    def routed(self, h_bar, outside="nearest"):
        """Gating when the coordinate alone decides. -> (indices, weights), Route. Rows of a batch may go to
        different versions. outside: what a coordinate outside its region gets, the "nearest" version or the
        bare "base"."""
        z = self.versions[-1].dynamics(h_bar)
        found = route(z, [v.region for v in self.versions])
        speakers = [self.speaker(i) for i in range(len(self.versions))]
        layers, k = max(v.layers for v in speakers), max(v.top_k for v in speakers)
        indices = torch.zeros(len(z), layers, k, dtype=torch.long, device=z.device)
        weights = torch.zeros(len(z), layers, k, device=z.device)
        asked = [speakers[i] for i in found.choice.tolist()]
        for v in {id(v): v for v in asked}.values():
            rows = [row for row, speaker in enumerate(asked) if speaker is v]
            for whole, own in zip((indices, weights), v.gating(z[rows])):
                whole[rows, :, : own.shape[-1]] = own.expand(-1, layers, -1)
        if outside == "base":  # weight 0: the low-rank update vanishes
            weights = weights * found.at_home().to(z.device)[:, None, None]
        return (indices, weights), found


def latest_run(root="runs"):
    """The run folder under `root` whose manifest was written last. Refused: there is none."""
    manifests = sorted(pathlib.Path(root).glob("*/manifest.json"), key=lambda p: p.stat().st_mtime)
    if not manifests:
        raise Refused(f"no run folder under {root}/: start one with train.py, or name one with --run")
    return manifests[-1].parent


# ------------------------------------------------------------------------------- the rest is the command line


def describe(run, entry):
    """Everything a manifest and a version's header say about it, as a dict."""
    path, head = run.path(entry["hash"]), run.head(entry)
    readers = [e["hash"] for e in dependents(run, entry["hash"])]
    about = {**head, **entry, "bytes": path.stat().st_size, "read_by": readers}
    for row in run.manifest["results"]:
        if row["version"] == entry["hash"]:
            about["perplexity"] = {k: row[k][entry["task"]] for k in ("base", "stored", "routed")}
    return about


def dependents(run, digest):
    """Entries that stand on a version: that read its bases, or were trained from its shared bank (soft lock
    and none)."""
    after = run.entries[[e["hash"] for e in run.entries].index(digest) + 1 :]
    return [e for e in after if e["lock"] in ("soft", "none") or digest in run.head(e)["reads"]]


def log(abouts):
    """Lines of `python commit.py log`: newest first, as in git. abouts: what `describe` says of every
    version."""
    for about in sorted(abouts, key=lambda about: about["date"], reverse=True):
        reads = [digest[:12] for digest in about["reads"]]
        yield f"* version {about['hash'][:12]}  {about['task']}  (lock: {about['lock']})"
        yield f"| Date:   {about['date']}"
        if about["lock"] == "composed":
            yield "|         " + " + ".join(f"{w:g} x {digest}" for digest, w in zip(reads, about["weights"]))
        else:
            yield f"|         writes {about['writes']} bases, reads {', '.join(reads) or 'nothing'}"
            size = f"{about['n']} coordinates, tau {about['tau']:.2f}, {about['anchors']} anchors"
            yield f"|         region of {size}"
        if "perplexity" in about:
            base, stored, routed = about["perplexity"].values()
            yield f"|         perplexity {base:.3f} before, {stored:.3f} stored, {routed:.3f} routed"
        yield "|"


def refuse_shared(run):
    if run.shared:
        raise Refused(f"{run.folder}: its versions, not of the exact lock, do not stand for themselves")


def verify(run):
    """[(entry, what is wrong or "")]: each file as when it is loaded, and its field on every anchor, to the
    bit."""
    found, earlier = [], []
    for entry in run.entries:
        wrong = ""
        try:
            version = run.read_version(entry, earlier)
            if isinstance(version, Version):
                earlier.append(version)
                now = take_snapshot(version.field, version.anchors)
                different = int((now != version.snapshot).flatten(1).any(1).sum())
                if different:
                    wrong = f"{different} of {len(now)} anchors give other logits than when it was committed"
        except Refused as e:
            wrong = str(e)
        found.append((entry, wrong))
    return found


def rollback(run, name, cascade=False):
    """Take a version out, and those that stand on it if `cascade`. -> their entries. Refused: some do."""
    gone = [run.find(name)]
    for entry in gone:
        gone += [e for e in dependents(run, entry["hash"]) if e not in gone]
    if len(gone) > 1 and not cascade:
        readers = ", ".join(e["task"] for e in gone[1:])
        raise Refused(f"{gone[0]['task']} is read by {readers}; --cascade removes them too")
    hashes, tasks = {e["hash"] for e in gone}, {e["task"] for e in gone}
    files = [path for e in gone for path in run.files(e)]
    manifest = copy.deepcopy(run.manifest)
    for kind in ("versions", "compositions"):
        manifest[kind] = [e for e in manifest[kind] if e["hash"] not in hashes]
    manifest["results"] = [row for row in manifest["results"] if row["version"] not in hashes]
    for row in manifest["results"]:
        for column in (c for c in row.values() if isinstance(c, dict)):
            for task in tasks & {*column}:
                del column[task]
    if not manifest["versions"]:
        manifest["settings"] = {}
    run.manifest = manifest
    run.save(removed=files)
    return gone


def compose(run, names, weights, name):
    """Commit a version that owns no bases: the gatings of several, weighed. -> its entry. Refused: it cannot
    be."""
    entries = [run.find(n) for n in names]
    check_name("--name", name)
    if len(weights) != len(entries) or not any(weights):
        raise Refused(f"--weights: {len(entries)} versions and {len(weights)} weights, or all are 0")
    refuse_shared(run)
    for e in entries:
        if run.head(e)["lock"] == "composed":
            raise Refused(f"{e['task']} is a composition itself: compose its versions")
    if name in {e["task"] for e in run.entries}:
        raise Refused(f"{run.folder} already has a version called {name}")
    run.commit(Composition(name, [e["hash"] for e in entries], list(weights)))
    return run.manifest["compositions"][-1]


def merge(run, other):
    """Take in the versions of another run that this one lacks. Returns their entries. Refused, with nothing
    changed: the two have no first version in common, names clash, or the other one is not whole."""
    ours, theirs = run.manifest, other.manifest
    if not theirs["versions"]:
        raise Refused(f"{other.folder}: no versions to merge")
    if not ours["versions"] or ours["versions"][0]["hash"] != theirs["versions"][0]["hash"]:
        raise Refused(f"{run.folder} and {other.folder} have no common first version, so no coordinates")
    if ours["backbone"]["fingerprint"] != theirs["backbone"]["fingerprint"]:
        raise Refused(f"{other.folder} belongs to another backbone than {run.folder}")
    refuse_shared(run)
    refuse_shared(other)
    known, names = {e["hash"] for e in run.entries}, {e["task"] for e in run.entries}
    new = [e for e in other.entries if e["hash"] not in known]
    for entry in new:
        if entry["task"] in names:
            raise Refused(f"both runs have a version called {entry['task']}; roll one back")
        if entry["lock"] != "composed" and not other.measured(entry):
            raise Refused(f"{other.manifest_file}: {entry['task']} is not measured: train.py does")
    for wrong in [wrong for folder in (run, other) for _, wrong in verify(folder) if wrong]:
        raise Refused(wrong)
    copies = {source: target for e in new for source, target in zip(other.files(e), run.files(e))}
    for source, target in copies.items():
        if target.exists() and target.read_bytes() != source.read_bytes():
            raise Refused(f"{target}: another file is in the way; move it")
    for source, target in copies.items():
        with atomic(target) as tmp:
            shutil.copyfile(source, tmp)
    ours["versions"] += [e for e in new if e["lock"] != "composed"]
    ours["compositions"] += [e for e in new if e["lock"] == "composed"]
    ours["results"] += [row for row in theirs["results"] if row["version"] in {e["hash"] for e in new}]
    if new:
        run.save()
    return new


def update_of(run, name):
    """What a version adds to the backbone's weights, with its gating at its region's mean coordinate.
    -> {target: (A [K r, d_in], B [K r, d_out])}, Delta W = B^T A: the chosen A_i stacked, and the chosen B_i,
    times (alpha / r) w_i. A composition joins its versions'. Refused: there is no such version, or not
    whole."""
    entry, settings = run.find(name), run.manifest["settings"]
    refuse_shared(run)
    versions = run.read_versions()
    parts = [(v, 1.0) for v in versions if v.hash == entry["hash"]]
    if not parts:
        composition = run.read_version(entry, versions)
        parts = zip(composition.versions, composition.weights)
    whole = lambda key: torch.cat([v.bases[key] for v in versions])  # one at a time: together they are large
    rows = {key: [] for key in versions[0].shapes}
    numbers = layer_numbers({key.rpartition(".")[0]: None for key in rows})
    for v, share in parts:
        indices, weights = (g[0] for g in v.gating(torch.tanh(v.region.mean).float()[None]))  # [L, K]
        for target, layer in numbers.items():
            chosen, w = indices[min(layer, len(indices) - 1)], weights[min(layer, len(indices) - 1)]
            scale = share * settings["alpha"] / settings["rank"] * w
            rows[f"{target}.A"].append(whole(f"{target}.A")[chosen].flatten(0, 1))
            rows[f"{target}.B"].append((scale[:, None, None] * whole(f"{target}.B")[chosen]).flatten(0, 1))
    return {t: (torch.cat(rows[f"{t}.A"]), torch.cat(rows[f"{t}.B"])) for t in numbers}


def export(run, name, folder, merged=False):
    """Write a version to a new or empty folder: an adapter in PEFT's format, or a checkpoint that any program
    of transformers loads. Return what was written, as a dict. Raises Refused if the folder holds something;
    see `update_of`, `write_adapter` and `write_merged`."""
    backbone = run.manifest["backbone"]["name"]
    with atomic_folder(folder) as tmp:
        update, title = update_of(run, name), f"{name} of {run.folder.name}"
        if merged:
            about = write_merged(update, *run.open_backbone(backbone, "cpu"), run.template, title, tmp)
        else:
            about = write_adapter(update, backbone, run.template, title, tmp)
    rank = len(next(iter(update.values()))[0])
    return {"folder": str(folder), "merged": merged, "r": rank, "target_modules": sorted(update), **about}


def parse_options(argv=None):
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--run", help="run folder [the latest under runs/]")
    common.add_argument("--json", action="store_true", help="print JSON")
    parser = Parser(__doc__, prog="commit.py")
    commands = parser.add_subparsers(dest="command", required=True, help="each has a --help of its own:")

    def command(name, help, version=False):
        p = commands.add_parser(name, help=help, doc=__doc__, description=help, parents=[common])
        if version:
            p.add_argument("version", help="a task, or the start of a hash")
        return p.add_argument

    command("log", "the versions, newest first")
    command("show", "everything about one version", version=True)
    command("verify", "recompute every hash and every anchor")
    add = command("rollback", "take a version out", version=True)
    add("--cascade", action="store_true", help="and those that stand on it")
    add = command("compose", "a gating over several versions")
    add("versions", nargs="+", help="tasks, or starts of hashes")
    add("--weights", nargs="+", type=number(float, -1e6, 1e6), required=True, help="one for each of them")
    add("--name", required=True, help="what the composition is called")
    add = command("merge", "take in another run's versions")
    add("other", metavar="OTHER_RUN", help="its run folder")
    add = command("export", "write a LoRA adapter in PEFT's format", version=True)
    add("--to", required=True, metavar="DIR", help="a new or an empty folder")
    add("--merged", action="store_true", help="a whole checkpoint in place of an adapter; loads the backbone")
    add("--backbone", help="where the backbone lies now [where it was]")
    return parser.parse_args(argv)


def change(run, args):
    """The commands that change a run folder. -> (what they did as JSON, and as text)"""
    short = lambda entries: ", ".join(f"{e['task']} {e['hash'][:12]}" for e in entries)
    with run.exclusive():
        if args.command != "compose" and (run.folder / "training.safetensors").exists():
            raise Refused(f"{run.folder}: finish its training first, or delete training.safetensors")
        if args.command == "rollback":
            gone = rollback(run, args.version, args.cascade)
            return gone, f"removed {short(gone)}"
        if args.command == "compose":
            entry = compose(run, args.versions, args.weights, args.name)
            return entry, f"committed {short([entry])}"
        new = merge(run, Run(args.other))
        return new, f"merged {short(new)}" if new else "already up to date"


def main(argv=None):
    args = parse_options(argv)
    run = Run(args.run or latest_run())
    if not run.manifest_file.exists():
        raise Refused(f"{run.folder}: not a run folder")
    if args.command == "log":
        result = [describe(run, e) for e in run.entries]
        text = "\n".join(log(result))
    elif args.command == "show":
        result = describe(run, run.find(args.version))
        plain = {k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in result.items()}
        text = "\n".join(f"{k:12} {v}" for k, v in plain.items())
    elif args.command == "verify":
        found = verify(run)
        result = [{"version": e["hash"], "task": e["task"], "wrong": wrong} for e, wrong in found]
        text = "\n".join(f"{e['hash'][:12]}  {e['task']}  {wrong or 'ok'}" for e, wrong in found)
    elif args.command == "export":
        if args.backbone:
            run.open_backbone(args.backbone, "cpu")
        result = export(run, args.version, args.to, args.merged)
        ends = f"answers end with {result['end']!r}, token {result['end_id']}"
        text = (
            f"wrote {result['folder']}: {result['what']} in {len(result['target_modules'])} modules; {ends}"
        )
        text += "" if result["tried"] else "; not tried with peft, which is not installed"
    else:
        result, text = change(run, args)
    print(json.dumps(result, indent=1) if args.json else text)
    if args.command == "verify" and any(r["wrong"] for r in result):
        sys.exit(1)


if __name__ == "__main__":
    run_program(main)
