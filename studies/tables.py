"""The tables of both FTN experiments, beside the paper's: its Tables 1 to 3, and Table 4's decomposition."""

import statistics

from plumbing.tables import print_table, spread
from synthetic import VARIANTS, row_summary

# fmt: off
PUBLISHED = {  # score and FM in FTN Tables 1, 2 and 3
    "clf": {"nomask": (".666", ".466"), "fixedmask": (".938", ".000"), "kwta": (".640", ".152"),
            "ftn-fast": (".899", ".042"), "ftn-slow": (".896", ".014"), "ewc": (".665", ".463"),
            "supsup": (".645", ".000"), "supsup-wide": (".660", ".000")},
    "reg": {"nomask": (".312", ".054"), "fixedmask": (".006", ".000"), "kwta": (".589", ".028"),
            "ftn-fast": (".126", ".013"), "ftn-slow": (".167", ".003"), "ewc": (".311", ".054"),
            "supsup": (".206", ".000"), "supsup-wide": (".216", ".101")},
    "style": {"lora-naive": ("8.22", "7.37"), "lora-fixedmask": ("1.39", "0.00"),
              "lora-bank": ("1.42", "0.04"), "lora-ftn": ("1.51", "0.07")}}
COLUMNS = [("{} recov.", "recovered_last", 3), ("FM recov.", "recovered_fm", 3),
           ("{} stored", "stored_last", 3), ("FM stored", "stored_fm", 3), ("{} R[i,i]", "stored_own", 3),
           ("overlap last", "overlap_last", 2), ("union", "overlap_union", 2),
           ("params moved", "parameters_moved", 3), ("outputs", "outputs_moved", 3)]
# fmt: on


def without_empty(heads, lines):
    """Return heads and lines of a table without the columns that are empty in all lines."""
    shown = [i for i in range(len(heads)) if not i or any(line[i] for line in lines)]
    return [heads[i] for i in shown], [[line[i] for i in shown] for line in lines]


def line_of(out):
    """What is printed as soon as a row is there."""
    shown = {p: [out["summary"][f"{p}_{key}"] for key in ("last", "fm")] for p in ("recovered", "stored")}
    scores = [f"{protocol} {score:.3f}  FM {fm:+.3f}" for protocol, (score, fm) in shown.items()]
    return f"{'   '.join(scores)}   {out['seconds']:.0f} s"


def decomposition(outs):
    """FTN Table 4, of one variant's results: what earlier tasks lost against FixedMask with the same seed, as
    overlap (with the stored mask) and recall (with the recovered one). -> {method: [(overlap, recall)]}"""
    earlier = lambda out, protocol: statistics.mean(out[f"R_{protocol}"][-1][:-1])
    oracle = {o["seed"]: earlier(o, "stored") for o in outs if o["method"].endswith("fixedmask")}
    found = {}
    for o in outs:
        if o["seed"] in oracle and not o["method"].endswith("fixedmask"):
            stored, recovered = earlier(o, "stored"), earlier(o, "recovered")
            sign = VARIANTS[o["variant"]]["sign"]
            losses = sign * (oracle[o["seed"]] - stored), sign * (stored - recovered)
            found.setdefault(o["method"], []).append(losses)
    return found


def print_tables(outs, note=""):
    """Print what results come to: FTN Tables 1 to 3, and Table 4."""
    for variant in dict.fromkeys(o["variant"] for o in outs):
        group = [o for o in outs if o["variant"] == variant]
        print_scores(variant, group, note)
        print_decomposition(variant, group)


def print_decomposition(variant, outs):
    """Print FTN Table 4, if FixedMask is among the results."""
    if losses := decomposition(outs):
        lines = [[m, *map(spread, zip(*losses[m]))] for m in losses]
        print_table(f"loss on earlier tasks against FixedMask, {variant}", ["", "overlap", "recall"], lines)


def print_scores(variant, outs, note=""):
    """Print FTN Table 1, 2 or 3: a line a method, the mean over seeds."""
    score, reg, rows = VARIANTS[variant]["score"], variant == "reg", {}
    for o in outs:
        rows.setdefault(o["method"], []).append(row_summary(o))
    heads = ["", *(head.format(score) for head, _, _ in COLUMNS), f"paper {score}", "FM"]
    heads += ["FM as printed"] if reg else []
    lines = []
    for method, seeds in rows.items():
        cells = [spread([s.get(key) for s in seeds], digits) for _, key, digits in COLUMNS]
        cells += PUBLISHED[variant].get(method, ("", ""))
        cells += [spread([s["recovered_fm_paper"] for s in seeds])] if reg else []
        lines.append([method, *cells])
    print_table(f"{VARIANTS[variant]['title']}{note}, seeds: {max(map(len, rows.values()))}", heads, lines)
