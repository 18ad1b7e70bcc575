"""Exports: each is the version, and opens elsewhere."""

import json
import os
import pathlib
import shutil
import signal
import sys

import pytest
import torch
import transformers
from safetensors import safe_open

import commit
from studies import fuzz
import train
from commit import Run
from model import response_logits
from plumbing import Refused
from plumbing.backbone import fingerprint, load_backbone, TINY_FOLDER
from plumbing.export import base_of, target_names
from plumbing.targets import find_targets
from tests.backbones import byte_level_tokenizer, write_gguf
from tests.builders import END, fake_commit, micro_backbone, micro_gpt2, opened, random_examples, snapshot_of

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=3584
)
SMALL |= dict(num_key_value_heads=2, head_dim=8, num_experts_per_tok=2)
EXPERTS = dict(num_experts=4, moe_intermediate_size=16, decoder_sparse_step=1, num_local_experts=4)


def micro_of(model_type, **more):
    """A backbone of another architecture, with random weights."""
    torch.manual_seed(9)
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **more})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


MAKE = {
    "mistral": lambda: micro_backbone(3584),
    "gpt2": lambda: micro_gpt2(3584),
    "tied": lambda: micro_of("llama", tie_word_embeddings=True),
    "experts": lambda: micro_of("mixtral", **EXPERTS),
}


def a_run_on(backbone, name, folder):
    """A run folder with versions root, late and their composition mix. name: where the backbone lies."""
    fake_commit(folder, "root", 0, backbone=backbone)
    fake_commit(folder, "late", 1, backbone=backbone)
    run = Run(folder)
    run.manifest["backbone"] = {"name": str(name), "fingerprint": fingerprint(backbone)}
    run.save()
    commit.main(["compose", "root", "late", "--weights", "0.3", "0.7", "--name", "mix", "--run", str(folder)])
    return folder


def exportable(folder, backbone, **how):
    """A run folder, see `a_run_on`, and a backbone that is beside it. how: for its `save_pretrained`."""
    backbone.save_pretrained(folder / "backbone", **how)
    transformers.AutoTokenizer.from_pretrained(TINY_FOLDER).save_pretrained(folder / "backbone")
    return a_run_on(backbone, folder / "backbone", folder / "run")


def export(folder, name, to, *more):
    commit.main(["export", name, "--to", str(to), "--run", str(folder), *map(str, more)])
    return to


@torch.no_grad()
def logits_of(folder, backbone, name, examples):
    """(the bare backbone's logits, a version's at its region's mean coordinate)"""
    bare = response_logits(backbone, 0, examples)[0]
    run, model = opened(folder, backbone)
    versions = {v.task: v for v in run.versions}
    parts = [(versions["root"], 0.3), (versions["late"], 0.7)] if name == "mix" else [(versions[name], 1.0)]
    gatings = [(v.gating(torch.tanh(v.region.mean).float()[None].expand(3, -1)), w) for v, w in parts]
    gating = torch.cat([g[0] for g, _ in gatings], -1), torch.cat([w * g[1] for g, w in gatings], -1)
    wanted = model.logits(examples, gating)[0]
    model.detach()
    return bare, wanted


class Alike:
    """Compares backbones with a version. What it changes is far more than float32 rounds on any processor:
    a thousandth of it is allowed."""

    def __init__(self, folder, backbone, name):
        size, fit = backbone.get_input_embeddings().num_embeddings, lambda ids: [i % size for i in ids]
        self.examples = [(fit(prompt), fit(response)) for prompt, response in random_examples(3)]
        bare, self.wanted = logits_of(folder, backbone, name, self.examples)
        self.allowed = float((self.wanted - bare).abs().max()) / 1000
        assert self.allowed > 1e-5 * float(self.wanted.abs().max())

    @torch.no_grad()
    def __call__(self, backbone):
        logits = response_logits(backbone.eval(), 0, self.examples)[0]
        torch.testing.assert_close(logits, self.wanted, rtol=0, atol=self.allowed)


