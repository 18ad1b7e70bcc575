"""Embedded data, pictures, files of results, and the pages that are made of them."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
import torch

import synthetic
from plumbing import Refused
from plumbing.records import read_records
from studies import architectures, names, pictures, report, variants
from tests.builders import HERE, micro_model, random_examples, random_gating, refused, rows_in, run_quietly
from tests.builders import tiny_tokenizer

DATA = HERE / "assets" / "data"


@pytest.mark.parametrize("task", ["alpaca", "code"])
def test_embedded_sets_are_what_the_readme_says(task):
    """The embedded data has 4,000 training and 400 validation records or more, which share no prompt."""
    sets = {side: read_records(DATA / f"{task}.{side}.json") for side in ("train", "val")}
    train, val = ({(r["instruction"], r["input"]) for r in records} for records in sets.values())
    assert len(train) >= 4000 and len(val) >= 400 and not train & val
    kinds = [{r["kind"] for r in records} for records in sets.values()]
    assert len(kinds[0]) >= 25 and kinds[0] == kinds[1]
    files = [p for part in ("tiny", "data") for p in (HERE / "assets" / part).rglob("*")]
    assert sum(p.stat().st_size for p in files if p.is_file()) <= 6e6


def test_the_tiny_tokenizer_gives_back_any_text():
    """The tiny tokenizer gives back any text as it was, with its spaces, line ends and rare characters."""
    tokenizer = tiny_tokenizer()
    for text in ("def f(x):\n    return  x", "naïve 漢字 🙂\r\n\t", " two  spaces ", "### Instruction:\n"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_rows_that_train_differently_have_run_folders_of_their_own():
    """Only rows that are trained alike, and measured in several ways, share a run folder."""
    for table, rows in variants.TABLES.items():
        args, shared = argparse.Namespace(table=table, out="runs"), {}
        for row in (row for row in rows.values() if not row.lr):
            trained = dataclasses.replace(row, sums=None, words=False)
            assert shared.setdefault(variants.folder_of(row, 0, args), trained) == trained


def test_pictures_are_drawn_or_say_what_is_missing(tmp_path, monkeypatch, capsys):
    """Pictures are drawn from files of results, or a line says why not, and no stranger's file is lost."""
    monkeypatch.chdir(tmp_path)
    small = ["--variant", "clf", "--methods", "ftn-slow", "--tasks", "2", "--steps", "1"]
    synthetic.main([*small, "--json", "out.json"])
    with monkeypatch.context() as m:
        m.setattr(pictures, "matplotlib", None)
        with refused("pip install matplotlib"):
            pictures.main(["out.json"])
    pytest.importorskip("matplotlib")
    pictures.main(["out.json", "--to", "."])
    assert all(pathlib.Path(f"ftn-{kind}-clf.png").stat().st_size > 1000 for kind in ("masks", "curves"))
    pathlib.Path("ftn-masks-clf.png").write_text("mine")
    assert "no PNG" in run_quietly(pictures.main, ["out.json", "--to", "."], capsys)
    assert pathlib.Path("ftn-masks-clf.png").read_text() == "mine"
    for text in ("", "null", '{"rows": []}', "[" * 100_000, pathlib.Path("out.json").read_text()[:-9]):
        pathlib.Path("lie.json").write_text(text)
        assert "lie.json" in run_quietly(pictures.main, ["lie.json", "--to", "new"], capsys)
    draw = pictures.plt.Figure.savefig  # coarsely: every artist is drawn all the same
    coarse = lambda figure, *where, **how: draw(figure, *where, **how | {"dpi": 10})
    with monkeypatch.context() as m:
        m.setattr(pictures.plt.Figure, "savefig", coarse)
        pictures.main(["--to", "all"])
    shown = "".join(path.read_text("utf-8") for path in [*report.RESULTS.glob("*.md"), HERE / "README.md"])
    drawn = {path.name for path in pathlib.Path("all").iterdir()}
    kept = {path.name for path in (HERE / "assets").glob("*.png")}
    assert drawn == kept == {*re.findall(r"[\w-]+\.png", shown)}


