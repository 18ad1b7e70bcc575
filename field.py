"""The weight field: where a task lives, what is written there, and who answers.

NIWF (Non-Interfering Weight Fields) does not store one set of adapter weights. It stores a function. A
*capability coordinate* z in [-1, 1]^d is the address of an input; the *weight field* maps an address to
gating logits over N low-rank bases, for each of L layers; the K largest win. So inputs at different addresses
run different adapters.

    h_bar --CoordinateDynamics, Eq. (8)--> z --WeightField, Eq. (6)--> logits --top_k_gating, Eq. (7)--> i, w

The coordinates of a learned task occupy a *region*. *Anchors* are points in it; what the field gives there is
the task's *snapshot*. Later inputs are *routed*: a coordinate belongs to the region under which it is most
likely.

This file covers sections 3.2-3.5, 4.2, 4.3 and Appendix B of the NIWF paper, Eqs. (6)-(8), (10)-(13). It
departs from the paper in this, and why:
* The GRU takes one step, from z_0 = 0: the paper gives its initial coordinate no value, and an input has one
  h_bar, so the cell never recurs.
* h_bar is standardised. Mean hidden states of a language model share a large common part (anisotropy), so
  inputs differ little: as printed, at alpha 16, one or two gatings serve all prompts of the tiny model.
* In one pass d is 128 (train.py), not 64, and h_bar holds the last token beside the mean (model.py): more
  prompts are then routed to their task.
* A region's Gaussian is fitted to artanh(z), not to z, because coordinates pile up at the ends of (-1, 1).
  Its covariance is shrunk, and tau is a leave-one-out quantile, so that new inputs lie inside, too.
* Routing compares regions with each other, and with a wide background, because one region's own 95 %
  ellipsoid need not tell tasks apart.

It needs torch alone:
    python -c "import torch, field; print(field.WeightField(32, 16)(torch.zeros(1, 64)).shape)"
"""

import dataclasses
import functools

import torch
from torch import nn


class WeightField(nn.Module):
    """Phi: coordinate -> gating logits (section 3.2).

    layers: L rows of gating. bases: N. coord_dim: d. hidden: 256 in the paper.
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
        # NIWF Eq. (6): Phi(z) = W3 GELU(W2 GELU(W1 LN(z)))
        h = nn.functional.gelu(self.w1(self.norm(z)))
        h = nn.functional.gelu(self.w2(h))
        return self.w3(h).view(len(z), self.layers, self.bases)

    @torch.no_grad()
    def grown(self, bases):
        """Return the same field with logits for `bases` >= N bases. Old rows are copied, new ones fresh."""
        new = WeightField(self.layers, bases, self.w1.in_features, self.w1.out_features).to(self.w3.weight)
        kept = {k: v for k, v in self.state_dict().items() if not k.startswith("w3")}
        new.load_state_dict(kept, strict=False)
        for old, fresh in zip(self.w3.parameters(), new.w3.parameters()):
            fresh.view(self.layers, bases, -1)[:, : self.bases] = old.view(self.layers, self.bases, -1)
        return new


class CoordinateDynamics(nn.Module):
    """h_bar, a summary of an input's hidden states, -> its coordinate (section 3.3). features: the width of
    h_bar, see model.py."""

    def __init__(self, features, coord_dim=64):
        super().__init__()
        self.gru = nn.GRUCell(features, coord_dim)
        self.norm = nn.LayerNorm(coord_dim)
        self.w_z = nn.Linear(coord_dim, coord_dim)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        self.register_buffer("z0", torch.zeros(coord_dim))

    def standardise(self, h_bar):
        """Set mean and deviation, with which `forward` standardises, to those of each feature of h_bar [n,
        features] over the first task's training prompts. They are saved with the weights, never trained."""
        self.mean.copy_(h_bar.mean(0))
        self.deviation.copy_(h_bar.std(0, correction=0).clamp(min=1e-6))

    def forward(self, h_bar):
        """h_bar [B, features], detached from the backbone -> z [B, d] in (-1, 1)."""
        z0 = self.z0.expand(len(h_bar), -1)
        # Scale h_bar to length sqrt(d), because the GRU's initial weights, of size 1/sqrt(d), expect that. A
        # wide backbone would otherwise saturate its gates, which blurs addresses.
        h_bar = (len(self.z0) / len(self.mean)) ** 0.5 * (h_bar - self.mean) / self.deviation
        # NIWF Eq. (8): z' = tanh(W_z LN(GRU(h_bar, z)))
        return torch.tanh(self.w_z(self.norm(self.gru(h_bar, z0))))


def top_k_gating(logits, k):
    """logits [B, L, N] -> indices [B, L, K] and weights [B, L, K] that sum to 1. K is at most N."""
    # NIWF Eq. (7): w_l = softmax(topK(Phi(z)_l)). Only the winners' logits enter, so only they get gradient.
    top = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return top.indices, top.values.softmax(dim=-1)


