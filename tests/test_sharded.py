"""Sharded parameters: several processes that hold parts get the results of one that holds all, bit for bit.

`python tests/test_sharded.py 4` compares every rule in every storage and every layout.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import in_processes, layouts, whole
from rules import LOOPS, Case, assert_same, flat, numbers
from test_storage_runners import STORAGES, can_keep
from torch import Tensor, nn

import steprule
from steprule.declare import Matrix
from steprule.engine.sharding.parts import region_of, within
from steprule.words import largest, mean, norm

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no distributed package"
)
SHARDED = [case for case in LOOPS if not (case.closure or case.sparse_only)]
PAIRS = [(case, name) for case in SHARDED for name in STORAGES if can_keep(case, name)]


def same(case: Case, storage: str, put: Any, what: str, steps: int = 3) -> None:
    """Step whole tensors and parts of them, and fail at the first difference."""
    dtype, options = STORAGES[storage]
    ones = case.parameters(dtype)
    parts = [nn.Parameter(put(p.detach().clone())) for p in ones]
    one, many = case.make(ones, **options), case.make(parts, **options)
    for number in range(steps):
        for place, (p, q) in enumerate(zip(ones, parts, strict=True)):
            p.grad = numbers(tuple(p.shape), dtype, 10 * number + place)
            q.grad = put(p.grad)
        for optimizer in (one, many):
            case.step(optimizer)
    assert_equal(one, many, f"{case} in {storage}, {what}")


def assert_equal(one: Any, many: Any, what: str) -> None:
    """Whether all parameters and states are equal, to the bit."""
    for p, q in zip(flat(one), flat(many), strict=True):
        assert_same(whole(q.detach()), whole(p.detach()), what)
        assert one.state[p].keys() == many.state[q].keys(), what
        for key, value in one.state[p].items():
            own = many.state[q][key]
            if isinstance(value, Tensor):
                assert_same(whole(own).reshape(value.shape), whole(value), f"{what}: {key}")
            else:
                assert own == value, f"{what}: {key}"


def each_rule(rank: int) -> None:
    """Every rule, each in one of the layouts."""
    for number, case in enumerate(SHARDED):
        name, put = list(layouts().items())[number % len(layouts())]
        same(case, "plain", put, name)


def each_storage(rank: int) -> None:
    """Every rule, each in one of the storages that it takes."""
    for number, case in enumerate(SHARDED):
        kept = [name for own, name in PAIRS if own is case and name != "plain"]
        if kept:
            name, put = list(layouts().items())[number // 2 % 2]
            same(case, kept[number % len(kept)], put, name, steps=2)


def everything(rank: int) -> None:
    """Every rule in every storage and every layout."""
    for name, put in layouts().items():
        for case, storage in PAIRS:
            same(case, storage, put, name)
        if rank == 0:
            print(f"{name}: {len(PAIRS)} equal")


class Reduces(steprule.Elementwise):
    """A user's rule with sums over the whole tensor."""

    lr: float = steprule.hyper(0.1)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        return -h.lr * (g - mean(g)) / (norm(g) + largest(abs(g)))


class ReducesAll(steprule.Elementwise):
    """A user's rule with sums over all parameters."""

    lr: float = steprule.hyper(0.1)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        size = norm(g, over="all") + largest(abs(g), over="group")
        return -h.lr * (g - mean(g, over="all")) / size


class UserMatrix(Matrix):
    """A user's rule on matrices."""

    lr: float = steprule.hyper(0.1)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        return -h.lr * g


# Parts of unequal size, parts that end within a block of a sum, and one that is empty in the last process.
SHAPES = ((101, 64), (7, 3), (1, 5))


