"""Make the tiny embedded assets: two instruction sets and a small Mistral-architecture backbone.

    python -m studies.make_tiny               # everything: half an hour on 2 cores
    python -m studies.make_tiny --data-only   # the instruction sets alone: seconds

It writes to assets/, or to --out:

    data/alpaca.train.json, .val, .choose   4,000 + 400 + 200 general instructions, Alpaca's format and "kind"
    data/code.train.json, .val, .choose     as many about code
    tiny/                                   config, float16 weights, byte-level BPE tokenizer
    tiny/pretrain.log                       the pretraining loss every 100 steps

Settings are chosen on .choose, and figures are published on .val. All instructions and almost all of the
pretraining text are drawn from word tables and sentence patterns, which we wrote (assets/tiny-text.json). The
rest is the source of some modules of the Python standard library, read from the interpreter that runs this
script. The pretraining text is prose and code. It states the facts that the instructions ask about, and shows
the operations at work, but it holds no pair of an instruction and its response. Some documents report
requests without an answer ("Anna asked: ..."), and some put random prose under the three headings of a
prompt, so that the backbone knows words and markers of prompts.

What is held out: every table (countries, animals, names, file names ...) is cut once, by a hash of the word,
in two. Training examples draw from one part and validation examples from the other, so no country, name or
variable of a validation item occurs in training. Both share the wording of questions and closed words (verbs,
keywords). The backbone has read about all of them in its pretraining prose, as a large model would have.

The same seed, versions, machine and number of threads give the same files.
"""

import hashlib
import importlib.util
import json
import math
import random
import re
import time
import types
from pathlib import Path

from plumbing.command import Parser, number, run_program  # first: it sets what torch reads when imported

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers
from tqdm import tqdm
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parent.parent / "assets"
TEXT = json.loads((ASSETS / "tiny-text.json").read_text("utf-8"))


# ------------------------------------------------------------------------------------------------ word tables


class Table:
    """Rows of words, cut into .train and .val by a hash of the row's word without a plural s, so that a word
    which is in several tables is on the same side in all. `open` tables are mixed with made-up words in the
    pretraining text."""

    def __init__(self, rows, open):
        self.all = [(row,) if isinstance(row, str) else tuple(row) for row in rows]
        self.open = open
        self.cut()

    def add_plurals(self, words):
        """Add rows of a word with an s and the word, where that is its plural and is not there yet."""
        known = {r[0] for r in self.all}
        words = [w.lower() for w in words if not w.lower().endswith(("s", "x", "ch", "y", "f"))]
        self.all += [(w + "s", w) for w in words if w + "s" not in known]
        self.cut()

    def cut(self):
        """Divide the rows between validation and training."""
        stem = lambda row: row[0].split()[-1].lower().replace("ies", "y").rstrip("s")
        held = lambda row: hashlib.sha256(stem(row).encode()).digest()[0] % 4 == 0
        self.val, self.train = [r for r in self.all if held(r)], [r for r in self.all if not held(r)]


TABLES = {name: Table(rows, name in TEXT["open"]) for name, rows in TEXT["tables"].items()}
T = types.SimpleNamespace(**TABLES)
T.MANY.add_plurals([row[0] for table in (T.THING, T.CLASS, T.HOME) for row in table.all])

# ---------------------------------------------------------------------------------------------------- drawing
STARTS, ENDS = "b d f g k l m n p r s t v z br st tr pl".split(), "a e i o u an el in or us".split()
SYLLABLES = [start + end for start in STARTS for end in ENDS]
an = lambda w: ("an " if w[0] in "aeiouAEIOU" else "a ") + w
cap = lambda s: s[:1].upper() + s[1:]


