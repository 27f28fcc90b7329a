"""What each parameter is, by the modules that hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steprule.groups import structure

Kind = Literal[
    "linear",
    "convolution",
    "experts",
    "filters",
    "output",
    "router",
    "embedding",
    "norm",
    "vector",
    "table",
    "unknown",
]
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)  # pyright: ignore[reportPrivateUsage]
CONVOLUTIONS = nn.modules.conv._ConvNd  # pyright: ignore[reportPrivateUsage]
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class Known(NamedTuple):
    """A parameter of a model, with all its names; what it is, in one word and in a few.

    view: how the matrices lie in it, if it is no plain matrix.
    """

    names: tuple[str, ...]
    param: Tensor
    kind: Kind
    reason: str
    view: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


def known(model: nn.Module) -> list[Known]:
    """The parameters of a model in their order, with what they are."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, param in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(param), []).append((module, key))
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    head = structure.output_layer(model)
    routers, experts = structure.routers_and_experts(model)
    found: list[Known] = []
    for param in model.parameters():
        kind, reason = _judged(param, owners[id(param)], head, routers, experts)
        shared = ", shared with another layer" if len(owners[id(param)]) > 1 else ""
        view = _view_of(kind, *owners[id(param)][0])
        found.append(Known(tuple(names[id(param)]), param, kind, reason + shared, view))
    return found


def _view_of(kind: Kind, module: nn.Module, key: str) -> Mapping[str, Any] | None:
    """How the matrices lie in a parameter, as its module says."""
    if kind == "convolution":
        return {"flatten": True}
    if kind == "experts":
        return {}
    if isinstance(module, nn.MultiheadAttention) and key == "in_proj_weight":
        return {"split": 3}  # of queries, keys and values
    return {"transpose": True} if _is_turned(module) else None


def _is_turned(module: nn.Module) -> bool:
    """Whether it is a Linear layer with inputs as rows, as GPT-2 in transformers has."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _judged(
    param: Tensor,
    owners: Sequence[tuple[nn.Module, str]],
    head: nn.Module | None,
    routers: Mapping[int, int],
    experts: Mapping[int, int],
) -> tuple[Kind, str]:
    """What a parameter is, by the modules that it belongs to."""
    modules = [module for module, _ in owners]
    if any(isinstance(x, EMBEDDINGS) for x in modules):
        return "embedding", "an embedding"
    if any(isinstance(x, NORMS) for x in modules):
        return "norm", "of a normalization"
    if all(key == "bias" or key.endswith("_bias") for _, key in owners):
        return "vector", "a bias"
    if not is_lazy(param) and param.ndim < 2:
        return "vector", "a vector"
    if all(key.endswith("_g") and hasattr(module, f"{key[:-2]}_v") for module, key in owners):
        return "vector", "the lengths of a weight_norm"
    if head in modules:
        return "output", "the output layer: the last Linear of the model"
    if id(param) in routers:
        return "router", f"a router: one row for each of {routers[id(param)]} experts"
    if id(param) in experts:
        return "experts", f"the matrices of {experts[id(param)]} experts"
    for module, key in owners:
        if isinstance(module, nn.Linear) and key == "weight":
            return "linear", "the weight of a Linear layer"
        if _is_turned(module) and key == "weight":
            return "linear", "the weight of a Linear layer with inputs as rows"
        if isinstance(module, nn.MultiheadAttention) and key.endswith("proj_weight"):
            return "linear", "a projection of attention"
        if isinstance(module, CONVOLUTIONS) and key == "weight":
            return _convolution(module)
    return _raw(param, *owners[0])


def _convolution(module: nn.modules.conv._ConvNd) -> tuple[Kind, str]:  # pyright: ignore[reportPrivateUsage]
    """A convolution whose channels do not all meet is no matrix, but one for every group."""
    if module.groups == 1:
        return "convolution", "a convolution"
    return "filters", f"a {'depthwise' if module.groups == module.in_channels else 'grouped'} convolution"


def _raw(param: Tensor, module: nn.Module, key: str) -> tuple[Kind, str]:
    """A parameter of a module that is not one of torch's, by its shape."""
    whose = f"{key} of {type(module).__name__}"
    if is_lazy(param):
        return "unknown", f"{whose}, not known"
    if sum(size > 1 for size in param.shape) < 2:
        return "vector", f"{whose}, a vector"
    if param.shape[0] == 1:
        return "table", f"{whose}, the same for every example: its first dimension is 1"
    return "unknown", f"{whose}, not known"
