"""The transcriptions that torch.optim cannot check, against the arithmetic of their papers.

torch has no AdaBelief, Sophia, AdaHessian or Lion, and neither AMSGrad with `optimized_update` nor RAdam
without its degeneration to SGD.
"""

import numpy as np
import pytest
from papers import adabelief, adahessian, adam, lion, radam, sophia, sophiah

STEPS = 60


def close(actual, expected, atol=1e-15):
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=atol)


def test_documented_defaults():
    decay = {"weight_decay": 0, "maximize": False}
    belief = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-16, "optimized_update": True}
    options = {"amsgrad": False, "rectify": True, "degenerate_to_sgd": True, "eps_in_state": False}
    curvature = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-12, "rho": 0.03}
    hutchinson = {"lr": 6e-4, "betas": (0.96, 0.99), "eps": 1e-12, "rho": 0.01}
    hessian = {"lr": 0.15, "betas": (0.9, 0.999), "eps": 1e-4, "hessian_power": 1.0}
    sign = {"lr": 1e-4, "betas": (0.9, 0.99)}
    assert adabelief.step.__kwdefaults__ == belief | options | decay
    assert sophia.step.__kwdefaults__ == curvature | decay
    assert sophia.update_hessian.__kwdefaults__ == {"betas": (0.9, 0.95)}
    assert sophiah.step.__kwdefaults__ == hutchinson | decay
    assert sophiah.update_hessian.__kwdefaults__ == {"betas": (0.96, 0.99)}
    assert adahessian.step.__kwdefaults__ == hessian | decay
    assert adahessian.update_hessian.__kwdefaults__ == {"betas": (0.9, 0.999)}
    assert lion.step.__kwdefaults__ == sign | decay


def test_amsgrad_with_optimized_update_by_hand():
    """β = (½, ½), ε = 1, lr = 1, g = 2 then 0: the second step divides by the first step's v."""
    options = {
        "lr": 1.0,
        "betas": (0.5, 0.5),
        "eps": 1.0,
        "amsgrad": True,
        "optimized_update": True,
    }
    state = adam.init(np.zeros(1), amsgrad=True)
    # m = 1, v = 2;  √(1-½)/(1-½) = √2;  √2·1/(√2 + 1)
    first = -np.sqrt(2) / (np.sqrt(2) + 1)
    theta = adam.step(np.zeros(1), np.array([2.0]), state, 1, **options)
    close(theta, [first])
    # m = ½, v = 1, largest v = 2;  √(1-¼)/(1-¼) = √(4/3);  √(4/3)·½/(√2 + 1)
    theta = adam.step(theta, np.array([0.0]), state, 2, **options)
    close(theta, [first - np.sqrt(4 / 3) / 2 / (np.sqrt(2) + 1)])


def test_radam_without_degeneration_waits_for_the_rectification():
    """β2 = 0.999 gives ρ₅ = 4.9960 and ρ₆ = 5.9942: five steps of nothing, then r₆ = 0.0258."""
    one = np.ones(1)
    state = radam.init(one)
    theta = one
    for t in range(1, 6):
        theta = radam.step(theta, one, state, t, degenerate_to_sgd=False)
        close(theta, one)
    # g is always 1, so m̂ = v̂ = 1 and the step is lr·r
    theta = radam.step(theta, one, state, 6, degenerate_to_sgd=False)
    np.testing.assert_allclose(theta, one - 1e-3 * 0.0258211, rtol=0, atol=1e-10)


def test_adabelief_by_hand():
    """β = (½, ¾), ε = 0.01, lr = 1, g = 1 then -1, without rectification."""
    options = {
        "lr": 1.0,
        "betas": (0.5, 0.75),
        "eps": 0.01,
        "optimized_update": False,
        "rectify": False,
    }
    state = adabelief.init(np.zeros(1))
    assert list(state) == ["exp_avg", "exp_avg_var"]
    # m = ½;  g - m = ½;  s = ¼·¼ = 1/16;  m̂ = ½/½ = 1;  ŝ = (1/16 + 0.01)/(1 - ¾) = 0.29
    theta = adabelief.step(np.zeros(1), np.array([1.0]), state, 1, **options)
    close(state["exp_avg_var"], [1 / 16])
    first = -1 / (np.sqrt(0.29) + 0.01)
    close(theta, [first])
    # m = ¼ - ½ = -¼;  g - m = -¾;  s = ¾/16 + ¼·9/16 = 3/16;  m̂ = -¼/¾ = -⅓;
    # ŝ = (3/16 + 0.01)/(1 - 9/16) = 0.1975·16/7
    theta = adabelief.step(theta, np.array([-1.0]), state, 2, **options)
    close(state["exp_avg"], [-1 / 4])
    close(state["exp_avg_var"], [3 / 16])
    close(theta, [first + 1 / 3 / (np.sqrt(0.1975 * 16 / 7) + 0.01)])


