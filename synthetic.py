"""FTN's two experiments, and their tables beside the paper's.

    python synthetic.py                        # experiment 1: both variants, the paper's methods, one seed
    python synthetic.py --methods all          # and supsup-wide, the slowest
    python synthetic.py --seeds 8              # mean +- std over seeds, as in the paper
    python synthetic.py --leaks                # what each broken precaution costs FixedMask
    python synthetic.py --tasks 12 --methods ftn-slow ftn-slow-lock --grow     # beyond the capacity H/k = 8
    python synthetic.py --experiment 2         # LoRA-FTN: six style tasks on one frozen language model

Both are a stream of tasks under *concept shift*: the same inputs, other targets. In experiment 1 (FTN
section 3, Appendix B) a grid of neurons learns three functions of two numbers, in experiment 2 (section 3,
Appendices E and F) a pool of adapters learns six ways to rewrite a sentence. Every method sees the same
batches. After each task all tasks so far are scored:

    stored      with the mask of the task's last training batch
    recovered   with the mask that the search finds, from a cold start, on a support batch of the task; where
                masks are kept, under the lock, in SupSup and in the controls that recall, with the stored
                one that has the lowest loss on it

R[i][j] is the score on task j after task i. ACC (MSE, CE) is the mean of the last row. FM, forgetting, is
over earlier tasks the mean of best minus final accuracy, or of final minus best loss: positive always means
forgetting.

The paper does not give its generator; ours is `ConceptShift`. Finished rows are kept in runs/synthetic, so
the same command, interrupted, goes on; one thread computes a row, so results do not depend on --workers.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while torch is imported: one line, no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"\nsynthetic.py: stopped\n") and 130))

import ast
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import pathlib
import re
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import attach, response_logits, response_nll
from plumbing import Refused
from plumbing.backbone import load_backbone, TINY_FOLDER
from plumbing.command import number, output_file, Parser, run_program, write_results
from plumbing.files import atomic
from plumbing.processes import rank_and_size
from plumbing.prompts import pad_of
from plumbing.targets import find_targets
from ftn import ALL, FastGrid, LoRAPool, SmoothKWTA, commit_mask, grow, unpack

HERE = pathlib.Path(__file__).parent
SENTENCES = HERE / "assets" / "data" / "sentences.txt"
LEAKS = ("none", "decay", "moments", "bias")
# fmt: off
VARIANTS = {"clf": dict(score="ACC", sign=1, title="classification (accuracy)"),
            "reg": dict(score="MSE", sign=-1, title="regression (squared error)"),
            "style": dict(score="CE", sign=-1, title="style tasks (nats per token)")}
PUBLISHED = {  # score and FM in FTN Tables 1, 2 and 3
    "clf": {"nomask": (".666", ".466"), "fixedmask": (".938", ".000"), "kwta": (".640", ".152"),
            "ftn-fast": (".899", ".042"), "ftn-slow": (".896", ".014"), "ewc": (".665", ".463"),
            "supsup": (".645", ".000"), "supsup-wide": (".660", ".000")},
    "reg": {"nomask": (".312", ".054"), "fixedmask": (".006", ".000"), "kwta": (".589", ".028"),
            "ftn-fast": (".126", ".013"), "ftn-slow": (".167", ".003"), "ewc": (".311", ".054"),
            "supsup": (".206", ".000"), "supsup-wide": (".216", ".101")},
    "style": {"lora-naive": ("8.22", "7.37"), "lora-fixedmask": ("1.39", "0.00"),
              "lora-bank": ("1.42", "0.04"), "lora-ftn": ("1.51", "0.07")}}
# fmt: on


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of experiment 1: a method on a variant with a seed. The values are the paper's."""

    variant: str
    method: str
    seed: int
    inputs: str = "uniform"  # "gaussian": x ~ N(0, I) and no phases, the harder generator
    frequency: float = 8.0
    generator: int = -1  # the seed of W, b and v; -1: the row's own
    leak: str = "none"  # one of Appendix C's precautions, left out
    tasks: int = 3
    steps: int = 1000  # training steps a task
    grow: bool = False  # enlarge the grid when too few neurons are free
    search: tuple = ()  # (S, eta) in place of the variant's own
    m0: float = 0.0  # what a search's mask logits start with
    batch: int = 256
    side: int = 32  # D, H = D^2
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
    b_std: float = 0.0  # B starts at zero, or at N(0, b_std^2)
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


# ---------------------------------------------------------------------------------------------- the tasks

TEST, CURVE_EVERY = 2048, 100  # examples of a task's test set; steps between two points of a curve
BANK_STD = 1e-3  # of B in LoRA-Bank: near zero, to tell the components apart
# fmt: off
HEAD = {"clf": dict(loss=F.cross_entropy, d_out=2, steps=1, lr=1.0),  # steps, lr: S, eta of the search
        "reg": dict(loss=F.mse_loss, d_out=1, steps=10, lr=0.2)}
# fmt: on


