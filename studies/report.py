"""The pages of results. Nothing is computed again: all is made of studies/results/*.json.

    python -m studies.report      # writes studies/results/*.md, whole, and the tables of the README

A page is a text of studies/pages, written by hand. {a name} in it stands for a figure, see studies/names.py,
and a line {{KIND FILE ...}} for a table of files of results, of a kind of TABLES or COLUMNS.
"""

import contextlib
import io
import json
import pathlib
import re
import statistics
import types

from eval import report
from plumbing import Refused
from plumbing.command import Parser, run_program
from plumbing.files import atomic
from studies.tables import without_empty
from studies.architectures import VERDICTS
from studies.likelier import accuracies, few_lines, routers
from studies.memory import TABLE_2, memory_lines
from studies.names import PAGES, QUANTITIES, fill, grouped, of_method, over, pair
from studies.support import SIZES
from studies.tables import PUBLISHED, decomposition

HOME = pathlib.Path(__file__).resolve().parent.parent
RESULTS = HOME / "studies" / "results"


def read_results(name):
    """A file of results, by its name there or its path. Raises Refused if it is none."""
    path = name if isinstance(name, pathlib.Path) else RESULTS / f"{name}.json"
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise Refused(f"{path}: no file of results, or cut short") from None
    if not isinstance(content, dict) or not {"command", "date", "machine", "torch", "rows"} <= {*content}:
        raise Refused(f"{path}: not a file of results")
    return content


@contextlib.contextmanager
def naming(*names):
    """Raise Refused in place of the error inside: a file's rows are not what its command writes."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        files = ", ".join(map(str, names))
        raise Refused(f"{files}: not what its command writes ({type(e).__name__} {e})") from None


# ------------------------------------------------------------------------------------------------- tables


def table(heads, lines):
    """Lines of Markdown."""
    return ["| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines]]


COLUMNS = {  # tables with a line a row and these quantities, means over its seeds
    "two-tasks": "learned kept routed B B-routed home-A home-B trained size",
    "one-task": "nats learned trained choices bases inside",
    "locked": "forgotten forgotten-routed lock-loss top-k moved inside-then inside-now",
    "found": "bare named routed-home found-1 found-16",
    "scores": "score fm score-stored fm-stored overlap parameters outputs",
    **{
        f"{way}-labels": " ".join(f"{way}-{what}-{n}" for what in ("found", "score") for n in SIZES)
        for way in ("search", "recall")
    },
    "stream": "bare-ms routed-ms lost lost-routed home",
}


def rows_table(kind, contents):
    """The rows of all files in one table, without empty columns; beside FTN's the paper's score and FM."""
    names, lines = COLUMNS[kind].split(), []
    rows = [item for content in contents for item in grouped(content["rows"]).items()]
    for row, seeds in rows if kind != "stream" else [*rows[:3], *rows[11::12], rows[-1]]:
        cells = [[QUANTITIES[name][2](seed) for seed in seeds] for name in names]
        cells = [cell[:1] if name in ("trained", "size") else cell for name, cell in zip(names, cells)]
        cells = [over(cell, QUANTITIES[name][1]) for name, cell in zip(names, cells)]
        if not any(cells):
            continue
        paper = PUBLISHED[seeds[0]["variant"]].get(row.split()[1], ("", "")) if kind == "scores" else ()
        lines.append([row, str(len(seeds)), *cells, *paper])
    heads = ["", "seeds", *(QUANTITIES[name][0] for name in names)]
    return table(*without_empty([*heads, "paper: score", "FM"] if kind == "scores" else heads, lines))


def counted(content):
    """rows of studies.memory: the parts of a training's memory, in GiB, with 1, 2 and 4 devices."""
    lines, printed = [], {} if "--backbone" in content["command"] else TABLE_2  # of Mistral, in GB
    for part, sizes in memory_lines(content["rows"]).items():
        paper = f"{printed[part] * 1e9 / 2**30:.2f}" if printed.get(part) else ""
        lines.append([part, *(f"{size / 2**30:.2f}" for size in sizes), paper])
    heads = ["GiB", "task 1", "checkpointing", "task 2", "checkpointing", "the paper, task 1"]
    return table(heads, lines)


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
    """rows {what: {side: {"seconds": one a repeat}}} of bench.py: medians, least and most."""
    lines, sides = [], ("ours", "peft", "bare")
    for what, found in content["rows"].items():
        ms = [sorted(1000 * s for s in found[side]["seconds"]) for side in sides]
        line = [f"{statistics.median(x):.1f} ({x[0]:.1f}-{x[-1]:.1f})" for x in ms]
        ours, peft, bare = map(statistics.median, ms)
        memory = [found[side]["peak memory"] for side in sides[:2]]
        lines.append([what, str(len(ms[0])), *line, f"{ours / peft:.2f}", f"{ours / bare:.2f}", *memory])
    heads = "ms, median (least-most)|repeats|ours|peft|bare backbone|ours / peft|ours / bare"
    return table([*heads.split("|"), "peak memory, ours", "peft"], lines)


