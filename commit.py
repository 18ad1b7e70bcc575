"""Regions, locks and versions: what is committed stays.

After a task has been learned, its training inputs occupy a *region* of coordinate space. Committing the task writes
an immutable *version*: the bases it wrote, its field, its region, *anchors* in that region and a *snapshot* of the
field on them. One sentence holds for everything here: commit = freeze what a capability occupies; everything else
stays writable. There are two ways to keep that promise, and `train.py --lock` chooses:

exact   Addresses do not move: the probe is bare and the dynamics freeze at the first commit. Contents do not change:
        a later version may read committed bases but has a field and bases of its own to write. Nothing committed has
        a gradient, a moment or decay, so a stored capability stays bit-identical.
soft    The paper, Eqs. (9)-(13): one live bank, field and dynamics; a penalty holds the field's logits on the
        anchors. The bases and the dynamics move freely, and forgetting is what it is measured to be.
none    The same live bank, field and dynamics with no penalty at all.

Held here: sections 3.4-3.6 and Appendix B of the paper, Eqs. (9)-(13). Departures: a region's Gaussian is fitted to
artanh(z), not to z; and routing compares *between* regions, as discriminant analysis does, because one region's own
95 % ellipsoid cannot tell tasks apart.

    python commit.py log                              # the versions of a run folder, newest first
    python commit.py show VERSION                     # everything about one; VERSION is a task or the start of a hash
    python commit.py verify                           # every hash, every anchor recomputed and compared bit for bit
    python commit.py rollback VERSION [--cascade]     # take a version out, and those that stand on it
    python commit.py compose A B --weights .5 .5 --name AB    # a gating over both, which owns no bases
    python commit.py merge OTHER_RUN                  # take in versions learned elsewhere from the same first one
    python commit.py export VERSION --to DIR          # an ordinary LoRA adapter in PEFT's format

None of these trains, needs data or loads the backbone. All take `--run DIR` (default: the latest under runs/) and
`--json`. Whatever they do, every other version stays what it was, to the last bit.

A run folder holds `manifest.json`, `versions/<sha256>.safetensors` (named by content, as in git), `data/<task>.val.json`,
`training.safetensors` while a task is being trained, and `log.jsonl`. Every write is atomic. Nothing is pickled.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from field import CoordinateDynamics, WeightField, top_k_gating
from model import Refused, layer_numbers


# ---------------------------------------------------------------------------------------------- regions and anchors

def unsquash(z):
    """What Eq. (8) squashed: artanh(z). Coordinates pile up at the ends of (-1, 1), where no Gaussian fits; before the
    tanh they do not."""
    return torch.atanh(z.clamp(-1 + 1e-6, 1 - 1e-6))


@dataclasses.dataclass(eq=False)
class Region:
    """R = {z : d_M(z; mu, Sigma) <= tau}, Eq. (11). mean [d] and cov [d, d] are those of artanh(z), in float64; n
    coordinates were fitted. A region is itself and equals no other, so that `shrunk` can know it again."""
    mean: torch.Tensor
    cov: torch.Tensor
    tau: float
    n: int

    @classmethod
    def fit(cls, z, quantile=0.95):
        """Gaussian fitted to coordinates z [n, d]; tau is the given quantile of their own distances."""
        u = unsquash(z.cpu().double())
        mean = u.mean(0)
        cov = (u - mean).T @ (u - mean) / max(len(u) - 1, 1)
        # A ridge: fewer examples than dimensions, or a fixed coordinate, would leave Sigma singular.
        cov += (1e-4 * cov.diagonal().mean() + 1e-10) * torch.eye(len(mean), dtype=cov.dtype)
        region = cls(mean, cov, 0.0, len(u))
        region.tau = float(region.distance(z.cpu().double()).quantile(quantile))
        return region

    @functools.cached_property
    def whiten(self):
        """L^-1 [d, d] with Sigma = L L^T: d_M = |L^-1 (u - mu)|."""
        return torch.linalg.inv(torch.linalg.cholesky(self.cov))

    def distance(self, z):
        """d_M(z; mu, Sigma) [B], differentiable in z [B, d]."""
        return ((unsquash(z) - self.mean.to(z)) @ self.whiten.to(z).T).square().sum(1).clamp(min=1e-12).sqrt()


@dataclasses.dataclass
class Route:
    """Where B coordinates belong: choice [B] (index of a region), probability [B] of that choice, and for each region
    whether the coordinate is inside it, d_M <= tau [B, regions]."""
    choice: torch.Tensor
    probability: torch.Tensor
    inside: torch.Tensor

    def at_home(self):
        """[B]: is the coordinate inside the region that was chosen for it?"""
        return self.inside.gather(1, self.choice[:, None])[:, 0]


def route(z, regions):
    """Send coordinates z [B, d] to the region under whose Gaussian they are most likely. -> Route

    Regularised discriminant analysis (Friedman 1989): each region's covariance is drawn towards the pooled one, the more
    the fewer coordinates it was fitted on. With one pooled covariance alone (linear discriminant analysis) regions of
    different shape are confused; with a region's own alone, small ones are."""
    z = z.cpu().double()
    # log N(z; mu, Sigma) without its constant; log |Sigma|^(-1/2) is the sum of the logarithms on the diagonal of L^-1
    scores = [r.whiten.diagonal().log().sum() - r.distance(z).square() / 2 for r in shrunk(tuple(regions))]
    probability, choice = torch.stack(scores, 1).softmax(1).max(1)
    return Route(choice, probability, torch.stack([r.distance(z) <= r.tau for r in regions], 1))


