"""Learn one capability after another on one frozen backbone.

    python train.py --task alpaca                  # learn, commit region "alpaca", report
    python train.py --task code --lock             # a second version; the first stays bit-identical
    python train.py --task mine --data my.json --lock   # your own: a JSON list of instruction, input, output
    python train.py --task synthetic               # the FTN experiments, see synthetic.py

The path of an example: read_records -> encode -> probe (model.py) -> coordinate -> gating (field.py) -> logits -> loss,
Eq. (9). After the last step the task is committed (commit.py), every task is measured, and the table is printed.

The three locks are one loop. What may be written is decided in one place, `writable`. Training can be killed at any
moment: the same command goes on from `training.safetensors` and ends with the same bits.

Held here: sections 3.4, 3.6 and 5.1 of the paper, Eq. (9). The learning rate is our choice, the paper's did not survive:
2e-4; 2e-3 for the tiny backbone, whose adapters are as small as it is.
"""
import argparse
import copy
import hashlib
import json
import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")   # one progress bar, ours
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same bits twice on a GPU, too

try:
    import resource
except ImportError:  # Windows
    resource = None

import torch
import transformers
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import synthetic
from commit import Region, Run, Version, atomic, check_name, drift, lock_loss, sample_anchors, separation_loss, take_snapshot
from field import CoordinateDynamics, WeightField, top_k_gating
from model import NIWF, Refused, fingerprint, hub_or_cache, load_backbone, pad_of, perplexity, response_nll

HERE = pathlib.Path(__file__).parent
MISTRAL = "mistralai/Mistral-7B-v0.1"
HUB_DATA = {"alpaca": ("yahma/alpaca-cleaned", "alpaca_data_cleaned.json"),
            "code": ("sahil2801/CodeAlpaca-20k", "code_alpaca_20k.json")}
EVAL_BATCH = 16   # fixed, so that a later evaluation computes the same bits
SAVE_EVERY = 20   # seconds between two saved states, more where saving is slow: it may take 5 % of the time

# The paper's values (its table of hyperparameters), and what the tiny backbone changes.
PAPER = dict(examples=4000, val_examples=400, epochs=1, max_len=256, lr=2e-4, grad_accum=16, batch=1, rank=8, bases=16,
             top_k=8, alpha=16.0, coord_dim=64, field_hidden=256, anchors=256, quantile=0.95, lambda_lock=5.0,
             lambda_sep=0.01, margin=0.0, lambda_budget=0.001, pool="prompt", probe="bare", fixed_coordinate=False)
TINY = dict(epochs=2, lr=2e-3, grad_accum=1, batch=16)
FIXED_BY_FIRST_TASK = ("rank", "alpha", "coord_dim", "pool", "probe", "fixed_coordinate")


