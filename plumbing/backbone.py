"""Load a frozen language model, name its parts, and tell one from another."""

import contextlib
import functools
import hashlib
import importlib.util
import os
import pathlib
import re
import socket
import urllib.parse
import urllib.request

import huggingface_hub
import torch
import transformers
from torch import nn
from transformers.utils import find_adapter_config_file

from plumbing import Refused
from plumbing.processes import rank_and_size

# MKL's vector functions find out which CPU this is in the first call of any of them, and not under a lock:
# two threads that make it together (in the rotary embedding's cosine) may take different kernels, whose last
# bits differ. So one thread makes it.
torch.ones(1).cos()

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS += ("c_attn", "c_proj", "c_fc")
RANDOM = {  # shapes to be had with random weights, for memory and speed
    "random:mistral-7b": dict(model_type="mistral"),  # its defaults are Mistral-7B-v0.1
    "random:llama-70b": dict(
        model_type="llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
TINY_FOLDER = str(pathlib.Path(__file__).parent.parent / "assets" / "tiny")


def find_targets(backbone, names=TARGETS):
    """{full name: module} of the leaf projections whose last name is in `names`. Refused: there are none."""
    linear = nn.Linear, transformers.Conv1D
    leaves = {full: m for full, m in backbone.named_modules() if isinstance(m, linear)}
    found = {full: m for full, m in leaves.items() if full.rpartition(".")[2] in names}
    if not found:
        raise Refused(f"the backbone has no linear module named {', '.join(names)}")
    return found


def layer_numbers(targets):
    """{full name: number of its layer, counted from 0}. The layer is the first number in a name."""
    numbers = {name: int((re.findall(r"\.(\d+)\.", name) or [0])[0]) for name in targets}
    order = sorted(set(numbers.values()))
    return {name: order.index(n) for name, n in numbers.items()}


def in_out(module):
    """(d_in, d_out) of a target. Conv1D is a linear layer whose weight is stored transposed."""
    linear = isinstance(module, nn.Linear)
    return (module.in_features, module.out_features) if linear else tuple(module.weight.shape)


def find_layers(backbone):
    """The layers of the backbone, in order: what can be computed again as a whole."""
    return [m for m in backbone.modules() if isinstance(m, transformers.GradientCheckpointingLayer)]


def offloaded(module):
    """accelerate's hook, if it keeps the module's weights elsewhere and brings them when they are used."""
    hook = getattr(module, "_hf_hook", None)
    return hook if getattr(hook, "offload", False) else None


def device_of(module):
    """Where a module computes."""
    hook = offloaded(module)
    return torch.device(hook.execution_device) if hook else module.weight.device


def pick_device(wanted):
    """The device asked for, or the best there is; of several processes each gets a GPU of its own. Refused:
    it is not available."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = (wanted or found).partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in ("cpu", found) or index and not (index.isdecimal() and int(index) < count):
        raise Refused(f"--device {wanted} is not available here; {found} is")
    if kind == "cuda" and rank_and_size()[1] > 1:
        own = int(os.environ["LOCAL_RANK"])
        if index or own >= count:
            raise Refused(f"each process needs a GPU of its own: {count} here, and no --device {kind}:NUMBER")
        torch.cuda.set_device(own)
        return f"cuda:{own}"
    return wanted or found


@functools.cache
def hub_or_cache():
    """Without a network the Hub's client retries for a minute: ask once, else its cache alone."""
    host = urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT).hostname
    try:
        if not (huggingface_hub.constants.HF_HUB_OFFLINE or urllib.request.getproxies()):
            socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


@contextlib.contextmanager
def loading(name):
    """Within this block every error is a Refused: the Hub and every format have errors of their own; to the
    user they are one."""
    try:
        yield
    except (MemoryError, Refused):
        raise
    except Exception as e:
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise Refused(
            f"backbone {name} cannot be loaded ({reason}); `--backbone` names another, or its new place"
        ) from e


def find_backbone(name):
    """Where a backbone lies, see `load_backbone`. -> (path or Hub id, options of `from_pretrained`). Refused:
    it cannot be read."""
    path, options = TINY_FOLDER if name == "tiny" else name, {"trust_remote_code": False}
    if name.endswith(".gguf"):
        for package in ("gguf", "accelerate"):
            if not importlib.util.find_spec(package):
                raise Refused(f"backbone {name} needs `pip install {package}`")
        path, options["gguf_file"] = os.path.split(os.path.abspath(name))
    elif os.path.isdir(path) and not list(pathlib.Path(path).glob("*.safetensors")):
        raise Refused(f"backbone {name} has no .safetensors file; `save_pretrained` writes one")
    if not os.path.exists(path):
        hub_or_cache()
    with loading(name):
        if find_adapter_config_file(path):  # transformers would attach it without a word
            why = "merge it (peft's `merge_and_unload`) and save the result, or move adapter_config.json away"
            raise Refused(f"backbone {name} is or holds a PEFT adapter, no plain model: {why}")
    return path, options


def load_tokenizer(name):
    """Return the tokenizer of a backbone, see `load_backbone`. Raises Refused if it cannot be had."""
    path, options = (TINY_FOLDER, {}) if name in RANDOM else find_backbone(name)
    with loading(name):
        return transformers.AutoTokenizer.from_pretrained(path, **options)


def from_shape(name, dtype, layers=None):
    """A backbone of this shape with random weights, and with so many layers if that is said. No weights are
    read. Refused: there is no such shape."""
    with loading(name):
        if name in RANDOM:
            config = transformers.AutoConfig.for_model(**RANDOM[name])
        else:
            path, options = find_backbone(name)
            config = transformers.AutoConfig.from_pretrained(path, **options)
        if layers:
            config.num_hidden_layers = layers
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_backbone(name, device, device_map=None):
    """name: "tiny" (embedded), one of RANDOM (a shape, random weights), FILE.gguf, a Hub id or a local
    folder. device_map: "auto" spreads it over all GPUs, then the CPU's memory, then the disk (accelerate).
    -> (backbone, tokenizer): bfloat16 on a GPU, float32 on a CPU and for tiny. Refused: it cannot be had.

    No code that comes with a model is run and nothing is unpickled: safetensors or GGUF, or nothing."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = torch.float32 if device == "cpu" or name == "tiny" else torch.bfloat16
    if device_map and name in RANDOM:
        raise Refused(f"--device-map spreads weights that are read, and {name} has none to read")
    if device_map and not importlib.util.find_spec("accelerate"):
        raise Refused("--device-map needs `pip install accelerate`")
    if name in RANDOM:
        torch.manual_seed(0)
        with torch.device(device):
            backbone = from_shape(name, dtype)
        return backbone, load_tokenizer(name)
    (path, options), tokenizer = find_backbone(name), load_tokenizer(name)
    weights = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, "device_map": device_map}
    with loading(name):
        backbone, about = transformers.AutoModelForCausalLM.from_pretrained(path, **weights, **options)
        if about["missing_keys"]:
            raise ValueError(f"weights are missing: {min(about['missing_keys'])}")
        if tokenizer.eos_token_id is None or len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
            raise ValueError("its tokenizer has no end-of-sequence token, or more tokens than the model")
        return backbone if device_map else backbone.to(device), tokenizer


def fingerprint(backbone):
    """sha256 over name, shape and 64 values of every weight: do adapters for one backbone fit this one?"""
    digest = hashlib.sha256()
    for name, p in backbone.named_parameters():
        owner, _, own = name.rpartition(".")
        hook = offloaded(backbone.get_submodule(owner))
        flat = (hook.weights_map[own] if hook else p.detach()).flatten()
        digest.update(f"{name}{tuple(p.shape)}".encode())
        digest.update(flat[:: max(1, len(flat) // 64)][:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()
