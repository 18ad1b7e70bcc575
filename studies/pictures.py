"""The pictures of what was measured, made of files of results alone.

    python -m studies.pictures                      # all that the pages show, in assets
    python -m studies.pictures FILE.json --to DIR   # FTN's alone, of what synthetic.py wrote

FTN's are drawn for every variant that the files hold: masks (Figures 1 and 4), curves (Figure 3) and, for
styles, matrices (Figure 2).
"""

import itertools
import math
import pathlib
import statistics

import torch

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
except ImportError:
    matplotlib = None

from plumbing import Refused
from plumbing.command import Parser, run_program
from plumbing.files import atomic
from studies import neurons, styles, support
from studies.names import GENERATORS, HIDDEN, ONE_FOR_ALL, of_method, shared_and_lost
from studies.report import HOME, naming, read_results
from synthetic import VARIANTS, SearchedMask

KNOWN = neurons.KNOWN | styles.METHODS
PNG = b"\x89PNG\r\n\x1a\n"
BLUE, ORANGE = "#0072b2", "#e69f00"  # told apart whatever colours one sees
REAL = {  # inputs: the files that have their rows
    "our generator": ("ftn-experiment-1", "ftn-recall", "ftn-slow-hidden"),
    "digits, 8 x 8": ("ftn-digits",),
    "MNIST, 28 x 28": ("ftn-mnist",),
}
CHOSEN = {  # methods, and how each chooses its masks
    "random-disjoint-recall": "random,\nrecalled",
    "ftn-slow-lock": "searched,\nlock",
    "ftn-slow": "searched,\nas printed",
    "ftn-slow-hidden": "searched,\nold hidden",
}


def draw_ftn(rows, folder):
    """Draw all that rows of synthetic.py allow, as PNG in `folder`."""
    if not rows:
        raise ValueError("no rows")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        by_method = {m: [r for r in rows if (r["variant"], r["method"]) == (variant, m)] for m in KNOWN}
        by_method = {m: found for m, found in by_method.items() if found}
        searched = {m: found for m, found in by_method.items() if isinstance(KNOWN[m][1], SearchedMask)}
        if searched:
            save(draw_masks(searched), folder / f"ftn-masks-{variant}.png")
        if variant == "style":
            save(draw_matrices(by_method), folder / f"ftn-matrices-{variant}.png")
        save(draw_curves(by_method, VARIANTS[variant]["title"]), folder / f"ftn-curves-{variant}.png")


def draw_masks(by_method):
    """FTN Figures 1 and 4: a tile for every method and seed, a colour for every task."""
    seeds = sorted({r["seed"] for rows in by_method.values() for r in rows})
    size = 1.3 * len(seeds) + 1, 1.4 * len(by_method)
    how = dict(figsize=size, squeeze=False, layout="constrained")
    figure, axes = plt.subplots(len(by_method), len(seeds), **how)
    for (method, rows), line in zip(by_method.items(), axes):
        line[0].set_ylabel(method, fontsize=8)
        for seed, axis in zip(seeds, line):
            axis.set(xticks=[], yticks=[])
            for r in rows:
                if r["seed"] == seed:
                    axis.imshow(mask_image(r), interpolation="nearest")
    for seed, axis in zip(seeds, axes[0]):
        axis.set_title(f"seed {seed}", fontsize=8)
    colours = task_colours(next(iter(by_method.values()))[0]["tasks"])
    look = [plt.Rectangle((0, 0), 1, 1, fc=colour) for colour in colours]
    names = [f"task {t + 1}" for t in range(len(look))]
    figure.legend(look, names, loc="outside lower center", ncols=len(look), fontsize=8, frameon=False)
    return figure


def task_colours(n):
    """Return a colour for each of n tasks, RGB."""
    return [matplotlib.colors.hsv_to_rgb((t / n, 1, 1)) for t in range(n)]


def mask_image(result):
    """Return the masks of a stream as an image [D, D, 3]. Tasks that share a neuron have their colours summed
    there; with more than three tasks such a sum is the colour of another, so it is white."""
    side, n = result["final_side"], result["tasks"]
    image, taken = torch.zeros(side * side, 3), torch.zeros(side * side)
    for colour, winners in zip(task_colours(n), result["winners"]):
        image[winners] += torch.tensor(colour).float()
        taken[winners] += 1
    image[(taken > 1) & (n > 3)] = 1
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
        ticks = dict(ticks=range(n), labels=range(1, n + 1), fontsize=7)
        axis.set_xticks(**ticks)
        axis.set_yticks(**ticks)
        axis.set(xlabel="task", ylabel="after task")
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
            known = [point for point in seeds if len(point[0][protocol]) > t]
            points = [(p[0]["step"], statistics.mean(seed[protocol][t] for seed in p)) for p in known]
            look = dict(marker=".", markersize=3, color=f"C{t}", label=f"task {t + 1}, {protocol}")
            axis.plot(*zip(*points), style, **look)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel(title, fontsize=9)
    return figure


