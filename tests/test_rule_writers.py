"""Errors of people who write rules: the message names the rule, the line and what to write instead."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import steprule
from steprule.matrix.words import transpose
from steprule.words import is_matrix

HEAD = """
import math
import numpy as np
import torch
from steprule import Elementwise, GenericAdaptiveOptimizer, decay, hyper, scalar_slot, slot
from steprule.words import *
from steprule.words import where

class Mine(Elementwise):
    lr: float = hyper(0.1, at_least=0)
    betas: tuple[float, float] = hyper((0.9, 0.99), at_least=0, below=1)
    momentum: float = hyper(0.9, at_least=0)
    centered: bool = hyper(False)
    n: int = hyper(3, at_least=1)

    m = slot("exp_avg")
    c = slot("grad_avg", when="centered")
    u = scalar_slot("product", starts=1.0)

    @staticmethod
    def update(h, p, g, s, t):
"""

# The lines of an `update`, the wrong one marked; what has to be in the message.
WRONG: dict[str, tuple[str, tuple[str, ...]]] = {
    "math.sqrt": ("return -h.lr * math.sqrt(g)  # here", ("Write sqrt(…), imported from steprule.words",)),
    "math.exp of h": ("x = math.exp(h.lr)  # here\nreturn x * g", ("Write exp(…)",)),
    "math.floor": ("return math.floor(t / 10) * g  # here", ("steprule.words", "where")),
    "torch.tanh": ("return -h.lr * torch.tanh(g)  # here", ("steprule.words", "sqrt", "clamp")),
    "torch.sqrt": ("s.m = torch.sqrt(g)  # here\nreturn g", ("Write sqrt(…)",)),
    "torch.max": ("return torch.maximum(p, g)  # here", ("Write larger(x, y)",)),
    "torch.where": ("return torch.where(g > 0, g, p)  # here", ("Write where(…)",)),
    "torch.zeros_like": ("return g + torch.zeros_like(g)  # here", ("steprule.words",)),
    "numpy.sqrt": ("return np.sqrt(g)  # here", ("Write sqrt(…)",)),
    "numpy.tanh": ("return np.tanh(g)  # here", ("steprule.words",)),
    "float": ("return float(g)  # here", ("steprule.words",)),
    "int": ("return int(t) * g  # here", ("steprule.words",)),
    "round": ("return round(g)  # here", ("steprule.words",)),
    "max": ("return max(p, g)  # here", ("larger(a, b)",)),
    "min of h": ("return min(1.0, h.lr) * g  # here", ("h.lr < 1.0", "smaller")),
    "sum": ("return sum(g)  # here", ("iterable", "steprule.words")),
    "index": ("return g[0]  # here", ("subscript", "steprule.words")),
    "set an element": ("g[0] = 0  # here\nreturn g", ("item assignment", "steprule.words")),
    "for": ("for x in g:  # here\n    s.m = x\nreturn g", ("iterable", "steprule.words")),
    "range": ("for i in range(h.n):  # here\n    s.m = g\nreturn g", ("integer", "steprule.words")),
    "while": ("while g > 0:  # here\n    g = g - 1\nreturn g", ("where(condition, a, b)",)),
    "len": ("return g / len(g)  # here", ("len", "steprule.words")),
    "if on a value": ("if g > 0:  # here\n    return g\nreturn -g", ("where(condition, a, b)",)),
    "if on h": ("if h.momentum:  # here\n    return g\nreturn -g", ("h.momentum", "where(", "switch=True")),
    "if on t": ("return g if t < 10 else -g  # here", ("t < 10", "where(")),
    "and": ("return where(g > 0 and p > 0, g, p)  # here", ("'and'", "multiply conditions")),
    "not": ("return where(not g, g, p)  # here", ("'not'",)),
    "a chain": ("return where(0 < g < 1, g, p)  # here", ("a < x < b",)),
    "&": ("return where((g > 0) & (p > 0), g, p)  # here", ("&", "a * b for 'and'")),
    "%": ("return where(g % 10 == 0, g, 0.0)  # here", ("%", "steprule.words")),
    "@": ("return g @ p  # here", ("@", "steprule.declare.Matrix")),
    "a method": ("return g.sqrt()  # here", ("'.sqrt'", "Write sqrt(…)")),
    "another method": ("return g.tanh()  # here", ("'.tanh'", "steprule.words")),
    "in place": ("g.add_(p)  # here\nreturn g", ("'.add_'", "in place", "Write x + y")),
    "an attribute": ("return g / g.shape[0]  # here", ("'.shape'", "steprule.words")),
    "a handle": ("return g / p.handle.shape[0]  # here", ("'shape'", "matrix_word")),
    "h called": ("return -h.lr() * g  # here", ("callable", "steprule.words")),
    "in a helper": ("def half(x):\n    return float(x) / 2\nreturn half(g)  # here", ("steprule.words",)),
    "item": ("return g * s.m.item()  # here", ("'.item'",)),
    "an attribute set": ("g.data = p  # here\nreturn g", ("data", "steprule.words")),
    "misspelt h": ("return -h.lrr * g  # here", ("no hyper-parameter 'h.lrr'", "Did you mean 'lr'?")),
    "h like a dict": ("return -h['lr'] * g  # here", ("Write h.name",)),
    "h assigned": ("h.lr = 0.1  # here\nreturn g", ("h.lr", "hyper-parameters belong to the user")),
    "misspelt slot": ("return -h.lr * s.mm  # here", ("no slot 'mm'", "Did you mean 'm'?")),
    "a slot that is not there": ("s.velocity = g  # here\nreturn g", ("no slot 'velocity'", "Allowed are")),
    "a slot switched off": ("return -h.lr * s.c  # here", ("only when centered is on", "if h.centered")),
    "scalar_slot of a value": ("s.u = s.u * g  # here\nreturn g", ("scalar_slot",)),
    "a slot of text": ("s.m = 'a'  # here\nreturn g", ("'a' (a str)", "not a number")),
    "a slot of None": ("s.m = None  # here\nreturn g", ("None", "not a number")),
    "a slot of a list": ("s.m = [g]  # here\nreturn g", ("a list", "not a number")),
    "a tensor": ("return g * torch.ones(3)  # here", ("a Tensor is not a number",)),
    "a tensor first": ("return torch.ones(()) * g  # here", ("a Tensor is not a number",)),
    "an array": ("return g * np.ones(3)  # here", ("an ndarray is not a number",)),
    "text": ("return g + 'a'  # here", ("'a' (a str) is not a number",)),
    "None": ("return g * None  # here", ("None is not a number",)),
    "h and text": ("return g * (h.lr + 'a')  # here", ("'a' (a str) is not a number",)),
    "complex": ("return g * 1j  # here", ("1j (a complex)",)),
    "a tuple": ("return g * h.betas  # here", ("a tuple",)),
    "sqrt of None": ("return g * sqrt(None)  # here", ("None",)),
    "where without else": ("return where(g > 0, g)  # here", ("where()", "'b'")),
    "ema without beta": ("s.m = ema(s.m, g)  # here\nreturn g", ("ema()", "beta")),
    "twice reduced": ("return g / norm(norm(g))  # here", ("norm(…) of a value that is one per tensor",)),
    "reduced plain": ("return g * mean(h.lr)  # here", ("Drop mean",)),
    "clamp by a tuple": ("return clamp(g, (0, 1), 2)  # here", ("a tuple",)),
    "no return": ("s.m = g", ("returned None", "return -h.lr * g")),
    "p assigned": ("p -= h.lr * g", ("returned None", "p is not changed in place")),
    "p changed in place": ("p -= h.lr * g\nreturn p", ("returned p", "not changed in place", "becomes(")),
    "p scaled in place": ("p *= 1 - h.lr\np += -h.lr * g\nreturn p", ("not changed in place",)),
    "p made new": (
        "p = p - h.lr * g\nreturn p",
        ("returned p, or p plus something", "change alone", "becomes("),
    ),
    "p minus a change": ("return p - h.lr * g", ("returned p, or p plus something",)),
    "p plus a change": ("u = -h.lr * g\nreturn p + u", ("returned p, or p plus something",)),
    "a change plus p": ("u = -h.lr * g\nreturn u + p", ("returned p, or p plus something",)),
    "p minus several": ("p = p - h.lr * s.m\np = p - g\nreturn p + 1", ("returned p, or p plus something",)),
    "p": ("return p", ("returned p, or p plus something",)),
    "p in a tuple": ("return -g, p", ("returned p, or p plus something",)),
    "returns a comparison": ("return g > 0", ("returned a condition",)),
    "returns a comparison in a tuple": ("return -g, g != p", ("a tuple with a condition in it",)),
    "becomes plus": ("return becomes(p - g) + 1  # here", ("inside the parentheses",)),
    "minus becomes": ("return -becomes(g)  # here", ("inside the parentheses",)),
    "a word of becomes": ("return sqrt(becomes(g))  # here", ("inside the parentheses",)),
    "becomes in a slot": ("s.m = becomes(g)  # here\nreturn g", ("inside the parentheses",)),
    "returns True": ("return True", ("returned a condition", "the change to the parameter")),
    "returns a condition": ("return t > 3", ("returned a condition",)),
    "returns text": ("return 'done'", ("returned a str",)),
    "returns a list": ("return [g, p]", ("returned a list", "tuple")),
    "returns a tensor": ("return torch.ones(3)", ("returned a Tensor",)),
    "returns nothing in a tuple": ("return ()", ("an empty tuple",)),
    "returns None in a tuple": ("return g, None", ("a tuple with None in it",)),
    "becomes in a tuple": ("return g, becomes(p)", ("becomes(…) inside a tuple", "return becomes(value)")),
    "becomes nothing": ("return becomes(None)", ("None", "not a number")),
    "yields": ("yield g", ("returned a generator",)),
    "1 / 0": ("return g * (1 / 0)  # here", ("division by zero",)),
    "a name": ("return -h.lr * gradient  # here", ("'gradient' is not defined",)),
    "a name before it is set": ("x = x + g  # here\nreturn x", ("x",)),
    "raises": ("raise RuntimeError('stop')  # here", ("stop",)),
    "raises with two arguments": ("raise OSError(2, 'gone')  # here", ("gone",)),
    "a key": ("return {'a': g}['b']  # here", ("'b'",)),
    "an assertion": ("assert isinstance(g, torch.Tensor), 'a tensor'  # here\nreturn g", ("a tensor",)),
    "itself": ("return Mine.update(h, p, g, s, t)  # here", ("recursion",)),
    "an optimizer inside": ("return Mine([torch.ones(1)])  # here", ("recursion",)),
}


def module_of(text: str, folder: Path) -> Any:
    file = folder / "mine.py"
    file.write_text(text)
    found: Any = importlib.util.spec_from_file_location("mine", file)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_update_is_named_with_its_line(kind: str, tmp_path: Path) -> None:
    body, wanted = WRONG[kind]
    text = HEAD + "".join(f"        {line}\n" for line in body.splitlines())
    rule = module_of(text, tmp_path).Mine
    with pytest.raises(Exception) as caught:  # noqa: PT011
        rule([nn.Parameter(torch.ones(2, 2))])
    message = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "Mine.update" in message
    for part in wanted:
        assert part in message, message
    lines = text.splitlines()
    line = next(
        (i for i, x in enumerate(lines) if "# here" in x), lines.index("    def update(h, p, g, s, t):") - 1
    )
    assert re.search(rf"line {line + 1} of {re.escape(str(tmp_path))}", message), message


def test_the_type_of_an_error_stays_and_its_cause_can_be_caught(tmp_path: Path) -> None:
    text = HEAD + "        return g * (1 / 0)\n"
    with pytest.raises(ZeroDivisionError):
        module_of(text, tmp_path).Mine([nn.Parameter(torch.ones(2))])


@pytest.mark.parametrize("runner", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_a_number_that_cannot_be_computed_names_the_rule(runner: dict[str, Any], tmp_path: Path) -> None:
    text = HEAD + "        return g * (h.lr / (t - 2))\n"
    param = nn.Parameter(torch.ones(2))
    optimizer = module_of(text, tmp_path).Mine([param], **runner)
    param.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(ZeroDivisionError, match=r"^Mine\.update: .*zero.*line \d+ of .*mine\.py"):
        optimizer.step()


def test_a_new_group_is_checked_before_it_is_added(tmp_path: Path) -> None:
    text = HEAD + "        if h.centered:\n            return s.centre\n        return g\n"
    optimizer = module_of(text, tmp_path).Mine([nn.Parameter(torch.ones(2))])
    with pytest.raises(AttributeError, match=r"^Mine\.update: no slot 'centre'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "centered": True})
    assert len(optimizer.param_groups) == 1


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    for word in ("sqrt", "exp"):
        with pytest.raises(TypeError, match=rf"Write {word}\(…\)"):
            module_of(HEAD + f"        return {' ' * len(word)}math.{word}(g)\n", tmp_path).Mine(
                [nn.Parameter(torch.ones(2))]
            )


# Whole classes, and what their message has in it

CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "no update": (
        "lr: float = hyper(0.1)",
        ("Mine has no update", "@staticmethod", "def update(h, p, g, s, t)"),
    ),
    "misspelt update": (
        "@staticmethod\ndef updat(h, p, g, s, t): return g",
        ("has no update", "Is 'updat' meant"),
    ),
    "not static": (
        "def update(h, p, g, s, t): return g",
        ("update must be a static method", "@staticmethod", "line 10"),
    ),
    "self": ("@staticmethod\ndef update(self, p, g, s, t): return g", ("update(h, p, g, s, t)", "line 10")),
    "other order": ("@staticmethod\ndef update(h, g, p, s, t): return g", ("(h, g, p, s, t)", "line 10")),
    "three arguments": (
        "@staticmethod\ndef update(h, p, g): return g",
        ("update takes 3 arguments (h, p, g)", "line 10"),
    ),
    "by keyword": (
        "@staticmethod\ndef update(h, p, g, s, *, t): return g",
        ("It must be update(h, p, g, s, t)",),
    ),
    "no function": ("update = staticmethod(3)", ("update is 3",)),
    "default out of range": (
        "lr: float = hyper(-1.0, at_least=0)",
        ("Mine: lr = -1.0, must be at least 0", "its default"),
    ),
    "a list": ("betas: tuple = hyper([0.9, 0.99])", ("[0.9, 0.99]", "Write a tuple: (0.9, 0.99)")),
    "a dict": ("lr: float = hyper({})", ("lr = {}, must be a number", "its default")),
    "text without choices": ("kind: str = hyper('a')", ("'kind' is 'a'", "choices=")),
    "not among its choices": (
        "kind: str = hyper('a', choices=('b', 'c'))",
        ("kind = 'a', must be one of 'b', 'c'",),
    ),
    "half a whole number": ("n: int = hyper(0.5)", ("n = 0.5, must be a whole number",)),
    "no type": ("lr = hyper(0.1)", ("'lr' has no type", "lr: float = hyper(default=0.1)")),
    "a taken name": ("state = slot('s')", ("the name 'state' is taken",)),
    "another taken name": ("step: float = hyper(0.1)", ("the name 'step' is taken",)),
    "params": ("params: float = hyper(0.1)", ("the name 'params' is taken",)),
    "a key that is no text": ("m = slot(0.5)", ("slot 'm' has the key 0.5",)),
    "a taken key": ("m = slot('compensation')", ("slot key 'compensation' is taken",)),
    "the scale of another": ("m = slot('a')\nn = slot('a_scale')", ("slot key 'a_scale' is taken",)),
    "starts at None": ("m = slot('m', starts=None)", ("slot 'm' starts at None", "a number")),
    "starts at a pair": (
        "b: tuple[float, float] = hyper((0.1, 0.2))\nm = slot('m', starts='b')",
        ("starts at 'b'",),
    ),
    "when a number": (
        "lr: float = hyper(0.1)\nm = slot('m', when='lr')",
        ("lr is not a switch", "switch=True"),
    ),
    "a pair of rows": ("m = slot('m', per='left')", ("one value per pair of rows", "Matrix")),
    "subtracted from nothing": ("m = slot('m', subtracted_from='v')", ("subtracted from 'v', which is not",)),
    "decay by another name": (
        "lr: float = hyper(0.1)\nwd: float = decay(0.1)",
        ("decay() is declared as 'wd'", "weight_decay"),
    ),
    "decay without lr": (
        "weight_decay: float = decay(0.1, mode='decoupled')",
        ("needs a hyper-parameter 'lr'",),
    ),
    "a decay that is not there": (
        "weight_decay: float = decay(0.1, mode='L2')",
        ("mode = 'L2'", "'decoupled'"),
    ),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_wrong_class_is_named(kind: str, tmp_path: Path) -> None:
    body, wanted = CLASSES[kind]
    text = HEAD.partition("    lr: float")[0] + "".join(f"    {line}\n" for line in body.splitlines())
    if "update" not in kind and "updat" not in body:
        text += "    @staticmethod\n    def update(h, p, g, s, t): return g\n"
    with pytest.raises((TypeError, ValueError)) as caught:
        module_of(text, tmp_path).Mine([nn.Parameter(torch.ones(2, 2))])
    for part in wanted:
        assert part in str(caught.value)


def test_two_rules_of_one_name() -> None:
    """As in a notebook, whose cell is run again after a change."""

    def rule(factor: float) -> Any:
        class Mine(steprule.Elementwise):
            lr: float = steprule.hyper(0.5)

            @staticmethod
            def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
                return -h.lr * factor * g

        return Mine

    for runner in ({"foreach": False}, {"foreach": True}, {}):
        for factor in (1.0, 3.0):
            param = nn.Parameter(torch.zeros(3))
            optimizer = rule(factor)([param], **runner)
            param.grad = torch.ones(3)
            optimizer.step()
            assert param.tolist() == [-0.5 * factor] * 3


# Rules on whole matrices


@pytest.mark.parametrize("runner", [{"fused": False}, {}])
def test_a_slot_that_vectors_do_not_have(runner: dict[str, Any]) -> None:
    class Mine(steprule.declare.Matrix):
        lr: float = steprule.hyper(0.1)
        pairs = steprule.slot("pairs", per="left")

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
            return s.pairs @ g

    param = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"^Mine steps matrices, but parameter 0 has shape \(3,\)"):
        Mine([param], **runner)


WRONG_MATRICES: dict[str, tuple[Any, str]] = {
    "sides that differ": (lambda g, s: g @ g, "matrices that do not fit: one per element and one per element"),
    "forms that differ": (
        lambda g, s: g + g @ transpose(g),
        "matrices of different forms meet: one per element",
    ),
    "a slot of another form": (lambda g, s: setattr(s, "m", g @ transpose(g)), "slot 'm' is one per element"),
    "a product as the change": (lambda g, s: g @ transpose(g), "matrices of different forms meet"),
    "a plain number": (lambda g, s: transpose(2.0), "transpose is given a float, not a matrix"),
}


@pytest.mark.parametrize("what", WRONG_MATRICES)
def test_what_is_wrong_with_matrices(what: str) -> None:
    made, message = WRONG_MATRICES[what]

    class Mine(steprule.declare.Matrix):
        lr: float = steprule.hyper(0.1)
        m = steprule.slot("m")

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
            return made(g, s)

    param = nn.Parameter(torch.ones(2, 3))
    with pytest.raises((TypeError, ValueError), match=rf"^Mine\.update: .*{message}"):
        Mine([param])


def test_a_word_on_matrices_elsewhere() -> None:
    class Mine(steprule.Elementwise):
        lr: float = steprule.hyper(0.1)

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
            return transpose(g)

    with pytest.raises(TypeError, match=r"^Mine\.update: transpose works on whole matrices, .*Matrix"):
        Mine([nn.Parameter(torch.ones(2, 3))])

    class Vectors(steprule.declare.Matrix):
        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
            return 0 * p if is_matrix(p) else transpose(g)

    with pytest.raises(ValueError, match=r"^Vectors steps matrices, but parameter 0 has shape \(3,\)"):
        Vectors([nn.Parameter(torch.ones(3))])


# Rules by hand


def by_hand(**methods: Any) -> Any:
    return type("Mine", (steprule.GenericAdaptiveOptimizer,), {"__module__": __name__, **methods})


def stepped(rule: Any) -> Any:
    param = nn.Parameter(torch.ones(2))
    optimizer = rule([param])
    param.grad = torch.ones(2)
    optimizer.step()
    return optimizer


def nothing(self: Any, state: Any, group: Any, grad: Any, param: Any) -> None:
    pass


BY_HAND: dict[str, tuple[dict[str, Any], str]] = {
    "no step": ({}, r"^Mine has no step_param\. .*def step_param\(self, state, group, grad, param\)"),
    "misspelt": ({"step_parm": nothing}, "Is 'step_parm' meant"),
    "fewer arguments": (
        {"step_param": lambda self, grad, param: None},
        r"^Mine: step_param takes \(grad, param\)",
    ),
    "another order": ({"step_param": lambda self, state, group, param, grad: None}, "It must be step_param"),
    "init_state": (
        {"step_param": nothing, "init_state": lambda self, param: None},
        r"^Mine: init_state takes \(param\).*init_state\(self, state, group, param\)",
    ),
    "returns a state": (
        {"step_param": nothing, "init_state": lambda self, state, group, param: {}},
        r"^Mine\.init_state returned a dict.*fill the state",
    ),
    "returns a parameter": (
        {"step_param": lambda self, state, group, grad, param: param - grad},
        r"^Mine\.step_param returned a Tensor.*in place",
    ),
    "hyper": ({"step_param": nothing, "rho": steprule.hyper(0.1)}, r"^Mine: 'rho' is declared.*group\['rho'\]"),
    "slot": ({"step_param": nothing, "m": steprule.slot("m")}, r"^Mine: 'm' is declared.*state\['m'\]"),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_a_wrong_rule_by_hand_is_named(kind: str) -> None:
    methods, message = BY_HAND[kind]
    with pytest.raises(TypeError, match=message):
        stepped(by_hand(**methods))


def test_a_rule_by_hand_may_return_its_parameter_and_take_any_arguments() -> None:
    stepped(by_hand(step_param=lambda self, state, group, grad, param: param.add_(grad)))
    stepped(by_hand(step_param=lambda self, *given: None))


def test_what_a_rule_by_hand_raises_names_it_and_the_state() -> None:
    def step_param(self: Any, state: Any, group: Any, grad: Any, param: Any) -> None:
        state["exp_avg"].add_(grad)

    optimizer = stepped(by_hand(step_param=nothing))
    rule = by_hand(step_param=step_param)
    other = rule(optimizer.param_groups[0]["params"])
    other.state[other.param_groups[0]["params"][0]]["sum"] = torch.zeros(2)
    with pytest.raises(KeyError, match=r"Mine\.step_param: there is no key 'exp_avg'.*line \d+") as caught:
        other.step()
    assert caught.value.__notes__[0] == "The state of parameter 0 has the keys: sum."


def test_no_rule_by_hand_moves_when_the_last_gradient_is_sparse() -> None:
    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))]
    optimizer = by_hand(step_param=lambda self, state, group, grad, param: param.sub_(grad))(params)
    params[0].grad, params[1].grad = torch.ones(3, 2), torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse one for parameter 1"):
        optimizer.step()
    assert params[0].eq(1).all()


@pytest.mark.parametrize("base", [steprule.Elementwise, steprule.GenericAdaptiveOptimizer])
@pytest.mark.parametrize("method", ["step", "zero_grad", "state_dict", "explain", "__repr__", "__getstate__"])
def test_an_init_that_does_not_call_its_base(base: Any, method: str) -> None:
    class Forgetful(base):
        def __init__(self, params: Any):
            self.params = params

        def step_param(self, state: Any, group: Any, grad: Any, param: Any) -> None: ...

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
            return -g

    with pytest.raises(AttributeError, match=r"^Forgetful has no \w+ yet: .*super\(\).__init__\(params"):
        getattr(Forgetful([nn.Parameter(torch.zeros(2))]), method)()


@pytest.mark.parametrize(
    "name", ["foreach", "maximize", "fused", "capturable", "differentiable", "state_dtype"]
)
def test_a_hyper_parameter_called_like_an_option_of_every_rule(name: str) -> None:
    body = {name: steprule.hyper(0.1), "__annotations__": {name: float}}
    with pytest.raises(TypeError, match=rf"^Mine: '{name}' is an option that every rule has"):
        type("Mine", (steprule.Elementwise,), body)
