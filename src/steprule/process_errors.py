"""Every message about parameters that are sharded over processes."""

from __future__ import annotations

from collections.abc import Sequence


def other_processes(who: str, ranks: Sequence[Sequence[int]]) -> ValueError:
    """Parameters that are sharded over different processes."""
    first, second = (", ".join(map(str, x)) for x in ranks[:2])
    return ValueError(
        f"{who}: some parameters are sharded over the processes {first}, others over {second}. "
        "A step needs the same processes for all. Make an optimizer for each."
    )


def failed_elsewhere(who: str) -> RuntimeError:
    """Another process has raised in the same step."""
    return RuntimeError(f"{who}: another process has failed in this step. Its own message says why.")


def in_strides() -> ValueError:
    """A part that is no stretch of the whole along some dimension."""
    return ValueError(
        "A parameter is sharded so that a process has pieces of it that do not follow each other along a "
        "dimension. Shard it with fully_shard, parallelize_module or distribute_tensor in stretches."
    )
