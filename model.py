"""NIWF on a frozen language model: a prompt chooses the low-rank bases that run while it is answered.

Every projection `y = W x` of an adapted layer gets N bases (A_i, B_i). For each sequence and layer a gating
names K of them and their weights, and the projection becomes

    y = W x + (alpha / r) * sum_k w_k B_{i_k} A_{i_k} x                                           NIWF Eq. (2)

The model reads an input once. Its first m layers stay bare. The hidden states that enter the next layer give
h_bar: their mean over the prompt and, beside it, the last token's. From h_bar field.py finds the coordinate
and the gating; the layers from there on run with that gating, and give the logits. The file goes from the
idea to its speed:

    the whole           `niwf`: prompt -> h_bar -> z -> gating -> logits, on one sequence
    the bank            `AdapterBank`: all bases, gathered plainly
    the loss            `response_nll`, `perplexity`
    one pass, or two    `NIWF`: the same as `niwf` on a padded batch
    the same, faster    `FastBank`: bases that are read when they are first named, and gathered once a text

This file covers sections 3.1, 4.1, 4.4 and Appendices A and C of the NIWF paper, Eqs. (1)-(5), (14), (15).
Departures, and why:
* One pass. The paper runs the model twice (section 4.4), and lists that as a limitation (section 8): pass 1,
  the *probe*, gives h_bar, the mean of the last hidden states; pass 2 runs with the gating. `--passes two`
  does that, and adapts all layers.
* In one pass h_bar is the mean and, beside it, the last token; the paper takes the mean alone, as two passes
  do. The last token sends more prompts to their task (studies/results/cost.md).
* h_bar comes from *bare* layers (no adapters) and from the *prompt* only. The paper pools over the whole
  sequence, so pass 2 sees, through z, the tokens that it is to predict; and at generation time there is no
  response to pool. Training changes no bare layer, so h_bar can be cached for ever. Under the exact lock the
  dynamics are frozen, too, so addresses never move.
* Only response tokens count in loss and perplexity, the one that ends a response included.
* Adapters are forward hooks and leave `forward` alone: removing a hook restores the module exactly.

Nothing is run here: train.py trains what this file defines, and eval.py asks it.
"""

import collections
import contextlib
import dataclasses
import functools
import math

import torch
from torch import nn

from field import top_k_gating
from plumbing.passes import body_of, computed_once, continuations, decode, greedy
from plumbing.passes import mean_and_last, mean_over, on_entering, pad_left, run_padded, until, width_of
from plumbing.targets import adapted_targets, compute_again, device_of, find_targets, in_out, layer_numbers
from plumbing.targets import layers_of

FOLDED_PARAMETERS = 2**28  # `FastBank.fold` keeps at most 1 GiB


@torch.no_grad()
def niwf(backbone, bank, dynamics, field, top_k, layer, prompt, response):
    """NIWF, whole. prompt [1, T] and response [1, R], token ids, -> logits [1, R, V] that predict the
    response. `layer` is the first adapted layer; `bank` holds the bases of all adapted projections, which ask
    it for their update (`attach`)."""

    # fmt: off
    def choose(hidden):                               # the bare layers have read the input
        h = hidden[:, : prompt.shape[1]].float()      # what enters the first adapted layer [1, T, width]
        h_bar = torch.cat([h.mean(1), h[:, -1]], 1)   # its mean, and its last token [1, features]
        z = dynamics(h_bar)                           # NIWF Eq. (8): the coordinate [1, d]
        indices, weights = top_k_gating(field(z), top_k)  # Eqs. (6), (7): K bases a layer [1, L, K]
        bank.use((indices, weights))                  # from here on Eq. (2) in every projection

    try:
        with on_entering(layer, choose):              # one pass over prompt and response
            logits = backbone(torch.cat([prompt, response], 1)).logits
    finally:
        bank.use(None)
    return logits[:, prompt.shape[1] - 1 : -1]        # those that predict the response [1, R, V]
    # fmt: on


# ------------------------------------------------------------------------------------------ the bank of bases


