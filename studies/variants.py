"""What each part of NIWF is worth: tasks learned with it, with parts of it changed, and without it.

    python -m studies.variants worth            # one task: the field, parts of it, plain LoRAs in its place
    python -m studies.variants choose           # what was chosen among: other items, other seeds
    python -m studies.variants baselines        # two tasks: fine-tuning, LoRAs, the three locks (Table 3)
    python -m studies.variants ablations        # two tasks: NIWF with one thing changed (Figure 7)
    python -m studies.variants passes           # two tasks: one pass, and the paper's two
    python -m studies.variants choose-passes    # ways to read a prompt once, that were chosen among
    python -m studies.variants fair             # two tasks: what else keeps an old task; and choose-fair
    python -m studies.variants soft-lock        # why the soft lock forgets: parts of it frozen
    python -m studies.variants regions --run RUN      # does one region tell two tasks apart? what is chosen?
    python -m studies.variants transfer --run STREAM  # what reading older bases is worth to later tasks
    python -m studies.variants worth --backbone FOLDER --data A.json B.json --seeds 0 --examples 600 --lr 5e-4

A row is one training by train.py, or two, in a run folder of its own under runs/variants. What is there is
not trained again, and rows that differ in their second task alone share their first. Options that this script
does not know go to train.py. All tables but `passes`, `fair` and those that choose for them are of the
paper's two passes; in `fair` the LoRAs are, so that they are on all layers. A row is its options and, where
no option says it, a change of one function, made here and nowhere else.

The LoRAs are NIWF with N = K = 1: Eq. (7) then has one weight, 1, and there is no field to learn; the
coordinate only routes. alpha follows K r, so that all updates have the same scale. Under the exact lock that
is an adapter a task, and *stored* means that the task's name is given; without a lock it is one adapter,
trained on.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import pathlib
import shlex
import shutil
import tempfile
import unittest.mock

import torch

import commit
import model
import train
from commit import Run
from eval import batches, open_run, perplexity_under, validation_set, what_is_published
from model import perplexity, response_logits, response_nll
from plumbing import Refused
from plumbing.backbone import load_backbone, pick_device
from plumbing.command import number, output_file, Parser, run_program, write_results
from plumbing.files import atomic
from plumbing.passes import mean_over
from plumbing.prompts import encode, pad_of
from field import CoordinateDynamics, Region, WeightField
from studies.likelier import words_router
from studies.stream import learn_stream
from studies.report import rows_table
from studies.sure import aim, area_under_curve
from plumbing.records import DATA, read_records
from plumbing.rows import read_sealed, sealed

STRENGTHS, PENALTIES = (1e1, 1e2, 1e3, 1e4, 1e6), (0.5, 5, 50, 500, 5000)  # of EWC, and of O-LoRA

rms = lambda x: float(x.square().mean().sqrt())

# ---------------------------------------------------------------------------------- what an option cannot say


def not_standardised(self, h_bar):
    """As h_bar is, scaled to length sqrt(d)."""
    self.deviation.fill_(rms(h_bar))


def centred(self, h_bar):
    """Less its mean; all features keep their size."""
    self.mean.copy_(h_bar.mean(0))
    self.deviation.fill_(rms(h_bar - self.mean))


class AllButTheTop:
    """Centred, without its first principal components, features / 100 of them (Mu and Viswanath 2018)."""

    forward, top = CoordinateDynamics.forward, None

    def standardise(self, h_bar):
        self.mean.copy_(h_bar.mean(0))
        x = h_bar - self.mean
        AllButTheTop.top = torch.linalg.svd(x, full_matrices=False).Vh[: max(1, x.shape[1] // 100)]
        self.deviation.fill_(rms(x - x @ AllButTheTop.top.T @ AllButTheTop.top))

    def without_top(self, h_bar):
        x = h_bar - self.mean
        return AllButTheTop.forward(self, self.mean + x - x @ AllButTheTop.top.T @ AllButTheTop.top)


def random_dynamics(self):
    """The weights of the dynamics stay as they were drawn."""
    self.dynamics.requires_grad_(False)
    return WEIGHTS(self)


WEIGHTS, LOSSES, INIT = train.Learner.weights, train.loss_terms, WeightField.__init__
UPDATE, WRITABLE = train.Training.update, train.writable
FORWARD, FIT, STANDARDISE = WeightField.forward, Region.fit, CoordinateDynamics.standardise
LOGITS, BANK_UPDATE = model.NIWF.logits, model.AdapterBank.update


def balanced(learner, batch, h_bar, args, share, responses):
    """Switch's load balancing in place of the constant L_budget: 0.01 N sum_i f_i P_i, f_i the share of the
    choices that fall on basis i, P_i its mean probability."""
    logits = learner.field(learner.dynamics(h_bar))  # [B, L, N]
    n = logits.shape[-1]
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(learner.top_k).indices, 1 / learner.top_k)
    terms = LOSSES(learner, batch, h_bar, args, share, responses)
    return terms | {"budget": 0.01 * share * n * (chosen.mean(0) * logits.softmax(-1).mean(0)).sum(-1).mean()}


def wide_logits(self, *args, **kwargs):
    """Logits four times as large at the start."""
    INIT(self, *args, **kwargs)
    with torch.no_grad():
        self.w3.weight.mul_(4)


def slow_field(self, losses):
    """Field and dynamics learn with 0.3 of the learning rate: 0.3 of every step is taken."""
    before = {k: p.detach().clone() for k, p in self.weights.items() if not k.startswith("bank.")}
    UPDATE(self, losses)
    for key, old in before.items():
        self.weights[key].data.lerp_(old, 0.7)


def frozen(*parts):
    """The second task of a soft lock leaves these parts as they were: "bank", "field", "dynamics"."""
    return {
        (train.Learner, "weights"): lambda self: {
            key: p for key, p in WEIGHTS(self).items() if key.split(".")[0] not in parts
        }
    }


def own_alone(field, old, top_k, z):
    """A new version never chooses a basis of an older one."""
    with torch.no_grad():
        field.w3.bias.view(field.layers, -1)[:, old:] += 1e4


def weights_of_one(gating):
    """What is active, each with weight 1 in place of the softmax."""

    def changed(self, z):
        indices, weights = gating(self, z)
        return indices, torch.ones_like(weights)

    return changed


def orthogonal(learner, batch, h_bar, args, share, responses, strength):
    """O-LoRA's penalty (Wang et al. 2023) in place of the lock's: strength sum_i |A_i A^T|^2, of the bases i
    of earlier tasks with the new one, summed over all projections."""
    bank, total = learner.model.bank, 0.0
    for key, new in bank.live.items():
        if key.endswith(".A"):
            old = [block.tensors[key].to(new.device).flatten(0, 1) for block in bank.committed]
            total = total + sum((a @ new.flatten(0, 1).mT).square().sum() for a in old)
    terms = LOSSES(learner, batch, h_bar, args, share, responses)
    return terms | {"lock": terms["lock"] + strength * share * total}


def consolidated(strength):
    """EWC on a LoRA (Kirkpatrick et al. 2017): strength / 2 sum F (theta - theta*)^2, with F the mean squared
    gradient of single examples, 200 of the first task's, at theta*, the weights after it. They are
    taken at the second task's first step, so a row that was killed in that task is to be deleted."""
    kept = {}

    def terms(learner, batch, h_bar, args, share, responses):
        live, found = learner.model.bank.live, LOSSES(learner, batch, h_bar, args, share, responses)
        if kept.get("of") is not learner:  # the first step of the second task
            kept.update(
                of=learner, at={k: (p.detach().clone(), torch.zeros_like(p)) for k, p in live.items()}
            )
            data, val = f"{DATA}/alpaca.train.json", f"{DATA}/alpaca.choose.json"
            first = argparse.Namespace(**vars(args) | {"task": "alpaca", "data": data, "val_data": val})
            for example in train.load_data(first, load_backbone(args.backbone, "cpu")[1])[0][:200]:
                gating = learner.gating(learner.dynamics(h_bar[:1]))  # N = K = 1: the same for all inputs
                nll = response_nll(*learner.model.logits([example], gating)).sum()
                for (_, fisher), g in zip(kept["at"].values(), torch.autograd.grad(nll, live.values())):
                    fisher.addcmul_(g, g, value=1 / 200)
        moved = sum((f * (live[k] - p).square()).sum() for k, (p, f) in kept["at"].items())
        return found | {"lock": found["lock"] + strength / 2 * share * moved}

    return {(train, "loss_terms"): terms}


