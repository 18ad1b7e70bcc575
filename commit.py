"""Git for capabilities: what is committed stays, on disk and in what it answers.

Committing a task writes an immutable *version*: the bases it wrote, its field, its region, *anchors* in that
region and a *snapshot* of the field on them, which the paper's lock holds and `verify` compares. One sentence
holds for everything here: commit = freeze what a capability occupies; everything else stays writable.
`train.py --lock` chooses how that promise is kept:

exact   Addresses do not move: h_bar is of bare layers, and the dynamics freeze at the first commit. Contents
        do not change: a later version may use committed bases, but it writes a field and bases of its own.
        Nothing committed has a gradient, a moment or decay, so a stored capability stays bit-identical.
soft    The paper, Eqs. (9)-(13): one live bank, field and dynamics; a penalty holds the field's logits on the
        anchors. The bases and the dynamics move freely, so older tasks are forgotten.
none    The same live bank, field and dynamics with no penalty at all.

    python commit.py log                      # the versions of a run folder, newest first
    python commit.py show VERSION             # all about one; VERSION is a task or the start of a hash
    python commit.py verify                   # every hash; every anchor recomputed and compared
    python commit.py rollback VERSION [--cascade]             # take it out, and those that stand on it
    python commit.py compose A B --weights .5 .5 --name AB    # a gating over both, which owns no bases
    python commit.py compose --like FILE.json --name NEW      # weights found on a few labelled records
    python commit.py merge OTHER_RUN          # versions learned elsewhere from the same first one
    python commit.py export VERSION --to DIR  # an ordinary LoRA adapter in PEFT's format
    python commit.py export VERSION --to DIR [--merged] [--push OWNER/NAME]   # a whole model; to the Hub, too
    python commit.py verify --at URL --expected FILE          # does a server answer as the export it serves?

None of these trains a basis or changes a bit of a version that stays. All take `--run DIR` (default: the
latest under runs/) and `--json`.

This file covers sections 3.5, 3.6 and 7 of the NIWF paper, Eqs. (11) and (12). The exact lock is ours.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import sys

from plumbing import Refused  # first: it sets what torch and the Hub's client read when imported

import torch

from field import CoordinateDynamics, Region, WeightField, route, sample_anchors, take_snapshot, top_k_gating
from ftn import k_winners, propose
from model import NIWF, response_nll
from plumbing.backbone import pick_device
from plumbing.command import run_program
from plumbing.expected import ask_server
from plumbing.export import export, say_export
from plumbing.files import latest_run
from plumbing.folder import Folder
from plumbing.log import composable, describe, log, mergeable, parse_command, removable, without
from plumbing.prompts import digest_of_prompts, pad_of
from plumbing.records import read_examples
from plumbing.targets import named_targets
from plumbing.versionfile import COMPOSITION, check_tensors, map_tensors, part_of, read_version_file
from plumbing.versionfile import write_version


# ---------------------------------------------------------------------------------- the act of committing


@torch.no_grad()
def commit_task(run, learner, h_bar, task, lock, config, quantile=0.95, count=256, seed=0):
    """Commit what a task has learned (section 3.5). h_bar [n, features]: of its training prompts. -> Version

    learner: the model, field and dynamics that were trained, see train.py. config: its options."""
    z = learner.dynamics(h_bar)  # collect the task's coordinates [n, d]
    region = Region.fit(z, quantile)  # NIWF Eq. (11): where the task lives
    anchors = sample_anchors(region, count, seed)  # a_j, points of the region [count, d]
    tensors = {"anchors": anchors, "snapshot": take_snapshot(learner.field, anchors)}  # NIWF Eq. (12)
    tensors |= {f"field.{key}": t for key, t in learner.field.state_dict().items()}
    tensors |= {f"bank.{key}": p.data for key, p in learner.model.bank.live.items()}  # the bases it wrote
    version = Version(
        task=task,
        lock=lock if run.versions else "first",
        reads=learner.reads,
        top_k=learner.top_k,
        dynamics=learner.dynamics,
        region=region,
        source=tensors,
        shapes=learner.model.bank.basis_shapes(),
        writes=learner.model.bank.sizes()[-1],
        index=torch.arange(len(learner.model.bank)),
        config=config,
    )
    run.commit(version)
    return version


@dataclasses.dataclass
class Version:
    """One committed capability. A run's bank holds the bases of all its versions, or, if shared, of the last.

    source: its tensors, "anchors" [count, d], "snapshot" [count, L, N], "field.*", and "bank.*", the bases it
    wrote, keyed as in AdapterBank; or the file that holds them. The file is mapped into memory when a tensor
    is first asked for, so a version that nobody asks takes hardly any memory."""

    task: str
    lock: str  # how it was trained: "exact", "soft", "none"; "first" had nothing to protect
    reads: list  # hashes: its first logits choose among these versions' bases, the others among its own
    top_k: int
    dynamics: CoordinateDynamics  # under the exact lock, that of the run's first version
    region: Region
    source: dict | pathlib.Path
    shapes: dict  # of one basis of each key
    writes: int  # how many bases it wrote
    config: dict  # the options it was trained with
    index: torch.Tensor  # [N]: for each logit of its field, the number of the basis in the bank
    hash: str = ""  # the name of its file, once it has one

    @functools.cached_property
    def tensors(self):
        return self.source if isinstance(self.source, dict) else map_tensors(self.source)

    anchors = property(lambda self: self.tensors["anchors"])
    snapshot = property(lambda self: self.tensors["snapshot"])

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
        """Write it to `folder` under the hash of its contents, and set `hash`."""
        tensors = self.tensors | {"region.mean": self.region.mean, "region.cov": self.region.cov}
        if not self.reads:  # a version that reads others has the dynamics of the first
            tensors |= {f"dynamics.{k}": t for k, t in self.dynamics.state_dict().items()}
        head = {key: getattr(self, key) for key in ("task", "lock", "reads", "writes", "top_k", "config")}
        head |= {"tau": self.region.tau, "n": self.region.n, "anchors": len(self.anchors)}
        self.hash = write_version(folder, head, tensors)

    @classmethod
    def load(cls, path, earlier=()):
        """Read a version from its file. earlier: the run's versions before it. Raises Refused as
        `read_version_file` does, if it reads a version that is not among them, or one twice, and if its
        tensors do not fit its header, each other or the run's first version."""
        head, tensors = read_version_file(path, tensors=True)
        known = {v.hash: v for v in earlier}
        parts = {name: part_of(tensors, name) for name in {key.partition(".")[0] for key in tensors}}
        lost = [h for i, h in enumerate(head["reads"]) if h not in known or h in head["reads"][:i]]
        if lost:
            raise Refused(f"{path}: reads {lost[0][:12]}, which is damaged, missing, later or named twice")
        if head["lock"] == "composed":
            raise Refused(f"{path}: is a composition")
        start = sum(v.writes for v in earlier) if head["lock"] in ("first", "exact") else 0
        own = torch.arange(start, start + head["writes"])
        index = torch.cat([*(known[h].own for h in head["reads"]), own])
        try:
            check_tensors(head, tensors, parts, len(index), earlier)
            region = {key: t.clone() for key, t in parts["region"].items()}
            region = Region(**region, tau=head["tau"], n=head["n"])
            route(tensors["anchors"][:1], [*(v.region for v in earlier[:1]), region])  # can it be asked?
            field_of(tensors)
            dynamics = earlier[0].dynamics if head["reads"] else None
            if not dynamics:
                features, d = parts["dynamics"]["gru.weight_ih"].shape[1], len(tensors["region.mean"])
                dynamics = CoordinateDynamics(features, d).requires_grad_(False)
                dynamics.load_state_dict(parts["dynamics"])
        except (KeyError, ValueError, RuntimeError, IndexError) as e:
            raise Refused(f"{path}: its tensors do not fit: {e}") from None
        same = {key: head[key] for key in ("task", "lock", "reads", "top_k", "config", "writes")}
        shapes = {key: (*t.shape[1:],) for key, t in parts["bank"].items()}
        # `source` is mapped again when a tensor is asked for.
        about = {"dynamics": dynamics, "region": region, "index": index, "hash": path.stem}
        return cls(**same, **about, source=path, shapes=shapes)


