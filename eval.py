"""What a run folder knows, measured; and a prompt to talk to.

    python eval.py                                   # every task now: base, stored, routed, forgetting
    python eval.py --exact-match                     # greedy answers to the validation prompts, per kind
    python eval.py --prompt "Name three fruits."     # routed: says which version answered, and how sure it is
    python eval.py --talk                            # the same, prompt after prompt; /versions, /use NAME ...
    python eval.py --version alpaca code AB          # every task under these; with --prompt: ask the first
    python eval.py --run runs/s0 runs/s1 runs/s2     # each, then mean and standard deviation
    python eval.py --json results.json               # all of it: R matrices, forgetting, routing, config
    python eval.py --memory                          # no run: what training takes, counted from the shapes

Forgetting has two parts and every table prints both. *Stored*: the right version is given, so what is lost
was overwritten. *Routed*: the coordinate decides, as it must when nobody says which task a prompt belongs to.
Perplexity is over response tokens, EOS included, of the validation records kept in the run folder.

Held here: sections 5.2 and 5.3 of the NIWF paper. Departure: its tables have the stored figure only.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while torch is being imported: one line, no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"\neval.py: stopped\n") and 130))

import collections
import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import pathlib
import re
import statistics
import sys
import tempfile

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from commit import export, latest_run, Run
from model import detach, NIWF, perplexity, response_logits, response_nll, sampler
from plumbing import Refused
from plumbing.backbone import from_shape, pick_device
from plumbing.command import number, output_file, Parser, run_program, write_results
from plumbing.files import atomic
from plumbing.processes import rank_and_size, sum_over_processes
from plumbing.prompts import text_of, encode, end_token, prompt_ids, prompt_of
from plumbing.targets import find_layers
from field import CoordinateDynamics, WeightField, take_snapshot, top_k_gating

EVAL_BATCH = 16  # fixed, so that a later evaluation computes the same bits


# -------------------------------------------------------------------------------------------------- measuring


def batches(*lists, size=EVAL_BATCH):
    """Walk lists of one length together, `size` items at a time."""
    for b in range(0, len(lists[0]), size):
        yield [part[b : b + size] for part in lists]


def probe_all(model, examples, pool, gating=None, split=True):
    """h_bar [n, features] of every example. Batches are fixed, so the same input always gives the same bits.
    split: all processes ask this, so each computes a part of the batches."""
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
    """A task's validation examples, in the order that every measurement takes them in batches, their h_bar,
    and the h_bar that routes them: of the prompt alone, as a prompt comes without its response."""
    examples = [encode(r, tokenizer, run.template) for r in run.validation(task)]
    examples.sort(key=lambda e: len(e[0]) + len(e[1]))  # stable: batches are the same every time
    gating, pool = run.probe_gating(), run.manifest["settings"]["pool"]
    routes = h_bar = probe_all(model, examples, "prompt", gating)
    if pool == "sequence":
        h_bar = probe_all(model, examples, pool, gating)
    return examples, h_bar, routes


def total_nll(model, batch, gating):
    """Negative log-likelihood of a batch's responses, in nats."""
    return float(response_nll(*model.logits(batch, gating)).sum())


@torch.no_grad()
def measure(run, model, tokenizer, outside="nearest"):
    """Measure every committed task as things stand. -> (one row of R, {task: digests of its stored logits})

    The row is {"task", "version": the last one, "base", "stored", "routed": {task: perplexity}, "routing",
    "inside": {task: {task: count, if there are any}}, "identical": {task: [examples whose stored logits have
    the bits they had at commit, examples]}, "gating": see `describe_gating`, "drift": see
    `describe_drift`}."""
    last, digests = run.manifest["versions"][-1], {}
    row = {"task": last["task"], "version": last["hash"]}
    row |= {key: {} for key in "base stored routed routing inside identical gating drift".split()}
    for i, task in enumerate(run.tasks):
        columns, digests[task] = measure_task(run, model, tokenizer, i, outside)
        for column, value in columns.items():
            row[column][task] = value
    return row, digests


