"""Learn one capability after another on one frozen backbone.

    python train.py --task alpaca                  # learn, commit region "alpaca", report
    python train.py --task code --lock             # a second version; the first stays bit-identical
    python train.py --task mine --data my.jsonl --lock   # your own: Alpaca, TRL, messages, ShareGPT, Dolly
    python train.py --task synthetic               # the FTN experiments, see synthetic.py
    torchrun --nproc_per_node 2 train.py --task alpaca  # in two processes, each with a GPU, or on the CPU

An example takes this path: encode -> h_bar (model.py) -> coordinate -> gating (field.py) -> logits (model.py)
-> loss, Eq. (9). Bare layers never change, so h_bar is found once for all examples, and kept. After the last
step the task is committed (commit.py), every task is measured (eval.py), and the table is printed. The three
locks share one loop: `writable` alone decides what a new task may write. A *run* is a folder of committed
tasks, its *versions*: each has the bases that it wrote, its field and its region.

Training can be killed at any moment: the same command, given again, goes on from `training.safetensors` and
ends with the same bits. Of several processes each computes its share of every step and of the measuring, and
their sums are those of one process, up to rounding. Only the first writes and prints. When one ends, all end.

This file covers sections 3.4, 3.6 and 5.1 of the NIWF paper, Eq. (9). Departures: our copy of the paper lacks
its learning rate, so we chose 2e-4, and 1e-3 for the tiny backbone. alpha is 128 in place of 16: the weights
of Eq. (7) sum to 1, so K bases are scaled by alpha / (K r), as a LoRA of rank K r is; with 128 that is 2, the
paper's own alpha / r. A micro-batch holds examples of like length (`micro_batches`). Under the exact lock a
later field starts with its own bases in the top K (`lead_with_own`), so that they are trained. The paper's
own setting is `--lock soft --passes two --probe adapted --pool sequence --alpha 16`; h_bar stays
standardised.
"""

import collections
import copy
import dataclasses
import hashlib
import json
import math
import os
import random
import re
import sys
import time

from commit import Run, commit_task
from eval import measure_last, probe_all, report
from field import CoordinateDynamics, WeightField, lock_loss, separation_loss, top_k_gating
from model import NIWF, response_nll
from plumbing import Refused
from plumbing.backbone import pick_device, place_of
from plumbing.command import Option, Parser, add_options, column, fill_in, number, run_program
from plumbing.files import check_name
from plumbing.folder import OLDER
from plumbing.passes import choose_targets, positions_of
from plumbing.processes import rank_and_size
from plumbing.prompts import asks_for_day, digest_of_prompts
from plumbing.records import load_data
from plumbing.targets import default_bare, describe_targets, layers_of
from plumbing.training import Training, peak_memory

import torch

MISTRAL = "mistralai/Mistral-7B-v0.1"
MISTRAL_BYTES = 24.7e9  # task 2 needs 23.3 GB by count, in two passes (studies.memory); the rest is for CUDA
LENGTH_WINDOW = 4  # the examples of so many steps are sorted by length together


# -------------------------------------------------------------------------------------- what a task may write


def writable(run, model, h_bar, args):
    """Return the Learner of a new task. In training the locks differ in this alone. run: see commit.py.

    The first task writes everything. Under the exact lock a later one writes new bases and a new field over
    all bases; it only reads older bases and the dynamics. Under the soft lock and none it goes on writing the
    last version's bank, field and dynamics. h_bar [n, features] sets the standardisation in the first task
    and feeds `lead_with_own` in later exact ones; it is None in later tasks of an adapted probe."""
    torch.manual_seed(args.seed + len(run.versions))
    bank = model.bank
    if run.versions and args.lock != "exact":
        bank.unlock()
        bank.add(max(0, args.bases - len(bank)))
        field = run.versions[-1].field.grown(len(bank)).to(model.device)
        dynamics = copy.deepcopy(run.versions[-1].dynamics).requires_grad_(True)
    else:
        old = len(bank)
        bank.add(args.bases)
        field = WeightField(bank.layers, len(bank), args.coord_dim, args.field_hidden).to(model.device)
        if run.versions:
            dynamics = run.versions[0].dynamics
            lead_with_own(field, old, args.top_k, dynamics(h_bar))
        else:
            dynamics = CoordinateDynamics(model.features, args.coord_dim)
            dynamics.to(model.device).standardise(h_bar)
    reads = [v.hash for v in run.versions] if args.lock == "exact" else []
    protected = run.versions if args.lock == "soft" else []
    return Learner(model, field, dynamics, args.top_k, reads, protected)


