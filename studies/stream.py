"""Learn many tasks one after another under the exact lock: kinds of instruction of the embedded sets.

    python -m studies.stream 76                     # a task for each of the 76 kinds
    python -m studies.stream 8 --out runs/eight

Kinds are taken in alphabetical order, of general instructions and of code in turn. What the run folder
already knows is not learned again, so the same command goes on. Options that this script does not know go to
train.py.
"""

import itertools
import json
import pathlib
import tempfile

from commit import Run
from eval import report
from plumbing.backbone import pick_device
from plumbing.command import Parser, number, run_program
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


def learn_stream(folder, count, device, *options):
    """Learn the first `count` kinds of instruction, a task each. options: of train.py. -> the run folder"""
    options = ["--lock", "--backbone", "tiny", "--epochs", "8", "--device", device, *options]
    for task, records in kinds_in_turn(count).items():
        run = learn(folder, task, *records.values(), *options)
    return run


def main(argv=None):
    p = Parser(__doc__, prog="stream.py", allow_abbrev=False)
    p.add_argument("count", type=number(int, 1, 76), help="how many kinds of instruction, a task each")
    p.add_argument("--out", default="runs/stream", help="run folder")
    p.add_argument("--device", help="cpu, cuda, mps [what is there]")
    args, rest = p.parse_known_args(argv)
    return report(learn_stream(args.out, args.count, pick_device(args.device), *rest))


if __name__ == "__main__":
    run_program(main)
