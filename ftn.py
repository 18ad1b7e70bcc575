"""Functional Task Networks: a grid of neurons, a mask that picks k of them for each task, and how the mask is found.

A *neuron* is a small private network with one output; H of them lie on a D x D torus and share nothing but a linear
readout. A binary mask m says which k neurons take part:

    z_k = MLP_k(x),    y_hat = W_out (Dropout(z) * m)                                              section 2

Disjoint masks have disjoint gradients, so a task whose neurons no later mask touches is kept to the last bit (Theorem
2.1), as long as nothing else moves them: no weight decay, no Adam moments from the task before, no bias shared by all
readouts (Appendix C). The mask is not given by a task's name. SmoothKWTA (Algorithm 1) finds it from one labelled batch:
gradient steps on relaxed mask logits, smoothing over the torus, then the k largest win. The same search, from the same
cold start, allocates neurons in training and finds them again at test time.

Two facts make it fast, and both are tested against the literal algorithm:
* z does not depend on the mask. The search needs one forward of the grid, without gradients; its steps then touch only
  z [H, batch] and the readout. `configure` takes the loss as a function of the relaxed mask, so one Algorithm 1 serves
  the literal model (`NeuronGrid.forward`), the fast one (`NeuronGrid.loss_of_mask`) and any other pool of components.
* Under a binary mask only the winners can receive a gradient. A step runs, forward and backward, k of H neurons.

Commit is the sentence of the README again: freeze what a capability occupies, everything else stays writable. `commit`
takes a finished task's winners off the list that later masks choose from; at test time the committed mask with the lowest
loss is the one that is meant. The paper has no such lock: there the masks move with every batch, and a later task may write
where an earlier one lives.

LoRA-FTN (end of section 2, Appendix D) is the same mask over a pool of low-rank components of a frozen language model,
`LoRAPool`. There the search costs S passes of the backbone with the gradient of H scalars; no adapter gets one.

Departure: ties in the k-winner-take-all go to the lower index (the paper does not say). This file does not know which
experiment is run.
"""
import contextlib
import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import nn

from model import Refused, in_out

ALL = ...  # every row; the gradient of this index, unlike that of a slice, is not copied
CACHE = 2 ** 17  # floats: the activations of one layer of the neurons walked together fit in a core's cache


# ------------------------------------------------------------------------------------------------------ the neurons

class PrivateMLPs(torch.autograd.Function):
    """z [n, batch] of n private MLPs. theta [n, P] holds one neuron per row, x is [batch, d_in].

    Plain autograd gives the same numbers. This walks the neurons in chunks, all layers of a chunk before the next, in
    place, and runs a chunk again in the backward pass instead of keeping it: what is computed stays in cache.
    """

    @staticmethod
    def forward(ctx, theta, x, shapes):
        ctx.save_for_backward(theta, x)
        ctx.shapes, n = shapes, chunk_size(len(theta), shapes[0][0] * len(x))
        z = theta.new_empty(len(theta), 1, len(x))
        inputs, (even, odd) = x.T.expand(n, -1, -1).contiguous(), workspace(n, shapes[0][0], len(x), 2, x.dtype)
        for W, b, (out,) in chunks(n, *unpack(theta, shapes), [z]):
            h = inputs                                                           # [n, d_in, batch]
            for l in range(len(shapes) - 1):
                h, even, odd = torch._add_relu_(torch.bmm(W[l], h, out=even), b[l]), odd, even  # [n, width, batch]
            torch.bmm(W[-1], h, out=out).add_(b[-1])
        return z[:, 0]

    @staticmethod
    def backward(ctx, grad_z):
        (theta, x), shapes = ctx.saved_tensors, ctx.shapes
        n, depth = chunk_size(len(theta), shapes[0][0] * len(x)), len(shapes) - 1
        weights, biases = unpack(theta, shapes)
        grads = [[p.new_empty(p.shape) for p in part] for part in (weights, biases)]
        buffer, *h = workspace(n, shapes[0][0], len(x), depth + 1, x.dtype)
        h = [x.T.expand(n, -1, -1).contiguous(), *h]
        h_T, threshold = [a.mT for a in h], torch.ops.aten.threshold_backward.grad_input
        for W, b, W_T, grad_W, grad_b, (g,) in chunks(n, weights, biases, [W.mT for W in weights], *grads, [grad_z[:, None].contiguous()]):
            for l in range(depth):
                torch._add_relu_(torch.bmm(W[l], h[l], out=h[l + 1]), b[l])
            for l in range(depth, -1, -1):                                       # g is [n, width, batch], at first [n, 1, batch]
                torch.bmm(g, h_T[l], out=grad_W[l])
                torch.sum(g, 2, keepdim=True, out=grad_b[l])
                if l:  # through the ReLU: the gradient passes where the activation is positive, and takes its place
                    g = threshold(torch.bmm(W_T[l], g, out=buffer), h[l], 0, grad_input=h[l])
        return torch.cat([p.flatten(1) for layer in zip(*grads) for p in layer], 1), None, None


