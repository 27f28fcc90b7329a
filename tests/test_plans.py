"""What is remembered between steps: it is never wrong, keeps nothing in memory and leaves nothing half done."""

from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from kernels import DEFAULT, LOOP, exact_roots, has_kernel
from rules import REFUSE_COMPLEX, Case, assert_same, by_lines, can_store, each, flat, numbers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import steprule
from steprule.engine import plans
from steprule.engine.runners.kernels import addresses
from steprule.engine.runners.kernels.forms import Forms

pytest.importorskip("llvmlite", reason="the kernels are compiled by it")


def takes_changes(case: Case) -> bool:
    """Stepped by the default runner, with slots, and on parameters of every shape."""
    return case.runner == "default" and has_kernel(case)


# Parameters, gradients and slots that become something else at the same address


def transpose(x: Tensor) -> Tensor:
    return x.t()


def turn(x: Tensor) -> Tensor:
    """The same memory, in another order of dimensions."""
    return x.as_strided(x.shape, (1, x.shape[0]))


def negate(x: Tensor) -> Tensor:
    """The same values, as a lazy minus of what is now in memory."""
    return torch._neg_view(x.neg_())


def halve(x: Tensor) -> Tensor:
    """Half of the same memory, as elements of half the size."""
    return x.view(torch.bfloat16).as_strided(x.shape, x.stride()).fill_(0.5)


CHANGES = [transpose, turn, negate, halve]
WAYS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "data": lambda x, new: setattr(x, "data", new),
    "set_": lambda x, new: (
        x.set_(new) if new.dtype == x.dtype and not new.is_neg() else setattr(x, "data", new)
    ),
}


def slots_of(state: dict[str, Any]) -> list[Tensor]:
    """The slots with one value per element, for two parameters of 16 and 3."""
    return [x for x in state.values() if isinstance(x, Tensor) and x.numel() in (16, 3)]


def assert_alike(case: Case, given: list[Tensor], wanted: list[Tensor]) -> None:
    """Equal to the last bit, unless the loop takes sums in single precision, as torch does."""
    if case.rule.sums_as_torch:
        torch.testing.assert_close(given, wanted)
    else:
        assert_same(given, wanted)


@exact_roots()
@each(takes_changes)
@pytest.mark.parametrize(("way", "change"), [("data", change) for change in CHANGES] + [("set_", turn)])
@pytest.mark.parametrize("what", ["parameter", "slot"])
def test_another_form_at_the_same_address(case: Case, what: str, change: Any, way: str) -> None:
    """The kernel and the loop see the same change in the middle of training; memory next to it stays."""
    ran: list[Any] = []
    for switches in (LOOP, DEFAULT):
        pool = torch.full((64,), 7.0)
        pool[:16] = numbers((16,), torch.float32, 1)
        param = nn.Parameter(pool[:16].view(4, 4))
        optimizer = case.make([param, nn.Parameter(torch.ones(3))], **switches)
        seen: list[Any] = []
        for step in range(4):
            if step == 2:
                changed = [param.data] if what == "parameter" else slots_of(optimizer.state[param])
                targets: list[Tensor] = [param] if what == "parameter" else slots_of(optimizer.state[param])
                for target, old in zip(targets, changed, strict=True):
                    with torch.no_grad():
                        WAYS[way](target, change(old))
            for place, p in enumerate(flat(optimizer)):
                p.grad = None
                p.grad = numbers(tuple(p.shape), p.dtype, 10 * step + place)
            case.step(optimizer)
            seen += [p.detach().clone() for p in flat(optimizer)]
        ran.append([*seen, pool[16:].clone()])
        assert (pool[16:] == 7).all()
    assert_alike(case, ran[1], ran[0])


@each(takes_changes)
@pytest.mark.parametrize("runner", [DEFAULT, {"foreach": True}, LOOP])
def test_a_gradient_with_a_lazy_minus(case: Case, runner: dict[str, Any]) -> None:
    if runner.get("foreach") and by_lines(case.rule):
        pytest.skip("torch's lists have no rows and columns")
    ran: list[Any] = []
    for switches, lazy in ((runner, False), (runner, True)):
        optimizer = case.make(case.parameters(), **switches)
        for step in range(3):
            for place, param in enumerate(flat(optimizer)):
                gradient = numbers(tuple(param.shape), param.dtype, 10 * step + place)
                param.grad = torch._neg_view(-gradient) if lazy else gradient
                assert param.grad.is_neg() == lazy
            case.step(optimizer)
        ran.append([p.detach() for p in flat(optimizer)])
    assert_same(ran[1], ran[0])


