"""What the two papers claim in numbers, and what the published results say of it.

`report.py` makes a table of it. Every figure in the third column is computed: from `studies/results/*.json`,
or from the shapes of modules. A verdict is one word: *holds*, *fails*, *partly*, or *open* where nothing here
tells.
"""

import statistics

import torch
import transformers

from field import CoordinateDynamics, WeightField
from model import NIWF
from studies.tables import decomposition
from synthetic import row_summary

mean = statistics.mean


def lost(rows, protocol="stored"):
    """How much worse the first task became, mean over seeds."""
    return f"{mean(100 * (r['R'][protocol][1][0] / r['R'][protocol][0][0] - 1) for r in rows):.1f} %"


def learned(rows, task=0):
    """Perplexity on a task when it was learned, mean over seeds."""
    return f"{mean(r['R']['stored'][task][task] for r in rows):.3f}"


def routed(rows):
    """Perplexity on the first task after the second when nobody names it, mean over seeds."""
    return f"{mean(r['R']['routed'][1][0] for r in rows):.3f}"


def share(counts, name, row):
    """Percent of a task's inputs."""
    return 100 * counts[name] / sum(row["routing"][name].values())


def home(rows):
    """The share of either task's inputs that are routed to it, mean over seeds."""
    shares = [mean(share(r["routing"][task], task, r) for r in rows) for task in rows[0]["tasks"]]
    return " and ".join(f"{x:.1f}" for x in shares) + " %"


def times(sides, other):
    """How many times another side's median our median takes. sides: {side: {"seconds": one a turn}}"""
    ours, theirs = (statistics.median(sides[side]["seconds"]) for side in ("ours", other))
    return ours / theirs


def mistral_sizes():
    """-> millions of parameters of Mistral-7B's bank, N = 16, and of field and dynamics"""
    config = transformers.MistralConfig()
    layers, config.num_hidden_layers = config.num_hidden_layers, 1  # a layer more adds the same
    with torch.device("meta"):
        model = NIWF(transformers.MistralForCausalLM(config), pad_id=0)
        others = WeightField(layers, 16), CoordinateDynamics(model.features)
    small = sum(p.numel() for module in others for p in module.parameters())
    return layers * model.bank.parameter_count(16) / 1e6, small / 1e6


def niwf_claims(read):
    """read(name): the rows of a file of results. -> [(where, claim, finding, what shows it, verdict)]"""
    parts = (cost_claims, table_3_claims, figure_7_claims, region_claims)
    return [claim for part in parts for claim in part(read)]


def cost_claims(read):
    """Sizes, memory and time."""
    bank, small = mistral_sizes()
    gather = read("gather-bench")["mistral, 1 x 256 tokens"]
    ratio = gather["a token"]["bytes"] / gather["a sequence"]["bytes"]
    prefill = read("decode-bench")["mistral, prefill"]
    twice = times(prefill, "bare")
    one = [r for r in read("memory-count") if r["devices"] == 1 and not r["checkpointing"]]
    second = f"{one[-1]['total'] / 2**30:.1f} GiB by count, with gradients"
    growth = read("stream")
    half = len(growth) // 2
    ms = [statistics.median(n["routed_ms"] for n in part) for part in (growth[:half], growth[half:])]
    token = f"{ms[0]:.2f} ms with up to {half} tasks, {ms[1]:.2f} with more"
    count = "`pytest test_all.py -k mistral`"
    return [
        ("Eq. 15", "banks of 323 M parameters", f"{bank:.1f} M", count, "fails"),
        ("Table 2", "field and dynamics of 0.2 M parameters", f"{small:.1f} M", count, "fails"),
        ("Table 2", "18.9 of 24 GB", second, "memory-count", "open"),
        ("5.2", "gathered once a sequence, 500 times less", f"{ratio:.0f} times", "gather-bench", "partly"),
        ("6.2", "cost a token is bounded", token, "stream", "holds"),
        (
            "8",
            "two passes double latency",
            f"a prompt's by {twice:.1f}, no token's",
            "decode-bench",
            "partly",
        ),
    ]


