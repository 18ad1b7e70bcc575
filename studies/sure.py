"""How sure is routing, and are prompts told that no version has learned? One task is left out at a time.

    python -m studies.sure --backbone FOLDER --data FOLDER --json sure.json
    python -m studies.sure --backbone FOLDER --data FOLDER --part choose --wide 1 2 3 --temperature 1 2 3 4

--data holds the files of thirteen tasks, see studies/sequence.py. Nothing is trained: the dynamics are as
they are drawn, standardised on the first task, and a region is fitted to each task's first prompts. *Refused*
are prompts for which the background is likelier than any region or, as the paper's region has it, those
outside the tau of the region that was chosen. --wide: by what the background's covariance is multiplied.
--temperature: by what log-likelihoods are divided before they become probabilities. --coord-dim: d, the
dimension of the coordinate. --ways: as in one pass; with h_bar the mean over the prompt, without the last
token; or with dynamics that are aimed at the first task's principal directions.

A task that has the instruction of another to the letter can hardly be told from it. So AUROC is given of all
tasks, and of those whose instruction no other has.
"""

import functools
import itertools
import statistics
import unittest.mock

import torch

import field
from eval import probe_all
from field import CoordinateDynamics, Region, background, route
from model import NIWF
from plumbing.backbone import load_backbone
from plumbing.command import Parser, number, output_file, run_program, write_results
from plumbing.prompts import pad_of, prompt_ids
from plumbing.records import read_records
from plumbing.tables import print_table
from plumbing.targets import default_bare, layers_of
from train import DEFAULTS

TASKS = "mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia agnews".split()
FIT, ASKED, LONGEST = 300, 100, 250  # prompts that a region is fitted to, that are routed; tokens of one
WHOLE = "with the instruction"


def alone(folder):
    """Return the tasks whose instruction no other task has."""
    said = {task: read_records(f"{folder}/{task}.train.json")[0]["instruction"] for task in TASKS}
    return [task for task in TASKS if [*said.values()].count(said[task]) == 1]


def features_of_task(model, tokenizer, path, count, instruction):
    """Return h_bar [n, features] of the first prompts of a file, with the instruction or with the input in
    its place."""
    records = [r if instruction else {"instruction": r["input"]} for r in read_records(path)]
    rows = (prompt_ids(record, tokenizer, "alpaca") for record in records)
    rows = [(row, []) for row in rows if len(row) < LONGEST][:count]
    return probe_all(model, rows, "prompt")


@torch.no_grad()
def aim(dynamics, h_bar):
    """Let the GRU's candidate start from the principal directions of the standardised h_bar [n, features], as
    many as z has, rotated at random. A fresh GRU has random directions."""
    x, d = (h_bar - dynamics.mean) / dynamics.deviation, len(dynamics.z0)
    principal = torch.pca_lowrank(x, q=min(d, *x.shape), center=False)[2]  # [features, d or fewer]
    rotation = torch.linalg.qr(torch.randn(d, d)).Q[:, : principal.shape[1]]
    dynamics.gru.weight_ih[2 * d :] = rotation.to(x.device) @ principal.T  # the last third is the candidate's


def area_under_curve(known, unknown):
    """Return how often an unknown prompt has a larger figure than a known one (AUROC). known [n], unknown
    [k]; a draw counts half."""
    above = (unknown[:, None] > known).double() + 0.5 * (unknown[:, None] == known)
    return float(above.mean())


def calibration_error(sure, right, bins=10):
    """Return the expected calibration error: how far the mean of `sure` [n] is from the share that is `right`
    [n], in bins of equal width, weighed by how many are in each."""
    place = (sure * bins).long().clamp(max=bins - 1)
    sums = torch.zeros(bins, dtype=torch.float64).index_add(0, place, sure - right.double())
    return float(sums.abs().sum() / len(sure))


