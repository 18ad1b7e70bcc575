"""Write what a version adds to its backbone as other programs read it: an adapter, or a whole checkpoint."""

import contextlib
import functools
import json
import os
import re
import warnings

import torch
import transformers
from safetensors.torch import save_file

from plumbing import Refused
from plumbing.backbone import digest_of, from_shape, load_backbone, pick_device, sample_of
from plumbing.card import base_of, check_push, label, on_hub, push, write_card
from plumbing.expected import greedy_answers, questions, write_expected
from plumbing.files import atomic_folder
from plumbing.prompts import end_token, hello, prompt_ids
from plumbing.targets import LINEAR, in_out, layer_numbers

EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}  # as peft calls parts of experts
MERGE = "`--merged` writes a whole model in place of an adapter"


def targets_of(update, backbone):
    """Return {name: module} for the modules that an update is made for. Raises Refused if the backbone lacks
    one of them, or has it in another size or in quantised form."""
    modules = {name: module for name, module in backbone.named_modules() if name in update}
    for name, (A, B) in update.items():
        module, sizes = modules.get(name), (A.shape[1], B.shape[1])
        if not isinstance(module, LINEAR) or in_out(module) != sizes:
            raise Refused(f"the version was made for another backbone: this one has no {name} of {sizes}")
        if module.weight.dtype != torch.float32 or module.weight.numel() != sizes[0] * sizes[1]:
            raise Refused(f"{name} of the backbone is quantised, so nothing can be added to it")
    return modules


# ------------------------------------------------------------------------------------------------- an adapter


def write_adapter(update, name, tokenizer, about, folder):
    """Write an update as a LoRA adapter in PEFT's format, with the backbone's tokenizer. Return whether peft
    has tried it.

    update: {module: (A [r, d_in], B [r, d_out])}. name: the backbone's, as in `load_backbone`. about: goes
    into the tensors' metadata. Raises Refused as `targets_of` and `try_adapter` do."""
    with torch.device("meta"):
        backbone = from_shape(name, torch.float32)
    targets, tensors = targets_of(update, backbone), {}
    for target, (A, B) in update.items():
        start = f"base_model.model.{target}.lora"
        tensors |= {f"{start}_A.weight": A.contiguous(), f"{start}_B.weight": B.T.contiguous()}
    rank = len(next(iter(update.values()))[0])
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_of(name)[0]}
    config |= {**target_names(update, backbone), "r": rank, "lora_alpha": rank}
    config |= {"lora_dropout": 0.0, "bias": "none", "inference_mode": True}
    config["fan_in_fan_out"] = all(isinstance(m, transformers.Conv1D) for m in targets.values())
    tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    label(folder / "adapter_model.safetensors", about)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return try_adapter(folder, backbone, tensors)


def target_names(update, backbone):
    """Return `target_modules`: the last part of a name where it means our modules alone, as most programs
    expect; else the full names. If they mean our modules alone in the layers that are adapted, return those
    layers, too: `layers_to_transform`. peft finds them by the only number in a name."""

    def short(names):
        named = lambda end, names: {name for name in names if name.rpartition(".")[2] == end}
        ends = {end: named(end, update) for end in {name.rpartition(".")[2] for name in update}}
        return sorted(n for end, ours in ends.items() for n in ([end] if ours == named(end, names) else ours))

    there = [name for name, _ in backbone.named_modules()]
    numbers = {name: re.findall(r"\.(\d+)(?=\.)", name) for name in there}
    layers = sorted({int(n) for name in update for n in numbers[name][:1]})
    inside = [name for name, found in numbers.items() if found and int(found[0]) in layers]
    everywhere, within = short(there), short(inside)
    full = lambda names: sum("." in name for name in names)
    if full(within) < full(everywhere) and all(len(numbers[name]) == 1 for name in update):
        return {"target_modules": within, "layers_to_transform": layers}
    return {"target_modules": everywhere}


