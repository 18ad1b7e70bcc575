"""What a run folder knows, measured; and a prompt to talk to.

    python eval.py                                   # every task now: base, stored, routed, forgetting
    python eval.py --exact-match                     # greedy answers to the validation prompts, per kind of instruction
    python eval.py --prompt "Name three fruits."     # routed: says which version answered, and how sure it is
    python eval.py --json results.json               # R matrices, forgetting, routing, config

Forgetting has two parts and every table prints both. *Stored*: the right version is given, so what is lost was
overwritten. *Routed*: the coordinate decides, as it must when nobody says which task a prompt belongs to.
"""
import argparse
import collections
import json
import pathlib

import torch

from commit import Refused, Run, atomic, latest_run
from train import (EVAL_BATCH, encode, forgetting, measure, number, open_backbone, open_model, peak_memory, pick_device,
                   prompt_of, provenance, report)


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
        records = json.loads((run.folder / "data" / f"{task}.val.json").read_text(encoding="utf-8"))
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


def main(argv=None):
    p = argparse.ArgumentParser(description="Measure what a run folder knows.")
    p.add_argument("--run", help="run folder [the latest under runs/]")
    p.add_argument("--device", help="cpu, cuda, mps [what is there]")
    p.add_argument("--outside", choices=["nearest", "base"], default="nearest",
                   help="who answers a prompt outside every region: the nearest version or the bare backbone")
    p.add_argument("--json", metavar="FILE", help="write what was measured")
    p.add_argument("--exact-match", nargs="?", type=number(int, 0), const=0, metavar="SHOW",
                   help="generate answers to the validation prompts and count the right ones; print SHOW of each task")
    p.add_argument("--prompt", help="an instruction to answer, instead of measuring")
    p.add_argument("--input", default="", help="the input that goes with --prompt")
    p.add_argument("--max-new-tokens", type=number(int, 1), default=128)
    args = p.parse_args(argv)
    run = Run(args.run or latest_run())
    if not run.tasks:
        raise Refused(f"{run.folder}: nothing has been committed there yet")
    device = pick_device(args.device)
    backbone, tokenizer = open_backbone(run, run.manifest["backbone"]["name"], device)
    model = open_model(run, backbone, tokenizer)

    if args.prompt:
        (text,), found = answer(run, model, tokenizer, [prompt_of({"instruction": args.prompt, "input": args.input})], args.outside, args.max_new_tokens)
        v = run.versions[found.choice[0]]
        home = bool(found.at_home()[0])
        by = "the bare backbone" if args.outside == "base" and not home else f"version {v.hash[:12]}"
        print(f"{text.strip()}\n\n[{by}; nearest region: {v.task}, {100 * found.probability[0]:.1f} % sure; the coordinate is {'inside' if home else 'outside'} it]")
        return
    out = {"tasks": run.tasks}
    rows = run.manifest["results"][:len(run.tasks) - 1] + [measure(run, model, tokenizer, args.outside)]
    run.manifest["results"] = rows
    report(run)
    out["base"] = rows[-1]["base"]
    out["R"] = {k: [[row[k].get(t) for t in run.tasks] for row in rows] for k in ("stored", "routed")}
    out["forgetting"] = {k: forgetting(rows, k) for k in ("stored", "routed")}
    out["routing"] = rows[-1]["routing"]
    out |= {k: rows[-1][k] for k in ("inside", "identical", "drift")}
    out["config"] = {"backbone": run.manifest["backbone"], "outside": args.outside, "memory": peak_memory(device), **provenance(),
                     **{v.task: {"lock": v.lock, **v.config} for v in run.versions}}
    if args.exact_match is not None:
        out["exact_match"] = exact_match(run, model, tokenizer, args.outside, args.max_new_tokens, args.exact_match)
    if args.json:
        with atomic(pathlib.Path(args.json)) as tmp:
            tmp.write_text(json.dumps(out, indent=1))
        print(f"written to {args.json}")


if __name__ == "__main__":
    try:
        with torch.no_grad():
            main()
    except (Refused, OSError) as e:
        raise SystemExit(f"eval.py: {e}")