def table_3_claims(read):
    """What is forgotten, by which method."""
    base, smol, table = read("tiny-baselines"), read("smollm2-baselines"), "tiny-baselines"
    full, one, alone = base["full fine-tuning"], base["LoRA r 64, one"], base["LoRA r 64, one a task"]
    exact, soft, paper = (base[f"NIWF, {name}"] for name in ("exact lock", "soft lock", "the paper's own"))
    real, real_alone = smol["NIWF, exact lock"], smol["LoRA r 64, one a task"]
    real_table, real_paper = "smollm2-baselines", smol["NIWF, the paper's own"]
    printed = f"as printed {lost(paper)}, bare probe {lost(soft)}"
    real_printed = f"SmolLM2, as printed {lost(real_paper)}, routed {lost(real_paper, 'routed')}"
    return [
        ("Table 3", "full fine-tuning loses 85.5 % of A", lost(full), table, "holds"),
        ("", "and is best on A", f"{learned(full)}, a LoRA {learned(one)}", table, "fails"),
        ("", "one LoRA loses 39.9 %", lost(one), table, "holds"),
        ("", "", f"SmolLM2 {lost(smol['LoRA r 64, one'])}", "smollm2-baselines", "partly"),
        ("", "less than full fine-tuning", f"{lost(one)}, {lost(full)}", table, "fails"),
        ("", "a LoRA a task loses 0 %", lost(alone), table, "holds"),
        ("", "but needs a task's name", f"with regions {lost(alone, 'routed')}", table, "fails"),
        ("", "NIWF loses 0 %", printed, table, "fails"),
        ("", "", real_printed, real_table, "partly"),
        ("", "the same, exact lock", f"{lost(exact)}, routed {lost(exact, 'routed')}", table, "holds"),
        ("", "NIWF 3 % above a LoRA on A", f"as printed {learned(paper)}, {learned(alone)}", table, "holds"),
        ("", "", f"SmolLM2 {learned(real_paper)}, {learned(real_alone)}", real_table, "holds"),
        ("", "the same, exact lock", f"{learned(exact)}, {learned(alone)}", table, "fails"),
        ("", "", f"SmolLM2 {learned(real)}, {learned(real_alone)}", "smollm2-baselines", "fails"),
    ]


def figure_7_claims(read):
    """What becomes worse without one of the parts."""
    base, ablation, table = read("tiny-baselines"), read("tiny-ablations"), "tiny-ablations"
    exact, soft, dense = base["NIWF, exact lock"], base["NIWF, soft lock"], ablation["dense gating"]
    worth = {name: read(f"{name}-worth") for name in ("tiny", "smollm2")}
    pairs = {
        name: ", ".join(learned(rows[row]) for row in ("fixed z, N 16, K 8", "NIWF, N 16, K 8"))
        for name, rows in worth.items()
    }
    unseparated = f"{lost(ablation['soft, no separation'])}, with it {lost(soft)}"
    sets = worth["tiny"]["NIWF, N 16, K 8"][0]["gating"]["alpaca"]["sets"]
    return [
        ("Figure 7", "a fixed z is worse", pairs["tiny"], "tiny-worth", "holds"),
        ("", "", pairs["smollm2"], "smollm2-worth", "fails"),
        ("", "no separation loses 0.2 %", unseparated, table, "fails"),
        ("", "no lock loses 30.6 %", lost(base["NIWF, no lock"]), "tiny-baselines", "holds"),
        ("", "dense is better on A", f"{learned(dense)}, {learned(exact)}", table, "fails"),
        ("", "dense is worse on B", f"{learned(dense, 1)}, {learned(exact, 1)}", table, "holds"),
        (
            "3.3",
            "a gating for each input",
            f"{sets:.0f} choices a layer, standardised",
            "tiny-worth",
            "holds",
        ),
        ("", "", "one choice, as printed", "`pytest test_all.py -k collapses`", "fails"),
    ]


