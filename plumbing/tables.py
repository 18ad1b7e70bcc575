"""Print tables of text: means with deviations, in columns as wide as they must be."""

import statistics


def spread(values, digits=3):
    """Mean and standard deviation of values as text. None among them is left out; no value gives no text."""
    values = [v for v in values if v is not None]
    text = f"{statistics.mean(values):.{digits}f}" if values else ""
    return text + (f" ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def print_table(title, heads, lines):
    """Print a title, then heads and lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *lines)]
    print(f"\n{title}")
    for first, *others in [heads, *lines]:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]))


def table_over_runs(outs):
    """Yield the lines of a table over several runs of the same tasks: mean and standard deviation."""
    over = lambda values: f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    heads = ("base", "learned", "now", "forgetting %", "routed home %")
    yield f"{'task':8}  protocol" + "".join(f"  {head:>16}" for head in heads)
    for i, t in enumerate(outs[0]["tasks"]):
        for protocol in ("stored", "routed"):
            R = [o["R"][protocol] for o in outs]
            columns = [
                [o["base"][t] for o in outs],
                [r[i][i] for r in R],
                [r[-1][i] for r in R],
                [o["forgetting"][protocol][t] for o in outs],
            ]
            if protocol == "routed":
                columns.append([100 * o["routing"][t][t] / sum(o["routing"][t].values()) for o in outs])
            yield f"{t:8}  {protocol}" + "".join(f"  {over(column):>16}" for column in columns)