@each(lambda case: case.runner == "loop" and not case.closure and not case.sparse_only)
@pytest.mark.parametrize("lazy", ["parameter", "gradient", "slot", "all"])
def test_lazy_conjugates_and_minus_signs_in_every_place(case: Case, lazy: str) -> None:
    """The same results as with plain tensors, whatever the runner."""
    if case.name in REFUSE_COMPLEX:
        pytest.skip("refuses complex parameters")
    ran: list[Any] = []
    for signs in (False, True):
        for switches in (LOOP, {"foreach": True}, DEFAULT):
            if switches is not LOOP and not has_kernel(case):
                continue
            if switches.get("foreach") and by_lines(case.rule):
                continue
            start = numbers((4, 3), torch.complex64, 3)
            on = signs and lazy in ("parameter", "all")
            param = nn.Parameter(torch.conj(start.conj().resolve_conj()) if on else start)
            optimizer = case.make([param], **switches)
            optimizer.init_state()
            if signs and lazy in ("slot", "all"):
                for slot in slots_of(optimizer.state[param]):
                    slot.data = torch.conj(slot.data.conj().resolve_conj())
            for step in range(2):
                gradient = numbers((4, 3), torch.complex64, 20 + step)
                on = signs and lazy in ("gradient", "all")
                param.grad = torch.conj(gradient.conj().resolve_conj()) if on else gradient
                case.step(optimizer)
            ran.append(param.detach().resolve_conj())
    for other in ran[1:]:
        torch.testing.assert_close(other, ran[0])


def test_the_form_of_a_tensor_is_compared_with_and_without_torchs_guard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for without in (False, True):
        if without:
            monkeypatch.setattr("steprule.engine.runners.kernels.forms._guard", lambda tensors: None)
        for change in (*CHANGES, lambda x: x.view(2, 8), lambda x: x.to("meta"), nn.Parameter):
            tensor = torch.zeros(4, 4)
            forms = Forms([tensor, torch.ones(3)])
            assert forms.hold([torch.ones(4, 4), torch.zeros(3)])
            assert not forms.hold([change(tensor), torch.zeros(3)])
            assert not forms.hold([1.0, torch.zeros(3)])
        assert Forms([tensor, tensor]).hold([tensor, tensor])
        with torch.autocast("cpu", torch.bfloat16):
            assert forms.hold([torch.ones(4, 4), torch.zeros(3)])


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("looped", [True, False])
def test_addresses_asked_one_by_one_or_in_a_loop(
    count: int, looped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if looped and addresses._loop() is None:
        pytest.skip("needs llvmlite")
    if not looped:
        monkeypatch.setattr(addresses, "_loop", lambda: None)
    tensors = [torch.zeros(2, 2) for _ in range(count)]
    found = addresses.Addresses(tensors)
    assert list(found.known) == list(found.of(tensors)) == [x.data_ptr() for x in tensors]
    assert found.hold(tensors)
    assert not found.hold([*tensors[:-1], torch.zeros(2, 2)])
    assert found.hold([x.view(4) for x in tensors])


def test_wrapped_gradients_of_many_tensors_are_refused() -> None:
    """They have no address, and to ask in a loop would end the process."""
    optimizer = steprule.SGD([nn.Parameter(torch.zeros(3)) for _ in range(40)])
    give = partial(torch.full_like, fill_value=1.0)
    for param in flat(optimizer):
        param.grad = give(param)
    optimizer.step()

    def inside(x: Tensor) -> Tensor:
        for param in flat(optimizer):
            param.grad = None
            param.grad = give(param) * x
        with contextlib.suppress(RuntimeError):
            optimizer.step()
        return x

    torch.func.grad(inside)(torch.tensor(1.0))


# Options switched between steps

LATER: list[tuple[str, Any]] = [
    ("low_precision", "kahan"),
    ("low_precision", "stochastic"),
    ("low_precision", "master"),
    ("state_dtype", "bf16"),
    ("maximize", True),
    ("capturable", True),
    ("weight_decay", 0.1),
    ("weight_decay_mode", "l2"),
    ("nonfinite", "skip"),
    ("fused", True),
]


@exact_roots()
@pytest.mark.filterwarnings("ignore::UserWarning")
@each(takes_changes)
@pytest.mark.parametrize(("name", "value"), LATER)
def test_an_option_switched_between_steps(case: Case, name: str, value: Any) -> None:
    """Every runner sees it immediately: the same state and the same results."""
    if name == "state_dtype" and not can_store(case, value):
        pytest.skip("refuses it")
    if name == "weight_decay" and not case.knows(name):
        pytest.skip("refuses it")
    ran: list[Any] = []
    for switches in (DEFAULT, LOOP):
        torch.manual_seed(0)
        optimizer = case.make([nn.Parameter(numbers((80, 70), torch.bfloat16, 1))], lr=0.1, **switches)
        for step in range(4):
            if step == 2 and not (switches is LOOP and name == "fused"):
                optimizer.param_groups[0][name] = value
            flat(optimizer)[0].grad = numbers((80, 70), torch.bfloat16, 10 + step)
            case.step(optimizer)
        (param,) = flat(optimizer)
        ran.append([sorted(optimizer.state[param]), [param.detach()]])
    assert ran[0][0] == ran[1][0]
    assert_alike(case, ran[0][1], ran[1][1])


# Counts


@each(lambda case: not case.closure)
def test_the_state_in_a_state_dict_is_the_optimizers_own(case: Case) -> None:
    optimizer = case.make()
    case.advance(optimizer, 2)
    held = optimizer.state_dict()["state"]
    case.advance(optimizer, 3, first=2)
    for place, param in enumerate(flat(optimizer)):
        for key, value in optimizer.state[param].items():
            if isinstance(value, Tensor):
                assert held[place][key] is value, key


@each(lambda case: not case.closure and case.name != "SparseAdam" and not case.shares)
def test_restoring_in_place_restores_all_of_it(case: Case) -> None:
    """As torch.distributed.checkpoint.load does it, through the tensors of state_dict()."""
    optimizer = case.make()
    case.advance(optimizer, 2)
    saved = copy.deepcopy(([p.detach() for p in flat(optimizer)], optimizer.state_dict()["state"]))
    case.advance(optimizer, 3, first=2)
    wanted = copy.deepcopy([p.detach() for p in flat(optimizer)])
    with torch.no_grad():
        for param, old in zip(flat(optimizer), saved[0], strict=True):
            param.copy_(old)
        for place, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                value.copy_(saved[1][place][key])
    case.advance(optimizer, 3, first=2)
    assert_same([p.detach() for p in flat(optimizer)], wanted)


def test_a_file_with_one_state_holds_no_other_counts() -> None:
    optimizer = steprule.AdamW([nn.Parameter(torch.ones(1)) for _ in range(1000)])
    Case(steprule.AdamW).advance(optimizer)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict()["state"][0], buffer)
    assert buffer.tell() < 4000


