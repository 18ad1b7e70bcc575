"""Training: what a lock lets a task write, resuming to the same bits, several processes."""

import argparse
import contextlib
import functools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import commit
import eval as evaluation
import train
from commit import Run
from model import FastBank, perplexity, response_nll
from plumbing import Refused
from plumbing.backbone import pick_device
from plumbing.command import run_program
from plumbing.processes import ENDED
from field import CoordinateDynamics, WeightField, top_k_gating
from studies import bench, fuzz, kinds, stream
from tests.builders import HERE, a_region, a_version_of, copy_of, edit_json, evaluate, fake_commit, forked
from tests.builders import git, in_double, load_in_double, micro_model, outcome, random_examples, refused
from tests.builders import rows_in, snapshot_of, tensors_of

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def test_exact_lock_nothing_stored_moves_by_a_bit(micro, first, two, capsys):
    """After a second task, and after its command is given again, the first has the bits that it began with;
    the report then says that nothing was trained, and which options the task was trained with."""
    before = snapshot_of(two)
    train.main(micro("code", two, "--lock"))
    said = capsys.readouterr().out
    assert "+0.00 %  logits bit-identical on 32 of 32" in said and "it was trained with" not in said
    train.main(micro("code", two, "--lock", "--examples", "9999"))
    assert "it was trained with" not in capsys.readouterr().out
    train.main(micro("code", two))
    assert "it was trained with lock exact; to change that" in capsys.readouterr().out
    train.main(micro("code", two, "--lock", "--lr", "0.5"))
    assert " not read\nit was trained with lr 0.02;" in capsys.readouterr().out
    assert snapshot_of(two) == before
    old = {p.name: p.read_bytes() for p in (first / "versions").iterdir()}
    run, model, _ = evaluation.open_run(two, "cpu")
    assert run.manifest["results"][-1]["identical"] == {"alpaca": [32, 32], "code": [32, 32]}
    assert evaluation.forgetting(run.manifest["results"], "stored") == {"alpaca": 0.0, "code": 0.0}
    assert old and all((two / "versions" / name).read_bytes() == data for name, data in old.items())
    one, other = run.versions
    assert len(model.bank) == 8 and [v.index.tolist() for v in run.versions] == [[*range(4)], [*range(8)]]
    assert other.reads == [one.hash] and other.dynamics is one.dynamics
    with tensors_of(two, 1) as f:
        assert not any(k.startswith("dynamics") for k in f.keys())
        assert {f.get_slice(k).get_shape()[0] for k in f.keys() if k.startswith("bank.")} == {4}
        assert any(f.get_tensor(k).any() for k in f.keys() if k.endswith(".B")), "code has learned something"


def test_a_batch_may_mix_prompts_that_go_to_different_versions(two):
    """Each prompt of a batch is answered as alone. In double precision no choice is a near tie."""
    run, model, _ = evaluation.open_run(two, "cpu")
    for module in (run.versions[0].dynamics, *(v.field for v in run.versions)):
        module.double()
    h_bar = torch.randn(12, model.features, dtype=torch.double)
    with in_double():
        (indices, weights), found = run.routed(h_bar)
    for i in range(12):
        alone = run.stored(int(found.choice[i]), h_bar[i : i + 1])
        assert torch.equal(indices[i], alone[0][0])
        torch.testing.assert_close(weights[i], alone[1][0])


def test_exact_lock_trains_only_what_the_task_owns(micro, first, tmp_path):
    """Under the exact lock a task writes its own bases and field alone, and its own bases lead at first."""
    run, model, _ = evaluation.open_run(first, "cpu")
    args = train.parse_options(micro("code", first, "--lock"))
    train.complete(args, run)
    torch.manual_seed(0)
    h_bar = 3 * torch.randn(50, model.features)
    learner = train.writable(run, model, h_bar, args)
    weights = learner.weights()
    assert {k.split(".")[0] for k in weights} == {"bank", "field"} and learner.reads == [run.versions[0].hash]
    assert {len(p) for k, p in weights.items() if k.startswith("bank")} == {4} and len(model.bank) == 8
    stored = [p for v in run.versions for m in (v.field, v.dynamics) for p in m.parameters()]
    assert not any(p.requires_grad for p in stored)
    logits = learner.field(learner.dynamics(h_bar))  # [50, L, 8]
    # Its own two lead at the start, at all of its coordinates. It may read the next.
    indices, weights = top_k_gating(logits, 3)
    assert (indices[..., :2] >= 4).all() and (indices[..., 2] < 4).any()
    assert weights.min() > 0.25


