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