# ------------------------------------------------------------------------------------- regions and routing


def unsquash(z):
    """Undo the tanh of Eq. (8): artanh(z), to which a Gaussian fits better than to z."""
    return torch.atanh(z.clamp(-1 + 1e-6, 1 - 1e-6))


@dataclasses.dataclass(eq=False)
class Region:
    """R = {z : d_M(z; mu, Sigma) <= tau}, NIWF Eq. (11). mean [d] and cov [d, d] are those of u = artanh(z),
    in float64; n coordinates were fitted."""

    mean: torch.Tensor
    cov: torch.Tensor
    tau: float
    n: int

    @classmethod
    def fit(cls, z, quantile=0.95):
        """Fit a Gaussian to n points z [n, d]. tau is a quantile of leave-one-out distances: of each point
        from a Gaussian of the others, with the shrinkage that was found for all. The paper's distances,
        from a Gaussian of all points, are too small unless n is much larger than d, so too few new points
        would lie inside."""
        u = unsquash(z.cpu().double())
        mean, n, eye = u.mean(0), len(u), torch.eye(u.shape[1], dtype=u.dtype)
        x = u - mean
        share, scale = shrinkage(x)
        scatter, ridge = (1 - share) * x.T @ x, (share * scale + 1e-10) * eye  # 1e-10: if all z are alike
        region = cls(mean, scatter / max(n - 1, 1) + ridge, tau=0.0, n=n)
        # With two coordinates or fewer none can be left out.
        squared = leave_one_out(x, scatter, ridge, share) if n > 2 else mahalanobis(x, 0, region.whiten) ** 2
        region.tau = float(squared.clamp(min=1e-12).sqrt().quantile(quantile))
        return region

    @functools.cached_property
    def whiten(self):
        """L^-1 [d, d] with Sigma = L L^T, so that d_M = |L^-1 (u - mu)|."""
        return torch.linalg.inv(torch.linalg.cholesky(self.cov))

    def distance(self, z):
        """Return d_M(z; mu, Sigma) [B], differentiable in z [B, d]."""
        return mahalanobis(unsquash(z), self.mean.to(z), self.whiten.to(z))


def shrinkage(x):
    """Return (share, scale): the covariance of centred points x [n, d] is estimated as (1 - share) S + share
    scale I, where scale is the mean variance and share makes the expected squared error least (Ledoit and
    Wolf 2004). Nothing has to be chosen, and Sigma is regular even with fewer points than dimensions."""
    n, d = x.shape
    S = x.T @ x / n
    scale = S.diagonal().mean()
    spread = (S - scale * torch.eye(d, dtype=x.dtype)).square().sum()
    noise = (x.square().sum(1).square().mean() - S.square().sum()) / n
    share = (noise / spread).clamp(0, 1) if spread > 0 else torch.ones_like(scale)
    return share, scale


def leave_one_out(x, scatter, ridge, share):
    """Return the squared distance [n] of every centred x_i [n, d] from a Gaussian of the others. scatter:
    (1 - share) sum_i x_i x_i^T; ridge [d, d] is added to the covariance.

    Without x_i the mean moves by -x_i / (n - 1), and the sum of squares loses n / (n - 1) x_i x_i^T. So the
    inverse of what is left follows from one inverse for all (Sherman and Morrison)."""
    n = len(x)
    q = (x @ torch.linalg.inv(scatter / (n - 2) + ridge) * x).sum(1)
    lost = (1 - share) * n / ((n - 1) * (n - 2))
    return (n / (n - 1)) ** 2 * q / (1 - lost * q).clamp(min=1e-12)


def mahalanobis(u, mean, whiten):
    """Return d_M [B] of u [B, d], artanh of coordinates, from a Gaussian with mean [d] and whiten L^-1
    [d, d]; or [n, B] from n of them, with [n, 1, d] and [n, d, d]."""
    return ((u - mean) @ whiten.mT).square().sum(-1).clamp(min=1e-12).sqrt()


@functools.lru_cache(maxsize=1)  # a run's regions do not change, and every prompt needs it
def background(regions, wide=2.0):
    """Return a wide Gaussian, as a Region, for what no version has learned: it has the moments of all
    coordinates that the regions (a tuple) were fitted to, with `wide` times their covariance. The factor 2
    was chosen on thirteen tasks, of which one was left out at a time (studies/sure.py)."""
    share = torch.tensor([r.n for r in regions], dtype=torch.float64)
    share = (share / share.sum())[:, None]
    means = torch.stack([r.mean for r in regions])  # [regions, d]
    mean = (share * means).sum(0)
    within = (share[:, None] * torch.stack([r.cov for r in regions])).sum(0)
    cov = wide * (within + (means - mean).T @ (share * (means - mean)))
    return Region(mean, cov, tau=0.0, n=sum(r.n for r in regions))