def twins(
    make: Any, put: Any, shapes: Any = SHAPES, steps: int = 3, dtype: torch.dtype = torch.float32
) -> None:
    """Step whole tensors and parts of them with an optimizer that `make` makes of parameters."""
    ones = [nn.Parameter(numbers(shape, dtype, i)) for i, shape in enumerate(shapes)]
    parts = [nn.Parameter(put(p.detach().clone())) for p in ones]
    one, many = make(ones), make(parts)
    for number in range(steps):
        give(ones, number, lambda x: x)
        give(parts, number, put)
        one.step()
        many.step()
    assert_equal(one, many, repr(many))


def give(params: Iterable[Any], number: int, put: Any) -> None:
    for place, p in enumerate(params):
        p.grad = put(numbers(tuple(p.shape), p.dtype, 10 * number + place))


def sums_and_modifiers(rank: int) -> None:
    """Sums over tensors, groups and all parameters, several rules, and what can be added to them."""
    two_groups = lambda params: [{"params": params[:1]}, {"params": params[1:], "lr": 0.01}]  # noqa: E731
    every = {
        "sums": Reduces,
        "sums over all": lambda p: ReducesAll(two_groups(p)),
        "own matrix": UserMatrix,
        "pieces": lambda p: steprule.Muon([{"params": p, "views": [{"split": (64, 21, 16)}, None, None]}]),
        "clip": lambda p: steprule.AdamW(p, modifiers=[steprule.GlobalNormClip(0.5), steprule.Cautious()]),
        "lists": lambda p: steprule.LAMB(p, foreach=True),
        "loop": lambda p: steprule.LAMB(p, foreach=False),
        "average": lambda p: steprule.SGD(p, lr=0.1, momentum=0.9, modifiers=[steprule.EMA(0.9)]),
        "lookahead": lambda p: steprule.Lion(p, modifiers=[steprule.Lookahead(every=2)]),
        "rows": lambda p: steprule.AdamW(p, modifiers=[steprule.Centralize(), steprule.NormClip(0.1)]),
        "metrics": lambda p: steprule.AdamW(p, modifiers=[steprule.Metrics()]),
        "two rules": lambda p: steprule.AdamW([{"params": p[1:]}, {"params": p[:1], "rule": steprule.Muon}]),
    }
    for name, put in layouts().items():
        for make in every.values():
            twins(make, put)
        assert name