def orthogonal_by(strength):
    """O-LoRA: all adapters are added up, and a new one is orthogonal to the older."""
    return {
        (train, "writable"): dense,
        (train.Learner, "gating"): weights_of_one(train.Learner.gating),
        (commit.Version, "gating"): weights_of_one(commit.Version.gating),
        (train, "loss_terms"): functools.partial(orthogonal, strength=strength),
    }


def fixed_coordinate(self, h_bar):
    """One random z for all inputs, the paper's ablation of section 5.4."""
    z = torch.rand(len(self.z0), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return z.to(h_bar).expand(len(h_bar), -1)


def dense(*args):
    """K = N: every basis that may be read is active."""
    learner = WRITABLE(*args)
    learner.top_k = learner.field.bases
    return learner


def shared_rows(self, z):
    """The logits of the first layer, for all layers."""
    return FORWARD(self, z)[:, :1].expand(-1, self.layers, -1)


def fit_and_keep(z, *args):
    """A region that remembers the coordinates that it was fitted to."""
    region = FIT(z, *args)
    region.fitted = z.cpu().double()
    return region


def sampled(region, count, seed):
    """Anchors that are a subsample of the task's own coordinates, of those that lie inside."""
    inside = region.fitted[region.distance(region.fitted) <= region.tau]
    order = torch.randperm(len(inside), generator=torch.Generator().manual_seed(seed))
    return inside[order[:count]].float()


def standardised_and_aimed(self, h_bar):
    """As `standardise`, and then aimed."""
    STANDARDISE(self, h_bar)
    aim(self, h_bar)


def mean_alone(hidden, lengths):
    """The mean over the prompt, twice, in place of the mean and the last token."""
    mean = mean_over(hidden, lengths)
    return torch.cat([mean, mean], 1)


def from_response_on(self, examples, gating):
    """Read, then write: adapters act from the last token of the prompt on; the bare model reads the rest."""
    width = max(len(p) + len(r) for p, r in examples)
    starts = torch.tensor([width - len(r) - 1 for _, r in examples])
    self.bank.adapted = torch.arange(width) >= starts[:, None]  # [B, T]
    return LOGITS(self, examples, gating)


def where_adapted(self, name, x, y):
    """Update the tokens that are adapted, and no other."""
    if self.gating is None:
        return y
    # Give the bank a copy of y, because it adds to y in place.
    return torch.where(self.adapted[..., None], BANK_UPDATE(self, name, x, y.clone()), y)


PATCHES = {
    "read, then write": {
        (model.NIWF, "logits"): from_response_on,
        (model.AdapterBank, "update"): where_adapted,
    },
    "aimed": {(CoordinateDynamics, "standardise"): standardised_and_aimed},
    "mean alone": {(model, "mean_and_last"): mean_alone},
    "fixed coordinate": {(CoordinateDynamics, "forward"): fixed_coordinate},
    **{f"all bases, orthogonal by {x:g}": orthogonal_by(x) for x in PENALTIES},
    **{f"EWC {x:g}": consolidated(x) for x in STRENGTHS},
    "dense gating": {(train, "writable"): dense},
    "shared gating": {(WeightField, "forward"): shared_rows},
    "anchors a sample": {(Region, "fit"): fit_and_keep, (commit, "sample_anchors"): sampled},
    "not standardised": {(CoordinateDynamics, "standardise"): not_standardised},
    "centred only": {(CoordinateDynamics, "standardise"): centred},
    "all but the top": {
        (CoordinateDynamics, "standardise"): AllButTheTop.standardise,
        (CoordinateDynamics, "forward"): AllButTheTop.without_top,
    },
    "random dynamics": {(train.Learner, "weights"): random_dynamics},
    "load balancing": {(train, "loss_terms"): balanced},
    "logits x 4": {(WeightField, "__init__"): wide_logits},
    "field and dynamics: 0.3 lr": {(train.Training, "update"): slow_field},
    "own bases alone": {(train, "lead_with_own"): own_alone},
    "bases frozen": frozen("bank"),
    "dynamics frozen": frozen("dynamics"),
    "field frozen": frozen("field"),
    "bases and dynamics frozen": frozen("bank", "dynamics"),
    "bases and field frozen": frozen("bank", "field"),
    "dynamics and field frozen": frozen("dynamics", "field"),
}

# --------------------------------------------------------------------------------------------------- the rows


@dataclasses.dataclass(frozen=True)
class Variant:
    """options: of both tasks. second: of the second, besides; None where there is one task. patch: a name
    among PATCHES, for both tasks; later: one for the second task alone. replay: the share of the first task's
    records that the second trains on, too. sums: the weight of each version in a sum that answers for both
    tasks; 0: the last version does. words: a prompt's words decide which version answers it. lr: in place of
    all that, full fine-tuning with this learning rate."""

    options: str = ""
    second: str | None = None
    patch: str | None = None
    later: str | None = None
    replay: float = 0.0
    sums: float | None = None
    words: bool = False
    lr: float = 0.0


LORA = "--bases 1 --top-k 1 --rank 64"
LARGE_LORA = "--bases 1 --top-k 1 --rank 128 --alpha 256"
TWICE = "--alpha 256"  # where 16 bases are active in place of 8, so that the update has the same size
TWO = "--passes two"
WHOLE = f"{TWO} {LORA}"  # a LoRA on every layer: in one pass the first layers have none
PAPER = "--pool sequence --probe adapted --alpha 16"
EXACT, SOFT, NONE = "--lock exact", "--lock soft", ""
WORTH = {
    "LoRA r 64: same active rank": Variant(LORA),
    "LoRA r 128: same stored size": Variant(LARGE_LORA),
    "fixed z, N = K = 8": Variant("--bases 8", patch="fixed coordinate"),
    "fixed z, N 16, K 8": Variant(patch="fixed coordinate"),
    "fixed z, N = K = 16": Variant("--top-k 16 " + TWICE, patch="fixed coordinate"),
    "NIWF, N 16, K 8": Variant(),
    "NIWF, N = K = 8": Variant("--bases 8"),
    "not standardised": Variant(patch="not standardised"),
    "random dynamics": Variant(patch="random dynamics"),
}
CHOICES = {
    "NIWF, N 16, K 8": Variant(),
    "lr 2e-3": Variant("--lr 2e-3"),
    "lr 5e-4": Variant("--lr 5e-4"),
    "alpha 16 (the paper)": Variant("--alpha 16"),
    "alpha 16, lr 2e-3": Variant("--alpha 16 --lr 2e-3"),
    "alpha 256": Variant("--alpha 256"),
    "LoRA r 64": Variant(LORA),
    "LoRA r 64, lr 2e-3": Variant(LORA + " --lr 2e-3"),
    "LoRA r 64, lr 5e-4": Variant(LORA + " --lr 5e-4"),
    "LoRA r 64, alpha 64": Variant(LORA + " --alpha 64"),
    "LoRA r 64, alpha 256": Variant(LORA + " --alpha 256"),
    "not standardised": Variant(patch="not standardised"),
    **{name: Variant(patch=name) for name in ("centred only", "all but the top", "load balancing")},
    **{name: Variant(patch=name) for name in ("logits x 4", "field and dynamics: 0.3 lr")},
    "d 32": Variant("--coord-dim 32"),
    "d 128": Variant("--coord-dim 128"),
    "N 32, K 8": Variant("--bases 32"),
    "N 16, K 4": Variant("--top-k 4"),
    "shared gating": Variant(patch="shared gating"),
    **{f"full fine-tuning, lr {lr}": Variant(lr=float(lr)) for lr in "1e-5 3e-5 1e-4 3e-4 1e-3".split()},
}
OWN, ADDED = "own bases alone", "all bases, orthogonal by {:g}"
FAIR = {
    "NIWF, exact lock": Variant("", EXACT),
    "NIWF, exact lock, two passes": Variant(TWO, EXACT),
    **{
        f"LoRA r {r}, one a task": Variant(f"{TWO} --bases 1 --top-k 1 --rank {r}", EXACT, later=OWN)
        for r in (8, 16, 32, 64)
    },
    "LoRA r 64, one a task, by words": Variant(WHOLE, EXACT, later=OWN, words=True),
    "LoRA r 64, one": Variant(WHOLE, NONE),
    "one, replay of 1 %": Variant(WHOLE, NONE, replay=0.01),
    "one, replay of 5 %": Variant(WHOLE, NONE, replay=0.05),
    **{f"one, EWC {x:g}": Variant(WHOLE, NONE, later=f"EWC {x:g}") for x in STRENGTHS},
    **{f"O-LoRA, {x:g}": Variant(WHOLE, EXACT, later=ADDED.format(x), sums=0) for x in PENALTIES},
    "mean of one a task": Variant(WHOLE, EXACT, later=OWN, sums=0.5),
    **{f"{x:g} times their sum": Variant(WHOLE, EXACT, later=OWN, sums=x) for x in (0.3, 0.7, 1)},
}
BASELINES = {
    "full fine-tuning": Variant(lr=1e-4),
    "LoRA r 64, one": Variant(LORA, NONE),
    "LoRA r 64, one a task": Variant(LORA, EXACT, later=OWN),
    "LoRA r 128, one": Variant(LARGE_LORA, NONE),
    "LoRA r 128, one a task": Variant(LARGE_LORA, EXACT, later=OWN),
    "NIWF, no lock": Variant("", NONE),
    "NIWF, soft lock": Variant("", SOFT),
    "NIWF, the paper's own": Variant(PAPER, SOFT, patch="not standardised"),
    "NIWF, exact lock": Variant("", EXACT),
}
ABLATIONS = {
    "exact lock": Variant("", EXACT),
    "older bases are not read": Variant("", EXACT, later=OWN),
    "fixed coordinate": Variant("", EXACT, patch="fixed coordinate"),
    "dense gating": Variant(TWICE, EXACT, patch="dense gating"),
    "shared gating": Variant("", EXACT, patch="shared gating"),
    "not standardised": Variant("", EXACT, patch="not standardised"),
    "pool: whole sequence": Variant("--pool sequence", EXACT),
    "no lock": Variant("", NONE),
    "soft lock": Variant("", SOFT),
    "soft, adapted probe": Variant("--probe adapted", SOFT),
    "soft, no separation": Variant("", SOFT + " --lambda-sep 0"),
    "soft, anchors a sample": Variant("", SOFT, patch="anchors a sample"),
}
PASSES = {
    "two passes": Variant(TWO, EXACT),
    "one pass": Variant("", EXACT),
    "one pass, no lock": Variant("", NONE),
    "read, then write": Variant(TWO, EXACT, patch="read, then write"),
    **{f"one pass, m {m}": Variant(f"--bare-layers {m}", EXACT) for m in (1, 2, 5)},
    "one pass, mean alone": Variant("", EXACT, patch="mean alone"),
    "one pass, d 64": Variant("--coord-dim 64", EXACT),
    "one pass, d 64, aimed": Variant("--coord-dim 64", EXACT, patch="aimed"),
}
FROZEN = [name for name in PATCHES if name.endswith("frozen")]
SOFT_LOCK = {"nothing frozen": Variant("", SOFT)} | {name: Variant("", SOFT, later=name) for name in FROZEN}
TABLES = {
    "worth": WORTH,
    "choose": CHOICES,
    "baselines": BASELINES,
    "ablations": ABLATIONS,
    "soft-lock": SOFT_LOCK,
    "fair": FAIR,
    "choose-fair": FAIR,
    "passes": PASSES,
    "choose-passes": {name: dataclasses.replace(row, second=None) for name, row in PASSES.items()},
}


ONE_PASS = "passes", "choose-passes", "fair", "choose-fair"


# ------------------------------------------------------------------------------------- trained and measured


def said(task, folder, seed, args):
    """The options that all rows of a table share."""
    options = ["--task", task, "--backbone", args.backbone, "--seed", str(seed), "--out", str(folder)]
    options += [] if args.table in ONE_PASS else ["--passes", "two"]
    if args.data:
        return [*options, "--data", args.data[0 if task == "alpaca" else -1]]
    if args.table.startswith("choose") or args.table == "fair":
        part, count = ("val", "400") if args.table == "fair" else ("choose", "200")
        options += ["--data", f"{DATA / task}.train.json", "--val-data", f"{DATA / task}.{part}.json"]
        options += ["--val-examples", count]
    return options


def train_task(folder, task, options, patch, args, seed, rest):
    """Train a task in a run folder, unless that has been done."""
    return train_with([*said(task, folder, seed, args), *rest, *shlex.split(options)], patch)


def train_with(argv, patch):
    """Train as train.py does with these options, under a patch. -> the run"""
    options = train.parse_options(argv)
    options.device = pick_device(options.device)
    with patched(patch), Run(options.out).exclusive() as run:
        train.run_task(run, options)
    return run


@contextlib.contextmanager
def patched(name):
    """Within this block the program is changed as a patch says; by none, if there is none of that name."""
    with contextlib.ExitStack() as patches:
        for (owner, attribute), new in PATCHES.get(name, {}).items():
            patches.enter_context(unittest.mock.patch.object(owner, attribute, new))
        yield


def folder_name(text):
    """Return a text as the name of a folder."""
    return "".join(c if c.isalnum() else "-" for c in text)


def place_of(args, seed, *parts):
    """The folder or file that belongs to a row, or to the first task of several."""
    name = " ".join(part for part in parts if part) or "default"
    table = args.table if args.table in ("choose", *ONE_PASS) else "publish"
    return pathlib.Path(args.out, table, f"{seed}", folder_name(name))


def folder_of(variant, seed, args):
    """The run folder of both tasks of a row."""
    then = f"then {variant.second or 'no lock'}"
    replay = f"replay {variant.replay:g}" if variant.replay else ""
    return place_of(args, seed, variant.options, variant.patch, then, variant.later, replay)


def train_row(variant, seed, args, rest):
    """Train a row and measure it, unless that has been done. -> what is published of it"""
    first = place_of(args, seed, variant.options, variant.patch)
    run = train_task(first, "alpaca", variant.options, variant.patch, args, seed, rest)
    if variant.second is None:
        return describe(run)
    folder = folder_of(variant, seed, args)
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:  # whole or not at all
            pathlib.Path(shutil.copytree(first, f"{tmp}/copy")).rename(folder)
    options, patch = f"{variant.options} {variant.second}", variant.later or variant.patch
    if variant.replay:
        options += with_replay(folder, variant.replay, run.head(run.find("alpaca"))["config"]["examples"])
    found = describe(train_task(folder, "code", options, patch, args, seed, rest))
    if variant.words:
        found = sent_by_words(args.table, found)
    return found if variant.sums is None else under_one(folder, variant.sums, patch, found)


def with_replay(folder, share, count):
    """Write the second task's first `count` records and a share of as many of the first's. -> options"""
    first, second = (json.loads((DATA / f"{task}.train.json").read_text()) for task in ("alpaca", "code"))
    path = folder.with_suffix(".code.json")
    with atomic(path) as tmp:
        tmp.write_text(json.dumps(second[:count] + first[: round(share * count)]))
    return f" --data {path} --examples 1000000"


def sent_by_words(table, found):
    """-> `found`, but a router by words (TF-IDF, logistic regression) has decided which version a validation
    prompt is sent to; what it then loses is not measured"""
    sides = ("train", "choose" if table.startswith("choose") else "val")
    text = lambda record: f"{record['instruction']}\n{record.get('input', '')}"
    read = lambda task, side: [text(record) for record in read_records(DATA / f"{task}.{side}.json")]
    known, asked = ([read(task, side) for task in found["tasks"]] for side in sides)
    if not (routed := words_router(known, asked)):
        raise Refused("routing by words needs scikit-learn: pip install scikit-learn")
    sent = [[found["tasks"][i] for i in part] for part in routed]
    routing = {task: dict(collections.Counter(part)) for task, part in zip(found["tasks"], sent)}
    return found | {"routing": routing, "R": {**found["R"], "routed": 2 * [[None, None]]}}


def under_one(folder, weight, patch, found):
    """-> `found`, but after the last task one sum of all adapters answers every task, or, if `weight` is 0,
    the last version does; and nothing is routed"""
    with patched(patch):
        run, model, tokenizer = open_run(folder)
        gating = functools.partial(run.stored, -1)
        if weight:
            gating = commit.Composition("sum", [], [weight] * len(run.versions), run.versions).gating
        sets = [validation_set(run, model, tokenizer, task)[:2] for task in run.tasks]
        last = [perplexity_under(model, *part, {"": gating})[""] for part in sets]
        model.detach()
    R = {protocol: [*rows[:-1], last] for protocol, rows in found["R"].items()}
    return {key: value for key, value in found.items() if key != "routing"} | {"R": R}


def parameters(run):
    """-> (of the bases of the last version, of everything that the run folder has to keep)"""
    versions = run.read_versions()
    size = lambda module: sum(p.numel() for p in module.parameters())
    chooses = versions[0].config["bases"] > 1  # a field over one basis chooses nothing and need not be kept
    per_version = [sum(t.numel() for t in v.bases.values()) + chooses * size(v.field) for v in versions]
    # Under the soft lock and without one the last version holds the one bank; the earlier are copies of
    # what it was, kept to measure forgetting.
    exact = versions[-1].lock in ("exact", "first")
    bases = sum(t.numel() for t in versions[-1].bases.values())
    return bases, (sum(per_version) if exact else per_version[-1]) + size(versions[-1].dynamics)


def describe(run):
    """What is published of a row: as of `eval.py --json`, and how large it is."""
    trained, kept = parameters(run)
    config = {e["task"]: {**run.head(e)["config"], "lock": e["lock"]} for e in run.manifest["versions"]}
    about = {"trained parameters": trained, "kept parameters": kept, "config": config}
    return what_is_published(run.manifest["results"]) | about


def fine_tune(variant, seed, args, rest):
    """All weights of the backbone, trained on one task and then on the other: the same examples in the same
    order, the same warm-up and decay of the learning rate. -> as `train_row`"""
    path = place_of(args, seed, f"fine-tuning {variant.lr:g}")
    if path.exists():
        return read_sealed(path)
    backbone, tokenizer = load_backbone(args.backbone, "cpu")
    sets, R = {}, []
    for task in ("alpaca", "code"):
        options = train.parse_options([*said(task, path, seed, args), *rest])
        train.complete(options, Run(path))
        examples, records = train.load_data(options, tokenizer)
        held_out = [encode(record, tokenizer, options.template) for record in records]
        sets[task] = examples, sorted(held_out, key=lambda e: len(e[0]) + len(e[1])), options
    base = {task: measure_backbone(backbone, tokenizer, held_out) for task, (_, held_out, _) in sets.items()}
    for examples, _, options in sets.values():
        learn_backbone(backbone, tokenizer, examples, options, variant.lr)
        row = [measure_backbone(backbone, tokenizer, held_out) for _, held_out, _ in sets.values()]
        R.append([row[0], row[1] if R else None])
    size = sum(p.numel() for p in backbone.parameters())
    found = {"tasks": list(sets), "base": base, "R": {"stored": R, "routed": R}}
    found |= {"trained parameters": size, "kept parameters": size}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as tmp:
        tmp.write_text(json.dumps(sealed(path, found)))
    return found


def learn_backbone(backbone, tokenizer, examples, args, lr):
    weights = [p.requires_grad_() for p in backbone.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01, fused=True)
    total = args.epochs * math.ceil(len(examples) / (args.batch * args.grad_accum))
    for step in range(total):
        micros = train.micro_batches(examples, step, args)
        responses = sum(len(examples[i][1]) for micro in micros for i in micro)
        for micro in micros:
            logits, labels = response_logits(backbone, pad_of(tokenizer), [examples[i] for i in micro])
            (response_nll(logits, labels).sum() / responses).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, total, lr)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def measure_backbone(backbone, tokenizer, examples):
    pad = pad_of(tokenizer)
    nll = sum(float(response_nll(*response_logits(backbone, pad, b)).sum()) for (b,) in batches(examples))
    return perplexity(nll, sum(len(r) for _, r in examples))