@functools.lru_cache(maxsize=1)
def shrunk(regions):
    """The regions with the covariances that `route` compares: the same for every batch, so factored once."""
    pooled = sum(r.n * r.cov for r in regions) / sum(r.n for r in regions)
    return [dataclasses.replace(r, cov=(r.n * r.cov + len(pooled) * pooled) / (r.n + len(pooled))) for r in regions]


def sample_anchors(region, z, count, source, seed):
    """`count` anchors a_j inside the region, [count, d] (Appendix B). source: "gaussian" draws from the fitted Gaussian
    and rejects what falls outside; "empirical" takes a subsample of the coordinates z that lie inside."""
    generator = torch.Generator().manual_seed(seed)
    z = z.cpu().double()
    if source == "empirical":
        inside = z[region.distance(z) <= region.tau]
        return inside[torch.randperm(len(inside), generator=generator)[:count]].float()
    scale, anchors = torch.linalg.cholesky(region.cov), torch.empty(0, len(region.mean))
    for _ in range(100):
        draws = torch.randn(4 * count, len(region.mean), generator=generator, dtype=z.dtype) @ scale.T
        inside = torch.tanh(region.mean + draws).float()
        anchors = torch.cat([anchors, inside[region.distance(inside) <= region.tau]])[:count]
        if len(anchors) == count:
            return anchors
    # tau can be so small that a Gaussian hardly ever falls inside (a fixed coordinate has tau = 0): pull draws in.
    shrink = region.tau / region.distance(torch.tanh(region.mean + draws))
    return torch.cat([anchors, torch.tanh(region.mean + shrink[:, None] * draws).float()])[:count]


@torch.no_grad()
def take_snapshot(field, anchors):
    """Eq. (12): Phi(a_j) for every anchor, [count, L, N]. On the CPU, so that it can be recomputed anywhere."""
    device = field.w3.weight.device
    snapshot = field.cpu()(anchors.cpu())
    field.to(device)
    return snapshot


# ------------------------------------------------------------------------------------------ the soft (paper) lock

def lock_loss(field, versions):
    """Eq. (13): mean over anchors of |Phi(a_j) - snapshot_j|^2, summed over committed versions. It sees gating logits
    and nothing else: A and B of shared bases, and the dynamics that give z, are free to move."""
    total = torch.zeros((), device=field.w3.weight.device)
    for v in versions:
        now = field(v.anchors.to(total.device))[..., :v.snapshot.shape[-1]]  # a bank that grew has more logits
        total = total + (now - v.snapshot.to(total.device)).square().sum((1, 2)).mean()
    return total


def separation_loss(z, regions, margin):
    """Eq. (10): sum over regions of mean(max(0, tau_R + margin - d_M(z; R))^2). Pushes z [B, d] out of committed regions."""
    return sum(((r.tau + margin - r.distance(z)).clamp(min=0).square().mean() for r in regions), z.new_zeros(()))


# ---------------------------------------------------------------------------------------------------- versions

