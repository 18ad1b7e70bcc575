"""FTN's experiments: tasks, masks, locks, baselines, kept rows, and what the programs refuse."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import threading
import types

import pytest
import torch

import commit
import eval as evaluation
import synthetic
import train
from ftn import PrivateMLPs, unpack
from model import response_nll
from plumbing import rows as kept
from plumbing.prompts import encode
from plumbing.tables import spread
from studies import digits, likelier, neurons, sequence, settings, styles, support, tables, variants
from studies import found as found_study
from studies import sure as sure_study
from studies.neurons import StudyRow
from studies.styles import StyleRow, StyleStream
from tests.builders import HERE, VOCABULARY, micro_model, refused, rows_in, run_quietly, snapshot_of
from tests.builders import tiny_tokenizer, wait_until

SMALL = dict(steps=12, batch=32, side=8, k=8, layers=3, width=4)
SMALL_STYLE = dict(steps=2, tasks=2, side=4, k=4, rank=2, support=4)
KNOWN = neurons.KNOWN | styles.METHODS


def learner_of(row):
    learner, mask = KNOWN[row.method]
    return learner(row, mask)


def run_row(row):
    return synthetic.run_row(row, KNOWN[row.method])


def nothing_moved(out):
    return not any(out["parameters_moved"] + out["outputs_moved"])


@pytest.mark.parametrize("variant, inputs, centre", [("clf", "uniform", 0.5), ("reg", "gaussian", 0.0)])
def test_every_task_has_the_same_inputs_and_targets_of_its_own(variant, inputs, centre):
    """Tasks share inputs and differ in targets, and training, search and test share no point."""
    row = StudyRow(variant, "nomask", 5, inputs=inputs)
    world, again = row.world(), row.world()
    batches = [world.batch(t, 4000, synthetic.generator("x")) for t in range(3)]
    assert all(torch.equal(x, batches[0][0]) for x, _ in batches)
    assert torch.equal(again.batch(1, 4000, synthetic.generator("x"))[1], batches[1][1])
    targets = [y.flatten().float() for _, y in batches]
    assert all((a - b).abs().mean() > 0.1 for a, b in itertools.combinations(targets, 2))
    assert all(abs(y.mean() - centre) < 0.05 for y in targets)
    # What a mask is searched on is not what it is scored on, and neither has been trained on.
    for t in range(3):
        trained = world.batch(t, 256, synthetic.generator(5, t, 0))[0]
        points = [{*map(tuple, x.tolist())} for x in (world.support[t][0], world.test[t][0], trained)]
        assert len(set.union(*points)) == sum(map(len, points))


@pytest.mark.parametrize("leak", ["none", "decay", "moments", "bias"])
def test_fixed_masks_keep_every_bit_under_all_precautions(leak):
    """A shared bias moves outputs alone; no leak moves the last task."""
    out = run_row(StudyRow("clf", "fixedmask", 0, leak=leak, **SMALL))
    moved = [[bool(share) for share in out[f"{what}_moved"]] for what in ("parameters", "outputs")]
    assert moved[0] == [leak in ("decay", "moments")] * 2 + [False]
    assert moved[1] == [leak != "none"] * 2 + [False]
    if leak == "none":
        assert synthetic.row_summary(out)["stored_fm"] == synthetic.row_summary(out)["recovered_fm"] == 0.0


DISJOINT = [(variant, "uniform", "ftn-slow-lock") for variant in ("clf", "reg")]
DISJOINT += [("clf", "gaussian", "ftn-slow-lock"), ("clf", "uniform", "random-disjoint-recall")]


@pytest.mark.parametrize("variant, inputs, method", DISJOINT)
def test_disjoint_masks_keep_stored_tasks_to_the_bit(variant, inputs, method):
    """Tasks whose masks share no neuron keep parameters and outputs to the bit, and forget nothing."""
    outs = [run_row(StudyRow(variant, method, seed, inputs=inputs, tasks=4, **SMALL)) for seed in (0, 1)]
    assert outs[0]["winners"] != outs[1]["winners"]
    for out in outs:
        assert nothing_moved(out) and synthetic.row_summary(out)["stored_fm"] == 0.0
        assert not any(out["overlap_last"]) and not any(out["overwritten"])
        assert len({*sum(out["winners"], [])}) == 4 * SMALL["k"]


RECALLED = ("clf", "ftn-slow-lock"), ("reg", "random-disjoint-recall"), ("clf", "ftn-slow-hidden-recall")
RECALLED = [
    *(synthetic.Row(*row, 0, **SMALL) for row in RECALLED),
    StyleRow("lora-ftn-lock", 0, **SMALL_STYLE),
]


@pytest.mark.parametrize("row", RECALLED)
def test_a_support_batch_recalls_the_mask_of_lowest_loss(row):
    """A recall returns the stored mask whose loss on the support batch is lowest, for neurons and LoRAs."""
    learner = learner_of(row)

    def literal(winners, *batch):
        if row.variant == "style":
            with learner.components.applied(learner.components.take(winners)):
                return learner.loss(*batch).item()
        x, y = batch
        return learner.loss(learner.grid(x, torch.zeros(row.side**2).index_fill(0, winners, 1.0)), y).item()

    for t in range(2):
        learner.begin(t)
        rng = synthetic.generator(t)
        for _ in range(20):
            batch = learner.world.batch(t, row.batch, rng)
            learner.train(t, *batch)
        learner.end(t, *batch)
    for t in range(2):
        losses = [literal(winners, *learner.world.support[t]) for winners in learner.stored]
        assert learner.mask.recover(learner, t) is learner.stored[t if losses[t] < losses[1 - t] else 1 - t]


def test_recall_changes_what_is_recovered_and_no_training():
    """Recall changes the scores of recovery alone: masks, training and stored scores keep every bit."""
    told, recalled = (run_row(synthetic.Row("clf", m, 0, **SMALL)) for m in ("fixedmask", "fixedmask-recall"))
    assert told["R_stored"] == recalled["R_stored"] == told["R_recovered"]
    rows = [synthetic.Row("reg", f"ftn-slow-hidden{how}", 0, **SMALL) for how in ("", "-recall")]
    searched, recalled = map(run_row, rows)
    assert all(searched[key] == recalled[key] for key in ("R_stored", "winners", "overwritten"))
    assert searched["R_recovered"] != recalled["R_recovered"]


@pytest.mark.parametrize("method, blind", [("ftn-slow-hidden", True), ("ftn-slow", False)])
def test_a_search_may_be_blind_to_what_earlier_tasks_trained(method, blind):
    """What the first 32 of 64 neurons learned must not reach a blind search. The smoothing mixes neighbours,
    so it is left out; at test time everything is seen."""
    learner = learner_of(synthetic.Row("clf", method, 0, **SMALL))
    learner.mask = dataclasses.replace(learner.mask, kernel=1, rounds=0)
    learner.begin(0)
    learner.touched[0][:32] = True
    learner.begin(1)
    found = []
    for scale in (1, 100):
        learner.grid.readout.data[:, :32] *= scale
        searched = learner.mask.mask_for(learner, 1, *learner.world.support[1])
        found.append((searched, learner.mask.recover(learner, 1)))
    assert [torch.equal(*both) for both in zip(*found)] == [blind, False]


def test_few_labels_are_tried_at_the_end_of_a_stream(capsys):
    """The stored scores are those of the published stream to the last bit; where masks are disjoint and
    recalled, a task that was found is answered as with its own mask."""
    outs = []
    for method in ("random-disjoint-recall", "ftn-slow", "supsup-0.003"):
        row = support.SupportRow("clf", method, 0, draws=2, **SMALL)
        out, published = support.run_row(row, support.METHODS[method]), run_row(row)
        outs.append(out)
        assert out["stored"] == published["R_stored"][-1]
        assert {*out["ways"]} == {"recall", *(["search"] if method == "ftn-slow" else [])}
        for measured in out["ways"].values():
            cells = [sum(map(list, measured[name]), []) for name in support.MEASURES]
            assert [len(c) for c in cells] == [3 * len(support.SIZES)] * 3
            assert all(0 <= x <= 1 for c in cells for x in c)
            if method != "ftn-slow":
                assert all(s == f for _, f, s in zip(*cells))
                scores = zip(cells[0], cells[1], out["stored"] * len(support.SIZES))
                assert all(score == pytest.approx(own) for score, found, own in scores if found == 1)
    support.print_tables(outs)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("ftn-slow, search") for line in lines) == len(support.MEASURES)
    pytest.importorskip("matplotlib")
    assert [len(axis.lines) for axis in support.draw(outs).axes] == [4, 5]  # a line a method and way; chance


def test_a_recovery_sees_the_labels_it_says_and_is_judged():
    """A recovery sees exactly as many labels as its size says, and is judged by the mask that it finds."""
    learner = learner_of(support.SupportRow("clf", "ftn-slow", 0, **SMALL))
    for t in range(2):
        learner.begin(t)
        learner.stored[t] = torch.arange(8) + 6 * t  # two of eight neurons in common
    seen = []

    def recover(t):
        seen.append(learner.world.support[t])
        return learner.stored[1]

    for t, size, draw in ((0, 4, 0), (0, 4, 0), (0, 4, 1), (1, 64, 0)):
        score, found, share = support.recovered(learner, recover, t, size, draw)
        assert score == learner.score(learner.stored[1], *learner.world.test[t])
        assert (found, share) == ((0, 0.25) if t == 0 else (1, 1))
    assert [len(x) for x, _ in seen] == [len(y) for _, y in seen] == [4, 4, 4, 64]
    assert torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][0], seen[2][0])


def test_few_sentences_are_of_those_set_aside_for_support():
    """The sentences that a style is found from are neither trained on nor scored on."""
    row = support.StyleSupportRow("lora-ftn-lock", 0, **SMALL_STYLE)
    world = styles.StyleStream(row, tiny_tokenizer())
    world.aside = [*world.support]
    for n in row.sizes[:3]:
        (few,) = row.few(world, 1, n, synthetic.generator(n))
        told = [prompt for prompt, _ in few]
        assert len(told) == n and all(example in world.aside[1][0] for example in few)
        assert not any(p in told for p, _ in world.training[1] + world.test[1][0])


def test_tasks_on_digits_rename_the_classes_of_the_same_images(monkeypatch, capsys):
    """Tasks on digits permute the labels of the same images, and disjoint masks keep them to the bit."""
    pytest.importorskip("sklearn")
    small = dict(SMALL, batch=16)
    world = digits.DigitsRow("clf", "nomask", 3, **small).world()
    x, y = zip(*(world.batch(t, 500, synthetic.generator("x")) for t in range(3)))
    assert torch.equal(x[0], x[1]) and torch.equal(x[0], x[2])
    for other in y[1:]:  # one to one, and not the identity
        pairs = {*zip(y[0].tolist(), other.tolist())}
        assert len(pairs) == 10 == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        assert not torch.equal(y[0], other)
    parts = [part[0][0] for part in (world.training, world.support, world.test)]
    assert sum(map(len, parts)) == 1797 and len(parts[1]) == digits.SUPPORT
    assert parts[0].mean(0).abs().max() < 1e-4 and all(p.isfinite().all() for p in parts)
    for method in ("ftn-slow-lock", "random-disjoint-recall"):
        out = synthetic.run_row(digits.DigitsRow("clf", method, 3, **small), digits.METHODS[method])
        assert nothing_moved(out) and not any(out["overlap_last"])
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    line = run_quietly(digits.main, ["--methods", "fixedmask", "--steps", "1", "--workers", "1"], capsys)
    assert "pip install scikit-learn" in line


def test_a_row_of_settings_changes_one_thing_alone():
    """A row of the study of settings is FTN-Slow but for one setting, or has the same tasks in its order."""
    row = lambda name: settings.SettingsRow("clf", name, 3, **settings.OF_ROW.get(name, {}))
    alone = {name: dataclasses.asdict(row(name)) for name in settings.METHODS}
    changed = {n: [k for k in d if k != "method" and d[k] != alone["paper"][k]] for n, d in alone.items()}
    assert all(len(changed[n]) == (n != "paper" and n not in settings.OF_MASK) for n in changed)
    masks = {name: how[1] for name, how in settings.METHODS.items()}
    assert masks["paper"] == masks["k-64"] == neurons.KNOWN["ftn-slow"][1] and masks["T-5"].rounds == 5
    x = torch.rand(20, 2)
    plain, turned = row("paper").world(), row("order-1-2-0").world()
    assert [torch.equal(plain.signal(1, x), turned.signal(t, x)) for t in range(3)] == [True, False, False]


def test_one_generator_serves_all_seeds_where_one_is_named():
    """A named generator gives all seeds the same targets, on test points that differ between seeds."""

    def world(seed, **given):
        return StudyRow("clf", "nomask", seed, **given).world()

    x = torch.rand(50, 2)
    own, other = (world(seed).signal(0, x) for seed in (1, 2))
    shared = [world(seed, generator=1) for seed in (1, 2)]
    assert not torch.equal(own, other) and all(torch.equal(w.signal(0, x), own) for w in shared)
    assert not torch.equal(shared[0].test[0][0], shared[1].test[0][0])
    slow = world(1, frequency=4.0)
    literal = (4 * (slow.W[:8] @ x.T + slow.b[:8])).sin().T @ slow.v[0]
    torch.testing.assert_close(slow.signal(0, x), literal)


def test_without_the_lock_a_shared_neuron_forgets():
    """Nothing keeps later masks off: of nine tasks, one more than fit, some overwrite another, and those
    alone move."""
    out = run_row(synthetic.Row("clf", "ftn-slow", 0, tasks=9, **SMALL))
    hit = [False] * 9
    for (i, _), share in zip(itertools.combinations(range(9), 2), out["overwritten"]):
        hit[i] |= share > 0
    assert any(hit) and [p > 0 for p in out["parameters_moved"]] == hit


def test_a_full_grid_and_no_finite_score_are_refused():
    """A full grid is refused unless it may grow, and a score that is not finite is refused with its task."""
    nine = dict(SMALL, tasks=9, steps=2)
    with refused("the grid is full: 64 of its 64 .*--grow"):
        run_row(synthetic.Row("clf", "ftn-slow-lock", 0, **nine))
    out = run_row(synthetic.Row("clf", "ftn-slow-lock", 0, grow=True, **nine))
    assert out["final_side"] == 12 and len(out["R_stored"]) == 9 and nothing_moved(out)
    learner = learner_of(StudyRow("clf", "ftn-slow-lock", 0, leak="moments", grow=True, **SMALL))
    learner.begin(0)
    learner.grid.free.zero_()
    learner.begin(1)
    trained = {*map(id, learner.optimizer.param_groups[0]["params"])}
    assert trained == {*map(id, learner.grid.parameters())}  # those of the new grid
    with refused("not finite in task 1"):
        run_row(synthetic.Row("reg", "fixedmask", 0, **dict(SMALL, lr=1e30)))


def test_ewc_adds_the_gradient_of_its_penalty(double):
    """EWC adds the gradient of strength / 2 sum F (theta - theta*)^2, with F from single examples."""
    learner = learner_of(synthetic.Row("reg", "ewc", 0, **SMALL))
    world, rng = learner.row.world(), synthetic.generator("ewc")
    learner.begin(0)
    for _ in range(5):
        learner.train(0, *world.batch(0, 32, rng))
    x, y = world.batch(0, 6, rng)
    learner.end(0, x, y)
    theta = list(learner.grid.parameters())
    squares = [torch.zeros_like(p) for p in theta]
    for i in range(6):
        one = learner.grid(x[i : i + 1], torch.ones(64))
        for s, g in zip(squares, torch.autograd.grad((one - y[i]).square().mean(), theta)):
            s += g * g / 6
    ((importance, anchor),) = learner.fisher
    torch.testing.assert_close(importance, squares, rtol=1e-3, atol=1e-9)
    for p in theta:
        p.data += 0.01 * torch.randn_like(p)
    penalty = sum(400 / 2 * (f * (p - a) ** 2).sum() for f, p, a in zip(importance, theta, anchor))
    x, y = world.batch(1, 32, rng)
    learner.row = dataclasses.replace(learner.row, dropout=0.0)
    wanted = torch.autograd.grad(penalty + (learner.grid(x, torch.ones(64)) - y).square().mean(), theta)
    learner.begin(1)
    learner.optimizer.step = lambda: None
    learner.train(1, x, y)
    torch.testing.assert_close([p.grad for p in theta], [*wanted], rtol=1e-3, atol=1e-6)


def test_a_supermask_is_learned_straight_through_and_kept(double):
    """A supermask's scores get straight-through gradients over frozen weights, and no stored task moves."""
    learner = learner_of(synthetic.Row("clf", "supsup-wide", 0, dropout=0.0, **SMALL))
    frozen = [w.clone() for w in learner.weights]
    for W, b in zip(*unpack(frozen[0], learner.grid.shapes)):
        assert W.abs().unique().numel() == 1 and (b == 0).all()  # signed constants
    x, y = learner.row.world().batch(0, 32, synthetic.generator("supsup"))
    learner.begin(0)
    scores = [s.clone().requires_grad_() for s in learner.scores]
    theta, readout = [(s > 0).float() * w + (s - s.detach()) * w for s, w in zip(scores, frozen)]
    z = PrivateMLPs.apply(theta, x, learner.grid.shapes)
    wanted = torch.autograd.grad(learner.loss((readout @ z).T, y), scores)
    learner.train(0, x, y)
    torch.testing.assert_close([s.grad for s in learner.scores], [*wanted])
    assert nothing_moved(run_row(synthetic.Row("clf", "supsup", 0, **SMALL)))


