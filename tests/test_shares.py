"""Shared state of replicas: the numbers of whole state, to the bit, and a part of its memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import in_processes, whole
from rules import LOOPS, Case, assert_same, flat, numbers
from test_sharded import assert_equal
from test_storage_runners import STORAGES, can_keep
from torch import nn

import steprule
from steprule.engine.sharding import shares

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no distributed package"
)
SHARED = [case for case in LOOPS if not (case.closure or case.sparse_only or hasattr(case.rule, "estimate"))]


def same(case: Case, storage: str) -> None:
    """Step with whole state and with shared state, which is shared after the first step."""
    dtype, options = STORAGES[storage]
    params = [case.parameters(dtype) for _ in range(2)]
    one, many = (case.make(own, **options) for own in params)
    for number in range(3):
        for own in params:
            for place, p in enumerate(own):
                p.grad = numbers(tuple(p.shape), dtype, 10 * number + place)
        for optimizer in (one, many):
            case.step(optimizer)
        if number == 0:
            steprule.shard_state(many)
    assert_equal(one, many, f"{case} in {storage}")


def each_rule(rank: int) -> None:
    """Every rule, in plain state and in one of the storages that it takes."""
    shares.SMALLEST = 1
    for number, case in enumerate(SHARED):
        same(case, "plain")
        kept = [name for name in STORAGES if can_keep(case, name) and name != "plain"]
        if kept and number % 2:
            same(case, kept[number // 2 % len(kept)])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 131), nn.Tanh(), nn.Linear(131, 64))


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    """As under DistributedDataParallel: all processes have the same gradients."""
    for number in steps:
        optimizer.zero_grad()
        model(numbers((8, 64), torch.float32, number)).square().mean().backward()
        optimizer.step()


MAKE: dict[str, Callable[..., Any]] = {
    "AdamW": lambda model: steprule.AdamW(
        model, modifiers=[steprule.GlobalNormClip(0.1), steprule.EMA(0.9)], nonfinite="skip"
    ),
    "int8": lambda model: steprule.AdamW(model, state_dtype="int8"),
    "Muon": steprule.Muon,
    "SOAP": steprule.SOAP,
    "Prodigy": steprule.Prodigy,
}


def assert_same_run(model: nn.Module, optimizer: Any, other: nn.Module, its: Any) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same(q.detach(), p.detach(), repr(its))
    assert_equal(optimizer, its, repr(its))


def checkpoints(rank: int) -> None:
    """State in torch's forms, from whole to shared and back; what is saved is that of whole state."""
    import torch.distributed.checkpoint.state_dict as torchs

    for make in MAKE.values():
        (one, whole_), (two, shared), (three, resumed) = (
            (model, make(model)) for model in (network(), network(), network())
        )
        steprule.shard_state(shared)
        train(one, whole_, range(2))
        train(two, shared, range(2))
        assert_same_run(one, whole_, two, shared)
        for full in (True, False):
            options = torchs.StateDictOptions(full_state_dict=full)
            saved = torchs.get_optimizer_state_dict(two, shared, options=options)
            (torchs.set_optimizer_state_dict)(two, shared, saved, options=options)
        # Full ones load without processes that share, and whole state loads where it is shared.
        options = torchs.StateDictOptions(full_state_dict=True)
        three.load_state_dict(two.state_dict())
        saved = torchs.get_optimizer_state_dict(two, shared, options=options)
        torchs.set_optimizer_state_dict(three, resumed, saved, options=options)
        shared.load_state_dict(copy.deepcopy(whole_.state_dict()))
        for model, optimizer in ((one, whole_), (two, shared), (three, resumed)):
            train(model, optimizer, range(2, 4))
        assert_same_run(one, whole_, two, shared)
        assert_same_run(one, whole_, three, resumed)


