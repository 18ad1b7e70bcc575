"""What must stay true. Each test states one promise; `pytest test_all.py` takes two to eight minutes of one
core, and with pytest-xdist `pytest -n 2 test_all.py` half. It needs no network, no GPU and nothing outside
this folder; tests that need a GPU or an optional package are skipped, visibly, where there is none.

A promise holds for a reason, on every processor and with any number of threads: by weights that are set by
hand, in double precision where a choice could be a near tie, or whatever a training makes of it. How well a
short training goes is no promise.

Where the equations are, and which test holds each:

NIWF (1) bank. model.py: AdapterBank
    test_fresh_bases_change_nothing_and_detach_restores_all
NIWF (2)-(5) factored update. model.py: AdapterBank.update
    test_update_is_equation_2
NIWF (6) field, (7) gating. field.py: WeightField, top_k_gating
    test_field_is_equation_6_and_gating_equation_7
NIWF (8) dynamics. field.py: CoordinateDynamics
    test_dynamics_are_equation_8_written_out
NIWF (9) loss. train.py: loss_terms
    test_the_loss_of_a_step_is_equation_9_in_any_split
NIWF (10), (13). field.py: separation_loss, lock_loss
    test_lock_and_separation_losses_are_equations_13_and_10
NIWF (11) region. field.py: Region.fit, Region.distance
    test_region_distance_is_mahalanobis
NIWF (12) snapshot. field.py: take_snapshot, sample_anchors
    test_anchors_lie_inside_their_region
NIWF (14)-(15) sizes. model.py: AdapterBank.parameter_count
    test_mistral_7b_has_the_shapes_we_publish
FTN section 2. ftn.py: NeuronGrid
    test_private_mlps_are_the_literal_networks_and_gradients
FTN Algorithm 1. ftn.py: SmoothKWTA, propose
    test_the_fast_search_and_step_are_algorithm_1_written_out
FTN Theorem 2.1. synthetic.py: FixedMask
    test_fixed_masks_keep_every_bit_under_all_precautions
FTN (1)-(2) pool. ftn.py: LoRAPool.update
    test_the_pool_adds_equation_1_and_nothing_when_off
FTN Theorem D.1. ftn.py: LoRAPool
    test_unselected_components_move_only_by_decay_or_moments
"""

import os

# What runs here is so small that two threads wait for each other; and no network is asked, not even a name.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import collections
import importlib.util
import math
import pathlib
import re
import shlex

import pytest
import torch
import transformers

import eval as evaluation
import field
import ftn
from model import AdapterBank, niwf, attach, detach, NIWF, perplexity, response_logits, response_nll
from plumbing import Refused
from plumbing.passes import sampler
from plumbing.prompts import encode, end_token
from plumbing.targets import find_targets, in_out
from field import CoordinateDynamics, Region, WeightField, route, sample_anchors, top_k_gating
from ftn import ALL, FastGrid, LoRAPool, PrivateMLPs, SmoothKWTA, commit_mask, grow, k_winners, smooth, unpack

HERE = pathlib.Path(__file__).parent
from studies import fuzz, report

fuzz.SECONDS = 300  # on a machine that does other things besides, a command may take longer than ten

if hasattr(os, "register_at_fork"):  # a child makes PyTorch's thread pool anew: two threads at once may fail
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

PARTS = "builders records prompts backbones passes exports folders answers training streams hostile machines"
PARTS += " results server browser"
pytest.register_assert_rewrite(*(f"tests.{part}" for part in PARTS.split()))
from tests.builders import *
from tests.records import *
from tests.prompts import *
from tests.backbones import *
from tests.passes import *
from tests.exports import *
from tests.folders import *
from tests.answers import *
from tests.training import *
from tests.streams import *
from tests.hostile import *
from tests.machines import *
from tests.results import *
from tests.server import *
from tests.browser import *

# --------------------------------------------------------------------------------------------------- field.py


def test_field_is_equation_6_and_gating_equation_7():
    """The field is the MLP of Eq. (6), and a gating keeps the K largest logits and their softmax, Eq. (7)."""
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
    torch.testing.assert_close(phi.grown(9)(z)[..., :5], logits)  # what is grown keeps them


