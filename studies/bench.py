"""Side-by-side timings: what is fast here, against the literal form of the same thing or against a peer.

    python -m studies.bench niwf                         # a training step beside peft (pip install peft)
    python -m studies.bench decode                       # prefill and decoding beside peft's LoRA
    python -m studies.bench first-token                  # until a routed answer begins, beside the bare model
    python -m studies.bench growth --run runs/stream   # what the first n versions cost and know, for every n
    python -m studies.bench memory --layers 1 2 4      # a step's peak memory at full width, beside its count
    python -m studies.bench ftn                          # a training step against the literal Algorithm 1

All sides run in turns of a few steps, in one process, on one thread (niwf: on all) and on the same batches,
so that each finds in the cache what it would find there in training. The median turn counts, the first is
left out. What two forms of the same thing compute is compared as well.
"""

import concurrent.futures
import contextlib
import copy
import functools
import math
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
import warnings

import torch
import transformers

from commit import Run
from eval import answer, forgetting, open_run, validation_set
from model import attach, NIWF, response_logits, response_nll
from plumbing import Refused
from plumbing.backbone import from_shape, load_backbone, refuse_without
from plumbing.command import number, output_file, Parser, run_program, write_results
from plumbing.prompts import encode, pad_of
from plumbing.records import DATA, read_records
from plumbing.rows import end_with_parent
from plumbing.passes import decode
from plumbing.targets import adapted_targets, default_bare, find_targets, layers_of
from plumbing.training import peak_memory, resource
from field import CoordinateDynamics, Region, WeightField, route, top_k_gating
from ftn import SmoothKWTA
from studies.memory import PARTS, TOKENS, count_memory, default_coord_dim
from synthetic import HEAD, METHODS, Neurons, Row, generator


def take_turn(sides, batches, times):
    """Run every side on the same batches. Its seconds per batch go to `times`, its results are returned."""
    results = []
    for side, spent in zip(sides, times):
        started = time.perf_counter()
        results.append([side(*batch) for batch in batches])
        spent.append((time.perf_counter() - started) / len(batches))
    return results


# ----------------------------------------------------------------------------------------- NIWF beside peft

# fmt: off
SHAPES = {  # name: (its configuration, or None: the embedded backbone; sequences of a step, tokens of each)
    "tiny": (None, 16, 0),
    "smollm2": (lambda: transformers.LlamaConfig(hidden_size=576, intermediate_size=1536,
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152), 4, 128),
    "mistral": (lambda: transformers.MistralConfig(num_hidden_layers=2), 1, 256)}
# fmt: on
RANK, BASES, TOP_K = 8, 16, 8
LENGTHS = (60, 40), (300, 10)  # tokens of prompt and of response in a step
warnings.filterwarnings("ignore", category=FutureWarning)  # peft's, of transformers


