"""FTN's two experiments, and their tables beside the paper's.

    python synthetic.py                        # experiment 1: both variants, every method, one seed
    python synthetic.py --seeds 8              # mean +- std over seeds, as in the paper
    python synthetic.py --leaks                # what each broken precaution costs FixedMask
    python synthetic.py --tasks 12 --methods ftn-slow ftn-slow-lock --grow     # beyond the capacity H/k = 8
    python synthetic.py --experiment 2         # LoRA-FTN: six style tasks on one frozen language model
    python synthetic.py --bench                # a training step against the literal Algorithm 1

Both are a stream of tasks under *concept shift*: the same inputs, other targets. In experiment 1 (section 3, Appendix B)
a grid of neurons learns three functions of two numbers, in experiment 2 (section 3, Appendices E and F) a pool of adapters
learns six ways to rewrite a sentence. Every method sees the same batches. After each task all tasks so far are scored:

    stored      with the mask of the task's last training batch
    recovered   with the mask that the search finds, from a cold start, on a support batch of the task; where masks are
                kept, under the lock and in SupSup, with the stored mask that has the lowest loss on that batch

R[i][j] is the score on task j after task i. ACC (MSE, CE) is the mean of the last row. FM, forgetting, is over earlier
tasks the mean of best minus final accuracy, or of final minus best loss: positive always means forgetting.

The paper does not give its generator; ours is `ConceptShift`. Finished rows are kept in runs/synthetic, so the same
command, interrupted, goes on; a row is computed by one thread, so results do not depend on --workers.
"""
import argparse
import dataclasses
import datetime
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import pathlib
import platform
import re
import signal
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from commit import atomic
from ftn import ALL, LoRAPool, NeuronGrid, SmoothKWTA, unpack
from model import Refused, attach, find_targets, load_backbone, pad_of, response_logits, response_nll

VARIANTS = {"clf": dict(score="ACC", sign=1, title="classification (accuracy)"),
            "reg": dict(score="MSE", sign=-1, title="regression (squared error)"),
            "style": dict(score="CE", sign=-1, title="style tasks (nats per token)")}
HEAD = {"clf": dict(loss=F.cross_entropy, d_out=2, steps=1, lr=1.0), "reg": dict(loss=F.mse_loss, d_out=1, steps=10, lr=0.2)}
METHODS = {"fixedmask": dict(mask="fixed"),
           "ftn-slow": dict(mask="search", kernel=3, rounds=15),
           "ftn-slow-lock": dict(mask="search", kernel=3, rounds=15, lock=True),
           "ftn-fast": dict(mask="search", kernel=17, rounds=2),
           "kwta": dict(mask="search", kernel=1, rounds=0),
           "nomask": dict(mask="all"),
           "ewc": dict(mask="all", ewc=400.0),
           "supsup": dict(mask="weights", lock=True),
           "supsup-wide": dict(mask="weights", lock=True, wide=True),
           "lora-fixedmask": dict(mask="fixed"),
           "lora-ftn": dict(mask="search"),
           "lora-ftn-lock": dict(mask="search", lock=True),
           "lora-naive": dict(mask="all"),
           "lora-bank": dict(mask="bank")}
LEAKS = ("none", "decay", "moments", "bias")
PAPER = {"clf": {"nomask": (".666", ".466"), "fixedmask": (".938", ".000"), "kwta": (".640", ".152"), "ftn-fast": (".899", ".042"),
                 "ftn-slow": (".896", ".014"), "ewc": (".665", ".463"), "supsup": (".645", ".000"), "supsup-wide": (".660", ".000")},
         "reg": {"nomask": (".312", ".054"), "fixedmask": (".006", ".000"), "kwta": (".589", ".028"), "ftn-fast": (".126", ".013"),
                 "ftn-slow": (".167", ".003"), "ewc": (".311", ".054"), "supsup": (".206", ".000"), "supsup-wide": (".216", ".101")},
         "style": {"lora-naive": ("8.22", "7.37"), "lora-fixedmask": ("1.39", "0.00"), "lora-bank": ("1.42", "0.04"), "lora-ftn": ("1.51", "0.07")}}