def test_coordinates_are_bounded_and_depend_on_their_input():
    """Coordinates lie within [-1, 1] and differ between inputs, so that they can tell prompts apart."""
    torch.manual_seed(0)
    h = 50 * torch.randn(10, 6)
    z = CoordinateDynamics(6, 4)(h)
    assert z.abs().max() <= 1 and len({*map(tuple, z.tolist())}) == 10


def test_dynamics_are_equation_8_written_out():
    """A coordinate is a GRU cell, LayerNorm, a linear layer and tanh of the standardised h_bar, Eq. (8)."""
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
    """The distance from a region, Eq. (11), is Mahalanobis's of artanh(z) under a shrunk covariance."""
    torch.manual_seed(0)
    u = torch.randn(500, 6, dtype=torch.double) @ torch.randn(6, 6, dtype=torch.double)
    region, z = Region.fit(torch.tanh(u), 0.95), torch.tanh(u)
    inverse, rows = torch.linalg.inv(region.cov), field.unsquash(z) - region.mean
    d = torch.stack([(x @ inverse @ x).sqrt() for x in rows])
    torch.testing.assert_close(region.distance(z), d)
    inside = d.quantile(0.95)  # leaving one out moves it further away
    assert region.tau > inside, "the quantile of distances from a Gaussian fitted to the others"
    share, scale = field.shrinkage(field.unsquash(z) - region.mean)
    cov = (1 - share) * torch.cov(field.unsquash(z).T) + share * scale * torch.eye(6)
    torch.testing.assert_close(region.cov, cov)
    torch.testing.assert_close(field.unsquash(torch.tanh(0.1 * u)), 0.1 * u)


@pytest.mark.parametrize("n, d", [(50, 6), (12, 20), (3, 2)])
def test_tau_is_the_quantile_of_leave_one_out_distances(n, d):
    """A region's tau is a quantile of its examples' distances, each from a Gaussian fitted to the others."""
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
    """The shrinkage is Ledoit and Wolf's of 2004, in loops, and scikit-learn's, where that is installed."""
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
    """There are as many dimensions as SmolLM2's coordinates had, and few examples: in-sample distances would
    give a tau that covers half. The quantile of 280 has a deviation of 0.013, the mean of 16 a quarter."""
    torch.manual_seed(0)
    covered = torch.zeros(2, dtype=torch.double)
    for _ in range(16):
        mix = torch.randn(64, 64, dtype=torch.double) / 30
        fitted, unseen = (torch.tanh(torch.randn(n, 64, dtype=torch.double) @ mix) for n in (280, 1000))
        region = Region.fit(fitted)
        taus = torch.tensor([[region.tau], [float(region.distance(fitted).quantile(0.95))]])
        covered += (region.distance(unseen) <= taus).double().mean(1) / 16
    assert 0.93 < covered[0] < 0.97 and covered[1] < 0.85


def test_anchors_lie_inside_their_region():
    """Anchors lie inside their region, Eq. (12), and the same seed always draws the same anchors."""
    torch.manual_seed(0)
    region = Region.fit(torch.tanh(torch.randn(400, 5)))
    anchors = sample_anchors(region, 256, seed=3)
    assert anchors.shape == (256, 5) and anchors.abs().max() < 1
    # Measured again, in another batch and more precisely: on the edge the last digit of a float32 differs.
    assert (region.distance(anchors.double()) <= region.tau * (1 + 1e-5)).all()
    assert torch.equal(anchors, sample_anchors(region, 256, seed=3))


def test_coordinates_that_are_all_alike_still_make_a_region():
    """A task whose prompts all have the same coordinate still gets a region, with finite anchors."""
    region = Region.fit(torch.full((30, 4), 0.3))
    assert sample_anchors(region, 16, 0).isfinite().all()


