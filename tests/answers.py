"""Measuring and answering: what is printed and asked, what a talk survives, and which version fits best."""

import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch

import commit
import eval as evaluation
import train
from commit import Run, weigh
from eval import most_like, open_run
from model import NIWF, response_nll
from plumbing.backbone import from_shape
from plumbing.passes import computed_once, context_of
from plumbing.prompts import encode
from plumbing.tables import exact_match
from plumbing.targets import layers_of
from field import CoordinateDynamics, Route, WeightField
from plumbing.talk import pieces
from studies import found as weighing
from studies import memory
from tests.builders import HERE, RECORD, a_region, a_version_of, answers, asked, copy_of, evaluate
from tests.builders import edit_json, fake_commit, git, load_in_double, micro_backbone, opened, random_bank
from tests.builders import random_examples, random_gating, refused, rows_in, run_quietly, snapshot_of
from tests.builders import tiny_tokenizer


@torch.no_grad()
def test_the_drift_of_a_grown_bank_is_told_over_all_its_bases():
    """Half of the new field's choices at the anchors fall on bases that were not there at commit. Its logits
    are what its biases are, so no order of summation has a say."""
    torch.manual_seed(4)
    dynamics, then, (region, anchors) = CoordinateDynamics(3, 4), WeightField(1, 4, 4, 7), a_region(4)
    then.w3.weight.zero_()
    old = a_version_of(then, dynamics, region, anchors, {})
    now = then.grown(6)
    now.w3.weight.zero_()
    now.w3.bias[4:] = torch.tensor([100.0, -100.0])
    run = Run("nowhere")
    run.manifest["versions"] = [{"lock": "first"}, {"lock": "soft"}]
    run.versions = [old, a_version_of(now, dynamics, region, anchors, {})]
    drift = evaluation.describe_drift(run, 0, torch.randn(5, 3))
    assert drift["lock_loss"] == 0 and drift["top_k_kept"] == 0.5 and drift["moved"] == 0
    run.versions[1].top_k = 1  # one choice is left, of a basis that was not there
    assert evaluation.describe_drift(run, 0, torch.randn(5, 3))["top_k_kept"] == 0


def test_what_was_learned_is_what_was_measured_then():
    """A later measurement of the last version is compared with its first, and with no other task's."""
    row = lambda task, **figures: {"task": task, "stored": figures}
    rows = [row("a", a=2.0), row("b", a=2.0, b=4.0), row("b", a=3.0, b=5.0)]
    assert evaluation.forgetting(rows, "stored") == pytest.approx({"a": 50.0, "b": 25.0})


def test_pieces_of_a_text_hold_no_half_of_a_character():
    """The pieces of a streamed answer add up to its text, and none of them holds half of a character."""
    tokenizer = tiny_tokenizer()
    for text in ("naïve café 漢字 🙂", "  def f(x):\n    return  x , y !  \n", "🙂\n\n", " ", ""):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        parts = [*pieces(tokenizer, ({0: i} for i in ids))]
        assert "".join(parts) == text.strip() and not any("\ufffd" in part for part in parts)
        assert sum(map(bool, parts)) >= len(text.split())
    half = tokenizer("a🙂", add_special_tokens=False).input_ids[:-1]
    assert "".join(pieces(tokenizer, ({0: i} for i in half))) == "a\ufffd"


