"""Backbones: which modules are adapted, one fingerprint for any dtype, and what is refused in one line."""

import hashlib
import importlib.util
import io
import json
import re
import shutil
import socket
import sys
import types
import urllib.request

import huggingface_hub
import pytest
import tokenizers
import torch
import transformers

import commit
import train
from commit import Run
from model import NIWF, response_nll
from plumbing.backbone import fingerprint, hub_or_cache, is_backbone, load_backbone
from plumbing.passes import choose_targets, positions_of, width_of
from plumbing.targets import LINEAR, describe_targets, find_targets, kind_of
from tests.builders import (
    HERE,
    RECORD,
    VOCABULARY,
    asked,
    copy_of,
    edit_json,
    evaluate,
    git,
    micro_backbone,
    random_bank,
)
from tests.builders import random_examples, random_gating, refused, saved, snapshot_of, tiny_tokenizer

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
MODERN = SIZES | dict(num_key_value_heads=2, max_position_embeddings=256)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
FUSED = "mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.gate"
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
RECURRENT = VISION | dict(num_hidden_layers=3, lru_width=32)
RG_LRU = "temporal_block.rg_lru.{0}_gate_bias, temporal_block.rg_lru.{0}_gate_weight"
RG_LRU = f"{RG_LRU.format('input')}, {RG_LRU.format('recurrent')}"
SHARED, MAMBA = f"{FUSED}, mlp.shared_expert_gate", "mixer.A_log, mixer.conv1d, mixer.dt_proj"
LLAMA_4 = "feed_forward.experts.down_proj, feed_forward.experts.gate_up_proj, feed_forward.router"
# fmt: off
SHAPES = {  # class: (options of its configuration, kinds of projection that are adapted, those that are not)
    "Mistral": (MODERN, 7, ""),
    "Llama": (MODERN, 7, ""),
    "Qwen2": (MODERN, 7, ""),
    "Gemma2": (MODERN, 7, ""),
    "GPT2": (dict(n_embd=24, n_layer=2, n_head=2, n_positions=64), 4, ""),
    "Phi3": (MODERN, 4, ""),
    "Glm4": (MODERN, 6, ""),
    "OPT": (SIZES | dict(ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False), 6, ""),
    "GPTNeoX": (SIZES, 4, ""),
    "Falcon": (dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4), 4, ""),
    "Bloom": (dict(hidden_size=32, n_layer=2, n_head=4), 4, ""),
    "Lfm2": (MODERN | dict(layer_types=["conv", "full_attention"]), 9, "conv.conv"),
    "Mixtral": (MODERN | dict(num_local_experts=4), 4, FUSED),
    "Qwen3Moe": (MODERN | EXPERTS, 4, FUSED),
    "Qwen2Moe": (MODERN | EXPERTS | dict(shared_expert_intermediate_size=24), 7, SHARED),
    "Llama4": (MODERN | dict(intermediate_size_mlp=48, num_local_experts=4), 7, LLAMA_4),
    "Mamba": (dict(hidden_size=32, state_size=8, num_hidden_layers=2), 3, MAMBA),
    "Gemma3": (dict(text_config=MODERN, vision_config=VISION | dict(image_size=28, patch_size=14)), 7, ""),
    "RecurrentGemma": (RECURRENT, 10, f"temporal_block.conv_1d, {RG_LRU}"),
    "Bart": (dict(d_model=32, decoder_layers=2, encoder_layers=2, decoder_ffn_dim=48), None, ""),
    "Roberta": (SIZES | dict(is_decoder=True, max_position_embeddings=256), None, ""),
}
# fmt: on
USABLE = [name for name, (_, kinds, _) in SHAPES.items() if kinds]


def micro_of(name, **more):
    """Make a micro model of a family, with weights that are large enough to matter. more: for its config."""
    options = SHAPES[name][0] | more
    special = dict(pad_token_id=2, eos_token_id=1, bos_token_id=0, vocab_size=VOCABULARY)
    if "text_config" in options:
        inner = {"text_config": options["text_config"] | special}
        options = options | inner | {"mm_tokens_per_image": 4, "image_token_index": 5}
        model, config = transformers.Gemma3ForConditionalGeneration, transformers.Gemma3Config
    else:
        heads = {"decoder_attention_heads": 4, "encoder_attention_heads": 4} if name == "Bart" else {}
        options = special | options | heads
        model = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")
        config = model.config_class
    torch.manual_seed(5)
    return model(config(**options)).eval()


