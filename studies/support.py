"""How few labels does a mask need at test time? Support batches of 1 to 256 examples, or 1 to 16 sentences.

    python -m studies.support                        # experiment 1: both variants, all methods, one seed
    python -m studies.support --seeds 8 --methods ftn-slow ftn-slow-lock
    python -m studies.support --variant style        # experiment 2, LoRA-FTN

Every method learns its stream once, as in synthetic.py. Only then is the size of the support batch varied
from which each task's mask is recovered: a few labelled examples of the task, drawn anew `draws` times, never
seen in training nor scored on. A mask is recovered in one or two ways:

    search     Algorithm 1 from a cold start, as FTN does without a lock
    recall     the stored mask with the lowest loss on the support batch; asked of every method, since each
               has stored masks

Reported are the score on the test set with the recovered mask, the share of recoveries that found the task
(no other task's stored mask shares more with the recovered mask), and what it shares with the task's own.
"""

import dataclasses
import itertools
import math
import statistics
import time
from typing import ClassVar

import torch

from plumbing.command import run_program
from plumbing.rows import choose_methods, given, parser_of, run_rows, seeds_of
from plumbing.tables import print_table, spread
from studies import neurons, styles
from studies.neurons import StudyRow
from studies.styles import StyleRow
from synthetic import HEAD, VARIANTS, generator, learn_stream, overlaps, recall

SIZES = 1, 2, 4, 8, 16, 64, 256
MEASURES = {"score": "", "found": ", share of tasks found", "shared": ", share of the own mask found"}
NAMES = "ftn-slow", "ftn-slow-hidden", "ftn-slow-lock", "random-disjoint-recall", "supsup-0.003"
METHODS = {name: neurons.KNOWN[name] for name in NAMES}
METHODS |= {name: styles.METHODS[name] for name in ("lora-ftn", "lora-ftn-lock")}
M0 = {"ftn-slow-hidden": -4.0}  # chosen among three in ftn-search-*.json; every other search starts at 0


@dataclasses.dataclass(frozen=True)
class SupportRow(StudyRow):
    """A line of the study: a method on a variant of experiment 1 with a seed."""

    draws: int = 8  # support batches a task and a size
    VERSION: ClassVar[int] = 1
    sizes = SIZES

    def few(self, world, t, n, rng):
        """A support batch of n new examples of task t."""
        return world.batch(t, n, rng)


@dataclasses.dataclass(frozen=True)
class StyleSupportRow(StyleRow):
    """A line of the study: LoRA-FTN with a seed."""

    draws: int = 4
    VERSION: ClassVar[int] = 1
    sizes = SIZES[:5]

    def few(self, world, t, n, rng):
        """n of the sentences that were set aside for support, and how task t rewrites them."""
        chosen = torch.randperm(self.support, generator=rng)[:n]
        return ([world.aside[t][0][i] for i in chosen.tolist()],)


def run_row(row, how):
    """Learn the stream of a row with `how` = (learner, mask), in one thread, then recover every task's mask
    from few labels. -> all about it, for JSON. Raises Refused if a score is not finite."""
    torch.set_num_threads(1)
    torch.manual_seed(row.seed)
    began, (learner_class, mask) = time.perf_counter(), how
    learner = learner_class(row, mask)
    learner.curve_every = math.inf  # score at the ends of tasks alone
    learner.world.aside = [*learner.world.support]
    *_, (_, _, scores) = learn_stream(learner)
    ways = {"recall": lambda t: recall(mask, learner, t)}
    if type(mask).recover is not recall:
        ways["search"] = lambda t: mask.recover(learner, t)
    out = dict(dataclasses.asdict(row), sizes=row.sizes, stored=scores["stored"])
    out["ways"] = {way: measure(learner, recover) for way, recover in ways.items()}
    if torch.is_tensor(learner.stored[0]):
        out.update(overlaps(learner))
    ms_per_step = 1e3 * learner.seconds / (row.tasks * row.steps)
    return dict(out, ms_per_step=ms_per_step, seconds=time.perf_counter() - began)


def measure(learner, recover):
    """{measure: [size][task]}, means over the draws of a support batch. `recover` takes the task."""
    row, found = learner.row, {name: [] for name in MEASURES}
    for size in row.sizes:
        draws = [
            [recovered(learner, recover, t, size, i) for i in range(row.draws)] for t in range(row.tasks)
        ]
        lines = [map(statistics.mean, zip(*each)) for each in draws]
        for name, values in zip(MEASURES, zip(*lines)):
            found[name].append(values)
    return found


def recovered(learner, recover, t, size, draw):
    """One recovery of task t from `size` labels: its score, whether it found the task, what it shares."""
    world, rng = learner.world, generator(learner.row.seed, "labels", t, size, draw)
    world.support[t] = learner.row.few(world, t, size, rng)
    handle = recover(t)
    shares = [shared(handle, stored) for stored in learner.stored]
    return learner.score(handle, *world.test[t]), float(max(shares) == shares[t]), shares[t]