def test_routing_goes_to_the_likeliest_gaussian():
    """The background is the Gaussian of all coordinates together, with twice their covariance. Probabilities
    are of log-likelihoods over 3."""
    torch.manual_seed(0)
    groups = [torch.tanh(torch.randn(n, 4) @ torch.randn(4, 4) / 3 + torch.randn(4)) for n in (100, 300)]
    regions = [Region.fit(g) for g in groups]
    mean, x = sum(r.n * r.mean for r in regions) / 400, field.unsquash(torch.cat(groups).double())
    cov = sum(r.n * (r.cov + torch.outer(r.mean - mean, r.mean - mean)) for r in regions) / 400
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(cov, x.T.cov(), rtol=0.1, atol=0.01)  # which shrinks nothing
    gaussians = [(r.mean, r.cov) for r in regions] + [(mean, 2 * cov)]
    gauss = [torch.distributions.MultivariateNormal(*g) for g in gaussians]
    x = torch.cat([x, 9 * torch.randn(20, 4, dtype=x.dtype)])
    found = route(torch.tanh(x), regions)
    rows = field.unsquash(torch.tanh(x))
    for row, choice, p, unknown in zip(rows, found.choice, found.probability, found.unknown):
        likelihood = [float((g.log_prob(row) / 3).exp()) for g in gauss]
        best = max(likelihood[:2])
        assert choice == likelihood.index(best)
        wanted = [x / sum(likelihood) for x in (best, likelihood[2])]
        assert [float(p), float(unknown)] == pytest.approx(wanted)
    assert found.known()[:400].double().mean() > 0.8 > 0.2 > found.known()[400:].double().mean()


def test_lock_and_separation_losses_are_equations_13_and_10(double):
    """The lock loss is Eq. (13), also for a grown field; the separation loss, Eq. (10), pushes outwards."""
    torch.manual_seed(0)
    phi, region = WeightField(2, 5, 4, 7), Region.fit(torch.tanh(torch.randn(40, 4)))
    anchors = sample_anchors(region, 8, 0)
    old = a_version_of(phi, CoordinateDynamics(3, 4), region, anchors, {})
    assert field.lock_loss(phi, [old]) == 0 and field.lock_loss(phi, []) == 0
    torch.nn.init.normal_(phi.w3.bias)
    expected = sum(((phi(a[None])[0] - s) ** 2).sum() for a, s in zip(anchors, old.snapshot)) / 8
    torch.testing.assert_close(field.lock_loss(phi, [old]), expected)
    torch.testing.assert_close(field.lock_loss(phi.grown(7), [old]), expected)
    x = torch.tanh(torch.randn(6, 4)).requires_grad_()
    loss = field.separation_loss(x, [region], margin=1.0)
    missing = [max(0.0, region.tau + 1 - region.distance(v[None]).item()) for v in x]
    torch.testing.assert_close(loss, torch.tensor(sum(m**2 for m in missing) / 6))
    loss.backward()
    near, further = torch.tensor(missing) > 0, region.distance(x - 1e-3 * x.grad) > region.distance(x)
    assert near.any() and further[near].all(), "the gradient must push outwards"


# --------------------------------------------------------------------------------------------------- model.py


@pytest.mark.parametrize(
    "committed, live, dtype",
    [(0, 6, torch.float32), (6, 0, torch.float32), (4, 2, torch.float32), (4, 2, torch.bfloat16)],
)
def test_update_is_equation_2(committed, live, dtype):
    """A gated module adds (alpha / r) sum_k w_k B_k A_k x, Eq. (2), from committed and live bases alike."""
    model, name = micro_model(live, committed, dtype), "model.layers.1.mlp.down_proj"
    tolerance = dict(rtol=3e-2, atol=3e-2) if dtype == torch.bfloat16 else {}
    module = find_targets(model.backbone)[name]
    x, gating = torch.randn(3, 5, 48, dtype=dtype), random_gating(3, 2, 6)
    y = module(x)
    with model.gated(gating):
        adapted = module(x)
    assert adapted.dtype == dtype
    A, B = (torch.cat([tensors[f"{name}.{p}"] for tensors in all_bases(model.bank)]) for p in "AB")
    for b in range(3):
        for t in range(5):
            chosen = zip(gating[0][b, 1].tolist(), gating[1][b, 1])
            update = sum(w * B[i].T @ (A[i] @ x[b, t].float()) for i, w in chosen)
            torch.testing.assert_close(adapted[b, t].float(), y[b, t] + 5 / 3 * update, **tolerance)
    assert torch.equal(module(x), y), "gating must be off again"