def work(jobs: list[tuple[Any, list[Tensor]]]) -> None:
    torch.set_num_threads(1)
    for optimizer, gradients in jobs:
        for param, gradient in zip(flat(optimizer), gradients, strict=True):
            param.grad = gradient
        for _ in range(3):
            optimizer.step()


def shared(rule: Any, ready: str) -> tuple[Any, list[Tensor]]:
    """An optimizer whose state is in shared memory, and its gradients."""
    case = Case(rule)
    options = {"low_precision": "stochastic", "state_dtype": "bf16"} if not case.sparse_only else {}
    dtype = torch.float32 if case.sparse_only else torch.bfloat16
    params = case.parameters(dtype)
    for place, param in enumerate(params):
        param.share_memory_()
        param.grad = numbers(tuple(param.shape), dtype, place)
        if case.sparse_only:
            param.grad = param.grad.to_sparse(1)
    optimizer = rule(params, **options)
    optimizer.init_state()
    if ready == "shared after a step":
        optimizer.step()
    if ready == "shared by hand" and not case.sparse_only:
        for state in optimizer.state.values():
            for value in state.values():
                value.share_memory_()
    else:
        optimizer.share_memory()
    return optimizer, [param.grad for param in params]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_counts_are_shared_with_worker_processes(start: str) -> None:
    """Each process steps every optimizer: it takes seconds to start one."""
    ways = ("shared first", "shared after a step", "shared by hand")
    names = [(rule, ready) for rule in (steprule.NAdam, steprule.SparseAdam) for ready in ways]
    jobs = [shared(*name) for name in names]
    before = [copy.deepcopy(list(optimizer.state.values())) for optimizer, _ in jobs]
    for _ in range(2):
        worker = multiprocessing.get_context(start).Process(target=work, args=(jobs,))
        worker.start()
        worker.join(120)
        assert worker.exitcode == 0
    for name, (optimizer, _), kept in zip(names, jobs, before, strict=True):
        for old, state in zip(kept, optimizer.state.values(), strict=True):
            assert state["step"] == old["step"] + 6, name
            for key, value in state.items():
                assert value.is_shared(), (name, key)
                assert not torch.equal(value, old[key]), (name, key)


# Modes of the thread


