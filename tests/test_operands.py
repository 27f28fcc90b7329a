"""Rules on matrices of sharded parameters: only operands and results travel, and the numbers stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import in_processes, layouts, whole
from rules import numbers
from test_sharded import assert_equal, give, twins
from test_storage_runners import STORAGES
from torch import Tensor, nn

import steprule
from steprule.declare import Matrix, slot
from steprule.matrix.words import matrix_word, transpose
from steprule.words import ema

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no distributed package"
)
RULES = (
    steprule.Muon,
    steprule.NorMuon,
    steprule.AdaMuon,
    steprule.Scion,
    steprule.SOAP,
    steprule.Shampoo,
    steprule.Kron,
)


@matrix_word
def doubled(x: Tensor) -> Tensor:
    """A word that fails where it is told to."""
    if failing:
        raise ValueError("on purpose")
    return 2 * x


failing: list[bool] = []


class Doubles(Matrix):
    """A user's rule whose state is made after the last sweep, of what that sweep makes."""

    lr: float = steprule.hyper(0.1)

    left = slot("left", per="left")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        change = -h.lr * (doubled(g) + abs(g))
        s.left = ema(s.left, change @ transpose(change), 0.5)
        return change


def with_modifiers(rank: int) -> None:
    """Every rule, with sums over each parameter and over all of them between the words."""
    every = [[], [steprule.GlobalNormClip(0.5)], [steprule.TrustRatio()], [steprule.Grams(), steprule.EMA(0.9)]]
    for name, put in layouts().items():
        for number, rule in enumerate(RULES):
            modifiers = every[(number + len(name)) % len(every)]
            twins(lambda p, rule=rule, own=modifiers: rule(p, modifiers=own), put)
    twins(lambda p: steprule.Scion(p, modifiers=[steprule.TrustRatio()]), layouts()["rows"])
    twins(Doubles, layouts()["rows"])


def in_views(rank: int) -> None:
    """Heads, projections side by side, transposed matrices and stacks of them."""
    shapes = ((96, 40), (96, 40), (4, 6, 10), (5, 4, 3, 3))
    given = [{"split": 3}, {"split": 4, "dim": 1, "transpose": True}, None, {"flatten": True}]
    for put in layouts().values():
        for rule in (steprule.NorMuon, steprule.AdaMuon, steprule.SOAP):
            twins(lambda p, rule=rule: rule([{"params": p, "views": given}]), put, shapes)
    unequal = [{"split": (50, 30, 16)}, *given[1:]]
    twins(lambda p: steprule.NorMuon([{"params": p, "views": unequal}]), layouts()["rows"], shapes)


def in_storages(rank: int) -> None:
    """Parameters and elementwise state in fewer bits, with rows and columns that end where blocks do."""
    for number, (dtype, options) in enumerate(STORAGES.values()):
        rule = RULES[number % 4]
        put = layouts()["columns" if number % 2 else "rows"]
        twins(lambda p, rule=rule, own=options: rule(p, **own), put, ((64, 256), (18, 256)), dtype=dtype)


