"""How the tests build every rule and feed it.

`LOOPS` holds each rule of `steprule.catalogue()` with its defaults, and once more with every option on that
adds state or decay, run one parameter at a time; `CASES` adds the other runners. A rule that is in no table
here gets the ordinary treatment, so a new rule is tested for every promise without a change here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steprule
from steprule import Elementwise, decay, hyper, slot
from steprule.declare import Matrix, Modifier, parameter
from steprule.words import ema, sign

Shapes = tuple[tuple[int, ...], ...]


class SignedMomentum(Elementwise):
    """A rule that a user states in a script: the sign of an interpolated momentum.

    When: testing whether a user's rule gets what the built-in ones get.

        θ ← θ - lr·sign(β1·m + (1-β1)·g)
        m ← β2·m + (1-β2)·g

    State: 1 number per parameter (exp_avg).
    Source: Chen et al. 2023, algorithm 2.
    """

    lr: float = hyper(1e-4, at_least=0, meaning="how far every element moves")
    betas: tuple[float, float] = hyper((0.9, 0.99), at_least=0, below=1, meaning="of step, of m")
    weight_decay: float = decay(0, mode="decoupled")

    m = slot("exp_avg")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        beta1, beta2 = h.betas
        change = -h.lr * sign(ema(s.m, g, beta1))
        s.m = ema(s.m, g, beta2)
        return change


RULES: dict[str, Any] = {**steprule.catalogue(), "SignedMomentum": SignedMomentum}

# Of a test with many cases, one or more for each rule, an ordinary run takes all cases of these rules, of which
# each has something in its step or its state that no other has, and a part of the cases of the others.
ALWAYS = {
    "Adafactor",
    "Adagrad",
    "AdamW",
    "AMSGrad",
    "ASGD",
    "LBFGS",
    "Muon",
    "Prodigy",
    "ScheduleFreeAdamW",
    "SGD",
    "SignedMomentum",
    "SparseAdam",
}

ORDINARY_SHAPES: Shapes = ((4, 3), (5,), (), (2, 3, 2, 2))
MATRIX_SHAPES: Shapes = ((4, 3), (3, 5), (2, 2))
SHAPES: dict[str, Shapes] = {"SparseAdam": ((6, 3), (5, 2))}

# These read the whole loss again and again, so they are handed a closure rather than a gradient.
# Few iterations a step, so that several steps do not yet reach the bottom.
NEED_A_CLOSURE: dict[str, dict[str, Any]] = {"LBFGS": {"max_iter": 2}}
# These begin with steps that are too small to be seen in the tests.
VISIBLE: dict[str, dict[str, Any]] = {
    "DAdaptAdam": {"d0": 0.1},
    "DoG": {"reps_rel": 0.1},
    "DoWG": {"reps_rel": 0.1},
    "LDoG": {"reps_rel": 0.1},
    "Prodigy": {"d0": 0.1},
    "ScheduleFreeRAdam": {"silent_sgd_phase": False},
}
ONE_GROUP_ONLY = {"LBFGS"}
REFUSE_COMPLEX = {"Adafactor", "CAME", "SparseAdam"}
REFUSE_COMPLEX |= {name for name, rule in RULES.items() if issubclass(rule, Matrix)}
ACCEPT_SPARSE = {"Adagrad", "SGD", "SparseAdam"}
SWITCHES: dict[str, dict[str, Any]] = {
    "loop": {"foreach": False},
    "lists": {"foreach": True},
    "default": {},
}
ON = {bool: True, float: 0.2, int: 0.2}


def in_words(rule: Any) -> bool:
    """Whether a rule is written in words."""
    return issubclass(rule, Elementwise)


@dataclass(frozen=True)
class Case:
    """A rule with its options and its runner, and how to feed it."""

    rule: Any
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    runner: str = "loop"

    @property
    def name(self) -> str:
        return self.rule.__name__

    @property
    def torch_class(self) -> Any:
        """The class of torch.optim with the same name, if there is one."""
        return getattr(torch.optim, self.name, None)

    @property
    def shapes(self) -> Shapes:
        return SHAPES.get(self.name, ORDINARY_SHAPES if self.any_shape else MATRIX_SHAPES)

    @property
    def settings(self) -> dict[str, Any]:
        return NEED_A_CLOSURE.get(self.name, {}) | VISIBLE.get(self.name, {}) | self.options

    @property
    def any_shape(self) -> bool:
        """Whether it takes parameters of every shape."""
        return not matrices_only(self.rule)

    @property
    def sparse_only(self) -> bool:
        return self.name == "SparseAdam"

    @property
    def closure(self) -> bool:
        return self.name in NEED_A_CLOSURE

    @property
    def elementwise(self) -> bool:
        """Whether every element is stepped by itself, without a sum over the tensor."""
        return not self.closure and not issubclass(self.rule, Matrix) and not sums_of(self.rule)

    @property
    def shares(self) -> bool:
        """Whether parameters share a sum, so that what one does depends on the others."""
        return bool(sums_of(self.rule) & {"group", "all"})

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers, which depend on a parameter's position among all."""
        return "seed" in getattr(self.rule, "fields", {})

    @property
    def returns(self) -> bool:
        """Whether it remembers where each parameter started."""
        return any(slot.starts is parameter for slot in self.rule.slots.values())

    @property
    def exact(self) -> bool:
        """Whether the results are the same to the last bit, whatever the tensor's layout in memory.

        Sums follow the memory. The fused kernel rounds roots correctly, and leaves what it cannot take to
        the loop, whose roots may be one unit off in the last place.
        """
        return self.elementwise and self.runner != "default"

    @property
    def starts_with_state(self) -> bool:
        """Whether the constructor makes the state, as that of torch's Adagrad does."""
        return getattr(self.rule, "starts_with_state", False)

    @property
    def many_groups(self) -> bool:
        return self.name not in ONE_GROUP_ONLY

    def knows(self, *names: str) -> bool:
        """Whether the constructor has these arguments."""
        return set(names) <= set(inspect.signature(self.rule).parameters)

    def parameters(self, dtype: torch.dtype = torch.float32, shapes: Shapes | None = None) -> list[Any]:
        return [
            nn.Parameter(numbers(shape, dtype, seed=100 + i))
            for i, shape in enumerate(self.shapes if shapes is None else shapes)
        ]

    def make(self, params: Any = None, **more: Any) -> Any:
        params = self.parameters() if params is None else params
        switches = SWITCHES[self.runner] if self.knows("foreach") else {}
        return self.rule(params, **{**self.settings, **switches, **more})

    def make_torch(self, params: Any = None, **more: Any) -> Any:
        """torch's optimizer of the same name, as a loop over parameters."""
        if "foreach" in inspect.signature(self.torch_class).parameters:
            more.setdefault("foreach", False)
        params = self.parameters() if params is None else params
        return self.torch_class(params, **{**self.settings, **more})

    def advance(self, optimizer: Any, steps: int = 1, first: int = 0, without: Collection[int] = ()) -> None:
        """Step `optimizer` with the gradients number `first`, `first + 1`, …

        without: the places of parameters that get no gradient.
        """
        for number in range(first, first + steps):
            give_gradients(self, optimizer, number, without)
            self.step(optimizer, without)

    def step(self, optimizer: Any, without: Collection[int] = ()) -> Any:
        self.prepare(optimizer)
        if not self.closure:
            return optimizer.step()
        return optimizer.step(lambda: loss_with_gradients(optimizer, without))

    def prepare(self, optimizer: Any) -> None:
        """What the rule needs between the backward pass and the step."""
        estimate_curvature(optimizer)

    def __str__(self) -> str:
        return f"{self.name}-{self.runner}" + ("-options" if self.options else "")


