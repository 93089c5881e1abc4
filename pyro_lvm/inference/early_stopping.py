r"""Stop when more epochs are sure to bring next to nothing, whatever the noise.

A line is fitted to the last epochs of the monitored bound. Training stops once the slope's upper confidence limit
says that ``patience`` more epochs would gain less than ``min_delta``:

.. math:: \text{patience} \cdot (\hat b + t_z\, \mathrm{se}(\hat b)) < \text{min\_delta}

where :math:`t_z` is the quantile of Student's t that leaves out as much as z standard errors of a Normal do. A noisy
trace has a wide limit, so noise alone hardly ever stops a run that still rises; windows of twice, four times, ... the
patience are tried too, whose slopes are known better. The test is made after every epoch, and z = 4 (one in 30 000)
keeps the risk of all of them together below one in twenty for some hundred epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["EarlyStopping"]


@dataclass(frozen=True)
class EarlyStopping:
    """When to stop before the last epoch.

    Attributes:
        patience: epochs over which a gain must be expected to go on.
        min_delta: the gain that is worth them, nats per datum.
        z: width of the confidence limit, in standard errors of a Normal.
        monitor: "auto" (the validation ELBO if there is one, else the training ELBO), "validation_elbo" or "elbo".

    Raises:
        ValueError: if ``patience`` is below 5 (a slope and its error need points) or ``min_delta`` is not positive.

    Example:
        >>> EarlyStopping(patience=10).should_stop([-1.0] * 30)
        True
        >>> EarlyStopping(patience=10).should_stop([-100.0 + epoch for epoch in range(30)])
        False
    """

    patience: int = 20
    min_delta: float = 0.01
    z: float = 4.0
    monitor: str = "auto"

    def __post_init__(self) -> None:
        if self.patience < 5:
            raise ValueError(f"patience is {self.patience}: a slope and its error need at least 5 epochs")
        if not self.min_delta > 0:
            raise ValueError(f"min_delta is {self.min_delta}: name the gain (nats per datum) that is worth waiting for")
        if self.monitor not in ("auto", "elbo", "validation_elbo"):
            raise ValueError(f"monitor={self.monitor!r} is not known: use 'auto', 'elbo' or 'validation_elbo'")

    def should_stop(self, values: Sequence[float]) -> bool:
        """Whether ``values``, the monitored bound of every epoch so far (nats per datum), has stopped rising."""
        window = self.patience
        while window <= len(values):
            if self._gain_limit(np.asarray(values[-window:], dtype=float)) < self.min_delta:
                return True
            window *= 2
        return False

    def _gain_limit(self, values: np.ndarray) -> float:
        """Upper confidence limit of the gain over ``patience`` more epochs."""
        from scipy.special import ndtr, stdtrit  # only a fit that may stop early waits for SciPy

        epochs = np.arange(len(values)) - (len(values) - 1) / 2
        spread = float((epochs**2).sum())
        slope = float((epochs * values).sum()) / spread
        residual = values - values.mean() - slope * epochs
        freedom = len(values) - 2
        error = float(np.sqrt((residual**2).sum() / freedom / spread))
        return self.patience * (slope - float(stdtrit(freedom, ndtr(-self.z))) * error)
