"""What a run folder knows, measured; and a prompt to talk to.

    python eval.py                                   # every task now: base, stored, routed, forgetting
    python eval.py --exact-match                     # greedy answers to the validation prompts, per kind of instruction
    python eval.py --prompt "Name three fruits."     # routed: says which version answered, and how sure it is
    python eval.py --version alpaca code AB          # every task under these versions or compositions; with --prompt: ask one
    python eval.py --bench 10                        # a training step beside peft's LoRA and beside Eq. (2) in plain loops
    python eval.py --stream 24                       # learn 24 kinds of instruction one after another, and what that costs
    python eval.py --run runs/s0 runs/s1 runs/s2     # each, then mean and standard deviation
    python eval.py --json results.json               # all of it: R matrices, forgetting, routing, config

Forgetting has two parts and every table prints both. *Stored*: the right version is given, so what is lost was
overwritten. *Routed*: the coordinate decides, as it must when nobody says which task a prompt belongs to.
"""
import argparse
import collections
import contextlib
import importlib.util
import itertools
import json
import pathlib
import statistics
import tempfile
import time

import torch

from commit import Composition, Run, Version, atomic, describe, export, latest_run
from model import Refused, attach, detach, find_targets, perplexity, response_logits, response_nll
from train import (EVAL_BATCH, HERE, HUB_DATA, encode, forgetting, measure, number, open_backbone, open_model, parse_options, pick_device,
                   prompt_of, provenance, read_records, report, validation, work)


def answer(run, model, tokenizer, prompts, outside, max_new_tokens):
    """Greedy, routed answers to prompts (texts made by `prompt_of`). -> texts, Route"""
    ids = [tokenizer(p).input_ids for p in prompts]
    gating, found = run.routed(model.probe(ids, run.probe_gating()), outside)
    new = model.generate(ids, gating, tokenizer.eos_token_id, max_new_tokens)
    return tokenizer.batch_decode(new, skip_special_tokens=True), found