def gradients_elsewhere(rank: int) -> None:
    """Gradients with other placements than their parameters."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for here in (Shard(0), Shard(1), Replicate()):
        for there in (Shard(0), Shard(1), Replicate(), Partial()):
            one = nn.Parameter(numbers((6, 5), torch.float32, 1))
            many = nn.Parameter(distribute_tensor(one.detach().clone(), mesh, [here]))
            optimizers = steprule.AdamW([one]), steprule.AdamW([many])
            for number in range(2):
                one.grad = numbers((6, 5), torch.float32, number)
                if there.is_partial():
                    many.grad = DTensor.from_local(one.grad / world, mesh, [there], run_check=False)
                else:
                    many.grad = distribute_tensor(one.grad, mesh, [there])
                for optimizer in optimizers:
                    optimizer.step()
            assert_same(whole(many.detach()), one.detach(), f"{here} from {there}")


def one_fails(rank: int) -> None:
    """If a process fails in a step, all do, and nothing moves where they wait for each other."""
    put = layouts()["rows"]
    params = [nn.Parameter(put(torch.ones(4, 4))) for _ in range(2)]
    for make in (lambda: ReducesAll(params), lambda: steprule.SOAP(params)):
        optimizer = make()
        give(params, 0, put)
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                from steprule.engine.sharding import here

                patch.setattr(here.Here, "prepare", broken)
            message = "broken on purpose" if rank == 1 else "another process has failed in this step"
            with pytest.raises(RuntimeError, match=message):
                optimizer.step()
        assert all(bool((whole(p.detach()) == 1).all()) for p in params)
        optimizer.step()
        assert not all(bool((whole(p.detach()) == 1).all()) for p in params)
        with torch.no_grad():
            for p in params:
                p.fill_(1)


def one_fails_while_all_send(rank: int) -> None:
    """It raises at once, as when memory runs out, and the others do when it ends."""
    import os

    from steprule.engine.sharding import exchange

    put = layouts()["rows"]
    params = [nn.Parameter(put(torch.ones(64, 64))) for _ in range(2)]
    optimizer = steprule.Muon(params)
    give(params, 0, put)
    optimizer.step()
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"(?i)connection|peer|closed"):
            optimizer.step()
        # A process group that has failed may not end in order.
        os._exit(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "_bytes_of", no_memory)
        with pytest.raises(torch.OutOfMemoryError) as failed:
            optimizer.step()
    assert "End this process" in str(failed.value.__notes__)
    os._exit(0)


def no_memory(*given: Any) -> None:
    raise torch.OutOfMemoryError("on purpose")


def one_cannot_load(rank: int) -> None:
    """A NaN in what one process loads is an error in all, and none has loaded anything."""
    put = layouts()["rows"]
    optimizer = steprule.AdamW([nn.Parameter(put(torch.ones(4, 4)))])
    give(flat(optimizer), 0, put)
    optimizer.step()
    saved, before = optimizer.state_dict(), optimizer.state[flat(optimizer)[0]]["exp_avg"]
    spoiled = put(torch.ones(4, 4))
    if rank == 1:
        spoiled._local_tensor[0, 0] = torch.nan
    saved["state"][0]["exp_avg"] = spoiled
    error, message = (ValueError, "NaN") if rank == 1 else (RuntimeError, "another process has failed to load")
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.state[flat(optimizer)[0]]["exp_avg"] is before


def broken(*given: Any) -> None:
    raise RuntimeError("broken on purpose")


def nonfinite_everywhere(rank: int) -> None:
    """A NaN in one process's part stops the step in all of them."""
    put = layouts()["rows"]
    for modifiers in ([], [steprule.GlobalNormClip(1.0)]):
        for kind in ("raise", "skip"):
            p = nn.Parameter(put(torch.ones(4, 4)))
            optimizer = steprule.AdamW([p], nonfinite=kind, modifiers=modifiers)
            gradient = torch.ones(4, 4)
            gradient[3, 3] = torch.nan
            p.grad = put(gradient)
            if kind == "raise":
                with pytest.raises(RuntimeError, match="parameter 0"):
                    optimizer.step()
            else:
                optimizer.step()
            assert bool((whole(p.detach()) == 1).all())


def what_is_sent(rank: int) -> None:
    """Rules of elements send nothing; operands of matrices, and whole parameters, travel once each way."""
    import torch.distributed as dist

    put, world = layouts()["rows"], dist.get_world_size()
    sent: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_to_all_single", "all_gather", "all_gather_into_tensor", "broadcast"):
            patch.setattr(dist, name, counting(sent, name, getattr(dist, name)))
        for make, expected in (
            (steprule.AdamW, []),
            (lambda p: steprule.AdamW(p, nonfinite="skip"), ["all_reduce"]),
            (lambda p: steprule.AdamW(p, modifiers=[steprule.GlobalNormClip(1.0)]), ["all_reduce"]),
            (steprule.LAMB, ["all_reduce"]),
            (steprule.Muon, ["all_reduce", "all_to_all_single", "all_to_all_single", "all_reduce"]),
            (steprule.Adafactor, ["all_to_all_single", "all_reduce", "all_to_all_single"]),
        ):
            params = [nn.Parameter(put(torch.ones(8, 8))) for _ in range(2 * world)]
            optimizer = make(params)
            for p in params:
                p.grad = put(torch.ones(8, 8))
            optimizer.step()
            sent.clear()
            optimizer.step()
            assert sent == expected


def counting(sent: list[str], name: str, call: Any) -> Any:
    def counted(*given: Any, **named: Any) -> Any:
        sent.append(name)
        return call(*given, **named)

    return counted


