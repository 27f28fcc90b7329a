"""Lists of tensors: large ones are cut into pieces, and temporaries never exceed a bucket."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels import Reduced, exact_powers
from rules import CASES, Case, assert_same_run, each, flat, numbers, sums_of
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import steprule
from steprule.engine.runners import foreach

LISTS = [case for case in CASES if case.runner == "lists"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]
# Less than a piece, several pieces and a tail, none at all; the last two never begin where a bucket does.
SHAPES = ((7,), (1117,), (), (0,), (2, 3, 5, 67), (257,), (3, 400))


def advance_both(case: Case, dtype: torch.dtype, make: Any, alike: bool = True) -> tuple[Any, Any]:
    """Three steps by lists and by the loop, with the same gradients.

    alike: gradients in the layout of their parameters, or else in torch's usual one.
    """
    given, wanted = case.make(make()), case.make(make(), foreach=False)
    for optimizer in (given, wanted):
        for step in range(3):
            for place, param in enumerate(flat(optimizer)):
                gradient = numbers(tuple(param.shape), dtype, 1000 * step + place)
                param.grad = torch.empty_like(param).copy_(gradient) if alike else gradient
            case.step(optimizer)
    return given, wanted


# Half precision hardly learns, and is meant here.
@exact_powers()
@pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bucket", [1, 5000, 40_000], ids=lambda size: f"{size} bytes")
@each(among=LISTS)
def test_tensors_are_stepped_to_the_end_however_buckets_cut_them(
    case: Case, bucket: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreach, "BUCKET_BYTES", bucket)
    shapes = SHAPES if bucket > 1 else ((3,), (), (0,), (2, 2))
    assert_same_run(*advance_both(case, dtype, lambda: case.parameters(dtype, shapes)))


@exact_powers()
@pytest.mark.parametrize("alike", [True, False], ids=["gradients alike", "gradients contiguous"])
@each(among=LISTS)
def test_tensors_in_another_order_of_memory_are_stepped_whole(
    case: Case, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreach, "BUCKET_BYTES", 1000)

    def make() -> list[nn.Parameter]:
        last = numbers((2, 4, 5, 6), torch.float32, 2).contiguous(memory_format=torch.channels_last)
        return [nn.Parameter(x) for x in (numbers((30, 20), torch.float32, 1).t(), last, torch.ones(700))]

    assert_same_run(*advance_both(case, torch.float32, make, alike))


def test_a_gradient_in_another_order_of_memory_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreach, "BUCKET_BYTES", 1000)
    case = Case(steprule.AdamW, runner="lists")
    given, wanted = (
        case.make(case.parameters(shapes=((30, 20),))),
        case.make(case.parameters(shapes=((30, 20),))),
    )
    for optimizer in (given, wanted):
        (param,) = flat(optimizer)
        param.grad = numbers((20, 30), torch.float32, 5).t()
    wanted.param_groups[0]["foreach"] = False
    for optimizer in (given, wanted):
        optimizer.step()
    assert_same_run(given, wanted)


def test_a_tensor_that_is_summed_over_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreach, "BUCKET_BYTES", 1000)
    case = Case(Reduced, runner="lists")
    assert_same_run(*advance_both(case, torch.float32, lambda: case.parameters(shapes=SHAPES[:3])))


class Temporaries(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._known: set[int] = set()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and _storage(tensor) not in before:
                storage = tensor.untyped_storage()
                self._alive[_storage(tensor)] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return made


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(lambda case: not sums_of(case.rule), among=LISTS)
def test_temporaries_fit_in_a_bucket(case: Case, dtype: torch.dtype) -> None:
    """On a device without memory, where a model of any size costs nothing."""
    shapes = ((40_000, 1000), *[(1000, 999)] * 12)
    params = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes]
    optimizer = case.make(params)
    (group,) = optimizer.param_groups
    work = [(p, torch.empty_like(p), optimizer.state_of(p, group)) for p in params]
    with torch.no_grad(), Temporaries() as temporaries:
        for part in foreach.prepare(optimizer.program(group), group, work, {}):
            part.start()
    whole = sum(param.numel() for param in params) * max(4, dtype.itemsize)
    assert temporaries.most <= 64 * 2**20 < whole / 2
    assert temporaries.most > 2**20


@pytest.mark.parametrize("runner", [{}, {"foreach": True}, {"foreach": False}], ids=str)
def test_numbers_beyond_the_range_of_elements_are_infinite(runner: dict[str, bool]) -> None:
    """As kernels have it: torch would raise in the middle of the step."""
    optimizer = steprule.Prodigy([nn.Parameter(torch.full((4,), 0.1))], **runner)
    (param,) = flat(optimizer)
    optimizer.param_groups[0]["d"] = 1e25  # its square
    param.grad = torch.full((4,), 1e-3)
    optimizer.step()
    assert optimizer.state[param]["exp_avg_sq"].isposinf().all()
