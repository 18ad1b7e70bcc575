"""Learn one capability after another on one frozen backbone.

    python train.py --task alpaca                  # learn, commit region "alpaca", report
    python train.py --task code --lock             # a second version; the first stays bit-identical
    python train.py --task mine --data my.jsonl --lock   # your own, see `plain_record` in commit.py
    python train.py --stream 76                    # 76 kinds of instruction, one after another, exact lock
    python train.py --task synthetic               # the FTN experiments, see synthetic.py
    torchrun --nproc_per_node 2 train.py --task alpaca  # in two processes, each with a GPU, or on the CPU

Of several processes each computes its share of every step and of the measuring, and the sums are those of one
process; the first alone writes and prints. When one ends, all end, and the same command goes on.

The path of an example: read_records (commit.py) -> encode -> probe (model.py) -> coordinate -> gating
(field.py) -> logits -> loss, Eq. (9). After the last step the task is committed (commit.py), every task is
measured (eval.py), and the table is printed.

The three locks are one loop. What may be written is decided in one place, `writable`. Training can be killed
at any moment: the same command goes on from `training.safetensors` and ends with the same bits.

Held here: sections 3.4, 3.6 and 5.1 of the NIWF paper, Eq. (9). The learning rate is our choice, the paper's
did not survive: 2e-4; 1e-3 for the tiny backbone, whose adapters are as small as it is. alpha is 128 in place
of 16: the weights of Eq. (7) sum to 1, so that the paper's update is 1/K of that of a LoRA of rank K r.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while torch is being imported: one line, no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"\ntrain.py: stopped\n") and 130))

import argparse
import collections
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import random
import re
import sys
import tempfile
import time

try:
    import resource
except ImportError:  # Windows
    resource = None

from commit import Run, Version
from eval import measure_last, probe_all, report
from model import NIWF, response_nll
from plumbing import Refused
from plumbing.backbone import hub_or_cache, pick_device
from plumbing.command import number, Parser, provenance, run_program
from plumbing.files import atomic, check_name, put_aside, validate
from plumbing.passes import choose_targets, positions_of
from plumbing.processes import any_process, first_alone, rank_and_size, sum_over_processes
from plumbing.prompts import encode
from plumbing.records import read_records
from plumbing.targets import describe_targets
from field import CoordinateDynamics, Region, WeightField, lock_loss, sample_anchors, separation_loss
from field import take_snapshot, top_k_gating

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

DATA = pathlib.Path(__file__).parent / "assets" / "data"
HUB_DATA = {
    "alpaca": ("yahma/alpaca-cleaned", "alpaca_data_cleaned.json"),
    "code": ("sahil2801/CodeAlpaca-20k", "code_alpaca_20k.json"),
}
MISTRAL = "mistralai/Mistral-7B-v0.1"
MISTRAL_BYTES = 24.7e9  # 23.3 GB by count for its second task (eval.py --memory), the rest for CUDA
LENGTH_WINDOW = 4  # steps among whose examples those of like length are put together
SAVE_EVERY = 20  # seconds between two saved states; more where saving takes over 5 % of the time

# The paper's values (its table of hyperparameters), and what the tiny backbone changes.
# fmt: off
PAPER_VALUES = dict(examples=4000, val_examples=400, epochs=1, max_len=256, lr=2e-4, grad_accum=16, batch=1,
                    rank=8, bases=16, top_k=8, alpha=128.0, coord_dim=64, field_hidden=256, anchors=256,
                    quantile=0.95, lambda_lock=5.0, lambda_sep=0.01, margin=0.0, lambda_budget=0.001,
                    pool="prompt", probe="bare", fixed_coordinate=False, template="alpaca", targets="all")
TINY_VALUES = dict(epochs=2, lr=1e-3, grad_accum=1, batch=16)
FIXED_BY_FIRST_TASK = "rank alpha coord_dim pool probe fixed_coordinate template targets".split()

COUNT, SIZE = dict(type=number(int, 1)), dict(type=number(int, 1, 4096))
WEIGHT, FLAG, TEXT = dict(type=number(float, 0, 1e6)), dict(action="store_true"), {}
OPTIONS = {
    "what to learn, from what, on what": {
        "--task": ("name of the capability; alpaca and code bring their data, others need --data", TEXT),
        "--stream": ("instead: N kinds of instruction, a task each", dict(type=number(int, 1, 76))),
        "--data": ("JSON list or lines of instruction, input, output; prompt, completion; or messages", TEXT),
        "--val-data": ("the same, for validation; else part of the data is held out", TEXT),
        "--template": ("of prompts; chat: the tokenizer's", dict(choices=["alpaca", "chat"])),
        "--backbone": ("tiny, a Hub id, a folder, FILE.gguf, random:mistral-7b [Mistral-7B or tiny]", TEXT),
        "--device": ("cpu, cuda, mps [what is there]", TEXT),
        "--device-map": ("spread a backbone over all GPUs, then memory, then disk", dict(choices=["auto"])),
        "--out": ("run folder [runs/<backbone>, runs/stream]", TEXT),
        "--examples": ("training examples", COUNT),
        "--val-examples": ("validation examples", COUNT)},
    "optimisation": {
        "--epochs": ("passes over the examples", COUNT),
        "--max-len": ("tokens of prompt and response; longer are left out", dict(type=number(int, 8, 99999))),
        "--lr": ("peak learning rate of AdamW", WEIGHT),
        "--grad-accum": ("micro-batches per step", COUNT),
        "--batch": ("sequences per micro-batch", COUNT),
        "--checkpointing": ("keep the inputs of layers alone, compute the rest again: less memory", FLAG),
        "--seed": ("of weights, data order and anchors", dict(type=number(int, 0, 2**31), default=0))},
    "bank, field and coordinate (sections 3.1-3.3)": {
        "--rank": ("r, rank of a basis", SIZE),
        "--bases": ("N, bases that a task adds; with --lock soft or none, that the one bank holds", SIZE),
        "--top-k": ("K, bases active in a layer", SIZE),
        "--alpha": ("alpha of Eq. (2)", WEIGHT),
        "--targets": ("last names of the linear modules to adapt, commas between them; all: every one in the "
                      "layers of the text model, routers apart", TEXT),
        "--coord-dim": ("d, dimension of z", SIZE),
        "--field-hidden": ("hidden width of Phi", SIZE),
        "--shared-gating": ("one row of gating for all layers", FLAG),
        "--pool": ("tokens in the mean h_bar; the paper's: sequence", dict(choices=["prompt", "sequence"])),
        "--probe": ("pass 1 bare or, the paper's, with adapters at z_0", dict(choices=["bare", "adapted"])),
        "--dense-gating": ("ablation: K = N", FLAG),
        "--fixed-coordinate": ("ablation: one random z for all inputs", FLAG)},
    "commitment and locks (sections 3.4, 3.5)": {
        "--lock": ("what protects committed tasks: exact (bare --lock), soft (the paper's); absent: nothing",
                   dict(nargs="?", const="exact", default="none", choices=["exact", "soft"])),
        "--anchors": ("anchors a_j per region", dict(type=number(int, 1, 10**6))),
        "--anchor-source": ("draws or a sample", dict(choices=["gaussian", "empirical"], default="gaussian")),
        "--quantile": ("of the training distances, gives tau, Eq. (11)", dict(type=number(float, 0.01, 1))),
        "--lambda-lock": ("weight of L_lock, Eq. (13)", WEIGHT),
        "--lambda-sep": ("weight of L_sep, Eq. (10)", WEIGHT),
        "--margin": ("margin of L_sep", WEIGHT),
        "--lambda-budget": ("weight of L_budget, a constant while K is fixed", WEIGHT)}}
# fmt: on


# ---------------------------------------------------------------------------------------------------- options


def parse_options(argv=None):
    about = ", ".join(f"{key} {value:g}" for key, value in TINY_VALUES.items())
    epilog = (
        "Defaults are the paper's, but for lr, alpha, margin, lambda-budget, pool, probe and template: ours. "
    )
    epilog += f"Tiny has {about}. {', '.join(FIXED_BY_FIRST_TASK)} are fixed by a run's first task."
    p = Parser(__doc__, prog="train.py", epilog=epilog)
    for title, options in OPTIONS.items():
        group = p.add_argument_group(title)
        for flag, (text, how) in options.items():
            key = flag[2:].replace("-", "_")
            if key in PAPER_VALUES:  # absent, so that `fill_in` knows what was said
                text += f" [{PAPER_VALUES[key]}]" if how is not FLAG else ""
                how = {**how, "default": argparse.SUPPRESS}
            group.add_argument(flag, help=text, **how)
    args = p.parse_args(argv)
    if (args.task is None) == (args.stream is None):
        p.error("say what to learn: --task NAME, or --stream N")
    others = ("data", "val_data", "backbone", "checkpointing", "device_map")
    said = {*vars(args)} & {*PAPER_VALUES} | {key for key in others if vars(args)[key]}
    if args.stream and said:
        p.error(f"--stream goes with --device and --out alone, not with {', '.join(sorted(said))}")
    return args


def fill_in(args, run):
    """Fill in what was not said: the run's fixed settings, then the tiny preset, then the paper. Refused:
    what cannot be."""
    fixed = run.manifest["settings"] if run.tasks else {}
    preset = TINY_VALUES if args.backbone == "tiny" else {}
    for key, value in {**PAPER_VALUES, **preset, **fixed}.items():
        given = getattr(args, key, value)
        if key in fixed and given != value:
            option = f"--{key.replace('_', '-')} {given}"
            raise Refused(f"{option} does not fit {run.folder}: its first task fixed {value}")
        setattr(args, key, given)
    if args.lock == "exact" and args.probe == "adapted":
        raise Refused("--lock exact needs --probe bare: an adapted probe moves when adapters are trained")
    if args.top_k > args.bases:
        raise Refused(f"--top-k {args.top_k} is more than --bases {args.bases}")
    check_name("--task", args.task)
    if args.task in [c["task"] for c in run.manifest["compositions"]]:
        raise Refused(f"{run.folder} already has a composition called {args.task}")
    later = {v["lock"] for v in run.manifest["versions"][1:]}
    if later and (args.lock == "exact") != ("exact" in later):
        raise Refused(
            f"{run.folder} holds tasks trained with --lock {'/'.join(sorted(later))}, which cannot be mixed "
            f"with --lock {args.lock}; use the same or choose another --out"
        )


# ------------------------------------------------------------------------------------------------------- data


def take_usable(records, tokenizer, count, max_len, template):
    """The first `count` usable records, their encoding, and what was passed over: (records, examples,
    note)."""
    kept, examples, empty, long = [], [], 0, 0
    for record in records:
        if not record["instruction"].strip() or not record["output"].strip():
            empty += 1
            continue
        example = encode(record, tokenizer, template)
        if len(example[0]) + len(example[1]) > max_len:
            long += 1
            continue
        kept.append(record)
        examples.append(example)
        if len(kept) == count:
            break
    return kept, examples, f"{len(kept)} ({empty} empty and {long} over {max_len} tokens left out)"


def find_data(args):
    """-> (file of training records, file of validation records or None). Refused: there are none."""
    if args.data:
        return args.data, args.val_data
    if args.task not in HUB_DATA:
        known = " and ".join(HUB_DATA)
        raise Refused(f"--task {args.task} brings no data of its own ({known} do): name a file with --data")
    if args.backbone == "tiny":
        return DATA / f"{args.task}.train.json", args.val_data or DATA / f"{args.task}.val.json"
    hub_or_cache()
    repository, name = HUB_DATA[args.task]
    try:
        return hf_hub_download(repository, name, repo_type="dataset"), args.val_data
    except Exception as e:  # the hub raises many kinds; to the user they are one
        raise Refused(f"--task {args.task}: {repository} cannot be had ({e}); name a file with --data") from e


def load_data(args, tokenizer):
    """-> training examples, validation records. Says in one line what was taken."""
    source, val_file = find_data(args)
    prompt = lambda r: (r["instruction"], r.get("input", ""), json.dumps(r.get("history", [])))
    records = {prompt(r): r for r in read_records(source, args.template)}
    records = [records[key] for key in sorted(records)]
    random.Random(args.seed).shuffle(records)
    if val_file:
        val = read_records(val_file, args.template)
        seen = {prompt(r) for r in val}  # no prompt is on both sides
        records = [r for r in records if prompt(r) not in seen]
    else:
        cut = max(1, min(args.val_examples, len(records) // 10))
        val, records = records[:cut], records[cut:]
    how = args.max_len, args.template
    val, _, val_note = take_usable(val, tokenizer, args.val_examples, *how)
    _, examples, note = take_usable(records, tokenizer, args.examples, *how)
    if not examples or not val:
        raise Refused(f"{source}: no usable records (training {note}, validation {val_note})")
    print(f"data      {source}: training {note}, validation {val_note}")
    return examples, val


# -------------------------------------------------------------------------------------- what a task may write


@dataclasses.dataclass
class Learner:
    """What learns a task: the model with its bank, a field and the dynamics."""

    model: NIWF
    field: WeightField
    dynamics: CoordinateDynamics
    top_k: int
    reads: list  # hashes of the versions whose bases it may read, but not write
    protected: list  # versions whose anchors hold the field: those of the soft lock

    def gating(self, z):
        """z [B, d] -> (indices, weights), both [B, L, K]."""
        return top_k_gating(self.field(z), self.top_k)

    def probe(self, examples, args, split=True):
        """h_bar [n, features] of an adapted probe, the paper's own: pass 1 with the gating at z_0."""
        return probe_all(self.model, examples, args.pool, self.gating(self.dynamics.z0[None]), split)

    def weights(self):
        """What training changes, by name. A fixed coordinate has nothing to learn."""
        modules = {"field": self.field} | ({} if self.dynamics.fixed else {"dynamics": self.dynamics})
        weights = {f"bank.{key}": p for key, p in self.model.bank.live.items()}
        for name, module in modules.items():
            weights |= {f"{name}.{key}": p for key, p in module.named_parameters() if p.requires_grad}
        return weights