def measure_task(run, model, tokenizer, i, outside):
    """Task i's part of `measure`: ({column: value}, digests)."""
    task, results = run.tasks[i], run.manifest["results"]
    examples, h_bar, routes = validation_set(run, model, tokenizer, task)
    base = next((row["base"][task] for row in results if task in row["base"]), None)  # it never changes
    parts, choices, inside, gatings = [*batches(examples, h_bar, routes)], [], [], []
    losses = torch.zeros(len(parts), 3, dtype=torch.float64)  # of each batch: base, stored, routed
    bits = torch.zeros(len(parts), EVAL_BATCH, 8, dtype=torch.uint8)
    rank, size = rank_and_size()
    for b, (batch, h, asked) in enumerate(parts):
        stored, (routed, found) = run.stored(i, h), run.routed(asked, outside)
        choices += found.choice.tolist()
        inside.append(found.inside)
        gatings.append(stored)
        if b % size == rank:
            losses[b], bits[b, : len(batch)] = measure_batch(model, batch, stored, routed, not base)
    sum_over_processes(losses)
    sum_over_processes(bits)
    digests = [bytes(row).hex() for row in bits.flatten(0, 1)[: len(examples)].tolist()]
    nll = collections.Counter()
    for values in losses.tolist():
        nll.update(dict(zip(("base", "stored", "routed"), values)))
    tokens = sum(len(r) for _, r in examples)
    at_commit = run.digests(task) if run.measured(run.manifest["versions"][i]) else digests
    inside = torch.cat(inside).sum(0).tolist()
    columns = {
        "base": base or perplexity(nll["base"], tokens),
        "stored": perplexity(nll["stored"], tokens),
        "routed": perplexity(nll["routed"], tokens),
        "routing": {t: choices.count(j) for j, t in enumerate(run.tasks) if j == i or j in choices},
        "inside": {t: count for t, count in zip(run.tasks, inside) if t == task or count},
        "identical": [sum(map(str.__eq__, digests, at_commit)), len(digests)],
        "gating": describe_gating(gatings),
    }
    if run.speaker(i) is not run.versions[i]:
        columns["drift"] = describe_drift(run, i, h_bar)
    return columns, digests


def measure_batch(model, batch, stored, routed, bare):
    """A batch's negative log-likelihoods [3]: of the bare backbone, if asked for, stored and routed; and the
    digests [B, 8] of its stored logits, in bytes."""
    logits, labels = model.logits(batch, stored)
    alike = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(stored, routed))
    digests = [[*hashlib.sha256(x.float().cpu().numpy().tobytes()).digest()[:8]] for x in logits]
    nll = torch.zeros(3, dtype=torch.float64)
    nll[1] = nll[2] = float(response_nll(logits, labels).sum())
    if not alike:
        nll[2] = total_nll(model, batch, routed)
    if bare:
        nll[0] = total_nll(model, batch, None)
    return nll, torch.tensor(digests, dtype=torch.uint8)


def describe_gating(gatings):
    """Batches of (indices, weights) [B, L, K] -> {"sets": different top-K choices that a layer makes over all
    inputs, "bases": exp of the entropy of its weights}, means over layers."""
    indices, weights = (torch.cat(parts) for parts in zip(*gatings))
    sets = [len(layer.sort(-1).values.unique(dim=0)) for layer in indices.unbind(1)]
    return {"sets": sum(sets) / len(sets), "bases": float(torch.special.entr(weights).sum(-1).exp().mean())}


def describe_drift(run, i, h_bar):
    """What the soft lock (or none) did to task i: where its coordinates went, and how well its anchors were
    held."""
    v, speaker = run.versions[i], run.speaker(i)
    then, now = v.dynamics(h_bar), speaker.dynamics(h_bar)
    logits, old = take_snapshot(speaker.field, v.anchors), v.snapshot.shape[-1]
    now_chosen, then_chosen = (top_k_gating(x, v.top_k)[0] for x in (logits, v.snapshot))  # [count, L, K]
    # Bases that a grown bank added were chosen by no anchor then.
    kept = (now_chosen[..., None] == then_chosen[..., None, :]).any(-1)
    share = lambda z: float((v.region.distance(z) <= v.region.tau).double().mean())
    return {
        "inside_at_commit": share(then),
        "inside_now": share(now),
        "moved": float((now - then).norm(dim=1).mean()),
        "spread": float((then - then.mean(0)).norm(dim=1).mean()),
        "lock_loss": float((logits[..., :old] - v.snapshot).square().sum((1, 2)).mean()),
        "top_k_kept": float(kept.double().mean()),
    }