def in_rounds(rank: int) -> None:
    """Owners that work on one matrix after another, of several rules and groups at once."""
    from steprule.engine.runners import matrices

    shapes = ((16, 8), (8, 16), (9, 5), (16, 8), (16, 8), (7, 7))

    def make(params: Any) -> Any:
        groups = [{"params": params[:3], "rule": steprule.SOAP}, {"params": params[3:]}]
        return steprule.AdaMuon(groups, modifiers=[steprule.GlobalNormClip(0.5)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrices, "BYTES", 600)
        for put in layouts().values():
            twins(make, put, shapes, steps=4)


def bytes_of(rule: Any, put: Any, steps: int = 2) -> float:
    """What all processes together send in a step for an element, except for their own parts."""
    import torch.distributed as dist

    params = [nn.Parameter(put(torch.ones(64, 32))) for _ in range(4)]
    optimizer, sent, call = rule(params), [0], dist.all_to_all_single
    here = dist.get_rank()

    def counted(got: Tensor, given: Tensor, sizes: Any, rooms: Any, **options: Any) -> Any:
        sent[0] += len(given) - rooms[here]
        return call(got, given, sizes, rooms, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counted)
        for number in range(steps):
            give(params, number, put)
            sent[0] = 0
            optimizer.step()
    assert f"sends {sent[0]:,} bytes per step" in optimizer.explain()
    total = torch.tensor(sent)
    dist.all_reduce(total)
    return int(total) / sum(p.numel() for p in params)


def what_is_sent(rank: int) -> None:
    """Muon's operand and result take two bytes each; a row has one value more, of four bytes."""
    import torch.distributed as dist

    elsewhere = 1 - 1 / dist.get_world_size()
    expected = {
        steprule.Muon: 2 + 2,
        steprule.Scion: 2 + 2,
        steprule.NorMuon: 2 + 4 + 2 * 4 / 32,
        steprule.AdaMuon: 2 + 2 + 4 + 4,
    }
    for rule, size in expected.items():
        assert bytes_of(rule, layouts()["rows"]) == size * elsewhere, rule


def one_fails(rank: int) -> None:
    """A word that fails at one owner: all processes fail, and no parameter has moved."""
    put = layouts()["rows"]
    params = [nn.Parameter(put(torch.ones(6, 4))) for _ in range(4)]
    optimizer = Doubles(params)
    give(params, 0, put)
    failing[:] = [True] * (rank == 1)
    message = r"doubled of the matrices of parameter 1.* failed: on purpose\. No parameter has moved"
    if rank == 1:
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    else:
        with pytest.raises(RuntimeError, match="another process has failed in this step"):
            optimizer.step()
    failing.clear()
    assert all(bool((whole(p.detach()) == 1).all()) for p in params)
    optimizer.step()
    assert not any(bool((whole(p.detach()) == 1).all()) for p in params)


def explains(rank: int) -> None:
    """`explain` says which words are carried out elsewhere, and what is stepped as a whole."""
    put = layouts()["rows"]
    params = [nn.Parameter(put(torch.ones(6, 4))) for _ in range(2)]
    for options, said in (
        ({}, "2 parameters as parts, except for words on matrices\n"),
        ({"fused": False}, "2 parameters as a whole, by the process that owns it\n"),
        ({"views": {"split": (4, 2)}}, "2 parameters as a whole, by the process that owns it\n"),
    ):
        optimizer = steprule.Muon([{"params": params, **options}])
        give(params, 0, put)
        optimizer.step()
        assert said in optimizer.explain() + "\n"
        assert "this process owns 1 parameter, and sends " in optimizer.explain()


def under_fsdp(rank: int) -> None:
    """Models as `fully_shard` and `parallelize_module` shard them: copies, and both at once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 34, bias=False), nn.ReLU(), nn.Linear(34, 10, bias=False))

    def copies(own: nn.Module) -> None:
        fully_shard(own, mesh=grid)

    def both(own: nn.Module) -> None:
        parallelize_module(own, grid["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(own, mesh=grid["outer"])

    for shard in (copies, both):
        for rule in (steprule.Muon, steprule.NorMuon, steprule.SOAP):
            one, many = model(), model()
            shard(many)
            optimizers = rule(one), rule(many)
            for number in range(3):
                for p, q in zip(one.parameters(), many.parameters(), strict=True):
                    p.grad = numbers(tuple(p.shape), torch.float32, number)
                    replicated = distribute_tensor(p.grad, q.device_mesh)
                    q.grad = replicated.redistribute(q.device_mesh, q.placements)
                for optimizer in optimizers:
                    optimizer.step()
            assert_equal(*optimizers, f"{shard.__name__}, {rule.__name__}")


def two(rank: int) -> None:
    for check in (with_modifiers, in_views, in_storages, in_rounds, what_is_sent, one_fails, explains):
        check(rank)


def four(rank: int) -> None:
    for check in (with_modifiers, in_rounds, what_is_sent, under_fsdp):
        check(rank)


@pytest.mark.parametrize(("count", "what"), [(2, "two"), (4, "four")])
def test_in_processes(count: int, what: str, tmp_path: Path) -> None:
    in_processes(count, what, tmp_path, "test_operands")
