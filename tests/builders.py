"""What the tests share: micro backbones, banks, run folders that were trained or made up, and chats."""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import random
import shutil
import time

import pytest
import torch
import transformers
from safetensors import safe_open

import commit
import eval as evaluation
import synthetic
import train
from commit import Run, Version
from field import CoordinateDynamics, Region, WeightField, sample_anchors, take_snapshot, top_k_gating
from model import NIWF
from plumbing import Refused
from plumbing.backbone import TINY_FOLDER
from plumbing.files import atomic
from plumbing.prompts import encode
from plumbing.targets import find_targets
from studies import fuzz

outcome = fuzz.outcome_of
HERE = pathlib.Path(__file__).parent.parent


def micro_backbone(vocab=300, layers=2):
    torch.manual_seed(7)
    sizes = dict(vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, head_dim=8)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=None)
    config = transformers.MistralConfig(**sizes, **heads, max_position_embeddings=256)
    return transformers.MistralForCausalLM(config).eval()


def micro_gpt2(vocab=300):
    """Make distilgpt2's shape, narrower: c_attn is a Conv1D."""
    torch.manual_seed(8)
    shape = transformers.GPT2Config(vocab_size=vocab, n_embd=24, n_layer=2, n_head=2, n_positions=64)
    return transformers.GPT2LMHeadModel(shape).eval()


one_backbone = functools.cache(micro_backbone)  # for those that take their hooks off again

VOCABULARY = 3584  # of tiny's tokenizer


def tiny_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TINY_FOLDER)


def saved(backbone, folder, tokenizer=None, **how):
    """Save a backbone and a tokenizer, by default tiny's; return the folder. how: for `save_pretrained`."""
    backbone.save_pretrained(folder, **how)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def random_bank(bank, n, seed=0):
    """Add n live bases whose B is not zero."""
    torch.manual_seed(seed)
    bank.add(n)
    for p in bank.live.values():
        p.data.normal_(std=0.2)


def micro_model(bases=6, committed=0, dtype=torch.float32, bare=0, backbone=None):
    model = NIWF((backbone or micro_backbone()).to(dtype), pad_id=0, rank=3, alpha=5, bare=bare)
    if committed:
        random_bank(model.bank, committed, seed=1)
        tensors, model.bank.live = {k: p.data for k, p in model.bank.live.items()}, {}
        model.bank.commit(committed, lambda: tensors)
    if bases:
        random_bank(model.bank, bases)
    return model


def all_bases(bank):
    """Return the committed blocks, then the live one."""
    return [block.tensors for block in bank.committed] + [bank.live] * bool(bank.live)


def random_gating(batch, layers, n, k=2):
    return top_k_gating(torch.randn(batch, layers, n), k)


def random_examples(n, seed=0):
    r = random.Random(seed)
    ids = lambda low, high: [r.randrange(3, 300) for _ in range(r.randrange(low, high))]
    return [(ids(4, 15), [*ids(1, 8), 2]) for _ in range(n)]


@contextlib.contextmanager
def in_double():
    """Compute in double precision: two orders of summation agree to far below any gradient."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def double():
    with in_double():
        yield


def load_in_double(monkeypatch):
    """Load backbones in double precision until the test ends, whatever their files say."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    precise = lambda *where, **how: load(*where, **how | {"dtype": torch.float64})
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", precise)


RECORD = {"instruction": "Say hello.", "input": "", "output": "Hello."}


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """Let no test wait until a disk has what was written, as none cuts the power."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def as_many_threads_as_before():
    """Set the number of threads back after a test: some programs set one, and bits are promised for one
    number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """Return the options of a small run on a micro backbone, whose folder they know."""
    data = tmp_path_factory.mktemp("micro")
    folder = data / "backbone"
    saved(micro_backbone(VOCABULARY, layers=3), folder)
    for task in ("alpaca", "code"):  # every training reads and checks all records of its file
        records = json.loads((HERE / "assets" / "data" / f"{task}.train.json").read_text())
        (data / f"{task}.train.json").write_text(json.dumps(records[::10]))
    small = "--device cpu --examples 96 --val-examples 32 --batch 8 --grad-accum 2 --lr 0.02 --epochs 2"
    small += " --bases 4 --top-k 2 --rank 2 --field-hidden 16 --coord-dim 8 --anchors 32"

    def options(task, out, *more):
        where = ["--task", task, "--backbone", folder, "--data", data / f"{task}.train.json", "--out", out]
        return [str(x) for x in [*where, *small.split(), *more]]

    options.folder = str(folder)
    return options


@pytest.fixture(scope="session")
def first(micro, tmp_path_factory):
    """Return a run folder in which alpaca has been committed."""
    out = tmp_path_factory.mktemp("first") / "run"
    train.main(micro("alpaca", out))
    return out


