"""Rules on whole matrices: kernels with words on whole matrices in between step as the loop does."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from rules import assert_same, numbers
from torch import Tensor, nn

import steprule
from steprule import hyper, slot
from steprule.declare import Matrix
from steprule.engine import plans
from steprule.engine.runners import matrices
from steprule.matrix.words import matrix_word, transpose
from steprule.words import columns, ema, norm, rows, sqrt, total

SHAPES = ((64, 80), (80, 64), (64, 80), (3, 5), (64, 64), (1, 7))
LOOP: dict[str, Any] = {"fused": False}


@matrix_word(dtype="bfloat16")
def narrow(x: Tensor, power: float, pair: tuple[float, float]) -> Tensor:
    """A word in few bits, with plain numbers."""
    return (x.bfloat16() * pair[0]).sign() * pair[1] * power


class Whitening(Matrix):
    """A little of everything: products, slots per pair of rows, sums of rows and matrices, `if`s."""

    lr: float = hyper(default=0.01, at_least=0)
    beta: float = hyper(default=0.9, at_least=0, below=1)
    every: int = hyper(default=3, at_least=1)
    largest_side: int = hyper(default=70, at_least=0)

    m = slot("exp_avg")
    left = slot("left", per="left")
    kept = slot("kept", per="left")
    right = slot("right", per="right")
    size = slot("size", per="row")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        s.m = ema(s.m, g, h.beta)
        s.left = ema(s.left, g @ transpose(g), h.beta)
        if t % h.every == 1:
            s.kept = s.left / (1 + norm(s.left, over="matrix"))
        u = s.kept @ s.m + narrow(s.m, t, (h.beta, 2.0))
        if columns(p) <= h.largest_side:
            s.right = s.right + transpose(g) @ g
            u = u + 0.01 * (s.m @ s.right)
        s.size = ema(s.size, norm(u, over="row"), h.beta)
        u = u / (1 + s.size)
        return -h.lr * sqrt(rows(p) / columns(p)) * u / (1 + total(u * u, over="matrix")) * (1 + 0.1 * norm(u))


def stepped(
    rule: Any,
    steps: int,
    shapes: Any = SHAPES,
    dtype: torch.dtype = torch.float32,
    late: int | None = None,
    device: Any = "cpu",
    **options: Any,
) -> tuple[Any, list[Any]]:
    params = [nn.Parameter(numbers(shape, dtype, seed=i).to(device)) for i, shape in enumerate(shapes)]
    optimizer = rule(params, **options)
    for step in range(steps):
        for place, param in enumerate(params):
            param.grad = numbers(tuple(param.shape), dtype, seed=100 * step + place).to(device)
            if place == late and step < 2:
                param.grad = None
        optimizer.step()
    return optimizer, params


def assert_close(ours: Any, wanted: Any, tolerance: float) -> None:
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# With what happens only at some steps, and with sides that are too long.
RULES: list[tuple[Any, dict[str, Any]]] = [
    (steprule.Kron, {"fit_start": 2, "fit_decay": 1.0, "max_side": 70}),
    (steprule.SOAP, {"every": 3, "max_side": 70, "lr": 1e-3}),
    (steprule.SOAP, {"every": 2, "lr": 1e-3}),
    (steprule.Shampoo, {"every": 2, "max_side": 70, "lr": 1e-3}),
    (steprule.Shampoo, {"every": 2, "graft": False, "both_sides": False, "eps": (1e-2, 1e-8)}),
]
STORAGE: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.float64, {}),
    (torch.float32, {"state_dtype": "bf16"}),
    (torch.float32, {"state_dtype": "int8"}),
    (torch.bfloat16, {"low_precision": "none"}),
    (torch.bfloat16, {"low_precision": "kahan"}),
    (torch.bfloat16, {"low_precision": "master"}),
    (torch.bfloat16, {"low_precision": "stochastic", "state_dtype": "int8"}),
]


@pytest.mark.parametrize(
    "modifiers", [[], [steprule.GlobalNormClip(0.1), steprule.Cautious(), steprule.EMA(0.9)]]
)
@pytest.mark.parametrize("rule", [steprule.Muon, Whitening])
@pytest.mark.parametrize(("dtype", "storage"), STORAGE)
def test_kernels_step_as_the_loop_does(
    rule: Any, dtype: torch.dtype, storage: dict[str, Any], modifiers: list[Any]
) -> None:
    assert_steps_as_the_loop(rule, dtype, modifiers=modifiers, **storage)


@pytest.mark.parametrize(("rule", "own"), RULES)
@pytest.mark.parametrize(("dtype", "storage"), [STORAGE[0], STORAGE[1], STORAGE[-1]])
def test_what_happens_at_some_steps_happens_in_kernels(
    rule: Any, own: dict[str, Any], dtype: torch.dtype, storage: dict[str, Any]
) -> None:
    if rule is steprule.Kron and "state_dtype" in storage:  # it refuses 8 bits for what a fit changes slowly
        storage = {**storage, "state_dtype": {"momentum_buffer": storage["state_dtype"]}}
    assert_steps_as_the_loop(rule, dtype, **own, **storage)


def assert_steps_as_the_loop(rule: Any, dtype: torch.dtype, **options: Any) -> None:
    ours, params = stepped(rule, 5, dtype=dtype, late=2, **options)
    loop, wanted = stepped(rule, 5, dtype=dtype, late=2, **options, **LOOP)
    assert "runner: cpu_kernel" in ours.explain()
    assert "runner: reference" in loop.explain()
    assert "by the reference" not in ours.explain()
    # Products of several matrices at once add in another order.
    assert_close(params, wanted, 1e-12 if dtype == torch.float64 else 2e-2 if dtype == torch.bfloat16 else 1e-5)
    for param, like in zip(params, wanted, strict=True):
        assert ours.state[param].keys() == loop.state[like].keys()
        assert ours.state[param]["step"] == loop.state[like]["step"] if "step" in ours.state[param] else True


def looking(seen: list[tuple[int, ...]]) -> Any:
    """A rule that notes the shapes of the matrices that its word is given."""

    @matrix_word
    def looked_at(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x.clone()

    class Looks(Matrix):
        lr: float = hyper(default=0.1)
        clip: bool = hyper(default=False)

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
            return -h.lr * looked_at(g / norm(g) if h.clip else g)

    return Looks


def test_equal_matrices_are_worked_on_together() -> None:
    seen: list[tuple[int, ...]] = []
    stepped(looking(seen), 1)
    assert sorted(seen) == [(1, 7), (2, 64, 80), (3, 5), (64, 64), (80, 64)]


def test_what_is_in_memory_between_sweeps_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, params = stepped(steprule.Muon, 3)
    monkeypatch.setattr(matrices, "CACHED", 4 * 64 * 80)
    cut, others = stepped(steprule.Muon, 3)
    assert len(whole.explain()) == len(cut.explain())
    assert_close(params, others, 1e-5)


def test_what_no_word_reads_any_more_is_freed_at_once() -> None:
    made: list[Any] = []
    freed: list[bool] = []

    @matrix_word
    def first(x: Tensor) -> Tensor:
        made.append(weakref.ref(found := x.clone()))
        return found

    @matrix_word
    def last(x: Tensor) -> Tensor:
        freed.append(made[-1]() is None)
        return x.clone()

    class Frees(Matrix):
        lr: float = hyper(default=0.1)

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
            return -h.lr * last(transpose(first(g) @ transpose(g)) @ g)

    stepped(Frees, 1)
    assert freed == [True] * 5


@pytest.mark.parametrize("runner", [{}, LOOP])
def test_a_condition_on_the_step_is_decided_before_it(runner: dict[str, Any]) -> None:
    optimizer, (param, *_) = stepped(Whitening, 1, shapes=((4, 6),), **runner)
    kept = copy.deepcopy(optimizer.state[param]["kept"])
    assert kept.any()
    for _ in range(2):
        optimizer.step()
        assert_same(optimizer.state[param]["kept"], kept)
    optimizer.step()
    assert not optimizer.state[param]["kept"].equal(kept)


class TakesTwice(Matrix):
    """Whole matrices of parameters before and after a sweep."""

    lr: float = hyper(default=0.01)

    m = slot("exp_avg")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        s.m = ema(s.m, p @ transpose(p) @ g, 0.9)
        return -h.lr * (s.m @ transpose(p) @ p)


def test_what_a_sweep_keeps_may_be_taken_twice() -> None:
    ours, params = stepped(TakesTwice, 3, shapes=((3, 5), (4, 2), (3, 5)))
    _, wanted = stepped(TakesTwice, 3, shapes=((3, 5), (4, 2), (3, 5)), **LOOP)
    assert "runner: cpu_kernel" in ours.explain()
    assert_close(params, wanted, 1e-4)


class AsksForASum(Matrix):
    """An `if` on what only the step itself can find out."""

    lr: float = hyper(default=0.1)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return g if norm(g) > 1 else -g


def test_a_condition_on_a_sum_cannot_be_decided_before_the_step() -> None:
    with pytest.raises(TypeError, match=r"^AsksForASum\.update: 'if' on .* may change between steps"):
        AsksForASum([nn.Parameter(torch.ones(2, 2))])


def test_a_checkpoint_continues_bit_for_bit() -> None:
    whole, params = stepped(Whitening, 5, late=1, state_dtype="int8")
    half, others = stepped(Whitening, 3, late=1, state_dtype="int8")
    saved, kept = half.state_dict(), [nn.Parameter(x.detach().clone()) for x in others]
    again = Whitening(kept, state_dtype="int8")
    again.load_state_dict(saved)
    for step in (3, 4):
        for place, param in enumerate(kept):
            param.grad = numbers(tuple(param.shape), torch.float32, seed=100 * step + place)
        again.step()
    assert_same([x.detach() for x in kept], [x.detach() for x in params])
    assert_same([again.state[x] for x in kept], [whole.state[x] for x in params])


# How matrices lie in a parameter


def parts_of(view: dict[str, Any], x: Tensor) -> list[Tensor]:
    """The matrices in a parameter, found in another way than the library does."""
    x = x.reshape(x.shape[0], -1) if view.get("flatten") else x
    stack = list(x.reshape(-1, *x.shape[-2:]))
    along = view.get("dim", 0)
    pieces = [piece for one in stack for piece in one.chunk(view.get("split", 1), along)]
    return [piece.T if view.get("transpose") else piece for piece in pieces]


VIEWS: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({}, (3, 6, 4)),
    ({}, (2, 3, 4, 6)),
    ({"flatten": True}, (6, 4, 3, 3)),
    ({"split": 3}, (12, 5)),
    ({"split": 3, "dim": 1}, (5, 12)),
    ({"transpose": True}, (4, 6)),
    ({"transpose": True, "split": 2, "dim": 1}, (4, 6)),
    ({"split": 2}, (3, 6, 4)),
    ({"split": 2, "dim": 1, "transpose": True}, (3, 6, 4)),
    ({"flatten": True, "split": 2, "dim": 1}, (6, 4, 3, 3)),
]
MANY = (*VIEWS, VIEWS[3], VIEWS[4])


@pytest.mark.parametrize("runner", [{}, LOOP])
@pytest.mark.parametrize("rule", [steprule.Muon, Whitening])
@pytest.mark.parametrize(("view", "shape"), VIEWS)
def test_each_matrix_in_a_parameter_steps_as_if_it_were_alone(
    rule: Any, view: dict[str, Any], shape: tuple[int, ...], runner: dict[str, Any]
) -> None:
    whole = nn.Parameter(numbers(shape, torch.float64, seed=1))
    alone = [nn.Parameter(x.detach().clone().contiguous()) for x in parts_of(view, whole)]
    together = rule([{"params": [whole], "views": [view]}], **runner)
    apart = rule(alone, **runner)
    steps = 4 if rule is Whitening else 3
    for step in range(steps):
        whole.grad = numbers(shape, torch.float64, seed=10 + step)
        for param, gradient in zip(alone, parts_of(view, whole.grad), strict=True):
            param.grad = gradient.contiguous()
        if rule is Whitening:  # which has the norm of the whole parameter
            together.step()
            continue
        together.step()
        apart.step()
    if rule is Whitening:
        kernel = rule(
            [{"params": [again := nn.Parameter(numbers(shape, torch.float64, seed=1))], "views": view}]
        )
        for step in range(steps):
            again.grad = numbers(shape, torch.float64, seed=10 + step)
            kernel.step()
        assert_close([whole], [again], 1e-10)
        assert_close(together.state[whole].values(), kernel.state[again].values(), 1e-10)
        return
    assert_close(
        parts_of(view, whole.detach()), [x.detach() for x in alone], 1e-2 if "bf" in str(rule) else 1e-10
    )


def test_parameters_with_views_and_without_in_one_group() -> None:
    def made(**runner: Any) -> list[Any]:
        params = [nn.Parameter(numbers(shape, torch.float32, seed=i)) for i, (_, shape) in enumerate(MANY)]
        optimizer = steprule.Muon([{"params": params, "views": [view for view, _ in MANY]}], **runner)
        for step in range(3):
            for place, param in enumerate(params):
                param.grad = numbers(tuple(param.shape), torch.float32, seed=100 * step + place)
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.param_groups[0]["views"][3] == {
            "flatten": False,
            "split": 3,
            "dim": 0,
            "transpose": False,
        }
        return params

    assert_close(made(), made(**LOOP), 1e-5)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"split": 5}, r"split=5 of 12 rows, must be equal parts"),
        ({"split": 0}, r"split=0, must be a whole number, at least 1, or the rows of each matrix"),
        ({"split": (8, 3)}, r"split=\(8, 3\), 11 together, must be 12 together, the rows of the weight"),
        ({"split": (8, 4, 0)}, r"split=\(8, 4, 0\), must be two sizes or more, each at least 1"),
        ({"split": (12,)}, r"split=\(12,\), must be two sizes or more, each at least 1"),
        ({"split": (8, 4), "dim": 1}, r"split=\(8, 4\) with dim=1, must be along the rows: dim=0"),
        ({"dim": 2}, r"dim=2, must be 0 or 1"),
        ({"flat": True}, r"\{'flat': True\}, must be a dict with flatten, split, dim, transpose, or None"),
        ({"flatten": 1}, r"flatten=1, must be True or False"),
        ([None, None], r"2 views for 1 parameters, must be one for each"),
    ],
)
def test_views_that_do_not_fit(view: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^Muon: views: {message}"):
        steprule.Muon([{"params": [nn.Parameter(torch.ones(12, 4))], "views": view}])


def test_views_are_for_matrices() -> None:
    with pytest.raises(
        ValueError, match=r"^Muon: views: of a parameter of shape \(3,\), must be two dimensions"
    ):
        steprule.Muon([{"params": [nn.Parameter(torch.ones(3))], "views": {}}])
    with pytest.raises(ValueError, match=r"^AdamW: views: given, must be left out"):
        steprule.AdamW([{"params": [nn.Parameter(torch.ones(3, 3))], "views": {}}])


class Small(nn.Module):
    """A convolution, an attention, a layer and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention = nn.Conv2d(3, 8, 3), nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        return self.head(self.up(self.attention(x, x, x)[0]).relu().mean(1))