def attach(targets, update):
    """Make every target return `update(full_name, x, y)` in place of its y. Return handles for `detach`."""
    hook = lambda name: lambda _, args, y: update(name, args[0], y)
    return [m.register_forward_hook(hook(name)) for name, m in targets.items()]


def detach(handles):
    """Undo `attach`. The backbone then computes what a fresh one computes, to the last bit."""
    for handle in handles:
        handle.remove()


@dataclasses.dataclass
class Block:
    """A block of `count` committed bases. read() returns their tensors, and is called when they are first
    needed. `tensors` is a copy of that dict: `FastBank` replaces in it what it moves to a device."""

    count: int
    read: collections.abc.Callable

    @functools.cached_property
    def tensors(self):
        return dict(self.read())


class AdapterBank:
    """N bases (A_i, B_i) for each target, NIWF Eq. (1). Some are committed (read-only), some live (trained).

    Tensors are keyed "{target}.A" with shape [n, r, d_in] and "{target}.B" with shape [n, r, d_out]. B is
    kept transposed, so that the K gathered blocks line up without a copy. Bases are numbered committed first,
    then live. Only live ones are Parameters: a committed basis has no gradient, no moments and no decay.
    """

    def __init__(self, targets, rank=8, alpha=16):
        self.rank, self.scale = rank, alpha / rank
        self.shapes = {name: in_out(m) for name, m in targets.items()}
        self.device = {name: device_of(m) for name, m in targets.items()}
        self.dtype = {name: m.weight.dtype for name, m in targets.items()}
        self.layer = layer_numbers(targets)  # {target: its row of the gating}
        self.layers = len(set(self.layer.values()))  # L, the rows of the gating
        self.committed, self.live = [], {}  # blocks of bases; those that are trained
        self.gating = None  # for each layer (places, weights [B, 1, K r]), see `use`; None: adapters off

    def sizes(self):
        """Return how many bases each block holds: the committed ones, then the live one."""
        live = [len(next(iter(self.live.values())))] if self.live else []
        return [block.count for block in self.committed] + live

    def __len__(self):
        """Return how many bases a module has, committed and live."""
        return sum(self.sizes())

    def basis_shapes(self):
        """Return {key: shape of one basis}."""
        return {f"{n}.{part}": (self.rank, d) for n, ds in self.shapes.items() for part, d in zip("AB", ds)}

    def add(self, n):
        """Add n live bases: A Kaiming-uniform as in LoRA (bound 1/sqrt(d_in)); B is 0, so Delta W is, too."""
        for name, (d_in, d_out) in self.shapes.items():
            A = (torch.rand(n, self.rank, d_in) * 2 - 1) / math.sqrt(d_in)
            for key, new in ((f"{name}.A", A), (f"{name}.B", torch.zeros(n, self.rank, d_out))):
                old = [self.live[key].data] if key in self.live else []
                self.live[key] = nn.Parameter(torch.cat([*old, new.to(self.device[name])]))

    def commit(self, count, read):
        """Append a block of `count` read-only bases. `read()` returns their tensors, keyed like live ones."""
        self.committed.append(Block(count, read))

    def unlock(self):
        """Make every committed basis live, as the soft lock and no lock do before a later task."""
        for key in self.basis_shapes():
            whole = torch.cat([block.tensors[key] for block in self.committed])
            self.live[key] = nn.Parameter(whole.to(self.device[key.rpartition(".")[0]]))
        self.committed = []

    def use(self, gating):
        """Run adapters with this gating from now on: (indices, weights), both [B, L, K]. None: adapters off.
        B may be 1 for a batch of sequences: an adapted probe has one gating for all."""
        self.gating = None
        if gating is not None:
            indices, weights = gating
            weights = self.scale * weights.repeat_interleave(self.rank, -1)[:, :, None]  # [B, L, 1, K r]
            self.gating = list(zip(self.locate(indices), weights.unbind(1)))

    def locate(self, indices):
        """Return for each of L layers where its bases lie: here, their numbers in the bank, [B, K]."""
        return indices.unbind(1)

    def gather(self, name, places):
        """Gather the bases of one module that `locate` found: A [B K, r, d_in] and B [B K, r, d_out]."""
        blocks = [block.tensors for block in self.committed] + [self.live] * bool(self.live)
        whole = lambda key: torch.cat([tensors[key].to(self.device[name]) for tensors in blocks])
        return [whole(f"{name}.{part}")[places.flatten().to(self.device[name])] for part in "AB"]

    def factors(self, name):
        """Gather A [B, K r, d_in] and B [B, K r, d_out] of a module. Return both, and (alpha / r) w."""
        places, weights = self.gating[self.layer[name]]
        A, B = self.gather(name, places)
        # The bank is float32. What is multiplied, and kept for the backward pass, has the backbone's type: at
        # 7B in bfloat16 that is 1.2 GB less.
        A, B = (t.view(len(weights), -1, t.shape[-1]).to(self.dtype[name]) for t in (A, B))
        return A, B, weights.to(self.device[name])

    def update(self, name, x, y):
        """The hook: x [B, T, d_in], y = W x [B, T, d_out] -> y plus the gated update, NIWF Eq. (2). Some
        modules get both flat, x [B T, d_in]."""
        if self.gating is None:
            return y
        # Section 3.1: one gating a sequence. What is gathered is [B, K r, d], never [B, T, K r, d].
        A, B, weights = self.factors(name)
        given = y.shape
        x, y = (t if t.dim() == 3 else t.reshape(len(A), -1, t.shape[-1]) for t in (x, y))
        # fmt: off
        h = x @ A.mT                          # NIWF Eq. (3): h_k = A_{i_k} x, side by side: [B, T, K r]
        if weights is not None:           # None: `fold` has put them into B
            h = (h * weights).to(x.dtype)     # NIWF Eq. (4): times (alpha / r) w_k
        B = B.expand(len(x), -1, -1)          # an adapted probe has one gating for all sequences
        y = y.baddbmm_(h, B)                  # NIWF Eq. (5): y + sum_k B_{i_k} h_k, without a copy
        # fmt: on
        return y.view(given)

    def parameter_count(self, bases):
        """NIWF Eq. (14): sum over modules of N r (d_in + d_out). Eq. (15), all layers of Mistral-7B, N 16:
        335,544,320. The paper has 323 M, because it takes o_proj for 1024 -> 4096."""
        return sum(bases * self.rank * (d_in + d_out) for d_in, d_out in self.shapes.values())