TEST, CURVE_EVERY = 2048, 100
BANK_STD = 1e-3  # of B in LoRA-Bank
SENTENCES = """Anna keeps a red Kite in the attic. The Ferry to Oslo leaves before dawn. My uncle Paul bakes Bread on Sunday. Rain fell on the Market all
day. A quiet Fox crossed the frozen River. Maria lost her Keys near the station. The old Clock in Vienna runs slow. We planted Beans behind the
garden wall. Tom painted the Door a bright blue. Seven Geese followed the small boat. The Teacher from Lima reads every evening. Snow covered
the Roof of the barn. Clara found a silver Coin in Rome. The Baker sold his last warm loaf. Our Train to Madrid stopped at noon. A green Lamp
burned in the window. Peter carried Water up the hill. The Museum opens late on Friday. Nina wrote a long Letter to Carl. Two brown Dogs slept
under the table. The Captain folded his paper Map. Honey from Crete tastes of thyme. My Sister repairs old radios. The Wind broke a branch of
the Oak. Jonas learned to swim in Lake Como. A thin Moon hung over the harbor. The Doctor asked for a second Opinion. Ivan bought apples and
dark Cheese. Every Winter the pond turns to Ice. The Orchestra played until midnight. Lucy hid the Map inside a book. A yellow Bus waits by the
bridge. The Farmer counted forty Sheep. Emil dropped his Phone into the well. Fresh Mint grows along the fence. The Judge spoke slowly in
Court. Olga knits wool Socks for her cousins. A heavy Truck blocked the narrow street. The Island has only one Road. Max forgot the name of the
Song. Three Sailors told the same story. The Library in Porto smells of wood. Sara cut the Orange into eight parts. Dust settled on the silent
Piano. The Painter mixed white and Grey. Leo climbed the Tower before lunch. A small Bell rang at the gate. The Nurse from Kenya speaks French.
Warm Soup waits on the stove. Hugo drew a Whale on the wall. The River Elbe passes this town. Old Friends share a bench in May. The Pilot landed
in heavy fog. Rosa planted Tulips in a broken pot. A wooden Chair stood by the fire. The Students built a Bridge of straw. Karl sings in the
Choir of Bergen. Nobody saw the Cat leave. The Tailor measured my left Arm. Cold Wind came down from the Alps. Eva packed Bread and figs for the
trip. A lonely Horse stood in the rain. The Actor forgot his first line. Our Neighbor grows Pears and plums. The Postman knows each Street in
Ghent. Light from the Harbor fills the room. Ben solved the Puzzle in an hour. A grey Stone marks the border. The Queen of Hearts is missing.
Mila feeds the Swans at noon. The Carpenter sharpened his Axe. Tea from Assam is strong and dark. My Boots are full of Sand. The Choir meets
behind the Church. Oscar rode his Bicycle to Delft. A sudden Storm bent the trees. The Garden needs more Sun. Irene sold her Violin last spring.
Thick Smoke rose from the Mill. The Guard counted the Lanterns twice. Felix reads Maps better than words. A broken Cup lay on the Floor. The Road
to Cusco climbs for days. Grandma salts the Fish at night. The Comet returns every ninety Years. Vera hums while she paints Boats. A narrow Path
leads to the Spring. The Chess club meets on Monday. Alan keeps Bees on his balcony. Ripe Figs fell into the grass. The Engine coughed and
stopped. Julia mended the torn Sail. A curious Crow watched the Children. The Border closes after Dark. Milk and Cheese come from the valley. The
Smith bent the Iron slowly. Noah swept the Yard at sunrise. A paper Boat drifted to the Sea. The Senate votes in early June. Lena borrowed a
Ladder from Otto. Soft Moss covers the north side. The Cook tasted the Sauce again. Simon counts Stars from the roof. A long Shadow fell across
the Square. The Winter in Tromso is dark. Greta sent Stamps to her nephew. The Tunnel under the Hill is wet. Young Wolves learn to hunt in Fall.
The Fisher mends his Net at home. Paula dreams of Trains and rivers. A copper Kettle sang on the Stove. The Bridge at Mostar is stone. Adam
hangs his Coat on a nail. Bright Flags line the main street. The Owl sleeps through the Noon bell. Tina mixed Flour and warm milk. A tired Clerk
closed the Ledger. The Canal freezes in hard Winters. The Mason lays each Brick by hand. Old Maps hang in the
hall of Ghent."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of experiment 1: a method on a variant with a seed. The paper's values, but for what the paper lacks."""
    variant: str
    method: str
    seed: int
    inputs: str = "uniform"    # "gaussian": x ~ N(0, I) and no phases, the harder generator
    leak: str = "none"         # one of Appendix C's precautions, left out
    tasks: int = 3
    steps: int = 1000          # training steps a task
    grow: bool = False         # enlarge the grid when too few neurons are free
    search: tuple = ()         # (S, eta_m) in place of the variant's own
    batch: int = 256
    side: int = 32             # D, H = D^2
    k: int = 128
    layers: int = 8
    width: int = 8
    dropout: float = 0.2
    lr: float = 3e-4


@dataclasses.dataclass(frozen=True)
class StyleRow:
    """A line of experiment 2: a method on a backbone with a seed. The values of Appendix E."""
    method: str
    seed: int
    backbone: str = "tiny"
    reconfigure: str = "once"  # search the mask at the start of a task, or ("every") before every step
    b_std: float = 0.0         # B starts at zero, or at N(0, b_std^2)
    tasks: int = 6
    steps: int = 200
    variant: str = "style"
    batch: int = 8
    support: int = 16
    side: int = 24
    k: int = 72
    rank: int = 4
    lr: float = 5e-4
    max_len: int = 96


# ------------------------------------------------------------------------------------------------------- the tasks

class ConceptShift:
    """x in R^2, h = W x + b in R^(8 tasks), y_t = sum over the task's own eight i of v_i sin(8 h_i), |v| = 1.

    W_ij ~ N(0, 0.5^2), b ~ U(-pi, pi), x ~ U(-1, 1)^2; with inputs "gaussian" x ~ N(0, 1)^2 and b = 0.
    Classification: is y_t above its median. Regression: 0.75 (y_t - mean).
    """

    def __init__(self, row):
        self.row, rng = row, generator(row.seed, 0)
        self.W = 0.5 * torch.randn(8 * row.tasks, 2, generator=rng)
        self.b = (torch.rand(8 * row.tasks, 1, generator=rng) * 2 - 1) * torch.pi * (row.inputs == "uniform")
        self.v = F.normalize(torch.randn(row.tasks, 8, generator=rng), dim=1)
        self.centre = [0.0] * row.tasks
        for t in range(row.tasks):
            y = self.signal(t, self.draw(2 ** 16, rng))
            self.centre[t] = y.median() if row.variant == "clf" else y.mean()
        self.support, self.test = ([self.batch(t, n, generator(row.seed, part, t)) for t in range(row.tasks)]
                                   for part, n in (("support", row.batch), ("test", TEST)))

    def draw(self, n, rng):
        return torch.rand(n, 2, generator=rng) * 2 - 1 if self.row.inputs == "uniform" else torch.randn(n, 2, generator=rng)

    def signal(self, t, x):
        own = slice(8 * t, 8 * t + 8)
        return torch.sin(8 * (self.W[own] @ x.T + self.b[own])).T @ self.v[t]

    def batch(self, t, n, rng):
        """x [n, 2] and y: classes [n] or values [n, 1]."""
        x = self.draw(n, rng)
        y = self.signal(t, x) - self.centre[t]
        return x, (y > 0).long() if self.row.variant == "clf" else 0.75 * y[:, None]


