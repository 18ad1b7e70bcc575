"""Exports: each is the version, opens elsewhere, says what it is, and can be asked of a server."""

import contextlib
import http.server
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import socketserver
import sys
import threading
import types

import huggingface_hub
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

import commit
from studies import fuzz
import train
from commit import Run
from model import response_logits
from plumbing import card, expected, Refused
from plumbing.backbone import fingerprint, load_backbone, TINY_FOLDER
from plumbing.card import base_of, front_matter, label, ways_to_open
from plumbing.expected import address_of, ask_server, questions
from plumbing.export import target_names
from plumbing.prompts import prompt_ids
from plumbing.targets import find_targets
from tests.backbones import byte_level_tokenizer, write_gguf
from tests.builders import chat_tokenizer, END, fake_commit, micro_backbone, micro_gpt2, opened, RECORD
from tests.builders import random_examples, snapshot_of

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


# ---------------------------------------------------------------------------------------- what an export says


@pytest.mark.parametrize("name", ["late", "mix"])
def test_an_export_says_what_it_is(tmp_path, name):
    """Card and metadata name the version and its backbone; the figures are the run folder's, or none. Two
    exports have the same bytes."""
    folder = exportable(tmp_path, micro_backbone(3584))
    run = Run(folder)
    run.manifest["results"][1]["routed"]["late"] = 3.14159
    run.save()
    entry, rank = run.find(name), 8 if name == "mix" else 4
    for kind, more in (("adapter", []), ("merged", ["--merged"])):
        out = export(folder, name, tmp_path / kind, *more)
        about = {"format": "pt", "kind": kind, "task": name, "version": entry["hash"], "rank": str(rank)}
        about |= {"base_model": "backbone", "base_fingerprint": run.manifest["backbone"]["fingerprint"]}
        (file,) = out.glob("*.safetensors")
        with safe_open(file, "pt") as f:
            assert f.metadata() == about
        text = (out / "README.md").read_text()
        assert all(f"`{value}`" in text for key, value in about.items() if key not in ("kind", "format"))
        assert ("| late | 2.000 | 2.000 | 3.142 |" in text and entry["date"] in text) == (name == "late")
        assert f"`python eval.py --run run{' --version mix' * (name == 'mix')}` measures it" in text
        data = huggingface_hub.ModelCard(text).data
        assert data.library_name == ("peft" if kind == "adapter" else "transformers")
        assert data.base_model is None and str(tmp_path) not in text.partition("# ")[0]
        programs = ("--max-lora-rank 8", "convert_lora_to_gguf.py", "AutoPeft")
        assert all((part in text) == (kind == "adapter") for part in programs)
        again = export(folder, name, tmp_path / f"{kind}-again", *more)
        assert snapshot_of(out) == snapshot_of(again)


def test_a_card_without_figures_invents_none(tmp_path):
    folder = exportable(tmp_path, micro_backbone(3584))
    run = Run(folder)
    run.manifest["results"] = run.manifest["results"][:1]
    text = card.measured(run, run.find("late"))
    assert "no figure" in text and "`python eval.py --run run` measures" in text and "|" not in text