def try_adapter(folder, backbone, tensors):
    """See that peft puts each tensor of an adapter where it belongs, and adapts no other module. Return
    whether peft is installed to be asked. backbone: without weights, as peft needs its shape only.

    peft rewrites names in mixtures of experts, whose experts transformers keeps in one parameter. Raises
    Refused if an adapter does not survive that; or, without peft, if it may not."""
    try:
        import peft
    except ImportError:
        fused = any(".experts." in n and p.dim() == 3 for n, p in backbone.named_parameters())
        risky = [key for key in tensors if fused and key.split(".")[-3] in EXPERTS or ".experts." in key]
        if risky:
            raise Refused(f"peft may take {min(risky)} for part of an expert; {MERGE}") from None
        return False
    try:
        with warnings.catch_warnings(action="ignore"):
            adapted = peft.get_peft_model(backbone, peft.PeftConfig.from_pretrained(folder))
            result = peft.set_peft_model_state_dict(adapted, tensors)
    except Exception as e:
        raise Refused(f"peft cannot open an adapter for this backbone ({e}); {MERGE}") from e
    adapters = {n.replace(".default.", ".") for n in adapted.state_dict() if ".lora_" in n}
    lost = {n for n in result.missing_keys if ".lora_" in n} | {*result.unexpected_keys}
    if wrong := sorted(lost | adapters ^ tensors.keys()):
        raise Refused(f"peft would not put {wrong[0]} where it belongs; {MERGE}")
    return True


# ----------------------------------------------------------------------------------------- a whole checkpoint


@torch.no_grad()
def write_merged(update, backbone, tokenizer, run, about, folder):
    """Write a backbone, in float32 on the CPU, with an update added to its weights, and its tokenizer. What
    was saved is opened again, compared, and returned; the backbone given is then empty. run: says how prompts
    are written. about: goes into the tensors' metadata.

    Raises Refused if the backbone has other modules, or if what was saved does not answer as the version."""
    targets, template = targets_of(update, backbone), run.template
    record = hello(tokenizer, template)
    prompt = lambda tokenizer: prompt_ids(record, tokenizer, template, run.day)
    ids = prompt(tokenizer)
    if len({id(module.weight) for module in targets.values()}) < len(targets):
        raise Refused("several layers share one weight, which cannot hold an update for each; an adapter can")
    logits_of = lambda backbone: backbone(torch.tensor([ids]), use_cache=False).logits
    with beside(update, backbone):
        wanted, end = logits_of(backbone), end_token(tokenizer, template)
    for name, (A, B) in update.items():
        added = B.T @ A  # [d_out, d_in]
        targets[name].weight += added.T if isinstance(targets[name], transformers.Conv1D) else added
    if quantizer := getattr(backbone, "hf_quantizer", None):  # a GGUF file's: the weights are plain already
        quantizer.remove_quantization_config(backbone)
    for part in (backbone, tokenizer):
        part.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        label(path, about)
    stop_at(end, folder / "generation_config.json")
    digest = digest_of(backbone, sample_of)
    backbone.to("meta")  # Free its memory for what is read back.
    try:
        saved, tokenizer = load_backbone(str(folder), "cpu")
        same = prompt(tokenizer) == ids and end_token(tokenizer, template) == end
    except Refused as e:
        raise Refused(f"the checkpoint cannot be opened once it is saved: {e}") from e
    if not same or digest_of(saved, sample_of) != digest:
        raise Refused("the checkpoint is not the same once it is saved: transformers does not save it whole")
    if not (logits_of(saved) - wanted).abs().max() <= 1e-3 * wanted.abs().max():  # or nan
        why = "the model has a use of its own for weights that were changed"
        raise Refused(f"the checkpoint would not answer as the version: {why}")
    return saved