@cache
def sums_of(rule: Any) -> frozenset[str]:
    """What the sums of the rule go over: "tensor", "group", "all"."""
    if not in_words(rule):
        return frozenset()
    optimizer = rule([nn.Parameter(torch.zeros(1, 1))])
    programs = optimizer.program(optimizer.param_groups[0]).kinds
    return frozenset(x.over for program in programs for x in program.reductions)


@cache
def by_lines(rule: Any) -> bool:
    """Whether the rule, or the modifier on any rule, has values per row or column, or whole matrices."""
    if not in_words(rule) and not issubclass(rule, Modifier):
        return False
    if getattr(rule, "on_matrices", False):
        return True
    params = [nn.Parameter(torch.zeros(1, 1))]
    modifier = issubclass(rule, Modifier)
    optimizer = SignedMomentum(params, modifiers=[rule()]) if modifier else rule(params)
    return any(program.lined for program in optimizer.program(optimizer.param_groups[0]).kinds)


@cache
def matrices_only(rule: Any) -> bool:
    """Whether the rule refuses vectors."""
    try:
        rule([nn.Parameter(torch.zeros(2))])
    except ValueError:
        return True
    return False


@cache
def by_kind(rule: Any) -> bool:
    """Whether the rule steps vectors in another way than matrices."""
    if not in_words(rule):
        return False
    optimizer = rule([nn.Parameter(torch.zeros(1, 1))])
    return len(optimizer.program(optimizer.param_groups[0]).kinds) > 1


def options_on(rule: Any) -> dict[str, Any]:
    """Every option on that adds a slot or a decay."""
    switches = {declared.when for declared in rule.slots.values() if declared.when}
    switches |= {name for name in ("weight_decay",) if name in rule.fields}
    return {name: ON[type(rule.fields[name].default)] for name in sorted(switches)}


LOOPS = [Case(rule) for rule in RULES.values()]
LOOPS += [Case(rule, options_on(rule)) for rule in RULES.values() if options_on(rule)]
CASES = LOOPS + [
    Case(rule, options_on(rule), runner)
    for runner in ("lists", "default")
    for rule in RULES.values()
    if in_words(rule) and rule.gradients != "rows only"
    if not (runner == "lists" and by_lines(rule))
]


