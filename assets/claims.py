"""What the two papers claim in numbers, and what the published results say of it.

`report.py` makes a table of it. Every figure in the third column is computed: from `assets/results/*.json`,
or from the shapes of modules. A verdict is one word: *holds*, *fails*, *partly*, or *open* where nothing here
tells.
"""

import statistics

import torch
import transformers

from field import CoordinateDynamics, WeightField
from model import NIWF
from synthetic import decomposition, row_summary

mean = statistics.mean


def lost(rows, protocol="stored"):
    """How much worse the first task became, mean over seeds."""
    return f"{mean(100 * (r['R'][protocol][1][0] / r['R'][protocol][0][0] - 1) for r in rows):.1f} %"


def learned(rows, task=0):
    """Perplexity on a task when it was learned, mean over seeds."""
    return f"{mean(r['R']['stored'][task][task] for r in rows):.3f}"


def share(counts, name, row):
    """Percent of a task's inputs."""
    return 100 * counts[name] / sum(row["routing"][name].values())


def home(rows):
    """The share of either task's inputs that are routed to it, mean over seeds."""
    shares = [mean(share(r["routing"][task], task, r) for r in rows) for task in rows[0]["tasks"]]
    return " and ".join(f"{x:.1f}" for x in shares) + " %"


def mistral_sizes():
    """-> millions of parameters of Mistral-7B's bank, N = 16, and of field and dynamics"""
    with torch.device("meta"):
        model = NIWF(transformers.MistralForCausalLM(transformers.MistralConfig()), pad_id=0)
        others = WeightField(32, 16), CoordinateDynamics(model.features)
    small = sum(p.numel() for module in others for p in module.parameters())
    return model.bank.parameter_count(16) / 1e6, small / 1e6


