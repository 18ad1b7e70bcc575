"""The page of results and its pictures. Nothing is computed again: all is made of studies/results/*.json.

    python -m studies.report      # writes studies/results/README.md, whole, and the tables of the README
    python -m studies.report --figures --to assets     # every picture, of what is published
    python -m studies.report --figures FILE.json       # FTN's alone, of what synthetic.py wrote

What is drawn, as PNG in the folder `--to`, stands in `PICTURES`. FTN's are made for every variant that the
files hold: masks (Figures 1 and 4), curves (Figure 3) and, for styles, matrices (Figure 2).

A file to draw may come from anywhere, so it is checked whole when it is read.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while torch is imported: one line, no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"\nreport.py: stopped\n") and 130))

import contextlib
import dataclasses
import io
import itertools
import json
import math
import pathlib
import re
import statistics
import types

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
except ImportError:
    matplotlib = None

import torch

HOME = pathlib.Path(__file__).resolve().parent.parent
from studies.claims import Rows, ftn_claims, niwf_claims, share
from eval import report
from plumbing import Refused
from plumbing.command import Parser, run_program
from plumbing.files import atomic
from studies.findings import FINDINGS, GENERATORS, HIDDEN, ONE_FOR_ALL, not_as_printed, shared_and_lost, table
from plumbing.tables import spread
from studies import neurons, styles
from studies.architectures import VERDICTS
from studies.memory import PARTS, TABLE_2, memory_lines
from studies.neurons import StudyRow
from studies.styles import Adapters, StyleRow
from studies.tables import PUBLISHED, decomposition
from synthetic import VARIANTS, FixedMask, SearchedMask, row_summary

KNOWN = neurons.KNOWN | styles.METHODS

RESULTS = HOME / "studies" / "results"
PNG = b"\x89PNG\r\n\x1a\n"


# ----------------------------------------------------------------------------------------- reading results


def read_rows(path):
    """The rows of a file that `synthetic.py --json` wrote. Raises Refused if it is no such file."""
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
    kind, result = StyleRow if result.get("variant") == "style" else StudyRow, dict(result)
    for field in dataclasses.fields(kind):
        types = {float: (int, float), tuple: (list, tuple)}.get(field.type, (field.type,))
        check(type(result.setdefault(field.name, field.default)) in types, field.name)
    check(result["variant"] in VARIANTS, "variant")
    check(result["method"] in KNOWN, "method")
    learner, mask = KNOWN[result["method"]]
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
    """{variant: its results}. Raises Refused if they differ in more than method and seed."""
    groups = {}
    for result in results:
        groups.setdefault(result["variant"], []).append(result)
    for variant, group in groups.items():
        names = [f.name for f in dataclasses.fields(StyleRow if variant == "style" else StudyRow)]
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
        by_method = {m: [r for r in group if r["method"] == m] for m in KNOWN}
        by_method = {m: rows for m, rows in by_method.items() if rows}
        searched = {m: rows for m, rows in by_method.items() if isinstance(KNOWN[m][1], SearchedMask)}
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
    columns = min(3, len(by_method))
    lines = -(-len(by_method) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.4 * columns, 2.6 * lines), squeeze=False)
    for axis in axes.flat[len(by_method) :]:
        axis.axis("off")
    for axis, (method, rows) in zip(axes.flat, by_method.items()):
        n = rows[0]["tasks"]
        cells = [[float("nan")] * n for _ in range(n)]
        for j, i in itertools.combinations_with_replacement(range(n), 2):
            cell = cells[i][j] = statistics.mean(r["R_recovered"][i][j] for r in rows)
            look = dict(ha="center", va="center", fontsize=8, color="white" if cell > 4 else "black")
            axis.text(j, i, f"{cell:.1f}", **look)
        axis.imshow(cells, vmin=0, vmax=8, cmap="viridis_r")
        axis.set_title(method, fontsize=10)
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


BLUE, ORANGE = "#0072b2", "#e69f00"  # told apart whatever colours one sees


def draw_idea():
    """The way of one prompt, with the tiny backbone's numbers. A drawing: nothing in it is measured."""
    figure = plt.figure(figsize=(7.2, 3.7))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 72), ylim=(0, 37))
    axis.axis("off")
    axis.text(36, 34.4, "A prompt finds its capability by its coordinate", ha="center", fontsize=13)
    box, middle = dict(boxstyle="round,pad=0.5", fc="white"), dict(ha="center", va="center", fontsize=10)
    axis.text(8, 26, '"Name three\nfruits."', bbox=box, **middle)
    axis.text(8, 11, "frozen\nbackbone", bbox=dict(box, fc="0.9"), **middle)
    axis.add_patch(plt.Rectangle((19, 4.5), 27, 27, fc="none", ec="0.5"))
    axis.text(32.5, 2.4, "the plane of coordinates z", **middle)
    random = torch.Generator().manual_seed(3)
    homes = (27, 23.5, 20, BLUE, "o", "alpaca", 22), (38, 12, -15, ORANGE, "s", "code", 7)
    for x, y, angle, colour, marker, task, bottom in homes:
        axis.add_patch(matplotlib.patches.Ellipse((x, y), 14, 9, angle=angle, fc=colour, alpha=0.25))
        points = torch.rand(20, 2, generator=random) * torch.tensor([8, 4.4]) + torch.tensor([x - 4, y - 2.2])
        axis.scatter(*points.T.tolist(), s=14, marker=marker, color=colour)
        axis.text(x + 2, y + 6, f"region of {task}", **middle)
        axis.text(60.5, bottom + 9.4, f"version {task}", **middle)
        for layer in range(4):
            chosen = torch.randperm(16, generator=random)[: 8 if task == "alpaca" else 0].tolist()
            for basis in range(16):
                look = dict(fc=colour if basis in chosen else "white", ec=colour, linewidth=0.8)
                axis.add_patch(plt.Rectangle((52.5 + basis, bottom + 2 * layer), 0.8, 1.6, **look))
    axis.text(60.5, 19.9, "8 of 16 bases a layer", **middle)
    axis.scatter(29, 22.5, s=190, marker="*", color="black", zorder=3)
    look = dict(arrowstyle="-|>", lw=1.6, color="black", shrinkA=0, shrinkB=0)
    for start, end in (((8, 22.8), (8, 14.4)), ((12.6, 12), (28, 21.6)), ((30.2, 22.7), (52, 25.6))):
        axis.annotate("", end, start, arrowprops=look)
    steps = (8, 18.6, "1 probe"), (25, 12, "2 coordinate"), (41, 27, "3 route"), (49.6, 19.9, "4 gate")
    for x, y, step in steps:
        axis.text(x, y, step, color="white", bbox=dict(box, boxstyle="round,pad=0.25", fc="black"), **middle)
    return figure