@pytest.fixture(scope="module")
def on_folder(micro):
    """Return the options of a training of moments on the backbone in a folder."""

    def options(folder, out, *more):
        few = "--examples 8 --val-examples 4 --batch 4 --grad-accum 1 --epochs 1 --max-len 64".split()
        return [*micro("alpaca", out), *few, "--backbone", str(folder), *more]

    return options


@pytest.mark.parametrize("name", USABLE)
def test_all_linear_modules_of_the_text_layers_are_adapted(name):
    """Towers, routers and fused experts are not, and the line that is printed names them. Families that were
    adapted before have the same modules in the same order, so that their versions keep their bits."""
    backbone, (_, kinds, left) = micro_of(name), SHAPES[name]
    targets = choose_targets(backbone, tiny_tokenizer())
    line = describe_targets(backbone, targets)
    assert len({kind_of(n) for n in targets}) == kinds and line.startswith(f"{kinds} of ")
    assert (re.search(r"\(not: (.*)\)", line) or ["", ""])[1] == left
    assert not left and "100.0 %" in line or left and "100.0 %" not in line
    assert not any("vision" in n or "lm_head" in n or "embed" in n for n in targets)
    if name in ("Mistral", "Llama", "Qwen2", "Gemma2", "GPT2"):
        old = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj c_attn c_proj c_fc".split()
        leaves = [full for full, m in backbone.named_modules() if isinstance(m, LINEAR)]
        wanted = [full for full in leaves if full.rpartition(".")[2] in old]
        assert [*find_targets(backbone)] == [*targets] == wanted


@torch.no_grad()
@pytest.mark.parametrize("name", USABLE)
def test_rows_of_a_batch_have_gatings_of_their_own_everywhere(name):
    """Each row of a batch has its own gating, also in a module that sees the tokens of all rows in one list,
    and decoding gives what one pass gives."""
    backbone = micro_of(name)
    model = NIWF(backbone, 2, rank=2, targets=choose_targets(backbone, tiny_tokenizer()))
    random_bank(model.bank, 4)
    examples, gating = random_examples(3), random_gating(3, model.bank.layers, 4)
    alone = [[part[i : i + 1] for part in gating] for i in range(3)]
    logits, labels = model.logits(examples, gating)
    assert model.probe([p for p, _ in examples]).shape == (3, model.features) == (3, width_of(backbone))
    with torch.enable_grad():
        response_nll(*model.logits(examples, gating)).sum().backward()
    assert all(p.grad.any() for p in model.bank.live.values())
    bare, _ = model.logits(examples, None)
    new = model.generate([p for p, _ in examples], lambda h: gating, -1, 4)
    for i, (prompt, _) in enumerate(examples):
        one, _ = model.logits([examples[i]], alone[i])
        own = logits[i, labels[i] != -100]
        torch.testing.assert_close(own, one[0], rtol=1e-3, atol=1e-4)
        assert (own - bare[i, labels[i] != -100]).abs().max() > 1e-3
        with model.gated(alone[i]):
            whole = backbone(torch.tensor([prompt + new[i]]), use_cache=False).logits[0]
        for logit, token in zip(whole[len(prompt) - 1 :], new[i]):
            assert logit.max() - logit[token] < 1e-3  # a near tie may go either way


