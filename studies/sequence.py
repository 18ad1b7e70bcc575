"""Thirteen tasks of text classification in a row: what is kept, what is passed on, and who answers.

    python -m studies.sequence --backbone FOLDER --data FOLDER --json sequence.json
    python -m studies.sequence --backbone FOLDER --data FOLDER --methods niwf lora-each --orders 4 5 6
    python -m studies.sequence --backbone FOLDER --data FOLDER --summary    # what is finished, as a table
    python -m studies.sequence --backbone FOLDER --data FOLDER --part choose --seed 200 --lr 1e-3

--data holds TASK.train.json, TASK.choose.json and TASK.test.json for every task of an order, with one of a
few labels as "output". The orders are those that O-LoRA (Wang et al. 2023) calls 4, 5 and 6, without the two
tasks that are not there; another is said as names with commas between. Options that this script does not know
go to train.py. Test records that are longer than its --max-len are left out, as training records are.

A row is a run folder under --out, trained by train.py, and a file of what was measured beside it. A command
that was killed goes on from there. Every task is measured when it was learned and after the last task. FWT
compares with the row that learns every task alone with the same adapter. Gatings come from the prompt alone,
as they do when an answer is generated, in the row as printed, too. Where a row keeps every version, who
answers a prompt is decided four times: by the regions, from the prompt and from its input without the
instruction; and beside them by a logistic regression on TF-IDF of the same two texts. What answers then has
the whole prompt, however it was chosen.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import shlex
import statistics
import time

from tqdm import tqdm

from commit import Composition, Run
from eval import open_run
from model import NIWF
from plumbing.command import Parser, number, output_file, run_program, write_results
from plumbing.files import atomic
from plumbing.prompts import pad_of
from plumbing.rows import read_sealed, sealed
from studies.likelier import ROUTER, Tasks, judge, measures, summary, sent_to
from studies.variants import (
    ADDED,
    EXACT,
    LORA,
    NONE,
    OWN,
    PAPER,
    PENALTIES,
    SOFT,
    TWO,
    Variant,
    folder_name,
    parameters,
    patched,
    train_with,
)

ORDERS = {
    "4": "mnli,cb,wic,copa,qqp,boolq,rte,imdb,yelp,amazon,sst2,dbpedia,agnews",
    "5": "boolq,wic,mnli,cb,copa,qqp,rte,imdb,sst2,dbpedia,agnews,yelp,amazon",
    "6": "yelp,amazon,mnli,cb,copa,qqp,rte,imdb,sst2,dbpedia,agnews,boolq,wic",
}
REPLAY = 0.02  # of every earlier task's records


@dataclasses.dataclass(frozen=True)
class Method:
    """variant: how tasks are trained, see studies/variants.py. replay: with some records of earlier tasks.
    alone: the row that has learned every task alone. sums: in place of a training, the weight of each version
    of that row in a sum of all of them; 0: their mean. added: a version adds up all before it, too."""

    about: str
    variant: Variant | None = None
    replay: bool = False
    alone: str = ""
    sums: float | None = None
    added: bool = False

    @property
    def at_once(self):
        """Whether all tasks are learned in one training."""
        return bool(self.variant) and self.variant.second is None

    @property
    def asks_last(self):
        """Whether the last version answers for all: there is one, or it adds up the others."""
        return self.at_once or self.added

    @property
    def routes(self):
        """Whether a prompt's gating depends on who is thought to be asked."""
        return bool(self.variant) and not self.asks_last and self.variant.second != NONE

    def patch(self, first):
        """Name the patch under which a row's first task, or a later one, is trained and asked."""
        return self.variant and (self.variant.patch if first else self.variant.later or self.variant.patch)