def generator(*key):
    """A random stream of its own for every purpose: (seed, purpose, ...)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class ConceptShift:
    """x in R^2, h = W x + b in R^(8 tasks), y_t = sum over the task's own eight i of v_i sin(f h_i), |v| = 1.

    The frequency f is 8, W_ij ~ N(0, 0.5^2), b ~ U(-pi, pi), x ~ U(-1, 1)^2; with inputs "gaussian" x ~
    N(0, 1)^2 and b = 0. Classification: is y_t above its median. Regression: 0.75 (y_t - mean).
    """

    def __init__(self, row):
        rng = generator(row.seed if row.generator < 0 else row.generator, 0)
        self.row, tasks = row, range(row.tasks)
        self.W = 0.5 * torch.randn(8 * row.tasks, 2, generator=rng)
        phases = (torch.rand(8 * row.tasks, 1, generator=rng) * 2 - 1) * torch.pi
        self.b = phases * (row.inputs == "uniform")
        self.v = F.normalize(torch.randn(row.tasks, 8, generator=rng), dim=1)
        samples = [self.signal(t, self.sample(2**16, rng)) for t in tasks]
        self.centre = [y.median() if row.variant == "clf" else y.mean() for y in samples]
        self.support = [self.batch(t, row.batch, generator(row.seed, "support", t)) for t in tasks]
        self.test = [self.batch(t, TEST, generator(row.seed, "test", t)) for t in tasks]

    def sample(self, n, rng):
        uniform = self.row.inputs == "uniform"
        return torch.rand(n, 2, generator=rng) * 2 - 1 if uniform else torch.randn(n, 2, generator=rng)

    def signal(self, t, x):
        own = slice(8 * t, 8 * t + 8)
        return torch.sin(self.row.frequency * (self.W[own] @ x.T + self.b[own])).T @ self.v[t]

    def batch(self, t, n, rng):
        """x [n, 2] and y: classes [n] or values [n, 1]."""
        x = self.sample(n, rng)
        y = self.signal(t, x) - self.centre[t]
        return x, (y > 0).long() if self.row.variant == "clf" else 0.75 * y[:, None]


class StyleStream:
    """The same sentences for every task, rewritten in its way. A batch: a list of (prompt, response) ids."""

    # fmt: off
    STYLES = {"upper": str.upper,
              "lower": str.lower,
              "reverse_words": lambda s: " ".join(reversed(s.split())),
              "double_words": lambda s: " ".join(w for w in s.split() for _ in range(2)),
              "starred_vowels": lambda s: re.sub("[aeiouAEIOU]", "*", s),
              "pirate": lambda s: f"Arr! {s} matey!"}
    # fmt: on

    def __init__(self, row, tokenizer):
        if tokenizer.eos_token_id is None:
            raise Refused(f"backbone {row.backbone}: its tokenizer has no token that ends a response")
        sentences = SENTENCES.read_text().splitlines()
        order = torch.randperm(len(sentences), generator=generator(row.seed, "split")).tolist()

        def example(style, sentence):
            response = tokenizer(style(sentence), add_special_tokens=False).input_ids + [
                tokenizer.eos_token_id
            ]
            return tokenizer(sentence + "\n").input_ids, response[: row.max_len]

        def rewritten(part):
            styles = list(self.STYLES.values())[: row.tasks]
            return [[example(style, sentences[i]) for i in part] for style in styles]

        self.test = [(examples,) for examples in rewritten(order[:24])]
        self.support = [(examples,) for examples in rewritten(order[24 : 24 + row.support])]
        self.training = rewritten(order[24 + row.support :])

    def batch(self, t, n, rng):
        chosen = torch.randperm(len(self.training[t]), generator=rng)[:n]
        return ([self.training[t][i] for i in chosen.tolist()],)


# ------------------------------------------------------------------------- how a method chooses its mask


def recall(mask, learner, t):
    """The stored mask with the lowest loss on task t's support batch; a tie goes to the earlier task."""
    return min(learner.stored, key=lambda handle: learner.mean_loss(handle, *learner.world.support[t]))


@dataclasses.dataclass(frozen=True)
class Mask:
    """`mask_for` a batch of task t gives indices of neurons, or of adapters, or ALL."""

    def recover(self, learner, t):
        """The mask for task t's support batch, at test time."""
        return self.mask_for(learner, t, *learner.world.support[t])

    def penalize(self, learner):
        """Add to the gradients what the method adds to the loss."""

    def end(self, learner, t, *batch):
        """Task t is over; `batch` was its last."""


@dataclasses.dataclass(frozen=True)
class FixedMask(Mask):
    """Disjoint blocks in the order of the tasks, or anywhere: the next k of a random order.

    Told, at test time, which task it is, as no other method is; if not, it recalls as the lock does.
    """

    told: bool = True
    anywhere: bool = False

    def mask_for(self, learner, t, *batch):
        k, count = learner.row.k, len(learner.components.free)
        if (t + 1) * k > count:
            raise Refused(f"{count} neurons hold {count // k} fixed masks of {k}, not {t + 1}")
        order = torch.arange(count)
        if self.anywhere:
            order = torch.randperm(count, generator=generator(learner.row.seed, "blocks"))
        return order[t * k : (t + 1) * k].sort().values

    def recover(self, learner, t):
        return learner.stored[t] if self.told else recall(self, learner, t)


@dataclasses.dataclass(frozen=True)
class SearchedMask(Mask):
    """FTN: Algorithm 1, in training and at test time. hidden: in training the search does not see the answers
    of what earlier tasks have trained, though it may still win; under the lock this is what is committed."""

    kernel: int = 3
    rounds: int = 15
    hidden: bool = False

    def search(self, learner, seen, *batch):
        free, loss = learner.components.free, learner.loss_of_mask(*batch)
        algorithm = SmoothKWTA(learner.row.k, self.kernel, self.rounds, *learner.proposal)
        return algorithm.configure(lambda mask: loss(mask * seen), math.isqrt(len(free)), free)

    def mask_for(self, learner, t, *batch):
        seen = torch.ones_like(learner.touched[t])
        for trained in learner.touched[:t] if self.hidden else ():
            seen &= ~trained
        return self.search(learner, seen, *batch)

    def recover(self, learner, t):
        return self.search(learner, torch.ones_like(learner.touched[t]), *learner.world.support[t])