def draw_coordinates(runs):
    """The coordinates of every run's tasks, after its last one, in a plane of its own."""
    figure, axes = plt.subplots(
        1, len(runs), figsize=(4.6 * len(runs), 4.4), squeeze=False, layout="constrained"
    )
    for axis, run in zip(axes[0], runs):
        for colour, (task, found) in zip((BLUE, ORANGE), run["coordinates"].items()):
            home = 100 * sum(found["home"]) / len(found["home"])
            for inside, marker in ((1, "o"), (0, "x")):
                points = [p for p, h in zip(found["tsne"], found["home"]) if h == inside]
                label = f"{task}, {home:.0f} % in its region" if inside else f"{task}, outside it"
                axis.scatter(*zip(*points or [(math.nan,) * 2]), s=12, marker=marker, c=colour, label=label)
        axis.set(xticks=[], yticks=[], title=f"--lock {run['lock']}: after {run['tasks'][-1]}")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False)
    return figure


def draw_gating(run):
    """A panel for every version: the share of its inputs for which a layer chooses a basis."""
    usage = run["usage"]
    figure, axes = plt.subplots(
        len(usage), 1, figsize=(8, 1.9 * len(usage)), squeeze=False, layout="constrained"
    )
    for axis, (task, shares) in zip(axes[:, 0], usage.items()):
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        axis.set(ylabel="layer", title=f"version {task}", yticks=range(len(shares)))
    axes[-1, 0].set_xlabel("basis, in the order of the tasks that wrote it")
    figure.colorbar(image, ax=axes[:, 0], label="share of inputs")
    return figure


def draw_losses(runs):
    """The loss of every training step and its mean over 20 steps, a panel for every task, a colour for every
    lock: they share the first task's training."""
    tasks = runs[0]["tasks"]
    shared = dict(sharey=True, squeeze=False, layout="constrained")
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3), **shared)
    for axis, task in zip(axes[0], tasks):
        for colour, run in zip((BLUE, ORANGE), runs):
            losses = torch.tensor(run["losses"][task])
            window = min(20, len(losses))
            axis.plot(range(1, len(losses) + 1), losses, color=colour, alpha=0.25, linewidth=0.8)
            smooth = losses.unfold(0, window, 1).mean(1)
            axis.plot(range(window, len(losses) + 1), smooth, color=colour, label=f"--lock {run['lock']}")
        alike = len({tuple(run["losses"][task]) for run in runs}) == 1
        axis.set(title=task + ", the same under both" * alike, xlabel="training step", yscale="log")
    axes[0, 0].set_ylabel("loss, nats per token")
    axes[0, -1].legend(fontsize=8)
    return figure


