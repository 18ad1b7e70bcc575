"""Versions found, and composed, on a few labelled records, where inputs alone do not say what is wanted.

    python -m studies.found styles              # six ways to rewrite the same sentences: which is meant?
    python -m studies.found kinds               # kinds of instruction that no version has learned
    python -m studies.found tasks --backbone FOLDER --data FOLDER --run runs/.../lora-each   # real tasks
    python -m studies.found styles --backbone FOLDER --seeds 1 --epochs 2 --lr 5e-4

styles: each way is a version. A prompt is routed by its region, or the version with the lowest loss on 1, 4
or 16 records is taken, over many draws. Records are drawn from sentences that nobody was trained on, and
perplexity is measured on others.

kinds: of the 76 kinds some are learned, a version each, and others are held out. Those are asked with the
bare backbone, the nearest region, the best single version on 16 or 64 records, a composition found on the
same records, and a LoRA trained on them.

tasks: the same of real tasks of classification. --run is a row of studies.sequence in which no version reads
another, so that one can be left out as if it had not been learned. A composition is found on 16 records
alone: every step of its search runs all versions.
"""

import argparse
import functools

import pathlib
import random
import statistics

from commit import Composition, weigh
from eval import open_run, perplexity_under, probe_all
from plumbing import Refused
from plumbing.command import Parser, number, output_file, run_program, write_results
from plumbing.prompts import encode
from plumbing.tables import print_table
from studies.likelier import FEW, Tasks, few_lines, judge
from studies.sequence import Kept
from studies.stream import kinds_in_turn, learn
from studies.styles import SENTENCES, StyleStream
from studies.variants import LORA

STYLE, KIND = "--epochs 8 --batch 8 --grad-accum 1", "--epochs 8"  # how a version is trained
DRAWN, DRAWS = (1, 4, 16), 50  # records that a version is found from; draws of each number
HELD_OUT = ["copa", "rte", "sst2", "agnews"]  # real tasks that are left out in turn


def how(args, more):
    """Return options of train.py: where a version is trained, `more`, and what the command line adds."""
    return ["--device", "cpu", "--backbone", args.backbone, *more.split(), *args.options]


def learn_lora(args, seed, task, few, held, batch):
    """Learn a LoRA on a few records, in --lora-steps steps on `batch` of them. -> its run folder"""
    where = args.out / f"lora-{seed}" / f"{task}-{len(few)}-{args.lora_steps}"
    epochs = args.lora_steps * batch // len(few)
    return learn(where, task, few, held, *how(args, f"{LORA} --seed {seed} --epochs {epochs}"))


def asked(model, run, tokenizer, records):
    """Return the examples of records and their h_bar, as every function here takes them."""
    examples = [encode(record, tokenizer, run.template, run.day) for record in records]
    return examples, probe_all(model, examples, "prompt")


def stored_gatings(run):
    """Return {task: its gating of h_bar}, the bare backbone's first."""
    stored = {v.task: functools.partial(run.stored, i) for i, v in enumerate(run.versions)}
    return {"bare": lambda h: None, **stored}


def from_few(model, run, examples, h_bar):
    """Return {who: its gating of h_bar}: the bare backbone, the nearest region, and what a few labelled
    examples of a task find among a run's versions; and {how many examples: {task: its weight}} of the
    compositions."""
    single, weights = stored_gatings(run), {}
    losses = model.nll_under(examples, h_bar, [*single.values()])
    found = {"bare": single["bare"], "nearest region": lambda h: run.routed(h)[0]}
    for n in FEW:
        found[f"best single, {n}"] = single[[*single][int(losses[:, :n].sum(1).argmin())]]
        hashes, shares = weigh(model, run.versions, examples[:n])
        parts = [next(v for v in run.versions if v.hash == h) for h in hashes]
        found[f"composition, {n}"] = Composition("", hashes, shares, parts).gating
        weights[str(n)] = {v.task: share for v, share in zip(parts, shares)}
    return found, weights


# --------------------------------------------------------------------------------------- six ways to rewrite


def styles(args, seed):
    """Learn the six styles on the same sentences. Yield a row for each."""
    sentences = SENTENCES.read_text().splitlines()
    random.Random(seed).shuffle(sentences)
    rewrite = lambda style, some: [{"instruction": s, "input": "", "output": style(s)} for s in some]
    for task, style in StyleStream.STYLES.items():
        data = rewrite(style, sentences[:72]), rewrite(style, sentences[96:])
        learn(args.out / f"styles-{seed}", task, *data, *how(args, f"{STYLE} --lock --seed {seed}"))
    run, model, tokenizer = open_run(args.out / f"styles-{seed}", "cpu")
    for i, (task, style) in enumerate(StyleStream.STYLES.items()):
        gatings = stored_gatings(run)
        examples, h_bar = asked(model, run, tokenizer, rewrite(style, sentences[72:96]))
        losses = model.nll_under(examples, h_bar, [*gatings.values()])  # [bare and versions, 24]
        row = {"seed": seed, "task": task}
        for n in DRAWN:
            draws = [random.Random(f"{seed} {task} {n} {d}").sample(range(24), n) for d in range(DRAWS)]
            chosen = [int(losses[:, draw].sum(1).argmin()) for draw in draws]
            row[f"found from {n}"] = chosen.count(i + 1) / DRAWS
        examples, h_bar = asked(model, run, tokenizer, rewrite(style, sentences[96:]))
        row["routed home"] = float((run.routed(h_bar)[1].choice == i).double().mean())
        known = {"bare": gatings["bare"], "routed": lambda h: run.routed(h)[0], "stored": gatings[task]}
        yield row | perplexity_under(model, examples, h_bar, known)