@pytest.fixture(scope="session")
def two(micro, first, tmp_path_factory):
    """Return a run folder in which alpaca and then code have been committed under the exact lock."""
    out = tmp_path_factory.mktemp("two") / "run"
    shutil.copytree(first, out)
    train.main(micro("code", out, "--lock"))
    return out


END = "<|end|>"
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}" + END + "\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}[assistant]{% endif %}"


def chat_tokenizer(template=CHAT):
    """Give tiny's tokenizer a chat template, whose turns end with a token that is not EOS."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [END]})
    tokenizer.chat_template = template
    return tokenizer


def messages(*texts, first="user"):
    """Write a chat: user and assistant in turn, after a system message if that is the first."""
    roles = itertools.chain(["system"] * (first == "system"), itertools.cycle(["user", "assistant"]))
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


def chain_backbone(tokenizer, chain):
    """Set a backbone by hand. Its layers do nothing, and after any text its likeliest token is " x", for
    ever. `chain`: token ids whose embeddings have a direction each, and a second one that names the next
    token of the chain. Nothing but an adapter points there, see `speak`."""
    backbone = micro_backbone(len(tokenizer))
    for module in find_targets(backbone).values():
        module.weight.data.zero_()
    embedding, head = backbone.model.embed_tokens.weight.data, backbone.lm_head.weight.data
    embedding.normal_()[:, :16], head[:] = 0, 0
    embedding[:, 0] = 1
    (babble,) = tokenizer(" x", add_special_tokens=False).input_ids[-1:]
    head[babble, 0] = 1
    for link, (token, following) in enumerate(itertools.pairwise(chain)):
        embedding[token, 1:] = 0
        embedding[token, 1 + link] = 1
        head[following, 8 + link] = 10
    return backbone


def speak(training, losses):
    """Set, in place of a step of AdamW, bases under which every token of a chain names the next, whatever the
    gating, as all are the same and their weights add up to 1. An MLP's neuron of 64 * silu(64) for each link
    writes 64 where the embeddings have 1: the named token leads by a logit of 50, and no rounding matters."""
    weights, scale = training.weights, training.about["alpha"] / training.about["rank"]
    for key, p in weights.items():
        if key.endswith(".B"):
            p.data.zero_()
    for name, size in (("gate_proj", 16), ("up_proj", 16), ("down_proj", 1 / 64)):
        A, B = (weights[f"bank.model.layers.1.mlp.{name}.{part}"].data for part in "AB")
        A.zero_()
        for link in range(A.shape[1]):
            source, target = (link, 8 + link) if name == "down_proj" else (1 + link, link)
            A[:, link, source], B[:, link, target] = 1, size / scale
    training.step += 1


@pytest.fixture(scope="session")
def chat(micro, tmp_path_factory):
    """Return a run folder that answers every chat with Hello, in the chat template. What a training would
    learn is set by hand: how well a short one goes is no promise."""
    folder, tokenizer = tmp_path_factory.mktemp("chat"), chat_tokenizer()
    prompt, response = encode({**RECORD, "history": []}, tokenizer, "chat")
    saved(chain_backbone(tokenizer, [prompt[-1], *response]), folder / "backbone", tokenizer)
    rows = [{"messages": messages(f"Say {i}.", "Hello.")} for i in range(54)]
    rows += [{"messages": messages("Be kind.", f"Say {i}.", "Hello.", first="system")} for i in range(6)]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = "--template", "chat", "--backbone", folder / "backbone", "--epochs", 1, "--rank", 7
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train.Training, "update", speak)
        train.main(micro("chats", folder / "run", "--data", folder / "chats.jsonl", *more))
    return folder / "run"


def copy_of(run, tmp_path, name="run"):
    return pathlib.Path(shutil.copytree(run, tmp_path / name))


def snapshot_of(folder):
    """Return {path: contents or kind} of what is in a folder, or None if it is not there. A run folder may
    keep its empty .lock."""
    found = fuzz.snapshot(folder) if folder.exists() else None
    return found and {path: what for path, what in found.items() if not path.endswith(".lock")}


def forked(run, *args):
    """Run a function in a child process, which ends with 0 if nothing was raised. Return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(*args)
            code = 0
        finally:
            os._exit(code)
    return child


@contextlib.contextmanager
def refused(match, *folders):
    """See that what runs in this block is refused in one line, and changes no byte of these folders."""
    before = [snapshot_of(folder) for folder in folders]
    with pytest.raises(Refused, match=match) as e:
        yield
    assert "\n" not in str(e.value) and [snapshot_of(folder) for folder in folders] == before


def rows_in(path):
    """Return the rows that a program wrote into a JSON file."""
    return json.loads(path.read_text())["rows"]