@dataclasses.dataclass
class Version:
    """One committed capability. `index` [N] gives, for each logit of its field, the number of the basis in the bank."""
    task: str
    lock: str                       # how it was trained: "exact", "soft", "none"; "first" had nothing to protect
    reads: list                     # hashes of the versions whose bases its field may choose, before its own
    top_k: int
    field: WeightField
    dynamics: CoordinateDynamics    # under the exact lock, that of the run's first version
    region: Region
    anchors: torch.Tensor           # [count, d]
    snapshot: torch.Tensor          # [count, L, N]
    bases: dict                     # the bases it wrote, keyed as in AdapterBank; emptied once they are in the bank
    config: dict                    # the options it was trained with
    hash: str = ""
    index: torch.Tensor = None

    def gating(self, z):
        """z [B, d] -> (indices into the bank, weights), both [B, L, K]."""
        indices, weights = top_k_gating(self.field(z), self.top_k)
        return self.index.to(indices.device)[indices], weights

    def save(self, folder):
        """Write it to `folder` under the hash of its contents, which is set and returned."""
        tensors = {f"bank.{k}": t for k, t in self.bases.items()}
        tensors |= {f"field.{k}": t for k, t in self.field.state_dict().items()}
        if not self.reads:  # the coordinate space belongs to a version that stands on no other
            tensors |= {f"dynamics.{k}": t for k, t in self.dynamics.state_dict().items()}
        tensors |= {"region.mean": self.region.mean, "region.cov": self.region.cov, "anchors": self.anchors, "snapshot": self.snapshot}
        head = {"task": self.task, "lock": self.lock, "reads": self.reads, "writes": len(next(iter(self.bases.values()))),
                "top_k": self.top_k, "tau": self.region.tau, "n": self.region.n, "anchors": len(self.anchors),
                "fixed": self.dynamics.fixed, "config": self.config}
        self.hash = write(folder, head, tensors)
        return self.hash

    @classmethod
    def load(cls, path, dynamics=None):
        """Read a version; `dynamics` are those of the run, for a version that has none of its own.

        Refused: see `check`."""
        check(path)
        try:
            with safe_open(path, "pt") as f:
                head, tensors = json.loads(f.metadata()["version"]), {k: f.get_tensor(k) for k in f.keys()}
        except (SafetensorError, KeyError, TypeError, ValueError) as e:
            raise Refused(f"{path}: not a version file ({e})") from e

        def part(prefix):
            return {k[len(prefix):]: t for k, t in tensors.items() if k.startswith(prefix)}
        layers, bases = tensors["snapshot"].shape[1:]
        hidden, coord_dim = tensors["field.w1.weight"].shape
        field = WeightField(layers, bases, coord_dim, hidden)
        field.load_state_dict(part("field."))
        if not head["reads"]:
            weights = part("dynamics.")
            dynamics = CoordinateDynamics(weights["gru.weight_ih"].shape[1], coord_dim, head["fixed"])
            dynamics.load_state_dict(weights)
        return cls(head["task"], head["lock"], head["reads"], head["top_k"], field.requires_grad_(False),
                   dynamics.requires_grad_(False),
                   Region(tensors["region.mean"], tensors["region.cov"], head["tau"], head["n"]), tensors["anchors"],
                   tensors["snapshot"], part("bank."), head["config"], hash=path.stem)


@dataclasses.dataclass
class Composition:
    """A gating over several versions, each with a weight: Delta W is their weighted sum. It owns no bases and no region, so
    no prompt is routed to it; it is asked for by name."""
    task: str
    reads: list                     # hashes of the versions
    weights: list
    hash: str = ""
    versions: list = ()             # set when a run folder is loaded
    lock = "composed"

    def gating(self, h_bar):
        """h_bar [B, features] -> (indices into the bank, weights), both [B, L, sum of the K]."""
        parts = [v.gating(v.dynamics(h_bar)) for v in self.versions]
        layers = max(indices.shape[1] for indices, _ in parts)
        return (torch.cat([indices.expand(-1, layers, -1) for indices, _ in parts], -1),
                torch.cat([share * weights.expand(-1, layers, -1) for share, (_, weights) in zip(self.weights, parts)], -1))

    def save(self, folder):
        """As `Version.save`."""
        self.hash = write(folder, {"task": self.task, "lock": self.lock, "reads": self.reads, "weights": self.weights}, {})
        return self.hash


def write(folder, head, tensors):
    """Write a version file under the hash of its contents, which is returned."""
    # One metadata key: safetensors does not promise an order, and the bytes are the name.
    data = save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, {"version": json.dumps(head, sort_keys=True)})
    digest = hashlib.sha256(data).hexdigest()
    with atomic(folder / f"{digest}.safetensors") as tmp:
        tmp.write_bytes(data)
    return digest


def check(path):
    """Refused: the version file is missing, or its contents no longer have the hash that is its name."""
    if not path.exists():
        raise Refused(f"{path}: this version is listed in the manifest, but its file is missing")
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    if digest.hexdigest() != path.stem:
        raise Refused(f"{path}: corrupted version file (its contents hash to {digest.hexdigest()[:12]}…); restore it from a copy")


