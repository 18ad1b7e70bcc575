"""A bank of low-rank bases on a frozen backbone, gated per sequence.

Every target projection `y = W x` of a frozen language model gets N bases (A_i, B_i). For each sequence and
layer a gating names K of them and their weights, and the projection becomes

    y = W x + (alpha / r) * sum_k w_k B_{i_k} A_{i_k} x                                           NIWF Eq. (2)

The model runs twice for each input (section 4.4). Pass 1, the *probe*, gives h_bar, the mean of the last
hidden states, from which field.py finds the coordinate and the gating. Pass 2 runs with that gating and gives
the logits.

Held here: sections 3.1, 4.1, 4.4 and Appendices A and C of the NIWF paper, Eqs. (1)-(5), (14), (15).
Departures, and why:
* By default the probe is *bare* (no adapters) and reads the *prompt* only. The paper pools over the whole
  sequence, so pass 2 sees, through z, the tokens it is asked to predict; and at generation time there is no
  response to pool. A bare probe depends on nothing that is trained, so it can be cached for ever and
  addresses never move.
* Only response tokens count in loss and perplexity, the one that ends a response included.
* We patch with forward hooks, not by replacing `forward`: removing a hook restores the module exactly.

This file knows nothing of tasks, regions or run folders.
"""

import collections
import contextlib
import dataclasses
import functools
import math

from plumbing import Refused  # first: it sets what torch and the Hub's client read when imported

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from plumbing.passes import body_of, features_of, last_logits, pad_left, positions_of, run_padded
from plumbing.targets import device_of, find_layers, find_targets, in_out, layer_numbers

FOLDED_PARAMETERS = 2**28  # at most 1 GiB of gathered bases while a text is generated


# ------------------------------------------------------------------------------------------ the bank of bases


def attach(targets, update):
    """Make every target return `update(full_name, x, y)` in place of its own y. -> handles for `detach`"""
    hook = lambda name: lambda _, args, y: update(name, args[0], y)
    return [m.register_forward_hook(hook(name)) for name, m in targets.items()]


def detach(handles):
    """Undo `attach`. The backbone then computes what a fresh one computes, to the last bit."""
    for handle in handles:
        handle.remove()