def styles_table(rows):
    """Print the mean over seeds for each style: perplexities, and how often the right version answers."""
    names, shares = ["bare", "routed", "stored"], ["routed home", *(f"found from {n}" for n in DRAWN)]
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        means = [statistics.mean(row[key] for row in rows if row["task"] == task) for key in names + shares]
        lines.append([task, *(f"{x:.2f}" for x in means[:3]), *(f"{100 * x:.1f}" for x in means[3:])])
    print_table("perplexity, and the share of right choices in percent", ["", *names, *shares], lines)


# ----------------------------------------------------------------------------------------- kinds not learned


def kinds(args, seed):
    """Learn some kinds of instruction. Yield a row for each of some others."""
    found = {kind: [*records.values()] for kind, records in kinds_in_turn().items()}
    order = random.Random(seed).sample(sorted(found), args.learned + args.held)
    for kind in order[args.held :]:
        more = how(args, f"{KIND} --lock --seed {seed}")
        learn(args.out / f"kinds-{seed}", kind, *found[kind], *more)
    run, model, tokenizer = open_run(args.out / f"kinds-{seed}", "cpu")
    for kind in order[: args.held]:
        records = sum(found[kind], [])
        random.Random(f"{seed} {kind}").shuffle(records)
        few, test = records[:64], records[64:]
        known, composed = from_few(model, run, *asked(model, run, tokenizer, few))
        row = {"seed": seed, "task": kind, "learned": len(run.tasks), "composed": composed}
        for n in FEW:
            lora = learn_lora(args, seed, kind, few[:n], test, 16)
            row[f"LoRA, {n}"] = lora.manifest["results"][-1]["stored"][kind]
        yield row | perplexity_under(model, *asked(model, run, tokenizer, test), known)


# ----------------------------------------------------------------------------------- real tasks not learned


def tasks(args, seed):
    """Take each of some tasks out of a run that has a version for all. Yield a row for each: the percentage
    of its test records that are answered right. Raises Refused if the run has no such task."""
    said = argparse.Namespace(**vars(args), seed=seed, part="test", examples=300, val_examples=100)
    run, model, _ = open_run(args.run, "cpu", backbone=args.backbone)
    if unknown := [task for task in args.tasks if task not in run.tasks]:
        raise Refused(f"--tasks {unknown[0]}: {args.run} has {', '.join(run.tasks)}")
    every, versions = Tasks(run.tasks, said, args.options), run.versions
    for task in args.tasks:
        run.versions = [v for v in versions if v.task != task]
        kept = Kept(args.out / f"tasks-{seed}" / f"{task}.json")
        made_of = " ".join([args.backbone, args.run, args.data, f"{args.lora_steps}", *args.options])
        yield kept(made_of, held_out, args, seed, every, task, run, model)


def held_out(args, seed, every, task, run, model):
    """Return the row of a task that no version of a run has learned."""
    few, (examples, right, _) = every.train[task][: max(FEW)], every.held_out[task]
    score = lambda model, gating: 100 * statistics.mean(judge(model, examples, right, gating)["likelier"])
    known, composed = from_few(model, run, *asked(model, run, every.tokenizer, few))
    row = {"seed": seed, "task": task, "learned": len(run.versions), "composed": composed}
    row |= {name: score(model, gating) for name, gating in known.items()}
    for n in FEW:
        where = learn_lora(args, seed, task, few[:n], every.choose[task][:8], 8).folder
        alone, lora, _ = open_run(where, "cpu", backbone=args.backbone)
        row[f"LoRA, {n}"] = score(lora, functools.partial(alone.stored, 0))
        lora.detach()
    return row


def few_table(title, digits, rows):
    """Print a line for each task that no version has learned."""
    print_table(title, *few_lines(digits, rows))


TABLES = {
    "styles": (styles, styles_table),
    "kinds": (kinds, functools.partial(few_table, "perplexity of kinds that no version has learned", 3)),
    "tasks": (tasks, functools.partial(few_table, "right answers, %, of a task that is left out", 1)),
}


def main(argv=None):
    p = Parser(__doc__, prog="found.py")
    add = p.add_argument
    add("table", choices=TABLES, help="what is found or composed")
    add("--backbone", default="tiny", help="see train.py")
    add("--seeds", type=number(int, 1, 100), default=3, help="how many")
    add("--first-seed", type=number(int, 0, 10**6), default=0, help="the first of them")
    add("--learned", type=number(int, 1, 75), default=10, help="kinds that are learned")
    add("--held", type=number(int, 1, 75), default=3, help="kinds that are held out")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/found"), help="where run folders are")
    add("--lora-steps", type=number(int, 8), default=40, help="of a LoRA, each on 16 records; of tasks on 8")
    add("--run", help="of tasks: the run folder in which each has a version")
    add("--data", help="of tasks: the folder of their records")
    add("--tasks", nargs="+", default=HELD_OUT, metavar="TASK", help="which are left out")
    add("--json", type=output_file, metavar="FILE", help="write what was measured")
    args, args.options = p.parse_known_args(argv)
    if args.table == "tasks" and not (args.run and args.data):
        p.error("tasks: --run names the run folder in which each has a version, --data their records")
    measured, table = TABLES[args.table]
    rows = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        rows += measured(args, seed)
    table(rows)
    write_results(args.json, "-m studies.found", argv, indent=1, rows=rows)


if __name__ == "__main__":
    run_program(main)
