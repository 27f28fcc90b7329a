"""The transcriptions in `papers` against torch.optim: every rule and option that torch has.

Neither side is the library: this shows that the transcriptions are right.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from papers import (
    adabelief,
    adadelta,
    adafactor,
    adagrad,
    adam,
    adamatan2,
    adamax,
    adamp,
    adan,
    ademamix,
    adopt,
    asgd,
    came,
    decay,
    dog,
    dowg,
    lamb,
    laprop,
    lars,
    lbfgs,
    lion,
    madgrad,
    mars,
    muon,
    nadam,
    nadamw,
    novograd,
    prodigy,
    radam,
    rmsprop,
    rprop,
    sgd,
    sgdp,
    signum,
    sophia,
    sparse_adam,
    stableadamw,
    yogi,
)

STEPS = 60
MATRIX = (4, 7)
RELATIVE, ABSOLUTE = 1e-12, 1e-15

TORCH_RULES = {
    sgd: torch.optim.SGD,
    adam: torch.optim.Adam,
    adamax: torch.optim.Adamax,
    nadam: torch.optim.NAdam,
    radam: torch.optim.RAdam,
    rmsprop: torch.optim.RMSprop,
    adagrad: torch.optim.Adagrad,
    adadelta: torch.optim.Adadelta,
    rprop: torch.optim.Rprop,
    asgd: torch.optim.ASGD,
    sparse_adam: torch.optim.SparseAdam,
    adafactor: torch.optim.Adafactor,
    muon: torch.optim.Muon,
}
OTHER_RULES = [adabelief, sophia, lion, nadamw, signum, ademamix, laprop, yogi, adamatan2, came]
# What a number given as weight_decay is to them.
OWN_DECAY = [lamb, lars, prodigy, adopt, adan, stableadamw, novograd, adamp, sgdp, mars]
L2_DECAY = [dog, dowg, madgrad]

DECAYS = [{"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}]
OR_DECOUPLED = [*DECAYS, {"weight_decay": 0.1, "decoupled_weight_decay": True}]
CASES: dict[Any, list[dict[str, Any]]] = {
    sgd: [
        {},
        *DECAYS,
        {"lr": 0.05, "momentum": 0.9},
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.3},
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
    adam: [
        {},
        *OR_DECOUPLED,
        {"lr": 0.05, "betas": (0.6, 0.9), "eps": 1e-3},
        {"lr": 0.05, "betas": (0.6, 0.7), "amsgrad": True},
        {"betas": (0.0, 0.0), "amsgrad": True, "maximize": True, "weight_decay": 0.1},
    ],
    adamax: [{}, *DECAYS, {"lr": 0.05, "betas": (0.6, 0.7), "eps": 1e-3}],
    nadam: [
        {},
        *OR_DECOUPLED,
        {"lr": 0.05, "betas": (0.6, 0.9), "eps": 1e-3, "momentum_decay": 0.5},
    ],
    radam: [
        {},
        *OR_DECOUPLED,
        {"lr": 0.05, "betas": (0.6, 0.9), "eps": 1e-3},
        {"betas": (0.9, 0.6)},
    ],
    rmsprop: [
        {},
        *DECAYS,
        {"alpha": 0.6, "eps": 1e-3},
        {"lr": 1e-3, "centered": True},
        {"lr": 1e-3, "momentum": 0.9},
        {"lr": 1e-3, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
    ],
    adagrad: [
        {},
        *DECAYS,
        {"lr": 0.05, "lr_decay": 0.3, "initial_accumulator_value": 0.5, "eps": 1e-3},
    ],
    adadelta: [{}, *DECAYS, {"lr": 0.5, "rho": 0.6, "eps": 1e-3}],
    rprop: [
        {},
        {"maximize": True},
        {"lr": 0.1, "etas": (0.3, 1.7), "step_sizes": (0.02, 0.5)},
    ],
    asgd: [{}, *DECAYS, {"lr": 0.05, "lambd": 0.2, "alpha": 0.5, "t0": 10}],
    adafactor: [
        {},
        *DECAYS,
        {"lr": 0.5, "beta2_decay": -0.5, "eps": (1e-4, 0.3), "d": 2.0},
    ],
}


def named(cases: dict[Any, list[dict[str, Any]]]) -> list[Any]:
    """One test parameter per configuration, named after it."""
    return [
        pytest.param(paper, options, id=f"{short_name(paper)}-{options}")
        for paper, configurations in cases.items()
        for options in configurations
    ]


def short_name(paper: Any) -> str:
    return paper.__name__.rpartition(".")[2]


@pytest.fixture
def float64_scalars():
    """torch keeps mu_product, eta and mu in the default dtype: here they must not be rounded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def problem(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Numbers and gradients of many sizes, so that every ε matters somewhere; some are zero."""
    random = np.random.default_rng(seed)
    theta = np.asarray(random.normal(size=shape) * 10 ** random.uniform(-4, 0, size=shape))
    sizes = 10 ** random.uniform(-9, 1, size=shape)
    gradients = [
        np.asarray(sizes * random.normal(size=shape) * (random.random(size=shape) < 0.9)) for _ in range(STEPS)
    ]
    return theta, gradients


def close(actual: Any, expected: Any, *, rtol: float = RELATIVE, atol: float = ABSOLUTE) -> None:
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def compare_with_torch(
    paper: Any,
    rule: type[torch.optim.Optimizer],
    shape: tuple[int, ...],
    options: dict[str, Any],
    atol: float = ABSOLUTE,
) -> None:
    """The same 60 gradients through both, lr halved after 40; θ every step, then the state.

    atol: how far an element of θ may be off.
    """
    theta, gradients = problem(shape)
    parameter = torch.nn.Parameter(torch.tensor(theta))
    optimizer = rule([parameter], **options)
    state = paper.init(theta, **options)
    lr = optimizer.param_groups[0]["lr"]
    for t, gradient in enumerate(gradients, start=1):
        if t > 40:
            optimizer.param_groups[0]["lr"] = lr / 2
            options = {**options, "lr": lr / 2}
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        theta = paper.step(theta, gradient, state, t, **options)
        close(theta, parameter.detach().numpy(), atol=atol)
    saved = {key: value for key, value in optimizer.state[parameter].items() if key != "step"}
    assert saved.keys() == state.keys()
    for key, value in saved.items():
        close(state[key], value.numpy())


@pytest.mark.usefixtures("float64_scalars")
@pytest.mark.parametrize(("paper", "options"), named(CASES))
def test_equals_torch(paper, options):
    compare_with_torch(paper, TORCH_RULES[paper], MATRIX, options)


@pytest.mark.parametrize("shape", [(), (5,), (1, 6), (6, 1), (3, 4, 5)])
@pytest.mark.parametrize("options", CASES[adafactor], ids=str)
def test_adafactor_of_every_number_of_dimensions(shape, options):
    compare_with_torch(adafactor, torch.optim.Adafactor, shape, options)


def torch_defaults(rule: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """Those of torch's constructor, except the options that choose a runner."""
    other = {"self", "params", "foreach", "capturable", "differentiable", "fused"}
    parameters = inspect.signature(rule.__init__).parameters
    return {name: parameters[name].default for name in parameters if name not in other}


@pytest.mark.parametrize("paper", [*TORCH_RULES, lbfgs], ids=short_name)
def test_defaults_are_torchs(paper):
    """Every hyper-parameter of torch's is there with torch's default; the others are named here."""
    beyond_torch = {
        adam: {"optimized_update": False},
        radam: {"degenerate_to_sgd": True},
        sparse_adam: {"rows": ...},
        muon: {"maximize": False, "method": "newton_schulz"},
    }
    rule = torch.optim.LBFGS if paper is lbfgs else TORCH_RULES[paper]
    if paper is lbfgs and not CLIMBS:
        beyond_torch[lbfgs] = {"maximize": False}
    assert paper.step.__kwdefaults__ == torch_defaults(rule) | beyond_torch.get(paper, {})


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_decoupled_is_adamw(amsgrad):
    theta, gradients = problem(MATRIX)
    parameter = torch.nn.Parameter(torch.tensor(theta))
    optimizer = torch.optim.AdamW([parameter], lr=0.05, amsgrad=amsgrad)
    state = adam.init(theta, amsgrad=amsgrad)
    for t, gradient in enumerate(gradients, start=1):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        theta = adam.step(
            theta,
            gradient,
            state,
            t,
            lr=0.05,
            weight_decay=0.01,
            decoupled_weight_decay=True,
            amsgrad=amsgrad,
        )
        close(theta, parameter.detach().numpy())


@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.05, "betas": (0.6, 0.9), "eps": 1e-3}, {"maximize": True}],
    ids=str,
)
def test_sparse_adam_equals_torch(options):
    """Random rows each step, one of them given twice: torch adds both."""
    theta, gradients = problem((9, 3))
    random = np.random.default_rng(1)
    parameter = torch.nn.Parameter(torch.tensor(theta))
    optimizer = torch.optim.SparseAdam([parameter], **options)
    state = sparse_adam.init(theta)
    for t, source in enumerate(gradients, start=1):
        rows = random.choice(9, size=4, replace=False)
        given = np.append(rows, rows[0])
        values = np.concatenate([source[rows], random.normal(size=(1, 3))])
        gradient = np.zeros_like(theta)
        np.add.at(gradient, given, values)
        parameter.grad = torch.sparse_coo_tensor(
            torch.tensor(given[None]), torch.tensor(values), (9, 3), check_invariants=True
        )
        optimizer.step()
        theta = sparse_adam.step(theta, gradient, state, t, rows=rows, **options)
        close(theta, parameter.detach().numpy())
    for key, value in state.items():
        close(value, optimizer.state[parameter][key].numpy())


