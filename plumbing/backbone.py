"""Load a frozen language model, and tell one from another."""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import socket
import urllib.parse
import urllib.request

import huggingface_hub
import tokenizers
import torch
import transformers
from transformers.utils import find_adapter_config_file

from plumbing import HOME, Refused
from plumbing.processes import rank_and_size
from plumbing.targets import offloaded

# MKL's vector functions find out which CPU this is in the first call of any of them, and not under a lock:
# two threads that make it together (in the rotary embedding's cosine) may take different kernels, whose last
# bits differ. So one thread makes it.
torch.ones(1).cos()

LLAMA_70B = dict(model_type="llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80)
LLAMA_70B |= dict(num_attention_heads=64, num_key_value_heads=8)
# Shapes to be had with random weights, for memory and speed. The defaults of mistral are Mistral-7B-v0.1.
RANDOM = {"random:mistral-7b": dict(model_type="mistral"), "random:llama-70b": LLAMA_70B}
SAMPLE = 2**16  # a fingerprint sees at least two thirds as many values of a weight, or all
TINY_FOLDER = str(HOME / "assets" / "tiny")


def pick_device(wanted):
    """Return the device that is asked for, or the best there is. Each of several processes gets a GPU of its
    own. Raises Refused if it is not available."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, colon, index = (wanted or found).partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in ("cpu", found) or colon and index not in map(str, range(count)):
        raise Refused(f"--device {wanted} is not available here; {found} is")
    rank, size = rank_and_size()
    if kind == "cuda" and size > 1:
        own = int(os.environ.get("LOCAL_RANK", rank))  # without torchrun, on one machine, it is the rank
        if index or own >= count:
            raise Refused(f"each process needs a GPU of its own: {count} here, and no --device {kind}:NUMBER")
        torch.cuda.set_device(own)
        return f"cuda:{own}"
    return wanted or found


@functools.cache
def hub_or_cache():
    """Ask once whether the Hub is there; if not, use the cache alone. Its client would retry for a minute."""
    url = urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT)
    address = url.hostname, url.port or (80 if url.scheme == "http" else 443)
    try:
        if not (huggingface_hub.constants.HF_HUB_OFFLINE or urllib.request.getproxies()):
            socket.create_connection(address, timeout=3).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


@contextlib.contextmanager
def loading(name):
    """Turn every error within this block into Refused. The Hub and each format have errors of their own, and
    to the user they mean the same."""
    try:
        yield
    except (MemoryError, Refused):
        raise
    except Exception as e:
        reason, advice = f"{type(e).__name__}: {str(e)[:200]}", "`--backbone` names another, or its new place"
        raise Refused(f"backbone {name} cannot be loaded ({reason}); {advice}") from e


def refuse_without(what, *packages):
    """Raise Refused, with the command that installs it, if a package is missing that `what` needs."""
    for package in packages:
        if not importlib.util.find_spec(package):
            raise Refused(f"{what} needs `pip install {package}`")


def find_backbone(name):
    """Return where a backbone lies, see `load_backbone`: a path or Hub id, and options of `from_pretrained`.
    Raises Refused if it cannot be read."""
    path, options = TINY_FOLDER if name == "tiny" else name, {"trust_remote_code": False}
    if name.lower().endswith(".gguf"):
        refuse_without(f"backbone {name}", "gguf", "accelerate")
        path, options["gguf_file"] = os.path.split(os.path.abspath(name))
    elif os.path.isdir(path) and not list(pathlib.Path(path).glob("*.safetensors")):
        raise Refused(f"backbone {name} has no .safetensors file; `save_pretrained` writes one")
    elif os.path.isfile(path):
        raise Refused(f"backbone {name} is a file: name its folder, or a .gguf file")
    if not os.path.exists(path):
        if os.path.isabs(path):
            raise Refused(f"backbone {name} is not there; --backbone names another, or its new place")
        hub_or_cache()
    with loading(name):
        if find_adapter_config_file(path):  # transformers would attach it without a word
            why = "merge it (peft's `merge_and_unload`) and save the result, or move adapter_config.json away"
            raise Refused(f"backbone {name} is or holds a PEFT adapter, no plain model: {why}")
    return path, options


def from_shape(name, dtype, layers=None):
    """Make a backbone of this shape with random weights, and with so many layers if that is said. It reads
    no weights. Raises Refused if there is no such shape."""
    with loading(name):
        if name in RANDOM:
            config = transformers.AutoConfig.for_model(**RANDOM[name])
        else:
            path, options = find_backbone(name)
            config = transformers.AutoConfig.from_pretrained(path, **options)
        if layers:
            config.num_hidden_layers = layers
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def forget_tokens(tokenizer, size):
    """Make a tokenizer forget added tokens from this id on. Where a GGUF file's vocabulary has no
    `<|endoftext|>`, transformers adds one that the model knows nothing of: it then is text as any other."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    tokenizer._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))


def load_backbone(name, device, device_map=None):
    """Return (backbone, tokenizer): in bfloat16 on a GPU, in float32 on a CPU and for tiny.

    name: "tiny" (embedded), one of RANDOM (a shape, random weights), FILE.gguf, a Hub id or a local folder.
    device_map: "auto" spreads it over all GPUs, then the CPU's memory, then the disk (accelerate). Raises
    Refused if it cannot be had.

    No code that comes with a model is run and nothing is unpickled: safetensors or GGUF, or nothing."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = torch.float32 if torch.device(device).type == "cpu" or name == "tiny" else torch.bfloat16
    if device_map and name in RANDOM:
        raise Refused(f"--device-map spreads weights that are read, and {name} has none to read")
    if device_map:
        refuse_without("--device-map", "accelerate")
    path, options = (TINY_FOLDER, {}) if name in RANDOM else find_backbone(name)
    weights = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, "device_map": device_map}
    with loading(name):
        if name in RANDOM:
            torch.manual_seed(0)
            with torch.device(device):
                backbone = from_shape(name, dtype)
        else:
            backbone, about = transformers.AutoModelForCausalLM.from_pretrained(path, **weights, **options)
            if about["missing_keys"]:
                raise ValueError(f"weights are missing: {min(about['missing_keys'])}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        size = backbone.get_input_embeddings().num_embeddings
        if "gguf_file" in options and len(tokenizer) > size:
            forget_tokens(tokenizer, size)
        if tokenizer.eos_token_id is None or len(tokenizer) > size:
            raise ValueError("its tokenizer has no end-of-sequence token, or more tokens than the model")
    return backbone if device_map else backbone.to(device), tokenizer


def digest_of(backbone, sample, left_out=()):
    """Return a sha256 over name, shape and a sample of the values of every weight, wherever it is kept."""
    digest = hashlib.sha256()
    for name, p in backbone.named_parameters():
        if name not in left_out:
            owner, _, own = name.rpartition(".")
            hook = offloaded(backbone.get_submodule(owner))
            values = hook.weights_map[own] if hook else p.detach()
            digest.update(f"{name}{tuple(values.shape)}".encode())
            digest.update(sample(values.flatten()).cpu().numpy().tobytes())
    return digest.hexdigest()


def sample_of(x):
    """Return 44,000 to 131,000 of a weight's values [n] at equal distances, or all. The distance is odd, as
    a power of two would see few columns."""
    return x[:: len(x) // SAMPLE | 1]


def fingerprint(backbone):
    """Return what identifies a backbone: do adapters for one fit this one?

    A sample of the values is rounded to bfloat16, so it is the same in whatever type they are held. It is
    large enough that a slight tuning shows in spite of the rounding. A tied weight counts once."""
    rounded = lambda x: sample_of(x).to(torch.bfloat16).view(torch.int16)
    return digest_of(backbone, rounded, backbone.all_tied_weights_keys)


def is_backbone(backbone, digest):
    """Is it the one that has this fingerprint? Older run folders have one of 64 values a weight, in the type
    that they were trained in, which was this one or bfloat16."""
    old = lambda dtype: lambda x: x[:: max(1, len(x) // 64)][:64].to(dtype).float()
    kinds = [old(torch.float32), old(torch.bfloat16)]
    return digest == fingerprint(backbone) or digest in (digest_of(backbone, kind) for kind in kinds)


def place_of(name):
    """Return the name under which a backbone is found from everywhere: of a file or folder its whole path."""
    if name == "tiny" or os.path.realpath(name) == os.path.realpath(TINY_FOLDER):
        return "tiny"  # train.py has data and defaults for it
    return os.path.abspath(name) if os.path.exists(name) else name