def test_a_model_alone_is_enough() -> None:
    torch.manual_seed(0)
    model = Small()
    optimizer = steprule.Muon(model, lr=0.01)
    matrices, rest = optimizer.param_groups
    assert matrices["param_names"] == [
        *("stem.weight", "attention.in_proj_weight", "attention.out_proj.weight", "up.weight")
    ]
    assert (matrices["lr"], rest["rule"], rest["lr"]) == (0.01, "AdamW", 1e-3)
    assert "flattened: 'stem.weight'" in optimizer.explain()
    assert "rest" not in matrices
    x, y = numbers((16, 3, 8, 8), torch.float32, 1), torch.arange(16) % 5
    losses: list[float] = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    other = steprule.create("muon", Small(), rest=(steprule.Lion, {"lr": 1e-4}), state_dtype="bf16")
    assert [group.get("rule") for group in other.param_groups] == [None, "Lion"]
    with pytest.raises(TypeError, match=r"^Muon: rest needs a model"):
        steprule.Muon([nn.Parameter(torch.ones(2, 2))], rest=(steprule.AdamW, {}))
    with pytest.raises(TypeError, match=r"must be a rule and a dict"):
        steprule.Muon(Small(), rest=steprule.AdamW)


def test_a_step_leaves_nothing_in_memory_whether_it_is_taken_or_not() -> None:
    clip = [steprule.GlobalNormClip(1.0)]
    optimizer, params = stepped(steprule.Muon, 2, modifiers=clip, nonfinite="skip")

    def held() -> int:
        (plan,) = [plans.of(optimizer).of(group) for group in optimizer.param_groups]
        works = [batch.work for batch in plan.batches]
        return sum(len(equal.arrays) + len(equal.values) for work in works for equal in work._equals)

    assert held() == 0
    before = [x.detach().clone() for x in params]
    params[0].grad[0, 0] = torch.nan
    optimizer.step()
    assert_same([x.detach() for x in params], before)
    assert optimizer.param_groups[0]["skipped_steps"] == 1
    assert held() == 0


