"""Declaring a rule: errors come where the rule is written, with the nearest right name."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from rules import Case, SignedMomentum, assert_same, each, give_gradients, in_words, numbers, plain
from torch import nn

import steprule
from steprule import Elementwise, decay, hyper, scalar_slot, slot
from steprule.words import ema, sqrt, where


def weight() -> nn.Parameter:
    return nn.Parameter(numbers((3, 2), torch.float32, seed=1))


def one_step(rule: Any, **options: Any) -> nn.Parameter:
    param = weight()
    optimizer = rule([param], **options)
    param.grad = numbers((3, 2), torch.float32, seed=2)
    optimizer.step()
    return param


# What is wrong inside `update`


class MisspeltSlot(Elementwise):
    lr: float = hyper(0.1, at_least=0)
    momentum = slot("exp_avg")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        s.momentun = ema(s.momentum, g, 0.9)
        return -h.lr * s.momentum


class MisspeltSlotRead(MisspeltSlot):
    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        return -h.lr * s.momentun


class MisspeltHyper(Elementwise):
    lr: float = hyper(0.1, at_least=0)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        return -h.lrr * g


class IfOnANumber(Elementwise):
    lr: float = hyper(0.1, at_least=0)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        return -h.lr * g if g > 0 else h.lr * g


class IfOnT(Elementwise):
    lr: float = hyper(0.1, at_least=0)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        return -h.lr * g if t > 1 else -0.5 * h.lr * g


class IfOnAHyper(Elementwise):
    lr: float = hyper(0.1, at_least=0)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        return -h.lr * g if h.lr else 0.0 * g


class SlotSwitchedOff(Elementwise):
    lr: float = hyper(0.1, at_least=0)
    centered: bool = hyper(False)
    mean = slot("grad_avg", when="centered")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        s.mean = ema(s.mean, g, 0.9)
        return -h.lr * s.mean


WRONG_UPDATES = {
    MisspeltSlot: (AttributeError, r"no slot 'momentun'\. Did you mean 'momentum'\?"),
    MisspeltSlotRead: (AttributeError, r"no slot 'momentun'\. Did you mean 'momentum'\?"),
    MisspeltHyper: (AttributeError, r"no hyper-parameter 'h\.lrr'\. Did you mean 'lr'\?"),
    IfOnANumber: (TypeError, r"'if' on a value that differs per element: .* Use where\(condition, a, b\)"),
    IfOnT: (TypeError, r"'if' on .*\bt\b.*use where\(condition, a, b\)"),
    IfOnAHyper: (TypeError, r"'if' on .*\blr\b.*use where\(condition, a, b\)"),
    SlotSwitchedOff: (AttributeError, r"slot 'mean' exists only when centered is on.*if h\.centered"),
}


@pytest.mark.parametrize("rule", WRONG_UPDATES, ids=lambda rule: rule.__name__)
def test_a_wrong_update_is_refused_when_the_optimizer_is_made(rule: Any) -> None:
    error, message = WRONG_UPDATES[rule]
    with pytest.raises(error, match=rf"^{rule.__name__}\.update: {message}"):
        rule([weight()])


def test_a_misspelt_word_is_refused_at_its_import() -> None:
    with pytest.raises(ImportError, match=r"steprule\.words has no word 'emma'\. Did you mean 'ema'\?"):
        exec("from steprule.words import emma")
    with pytest.raises(ImportError, match=r"no word 'maximum'. Write larger\(x, y\)"):
        exec("from steprule.words import maximum")
    with pytest.raises(ImportError, match=r"no word 'max'. Write larger\(x, y\), or largest\(x\)"):
        exec("from steprule.words import max")
    with pytest.raises(ImportError, match=r"no word 'sigmoid'\. A rule is written with .*\bsqrt\b"):
        exec("from steprule.words import sigmoid")
    for name in ("pytest_plugins", "setUpModule", "__path__"):
        assert not hasattr(steprule.words, name), name


# What is wrong in the class


def state(**body: Any) -> Any:
    """A rule made from these declarations, as a class statement would make it."""

    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        return -h.lr * g

    annotations = body.pop("annotations", {"lr": "float"})
    whole = {"lr": hyper(0.1), "update": staticmethod(update), "__annotations__": annotations} | body
    return type("Mine", (Elementwise,), {"__module__": __name__, **whole})


def test_a_rule_can_be_stated_so() -> None:
    assert not torch.equal(one_step(state()), weight())


def no_self(h: Any, p: Any, g: Any) -> Any:
    return g


WRONG_CLASSES: dict[str, tuple[dict[str, Any], str]] = {
    "no type": ({"annotations": {}}, r"hyper-parameter 'lr' has no type.*lr: float = hyper\(default=0\.1\)"),
    "not static": ({"update": no_self}, "update must be a static method.*@staticmethod"),
    "other arguments": (
        {"update": staticmethod(no_self)},
        r"update takes 3 arguments \(h, p, g\).*update\(h, p, g, s, t\)",
    ),
    "step is taken": ({"count": slot("step")}, "'step' is reserved for the step count"),
    "a plain number": (
        {"__annotations__": {"lr": float}, "lr": 0.1},
        r"Write `lr: float = hyper\(default=0.1\)`",
    ),
    "one key twice": (
        {"a": slot("exp_avg"), "b": slot("exp_avg")},
        "slot key 'exp_avg' is taken.*a key of its own",
    ),
    "a switch that is not there": (
        {"centered": hyper(False), "annotations": {"lr": "float", "centered": "bool"}}
        | {"a": slot("grad_avg", when="centred")},
        r"slot 'a' refers to 'centred'.*Did you mean 'centered'\?",
    ),
    "a start that is not there": (
        {"a": slot("sum", starts="lrr")},
        r"slot 'a' refers to 'lrr'.*Did you mean 'lr'\?",
    ),
}


@pytest.mark.parametrize("kind", WRONG_CLASSES)
def test_a_wrong_class_is_refused_where_it_is_written(kind: str) -> None:
    body, message = WRONG_CLASSES[kind]
    with pytest.raises(TypeError, match=rf"^Mine: .*{message}"):
        state(**body)


def test_a_name_for_two_things() -> None:
    class Parent(Elementwise):
        lr: float = hyper(0.1)
        m = slot("exp_avg")

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
            return -h.lr * g

    with pytest.raises(TypeError, match="'m' is both a hyper-parameter and a slot"):
        type("Child", (Parent,), {"m": hyper(0.5), "__annotations__": {"m": "float"}} | update_of(Parent))


def update_of(rule: Any) -> dict[str, Any]:
    return {"update": staticmethod(rule.update), "__module__": __name__}


# A rule of the user's own


def test_the_users_rule_is_what_its_formula_says() -> None:
    case = Case(SignedMomentum)
    params = case.parameters()
    by_hand = [p.detach().double() for p in case.parameters()]
    moments = [torch.zeros_like(p) for p in by_hand]
    optimizer = SignedMomentum(params, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for number in range(5):
        give_gradients(case, optimizer, number)
        for place, param in enumerate(params):
            g = param.grad.double()
            step = torch.sign(0.9 * moments[place] + 0.1 * g)
            by_hand[place] = by_hand[place] * (1 - 0.01 * 0.1) - 0.01 * step
            moments[place] = 0.99 * moments[place] + 0.01 * g
        optimizer.step()
    for param, wanted in zip(params, by_hand, strict=True):
        torch.testing.assert_close(param.detach().double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_users_rule_equals_the_built_in_one() -> None:
    assert_same(
        one_step(SignedMomentum, lr=0.1, weight_decay=0.5).detach(),
        one_step(steprule.Lion, lr=0.1, weight_decay=0.5).detach(),
    )


class Everything(Elementwise):
    """A rule with one of each: a switch, a number, a pair, a choice of slots, a number per tensor.

    When: testing.

        v ← v + g², u ← u·ρ

    State: 1 or 2 numbers per parameter.
    Source: none.
    """

    lr: float = hyper(0.1, at_least=0, meaning="step size")
    pair: tuple[float, float] = hyper((0.5, 0.25), at_least=0, below=1, meaning="two numbers")
    keep: bool = hyper(False, meaning="keep the largest")
    power: float = hyper(0, at_least=0, switch=True, meaning="absent at 0")
    weight_decay: float = decay(0)

    v = slot("square", starts="lr")
    largest = slot("largest", when="keep")
    u = scalar_slot("product", starts=1.0)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        first, second = h.pair
        s.u = s.u * first
        s.v = s.v + g * g
        if h.keep:
            s.largest = where(s.largest > s.v, s.largest, s.v)
        change = -h.lr * g / (sqrt(s.v) + second)
        return change * s.u if h.power else change


@pytest.mark.parametrize("options", [{}, {"keep": True}, {"power": 2.0}, {"weight_decay": 0.1}])
def test_every_kind_of_declaration(options: dict[str, Any]) -> None:
    param = weight()
    optimizer = Everything([param], **options)
    param.grad = numbers((3, 2), torch.float32, seed=2)
    optimizer.step()
    state = optimizer.state[param]
    assert set(state) == {"step", "square", "product"} | ({"largest"} if options.get("keep") else set())
    assert state["product"].item() == 0.5
    g = param.grad + options.get("weight_decay", 0.0) * weight().detach()
    v = 0.1 + g * g
    change = -0.1 * g / (v.sqrt() + 0.25) * (0.5 if options.get("power") else 1.0)
    torch.testing.assert_close(param.detach(), weight().detach() + change)
    torch.testing.assert_close(state["square"], v)


def test_the_signature_of_the_users_rule() -> None:
    parameters = inspect.signature(Everything).parameters
    names = ["params", "lr", "pair", "keep", "power", "weight_decay"]
    assert list(parameters)[: len(names)] == names
    assert parameters["pair"].default == (0.5, 0.25)
    assert "tuple[float, float]" in str(parameters["pair"].annotation)
    assert parameters["maximize"].kind is inspect.Parameter.KEYWORD_ONLY


def test_a_subclass_may_change_a_default_add_an_option_and_a_slot() -> None:
    class Gentle(steprule.Adam):
        lr: float = hyper(0.5, at_least=0)

    assert inspect.signature(Gentle).parameters["lr"].default == 0.5
    assert Gentle([weight()]).param_groups[0]["lr"] == 0.5
    assert_same(one_step(Gentle).detach(), one_step(steprule.Adam, lr=0.5).detach())
    with pytest.raises(TypeError, match=r"^Gentle has no hyper-parameter 'qqq'"):
        Gentle([weight()], qqq=1)


def test_a_subclass_may_have_a_constructor_of_its_own() -> None:
    class Half(steprule.Adam):
        def __init__(self, params: Any, lr: float = 0.5):
            super().__init__(params, lr=lr / 2)

    assert Half([weight()]).param_groups[0]["lr"] == 0.25
    assert_same(one_step(Half).detach(), one_step(steprule.Adam, lr=0.25).detach())


# What a rule says about itself


@each(plain)
def test_a_description_comes_from_the_rule(case: Case) -> None:
    said = steprule.describe(case.rule)
    assert said.name == case.name
    for text in (said.summary, said.when, said.formula, said.state, said.source):
        assert text.strip()
    known = inspect.signature(case.rule).parameters
    assert {h.name for h in said.hyperparameters} <= set(known)
    for hyperparameter in said.hyperparameters:
        assert hyperparameter.default == known[hyperparameter.name].default
        assert hyperparameter.allowed
        assert hyperparameter.meaning
    optimizer = case.make()
    case.advance(optimizer)
    kept = {key for state in optimizer.state_dict()["state"].values() for key in state}
    assert kept - {"step", "noise_key"} <= set(said.slots) or case.closure


@each(lambda case: plain(case) and in_words(case.rule))
def test_a_description_counts_the_numbers_that_are_kept(case: Case) -> None:
    optimizer = case.make([nn.Parameter(torch.zeros(500, 4))])
    case.advance(optimizer)
    (state,) = optimizer.state.values()
    # One value per row or column is not counted.
    kept = [value for value in state.values() if torch.is_tensor(value) and value.shape == (500, 4)]
    assert steprule.describe(case.rule).numbers_per_parameter == len(kept)


def test_lbfgs_counts_its_history() -> None:
    assert steprule.describe(steprule.LBFGS).numbers_per_parameter == 2 * 100 + 2


def test_the_catalogue_is_complete_and_in_order() -> None:
    rules = steprule.catalogue()
    assert list(rules) == sorted(rules, key=str.lower)
    theirs = {
        name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer"
    }
    assert theirs <= set(rules)
    assert {"AMSGrad", "AdaBelief", "Sophia", "Lion"} <= set(rules)
    assert all(rules[name] is getattr(steprule, name) for name in rules)


@each(plain)
def test_help_shows_every_argument(case: Case) -> None:
    """With its default, its range and its meaning; what the rule's writer wrote comes first, once."""
    text = inspect.getdoc(case.rule)
    arguments = text.partition("Args:\n")[2]
    assert text.count("Args:") == 1
    for name, parameter in inspect.signature(case.rule).parameters.items():
        line = re.search(rf"^    {name}[ :].*(\n        .*)*", arguments, re.MULTILINE)
        assert line, name
        said = " ".join(line[0].split())
        if name != "params":
            field = case.rule.fields[name]
            assert f"default {parameter.default!r})" in said
            assert " ".join(field.meaning.split()) in said
            assert field.allowed in said or field.free or "bool" in field.type
    assert max(map(len, arguments.splitlines())) <= 100
    assert "Args" not in str(steprule.describe(case.rule))
    assert steprule.describe(case.rule).source.split()[-1] in text.partition("Args:\n")[0]


