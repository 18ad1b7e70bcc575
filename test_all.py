"""What must stay true. Each test states one promise; `pytest test_all.py` takes two to eight minutes of one
core, and with pytest-xdist `pytest -n 2 test_all.py` half.

A promise holds for a reason, on every processor and with any number of threads: by weights that are set by
hand, in double precision where a choice could be a near tie, or whatever a training makes of it. How well a
short training goes is no promise.

No network, no GPU and nothing outside this folder is needed; the GPU test is skipped, visibly, where there is
none.
"""

import os

# What runs here is so small that two threads wait for each other; and no network is asked, not even a name.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ast
import collections
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import pathlib
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
import transformers

import commit
import eval as evaluation
import field
import ftn
import synthetic
import train
from commit import Run, Version
from model import AdapterBank, attach, detach, NIWF, perplexity, response_logits, response_nll, sampler
from plumbing import Refused
from plumbing.backbone import find_targets, fingerprint, from_shape, load_backbone, pick_device, TINY_FOLDER
from plumbing.processes import ENDED
from plumbing.prompts import encode, end_token
from field import CoordinateDynamics, Region, WeightField, route, sample_anchors, take_snapshot, top_k_gating
from ftn import ALL, FastGrid, LoRAPool, PrivateMLPs, SmoothKWTA, commit_mask, grow, k_winners, smooth, unpack

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE / "assets"))
import bench
import fuzz
import report
import variants

fuzz.SECONDS = 300  # on a machine that does other things besides, a command may take longer than ten

try:
    import resource
except ImportError:  # Windows
    resource = None

if hasattr(os, "register_at_fork"):  # a child makes PyTorch's thread pool anew: two threads at once may fail
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

pytest.register_assert_rewrite(
    "tests.builders", "tests.records", "tests.prompts", "tests.backbones", "tests.exports"
)
from tests.builders import *
from tests.records import *
from tests.prompts import *
from tests.backbones import *
from tests.exports import *


# --------------------------------------------------------------------------------------------------- field.py


def test_field_is_equation_6_and_gating_equation_7():
    torch.manual_seed(0)
    phi, z = WeightField(layers=3, bases=5, coord_dim=4, hidden=7), torch.randn(2, 4)
    logits = phi(z)
    for b in range(2):
        x = (z[b] - z[b].mean()) / (z[b].var(unbiased=False) + 1e-5).sqrt()
        gelu = lambda t: 0.5 * t * (1 + torch.erf(t / math.sqrt(2)))
        h = gelu(phi.w2.weight @ gelu(phi.w1.weight @ x + phi.w1.bias) + phi.w2.bias)
        torch.testing.assert_close(logits[b].flatten(), phi.w3.weight @ h + phi.w3.bias)
    indices, weights = top_k_gating(logits, 2)
    for b in range(2):
        for layer in range(3):
            best = sorted(range(5), key=lambda i: -logits[b, layer, i])[:2]
            assert indices[b, layer].tolist() == best
            e = [math.exp(logits[b, layer, i].item()) for i in best]
            torch.testing.assert_close(weights[b, layer], torch.tensor([x / sum(e) for x in e]))


def test_a_grown_field_keeps_its_old_logits():
    phi, z = WeightField(3, 5, 4, 7), torch.randn(6, 4)
    torch.testing.assert_close(phi.grown(9)(z)[..., :5], phi(z))


def test_coordinates_are_bounded_and_a_fixed_one_ignores_its_input():
    torch.manual_seed(0)
    h = 50 * torch.randn(10, 6)
    z = CoordinateDynamics(6, 4)(h)
    assert z.abs().max() <= 1 and (z != z[0]).any()
    z = CoordinateDynamics(6, 4, fixed=True)(h)
    assert (z == z[0]).all()


def test_dynamics_are_equation_8_written_out():
    torch.manual_seed(2)
    dynamics, h_bar = CoordinateDynamics(6, 4), 50 * torch.randn(3, 6)
    dynamics.standardise(h_bar)
    mean = sum(h_bar) / 3
    deviation = (sum((h - mean).square() for h in h_bar) / 3).sqrt()
    gru, sigma = dynamics.gru, torch.sigmoid
    (W_r, W_u, W_n), (b_r, b_u, b_n) = gru.weight_ih.chunk(3), gru.bias_ih.chunk(3)
    (V_r, V_u, V_n), (c_r, c_u, c_n) = gru.weight_hh.chunk(3), gru.bias_hh.chunk(3)
    dynamics.z0.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    for h, z_new in zip(h_bar, dynamics(h_bar)):
        x, z = (h - mean) / deviation * (4 / 6) ** 0.5, dynamics.z0
        r, u = sigma(W_r @ x + b_r + V_r @ z + c_r), sigma(W_u @ x + b_u + V_u @ z + c_u)
        n = torch.tanh(W_n @ x + b_n + r * (V_n @ z + c_n))
        g = (1 - u) * n + u * z
        g = (g - g.mean()) / (g.var(unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(z_new, torch.tanh(dynamics.w_z.weight @ g + dynamics.w_z.bias))


def test_without_standardising_the_gating_collapses(double):
    """What inputs share is taken out of h_bar. Left in, as printed, it moves their coordinates together, by
    as much as it is larger than what tells them apart: in the end one gating serves all of them."""
    torch.manual_seed(0)
    dynamics, phi = CoordinateDynamics(32, 8), WeightField(3, 16, 8, 32)
    for bias in (phi.w1.bias, phi.w2.bias, phi.w3.bias):
        bias.data.zero_()  # it would favour the same bases everywhere
    own, common = torch.randn(100, 32), torch.randn(32)

    def coordinates(size, mean, deviation):
        h_bar = own + size * common
        dynamics.mean.copy_(mean(h_bar)), dynamics.deviation.copy_(deviation(h_bar))
        with torch.no_grad():
            z = dynamics(h_bar)
            return z, evaluation.describe_gating([top_k_gating(phi(z), 8)])["sets"]

    centre = lambda h_bar: h_bar.mean(0)
    as_it_is = lambda h_bar: torch.zeros(32), lambda h_bar: h_bar.square().mean().sqrt().expand(32)
    dynamics.standardise(own)
    with torch.no_grad():
        z = dynamics(own)
    for size in (1.0, 1e3, 1e6):
        ours, sets = coordinates(size, centre, lambda h_bar: h_bar.std(0, correction=0))
        torch.testing.assert_close(ours, z)
        assert sets > 25
    (near, _), (nearer, sets) = (coordinates(size, *as_it_is) for size in (1e3, 1e6))
    spread = lambda z: (z - z.mean(0)).norm()
    assert spread(nearer) / spread(near) == pytest.approx(1e-3, rel=0.1) and sets == 1


def test_region_distance_is_mahalanobis():
    torch.manual_seed(0)
    u = torch.randn(500, 6, dtype=torch.double) @ torch.randn(6, 6, dtype=torch.double)
    region, z = Region.fit(torch.tanh(u), 0.95), torch.tanh(u)
    d = [
        float(((x - region.mean) @ torch.linalg.inv(region.cov) @ (x - region.mean)).sqrt())
        for x in field.unsquash(z)
    ]
    torch.testing.assert_close(region.distance(z), torch.tensor(d, dtype=torch.double))
    inside = torch.tensor(d, dtype=torch.double).quantile(0.95)  # leaving one out moves it further away
    assert region.tau > inside, "the quantile of distances from a Gaussian fitted to the others"
    share, scale = field.shrinkage(field.unsquash(z) - region.mean)
    cov = (1 - share) * torch.cov(field.unsquash(z).T) + share * scale * torch.eye(6)
    torch.testing.assert_close(region.cov, cov)
    torch.testing.assert_close(field.unsquash(torch.tanh(0.1 * u)), 0.1 * u)


@pytest.mark.parametrize("n, d", [(50, 6), (12, 20), (3, 2)])
def test_tau_is_the_quantile_of_leave_one_out_distances(n, d):
    torch.manual_seed(0)
    u = torch.randn(n, d, dtype=torch.double) @ torch.randn(d, d, dtype=torch.double) / d
    share, scale = field.shrinkage(u - u.mean(0))
    distances = []
    for i in range(n):  # literally: fit without u_i, then measure u_i
        rest = torch.cat([u[:i], u[i + 1 :]])
        cov = (1 - share) * torch.cov(rest.T) + (share * scale + 1e-10) * torch.eye(d, dtype=torch.double)
        x = u[i] - rest.mean(0)
        distances.append((x @ torch.linalg.solve(cov, x)).sqrt())
    region = Region.fit(torch.tanh(u), 0.9)
    assert region.tau == pytest.approx(float(torch.stack(distances).quantile(0.9)), rel=1e-6)


def test_shrinkage_is_ledoit_and_wolf():
    """By the definition of 2004, in loops, and by scikit-learn's, where that is installed."""
    torch.manual_seed(0)
    x = torch.randn(30, 5, dtype=torch.double) @ torch.randn(5, 5, dtype=torch.double)
    x = x - x.mean(0)
    S, eye = sum(torch.outer(r, r) for r in x) / 30, torch.eye(5, dtype=torch.double)
    mu = S.trace() / 5
    noise = sum((torch.outer(r, r) - S).square().sum() for r in x) / 30**2
    share, scale = field.shrinkage(x)
    torch.testing.assert_close(share, noise / (S - mu * eye).square().sum())
    torch.testing.assert_close(scale, mu)
    assert 0 < share < 1 and field.shrinkage(torch.zeros(4, 3))[0] == 1
    if importlib.util.find_spec("sklearn"):
        from sklearn.covariance import ledoit_wolf_shrinkage

        assert float(share) == pytest.approx(ledoit_wolf_shrinkage(x.numpy(), assume_centered=True))


def test_a_region_covers_inputs_that_were_not_fitted():
    """As many dimensions as SmolLM2's coordinates had, and few examples: in-sample distances would give a
    tau that covers about half. The quantile of 280 has a deviation of 0.013, the mean of 16 a quarter."""
    torch.manual_seed(0)
    covered = torch.zeros(2, dtype=torch.double)
    for _ in range(16):
        mix = torch.randn(64, 64, dtype=torch.double) / 30
        fitted, unseen = (torch.tanh(torch.randn(n, 64, dtype=torch.double) @ mix) for n in (280, 1000))
        region = Region.fit(fitted)
        taus = torch.tensor([[region.tau], [float(region.distance(fitted).quantile(0.95))]])
        covered += (region.distance(unseen) <= taus).double().mean(1) / 16
    assert 0.93 < covered[0] < 0.97 and covered[1] < 0.85


@pytest.mark.parametrize("source", ["gaussian", "empirical"])
def test_anchors_lie_inside_their_region(source):
    torch.manual_seed(0)
    z = torch.tanh(torch.randn(400, 5))
    region = Region.fit(z)
    anchors = sample_anchors(region, z, 256, source, seed=3)
    assert anchors.shape == (256, 5) and anchors.abs().max() < 1
    # Measured again, in another batch and more precisely: on the edge the last digit of a float32 differs.
    assert (region.distance(anchors.double()) <= region.tau * (1 + 1e-5)).all()
    assert torch.equal(anchors, sample_anchors(region, z, 256, source, seed=3))
    if source == "empirical":
        assert all((z == a).all(1).any() for a in anchors)


def test_a_fixed_coordinate_still_makes_a_region():
    z = torch.full((30, 4), 0.3)
    region = Region.fit(z)
    assert sample_anchors(region, z, 16, "gaussian", 0).isfinite().all()


def test_routing_goes_to_the_likeliest_gaussian():
    torch.manual_seed(0)
    groups = [torch.tanh(torch.randn(n, 4) @ torch.randn(4, 4) / 3 + torch.randn(4)) for n in (100, 300)]
    regions = [Region.fit(g) for g in groups]
    found = route(torch.cat(groups), regions)
    gauss = [torch.distributions.MultivariateNormal(r.mean, r.cov) for r in regions]
    for x, choice, p in zip(field.unsquash(torch.cat(groups).double()), found.choice, found.probability):
        likelihood = [float(g.log_prob(x).exp()) for g in gauss]
        assert choice == likelihood.index(max(likelihood))
        assert float(p) == pytest.approx(max(likelihood) / sum(likelihood))


def test_lock_and_separation_losses_are_equations_13_and_10(double):
    torch.manual_seed(0)
    phi, z = WeightField(2, 5, 4, 7), torch.tanh(torch.randn(40, 4))
    region = Region.fit(z)
    anchors = sample_anchors(region, z, 8, "gaussian", 0)
    old = a_version_of(phi, CoordinateDynamics(3, 4), region, anchors, {})
    assert field.lock_loss(phi, [old]) == 0 and field.lock_loss(phi, []) == 0
    torch.nn.init.normal_(phi.w3.bias)
    expected = sum(((phi(a[None])[0] - s) ** 2).sum() for a, s in zip(anchors, old.snapshot)) / 8
    torch.testing.assert_close(field.lock_loss(phi, [old]), expected)
    torch.testing.assert_close(field.lock_loss(phi.grown(7), [old]), expected)
    x = torch.tanh(torch.randn(6, 4)).requires_grad_()
    loss = field.separation_loss(x, [region], margin=1.0)
    torch.testing.assert_close(
        loss,
        sum(max(0.0, region.tau + 1 - region.distance(v[None]).item()) ** 2 for v in x) / 6 * torch.ones(()),
    )
    loss.backward()
    assert (region.distance(x - 1e-3 * x.grad) > region.distance(x)).any(), "the gradient must push outwards"


# --------------------------------------------------------------------------------------------------- model.py


@pytest.mark.parametrize(
    "committed,live,dtype,tolerance",
    [
        (0, 6, torch.float32, {}),
        (6, 0, torch.float32, {}),
        (4, 2, torch.float32, {}),
        (4, 2, torch.bfloat16, dict(rtol=3e-2, atol=3e-2)),
    ],
)
def test_update_is_equation_2(committed, live, dtype, tolerance):
    model = micro_model(live, committed, dtype)
    name, module = next(
        (n, m) for n, m in find_targets(model.backbone).items() if n.endswith("1.mlp.down_proj")
    )
    x, gating = torch.randn(3, 5, 48, dtype=dtype), random_gating(3, 2, 6)
    y = module(x)
    with model.gated(gating):
        adapted = module(x)
    assert adapted.dtype == dtype
    A, B = (torch.cat([tensors[f"{name}.{p}"] for tensors in all_bases(model.bank)]) for p in "AB")
    for b in range(3):
        for t in range(5):
            update = sum(
                w * B[i].T @ (A[i] @ x[b, t].float())
                for i, w in zip(gating[0][b, 1].tolist(), gating[1][b, 1])
            )
            torch.testing.assert_close(adapted[b, t].float(), y[b, t] + 5 / 3 * update, **tolerance)
    assert torch.equal(module(x), y), "gating must be off again"


def test_only_live_and_chosen_bases_get_gradient():
    model = micro_model(bases=3, committed=4)
    indices = torch.tensor([[[0, 5], [1, 5]], [[3, 4], [2, 3]]])  # live bases are 4, 5, 6
    logits, labels = model.logits(random_examples(2), (indices, torch.full((2, 2, 2), 0.5)))
    response_nll(logits, labels).sum().backward()
    assert not any(t.requires_grad for block in model.bank.committed for t in block.tensors.values())
    for key, p in model.bank.live.items():
        chosen = {4 - 4, 5 - 4} if model.bank.layer[key[:-2]] == 0 else {5 - 4}
        assert {i for i in range(3) if p.grad[i].any()} == chosen, key
    assert all(p.grad is None for p in model.backbone.parameters())


def test_a_refusal_is_one_line_of_printable_text():
    """What it quotes from a file can be anything: half characters, control characters, line breaks."""
    assert str(Refused("lr \x00,\n not\x1b[2J \udc80 0.02 é")) == r"lr \x00, not\x1b[2J \udc80 0.02 é"


def test_fresh_bases_change_nothing_and_detach_restores_every_bit():
    ids, fresh = torch.randint(3, 300, (2, 9)), micro_backbone()
    model = NIWF(micro_backbone(), pad_id=0)
    model.bank.add(4)
    with model.gated(random_gating(2, 2, 4)):
        assert torch.equal(model.backbone(ids).logits, fresh(ids).logits)  # B is zero
    random_bank(model.bank, 4)
    with model.gated(random_gating(2, 2, 8)):
        assert not torch.equal(model.backbone(ids).logits, fresh(ids).logits)
    model.detach()
    model.bank.use(random_gating(2, 2, 8))
    assert torch.equal(model.backbone(ids).logits, fresh(ids).logits)
    assert not any(m._forward_hooks for m in model.backbone.modules())


def test_conv1d_of_gpt2_is_patched_by_exact_name():
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    backbone = transformers.GPT2LMHeadModel(config).eval()
    targets = find_targets(backbone, ("c_attn",))
    assert list(targets) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    bank = AdapterBank(targets, rank=2)
    assert bank.shapes["transformer.h.0.attn.c_attn"] == (16, 48)
    random_bank(bank, 3)
    handles, ids = attach(targets, bank.update), torch.randint(0, 50, (2, 6))
    plain = backbone(ids).logits
    bank.use(random_gating(2, 2, 3))
    assert not torch.equal(backbone(ids).logits, plain)
    detach(handles)
    assert torch.equal(backbone(ids).logits, plain)
    with pytest.raises(Refused, match="no linear module"):
        find_targets(backbone, ("attn",))  # a block, not a leaf


def test_padding_and_mixed_batches_change_nothing():
    model, examples = micro_model(dtype=torch.float64), random_examples(6)
    gating = random_gating(6, 2, 6)  # every row its own bases: as if each went to another version
    logits, labels = model.logits(examples, gating)
    h_bar = model.probe([p for p, _ in examples])
    for i, (p, r) in enumerate(examples):
        one, one_labels = model.logits([(p, r)], tuple(g[i : i + 1] for g in gating))
        torch.testing.assert_close(logits[i, -len(r) :], one[0], atol=1e-5, rtol=1e-5)
        assert labels[i, -len(r) :].tolist() == one_labels[0].tolist() == r
        torch.testing.assert_close(h_bar[i], model.probe([p])[0], atol=1e-5, rtol=1e-5)


def test_loss_counts_response_tokens_with_eos_and_nothing_else():
    model, examples = micro_model(), random_examples(4)
    logits, labels = model.logits(examples, None)
    for nll, (p, r) in zip(response_nll(logits, labels), examples):
        log_p = model.backbone(torch.tensor([p + r])).logits[0].log_softmax(-1)
        expected = -sum(log_p[len(p) - 1 + i, t] for i, t in enumerate(r))
        torch.testing.assert_close(nll, expected, atol=1e-4, rtol=1e-4)
    assert perplexity(2 * math.log(3), 2) == pytest.approx(3)


@pytest.mark.parametrize("history", [[], messages("Be brief.", first="system"), messages("Hi.", "Yes?")])
def test_under_the_chat_template_prompt_and_response_are_the_templates_own_text(history):
    tokenizer = chat_tokenizer()
    record = {"instruction": "Say hello.", "input": "Now.", "output": " Hello. ", "history": history}
    prompt, response = encode(record, tokenizer, "chat")
    asked = [*history, {"role": "user", "content": "Say hello.\n\nNow."}]
    whole = tokenizer.apply_chat_template(
        [*asked, {"role": "assistant", "content": " Hello. "}], tokenize=False
    )
    assert tokenizer.decode(prompt + response) + "\n" == whole  # nothing is trained after the end of the turn
    assert prompt == tokenizer.apply_chat_template(asked, add_generation_prompt=True).input_ids
    assert prompt.count(tokenizer.bos_token_id) == 1 and tokenizer.decode(response) == f"Hello.{END}"
    assert end_token(tokenizer, "chat") == response[-1] != tokenizer.eos_token_id
    assert encode(RECORD, tokenizer)[1][-1] == end_token(tokenizer, "alpaca") == tokenizer.eos_token_id


UNSURE = "{% for m in messages %}{{ m.content }}{% if m.content != 'Hi.' %}</s>{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no such role') }}", "cannot write .*no such role"),
        ("{{ messages[0].content", "cannot write"),
        ("{% for m in messages %}{{ m.content }}</s>{% endfor %}{{ messages | length }}", "otherwise once"),
        (CHAT.replace(END, "."), ": no special token"),
        (CHAT.replace(END, ""), ": no special token"),
        (UNSURE, "'</s>' does not end every answer"),
    ],
)
def test_a_chat_template_whose_answers_cannot_be_trained_or_end_is_refused(template, message):
    record = {"instruction": "Hello?", "output": "Hi."}
    with pytest.raises(Refused, match=message):
        encode(record, chat_tokenizer(template), "chat")


def hidden_of(model, ids):
    return model.backbone.base_model(torch.tensor([ids])).last_hidden_state


def test_the_probe_reads_the_prompt_only_and_no_adapter():
    model = micro_model()
    ((p, r),) = random_examples(1)
    hidden = model.backbone.base_model(torch.tensor([p])).last_hidden_state
    torch.testing.assert_close(model.probe([p])[0], hidden[0].mean(0))
    assert not torch.allclose(model.probe([p], random_gating(1, 2, 6))[0], hidden[0].mean(0))
    # So what h_bar is made of says nothing about the response, unless it is asked to.
    prompt_alone, (whole,) = evaluation.probe_all(model, [(p, r)], "prompt"), hidden_of(model, p + r)
    assert torch.equal(prompt_alone, evaluation.probe_all(model, [(p, r[::-1] + r)], "prompt"))
    torch.testing.assert_close(prompt_alone[0], hidden[0].mean(0))
    torch.testing.assert_close(evaluation.probe_all(model, [(p, r)], "sequence")[0], whole.mean(0))


def clear_model():
    """A micro model in double precision whose logits are 1000 times as large: no likeliest token is a matter
    of rounding. -> model, prompts, a gating of each"""
    model = micro_model(dtype=torch.float64)
    model.backbone.lm_head.weight.data *= 1000
    return model, [p for p, _ in random_examples(5)], random_gating(5, 2, 6)


def test_generation_with_a_cache_is_greedy_decoding_without_one():
    model, prompts, gating = clear_model()
    for i, (prompt, new) in enumerate(
        zip(prompts, model.generate(prompts, gating, eos_id=2, max_new_tokens=12))
    ):
        ids = list(prompt)
        with model.gated(tuple(g[i : i + 1] for g in gating)):
            while len(ids) < len(prompt) + 12:
                logits = model.backbone(torch.tensor([ids])).logits[0, -1]
                first, second = logits.topk(2).values
                assert first - second > 1e-3, "not a tie: rounding is below 1e-6"
                ids.append(int(logits.argmax()))
                if ids[-1] == 2:
                    ids.pop()
                    break
        assert new == ids[len(prompt) :]