def what_was_taken_before(rank: int) -> None:
    """A step takes what the last one took only where nothing but numbers has changed."""
    import copy

    from steprule.engine import plans

    put, column = layouts()["rows"], layouts()["columns"]
    for make in (steprule.AdamW, lambda p: steprule.AdamW(p, modifiers=[steprule.GlobalNormClip(0.1)])):
        ones = [nn.Parameter(numbers((6, 8), torch.float32, i)) for i in range(4)]
        many = [nn.Parameter(put(p.detach().clone())) for p in ones]
        optimizers = [make(ones[:3]), make(many[:3])]

        def other_state(optimizer: Any, params: Any) -> None:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

        events: list[Any] = [
            lambda o, p: None,
            lambda o, p: o.param_groups[0].update(lr=0.5),
            lambda o, p: setattr(p[0], "grad", None),
            lambda o, p: o.state.pop(p[1]),
            other_state,
            lambda o, p: o.add_param_group({"params": [p[3]], "lr": 0.3}),
            lambda o, p: p[2].data.mul_(2.0),
            lambda o, p: o.state[p[2]]["exp_avg"].zero_(),
            lambda o, p: o.param_groups[0].update(weight_decay=0.3),
            lambda o, p: p[2].requires_grad_(False),
        ]
        number = 0
        for event in events:
            for turn in range(2):
                give(ones, number, lambda x: x)
                give(many, number, column if number % 7 == 6 else put)
                number += 1
                for optimizer, params in zip(optimizers, (ones, many), strict=True):
                    if turn == 0:
                        event(optimizer, params)
                    optimizer.step()
                assert_equal(*optimizers, repr(make))
        here = plans.of(optimizers[1]).here
        assert here._kept
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(here), "_take", broken)
            optimizers[1].step()
            optimizers[1].state.pop(many[0])
            with pytest.raises(RuntimeError, match="on purpose"):
                optimizers[1].step()


def curvature_in_parts(rank: int) -> None:
    """An estimate of the curvature that is not sharded as its parameter is."""
    part = nn.Parameter(layouts()["rows"](torch.zeros(3)))
    with pytest.raises(ValueError, match="the curvature of parameter 0 is a plain tensor, must be a DTensor"):
        steprule.AdaHessian([part]).update_hessian({part: torch.ones(3)})


def other_dtypes(rank: int) -> None:
    """Doubles, complex numbers, and doubles as what torch takes if nothing is said."""
    put = layouts()["rows"]
    for make in (steprule.AdamW, steprule.LAMB, steprule.Adafactor):
        for dtype in (torch.float64, torch.complex64):
            if dtype.is_complex and make is steprule.Adafactor:
                continue
            twins(make, put, dtype=dtype)
        torch.set_default_dtype(torch.float64)
        try:
            twins(make, put)
        finally:
            torch.set_default_dtype(torch.float32)


def stay_equal(rank: int) -> None:
    """Replicas under DDP in processes with different seeds."""
    import torch.distributed as dist

    for dtype, options in ((torch.float32, "int8"), (torch.float32, "bf16"), (torch.bfloat16, None)):
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(nn.Linear(128, 64).to(dtype))
        x = torch.randn(8, 128, dtype=dtype)
        torch.manual_seed(100 + rank)
        low = "stochastic" if options is None else None
        optimizer = steprule.AdamW(model.parameters(), lr=1e-2, state_dtype=options, low_precision=low)
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - 1).float().square().mean().backward()
            optimizer.step()
        own = model.module.weight.detach().float()
        everyone = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(everyone, own)
        assert torch.equal(*everyone), options