@each(lambda case: not case.closure)
@pytest.mark.parametrize("first", [False, True])
def test_steps_inside_inference_mode(case: Case, first: bool) -> None:
    ran: list[Any] = []
    for inside in (False, True):
        optimizer = case.make()
        for step in range(4):
            with torch.inference_mode(inside and (step == 1 or (first and step == 0))):
                case.advance(optimizer, first=step, without=[1] if step == 1 else [])
        ran.append([p.detach() for p in flat(optimizer)])
        for state in optimizer.state.values():
            assert not any(x.is_inference() for x in state.values() if isinstance(x, Tensor))
    assert_same(ran[1], ran[0])


@each(lambda case: case.elementwise and not case.sparse_only)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_fake_tensors(case: Case, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        optimizer = case.make([nn.Parameter(torch.ones(4, 3, dtype=dtype))])
        (param,) = flat(optimizer)
        for _ in range(3):
            param.grad = torch.ones(4, 3, dtype=dtype)
            case.step(optimizer)
        assert all(type(x) is FakeTensor for x in slots_of(optimizer.state[param]))
        assert optimizer.explain()


@each(lambda case: case.elementwise and not case.sparse_only)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_meta_tensors(case: Case, dtype: torch.dtype) -> None:
    optimizer = case.make([nn.Parameter(torch.ones(4, 3, dtype=dtype, device="meta"))])
    (param,) = flat(optimizer)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        case.step(optimizer)
    assert all(x.is_meta for x in slots_of(optimizer.state[param]))


@each(lambda case: not case.closure)
@pytest.mark.parametrize("options", [{}, {"low_precision": "stochastic", "state_dtype": "bf16"}])
def test_steps_where_new_tensors_go_elsewhere(case: Case, options: dict[str, Any]) -> None:
    if options and not (case.knows("low_precision") and case.runner != "lists" and can_store(case, "bf16")):
        pytest.skip("refuses it")
    dtype = torch.bfloat16 if options and not case.sparse_only else torch.float32
    ran: list[Any] = []
    for elsewhere in ("cpu", "meta"):
        torch.manual_seed(0)
        optimizer = case.make(case.parameters(dtype), **options)
        for step in range(3):
            for place, param in enumerate(flat(optimizer)):
                gradient = numbers(tuple(param.shape), param.dtype, 10 * step + place)
                param.grad = gradient.to_sparse(1) if case.sparse_only else gradient
            case.prepare(optimizer)
            with torch.device(elsewhere):
                optimizer.step()
        ran.append([p.detach() for p in flat(optimizer)])
    assert_same(ran[1], ran[0])


# Nothing is kept alive


def drop_all(optimizer: Any) -> None:
    optimizer.state.clear()


def drop_one(optimizer: Any) -> None:
    del optimizer.state[flat(optimizer)[0]]


def replace_states(optimizer: Any) -> None:
    for param in list(optimizer.state):
        optimizer.state[param] = copy.deepcopy(optimizer.state[param])


def swap_a_parameter(optimizer: Any) -> None:
    params = optimizer.param_groups[0]["params"]
    optimizer.state.pop(params[0])
    params[0].grad = None
    params[0] = nn.Parameter(params[0].detach().clone())


@each(lambda case: not case.closure)
@pytest.mark.parametrize("drop", [drop_all, drop_one, replace_states, swap_a_parameter])
def test_what_is_dropped_is_freed_at_once(case: Case, drop: Any) -> None:
    optimizer = case.make()
    case.advance(optimizer, 2)
    first = flat(optimizer)[0]
    kept = [x for x in optimizer.state[first].values() if isinstance(x, Tensor)]
    kept += [first] if drop is swap_a_parameter else []
    alive = [weakref.ref(x) for x in kept]
    del kept, first
    drop(optimizer)
    assert [ref() for ref in alive if ref() is not None] == []
    case.advance(optimizer, 2, first=2)


def test_plans_of_groups_that_are_gone_are_dropped() -> None:
    case = Case(steprule.AdamW)
    optimizer = steprule.AdamW([{"params": [p]} for p in case.parameters()])
    case.advance(optimizer)
    optimizer.param_groups[:] = [{**optimizer.param_groups[0]}]
    case.advance(optimizer)
    assert len(plans.of(optimizer).plans) == 1


# All or nothing


def wrong_size(optimizer: Any, param: Any) -> None:
    param.grad.data = torch.ones(7, 5)


def slot_elsewhere(optimizer: Any, param: Any) -> None:
    optimizer.init_state()
    state = optimizer.state[param]
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim():
            state[key] = value.to("meta")


def sparse(optimizer: Any, param: Any) -> None:
    param.grad = torch.ones(tuple(param.shape)).to_sparse()


def complex_numbers(optimizer: Any, param: Any) -> None:
    param.grad.data = torch.ones(tuple(param.shape), dtype=torch.complex64)


def slot_of_another_size(optimizer: Any, param: Any) -> None:
    optimizer.init_state()
    state = optimizer.state[param]
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim():
            state[key] = torch.ones(7, 5)


def lr_in_words(optimizer: Any, param: Any) -> None:
    optimizer.param_groups[-1]["lr"] = "fast"


def kernel_by_name(optimizer: Any, param: Any) -> None:
    optimizer.param_groups[-1] |= {"fused": True, "foreach": None}
    param.grad = torch.ones(tuple(reversed(param.shape))).t()


def nan(optimizer: Any, param: Any) -> None:
    optimizer.param_groups[-1]["nonfinite"] = "raise"
    param.grad = torch.full_like(param, float("nan"))


def all_that_moves(optimizer: Any) -> list[Any]:
    states = [
        {key: x for key, x in state.items() if not (isinstance(x, Tensor) and x.is_meta)}
        for state in optimizer.state.values()
    ]
    return [[p.detach() for p in flat(optimizer)], states]


FAULTS = [
    wrong_size,
    slot_elsewhere,
    sparse,
    complex_numbers,
    slot_of_another_size,
    lr_in_words,
    kernel_by_name,
    nan,
]


@each(lambda case: not case.closure and case.many_groups)
@pytest.mark.parametrize(("groups", "begun"), [(2, False), (3, True)])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_raises_in_the_last_group_has_moved_nothing(
    case: Case, groups: int, fault: Any, begun: bool
) -> None:
    if fault is sparse and case.name in ("SGD", "Adagrad", "SparseAdam"):
        pytest.skip("takes sparse gradients")
    if fault is lr_in_words and case.name == "Rprop":
        pytest.skip("its lr is the first step size alone")
    if fault in (wrong_size, complex_numbers, kernel_by_name) and case.sparse_only:
        pytest.skip("takes sparse gradients alone")
    if fault is kernel_by_name and not has_kernel(case):
        pytest.skip("has no kernel")
    shape = (4, 3)
    params = [nn.Parameter(numbers(shape, torch.float32, i)) for i in range(2 * groups)]
    optimizer = case.make([{"params": params[i : i + 2]} for i in range(0, 2 * groups, 2)])
    if begun:
        case.advance(optimizer, 2)
    for place, param in enumerate(params):
        gradient = numbers(shape, torch.float32, 50 + place)
        param.grad = gradient.to_sparse(1) if case.sparse_only else gradient
    case.prepare(optimizer)
    fault(optimizer, params[-1])
    if fault in (slot_of_another_size, slot_elsewhere) and not slots_of(optimizer.state[params[-1]]):
        pytest.skip("keeps no slot")
    before = copy.deepcopy(all_that_moves(optimizer))
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        optimizer.step()
    assert_same(all_that_moves(optimizer), before)


# Gradients of another size or dtype, where torch allows it


@pytest.mark.parametrize("switches", [LOOP, {"foreach": True}, DEFAULT])
@pytest.mark.parametrize("size", [(), (1,), (3,), (4, 1), (1, 3)])
def test_a_smaller_gradient_is_broadcast_as_in_torch(size: tuple[int, ...], switches: dict[str, Any]) -> None:
    ran: list[Any] = []
    for rule, how in ((torch.optim.SGD, {"foreach": False}), (steprule.SGD, switches)):
        params = [nn.Parameter(numbers((4, 3), torch.float32, i)) for i in range(2)]
        optimizer = rule(params, lr=0.1, weight_decay=0.1, **how)
        for step in range(3):
            for param in params:
                param.grad = torch.ones(4, 3)
            params[1].grad.data = numbers(size, torch.float32, step)
            optimizer.step()
        ran.append([p.detach() for p in params])
    assert_same(ran[1], ran[0])


# Many groups


def test_the_work_of_a_first_step_is_linear_in_the_number_of_groups() -> None:
    """Counted, not timed: how often a state or a group is read."""
    calls: list[int] = []
    for count in (50, 200):
        params = [nn.Parameter(torch.ones(2)) for _ in range(count)]
        optimizer = steprule.AdamW([{"params": [p]} for p in params])
        for param in params:
            param.grad = torch.ones(2)
        seen = [0]

        class Groups(list[Any]):
            def __iter__(self, seen: list[int] = seen) -> Any:
                for entry in list.__iter__(self):
                    seen[0] += 1
                    yield entry

        optimizer.param_groups = Groups(optimizer.param_groups)
        optimizer.step()
        calls.append(seen[0])
    assert calls[1] <= 5 * calls[0]