def test_sampling_that_has_no_choice_is_greedy_decoding():
    """At a temperature of 1e-4 a lead of 0.01 is one of 100: the other token has a chance of e^-100."""
    model, prompts, gating = clear_model()
    sampled = lambda *how: model.generate(prompts, gating, 2, 12, sampler(*how))
    leads, choose = [], lambda logits: (leads.append(logits.topk(2).values.diff()), logits.argmax(-1))[1]
    likeliest = model.generate(prompts, gating, 2, 12, choose)
    assert max(torch.cat(leads)) < -0.01 and likeliest == model.generate(prompts, gating, 2, 12)
    assert sampled(0.0) == sampled(1.001e-4) == sampled(2.0, 1e-9) == sampled(2.0, 0.0) == likeliest
    assert sampled(2e3, 1.0, 3) == sampled(2e3, 1.0, 3) != sampled(2e3, 1.0, 4) != likeliest
    alone = [model.generate([p], tuple(g[i : i + 1] for g in gating), 2, 12) for i, p in enumerate(prompts)]
    assert [new for (new,) in alone] == likeliest


def test_tokens_are_drawn_with_the_temperature_and_from_the_nucleus():
    torch.manual_seed(3)
    logits, temperature, top_p, n = 2 * torch.randn(1, 8), 0.7, 0.8, 4000
    p = (logits[0] / temperature).exp()
    p, order, wanted = p / p.sum(), [], torch.zeros(8)
    for i in p.argsort(descending=True).tolist():  # literally: the likeliest until they have top_p together
        if sum(p[j] for j in order) < top_p:
            order.append(i)
    wanted[order] = p[order] / p[order].sum()
    drawn = sampler(temperature, top_p, 5)(logits.expand(n, -1)).bincount(minlength=8) / n  # to 4 deviations
    assert 1 < len(order) < 8 and not drawn[wanted == 0].any()
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=4 * 0.5 / n**0.5)


def test_a_stream_that_is_closed_early_leaves_the_adapters_off():
    model, prompts = micro_model(), [[5, 6, 7]]
    bare = model.backbone(torch.tensor(prompts)).logits
    steps = model.stream(prompts, random_gating(1, 2, 6), -1, 9)
    next(steps)
    assert not torch.equal(model.backbone(torch.tensor(prompts)).logits, bare)
    steps.close()
    assert torch.equal(model.backbone(torch.tensor(prompts)).logits, bare)


@pytest.mark.parametrize("rows", ["alike", "mixed"])
def test_bases_gathered_once_for_a_text_give_equation_2(rows):
    model, ids = micro_model(bases=3, committed=3), torch.randint(3, 300, (3, 7))
    gating = random_gating(1 if rows == "alike" else 3, 2, 6)
    gating = tuple(g.expand(3, -1, -1) for g in gating)
    with model.gated(gating), torch.no_grad():
        wanted = model.backbone(ids).logits
        model.bank.fold()
        torch.testing.assert_close(model.backbone(ids).logits, wanted)
    assert model.bank.folded is None and not torch.allclose(model.backbone(ids).logits, wanted)


def test_mistral_7b_has_the_shapes_we_publish():
    with torch.device("meta"):
        backbone = transformers.MistralForCausalLM(transformers.MistralConfig())
        model = NIWF(backbone, pad_id=0)
        field, dynamics = WeightField(32, 16), CoordinateDynamics(model.features)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(backbone) == 7_241_732_096 and len(model.bank.shapes) == 7 * 32
    assert model.bank.shapes["model.layers.0.self_attn.o_proj"] == (
        4096,
        4096,
    )  # the paper's table says 1024 -> 4096
    assert model.bank.parameter_count(16) == 335_544_320  # and so 323 M
    assert count(dynamics.gru) > 780_000 and 990_000 < count(field) + count(dynamics) < 1_100_000


def test_checkpointing_gives_the_same_gradients_to_the_bit_under_the_gating_of_the_forward_pass():
    gradients, examples = {}, random_examples(4)
    for checkpointing in (False, True):
        model = micro_model(bases=4, committed=3)
        if checkpointing:
            model.checkpoint()
        indices, weights = random_gating(4, 2, 7)
        weights.requires_grad_()
        nll = response_nll(*model.logits(examples, (indices, weights)))
        model.probe([p for p, _ in examples])  # another gating in between
        nll.sum().backward()
        assert model.bank.gating is None
        gradients[checkpointing] = [weights.grad, *(p.grad for p in model.bank.live.values())]
    assert all(map(torch.equal, *gradients.values())) and gradients[True][0].any()


def test_checkpointing_keeps_inputs_of_layers_brings_no_dropout_and_ends_with_the_hooks(monkeypatch):
    config = transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=3, n_head=2)
    model = NIWF(transformers.GPT2LMHeadModel(config), pad_id=0)
    random_bank(model.bank, 4)
    examples, gating = random_examples(3), random_gating(3, 3, 4)

    def run():
        kept = []
        keep = lambda t: (kept.append(t.numel()), t)[1]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            nll = response_nll(*model.logits(examples, gating))
        return nll, model.generate([p for p, _ in examples], gating, 2, 5), sum(kept)

    plain = run()
    model.checkpoint()
    checkpointed = run()
    assert torch.equal(plain[0], checkpointed[0]) and plain[1] == checkpointed[1]
    assert checkpointed[2] < plain[2] / 2
    model.detach()
    forward = type(model.backbone.transformer.h[0]).forward
    assert all(layer.forward.__func__ is forward for layer in model.backbone.transformer.h)
    monkeypatch.setattr("model.find_layers", lambda backbone: [])
    with pytest.raises(Refused, match="no layers that can be computed again"):
        model.checkpoint()


def test_layers_that_are_kept_on_disk_give_the_same_logits_gradients_and_fingerprint(micro, tmp_path):
    pytest.importorskip("accelerate")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_FOLDER)
    micro_backbone(len(tokenizer), layers=4).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    places = {f"model.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(4)}
    places |= {
        "model.embed_tokens": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    examples, gating, found = random_examples(3), random_gating(3, 4, 4), []
    for device_map, checkpointing in ((None, False), (places, False), (places, True)):
        backbone, _ = load_backbone(str(tmp_path), "cpu", device_map)
        assert any(p.is_meta for p in backbone.parameters()) == bool(device_map)
        model = NIWF(backbone, pad_id=0)
        random_bank(model.bank, 4)
        if checkpointing:
            model.checkpoint()
        logits, labels = model.logits(examples, gating)
        response_nll(logits, labels).sum().backward()
        h_bar = model.probe([p for p, _ in examples])
        found.append([logits, h_bar, *(p.grad for p in model.bank.live.values()), fingerprint(backbone)])
        model.detach()
    for other in found[1:]:
        assert other[-1] == found[0][-1] and all(map(torch.equal, other[:-1], found[0][:-1]))


def test_a_device_map_without_accelerate_or_without_weights_is_one_line(monkeypatch):
    with pytest.raises(Refused, match="none to read"):
        load_backbone("random:mistral-7b", "cpu", "auto")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="pip install accelerate"):
        load_backbone("tiny", "cpu", "auto")


# -------------------------------------------------------------------------------------------------- commit.py


ASKED, ANSWER = messages("Say hello.", "Hello.")
FORMS = [  # a record, and what the rest of the program has of it
    (RECORD, RECORD),
    ({**RECORD, "messages": None, "more": 1}, {**RECORD, "messages": None, "more": 1}),
    ({"prompt": "Say hello.", "completion": "Hello."}, {"instruction": "Say hello.", "output": "Hello."}),
    (
        {"prompt": [ASKED], "completion": [ANSWER]},
        {"instruction": "Say hello.", "output": "Hello.", "history": []},
    ),
    (
        {"messages": [ASKED, ANSWER], "kind": "greet", "prompt": "Say hello."},
        {"instruction": "Say hello.", "output": "Hello.", "history": [], "kind": "greet"},
    ),
    (
        {"messages": [*messages("Be kind.", first="system"), ANSWER, ASKED, ANSWER]},
        {
            "instruction": "Say hello.",
            "output": "Hello.",
            "history": [*messages("Be kind.", first="system"), ANSWER],
        },
    ),
    ({"instruction": "a\u2028b\x85c", "output": "d"}, {"instruction": "a\u2028b\x85c", "output": "d"}),
]


@pytest.mark.parametrize("name", ["list.json", "lines.jsonl", "lines.json", "windows.txt", "pretty.jsonl"])
def test_records_of_three_forms_come_as_a_list_or_in_lines_whatever_the_name(tmp_path, name):
    rows = [row for row, _ in FORMS]
    empty_line = "\r\n\r\n" if name == "windows.txt" else "\n\n"
    text = empty_line.join(json.dumps(row, ensure_ascii=False) for row in rows)
    if name in ("list.json", "pretty.jsonl"):
        text = "\n" + json.dumps(rows, indent=1 if name == "pretty.jsonl" else None)
    (tmp_path / name).write_bytes(text.encode())
    found = commit.read_records(tmp_path / name, "chat")
    assert found == [plain for _, plain in FORMS]
    (tmp_path / "again.json").write_text(json.dumps(found))  # as a run folder keeps them
    assert commit.read_records(tmp_path / "again.json", "chat", own=True) == found


BAD_RECORDS = [
    ({"prompt": "x"}, "has no text under 'completion'"),
    ({"prompt": ["x"], "completion": "y"}, "has no text under 'prompt'"),
    ({"prompt": "x", "completion": "y", "kind": 3}, "something other than text under 'kind'"),
    ({"prompt": [ASKED], "completion": [{"role": "assistant"}]}, "'content' is missing"),
    ({"prompt": [], "completion": []}, "last two messages are not of user and assistant"),
    ({"messages": []}, "last two messages are not of user and assistant"),
    ({"messages": [ANSWER]}, "last two messages are not of user and assistant"),
    ({"messages": [ASKED, ANSWER, ASKED]}, "last two messages are not of user and assistant"),
    ({"messages": [ANSWER, ANSWER]}, "last two messages are not of user and assistant"),
    ({"messages": "Say hello."}, "messages: 'Say hello.' is not what belongs there"),
    ({"messages": [ASKED, None]}, r"messages\[1\]: None is not"),
    ({"messages": [ASKED, {**ANSWER, "content": None}]}, r"messages\[1\]: content: None is not"),
    ({"messages": [ASKED, {**ANSWER, "content": "\ud800"}]}, "half a character"),
    ({"messages": [{**ASKED, "role": ""}, ANSWER]}, r"messages\[0\]: role: '' is not"),
    ({"messages": [ASKED, {**ANSWER, "tool_calls": []}]}, "'tool_calls' is unknown"),
    ({**RECORD, "history": [["Hi.", "Yes?"]]}, r"history\[0\]"),
    ({**RECORD, "history": [ASKED, ANSWER]}, "--template chat takes it"),
    ({"messages": [*messages("Be kind.", first="system"), ASKED, ANSWER]}, "--template chat takes it"),
    ([], "is not a JSON object"),
]


@pytest.mark.parametrize("bad, message", BAD_RECORDS)
def test_a_bad_record_is_named_by_its_number_and_its_line(tmp_path, bad, message):
    for text, where in (
        (json.dumps([RECORD, bad]), "record 2"),
        (f"{json.dumps(RECORD)}\n\n{json.dumps(bad)}", r"record 2 \(line 3\)"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(Refused, match=rf"bad\.jsonl: {where}.*{message}"):
            commit.read_records(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"instruction": "a", "output": "b"}\n{"instruction": "a"',
            r"record 2 \(line 2\): not readable as JSON",
        ),
        (
            '{"prompt": "a", "prompt": "b"}',
            r"record 1 \(line 1\): not readable as JSON \('prompt' is there twice\)",
        ),
        ('[{"prompt": "a", "prompt": "b"}]', "'prompt' is there twice"),
        ('{"prompt": "a", "completion": NaN}', "NaN is no number"),
        ('\ufeff{"prompt": "a"}', "BOM"),
        (" \n\n", "there are none"),
    ],
)
def test_what_is_not_json_lines_is_refused_by_line(tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(Refused, match=rf"bad\.jsonl: .*{message}"):
        commit.read_records(tmp_path / "bad.jsonl")


def test_a_version_comes_back_bit_for_bit_under_its_own_name(tmp_path):
    v, path = a_version(tmp_path)
    w = Version.load(path)
    z = torch.randn(9, 4)
    assert (
        torch.equal(v.field(z), w.field(z))
        and torch.equal(v.snapshot, w.snapshot)
        and all(torch.equal(t, w.bases[key]) for key, t in v.bases.items())
    )
    assert torch.equal(take_snapshot(w.field, w.anchors), w.snapshot)
    assert (w.task, w.lock, w.config, w.region.tau) == (v.task, v.lock, v.config, v.region.tau)
    assert w.index.tolist() == [0, 1, 2] and w.hash == v.hash
    w.save(tmp_path)
    assert w.hash == v.hash


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_version_file_is_refused(tmp_path, damage):
    _, path = a_version(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-10])
    with pytest.raises(Refused, match="missing" if damage == "remove" else "corrupted"):
        Version.load(path)


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(OSError):
        with commit.atomic(tmp_path / "f") as tmp:
            tmp.write_text("half of the n")
            raise OSError("No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"


@torch.no_grad()
def test_what_no_gating_names_is_not_read(two):
    """Of a version that nobody asks, neither bases nor field are in memory."""
    run, model = opened(two)
    in_memory = lambda: [
        ["tensors" in vars(x) for x in part] for part in (run.versions, model.bank.committed)
    ]
    assert in_memory() == [[False, False], [False, False]]
    with model.gated(run.stored(0, torch.randn(3, model.features))), torch.no_grad():
        model.backbone(torch.tensor([[5, 6, 7]] * 3))
    assert in_memory() == [[True, False], [True, False]]
    model.detach()


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (1, 2, 1)])
def test_bases_in_blocks_are_gathered_as_from_one_tensor(sizes):
    bank = AdapterBank(find_targets(one_backbone()), rank=3)
    for n in sizes:
        tensors = {key: torch.randn(n, *shape) for key, shape in bank.basis_shapes().items()}
        bank.commit(n, lambda tensors=tensors: tensors)
    bank.add(2)
    name, indices = next(iter(bank.shapes)), torch.randint(sum(sizes) + 2, (3, 2, 5))
    for places, layer in zip(bank.locate(indices), indices.unbind(1)):
        for part, found in zip("AB", bank.gather(name, places)):
            whole = torch.cat([tensors[f"{name}.{part}"] for tensors in all_bases(bank)])
            assert torch.equal(found, whole[layer.flatten()])


def test_200_random_commands_move_no_other_version_by_a_bit(tmp_path):
    r, backbone, examples = random.Random(0), micro_backbone(layers=1), random_examples(3)
    folder, count = tmp_path / "run", iter(range(10**6))
    fake_commit(folder, "root", 0, backbone=backbone)
    seen = answers(folder, backbone, examples)
    done = dict.fromkeys(("commit", "rollback", "compose", "merge"), 0)
    for step in range(200):
        run, n = Run(folder), next(count)
        entries = run.manifest["versions"] + run.manifest["compositions"]
        growing, full = ["commit", "compose", "merge"], ["rollback", "rollback", "compose", "merge"]
        kind = r.choice(full if len(entries) > 4 else growing)
        if kind == "commit":
            fake_commit(folder, f"t{n}", n, r.random() < 0.4, backbone)
        elif kind == "compose":
            versions = run.manifest["versions"]
            picked = [e["hash"][:16] for e in r.sample(versions, min(2, len(versions)))]
            argv = ["compose", *picked, "--weights", *["0.5"] * len(picked), "--name", f"c{n}"]
            commit.main([*argv, "--run", str(folder)])
        elif kind == "merge":
            branch = tmp_path / "branch"
            shutil.rmtree(branch, ignore_errors=True)
            shutil.copytree(folder, branch)
            for i in range(r.randint(1, 2)):
                fake_commit(branch, f"b{n}.{i}", 1000 + n + i, r.random() < 0.4, backbone)
            for e in Run(branch).manifest["versions"][-1:]:
                seen[e["hash"]] = answers(branch, backbone, examples)[e["hash"]]
            commit.main(["merge", str(branch), "--run", str(folder)])
        else:
            victim = r.choice([e for e in entries if e["task"] != "root"])
            commit.main(["rollback", victim["hash"][:16], "--cascade", "--run", str(folder)])
        done[kind] += 1
        now = answers(folder, backbone, examples)
        for digest, logits in now.items():
            assert logits.equal(seen.setdefault(digest, logits)), (step, kind)
        assert {p.stem for p in (folder / "versions").iterdir()} == set(now) and not (
            folder / "versions" / "orphans"
        ).exists()
    assert min(done.values()) > 10 and not any(wrong for _, wrong in commit.verify(Run(folder)))


def test_rollback_refuses_while_another_version_reads_and_cascades_when_told(micro, two, tmp_path, capsys):
    out = copy_of(two, tmp_path)
    with pytest.raises(Refused, match="alpaca is read by code; --cascade removes them too"):
        commit.main(["rollback", "alpaca", "--run", str(out)])
    before = Run(out).manifest["results"][0]
    commit.main(["rollback", "code", "--run", str(out)])
    run = Run(out)
    assert (
        run.tasks == ["alpaca"]
        and run.manifest["results"] == [before]
        and len(list((out / "versions").iterdir())) == 1
    )
    assert not list((out / "data").glob("code.*"))
    train.main(micro("code", out, "--lock"))  # learned again, it is the same version
    assert Run(out).manifest["versions"][1]["hash"] == Run(two).manifest["versions"][1]["hash"]
    assert Run(out).manifest["results"] == Run(two).manifest["results"]
    commit.main(["rollback", "alpaca", "--cascade", "--run", str(out), "--json"])
    assert Run(out).manifest["versions"] == [] and not list((out / "versions").iterdir())


def test_branches_merge_as_if_trained_one_after_the_other(micro, first, tmp_path, capsys):
    left, right = copy_of(first, tmp_path, "left"), copy_of(first, tmp_path, "right")
    train.main(micro("code", left, "--lock"))
    train.main(
        micro("third", right, "--lock", "--data", HERE / "assets" / "data" / "code.val.json", "--seed", "3")
    )
    rows = {p: Run(p).manifest["results"][-1] for p in (left, right)}
    commit.main(["merge", str(right), "--run", str(left)])
    assert Run(left).tasks == ["alpaca", "code", "third"] and "merged third" in capsys.readouterr().out
    run = Run(left)
    backbone, tokenizer = run.open_backbone(run.manifest["backbone"]["name"], "cpu")
    row, _ = evaluation.measure(run, run.open_model(backbone, tokenizer), tokenizer)
    assert row["identical"] == {"alpaca": [32, 32], "code": [32, 32], "third": [32, 32]}
    assert row["stored"] == {**rows[left]["stored"], **rows[right]["stored"]}
    commit.main(["merge", str(right), "--run", str(left)])
    assert "already up to date" in capsys.readouterr().out


def test_merge_refuses_what_does_not_belong_together_and_changes_nothing(two, first, micro, tmp_path):
    def refused(folder, other, message):
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        with pytest.raises(Refused, match=message):
            commit.main(["merge", str(other), "--run", str(folder)])
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"} == {
            p: b for p, b in before.items() if p.name != ".lock"
        }

    ours = copy_of(first, tmp_path, "ours")
    other = tmp_path / "other"
    train.main(micro("alpaca", other, "--seed", "9"))
    refused(ours, other, "no common first version")
    foreign = copy_of(two, tmp_path, "foreign")
    path = foreign / "manifest.json"
    path.write_text(path.read_text().replace(Run(foreign).manifest["backbone"]["fingerprint"], "0" * 64))
    refused(ours, foreign, "another backbone")
    clash = copy_of(first, tmp_path, "clash")
    train.main(micro("code", clash, "--lock", "--seed", "5"))
    refused(copy_of(two, tmp_path, "mine"), clash, "both runs have a version called code")
    torn = copy_of(two, tmp_path, "torn")
    manifest = json.loads((torn / "manifest.json").read_text())
    entry = manifest["versions"][1]
    (torn / "versions" / f"{entry['hash']}.safetensors").write_bytes(b"no longer")
    refused(ours, torn, "corrupted version file")
    soft = copy_of(first, tmp_path, "soft")
    train.main(micro("code", soft, "--lock", "soft"))
    refused(ours, soft, "do not stand for themselves")