@torch.no_grad()
def measure(fitted, asked, own, d, seed, aimed):
    """fitted, asked: {task: h_bar}; own: the tasks whose instruction no other has; d: the dimension of the
    coordinate; aimed: see `aim`. Return what is published of one draw of the dynamics."""
    torch.manual_seed(seed)
    first = next(iter(fitted.values()))
    dynamics = CoordinateDynamics(first.shape[1], d)
    dynamics.standardise(first)
    if aimed:
        aim(dynamics, first)
    regions = {task: Region.fit(dynamics(h)) for task, h in fitted.items()}
    z = {task: dynamics(h) for task, h in asked.items()}
    found = {task: route(z[task], [*regions.values()]) for task in regions}
    right = torch.cat([found[task].choice == i for i, task in enumerate(regions)])
    sure = torch.cat([f.probability for f in found.values()])
    row = {"home": float(right.double().mean()), "calibration error": calibration_error(sure, right)}
    left = {task: leave_out(task, regions, z) for task in regions}
    row |= {key: statistics.mean(x[key] for x in left.values()) for key in next(iter(left.values()))}
    row |= {"AUROC, own instruction": statistics.mean(left[task]["AUROC"] for task in own)}
    return row | {"AUROC of each": {task: x["AUROC"] for task, x in left.items()}}


def leave_out(task, regions, z):
    """Return what is measured with one task's region taken away."""
    others = {t: r for t, r in regions.items() if t != task}
    routed = {t: route(z[t], [*others.values()]) for t in regions}
    known = [routed[t] for t in others]
    outside = lambda f: ~f.inside.gather(1, f.choice[:, None])[:, 0]
    share = lambda parts: float(torch.cat(parts).double().mean())
    return {
        "AUROC": area_under_curve(torch.cat([f.unknown for f in known]), routed[task].unknown),
        "known refused": share([~f.known() for f in known]),
        "unknown refused": share([~routed[task].known()]),
        "known outside tau": share([outside(f) for f in known]),
        "unknown outside tau": share([outside(routed[task])]),
    }


def main(argv=None):
    p = Parser(__doc__, prog="sure.py")
    p.add_argument("--backbone", default="tiny", help="see train.py")
    p.add_argument("--data", required=True, metavar="FOLDER", help="where the tasks are")
    p.add_argument("--part", choices=["choose", "test"], default="test", help="which records are routed")
    p.add_argument("--seeds", type=number(int, 1, 100), default=3, help="of the dynamics")
    p.add_argument("--wide", type=number(float, 0, 100), nargs="+", default=[2.0], help="of the background")
    temperatures = dict(type=number(float, 0.01, 100), nargs="+", default=[field.TEMPERATURE])
    p.add_argument("--temperature", **temperatures, help="of the probabilities")
    dimensions = dict(type=number(int, 1, 4096), nargs="+", default=[DEFAULTS["coord_dim"]])
    p.add_argument("--coord-dim", **dimensions, help="of the coordinate")
    p.add_argument("--ways", choices=["plain", "mean", "aimed"], nargs="+", default=["plain"], help="to z")
    p.add_argument("--json", type=output_file, help="write what was measured to this file")
    args = p.parse_args(argv)
    backbone, tokenizer = load_backbone(args.backbone, "cpu")
    model, rows = NIWF(backbone, pad_of(tokenizer), bare=default_bare(len(layers_of(backbone)))), {}
    read, own = functools.partial(features_of_task, model, tokenizer), alone(args.data)
    for prompts in (WHOLE, "inputs alone"):
        fitted, asked = (
            {t: read(f"{args.data}/{t}.{part}.json", count, prompts == WHOLE) for t in TASKS}
            for part, count in (("train", FIT), (args.part, ASKED))
        )
        grid = itertools.product(args.wide, args.temperature, args.coord_dim, args.ways)
        for wide, temperature, d, way in grid:
            sets = [fitted, asked]
            if way == "mean":  # the first half of the features
                sets = [{task: h[:, : h.shape[1] // 2] for task, h in each.items()} for each in sets]
            patches = {"background": functools.partial(background, wide=wide), "TEMPERATURE": temperature}
            with unittest.mock.patch.multiple(field, **patches):
                each = [measure(*sets, own, d, seed, way == "aimed") for seed in range(args.seeds)]
            said = f"{prompts}, background x {wide:g}, temperature {temperature:g}, d {d}"
            rows[said + {"plain": "", "mean": ", mean alone", "aimed": ", aimed"}[way]] = each
    names = [name for name, value in each[0].items() if isinstance(value, float)]
    mean = lambda row, name: f"{statistics.mean(x[name] for x in row):.3f}"
    means = [[what, *(mean(row, name) for name in names)] for what, row in rows.items()]
    print_table("routing of thirteen tasks, and of one that is left out", ["", *names], means)
    write_results(args.json, "-m studies.sure", argv, indent=1, rows=rows)


if __name__ == "__main__":
    run_program(main)
