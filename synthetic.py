"""FTN's first experiment: three tasks, one after another, in one grid of neurons. What is forgotten?

    python synthetic.py                        # both variants, the paper's methods and the lock
    python synthetic.py --methods all          # and supsup-wide, the slowest
    python synthetic.py --seeds 8              # mean ± deviation over seeds, as in the paper
    python synthetic.py --tasks 12 --methods ftn-slow ftn-slow-lock --grow     # beyond the capacity H/k = 8
    python synthetic.py --experiment 2         # LoRA-FTN: six style tasks on one frozen language model

The tasks are a *concept shift*: they share their inputs and differ in their targets, so only a labelled batch
tells which task it is. Every method sees the same batches. After each task all so far are scored twice:

    stored      with the mask of the task's last training batch
    recovered   with a mask found from a support batch of the task: FTN searches from a cold start, methods
                that recall take the stored mask with the lowest loss on it, FixedMask is told the task

R[i][j] is the score on task j after task i. ACC and MSE are means of the last row. FM is what was lost since
the best score, never negative. This file covers section 3 and Appendix C of the FTN paper. Departures: the
paper only outlines its generator (2 inputs, 24 latents, 8 of them a task, frequency 8), which `ConceptShift`
fills in; the methods with a lock are ours. EWC and SupSup stand in `studies/baselines.py`, Appendix B's
decomposition in `studies/tables.py`, experiment 2 in `studies/styles.py`.
"""

import dataclasses
import hashlib
import itertools
import math
import statistics
import time
from typing import ClassVar

from plumbing import Refused  # first: it sets what torch reads when it is imported
from plumbing.command import Parser, run_program
from plumbing.rows import choose_methods, given, parser_of, run_rows, seeds_of
from ftn import ALL, FastGrid, GridFull, SmoothKWTA, commit_mask, grow

import torch
import torch.nn.functional as F

TEST = 2048  # examples of a task's test set
# fmt: off
VARIANTS = {"clf": dict(score="ACC", sign=1, title="classification (accuracy)"),
            "reg": dict(score="MSE", sign=-1, title="regression (squared error)"),
            "style": dict(score="CE", sign=-1, title="style tasks (nats per token)")}
HEAD = {"clf": dict(loss=F.cross_entropy, d_out=2, proposal=(1, 1.0, 0.0)),  # S, eta and m_0 of Algorithm 1
        "reg": dict(loss=F.mse_loss, d_out=1, proposal=(10, 0.2, 0.0))}
# fmt: on


# ------------------------------------------------------------------------------------------- one stream


def learn_stream(learner):
    """Learn a stream of tasks. Yield, after some steps and at each task's end, (t, step, scores so far)."""
    row = learner.row
    for t in range(row.tasks):  # the same inputs, other targets
        rng = generator(row.seed, "train", t)
        learner.begin(t)  # Adam starts anew: old moments would move old neurons
        for step in range(1, row.steps + 1):
            batch = learner.world.batch(t, row.batch, rng)
            learner.timed_train(t, *batch)  # find the batch's mask, then one step on its k neurons
            if step == row.steps:
                learner.end(t, *batch)  # with a lock: the winners become read-only
            if step == row.steps or step % learner.curve_every == 0:
                yield t, step, score_tasks(learner)


def score_tasks(learner):
    """Score all tasks so far on their test sets under both protocols: {"stored": [...], "recovered": [...]}.
    Raises Refused if a score is not finite."""
    stored, recovered = [], []
    for j, handle in enumerate(learner.stored):
        found = learner.mask.recover(learner, j)
        stored.append(learner.score(handle, *learner.world.test[j]))
        recovered.append(stored[j] if found is handle else learner.score(found, *learner.world.test[j]))
    if not all(map(math.isfinite, stored + recovered)):
        raise Refused(f"the loss is not finite in task {len(stored)}")
    return dict(stored=stored, recovered=recovered)