def measure_last(run, backbone, tokenizer):
    """Measure the state after the last task and keep it, unless that has been done: a kill may have come in
    between."""
    last = run.manifest["versions"][-1]
    if not run.measured(last):
        model = run.open_model(backbone, tokenizer)
        row, digests = measure(run, model, tokenizer)
        if not all(math.isfinite(x) for key in ("base", "stored", "routed") for x in row[key].values()):
            raise Refused(
                f"after {last['task']} a perplexity is not finite: roll it back, use a smaller --lr"
            )
        with atomic(run.data_file(last["task"], "logits")) as tmp:
            tmp.write_text(json.dumps(digests[last["task"]]))
        run.manifest["results"].append(row)
        run.save()
        model.detach()


def forgetting(results, protocol):
    """{task j: R[T,j] / R[j,j] - 1} in percent, from rows as `measure` makes them; `protocol` is "stored" or
    "routed".

    R[i,j] is the perplexity on task j after task i, T the last task. This is the paper's own figure (its
    table of results, "+85.5%"). From the same R: BWT = mean over j < T of R[T,j] - R[j,j] (Lopez-Paz and
    Ranzato 2017, with the sign of a loss: positive is forgetting); FM = mean over j < T of R[T,j] - min over
    i < T of R[i,j] (Chaudhry et al. 2018)."""
    learned = {r["task"]: r[protocol][r["task"]] for r in results}
    lost = [t for t in results[-1][protocol] if t not in learned]
    if lost:
        raise Refused(f"manifest.json: results: {lost[0]} was never measured when it was learned")
    return {t: 100 * (now / learned[t] - 1) for t, now in results[-1][protocol].items()}


DRIFT_REPORT = """
where {task} went: its inputs moved by {moved:.2f} (they were {spread:.2f} from their mean); {inside_now:.1%}
of them are still in its region, {inside_at_commit:.1%} were at commit. How the lock held: L_lock is
{lock_loss:.1e} at its anchors, {top_k_kept:.1%} of their top-K choices are unchanged. A lock on the anchors
guards addresses; it holds neither the inputs to their addresses nor the bases that the addresses name."""


def report(run):
    """Print the table at the end: every task, stored and routed, when it was learned and now."""
    results = run.manifest["results"]
    row, width = results[-1], max(4, *map(len, run.tasks))
    print(f"\nvalidation perplexity after {row['task']} (version {row['version'][:12]})")
    print(f"{'task':{width}}  protocol      base  learned       now  forgetting")
    lost = {protocol: forgetting(results, protocol) for protocol in ("stored", "routed")}
    for t in run.tasks:
        learned = next(r for r in results if r["task"] == t)
        home, n = row["routing"][t].get(t, 0), sum(row["routing"][t].values())
        others = [k for r, k in row["inside"][t].items() if r != t]
        notes = {"stored": "logits bit-identical on {} of {} examples".format(*row["identical"][t])}
        own, shared = row["inside"][t][t] / n, max(others, default=0) / n
        notes["routed"] = f"{100 * home / n:.1f} % routed to {t}; {100 * own:.0f} % lie in its region"
        notes["routed"] += f", {100 * shared:.0f} % in another's" if len(run.tasks) > 1 else ""
        for protocol, note in notes.items():
            figures = f"{row['base'][t]:8.3f} {learned[protocol][t]:8.3f}  {row[protocol][t]:8.3f}"
            print(f"{t:{width}}  {protocol}  {figures}  {lost[protocol][t]:+8.2f} %  {note}")
    for t, g in row["gating"].items():
        print(
            f"\n{t} makes {g['sets']:.1f} different top-K choices in a layer over all its inputs, "
            f"its weight lies on {g['bases']:.1f} bases"
        )
    for t, d in row["drift"].items():
        print(DRIFT_REPORT.format(task=t, **d))


# ---------------------------------------------------------------------------------------------------- answers


def answer(run, model, tokenizer, prompts, outside="nearest", max_new_tokens=128):
    """Greedy, routed answers to a batch of prompts: instructions, or records with instruction and input.
    outside: see `Run.routed`. -> texts, Route; `run.tasks[i]` for i in its `choice` are who answered, its
    `probability` is how sure that is."""
    ids = [prompt_ids(p, tokenizer, run.template) for p in prompts]
    gating, found = run.routed(model.probe(ids, run.probe_gating()), outside)
    new = model.generate(ids, gating, end_token(tokenizer, run.template), max_new_tokens)
    return [text_of(tokenizer, row) for row in new], found


