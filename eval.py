"""Measure what a run folder knows, and answer prompts.

    python eval.py                                   # every task now: base, stored, routed, forgetting
    python eval.py --exact-match                     # greedy answers to the validation prompts, per kind
    python eval.py --prompt "Name three fruits."     # routed: says which version answered, and how sure it is
    python eval.py --talk                            # the same, prompt after prompt; /versions, /use NAME ...
    python eval.py --talk --system "Be brief."       # with a system message, in a run with --template chat
    python eval.py --web                             # the same in a browser; OpenAI's clients can ask, too
    python eval.py --like FILE.json --prompt ...     # who has the lowest loss on these records answers
    python eval.py --version alpaca code AB          # every task under these; with --prompt: ask the first
    python eval.py --run runs/s0 runs/s1 runs/s2     # each, then mean and standard deviation
    python eval.py --json results.json               # all of it: R matrices, forgetting, routing, config

Forgetting is measured twice, and every table prints both. *Stored*: the right version is given, so what is
lost was overwritten. *Routed*: the coordinate decides, as it must if nobody says which task a prompt is of.
Perplexity is over response tokens, the one that ends them included, of the validation records kept in the run
folder. What a chat template writes into an answer, such as the tags of an empty thought, is part of the
response: it is trained, generated, counted in perplexity and compared in an exact match.

This file covers section 5.3 of the NIWF paper. It also counts which inputs lie in which region, which section
5.5 draws. Departure: the paper's tables have the routed figure alone, as it names no task.
"""

import functools
import hashlib
import json
import math

from commit import Run
from field import take_snapshot, top_k_gating
from model import perplexity, response_nll
from plumbing import Refused
from plumbing.asking import answer_as_asked, answering
from plumbing.backbone import pick_device
from plumbing.command import run_program, write_results
from plumbing.files import BASE, atomic, latest_run
from plumbing.processes import rank_and_size, sum_over_processes
from plumbing.prompts import encode, prompt_ids, prompt_of, stop_ids, text_of
from plumbing.records import read_examples
from plumbing.tables import exact_match, print_over_runs, print_report, print_table
from plumbing.talk import parse_questions

import torch

EVAL_BATCH = 16  # fixed, so that a later evaluation computes the same bits
BARE = None, lambda h_bar: None  # the bare backbone has no version and no gating


# -------------------------------------------------------------------------------------------------- measuring


def perplexity_under(model, examples, h_bar, gatings):
    """Return {name: the perplexity of examples}, each with the gating that gatings[name] makes of its h_bar.
    Of task i this file measures it under three gatings:

    base      lambda h: None                   the bare backbone
    stored    lambda h: run.stored(i, h)       the right version is given
    routed    lambda h: run.routed(h)[0]       the coordinate decides
    """
    parts = batches(examples, h_bar)
    nll = sum(model.nll_under(batch, h, gatings.values()).cpu().double().sum(1) for batch, h in parts)
    tokens = sum(len(response) for _, response in examples)
    return {name: perplexity(x, tokens) for name, x in zip(gatings, nll.tolist())}


def forgetting(results, protocol):
    """Return {task j: R[T,j] / R[j,j] - 1} in percent, from rows as `measure` makes them. R[i,j] is the
    perplexity on task j after task i, T the last row; R[j,j] is in task j's first row. This is the paper's
    own figure (its table of results, "+85.5%"). protocol: "stored" or "routed". Raises Refused if a task has
    no row of its own."""
    learned = {r["task"]: r[protocol][r["task"]] for r in reversed(results)}
    lost = [t for t in results[-1][protocol] if t not in learned]
    if lost:
        raise Refused(f"manifest.json: results: {lost[0]} was never measured when it was learned")
    return {t: 100 * (now / learned[t] - 1) for t, now in results[-1][protocol].items()}


def batches(*lists, size=EVAL_BATCH):
    """Walk lists of one length together, `size` items at a time."""
    for b in range(0, len(lists[0]), size):
        yield [part[b : b + size] for part in lists]


def probe_all(model, examples, pool, gating=None, split=True):
    """Return h_bar [n, features] of every example. pool: over the "prompt" or the "sequence". Batches depend
    on `examples` alone, so the same list gives the same bits. split: each process computes a part."""
    rank, size = rank_and_size() if split else (0, 1)
    rows = [p if pool == "prompt" else p + r for p, r in examples]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    h_bar = torch.zeros(len(rows), model.features, device=model.device)
    for (chunk,) in [*batches(order, size=4 * EVAL_BATCH)][rank::size]:
        h_bar[chunk] = model.probe([rows[j] for j in chunk], gating)
    if split:
        sum_over_processes(h_bar)
    return h_bar


