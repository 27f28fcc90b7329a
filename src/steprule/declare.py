"""How a step rule is declared: hyper-parameters with a range, slots with a checkpoint key, and `update`.

    class Lion(Elementwise):
        lr: float = hyper(default=1e-4, at_least=0)
        betas: tuple[float, float] = hyper(default=(0.9, 0.99), at_least=0, below=1)
        m = slot("exp_avg")

        @staticmethod
        def update(h, p, g, s, t):
            beta1, beta2 = h.betas
            change = -h.lr * sign(ema(s.m, g, beta1))
            s.m = ema(s.m, g, beta2)
            return change

`update` is written as in the paper, for one element: `h` hyper-parameters, `p` parameter, `g` gradient, `s`
slots, `t` the step count 1, 2, 3, …. It returns the change to add to the parameter (several, in a tuple,
are added in order), or `becomes(new_value)`. The gradient and the parameter are never written to.

Sums over the tensor (`mean`, `norm`, `largest`, `total`), over the parameter group (`over="group"`) or over all
parameters (`over="all"`) are plain numbers, computed in double. `over="row"` and `over="column"` give one value
of each, in double, too. A slot can have one value per element, row, column, tensor, group or for all
parameters; what it is given must be no finer than that:

    class Distance(Elementwise):
        far = slot("far", per="all")
        start = slot("start", starts=parameter)

        @staticmethod
        def update(h, p, g, s, t):
            s.far = larger(s.far, norm(p - s.start, over="all"))
            return -(1e-6 + s.far) / sqrt(t) * g / norm(g, over="all")

A row is what has the same first index, a column what has the same other indices; with `matrices = "stacked"` in
the class, they are those of the last two dimensions. A vector is one row. `size(p)`, `rows(p)` and `columns(p)`
are plain numbers.

A boolean hyper-parameter is decided when the program is built, so `if h.nesterov:` is fine, and so is
`if is_matrix(p):`. An `if` on anything else is an error: use `where(condition, a, b)`.

A rule that uses the curvature has a second method. `d` is an element of the diagonal of the Hessian, or of what
stands for it; only slots may be set, and nothing is returned:

    @staticmethod
    def estimate(h, p, d, s, t):
        s.v = ema(s.v, d * d, h.betas[1])

`optimizer.update_hessian` calls it, for no step; `t` is the number of the step to come.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias, cast, dataclass_transform

import torch

from steprule import errors, rule_errors
from steprule.engine import docstrings, estimation, statement
from steprule.engine.composition import composed
from steprule.engine.fields import FLAGS, OPTIONS, Field, Identity, Parameter, Slot, identity, parameter
from steprule.engine.modifier import ModifierBase, snake_case
from steprule.engine.program.trace import trace
from steprule.engine.rule import RuleOptimizer
from steprule.engine.weight_decay import MODES, WeightDecay

__all__ = [
    "Decay",
    "Elementwise",
    "Field",
    "Matrix",
    "Modifier",
    "Slot",
    "WeightDecay",
    "decay",
    "errors",
    "hyper",
    "identity",
    "parameter",
    "scalar_slot",
    "slot",
]


Kept: TypeAlias = Literal["fp32", "bf16", "fp16", "int8"] | torch.dtype
# What someone may write in place of a hyper-parameter.
PLAIN = (bool, int, float, str, tuple)

StateDtype: TypeAlias = Kept | Mapping[str, Kept]


def hyper(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[Any, ...] | None = None,
    switch: bool = False,
    kw_only: bool = False,
    search: tuple[float, float] | None = None,
    meaning: str = "",
) -> Any:
    """A hyper-parameter of a rule.

    default: the value, whose kind (number, whole number, boolean, tuple) every value must have.
    at_least, above, at_most, below: the range, checked in the constructor, in groups and on load.
    choices: the allowed values; `if h.name == value:` is allowed. switch: zero means absent, so `if h.name:` is
    allowed. kw_only: not accepted by position. search: the smallest and the largest value that `steprule race`
    and `tune` try, usually three decades for lr. meaning: a few words for `steprule show`.

    Raises: ValueError if search is not two numbers above 0, the smaller one first.
    """
    if search is not None and not 0 < search[0] < search[1]:
        raise errors.out_of_range("hyper", "search", search, "two numbers above 0, the smaller one first")
    return Field(
        default,
        at_least=at_least,
        above=above,
        at_most=at_most,
        below=below,
        choices=choices,
        switch=switch,
        positional=not kw_only,
        search=search,
        meaning=meaning,
    )


def decay(
    default: float = 0.0,
    *,
    mode: Literal["l2", "decoupled", "own"] = "l2",
    kw_only: bool = False,
    not_decoupled: str | None = None,
    meaning: str = "λ, as in the formula",
) -> Any:
    """The field for `weight_decay`: a number (decayed by `mode`) or a `WeightDecay`.

    mode="own" is for a paper whose decay is a part of its formula: `update` then decays, by `h.weight_decay`,
    which is 0 where a group has a `WeightDecay` of another kind. not_decoupled: why the parameter must not be
    shrunk before the step, for messages. meaning: how it decays, for `steprule show`.
    """
    meanings = {
        "l2": "λ, added to the gradient as λ·θ",
        "decoupled": "λ, shrinks the parameter by lr·λ before the step",
        "own": meaning,
    }
    if mode not in meanings:
        raise errors.out_of_range("decay", "mode", mode, "one of " + ", ".join(map(repr, meanings)))
    return Field(
        default,
        at_least=0,
        positional=not kw_only,
        decay=mode,
        not_decoupled=not_decoupled,
        search=(1e-6, 1e-3) if mode == "l2" else (1e-3, 1.0),
        meaning=meanings[mode],
    )


def slot(
    key: str,
    *,
    per: Literal["element", "row", "column", "left", "right", "tensor", "group", "all"] = "element",
    when: str | None = None,
    only: Literal["matrices", "vectors"] | None = None,
    up_to: str | None = None,
    starts: float | str | Parameter | Identity = 0.0,
    never_negative: bool = False,
    not_in_8_bits: str | None = None,
    subtracted_from: str | None = None,
) -> Any:
    """State that the rule keeps: a value per element of the parameter, or a plain number.

    key: the name in checkpoints (torch's where torch has the slot). per: what has one value each: every
    element, row, column, tensor or parameter group, or all parameters together; the last two are kept in the
    groups, under their key. when: the option it exists for. only: which parameters have it, as `is_matrix`
    tells them apart. up_to: the hyper-parameter that says how long a side may be: if the parameter has more
    rows, it has no slot per="left", and if it has more columns, none per="right". starts: its first value, or
    the name of the hyper-parameter that gives it, or `parameter` for a copy of the parameter, or `identity` for
    the identity matrix.
    never_negative: its codes need no sign, and fp16 is refused, because steps divide by it.
    not_in_8_bits: why it must not be stored in 8 bits. subtracted_from: the key of a slot that it, or its
    square, is subtracted from; both then stay in full precision, so that rounding cannot make the difference
    negative.
    """
    return Slot(
        key,
        per=per,
        when=when,
        only=only,
        up_to=up_to,
        starts=starts,
        never_negative=never_negative,
        not_in_8_bits=not_in_8_bits,
        subtracted_from=subtracted_from,
    )


def scalar_slot(key: str, *, starts: float | str = 0.0) -> float:
    """State with one number per parameter tensor, such as a running product; a plain number in `update`."""
    return cast(float, Slot(key, starts=starts, per="tensor"))


def _option(*, default: None, kw_only: bool, meaning: str) -> Any:
    return Field(default, positional=not kw_only, free=True, meaning=meaning)


def _flag(*, default: bool | None, kw_only: bool, meaning: str) -> Any:
    kind = "bool" if isinstance(default, bool) else "bool | None"
    return Field(default, type=kind, positional=not kw_only, meaning=meaning)


@dataclass_transform(kw_only_default=False, field_specifiers=(hyper, decay, _flag, _option))
class _Rule(RuleOptimizer):
    """Reads the declarations of a subclass and gives it a constructor with an explicit signature."""

    summary: ClassVar[str] = ""

    def __init_subclass__(cls, flags: str | None = None, positional: str = "", **kwargs: Any):
        super().__init_subclass__(**kwargs)
        body = dict(vars(cls))
        fields = dict(cls.fields) | _declared_fields(cls, body)
        cls.fields = dict(sorted(fields.items(), key=lambda item: item[0] in (*FLAGS, *OPTIONS, "rest")))
        cls.slots = _declared_slots(cls, body)
        if flags is not None:
            cls.torch_flags = tuple(flags.split())
        statement.check(cls, body)
        cls.decay_default = next((f.decay for f in cls.fields.values() if f.decay), None)
        if "__init__" not in body:
            cls.__init__ = _constructor(cls, positional.split())  # type: ignore[method-assign]
        if cls.update is not RuleOptimizer.update:
            cls.__doc__ = docstrings.with_arguments(cls, cls.fields)


def _declared_fields(cls: type, body: dict[str, Any]) -> dict[str, Field]:
    declared = {name: value for name, value in body.items() if isinstance(value, Field)}
    texts: dict[str, Any] = body.get("__annotations__", {})
    hints = partial(_hint, cls, {})
    for name, value in cast("dict[str, object]", body).items():
        if type(value) not in PLAIN or hasattr(RuleOptimizer, name):
            continue
        text = str(texts.get(name) or hints(name) or "")
        if text and "ClassVar" not in text:
            kind = type(value).__name__
            fix = f"Write `{name}: {kind} = hyper(default={value!r})`, or ClassVar[{kind}] for a constant."
            raise rule_errors.bad_statement(cls.__name__, f"'{name}' is {value!r}, not a hyper-parameter", fix)
    fields: dict[str, Field] = {}
    for name, value in declared.items():
        text = texts.get(name) or hints(name)
        if text is None:
            kind = type(value.default).__name__
            fix = f"Write `{name}: {kind} = hyper(default={value.default!r})`."
            raise rule_errors.bad_statement(cls.__name__, f"hyper-parameter '{name}' has no type", fix)
        text = text if isinstance(text, str) else getattr(text, "__name__", str(text))
        if isinstance(value.default, bool):
            text = "bool"
        fields[name] = value.named(name, text)
    return fields


def _hint(cls: type, known: dict[str, Any], name: str) -> Any:
    """The type of an attribute as its bases state it, which takes long to find out."""
    if not known:
        known[""] = None
        with contextlib.suppress(NameError, TypeError):
            # The module of a file that was loaded by hand may not be in sys.modules.
            known |= typing.get_type_hints(cls, vars(sys.modules.get(cls.__module__, typing)))
    return known.get(name)


def _declared_slots(cls: Any, body: dict[str, Any]) -> dict[str, Slot]:
    own = {letter: replace(value, letter=letter) for letter, value in body.items() if isinstance(value, Slot)}
    stacked = cls.matrices == "stacked"
    slots: dict[str, Slot] = {**cls.slots, **own}
    whole = bool(getattr(cls, "on_matrices", False))
    return {letter: replace(slot, stacked=stacked, on_matrices=whole) for letter, slot in slots.items()}


def _constructor(cls: type[_Rule], positional: list[str]) -> Callable[..., None]:
    """`__init__(self, params, …)` with every hyper-parameter by name, type and default."""
    kinds = inspect.Parameter
    own = [f for f in cls.fields.values() if f.name not in (*FLAGS, *OPTIONS)]
    first = [f for f in own if f.positional] + [cls.fields[name] for name in positional]
    rest = [f for f in own if not f.positional]
    rest += [cls.fields[name] for name in (*FLAGS, *OPTIONS) if name not in positional and name in cls.fields]
    parameters = [
        kinds("self", kinds.POSITIONAL_OR_KEYWORD),
        kinds("params", kinds.POSITIONAL_OR_KEYWORD, annotation="ParamsT"),
    ]
    for fields, kind in ((first, kinds.POSITIONAL_OR_KEYWORD), (rest, kinds.KEYWORD_ONLY)):
        parameters += [kinds(f.name, kind, default=f.default, annotation=f.type) for f in fields]
    signature = inspect.Signature(parameters, return_annotation=None)

    def __init__(self: _Rule, *args: Any, **kwargs: Any) -> None:
        if any(name in type(self).fields and name not in cls.fields for name in kwargs):
            # Called by the __init__ of a rule that writes its own.
            _constructor(type(self), positional)(self, *args, **kwargs)
            return
        for name in kwargs:
            if name not in cls.fields and name != "params":
                raise errors.unknown_hyperparameter(cls.__name__, name, cls.fields)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = {k: v for k, v in bound.arguments.items() if k not in ("self", "params")}
        RuleOptimizer.__init__(self, bound.arguments["params"], values)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    __init__.__doc__ = f"Create {cls.__name__}; see the class for what each hyper-parameter means."
    return __init__


class Elementwise(_Rule):
    """A rule that treats every element on its own: subclass it, declare, and write `update`.

        class SignDescent(Elementwise):
            lr: float = hyper(default=1e-3, at_least=0)

            @staticmethod
            def update(h, p, g, s, t):
                return -h.lr * sign(g)

    `update(h, p, g, s, t)` gets the hyper-parameters, the parameter, its gradient, the slots and the step
    count, and returns the change to the parameter, or `becomes(new_value)`. `sign` and the other words that it
    may use are in `steprule.words`; `hyper`, `slot` and `decay` are in `steprule`.

    What a subclass gets: groups, checks, hooks, closures, schedulers, checkpoints, complex and half-precision
    parameters, and every runner. `params` may be an iterable of tensors or of (name, tensor) pairs, a list
    of groups, or a module.
    """

    maximize: bool = _flag(default=False, kw_only=True, meaning="maximize instead of minimize")
    foreach: bool | None = _flag(
        default=None, kw_only=True, meaning="True: require the multi-tensor runner; False: do not use it"
    )
    capturable: bool = _flag(
        default=False, kw_only=True, meaning="keep step counts on the device, for CUDA graphs"
    )
    differentiable: bool = _flag(default=False, kw_only=True, meaning="record the step for autograd")
    fused: bool | None = _flag(
        default=None, kw_only=True, meaning="True: require a fused kernel; False: do not use it"
    )

    state_dtype: StateDtype | None = _option(
        default=None,
        kw_only=True,
        meaning="how slots are kept: 'fp32', 'bf16', 'fp16' or 'int8', or a dtype of torch, or one per slot",
    )
    modifiers: Sequence[Modifier] | None = _option(
        default=None, kw_only=True, meaning="what is added to the rule, such as [Cautious(), EMA(0.999)]"
    )
    low_precision: Literal["none", "stochastic", "kahan", "master"] | None = _option(
        default=None, kw_only=True, meaning="for 16-bit parameters: 'none', 'stochastic', 'kahan' or 'master'"
    )

    nonfinite: Literal["ignore", "raise", "skip"] = hyper(
        default="ignore",
        choices=("ignore", "raise", "skip"),
        kw_only=True,
        meaning="on NaN or infinite gradients: step as usual, raise an error, or skip the whole step",
    )

    # Type checkers read the fields above as arguments of this constructor; subclasses get their own.
    params: Any

    def update_hessian(self, diagonal: Mapping[torch.Tensor, torch.Tensor | None]) -> None:
        """Give an estimate of the curvature to the rules that use one, such as AdaHessian; no parameter moves.

            diagonal = steprule.hutchinson(loss, model.parameters())
            loss.backward()
            optimizer.update_hessian(diagonal)
            optimizer.step()

        Call it before the first step, then at every step or every few steps.

        diagonal: for each parameter an estimate of the diagonal of the Hessian of the loss, of the parameter's
        shape. Parameters that are left out or have None stay as they are, and so do those whose rule uses no
        curvature.

        Raises: TypeError, ValueError or RuntimeError that names what does not fit, and RuntimeError for NaN or
        infinite elements where nonfinite="raise"; then nothing has changed.
        """
        estimation.check(self, diagonal)
        self._estimate(diagonal)

    def _estimate(self, curvature: estimation.Curvature, **numbers: float) -> None:
        """Run `estimate` of every rule that has it. numbers: what it finds in `h` besides hyper-parameters."""
        estimation.run(self, curvature, numbers)


class Matrix(Elementwise):
    """A rule on whole matrices: `update` may also use `steprule.matrix.words`, `a @ b` and `transpose`.

    What is per element stays so: `p`, `g`, slots and what is made of them run in the kernels of other rules. A
    product of matrices may be per pair of rows ("left") or of columns ("right"), and so may slots. Sums over
    rows, columns and whole matrices (`over="matrix"`) are those of the last two dimensions. An `if` may ask for
    anything that is known before the step, such as `t % h.every == 0`.
    """

    matrices = "stacked"
    on_matrices = True
    complex_error = RuntimeError

    rest: tuple[type, Mapping[str, Any]] | None = _option(
        default=None,
        kw_only=True,
        meaning="with a model: what steps all but hidden matrices, as in (AdamW, {'lr': 3e-4})",
    )

    @classmethod
    def steps_vectors(cls) -> bool:
        """Whether `update` also says what vectors do."""
        defaults = {name: field.default for name, field in cls.fields.items() if not field.free}
        program = trace(composed(cls, cls.update), defaults)
        return program.of_vectors is not None or not program.needs_matrices


@dataclass_transform(kw_only_default=False, field_specifiers=(hyper,))
class Modifier(ModifierBase):
    """What can be added to any rule: subclass it, declare, and write one or more of these methods.

        class Cautious(Modifier):
            floor: float = hyper(default=1e-3, above=0)

            @staticmethod
            def change(h, p, g, u, s, t):
                agrees = u * g < 0
                return where(agrees, u, 0.0) / larger(mean(agrees), h.floor)

    The name of the method says where it acts:

        gradient(h, p, g, s, t)     returns the gradient that the rule sees
        change(h, p, g, u, s, t)    returns the change, where the rule's own is u and its gradient g
        parameter(h, p, u, s, t)    returns the parameter to which the change is added; u is the change if the
                                    class says `sees_change = True`, otherwise None
        apply(h, p, new, s, t)      returns the new parameter; p is the old one
        evaluate(h, p, s, t)        returns the weights to evaluate with
        climb(h, p, g, s, t)        returns the point where the gradient is taken again

    They are written in the words of rules. `h` has the modifier's own hyper-parameters and those of the rule,
    such as `h.lr`; `s` has the modifier's own slots. `t` is the number of the step, from 1; steps are
    counted if a method uses it, and `climb` cannot. With `acts = "last"` (or "first") the modifier has a part
    in one of n steps and costs the others nothing; n is its hyper-parameter `every`, and a slot `steps` per
    group counts.

    In groups, hyper-parameters are under the name of the class in lower case, as in group["cautious.floor"];
    state is under the same name, as in "ema.average".
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        body = dict(vars(cls))
        cls.name = snake_case(cls.__name__)
        cls.fields = dict(cls.fields) | _declared_fields(cls, body)
        cls.slots = _declared_slots(cls, body)
        statement.check_modifier(cls, body)
        cls.counts_steps = cls.counts_steps or statement.uses_step(cls, statement.OF_STEPS)
        if "__init__" not in body:
            cls.__init__ = _modifier_constructor(cls)  # type: ignore[method-assign]
        cls.__doc__ = docstrings.of_modifier(cls, cls.fields)


def _modifier_constructor(cls: type[Modifier]) -> Callable[..., None]:
    """`__init__(self, …)` with every hyper-parameter by name, type and default."""
    kinds = inspect.Parameter
    parameters = [kinds("self", kinds.POSITIONAL_OR_KEYWORD)]
    for field in cls.fields.values():
        kind = kinds.POSITIONAL_OR_KEYWORD if field.positional else kinds.KEYWORD_ONLY
        parameters.append(kinds(field.name, kind, default=field.default, annotation=field.type))
    signature = inspect.Signature(parameters, return_annotation=None)

    def __init__(self: Modifier, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in cls.fields:
                raise errors.unknown_hyperparameter(cls.__name__, name, cls.fields)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = {name: bound.arguments[name] for name in cls.fields}
        checked = {name: cls.fields[name].check(cls.__name__, value, None) for name, value in values.items()}
        ModifierBase.__init__(self, **checked)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    __init__.__doc__ = f"Create {cls.__name__}; see the class for what each hyper-parameter means."
    return __init__


class Decay(ModifierBase):
    """A kind of weight decay: `gradient` or `parameter`, as in `Modifier`, with the rule's own `h`.

    mode: its name in `weight_decay_mode`.
    """

    mode: ClassVar[str]
    # Whether it reads `h.peak_lr`, the lr that the group was made with.
    remembers_lr: ClassVar[bool] = False

    def __init_subclass__(cls, mode: str, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.mode = mode
        MODES[mode] = cls