class Draw:
    """Draws rows from one side of the tables: "train", "val", or "all" (pretraining). In the pretraining text
    the open tables are mixed with made-up words, and one document keeps to a few of their rows: both teach
    copying."""

    def __init__(self, side, rng, made_up=0.2):
        self.side, self.rng, self.made_up, self.pool = side, rng, made_up, None

    def __call__(self, table):
        if self.pool is None or not table.open:
            return self.fresh(table)
        seen = self.pool.setdefault(id(table), [])
        while len(seen) < 3:
            if (r := self.fresh(table)) not in seen:
                seen.append(r)
        return self.rng.choice(seen)

    def fresh(self, table):
        row = self.rng.choice(getattr(table, self.side))
        if self.side == "all" and table.open and self.rng.random() < self.made_up:
            w = self.word()
            row = (cap(w) if row[0][0].isupper() else w,) if len(row) == 1 else (w + "s", w)
        return row

    def word(self):
        return "".join(self.rng.choices(SYLLABLES, k=self.rng.choice((1, 2, 2, 3))))

    def some(self, table, k):
        out = []
        while len(out) < k:
            if (w := self(table)[0]) not in out:
                out.append(w)
        return out

    def pick(self, text):
        return self.rng.choice(text.split("|"))


def row(table, d):
    """Slots x y z w for the columns of a row; ax, ay with an article; Cx, Cy, Ax capitalised."""
    r = d(TABLES[table])
    x, y = r[0], r[min(1, len(r) - 1)]
    return dict(zip("xyzwuv", r)) | dict(ax=an(x), ay=an(y), Cx=cap(x), Cy=cap(y), Ax=cap(an(x)))


def people(d):
    """Slots every pattern may use: names n m, place p, things o q, state a, time t, a small number k."""
    (n, m), (o, q) = d.some(T.NAME, 2), d.some(T.THING, 2)
    p, a, t = (d(table)[0] for table in (T.PLACE, T.STATE, T.WHEN))
    return dict(n=n, m=m, o=o, q=q, p=p, a=a, t=t, k=str(d.rng.randint(2, 99)))


def sentence(d):
    """A sentence "$s is $r." with l the subject inside a sentence."""
    if d.rng.random() < 0.5:
        s = l = d(T.NAME)[0]
    else:
        l = "the " + d(T.THING)[0]
        s = cap(l)
    return dict(s=s, l=l, r=d(T.STATE)[0] if d.rng.random() < 0.5 else "in the " + d(T.PLACE)[0])


def act(d):
    v, g = d(T.ACT)
    return dict(v=v, g=g, V=cap(v))


def foods(d):
    return dict(zip("xyz", d.some(T.FOOD, 3)))


def kind_of(d):
    x, k = d(T.KIND)
    g = d.rng.choice("animal plant object".split())
    return dict(x=x, Ax=cap(an(x)), ax=an(x), y=k, ay=an(k), g=an(g), yes="Yes" if g == k else "No")


def odd(d):
    """Two words of one kind and one of another, in any order."""
    by = {}
    for w, g in getattr(T.KIND, d.side):
        by.setdefault(g, []).append(w)
    g, h = d.rng.sample([g for g in sorted(by) if len(by[g]) > 1], 2)
    w = d.rng.choice(by[h])
    l = d.rng.sample(by[g], 2) + [w]
    d.rng.shuffle(l)
    return dict(zip("xyz", l)) | dict(w=w, g=g)


def category(d):
    r = d(T.CATEGORY)
    x = d.rng.choice(r[2:])
    return dict(x=x, c=r[0], cs=r[1], e=r[2], f=r[3], h=r[4])


def code(d):
    """Identifiers: list xs of x, another ys, fields f h, function v_x, file l, class C, tag, color, k."""
    (xs, x), (ys, y) = d(T.MANY), d(T.MANY)
    while ys == xs:
        ys, y = d(T.MANY)
    f, h = d.some(T.FIELD, 2)
    fn = d.rng.choice((d(T.VERB)[0] + "_" + x, d(T.VERB)[0] + "_" + f, d(T.VERB)[0] + "_" + xs))
    tables = dict(l=T.FILE, C=T.CLASS, tag=T.TAG, col=T.COLOR, n=T.NAME)
    slots = dict(xs=xs, x=x, ys=ys, y=y, f=f, h=h, fn=fn) | {key: d(t)[0] for key, t in tables.items()}
    slots |= {key: str(d.rng.randint(2, 99)) for key in "kj"}
    return slots | {key: d(T.FOOD)[0] for key in "oq"}