@functools.cache
def header(path):
    """What a version file says of itself, without its tensors. A file never changes, so it is asked once."""
    with safe_open(path, "pt") as f:
        return json.loads(f.metadata()["version"])


# --------------------------------------------------------------------------------------------------- run folders

@contextlib.contextmanager
def atomic(path):
    """Gives a temporary path beside `path`; on success it is fsynced and renamed over it. A reader, or a run started
    after a kill, sees the old contents or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    try:
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
        if os.name == "posix":  # the rename itself lives in the folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        tmp.unlink(missing_ok=True)


class Run:
    """A run folder: one backbone, the settings fixed by its first task, and its versions in the order of commitment.

    Under the exact lock every version stands for itself. Under the soft lock and none, versions share one live bank,
    field and dynamics: the last version holds their present state, and speaks for all (`shared`)."""

    def __init__(self, folder):
        """Refused: the folder holds a manifest that is not ours or cannot be read."""
        self.folder = pathlib.Path(folder)
        self.read()

    def read(self):
        """Take the manifest from disk; no version is loaded then."""
        self.versions, self.compositions = [], []
        self.manifest = {"format": 1, "backbone": None, "settings": {}, "versions": [], "results": [], "compositions": []}
        path = self.folder / "manifest.json"
        if path.exists():
            try:
                manifest = json.loads(path.read_text())
                manifest.setdefault("compositions", [])
                assert manifest["format"] == 1 and {*self.manifest} <= {*manifest}
            except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as e:
                raise Refused(f"{path}: not a run manifest of this program") from e
            self.manifest = manifest

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
        return bool(self.manifest["versions"]) and self.manifest["versions"][-1]["lock"] in ("soft", "none")

    def path(self, digest):
        """The file of a version."""
        return self.folder / "versions" / f"{digest}.safetensors"

    def find(self, name):
        """The manifest's entry for a task name or the start of a hash, as in git. Refused: none, or more than one."""
        found = ([e for e in self.entries if e["task"] == name]
                 or [e for e in self.entries if len(name) >= 4 and e["hash"].startswith(name.lower())])
        if len(found) != 1:
            raise Refused(f"{self.folder}: {'no version' if not found else 'more than one version'} is called {name!r}; "
                          "see `python commit.py log`")
        return found[0]

    @contextlib.contextmanager
    def exclusive(self):
        """Within this block no other process changes the run folder. The lock dies with its process. Refused: it is taken."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "a") as f:
            if fcntl:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise Refused(f"{self.folder}: another process is at work on this run folder; wait for it, or choose another") from None
            self.read()  # as the other process may just have left it
            self.sweep()
            try:
                yield self
            finally:
                if [p.name for p in self.folder.iterdir()] == [".lock"]:  # nothing came of it: leave no empty folder
                    shutil.rmtree(self.folder)

    def sweep(self):
        """Remove what a killed command left: files that no manifest names. A training in progress keeps its own."""
        kept = {e["hash"] for e in self.entries}
        for p in [*self.folder.rglob("*.tmp"), *(self.folder / "versions").glob("*.safetensors")]:
            if p.stem not in kept:
                p.unlink()
        if not (self.folder / "training.safetensors").exists():
            for p in (self.folder / "data").glob("*.*.json"):
                if p.name.rsplit(".", 2)[0] not in self.tasks:
                    p.unlink()

    def save(self):
        with atomic(self.folder / "manifest.json") as tmp:
            tmp.write_text(json.dumps(self.manifest, indent=1))

    def validation_file(self, task):
        """Where the validation records are kept that the task is measured on, now and after every later task."""
        return self.folder / "data" / f"{task}.val.json"

    def validation(self, task):
        """Those records."""
        return json.loads(self.validation_file(task).read_text())

    def load(self, model):
        """Read all versions and put their bases, read-only, into the model's empty bank."""
        self.versions, self.compositions = [], []
        for entry in self.manifest["versions"]:
            root = self.versions[0].dynamics if self.versions else None
            self.versions.append(Version.load(self.path(entry["hash"]), root))
        span = {}
        for v in self.versions[-1:] if self.shared else self.versions:
            if v.bases.keys() != model.bank.committed.keys():
                raise Refused(f"{self.folder}: version {v.hash[:8]} was made for other modules than this backbone has")
            start = len(model.bank)
            model.bank.commit(v.bases)
            span[v.hash] = torch.arange(start, len(model.bank))
            v.index = torch.cat([span[h] for h in v.reads] + [span[v.hash]])
        for v in self.versions:
            v.bases = {}
            v.field.to(model.device), v.dynamics.to(model.device)
        by_hash = {v.hash: v for v in self.versions}
        for entry in self.manifest["compositions"]:
            check(self.path(entry["hash"]))
            head = header(self.path(entry["hash"]))
            self.compositions.append(Composition(head["task"], head["reads"], head["weights"], entry["hash"], [by_hash[h] for h in head["reads"]]))

    def commit(self, version):
        """Add a version: its file first, then the manifest that names it. A kill in between leaves an unnamed file, which
        the same training writes again under the same name."""
        version.save(self.folder / "versions")
        listed = self.manifest["compositions" if isinstance(version, Composition) else "versions"]
        listed.append({"hash": version.hash, "task": version.task, "lock": version.lock,
                       "date": time.strftime("%Y-%m-%d %H:%M:%S")})
        self.save()

    def probe_gating(self):
        """Gating of pass 1: off, or, with --probe adapted, what the last version has at z_0."""
        last = self.versions[-1]
        return last.gating(last.dynamics.z0[None]) if self.manifest["settings"]["probe"] == "adapted" else None

    def stored(self, i, h_bar):
        """Gating of task i when it is *given* that task i is asked for: its own dynamics, as they were committed, and
        what now lies at that address. Under the exact lock this cannot change."""
        v = self.versions[i]
        return (self.versions[-1] if self.shared else v).gating(v.dynamics(h_bar))

    def routed(self, h_bar, outside="nearest"):
        """Gating when the coordinate alone decides. -> (indices, weights), Route. Rows of a batch may go to different
        versions. outside: what a coordinate outside its region gets, the "nearest" version or the bare "base"."""
        z = self.versions[-1].dynamics(h_bar)
        found = route(z, [v.region for v in self.versions])
        if self.shared:
            gating = self.versions[-1].gating(z)
        else:
            layers, k = max(v.field.layers for v in self.versions), max(v.top_k for v in self.versions)
            gating = torch.zeros(len(z), layers, k, dtype=torch.long), torch.zeros(len(z), layers, k)
            gating = tuple(g.to(z.device) for g in gating)
            for i, v in enumerate(self.versions):
                rows = (found.choice == i).nonzero()[:, 0].to(z.device)
                if len(rows):
                    for whole, part in zip(gating, v.gating(z[rows])):
                        whole[rows, :, :part.shape[-1]] = part.expand(-1, layers, -1)
        if outside == "base":  # weight 0: the low-rank update vanishes
            gating = gating[0], gating[1] * found.at_home().to(z.device)[:, None, None]
        return gating, found