def explains(rank: int) -> None:
    """`explain` says what is stepped as parts and what as a whole."""
    put = layouts()["rows"]
    params = [nn.Parameter(put(torch.ones(4, 4))) for _ in range(3)]
    optimizer = steprule.AdamW([{"params": params[:1]}, {"params": params[1:], "rule": steprule.Muon}])
    assert "sharded over 2 processes: 1 parameter stepped as parts\n" in optimizer.explain()
    give(params, 0, put)
    optimizer.step()
    said = optimizer.explain()
    assert "sharded over 2 processes: 2 parameters as parts, except for words on matrices" in said
    assert "this process owns 1 parameter, and sends " in said
    for p in params[:1]:
        p.grad = layouts()["columns"](torch.ones(4, 4))
    optimizer.step()
    assert "1 gradient brought to where the parameter is" in optimizer.explain()


def checkpoints(rank: int) -> None:
    """A model under fully_shard saves and loads its optimizer in every form, and goes on bit for bit."""
    import torch.distributed.checkpoint.state_dict as torchs
    from torch.distributed.fsdp import fully_shard

    def build(make: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 900), nn.ReLU(), nn.Linear(900, 5))
        fully_shard(model)
        return model, make(model)

    def train(model: Any, optimizer: Any, steps: range) -> None:
        for number in steps:
            optimizer.zero_grad()
            model(numbers((8, 6), torch.float32, number)).square().mean().backward()
            optimizer.step()

    clip = [steprule.EMA(0.9), steprule.GlobalNormClip(1.0)]
    for make in (
        lambda model: steprule.AdamW(model, modifiers=clip),
        lambda model: steprule.AdamW(model, state_dtype="bf16"),
        lambda model: steprule.AdamW(model, state_dtype="int8"),
        steprule.SOAP,
        steprule.Adafactor,
        steprule.Prodigy,
    ):
        straight, optimizer = build(make)
        train(straight, optimizer, range(2))
        assert all(state for state in build(make)[1].state.values()), "the state is there before a step"
        for options in (
            torchs.StateDictOptions(),
            torchs.StateDictOptions(full_state_dict=True),
            torchs.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
            torchs.StateDictOptions(flatten_optimizer_state_dict=True),
        ):
            model, resumed = build(make)
            saved = torchs.get_model_state_dict(straight, options=options)
            state = torchs.get_optimizer_state_dict(straight, optimizer, options=options)
            torchs.set_model_state_dict(model, saved, options=options)
            torchs.set_optimizer_state_dict(model, resumed, state, options=options)
            assert_equal_everywhere(optimizer, resumed)
        train(straight, optimizer, range(2, 4))
        train(model, resumed, range(2, 4))
        assert_equal_everywhere(optimizer, resumed)


def assert_equal_everywhere(one: Any, other: Any) -> None:
    """Whether two optimizers of sharded parameters are equal, to the bit."""
    for p, q in zip(flat(one), flat(other), strict=True):
        assert_same(whole(q.detach()), whole(p.detach()), repr(one))
        for key, value in one.state[p].items():
            assert_same(whole(other.state[q][key]), whole(value), f"{one!r}: {key}")