def exact_match(run, model, tokenizer, args):
    """Share of validation prompts whose greedy, routed answer is the reference, to the letter. Prints a line
    for each kind of instruction (a record's "kind"; a record without one counts under its task). -> {task:
    {kind: [right, of]}}"""
    shares = {}
    for task in run.tasks:
        length = lambda r: len(prompt_of(r, tokenizer, run.template))
        records = sorted(run.validation(task), key=length)
        kinds, answers = collections.defaultdict(lambda: [0, 0]), []
        for (batch,) in batches(records, size=4 * EVAL_BATCH):
            texts, found = answer(run, model, tokenizer, batch, args.outside, args.max_new_tokens)
            answers += zip(batch, texts, found.choice.tolist())
        for i, (record, text, choice) in enumerate(answers):
            right = text.strip() == record["output"].strip()
            count = kinds[record.get("kind", task)]
            count[0], count[1] = count[0] + right, count[1] + 1
            if args.exact_match and i % max(1, len(records) // args.exact_match) == 0:
                asked = record["instruction"] + (f" | {record['input']}" if record.get("input") else "")
                wrong = "" if right else f"   expected {record['output']!r}"
                print(f"[{run.tasks[choice]}] {asked}\n    {text!r}{wrong}")
        right, n = (sum(c) for c in zip(*kinds.values()))
        print(f"\n{task}: {right} of {n} answers exactly right ({100 * right / n:.1f} %)")
        for kind, (hits, of) in sorted(kinds.items(), key=lambda k: -k[1][0] / k[1][1]):
            print(f"  {kind:16} {hits:3} of {of:3}  {100 * hits / of:5.1f} %")
        shares[task] = dict(kinds)
    return shares


def gating_by_name(run, name):
    """-> (the version or composition called `name`, its gating as a function of h_bar)."""
    digest = run.find(name)["hash"]
    for i, v in enumerate(run.versions):
        if v.hash == digest:
            return v, functools.partial(run.stored, i)
    composition = next(c for c in run.compositions if c.hash == digest)
    return composition, composition.gating


# ---------------------------------------------------------------------------------------- a prompt to talk to


def pieces(tokenizer, steps):
    """The text of one response, stripped, in pieces as its tokens come. What may still change is held back:
    what the last token alone says, half a character, spaces that may be the last."""
    ids, text, said = [], "", 0
    for tokens in steps:
        ids += tokens.values()
        before, text = text, text_of(tokenizer, ids)
        sure = os.path.commonprefix([before, text]).rstrip("\ufffd").strip()
        yield sure[said:]
        said = max(said, len(sure))
    yield text.strip()[said:]


def answer_prompt(run, model, tokenizer, args, choose, prompt, asked=None):
    """Print the answer to one prompt as it comes; then say which version gave it, and how sure the routing
    is. asked: what `gating_by_name` made of a name, or BARE; None: routed."""
    ids = [prompt_ids(prompt, tokenizer, run.template)]
    h_bar = model.probe(ids, run.probe_gating())
    if asked:
        version, gating = asked[0], asked[1](h_bar)
        note = f"version {version.hash[:12]}, as asked" if version else "the bare backbone, as asked"
    else:
        gating, found = run.routed(h_bar, args.outside)
        v, home = run.versions[found.choice[0]], bool(found.at_home()[0])
        by = "the bare backbone" if args.outside == "base" and not home else f"version {v.hash[:12]}"
        note = f"{by}; nearest region: {v.task}, {100 * found.probability[0]:.1f} % sure; "
        note += f"the coordinate is {'inside' if home else 'outside'} it"
    end = end_token(tokenizer, run.template)
    steps = model.stream(ids, gating, end, args.max_new_tokens, choose)
    with contextlib.closing(steps):
        for piece in pieces(tokenizer, steps):
            print(piece, end="", flush=True)
    print(f"\n\n[{note}]")


BARE = None, lambda h_bar: None
COMMANDS = "/versions, /use NAME, /auto, /base or /quit"


def talk(run, ask, asked=None):
    """Answer one line of input after another, until there is none. ask(prompt, asked): `answer_prompt`."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    for end in (sys.stdin, sys.stdout):
        end.reconfigure(errors="replace")  # bytes that are no text are no reason to stop
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  `input` then edits lines and keeps a history
        print(f"Ask something, or say {COMMANDS}. Ctrl-C stops an answer.")
    while True:
        try:
            line = input("> " if terminal else "").strip()
            command, _, name = line.partition(" ")
            if command == "/quit":
                return
            elif command == "/versions":
                print("\n".join(f"{e['hash'][:12]}  {e['task']}" for e in run.entries))
            elif command == "/use":
                asked = gating_by_name(run, name.strip())
            elif command in ("/auto", "/base"):
                asked = BARE if command == "/base" else None
            elif command.startswith("/"):
                raise Refused(f"{command}: no such command; say {COMMANDS}")
            elif line:
                ask(line, asked)
                print()
        except (Refused, torch.OutOfMemoryError) as e:
            print(f"[{Refused(e)}]")
        except EOFError:
            return print(end="\n" if terminal else "")
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\n[stopped; /quit or Ctrl-D leaves]")


# ----------------------------------------------------------------------------------------- versions by name


def perplexity_by_name(run, model, tokenizer, names):
    """Print the perplexity of every task under each of the named versions or compositions, and, where peft is
    installed, under what its `add_weighted_adapter` makes of a composition's exported versions. -> {task:
    {name: perplexity}}"""
    data = {task: validation_set(run, model, tokenizer, task) for task in run.tasks}
    table = {task: {} for task in run.tasks}

    def fill(name, logits_of):
        for task, (examples, h_bar, _) in data.items():
            nll = sum(float(response_nll(*logits_of(*part)).sum()) for part in batches(examples, h_bar))
            table[task][name] = perplexity(nll, sum(len(r) for _, r in examples))

    found = {name: gating_by_name(run, name) for name in names}
    for name, (_, gating) in found.items():
        fill(name, lambda batch, h, gating=gating: model.logits(batch, gating(h)))
    model.detach()
    if importlib.util.find_spec("peft"):
        for name, (version, _) in found.items():
            if version.lock == "composed":
                adapted = peft_composition(run, model.backbone, version)
                backbone = adapted.base_model.model
                fill(f"{name}, peft", lambda batch, h, b=backbone: response_logits(b, model.pad_id, batch))
                adapted.unload()
    width = max(map(len, run.tasks))
    print(f"\nvalidation perplexity under\n{'':{width}}" + "".join(f"{n:>14}" for n in table[run.tasks[0]]))
    for task, row in table.items():
        print(f"{task:{width}}" + "".join(f"{x:14.3f}" for x in row.values()))
    return table


def peft_composition(run, backbone, composition):
    """What peft's `add_weighted_adapter` makes of a composition's exported versions, on the backbone."""
    import peft

    adapted, parts = None, [f"part{i}" for i in range(len(composition.reads))]
    with tempfile.TemporaryDirectory() as folder:
        for part, digest in zip(parts, composition.reads):
            path = export(run, digest, pathlib.Path(folder) / part)["folder"]
            if adapted is None:
                adapted = peft.PeftModel.from_pretrained(backbone, path, adapter_name=part)
            else:
                adapted.load_adapter(path, part)
    adapted.add_weighted_adapter(parts, composition.weights, "sum", combination_type="cat")
    adapted.set_adapter("sum")
    return adapted


# ------------------------------------------------------------------------------------------ memory, by count

TOKENS, RANK, BASES, TOP_K = 256, 8, 16, 8  # the paper's; a micro-batch is one sequence
PARTS = ("backbone", "bases read", "bases written", "field, dynamics", "gradients", "moments", "activations")
TABLE_2 = dict(zip(PARTS, (14.00, None, 1.29, 0.01, None, 2.58, 1.0)))  # the paper's, in GB
TABLE_2["in all, the peak"] = 18.9


def count_kept(model, field, dynamics):
    """Bytes that autograd keeps of a micro-batch whose tokens are all of a response: a list, by layer. Its
    last number is what comes outside of the layers, with the two gradients of the logits, in float32, with
    which the backward pass of the loss begins."""
    layers, kept, handles = find_layers(model.backbone), {}, []
    here = [len(layers)]  # the last of these is where the pass is
    for i, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, i=i: here.append(i)))
        handles.append(layer.register_forward_hook(lambda *_: here.append(len(layers))))
    weights = itertools.chain(*(m.parameters() for m in (model.backbone, field, dynamics)))
    owned = {p.untyped_storage()._cdata for p in (*weights, *model.bank.live.values())}

    def keep(tensor):
        storage = tensor.untyped_storage()  # of several views, once
        if storage._cdata not in owned:
            kept.setdefault(storage._cdata, (here[-1], storage.nbytes()))
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gating = top_k_gating(field(dynamics(torch.zeros(1, model.features))), TOP_K)
        logits, labels = model.logits([([0], [0] * TOKENS)], gating)
        nll = response_nll(logits, labels)  # while it is here, so is all that was kept
    detach(handles)
    sizes = [sum(size for at, size in kept.values() if at == i) for i in range(len(layers) + 1)]
    sizes[-1] += 2 * nll.element_size() * logits.numel()
    return sizes


def count_memory(name, depth=None):
    """What a training takes at its peak: the forward pass of a micro-batch is done, its backward pass begins,
    and the gradients of the micro-batches before are there. Counted on tensors that have a shape and no
    memory, with the backbone in bfloat16, cut to `depth` layers if that is said. Over several devices the
    layers are spread evenly.

    -> rows {"layers", "task": 1 or 2 (which reads the first's bases), "checkpointing": bool, "devices",
    "device": its number, and in bytes each of PARTS, and "gathered", the bases among the activations}. Not
    counted: what the allocator wastes, what a kernel works in, the CUDA context."""
    with FakeTensorMode():
        model = NIWF(from_shape(name, torch.bfloat16, depth), pad_id=0, rank=RANK)
        model.bank.add(BASES)
        layers, dynamics = model.bank.layers, CoordinateDynamics(model.features)
        fields = [WeightField(layers, BASES * task) for task in (1, 2)]
        kept = {False: count_kept(model, fields[0], dynamics)}
        model.checkpoint()
        kept[True] = count_kept(model, fields[0], dynamics)
    rows = []
    for devices, task, checkpointing in itertools.product((1, 2, 4), (1, 2), (False, True)):
        about = {"layers": layers, "task": task, "checkpointing": checkpointing, "devices": devices}
        places = [{**about, "device": i} | dict.fromkeys((*PARTS, "gathered"), 0) for i in range(devices)]
        place_weights(places, model, fields[:task], dynamics)
        *inside, outside = kept[checkpointing]
        for layer, size in enumerate(inside):
            places[layer * devices // layers]["activations"] += size
        for place in places:  # either the loss goes backward or a layer is computed again
            again = max(kept[False][:-1]) if checkpointing else 0
            place["activations"] += max(again, outside if place is places[-1] else 0)
        rows += places
    return rows


def place_weights(places, model, fields, dynamics):
    """Add to the rows of all devices the weights of a task, gradients and moments of those it trains. Its
    field is the last; the first task trains the dynamics, too."""
    size = lambda module: sum(p.nbytes for p in module.parameters())
    place_of = lambda layer: places[layer * len(places) // model.bank.layers]
    embeddings = model.backbone.get_input_embeddings().weight
    for key, p in model.backbone.named_parameters():
        number = re.search(r"\.(\d+)\.", key)
        ends = places[0] if p is embeddings else places[-1]
        (place_of(int(number[1])) if number else ends)["backbone"] += p.nbytes
    for key, p in model.bank.live.items():
        place = place_of(model.bank.layer[key[:-2]])
        place["bases written"] += p.nbytes
        place["bases read"] += p.nbytes * (len(fields) - 1)
        place["gradients"] += p.nbytes
        place["gathered"] += p.nbytes // 2 * TOP_K // BASES  # in bfloat16
    places[0]["field, dynamics"] = sum(map(size, fields)) + size(dynamics)
    places[0]["gradients"] += size(fields[-1]) + (size(dynamics) if len(fields) == 1 else 0)
    for place in places:
        place["moments"] = 2 * place["gradients"]


def memory_lines(rows):
    """The lines of a table from rows of `report_memory`: {what: its bytes on the fullest device, for task 1
    without and with checkpointing, and for task 2}."""
    lines = {part: (1, part) for part in PARTS} | {"in all, the peak": (1, "total")}
    lines |= {f"on the fullest of {n} devices": (n, "total") for n in (2, 4)}
    lines |= {"bases gathered, [B, K, r, d]": (1, "gathered"), "or [B, T, K, r, d]": (1, "a token")}

    def fullest(devices, part, *column):
        place = lambda row: (row["devices"], row["task"], row["checkpointing"])
        return max(row[part] for row in rows if place(row) == (devices, *column))

    columns = [*itertools.product((1, 2), (False, True))]
    return {line: [fullest(*which, *column) for column in columns] for line, which in lines.items()}


def report_memory(name):
    """Print the paper's Table 2 from a backbone's shapes. -> rows of `count_memory`, with their "total", and
    what gathered bases would take, were they gathered for "a token" each."""
    rows = count_memory(name)
    for row in rows:
        row["total"] = sum(row[part] for part in PARTS)
        row["a token"] = TOKENS * row["gathered"]
    print(f"{name}, GiB, a micro-batch of 1 x {TOKENS} tokens; chk: with --checkpointing")
    paper = TABLE_2 if name == "random:mistral-7b" else {}
    print(f"{'':28}    task 1  1, chk    task 2  2, chk" + "   the paper's Table 2" * bool(paper))
    for line, sizes in memory_lines(rows).items():
        theirs = f"{paper[line] * 1e9 / 2**30:22.2f}" if paper.get(line) else ""
        figures = (f"{size / 2**30:{width}.2f}" for size, width in zip(sizes, (10, 8, 10, 8)))
        print(f"{line:28}" + "".join(figures) + theirs)
    return rows


# ------------------------------------------------------------------------------------------- the command line


def what_is_published(results):
    """From rows as `measure` makes them: R[i][j], the perplexity on task j after task i, None for j > i, what
    came to be forgotten, and the last row's columns."""
    tasks, last = [row["task"] for row in results], results[-1]
    return {
        "tasks": tasks,
        "R": {p: [[row[p].get(t) for t in tasks] for row in results] for p in ("stored", "routed")},
        "forgetting": {p: forgetting(results, p) for p in ("stored", "routed")},
        **{key: last[key] for key in ("base", "routing", "inside", "identical", "gating", "drift")},
    }


def measure_run(run, model, tokenizer, args):
    """Measure one run folder as it is now, print it, and return it as it goes to --json."""
    row, _ = measure(run, model, tokenizer, args.outside)
    rows = [r for r in run.manifest["results"] if r["version"] != row["version"]] + [row]
    run.manifest["results"] = rows
    report(run)
    config = {"backbone": run.manifest["backbone"], "outside": args.outside}
    out = {
        **what_is_published(rows),
        "config": config | {v.task: {"lock": v.lock, **v.config} for v in run.versions},
    }
    if args.exact_match is not None:
        out["exact_match"] = exact_match(run, model, tokenizer, args)
    if args.version:
        out["under"] = perplexity_by_name(run, model, tokenizer, args.version)
    return out


def table_over_runs(outs):
    """Lines of a table over several runs of the same tasks (seeds, say): mean and standard deviation."""
    over = lambda values: f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    heads = ("base", "learned", "now", "forgetting %", "routed home %")
    yield f"{'task':8}  protocol" + "".join(f"  {head:>16}" for head in heads)
    for i, t in enumerate(outs[0]["tasks"]):
        for protocol in ("stored", "routed"):
            R = [o["R"][protocol] for o in outs]
            columns = [
                [o["base"][t] for o in outs],
                [r[i][i] for r in R],
                [r[-1][i] for r in R],
                [o["forgetting"][protocol][t] for o in outs],
            ]
            if protocol == "routed":
                columns.append([100 * o["routing"][t][t] / sum(o["routing"][t].values()) for o in outs])
            yield f"{t:8}  {protocol}" + "".join(f"  {over(column):>16}" for column in columns)


def parse_options(argv=None):
    p = Parser(__doc__, prog="eval.py")
    add = p.add_argument
    add("--run", nargs="+", help="run folder, or several for mean and deviation [the latest under runs/]")
    about = "where the run's backbone lies now; with --memory, whose shapes to count [random:mistral-7b]"
    add("--backbone", help=about)
    add("--device", help="cpu, cuda, mps [what is there]")
    add("--device-map", choices=["auto"], help="spread a backbone over all GPUs, then memory, then disk")
    about = "who answers a prompt outside every region: the nearest version or the bare backbone"
    add("--outside", choices=["nearest", "base"], default="nearest", help=about)
    about = "measure every task under these, or let the first answer --prompt and --talk"
    add("--version", nargs="+", metavar="NAME", help=about)
    add = p.add_argument_group("what is measured").add_argument
    add("--json", type=output_file, metavar="FILE", help="write what was measured")
    about = "count the validation prompts that are answered exactly right; print SHOW of each task"
    add("--exact-match", nargs="?", type=number(int, 0), const=0, metavar="SHOW", help=about)
    add("--memory", action="store_true", help="no run folder: what training takes, counted from the shapes")
    add = p.add_argument_group("answers").add_argument
    add("--prompt", help="an instruction to answer, instead of measuring")
    add("--input", default="", help="the input that goes with --prompt")
    add("--talk", action="store_true", help="answer what is typed or piped in, line after line")
    add("--max-new-tokens", type=number(int, 1, 10**6), default=128, help="where an answer is cut off")
    about = "draw the answers to --prompt and --talk at this temperature; 0: take the likeliest tokens"
    add("--temperature", type=number(float, 0, 100), default=0.0, help=about)
    about = "draw from the likeliest tokens that together have this probability"
    add("--top-p", type=number(float, 0, 1), default=1.0, help=about)
    add("--seed", type=number(int, 0, 2**31), default=0, help="of the draws")
    args = p.parse_args(argv)
    if args.talk and args.prompt is not None:
        p.error("--prompt asks once, --talk goes on: one of them")
    asks = args.talk or args.prompt is not None
    if asks and len(args.run or ()) > 1:
        p.error("--prompt and --talk go with one run folder")
    if args.temperature and not asks:
        p.error("--temperature goes with --prompt or --talk: what is measured is greedy")
    if args.top_p < 1 and not args.temperature:
        p.error("--top-p goes with a --temperature")
    said = {key for key, value in vars(args).items() if value != p.get_default(key)}
    if args.memory and said - {"memory", "backbone", "json"}:
        p.error("--memory goes with --backbone and --json alone")
    return args


def open_run(folder, device=None, names=(), device_map=None, backbone=None):
    """-> (run, model that holds its versions, tokenizer). device: None is the best there is. backbone: where
    it lies now; None: where it did. Refused: nothing
    has been committed there, no version has one of the names, or the device is not available."""
    device = pick_device(device)
    run = Run(folder)
    if not run.tasks:
        raise Refused(f"{run.folder}: nothing has been committed there yet")
    for name in names:
        run.find(name)
    name = backbone or run.manifest["backbone"]["name"]
    backbone, tokenizer = run.open_backbone(name, device, device_map)
    return run, run.open_model(backbone, tokenizer), tokenizer


@torch.no_grad()
def main(argv=None):
    args, outs = parse_options(argv), []
    if args.memory:
        outs = report_memory(args.backbone or "random:mistral-7b")
        return args.json and write_results(args.json, "eval.py", argv, indent=1, rows=outs)
    where = args.device_map, args.backbone
    for folder in args.run or [latest_run()]:
        run, model, tokenizer = open_run(folder, args.device, args.version or (), *where)
        if args.talk or args.prompt is not None:
            choose = sampler(args.temperature, args.top_p, args.seed)
            ask = functools.partial(answer_prompt, run, model, tokenizer, args, choose)
            asked = gating_by_name(run, args.version[0]) if args.version else None
            if args.talk:
                return talk(run, ask, asked)
            return ask({"instruction": args.prompt, "input": args.input}, asked)
        outs.append(measure_run(run, model, tokenizer, args))
    if len(outs) > 1:
        if any(o["tasks"] != outs[0]["tasks"] for o in outs):
            raise Refused("the run folders hold different tasks: no mean over them")
        print(f"\nmean and standard deviation over {len(outs)} runs")
        print("\n".join(table_over_runs(outs)))
    if args.json:
        write_results(args.json, "eval.py", argv, indent=1, rows=outs)


if __name__ == "__main__":
    run_program(main)