def test_verify_finds_a_flipped_bit_and_a_moved_field(two, tmp_path, capsys):
    commit.main(["verify", "--run", str(two)])
    assert capsys.readouterr().out.count(" ok") == 2
    out = copy_of(two, tmp_path)
    path = next((out / "versions").glob(Run(out).manifest["versions"][1]["hash"] + "*"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(SystemExit):
        commit.main(["verify", "--run", str(out), "--json"])
    assert [bool(e["wrong"]) for e in json.loads(capsys.readouterr().out)] == [False, True]
    out = tmp_path / "moved"
    fake_commit(out, "root", 0)
    run, _ = opened(out)
    version = run.versions[0]
    version.tensors["snapshot"] = version.snapshot + 1e-6
    run.manifest |= {"versions": [], "results": []}
    run.commit(version)
    assert "8 of 8 anchors" in commit.verify(Run(out))[0][1]


def exportable(folder, make):
    """A run folder with versions root, late and their composition mix, on a backbone that is beside it."""
    backbone, tokenizer = make(3584), transformers.AutoTokenizer.from_pretrained(TINY_FOLDER)
    for part in (backbone, tokenizer):
        part.save_pretrained(folder / "backbone")
    fake_commit(folder / "run", "root", 0, backbone=backbone)
    fake_commit(folder / "run", "late", 1, backbone=backbone)
    run = Run(folder / "run")
    run.manifest["backbone"] = {"name": str(folder / "backbone"), "fingerprint": fingerprint(backbone)}
    run.save()
    commit.main(
        ["compose", "root", "late", "--weights", "0.3", "0.7", "--name", "mix", "--run", str(run.folder)]
    )
    return run.folder, backbone


@torch.no_grad()
@pytest.mark.parametrize("name", ["root", "late", "mix"])
@pytest.mark.parametrize("make", ["micro_backbone", "micro_gpt2"])
def test_what_is_exported_is_the_version_at_its_mean_coordinate(tmp_path, make, name):
    make = globals()[make]
    (folder, backbone), examples = exportable(tmp_path, make), random_examples(3)
    before = snapshot_of(tmp_path / "backbone")
    for where, more in (("lora", []), ("merged", ["--merged"])):
        commit.main(["export", name, "--to", str(tmp_path / where), "--run", str(folder), *more])
    run, model = opened(folder, backbone)
    versions = {v.task: v for v in run.versions}
    parts = [(versions["root"], 0.3), (versions["late"], 0.7)] if name == "mix" else [(versions[name], 1.0)]
    gatings = [(v.gating(torch.tanh(v.region.mean).float()[None].expand(3, -1)), w) for v, w in parts]
    gating = torch.cat([g[0] for g, _ in gatings], -1), torch.cat([w * g[1] for g, w in gatings], -1)
    wanted = model.logits(examples, gating)[0]
    alike = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    with commit.safe_open(tmp_path / "lora" / "adapter_model.safetensors", "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}
    twin = make(3584)
    for target, module in find_targets(twin).items():
        A, B = (tensors[f"base_model.model.{target}.lora_{p}.weight"] for p in "AB")
        assert len(A) == config["r"] == (8 if name == "mix" else 4)
        added = config["lora_alpha"] / config["r"] * B @ A
        module.weight += added if isinstance(module, torch.nn.Linear) else added.T
    alike(response_logits(twin, 0, examples)[0], wanted)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32 and snapshot_of(tmp_path / "backbone") == before
    alike(response_logits(merged, 0, examples)[0], wanted)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")("Hello.").input_ids
    with pytest.raises(Refused, match="not empty"):
        commit.main(["export", name, "--to", str(tmp_path / "lora"), "--run", str(folder)])
    peft = pytest.importorskip("peft")
    adapted = peft.PeftModel.from_pretrained(make(3584), tmp_path / "lora")
    alike(response_logits(adapted.base_model.model, 0, examples)[0], wanted)


@pytest.mark.parametrize("more", [[], ["--merged"]])
def test_an_export_that_fails_or_is_killed_leaves_nothing_under_its_name(tmp_path, monkeypatch, more):
    folder, _ = exportable(tmp_path, micro_backbone)
    command = ["export", "late", "--to", str(tmp_path / "out"), "--run", str(folder), *more]
    before = snapshot_of(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m, pytest.raises(OSError, match="No space"):
        m.setattr(commit.os, "fsync", full)
        commit.main(command)
    assert snapshot_of(tmp_path) == before and not list(tmp_path.glob(".*"))
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:  # killed when all is written, and before it has its name
            commit.pathlib.Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            commit.main(command)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    commit.main(command)
    assert {p.suffix for p in (tmp_path / "out").iterdir()} >= {".json", ".safetensors"}


def test_a_merged_export_needs_the_backbone_of_its_run(tmp_path):
    folder, _ = exportable(tmp_path, micro_backbone)
    command = ["export", "root", "--to", str(tmp_path / "new" / "out"), "--run", str(folder), "--merged"]
    micro_backbone(3584, layers=1).save_pretrained(tmp_path / "backbone")
    with pytest.raises(Refused, match="another backbone"):
        commit.main(command)
    shutil.rmtree(tmp_path / "backbone")
    with fuzz.offline(), pytest.raises(Refused, match="cannot be loaded"):
        commit.main(command)
    assert not (tmp_path / "new").exists()


def test_show_log_and_names(two, tmp_path, capsys):
    out = copy_of(two, tmp_path)
    commit.main(["compose", "alpaca", "code", "--weights", ".5", ".5", "--name", "AB", "--run", str(out)])
    commit.main(["log", "--run", str(out)])
    log = capsys.readouterr().out
    digest = Run(out).manifest["versions"][1]["hash"]
    assert f"version {digest[:12]}  code  (lock: exact)" in log and "0.5 x " in log and "perplexity" in log
    commit.main(["show", digest[:6], "--run", str(out), "--json"])
    about = json.loads(capsys.readouterr().out)
    assert (
        about["task"] == "code"
        and about["writes"] == 4
        and about["read_by"] == [Run(out).manifest["compositions"][0]["hash"]]
    )
    for argv, message in (
        (["show", "nobody"], "no version is called 'nobody'"),
        (["show", digest[:3]], "no version"),
        (["compose", "alpaca", "--weights", "1", "2", "--name", "x"], "1 versions and 2 weights"),
        (["compose", "alpaca", "--weights", "1", "--name", "code"], "already has a version called code"),
        (["compose", "alpaca", "--weights", "1", "--name", "a/b"], "use letters"),
        (["rollback", "alpaca"], "is read by code, AB"),
    ):
        with pytest.raises(Refused, match=message):
            commit.main(argv + ["--run", str(out)])
    with pytest.raises(Refused, match="not a run folder"):
        commit.main(["log", "--run", str(tmp_path / "nowhere")])


@pytest.mark.skipif(not commit.fcntl, reason="no fcntl here")
def test_a_second_process_is_refused_and_the_lock_dies_with_the_first(micro, first, tmp_path):
    out = copy_of(first, tmp_path)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import commit, time\nwith commit.Run({str(out)!r}).exclusive():\n"
            " print('in', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        cwd=HERE,
    )
    holder.stdout.readline()
    for command in (
        lambda: train.main(micro("code", out, "--lock")),
        lambda: commit.main(["rollback", "alpaca", "--run", str(out)]),
    ):
        with pytest.raises(Refused, match="another process is at work"):
            command()
    holder.kill()
    holder.wait()
    commit.main(["rollback", "alpaca", "--run", str(out)])
    assert Run(out).tasks == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_sigkill_at_any_moment_leaves_the_state_before_or_after(tmp_path):
    base, branch = tmp_path / "base", tmp_path / "branch"
    fake_commit(base, "root", 0)
    shutil.copytree(base, branch)
    fake_commit(branch, "b", 2, reads_all=False)
    fake_commit(base, "a", 1)
    commands = {
        "commit": lambda f: fake_commit(f, "c", 3),
        "rollback": lambda f: commit.main(["rollback", "a", "--run", str(f)]),
        "merge": lambda f: commit.main(["merge", str(branch), "--run", str(f)]),
        "compose": lambda f: commit.main(
            ["compose", "root", "a", "--weights", "1", "1", "--name", "AB", "--run", str(f)]
        ),
    }
    state = lambda f: sorted(e["hash"] for k in ("versions", "compositions") for e in Run(f).manifest[k])
    r = random.Random(0)
    for name, command in commands.items():
        after = copy_of(base, tmp_path, f"{name}-after")
        started = time.perf_counter()
        command(after)
        took = time.perf_counter() - started
        for i in range(5):
            folder = copy_of(base, tmp_path, f"{name}-{i}")
            child = os.fork()
            if child == 0:
                try:
                    command(folder)
                finally:
                    os._exit(0)
            time.sleep(r.uniform(0, 1.5 * took))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert state(folder) in (state(base), state(after)), (name, i)
            assert not any(wrong for _, wrong in commit.verify(Run(folder)))
            with Run(
                folder
            ).exclusive() as run:  # and the next command that writes tidies up: nothing is lost
                before = {p.read_bytes() for p in (folder / "versions").glob("*.safetensors")}
                run.save()
                assert {p.stem for p in (folder / "versions").glob("*")} - {"orphans"} == set(state(folder))
                assert before == {p.read_bytes() for p in (folder / "versions").rglob("*.safetensors")}
                assert not list(folder.rglob("*.niwf-tmp"))


# ---------------------------------------------------------------------------------------------------- eval.py


@torch.no_grad()
def test_the_drift_of_a_grown_bank_is_told_over_all_its_bases():
    """Half of the new field's choices at the anchors fall on bases that were not there at commit. Its logits
    are what its biases are, so no order of summation has a say."""
    torch.manual_seed(4)
    dynamics, then = CoordinateDynamics(3, 4), WeightField(1, 4, 4, 7)
    region = Region.fit(torch.tanh(torch.randn(40, 4)))
    anchors = sample_anchors(region, torch.zeros(1, 4), 8, "gaussian", 0)
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


def test_forgetting_is_relative_to_the_perplexity_when_learned():
    rows = [{"task": "a", "stored": {"a": 4.0}}, {"task": "b", "stored": {"a": 5.0, "b": 2.0}}]
    assert evaluation.forgetting(rows, "stored") == {"a": 25.0, "b": 0.0}


def test_prompt_and_exact_match_and_log(first, tmp_path, capsys):
    evaluation.main(["--run", str(first), "--prompt", "Name three fruits.", "--max-new-tokens", "5"])
    assert (
        f"[version {Run(first).manifest['versions'][0]['hash'][:12]}; nearest region: alpaca, 100.0 % sure"
        in capsys.readouterr().out
    )
    evaluation.main(
        [
            "--run",
            str(first),
            "--exact-match",
            "3",
            "--max-new-tokens",
            "3",
            "--json",
            str(tmp_path / "e.json"),
        ]
    )
    counts = json.loads((tmp_path / "e.json").read_text())["rows"][0]["exact_match"]["alpaca"]
    assert (
        sum(n for _, n in counts.values()) == 32 and "of 32 answers exactly right" in capsys.readouterr().out
    )
    run = Run(first)
    assert "(lock: first)" in "\n".join(commit.log([commit.describe(run, e) for e in run.entries]))


def test_a_text_that_comes_in_pieces_is_the_whole_text_without_halves_of_characters():
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_FOLDER)
    for text in ("naïve café 漢字 🙂", "  def f(x):\n    return  x , y !  \n", "🙂\n\n", " ", ""):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        parts = [*evaluation.pieces(tokenizer, ({0: i} for i in ids))]
        assert "".join(parts) == text.strip() and not any("\ufffd" in part for part in parts)
        assert sum(map(bool, parts)) >= len(text.split())
    half = tokenizer("a🙂", add_special_tokens=False).input_ids[:-1]
    assert "".join(evaluation.pieces(tokenizer, ({0: i} for i in half))) == "a\ufffd"


def asked(run, capsys, *argv):
    """What eval.py prints: the text of an answer, and who gave it."""
    capsys.readouterr()
    evaluation.main(["--run", str(run), "--device", "cpu", *argv])
    text, _, note = capsys.readouterr().out.rstrip("\n").rpartition("\n\n")
    return text, note


def test_the_lines_of_python_in_the_readme_answer_as_the_program_does(two, tmp_path, monkeypatch, capsys):
    """An answer is the same alone and in a batch. In double precision, where no likeliest token is as near
    to the next as rounding."""
    (tmp_path / "runs").mkdir()
    out = copy_of(two, tmp_path / "runs", "tiny")
    load_in_double(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    exec(lines, said := {})
    for text, name, sure, prompt in zip(
        said["texts"], said["names"], said["sure"], re.findall('"([A-Z].*?)"', lines)
    ):
        shown, note = asked(out, capsys, "--prompt", prompt)
        percent = float(re.search(rf"nearest region: {name}, (.*) % sure", note)[1])
        assert shown == text.strip() and percent == pytest.approx(100 * float(sure), abs=0.06)
    assert len(said["texts"]) == 2 and (tmp_path / "lora" / "adapter_model.safetensors").exists()
    run, model, tokenizer = evaluation.open_run(out)
    records = run.validation("alpaca") + run.validation("code")
    texts, route = evaluation.answer(run, model, tokenizer, records, max_new_tokens=5)
    for i in (route.choice.tolist().index(0), route.choice.tolist().index(1)):  # a batch for both versions
        more = ("--input", records[i].get("input", ""), "--max-new-tokens", "5")
        shown, note = asked(out, capsys, "--prompt", records[i]["instruction"], *more)
        assert shown == texts[i].strip() and f"region: {run.tasks[route.choice[i]]}," in note


def test_a_sampled_answer_is_the_same_with_the_same_seed(first, capsys):
    argv = ["--prompt", "Name a fruit.", *"--max-new-tokens 8 --temperature 1 --top-p 0.9 --seed".split()]
    text, note = asked(first, capsys, *argv, "0")
    assert asked(first, capsys, *argv, "0") == (text, note) and asked(first, capsys, *argv, "1")[0] != text
    for wrong in (["--temperature", "1"], ["--prompt", "x", "--top-p", ".5"], ["--talk", "--prompt", "x"]):
        run_quietly(evaluation.main, [*wrong, "--run", str(first)], capsys)


def test_prompts_that_are_piped_in_get_an_answer_each_and_nothing_ends_the_talk(two, capsys):
    lines = [
        b"Name three fruits.",
        b"",
        b"/use nobody",
        b"/frob \x1b",
        b"\xff\xed\xa0\x80\0 \x1b na\xc3\xafve",
        b"/versions",
    ]
    lines += [b"/use code", b"Hi.", b"/base", b"Hi.", b"/auto", b"Name three fruits."]
    command = [sys.executable, str(HERE / "eval.py"), "--talk", "--run", str(two)]
    command += ["--device", "cpu", "--max-new-tokens", "5"]
    process = subprocess.run(command, input=b"\n".join(lines), capture_output=True, timeout=600)
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


def test_a_talk_on_a_terminal_survives_ctrl_c_and_ends_when_told(chat):
    """The version says Hello; the bare backbone does not end, so there is time to stop it."""
    fcntl, termios, select = map(pytest.importorskip, ("fcntl", "termios", "select"))
    ours, its = os.openpty()
    how = termios.tcgetattr(its)
    how[3] |= termios.NOFLSH  # or Ctrl-C drops what was printed and not yet read, the next prompt, too
    termios.tcsetattr(its, termios.TCSANOW, how)
    command = [sys.executable, str(HERE / "eval.py"), "--talk", "--run", str(chat)]
    command += ["--device", "cpu", "--max-new-tokens", "100000"]
    process = subprocess.Popen(
        command,
        **dict.fromkeys(("stdin", "stdout", "stderr"), its),
        env=os.environ | {"TERM": "dumb"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
    )
    os.close(its)

    def say(text, *parts, patience=600):
        """What the program prints in return, until all parts of it are there. Say it again if that takes
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
        say(b"Name three fruits.\n", "Hello.", "% sure; the coordinate is", "\r\n> ")
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
        say(b"Hi.\n", "Hello.", "% sure; the coordinate is")
        os.write(ours, b"/quit\n")
        assert process.wait(600) == 0
    finally:
        process.kill()
        os.close(ours)


def test_every_task_is_measured_under_a_named_version_and_a_composition(micro, two, tmp_path, capsys):
    def composed(out):
        only = ["compose", "alpaca", "code", "--weights", "1", "0", "--name", "onlyA", "--run", str(out)]
        commit.main(only)
        names = ["--version", "alpaca", "code", "onlyA", "--json", str(tmp_path / "u.json")]
        evaluation.main(["--run", str(out), *names])
        return json.loads((tmp_path / "u.json").read_text())["rows"][0]["under"]

    out = copy_of(two, tmp_path)
    table, stored = composed(out), Run(two).manifest["results"][-1]["stored"]
    evaluation.main(["--run", str(out), "--version", "onlyA", "--prompt", "Hi.", "--max-new-tokens", "3"])
    assert "as asked" in capsys.readouterr().out
    for task, row in table.items():
        assert row[task] == pytest.approx(stored[task], rel=1e-6)
        assert row["onlyA"] == pytest.approx(row["alpaca"], rel=1e-5)  # weight 0 takes code out again
    # An export is a version at one coordinate. With a fixed one that is the version, in peft, too.
    out, few = tmp_path / "fixed", ["--examples", "16", "--epochs", "1", "--fixed-coordinate"]
    train.main(micro("alpaca", out, *few))
    train.main(micro("code", out, "--lock", *few))
    for row in composed(out).values():
        assert row.get("onlyA, peft", row["alpaca"]) == pytest.approx(row["alpaca"], rel=1e-4)


def by_row(rows):
    """{(task, checkpointing, devices, device): the parts of the count, in bytes}"""
    key = lambda row: (row["task"], row["checkpointing"], row["devices"], row["device"])
    return {key(row): [row[part] for part in evaluation.PARTS] for row in rows}


def test_by_count_mistral_7b_trains_its_second_task_in_23_gib():
    """From two depths: a layer more adds the same, however many there are."""
    shallow, deep = (by_row(evaluation.count_memory("random:mistral-7b", depth)) for depth in (2, 4))
    whole = {
        key: [a + 15 * (b - a) for a, b in zip(shallow[key], deep[key])]
        for key in shallow
        if key[2:] == (1, 0)
    }
    parts = dict(zip(evaluation.PARTS, whole[2, False, 1, 0]))
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
def test_the_count_of_memory_is_what_autograd_keeps_of_a_real_pass(checkpointing):
    """The same function counts tensors that have memory, and such that have none: of these, transformers
    cannot see that a single sequence needs no mask."""
    counts = {}
    for mode in (contextlib.nullcontext(), evaluation.FakeTensorMode()):
        with mode:
            model = NIWF(from_shape("tiny", torch.bfloat16, 2), pad_id=0)
            model.bank.add(16)
            parts = WeightField(2, 16), CoordinateDynamics(model.features)
            if checkpointing:
                model.checkpoint()
            counts[type(mode)] = evaluation.count_kept(model, *parts)
    real, counted = counts.values()
    assert all(0 <= b - a < 2.1 * 2 * evaluation.TOKENS**2 for a, b in zip(real, counted))
    assert real[-1] == counted[-1] and 0 < real[0] < real[1] or checkpointing


def test_memory_is_counted_without_a_run_folder(tmp_path, capsys):
    evaluation.main(["--memory", "--backbone", "tiny", "--json", str(tmp_path / "m.json")])
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert len(rows) == 4 * (1 + 2 + 4) and all(row["activations"] > 0 for row in rows)
    assert sum(any(line.startswith(part) for part in evaluation.PARTS) for line in lines) == 7
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(Refused, match="cannot be loaded"):
        evaluation.main(["--memory", "--backbone", str(tmp_path)])


# --------------------------------------------------------------------------------------------------- train.py


def test_exact_lock_nothing_stored_moves_by_a_bit(micro, first, tmp_path, capsys):
    out = copy_of(first, tmp_path)
    before = {p.name: p.read_bytes() for p in (out / "versions").iterdir()}
    train.main(micro("code", out, "--lock"))
    row = Run(out).manifest["results"][-1]
    assert row["identical"] == {"alpaca": [32, 32], "code": [32, 32]}
    assert evaluation.forgetting(Run(out).manifest["results"], "stored") == {"alpaca": 0.0, "code": 0.0}
    assert all((out / "versions" / name).read_bytes() == data for name, data in before.items())
    assert "+0.00 %  logits bit-identical on 32 of 32" in capsys.readouterr().out
    run = Run(out)
    model = run.open_model(*run.open_backbone(run.manifest["backbone"]["name"], "cpu"))
    assert (
        len(model.bank) == 8
        and run.versions[1].index.tolist() == list(range(8))
        and run.versions[0].index.tolist() == list(range(4))
    )
    assert (
        run.versions[1].reads == [run.versions[0].hash]
        and run.versions[1].dynamics is run.versions[0].dynamics
    )
    with tensors_of(out, 1) as f:
        assert not any(k.startswith("dynamics") for k in f.keys())
        assert {f.get_slice(k).get_shape()[0] for k in f.keys() if k.startswith("bank.")} == {4}
        moved = [k for k in f.keys() if k.endswith(".B") and f.get_tensor(k).any()]
    assert moved, "the second task must have learned something"
    # A batch may mix prompts that go to different versions: as each would be answered alone. In double
    # precision, where no choice is as near as rounding.
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
    run = Run(first)
    args = train.parse_options(micro("code", first, "--lock"))
    train.fill_in(args, run)
    model = run.open_model(*run.open_backbone(args.backbone, "cpu"))
    torch.manual_seed(0)
    h_bar = 3 * torch.randn(50, 32)
    learner = train.writable(run, model, h_bar, args)
    weights = learner.weights()
    assert {k.split(".")[0] for k in weights} == {"bank", "field"} and learner.reads == [run.versions[0].hash]
    assert {len(p) for k, p in weights.items() if k.startswith("bank")} == {4} and len(model.bank) == 8
    assert not any(
        p.requires_grad for v in run.versions for m in (v.field, v.dynamics) for p in m.parameters()
    )
    logits = learner.field(learner.dynamics(h_bar))  # [50, L, 8]
    # Its own two lead at the start, at all of its coordinates. It may read the next.
    indices, weights = top_k_gating(logits, 3)
    assert (indices[..., :2] >= 4).all() and (indices[..., 2] < 4).any()
    assert weights.min() > 0.25


def test_a_third_task_reads_both_and_moves_neither(micro, first, tmp_path):
    out = copy_of(first, tmp_path)
    train.main(micro("code", out, "--lock"))
    train.main(micro("third", out, "--lock", "--data", HERE / "assets" / "data" / "alpaca.val.json"))
    run = Run(out)
    assert run.manifest["results"][-1]["identical"] == {
        "alpaca": [32, 32],
        "code": [32, 32],
        "third": [32, 32],
    }
    assert set(evaluation.forgetting(run.manifest["results"], "stored").values()) == {0.0}
    with tensors_of(out, 2) as f:
        assert json.loads(f.metadata()["version"])["reads"] == [
            v["hash"] for v in run.manifest["versions"][:2]
        ]
        assert f.get_slice("snapshot").get_shape() == [
            32,
            2,
            12,
        ]  # logits over its own 4 bases and the 8 that it reads


@pytest.mark.parametrize("lock", ["soft", "none"])
def test_without_the_exact_lock_one_bank_is_shared_and_task_one_moves(micro, first, tmp_path, lock):
    out = copy_of(first, tmp_path)
    train.main(micro("code", out, *(["--lock", "soft"] if lock == "soft" else [])))
    run = Run(out)
    row = run.manifest["results"][-1]
    assert row["identical"]["alpaca"][0] < 32 and row["identical"]["code"] == [32, 32]
    assert row["drift"]["alpaca"]["moved"] > 0 and row["drift"]["alpaca"]["lock_loss"] > 0
    assert [line["lock"] > 0 for line in steps_of(out)[-11:]] == [lock == "soft"] * 11  # all but its first
    with tensors_of(out, 0) as old, tensors_of(out, 1) as new:
        assert {*old.keys()} == {*new.keys()}
        assert not torch.equal(old.get_tensor("dynamics.w_z.weight"), new.get_tensor("dynamics.w_z.weight"))
    with pytest.raises(Refused, match="cannot be mixed"):
        train.main(micro("third", out, "--lock", "exact"))


@pytest.mark.parametrize(
    "more",
    [
        ["--probe", "adapted", "--pool", "sequence"],
        ["--dense-gating"],
        ["--fixed-coordinate"],
        ["--shared-gating"],
        ["--anchor-source", "empirical"],
    ],
)
def test_every_setting_of_the_paper_runs_and_is_read_back(micro, tmp_path, more):
    out = tmp_path / "run"
    train.main(micro("alpaca", out, *more))
    train.main(
        micro(
            "code",
            out,
            "--lock",
            "soft",
            *[m for m in more if m not in ("--probe", "adapted", "--pool", "sequence", "--fixed-coordinate")],
        )
    )
    run = Run(out)
    v, rows = run.read_version(run.manifest["versions"][-1], []), run.manifest["results"]
    assert v.top_k == (len(v.index) if "--dense-gating" in more else 2)
    assert v.field.layers == (1 if "--shared-gating" in more else 2)
    assert v.dynamics.fixed == ("--fixed-coordinate" in more)
    evaluation.main(["--run", str(out), "--json", str(tmp_path / "e.json")])
    (again,) = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert again["R"]["stored"] == [
        [rows[0]["stored"]["alpaca"], None],
        [rows[1]["stored"][t] for t in ("alpaca", "code")],
    ]
    assert (
        again["R"]["routed"][1] == [rows[1]["routed"][t] for t in ("alpaca", "code")]
        and again["routing"] == rows[1]["routing"]
    )


def test_routing_is_measured_on_what_there_is_when_a_prompt_is_asked(micro, tmp_path, monkeypatch):
    """Pooling over prompt and response is the paper's, but an answer has to be routed before it is there."""
    load_in_double(monkeypatch)
    out = tmp_path / "run"
    train.main(micro("alpaca", out, "--pool", "sequence"))
    train.main(micro("code", out, "--lock"))
    run = Run(out)
    backbone, tokenizer = run.open_backbone(run.manifest["backbone"]["name"], "cpu")
    model = run.open_model(backbone, tokenizer)
    for task in run.tasks:
        examples, h_bar, routes = evaluation.validation_set(run, model, tokenizer, task)
        torch.testing.assert_close(routes, model.probe([p for p, _ in examples]))
        torch.testing.assert_close(h_bar, model.probe([p + r for p, r in examples]))
        choice = run.routed(routes)[1].choice.tolist()
        counts = {t: choice.count(i) for i, t in enumerate(run.tasks)}
        assert counts == run.manifest["results"][-1]["routing"][task]
        nll = sum(
            evaluation.total_nll(model, batch, run.routed(asked)[0])
            for batch, asked in evaluation.batches(examples, routes)
        )
        routed = perplexity(nll, sum(len(r) for _, r in examples))
        assert routed == pytest.approx(run.manifest["results"][-1]["routed"][task])


def break_off(argv, last, monkeypatch):
    """Train, with the state saved after every step, until the plug is pulled in the one after step `last`."""
    schedule = train.learning_rate

    def pull(step, *rest):
        if step > last:
            raise RuntimeError("pulled the plug")
        return schedule(step, *rest)

    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="pulled the plug"):
        broken.setattr(train, "SAVE_EVERY", 0)
        broken.setattr(train, "learning_rate", pull)
        train.main(argv)


def test_a_training_that_stops_anywhere_resumes_to_the_same_bits(micro, first, tmp_path, monkeypatch):
    whole, broken = copy_of(first, tmp_path, "whole"), copy_of(first, tmp_path, "broken")
    train.main(micro("code", whole, "--lock"))
    for last in (0, 3, 4, 9, 10):
        break_off(micro("code", broken, "--lock"), last, monkeypatch)
    assert (broken / "training.safetensors").exists()
    with pytest.raises(Refused, match="unfinished training"):
        train.main(micro("code", broken, "--lock", "--seed", "5"))
    train.main(micro("code", broken, "--lock"))
    assert outcome(broken) == outcome(whole) and not (broken / "training.safetensors").exists()


def test_checkpointing_changes_no_bit_and_a_training_may_go_on_with_it(
    micro, two, first, tmp_path, monkeypatch
):
    out = copy_of(first, tmp_path)
    break_off(micro("code", out, "--lock"), 4, monkeypatch)
    again, calls = AdapterBank.again, []
    monkeypatch.setattr(AdapterBank, "again", lambda bank: (calls.append(1), again(bank))[1])
    train.main(micro("code", out, "--lock", "--checkpointing"))
    assert outcome(out) == outcome(two) and calls


def test_a_fixed_coordinate_resumes_too(micro, tmp_path, monkeypatch):
    """Its dynamics learn nothing, so there are no moments of theirs to bring back."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train.main(micro("alpaca", whole, "--fixed-coordinate"))
    break_off(micro("alpaca", broken, "--fixed-coordinate"), 4, monkeypatch)
    train.main(micro("alpaca", broken, "--fixed-coordinate"))
    assert outcome(broken) == outcome(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_sigkill_at_random_moments_changes_nothing(micro, first, tmp_path, monkeypatch):
    """The first kill comes in the fourth step, and the state is saved after the first: so resuming is what is
    tried, whenever the others come."""
    whole, killed = copy_of(first, tmp_path, "whole"), copy_of(first, tmp_path, "killed")
    schedule, argv = train.learning_rate, ["--lock", "--epochs", 4]
    monkeypatch.setattr(train, "SAVE_EVERY", 0)

    def start(out, last=math.inf):
        child = os.fork()
        if child == 0:
            code = 1
            kill = lambda step: os.kill(os.getpid(), signal.SIGKILL) if step > last else None
            train.learning_rate = lambda step, *rest: (kill(step), schedule(step, *rest))[1]
            try:
                with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
                    train.main(micro("code", out, *argv))
                code = 0
            finally:
                os._exit(code)
        return child

    began = time.time()
    assert os.waitpid(start(whole), 0)[1] == 0
    seconds, moments = time.time() - began, random.Random(0)
    assert os.waitpid(start(killed, 2), 0)[1] == signal.SIGKILL
    for _ in range(3):
        child = start(killed)
        time.sleep(seconds * moments.uniform(0.2, 0.6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert os.waitpid(start(killed), 0)[1] == 0
    assert outcome(killed) == outcome(whole)
    starts = [json.loads(line) for line in (killed / "log.jsonl").read_text().splitlines() if "start" in line]
    assert any(line["start"] > 0 for line in starts)


def test_a_kill_between_commit_and_measuring_is_made_good(micro, first, tmp_path, monkeypatch):
    out, seen = copy_of(first, tmp_path), Run(first).manifest["results"]
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "results": []}))
    train.main(micro("code", out, "--lock"))
    assert Run(out).manifest["results"][0] == seen[0] and len(Run(out).manifest["results"]) == 2
    train.main(micro("alpaca", out))  # nothing left to do: the report again, whatever the options
    assert len(Run(out).manifest["results"]) == 2


def test_an_interrupt_saves_and_says_how_to_go_on(micro, first, tmp_path, monkeypatch):
    whole, out = copy_of(first, tmp_path, "whole"), copy_of(first, tmp_path, "interrupted")
    train.main(micro("code", whole, "--lock"))
    schedule = train.learning_rate
    monkeypatch.setattr(
        train,
        "learning_rate",
        lambda s, *a: (signal.raise_signal(signal.SIGINT) if s == 5 else None, schedule(s, *a))[1],
    )
    with pytest.raises(KeyboardInterrupt, match="step 6 of 12; the same command goes on"):
        train.main(micro("code", out, "--lock"))
    monkeypatch.setattr(train, "learning_rate", schedule)
    train.main(micro("code", out, "--lock"))
    assert outcome(out) == outcome(whole)


@pytest.mark.parametrize(
    "content,message",
    [
        ("[{", "not readable as JSON"),
        ("{}", "record 1 (line 1) has no text under 'instruction'"),
        ("[]", "expected a JSON list"),
        (json.dumps([RECORD, {"instruction": "x"}]), "record 2 has no text under 'output'"),
        (json.dumps([RECORD, {**RECORD, "output": 3}]), "record 2 has no text under 'output'"),
        (json.dumps([{**RECORD, "input": []}]), "record 1 has something other than text under 'input'"),
        (json.dumps([{**RECORD, "output": " "}] * 3), "no usable records"),
    ],
)
def test_bad_data_gets_one_line_and_loses_nothing(micro, first, tmp_path, content, message):
    out, bad = copy_of(first, tmp_path), tmp_path / "bad.json"
    bad.write_text(content)
    before = snapshot_of(out)
    with pytest.raises(Refused) as e:
        train.main(micro("mine", out, "--lock", "--data", bad))
    assert message in str(e.value) and "bad.json" in str(e.value) and "\n" not in str(e.value)
    assert snapshot_of(out) == before


@pytest.mark.parametrize(
    "more,message",
    [
        (["--rank", 5], "its first task fixed 2"),
        (["--probe", "adapted"], "its first task fixed bare"),
        (["--template", "chat"], "its first task fixed alpaca"),
        (["--top-k", 99], "more than --bases 4"),
        (["--backbone", "tiny"], "belongs to another backbone"),
        (["--backbone", "/no/such/folder"], "cannot be loaded"),
        (["--backbone", "/no/such.gguf"], "such.gguf"),
        (["--data", "/no/such.json"], "no such file"),
        (["--device", "tpu"], "not available"),
        (["--task", "../x"], "use letters"),
    ],
)
def test_options_that_cannot_be_get_one_line_and_lose_nothing(micro, first, tmp_path, more, message):
    out = copy_of(first, tmp_path)
    before = snapshot_of(out)
    with pytest.raises(Refused) as e:
        train.main(micro("code", out, "--lock", *more))
    assert message in str(e.value) and "\n" not in str(e.value)
    assert snapshot_of(out) == before


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--task", "x", "--quantile", "2"], "out of range"),
        (["--task", "x", "--batch", "0"], "out of range"),
        (["--lr", "1"], "--task"),
        (["--task", "x", "--lock", "hard"], "invalid choice"),
        (["--task", "x", "--lr", "fast"], "not a number"),
        (["--stream", "2", "--lr", "1"], "--stream goes with"),
        (["--stream", "2", "--task", "x"], "say what to learn"),
    ],
)
def test_the_command_line_answers_in_one_line(capsys, argv, message):
    with pytest.raises(SystemExit):
        train.main(argv)
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_unknown_task_damaged_state_and_foreign_manifest_are_refused(micro, first, tmp_path):
    out = copy_of(first, tmp_path)
    with pytest.raises(Refused, match="brings no data of its own"):
        train.main(
            ["--task", "poems", "--backbone", "tiny", "--device", "cpu", "--out", str(tmp_path / "new")]
        )
    assert not (tmp_path / "new").exists()
    (out / "training.safetensors").write_bytes(b"nonsense")
    with pytest.raises(Refused, match="damaged training state"):
        train.main(micro("code", out, "--lock"))
    (out / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(Refused, match="format: 99"):
        train.main(micro("code", out, "--lock"))


def test_long_and_empty_records_are_counted(micro):
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_FOLDER)
    records = [
        RECORD,
        {**RECORD, "output": ""},
        {**RECORD, "output": "word " * 400},
        {**RECORD, "instruction": "Say bye."},
    ]
    kept, examples, note = train.take_usable(records, tokenizer, 10, 64, "alpaca")
    assert [r["instruction"] for r in kept] == [
        "Say hello.",
        "Say bye.",
    ] and note == "2 (1 empty and 1 over 64 tokens left out)"
    assert examples[0][1][-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in examples[0][0]


def test_own_data_is_held_out_by_prompt(micro, tmp_path, capsys):
    (tmp_path / "mine.json").write_text(
        json.dumps([{**RECORD, "instruction": f"Say {i}."} for i in range(40)] * 2)
    )
    out = tmp_path / "run"
    train.main(micro("mine", out, "--data", tmp_path / "mine.json"))
    held_out = {r["instruction"] for r in json.loads((out / "data" / "mine.val.json").read_text())}
    assert len(held_out) == 4 and "training 36" in capsys.readouterr().out


def test_a_chat_is_learned_and_asked_in_the_chat_template_until_its_turn_ends(chat, micro, tmp_path, capsys):
    run = Run(chat)
    assert run.template == "chat"
    assert run.manifest["results"][0]["stored"]["chats"] < 2 < run.manifest["results"][0]["base"]["chats"]
    capsys.readouterr()
    for more in ([], ["--version", "chats"]):
        evaluation.main(["--run", str(chat), "--prompt", "Say 99.", "--max-new-tokens", "30", *more])
        assert capsys.readouterr().out.startswith("Hello.\n\n[version")
    evaluation.main(["--run", str(chat), "--exact-match"])
    assert "chats: 6 of 6 answers exactly right" in capsys.readouterr().out
    out, backbone = copy_of(chat, tmp_path), run.manifest["backbone"]["name"]
    more = "--lock", "--backbone", backbone, "--rank", 7, "--examples", 16
    with pytest.raises(Refused, match="--template alpaca does not fit .* fixed chat"):
        train.main(micro("code", out, *more, "--template", "alpaca"))
    train.main(micro("code", out, *more))  # and without a word it is the run's
    assert Run(out).template == "chat" and outcome(out)[1][1]["identical"]["chats"] == [6, 6]


def test_a_run_folder_older_than_templates_has_alpacas(first, chat, micro, tmp_path, capsys):
    out = copy_of(first, tmp_path)
    fuzz.forge(out, 0, lambda head, tensors: head["config"].pop("template") and None)
    in_json("manifest.json", "settings.template", ABSENT)(out)
    commit.main(["verify", "--run", str(out)])
    evaluation.main(["--run", str(out)])
    assert "bit-identical on 32 of 32 examples" in capsys.readouterr().out
    with pytest.raises(Refused, match="--template chat does not fit .* fixed alpaca"):
        train.main(micro("code", out, "--lock", "--template", "chat"))
    train.main(micro("code", out, "--lock"))
    assert json.loads((out / "manifest.json").read_text())["settings"]["template"] == "alpaca"
    out = copy_of(chat, tmp_path, "chat")
    in_json("manifest.json", "settings.template", ABSENT)(out)
    with pytest.raises(Refused, match="is a chat|settings: template"):
        evaluation.main(["--run", str(out)])


def test_a_tokenizer_without_a_chat_template_is_refused_before_anything_is_written(micro, tmp_path):
    with pytest.raises(Refused, match="--template chat: the backbone's tokenizer has no chat template"):
        train.main(micro("alpaca", tmp_path / "run", "--template", "chat"))
    assert not (tmp_path / "run").exists()


def test_the_loss_of_a_step_is_equation_9_whatever_its_micro_batches():
    """L = L_LM + 5 L_lock + 0.5 L_sep + 2 L_budget over four examples, in micro-batches of three and one."""
    model, examples = micro_model(bases=6), random_examples(4)
    torch.manual_seed(3)
    dynamics, then, now = CoordinateDynamics(32, 4), WeightField(2, 6, 4, 7), WeightField(2, 6, 4, 7)
    region = Region.fit(torch.tanh(torch.randn(40, 4)))
    anchors = sample_anchors(region, torch.zeros(1, 4), 8, "gaussian", 0)
    old = a_version_of(then, dynamics, region, anchors, {})
    learner = train.Learner(model=model, field=now, dynamics=dynamics, top_k=2, reads=[], protected=[old])
    args = train.argparse.Namespace(lambda_lock=5.0, lambda_sep=0.5, lambda_budget=2.0, margin=3.0)
    h_bar, tokens = model.probe([p for p, _ in examples]), sum(len(r) for _, r in examples)
    terms = [
        train.loss_terms(learner, examples[i:j], h_bar[i:j], args, (j - i) / 4, tokens)
        for i, j in ((0, 3), (3, 4))
    ]
    z = dynamics(h_bar)
    nll = 0.0
    for (p, r), coordinate in zip(examples, z):
        with model.gated(top_k_gating(now(coordinate[None]), 2)):
            log_p = model.backbone(torch.tensor([p + r])).logits[0].log_softmax(-1)
        nll = nll - sum(log_p[len(p) - 1 + i, t] for i, t in enumerate(r))
    lock = sum(((now(a[None]) - s) ** 2).sum() for a, s in zip(anchors, old.snapshot)) / 8
    separation = (
        sum(max(0.0, region.tau + 3.0 - float(region.distance(c[None]))) ** 2 for c in z.detach()) / 4
    )
    wanted = {
        "lm": nll / tokens,
        "lock": 5 * lock,
        "sep": torch.tensor(separation / 2),
        "budget": torch.tensor(4 / 6),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(sum(t[name] for t in terms), value, atol=1e-4, rtol=1e-4)
        assert value > 0.01, name


@pytest.mark.parametrize("n, batch, grad_accum", [(100, 4, 2), (37, 3, 1), (5, 1, 16), (64, 16, 1)])
def test_an_epoch_has_every_example_once_and_like_lengths_together(n, batch, grad_accum):
    args = train.argparse.Namespace(batch=batch, grad_accum=grad_accum, seed=7)
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
    rates = [train.learning_rate(s, 100, 1.0) for s in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates[5] == 1.0
    assert rates[-1] < 1e-3 and all(a >= b for a, b in zip(rates[5:], rates[6:]))


def test_a_stream_goes_on_where_it_was_and_says_what_every_task_cost(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "TINY_VALUES", dict(train.TINY_VALUES, examples=16, val_examples=4))
    command = ["--out", str(tmp_path / "run"), "--device", "cpu"]
    train.main(["--stream", "1", *command])
    first = Run(tmp_path / "run").manifest["versions"]
    train.main(["--stream", "2", *command])
    found, context = tmp_path / "s.json", bench.multiprocessing.get_context
    monkeypatch.setattr(
        bench.multiprocessing, "get_context", lambda _: context("fork")
    )  # imports nothing anew
    bench.main(["growth", "--run", str(tmp_path / "run"), "--repeats", "1", "--json", str(found)])
    run, lines = Run(tmp_path / "run"), json.loads(found.read_text())["rows"]
    versions, row = run.manifest["versions"], run.manifest["results"][-1]
    assert run.tasks == ["alpaca-before", "code-append"] and versions[:1] == first
    assert {r["kind"] for r in run.validation("alpaca-before")} == {"before"}
    assert [x["bases_read"] for x in lines] == [0, 16] and all(x["bases_written"] == 16 for x in lines)
    assert [x["bytes"] for x in lines] == [run.path(v["hash"]).stat().st_size for v in versions]
    assert [x["stored_forgetting"] for x in lines] == [0, 0] and lines[1]["identical"] == [8, 8]
    assert lines[1]["routed_home"] == sum(row["routing"][t][t] for t in run.tasks) / 8
    assert all(x["memory"] > 10**8 and x["routed_ms"] > 0 for x in lines)


@pytest.mark.parametrize("n, batch, size", [(16, 16, 2), (48, 16, 2), (40, 16, 3), (5, 1, 3), (2, 4, 3)])
def test_every_process_has_its_share_of_a_step(n, batch, size, monkeypatch):
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
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert [pick_device(wanted) for wanted in (None, "cuda:1", "cpu")] == ["cuda", "cuda:1", "cpu"]
    monkeypatch.setattr("plumbing.backbone.rank_and_size", lambda: (1, 2))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [pick_device(wanted) for wanted in (None, "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    assert taken == [1, 1]
    with pytest.raises(Refused, match="a GPU of its own: 2 here"):
        pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(Refused, match="a GPU of its own: 2 here"):
        pick_device(None)


def steps_of(run):
    return [line for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "step" in line]


def as_one_process(run, one):
    """The same losses and perplexities, and one line for each step."""
    steps, expected = steps_of(run), steps_of(one)
    assert [line["step"] for line in steps] == [*range(1, len(expected) + 1)]
    for line, other in zip(steps, expected):
        assert all(
            line[key] == pytest.approx(other[key], abs=1e-4) for key in ("lm", "lock", "sep", "budget")
        )
    (row,), (other,) = (Run(folder).manifest["results"] for folder in (run, one))
    for key in ("base", "stored", "routed"):
        assert row[key]["alpaca"] == pytest.approx(other[key]["alpaca"], rel=1e-3)
    assert row["identical"] == other["identical"] and row["routing"] == other["routing"]


def train_in_two(argv, folder, rate=None):
    """Train in two processes, as torchrun would start them. -> (what each printed, the line that ended it,
    its code as `os.wait` has it), lists. rate(rank, step, ...): instead of our learning rate."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    address |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                if rate:
                    train.learning_rate = functools.partial(rate, rank)
                (folder / f"{rank}.end").write_text("")
                with open(folder / f"{rank}.out", "w") as out:
                    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                        commit.run_program(lambda: train.main(argv))
                code = 0
            except SystemExit as e:
                (folder / f"{rank}.end").write_text(e.code if isinstance(e.code, str) else "")
            except BaseException as e:
                (folder / f"{rank}.end").write_text(repr(e))
            finally:
                os._exit(code)
    codes = [os.waitpid(child, 0)[1] for child in children]
    out, end = ([(folder / f"{rank}.{what}").read_text() for rank in range(2)] for what in ("out", "end"))
    return out, end, codes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("more", ["--epochs 3", "--probe adapted --pool sequence --batch 1 --grad-accum 3"])
def test_two_processes_learn_what_one_learns(micro, tmp_path, monkeypatch, more):
    """Two sums of the same numbers. Rounding stays rounding: plain steps in place of AdamW's, which makes a
    step of any gradient however near to zero, and no choice of bases, which could be a near tie."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda weights, lr, **_: torch.optim.SGD(weights, lr))
    one, two, more = tmp_path / "one", tmp_path / "two", ["--dense-gating", "--epochs", "1", *more.split()]
    train.main(micro("alpaca", one, *more))
    (out, silent), _, codes = train_in_two(micro("alpaca", two, *more), tmp_path)
    as_one_process(two, one)
    assert out.count("data  ") == out.count("in all, peak memory") == 1 and silent == "" and codes == [0, 0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_that_is_killed_or_stopped_ends_both_and_the_same_command_goes_on(
    micro, first, tmp_path, monkeypatch
):
    whole, broken = copy_of(first, tmp_path, "whole"), copy_of(first, tmp_path, "broken")
    before, schedule = len(steps_of(first)), train.learning_rate
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    assert train_in_two(micro("code", whole, "--lock"), tmp_path)[2] == [0, 0]

    def disturb(rank, step, *rest, which, at, by):
        if (rank, step) == (which, at):
            signal.raise_signal(by)
        return schedule(step, *rest)

    for which, at, by, said in (
        (1, 3, signal.SIGKILL, ENDED),
        (0, 5, signal.SIGKILL, ENDED),
        (1, 7, signal.SIGINT, "stopped and saved at step 8 of 12; the same command goes on from there"),
    ):
        rate = functools.partial(disturb, which=which, at=at, by=by)
        _, ends, codes = train_in_two(micro("code", broken, "--lock"), tmp_path, rate)
        lines = "".join(ends).strip().splitlines()
        assert len(lines) == 1 and lines[0].endswith(said)
        assert codes[which] == (by if by == signal.SIGKILL else 256) and codes[1 - which] == 256
    assert train_in_two(micro("code", broken, "--lock"), tmp_path)[2] == [0, 0]
    assert outcome(broken) == outcome(whole)
    log = [json.loads(line) for line in (broken / "log.jsonl").read_text().splitlines()]
    starts = [line["start"] for line in log if "start" in line][1:]
    assert starts == sorted(starts) and starts[0] == 0 < starts[1] and starts[-1] == 8
    losses = [{line["step"]: line["lm"] for line in steps_of(run)[before:]} for run in (broken, whole)]
    assert losses[0] == losses[1] and [*losses[1]] == [*range(1, 13)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_two_processes_learn_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "TINY_VALUES", dict(train.TINY_VALUES, examples=16, val_examples=20))
    command = ["--stream", "2", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert train_in_two(command, tmp_path)[1:] == (["", ""], [0, 0])
    run = Run(tmp_path / "run")
    assert run.tasks == ["alpaca-before", "code-append"] and not any(wrong for _, wrong in commit.verify(run))
    same, of = run.manifest["results"][-1]["identical"]["alpaca-before"]
    assert same == of > 0


def test_processes_that_torchrun_starts_speak_and_write_as_one(micro, first):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [HERE / "train.py", *micro("alpaca", first)]
    before, env = snapshot_of(first), dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert (done.returncode, done.stderr, snapshot_of(first)) == (0, "", before)
    assert done.stdout.count("nothing to train") == done.stdout.count("in all, peak memory") == 1


def test_a_committed_task_that_is_asked_for_with_other_options_says_what_it_was_trained_with(
    micro, first, capsys
):
    before = snapshot_of(first)
    train.main(micro("alpaca", first))
    assert "it was trained with" not in capsys.readouterr().out
    train.main(micro("alpaca", first, "--lr", "0.5"))
    assert "nothing to train\nit was trained with lr 0.02;" in capsys.readouterr().out
    assert snapshot_of(first) == before


def test_the_literal_forms_that_benchmarks_run_still_give_the_same(double, micro, monkeypatch, capsys):
    """In double precision: a search goes by signs of gradients, which are none of rounding there."""
    load_in_double(monkeypatch)
    bench.bench_ftn("clf", 1, steps=1)
    assert "same mask in 2 of 2 batches" in capsys.readouterr().out
    monkeypatch.setattr(bench, "StyleRow", functools.partial(synthetic.StyleRow, side=6, k=18))
    bench.bench_lora_ftn(micro("alpaca", "unused")[3], 1)
    assert "the two masks share 100.0%" in capsys.readouterr().out
    logits, (backbone, pad_id, examples) = [], bench.make_backbone("tiny")
    for side in (bench.Gated, bench.Loops):
        torch.manual_seed(0)
        model = side(backbone, pad_id, examples[:2])
        gating = model.gating(model.h_bar)
        logits.append(model.model.logits(examples[:2], gating)[0])
        model.model.detach()
    torch.testing.assert_close(*logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_exact_lock_holds_too(micro, tmp_path):
    for task in ("alpaca", "code"):
        train.main(micro(task, tmp_path / "run", "--lock", "--device", "cuda"))
    assert Run(tmp_path / "run").manifest["results"][-1]["identical"]["alpaca"] == [32, 32]


# ----------------------------------------------------------------------------------------------------- ftn.py


def small_grid(**more):
    torch.manual_seed(3)
    grid = FastGrid(side=4, d_in=2, d_out=2, layers=3, width=4, **more)
    for b in unpack(grid.theta.data, grid.shapes)[1]:
        b.normal_(std=0.1)
    return grid


def shift_batch(n=24, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, generator=rng) * 2 - 1
    return x, (x[:, 0] * x[:, 1] > 0).long()


@pytest.mark.parametrize("cache", [2**17, 300, 1])  # one chunk, a few, one neuron at a time
def test_private_mlps_are_the_literal_networks_and_their_gradient(double, monkeypatch, cache):
    monkeypatch.setattr(ftn, "CACHE", cache)
    grid, (x, _) = small_grid(), shift_batch()
    theta = grid.theta.detach().clone().requires_grad_()
    z = []
    for k in range(len(theta)):
        h, at = x, 0
        for i, (o, n) in enumerate(grid.shapes):
            W, b = theta[k, at : at + o * n].view(o, n), theta[k, at + o * n : at + o * n + o]
            h, at = h @ W.T + b, at + o * n + o
            h = h if i == len(grid.shapes) - 1 else h.relu()
        z.append(h[:, 0])
    ours = PrivateMLPs.apply(grid.theta, x, grid.shapes)
    torch.testing.assert_close(ours, torch.stack(z))
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (torch.stack(z) * weight).sum().backward()
    torch.testing.assert_close(grid.theta.grad, theta.grad)


@pytest.mark.parametrize("kernel, rounds", [(3, 1), (3, 15), (5, 2), (1, 0)])
def test_smoothing_is_the_convolution_repeated_on_a_torus(double, kernel, rounds):
    m = torch.randn(7, 7)
    literal = m.clone()
    reach = range(-(kernel // 2), kernel // 2 + 1)

    def around(m, i, j):
        return sum(m[(i + di) % 7, (j + dj) % 7] for di in reach for dj in reach) / kernel**2

    for _ in range(rounds):
        literal = torch.stack([torch.stack([around(literal, i, j) for j in range(7)]) for i in range(7)])
    torch.testing.assert_close(smooth(m, kernel, rounds), literal)


def test_k_winners_breaks_ties_by_index_and_leaves_out_what_is_committed():
    m = torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, 1.0])
    assert k_winners(m, 4).tolist() == [1, 2, 3, 4]
    free = torch.tensor([True, False, True, True, False, True])
    assert k_winners(m, 3, free).tolist() == [2, 3, 5]
    with pytest.raises(Refused, match="the grid is full: 2 of its 6 .* needs 5 and 4 are left .*--grow"):
        k_winners(m, 5, free)
    with pytest.raises(Refused, match="no centre"):
        smooth(torch.zeros(5, 5), kernel=7, rounds=1)


@pytest.mark.parametrize("steps, bias, start", [(1, False, 0.0), (4, False, -4.0), (4, True, 0.0)])
def test_the_fast_search_and_step_are_algorithm_1_written_out(double, steps, bias, start):
    """Algorithm 1 line by line, Adam included, autograd through everything; then a step with all neurons."""
    grid, (x, y), loss = small_grid(bias=bias), shift_batch(), torch.nn.functional.cross_entropy
    search = SmoothKWTA(k=5, kernel=3, rounds=2, steps=steps, lr=0.3, start=start)
    m, first, second = torch.full((16,), start), torch.zeros(16), torch.zeros(16)
    for i in range(1, steps + 1):
        leaf = m.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(grid(x, leaf.sigmoid()), y), leaf)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        m = m - 0.3 * (first / (1 - 0.9**i)) / ((second / (1 - 0.999**i)).sqrt() + 1e-8)
    literal = smooth(m.view(4, 4), 3, 2).flatten().topk(5).indices.sort().values
    winners = search.configure(grid.loss_of_mask(x, y, loss), grid.side)
    assert winners.tolist() == literal.tolist()

    gradients = []
    for y_hat in (grid.respond(x, winners), grid(x, torch.zeros(16).index_fill(0, winners, 1.0))):
        grid.zero_grad()
        loss(y_hat, y).backward()
        gradients.append([p.grad.clone() for p in grid.parameters()])
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)
    others = torch.ones(16, dtype=torch.bool).index_fill(0, winners, False)
    assert gradients[0][0][winners].abs().sum() > 0
    assert (gradients[0][0][others] == 0).all() and (gradients[0][1][:, others] == 0).all()


def test_a_search_of_one_step_sees_signs_of_gradients_and_no_sizes():
    torch.manual_seed(10)  # the eighth vote leads the ninth by 0.04, as an Adam step is a sign to 1e-4
    g, sizes = torch.randn(64), 10 ** torch.randn(64)
    search = SmoothKWTA(k=8, rounds=4)  # S = 1, eta = 1, as in classification
    votes, sized = (search.configure(lambda m, g=g: (g * m).sum(), 8).tolist() for g in (g.sign(), g * sizes))
    assert votes == sized
    assert votes != k_winners(smooth(-(g * sizes).view(8, 8), 3, 4).flatten(), 8).tolist()


def test_a_grown_grid_answers_committed_masks_with_the_same_bits():
    grid, (x, _) = small_grid(), shift_batch()
    winners = torch.tensor([0, 5, 6, 15])
    commit_mask(grid, winners)
    before = grid.respond(x, winners)
    larger, index = grow(grid, 6)
    assert larger.respond(x, index[winners]).equal(before)
    assert larger.free.sum() == 36 - 4 and not larger.free[index[winners]].any()
    assert [(i // 6, i % 6) for i in index[winners].tolist()] == [(i // 4, i % 4) for i in winners.tolist()]


def micro_gpt2(vocab=300):
    """distilgpt2's shape, narrower: c_attn is a Conv1D."""
    torch.manual_seed(8)
    shape = transformers.GPT2Config(vocab_size=vocab, n_embd=24, n_layer=2, n_head=2, n_positions=64)
    return transformers.GPT2LMHeadModel(shape).eval()


def pool_on(backbone, names, components=9, b_std=0.1):
    targets = find_targets(backbone.requires_grad_(False), names)
    pool = LoRAPool(targets, components, rank=2, b_std=b_std)
    attach(targets, pool.update)
    return targets, pool


@pytest.mark.parametrize(
    "make, names", [(micro_backbone, ("q_proj", "k_proj", "v_proj")), (micro_gpt2, ("c_attn",))]
)
def test_the_pool_adds_equation_1_and_nothing_when_off(make, names):
    backbone = make()
    ids = torch.randint(0, 300, (3, 11))
    bare = backbone(ids).logits
    targets, pool = pool_on(backbone, names)
    assert backbone(ids).logits.equal(bare)
    winners, weight = torch.tensor([1, 4, 7]), torch.tensor([0.2, 1.0, 0.7])
    with pool.applied(pool.take(winners), weight):
        ours = backbone(ids).logits
    twin = make()
    for name, module in find_targets(twin, names).items():
        A, B = pool.parts[name]
        delta = sum(w * B[k].T @ A[k] for w, k in zip(weight, winners))  # sum_k m_k B_k A_k, [d_out, d_in]
        module.weight.data += delta.T if isinstance(module, transformers.Conv1D) else delta
    torch.testing.assert_close(ours, twin(ids).logits)
    assert backbone(ids).logits.equal(bare)


def test_the_search_in_a_pool_is_algorithm_1_with_every_component_and_gradient():
    """Silent components are left out by `loss_of_mask`; the literal search runs all of them. Nothing is
    smoothed: on 3 x 3 neurons a kernel of 3 makes all alike, and what then wins is rounding."""
    backbone = micro_backbone()
    targets, pool = pool_on(backbone, ("q_proj", "k_proj", "v_proj"), b_std=0.0)
    torch.manual_seed(9)
    first = SmoothKWTA(k=2, kernel=3, rounds=1, steps=3, lr=0.5).configure(pool.loss_of_mask(None), 3)
    assert first.tolist() == [0, 1]  # all are silent: the backbone is not asked, ties go to the lower index
    trained = torch.tensor([0, 2, 5])
    pool.store(trained, {n: (A, torch.randn_like(B)) for n, (A, B) in pool.take(trained).items()})
    examples = random_examples(6)

    def loss():
        return response_nll(*response_logits(backbone, 0, examples)).mean()

    full = {n: tuple(p.clone().requires_grad_() for p in pair) for n, pair in pool.parts.items()}

    def literal(mask):
        with pool.applied(full, mask):
            return loss()

    search = SmoothKWTA(k=4, kernel=1, rounds=0, steps=5, lr=0.5)
    masks = []
    for f in (pool.loss_of_mask(loss), literal):
        m = torch.full((9,), 0.3, requires_grad=True)
        f(m).backward()
        masks.append((m.grad, search.configure(f, 3)))
    torch.testing.assert_close(masks[0][0], masks[1][0])
    assert (masks[1][0][torch.tensor([1, 3, 4, 6, 7, 8])] == 0).all() and masks[0][1].equal(masks[1][1])
    assert all(p.grad is None for p in backbone.parameters())
    assert not any(t.requires_grad for pair in pool.parts.values() for t in pair)


@pytest.mark.parametrize(
    "decay, carried, kept", [(0.0, False, True), (0.01, False, False), (0.0, True, False)]
)
def test_unselected_components_get_no_gradient_and_move_only_by_decay_or_old_moments(decay, carried, kept):
    backbone = micro_backbone()
    _, pool = pool_on(backbone, ("q_proj",), b_std=0.1)
    live = {n: tuple(p.requires_grad_() for p in pair) for n, pair in pool.take(ALL).items()}
    parameters = [p for pair in live.values() for p in pair]
    adam = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=decay)
    first, second = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])

    def step(winners, seed):
        adam.zero_grad()
        with pool.applied({n: (A[winners], B[winners]) for n, (A, B) in live.items()}):
            response_nll(*response_logits(backbone, 0, random_examples(4, seed))).mean().backward()
        others = torch.ones(9, dtype=torch.bool).index_fill(0, winners, False)
        assert all((p.grad[others] == 0).all() and p.grad[winners].abs().sum() > 0 for p in parameters)
        adam.step()

    step(first, 1)
    before = [p.detach()[first].clone() for p in parameters]
    if not carried:
        adam.state.clear()
    step(second, 2)
    assert all(p.detach()[first].equal(b) for p, b in zip(parameters, before)) == kept