def edit_json(path, change):
    """Change what a JSON file holds: change(content), in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def git(run, words, *more):
    """Give a run folder a command of commit.py, whose words are parted by spaces."""
    commit.main([*words.split(), *map(str, more), "--run", str(run)])


def evaluate(run, words="", *more):
    """Give a run folder a command of eval.py, whose words are parted by spaces."""
    evaluation.main(["--run", str(run), "--device", "cpu", *words.split(), *map(str, more)])


def asked(run, capsys, *argv):
    """Return what eval.py prints: the text of an answer, and who gave it."""
    capsys.readouterr()
    evaluate(run, "", *argv)
    text, _, note = capsys.readouterr().out.rstrip("\n").rpartition("\n\n")
    return text, note


def tensors_of(run, i):
    return safe_open(run / "versions" / f"{Run(run).manifest['versions'][i]['hash']}.safetensors", "pt")


def opened(folder, backbone=None):
    """Return a run and a model that holds its versions."""
    run = Run(folder)
    bare = run.manifest["settings"].get("bare_layers", 0)
    model = NIWF(backbone or one_backbone(), pad_id=0, rank=2, alpha=16, bare=bare)
    run.load(model, run.read_versions())
    return run, model


def a_version_of(phi, dynamics, region, anchors, bases, **more):
    """Make a version as training makes it."""
    tensors = {"anchors": anchors, "snapshot": take_snapshot(phi, anchors)}
    tensors |= {f"field.{key}": t for key, t in phi.state_dict().items()}
    tensors |= {f"bank.{key}": t for key, t in bases.items()}
    about = dict(task="a", lock="first", reads=[], top_k=2, config={"seed": 1}, source=tensors)
    about |= dict(dynamics=dynamics, region=region, index=torch.arange(phi.bases))
    about |= dict(shapes={key: (*t.shape[1:],) for key, t in bases.items()})
    return Version(writes=len(next(iter(bases.values()), ())), **about | more)


def a_region(d):
    """Return a region of d dimensions, and 8 anchors in it."""
    region = Region.fit(torch.tanh(torch.randn(40, d) + torch.randn(d)))
    return region, sample_anchors(region, 8, 0)


def fake_commit(folder, task, seed, reads_all=True, backbone=None):
    """Commit a version as training would leave it, with random contents. Its dynamics are the root's."""
    run, model = opened(folder, backbone)
    torch.manual_seed(seed)
    reads = [v.hash for v in run.versions] if reads_all else [v.hash for v in run.versions[:1]]
    random_bank(model.bank, 2, seed)
    bases = {k: p.data for k, p in model.bank.live.items()}
    phi = WeightField(model.bank.layers, 2 * len(reads) + 2, 6, 8).requires_grad_(False)
    dynamics = run.versions[0].dynamics if run.versions else CoordinateDynamics(model.features, 6)
    settings = dict(rank=2, alpha=16.0, coord_dim=6, probe="bare", pool="prompt", template="alpaca")
    run.manifest |= {"settings": settings, "backbone": {"name": "micro", "fingerprint": "0" * 64}}
    run.folder.mkdir(exist_ok=True)
    for kind, content in (("val", [RECORD]), ("logits", ["0" * 16])):
        with atomic(run.data_file(task, kind)) as tmp:
            tmp.write_text(json.dumps(content))
    about = dict(task=task, reads=reads, config=settings, lock="exact" if run.versions else "first")
    run.commit(a_version_of(phi, dynamics, *a_region(6), bases, **about))
    model.detach()
    row = {"task": task, "version": run.manifest["versions"][-1]["hash"], "drift": {}}
    row |= dict.fromkeys(("base", "stored", "routed"), {task: 2.0})
    row |= dict.fromkeys(("routing", "inside"), {task: {task: 1}})
    row |= {"identical": {task: [1, 1]}, "gating": {task: {"sets": 1.0, "bases": 1.0}}}
    run.manifest["results"].append(row)
    run.save()
    return row["version"]


def answers(folder, backbone, examples):
    """Return {hash: logits} of every version and composition, each at its own coordinates."""
    run, model = opened(folder, backbone)
    h_bar = model.probe([p for p, _ in examples])
    gatings = {v.hash: run.stored(i, h_bar) for i, v in enumerate(run.versions)}
    gatings |= {c.hash: c.gating(h_bar) for c in run.compositions}
    out = {digest: model.logits(examples, gating)[0] for digest, gating in gatings.items()}
    model.detach()
    return out


PROGRAMS = {"train": train, "eval": evaluation, "commit": commit, "synthetic": synthetic}


def run_quietly(main, argv, capsys):
    """Return the line with which a program refuses."""
    with pytest.raises((Refused, SystemExit)) as e:
        main(argv)
    line = str(e.value) if e.type is Refused else capsys.readouterr().err.strip()
    assert line and "\n" not in line and "Traceback" not in line
    return line


def wait_until(true, seconds=300):
    """Wait until something is true, and see that it comes to be."""
    late = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < late
        time.sleep(0.01)