@dataclasses.dataclass
class Learner:
    """What learns a task: the model with its bank, a field and the dynamics."""

    model: NIWF
    field: WeightField
    dynamics: CoordinateDynamics
    top_k: int
    reads: list  # hashes of the versions whose bases it may read, but not write
    protected: list  # versions whose snapshots `lock_loss` holds, under the soft lock

    def gating(self, z):
        """z [B, d] -> (indices, weights), both [B, L, K]."""
        return top_k_gating(self.field(z), self.top_k)

    def probe(self, examples, args, split=True):
        """Return h_bar [n, features] of `--probe adapted`, the paper's pass 1: adapters run with the gating
        of z_0."""
        return probe_all(self.model, examples, args.pool, self.gating(self.dynamics.z0[None]), split)

    def weights(self):
        """Return what training changes, by name."""
        weights = {f"bank.{key}": p for key, p in self.model.bank.live.items()}
        for name, module in (("field", self.field), ("dynamics", self.dynamics)):
            weights |= {f"{name}.{key}": p for key, p in module.named_parameters() if p.requires_grad}
        return weights


@torch.no_grad()
def lead_with_own(field, old, top_k, z):
    """Lift a new field's logits for its own bases, those after the `old` ones, until they are the top K at
    all of the task's coordinates z [n, d]. With many old bases few of them would be in the top K, and only
    what is there is trained. So at first a version reads no older basis; training may change that."""
    logits = field(z)  # [n, L, N]
    behind = logits[..., :old].amax(-1) - logits[..., old:].topk(top_k).values[..., -1]
    lift = behind.amax(0) + 1e-3  # more than rounding takes away again
    field.w3.bias.view(field.layers, -1)[:, old:] += lift.clamp(min=0)[:, None]


# ----------------------------------------------------------------------------------------------- the training


def loss_terms(learner, batch, h_bar, args, share, responses):
    """NIWF Eq. (9): L = L_LM + lambda_lock L_lock + lambda_sep L_sep + lambda_budget L_budget, its terms by
    name. L_budget is left out: the paper calls it a constant at fixed K, so it has no gradient.

    batch: B examples of a step, h_bar [B, features]. share: B over the examples of the step; responses:
    response tokens of the step. So the terms of a step's micro-batches add up to those of the step."""
    z = learner.dynamics(h_bar)  # [B, d]
    logits, labels = learner.model.logits(batch, learner.gating(z))
    regions = [v.region for v in learner.protected]
    return {
        "lm": response_nll(logits, labels).sum().to(z.device) / responses,
        "lock": args.lambda_lock * share * lock_loss(learner.field, learner.protected),
        "sep": args.lambda_sep * share * separation_loss(z, regions, args.margin),
    }


def learning_rate(step, total, peak):
    """Linear warm-up over the first 5 % of the steps, then cosine to zero (section 5.1)."""
    warm = max(1, round(0.05 * total))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def micro_batches(examples, step, args):
    """Return the indices of a step's examples, in lists of `--batch`: a function of seed and step.

    A padded position costs as much as a token, so like lengths come together: the shuffled examples of
    LENGTH_WINDOW steps are sorted by length and cut into micro-batches, which are shuffled again."""
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
    """Return this process's share of a step, in micro-batches of its own: of N processes each takes every
    N-th example."""
    rank, size = rank_and_size()
    if size == 1:
        return micros
    own = [i for micro in micros for i in micro][rank::size]
    return [own[i : i + batch] for i in range(0, len(own), batch)]


def learn(run, learner, examples, h_bar, val, args):
    """Train one task and commit it. h_bar [n, features]: of the bare backbone, for every example; an adapted
    probe does not use it. Raises KeyboardInterrupt, with everything saved, when asked to stop, and Refused if
    the saved state is of another training, or a loss or gradient is not finite."""
    total = args.epochs * math.ceil(len(examples) / (args.batch * args.grad_accum))
    about = describe_training(examples, args)
    rate = lambda step: learning_rate(step, total, args.lr)
    training = Training(run.folder, learner.weights(), total, about, rate)
    training.resume()
    run.save()  # from here on this is a run folder
    with training:
        while training.step < total:
            # The examples of this step, in micro-batches.
            micros = micro_batches(examples, training.step, args)
            chosen = [examples[i] for micro in micros for i in micro]
            responses = sum(len(r) for _, r in chosen)
            # Forward and backward: the gradients of the micro-batches add up, over all processes.
            losses = collections.Counter(lm=0.0, lock=0.0, sep=0.0)
            for micro in take_share(micros, args.batch):
                batch = [examples[i] for i in micro]
                h = learner.probe(batch, args, split=False) if args.probe == "adapted" else h_bar[micro]
                terms = loss_terms(learner, batch, h, args, len(micro) / len(chosen), responses)
                values = torch.stack([*terms.values()])
                values.sum().backward()
                losses.update(dict(zip(terms, values.tolist())))
            losses = training.add_up(losses)
            # Clip to norm 1, set the learning rate, take a step of AdamW: see plumbing/training.py.
            training.update(losses)
            # Report, save the state, stop if asked to.
            training.after_step(losses, sum(len(p) + len(r) for p, r in chosen))
    h_bar = learner.probe(examples, args) if args.probe == "adapted" else h_bar
    run.keep_validation(args.task, val)
    how = args.quantile, args.anchors, args.seed
    commit_task(run, learner, h_bar, args.task, args.lock, about, *how)  # it removes the saved state