def test_a_third_task_reads_both_and_moves_neither(micro, two, tmp_path):
    """A third task reads the bases of both earlier tasks, and moves no bit of either."""
    out = copy_of(two, tmp_path)
    train.main(micro("third", out, "--lock", "--data", HERE / "assets" / "data" / "alpaca.val.json"))
    run = Run(out)
    assert run.manifest["results"][-1]["identical"] == dict.fromkeys(("alpaca", "code", "third"), [32, 32])
    assert {*evaluation.forgetting(run.manifest["results"], "stored").values()} == {0.0}
    with tensors_of(out, 2) as f:
        reads = json.loads(f.metadata()["version"])["reads"]
        assert reads == [v["hash"] for v in run.manifest["versions"][:2]]
        assert f.get_slice("snapshot").get_shape() == [32, 2, 12]  # over its own 4 bases and the 8 it reads


@pytest.mark.parametrize("lock", ["soft", "none"])
def test_without_the_exact_lock_the_first_task_moves(micro, first, tmp_path, lock):
    """Without the exact lock the first task's logits move, and such a run cannot take that lock later."""
    out = copy_of(first, tmp_path)
    train.main(micro("code", out, *(["--lock", "soft"] if lock == "soft" else [])))
    row = Run(out).manifest["results"][-1]
    assert row["identical"]["alpaca"][0] < 32 and row["identical"]["code"] == [32, 32]
    assert row["drift"]["alpaca"]["moved"] > 0 and row["drift"]["alpaca"]["lock_loss"] > 0
    assert [line["lock"] > 0 for line in steps_of(out)[-11:]] == [lock == "soft"] * 11  # all but its first
    with tensors_of(out, 0) as old, tensors_of(out, 1) as new:
        assert {*old.keys()} == {*new.keys()}
        assert not torch.equal(old.get_tensor("dynamics.w_z.weight"), new.get_tensor("dynamics.w_z.weight"))
    for other in {"exact", "soft"} - {lock}:
        with refused("cannot be mixed", out):
            train.main(micro("third", out, "--lock", other))
    # Files that are whole, and do not fit the others.
    shrunk, narrow = copy_of(out, tmp_path, "shrunk"), copy_of(out, tmp_path, "narrow")
    fuzz.forge(shrunk, 1, lose_a_basis)
    sized = "dynamics.gru.weight_ih", "dynamics.mean", "dynamics.deviation"
    fuzz.forge(narrow, 0, lambda _, t: t.update({key: t[key][..., :9].clone() for key in sized}))
    for folder, match in ((shrunk, "has lost bases"), (narrow, "other modules")):
        with refused(match, folder):
            evaluate(folder)


def lose_a_basis(head, tensors):
    """Take the last basis out of a version of a shared bank."""
    head["writes"] -= 1
    of_bases = lambda t: t.unflatten(0, (2, -1))[:, :-1].flatten(0, 1)  # 2 layers
    parts = {"bank": lambda t: t[:-1], "snapshot": lambda t: t[..., :-1], "field.w3": of_bases}
    for key, change in ((key, c) for key in tensors for part, c in parts.items() if key.startswith(part)):
        tensors[key] = change(tensors[key]).clone()


def test_the_papers_own_setting_runs_and_is_read_back(micro, tmp_path):
    """A run in the paper's own setting is read back with the same perplexities and routing."""
    out = tmp_path / "run"
    train.main(micro("alpaca", out, "--passes", "two", "--probe", "adapted", "--pool", "sequence"))
    train.main(micro("code", out, "--lock", "soft"))
    run = Run(out)
    v, rows = run.read_version(run.manifest["versions"][-1], []), run.manifest["results"]
    assert v.top_k == 2 and v.field.layers == 3
    evaluate(out, "--json", tmp_path / "e.json")
    (again,) = rows_in(tmp_path / "e.json")
    both = {kind: [rows[1][kind][t] for t in ("alpaca", "code")] for kind in ("stored", "routed")}
    assert again["R"]["stored"] == [[rows[0]["stored"]["alpaca"], None], both["stored"]]
    assert again["R"]["routed"][1] == both["routed"] and again["routing"] == rows[1]["routing"]
    assert [made["lock"] for made in again["config"]["versions"].values()] == ["first", "soft"]
    (tmp_path / "link.json").symlink_to(tmp_path / "e.json")
    (tmp_path / "e.json").write_text('{"command": "", "rows": []}')
    evaluate(out, "--json", tmp_path / "link.json")
    assert rows_in(tmp_path / "e.json") == [again] and (tmp_path / "link.json").is_symlink()