class Routed(torch.nn.Module):
    """Experts that are linear modules, each of which sees the tokens that are sent to it."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        flat = x.flatten(0, -2)
        to, out = flat[:, 0] > 0, torch.zeros_like(flat)
        for which, expert in zip((to, ~to), self.experts):
            out[which] = expert(flat[which])
        return out.view(x.shape)


def test_an_expert_that_sees_some_tokens_is_left_out_and_named():
    """An expert cannot tell whose tokens it sees, so it has no gating and is refused by name."""
    backbone = micro_backbone(VOCABULARY)
    for layer in backbone.model.layers:
        layer.mlp = Routed()
    targets = choose_targets(backbone, tiny_tokenizer())
    assert {kind_of(n) for n in targets} == {f"self_attn.{c}_proj" for c in "qkvo"}
    assert "4 of 5 kinds" in describe_targets(backbone, targets)
    assert describe_targets(backbone, targets).endswith("(not: mlp.experts)")
    with refused(r"experts\.\d cannot be adapted: .*--targets"):
        choose_targets(backbone, tiny_tokenizer(), "q_proj,mlp.experts.0,mlp.experts.1")


def test_targets_are_named_at_the_first_task_and_then_stay(on_folder, tmp_path, capsys):
    """A name that no module has is refused, and so are others at a later task. A run older than targets
    adapts what its version does."""
    folder, out = saved(micro_of("Phi3"), tmp_path / "backbone"), tmp_path / "run"
    for wrong, why in (("x", "no such linear module, but down_proj, gate_up_proj"), ("o_proj,", "no such")):
        with refused(why, tmp_path):
            train.main(on_folder(folder, out, "--targets", wrong))
    train.main(on_folder(folder, out, "--targets", "self_attn.o_proj, down_proj"))
    assert "adapts    2 of 4 kinds of projection" in capsys.readouterr().out
    assert Run(out).manifest["settings"]["targets"] == "self_attn.o_proj,down_proj"
    old = copy_of(out, tmp_path, "old")
    with refused("its first task fixed self_attn.o_proj,down_proj", out):
        train.main(on_folder(folder, out, "--lock", "--task", "more", "--targets", "all"))
    train.main(on_folder(folder, out, "--lock", "--task", "more"))
    git(out, "verify")
    text = capsys.readouterr().out
    assert "2 of 4 kinds" in text and text.count("bit-identical on 4 of 4") == text.count(" ok") == 2
    names = {key.rpartition(".")[0] for key in Run(out).read_versions()[1].shapes}
    assert {kind_of(n) for n in names} == {"self_attn.o_proj", "mlp.down_proj"}
    edit_json(out / "manifest.json", lambda m: m["settings"].update(targets="all"))
    with refused("settings: targets all, not self_attn.o_proj,down_proj", out):
        evaluate(out)
    head, tensors = commit.read_version_file(next((old / "versions").iterdir()), tensors=True)
    del head["config"]["targets"]
    digest = commit.write_version(old / "versions", head, tensors)
    edit_json(old / "manifest.json", lambda m: m["settings"].pop("targets"))
    edit_json(old / "manifest.json", lambda m: m["versions"][0].update(hash=digest))
    edit_json(old / "manifest.json", lambda m: m["results"][0].update(version=digest))
    evaluate(old)
    train.main(on_folder(folder, old, "--lock", "--task", "more"))
    text = capsys.readouterr().out
    assert "2 of 4 kinds" in text and text.count("bit-identical on 4 of 4") == 3


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in USABLE])
def test_a_backbone_that_pads_wrongly_is_refused(name, on_folder, tmp_path):
    """BART ignores the positions that it is given, and RoBERTa counts them from another number."""
    saved(micro_of(name), tmp_path / "backbone")
    with refused("cannot be used: .*each row alone", tmp_path):
        train.main(on_folder(tmp_path / "backbone", tmp_path / "run"))


def test_a_cache_that_does_not_work_is_refused_before_training():
    """A backbone whose cache forgets earlier tokens is refused before training: it would answer wrongly."""
    backbone = micro_backbone(VOCABULARY)
    forward = backbone.forward

    def forgetful(past_key_values=None, **more):
        return forward(past_key_values=past_key_values and transformers.DynamicCache(), **more)

    backbone.forward = forgetful
    with refused("cannot be used"):
        choose_targets(backbone, tiny_tokenizer())


def test_trying_a_backbone_moves_no_weight_or_random_state():
    """What is trained afterwards must have the bits that it had without the trial."""
    backbone = micro_backbone(VOCABULARY)
    before, wanted = {key: t.clone() for key, t in backbone.state_dict().items()}, torch.get_rng_state()
    choose_targets(backbone, tiny_tokenizer())
    assert torch.equal(torch.get_rng_state(), wanted)
    assert all(torch.equal(t, before[key]) for key, t in backbone.state_dict().items())
    assert not any(m._forward_hooks for m in backbone.modules())


def test_where_positions_end_so_do_records_prompts_and_answers(on_folder, tmp_path, capsys, monkeypatch):
    """GPT-2 has a table of positions: what does not fit is left out, refused in one line, or cut off."""
    backbone = micro_of("GPT2")
    folder, out = saved(backbone, tmp_path / "backbone"), tmp_path / "run"
    assert positions_of(backbone) == 64 and positions_of(micro_backbone()) is None
    train.main(on_folder(folder, out, "--max-len", "256"))
    run = Run(out)
    assert run.head(run.entries[0])["config"]["max_len"] == 64
    capsys.readouterr()
    train.main(on_folder(folder, out, "--max-len", "256"))
    assert "it was trained with" not in capsys.readouterr().out  # the same command again, no other one
    evaluate(out)
    assert "bit-identical on 4 of 4" in capsys.readouterr().out  # compared with what training kept
    with refused("tokens, which leave no room in a context of 64", out):
        evaluate(out, "--prompt", "many words " * 40)
    typed = io.TextIOWrapper(io.BytesIO(b"Hello.\n" + b"many words " * 40 + b"\nHello.\n"))
    monkeypatch.setattr("sys.stdin", typed)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), write_through=True))
    evaluate(out, "--talk --max-new-tokens 500")
    said = sys.stdout.buffer.getvalue().decode()
    assert said.count("[version") == 2 and "leave no room in a context of 64]" in said
    model = NIWF(backbone, 2)
    random_bank(model.bank, 2)
    prompts = [[5] * 60, [6] * 9]
    new = model.generate(prompts, lambda h: random_gating(2, 2, 2), -1, 500)
    assert len(new[0]) == 64 - 60 + 1  # the last one is never read


def byte_level_tokenizer():
    """Make Llama-3's shape: byte-level BPE with special tokens, none of which is `<|endoftext|>`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    how = dict(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["### Instruction: say hello"], tokenizers.trainers.BpeTrainer(**how))
    return tokenizer


