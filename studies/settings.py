"""What FTN's settings are worth: T, s, k and the dropout of experiment 1, and the order of its tasks.

    python -m studies.settings                             # classification, one seed
    python -m studies.settings --seeds 4 --first-seed 200 --methods paper T-5 s-9

Every row is FTN-Slow with one thing changed, `paper` with none: T-5 smooths in 5 rounds of a 3 x 3 kernel in
place of 15, s-9 has a 9 x 9 kernel, k-64 has 64 winners in place of 128, dropout-0 has no dropout, and
order-1-2-0 learns the second task first and the first last.
"""

import dataclasses
import itertools
from typing import ClassVar

from plumbing.command import run_program
from plumbing.rows import choose_methods, given, parser_of, run_rows, seeds_of
from studies.neurons import StudyRow
from studies.tables import line_of, print_tables
from synthetic import ConceptShift, Neurons, SearchedMask, run_row

OF_MASK = {"T-5": {"rounds": 5}, "s-9": {"kernel": 9}}
OF_ROW = {
    "paper": {},
    "k-64": {"k": 64},
    "k-256": {"k": 256},
    "dropout-0": {"dropout": 0.0},
    "order-1-2-0": {"order": (1, 2, 0)},
}
METHODS = {name: (Neurons, SearchedMask(**OF_MASK.get(name, {}))) for name in [*OF_ROW, *OF_MASK]}


@dataclasses.dataclass(frozen=True)
class SettingsRow(StudyRow):
    """A line of the study: FTN-Slow with one setting changed, and a seed."""

    order: tuple = (0, 1, 2)  # of the tasks
    VERSION: ClassVar[int] = 1

    def world(self):
        return Reordered(self, self.seed)


class Reordered(ConceptShift):
    """The same tasks, learned in the row's order."""

    def signal(self, t, x):
        return super().signal(self.row.order[t], x)


def parse_options(argv=None):
    p = parser_of(__doc__, "settings.py")
    args = p.parse_args(argv)
    choose_methods(p, args, METHODS, [*METHODS])
    if args.tasks not in (None, 3):
        p.error(f"--tasks {args.tasks}: the orders are of three tasks")
    return args


def main(argv=None):
    args = parse_options(argv)
    lines = itertools.product(seeds_of(args), args.methods)
    rows = [SettingsRow("clf", m, seed, **OF_ROW.get(m, {}), **given(args, "steps")) for seed, m in lines]
    run_rows(run_row, rows, METHODS, args, ("-m studies.settings", argv), line_of, print_tables)


if __name__ == "__main__":
    run_program(main)