def forgetting_measure(R, sign):
    """FM: mean over earlier tasks of what was lost since the best score. sign: +1 where a higher score is
    better, -1 for a loss."""
    columns = [[r[j] for r in R[j:]] for j in range(len(R) - 1)]
    return statistics.mean(max(sign * s for s in column) - sign * column[-1] for column in columns)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of experiment 1: a method on a variant with a seed. The values are the paper's."""

    variant: str
    method: str
    seed: int
    tasks: int = 3
    steps: int = 1000  # training steps a task
    grow: bool = False  # enlarge the grid when too few neurons are free
    batch: int = 256
    side: int = 32  # D, H = D^2
    k: int = 128
    layers: int = 8
    width: int = 8
    dropout: float = 0.2
    lr: float = 3e-4
    VERSION: ClassVar[int] = 1  # raise it when the code of a row gives other numbers: see plumbing/rows.py
    decay, fresh_moments, bias = 0.0, True, False  # the precautions of Appendix C
    files = ()  # the files on disk that its numbers depend on

    @property
    def proposal(self):
        """Return S, eta and m_0 of Algorithm 1."""
        return HEAD[self.variant]["proposal"]

    def world(self):
        """Make the tasks."""
        return ConceptShift(self, self.seed)


# -------------------------------------------------------------------------------------------- the tasks


def generator(*key):
    """Return a random generator for one purpose: key is (seed, purpose, ...)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class ConceptShift:
    """Tasks on x in R^2: h = W x + b in R^(8 tasks), y_t = sum over its own eight i of v_i sin(f h_i).

    W_ij ~ N(0, 0.5^2), b ~ U(-pi, pi), |v| = 1, x ~ U(-1, 1)^2, and the frequency f is 8. In classification
    the target is whether y_t is above its median, in regression it is 0.75 (y_t - mean). seed: of W, b and v.
    """

    def __init__(self, row, seed, frequency=8.0):
        rng, self.row, self.frequency, tasks = generator(seed, 0), row, frequency, range(row.tasks)
        self.W = 0.5 * torch.randn(8 * row.tasks, 2, generator=rng)
        self.b = self.phases(rng)
        self.v = F.normalize(torch.randn(row.tasks, 8, generator=rng), dim=1)
        samples = [self.signal(t, self.sample(2**16, rng)) for t in tasks]
        self.centre = [y.median() if row.variant == "clf" else y.mean() for y in samples]
        self.support = [self.batch(t, row.batch, generator(row.seed, "support", t)) for t in tasks]
        self.test = [self.batch(t, TEST, generator(row.seed, "test", t)) for t in tasks]

    def phases(self, rng):
        return (torch.rand(8 * self.row.tasks, 1, generator=rng) * 2 - 1) * torch.pi

    def sample(self, n, rng):
        return torch.rand(n, 2, generator=rng) * 2 - 1

    def signal(self, t, x):
        own = slice(8 * t, 8 * t + 8)
        return torch.sin(self.frequency * (self.W[own] @ x.T + self.b[own])).T @ self.v[t]

    def batch(self, t, n, rng):
        """Draw n examples of task t: x [n, 2], and y, classes [n] or values [n, 1]."""
        x = self.sample(n, rng)
        y = self.signal(t, x) - self.centre[t]
        return x, (y > 0).long() if self.row.variant == "clf" else 0.75 * y[:, None]


# ------------------------------------------------------------------------- how a method chooses its mask


def recall(mask, learner, t):
    """Return the stored mask with the lowest loss on task t's support batch; of equals the first."""
    return min(learner.stored, key=lambda handle: learner.mean_loss(handle, *learner.world.support[t]))


@dataclasses.dataclass(frozen=True)
class Mask:
    """A way to choose a mask: `mask_for` a batch of task t gives indices of neurons or adapters, or ALL."""

    place = 9  # a seed's rows run in ascending order: the oracle first, then the slow methods, FTN last

    def recover(self, learner, t):
        """Find the mask for task t's support batch, at test time."""
        return self.mask_for(learner, t, *learner.world.support[t])

    def penalize(self, learner):
        """Add to the gradients what the method adds to the loss."""

    def end(self, learner, t, *batch):
        """Close task t; `batch` was its last."""


class NoMask(Mask):
    """Every neuron or adapter, always: naive fine-tuning."""

    place = 2

    def mask_for(self, learner, t, *batch):
        return ALL


class FixedMask(Mask):
    """Disjoint blocks, one a task: the oracle of Theorem 2.1, which alone is told the task at test time."""

    place = 0

    def mask_for(self, learner, t, *batch):
        k, order = learner.row.k, self.order(learner)
        if (t + 1) * k > len(order):
            raise Refused(f"{len(order)} neurons hold {len(order) // k} fixed masks of {k}, not {t + 1}")
        return order[t * k : (t + 1) * k].sort().values

    def order(self, learner):
        return torch.arange(len(learner.components.free))

    def recover(self, learner, t):
        return learner.stored[t]


