"""What the weight field is worth: one task learned with it, with parts of it changed, and without it.

    python assets/variants.py              # tiny, seeds 0 1 2: the published rows
    python assets/variants.py --choose     # what was chosen among: other items, seeds 200 201 202
    python assets/variants.py --backbone FOLDER --data alpaca.json --seeds 0 --examples 600 --lr 5e-4
    python assets/variants.py --regions RUN    # does one region tell two tasks apart?

Each row is a training by train.py in a run folder of its own under runs/variants; what is there is not
trained again. Options that this script does not know go to train.py. A row is its options and, where no
option says it, a change of one function, made here and nowhere else.

The controls are plain LoRAs: N = K = 1, so that Eq. (7) has one weight, 1, and no field to learn; the
coordinate only routes. alpha follows K r, so that all updates have the same scale.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while torch is being imported: one line, no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"\nvariants.py: stopped\n") and 130))

import contextlib
import math
import pathlib
import shlex
import statistics
import sys
import unittest.mock

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import train
from commit import Parser, Run, number, output_file, run_program, write_results
from eval import open_run, validation_set
from field import CoordinateDynamics, WeightField
from model import pick_device
from synthetic import spread

rms = lambda x: float(x.square().mean().sqrt())

# ---------------------------------------------------------------------------------- what an option cannot say


def not_standardised(self, h_bar):
    """As h_bar is, scaled to length sqrt(d)."""
    self.deviation.fill_(rms(h_bar))


def centred(self, h_bar):
    """Less its mean; all features keep their size."""
    self.mean.copy_(h_bar.mean(0))
    self.deviation.fill_(rms(h_bar - self.mean))


class AllButTheTop:
    """Centred, without its first principal components, features / 100 of them (Mu and Viswanath 2018)."""

    forward, top = CoordinateDynamics.forward, None

    def standardise(self, h_bar):
        self.mean.copy_(h_bar.mean(0))
        x = h_bar - self.mean
        AllButTheTop.top = torch.linalg.svd(x, full_matrices=False).Vh[: max(1, x.shape[1] // 100)]
        self.deviation.fill_(rms(x - x @ AllButTheTop.top.T @ AllButTheTop.top))

    def without_top(self, h_bar):
        x = h_bar - self.mean
        return AllButTheTop.forward(self, self.mean + x - x @ AllButTheTop.top.T @ AllButTheTop.top)


def random_dynamics(self):
    """The weights of the dynamics stay as they were drawn."""
    self.dynamics.requires_grad_(False)
    return WEIGHTS(self)


WEIGHTS, LOSSES, INIT = train.Learner.weights, train.loss_terms, WeightField.__init__
UPDATE = train.Training.update


def balanced(learner, batch, h_bar, args, share, responses):
    """Switch's load balancing in place of the constant L_budget: 0.01 N sum_i f_i P_i, f_i the share of the
    choices that fall on basis i, P_i its mean probability."""
    logits = learner.field(learner.dynamics(h_bar))  # [B, L, N]
    n = logits.shape[-1]
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(learner.top_k).indices, 1 / learner.top_k)
    terms = LOSSES(learner, batch, h_bar, args, share, responses)
    return terms | {"budget": 0.01 * share * n * (chosen.mean(0) * logits.softmax(-1).mean(0)).sum(-1).mean()}


def wide_logits(self, *args, **kwargs):
    """Logits four times as large at the start."""
    INIT(self, *args, **kwargs)
    with torch.no_grad():
        self.w3.weight.mul_(4)


def slow_field(self, losses):
    """Field and dynamics learn with 0.3 of the learning rate: 0.3 of every step is taken."""
    before = {k: p.detach().clone() for k, p in self.weights.items() if not k.startswith("bank.")}
    UPDATE(self, losses)
    for key, old in before.items():
        self.weights[key].data.lerp_(old, 0.7)


PATCHES = {
    "not standardised": {(CoordinateDynamics, "standardise"): not_standardised},
    "centred only": {(CoordinateDynamics, "standardise"): centred},
    "all but the top": {
        (CoordinateDynamics, "standardise"): AllButTheTop.standardise,
        (CoordinateDynamics, "forward"): AllButTheTop.without_top,
    },
    "random dynamics": {(train.Learner, "weights"): random_dynamics},
    "load balancing": {(train, "loss_terms"): balanced},
    "logits x 4": {(WeightField, "__init__"): wide_logits},
    "field and dynamics: 0.3 lr": {(train.Training, "update"): slow_field},
}

# --------------------------------------------------------------------------------------------------- the rows

LORA = "--bases 1 --top-k 1 --rank 64"
PUBLISHED = {
    "LoRA r 64: same active rank": LORA,
    "LoRA r 128: same stored size": "--bases 1 --top-k 1 --rank 128 --alpha 256",
    "fixed z, N = K = 8": "--fixed-coordinate --bases 8",
    "fixed z, N 16, K 8": "--fixed-coordinate",
    "fixed z, N = K = 16": "--fixed-coordinate --dense-gating --alpha 256",
    "NIWF, N 16, K 8": "",
    "not standardised": "",
    "random dynamics": "",
    "NIWF, N 8, K 8": "--bases 8",
}
CHOSEN_AMONG = {
    "NIWF, N 16, K 8": "",
    "lr 1e-3": "--lr 1e-3",
    "lr 4e-3": "--lr 4e-3",
    "alpha 16 (the paper)": "--alpha 16",
    "alpha 64": "--alpha 64",
    "alpha 256": "--alpha 256",
    "LoRA r 64": LORA,
    "LoRA r 64, lr 1e-3": LORA + " --lr 1e-3",
    "LoRA r 64, lr 4e-3": LORA + " --lr 4e-3",
    "LoRA r 64, alpha 64": LORA + " --alpha 64",
    "LoRA r 64, alpha 256": LORA + " --alpha 256",
    "not standardised": "",
    "centred only": "",
    "all but the top": "",
    "load balancing": "",
    "logits x 4": "",
    "field and dynamics: 0.3 lr": "",
    "d 32": "--coord-dim 32",
    "d 128": "--coord-dim 128",
    "N 32, K 8": "--bases 32",
    "N 16, K 4": "--top-k 4",
    "shared gating": "--shared-gating",
}


def train_row(name, options, seed, args, rest):
    """Train a row and measure it, unless that has been done. -> what is known of it"""
    place = "choose" if args.choose else "publish"
    folder = pathlib.Path(args.out, place, f"{seed}", "".join(c if c.isalnum() else "-" for c in name))
    said = ["--task", "alpaca", "--backbone", args.backbone, "--seed", str(seed), "--out", str(folder)]
    said += ["--data", args.data] * bool(args.data)
    if args.choose and not args.data:
        data = train.DATA / "alpaca"
        said += ["--data", f"{data}.train.json", "--val-data", f"{data}.choose.json", "--val-examples", "200"]
    with contextlib.ExitStack() as patches:
        for (owner, attribute), new in PATCHES.get(name, {}).items():
            patches.enter_context(unittest.mock.patch.object(owner, attribute, new))
        options = train.parse_options([*said, *shlex.split(options), *rest])
        options.device = pick_device(options.device)
        with Run(folder).exclusive() as run:
            train.run_task(run, options)
    row = run.manifest["results"][0]
    (n,) = (sum(count.values()) for count in row["routing"].values())
    version = run.read_version(run.manifest["versions"][0], [])
    return {
        "loss": math.log(row["stored"]["alpaca"]),
        "perplexity": row["stored"]["alpaca"],
        "choices": row["gating"]["alpaca"]["sets"],
        "bases": row["gating"]["alpaca"]["bases"],
        "inside": row["inside"]["alpaca"]["alpaca"] / n,
        "stored parameters": sum(t.numel() for t in version.bases.values()),
        "config": version.config,
    }


def print_table(rows):
    """rows: {name: [one dict a seed]}"""
    width = max(map(len, rows))
    print(f"\n{'':{width}}  nats a token     perplexity       choices  of bases  inside  stored parameters")
    for name, seeds in rows.items():
        mean = lambda key, seeds=seeds: statistics.mean(row[key] for row in seeds)
        figures = "  ".join(f"{spread([row[k] for row in seeds], 4):15}" for k in ("loss", "perplexity"))
        print(
            f"{name:{width}}  {figures}  {mean('choices'):7.1f}  {mean('bases'):8.1f}  "
            f"{mean('inside'):6.1%}  {mean('stored parameters'):,.0f}"
        )


# -------------------------------------------------------------------------------- does one region tell apart?


def one_class(folder):
    """For the region of each task alone: the share of every task's validation inputs inside it, and the
    AUROC of the distance to it, own inputs against the others'. -> {region: {task: {...}}}"""
    run, model, tokenizer = open_run(folder, pick_device(None))
    found = {}
    with torch.no_grad():
        routes = {task: validation_set(run, model, tokenizer, task)[2] for task in run.tasks}
        for v in run.versions:
            distance = {task: v.region.distance(v.dynamics(h).cpu().double()) for task, h in routes.items()}
            own, found[v.task] = distance[v.task], {}
            for task, d in distance.items():
                auroc = ((own[:, None] < d).double() + (own[:, None] == d).double() / 2).mean()
                found[v.task][task] = {
                    "inside": float((d <= v.region.tau).double().mean()),
                    "AUROC": float(auroc),
                }
                inside = f"{found[v.task][task]['inside']:6.1%} of {task} inside"
                print(f"region of {v.task}: {inside}, AUROC {auroc:.3f}")
    return found


