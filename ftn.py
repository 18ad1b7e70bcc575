"""Functional Task Networks: a grid of neurons, and a searched mask that picks k of them for each task.

A *neuron* is a small private network with one output; H of them lie on a D x D torus and share nothing but a
linear readout. A binary mask m says which k neurons take part:

    z_k = MLP_k(x),    y_hat = W_out (Dropout(z) * m)                                     FTN section 2

Disjoint masks have disjoint gradients, so a task whose neurons no later mask touches is kept to the last
bit (Theorem 2.1), as long as nothing else moves them: no weight decay, no Adam moments from the task
before, no bias shared by all readouts (Appendix C). The mask is not given by a task's name. SmoothKWTA
(Algorithm 1) finds it from one labelled batch: gradient steps on relaxed mask logits, smoothing over the
torus, then the k largest win. The same search, cold-started, finds the mask again at test time.

The file goes from the idea to its speed:

    the model           `NeuronGrid`, as the paper writes it
    the mask search     `SmoothKWTA`, Algorithm 1 line by line; commit.py uses its `propose`, too
    the lock            `commit_mask`: what a task occupies becomes read-only (ours, not the paper's)
    the adapter pool    `LoRAPool`: the same mask over low-rank components of a frozen language model
    the same, faster    `FastGrid`: the grid's numbers by a kernel that keeps its activations in cache

This file covers section 2 and Algorithm 1 of the FTN paper, Eqs. (1) and (2), and Theorems 2.1 and D.1.
Departure: ties in the k-winner-take-all go to the lower index (the paper does not say). The experiments are
in synthetic.py. This file needs torch alone; here a grid of 64 neurons finds the mask of a batch:

    python -c "import torch, ftn; grid, x = ftn.NeuronGrid(8, 2, 1), torch.randn(32, 2); y = x[:, :1]; print(
    ftn.SmoothKWTA(k=8).configure(lambda m: (grid(x, m) - y).square().mean(), side=8))"
"""

import contextlib
import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import nn

ALL = ...  # the index of all neurons or components; its backward pass copies nothing, that of a slice does


# ------------------------------------------------------------------------------------------------- the model


class NeuronGrid(nn.Module):
    """FTN section 2: H = side^2 neurons of `layers` hidden layers of `width` ReLU units, a linear readout.

    theta [H, P] holds a neuron a row (see `unpack`): weights N(0, 1/fan_in), biases 0. readout [d_out, H] is
    U(-1/sqrt(H), 1/sqrt(H)), without bias; `bias=True` adds the one that breaks the guarantee (Appendix C).
    free [H] marks the neurons that no task has committed.
    """

    def __init__(self, side, d_in, d_out, layers=8, width=8, bias=False):
        super().__init__()
        self.side = side
        self.shapes = [(width, d_in), *[(width, width)] * (layers - 1), (1, width)]  # (out, in)
        theta = torch.empty(side * side, sum(o * i + o for o, i in self.shapes))
        for W, b in zip(*unpack(theta, self.shapes)):
            W.normal_(std=W.shape[2] ** -0.5)
            b.zero_()
        self.theta = nn.Parameter(theta)
        self.readout = nn.Parameter(torch.empty(d_out, side * side).uniform_(-1 / side, 1 / side))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self.register_buffer("free", torch.ones(side * side, dtype=torch.bool))

    def forward(self, x, mask, dropout=0.0):
        """x [batch, d_in] -> y_hat [batch, d_out]. Every neuron runs, and `mask` [H] multiplies."""
        # fmt: off
        h = x[:, None].expand(-1, len(self.theta), -1)                    # [batch, H, d_in]
        for l, (W, b) in enumerate(zip(*unpack(self.theta, self.shapes))):
            h = torch.einsum("bhi,hoi->bho", h, W) + b[..., 0]            # [batch, H, width], at last 1
            h = h if l == len(self.shapes) - 1 else F.relu(h)
        z = F.dropout(h[..., 0], dropout)                                 # z_k = MLP_k(x)  [batch, H]
        return F.linear(z * mask, self.readout, self.bias)                # y_hat = W_out (Dropout(z) * m)
        # fmt: on


def unpack(theta, shapes):
    """View rows [n, P] as the weights W [n, out, in] of every layer, and the biases b [n, out, 1]."""
    parts = theta.split([size for o, i in shapes for size in (o * i, o)], dim=1)
    weights = [W.unflatten(1, shape) for W, shape in zip(parts[::2], shapes)]
    return weights, [b.unsqueeze(2) for b in parts[1::2]]


