"""Exports: each is the version, opens elsewhere, says what it is, and can be asked of a server."""

import contextlib
import http.server
import itertools
import json
import os
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
import train
from commit import Run
from model import response_logits
from plumbing import Refused, card, expected
from plumbing.backbone import fingerprint, load_backbone, TINY_FOLDER
from plumbing.card import base_of, front_matter, label, ways_to_open
from plumbing.expected import ask_server, questions
from plumbing.export import target_names
from plumbing.prompts import prompt_ids
from plumbing.targets import find_targets
from studies import fuzz
from tests.backbones import byte_level_tokenizer, llama_for, micro_of, write_gguf
from tests.builders import END, RECORD, VOCABULARY, chat_tokenizer, edit_json, fake_commit, forked, git
from tests.builders import micro_backbone, opened, random_examples, refused, saved, snapshot_of

MAKE = {
    "mistral": lambda: micro_backbone(VOCABULARY),
    "gpt2": lambda: micro_of("GPT2"),
    "tied": lambda: micro_of("Llama", tie_word_embeddings=True),
    "experts": lambda: micro_of("Mixtral"),
}


def a_run_on(backbone, name, folder):
    """Make a run folder with versions root, late and their composition mix. name: where the backbone lies."""
    fake_commit(folder, "root", 0, backbone=backbone)
    fake_commit(folder, "late", 1, backbone=backbone)
    run = Run(folder)
    run.manifest["backbone"] = {"name": str(name), "fingerprint": fingerprint(backbone)}
    run.save()
    git(folder, "compose root late --weights 0.3 0.7 --name mix")
    return folder


def exportable(folder, backbone=None, **how):
    """Make a run folder, see `a_run_on`, and a backbone beside it. how: for its `save_pretrained`."""
    backbone = backbone or micro_backbone(VOCABULARY)
    return a_run_on(backbone, saved(backbone, folder / "backbone", **how), folder / "run")


def export(folder, name, to, *more):
    git(folder, "export", name, "--to", to, *more)
    return to


def card_of(folder):
    """Return a model card's text, and what its front matter says."""
    text = (folder / "README.md").read_text()
    return text, huggingface_hub.ModelCard(text).data


def config_of(folder, name="adapter_config.json"):
    return json.loads((folder / name).read_text())


def peft_opened(folder, **how):
    """Return the backbone under an adapter that peft has opened; skip where there is no peft."""
    peft = pytest.importorskip("peft")
    return peft.AutoPeftModelForCausalLM.from_pretrained(folder, **how).base_model.model


class Alike:
    """Compares backbones with a version at its region's mean coordinate. What the version changes is far more
    than float32 rounds on any processor: a thousandth of it is allowed."""

    @torch.no_grad()
    def __init__(self, folder, backbone, name):
        size, fit = backbone.get_input_embeddings().num_embeddings, lambda ids: [i % size for i in ids]
        self.examples = [(fit(prompt), fit(response)) for prompt, response in random_examples(3)]
        bare = response_logits(backbone, 0, self.examples)[0]
        run, model = opened(folder, backbone)
        weights = {"root": 0.3, "late": 0.7} if name == "mix" else {name: 1.0}
        versions = [(v, weights[v.task]) for v in run.versions if v.task in weights]
        parts = [(v.gating(torch.tanh(v.region.mean).float()[None].expand(3, -1)), w) for v, w in versions]
        gating = torch.cat([g[0] for g, _ in parts], -1), torch.cat([w * g[1] for g, w in parts], -1)
        self.wanted = model.logits(self.examples, gating)[0]
        model.detach()
        self.allowed = float((self.wanted - bare).abs().max()) / 1000
        assert self.allowed > 1e-5 * float(self.wanted.abs().max())

    @torch.no_grad()
    def __call__(self, backbone):
        logits = response_logits(backbone.eval(), 0, self.examples)[0]
        torch.testing.assert_close(logits, self.wanted, rtol=0, atol=self.allowed)


def check_tensors(folder, alike, twin):
    """See that an adapter's tensors, added to a twin of its backbone as the paper on LoRA says, are the
    version."""
    config = config_of(folder)
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
    """A LoRA or a merged model has the logits of its version at the region's mean coordinate."""
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
        assert "eos_token_id=1" in card_of(where)[0]
    with refused("not empty", tmp_path):
        export(folder, name, lora)
    here = tmp_path / "here"
    here.mkdir()
    with contextlib.chdir(here), refused("where you are", tmp_path):
        export(folder, name, ".")
    alike(peft_opened(lora))