def drift(run, i, h_bar):
    """What the soft lock (or none) did to task i: where its coordinates went, and how well its anchors were held."""
    v, head = run.versions[i], run.versions[-1]
    then, now = v.dynamics(h_bar), head.dynamics(h_bar)
    logits = head.field(v.anchors.to(h_bar.device))[..., :v.snapshot.shape[-1]].cpu()
    sets = [torch.zeros_like(v.snapshot).scatter(-1, top_k_gating(x, v.top_k)[0], 1) for x in (logits, v.snapshot)]
    return {"inside_at_commit": float((v.region.distance(then) <= v.region.tau).double().mean()),
            "inside_now": float((v.region.distance(now) <= v.region.tau).double().mean()),
            "moved": float((now - then).norm(dim=1).mean()), "spread": float((then - then.mean(0)).norm(dim=1).mean()),
            "lock_loss": float((logits - v.snapshot).square().sum((1, 2)).mean()),
            "top_k_kept": float((sets[0] * sets[1]).sum() / sets[1].sum())}


def latest_run(root="runs"):
    """The run folder under `root` whose manifest was written last. Refused if there is none."""
    manifests = sorted(pathlib.Path(root).glob("*/manifest.json"), key=lambda p: p.stat().st_mtime)
    if not manifests:
        raise Refused(f"no run folder under {root}/: start one with `python train.py --task alpaca`, or name one with --run")
    return manifests[-1].parent