# ----------------------------------------------------------------------------------------------- synthetic.py


SMALL = dict(steps=12, batch=32, side=8, k=8, layers=3, width=4)


SMALL_STYLE = dict(steps=2, tasks=2, side=4, k=4, rank=2, support=4)


def learner_of(row):
    learner, mask = synthetic.KNOWN[row.method]
    return learner(row, mask)


def test_every_task_has_the_same_inputs_and_targets_of_its_own():
    for variant, inputs in (("clf", "uniform"), ("reg", "gaussian")):
        row = synthetic.Row(variant, "nomask", 5, inputs)
        world, again = synthetic.ConceptShift(row), synthetic.ConceptShift(row)
        batches = [world.batch(t, 4000, synthetic.generator("x")) for t in range(3)]
        assert all(torch.equal(x, batches[0][0]) for x, _ in batches)
        assert torch.equal(again.batch(1, 4000, synthetic.generator("x"))[1], batches[1][1])
        targets = [y.flatten().float() for _, y in batches]
        assert all((targets[i] - targets[j]).abs().mean() > 0.1 for i, j in ((0, 1), (0, 2), (1, 2)))
        centre = 0.5 if variant == "clf" else 0.0
        assert all(abs(y.mean() - centre) < 0.05 for y in targets)
        # What a mask is searched on is not what it is scored on, and neither has been trained on.
        for t in range(3):
            parts = [
                world.support[t][0],
                world.test[t][0],
                world.batch(t, 256, synthetic.generator(5, t, 0))[0],
            ]
            points = [{tuple(x) for x in part.tolist()} for part in parts]
            assert len(set.union(*points)) == sum(map(len, points))