def niwf_claims(read):
    """read(name): the rows of a file of results. -> [(where, claim, finding, what shows it, verdict)]"""
    base, ablation, worth = read("tiny-baselines"), read("tiny-ablations"), read("tiny-worth")
    smol, smol_worth = read("smollm2-baselines"), read("smollm2-worth")
    full, one, alone = "full fine-tuning", "LoRA r 64, one", "LoRA r 64, one a task"
    exact, soft, paper = "NIWF, exact lock", "NIWF, soft lock", "NIWF, the paper's own"
    fixed, field, dense = "fixed z, N 16, K 8", "NIWF, N 16, K 8", ablation["dense gating"]
    bank, small = mistral_sizes()
    gather = read("gather-bench")["mistral, 1 x 256 tokens"]
    ratio = gather["a token"]["bytes"] / gather["a sequence"]["bytes"]
    prefill = read("decode-bench")["mistral, prefill"]
    twice = statistics.median(prefill["ours"]["seconds"]) / statistics.median(prefill["bare"]["seconds"])
    drift = base[soft][0]["drift"]["alpaca"]
    now, penalty = 100 * drift["inside_now"], drift["lock_loss"]
    growth, total = read("stream"), read("memory-count")
    half = len(growth) // 2
    ms = [statistics.median(n["routed_ms"] for n in part) for part in (growth[:half], growth[half:])]
    second = next(r["total"] for r in total[::-1] if r["devices"] == 1 and not r["checkpointing"]) / 2**30
    sets = worth[field][0]["gating"]["alpaca"]["sets"]
    unseparated = lost(ablation["soft, no separation"])
    count, table, ablations = "`pytest test_all.py -k mistral`", "tiny-baselines", "tiny-ablations"
    return [
        ("Eq. 15", "banks of 323 M parameters", f"{bank:.1f} M", count, "fails"),
        ("Table 2", "field and dynamics of 0.2 M parameters", f"{small:.1f} M", count, "fails"),
        ("Table 2", "18.9 of 24 GB", f"{second:.1f} GiB by count, with gradients", "memory-count", "open"),
        ("5.2", "gathered once a sequence, 500 times less", f"{ratio:.0f} times", "gather-bench", "partly"),
        (
            "8",
            "two passes double latency",
            f"a prompt's by {twice:.1f}, no token's",
            "decode-bench",
            "partly",
        ),
        ("Table 3", "full fine-tuning loses 85.5 % of A", lost(base[full]), table, "holds"),
        ("", "and is best on A", f"{learned(base[full])}, a LoRA {learned(base[one])}", table, "fails"),
        ("", "one LoRA loses 39.9 %", f"{lost(base[one])}; SmolLM2 {lost(smol[one])}", table, "holds"),
        ("", "less than full fine-tuning", f"{lost(base[one])}, {lost(base[full])}", table, "fails"),
        ("", "a LoRA a task loses 0 %", lost(base[alone]), table, "holds"),
        ("", "but needs a task's name", f"with regions {lost(base[alone], 'routed')}", table, "fails"),
        (
            "",
            "NIWF loses 0 %",
            f"as printed {lost(base[paper])}, bare probe {lost(base[soft])}",
            table,
            "fails",
        ),
        (
            "",
            "the same, exact lock",
            f"{lost(base[exact])}, routed {lost(base[exact], 'routed')}",
            table,
            "holds",
        ),
        ("", "NIWF 3 % above a LoRA on A", f"{learned(base[exact])}, {learned(base[alone])}", table, "fails"),
        ("", "", f"{learned(smol[exact])}, {learned(smol[alone])}", "smollm2-baselines", "fails"),
        ("5.3", "no labels at inference", f"{home(base[exact])} routed home", table, "holds"),
        ("", "", f"{home(smol[exact])}", "smollm2-baselines", "partly"),
        (
            "Figure 7",
            "a fixed z is worse",
            f"{learned(worth[fixed])}, {learned(worth[field])}",
            "tiny-worth",
            "holds",
        ),
        ("", "", f"{learned(smol_worth[fixed])}, {learned(smol_worth[field])}", "smollm2-worth", "fails"),
        ("", "no separation loses 0.2 %", f"{unseparated}, with it {lost(base[soft])}", ablations, "fails"),
        ("", "no lock loses 30.6 %", lost(base["NIWF, no lock"]), table, "holds"),
        ("", "dense is better on A", f"{learned(dense)}, {learned(base[exact])}", ablations, "fails"),
        ("", "dense is worse on B", f"{learned(dense, 1)}, {learned(base[exact], 1)}", ablations, "holds"),
        (
            "5.5",
            "A's region holds A after B",
            f"{now:.0f} % of its inputs, soft lock",
            "tiny-soft-lock",
            "fails",
        ),
        ("6.1", "zero tolerance at anchors", f"L_lock {penalty:.0e}; A is lost", "tiny-soft-lock", "fails"),
        (
            "3.3",
            "a gating for each input",
            f"{sets:.0f} choices a layer, standardised",
            "tiny-worth",
            "holds",
        ),
        ("", "", "one choice, as printed", "`pytest test_all.py -k collapses`", "fails"),
        (
            "6.2",
            "cost a token is bounded",
            f"{ms[0]:.2f} ms with up to {half} tasks, {ms[1]:.2f} with more",
            "stream",
            "holds",
        ),
        ("7", "versions move no other", "not by a bit", "`pytest test_all.py -k 200_random`", "holds"),
    ]