class RecalledMask(SearchedMask):
    """FTN, searched in training alone: at test time a stored mask is recalled."""

    recover = recall


class LockedMask(RecalledMask):
    """FTN with the lock: a finished task's mask is committed, too."""

    def end(self, learner, t, *batch):
        commit_mask(learner.components, learner.stored[t])


class NoMask(Mask):
    """Every neuron or adapter, always: naive fine-tuning."""

    def mask_for(self, learner, t, *batch):
        return ALL


@dataclasses.dataclass(frozen=True)
class EWC(NoMask):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): strength/2 sum F (theta - theta*)^2."""

    strength: float = 400.0

    def penalize(self, learner):
        for importance, anchor in learner.fisher:
            for p, f, a in zip(learner.grid.parameters(), importance, anchor):
                p.grad.add_(f * (p.detach() - a), alpha=self.strength)

    def end(self, learner, t, x, y):
        """F is the diagonal Fisher information: the mean squared gradient, one example at a time."""
        theta = list(learner.grid.parameters())
        importance = [torch.zeros_like(p) for p in theta]
        for i in range(len(x)):
            loss = learner.loss(learner.grid.respond(x[i : i + 1], ALL), y[i : i + 1])
            for f, g in zip(importance, torch.autograd.grad(loss, theta)):
                f.addcmul_(g, g, value=1 / len(x))
        learner.fisher.append((importance, [p.detach().clone() for p in theta]))


class BestAdapter(Mask):
    """LoRA-Bank: the one adapter with the lowest loss on the batch. One that another task has trained can be
    that, and is then trained on."""

    def losses(self, learner, *batch):
        """Of every adapter, infinite where it is committed."""
        found = [learner.mean_loss(torch.tensor([i]), *batch) for i in range(len(learner.components.free))]
        return torch.tensor(found).masked_fill(~learner.components.free, math.inf)

    def mask_for(self, learner, t, *batch):
        return self.losses(learner, *batch).argmin()[None]


class LockedBank(BestAdapter):
    """LoRA-Bank with the lock: a finished task's adapter is offered to no other, and later recalled."""

    recover = recall

    def end(self, learner, t, *batch):
        commit_mask(learner.components, learner.stored[t])


@dataclasses.dataclass(frozen=True)
class Supermask(Mask):
    """A mask over weights: `SupSup` learns it, so here it is only recalled.

    lr: of the scores. top: a weight is on where its score is among the larger half of its layer, as the
    paper says, in place of where it is positive. wide: twice the width, and signed constants +-sqrt(gain /
    fan_in) in place of normal weights; Kaiming-He's gain is 2, and 4 allows for the half that is off.
    """

    lr: float = 3e-4
    top: bool = False
    wide: bool = False
    gain: float = 4.0
    recover = recall


# ------------------------------------------------------------------------------------------ the learners


class Learner:
    """What a stream asks of a method. From `stored[t]`, a mask, the *handle*, it answers task t.

    begin(t), train(t, *batch), end(t, *batch)     learn task t, batch after batch
    score, mean_loss, outputs(handle, *batch)      answer a batch with a handle
    parameters(t)                                  a copy of what task t's answers are computed from
    """

    def __init__(self, row, mask, world, components):
        self.row, self.mask, self.world, self.components = row, mask, world, components
        self.stored, self.touched = [], []  # touched: every neuron or adapter that a task has trained

    def begin(self, t):
        self.stored.append(None)
        self.touched.append(torch.zeros(len(self.components.free), dtype=torch.bool))

    def end(self, t, *batch):
        self.mask.end(self, t, *batch)


class Neurons(Learner):
    """FTN and what it is compared with on the same grid. A handle is a mask: its winners [k], or ALL."""

    def __init__(self, row, mask, width=1):
        head = HEAD[row.variant]
        self.loss, self.fisher, self.optimizer = head["loss"], [], None
        steps, lr = row.search or (head["steps"], head["lr"])
        self.proposal = int(steps), lr, row.m0  # S, eta and m_0 of Algorithm 1
        size = dict(layers=row.layers, width=width * row.width, bias=row.leak == "bias")
        super().__init__(row, mask, ConceptShift(row), FastGrid(row.side, 2, head["d_out"], **size))

    @property
    def grid(self):
        return self.components

    def begin(self, t):
        """The precautions of Appendix C are here: no weight decay, and moments that start from zero."""
        if self.row.grow and self.grid.free.sum() < self.row.k:
            self.components, index = grow(self.grid, round(self.grid.side * 1.5))
            self.stored = [index[winners] for winners in self.stored]
            none = torch.zeros(len(self.grid.free), dtype=torch.bool)
            self.touched = [none.index_put((index,), touched) for touched in self.touched]
        if self.optimizer is None or self.row.leak != "moments":
            settings = dict(lr=self.row.lr, weight_decay=0.01 * (self.row.leak == "decay"), fused=True)
            self.optimizer = torch.optim.AdamW(self.grid.parameters(), **settings)
        super().begin(t)

    def loss_of_mask(self, x, y):
        return self.grid.loss_of_mask(x, y, self.loss)

    def train(self, t, x, y):
        winners = self.stored[t] = self.mask.mask_for(self, t, x, y)
        self.touched[t][winners] = True
        self.optimizer.zero_grad()
        self.loss(self.grid.respond(x, winners, self.row.dropout), y).backward()
        self.mask.penalize(self)
        self.optimizer.step()

    def select(self, winners):
        return [self.grid.theta.detach()[winners], self.grid.readout.detach()[:, winners]]

    @torch.no_grad()
    def outputs(self, handle, x, y=None):
        weights = self.select(handle)
        return torch.cat([self.grid.answer(*weights, part) for part in x.split(256)])

    def mean_loss(self, handle, x, y):
        return self.loss(self.outputs(handle, x), y).item()

    def score(self, handle, x, y):
        if self.row.variant == "clf":
            return (self.outputs(handle, x).argmax(1) == y).float().mean().item()
        return self.mean_loss(handle, x, y)

    def parameters(self, t):
        return [p.clone() for p in self.select(self.stored[t])]


