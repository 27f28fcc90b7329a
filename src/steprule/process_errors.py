"""Every message about parameters that are sharded over processes, or whose state is elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from steprule.errors import in_group


def other_processes(who: str, some: Sequence[int], others: Sequence[int]) -> ValueError:
    """A sum over parameters that are sharded over different processes."""
    return ValueError(
        f"{who}: some parameters are sharded over the processes {', '.join(map(str, some))}, others over "
        f"{', '.join(map(str, others))}. A sum over all of them, or a step of whole matrices, needs processes "
        "that have all. Make an optimizer for each."
    )


def failed_elsewhere(who: str, during: str = "in this step") -> RuntimeError:
    """Another process has raised in the same step, or while it loaded the same checkpoint."""
    return RuntimeError(f"{who}: another process has failed {during}. Its own message says why.")


def others_wait() -> str:
    """A note on what has failed while processes send each other something."""
    return (
        "It happened while processes were sending each other what this step needs, and the others still wait "
        "for it. End this process: torchrun then ends the others, too, which would wait until the timeout of "
        "their process group."
    )


def missing_gradients(who: str, names: Sequence[str]) -> ValueError:
    """Parameters that have a gradient in some processes only."""
    have, them = ("has", "it") if len(names) == 1 else ("have", "them")
    return ValueError(
        f"{who}: {', '.join(names)} {have} a gradient in some processes and none in others, must have one in "
        f"all or in none. Compute the same loss in all, or give {them} zeros: p.grad = torch.zeros_like(p)."
    )


def other_losses(who: str, least: float, most: float) -> ValueError:
    """Processes whose closures return different losses."""
    return ValueError(
        f"{who}: the closure returns {least} in one process and {most} in another, must return the same loss "
        "in all. After loss.backward(), add the losses up with torch.distributed.all_reduce(loss.detach()), "
        "divide by the number of processes, and return that."
    )


def in_strides() -> ValueError:
    """A part that is no stretch of the whole along some dimension."""
    return ValueError(
        "A parameter is sharded so that a process has pieces of it that do not follow each other along a "
        "dimension. Shard it with fully_shard, parallelize_module or distribute_tensor in stretches."
    )


def not_in_backward(who: str, reason: str) -> ValueError:
    """A rule, a modifier or an option that needs the gradients of other parameters, too."""
    return ValueError(
        f"step_in_backward: {who} cannot step during the backward pass: {reason}. "
        "Call optimizer.step() after it, or choose rules and modifiers that step each parameter on its own."
    )


def no_model_and_optimizer(model: str, optimizer: str) -> TypeError:
    """Not a model and one of our optimizers."""
    return TypeError(
        f"step_in_backward: given {model} and {optimizer}, must be a model and an optimizer of steprule, as in "
        "step_in_backward(model, steprule.AdamW(model))."
    )


def no_stated_rule(call: str, kind: str) -> TypeError:
    """Not one of our optimizers, or one whose step is written by hand."""
    return TypeError(
        f"{call}: given {kind}, must be an optimizer of steprule whose rule is stated in an update, as in "
        f"{call}(steprule.AdamW(model))."
    )


def not_on_host(who: str, group: int | None, problem: str, fix: str) -> ValueError:
    """State that cannot be kept in main memory."""
    return ValueError(
        f"state_on_host: the state of {who}{in_group(group)} cannot be kept in main memory: {problem}. {fix}"
    )


def no_processes(who: str) -> RuntimeError:
    """State is to be shared, and there is nobody to share it with."""
    return RuntimeError(
        f"shard_state: the state of {who} cannot be shared: there is no process group. Call "
        "torch.distributed.init_process_group first."
    )


def not_shared(who: str, problem: str, fix: str) -> ValueError:
    """State that cannot be shared by processes that have the whole model."""
    return ValueError(f"shard_state: the state of {who} cannot be shared: {problem}. {fix}")


def shared_and_sparse(who: str, name: str) -> RuntimeError:
    """A sparse gradient of a parameter whose state is shared."""
    return RuntimeError(
        f"{who}: the gradient of {name} is sparse, and its state is shared by rows. Pass sparse=False to the "
        "embedding, or leave shard_state out."
    )


def codes_in_parts(who: str, name: str, cut: tuple[int, int], group: int | None) -> ValueError:
    """Shards that separate neighbours with one scale. cut: which process has a part, and a block's length."""
    process, block = cut
    return ValueError(
        f"{who}: state_dtype='int8' cannot keep {name}{in_group(group)} as it is sharded: process {process} "
        f"has a part of a block of {block} neighbours that share a scale. Shard its rows, or use bf16."
    )


def not_as_part(who: str, name: str, reason: str) -> RuntimeError:
    """A part whose share in a sum over the whole parameter no kernel can take."""
    return RuntimeError(
        f"{who}: {name} is sharded, and its step takes a sum over all of it, but the part here cannot be "
        f"stepped as one: {reason}. Pass foreach=False, so that one process steps the whole."
    )