@contextlib.contextmanager
def beside(update, backbone):
    """Within this block the update stands beside the backbone's weights: so a version answers, whatever the
    weights will say."""

    def add(module, A, B):
        A, B = (t.to(module.weight.device, module.weight.dtype) for t in (A, B))
        return module.register_forward_hook(lambda _, inputs, output: output + inputs[0] @ A.T @ B)

    hooks = [add(backbone.get_submodule(name), *factors) for name, factors in update.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stop_at(end, path):
    """Add the token that ends a response to those at which `generate` stops, in a generation_config.json. The
    file is edited as JSON, because a GenerationConfig that was changed refuses to be saved over what was
    wrong with it before."""
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = config.get("eos_token_id")
    known = known if isinstance(known, list) else [known] * (known is not None)
    if end not in known:
        path.write_text(json.dumps({**config, "eos_token_id": [*known, end]}, indent=2), encoding="utf-8")


# ---------------------------------------------------------------------------------------- a version of a run


def update_of(run, entry):
    """Return what a version adds to the backbone's weights, gated at its region's mean coordinate: {target:
    (A [K r, d_in], B [K r, d_out])} with Delta W = B^T A. The chosen A_i are stacked, and the chosen B_i,
    times (alpha / r) w_i. A composition joins its versions'. Raises Refused as `read_version` does."""
    run.refuse_shared()
    settings, versions = run.manifest["settings"], run.read_versions()
    parts = [(v, 1.0) for v in versions if v.hash == entry["hash"]]
    if not parts:
        composition = run.read_version(entry, versions)
        parts = zip(composition.versions, composition.weights)
    whole = lambda key: torch.cat([v.bases[key] for v in versions])  # one at a time: together they are large
    rows = {key: [] for key in versions[0].shapes}
    numbers = layer_numbers({key.rpartition(".")[0]: None for key in rows})
    for v, share in parts:
        indices, weights = (g[0] for g in v.gating(torch.tanh(v.region.mean).float()[None]))  # [L, K]
        for target, layer in numbers.items():
            scale = share * settings["alpha"] / settings["rank"] * weights[layer][:, None, None]
            rows[f"{target}.A"].append(whole(f"{target}.A")[indices[layer]].flatten(0, 1))
            rows[f"{target}.B"].append((scale * whole(f"{target}.B")[indices[layer]]).flatten(0, 1))
    return {t: (torch.cat(rows[f"{t}.A"]), torch.cat(rows[f"{t}.B"])) for t in numbers}


def export(run, name, folder, merged=False, backbone=None, to_hub=None):
    """Write a version to a new or empty folder: an adapter in PEFT's format, or a checkpoint that any program
    of transformers loads; with a model card, and what it answers to some prompts. Return what was written, as
    a dict. backbone: where it lies now, if not where it was. to_hub: OWNER/NAME, where it is uploaded, too.
    Raises Refused if the folder holds something; see `update_of`, `write_adapter`, `write_merged`,
    `check_push` and `push`."""
    entry, where = run.find(name), backbone or run.manifest["backbone"]["name"]
    if to_hub:
        check_push(to_hub, where, merged)
    with atomic_folder(folder) as tmp:
        update = update_of(run, entry)
        rank = len(next(iter(update.values()))[0])
        # Say neither a date nor a path of this machine: two exports have the same bytes.
        about = {"kind": "merged" if merged else "adapter", "task": entry["task"], "version": entry["hash"]}
        about["rank"], base = str(rank), where if on_hub(where) else os.path.basename(os.path.abspath(where))
        about |= {"base_model": base, "base_fingerprint": run.manifest["backbone"]["fingerprint"]}
        model, tokenizer = run.open_backbone(where, "cpu" if merged else pick_device(None))
        asked = questions(run, entry, model, tokenizer)
        ask = functools.partial(greedy_answers, tokenizer=tokenizer, template=run.template, asked=asked)
        bare, tried = ask(model), True
        if merged:
            answers = ask(write_merged(update, model, tokenizer, run, about, tmp))
        else:
            tried = write_adapter(update, where, tokenizer, about, tmp)
            with beside(update, model):
                answers = ask(model)
        told = write_card(tmp, run, entry, tokenizer, about, where, to_hub or "FOLDER", len(asked))
        if asked:
            write_expected(tmp / "expected.json", about, told["end_id"], asked, bare, answers)
    told["hub"] = push(folder, to_hub, f"{entry['task']}, version {entry['hash']}") if to_hub else None
    about = {"folder": str(folder), "merged": merged, "r": rank, "target_modules": sorted(update)}
    return {**about, "tried": tried, **told}


def say_export(about):
    """Return what was exported in one line."""
    text = f"wrote {about['folder']}: {about['what']} in {len(about['target_modules'])} modules; "
    text += f"answers end with {about['end']!r}, token {about['end_id']}"
    text += "" if about["tried"] else "; not tried with peft, which is not installed"
    return text + (f"; uploaded to {about['hub']}" if about["hub"] else "")
