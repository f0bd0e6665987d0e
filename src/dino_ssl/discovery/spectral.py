"""The graph of TokenCut and the eigenvector that cuts it (Wang et al., 2022; Shi and Malik, 2000).

Shapes: B images, N patches, D dimensions of a patch's feature.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
"""Weight of an edge between dissimilar patches, which keeps the graph connected; similar ones have weight 1."""
TOLERANCE = 1e-6
"""Largest residual |S z - lambda z| of the Lanczos method, with |z| = 1 and eigenvalues of S in [-1, 1]."""
CHECK_EVERY, MAX_STEPS = 5, 200
"""Steps of the Lanczos method between two checks, and before the dense solver takes over."""
MIN_SIZE = 64
"""The dense solver is as fast for fewer patches."""


def binary_graph(features: Tensor, tau: float) -> Tensor:
    """Return the edges [B, N, N] between patches: 1 if the cosine of their features [B, N, D] is above tau, else EPS.

    In float64, except on MPS, which has none.
    """
    unit = F.normalize(features.float(), dim=-1)
    dtype = torch.float32 if features.device.type == "mps" else torch.float64
    return (unit @ unit.mT > tau).to(dtype).clamp_(min=EPS)


def second_eigenvector(graph: Tensor) -> Tensor:
    """Return the y of the second smallest lambda of (D - A) y = lambda D y: edges A [B, N, N] -> [B, N], unit length.

    D is the diagonal matrix of the sums of A. With z = D^1/2 y, z is the second largest eigenvector of S = D^-1/2 A
    D^-1/2, whose largest one is known: D^1/2 1. In its complement, the Lanczos method finds z by products with S; all
    its vectors are kept orthogonal. If it does not converge, because the next eigenvalue is too close, the result is
    that of `dense_second_eigenvector`. The sign is arbitrary.
    """
    size = graph.shape[-1]
    if size < MIN_SIZE:
        return dense_second_eigenvector(graph)
    root = graph.sum(-1).sqrt()
    first = F.normalize(root, dim=-1)
    noise = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(graph)
    basis = torch.stack([first, _orthogonal(noise.expand_as(first), first[:, None])], dim=1)  # [B, 1 + steps, N]
    tridiagonal = graph.new_zeros(len(graph), MAX_STEPS + 1, MAX_STEPS + 1)
    for step in range(min(MAX_STEPS, size - 2)):
        vector = basis[:, -1]
        product = _products(graph, vector / root) / root
        tridiagonal[:, step, step] = (product * vector).sum(-1)
        residual = _remove(product, basis)
        norm = residual.norm(dim=-1, keepdim=True)
        if (step + 1) % CHECK_EVERY == 0:
            ritz = torch.linalg.eigh(tridiagonal[:, : step + 1, : step + 1]).eigenvectors[..., -1]  # [B, steps]
            if bool((norm[:, 0] * ritz[:, -1].abs() <= TOLERANCE).all()):
                return F.normalize(_products(basis[:, 1:].mT, ritz) / root, dim=-1)
        tridiagonal[:, step + 1, step] = norm[:, 0]  # `eigh` reads the lower triangle
        new = residual / norm.clamp(min=1e-30) + 1e-12 * noise.roll(step + 1)  # noise if the residual is zero
        basis = torch.cat([basis, _orthogonal(new, basis)[:, None]], dim=1)
    return dense_second_eigenvector(graph)


def dense_second_eigenvector(graph: Tensor) -> Tensor:
    """Return the y of `second_eigenvector` by a complete eigendecomposition."""
    root = graph.sum(-1).sqrt()
    vectors = torch.linalg.eigh(graph / root[:, None] / root[..., None]).eigenvectors
    return F.normalize(vectors[..., -2] / root, dim=-1)


def _products(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return matrix times vector, [B, M, N], [B, N] -> [B, M]; on a CPU one by one, where `bmm` takes twice as long."""
    if matrices.device.type == "cpu":
        return torch.stack([torch.mv(matrices[i], vectors[i]) for i in range(len(vectors))])
    return torch.bmm(matrices, vectors[..., None])[..., 0]


def _remove(vector: Tensor, basis: Tensor) -> Tensor:
    """Subtract from a vector [B, N] its projection on orthonormal ones [B, k, N]."""
    return vector - _products(basis.mT, _products(basis, vector))


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    return F.normalize(_remove(vector, basis), dim=-1)