# -------------------------------------------------------------------------------- does one region tell apart?


def look_at_regions(folder):
    """Of validation prompts: the share of every task's inputs inside the region of each task alone, and the
    AUROC of the distance to it, own inputs against others'; all coordinates as they are now in a plane
    (t-SNE, where scikit-learn is installed), and which lie in their own region. ->

    {"regions": {region: {task: {"inside", "AUROC"}}}, "coordinates": {task: {"tsne" [n, 2], "home" [n]}}}"""
    run, model, tokenizer = open_run(folder)
    last = run.versions[-1]
    h_bar = lambda task: validation_set(run, model, tokenizer, task)[2]
    z = {task: last.dynamics(h_bar(task)).cpu().double() for task in run.tasks}
    found = {"tasks": run.tasks, "lock": last.lock, "regions": {}, "coordinates": {}}
    for v in run.versions:
        distance, about = {task: v.region.distance(x) for task, x in z.items()}, {}
        for task, d in distance.items():
            auroc = area_under_curve(distance[v.task], d)
            about[task] = {"inside": float((d <= v.region.tau).double().mean()), "AUROC": auroc}
            print(f"region of {v.task}: {about[task]['inside']:6.1%} of {task} inside, AUROC {auroc:.3f}")
        found["regions"][v.task] = about
        found["coordinates"][v.task] = {"home": (distance[v.task] <= v.region.tau).int().tolist()}
    if importlib.util.find_spec("sklearn"):
        from sklearn.manifold import TSNE

        plane = TSNE(random_state=0, init="pca").fit_transform(torch.cat([*z.values()]).numpy())
        for task, part in zip(z, torch.tensor(plane).split([len(x) for x in z.values()])):
            found["coordinates"][task]["tsne"] = [[round(x, 1) for x in point] for point in part.tolist()]
    return found