def main(argv=None):
    parser = Parser(prog="variants.py", description="What the weight field is worth.", allow_abbrev=False)
    parser.add_argument("--choose", action="store_true", help="the settings that were chosen among")
    parser.add_argument(
        "--regions", metavar="RUN", help="instead: one-class capture and AUROC of this run folder"
    )
    parser.add_argument("--rows", nargs="+", help="names of rows [all]")
    parser.add_argument("--backbone", default="tiny", help="[tiny]")
    parser.add_argument("--data", help="JSON records [embedded]")
    parser.add_argument("--seeds", nargs="+", type=number(int, 0, 2**31), help="[0 1 2; 200 201 202]")
    parser.add_argument("--out", default="runs/variants", help="folder of the run folders")
    parser.add_argument("--json", type=output_file, help="write all of it to this file")
    args, rest = parser.parse_known_args(argv)
    if args.regions:
        result = one_class(args.regions)
    else:
        rows, result = CHOSEN_AMONG if args.choose else PUBLISHED, {}
        names = args.rows or list(rows)
        if unknown := [name for name in names if name not in rows]:
            parser.error(f"no row is called {unknown[0]!r}: {', '.join(rows)}")
        for seed in args.seeds or ([200, 201, 202] if args.choose else [0, 1, 2]):
            for name in names:
                result.setdefault(name, []).append(train_row(name, rows[name], seed, args, rest))
        print_table(result)
    if args.json:
        write_results(args.json, "assets/variants.py", argv, indent=1, rows=result)


if __name__ == "__main__":
    run_program(main)
