"""The numbers of an analysis while a model trains, at chosen steps: for watching sinks form.

Legend: S recorded steps, A layers, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from eotattn.checks import check_positive_int
from eotattn.diagnostics.heads import HeadReport, head_report
from eotattn.integrations.capture import capture

__all__ = ["TrainingProbe"]


class TrainingProbe:
    """Records every quantity of every head at chosen training steps; between them it costs nothing.

    Wrap the forward pass of a step in :meth:`step`. Outputs, gradients and the random stream do not change. A recorded
    step costs about one more forward pass through attention; every hundredth is below a percent.

    Args:
        model: The model in training, not compiled.
        every: Steps between records; multiples of it are recorded, zero included.
        layers: Names or indices of layers; all by default.
        heads: Indices of heads; all by default.
        sink_positions: Keys whose sink mass is recorded; the first one is the sink of margins.

    Attributes:
        reports: Step -> table of all heads on the batch of that step.

    Example:
        >>> import torch
        >>> layer = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> probe, x = TrainingProbe(layer, every=2), torch.ones(1, 3, 8)
        >>> for step in range(4):
        ...     with probe.step(step):
        ...         _ = layer(x, x, x)
        >>> probe.to_dict()["step"].tolist()
        [0, 2]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 100,
        layers: Sequence[str | int] | None = None,
        heads: Sequence[int] | None = None,
        sink_positions: Sequence[int] = (0,),
    ) -> None:
        self.model = model
        self.every = check_positive_int("TrainingProbe", "every", every)
        self.layers, self.heads, self.sink_positions = layers, heads, tuple(sink_positions)
        self.reports: dict[int, HeadReport] = {}

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Surround the forward pass of training step ``step``."""
        check_positive_int("TrainingProbe", "step", step, minimum=0)
        if step % self.every:
            yield
            return
        chosen: dict[str, Any] = {"sink_positions": self.sink_positions}
        with capture(self.model, self.layers, self.heads, **chosen, values=False) as captured:
            yield
        if captured.layers:
            self.reports[step] = head_report(captured.layers, **chosen, num_bootstraps=1)

    def to_dict(self) -> dict[str, NDArray[np.generic]]:
        """``step`` (S,), and every quantity by name, (S, A, H); and ``sink rate`` (S, A)."""
        steps = sorted(self.reports)
        columns: dict[str, NDArray[np.generic]] = {"step": np.array(steps, dtype=np.int64)}
        if steps:
            for name in self.reports[steps[0]].mean:
                columns[name] = np.stack([self.reports[step].mean[name] for step in steps])
            rates = [next(iter(self.reports[step].sink_rate.values())) for step in steps]
            columns["sink rate"] = np.stack(rates)
        return columns