def region_claims(read):
    """Where inputs lie, and what the anchors hold."""
    homes = {name: home(read(f"{name}-baselines")["NIWF, exact lock"]) for name in ("tiny", "smollm2")}
    drift = read("tiny-baselines")["NIWF, soft lock"][0]["drift"]["alpaca"]
    now, penalty = f"{100 * drift['inside_now']:.0f} %", f"{drift['lock_loss']:.0e}"
    return [
        ("5.3", "no labels at inference", f"{homes['tiny']} routed home", "tiny-baselines", "holds"),
        ("", "", homes["smollm2"], "smollm2-baselines", "partly"),
        ("5.5", "A's region holds A after B", f"{now} of its inputs, soft lock", "tiny-soft-lock", "fails"),
        ("6.1", "zero tolerance at anchors", f"L_lock {penalty}; A is lost", "tiny-soft-lock", "fails"),
        ("7", "versions move no other", "not by a bit", "`pytest test_all.py -k 200_random`", "holds"),
    ]


class Rows:
    """Rows of synthetic.py by variant and method, and what they come to, means over seeds."""

    def __init__(self, rows):
        self.all = rows

    def of(self, variant, method):
        return [r for r in self.all if (r["variant"], r["method"]) == (variant, method)]

    def each(self, key, variant, method):
        return [row_summary(r)[key] for r in self.of(variant, method)]

    def mean(self, key, variant, method):
        return mean(self.each(key, variant, method))

    def score(self, variant, method):
        return f"{self.mean('recovered_last', variant, method):.3f}"

    def forgets(self, variant, method, protocol="recovered"):
        return f"{self.mean(f'{protocol}_fm', variant, method):.3f}"

    def both(self, variant, method):
        return f"{self.score(variant, method)}, {self.forgets(variant, method)}"

    def recall(self, variant, method):
        losses = decomposition([r for r in self.all if r["variant"] == variant])[method]
        return f"{mean(recall for _, recall in losses):.3f}"


def ftn_claims(read):
    """As `niwf_claims`."""
    return grid_claims(read) + style_claims(read)


