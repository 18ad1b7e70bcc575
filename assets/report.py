"""Pictures of published results. Nothing is computed again: they are drawn from result files alone.

    python synthetic.py --seeds 8 --json assets/results/ftn-experiment-1.json
    python assets/report.py --figures assets/results/ftn-experiment-1.json --to assets

For every variant that the files hold, as PNG in the folder `--to`:

    ftn-masks-VARIANT.png    the masks of the methods that search them, a colour for every task (Figures 1, 4)
    ftn-curves-VARIANT.png   every task's score through the stream, mean over seeds (Figure 3)
    ftn-matrices-style.png   R[i][j], recovered, mean over seeds (Figure 2)

A result file may come from anywhere, so it is checked whole when it is read: `parse_row`.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while torch is imported: one line, no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"\nreport.py: stopped\n") and 130))

import dataclasses
import itertools
import json
import pathlib
import statistics
import sys

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
except ImportError:
    matplotlib = None

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from commit import Parser, atomic, run_program
from model import Refused
from synthetic import METHODS, VARIANTS, Adapters, FixedMask, Row, SearchedMask, StyleRow

PNG = b"\x89PNG\r\n\x1a\n"


# ----------------------------------------------------------------------------------------- reading results


def read_rows(path):
    """The rows of a file that `synthetic.py --json` wrote. Refused: it is no such file."""
    try:
        results = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise Refused(f"{path}: not JSON, or cut short") from None
    if not isinstance(results, dict) or not isinstance(results.get("rows"), list) or not results["rows"]:
        raise Refused(f"{path}: no results of synthetic.py (field rows)")
    rows = []
    for i, row in enumerate(results["rows"]):
        try:
            rows.append(parse_row(row))
        except ValueError as e:
            raise Refused(
                f"{path}: row {i}: field {e} is missing, or is not what synthetic.py writes"
            ) from None
    return rows


def parse_row(result):
    """What `run_row` returned, with defaults for the fields of a row that older files lack.

    ValueError: the name of a field that is missing or has another type, length or range.
    """
    check(isinstance(result, dict), "variant")
    kind, result = StyleRow if result.get("variant") == "style" else Row, dict(result)
    for field in dataclasses.fields(kind):
        types = {float: (int, float), tuple: (list, tuple)}.get(field.type, (field.type,))
        check(type(result.setdefault(field.name, field.default)) in types, field.name)
    check(result["variant"] in VARIANTS, "variant")
    check(result["method"] in METHODS, "method")
    learner, mask = METHODS[result["method"]]
    check((learner is Adapters) == (kind is StyleRow), "method")
    check(2 <= result["tasks"] <= 100, "tasks")
    check(1 <= result["steps"] <= 100_000, "steps")
    check_scores(result)
    if isinstance(mask, (FixedMask, SearchedMask)):
        check_masks(result)
    return result


def check(true, field):
    if not true:
        raise ValueError(field)


def is_list(value, length, low=-1e30, high=1e30, types=(int, float)):
    """A list of so many numbers in a range, which leaves out nan."""
    return (
        type(value) is list
        and len(value) == length
        and all(type(v) in types and low <= v <= high for v in value)
    )


def check_scores(result):
    """R[i][j] for j <= i, and the curve: a score of every task so far, and once at the end of every task."""
    n, steps = result["tasks"], result["steps"]
    for name in ("R_stored", "R_recovered"):
        R = result.get(name)
        check(type(R) is list and len(R) == n and all(is_list(r, i + 1) for i, r in enumerate(R)), name)
    curve = result.get("curve")
    check(type(curve) is list and all(type(point) is dict for point in curve), "curve")
    check(is_list([point.get("step") for point in curve], len(curve), 1, n * steps, (int,)), "curve")
    for point in curve:
        so_far = -(-point["step"] // steps)
        check(is_list(point.get("stored"), so_far) and is_list(point.get("recovered"), so_far), "curve")
    check({step * steps for step in range(1, n + 1)} <= {point["step"] for point in curve}, "curve")
    for name in ("parameters_moved", "outputs_moved"):
        check(is_list(result.get(name), n), name)
    check(is_list([result.get("ms_per_step"), result.get("seconds")], 2), "seconds")


def check_masks(result):
    """The winners of every task, as indices of a square, and a share for every pair of tasks."""
    n, side, winners = result["tasks"], result.get("final_side"), result.get("winners")
    check(is_list([side], 1, 1, 1000, (int,)), "final_side")
    check(type(winners) is list and len(winners) == n, "winners")
    for w in winners:
        check(is_list(w, result["k"], 0, side * side - 1, (int,)) and len(set(w)) == len(w), "winners")
    check(is_list(result.get("touched"), n, 0, side * side, (int,)), "touched")
    for name in ("overlap_last", "overlap_union", "overwritten"):
        check(is_list(result.get(name), n * (n - 1) // 2), name)


def grouped(results):
    """{variant: its results}. Refused: they differ in more than method and seed, or one is there twice."""
    groups = {}
    for result in results:
        groups.setdefault(result["variant"], []).append(result)
    for variant, group in groups.items():
        names = [f.name for f in dataclasses.fields(StyleRow if variant == "style" else Row)]
        for name in names:
            values = {json.dumps(result[name]) for result in group}
            if name not in ("method", "seed") and len(values) > 1:
                raise Refused(
                    f"rows of {variant} differ in {name} ({', '.join(sorted(values))}): draw them apart"
                )
        if len({tuple(point["step"] for point in result["curve"]) for result in group}) > 1:
            raise Refused(f"rows of {variant} differ in the steps of field curve")
        if len({(result["method"], result["seed"]) for result in group}) < len(group):
            raise Refused(f"a row of {variant} is there more than once (fields method and seed)")
    return groups


# --------------------------------------------------------------------------------------------- the figures


def draw_figures(results, folder):
    """Draw all that the results allow, as PNG in `folder`."""
    for variant, group in grouped(results).items():
        by_method = {m: [r for r in group if r["method"] == m] for m in METHODS}
        by_method = {m: rows for m, rows in by_method.items() if rows}
        searched = {m: rows for m, rows in by_method.items() if isinstance(METHODS[m][1], SearchedMask)}
        if searched:
            save(draw_masks(searched), folder / f"ftn-masks-{variant}.png")
        if variant == "style":
            save(draw_matrices(by_method), folder / f"ftn-matrices-{variant}.png")
        save(draw_curves(by_method, VARIANTS[variant]["title"]), folder / f"ftn-curves-{variant}.png")


def draw_masks(by_method):
    """FTN Figures 1 and 4: a tile for every method and seed, a colour for every task, summed and clipped."""
    seeds = sorted({r["seed"] for rows in by_method.values() for r in rows})
    size = 1.3 * len(seeds) + 1, 1.4 * len(by_method)
    figure, axes = plt.subplots(len(by_method), len(seeds), figsize=size, squeeze=False)
    for (method, rows), line in zip(by_method.items(), axes):
        line[0].set_ylabel(method, fontsize=8)
        for seed, axis in zip(seeds, line):
            axis.set(xticks=[], yticks=[])
            for r in rows:
                if r["seed"] == seed:
                    axis.imshow(mask_image(r), interpolation="nearest")
    for seed, axis in zip(seeds, axes[0]):
        axis.set_title(f"seed {seed}", fontsize=8)
    figure.tight_layout()
    return figure


def mask_image(result):
    """[D, D, 3]"""
    side, n = result["final_side"], result["tasks"]
    image = torch.zeros(side * side, 3)
    for t, winners in enumerate(result["winners"]):
        image[winners] += torch.tensor(matplotlib.colors.hsv_to_rgb((t / n, 1, 1))).float()
    return image.clamp(max=1).view(side, side, 3).numpy()


def draw_matrices(by_method):
    """FTN Figure 2: R[i][j], recovered, mean over seeds."""
    figure, axes = plt.subplots(1, len(by_method), figsize=(2.2 * len(by_method), 2.6), squeeze=False)
    for axis, (method, rows) in zip(axes.flat, by_method.items()):
        n = rows[0]["tasks"]
        cells = [[float("nan")] * n for _ in range(n)]
        for j, i in itertools.combinations_with_replacement(range(n), 2):
            cell = cells[i][j] = statistics.mean(r["R_recovered"][i][j] for r in rows)
            look = dict(ha="center", va="center", fontsize=6, color="white" if cell > 4 else "black")
            axis.text(j, i, f"{cell:.1f}", **look)
        axis.imshow(cells, vmin=0, vmax=8, cmap="viridis_r")
        axis.set_title(method, fontsize=8)
        axis.set(xticks=[], yticks=[], xlabel="task", ylabel="after task")
    figure.tight_layout()
    return figure


def draw_curves(by_method, title):
    """FTN Figure 3, and the same for experiment 1: a panel for every method, a colour for every task."""
    lines = -(-len(by_method) // 3)
    shared = dict(sharex=True, sharey=True, squeeze=False, layout="constrained")
    figure, axes = plt.subplots(lines, 3, figsize=(11, 2.3 * lines), **shared)
    for axis in axes.flat[len(by_method) :]:
        axis.axis("off")
    for axis, (method, rows) in zip(axes.flat, by_method.items()):
        axis.set_title(method, fontsize=9)
        axis.tick_params(labelbottom=True)
        protocols = (("recovered", "-"), ("stored", ":"))
        for t, (protocol, style) in itertools.product(range(rows[0]["tasks"]), protocols):
            seeds = zip(*(r["curve"] for r in rows))
            points = [
                (point[0]["step"], statistics.mean(p[protocol][t] for p in point))
                for point in seeds
                if len(point[0][protocol]) > t
            ]
            look = dict(marker=".", markersize=3, color=f"C{t}", label=f"task {t + 1}, {protocol}")
            axis.plot(*zip(*points), style, **look)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel(title, fontsize=9)
    return figure


def save(figure, path):
    """Refused: something else than a picture is already there."""
    if path.exists() and path.read_bytes()[: len(PNG)] != PNG:
        raise Refused(f"{path} is there and is no PNG; it stays as it is")
    with atomic(path) as tmp:
        figure.savefig(tmp, dpi=120, format="png", metadata={"Software": None})
    plt.close(figure)
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------- the command line


def main(argv=None):
    parser = Parser(prog="report.py", description="Draw results that synthetic.py --json wrote.")
    parser.add_argument("--figures", nargs="+", type=pathlib.Path, required=True, metavar="FILE.json")
    parser.add_argument(
        "--to", type=pathlib.Path, default="runs/figures", metavar="DIR", help="[runs/figures]"
    )
    args = parser.parse_args(argv)
    results = [row for path in args.figures for row in read_rows(path)]
    if matplotlib is None:
        raise Refused("figures need matplotlib: pip install matplotlib")
    draw_figures(results, args.to)


if __name__ == "__main__":
    run_program(main)