# ------------------------------------------------------------------------------------------------------- options

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, low, high=math.inf):
    """An argparse type: a number in [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of type {kind.__name__}")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: at least {low:g}" + (f", at most {high:g}" if high < math.inf else ""))
        return value
    return parse


def parse_options(argv=None):
    p = Parser(prog="train.py", description="Learn a capability, commit it, report.", argument_default=argparse.SUPPRESS,
               epilog="Defaults in brackets are the paper's, but for lr, margin, lambda-budget, pool and probe, which are our choice; those "
               f"of the tiny backbone differ in {', '.join(f'{k} {v:g}' for k, v in TINY.items())}. {', '.join(FIXED_BY_FIRST_TASK)} "
               "are fixed by a run's first task.")
    count, weight = number(int, 1), number(float, 0)

    def add(group, name, help, **kwargs):
        key = name[2:].replace("-", "_")
        group.add_argument(name, help=help + (f" [{PAPER[key]}]" if key in PAPER and "action" not in kwargs else ""), **kwargs)
    g = p.add_argument_group("what to learn, from what, on what")
    add(g, "--task", "name of the capability; alpaca and code bring their data, any other name needs --data", required=True)
    add(g, "--data", "JSON list of records with instruction, input, output", default=None)
    add(g, "--val-data", "the same, for validation; else part of the data is held out", default=None)
    add(g, "--backbone", f"tiny, a Hub id, a local folder, FILE.gguf or random:mistral-7b [{MISTRAL} on a GPU with 20 GB, else tiny]", default=None)
    add(g, "--device", "cpu, cuda, mps [what is there]", default=None)
    add(g, "--out", "run folder [runs/<backbone>]", default=None)
    add(g, "--examples", "training examples", type=count)
    add(g, "--val-examples", "validation examples", type=count)
    g = p.add_argument_group("optimisation")
    add(g, "--epochs", "passes over the examples", type=count)
    add(g, "--max-len", "tokens of prompt and response together; longer records are left out", type=number(int, 8))
    add(g, "--lr", "peak learning rate of AdamW", type=weight)
    add(g, "--grad-accum", "micro-batches per step", type=count)
    add(g, "--batch", "sequences per micro-batch", type=count)
    add(g, "--seed", "of initial weights, data order and anchors", type=number(int, 0), default=0)
    g = p.add_argument_group("bank, field and coordinate (sections 3.1-3.3)")
    add(g, "--rank", "r, rank of a basis", type=count)
    add(g, "--bases", "N, bases that a task adds to the bank; with --lock soft or none, that the one bank holds", type=count)
    add(g, "--top-k", "K, bases active in a layer", type=count)
    add(g, "--alpha", "alpha of Eq. (2)", type=weight)
    add(g, "--coord-dim", "d, dimension of z", type=count)
    add(g, "--field-hidden", "hidden width of Phi", type=count)
    add(g, "--shared-gating", "one row of gating for all layers", action="store_true", default=False)
    add(g, "--pool", "tokens that h_bar is the mean of; the paper pools the whole sequence", choices=["prompt", "sequence"])
    add(g, "--probe", "pass 1 with the bare backbone or, as in the paper, with the adapters at z_0", choices=["bare", "adapted"])
    add(g, "--dense-gating", "ablation: K = N", action="store_true", default=False)
    add(g, "--fixed-coordinate", "ablation: one random z for all inputs", action="store_true")
    g = p.add_argument_group("commitment and locks (sections 3.4, 3.5)")
    add(g, "--lock", "what protects committed tasks: exact (bare --lock), soft (the paper's penalty); absent: nothing",
        nargs="?", const="exact", default="none", choices=["exact", "soft"])
    add(g, "--anchors", "anchors a_j per region", type=count)
    add(g, "--anchor-source", "Gaussian draws or a subsample of real coordinates", choices=["gaussian", "empirical"], default="gaussian")
    add(g, "--quantile", "of the training distances, gives tau, Eq. (11)", type=number(float, 0.01, 1))
    add(g, "--lambda-lock", "weight of L_lock, Eq. (13)", type=weight)
    add(g, "--lambda-sep", "weight of L_sep, Eq. (10)", type=weight)
    add(g, "--margin", "margin of L_sep", type=weight)
    add(g, "--lambda-budget", "weight of L_budget, a constant while K is fixed", type=weight)
    return p.parse_args(argv)


def settle(args, run):
    """Fill in what was not said: the run's fixed settings, then the tiny preset, then the paper. Refuses what cannot be."""
    fixed = run.manifest["settings"]
    for key, value in {**PAPER, **(TINY if args.backbone == "tiny" else {}), **fixed}.items():
        given = getattr(args, key, value)
        if key in fixed and given != value:
            raise Refused(f"--{key.replace('_', '-')} {given} does not fit {run.folder}: its first task fixed {value}; choose another --out")
        setattr(args, key, given)
    if args.lock == "exact" and args.probe == "adapted":
        raise Refused("--lock exact needs --probe bare: an adapted probe moves whenever an adapter is trained")
    if args.top_k > args.bases:
        raise Refused(f"--top-k {args.top_k} is more than --bases {args.bases}")
    check_name("--task", args.task)
    if args.task in [c["task"] for c in run.manifest["compositions"]]:
        raise Refused(f"{run.folder} already has a composition called {args.task}")
    later = {v["lock"] for v in run.manifest["versions"][1:]}
    if later and (args.lock == "exact") != ("exact" in later):
        raise Refused(f"{run.folder} holds tasks trained with --lock {'/'.join(sorted(later))}, which cannot be mixed with "
                      f"--lock {args.lock}; use the same or choose another --out")