def test_a_figure_that_is_not_finite_is_said(micro, first, tmp_path, monkeypatch):
    """After a training that diverged the figures say so, not the manifest in which they cannot stand."""
    out = copy_of(first, tmp_path)
    monkeypatch.setattr(evaluation, "describe_drift", lambda *_: {"lock_loss": math.inf})
    with pytest.raises(Refused, match="after code a figure is not finite: roll it back"):
        train.main(micro("code", out, "--lock", "soft"))
    git(out, "rollback code")
    assert Run(out).tasks == ["alpaca"]


def test_routing_is_measured_on_prompts_alone(micro, tmp_path, monkeypatch):
    """Pooling over prompt and response is the paper's, but an answer has to be routed before it is there."""
    load_in_double(monkeypatch)
    out = tmp_path / "run"
    train.main(micro("alpaca", out, "--passes", "two", "--pool", "sequence"))
    train.main(micro("code", out, "--lock"))
    run, model, tokenizer = evaluation.open_run(out, "cpu")
    for task in run.tasks:
        examples, h_bar, routes = evaluation.validation_set(run, model, tokenizer, task)
        torch.testing.assert_close(routes, model.probe([p for p, _ in examples]))
        torch.testing.assert_close(h_bar, model.probe([p + r for p, r in examples]))
        choice = run.routed(routes)[1].choice.tolist()
        counts = {t: choice.count(i) for i, t in enumerate(run.tasks)}
        assert counts == run.manifest["results"][-1]["routing"][task]
        parts = [(batch, run.routed(asked)[0]) for batch, asked in evaluation.batches(examples, routes)]
        nll = sum(float(response_nll(*model.logits(*part)).sum()) for part in parts)
        routed = perplexity(nll, sum(len(r) for _, r in examples))
        assert routed == pytest.approx(run.manifest["results"][-1]["routed"][task])


def break_off(argv, last, monkeypatch, every=0, by=None):
    """Train, with the state saved as often as told, until the plug is pulled, or a signal comes, in the step
    after step `last`."""
    schedule = train.learning_rate

    def pull(step, *rest):
        if step > last and not by:
            raise RuntimeError("pulled the plug")
        if step == last + 1:
            signal.raise_signal(by)
        return schedule(step, *rest)

    said = f"step {last + 2} of 12; the same command goes on" if by else "pulled the plug"
    with monkeypatch.context() as broken, pytest.raises((RuntimeError, KeyboardInterrupt), match=said):
        broken.setattr("plumbing.training.SAVE_EVERY", every)
        broken.setattr(train, "learning_rate", pull)
        train.main(argv)


def test_a_stopped_training_resumes_to_the_same_bits(micro, first, two, tmp_path, monkeypatch):
    """A training stopped at any step, by a crash or a signal, resumes to the bits of an undisturbed run."""
    out = copy_of(first, tmp_path)
    command = micro("code", out, "--lock")
    for last in (0, 3, 4):
        break_off(command, last, monkeypatch)
    break_off(command, 4, monkeypatch, math.inf, signal.SIGINT)
    break_off(command, 6, monkeypatch, math.inf, signal.SIGTERM)
    for last in (9, 10):
        break_off(command, last, monkeypatch)
    with refused("unfinished training", out):
        train.main([*command, "--seed", "5"])
    data = HERE / "assets" / "data" / "alpaca.train.json"
    with refused("unfinished training with task code, not other; finish", out):
        train.main(micro("other", out, "--lock", "--data", data))
    train.main(command)
    assert outcome(out) == outcome(two) and not (out / "training.safetensors").exists()


