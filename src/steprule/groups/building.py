"""Parameter groups from a model: which parameters decay, and with which lr, by what they are.

With no_decay="auto" these do not decay: norms, biases and other vectors; embeddings, also where an output layer
shares them; raw parameters that are the same for every example (their first dimension is 1), as the position
tables and class tokens of vision models; and what the model names, with `no_weight_decay()` or
`no_weight_decay_keywords()` as models of timm do, or with `_no_weight_decay` set on the parameter.

Embeddings and tables decay in nanoGPT, torchtitan, timm (unless the model names them) and Hugging Face:
no_decay="vectors" makes the groups of these, except that Hugging Face decays vectors that are neither biases
nor of a LayerNorm.

Layers, for layer_decay, are counted through the model in the order in which it was built: first an encoder and
then a decoder, and likewise two towers side by side, where lr_mult may say it better.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from torch import nn
from torch.nn.parameter import is_lazy

from steprule import errors, group_errors
from steprule.engine.fields import Field
from steprule.groups.choices import as_columns, check_rule, first_matches
from steprule.groups.roles import Known, known
from steprule.groups.structure import depths

WHO = "groups.build"
SPARED = ("embedding", "norm", "vector", "table")
NOT_NEGATIVE, SHARE = Field(0.0, at_least=0), Field(1.0, above=0, at_most=1)
NoDecay: TypeAlias = Literal["auto", "vectors"] | Sequence[str] | Mapping[str, bool]


class Groups(list[dict[str, Any]]):
    """Parameter groups for any optimizer, and what was decided; `print` shows it as a table.

    table: for each parameter of the model, in its order, a dict with its name, shape, group, rule, lr,
    weight_decay and reason. It is plain data: `json.dumps(groups.table)` is for a configuration or a log. None
    is left to the optimizer; a parameter without a group is frozen.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], table: list[dict[str, Any]]):
        super().__init__(groups)
        self.table = table

    def __str__(self) -> str:
        head = ("parameter", "shape", "group", "lr", "decay", "reason")
        return as_columns(head, [_as_row(entry) for entry in self.table])


def _as_row(entry: Mapping[str, Any]) -> list[str]:
    shape = "no shape yet" if entry["shape"] is None else str(tuple(entry["shape"]))
    numbers = ("–" if x is None else f"{x:.4g}" for x in (entry["lr"], entry["weight_decay"]))
    return [entry["name"], shape, entry["group"] or "–", *numbers, entry["reason"]]


class _Chosen(NamedTuple):
    """What the parameters of a group have in common: the pattern of their rule, factors of lr, decay."""

    rule: str | None
    layer: int | None
    scale: float
    factor: float
    decays: bool