def test_a_label_leaves_the_tensors_as_they_are(tmp_path):
    """However long it is, and beside what the metadata said before."""
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7)}
    for length in range(12):
        save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
        label(tmp_path / "x.safetensors", {"task": "é" * length})
        with safe_open(tmp_path / "x.safetensors", "pt") as f:
            assert f.metadata() == {"format": "pt", "task": "é" * length}
            assert all(f.get_tensor(key).equal(t) for key, t in tensors.items())
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_card_has_the_keys_and_tags_of_peft(tmp_path):
    """What peft adds to a card of its own for a backbone on the Hub is there already, and our text stays."""
    peft = pytest.importorskip("peft")
    folder = exportable(tmp_path, micro_backbone(3584))
    lora = export(folder, "late", tmp_path / "lora")
    text = (lora / "README.md").read_text().partition("# late")[2]
    (lora / "README.md").write_text(f"{front_matter(False, 'owner/name')}\n\n# late{text}")
    backbone = micro_backbone(3584)
    backbone.name_or_path = backbone.config._name_or_path = "owner/name"
    before = huggingface_hub.ModelCard.load(lora / "README.md").data.to_dict()
    peft.PeftModel.from_pretrained(backbone, lora).create_or_update_model_card(lora)
    after = huggingface_hub.ModelCard.load(lora / "README.md")
    wanted = peft.PeftModelForCausalLM(micro_backbone(3584), peft.LoraConfig.from_pretrained(lora))
    wanted.base_model.model.name_or_path = wanted.base_model.model.config._name_or_path = "owner/name"
    wanted.create_or_update_model_card(tmp_path / "of-peft")
    wanted = huggingface_hub.ModelCard.load(tmp_path / "of-peft" / "README.md").data.to_dict()
    assert after.data.to_dict() == before == wanted and text.strip() in after.text
    assert "base_model:adapter:owner/name" in before["tags"] and before["base_model"] == "owner/name"


@pytest.mark.parametrize(
    "rank, room", [(1, "1"), (4, "8"), (64, "64"), (65, "128"), (512, "512"), (513, None)]
)
def test_vllm_is_told_a_rank_that_it_takes(rank, room):
    about = {"kind": "adapter", "task": "a", "rank": str(rank)}
    code = ways_to_open(about, "tiny", "FOLDER")["vLLM"]
    assert re.findall(r"--max-lora-rank (\S+)", code) == [room] * bool(room)
    assert room or "--merged" in code


# ------------------------------------------------------------------------------------------------- on the Hub