def files(rank: int, folder: Path) -> None:
    """torch.distributed.checkpoint, from shared to whole."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as torchs

    model, other = network(), network()
    shared, resumed = steprule.shard_state(steprule.AdamW(model)), steprule.AdamW(other)
    train(model, shared, range(2))
    checkpoint.save({"o": torchs.get_optimizer_state_dict(model, shared)}, checkpoint_id=folder)
    resumed.init_state()
    wanted = {"o": torchs.get_optimizer_state_dict(other, resumed)}
    checkpoint.load(wanted, checkpoint_id=folder)
    torchs.set_optimizer_state_dict(other, resumed, wanted["o"])
    for p, q in zip(flat(shared), flat(resumed), strict=True):
        for key, value in resumed.state[q].items():
            assert_same(whole(shared.state[p][key]), value, key)


def memory_and_what_else(rank: int) -> None:
    """Half of the state, evaluation weights, a skipped step, a step after `.to`, and what `explain` says."""
    import torch.distributed as dist

    model = network()
    optimizer = steprule.shard_state(MAKE["AdamW"](model))
    other, its = network(), None
    its = MAKE["AdamW"](other)
    for _ in range(2):
        train(model, optimizer, range(2))
        train(other, its, range(2))
        for one in (optimizer, its):
            one.eval()
        assert_same_run(other, its, model, optimizer)
        for one in (optimizer, its):
            one.train()
        for own in (model, other):
            own.to(torch.float64).to(torch.float32)
    large = model[0].weight
    for value in optimizer.state[large].values():
        if value.dim():
            assert value._local_tensor.shape[0] in (65, 66)
    sizes = torch.tensor([sum(_bytes(x) for x in optimizer.state[large].values())])
    total = sum(_bytes(x) for x in its.state[other[0].weight].values())
    dist.all_reduce(sizes)
    assert sizes.item() <= total + 16
    stale = model(torch.ones(1, 64)).sum()
    train(model, optimizer, range(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    large.grad = torch.full_like(large, torch.nan)
    before = large.detach().clone()
    optimizer.step()
    assert_same(large.detach(), before, "a skipped step")
    assert "sharded over 2 processes: 2 parameters stepped as parts" in optimizer.explain()
    copied = copy.deepcopy(optimizer)
    assert copied.elsewhere is not optimizer.elsewhere
    for wrong, message in (
        (optimizer, "its state is shared already"),
        (steprule.AdaHessian(model), "estimates of the curvature"),
    ):
        with pytest.raises(ValueError, match=message):
            steprule.shard_state(wrong)
    large.grad = torch.ones(131, 64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse, and its state is shared by rows"):
        optimizer.step()
    with pytest.raises(ValueError, match="its state is shared"):
        steprule.step_in_backward(model, optimizer)


def refused_and_arranged(rank: int) -> None:
    """Blocks of codes that processes would share, gradients in another order of memory, and pickling."""
    import pickle

    def vector() -> nn.Parameter:
        return nn.Parameter(torch.ones(5000))

    cut = "a part of a block of 128 neighbours"
    with pytest.raises(ValueError, match=cut):
        steprule.shard_state(steprule.SGD([vector()], lr=0.1, momentum=0.9, state_dtype="int8"))
    optimizer = steprule.shard_state(steprule.AdamW([vector()]))
    with pytest.raises(ValueError, match=cut):
        optimizer.add_param_group({"params": [vector()], "state_dtype": "int8"})
    assert len(optimizer.param_groups) == 1

    for make in (steprule.LAMB, steprule.Adafactor):
        params = [nn.Parameter(numbers((80, 70), torch.float32, 1)) for _ in range(2)]
        one, shared = make(params[:1], lr=0.1), steprule.shard_state(make(params[1:], lr=0.1))
        for number in range(2):
            for param in params:
                param.grad = numbers((70, 80), torch.float32, number).t()
            params[0].grad = params[0].grad.contiguous()
            one.step()
            shared.step()
        assert_same(params[0].detach(), params[1].detach(), make.__name__)
        assert pickle.loads(pickle.dumps(shared)).elsewhere is not None


def _bytes(x: Any) -> int:
    part = getattr(x, "_local_tensor", x)
    return part.numel() * part.element_size()


def what_is_sent(rank: int) -> None:
    """Large rows from where they are, small ones packed: one broadcast of each process for all of them."""
    import torch.distributed as dist

    sent: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        broadcast = dist.broadcast
        patch.setattr(dist, "broadcast", lambda x, **named: sent.append(x.numel()) or broadcast(x, **named))
        params = [nn.Parameter(torch.ones(1024, 1024)), *(nn.Parameter(torch.ones(64, 64)) for _ in range(3))]
        for p in params:
            p.grad = torch.ones_like(p)
        steprule.shard_state(steprule.AdamW(params)).step()
    assert sent == 2 * [2 << 20, 3 * 64 * 64 * 2]


def what_is_not_sent(rank: int) -> None:
    """Parameters and gradients, which every process has: an owner gets parts of states and of results only."""
    import torch.distributed as dist

    exchanged: list[int] = []
    spread: list[int] = []

    def all_to_all(got: Any, given: Any, wanted: list[int], sizes: list[int], **named: Any) -> Any:
        exchanged.append(sum(sizes) - sizes[rank])
        return original(got, given, wanted, sizes, **named)

    with pytest.MonkeyPatch.context() as patch:
        original, broadcast = dist.all_to_all_single, dist.broadcast
        patch.setattr(dist, "all_to_all_single", all_to_all)
        patch.setattr(dist, "broadcast", lambda x, **named: spread.append(x.numel()) or broadcast(x, **named))
        # Each way, half of what belongs to one of two matrices, and of SOAP what comes first.
        lines, sides, matrix = 4 * (128 + 64) // 2, 2 * 4 * (128**2 + 64**2) // 2, 2 * 128 * 64 // 2
        sent: dict[Any, list[int]] = {
            steprule.Adafactor: [lines, lines + 16],
            steprule.SOAP: [sides],
            steprule.Muon: [matrix, matrix],
        }
        for make in sent:
            params = [nn.Parameter(numbers((128, 64), torch.float32, i)) for i in range(2)]
            optimizer = steprule.shard_state(make(params))
            for number in range(2):
                for place, p in enumerate(params):
                    p.grad = numbers((128, 64), torch.float32, 10 * number + place)
                exchanged.clear()
                spread.clear()
                optimizer.step()
            expected = sent[make]
            assert exchanged[: len(expected)] == expected, make
            assert sum(spread) == 2 * 4 * 128 * 64


def autograd_is_told(rank: int) -> None:
    """Of rows that are stepped here or sent as they are, no operation of torch tells that they have changed."""
    param = nn.Parameter(torch.ones(1024, 1024))
    optimizer = steprule.shard_state(steprule.AdamW([param]))
    stale = (param**2).sum()
    param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def as_zero(rank: int) -> None:
    """torch's own way with our rules: the same numbers, and a checkpoint that loads."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for rule in (steprule.AdamW, steprule.LAMB, steprule.Adafactor):
        for views in (False, True):
            one, two = network(), network()
            whole_ = rule(one.parameters())
            shared = ZeroRedundancyOptimizer(two.parameters(), rule, parameters_as_bucket_view=views)
            train(one, whole_, range(2))
            train(two, shared, range(2))
            shared.consolidate_state_dict(0)
            if rank == 0:
                resumed = rule(network().parameters())
                resumed.load_state_dict(shared.state_dict())
                assert_equal(whole_, _With(resumed, two), repr(resumed))