# --------------------------------------------------------------------------------------------------- the loss


def response_logits(backbone, pad_id, examples):
    """Return, of B pairs (prompt ids, response ids), logits [B, R, V] that predict labels [B, R], R the
    longest response. A label is -100 where a shorter response has not begun."""
    ids, mask = pad_left([p + r for p, r in examples], pad_id, backbone)
    longest, width = max(len(r) for _, r in examples), ids.shape[1]
    # Index with a tensor, not a slice: the copy is contiguous, so the head is one product in place of B.
    keep = torch.arange(width - 1 - longest, width - 1)
    out = run_padded(backbone, ids, mask, use_cache=False, logits_to_keep=keep).logits
    if out.shape[1] == width:  # a few backbones, Whisper's decoder among them, give them all
        out = out[:, keep.to(out.device)]
    is_response = torch.tensor([[i >= longest - len(r) for i in range(longest)] for _, r in examples])
    labels = ids[:, -longest:].masked_fill(~is_response.to(ids.device), -100)
    return out, labels.to(out.device)


def response_nll(logits, labels):
    """logits [B, R, V], labels [B, R] (-100: no response token) -> negative log-likelihood [B] in nats."""
    nll = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return nll.view(labels.shape).sum(1)


def perplexity(nll, tokens):
    """exp of the mean negative log-likelihood per response token; nll and tokens are sums over a set."""
    mean = nll / tokens
    return math.exp(mean) if mean < 690 else math.inf  # it would overflow, or is nan