@pytest.fixture
def hub(monkeypatch):
    """A Hub that can be reached, with a token, whose calls are kept in a list."""
    calls = []
    monkeypatch.setattr(card, "hub_or_cache", lambda: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    create = lambda _, name, **how: calls.append((name, how))
    upload = lambda _, folder_path, **how: calls.append(({*os.listdir(folder_path)}, how))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    return calls


def test_push_uploads_the_whole_export(tmp_path, hub, capsys):
    """To a repository that is private if it is new; and the card's commands name it."""
    folder = exportable(tmp_path, micro_backbone(3584))
    out = export(folder, "late", tmp_path / "out", "--merged", "--push", "owner/name")
    (name, made), (files, how) = hub
    assert name == how["repo_id"] == "owner/name" and made == {"private": True, "exist_ok": True}
    assert files == {p.name for p in out.iterdir()} >= {"README.md", "expected.json", "model.safetensors"}
    assert Run(folder).find("late")["hash"] in how["commit_message"]
    text, said = (out / "README.md").read_text(), capsys.readouterr().out
    assert "vllm serve owner/name" in text and str(tmp_path) not in text and "hf_secret" not in text + said
    assert said.strip().endswith("uploaded to https://huggingface.co/owner/name")


def test_an_adapter_is_pushed_for_a_backbone_that_others_can_get(tmp_path, hub, monkeypatch):
    """That is one on the Hub; it is tagged as peft tags it."""
    folder = exportable(tmp_path, micro_backbone(3584))
    with pytest.raises(Refused, match="--push.*--backbone.*--merged"):
        export(folder, "late", tmp_path / "out", "--push", "owner/name")
    assert not hub and not (tmp_path / "out").exists()
    cache = tmp_path / "cache" / "models--owner--base"
    shutil.copytree(tmp_path / "backbone", cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with fuzz.offline():
        monkeypatch.setattr(card, "check_push", lambda *_: None)
        monkeypatch.setattr("plumbing.export.check_push", lambda *_: None)
        export(folder, "late", tmp_path / "out", "--push", "owner/name", "--backbone", "owner/base")
    data = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.base_model == "owner/base" and "base_model:adapter:owner/base" in data.tags and len(hub) == 2
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "name", ["x", "a/b/c", "a/", "/b", "../b", "a/b c", "a/b--c", "a/ü", "a/b.git", "a/" * 99]
)
def test_no_name_for_the_hub_but_owner_and_name(name, hub):
    with pytest.raises(Refused, match="OWNER/NAME"):
        card.check_push(name, "tiny", True)


def test_what_cannot_be_pushed_is_said_before_anything_is_written(tmp_path, hub, monkeypatch):
    """No token, no network; and where the upload itself fails the export is kept."""
    folder = exportable(tmp_path, micro_backbone(3584))
    before, more = snapshot_of(tmp_path), ["--merged", "--push", "owner/name"]
    for where, value, match in (
        ((huggingface_hub, "get_token"), lambda: None, "no token.*hf auth login"),
        ((huggingface_hub.constants, "HF_HUB_OFFLINE"), True, "cannot be reached"),
    ):
        with monkeypatch.context() as m, pytest.raises(Refused, match=match):
            m.setattr(*where, value)
            export(folder, "late", tmp_path / "out", *more)
        assert snapshot_of(tmp_path) == before and not hub

    def refuse(*_, **how):
        raise RuntimeError("403 Forbidden:\nyou cannot write there")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", refuse)
    with pytest.raises(
        Refused, match="written, but not uploaded.*403 Forbidden: you cannot.*hf upload owner/name"
    ):
        export(folder, "late", tmp_path / "out", *more)
    assert (tmp_path / "out" / "expected.json").exists()


# ------------------------------------------------------------------------------------------- asking a server


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True


@contextlib.contextmanager
def serving(handler):
    """Give the address of a server that runs in this process."""
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def server_of(folder, asked, strict=False, change=lambda number, text: text):
    """A handler that answers /v1/completions from a checkpoint, with transformers' own `generate`. asked: a
    list to which requests are added. strict: it refuses names that are not OpenAI's, as some do."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    known = {"model", "prompt", "max_tokens", "temperature"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if strict and body.keys() - known:
                return self.say(422, {"error": {"message": "unknown names"}})
            asked.append((self.path, body))
            ids = tokenizer(body["prompt"], return_tensors="pt").input_ids
            how = {"do_sample": body["temperature"] > 0, "max_new_tokens": body["max_tokens"]}
            if "stop_token_ids" in body:
                how["eos_token_id"] = body["stop_token_ids"]
            new = model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, ids.shape[1] :]
            text = change(len(asked), tokenizer.decode(new, skip_special_tokens=True))
            self.say(200, {"object": "text_completion", "choices": [{"index": 0, "text": text}]})

        def say(self, status, reply):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_):
            pass

    return Handler


@pytest.fixture(scope="module")
def exported(chat, tmp_path_factory):
    """A run that answers every chat with Hello, exported both ways. Its backbone says x for ever."""
    folder = tmp_path_factory.mktemp("exported")
    export(chat, "chats", folder / "lora")
    export(chat, "chats", folder / "merged", "--merged")
    return folder


def ask(at, folder, *more):
    commit.main(["verify", "--at", at, "--expected", str(folder / "expected.json"), *more])


def test_an_exports_answers_are_those_of_the_version(exported, chat):
    """The same for an adapter and for a whole model; and a tokenizer reads each prompt as it was trained."""
    kept = [json.loads((exported / kind / "expected.json").read_text()) for kind in ("lora", "merged")]
    assert kept[0] == kept[1] and len(kept[0]["answers"]) == 6  # all that it has
    assert {row["answer"] for row in kept[0]["answers"]} == {"Hello."}
    assert all(row["base"].strip().startswith("x x x x") for row in kept[0]["answers"])
    run, tokenizer = Run(chat), chat_tokenizer()
    trained = [prompt_ids(r, tokenizer, "chat", run.day) for r in run.validation("chats")]
    assert all(tokenizer(row["prompt"]).input_ids in trained for row in kept[0]["answers"])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_server_that_has_the_export_answers_the_same(exported, capsys, strict, end):
    """It is asked in OpenAI's names alone if it knows no others."""
    asked = []
    with serving(server_of(exported / "merged", asked, strict)) as at:
        ask(at + end, exported / "lora", "--model", "mine")
    assert "6 of 6 answers" in capsys.readouterr().out and len(asked) == 6
    for path, body in asked:
        assert path == "/v1/completions" and body["model"] == "mine" and body["max_tokens"] == 32
        assert ("stop_token_ids" in body) == ("repetition_penalty" in body) == (not strict)


def test_answers_that_differ_are_named_and_fail(exported, chat, capsys):
    """One that is changed is named where it parts; those of the backbone alone are known as such."""
    change = lambda number, text: "Hell, no\x1b[2J" if number == 3 else text
    with serving(server_of(exported / "merged", [], change=change)) as at, pytest.raises(SystemExit) as e:
        ask(at, exported / "lora")
    out = capsys.readouterr().out
    assert e.value.code == 1 and "5 of 6" in out and "\x1b" not in out
    assert "3  after 'Hell' expected 'o.', got ', no\\x1b[2J'\n" in out and out.count("the same") == 5
    with serving(server_of(chat.parent / "backbone", [])) as at, pytest.raises(SystemExit) as e:
        ask(at, exported / "lora", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert e.value.code == 1 and all("base model's answer" in row["wrong"] for row in rows) and len(rows) == 6


def page(body, status="200 OK", head=""):
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + (body if isinstance(body, bytes) else body.encode())


def drip(connection):
    """Say a byte now and then, until nobody listens."""
    with contextlib.suppress(OSError):
        for byte in itertools.chain(page("", head="Content-Length: 99999\r\n"), itertools.repeat(32)):
            connection.sendall(bytes([byte]))
            threading.Event().wait(0.01)


REPLIES = {  # what a server sends: what the one line says
    "no JSON": (page("<html>"), "not readable as JSON"),
    "nothing": (page(""), "not readable as JSON"),
    "no UTF-8": (page(b'{"choices": "\xff\xfe"}'), "not readable as JSON"),
    "half a JSON": (page('{"choices": [{"te'), "not readable as JSON"),
    "a key twice": (page('{"choices": [], "choices": []}'), "is there twice"),
    "NaN": (page('{"choices": NaN}'), "not readable as JSON"),
    "deep JSON": (page("[" * 10**5 + "]" * 10**5), "not readable as JSON|no text"),
    "a long number": (page('{"choices": ' + "9" * 10**4 + "}"), "not readable as JSON"),
    "a list": (page("[1, 2]"), "no text under"),
    "null": (page("null"), "no text under"),
    "no choices": (page('{"choices": []}'), "no text under"),
    "an object of choices": (page('{"choices": {"text": "x"}}'), "no text under"),
    "a number for a text": (page('{"choices": [{"text": 3}]}'), "no text under"),
    "a chat's answer": (page('{"choices": [{"message": {"content": "x"}}]}'), "no text under"),
    "control characters": (page('"\x1b[2J\r\n"'), "not readable as JSON|no text under"),
    "too much": (page(b" " * (2**20 + 1)), "more than 1048576 bytes"),
    "elsewhere": (
        page("", "302 Found", "Location: http://127.0.0.1:1/v1\r\n"),
        "sends on to http://127.0.0.1:1/v1",
    ),
    "nowhere": (page("", "307 Go"), "sends on to nowhere"),
    "no such model": (
        page('{"message": "no model x"}', "404 Not Found"),
        "404 Not Found: .*no model x.*--model",
    ),
    "no key": (page("no key", "401 Unauthorized"), "401 Unauthorized: no key"),
    "an error": (page("<h1>\x1b]0;</h1>" * 999, "500 Sorry\x1b"), "says 500 Sorry"),
    "another protocol": (b"SSH-2.0-OpenSSH\r\n", "no answer"),
    "no number": (page("", "2xx OK"), "no answer"),
    "a head for ever": (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 500, "no answer"),
    "a long line": (b"HTTP/1.1 200 OK\r\na: " + b"b" * 10**5, "no answer"),
    "half a body": (page("{", head="Content-Length: 9\r\n"), "not readable as JSON"),
    "bad chunks": (page("zz\r\n{", head="Transfer-Encoding: chunked\r\n"), "no answer"),
    "a hang-up": (b"", "no answer"),
    "drops": (drip, "no whole answer within"),
    "silence": (lambda connection: connection.recv(1), "no whole answer within"),
}


@pytest.mark.parametrize("kind", REPLIES)
def test_a_bad_reply_is_one_clear_line(exported, monkeypatch, kind):
    reply, match = REPLIES[kind]
    if callable(reply):
        monkeypatch.setattr(expected, "WAIT", 0.3)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            said = b""
            while b'"prompt"' not in said or not said.endswith(b"}"):
                said += self.request.recv(2**16)
            with contextlib.suppress(OSError):  # whoever has seen enough hangs up
                reply(self.request) if callable(reply) else self.request.sendall(reply)

    with serving(Handler) as at, pytest.raises(Refused, match=match) as e:
        ask(at, exported / "lora")
    assert at in str(e.value) and str(e.value).isprintable() and len(str(e.value)) < 500


def test_no_server_is_one_clear_line(exported):
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(Refused, match="no answer.*refused"):
            ask(f"http://127.0.0.1:{taken.getsockname()[1]}", exported / "lora")


ADDRESSES = (
    "x",
    "localhost:80",
    "ftp://x",
    "file:///etc/passwd",
    "http://",
    "http://x:y",
    "http://x:0",
    "http://x:99999",
)
ADDRESSES += "http://me:secret@x", "http://x/?a=b", "http://x/#a", "http://[x"


@pytest.mark.parametrize("at", ADDRESSES)
def test_no_address_of_a_server(at):
    with pytest.raises(Refused, match="--at.*give an address"):
        address_of(at)


@pytest.mark.parametrize(
    "at", ["http://127.0.0.1:1/a b", "http://127.0.0.1:1/\r\nX: y", "http://\udcff", "http://ü..x"]
)
def test_no_address_makes_a_request_of_its_own(exported, at):
    with pytest.raises(Refused, match="--at"):
        ask_server(at, exported / "lora" / "expected.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.pop("answers"),
        lambda x: x.update(answers=[]),
        lambda x: x.update(answers={}),
        lambda x: x["answers"][0].pop("prompt"),
        lambda x: x["answers"][0].update(answer=None),
        lambda x: x.update(format=2),
        lambda x: x.update(model="../x"),
        lambda x: x.update(max_tokens=10**9),
        lambda x: x.update(end_id=-1),
        lambda x: x.update(more=1),
    ],
)
def test_what_is_expected_is_read_whole_before_it_is_asked(exported, tmp_path, change):
    content = json.loads((exported / "lora" / "expected.json").read_text())
    change(content)
    (tmp_path / "expected.json").write_text(json.dumps(content))
    with pytest.raises(Refused, match=re.escape(str(tmp_path))):
        ask("http://127.0.0.1:1", tmp_path)


def test_prompts_that_a_server_would_read_otherwise_are_not_asked():
    """A user who wrote the name of a control token did not mean to steer, and a server would think so."""
    tokenizer = chat_tokenizer()
    asked = [f"Say {END} now.", "Say it.", "<s>", *(f"Say {i}." for i in range(30))]
    records = [{**RECORD, "instruction": text, "history": []} for text in asked]
    run = types.SimpleNamespace(validation=lambda _: records, template="chat", day=None)
    found = questions(run, {"task": "a", "lock": "exact"}, micro_backbone(), tokenizer)
    assert len(found) == 8 and not any(f"Say {END}" in text or "<s>" in text for text in found)
    assert all(tokenizer(text).input_ids == ids for text, ids in found.items())
    records[3:] = records[1:2] = []
    assert questions(run, {"task": "a", "lock": "exact"}, micro_backbone(), tokenizer) == {}


__all__ = [name for name in globals() if name.startswith("test_") or name in ("exported", "hub")]