# ----------------------------------------------------------------------------------- the rest is the command line


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def number(kind, low, high=1e9):
    """An argparse type: a number of this kind in [low, high], which leaves out nan and inf."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of type {kind.__name__}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: at least {low:g}, at most {high:g}")
        return value

    return parse


def output_file(text):
    """An argparse type: a JSON file to write results to, tried before anything is computed. An older file of results is
    replaced, any other file is not."""
    path = pathlib.Path(text)
    try:
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            if not all({"command", "config"} & {*part} for part in (old if isinstance(old, list) else [old])):
                raise ValueError
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written ({e.strerror})") from None
    except (ValueError, TypeError, RecursionError):
        raise argparse.ArgumentTypeError(f"{text!r} is there and holds no results of this program") from None
    return path


def provenance():
    """What a result depends on besides its options: date, revision, versions, machine."""
    here = pathlib.Path(__file__).parent
    git = ""
    with contextlib.suppress(OSError):
        git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "git": git or None, "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"}


def run_program(main):
    """Run a program's `main`. What the user can mend, or asked for by Ctrl-C, is one line and not a traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    name = pathlib.Path(sys.argv[0]).name
    try:
        main()
    except (Refused, OSError, SafetensorError, MemoryError) as e:
        raise SystemExit(f"{name}: {' '.join(str(e).split()) or 'not enough memory'}") from None
    except RuntimeError as e:
        if "memory" not in str(e):
            raise
        raise SystemExit(f"{name}: not enough memory ({str(e).splitlines()[0]})") from None
    except KeyboardInterrupt as e:
        raise SystemExit(f"\n{name}: {e or 'stopped'}") from None


def describe(run, entry):
    """Everything a manifest and a version's header say about it, as a dict."""
    row = next((r for r in run.manifest["results"] if r["version"] == entry["hash"]), None)
    about = dict(entry, **{k: v for k, v in header(run.path(entry["hash"])).items() if k not in entry},
                 bytes=run.path(entry["hash"]).stat().st_size,
                 read_by=[e["hash"] for e in dependents(run, entry["hash"])])
    return dict(about, perplexity={k: row[k][entry["task"]] for k in ("base", "stored", "routed")}) if row else about


def dependents(run, digest):
    """Entries that stand on a version: that read its bases, or were trained from its shared bank (soft lock and none)."""
    found = [e for e in run.entries if digest in header(run.path(e["hash"]))["reads"]]
    hashes = [e["hash"] for e in run.entries]
    return found + [e for e in run.entries[hashes.index(digest) + 1:] if e["lock"] in ("soft", "none")]


def log(run):
    """Lines of `python commit.py log`: newest first, as in git. Reads the files' headers only."""
    for entry in sorted(run.entries, key=lambda e: e["date"], reverse=True):
        about = describe(run, entry)
        yield f"* version {entry['hash'][:12]}  {entry['task']}  (lock: {about['lock']})"
        yield f"| Date:   {entry['date']}"
        if about["lock"] == "composed":
            yield "|         " + " + ".join(f"{w:g} x {h[:12]}" for h, w in zip(about["reads"], about["weights"]))
        else:
            yield f"|         writes {about['writes']} bases, reads {', '.join(h[:12] for h in about['reads']) or 'nothing'}"
            yield f"|         region of {about['n']} coordinates, tau {about['tau']:.2f}, {about['anchors']} anchors"
        if "perplexity" in about:
            yield "|         perplexity {base:.3f} before, {stored:.3f} stored, {routed:.3f} routed".format(**about["perplexity"])
        yield "|"


def refuse_shared(run):
    if run.shared:
        raise Refused(f"{run.folder} was trained without the exact lock: its versions do not stand for themselves")


def check_name(option, name):
    """Names become file names. Refused: this one cannot."""
    if not re.fullmatch(r"\w[\w.-]{0,63}", name):
        raise Refused(f"{option} {name!r}: use letters, digits, '_', '-' and '.'")


def verify(run):
    """[(entry, what is wrong or "")]: the hash of every file, what it reads, and its field on every anchor, bit for bit."""
    found, root, known = [], None, set()
    for entry in run.entries:
        wrong = ""
        try:
            check(run.path(entry["hash"]))
            missing = [h for h in header(run.path(entry["hash"]))["reads"] if h not in known]
            if missing:
                wrong = f"reads {missing[0][:12]}, which is not here"
            elif entry in run.manifest["versions"]:
                version = Version.load(run.path(entry["hash"]), root)
                root = root or version.dynamics
                now = take_snapshot(version.field, version.anchors)
                different = int((now != version.snapshot).flatten(1).any(1).sum())
                wrong = f"{different} of {len(now)} anchors give other logits than when it was committed" if different else ""
        except (Refused, SafetensorError) as e:
            wrong = str(e)
        known.add(entry["hash"])
        found.append((entry, wrong))
    return found