def test_an_adapter_opens_from_any_working_directory(tmp_path, monkeypatch):
    """A backbone that was named by a relative path is named by an absolute one, and tiny by its folder."""
    backbone = micro_backbone(VOCABULARY)
    saved(backbone, tmp_path / "backbone")
    monkeypatch.chdir(tmp_path)
    folder = a_run_on(backbone, "backbone", tmp_path / "relative")
    alike, lora = Alike(folder, backbone, "late"), tmp_path / "lora"
    export("relative", "late", "lora")
    assert config_of(lora)["base_model_name_or_path"] == str(tmp_path / "backbone")
    assert base_of("tiny") == (TINY_FOLDER, "") and os.path.isabs(TINY_FOLDER)
    monkeypatch.chdir(tmp_path / "relative")
    alike(peft_opened(lora))


@pytest.mark.parametrize("more", [[], ["--merged"]])
def test_a_failed_or_killed_export_leaves_nothing(tmp_path, monkeypatch, more):
    """An export that fails or is killed leaves nothing under its name, and the next attempt works."""
    folder, out = exportable(tmp_path), tmp_path / "out"
    before = snapshot_of(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m, pytest.raises(OSError, match="No space"):
        m.setattr(os, "fsync", full)
        export(folder, "late", out, *more)
    assert snapshot_of(tmp_path) == before
    if hasattr(os, "fork"):  # killed when all is written, and before it has its name
        with monkeypatch.context() as m:
            m.setattr(type(out), "rename", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            assert os.waitpid(forked(export, folder, "late", out, *more), 0)[1] == signal.SIGKILL
        assert not out.exists()
    out.mkdir()
    export(folder, "late", out, *more)
    assert {p.suffix for p in out.iterdir()} >= {".json", ".safetensors"}


def test_a_merged_export_is_opened_again_before_it_has_its_name(tmp_path, monkeypatch):
    """A checkpoint that is saved without the update, or not whole, is refused and removed."""
    folder, save = exportable(tmp_path), transformers.PreTrainedModel.save_pretrained
    for written, match in (
        (lambda model, to: save(micro_backbone(VOCABULARY), to), "not the same"),
        (lambda model, to: model.config.save_pretrained(to), "cannot be opened"),
    ):
        with monkeypatch.context() as m, refused(match, tmp_path):
            m.setattr(transformers.PreTrainedModel, "save_pretrained", written)
            export(folder, "late", tmp_path / "new" / "out", "--merged")


def test_a_merged_export_that_would_answer_otherwise_is_refused(tmp_path):
    """Mamba reads the weights of dt_proj and does not call it: an update that was added there would do what
    it does not do in the version, and peft does not adapt Mamba either."""
    folder = exportable(tmp_path, micro_of("Mamba"))
    with refused("would not answer as the version", tmp_path):
        export(folder, "late", tmp_path / "new" / "out", "--merged")
    pytest.importorskip("peft")
    with refused("peft cannot open", tmp_path):
        export(folder, "late", tmp_path / "new" / "out")


def test_a_bfloat16_checkpoint_in_parts_merges_in_float32(tmp_path, capsys):
    """A bfloat16 checkpoint in several files is merged in float32, so the update is not rounded away."""
    backbone = micro_backbone(VOCABULARY).bfloat16()
    folder = exportable(tmp_path, backbone, max_shard_size="30KB")
    assert len([*(tmp_path / "backbone").glob("*.safetensors")]) > 2
    backbone = backbone.float()
    digest = fingerprint(backbone)
    edit_json(folder / "manifest.json", lambda m: m["backbone"].update(fingerprint=digest))
    alike, merged = Alike(folder, backbone, "late"), export(folder, "late", tmp_path / "merged", "--merged")
    assert "in float32 with an update of rank 4 in 14 modules" in capsys.readouterr().out
    assert config_of(merged, "config.json")["dtype"] == "float32"
    alike(load_backbone(str(merged), "cpu")[0])


@pytest.mark.parametrize("bare", [False, True])
def test_a_backbone_with_an_adapter_in_it_is_refused(tmp_path, bare):
    """transformers would attach the adapter without a word: training and exports say what to do. bare: the
    folder has no weights but the adapter's."""
    folder = exportable(tmp_path)
    lora = export(folder, "late", tmp_path / "lora")
    if bare:
        shutil.rmtree(tmp_path / "backbone")
    shutil.copytree(lora, tmp_path / "backbone", dirs_exist_ok=True)
    for more in ([], ["--merged"]):
        with refused("PEFT adapter.*merge", tmp_path):
            export(folder, "late", tmp_path / "out", *more)
    where = ["--backbone", str(tmp_path / "backbone"), "--out", str(tmp_path / "new")]
    with refused("PEFT adapter.*merge", tmp_path):
        train.main(["--task", "alpaca", "--device", "cpu", *where])


@torch.no_grad()
def test_generate_stops_where_a_chat_was_trained_to_end(chat, tmp_path, capsys):
    """The end of a turn is in a merged checkpoint's generation_config, beside what was there, although that
    is one that transformers would not save once it is changed; the chat template is saved, too."""
    name, backbone = "generation_config.json", tmp_path / "backbone"
    shutil.copytree(chat.parent / "backbone", backbone)
    known = config_of(backbone, name)["eos_token_id"]
    edit_json(backbone / name, lambda config: config.update(temperature=0.5))
    merged = export(chat, "chats", tmp_path / "out", "--merged", "--backbone", backbone)
    lora = export(chat, "chats", tmp_path / "lora", "--backbone", backbone)
    tokenizer, config = transformers.AutoTokenizer.from_pretrained(merged), config_of(merged, name)
    end = tokenizer.convert_tokens_to_ids(END)
    assert config["eos_token_id"] == [known, end] and config["temperature"] == 0.5
    assert capsys.readouterr().out.count(f"answers end with '{END}', token {end}") == 2
    assert END in card_of(lora)[0]
    for where in (merged, lora):
        written = transformers.AutoTokenizer.from_pretrained(where)
        text = written.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert text.startswith("<s>[user]Hi")
    model, ids = transformers.AutoModelForCausalLM.from_pretrained(merged), torch.tensor([[5, 6]])
    out = model.generate(ids, max_new_tokens=9, prefix_allowed_tokens_fn=lambda *_: [end])
    assert out.shape[1] == 3


def test_a_gguf_file_exports_as_any_backbone_does(tmp_path, monkeypatch):
    """Merged, it is an ordinary checkpoint without a trace of GGUF, and peft opens an adapter for it when it
    is told the file."""
    pytest.importorskip("accelerate")
    vocabulary = byte_level_tokenizer()
    write_gguf(tmp_path / "model.gguf", llama_for(vocabulary), vocabulary)
    monkeypatch.chdir(tmp_path)
    backbone, tokenizer = load_backbone("model.gguf", "cpu")
    folder = a_run_on(backbone, "model.gguf", tmp_path / "run")
    alike, merged = Alike(folder, backbone, "mix"), export(folder, "mix", tmp_path / "merged", "--merged")
    lora = export(folder, "mix", tmp_path / "lora")
    assert "quantization_config" not in config_of(merged, "config.json")
    alike(transformers.AutoModelForCausalLM.from_pretrained(merged))
    for where in (merged, lora):
        written = transformers.AutoTokenizer.from_pretrained(where)
        assert written("Hello<|endoftext|>").input_ids == tokenizer("Hello<|endoftext|>").input_ids
    monkeypatch.chdir(tmp_path / "run")
    assert "gguf_file='model.gguf'" in card_of(lora)[0]
    alike(peft_opened(lora, gguf_file="model.gguf", dtype=torch.float32))


@pytest.mark.parametrize("with_peft", [True, False])
def test_an_adapter_that_peft_would_rewrite_is_refused(tmp_path, monkeypatch, with_peft):
    """peft takes the dense layer of this mixture of experts for experts: `--merged` is what is left."""
    if with_peft:
        pytest.importorskip("peft")
    else:
        monkeypatch.setitem(sys.modules, "peft", None)
    backbone = micro_of("Qwen3Moe", mlp_only_layers=[0])
    folder = exportable(tmp_path, backbone)
    with refused("peft.*--merged", tmp_path):
        export(folder, "late", tmp_path / "lora")
    alike, merged = Alike(folder, backbone, "late"), export(folder, "late", tmp_path / "merged", "--merged")
    alike(transformers.AutoModelForCausalLM.from_pretrained(merged))


def test_without_peft_an_adapter_is_written_and_that_is_said(tmp_path, monkeypatch, capsys):
    """Where peft is missing, an adapter is still written, and a line says that it was not tried."""
    monkeypatch.setitem(sys.modules, "peft", None)
    assert config_of(export(exportable(tmp_path), "late", tmp_path / "lora"))
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


@pytest.mark.parametrize("name", ["late", "mix"])
def test_an_export_says_what_it_is(tmp_path, name):
    """Card and metadata name the version and its backbone; the figures are the run folder's, or none. Two
    exports have the same bytes."""
    folder = exportable(tmp_path)
    edit_json(folder / "manifest.json", lambda m: m["results"][1]["routed"].update(late=3.14159))
    run = Run(folder)
    entry, rank = run.find(name), 8 if name == "mix" else 4
    for kind, more in (("adapter", []), ("merged", ["--merged"])):
        out = export(folder, name, tmp_path / kind, *more)
        about = {"format": "pt", "kind": kind, "task": name, "version": entry["hash"], "rank": str(rank)}
        about |= {"base_model": "backbone", "base_fingerprint": run.manifest["backbone"]["fingerprint"]}
        (file,) = out.glob("*.safetensors")
        with safe_open(file, "pt") as f:
            assert f.metadata() == about
        text, data = card_of(out)
        assert all(f"`{value}`" in text for key, value in about.items() if key not in ("kind", "format"))
        assert ("| late | 2.000 | 2.000 | 3.142 |" in text and entry["date"] in text) == (name == "late")
        assert f"`python eval.py --run run{' --version mix' * (name == 'mix')}` measures it" in text
        assert data.library_name == ("peft" if kind == "adapter" else "transformers")
        assert data.base_model is None and str(tmp_path) not in text.partition("# ")[0]
        programs = ("--max-lora-rank 8", "convert_lora_to_gguf.py", "AutoPeft")
        assert all((part in text) == (kind == "adapter") for part in programs)
        again = export(folder, name, tmp_path / f"{kind}-again", *more)
        assert snapshot_of(out) == snapshot_of(again)
    run.manifest["results"] = run.manifest["results"][:1]
    text = card.measured(run, entry)
    assert "no figure" in text and "`python eval.py --run run" in text and "|" not in text


def test_a_label_leaves_the_tensors_as_they_are(tmp_path):
    """A label of any length in a file's metadata moves no tensor, and what the metadata said before stays."""
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
    lora = export(exportable(tmp_path), "late", tmp_path / "lora")
    text = card_of(lora)[0].partition("# late")[2]
    (lora / "README.md").write_text(f"{front_matter(False, 'owner/name')}\n\n# late{text}")
    before = card_of(lora)[1].to_dict()

    def written_by_peft(folder):
        backbone = micro_backbone(VOCABULARY)
        backbone.name_or_path = backbone.config._name_or_path = "owner/name"
        peft.PeftModel.from_pretrained(backbone, lora).create_or_update_model_card(folder)
        return card_of(folder)[1].to_dict()

    assert written_by_peft(lora) == before == written_by_peft(tmp_path / "of-peft")
    assert text.strip() in card_of(lora)[0] and before["base_model"] == "owner/name"
    assert "base_model:adapter:owner/name" in before["tags"]


def test_vllm_is_told_a_rank_that_it_takes():
    """The vLLM command of a card has the smallest allowed rank that suffices, or --merged if none does."""
    for rank, room in ((1, ["1"]), (4, ["8"]), (64, ["64"]), (65, ["128"]), (512, ["512"]), (513, [])):
        code = ways_to_open({"kind": "adapter", "task": "a", "rank": str(rank)}, "tiny", "FOLDER")["vLLM"]
        assert re.findall(r"--max-lora-rank (\S+)", code) == room and (room or "--merged" in code), rank


@pytest.fixture
def hub(monkeypatch):
    """Let a Hub be reached, with a token; return a list in which its calls are kept."""
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
    """A push uploads every file of an export to a private repository, which the card's commands name."""
    folder = exportable(tmp_path)
    out = export(folder, "late", tmp_path / "out", "--merged", "--push", "owner/name")
    (name, made), (files, how) = hub
    assert name == how["repo_id"] == "owner/name" and made == {"private": True, "exist_ok": True}
    assert files == {p.name for p in out.iterdir()} >= {"README.md", "expected.json", "model.safetensors"}
    assert Run(folder).find("late")["hash"] in how["commit_message"]
    text, said = card_of(out)[0], capsys.readouterr().out
    assert "vllm serve owner/name" in text and str(tmp_path) not in text and "hf_secret" not in text + said
    assert said.strip().endswith("uploaded to https://huggingface.co/owner/name")


def test_an_adapter_is_pushed_only_for_a_public_backbone(tmp_path, hub, monkeypatch):
    """An adapter is uploaded only if its backbone is on the Hub, as nobody else could open it otherwise."""
    folder, out = exportable(tmp_path), tmp_path / "out"
    with refused("--push.*--backbone.*--merged", tmp_path):
        export(folder, "late", out, "--push", "owner/name")
    assert not hub
    cache = tmp_path / "cache" / "models--owner--base"
    shutil.copytree(tmp_path / "backbone", cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with fuzz.offline():
        monkeypatch.setattr("plumbing.export.check_push", lambda *_: None)
        export(folder, "late", out, "--push", "owner/name", "--backbone", "owner/base")
    text, data = card_of(out)
    assert data.base_model == "owner/base" and "base_model:adapter:owner/base" in data.tags and len(hub) == 2
    assert str(tmp_path) not in text


def test_what_cannot_be_pushed_is_said_before_writing(tmp_path, hub, monkeypatch):
    """Name, token and network are tried first; where the upload itself fails, the export is kept."""
    for name in ("x", "a/b/c", "a/", "/b", "../b", "a/b c", "a/b--c", "a/ü", "a/b.git", "a/" * 99):
        with refused("OWNER/NAME"):
            card.check_push(name, "tiny", True)
    folder, out, more = exportable(tmp_path), tmp_path / "out", ["--merged", "--push", "owner/name"]
    for *missing, match in (
        (huggingface_hub, "get_token", lambda: None, "no token.*hf auth login"),
        (huggingface_hub.constants, "HF_HUB_OFFLINE", True, "cannot be reached"),
    ):
        with monkeypatch.context() as m, refused(match, tmp_path):
            m.setattr(*missing)
            export(folder, "late", out, *more)
        assert not hub

    def forbid(*_, **how):
        raise RuntimeError("403 Forbidden:\nyou cannot write there")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", forbid)
    with refused("written, but not uploaded.*403 Forbidden: you cannot.*hf upload owner/name"):
        export(folder, "late", out, *more)
    assert (out / "expected.json").exists()


@contextlib.contextmanager
def serving(handler):
    """Give the address of a server that runs in this process."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def server_of(folder, asked, strict=False, change=lambda number, text: text):
    """Return a handler that answers /v1/completions from a checkpoint, with transformers' own `generate`.
    asked: a list to which requests are added. strict: it refuses names that are not OpenAI's, as some do."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        log_message = lambda *_: None

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, reply = 422, {"error": {"message": "unknown names"}}
            if not strict or body.keys() <= {"model", "prompt", "max_tokens", "temperature"}:
                asked.append((self.path, body))
                ids = tokenizer(body["prompt"], return_tensors="pt").input_ids
                how = {"do_sample": body["temperature"] > 0, "max_new_tokens": body["max_tokens"]}
                how |= {"eos_token_id": body["stop_token_ids"]} if "stop_token_ids" in body else {}
                new = model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, ids.shape[1] :]
                text = change(len(asked), tokenizer.decode(new, skip_special_tokens=True))
                status, reply = 200, {"choices": [{"index": 0, "text": text}]}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

    return Handler


@pytest.fixture(scope="module")
def exported(chat, tmp_path_factory):
    """Export a run that answers every chat with Hello in both ways. Its backbone says x for ever."""
    folder = tmp_path_factory.mktemp("exported")
    export(chat, "chats", folder / "lora")
    export(chat, "chats", folder / "merged", "--merged")
    return folder


def ask(at, folder, *more):
    commit.main(["verify", "--at", at, "--expected", str(folder / "expected.json"), *more])


def test_an_exports_answers_are_those_of_the_version(exported, chat):
    """An adapter and a whole model have the same answers, and a tokenizer reads each prompt as it was
    trained."""
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
    """A server of the export gives all expected answers, even if it takes only OpenAI's parameters."""
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

    def told(handler, *more):
        with serving(handler) as at, pytest.raises(SystemExit, match="^1$"):
            ask(at, exported / "lora", *more)
        return capsys.readouterr().out

    out = told(server_of(exported / "merged", [], change=change))
    assert "5 of 6" in out and "\x1b" not in out
    assert "3  after 'Hell' expected 'o.', got ', no\\x1b[2J'\n" in out and out.count("the same") == 5
    rows = json.loads(told(server_of(chat.parent / "backbone", []), "--json"))
    assert all("base model's answer" in row["wrong"] for row in rows) and len(rows) == 6


def page(body, status="200 OK", head=""):
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + (body if isinstance(body, bytes) else body.encode())


def drip(connection):
    """Say a byte now and then, until nobody listens."""
    with contextlib.suppress(OSError):
        for byte in itertools.chain(page("", head="Content-Length: 99999\r\n"), itertools.repeat(32)):
            connection.sendall(bytes([byte]))
            threading.Event().wait(0.01)


# fmt: off
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
    "elsewhere": (page("", "302 Found", "Location: http://127.0.0.1:1/v1\r\n"), "sends on to http://"),
    "nowhere": (page("", "307 Go"), "sends on to nowhere"),
    "no such model": (page('{"message": "no model x"}', "404 Not Found"), "404 Not Found.*model x.*--model"),
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
# fmt: on


@pytest.mark.parametrize("kind", REPLIES)
def test_a_bad_reply_is_one_clear_line(exported, monkeypatch, kind):
    """A bad reply ends the check in one short, printable line that names the server and the fault."""
    reply, match = REPLIES[kind]
    if callable(reply):
        monkeypatch.setattr(expected, "WAIT", 0.3)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            said = b""
            while b'"prompt"' not in said or not said.endswith(b"}"):
                if not (part := self.request.recv(2**16)):
                    return
                said += part
            with contextlib.suppress(OSError):  # whoever has seen enough hangs up
                reply(self.request) if callable(reply) else self.request.sendall(reply)

    with serving(Handler) as at, pytest.raises(Refused, match=match) as e:
        ask(at, exported / "lora")
    assert at in str(e.value) and str(e.value).isprintable() and len(str(e.value)) < 500


def test_no_server_is_one_clear_line(exported):
    """If no server listens at the address, one line says that the connection was refused."""
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        with refused("no answer.*refused"):
            ask(f"http://127.0.0.1:{taken.getsockname()[1]}", exported / "lora")


ADDRESSES = "x localhost:80 ftp://x file:///etc/passwd http:// http://x:y http://x:0 http://x:99999".split()
ADDRESSES += "http://me:secret@x http://x/?a=b http://x/#a http://[x".split()
NO_REQUEST = "http://127.0.0.1:1/a b", "http://127.0.0.1:1/\r\nX: y", "http://\udcff", "http://ü..x"


@pytest.mark.parametrize("at", [*ADDRESSES, *NO_REQUEST])
def test_no_address_of_a_server(exported, at):
    """An address that is malformed, or not of a plain http server, is refused in a line that names --at."""
    with refused("--at" if at in NO_REQUEST else "--at.*give an address"):
        ask_server(at, exported / "lora" / "expected.json")


def test_what_is_expected_is_read_whole_before_it_is_asked(exported, tmp_path):
    """A damaged file of expected answers is refused by its name before the server is asked anything."""
    whole = config_of(exported / "lora", "expected.json")
    first, without = whole["answers"][0], lambda row, name: {k: row[k] for k in row if k != name}
    lies = [{"answers": lie} for lie in ([], {}, [without(first, "prompt")], [first | {"answer": None}])]
    lies += [{"format": 2}, {"model": "../x"}, {"max_tokens": 10**9}, {"end_id": -1}, {"more": 1}]
    for content in (without(whole, "answers"), *(whole | lie for lie in lies)):
        (tmp_path / "expected.json").write_text(json.dumps(content))
        with refused(re.escape(str(tmp_path))):
            ask("http://127.0.0.1:1", tmp_path)


def test_prompts_that_a_server_would_misread_are_not_asked():
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