def test_the_python_of_the_readme_answers_as_the_program(two, tmp_path, monkeypatch, capsys):
    """An answer is the same alone and in a batch; in double precision no likeliest token is as near to the
    next as rounding."""
    (tmp_path / "runs").mkdir()
    out = copy_of(two, tmp_path / "runs", "tiny")
    load_in_double(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    exec(lines, said := {})
    prompts = re.findall('"([A-Z].*?)"', lines)
    for text, name, sure, prompt in zip(said["texts"], said["names"], said["sure"], prompts):
        shown, note = asked(out, capsys, "--prompt", prompt)
        percent = float(re.search(rf"nearest region: {name}, (.*) % sure", note)[1])
        assert shown == text.strip() and percent == pytest.approx(100 * float(sure), abs=0.06)
    assert len(said["texts"]) == 2 and (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    run, model, tokenizer = evaluation.open_run(out)
    records = run.validation("alpaca") + run.validation("code")
    texts, route = evaluation.answer(run, model, tokenizer, records, max_new_tokens=5)
    for i in (route.choice.tolist().index(0), route.choice.tolist().index(1)):  # a batch for both versions
        more = ("--input", records[i].get("input", ""), "--max-new-tokens", "5")
        shown, note = asked(out, capsys, "--prompt", records[i]["instruction"], *more)
        assert shown == texts[i].strip() and f"region: {run.tasks[route.choice[i]]}," in note


def test_a_sampled_answer_is_the_same_with_the_same_seed(first, capsys):
    """The seed decides a sampled answer, and options that do not go together are refused in one line."""
    argv = ["--prompt", "Name a fruit.", *"--max-new-tokens 8 --temperature 1 --top-p 0.9 --seed".split()]
    text, note = asked(first, capsys, *argv, "0")
    assert asked(first, capsys, *argv, "0") == (text, note)
    assert any(asked(first, capsys, *argv, seed)[0] != text for seed in "123456789")
    for wrong in (["--temperature", "1"], ["--prompt", "x", "--top-p", ".5"], ["--talk", "--prompt", "x"]):
        run_quietly(evaluation.main, [*wrong, "--run", str(first)], capsys)


def talk_command(run, longest):
    how = "--device cpu --max-new-tokens".split()
    return [sys.executable, str(HERE / "eval.py"), "--talk", "--run", str(run), *how, str(longest)]


def test_each_piped_prompt_is_answered_and_no_line_ends_it(two, capsys):
    """Each piped prompt gets the answer it gets alone, and no bad command or broken UTF-8 ends the talk."""
    lines = b"Name three fruits.\n\n/use nobody\n/frob \x1b\n\xff\xed\xa0\x80\0 \x1b na\xc3\xafve\n"
    lines += b"/versions\n/use code\nHi.\n/base\nHi.\n/auto\nName three fruits."
    process = subprocess.run(talk_command(two, 5), input=lines, capture_output=True, timeout=600)
    assert process.returncode == 0 and not process.stderr and b"\r" not in process.stdout
    out, entries = process.stdout.decode(), Run(two).entries
    few, code = ("--max-new-tokens", "5"), entries[1]["hash"][:12]
    routed = "{}\n\n{}\n\n".format(*asked(two, capsys, "--prompt", "Name three fruits.", *few))
    assert out.startswith(routed) and out.endswith(routed)
    assert len(re.findall(r"\n\n\[(?:version|the)", out)) == 5
    assert "no version is called 'nobody'" in out and "/frob: no such command" in out and "\x1b" not in out
    assert "".join(f"{e['hash'][:12]}  {e['task']}\n" for e in entries) in out
    assert "{}\n\n{}\n\n".format(*asked(two, capsys, "--prompt", "Hi.", "--version", "code", *few)) in out
    assert f"[version {code}, as asked]" in out and "[the bare backbone, as asked]" in out


def talk_on_a_terminal(run, *more):
    """Start eval.py --talk on a terminal of its own. Return the process and our end of the terminal."""
    fcntl, termios = map(pytest.importorskip, ("fcntl", "termios"))
    ours, its = os.openpty()
    how = termios.tcgetattr(its)
    how[3] |= termios.NOFLSH  # or Ctrl-C drops what was printed and not yet read, the next prompt, too
    termios.tcsetattr(its, termios.TCSANOW, how)
    ends = dict.fromkeys(("stdin", "stdout", "stderr"), its) | {"env": os.environ | {"TERM": "dumb"}}
    own = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal
    command = talk_command(run, 100_000) + [*more]
    process = subprocess.Popen(command, **ends, start_new_session=True, preexec_fn=own)
    os.close(its)
    return process, ours


def test_a_talk_survives_ctrl_c_and_ends_when_told(chat, tmp_path):
    """The version says Hello; the bare backbone does not end, so there is time to stop it."""
    select = pytest.importorskip("select")
    endless = shutil.copytree(chat.parent / "backbone", tmp_path / "backbone")
    edit_json(endless / "config.json", lambda c: c.update(max_position_embeddings=10**6))
    process, ours = talk_on_a_terminal(chat, "--backbone", str(endless))

    def say(text, *parts, patience=600):
        """Return what the program prints until all parts of it are there. Say the text again if that takes
        longer than `patience` seconds."""
        os.write(ours, text)
        said = b""
        while not all(part.encode() in said for part in parts):
            if select.select([ours], [], [], patience)[0]:
                said += os.read(ours, 1000)
            else:
                assert patience < 600, said
                os.write(ours, text)
        return said.decode(errors="replace")

    (digest,) = (e["hash"][:12] for e in Run(chat).entries)
    try:
        say(b"", "/quit", "\r\n> ")
        say(b"/versions\n", f"{digest}  chats", "\r\n> ")
        say(b"Name three fruits.\n", "Hello.", "% sure", "\r\n> ")
        say(b"/use chats\n", "\r\n> ")
        say(b"Name three fruits.\n", "Hello.", f"[version {digest}, as asked]", "\r\n> ")
        say(b"/base\n", "\r\n> ")
        begun = say(b"Hi.\n", " x x x")
        stopped = say(b"\x03", "[stopped; /quit or Ctrl-D leaves]", "\r\n> ")
        assert "as asked" not in begun + stopped
        say(b"half a line", "line")
        # readline sees a signal only while it waits for a key, which may be a little later.
        say(b"\x03", "Ctrl-D leaves", "\r\n> ", patience=5)
        say(b"/auto\n", "\r\n> ")
        say(b"Hi.\n", "Hello.", "% sure")
        os.write(ours, b"/quit\n")
        assert process.wait(600) == 0
    finally:
        process.kill()
        os.close(ours)


def test_all_tasks_are_measured_under_named_versions(two, tmp_path, capsys):
    """Each named version is measured on all tasks, and the perplexities are those stored by training."""
    out, stored = copy_of(two, tmp_path), Run(two).manifest["results"][-1]["stored"]
    git(out, "compose alpaca code --weights 1 0 --name onlyA")
    how = "--version alpaca code onlyA --exact-match 3 --max-new-tokens 3 --json"
    evaluate(out, how, tmp_path / "u.json")
    assert capsys.readouterr().out.count("of 32 answers exactly right") == 2
    (found,) = rows_in(tmp_path / "u.json")
    assert all(sum(n for _, n in kinds.values()) == 32 for kinds in found["exact_match"].values())
    for task, row in found["under"].items():
        assert row[task] == pytest.approx(stored[task], rel=1e-5)  # training sums a batch in float32
        assert row["onlyA"] == pytest.approx(row["alpaca"], rel=1e-5)  # weight 0 takes code out again
    assert "as asked" in asked(out, capsys, *"--version onlyA --prompt Hi. --max-new-tokens 3".split())[1]


def test_an_exact_match_prints_as_many_answers_as_asked_for(capsys):
    """Of n records it prints `show`, or all if there are fewer."""
    record = {"instruction": "Say a."}
    for n, show in itertools.product((1, 7, 9, 32), (0, 1, 3, 5, 8, 40)):
        exact_match("x", [record] * n, [("a", "who")] * n, ["a"] * n, show)
        assert capsys.readouterr().out.count("[who] Say a.") == min(show, n)


def test_an_exact_match_waits_for_the_longest_answer(two, monkeypatch):
    """Unless it is said where answers are cut off, they may be as long as the longest that was trained."""
    given, ask = [], evaluation.answer
    cut = lambda run, model, tokenizer, batch, outside, n: ask(
        run, model, tokenizer, batch, outside, given.append(n) or 1
    )
    monkeypatch.setattr(evaluation, "answer", cut)
    evaluate(two, "--exact-match")
    run, _, tokenizer = evaluation.open_run(two)
    for task in run.tasks:
        longest = max(len(encode(record, tokenizer)[1]) for record in run.validation(task))
        assert given.pop(0) == longest
    evaluate(two, "--exact-match --max-new-tokens 3")
    assert {*given} - {longest} == {3}


def test_run_folders_of_other_tasks_are_refused_before_anything_is_measured(first, two, monkeypatch):
    """Over several run folders there is a mean only if they hold the same tasks."""
    monkeypatch.setattr(evaluation, "open_run", None)
    with refused("hold different tasks", first, two):
        evaluation.main(["--run", str(first), str(two)])


def test_an_exact_match_says_where_the_bare_backbone_answers(two, tmp_path, monkeypatch, capsys):
    """With --outside base the bare backbone answers what no version has learned, and is named for it."""
    monkeypatch.setattr(Route, "known", lambda route: torch.zeros(len(route.choice), dtype=torch.bool))
    for outside, named in (("base", 4), ("nearest", 0)):
        out = copy_of(two, tmp_path / outside)
        evaluate(out, f"--outside {outside} --exact-match 2 --max-new-tokens 1")
        assert capsys.readouterr().out.count("\n[base] ") == named
        evaluate(out, f"--outside {outside} --json", tmp_path / "all.json")
        (found,) = rows_in(tmp_path / "all.json")
        assert found["routing"]["code"].get("base", 0) == 8 * named
        assert ("bare backbone's answers count" in capsys.readouterr().out) == bool(named)


def by_row(rows):
    """Return {(task, checkpointing, devices, device): the parts of the count, in bytes}."""
    key = lambda row: (row["task"], row["checkpointing"], row["devices"], row["device"])
    return {key(row): [row[part] for part in memory.PARTS] for row in rows}


def test_by_count_mistral_7b_trains_its_second_task_in_23_gib():
    """Two depths tell all, since a layer more adds the same however many there are."""
    shallow, deep = (by_row(memory.count_memory("random:mistral-7b", depth)) for depth in (2, 4))
    grown = lambda key: [a + 15 * (b - a) for a, b in zip(shallow[key], deep[key])]
    whole = {key: grown(key) for key in shallow if key[2:] == (1, 0)}
    parts = dict(zip(memory.PARTS, whole[2, False, 1, 0]))
    assert parts["backbone"] == 2 * 7_241_732_096 and parts["bases written"] == 4 * 335_544_320
    assert parts["bases read"] == parts["bases written"] and parts["moments"] == 2 * parts["gradients"]
    total = {key[:2]: sum(sizes) for key, sizes in whole.items()}
    assert total[1, False] < total[2, False] < 23 * 2**30
    assert total[2, False] + 1e9 <= train.MISTRAL_BYTES < 25.3e9  # what a card of 24 GiB reports
    assert 1.5e9 < total[2, False] - total[2, True] < 2e9
    for key in shallow:  # each device has its share, and the devices together have what one has
        if key[2:] == (4, 0):
            together = [sum(sizes) for sizes in zip(*(deep[*key[:3], i] for i in range(4)))]
            assert together[:-1] == deep[*key[:2], 1, 0][:-1]
            assert max(sum(deep[*key[:3], i]) for i in range(4)) < 0.4 * sum(deep[*key[:2], 1, 0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_count_of_memory_is_what_autograd_keeps(checkpointing):
    """Tensors without memory are counted like others, so a training's memory is known before it runs. On such
    tensors transformers cannot see that a single sequence needs no mask, so the mask is counted, too."""
    counts = {}
    for mode in (contextlib.nullcontext(), memory.FakeTensorMode()):
        with mode:
            model = NIWF(from_shape("tiny", torch.bfloat16, 2), pad_id=0)
            model.bank.add(16)
            parts = WeightField(2, 16), CoordinateDynamics(model.features)
            if checkpointing:
                model.checkpoint()
            counts[type(mode)] = memory.count_kept(model, *parts)
    real, counted = counts.values()
    assert all(0 <= b - a < 2.1 * 2 * memory.TOKENS**2 for a, b in zip(real, counted))
    assert real[-1] == counted[-1] and (checkpointing or 0 < real[0] < real[1])


def test_memory_is_counted_without_a_run_folder(tmp_path, capsys):
    """The memory of a training is counted from its backbone alone, and a broken backbone is refused."""
    memory.main(["--backbone", "tiny", "--json", str(tmp_path / "m.json")])
    lines = capsys.readouterr().out.splitlines()
    rows = rows_in(tmp_path / "m.json")
    assert len(rows) == 4 * (1 + 2 + 4) and all(row["activations"] > 0 for row in rows if row["devices"] < 4)
    assert sum(any(line.startswith(part) for part in memory.PARTS) for line in lines) == 7
    (tmp_path / "model.safetensors").touch()
    with refused("cannot be loaded", tmp_path):
        memory.main(["--backbone", str(tmp_path)])


# Versions found, and weighed, by what they lose on a few labelled records.


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """Return a run folder of five random versions."""
    folder = tmp_path_factory.mktemp("five") / "run"
    for seed in range(5):
        fake_commit(folder, f"t{seed}", seed)
    return folder


@pytest.mark.parametrize("count, kept", [(9, 3), (1, 9), (22, 3)])
def test_weights_of_versions_are_algorithm_1_written_out(five, count, kept):
    """Every record is computed alone, and Adam by its formula, on a backbone in double precision. Of more
    than 16 records a step takes four fours, and goes on where the last one ended."""
    run, model = opened(five, micro_backbone().double())
    examples, n = random_examples(count), len(run.versions)
    fours = itertools.cycle([examples[i : i + 4] for i in range(0, count, 4)])
    m = torch.full((n,), 1 / n, dtype=torch.float64).log()  # sigma(m) = 1 / (n + 1)
    first = second = 0
    for t in range(1, 5):
        m, loss = m.requires_grad_(), 0
        taken = sum(itertools.islice(fours, min(4, -(-count // 4))), [])
        tokens = sum(len(response) for _, response in taken)
        for prompt, response in taken:
            h_bar = model.probe([prompt])
            parts = [v.gating(v.dynamics(h_bar)) for v in run.versions]
            indices = torch.cat([i for i, _ in parts], -1)
            weights = torch.cat([share * w for share, (_, w) in zip(m.sigmoid(), parts)], -1)
            loss += response_nll(*model.logits([(prompt, response)], (indices, weights))).sum() / tokens
        (gradient,) = torch.autograd.grad(loss, m)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        step = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        m = m.detach() - 0.5 * step
    winners = sorted(sorted(range(n), key=lambda i: -m[i])[:kept])
    hashes, weights = weigh(model, run.versions, examples, kept=kept, steps=4)
    assert hashes == [run.versions[i].hash for i in winners] and len(hashes) == min(kept, n)
    assert weights == pytest.approx(m[winners].sigmoid().tolist(), rel=1e-4)


def test_versions_are_compared_where_layers_are_no_single_stack(monkeypatch):
    """With no bare layers nobody asks which layers there are: some backbones have several stacks."""
    model = NIWF(micro_backbone(), pad_id=0, rank=3)
    monkeypatch.setattr("model.layers_of", lambda _: pytest.fail("asked for layers"))
    examples = random_examples(3)
    (found,) = model.nll_under(examples, torch.zeros(3, model.features), [lambda h: None])
    assert torch.equal(found, response_nll(*model.logits(examples, None)))


def test_an_answer_ends_with_the_context(two, monkeypatch):
    """What is asked on the command line has as many tokens as the context leaves room for, as on the page."""
    longest, stream = [], NIWF.stream

    def see(model, prompts, gating_of, ends, most, *more):
        longest.append((len(prompts[0]), most))
        return stream(model, prompts, gating_of, ends, 1, *more)

    monkeypatch.setattr(NIWF, "stream", see)
    for most in (10**6, 3):
        evaluate(two, "--prompt Hi. --max-new-tokens", str(most))
    (tokens, most), (_, few) = longest
    assert tokens + most == context_of(micro_backbone()) and few == 3


def test_bare_layers_are_computed_once_for_all_gatings():
    """Versions that are compared on a text share a single pass of its bare layers, and no loss changes."""
    model = NIWF(micro_backbone(layers=3), pad_id=0, rank=3, alpha=5, bare=2)
    random_bank(model.bank, 6)
    layers, calls, examples = layers_of(model.backbone), [], random_examples(5)
    torch.manual_seed(3)
    gatings = [lambda h, g=g: g for g in (None, *(random_gating(5, 1, 6) for _ in range(3)))]
    alone = torch.stack([response_nll(*model.logits(examples, gating(None))) for gating in gatings])
    for layer in layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model.nll_under(examples, torch.zeros(5, model.features), gatings), alone)
    assert len(calls) == 2 * 1 + 4 and len({*alone[:, 0].tolist()}) == 4
    assert not any("forward" in vars(layer) for layer in layers)
    layers[0].forward = own = layers[0].forward
    with pytest.raises(ZeroDivisionError), computed_once(layers[:2]):
        raise ZeroDivisionError
    assert layers[0].forward is own and "forward" not in vars(layers[1])


@torch.no_grad()
@pytest.mark.parametrize("task", ["alpaca", "code"])
def test_like_asks_who_has_the_lowest_loss(two, task, tmp_path, capsys):
    """The versions, a composition of weight 2 and the backbone are each asked alone."""
    out = copy_of(two, tmp_path)
    git(out, "compose code --weights 2 --name twice")
    run, model, tokenizer = open_run(out, "cpu")
    records = run.validation(task)[:3]
    (tmp_path / "few.json").write_text(json.dumps(records))
    examples = [encode(record, tokenizer) for record in records]
    h_bar = model.probe([prompt for prompt, _ in examples])
    gatings = {run.versions[i].hash: run.stored(i, h_bar) for i in (0, 1)}
    gatings |= {run.compositions[0].hash: run.compositions[0].gating(h_bar), None: None}
    losses = {h: float(response_nll(*model.logits(examples, g)).sum()) for h, g in gatings.items()}
    best = min(losses, key=losses.get)
    who, _ = most_like(run, model, tokenizer, tmp_path / "few.json")
    assert (who and who.hash) == best
    model.detach()
    how = ["--prompt", "Say hello.", "--max-new-tokens", "4"]
    text, note = asked(out, capsys, *how, "--like", str(tmp_path / "few.json"))
    assert note == f"[version {best[:12]}, as asked]" if best else "bare backbone" in note
    assert text.partition("]\n\n")[2] == asked(out, capsys, *how, "--version", best)[0] if best else text


def test_the_bare_backbone_answers_if_it_loses_least(five, monkeypatch, capsys):
    """The bare backbone answers if it fits the labelled records best, and every perplexity is printed."""
    run, model = opened(five)
    losses = {"t0": 3.0, "t1": 2.5, "the bare backbone": 2.0}
    monkeypatch.setattr(evaluation, "read_examples", lambda *_: random_examples(4))
    monkeypatch.setattr(evaluation, "perplexity_under", lambda *_: losses)
    assert most_like(run, model, None, "FILE") == evaluation.BARE
    assert capsys.readouterr().out == "[perplexity on FILE: the bare backbone 2.000, t1 2.500, t0 3.000]\n\n"


def test_a_found_composition_is_an_ordinary_one(two, tmp_path, monkeypatch, capsys):
    """A composition weighed on labelled records can be verified and asked, and moves no earlier version."""
    out = copy_of(two, tmp_path)
    run, model, tokenizer = open_run(out, "cpu")
    records = run.validation("code")[:3]
    (tmp_path / "few.json").write_text(json.dumps(records))
    hashes, weights = weigh(model, run.versions, [encode(record, tokenizer) for record in records])
    examples, before = random_examples(3), snapshot_of(out)
    was = answers(out, model.backbone, examples)
    git(out, "compose --name AB --like", tmp_path / "few.json")
    git(out, "compose code --name one --like", tmp_path / "few.json")
    run = Run(out)
    composed, one = (run.head(run.find(name)) for name in ("AB", "one"))
    assert composed["reads"] == hashes == [v["hash"] for v in run.manifest["versions"]]
    assert composed["weights"] == weights and all(0 < w < 1 for w in weights) and one["reads"] == hashes[1:]
    after, now = snapshot_of(out), answers(out, model.backbone, examples)
    new = {f"versions/{run.find(name)['hash']}.safetensors" for name in ("AB", "one")}
    moved = {str(path) for path in after if after[path] != before.get(path)}
    assert moved == {"manifest.json", *new} and before.keys() <= after.keys()
    assert all(torch.equal(now[digest], logits) for digest, logits in was.items()) and len(now) == 4
    git(out, "verify")
    assert "as asked" in asked(out, capsys, *"--version AB --prompt Hi. --max-new-tokens 2".split())[1]
    monkeypatch.setattr(commit, "weigh", lambda *_: (hashes, [math.nan, 1.0]))
    with refused("worse is not committed: a weight", out):  # as after a training that diverged
        git(out, "compose --name worse --like", tmp_path / "few.json")


UNLIKE = [([], "there are none"), ([RECORD, {"instruction": "x"}], "record 2")]
UNLIKE += [([RECORD, RECORD | {"output": " "}], "2 read: 1 usable, 1 empty")]
UNLIKE += [([RECORD | {"label": False}], "1 read")]
UNLIKE += [([RECORD | {"output": "x " * 999}], "1 read: 1 over 256 tokens")]


@pytest.mark.parametrize("records, why", UNLIKE)
def test_records_to_be_like_are_all_usable_or_refused(two, records, why, tmp_path):
    """Records for --like are refused unless all of them can be used, and the run folder stays as it was."""
    (tmp_path / "few.json").write_text(json.dumps(records))
    for command, words in ((evaluate, "--prompt x --like"), (git, "compose --name new --like")):
        with refused(why, two):
            command(two, words, tmp_path / "few.json")


def test_the_study_counts_what_it_says(micro, tmp_path, monkeypatch, capsys):
    """All styles have the same inputs, so each input goes home in one of three. The right one is found as
    often as a literal loop over the draws finds it. What is there is not trained again, and the same rows
    come out."""
    options = micro("x", tmp_path)
    small = options[options.index("--device") :] + "--epochs 1 --examples 16 --val-examples 8".split()
    some = itertools.islice(weighing.StyleStream.STYLES.items(), 3)
    monkeypatch.setattr(weighing.StyleStream, "STYLES", dict(some))

    def run(table, *more):
        path = tmp_path / f"{table}.json"
        argv = [table, "--backbone", micro.folder, "--seeds", "1", "--out", str(tmp_path / "out"), *small]
        weighing.main([*argv, *more, "--json", str(path)])
        return rows_in(path)

    rows = run("styles")
    assert sorted(row["routed home"] for row in rows) == [0] * 2 + [1]
    of, model, tokenizer = open_run(tmp_path / "out" / "styles-0", "cpu")
    sentences = weighing.SENTENCES.read_text().splitlines()
    random.Random(0).shuffle(sentences)
    gatings = [*weighing.stored_gatings(of).values()]  # the bare backbone's, then a style's each
    for i, (task, style) in enumerate(weighing.StyleStream.STYLES.items()):
        few = [{"instruction": s, "input": "", "output": style(s)} for s in sentences[72:96]]
        losses = model.nll_under(*weighing.asked(model, of, tokenizer, few), gatings)
        for n in (1, 4, 16):
            draws = [random.Random(f"0 {task} {n} {d}").sample(range(24), n) for d in range(50)]
            lost = [[float(of_one[draw].sum()) for of_one in losses] for draw in draws]
            hits = [each.index(min(each)) == i + 1 for each in lost]
            assert 0 <= rows[i][f"found from {n}"] == sum(hits) / 50 <= 1
    model.detach()
    assert run("styles") == rows and "nothing to train" in capsys.readouterr().out
    (row,) = run("kinds", "--learned", "3", "--held", "1")
    learned = {*Run(tmp_path / "out" / "kinds-0").tasks}
    assert len(learned) == 3 and row["task"] not in learned
    assert all({*row["composed"][n]} == learned for n in ("16", "64"))
    assert all(row[f"{what}, {n}"] > 1 for what in ("best single", "composition", "LoRA") for n in (16, 64))
