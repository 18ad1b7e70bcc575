"""What FTN is compared with on the same grid: elastic weight consolidation, and supermasks."""

import dataclasses

import torch

from ftn import ALL, unpack
from synthetic import Mask, Neurons, NoMask, recall


@dataclasses.dataclass(frozen=True)
class EWC(NoMask):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): strength/2 sum F (theta - theta*)^2."""

    strength: float = 400.0
    place = 3

    def penalize(self, learner):
        for importance, anchor in learner.fisher:
            for p, f, a in zip(learner.grid.parameters(), importance, anchor):
                p.grad.add_(f * (p.detach() - a), alpha=self.strength)

    def end(self, learner, t, x, y):
        """F is the diagonal Fisher information: the mean squared gradient, one example at a time."""
        theta = list(learner.grid.parameters())
        importance = [torch.zeros_like(p) for p in theta]
        for i in range(len(x)):
            loss = learner.loss(learner.grid.forward_winners(x[i : i + 1], ALL), y[i : i + 1])
            for f, g in zip(importance, torch.autograd.grad(loss, theta)):
                f.addcmul_(g, g, value=1 / len(x))
        learner.fisher.append((importance, [p.detach().clone() for p in theta]))


@dataclasses.dataclass(frozen=True)
class Supermask(Mask):
    """A mask over weights: `SupSup` learns it, so here it is only recalled.

    lr: of the scores. top: a weight is on where its score is among the larger half of its layer (the paper:
    the k best), in place of where it is positive. wide: twice the width, and signed constants
    +-sqrt(gain / fan_in) in place of normal weights; Kaiming-He's gain is 2, and 4 allows for the half that
    is off.
    """

    lr: float = 3e-4
    top: bool = False
    wide: bool = False
    gain: float = 4.0
    place, recover = 1, recall


class SupSup(Neurons):
    """Supermasks: frozen random weights, and for each task a binary mask over them, learned through scores.

    A weight is on where its score is positive (straight-through gradient), as in the SupSup authors' own
    example; scores start at U(-1, 1) / sqrt(fan_in), so half are on. A handle is a mask of each weight
    tensor.
    """

    def __init__(self, row, mask):
        super().__init__(row, mask, width=2 if mask.wide else 1)
        self.weights = [p.detach() for p in self.grid.parameters()]
        if mask.wide:
            for W in unpack(self.weights[0], self.grid.shapes)[0]:
                W.sign_().mul_((mask.gain / W.shape[2]) ** 0.5)

    def begin(self, t):
        theta, readout = (torch.empty_like(w) for w in self.weights)
        for W, b in zip(*unpack(theta, self.grid.shapes)):
            W.uniform_(-(W.shape[2] ** -0.5), W.shape[2] ** -0.5)
            b.zero_()
        self.scores = [theta, readout.uniform_(-1 / self.row.side, 1 / self.row.side)]
        for s in self.scores:
            s.grad = torch.zeros_like(s)
        self.on = [torch.zeros_like(w).requires_grad_() for w in self.weights]
        self.optimizer = torch.optim.Adam(self.scores, lr=self.mask.lr, fused=True)
        self.stored.append([torch.zeros_like(w, dtype=torch.bool) for w in self.weights])
        tensors = self.scores, self.stored[t], self.on, self.weights
        self.views = list(zip(*map(self.layers, tensors)))  # all are written in place

    def layers(self, tensors):
        """Views of those for theta and readout: [H, out, in] of every layer, [d_out, H]. Biases are 0."""
        return [*unpack(tensors[0].detach(), self.grid.shapes)[0], tensors[1].detach()]

    def train(self, t, x, y):
        with torch.no_grad():
            for s, mask, on, w in self.views:
                torch.mul(w, torch.gt(s, s.median() if self.mask.top else 0, out=mask), out=on)
        loss = self.loss(self.grid.run_neurons(*self.on, x, self.row.dropout), y)
        for s, g, w in zip(self.scores, torch.autograd.grad(loss, self.on), self.weights):
            torch.mul(g, w, out=s.grad)  # straight through: d(mask)/d(score) is taken as 1
        self.optimizer.step()

    def select(self, masks):
        return [w * m for w, m in zip(self.weights, masks)]


METHODS = {
    "ewc": (Neurons, EWC(strength=400.0)),
    "supsup": (SupSup, Supermask()),
    "supsup-wide": (SupSup, Supermask(wide=True)),  # run with --methods all
}