@pytest.mark.parametrize("gain, method", [(4.0, "supsup-wide-top-0.003"), (2.0, "supsup-wide-he-top-0.03")])
def test_a_top_supermask_keeps_half_of_every_layer_on(gain, method):
    """A top supermask has half of every layer's weights on, and its name sets their scale and its rate."""
    learner = learner_of(synthetic.Row("clf", method, 0, **SMALL))
    for W in learner.layers(learner.weights)[:-1]:
        torch.testing.assert_close(W.abs(), torch.full_like(W, (gain / W.shape[2]) ** 0.5))
    learner.begin(0)
    for _ in range(3):
        learner.train(0, *learner.world.batch(0, 32, synthetic.generator("top")))
    for mask in learner.layers(learner.stored[0]):
        assert mask.sum() * 2 == mask.numel()
    assert learner.optimizer.param_groups[0]["lr"] == float(method.split("-")[-1])


def test_every_method_has_a_row():
    """Every method can be asked for by its name, and `all` asks for each of them once."""
    for method in neurons.KNOWN:
        args = neurons.parse_options(["--methods", method])
        assert {row.method for row in neurons.rows_of(args)} == {method}
    assert all(styles.parse_options(["--methods", method]).methods == [method] for method in styles.METHODS)
    methods = lambda *argv: synthetic.parse_options(argv).methods
    assert methods("--methods", "all") == [*synthetic.known_methods()]
    assert {*methods("--methods", "all")} - {*methods()} == {"supsup-wide"}
    assert methods("--methods", "ewc", "nomask", "ewc") == ["ewc", "nomask"]
    assert [neurons.KNOWN[f"ewc-{s}"][1].strength for s in ("40", "4000", "400000")] == [40, 4e3, 4e5]