fill = lambda pattern, s: re.sub(r"\$([A-Za-z]+)", lambda m: s[m[1]], pattern)

# -------------------------------------------------------------------------------------------------- the kinds


def pair(d):
    x, y = d(T.OPPOSITE)
    if d.rng.random() < 0.5:
        x, y = y, x
    return dict(x=x, y=y, Cx=cap(x), Cy=cap(y))


def scene(d):
    return people(d) | {"b": d.pick("met|saw|called|helped|thanked|found")}


def excerpt(d, examples):
    """Some code e and what is said of it, g. examples: "e~g", with "|" between them."""
    slots = code(d)
    return slots | dict(zip("eg", (fill(part, slots) for part in d.pick(examples).split("~"))))


def explained(d):
    """An expression e and what it gives, g."""
    return excerpt(d, TEXT["expressions"])


def snippet(d):
    """Some code e and its language g."""
    return excerpt(d, TEXT["snippets"])


def typed(d):
    """A value e and its Python type g."""
    return excerpt(d, TEXT["values"] + ("|True~bool|None~NoneType" if d.side == "all" else ""))


MAKERS = people, sentence, act, foods, kind_of, odd, category, code, pair, scene, explained, snippet, typed
SLOTS = {maker.__name__: maker for maker in MAKERS}


def slots_of(names, d):
    """Slots by the names of what makes them, commas between; "row TABLE" is a row of a table."""
    slots = {}
    for name in names.split(", "):
        slots |= row(name.removeprefix("row "), d) if name.startswith("row ") else SLOTS[name](d)
    return slots


GENERAL, CODE = TEXT["general"], TEXT["code"]  # "|" separates alternatives


def draw(kind, d, pattern):
    """Slots of one example of a kind, and one of the "|" alternatives of a pattern filled with them."""
    slots = people(d) | slots_of(kind["slots"], d)
    return slots, fill(d.pick(pattern), slots)


# --------------------------------------------------------------------------------------- the instruction sets
# These are in the prose but not asked: the prose has answers to the first, and the others are too hard.
PROSE_ONLY = ("yesno", "odd", "tool")


def reword(asks):
    """Ask more plainly than the prose does, so that code is seen to be code."""
    for pair in TEXT["reword"]:
        asks = asks.replace(*pair)
    return asks


def make_data(out, seed, train=4000, val=400, choose=200):
    """Write both sets, one record a line; every kind gets an equal share; no prompt occurs twice. "choose" is
    drawn like "val", after it: settings are chosen on the one, figures published on the other."""
    (out / "data").mkdir(parents=True, exist_ok=True)
    for name, kinds in (("alpaca", GENERAL), ("code", CODE)):
        kinds = [k for k in kinds if k["name"] not in PROSE_ONLY]
        prompts = set()
        for side, total in (("train", train), ("val", val), ("choose", choose)):
            rng = random.Random(f"{seed} {name} {side}")
            records = draw_records(kinds, total, Draw("train" if side == "train" else "val", rng), prompts)
            assert len(records) == total
            rng.shuffle(records)
            lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in records)
            path = out / "data" / f"{name}.{side}.json"
            path.write_text(f"[\n{lines}\n]\n")
            size = path.stat().st_size / 1e6
            print(f"{path.name}: {len(records)} records, {len(kinds)} kinds, {size:.2f} MB")


def draw_records(kinds, total, d, prompts):
    """Draw `total` records, a share of every kind. Add what they ask to `prompts`, and ask nothing twice."""
    records = []
    for i, kind in enumerate(kinds):
        tries, goal = 0, total * (i + 1) // len(kinds)
        while len(records) < goal and (tries := tries + 1) < 5000:  # what one kind lacks, the next makes up
            slots, ask = draw(kind, d, reword(kind["ask"]))
            inp, answer = fill(kind["input"], slots), fill(kind["output"], slots)
            if (ask, inp) not in prompts:
                prompts.add((ask, inp))
                records.append(dict(instruction=ask, input=inp, output=answer, kind=kind["name"]))
    return records


