"""The names that stand for figures in studies/pages/*.md, and how a page is filled.

    {exact.forgotten}              the mean over seeds of a quantity (QUANTITIES) of a row (ROWS)
    {tiny-compose/0/under/A:3}     a number in a file of results, with three digits; * on the way: of all rows
    {more free.kept; exact.kept}   how much more that is, percent; and other FUNCTIONS
    {apart}                        one of OTHERS
    {exact.forgotten±}             with its deviation; {exact.n}: how many seeds; {a/path:1%}: as percent
    {min slow.fm}, {max slow.fm}   the least and the most of all seeds; {median slow.fm}
    {count slow.fm <= .014}        in how many seeds this is so
    {? slow.fm <= .014}            the verdict on a claim; parts are joined by `and`, see `verdict`

A name is one of names.txt, of the tables below, or a path in a file of results.
"""

import itertools
import math
import operator
import pathlib
import re
import statistics

import torch
import transformers

from field import CoordinateDynamics, WeightField
from model import NIWF
from plumbing.tables import spread
from studies.memory import TOKENS
from studies.styles import StyleRow
from studies.neurons import StudyRow
from studies.support import SIZES
from studies.tables import decomposition
from synthetic import row_summary

mean = statistics.mean

PAGES = pathlib.Path(__file__).parent / "pages"
LINES = (PAGES / "names.txt").read_text("utf-8").splitlines()[1:]
ROWS = {  # a name: (file of results, row), from a text that a person edits
    name: tuple(where.split(": ", 1)) for name, where in (line.split(" = ", 1) for line in LINES)
}
# fmt: off
GENERATORS = {  # what is different in the task generator: the files that have its rows
    "as published": ("ftn-experiment-1", "ftn-recall"), "frequency 4": ("ftn-frequency-4",),
    "frequency 16": ("ftn-frequency-16",), "x ~ N(0, I)": ("ftn-gaussian",),
    "one for all seeds": ("ftn-generator-0",), "another for all": ("ftn-generator-1",)}
# fmt: on
ONE_FOR_ALL = [f"ftn-generator-{seed}" for seed in range(5)]  # of all eight seeds
HIDDEN = {"ftn-experiment-1": "ftn-slow-hidden-10"}  # the search as printed: ten steps, older neurons hidden
HIDDEN |= {f: f"{f}-hidden-10" for f in ("ftn-frequency-4", "ftn-frequency-16", "ftn-gaussian", *ONE_FOR_ALL)}
RECALLED = [f.replace("hidden", "recalled") for f in HIDDEN.values()]  # the same with recall


def share(counts, name, row):
    """Percent of a task's inputs."""
    return 100 * counts[name] / sum(row["routing"][name].values())


def cell(protocol, i, j):
    return lambda row: row["R"][protocol][i][j]


def forgotten(protocol):
    return lambda row: 100 * (row["R"][protocol][1][0] / row["R"][protocol][0][0] - 1)


def home(i):
    """The share of a task's inputs that are routed to it, percent; None where there is one version."""
    return lambda row: (
        share(row["routing"][row["tasks"][i]], row["tasks"][i], row) if "routing" in row else None
    )


def of_first(part, key, scale=1):
    """Of the first task; None where a row has no such part."""
    return lambda row: scale * row[part][row["tasks"][0]][key] if part in row else None


def few(way, measure, size):
    """With so many labels, mean over tasks; None where a mask is not recovered so, or not from so many."""
    tried = lambda row: way in row["ways"] and size in row["sizes"]
    return lambda row: mean(row["ways"][way][measure][row["sizes"].index(size)]) if tried(row) else None


def of_summary(key):
    return lambda row: row_summary(row).get(key)