def test_forgetting_is_positive_where_a_score_got_worse():
    """In NIWF it is relative to the perplexity when learned; in a sequence no gain is set against a loss."""
    accuracy, error = [[0.9], [0.7, 0.8], [0.6, 0.9, 0.9]], [[0.1], [0.4, 0.2], [0.3, 0.1, 0.1]]
    assert synthetic.forgetting_measure(accuracy, 1) == pytest.approx((0.3 + 0.0) / 2)
    assert synthetic.forgetting_measure(error, -1) == pytest.approx((0.2 + 0.0) / 2)
    # the formula as printed rewards the second
    assert synthetic.forgetting_measure(error, 1) == pytest.approx((0.1 + 0.1) / 2)
    rows = [{"task": "a", "stored": {"a": 4.0}}, {"task": "b", "stored": {"a": 5.0, "b": 2.0}}]
    assert evaluation.forgetting(rows, "stored") == {"a": 25.0, "b": 0.0}
    learned, last, alone = [50.0, 60.0, 70.0], [45.0, 62.0, 70.0], [50.0, 55.0, 71.0]
    wanted = {"ACC": (45 + 62 + 70) / 3, "BWT": (-5 + 2) / 2, "forgetting": (5 + 0) / 2, "FWT": (5 - 1) / 2}
    assert likelier.measures(learned, last, alone) == wanted
    assert likelier.measures([], last) == {"ACC": wanted["ACC"]}


