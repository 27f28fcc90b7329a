"""Every rule, in double precision, against the NumPy transcription of its paper; every runner too."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from papers.decay import WeightDecay
from rules import by_kind, by_lines, uses_curvature

import steprule

STEPS = 60
# Of a matrix with more than one row more than columns, the eigenvectors of G·Gᵀ are not determined.
SHAPES = {"SOAP": (6, 5)}
# Which transcription a rule follows, where the file has another name, and with which fixed options.
FOLLOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("adam", {"decoupled_weight_decay": True, "weight_decay": 1e-2}),
    "AMSGrad": (
        "adam",
        {"amsgrad": True, "optimized_update": True, "eps": 1e-16, "decoupled_weight_decay": True},
    ),
    "LDoG": ("dog", {}),
    "ScheduleFreeAdamW": ("schedule_free", {"kind": "adamw"}),
    "ScheduleFreeRAdam": ("schedule_free", {"kind": "radam"}),
    "ScheduleFreeSGD": ("schedule_free", {"kind": "sgd"}),
    "SparseAdam": ("sparse_adam", {}),
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "AdaBelief": [
        {"amsgrad": True},
        {"rectify": False},
        {"degenerate_to_sgd": False},
        {"optimized_update": False, "eps": 1e-8},
        {"eps_in_state": True, "eps": 1e-8, "amsgrad": True},
    ],
    "Adam": [{"amsgrad": True}, {"optimized_update": True}, {"decoupled_weight_decay": True}],
    "AdamAtan2": [{"a": 1.0, "b": 0.5, "lr": 0.1}],
    "AdaHessian": [{"hessian_power": 0.5, "eps": 1e-8}],
    "AdEMAMix": [{"warmup": 40, "betas": (0.9, 0.99, 0.999)}],
    "Adafactor": [{"d": 1.5, "beta2_decay": -1.0, "eps": (1e-8, 1e-2)}],
    "Adagrad": [{"lr_decay": 0.1, "initial_accumulator_value": 0.2}],
    "ADOPT": [{"clip_exp": 0.1, "betas": (0.5, 0.9)}],
    "ASGD": [{"lambd": 0.1, "t0": 10}],
    "DAdaptAdam": [
        {"d0": 0.1},
        {"d0": 0.1, "growth_rate": 1.02},
        {"d0": 0.1, "use_bias_correction": True, "weight_decay": 0.1, "betas": (0.8, 0.9)},
    ],
    "AdamP": [{"delta": 5.0, "nesterov": True}, {"delta": 1.2, "weight_decay": 0.3, "wd_ratio": 0.5}],
    "CAME": [{"clip_threshold": 0.5, "betas": (0.5, 0.6, 0.7), "eps": (1e-3, 1e-2)}],
    "DoG": [{"reps_rel": 0.1, "lr": 0.5, "eps": 1e-4}],
    "DoWG": [{"reps_rel": 0.1, "lr": 0.5, "eps": 1e-4}],
    "Kron": [
        {"max_side": 6, "fit_start": 9, "fit_decay": 0.1, "fit_min": 0.3, "seed": 5},
        {"max_side": 3, "fit_lr": 0.5, "momentum": 0.0},
    ],
    "LARS": [{"nesterov": True, "lr": 20.0}],
    "LDoG": [{"reps_rel": 0.1, "lr": 0.5, "eps": 1e-4}],
    "MARS": [{"gamma": 0.3, "betas": (0.5, 0.6), "lr_1d_factor": 3.0, "betas_1d": (0.3, 0.4)}],
    "MADGRAD": [{"momentum": 0.0, "lr": 0.0}, {"momentum": 0.5, "eps": 1e-2}],
    "Muon": [
        {"nesterov": False},
        {"adjust_lr_fn": "match_rms_adamw"},
        {"adjust_lr_fn": "spectral_unclamped"},
        {"method": "polar_express"},
        {"method": "exact"},
    ],
    "AdaMuon": [
        {"momentum": 0.5, "eps": 1e-3, "lr": 0.1},
        {"method": "exact", "lr": 0.1},
        {"method": "polar_express"},
    ],
    "NorMuon": [
        {"nesterov": False, "betas": (0.8, 0.5)},
        {"method": "polar_express", "ns_steps": 3},
        {"method": "exact", "eps": 1e-2},
    ],
    "NovoGrad": [{"grad_averaging": True, "betas": (0.9, 0.25)}],
    "Prodigy": [
        {"d0": 0.1, "d_coef": 3.0, "growth_rate": 1.02},
        {"d0": 0.1, "use_bias_correction": True, "weight_decay": 0.1},
        {"d0": 0.1, "safeguard_warmup": True, "lr": 0.5},
    ],
    "RAdam": [{"degenerate_to_sgd": False}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RMSprop": [{"centered": True}, {"momentum": 0.9}, {"momentum": 0.9, "centered": True}],
    "ScheduleFreeAdamW": [{"warmup_steps": 9, "step_power": 0.5, "weight_lr_power": 1.0}],
    "ScheduleFreeRAdam": [{"silent_sgd_phase": False}, {"betas": (0.8, 0.99)}],
    "ScheduleFreeSGD": [{"momentum": 0.7, "warmup_steps": 9}],
    "Scion": [
        {"norm": "sign", "scale": 3.0},
        {"norm": "row", "weight_decay": 0.0, "momentum": 0.0},
        {"norm": "column", "lr": 0.1},
        {"method": "exact", "lr": 0.1},
    ],
    "Shampoo": [
        {"every": 1, "side_decay": 0.6, "betas": (0.5, 0.6)},
        {"graft": False, "eps": (1e-3, 1e-2), "every": 3},
        {"both_sides": False, "every": 4, "eps": (1e-2, 1e-8)},
        {"max_side": 5, "every": 2},
        {"max_side": 3},
    ],
    "Signum": [{"momentum": 0.0}],
    "SOAP": [{"every": 1, "betas": (0.5, 0.6)}, {"max_side": 5, "eps": 1e-2}, {"max_side": 3}],
    "SophiaH": [{"rho": 0.5, "eps": 0.1}],
    "SGDP": [{"delta": 5.0, "nesterov": True}, {"delta": 1.2, "weight_decay": 0.3, "dampening": 0.1}],
    "SGD": [
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True},
    ],
}
# What a tensor has one of, as ASGD's η and μ, is kept in single precision, but not in the transcriptions.
TOLERANCE = {"ASGD": 1e-6, "LDoG": 1e-6, "NovoGrad": 1e-6}
# The largest lr so far is kept in single precision.
TOLERANCE |= dict.fromkeys(("ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD"), 1e-6)


def cases() -> list[Any]:
    params: list[Any] = []
    for name, rule in steprule.catalogue().items():
        if name == "LBFGS":
            continue  # needs a loss: tests/test_lbfgs.py
        variants = [{}, *OPTIONS.get(name, [])]
        if "weight_decay" in rule.fields:
            beside = rule.fields["weight_decay"].not_decoupled is None
            variants += [{"weight_decay": 0.1}]
            variants += [{"weight_decay": d} for d in DECAYS if beside or not d.weight_decouple]
        variants.append({"maximize": True})
        params += [pytest.param(name, v, id=f"{name}-{v}") for v in variants]
    return params


DECAYS = [WeightDecay(0.1, True, False), WeightDecay(0.1, False, False), WeightDecay(0.1, True, True)]


def transcription(name: str) -> tuple[Any, dict[str, Any]]:
    file, fixed = FOLLOWS.get(name, (name.lower(), {}))
    return importlib.import_module(f"papers.{file}"), fixed


def ours(options: dict[str, Any]) -> dict[str, Any]:
    decay = options.get("weight_decay")
    if isinstance(decay, WeightDecay):
        return options | {"weight_decay": steprule.WeightDecay(*decay)}
    return options


def feed(optimizer: Any, param: torch.Tensor, gradient: np.ndarray, name: str) -> None:
    g = torch.from_numpy(gradient.copy())
    param.grad = g.to_sparse(1) if name == "SparseAdam" else g
    optimizer.step()


def feed_curvature(
    optimizer: Any, param: Any, paper: Any, state: Any, gradient: np.ndarray, betas: Any
) -> None:
    """Both get the same curvature: Sophia the gradient, others a diagonal of both signs."""
    own = {} if betas is None else {"betas": betas}
    if isinstance(optimizer, steprule.Sophia):
        param.grad = torch.from_numpy(gradient.copy())
        optimizer.update_hessian(3)
        paper.update_hessian(gradient, state, 3, **own)
    elif uses_curvature(type(optimizer)):
        diagonal = np.roll(gradient, 1) * 3
        optimizer.update_hessian({param: torch.from_numpy(diagonal)})
        paper.update_hessian(diagonal, state, **own)


@pytest.mark.usefixtures("iterations_in_double")
@pytest.mark.parametrize("runner", ["reference", "foreach", "fused"])
@pytest.mark.parametrize(("name", "options"), cases())
def test_equals_its_paper_in_double_precision(name: str, options: dict[str, Any], runner: str) -> None:
    # A wide matrix, where the ways to scale Muon's lr differ.
    shape = (5, 9) if "adjust_lr_fn" in options else SHAPES.get(name, (7, 5))
    rule = steprule.catalogue()[name]
    if runner != "reference" and name == "SparseAdam":
        pytest.skip(f"{name} has only the reference runner")
    if runner == "foreach" and by_lines(rule):
        pytest.skip(f"{name} has rows and columns, which lists have not")
    shapes = [shape, (6,)] if by_kind(rule) else [shape]
    # Kernels leave stacks of matrices to the loop, except those of rules on whole matrices.
    left = runner == "fused" and rule.matrices == "stacked" and not rule.on_matrices
    shapes += [(2, 3, 4)] if by_lines(rule) and name != "Muon" and not left else []
    for own in shapes:
        follow(name, options, runner, own)


def follow(name: str, options: dict[str, Any], runner: str, shape: tuple[int, ...]) -> None:
    rule = steprule.catalogue()[name]
    flags = {"reference": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    module, fixed = transcription(name)
    random = np.random.default_rng(5)
    theta = random.standard_normal(shape)
    param = torch.nn.Parameter(torch.from_numpy(theta.copy()))
    optimizer = rule([param], **ours(options), **flags[runner])
    given = fixed | options
    known = inspect.signature(module.init).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    state = module.init(theta, **{k: v for k, v in given.items() if takes_all or k in known})
    scale = 10 ** random.uniform(-3, 1, theta.shape)
    for t in range(1, STEPS + 1):
        gradient = random.standard_normal(theta.shape) * scale
        if t % 7 == 0:
            gradient[0] = 0
        if t % 3:
            feed_curvature(optimizer, param, module, state, gradient, given.get("betas"))
        feed(optimizer, param, gradient, name)
        rows = {"rows": np.any(gradient != 0, axis=1)} if name == "SparseAdam" else {}
        theta = module.step(theta, gradient, state, t, **given, **rows)
    tolerance = TOLERANCE.get(name, 1e-9)
    np.testing.assert_allclose(param.detach().numpy(), theta, rtol=tolerance, atol=tolerance)