# fmt: off
QUANTITIES = {  # name: (head of its column, digits, function of a row with one seed)
    "learned": ("A learned", 3, cell("stored", 0, 0)), "kept": ("A after B", 3, cell("stored", 1, 0)),
    "routed": ("routed", 3, cell("routed", 1, 0)), "B": ("B", 3, cell("stored", 1, 1)),
    "B-routed": ("B routed", 3, cell("routed", 1, 1)),
    "base-A": ("A before", 3, lambda r: r["base"][r["tasks"][0]]),
    "base-B": ("B before", 3, lambda r: r["base"][r["tasks"][1]]),
    "forgotten": ("A forgotten, %", 1, forgotten("stored")),
    "forgotten-routed": ("routed, %", 1, forgotten("routed")),
    "home-A": ("A routed home, %", 1, home(0)), "home-B": ("B routed home, %", 1, home(1)),
    "nats": ("nats a token", 4, lambda r: math.log(r["R"]["stored"][0][0])),
    "trained": ("trained but for the field, M", 2, lambda r: r["trained parameters"] / 1e6),
    "size": ("kept, M", 2, lambda r: r["kept parameters"] / 1e6),
    "choices": ("choices a layer", 1, of_first("gating", "sets")),
    "bases": ("bases that carry weight", 1, of_first("gating", "bases")),
    "inside": ("inside their region, %", 1,
               lambda r: share(r["inside"]["alpaca"], "alpaca", r) if "inside" in r else None),
    "lock-loss": ("L_lock at the anchors", 1, of_first("drift", "lock_loss")),
    "top-k": ("top K kept there, %", 2, of_first("drift", "top_k_kept", 100)),
    "moved": ("inputs moved by", 2, of_first("drift", "moved")),
    "inside-then": ("in their region at commit, %", 1, of_first("drift", "inside_at_commit", 100)),
    "inside-now": ("now, %", 1, of_first("drift", "inside_now", 100)),
    "score": ("score, recovered", 3, of_summary("recovered_last")),
    "fm": ("FM", 3, of_summary("recovered_fm")),
    "score-stored": ("score, stored", 3, of_summary("stored_last")),
    "fm-stored": ("FM", 3, of_summary("stored_fm")),
    "own": ("score when learned", 3, of_summary("stored_own")),
    "fm-paper": ("FM as the paper has it", 3, of_summary("recovered_fm_paper")),
    "overlap": ("overlap of last masks", 3, of_summary("overlap_last")),
    "parameters": ("own parameters moved", 3, of_summary("parameters_moved")),
    "outputs": ("outputs moved", 3, of_summary("outputs_moved")),
    "most-shared": ("largest overlap", 2, lambda r: max(r["overlap_last"])),
    "disjoint": ("disjoint pairs, %", 0, lambda r: 100 * mean(x == 0 for x in r["overlap_last"])),
    "alike": ("tasks with an older one's adapter", 0, lambda r: r["tasks"] - len({*r["chosen"]})),
    "bare-ms": ("ms a token: bare", 3, lambda r: r["bare_ms"]),
    "routed-ms": ("routed", 3, lambda r: r["routed_ms"]),
    "lost": ("forgotten, nats: stored", 4, lambda r: r["stored_forgetting"]),
    "lost-routed": ("routed", 4, lambda r: r["routed_forgetting"]),
    "home": ("routed home, %", 1, lambda r: 100 * r["routed_home"]),
    "bare": ("bare model", 1, lambda r: r["bare"]), "named": ("its own version", 1, lambda r: r["stored"]),
    "routed-home": ("routed home, %", 0, lambda r: 100 * r["routed home"]),
    **{f"{way}-{measure}-{n}": (f"{head}, {n}", 3, few(way, measure, n)) for way in ("search", "recall")
       for measure, head in (("found", "found"), ("score", "score")) for n in SIZES},
    "found-1": ("found from 1, %", 1, lambda r: 100 * r["found from 1"]),
    "found-16": ("found from 16, %", 1, lambda r: 100 * r["found from 16"]),
}
SAID = {  # of a row that has another value than the paper's
    "backbone": "{}", "inputs": "{} inputs", "frequency": "frequency {:g}", "generator": "generator {}",
    "leak": "with {}", "reconfigure": "a search {} step", "b_std": "B's deviation {:g}",
    "tasks": "{} tasks", "steps": "{} steps", "grow": "a grid that grows",
    "search": "S {0[0]:g}, eta {0[1]:g}", "m0": "m0 {:g}"}
# fmt: on


def described(row):
    """A row of synthetic.py: its variant, its method, and what is not the default."""
    about = [f"{row['variant']} {row['method']}"]
    for key, text in SAID.items():
        default = getattr(StyleRow if row["variant"] == "style" else StudyRow, key, None)
        if row.get(key, default) not in (default, []):
            about.append(text.format(row[key]))
    return ", ".join(about)