@pytest.mark.parametrize(
    "leak, parameters, outputs", [("none", 0, 0), ("decay", 1, 1), ("moments", 1, 1), ("bias", 0, 1)]
)
def test_fixed_masks_keep_every_bit_unless_a_precaution_is_left_out(leak, parameters, outputs):
    out = synthetic.run_row(synthetic.Row("clf", "fixedmask", 0, leak=leak, **SMALL))
    assert [bool(share) for share in out["parameters_moved"]] == [bool(parameters)] * 2 + [False]
    assert [bool(share) for share in out["outputs_moved"]] == [bool(outputs)] * 2 + [False]
    if leak == "none":
        assert synthetic.row_summary(out)["stored_fm"] == synthetic.row_summary(out)["recovered_fm"] == 0.0


@pytest.mark.parametrize("variant, inputs", [("clf", "uniform"), ("clf", "gaussian"), ("reg", "uniform")])
def test_the_lock_keeps_stored_tasks_to_the_bit_and_masks_apart(variant, inputs):
    out = synthetic.run_row(synthetic.Row(variant, "ftn-slow-lock", 1, inputs, tasks=4, **SMALL))
    assert not any(out["parameters_moved"] + out["outputs_moved"])
    assert synthetic.row_summary(out)["stored_fm"] == 0.0
    assert not any(out["overlap_last"]) and not any(out["overwritten"])
    assert len(set(sum(out["winners"], []))) == 4 * SMALL["k"]


@pytest.mark.parametrize(
    "row",
    [
        synthetic.Row("clf", "ftn-slow-lock", 0, **SMALL),
        synthetic.Row("reg", "random-disjoint-recall", 0, **SMALL),
        synthetic.Row("clf", "ftn-slow-hidden-recall", 0, **SMALL),
        synthetic.StyleRow("lora-ftn-lock", 0, **SMALL_STYLE),
    ],
)
def test_a_support_batch_recalls_the_stored_mask_with_the_lowest_loss(row):
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


def test_disjoint_masks_lie_anywhere_and_keep_every_bit_without_a_search():
    rows = [synthetic.Row("clf", "random-disjoint-recall", seed, **SMALL) for seed in (0, 1)]
    first, second = (synthetic.run_row(row) for row in rows)
    assert first["winners"] != second["winners"]
    for out in (first, second):
        assert len(set(sum(out["winners"], []))) == 3 * SMALL["k"]
        assert not any(out["parameters_moved"] + out["outputs_moved"])
    told, recalled = (
        synthetic.run_row(synthetic.Row("clf", m, 0, **SMALL)) for m in ("fixedmask", "fixedmask-recall")
    )
    assert told["R_stored"] == recalled["R_stored"] == told["R_recovered"]


@pytest.mark.parametrize("method, blind", [("ftn-slow-hidden", True), ("ftn-slow", False)])
def test_a_search_may_be_blind_to_what_earlier_tasks_trained(method, blind):
    """A mask of 32 of 64 neurons, the first 32 trained before: what those hold must not reach the search. The
    smoothing mixes neighbours, so it is compared without; at test time everything is seen."""
    learner = learner_of(synthetic.Row("clf", method, 0, **SMALL))
    learner.mask = dataclasses.replace(learner.mask, kernel=1, rounds=0)
    learner.begin(0)
    learner.touched[0][:32] = True
    learner.begin(1)
    searched = [learner.mask.mask_for(learner, 1, *learner.world.support[1])]
    recovered = [learner.mask.recover(learner, 1)]
    learner.grid.readout.data[:, :32] *= 100
    searched += [learner.mask.mask_for(learner, 1, *learner.world.support[1])]
    recovered += [learner.mask.recover(learner, 1)]
    assert torch.equal(*searched) == blind and not torch.equal(*recovered)


def test_recall_without_the_lock_changes_what_is_recovered_and_no_training():
    rows = [synthetic.Row("clf", f"ftn-slow-hidden{how}", 0, **SMALL) for how in ("", "-recall")]
    searched, recalled = map(synthetic.run_row, rows)
    assert all(searched[key] == recalled[key] for key in ("R_stored", "winners", "overwritten"))
    assert searched["R_recovered"] != recalled["R_recovered"]


def test_every_method_has_a_row():
    for method, (learner, _) in synthetic.KNOWN.items():
        experiment = "2" if learner is synthetic.Adapters else "1"
        args = synthetic.parse_options(["--experiment", experiment, "--methods", method])
        assert {row.method for row in synthetic.rows_of(args)} == {method}


def test_one_generator_serves_all_seeds_where_one_is_named():
    def world(seed, **given):
        return synthetic.ConceptShift(synthetic.Row("clf", "nomask", seed, **given))

    x = torch.rand(50, 2)
    own, other = (world(seed).signal(0, x) for seed in (1, 2))
    shared = [world(seed, generator=1) for seed in (1, 2)]
    assert not torch.equal(own, other) and all(torch.equal(w.signal(0, x), own) for w in shared)
    assert not torch.equal(shared[0].test[0][0], shared[1].test[0][0])
    slow = world(1, frequency=4.0)
    literal = (4 * (slow.W[:8] @ x.T + slow.b[:8])).sin().T @ slow.v[0]
    torch.testing.assert_close(slow.signal(0, x), literal)


def test_without_the_lock_a_shared_neuron_forgets():
    """Nothing keeps later masks off: of eight tasks some overwrite another, and those alone move."""
    out = synthetic.run_row(synthetic.Row("clf", "ftn-slow", 0, tasks=8, **SMALL))
    hit = [False] * 8
    for (i, _), share in zip(itertools.combinations(range(8), 2), out["overwritten"]):
        hit[i] |= share > 0
    assert any(hit) and [p > 0 for p in out["parameters_moved"]] == hit


def test_a_full_grid_says_what_to_do_and_a_larger_one_goes_on():
    nine = dict(SMALL, tasks=9, steps=2)
    with pytest.raises(Refused, match="the grid is full: 64 of its 64 .*--grow"):
        synthetic.run_row(synthetic.Row("clf", "ftn-slow-lock", 0, **nine))
    out = synthetic.run_row(synthetic.Row("clf", "ftn-slow-lock", 0, grow=True, **nine))
    assert out["final_side"] == 12 and len(out["R_stored"]) == 9
    assert not any(out["parameters_moved"] + out["outputs_moved"])


def test_ewc_adds_the_gradient_of_its_penalty(double):
    learner = learner_of(synthetic.Row("reg", "ewc", 0, **SMALL))
    world, rng = synthetic.ConceptShift(learner.row), synthetic.generator("ewc")
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
    for s, f in zip(squares, importance):
        torch.testing.assert_close(f, s, rtol=1e-3, atol=1e-9)
    for p in theta:
        p.data += 0.01 * torch.randn_like(p)
    penalty = sum(400 / 2 * (f * (p - a) ** 2).sum() for f, p, a in zip(importance, theta, anchor))
    x, y = world.batch(1, 32, rng)
    learner.row = dataclasses.replace(learner.row, dropout=0.0)
    wanted = torch.autograd.grad(penalty + (learner.grid(x, torch.ones(64)) - y).square().mean(), theta)
    learner.begin(1)
    learner.optimizer.step = lambda: None
    learner.train(1, x, y)
    for p, g in zip(theta, wanted):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-6)


def test_a_supermask_is_learned_straight_through_and_never_moves_again(double):
    learner = learner_of(synthetic.Row("clf", "supsup-wide", 0, dropout=0.0, **SMALL))
    frozen = [w.clone() for w in learner.weights]
    for W, b in zip(*unpack(frozen[0], learner.grid.shapes)):
        assert W.abs().unique().numel() == 1 and (b == 0).all()  # signed constants
    x, y = synthetic.ConceptShift(learner.row).batch(0, 32, synthetic.generator("supsup"))
    learner.begin(0)
    scores = [s.clone().requires_grad_() for s in learner.scores]
    theta, readout = [(s > 0).float() * w + (s - s.detach()) * w for s, w in zip(scores, frozen)]
    z = PrivateMLPs.apply(theta, x, learner.grid.shapes)
    wanted = torch.autograd.grad(learner.loss((readout @ z).T, y), scores)
    learner.train(0, x, y)
    for s, g in zip(learner.scores, wanted):
        torch.testing.assert_close(s.grad, g)
    out = synthetic.run_row(synthetic.Row("clf", "supsup", 0, **SMALL))
    assert not any(out["parameters_moved"] + out["outputs_moved"])


@pytest.mark.parametrize("gain, method", [(4.0, "supsup-wide-top-0.003"), (2.0, "supsup-wide-he-top-0.03")])
def test_of_a_supermask_that_takes_the_top_half_of_every_layer_is_on(gain, method):
    learner = learner_of(synthetic.Row("clf", method, 0, **SMALL))
    for W in learner.layers(learner.weights)[:-1]:
        torch.testing.assert_close(W.abs(), torch.full_like(W, (gain / W.shape[2]) ** 0.5))
    learner.begin(0)
    for _ in range(3):
        learner.train(0, *learner.world.batch(0, 32, synthetic.generator("top")))
    for mask in learner.layers(learner.stored[0]):
        assert mask.sum() * 2 == mask.numel()
    assert learner.optimizer.param_groups[0]["lr"] == float(method.split("-")[-1])


def test_what_is_run_when_no_method_is_named():
    methods = lambda *argv: synthetic.parse_options(argv).methods
    first = [m for m in synthetic.METHODS if not m.startswith("lora-")]
    assert methods("--methods", "all") == first and {*first} - {*methods()} == {"supsup-wide"}
    assert methods("--methods", "ewc-40", "nomask", "ewc-40") == ["ewc-40", "nomask"]
    assert [synthetic.KNOWN[f"ewc-{s}"][1].strength for s in ("40", "4000", "400000")] == [40, 4e3, 4e5]