def test_a_checkpoint_of_other_views_is_refused() -> None:
    def made(view: dict[str, Any] | None) -> Any:
        param = nn.Parameter(numbers((12, 4), torch.float32, 1))
        param.grad = param.detach().clone()
        optimizer = steprule.Muon([{"params": [("qkv", param)], "views": [view]}])
        optimizer.step()
        return optimizer

    saved = made({"split": 3}).state_dict()
    made({"split": 3}).load_state_dict(saved)
    message = (
        r"'?qkv'? were saved with the views '3 matrices side by side along the rows', and now are 'as they are'"
    )
    with pytest.raises(ValueError, match=message):
        made(None).load_state_dict(saved)
    report = made(None).load_state_dict(saved, strict=False)
    assert "views" in str(report)


def test_the_rest_of_a_model_is_stored_in_the_same_way() -> None:
    model = Small().bfloat16()
    optimizer = steprule.Muon(model, state_dtype="bf16", low_precision="kahan")
    assert [(x["state_dtype"], x["low_precision"]) for x in optimizer.param_groups] == [("bf16", "kahan")] * 2
    model.stem.weight.requires_grad_(False)
    assert "stem.weight" in steprule.Muon(model).param_groups[0]["param_names"]


def test_views_of_what_another_rule_steps() -> None:
    with pytest.raises(ValueError, match=r"views: 'head.weight' decides nothing, because .* head\.weight"):
        steprule.split(
            Small(),
            matrix=(steprule.Muon, {}),
            rest=(steprule.AdamW, {}),
            views={"head.weight": {"split": 5}},
            verbose=False,
        )


