"""Rules, presets and modifiers by name: `create`, `find`, and what modifiers say about themselves."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from papers import ranger
from rules import flat
from torch import nn

import steprule
from steprule import Modifier, create, find, hyper
from steprule.catalogue import PRESETS

MODIFIERS = steprule.modifier_catalogue()


# They return the new parameter in place of a change.
SET_THE_PARAMETER = {"ASGD", "ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD"}


def model() -> nn.Module:
    return nn.Linear(4, 3, bias=False)


def test_a_name_gives_what_the_classes_give() -> None:
    options = {"lr": 3e-4, "ema.decay": 0.99, "cautious.floor": 0.5}
    mine = create("adamw+global_norm_clip+cautious+ema", model(), **options)
    wanted = steprule.AdamW(
        model(),
        lr=3e-4,
        modifiers=[steprule.GlobalNormClip(), steprule.Cautious(0.5), steprule.EMA(0.99)],
    )
    (one,), (other,) = mine.param_groups, wanted.param_groups
    assert type(mine) is steprule.AdamW
    assert {k: v for k, v in one.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}
    assert options == {"lr": 3e-4, "ema.decay": 0.99, "cautious.floor": 0.5}


@pytest.mark.parametrize(
    ("name", "options", "modifiers"),
    [
        ("adamw", {}, None),
        (" AdamW ", {}, None),
        ("ADAMW + EMA", {"EMA.decay": 0.5}, ("ema",)),
        ("adamw+ema+lookahead", {}, ("ema", "lookahead")),
        ("adamw+lookahead+ema", {}, ("lookahead", "ema")),
        ("adamw+GlobalNormClip", {"global_norm_clip.max_norm": 2}, ("global_norm_clip",)),
        ("adamw+ema", {"modifiers": [steprule.Cautious()]}, ("ema", "cautious")),
        ("adamw", {"modifiers": [steprule.Cautious()]}, ("cautious",)),
    ],
)
def test_names_in_every_form(name: str, options: dict[str, Any], modifiers: Any) -> None:
    (group,) = create(name, model(), **options).param_groups
    assert group.get("modifiers") == modifiers
    for key, value in options.items():
        assert key == "modifiers" or group[key.lower()] == value


@pytest.mark.parametrize("name", [x for x in steprule.catalogue() if x != "LBFGS"])
def test_every_rule_is_created_with_every_modifier(name: str) -> None:
    rule: Any = steprule.catalogue()[name]
    options = {"weight_decay": 0.0} if "weight_decay" in rule.fields else {}
    for modifier in MODIFIERS.values():
        full = f"{name}+{modifier.name}"
        taken = {"SparseAdam", *modifier.not_with} & {base.__name__ for base in rule.__mro__}
        places = ["change", *["evaluate"] * hasattr(rule, "evaluate")] if name in SET_THE_PARAMETER else []
        if taken or any(hasattr(modifier, place) for place in places):
            with pytest.raises((TypeError, ValueError), match=modifier.__name__):
                create(full, model(), **options)
            continue
        assert create(full, model(), **options).param_groups[0]["modifiers"] == (modifier.name,)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("adamww", {}, ValueError, r"^there is no rule 'adamww'\. Did you mean 'AdamW'\?"),
        ("", {}, ValueError, r"^there is no rule ''\. The rules are AdaBelief"),
        ("+ema", {}, ValueError, r"^there is no rule ''"),
        ("ema", {}, ValueError, r"^'ema' is a modifier\. Write a rule before it, as in 'adamw\+ema'\.$"),
        ("adamw+", {}, ValueError, r"^a \+ has nothing after it\."),
        ("adamw++ema", {}, ValueError, r"^a \+ has nothing after it\."),
        ("adamw+emma", {}, ValueError, r"^there is no modifier 'emma'\. Did you mean 'ema'\?$"),
        (
            "adamw+zzz",
            {},
            ValueError,
            r"^there is no modifier 'zzz'\. Allowed are: adaptive_clip, asam, average, ",
        ),
        ("adamw+ranger", {}, ValueError, r"^'ranger' is a rule\. A name has one rule, which comes first"),
        ("rangr", {}, ValueError, r"^there is no rule 'rangr'\. Did you mean 'ranger'\?"),
        ("ranger+", {}, ValueError, r"^a \+ has nothing after it\."),
        ("ranger+lookahead", {}, ValueError, "Lookahead is listed twice"),
        ("ranger", {"ema.decay": 0.9}, ValueError, r"ema, which 'ranger' does not have\. Write 'ranger\+ema'"),
        ("adamw+sgd", {}, ValueError, r"^'sgd' is a rule\. A name has one rule, which comes first"),
        ("adamw+ema+ema", {}, ValueError, "EMA is listed twice"),
        ("adamw+ema+average", {}, ValueError, "Average does not go with EMA"),
        ("lbfgs+ema", {}, ValueError, r"^LBFGS takes no modifiers"),
        ("adamw", {"ema.decay": 0.9}, ValueError, r"^'ema\.decay' belongs to the modifier ema, which 'adamw'"),
        ("adamw+ema", {"cautious.floor": 1.0}, ValueError, r"Write 'adamw\+ema\+cautious', or leave"),
        ("adamw+ema", {"emma.decay": 0.9}, ValueError, r"^'emma\.decay': .*Did you mean 'ema'\?"),
        (
            "adamw+ema",
            {"ema.decy": 0.9},
            TypeError,
            r"^EMA has no hyper-parameter 'decy'\. Did you mean 'decay'",
        ),
        ("adamw+ema", {"ema.decay": 2}, ValueError, r"^EMA: decay = 2, must be at least 0 and below 1"),
        ("adamw+ema", {"lrr": 2}, TypeError, r"^AdamW has no hyper-parameter 'lrr'\. Did you mean 'lr'"),
        (steprule.AdamW, {}, TypeError, r"^create: AdamW is not a name"),
        (None, {}, TypeError, r"^create: None is not a name"),
    ],
)
def test_what_create_refuses(name: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create(name, model(), **options)


def test_what_is_created_steps() -> None:
    optimizer = create("sgd+global_norm_clip", model(), lr=1.0, **{"global_norm_clip.max_norm": 0.5})
    (param,) = flat(optimizer)
    before = param.detach().clone()
    param.grad = torch.full_like(param, 10.0)
    optimizer.step()
    assert float((before - param.detach()).norm()) == pytest.approx(0.5)


def test_find_takes_patterns() -> None:
    assert set(find()) == {*map(str.lower, steprule.catalogue()), *PRESETS, *MODIFIERS}
    assert find("ra*") == ("radam", "ranger", "radial_brake")
    assert "adamax" in find("ADAMA*")
    assert find("*clip*") == ("adaptive_clip", "global_norm_clip", "norm_clip", "update_clip", "value_clip")
    assert find("em?") == ("ema",)
    assert find("zzz") == ()
    for name in find():
        assert name in MODIFIERS or isinstance(
            create(name, [nn.Parameter(torch.ones(2, 2))]), torch.optim.Optimizer
        )


# Presets


def test_a_preset_is_its_rule_with_modifiers_and_values() -> None:
    mine = create("Ranger + cautious", model(), lr=0.1, **{"lookahead.every": 4, "cautious.floor": 0.5})
    values = {"betas": (0.95, 0.999), "eps": 1e-5, "decoupled_weight_decay": True}
    modifiers = [steprule.Lookahead(4, 0.5), steprule.Cautious(0.5)]
    wanted = steprule.RAdam(model(), lr=0.1, modifiers=modifiers, **values)
    (one,), (other,) = mine.param_groups, wanted.param_groups
    assert type(mine) is steprule.RAdam
    assert {k: v for k, v in one.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}
    assert create("ranger", model(), eps=0.1).param_groups[0]["eps"] == 0.1
    assert create("ranger", model()).param_groups[0]["eps"] == 1e-5


@pytest.mark.parametrize("flags", [{"fused": False, "foreach": False}, {"foreach": True}, {"fused": True}])
def test_ranger_does_what_its_author_published(flags: dict[str, bool]) -> None:
    random = np.random.default_rng(5)
    theta = random.standard_normal((7, 5))
    param = nn.Parameter(torch.from_numpy(theta.copy()))
    optimizer = create("ranger", [param], lr=0.1, weight_decay=0.1, **flags)
    state = ranger.init(theta)
    for t in range(1, 21):
        g = random.standard_normal(theta.shape)
        param.grad = torch.from_numpy(g.copy())
        optimizer.step()
        theta = ranger.step(theta, g, state, t, lr=0.1, weight_decay=0.1)
    np.testing.assert_allclose(param.detach().numpy(), theta, rtol=1e-11, atol=1e-11)


def test_a_preset_is_described() -> None:
    said = steprule.describe(" Ranger ")
    assert said.name == "ranger"
    assert said.formula.startswith("radam+lookahead, betas=(0.95, 0.999), eps=1e-05")
    for text in (said.summary, said.when, said.state, said.differs, said.source):
        assert text.strip()
    (group,) = create("ranger", model()).param_groups
    defaults = {h.name: h.default for h in said.hyperparameters}
    assert {key: group[key] for key in defaults if key in group and key != "modifiers"} == {
        key: value for key, value in defaults.items() if key in group and key != "modifiers"
    }
    assert said.slots == ("exp_avg", "exp_avg_sq", "lookahead.slow", "lookahead.steps")
    assert said.numbers_per_parameter == 3


# What modifiers say about themselves


@pytest.mark.parametrize("name", MODIFIERS)
def test_a_description_comes_from_the_modifier(name: str) -> None:
    modifier = MODIFIERS[name]
    said = steprule.describe(name)
    assert said.name == modifier.__name__
    for text in (said.summary, said.when, said.formula, said.state):
        assert text.strip()
    assert said.source or modifier is steprule.Metrics  # which is nobody's algorithm
    known = inspect.signature(modifier).parameters
    assert [h.name for h in said.hyperparameters] == list(known)
    for hyperparameter in said.hyperparameters:
        assert hyperparameter.default == known[hyperparameter.name].default
        assert hyperparameter.allowed
        assert hyperparameter.meaning
    for given in (modifier, modifier(), name.upper(), f" {modifier.__name__} "):
        assert steprule.describe(given) == said
    param = nn.Parameter(torch.zeros(500, 4))
    optimizer = steprule.SGD([param], modifiers=[modifier()])
    optimizer.init_state()
    state = {key: value for key, value in optimizer.state[param].items() if key not in ("step", "noise_key")}
    (group,) = optimizer.param_groups
    assert set(said.slots) == {*state, *(key for key in group if key in said.slots)}
    assert said.numbers_per_parameter == sum(value.numel() for value in state.values() if value.dim()) / 2000


def test_a_modifier_of_a_users_own_is_described() -> None:
    class Softer(Modifier):
        """Halve the gradient."""

        factor: float = hyper(default=0.5, at_least=0, meaning="how much is left")

        @staticmethod
        def gradient(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
            return h.factor * g

    said = steprule.describe(Softer)
    assert (said.name, said.summary, said.formula) == ("Softer", "Halve the gradient.", "")
    assert [h.name for h in said.hyperparameters] == ["factor"]


def test_create_takes_one_modifier_without_a_list() -> None:
    for given in (steprule.EMA(0.9), [steprule.EMA(0.9)]):
        (group,) = create("adamw+cautious", model(), modifiers=given).param_groups
        assert (group["modifiers"], group["ema.decay"]) == (("cautious", "ema"), 0.9)
    assert create("adamw", model(), modifiers=steprule.EMA).param_groups[0]["modifiers"] == ("ema",)


def test_an_option_of_a_modifier_without_its_name() -> None:
    with pytest.raises(ValueError, match=r"^'max_norm' belongs to a modifier: write 'global_norm_clip\.max"):
        steprule.create("lamb+global_norm_clip", nn.Linear(2, 2), max_norm=1)