# ------------------------------------------------------------------------------------------ the mask search


@dataclasses.dataclass(frozen=True)
class SmoothKWTA:
    """FTN Algorithm 1: `steps` (S) of Adam at `lr` (eta), `rounds` (T) of a `kernel` (s), then k winners.

    start is the first value of every logit in m: 0 in the paper, so that every neuron begins half on.
    """

    k: int
    kernel: int = 3
    rounds: int = 15
    steps: int = 1
    lr: float = 1.0
    start: float = 0.0

    def configure(self, loss, side, free=None):
        """Find the winners [k] of a side x side grid, ascending.

        loss maps a relaxed mask sigma(m) [H], in (0, 1), to a scalar: for the model above it is
        `lambda mask: loss(grid(x, mask), y)`. free [H], if given, marks the components that may win.
        Raises GridFull if fewer than k are free, and ValueError if the kernel does not fit.
        """
        # fmt: off
        m = torch.full((side * side,), self.start)                        # line 2: a cold start
        m = propose(loss, m, self.steps, self.lr)                         # lines 3-5: gradient proposal
        m = smooth(m.view(side, side), self.kernel, self.rounds)          # line 6: lateral smoothing
        return k_winners(m.flatten(), self.k, free)                       # line 7: KWTA
        # fmt: on


def propose(loss, m, steps, lr):
    """Improve relaxed logits m [n] by `steps` (S) of Adam at `lr` (eta): Algorithm 1, lines 3-5.

    loss maps sigma(m) [n], in (0, 1), to a scalar. The caller says what the n are: neurons of a grid,
    components of a pool, or, in commit.py, the versions of a run folder.
    """
    m = m.clone().requires_grad_()
    adam = torch.optim.Adam([m], lr=lr, fused=True)
    # Adam's first step is eta times a sign: with S = 1, as in classification, a gradient's size is lost.
    for _ in range(steps):
        (m.grad,) = torch.autograd.grad(loss(m.sigmoid()), m)  # the model's own parameters get none
        adam.step()
    return m.detach()


class GridFull(ValueError):
    """Too few components are left that no task has committed."""


