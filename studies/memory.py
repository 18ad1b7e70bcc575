"""What training takes on a device, counted from the shapes: the paper's Table 2, with what it leaves out.

    python -m studies.memory                               # Mistral-7B's shape, beside the paper's table
    python -m studies.memory --passes two                  # as the paper has it: no layer stays bare
    python -m studies.memory --backbone random:llama-70b   # the layers spread over 1, 2 and 4 devices

Nothing is allocated: the passes run on tensors that have a shape and no memory.
"""

import itertools
import re

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from field import CoordinateDynamics, WeightField, top_k_gating
from model import NIWF, detach, response_nll
from plumbing.backbone import from_shape
from plumbing.targets import default_bare, find_layers
from plumbing.command import Parser, output_file, run_program, write_results
from train import DEFAULTS

TOKENS, RANK, BASES, TOP_K = 256, 8, 16, 8  # the paper's; a micro-batch is one sequence
PARTS = ("backbone", "bases read", "bases written", "field, dynamics", "gradients", "moments", "activations")
TABLE_2 = dict(zip(PARTS, (14.00, None, 1.29, 0.01, None, 2.58, 1.0)))  # the paper's, in GB
TABLE_2["in all, the peak"] = 18.9


def default_coord_dim(bare):
    """Return d, the dimension of z, that train.py takes in one pass (bare > 0), or in two."""
    return DEFAULTS["coord_dim"] if bare else 64


def count_kept(model, field, dynamics):
    """Bytes that autograd keeps of a micro-batch whose tokens are all of a response: a list, by layer. Its
    last number is what comes outside of the layers, with the two gradients of the logits, in float32, with
    which the backward pass of the loss begins."""
    layers, kept, handles = find_layers(model.backbone), {}, []
    here = [len(layers)]  # the last of these is where the pass is
    for i, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, i=i: here.append(i)))
        handles.append(layer.register_forward_hook(lambda *_: here.append(len(layers))))
    weights = itertools.chain(*(m.parameters() for m in (model.backbone, field, dynamics)))
    owned = {p.untyped_storage()._cdata for p in (*weights, *model.bank.live.values())}

    def keep(tensor):
        storage = tensor.untyped_storage()  # of several views, once
        if storage._cdata not in owned:
            kept.setdefault(storage._cdata, (here[-1], storage.nbytes()))
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gating = top_k_gating(field(dynamics(torch.zeros(1, model.features))), TOP_K)
        logits, labels = model.logits([([0], [0] * TOKENS)], gating)
        nll = response_nll(logits, labels)  # while it is here, so is all that was kept
    detach(handles)
    sizes = [sum(size for at, size in kept.values() if at == i) for i in range(len(layers) + 1)]
    sizes[-1] += 2 * nll.element_size() * logits.numel()
    return sizes


