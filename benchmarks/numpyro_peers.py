"""NumPyro: one jitted update a step, called from a Python loop, or a whole burst of them in one `lax.scan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.timing import Burst, Contender, Skip


def numpyro_contenders(
    name: str, build: Callable[[], Any], arrays: tuple[Tensor, ...], steps: int, *, batch_size: int | None = None
) -> list[Contender]:
    """A loop and a scan over the ``(model, guide, loss)`` that ``build`` makes; ``build`` may raise `Skip`.

    `svi.run` is such a scan, but compiles anew in every call.
    """
    return [
        Contender(
            f"NumPyro{name}, jitted update", lambda: _burst(_loop, build, arrays, steps, batch_size), steps, NEEDS
        ),
        Contender(f"NumPyro{name}, lax.scan", lambda: _burst(_scan, build, arrays, steps, batch_size), steps, NEEDS),
    ]


NEEDS = ("jax", "numpyro")


def _burst(
    kind: Any, build: Callable[[], Any], arrays: tuple[Tensor, ...], steps: int, batch_size: int | None
) -> Burst:
    import jax
    import jax.numpy as jnp
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    model, guide, loss = build()
    data = tuple(jnp.asarray(array.numpy()) for array in arrays)
    svi = SVI(model, guide, Adam(1e-3), loss=loss)
    first = data if batch_size is None else tuple(array[:batch_size] for array in data)
    state = svi.init(jax.random.PRNGKey(0), *first)
    try:
        return kind(svi, state, data, steps, batch_size)
    except NotImplementedError as error:
        raise Skip(str(error)) from error


def _loop(svi: Any, state: Any, data: Any, steps: int, batch_size: int | None) -> Burst:
    import jax
    import numpy as np

    generator = np.random.default_rng(0)

    @jax.jit
    def on_all(state: Any, data: Any) -> Any:
        return svi.update(state, *data)

    @jax.jit
    def on_rows(state: Any, data: Any, index: Any) -> Any:
        return svi.update(state, *(array[index] for array in data))

    def run() -> Any:
        nonlocal state
        losses = []
        if batch_size is None:
            for _ in range(steps):
                state, loss = on_all(state, data)
                losses.append(loss)
        else:
            for index in generator.permutation(len(data[0]))[: steps * batch_size].reshape(steps, batch_size):
                state, loss = on_rows(state, data, index)
                losses.append(loss)
        return jax.block_until_ready((state, losses))

    return run


def _scan(svi: Any, state: Any, data: Any, steps: int, batch_size: int | None) -> Burst:
    import jax

    key = jax.random.PRNGKey(1)

    @jax.jit
    def burst(state: Any, data: Any, key: Any) -> Any:
        if batch_size is None:
            return jax.lax.scan(lambda s, _: svi.update(s, *data), state, None, length=steps)
        index = jax.random.permutation(key, len(data[0]))[: steps * batch_size].reshape(steps, batch_size)
        return jax.lax.scan(lambda s, i: svi.update(s, *(array[i] for array in data)), state, index)

    def run() -> Any:
        nonlocal state, key
        key, now = jax.random.split(key)
        state, losses = burst(state, data, now)
        return jax.block_until_ready((state, losses))

    return run