# --------------------------------------------------------------------------------------- the pretraining text


def stdlib(limit=1_200_000):
    """Chunks of whole lines, about 800 characters each, from standard library sources."""
    text, chunks = "", [""]
    for m in TEXT["modules"]:
        spec = importlib.util.find_spec(m)
        if spec and spec.origin and spec.origin.endswith(".py"):
            text += Path(spec.origin).read_text("utf-8")[:25_000] + "\n"
    for line in text[:limit].splitlines():
        if len(chunks[-1]) > 800:
            chunks.append("")
        chunks[-1] += line + "\n"
    return chunks


def echo(d):
    """A phrase that is quoted and comes again later: what copying is learned from."""
    tables = T.THING, T.FOOD, T.PLACE, T.MANY, T.FIELD, T.STATE
    word = lambda: d.word() if d.rng.random() < d.made_up * 2 else d(d.rng.choice(tables))[0]
    w = " ".join(word() for _ in range(d.rng.randint(1, 5)))
    return fill(d.pick(TEXT["echoes"]), people(d) | dict(w=w, Cw=cap(w)))


WORDS = {word for t in TABLES.values() for row in t.all for cell in row for word in cell.split()}
WORDS = sorted(WORDS | {cap(v) for v, _ in T.ACT.all})


def drill(d):
    """Random words, twice or three times the same."""
    w = [d.rng.choice(WORDS) if d.rng.random() > d.made_up else d.word() for _ in range(d.rng.randint(4, 24))]
    return d.pick("\n|. |\n\n").join([d.pick(" |, |\n| - ").join(w)] * d.rng.randint(2, 3))


def documents(rng, library, made_up=0.2):
    """Yield documents without end: prose, code, requests without answers, notes, drills, library code."""
    d = Draw("all", rng, made_up)
    fact = [k for k in GENERAL if k["input"] == ""]
    fact_or_all = lambda: rng.choice(fact if rng.random() < 0.7 else GENERAL)
    prose = lambda kind: draw(kind, d, kind["prose"])[1]
    say = lambda: echo(d) if rng.random() < 0.08 else prose(fact_or_all())
    code = lambda: prose(rng.choice(CODE))
    while True:
        d.pool = {} if rng.random() < 0.6 else None
        u, many = rng.random(), range(rng.randint(1, 8))
        if u < 0.54:
            yield d.pick(" | |\n").join(say() for _ in many)
        elif u < 0.84:
            yield d.pick("\n|\n\n").join(code() for _ in many)
        elif u < 0.90:  # requests without their answers, so that the words of requests are known words
            asked = '$n asked: $r|$m said: "$r"|- $r|A request: $r'
            ask = lambda: draw(kind := rng.choice(GENERAL + CODE), d, kind["ask"])[1]
            yield "\n".join(fill(d.pick(asked), people(d) | dict(r=ask())) for _ in many)
        elif u < 0.93:
            part = lambda: f"### {d.pick('Instruction|Input|Response')}:\n" + rng.choice((say, code))()
            yield "\n\n".join(part() for _ in range(rng.randint(1, 3)))
        elif u < 0.975:
            yield drill(d)
        else:
            yield rng.choice(library)


# ----------------------------------------------------------------------------------------------- the backbone
J, K, LETTERS = "\ue000", "\ue001", "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
join_marks = lambda text: re.sub(r"(?<!([^\W\d_]| ))(?=[A-Za-z])", J + " ", text)