def rollback(run, name, cascade=False):
    """Take a version out, with all that stand on it if `cascade`. Returns the entries removed. Refused: see there."""
    gone = [run.find(name)]
    for entry in gone:
        gone += [e for e in dependents(run, entry["hash"]) if e not in gone]
    if len(gone) > 1 and not cascade:
        raise Refused(f"{gone[0]['task']} is read by {', '.join(e['task'] for e in gone[1:])}; --cascade removes them too")
    hashes, tasks = {e["hash"] for e in gone}, {e["task"] for e in gone}
    manifest = copy.deepcopy(run.manifest)
    for kind in ("versions", "compositions"):
        manifest[kind] = [e for e in manifest[kind] if e["hash"] not in hashes]
    manifest["results"] = [{k: {t: x for t, x in v.items() if t not in tasks} if isinstance(v, dict) else v for k, v in row.items()}
                           for row in manifest["results"] if row["version"] not in hashes]
    if not manifest["versions"]:
        manifest["settings"] = {}
    run.manifest = manifest
    run.save()   # from here on the versions are gone; their files are only litter
    run.sweep()
    return gone


def compose(run, names, weights, name):
    """Commit a version that owns no bases: the gatings of several, weighed. Returns its entry."""
    entries = [run.find(n) for n in names]
    if len(weights) != len(entries):
        raise Refused(f"{len(entries)} versions and {len(weights)} weights")
    for e in entries:
        if e["lock"] not in ("first", "exact") or run.shared:
            raise Refused(f"{e['task']} cannot be composed: only versions that stand for themselves can, those of the exact lock")
    if name in {e["task"] for e in run.entries}:
        raise Refused(f"{run.folder} already has a version called {name}")
    check_name("--name", name)
    run.commit(Composition(name, [e["hash"] for e in entries], list(weights)))
    return run.manifest["compositions"][-1]


def merge(run, other):
    """Take in the versions of another run that this one lacks. Returns their entries. Refused, with nothing changed: the two
    have no first version in common, names clash, a version is damaged or its parents are missing."""
    ours, theirs = run.manifest, other.manifest
    if not theirs["versions"]:
        raise Refused(f"{other.folder}: no versions to merge")
    if not ours["versions"] or ours["versions"][0]["hash"] != theirs["versions"][0]["hash"]:
        raise Refused(f"{run.folder} and {other.folder} have no common first version, so no common coordinates; cannot be merged")
    if ours["backbone"]["fingerprint"] != theirs["backbone"]["fingerprint"]:
        raise Refused(f"{other.folder} belongs to another backbone ({theirs['backbone']['name']}) than {run.folder}")
    refuse_shared(run)
    refuse_shared(other)
    known = {e["hash"] for e in run.entries}
    names = {e["task"] for e in run.entries}
    manifest, new = copy.deepcopy(ours), []
    for kind in ("versions", "compositions"):
        for entry in theirs[kind]:
            if entry["hash"] in known:
                continue
            if entry["task"] in names:
                raise Refused(f"both runs have a version called {entry['task']}; roll one back or rename its task")
            check(other.path(entry["hash"]))
            missing = [h for h in header(other.path(entry["hash"]))["reads"] if h not in known]
            if missing:
                raise Refused(f"{entry['task']} reads version {missing[0][:12]}, which neither run has")
            known.add(entry["hash"])
            names.add(entry["task"])
            manifest[kind].append(entry)
            new.append(entry)
    for entry in new:
        for source in [other.path(entry["hash"]), *(other.folder / "data").glob(f"{entry['task']}.*.json")]:
            with atomic(run.folder / source.parent.name / source.name) as tmp:
                shutil.copyfile(source, tmp)
    manifest["results"] += [row for row in theirs["results"] if row["version"] in {e["hash"] for e in new}]
    run.manifest = manifest
    if new:
        run.save()
    return new