def field_of(tensors):
    """Return a version's field, with copies of its tensors. Raises RuntimeError if they do not fit."""
    (_, layers, bases), (hidden, d) = tensors["snapshot"].shape, tensors["field.w1.weight"].shape
    with torch.device("meta"):  # nothing is drawn, nothing is filled
        field = WeightField(layers, bases, d, hidden)
    own = {key: t.clone() for key, t in part_of(tensors, "field").items()}
    field.load_state_dict(own, assign=True)
    return field.requires_grad_(False)


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
        weights = [share * w for share, (_, w) in zip(self.weights, parts)]
        return torch.cat([indices for indices, _ in parts], -1), torch.cat(weights, -1)

    def save(self, folder):
        """Write it, as `Version.save` does."""
        self.hash = write_version(folder, {key: getattr(self, key) for key in COMPOSITION}, {})

    @classmethod
    def load(cls, path, versions):
        """Read one, as `Version.load` does. versions: all of the run."""
        (head, tensors), known = read_version_file(path, tensors=True), {v.hash: v for v in versions}
        weights = head.get("weights", [])
        if tensors or len(head["reads"]) != len(weights) or not any(weights) or {*head["reads"]} - {*known}:
            raise Refused(f"{path}: must read versions of this run, with a weight each, and have no tensors")
        return cls(head["task"], head["reads"], weights, [known[h] for h in head["reads"]], path.stem)