class SupSup(Neurons):
    """Supermasks: frozen random weights, and for each task a binary mask over them, learned through scores.

    A weight is on where its score is positive (straight-through gradient), as in the SupSup authors' own
    example; scores start at U(-1, 1) / sqrt(fan_in), so half are on. A handle is a mask of each weight
    tensor.
    """

    def __init__(self, row, mask):
        super().__init__(row, mask, width=2 if mask.wide else 1)
        self.weights = [p.detach() for p in self.grid.parameters()]
        if mask.wide:
            for W in unpack(self.weights[0], self.grid.shapes)[0]:
                W.sign_().mul_((mask.gain / W.shape[2]) ** 0.5)

    def begin(self, t):
        theta, readout = (torch.empty_like(w) for w in self.weights)
        for W, b in zip(*unpack(theta, self.grid.shapes)):
            W.uniform_(-(W.shape[2] ** -0.5), W.shape[2] ** -0.5)
            b.zero_()
        self.scores = [theta, readout.uniform_(-1 / self.row.side, 1 / self.row.side)]
        for s in self.scores:
            s.grad = torch.zeros_like(s)
        self.on = [torch.zeros_like(w).requires_grad_() for w in self.weights]
        self.optimizer = torch.optim.Adam(self.scores, lr=self.mask.lr, fused=True)
        self.stored.append([torch.zeros_like(w, dtype=torch.bool) for w in self.weights])
        tensors = self.scores, self.stored[t], self.on, self.weights
        self.views = list(zip(*map(self.layers, tensors)))  # all are written in place

    def layers(self, tensors):
        """Views of those for theta and readout: [H, out, in] of every layer, [d_out, H]. Biases are 0."""
        return [*unpack(tensors[0].detach(), self.grid.shapes)[0], tensors[1].detach()]

    def train(self, t, x, y):
        with torch.no_grad():
            for s, mask, on, w in self.views:
                torch.mul(w, torch.gt(s, s.median() if self.mask.top else 0, out=mask), out=on)
        loss = self.loss(self.grid.answer(*self.on, x, self.row.dropout), y)
        for s, g, w in zip(self.scores, torch.autograd.grad(loss, self.on), self.weights):
            torch.mul(g, w, out=s.grad)  # straight through: d(mask)/d(score) is taken as 1
        self.optimizer.step()

    def select(self, masks):
        return [w * m for w, m in zip(self.weights, masks)]


class Adapters(Learner):
    """LoRA-FTN and what it is compared with, on a frozen language model. Handles are masks, too."""

    TARGETS = ("q_proj", "k_proj", "v_proj", "c_attn")  # the attention's inputs; GPT-2 has all three in one
    proposal = 15, 0.5  # S and eta of Algorithm 1

    def __init__(self, row, mask):
        self.backbone, tokenizer = load_backbone(row.backbone, "cpu")
        self.backbone.requires_grad_(False).eval()
        self.pad_id = pad_of(tokenizer)
        world, targets = StyleStream(row, tokenizer), find_targets(self.backbone, self.TARGETS)
        size = row.side**2, row.rank, row.b_std
        if isinstance(mask, BestAdapter):  # as many parameters in H/k adapters
            size = row.side**2 // row.k, row.rank * row.k, BANK_STD
        super().__init__(row, mask, world, LoRAPool(targets, *size))
        attach(targets, self.components.update)
        self.always = row.reconfigure == "every" and isinstance(mask, SearchedMask)
        self.offered = []  # for each task of a bank, the loss of every adapter when one was chosen

    def loss(self, examples):
        """Mean negative log-likelihood per response token, in nats."""
        logits, labels = response_logits(self.backbone, self.pad_id, examples)
        return response_nll(logits, labels).sum() / sum(len(r) for _, r in examples)

    def loss_of_mask(self, examples):
        return self.components.loss_of_mask(lambda: self.loss(examples))

    def begin(self, t):
        super().begin(t)
        self.live = None

    def install(self, t):
        """Make the task's mask trainable, or, where the mask may move, everything. Adam starts anew."""
        self.rows = ALL
        if not self.always:
            support = self.world.batch(t, self.row.support, generator(self.row.seed, "install", t))
            self.rows = self.stored[t] = self.mask.mask_for(self, t, *support)
            if isinstance(self.mask, BestAdapter):
                self.offered.append(self.mask.losses(self, *support).tolist())
        taken = self.components.take(self.rows).items()
        self.live = {name: (A.requires_grad_(), B.requires_grad_()) for name, (A, B) in taken}
        parameters = itertools.chain(*self.live.values())
        self.optimizer = torch.optim.AdamW(parameters, lr=self.row.lr, weight_decay=0.0, fused=True)

    def train(self, t, examples):
        if self.live is None:
            self.install(t)
        active = self.live
        if self.always:
            winners = self.stored[t] = self.mask.mask_for(self, t, examples)
            active = {name: (A[winners], B[winners]) for name, (A, B) in self.live.items()}
        self.touched[t][self.stored[t]] = True
        self.optimizer.zero_grad()
        with self.components.applied(active):
            self.loss(examples).backward()
        self.optimizer.step()
        if self.always:  # the next search looks at the pool
            self.components.store(self.rows, self.live)

    def end(self, t, examples):
        self.components.store(self.rows, self.live)
        super().end(t, examples)

    @torch.no_grad()
    def outputs(self, winners, examples):
        """Negative log-likelihood of every response [batch]."""
        with self.components.applied(self.components.take(winners)):
            return response_nll(*response_logits(self.backbone, self.pad_id, examples))

    def mean_loss(self, winners, examples):
        return self.outputs(winners, examples).sum().item() / sum(len(r) for _, r in examples)

    score = mean_loss

    def parameters(self, t):
        """Those on the first target, which stands for all."""
        return list(next(iter(self.components.take(self.stored[t]).values())))