def draw_idea():
    """The way of one prompt, with the tiny backbone's numbers. A drawing: nothing in it is measured."""
    figure = plt.figure(figsize=(7.2, 3.7))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 72), ylim=(0, 37))
    axis.axis("off")
    axis.text(36, 34.4, "A prompt finds its capability by its coordinate", ha="center", fontsize=13)
    box, middle = dict(boxstyle="round,pad=0.5", fc="white"), dict(ha="center", va="center", fontsize=10)
    axis.text(8, 26, '"Name three\nfruits."', bbox=box, **middle)
    axis.text(8, 11, "first layers,\nbare", bbox=dict(box, fc="0.9"), **middle)
    axis.add_patch(plt.Rectangle((19, 4.5), 27, 27, fc="none", ec="0.5"))
    axis.text(32.5, 2.4, "the plane of coordinates z", **middle)
    random = torch.Generator().manual_seed(3)
    homes = (27, 23.5, 20, BLUE, "o", "alpaca", 22), (38, 12, -15, ORANGE, "s", "code", 7)
    for x, y, angle, colour, marker, task, bottom in homes:
        axis.add_patch(matplotlib.patches.Ellipse((x, y), 14, 9, angle=angle, fc=colour, alpha=0.25))
        points = torch.rand(20, 2, generator=random) * torch.tensor([8, 4.4]) + torch.tensor([x - 4, y - 2.2])
        axis.scatter(*points.T.tolist(), s=14, marker=marker, color=colour)
        axis.text(x + 2, y + 6, f"region of {task}", **middle)
        axis.text(60.5, bottom + 7.4, f"version {task}", **middle)
        for layer in range(3):
            chosen = torch.randperm(16, generator=random)[: 8 if task == "alpaca" else 0].tolist()
            for basis in range(16):
                look = dict(fc=colour if basis in chosen else "white", ec=colour, linewidth=0.8)
                axis.add_patch(plt.Rectangle((52.5 + basis, bottom + 2 * layer), 0.8, 1.6, **look))
    axis.text(60.5, 19.9, "8 of 16 bases a layer", **middle)
    axis.scatter(29, 22.5, s=190, marker="*", color="black", zorder=3)
    look = dict(arrowstyle="-|>", lw=1.6, color="black", shrinkA=0, shrinkB=0)
    for start, end in (((8, 22.8), (8, 14.4)), ((12.6, 12), (28, 21.6)), ((30.2, 22.7), (52, 25.6))):
        axis.annotate("", end, start, arrowprops=look)
    steps = (8, 18.6, "1 read"), (25, 12, "2 coordinate"), (41, 27, "3 route"), (49.6, 19.9, "4 gate")
    for x, y, step in steps:
        axis.text(x, y, step, color="white", bbox=dict(box, boxstyle="round,pad=0.25", fc="black"), **middle)
    return figure


def draw_coordinates(runs):
    """The coordinates of every run's tasks, after its last one, in a plane of its own."""
    how = dict(figsize=(4.6 * len(runs), 4.4), squeeze=False, layout="constrained")
    figure, axes = plt.subplots(1, len(runs), **how)
    for axis, run in zip(axes[0], runs):
        for colour, (task, found) in zip((BLUE, ORANGE), run["coordinates"].items()):
            home = 100 * sum(found["home"]) / len(found["home"])
            for inside, marker in ((1, "o"), (0, "x")):
                points = [p for p, h in zip(found["tsne"], found["home"]) if h == inside]
                label = f"{task}, {home:.0f} % in its region" if inside else f"{task}, outside it"
                size = 12 if inside else 40
                axis.scatter(*zip(*points or [(math.nan,) * 2]), s=size, marker=marker, c=colour, label=label)
        axis.set(xticks=[], yticks=[], title=f"--lock {run['lock']}: after {run['tasks'][-1]}")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False)
    return figure