def test_only_live_and_chosen_bases_get_gradient():
    """Only live bases that a gating chose get a gradient; committed bases and the backbone get none."""
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


def test_fresh_bases_change_nothing_and_detach_restores_all():
    """Fresh bases change no bit of the output, Eq. (1), and detaching trained bases restores the backbone."""
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
    """GPT-2's Conv1D modules can be adapted and restored, and the name of a whole block is refused."""
    backbone = micro_gpt2()
    targets = find_targets(backbone, ("c_attn",))
    assert list(targets) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    bank = AdapterBank(targets, rank=2)
    assert bank.shapes["transformer.h.0.attn.c_attn"] == (24, 72)
    random_bank(bank, 3)
    handles, ids = attach(targets, bank.update), torch.randint(0, 300, (2, 6))
    plain = backbone(ids).logits
    bank.use(random_gating(2, 2, 3))
    assert not torch.equal(backbone(ids).logits, plain)
    detach(handles)
    assert torch.equal(backbone(ids).logits, plain)
    with pytest.raises(Refused, match="no such linear module"):
        find_targets(backbone, ("attn",))  # a block, not a leaf


def test_niwf_in_ten_lines_is_what_a_run_answers(two):
    """The function that model.py begins with gives the stored logits of a run, example by example."""
    run, model, tokenizer = evaluation.open_run(two, "cpu")
    examples, h_bar, _ = evaluation.validation_set(run, model, tokenizer, "code")
    v = run.versions[1]
    assert v.index.tolist() == list(range(len(v.index)))  # it reads all bases, so they need no new numbers
    for (prompt, response), h in zip(examples[:4], h_bar):
        wanted, _ = model.logits([(prompt, response)], run.stored(1, h[None]))
        ids = torch.tensor([prompt]), torch.tensor([response])
        found = niwf(model.backbone, model.bank, v.dynamics, v.field, v.top_k, model.first, *ids)
        torch.testing.assert_close(found, wanted)


def test_padding_and_mixed_batches_change_nothing():
    """An example has the same logits and h_bar alone and in a padded batch whose rows differ in gating."""
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
    """The loss sums -log p over the tokens of the response, EOS included, and over none of the prompt."""
    model, examples = micro_model(), random_examples(4)
    logits, labels = model.logits(examples, None)
    for nll, (p, r) in zip(response_nll(logits, labels), examples):
        log_p = model.backbone(torch.tensor([p + r])).logits[0].log_softmax(-1)
        expected = -sum(log_p[len(p) - 1 + i, t] for i, t in enumerate(r))
        torch.testing.assert_close(nll, expected, atol=1e-4, rtol=1e-4)
    assert perplexity(2 * math.log(3), 2) == pytest.approx(3)


@pytest.mark.parametrize("history", [[], messages("Be brief.", first="system"), messages("Hi.", "Yes?")])
def test_a_chat_is_written_as_its_template_writes_it(history):
    """Prompt and response together are the text of the chat template, up to the end of the answer's turn."""
    tokenizer = chat_tokenizer()
    record = {"instruction": "Say hello.", "input": "Now.", "output": " Hello. ", "history": history}
    prompt, response = encode(record, tokenizer, "chat")
    *asked, answer = [*history, *messages("Say hello.\n\nNow.", " Hello. ")]
    whole = tokenizer.apply_chat_template([*asked, answer], tokenize=False)
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
def test_a_chat_template_without_a_clear_end_is_refused(template, message):
    """A chat template that fails, or does not end each answer by a special token, is refused in one line."""
    record = {"instruction": "Hello?", "output": "Hi."}
    with refused(message):
        encode(record, chat_tokenizer(template), "chat")


