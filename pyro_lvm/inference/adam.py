r"""Adam, as torch computes it, without the Python around it.

.. math::
    m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
    \theta \leftarrow \theta - \eta \, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

One fused kernel does all parameters in a quarter of a millisecond for a small network; the lists that
``torch.optim.Adam.step`` gathers for it, and a counter of steps for each parameter, take as long again. Here the lists
are kept, and there is one counter. The means of a unit that has died decay to denormal numbers and stay there, where
processors may take many times as long over them; they are set to nought now and then.
Source: Kingma and Ba (2015), https://arxiv.org/abs/1412.6980.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FusedAdam"]

STEPS_BETWEEN_CLEANINGS = 256
"""A millisecond of cleaning for a million parameters is nothing over so many steps."""


class FusedAdam(torch.optim.Adam):
    """``torch.optim.Adam(parameters, lr, fused=True)``, to the bit and sooner.

    On the CPU means below the smallest normal number become nought, which moves no parameter above 1e-25.

    Args:
        parameters: floating-point parameters, all on one device, all of one dtype.
        lr: the rate; schedulers change it as they do torch's.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> weight.grad = torch.tensor([0.5, -2.0])
        >>> FusedAdam([weight], lr=0.1).step()
        >>> weight.detach()
        tensor([ 0.9000, -0.9000])
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, lr=lr, fused=True)
        self._lists: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step along the gradients that are there."""
        parameters = self.param_groups[0]["params"]
        gradients = [parameter.grad for parameter in parameters]
        if closure is not None or len(self.param_groups) > 1 or any(gradient is None for gradient in gradients):
            self._separate()
            value: float | None = super().step(closure)
            return value
        if self._lists is None:
            if len(self.state) < len(parameters) or len({float(self.state[p]["step"]) for p in parameters}) > 1:
                value = super().step()  # makes the state, or leaves counters that differ as they are
                return value
            self._lists = self._shared(parameters)
        tensors, means, squares, steps = self._lists
        found = getattr(self, "found_inf", None)  # torch's name for a flag on the device that masks the step
        on_cpu = steps[0].device.type == "cpu"
        counter = steps[0].numpy() if on_cpu else steps[0]  # a view: an addition in no time
        counter += 1
        group = self.param_groups[0]
        fused: Any = torch._fused_adam_
        fused(
            tensors,
            gradients,
            means,
            squares,
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=found,
        )
        if found is not None:
            steps[0].sub_(found)
        if on_cpu and int(counter) % STEPS_BETWEEN_CLEANINGS == 0:
            for mean in (*means, *squares):
                mean.masked_fill_(mean.abs() < torch.finfo(mean.dtype).tiny, 0.0)
        return None

    step.hooked = True  # type: ignore[attr-defined]  # torch would wrap it for its profiler, at a cost

    def state_dict(self) -> dict[str, Any]:
        """As torch's, a counter for each parameter."""
        self._separate()
        return super().state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's."""
        self._lists = None
        super().load_state_dict(state_dict)

    def _shared(self, parameters: list[nn.Parameter]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """The kernel's lists; all parameters count their steps in one tensor."""
        counter = self.state[parameters[0]]["step"].clone()
        for parameter in parameters:
            self.state[parameter]["step"] = counter
        states = [self.state[parameter] for parameter in parameters]
        averages = ([state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states])
        return list(parameters), *averages, [counter] * len(parameters)

    def _separate(self) -> None:
        """A counter for each parameter again, as torch has it."""
        if self._lists is not None:
            for state in self.state.values():
                state["step"] = state["step"].clone()
            self._lists = None
