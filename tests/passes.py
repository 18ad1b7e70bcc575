"""One pass: bare layers choose the gating on the way. The paper's two passes stay what they were."""

import json

import pytest
import torch
import transformers

import commit
import eval as evaluation
import train
from commit import Run
from field import CoordinateDynamics, top_k_gating
from model import NIWF, niwf, response_nll
from plumbing import Refused
from plumbing.passes import choose_targets, until
from plumbing.targets import adapted_targets, default_bare, find_targets, layers_of
from studies import sure
from tests.builders import chat_tokenizer, edit_json, git, micro_backbone, micro_gpt2, micro_model
from tests.builders import VOCABULARY, random_examples, random_gating, refused


def upper_model(make=micro_backbone):
    return micro_model(dtype=torch.float64, bare=1, backbone=make())


def by_h_bar(model, seen):
    """Return a gating that every prompt's h_bar decides; `seen` gets the h_bar that were asked about."""
    torch.manual_seed(4)
    weight = torch.randn(model.features, model.bank.layers * 6)

    def gating_of(h_bar):
        seen.append(h_bar)
        return top_k_gating((40 * h_bar @ weight).view(len(h_bar), model.bank.layers, 6), 2)

    return gating_of


def sliding():
    """Make a backbone whose attention sees three tokens back."""
    backbone = micro_backbone()
    config = transformers.MistralConfig(**{**backbone.config.to_dict(), "sliding_window": 3})
    torch.manual_seed(7)
    return transformers.MistralForCausalLM(config).eval()


@pytest.mark.parametrize("make", [micro_backbone, micro_gpt2, sliding])
def test_one_pass_chooses_the_gating_that_a_probe_would(make):
    """Every row of a padded batch is asked once, by its own prompt; tokens are those of a gating that was
    known."""
    model, seen = upper_model(make=make), []
    prompts, gating_of = [p for p, _ in random_examples(5)], by_h_bar(model, seen)
    chosen = model.generate(prompts, gating_of, -1, 6)
    assert len(seen) == 1 and seen[0].shape == (5, model.features)
    torch.testing.assert_close(seen[0], model.probe(prompts))
    gating = gating_of(model.probe(prompts))
    assert model.generate(prompts, lambda h: gating, -1, 6) == chosen
    for i, prompt in enumerate(prompts):  # plainly: what enters the layer, alone and without padding
        ids = torch.tensor([prompt])
        h = model.backbone.base_model(ids, output_hidden_states=True).hidden_states[1][0].float()
        torch.testing.assert_close(seen[0][i], torch.cat([h.mean(0), h[-1]]))


def test_layers_below_are_bare_and_have_no_backward_pass():
    """Bare layers have no bases, give the backbone's bits, and cost no backward pass in training."""
    model, ((prompt, response),) = upper_model(), random_examples(1)
    assert not any(".layers.0." in name for name in model.bank.shapes) and model.bank.layers == 1
    graphs, ids = [], torch.tensor([prompt + response])
    handle = model.first.register_forward_pre_hook(lambda _, args: graphs.append(args[0]))
    bare = until(model.first, lambda: model.backbone(ids))
    nll = response_nll(*model.logits([(prompt, response)], random_gating(1, 1, 6)))
    handle.remove()
    assert torch.equal(graphs[-1], bare) and not graphs[-1].requires_grad
    nll.sum().backward()
    assert all(p.grad is not None for p in model.bank.live.values())


def test_what_goes_wrong_on_the_way_leaves_no_hook():
    """An error while the gating is chosen leaves no hook and no gating, so the next pass is bare."""
    model, prompts = upper_model(), [[5, 6, 7]]
    bare = model.backbone(torch.tensor(prompts)).logits

    def fail(h_bar):
        raise Refused("no such version")

    with pytest.raises(Refused, match="no such version"):
        model.generate(prompts, fail, -1, 3)
    assert torch.equal(model.backbone(torch.tensor(prompts)).logits, bare)
    assert not model.first._forward_pre_hooks and model.bank.gating is None


@pytest.mark.parametrize("where", ["dynamics", "head"])
def test_niwf_in_ten_lines_leaves_no_hook_and_no_gating(where):
    """An error on the way or after it leaves the backbone as it was."""
    model = upper_model()
    ids, bank = torch.tensor([[5, 6, 7]]), model.bank
    bare, fail = model.backbone(ids).logits, lambda *_: 1 / 0
    dynamics = fail if where == "dynamics" else lambda h_bar: h_bar
    field = lambda z: torch.randn(1, bank.layers, 6)
    handle = model.backbone.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        niwf(model.backbone, bank, dynamics, field, 2, model.first, ids, ids)
    handle.remove()
    assert torch.equal(model.backbone(ids).logits, bare) and bank.gating is None
    assert not model.first._forward_pre_hooks


def test_the_first_task_fixes_the_passes_and_bare_layers(micro, first, tmp_path):
    """Versions of two passes have no key of later options, and a manifest without them is of two passes."""
    out = tmp_path / "run"
    train.main(micro("alpaca", out, "--passes", "two"))
    run = Run(out)
    assert not {"passes", "bare_layers"} & run.head(run.find("alpaca"))["config"].keys()
    edit_json(out / "manifest.json", lambda m: [m["settings"].pop(key) for key in ("passes", "bare_layers")])
    (wrong,) = [wrong for _, wrong in commit.verify(Run(out))]
    run, model, _ = evaluation.open_run(out, "cpu")
    assert not wrong and model.bare == 0 and model.bank.layers == 3
    with refused("--passes one does not fit .* fixed two", out):
        train.main(micro("code", out, "--lock", "--passes", "one"))
    assert Run(first).manifest["settings"]["bare_layers"] == default_bare(3) == 1 and default_bare(32) == 5
    with refused("--bare-layers 2 does not fit", first):
        train.main(micro("code", first, "--lock", "--bare-layers", 2))
    with refused("9 bare layers leave nothing"):
        NIWF(model.backbone, 0, targets=None, bare=9)
    edit_json(out / "manifest.json", lambda m: m["settings"].update(bare_layers=1))
    with refused("settings: bare_layers 1, not 0", out):
        evaluation.open_run(out, "cpu")


