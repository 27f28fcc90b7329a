"""Which rule and which modifiers a group names: by class or instance when given, by name in the group."""

from __future__ import annotations

from typing import Any, cast

from steprule import rule_errors
from steprule.engine.modifier import ModifierBase


class Parts:
    """The classes that the groups of one optimizer name, by these names."""

    def __init__(self, own: type):
        self._own = own
        self.rules: dict[str, Any] = {own.__name__: own}
        self.modifiers: dict[str, Any] = {}

    def copy(self) -> Parts:
        """Another one with the same names."""
        new = Parts(self._own)
        new.rules, new.modifiers = dict(self.rules), dict(self.modifiers)
        return new

    def read(self, group: dict[str, Any], index: int | None) -> dict[str, Any]:
        """The group with names and values in place of classes and instances.

        Raises: TypeError or ValueError for what is no rule or modifier, and for modifiers that make no sense
        together.
        """
        group = dict(group)
        if group.get("rule") is None:
            group.pop("rule", None)
        else:
            group["rule"] = self._rule(group["rule"], index)
        if group.get("modifiers") is not None:
            group |= self._modifiers(group, index)
        return group

    def _rule(self, given: Any, index: int | None) -> str:
        who = self._own.__name__
        rule: Any = self.rules.get(given) if isinstance(given, str) else given
        if not is_rule(rule):
            raise rule_errors.no_rule_for_group(who, given, list(self.rules), index)
        methods: list[str] = rule.own_methods()
        if methods and not issubclass(self._own, rule):
            raise rule_errors.rule_with_methods(who, rule.__name__, methods[0], index)
        if self.rules.setdefault(rule.__name__, rule) is not rule:
            raise rule_errors.two_of_one_name(who, rule.__name__, index)
        return rule.__name__

    def _modifiers(self, group: dict[str, Any], index: int | None) -> dict[str, Any]:
        who, given = self._own.__name__, group["modifiers"]
        entries = list(cast("list[Any]", given)) if isinstance(given, (list, tuple)) else [given]
        kinds: list[Any] = []
        values: dict[str, Any] = {}
        for entry in entries:
            kind = self._kind(entry, index)
            if kind in kinds:
                raise rule_errors.modifier_twice(who, kind.__name__, index)
            kinds.append(kind)
            own = entry.values if isinstance(entry, ModifierBase) else {}
            for name, field in kind.fields.items():
                key = f"{kind.name}.{name}"
                values[key] = group.get(key, own.get(name, field.default))
        self._check_together(self.rules[group.get("rule", who)], kinds, index)
        return {**values, "modifiers": tuple(kind.name for kind in kinds)}

    def _kind(self, entry: Any, index: int | None) -> Any:
        who = self._own.__name__
        kind = self.modifiers.get(entry) if isinstance(entry, str) else entry
        kind = type(kind) if isinstance(kind, ModifierBase) else kind
        if not (isinstance(kind, type) and issubclass(kind, ModifierBase)):
            raise rule_errors.no_modifier(who, entry, index)
        if self.modifiers.setdefault(kind.name, kind) is not kind:
            raise rule_errors.two_of_one_name(who, kind.__name__, index)
        return kind

    def _check_together(self, rule: Any, kinds: list[Any], index: int | None) -> None:
        """Refuse modifiers that make no sense together, or with the rule."""
        with_weights = [x.__name__ for x in (rule, *kinds) if hasattr(x, "evaluate")]
        if len(with_weights) > 1:
            first, second, *_ = with_weights
            reason = "each has weights of its own to evaluate with."
            raise rule_errors.not_together(self._own.__name__, second, first, reason, index)
        names = {base.__name__ for base in (*rule.__mro__, *kinds)}
        for kind in kinds:
            if rule.gradients == "rows only":
                reason = "it steps single rows, and modifiers need whole tensors. Leave the modifiers out."
                raise rule_errors.not_together(self._own.__name__, kind.__name__, rule.__name__, reason, index)
            for other, reason in kind.not_with.items():
                if other in names:
                    raise rule_errors.not_together(self._own.__name__, kind.__name__, other, reason, index)


def is_rule(given: object) -> bool:
    """Whether this is a class whose step is declared."""
    return isinstance(given, type) and bool(getattr(given, "states_a_step", bool)())