def writable(run, model, h_bar, args):
    """The difference between the locks, whole: what the new task may write. -> Learner

    exact: new bases and a new field over all bases; the bank's committed bases and the dynamics are read
    only. soft, none: the one bank, field and dynamics of the last version, all of it. h_bar [n, features]: of
    the bare backbone for the task's examples. By those of the first task the dynamics standardise."""
    torch.manual_seed(args.seed + len(run.versions))
    bank = model.bank
    if run.versions and args.lock != "exact":
        bank.unlock()
        bank.add(max(0, args.bases - len(bank)))
        field = run.versions[-1].field.grown(len(bank)).requires_grad_(True).to(model.device)
        dynamics = copy.deepcopy(run.versions[-1].dynamics).requires_grad_(True)
    else:
        old = len(bank)
        bank.add(args.bases)
        layers = 1 if args.shared_gating else bank.layers
        field = WeightField(layers, len(bank), args.coord_dim, args.field_hidden).to(model.device)
        if run.versions:
            dynamics = run.versions[0].dynamics
            lead_with_own(field, old, args.top_k, dynamics(h_bar))
        else:
            dynamics = CoordinateDynamics(model.features, args.coord_dim, args.fixed_coordinate)
            dynamics.to(model.device).standardise(h_bar)
    return Learner(
        model=model,
        field=field,
        dynamics=dynamics,
        top_k=len(bank) if args.dense_gating else args.top_k,
        reads=[v.hash for v in run.versions] if args.lock == "exact" else [],
        protected=run.versions if args.lock == "soft" else [],
    )