def test_forgetting_is_positive_where_a_score_got_worse():
    accuracy = [[0.9], [0.7, 0.8], [0.6, 0.9, 0.9]]
    assert synthetic.forgetting_measure(accuracy, 1) == pytest.approx((0.3 + 0.0) / 2)
    error = [[0.1], [0.4, 0.2], [0.3, 0.1, 0.1]]
    assert synthetic.forgetting_measure(error, -1) == pytest.approx((0.2 + 0.0) / 2)
    # the formula as printed rewards the second
    assert synthetic.forgetting_measure(error, 1) == pytest.approx((0.1 + 0.1) / 2)


def test_tables_say_mean_deviation_overlap_and_what_was_lost_to_it(capsys):
    assert synthetic.spread([1.0, 2.0, 6.0]) == "3.000 ±2.646" and synthetic.spread([1.0, None]) == "1.000"
    R = lambda now: [[0.9], [0.8, 0.9], [now, now, 0.9]]
    row = dict(variant="clf", seed=0, tasks=3, overlap_last=[0.1, 0.2, 0.3], overlap_union=[0.7, 0.8, 0.9])
    oracle = dict(row, method="fixedmask", R_stored=R(0.9), R_recovered=R(0.9))
    other = dict(row, method="ftn-slow", R_stored=R(0.7), R_recovered=R(0.65))
    synthetic.print_decomposition([oracle, other], "clf")
    assert capsys.readouterr().out.split("\n")[-2].split() == ["ftn-slow", "0.200", "0.050"]
    worse = [dict(o, variant="reg") for o in (oracle, other)]
    worse = [dict(o, R_stored=[[1 - x for x in r] for r in o["R_stored"]]) for o in worse]
    worse = [dict(o, R_recovered=[[1 - x for x in r] for r in o["R_recovered"]]) for o in worse]
    synthetic.print_decomposition(worse, "reg")  # errors: what was lost is lost there, too
    assert capsys.readouterr().out.split("\n")[-2].split() == ["ftn-slow", "0.200", "0.050"]
    synthetic.print_overlaps([dict(other, method="lora-ftn")])
    lines = capsys.readouterr().out.strip().split("\n")
    assert [line.split()[1:] for line in lines[2:]] == [
        [".", "0.10", "0.20"],
        ["0.10", ".", "0.30"],
        ["0.20", "0.30", "."],
    ]


def test_rows_are_kept_and_do_not_depend_on_the_number_of_workers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["--variant", "clf", "--methods", "fixedmask", "ftn-slow", "--steps", "2"]
    synthetic.main(command + ["--workers", "1", "--json", "one.json"])
    kept = {p: p.stat().st_mtime_ns for p in pathlib.Path("runs/synthetic").iterdir()}
    synthetic.main(command + ["--workers", "2", "--json", "again.json"])
    assert kept == {p: p.stat().st_mtime_ns for p in pathlib.Path("runs/synthetic").iterdir()}
    shutil.rmtree("runs")
    train.main(["--task", "synthetic"] + command + ["--workers", "2", "--json", "two.json"])
    files = [pathlib.Path(f"{name}.json") for name in ("one", "again", "two")]
    one, again, two = (json.loads(file.read_text())["rows"] for file in files)
    assert one == again
    for row in one + two:
        for part in (row, row["summary"]):
            del part["seconds"], part["ms_per_step"]
    assert one == two
    assert "classification" in capsys.readouterr().out


def run_quietly(main, argv, capsys):
    """The line with which a program refuses."""
    with pytest.raises((Refused, SystemExit)) as e:
        main(argv)
    line = str(e.value) if e.type is Refused else capsys.readouterr().err.strip()
    assert line and "\n" not in line and "Traceback" not in line
    return line


def test_a_kept_row_that_is_damaged_or_of_another_row_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row, other = (synthetic.Row("clf", "fixedmask", seed, **SMALL) for seed in (0, 1))
    good, bad = (synthetic.cache_file(r) for r in (row, other))
    assert synthetic.finished_row(row)[1] == synthetic.finished_row(row)[1]
    text = good.read_text()
    saved = json.loads(text)
    lies = [text, text[:-9], "", "null", "[]", "7", "{}", "[" * 100_000, text.replace("0.", "1.", 1)]
    lies += [json.dumps(dict(saved, sha256=None)), json.dumps(dict(saved, result=None))]
    for lie in [*(t.encode() for t in lies), b"\xff\xfe\xff", b"\x00"]:
        bad.write_bytes(lie)
        _, out, message = synthetic.finished_row(other)
        assert out is None and str(bad) in message and "\n" not in message
        assert bad.read_bytes() == lie and good.read_text() == text
    bad.unlink()
    assert synthetic.finished_row(other)[1]["seed"] == 1


def test_a_kept_row_is_named_after_what_decides_its_numbers_and_nothing_else(tmp_path):
    row, style = synthetic.Row("clf", "ftn-slow", 0), synthetic.StyleRow("lora-ftn", 0)
    files = {name: (HERE / name).read_text() for name in ("synthetic.py", "ftn.py", "model.py")}

    def names(name="ftn.py", old="", new=""):
        assert old in files[name]
        for each, text in files.items():
            (tmp_path / each).write_text(text.replace(old, new, 1) if each == name and old else text)
        return synthetic.cache_file(row, tmp_path), synthetic.cache_file(style, tmp_path)

    before = names()
    assert before == (synthetic.cache_file(row), synthetic.cache_file(style))
    for old, new in (
        ("def print_scores(", "def one_more_table():\n    pass\n\n\ndef print_scores("),
        ('add("--seeds"', 'add("--more", help="one more option")\n    add("--seeds"'),
        ('".466"', '".467"'),
        ("class FixedMask", "# a comment\nclass FixedMask"),
    ):
        assert names("synthetic.py", old, new) == before
    for name, old, new in (
        ("synthetic.py", "return order[t * k :", "return order[1 + t * k :"),
        ("synthetic.py", "strength=400.0", "strength=300.0"),
        ("ftn.py", "/ kernel", "* kernel"),
    ):
        assert not set(names(name, old, new)) & set(before)
    changed = names("model.py", 'reduction="none"', 'reduction="mean"')
    assert changed[0] == before[0] and changed[1] != before[1]
    assert synthetic.cache_file(dataclasses.replace(row, seed=1)) != before[0]


def test_a_stopped_experiment_leaves_one_line_and_no_process(tmp_path):
    command = [sys.executable, str(HERE / "synthetic.py"), "--methods", "ftn-slow", "--workers", "2"]
    fcntl, termios = map(pytest.importorskip, ("fcntl", "termios"))
    ours, its = os.openpty()  # a terminal, as the bar that is waited for is drawn on nothing else
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        command, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=its
    )
    os.close(its)
    said = b""
    with contextlib.suppress(OSError):  # at the end, when nobody holds the other side
        while part := os.read(ours, 1000):
            started, said = b"row" in said, said + part
            if b"row" in said and not started:
                os.killpg(process.pid, signal.SIGINT)
    os.close(ours)
    assert process.wait(600) == 1 and b"Traceback" not in said
    said = said.decode()
    assert said.strip().splitlines()[-1].startswith("synthetic.py: stopped; finished rows are kept")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--seeds", "0"], "--seeds: 0 is out of range"),
        (["--tasks", "1"], "--tasks: 1 is out of range"),
        (["--seeds", "9" * 5000], "--seeds: .*not a number"),
        (["--first-seed", "-1"], "out of range"),
        (["--steps", "1e3"], "--steps: '1e3' is not a number"),
        (["--workers", "0"], "out of range"),
        (["--search", "nan", "1"], "--search: nan is out of range"),
        (["--search", "10", "inf"], "out of range"),
        (["--search", "1.5", "1"], "--search 1.5 is not a number of steps"),
        (["--search", "1"], "expected 2"),
        (["--experiment", "2", "--tasks", "7"], "--tasks 7 is out of range"),
        (["--experiment", "2", "--b-std", "-1"], "--b-std: -1 is out of range"),
        (["--experiment", "2", "--b-std", "inf"], "--b-std: inf is out of range"),
        (["--experiment", "2", "--leaks"], "--leaks is an option of experiment 1"),
        (["--b-std", "0.1"], "--b-std is an option of experiment 2"),
        (["--json", "no/such/folder.json"], "--json: 'no/such/folder.json' cannot be written"),
        (["--json", "."], "--json: '.' cannot be written"),
        (["--methods", "lora-ftn"], "experiment 1 has the methods fixedmask"),
        (["--experiment", "2", "--methods", "ewc"], "experiment 2 has the methods lora-fixedmask"),
        (["--experiment", "2", "--backbone", "no/such"], "6 of 6 rows were not computed: .*no/such"),
        (
            ["--methods", "fixedmask", "--tasks", "9", "--steps", "1", "--variant", "clf"],
            "hold 8 fixed masks",
        ),
    ],
)
def test_the_experiments_refuse_in_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, run_quietly(synthetic.main, argv, capsys))
    assert not list(tmp_path.iterdir())


def test_a_backbone_whose_responses_cannot_end_is_refused():
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_FOLDER)
    tokenizer.eos_token = None
    with pytest.raises(Refused, match="tiny: its tokenizer has no token that ends"):
        synthetic.StyleStream(synthetic.StyleRow("lora-ftn", 0), tokenizer)


def test_an_error_while_a_row_is_computed_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic, "run_row", lambda row: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        synthetic.finished_row(synthetic.Row("clf", "fixedmask", 0))


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(Refused, match="not finite in task 1"):
        synthetic.run_row(synthetic.Row("reg", "fixedmask", 0, **dict(SMALL, lr=1e30)))


@pytest.mark.parametrize("method", ["lora-fixedmask", "lora-ftn-lock"])
def test_disjoint_components_keep_every_stored_style_to_the_bit(method):
    out = synthetic.run_row(synthetic.StyleRow(method, 0, **SMALL_STYLE))
    s = synthetic.row_summary(out)
    assert s["stored_fm"] == 0.0 and not any(out["parameters_moved"] + out["outputs_moved"])
    assert not any(out["overlap_last"])
    assert method == "lora-ftn-lock" or s["recovered_fm"] == 0.0


@pytest.mark.parametrize(
    "more",
    [
        dict(method="lora-naive"),
        dict(method="lora-ftn", reconfigure="every"),
        dict(method="lora-ftn", b_std=0.01),
    ],
)
def test_other_ways_to_use_the_pool_run_and_are_not_protected(more):
    out = synthetic.run_row(synthetic.StyleRow(seed=0, **more, **SMALL_STYLE))
    assert all(0 < ce < 20 for ce in out["R_stored"][-1] + out["R_recovered"][-1])
    assert more["method"] != "lora-naive" or all(p > 0.9 for p in out["parameters_moved"][:-1])


METHODS_OF_BANKS = ("lora-bank", "lora-bank-lock")


def test_the_bank_takes_a_component_of_the_same_size_per_task():
    out = learner_of(synthetic.StyleRow("lora-bank", 0, **SMALL_STYLE))
    A, B = next(iter(out.components.parts.values()))
    assert A.shape[:2] == (4, 8) and 0 < B.std() < 2e-3  # 16 components of rank 2, four at a time
    out.begin(0)
    out.train(0, out.world.training[0][:4])
    assert out.stored[0].numel() == 1
    losses = [out.mean_loss(torch.tensor([i]), *out.world.support[0]) for i in range(4)]
    chosen = out.mask.mask_for(out, 0, *out.world.support[0])
    assert losses[int(chosen)] == min(losses) < max(losses)
    free, locked = (synthetic.run_row(synthetic.StyleRow(m, 0, **SMALL_STYLE)) for m in METHODS_OF_BANKS)
    for row in (free, locked):
        offered = [[math.inf if x is None else x for x in losses] for losses in row["offered"]]
        assert row["chosen"] == [losses.index(min(losses)) for losses in offered]
    assert len({*locked["chosen"]}) == locked["tasks"] and synthetic.row_summary(locked)["stored_fm"] == 0.0
    assert [losses.count(None) for losses in locked["offered"]] == list(range(locked["tasks"]))


def test_styles_share_their_sentences_and_no_sentence_is_in_two_parts():
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_FOLDER)
    world = synthetic.StyleStream(synthetic.StyleRow("lora-ftn", 4), tokenizer)
    parts = [
        [{tuple(p) for p, _ in part} for part in (test[0], support[0], training)]
        for test, support, training in zip(world.test, world.support, world.training)
    ]
    assert all(p == parts[0] for p in parts) and [len(p) for p in parts[0]] == [24, 16, 80]
    assert len(set.union(*parts[0])) == 120
    styles = {name: f("The red Fox") for name, f in world.STYLES.items()}
    assert styles == {
        "upper": "THE RED FOX",
        "lower": "the red fox",
        "reverse_words": "Fox red The",
        "double_words": "The The red red Fox Fox",
        "starred_vowels": "Th* r*d F*x",
        "pirate": "Arr! The red Fox matey!",
    }
    assert all(r[-1] == tokenizer.eos_token_id for (examples,) in world.test for _, r in examples)


# -------------------------------------------------------------------------------------------- what is refused

# What is refused, in one line, with every byte still there.
#
# A table of bad inputs over all readers. Each is tried in the world that `assets/fuzz.py` builds: run folders
# with files inside and beside them that are not ours. Then what must work all the same, and the environment:
# no room, no memory, no right to write.

ABSENT, NAN, INF = object(), float("nan"), float("inf")
DEEP = "[" * 100_000
SURROGATE = "a \ud800 b"
CLOCK = {"date": "2026-01-01 00:00:00"}
MANIFEST, VERSION, STATE = (
    r"manifest\.json",
    r"manifest\.json|safetensors|[0-9a-f]{12}",
    r"training\.safetensors",
)

# folder: the run folder that `damage` is called with; commands: what must refuse it, see `argv_of`
Case = collections.namedtuple("Case", "name folder damage commands match")


def put(tree, path, value):
    """Set what "a.0.b" names in a JSON value, or remove it."""
    *way, last = [int(k) if k.isdigit() else k for k in path.split(".")]
    for key in way:
        tree = tree[key]
    if value is ABSENT:
        del tree[last]
    else:
        tree[last] = value(tree) if callable(value) else value


def in_json(file, path, value):
    def damage(folder):
        tree = json.loads((folder / file).read_text())
        put(tree, path, value)
        (folder / file).write_text(json.dumps(tree))

    return damage


def content(file, data):
    def damage(folder):
        (folder / file).unlink(missing_ok=True)
        if data is not ABSENT:
            (folder / file).write_bytes(data if isinstance(data, bytes) else data.encode())

    return damage


def moved(file, *, back=None, where="target"):
    """What is at `file` goes elsewhere; `back` makes something in its place, a link to it if not given."""

    def damage(folder):
        path, aside = folder / file, folder.parent / where / "moved"
        aside = aside / path.name
        aside.parent.mkdir(exist_ok=True)
        if path.exists():
            path.rename(aside)
        back(path) if back else path.symlink_to(aside)

    return damage


def dangling(path):
    path.symlink_to(path.with_name("none"))


def version_path(folder, number):
    about = json.loads((folder / "manifest.json").read_text())
    entry = (about["versions"] + about["compositions"])[number]
    return pathlib.Path("versions", f"{entry['hash']}.safetensors")


def version_file(number, change):
    """`change`(name of the file of a version) gives the damage."""
    return lambda folder: change(version_path(folder, number))(folder)


def lying(number, change):
    return lambda folder: fuzz.forge(folder, number, change)


def in_head(number, path, value):
    return lying(number, lambda head, tensors: put(head, path, value))


def in_tensors(number, key, change):
    """`change`(tensor) replaces a tensor; None removes it."""

    def edit(head, tensors):
        new = change(tensors[key])
        tensors[key] = new
        if new is None:
            del tensors[key]

    return lying(number, edit)


def in_state(key, change=None, **metadata):
    """The saved state of a training with one tensor or some of its metadata changed."""

    def damage(folder):
        path = folder / "training.safetensors"
        about, tensors = fuzz.read_tensors(path)
        key_of = next((k for k in sorted(tensors) if re.search(key, k)), None)
        if change:
            new = change(tensors.pop(key_of))
            tensors |= {} if new is None else {key_of: new}
        about = {k: v for k, v in (about | metadata).items() if v is not None}
        path.write_bytes(fuzz.save({k: t.contiguous() for k, t in tensors.items()}, about))

    return damage


def named(value):
    text = "absent" if value is ABSENT else "computed" if callable(value) else ascii(value)
    return text if len(text) < 30 else f"{text[:20]}...{len(text)}"


# ---------------------------------------------------------------------------------------- the manifest's rows

PATHS = ["../../evil", "a/b", "..", "*", "", "code\n", "a\0b", SURROGATE, "-x", "a b", "x" * 65]
NO_TASK, NO_TEXT = [*PATHS, 7, None, []], [ABSENT, 7, None, [], {}]
NO_HASH = [ABSENT, 7, None, "", "0" * 63, "0" * 65, "g" * 64, "../" + "0" * 64, "0" * 64 + "\n"]
NO_HASH += [lambda e: e["hash"].upper(), lambda e: "../versions/" + e["hash"], lambda e: e["hash"][:12]]
NO_NUMBER = [ABSENT, "3", None, [], NAN, INF, -INF, -1.5, 10**400]
NO_COUNT = ["1", None, -1, 1.5, NAN]
NO_DICT, NO_LIST = [ABSENT, None, 7, "x", []], [ABSENT, None, 7, "x", {}]

IN_MANIFEST = {
    "format": [ABSENT, 0, 2, "1", None, []],
    "more": [1],
    "backbone": [ABSENT, None, [], {}, "tiny"],
    "backbone.name": [ABSENT, 7, None, []],
    "backbone.fingerprint": [ABSENT, 7, None, []],
    "settings": [*NO_DICT, {}],
    "settings.rank": [ABSENT, 0, -1, "2", 2.5, None, NAN],
    "settings.alpha": [ABSENT, "16", None, NAN, INF, -1],
    "settings.coord_dim": [ABSENT, 0, "4", None],
    "settings.pool": [ABSENT, "all", 7, None],
    "settings.probe": [ABSENT, "none", 7, None],
    "settings.fixed_coordinate": [ABSENT, "no", None, 2.5],
    "settings.template": ["mine", 7, None],
    "settings.more": [1],
    "versions": NO_LIST,
    "versions.1": [None, 7, "x", [], {}],
    "versions.1.hash": NO_HASH,
    "versions.1.task": [ABSENT, *NO_TASK, "alpaca", "with-code"],
    "versions.1.lock": [ABSENT, "first", "composed", "x", 7, None],
    "versions.1.date": [*NO_TEXT, "", "yesterday", "2026-01-01 00:00:00\n"],
    "versions.1.more": [1],
    "versions.0.lock": ["exact", "none", "soft"],
    "compositions": NO_LIST,
    "compositions.0": [None, 7, [], {}],
    "compositions.0.hash": NO_HASH[:8],
    "compositions.0.task": ["../../evil", "*", "", "code", 7, None],
    "compositions.0.lock": [ABSENT, "exact", 7],
    "results": NO_LIST,
    "results.1": [None, 7, "x", [], {}],
    "results.1.task": [ABSENT, "poems", "alpaca", 7, None],
    "results.1.version": [ABSENT, "0" * 64, 7, None],
    "results.1.base": NO_DICT,
    "results.1.stored": [*NO_DICT, {}],
    "results.1.stored.code": NO_NUMBER,
    "results.1.routed.code": NO_NUMBER,
    "results.1.base.alpaca": ["3", None, NAN],
    "results.1.stored.poems": [3.0],
    "results.1.routing": NO_DICT,
    "results.1.routing.code": [ABSENT, None, 7],
    "results.1.routing.code.code": NO_COUNT,
    "results.1.inside.code": [ABSENT, None],
    "results.1.inside.code.code": NO_COUNT,
    "results.1.identical.code": [ABSENT, None, 7, [], [3], [5, 3], [-1, 3], ["3", 3], [1, 2, 3]],
    "results.1.gating.code": [ABSENT, None, {}, {"sets": "x", "bases": 1}, {"sets": NAN, "bases": 1}],
    "results.1.drift": [ABSENT, None, 7],
    "results.1.drift.code": [None, {}],
    "results.1.more": [1],
}
WHOLE = ["", "null", "7", "[]", "{}", '"x"', "NaN", DEEP, '{"format":' * 100_000, "{", "x" * 9, "1" * 5000]
WHOLE += ['{"format": ' + "1" * 5000 + "}"]
WHOLE += [b"\xff\xfe\0", b"\0" * 99, '"\\ud800"', b'{"format": 1, "x": "\xff"}']


def twice(kind, number):
    return lambda m: m[kind].append(m[kind][number])


def emptied(m):
    m["versions"], m["compositions"], m["results"] = [], [], []


MANIFEST_EDITS = {
    "a version twice": twice("versions", 1),
    "a composition twice": twice("compositions", 0),
    "a row twice": twice("results", 1),
    "versions in another order": lambda m: m["versions"].reverse(),
    "rows in another order": lambda m: m["results"].reverse(),
    "the first version left out": lambda m: m["versions"].pop(0),
    "no versions, and their files are there": emptied,
    "a version among the compositions": lambda m: m["compositions"].append(m["versions"].pop()),
    "a composition among the versions": lambda m: m["versions"].append(m["compositions"].pop()),
    "an unknown version": lambda m: m["versions"].append({**m["versions"][1], "hash": "0" * 64, "task": "x"}),
}
CONTRADICTIONS = {  # what only the version files tell
    "versions.1.task": ["poems"],
    "versions.1.lock": ["soft", "none"],
    "compositions.0.task": ["poems"],
    "settings.rank": [3, 10**12],
    "settings.coord_dim": [5, 10**12],
    "settings.fixed_coordinate": [True],
    "settings.probe": ["adapted"],
    "settings.template": [ABSENT, "alpaca"],
}


def edited(change):
    def damage(folder):
        about = json.loads((folder / "manifest.json").read_text())
        change(about)
        (folder / "manifest.json").write_text(json.dumps(about))

    return damage


def manifest_cases():
    # One function reads the manifest. So every case goes through `log` and one of the others in turn.
    others = itertools.cycle("merge verify show rollback compose export into eval answers train".split())
    values = [(path, v) for path, vs in IN_MANIFEST.items() for v in vs]
    rows = [(f"{path} {named(v)}", in_json("manifest.json", path, v)) for path, v in values]
    rows += [(f"manifest {named(text)}", content("manifest.json", text)) for text in WHOLE]
    for name, damage in rows:
        yield Case(name, "run", damage, f"log {next(others)}", MANIFEST)
    for name, change in MANIFEST_EDITS.items():
        yield Case(name, "run", edited(change), "verify merge eval", f"{VERSION}|versions")
    for path, values in CONTRADICTIONS.items():
        for v in values:
            damage = in_json("manifest.json", path, v)
            name, match = f"the files say not {path} {named(v)}", f"{VERSION}|exact lock"
            yield Case(name, "run", damage, "verify merge", match)


