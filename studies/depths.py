"""From which layer can prompts be routed? Two tasks, told apart by what enters layer m, for several m.

    python -m studies.depths --backbone FOLDER --data A.json B.json --json depths.json

Nothing is trained: the dynamics are as they are drawn, standardised on the first task, and a region is fitted
to each task's first prompts. The others are routed. h_bar is the mean over the prompt's tokens, or that and
what the last token has. A coordinate has the paper's 64 dimensions, or 128.
"""

import random

import torch

from eval import batches
from field import CoordinateDynamics, Region, route
from plumbing.backbone import load_backbone
from plumbing.command import Parser, number, output_file, run_program, write_results
from plumbing.passes import body_of, mean_and_last, mean_over, pad_left, run_padded
from plumbing.prompts import pad_of, prompt_ids
from plumbing.records import read_records

FIT, ROUTED = 300, 150  # prompts of each task


def prompts_of(path, tokenizer):
    """Return the tokens of prompts of fewer than 200 tokens, drawn from a file of records."""
    records = read_records(path)
    random.Random(1).shuffle(records)
    rows = (prompt_ids(record, tokenizer, "alpaca") for record in records)
    return [row for row in rows if len(row) < 200][: FIT + ROUTED]


@torch.no_grad()
def features_at(backbone, pad_id, rows):
    """Return {(m, what): h_bar [n, features]} for every layer m, and after the last."""
    order, found = sorted(range(len(rows)), key=lambda i: len(rows[i])), {}
    for (chunk,) in batches(order, size=32):
        ids, mask = pad_left([rows[i] for i in chunk], pad_id, backbone)
        out = run_padded(body_of(backbone), ids, mask, use_cache=False, output_hidden_states=True)
        for m, hidden in enumerate(out.hidden_states):
            lengths = [len(rows[i]) for i in chunk]
            for what, summary in (("mean", mean_over), ("mean, last", mean_and_last)):
                h = summary(hidden, lengths)
                found.setdefault((m, what), torch.zeros(len(rows), h.shape[1]))[chunk] = h
    return found


@torch.no_grad()
def routed_home(tasks, seed, d):
    """tasks: h_bar [n, features] of each; d: the dimension of a coordinate. -> the share of the prompts of
    each that are routed to it"""
    torch.manual_seed(seed)
    dynamics = CoordinateDynamics(tasks[0].shape[1], d)
    dynamics.standardise(tasks[0][:FIT])
    regions = [Region.fit(dynamics(h[:FIT])) for h in tasks]
    choices = [route(dynamics(h[FIT:]), regions).choice for h in tasks]
    return [float((choice == i).double().mean()) for i, choice in enumerate(choices)]


def main(argv=None):
    p = Parser(__doc__, prog="depths.py")
    p.add_argument("--backbone", default="tiny", help="see train.py")
    p.add_argument("--data", nargs=2, required=True, metavar="FILE", help="JSON records of two tasks")
    p.add_argument("--seeds", type=number(int, 1, 100), default=5, help="of the dynamics")
    p.add_argument("--json", type=output_file, help="write what was measured to this file")
    args = p.parse_args(argv)
    backbone, tokenizer = load_backbone(args.backbone, "cpu")
    rows = [prompts_of(path, tokenizer) for path in args.data]
    tasks, found = [features_at(backbone, pad_of(tokenizer), part) for part in rows], []
    for m, what in tasks[0]:
        h_bars = [task[m, what] for task in tasks]
        for name, d in ((what, 64), (f"{what}, d 128", 128)):
            home = [routed_home(h_bars, seed, d) for seed in range(args.seeds)]
            found.append({"m": m, "h_bar": name, "home": home})
            percent = 100 * sum(map(sum, home)) / 2 / args.seeds
            print(f"m {m:2}, {name:17} {percent:5.1f} % routed home", flush=True)
    write_results(args.json, "-m studies.depths", argv, indent=1, rows=found)


if __name__ == "__main__":
    run_program(main)