def draw_growth(lines):
    """What n versions of a stream know and cost, for every n."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    n = [x["n"] for x in lines]
    axes[0].plot(n, [100 * x["routed_home"] for x in lines], color=BLUE)
    axes[0].set(title="prompts routed home", ylabel="%", ylim=(90, 100.3))
    axes[1].plot(
        n, [x["memory"] / 1e6 for x in lines], color=BLUE, label="peak of a process that answers for 3"
    )
    files = list(itertools.accumulate(x["bytes"] / 1e6 for x in lines))
    axes[1].plot(n, files, "--", color=ORANGE, label="all version files")
    axes[1].set(title="memory and disk", ylabel="MB", ylim=(0, None))
    axes[1].legend(fontsize=7)
    for key, colour, style in (("routed", BLUE, "-"), ("stored", ORANGE, "--"), ("bare", "0.4", ":")):
        axes[2].plot(n, [x[f"{key}_ms"] for x in lines], style, color=colour, label=key)
    axes[2].set(title="time of a token", ylabel="ms", ylim=(0, None))
    axes[2].legend(fontsize=7)
    for axis in axes:
        axis.set_xlabel("versions")
    return figure


def draw_memory(rows):
    """The parts of a training's memory on one device, from the shapes, beside the paper's Table 2."""
    bars = {"the paper, both tasks": {part: size * 1e9 for part, size in TABLE_2.items() if size}}
    for row in (row for row in rows if row["devices"] == 1):
        name = f"task {row['task']}" + ", checkpointing" * row["checkpointing"]
        bars[name] = {part: row[part] for part in PARTS}
    figure, axis = plt.subplots(figsize=(8, 2.9), layout="constrained")
    colours = ["#999999", "#56b4e9", "#0072b2", "#000000", "#e69f00", "#d55e00", "#009e73"]
    for y, parts in enumerate(bars.values()):
        left = 0
        for part, colour in zip(PARTS, colours):
            size = parts.get(part, 0) / 2**30
            axis.barh(y, size, left=left, color=colour, edgecolor="white", label=part if y == 1 else None)
            left += size
        axis.text(left + 0.2, y, f"{left:.1f}", va="center", fontsize=8)
    axis.axvline(24, color="0.4", linestyle=":")
    axis.text(24.1, len(bars) - 0.45, "24 GiB", fontsize=8, color="0.3")
    axis.set(yticks=range(len(bars)), yticklabels=list(bars), xlim=(0, 27), xlabel="GiB")
    axis.invert_yaxis()
    axis.set_title("Memory of training Mistral-7B, a micro-batch of 256 tokens", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def draw_two_tasks(rows):
    """R of every method, stored, mean over seeds: perplexity on A and B, before and after either."""
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    size = 2.0 * columns, 2.0 * lines
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    for axis, (name, seeds) in zip(axes.flat, rows.items()):
        cells = [[*seeds[0]["base"].values()], [math.nan] * 2, [math.nan] * 2]
        for i, j in ((0, 0), (1, 0), (1, 1)):
            cells[i + 1][j] = statistics.mean(row["R"]["stored"][i][j] for row in seeds)
        axis.imshow([[math.log(x) for x in line] for line in cells], vmin=0, vmax=2.4, cmap="viridis_r")
        for i, j in itertools.product(range(3), range(2)):
            if not math.isnan(cells[i][j]):
                look = dict(ha="center", va="center", fontsize=9, color="white" if i == 0 else "black")
                axis.text(j, i, f"{cells[i][j]:.3f}", **look)
        axis.set_title(name, fontsize=8)
        axis.set(xticks=[0, 1], yticks=range(3))
        axis.set_xticklabels(["on A", "on B"], fontsize=8)
        axis.set_yticklabels(["before", "after A", "after B"] if axis in axes[:, 0] else [""] * 3, fontsize=8)
    figure.suptitle("perplexity with the right version given, mean over seeds", fontsize=9)
    return figure


def draw_overlap(read):
    """A point a stream: what its last masks share, mean over pairs, and what it forgets, stored."""
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    series = [(label, files, "ftn-slow", BLUE) for label, files in GENERATORS.items()]
    series.append(("three more for all", ONE_FOR_ALL[2:], "ftn-slow", BLUE))
    series.append(("older neurons hidden, S 10, m0 -4", HIDDEN.values(), "ftn-slow-hidden", ORANGE))
    for (label, files, method, colour), marker in zip(series, "os^DvP*x"):
        rows = [row for file in files for row in Rows(read(file)).of("clf", method)]
        axis.scatter(*zip(*shared_and_lost(rows)), s=30, marker=marker, c=colour, alpha=0.7, label=label)
    axis.set(xlabel="share of neurons that two last masks have in common", ylabel="FM, stored")
    axis.legend(fontsize=8, title="task generator", title_fontsize=8)
    return figure


def save(figure, path):
    """Refused: something else than a picture is already there."""
    if path.exists() and path.read_bytes()[: len(PNG)] != PNG:
        raise Refused(f"{path} is there and is no PNG; it stays as it is")
    with atomic(path) as tmp:
        figure.savefig(tmp, dpi=120, format="png", metadata={"Software": None})
    plt.close(figure)
    print(f"wrote {path}")


# ------------------------------------------------------------------------------------------------- the page
#
# A section is a title, a sentence or two, what findings.py says of it, and the tables of its files, each made
# by a function of the file's content.


def over(values, digits=3):
    """Mean and deviation over seeds."""
    return spread(values, digits).replace("±", "± ")


def learned(row):
    """Perplexity on the first task when it was committed."""
    return row["R"]["stored"][0][0]


def two_tasks(content):
    """rows {name: a dict a seed} of variants.py: perplexity on A, learned first, and on B."""
    cells = [("stored", 0, 0), ("stored", 1, 0), ("routed", 1, 0), ("stored", 1, 1), ("routed", 1, 1)]
    first = next(iter(content["rows"].values()))
    a, b = (over([row["base"][task] for row in first]) for task in first[0]["tasks"])
    lines = [["bare backbone", a, a, a, b, b, "", "", ""]]
    for name, seeds in content["rows"].items():
        line = [name] + [over([row["R"][p][i][j] for row in seeds]) for p, i, j in cells]
        home = [
            over([share(row["routing"][t], t, row) for row in seeds], 1) for t in seeds[0].get("routing", ())
        ]
        sizes = [f"{seeds[0][key] / 1e6:.2f} M" for key in ("trained parameters", "kept parameters")]
        lines.append([*line, " / ".join(home), *sizes])
    heads = ["", "A learned", "A after B, stored", "routed", "B stored", "B routed", "routed home, %"]
    return table([*heads, "trained", "kept"], lines)


def one_task(content):
    """rows {name: a dict a seed} of variants.py: what one task learned."""
    lines = []
    for name, seeds in content["rows"].items():
        line = [name, over([math.log(learned(row)) for row in seeds], 4)]
        line += [over([learned(row) for row in seeds], 4), f"{seeds[0]['trained parameters'] / 1e6:.2f} M"]
        if "gating" in seeds[0]:
            line += [over([row["gating"]["alpaca"][key] for row in seeds], 1) for key in ("sets", "bases")]
            line.append(over([share(row["inside"]["alpaca"], "alpaca", row) for row in seeds], 1))
        lines.append(line + [""] * (7 - len(line)))
    heads = ["", "nats a token", "perplexity", "trained", "choices a layer", "bases that carry weight"]
    return table([*heads, "inside their region, %"], lines)


def drift(content):
    """rows {name: a dict a seed} of variants.py: what a soft lock held of the first task, and what not."""
    lines = []
    for name, seeds in content["rows"].items():
        drifts = [row["drift"]["alpaca"] for row in seeds]
        line = [name] + [
            over([row["forgetting"][p]["alpaca"] for row in seeds], 1) for p in ("stored", "routed")
        ]
        line.append(f"{statistics.mean(d['lock_loss'] for d in drifts):.1e}")
        line.append(over([100 * d["top_k_kept"] for d in drifts], 2))
        line.append(over([d["moved"] for d in drifts], 2))
        line += [over([100 * d[key] for d in drifts], 1) for key in ("inside_at_commit", "inside_now")]
        lines.append(line)
    heads = ["", "A forgotten, stored, %", "routed, %", "L_lock at the anchors", "top K kept there, %"]
    return table([*heads, "inputs moved by", "in their region at commit, %", "now, %"], lines)


def regions(content):
    """rows: a dict for each run folder, of variants.py."""
    lines = [
        [row["lock"], region, task, f"{100 * found['inside']:.1f}", f"{found['AUROC']:.3f}"]
        for row in content["rows"]
        for region, tasks in row["regions"].items()
        for task, found in tasks.items()
    ]
    return table(["lock", "region of", "inputs of", "inside it, %", "AUROC of the distance"], lines)


def exact_match(content):
    """A line for all of a task's prompts, and one for each kind that a seed has something wrong in."""
    kinds = {}
    for row in content["rows"]:
        for task, counts in row["exact_match"].items():
            for kind, (right, of) in {"all": [sum(c) for c in zip(*counts.values())], **counts}.items():
                kinds.setdefault((task, kind), []).append((right, of))
    lines = [
        [*name, " ".join(str(right) for right, _ in seeds), str(seeds[0][1])]
        for name, seeds in kinds.items()
        if name[1] == "all" or any(right < of for right, of in seeds)
    ]
    return table(["task", "kind", "right, by seed", "of"], lines)