def smooth(m, kernel, rounds):
    """Average m [D, D] on the torus `rounds` times, over kernel x kernel neighbours.

    The average is one over rows times one over columns, so all rounds together are one [D, D] matrix from
    each side. Raises ValueError if the kernel has no centre or is larger than the grid.
    """
    side = len(m)
    if kernel % 2 == 0 or kernel > side:
        raise ValueError(f"a kernel of {kernel} on a grid of {side}: it must be odd and at most {side}")
    offset = (torch.arange(side)[:, None] - torch.arange(side)) % side
    average = ((offset <= kernel // 2) | (offset >= side - kernel // 2)).to(m.dtype) / kernel
    average = torch.linalg.matrix_power(average, rounds)
    return average @ m @ average.T


def k_winners(m, k, free=None):
    """Find the k largest of the free entries of m [H]: indices, ascending. Ties go to the lower index.

    Raises GridFull if fewer than k are free.
    """
    left = len(m) if free is None else int(free.sum())
    if left < k:
        used = f"{len(m) - left} of its {len(m)} components are committed"
        raise GridFull(f"the grid is full: {used}, a task needs {k} and {left} are left")
    if free is not None:
        m = m.masked_fill(~free, float("-inf"))
    return m.argsort(descending=True, stable=True)[:k].sort().values


# ------------------------------------------------------------------------------------------------- the lock
#
# To commit is here what it is for NIWF: freeze what a capability occupies; everything else stays writable.
# The paper has no such lock: there the masks move with every batch, and a later task may write where an
# earlier one lives. A committed mask no longer moves, so at test time it can simply be recalled.


def commit_mask(components, winners):
    """Mark a mask's winners, in a grid or a pool, as taken. So they are frozen: no later mask may have them,
    only winners get a gradient, and Adam starts anew with each task."""
    components.free[winners] = False


@torch.no_grad()
def grow(grid, side):
    """Return a larger grid that holds `grid` in its corner, and the new index [H] of every old neuron."""
    (width, d_in), layers = grid.shapes[0], len(grid.shapes) - 1
    larger = type(grid)(side, d_in, len(grid.readout), layers, width, grid.bias is not None).to(grid.theta)
    index = torch.arange(side * side).view(side, side)[: grid.side, : grid.side].flatten()
    larger.theta[index], larger.readout[:, index], larger.free[index] = grid.theta, grid.readout, grid.free
    if grid.bias is not None:
        larger.bias.copy_(grid.bias)
    return larger, index


# ----------------------------------------------------------------------------------------- the adapter pool


class LoRAPool:
    """H components of rank r on every target of a frozen backbone, one mask for all. shapes: {target: (d_in,
    d_out)}.

        Delta W(m) = sum_k m_k B_k A_k,    y = (W + Delta W(m)) x                      FTN Eqs. (1), (2)

    A component thus spans the depth. parts[target] = A [H, r, d_in], U(-1/sqrt(d_in), 1/sqrt(d_in)), and
    B [H, r, d_out], transposed, zero or N(0, b_std^2). Delta W is formed once per pass from the chosen n
    components: d_in d_out (n r + T) products for T tokens. To run them on the tokens takes T n r (d_in +
    d_out), which is more where n r and T both exceed the widths. A search costs S passes of the backbone.
    """

    def __init__(self, shapes, components, rank=4, b_std=0.0):
        self.parts, self.delta = {}, None
        for name, (d_in, d_out) in shapes.items():
            A = torch.empty(components, rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5)
            B = torch.empty(components, rank, d_out).normal_(std=b_std)
            self.parts[name] = A, B
        self.free = torch.ones(components, dtype=torch.bool)  # not committed
        # B is 0: the component adds nothing, and its logit gets no gradient.
        self.silent = torch.full((components,), b_std == 0)

    def take(self, rows):
        """Copy the components `rows`, or ALL: {target: (A, B)}."""
        return {name: (A[rows].clone(), B[rows].clone()) for name, (A, B) in self.parts.items()}

    def store(self, rows, components):
        """Write components back where `take` found them."""
        self.silent[rows] = False
        for name, new in components.items():
            for old, part in zip(self.parts[name], new):
                old[rows] = part.detach()

    @contextlib.contextmanager
    def applied(self, components, weight=None):
        """Within this block the targets compute (W + Delta W) x, FTN Eq. (1).

        components {target: (A, B)} are those that `take` gave, weight [n] their entries of the mask; None if
        all are 1.
        """
        masked = lambda B: B if weight is None else B * weight.to(B)[:, None, None]
        stacked = lambda t: t.flatten(0, 1)  # [n r, d_in] or [n r, d_out]
        self.delta = {name: stacked(masked(B)).T @ stacked(A) for name, (A, B) in components.items()}
        try:
            yield
        finally:
            self.delta = None

    def update(self, name, x, y):
        """The hook for `attach`: x [batch, T, d_in], y = W x [batch, T, d_out]."""
        if self.delta is None:
            return y
        return y + F.linear(x.to(self.delta[name].dtype), self.delta[name]).to(y.dtype)

    def loss_of_mask(self, loss):
        """Return sigma(m) -> loss() under that relaxed mask, for `SmoothKWTA.configure`.

        Silent components are left out: their gradient is exactly zero. Where all are silent, nothing is run.
        """
        rows = (~self.silent).nonzero()[:, 0]
        if not len(rows):
            return lambda mask: 0 * mask.sum()
        components = self.take(rows)

        def of_mask(mask):
            with self.applied(components, mask[rows]):
                return loss()

        return of_mask


# ----------------------------------------------------------------------------------------- the same, faster
#
# Three facts make the grid fast, and all are tested against the literal model and algorithm above:
# * z does not depend on the mask. The search needs one forward of the grid, without gradients; its steps
#   then touch only z [H, batch] and the readout.
# * Under a binary mask only the winners can receive a gradient. A step runs k of H neurons, both ways.
# * All neurons read the same x, so one product computes their first layers.


class FastGrid(NeuronGrid):
    """The same grid, on a CPU alone. `forward_winners` and `run_neurons` run only the winners, or ALL."""

    def forward_winners(self, x, winners, dropout=0.0):
        """Compute `forward` with a binary mask, given as its winners; no other neuron runs. [batch, d_out]"""
        return self.run_neurons(self.theta[winners], self.readout[:, winners], x, dropout)

    def run_neurons(self, theta, readout, x, dropout=0.0):
        """Run the neurons theta [n, P] with their own readout [d_out, n]. -> [batch, d_out]"""
        return self.read(F.dropout(PrivateMLPs.apply(theta, x, self.shapes), dropout), readout)

    @torch.no_grad()
    def loss_of_mask(self, x, y, loss):
        """Return sigma(m) -> loss(forward(x, sigma(m)), y), for `configure`. The neurons run once: here."""
        z = PrivateMLPs.apply(self.theta, x, self.shapes)
        return lambda mask: loss(self.read(z, self.readout.detach() * mask), y)

    def read(self, z, readout):
        """Apply the readout [d_out, n] to z [n, batch]. -> [batch, d_out]"""
        y = (readout @ z).T
        return y if self.bias is None else y + self.bias


class PrivateMLPs(torch.autograd.Function):
    """z [n, batch] of n private MLPs. theta [n, P] holds one neuron per row, x is [batch, d_in].

    Plain autograd gives the same numbers; here x gets no gradient. This walks the neurons in chunks, all
    layers of a chunk before the next, in place, and runs a chunk again in the backward pass instead of
    keeping it: what is computed stays in cache.
    """

    # fmt: off
    @staticmethod
    def forward(ctx, theta, x, shapes):
        ctx.save_for_backward(theta, x)
        ctx.shapes, width, n = shapes, shapes[0][0], chunk_size(len(theta), shapes[0][0] * len(x))
        z = theta.new_empty(len(theta), 1, len(x))
        inputs = x.T.contiguous()                                         # [d_in, batch], of all neurons
        even, odd = workspace(n, width, len(x), 2, x.dtype)
        for W, b, (out,) in chunks(n, *unpack(theta, shapes), [z]):
            h = inputs
            for l in range(len(shapes) - 1):                              # [n, width, batch]
                h, even, odd = run_layer(W[l], b[l], h, even), odd, even
            torch.bmm(W[-1], h, out=out).add_(b[-1])
        return z[:, 0]

    @staticmethod
    def backward(ctx, grad_z):
        (theta, x), shapes = ctx.saved_tensors, ctx.shapes
        width, depth, n = shapes[0][0], len(shapes) - 1, chunk_size(len(theta), shapes[0][0] * len(x))
        weights, biases = unpack(theta, shapes)
        transposed = [W.mT for W in weights]
        grads = [[p.new_empty(p.shape) for p in part] for part in (weights, biases)]
        buffer, *h = workspace(n, width, len(x), depth + 1, x.dtype)
        h = [x.T.contiguous(), *h]                                        # the activations, layer by layer
        h_T, threshold = [a.mT for a in h], torch.ops.aten.threshold_backward.grad_input
        walk = chunks(n, weights, biases, transposed, *grads, [grad_z[:, None].contiguous()])
        for W, b, W_T, grad_W, grad_b, (g,) in walk:
            for l in range(depth):
                run_layer(W[l], b[l], h[l], h[l + 1])
            for l in range(depth, 0, -1):                                 # g [n, width or 1, batch]
                torch.bmm(g, h_T[l], out=grad_W[l])
                torch.sum(g, 2, keepdim=True, out=grad_b[l])
                # Through the ReLU: g passes where the activation is positive, and overwrites it.
                g = threshold(torch.bmm(W_T[l], g, out=buffer), h[l], 0, grad_input=h[l])
            torch.mm(g.flatten(0, 1), h_T[0], out=grad_W[0].flatten(0, 1))
            torch.sum(g, 2, keepdim=True, out=grad_b[0])
        return torch.cat([p.flatten(1) for layer in zip(*grads) for p in layer], 1), None, None
    # fmt: on


def run_layer(W, b, h, out):
    """Compute relu(W h + b) of n neurons into `out` [n, width, batch], and return it. W is [n, width, d], h
    [n, d, batch]; the first layer's h [d, batch] is the input, which all share, so one product is enough."""
    if h.dim() == 2:
        torch.mm(W.flatten(0, 1), h, out=out.flatten(0, 1))
    else:
        torch.bmm(W, h, out=out)
    return torch._add_relu_(out, b)


CACHE = 2**17  # floats in a core's cache: the activations of a chunk in one layer must fit


def chunk_size(n, activations):
    """Return the largest divisor of n neurons that fit CACHE with `activations` floats each in a layer."""
    return next(c for c in range(min(n, max(1, CACHE // activations)), 0, -1) if n % c == 0)


def chunks(n, *lists):
    """Walk lists of tensors n rows at a time."""
    return zip(*[zip(*(t.split(n) for t in tensors)) for tensors in lists])


@functools.cache
def workspace(n, width, batch, count, dtype):
    """Return `count` buffers [n, width, batch], the same at every call: fresh memory costs page faults."""
    return [torch.empty(n, width, batch, dtype=dtype) for _ in range(count)]