@dataclasses.dataclass
class Block:
    """`count` committed bases. read() gives them, keyed as in AdapterBank, when they are first asked for."""

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
    Committed bases stay in blocks as they came, and a block is read when a gating first names one of it.
    """

    def __init__(self, targets, rank=8, alpha=16):
        self.rank, self.scale = rank, alpha / rank
        self.shapes = {name: in_out(m) for name, m in targets.items()}
        self.device = {name: device_of(m) for name, m in targets.items()}
        self.dtype = {name: m.weight.dtype for name, m in targets.items()}
        self.layer = layer_numbers(targets)
        self.layers = len(set(self.layer.values()))
        self.gating = None  # what `use` made of a gating; None: adapters off
        self.folded = None  # what `fold` made of that, while a text is generated
        self.committed, self.live = [], {}  # blocks of bases; those that are trained

    def sizes(self):
        """How many bases each block holds: the committed ones, then the live one."""
        live = [len(next(iter(self.live.values())))] if self.live else []
        return [block.count for block in self.committed] + live

    def __len__(self):
        """Bases a module holds, committed and live."""
        return sum(self.sizes())

    def basis_shapes(self):
        """{key: shape of one basis}."""
        pairs = [(f"{name}.{part}", d) for name, ds in self.shapes.items() for part, d in zip("AB", ds)]
        return {key: (self.rank, d) for key, d in pairs}

    def add(self, n):
        """n fresh live bases: A Kaiming-uniform as in LoRA (bound 1/sqrt(d_in)), B 0: Delta W starts at 0."""
        for name, (d_in, d_out) in self.shapes.items():
            A = (torch.rand(n, self.rank, d_in) * 2 - 1) / math.sqrt(d_in)
            for key, new in ((f"{name}.A", A), (f"{name}.B", torch.zeros(n, self.rank, d_out))):
                old = [self.live[key].data] if key in self.live else []
                self.live[key] = nn.Parameter(torch.cat([*old, new.to(self.device[name])]))

    def commit(self, count, read):
        """Append a block of read-only bases. read: see `Block`."""
        self.committed.append(Block(count, read))

    def unlock(self):
        """Make every committed basis live: what the soft lock and no lock do to the bank."""
        for key in self.basis_shapes():
            whole = torch.cat([block.tensors[key] for block in self.committed])
            self.live[key] = nn.Parameter(whole.to(self.device[key.rpartition(".")[0]]))
        self.committed = []

    def locate(self, indices):
        """Where bases `indices` [B, L, K] lie, for every layer a list of (block, which of the layer's B K are
        in it [n], their numbers in it [n])."""
        sizes, layers = torch.tensor(self.sizes()), indices.transpose(0, 1).flatten(1)  # [L, B K]
        if len(sizes) == 1:
            return [[(0, None, layer)] for layer in layers]
        ends = sizes.cumsum(0)
        blocks = torch.bucketize(layers.cpu().contiguous(), ends, right=True)  # a GPU is waited for once
        numbers, places = layers - (ends - sizes)[blocks].to(layers.device), []
        for block, number in zip(blocks, numbers):
            found = [(b, (block == b).nonzero()[:, 0].to(number.device)) for b in block.unique().tolist()]
            places.append([(b, which, number[which]) for b, which in found])
        return places

    def gather(self, name, places):
        """The bases of one module that `locate` found -> A [B K, r, d_in], B [B K, r, d_out]. Plainly:

            A = torch.cat([committed A, live A])[indices],    B = torch.cat([committed B, live B])[indices]

        What follows gives the same without copying the bank, and gradients reach live bases only."""
        device, found = self.device[name], []
        for key in (f"{name}.A", f"{name}.B"):
            parts = []
            for b, which, number in places:
                tensors = self.committed[b].tensors if b < len(self.committed) else self.live
                tensors[key] = bases = tensors[key].to(device)
                # An embedding lookup: its backward is many times faster than that of indexing.
                parts.append((which, nn.functional.embedding(number.to(device), bases.flatten(1))))
            whole = parts[0][1]
            if len(parts) > 1:
                whole = whole.new_empty(sum(len(which) for which, _ in parts), whole.shape[1])
                for which, part in parts:  # the live ones last: nothing before them has a gradient
                    whole.index_copy_(0, which.to(device), part)
            found.append(whole.unflatten(1, (self.rank, -1)))
        return found

    def use(self, gating):
        """Run adapters with this gating from now on: (indices, weights), both [B, L or 1, K]. None: off."""
        self.gating = self.folded = None
        if gating is not None:
            indices, weights = gating
            weights = self.scale * weights.repeat_interleave(self.rank, -1)[:, :, None]  # [B, L or 1, 1, K r]
            self.gating = list(zip(self.locate(indices), weights.unbind(1)))

    def again(self):
        """Contexts of a checkpointed layer: of its forward pass, and of the same once more, in the backward
        pass. By then the gating of the forward pass is no longer in use, and is taken back for it."""
        return contextlib.nullcontext(), self.under(self.gating)

    @contextlib.contextmanager
    def under(self, gating):
        """Within this block adapters run with what `use` once made of a gating."""
        now, self.gating = self.gating, gating
        try:
            yield
        finally:
            self.gating = now

    def factors(self, name):
        """One module's gathered A [B, K r, d_in] and B [B, K r, d_out], and (alpha / r) w [B, 1, K r]."""
        places, weights = self.gating[min(self.layer[name], len(self.gating) - 1)]
        A, B = self.gather(name, places)
        # The bank is float32; what is multiplied, and kept for the backward pass, has the backbone's type: at
        # 7B in bfloat16 that is 1.2 GB less.
        A, B = (t.view(len(weights), -1, t.shape[-1]).to(self.dtype[name]) for t in (A, B))
        return A, B, weights.to(self.device[name])

    def update(self, name, x, y):
        """The hook: x [B, T, d_in], y = W x [B, T, d_out] -> y plus the gated update, NIWF Eq. (2). Some
        modules see all tokens of a batch in one list, x [B T, d_in]."""
        if self.gating is None:
            return y
        # Section 3.1: one gating per sequence. What is gathered is [B, K r, d], never [B, T, K r, d].
        A, B, weights = self.folded[name] if self.folded else self.factors(name)
        given = y.shape
        x, y = (t if t.dim() == 3 else t.reshape(len(A), -1, t.shape[-1]) for t in (x, y))
        # fmt: off
        h = x @ A.mT                          # NIWF Eq. (3): h_k = A_{i_k} x, side by side: [B, T, K r]
        if weights is not None:
            h = (h * weights).to(x.dtype)     # NIWF Eq. (4): times (alpha / r) w_k
        B = B.expand(len(x), -1, -1)          # an adapted probe has one gating for all sequences
        y = torch.baddbmm(y, h, B)            # NIWF Eq. (5): y + sum_k B_{i_k} h_k
        # fmt: on
        return y.view(given)

    @torch.no_grad()
    def fold(self):
        """Gather the factors of all modules once, for a gating that stays, with Eq. (4) folded into B."""
        self.folded = {}
        for name in self.shapes:
            A, B, weights = self.factors(name)
            self.folded[name] = A, (weights.mT * B).to(B.dtype), None

    def parameter_count(self, bases):
        """NIWF Eq. (14): sum over modules of N r (d_in + d_out). Eq. (15): 335,544,320 for Mistral-7B."""
        return sum(bases * self.rank * (d_in + d_out) for d_in, d_out in self.shapes.values())