def compositions(content):
    (row,) = content["rows"]
    names = list(next(iter(row["under"].values())))
    lines = [[task, *(f"{x:.3f}" for x in under.values())] for task, under in row["under"].items()]
    return table(["perplexity of", *(f"under {name}" for name in names)], lines)


def growth(content):
    """rows of bench.py growth: a line for the first few n, then for every eighth, and the last."""
    lines, rows = [], content["rows"]
    for x in (x for x in rows if x["n"] <= 3 or x["n"] % 8 == 0 or x is rows[-1]):
        line = [str(x["n"]), x["task"], f"{x['bases_read']} + {x['bases_written']}"]
        line += [f"{x['bytes'] / 1e6:.2f}", f"{x['commit_ms']:.0f}", f"{x['open_ms']:.0f}"]
        line += [f"{x['memory'] / 1e6:.0f}"]
        line += [f"{x[key]:.3f}" for key in ("bare_ms", "stored_ms", "routed_ms", "learned")]
        line += [f"{x['identical'][0]} of {x['identical'][1]}"]
        line += [f"{x[f'{p}_forgetting']:.4f}" for p in ("stored", "routed")]
        lines.append([*line, f"{100 * x['routed_home']:.1f}"])
    heads = ["n", "last task", "bases read + written", "file, MB", "commit, ms", "open all, ms"]
    heads += ["memory, answering for 3, MB", "ms a token: bare", "stored", "routed", "learned"]
    return table([*heads, "bit-identical", "forgotten, nats: stored", "routed", "routed home, %"], lines)


def transfer(content):
    """rows of variants.py transfer: losses of a stream's later tasks when they were learned."""
    lines = []
    for row in content["rows"]:
        losses = [[math.log(x) for x in row[key][1:]] for key in ("read", "own bases alone")]
        gains = [own - read for read, own in zip(*losses)]
        line = [str(len(gains)), *(f"{statistics.mean(column):.4f}" for column in losses)]
        line += [over(gains, 4), f"{statistics.median(gains):.4f}"]
        lines.append([*line, f"{sum(gain > 0 for gain in gains)} of {len(gains)}"])
    heads = ["later tasks", "nats a token, older bases read", "own bases alone", "gain: mean", "median"]
    return table([*heads, "tasks that gain"], lines)


def counted(content):
    """rows of studies.memory: the parts of a training's memory, in GiB, with 1, 2 and 4 devices."""
    heads = ["GiB", "task 1", "checkpointing", "task 2", "checkpointing"]
    found = memory_lines(content["rows"])
    lines = [[part, *(f"{size / 2**30:.2f}" for size in sizes)] for part, sizes in found.items()]
    if "--backbone" not in content["command"]:
        heads.append("the paper, GB")
        lines = [[*line, f"{TABLE_2[line[0]]:.2f}" if TABLE_2.get(line[0]) else ""] for line in lines]
    return table(heads, lines)


def measured(content):
    """rows of bench.py memory: a step's peak, measured and counted; of all layers, where the line leads."""
    lines = []
    for row in content["rows"]:
        sizes = [row[key] / 2**30 for key in ("measured", "counted")]
        how = "with" if row["checkpointing"] else "without"
        line = [row["backbone"], str(row["layers"]), how, *(f"{x:.2f}" for x in sizes)]
        lines.append([*line, f"{sizes[1] / sizes[0]:.3f}"])
    return table(
        ["shape", "layers", "checkpointing", "measured, GiB", "counted", "counted / measured"], lines
    )