def grid_claims(read):
    """Experiment 1: a grid of neurons."""
    one, wide = "ftn-experiment-1", "ftn-supsup-wide"
    rows = Rows(read(one) + read(wide))
    supsup, ewc = (Rows(read(f"ftn-{name}")) for name in ("supsup-tuned", "ewc-tuned-clf"))
    ewc_reg = Rows(read("ftn-ewc-tuned-reg")).both("reg", "ewc-400000000")
    hidden = Rows(read("ftn-slow-hidden-10")).forgets("clf", "ftn-slow-hidden")
    slow_ten, others_ten = "ftn-slow-10", "ftn-fast-kwta-10"
    ten = Rows(read(slow_ten) + read(others_ten))
    decay = mean(row_summary(r)["parameters_moved"] for r in read("ftn-leaks") if r["leak"] == "decay")
    slow, fixed = rows.forgets("clf", "ftn-slow"), rows.forgets("clf", "fixedmask")
    overlap = f"of {slow}, by overlap {rows.forgets('clf', 'ftn-slow', 'stored')}"
    unsmoothed = f"{rows.score('reg', 'kwta')}, {rows.score('reg', 'ftn-fast')}"
    tuned = f"{ewc.both('clf', 'ewc-4000000')} at 4e6"
    smooth = Rows(read("ftn-frequency-4")).both("clf", "ftn-slow")
    return [
        ("Table 1", "FixedMask .938, FM 0", rows.both("clf", "fixedmask"), one, "holds"),
        ("", "FTN-Slow .896, FM .014", rows.both("clf", "ftn-slow"), one, "fails"),
        ("", "the same, ten steps a search", ten.both("clf", "ftn-slow"), slow_ten, "partly"),
        ("", "the same, smoother tasks: frequency 4", smooth, "ftn-frequency-4", "partly"),
        ("", "FTN-Fast .899, FM .042", rows.both("clf", "ftn-fast"), one, "fails"),
        ("", "the same, ten steps a search", ten.both("clf", "ftn-fast"), others_ten, "partly"),
        ("", "KWTA .640, FM .152: smoothing is needed", rows.both("clf", "kwta"), one, "holds"),
        ("", "the same, ten steps a search", ten.both("clf", "kwta"), others_ten, "holds"),
        ("", "NoMask .666, FM .466", rows.both("clf", "nomask"), one, "holds"),
        ("", "EWC as NoMask, at strength 400", rows.both("clf", "ewc"), one, "holds"),
        ("", "the same, tuned", tuned, "ftn-ewc-tuned-clf", "partly"),
        ("", "SupSup .645, FM 0", rows.both("clf", "supsup"), one, "holds"),
        ("", "the same, tuned", supsup.score("clf", "supsup-0.003"), "ftn-supsup-tuned", "holds"),
        ("", "SupSup-Wide .660, FM 0", rows.both("clf", "supsup-wide"), wide, "partly"),
        ("Table 2", "FixedMask .006, FM 0", rows.both("reg", "fixedmask"), one, "holds"),
        ("", "FTN-Slow .167, FM .003", rows.both("reg", "ftn-slow"), one, "partly"),
        ("", "KWTA .589, FTN-Fast .126", unsmoothed, one, "fails"),
        ("", "NoMask .312, FM .054 (ours: its sign put right)", rows.both("reg", "nomask"), one, "partly"),
        ("", "EWC .311 is no better than NoMask", rows.both("reg", "ewc"), one, "holds"),
        ("", "the same, tuned", f"{ewc_reg} at 4e8", "ftn-ewc-tuned-reg", "fails"),
        ("", "SupSup-Wide is no better than SupSup", rows.both("reg", "supsup-wide"), wide, "fails"),
        ("", "and FM .101 by recall", f"recall {rows.recall('reg', 'supsup-wide')}", wide, "fails"),
        ("Table 4", "FTN-Slow loses by recall, not by overlap", overlap, one, "fails"),
        ("Theorem 2.1", "disjoint masks keep every bit", fixed, one, "holds"),
        ("", "the search makes them disjoint", f"FM {slow}", one, "fails"),
        ("", "made to: hidden, m0 -4, ten steps", f"FM {hidden}", "ftn-slow-hidden-10", "holds"),
        ("Appendix C", "decay moves inactive neurons", f"{100 * decay:.0f} %", "ftn-leaks", "holds"),
    ]


def style_claims(read):
    """Experiment 2: LoRA-FTN."""
    style, smol = "lora-ftn", "lora-styles-smollm2"
    rows, real = Rows(read(style)), Rows(read(smol))
    ftn, real_ftn, few = (
        f"{some.forgets('style', 'lora-ftn')}, stored {some.forgets('style', 'lora-ftn', 'stored')}"
        for some in (rows, real, Rows(read("lora-ftn-smollm2")))
    )
    bank = rows.of("style", "lora-bank")
    unique = f"{sum(len({*r['chosen']}) == r['tasks'] for r in bank)} of {len(bank)}"
    pairs = [x for r in rows.of("style", "lora-ftn") for x in r["overlap_last"]]
    disjoint = f"{100 * mean(x == 0 for x in pairs):.0f} % of pairs, the largest {max(pairs):.2f}"
    return [
        ("Table 3", "FixedMask FM 0", rows.forgets("style", "lora-fixedmask"), style, "holds"),
        ("", "LoRA-Naive collapses, FM 7.37", rows.forgets("style", "lora-naive"), style, "holds"),
        ("", "", f"SmolLM2 {real.forgets('style', 'lora-naive')}", smol, "holds"),
        ("", "LoRA-FTN FM .07, stored .34", ftn, style, "partly"),
        ("", "", f"SmolLM2 {real_ftn}", smol, "fails"),
        ("", "", f"SmolLM2, three styles {few}", "lora-ftn-smollm2", "partly"),
        ("", "LoRA-Bank FM .04", rows.forgets("style", "lora-bank"), style, "fails"),
        ("", "", f"SmolLM2 {real.forgets('style', 'lora-bank')}", smol, "partly"),
        ("", "6 of 7 seeds take an adapter a task", unique, style, "fails"),
        ("Table 5", "most pairs are disjoint, the largest .36", disjoint, style, "partly"),
    ]