def describe_training(examples, args):
    """Return what identifies a training, and is kept in its version: the options and a digest of the data."""
    # A digest stands for the data; checkpointing changes no bit.
    apart = "data val_data val_examples backbone device device_map out checkpointing".split()
    # Older versions lack the options of OLDER, and had these values.
    about = {k: v for k, v in sorted(vars(args).items()) if k not in apart and (k, v) not in OLDER.items()}
    digest = hashlib.sha256(json.dumps(examples).encode()).hexdigest()[:16]
    return about | {"examples": len(examples), "data": digest}


# ---------------------------------------------------------------------------------------------------- options

COUNT, SIZE = dict(type=number(int, 1)), dict(type=number(int, 1, 4096))
WEIGHT, FLAG, TEXT = dict(type=number(float, 0, 1e6)), dict(action="store_true"), {}
one_of = lambda *names: dict(choices=[*names])

# fmt: off
OPTIONS = {  # what it takes; what it is; its default; the tiny backbone's; does a run's first task fix it?
    "what to learn, from what, on what": {
        "--task": Option(TEXT, "name of the capability; alpaca and code bring data, others need --data"),
        "--data": Option(TEXT, "JSON list or lines: Alpaca, TRL, chats, ...; of chats the last answer"),
        "--val-data": Option(TEXT, "the same, for validation; else part of the data is held out"),
        "--template": Option(one_of("alpaca", "chat"), "of prompts; chat: the model's", "alpaca", fixed=True),
        "--backbone": Option(TEXT, "tiny, a Hub id, a folder, FILE.gguf, random:... [Mistral-7B or tiny]"),
        "--device": Option(TEXT, "cpu, cuda, mps [what is there]"),
        "--device-map": Option(one_of("auto"), "spread a backbone over all GPUs, then memory, then disk"),
        "--out": Option(TEXT, "run folder [runs/<backbone>]"),
        "--examples": Option(COUNT, "training examples", 4000),
        "--val-examples": Option(COUNT, "validation examples", 400)},
    "optimisation": {
        "--epochs": Option(COUNT, "passes over the examples", 1, 2),
        "--max-len": Option(dict(type=number(int, 8, 99999)),
                            "tokens of prompt and response; longer are left out", 256),
        "--lr": Option(WEIGHT, "peak learning rate of AdamW", 2e-4, 1e-3),
        "--grad-accum": Option(COUNT, "micro-batches per step", 16, 1),
        "--batch": Option(COUNT, "sequences per micro-batch", 1, 16),
        "--checkpointing": Option(FLAG, "keep inputs of layers alone, compute the rest again: less memory"),
        "--seed": Option(dict(type=number(int, 0, 2**31)), "of weights, data order and anchors", 0)},
    "bank, field and coordinate (sections 3.1-3.3)": {
        "--rank": Option(SIZE, "r, rank of a basis", 8, fixed=True),
        "--bases": Option(SIZE, "N, bases that a task adds; without --lock exact, of all tasks together", 16),
        "--top-k": Option(SIZE, "K, bases active in a layer", 8),
        "--alpha": Option(WEIGHT, "alpha of Eq. (2)", 128.0, fixed=True),
        "--targets": Option(dict(type=lambda text: text.replace(" ", "")), "last names of the linear modules "
                            "to adapt, commas between; all: those in the layers of the text model, routers "
                            "apart", "all", fixed=True),
        "--coord-dim": Option(SIZE, "d, dimension of z; in two passes the paper's 64", 128, fixed=True),
        "--field-hidden": Option(SIZE, "hidden width of Phi", 256),
        "--pool": Option(one_of("prompt", "sequence"), "tokens in the mean h_bar; the paper's: sequence",
                         "prompt", fixed=True),
        "--probe": Option(one_of("bare", "adapted"), "pass 1 bare or, the paper's, with adapters at z_0",
                          "bare", fixed=True),
        "--passes": Option(one_of("one", "two"), "one: h_bar is found on the way; two: the paper's", "one",
                           fixed=True),
        "--bare-layers": Option(dict(type=number(int, 0, 4096)), "m, first layers, never adapted, that give "
                                "h_bar in one pass; 0: a sixth of all", 0, fixed=True)},
    "commitment and locks (sections 3.4, 3.5)": {
        "--lock": Option(dict(nargs="?", const="exact", default="none", choices=["exact", "soft"]),
                         "what protects older tasks: exact (--lock alone) or soft, the paper's [nothing]"),
        "--anchors": Option(dict(type=number(int, 1, 10**6)), "anchors a_j per region", 256),
        "--quantile": Option(dict(type=number(float, 0.01, 1)),
                             "of the training distances, gives tau, Eq. (11)", 0.95),
        "--lambda-lock": Option(WEIGHT, "weight of L_lock, Eq. (13)", 5.0),
        "--lambda-sep": Option(WEIGHT, "weight of L_sep, Eq. (10)", 0.01),
        "--margin": Option(WEIGHT, "margin of L_sep", 0.0)}}