def families(content):
    """rows of studies.architectures: which families of transformers came to each verdict, and how many."""
    rows, lines = content["rows"], []
    for verdict in VERDICTS:
        names = sorted(row["family"] for row in rows if row["verdict"] == verdict)
        lines.append([verdict, str(len(names)), ", ".join(names)])
    if sum(int(count) for _, count, _ in lines) != len(rows):
        raise KeyError("verdict")
    return table(["verdict", "families", "which"], lines)


def timings(content):
    """rows {what: {side: {"seconds", "peak memory"}}} of bench.py."""
    rows = {
        what: {n: found["seconds"] for n, found in sides.items()} for what, sides in content["rows"].items()
    }
    for what in list(rows):
        if tokens := re.fullmatch(r"(.*, prefill) and (\d+) tokens", what):
            after = {
                side: [(long - short) / int(tokens[2]) for long, short in zip(seconds, rows[tokens[1]][side])]
                for side, seconds in rows[what].items()
            }
            rows[what.replace("prefill and", "each of")] = after
    lines = []
    for what, sides in rows.items():
        ms = {side: 1000 * statistics.median(seconds) for side, seconds in sides.items()}
        memory = content["rows"].get(what, {})
        line = [what] + [f"{ms[side]:.2f}" if side in ms else "" for side in ("ours", "peft", "bare")]
        line.append(f"{ms['ours'] / ms['peft']:.2f}")
        lines.append(line + [memory[side]["peak memory"] if memory else "" for side in ("ours", "peft")])
    heads = ["ms", "ours", "peft", "bare backbone", "ours / peft"]
    return table([*heads, "peak memory, ours", "peft"], lines)


def depths(content):
    """rows of studies.depths, the m among DEPTHS: the share that is routed home."""
    rows = {(row["m"], row["h_bar"]): row["home"] for row in content["rows"]}
    shown = [m for m in DEPTHS if (m, "mean") in rows]
    cell = lambda m, what: over([100 * statistics.mean(pair) for pair in rows[m, what]], 1)
    lines = [[str(m), cell(m, "mean"), cell(m, "mean, last")] for m in shown]
    return table(["m", "the mean over tokens, %", "beside it the last token, %"], lines)


def in_processes(content):
    """rows of bench.py processes."""
    lines = []
    for what, found in content["rows"].items():
        one, two = (statistics.median(found[name]["seconds"]) for name in ("one", "two"))
        lines.append([what, f"{one:.1f}", f"{two:.1f}", f"{two / one:.2f}", f"{found['losses apart']:.0e}"])
    return table(["seconds", "one process", "two", "two / one", "losses of a step apart by"], lines)


def gathered(content):
    lines = [
        [what, side, f"{1000 * statistics.median(found['seconds']):.2f}", f"{found['bytes'] / 1e6:.1f}"]
        for what, sides in content["rows"].items()
        for side, found in sides.items()
    ]
    return table(["one projection", "bases gathered for", "ms", "MB gathered"], lines)


SAID = {  # of a row that has another value than the paper's
    "inputs": "{} inputs",
    "frequency": "frequency {:g}",
    "generator": "generator {}",
    "leak": "{} left out",
    "tasks": "{} tasks",
    "steps": "{} steps",
    "grow": "a grid that grows",
    "search": "S {0[0]:g}, eta {0[1]:g}",
    "m0": "m0 {:g}",
    "backbone": "{}",
    "reconfigure": "a search {} step",
    "b_std": "B's deviation {:g}",
}


def described(row):
    """A row of synthetic.py: its method, and what is not the default."""
    about = [row["method"]]
    for field in dataclasses.fields(StyleRow if row["variant"] == "style" else StudyRow):
        value = row.get(field.name, field.default)
        if field.name in SAID and value not in (field.default, []):
            about.append(SAID[field.name].format(value))
    return ", ".join(about)


def scores(content):
    """rows of synthetic.py: FTN Tables 1 to 3."""
    lines, groups = [], {}
    for row in content["rows"]:
        groups.setdefault((row["variant"], row["method"], described(row)), []).append(row_summary(row))
    keys = ("recovered_last", "recovered_fm", "stored_last", "stored_fm", "overlap_last", "parameters_moved")
    for (variant, method, title), seeds in groups.items():
        line = [variant, title, str(len(seeds))]
        line += [over([row.get(key) for row in seeds]) for key in keys]
        lines.append(line + list(PUBLISHED[variant].get(method, ("", ""))))
    heads = ["variant", "method", "seeds", "score, recovered", "FM", "score, stored", "FM"]
    heads += ["overlap of last masks", "own parameters moved", "paper: score", "FM"]
    return table(heads, lines)


def decomposed(content):
    """rows of synthetic.py: FTN Table 4."""
    groups, lines = {}, []
    for row in content["rows"]:
        groups.setdefault(row["variant"], []).append(row)
    for variant, group in groups.items():
        for method, losses in decomposition(group).items():
            lines.append([variant, method, *(over(column) for column in zip(*losses))])
    return table(["variant", "method", "lost by overlap", "lost in recall"], lines)


def offered(content):
    """rows of synthetic.py: what the adapters of a bank lose on a task's first batch, and which is taken."""
    groups, lines = {}, []
    for row in content["rows"]:
        for t in range(1, row["tasks"] * ("offered" in row)):
            old = {*row["chosen"][:t]}
            losses = [(loss, i in old) for i, loss in enumerate(row["offered"][t]) if loss is not None]
            best = [
                min((loss for loss, o in losses if o == is_old), default=None) for is_old in (True, False)
            ]
            groups.setdefault((row["method"], t + 1), []).append((*best, row["chosen"][t] in old))
    for (method, task), seeds in groups.items():
        trained, fresh, reused = zip(*seeds)
        lines.append([method, str(task), over(trained), over(fresh), f"{sum(reused)} of {len(seeds)}"])
    heads = ["method", "task", "lowest loss of those that older tasks trained", "of fresh ones"]
    return table([*heads, "an older task's taken"], lines)