# ------------------------------------------------------------------------------- one pass, or the paper's two


class NIWF:
    """A frozen backbone and its bank, run on padded batches. An example is (prompt ids, response ids, the
    end token included). bare: m, how many layers stay bare; with 0 all are adapted, and h_bar takes a pass of
    its own."""

    def __init__(self, backbone, pad_id, rank=8, alpha=16, targets=None, bare=0):
        self.backbone = backbone.requires_grad_(False).eval()
        self.pad_id, self.bare = pad_id, bare
        targets = adapted_targets(backbone, targets or find_targets(backbone), bare)
        self.first = layers_of(backbone)[bare] if bare else None  # the first layer that is adapted
        self.bank = FastBank(targets, rank, alpha)
        self.handles = attach(targets, self.bank.update)
        self.checkpointed = []
        self.device = device_of(backbone.get_input_embeddings())
        self.features = (2 if bare else 1) * width_of(backbone, bare)  # of h_bar: mean and last, or mean

    def detach(self):
        """Take the hooks off the backbone, and undo `checkpoint`."""
        detach(self.handles)
        for layer in self.checkpointed:
            layer.forward = layer.forward.args[0]
        self.checkpointed = []

    def checkpoint(self):
        """Checkpoint gradients from now on: the backward pass runs layers again. Raises Refused as
        `compute_again` does."""
        self.checkpointed = compute_again(self.backbone, self.bank.again)

    @contextlib.contextmanager
    def gated(self, gating):
        """Within this block adapters run with `gating`: (indices, weights), [B, L, K], or None for off."""
        self.bank.use(gating)
        try:
            yield
        finally:
            self.bank.use(None)

    @contextlib.contextmanager
    def gated_by(self, gating_of, prompts, probe_gating=None):
        """Within this block adapters run with the gating that `gating_of` makes of h_bar [B, features]. With
        bare layers it is chosen when the first pass, over B prompts, enters layer m. Without any, a probe
        goes before."""
        if not self.bare:
            with self.gated(gating_of(self.probe(prompts, probe_gating))):
                yield
            return
        lengths = [len(p) for p in prompts]
        choose = lambda hidden: self.bank.use(gating_of(mean_and_last(hidden, lengths).to(self.device)))
        with self.gated(None), on_entering(self.first, choose):
            yield

    @torch.no_grad()
    def probe(self, rows, gating=None):
        """Return h_bar [B, features], float32, of B token lists. With bare layers it is the mean and the last
        token of what enters layer m, and the pass stops there. Without any it is the mean of the last hidden
        states under this gating."""
        ids, mask = pad_left(rows, self.pad_id, self.backbone)
        run = functools.partial(run_padded, body_of(self.backbone), ids, mask, use_cache=False)
        lengths = [len(row) for row in rows]
        with self.gated(gating):
            if self.bare:
                return mean_and_last(until(self.first, run), lengths).to(self.device)
            return mean_over(run().last_hidden_state, lengths).to(self.device)

    def logits(self, examples, gating):
        """B examples -> logits [B, R, V] that predict labels [B, R], see `response_logits`. The gating was
        made of their h_bar, see `probe`."""
        with self.gated(gating):
            return response_logits(self.backbone, self.pad_id, examples)

    @torch.no_grad()
    def nll_under(self, examples, h_bar, gatings):
        """Return the negative log-likelihood of B responses under each of several gatings, [gatings, B], in
        nats. gatings: functions of h_bar [B, features]. The bare layers, which all share, run once."""
        with computed_once(layers_of(self.backbone)[: self.bare] if self.bare else []):
            return torch.stack([response_nll(*self.logits(examples, g(h_bar))) for g in gatings])

    def stream(self, prompts, gating_of, eos_id, max_new_tokens=128, choose=greedy, probe_gating=None):
        """Yield what `decode` yields. gating_of makes a gating of h_bar [B, features], and the gating stays.
        Close a stream that is not read to its end: until then the adapters run with its gating."""
        with self.gated_by(gating_of, prompts, probe_gating):
            steps = decode(self.backbone, self.pad_id, prompts, eos_id, max_new_tokens, choose)
            for i, step in enumerate(steps):
                if i == 1:  # Whoever asked waits for the first token, so this comes after it.
                    self.bank.fold()
                yield step

    def generate(self, prompts, *how, **more):
        """Return the continuations of B prompts, token lists without EOS. Arguments as of `stream`."""
        return continuations(len(prompts), self.stream(prompts, *how, **more))