PRINTED = Variant(f"{TWO} {PAPER}", SOFT, patch="not standardised")
METHODS = {
    "bare": Method("the backbone, untrained"),
    "niwf": Method("NIWF exact, reads older bases", Variant("", EXACT), alone="niwf-alone"),
    "lora-each": Method("a LoRA a task", Variant(LORA, EXACT, later=OWN)),
    "lora-one": Method("one LoRA, task after task", Variant(LORA, NONE), alone="lora-each"),
    "lora-multi": Method("one LoRA, all tasks at once", Variant(LORA)),
    "niwf-multi": Method("NIWF, all tasks in one version", Variant()),
    "average": Method("mean of a LoRA a task", alone="lora-each", sums=0),
    "arithmetic": Method("0.3 times their sum", alone="lora-each", sums=0.3),
    "niwf-alone": Method("NIWF exact, reads none", Variant("", EXACT, later=OWN)),
    "lora-replay": Method("one LoRA, replay of 2 %", Variant(LORA, NONE), replay=True, alone="lora-each"),
    "niwf-soft": Method("NIWF, soft lock", Variant("", SOFT), alone="niwf-alone"),
    "niwf-printed": Method("NIWF as printed", PRINTED, alone="niwf-alone"),
    **{
        f"o-lora-{x:g}": Method(
            f"O-LoRA, penalty {x:g}",
            Variant(LORA, EXACT, patch=ADDED.format(x)),
            alone="lora-each",
            added=True,
        )
        for x in PENALTIES
    },
}


class Kept:
    """What was measured of a row, by name, in a file that is written anew after every measurement."""

    def __init__(self, path):
        self.path, self.found = path, read_sealed(path) if path.exists() else {}

    def __call__(self, name, measure, *args):
        """Return what measure(*args) returns, or once did."""
        if name not in self.found:
            self.put(name, measure(*args))
        return self.found[name]

    def put(self, name, value):
        """Keep a value."""
        self.found[name] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(self.path) as tmp:
            tmp.write_text(json.dumps(sealed(self.path, self.found)))


