"""Learn many tasks one after another under the exact lock: kinds of instruction of the embedded sets.

    python -m studies.stream 76                     # a task for each of the 76 kinds
    python -m studies.stream 8 --out runs/eight
    python -m studies.stream 76 --regions           # learn the first alone, find the regions of all

Kinds are taken in alphabetical order, of general instructions and of code in turn. What the run folder
already knows is not learned again, so the same command goes on. Under the exact lock the dynamics freeze
with the first task, so the regions of all others can be found without learning them.
"""

import itertools
import json
import pathlib
import statistics
import tempfile

import torch

from commit import Run
from eval import open_run, probe_all, report
from field import Region, route
from plumbing.backbone import pick_device
from plumbing.command import Parser, number, output_file, run_program, write_results
from plumbing.prompts import prompt_ids
from plumbing.records import DATA, HUB_DATA, read_records
from train import parse_options as training_options
from train import run_task


def kinds_in_turn(count=None):
    """Return {task: {"train", "val": its records}} of the first `count` kinds, or of all."""
    found = {name: {} for name in HUB_DATA}
    for name, part in itertools.product(HUB_DATA, ("train", "val")):
        for record in read_records(DATA / f"{name}.{part}.json"):
            kind = found[name].setdefault(record["kind"], {"train": [], "val": []})
            kind[part].append(record)
    kinds = [[(f"{name}-{kind}", found[name][kind]) for kind in sorted(found[name])] for name in HUB_DATA]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*kinds))
    return dict([pair for pair in in_turn if pair][:count])


def learn(folder, task, train, val, *options):
    """Learn a task on these records in a run folder, unless it is there, and measure all that the folder
    knows. options: of train.py. -> the run folder"""
    with tempfile.TemporaryDirectory() as tmp:
        for part, records in (("train", train), ("val", val)):
            pathlib.Path(tmp, part).write_text(json.dumps(records))
        data = ["--data", f"{tmp}/train", "--val-data", f"{tmp}/val"]
        args = training_options(["--task", task, *data, *options])
        args.device = pick_device(args.device)
        with Run(folder).exclusive() as run:
            run_task(run, args)
    return run


def learn_stream(folder, count, device, passes="one"):
    """Learn the first `count` kinds of instruction, a task each. -> the run folder"""
    options = ["--lock", "--backbone", "tiny", "--epochs", "8", "--passes", passes, "--device", device]
    for task, records in kinds_in_turn(count).items():
        run = learn(folder, task, *records.values(), *options)
    return run


@torch.no_grad()
def find_regions(run, model, tokenizer, count):
    """Find the regions of all kinds, after the first was learned. -> what is published: of the validation
    prompts of every kind the share that is routed home, and in how many other regions one lies, mean"""
    ids = lambda records: [(prompt_ids(r, tokenizer, run.template, run.day), []) for r in records]
    place = lambda records: run.versions[0].dynamics(probe_all(model, ids(records), "prompt"))
    kinds = kinds_in_turn(count)
    regions = [Region.fit(place(records["train"])) for records in kinds.values()]
    found = {"task": f"passes: {run.manifest['settings']['passes']}", "kinds": [*kinds]}
    found |= {"home": [], "others": []}
    for i, records in enumerate(kinds.values()):
        routed = route(place(records["val"]), regions)
        found["home"].append(float((routed.choice == i).double().mean()))
        found["others"].append(float((routed.inside.sum(1) - routed.inside[:, i].int()).double().mean()))
    home, others = (statistics.mean(found[key]) for key in ("home", "others"))
    print(f"{found['task']}: {home:.1%} routed home; a prompt lies in {others:.2f} other regions")
    return found


def main(argv=None):
    p = Parser(__doc__, prog="stream.py")
    p.add_argument("count", type=number(int, 1, 76), help="how many kinds of instruction, a task each")
    p.add_argument("--out", default="runs/stream", help="run folder")
    p.add_argument("--passes", choices=["one", "two"], default="one", help="see train.py [one]")
    p.add_argument("--regions", action="store_true", help="find regions, and learn the first kind alone")
    p.add_argument("--device", help="cpu, cuda, mps [what is there]")
    p.add_argument("--json", type=output_file, help="write what --regions finds to this file")
    args = p.parse_args(argv)
    device = pick_device(args.device)
    if not args.regions:
        return report(learn_stream(args.out, args.count, device, args.passes))
    rows = []
    for passes in ("two", "one"):
        folder = f"{args.out}-{passes}"
        learn_stream(folder, 1, device, passes)
        rows.append(find_regions(*open_run(folder, device), args.count))
    write_results(args.json, "-m studies.stream", argv, indent=1, rows=rows)


if __name__ == "__main__":
    run_program(main)