@dataclasses.dataclass(frozen=True)
class SearchedMask(Mask):
    """FTN: Algorithm 1, in training and at test time."""

    kernel: int = 3
    rounds: int = 15
    place = 6

    def search(self, learner, loss):
        free = learner.components.free
        algorithm = SmoothKWTA(learner.row.k, self.kernel, self.rounds, *learner.row.proposal)
        try:
            return algorithm.configure(loss, math.isqrt(len(free)), free)
        except GridFull as e:
            raise Refused(f"{e} (--grow enlarges the grid and keeps every committed mask)") from None

    def mask_for(self, learner, t, *batch):
        return self.search(learner, learner.loss_of_mask(*batch))


class LockedMask(SearchedMask):
    """FTN with the lock: a finished task's mask is committed, and at test time it is recalled."""

    place, recover = 7, recall

    def end(self, learner, t, *batch):
        commit_mask(learner.components, learner.stored[t])


class Learner:
    """A method on a stream of tasks. `stored[t]` is its *handle* on task t: the mask with which it answers.

    begin(t), train(t, *batch), end(t, *batch)   learn task t, batch after batch
    outputs(handle, *batch)                      answer a batch with a handle: y_hat [batch, d_out]
    score, mean_loss(handle, *batch)             accuracy, in regression the loss; the loss
    parameters(t)                                a copy of task t's own weights, without a shared bias
    """

    curve_every = 100  # steps between two points of a curve

    def __init__(self, row, mask, world, components):
        self.row, self.mask, self.world, self.components = row, mask, world, components
        self.stored, self.touched = [], []  # touched: every neuron or adapter that a task has trained
        self.seconds = 0.0

    def begin(self, t):
        self.stored.append(None)
        self.touched.append(torch.zeros(len(self.components.free), dtype=torch.bool))

    def timed_train(self, *batch):
        started = time.perf_counter()
        self.train(*batch)
        self.seconds += time.perf_counter() - started

    def end(self, t, *batch):
        self.mask.end(self, t, *batch)

    def describe(self):
        """Return what a row of results says besides its scores: the masks, where there are any."""
        masks = torch.is_tensor(self.stored[0]) and len(self.stored[0]) == self.row.k
        return overlaps(self) if masks else {}


class Neurons(Learner):
    """FTN on a grid, and what it is compared with there. A handle is a mask: its winners [k], or ALL."""

    def __init__(self, row, mask, width=1):
        self.loss, self.fisher, self.optimizer = HEAD[row.variant]["loss"], [], None
        size = dict(layers=row.layers, width=width * row.width, bias=row.bias)
        super().__init__(row, mask, row.world(), FastGrid(row.side, 2, HEAD[row.variant]["d_out"], **size))

    @property
    def grid(self):
        return self.components

    def begin(self, t):
        if self.row.grow and self.grid.free.sum() < self.row.k:
            self.components, index = grow(self.grid, round(self.grid.side * 1.5))
            self.stored = [index[winners] for winners in self.stored]
            none = torch.zeros(len(self.grid.free), dtype=torch.bool)
            self.touched = [none.index_put((index,), touched) for touched in self.touched]
            self.optimizer = None  # it holds the weights of the old grid
        if self.optimizer is None or self.row.fresh_moments:
            settings = dict(lr=self.row.lr, weight_decay=self.row.decay, fused=True)
            self.optimizer = torch.optim.AdamW(self.grid.parameters(), **settings)
        super().begin(t)

    def loss_of_mask(self, x, y):
        return self.grid.loss_of_mask(x, y, self.loss)

    def train(self, t, x, y):
        winners = self.stored[t] = self.mask.mask_for(self, t, x, y)
        self.touched[t][winners] = True
        self.optimizer.zero_grad()
        self.loss(self.grid.forward_winners(x, winners, self.row.dropout), y).backward()
        self.mask.penalize(self)
        self.optimizer.step()  # of all neurons: those that left the mask coast on until their moments decay

    def select(self, winners):
        return [self.grid.theta.detach()[winners], self.grid.readout.detach()[:, winners]]

    @torch.no_grad()
    def outputs(self, handle, x, y=None):
        weights = self.select(handle)
        return torch.cat([self.grid.run_neurons(*weights, part) for part in x.split(256)])

    def mean_loss(self, handle, x, y):
        return self.loss(self.outputs(handle, x), y).item()

    def score(self, handle, x, y):
        if self.row.variant == "clf":
            return (self.outputs(handle, x).argmax(1) == y).float().mean().item()
        return self.mean_loss(handle, x, y)

    def parameters(self, t):
        return [p.clone() for p in self.select(self.stored[t])]