# --------------------------------------------------------------------------------------- prompts and the loss


def response_logits(backbone, pad_id, examples):
    """B pairs (prompt ids, response ids) -> logits [B, R, V] that predict labels [B, R], R the longest
    response; -100 is padding."""
    ids, mask = pad_left([p + r for p, r in examples], pad_id, backbone)
    longest, width = max(len(r) for _, r in examples), ids.shape[1]
    # Columns by number: unlike a slice they are copied out, and their logits are one product, not B.
    keep = torch.arange(width - 1 - longest, width - 1)
    out = run_padded(backbone, ids, mask, use_cache=False, logits_to_keep=keep).logits
    is_response = torch.tensor([[i >= longest - len(r) for i in range(longest)] for _, r in examples])
    labels = ids[:, -longest:].masked_fill(~is_response.to(ids.device), -100)
    return out, labels.to(out.device)


def greedy(logits):
    """The likeliest tokens [B] by logits [B, V]."""
    return logits.argmax(-1)


def sampler(temperature=0.0, top_p=1.0, seed=0):
    """A function that draws tokens [B] by logits [B, V], as transformers does: the logits over the
    temperature, cut to the likeliest tokens that together have the probability top_p (nucleus sampling,
    Holtzman et al. 2020). Below a temperature of 1e-4, where nothing else is drawn, it is `greedy`."""
    if temperature < 1e-4:
        return greedy
    warpers = [transformers.TemperatureLogitsWarper(float(temperature)), transformers.TopPLogitsWarper(top_p)]
    generator = torch.Generator().manual_seed(seed)

    def draw(logits):
        scores = logits.float().cpu()  # there, so that a seed means the same on every device
        for warp in warpers:
            scores = warp(None, scores)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]

    return draw


@torch.no_grad()
def decode(backbone, pad_id, prompts, eos_id, max_new_tokens, choose=greedy):
    """Continue B prompts (token lists); `choose` makes tokens [B] of logits [B, V]. After each pass, one over
    the prompts and then one a token, yields {row: token} of the rows that have not come to `eos_id`."""
    ids, mask = pad_left(prompts, pad_id, backbone)
    cache, open_rows, room = None, torch.ones(len(prompts), dtype=torch.bool), positions_of(backbone)
    if room:  # where positions have an end, so have answers
        max_new_tokens = min(max_new_tokens, room - ids.shape[1] + 1)
    for _ in range(max_new_tokens):
        logits, cache = last_logits(backbone, ids, mask, cache)
        new = choose(logits).to(mask.device)[:, None]  # [B, 1]
        ids, mask = torch.cat([ids, new], dim=1), torch.cat([mask, torch.ones_like(new)], dim=1)
        tokens = new[:, 0].cpu()
        open_rows &= tokens != eos_id
        if not open_rows.any():
            return
        yield {row: int(tokens[row]) for row in open_rows.nonzero()[:, 0].tolist()}