def test_the_probe_reads_the_prompt_only_and_no_adapter():
    """Unless asked otherwise, h_bar comes from the bare backbone and the prompt, not from the answer."""
    model = micro_model()
    ((p, r),) = random_examples(1)
    hidden = model.backbone.base_model(torch.tensor([p])).last_hidden_state
    torch.testing.assert_close(model.probe([p])[0], hidden[0].mean(0))
    assert not torch.allclose(model.probe([p], random_gating(1, 2, 6))[0], hidden[0].mean(0))
    # So what h_bar is made of says nothing about the response, unless it is asked to.
    prompt_alone = evaluation.probe_all(model, [(p, r)], "prompt")
    (whole,) = model.backbone.base_model(torch.tensor([p + r])).last_hidden_state
    assert torch.equal(prompt_alone, evaluation.probe_all(model, [(p, r[::-1] + r)], "prompt"))
    torch.testing.assert_close(prompt_alone[0], hidden[0].mean(0))
    torch.testing.assert_close(evaluation.probe_all(model, [(p, r)], "sequence")[0], whole.mean(0))


def clear_model():
    """Make a micro model in double precision whose logits are 1000 times as large, so that no likeliest token
    is a matter of rounding. Return it, prompts, and a gating of each."""
    model = micro_model(dtype=torch.float64)
    model.backbone.lm_head.weight.data *= 1000
    return model, [p for p, _ in random_examples(5)], random_gating(5, 2, 6)


def test_generation_with_a_cache_is_greedy_decoding_without_one():
    """Decoding in batches with a cache gives the tokens that greedy decoding gives each prompt alone."""
    model, prompts, gating = clear_model()
    found = model.generate(prompts, lambda h: gating, eos_id=2, max_new_tokens=12)
    for i, (prompt, new) in enumerate(zip(prompts, found)):
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
    sampled = lambda *how: model.generate(prompts, lambda h: gating, 2, 12, sampler(*how))
    leads, choose = [], lambda logits: (leads.append(logits.topk(2).values.diff()), logits.argmax(-1))[1]
    likeliest = model.generate(prompts, lambda h: gating, 2, 12, choose)
    assert max(torch.cat(leads)) < -0.01 and likeliest == model.generate(prompts, lambda h: gating, 2, 12)
    assert sampled(0.0) == sampled(1.001e-4) == sampled(2.0, 1e-9) == sampled(2.0, 0.0) == likeliest
    assert sampled(2e3, 1.0, 3) == sampled(2e3, 1.0, 3) != sampled(2e3, 1.0, 4) != likeliest
    own = lambda i: lambda h: tuple(g[i : i + 1] for g in gating)
    alone = [model.generate([p], own(i), 2, 12) for i, p in enumerate(prompts)]
    assert [new for (new,) in alone] == likeliest


def test_tokens_are_drawn_by_temperature_and_nucleus():
    """Tokens are drawn by softmax(logits / temperature) among the fewest tokens that reach top_p."""
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
    """A stream that its reader closes early switches the adapters off, so the next pass is bare again."""
    model, prompts = micro_model(), [[5, 6, 7]]
    bare = model.backbone(torch.tensor(prompts)).logits
    steps = model.stream(prompts, lambda h: random_gating(1, 2, 6), -1, 9)
    next(steps)
    assert not torch.equal(model.backbone(torch.tensor(prompts)).logits, bare)
    assert not model.bank.folded and next(steps) and model.bank.folded  # the first token does not wait
    steps.close()
    assert torch.equal(model.backbone(torch.tensor(prompts)).logits, bare)


@pytest.mark.parametrize("rows", ["alike", "mixed"])
def test_bases_gathered_once_for_a_text_give_equation_2(rows, monkeypatch):
    """Bases that are gathered once, unless they are many, give Eq. (2), and are dropped after the text."""
    model, ids = micro_model(bases=3, committed=3), torch.randint(3, 300, (3, 7))
    gating = random_gating(1 if rows == "alike" else 3, 2, 6)
    gating = tuple(g.expand(3, -1, -1) for g in gating)
    with model.gated(gating), torch.no_grad():
        wanted = model.backbone(ids).logits
        with monkeypatch.context() as few:
            few.setattr("model.FOLDED_PARAMETERS", 99)
            assert not model.bank.fold() and not model.bank.folded
        model.bank.fold()
        torch.testing.assert_close(model.backbone(ids).logits, wanted)
    assert model.bank.folded is None and not torch.allclose(model.backbone(ids).logits, wanted)