def make_backbone(shape):
    """-> (backbone, pad id, examples): the embedded backbone with its data, or random weights and tokens."""
    make, count, tokens = SHAPES[shape]
    if make is None:
        backbone, tokenizer = load_backbone("tiny", "cpu")
        records = read_records(DATA / "alpaca.val.json")[:count]
        return backbone, pad_of(tokenizer), [encode(r, tokenizer) for r in records]
    torch.manual_seed(0)
    config = make()
    rows = torch.randint(3, config.vocab_size, (count, tokens)).tolist()
    backbone = transformers.AutoModelForCausalLM.from_config(config)
    return backbone, 0, [(row[: tokens // 2], row[tokens // 2 :]) for row in rows]


def bare_of(backbone, passes):
    """The layers that stay bare by default. Of Mistral cut to two layers that is half of them."""
    return default_bare(len(layers_of(backbone))) if passes == "one" else 0


class Gated:
    """Ours: a bank, a field and dynamics, all with gradients, as a first task trains them."""

    def __init__(self, backbone, pad_id, examples, passes):
        self.model = NIWF(backbone, pad_id, RANK, bare=bare_of(backbone, passes))
        self.model.bank.add(BASES)
        for p in self.model.bank.live.values():
            p.data.normal_(std=0.01)
        self.d = default_coord_dim(self.model.bare)
        self.field = WeightField(self.model.bank.layers, BASES, self.d)
        self.dynamics = CoordinateDynamics(self.model.features, self.d)
        self.h_bar = self.model.probe([p for p, _ in examples])  # as in training, asked once
        self.dynamics.standardise(self.h_bar)

    def gating(self, h_bar):
        return top_k_gating(self.field(self.dynamics(h_bar)), TOP_K)

    def step(self, examples):
        response_nll(*self.model.logits(examples, self.gating(self.h_bar))).sum().backward()

    @torch.no_grad()
    def generate(self, prompts, count):
        """The gating is chosen on the way, for every new prompt."""
        self.model.generate(prompts, self.gating, -1, count)


class Routed(Gated):
    """Ours, with the bases of two versions: the region in which h_bar lies decides whose run."""

    def __init__(self, *backbone):
        super().__init__(*backbone)
        old = {key: p.data.clone() for key, p in self.model.bank.live.items()}
        self.model.bank.commit(BASES, lambda: old)
        self.regions = [Region.fit(torch.tanh(torch.randn(200, self.d) + i)) for i in range(2)]

    def gating(self, h_bar):
        z = self.dynamics(h_bar)
        (choice,) = route(z, self.regions).choice.tolist()
        indices, weights = top_k_gating(self.field(z), TOP_K)
        return indices + choice * BASES, weights


class Loops(Gated):
    """NIWF Eq. (2) in plain loops over sequences and bases."""

    def __init__(self, backbone, *more):
        super().__init__(backbone, *more)
        self.model.detach()
        attach(adapted_targets(backbone, find_targets(backbone), self.model.bare), self.update)

    def update(self, name, x, y):
        bank = self.model.bank
        if bank.gating is None:
            return y
        A, B = bank.live[f"{name}.A"], bank.live[f"{name}.B"]
        ((_, _, indices),), weights = bank.gating[bank.layer[name]]  # [B K] and (alpha / r) w [B, 1, K r]
        pairs = [zip(*row) for row in zip(indices.view(len(x), -1), weights[:, 0, :: bank.rank])]
        deltas = [sum(w * (x[b] @ A[i].T @ B[i]) for i, w in pairs[b]) for b in range(len(x))]
        return y + torch.stack(deltas)


class Peer:
    """The bare backbone, or peft's LoRA on all layers with as many parameters as run in ours, one for all
    sequences."""

    def __init__(self, backbone, pad_id, examples, passes, lora=False):
        self.backbone, self.pad_id = backbone.requires_grad_(False).eval(), pad_id
        backbone.enable_input_require_grads()  # so that the bare backbone has a backward pass, too
        if lora:
            import peft

            layers = len(layers_of(backbone))
            rank = round(RANK * TOP_K * (layers - bare_of(backbone, passes)) / layers)
            config = peft.LoraConfig(r=rank, target_modules=list(find_targets(backbone)))
            self.backbone = peft.get_peft_model(backbone, config).base_model.model

    def step(self, examples):
        response_nll(*response_logits(self.backbone, self.pad_id, examples)).sum().backward()

    def generate(self, prompts, count):
        for _ in decode(self.backbone, self.pad_id, prompts, -1, count):
            pass


SIDES = {"ours": Gated, "peft": functools.partial(Peer, lora=True), "loops": Loops, "bare": Peer}
ROUTED = {**SIDES, "ours": Routed}


def make_sides(shape, passes, without=("loops",), sides=SIDES):
    """-> ({name: side}, examples). Each has a backbone of its own, the same one."""
    backbone, pad_id, examples = make_backbone(shape)
    names = [name for name in sides if name not in without]
    made = {name: sides[name](copy.deepcopy(backbone), pad_id, examples, passes) for name in names}
    return made, examples


def in_own_process(function, *args):
    """Return function(*args), computed in a process of its own. Raises Refused if that is killed."""
    # Do not spawn: a process that this one starts itself begins with the peak memory of this one.
    context = multiprocessing.get_context("forkserver")
    with concurrent.futures.ProcessPoolExecutor(1, context, end_with_parent) as pool:
        try:
            return pool.submit(function, *args).result()
        except concurrent.futures.process.BrokenProcessPool:
            raise Refused("the process that measures was killed, perhaps for want of memory") from None


def memory_of(kind, shape, passes, form, arguments):
    """Peak memory of a process that has a side of this kind alone and runs its form once."""
    made = kind(*make_backbone(shape), passes)
    getattr(made, form)(*arguments)
    return peak_memory("cpu")


def compare_sides(what, shape, passes, sides, turns, form, *arguments):
    """Run a form ("step" or "generate") of every side, in turns; print medians, the median of ours over each,
    and peak memory. -> {side: {"seconds": one a turn, "peak memory": text}}"""
    times, kinds = {name: [] for name in sides}, ROUTED if isinstance(sides["ours"], Routed) else SIDES
    for _ in range(turns + 1):
        take_turn([getattr(side, form) for side in sides.values()], [arguments], times.values())
    print(what)
    rows = {}
    for name, spent in times.items():
        peak = in_own_process(memory_of, kinds[name], shape, passes, form, arguments)
        rows[name] = {"seconds": spent[1:], "peak memory": peak}
        ratio = statistics.median(o / t for o, t in zip(times["ours"][1:], spent[1:]))
        median = 1e3 * statistics.median(spent[1:])
        print(f"  {name:6}{median:10.1f} ms   ours / {name} {ratio:.2f}   peak {peak}", flush=True)
    return rows


def bench_niwf(shape, turns, passes):
    """Forward and backward of one step, beside peft's LoRA and, where that is small enough, plain loops."""
    sides, made = make_sides(shape, passes, without=[] if shape == "tiny" else ["loops"])
    steps = {f"{shape}, a step": made}
    for prompt, response in LENGTHS if shape != "tiny" else ():
        rows = [((p + r) * 3)[: prompt + response] for p, r in made]
        steps[f"{shape}, a step, {prompt} + {response} tokens"] = [(r[:prompt], r[prompt:]) for r in rows]
    for what, examples in steps.items():
        for side in sides.values():
            if isinstance(side, Gated):
                side.h_bar = side.model.probe([p for p, _ in examples])
        yield what, compare_sides(what, shape, passes, sides, turns, "step", examples)


def bench_decode(shape, turns, passes, count=32):
    """One prompt: the prefill with its coordinate, alone and with `count` tokens after it."""
    sides, examples = make_sides(shape, passes)
    prompts = [(p + r)[:128] for p, r in examples[:1]]
    for what, tokens in ((f"{shape}, prefill", 1), (f"{shape}, prefill and {count} tokens", count + 1)):
        yield what, compare_sides(what, shape, passes, sides, turns, "generate", prompts, tokens)


def bench_first(shape, turns, passes):
    """One prompt, until the first token of its answer: coordinate, routing and prefill."""
    sides, examples = make_sides(shape, passes, sides=ROUTED)
    text = [t for p, r in examples for t in p + r]
    for tokens in (32, 256, 2048):
        prompts, what = [(text * 64)[:tokens]], f"{shape}, first token after {tokens}"
        yield what, compare_sides(what, shape, passes, sides, turns, "generate", prompts, 1)


# ------------------------------------------------------------------------------------------- memory, measured


def train_second_task(backbone, layers, checkpointing, bare):
    """Two steps of a second task, of two micro-batches each: the last finds gradients and moments there."""
    with torch.device("meta"):
        backbone = from_shape(backbone, torch.bfloat16, layers)
    backbone.to_empty(device="cpu")
    for tensor in (*backbone.parameters(), *backbone.buffers()):
        tensor.data.fill_(0.01)  # memory that is never written takes none
    model = NIWF(backbone, pad_id=0, rank=RANK, bare=bare)
    bank, d = model.bank, default_coord_dim(bare)
    field = WeightField(bank.layers, 2 * BASES, d)
    old = {key: torch.randn(BASES, *shape) / 100 for key, shape in bank.basis_shapes().items()}
    bank.commit(BASES, lambda: old)
    bank.add(BASES)
    if checkpointing:
        model.checkpoint()
    dynamics = CoordinateDynamics(model.features, d).requires_grad_(False)
    optimizer = torch.optim.AdamW([*bank.live.values(), *field.parameters()], fused=True)
    for _ in range(2):
        for _ in range(2):
            gating = top_k_gating(field(dynamics(torch.randn(1, model.features))), TOP_K)
            response_nll(*model.logits([([3], [4] * TOKENS)], gating)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def measure_memory(backbone, layers, checkpointing, bare):
    """Bytes by which training makes the resident memory of this process larger, at its peak. A small training
    goes before: the code that is used is in memory, too."""
    train_second_task("tiny", bare + 1, checkpointing, bare)
    before = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    train_second_task(backbone, layers, checkpointing, bare)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def bench_memory(backbone, depths, bare):
    """Print the peak memory of a backbone cut to some layers, `bare` of them bare, measured and counted; and
    of all of it: where the line through what was measured leads, and counted. -> rows {"layers",
    "checkpointing", "measured", "counted": bytes}, the last of each kind of training for all layers"""
    if not pathlib.Path("/proc/self/statm").exists():
        raise Refused("bench.py memory reads /proc, which Linux has")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc: what is freed goes back at once, as is counted
    second = [row for depth in (*depths, None) for row in count_memory(backbone, depth, bare)]
    second = [row for row in second if row["task"] == 2 and row["devices"] == 1]
    rows = []
    for checkpointing in (False, True):
        print(f"{backbone}, {'with' if checkpointing else 'without'} --checkpointing, GiB")
        counts = [row for row in second if row["checkpointing"] == checkpointing]
        counted, measured = [sum(row[part] for part in PARTS) for row in counts], []
        for depth in depths:
            measured.append(in_own_process(measure_memory, backbone, depth, checkpointing, bare))
        fit = lambda sizes: statistics.linear_regression(depths, sizes[: len(depths)])
        line, other = fit(measured), fit(counted)
        measured.append(line.slope * counts[-1]["layers"] + line.intercept)
        for row, ours, count in zip(counts, measured, counted):
            about = {"backbone": backbone, "layers": row["layers"], "checkpointing": checkpointing}
            rows.append({**about, "measured": ours, "counted": count})
            figures = f"{ours / 2**30:7.2f}, counted {count / 2**30:7.2f}, ratio {count / ours:.3f}"
            how = "by the line" if row is counts[-1] else "measured"
            print(f"  {row['layers']:3} layers: {how} {figures}")
        print(f"  a layer: {line.slope / 2**30:.3f}, counted {other.slope / 2**30:.3f}", flush=True)
    return rows


# ------------------------------------------------------------------------------------------------- the grid


def bench_ftn(variant, turns, steps=5):
    """A step of FTN-Slow, mask search included, against Algorithm 1 with autograd through everything."""
    row = Row(variant, "ftn-slow", 0, dropout=0.0)
    torch.manual_seed(0)
    ours, literal = (Neurons(row, METHODS[row.method][1]) for _ in range(2))
    ours.begin(0), literal.begin(0)

    def our_step(x, y):
        ours.train(0, x, y)
        return ours.stored[0], ours.grid.theta.grad

    def literal_step(x, y):
        grid, how = literal.grid, literal.mask
        search = SmoothKWTA(row.k, how.kernel, how.rounds, *row.proposal)  # Algorithm 1, for any loss
        winners = search.configure(lambda mask: literal.loss(grid(x, mask), y), grid.side)
        literal.optimizer.zero_grad()
        mask = torch.zeros(len(grid.theta)).index_fill(0, winners, 1.0)
        literal.loss(grid(x, mask), y).backward()
        literal.optimizer.step()
        return winners, grid.theta.grad.clone()  # the next search adds to it

    rng, times, same, worst = generator("bench"), ([], []), 0, 0.0
    for _ in range(turns + 1):
        literal.grid.load_state_dict(ours.grid.state_dict())  # rounding must not add up
        batches = [ours.world.batch(0, row.batch, rng) for _ in range(steps)]
        for (winners, gradient), (winners_, gradient_) in zip(
            *take_turn((our_step, literal_step), batches, times)
        ):
            same += torch.equal(winners, winners_)
            worst = max(worst, ((gradient - gradient_).abs().max() / gradient_.abs().max()).item())
    spent, theirs = (1e3 * statistics.median(side[1:]) for side in times)
    print(f"{variant}: a step {spent:.1f} ms, literal {theirs:.1f} ms, ratio {theirs / spent:.1f}", end="; ")
    shares = f"same mask in {same} of {(turns + 1) * steps} batches"
    print(f"{shares}, gradients differ by {worst:.1e} of the largest")


# ---------------------------------------------------------------------------------- what n versions cost


@contextlib.contextmanager
def first_versions(whole, n):
    """Within this block there is a run folder as it was after its first n tasks."""
    with tempfile.TemporaryDirectory(dir=whole.folder.parent) as tmp:
        run = Run(pathlib.Path(tmp, "run"))
        keep = {"versions": whole.manifest["versions"][:n], "results": whole.manifest["results"][:n]}
        run.manifest = whole.manifest | keep | {"compositions": []}
        for path in [path for entry in run.entries for path in whole.files(entry)]:
            link = run.folder / path.relative_to(whole.folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, link)
        run.save()
        yield run


def memory_of_answers(folder, tasks):
    """Peak resident memory, in bytes, of a process that answers the prompts of some tasks of a run folder."""
    run, model, tokenizer = open_run(folder, "cpu")
    for task in tasks:
        answer(run, model, tokenizer, run.validation(task), max_new_tokens=16)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def bench_growth(folder, turns):
    """For every n a line, as a dict: what the first n versions of a stream cost and know. Milliseconds are
    for each token of a pass over the first task's validation examples, but for a commit and for opening the
    folder; memory is that of a process which answers the first three tasks' prompts."""
    whole = Run(folder)
    backbone, tokenizer = whole.open_backbone(whole.manifest["backbone"]["name"], "cpu")
    for n in range(1, len(whole.tasks) + 1):
        with first_versions(whole, n) as run:
            entry, row = run.manifest["versions"][-1], run.manifest["results"][-1]
            line = {"n": n, "task": entry["task"], "bytes": run.path(entry["hash"]).stat().st_size}
            opened = lambda run=run: Run(run.folder).open_model(backbone, tokenizer)
            line["open_ms"] = timed(lambda opened=opened: opened().detach(), 3)
            model = run.open_model(backbone, tokenizer)
            version = run.versions[-1]
            line |= {"bases_written": version.writes, "bases_read": len(version.index) - version.writes}
            with tempfile.TemporaryDirectory() as tmp:  # written again, as at commit: hash, fsync, rename
                line["commit_ms"] = timed(lambda v=version, tmp=tmp: v.save(pathlib.Path(tmp)), turns)
            line |= time_passes(run, model, tokenizer, turns)
            model.detach()
            line["memory"] = in_own_process(memory_of_answers, run.folder, run.tasks[:3])
        line["learned"] = row["stored"][entry["task"]]
        for p in ("stored", "routed"):
            lost = forgetting(run.manifest["results"], p).values()
            line[f"{p}_forgetting"] = statistics.mean(math.log1p(x / 100) for x in lost)
        line["identical"] = [sum(column) for column in zip(*row["identical"].values())]
        home = sum(counts[t] for t, counts in row["routing"].items())
        line["routed_home"] = home / sum(sum(counts.values()) for counts in row["routing"].values())
        print("  ".join(f"{k} {v:.4g}" if type(v) is float else f"{k} {v}" for k, v in line.items()))
        yield line


def timed(form, turns):
    """Median time of form(), in milliseconds."""
    times = []
    for _ in range(turns):
        take_turn([form], [()], [times])
    return 1000 * statistics.median(times)


@torch.no_grad()
def time_passes(run, model, tokenizer, turns):
    """Of the bare backbone, of one version that is given, and of a routed pass with its probe, in turns."""
    examples, h_bar, _ = validation_set(run, model, tokenizer, run.tasks[0])
    prompts, tokens = [p for p, _ in examples], sum(len(p) + len(r) for p, r in examples)
    passes = {
        "bare_ms": lambda: model.logits(examples, None),
        "stored_ms": lambda: model.logits(examples, run.stored(0, h_bar)),
        "routed_ms": lambda: model.logits(examples, run.routed(model.probe(prompts))[0]),
    }
    times = [[] for _ in passes]
    for _ in range(turns + 1):
        take_turn(passes.values(), [()], times)
    return {name: 1000 * statistics.median(spent[1:]) / tokens for name, spent in zip(passes, times)}


# ----------------------------------------------------------------------------------------- the command line


ABOUT = {
    "ftn": "a training step of FTN against the literal Algorithm 1",
    "niwf": "a training step of NIWF beside peft's LoRA",
    "decode": "prefill and decoding beside peft's LoRA",
    "first-token": "the time until a routed answer begins, beside the bare model and peft's LoRA",
    "memory": "peak memory of a training step, measured and counted",
    "growth": "what the first n versions of a stream cost and know, for every n",
}
SHAPED = {"niwf": bench_niwf, "decode": bench_decode, "first-token": bench_first}


def parse_options(argv=None):
    parser = Parser(__doc__, prog="bench.py")
    commands = parser.add_subparsers(dest="command", required=True, help="each has a --help of its own:")
    for name, text in ABOUT.items():
        add = commands.add_parser(name, help=text, doc=__doc__, description=text).add_argument
        if name == "memory":
            add("--backbone", default="random:mistral-7b", help="whose shape")
            add("--layers", nargs="+", type=number(int, 1, 100), default=[1, 2, 4], help="how many")
            add("--bare-layers", type=number(int, 0, 100), default=0, help="of them [0: two passes]")
        else:
            add("--repeats", type=number(int, 1, 1000), default=5, help="turns that are timed")
        if name != "ftn":
            add("--json", type=output_file, help="write what was measured to this file")
        if name == "growth":
            add("--run", default="runs/stream", help="run folder of a stream")
        elif name in SHAPED:
            add("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="of what [all]")
            add("--passes", choices=["one", "two"], default="one", help="see train.py [one]")
    args = parser.parse_args(argv)
    if args.command == "memory" and len({*args.layers}) < 2:
        parser.error("--layers: a line goes through two depths or more")
    return args


def measure(args):
    """Run the benchmark that is asked for. -> what it measured, or None where that is printed alone"""
    if args.command in SHAPED:
        refuse_without(f"bench.py {args.command}", "peft")
        bench = SHAPED[args.command]
        return dict(pair for shape in args.shape for pair in bench(shape, args.repeats, args.passes))
    if args.command == "memory":
        return bench_memory(args.backbone, args.layers, args.bare_layers)
    torch.set_num_threads(1)
    if args.command == "growth":
        return list(bench_growth(args.run, args.repeats))
    for variant in HEAD:
        bench_ftn(variant, args.repeats)


def main(argv=None):
    args = parse_options(argv)
    rows = measure(args)
    if rows:
        write_results(args.json, "-m studies.bench", argv, indent=1, rows=rows)


if __name__ == "__main__":
    run_program(main)
