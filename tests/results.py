"""Embedded data, figures, files of results, and the page that is made of them."""

import os
import contextlib
import dataclasses
import json
import math
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
import transformers

import synthetic
from plumbing import Refused
from plumbing.backbone import TINY_FOLDER
from plumbing.records import read_records

HERE = pathlib.Path(__file__).parent.parent
from studies import architectures, report
from studies import variants
from studies.neurons import StudyRow
from tests.builders import run_quietly


try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None


@pytest.mark.parametrize("task", ["alpaca", "code"])
def test_embedded_sets_are_what_the_readme_says(task):
    sets = {side: read_records(HERE / "assets" / "data" / f"{task}.{side}.json") for side in ("train", "val")}
    prompts = {side: {(r["instruction"], r["input"]) for r in records} for side, records in sets.items()}
    assert (
        len(prompts["train"]) >= 4000 and len(prompts["val"]) >= 400 and not prompts["train"] & prompts["val"]
    )
    assert len({r["kind"] for r in sets["val"]}) >= 25 and {r["kind"] for r in sets["val"]} == {
        r["kind"] for r in sets["train"]
    }


def test_everything_embedded_takes_at_most_6_mb():
    assert (
        sum(
            p.stat().st_size
            for part in ("tiny", "data")
            for p in (HERE / "assets" / part).rglob("*")
            if p.is_file()
        )
        <= 6e6
    )


def test_the_tiny_tokenizer_gives_back_any_text():
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_FOLDER)
    for text in (
        "def f(x):\n    return  x",
        "naïve café 漢字 🙂\r\n\t",
        " two  spaces ",
        "### Instruction:\n",
    ):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_figures_are_drawn_or_say_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    synthetic.main(["--variant", "clf", "--methods", "ftn-slow", "--steps", "2", "--json", "out.json"])
    with monkeypatch.context() as m:
        m.setattr(report, "matplotlib", None)
        with pytest.raises(Refused, match="pip install matplotlib"):
            report.main(["--figures", "out.json"])
    pytest.importorskip("matplotlib")
    report.main(["--figures", "out.json", "--to", "."])
    assert all(pathlib.Path(f"ftn-{kind}-clf.png").stat().st_size > 1000 for kind in ("masks", "curves"))
    pathlib.Path("ftn-masks-clf.png").write_text("mine")
    assert "no PNG" in run_quietly(report.main, ["--figures", "out.json", "--to", "."], capsys)
    assert pathlib.Path("ftn-masks-clf.png").read_text() == "mine"
    report.main(["--figures", "--to", "all"])
    drawn = {path.stem for path in pathlib.Path("all").iterdir()}
    assert drawn == {path.stem for path in (HERE / "assets").glob("*.png")} == {*report.PICTURES}