def test_rows_are_compared_record_by_record():
    """Two rows differ by the mean over tasks of paired differences, with 1.96 times its standard error."""
    ours, theirs = {"in use": ["1101", "11"]}, {"in use": ["0100", "10"]}
    apart = [[1, 0, 0, 1], [0, 1]]
    error = sum(torch.tensor(task).float().var() / len(task) for task in apart) ** 0.5 / 2
    assert likelier.paired(ours, theirs) == pytest.approx((50.0, 196 * float(error)))
    assert likelier.paired(ours, ours) is None and likelier.paired({"in use": []}, theirs) is None
    with pytest.raises(ValueError):
        likelier.paired(ours, {"in use": ["0100", "1"]})  # other records


def test_tables_say_what_was_lost_and_what_overlaps(capsys):
    """Tables split a loss into overlap and recall, alike for accuracies and errors, and show overlaps."""
    assert spread([1.0, 2.0, 6.0]) == "3.000 ± 2.646" and spread([1.0, None]) == "1.000"
    row = dict(seed=0, tasks=3, overlap_last=[0.1, 0.2, 0.3], overlap_union=[0.7, 0.8, 0.9])

    def made(variant, method, stored, recovered):
        score = lambda x: x if variant == "clf" else 1 - x  # an error
        R = lambda now: [[*map(score, scores)] for scores in ([0.9], [0.8, 0.9], [now, now, 0.9])]
        return dict(row, variant=variant, method=method, R_stored=R(stored), R_recovered=R(recovered))

    for variant in ("clf", "reg"):
        rows = made(variant, "fixedmask", 0.9, 0.9), made(variant, "ftn-slow", 0.7, 0.65)
        tables.print_decomposition(variant, rows)
        assert capsys.readouterr().out.split("\n")[-2].split() == ["ftn-slow", "0.200", "0.050"]


def test_rows_are_kept_and_are_the_same_for_any_workers(tmp_path, monkeypatch, capsys):
    """A finished row is kept and not computed again, and is the same with any number of workers."""
    monkeypatch.chdir(tmp_path)
    command = "--variant clf --methods fixedmask ftn-slow --steps 2 --json rows.json --workers".split()

    def rows(main, *argv):
        main([*argv])
        return rows_in(pathlib.Path("rows.json"))

    written = lambda: {p: p.stat().st_mtime_ns for p in pathlib.Path("runs/synthetic").iterdir()}
    one = rows(synthetic.main, *command, "1")
    before = written()
    assert rows(synthetic.main, *command, "2") == one and written() == before
    shutil.rmtree("runs")
    two = rows(train.main, "--task", "synthetic", *command, "2")
    for row in one + two:
        for part in (row, row["summary"]):
            del part["seconds"], part["ms_per_step"]
    assert one == two and "classification" in capsys.readouterr().out


def test_a_damaged_or_swapped_kept_row_is_refused(tmp_path, monkeypatch):
    """A kept row that is damaged or belongs to another row is refused by its name, and stays as it is."""
    monkeypatch.chdir(tmp_path)
    row, other = (synthetic.Row("clf", "fixedmask", seed, **SMALL) for seed in (0, 1))
    how = KNOWN["fixedmask"]
    finished = lambda row: kept.keep_row(synthetic.run_row, row, how)
    good, bad = (kept.kept_file(r, how) for r in (row, other))
    assert finished(row) is None and kept.read_sealed(good)
    text = good.read_text()
    assert finished(row) is None and good.read_text() == text  # it is not computed again
    lies = [text, text[:-9], "", "null", "[]", "7", "{}", "[" * 100_000, text.replace("0.", "1.", 1)]
    lies += [json.dumps(json.loads(text) | {key: None}) for key in ("sha256", "result")]
    for lie in [*map(str.encode, lies), b"\xff\xfe\xff", b"\x00"]:
        bad.write_bytes(lie)
        message = finished(other)
        assert str(bad) in message and "\n" not in message
        assert bad.read_bytes() == lie and good.read_text() == text
    bad.unlink()
    assert finished(other) is None and kept.read_sealed(bad)["seed"] == 1
    with pytest.raises(KeyError, match="a bug"):  # an error of ours is not taken for a damaged file
        kept.keep_row(lambda row, how: {}["a bug"], dataclasses.replace(row, seed=2), how)


