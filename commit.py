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

    python commit.py log [--run DIR]      # the versions of a run folder, newest first

A run folder holds `manifest.json`, `versions/<sha256>.safetensors` (named by content, as in git), `data/<task>.val.json`,
`training.safetensors` while a task is being trained, and `log.jsonl`. Every write is atomic. Nothing is pickled.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from field import CoordinateDynamics, WeightField, top_k_gating
from model import Refused


# ---------------------------------------------------------------------------------------------- regions and anchors

def unsquash(z):
    """What Eq. (8) squashed: artanh(z). Coordinates pile up at the ends of (-1, 1), where no Gaussian fits; before the
    tanh they do not."""
    return torch.atanh(z.clamp(-1 + 1e-6, 1 - 1e-6))


@dataclasses.dataclass
class Region:
    """R = {z : d_M(z; mu, Sigma) <= tau}, Eq. (11). mean [d] and cov [d, d] are those of artanh(z), in float64; n
    coordinates were fitted."""
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

    def distance(self, z):
        """d_M(z; mu, Sigma) [B], differentiable in z [B, d]."""
        whiten = torch.linalg.inv(torch.linalg.cholesky(self.cov)).to(z)  # d_M = |L^-1 (u - mu)| with Sigma = L L^T
        return ((unsquash(z) - self.mean.to(z)) @ whiten.T).square().sum(1).clamp(min=1e-12).sqrt()


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
    pooled = sum(r.n * r.cov for r in regions) / sum(r.n for r in regions)
    scores = []
    for r in regions:
        cov = (r.n * r.cov + len(pooled) * pooled) / (r.n + len(pooled))
        d2 = dataclasses.replace(r, cov=cov).distance(z).square()
        scores.append(-(d2 + torch.logdet(cov)) / 2)  # log N(z; mu, cov) without its constant
    probability, choice = torch.stack(scores, 1).softmax(1).max(1)
    return Route(choice, probability, torch.stack([r.distance(z) <= r.tau for r in regions], 1))


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
        header = {"task": self.task, "lock": self.lock, "reads": self.reads, "writes": len(next(iter(self.bases.values()))),
                  "top_k": self.top_k, "tau": self.region.tau, "n": self.region.n, "anchors": len(self.anchors),
                  "fixed": self.dynamics.fixed, "config": self.config}
        # One metadata key: safetensors does not promise an order, and the bytes are the name.
        data = save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, {"version": json.dumps(header, sort_keys=True)})
        self.hash = hashlib.sha256(data).hexdigest()
        with atomic(folder / f"{self.hash}.safetensors") as tmp:
            tmp.write_bytes(data)
        return self.hash

    @classmethod
    def load(cls, path, dynamics=None):
        """Read a version; `dynamics` are those of the run, for a version that has none of its own.

        Refused: the file is missing, truncated, or its contents no longer have the hash that is its name."""
        if not path.exists():
            raise Refused(f"{path}: this version is listed in the manifest, but its file is missing")
        with open(path, "rb") as f:
            digest = hashlib.sha256()
            while chunk := f.read(1 << 22):
                digest.update(chunk)
        if digest.hexdigest() != path.stem:
            raise Refused(f"{path}: corrupted version file (its contents hash to {digest.hexdigest()[:12]}…); restore it from a copy")
        try:
            with safe_open(path, "pt") as f:
                header, tensors = json.loads(f.metadata()["version"]), {k: f.get_tensor(k) for k in f.keys()}
        except (SafetensorError, KeyError, TypeError, ValueError) as e:
            raise Refused(f"{path}: not a version file ({e})") from e

        def part(prefix):
            return {k[len(prefix):]: t for k, t in tensors.items() if k.startswith(prefix)}
        layers, bases = tensors["snapshot"].shape[1:]
        hidden, coord_dim = tensors["field.w1.weight"].shape
        field = WeightField(layers, bases, coord_dim, hidden)
        field.load_state_dict(part("field."))
        if not header["reads"]:
            weights = part("dynamics.")
            dynamics = CoordinateDynamics(weights["gru.weight_ih"].shape[1], coord_dim, header["fixed"])
            dynamics.load_state_dict(weights)
        return cls(header["task"], header["lock"], header["reads"], header["top_k"], field.requires_grad_(False),
                   dynamics.requires_grad_(False),
                   Region(tensors["region.mean"], tensors["region.cov"], header["tau"], header["n"]), tensors["anchors"],
                   tensors["snapshot"], part("bank."), header["config"], hash=path.stem)


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
        self.versions = []
        self.manifest = {"format": 1, "backbone": None, "settings": {}, "versions": [], "results": []}
        path = self.folder / "manifest.json"
        if path.exists():
            try:
                manifest = json.loads(path.read_text())
                assert manifest["format"] == 1 and {*self.manifest} <= {*manifest}
            except (ValueError, KeyError, TypeError, AssertionError) as e:
                raise Refused(f"{path}: not a run manifest of this program") from e
            self.manifest = manifest

    @property
    def tasks(self):
        """Names of the committed tasks, in order."""
        return [v["task"] for v in self.manifest["versions"]]

    @property
    def shared(self):
        return bool(self.versions) and self.versions[-1].lock in ("soft", "none")

    def save(self):
        with atomic(self.folder / "manifest.json") as tmp:
            tmp.write_text(json.dumps(self.manifest, indent=1))

    def validation_file(self, task):
        """Where the validation records are kept that the task is measured on, now and after every later task."""
        return self.folder / "data" / f"{task}.val.json"

    def load(self, model):
        """Read all versions and put their bases, read-only, into the model's empty bank."""
        self.versions = []
        for entry in self.manifest["versions"]:
            root = self.versions[0].dynamics if self.versions else None
            self.versions.append(Version.load(self.folder / "versions" / f"{entry['hash']}.safetensors", root))
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

    def commit(self, version):
        """Add a version: its file first, then the manifest that names it. A kill in between leaves an unnamed file, which
        the same training writes again under the same name."""
        version.save(self.folder / "versions")
        self.manifest["versions"].append({"hash": version.hash, "task": version.task, "lock": version.lock,
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


def log(run):
    """Lines of `python commit.py log`: newest first, as in git. Reads the files' headers only."""
    for entry in reversed(run.manifest["versions"]):
        with safe_open(run.folder / "versions" / f"{entry['hash']}.safetensors", "pt") as f:
            head = json.loads(f.metadata()["version"])
        row = next((r for r in run.manifest["results"] if r["version"] == entry["hash"]), None)
        yield f"version {entry['hash'][:12]}  {entry['task']}  (lock: {head['lock']})"
        yield f"Date:   {entry['date']}"
        yield f"        writes {head['writes']} bases, reads {', '.join(h[:12] for h in head['reads']) or 'nothing'}"
        yield f"        region of {head['n']} coordinates, tau {head['tau']:.2f}, {head['anchors']} anchors"
        if row:
            base, stored, routed = (row[k][entry["task"]] for k in ("base", "stored", "routed"))
            yield f"        perplexity {base:.3f} before, {stored:.3f} stored, {routed:.3f} routed"
        yield ""


def main():
    parser = argparse.ArgumentParser(description="Look at the versions of a run folder.")
    parser.add_argument("command", choices=["log"])
    parser.add_argument("--run", help="run folder (default: the latest under runs/)")
    args = parser.parse_args()
    print("\n".join(log(Run(args.run or latest_run()))))


if __name__ == "__main__":
    try:
        main()
    except (Refused, OSError) as e:
        raise SystemExit(f"commit.py: {e}")