# ------------------------------------------------------------------------------------------ the same, faster
#
# A run of many tasks holds many blocks of bases, and a prompt needs few. `FastBank` reads a block when a
# gating first names one of its bases, looks bases up block by block without joining all blocks first, and
# gathers once for a text, because its gating stays. `again` and `under` serve `NIWF.checkpoint`.


class FastBank(AdapterBank):
    """The bank above. It gives the same updates; once folded, up to rounding."""

    folded = None  # what `fold` has gathered, while a text is generated

    def use(self, gating):
        """Run adapters with this gating from now on."""
        self.folded = None
        super().use(gating)

    def locate(self, indices):
        """Return for each layer a list of (block, which, number), one for each block that is needed. A gating
        names B K bases for a layer: `which` [n] says which of them lie in the block (None: all), `number` [n]
        where in it."""
        sizes, layers = torch.tensor(self.sizes()), indices.transpose(0, 1).flatten(1)  # [L, B K]
        if len(sizes) == 1:
            return [[(0, None, layer)] for layer in layers]
        ends = sizes.cumsum(0)
        blocks = torch.bucketize(layers.cpu().contiguous(), ends, right=True)  # this waits for a GPU once
        numbers, places = layers - (ends - sizes)[blocks].to(layers.device), []
        for block, number in zip(blocks, numbers):
            found = [(b, (block == b).nonzero()[:, 0].to(number.device)) for b in block.unique().tolist()]
            places.append([(b, which, number[which]) for b, which in found])
        return places

    def gather(self, name, places):
        """Gather what `AdapterBank.gather` does."""
        device, found = self.device[name], []
        for key in (f"{name}.A", f"{name}.B"):
            parts = []
            for b, which, number in places:
                tensors = self.committed[b].tensors if b < len(self.committed) else self.live
                tensors[key] = bases = tensors[key].to(device)
                # Take an embedding lookup, whose backward is many times faster than that of indexing.
                parts.append((which, nn.functional.embedding(number.to(device), bases.flatten(1))))
            whole = parts[0][1]
            if len(parts) > 1:
                whole = whole.new_empty(sum(len(which) for which, _ in parts), whole.shape[1])
                for which, part in parts:  # live bases come last, so that one copy alone has a gradient
                    whole.index_copy_(0, which.to(device), part)
            found.append(whole.unflatten(1, (self.rank, -1)))
        return found

    def factors(self, name):
        """Return what `AdapterBank.factors` does, or what `fold` has made of it."""
        return self.folded[name] if self.folded else super().factors(name)

    @torch.no_grad()
    def fold(self):
        """Gather the factors of all modules once, for a gating that stays, with Eq. (4) folded into B. With
        many sequences or bases that would take too much memory, and nothing is done."""
        chosen = self.gating[0][1].numel() // self.rank if self.gating else 0  # B K
        if 0 < self.parameter_count(chosen) <= FOLDED_PARAMETERS:
            folded = {}
            for name in self.shapes:
                A, B, weights = self.factors(name)
                folded[name] = A, B.mul_(weights.mT), None
            self.folded = folded

    def again(self):
        """Return the contexts of a checkpointed layer's two runs. By the second, in the backward pass,
        another gating may be in use, so its context puts the first one back."""
        return contextlib.nullcontext(), self.under(self.gating)

    @contextlib.contextmanager
    def under(self, gating):
        """Within this block `self.gating`, as `use` stored it, is this one."""
        now, self.gating = self.gating, gating
        try:
            yield
        finally:
            self.gating = now