def check_tensors(folder, alike, twin):
    """An adapter's tensors, added to a twin of its backbone as the paper on LoRA says, are the version."""
    config = json.loads((folder / "adapter_config.json").read_text())
    with safe_open(folder / "adapter_model.safetensors", "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}
    for target, module in find_targets(twin).items():
        A, B = (tensors[f"base_model.model.{target}.lora_{p}.weight"] for p in "AB")
        assert len(A) == config["r"]
        added = config["lora_alpha"] / config["r"] * B @ A
        module.weight.data += added if isinstance(module, torch.nn.Linear) else added.T
    alike(twin)
    return config


@pytest.mark.parametrize("name, kind", [*((n, k) for n in ("late", "mix") for k in MAKE), ("root", "gpt2")])
def test_what_is_exported_is_the_version_at_its_mean_coordinate(tmp_path, name, kind):
    """An adapter's tensors, the adapter in peft, and a merged checkpoint give the version's logits."""
    backbone = MAKE[kind]()
    folder = exportable(tmp_path, backbone)
    alike, before = Alike(folder, backbone, name), snapshot_of(tmp_path / "backbone")
    lora = export(folder, name, tmp_path / "lora")
    merged = export(folder, name, tmp_path / "merged", "--merged")
    assert snapshot_of(tmp_path / "backbone") == before
    config = check_tensors(lora, alike, MAKE[kind]())
    assert config["r"] == (8 if name == "mix" else 4) and config["fan_in_fan_out"] == (kind == "gpt2")
    assert {*config["target_modules"]} == {t.rpartition(".")[2] for t in find_targets(backbone)}
    opened = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert opened.dtype == torch.float32
    alike(opened)
    for where in (lora, merged):
        assert transformers.AutoTokenizer.from_pretrained(where)("Hello.").input_ids
        assert "eos_token_id=1" in (where / "README.md").read_text()
    with pytest.raises(Refused, match="not empty"):
        export(folder, name, lora)
    peft = pytest.importorskip("peft")
    alike(peft.PeftModel.from_pretrained(MAKE[kind](), lora).base_model.model)


def test_an_adapter_opens_from_any_working_directory(tmp_path, monkeypatch):
    """A backbone that was named by a relative path is named by an absolute one, and tiny by its folder."""
    backbone = micro_backbone(3584)
    folder = exportable(tmp_path, backbone)
    a_run_on(backbone, "backbone", tmp_path / "relative")
    monkeypatch.chdir(tmp_path)
    alike, lora = Alike(folder, backbone, "late"), export("relative", "late", pathlib.Path("lora"))
    base = json.loads((lora / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "backbone")
    assert base_of("tiny") == (TINY_FOLDER, "") and os.path.isabs(TINY_FOLDER)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    peft = pytest.importorskip("peft")
    alike(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").base_model.model)


@pytest.mark.parametrize("more", [[], ["--merged"]])
def test_a_backbone_that_moved_is_named_anew(tmp_path, more):
    """Without its backbone nothing is exported; `--backbone` says where it lies now."""
    backbone = micro_backbone(3584)
    folder = exportable(tmp_path, backbone)
    (tmp_path / "backbone").rename(tmp_path / "moved")
    before = snapshot_of(tmp_path)
    with fuzz.offline(), pytest.raises(Refused, match="--backbone"):
        export(folder, "root", tmp_path / "new" / "out", *more)
    with pytest.raises(Refused, match="another backbone"):
        export(folder, "root", tmp_path / "new" / "out", *more, "--backbone", "tiny")
    assert snapshot_of(tmp_path) == before and not (tmp_path / "new").exists()
    out = export(folder, "root", tmp_path / "new" / "out", *more, "--backbone", tmp_path / "moved")
    if not more:
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "moved")


@pytest.mark.parametrize("more", [[], ["--merged"]])
def test_an_export_that_fails_or_is_killed_leaves_nothing_under_its_name(tmp_path, monkeypatch, more):
    """A full disk and a kill leave what was there; the same command then works."""
    folder = exportable(tmp_path, micro_backbone(3584))
    before = snapshot_of(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m, pytest.raises(OSError, match="No space"):
        m.setattr(os, "fsync", full)
        export(folder, "late", tmp_path / "out", *more)
    assert snapshot_of(tmp_path) == before and not list(tmp_path.glob(".*"))
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:  # killed when all is written, and before it has its name
            pathlib.Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            export(folder, "late", tmp_path / "out", *more)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    export(folder, "late", tmp_path / "out", *more)
    assert {p.suffix for p in (tmp_path / "out").iterdir()} >= {".json", ".safetensors"}


def test_a_merged_export_is_opened_again_before_it_has_its_name(tmp_path, monkeypatch):
    """A checkpoint that is saved without the update, or not whole, is refused and removed."""
    folder = exportable(tmp_path, micro_backbone(3584))
    before, save = snapshot_of(tmp_path), transformers.PreTrainedModel.save_pretrained
    for saved, match in (
        (lambda model, to: save(micro_backbone(3584), to), "not the same"),
        (lambda model, to: model.config.save_pretrained(to), "cannot be opened"),
    ):
        with monkeypatch.context() as m, pytest.raises(Refused, match=match):
            m.setattr(transformers.PreTrainedModel, "save_pretrained", saved)
            export(folder, "late", tmp_path / "new" / "out", "--merged")
        assert snapshot_of(tmp_path) == before and not (tmp_path / "new").exists()


def test_a_merged_export_that_would_answer_otherwise_is_refused(tmp_path):
    """Mamba reads the weights of dt_proj and does not call it: added there, an update would do what it does
    not do in the version. Nor does peft adapt Mamba."""
    folder = exportable(tmp_path, micro_of("mamba"))
    with pytest.raises(Refused, match="would not answer as the version"):
        export(folder, "late", tmp_path / "new" / "out", "--merged")
    pytest.importorskip("peft")
    with pytest.raises(Refused, match="peft cannot open"):
        export(folder, "late", tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_in_parts_and_in_bfloat16_is_merged_in_float32(tmp_path, capsys):
    """A sharded checkpoint merges; what comes out is float32, in its config, and said."""
    backbone = micro_backbone(3584).bfloat16()
    folder = exportable(tmp_path, backbone, max_shard_size="30KB")
    assert len(list((tmp_path / "backbone").glob("*.safetensors"))) > 2
    run = Run(folder)
    backbone = backbone.float()
    run.manifest["backbone"]["fingerprint"] = fingerprint(backbone)
    run.save()
    alike = Alike(folder, backbone, "late")
    merged = export(folder, "late", tmp_path / "merged", "--merged")
    assert "in float32 with an update of rank 4 in 14 modules" in capsys.readouterr().out
    assert json.loads((merged / "config.json").read_text())["dtype"] == "float32"
    alike(load_backbone(str(merged), "cpu")[0])


@pytest.mark.parametrize("bare", [False, True])
def test_a_backbone_with_an_adapter_in_it_is_refused(tmp_path, bare):
    """transformers would attach the adapter without a word: training and exports say what to do. bare: the
    folder has no weights but the adapter's."""
    folder = exportable(tmp_path, micro_backbone(3584))
    lora = export(folder, "late", tmp_path / "lora")
    if bare:
        shutil.rmtree(tmp_path / "backbone")
    shutil.copytree(lora, tmp_path / "backbone", dirs_exist_ok=True)
    before = snapshot_of(tmp_path)
    for more in ([], ["--merged"]):
        with pytest.raises(Refused, match="PEFT adapter.*merge"):
            export(folder, "late", tmp_path / "out", *more)
    with pytest.raises(Refused, match="PEFT adapter.*merge"):
        where = ["--backbone", str(tmp_path / "backbone"), "--out", str(tmp_path / "new")]
        train.main(["--task", "alpaca", "--device", "cpu", *where])
    assert snapshot_of(tmp_path) == before


@torch.no_grad()
def test_generate_stops_where_a_chat_was_trained_to_end(chat, tmp_path, capsys):
    """The end of a turn is in a merged checkpoint's generation_config, beside what was there, although that
    is one that transformers would not save once it is changed; the chat template is saved, too."""
    shutil.copytree(chat.parent / "backbone", tmp_path / "backbone")
    path = tmp_path / "backbone" / "generation_config.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"temperature": 0.5}))
    at = ["--backbone", tmp_path / "backbone"]
    merged, lora = export(chat, "chats", tmp_path / "out", "--merged", *at), tmp_path / "lora"
    export(chat, "chats", lora, *at)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    end = tokenizer.convert_tokens_to_ids(END)
    config = json.loads((merged / "generation_config.json").read_text())
    assert config["eos_token_id"] == [known["eos_token_id"], end] and config["temperature"] == 0.5
    assert capsys.readouterr().out.count(f"answers end with '{END}', token {end}") == 2
    assert END in (lora / "README.md").read_text()
    for where in (merged, lora):
        saved = transformers.AutoTokenizer.from_pretrained(where)
        assert saved.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith(
            "<s>"
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    ids = torch.tensor([tokenizer("Hi").input_ids])
    out = model.generate(ids, max_new_tokens=9, prefix_allowed_tokens_fn=lambda *_: [end])
    assert out.shape[1] == ids.shape[1] + 1


def test_a_gguf_file_exports_as_any_backbone_does(tmp_path, monkeypatch):
    """Merged it is an ordinary checkpoint, with no trace of GGUF in its config, and a tokenizer that opens.
    And peft opens an adapter for it when it is told the file."""
    pytest.importorskip("accelerate")
    vocabulary = byte_level_tokenizer()
    sizes = {"vocab_size": vocabulary.get_vocab_size(), "rope_parameters": None, "bos_token_id": 0}
    write_gguf(tmp_path / "model.gguf", micro_of("llama", **sizes, eos_token_id=1), vocabulary)
    monkeypatch.chdir(tmp_path)
    backbone, tokenizer = load_backbone("model.gguf", "cpu")
    folder = a_run_on(backbone, "model.gguf", tmp_path / "run")
    alike = Alike(folder, backbone, "mix")
    merged = export(folder, "mix", tmp_path / "merged", "--merged")
    lora = export(folder, "mix", tmp_path / "lora")
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    alike(transformers.AutoModelForCausalLM.from_pretrained(merged))
    for where in (merged, lora):
        saved = transformers.AutoTokenizer.from_pretrained(where)
        assert saved("Hello<|endoftext|>").input_ids == tokenizer("Hello<|endoftext|>").input_ids
    monkeypatch.chdir(tmp_path / "run")
    assert "gguf_file='model.gguf'" in (lora / "README.md").read_text()
    peft = pytest.importorskip("peft")
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(lora, gguf_file="model.gguf", dtype=torch.float32)
    alike(adapted.base_model.model)


@pytest.mark.parametrize("with_peft", [True, False])
def test_an_adapter_that_peft_would_rewrite_is_refused(tmp_path, monkeypatch, with_peft):
    """peft takes the dense layer of this mixture of experts for experts: `--merged` is what is left."""
    if with_peft:
        pytest.importorskip("peft")
    else:
        monkeypatch.setitem(sys.modules, "peft", None)
    backbone = micro_of("qwen3_moe", mlp_only_layers=[0], **EXPERTS)
    folder = exportable(tmp_path, backbone)
    before = snapshot_of(tmp_path)
    with pytest.raises(Refused, match="peft.*--merged"):
        export(folder, "late", tmp_path / "lora")
    assert snapshot_of(tmp_path) == before and not list(tmp_path.glob(".*"))
    alike = Alike(folder, backbone, "late")
    merged = export(folder, "late", tmp_path / "merged", "--merged")
    alike(transformers.AutoModelForCausalLM.from_pretrained(merged))


def test_without_peft_an_adapter_is_written_and_that_is_said(tmp_path, monkeypatch, capsys):
    """peft is asked only where it is installed."""
    monkeypatch.setitem(sys.modules, "peft", None)
    folder = exportable(tmp_path, MAKE["experts"]())
    assert (export(folder, "late", tmp_path / "lora") / "adapter_config.json").exists()
    assert "not tried with peft" in capsys.readouterr().out


def test_short_names_adapt_no_module_but_ours():
    """A last name that another module has, too, is written out in full."""
    backbone = micro_backbone()
    every = find_targets(backbone)
    ends = sorted({name.rpartition(".")[2] for name in every})
    assert target_names(every, backbone) == {"target_modules": ends}
    first = [name for name in every if name != "model.layers.1.self_attn.q_proj"]
    names = target_names(first, backbone)["target_modules"]
    assert "q_proj" not in names and "model.layers.0.self_attn.q_proj" in names and "k_proj" in names
    assert target_names(["lm_head"], backbone) == {"target_modules": ["lm_head"]}  # it lies in no layer
    upper = [name for name in every if "layers.1." in name]
    assert target_names(upper, backbone) == {"target_modules": ends, "layers_to_transform": [1]}


__all__ = [name for name in globals() if name.startswith("test_")]
