"""Which linear modules of a language model are adapted, what they are called, and where they compute."""

import functools
import re

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from plumbing import Refused

LINEAR = nn.Linear, transformers.Conv1D
ROUTER = re.compile(r"\.(gate|router|shared_expert_gate)(\.|$)")  # these choose between experts


def text_layers(backbone):
    """Return {full name: module} of all that lies in a numbered layer of the text model. Embeddings and head
    lie in none, and a vision or audio tower is no part of the text model."""
    decoder = backbone.get_decoder()
    part = decoder if list(decoder.children()) else backbone  # some call their head a decoder
    inside = {id(m) for m in part.modules()}
    return {n: m for n, m in backbone.named_modules() if id(m) in inside and re.search(r"\.\d+\.", n)}


def find_targets(backbone, names=("all",), each=False):
    """Return {full name: module} of the linear modules in the layers of the text model that have one of these
    last names; "all" means all but routers: a small change of one sends tokens to other experts. Raises
    Refused if there are none, or, if `each` is asked for, none of one of the names."""
    linear = {n: m for n, m in text_layers(backbone).items() if isinstance(m, LINEAR)}
    fits = lambda n, name: not ROUTER.search(n) if name == "all" else f".{n}".endswith(f".{name}")
    for asked in zip(names) if each else [names]:
        if not any(fits(n, name) for n in linear for name in asked):
            known = ", ".join(sorted({n.rpartition(".")[2] for n in linear})) or "none"
            why = f"the backbone's layers have no such linear module, but {known}"
            raise Refused(f"--targets {','.join(asked)}: {why}")
    return {n: m for n, m in linear.items() if any(fits(n, name) for name in names)}


def named_targets(backbone, names):
    """Return {full name: module} of the modules with these full names, in the backbone's order."""
    return {n: m for n, m in backbone.named_modules() if n in names and isinstance(m, LINEAR)}


def layers_of(backbone):
    """Return the layers of the text model that have linear modules, in order. Raises Refused if they are not
    one stack."""
    layers = dict.fromkeys(re.match(r".*?\.\d+(?=\.)", name)[0] for name in find_targets(backbone))
    if len({name.rpartition(".")[0] for name in layers}) > 1:
        raise Refused("the backbone has layers of several kinds, none of which can stay bare: --passes two")
    return [backbone.get_submodule(name) for name in layers]


def default_bare(layers):
    """Return m, how many of so many layers stay bare: a sixth."""
    return max(1, round(layers / 6))


def adapted_targets(backbone, targets, bare):
    """Return those of the targets that do not lie in the first `bare` layers. Raises Refused if none is
    left."""
    layers = layers_of(backbone) if bare else []
    lower = {id(m) for layer in layers[:bare] for m in layer.modules()}
    found = {name: m for name, m in targets.items() if id(m) not in lower}
    if not found or bare and bare >= len(layers):
        raise Refused(f"{bare} bare layers leave nothing to adapt; --passes two has none")
    return found


def kind_of(name):
    """Return the name of a module or weight without its layer and other numbers: "mlp.experts.down_proj"."""
    own = re.split(r"\.\d+\.", name, maxsplit=1)[-1]
    return ".".join(part for part in own.split(".") if not part.isdigit())


def describe_targets(backbone, names):
    """Return one line: how many kinds of weights in the layers are adapted, what share of their numbers,
    and which are not. Vectors, as of norms, do not count."""
    weights, stack = {}, lambda name: re.split(r"\.\d+\.", name, maxsplit=1)[0]
    stacks = {stack(name) for name in names}  # others, such as a tower's, are not of the text model
    for full, module in text_layers(backbone).items():
        for own, p in module.named_parameters(recurse=False):
            if p.dim() > 1 and stack(full) in stacks:
                weights[full if own == "weight" else f"{full}.{own}"] = p.numel()
    kinds, adapted = {kind_of(name) for name in weights}, {kind_of(name) for name in names}
    share = 100 * sum(size for name, size in weights.items() if name in names) / sum(weights.values())
    left = f" (not: {', '.join(sorted(kinds - adapted))})" if kinds - adapted else ""
    return f"{len(adapted)} of {len(kinds)} kinds of projection, {share:.1f} % of the layers' weights{left}"


def layer_numbers(targets):
    """Return {full name: number of its layer, counted from 0}. The layer is the first number in a name."""
    numbers = {name: int((re.findall(r"\.(\d+)\.", name) or [0])[0]) for name in targets}
    order = sorted(set(numbers.values()))
    return {name: order.index(n) for name, n in numbers.items()}


def in_out(module):
    """Return (d_in, d_out) of a target. Conv1D is a linear layer whose weight is stored transposed."""
    linear = isinstance(module, nn.Linear)
    return (module.in_features, module.out_features) if linear else tuple(module.weight.shape)


def find_layers(backbone):
    """Return the layers of the backbone, in order: what can be computed again as a whole."""
    return [m for m in backbone.modules() if isinstance(m, transformers.GradientCheckpointingLayer)]


def compute_again(backbone, contexts):
    """Let autograd keep the input of a layer alone, and compute the layer again in the backward pass (Chen et
    al. 2016). The gradients are the same, to the bit. Weights that are brought from memory or disk are let go
    after every layer, too. contexts() gives those of both passes. Return the layers: the first argument of
    their new `forward` is the old one.

    transformers has a switch for this, but it works in training mode only, which brings dropout. Raises
    Refused if the backbone has no such layers."""
    layers = find_layers(backbone)
    if not layers:
        raise Refused("--checkpointing: this backbone has no layers that can be computed again")
    how = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, **how)
    return layers


def offloaded(module):
    """Return accelerate's hook, if it keeps the module's weights elsewhere until they are used."""
    hook = getattr(module, "_hf_hook", None)
    return hook if getattr(hook, "offload", False) else None


def device_of(module):
    """Return where a module computes."""
    hook = offloaded(module)
    return torch.device(hook.execution_device) if hook else module.weight.device
