"""Experiment 1 beyond the paper: other generators and searches, controls, broken precautions, baselines.

    python -m studies.neurons --leaks                      # what each broken precaution costs FixedMask
    python -m studies.neurons --seeds 8 --variant clf --methods ftn-slow-hidden --search 10 0.2 --m0=-4
    python -m studies.neurons --inputs gaussian --methods ftn-slow ftn-slow-lock random-disjoint-recall
    python -m studies.neurons --variant reg --methods ewc-4000 supsup-0.003

Whatever synthetic.py runs, this runs, too.
"""

import dataclasses
import itertools
from typing import ClassVar

import torch

from plumbing.command import number, run_program
from plumbing.rows import choose_methods, given, parser_of, run_rows, seeds_of
from studies import baselines
from studies.baselines import EWC, Supermask, SupSup
from studies.tables import line_of, print_tables
from synthetic import HEAD, METHODS, ConceptShift, FixedMask, LockedMask, Neurons, Row, SearchedMask
from synthetic import generator, recall, run_row

LEAKS = ("none", "decay", "moments", "bias")


@dataclasses.dataclass(frozen=True)
class StudyRow(Row):
    """A line of experiment 1 with what the paper leaves open, or holds fixed, changed."""

    inputs: str = "uniform"  # "gaussian": see `GaussianShift`, the harder generator
    frequency: float = 8.0
    generator: int = -1  # the seed of W, b and v; -1: the row's own
    leak: str = "none"  # one of Appendix C's precautions, left out
    search: tuple = ()  # (S, eta) in place of the variant's own
    m0: float = 0.0  # what a search's mask logits start with
    VERSION: ClassVar[int] = 1

    decay = property(lambda self: 0.01 * (self.leak == "decay"))
    fresh_moments = property(lambda self: self.leak != "moments")
    bias = property(lambda self: self.leak == "bias")

    @property
    def proposal(self):
        """S, eta and m_0 of Algorithm 1."""
        steps, lr = self.search or super().proposal[:2]
        return int(steps), lr, self.m0

    def world(self):
        kind = GaussianShift if self.inputs == "gaussian" else ConceptShift
        return kind(self, self.seed if self.generator < 0 else self.generator, self.frequency)


class GaussianShift(ConceptShift):
    """The same tasks with x ~ N(0, I) and without phases, b = 0."""

    def phases(self, rng):
        return 0 * super().phases(rng)

    def sample(self, n, rng):
        return torch.randn(n, 2, generator=rng)


class Hidden:
    """A search that, in training, does not see the answers of what earlier tasks have trained. They may still
    win, unless a lock forbids it."""

    def mask_for(self, learner, t, *batch):
        loss, seen = learner.loss_of_mask(*batch), torch.ones_like(learner.touched[t])
        for trained in learner.touched[:t]:
            seen &= ~trained
        return self.search(learner, lambda mask: loss(mask * seen))

    def recover(self, learner, t):
        return self.search(learner, learner.loss_of_mask(*learner.world.support[t]))


class HiddenMask(Hidden, SearchedMask):
    """FTN whose search is blind to older neurons."""


class RecalledHiddenMask(HiddenMask):
    """The same; at test time a stored mask is recalled."""

    recover = recall


class LockedHiddenMask(Hidden, LockedMask):
    """The same with the lock, under which older neurons cannot win."""

    recover = recall


class RecalledFixedMask(FixedMask):
    """Disjoint blocks; at test time nobody tells the task, and a stored mask is recalled."""

    recover = recall


class RandomMask(RecalledFixedMask):
    """The same; the blocks lie anywhere, the next k of a random order."""

    def order(self, learner):
        rng = generator(learner.row.seed, "blocks")
        return torch.randperm(len(learner.components.free), generator=rng)


CONTROLS = {
    "fixedmask-recall": (Neurons, RecalledFixedMask()),
    "random-disjoint-recall": (Neurons, RandomMask()),
    "ftn-slow-hidden": (Neurons, HiddenMask(kernel=3, rounds=15)),
    "ftn-slow-hidden-recall": (Neurons, RecalledHiddenMask(kernel=3, rounds=15)),
    "ftn-slow-lock-hidden": (Neurons, LockedHiddenMask(kernel=3, rounds=15)),
}
CONTROLS |= {f"ewc-{x:.0f}": (Neurons, EWC(x)) for x in (40.0, 4e3, 4e4, 4e5, 4e6, 4e7, 4e8, 4e9)}
CONTROLS |= {
    f"supsup{size}{rule}-{lr:g}": (SupSup, Supermask(lr, rule == "-top", size != "", gain))
    for lr, rule in itertools.product((0.0, 3e-4, 3e-3, 3e-2), ("", "-top"))
    for size, gain in (("", 4.0), ("-wide-he", 2.0), ("-wide", 4.0))
}
CONTROLS = {name: how for name, how in CONTROLS.items() if how not in baselines.METHODS.values()}
KNOWN = METHODS | baselines.METHODS | CONTROLS


def print_tables_by_leak(outs):
    """Print the tables of every precaution that was left out, and before them those of none."""
    for leak in LEAKS:
        note = "" if leak == "none" else f", precaution left out: {leak}"
        print_tables([o for o in outs if o["leak"] == leak], note)


def parse_options(argv=None):
    p = parser_of(__doc__, "neurons.py")
    add = p.add_argument
    add("--variant", nargs="+", choices=list(HEAD), help="classification, regression [both]")
    add("--inputs", choices=["uniform", "gaussian"], help="the generator [uniform]")
    add("--frequency", type=number(float, 0.1, 100), help="of the generator [8]")
    add("--generator", type=number(int, 0, 2**31), help="one for all seeds: its own seed [every seed's]")
    add("--search", nargs=2, type=number(float, 1e-3, 1000), metavar=("S", "ETA"), help="of Algorithm 1")
    add("--m0", type=number(float, -100, 100), help="what mask logits start with [0]")
    add("--grow", action="store_const", const=True, help="when too few neurons are free, take a larger grid")
    text = "leave out each precaution of Appendix C in turn"
    add("--leaks", action="store_true", help=text)
    args = p.parse_args(argv)
    choose_methods(p, args, KNOWN, ["fixedmask"] if args.leaks else [*METHODS])
    if args.search and args.search[0] % 1:
        p.error(f"--search {args.search[0]} is not a number of steps")
    args.search = tuple(args.search) if args.search else None
    return args


def rows_of(args):
    """The rows that the options ask for."""
    more = given(args, "inputs", "frequency", "generator", "search", "m0", "tasks", "steps", "grow")
    variants, leaks = dict.fromkeys(args.variant or HEAD), LEAKS if args.leaks else LEAKS[:1]
    lines = itertools.product(seeds_of(args), variants, args.methods, leaks)
    return [StudyRow(v, m, seed, leak=leak, **more) for seed, v, m, leak in lines]


def main(argv=None):
    args = parse_options(argv)
    command = "-m studies.neurons", argv
    run_rows(run_row, rows_of(args), KNOWN, args, command, line_of, print_tables_by_leak)


if __name__ == "__main__":
    run_program(main)
