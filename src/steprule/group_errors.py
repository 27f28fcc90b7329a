"""Messages about parameter groups: which parameters a model has, what they are, and which patterns match."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from steprule import errors

# Groups from a model


def split_without_module(kind: str):
    """Tensors where only a module can say what they are for."""
    return TypeError(
        f"split: got {kind}, must be an nn.Module: tensors alone do not say which of them are hidden "
        "matrices. Pass the model, or write the groups yourself, as in [{'params': ..., 'rule': Muon}, ...]."
    )


def not_a_rule(who: str, what: str, given: object):
    """Something else than a rule and its hyper-parameters."""
    return TypeError(
        f"{who}: {what} = {given!r}, must be a rule and a dict of its hyper-parameters, as in "
        "(steprule.AdamW, {'lr': 1e-3}). Rules that call the loss again need their own optimizer."
    )


def decided_elsewhere(who: str, what: str, key: str):
    """`params` or `rule` among the hyper-parameters."""
    return ValueError(
        f"{who}: {what} has '{key}', which {who} decides. Leave it out, or write another pattern."
    )


def split_misses_most(names: list[str], taken: int, weights: int):
    """A model most of whose weights would not get the rule for matrices."""
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return ValueError(
        f"split: only {taken:,} of {weights:,} weights are known to be hidden matrices. Say with "
        f"where={{pattern: 'matrix' or 'rest'}} what these are: {shown}."
    )


def build_without_module(kind: str):
    """Tensors where only a module can say what they are for."""
    return TypeError(
        f"groups.build: got {kind}, must be an nn.Module: tensors alone do not say what they are for. Pass the "
        "model, or write the groups yourself, as in [{'params': ..., 'weight_decay': 0.0}, ...]."
    )


def no_lr_to_multiply():
    """A factor for a learning rate that is not known."""
    return ValueError(
        "groups.build: lr_mult and layer_decay need the lr that they multiply. Give lr=, here and not only to "
        "the optimizer."
    )


def no_blocks(model: str):
    """Layer-wise learning rates for a model without layers."""
    return ValueError(
        f"groups.build: layer_decay needs a ModuleList or Sequential of blocks of one type, and {model} has "
        "none. Give lr_mult={pattern: factor} instead."
    )


def names_expected(method: str, given: object):
    """Something else than names from `no_weight_decay` of a model."""
    return TypeError(
        f"groups.build: {method}() returned {given!r}, must return names of parameters, as in {{'cls_token'}}."
    )


# Patterns


def pattern_comes_too_late(who: str, pattern: str, before: list[str]):
    """A pattern all of whose parameters another one has decided."""
    shown = ", ".join(f"'{x}'" for x in before)
    return ValueError(
        f"{who}: '{pattern}' decides nothing, because {shown} comes first and matches the same parameters. Put "
        f"'{pattern}' before it."
    )


def pattern_matches_nothing(who: str, pattern: str, names: Sequence[str]):
    """A pattern that is probably misspelt."""
    near = difflib.get_close_matches(pattern, _patterns_for(names), 2)
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return ValueError(f"{who}: no parameter matches '{pattern}'. {hint}There are: {shown}.")


def _patterns_for(names: Iterable[str]) -> list[str]:
    """The patterns that one would write for these names, and the names."""
    found: dict[str, None] = dict.fromkeys(names)
    for name in list(found):
        parts = ["*" if part.isdecimal() else part for part in name.split(".")]
        found[".".join(parts)] = None
        for i, part in enumerate(parts):
            if part != "*":
                found |= dict.fromkeys([".".join(["*", *parts[i:]]), ".".join([*parts[: i + 1], "*"])])
    return list(found)


# Whether an optimizer has the parameters of a model


def audit_without_module(kind: str):
    """Something else in place of a model."""
    return TypeError(f"audit: got {kind}, must be an nn.Module and an optimizer: audit(model, optimizer).")


def audit_without_optimizer(kind: str):
    """Something else in place of an optimizer."""
    return TypeError(
        f"audit: got {kind}, which has no param_groups; must be an optimizer, or a list of several. Make the "
        "optimizer first, then compare it with the model."
    )


def audit_failed(findings: Mapping[str, Iterable[str]]):
    """Parameters that the optimizer lacks, or should not have."""
    parts = [f"{why}: {errors.listed(map(repr, names))}" for why, names in findings.items()]
    return ValueError(
        f"audit: {'; '.join(parts)}. Correct the groups; print(steprule.audit(model, optimizer)) shows all of "
        "them with their groups."
    )


# Groups that step together


def sums_wait(who: str, groups: Sequence[int]):
    """Groups that take the same sums over all parameters in another order."""
    listed = " and ".join(map(str, groups))
    return RuntimeError(
        f"{who}: parameter groups {listed} take the same sums over all parameters in another order, so that "
        "each waits for the others. List their modifiers in the same order, or give each group an optimizer."
    )


# What matrices lie in a parameter


def rest_without_module(who: str):
    """A rule for all but the matrices, where nothing says which those are."""
    return TypeError(f"{who}: rest needs a model that says which parameters are matrices. Pass the nn.Module.")


def vector_for_matrices(who: str, name: str, shape: tuple[int, ...], group: int | None):
    """A vector or a single number for a rule that only says what matrices do."""
    return ValueError(
        f"{who} steps matrices, but {name} has shape {shape}{errors.in_group(group)}. "
        "Give it a group with another rule, such as AdamW."
    )


def other_views(who: str, name: str, saved: str, current: str):
    """A checkpoint of weights whose matrices were seen in another way."""
    return errors.checkpoint(
        who,
        f"the matrices in {name} were saved with the views '{saved}', and now are '{current}'",
        "Give the same views, or load with strict=False to go on with the new ones.",
    )


def view_of_no_matrix(who: str, pattern: str, names: list[str]):
    """A view of weights that another rule steps."""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return ValueError(
        f"{who}: views: '{pattern}' decides nothing, because the rule for matrices does not step {shown}. Say "
        "with where={pattern: 'matrix'} that it should, or leave the view out."
    )


def wrong_view(who: str, given: str, allowed: str, group: int | None):
    """A view of weights that does not exist, or that does not fit the weight."""
    return ValueError(f"{who}: views: {given}, must be {allowed}{errors.in_group(group)}.")


def not_in_pieces(who: str, reason: str, group: int):
    """A rule that needs all of a weight, given one with matrices of unequal sizes."""
    return ValueError(
        f"{who}: views: matrices of unequal sizes cannot be stepped apart, because {reason}"
        f"{errors.in_group(group)}. Give `split` as one number, into equal matrices such as heads."
    )