def test_checkpointing_changes_no_bit_also_from_halfway(micro, two, first, tmp_path, monkeypatch):
    """Checkpointing changes no bit of the result, even if a resumed training is the first to use it."""
    out = copy_of(first, tmp_path)
    break_off(micro("code", out, "--lock"), 4, monkeypatch)
    again, calls = FastBank.again, []
    monkeypatch.setattr(FastBank, "again", lambda bank: (calls.append(1), again(bank))[1])
    train.main(micro("code", out, "--lock", "--checkpointing"))
    assert outcome(out) == outcome(two) and calls


@needs_fork
def test_sigkill_at_random_moments_changes_nothing(micro, first, tmp_path, monkeypatch):
    """The first kill comes in the fourth step, and the state is saved after the first: so resuming is what is
    tried, whenever the others come."""
    whole, killed = copy_of(first, tmp_path, "whole"), copy_of(first, tmp_path, "killed")
    schedule = train.learning_rate
    monkeypatch.setattr("plumbing.training.SAVE_EVERY", 0)

    def start(out, last=math.inf):
        kill = lambda step: os.kill(os.getpid(), signal.SIGKILL) if step > last else None
        train.learning_rate = lambda step, *rest: (kill(step), schedule(step, *rest))[1]
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            train.main(micro("code", out, "--lock", "--epochs", 4))

    began = time.time()
    assert os.waitpid(forked(start, whole), 0)[1] == 0
    seconds, moments = time.time() - began, random.Random(0)
    assert os.waitpid(forked(start, killed, 2), 0)[1] == signal.SIGKILL
    for _ in range(3):
        child = forked(start, killed)
        time.sleep(seconds * moments.uniform(0.2, 0.6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert os.waitpid(forked(start, killed), 0)[1] == 0
    assert outcome(killed) == outcome(whole)
    assert any(line["start"] > 0 for line in log_of(killed) if "start" in line)


def test_a_kill_between_commit_and_measuring_is_made_good(micro, first, tmp_path):
    """The next command measures what is missing, whether it trains another task or has nothing to train."""
    out, seen = copy_of(first, tmp_path), Run(first).manifest["results"]
    for n, command in enumerate((micro("alpaca", out), micro("code", out, "--lock")), 1):
        edit_json(out / "manifest.json", lambda m: m.update(results=[]))
        train.main(command)
        found = Run(out).manifest["results"]
        assert found[:1] == seen and len(found) == n


def test_a_kill_between_commit_and_the_end_leaves_no_state(micro, first, two, tmp_path, monkeypatch):
    """The state of a training whose task is committed is nobody's any more: the next command that writes
    removes it, whether it is the same or not."""
    commit_task, out = train.commit_task, copy_of(first, tmp_path)
    state = out / "training.safetensors"

    def killed(*args, **how):
        saved = state.read_bytes()
        commit_task(*args, **how)
        assert not state.exists()
        state.write_bytes(saved)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "commit_task", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(micro("code", out, "--lock"))
    assert (out / "training.safetensors").exists() and Run(out).tasks == ["alpaca", "code"]
    other = copy_of(out, tmp_path, "other")
    with refused("no version is called", other):
        git(other, "rollback nobody")
    git(other, "rollback code")
    assert Run(other).tasks == ["alpaca"] and not (other / "training.safetensors").exists()
    train.main(micro("code", out, "--lock"))
    assert outcome(out) == outcome(two) and not (out / "training.safetensors").exists()


def test_a_later_task_takes_what_the_shared_bank_and_field_have(tmp_path):
    """Under the soft lock a later task has the field of the last, and as many bases as the bank; the exact
    lock has no penalty to weigh; what is to be found may be said again; and no composition is changed."""
    a_task = ["--backbone", "tiny", "--task", "x"]
    run = Run(tmp_path / "run")
    fake_commit(run.folder, "first", 0)
    run.read()
    fits = lambda more: train.complete(train.parse_options([*a_task, *more.split()]), run)
    for lock in ("--lock", ""):
        with refused("--lambda-sep goes with --lock soft"):
            fits(f"{lock} --lambda-sep 1")
    with refused("--field-hidden 99 does not fit"):
        fits("--lock soft --field-hidden 99")
    fits("--lock soft --top-k 16 --bare-layers 0")
    for lock in ("--lock", "--lock soft", ""):  # a version that chose more could not be read again
        with refused("--top-k 20 is more than the 16 bases a task writes"):
            fits(f"{lock} --top-k 20")
    git(run.folder, "compose first --weights 1 --name half")
    run.read()
    for lock in ("--lock soft", ""):
        with refused("has compositions, whose bases this would change"):
            fits(f"{lock} --bare-layers 0")
    fits("--lock --bare-layers 0")


def test_a_chat_is_learned_and_asked_in_the_chat_template(chat, micro, tmp_path, capsys):
    """An answer ends where its turn does; and the next task has the same template."""
    run = Run(chat)
    assert run.template == "chat"
    assert run.manifest["results"][0]["stored"]["chats"] < 2 < run.manifest["results"][0]["base"]["chats"]
    capsys.readouterr()
    for more in ([], ["--version", "chats"]):
        evaluate(chat, "--max-new-tokens 30 --prompt", "Say 99.", *more)
        assert capsys.readouterr().out.startswith("Hello.\n\n[version")
    evaluate(chat, "--exact-match")
    assert "chats: 6 of 6 answers exactly right" in capsys.readouterr().out
    out, backbone = copy_of(chat, tmp_path), run.manifest["backbone"]["name"]
    more = "--lock", "--backbone", backbone, "--rank", 7, "--examples", 16
    with refused("--template alpaca does not fit .* fixed chat", out):
        train.main(micro("code", out, *more, "--template", "alpaca"))
    train.main(micro("code", out, *more))
    assert Run(out).template == "chat" and outcome(out)[1][1]["identical"]["chats"] == [6, 6]


def test_the_loss_of_a_step_is_equation_9_in_any_split():
    """L is L_LM + 5 L_lock + 0.5 L_sep over four examples, in micro-batches of three and one."""
    model, examples = micro_model(bases=6), random_examples(4)
    torch.manual_seed(3)
    dynamics, then, now = CoordinateDynamics(32, 4), WeightField(2, 6, 4, 7), WeightField(2, 6, 4, 7)
    region, anchors = a_region(4)
    old = a_version_of(then, dynamics, region, anchors, {})
    learner = train.Learner(model=model, field=now, dynamics=dynamics, top_k=2, reads=[], protected=[old])
    args = argparse.Namespace(lambda_lock=5.0, lambda_sep=0.5, margin=3.0)
    h_bar, tokens = model.probe([p for p, _ in examples]), sum(len(r) for _, r in examples)
    parts = [(examples[i:j], h_bar[i:j], args, (j - i) / 4, tokens) for i, j in ((0, 3), (3, 4))]
    terms = [train.loss_terms(learner, *part) for part in parts]
    z = dynamics(h_bar)
    nll = 0.0
    for (p, r), coordinate in zip(examples, z):
        with model.gated(top_k_gating(now(coordinate[None]), 2)):
            log_p = model.backbone(torch.tensor([p + r])).logits[0].log_softmax(-1)
        nll = nll - sum(log_p[len(p) - 1 + i, t] for i, t in enumerate(r))
    lock = sum(((now(a[None]) - s) ** 2).sum() for a, s in zip(anchors, old.snapshot)) / 8
    missing = [max(0.0, region.tau + 3.0 - float(region.distance(c[None]))) for c in z.detach()]
    wanted = {"lm": nll / tokens, "lock": 5 * lock}
    wanted["sep"] = torch.tensor(0.5 * sum(x**2 for x in missing) / 4)
    for name, value in wanted.items():
        torch.testing.assert_close(sum(t[name] for t in terms), value, atol=1e-4, rtol=1e-4)
        assert value > 0.01, name


@pytest.mark.parametrize("n, batch, grad_accum", [(100, 4, 2), (37, 3, 1), (5, 1, 16), (64, 16, 1)])
def test_an_epoch_has_each_example_once_and_sorts_lengths(n, batch, grad_accum):
    """An epoch has each example once, and puts like lengths into a batch, which saves padding."""
    args = argparse.Namespace(batch=batch, grad_accum=grad_accum, seed=7)
    lengths = torch.randperm(n).tolist()
    examples, steps = [([0] * length, [1]) for length in lengths], -(-n // (batch * grad_accum))
    epochs = [[train.micro_batches(examples, e * steps + s, args) for s in range(steps)] for e in range(2)]
    for epoch in epochs:
        micros = [micro for step in epoch for micro in step]
        assert sorted(i for micro in micros for i in micro) == list(range(n))
        assert len(micros) == -(-n // batch) and max(map(len, micros)) == batch
        assert {len(step) for step in epoch[:-1]} <= {grad_accum}
    assert n <= 5 or epochs[0] != epochs[1]
    if n == 100:  # padded to the longest, beside batches as they come
        padded = lambda groups: sum(len(g) * max(lengths[i] for i in g) for g in groups)
        as_they_come = [list(range(i, i + batch)) for i in range(0, n, batch)]
        assert padded(micros) < 0.8 * padded(as_they_come)


def test_learning_rate_warms_up_and_falls_to_zero():
    """The learning rate rises evenly over its first steps, then never rises again, and ends near zero."""
    rates = [train.learning_rate(s, 100, 1.0) for s in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates[5] == 1.0
    assert rates[-1] < 1e-3 and all(a >= b for a, b in zip(rates[5:], rates[6:]))


def test_a_stream_goes_on_and_says_what_every_task_cost(tmp_path, monkeypatch, capsys):
    """A stream goes on from the tasks it has, and the growth benchmark lists what each task cost. With a
    stream's own regions `kinds` finds what the stream itself reports."""
    monkeypatch.setattr(train, "TINY", dict(train.TINY, examples=16, val_examples=4))
    command = ["--out", str(tmp_path / "run"), "--device", "cpu", "--epochs", "2"]
    stream.main(["1", *command])
    first = Run(tmp_path / "run").manifest["versions"]
    stream.main(["2", *command])
    found, context = tmp_path / "s.json", bench.multiprocessing.get_context
    # A fork imports nothing anew.
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: context("fork"))
    bench.main(["growth", "--run", str(tmp_path / "run"), "--repeats", "1", "--json", str(found)])
    run, lines = Run(tmp_path / "run"), rows_in(found)
    versions, row = run.manifest["versions"], run.manifest["results"][-1]
    assert run.tasks == ["alpaca-before", "code-append"] and versions[:1] == first
    assert {r["kind"] for r in run.validation("alpaca-before")} == {"before"}
    assert [x["bases_read"] for x in lines] == [0, 16] and all(x["bases_written"] == 16 for x in lines)
    assert [x["bytes"] for x in lines] == [run.path(v["hash"]).stat().st_size for v in versions]
    assert [x["stored_forgetting"] for x in lines] == [0, 0] and lines[1]["identical"] == [8, 8]
    assert lines[1]["routed_home"] == sum(row["routing"][t][t] for t in run.tasks) / 8
    assert all(x["memory"] > 10**8 and x["routed_ms"] > 0 for x in lines)
    opened = evaluation.open_run(tmp_path / "run", "cpu")
    regions, asked = (v.region for v in opened[0].versions), {t: run.validation(t) for t in run.tasks}
    monkeypatch.setattr(kinds.Region, "fit", lambda z: next(regions))
    asked = {task: {"train": records, "val": records} for task, records in asked.items()}
    home = kinds.find_regions(*opened, asked)["each"]
    assert home == [row["routing"][t][t] / 4 for t in run.tasks]


@pytest.mark.parametrize("n, batch, size", [(16, 16, 2), (48, 16, 2), (40, 16, 3), (5, 1, 3), (2, 4, 3)])
def test_every_process_has_its_share_of_a_step(n, batch, size, monkeypatch):
    """Processes share out the examples of a step evenly, without leaving out or repeating any."""
    micros = [[*range(n)][i : i + batch] for i in range(0, n, batch)]
    shares = []
    for rank in range(size):
        monkeypatch.setattr(train, "rank_and_size", lambda rank=rank: (rank, size))
        own = train.take_share(micros, batch)
        assert all(0 < len(micro) <= batch for micro in own)
        shares.append(sum(own, []))
    assert sorted(sum(shares, [])) == [*range(n)] and max(map(len, shares)) - min(map(len, shares)) <= 1
    monkeypatch.undo()
    assert train.take_share(micros, batch) is micros


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    """Every process takes a GPU by its local rank, and is refused if there is none for it alone."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert [pick_device(wanted) for wanted in (None, "cuda:1", "cpu")] == ["cuda", "cuda:1", "cpu"]
    monkeypatch.setattr("plumbing.backbone.rank_and_size", lambda: (1, 2))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [pick_device(wanted) for wanted in (None, "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    monkeypatch.delenv("LOCAL_RANK")  # as with mpirun on one machine
    assert pick_device("cuda") == "cuda:1" and taken == [1, 1, 1]
    for rank, wanted in (("1", "cuda:0"), ("2", None)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with refused("a GPU of its own: 2 here"):
            pick_device(wanted)


def log_of(run):
    return [*map(json.loads, (run / "log.jsonl").read_text().splitlines())]


def steps_of(run):
    return [line for line in log_of(run) if "step" in line]


def train_in_two(argv, folder, rate=None, main=train.main):
    """Train in two processes, as torchrun would start them. Return what each printed, the line that ended it,
    and its code as `os.wait` has it. rate(rank, step, ...): instead of our learning rate."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    address |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}

    def run(rank):
        os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        if rate:
            train.learning_rate = functools.partial(rate, rank)
        end = folder / f"{rank}.end"
        end.write_text("")
        try:
            with open(folder / f"{rank}.out", "w") as out:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                    run_program(lambda: main(argv))
        except BaseException as e:
            line = e.code if isinstance(e, SystemExit) else repr(e)
            end.write_text(line if isinstance(line, str) else "")
            raise

    codes = [os.waitpid(child, 0)[1] for child in [forked(run, rank) for rank in range(2)]]
    out, end = ([(folder / f"{rank}.{what}").read_text() for rank in range(2)] for what in ("out", "end"))
    return out, end, codes


AS_PRINTED = "--passes two --probe adapted --pool sequence --batch 1 --grad-accum 3 --examples 66"


@needs_fork
@pytest.mark.parametrize("more", ["--epochs 2 --examples 80", AS_PRINTED])
def test_two_processes_learn_what_one_learns(micro, tmp_path, monkeypatch, more):
    """Two sums of the same numbers differ by rounding alone: AdamW, which makes a step of any gradient
    however near to zero, is replaced by plain steps, and no choice of bases could be a near tie."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda weights, lr, **_: torch.optim.SGD(weights, lr))
    one, two, more = tmp_path / "one", tmp_path / "two", ["--top-k", "4", "--epochs", "1", *more.split()]
    train.main(micro("alpaca", one, *more))
    (out, silent), _, codes = train_in_two(micro("alpaca", two, *more), tmp_path)
    steps, expected = steps_of(two), steps_of(one)
    assert [line["step"] for line in steps] == [*range(1, len(expected) + 1)]
    for line, other in zip(steps, expected):
        assert all(line[key] == pytest.approx(other[key], abs=1e-4) for key in ("lm", "lock", "sep"))
    (row,), (other,) = (Run(folder).manifest["results"] for folder in (two, one))
    for key in ("base", "stored", "routed"):
        assert row[key]["alpaca"] == pytest.approx(other[key]["alpaca"], rel=1e-3)
    assert row["identical"] == other["identical"] and row["routing"] == other["routing"]
    assert row["gating"]["alpaca"] == pytest.approx(other["gating"]["alpaca"], rel=1e-3)
    assert out.count("data  ") == out.count("in all, peak memory") == 1 and silent == "" and codes == [0, 0]


@needs_fork
def test_a_process_that_is_killed_or_stopped_ends_both(micro, first, tmp_path, monkeypatch):
    """If either of two processes is killed or stopped, both end in one line, and resume to the same bits."""
    whole, broken = copy_of(first, tmp_path, "whole"), copy_of(first, tmp_path, "broken")
    before, schedule = len(steps_of(first)), train.learning_rate
    command = lambda out: micro("code", out, *"--lock --examples 66 --batch 16".split())
    monkeypatch.setattr("plumbing.training.SAVE_EVERY", 0)
    assert train_in_two(command(whole), tmp_path)[2] == [0, 0]

    def disturb(rank, step, *rest, which, at, by):
        if (rank, step) == (which, at):
            signal.raise_signal(by)
        return schedule(step, *rest)

    for which, at, by, said in (
        (1, 1, signal.SIGKILL, ENDED),
        (0, 2, signal.SIGKILL, ENDED),
        (1, 4, signal.SIGINT, "stopped and saved at step 5 of 6; the same command goes on from there"),
    ):
        rate = functools.partial(disturb, which=which, at=at, by=by)
        _, ends, codes = train_in_two(command(broken), tmp_path, rate)
        lines = "".join(ends).strip().splitlines()
        assert len(lines) == 1 and lines[0].endswith(said)
        assert codes[which] == (by if by == signal.SIGKILL else 256) and codes[1 - which] == 256
    assert train_in_two(command(broken), tmp_path)[2] == [0, 0]
    assert outcome(broken) == outcome(whole)
    starts = [line["start"] for line in log_of(broken) if "start" in line][1:]
    assert starts == sorted(starts) and starts[0] == 0 < starts[1] and starts[-1] == 5
    losses = [{line["step"]: line["lm"] for line in steps_of(run)[before:]} for run in (broken, whole)]
    assert losses[0] == losses[1] and [*losses[1]] == [*range(1, 7)]


@needs_fork
def test_two_processes_learn_a_stream(tmp_path, monkeypatch):
    """A stream that two processes learn passes verify, and its first task keeps every bit."""
    monkeypatch.setattr(train, "TINY", dict(train.TINY, examples=16, val_examples=20))
    command = ["2", "--out", str(tmp_path / "run"), "--device", "cpu", "--epochs", "2"]
    assert train_in_two(command, tmp_path, main=stream.main)[1:] == (["", ""], [0, 0])
    run = Run(tmp_path / "run")
    assert run.tasks == ["alpaca-before", "code-append"] and not any(wrong for _, wrong in commit.verify(run))
    same, of = run.manifest["results"][-1]["identical"]["alpaca-before"]
    assert same == of > 0


LEFT = """import pathlib, sys
import train
from plumbing.command import run_program
run_program(train.main)
tasks = pathlib.Path("/proc/self/task")
left = [p.read_text() for p in tasks.glob("*/comm")] if tasks.exists() else []
sys.stderr.writelines(name for name in left if "gloo" in name)
"""


def test_processes_that_torchrun_starts_speak_and_write_as_one(micro, first, tmp_path):
    """One of two processes prints and writes, and none keeps a thread of the group, which could abort Python
    as it ends."""
    (tmp_path / "program.py").write_text(LEFT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr"]
    command += ["127.0.0.1", "--nproc_per_node", "2", tmp_path / "program.py", *micro("alpaca", first)]
    before, env = snapshot_of(first), dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    # torch warns so where IPv6 is off.
    own = [line for line in done.stderr.splitlines() if "[c10d] The client socket cannot be" not in line]
    assert (done.returncode, own, snapshot_of(first)) == (0, [], before)
    assert done.stdout.count("nothing to train") == done.stdout.count("in all, peak memory") == 1


def test_literal_forms_of_benchmarks_give_the_same(double, monkeypatch, capsys):
    """Double precision is needed, as a search goes by signs of gradients, which must not be those of
    rounding."""
    load_in_double(monkeypatch)
    bench.bench_ftn("clf", 1, steps=1)
    assert "same mask in 2 of 2 batches" in capsys.readouterr().out
    logits, (backbone, pad_id, examples) = [], bench.make_backbone("tiny")
    for side in (bench.Gated, bench.Loops):
        torch.manual_seed(0)
        model = side(backbone, pad_id, examples[:2], "one")
        gating = model.gating(model.h_bar)
        logits.append(model.model.logits(examples[:2], gating)[0])
        model.model.detach()
    torch.testing.assert_close(*logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_exact_lock_holds_too(micro, tmp_path):
    """On a GPU, too, the exact lock keeps the first task's logits to the bit."""
    for task in ("alpaca", "code"):
        train.main(micro(task, tmp_path / "run", "--lock", "--device", "cuda"))
    assert Run(tmp_path / "run").manifest["results"][-1]["identical"]["alpaca"] == [32, 32]