def test_mistral_7b_has_the_shapes_we_publish():
    """On Mistral 7B the bank, field and dynamics have the published sizes, Eqs. (14) and (15)."""
    with torch.device("meta"):
        backbone = transformers.MistralForCausalLM(transformers.MistralConfig())
        model = NIWF(backbone, pad_id=0)
        field, dynamics = WeightField(32, 16), CoordinateDynamics(model.features)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(backbone) == 7_241_732_096 and len(model.bank.shapes) == 7 * 32
    o_proj = "model.layers.0.self_attn.o_proj"
    assert model.bank.shapes[o_proj] == (4096, 4096)  # the paper's table says 1024 -> 4096
    assert model.bank.parameter_count(16) == 335_544_320  # and so 323 M
    assert count(dynamics.gru) > 780_000 and 990_000 < count(field) + count(dynamics) < 1_100_000


@pytest.mark.parametrize("bare", [0, 2])
def test_checkpointing_gives_the_same_gradients_to_the_bit(bare):
    """Checkpointing computes layers again under their own gating, so gradients are the same to the bit."""
    gradients, examples = {}, random_examples(4)
    for checkpointing in (False, True):
        model = micro_model(4, 3, bare=bare, backbone=micro_backbone(layers=2 + bare))
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


def test_checkpointing_keeps_only_the_inputs_of_layers(monkeypatch):
    """Checkpointing keeps less than half of the activations, changes no output, and detaching undoes it."""
    model = NIWF(micro_gpt2().train(), pad_id=0)
    random_bank(model.bank, 4)
    examples, gating = random_examples(3), random_gating(3, 2, 4)

    def run():
        kept = []
        keep = lambda t: (kept.append(t.numel()), t)[1]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            nll = response_nll(*model.logits(examples, gating))
        return nll, model.generate([p for p, _ in examples], lambda h: gating, 2, 5), sum(kept)

    plain = run()
    model.checkpoint()
    checkpointed = run()
    assert torch.equal(plain[0], checkpointed[0]) and plain[1] == checkpointed[1]
    assert checkpointed[2] < plain[2] / 2
    model.detach()
    forward = type(model.backbone.transformer.h[0]).forward
    assert all(layer.forward.__func__ is forward for layer in model.backbone.transformer.h)
    monkeypatch.setattr("plumbing.targets.find_layers", lambda backbone: [])
    with refused("no layers that can be computed again"):
        model.checkpoint()


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
def test_private_mlps_are_the_literal_networks_and_gradients(double, monkeypatch, cache):
    """A grid has the outputs and gradients of its private MLPs written out, in chunks of any size."""
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
    """Smoothing averages each logit with its neighbours, repeatedly, on a grid whose edges meet."""
    m = torch.randn(7, 7)
    literal = m.clone()
    reach = range(-(kernel // 2), kernel // 2 + 1)

    def around(m, i, j):
        return sum(m[(i + di) % 7, (j + dj) % 7] for di in reach for dj in reach) / kernel**2

    for _ in range(rounds):
        literal = torch.stack([torch.stack([around(literal, i, j) for j in range(7)]) for i in range(7)])
    torch.testing.assert_close(smooth(m, kernel, rounds), literal)


def test_k_winners_breaks_ties_by_index_among_the_free():
    """The k largest free logits win, ties go to the lower index, and a grid without k free is refused."""
    m = torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, 1.0])
    assert k_winners(m, 4).tolist() == [1, 2, 3, 4]
    free = torch.tensor([True, False, True, True, False, True])
    assert k_winners(m, 3, free).tolist() == [2, 3, 5]
    with pytest.raises(ftn.GridFull, match="the grid is full: 2 of its 6 .* needs 5 and 4 are left"):
        k_winners(m, 5, free)
    with pytest.raises(ftn.GridFull, match="needs 7 and 6 are left"):
        k_winners(m, 7)
    with pytest.raises(ValueError, match="must be odd"):
        smooth(torch.zeros(5, 5), kernel=7, rounds=1)