def test_sparse_adam_on_all_rows_is_adam_with_optimized_update():
    """torch has that form of Adam in SparseAdam only, so this proves Adam's option too."""
    theta, gradients = problem(MATRIX)
    options = {"lr": 0.05, "eps": 1e-3}
    states = sparse_adam.init(theta), adam.init(theta)
    one = other = theta
    for t, gradient in enumerate(gradients, start=1):
        one = sparse_adam.step(one, gradient, states[0], t, **options)
        other = adam.step(other, gradient, states[1], t, optimized_update=True, **options)
        close(one, other)


MUON_CASES = [
    {},
    {"lr": 0.05, "nesterov": False, "weight_decay": 0.3},
    {"momentum": 0.5, "adjust_lr_fn": "original"},
    {"lr": 0.05, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0},
    *[{"lr": 0.05, "adjust_lr_fn": "spectral_unclamped"}] * ("unclamped" in str(torch.optim.Muon.__doc__)),
    {"lr": 0.05, "ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "eps": 30.0},
]


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
@pytest.mark.parametrize("options", MUON_CASES, ids=str)
def test_muon_equals_torch_once_torch_keeps_float64(shape, options, monkeypatch):
    """torch rounds to bfloat16 in one place; without that rounding the two agree.

    NumPy's and torch's matrix products each sum in the order that suits the processor, so an element that
    is nearly 0 has the rounding errors of those around it: 1e-15, enough for the other rules, is exceeded on
    some processors.
    """
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    compare_with_torch(muon, torch.optim.Muon, shape, options, atol=1e-14)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (64, 32)])
def test_muon_is_near_torchs_bfloat16(shape):
    """Measured over 100 seeds, error of one step: 1.5 % in the middle, at worst 6 % for (7, 4),
    4 % for (5, 5), 2 % for (64, 32). Here, with seed 0, it is 0.9, 1.4, 2.0 and 1.8 %."""
    gradient = np.random.default_rng(0).normal(size=shape)
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    parameter.grad = torch.tensor(gradient)
    torch.optim.Muon([parameter], lr=1.0).step()
    ours = muon.step(np.zeros(shape), gradient, muon.init(np.zeros(shape)), 1, lr=1.0)
    error = np.linalg.norm(parameter.detach().numpy() - ours) / np.linalg.norm(ours)
    assert error < 0.03