@torch.no_grad()
def lead_with_own(field, old, top_k, z):
    """Lift a new field's logits for its own bases, those after the `old` ones, until they are the top K at
    all of the task's coordinates z [n, d]: of many bases, hardly one of a random top K could be trained."""
    logits = field(z)  # [n, L, N]
    behind = logits[..., :old].amax(-1) - logits[..., old:].topk(top_k).values[..., -1]
    lift = behind.amax(0) + 1e-3  # more than rounding takes away again
    field.w3.bias.view(field.layers, -1)[:, old:] += lift.clamp(min=0)[:, None]


# ----------------------------------------------------------------------------------------------- the training


def learning_rate(step, total, peak):
    """Linear warm-up over the first 5 % of the steps, then cosine to zero (section 5.1)."""
    warm = max(1, round(0.05 * total))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


class Training:
    """The state of a training: weights, moments and the number of steps done; and the file that can bring it
    all back.

    As a context it shows a bar, keeps `log.jsonl`, and turns an interrupt into a stop between two steps: in
    the middle of an update it would tear it."""

    def __init__(self, folder, weights, total, about, lr):
        self.folder, self.path, self.total, self.about = folder, folder / "training.safetensors", total, about
        self.weights, self.peak, self.step = weights, lr, 0
        self.optimizer = torch.optim.AdamW(weights.values(), lr=lr, weight_decay=0.01, fused=True)

    @first_alone
    def save(self):
        """`about` identifies the training (task, options, data): a state is only taken up by the same one.
        Refused, and an earlier state kept: the weights are not finite."""
        tensors = {key: p.data for key, p in self.weights.items()}
        if not all(t.isfinite().all() for t in tensors.values()):
            done = f"weights are not finite after step {self.step} of {self.total}"
            raise Refused(f"{done}: delete {self.path}, if it is there, and try a smaller --lr")
        for key, p in self.weights.items():
            tensors |= {f"{moment}.{key}": t for moment, t in self.optimizer.state[p].items()}
        with atomic(self.path) as tmp:
            save_file(tensors, tmp, {"about": json.dumps(self.about), "step": str(self.step)})

    def resume(self):
        """Continue from the file, if there is one. Refused: it belongs to another training, or is not
        whole."""
        if not self.path.exists():
            return
        shapes = {key: p.shape for key, p in self.weights.items()}
        for key, p in self.weights.items():
            shapes |= {f"step.{key}": torch.Size(), f"exp_avg.{key}": p.shape, f"exp_avg_sq.{key}": p.shape}
        try:
            with safe_open(self.path, "pt") as f:
                about, step = json.loads(f.metadata()["about"]), int(f.metadata()["step"])
                for key in sorted({*validate(about, dict, self.path), *self.about}):
                    before, now = (known.get(key, "unsaid") for known in (about, self.about))
                    if before != now:
                        raise Refused(
                            f"{self.path}: an unfinished training with {key} {before}, not {now}; finish it "
                            "as it was started, or delete that file"
                        )
                tensors = {key: f.get_tensor(key) for key in f.keys()}
            for key in {*shapes, *tensors}:
                t = tensors[key]
                if t.shape != shapes[key] or t.dtype != torch.float32 or not t.isfinite().all():
                    raise ValueError(f"{key} has another shape or type, or is not finite")
                if key.startswith("step.") and t != step or key.startswith("exp_avg_sq.") and t.min() < 0:
                    raise ValueError(f"{key} is not what AdamW has after {step} steps")
            if not 0 < step <= self.total:
                raise ValueError(f"step {step} of {self.total}")
        except Refused:
            raise
        except Exception as e:  # safetensors raises its own error type, a KeyError or a ValueError
            raise Refused(f"{self.path}: damaged training state ({e}); delete it to start anew") from e
        self.step = step
        for key, p in self.weights.items():
            p.data.copy_(tensors[key])
            moments = {moment: tensors[f"{moment}.{key}"] for moment in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {moment: t.to(p.device) for moment, t in moments.items()}

    def __enter__(self):
        rank, size = rank_and_size()
        self.log = open(os.devnull if rank else self.folder / "log.jsonl", "a", buffering=1)
        about = {"task": self.about["task"], "start": self.step, "options": self.about, "processes": size}
        self.log.write(json.dumps({**about, **provenance()}) + "\n")
        self.stop = []
        handler = lambda *_: self.stop.append(1)
        self.before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
        bar = dict(total=self.total, initial=self.step, desc=self.about["task"], unit="step")
        self.bar = tqdm(**bar, disable=None)  # None: not where there is no terminal
        self.began = self.saved = time.time()
        self.tokens, self.save_time, self.average = 0, 0, None
        return self

    def __exit__(self, *_):
        self.bar.close()
        self.log.close()
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def add_up(self, losses):
        """What the processes computed of a step adds up to it: to its gradients, and to its losses, which are
        returned."""
        total = torch.tensor([*losses.values()], dtype=torch.float64)
        sum_over_processes(total)
        for p in self.weights.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # where no example was left for it
        sum_over_processes(*(p.grad for p in self.weights.values()))
        return dict(zip(losses, total.tolist()))

    def update(self, losses):
        """One step of AdamW with the gradients that are there. Refused, with the state before it saved: they
        are not finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        if not math.isfinite(norm) or not math.isfinite(sum(losses.values())):
            if self.step:
                self.save()
            raise Refused(
                f"loss or gradient is not finite at step {self.step + 1} of {self.total}; the state before "
                f"it is kept in {self.path}: delete that, and try a smaller --lr"
            )
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, self.total, self.peak)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def after_step(self, losses, tokens):
        """Say how it goes, and keep the state now and then. Raises KeyboardInterrupt, with all saved, when
        asked to stop."""
        lm, self.tokens = losses["lm"], self.tokens + tokens
        self.average = lm if self.average is None else 0.9 * self.average + 0.1 * lm
        speed = self.tokens / (time.time() - self.began)
        self.bar.update()
        self.bar.set_postfix_str(f"loss {self.average:.3f}, {speed:.0f} tok/s")
        if self.step % max(1, self.total // 10) == 0 or self.step == self.total:
            penalties = "".join(f"  {name} {losses[name]:.1e}" for name in ("lock", "sep") if losses[name])
            tqdm.write(f"step {self.step}/{self.total}  loss {self.average:.4f}{penalties} {speed:.0f} tok/s")
        self.log.write(json.dumps({"step": self.step, "tok/s": round(speed), **losses}) + "\n")
        due = time.time() - self.saved > max(SAVE_EVERY, 20 * self.save_time)
        if save := any_process(self.stop or due or self.step == self.total):
            self.saved = time.time()
            self.save()
            self.save_time = time.time() - self.saved
        if save and any_process(self.stop):
            done = f"stopped and saved at step {self.step} of {self.total}"
            raise KeyboardInterrupt(f"{done}; the same command goes on from there")


def loss_terms(learner, batch, h_bar, args, share, responses):
    """NIWF Eq. (9): L = L_LM + lambda_lock L_lock + lambda_sep L_sep + lambda_budget L_budget, its four terms
    by name.

    batch: B examples of a step, h_bar [B, features]. share: B over the examples of the step; responses:
    response tokens of the step. So the terms of a step's micro-batches add up to those of the step."""
    z = learner.dynamics(h_bar)  # [B, d]
    logits, labels = learner.model.logits(batch, learner.gating(z))
    regions = [v.region for v in learner.protected]
    return {
        "lm": response_nll(logits, labels).sum().to(z.device) / responses,
        "lock": args.lambda_lock * share * lock_loss(learner.field, learner.protected),
        "sep": args.lambda_sep * share * separation_loss(z, regions, args.margin),
        "budget": z.new_tensor(args.lambda_budget * share * learner.top_k / len(learner.model.bank)),
    }


def micro_batches(examples, step, args):
    """Indices of the examples of a step, in lists of `--batch`, the same whenever it is asked.

    Padding costs what text costs, so like lengths come together: the shuffled examples of LENGTH_WINDOW steps
    are sorted by length and cut into micro-batches, which are shuffled again."""
    per_step = args.batch * args.grad_accum
    epoch, place = divmod(step, math.ceil(len(examples) / per_step))
    window, place = divmod(place, LENGTH_WINDOW)
    generator = torch.Generator().manual_seed(1_000_003 * args.seed + epoch)
    order = torch.randperm(len(examples), generator=generator).tolist()
    size = LENGTH_WINDOW * per_step
    chosen = sorted(order[window * size :][:size], key=lambda i: sum(map(len, examples[i])))
    micros = [chosen[i : i + args.batch] for i in range(0, len(chosen), args.batch)]
    random.Random(f"{args.seed} {epoch} {window}").shuffle(micros)
    return micros[place * args.grad_accum :][: args.grad_accum]


def take_share(micros, batch):
    """This process's share of a step, in micro-batches of its own: of N processes each takes every N-th
    example."""
    rank, size = rank_and_size()
    if size == 1:
        return micros
    own = [i for micro in micros for i in micro][rank::size]
    return [own[i : i + batch] for i in range(0, len(own), batch)]


def learn(run, learner, examples, h_bar, val, args):
    """Train one task and commit it. h_bar [n, features]: of the bare backbone, for every example; an adapted
    probe does not use it. Raises KeyboardInterrupt, with everything saved, when asked to stop."""
    total = args.epochs * math.ceil(len(examples) / (args.batch * args.grad_accum))
    about = describe_training(examples, args)
    training = Training(run.folder, learner.weights(), total, about, args.lr)
    training.resume()
    run.save()  # from here on this is a run folder
    with training:
        while training.step < total:
            # The examples of this step, in micro-batches.
            micros = micro_batches(examples, training.step, args)
            chosen = [examples[i] for micro in micros for i in micro]
            responses = sum(len(r) for _, r in chosen)
            # Forward and backward: the gradients of the micro-batches add up, over all processes.
            losses = collections.Counter(dict.fromkeys(("lm", "lock", "sep", "budget"), 0.0))
            for micro in take_share(micros, args.batch):
                batch = [examples[i] for i in micro]
                h = learner.probe(batch, args, split=False) if args.probe == "adapted" else h_bar[micro]
                terms = loss_terms(learner, batch, h, args, len(micro) / len(chosen), responses)
                values = torch.stack([*terms.values()])
                values.sum().backward()
                losses.update(dict(zip(terms, values.tolist())))
            losses = training.add_up(losses)
            # Clip, set the learning rate, step.
            training.update(losses)
            # Report, save the state, stop if asked to.
            training.after_step(losses, sum(len(p) + len(r) for p, r in chosen))
    h_bar = learner.probe(examples, args) if args.probe == "adapted" else h_bar
    commit_task(run, learner, h_bar, val, about, args)
    first_alone(training.path.unlink)()


def describe_training(examples, args):
    """What identifies a training, and is kept in its version: the options and a digest of the data."""
    apart = ("data", "val_data", "val_examples", "backbone", "device", "device_map", "out", "stream")
    apart += ("checkpointing",)  # the same bits, with it or without
    about = {k: v for k, v in sorted(vars(args).items()) if k not in apart}
    if about["targets"] == "all":  # as in the versions of older run folders, which have no such option
        del about["targets"]
    digest = hashlib.sha256(json.dumps(examples).encode()).hexdigest()[:16]
    return about | {"examples": len(examples), "data": digest}


@torch.no_grad()
def commit_task(run, learner, h_bar, val, about, args):
    """Section 3.5: collect the task's coordinates, fit its region, take the snapshot, write the version."""
    bank, z = learner.model.bank, learner.dynamics(h_bar)
    region = Region.fit(z, args.quantile)
    anchors = sample_anchors(region, z, args.anchors, args.anchor_source, args.seed)
    tensors = {"anchors": anchors, "snapshot": take_snapshot(learner.field, anchors)}
    tensors |= {f"field.{key}": t for key, t in learner.field.state_dict().items()}
    tensors |= {f"bank.{key}": p.data for key, p in bank.live.items()}
    version = Version(
        task=args.task,
        lock=args.lock if run.versions else "first",
        reads=learner.reads,
        top_k=learner.top_k,
        dynamics=learner.dynamics,
        region=region,
        source=tensors,
        shapes=bank.basis_shapes(),
        writes=bank.sizes()[-1],
        layers=learner.field.layers,
        index=torch.arange(len(bank)),
        config=about,
    )
    keep_records(run.data_file(args.task, "val"), json.dumps(val))
    run.commit(version)


@first_alone
def keep_records(path, text):
    """Write a task's validation records; what is in their place is put aside."""
    if path.exists() and not (path.is_file() and path.read_bytes() == text.encode()):
        put_aside(path)
    with atomic(path) as tmp:
        tmp.write_text(text)


# ------------------------------------------------------------------------------------------- the command line


def peak_memory(device):
    if device.startswith("cuda"):
        peaks = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
        return f"{max(peaks) / 2**30:.2f} GiB on the GPU, the fullest if there are more"
    if not resource:
        return "not known here"
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB"


def run_task(run, args):
    """Train the task, unless that has been done, and measure everything that the run then knows."""
    # On a CPU they are deterministic anyway, and slower when told so.
    torch.use_deterministic_algorithms(args.device.startswith("cuda"), warn_only=True)
    args.backbone = args.backbone or (run.manifest["backbone"] or {"name": "tiny"})["name"]
    if args.task not in run.tasks:
        fill_in(args, run)
    backbone, tokenizer = run.open_backbone(args.backbone, args.device, args.device_map)
    size = sum(p.numel() for p in backbone.parameters())
    print(f"backbone  {args.backbone} on {args.device}, {size:,} frozen parameters")
    if args.task in run.tasks:
        print(f"{args.task} is already committed in {run.folder}: nothing to train")
        config = run.head(run.find(args.task))["config"]
        said = {key: value for key, value in vars(args).items() if key in PAPER_VALUES}
        if other := [f"{key} {config[key]}" for key in said if said[key] != config.get(key, said[key])]:
            print(
                f"it was trained with {', '.join(other)}; to change that, roll it back or give another --out"
            )
        run.save()  # where the backbone lies now
    else:
        targets = None if run.tasks else choose_targets(backbone, tokenizer, args.targets)
        args.max_len = min(args.max_len, positions_of(backbone) or args.max_len)
        examples, val = load_data(args, tokenizer)
        if run.tasks:
            measure_last(run, backbone, tokenizer)
        run.manifest["settings"] = {key: getattr(args, key) for key in FIXED_BY_FIRST_TASK}
        model = run.open_model(backbone, tokenizer, targets)
        print(f"adapts    {describe_targets(backbone, model.bank.shapes)}")
        if args.checkpointing:
            model.checkpoint()
        # A bare probe never changes, so it is asked once; an adapted one needs it for standardising alone.
        asked = args.probe == "bare" or not run.tasks
        h_bar = probe_all(model, examples, args.pool) if asked else None
        learn(run, writable(run, model, h_bar, args), examples, h_bar, val, args)
        model.detach()
        del model  # its memory, before the same is read back from disk: what is measured is what was saved
    measure_last(run, backbone, tokenizer)


def stream(args):
    """Learn `args.stream` tasks one after another under the exact lock: kinds of instruction of the embedded
    sets in alphabetical order, general and code in turn. What the run folder already knows is not learned
    again."""
    folder = args.out or "runs/stream"
    sets = {
        (name, part): read_records(DATA / f"{name}.{part}.json")
        for name in HUB_DATA
        for part in ("train", "val")
    }
    kinds = [sorted({(name, r["kind"]) for r in sets[name, "train"]}) for name in HUB_DATA]
    in_turn = filter(None, itertools.chain.from_iterable(itertools.zip_longest(*kinds)))
    for name, kind in list(in_turn)[: args.stream]:
        with tempfile.TemporaryDirectory() as tmp:
            for part in ("train", "val"):
                chosen = [r for r in sets[name, part] if r["kind"] == kind]
                pathlib.Path(tmp, part).write_text(json.dumps(chosen))
            data = ["--data", f"{tmp}/train", "--val-data", f"{tmp}/val", "--device", args.device]
            options = ["--task", f"{name}-{kind}", "--lock", "--backbone", "tiny", "--epochs", "8"]
            task = parse_options(options + data)
            with Run(folder).exclusive() as run:
                run_task(run, task)
    return run


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:2] == ["--task", "synthetic"]:
        import synthetic

        return synthetic.main(argv[2:])
    args, started = parse_options(argv), time.time()
    args.device = pick_device(args.device)
    if args.stream:
        run = stream(args)
    else:
        if not args.backbone and not args.out:
            cuda = args.device.startswith("cuda")
            roomy = cuda and torch.cuda.get_device_properties(args.device).total_memory >= MISTRAL_BYTES
            args.backbone = MISTRAL if roomy else "tiny"
        name = re.sub(r"[^A-Za-z0-9.]+", "-", os.path.basename((args.backbone or "").rstrip("/")))
        with Run(args.out or f"runs/{name}").exclusive() as run:
            run_task(run, args)
    report(run)
    took, memory = time.time() - started, peak_memory(args.device)
    print(f"\n{took:.0f} s in all, peak memory {memory}; saved in {run.folder}")


if __name__ == "__main__":
    run_program(main)