# ---------------------------------------------------------------------------------------------- version files

NO_SIZE = [ABSENT, 0, -1, "2", 2.5, None, NAN, 10**30]
IN_HEAD = {  # of code, the second version, which reads the first
    "task": [ABSENT, "poems", "../../evil", 7, None],
    "lock": [ABSENT, "first", "soft", "composed", 7],
    "reads": [ABSENT, None, "x", [], [7], ["0" * 64], [None], {}, lambda h: 2 * h["reads"]],
    "writes": [*NO_SIZE, 3, 5],
    "top_k": [*NO_SIZE, 99],
    "n": NO_SIZE,
    "tau": [ABSENT, NAN, INF, -INF, -1.0, "2", None, 10**400],
    "anchors": [ABSENT, 7, "8", None, -8],
    "fixed": [ABSENT, True, "no", None],
    "config": [ABSENT, None, 7, "x", []],
    "more": [1],
}
IN_FIRST_HEAD = {"lock": ["exact", "none"], "reads": [["0" * 64], None], "top_k": [99], "tau": [NAN]}
IN_FIRST_HEAD |= {"fixed": [True]}
IN_COMPOSITION = {
    "task": [ABSENT, "poems", "../x"],
    "lock": [ABSENT, "exact"],
    "reads": [ABSENT, None, [], ["0" * 64] * 2, 7, lambda h: h["reads"][:1], lambda h: [["x"]] * 2],
    "weights": [ABSENT, None, [], [1], [1, 1, 1], [NAN, 1], [INF, 1], ["1", 1], [None, 1], [0, 0], "11"],
    "more": [1],
}
METADATA = [None, {}, {"x": "1"}, *({"version": t} for t in ("", "{", "null", "[]", "7", '"x"', "NaN", DEEP))]
BANK = "bank.model.layers.0.self_attn.q_proj"


def nan_in(t):
    t = t.clone()
    t.view(-1)[0] = NAN
    return t


def cut(t):
    return t[: len(t) - 1].clone()


def gone(t):
    return None


def longer(t):
    return torch.cat([t, t[:1]])


def infinite(t):
    return t * 0 + INF


def narrow(t):
    return t[..., :3].clone()


def flat(t):
    return t.flatten()


def lopsided(t):
    return t + torch.triu(t + 1, 1)


doubled, single, half, integer = (getattr(torch.Tensor, kind) for kind in ("double", "float", "half", "long"))
IN_TENSORS = {  # of code: 8 anchors, 2 layers, 8 logits of which 4 are its own, d = 4
    "anchors": [gone, nan_in, cut, longer, doubled, narrow, lambda t: t + 2, lambda t: t[:0].clone()],
    "snapshot": [gone, nan_in, cut, half, narrow, lambda t: t[0].clone(), lambda t: t[:, :1].clone()],
    "region.mean": [gone, nan_in, cut, single],
    "region.cov": [gone, nan_in, cut, single, torch.neg, torch.zeros_like, infinite, lopsided],
    "field.w1.weight": [gone, nan_in, cut, half, lambda t: t.T.clone()],
    "field.w3.weight": [gone, nan_in, cut, longer],
    "field.norm.bias": [gone, nan_in, longer],
    f"{BANK}.A": [gone, nan_in, cut, longer, doubled, integer, narrow, lambda t: t[:, :1].clone()],
    f"{BANK}.B": [gone, nan_in, cut, infinite, narrow, lambda t: t[0].clone()],
}
IN_FIRST_TENSORS = {
    "dynamics.gru.weight_ih": [gone, nan_in, cut],
    "dynamics.w_z.weight": [gone, nan_in, torch.Tensor.double],
    "dynamics.z0": [gone, nan_in, longer],
    "dynamics.mean": [gone, nan_in, longer],
    "dynamics.deviation": [gone, nan_in, torch.zeros_like],
    f"{BANK}.A": [gone, nan_in],
}


def extra(key, tensor):
    return lambda head, tensors: tensors.update({key: tensor})


def bankless(head, tensors):
    for key in [k for k in tensors if k.startswith("bank")]:
        del tensors[key]


def renamed(old, new):
    def change(head, tensors):
        for key in [k for k in tensors if old in k]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def fewer_bases(head, tensors):
    """Every module has 3 bases, and the header still says 4."""
    tensors |= {k: t[:3].clone() for k, t in tensors.items() if k.startswith("bank")}


def another_rank(head, tensors):
    """A rank of 1 in all modules, where the run's settings say 2."""
    tensors |= {k: t[:, :1].clone() for k, t in tensors.items() if k.startswith("bank")}


LIES = [
    ("a tensor more", extra("evil", torch.ones(1))),
    ("a basis more", extra("bank.x.A", torch.ones(4, 2, 32))),
    ("dynamics of its own", extra("dynamics.z0", torch.zeros(4))),
    ("a region with more", extra("region.more", torch.zeros(4).double())),
    ("no bank", bankless),
    ("fewer bases", fewer_bases),
    ("another rank", another_rank),
    ("modules of another backbone", renamed("layers.1", "layers.7")),
    ("one module of another name", renamed("0.self_attn.q_proj", "0.self_attn.x_proj")),
]


def moved_field(head, tensors):
    tensors["field.w3.bias"] += 1e-3


def narrower(head, tensors):
    for key in ("gru.weight_ih", "mean", "deviation"):
        tensors[f"dynamics.{key}"] = tensors[f"dynamics.{key}"][..., :9].clone()


def version_cases():
    # `verify`, `merge`, `export` and what loads a version use one function, too.
    tables = ((0, IN_FIRST_HEAD, IN_FIRST_TENSORS), (1, IN_HEAD, IN_TENSORS), (2, IN_COMPOSITION, {}))
    for number, heads, tensors in tables:
        others = itertools.cycle((["eval", ""], ["merge", "", "export"], ["merge", ""])[number])
        values = [(key, v) for key, vs in heads.items() for v in vs]
        rows = [(f"head {number} {key} {named(v)}", in_head(number, key, v)) for key, v in values]
        for key, changes in tensors.items():
            for i, change in enumerate(changes):
                rows.append((f"tensor {number} {key} {i}", in_tensors(number, key, change)))
        for name, damage in rows:
            yield Case(name, "run", damage, f"verify {next(others)}", VERSION)
    for i, metadata in enumerate(METADATA):
        for number in (1, 2):
            damage = lying(number, lambda head, tensors, m=metadata: {} if m is None else m)
            yield Case(f"metadata {number} {i}", "run", damage, "verify merge log", VERSION)
    for name, change in LIES:
        yield Case(name, "run", lying(1, change), "verify merge eval", VERSION)
    evil = lying(2, extra("evil", torch.ones(1)))
    yield Case("a composition with a tensor", "run", evil, "verify merge", VERSION)
    yield Case("dynamics for another backbone", "run", lying(0, narrower), "eval train", "backbone")
    yield Case("a moved field", "run", lying(1, moved_field), "verify", VERSION)


# ----------------------------------------------------------------------- files and folders in place of others

MAKERS = {"a link": None, "a dangling link": dangling, "a folder": pathlib.Path.mkdir, "a pipe": os.mkfifo}
VAL, LOGITS = "data/alpaca.val.json", "data/alpaca.logits.json"
PLACES = {  # what is in the place of which of our files
    "a link": ["manifest.json", "versions", "data", VAL, LOGITS],
    "a dangling link": ["manifest.json", "versions", "data", VAL, ".lock", "log.jsonl"],
    "a folder": ["manifest.json", VAL, LOGITS, "log.jsonl"],
    "a pipe": ["manifest.json", VAL, LOGITS, "log.jsonl", ".lock"],
    "a file": ["versions", "data"],
}
READ_BY = {"manifest.json": "log merge train", ".lock": "rollback train", "log.jsonl": "train"}
READ_BY |= {"versions": "verify merge rollback train"}
NO_RECORDS = ["", "{}", "[]", "null", "7", DEEP, b"\xff\xfe", "[{", "[null]", "[7]", '["x"]', "[[]]"]
NOT_TEXT = [{"output": 7}, {"instruction": None}, {"input": []}, {"output": SURROGATE}, {"kind": []}]
NO_RECORDS += [json.dumps([RECORD, {**RECORD, **bad}]) for bad in NOT_TEXT]
DIGEST = "0123456789abcdef"
NO_DIGESTS = ["", "{}", "[]", "null", DEEP, b"\xff", "[1, 2, 3]", json.dumps([DIGEST])]
NOT_DIGESTS = [DIGEST[1:], DIGEST + "0", "x" * 16, None, DIGEST[:15] + "\n", DIGEST.upper()]
NO_DIGESTS += [json.dumps([digest] * 4) for digest in NOT_DIGESTS]


def orphans_lead_elsewhere(where):
    def damage(folder):
        (folder / where / "orphans").symlink_to(folder.parent / "target")
        (folder / "versions" / f"{'1' * 64}.safetensors").write_text("mine")
        (folder / "data" / "third.val.json").write_text("[]")

    return damage


def file_cases():
    for what, names in PLACES.items():
        for name in names:
            damage = moved(name, back={**MAKERS, "a file": pathlib.Path.touch}[what])
            yield Case(f"{name} is {what}", "run", damage, READ_BY.get(name, "merge eval"), re.escape(name))
    lost, commands = content("manifest.json", ABSENT), "log verify merge into merged eval train rollback"
    yield Case("the manifest is lost", "run", lost, commands, "run")
    for where, command in (("versions", "compose"), ("data", "train")):
        damage = orphans_lead_elsewhere(where)
        yield Case(f"{where}/orphans lead elsewhere", "run", damage, command, "orphans")
    for what, make in MAKERS.items():
        damage = version_file(1, lambda name, make=make: moved(name, back=make))
        yield Case(f"version file is {what}", "run", damage, "verify merge eval", VERSION)
    for i, data in enumerate((ABSENT, b"", b"x" * 99, b"\xff" * 8 + b"{}", b"\x08" + bytes(7) + b"[[[[[[[[")):
        for number in (1, 2):
            damage = version_file(number, lambda name, data=data: content(name, data))
            yield Case(f"version file {number} damaged {i}", "run", damage, "verify merge", VERSION)
    for name, texts in (("data/code.val.json", NO_RECORDS), ("data/code.logits.json", NO_DIGESTS)):
        for i, text in enumerate([ABSENT, *texts]):
            command, match = ("eval", "answers", "merge", "train")[i % 4], r"code\.(val|logits)\.json"
            yield Case(f"{name} {named(text)}", "run", content(name, text), command, match)
    damage = in_json("data/code.val.json", "1", ABSENT)
    yield Case("fewer records than digests", "run", damage, "eval merge", r"code\.(logits|val)\.json")
    damage = content("data/third.val.json", json.dumps([RECORD]))
    yield Case("records that merge would overwrite", "run", damage, "into", r"third\.val\.json")
    for kind in ("val", "logits"):  # of an earlier task, which are read when the training has ended
        damage = content(f"data/alpaca.{kind}.json", ABSENT)
        yield Case(f"a lost {kind} file", "halted", damage, "resume", rf"alpaca\.{kind}\.json")


# ------------------------------------------------------------------------------------- an unfinished training


def state_cases():
    steps = ("-1", "0", "1", "4", "999", "1.5", "nan", "", "x", "9" * 30, None)
    rows = [(f"step {ascii(s)}", in_state("x", step=s)) for s in steps]
    abouts = ("", "{", "null", "[]", "7", DEEP, "{}", '{"task": "code"}', None)
    rows += [(f"about {named(a)}", in_state("x", about=a)) for a in abouts]
    changes = [gone, nan_in, cut, longer, doubled, half, flat, infinite]
    for key in ("^bank.*q_proj.A$", "^exp_avg.field.w1.weight$"):
        rows += [(f"{key} {i}", in_state(key, change)) for i, change in enumerate(changes)]
    rows += [("a negative second moment", in_state("^exp_avg_sq.field.w3.weight$", lambda t: t - 1))]
    for s in (-1.0, 999.0, NAN):
        rows += [(f"moments at step {s}", in_state("^step.*", lambda t, s=s: t * 0 + s))]
    for i, data in enumerate((b"", b"nonsense", b"\xff" * 99, b"\x02" + bytes(7) + b"{}")):
        rows += [(f"damaged {i}", content("training.safetensors", data))]
    rows += [(f"is {what}", moved("training.safetensors", back=make)) for what, make in MAKERS.items()]
    rows += [("a tensor more", in_more_state)]
    rows += [("truncated", lambda folder: os.truncate(folder / "training.safetensors", 5000))]
    for name, damage in rows:
        yield Case(f"state: {name}", "halted", damage, "resume", STATE)
    for task, commands in (("of another task", "train"), ("other commands", "rollback-first into")):
        yield Case(f"state: {task}", "halted", lambda folder: None, commands, "training")


def in_more_state(folder):
    path = folder / "training.safetensors"
    about, tensors = fuzz.read_tensors(path)
    path.write_bytes(fuzz.save(tensors | {"evil": torch.ones(1)}, about))


# -------------------------------------------------------------------------------------------------- backbones

MODELING = """
import pathlib
pathlib.Path("ran").write_text("this folder's Python was run")
from transformers import MistralConfig as EvilConfig, MistralForCausalLM as EvilModel
"""


def with_auto_map(folder):
    names = {"AutoConfig": "modeling.EvilConfig", "AutoModelForCausalLM": "modeling.EvilModel"}
    in_json("config.json", "auto_map", names)(folder)
    in_json("config.json", "model_type", "evil")(folder)
    (folder / "modeling.py").write_text(MODELING)


def with_tokenizer_code(folder):
    (folder / "tokenizer.json").unlink()
    in_json("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["modeling.Evil", None]})(folder)
    in_json("tokenizer_config.json", "tokenizer_class", "Evil")(folder)
    (folder / "modeling.py").write_text(MODELING)


def pickled(folder):
    about, tensors = fuzz.read_tensors(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def in_weights(change):
    def damage(folder):
        about, tensors = fuzz.read_tensors(folder / "model.safetensors")
        change(tensors)
        (folder / "model.safetensors").write_bytes(fuzz.save(tensors, about))

    return damage


def emptied_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def sharded_elsewhere(folder):
    about, tensors = fuzz.read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../../../../etc/passwd")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NORM = "model.norm.weight"
BACKBONES = [
    ("auto_map", with_auto_map),
    ("a tokenizer with code", with_tokenizer_code),
    ("only pytorch_model.bin", pickled),
    ("an empty folder", emptied_folder),
    ("no weights", content("model.safetensors", ABSENT)),
    ("no config", content("config.json", ABSENT)),
    ("config broken", content("config.json", "{")),
    ("config a list", content("config.json", "[]")),
    ("config nested", content("config.json", DEEP)),
    ("config not text", content("config.json", b"\xff\xfe")),
    ("unknown type", in_json("config.json", "model_type", "evil")),
    ("type a number", in_json("config.json", "model_type", 7)),
    ("not a language model", in_json("config.json", "model_type", "vit")),
    ("heads that do not fit", in_json("config.json", "num_attention_heads", 0)),
    ("hidden size as text", in_json("config.json", "hidden_size", "32")),
    ("another shape", in_json("config.json", "intermediate_size", 49)),
    ("a layer more", in_json("config.json", "num_hidden_layers", 3)),
    ("weights truncated", lambda folder: os.truncate(folder / "model.safetensors", 5000)),
    ("weights of zeros", content("model.safetensors", bytes(99))),
    ("a missing tensor", in_weights(lambda t: t.pop(NORM))),
    ("a tensor of another shape", in_weights(lambda t: t.update({NORM: t[NORM][:9].clone()}))),
    ("an index that leads elsewhere", sharded_elsewhere),
    ("no tokenizer", lambda folder: [p.unlink() for p in folder.glob("tokenizer*")]),
    ("tokenizer broken", content("tokenizer.json", "{")),
    ("tokenizer empty", content("tokenizer.json", "{}")),
    ("no end of sequence", in_json("tokenizer_config.json", "eos_token", None)),
    ("more tokens than rows", in_json("config.json", "vocab_size", 300)),
]

# ---------------------------------------------------------------------------------------------------- options

HUGE = ["10" + "0" * n for n in (12, 30, 400)]
BAD_NUMBERS = {
    "--lr": ["inf", "nan", "-1", "x", "", "1e999"],
    "--alpha": ["inf", "nan", "-1"],
    "--margin": ["inf", "nan", "-1"],
    "--lambda-lock": ["inf", "nan", "-1"],
    "--lambda-sep": ["inf", "nan"],
    "--lambda-budget": ["inf", "nan"],
    "--quantile": ["0", "1.1", "nan", "inf"],
    "--rank": ["0", "-1", "2.5", "nan", "inf", *HUGE],
    "--bases": ["0", "-1", "x", *HUGE],
    "--top-k": ["0", "99", *HUGE],
    "--seed": ["-1", "1.5", "nan", *HUGE],
    "--coord-dim": ["0", *HUGE],
    "--field-hidden": ["0", *HUGE],
    "--anchors": ["0", *HUGE],
    "--batch": ["0"],
    "--grad-accum": ["0"],
    "--epochs": ["0"],
    "--examples": ["0", "-1"],
    "--val-examples": ["0"],
    "--max-len": ["7", "x"],
    "--lock": ["maybe", ""],
    "--pool": ["all"],
    "--template": ["alpaca", "mine"],
    "--probe": ["adapted"],
    "--device": ["cpu:x", "cpu:", "tpu", "meta", "cuda:x", "cuda:99", ":0", "a b"],
}
TRAIN_ARGUMENTS = [f"{option} {value}" for option, values in BAD_NUMBERS.items() for value in values]
TRAIN_ARGUMENTS += """--frobnicate x | --task ../x | --task=a/b | --task=-x | --task= | --task with-code
    --rank 3 | --top-k 5 | --stream 0 | --stream 77 | --stream 1 | --out proj | --out target | --out notes.txt
    --out notes.txt/x | --data proj | --data notes.txt | --data none | --data pipe | --backbone tiny
    --backbone none/such | --backbone none.gguf | --backbone notes.txt
    --backbone proj""".replace("\n", "|").split("|")
ARGUMENTS = {
    "eval": """--device cpu:x | --device tpu | --outside x | --exact-match -1 | --max-new-tokens 0 | --bench 0
        --version nobody | --version nobody --prompt x | --prompt x --run run first | --run none | --run proj
        --run notes.txt | --run target | --run run none | --json none/x.json | --json proj | --json notes.txt
        --json list.json | --json run/manifest.json | --json code.json | --json run/data/code.val.json
        --json run/log.jsonl | --json link.json | --json package.json | --json pipe | --frobnicate
        --max-new-tokens 1{0} | --exact-match x | --prompt \udcff | --prompt x --input \udcff
        --version \udcff | --memory --run run | --memory --prompt x | --memory --backbone none/such
        --backbone tiny | --device-map x | --memory --growth""",
    "commit": """frobnicate | log --run none | log --run proj | log --run notes.txt | verify --run target
        show | show nobody | show --run proj alpaca | rollback alpaca | rollback nobody
        rollback alpaca --run proj | rollback x --run none | compose alpaca code --weights nan 1 --name x
        log --frobnicate
        compose alpaca code --weights inf 1 --name x | compose alpaca code --weights 0 0 --name x
        compose alpaca code --weights 1 --name x | compose alpaca code --weights x 1 --name x
        compose alpaca --weights 1 1 --name x | compose alpaca --weights 1e400 --name x
        compose alpaca --weights 1 --name ../x | compose alpaca --weights 1 --name code
        compose alpaca --weights 1 --name= | compose with-code --weights 1 --name x
        compose alpaca nobody --weights 1 1 --name x | compose alpaca --name x
        compose alpaca --weights 1 --name x --run proj | merge none | merge proj | merge notes.txt
        merge target | merge other --run proj | merge other --run none | merge other --run notes.txt | merge
        export alpaca --to proj | export alpaca --to notes.txt | export alpaca --to notes.txt/x
        export alpaca --to run | export alpaca --to= | export alpaca --to link.json | export nobody --to lora
        export alpaca --to lora --run proj | export alpaca | export alpaca --to run/versions""",
    "synthetic": """--seeds 0 | --seeds x | --tasks 1 | --steps 0 | --workers 0 | --b-std -1 | --b-std nan
        --b-std inf | --search 0 1 | --search 1 nan | --search inf 1 | --first-seed -1 | --first-seed 1{0}
        --steps 1{0} | --seeds 1{0} | --methods x | --variant x | --experiment 3 | --inputs x
        --json none/x.json | --json proj | --json notes.txt | --json list.json | --json run/manifest.json
        --experiment 2 --tasks 7 | --experiment 2 --methods ewc | --figures notes.txt | --frobnicate
        --experiment 2 --m0 0 | --experiment 2 --generator 0 | --b-std 0""",
}


def option_cases():
    """(name, program, arguments, what the one line says); `{0}` is a row of zeros."""
    for text in TRAIN_ARGUMENTS:
        option, value = re.match(r"\s*(--[\w-]+)[ =]?(.*?)\s*$", text).groups()
        arguments = [f"{option}={value}"] if "=" in text else [option, value]
        match = f"{option}|{re.escape(value or option)}"
        yield f"train {' '.join(arguments)[:40]}", "train", arguments, match
    for program, table in ARGUMENTS.items():
        for text in re.split(r"[|\n]", table.format("0" * 30)):
            yield f"{program} {' '.join(text.split())[:60]}", program, text.split(), r"\w"


# ------------------------------------------------------------------------------------------------- the checks

CASES = [*manifest_cases(), *version_cases(), *file_cases(), *state_cases()]
OPTIONS = [*option_cases()]


def argv_of(command, base, world, bad):
    """-> program, argv of a command that reads the run folder `bad`"""
    at, first = ["--run", str(bad)], str(world / "first")
    return {
        "log": ("commit", ["log", *at]),
        "verify": ("commit", ["verify", *at]),
        "show": ("commit", ["show", "alpaca", *at]),
        "rollback": ("commit", ["rollback", "with-code", *at]),
        "rollback-first": ("commit", ["rollback", "alpaca", *at]),
        "compose": ("commit", ["compose", "alpaca", "code", "--weights", ".5", ".5", "--name", "new", *at]),
        "export": ("commit", ["export", "alpaca", "--to", str(world / "lora"), *at]),
        "merged": ("commit", ["export", "with-code", "--to", str(world / "lora"), "--merged", *at]),
        "merge": ("commit", ["merge", str(bad), "--run", first]),
        "into": ("commit", ["merge", str(world / "other"), *at]),
        "eval": ("eval", [*at, "--device", "cpu"]),
        "answers": ("eval", [*at, "--device", "cpu", "--exact-match", "1", "--max-new-tokens", "2"]),
        "train": ("train", fuzz.options(base, "third", bad, "--lock")),
        "resume": ("train", fuzz.options(base, "code", bad, "--lock")),
    }[command]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The materials, and the world that every case is tried in. Its name is no hindrance."""
    folder = tmp_path_factory.mktemp("bad") / "a wörld"
    world = fuzz.build(folder)
    (world / "notes.txt").write_text("mine")
    (world / "list.json").write_text("[]")  # somebody's, though every record in it is one of ours
    (world / "package.json").write_text('{"name": "x", "config": {"port": 1}, "command": "x"}')
    (world / "code.json").write_text(json.dumps([RECORD]))
    (world / "link.json").symlink_to(world / "target" / "x.tmp")
    os.mkfifo(world / "pipe")
    return folder


@pytest.fixture(scope="session")
def whole(base):
    return fuzz.snapshot(base / "world")


@pytest.fixture
def world(base, whole, monkeypatch):
    """The world. What a test leaves in it is undone."""
    monkeypatch.chdir(base / "world")
    with fuzz.offline():
        yield base / "world"
    fuzz.restore(base / "world", whole)


def refuses(program, argv, match, system=False):
    """The command refuses in one line that matches; `system`: it may be the operating system's."""
    outcome, text = fuzz.run_command(program, [str(a) for a in argv])
    assert outcome == "refused", f"{program} {argv[:3]}: {text[-3000:]}"
    assert re.search(match, text, re.I), f"{program} {argv[:3]} says: {text}"
    assert system or not text.startswith("[Errno"), f"{program} {argv[:3]} says: {text}"


def unchanged(world, before):
    after, before = fuzz.without_locks(fuzz.snapshot(world)), fuzz.without_locks(before)
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    assert not changed, f"changed, made or lost: {changed}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_damaged_on_disk_is_refused_and_every_byte_is_still_there(base, world, case):
    case.damage(world / case.folder)
    before = fuzz.snapshot(world)
    for command in case.commands.split():
        refuses(*argv_of(command, base, world, world / case.folder), case.match)
    unchanged(world, before)


@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: case[0])
def test_options_that_cannot_be_are_refused_before_anything_is_touched(base, world, case):
    before, (_, program, arguments, match) = fuzz.snapshot(world), case
    if program == "train":
        arguments = [*fuzz.options(base, "third", world / "run", "--lock"), *arguments]
    elif program != "synthetic" and "--run" not in arguments:
        arguments = [*arguments, "--run", "run"]
    refuses(program, arguments, match, system=True)
    unchanged(world, before)


UNUSABLE = [
    json.dumps([{**RECORD, **bad}] * 30) for bad in ({"output": " "}, {"output": "x " * 999}, {"kind": []})
]
NO_DATA = [ABSENT, *NO_RECORDS, *UNUSABLE, "NaN", json.dumps([RECORD]).encode("utf-16")]


@pytest.mark.parametrize("text", NO_DATA, ids=named)
def test_data_that_cannot_be_learned_is_refused(base, world, text):
    content("mine.json", text)(world)
    before = fuzz.snapshot(world)
    for out, option in (("run", "--data"), ("new", "--val-data")):
        argv = fuzz.options(base, "third", out, "--lock", option, "mine.json")
        refuses("train", argv, r"mine\.json|no usable records")
    unchanged(world, before)


@pytest.mark.parametrize("name,damage", BACKBONES, ids=[name for name, _ in BACKBONES])
def test_a_backbone_that_cannot_be_trusted_is_refused_and_nothing_of_it_is_run(base, world, name, damage):
    folder = pathlib.Path(shutil.copytree(base / "backbone", world / "backbone"))
    damage(folder)
    before = fuzz.snapshot(world)
    refuses("train", fuzz.options(base, "third", "new", "--backbone", "backbone"), "backbone")
    unchanged(world, before)


# --------------------------------------------------------------------------------------------- what must work


def works(program, argv):
    outcome, text = fuzz.run_command(program, [str(a) for a in argv])
    assert outcome == "worked", f"{program} {argv[:3]}: {text[-3000:]}"
    return text


ALL_COMMANDS = "log verify show rollback compose export merged merge into eval answers train resume"


@pytest.mark.parametrize("command", ALL_COMMANDS.split())
def test_every_command_works_and_touches_nothing_that_is_not_ours(base, world, command):
    folder = world / {"merge": "other", "resume": "halted"}.get(command, "run")
    before = fuzz.snapshot(world)
    works(*argv_of(command, base, world, folder))
    written = "first" if command == "merge" else folder.name
    assert not [*fuzz.judge(before, fuzz.snapshot(world), command, written, True)]


def test_older_results_of_ours_are_written_again_and_no_folder_is_made_for_nothing(base, world):
    for _ in range(2):
        works("eval", ["--run", "run", "--json", "results.json", "--device", "cpu"])
    assert json.loads((world / "results.json").read_text())["rows"][0]["tasks"] == ["alpaca", "code"]
    before = fuzz.snapshot(world)
    refuses("train", fuzz.options(base, "third", "deep/down/new", "--data", "none"), "no such file")
    unchanged(world, before)


def test_a_version_that_nothing_names_is_moved_aside_by_the_next_command_that_writes(base, world):
    run, unnamed = world / "run", {f"{'1' * 64}.safetensors": b"whatever"}
    stranger = world / "other" / version_path(world / "other", 1)
    unnamed[stranger.name] = stranger.read_bytes()
    for name, data in unnamed.items():
        (run / "versions" / name).write_bytes(data)
    works("commit", ["log", "--run", "run"])
    assert all((run / "versions" / name).exists() for name in unnamed), "a command that reads moves nothing"
    works(*argv_of("compose", base, world, run))
    assert {p.name: p.read_bytes() for p in (run / "versions" / "orphans").iterdir()} == unnamed


def test_only_our_own_temporary_files_are_swept(base, world):
    run, kept = (
        world / "run",
        ["manifest.json.tmp", ".notes.txt.7.tmp", "niwf-tmp", "data/x.niwf-tmp", "sub/.x.7.niwf-tmp"],
    )
    ours = [
        ".manifest.json.7.niwf-tmp",
        f"versions/.{'1' * 64}.safetensors.7.niwf-tmp",
        "data/.code.val.json.7.niwf-tmp",
    ]
    for name in ours + kept:
        (run / name).write_text("x")
    works(*argv_of("compose", base, world, run))
    assert [name for name in ours + kept if (run / name).exists()] == kept


def test_merge_copies_the_files_of_its_tasks_and_no_others(base, world):
    ours, theirs = world / "first" / "data", world / "other" / "data"
    files = lambda: {p.name: p.read_bytes() for p in ours.iterdir() if p.is_file()}
    more = ["--lock", "--data", base / "data" / "code.json"]
    works("train", fuzz.options(base, "third.x", world / "first", *more))
    (theirs / "third.x.val.json").write_text("[]")
    before = files()
    works("commit", ["merge", "other", "--run", "first"])
    added = {p.name: p.read_bytes() for p in theirs.glob("third.[vl]*.json") if p.name != "third.x.val.json"}
    assert len(added) == 2 and files() == before | added


# Every basis is chosen, so each is 1e6 after a step; in an MLP the product of three such updates is infinite.
BOUNDLESS = "--alpha 1e6 --lr 1e6 --top-k 4".split()


def test_a_training_that_leaves_the_finite_numbers_stops_and_commits_nothing(base, world):
    argv = fuzz.options(base, "third", "new", *BOUNDLESS)
    refuses("train", argv, "finite at step")
    assert not fuzz.entries_of(fuzz.snapshot(world), "new") and not [*world.glob("new/versions/*")]


def test_a_last_step_that_leaves_the_finite_numbers_leaves_a_run_folder_that_can_be_read(base, world):
    """The loss is finite at every step, and what the last one made gives perplexities that are no numbers."""
    argv = fuzz.options(base, "third", "new", *BOUNDLESS, *"--epochs 1 --batch 16".split())
    refuses("train", argv, "finite")
    if (world / "new").exists():
        works("commit", ["log", "--run", "new"])


@pytest.mark.parametrize("name", ["a\tb", "a\nb", "a\x7fb", "a\udcff", "a 'b' \u2028"], ids=ascii)
@pytest.mark.parametrize("option", ["--out", "--backbone"])
def test_a_folder_of_any_name_is_refused_or_can_be_used_again(base, world, option, name):
    shutil.copytree(base / "backbone", world / name) if option == "--backbone" else None
    before = fuzz.snapshot(world)
    outcome, text = fuzz.run_command("train", fuzz.options(base, "third", "new", option, name))
    folder = name if option == "--out" else "new"
    if outcome == "worked":
        works("commit", ["verify", "--run", folder])
        works("eval", ["--run", folder, "--device", "cpu"])
    else:
        assert outcome == "refused", text
        unchanged(world, before)


def test_a_first_training_that_is_stopped_is_a_run_folder_and_goes_on(base, world):
    command = fuzz.options(base, "alpaca", "new")
    with fuzz.quiet():
        fuzz.interrupted(command, 2)
    about = json.loads((world / "new" / "manifest.json").read_text())
    assert about["versions"] == [] and (world / "new" / "training.safetensors").exists()
    works("train", command)
    assert fuzz.outcome_of(world / "new") == fuzz.outcome_of(world / "first")


def test_100_damaged_run_folders(tmp_path):
    counts, wrong = fuzz.fuzz(100, 0, tmp_path)
    assert not wrong, "\n".join(wrong)


# -------------------------------------------------------------------------------------------- the environment


def says_in_one_line(code, err, match):
    """A program that ended badly has printed one line, apart from its progress."""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "step/s" not in line]
    assert code != 0 and "Traceback" not in err and len(lines) == 1 and re.search(match, lines[0]), err


