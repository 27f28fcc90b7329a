"""Messages about parameter groups: which parameters a model has, what they are, and which patterns match."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from steprule import errors

# Splitting a model


def split_without_module(kind: str):
    """Tensors where only a module can say what they are for."""
    return TypeError(
        f"split: got {kind}, must be an nn.Module: tensors alone do not say which of them are hidden "
        "matrices. Pass the model, or write the groups yourself, as in [{'params': ..., 'rule': Muon}, ...]."
    )


def split_without_rule(choice: str, given: object):
    """Something else than a rule and its hyper-parameters."""
    return TypeError(
        f"split: {choice} = {given!r}, must be a rule and a dict of its hyper-parameters, as in "
        f"{choice}=(steprule.AdamW, {{'lr': 1e-3}}). Rules that call the loss again need their own optimizer."
    )


def split_decides(choice: str, key: str):
    """`params` or `rule` among the hyper-parameters."""
    return ValueError(f"split: {choice} has '{key}', which split decides. Leave it out, or use where={{…}}.")


def pattern_comes_too_late(who: str, pattern: str, before: list[str]):
    """A pattern all of whose parameters another one has decided."""
    shown = ", ".join(f"'{x}'" for x in before)
    return ValueError(
        f"{who}: '{pattern}' decides nothing, because {shown} comes first and matches the same parameters. Put "
        f"'{pattern}' before it."
    )


def pattern_matches_nothing(who: str, pattern: str, names: list[str]):
    """A pattern that is probably misspelt."""
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return ValueError(f"{who}: no parameter matches '{pattern}'. There are: {shown}.")


def split_misses_most(names: list[str], taken: int, weights: int):
    """A model most of whose weights would not get the rule for matrices."""
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return ValueError(
        f"split: only {taken:,} of {weights:,} weights are known to be hidden matrices. Say with "
        f"where={{pattern: 'matrix' or 'rest'}} what these are: {shown}."
    )


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