def build(
    model: nn.Module,
    *,
    weight_decay: float | None = None,
    no_decay: NoDecay = "auto",
    lr: float | None = None,
    lr_mult: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
    frozen: Literal["skip", "keep"] = "skip",
    rule: Mapping[str, tuple[Any, Mapping[str, Any]]] | None = None,
    verbose: bool = True,
) -> Groups:
    """Parameter groups of a model, by what its parameters are: what decays, and with which lr.

    When: weight decay or learning rates should not be the same for all parameters.

        optimizer = AdamW(steprule.groups.build(model, weight_decay=0.1), lr=3e-4)

    Any optimizer takes the groups, torch's too. The table that is printed says for each parameter its group and
    why. Patterns are of names, as in "blocks.*.bias"; the first one that matches decides.

    model: an nn.Module; tensors alone do not say what they are for. weight_decay, lr: None leaves them to the
    optimizer; what does not decay gets 0. no_decay: what that is:
        "auto"                  norms, biases and other vectors, embeddings, tables, and what the model names
        "vectors"               what has fewer than two dimensions, and what the model names
        ["*.bias", ...]         what matches, and nothing else
        {"*.wte.weight": False, "*.gate": True}
                                what matches decays (False) or does not (True); the rest as with "auto"
    lr_mult: factors of lr for what matches. layer_decay: the lr of a layer, as a part of that of the layer
    after it. The layers are the blocks of the longest list of equal ones; layer 0 has what comes before, the
    last one what comes after. timm's `group_matcher` decides where there is one. frozen: whether to "skip" or
    "keep" parameters that are not trained now. rule: for what matches, a rule of steprule and its
    hyper-parameters, as in {"*.mlp.*.weight": (Muon, {"lr": 0.02})}; for optimizers of steprule. verbose:
    whether to print the table.

    Raises: TypeError without a module or a rule, ValueError for values out of range, patterns that decide
    nothing, and layer_decay of a model without blocks.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise group_errors.build_without_module(type(model).__name__)
    if frozen not in ("skip", "keep"):
        raise errors.out_of_range(WHO, "frozen", frozen, "'skip' or 'keep'")
    weight_decay, lr = _number("weight_decay", weight_decay), _number("lr", lr)
    rules = dict(rule or {})
    for pattern, pair in rules.items():
        check_rule(WHO, f"rule['{pattern}']", pair)
    params = known(model)
    choices = _choices(model, params, no_decay, lr_mult or {}, layer_decay, rules)
    result = _grouped(zip(params, choices, strict=True), frozen == "skip", rules, weight_decay, lr)
    if verbose:
        print(result)
    return result


def _grouped(
    chosen: Iterable[tuple[Known, tuple[_Chosen, str]]],
    skip: bool,
    rules: Mapping[str, tuple[Any, Mapping[str, Any]]],
    weight_decay: float | None,
    lr: float | None,
) -> Groups:
    """The groups, in the order of their first parameters, and the table."""
    groups: dict[_Chosen, dict[str, Any]] = {}
    table: list[dict[str, Any]] = []
    for each, (choice, reason) in chosen:
        if not each.param.requires_grad and skip:
            table.append(_entry(each, {}, f"frozen; {reason}"))
            continue
        if choice not in groups:
            groups[choice] = _group(choice, rules, weight_decay, lr, [x["name"] for x in groups.values()])
        groups[choice]["params"].append((each.name, each.param))
        table.append(_entry(each, groups[choice], reason))
    return Groups(list(groups.values()), table)


def _number(what: str, value: Any, allowed: Field = NOT_NEGATIVE) -> Any:
    """Refuse what is no number in a range."""
    return None if value is None else allowed.named(what, "float").check(WHO, value, None)


def _choices(
    model: nn.Module,
    params: Sequence[Known],
    no_decay: NoDecay,
    lr_mult: Mapping[str, float],
    layer_decay: float | None,
    rules: Mapping[str, Any],
) -> Iterator[tuple[_Chosen, str]]:
    """For each parameter what decides its group, and why."""
    factors = {x: float(_number(f"lr_mult['{x}']", factor)) for x, factor in lr_mult.items()}
    layer_decay = _number("layer_decay", layer_decay, SHARE)
    first = {id(x.param) for x in params if x.kind in ("embedding", "table")}
    layers = {} if layer_decay is None else depths(model, first)
    last = max(layers.values(), default=0)
    decay = _decay(model, params, no_decay)
    ruled = first_matches(f"{WHO}, rule", rules, params)
    multiplied = first_matches(f"{WHO}, lr_mult", factors, params)
    for each, rule, pattern, (decays, why) in zip(params, ruled, multiplied, decay, strict=True):
        reasons, factor, scale = [why], 1.0, 1.0
        if rule is not None:
            reasons.append(f"'{rule}' of rule")
        if pattern is not None:
            factor = factors[pattern]
            reasons.append(f"'{pattern}' of lr_mult")
        layer = layers.get(id(each.param))
        if layer is not None and layer_decay is not None:
            scale = layer_decay ** (last - layer)
            reasons.append(f"layer {layer} of {last}")
        yield _Chosen(rule, layer, scale, factor, decays), "; ".join(reasons)


def _decay(model: nn.Module, params: Sequence[Known], no_decay: Any) -> list[tuple[bool, str]]:
    """For each parameter whether it decays, and why."""
    named = _named_by_the_model(model)
    if no_decay in ("auto", "vectors"):
        return [_by_kind(x, named.get(id(x.param)), no_decay == "vectors") for x in params]
    if isinstance(no_decay, str) or not isinstance(no_decay, (Mapping, list, tuple)):
        allowed = "'auto', 'vectors', a list of patterns, or a dict {pattern: True or False}"
        raise errors.out_of_range(WHO, "no_decay", no_decay, allowed)
    given = cast("Mapping[str, bool] | Sequence[str]", no_decay)
    spared = given if isinstance(given, Mapping) else dict.fromkeys(given, True)
    for pattern, value in spared.items():
        if value not in (True, False):
            raise errors.out_of_range(WHO, f"no_decay['{pattern}']", value, "True or False")
    found: list[tuple[bool, str]] = []
    for each, pattern in zip(params, first_matches(f"{WHO}, no_decay", spared, params), strict=True):
        if pattern is not None:
            found.append((not spared[pattern], f"'{pattern}' of no_decay"))
        elif isinstance(given, Mapping):
            found.append(_by_kind(each, named.get(id(each.param)), False))
        else:
            found.append((True, "no pattern of no_decay"))
    return found


def _by_kind(each: Known, named: str | None, by_shape: bool) -> tuple[bool, str]:
    """Whether a parameter decays by itself, and why."""
    if named is not None:
        return False, named
    if by_shape and not is_lazy(each.param):
        return each.param.ndim > 1, errors.counted(each.param.ndim, "dimension")
    return each.kind not in SPARED, each.reason


def _named_by_the_model(model: nn.Module) -> dict[int, str]:
    """What the model says should not decay, by id, and how it says so."""
    found = {id(x): "_no_weight_decay" for x in model.parameters() if getattr(x, "_no_weight_decay", False)}
    for module in model.modules():
        names, words = _said(module, "no_weight_decay"), _said(module, "no_weight_decay_keywords")
        for name, param in module.named_parameters() if names or words else ():
            if any(fnmatch.fnmatchcase(name, x) for x in names) or any(word in name for word in words):
                found.setdefault(id(param), f"no_weight_decay of {type(module).__name__}")
    return found


def _said(module: nn.Module, method: str) -> set[str]:
    """What a method of the module returns, if there is one."""
    say: Any = getattr(module, method, None)
    given: Any = say() if callable(say) else None
    if isinstance(given, str):
        return {given}
    if not (given is None or isinstance(given, Iterable)):
        raise group_errors.names_expected(f"{type(module).__name__}.{method}", given)
    return set(cast("Iterable[str]", given or ()))


def _group(
    chosen: _Chosen,
    rules: Mapping[str, tuple[Any, Mapping[str, Any]]],
    weight_decay: float | None,
    lr: float | None,
    taken: Sequence[str],
) -> dict[str, Any]:
    """A group without its parameters."""
    rule, options = rules[chosen.rule] if chosen.rule is not None else (None, dict[str, Any]())
    lr, factor = options.get("lr", lr), chosen.factor * chosen.scale
    if lr is None and factor != 1:
        raise group_errors.no_lr_to_multiply()
    parts = [rule.__name__.lower()] if rule is not None else []
    parts += [f"layer_{chosen.layer}"] if chosen.layer is not None else []
    parts += [f"lr_x{chosen.factor:g}"] if chosen.factor != 1 else []
    name = "_".join([*parts, "decay" if chosen.decays else "no_decay"])
    same = sum(x == name or x.startswith(f"{name}:") for x in taken)
    group = {"name": f"{name}:{same + 1}" if same else name, **options}
    if rule is not None:
        group["rule"] = rule
    if lr is not None:
        group["lr"] = lr if factor == 1 else lr * factor
    if not chosen.decays:
        group["weight_decay"] = 0.0
    elif weight_decay is not None:
        group.setdefault("weight_decay", weight_decay)
    return {**group, "params": []}


def _entry(each: Known, group: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """What the table says of a parameter, as plain data."""
    rule: Any = group.get("rule")
    return {
        "name": each.name,
        "shape": None if is_lazy(each.param) else list(each.param.shape),
        "group": group.get("name"),
        "rule": None if rule is None else rule.__name__,
        "lr": _plain(group.get("lr")),
        "weight_decay": _plain(group.get("weight_decay")),
        "reason": reason,
    }


def _plain(value: Any) -> float | None:
    return None if value is None else float(getattr(value, "weight_decay", value))