# --------------------------------------------------------------------------- does reading help later tasks?


def measure_transfer(folder, args):
    """Perplexity of every task of a stream when it was learned, beside that in the same stream without
    reading: a new version then never chooses an older one's basis. -> {"tasks", "read", "own bases alone"}"""
    run = Run(folder)
    with patched("own bases alone"):
        out = pathlib.Path(args.out, "stream-own-bases-alone")
        passes = run.manifest["settings"]["passes"]
        alone = learn_stream(out, len(run.tasks), pick_device(None), "--passes", passes)
    learned = lambda run: [row["stored"][row["task"]] for row in run.manifest["results"]]
    found = {"tasks": run.tasks, "read": learned(run), "own bases alone": learned(alone)}
    print(*map("{}  {:.4f}, own bases alone {:.4f}".format, *found.values()), sep="\n")
    return found


def parse_options(argv):
    parser = Parser(__doc__, prog="variants.py", allow_abbrev=False)
    tables = [*TABLES, "regions", "transfer"]
    parser.add_argument("table", choices=tables, help="what is learned and compared")
    parser.add_argument("--run", nargs="+", help="the run folders of `regions` and `transfer`")
    parser.add_argument("--rows", nargs="+", help="names of rows [all]")
    parser.add_argument("--backbone", default="tiny", help="see train.py")
    about = "JSON records of the first task, and of the second [embedded]"
    parser.add_argument("--data", nargs="+", help=about)
    about = "of every row [0 1 2; choose: 200 201 202]"
    parser.add_argument("--seeds", nargs="+", type=number(int, 0, 2**31), help=about)
    parser.add_argument("--out", help="folder of the run folders [runs/variants, runs/variants-BACKBONE]")
    parser.add_argument("--json", type=output_file, help="write all of it to this file")
    args, rest = parser.parse_known_args(argv)
    if (args.table in TABLES) == bool(args.run):
        parser.error("--run names the run folders of `regions` and `transfer`")
    if args.table.endswith("fair") and args.data:
        parser.error(f"{args.table} is of the embedded sets: no --data")
    name = pathlib.Path(args.backbone).name
    args.out = args.out or "runs/variants" + f"-{name}" * (name != "tiny")
    if args.table in TABLES:
        args.rows = args.rows or [*TABLES[args.table]]
        if unknown := [name for name in args.rows if name not in TABLES[args.table]]:
            parser.error(f"no row is called {unknown[0]!r}: {', '.join(TABLES[args.table])}")
        args.seeds = args.seeds or ([200, 201, 202] if args.table.startswith("choose") else [0, 1, 2])
    return args, rest


def main(argv=None):
    args, rest = parse_options(argv)
    if args.table == "regions":
        with torch.no_grad():
            result = [look_at_regions(folder) for folder in args.run]
    elif args.table == "transfer":
        result = [measure_transfer(folder, args) for folder in args.run]
    else:
        result = {name: [] for name in args.rows}
        for seed, name in itertools.product(args.seeds, args.rows):
            variant = TABLES[args.table][name]
            learn = fine_tune if variant.lr else train_row
            result[name].append(learn(variant, seed, args, rest))
        kind = "one-task" if args.table in ("worth", "choose", "choose-passes") else "two-tasks"
        print("", *rows_table(kind, [{"rows": result}]), sep="\n")
    write_results(args.json, "-m studies.variants", argv, indent=1, rows=result)


if __name__ == "__main__":
    run_program(main)