def test_help_of_the_users_rules() -> None:
    assert (
        "pair (tuple[float, float], default (0.5, 0.25)): two numbers; at least 0 and below 1."
        in Everything.__doc__
    )

    class Gentle(steprule.Adam):
        lr: float = hyper(0.5, at_least=0, meaning="slow")

    assert Gentle.__doc__.startswith(steprule.Adam.__doc__.partition("Args:")[0])
    assert "    lr (float, default 0.5): slow; at least 0.\n" in Gentle.__doc__
    assert steprule.describe(Gentle).summary == steprule.describe(steprule.Adam).summary
    assert state().__doc__.startswith("Args:\n    params: ")
    assert steprule.describe(state()).formula == ""


@each(plain)
def test_a_rule_is_described_by_its_name_or_an_optimizer(case: Case) -> None:
    if case.name in steprule.catalogue():
        for name in (case.name, case.name.lower(), f" {case.name.upper()} "):
            assert steprule.describe(name) == steprule.describe(case.rule)
    assert steprule.describe(case.make()) == steprule.describe(case.rule)


def test_what_is_no_rule_is_not_described() -> None:
    with pytest.raises(ValueError, match=r"^there is no rule 'adamww'\. Did you mean 'AdamW'\?"):
        steprule.describe("adamww")
    with pytest.raises(ValueError, match="The rules are AdaBelief, "):
        steprule.describe("qqq")
    for given in (torch.optim.AdamW, 3, None):
        with pytest.raises(TypeError, match="is not a rule of steprule"):
            steprule.describe(given)