# ------------------------------------------------------------------------------------------------ who answers


class Run(Folder):
    """A run folder, and the gatings with which it answers. Under the exact lock every version stands for
    itself. Under the soft lock and none, all share one live bank, field and dynamics: the last version holds
    their present state, and answers for all (`speaker`)."""

    def read(self):
        """Take the manifest from disk, and forget the versions that were loaded."""
        super().read()
        self.versions, self.compositions = [], []

    def speaker(self, i):
        """Return the version whose field and bases answer for version i."""
        return self.versions[-1 if self.shared else i]

    def probe_gating(self):
        """Return the gating of pass 1: None, or, with --probe adapted, the last version's at z_0."""
        last, adapted = self.versions[-1], self.manifest["settings"]["probe"] == "adapted"
        return last.gating(last.dynamics.z0[None]) if adapted else None

    def stored(self, i, h_bar):
        """Return the gating of a prompt that is *known* to be of task i. Its dynamics as committed give the
        address; `speaker` gives what now lies there. Under the exact lock this cannot change."""
        return self.speaker(i).gating(self.versions[i].dynamics(h_bar))

    def routed(self, h_bar, outside="nearest"):
        """Return the gating that the coordinates alone select, and their Route; rows of a batch may go to
        different versions. outside: who answers where the background is likelier than every region, the
        likeliest version ("nearest") or the bare backbone ("base")."""
        z = self.versions[-1].dynamics(h_bar)
        found = route(z, [v.region for v in self.versions])
        speakers = [self.speaker(i) for i in found.choice.tolist()]
        layers, k = speakers[0].field.layers, max(v.top_k for v in speakers)
        indices = torch.zeros(len(z), layers, k, dtype=torch.long, device=z.device)
        weights = torch.zeros(len(z), layers, k, device=z.device)
        for v in {id(v): v for v in speakers}.values():
            rows = [row for row, speaker in enumerate(speakers) if speaker is v]
            for whole, own in zip((indices, weights), v.gating(z[rows])):
                whole[rows, :, : own.shape[-1]] = own
        if outside == "base":  # weight 0: the low-rank update vanishes
            weights = weights * found.known().to(z.device)[:, None, None]
        return (indices, weights), found

    def open_model(self, backbone, tokenizer, targets=None):
        """Return the backbone with a bank that holds what the run has committed. targets: what a run without
        versions adapts; others adapt what their first does. Raises Refused if prompts would differ."""
        settings, versions = self.manifest["settings"], self.read_versions()
        said = settings.get("prompts")  # of a run with --template chat
        if said and said != digest_of_prompts(tokenizer, self.template, self.day):
            raise Refused(f"{self.folder}: the model's chat template writes other prompts than were learned")
        if versions:
            targets = named_targets(backbone, {key.rpartition(".")[0] for key in versions[0].shapes})
        how = {"rank": settings["rank"], "alpha": settings["alpha"], "bare": settings["bare_layers"]}
        model = NIWF(backbone, pad_of(tokenizer), targets=targets, **how)
        self.load(model, versions)
        return model

    def read_versions(self):
        """Read all versions, in order. Raises Refused as `read_version` does."""
        versions = []
        for entry in self.manifest["versions"]:
            versions.append(self.read_version(entry, versions))
        return versions

    def load(self, model, versions):
        """Put the bases of all versions (of a shared bank: the last's) read-only into the model's empty bank.
        Raises Refused if they were made for another backbone."""
        self.versions = versions
        for i, v in enumerate(self.versions):
            if v.shapes != model.bank.basis_shapes() or v.dynamics.gru.input_size != model.features:
                raise Refused(f"{self.path(v.hash)}: made for other modules than this backbone has")
            if self.speaker(i) is v:
                model.bank.commit(v.writes, lambda v=v: v.bases)
            v.dynamics.to(model.device)
        self.compositions = [self.read_version(e, self.versions) for e in self.manifest["compositions"]]

    def read_version(self, entry, earlier):
        """Read the version or composition of an entry, and see that its data files are whole. earlier: the
        versions before it. Raises Refused if anything is damaged, or says other things than the manifest."""
        path, kind = self.path(entry["hash"]), Composition if entry["lock"] == "composed" else Version
        version = kind.load(path, earlier)
        self.agree(entry, version.task, version.lock)
        if kind is Composition:
            return version
        (self.digests if self.measured(entry) else self.validation)(entry["task"])
        if not earlier:
            (rank, _), d = next(iter(version.shapes.values())), len(version.region.mean)
            self.check_settings({**version.config, "rank": rank, "coord_dim": d})
        return version