@pytest.mark.parametrize("steps, bias, start", [(1, False, 0.0), (4, False, -4.0), (4, True, 0.0)])
def test_the_fast_search_and_step_are_algorithm_1_written_out(double, steps, bias, start):
    """The search is Algorithm 1 with Adam, line by line; a step of the winners is one of all neurons."""
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
    for y_hat in (grid.forward_winners(x, winners), grid(x, torch.zeros(16).index_fill(0, winners, 1.0))):
        grid.zero_grad()
        loss(y_hat, y).backward()
        gradients.append([p.grad.clone() for p in grid.parameters()])
    torch.testing.assert_close(*gradients)
    others = torch.ones(16, dtype=torch.bool).index_fill(0, winners, False)
    assert gradients[0][0][winners].abs().sum() > 0
    assert (gradients[0][0][others] == 0).all() and (gradients[0][1][:, others] == 0).all()


def test_a_search_of_one_step_sees_only_signs_of_gradients():
    """In a search of one step the sign of a neuron's gradient is its vote, and the size has no say."""
    torch.manual_seed(10)  # the eighth vote leads the ninth by 0.04, as an Adam step is a sign to 1e-4
    g, sizes = torch.randn(64), 10 ** torch.randn(64)
    search = SmoothKWTA(k=8, rounds=4)  # S = 1, eta = 1, as in classification
    votes, sized = (search.configure(lambda m, g=g: (g * m).sum(), 8).tolist() for g in (g.sign(), g * sizes))
    assert votes == sized
    assert votes != k_winners(smooth(-(g * sizes).view(8, 8), 3, 4).flatten(), 8).tolist()