def quick_start(content):
    """rows {name: a dict a seed} of variants.py: what train.py prints after the second task, first seed: with
    the exact lock and, of the first task, without a lock."""
    locked, free = (last_table(content["rows"][name][0]) for name in ("one pass", "one pass, no lock"))
    return ["```", *locked, "", "without --lock:", *free[1:3], "```"]


def last_table(row):
    """The lines that train.py prints at the end, from what was published of a run folder."""
    results = [{"task": task} for task in row["tasks"]]
    for (i, result), protocol in itertools.product(enumerate(results), ("stored", "routed")):
        result[protocol] = dict(zip(row["tasks"][: i + 1], row["R"][protocol][i]))
    results[-1] |= {key: row[key] for key in ("base", "routing", "inside", "identical")}
    results[-1] |= {"version": "", "gating": {}, "drift": {}}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        report(types.SimpleNamespace(tasks=row["tasks"], manifest={"results": results}))
    return out.getvalue().strip().splitlines()[1:]


DEPTHS = 1, 3, 5, 10, 15, 20, 25, 30  # layers m of SmolLM2 that are shown
LOCKS = {  # a row of the baselines: its name here, what a new task may write, what holds the old one
    "NIWF, exact lock": ("`--lock` (exact)", "its own bases and field", "nothing old is trained"),
    "NIWF, the paper's own": ("the paper's, as printed", "one bank, field, dynamics", "Eq. (13), see below"),
    "NIWF, soft lock": ("`--lock soft`: our probe", "one bank, field, dynamics", "the same"),
    "NIWF, no lock": ("no `--lock`", "one bank, field, dynamics", "nothing"),
    "LoRA r 64, one a task": ("LoRA, one a task", "its own adapter", "nothing old is trained"),
    "full fine-tuning": ("full fine-tuning", "all weights", "nothing"),
}


def locks(content):
    """rows {name: a dict a seed} of variants.py: the locks, and what they are to be compared with."""
    lines = []
    for name, said in LOCKS.items():
        R = [row["R"] for row in content["rows"][name]]
        cells = [("stored", 0, 0), ("stored", 1, 0), ("routed", 1, 0), ("routed", 1, 1)]
        lines.append([*said, *(f"{statistics.mean(r[p][i][j] for r in R):.3f}" for p, i, j in cells)])
    heads = ["", "a new task may write", "what holds the old one", "A learned", "A after B, stored"]
    return table([*heads, "A, routed", "B, routed"], lines)


IN_README = {"quick-start": ("tiny-passes", quick_start), "locks": ("tiny-baselines", locks)}