# -------------------------------------------------------------------------------------------- the commands


def verify(run):
    """Load, and so check, every file; compare its field on the anchors with the snapshot, up to another
    machine's rounding. -> [(entry, what is wrong or "")]"""
    found, earlier = [], []
    for entry in run.entries:
        wrong = ""
        try:
            version = run.read_version(entry, earlier)
            if isinstance(version, Version):
                earlier.append(version)
                now = take_snapshot(version.field, version.anchors)
                alike = torch.isclose(now, version.snapshot, rtol=1e-4, atol=1e-5).flatten(1).all(1)
                if different := len(now) - int(alike.sum()):
                    wrong = f"{different} of {len(now)} anchors give other logits than when it was committed"
        except Refused as e:
            wrong = str(e)
        found.append((entry, wrong))
    return found


def rollback(run, name, cascade=False):
    """Take a version out, with `cascade` also those that stand on it. Return their entries. Raises Refused
    if some do, without `cascade`."""
    gone = removable(run, name, cascade)
    hashes, tasks = {e["hash"] for e in gone}, {e["task"] for e in gone}
    files = [path for e in gone for path in run.files(e)] + [run.state_file]  # a kill may have left that
    run.manifest = without(copy.deepcopy(run.manifest), hashes, tasks)
    run.save(removed=files)
    return gone


def compose(run, names, weights, name, like=None, backbone=None):
    """Commit a version that owns no bases: the gatings of several, weighed. Return its entry. Raises Refused
    if that cannot be. like: a file of a few labelled records; `weigh` finds the weights on them, of all
    versions if none is named. backbone: where it lies now, if it has moved."""
    hashes = composable(run, names, weights, name)
    if like:
        opened = run.open_backbone(backbone or run.manifest["backbone"]["name"], pick_device(None))
        model, examples = run.open_model(*opened), read_examples(like, *opened, run.template, run.day)
        chosen = [v for v in run.versions if v.hash in hashes]
        hashes, weights = weigh(model, chosen, examples, run.probe_gating())
    run.commit(Composition(name, hashes, list(weights)))
    return run.manifest["compositions"][-1]