def grouped(rows):
    """{row: its seeds} of a file of results, whoever wrote it."""
    if isinstance(rows, dict):
        return rows
    groups = {}
    for row in rows:
        name = described(row) if "variant" in row else str(row.get("n", row["task"]))
        groups.setdefault(name, []).append(row)
    return groups


# ------------------------------------------------------------------------ figures that no single row has


def time_ratio(file, what, other="bare"):
    """How many times another side's median ours is, a value for each {shape}, of a file of bench.py."""
    median = lambda sides, side: statistics.median(sides[side]["seconds"])
    ratio = lambda sides: median(sides, "ours") / median(sides, other)
    return lambda read: [ratio(read(file)[what.format(shape)]) for shape in SHAPES]


def token_ratios(read):
    """How many times a bare model's a token of 32 takes, after the prefill, a value a shape."""
    for shape in SHAPES:
        short, long = (read("decode-bench")[f"{shape}, prefill{more}"] for more in ("", " and 32 tokens"))
        rest = {s: [b - a for a, b in zip(short[s]["seconds"], long[s]["seconds"])] for s in ("ours", "bare")}
        yield statistics.median(rest["ours"]) / statistics.median(rest["bare"])


def stream_ratios(read):
    """How many times a bare token's time a routed one takes, in the stream's first half and in its second."""
    ratios = [x["routed_ms"] / x["bare_ms"] for x in read("stream")[1:]]
    half = len(ratios) // 2
    return statistics.median(ratios[:half]), statistics.median(ratios[half:])


def mistral_sizes():
    """Millions of parameters of Mistral-7B's bank, N = 16, and of field and dynamics."""
    config = transformers.MistralConfig()
    layers, config.num_hidden_layers = config.num_hidden_layers, 1  # a layer more adds the same
    with torch.device("meta"):
        model = NIWF(transformers.MistralForCausalLM(config), pad_id=0)
        others = WeightField(layers, 16), CoordinateDynamics(model.features)
    small = sum(p.numel() for module in others for p in module.parameters())
    return round(layers * model.bank.parameter_count(16) / 1e6, 1), round(small / 1e6, 1)


def task_2(checkpointing):
    """GiB of training the second task, in two passes, by count."""
    place = dict(devices=1, task=2, checkpointing=checkpointing)
    return lambda read: [r["total"] / 2**30 for r in read("memory-count") if place.items() <= r.items()]


def gains(read):
    """What reading older bases saves each later task of the stream, in nats."""
    (row,) = read("stream-transfer")
    return [math.log(own / both) for both, own in zip(row["read"], row["own bases alone"])][1:]


def right(task):
    """Percent of a task's prompts that are answered to the letter."""
    shares = lambda kinds: [sum(column) for column in zip(*kinds.values())]
    percent = lambda kinds: 100 * shares(kinds)[0] / shares(kinds)[1]
    return lambda read: [percent(r["exact_match"][task]) for r in read("tiny-exact-match")]


def more(first, second):
    """How much more, percent, a value a seed."""
    return [100 * (a / b - 1) for a, b in zip(first, second, strict=True)]


FUNCTIONS = {  # of the values of two names
    "more": more,
    "less": lambda first, second: [-x for x in more(first, second)],
    "ratio": lambda first, second: [mean(first) / mean(second)],
    "each": lambda first, second: [a / b for a, b in zip(first, second, strict=True)],
}


def of_method(rows, method, variant="clf"):
    return [r for r in rows if (r["variant"], r["method"]) == (variant, method)]


def topography(same):
    """What masks of FTN-Slow share with those of other seeds, of the same task or of others, a value for each
    generator that all seeds share. FTN Figure 1."""

    def found(read):
        for rows in (of_method(read(f), "ftn-slow") for f in ONE_FOR_ALL):
            masks = [[{*w} for w in r["winners"]] for r in rows]
            pairs = (itertools.product(*map(enumerate, two)) for two in itertools.combinations(masks, 2))
            shared = ((i == j, len(a & b) / len(a)) for two in pairs for (i, a), (j, b) in two)
            yield mean(part for alike, part in shared if alike == same)

    return found