def count_memory(name, depth=None, bare=0):
    """What a training takes at its peak: the forward pass of a micro-batch is done, its backward pass begins,
    and the gradients of the micro-batches before are there. Counted on tensors that have a shape and no
    memory, with the backbone in bfloat16, cut to `depth` layers if that is said, of which the first `bare`
    are not adapted. Over several devices the layers are spread evenly.

    -> rows {"layers", "task": 1 or 2 (which reads the first's bases), "checkpointing": bool, "devices",
    "device": its number, and in bytes each of PARTS, and "gathered", the bases among the activations}. Not
    counted: what the allocator wastes, what a kernel works in, the CUDA context."""
    with FakeTensorMode():
        model = NIWF(from_shape(name, torch.bfloat16, depth), pad_id=0, rank=RANK, bare=bare)
        model.bank.add(BASES)
        layers, d = model.bank.layers + bare, default_coord_dim(bare)
        dynamics = CoordinateDynamics(model.features, d)
        fields = [WeightField(model.bank.layers, BASES * task, d) for task in (1, 2)]
        kept = {False: count_kept(model, fields[0], dynamics)}
        model.checkpoint()
        kept[True] = count_kept(model, fields[0], dynamics)
    rows = []
    for devices, task, checkpointing in itertools.product((1, 2, 4), (1, 2), (False, True)):
        about = {"layers": layers, "task": task, "checkpointing": checkpointing, "devices": devices}
        places = [{**about, "device": i} | dict.fromkeys((*PARTS, "gathered"), 0) for i in range(devices)]
        place_weights(places, model, fields[:task], dynamics)
        *inside, outside = kept[checkpointing]
        for layer, size in enumerate(inside):
            places[layer * devices // layers]["activations"] += size
        for place in places:  # either the loss goes backward or a layer is computed again
            again = max(kept[False][:-1]) if checkpointing else 0
            place["activations"] += max(again, outside if place is places[-1] else 0)
        rows += places
    return rows


def place_weights(places, model, fields, dynamics):
    """Add to the rows of all devices the weights of a task, gradients and moments of those it trains. Its
    field is the last; the first task trains the dynamics, too."""
    size = lambda module: sum(p.nbytes for p in module.parameters())
    place_of = lambda layer: places[layer * len(places) // (model.bank.layers + model.bare)]
    embeddings = model.backbone.get_input_embeddings().weight
    for key, p in model.backbone.named_parameters():
        number = re.search(r"\.(\d+)\.", key)
        ends = places[0] if p is embeddings else places[-1]
        (place_of(int(number[1])) if number else ends)["backbone"] += p.nbytes
    for key, p in model.bank.live.items():
        place = place_of(model.bank.layer[key[:-2]] + model.bare)
        place["bases written"] += p.nbytes
        place["bases read"] += p.nbytes * (len(fields) - 1)
        place["gradients"] += p.nbytes
        place["gathered"] += p.nbytes // 2 * TOP_K // BASES  # in bfloat16
    places[0]["field, dynamics"] = sum(map(size, fields)) + size(dynamics)
    places[0]["gradients"] += size(fields[-1]) + (size(dynamics) if len(fields) == 1 else 0)
    for place in places:
        place["moments"] = 2 * place["gradients"]


def depth_of(name):
    """Return how many layers a backbone has."""
    with FakeTensorMode():
        return len(find_layers(from_shape(name, torch.bfloat16)))


def memory_lines(rows):
    """The lines of a table from rows of `report_memory`: {what: its bytes on the fullest device, for task 1
    without and with checkpointing, and for task 2}."""
    lines = {part: (1, part) for part in PARTS} | {"in all, the peak": (1, "total")}
    lines |= {f"on the fullest of {n} devices": (n, "total") for n in (2, 4)}
    lines |= {"bases gathered, [B, K, r, d]": (1, "gathered"), "or [B, T, K, r, d]": (1, "a token")}

    def fullest(devices, part, *column):
        place = lambda row: (row["devices"], row["task"], row["checkpointing"])
        return max(row[part] for row in rows if place(row) == (devices, *column))

    columns = [*itertools.product((1, 2), (False, True))]
    return {line: [fullest(*which, *column) for column in columns] for line, which in lines.items()}


def report_memory(name, passes="one"):
    """Print the paper's Table 2 from a backbone's shapes. -> rows of `count_memory`, with their "total", and
    what gathered bases would take, were they gathered for "a token" each."""
    rows = count_memory(name, bare=default_bare(depth_of(name)) if passes == "one" else 0)
    for row in rows:
        row["total"] = sum(row[part] for part in PARTS)
        row["a token"] = TOKENS * row["gathered"]
    print(f"{name}, GiB, a micro-batch of 1 x {TOKENS} tokens; chk: with --checkpointing")
    paper = TABLE_2 if name == "random:mistral-7b" else {}
    print(f"{'':28}    task 1  1, chk    task 2  2, chk" + "   the paper's Table 2" * bool(paper))
    for line, sizes in memory_lines(rows).items():
        theirs = f"{paper[line] * 1e9 / 2**30:22.2f}" if paper.get(line) else ""
        figures = (f"{size / 2**30:{width}.2f}" for size, width in zip(sizes, (10, 8, 10, 8)))
        print(f"{line:28}" + "".join(figures) + theirs)
    return rows


def parse_options(argv=None):
    p = Parser(__doc__, prog="memory.py")
    text = "whose shapes are counted; random:llama-70b is one, too"
    p.add_argument("--backbone", default="random:mistral-7b", help=text)
    p.add_argument("--passes", choices=["one", "two"], default="one", help="see train.py [one]")
    p.add_argument("--json", type=output_file, metavar="FILE", help="write what was counted")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_options(argv)
    rows = report_memory(args.backbone, args.passes)
    write_results(args.json, "-m studies.memory", argv, indent=1, rows=rows)


if __name__ == "__main__":
    with torch.no_grad():
        run_program(main)