class StyleStream:
    """The same sentences for every task, rewritten in the task's own way. A batch is a list of (prompt ids, response ids)."""

    STYLES = {"upper": str.upper, "lower": str.lower, "reverse_words": lambda s: " ".join(reversed(s.split())),
              "double_words": lambda s: " ".join(w for w in s.split() for _ in range(2)),
              "starred_vowels": lambda s: re.sub("[aeiouAEIOU]", "*", s), "pirate": lambda s: f"Arr! {s} matey!"}

    def __init__(self, row, tokenizer):
        sentences = re.split(r"(?<=[.]) ", " ".join(SENTENCES.split()))
        order = torch.randperm(len(sentences), generator=generator(row.seed, "split")).tolist()

        def rewritten(style, part):
            return [(tokenizer(sentences[i] + "\n").input_ids, (tokenizer(style(sentences[i]), add_special_tokens=False).input_ids
                     + [tokenizer.eos_token_id])[:row.max_len]) for i in part]
        styles = list(self.STYLES.values())[:row.tasks]
        self.test = [(rewritten(style, order[:24]),) for style in styles]
        self.support = [(rewritten(style, order[24:24 + row.support]),) for style in styles]
        self.training = [rewritten(style, order[24 + row.support:]) for style in styles]

    def batch(self, t, n, rng):
        return [self.training[t][i] for i in torch.randperm(len(self.training[t]), generator=rng)[:n].tolist()],


def generator(*key):
    """A random stream of its own for every purpose: (seed, purpose, ...)."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1)


# ------------------------------------------------------------------------------------------------------ the methods

class OnGrid:
    """A learner of experiment 1. Its `handle` for a task is whatever its own `select` needs to give that task's weights."""

    def __init__(self, row, width, bias=False):
        self.row, self.method, self.head = row, METHODS[row.method], HEAD[row.variant]
        self.loss, self.world = self.head["loss"], ConceptShift(row)
        self.grid = NeuronGrid(row.side, 2, self.head["d_out"], row.layers, width, bias)

    @torch.no_grad()
    def predict(self, handle, x):
        weights = self.select(handle)
        return torch.cat([self.grid.answer(*weights, part) for part in x.split(256)])

    def parameters(self, t):
        """A copy of what task t's prediction is computed from."""
        return [p.clone() for p in self.select(self.stored[t])]

    def mean_loss(self, handle, x, y):
        return self.loss(self.predict(handle, x), y).item()

    def score(self, handle, x, y):
        if self.row.variant == "clf":
            return (self.predict(handle, x).argmax(1) == y).float().mean().item()
        return self.mean_loss(handle, x, y)

    def outputs(self, handle, x, y):
        return self.predict(handle, x)


class Masked(OnGrid):
    """FTN and what it is compared with on the same grid. A mask is known by its winners [k], or ALL."""

    def __init__(self, row):
        super().__init__(row, row.width, row.leak == "bias")
        self.stored, self.touched, self.fisher, self.optimizer = [], [], [], None
        if self.method["mask"] == "search":
            steps, lr = row.search or (self.head["steps"], self.head["lr"])
            self.search = SmoothKWTA(row.k, self.method["kernel"], self.method["rounds"], int(steps), lr)

    def begin(self, t):
        """Start task t. The precautions of Appendix C are here: no weight decay, and moments that start from zero."""
        if self.row.grow and self.grid.free.sum() < self.row.k:
            self.grid, index = self.grid.grown(round(self.grid.side * 1.5))
            self.stored = [index[winners] for winners in self.stored]
            self.touched = [torch.zeros(len(self.grid.free), dtype=torch.bool).index_put((index,), touched) for touched in self.touched]
        if self.optimizer is None or self.row.leak != "moments":
            self.optimizer = torch.optim.AdamW(self.grid.parameters(), lr=self.row.lr, fused=True,
                                               weight_decay=0.01 if self.row.leak == "decay" else 0.0)
        self.stored.append(None)
        self.touched.append(torch.zeros(len(self.grid.free), dtype=torch.bool))

    def find(self, t, x, y):
        """The mask for a batch. FixedMask alone is told which task it is."""
        if self.method["mask"] == "all":
            return ALL
        if self.method["mask"] == "fixed":
            if (t + 1) * self.row.k > len(self.grid.free):
                raise Refused(f"{len(self.grid.free)} neurons hold {len(self.grid.free) // self.row.k} fixed masks of {self.row.k}, not {t + 1}")
            return torch.arange(t * self.row.k, (t + 1) * self.row.k)
        return self.search.configure(self.grid.loss_of_mask(x, y, self.loss), self.grid.side, self.grid.free)

    def train(self, t, x, y):
        winners = self.find(t, x, y)
        self.optimizer.zero_grad()
        self.loss(self.grid.respond(x, winners, self.row.dropout), y).backward()
        for importance, anchor in self.fisher:  # the gradient of EWC's penalty, lambda/2 sum F (theta - theta*)^2
            for p, f, a in zip(self.grid.parameters(), importance, anchor):
                p.grad.add_(f * (p.detach() - a), alpha=self.method["ewc"])
        self.optimizer.step()
        self.stored[t] = winners
        self.touched[t][winners] = True

    def end(self, t, x, y):
        if self.method.get("lock"):
            self.grid.commit(self.stored[t])
        if "ewc" in self.method:  # the diagonal Fisher information: mean squared gradient, one example at a time
            importance = [torch.zeros_like(p) for p in self.grid.parameters()]
            for i in range(len(x)):
                grads = torch.autograd.grad(self.loss(self.grid.respond(x[i:i + 1], ALL), y[i:i + 1]), list(self.grid.parameters()))
                for f, g in zip(importance, grads):
                    f.addcmul_(g, g, value=1 / len(x))
            self.fisher.append((importance, [p.detach().clone() for p in self.grid.parameters()]))

    def select(self, winners):
        return [self.grid.theta.detach()[winners], self.grid.readout.detach()[:, winners]]