def validation_set(run, model, tokenizer, task):
    """Return a task's validation examples in a fixed order, their h_bar, and the h_bar that routes them: that
    of the prompt alone, because a user's prompt has no response yet."""
    examples = [encode(r, tokenizer, run.template, run.day) for r in run.validation(task)]
    examples.sort(key=lambda e: len(e[0]) + len(e[1]))  # stable: batches are the same every time
    gating, pool = run.probe_gating(), run.manifest["settings"]["pool"]
    h_prompt = h_bar = probe_all(model, examples, "prompt", gating)
    if pool == "sequence":
        h_bar = probe_all(model, examples, pool, gating)
    return examples, h_bar, h_prompt


@torch.no_grad()
def measure(run, model, tokenizer, outside="nearest"):
    """Measure every committed task as things stand. Return one row of R, and {task: digests of its stored
    logits}. The row has "task" and "version", of the last one, and for every task

    base, stored, routed   perplexity
    routing, inside        {task: how many inputs it answers; how many lie in its region}
    identical              [examples whose stored logits have the bits they had at commit, examples]; a task
                           just learned is compared with itself
    gating, drift          see `describe_gating`, `describe_drift`"""
    last, digests = run.manifest["versions"][-1], {}
    row = {"task": last["task"], "version": last["hash"]}
    row |= {key: {} for key in "base stored routed routing inside identical gating drift".split()}
    for i, task in enumerate(run.tasks):
        columns, digests[task] = measure_task(run, model, tokenizer, i, outside)
        for column, value in columns.items():
            row[column][task] = value
    return row, digests


def measure_task(run, model, tokenizer, i, outside):
    """Return task i's part of `measure`: {column: value} and digests. The perplexities are those of
    `perplexity_under`, found in one walk over the batches, of which each process takes a part."""
    task, results = run.tasks[i], run.manifest["results"]
    examples, h_bar, h_prompt = validation_set(run, model, tokenizer, task)
    base = next((row["base"][task] for row in results if task in row["base"]), None)  # it never changes
    parts, choices, inside, gatings = [*batches(examples, h_bar, h_prompt)], [], [], []
    losses = torch.zeros(len(parts), 3, dtype=torch.float64)  # of each batch: base, stored, routed
    bits = torch.zeros(len(parts), EVAL_BATCH, 8, dtype=torch.uint8)
    rank, size = rank_and_size()
    for b, (batch, h, h_of_prompt) in enumerate(parts):
        stored, (routed, found) = run.stored(i, h), run.routed(h_of_prompt, outside)
        choices += [v.task if v else BASE for v in answering(run, found, outside)]
        inside.append(found.inside)
        gatings.append(stored)
        if b % size == rank:
            losses[b], bits[b, : len(batch)] = measure_batch(model, batch, stored, routed, not base)
    sum_over_processes(losses)
    sum_over_processes(bits)
    digests = [bytes(row).hex() for row in bits.flatten(0, 1)[: len(examples)].tolist()]
    nll = losses.cumsum(0)[-1].tolist()  # batch after batch: any number of processes gives the same bits
    tokens = sum(len(r) for _, r in examples)
    at_commit = run.digests(task) if run.measured(run.manifest["versions"][i]) else digests
    inside = torch.cat(inside).sum(0).tolist()
    columns = {name: perplexity(x, tokens) for name, x in zip(("base", "stored", "routed"), nll)}
    columns |= {"base": base} if base else {}
    columns |= {
        "routing": {t: choices.count(t) for t in (*run.tasks, BASE) if t == task or t in choices},
        "inside": {t: count for t, count in zip(run.tasks, inside) if t == task or count},
        "identical": [sum(map(str.__eq__, digests, at_commit)), len(digests)],
        "gating": describe_gating(gatings),
    }
    if run.speaker(i) is not run.versions[i]:
        columns["drift"] = describe_drift(run, i, h_bar)
    return columns, digests


def measure_batch(model, batch, stored, routed, bare):
    """Return a batch's negative log-likelihoods [3]: bare (0 unless asked for), stored and routed; and
    digests of its stored logits: bytes [B, 8], which processes can sum."""
    logits, labels = model.logits(batch, stored)
    digests = [[*hashlib.sha256(x.float().cpu().numpy().tobytes()).digest()[:8]] for x in logits]
    total = lambda logits, labels: float(response_nll(logits, labels).sum())
    own, base = total(logits, labels), total(*model.logits(batch, None)) if bare else 0.0
    alike = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(stored, routed))
    nll = [base, own, own if alike else total(*model.logits(batch, routed))]
    return torch.tensor(nll, dtype=torch.float64), torch.tensor(digests, dtype=torch.uint8)


