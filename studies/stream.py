"""Learn many tasks one after another under the exact lock: kinds of instruction of the embedded sets.

    python -m studies.stream 76                     # a task for each of the 76 kinds
    python -m studies.stream 8 --out runs/eight

Kinds are taken in alphabetical order, of general instructions and of code in turn. What the run folder
already knows is not learned again, so the same command goes on.
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


def learn_stream(folder, count, device, passes="one"):
    """Learn the first `count` kinds of instruction, a task each. -> the run folder"""
    sets = {
        (name, part): read_records(DATA / f"{name}.{part}.json")
        for name in HUB_DATA
        for part in ("train", "val")
    }
    kinds = [sorted({(name, r["kind"]) for r in sets[name, "train"]}) for name in HUB_DATA]
    in_turn = filter(None, itertools.chain.from_iterable(itertools.zip_longest(*kinds)))
    for name, kind in list(in_turn)[:count]:
        with tempfile.TemporaryDirectory() as tmp:
            for part in ("train", "val"):
                chosen = [r for r in sets[name, part] if r["kind"] == kind]
                pathlib.Path(tmp, part).write_text(json.dumps(chosen))
            data = ["--data", f"{tmp}/train", "--val-data", f"{tmp}/val", "--device", device]
            options = ["--task", f"{name}-{kind}", "--lock", "--backbone", "tiny", "--epochs", "8"]
            options += ["--passes", passes]
            args = training_options(options + data)
            with Run(folder).exclusive() as run:
                run_task(run, args)
    return run


def parse_options(argv=None):
    p = Parser(__doc__, prog="stream.py")
    p.add_argument("count", type=number(int, 1, 76), help="how many kinds of instruction, a task each")
    p.add_argument("--out", default="runs/stream", help="run folder")
    p.add_argument("--passes", choices=["one", "two"], default="one", help="see train.py [one]")
    p.add_argument("--device", help="cpu, cuda, mps [what is there]")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_options(argv)
    report(learn_stream(args.out, args.count, pick_device(args.device), args.passes))


if __name__ == "__main__":
    run_program(main)
