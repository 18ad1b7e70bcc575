"""Say what an export is: in a model card, in the metadata of its tensors, and on the Hub."""

import json
import os
import re
import shlex
import shutil
import textwrap

import huggingface_hub
from huggingface_hub.utils import validate_repo_id

from plumbing import Refused
from plumbing.backbone import RANDOM, find_backbone, hub_or_cache
from plumbing.files import atomic
from plumbing.prompts import end_token, hello, prompt_of

VERIFY = "python commit.py verify --at http://127.0.0.1:8000 --expected expected.json"
CHECK = """`expected.json` holds {} validation prompts, and the greedy answers of this export. To see
whether a server that has the export gives the same answers:"""
VLLM_RANKS = 1, 8, 16, 32, 64, 128, 256, 320, 512  # what its --max-lora-rank takes


def on_hub(name):
    """Return whether a backbone's name is an id on the Hub, which means the same on every machine."""
    here = name == "tiny" or name in RANDOM or name.endswith(".gguf") or os.path.exists(name)
    return not here and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def base_of(name):
    """Return what `base_model_name_or_path` says of a backbone: the absolute path of a folder, so that the
    adapter opens from any working directory; and a GGUF file's name in it, which peft takes separately."""
    if name.startswith("random:"):
        return name, ""
    path, options = find_backbone(name)
    return os.path.abspath(path) if os.path.isdir(path) else path, options.get("gguf_file", "")


def label(path, about):
    """Write `about` into the header of a safetensors file, beside what its metadata says. safetensors itself
    writes metadata in no promised order; here the keys are sorted, so that equal files have equal bytes."""
    # `atomic` ends last: Windows replaces no file that is open.
    with atomic(path) as tmp, open(path, "rb") as source, open(tmp, "wb") as target:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        known = header.pop("__metadata__", {})
        text = json.dumps({"__metadata__": dict(sorted({**known, **about}.items())), **header}).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
        target.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, target, 2**24)


# --------------------------------------------------------------------------------------------- the model card


def front_matter(merged, name):
    """Return what programs read of a card. An adapter has the keys and tags that peft gives it. A backbone
    that is not on the Hub is not named: the Hub refuses a card that names a folder. name: the backbone's."""
    facts = {"library_name": "transformers" if merged else "peft", "pipeline_tag": "text-generation"}
    facts |= {"base_model": name} if on_hub(name) else {}
    if not merged:
        facts["tags"] = [*[f"base_model:adapter:{name}"] * on_hub(name), "lora", "transformers"]
    return f"---\n{huggingface_hub.ModelCardData(**facts).to_yaml()}\n---"


def ways_to_open(about, name, at):
    """Return {program: the code with which it opens the export `at`}. name: the backbone's."""
    task, rank, (base, file) = about["task"], int(about["rank"]), base_of(name)
    load = f"transformers.AutoModelForCausalLM.from_pretrained({at!r}"
    if about["kind"] == "merged":
        gguf = f"python convert_hf_to_gguf.py {at} --outfile {task}.gguf\nllama-server -m {task}.gguf"
        vllm = f"vllm serve {at} --served-model-name {task}"
        return {"transformers": f"{load})", "vLLM": vllm, "llama.cpp": gguf}
    more, whole = (f", gguf_file={file!r}" if file else ""), os.path.join(base, file) if file else base
    whole = shlex.quote(whole)
    room = next((r for r in VLLM_RANKS if r >= rank), None)
    vllm = f"vllm serve {whole} --enable-lora --max-lora-rank {room} --lora-modules {task}={at}"
    gguf = "# BASE: a folder with the base model's config.json; BASE.gguf: the base model itself\n"
    gguf += f"python convert_lora_to_gguf.py {at} --base BASE --outfile {task}.gguf\n"
    return {
        "transformers": f"{load}{more})  # peft must be installed",
        "peft": f"peft.AutoPeftModelForCausalLM.from_pretrained({at!r}{more})",
        "vLLM": vllm if room else f"# rank {rank} is more than it takes, {VLLM_RANKS[-1]}: export --merged",
        "llama.cpp": f"{gguf}llama-server -m BASE.gguf --lora {task}.gguf",
    }