def test_adabelief_with_the_papers_eps_by_hand():
    """As above, but the 0.01 stays in s: 1/16 + 0.01, then ¾·(1/16 + 0.01) + 9/64 + 0.01."""
    options = {
        "lr": 1.0,
        "betas": (0.5, 0.75),
        "eps": 0.01,
        "optimized_update": False,
        "rectify": False,
    }
    state = adabelief.init(np.zeros(1))
    theta = adabelief.step(np.zeros(1), np.array([1.0]), state, 1, eps_in_state=True, **options)
    close(state["exp_avg_var"], [0.0725])
    first = -1 / (np.sqrt(0.0725 / 0.25) + 0.01)
    close(theta, [first])
    theta = adabelief.step(theta, np.array([-1.0]), state, 2, eps_in_state=True, **options)
    close(state["exp_avg_var"], [0.205])
    close(theta, [first + 1 / 3 / (np.sqrt(0.205 / 0.4375) + 0.01)])


def belief_of_a_constant(t: int, beta1: float, beta2: float) -> float:
    """sₜ while g is always 1: g - mₖ = β1ᵏ, so s = (1-β2)·Σ β2^(t-k)·β1^(2k), k = 1…t."""
    ratio = beta1**2 / beta2
    return (1 - beta2) * beta2**t * ratio * (1 - ratio**t) / (1 - ratio)