METHODS = {
    "fixedmask": (Neurons, FixedMask()),
    "ftn-slow": (Neurons, SearchedMask(kernel=3, rounds=15)),
    "ftn-slow-lock": (Neurons, LockedMask(kernel=3, rounds=15)),
    "ftn-fast": (Neurons, SearchedMask(kernel=17, rounds=2)),
    "kwta": (Neurons, SearchedMask(kernel=1, rounds=0)),
    "nomask": (Neurons, NoMask()),
    "ewc": (Neurons, EWC(strength=400.0)),
    "supsup": (SupSup, Supermask()),
    "supsup-wide": (SupSup, Supermask(wide=True)),  # run with --methods all
    "lora-fixedmask": (Adapters, FixedMask()),
    "lora-ftn": (Adapters, SearchedMask(kernel=3, rounds=15)),
    "lora-ftn-lock": (Adapters, LockedMask(kernel=3, rounds=15)),
    "lora-naive": (Adapters, NoMask()),
    "lora-bank": (Adapters, BestAdapter()),
    "lora-bank-lock": (Adapters, LockedBank()),
}
CONTROLS = {  # of experiment 1, run when they are named
    "fixedmask-recall": (Neurons, FixedMask(told=False)),
    "random-disjoint-recall": (Neurons, FixedMask(told=False, anywhere=True)),
    "ftn-slow-hidden": (Neurons, SearchedMask(kernel=3, rounds=15, hidden=True)),
    "ftn-slow-hidden-recall": (Neurons, RecalledMask(kernel=3, rounds=15, hidden=True)),
    "ftn-slow-lock-hidden": (Neurons, LockedMask(kernel=3, rounds=15, hidden=True)),
}
CONTROLS |= {f"ewc-{x:.0f}": (Neurons, EWC(x)) for x in (40.0, 4e3, 4e4, 4e5, 4e6, 4e7, 4e8, 4e9)}
CONTROLS |= {
    f"supsup{size}{rule}-{lr:g}": (SupSup, Supermask(lr, rule == "-top", size != "", gain))
    for lr, rule in itertools.product((0.0, 3e-4, 3e-3, 3e-2), ("", "-top"))
    for size, gain in (("", 4.0), ("-wide-he", 2.0), ("-wide", 4.0))
}
CONTROLS = {name: how for name, how in CONTROLS.items() if how not in METHODS.values()}
KNOWN = METHODS | CONTROLS


# -------------------------------------------------------------------------------------------- one stream


def run_row(row):
    """Learn the stream, score it, return everything about it as a dict that JSON can hold. One thread.

    Refused: the grid is full, the backbone cannot be had, a score is not finite.
    """
    # First of all: after a fork, two threads that need PyTorch's pool at once may fail.
    torch.set_num_threads(1)
    torch.manual_seed(row.seed)
    began, training, kept, curve = time.perf_counter(), 0.0, [], []
    learner_class, mask = KNOWN[row.method]
    learner = learner_class(row, mask)
    for t in range(row.tasks):
        rng = generator(row.seed, "train", t)
        learner.begin(t)
        for step in range(1, row.steps + 1):
            batch = learner.world.batch(t, row.batch, rng)
            started = time.perf_counter()
            learner.train(t, *batch)
            if step == row.steps:
                learner.end(t, *batch)
            training += time.perf_counter() - started
            if step == row.steps or step % CURVE_EVERY == 0 and row.variant != "style":
                curve.append(dict(step=t * row.steps + step, **score_tasks(learner)))
        kept.append(answers(learner, t))
    moved = [bits_moved(before, answers(learner, t)) for t, before in enumerate(kept)]
    R = {p: [point[p] for point in curve if point["step"] % row.steps == 0] for p in ("stored", "recovered")}
    out = dict(dataclasses.asdict(row), R_stored=R["stored"], R_recovered=R["recovered"], curve=curve)
    out.update(parameters_moved=[share for share, _ in moved], outputs_moved=[share for _, share in moved])
    if torch.is_tensor(learner.stored[0]) and len(learner.stored[0]) == row.k:
        out.update(overlaps(learner))
    if isinstance(mask, BestAdapter):
        chosen = [int(handle) for handle in learner.stored]
        # JSON has no infinity: of a committed adapter there is no loss.
        offered = [[x if math.isfinite(x) else None for x in losses] for losses in learner.offered]
        out.update(chosen=chosen, offered=offered)
    ms_per_step = 1e3 * training / (row.tasks * row.steps)
    return dict(out, ms_per_step=ms_per_step, seconds=time.perf_counter() - began)