def shared(handle, stored):
    """The share of a recovered mask that a stored one has, too; a supermask is only recalled: all or none."""
    return torch.isin(handle, stored).float().mean().item() if torch.is_tensor(handle) else handle is stored


def line_of(out):
    """What is printed as soon as a row is there: how often the task was found, by size."""
    found = {w: " ".join(f"{statistics.mean(x):.2f}" for x in m["found"]) for w, m in out["ways"].items()}
    return f"{'   '.join(f'{way} {text}' for way, text in found.items())}   {out['seconds']:.0f} s"


def curves(outs, measure):
    """{(method, way): [seed][size]} of one variant's results, means over tasks; and their {(method, way):
    [seed]} with the stored mask."""
    found, stored = {}, {}
    for o in outs:
        for way, measured in o["ways"].items():
            found.setdefault((o["method"], way), []).append([*map(statistics.mean, measured[measure])])
            stored.setdefault((o["method"], way), []).append(statistics.mean(o["stored"]))
    return found, stored


def print_tables(outs):
    """Print a table a variant and measure: a line a method and way, a column a size, mean over seeds."""
    for variant, name in itertools.product(dict.fromkeys(o["variant"] for o in outs), MEASURES):
        group = [o for o in outs if o["variant"] == variant]
        found, stored = curves(group, name)
        lines = [
            [f"{method}, {way}", spread(stored[method, way]), *map(spread, zip(*seeds))]
            for (method, way), seeds in found.items()
        ]
        heads = ["support batch of", f"{VARIANTS[variant]['score']} stored", *map(str, group[0]["sizes"])]
        title = f"{VARIANTS[variant]['title']}{MEASURES[name]}, seeds: {max(map(len, found.values()))}"
        print_table(title, heads, lines)


def draw(rows):
    """A figure: a column a variant, above the score against the size of the support batch, below the share of
    tasks found, dotted what chance finds; a colour for every method, dashed where a mask is recalled though
    the method searches."""
    from matplotlib import pyplot as plt

    variants = list(dict.fromkeys(o["variant"] for o in rows))
    figure, axes = plt.subplots(2, len(variants), figsize=(10, 6.4), squeeze=False, layout="constrained")
    for variant, column in zip(variants, axes.T):
        group = [o for o in rows if o["variant"] == variant]
        sizes = group[0]["sizes"]
        for axis, name in zip(column, MEASURES):
            found, _ = curves(group, name)
            for (method, way), seeds in found.items():
                look = dict(color=f"C{list(METHODS).index(method)}", marker=".", label=f"{method}, {way}")
                look["linestyle"] = "--" if way == "recall" and (method, "search") in found else "-"
                axis.plot(sizes, [*map(statistics.mean, zip(*seeds))], **look)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, map(str, sizes))
        column[0].set_title(VARIANTS[variant]["title"], fontsize=10)
        column[0].set_yscale("linear" if variant == "clf" else "log")
        column[1].axhline(1 / group[0]["tasks"], color="gray", linestyle=":")  # by chance
        column[1].set_ylim(0, 1.03)
    axes[0, 0].set_ylabel("score with the recovered mask", fontsize=9)
    axes[1, 0].set_ylabel("share of tasks found", fontsize=9)
    figure.supxlabel("labelled examples in the support batch", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def parse_options(argv=None):
    p = parser_of(__doc__, "support.py")
    text = "classification, regression, styles of writing [the first two]"
    p.add_argument("--variant", nargs="+", choices=list(VARIANTS), help=text)
    args = p.parse_args(argv)
    choose_methods(p, args, METHODS, [*METHODS])
    if not any(fits(v, m) for v in args.variant or HEAD for m in args.methods):
        p.error(f"--methods: {', '.join(args.methods)} is not of --variant {' '.join(args.variant or HEAD)}")
    return args


def fits(variant, method):
    """Whether the method is one of the experiment that the variant belongs to."""
    return (variant == "style") == (method in styles.METHODS)


def row_of(seed, variant, method, **more):
    """The line of the study that learns a variant."""
    if variant == "style":
        return StyleSupportRow(method, seed, **more)
    return SupportRow(variant, method, seed, m0=M0.get(method, 0.0), **more)


def main(argv=None):
    args = parse_options(argv)
    lines = itertools.product(seeds_of(args), dict.fromkeys(args.variant or HEAD), args.methods)
    rows = [row_of(*line, **given(args, "tasks", "steps")) for line in lines if fits(*line[1:])]
    run_rows(run_row, rows, METHODS, args, ("-m studies.support", argv), line_of, print_tables)


if __name__ == "__main__":
    run_program(main)