@pytest.mark.parametrize("degenerate_to_sgd", [True, False])
@pytest.mark.parametrize("eps_in_state", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("optimized_update", [False, True])
@pytest.mark.parametrize("rectify", [False, True])
def test_adabelief_on_a_constant_gradient(degenerate_to_sgd, eps_in_state, amsgrad, optimized_update, rectify):
    """g = 1 gives m̂ = 1 and s in closed form, so each of 60 steps is known in every option."""
    lr, beta1, beta2, eps = 0.1, 0.6, 0.99, 1e-3
    rho_end = 2 / (1 - beta2) - 1
    options = {
        "lr": lr,
        "betas": (beta1, beta2),
        "eps": eps,
        "rectify": rectify,
        "degenerate_to_sgd": degenerate_to_sgd,
        "amsgrad": amsgrad,
        "optimized_update": optimized_update,
        "eps_in_state": eps_in_state,
    }
    one = np.ones(1)
    state = adabelief.init(one, **options)
    theta, expected, largest = np.zeros(1), 0.0, 0.0
    for t in range(1, STEPS + 1):
        correction = 1 - beta2**t
        s = belief_of_a_constant(t, beta1, beta2)
        if eps_in_state:
            s += eps * correction / (1 - beta2)
        largest = max(largest, s)
        s = (largest if amsgrad else s) + (0 if eps_in_state else eps)
        rho = rho_end - 2 * t * beta2**t / correction
        if rectify and rho < 5:
            expected -= lr if degenerate_to_sgd else 0
        else:
            top, bottom = (rho - 4) * (rho - 2) * rho_end, (rho_end - 4) * (rho_end - 2) * rho
            r = np.sqrt(top / bottom) if rectify else 1.0
            if optimized_update:
                expected -= lr * r * np.sqrt(correction) / (np.sqrt(s) + eps)
            else:
                expected -= lr * r / (np.sqrt(s / correction) + eps)
        theta = adabelief.step(theta, one, state, t, **options)
        close(theta, [expected])


def test_sophia_by_hand():
    """β = (½, ¾), rho = ½, lr = 1, ε = ½: one number is clipped, the other is not."""
    options = {"lr": 1.0, "betas": (0.5, 0.75), "eps": 0.5, "rho": 0.5}
    state = sophia.init(np.zeros(2))
    # h = ¼·8·ĝ² with n = 8:  ĝ = (½, 2) gives (½, 8)
    sophia.update_hessian(np.array([0.5, 2.0]), state, 8, betas=options["betas"])
    close(state["hessian"], [0.5, 8.0])
    # m = (1, -1);  m/(h + ε) = (1, -1/8.5);  clipped to ±½, times lr/rho = 2
    theta = sophia.step(np.zeros(2), np.array([2.0, -2.0]), state, 1, **options)
    close(theta, [-1.0, 2 / 8.5])
    # h = ¾·(½, 8) + ¼·8·(1, 0) = (2.375, 6);  m = ½·(1, -1) + ½·(-4, 0) = (-1.5, -½);
    # m/(h + ε) = (-1.5/2.875 → -½, -½/6.5)
    sophia.update_hessian(np.array([1.0, 0.0]), state, 8, betas=options["betas"])
    theta = sophia.step(theta, np.array([-4.0, 0.0]), state, 2, **options)
    close(theta, [-1.0 + 1.0, 2 / 8.5 + 1 / 6.5])


def test_sophia_defaults_by_hand():
    """lr = 1e-4, β = (0.9, 0.95), ε = 1e-12, rho = 0.03."""
    state = sophia.init(np.zeros(3))
    sophia.update_hessian(np.array([2.0, 0.01, 0.0]), state, 10)
    close(state["hessian"], [0.05 * 10 * 4, 0.05 * 10 * 1e-4, 0])
    # m = 0.1·(0.2, 0.2, 1e-13) = (0.02, 0.02, 1e-14);  m/(h + ε) = (0.02/2, 400, 1e-14/1e-12)
    theta = sophia.step(np.zeros(3), np.array([0.2, 0.2, 1e-13]), state, 1)
    close(theta, [-1e-4 / 0.03 * 0.02 / (2 + 1e-12), -1e-4, -1e-4 / 0.03 * 0.01], atol=0)


def test_sophia_h_by_hand():
    """β = (½, ¾), rho = ½, lr = 2, ε = ¼: clipped, not clipped, and negative curvature."""
    options = {"lr": 2.0, "betas": (0.5, 0.75), "eps": 0.25, "rho": 0.5}
    state = sophiah.init(np.zeros(3))
    sophiah.update_hessian(np.array([1.0, 16.0, -8.0]), state, betas=options["betas"])
    close(state["hessian"], [0.25, 4.0, -2.0])
    # m = (1, 1, -1/16);  max(rho·h, ε) = (¼, 2, ¼);  m/that = (4 → 1, ½, -¼)
    theta = sophiah.step(np.zeros(3), np.array([2.0, 2.0, -0.125]), state, 1, **options)
    close(theta, [-2.0, -1.0, 0.5])


def test_adahessian_by_hand():
    """β = (½, ¾), lr = 1, ε = 1: two estimates before the first step, none before the second."""
    options = {"lr": 1.0, "betas": (0.5, 0.75), "eps": 1.0}
    state = adahessian.init(np.zeros(2))
    close(adahessian.step(np.ones(2), np.ones(2), adahessian.init(np.ones(2)), 1, **options), [1.0, 1.0])
    for diagonal in ([4.0, -2.0], [4.0, 0.0]):
        adahessian.update_hessian(np.array(diagonal), state, betas=options["betas"])
    # v = (¾·4 + ¼·16, ¾·1) = (7, ¾);  v̂ = v/(1 - 9/16) = (16, 12/7);  m = g/2, m̂ = g
    theta = adahessian.step(np.zeros(2), np.array([10.0, 0.0]), state, 1, **options)
    close(theta, [-2.0, 0.0])
    # m̂ = (½·5 + ½·2)/¾ = 14/3, and ½·4/¾ = 8/3, over 5 and √(12/7) + 1;  with k = ½ over 3 and (12/7)^¼ + 1
    close(
        adahessian.step(theta, np.array([2.0, 4.0]), dict(state), 2, **options),
        [-2 - 14 / 15, -8 / 3 / (np.sqrt(12 / 7) + 1)],
    )
    root = adahessian.step(theta, np.array([2.0, 4.0]), dict(state), 2, hessian_power=0.5, **options)
    close(root, [-2 - 14 / 9, -8 / 3 / ((12 / 7) ** 0.25 + 1)])


def test_lion_by_hand():
    """β = (0.9, 0.99), lr = 1: the step's own average is not the one that is kept."""
    state = lion.init(np.zeros(4))
    # sign(0.1·g);  m = 0.01·g
    theta = lion.step(np.zeros(4), np.array([3.0, -2.0, 0.0, 100.0]), state, 1, lr=1.0)
    close(theta, [-1.0, 1.0, 0.0, -1.0])
    close(state["exp_avg"], [0.03, -0.02, 0.0, 1.0])
    # 0.9·(0.03, -0.02, 0, 1) + 0.1·(-0.28, 0.1, 0, 10) = (-0.001, -0.008, 0, 1.9)
    theta = lion.step(theta, np.array([-0.28, 0.1, 0.0, 10.0]), state, 2, lr=1.0)
    close(theta, [0.0, 2.0, 0.0, -2.0])
    # 0.99·(0.03, -0.02, 0, 1) + 0.01·(-0.28, 0.1, 0, 10)
    close(state["exp_avg"], [0.0269, -0.0188, 0.0, 1.09])


def test_lion_defaults_by_hand():
    state = lion.init(np.zeros(1))
    theta = lion.step(np.ones(1), np.array([5.0]), state, 1)
    close(theta, [1 - 1e-4])
    close(state["exp_avg"], [0.05])
