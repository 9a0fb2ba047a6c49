"""Peers of the transport solver, each called as its documentation calls it: POT, OTT and flash-sinkhorn.

All solve the balanced problem of squared Euclidean costs between points, and return a key potential in cost units.
Legend: n queries, m keys, d width.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Potential", "flash_sinkhorn", "ott", "pot"]

#: Solves the problem once; returns the key potential, cost units, shape (m,), free up to a constant.
Potential = Callable[[], Tensor]


def pot(query: Tensor, key: Tensor, epsilon: float, tolerance: float) -> Potential:
    """POT's log-domain Sinkhorn with tensors of PyTorch; the dense cost is formed before the clock runs.

    Args:
        query: Points (n, d), float32.
        key: Points (m, d).
        epsilon: Temperature, squared distance.
        tolerance: POT's ``stopThr``.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # POT loads JAX, which would take the whole GPU
    from eotattn.transport.pot import log_sinkhorn

    cost = torch.cdist(query.double(), key.double()).square().to(query.dtype)
    rows, columns = (side.new_full((side.shape[0],), 1 / side.shape[0]) for side in (query, key))
    return lambda: log_sinkhorn(cost, rows, columns, epsilon=epsilon, tolerance=tolerance)


def ott(query: Tensor, key: Tensor, epsilon: float, tolerance: float) -> Potential:
    """OTT's Sinkhorn on a point cloud, compiled by JAX on the device that JAX finds, in float32.

    Args:
        query: Points (n, d), float32.
        key: Points (m, d).
        epsilon: Temperature, squared distance.
        tolerance: OTT's ``threshold``.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax  # type: ignore[import-not-found]
    from ott.geometry import pointcloud  # type: ignore[import-not-found]
    from ott.problems.linear import linear_problem  # type: ignore[import-not-found]
    from ott.solvers.linear import sinkhorn  # type: ignore[import-not-found]

    sides = [jax.numpy.asarray(side.cpu().numpy()) for side in (query, key)]
    solver = sinkhorn.Sinkhorn(threshold=tolerance, max_iterations=5000)

    @jax.jit
    def solve(left: Any, right: Any) -> Any:
        return solver(linear_problem.LinearProblem(pointcloud.PointCloud(left, right, epsilon=epsilon))).g

    def run() -> Tensor:
        found = solve(*sides)
        jax.block_until_ready(found)
        return torch.from_numpy(np.array(found)).to(query.device)

    return run


def flash_sinkhorn(query: Tensor, key: Tensor, epsilon: float, iterations: int) -> Potential:
    """flash-sinkhorn's alternating solver, its Triton kernels reading points, products in TensorFloat-32.

    Args:
        query: Points (n, d), float32, on a GPU.
        key: Points (m, d).
        epsilon: Temperature, squared distance.
        iterations: Whole iterations.
    """
    from flash_sinkhorn.sinkhorn_solvers import sinkhorn_flashstyle_alternating  # type: ignore[import-not-found]

    rows, columns = (side.new_full((side.shape[0],), 1 / side.shape[0]) for side in (query, key))

    def run() -> Tensor:
        _, found = sinkhorn_flashstyle_alternating(
            query, key, rows, columns, eps=epsilon, n_iters=iterations, allow_tf32=True
        )[:2]
        # Its potentials belong to the uniform reference, ours to exp(log_prior).
        shifted: Tensor = found + epsilon * columns.log()
        return shifted

    return run