def describe_gating(gatings):
    """Describe batches of (indices, weights) [B, L, K]. -> {"sets": how many different top-K sets a layer
    chooses; "bases": exp of the entropy of its weights, the mean over inputs}, means over layers."""
    indices, weights = (torch.cat(parts) for parts in zip(*gatings))
    sets = [len(layer.sort(-1).values.unique(dim=0)) for layer in indices.unbind(1)]
    return {"sets": sum(sets) / len(sets), "bases": float(torch.special.entr(weights).sum(-1).exp().mean())}


def describe_drift(run, i, h_bar):
    """Return what the soft lock (or none) let happen to task i, of its inputs h_bar [n, features]: the share
    inside its region under the dynamics of its commit and of now; how far the coordinates moved in between,
    and their spread before; the lock's loss at its anchors, and the share of the K bases chosen there that
    are still chosen. With --probe adapted h_bar itself has moved, too, which this does not see."""
    v, speaker = run.versions[i], run.speaker(i)
    then, now = v.dynamics(h_bar), speaker.dynamics(h_bar)
    logits, old = take_snapshot(speaker.field, v.anchors), v.snapshot.shape[-1]
    now_chosen = top_k_gating(logits, speaker.top_k)[0]  # [count, L, K], and K may be another now
    kept = (top_k_gating(v.snapshot, v.top_k)[0][..., None] == now_chosen[..., None, :]).any(-1)
    share = lambda z: float((v.region.distance(z) <= v.region.tau).cpu().double().mean())
    return {
        "inside_at_commit": share(then),
        "inside_now": share(now),
        "moved": float((now - then).norm(dim=1).mean()),
        "spread": float((then - then.mean(0)).norm(dim=1).mean()),
        "lock_loss": float((logits[..., :old] - v.snapshot).square().sum((1, 2)).mean()),
        "top_k_kept": float(kept.double().mean()),
    }


def measure_last(run, backbone, tokenizer):
    """Measure the state after the last task and keep it, unless that has been done: a kill may have come
    between committing and measuring. Raises Refused if a figure is not finite."""
    last = run.manifest["versions"][-1]
    if not run.measured(last):
        model = run.open_model(backbone, tokenizer)
        row, digests = measure(run, model, tokenizer)
        figures = [row["base"], row["stored"], row["routed"], *row["drift"].values()]
        if not all(math.isfinite(x) for part in figures for x in part.values()):
            raise Refused(f"after {last['task']} a figure is not finite: roll it back, take a lower --lr")
        with atomic(run.data_file(last["task"], "logits")) as tmp:
            tmp.write_text(json.dumps(digests[last["task"]]))
        run.manifest["results"].append(row)
        run.save()
        model.detach()


def report(run):
    """Print the table at the end: every task that the last measurement saw, stored and routed, when it was
    learned and now. A merged version has a row from its own run, in which this run's other tasks are
    missing."""
    results = run.manifest["results"]
    print_report(results, {p: forgetting(results, p) for p in ("stored", "routed")})


# ---------------------------------------------------------------------------------------------------- answers


def answer(run, model, tokenizer, prompts, outside="nearest", max_new_tokens=128):
    """Answer a batch of prompts, instructions or records, greedily and routed. Return texts and a Route:
    `run.tasks[i]` for i in its `choice` answered; with outside="base" the bare backbone did where the Route
    is not `known()`, see `Run.routed`."""
    ids = [prompt_ids(p, tokenizer, run.template, run.day) for p in prompts]
    ends, found = stop_ids(model.backbone, tokenizer, run.template), None

    def gating_of(h_bar):
        nonlocal found
        gating, found = run.routed(h_bar, outside)
        return gating

    new = model.generate(ids, gating_of, ends, max_new_tokens, probe_gating=run.probe_gating())
    return [text_of(tokenizer, row) for row in new], found


def exact_matches(run, model, tokenizer, args):
    """Count the validation prompts that are answered as trained. -> {task: {kind: [right, of]}}"""
    how, counts = (tokenizer, run.template, run.day), {}

    def ask(records, longest):
        for (batch,) in batches(records, size=4 * EVAL_BATCH):
            texts, found = answer(run, model, tokenizer, batch, args.outside, longest)
            yield from zip(texts, (v.task if v else BASE for v in answering(run, found, args.outside)))

    for task in run.tasks:
        records = sorted(run.validation(task), key=lambda record: len(prompt_of(record, *how)))
        wanted = [encode(record, *how)[1] for record in records]
        answers = ask(records, args.max_new_tokens or max(map(len, wanted)))
        texts = [text_of(tokenizer, ids) for ids in wanted]
        counts[task] = exact_match(task, records, answers, texts, args.exact_match)
    return counts


def gating_by_name(run, name):
    """Return the version or composition called `name`, and its gating as a function of h_bar."""
    digest = run.find(name)["hash"]
    for i, v in enumerate(run.versions):
        if v.hash == digest:
            return v, functools.partial(run.stored, i)
    composition = next(c for c in run.compositions if c.hash == digest)
    return composition, composition.gating