class Row:
    """A method on the tasks of an order: trained, and measured."""

    def __init__(self, name, order, tasks, args, rest):
        self.name, self.method, self.order, self.tasks = name, METHODS[name], order, tasks
        self.args, self.rest = args, rest
        how = [order, f"seed {args.seed}", f"{args.examples} examples", *rest]
        folder = pathlib.Path(args.out, folder_name(" ".join(how)))
        self.folder = folder / ("lora-each" if self.method.sums is not None else name)
        self.kept = Kept(folder / f"{name}.{args.part}-{args.val_examples}.json")

    # -------------------------------------------------------------------------------------------- is trained

    def learn(self):
        """Train it, and measure every task as soon as it is learned."""
        variant, method = self.method.variant, self.method
        for i, task in enumerate(["all"] if method.at_once else self.tasks.names if variant else []):
            known, began = Run(self.folder).tasks, time.time()
            options = f"{variant.options} {variant.second if i else ''}"
            try:
                train_with([*self.said(task), *shlex.split(options)], method.patch(first=not i))
            finally:
                if task not in known:
                    spent = self.kept.found.get(f"seconds {task}", 0.0)
                    self.kept.put(f"seconds {task}", round(spent + time.time() - began, 1))
            if not method.at_once and f"learned {task}" not in self.kept.found:
                with self.opened() as (run, model):
                    gating_of = functools.partial(run.stored, len(run.tasks) - 1)
                    self.kept(f"learned {task}", self.judged, task, run, model, gating_of)

    def said(self, task):
        """Write the records of a task, or of all. -> how train.py is told of them"""
        records, held = self.tasks.records(task, REPLAY if self.method.replay else 0)
        paths = [self.folder.with_name(f"{self.folder.name}.{part}.json") for part in ("train", "val")]
        for path, part in zip(paths, (records, held)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as tmp:
                tmp.write_text(json.dumps(part))
        said = ["--task", task, "--backbone", self.args.backbone, "--seed", self.args.seed, *self.rest]
        said += ["--data", paths[0], "--examples", 10**6, "--val-data", paths[1], "--out", self.folder]
        return [str(x) for x in said]

    @contextlib.contextmanager
    def opened(self):
        """Within this block the row can be asked. -> (run, or None if it is the backbone alone; model)"""
        if not self.method.variant and self.method.sums is None:
            model = NIWF(self.tasks.backbone, pad_of(self.tasks.tokenizer))
            yield None, model
            model.detach()
            return
        with patched(self.method.patch(first=False)):
            run, model, _ = open_run(self.folder, self.tasks.options.device, backbone=self.args.backbone)
            yield run, model

    # ------------------------------------------------------------------------------------------- is measured

    def judged(self, task, run, model, gating_of, rows=None):
        """Judge the held-out records of a task, or those with the numbers `rows`."""
        examples, right, _ = self.tasks.held_out[task]
        rows = range(len(examples)) if rows is None else rows
        chosen = [examples[i] for i in rows], [right[i] for i in rows]
        bar = functools.partial(tqdm, desc=f"{self.name} {task}", unit="batch", disable=None, leave=False)
        return judge(model, *chosen, gating_of, run.probe_gating() if run else None, bar)

    def measure(self):
        """Measure every task after the last: given its version, and routed."""
        with self.opened() as (run, model):
            for i, task in enumerate(self.tasks.names):
                self.kept(f"last {task}", self.judged, task, run, model, self.named(run, i))
            if self.method.variant:
                self.kept("parameters", parameters, run)
                self.kept("identical", identical, run)
            if self.method.routes:
                choices = self.kept("choices", sent_to, self.tasks, run, model)
                for task in self.tasks.names:
                    self.kept(f"routed {task}", self.routed, task, run, model, choices[task])
        self.kept.put("finished", True)

    def named(self, run, i):
        """Return the gating of task i when it is given, as a function of h_bar."""
        if not run:
            return lambda h_bar: None
        if self.method.sums is not None:
            weights = [self.method.sums or 1 / len(run.versions)] * len(run.versions)
            return Composition(self.name, [], weights, run.versions).gating
        return functools.partial(run.stored, -1 if self.method.asks_last else i)

    def routed(self, task, run, model, choices):
        """Judge a task's records under the versions to which routers send them. -> {router: as `judge`}"""
        if run.shared:  # one bank answers, whoever is asked, and the coordinate alone decides how
            return {ROUTER: self.judged(task, run, model, lambda h_bar: run.routed(h_bar)[0])}
        home, stored = self.tasks.names.index(task), self.kept.found[f"last {task}"]
        kinds = "likelier", "exact"
        found = {(home, i): pair for i, pair in enumerate(zip(*(stored[kind] for kind in kinds)))}
        for version in sorted({v for sent in choices.values() for v in sent} - {home}):
            rows = sorted({i for sent in choices.values() for i, v in enumerate(sent) if v == version})
            made = self.judged(task, run, model, functools.partial(run.stored, version), rows)
            found |= {(version, i): pair for i, pair in zip(rows, zip(*(made[kind] for kind in kinds)))}
        answers = {router: [found[v, i] for i, v in enumerate(sent)] for router, sent in choices.items()}
        return {router: dict(zip(kinds, map(list, zip(*pairs)))) for router, pairs in answers.items()}

    # ------------------------------------------------------------------------------------------ is described

    def percent(self, when, kind="likelier"):
        """Return the percentage of right answers on every task, [] if some are not measured."""
        cells = [self.kept.found.get(f"{when} {task}") for task in self.tasks.names]
        return [100 * statistics.mean(cell[kind]) for cell in cells] if all(cells) else []

    def in_use(self):
        """Return for every task a text with a character a record: 1 if it is answered right when nobody names
        the task. [] if some are not measured."""
        kept = self.kept.found
        cells = [kept.get(f"routed {t}", {}).get(ROUTER) or kept.get(f"last {t}") for t in self.tasks.names]
        return ["".join(map(str, cell["likelier"])) for cell in cells] if all(cells) else []

    def result(self, alone):
        """Return what is published of the row. alone: the row that FWT compares with, or None."""
        kept, names = self.kept.found, self.tasks.names
        learned, last, exact = self.percent("learned"), self.percent("last"), self.percent("last", "exact")
        out = {"method": self.name, "about": self.method.about, "order": self.order, "tasks": names}
        out |= {"learned": learned, "last": last, "exact": exact, "stored": {}, "routed": {}, "home": {}}
        out["records"] = [len(self.tasks.held_out[task][0]) for task in names]
        out["in use"] = self.in_use()
        if last:
            out["stored"] = measures(learned, last, alone.percent("learned") if alone else None)
            out["stored"]["exact match"] = statistics.mean(exact)
        if learned and last:
            same = [kept[f"learned {task}"]["digest"] == kept[f"last {task}"]["digest"] for task in names]
            out["identical"] = {"tasks": sum(same), "logits": kept["identical"]}
        if f"routed {names[-1]}" in kept:
            cells = {task: kept[f"routed {task}"] for task in names}
            for router in cells[names[0]]:
                right = [100 * statistics.mean(cells[task][router]["likelier"]) for task in names]
                sent = [kept["choices"][task][router] for task in names]
                out["routed"][router] = {"ACC": statistics.mean(right), "right": right}
                counts = [[each.count(v) for v in range(len(names))] for each in sent]
                out["home"][router] = counts  # of every task: how many records went to each version
        out["seconds"] = {
            task: kept[f"seconds {task}"] for task in [*names, "all"] if f"seconds {task}" in kept
        }
        out["parameters"] = kept.get("parameters")
        return out


def identical(run):
    """Return {task: [logits of records on which train.py compares them that had the bits of when the task was
    committed, after every later task; all that were compared]}."""
    rows = run.manifest["results"]
    later = {t: [row["identical"][t] for row in rows[i + 1 :]] for i, t in enumerate(run.tasks)}
    return {t: [sum(pair[k] for pair in pairs) for k in (0, 1)] for t, pairs in later.items()}


def parse_options(argv):
    p = Parser(__doc__, prog="sequence.py", allow_abbrev=False)
    p.add_argument("--backbone", required=True, help="see train.py")
    p.add_argument("--data", required=True, help="folder of TASK.train.json, .choose.json and .test.json")
    p.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS], help="which rows [all]")
    about = "which orders, by name or as tasks with commas between [4]"
    p.add_argument("--orders", nargs="+", default=["4"], metavar="ORDER", help=about)
    p.add_argument("--examples", type=number(int, 1), default=300, help="training records a task")
    p.add_argument("--val-examples", type=number(int, 1), default=100, help="records a task to measure on")
    p.add_argument("--part", choices=["test", "choose"], default="test", help="on which they are measured")
    p.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="of weights and orders of records")
    p.add_argument("--out", help="folder of the run folders [runs/sequence-BACKBONE]")
    p.add_argument("--summary", action="store_true", help="print what is finished and compute nothing")
    p.add_argument("--json", type=output_file, help="write what was measured to this file")
    args, rest = p.parse_known_args(argv)
    args.out = args.out or f"runs/sequence-{pathlib.Path(args.backbone).name}"
    return args, rest


def main(argv=None):
    args, rest = parse_options(argv)
    results = []
    orders = {order: Tasks(ORDERS.get(order, order).split(","), args, rest) for order in args.orders}
    for order, name in itertools.product(orders, args.methods):
        row = functools.partial(Row, order=order, tasks=orders[order], args=args, rest=rest)
        alone = METHODS[name].alone and row(METHODS[name].alone)
        if not args.summary:
            if METHODS[name].sums is not None:
                alone.learn()
            if not row(name).kept.found.get("finished"):
                row(name).learn()
                row(name).measure()
        results.append(row(name).result(alone))
        if not args.summary:
            summary(results)
    if args.summary:
        summary(results)
    write_results(args.json, "-m studies.sequence", argv, indent=1, rows=results)


if __name__ == "__main__":
    run_program(main)