def test_the_table_of_architectures_judges_each_family(tmp_path, capsys):
    """One that works, one that is refused as it takes no mask, and a name that is none."""
    pytest.importorskip("peft")
    architectures.main(["--only", "gpt2", "rwkv", "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["verdict"] for row in rows] == ["right", "refused"], rows
    assert rows[0]["share"] == 0.5 and all(rows[0][name] <= 1 for name in architectures.CHECKS)
    assert "1 right, 0 in part, 1 refused, 0 wrong, 0 not built" in capsys.readouterr().out
    assert "no causal language model" in run_quietly(architectures.main, ["--only", "gpt5"], capsys)


def test_the_losses_of_a_training_that_was_stopped_are_those_of_the_one_that_went_on(tmp_path):
    lines = [{"task": "a"}, *({"step": i, "lm": i} for i in (1, 2, 3)), {"task": "a", "start": 2}]
    lines += [{"step": 3, "lm": 0.30004}, {"task": "b"}, {"step": 1, "lm": 7}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert variants.training_losses(tmp_path / "log.jsonl") == {"a": [1, 2, 0.3], "b": [7]}


def test_a_claim_is_shown_by_a_test_or_by_a_file_of_results():
    rows = lambda name: report.read_results(name)["rows"]
    claims = report.niwf_claims(rows) + report.ftn_claims(rows)
    assert {verdict for *_, verdict in claims} == {"holds", "fails", "partly", "open"}
    tests = [HERE / "test_all.py", *(HERE / "tests").glob("*.py")]
    here = "".join(path.read_text() for path in tests)
    for _, _, _, see, _ in claims:
        if see.startswith("`"):
            assert re.search(rf"^def test_\w*{see.strip('`').split()[-1]}", here, re.MULTILINE), see


RESULT_LIES = {
    "variant": (None, "x", [], 1),
    "method": ("x", "lora-ftn", None),
    "seed": (None, 0.5, True),
    "tasks": (None, 0, 10**12, "3", True),
    "steps": (-1, 1.5, 10**7),
    "search": (None, 1),
    "R_stored": (None, [], [[]], [[0.0]] * 3, [[math.nan], [0.0] * 2, [0.0] * 3]),
    "curve": (None, [None], {}, [], [{"step": 1000}], [{"step": "1", "stored": [0.5]}]),
    "final_side": (None, 10**9, -1),
    "winners": ([[0], [1], [4]], [[0], [1], [-1]], [[0]] * 2),
    "touched": ([1, 2], None),
    "overwritten": ([0.0], "abc"),
    "seconds": (None, 1e400),
}


def test_a_result_file_is_checked_whole_before_it_is_drawn(tmp_path, capsys):
    saved = json.loads((HERE / "studies" / "results" / "ftn-search-10.json").read_text())
    row = saved["rows"][0]
    row = dict(row, side=2, k=1, final_side=2, winners=[[0], [1], [2]], touched=[1, 1, 1])
    path = tmp_path / "lie.json"

    def refusal():
        argv = ["--figures", str(path), "--to", str(tmp_path / "to")]
        line = run_quietly(report.main, argv, capsys)
        assert [p.name for p in tmp_path.iterdir()] == ["lie.json"]
        return line

    lies = [(name, dict(row, **{name: value})) for name, values in RESULT_LIES.items() for value in values]
    computed = row.keys() - {f.name for f in dataclasses.fields(StudyRow)} - {"summary"}
    for gone in computed | {"variant", "method", "seed"}:
        lies.append((gone.replace("ms_per_step", "seconds"), {k: v for k, v in row.items() if k != gone}))
    for name, lie in lies:
        path.write_text(json.dumps({"rows": [row, lie]}))
        assert refusal().startswith(f"{path}: row 1: field {name} "), lie
    cut = json.dumps(saved)[:5000].encode()
    for text in (
        b"",
        b"null",
        b"[]",
        b'{"rows": []}',
        b'{"rows": {}}',
        b'{"rows": [null]}',
        b"\xff",
        cut,
        b"[" * 100_000,
    ):
        path.write_bytes(text)
        assert str(path) in refusal()


def test_rows_that_do_not_belong_together_are_not_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    row = json.loads((HERE / "studies" / "results" / "ftn-search-10.json").read_text())["rows"][0]
    row = dict(row, side=2, k=1, final_side=2, winners=[[0], [1], [2]], touched=[1, 1, 1])
    others = [(dict(row, seed=9, inputs="gaussian"), "inputs"), (row, "seed")]
    others.append((dict(row, seed=9, curve=row["curve"][1:]), "curve"))
    for other, name in others:
        (tmp_path / "lie.json").write_text(json.dumps({"rows": [row, other]}))
        argv = ["--figures", str(tmp_path / "lie.json"), "--to", str(tmp_path / "to")]
        assert name in run_quietly(report.main, argv, capsys)
        assert [p.name for p in tmp_path.iterdir()] == ["lie.json"]


FEW_EXAMPLES = "--examples 40 --val-examples 16 --batch 8 --grad-accum 1 --lr 0.02 --device cpu".split()


def run_variants(table, rows, micro, tmp_path, data):
    backbone = micro("alpaca", tmp_path)[3]
    argv = [table, "--backbone", backbone, "--data", *data, "--out", tmp_path / "v", "--seeds", 0]
    argv = [*argv, "--json", tmp_path / "v.json", "--rows", *rows, *FEW_EXAMPLES]
    variants.main([str(x) for x in argv])
    return json.loads((tmp_path / "v.json").read_text())["rows"]


def test_every_variant_is_another_training(micro, tmp_path, capsys):
    rows = ["NIWF, N 16, K 8", *(name for name, row in variants.CHOICES.items() if row.patch)]
    data = [HERE / "assets" / "data" / "alpaca.choose.json"]
    found = run_variants("choose", rows, micro, tmp_path, data)
    losses = [found[name][0]["R"]["stored"][0][0] for name in rows]
    assert len({*losses}) == len(rows) and len(rows) > 5, found
    again = run_variants("choose", rows, micro, tmp_path, data)  # nothing is trained again
    assert again == found and "nothing to train" in capsys.readouterr().out
    assert "no such" in run_quietly(variants.main, ["choose", "--rows", "no such"], capsys)


def test_two_task_rows_keep_or_lose_what_they_must(micro, tmp_path):
    """Every record of a task has the same answer, so what is learned of one is learned of all."""
    data = []
    for task, answer in (("alpaca", "Hello."), ("code", "Bye.")):
        records = read_records(HERE / "assets" / "data" / f"{task}.choose.json")[:100]
        data.append(tmp_path / f"{task}.json")
        data[-1].write_text(json.dumps([r | {"output": answer} for r in records]))
    rows = ["LoRA r 64, one", "full fine-tuning", "LoRA r 64, one a task", "NIWF, exact lock"]
    found = {name: made[0] for name, made in run_variants("baselines", rows, micro, tmp_path, data).items()}
    for name in rows:
        (learned, _), (now, code) = found[name]["R"]["stored"]
        assert (learned == now) == (name not in rows[:2]), name  # nothing holds the first two
        assert learned < found[name]["base"]["alpaca"] and code < found[name]["base"]["code"]
    assert found["LoRA r 64, one a task"]["kept parameters"] > found["LoRA r 64, one"]["kept parameters"]


def test_variants_remove_nothing_and_refuse_a_damaged_row(micro, tmp_path, capsys):
    data = [HERE / "assets" / "data" / f"{task}.choose.json" for task in ("alpaca", "code")]
    place = tmp_path / "v" / "publish" / "0"
    mine = place / "then---lock-exact.part" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    run_variants("baselines", ["NIWF, exact lock", "full fine-tuning"], micro, tmp_path, data)
    assert mine.read_text() == "mine" and {p.name for p in place.iterdir()} == {
        "default",
        "fine-tuning-0-0001",
        "then---lock-exact",
        "then---lock-exact.part",
    }
    kept = place / "fine-tuning-0-0001"
    kept.write_bytes(damaged := kept.read_bytes()[:-9])
    with pytest.raises(Refused, match="fine-tuning-0-0001 is damaged"):
        run_variants("baselines", ["full fine-tuning"], micro, tmp_path, data)
    assert kept.read_bytes() == damaged


def test_what_a_soft_lock_freezes_does_not_move(micro, tmp_path):
    data = [HERE / "assets" / "data" / f"{task}.choose.json" for task in ("alpaca", "code")]
    found = run_variants("soft-lock", list(variants.SOFT_LOCK), micro, tmp_path, data)
    drift = {name: made[0]["drift"]["alpaca"] for name, made in found.items()}
    R = {name: [row[0] for row in made[0]["R"]["stored"]] for name, made in found.items()}
    for name in variants.SOFT_LOCK:
        assert ("dynamics" in name) == (drift[name]["moved"] == 0), name
        assert ("field" in name) == (drift[name]["lock_loss"] == 0), name
    # Stored: the committed dynamics, and what has become of the field and the bases.
    assert R["bases and field frozen"][0] == R["bases and field frozen"][1]
    assert R["nothing frozen"][0] != R["nothing frozen"][1]


def test_tables_are_what_the_files_of_results_say():
    assert "\n\n".join(report.results_page()) + "\n" == (report.RESULTS / "README.md").read_text()
    text = (HERE / "README.md").read_text()
    assert report.with_tables(text) == text and text.count("<!-- end -->") == len(report.IN_README) > 1
    assert {*report.FINDINGS} <= {title for _, _, title, _ in report.SECTIONS}
    shown = {name for names, *_ in report.SECTIONS for name in names.split()}
    assert shown == {path.stem for path in report.RESULTS.glob("*.json")}  # no result is kept back


def test_rows_of_one_table_were_measured_on_the_same_items():
    for names, draw, *_ in report.SECTIONS:
        if draw in (report.one_task, report.two_tasks):
            rows = [row for name in names.split() for row in report.read_results(name)["rows"].values()]
            bases = {
                (i, task, x["base"][task]) for row in rows for i, x in enumerate(row) for task in x["tasks"]
            }
            assert len(bases) == len({(i, task) for i, task, _ in bases}), names


@pytest.mark.skipif(os.name != "posix" or not shutil.which("bash"), reason="no bash here")
def test_remake_runs_the_commands_that_the_files_of_results_name(tmp_path):
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
    damaged = {}
    for name, draw in ((name, draw) for names, draw, *_ in report.SECTIONS for name in names.split()):
        content = report.read_results(name)
        rows = content["rows"]
        first = next(iter(rows)) if isinstance(rows, dict) else 0
        others = [1, None, [{}], [[]], {"x": [{}]}, {"x": 1}]
        others += [dict(rows, **{first: None})] if isinstance(rows, dict) else [[None, *rows]]
        damaged[name] = draw, [dict(content, rows=other) for other in others]
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for name, (draw, contents) in damaged.items():
        for content in contents:
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
            with contextlib.suppress(Refused):  # nothing else is raised; a table without lines is one
                assert len(report.drawn(name, draw, report.read_results(name))) == 2
        with pytest.raises(Refused, match=f"{name}.json: not what"):
            report.drawn(name, draw, report.read_results(name))


@pytest.mark.parametrize("name, argv", [("baselines", []), ("regions", ["--figures", "--to", "new"])])
def test_a_damaged_file_of_results_ends_a_page_or_its_pictures_with_one_line(
    name, argv, tmp_path, monkeypatch, capsys
):
    if argv:
        pytest.importorskip("matplotlib")
    results = shutil.copytree(report.RESULTS, tmp_path / "results")
    rows = [{}] if argv else {}
    damaged = json.dumps(report.read_results(f"tiny-{name}") | {"rows": rows})
    (results / f"tiny-{name}.json").write_text(damaged)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "HOME", tmp_path)
    before = (results / "README.md").read_bytes()
    assert "not what its command writes" in run_quietly(report.main, argv, capsys)
    assert (results / "README.md").read_bytes() == before