def exact_match(run, model, tokenizer, outside, max_new_tokens, show):
    """Share of validation prompts whose greedy, routed answer is the reference, to the letter. Prints a line for each kind
    of instruction (a record's "kind"; a record without one counts under its task). -> {task: {kind: [right, of]}}"""
    shares = {}
    for task in run.tasks:
        records = run.validation(task)
        records.sort(key=lambda r: len(prompt_of(r)))
        kinds = collections.defaultdict(lambda: [0, 0])
        for b in range(0, len(records), 4 * EVAL_BATCH):
            batch = records[b:b + 4 * EVAL_BATCH]
            texts, found = answer(run, model, tokenizer, [prompt_of(r) for r in batch], outside, max_new_tokens)
            for i, (record, text) in enumerate(zip(batch, texts)):
                right = text.strip() == record["output"].strip()
                kinds[record.get("kind", task)][0] += right
                kinds[record.get("kind", task)][1] += 1
                if (b + i) % max(1, len(records) // max(1, show)) == 0 and show:
                    print(f"[{run.tasks[found.choice[i]]}] {record['instruction']}" + (f" | {record['input']}" if record.get("input") else "")
                          + f"\n    {text!r}" + ("" if right else f"   expected {record['output']!r}"))
        right, n = (sum(c) for c in zip(*kinds.values()))
        print(f"\n{task}: {right} of {n} answers exactly right ({100 * right / n:.1f} %)")
        for kind, (hits, of) in sorted(kinds.items(), key=lambda k: -k[1][0] / k[1][1]):
            print(f"  {kind:16} {hits:3} of {of:3}  {100 * hits / of:5.1f} %")
        shares[task] = dict(kinds)
    return shares


@torch.enable_grad()
def bench(run, model, tokenizer, repeats):
    """Time forward and backward of 16 validation examples four ways, in turn, so that ratios hold on a busy machine: the
    bare backbone; ours; Eq. (2) in plain loops; peft's LoRA of the same active rank K r. Prints medians. -> {way: [seconds]}"""
    if not importlib.util.find_spec("peft"):
        raise Refused("--bench compares with peft: pip install peft")
    import peft
    records = run.validation(run.tasks[0])
    examples = [encode(r, tokenizer) for r in records[:EVAL_BATCH]]
    bank, rank = model.bank, run.versions[0].top_k * model.bank.rank
    gating = run.stored(0, model.probe([p for p, _ in examples], run.probe_gating()))
    bank.unlock()  # as in training: the bases have gradients

    def loops(name, x, y):
        A, B = bank.live[f"{name}.A"], bank.live[f"{name}.B"]
        layer = min(bank.layer[name], gating[0].shape[1] - 1)
        return y + bank.scale * torch.stack([sum(w * (x[b].to(A.dtype) @ A[i].T @ B[i]) for i, w in zip(gating[0][b, layer], gating[1][b, layer]))
                                             for b in range(len(x))]).to(y.dtype)
    model.detach()
    targets = find_targets(model.backbone)
    model.backbone.enable_input_require_grads()  # so that the bare backbone has a backward pass, too
    lora = peft.get_peft_model(model.backbone, peft.LoraConfig(r=rank, target_modules=list(targets)))
    ways = {"bare backbone": (None, lora.disable_adapter), "ours": (bank.update, lora.disable_adapter),
            "Eq. (2) in loops": (loops, lora.disable_adapter), f"peft LoRA, rank {rank}": (None, contextlib.nullcontext)}
    seconds = collections.defaultdict(list)
    for turn in range(repeats + 1):
        for way, (update, adapters) in ways.items():
            handles = attach(targets, update) if update else []
            began = time.perf_counter()
            with adapters():
                response_nll(*model.logits(examples, gating)).sum().backward()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                seconds[way].append(time.perf_counter() - began)
            detach(handles)
    print(f"\nforward and backward of {len(examples)} examples, median of {repeats}")
    for way, times in seconds.items():
        ratio = statistics.median(t / o for t, o in zip(times, seconds["ours"]))
        print(f"  {way:20} {1000 * statistics.median(times):9.1f} ms  {ratio:6.2f} times ours")
    return seconds


def named(run, name):
    """-> (the version or composition called `name`, its gating as a function of h_bar)."""
    digest = run.find(name)["hash"]
    for i, v in enumerate(run.versions):
        if v.hash == digest:
            return v, lambda h_bar: run.stored(i, h_bar)
    composition = next(c for c in run.compositions if c.hash == digest)
    return composition, composition.gating


def under(run, model, tokenizer, names):
    """Print the perplexity of every task under each of the named versions or compositions, and, where peft is installed,
    under what its `add_weighted_adapter` makes of a composition's exported versions. -> {task: {name: perplexity}}"""
    data = {task: validation(run, model, tokenizer, task) for task in run.tasks}
    table = {task: {} for task in run.tasks}

    def fill(name, logits_of):
        for task, (examples, h_bar) in data.items():
            nll = sum(float(response_nll(*logits_of(examples[b:b + EVAL_BATCH], h_bar[b:b + EVAL_BATCH])).sum()) for b in range(0, len(examples), EVAL_BATCH))
            table[task][name] = perplexity(nll, sum(len(r) for _, r in examples))
    found = {name: named(run, name) for name in names}
    for name, (_, gating) in found.items():
        fill(name, lambda batch, h: model.logits(batch, gating(h)))
    model.detach()
    for name, (version, _) in found.items():
        if isinstance(version, Composition) and importlib.util.find_spec("peft"):
            import peft
            with tempfile.TemporaryDirectory() as folder:
                adapted, parts = None, [f"part{i}" for i in range(len(version.reads))]
                for part, digest in zip(parts, version.reads):
                    path = export(run, digest, pathlib.Path(folder) / part)["folder"]
                    if adapted is None:
                        adapted = peft.PeftModel.from_pretrained(model.backbone, path, adapter_name=part)
                    else:
                        adapted.load_adapter(path, part)
            adapted.add_weighted_adapter(parts, version.weights, "sum", combination_type="cat")
            adapted.set_adapter("sum")
            fill(f"{name}, peft", lambda batch, h: response_logits(adapted.base_model.model, model.pad_id, batch))
            adapted.unload()
    width = max(map(len, run.tasks))
    print(f"\nvalidation perplexity under\n{'':{width}}" + "".join(f"{n:>14}" for n in table[run.tasks[0]]))
    for task, row in table.items():
        print(f"{task:{width}}" + "".join(f"{x:14.3f}" for x in row.values()))
    return table


def stream(folder, count, device):
    """Learn `count` tasks one after another under the exact lock: kinds of instruction of the embedded sets in alphabetical
    order, general and code in turn. What the run folder already knows is not learned again."""
    sets = {(name, part): read_records(HERE / "assets" / "data" / f"{name}.{part}.json") for name in HUB_DATA for part in ("train", "val")}
    kinds = [sorted({(name, r["kind"]) for r in sets[name, "train"]}) for name in HUB_DATA]
    for name, kind in list(itertools.chain.from_iterable(zip(*kinds)))[:count]:
        with tempfile.TemporaryDirectory() as tmp:
            for part in ("train", "val"):
                pathlib.Path(tmp, part).write_text(json.dumps([r for r in sets[name, part] if r["kind"] == kind]))
            args = parse_options(["--task", f"{name}-{kind}", "--data", f"{tmp}/train", "--val-data", f"{tmp}/val", "--lock",
                                  "--backbone", "tiny", "--device", device, "--epochs", "8", "--out", str(folder)])
            with Run(folder).exclusive() as run:
                work(run, args)


def growth(run, model, tokenizer, repeats=5):
    """What the first n versions of a run folder cost and know, for every n. Prints a table; returns its lines as dicts. Times
    are medians; those per token are of one pass over the first task's validation examples."""
    whole, lines = run.manifest, []
    examples, h_bar = validation(run, model, tokenizer, run.tasks[0])
    prompts, tokens = [p for p, _ in examples], sum(len(p) + len(r) for p, r in examples)

    def milliseconds(f, per=1):
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            f()
            times.append(time.perf_counter() - began)
        return 1000 * statistics.median(times) / per
    model.detach()
    for n, entry in enumerate(whole["versions"], 1):
        run.manifest = dict(whole, versions=whole["versions"][:n], compositions=[])
        model = open_model(run, model.backbone, tokenizer)
        version, about = Version.load(run.path(entry["hash"]), run.versions[0].dynamics), describe(run, entry)
        results, routing = whole["results"][:n], whole["results"][n - 1]["routing"]
        with tempfile.TemporaryDirectory() as tmp:  # written again, as at commit: hash, fsync, rename
            lines.append({
                "task": entry["task"], "bases_read": len(run.versions[-1].index) - about["writes"], "bases_written": about["writes"],
                "bytes": about["bytes"],
                "commit_ms": milliseconds(lambda: version.save(pathlib.Path(tmp))),
                "bare_ms": milliseconds(lambda: model.logits(examples, None), tokens),
                "stored_ms": milliseconds(lambda: model.logits(examples, run.stored(0, h_bar)), tokens),
                "routed_ms": milliseconds(lambda: model.logits(examples, run.routed(model.probe(prompts))[0]), tokens),
                "learned": about["perplexity"]["stored"],
                **{f"{p}_forgetting": statistics.mean(forgetting(results, p).values()) for p in ("stored", "routed")},
                "routed_home": sum(c[t] for t, c in routing.items()) / sum(sum(c.values()) for c in routing.values())})
        model.detach()
    run.manifest = whole
    print(f"\n{'':>3} {'':20}{'bases':>12}{'':>8}{'commit':>8}{'ms per token':>26}{'perplexity':>12}{'forgetting %':>16}{'routed':>8}")
    print(f"{'n':>3} {'task':20}{'read + new':>12}{'MB':>8}{'ms':>8}{'bare':>10}{'stored':>8}{'routed':>8}{'learned':>12}{'stored':>8}{'routed':>8}{'home %':>8}")
    for n, x in enumerate(lines, 1):
        print(f"{n:>3} {x['task']:20}{x['bases_read']:>7} +{x['bases_written']:>3}{x['bytes'] / 1e6:>8.2f}{x['commit_ms']:>8.1f}{x['bare_ms']:>10.3f}"
              f"{x['stored_ms']:>8.3f}{x['routed_ms']:>8.3f}{x['learned']:>12.3f}{x['stored_forgetting']:>8.2f}{x['routed_forgetting']:>8.2f}"
              f"{100 * x['routed_home']:>8.1f}")
    return lines


def talk(run, model, tokenizer, args):
    """Answer one prompt; say which version did, and how sure the routing is."""
    prompt = prompt_of({"instruction": args.prompt, "input": args.input})
    if args.version:
        version, gating = named(run, args.version[0])
        ids = [tokenizer(prompt).input_ids]
        new = model.generate(ids, gating(model.probe(ids, run.probe_gating())), tokenizer.eos_token_id, args.max_new_tokens)
        return print(f"{tokenizer.decode(new[0], skip_special_tokens=True).strip()}\n\n[version {version.hash[:12]}, as asked]")
    (text,), found = answer(run, model, tokenizer, [prompt], args.outside, args.max_new_tokens)
    v, home = run.versions[found.choice[0]], bool(found.at_home()[0])
    by = "the bare backbone" if args.outside == "base" and not home else f"version {v.hash[:12]}"
    print(f"{text.strip()}\n\n[{by}; nearest region: {v.task}, {100 * found.probability[0]:.1f} % sure; "
          f"the coordinate is {'inside' if home else 'outside'} it]")


def know(run, model, tokenizer, args):
    """Measure one run folder as it is now, print it, and return it as it goes to --json."""
    rows = run.manifest["results"][:len(run.tasks) - 1] + [measure(run, model, tokenizer, args.outside)]
    run.manifest["results"] = rows
    report(run)
    out = {"tasks": run.tasks, "base": rows[-1]["base"],
           "R": {k: [[row[k].get(t) for t in run.tasks] for row in rows] for k in ("stored", "routed")},
           "forgetting": {k: forgetting(rows, k) for k in ("stored", "routed")},
           **{k: rows[-1][k] for k in ("routing", "inside", "identical", "gating", "drift")},
           "config": {"backbone": run.manifest["backbone"], "outside": args.outside, **provenance(),
                      **{v.task: {"lock": v.lock, **v.config} for v in run.versions}}}
    if args.exact_match is not None:
        out["exact_match"] = exact_match(run, model, tokenizer, args.outside, args.max_new_tokens, args.exact_match)
    if args.version:
        out["under"] = under(run, model, tokenizer, args.version)
    if args.bench:
        out["bench"] = bench(run, model, tokenizer, args.bench)
    if args.stream:
        out["growth"] = growth(run, model, tokenizer)
    return out


def summary(outs):
    """Lines of a table over several runs of the same tasks (seeds, say): mean and standard deviation."""
    def over(values):
        return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    yield f"{'task':8}  protocol  {'base':>16}  {'learned':>16}  {'now':>16}  {'forgetting %':>16}  {'routed home %':>16}"
    for i, t in enumerate(outs[0]["tasks"]):
        for protocol in ("stored", "routed"):
            columns = [over([o["base"][t] for o in outs]), over([o["R"][protocol][i][i] for o in outs]), over([o["R"][protocol][-1][i] for o in outs]),
                       over([o["forgetting"][protocol][t] for o in outs]),
                       over([100 * o["routing"][t][t] / sum(o["routing"][t].values()) for o in outs]) if protocol == "routed" else ""]
            yield f"{t:8}  {protocol}  " + "  ".join(f"{c:>16}" for c in columns)


def main(argv=None):
    p = argparse.ArgumentParser(description="Measure what a run folder knows.")
    p.add_argument("--run", nargs="+", help="run folder, or several for mean and deviation [the latest under runs/]")
    p.add_argument("--device", help="cpu, cuda, mps [what is there]")
    p.add_argument("--outside", choices=["nearest", "base"], default="nearest",
                   help="who answers a prompt outside every region: the nearest version or the bare backbone")
    p.add_argument("--json", metavar="FILE", help="write what was measured")
    p.add_argument("--exact-match", nargs="?", type=number(int, 0), const=0, metavar="SHOW",
                   help="generate answers to the validation prompts and count the right ones; print SHOW of each task")
    p.add_argument("--version", nargs="+", metavar="NAME", help="measure every task under these, or let the first answer the --prompt")
    p.add_argument("--bench", type=number(int, 1), metavar="N", help="time a training step N times, beside peft's LoRA and plain loops")
    p.add_argument("--stream", type=number(int, 1, 72), metavar="N", help="first learn N kinds of instruction, a task each, in --run [runs/stream]")
    p.add_argument("--prompt", help="an instruction to answer, instead of measuring")
    p.add_argument("--input", default="", help="the input that goes with --prompt")
    p.add_argument("--max-new-tokens", type=number(int, 1), default=128)
    args = p.parse_args(argv)
    folders = args.run or ["runs/stream" if args.stream else latest_run()]
    if args.prompt and len(folders) > 1:
        raise Refused("--prompt talks to one run folder")
    outs = []
    for folder in folders:
        if args.stream:
            with torch.enable_grad():
                stream(folder, args.stream, pick_device(args.device))
        run = Run(folder)
        if not run.tasks:
            raise Refused(f"{run.folder}: nothing has been committed there yet")
        device = pick_device(args.device)
        backbone, tokenizer = open_backbone(run, run.manifest["backbone"]["name"], device)
        model = open_model(run, backbone, tokenizer)
        if args.prompt:
            return talk(run, model, tokenizer, args)
        outs.append(know(run, model, tokenizer, args))
    if len(outs) > 1:
        print(f"\nmean and standard deviation over {len(outs)} runs")
        for line in summary(outs):
            print(line)
    if args.json:
        with atomic(pathlib.Path(args.json)) as tmp:
            tmp.write_text(json.dumps(outs[0] if len(outs) == 1 else outs, indent=1))
        print(f"written to {args.json}")


if __name__ == "__main__":
    try:
        with torch.no_grad():
            main()
    except (Refused, OSError) as e:
        raise SystemExit(f"eval.py: {e}")
