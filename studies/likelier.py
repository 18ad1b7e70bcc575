"""Tasks whose answers are labels: their records, which label is likelier, and what accuracies say.

An answer counts as right by the likelier label if the right label has the largest probability among the
task's own, end token included. It is an exact match if greedy decoding gives that label to the letter. That
needs no decoding: each of its tokens, the end token included, must be the likeliest after those before it.
"""

import collections
import copy
import functools
import hashlib
import math
import random
import statistics

import torch

import train
from commit import Run
from eval import batches, probe_all
from field import Region, route
from model import response_nll
from plumbing import Refused
from plumbing.backbone import load_backbone, pick_device
from plumbing.passes import pad_left, run_padded
from plumbing.prompts import encode, prompt_ids, prompt_of
from plumbing.records import prompt_key, read_records, take_usable
from plumbing.tables import print_table, spread
from studies.tables import without_empty

BATCH = 8  # fixed, so that the same records give the same bits later
ROUTER = "regions, prompt"  # the one that `Run.routed` is
FEW = 16, 64  # records of a task that no version has learned, see studies/found.py
VALIDATION = 8  # records to choose on, on which train.py compares logits after every later task


class Tasks:
    """Tasks in their order, and their records: `train` and `choose` {task: records}, and `held_out`, those
    that are measured on."""

    def __init__(self, names, args, rest):
        """Take --examples training records and --val-examples records to measure on of every task, in an
        order that the seed shuffles. What is measured or chosen on is never trained on. rest: options of
        train.py. Raises Refused if a task is named twice, if a file is not there, and if none of its records
        can be used."""
        self.names, self.args = names, args
        if len({*names}) < len(names):
            raise Refused(f"--orders {','.join(names)}: a task is there twice")
        said = ["--task", "all", "--backbone", args.backbone, *rest, "--examples", f"{args.examples}"]
        self.options = train.parse_options([*said, "--val-examples", f"{args.val_examples}"])
        self.options.device = pick_device(self.options.device)
        train.complete(self.options, Run(f"{args.out}/none"))
        self.backbone, self.tokenizer = load_backbone(args.backbone, self.options.device)
        self.train, self.choose, self.test = {}, {}, {}
        for task in names:
            self.read(task)

    def read(self, task):
        """Read a task's three files."""
        files = [f"{self.args.data}/{task}.{part}.json" for part in ("train", "choose", "test")]
        records, choose, test = (read_records(path, self.options.template) for path in files)
        asked = {prompt_key(record) for record in choose + test}
        records = [record for record in records if prompt_key(record) not in asked]
        for i, (path, part) in enumerate(zip(files, (records, choose, test))):
            random.Random(f"{self.args.seed} {task} {i}").shuffle(part)
            count = "val_examples" if i else "examples"
            part[:], _, _ = take_usable(part, self.tokenizer, self.options, count)
            if not part:
                raise Refused(f"{path}: none of its records can be used")
        self.train[task], self.choose[task], self.test[task] = records, choose, test

    def records(self, task, replay=0):
        """Return a task's records to train on, with a share `replay` of every earlier task's, and some on
        which train.py compares logits. task "all": those of all tasks."""
        tasks = self.names if task == "all" else [task]
        records = [record for t in tasks for record in self.train[t]]
        for t in self.names[: self.names.index(task)] if replay else ():
            records += self.train[t][: max(1, round(replay * len(self.train[t])))]
        return records, [r for t in tasks for r in self.choose[t][: max(1, VALIDATION // len(tasks))]]

    @functools.cached_property
    def held_out(self):
        """{task: (examples as `judge` takes them, the number of the right label of each, their records)} of
        --part, the shortest prompts first."""
        found, written = {}, (self.tokenizer, self.options.template)
        for task, records in (self.test if self.args.part == "test" else self.choose).items():
            labels = sorted({r["output"] for r in self.train[task] + records})
            responses = lambda r, labels=labels: [encode({**r, "output": x}, *written)[1] for x in labels]
            pairs = [((prompt_ids(r, *written), responses(r)), r) for r in records]
            examples, records = zip(*sorted(pairs, key=lambda pair: len(pair[0][0])))
            found[task] = examples, [labels.index(r["output"]) for r in records], records
        return found


def once(gating):
    """Return a gating that all rows of a batch share as that of one row, so that bases are gathered once."""
    if gating and all((part == part[:1]).all() for part in gating):
        return tuple(part[:1] for part in gating)
    return gating


@torch.no_grad()
def label_scores(model, examples, gating_of, probe_gating=None):
    """Return log-probabilities [B, C] of C labels, and whether greedy decoding gives each, [B, C]. examples:
    B pairs of prompt ids and the response ids of every label. gating_of: what makes a gating of h_bar.

    The prompts are read once. What is cached of them is continued with every label."""
    prompts, scores, greedy = [prompt for prompt, _ in examples], [], []
    with model.gated_by(lambda h_bar: once(gating_of(h_bar)), prompts, probe_gating):
        ids, mask = pad_left(prompts, model.pad_id, model.backbone)
        read = run_padded(model.backbone, ids, mask, use_cache=True, logits_to_keep=1)
        for responses in zip(*(labels for _, labels in examples)):
            width = max(map(len, responses))
            # Pad on the right: no token of a label sees what follows it.
            rows = [[*r, *[-100] * (width - len(r))] for r in responses]
            labels = torch.tensor(rows, device=ids.device)  # [B, width]
            given = labels[:, :-1].masked_fill(labels[:, :-1] < 0, model.pad_id)
            longer = torch.cat([mask, torch.ones_like(given)], 1)
            cache = copy.deepcopy(read.past_key_values)
            more = run_padded(model.backbone, given, longer, past_key_values=cache, use_cache=True)
            logits = torch.cat([read.logits[:, -1:], more.logits], 1)  # [B, width, V], predicts `labels`
            scores.append(-response_nll(logits, labels))
            greedy.append(((logits.argmax(-1) == labels) | (labels < 0)).all(1))
    return torch.stack(scores, 1), torch.stack(greedy, 1)


def judge(model, examples, right, gating_of, probe_gating=None, bar=iter):
    """Judge examples as `label_scores` takes them. right [n]: the number of the right label of each. Return
    {"likelier", "exact": for every example 1 if it is right, else 0; "digest": of all scores, to the bit}."""
    likelier, exact, digest = [], [], hashlib.sha256()
    for batch, wanted in bar([*batches(examples, right, size=BATCH)]):
        scores, greedy = label_scores(model, batch, gating_of, probe_gating)
        digest.update(scores.float().cpu().numpy().tobytes())
        wanted = torch.tensor(wanted, device=scores.device)
        likelier += (scores.argmax(1) == wanted).int().tolist()
        exact += greedy.gather(1, wanted[:, None])[:, 0].int().tolist()
    return {"likelier": likelier, "exact": exact, "digest": digest.hexdigest()[:16]}


def measures(learned, last, alone=None):
    """Return what accuracies in percent say of a sequence. learned: R[j, j], of every task when it was
    learned; last: R[T, j], after the last; alone: of a version of every task that was trained alone.

    ACC is the mean of R[T, j]. BWT, backward transfer, is the mean of R[T, j] - R[j, j] over all but the last
    task, and forgetting the mean of the losses in it, against which no gain is set. FWT, forward transfer, is
    the mean of R[j, j] less `alone` over all but the first."""
    found = {"ACC": statistics.mean(last)}
    if learned and len(last) > 1:
        changes = [now - then for now, then in zip(last[:-1], learned)]
        found |= {"BWT": statistics.mean(changes)}
        found["forgetting"] = statistics.mean(max(0.0, -change) for change in changes)
        if alone:
            found["FWT"] = statistics.mean(then - a for then, a in zip(learned[1:], alone[1:]))
    return found


@torch.no_grad()
def sent_to(tasks, run, model):
    """Return {task: {router: the number of the version to which each of its records is sent}}. Where one bank
    answers for all, the instruction and the regions alone are asked, as in `Run.routed`."""
    dynamics, probe_gating = run.versions[-1].dynamics, run.probe_gating()
    written, found = (tasks.tokenizer, tasks.options.template), {}
    alone = lambda r: {"instruction": r["input"]} if r.get("input") else r
    for what in ("prompt",) if run.shared else ("prompt", "input"):
        sides = tasks.train, {task: records for task, (_, _, records) in tasks.held_out.items()}
        known, asked = (
            [[r if what == "prompt" else alone(r) for r in side[task]] for task in tasks.names]
            for side in sides
        )
        h_bar = lambda part: probe_all(
            model, [(prompt_ids(r, *written), []) for r in part], "prompt", probe_gating
        )
        regions = [v.region for v in run.versions]
        if what == "input":
            regions = [Region.fit(dynamics(h_bar(part))) for part in known]
        found[f"regions, {what}"] = [route(dynamics(h_bar(part)), regions).choice.tolist() for part in asked]
        if not run.shared:
            texts = [[[prompt_of(r, *written) for r in part] for part in side] for side in (known, asked)]
            found |= {f"words, {what}": routed} if (routed := words_router(*texts)) else {}
    return {task: {router: sent[i] for router, sent in found.items()} for i, task in enumerate(tasks.names)}


def words_router(texts, rows):
    """Route by words: TF-IDF of words and pairs of them, and logistic regression. texts: for every task those
    to learn from; rows: for every task those to route. -> for every task the choice of each row, or None
    where scikit-learn is not installed"""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return None
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    features = words.fit_transform(text for part in texts for text in part)
    belongs = [i for i, part in enumerate(texts) for _ in part]
    router = LogisticRegression(C=10, max_iter=1000).fit(features, belongs)
    return [router.predict(words.transform(part)).tolist() for part in rows]


def home_share(counts):
    """Return the mean over tasks of the percentage that is sent to its own version."""
    return statistics.mean(100 * row[i] / sum(row) for i, row in enumerate(counts))


def confusions(counts, names):
    """Return [(percentage of a task's records, task, other task)], of all that are sent elsewhere, the most
    first."""
    cells = [(i, j, 100 * n / sum(row)) for i, row in enumerate(counts) for j, n in enumerate(row)]
    return sorted(((p, names[i], names[j]) for i, j, p in cells if p and i != j), reverse=True)


def paired(out, first):
    """Return how many points more a row gets right in use than another of the same order, and 1.96 times the
    standard error of that over the records, which are the same, not over trainings. None without records."""
    pairs = zip(out.get("in use", ()), first.get("in use", ()))
    apart = [[100 * (int(a) - int(b)) for a, b in zip(*texts, strict=True)] for texts in pairs]
    if not apart or out is first:
        return None
    errors = [statistics.variance(task) / len(task) for task in apart]
    return statistics.mean(map(statistics.mean, apart)), 1.96 * math.sqrt(sum(errors)) / len(apart)


def accuracies(results):
    """-> heads and lines of a table of rows as studies.sequence publishes them, without empty columns. The
    last compares a row with the first of its order."""
    said = lambda value, digits=1: "" if value is None else f"{value:.{digits}f}"
    lines, firsts = [], {}
    for out in results:
        stored, seconds = out["stored"], sum(out["seconds"].values())
        figures = [stored.get(key) for key in ("ACC", "exact match", "BWT", "forgetting", "FWT")]
        ways = [out["routed"].get(f"regions, {what}", {}).get("ACC") for what in ("prompt", "input")]
        size = [f"{n / 1e6:.1f}" for n in out["parameters"] or ()] or ["", ""]
        more = paired(out, firsts.setdefault(out["order"], out))
        more = "{:+.1f} ± {:.1f}".format(*more) if more else ""
        cells = [*map(said, [*figures, *ways]), *size, f"{seconds:.0f}", more]
        rate = out.get("rate", "") if out["method"] != "bare" else ""
        lines.append([out["about"], rate, out["order"], *cells])
    heads = ["%", "rate", "order", "ACC", "exact match", "BWT", "forgotten", "FWT", "routed", "by input"]
    heads += ["M trained, no field", "M kept", "seconds", "in use, less the first"]
    return without_empty(heads, lines)


def routers(results):
    """-> heads and lines of a table of who answers: every router of every method, over its orders."""
    groups, lines = {}, []
    for out in results:
        for router, counts in out["home"].items():
            groups.setdefault((out["about"], router), []).append((out, counts))
    for (about, router), found in groups.items():
        home = [home_share(counts) for _, counts in found]
        acc = [out["routed"][router]["ACC"] for out, _ in found]
        elsewhere = collections.Counter()
        for out, counts in found:
            for percent, *pair in confusions(counts, out["tasks"]):
                elsewhere[" to ".join(pair)] += percent / len(found)
        worst = ", ".join(f"{pair} {percent:.0f}" for pair, percent in elsewhere.most_common(4))
        lines.append([about, router, str(len(found)), spread(home, 1), spread(acc, 1), worst])
    return ["%", "router", "orders", "home", "ACC", "most often elsewhere"], lines


def few_lines(digits, rows):
    """-> heads and lines of a table of rows of studies.found: a task each that no version has learned"""
    names = ["bare", "nearest region"]
    names += [f"{who}, {n}" for n in FEW for who in ("best single", "composition", "LoRA")]
    names = [name for name in names if name in rows[0]]
    lines = [[f"{row['task']}, seed {row['seed']}", *(f"{row[n]:.{digits}f}" for n in names)] for row in rows]
    return ["", *names], lines


def summary(results):
    """Print what is finished of all rows."""
    print_table("accuracy", *accuracies(results))
    print_table("who answers", *routers(results))