def ftn_claims(read):
    """As `niwf_claims`."""
    rows = read("ftn-experiment-1") + read("lora-ftn")
    runs = {}
    for row in rows:
        runs.setdefault((row["variant"], row["method"]), []).append(row)

    def score(variant, method, protocol="recovered"):
        return f"{mean(row_summary(r)[f'{protocol}_last'] for r in runs[variant, method]):.3f}"

    def forgets(variant, method, protocol="recovered"):
        return f"{mean(row_summary(r)[f'{protocol}_fm'] for r in runs[variant, method]):.3f}"

    def both(*key):
        return f"{score(*key)}, {forgets(*key)}"

    def recall(variant, method):
        return mean(r for _, r in decomposition([r for r in rows if r["variant"] == variant])[method])

    def tuned(name, variant):
        return [row_summary(r) for r in read(name) if r["variant"] == variant]

    supsup = f"{mean(r['recovered_last'] for r in tuned('ftn-supsup-tuned', 'clf')):.3f}"
    ewc = f"{mean(r['recovered_fm'] for r in tuned('ftn-ewc-tuned', 'clf')):.3f}"
    hidden = f"{mean(row_summary(r)['recovered_fm'] for r in read('ftn-slow-hidden')):.3f}"
    bank = [r for r in read("lora-ftn") if r["method"] == "lora-bank"]
    unique = sum(len({*r["chosen"]}) == r["tasks"] for r in bank)
    pairs = [x for r in runs["style", "lora-ftn"] for x in r["overlap_last"]]
    disjoint = f"{100 * mean(x == 0 for x in pairs):.0f} % of pairs, the largest {max(pairs):.2f}"
    decay = [row_summary(r)["parameters_moved"] for r in read("ftn-leaks") if r["leak"] == "decay"]
    one, style, slow = "ftn-experiment-1", "lora-ftn", "ftn-slow"
    return [
        ("Table 1", "FixedMask .938, FM 0", both("clf", "fixedmask"), one, "holds"),
        ("", "FTN-Slow .896, FM .014", both("clf", slow), one, "fails"),
        ("", "FTN-Fast .899, FM .042", both("clf", "ftn-fast"), one, "fails"),
        ("", "KWTA .640, FM .152: smoothing is needed", both("clf", "kwta"), one, "holds"),
        ("", "NoMask .666, FM .466", both("clf", "nomask"), one, "holds"),
        ("", "EWC as NoMask, at strength 400", both("clf", "ewc"), one, "holds"),
        ("", "the same, tuned", f"FM {ewc} at 4e5", "ftn-ewc-tuned", "partly"),
        ("", "SupSup .645, FM 0", both("clf", "supsup"), one, "holds"),
        ("", "the same, tuned", f"{supsup}", "ftn-supsup-tuned", "holds"),
        ("", "SupSup-Wide .660, FM 0", both("clf", "supsup-wide"), one, "partly"),
        ("Table 2", "FixedMask .006, FM 0", both("reg", "fixedmask"), one, "holds"),
        ("", "FTN-Slow .167, FM .003", both("reg", slow), one, "holds"),
        ("", "KWTA .589, FTN-Fast .126", f"{score('reg', 'kwta')}, {score('reg', 'ftn-fast')}", one, "fails"),
        ("", "NoMask .312, FM .054 (ours: its sign put right)", both("reg", "nomask"), one, "partly"),
        ("", "SupSup-Wide is no better than SupSup", both("reg", "supsup-wide"), one, "fails"),
        ("", "and FM .101 by recall", f"recall {recall('reg', 'supsup-wide'):.3f}", one, "fails"),
        (
            "Table 4",
            "FTN-Slow loses by recall, not by overlap",
            f"of {forgets('clf', slow)}, by overlap {forgets('clf', slow, 'stored')}",
            one,
            "fails",
        ),
        ("Theorem 2.1", "disjoint masks keep every bit", forgets("clf", "fixedmask"), one, "holds"),
        ("", "the search makes them disjoint", f"FM {forgets('clf', slow)}", one, "fails"),
        ("", "made to: hidden from it, m0 = -4", f"FM {hidden}", "ftn-slow-hidden", "holds"),
        ("Appendix C", "decay moves inactive neurons", f"{100 * mean(decay):.0f} %", "ftn-leaks", "holds"),
        ("Table 3", "FixedMask FM 0", forgets("style", "lora-fixedmask"), style, "holds"),
        ("", "LoRA-Naive collapses, FM 7.37", forgets("style", "lora-naive"), style, "holds"),
        (
            "",
            "LoRA-FTN FM .07, stored .34",
            f"{forgets('style', 'lora-ftn')}, stored {forgets('style', 'lora-ftn', 'stored')}",
            style,
            "partly",
        ),
        ("", "LoRA-Bank FM .04", forgets("style", "lora-bank"), style, "fails"),
        ("", "6 of 7 seeds take an adapter a task", f"{unique} of {len(bank)}", "lora-ftn", "fails"),
        ("Table 5", "most pairs are disjoint, the largest .36", disjoint, style, "partly"),
    ]