@pytest.mark.parametrize("program", ["commit", "train", "eval", "synthetic"])
def test_ctrl_c_while_torch_is_imported_is_one_line(program, tmp_path):
    """A module in torch's place says when its import has begun, and does not end."""
    (tmp_path / "torch.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)")
    how = dict(cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    how["env"] = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, str(HERE / f"{program}.py"), "--help"], **how)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=6000)[1]
    says_in_one_line(process.returncode, err, f"{program}.py: stopped")


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word(two):
    command = [sys.executable, str(HERE / "commit.py"), "log", "--run", str(two)]
    ours, its = os.pipe()
    os.close(ours)
    process = subprocess.run(command, stdout=its, stderr=subprocess.PIPE, text=True, timeout=6000)
    os.close(its)
    assert (process.stderr, process.returncode) == ("", 1)


@pytest.mark.parametrize("program", ["train", "synthetic"])
def test_where_there_is_no_terminal_a_report_is_a_line_and_no_bar_is_drawn(
    program, micro, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    few = ("--examples", "32", "--val-examples", "8", "--epochs", "1")
    argv, report = {
        "train": (micro("alpaca", "run", *few), r"^step 2/2 "),
        "synthetic": (
            "--variant clf --methods fixedmask --tasks 2 --steps 5".split(),
            "^clf fixedmask seed 0 ",
        ),
    }[program]
    ours, its = os.pipe()
    with open(its, "w") as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        importlib.import_module(program).main(argv)
    with open(ours, newline="") as pipe:
        err, out = pipe.read(), capsys.readouterr().out
    assert "\r" not in err + out and not re.search(r"/s\]|%\|", err)
    assert len(re.findall(report, out, re.MULTILINE)) == 1


GROUPS = {
    "train": ["optimisation", "bank, field and coordinate (sections 3.1-3.3)", "commitment and locks"],
    "eval": ["options", "what is measured", "answers"],
    "synthetic": ["options", "experiment 1", "experiment 2"],
    "report": ["options"],
    "variants": ["positional arguments", "options"],
    "fuzz": ["positional arguments", "options"],
    **dict.fromkeys(
        ["commit", *(f"commit {c}" for c in "show rollback compose merge export".split())],
        ["positional arguments", "options"],
    ),
    **dict.fromkeys(["commit log", "commit verify"], ["options"]),
    "bench": ["positional arguments", "options"],
    **dict.fromkeys([f"bench {c}" for c in "niwf decode gather ftn lora-ftn".split()], ["options"]),
}


@pytest.mark.parametrize("command", GROUPS)
def test_help_explains_every_option_and_has_an_example(command, monkeypatch, capsys):
    program, *argv = command.split()
    asked, show = [], commit.Parser.print_help
    monkeypatch.setattr(commit.Parser, "print_help", lambda self: [asked.append(self), show(self)])
    with pytest.raises(SystemExit) as e:
        importlib.import_module(program).main([*argv, "--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0 and "\x1b" not in text
    for group in GROUPS[command]:
        assert re.search(rf"^{re.escape(group)}.*:$", text, re.MULTILINE), group
    examples = text.partition("\nexamples:\n")[2].splitlines()
    assert examples and all(re.match(rf"    python (assets/)?{program}\.py( |$)", line) for line in examples)
    for action in asked[0]._actions:
        assert action.help and (not action.option_strings or action.option_strings[0] in text), action
        if type(action.default) in (int, float):
            assert re.search(r"\[.+\]$", asked[0]._get_formatter()._expand_help(action)), action


def test_make_tiny_explains_itself_too():
    command = [sys.executable, str(HERE / "assets" / "make_tiny.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=600).stdout
    assert "python assets/make_tiny.py --data-only" in text


def train_limited(argv, limit, value):
    """Train in a process that has no HOME and may not go beyond a limit."""

    def limit_it():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(limit, (value, value))

    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "HF_HOME", "XDG_CACHE_HOME")}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    how = dict(preexec_fn=limit_it, env=env, capture_output=True, text=True, timeout=600)
    return subprocess.run([sys.executable, str(HERE / "train.py"), *argv], **how)


@pytest.mark.skipif(not resource, reason="no limits here")
def test_a_full_disk_is_one_line_and_the_training_goes_on_later(base, world):
    """No file may be as large as a version or the state of a training. There is no HOME either."""
    command, before = fuzz.options(base, "code", world / "first", "--lock"), fuzz.snapshot(world)
    process = train_limited(command, resource.RLIMIT_FSIZE, 20_000)
    says_in_one_line(process.returncode, process.stderr, "train.py: .*(large|space)")
    after = fuzz.snapshot(world)
    assert fuzz.entries_of(after, "first") == fuzz.entries_of(before, "first")
    assert all(
        after.get(k) == v for k, v in before.items() if k not in ("first/log.jsonl", "first/manifest.json")
    )
    assert not [k for k in after if k.endswith(".niwf-tmp") and k not in before]
    works("train", command)
    assert fuzz.outcome_of(world / "first") == fuzz.outcome_of(world / "run")


@pytest.mark.skipif(not resource, reason="no limits here")
def test_little_memory_is_one_line(base, world):
    before = fuzz.snapshot(world)
    command = fuzz.options(base, "third", world / "new", *"--rank 4096 --bases 4096 --top-k 1".split())
    process = train_limited(command, resource.RLIMIT_DATA, 2**31)
    says_in_one_line(process.returncode, process.stderr, "train.py: not enough memory")
    unchanged(world, before)


def test_a_run_folder_that_cannot_be_written_is_one_line(base, world):
    folders = [world / "run" / part for part in (".", "versions", "data")]
    for folder in folders:
        folder.chmod(0o555)
    try:
        if os.access(folders[0], os.W_OK):
            pytest.skip("root writes everywhere")
        before = fuzz.snapshot(world)
        for command in ("rollback", "compose", "into", "train"):
            refuses(*argv_of(command, base, world, world / "run"), "denied|read-only|cannot", system=True)
        unchanged(world, before)
        for command in ("log", "verify", "eval"):
            works(*argv_of(command, base, world, world / "run"))
    finally:
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.skipif(not commit.fcntl, reason="no fcntl here")
def test_of_two_processes_the_second_is_told_to_wait(base, world):
    before = fuzz.snapshot(world)
    with open(world / "run" / ".lock", "a") as lock:
        commit.fcntl.flock(lock, commit.fcntl.LOCK_EX)
        for command in ("rollback", "compose", "into", "train"):
            refuses(*argv_of(command, base, world, world / "run"), "another process")
        for command in ("log", "verify", "eval"):
            works(*argv_of(command, base, world, world / "run"))
    unchanged(world, before)


# ----------------------------------------------------------------------------------------------------- assets


@pytest.mark.parametrize("task", ["alpaca", "code"])
def test_embedded_sets_are_what_the_readme_says(task):
    sets = {
        side: commit.read_records(HERE / "assets" / "data" / f"{task}.{side}.json")
        for side in ("train", "val")
    }
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


def test_the_losses_of_a_training_that_was_stopped_are_those_of_the_one_that_went_on(tmp_path):
    lines = [{"task": "a"}, *({"step": i, "lm": i} for i in (1, 2, 3)), {"task": "a", "start": 2}]
    lines += [{"step": 3, "lm": 0.30004}, {"task": "b"}, {"step": 1, "lm": 7}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert variants.training_losses(tmp_path / "log.jsonl") == {"a": [1, 2, 0.3], "b": [7]}


def test_a_claim_is_shown_by_a_test_or_by_a_file_of_results():
    rows = lambda name: report.read_results(name)["rows"]
    claims = report.niwf_claims(rows) + report.ftn_claims(rows)
    assert {verdict for *_, verdict in claims} == {"holds", "fails", "partly", "open"}
    here = (HERE / "test_all.py").read_text()
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
    saved = json.loads((HERE / "assets" / "results" / "ftn-search-10.json").read_text())
    row = saved["rows"][0]
    row = dict(row, side=2, k=1, final_side=2, winners=[[0], [1], [2]], touched=[1, 1, 1])
    path = tmp_path / "lie.json"

    def refusal():
        argv = ["--figures", str(path), "--to", str(tmp_path / "to")]
        line = run_quietly(report.main, argv, capsys)
        assert [p.name for p in tmp_path.iterdir()] == ["lie.json"]
        return line

    lies = [(name, dict(row, **{name: value})) for name, values in RESULT_LIES.items() for value in values]
    computed = row.keys() - {f.name for f in dataclasses.fields(synthetic.Row)} - {"summary"}
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
    row = json.loads((HERE / "assets" / "results" / "ftn-search-10.json").read_text())["rows"][0]
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
        records = commit.read_records(HERE / "assets" / "data" / f"{task}.choose.json")[:100]
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
    script = ["bash", HERE / "assets" / "remake", "SmolLM2-135M", "alpaca.json", "code_alpaca.json"]
    subprocess.run(script, cwd=tmp_path, env=os.environ | {"PATH": path}, check=True)

    def named(command):  # the file, and the rest but --workers, which no result depends on
        before, name, after = re.fullmatch(r"(.*)--json assets/results/(\S+)\.json ?(.*)", command).groups()
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


README = (HERE / "README.md").read_text()
PAGES = {HERE / "README.md": README, report.RESULTS / "README.md": "\n\n".join(report.results_page())}


def test_every_equation_is_in_a_function_and_a_test_that_are_there():
    here, numbers = (HERE / "test_all.py").read_text(), collections.defaultdict(set)
    rows = re.findall(r"^\| (\w+) (.*) \| (.*) \| (.*`test_\w+`.*) \|$", README, re.MULTILINE)
    for paper, title, where, tests in rows:
        for first, last in re.findall(r"\((\d+)\)(?:-\((\d+)\))?", title):
            numbers[paper] |= {*range(int(first), int(last or first) + 1)}
        file = (HERE / re.search(r"`(\w+\.py): ", where)[1]).read_text()
        for name in re.findall(r"`(?:\w+\.py: )?([\w.]+)`", where):
            for part in name.split("."):
                assert re.search(rf"^ *(def|class) {part}\b", file, re.MULTILINE), name
        for test in re.findall(r"`(test_\w+)`", tests):
            assert f"def {test}(" in here, test
    assert numbers == {"NIWF": {*range(1, 16)}, "FTN": {1, 2}}
    named = " ".join(title for _, title, _, _ in rows)
    assert all(name in named for name in ("Algorithm 1", "Theorem 2.1", "Theorem D.1"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_link_anchor_and_picture_is_there(page):
    def slug(heading):  # as GitHub makes them
        return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")

    links = re.findall(r"\]\(([^)]+)\)", PAGES[page])
    for link in links:
        file, _, section = link.partition("#")
        if not link.startswith("https://"):
            assert (page.parent / file).exists(), link
            heads = re.findall(r"^#+ (.*)$", PAGES.get((page.parent / file).resolve(), ""), re.MULTILINE)
            assert not section or section in map(slug, heads), link
    assert len(links) > 10


PROGRAMS = {"train": train, "eval": evaluation, "commit": commit, "synthetic": synthetic}


def commands(text):
    """Every command of a page: a line of a bash block, or `code` that begins like one."""
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    spans = re.findall(r"`((?:python|pytest|pip) [^`]+)`", text)
    return [shlex.split(line, comments=True) for line in [*blocks.splitlines(), *spans]]


@pytest.mark.parametrize("command", commands(README), ids=" ".join)
def test_every_command_of_the_readme_is_understood(command):
    here = (HERE / "test_all.py").read_text()
    if command[0] == "python":
        PROGRAMS[pathlib.Path(command[1]).stem].parse_options(command[2:])
    elif command[0] == "pytest":
        assert command[1:2] == ["test_all.py"] and (len(command) == 2 or command[2] == "-k")
        assert re.search(rf"^def test_\w*{command[-1]}" if command[3:] else "", here, re.MULTILINE)
    else:
        assert command == ["pip", "install", "-r", "requirements.txt"] and (HERE / command[-1]).exists()


def test_every_option_that_the_readme_names_is_one_of_ours():
    ours = "".join((HERE / f"{name}.py").read_text() for name in PROGRAMS)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    options = {option for span in spans for option in re.findall(r"(?<!\S)--[a-z][\w-]*", span)}
    assert len(options) > 10
    for option in options - {"--nproc_per_node"}:  # torchrun's own
        assert f'"{option}"' in ours, option


def test_every_refusal_that_the_readme_explains_is_one_of_ours():
    ours = "".join((HERE / f"{name}.py").read_text() for name in [*PROGRAMS, "model"])
    ours += "".join(p.read_text() for p in (HERE / "plumbing").glob("*.py"))
    table = README.partition("| it says |")[2].partition("\n\n")[0]
    messages = [m for row in table.splitlines()[2:] for m in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(messages) > 5
    for message in messages:
        assert message in ours, message


def test_no_figure_that_was_measured_is_typed():
    measured = r"\d\s*%|\d\.\d\d|±|\d\.\d+ (M|GB|GiB|nats|ms)\b"
    made = re.sub(
        r"<!-- [\w-]+ -->.*?<!-- end -->|```.*?```|`[^`]*`|\]\([^)]*\)", "", README, flags=re.DOTALL
    )
    assert not re.search(measured, made.replace("arXiv:2602.18628", ""))
    tree = ast.parse((HERE / "assets" / "findings.py").read_text())
    says = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name.endswith(("says", "say"))]
    texts = [
        n.value for f in says for n in ast.walk(f) if isinstance(n, ast.Constant) and type(n.value) is str
    ]
    # The papers' figures are typed, without a nought before the point; so are names of methods.
    assert texts and not [text for text in texts if re.search(r"(?<!-)\b\d\s*%|(?<!-)\b\d\.\d\d", text)]


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 230 and max(map(len, lines)) < 130