def score_tasks(learner):
    """Both protocols' scores on the test sets of all tasks so far."""
    stored, recovered = [], []
    for j, handle in enumerate(learner.stored):
        found = learner.mask.recover(learner, j)
        stored.append(learner.score(handle, *learner.world.test[j]))
        recovered.append(stored[j] if found is handle else learner.score(found, *learner.world.test[j]))
    if not all(map(math.isfinite, stored + recovered)):
        raise Refused(f"the loss is not finite in task {len(stored)}")
    return dict(stored=stored, recovered=recovered)


def answers(learner, t):
    """Task t's answers to its test set, and before them the parameters that they are computed from."""
    return learner.parameters(t), [learner.outputs(learner.stored[t], *learner.world.test[t])]


def bits_moved(before, after):
    """Shares of parameters and of outputs that are not the same to the last bit."""

    def share(a, b):
        return sum((x != y).sum().item() for x, y in zip(a, b)) / sum(x.numel() for x in a)

    return [share(a, b) for a, b in zip(before, after)]


def overlaps(learner):
    """The masks, and for every pair of tasks what they have in common, in units of k."""
    union, k = learner.touched, learner.row.k
    last = [torch.zeros_like(u).index_fill(0, w, True) for u, w in zip(union, learner.stored)]
    pairs = list(itertools.combinations(range(len(last)), 2))
    return dict(
        final_side=math.isqrt(len(last[0])),
        winners=[winners.tolist() for winners in learner.stored],
        touched=[int(u.sum()) for u in union],
        overlap_last=[(last[i] & last[j]).sum().item() / k for i, j in pairs],
        overlap_union=[(union[i] & union[j]).sum().item() / k for i, j in pairs],
        overwritten=[(last[i] & union[j]).sum().item() / k for i, j in pairs],
    )


# ----------------------------------------------------------------------------------------- finished rows


def cache_file(row, folder=HERE):
    """Where a row is kept. Its name has a hash of what decides its numbers and of nothing else, so that a new
    table or option throws no row away: ftn.py and this file from "the tasks" to "finished rows" without
    comments, and for a style row model.py, the sentences and the backbone."""
    source = (folder / "synthetic.py").read_text()
    source = source[source.index("- the tasks\n") : source.index("- finished rows\n")]
    code = [ast.unparse(ast.parse(part)) for part in ((folder / "ftn.py").read_text(), "#" + source)]
    files = []
    if row.variant == "style":
        code.append(ast.unparse(ast.parse((folder / "model.py").read_text())))
        backbone = pathlib.Path(TINY_FOLDER if row.backbone == "tiny" else row.backbone)
        files = [p for p in sorted([SENTENCES, backbone, *backbone.glob("*")]) if p.is_file()]
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(repr((row, torch.__version__, code, stats)).encode()).hexdigest()[:16]
    return pathlib.Path("runs", "synthetic", f"{row.variant}-{row.method}-{row.seed}-{key}.json")


def sealed(path, result):
    """What a row's file holds: its result, and a hash that tells if it is whole and belongs to the row."""
    return dict(sha256=hashlib.sha256((path.name + json.dumps(result)).encode()).hexdigest(), result=result)


def read_sealed(path):
    """The result in a row's file. Refused: the file is not what was written for this row."""
    try:
        saved = json.loads(path.read_bytes())
        if saved == sealed(path, saved["result"]):
            return saved["result"]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise Refused(f"{path} is damaged or not of this row; without it the row is computed again")


def finished_row(row):
    """The row; its result, from its file or else computed and kept; what was refused, if there is none."""
    path = cache_file(row)
    try:
        if not path.exists():
            out = run_row(row)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as tmp:
                tmp.write_text(json.dumps(sealed(path, out)))
        return row, read_sealed(path), None
    except Refused as e:
        return row, None, str(e)


def leave_interrupts_to_parent():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def finished_rows(rows, workers):
    """`finished_row` of each, as they come, from so many processes, which end at once if this one does."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, leave_interrupts_to_parent) as pool:
        # No worker is born with the parent's handlers.
        before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
        futures = [pool.submit(finished_row, row) for row in rows]
        for s, handler in before.items():
            signal.signal(s, handler)
        try:
            for future in tqdm(
                concurrent.futures.as_completed(futures), total=len(rows), unit="row", disable=None
            ):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise Refused("a worker was killed, perhaps for want of memory: try fewer --workers") from None
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()  # one that is just born still ignores other signals
            raise


# --------------------------------------------------------------------------------------------- the tables


def forgetting_measure(R, sign):
    """FM over earlier tasks. sign +1 where a higher score is better, -1 for a loss."""
    columns = [[r[j] for r in R[j:]] for j in range(len(R) - 1)]
    return statistics.mean(max(sign * s for s in column) - sign * column[-1] for column in columns)


def row_summary(out):
    """A table's line from what `run_row` returned: means over tasks, or over pairs of tasks."""
    sign, mean, line = VARIANTS[out["variant"]]["sign"], statistics.mean, {}
    for protocol in ("stored", "recovered"):
        R = out[f"R_{protocol}"]
        line[f"{protocol}_last"], line[f"{protocol}_own"] = mean(R[-1]), mean(r[-1] for r in R)
        line[f"{protocol}_fm"] = forgetting_measure(R, sign)
    if out["variant"] == "reg":  # "peak MSE minus final MSE", which is large where a task improves
        line["recovered_fm_paper"] = forgetting_measure(out["R_recovered"], 1)
    for key in ("overlap_last", "overlap_union", "overwritten", "touched"):
        if key in out:
            line[key] = mean(out[key])
    for key in ("parameters_moved", "outputs_moved"):
        line[key] = mean(out[key][:-1])
    return dict(line, ms_per_step=out["ms_per_step"], seconds=out["seconds"])