def depths(content):
    """rows of studies.depths: the share of prompts that is routed home, by layer and h_bar."""
    rows = {(row["m"], row["h_bar"]): row["home"] for row in content["rows"]}
    kinds = list(dict.fromkeys(kind for _, kind in rows))
    cell = lambda m, kind: over([100 * statistics.mean(tasks) for tasks in rows.get((m, kind), [])], 1)
    shown = [m for m in dict.fromkeys(m for m, _ in rows) if m in (1, 3, 30) or m % 5 == 0]
    lines = [[str(m), *(cell(m, kind) for kind in kinds)] for m in shown]
    return table(["m", *(f"{kind}, %" for kind in kinds)], lines)


def decomposed(content):
    """rows of synthetic.py: FTN Table 4."""
    groups, lines = {}, []
    for row in content["rows"]:
        groups.setdefault(row["variant"], []).append(row)
    for variant, group in groups.items():
        for method, losses in decomposition(group).items():
            cells = [over(column, 3) for column in zip(*losses)]
            lines.append([f"{variant} {method}", str(len(losses)), *cells])
    return table(["", "seeds", "lost by overlap", "lost in recall"], lines)


STYLES = "upper", "lower", "reverse", "double", "starred", "pirate"


def overlaps(content):
    """rows of synthetic.py --experiment 2: FTN Table 5, means over seeds."""
    rows, n = of_method(content["rows"], "lora-ftn", "style"), range(len(STYLES))
    line = lambda i: [over(pair(rows, i, j), 2) if i < j else "" for j in n]
    return table(["", *STYLES], [[STYLES[i], *line(i)] for i in n])


def quick_start(content):
    """rows {name: a dict a seed} of variants.py: what train.py prints of the first task after the second,
    without a lock and with the exact one."""
    free, locked = (last_table(content["rows"][name][0]) for name in ("one pass, no lock", "one pass"))
    return ["```", "no lock", *free[1:3], "--lock", *locked[1:3], "```"]


def last_table(row):
    """The lines that train.py prints at the end, from what was published of a run folder."""
    results = [{"task": task} for task in row["tasks"]]
    for i, result in enumerate(results):
        for protocol in ("stored", "routed"):
            result[protocol] = dict(zip(row["tasks"][: i + 1], row["R"][protocol][i]))
    results[-1] |= {key: row[key] for key in ("base", "routing", "inside", "identical")}
    results[-1] |= {"version": "", "gating": {}, "drift": {}}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        report(types.SimpleNamespace(manifest={"results": results}))
    return out.getvalue().strip().splitlines()[1:]


def answers(content):
    """rows of studies.answers: commands and what they print."""
    said = lambda row: [f"$ {row['command']}", re.sub("\n+", "\n", row["printed"])]
    return ["```", *(line for row in content["rows"] for line in said(row)), "```"]