def test_a_grown_grid_answers_old_masks_with_the_same_bits():
    """A grid that has grown answers under old masks with the same bits, and their neurons stay locked."""
    grid, (x, _) = small_grid(), shift_batch()
    winners = torch.tensor([0, 5, 6, 15])
    commit_mask(grid, winners)
    before = grid.forward_winners(x, winners)
    larger, index = grow(grid, 6)
    assert larger.forward_winners(x, index[winners]).equal(before)
    assert larger.free.sum() == 36 - 4 and not larger.free[index[winners]].any()
    assert [(i // 6, i % 6) for i in index[winners].tolist()] == [(i // 4, i % 4) for i in winners.tolist()]


def pool_on(backbone, names, components=9, b_std=0.1):
    targets = find_targets(backbone.requires_grad_(False), names)
    pool = LoRAPool({name: in_out(m) for name, m in targets.items()}, components, rank=2, b_std=b_std)
    attach(targets, pool.update)
    return targets, pool


QKV = "q_proj", "k_proj", "v_proj"


@pytest.mark.parametrize("make, names", [(micro_backbone, QKV), (micro_gpt2, ("c_attn",))])
def test_the_pool_adds_equation_1_and_nothing_when_off(make, names):
    """The pool adds sum_k m_k B_k A_k to every weight, Eq. (1), and changes no bit when it is off."""
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


def test_the_search_in_a_pool_is_algorithm_1_over_all_of_it():
    """Silent components are left out by `loss_of_mask`; the literal search runs all of them. Nothing is
    smoothed: on 3 x 3 neurons a kernel of 3 makes all alike, and what then wins is rounding."""
    backbone = micro_backbone()
    targets, pool = pool_on(backbone, QKV, b_std=0.0)
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
def test_unselected_components_move_only_by_decay_or_moments(decay, carried, kept):
    """Components outside a mask get no gradient: only weight decay or old moments move them, Theorem D.1."""
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


# -------------------------------------------------------------------------------------------------- README.md

README = (HERE / "README.md").read_text("utf-8")
PAGES = {path: path.read_text("utf-8") for path in (HERE / "README.md", *report.RESULTS.glob("*.md"))}


def test_every_equation_has_a_function_and_a_test():
    """The list that opens this file has a function and a test for every equation, and all of them exist."""
    numbers = collections.defaultdict(set)
    rows = re.findall(r"^(NIWF|FTN) (.*)\. (\w+\.py: .*)\n    (test_\w+)$", __doc__, re.MULTILINE)
    for paper, title, where, tests in rows:
        for first, last in re.findall(r"\((\d+)\)(?:-\((\d+)\))?", title):
            numbers[paper] |= {*range(int(first), int(last or first) + 1)}
        path, _, names = where.partition(": ")
        file = (HERE / path).read_text("utf-8")
        for part in re.findall(r"\w+", names):
            assert re.search(rf"^ *(def|class) {part}\b", file, re.MULTILINE), part
        assert tests in globals(), tests
    assert numbers == {"NIWF": {*range(1, 16)}, "FTN": {1, 2}}
    named = " ".join(title for _, title, _, _ in rows)
    assert all(name in named for name in ("Algorithm 1", "Theorem 2.1", "Theorem D.1"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_every_link_anchor_and_picture_is_there(page):
    """Every local link in the README and the pages of results leads to a file or heading that exists."""

    def slug(heading):  # as GitHub makes them
        return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")

    links = re.findall(r"\]\(([^)]+)\)", PAGES[page])
    for link in links:
        file, _, section = link.partition("#")
        if not link.startswith("https://"):
            assert (page.parent / file).exists(), link
            heads = re.findall(r"^#+ (.*)$", PAGES.get((page.parent / file).resolve(), ""), re.MULTILINE)
            assert not section or section in map(slug, heads), link
    assert len(links) > 5


def commands(text):
    """Return every command of a page: a line of a bash block or after $, or `code` that begins like one."""
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    blocks += "\n".join(re.findall(r"^\$ (.*)$", text, re.MULTILINE))
    spans = re.findall(r"`((?:python|pytest|pip) [^`]+)`", text)
    return [shlex.split(line, comments=True) for line in [*blocks.splitlines(), *spans]]


@pytest.mark.parametrize("command", commands(README), ids=" ".join)
def test_every_command_of_the_readme_is_understood(command):
    """Every command in the README is accepted by the program that it names, so a reader can copy it."""
    if command[0] == "python":
        module, *argv = command[2:] if command[1] == "-m" else (pathlib.Path(command[1]).stem, *command[2:])
        importlib.import_module(module).parse_options(argv)
    elif command[0] == "pytest":
        assert command[1:2] == ["test_all.py"] and (len(command) == 2 or command[2] == "-k")
        assert not command[3:] or any(n.startswith("test_") and command[-1] in n for n in globals())
    else:
        assert command == ["pip", "install", "-r", "requirements.txt"] and (HERE / command[-1]).exists()


def test_every_option_that_the_readme_names_is_one_of_ours():
    """Every option that the README names in its text exists in our programs, so none is out of date."""
    places = [*(HERE / f"{name}.py" for name in PROGRAMS), *(HERE / "plumbing").glob("*.py")]
    ours = "".join(place.read_text("utf-8") for place in places)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    options = {option for span in spans for option in re.findall(r"(?<!\S)--[a-z][\w-]*", span)}
    assert len(options) > 10
    for option in options - {"--nproc_per_node"}:  # torchrun's own
        assert f'"{option}"' in ours, option


def test_no_figure_that_was_measured_is_typed():
    """The README holds no measured figure outside the blocks that a program writes, so none goes stale."""
    measured = r"\d\s*%|\d\.\d\d|±|\d\.\d+ (M|GB|GiB|nats|ms)\b"
    blocks = r"<!-- [\w-]+ -->.*?<!-- end -->|```.*?```|`[^`]*`|\]\([^)]*\)"
    made = re.sub(blocks, "", README, flags=re.DOTALL)
    assert not re.search(measured, made.replace("arXiv:2602.18628", ""))


def test_the_readme_is_short():
    """The README has at most 180 lines and 1,900 words, so that it can be read in ten minutes."""
    lines = README.splitlines()
    assert len(lines) <= 180 and max(map(len, lines)) < 130 and words_of(README) <= 1900