def chunk_size(n, activations):
    """How many of n neurons to walk together, given one's activations in a layer: a divisor of n, as large as fits."""
    return next(c for c in range(min(n, max(1, CACHE // activations)), 0, -1) if n % c == 0)


def chunks(n, *lists):
    """Walk lists of tensors n rows at a time."""
    return zip(*[zip(*(t.split(n) for t in tensors)) for tensors in lists])


@functools.cache
def workspace(n, width, batch, count, dtype):
    """`count` buffers [n, width, batch], the same at every call: fresh memory would have to be fetched page by page."""
    return [torch.empty(n, width, batch, dtype=dtype) for _ in range(count)]


def unpack(theta, shapes):
    """Rows [n, P] as views: the layers' weights, W [n, out, in] each, and their biases, b [n, out, 1] each."""
    parts = theta.split([size for o, i in shapes for size in (o * i, o)], dim=1)
    return [W.unflatten(1, shape) for W, shape in zip(parts[::2], shapes)], [b.unsqueeze(2) for b in parts[1::2]]


class NeuronGrid(nn.Module):
    """H = side^2 neurons of `layers` hidden layers of `width` ReLU units, and a linear readout.

    theta [H, P] holds a neuron a row: weights N(0, 1/fan_in), biases 0. readout [d_out, H] is U(-1/sqrt(H), 1/sqrt(H)),
    without bias (`bias=True` adds the one that breaks the guarantee). free [H] marks the neurons no task has committed.
    """

    def __init__(self, side, d_in, d_out, layers=8, width=8, bias=False):
        super().__init__()
        self.side, self.shapes = side, [(width, d_in)] + [(width, width)] * (layers - 1) + [(1, width)]
        theta = torch.empty(side * side, sum(o * i + o for o, i in self.shapes))
        for W, b in zip(*unpack(theta, self.shapes)):
            W.normal_(std=W.shape[2] ** -0.5)
            b.zero_()
        self.theta = nn.Parameter(theta)
        self.readout = nn.Parameter(torch.empty(d_out, side * side).uniform_(-1 / side, 1 / side))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self.register_buffer("free", torch.ones(side * side, dtype=torch.bool))

    def forward(self, x, mask, dropout=0.0):
        """The paper's model as it is written: every neuron runs, `mask` [H] multiplies. Returns [batch, d_out]."""
        h = x[:, None].expand(-1, len(self.theta), -1)                           # [batch, H, d_in]
        for l, (W, b) in enumerate(zip(*unpack(self.theta, self.shapes))):
            h = torch.einsum("bhi,hoi->bho", h, W) + b[..., 0]
            h = h if l == len(self.shapes) - 1 else F.relu(h)
        z = F.dropout(h[..., 0], dropout)                                        # [batch, H]
        return F.linear(z * mask, self.readout, self.bias)

    def respond(self, x, winners, dropout=0.0):
        """`forward` with a binary mask, given as the indices of its winners: nothing else is run. [batch, d_out]"""
        return self.answer(self.theta[winners], self.readout[:, winners], x, dropout)

    def answer(self, theta, readout, x, dropout=0.0):
        """The neurons theta [n, P] with the readout [d_out, n] of their own. [batch, d_out]"""
        return self.read(F.dropout(PrivateMLPs.apply(theta, x, self.shapes), dropout), readout)

    @torch.no_grad()
    def loss_of_mask(self, x, y, loss):
        """The function sigma(m) -> loss(forward(x, sigma(m)), y) that `configure` descends. The neurons run once, here."""
        z = PrivateMLPs.apply(self.theta, x, self.shapes)
        return lambda mask: loss(self.read(z, self.readout.detach() * mask), y)

    def read(self, z, readout):
        """z [n, batch], readout [d_out, n] -> [batch, d_out]."""
        y = (readout @ z).T
        return y if self.bias is None else y + self.bias

    def commit(self, winners):
        """Freeze what a task occupies: later masks choose among the other neurons."""
        self.free[winners] = False

    @torch.no_grad()
    def grown(self, side):
        """A larger grid that holds this one in its corner. Returns it and the new index of every old neuron [H]."""
        (width, d_in), layers = self.shapes[0], len(self.shapes) - 1
        grid = NeuronGrid(side, d_in, len(self.readout), layers, width, self.bias is not None).to(self.theta)
        index = torch.arange(side * side).view(side, side)[:self.side, :self.side].flatten()
        grid.theta[index], grid.readout[:, index], grid.free[index] = self.theta, self.readout, self.free
        if self.bias is not None:
            grid.bias.copy_(self.bias)
        return grid, index


# ------------------------------------------------------------------------------------------- SmoothKWTA, Algorithm 1

@dataclasses.dataclass(frozen=True)
class SmoothKWTA:
    """Algorithm 1. k winners; `rounds` (T) of a uniform `kernel` x `kernel` (s); `steps` (S) of Adam at `lr` (eta)."""
    k: int
    kernel: int = 3
    rounds: int = 15
    steps: int = 1
    lr: float = 1.0

    def configure(self, loss, side, free=None):
        """The winners [k] of a side x side grid, ascending. `loss` maps a relaxed mask [H] in (0, 1) to a scalar.

        free [H], if given, marks the components that may win. Raises Refused where fewer than k are free.
        """
        m = torch.zeros(side * side, requires_grad=True)                         # line 2: a cold start
        adam = torch.optim.Adam([m], lr=self.lr, fused=True)
        for _ in range(self.steps):                                              # lines 3-5: gradient proposal
            adam.zero_grad()
            loss(m.sigmoid()).backward()
            adam.step()
        m = smooth(m.detach().view(side, side), self.kernel, self.rounds)        # line 6: lateral smoothing
        return k_winners(m.flatten(), self.k, free)                              # line 7: KWTA


def smooth(m, kernel, rounds):
    """`rounds` convolutions of m [D, D] with the uniform kernel x kernel average on the torus.

    The average is one over rows times one over columns, so all rounds together are one [D, D] matrix from each side.
    """
    side = len(m)
    if kernel % 2 == 0 or kernel > side:
        raise Refused(f"a {kernel} x {kernel} kernel has no centre on a {side} x {side} grid: it must be odd and at most {side}")
    offset = (torch.arange(side)[:, None] - torch.arange(side)) % side
    average = ((offset <= kernel // 2) | (offset >= side - kernel // 2)).to(m.dtype) / kernel
    average = torch.linalg.matrix_power(average, rounds)
    return average @ m @ average.T


def k_winners(m, k, free=None):
    """Indices [k], ascending, of the k largest entries of m [H] among the free; a tie goes to the lower index."""
    if free is not None:
        if free.sum() < k:
            raise Refused(f"the grid is full: {int((~free).sum())} of its {len(m)} components are committed, a task needs "
                          f"{k} and {int(free.sum())} are left (--grow enlarges the grid and keeps every committed mask)")
        m = m.masked_fill(~free, float("-inf"))
    return m.argsort(descending=True, stable=True)[:k].sort().values


# ------------------------------------------------------------------------------------------------- the pool, LoRA-FTN

class LoRAPool:
    """H components of rank r on every target of a frozen backbone; one mask for all targets, so a component spans the depth:

        Delta W(m) = sum_k m_k B_k A_k,    y = (W + Delta W(m)) x                                      Eqs. (1), (2)

    parts[target] = A [H, r, d_in], U(-1/sqrt(d_in), 1/sqrt(d_in)), and B [H, r, d_out], transposed, zero or N(0, b_std^2).
    Delta W is formed once per pass from the chosen components, so the others cost nothing; a batch has more tokens than
    an attention projection has columns, and then this is also less work than running the components on the tokens.
    """

    def __init__(self, targets, components, rank=4, b_std=0.0):
        self.parts, self.delta = {}, None
        for name, module in targets.items():
            (d_in, d_out), device = in_out(module), module.weight.device
            A = torch.empty(components, rank, d_in).uniform_(-d_in ** -0.5, d_in ** -0.5)
            B = torch.empty(components, rank, d_out).normal_(std=b_std)
            self.parts[name] = A.to(device), B.to(device)
        self.free = torch.ones(components, dtype=torch.bool)     # not committed
        self.silent = torch.full((components,), b_std == 0)      # B is zero: adds nothing, and its mask gets no gradient

    def take(self, rows):
        """Copies of the components `rows`, or of all: {target: (A, B)}."""
        return {name: (A[rows].clone(), B[rows].clone()) for name, (A, B) in self.parts.items()}

    def store(self, rows, components):
        """Write components back where `take` found them."""
        self.silent[rows] = False
        for name, new in components.items():
            for old, part in zip(self.parts[name], new):
                old[rows] = part.detach()

    def commit(self, winners):
        """As `NeuronGrid.commit`."""
        self.free[winners] = False

    @contextlib.contextmanager
    def applied(self, components, weight=None):
        """Within this block the targets compute (W + Delta W) x, with `components` {target: (A, B)} weighed by `weight` [n]."""
        def delta(A, B):
            B = B if weight is None else B * weight.to(B)[:, None, None]
            return B.flatten(0, 1).T @ A.flatten(0, 1)                            # [d_out, d_in]
        self.delta = {name: delta(A, B) for name, (A, B) in components.items()}
        try:
            yield
        finally:
            self.delta = None

    def update(self, name, x, y):
        """The hook for `attach`: x [batch, T, d_in], y = W x."""
        return y if self.delta is None else y + F.linear(x.to(self.delta[name].dtype), self.delta[name]).to(y.dtype)

    def loss_of_mask(self, loss):
        """The function sigma(m) -> loss() under the relaxed mask, for `SmoothKWTA.configure`. Silent components are left
        out: their gradient is exactly zero. Where all are silent, nothing has to be run to know that."""
        rows = (~self.silent).nonzero()[:, 0]
        if not len(rows):
            return lambda mask: 0 * mask.sum()
        components = self.take(rows)

        def of_mask(mask):
            with self.applied(components, mask[rows]):
                return loss()
        return of_mask