def most_like(run, model, tokenizer, path):
    """Find which version, composition or bare backbone has the lowest loss on a file of labelled records.
    Return it and its gating as a function of h_bar; print the five lowest. Inputs alone cannot tell apart
    tasks that differ only in their answers. Raises Refused as `read_examples` does."""
    examples = read_examples(path, model.backbone, tokenizer, run.template, run.day)
    h_bar = probe_all(model, examples, "prompt", run.probe_gating())
    who = {e["task"]: gating_by_name(run, e["task"]) for e in run.entries} | {"the bare backbone": BARE}
    found = perplexity_under(model, examples, h_bar, {name: gating for name, (_, gating) in who.items()})
    first = sorted(found, key=found.get)[:5]
    print(f"[perplexity on {path}: {', '.join(f'{name} {found[name]:.3f}' for name in first)}]\n")
    return who[first[0]]


def perplexity_by_name(run, model, tokenizer, names):
    """Print the perplexity of every task under each of the named versions or compositions. -> {task: {name:
    perplexity}}"""
    gatings, table = {name: gating_by_name(run, name)[1] for name in names}, {}
    for task in run.tasks:
        examples, h_bar, _ = validation_set(run, model, tokenizer, task)
        table[task] = perplexity_under(model, examples, h_bar, gatings)
    lines = [[task, *(f"{x:.3f}" for x in row.values())] for task, row in table.items()]
    print_table("validation perplexity under", ["", *names], lines)
    return table


# ------------------------------------------------------------------------------------------- the command line


def what_is_published(results):
    """Return R[i][j], the perplexity on task j after task i as measured last (None: not measured then),
    what was forgotten, and the last row's columns. results: rows as `forgetting` takes them."""
    rows, last = {row["task"]: row for row in results}, results[-1]
    return {
        "tasks": [*rows],
        "R": {p: [[row[p].get(t) for t in rows] for row in rows.values()] for p in ("stored", "routed")},
        "forgetting": {p: forgetting(results, p) for p in ("stored", "routed")},
        **{key: last[key] for key in ("base", "routing", "inside", "identical", "gating", "drift")},
    }


def measure_run(run, model, tokenizer, args):
    """Measure one run folder as it is now, print it, and return it as it goes to --json."""
    run.manifest["results"].append(measure(run, model, tokenizer, args.outside)[0])  # nothing is saved
    report(run)
    if args.outside == "base":
        print('\nThe bare backbone\'s answers count in the column "now", not in "learned".')
    config = {"backbone": run.manifest["backbone"], "outside": args.outside}
    config["versions"] = {v.task: {**v.config, "lock": v.lock} for v in run.versions}
    out = what_is_published(run.manifest["results"]) | {"config": config}
    if args.exact_match is not None:
        out["exact_match"] = exact_matches(run, model, tokenizer, args)
    if args.version:
        out["under"] = perplexity_by_name(run, model, tokenizer, args.version)
    return out


def open_run(folder, device=None, names=(), device_map=None, backbone=None):
    """Return a run, the model that holds its versions, and the tokenizer. device: None is the best one.
    backbone: where it lies now; None: where it was. Raises Refused if nothing has been committed there, a
    name is no version's, or the device is not available."""
    device = pick_device(device)
    run = Run(folder)
    if not run.tasks:
        raise Refused(f"{run.folder}: nothing has been committed there yet")
    for name in names:
        run.find(name)
    name = backbone or run.manifest["backbone"]["name"]
    backbone, tokenizer = run.open_backbone(name, device, device_map)
    return run, run.open_model(backbone, tokenizer), tokenizer


parse_options = functools.partial(parse_questions, __doc__)


@torch.no_grad()
def main(argv=None):
    args, outs = parse_options(argv), []
    folders, names = args.run or [latest_run()], args.version or ()
    if len({(*Run(folder).tasks,) for folder in folders}) > 1:
        raise Refused("the run folders hold different tasks, or in another order: no mean over them")
    for folder in folders:
        run, model, tokenizer = open_run(folder, args.device, names, args.device_map, args.backbone)
        if args.web or args.talk or args.prompt is not None:
            named = functools.partial(gating_by_name, run)
            who = named(names[0]) if names else None
            who = most_like(run, model, tokenizer, args.like) if args.like else who
            return answer_as_asked(run, model, tokenizer, named, BARE, who, args)
        outs.append(measure_run(run, model, tokenizer, args))
    if len(outs) > 1:
        print_over_runs(outs)
    write_results(args.json, "eval.py", argv, indent=1, rows=outs)


if __name__ == "__main__":
    run_program(main)