class SupSup(OnGrid):
    """Supermasks: frozen random weights, and for each task a binary mask over them, learned through scores.

    A weight is on where its score is positive (straight-through gradient), as in the SupSup authors' own example; scores
    start at U(-1, 1) / sqrt(fan_in), so half are on. Masks are stored, and recalled as under the lock (`recover`). "Wide" has twice the
    width and signed constants +-sqrt(2 / (fan_in / 2)) in place of normal weights.
    """

    def __init__(self, row):
        wide = METHODS[row.method].get("wide")
        super().__init__(row, row.width * (2 if wide else 1))
        self.weights = [p.detach() for p in self.grid.parameters()]
        self.stored = []
        if wide:
            for W in unpack(self.weights[0], self.grid.shapes)[0]:
                W.sign_().mul_(2 / W.shape[2] ** 0.5)

    def begin(self, t):
        theta, readout = (torch.empty_like(w) for w in self.weights)
        for W, b in zip(*unpack(theta, self.grid.shapes)):
            W.uniform_(-W.shape[2] ** -0.5, W.shape[2] ** -0.5)
            b.zero_()
        self.scores = [theta, readout.uniform_(-1 / self.row.side, 1 / self.row.side)]
        for s in self.scores:
            s.grad = torch.zeros_like(s)
        self.on = [torch.zeros_like(w).requires_grad_() for w in self.weights]
        self.optimizer = torch.optim.Adam(self.scores, lr=self.row.lr, fused=True)
        self.stored.append([torch.empty_like(w, dtype=torch.bool) for w in self.weights])

    def train(self, t, x, y):
        with torch.no_grad():
            for s, mask, on, w in zip(self.scores, self.stored[t], self.on, self.weights):
                torch.mul(w, torch.gt(s, 0, out=mask), out=on)
        grads = torch.autograd.grad(self.loss(self.grid.answer(*self.on, x, self.row.dropout), y), self.on)
        for s, g, w in zip(self.scores, grads, self.weights):
            torch.mul(g, w, out=s.grad)  # straight through: d(mask)/d(score) is taken as 1
        self.optimizer.step()

    def end(self, t, x, y):
        pass

    def select(self, masks):
        return [w * m for w, m in zip(self.weights, masks)]


class Adapted:
    """LoRA-FTN and what it is compared with, on a frozen language model."""

    TARGETS = ("q_proj", "k_proj", "v_proj", "c_attn")  # the attention's inputs; GPT-2 has all three in one

    def __init__(self, row):
        self.row, self.method = row, METHODS[row.method]
        self.backbone, tokenizer = load_backbone(row.backbone, "cpu")
        self.backbone.requires_grad_(False).eval()
        self.pad_id = pad_of(tokenizer)
        self.world = StyleStream(row, tokenizer)
        targets = find_targets(self.backbone, self.TARGETS)
        banks = row.side ** 2 // row.k  # the bank: as many parameters, in H/k components, with B near zero to tell them apart
        self.pool = (LoRAPool(targets, banks, row.rank * row.k, BANK_STD) if row.method == "lora-bank" else
                     LoRAPool(targets, row.side ** 2, row.rank, row.b_std))
        attach(targets, self.pool.update)
        self.search = SmoothKWTA(row.k, kernel=3, rounds=15, steps=15, lr=0.5)
        self.stored, self.touched = [], []

    def loss(self, examples):
        """Mean negative log-likelihood per response token, in nats."""
        logits, labels = response_logits(self.backbone, self.pad_id, examples)
        return response_nll(logits, labels).sum() / sum(len(r) for _, r in examples)

    def find(self, t, examples):
        kind, k = self.method["mask"], self.row.k
        if kind == "all":
            return ALL
        if kind == "fixed":
            return torch.arange(t * k, (t + 1) * k)
        if kind == "bank":
            return min((torch.tensor([i]) for i in range(len(self.pool.free))), key=lambda i: self.mean_loss(i, examples))
        return self.search.configure(self.pool.loss_of_mask(lambda: self.loss(examples)), self.row.side, self.pool.free)

    def begin(self, t):
        self.rows = None
        self.stored.append(None)
        self.touched.append(torch.zeros(len(self.pool.free), dtype=torch.bool))

    def train(self, t, examples):
        """Only `rows` are trained: the winners, or, where the mask may move, all. Adam starts anew with each task."""
        every = self.row.reconfigure == "every" and self.method["mask"] == "search"
        if self.rows is None or every:
            support = examples if every else self.world.batch(t, self.row.support, generator(self.row.seed, "install", t))[0]
            self.stored[t] = self.find(t, support)
        if self.rows is None:
            self.rows = ALL if every else self.stored[t]
            self.live = {name: tuple(p.requires_grad_() for p in pair) for name, pair in self.pool.take(self.rows).items()}
            self.optimizer = torch.optim.AdamW([p for pair in self.live.values() for p in pair], lr=self.row.lr, weight_decay=0.0, fused=True)
        active = {name: (A[self.stored[t]], B[self.stored[t]]) for name, (A, B) in self.live.items()} if every else self.live
        self.optimizer.zero_grad()
        with self.pool.applied(active):
            self.loss(examples).backward()
        self.optimizer.step()
        self.touched[t][self.stored[t]] = True
        if every:  # the next search looks at the pool
            self.pool.store(self.rows, self.live)

    def end(self, t, examples):
        self.pool.store(self.rows, self.live)
        if self.method.get("lock"):
            self.pool.commit(self.stored[t])

    @torch.no_grad()
    def outputs(self, winners, examples):
        """Negative log-likelihood of every response [batch]."""
        with self.pool.applied(self.pool.take(winners)):
            return response_nll(*response_logits(self.backbone, self.pad_id, examples))

    def mean_loss(self, winners, examples):
        return self.outputs(winners, examples).sum().item() / sum(len(r) for _, r in examples)

    score = mean_loss

    def parameters(self, t):
        """A copy of task t's components on the first target, which stands for all."""
        return list(next(iter(self.pool.take(self.stored[t]).values())))


