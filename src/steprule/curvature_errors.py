"""Messages about estimates of the curvature."""

from __future__ import annotations


def no_curvature(who: str, name: str) -> str:
    """The warning for a first step when the curvature was never estimated."""
    return (
        f"{who}: update_hessian was never called for {name}, so its curvature is 0. Call it before the first "
        "step and then every few steps; help(optimizer.update_hessian) says how."
    )


def nothing_estimates(who: str):
    """`update_hessian` of an optimizer whose rules use no curvature."""
    return RuntimeError(
        f"{who}.update_hessian: no group has a rule that uses the curvature, such as AdaHessian or SophiaH."
    )


def no_diagonal(who: str, given: str):
    """Something else in place of the diagonal of the Hessian."""
    return TypeError(
        f"{who}.update_hessian takes a dict from parameters to tensors, as steprule.hutchinson returns, got "
        f"{given}. Write dict(zip(params, diagonal))."
    )


def diagonal_of_another(who: str, shape: object):
    """The curvature of a tensor that the optimizer does not have."""
    return ValueError(
        f"{who}.update_hessian: the dict has a tensor of shape {shape} that is not a parameter of this "
        "optimizer. Leave it out; if it should be one, look into optimizer.param_groups: a copy of a model "
        "has parameters of its own."
    )


def diagonal_does_not_fit(who: str, name: str, given: str, wanted: str):
    """A curvature of another form than its parameter."""
    return ValueError(
        f"{who}.update_hessian: the curvature of {name} {given}, must {wanted}. It has one element for each of "
        "the parameter."
    )


def no_diagonal_of(problem: str, fix: str):
    """A loss that the curvature cannot be computed from."""
    return ValueError(f"hutchinson: {problem}. {fix}")


def graph_is_gone() -> str:
    """A note on torch's error about a graph that a backward pass has freed."""
    return "hutchinson: call it before loss.backward(), which frees the graph of the loss."


def no_second_derivative() -> str:
    """A note on torch's error about an operation that can be differentiated only once."""
    return (
        "hutchinson: it needs second derivatives, which some fused operations do not have. For attention, "
        "compute the loss inside torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH); do not "
        "compile the model with torch.compile."
    )