METHODS = {
    "fixedmask": (Neurons, FixedMask()),
    "ftn-slow": (Neurons, SearchedMask(kernel=3, rounds=15)),
    "ftn-slow-lock": (Neurons, LockedMask(kernel=3, rounds=15)),
    "ftn-fast": (Neurons, SearchedMask(kernel=17, rounds=2)),
    "kwta": (Neurons, SearchedMask(kernel=1, rounds=0)),
    "nomask": (Neurons, NoMask()),
}


def run_row(row, how):
    """Learn the stream of a row with `how` = (learner, mask), in one thread. -> all about it, for JSON.
    Raises Refused if the grid is full, the backbone cannot be had, or a score is not finite."""
    # This comes first: after a fork, two threads that need PyTorch's pool at once may fail.
    torch.set_num_threads(1)
    torch.manual_seed(row.seed)
    began, kept, curve, R = time.perf_counter(), [], [], {"R_stored": [], "R_recovered": []}
    learner_class, mask = how
    learner = learner_class(row, mask)
    for t, step, scores in learn_stream(learner):
        curve.append(dict(step=t * row.steps + step, **scores))
        if step == row.steps:
            kept.append(answers(learner, t))
            for protocol in scores:
                R[f"R_{protocol}"].append(scores[protocol])
    moved = [bits_moved(before, answers(learner, t)) for t, before in enumerate(kept)]
    out = dict(dataclasses.asdict(row), **R, curve=curve)
    out.update(parameters_moved=[share for share, _ in moved], outputs_moved=[share for _, share in moved])
    ms_per_step = 1e3 * learner.seconds / (row.tasks * row.steps)
    out.update(learner.describe(), ms_per_step=ms_per_step, seconds=time.perf_counter() - began)
    return dict(out, summary=row_summary(out))


def answers(learner, t):
    """Return the parameters that task t's answers are computed from, and its outputs on its test set."""
    return learner.parameters(t), [learner.outputs(learner.stored[t], *learner.world.test[t])]


def bits_moved(before, after):
    """Return the shares of parameters and of outputs that are not the same to the last bit."""
    share = lambda a, b: sum((x != y).sum().item() for x, y in zip(a, b)) / sum(x.numel() for x in a)
    return [share(a, b) for a, b in zip(before, after)]


def overlaps(learner):
    """Return the masks, and for every pair of tasks what they have in common, in units of k."""
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


def row_summary(out):
    """Return a table's line from what `run_row` returned: means over tasks, or over pairs of tasks."""
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


# -------------------------------------------------------------------------------------- the command line


def known_methods():
    """Return {name: (learner, mask)}: FTN's, and what the paper compares them with."""
    from studies import baselines

    return METHODS | baselines.METHODS


def parse_options(argv=None):
    p = parser_of(__doc__, "synthetic.py")
    p.add_argument("--experiment", choices=["1", "2"], help="2: LoRA-FTN, see python -m studies.styles [1]")
    p.add_argument("--variant", nargs="+", choices=list(HEAD), help="classification, regression [both]")
    text = "when too few neurons are free, take a larger grid"
    p.add_argument("--grow", action="store_const", const=True, help=text)
    args = p.parse_args(argv)
    known = known_methods()
    choose_methods(p, args, known, [m for m in known if m != "supsup-wide"])
    return args


def main(argv=None):
    from studies import styles, tables

    which = Parser(__doc__, prog="synthetic.py", add_help=False)
    which.add_argument("--experiment")
    known, others = which.parse_known_args(argv)
    if known.experiment == "2":
        return styles.main(others, "synthetic.py --experiment 2")
    args = parse_options(argv)
    lines = itertools.product(seeds_of(args), dict.fromkeys(args.variant or HEAD), args.methods)
    rows = [Row(v, m, seed, **given(args, "tasks", "steps", "grow")) for seed, v, m in lines]
    shown = tables.line_of, tables.print_tables
    run_rows(run_row, rows, known_methods(), args, ("synthetic.py", argv), *shown)


if __name__ == "__main__":
    run_program(main)
