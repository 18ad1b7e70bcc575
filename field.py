"""The weight field and the coordinate dynamics: where a task lives, and what is written there.

NIWF (Non-Interfering Weight Fields) does not store one set of adapter weights. It stores a function.
A *capability coordinate* z in [-1, 1]^d is the address of an input; the *weight field* maps an address to
gating logits over N low-rank bases, for each of L layers; the K largest win. Inputs at different addresses
therefore run different adapters, on one frozen backbone.

    h_bar --CoordinateDynamics, Eq. (8)--> z --WeightField, Eq. (6)--> logits --top_k_gating, Eq. (7)--> (i_k, w_k)

Held here: sections 3.2, 3.3, 4.2, 4.3 of the paper, Eqs. (6)-(8).
Departures: the paper does not say what the coordinate is before the first update; here z_0 = 0. We scale h_bar to length
sqrt(d) before the GRU. The paper counts 200K parameters for field and dynamics together; at Mistral's width the GRU alone has 4096*64*3 + ... = 0.8 M.

This file needs only torch: try `python -c "import torch, field; print(field.WeightField(32, 16)(torch.zeros(1, 64)).shape)"`.
"""
import torch
from torch import nn


class WeightField(nn.Module):
    """Phi: coordinate -> gating logits (section 3.2).

    layers: L rows of gating, 1 when all layers share one row. bases: N. coord_dim: d. hidden: 256 in the paper.
    """

    def __init__(self, layers, bases, coord_dim=64, hidden=256):
        super().__init__()
        self.layers, self.bases = layers, bases
        self.norm = nn.LayerNorm(coord_dim)
        self.w1 = nn.Linear(coord_dim, hidden)
        self.w2 = nn.Linear(hidden, hidden)
        self.w3 = nn.Linear(hidden, layers * bases)

    def forward(self, z):
        """z [B, d] -> logits [B, L, N]."""
        # Eq. (6): Phi(z) = W3 GELU(W2 GELU(W1 LN(z)))
        h = nn.functional.gelu(self.w1(self.norm(z)))
        h = nn.functional.gelu(self.w2(h))
        return self.w3(h).view(len(z), self.layers, self.bases)

    def grown(self, bases):
        """The same field with logits for `bases` >= N bases: old rows are copied, new ones start fresh."""
        new = WeightField(self.layers, bases, self.norm.normalized_shape[0], self.w1.out_features).to(self.w3.weight)
        new.load_state_dict({k: v for k, v in self.state_dict().items() if not k.startswith("w3")}, strict=False)
        with torch.no_grad():
            new.w3.weight.view(self.layers, bases, -1)[:, :self.bases] = self.w3.weight.view(self.layers, self.bases, -1)
            new.w3.bias.view(self.layers, bases)[:, :self.bases] = self.w3.bias.view(self.layers, self.bases)
        return new


class CoordinateDynamics(nn.Module):
    """What the backbone saw -> coordinate (section 3.3).

    features: width of h_bar, the mean of the backbone's last hidden states. fixed: the ablation of section 5.4,
    one random coordinate for every input.
    """

    def __init__(self, features, coord_dim=64, fixed=False):
        super().__init__()
        self.fixed = fixed
        self.gru = nn.GRUCell(features, coord_dim)
        self.norm = nn.LayerNorm(coord_dim)
        self.w_z = nn.Linear(coord_dim, coord_dim)
        self.register_buffer("z0", torch.rand(coord_dim) * 2 - 1 if fixed else torch.zeros(coord_dim))

    def forward(self, h_bar):
        """h_bar [B, features], detached from the backbone -> z [B, d] in (-1, 1)."""
        z0 = self.z0.expand(len(h_bar), -1)
        if self.fixed:
            return z0
        # Eq. (8): z' = tanh(W_z LN(GRU(h_bar, z))). Without the scaling a wide backbone saturates the GRU's gates: their
        # initial weights are of size 1/sqrt(d), made for inputs of about that length, and saturated gates blur addresses.
        h_bar = len(self.z0) ** 0.5 * nn.functional.normalize(h_bar, dim=-1)
        return torch.tanh(self.w_z(self.norm(self.gru(h_bar, z0))))


def top_k_gating(logits, k):
    """logits [B, L, N] -> indices [B, L, K] and weights [B, L, K] that sum to 1. K is at most N."""
    # Eq. (7): w_l = softmax(topK(Phi(z)_l)). Only the winners' logits enter the softmax, so only they get gradient.
    top = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return top.indices, top.values.softmax(dim=-1)