PICTURES = {
    "idea": "The idea: the way of one prompt.",
    "niwf-coordinates": "Coordinates of both tasks after the second, in a plane (t-SNE). Under the exact "
    "lock the first task's are where they were when it was committed.",
    "niwf-gating": "How often each basis is chosen in each layer, by the inputs of either version.",
    "niwf-losses": "Training loss, seed 0; thick: its mean over 20 steps.",
    "niwf-stream": "What n versions know and cost, for every n.",
    "niwf-memory": "Memory of a training step by component, counted from the shapes.",
    "niwf-matrices": "R[i][j] of NIWF and what it is compared with.",
    "ftn-masks-clf": "Masks, classification: a colour for each task.",
    "ftn-curves-clf": "Accuracy through the stream, mean over seeds.",
    "ftn-overlap": "What FTN-Slow forgets is what its masks share: a point a stream, classification.",
    "ftn-masks-reg": "Masks, regression.",
    "ftn-curves-reg": "Squared error through the stream, mean over seeds.",
    "ftn-masks-style": "Masks of six tasks; white where three or more overlap.",
    "ftn-curves-style": "Loss through the stream of styles.",
    "ftn-matrices-style": "R[i][j], recovered, of the adapters.",
}
# fmt: off
SECTIONS = [  # files of results, their table, the title where a section begins, what the table is of
    ("tiny-worth", one_task, "What the field is worth", "One task, general instructions, tiny backbone."),
    ("tiny-choose", one_task, "What was chosen among", "Other items and other seeds than are published."),
    ("tiny-passes", two_tasks, "One pass", "All other tables of NIWF, but families of models, are of two."),
    ("tiny-choose-passes", one_task, "", "Chosen among, on other items and other seeds:"),
    ("smollm2-choose-passes", one_task, "", "The same on SmolLM2 and real data, in one other seed:"),
    ("smollm2-passes", one_task, "", "And in a second seed, another part of the records:"),
    ("smollm2-depths", depths, "", "The share of real prompts, of two tasks, that are routed home by what "
     "enters layer m of SmolLM2, with dynamics as they are drawn, five seeds. 30: the last hidden states."),
    ("first-token-bench", timings, "", "The time until a routed answer begins. The LoRA of peft has as many "
     "parameters as run in ours; of Mistral's two layers one is bare, of all it would be three in 32:"),
    ("niwf-one-bench", timings, "", "A training step in one pass:"),
    ("memory-count-one", counted, "", "Memory of a training step in one pass, by count:"),
    ("tiny-baselines", two_tasks, "Baselines and locks", "Two tasks: A general instructions, B code. "
     "*Stored*: the right version is given; *routed*: the coordinate decides. Of one adapter, or of all "
     "weights, there is one version."),
    ("tiny-baselines-r128", two_tasks, "", "LoRAs as large as NIWF's bank:"),
    ("tiny-ablations", two_tasks, "Ablations", "The exact lock with one thing changed, and the other locks. "
     "Pooled over the whole sequence, *stored* sees the answer that it is asked to predict."),
    ("tiny-soft-lock", drift, "Why the soft lock forgets", "The same two tasks, parts frozen after A."),
    ("tiny-regions", regions, "One region alone", "Does it tell the tasks apart? On the tiny backbone:"),
    ("smollm2-regions", regions, "", "On SmolLM2 and real data:"),
    ("tiny-exact-match", exact_match, "Answers to the letter", "Greedy, routed, held-out prompts."),
    ("tiny-compose", compositions, "Compositions", "Two versions, weighted."),
    ("stream", growth, "Seventy-six tasks in a row", "Kinds of instruction, exact lock."),
    ("stream-transfer", transfer, "", "The same stream, and one whose versions never choose an older basis:"),
    ("architectures", families, "Families of models", "A micro model of each causal language model family of "
     "transformers, with random weights, is trained in two steps, decoded and exported."),
    ("memory-count", counted, "Memory", "Of one training step, from the shapes: 1 x 256 tokens, bfloat16."),
    ("memory-count-70b", counted, "", "A model of 70 B parameters, its layers spread evenly over devices:"),
    ("memory-bench", measured, "", "The count beside a process that does the step, on the CPU:"),
    ("smollm2-worth", one_task, "A real language model", "SmolLM2-135M-Instruct, real data."),
    ("smollm2-worth-two", one_task, "", "Two of them in two seeds:"),
    ("smollm2-baselines", two_tasks, "", "Two tasks, of another random part of the same two sets:"),
    ("niwf-bench", timings, "Speed beside peft", "A training step."),
    ("decode-bench", timings, "", "Answers:"),
    ("processes-bench", in_processes, "", "A whole training, each process on a core of its own:"),
    ("gather-bench", gathered, "What is gathered", "Bases gathered once a sequence, or for every token."),
    ("ftn-experiment-1 ftn-supsup-wide", scores, "Functional task networks", "The score is an accuracy in "
     "clf and a loss in reg and style. FM is forgetting: positive is worse. The paper leaves its generator "
     "open: ours was fixed after some 25 had been looked at on seeds 0 and 1, which are among those "
     "published."),
    ("ftn-leaks ftn-capacity", scores, "", "FixedMask with a precaution of Appendix C left out; more tasks "
     "than the grid has room for:"),
    ("ftn-experiment-1", decomposed, "Where the loss goes", "What earlier tasks lost against FixedMask: "
     "because masks overlap, and because the right one is not found again (Table 4)."),
    ("ftn-recall ftn-frequency-4 ftn-frequency-16 ftn-gaussian ftn-generator-0 ftn-generator-1", scores,
     "Is the search needed?", "Masks that no search has made, recalled as the lock recalls: the one with the "
     "lowest loss on a labelled batch. Other task generators: smoother and rougher tasks, inputs that are "
     "not uniform, and one generator for all seeds, twice."),
    ("ftn-search-1 ftn-search-1-low ftn-search-1-lower ftn-search-3 ftn-search-3-low ftn-search-10 "
     "ftn-search-10-low ftn-search-10-lower", scores, "Why the search forgets", "Chosen among these, on "
     "seeds 200 to 203: S steps at eta, from logits m0; *hidden*: in training the search does not see what "
     "earlier tasks have trained."),
    ("ftn-slow-10 ftn-fast-kwta-10 ftn-gaussian-10 ftn-frequency-16-10 ftn-slow-hidden ftn-gaussian-hidden "
     "ftn-frequency-16-hidden ftn-slow-hidden-10 ftn-gaussian-hidden-10 ftn-frequency-4-hidden-10 "
     "ftn-frequency-16-hidden-10", scores, "", "Some of them on the published seeds, and with other task "
     "generators:"),
    ("ftn-generator-2 ftn-generator-3 ftn-generator-4 ftn-generator-0-hidden-10 ftn-generator-1-hidden-10 "
     "ftn-generator-2-hidden-10 ftn-generator-3-hidden-10 ftn-generator-4-hidden-10 "
     "ftn-generator-4-recalled-10", scores, "", "Three more generators, each one for all seeds; and all "
     "five, with ten steps and older neurons hidden; on the last the stored masks recalled, too:"),
    ("ftn-choose-ewc-clf ftn-choose-ewc-reg ftn-choose-supsup-clf "
     "ftn-choose-supsup-reg", scores, "Baselines, tuned", "EWC by strength, SupSup by learning rate and by "
     "rule: scores over 0, or the top half of each layer. Chosen on seeds 200 to 203 ..."),
    ("ftn-ewc-tuned-clf ftn-ewc-tuned-reg ftn-supsup-tuned", scores, "", "... and on the published seeds:"),
    ("lora-ftn", scores, "LoRA-FTN", "Six ways to rewrite a sentence; nats per token."),
    ("lora-ftn", offered, "", "What a bank is offered when a task begins:"),
    ("lora-ftn-b-std lora-ftn-every lora-ftn-once", scores, "", "B not zero at the start; fewer steps, and a "
     "search before every one of them:"),
    ("lora-styles-smollm2 lora-ftn-smollm2", scores, "", "A real language model, SmolLM2-135M-Instruct:"),
    ("lora-styles-smollm2", offered, "", "What its bank is offered:")]
# fmt: on