@pytest.mark.parametrize("said, d", [("", 128), ("--passes two", 64), ("--passes two --coord-dim 32", 32)])
def test_a_coordinate_has_the_papers_dimension_in_two_passes(tmp_path, said, d):
    """In one pass z has 128 dimensions and in two the paper's 64, unless --coord-dim says otherwise."""
    args = train.parse_options(["--task", "x", "--backbone", "tiny", *said.split()])
    train.complete(args, Run(tmp_path / "run"))
    assert args.coord_dim == d


@pytest.mark.parametrize("n, d", [(200, 3), (2, 3), (1, 3)])
def test_aimed_dynamics_see_the_principal_directions(n, d):
    """The rows of the candidate's weights are orthonormal, and span the leading eigenvectors of h_bar's
    covariance; with fewer prompts than dimensions they span what there is."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8)).Q
    h_bar = torch.randn(n, 8) @ (basis * torch.tensor([9.0, 7, 5, 0.1, 0.1, 0.1, 0.1, 0.1])) @ basis.T
    dynamics = CoordinateDynamics(8, d)
    gates = dynamics.gru.weight_ih[: 2 * d].clone()
    dynamics.standardise(h_bar)
    sure.aim(dynamics, h_bar)
    assert torch.equal(dynamics.gru.weight_ih[: 2 * d], gates)
    W, rank = dynamics.gru.weight_ih[2 * d :], min(n, d)
    torch.testing.assert_close((W @ W.T).trace(), torch.tensor(float(rank)))
    x = (h_bar - dynamics.mean) / dynamics.deviation
    leading = torch.linalg.eigh(x.T @ x).eigenvalues.flip(0)[:d].sum()
    torch.testing.assert_close((x @ W.T).square().sum(), leading, rtol=1e-3, atol=1e-3)


IMPOSSIBLE = {
    "--bare-layers 3": "3 bare layers leave nothing to adapt; --passes two",
    "--passes two --bare-layers 1": "two passes adapt all layers",
    "--probe adapted": "need --passes two",
    "--pool sequence": "need --passes two",
    "--template chat": "--template chat: the backbone's tokenizer has no chat template",
}


@pytest.mark.parametrize("more", IMPOSSIBLE)
def test_passes_that_cannot_be_are_refused(micro, tmp_path, more):
    """A probe, template or number of bare layers that cannot work is refused before a folder is made."""
    with refused(IMPOSSIBLE[more], tmp_path / "run"):
        train.main(micro("alpaca", tmp_path / "run", *more.split()))


def test_without_bare_lower_layers_two_passes_are_advised():
    """One backbone never comes to the layer; in another a target of an upper layer runs before it."""
    backbone, tokenizer = micro_backbone(VOCABULARY), chat_tokenizer()
    first = layers_of(backbone)[1]
    assert len(choose_targets(backbone, tokenizer, bare=1)) == 7
    backbone.model.layers[1].mlp.gate_proj = backbone.model.layers[0].mlp.gate_proj
    assert len(choose_targets(backbone, tokenizer, bare=1)) == 6  # it is the lower layer's
    output, embed = transformers.modeling_outputs.BaseModelOutputWithPast, backbone.model.embed_tokens
    backbone.model.forward = lambda input_ids=None, **_: output(last_hidden_state=embed(input_ids))
    with pytest.raises(ValueError, match="not entered"):
        until(first, lambda: backbone(torch.tensor([[5]])))
    with pytest.raises(Refused, match="cannot be used.*--passes two"):
        choose_targets(backbone, tokenizer, bare=1)
    assert adapted_targets(backbone, find_targets(backbone), 0) == find_targets(backbone)


@torch.no_grad()
def test_an_export_of_upper_layers_is_an_ordinary_lora(two, tmp_path):
    """The LoRA of a version with bare lower layers opens in peft, and has the version's logits."""
    peft = pytest.importorskip("peft")
    git(two, "export code --to", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1, 2] and "q_proj" in config["target_modules"]
    run, model, _ = evaluation.open_run(two, "cpu")
    ids, v = torch.tensor([[5, 6, 7, 8]]), run.versions[1]
    with model.gated(v.gating(torch.tanh(v.region.mean).float()[None])):
        wanted = model.backbone(ids).logits
    model.detach()
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, model.backbone(ids).logits)


@pytest.mark.parametrize("bare", [0, 1])
def test_what_is_not_finite_is_no_coordinate(bare):
    """A backbone whose hidden states overflow would send every prompt to the first region."""
    model = micro_model(bare=bare)
    model.backbone.get_input_embeddings().weight.data[5] = torch.inf
    assert model.probe([[6, 7], [8]]).isfinite().all()
    with refused("hidden states are not finite"):
        model.probe([[6, 7], [5, 8]])
    with refused("hidden states are not finite"):
        model.generate([[6, 7], [5, 8]], lambda h: None, -1, 2)