# ---------------------------------------------------------------------------------------------------------- data

def read_records(path):
    """A JSON list in Alpaca's format -> list of dicts. Refused with the file and the number of the record."""
    try:
        records = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refused(f"{path}: no such file")
    except (ValueError, OSError) as e:
        raise Refused(f"{path}: not readable as JSON ({e})")
    if not isinstance(records, list) or not records:
        raise Refused(f"{path}: expected a JSON list of records")
    for i, record in enumerate(records, 1):
        for key in ("instruction", "output"):
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise Refused(f"{path}: record {i} has no text under {key!r}")
        if not isinstance(record.get("input", ""), str):
            raise Refused(f"{path}: record {i} has something other than text under 'input'")
    return records


def prompt_of(record):
    """The Alpaca prompt without its preamble, which says the same before every instruction."""
    given = f"\n\n### Input:\n{record['input']}" if record.get("input") else ""
    return f"### Instruction:\n{record['instruction']}{given}\n\n### Response:\n"


def encode(record, tokenizer):
    """-> (prompt ids, response ids that end with EOS)."""
    return (tokenizer(prompt_of(record)).input_ids,
            tokenizer(record["output"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id])


def choose(records, tokenizer, count, max_len):
    """The first `count` usable records, their encoding, and how many were passed over: (records, examples, note)."""
    kept, examples, empty, long = [], [], 0, 0
    for record in records:
        if not record["instruction"].strip() or not record["output"].strip():
            empty += 1
            continue
        example = encode(record, tokenizer)
        if len(example[0]) + len(example[1]) > max_len:
            long += 1
            continue
        kept.append(record)
        examples.append(example)
        if len(kept) == count:
            break
    return kept, examples, f"{len(kept)} ({empty} empty and {long} over {max_len} tokens left out)"


def load_data(args, tokenizer):
    """-> training examples, validation records. Says in one line what was taken."""
    val_file = args.val_data
    if args.data:
        source = args.data
    elif args.task not in HUB_DATA:
        raise Refused(f"--task {args.task} brings no data of its own ({' and '.join(HUB_DATA)} do): name a file with --data")
    elif args.backbone == "tiny":
        source = HERE / "assets" / "data" / f"{args.task}.train.json"
        val_file = val_file or HERE / "assets" / "data" / f"{args.task}.val.json"
    else:
        hub_or_cache()
        try:
            source = hf_hub_download(*HUB_DATA[args.task], repo_type="dataset")
        except Exception as e:  # the hub raises many kinds; to the user they are one
            raise Refused(f"--task {args.task}: {HUB_DATA[args.task][0]} cannot be downloaded ({str(e).splitlines()[0]}); name a file with --data")
    records = {(r["instruction"], r.get("input", "")): r for r in read_records(source)}
    records = [records[prompt] for prompt in sorted(records)]
    random.Random(args.seed).shuffle(records)
    if val_file:
        val = read_records(val_file)
        seen = {(r["instruction"], r.get("input", "")) for r in val}  # no prompt is on both sides
        records = [r for r in records if (r["instruction"], r.get("input", "")) not in seen]
    else:
        cut = max(1, min(args.val_examples, len(records) // 10))
        val, records = records[:cut], records[cut:]
    val, _, val_note = choose(val, tokenizer, args.val_examples, args.max_len)
    _, examples, note = choose(records, tokenizer, args.examples, args.max_len)
    if not examples or not val:
        raise Refused(f"{source}: no usable records (training {note}, validation {val_note})")
    print(f"data      {source}: training {note}, validation {val_note}")
    return examples, val


# ------------------------------------------------------------------------------------------------------ training

def probe_all(model, examples, pool, gating=None):
    """h_bar [n, features] of every example. Batches are fixed, so the same input always gives the same bits."""
    rows = [p if pool == "prompt" else p + r for p, r in examples]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    h_bar = torch.empty(len(rows), model.features, device=model.device)
    for i in range(0, len(order), 4 * EVAL_BATCH):
        chunk = order[i:i + 4 * EVAL_BATCH]
        h_bar[chunk] = model.probe([rows[j] for j in chunk], gating)
    return h_bar


def writable(run, model, args):
    """The difference between the locks, whole: what the new task may write. -> (field, dynamics, hashes of versions it reads).

    exact: new bases and a new field over all bases; the bank's committed bases and the dynamics are read only.
    soft, none: the one bank, field and dynamics of the last version, all of it."""
    torch.manual_seed(args.seed + len(run.versions))
    bank = model.bank
    if run.versions and args.lock != "exact":
        bank.unlock()
        bank.add(max(0, args.bases - len(bank)))
        field = run.versions[-1].field.grown(len(bank)).requires_grad_(True)
        dynamics = copy.deepcopy(run.versions[-1].dynamics).requires_grad_(True)
    else:
        bank.add(args.bases)
        field = WeightField(1 if args.shared_gating else bank.layers, len(bank), args.coord_dim, args.field_hidden)
        dynamics = run.versions[0].dynamics if run.versions else CoordinateDynamics(model.features, args.coord_dim, args.fixed_coordinate)
        old = len(bank) - args.bases
        if old:  # start with the top K among the task's own: of many bases, hardly one of a random top K could be trained
            with torch.no_grad():
                logits = field(torch.zeros(1, args.coord_dim))[0]                                 # [L, N]
                behind = logits[:, :old].max(1).values - logits[:, old:].topk(args.top_k).values[:, -1]
                field.w3.bias.view(field.layers, -1)[:, old:] += behind.clamp(min=0)[:, None]
    reads = [v.hash for v in run.versions] if args.lock == "exact" else []
    return field.to(model.device), dynamics.to(model.device), reads


class Training:
    """What a training step changes, by name, and the file that can bring it all back."""

    def __init__(self, path, bank, field, dynamics, lr):
        self.path, self.step = path, 0
        self.weights = {f"bank.{k}": p for k, p in bank.live.items()}
        self.weights |= {f"{name}.{k}": p for name, m in (("field", field), ("dynamics", dynamics))
                         for k, p in m.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=lr, weight_decay=0.01, fused=True)

    def save(self, about):
        """about: what identifies this training (task, options, data); a state is only taken up by the same training."""
        tensors = {k: p.data for k, p in self.weights.items()}
        for key, p in self.weights.items():
            tensors |= {f"{moment}.{key}": t for moment, t in self.optimizer.state[p].items()}
        with atomic(self.path) as tmp:
            save_file(tensors, tmp, {"about": json.dumps(about), "step": str(self.step)})

    def resume(self, about):
        """Continue from the file, if there is one. Refused if it belongs to another training or is damaged."""
        if not self.path.exists():
            return
        try:
            with safe_open(self.path, "pt", device=str(next(iter(self.weights.values())).device)) as f:
                was, self.step = json.loads(f.metadata()["about"]), int(f.metadata()["step"])
                differs = [k for k in about if was.get(k) != about[k]]
                if differs:
                    k = differs[0]
                    raise Refused(f"{self.path}: an unfinished training with {k} {was.get(k)}, not {about[k]}; finish it with the "
                                  "command it was started with, or delete that file to give it up")
                for key, p in self.weights.items():
                    p.data.copy_(f.get_tensor(key))
                    self.optimizer.state[p] = {moment: f.get_tensor(f"{moment}.{key}") for moment in ("step", "exp_avg", "exp_avg_sq")}
        except Refused:
            raise
        except Exception as e:  # safetensors raises its own error type, a KeyError or a ValueError
            raise Refused(f"{self.path}: damaged training state ({e}); delete it to start this task anew") from e


def learning_rate(step, total, peak):
    """Linear warm-up over the first 5 % of the steps, then cosine to zero (section 5.1)."""
    warm = max(1, round(0.05 * total))
    return peak * (step + 1) / warm if step < warm else peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def learn(run, model, examples, args):
    """Train one task and commit it as a version. Raises KeyboardInterrupt, with everything saved, when asked to stop."""
    field, dynamics, reads = writable(run, model, args)
    top_k = len(model.bank) if args.dense_gating else args.top_k
    protected = run.versions if args.lock == "soft" else []
    z0_gating = lambda: top_k_gating(field(dynamics.z0[None]), top_k)  # noqa: E731  (pass 1 of the paper's own setting)
    h_bar = probe_all(model, examples, args.pool) if args.probe == "bare" else None  # once: a bare probe never changes

    about = {k: v for k, v in sorted(vars(args).items()) if k not in ("data", "val_data", "val_examples", "backbone", "device", "out")}
    about["examples"], about["data"] = len(examples), hashlib.sha256(json.dumps(examples).encode()).hexdigest()[:16]
    training = Training(run.folder / "training.safetensors", model.bank, field, dynamics, args.lr)
    training.resume(about)
    per_step = args.batch * args.grad_accum
    steps_per_epoch = math.ceil(len(examples) / per_step)
    total = args.epochs * steps_per_epoch
    log = open(run.folder / "log.jsonl", "a", buffering=1)
    log.write(json.dumps({"task": args.task, "start": training.step, "options": about, **provenance()}) + "\n")
    stop = []  # an interrupt in the middle of an update would tear it: note it, and stop between two steps
    before = {s: signal.signal(s, lambda *_: stop.append(1)) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=total, initial=training.step, desc=args.task, unit="step", dynamic_ncols=True)
    tokens_seen, started, saved, save_time, average = 0, time.time(), time.time(), 0, None
    try:
        while training.step < total:
            step = training.step
            epoch = torch.Generator().manual_seed(1_000_003 * args.seed + step // steps_per_epoch)
            order = torch.randperm(len(examples), generator=epoch)
            chosen = order[step % steps_per_epoch * per_step:][:per_step].tolist()
            chosen.sort(key=lambda i: len(examples[i][0]) + len(examples[i][1]))  # micro-batches of like lengths: less padding
            responses = sum(len(examples[i][1]) for i in chosen)
            losses = torch.zeros(4)
            for micro in (chosen[i:i + args.batch] for i in range(0, len(chosen), args.batch)):
                batch, share = [examples[i] for i in micro], len(micro) / len(chosen)
                h = h_bar[micro] if h_bar is not None else probe_all(model, batch, args.pool, z0_gating())
                z = dynamics(h)                                                 # [B, d]
                logits, labels = model.logits(batch, top_k_gating(field(z), top_k))
                # Eq. (9): L = L_LM + lambda_lock L_lock + lambda_sep L_sep + lambda_budget L_budget
                terms = torch.stack([response_nll(logits, labels).sum().to(z.device) / responses,
                                     args.lambda_lock * share * lock_loss(field, protected),
                                     args.lambda_sep * share * separation_loss(z, [v.region for v in protected], args.margin),
                                     z.new_tensor(args.lambda_budget * share * top_k / len(model.bank))])
                terms.sum().backward()
                losses += terms.detach().cpu()
                tokens_seen += sum(len(p) + len(r) for p, r in batch)
            torch.nn.utils.clip_grad_norm_(training.weights.values(), 1.0)
            training.optimizer.param_groups[0]["lr"] = learning_rate(step, total, args.lr)
            training.optimizer.step()
            training.optimizer.zero_grad()
            training.step += 1

            average = losses[0] if average is None else 0.9 * average + 0.1 * losses[0]
            speed = tokens_seen / (time.time() - started)
            bar.update()
            bar.set_postfix_str(f"loss {average:.3f}, {speed:.0f} tok/s")
            if training.step % max(1, total // 10) == 0 or training.step == total:
                penalties = f"  lock {losses[1]:.1e}  separation {losses[2]:.1e}" if protected else ""
                tqdm.write(f"step {training.step}/{total}  loss {average:.4f}{penalties}  {speed:.0f} tok/s")
            log.write(json.dumps({"step": training.step, "tok/s": round(speed), **dict(zip(("lm", "lock", "sep", "budget"), losses.tolist()))}) + "\n")
            if stop or training.step == total or time.time() - saved > max(SAVE_EVERY, 20 * save_time):
                saved = time.time()
                training.save(about)
                save_time = time.time() - saved
            if stop:
                raise KeyboardInterrupt(f"stopped and saved at step {training.step} of {total}; the same command goes on from there")
    finally:
        bar.close()
        log.close()
        for s, handler in before.items():
            signal.signal(s, handler)

    with torch.no_grad():  # section 3.5: collect the task's coordinates, fit its region, take the snapshot
        if h_bar is None:
            h_bar = probe_all(model, examples, args.pool, z0_gating())
        z = dynamics(h_bar)
    region = Region.fit(z, args.quantile)
    anchors = sample_anchors(region, z, args.anchors, args.anchor_source, args.seed)
    run.commit(Version(args.task, args.lock if run.versions else "first", reads, top_k, field, dynamics, region, anchors,
                       take_snapshot(field, anchors), {k: p.data for k, p in model.bank.live.items()}, about))
    training.path.unlink()


def provenance():
    """What else the result depends on."""
    try:
        git = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:
        git = ""
    return {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "git": git or None, "python": sys.version.split()[0],
            "torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}


# ----------------------------------------------------------------------------------------------------- measuring

def validation(run, model, tokenizer, task):
    """-> a task's validation examples, in the order that every measurement takes them in batches, and their h_bar."""
    examples = [encode(r, tokenizer) for r in run.validation(task)]
    examples.sort(key=lambda e: len(e[0]) + len(e[1]))  # stable: batches are the same every time
    return examples, probe_all(model, examples, run.manifest["settings"]["pool"], run.probe_gating())


@torch.no_grad()
def measure(run, model, tokenizer, outside="nearest"):
    """Measure every committed task as things stand: one row of R, stored and routed.

    -> {"task", "version": the last one, "base", "stored", "routed": {task: perplexity}, "routing": {task: {task: count}},
    "identical": {task: [examples whose stored logits have the bits they had at commit, examples]},
    "gating": {task: {"sets": different top-K choices a layer makes over all inputs, "bases": exp of the entropy of its weights}},
    "drift": {task: ...}}.
    Perplexity is over response tokens, EOS included, of the validation records kept in the run folder."""
    last = run.manifest["versions"][-1]
    row = {"task": last["task"], "version": last["hash"], "base": {}, "stored": {}, "routed": {}, "routing": {}, "inside": {}, "identical": {}, "gating": {},
           "drift": {}}
    known = {k: v for r in run.manifest["results"] for k, v in r["base"].items()}  # the bare backbone never changes
    for i, task in enumerate(run.tasks):
        examples, h_bar = validation(run, model, tokenizer, task)
        totals = dict.fromkeys(("base", "stored", "routed"), 0.0)
        digests, choices, inside, gatings = [], [], 0, []
        for b in range(0, len(examples), EVAL_BATCH):
            batch, h = examples[b:b + EVAL_BATCH], h_bar[b:b + EVAL_BATCH]
            if task not in known:
                totals["base"] += float(response_nll(*model.logits(batch, None)).sum())
            stored, (routed, found) = run.stored(i, h), run.routed(h, outside)
            gatings.append(stored)
            logits, labels = model.logits(batch, stored)
            digests += [hashlib.sha256(x.float().cpu().numpy().tobytes()).hexdigest()[:16] for x in logits]
            nll = float(response_nll(logits, labels).sum())
            totals["stored"] += nll
            same = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(stored, routed))  # then so are the logits
            totals["routed"] += nll if same else float(response_nll(*model.logits(batch, routed)).sum())
            choices += found.choice.tolist()
            inside = inside + found.inside.sum(0)
        tokens = sum(len(r) for _, r in examples)
        row["base"][task] = known[task] if task in known else perplexity(totals["base"], tokens)
        row["stored"][task], row["routed"][task] = perplexity(totals["stored"], tokens), perplexity(totals["routed"], tokens)
        row["routing"][task] = {t: choices.count(j) for j, t in enumerate(run.tasks)}
        row["inside"][task] = {t: int(inside[j]) for j, t in enumerate(run.tasks)}
        indices, weights = (torch.cat(parts) for parts in zip(*gatings))  # [n, L, K]
        sets = [len(layer.sort(-1).values.unique(dim=0)) for layer in indices.unbind(1)]
        row["gating"][task] = {"sets": sum(sets) / len(sets), "bases": float(torch.special.entr(weights).sum(-1).exp().mean())}
        at_commit = run.folder / "data" / f"{task}.logits.json"
        if not at_commit.exists():
            with atomic(at_commit) as tmp:
                tmp.write_text(json.dumps(digests))
        row["identical"][task] = [sum(a == b for a, b in zip(digests, json.loads(at_commit.read_text()))), len(digests)]
        if run.shared and i < len(run.versions) - 1:
            row["drift"][task] = drift(run, i, h_bar)
    return row


def forgetting(results, protocol):
    """{task j: R[T,j] / R[j,j] - 1} in percent, from rows as `measure` makes them; `protocol` is "stored" or "routed".

    R[i,j] is the perplexity on task j after task i, T the last task. This is the paper's own figure (its table of
    results, "+85.5%"). From the same R: BWT = mean over j < T of R[T,j] - R[j,j] (Lopez-Paz and Ranzato 2017, with the sign
    of a loss: positive is forgetting); FM = mean over j < T of R[T,j] - min over i < T of R[i,j] (Chaudhry et al. 2018)."""
    learned = {r["task"]: r[protocol][r["task"]] for r in results}
    return {t: 100 * (now / learned[t] - 1) for t, now in results[-1][protocol].items()}


def report(run):
    """The table at the end: every task, stored and routed, when it was learned and now."""
    results = run.manifest["results"]
    row, width = results[-1], max(4, *map(len, run.tasks))
    print(f"\nvalidation perplexity after {row['task']} (version {row['version'][:12]})")
    print(f"{'task':{width}}  protocol      base  learned       now  forgetting")
    forgotten = {protocol: forgetting(results, protocol) for protocol in ("stored", "routed")}
    for t in run.tasks:
        learned = next(r for r in results if r["task"] == t)
        for protocol in ("stored", "routed"):
            if protocol == "stored":
                note = "logits bit-identical on {} of {} examples".format(*row["identical"][t])
            else:
                home, n = row["routing"][t].get(t, 0), sum(row["routing"][t].values())
                own, others = row["inside"][t][t], [k for r, k in row["inside"][t].items() if r != t]
                note = f"{100 * home / n:.1f} % routed to {t}; {100 * own / n:.0f} % lie in its region"
                note += f", {100 * max(others) / n:.0f} % in another's" if others else ""
            print(f"{t:{width}}  {protocol}  {row['base'][t]:8.3f} {learned[protocol][t]:8.3f}  {row[protocol][t]:8.3f}  "
                  f"{forgotten[protocol][t]:+8.2f} %  {note}")
    print("\ngating, a layer's mean: " + "; ".join(f"{t} makes {g['sets']:.1f} different top-K choices over all its inputs, its weight lies on "
                                                 f"{g['bases']:.1f} bases" for t, g in row["gating"].items()))
    for t, d in row["drift"].items():
        print(f"\nwhere {t} went: its inputs moved by {d['moved']:.2f} (they were {d['spread']:.2f} from their mean); {100 * d['inside_now']:.1f} % of "
              f"them are still in its region, {100 * d['inside_at_commit']:.1f} % were at commit.\nhow the lock held: L_lock {d['lock_loss']:.1e} at "
              f"its anchors, {100 * d['top_k_kept']:.1f} % of their top-K choices unchanged. A lock on the anchors guards\naddresses; it "
              "holds neither the inputs to their addresses nor the bases that the addresses name.")


def peak_memory(device):
    if device.startswith("cuda"):
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    if not resource:
        return "not known here"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == 'darwin' else 2**20):.2f} GiB"


def pick_device(wanted):
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted and wanted.split(":")[0] not in ("cpu", found):
        raise Refused(f"--device {wanted} is not available here; {found} is")
    return wanted or found


def open_model(run, backbone, tokenizer):
    """The backbone with a bank that holds what the run has committed."""
    model = NIWF(backbone, pad_of(tokenizer), run.manifest["settings"]["rank"], run.manifest["settings"]["alpha"])
    run.load(model)
    return model


def open_backbone(run, name, device):
    """-> (backbone, tokenizer). Refused if the run folder belongs to another backbone."""
    backbone, tokenizer = load_backbone(name, device)
    about, owner = {"name": name, "fingerprint": fingerprint(backbone)}, run.manifest["backbone"]
    if owner and owner["fingerprint"] != about["fingerprint"]:
        raise Refused(f"{run.folder} belongs to another backbone ({owner['name']}) than {name}; choose another --out")
    run.manifest["backbone"] = owner or about
    return backbone, tokenizer


def measure_last(run, backbone, tokenizer):
    """Measure the state after the last task, unless that has been done. A kill may have come between commit and this."""
    if run.manifest["versions"][-1]["hash"] not in {r["version"] for r in run.manifest["results"]}:
        model = open_model(run, backbone, tokenizer)
        run.manifest["results"].append(measure(run, model, tokenizer))
        run.save()
        model.detach()


def work(run, args):
    """Train the task, unless that has been done, and measure everything that the run then knows."""
    torch.use_deterministic_algorithms(args.device.startswith("cuda"), warn_only=True)  # CPU kernels are, and slower when told so
    args.backbone = args.backbone or (run.manifest["backbone"] or {"name": "tiny"})["name"]
    if args.task not in run.tasks:
        settle(args, run)
    backbone, tokenizer = open_backbone(run, args.backbone, args.device)
    print(f"backbone  {args.backbone} on {args.device}, {sum(p.numel() for p in backbone.parameters()):,} frozen parameters")
    if args.task in run.tasks:
        print(f"{args.task} is already committed in {run.folder}: nothing to train")
        measure_last(run, backbone, tokenizer)
    else:
        examples, val = load_data(args, tokenizer)
        if run.tasks:
            measure_last(run, backbone, tokenizer)
        run.manifest["settings"] = {key: getattr(args, key) for key in FIXED_BY_FIRST_TASK}
        with atomic(run.validation_file(args.task)) as tmp:
            tmp.write_text(json.dumps(val))
        model = open_model(run, backbone, tokenizer)
        learn(run, model, examples, args)
        model.detach()
        del model  # its memory, before the same is read back from disk: what is measured is what was saved
        measure_last(run, backbone, tokenizer)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:2] == ["--task", "synthetic"]:
        return synthetic.main(argv[2:])
    args, started = parse_options(argv), time.time()
    args.device = pick_device(args.device)
    if not args.backbone and not args.out:
        roomy = args.device.startswith("cuda") and torch.cuda.get_device_properties(args.device).total_memory >= 20e9
        args.backbone = MISTRAL if roomy else "tiny"
    with Run(args.out or f"runs/{re.sub(r'[^A-Za-z0-9.]+', '-', os.path.basename(args.backbone.rstrip('/')))}").exclusive() as run:
        work(run, args)
    report(run)
    print(f"\n{time.time() - started:.0f} s in all, peak memory {peak_memory(args.device)}; saved in {run.folder}")


if __name__ == "__main__":
    try:
        main()
    except (Refused, OSError, SafetensorError) as e:  # the last two: a full disk, say
        raise SystemExit(f"train.py: {e}")
    except KeyboardInterrupt as e:
        raise SystemExit(f"\ntrain.py: {e or 'stopped'}")