def pair(rows, i, j):
    """The overlap of two tasks' last masks, a value a seed. FTN Table 5."""
    at = [*itertools.combinations(range(rows[0]["tasks"]), 2)].index((i, j))
    return [row["overlap_last"][at] for row in rows]


def lost_to(which, variant, method):
    """What a method lost by overlap (0) or in recall (1), a value a seed. FTN Table 4."""
    rows = lambda read: [row for row in read("ftn-experiment-1") if row["variant"] == variant]
    return lambda read: [losses[which] for losses in decomposition(rows(read))[method]]


def shared_and_lost(rows):
    """[(what a stream's last masks share, mean over pairs; its FM, stored)]"""
    return [(s["overlap_last"], s["stored_fm"]) for s in map(row_summary, rows)]


def streams(read):
    """`shared_and_lost` of FTN-Slow, a list a task generator."""
    files = dict.fromkeys([*itertools.chain(*GENERATORS.values()), *ONE_FOR_ALL])
    return [x for x in (shared_and_lost(of_method(read(f), "ftn-slow")) for f in files) if x]


def fm_of(files, method="ftn-slow", key="recovered_fm"):
    """The mean over seeds, a value a file."""
    return lambda read: [mean(row_summary(r)[key] for r in of_method(read(f), method)) for f in files]


def apart(read, first="random-disjoint-recall", second="ftn-slow-lock"):
    """How much higher a method ends than another, for each of six generators a list of a value a seed."""
    for files, recalled in zip(GENERATORS.values(), RECALLED):
        rows = [row for f in (*files, recalled) for row in read(f)]
        ends = lambda m, rows=rows: {r["seed"]: row_summary(r)["recovered_last"] for r in of_method(rows, m)}
        one, other = ends(first), ends(second)
        yield [one[seed] - other[seed] for seed in sorted(other)]


# fmt: off
SHAPES = "tiny", "smollm2", "mistral"
OTHERS = {  # name: (digits, function of read) -> values, one a seed or a shape
    "bank-size": (1, lambda read: mistral_sizes()[:1]), "field-size": (1, lambda read: mistral_sizes()[1:]),
    "tokens": (0, lambda read: [TOKENS]),
    "card": (1, task_2(False)), "card-less": (1, task_2(True)),
    "count-off": (0, lambda read: [
        100 * abs(r["counted"] / r["measured"] - 1)
        for f in ("memory-bench", "memory-one-bench") for r in read(f)]),
    "prefill": (1, time_ratio("decode-bench", "{}, prefill")), "token": (2, token_ratios),
    "step": (2, time_ratio("niwf-bench", "{}, a step", other="peft")),
    "one-step": (2, time_ratio("niwf-one-bench", "{}, a step", other="peft")),
    "first": (2, time_ratio("first-token-bench", "{}, first token after 256")),
    "first-real": (2, lambda read: time_ratio("first-token-bench", "{}, first token after 256")(read)[1:2]),
    "first-peft": (2, time_ratio("first-token-bench", "{}, first token after 256", other="peft")),
    "right-A": (1, right("alpaca")), "right-B": (1, right("code")), "gains": (2, gains),
    "stream-early": (2, lambda read: stream_ratios(read)[:1]),
    "stream-late": (2, lambda read: stream_ratios(read)[1:]),
    "topography-same": (3, topography(True)), "topography-other": (3, topography(False)),
    **{f"{which}-{short}": (3, lost_to(i, variant, method))
       for i, which in enumerate(("by-overlap", "in-recall"))
       for short, variant, method in (("slow", "clf", "ftn-slow"), ("slow-reg", "reg", "ftn-slow"),
                                      ("kwta", "clf", "kwta"))},
    "upper-lower": (2, lambda read: pair(of_method(read("lora-ftn"), "lora-ftn", "style"), 0, 1)),
    "double-pirate": (2, lambda read: pair(of_method(read("lora-ftn"), "lora-ftn", "style"), 3, 5)),
    "pooled-correlation": (2, lambda read: [statistics.correlation(*zip(*itertools.chain(*streams(read))))]),
    "correlations": (2, lambda read: [statistics.correlation(*zip(*x)) for x in streams(read)]),
    "apart": (3, lambda read: map(mean, apart(read))),
    "above": (3, lambda read: itertools.chain(*apart(read))),
    "for-all": (3, fm_of(ONE_FOR_ALL)), "printed-all": (3, fm_of(HIDDEN)),
    "hidden-all": (3, fm_of(HIDDEN.values(), "ftn-slow-hidden")),
    "hidden-stored": (3, fm_of(HIDDEN.values(), "ftn-slow-hidden", "stored_fm")),
    "recalled-all": (3, fm_of(RECALLED, "ftn-slow-hidden-recall")),
    "below-oracle": (3, lambda read: map(mean, apart(read, "fixedmask-recall", "ftn-slow-hidden-recall"))),
}
# fmt: on