def meshes_in_each_other(rank: int) -> None:
    """Some parameters on all processes, others on a part of a mesh, with copies on its other parts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    inner = grid["a"]

    def put(x: Tensor) -> Any:
        if x.shape[0] == 7:
            return distribute_tensor(x, inner, [Shard(0)])
        return distribute_tensor(x, grid, [Shard(0), Shard(1)])

    twins(lambda p: steprule.AdamW(p, modifiers=[steprule.GlobalNormClip(0.5)]), put)
    twins(steprule.SOAP, put)
    twins(steprule.Prodigy, put)


def after_tensor_parallelism(rank: int) -> None:
    """What each process has of two stretches: sums, whole matrices, and rules of elements, kept in any way."""
    put = layouts()["strided"]
    twins(lambda p: steprule.AdamW(p, modifiers=[steprule.GlobalNormClip(0.5), steprule.Cautious()]), put)
    twins(lambda p: steprule.Muon([{"params": p, "views": [{"split": (64, 21, 16)}, None, None]}]), put)
    for make in (steprule.LAMB, steprule.Muon, steprule.SOAP, steprule.Prodigy, ReducesAll):
        twins(make, put)
    for low in ("master", "kahan", "stochastic"):
        twins(partial(steprule.AdamW, lr=0.1, low_precision=low), put, dtype=torch.bfloat16)
    codes(put, ((130, 256), (8, 1024), (9, 70, 3, 3)))


def tensor_parallelism(rank: int) -> None:
    """A model under `parallelize_module` and `fully_shard` trains as one that is not sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensors"))
    in_codes = partial(steprule.AdamW, state_dtype="int8")
    # In rows of 256, no process has a part of a block of codes.
    for make, width in ((steprule.AdamW, 131), (steprule.LAMB, 131), (steprule.Muon, 131), (in_codes, 256)):
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Linear(64, width), nn.Linear(width, 64)) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        parallelize_module(models[1], grid["tensors"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(models[1], mesh=grid["data"])
        optimizers = [make(model) for model in models]
        for number in range(3):
            for place, (p, q) in enumerate(zip(*(x.parameters() for x in models), strict=True)):
                p.grad = numbers(tuple(p.shape), p.dtype, 10 * number + place)
                q.grad = sharded_as(q, p.grad)
            for optimizer in optimizers:
                optimizer.step()
        assert_equal(*optimizers, repr(optimizers[1]))


def sharded_as(param: Any, x: Tensor) -> Any:
    """A whole tensor, sharded as a parameter is."""
    from torch.distributed.tensor import DTensor

    part = x[within(region_of(param))]
    layout: Any = {"shape": x.shape, "stride": x.stride(), "run_check": False}
    return DTensor.from_local(part.contiguous(), param.device_mesh, param.placements, **layout)


def four(rank: int) -> None:
    """Every rule, each in one of the layouts of four processes."""
    each_rule(rank)
    meshes_in_each_other(rank)
    after_tensor_parallelism(rank)
    tensor_parallelism(rank)


def codes(put: Any, shapes: Any) -> None:
    """State in 8 bits, with elements enough for codes."""
    twins(lambda p: steprule.AdamW(p, state_dtype="int8"), put, shapes)
    twins(lambda p: steprule.LAMB(p, state_dtype="int8"), put, shapes[:1])


def eight_bits(rank: int) -> None:
    """State in 8 bits; a block that is cut is refused."""
    shapes = ((130, 256), (4608,), (64, 1024), (9, 70, 3, 3))
    for name, put in layouts().items():
        codes(put, shapes[: 3 if name == "columns" else 4])
    cut = nn.Parameter(layouts()["columns"](torch.ones(101, 150)))
    with pytest.raises(ValueError, match=r"cannot keep parameter 0 .*a part of a block of 128 neighbours"):
        steprule.AdamW([cut], state_dtype="int8")


def small_checks(rank: int) -> None:
    """All that takes little time, so that processes are started once."""
    for check in (
        sums_and_modifiers,
        gradients_elsewhere,
        one_fails,
        one_cannot_load,
        nonfinite_everywhere,
        what_is_sent,
        what_was_taken_before,
        curvature_in_parts,
        other_dtypes,
        explains,
        checkpoints,
        eight_bits,
    ):
        check(rank)


@pytest.mark.parametrize("what", ["each_rule", "each_storage", "small_checks", "stay_equal"])
def test_two_processes(what: str, tmp_path: Path) -> None:
    in_processes(2, what, tmp_path, "test_sharded")


def test_memory_that_runs_out_in_one_of_two_processes(tmp_path: Path) -> None:
    in_processes(2, "one_fails_while_all_send", tmp_path, "test_sharded")


def test_four_processes(tmp_path: Path) -> None:
    in_processes(4, "four", tmp_path, "test_sharded")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        in_processes(int(sys.argv[1]), "everything", Path(folder), "test_sharded")