def test_a_kept_row_is_named_after_what_decides_it(tmp_path, monkeypatch):
    """A kept row's name tells seeds, methods, backbones and versions apart, so no stale row is used."""
    row, style = synthetic.Row("clf", "ftn-slow", 0), StyleRow("lora-ftn", 0, backbone=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    names = lambda: (kept.kept_file(row, KNOWN["ftn-slow"]), kept.kept_file(style, KNOWN["lora-ftn"]))
    before = names()
    assert before == names()
    others = [(dataclasses.replace(row, seed=1), KNOWN["ftn-slow"]), (row, KNOWN["ftn-fast"])]
    assert not {kept.kept_file(*other) for other in others} & {*before}
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    assert names()[0] == before[0] and names()[1] != before[1]
    monkeypatch.setattr(synthetic.Row, "VERSION", synthetic.Row.VERSION + 1)
    assert names()[0] != before[0]


def test_kept_rows_are_of_the_present_code():
    """A short row stays as it came out at the version of its class. Whoever changes what a row computes
    raises VERSION and writes down here what it is now, as rows that were kept would otherwise stay in use."""
    row = synthetic.Row("reg", "fixedmask", 0, **SMALL)
    assert row.VERSION == 1
    assert run_row(row)["R_stored"][-1] == pytest.approx([0.51136, 0.27183, 0.08664], abs=1e-3)


@pytest.mark.parametrize("former", [signal.default_int_handler, signal.SIG_IGN], ids=["heeded", "ignored"])
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_no_exception_inside_the_pool(tmp_path, monkeypatch, by, former):
    """Ctrl-C and SIGTERM end the workers, but the pool's own code, which may hold a lock just then, goes on
    to its end. Only then are they raised, even if they were ignored before, as rows are missing. The handlers
    are those of before."""
    monkeypatch.chdir(tmp_path)
    jobs = [(synthetic.Row("clf", "fixedmask", seed, **SMALL), KNOWN["fixedmask"]) for seed in range(4)]
    went_on, wait = [], kept.concurrent.futures.wait

    def interrupted(*how):
        signal.raise_signal(by)
        went_on.append(by)
        return wait(*how)

    monkeypatch.setattr(kept.concurrent.futures, "wait", interrupted)
    before = [signal.signal(s, former) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(KeyboardInterrupt):
            list(kept.finished_rows(synthetic.run_row, jobs, 2))
        assert {*went_on} == {by} and signal.getsignal(by) is former
    finally:
        for s, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(s, handler)


def living(group):
    """Return the processes of a group that have not ended, where /proc tells. One that has ended stays in the
    group until its parent, which may be init, asks for it."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it is gone since
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            found += [path.parent.name] * (int(its_group) == group and state not in "ZX")
    return found


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_experiment_leaves_one_line_and_no_process(tmp_path, by):
    """Ctrl-C ends an experiment and all its workers, and one line says that finished rows are kept. If it is
    stopped or killed alone its workers end, too."""
    command = [sys.executable, str(HERE / "synthetic.py"), "--methods", "ftn-slow", "--workers", "2"]
    fcntl, termios = map(pytest.importorskip, ("fcntl", "termios"))
    ours, its = os.openpty()  # a terminal, as the bar that is waited for is drawn on nothing else
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    how = dict(cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=its)
    process = subprocess.Popen(command, **how)
    os.close(its)
    watch = threading.Timer(300, os.killpg, (process.pid, signal.SIGKILL))  # if a worker goes on
    watch.start()
    said = b""
    with contextlib.suppress(OSError):  # at the end, when nobody holds the other side
        while part := os.read(ours, 1000):
            started, said = b"row" in said, said + part
            if b"row" in said and not started:
                (os.killpg if by == signal.SIGINT else os.kill)(process.pid, by)
    os.close(ours)
    assert watch.is_alive()
    watch.cancel()
    assert process.wait(600) == (1 if by == signal.SIGINT else -by) and b"Traceback" not in said
    if by == signal.SIGINT:
        assert said.strip().splitlines()[-1].startswith(b"synthetic.py: stopped; finished rows are kept")
        assert not living(process.pid)


def test_the_process_that_measures_ends_with_its_benchmark(tmp_path):
    """A benchmark that is killed leaves no process, though the one that measures is at work."""
    pytest.importorskip("fcntl")
    work = f"import pathlib, time; pathlib.Path({str(tmp_path / 'began')!r}).touch(); time.sleep(6000)"
    code = f"from studies.bench import in_own_process; in_own_process(exec, {work!r})"
    how = dict(cwd=HERE, start_new_session=True, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([sys.executable, "-c", code], **how)
    try:
        wait_until(lambda: (tmp_path / "began").exists() or process.poll() is not None)
        process.kill()
        assert process.wait() == -signal.SIGKILL and (tmp_path / "began").exists()
        wait_until(lambda: not living(process.pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "main, options, message",
    [
        (synthetic.main, "--methods lora-ftn", "lora-ftn is not among fixedmask"),
        (synthetic.main, "--experiment 2 --methods ewc", "ewc is not among lora-fixedmask"),
        (synthetic.main, "--experiment 2 --backbone no/such", "6 of 6 rows were not computed: .*no/such"),
        (synthetic.main, "--methods fixedmask --tasks 9 --steps 1 --variant clf", "hold 8 fixed masks"),
        (neurons.main, "--search nan 1", "--search: nan is out of range"),
        (neurons.main, "--search 10 inf", "out of range"),
        (neurons.main, "--search 1.5 1", "--search 1.5 is not a number of steps"),
        (neurons.main, "--search 1", "expected 2"),
        (neurons.main, "--frequency 0", "--frequency: 0 is out of range"),
        (train.main, "--lr 1", "--task"),
        (train.main, "--task alpaca --data=", "--data: its value is empty"),
        (train.main, "--task alpaca --out=", "--out: its value is empty"),
        (commit.main, "log --run=", "--run: its value is empty"),
        (commit.main, "compose a --name b --like=", "--like: its value is empty"),
        (evaluation.main, "--prompt x --like=", "--like: its value is empty"),
        (train.main, "--task poems --backbone tiny --device cpu", "brings no data of its own"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(main, options, message, tmp_path, monkeypatch, capsys):
    """An experiment or a training that cannot be run is refused in one line, and writes no file."""
    monkeypatch.chdir(tmp_path)
    assert re.search(message, run_quietly(main, options.split(), capsys))
    assert not [*tmp_path.iterdir()]


STYLE_ROWS = [("lora-fixedmask", {}), ("lora-ftn-lock", {}), ("lora-naive", {})]
STYLE_ROWS += [("lora-ftn", {"reconfigure": "every"}), ("lora-ftn", {"b_std": 0.01})]


@pytest.mark.parametrize("method, more", STYLE_ROWS)
def test_disjoint_components_keep_every_stored_style_to_the_bit(method, more):
    """Other ways to use the pool run, too, and the naive one moves nearly everything."""
    out = run_row(StyleRow(method, 0, **more, **SMALL_STYLE))
    assert all(0 < ce < 20 for ce in out["R_stored"][-1] + out["R_recovered"][-1])
    assert method != "lora-naive" or all(p > 0.9 for p in out["parameters_moved"][:-1])
    if method in ("lora-fixedmask", "lora-ftn-lock"):
        s = synthetic.row_summary(out)
        assert s["stored_fm"] == 0.0 and nothing_moved(out) and not any(out["overlap_last"])
        assert method == "lora-ftn-lock" or s["recovered_fm"] == 0.0


def test_the_bank_takes_a_component_of_the_same_size_per_task():
    """The bank gives each task its component of lowest loss, and under the lock none serves two tasks."""
    out = learner_of(StyleRow("lora-bank", 0, **SMALL_STYLE))
    A, B = next(iter(out.components.parts.values()))
    assert A.shape[:2] == (4, 8) and 0 < B.std() < 2e-3  # 16 components of rank 2, four at a time
    out.begin(0)
    out.train(0, out.world.training[0][:4])
    assert out.stored[0].numel() == 1
    losses = [out.mean_loss(torch.tensor([i]), *out.world.support[0]) for i in range(4)]
    chosen = out.mask.mask_for(out, 0, *out.world.support[0])
    assert losses[int(chosen)] == min(losses) < max(losses)
    free, locked = (run_row(StyleRow(m, 0, **SMALL_STYLE)) for m in ("lora-bank", "lora-bank-lock"))
    for row in (free, locked):
        offered = [[math.inf if x is None else x for x in losses] for losses in row["offered"]]
        assert row["chosen"] == [losses.index(min(losses)) for losses in offered]
    assert len({*locked["chosen"]}) == locked["tasks"] and synthetic.row_summary(locked)["stored_fm"] == 0.0
    assert [losses.count(None) for losses in locked["offered"]] == list(range(locked["tasks"]))


def test_styles_share_sentences_and_parts_share_none():
    """A tokenizer without a token that ends a response is refused."""
    tokenizer = tiny_tokenizer()
    world = StyleStream(StyleRow("lora-ftn", 4), tokenizer)
    styles_in_parts = zip(world.test, world.support, world.training)
    parts = [[{tuple(p) for p, _ in part} for part in (a[0], b[0], c)] for a, b, c in styles_in_parts]
    assert all(p == parts[0] for p in parts) and [len(p) for p in parts[0]] == [24, 16, 80]
    assert len(set.union(*parts[0])) == 120
    said = ["THE RED FOX", "the red fox", "Fox red The", "The The red red Fox Fox", "Th* r*d F*x"]
    assert [f("The red Fox") for f in world.STYLES.values()] == [*said, "Arr! The red Fox matey!"]
    assert all(r[-1] == tokenizer.eos_token_id for (examples,) in world.test for _, r in examples)
    tokenizer.eos_token = None
    with refused("tiny: its tokenizer has no token that ends"):
        StyleStream(StyleRow("lora-ftn", 0), tokenizer)


METHODS = "bare niwf lora-each lora-one lora-multi average o-lora-0.5 niwf-printed".split()
LABELS = {"colour": ["Red", "Deep Blue"], "size": ["Small", "Large", "Very Large"]}
LABELS["truth"] = ["True", "False"]


@pytest.fixture(scope="session")
def toy(micro, tmp_path_factory):
    """Make a folder of three toy tasks, and return how `studies.sequence` is told to learn them."""
    folder, r = tmp_path_factory.mktemp("toy"), random.Random(0)
    for task, labels in LABELS.items():
        for part, n in (("train", 20), ("choose", 9), ("test", 11)):
            asked = [{"instruction": f"Say the {task}.", "input": f"{part} {r.random()}"} for _ in range(n)]
            rows = [row | {"output": label} for row, label in zip(asked, itertools.cycle(labels))]
            (folder / f"{task}.{part}.json").write_text(json.dumps(rows))
    small = "--examples 16 --val-examples 10 --batch 8 --lr 0.02 --device cpu --field-hidden 16 --coord-dim 8"
    said = ["--backbone", micro.folder, "--data", folder, "--orders", ",".join(LABELS), *small.split()]

    def argv(out, *methods):
        return [str(x) for x in [*said, "--anchors", 32, "--out", out, "--methods", *methods]]

    return argv


@pytest.fixture(scope="session")
def sequences(toy, tmp_path_factory):
    """Let methods of every kind learn the toy tasks. Return where, and what was written of each."""
    out = tmp_path_factory.mktemp("sequences") / "runs"
    return out, learned_sequence(toy, out, *METHODS)


def learned_sequence(toy, out, *methods):
    """Learn the toy tasks by these methods. Return {method: what is written of it}."""
    path = out.with_suffix(".json")
    sequence.main([*toy(out, *methods), "--json", str(path)])
    return {row["method"]: row for row in rows_in(path)}


def row_of(toy, out, method):
    args, rest = sequence.parse_options(toy(out, method))
    return sequence.Row(method, args.orders[0], likelier.Tasks([*LABELS], args, rest), args, rest)


def scores_alone(model, example, gating_of):
    """Return the log-probabilities of all labels, each in a pass of its own, without a batch or a cache."""
    prompt, labels = example
    gating = gating_of(model.probe([prompt]))
    return [-float(response_nll(*model.logits([(prompt, label)], gating))) for label in labels]


def see_judged(scores, right, judged):
    """See that a label is judged as it is by the log-probabilities of all."""
    best, second, *_ = sorted(scores, reverse=True)
    if best - second >= 0.01 or best - scores[right] >= 0.01:  # else rounding decides
        assert judged == (scores[right] == best)


def test_labels_are_judged_as_a_literal_loop_judges_them(toy, sequences):
    """Labels are judged as in a literal loop, under a task's own version and the one that a router chose; a
    label's tokens are all the likeliest if and only if greedy decoding gives it."""
    row, written = row_of(toy, sequences[0], "niwf"), sequences[1]["niwf"]
    found = row.kept.found
    with row.opened() as (run, model):
        under = lambda i: functools.partial(run.stored, i)
        for i, task in enumerate(LABELS):
            examples, right, records = row.tasks.held_out[task]
            assert [sorted(LABELS[task])[n] for n in right] == [r["output"] for r in records]
            alone = functools.cache(lambda v, n, some=examples: scores_alone(model, some[n], under(v)))
            batch, _ = likelier.label_scores(model, examples, under(i))
            for n, (prompt, _) in enumerate(examples):
                see_judged(alone(i, n), right[n], found[f"last {task}"]["likelier"][n])
                torch.testing.assert_close(batch[n], torch.tensor(alone(i, n)), rtol=1e-3, atol=1e-3)
                (said,) = model.generate([prompt], under(i), -1, 4)
                other = [*said[:2], (said[2] + 1) % VOCABULARY, said[3]]
                _, greedy = likelier.label_scores(model, [(prompt, [said, other])], under(i))
                assert greedy.tolist() == [[True, False]]
            for router, sent in found["choices"][task].items():
                assert written["home"][router][i] == [sent.count(v) for v in range(3)]
                judged = found[f"routed {task}"][router]["likelier"]
                assert written["routed"][router]["right"][i] == 100 * statistics.mean(judged)
                for n, version in enumerate(sent):
                    see_judged(alone(version, n), right[n], judged[n])
            routed = run.routed(model.probe([prompt for prompt, _ in examples]))[1].choice.tolist()
            assert routed == found["choices"][task]["regions, prompt"]


def test_a_sequence_keeps_every_bit_of_kept_versions(sequences):
    """In a sequence NIWF and a LoRA a task keep every bit, and the other methods that learn do not."""
    for method, row in sequences[1].items():
        if not row["learned"]:
            continue
        exact = method in ("niwf", "lora-each")
        assert (row["identical"]["tasks"] == 3) == exact, method
        same, n = map(sum, zip(*row["identical"]["logits"].values()))
        assert same == n or not exact, method
        if exact:
            assert row["stored"]["BWT"] == row["stored"]["forgetting"] == 0 and row["learned"] == row["last"]


def test_rows_of_a_sequence_hold_what_their_method_says(toy, sequences):
    """A row of a sequence trains the tasks, replays the records and sums the LoRAs that its method names."""
    out, rows = sequences
    assert [*rows] == METHODS
    trained = {name: [*row["seconds"]] for name, row in rows.items()}
    assert trained["niwf"] == trained["o-lora-0.5"] == [*LABELS] and trained["lora-multi"] == ["all"]
    assert not trained["bare"] and not trained["average"]
    assert all(0 <= x <= 100 for row in rows.values() for x in row["last"] + row["exact"])
    tasks = row_of(toy, out, "lora-replay").tasks
    assert [len(tasks.records(task, 0.25)[0]) for task in LABELS] == [16, 16 + 4, 16 + 8]
    assert len(tasks.records("all")[0]) == 3 * 16
    once, apart = (row_of(toy, out, name) for name in ("average", "lora-each"))
    with once.opened() as (run, model), apart.opened():  # Delta W is the mean of what the LoRAs add
        indices, weights = once.named(run, 0)(model.probe([[5, 6, 7]]))
        assert indices[0, 0].tolist() == [0, 1, 2] and torch.equal(weights, torch.full_like(weights, 1 / 3))
    with row_of(toy, out, "o-lora-0.5").opened() as (run, model):
        indices, weights = row_of(toy, out, "o-lora-0.5").named(run, 0)(model.probe([[5, 6, 7]]))
        assert sorted(indices[0, 0].tolist()) == [0, 1, 2] and torch.equal(weights, torch.ones_like(weights))


def test_the_penalty_of_orthogonal_loras_is_a_literal_loop(monkeypatch):
    """The penalty is strength times the sum of squared products of rows of an old A and a new one, beside
    the terms of Eq. (9)."""
    model = micro_model(bases=1, committed=2)
    learner = types.SimpleNamespace(model=model)
    monkeypatch.setattr(variants, "LOSSES", lambda *_: {"lm": torch.tensor(1.0), "lock": torch.tensor(0.25)})
    found = variants.orthogonal(learner, None, None, None, 0.5, None, strength=0.5)
    wanted = 0.0
    for key, (new,) in model.bank.live.items():
        if key.endswith(".A"):
            old = model.bank.committed[0].tensors[key]
            wanted += sum(float((a @ b).detach()) ** 2 for basis in old for a in basis for b in new)
    assert found["lm"] == 1
    torch.testing.assert_close(float(found["lock"].detach()), 0.25 + 0.5 * 0.5 * wanted, rtol=1e-4, atol=0)
    found["lock"].backward()
    assert all((p.grad is not None) == key.endswith(".A") for key, p in model.bank.live.items())


def test_the_penalty_of_ewc_is_that_of_a_literal_loop(monkeypatch):
    """EWC's penalty is 0 at the start of the second task, then strength / 2 sum F (theta - theta*)^2."""
    model = micro_model(bases=1)
    gating = torch.zeros(1, model.bank.layers, 1, dtype=torch.long), torch.ones(1, model.bank.layers, 1)
    learner = types.SimpleNamespace(model=model, dynamics=lambda h: h, gating=lambda z: gating)
    examples = [([5, 6], [7, 8]), ([9], [10, 11])]
    monkeypatch.setattr(variants, "LOSSES", lambda *_: {"lm": torch.tensor(1.0), "lock": torch.tensor(0.0)})
    monkeypatch.setattr(train, "load_data", lambda *_: (examples, None))
    (terms,) = variants.consolidated(3.0).values()
    args = types.SimpleNamespace(task="code", data=None, val_data=None, backbone="tiny")
    penalty = lambda: float(terms(learner, None, torch.zeros(1, 4), args, 0.5, None)["lock"].detach())
    assert penalty() == 0
    wanted = 0.0
    for p in model.bank.live.values():
        nll = (response_nll(*model.logits([example], gating)).sum() for example in examples)
        fisher = sum(torch.autograd.grad(each, p)[0].square() for each in nll) / 200
        wanted += 0.5 * 3.0 / 2 * float((fisher * 0.01**2).sum())
    for p in model.bank.live.values():
        p.data += 0.01
    assert penalty() == pytest.approx(wanted, rel=1e-3)


def test_a_sequence_that_was_killed_goes_on_from_its_last_task(toy, sequences, tmp_path, monkeypatch, capsys):
    """A killed sequence goes on after its last finished task, and ends with the row of an undisturbed run."""
    train_with, calls = sequence.train_with, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_with(*args)

    monkeypatch.setattr(sequence, "train_with", killed)
    with pytest.raises(KeyboardInterrupt):
        sequence.main(toy(tmp_path / "runs", "niwf"))
    before = snapshot_of(tmp_path / "runs")
    capsys.readouterr()
    sequence.main([*toy(tmp_path / "runs", "niwf"), "--summary"])
    assert re.search(r"NIWF exact.*  \d+ *$", capsys.readouterr().out, re.MULTILINE)  # seconds, so far
    assert snapshot_of(tmp_path / "runs") == before
    found = learned_sequence(toy, tmp_path / "runs", "niwf")["niwf"]
    timeless = lambda row: {key: value for key, value in row.items() if key not in ("seconds", "stored")}
    assert timeless(found) == timeless(sequences[1]["niwf"]) and len(calls) == 6
    after = snapshot_of(tmp_path / "runs")
    sequence.main(toy(tmp_path / "runs", "niwf"))  # all is there: nothing is computed again
    assert len(calls) == 6 and snapshot_of(tmp_path / "runs") == after


def test_a_sequence_refuses_what_it_cannot_learn(toy, tmp_path, capsys):
    """A task, option or method that a sequence cannot use is refused by name before a folder is made."""
    for more, why in {
        "--orders size,size": "a task is there twice",
        "--orders size,none": "none.train.json",
        "--max-len 8": "size.train.json: none of its records can be used",
        "--methods lora": "invalid choice: 'lora'",
        "--nonsense": "unrecognized",
    }.items():
        said = [*toy(tmp_path / "runs", "bare"), "--orders", "size", *more.split()]
        assert why in run_quietly(sequence.main, said, capsys) and not (tmp_path / "runs").exists()


def test_a_task_that_is_left_out_is_asked_of_all_others(toy, sequences, tmp_path, capsys):
    """A task that is left out is answered by the other versions alone: the one with the lowest loss on a few
    records, and a composition of them. A row that is there is not made again."""
    args, rest = sequence.parse_options(toy(sequences[0], "lora-each"))
    args.val_examples, folder = 100, row_of(toy, sequences[0], "lora-each").folder
    said = ["tasks", "--backbone", args.backbone, "--data", args.data, "--run", folder, "--tasks", "size"]
    said += ["--out", tmp_path, "--seeds", "1", "--lora-steps", "8", *rest, "--json", tmp_path / "x.json"]
    found_study.main([str(x) for x in said])
    (row,) = rows_in(tmp_path / "x.json")
    assert row["learned"] == 2 and {*row["composed"]["16"]} == {"colour", "truth"}
    tasks = likelier.Tasks([*LABELS], args, rest)
    run, model, tokenizer = evaluation.open_run(folder, "cpu")
    few = [encode(record, tokenizer) for record in tasks.train["size"][:16]]

    def loss(gating):
        each = [([e], gating(model.probe([e[0]]))) for e in few]
        return sum(float(response_nll(*model.logits(*pair)).sum()) for pair in each)

    known = [lambda h: None, *(functools.partial(run.stored, i) for i in (0, 2))]
    losses = sorted((loss(gating), i) for i, gating in enumerate(known))
    best = [known[i] for nll, i in losses if nll - losses[0][0] < 1e-3]  # of several rounding decides
    judged = [likelier.judge(model, *tasks.held_out["size"][:2], gating)["likelier"] for gating in best]
    assert row["best single, 16"] in [100 * statistics.mean(each) for each in judged]
    before = snapshot_of(tmp_path)
    found_study.main([str(x) for x in said[:-2]])
    with refused("--tasks sise: .* has colour, size, truth"):
        found_study.main([str(x) for x in [*said[:-2], "--tasks", "sise"]])
    assert "--run names the run folder" in run_quietly(found_study.main, ["tasks"], capsys)
    assert snapshot_of(tmp_path) == before


def test_calibration_error_and_area_are_their_definitions():
    """Calibration error over ten bins, and the area under the curve over all pairs, match literal loops."""
    torch.manual_seed(0)
    p, right = torch.rand(200, dtype=torch.float64), torch.rand(200) < 0.5
    p[0] = 1.0
    wanted = 0.0
    for low in range(10):
        inside = [i for i in range(200) if low <= 10 * p[i] and (10 * p[i] < low + 1 or low == 9)]
        sure, share = (sum(float(x[i]) for i in inside) / len(inside) for x in (p, right))
        wanted += len(inside) / 200 * abs(sure - share)
    assert sure_study.calibration_error(p, right) == pytest.approx(wanted)
    known, unknown = torch.rand(30), torch.cat([torch.rand(20) + 0.2, torch.tensor([0.0])])
    known[3] = unknown[5]
    pairs = [(float(b > a) + 0.5 * float(a == b)) for a in known for b in unknown]
    assert sure_study.area_under_curve(known, unknown) == pytest.approx(sum(pairs) / len(pairs))