def test_the_table_of_architectures_judges_each_family(tmp_path, capsys):
    """One family works, one is refused as it takes no mask, and a third name is none."""
    pytest.importorskip("peft")
    architectures.main(["--only", "gpt2", "rwkv", "--json", str(tmp_path / "out.json")])
    rows = rows_in(tmp_path / "out.json")
    assert [row["verdict"] for row in rows] == ["right", "refused"], rows
    assert rows[0]["share"] == 0.5 and all(rows[0][name] <= 1 for name in architectures.CHECKS)
    assert "1 right, 0 in part, 1 refused, 0 wrong, 0 not built" in capsys.readouterr().out
    assert "no causal language model" in run_quietly(architectures.main, ["--only", "gpt5"], capsys)


CHOOSE = ["--data", *(DATA / f"{task}.choose.json" for task in ("alpaca", "code"))]
FEW_EXAMPLES = "--examples 40 --val-examples 16 --batch 8 --grad-accum 1 --lr 0.02 --device cpu".split()


def run_variants(table, rows, micro, tmp_path, data=CHOOSE):
    """Train rows of a table on few examples. Return {name: what is written of the one seed}."""
    argv = [table, "--backbone", micro.folder, *data, "--out", tmp_path / "v", "--seeds", 0]
    argv = [*argv, "--json", tmp_path / "v.json", "--rows", *rows, *FEW_EXAMPLES]
    variants.main([str(x) for x in argv])
    return {name: row for name, (row,) in rows_in(tmp_path / "v.json").items()}


def test_every_variant_is_another_training(micro, tmp_path, capsys):
    """Each patched row of a table trains to a loss of its own, and a second call trains nothing again."""
    rows = ["NIWF, N 16, K 8", *(name for name, row in variants.CHOICES.items() if row.patch)]
    found = run_variants("choose", rows, micro, tmp_path, CHOOSE[:2])
    losses = [found[name]["R"]["stored"][0][0] for name in rows]
    assert len({*losses}) == len(rows) and len(rows) > 5, found
    again = run_variants("choose", rows, micro, tmp_path, CHOOSE[:2])  # nothing is trained again
    assert again == found and "nothing to train" in capsys.readouterr().out
    assert "no such" in run_quietly(variants.main, ["choose", "--rows", "no such"], capsys)


OTHERS = {  # rows that differ by a patch alone from the one before them, or from the first
    "choose-passes": ["two passes", "read, then write", "one pass", "one pass, mean alone"]
    + ["one pass, d 64", "one pass, d 64, aimed"],
    "worth": ["NIWF, N 16, K 8", "fixed z, N 16, K 8", "random dynamics"],
    "ablations": ["exact lock", "dense gating", "soft lock", "soft, anchors a sample"],
}


@pytest.mark.parametrize("table", OTHERS)
def test_every_patch_of_a_table_changes_what_is_learned(micro, tmp_path, table):
    """No row of a table is another one under a second name."""
    data = CHOOSE if table == "ablations" else CHOOSE[:2]  # two tasks, or one
    found = run_variants(table, OTHERS[table], micro, tmp_path, data)
    losses = [tuple(map(tuple, row["R"]["stored"])) for row in found.values()]
    assert len({*losses}) == len(OTHERS[table]), found