def weigh(model, versions, examples, probe_gating=None, kept=4, steps=15, lr=0.5):
    """Find weights for n versions by the loss on examples: FTN's Algorithm 1 over versions in place of
    neurons, without a torus (ftn.py). Each begins with 1 / (n + 1). A step takes up to 16 examples, in turn.
    -> hashes, weights of the largest"""
    # Take four examples a pass, because a pass keeps the factors of all versions for its gradient.
    parts = [examples[i : i + 4] for i in range(0, len(examples), 4)]
    parts = [(part, model.probe([prompt for prompt, _ in part], probe_gating)) for part in parts]
    turns = itertools.cycle(parts)

    def loss(mask):
        shares = mask.detach().requires_grad_()
        chosen = [*itertools.islice(turns, min(4, len(parts)))]
        tokens = sum(len(response) for part, _ in chosen for _, response in part)
        for part, h_bar in chosen:
            gating = Composition("", [], shares, versions).gating(h_bar)
            (response_nll(*model.logits(part, gating)).sum() / tokens).backward()
        return mask @ shares.grad  # its gradient in `mask` is that of the mean loss

    m = propose(loss, torch.full((len(versions),), -math.log(len(versions))), steps, lr)
    winners = k_winners(m, min(kept, len(m))).tolist()
    return [versions[i].hash for i in winners], m[winners].sigmoid().tolist()


def merge(run, other):
    """Take in the versions of another run that this one lacks. Return their entries. Raises Refused, with
    nothing changed, if one is not whole, or as `mergeable` does."""
    new = mergeable(run, other)
    if damage := [wrong for _, wrong in verify(run) + verify(other) if wrong]:
        raise Refused(damage[0])
    run.take(other, new)
    return new


# ------------------------------------------------------------------------------------------- the command line


parse_options = functools.partial(parse_command, __doc__)


def change(run, args):
    """Run a command that changes a run folder. -> (what it did as JSON, and as text)"""
    short = lambda entries: ", ".join(f"{e['task']} {e['hash'][:12]}" for e in entries)
    with run.exclusive():
        if run.in_training():
            raise Refused(f"{run.folder}: finish its training first, or delete training.safetensors")
        if args.command == "rollback":
            gone = rollback(run, args.version, args.cascade)
            return gone, f"removed {short(gone)}"
        if args.command == "compose":
            entry = compose(run, args.versions, args.weights, args.name, args.like, args.backbone)
            return entry, f"committed {short([entry])}"
        new = merge(run, Run(args.other))
        return new, f"merged {short(new)}" if new else "already up to date"


def main(argv=None):
    args = parse_options(argv)
    if args.command == "verify" and args.at:  # this asks a server, and needs no run folder
        result, text = ask_server(args.at, args.expected, args.model)
    elif not (run := Run(args.run or latest_run())).manifest_file.exists():
        raise Refused(f"{run.folder}: not a run folder")
    elif args.command == "log":
        result = [describe(run, e) for e in run.entries]
        text = "\n".join(log(result))
    elif args.command == "show":
        result = describe(run, run.find(args.version))
        text = "\n".join(f"{k:12} {v if isinstance(v, str) else json.dumps(v)}" for k, v in result.items())
    elif args.command == "verify":
        found = verify(run)
        result = [{"version": e["hash"], "task": e["task"], "wrong": wrong} for e, wrong in found]
        text = "\n".join(f"{e['hash'][:12]}  {e['task']}  {wrong or 'ok'}" for e, wrong in found)
    elif args.command == "export":
        text = say_export(result := export(run, args.version, args.to, args.merged, args.backbone, args.push))
    else:
        result, text = change(run, args)
    print(json.dumps(result, indent=1) if args.json else text)
    if args.command == "verify" and any(r["wrong"] for r in result):
        sys.exit(1)


if __name__ == "__main__":
    run_program(main)