def make_tokenizer(docs):
    """Byte-level BPE with 3,584 pieces in which a word has the same piece after a space and elsewhere. A word
    without a space before it, as in "len(prices)", is written as a joining mark J and the spaced word; the
    decoder takes "J " out again (a J of the text itself is doubled up with K, so any text round-trips). J
    sticks to what precedes it: "(J" or a line start is one piece. So copying a word from a sentence into code
    is copying a piece, which a model this small can learn. The three prompt markers are one piece each,
    digits are single."""
    tok = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(TEXT["pieces"].replace("J", J)), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    joined = [decoders.Replace(J + " ", ""), decoders.Replace(J + K, J)]
    tok.decoder = decoders.Sequence([decoders.ByteLevel(), *joined])
    special = [AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>", "<pad>")]
    how = dict(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    trainer = trainers.BpeTrainer(vocab_size=3584, special_tokens=special, **how)
    prompt = "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n{}"
    markers = [prompt.format("x", 5, ""), prompt.format(5, "x", "x")] * 20000
    tok.train_from_iterator([join_marks(t) for t in docs + markers] + [" " + w for w in WORDS] * 400, trainer)
    # An empty match cannot be replaced there, so each letter has a rule; `join_marks` is the same at once.
    letters = [normalizers.Replace(Regex(rf"(?<![ \p{{L}}]){c}"), f"{J} {c}") for c in LETTERS]
    tok.normalizer = normalizers.Sequence([normalizers.Replace(J, J + K), *letters])
    how = dict(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    tok.post_processor = processors.TemplateProcessing(**how)
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    how = dict(model_max_length=512, clean_up_tokenization_spaces=False)
    return PreTrainedTokenizerFast(tokenizer_object=tok, **names, **how)


def start_copying(model, seed):
    """Start values that let the attention copy from the first step on, instead of after a long search for how
    to.

    Dimension 0 of all embeddings is a constant. Layer 0, head 0: attends to the previous token, by RoPE alone
    (queries turned back by one position), and writes a projection P of it to a separate subspace S. Layer 1,
    head 0: attends to tokens whose S agrees with P of the present token, in the slow RoPE dimensions: what
    followed when this token came before. All values and outputs are transposes of each other: what is
    attended to is copied. The final norm starts at 4, so that logits can be large early. Everything is
    trained further."""
    g, d, hd, slow = torch.Generator().manual_seed(seed), 192, 32, [*range(8, 16), *range(24, 32)]
    drawn = lambda n: torch.linalg.qr(torch.randn(d - 1, n, generator=g))[0].T
    basis = lambda n: torch.nn.functional.pad(drawn(n), (1, 0))
    turn, P, S = 10000 ** (-torch.arange(8) / 16.0), basis(16), basis(16)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.1
        model.model.norm.weight.fill_(4.0)
        for i, layer in enumerate(model.model.layers):
            q, k, v, o = (getattr(layer.self_attn, n + "_proj").weight for n in "qkvo")
            v.copy_(basis(64))
            o.copy_(v.view(2, 1, hd, d).expand(2, 3, hd, d).reshape(d, d).T * 0.03)
            if i < 2:
                q[:hd], k[:hd] = 0, 0
            if i == 0:
                k[:8, 0], q[:8, 0], q[16:24, 0] = 1.2, 1.2 * torch.cos(turn), -1.2 * torch.sin(turn)
                v[:16], o[:, :hd] = P, 0
                o[:, :16] = S.T * 0.06
            if i == 1:
                q[slow], k[slow] = P * 1.7, S * 1.7
                o[:, :hd] *= 8


def new_model(tok, seed):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=len(tok), hidden_size=192, num_hidden_layers=4, intermediate_size=288)
    sizes |= dict(num_attention_heads=6, num_key_value_heads=2, head_dim=32, max_position_embeddings=512)
    how = dict(tie_word_embeddings=True, sliding_window=None, rope_theta=10000.0)
    how |= {key: getattr(tok, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = MistralForCausalLM(MistralConfig(**sizes, **how))
    # Start " Word" near " word", so that copying into the other case is easy to learn.
    names = tok.convert_ids_to_tokens(range(len(tok)))
    embeddings = model.model.embed_tokens.weight.detach()
    for i, n in enumerate(names):
        low = "Ġ" + n[1:].lower()
        if n[0] == "Ġ" and n != low and low in names:
            embeddings[i].mul_(0.6).add_(embeddings[names.index(low)], alpha=0.8)
    start_copying(model, seed)
    return model


def blocks(stream, tok, seed, batch, length, drills):
    """Token ids [batch, length], without end. Copying first: in `drills` of them, random pieces come twice.
    Then fresh documents all the time: nothing is read twice but the library."""
    plain = Tokenizer.from_str(tok.backend_tokenizer.to_str())
    plain.normalizer, plain.post_processor = None, tok.backend_tokenizer.post_processor
    rng, pool = np.random.default_rng(seed), np.zeros(0, np.int64)
    for _ in range(drills):
        n = int(rng.choice((4, 8, 16, 32)))
        pieces = rng.integers(3, len(tok), (batch, length // n // 2, 1, n))
        yield torch.from_numpy(pieces.repeat(2, axis=2).reshape(batch, length))
    while True:
        if len(pool) < batch * length:
            texts = [next(stream) for _ in range(20_000)]
            ids = plain.encode_batch([join_marks(t) for t in texts])
            flat = np.concatenate([np.array(e.ids + [tok.eos_token_id]) for e in ids])
            flat = flat[: len(flat) // length * length].reshape(-1, length)
            pool = flat[rng.permutation(len(flat))].reshape(-1)
        yield torch.from_numpy(pool[: batch * length].reshape(batch, length))
        pool = pool[batch * length :]


def make_backbone(out, seed, steps, batch=8, length=256, peak=2.5e-3, drills=120):
    """Train the backbone and write it. peak: of the learning rate. drills: steps on random tokens, first."""
    out, began = out / "tiny", time.time()
    out.mkdir(parents=True, exist_ok=True)
    rng, library = random.Random(f"{seed} text"), stdlib()
    stream = documents(rng, library)
    tok = make_tokenizer([t for t, _ in zip(documents(random.Random(seed), library, 0), range(25_000))])
    model = new_model(tok, seed)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {steps} steps of {batch} x {length} tokens")
    decay = dict(params=[p for p in model.parameters() if p.dim() > 1], weight_decay=0.1)
    rest = dict(params=[p for p in model.parameters() if p.dim() == 1], weight_decay=0.0)
    opt = torch.optim.AdamW([decay, rest], lr=peak, betas=(0.9, 0.95), fused=True)
    log, losses = ["step loss"], []
    bar = tqdm(range(steps), mininterval=10, disable=None)  # not where there is no terminal
    for step, x in zip(bar, blocks(stream, tok, seed, batch, length, drills)):
        for g in opt.param_groups:
            cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
            g["lr"] = peak * min(1, (step + 1) / 150) * cosine
        logits = model(x).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            log.append(f"{step + 1} {np.mean(losses[-100:]):.4f}")
            bar.set_postfix(loss=log[-1].split()[1])
            (out / "pretrain.log").write_text("\n".join(log) + "\n")
    model.half().save_pretrained(out)
    tok.save_pretrained(out)
    for text in TEXT["round trips"]:
        ids = tok(text, add_special_tokens=False).input_ids
        assert tok.decode(ids, clean_up_tokenization_spaces=False) == text
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()[:16]
    print(f"backbone in {(time.time() - began) / 60:.1f} min, sha256 {digest}")


def main(argv=None):
    p = Parser(__doc__, prog="make_tiny.py")
    p.add_argument("--out", type=Path, default=ASSETS, help="folder to write to [assets]")
    p.add_argument("--data-only", action="store_true", help="only the instruction sets")
    p.add_argument("--steps", type=number(int, 1), default=2700, help="pretraining steps of 2,048 tokens")
    p.add_argument("--threads", type=number(int, 1), default=2, help="of torch")
    p.add_argument("--seed", type=number(int, 0), default=1, help="of data, text and weights")
    args = p.parse_args(argv)
    make_data(args.out, args.seed)
    if not args.data_only:
        torch.set_num_threads(args.threads)
        make_backbone(args.out, args.seed, args.steps)


if __name__ == "__main__":
    run_program(main)