# fmt: on
SOFT_ALONE = "lambda_lock", "lambda_sep", "margin"
DEFAULTS, TINY, FIXED = (column(OPTIONS, field) for field in ("default", "preset", "fixed"))


def parse_options(argv=None):
    epilog = "Defaults are the paper's, but for lr, epochs, alpha, margin, d, pool, probe, passes, lock and "
    epilog += "template: ours. Tiny has " + ", ".join(f"{key} {value:g}" for key, value in TINY.items())
    epilog += f". {', '.join(FIXED)} are fixed by a run's first task."
    p = Parser(__doc__, prog="train.py", epilog=epilog)
    add_options(p, OPTIONS)
    args = p.parse_args(argv)
    if args.task is None:
        p.error("say what to learn: --task NAME")
    if getattr(args, "bare_layers", None) == 0:  # 0 means the default, as if left out
        del args.bare_layers
    return args


def complete(args, run):
    """Fill in what was not said, see `fill_in`. Raises Refused if options contradict each other or the
    run."""
    later = {v["lock"] for v in run.manifest["versions"][1:]}
    if later and args.lock not in later:
        raise Refused(
            f"{run.folder} holds tasks trained with lock {'/'.join(sorted(later))}, which cannot be mixed "
            f"with lock {args.lock} (none: without --lock); use the same or choose another --out"
        )
    preset = TINY if args.backbone == "tiny" else {}
    if getattr(args, "passes", "one") == "two":
        preset = preset | {"coord_dim": 64}
    fixed = dict(run.manifest["settings"]) if run.tasks else {}
    held = 0  # bases of a shared bank, which are trained further
    if run.tasks and args.lock != "exact":
        head = run.head(run.manifest["versions"][-1])
        fixed["field_hidden"], held = head["config"].get("field_hidden", 256), head["writes"]
    if idle := [key for key in SOFT_ALONE if args.lock != "soft" and hasattr(args, key)]:
        raise Refused(f"--{idle[0].replace('_', '-')} goes with --lock soft: nothing else has a penalty")
    fill_in(args, DEFAULTS, preset, fixed, run.folder)
    if args.passes == "one" and (args.probe, args.pool) != ("bare", "prompt"):
        raise Refused("--probe adapted and --pool sequence are the paper's own: they need --passes two")
    if args.passes == "two" and args.bare_layers:
        raise Refused("--bare-layers goes with --passes one: two passes adapt all layers")
    if args.lock == "exact" and args.probe == "adapted":
        raise Refused("--lock exact needs --probe bare: an adapted probe moves when adapters are trained")
    if args.lock != "exact" and run.manifest["compositions"]:
        raise Refused(f"{run.folder} has compositions, whose bases this would change (use --lock)")
    if args.top_k > max(args.bases, held):
        raise Refused(f"--top-k {args.top_k} is more than the {max(args.bases, held)} bases a task writes")
    check_name("--task", args.task)
    if taken := run.namesake(args.task):
        raise Refused(f"--task {args.task}: {run.folder} has {taken}; give it another name")


# ------------------------------------------------------------------------------------------- the command line