@torch.no_grad()
def test_read_then_write_adapts_from_the_last_token_of_the_prompt_on(double):
    """The rest of the prompt is read by the bare model, whose keys and values are kept."""
    with variants.patched("read, then write"):
        model = micro_model(dtype=torch.float64)
        gating, examples = random_gating(4, model.bank.layers, 6), random_examples(4)
        found, _ = model.logits(examples, gating)
    model.detach()
    model = micro_model(dtype=torch.float64)
    for i, (prompt, response) in enumerate(examples):
        read = model.backbone(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
        with model.gated([part[i : i + 1] for part in gating]):
            ids = torch.tensor([[prompt[-1], *response[:-1]]])
            written = model.backbone(ids, past_key_values=read).logits[0]
        torch.testing.assert_close(found[i, -len(response) :], written)


def test_two_task_rows_keep_or_lose_what_they_must(micro, tmp_path):
    """Every record of a task has the same answer, so what is learned of one is learned of all."""
    data = [tmp_path / f"{task}.json" for task in ("alpaca", "code")]
    for path, source, answer in zip(data, CHOOSE[1:], ("Hello.", "Bye.")):
        path.write_text(json.dumps([r | {"output": answer} for r in read_records(source)[:100]]))
    rows = ["LoRA r 64, one", "full fine-tuning", "LoRA r 64, one a task", "NIWF, exact lock"]
    found = run_variants("baselines", rows, micro, tmp_path, ["--data", *data])
    for name in rows:
        (learned, _), (now, code) = found[name]["R"]["stored"]
        assert (learned == now) == (name not in rows[:2]), name  # nothing holds the first two
        assert learned < found[name]["base"]["alpaca"] and code < found[name]["base"]["code"]
    assert found["LoRA r 64, one a task"]["kept parameters"] > found["LoRA r 64, one"]["kept parameters"]


def test_variants_remove_nothing_and_refuse_a_damaged_row(micro, tmp_path, capsys):
    """A study removes no file that it did not make, and refuses a damaged row by its name."""
    place = tmp_path / "v" / "publish" / "0"
    mine = place / "then---lock-exact.part" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    run_variants("baselines", ["NIWF, exact lock", "full fine-tuning"], micro, tmp_path)
    made = {"default", "fine-tuning-0-0001", "then---lock-exact"}
    assert mine.read_text() == "mine" and {p.name for p in place.iterdir()} == made | {mine.parent.name}
    kept = place / "fine-tuning-0-0001"
    kept.write_bytes(kept.read_bytes()[:-9])
    with refused("fine-tuning-0-0001 is damaged", place):
        run_variants("baselines", ["full fine-tuning"], micro, tmp_path)


def test_what_a_soft_lock_freezes_does_not_move(micro, tmp_path):
    """A part that a row of the soft lock's table freezes does not move, and every other part does."""
    found = run_variants("soft-lock", [*variants.SOFT_LOCK], micro, tmp_path)
    for name in variants.SOFT_LOCK:
        drift, ((before, _), (now, _)) = found[name]["drift"]["alpaca"], found[name]["R"]["stored"]
        assert ("dynamics" in name) == (drift["moved"] == 0), name
        assert ("field" in name) == (drift["lock_loss"] == 0), name
        if name in ("nothing frozen", "bases and field frozen"):
            assert (now == before) == ("field" in name)  # stored: what has become of field and bases


def test_what_else_keeps_a_task_is_trained_and_asked_as_it_says(micro, tmp_path, monkeypatch):
    """Rows with replay train on more records, and rows that sum LoRAs are asked without any routing."""
    few = tmp_path / "data"  # each training reads and checks all records
    few.mkdir()
    for task, part in itertools.product(("alpaca", "code"), ("train", "val", "choose")):
        records = json.loads((DATA / f"{task}.{part}.json").read_text())
        (few / f"{task}.{part}.json").write_text(json.dumps(records[:100]))
    monkeypatch.setattr(variants, "DATA", few)
    rows = ["one, replay of 5 %", "one, EWC 10000", "O-LoRA, 0.5", "mean of one a task"]
    found = run_variants("fair", rows, micro, tmp_path, data=[])
    sizes = {name: row["config"]["code"]["examples"] for name, row in found.items()}
    assert sizes == dict.fromkeys(rows, 40) | {rows[0]: 42}
    assert len({row["R"]["stored"][0][0] for row in found.values()}) == 1  # the first task is the same
    assert [name for name in rows if "routing" not in found[name]] == rows[2:]
    mean = found[rows[3]]["R"]
    assert mean["stored"][1] == mean["routed"][1] != mean["stored"][0]


def tables_of_pages():
    """Return (kind, names of files) of every table on a page of results and in the README."""
    texts = [path.read_text("utf-8") for path in names.PAGES.glob("*.md")]
    found = re.findall(r"^\{\{(\S+) (.+)\}\}$", "\n".join(texts), re.MULTILINE)
    found += re.findall(r"^<!-- (\S+) (\S+) -->$", (HERE / "README.md").read_text("utf-8"), re.MULTILINE)
    return [(kind, files.split()) for kind, files in found]


def test_pages_are_what_the_files_of_results_say():
    """The pages of results and the README's blocks are up to date, and use every file of results."""
    reader = report.Reader()
    for path, text in report.results_pages(reader).items():
        assert path.read_text("utf-8") == text, path
    text = (HERE / "README.md").read_text("utf-8")
    assert report.with_blocks(text, reader) == text and text.count("<!-- end -->") == 4
    assert {*reader.files} == {path.stem for path in report.RESULTS.glob("*.json")}  # no result is kept back


def test_every_name_is_used_by_a_page():
    """Every name, column and kind of table that is defined for the pages of results is used there."""
    text = "".join(path.read_text("utf-8") for path in names.PAGES.glob("*.md"))
    said = {*re.findall(r"[\w.-]+", " ".join(re.findall(r"\{([^{}\n]+)\}", text)))}
    assert {*names.OTHERS} | {*names.FUNCTIONS} <= said
    assert {*names.ROWS} <= {name.rpartition(".")[0] for name in said}
    columns = {column for columns in report.COLUMNS.values() for column in columns.split()}
    assert {*names.QUANTITIES} <= columns | {name.rpartition(".")[2] for name in said}
    assert {*report.TABLES} | {*report.COLUMNS} == {kind for kind, _ in tables_of_pages()}


def test_a_figure_is_measured_and_not_typed():
    """Prose may hold figures of the papers, without a nought before the point; the column of a table that
    says what a paper says may hold any."""
    measured = r"(?<![-\w])\d+\s*%|(?<![-\w])\d\.\d\d"
    for path in names.PAGES.glob("*.md"):
        text = re.sub(r"\{[^\n]*?\}+|`[^`]*`|\]\([^)]*\)", "", path.read_text("utf-8"))
        for line in text.splitlines():
            cells = line.split("|")
            ours = "|".join(cells[3:]) if len(cells) > 3 else line
            assert not re.search(measured, ours), line


def test_the_page_of_results_answers_in_two_minutes():
    """The page of results is short, links each of its ten findings, and gives every claim a known verdict."""
    text = (report.RESULTS / "README.md").read_text("utf-8")
    assert words_of(text) <= 1700
    first, findings, claims = re.split(r"^## .*$", text, flags=re.MULTILINE)
    assert first.count("\n|") == 2 + 8 and words_of(first) <= 330  # a screen: the answer and eight rows
    found = re.findall(r"^\d+\. (.*)$", findings, re.MULTILINE)
    assert len(found) == 10 and findings.count("![") <= 1
    assert all(re.search(r"\*\*[\d.]+[^*]*\*\*.*\]\(\w+\.md#[\w-]+\)\)\.$", line) for line in found)
    assert all(line.count("**") == 2 for line in found)  # one figure stands out in each
    rows = re.findall(r"^\| (?!---|NIWF |FTN \|)(.*) \|$", claims, re.MULTILINE)
    words = {row.split(" | ")[-1] for row in rows}
    assert words <= {"holds", "partly", "fails", "better", "open"}
    assert all(f"**{w}**" in claims.lower() for w in words)
    assert all(row.split(" | ")[-1] == "open" for row in rows if row.split(" | ")[-2] == "1")
    tests = "".join(p.read_text("utf-8") for p in [HERE / "test_all.py", *(HERE / "tests").glob("*.py")])
    for name in re.findall(r"`pytest test_all.py -k (\w+)`", text):
        assert re.search(rf"^def test_\w*{name}", tests, re.MULTILINE), name


def words_of(text):
    """Count the words that a reader reads: what has a letter or a digit, without the targets of links."""
    return sum(bool(re.search(r"\w", word)) for word in re.sub(r"\]\([^)]*\)", "]", text).split())


def test_a_verdict_follows_the_rule():
    """A claim holds if all seeds meet it, fails if none does, and is open if there is a single seed."""
    rows = {"good": [1.0, 2.0, 3.0], "bad": [4.0, 5.0, 6.0], "mixed": [0.0, 9.0, 0.0], "one": [7.0]}
    read = lambda name: {"rows": {key: {"x": value} for key, value in rows.items()}}[name]
    name = lambda key: f"rows/{key}/x"
    said = lambda claim: names.verdict(re.sub(r"[a-z]{3,}(?= [<>=~]|$)", lambda m: name(m[0]), claim), read)
    assert said("good < 4") == said("good <= 3 and bad > 3") == said("bad > good") == "holds"
    assert said("mixed < good") == said("good < 4 and bad < 4") == "partly"
    assert said("good > 3") == said("bad < good") == "fails"
    assert said("bad ~ 3.1") == "holds" and said("bad ~ 2.9") == "fails"  # two deviations
    assert said("one < 9") == said("one > 9") == "open"
    assert [names.verdict(f"{name('one')} = {x}", read) for x in (7, 8)] == ["holds", "fails"]
    assert names.verdict(f"{name('good')} < 4 : better", read) == "better"
    with pytest.raises(ValueError):
        said("one < good")  # not as many seeds


def test_rows_of_one_table_were_measured_on_the_same_items():
    """Rows of a table share the bare model's perplexity for a seed and task, so they can be compared."""
    for kind, files in tables_of_pages():
        if kind in ("one-task", "two-tasks"):
            rows = [row for name in files for row in report.read_results(name)["rows"].values()]
            runs = [(i, x) for row in rows for i, x in enumerate(row)]
            bases = {(i, task, x["base"][task]) for i, x in runs for task in x["tasks"]}
            assert len(bases) == len({(i, task) for i, task, _ in bases}), files


@pytest.mark.skipif(os.name != "posix" or not shutil.which("bash"), reason="no bash here")
def test_remake_runs_the_commands_that_results_name(tmp_path):
    """`studies/remake` runs exactly the commands that files of results name, so all can be made again."""
    python = tmp_path / "python"  # writes down how it is called
    python.write_text('#!/usr/bin/env bash\nprintf "%q " python "$@" >> called\necho >> called\n')
    python.chmod(0o755)
    (tmp_path / "runs" / "compose").mkdir(parents=True)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    script = ["bash", HERE / "studies" / "remake", "SmolLM2-135M", "alpaca.json", "code_alpaca.json"]
    subprocess.run([*script, "sequence"], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True)

    def named(command):  # the file, and the rest but --workers, which no result depends on
        before, name, after = re.fullmatch(r"(.*)--json studies/results/(\S+)\.json ?(.*)", command).groups()
        return name, shlex.split(re.sub(r"--workers \d+ ", "", before + after))

    called = (tmp_path / "called").read_text().splitlines()
    made = dict(named(command) for command in called if "--json" in command)
    published = [report.read_results(path.stem) for path in report.RESULTS.glob("*.json")]
    assert made == dict(named(content["command"]) for content in published)


def test_a_file_of_results_with_other_rows_is_refused_by_name(tmp_path, monkeypatch):
    """A file of results whose rows have another shape is refused by its name, without a traceback."""
    damaged = {}
    for kind, name in ((kind, name) for kind, files in tables_of_pages() for name in files):
        content = report.read_results(name)
        rows = content["rows"]
        first = next(iter(rows)) if isinstance(rows, dict) else 0
        others = [1, None, [{}], [[]], {"x": [{}]}, {"x": 1}]
        others += [dict(rows, **{first: None})] if isinstance(rows, dict) else [[None, *rows]]
        good = report.Reader().drawn(kind, name)
        damaged[name] = kind, good, [dict(content, rows=other) for other in others]
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for name, (kind, good, contents) in damaged.items():
        for content in contents:
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
            with contextlib.suppress(Refused):  # nothing else is raised; a table without lines is one
                found = report.Reader().drawn(kind, name)
                assert len(found) == 2 or found == good  # or the row is none of those that it shows
        (tmp_path / f"{name}.json").write_text(json.dumps(contents[0]))
        with pytest.raises(Refused, match=f"{name}.json: not what"):
            report.Reader().drawn(kind, name)


@pytest.mark.parametrize("program, name, rows", [(report, "baselines", {}), (pictures, "regions", [{}])])
def test_a_damaged_file_of_results_is_one_line(program, name, rows, tmp_path, monkeypatch):
    """A damaged file of results is refused in one line, also as one of many of a page or a picture."""
    results = shutil.copytree(report.RESULTS, tmp_path / "results")
    damaged = json.dumps(report.read_results(f"tiny-{name}") | {"rows": rows})
    (results / f"tiny-{name}.json").write_text(damaged)
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "HOME", tmp_path)
    argv = []
    if program is pictures:
        pytest.importorskip("matplotlib")
        argv = ["--to", str(tmp_path / "new")]
        monkeypatch.setattr(pictures, "draw_ftn", lambda *_: None)
    with refused("not what its command writes", results):
        program.main(argv)