def spread(values, digits=3):
    """mean +- standard deviation over seeds; nothing where there is no value."""
    values = [v for v in values if v is not None]
    text = f"{statistics.mean(values):.{digits}f}" if values else ""
    return text + (f" ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def print_tables(outs):
    """Every table that the results, sorted by method, allow."""
    for variant in VARIANTS:
        group = [o for o in outs if o["variant"] == variant]
        for leak in LEAKS:
            rows = {}
            for o in group:
                if o.get("leak", "none") == leak:
                    rows.setdefault(o["method"], []).append(row_summary(o))
            if rows:
                print_scores(variant, leak, {m: rows[m] for m in KNOWN if m in rows})
        print_decomposition([o for o in group if o.get("leak", "none") == "none"], variant)
        if variant == "style":
            for method in ("lora-ftn", "lora-ftn-lock"):
                print_overlaps([o for o in group if o["method"] == method])


# fmt: off
COLUMNS = [("{} recov.", "recovered_last", 3), ("FM recov.", "recovered_fm", 3),
           ("{} stored", "stored_last", 3), ("FM stored", "stored_fm", 3), ("{} R[i,i]", "stored_own", 3),
           ("overlap last", "overlap_last", 2), ("union", "overlap_union", 2),
           ("params moved", "parameters_moved", 3), ("outputs", "outputs_moved", 3)]
# fmt: on


def print_table(title, heads, lines):
    """Each column as wide as it must be; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *lines)]
    print(f"\n{title}")
    for first, *others in [heads, *lines]:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]))


def print_scores(variant, leak, rows):
    """FTN Tables 1, 2 and 3: rows {method: a summary for each seed}."""
    score, reg = VARIANTS[variant]["score"], variant == "reg"
    without = "" if leak == "none" else f", precaution left out: {leak}"
    heads = ["", *(head.format(score) for head, _, _ in COLUMNS), f"paper {score}", "FM"]
    heads += ["FM as printed"] if reg else []
    lines = []
    for method, seeds in rows.items():
        cells = [spread([s.get(key) for s in seeds], digits) for _, key, digits in COLUMNS]
        cells += PUBLISHED[variant].get(method, ("", ""))
        cells += [spread([s["recovered_fm_paper"] for s in seeds])] if reg else []
        lines.append([method, *cells])
    title = f"{VARIANTS[variant]['title']}{without}, seeds: {max(map(len, rows.values()))}"
    print_table(title, heads, lines)


def decomposition(outs):
    """FTN Table 4, of one variant's results: what earlier tasks lost against FixedMask with the same seed, as
    overlap (with the stored mask) and recall (with the recovered one). -> {method: [(overlap, recall)]}"""
    earlier = lambda out, protocol: statistics.mean(out[f"R_{protocol}"][-1][:-1])
    oracle = {o["seed"]: earlier(o, "stored") for o in outs if o["method"].endswith("fixedmask")}
    found = {}
    for o in outs:
        if o["seed"] in oracle and not o["method"].endswith("fixedmask"):
            stored, recovered = earlier(o, "stored"), earlier(o, "recovered")
            sign = VARIANTS[o["variant"]]["sign"]
            losses = sign * (oracle[o["seed"]] - stored), sign * (stored - recovered)
            found.setdefault(o["method"], []).append(losses)
    return found


def print_decomposition(outs, variant):
    losses = decomposition(outs)
    if losses:
        lines = [[m, *map(spread, zip(*losses[m]))] for m in filter(losses.get, KNOWN)]
        print_table(f"loss on earlier tasks against FixedMask, {variant}", ["", "overlap", "recall"], lines)


def print_overlaps(outs):
    """FTN Table 5: |m_i and m_j| / k for every pair of tasks, the mean over seeds of one method."""
    if outs:
        n = outs[0]["tasks"]
        styles = list(StyleStream.STYLES)[:n]
        means = map(statistics.mean, zip(*(o["overlap_last"] for o in outs)))
        shares = dict(zip(itertools.combinations(range(n), 2), means))
        cell = lambda i, j: "." if i == j else f"{shares[min(i, j), max(i, j)]:.2f}"
        lines = [[style, *(cell(i, j) for j in range(n))] for i, style in enumerate(styles)]
        print_table(f"overlap of stored masks, {outs[0]['method']}", ["", *styles], lines)


# -------------------------------------------------------------------------------------- the command line

# Options that one experiment alone has; None where they are not given, and then `Row` or `StyleRow` decides.
OWN = {
    1: ("inputs", "frequency", "generator", "search", "m0", "grow"),
    2: ("backbone", "reconfigure", "b_std"),
}


def parse_options(argv=None):
    p = Parser(__doc__, prog="synthetic.py")
    add = p.add_argument
    add("--experiment", type=int, choices=[1, 2], default=1, help="1: a grid of neurons, 2: LoRA-FTN")
    add("--methods", nargs="+", choices=["all", *KNOWN], metavar="METHOD", help="[all but supsup-wide]")
    add("--seeds", type=number(int, 1, 1000), default=1, help="how many")
    add("--first-seed", type=number(int, 0, 2**31), default=0, help="they are counted from here")
    add("--tasks", type=number(int, 2, 100), help="how many [3; 6]")
    add("--steps", type=number(int, 1, 100_000), help="training steps a task [1000; 200]")
    add("--workers", type=number(int, 1, 256), default=os.cpu_count(), help="rows side by side [the cores]")
    add("--json", type=output_file, help="write everything about every row to this file")
    add = p.add_argument_group("experiment 1").add_argument
    add("--variant", nargs="+", choices=list(HEAD), help="classification, regression [both]")
    add("--inputs", choices=["uniform", "gaussian"], help="the generator, see Row [uniform]")
    add("--frequency", type=number(float, 0.1, 100), help="of the generator [8]")
    add("--generator", type=number(int, 0, 2**31), help="one for all seeds: its own seed [every seed's]")
    add("--search", nargs=2, type=number(float, 1e-3, 1000), metavar=("S", "ETA"), help="of Algorithm 1")
    add("--m0", type=number(float, -100, 100), help="what mask logits start with [0]")
    add("--grow", action="store_const", const=True, help="when too few neurons are free, take a larger grid")
    add(
        "--leaks",
        action="store_const",
        const=True,
        help="FixedMask with each precaution of Appendix C left out",
    )
    add = p.add_argument_group("experiment 2").add_argument
    add("--backbone", help="tiny, a Hub id, a local folder, FILE.gguf [tiny]")
    add("--reconfigure", choices=["once", "every"], help="search the mask once a task, or every step [once]")
    add("--b-std", type=number(float, 0, 1), help="standard deviation that B starts with [0]")
    args = p.parse_args(argv)
    for name in OWN[3 - args.experiment] + (("variant", "leaks") if args.experiment == 2 else ()):
        if getattr(args, name) is not None:
            p.error(f"--{name.replace('_', '-')} is an option of experiment {3 - args.experiment}")
    known = [m for m, (learner, _) in KNOWN.items() if (learner is Adapters) == (args.experiment == 2)]
    table = [m for m in known if m in METHODS]
    if args.methods is None:
        args.methods = ["fixedmask"] if args.leaks else [m for m in table if m != "supsup-wide"]
    args.methods = [name for m in args.methods for name in (table if m == "all" else [m])]
    args.methods = list(dict.fromkeys(args.methods))
    if set(args.methods) - set(known):
        p.error(f"experiment {args.experiment} has the methods {', '.join(known)}")
    if args.experiment == 2 and (args.tasks or 2) > len(StyleStream.STYLES):
        p.error(f"--tasks {args.tasks} is out of range: experiment 2 has {len(StyleStream.STYLES)}")
    if args.search and args.search[0] % 1:
        p.error(f"--search {args.search[0]} is not a number of steps")
    return args


def rows_of(args):
    """The rows that the options ask for, the first line soon, the longest next."""
    given = {name: getattr(args, name) for name in OWN[args.experiment] + ("tasks", "steps")}
    given = {name: value for name, value in given.items() if value is not None}
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    if args.experiment == 2:
        rows = [StyleRow(method=m, seed=s, **given) for s in seeds for m in args.methods]
    else:
        given["search"] = tuple(given.get("search", ()))
        variants, leaks = dict.fromkeys(args.variant or HEAD), LEAKS if args.leaks else LEAKS[:1]
        lines = itertools.product(variants, args.methods, seeds, leaks)
        rows = [Row(variant=v, method=m, seed=s, leak=leak, **given) for v, m, s, leak in lines]
    order = [FixedMask, Supermask, NoMask, EWC, BestAdapter, LockedBank, SearchedMask, LockedMask]
    kinds = lambda row: type(KNOWN[row.method][1]).__mro__  # one that is not listed goes with its parent
    place = lambda row: next(order.index(kind) for kind in kinds(row) if kind in order)
    return sorted(rows, key=lambda row: (row.seed, place(row)))


def table_place(out):
    """What results are sorted by, so that their order does not depend on which was finished first."""
    leak = LEAKS.index(out.get("leak", "none"))
    return out["seed"], list(VARIANTS).index(out["variant"]), list(KNOWN).index(out["method"]), leak


def main(argv=None):
    args = parse_options(argv)
    if rank_and_size()[1] > 1:
        raise Refused("the FTN experiments start their own processes, see --workers: leave out torchrun")
    rows, outs, refused, reasons = rows_of(args), [], [], {}
    try:
        for row, out, message in finished_rows(rows, min(args.workers, len(rows))):
            name = f"{row.variant} {row.method} seed {row.seed}" + (f" {row.leak}" if args.leaks else "")
            if out is None:
                refused.append(f"{name}: {message}")
                reasons.setdefault(message, refused[-1])
                continue
            outs.append(out)
            s = row_summary(out)
            text = f"recovered {s['recovered_last']:.3f}  FM {s['recovered_fm']:+.3f}   "
            text += f"stored {s['stored_last']:.3f}  FM {s['stored_fm']:+.3f}   {out['seconds']:.0f} s"
            tqdm.write(f"{name:<36} {text}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; finished rows are kept, the same command goes on") from None
    outs.sort(key=table_place)
    print_tables(outs)
    if args.json:
        results = [dict(o, summary=row_summary(o)) for o in outs]
        write_results(args.json, "synthetic.py", argv, refused=refused, rows=results)
    if refused:
        raise Refused(f"{len(refused)} of {len(rows)} rows were not computed: {'; '.join(reasons.values())}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # this, too, ends the workers
    run_program(main)