class PerRow(Matrix):
    """A slot per row that gets one value of the whole matrix."""

    lr: float = hyper(default=0.1)
    d = slot("d", per="row")
    e = slot("e", per="column")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        s.d = norm(g, over="matrix")
        s.e = 2 * norm(g, over="matrix")
        return -h.lr * g * s.d


def test_a_value_per_matrix_in_a_slot_per_row() -> None:
    ours, params = stepped(PerRow, 2, shapes=((6, 4), (6, 4), (3, 2)))
    loop, wanted = stepped(PerRow, 2, shapes=((6, 4), (6, 4), (3, 2)), **LOOP)
    assert_close(params, wanted, 1e-6)
    for param, like in zip(params, wanted, strict=True):
        assert_close(ours.state[param].values(), loop.state[like].values(), 1e-6)


WRONG_WORDS: dict[str, tuple[Any, str]] = {
    "changes": (lambda x: x.mul_(2), "word changed a tensor that it was given. Make a new one"),
    "no tensor": (lambda x: 3, "word made an int, must be a tensor of matrices"),
}


@pytest.mark.parametrize("runner", [{}, LOOP])
@pytest.mark.parametrize("what", WRONG_WORDS)
def test_words_that_are_wrong(what: str, runner: dict[str, Any]) -> None:
    function, message = WRONG_WORDS[what]

    def word(x: Tensor) -> Any:
        return function(x)

    named = matrix_word(word)

    class Wrong(Matrix):
        lr: float = hyper(default=0.1)

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
            return -h.lr * named(g)

    with pytest.raises((TypeError, RuntimeError), match=message):
        stepped(Wrong, 1, **runner)


