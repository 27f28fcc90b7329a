"""One optimizer with two rules: one for the hidden matrices of a model, one for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steprule import errors, group_errors
from steprule.groups.choices import as_columns, check_rule, first_matches, shape_text
from steprule.groups.roles import Known, known

Choice = Literal["matrix", "rest"]
# The largest share of the weights that may go to `rest` because nothing says what they are.
GUESSED = 0.5


class Placed(NamedTuple):
    """A parameter, where `split` puts it, and why."""

    name: str
    param: Tensor
    choice: Choice
    reason: str
    guessed: bool = False


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

    A hidden matrix is the weight of a Linear layer or a projection of attention, other than the output layer,
    the routers of experts, and one that shares its weight with an embedding; and of a convolution or of experts
    in one tensor, if the rule for matrices takes it. The table that is printed says for each parameter which
    rule it gets and why.

    model: an nn.Module; tensors alone do not say what they are for. matrix, rest: a rule and its
    hyper-parameters, modifiers among them. where: patterns of names, such as {"*.router.weight": "rest"}, each
    with "matrix" or "rest"; the first one that matches decides. verbose: whether to print the table.

    Raises: TypeError without a module or a rule, ValueError for a pattern that decides nothing, and if most of
    the weights would go to `rest` because nothing says what they are.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise group_errors.split_without_module(type(model).__name__)
    check_rule("split", "matrix", matrix)
    check_rule("split", "rest", rest)
    placed = _placed(model, matrix[0], dict(where or {}))
    weights = sum(_size(x.param) for x in placed)
    taken = sum(_size(x.param) for x in placed if x.choice == "matrix")
    guessed = [x for x in placed if x.guessed]
    lazy = any(is_lazy(x.param) for x in guessed)
    if lazy or sum(_size(x.param) for x in guessed) > GUESSED * max(1, weights):
        raise group_errors.split_misses_most([x.name for x in guessed], taken, weights)
    rules: dict[Choice, tuple[Any, Mapping[str, Any]]] = {"matrix": matrix, "rest": rest}
    groups = [
        {"name": choice, **options, "params": named, "rule": rule}
        for choice, (rule, options) in rules.items()
        if (named := [(x.name, x.param) for x in placed if x.choice == choice])
    ]
    optimizer = matrix[0](groups)
    if verbose:
        names = {choice: rule.__name__ for choice, (rule, _) in rules.items()}
        rows = [(x.name, shape_text(x.param), names[x.choice], x.reason) for x in placed]
        print(as_columns(("parameter", "shape", "rule", "reason"), rows))
    return optimizer


def _size(param: Tensor) -> int:
    return 0 if is_lazy(param) else param.numel()


def _placed(model: nn.Module, rule: Any, where: dict[str, Choice]) -> list[Placed]:
    for pattern, choice in where.items():
        if choice not in ("matrix", "rest"):
            raise errors.out_of_range("split", f"where['{pattern}']", choice, "'matrix' or 'rest'")
    params = known(model)
    placed: list[Placed] = []
    for each, pattern in zip(params, first_matches("split", where, params), strict=True):
        if not each.param.requires_grad:
            continue
        if pattern is not None:
            placed.append(Placed(each.name, each.param, where[pattern], f"matches '{pattern}'"))
        elif each.kind in ("convolution", "experts"):
            placed.append(_if_taken(each, rule))
        else:
            choice: Choice = "matrix" if each.kind == "linear" else "rest"
            placed.append(Placed(each.name, each.param, choice, each.reason, each.kind == "unknown"))
    return placed


def _if_taken(each: Known, rule: Any) -> Placed:
    """Tensors of more dimensions are matrices if the rule takes them as such."""
    why_not = "no shape yet"
    if not is_lazy(each.param):
        try:
            rule.check_parameter(each.param, lambda: each.name, None)
        except ValueError:
            why_not = f"{rule.__name__} takes matrices only"
        else:
            return Placed(each.name, each.param, "matrix", each.reason)
    return Placed(each.name, each.param, "rest", f"{each.reason}: {why_not}", guessed=True)