# ------------------------------------------------------------------------------------------------------- one stream

def run(row):
    """Learn the stream, score it, return everything about it as a dict that JSON can hold. One thread."""
    torch.set_num_threads(1)
    torch.manual_seed(row.seed)
    began, kept, curve, training = time.perf_counter(), [], [], 0.0
    kind = METHODS[row.method]["mask"]
    learner = (Adapted if row.variant == "style" else SupSup if kind == "weights" else Masked)(row)
    world = learner.world
    for t in range(row.tasks):
        rng = generator(row.seed, "train", t)
        learner.begin(t)
        for step in range(1, row.steps + 1):
            batch = world.batch(t, row.batch, rng)
            started = time.perf_counter()
            learner.train(t, *batch)
            if step == row.steps:
                learner.end(t, *batch)
            training += time.perf_counter() - started
            if step % CURVE_EVERY == 0 and row.variant != "style" or step == row.steps:
                stored, recovered = [], []
                for j, mask in enumerate(learner.stored):
                    found = recover(learner, j)
                    stored.append(learner.score(mask, *world.test[j]))
                    recovered.append(stored[j] if found is mask else learner.score(found, *world.test[j]))
                curve.append(dict(step=t * row.steps + step, stored=stored, recovered=recovered))
        kept.append((learner.parameters(t), learner.outputs(learner.stored[t], *world.test[t])))
    moved = [bits_moved(before, (learner.parameters(t), learner.outputs(learner.stored[t], *world.test[t]))) for t, before in enumerate(kept)]
    ends = [c for c in curve if c["step"] % row.steps == 0]
    out = dict(dataclasses.asdict(row), R_stored=[c["stored"] for c in ends], R_recovered=[c["recovered"] for c in ends],
               curve=curve, parameters_moved=[p for p, _ in moved], outputs_moved=[o for _, o in moved])
    if kind in ("search", "fixed"):
        last = [torch.zeros_like(u).index_fill(0, w, True) for u, w in zip(learner.touched, learner.stored)]
        pairs = list(itertools.combinations(range(row.tasks), 2))
        out.update(final_side=round(len(last[0]) ** 0.5), winners=[w.tolist() for w in learner.stored],
                   touched=[int(u.sum()) for u in learner.touched],
                   overlap_last=[(last[i] & last[j]).sum().item() / row.k for i, j in pairs],
                   overlap_union=[(learner.touched[i] & learner.touched[j]).sum().item() / row.k for i, j in pairs],
                   overwritten=[(last[i] & learner.touched[j]).sum().item() / row.k for i, j in pairs])
    return dict(out, ms_per_step=1e3 * training / (row.tasks * row.steps), seconds=time.perf_counter() - began)


def recover(learner, t):
    """The mask for task t's support batch: searched from a cold start, or *recalled*: where masks are kept, the stored one with
    the lowest loss on it; a tie goes to the earlier task."""
    if learner.method["mask"] == "fixed":  # the oracle is told which task it is
        return learner.stored[t]
    support = learner.world.support[t]
    if learner.method.get("lock"):
        return min(learner.stored, key=lambda handle: learner.mean_loss(handle, *support))
    return learner.find(t, *support)


def bits_moved(before, after):
    """Shares of parameters and of outputs that are not the same to the last bit."""
    def share(a, b):
        return sum((x != y).sum().item() for x, y in zip(a, b)) / sum(x.numel() for x in a)
    return share(before[0], after[0]), share([before[1]], [after[1]])


# ------------------------------------------------------------------------------------------------------- the tables

def forgetting(R, sign):
    """FM over earlier tasks. sign +1 where a higher score is better, -1 for a loss."""
    last, columns = R[-1], [[r[j] for r in R[j:]] for j in range(len(R) - 1)]
    return statistics.mean(max(sign * s for s in column) - sign * last[j] for j, column in enumerate(columns))


def summary(out):
    """The numbers of a table's line from what `run` returned. Means over tasks, or over pairs of tasks."""
    sign, mean = VARIANTS[out["variant"]]["sign"], statistics.mean
    s = {f"{p}_{key}": value for p in ("stored", "recovered") for key, value in
         (("last", mean(out["R_" + p][-1])), ("own", mean(r[-1] for r in out["R_" + p])), ("fm", forgetting(out["R_" + p], sign)))}
    if out["variant"] == "reg":  # "peak MSE minus final MSE", which is large where a task improves
        s["recovered_fm_paper"] = forgetting(out["R_recovered"], 1)
    s.update({key: mean(out[key]) for key in ("overlap_last", "overlap_union", "overwritten", "touched") if key in out})
    return dict(s, parameters_moved=mean(out["parameters_moved"][:-1]), outputs_moved=mean(out["outputs_moved"][:-1]),
                ms_per_step=out["ms_per_step"], seconds=out["seconds"])