def draw_growth(lines):
    """What n versions of a stream know and cost, for every n."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    n = [x["n"] for x in lines]
    axes[0].plot(n, [100 * x["routed_home"] for x in lines], color=BLUE)
    axes[0].set(title="prompts routed home", ylabel="%", ylim=(90, 100.3))
    memory, about = [x["memory"] / 1e6 for x in lines], "peak of a process that answers for 3"
    axes[1].plot(n, memory, color=BLUE, label=about)
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


def draw_overlap(read):
    """A point a stream: what its last masks share, mean over pairs, and what it forgets, stored."""
    figure, axis = plt.subplots(figsize=(7.6, 4), layout="constrained")
    series = [(label, files, "ftn-slow", BLUE) for label, files in GENERATORS.items()]
    series += [(f"generator {file[-1]}, for all", (file,), "ftn-slow", BLUE) for file in ONE_FOR_ALL[2:]]
    series.append(("older neurons hidden, S 10, m0 -4", HIDDEN.values(), "ftn-slow-hidden", ORANGE))
    for (label, files, method, colour), marker in zip(series, "os^DvP<>*x"):
        rows = [row for file in files for row in of_method(read(file), method)]
        axis.scatter(*zip(*shared_and_lost(rows)), s=30, marker=marker, c=colour, alpha=0.7, label=label)
    axis.set(xlabel="share of neurons that two last masks have in common", ylabel="FM, stored")
    figure.legend(loc="outside right center", fontsize=8, title="task generator", title_fontsize=8)
    return figure


def draw_real(read):
    """Draw a point for each stream: its score, recovered, less the oracle's on the same seed."""
    figure, axes = plt.subplots(1, len(REAL), figsize=(9.5, 3.4), sharey=True, layout="constrained")
    for axis, (inputs, files) in zip(axes, REAL.items()):
        rows = [row for file in files for row in read(file)]
        oracle = {r["seed"]: r["summary"]["recovered_last"] for r in of_method(rows, "fixedmask")}
        for x, (method, colour) in enumerate(zip(CHOSEN, (ORANGE, ORANGE, BLUE, BLUE))):
            found = [(r["seed"], r["summary"]["recovered_last"]) for r in of_method(rows, method)]
            points = [(x + (seed - 3.5) / 16, score - oracle[seed]) for seed, score in found]
            axis.scatter(*zip(*points), s=18, c=colour, alpha=0.7)
        axis.axhline(0, color="0.4", linewidth=0.8, linestyle=":")
        axis.set(title=inputs, xticks=range(len(CHOSEN)))
        axis.set_xticklabels(CHOSEN.values(), fontsize=8)
    axes[0].set_ylabel("score less FixedMask's")
    return figure


def save(figure, path):
    """Refused: something else than a picture is already there."""
    if path.exists() and path.read_bytes()[: len(PNG)] != PNG:
        raise Refused(f"{path} is there and is no PNG; it stays as it is")
    with atomic(path) as tmp:
        figure.savefig(tmp, dpi=120, format="png", metadata={"Software": None})
    plt.close(figure)
    print(f"wrote {path}")


def main(argv=None):
    parser = Parser(__doc__, prog="pictures.py")
    about = "draw what synthetic.py wrote in these files [all that is published]"
    parser.add_argument("files", nargs="*", type=pathlib.Path, metavar="FILE.json", help=about)
    parser.add_argument("--to", type=pathlib.Path, default=HOME / "assets", metavar="DIR", help="where to")
    args = parser.parse_args(argv)
    if matplotlib is None:
        raise Refused("figures need matplotlib: pip install matplotlib")
    ftn = args.files or ["ftn-experiment-1", "ftn-supsup-wide", "lora-ftn"]
    with naming(*ftn):
        draw_ftn([row for file in ftn for row in read_results(file)["rows"]], args.to)
    if not args.files:
        save(draw_idea(), args.to / "idea.png")
        drawn = ("niwf-coordinates", "tiny-regions", draw_coordinates), ("niwf-stream", "stream", draw_growth)
        for name, file, draw in (*drawn, ("ftn-support", "ftn-support", support.draw)):
            with naming(file):
                save(draw(read_results(file)["rows"]), args.to / f"{name}.png")
        with naming("ftn-*"):
            read = lambda name: read_results(name)["rows"]
            save(draw_overlap(read), args.to / "ftn-overlap.png")
            save(draw_real(read), args.to / "ftn-real.png")


if __name__ == "__main__":
    run_program(main)
