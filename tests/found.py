"""Versions found, and weighed, by what they lose on a few labelled records."""

import json

import pytest
import torch

import eval as evaluation
from commit import Run, weigh
from eval import most_like, open_run
from model import NIWF, response_nll
from plumbing.passes import computed_once
from plumbing.prompts import encode
from plumbing.targets import layers_of
from studies import found
from tests.builders import RECORD, answers, asked, copy_of, evaluate, fake_commit, git, micro_backbone, opened
from tests.builders import random_bank, random_examples, random_gating, refused, rows_in, snapshot_of


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """A run folder of five random versions."""
    folder = tmp_path_factory.mktemp("five") / "run"
    for seed in range(5):
        fake_commit(folder, f"t{seed}", seed)
    return folder


@pytest.mark.parametrize("count, kept", [(9, 3), (1, 9)])
def test_weights_of_versions_are_algorithm_1_written_out(five, count, kept):
    """Every record is computed alone, and Adam by its formula, on a backbone in double precision."""
    run, model = opened(five, micro_backbone().double())
    examples, n = random_examples(count), len(run.versions)
    tokens = sum(len(response) for _, response in examples)
    m = torch.full((n,), 1 / n, dtype=torch.float64).log()  # sigma(m) = 1 / (n + 1)
    first = second = 0
    for t in range(1, 5):
        m, loss = m.requires_grad_(), 0
        for prompt, response in examples:
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


def test_bare_layers_are_computed_once_for_all_gatings():
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
    run, model = opened(five)
    losses = {"t0": 3.0, "t1": 2.5, "the bare backbone": 2.0}
    monkeypatch.setattr(evaluation, "read_examples", lambda *_: random_examples(4))
    monkeypatch.setattr(evaluation, "perplexity_under", lambda *_: losses)
    assert most_like(run, model, None, "FILE") == evaluation.BARE
    assert capsys.readouterr().out == "[perplexity on FILE: the bare backbone 2.000, t1 2.500, t0 3.000]\n\n"


def test_a_found_composition_is_an_ordinary_one(two, tmp_path, capsys):
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


@pytest.mark.parametrize(
    "text, why",
    [
        ("[]", "there are none"),
        (json.dumps([RECORD, {"instruction": "x"}]), "record 2"),
        (json.dumps([RECORD, RECORD | {"output": " "}]), "2 read: 1 usable, 1 empty"),
        (json.dumps([RECORD | {"label": False}]), "1 read"),
    ],
)
def test_records_to_be_like_are_all_usable_or_refused(two, text, why, tmp_path):
    (tmp_path / "few.json").write_text(text)
    for command in (
        lambda *like: evaluate(two, "--prompt x --like", *like),
        lambda *like: git(two, "compose --name new --like", *like),
    ):
        with refused(why, two):
            command(tmp_path / "few.json")


def test_the_study_counts_what_it_says(micro, tmp_path, capsys):
    """All styles have the same inputs, so each input goes home in one of six. What is there is not trained
    again, and the same rows come out."""
    options = micro("x", tmp_path)
    small = options[options.index("--device") :] + ["--epochs", "1"]

    def run(table, *more):
        path = tmp_path / f"{table}.json"
        argv = [table, "--backbone", micro.folder, "--seeds", "1", "--out", str(tmp_path / "out"), *small]
        found.main([*argv, *more, "--json", str(path)])
        return rows_in(path)

    rows = run("styles")
    assert sum(row["routed home"] for row in rows) == 1 and len(rows) == 6
    assert all(0 <= row[f"found from {n}"] <= 1 for row in rows for n in (1, 4, 16))
    assert run("styles") == rows and "nothing to train" in capsys.readouterr().out
    (row,) = run("kinds", "--learned", "3", "--held", "1")
    learned = {*Run(tmp_path / "out" / "kinds-0").tasks}
    assert len(learned) == 3 and row["task"] not in learned
    assert all({*row["composed"][n]} == learned for n in ("16", "64"))
    assert all(row[f"{what}, {n}"] > 1 for what in ("best single", "composition", "LoRA") for n in (16, 64))