def test_slots_of_products_stay_in_full_precision() -> None:
    with pytest.raises(ValueError, match=r"'left' .*products of matrices are summed up in it"):
        Whitening([nn.Parameter(torch.ones(3, 3))], state_dtype={"left": "bf16"})


@matrix_word
def needs_full_precision(x: Tensor) -> Tensor:
    """A word that knows one precision only."""
    return torch.linalg.qr(x.mT).Q.mT if x.size(-2) <= x.size(-1) else torch.linalg.qr(x).Q


class Chained(Matrix):
    """A word in few bits, and another one on what it makes."""

    lr: float = hyper(default=0.1)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return -h.lr * needs_full_precision(narrow(g, 2.0, (1.5, 0.5)))


def test_words_on_what_words_in_fewer_bits_have_made() -> None:
    _, params = stepped(Chained, 2, shapes=((4, 6), (4, 6), (5, 3)))
    _, wanted = stepped(Chained, 2, shapes=((4, 6), (4, 6), (5, 3)), **LOOP)
    assert_close(params, wanted, 1e-5)


ON_MATRICES = [rule for rule in steprule.catalogue().values() if getattr(rule, "on_matrices", False)]
EDGES = (
    ((4, 6), (6, 4), (4, 6)),
    ((1, 1), (1, 5), (5, 1)),
    ((0, 5), (3, 4)),
    ((3, 0), (3, 4)),
    ((0, 5), (0, 5), (3, 0), (3, 0)),
)