# `route` divides log-likelihoods by it before they become probabilities (Guo et al. 2017). Coordinates are
# only nearly Gaussian, and over d dimensions such errors add up, so a choice would look too sure. The value
# was chosen together with the factor of the background, and changes no choice.
TEMPERATURE = 3.0


@dataclasses.dataclass
class Route:
    """Where B coordinates belong. choice [B]: index of the likeliest region. probability, unknown [B]: of
    that region and of the background, in a softmax over all regions and the background. inside [B, regions]:
    whether a coordinate lies in a region, d_M <= tau. u [B, d]: artanh of the coordinates."""

    choice: torch.Tensor
    probability: torch.Tensor
    unknown: torch.Tensor
    inside: torch.Tensor
    u: torch.Tensor

    def known(self):
        """Return whether each coordinate's region is at least as likely as the background, [B]."""
        return self.probability >= self.unknown


def route(z, regions):
    """Send coordinates z [B, d] to the region under whose Gaussian they are most likely (quadratic
    discriminant analysis). The background takes part in the probabilities, so that a choice far from every
    region is not called sure (open-set recognition). -> Route"""
    # Ask all regions at once: one after another, routing would slow down with every task.
    gaussians = [*regions, background((*regions,))]
    whiten = torch.stack([r.whiten for r in gaussians])  # [regions + 1, d, d]
    mean = torch.stack([r.mean for r in gaussians])[:, None]  # [regions + 1, 1, d]
    u = unsquash(z.cpu().double())
    distance = mahalanobis(u, mean, whiten).T  # [B, regions + 1]
    # log N(z; mu, Sigma) without its constant: log |Sigma|^(-1/2) sums the logarithms of L^-1's diagonal.
    scores = whiten.diagonal(dim1=1, dim2=2).log().sum(1) - distance.square() / 2
    choice, shares = scores[:, :-1].argmax(1), (scores / TEMPERATURE).softmax(1)
    probability = shares.gather(1, choice[:, None])[:, 0]
    tau = torch.tensor([r.tau for r in regions], dtype=distance.dtype)
    return Route(choice, probability, shares[:, -1], distance[:, :-1] <= tau, u)


# ------------------------------------------------------------- anchors, and the losses of the soft lock


def sample_anchors(region, count, seed):
    """Draw `count` anchors a_j [count, d] from the region's Gaussian, and reject those outside the region
    (Appendix B). If hardly any falls inside, the last draws are moved to the region's edge."""
    generator = torch.Generator().manual_seed(seed)
    scale, anchors = torch.linalg.cholesky(region.cov), torch.empty(0, len(region.mean))
    for _ in range(100):
        noise = torch.randn(4 * count, len(region.mean), generator=generator, dtype=torch.float64)
        draws = noise @ scale.T
        points = torch.tanh(region.mean + draws).float()
        anchors = torch.cat([anchors, points[region.distance(points) <= region.tau]])[:count]
        if len(anchors) == count:
            return anchors
    # tau can be so small that a draw hardly ever falls inside, if all coordinates are alike.
    shrink = region.tau / region.distance(torch.tanh(region.mean + draws))
    return torch.cat([anchors, torch.tanh(region.mean + shrink[:, None] * draws).float()])[:count]


@torch.no_grad()
def take_snapshot(field, anchors):
    """NIWF Eq. (12): Phi(a_j) for every anchor, [count, L, N]. It is computed on the CPU, so that a machine
    with another GPU, or none, can compute it again."""
    device = field.w3.weight.device
    snapshot = field.cpu()(anchors.cpu())
    field.to(device)
    return snapshot


def lock_loss(field, versions):
    """NIWF Eq. (13): mean over anchors of |Phi(a_j) - snapshot_j|^2, summed over committed versions. It sees
    gating logits and nothing else: A and B of shared bases, and the dynamics that give z, are free to
    move."""
    total = torch.zeros((), device=field.w3.weight.device)
    for v in versions:
        now = field(v.anchors.to(total.device))[..., : v.snapshot.shape[-1]]  # a grown bank has more logits
        total = total + (now - v.snapshot.to(total.device)).square().sum((1, 2)).mean()
    return total


def separation_loss(z, regions, margin):
    """NIWF Eq. (10): sum over regions of mean(max(0, tau_R + margin - d_M(z; R))^2). It pushes z [B, d] out
    of them."""
    hinges = [(r.tau + margin - r.distance(z)).clamp(min=0) for r in regions]
    return sum((hinge.square().mean() for hinge in hinges), z.new_zeros(()))