KINDS = counted, families, timings, depths, decomposed, overlaps, answers, quick_start
TABLES = {draw.__name__.replace("_", "-"): draw for draw in KINDS}  # tables of one file each
rate = lambda command: (re.search(r"--lr (\S+)", command) or ["", ""])[1]
rows_of = lambda files: [row | {"rate": rate(file["command"])} for file in files for row in file["rows"]]
TABLES["sequence"] = lambda *files: table(*accuracies(rows_of(files)))  # rows of studies.sequence
TABLES["routed"] = lambda *files: table(*routers(rows_of(files)))
TABLES["kinds"] = lambda content: table(*few_lines(3, content["rows"]))  # rows of studies.found
TABLES["tasks"] = lambda content: table(*few_lines(1, content["rows"]))


# ------------------------------------------------------------------------------------------------- pages


class Reader:
    """Files of results, each read once."""

    def __init__(self):
        self.files = {}

    def __call__(self, name):
        """The rows of a file."""
        self.files[name] = self.files.get(name) or read_results(name)
        return self.files[name]["rows"]

    def drawn(self, kind, *names):
        """The lines of a table of files of results."""
        with naming(*(RESULTS / f"{name}.json" for name in names)):
            contents = [self.files[name] for name in names if self(name)]
            return rows_table(kind, contents) if kind in COLUMNS else TABLES[kind](*contents)

    def page(self, text):
        """A text of studies/pages with its tables and figures in it; below a table stand its files."""

        def made(match):
            kind, *names = match[1].split()
            files = ", ".join(f"[{name}]({name}.json)" for name in names)
            return "\n".join([*self.drawn(kind, *names), *([f"\nFiles: {files}."] if files else [])])

        with naming(RESULTS / "*.json"):
            return fill(re.sub(r"\{\{(.+)\}\}", made, text), self)


def commands():
    """A line a file: how it was made."""
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        content = read_results(path.stem)
        machine = f"{content['machine']}, torch {content['torch']}"
        known = (content[key] for key in ("processor", "kernels") if key in content)
        processor, threads = ", ".join(known) or "not recorded", str(content.get("threads", ""))
        made = [content["date"][:10], (content.get("git") or "")[:7], machine, processor, threads]
        lines.append([f"[{path.stem}]({path.name})", f"`{content['command']}`", *made])
    heads = ["file", "command", "date", "revision", "machine", "processor, kernels", "threads"]
    return table(heads, lines)


def results_pages(reader):
    """{path: text} of the pages in studies/results. Raises Refused if a file is no file of results."""
    texts = {path: path.read_text("utf-8") for path in sorted(PAGES.glob("*.md"))}
    pages = {
        RESULTS / path.name: reader.page(text)
        for path, text in texts.items()
        if not path.stem.startswith("readme-")
    }
    pages[RESULTS / "commands.md"] += "\n".join(commands()) + "\n"
    return pages


def with_blocks(text, reader):
    """A README with what stands between `<!-- PART -->` and `<!-- end -->` made again. A part is `KIND FILE`,
    a table of a file of results, or `NAME`, the text studies/pages/readme-NAME.md."""

    def made(block):
        begin, part, names, end = block.groups()
        if names:
            return "\n".join([begin, *reader.drawn(part, *names.split()), end])
        return "\n".join([begin, reader.page((PAGES / f"readme-{part}.md").read_text("utf-8")).strip(), end])

    return re.sub(r"(<!-- ([\w-]+) ?(.*?) ?-->)\n.*?(<!-- end -->)", made, text, flags=re.DOTALL)


def main(argv=None):
    Parser(__doc__, prog="report.py").parse_args(argv)
    reader = Reader()
    pages = results_pages(reader)
    pages[HOME / "README.md"] = with_blocks((HOME / "README.md").read_text("utf-8"), reader)
    for path, text in pages.items():
        with atomic(path) as tmp:
            tmp.write_text(text, "utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    run_program(main)