@pytest.mark.parametrize("shapes", EDGES)
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ON_MATRICES)
def test_small_and_empty_matrices_in_every_rule(rule: Any, default: torch.dtype, shapes: Any) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        _, params = stepped(rule, 11, shapes=shapes, dtype=torch.float64)
        _, wanted = stepped(rule, 11, shapes=shapes, dtype=torch.float64, **LOOP)
    finally:
        torch.set_default_dtype(before)
    # In bfloat16 the iteration may round another way where products of several matrices are added up.
    assert_close(params, wanted, 2e-3 if "method" in rule.fields or rule is steprule.Scion else 1e-9)


@pytest.mark.parametrize("switches", [{}, LOOP], ids=["kernels", "loop"])
@pytest.mark.parametrize("rule", [steprule.SOAP, steprule.Shampoo, steprule.Kron])
def test_stacks_of_empty_matrices(rule: Any, switches: dict[str, Any]) -> None:
    optimizer, _ = stepped(rule, 3, shapes=((2, 0, 5), (2, 0, 5), (3, 4)), **switches)
    assert [float(x["step"]) for x in optimizer.state.values()] == [3.0] * 3


@pytest.mark.parametrize("rule", ON_MATRICES)
def test_transposed_weights_step_as_others(rule: Any) -> None:
    """Sweeps go through memory in order, and words on whole matrices row by row."""
    ends: list[Any] = []
    for transposed in (False, True):
        start = torch.arange(30.0).reshape(6, 5) / 30
        param = torch.nn.Parameter(start.t().contiguous().t() if transposed else start.clone())
        assert param.is_contiguous() != transposed
        optimizer = rule([param], lr=0.1)
        for step in range(3):
            param.grad = torch.empty_like(param).copy_(numbers((6, 5), torch.float32, step))
            optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
