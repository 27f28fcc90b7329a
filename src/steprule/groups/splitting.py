"""Parameter groups by what a parameter is for in its module."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steprule import errors, group_errors
from steprule.engine.parts import is_rule

Choice = Literal["matrix", "rest"]
# What is left to the other rule, or is not trained.
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)  # pyright: ignore[reportPrivateUsage]
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
LEAST = 0.5


class Placed(NamedTuple):
    """A parameter, where `split` puts it, and why."""

    name: str
    param: Tensor
    choice: Choice
    reason: str


def split(
    model: nn.Module,
    matrix: tuple[Any, Mapping[str, Any]],
    rest: tuple[Any, Mapping[str, Any]],
    *,
    where: Mapping[str, Choice] | None = None,
    verbose: bool = True,
) -> Any:
    """One optimizer with two rules: one for the hidden matrices of a model, one for everything else.

    When: Muon and other rules on matrices, which are not meant for embeddings, output layers, norms and biases.

        optimizer = steprule.split(model, matrix=(Muon, {"lr": 0.02}), rest=(AdamW, {"lr": 3e-4}))

    A parameter is a hidden matrix if it is the weight of a Linear layer, other than the last one and other than
    one that shares its weight with an embedding. The table that is printed says for each parameter which
    rule it gets and why.

    model: an nn.Module; tensors alone do not say what they are for. matrix, rest: a rule and its
    hyper-parameters, modifiers among them. where: patterns of names, such as {"*.router.weight": "rest"}, each
    with "matrix" or "rest"; the first one that matches decides. verbose: whether to print the table.

    Raises: TypeError without a module or a rule, ValueError for a pattern that decides nothing, and if most of
    the weights would go to `rest` because nothing says what they are.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise group_errors.split_without_module(type(model).__name__)
    _check_rule("matrix", matrix)
    _check_rule("rest", rest)
    placed = _placed(model, dict(where or {}))
    weights = sum(_size(x.param) for x in placed)
    taken = sum(_size(x.param) for x in placed if x.choice == "matrix")
    # What a pattern or an embedding says is no guess.
    guessed = [x for x in placed if x.reason == _UNKNOWN]
    lazy = any(is_lazy(x.param) for x in guessed)
    if lazy or sum(_size(x.param) for x in guessed) > LEAST * max(1, weights):
        raise group_errors.split_misses_most([x.name for x in guessed], taken, weights)
    rules: dict[Choice, tuple[Any, Mapping[str, Any]]] = {"matrix": matrix, "rest": rest}
    groups = [
        {"name": choice, **options, "params": named, "rule": rule}
        for choice, (rule, options) in rules.items()
        if (named := [(x.name, x.param) for x in placed if x.choice == choice])
    ]
    optimizer = matrix[0](groups)
    if verbose:
        print(_table(placed, {choice: rule.__name__ for choice, (rule, _) in rules.items()}))
    return optimizer


def _check_rule(choice: Choice, given: Any) -> None:
    """Refuse what is not a rule with its hyper-parameters."""
    pair = cast("tuple[Any, ...]", given if isinstance(given, tuple) else ())
    options: Any = pair[1] if len(pair) == 2 else None
    if not (isinstance(options, Mapping) and is_rule(pair[0])):
        raise group_errors.split_without_rule(choice, cast(object, given))
    for key in ("params", "rule"):
        if key in options:
            raise group_errors.split_decides(choice, key)


def _size(param: Tensor) -> int:
    return 0 if is_lazy(param) else param.numel()


_UNKNOWN = "not the weight of a Linear layer"


def _placed(model: nn.Module, where: dict[str, Choice]) -> list[Placed]:
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, param in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(param), []).append((module, key))
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    head = linear[-1] if len(linear) > 1 else None
    names = [name for name, _ in model.named_parameters()]
    _check_patterns(where, names)
    placed: list[Placed] = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        pattern = next((x for x in where if fnmatch.fnmatchcase(name, x)), None)
        if pattern is not None:
            placed.append(Placed(name, param, where[pattern], f"matches '{pattern}'"))
        else:
            placed.append(Placed(name, param, *_judged(param, owners[id(param)], head)))
    return placed


def _check_patterns(where: Mapping[str, Choice], names: list[str]) -> None:
    """Refuse a pattern that decides nothing, or says something else than matrix or rest."""
    left = names
    for place, (pattern, choice) in enumerate(where.items()):
        if choice not in ("matrix", "rest"):
            raise errors.out_of_range("split", f"where['{pattern}']", choice, "'matrix' or 'rest'")
        matched = _matching(pattern, names)
        if not matched:
            raise group_errors.pattern_matches_nothing("split", pattern, names)
        if not set(matched) & set(left):
            before = [x for x in list(where)[:place] if set(_matching(x, names)) & set(matched)]
            raise group_errors.pattern_comes_too_late("split", pattern, before)
        left = [name for name in left if name not in matched]


def _matching(pattern: str, names: list[str]) -> list[str]:
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def _judged(param: Tensor, owners: list[tuple[nn.Module, str]], head: nn.Module | None) -> tuple[Choice, str]:
    """Where a parameter goes, by the modules that it belongs to, and why."""
    modules = [module for module, _ in owners]
    if any(isinstance(x, EMBEDDINGS) for x in modules):
        return "rest", "an embedding" if len(modules) == 1 else "an embedding, shared with another layer"
    if any(isinstance(x, NORMS) for x in modules):
        return "rest", "of a normalization"
    if all(key == "bias" for _, key in owners) if is_lazy(param) else param.ndim < 2:
        return "rest", "a vector"
    if head in modules:
        return "rest", "the output layer: the last Linear of the model"
    if any(isinstance(module, nn.Linear) and key == "weight" for module, key in owners):
        return "matrix", "the weight of a Linear layer"
    attention = any(isinstance(module, nn.MultiheadAttention) for module in modules)
    if attention and any(key.endswith("proj_weight") for _, key in owners):
        return "matrix", "a projection of attention"
    return "rest", _UNKNOWN


def _table(placed: list[Placed], rules: Mapping[Choice, str]) -> str:
    shapes = ["no shape yet" if is_lazy(x.param) else str(tuple(x.param.shape)) for x in placed]
    rows = [(x.name, shape, rules[x.choice], x.reason) for x, shape in zip(placed, shapes, strict=True)]
    rows.insert(0, ("parameter", "shape", "rule", "reason"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )
