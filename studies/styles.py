"""LoRA-FTN, the second experiment of FTN: six ways to rewrite a sentence, learned one after another.

    python -m studies.styles                   # the same as python synthetic.py --experiment 2
    python -m studies.styles --methods lora-ftn --reconfigure every --steps 50
    python -m studies.styles --backbone FOLDER --tasks 3 --steps 25

A pool of adapters on one frozen language model takes the place of the grid (section 3, Appendices E and F of
the FTN paper): all tasks have the same sentences, a mask picks k of H adapters, and CE is in nats per token
of a response.
"""

import dataclasses
import itertools
import math
import pathlib
import re
from typing import ClassVar

import torch

from ftn import ALL, LoRAPool, commit_mask
from model import attach, response_logits, response_nll
from plumbing import Refused
from plumbing.backbone import TINY_FOLDER, load_backbone
from plumbing.targets import find_targets, in_out
from plumbing.command import number, run_program
from plumbing.prompts import pad_of
from plumbing.rows import choose_methods, given, parser_of, run_rows, seeds_of
from studies.tables import line_of, print_tables
from synthetic import FixedMask, Learner, LockedMask, Mask, NoMask, SearchedMask, generator
from synthetic import recall, run_row

SENTENCES = pathlib.Path(__file__).parent.parent / "assets" / "data" / "sentences.txt"
BANK_STD = 1e-3  # of B in LoRA-Bank: near zero, to tell the components apart


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
    VERSION: ClassVar[int] = 1  # see plumbing/rows.py
    proposal = 15, 0.5, 0.0  # S, eta and m_0 of Algorithm 1

    @property
    def files(self):
        """The files that the row's numbers depend on: the sentences, and the backbone's."""
        backbone = pathlib.Path(TINY_FOLDER if self.backbone == "tiny" else self.backbone)
        return [p for p in sorted([SENTENCES, backbone, *backbone.glob("*")]) if p.is_file()]


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


class BestAdapter(Mask):
    """LoRA-Bank: the one adapter with the lowest loss on the batch. One that another task has trained can be
    that, and is then trained on."""

    place = 4

    def losses(self, learner, *batch):
        """Of every adapter, infinite where it is committed."""
        found = [learner.mean_loss(torch.tensor([i]), *batch) for i in range(len(learner.components.free))]
        return torch.tensor(found).masked_fill(~learner.components.free, math.inf)

    def mask_for(self, learner, t, *batch):
        return self.losses(learner, *batch).argmin()[None]


class LockedBank(BestAdapter):
    """LoRA-Bank with the lock: a finished task's adapter is offered to no other, and later recalled."""

    place, recover = 5, recall

    def end(self, learner, t, *batch):
        commit_mask(learner.components, learner.stored[t])


class Adapters(Learner):
    """LoRA-FTN and what it is compared with, on a frozen language model. Handles are masks, too."""

    TARGETS = ("q_proj", "k_proj", "v_proj", "c_attn")  # the attention's inputs; GPT-2 has all three in one
    curve_every = math.inf  # a curve has the ends of tasks alone

    def __init__(self, row, mask):
        self.backbone, tokenizer = load_backbone(row.backbone, "cpu")
        self.backbone.requires_grad_(False).eval()
        self.pad_id = pad_of(tokenizer)
        world, targets = StyleStream(row, tokenizer), find_targets(self.backbone, self.TARGETS)
        size = row.side**2, row.rank, row.b_std
        if isinstance(mask, BestAdapter):  # as many parameters in H/k adapters
            size = row.side**2 // row.k, row.rank * row.k, BANK_STD
        shapes = {name: in_out(module) for name, module in targets.items()}
        super().__init__(row, mask, world, LoRAPool(shapes, *size))
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

    def describe(self):
        """The masks; and of a bank what each adapter lost when one was chosen, None where it is committed."""
        if not isinstance(self.mask, BestAdapter):
            return super().describe()
        offered = [[x if math.isfinite(x) else None for x in losses] for losses in self.offered]
        return dict(chosen=[int(handle) for handle in self.stored], offered=offered)


METHODS = {
    "lora-fixedmask": (Adapters, FixedMask()),
    "lora-ftn": (Adapters, SearchedMask(kernel=3, rounds=15)),
    "lora-ftn-lock": (Adapters, LockedMask(kernel=3, rounds=15)),
    "lora-naive": (Adapters, NoMask()),
    "lora-bank": (Adapters, BestAdapter()),
    "lora-bank-lock": (Adapters, LockedBank()),
}


def parse_options(argv=None):
    p = parser_of(__doc__, "styles.py")
    add = p.add_argument
    add("--backbone", help="tiny, a Hub id, a local folder, FILE.gguf [tiny]")
    add("--reconfigure", choices=["once", "every"], help="search the mask once a task, or every step [once]")
    add("--b-std", type=number(float, 0, 1), help="standard deviation that B starts with [0]")
    args = p.parse_args(argv)
    choose_methods(p, args, METHODS, [*METHODS])
    if (args.tasks or 2) > len(StyleStream.STYLES):
        p.error(f"--tasks {args.tasks} is out of range: there are {len(StyleStream.STYLES)} styles")
    return args


def main(argv=None, program="-m studies.styles"):
    args = parse_options(argv)
    more = given(args, "backbone", "reconfigure", "b_std", "tasks", "steps")
    rows = [StyleRow(method=m, seed=s, **more) for s, m in itertools.product(seeds_of(args), args.methods)]
    run_rows(run_row, rows, METHODS, args, (program, argv), line_of, print_tables)


if __name__ == "__main__":
    run_program(main)