def write_gguf(path, backbone, tokenizer):
    """Write a Llama and its tokenizer into one GGUF file, as llama.cpp converts them."""
    gguf, config = pytest.importorskip("gguf"), backbone.config
    w, vocab = gguf.GGUFWriter(path, "llama"), tokenizer.get_vocab()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    said = dict(context_length=config.max_position_embeddings, embedding_length=config.hidden_size)
    said |= dict(block_count=config.num_hidden_layers, feed_forward_length=config.intermediate_size)
    said |= dict(head_count=heads["q_proj"], head_count_kv=heads["k_proj"], vocab_size=len(vocab))
    said |= dict(rope_dimension_count=config.head_dim, layer_norm_rms_eps=config.rms_norm_eps)
    said |= dict(rope_freq_base=10000.0, tokenizer_model="gpt2", tokenizer_pre="llama-bpe")
    said |= dict(token_list=sorted(vocab, key=vocab.get), bos_token_id=0, eos_token_id=1)
    said |= dict(token_types=[3] * 3 + [1] * (len(vocab) - 3))  # 3 is a control token, 1 is text
    said |= dict(token_merges=[*map(" ".join, json.loads(tokenizer.to_str())["model"]["merges"])])
    for name, value in said.items():
        getattr(w, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, t in backbone.state_dict().items():
        for part in {*heads} & {*name.split(".")}:  # its rotary halves lie in turn, not one after the other
            t = t.view(heads[part], 2, -1, t.shape[1]).transpose(1, 2).reshape(t.shape)
        w.add_tensor(names.get_name(name, (".weight",)), t.contiguous().numpy())
    for part in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(w, part)()


def llama_for(tokenizer):
    return micro_of("Llama", vocab_size=tokenizer.get_vocab_size(), pad_token_id=None)


def test_a_gguf_of_llama_3s_shape_loads_with_its_own_tokens(on_folder, tmp_path, capsys):
    """transformers adds a token that the file has not; here it is text as any other."""
    pytest.importorskip("accelerate")
    tokenizer = byte_level_tokenizer()
    model = llama_for(tokenizer)
    write_gguf(tmp_path / "model.gguf", model, tokenizer)
    backbone, ours = load_backbone(str(tmp_path / "model.gguf"), "cpu")
    assert len(ours) == tokenizer.get_vocab_size() and ours.eos_token_id == 1
    for text in ("### Instruction: <|endoftext|> say", "hello<|eot_id|>", "\u00e4 \n\n 123"):
        ids = ours(text, add_special_tokens=False).input_ids
        assert ids == tokenizer.encode(text).ids and ours.decode(ids) == text
        ids = torch.tensor([ids])
        torch.testing.assert_close(backbone(ids).logits, model(ids).logits)
    assert fingerprint(backbone) == fingerprint(model) == fingerprint(backbone.to(torch.bfloat16))
    out = tmp_path / "run"
    train.main(on_folder(tmp_path / "model.gguf", out, "--max-len", "256"))
    capsys.readouterr()
    evaluate(out)
    assert "bit-identical on 4 of 4" in capsys.readouterr().out  # compared with what training kept
    assert "% sure" in asked(out, capsys, "--prompt", "<|endoftext|>", "--max-new-tokens", "3")[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_checkpoint_has_one_fingerprint_in_any_type_and_place(dtype, tmp_path):
    """A checkpoint keeps its fingerprint in another dtype, path or device map, so its runs still open."""
    pytest.importorskip("accelerate")
    backbone = micro_backbone(VOCABULARY)
    backbone.config.tie_word_embeddings = True
    backbone.tie_weights()
    saved(backbone.to(dtype), tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    places = {"model": "disk", "lm_head": "disk"}
    opened = [load_backbone(str(tmp_path / sub), "cpu")[0] for sub in (".", "link")]
    opened += [load_backbone(str(tmp_path), "cpu:0")[0], load_backbone(str(tmp_path), "cpu", places)[0]]
    assert all(b.dtype == torch.float32 for b in opened)
    for other in (torch.bfloat16, torch.float16) if dtype == torch.float16 else (torch.bfloat16,):
        opened.append(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=other))
    assert len({fingerprint(b) for b in opened}) == 1


@torch.no_grad()
def test_a_checkpoint_that_was_tuned_has_another_fingerprint():
    """A fingerprint differs if hardly a weight moved, if one matrix did, or if values only changed places."""
    plain, found = micro_backbone(), set()
    weight = lambda b: b.model.layers[1].mlp.down_proj.weight
    changes = [
        lambda b: None,
        lambda b: [p.mul_(1 + 1e-4 * torch.randn_like(p)) for p in b.parameters()],
        lambda b: weight(b).add_(1e-4 * torch.randn_like(weight(b))),
        lambda b: weight(b)[5:6].mul_(1.01),
        lambda b: weight(b)[:, 7:8].mul_(1.01),
        lambda b: weight(b).copy_(weight(b).flip(0)),
    ]
    for change in changes:
        twin = micro_backbone()
        change(twin)
        found.add(fingerprint(twin))
        assert is_backbone(twin, fingerprint(plain)) == (change is changes[0])
    assert len(found) == len(changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_run_folders_with_an_older_fingerprint_are_accepted(dtype, first, tmp_path):
    """The older fingerprint, of 64 values a weight in the type of the training, still opens a run folder."""
    out, digest = copy_of(first, tmp_path), hashlib.sha256()
    run = Run(out)
    backbone, _ = load_backbone(run.manifest["backbone"]["name"], "cpu")
    for name, p in backbone.to(dtype).named_parameters():
        flat = p.detach().flatten()
        digest.update(f"{name}{tuple(p.shape)}".encode())
        digest.update(flat[:: max(1, len(flat) // 64)][:64].float().numpy().tobytes())
    edit_json(out / "manifest.json", lambda m: m["backbone"].update(fingerprint=digest.hexdigest()))
    before = snapshot_of(out)
    evaluate(out)
    assert snapshot_of(out) == before
    with refused("another backbone", out):
        evaluate(out, "--backbone tiny")


def test_a_run_trained_in_bfloat16_is_opened_in_float32(first, tmp_path, monkeypatch, capsys):
    """A run trained in bfloat16 opens in float32 and the reverse, since both have the same manifest."""

    def in_bfloat16(name, *more):
        backbone, tokenizer = load_backbone(name, *more)
        return backbone.to(torch.bfloat16), tokenizer

    monkeypatch.setattr("plumbing.folder.load_backbone", in_bfloat16)
    run, out = Run(tmp_path / "run"), copy_of(first, tmp_path, "copy")
    run.open_backbone(Run(first).manifest["backbone"]["name"], "cpu")
    assert Run(out).manifest["backbone"] == run.manifest["backbone"]
    evaluate(out)
    assert "alpaca" in capsys.readouterr().out


def test_a_backbone_is_a_folder_or_a_gguf_file(tmp_path):
    """Any other file is refused by name, and the Hub is not asked for it."""
    for name in ("model.safetensors", "README.md"):
        (tmp_path / name).touch()
        with refused("is a file: name its folder, or a .gguf file", tmp_path):
            load_backbone(str(tmp_path / name), "cpu")


def test_a_gpu_with_room_takes_mistral_wherever_the_run_goes(tmp_path, monkeypatch):
    """--out chooses the run folder, not the backbone; and the tiny backbone is tiny by whatever name."""
    for size, name in ((23e9, "tiny"), (30e9, train.MISTRAL)):
        card = types.SimpleNamespace(total_memory=size)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        assert train.default_backbone("cuda") == name and train.default_backbone("cpu") == "tiny"
    opened = []
    monkeypatch.setattr(train, "default_backbone", lambda device: "a/model")
    monkeypatch.setattr(Run, "open_backbone", lambda run, name, *how: opened.append(name) or (None, None))
    for more in ([], ["--backbone", "assets/tiny"]):
        with pytest.raises(AttributeError):  # there is no backbone
            monkeypatch.chdir(HERE)
            train.main(["--task", "alpaca", "--out", str(tmp_path / "run"), *more])
    assert opened == ["a/model", "tiny"]


def test_a_backbone_that_was_moved_is_verified_and_remembered(first, micro, tmp_path, monkeypatch, capsys):
    """Each of the three programs verifies it, and refuses another in its place. Training remembers the place;
    to ask or to compose, as one may with a copy that does not stay, does not."""
    out, old = copy_of(first, tmp_path), Run(first).manifest["backbone"]
    place = shutil.copytree(old["name"], tmp_path / "moved")
    edit_json(out / "manifest.json", lambda m: m["backbone"].update(name=str(tmp_path / "gone")))
    other, export = saved(micro_of("Llama"), tmp_path / "other"), f"export alpaca --to {tmp_path}/"
    for wrong, why in (
        ([], "is not there; --backbone names another, or its new place"),
        (["--backbone", other], "another backbone"),
        (["--backbone", "nowhere"], "cannot be loaded"),
    ):
        with refused(why, tmp_path):
            evaluate(out, "", *wrong)
        for kind in ("lora", "new/merged --merged"):
            with refused(why, tmp_path):
                git(out, export + kind, *wrong)
    before = snapshot_of(out)
    monkeypatch.chdir(tmp_path)
    evaluate(out, "--backbone moved")
    evaluate(out, "--prompt Hello. --max-new-tokens 3 --backbone moved")
    git(out, export + "new/merged --merged", "--backbone", "moved")
    git(out, export + "lora", "--backbone", "moved")
    base = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(place) and snapshot_of(out) == before
    (tmp_path / "few.json").write_text(json.dumps([RECORD]))
    git(copy := copy_of(out, tmp_path / "copy"), "compose --like few.json --name few --backbone moved")
    assert Run(copy).manifest["backbone"] == Run(out).manifest["backbone"]
    train.main(micro("alpaca", out, "--backbone", "moved"))
    assert Run(out).manifest["backbone"] == {**old, "name": str(place)}
    capsys.readouterr()
    evaluate(out)
    assert "bit-identical on 32 of 32" in capsys.readouterr().out
    monkeypatch.chdir("/")
    evaluate(out, "--prompt Hello. --max-new-tokens 3")


def test_a_mirror_of_the_hub_is_asked_at_its_own_port(monkeypatch):
    """The Hub, or a mirror of it, is there if somebody listens at the address that is set, port included."""
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as mirror:
        address = f"http://127.0.0.1:{mirror.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        hub_or_cache.__wrapped__()
        assert not huggingface_hub.constants.HF_HUB_OFFLINE
    hub_or_cache.__wrapped__()
    assert huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("bare", [0, 2])
def test_layers_on_disk_compute_the_same_bits(tmp_path, bare):
    """Layers on disk give the logits, gradients and fingerprint of layers in memory, to the bit."""
    pytest.importorskip("accelerate")
    saved(micro_backbone(VOCABULARY, layers=4), tmp_path)
    cpu = "model.layers.0", "model.layers.3", "model.norm", "model.rotary_emb"
    disk = "model.layers.1", "model.layers.2", "model.embed_tokens", "lm_head"
    places = dict.fromkeys(cpu, "cpu") | dict.fromkeys(disk, "disk")
    examples, gating, found = random_examples(3), random_gating(3, 4 - bare, 4), []
    for device_map, checkpointing in ((None, False), (places, False), (places, True)):
        backbone, _ = load_backbone(str(tmp_path), "cpu", device_map)
        assert any(p.is_meta for p in backbone.parameters()) == bool(device_map)
        model = NIWF(backbone, pad_id=0, bare=bare)
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


def test_a_device_map_that_cannot_be_is_one_line(monkeypatch):
    """A device map is refused in one line for random weights, and where accelerate is not installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, match in (("random:mistral-7b", "none to read"), ("tiny", "pip install accelerate")):
        with refused(match):
            load_backbone(name, "cpu", "auto")