def can_store(case: Case, kind: str) -> bool:
    """Whether the rule has slots, and takes this storage for all of them."""
    try:
        optimizer = case.rule([nn.Parameter(torch.zeros(3))], **case.options, state_dtype=kind)
    except ValueError:
        return False
    (group,) = optimizer.param_groups
    slots = (x for x in case.rule.slots.values() if x.per == "element" and x.starts is not parameter)
    return any(slot.exists(group) for slot in slots)


def each(condition: Callable[[Case], bool] = lambda case: True, among: Iterable[Case] = CASES) -> Any:
    """Run a test for every case that meets the condition."""
    return pytest.mark.parametrize("case", [pytest.param(c, id=str(c)) for c in among if condition(c)])


def plain(case: Case) -> bool:
    """One case per rule: the one with default options."""
    return case.runner == "loop" and not case.options


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """The same random numbers for the same seed, whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


def gradient_for(case: Case, param: Tensor, seed: int) -> Tensor:
    """Random numbers; for a rule on rows, a sparse gradient that leaves the first row out."""
    gradient = numbers(tuple(param.shape), param.dtype, seed)
    return sparse_rows(gradient) if case.sparse_only else gradient


def sparse_rows(gradient: Tensor) -> Tensor:
    """All rows but the first, the last one in two parts, as an embedding gives them."""
    count = gradient.shape[0]
    rows = torch.tensor([*range(1, count), count - 1])
    return torch.sparse_coo_tensor(rows[None], gradient[rows], gradient.shape, check_invariants=True)


def flat(optimizer: Any) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def give_gradients(case: Case, optimizer: Any, number: int, without: Collection[int] = ()) -> None:
    for place, param in enumerate(flat(optimizer)):
        given = param.requires_grad and place not in without
        param.grad = gradient_for(case, param, 1000 * number + place) if given else None


def estimate_curvature(optimizer: Any) -> None:
    """Give rules that use the curvature one: the gradients, which stand for it here."""
    if isinstance(optimizer, steprule.Sophia):
        optimizer.update_hessian(4)
    elif isinstance(optimizer, Elementwise):
        own = [group for group in optimizer.param_groups if uses_curvature(optimizer.rule_of(group))]
        given = {param: param.grad for group in own for param in group["params"]}
        if given:
            optimizer.update_hessian(given)


def uses_curvature(rule: Any) -> bool:
    return hasattr(rule, "estimate")


def loss_with_gradients(optimizer: Any, without: Collection[int] = ()) -> Tensor:
    """A bowl with its bottom elsewhere for every parameter; sets the gradients."""
    optimizer.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for place, param in enumerate(flat(optimizer)):
        if param.requires_grad and place not in without:
            bottom = numbers(tuple(param.shape), param.dtype, seed=500 + place)
            away = torch.view_as_real(param - bottom) if param.is_complex() else param - bottom
            total = total + (away**2).sum() + 0.1 * (away**4).sum()
    if total.requires_grad:
        total.backward()
    return total


# Comparing


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def assert_same(given: Any, wanted: Any, where: str = "") -> None:
    """Equal to the last bit, all the way down through lists, tuples and dicts."""
    if isinstance(wanted, Tensor):
        assert isinstance(given, Tensor), where
        assert (given.dtype, given.shape) == (wanted.dtype, wanted.shape), where
        assert same_bits(given, wanted), f"{where} differs:\n{given}\n{wanted}\n{given - wanted}"
    elif isinstance(wanted, dict):
        assert set(given) == set(wanted), where
        for key in wanted:
            assert_same(given[key], wanted[key], f"{where}[{key!r}]")
    elif isinstance(wanted, (list, tuple)):
        assert len(given) == len(wanted), where
        for place, pair in enumerate(zip(given, wanted, strict=True)):
            assert_same(*pair, f"{where}[{place}]")
    else:
        assert given == wanted, f"{where}: {given!r}, wanted {wanted!r}"


def assert_equal(case: Case, given: Any, wanted: Any) -> None:
    """Equal to the last bit where the case promises that, else up to rounding."""
    if case.exact:
        assert_same(given, wanted)
    else:
        torch.testing.assert_close(given, wanted, check_stride=False)


def assert_same_run(given: Any, wanted: Any) -> None:
    """The same parameters, and the same state of each."""
    assert_same([p.detach() for p in flat(given)], [p.detach() for p in flat(wanted)], "parameter")
    assert_same(given.state_dict()["state"], wanted.state_dict()["state"], "state")


def snapshot(optimizer: Any) -> Any:
    """A copy of the parameters, the state and the groups, to compare with later ones."""
    return copy.deepcopy(([p.detach() for p in flat(optimizer)], optimizer.state_dict()))