def read_results(name):
    """Refused: the file is not one that `write_results` wrote."""
    path = RESULTS / f"{name}.json"
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise Refused(f"{path}: not JSON, or cut short") from None
    if not isinstance(content, dict) or not {"command", "date", "machine", "torch", "rows"} <= {*content}:
        raise Refused(f"{path}: not a file of results")
    return content


@contextlib.contextmanager
def naming(*names):
    """Refused, in place of the error inside: a file's rows are not what its command writes."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        files = ", ".join(str(RESULTS / f"{name}.json") for name in names)
        raise Refused(f"{files}: not what its command writes ({type(e).__name__} {e})") from None


def drawn(name, draw, content):
    """The lines of a file's table."""
    with naming(name):
        return draw(content)


def shown_by(see):
    """A test, or a file of results."""
    return see if see.startswith("`") else f"[{see}]({see}.json)"


def made_by(name, content):
    """A file of results: its command, and what it depends on besides."""
    made = f"{content['date'][:10]}, {content['machine']}, torch {content['torch']}"
    made += f", {content['threads']} threads" if "threads" in content else ""
    made += f", revision {content['git'][:7]}" if content.get("git") else ""
    return f"* `{content['command']}`\n  ([{name}.json]({name}.json), {made})"


def results_page():
    """studies/results/README.md, part by part. Raises Refused if a file is no file of results."""
    yield "# Results\n\nWritten by `python -m studies.report` from the files in this folder, whole."
    yield "Mean ± standard deviation over seeds. Perplexity is over response tokens, end token included."
    yield from [
        "## What the papers say, and what is found",
        "Every number of theirs that can be checked here, and "
        "ours. Backbones and, for FTN, the task generator are not theirs: kinds and signs can be compared, "
        "last digits cannot.",
    ]
    contents = {name: read_results(name) for names, *_ in SECTIONS for name in names.split()}
    read = lambda name: contents[name]["rows"]
    for title, claims in (("NIWF", niwf_claims), ("FTN", ftn_claims)):
        with naming("*"):
            lines = [[*claim, shown_by(see), verdict] for *claim, see, verdict in claims(read)]
        yield "\n".join(table([title, "it says", "we find", "shown by", "verdict"], lines))
    yield "## What does not hold as printed"
    with naming("*"):
        lines = [[says, so, shown_by(see)] for says, so, see in not_as_printed(read)]
    yield "\n".join(table(["the paper", "what is so", "shown by"], lines))
    for names, draw, title, sentence in SECTIONS:
        files = names.split()
        yield from ["## " + title] * (title != "") + [sentence]
        if title in FINDINGS:
            with naming("*"):
                yield FINDINGS[title](read).strip()
        first, *others = (drawn(name, draw, contents[name]) for name in files)
        yield "\n".join([*first, *(line for other in others for line in other[2:])])  # one head for all
        yield "\n".join(made_by(name, contents[name]) for name in files)
    yield "## Pictures\n\n`python -m studies.report --figures --to assets`"
    for name, caption in PICTURES.items():
        yield f"{caption}\n\n![{caption}](../../assets/{name}.png)"


def with_tables(text):
    """The text of a README with what stands between `<!-- PART -->` and `<!-- end -->` made again."""

    def made(block):
        begin, part, end = block.groups()
        name, draw = IN_README[part]
        return "\n".join([begin, *drawn(name, draw, read_results(name)), end])

    return re.sub(r"(<!-- ([\w-]+) -->)\n.*?(<!-- end -->)", made, text, flags=re.DOTALL)


# ---------------------------------------------------------------------------------------- the command line


def main(argv=None):
    parser = Parser(__doc__, prog="report.py")
    about = "draw what synthetic.py wrote in these files [all that is published]"
    parser.add_argument("--figures", nargs="*", type=pathlib.Path, metavar="FILE.json", help=about)
    about = "where to draw it"
    parser.add_argument("--to", type=pathlib.Path, default="runs/figures", metavar="DIR", help=about)
    args = parser.parse_args(argv)
    if args.figures is None:
        pages = {RESULTS / "README.md": "\n\n".join(results_page()) + "\n"}
        pages[HOME / "README.md"] = with_tables((HOME / "README.md").read_text())
        for path, text in pages.items():
            with atomic(path) as tmp:
                tmp.write_text(text)
            print(f"wrote {path}")
        return
    ftn = args.figures or [
        RESULTS / f"{name}.json" for name in ("ftn-experiment-1", "ftn-supsup-wide", "lora-ftn")
    ]
    results = [row for path in ftn for row in read_rows(path)]
    if matplotlib is None:
        raise Refused("figures need matplotlib: pip install matplotlib")
    draw_figures(results, args.to)
    if not args.figures:
        save(draw_idea(), args.to / "idea.png")
        names = [f"tiny-{name}" for name in ("regions", "baselines", "baselines-r128")]
        runs, baselines, larger = (read_results(name)["rows"] for name in names)
        with naming(names[0]):
            save(draw_coordinates(runs), args.to / "niwf-coordinates.png")
            save(draw_gating(runs[0]), args.to / "niwf-gating.png")
            save(draw_losses(runs), args.to / "niwf-losses.png")
        with naming("stream"):
            save(draw_growth(read_results("stream")["rows"]), args.to / "niwf-stream.png")
        with naming("memory-count"):
            save(draw_memory(read_results("memory-count")["rows"]), args.to / "niwf-memory.png")
        with naming("ftn-*"):
            save(draw_overlap(lambda name: read_results(name)["rows"]), args.to / "ftn-overlap.png")
        with naming(*names[1:]):
            save(draw_two_tasks(baselines | larger), args.to / "niwf-matrices.png")


if __name__ == "__main__":
    run_program(main)
