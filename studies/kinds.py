"""Do the prompts of 76 kinds of instruction find home? Their regions, of which the first alone is learned.

    python -m studies.kinds --json stream-regions.json
    python -m studies.kinds 8 --ways 'two passes' 'one pass'

Under the exact lock the dynamics freeze with the first task. So the regions of all kinds can be found, and
held-out prompts routed among them, without learning the others, see studies/stream.py.
"""

import statistics

import torch
from tqdm import tqdm

from eval import open_run, probe_all
from field import Region, route
from plumbing.backbone import pick_device
from plumbing.command import Parser, number, output_file, run_program, write_results
from plumbing.prompts import prompt_ids
from plumbing.tables import print_table, spread
from studies.stream import kinds_in_turn, learn_stream
from studies.variants import PASSES, folder_name, patched

ONE = "one pass", "one pass, mean alone", "one pass, d 64", "one pass, d 64, aimed"
WAYS = {way: PASSES[way] for way in ("two passes", *ONE)}


@torch.no_grad()
def find_regions(run, model, tokenizer, kinds):
    """Find the regions of all kinds under the dynamics of a run. -> what is published: the share of the
    validation prompts that is routed home, of every kind and mean; and in how many other regions one lies"""
    ids = lambda records: [(prompt_ids(r, tokenizer, run.template, run.day), []) for r in records]
    place = lambda records: run.versions[0].dynamics(probe_all(model, ids(records), "prompt"))
    regions = [Region.fit(place(records["train"])) for records in kinds.values()]
    each, others = [], []
    for i, records in enumerate(kinds.values()):
        found = route(place(records["val"]), regions)
        each.append(float((found.choice == i).double().mean()))
        others.append(float((found.inside.sum(1) - found.inside[:, i].int()).double().mean()))
    return {"home": statistics.mean(each), "others": statistics.mean(others), "each": each}


def main(argv=None):
    p = Parser(__doc__, prog="kinds.py")
    p.add_argument("count", nargs="?", type=number(int, 2, 76), default=76, help="how many kinds [76]")
    p.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS], help="which rows [all]")
    p.add_argument("--seeds", type=number(int, 1, 100), default=3, help="how many, from 0 on [3]")
    p.add_argument("--out", default="runs/kinds", help="folder for run folders")
    p.add_argument("--device", help="cpu, cuda, mps [what is there]")
    p.add_argument("--json", type=output_file, help="write what was found to this file")
    args = p.parse_args(argv)
    device, kinds, rows = pick_device(args.device), kinds_in_turn(args.count), {}
    for way in args.ways:
        variant, rows[way] = WAYS[way], []
        for seed in tqdm(range(args.seeds), desc=way, unit="seed", disable=None, leave=False):
            folder = f"{args.out}/{folder_name(way)}-{seed}"
            with patched(variant.patch):
                learn_stream(folder, 1, device, *variant.options.split(), "--seed", f"{seed}")
                rows[way].append(find_regions(*open_run(folder, device), kinds))
    spreads = lambda row: [spread([x[key] for x in row]) for key in ("home", "others")]
    lines = [[way, *spreads(row)] for way, row in rows.items()]
    print_table("prompts that are routed home", ["", "home", "other regions around one"], lines)
    write_results(args.json, "-m studies.kinds", argv, rows=rows)


if __name__ == "__main__":
    run_program(main)