def export(run, name, folder):
    """Write a version as a LoRA adapter in PEFT's format: its gating at its region's mean coordinate, of rank K r, with
    A the chosen A_i one under the other and B the chosen B_i, times (alpha / r) w_i. A composition joins its versions'."""
    entry, folder = run.find(name), pathlib.Path(folder)
    refuse_shared(run)
    if folder.exists() and any(folder.iterdir()):
        raise Refused(f"{folder} is not empty")
    head = header(run.path(entry["hash"]))
    parts = list(zip(head["reads"], head["weights"])) if entry["lock"] == "composed" else [(entry["hash"], 1.0)]
    needed = {h for digest, _ in parts for h in [digest, *header(run.path(digest))["reads"]]}
    loaded, root = {}, None
    for e in run.manifest["versions"]:  # the first comes first: it has the dynamics of all
        if e["hash"] in needed:
            loaded[e["hash"]] = Version.load(run.path(e["hash"]), root)
            root = root or loaded[e["hash"]].dynamics
    A, B = {}, {}
    for digest, share in parts:
        v = loaded[digest]
        z = torch.tanh(v.region.mean).float()[None]
        indices, weights = (g[0] for g in top_k_gating(v.field(z), v.top_k))                   # [L, K]
        targets = dict.fromkeys(key.rpartition(".")[0] for key in v.bases)
        numbers = layer_numbers(targets)
        for target in targets:
            l = min(numbers[target], len(indices) - 1)
            bank = {p: torch.cat([loaded[h].bases[f"{target}.{p}"] for h in v.reads + [digest]])[indices[l]] for p in "AB"}  # [K, r, d]
            scale = share * run.manifest["settings"]["alpha"] / run.manifest["settings"]["rank"] * weights[l]
            A.setdefault(target, []).append(bank["A"].flatten(0, 1))
            B.setdefault(target, []).append((scale[:, None, None] * bank["B"]).flatten(0, 1))
    rank = sum(len(a) for a in next(iter(A.values())))
    tensors = {f"base_model.model.{t}.lora_A.weight": torch.cat(a).contiguous() for t, a in A.items()}
    tensors |= {f"base_model.model.{t}.lora_B.weight": torch.cat(b).T.contiguous() for t, b in B.items()}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": run.manifest["backbone"]["name"], "r": rank,
              "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
              "target_modules": sorted(A)}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "adapter_model.safetensors") as tmp:
        tmp.write_bytes(save(tensors, {"format": "pt"}))
    with atomic(folder / "adapter_config.json") as tmp:
        tmp.write_text(json.dumps(config, indent=1))
    return dict(config, folder=str(folder))


def main(argv=None):
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--run", help="run folder (default: the latest under runs/)")
    common.add_argument("--json", action="store_true", help="print JSON")
    parser = argparse.ArgumentParser(prog="commit.py", description="Look after the versions of a run folder.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, help, *arguments):
        p = commands.add_parser(name, help=help, parents=[common])
        for flag, options in arguments:
            p.add_argument(flag, **options)
    version = ("version", dict(help="a task, or the start of a hash"))
    command("log", "the versions, newest first")
    command("show", "everything about one version", version)
    command("verify", "recompute every hash and every anchor")
    command("rollback", "take a version out", version, ("--cascade", dict(action="store_true", help="and those that stand on it")))
    command("compose", "a gating over several versions", ("versions", dict(nargs="+")),
            ("--weights", dict(nargs="+", type=float, required=True)), ("--name", dict(required=True)))
    command("merge", "take in another run's versions", ("other", dict(metavar="OTHER_RUN")))
    command("export", "write a LoRA adapter in PEFT's format", version, ("--to", dict(required=True, metavar="DIR")))
    args = parser.parse_args(argv)
    run = Run(args.run or latest_run())
    if not (run.folder / "manifest.json").exists():
        raise Refused(f"{run.folder}: not a run folder")
    short = lambda entries: ", ".join(f"{e['task']} {e['hash'][:12]}" for e in entries)  # noqa: E731
    if args.command == "log":
        result = [describe(run, e) for e in run.entries]
        text = "\n".join(log(run))
    elif args.command == "show":
        result = describe(run, run.find(args.version))
        text = "\n".join(f"{k:12} {json.dumps(v) if isinstance(v, (dict, list)) else v}" for k, v in result.items())
    elif args.command == "verify":
        found = verify(run)
        result = [{"version": e["hash"], "task": e["task"], "wrong": wrong} for e, wrong in found]
        text = "\n".join(f"{e['hash'][:12]}  {e['task']}  {wrong or 'ok'}" for e, wrong in found)
    elif args.command == "export":
        result = export(run, args.version, args.to)
        text = f"wrote {result['folder']}: rank {result['r']}, {len(result['target_modules'])} modules"
    else:
        with run.exclusive():
            if args.command != "compose" and (run.folder / "training.safetensors").exists():
                raise Refused(f"{run.folder}: an unfinished training builds on these versions; finish it, or delete training.safetensors")
            if args.command == "rollback":
                result = rollback(run, args.version, args.cascade)
                text = f"removed {short(result)}"
            elif args.command == "compose":
                result = compose(run, args.versions, args.weights, args.name)
                text = f"committed {short([result])}"
            else:
                result = merge(run, Run(args.other))
                text = f"merged {short(result)}" if result else "already up to date"
    print(json.dumps(result, indent=1) if args.json else text)
    if args.command == "verify" and any(r["wrong"] for r in result):
        sys.exit(1)


if __name__ == "__main__":
    run_program(main)
