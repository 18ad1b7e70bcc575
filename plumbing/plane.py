"""A plane in which a page shows the regions of all versions, and where a prompt falls."""

import dataclasses
import math

import torch
from torch import nn


@dataclasses.dataclass
class Plane:
    """A plane to look at coordinates in: u = artanh(z) is seen at axes (u - origin). origin [d], axes
    [2, d]."""

    origin: torch.Tensor
    axes: torch.Tensor

    @classmethod
    def of(cls, regions):
        """Find the plane in which the means of regions differ most, in deviations of their pooled covariance:
        its axes are linear discriminants (Fisher 1936). R means span R - 1 of them. Where that is less than a
        plane, principal axes of the pooled covariance follow. On either axis its deviation is 1."""
        mean, cov = (torch.stack([getattr(r, key) for r in regions]) for key in ("mean", "cov"))
        origin, pooled = mean.mean(0), cov.mean(0)
        root = torch.linalg.cholesky(pooled)  # root^-1 u has the covariance 1
        between = torch.linalg.solve_triangular(root, (mean - origin).T, upper=False)  # [d, R]
        apart = torch.linalg.svd(between, full_matrices=False).U[:, : len(regions) - 1]
        principal = root.T @ torch.linalg.eigh(pooled).eigenvectors.flip(1)  # the widest first
        both = torch.linalg.qr(torch.cat([apart, principal], 1)).Q[:, :2]
        axes = torch.linalg.solve_triangular(root.T, both, upper=True).T
        return cls(origin, nn.functional.pad(axes, (0, 0, 0, 2 - len(axes))))  # a line if d is 1

    def at(self, u):
        """u [B, d] -> where it is seen [B, 2]."""
        return (u.cpu().double() - self.origin) @ self.axes.T

    def outline(self, region):
        """Return a closed line [64, 2] around 95 % of a region's Gaussian as it is seen here."""
        center, cov = self.axes @ (region.mean - self.origin), self.axes @ region.cov @ self.axes.T
        variance, directions = torch.linalg.eigh(cov)
        turn = torch.linspace(0, 2 * torch.pi, 65, dtype=cov.dtype)[:-1, None]
        radii = (-2 * math.log(0.05) * variance.clamp(min=0)).sqrt()  # a quantile of Rayleigh's
        return center + (torch.cat([turn.cos(), turn.sin()], 1) * radii) @ directions.T