def spread(values, digits=3):
    """mean +- standard deviation over seeds; nothing where there is no value."""
    values = [v for v in values if v is not None]
    text = f"{statistics.mean(values):.{digits}f}" if values else ""
    return text + (f" ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def print_tables(outs):
    for variant in VARIANTS:
        group = [o for o in outs if o["variant"] == variant]
        for leak in LEAKS:
            rows = {m: [summary(o) for o in group if o["method"] == m and o.get("leak", "none") == leak] for m in METHODS}
            if any(rows.values()):
                print_table(variant, leak, {m: r for m, r in rows.items() if r})
        print_decomposition([o for o in group if o.get("leak", "none") == "none"], variant)
        if variant == "style":
            print_overlaps(group)


def print_table(variant, leak, rows):
    score = VARIANTS[variant]["score"]
    print(f"\n{VARIANTS[variant]['title']}" + f", precaution left out: {leak}" * (leak != "none") + f", seeds: {max(map(len, rows.values()))}")
    heads = [f"{score} recov.", "FM recov.", f"{score} stored", "FM stored", f"{score} R[i,i]", "overlap last", "union",
             "params moved", "outputs", "paper " + score, "FM"] + ["FM as printed"] * (variant == "reg")
    print(f"{'':<14}" + "".join(f"{h:>14}" for h in heads))
    for method, seeds in rows.items():
        def cell(key):
            return spread([s.get(key) for s in seeds])
        cells = [cell("recovered_last"), cell("recovered_fm"), cell("stored_last"), cell("stored_fm"), cell("stored_own"),
                 spread([s.get("overlap_last") for s in seeds], 2), spread([s.get("overlap_union") for s in seeds], 2),
                 cell("parameters_moved"), cell("outputs_moved"), *PAPER[variant].get(method, ("", ""))]
        print(f"{method:<14}" + "".join(f"{c:>14}" for c in cells + [cell("recovered_fm_paper")] * (variant == "reg")))


def print_decomposition(outs, variant):
    """Table 4: what an earlier task lost against FixedMask, as overlap (stored) and recall (stored minus recovered)."""
    sign, oracle = VARIANTS[variant]["sign"], {o["seed"]: o for o in outs if o["method"].endswith("fixedmask")}
    lines = {}
    for o in outs:
        if o["seed"] in oracle and oracle[o["seed"]] is not o:
            best, stored, recovered = oracle[o["seed"]]["R_stored"][-1][:-1], o["R_stored"][-1][:-1], o["R_recovered"][-1][:-1]
            lines.setdefault(o["method"], []).append((sign * (statistics.mean(best) - statistics.mean(stored)),
                                                      sign * (statistics.mean(stored) - statistics.mean(recovered))))
    if lines:
        print(f"\nloss on earlier tasks against FixedMask, {variant}\n{'':<14}{'overlap':>16}{'recall':>16}")
        for method in METHODS:
            if method in lines:
                print(f"{method:<14}" + "".join(f"{spread(column):>16}" for column in zip(*lines[method])))


def print_overlaps(outs):
    """Table 5: |m_i and m_j| / k for every pair of tasks, the mean over seeds."""
    for method in ("lora-ftn", "lora-ftn-lock"):
        same = [o for o in outs if o["method"] == method]
        if same:
            n = same[0]["tasks"]
            mean = dict(zip(itertools.combinations(range(n), 2), map(statistics.mean, zip(*(o["overlap_last"] for o in same)))))
            styles = list(StyleStream.STYLES)[:n]
            print(f"\noverlap of stored masks, {method}\n{'':<16}" + "".join(f"{s[:10]:>12}" for s in styles))
            for i, style in enumerate(styles):
                print(f"{style:<16}" + "".join(f"{'.' if i == j else format(mean[min(i, j), max(i, j)], '.2f'):>12}" for j in range(n)))


def draw(outs, folder):
    """Figure 1, masks as colours, and the curves of every task through the stream; as PNG files in `folder`."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for variant in dict.fromkeys(o["variant"] for o in outs):
        group = [o for o in outs if o["variant"] == variant]
        methods = [m for m in METHODS if any(o["method"] == m for o in group)]
        tiles = [m for m in methods if METHODS[m]["mask"] == "search"]
        seeds = sorted({o["seed"] for o in group})
        if tiles:
            fig, axes = plt.subplots(len(tiles), len(seeds), figsize=(1.3 * len(seeds) + 1, 1.4 * len(tiles)), squeeze=False)
            for axis, (m, seed) in zip(axes.flat, itertools.product(tiles, seeds)):
                axis.set(xticks=[], yticks=[])
                if seed == seeds[0]:
                    axis.set_ylabel(m, fontsize=8)
                if m == tiles[0]:
                    axis.set_title(f"seed {seed}", fontsize=8)
                for o in group:
                    if (o["method"], o["seed"]) == (m, seed):
                        colours = [torch.tensor(matplotlib.colors.hsv_to_rgb((t / o["tasks"], 1, 1))).float() for t in range(o["tasks"])]
                        image = torch.zeros(o["final_side"] ** 2, 3)
                        for colour, winners in zip(colours, o["winners"]):
                            image[winners] += colour
                        axis.imshow(image.clamp(max=1).view(o["final_side"], o["final_side"], 3).numpy(), interpolation="nearest")
            fig.tight_layout()
            save(fig, folder / f"ftn-masks-{variant}.png")
        if variant == "style":  # figure 2: R[i][j], recovered
            fig, axes = plt.subplots(1, len(methods), figsize=(2.2 * len(methods), 2.6), squeeze=False)
            for axis, m in zip(axes.flat, methods):
                R = [o["R_recovered"] for o in group if o["method"] == m]
                n = len(R[0])
                cells = [[statistics.mean(r[i][j] for r in R) if j <= i else float("nan") for j in range(n)] for i in range(n)]
                axis.imshow(cells, vmin=0, vmax=8, cmap="viridis_r")
                for i, j in ((i, j) for i in range(n) for j in range(i + 1)):
                    axis.text(j, i, f"{cells[i][j]:.1f}", ha="center", va="center", fontsize=6, color="white" if cells[i][j] > 4 else "black")
                axis.set_title(m, fontsize=8)
                axis.set(xticks=[], yticks=[], xlabel="task", ylabel="after task")
            fig.tight_layout()
            save(fig, folder / f"ftn-matrices-{variant}.png")
        fig, axes = plt.subplots(-(-len(methods) // 3), 3, figsize=(11, 2.3 * -(-len(methods) // 3)), sharex=True, sharey=True,
                                 squeeze=False, layout="constrained")
        for axis in axes.flat[len(methods):]:
            axis.axis("off")
        for axis, m in zip(axes.flat, methods):
            same = [o["curve"] for o in group if o["method"] == m]
            axis.set_title(m, fontsize=9)
            for t, (protocol, style) in itertools.product(range(group[0]["tasks"]), (("recovered", "-"), ("stored", ":"))):
                points = [(c[0]["step"], statistics.mean(p[protocol][t] for p in c)) for c in zip(*same) if len(c[0][protocol]) > t]
                axis.plot(*zip(*points), style, marker=".", markersize=3, color=f"C{t}", label=f"task {t + 1}, {protocol}")
            axis.tick_params(labelbottom=True)
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
        fig.supxlabel("training step", fontsize=9)
        fig.supylabel(VARIANTS[variant]["title"], fontsize=9)
        save(fig, folder / f"ftn-curves-{variant}.png")


def save(figure, path):
    with atomic(path) as tmp:
        figure.savefig(tmp, dpi=120, format="png", metadata={"Software": None})
    print(f"wrote {path}")


# -------------------------------------------------------------------------------------------------- the command line

def bench(blocks=5, steps=5):
    """A training step, mask search included, against the literal algorithm, on the same batches; in turns of a few steps,
    so that each finds in the cache what it would find there in training."""
    torch.set_num_threads(1)
    for variant in HEAD:
        row = Row(variant, "ftn-slow", 0, dropout=0.0)
        torch.manual_seed(0)
        ours, literal = Masked(row), Masked(row)
        rng, times, same, worst = generator("bench"), ([], []), 0, 0.0
        for learner in (ours, literal):
            learner.begin(0)

        def step_ours(x, y):
            ours.train(0, x, y)
            return ours.stored[0], ours.grid.theta.grad

        def step_literal(x, y):
            winners = literal.search.configure(lambda m: literal.loss(literal.grid(x, m), y), literal.grid.side)
            mask = torch.zeros(len(literal.grid.theta)).index_fill(0, winners, 1.0)
            literal.optimizer.zero_grad()
            literal.loss(literal.grid(x, mask), y).backward()
            literal.optimizer.step()
            return winners, literal.grid.theta.grad.clone()  # the next search adds to it
        for block in range(blocks + 1):
            literal.grid.load_state_dict(ours.grid.state_dict())  # rounding must not add up
            batches, results = [ours.world.batch(0, row.batch, rng) for _ in range(steps)], []
            for step, spent in zip((step_ours, step_literal), times):
                started = time.perf_counter()
                results.append([step(*batch) for batch in batches])
                spent.append((time.perf_counter() - started) / steps)
            for (winners, gradient), (winners_, gradient_) in zip(*results):
                same += torch.equal(winners, winners_)
                worst = max(worst, ((gradient - gradient_).abs().max() / gradient_.abs().max()).item())
        fast, slow = (statistics.median(t[1:]) for t in times)
        print(f"{variant}: {1e3 * fast:.1f} ms a step, literal {1e3 * slow:.1f} ms, ratio {slow / fast:.1f}; "
              f"same mask in {same} of {(blocks + 1) * steps} batches, gradients differ by {worst:.1e} of the largest")


def bench_lora(backbone, repeats=5):
    """A training step and a mask search of LoRA-FTN in its second task, against all H components on every token, with a
    gradient for each; in turns, on the same batches."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours = Adapted(StyleRow("lora-ftn", 0, backbone))
    world, pool, rank = ours.world, ours.pool, ours.row.rank
    ours.begin(0)
    for _ in range(20):
        ours.train(0, world.training[0][:8])
    ours.end(0, None)
    full = {name: tuple(p.clone().requires_grad_() for p in pair) for name, pair in pool.parts.items()}
    adam = torch.optim.AdamW([p for pair in full.values() for p in pair], lr=ours.row.lr, weight_decay=0.0, fused=True)
    literal_mask = None

    def update(name, x, y):
        if literal_mask is None:
            return y
        A, B = (p.flatten(0, 1) for p in full[name])                              # [H r, d]
        return y + (F.linear(x, A) * literal_mask.repeat_interleave(rank)) @ B
    attach(find_targets(ours.backbone, ours.TARGETS), update)

    def under(mask, examples):
        nonlocal literal_mask
        literal_mask = mask
        try:
            return ours.loss(examples)
        finally:
            literal_mask = None
    times, same = {"search": ([], []), "step": ([], [])}, []
    ours.begin(1)
    ours.train(1, world.training[1][:8])
    for i in range(repeats + 1):
        support, examples = world.training[1][16:32], world.training[1][8 * i:8 * i + 8]
        pool.store(ours.rows, ours.live)
        for pair, parts in zip(full.values(), pool.parts.values()):  # both at the same point
            for p, part in zip(pair, parts):
                p.data.copy_(part)

        def search_ours():
            return ours.find(1, support)

        def search_literal():
            return ours.search.configure(lambda m: under(m, support), ours.row.side)

        def step_ours():
            ours.optimizer.zero_grad()
            with pool.applied(ours.live):
                ours.loss(examples).backward()
            ours.optimizer.step()

        def step_literal():
            adam.zero_grad()
            under(torch.zeros(len(pool.free)).index_fill(0, ours.stored[1], 1.0), examples).backward()
            adam.step()
        for name, pair in (("search", (search_ours, search_literal)), ("step", (step_ours, step_literal))):
            results = []
            for f, spent in zip(pair, times[name]):
                started = time.perf_counter()
                results.append(f())
                spent.append(time.perf_counter() - started)
            if name == "search":
                same.append(len(set(results[0].tolist()) & set(results[1].tolist())) / ours.row.k)
    for name, pair in times.items():
        fast, slow = (statistics.median(t[1:]) for t in pair)
        print(f"{name}: {1e3 * fast:.0f} ms, literal {1e3 * slow:.0f} ms, ratio {slow / fast:.1f}"
              + f"; the two masks share {statistics.mean(same):.1%} of their winners" * (name == "search"))


def work(row):
    """A finished row from its file, or the row computed and written. What may be refused comes back as text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    code = [pathlib.Path(__file__).with_name(name).read_bytes() for name in ("ftn.py", "synthetic.py")]
    key = hashlib.sha256(repr((row, torch.__version__, code)).encode()).hexdigest()[:16]
    path = pathlib.Path("runs", "synthetic", f"{row.variant}-{row.method}-{row.seed}-{key}.json")
    if not path.exists():
        try:
            out = run(row)
        except Refused as e:
            return row, None, str(e)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as tmp:
            tmp.write_text(json.dumps(out))
    return row, json.loads(path.read_text()), None


def main(argv=None):
    p = argparse.ArgumentParser(prog="synthetic.py", description="The FTN experiments and their tables.")
    p.add_argument("--experiment", type=int, choices=[1, 2], default=1)
    p.add_argument("--variant", nargs="+", choices=list(HEAD), default=list(HEAD), help="of experiment 1")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=None, help="[all]")
    p.add_argument("--seeds", type=int, default=1, help="how many")
    p.add_argument("--first-seed", type=int, default=0)
    p.add_argument("--inputs", choices=["uniform", "gaussian"], default="uniform", help="the generator: see Row")
    p.add_argument("--backbone", default="tiny", help="of experiment 2: tiny, a Hub id, a local folder, FILE.gguf")
    p.add_argument("--reconfigure", choices=["once", "every"], default="once", help="experiment 2: search the mask once a task, or every step")
    p.add_argument("--b-std", type=float, default=0.0, help="experiment 2: standard deviation that B starts with [0]")
    p.add_argument("--tasks", type=int, help="[3; 6]")
    p.add_argument("--steps", type=int, help="training steps a task [1000; 200]")
    p.add_argument("--search", nargs=2, type=float, default=(), metavar=("S", "ETA"), help="steps and rate of the mask search [1 1.0 clf, 10 0.2 reg]")
    p.add_argument("--grow", action="store_true", help="when too few neurons are free, go on with a larger grid")
    p.add_argument("--leaks", action="store_true", help="FixedMask with each precaution of Appendix C left out")
    p.add_argument("--bench", action="store_true", help="time a step against the literal Algorithm 1, and stop")
    p.add_argument("--workers", type=int, default=multiprocessing.cpu_count(), help="rows computed side by side [one per core]")
    p.add_argument("--json", help="write everything about every row to this file")
    p.add_argument("--figures", nargs="?", const="runs/synthetic", metavar="DIR", help="draw masks and curves as PNG [runs/synthetic]")
    args = p.parse_args(argv)
    sizes = {name: getattr(args, name) for name in ("tasks", "steps") if getattr(args, name) is not None}
    for name, value in dict(sizes, seeds=args.seeds, workers=args.workers).items():
        if value < (2 if name == "tasks" else 1) or (name, args.experiment) == ("tasks", 2) and value > len(StyleStream.STYLES):
            raise Refused(f"--{name} {value} is out of range")
    if args.b_std < 0 or args.search and min(args.search) <= 0:
        raise Refused("--b-std must not be negative, and --search takes two numbers above 0")
    if args.figures and not importlib.util.find_spec("matplotlib"):
        raise Refused("--figures needs matplotlib: pip install matplotlib")
    if args.bench:
        return bench() if args.experiment == 1 else bench_lora(args.backbone)
    known = [m for m in METHODS if m.startswith("lora-") == (args.experiment == 2)]
    methods = args.methods or (["fixedmask"] if args.leaks else known)
    if set(methods) - set(known):
        raise Refused(f"experiment {args.experiment} has the methods {', '.join(known)}")
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    if args.experiment == 2:
        rows = [StyleRow(m, seed, args.backbone, args.reconfigure, args.b_std, **sizes) for seed in seeds for m in methods]
    else:
        rows = [Row(v, m, seed, args.inputs, leak, grow=args.grow, search=tuple(args.search), **sizes) for seed in seeds for v in args.variant for m in methods
                for leak in (LEAKS if args.leaks else ["none"])]
    cost = ["fixed", "weights", "all", "bank", "search"]  # the first line soon, the longest next
    rows.sort(key=lambda r: (r.seed, cost.index(METHODS[r.method]["mask"])))
    outs, refused = [], []
    with multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn").Pool(min(args.workers, len(rows))) as pool, \
            tqdm(total=len(rows), unit="row") as bar:
        for row, out, message in pool.imap_unordered(work, rows):
            bar.update()
            name = f"{row.variant} {row.method} seed {row.seed}" + (f" {row.leak}" if args.leaks else "")
            if out is None:
                refused.append(f"{name}: {message}")
                bar.write(refused[-1])
                continue
            outs.append(out)
            s = summary(out)
            bar.write(f"{name:<30} recovered {s['recovered_last']:.3f}  FM {s['recovered_fm']:+.3f}   stored {s['stored_last']:.3f}  "
                      f"FM {s['stored_fm']:+.3f}   {out['seconds']:.0f} s")
    outs.sort(key=lambda o: (o["seed"], list(VARIANTS).index(o["variant"]), list(METHODS).index(o["method"]), LEAKS.index(o.get("leak", "none"))))
    print_tables(outs)
    if args.json:
        with atomic(pathlib.Path(args.json)) as tmp:
            tmp.write_text(json.dumps(dict(
                command="python synthetic.py " + " ".join(argv if argv is not None else sys.argv[1:]), refused=refused,
                date=datetime.date.today().isoformat(), machine=f"{platform.system()} {platform.machine()}, {multiprocessing.cpu_count()} cores",
                torch=torch.__version__, python=platform.python_version(), rows=[dict(o, summary=summary(o)) for o in outs])))
    if args.figures and outs:
        draw(outs, args.figures)
    if refused:
        raise Refused(f"{len(refused)} of {len(rows)} rows were not computed: {refused[0]}")


if __name__ == "__main__":
    try:
        main()
    except (Refused, OSError) as e:
        raise SystemExit(f"synthetic.py: {e}")
    except KeyboardInterrupt:
        raise SystemExit("\nsynthetic.py: stopped; finished rows are kept, the same command goes on")