def response_nll(logits, labels):
    """logits [B, R, V], labels [B, R] (-100: no response token) -> negative log-likelihood [B] in nats."""
    nll = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return nll.view(labels.shape).sum(1)


def perplexity(nll, tokens):
    """exp of the mean negative log-likelihood per response token; nll and tokens are sums over a set."""
    mean = nll / tokens
    return math.exp(mean) if mean < 690 else math.inf  # beyond any float, or nan


# --------------------------------------------------------------------------------------------- the two passes


class NIWF:
    """A frozen backbone, its bank, the two passes. An example is (prompt ids, response ids with EOS)."""

    def __init__(self, backbone, pad_id, rank=8, alpha=16, targets=None):
        self.backbone = backbone.requires_grad_(False).eval()
        self.pad_id = pad_id
        targets = targets or find_targets(backbone)
        self.bank = AdapterBank(targets, rank, alpha)
        self.handles = attach(targets, self.bank.update)
        self.checkpointed = []
        self.device = device_of(backbone.get_input_embeddings())
        self.features = features_of(backbone)

    def detach(self):
        """Take the hooks off the backbone."""
        detach(self.handles)
        for layer in self.checkpointed:
            layer.forward = layer.forward.args[0]
        self.checkpointed = []

    def checkpoint(self):
        """From now on autograd keeps the input of a layer alone, and the backward pass computes the layer
        again (Chen et al. 2016): the same gradients, to the bit. Weights that are brought from memory or disk
        are let go after every layer, too. Refused: the backbone has no such layers.

        Not by the switch that transformers has: it works in training mode only, which brings dropout."""
        self.checkpointed = find_layers(self.backbone)
        if not self.checkpointed:
            raise Refused("--checkpointing: this backbone has no layers that can be computed again")
        how = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": self.bank.again}
        for layer in self.checkpointed:
            layer.forward = functools.partial(checkpoint, layer.forward, **how)

    @contextlib.contextmanager
    def gated(self, gating):
        """Within this block adapters run with `gating`: (indices, weights), [B, L or 1, K], None for off."""
        self.bank.use(gating)
        try:
            yield
        finally:
            self.bank.use(None)

    @torch.no_grad()
    def probe(self, rows, gating=None):
        """Pass 1. Token lists -> h_bar [B, features], float32: mean over tokens of the last hidden states."""
        ids, mask = pad_left(rows, self.pad_id, self.backbone)
        with self.gated(gating):
            hidden = run_padded(body_of(self.backbone), ids, mask, use_cache=False).last_hidden_state
        mask = mask[:, :, None].to(hidden.device)
        # where, not a product: whatever a padding position holds must not reach the mean.
        return (torch.where(mask > 0, hidden.float(), 0.0).sum(1) / mask.sum(1)).to(self.device)

    def logits(self, examples, gating):
        """Pass 2. B examples -> logits [B, R, V] that predict labels [B, R], see `response_logits`."""
        with self.gated(gating):
            return response_logits(self.backbone, self.pad_id, examples)

    def stream(self, prompts, gating, eos_id, max_new_tokens=128, choose=greedy):
        """`decode`, token after token. The gating stays meanwhile, so bases are gathered once, if memory
        allows. Close what is not walked to its end: until then the adapters run with it."""
        with self.gated(gating):
            if gating and self.bank.parameter_count(gating[0][:, 0].numel()) <= FOLDED_PARAMETERS:
                self.bank.fold()
            yield from decode(self.backbone, self.pad_id, prompts, eos_id, max_new_tokens, choose)

    def generate(self, prompts, gating, eos_id, max_new_tokens=128, choose=greedy):
        """Continuations of B prompts, all (token lists), EOS left out."""
        new = [[] for _ in prompts]
        for tokens in self.stream(prompts, gating, eos_id, max_new_tokens, choose):
            for row, token in tokens.items():
                new[row].append(token)
        return new
