"""Print tables of text: means with deviations, in columns as wide as they must be; and how a run stands."""

import collections
import statistics


def spread(values, digits=3):
    """Mean and standard deviation of values as text. None among them is left out; no value gives no text."""
    values = [v for v in values if v is not None]
    text = f"{statistics.mean(values):.{digits}f}" if values else ""
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def print_table(title, heads, lines):
    """Print a title, then heads and lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *lines)]
    print(f"\n{title}")
    for first, *others in [heads, *lines]:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]))


def print_over_runs(outs):
    """Print a table over several runs of the same tasks: mean and standard deviation."""
    heads, lines = ["", "protocol", "base", "learned", "now", "forgetting %", "routed home %"], []
    for i, t in enumerate(outs[0]["tasks"]):
        home = [100 * o["routing"][t][t] / sum(o["routing"][t].values()) for o in outs]
        for protocol in ("stored", "routed"):
            R = [o["R"][protocol] for o in outs]
            lost = [o["forgetting"][protocol][t] for o in outs]
            columns = [[o["base"][t] for o in outs], [r[i][i] for r in R], [r[-1][i] for r in R], lost]
            lines.append([t, protocol, *map(spread, [*columns, home if protocol == "routed" else []])])
    print_table(f"mean and standard deviation over {len(outs)} runs", heads, lines)


DRIFT_REPORT = """
where {task} went: its inputs moved by {moved:.2f} (they were {spread:.2f} from their mean); {inside_now:.1%}
of them are still in its region, {inside_at_commit:.1%} were at commit. How the lock held: L_lock is
{lock_loss:.1e} at its anchors, {top_k_kept:.1%} of their top-K choices are unchanged. A lock on the anchors
guards addresses; it holds neither the inputs to their addresses nor the bases that the addresses name."""


def print_report(results, lost):
    """Print what `report` in eval.py does. results: rows as `measure` makes them. lost: {protocol: {task: how
    much was forgotten, in percent}}."""
    row, tasks = results[-1], [*lost["stored"]]
    width = max(4, *map(len, tasks))
    print(f"\nvalidation perplexity after {row['task']} (version {row['version'][:12]})")
    print(f"{'task':{width}}  protocol      base  learned       now  forgetting")
    for t in tasks:
        learned = next(r for r in results if r["task"] == t)
        home, n = row["routing"][t].get(t, 0), sum(row["routing"][t].values())
        others = [k for r, k in row["inside"][t].items() if r != t]
        notes = {"stored": "logits bit-identical on {} of {} examples".format(*row["identical"][t])}
        notes["stored"] += ", as it has just been learned" * (learned is row)
        own, shared = row["inside"][t][t] / n, max(others, default=0) / n
        notes["routed"] = f"{100 * home / n:.1f} % routed to {t}; {100 * own:.0f} % lie in its region"
        notes["routed"] += f", {100 * shared:.0f} % in another's" if len(tasks) > 1 else ""
        for protocol, note in notes.items():
            figures = f"{row['base'][t]:8.3f} {learned[protocol][t]:8.3f}  {row[protocol][t]:8.3f}"
            print(f"{t:{width}}  {protocol}  {figures}  {lost[protocol][t]:+8.2f} %  {note}")
    for t, g in row["gating"].items():
        choices = f"{g['sets']:.1f} different top-K choices in a layer over all its inputs"
        print(f"\n{t} makes {choices}, its weight lies on {g['bases']:.1f} bases")
    for t, d in row["drift"].items():
        print(DRIFT_REPORT.format(task=t, **d))


def exact_match(task, records, answers, wanted, show):
    """Count a task's records whose answer is the text that is trained, and print a line for each kind of
    instruction (a record's "kind"; a record without one counts under its task). -> {kind: [right, of]}

    answers: (text, who answered) of every record; wanted: what was trained. Print `show` of them."""
    kinds = collections.defaultdict(lambda: [0, 0])
    for i, (record, (text, who), trained) in enumerate(zip(records, answers, wanted)):
        right = text.strip() == trained.strip()
        count = kinds[record.get("kind", task)]
        count[0], count[1] = count[0] + right, count[1] + 1
        if i * show % len(records) < show:  # so many in all, at equal distances
            asked = record["instruction"] + (f" | {record['input']}" if record.get("input") else "")
            wrong = "" if right else f"   expected {trained!r}"
            print(f"[{who}] {asked}\n    {text!r}{wrong}")
    right, n = (sum(c) for c in zip(*kinds.values()))
    print(f"\n{task}: {right} of {n} answers exactly right ({100 * right / n:.1f} %), routed")
    for kind, (hits, of) in sorted(kinds.items(), key=lambda k: -k[1][0] / k[1][1]):
        print(f"  {kind:16} {hits:3} of {of:3}  {100 * hits / of:5.1f} %")
    return dict(kinds)