# ------------------------------------------------------------------------------------- filling a page


def values(name, read):
    """The values that a name stands for: one a seed, as a rule; a number stands for itself."""
    if re.fullmatch(r"-?[.\d]+", name):
        return [float(name)]
    if name in OTHERS:
        return [*OTHERS[name][1](read)]
    function, _, names = name.partition(" ")
    if function in FUNCTIONS:
        return FUNCTIONS[function](*(values(n, read) for n in names.split("; ")))
    if "/" in name:
        file, *path = name.split("/")
        return at(read(file), path)
    row, _, quantity = name.rpartition(".")
    return [QUANTITIES[quantity][2](seed) for seed in seeds_of(row, read)]


def at(found, path):
    """What stands at the end of a path: a list, whatever it is."""
    if not path:
        return found if isinstance(found, list) else [found]
    if path[0] == "*":
        return [x for each in found for x in at(each, path[1:])]
    return at(found[int(path[0]) if isinstance(found, list) else path[0]], path[1:])


def seeds_of(row, read):
    file, key = ROWS[row]
    return grouped(read(file))[key]


COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "=": operator.eq}


def reached(condition, read):
    """In which seeds a condition is met; in all or none where ~ says: within two deviations. `is` compares
    words."""
    left, sign, right = re.fullmatch(r"(.+) ([<>=~]+|is) (.+)", condition).groups()
    left = values(left, read)
    if sign == "is":
        return [word == right for word in left]
    right = values(right, read)
    if sign == "~":
        return [abs(mean(left) - right[0]) <= 2 * statistics.stdev(left)] * len(left)
    right = right * len(left) if len(right) == 1 else right
    return [COMPARE[sign](a, b) for a, b in zip(left, right, strict=True)]


def verdict(claim, read):
    """One word: see the rule on the page of results. `: WORD` at the end is said in place of "holds"."""
    claim, _, word = claim.partition(" : ")
    met = [reached(condition, read) for condition in claim.split(" and ")]
    if len(met[0]) == 1 and " = " not in claim:
        return "open"
    if all(map(all, met)):
        return word or "holds"
    return "partly" if any(map(any, met)) else "fails"


STATISTICS = {"": mean, "min ": min, "max ": max, "median ": statistics.median}
FIGURE = re.compile(r"(min |max |median |)(.+?)(±?)(?::(\d)(%?))?")


def digits_of(name):
    """How many digits a name's figure has where the page does not say."""
    if name in OTHERS:
        return OTHERS[name][0]
    return 1 if " " in name or "/" in name else QUANTITIES[name.rpartition(".")[2]][1]


def figure(text, read):
    """What stands in the place of {text}."""
    if text.startswith("? "):
        return verdict(text[2:], read)
    if text.startswith("count "):
        return str(sum(reached(text[6:], read)))
    which, name, deviation, digits, percent = FIGURE.fullmatch(text).groups()
    if name.endswith(".n"):
        return str(len(seeds_of(name[:-2], read)))
    found = [x * (100 if percent else 1) for x in values(name, read)]
    return over(found if deviation else [STATISTICS[which](found)], int(digits or digits_of(name)))


def over(found, digits):
    """Mean and deviation over seeds; of what is not 0 but would be rounded to it, the powers of ten."""
    found = [x for x in found if x is not None]
    if not found or mean(found) == 0 or abs(mean(found)) >= 10**-digits / 2:
        return spread(found, digits)
    return f"{mean(found):.0e}" + (f" ± {statistics.stdev(found):.0e}" if len(found) > 1 else "")


def fill(text, read):
    """A page's text with every {figure} in it."""
    return re.sub(r"\{([^{}\n]+)\}", lambda match: figure(match[1], read), text)