class _With:
    """The state of one optimizer beside the parameters of a model that another has stepped."""

    def __init__(self, optimizer: Any, model: nn.Module):
        own = list(model.parameters())
        self.param_groups = [{"params": own}]
        self.state = {q: optimizer.state[p] for p, q in zip(flat(optimizer), own, strict=True)}


def everything(rank: int) -> None:
    as_zero(rank)
    checkpoints(rank)
    memory_and_what_else(rank)
    refused_and_arranged(rank)
    autograd_is_told(rank)
    what_is_sent(rank)
    what_is_not_sent(rank)


def in_files(rank: int) -> None:
    import tempfile

    import torch.distributed as dist

    names = [tempfile.mkdtemp()]
    dist.broadcast_object_list(names)
    files(rank, Path(names[0]))


@pytest.mark.parametrize("what", ["each_rule", "everything", "in_files"])
def test_two_processes(what: str, tmp_path: Path) -> None:
    in_processes(2, what, tmp_path, "test_shares")


def test_what_cannot_be_shared() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"shard_state: given AdamW, must be an optimizer of steprule"):
        steprule.shard_state(torch.optim.AdamW(model.parameters()))
    with pytest.raises(TypeError, match="given LBFGS"):
        steprule.shard_state(steprule.LBFGS(model.parameters()))
    with pytest.raises(RuntimeError, match="there is no process group"):
        steprule.shard_state(steprule.AdamW(model))