def default_backbone(device):
    """Return Mistral-7B for a GPU that has room for it, else tiny."""
    cuda = device.startswith("cuda")
    roomy = cuda and torch.cuda.get_device_properties(device).total_memory >= MISTRAL_BYTES
    return MISTRAL if roomy else "tiny"


def run_task(run, args):
    """Train the task, unless that has been done, and measure everything that the run then knows."""
    # On a CPU all operations are deterministic anyway, and slower if they are told to be.
    torch.use_deterministic_algorithms(args.device.startswith("cuda"), warn_only=True)
    owner = run.manifest["backbone"]
    args.backbone = args.backbone or (owner["name"] if owner else default_backbone(args.device))
    if args.task not in run.tasks:
        complete(args, run)
    backbone, tokenizer = run.open_backbone(args.backbone, args.device, args.device_map)
    if hasattr(args, "max_len"):  # a committed task may leave it out
        args.max_len = min(args.max_len, positions_of(backbone) or args.max_len)
    size = sum(p.numel() for p in backbone.parameters())
    print(f"backbone  {args.backbone} on {args.device}, {size:,} frozen parameters")
    run.manifest["backbone"]["name"] = place_of(args.backbone)  # where it lies now
    if args.task in run.tasks:
        say_known(run, args)
    else:
        train_task(run, args, backbone, tokenizer)
    measure_last(run, backbone, tokenizer)


def say_known(run, args):
    """Say that a task is committed, and which of the given options differ from those of its training."""
    unread = [f", {file} is not read" for file in (args.data, args.val_data) if file]
    print(f"{args.task} is already committed in {run.folder}: nothing to train{''.join(unread)}")
    head = run.head(run.find(args.task))
    made = {**OLDER, **head["config"], "lock": args.lock if head["lock"] == "first" else head["lock"]}
    said = {key: value for key, value in vars(args).items() if key in DEFAULTS} | {"lock": args.lock}
    if "examples" in said and type(made.get("examples")) is int:  # an upper bound: there may have been fewer
        said["examples"] = min(said["examples"], made["examples"])
    if other := [f"{key} {made[key]}" for key in said if said[key] != made.get(key, said[key])]:
        print(f"it was trained with {', '.join(other)}; to change that, roll it back or give another --out")
    run.save()  # the backbone may lie elsewhere now


def train_task(run, args, backbone, tokenizer):
    """Read the data, find h_bar of every example, train what the lock lets the task write, and commit it."""
    if args.passes == "one" and not args.bare_layers:
        args.bare_layers = default_bare(len(layers_of(backbone)))
    targets = None if run.tasks else choose_targets(backbone, tokenizer, args.targets, args.bare_layers)
    day = run.day
    if asks_for_day(tokenizer, args.template):  # it writes the day into prompts: a run keeps its first day
        args.day = day
    if args.template == "chat" and not run.tasks:  # `open_model` refuses if it has changed since
        args.prompts = digest_of_prompts(tokenizer, args.template, day)
    examples, val = load_data(args, tokenizer)
    if run.tasks:
        measure_last(run, backbone, tokenizer)
    run.manifest["settings"] = {
        key: getattr(args, key) for key in (*FIXED, "day", "prompts") if hasattr(args, key)
    }
    model = run.open_model(backbone, tokenizer, targets)
    print(f"adapts    {describe_targets(backbone, model.bank.shapes)}")
    if args.checkpointing:
        model.checkpoint()
    # Bare layers never change, so h_bar is found once. An adapted probe runs in every step, and its first
    # task needs the bare h_bar for the standardisation alone.
    needed = args.probe == "bare" or not run.tasks
    h_bar = probe_all(model, examples, args.pool) if needed else None
    learn(run, writable(run, model, h_bar, args), examples, h_bar, val, args)
    model.detach()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:2] == ["--task", "synthetic"]:
        import synthetic

        return synthetic.main(argv[2:])
    args, started = parse_options(argv), time.time()
    if args.task == "synthetic":
        raise Refused("write --task synthetic, with a space, before the options of synthetic.py")
    args.device = pick_device(args.device)
    if not args.out:
        args.backbone = args.backbone or default_backbone(args.device)
    if args.backbone and place_of(args.backbone) == "tiny":
        args.backbone = "tiny"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", os.path.basename(os.path.abspath(args.backbone or "")))
    with Run(args.out or f"runs/{name}").exclusive() as run:
        run_task(run, args)
    report(run)
    took, memory = time.time() - started, peak_memory(args.device)
    print(f"\n{took:.0f} s in all, peak memory {memory}; saved in {run.folder}")


if __name__ == "__main__":
    run_program(main)