def softplus_sum(x: torch.Tensor) -> torch.Tensor:
    """Convex and not quadratic: a small logistic regression."""
    data = torch.tensor(np.random.default_rng(3).normal(size=(12, 6)))
    return torch.log1p(torch.exp(data @ x)).sum() + 0.05 * (x @ x)


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    """A bent valley, which needs long searches."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def ripples(x: torch.Tensor) -> torch.Tensor:
    """Many minima, so that the search must zoom."""
    return (0.1 * x**2 + torch.sin(5 * x)).sum()


def straight(x: torch.Tensor) -> torch.Tensor:
    """No minimum at all; powers of two, so that both sides see it exactly straight."""
    return x @ torch.tensor([1.0, 1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)


def cliff(x: torch.Tensor) -> torch.Tensor:
    """Down a slope to a cliff at 3: the cubic's minimum stays near one end of the bracket."""
    return (100 * torch.sigmoid(20 * (x - 3)) - x).sum()


def cusp(x: torch.Tensor) -> torch.Tensor:
    """Steeper the nearer to its minimum, so that the search gives up on a narrow bracket."""
    return (x - 0.3).abs().sqrt().sum()


def bowl(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (x @ x)


def almost_straight(x: torch.Tensor) -> torch.Tensor:
    """y·s = 1.005e-10 after a step of 1: just enough to be remembered."""
    return (x + 0.5 * 1.005e-10 * x**2).sum()


def stairs(x: torch.Tensor) -> torch.Tensor:
    """Down, with one step up between the search's first two trials and one after."""
    up = 3.6 * torch.sigmoid(50 * (x - 1.5)) + 0.1 * torch.sigmoid(2000 * (x - 2.764))
    return (up - x - 0.05 * x**3).sum()


def dip(x: torch.Tensor) -> torch.Tensor:
    """A minimum next to the start, zero a little farther on, then up."""
    return (0.05 * x**2 - x * torch.exp(-4 * x**2)).sum()


def lbfgs_equals_torch(
    function: Callable[[torch.Tensor], torch.Tensor],
    start: np.ndarray,
    steps: int,
    options: dict[str, Any],
) -> None:
    """The same path with as many evaluations. 1e-10, since a search magnifies rounding: measured
    2.3e-12 of the largest number."""
    evaluations = 0

    def value(x: np.ndarray) -> float:
        nonlocal evaluations
        evaluations += 1
        return function(torch.tensor(x)).item()

    def gradient(x: np.ndarray) -> np.ndarray:
        place = torch.tensor(x, requires_grad=True)
        return torch.autograd.grad(function(place), place)[0].numpy()

    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.LBFGS([parameter], **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = function(parameter)
        loss.backward()
        return loss

    path = lbfgs.minimize(value, gradient, start, steps, **options)
    for theta in path:
        optimizer.step(closure)
        close(theta, parameter.detach().numpy(), rtol=0, atol=1e-10 * np.max(np.abs(theta)))
    assert evaluations == optimizer.state[parameter]["func_evals"]


WOLFE = {"line_search_fn": "strong_wolfe"}
ANYWHERE = np.random.default_rng(4).normal(size=6)
CLIMBS = "maximize" in inspect.signature(torch.optim.LBFGS).parameters  # from torch 2.14 on
LBFGS_CASES = [
    (softplus_sum, ANYWHERE, 4, {"max_iter": 4}),
    (softplus_sum, ANYWHERE, 2, {"max_iter": 6, "lr": 0.3, "history_size": 3}),
    (softplus_sum, ANYWHERE, 3, {}),
    (softplus_sum, ANYWHERE, 2, {"max_iter": 30, "tolerance_grad": 1e-2}),
    (softplus_sum, ANYWHERE, 2, {"max_iter": 30, "tolerance_change": 1e-3}),
    (softplus_sum, ANYWHERE, 3, {"max_iter": 20, "max_eval": 3}),
    (softplus_sum, ANYWHERE, 3, WOLFE),
    (rosenbrock, ANYWHERE, 6, {"max_iter": 4, **WOLFE}),
    (rosenbrock, ANYWHERE, 1, {"history_size": 2, **WOLFE}),
    (rosenbrock, ANYWHERE, 3, {"max_eval": 4, "lr": 5.0, **WOLFE}),
    (rosenbrock, ANYWHERE, 2, {"max_iter": 10, "tolerance_change": 1e-2, **WOLFE}),
    # No trial after the first: it is taken if it is better than the start, as only here.
    (rosenbrock, ANYWHERE, 2, {"max_eval": 1, "lr": 0.1, **WOLFE}),
    (rosenbrock, ANYWHERE, 2, {"max_eval": 1, "lr": 50.0, **WOLFE}),
    # One evaluation budget for the way out and the way back.
    (cliff, ANYWHERE[:1], 1, {"max_iter": 1, "max_eval": 8, "lr": 1e-3, **WOLFE}),
    (straight, np.zeros(6), 2, {"max_iter": 3, "max_eval": 9, **WOLFE}),
    (straight, np.zeros(6), 3, {"max_iter": 3}),
    # The first step lands on the other side of the bowl, at the same height.
    (bowl, np.ones(1), 1, {"max_iter": 5, "lr": 2.0}),
    (almost_straight, np.zeros(1), 1, {"max_iter": 2, "max_eval": 9}),
    (stairs, np.zeros(1), 1, {"max_iter": 1, "max_eval": 9, "lr": 0.5, **WOLFE}),
    # The zoom's first trial has f(t)/t = -0.998e-4, then -1.007e-4: c1 is 1e-4.
    (dip, np.zeros(1), 1, {"max_iter": 1, "max_eval": 9, "lr": 3.02591, **WOLFE}),
    (dip, np.zeros(1), 1, {"max_iter": 1, "max_eval": 9, "lr": 3.02590, **WOLFE}),
]


def hill(x: torch.Tensor) -> torch.Tensor:
    """The highest point of the valley turned upside down."""
    return -rosenbrock(x)


if CLIMBS:
    LBFGS_CASES += [(hill, ANYWHERE, 3, {"maximize": True, "max_iter": 4, **more}) for more in ({}, WOLFE)]


@pytest.mark.parametrize(("function", "start", "steps", "options"), LBFGS_CASES)
def test_lbfgs_equals_torch(function, start, steps, options):
    lbfgs_equals_torch(function, start, steps, options)


@pytest.mark.parametrize("lr", [1e-3, 1.0, 3.0, 20.0, 100.0])
@pytest.mark.parametrize(("function", "size"), [(rosenbrock, 2), (ripples, 1), (cliff, 1), (cusp, 2)])
def test_strong_wolfe_equals_torch(function, size, lr):
    """One search from each of 15 starts, which together take every path through it."""
    for seed in range(15):
        start = np.random.default_rng(seed).normal(size=size)
        lbfgs_equals_torch(function, start, 1, {"lr": lr, "max_iter": 1, "max_eval": 50, **WOLFE})


RULES = [*TORCH_RULES, *OTHER_RULES, *OWN_DECAY, *L2_DECAY]
DECAYING = [paper for paper in RULES if paper not in (rprop, sparse_adam)]


@pytest.mark.parametrize("paper", RULES, ids=short_name)
def test_maximize_is_the_negated_gradient(paper):
    theta, gradients = problem(MATRIX)
    up = down = theta
    states = paper.init(theta), paper.init(theta)
    for t, gradient in enumerate(gradients, start=1):
        up = paper.step(up, gradient, states[0], t, maximize=True)
        down = paper.step(down, -gradient, states[1], t)
        np.testing.assert_array_equal(up, down)


@pytest.mark.parametrize("paper", DECAYING, ids=short_name)
def test_weight_decay_modes(paper):
    """Each mode is the undecayed rule on another θ or g; lr = 0.2, λ = 0.1."""
    theta, gradients = problem(MATRIX)
    gradient = gradients[0]

    def one_step(theta: np.ndarray, gradient: np.ndarray, weight_decay: Any) -> np.ndarray:
        state = paper.init(theta, lr=0.2)
        return paper.step(theta, gradient, state, 1, lr=0.2, weight_decay=weight_decay)

    def change(theta: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        return one_step(theta, gradient, 0.0) - theta

    coupled = one_step(theta, gradient, decay.WeightDecay(0.1, weight_decouple=False))
    close(coupled, theta + change(theta, gradient + 0.1 * theta))
    if paper in (asgd, adafactor, lamb, lars, dog, dowg, madgrad):
        return  # their own step depends on θ
    decoupled = one_step(theta, gradient, decay.WeightDecay(0.1))
    close(decoupled, 0.98 * theta + change(theta, gradient))
    absolute = one_step(theta, gradient, decay.WeightDecay(0.1, absolute=True))
    close(absolute, 0.9 * theta + change(theta, gradient))


@pytest.mark.parametrize("paper", OTHER_RULES, ids=short_name)
def test_a_number_means_decoupled_decay_beyond_torch(paper):
    theta, gradients = problem(MATRIX)
    number, explicit = (
        paper.step(theta, gradients[0], paper.init(theta), 1, lr=0.2, weight_decay=weight_decay)
        for weight_decay in (0.1, decay.WeightDecay(0.1))
    )
    np.testing.assert_array_equal(number, explicit)


@pytest.mark.parametrize("paper", RULES, ids=short_name)
def test_arguments_are_left_alone(paper):
    theta, gradients = problem(MATRIX)
    state = paper.init(theta)
    for t, gradient in enumerate(gradients[:3], start=1):
        before = theta.copy(), gradient.copy(), {key: value.copy() for key, value in state.items()}
        arrays = dict(state)
        new = paper.step(theta, gradient, state, t)
        np.testing.assert_array_equal(theta, before[0])
        np.testing.assert_array_equal(gradient, before[1])
        for key, value in arrays.items():
            np.testing.assert_array_equal(value, before[2][key])
        theta = new