def measured(run, entry):
    """Return what the run folder knows of a version's perplexity, with the command that measures it and the
    date, as text. Nothing is kept of a composition."""
    folder = shlex.quote(run.folder.name if run.folder.is_absolute() else str(run.folder))
    task = entry["task"]
    command = f"`python eval.py --run {folder}{f' --version {task}' * (entry['lock'] == 'composed')}`"
    row = next((row for row in reversed(run.manifest["results"]) if task in row["stored"]), None)
    if not row:
        return f"The run folder holds no figure of it. {command} measures its perplexity."
    version = run.find(row["version"])
    figures = " | ".join(f"{row[key][task]:.3f}" for key in ("base", "stored", "routed"))
    return (
        f"| perplexity | bare base model | version, given | version, routed |\n| --- | --- | --- | --- |\n"
        f"| {task} | {figures} |\n\n"
        f"Of the responses to {row['identical'][task][1]} validation prompts, when {version['task']} was "
        f"committed ({version['date']}); {command} measures it again. There every prompt has the gating of "
        "its own coordinate. This export has one gating for all, that of the region's mean coordinate, so "
        "its own perplexity is another."
    )


def write_card(folder, run, entry, tokenizer, about, name, at, asked):
    """Write the model card. Return what was exported and where answers end, as a dict. about: what goes into
    the tensors' metadata, too. name: the backbone's. at: what the export is called in its commands. asked:
    how many answers are in expected.json."""
    prompt = prompt_of(hello(tokenizer, run.template, run.day), tokenizer, run.template, run.day)
    end = end_token(tokenizer, run.template)
    text, merged = tokenizer.convert_ids_to_tokens(end), about["kind"] == "merged"
    what = "the backbone in float32 with an update" if merged else "a LoRA adapter"
    what += f" of rank {about['rank']}"
    keys = {"base model": "base_model", "its fingerprint": "base_fingerprint"}
    rows = [f"| {key} | `{about[keys.get(key, key)]}` |" for key in (*keys, "version", "task", "rank")]
    lines = [front_matter(merged, name), f"# {entry['task']}", f"This is {what}."]
    lines += ["\n".join(["| | |", "| --- | --- |", *rows]), "## Open it"]
    for program, code in ways_to_open(about, name, at).items():
        lines += [f"{program}:", textwrap.indent(code, "    ")]
    lines += ["## Prompts", "It was trained on prompts such as", textwrap.indent(prompt, "    ")]
    lines += [f"and every answer ends with `{text}`: to stop there,"]
    lines += [f"    model.generate(..., eos_token_id={end})", "## Measured", measured(run, entry)]
    if asked:
        lines += ["## Check it", CHECK.format(asked), f"    {VERIFY}"]
    (folder / "README.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return {"what": what, "end": text, "end_id": end}


# ------------------------------------------------------------------------------------------------- on the Hub


def check_push(name, backbone, merged):
    """Look, before anything is written, whether an export can go to the Hub as OWNER/NAME. Raises Refused if
    the name is no such name, there is no token, the Hub cannot be reached, or an adapter is for a backbone
    that lies on this machine."""
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise ValueError
    except ValueError:
        raise Refused(f"--push {name!r}: give OWNER/NAME, with letters, digits, '-', '_' and '.'") from None
    if not merged and not on_hub(backbone):
        why = f"the adapter is for {backbone}, which nobody else has"
        raise Refused(f"--push: {why}; give its id on the Hub with --backbone, or a whole model by --merged")
    hub_or_cache()
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        where = huggingface_hub.constants.ENDPOINT
        raise Refused(f"--push: {where} cannot be reached, or HF_HUB_OFFLINE is set")
    if not huggingface_hub.get_token():
        raise Refused("--push: no token; `hf auth login` keeps one, or set HF_TOKEN")


def push(folder, name, message):
    """Upload an export. Return its address. A repository that is new is private, as expected.json holds
    validation prompts. Raises Refused, with the export kept, if the Hub does not take it."""
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except Exception as e:  # the Hub and its client have many errors
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        again = f"`hf upload {name} {folder}` tries again"
        raise Refused(f"{folder} is written, but not uploaded ({reason}); {again}") from e
    return f"{huggingface_hub.constants.ENDPOINT}/{name}"
