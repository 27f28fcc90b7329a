"""One optimizer with two rules: one for the hidden matrices of a model, one for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steprule import errors, group_errors
from steprule.declare import Matrix
from steprule.elementwise.adamw import AdamW
from steprule.engine.views import View
from steprule.groups.choices import as_columns, check_rule, first_matches, shape_text
from steprule.groups.roles import Known, known

Choice = Literal["matrix", "rest"]
# A rule and its hyper-parameters for each choice.
Rules: TypeAlias = dict[Choice, tuple[Any, Mapping[str, Any]]]
# The largest share of the weights that may go to `rest` because nothing says what they are.
GUESSED = 0.5


class Placed(NamedTuple):
    """A parameter, where `split` puts it, and why."""

    name: str
    param: Tensor
    choice: Choice
    reason: str
    guessed: bool = False
    view: Mapping[str, Any] | None = None


def split(
    model: nn.Module,
    matrix: tuple[Any, Mapping[str, Any]],
    rest: tuple[Any, Mapping[str, Any]],
    *,
    where: Mapping[str, Choice] | None = None,
    views: Mapping[str, Mapping[str, Any]] | None = None,
    verbose: bool = True,
) -> Any:
    """One optimizer with two rules: one for the hidden matrices of a model, one for everything else.

    When: Muon and other rules on matrices, which are not meant for embeddings, output layers, norms and biases.

        optimizer = steprule.split(model, matrix=(Muon, {"lr": 0.02}), rest=(AdamW, {"lr": 3e-4}))

    A hidden matrix is the weight of a Linear layer or a projection of attention, other than the output layer,
    the routers of experts, and one that shares its weight with an embedding; and of a convolution whose
    channels all meet, and of experts in one tensor. The table that is printed says for each parameter which
    rule it gets, how its matrices lie in it, and why.

    model: an nn.Module; tensors alone do not say what they are for. matrix, rest: a rule and its
    hyper-parameters, modifiers among them. where: patterns of names, such as {"*.router.weight": "rest"}, each
    with "matrix" or "rest"; the first one that matches decides. views: how matrices lie in weights, by patterns
    of names, such as {"*.qkv.weight": {"split": 3}}; a view has `flatten` (the first dimension against all
    others), `split` (into so many equal matrices along the rows, or along the columns with `dim` 1; or the rows
    of each matrix, as (4096, 1024, 1024) of grouped queries, keys and values) and `transpose`. Convolutions are
    flattened and a fused projection of torch's attention is split without it.
    verbose: whether to print the table.

    Raises: TypeError without a module or a rule, ValueError for a pattern that decides nothing, and if most of
    the weights would go to `rest` because nothing says what they are.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise group_errors.split_without_module(type(model).__name__)
    check_rule("split", "matrix", matrix)
    check_rule("split", "rest", rest)
    placed = _placed(model, matrix[0], dict(where or {}), dict(views or {}))
    weights = sum(_size(x.param) for x in placed)
    taken = sum(_size(x.param) for x in placed if x.choice == "matrix")
    guessed = [x for x in placed if x.guessed]
    lazy = any(is_lazy(x.param) for x in guessed)
    if lazy or sum(_size(x.param) for x in guessed) > GUESSED * max(1, weights):
        raise group_errors.split_misses_most([x.name for x in guessed], taken, weights)
    rules: Rules = {"matrix": matrix, "rest": rest}
    optimizer = matrix[0](_groups(placed, rules))
    if verbose:
        names = {choice: rule.__name__ for choice, (rule, _) in rules.items()}
        rows = [(x.name, shape_text(x.param), names[x.choice], x.reason + _seen(x)) for x in placed]
        print(as_columns(("parameter", "shape", "rule", "reason"), rows))
    return optimizer


def _seen(placed: Placed) -> str:
    """How the matrices lie in a parameter, for the table."""
    said = str(View(**placed.view)) if placed.view else ""
    return f" ({said})" if said else ""


def _groups(
    placed: list[Placed], rules: Mapping[Choice, tuple[Any, Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    for choice, (rule, options) in rules.items():
        own = [x for x in placed if x.choice == choice]
        group = {"name": choice, **options, "params": [(x.name, x.param) for x in own], "rule": rule}
        if any(x.view is not None for x in own):
            group["views"] = [x.view for x in own]
        groups += [group] if own else []
    return groups


def groups_of(
    rule: Any, model: nn.Module, rest: tuple[Any, Mapping[str, Any]] | None, kept: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The groups of a model for a rule on matrices; all else is stepped by AdamW or by `rest`.

    If the rule also says what vectors do, it steps all parameters, unless there is a `rest`. kept: how state
    and parameters are stored, which goes for AdamW, too.
    """
    if rest is not None:
        check_rule(rule.__name__, "rest", rest)
    alone = rest is None and rule.steps_vectors()
    placed = [_alone(x) if alone else x for x in _placed(model, rule, {}, {}, frozen=True)]
    groups = _groups(placed, {"matrix": (rule, {}), "rest": rest or (AdamW, kept)})
    for group in groups:
        del group["name"]
        if group["rule"] is rule:
            del group["rule"]
    return groups


def _alone(placed: Placed) -> Placed:
    return placed._replace(choice="matrix")


Matrix.groups_of = staticmethod(groups_of)


def _size(param: Tensor) -> int:
    return 0 if is_lazy(param) else param.numel()


def _placed(
    model: nn.Module,
    rule: Any,
    where: dict[str, Choice],
    views: dict[str, Mapping[str, Any]],
    frozen: bool = False,
) -> list[Placed]:
    for pattern, choice in where.items():
        if choice not in ("matrix", "rest"):
            raise errors.out_of_range("split", f"where['{pattern}']", choice, "'matrix' or 'rest'")
    params = known(model)
    placed: list[Placed] = []
    seen, used = first_matches("split", views, params), set[str | None]()
    for each, pattern, view in zip(params, first_matches("split", where, params), seen, strict=True):
        if not each.param.requires_grad and not frozen:
            continue
        if pattern is not None:
            found = Placed(each.name, each.param, where[pattern], f"matches '{pattern}'")
        elif each.kind in ("convolution", "experts") and not rule.on_matrices:
            found = _if_taken(each, rule)
        else:
            choice: Choice = "matrix" if each.kind in ("linear", "convolution", "experts") else "rest"
            found = Placed(each.name, each.param, choice, each.reason, each.kind == "unknown")
        own = views[view] if view is not None else each.view
        placed.append(found._replace(view=own if found.choice == "matrix" and rule.on_matrices else None))
        used |= {view} if placed[-1].view is not None else set()
    for pattern in views:
        if pattern not in used:
            own_names = [x.name for x, view in zip(params, seen, strict=True) if view == pattern]
            raise group_errors.view_of_no_matrix("split", pattern, own_names)
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
