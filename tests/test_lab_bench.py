"""`steprule bench`: what is measured, against what, and what it leaves behind. Nothing here judges a speed."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import SOURCE, assert_refused, everything_in, run
from pictures import assert_readable, texts_in
from rich.console import Console

import steprule
from steprule.lab import (
    bench,
    bench_chart,
    bench_estimate,
    bench_machine,
    bench_measure,
    bench_models,
    bench_modified,
    bench_report,
)
from steprule.lab.bench_measure import OURS, STATES, Mover, Timing, entrants, peak_bytes, ratio, samples_of
from steprule.lab.errors import LabError

CPU = torch.device("cpu")
OWN_MODEL = """
from torch import nn

def network():
    frozen = nn.Linear(5, 5).requires_grad_(False)
    return nn.Sequential(nn.Linear(4, 3), frozen)

def shapes():
    return [(8, 8), (8,), ()]

def nothing():
    return []

def lazy():
    return nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))

def wrong():
    return [(8, -1)]
"""


@pytest.fixture(autouse=True)
def small_and_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it
    monkeypatch.setattr(bench_measure, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(bench_measure, "mlp", lambda: [(8, 8)] * 2)
    (tmp_path / "own.py").write_text(OWN_MODEL)
    return tmp_path


def make_params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


# Models


@pytest.mark.parametrize(
    ("name", "tensors", "numbers"),
    [
        ("gpt2", 148, 124_439_808),
        ("resnet18", 62, 11_689_512),
        ("many-small", 400, 200 * (64 * 64 + 64)),
        ("own.py:network", 2, 15),
        ("own.py:shapes", 3, 73),
    ],
)
def test_models_have_the_sizes_they_are_known_for(name: str, tensors: int, numbers: int) -> None:
    model = bench_models.load_model(name)
    assert (len(model.shapes), model.numbers) == (tensors, numbers)


# Bytes and floor


@pytest.mark.parametrize(
    ("rule", "options", "bytes_per_number"),
    [
        (steprule.SGD, {}, 12),  # reads p, g; writes p
        (steprule.SGD, {"momentum": 0.9}, 20),  # and reads and writes the momentum
        (steprule.AdamW, {}, 28),  # reads p, g, m, v; writes p, m, v
        (steprule.Lion, {}, 20),
        (steprule.Sophia, {}, 24),  # the curvature is read, not written
    ],
)
def test_bytes_that_must_move(rule: Any, options: dict[str, Any], bytes_per_number: int) -> None:
    params = make_params((7, 3), (), (64,))
    optimizer = rule(params, **options)
    optimizer.init_state()
    assert Mover(optimizer, CPU).bytes == bytes_per_number * (21 + 1 + 64)


def test_bytes_count_each_dtype_for_itself() -> None:
    params = make_params((100,), dtype=torch.bfloat16)
    optimizer = steprule.AdamW(params, state_dtype="fp32", low_precision="none")
    optimizer.step()
    assert Mover(optimizer, CPU).bytes == 100 * (3 * 2 + 4 * 4)


def test_bytes_of_state_in_fewer_bits() -> None:
    found = entrants(steprule.AdamW, make_params((64, 64))).optimizers
    per_number = {name: bench_measure.bytes_moved(found[name]) / 4096 for name in (OURS, *STATES)}
    scale = 4 / 256
    wanted = {"bf16": 12 + 2 * 2 * 2, "int8": 12 + 2 * 2 * (1 + scale)}
    assert per_number == {OURS: 28, **{f"{OURS} {kind} state": size for kind, size in wanted.items()}}


@pytest.mark.parametrize("rule", [steprule.SGD, steprule.AdamW, steprule.Adagrad])
def test_the_floor_reads_and_writes_as_much_as_the_step(rule: Any) -> None:
    params = make_params((100,))
    optimizer = rule(params)
    optimizer.step()
    move = Mover(optimizer, CPU)
    with torch.profiler.profile(record_shapes=True) as profile:
        move()
    moved = 0
    for event in profile.events():
        if event.name in ("aten::add_", "aten::mul_"):
            sizes = [shape[0] for shape in event.input_shapes if shape]
            moved += 4 * (2 * sizes[0] + sum(sizes[1:]))  # its first operand is read and written
    assert moved == move.bytes
    assert move.floor([3.0]) == [3.0]


@pytest.mark.parametrize(
    ("modifiers", "bytes_per_number"),
    # GlobalNormClip reads the gradient once more, Cautious all but the parameter.
    [([], 28), ([steprule.GlobalNormClip()], 32), ([steprule.Cautious()], 40), ([steprule.EMA()], 36)],
    ids=str,
)
def test_bytes_count_every_sweep(modifiers: list[steprule.Modifier], bytes_per_number: int) -> None:
    optimizer = steprule.AdamW(make_params((16, 16)), modifiers=modifiers)
    optimizer.step()
    assert bench_measure.bytes_moved(optimizer) == 256 * bytes_per_number


# Who takes part


def test_all_that_exist_take_part_and_do_what_their_names_say() -> None:
    found = entrants(steprule.Adam, make_params((8, 8)))
    names = {"foreach": True, "fused": True, "for-loop": False}
    assert set(found.optimizers) >= {OURS, *(f"torch {name}" for name in names)}
    for name, optimizer in found.optimizers.items():
        assert type(optimizer) is (torch.optim.Adam if name.startswith("torch") else steprule.Adam)
    groups = {name: x.param_groups[0] for name, x in found.optimizers.items()}
    assert [groups["torch for-loop"][x] for x in ("foreach", "fused")] == [False, False]
    assert [groups["torch foreach"][x] for x in ("foreach", "fused")] == [True, None]
    assert [groups["torch fused"][x] for x in ("foreach", "fused")] == [None, True]
    runners = {name: bench_measure.runner_of(x) for name, x in found.optimizers.items() if OURS in name}
    default = runners.pop(OURS)
    assert {runners.pop(name) for name in STATES} == {default}
    assert default not in runners.values()
    assert runners == {name: name.removeprefix(f"{OURS} ") for name in runners}


def test_who_is_absent_and_why() -> None:
    found = entrants(steprule.RMSprop, make_params((8, 8)))
    assert "torch fused" not in found.optimizers
    assert "fused" in found.absent["torch fused"]
    found = entrants(steprule.Lion, make_params((8, 8)))
    assert found.absent["torch foreach"] == "torch.optim has no Lion"


def test_all_share_parameters_and_gradients() -> None:
    params = make_params((8, 8), (3,))
    for optimizer in entrants(steprule.AdamW, params).optimizers.values():
        assert [id(x) for x in optimizer.param_groups[0]["params"]] == [id(x) for x in params]


# In which order


def test_everyone_takes_a_turn_in_every_round_in_changing_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_measure, "SAMPLE_SECONDS", 0)  # a sample is one call
    turns: list[str] = []
    rounds: list[int] = []
    actions = {name: lambda name=name: turns.append(name) for name in "abc"}
    samples = samples_of(actions, 8, CPU, lambda: rounds.append(len(turns)))
    assert {name: len(own) for name, own in samples.items()} == {"a": 8, "b": 8, "c": 8}
    start = rounds[0] - 3
    orders = ["".join(turns[end - 3 : end]) for end in rounds]
    assert [end - start for end in rounds] == [3 * number for number in range(1, 9)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 2


def test_a_sample_is_the_time_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def take(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(bench_measure.time, "perf_counter", lambda: now)
    monkeypatch.setattr(bench_measure, "SAMPLE_SECONDS", 0.02)
    calls = {"quick": 0, "slow": 0}

    def quick() -> None:
        calls["quick"] += 1
        take(0.003)

    def slow() -> None:
        calls["slow"] += 1
        take(0.05)

    samples = samples_of({"quick": quick, "slow": slow}, 3, CPU, lambda: None)
    assert samples["quick"] == pytest.approx([3.0] * 3)
    assert samples["slow"] == pytest.approx([50.0] * 3)
    # Two to find out how long a call takes; then, per round, 20 ms of them after one not counted.
    assert calls == {"quick": 2 + 3 * (1 + 7), "slow": 2 + 3}


def test_quartiles_and_ratios_within_rounds() -> None:
    samples = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert Timing.of(samples) == Timing(2.0, 3.0, 4.0)
    # The machine was slow in the third round, for both.
    assert ratio([2.0, 6.0, 60.0, 2.0], [1.0, 2.0, 20.0, 1.0]) == 2.5


# Memory


def test_peak_bytes_counts_what_is_held_at_once() -> None:
    def step() -> None:
        first = torch.empty(1 << 20)  # 4 MiB
        second = torch.empty(1 << 19)  # 2 MiB
        del first
        third = torch.empty(1 << 18)  # 1 MiB
        del second, third

    held = peak_bytes(step, CPU)
    assert 6 << 20 <= held < (6 << 20) + 50_000


def test_peak_bytes_counts_numpy_and_python() -> None:
    assert 1 << 20 <= peak_bytes(lambda: bytearray(1 << 20), CPU) < (1 << 20) + 50_000


def test_a_step_that_needs_temporaries_is_told_from_one_that_does_not() -> None:
    params = make_params((512, 512))
    found = entrants(steprule.Adam, params).optimizers
    held = {name: peak_bytes(optimizer.step, CPU) for name, optimizer in found.items()}
    assert held["torch for-loop"] > 512 * 512 * 4
    assert held["torch fused"] < 512 * 512
    if bench_measure.runner_of(found[OURS]) == "cpu_kernel":
        assert held[OURS] < 512 * 512


# Iterations and first steps


def test_iterations_train_equal_networks() -> None:
    actions = bench_measure.iterations(steprule.Adam, torch.float32, CPU)
    assert set(actions) == {OURS, "torch default", "torch fused"}
    assert set(bench_measure.iterations(steprule.Lion, torch.float32, CPU)) == {OURS}
    networks = [
        dict(zip(x.__code__.co_freevars, x.__closure__, strict=True))["network"] for x in actions.values()
    ]
    weights = [list(cell.cell_contents.parameters()) for cell in networks]
    for own in weights[1:]:
        for one, other in zip(weights[0], own, strict=True):
            assert one is not other
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_fresh_process_fills_the_cache_it_is_given(tmp_path: Path) -> None:
    told = bench_machine.fresh_process("AdamW", torch.float32, CPU, tmp_path / "cache")
    assert set(told) == {"import_torch", "import_steprule", "first_step"}
    assert all(milliseconds > 0 for milliseconds in told.values())
    if bench_measure.runner_of(steprule.AdamW(make_params((2,)))) == "cpu_kernel":
        assert {x.suffix for x in (tmp_path / "cache" / "steprule").iterdir()} == {".o", ".py"}


def test_a_fresh_process_that_fails(small_and_quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = small_and_quick / "fails.py"
    script.write_text("raise KeyError('why')")
    monkeypatch.setattr(bench_machine.bench_first_step, "__file__", str(script))
    with pytest.raises(LabError, match="the first step of Adam failed in a new process: KeyError: 'why'"):
        bench_machine.fresh_process("Adam", torch.float32, CPU, small_and_quick)


# The command


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"import_torch": 1000.0, "import_steprule": 20.0, "first_step": 70.0}
    monkeypatch.setattr(bench_machine, "fresh_process", lambda *_: told)


BENCH = ("bench", "--model", "own.py:shapes", "--repeats", "3")


@pytest.mark.usefixtures("no_processes")
def test_what_a_run_leaves(small_and_quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, *BENCH, "--optimizers", "adamw,Lion,adamw", "--out", "results/one.json")
    assert answer.code == 0, answer
    result = json.loads((small_and_quick / "results/one.json").read_text())
    assert (small_and_quick / "results/one.svg").read_text().startswith("<svg ")
    assert [rule["rule"] for rule in result["rules"]] == ["AdamW", "Lion"]
    assert (result["tensors"], result["numbers"], result["dtype"]) == (3, 73, "fp32")
    assert result["threads"] == torch.get_num_threads()
    assert result["torch"] == torch.__version__
    assert result["import"] == {"torch": 1000.0, "steprule": 20.0}
    adamw = result["rules"][0]
    assert adamw["bytes"] == 28 * 73
    assert adamw["step"][OURS]["times_steprule"] == 1
    assert set(adamw["step"]) | set(adamw["absent"]) == {
        *(f"{OURS}{name}" for name in ("", " foreach", " reference", " bf16 state", " int8 state")),
        *(f"torch {name}" for name in ("for-loop", "foreach", "fused")),
    }
    for step in adamw["step"].values():
        assert 0 < step["ms"]["low"] <= step["ms"]["median"] <= step["ms"]["high"]
        assert step["times_floor"] > 0
    assert adamw["first_step"] == {"cold": 70.0, "warm": 70.0}
    for part in ("own-shapes, 3 tensors, 73 elements", "AdamW", "Lion", "GB/s", "results/one.json"):
        assert part in answer.out, answer.out


@pytest.mark.usefixtures("no_processes")
def test_a_rule_with_modifiers_is_compared_with_the_rule_alone(capsys: pytest.CaptureFixture[str]) -> None:
    asked = "adamw+global_norm_clip,adamw+cautious,sgd+EMA"
    answer = run(capsys, *BENCH, "--optimizers", asked, "--out", "one.json")
    assert answer.code == 0, answer
    rules = json.loads(Path("one.json").read_text())["rules"]
    assert [rule["rule"] for rule in rules] == ["AdamW+global_norm_clip", "AdamW+cautious", "SGD+ema"]
    for rule in rules:
        assert rule["step"][bench_measure.WITHOUT]["times_steprule"] > 0
        assert 0 < rule["step"][OURS]["cold_ms"]["low"] <= rule["step"][OURS]["cold_ms"]["median"]
        assert ("torch fused" in rule["step"]) == (rule["rule"] != "AdamW+cautious")
    assert rules[1]["absent"]["torch fused"] == "torch has no cautious"
    assert "With modifiers" in answer.out
    assert "A step after other work" in answer.out


def test_what_users_of_torch_add_does_what_the_modifiers_do() -> None:
    kinds = [steprule.GlobalNormClip, steprule.EMA]
    modified = bench_modified.Modified(steprule.AdamW, kinds)
    mine, theirs = make_params((3, 4), (5,)), make_params((3, 4), (5,))
    for a, b in zip(mine, theirs, strict=True):
        b.data.copy_(a.data)
        b.grad = 10 * a.grad
        a.grad = 10 * a.grad
    for optimizer in (modified(mine), modified.by_hand(theirs)):
        for _ in range(3):
            optimizer.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("no_processes")
def test_runs_are_numbered_and_never_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        assert run(capsys, *BENCH, "--optimizers", "sgd").code == 0
        assert Path(f"runs/bench-own-shapes-{number}.json").is_file()
    before = everything_in(Path("runs"))
    answer = run(capsys, *BENCH, "--optimizers", "sgd", "--out", "runs/bench-own-shapes-1.json")
    assert_refused(answer, "'runs/bench-own-shapes-1.json' already exists. Give another --out.")
    assert everything_in(Path("runs")) == before


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp64"])
def test_other_dtypes(capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    answer = run(capsys, *BENCH, "--optimizers", "adamw", "--dtype", dtype, "--out", "one.json")
    assert answer.code == 0, answer
    size = {"fp64": 8}.get(dtype, 2)
    assert json.loads(Path("one.json").read_text())["rules"][0]["bytes"] == 7 * size * 73


def test_all_are_the_rules_written_in_words() -> None:
    names = [rule.__name__ for rule in bench._rules("all")]
    assert {"AdamW", "SGD", "Adagrad", "Lion", "Rprop"} < set(names)
    assert not {"SparseAdam", "Muon", "LBFGS"} & set(names)
    assert [rule.__name__ for rule in bench._rules("ranger, sgd+ema,sgd")] == [
        "RAdam+lookahead",
        "SGD+ema",
        "SGD",
    ]
    params = make_params((4, 4), (4,))
    for name in names:
        assert OURS in entrants(steprule.catalogue()[name], params).optimizers


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--model gpt", "no model 'gpt'. Did you mean 'gpt2'?"),
        ("--model own.py", "does not say which function: give own.py:FUNCTION"),
        ("--model absent.py:network", "no such file: absent.py"),
        ("--model own.py:networks", "own.py has no function 'networks'. Did you mean 'network'?"),
        ("--model own.py:nothing", "own.py:nothing() returned a model without parameters to train"),
        ("--model own.py:wrong", "must return a torch.nn.Module, or a list of shapes"),
        ("--model own.py:lazy", "own.py:lazy() returned a model in which '1.weight' has no shape yet"),
        ("--optimizers adamw+ema+sam", "sam takes the gradient twice"),
        ("--optimizers adam,adamv", "no optimizer 'adamv'. Did you mean 'Adam'?"),
        ("--optimizers adam,", "no optimizer ''"),
        ("--optimizers adam,sparseadam", "SparseAdam needs sparse gradients"),
        ("--optimizers lbfgs", "LBFGS"),
        ("--optimizers muon", "Muon only supports 2D parameters"),
        ("--dtype float32", "no dtype 'float32'."),
        ("--device gpu", "no device 'gpu'."),
        ("--repeats 1", "'--repeats'"),
        ("--out one.txt", "--out one.txt must be a .json file"),
        ("--out own.py/one.json", "'own.py' is not a folder. Give another --out."),
        ("--out /proc/one.json", "cannot write /proc/one.json"),
    ],
)
def test_wrong_options(
    small_and_quick: Path, capsys: pytest.CaptureFixture[str], arguments: str, told: str
) -> None:
    before = everything_in(small_and_quick)
    start = BENCH[:1] if "--model" in arguments else BENCH[:3]
    assert_refused(run(capsys, *start, *arguments.split()), told)
    assert {k: v for k, v in everything_in(small_and_quick).items() if "__pycache__" not in k} == before
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(run(capsys, *BENCH, "--device", "cuda"), "--device cuda", "--device cpu")


def test_a_model_that_does_not_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_machine, "available_bytes", lambda _: 8 << 30)
    answer = run(capsys, "bench", "--model", "gpt2", "--optimizers", "adamw")
    assert_refused(answer, "AdamW on gpt2 needs about 10.7 GiB of memory, but only 8.0 GiB is free")


def test_ctrl_c_leaves_nothing(
    small_and_quick: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_machine, "fresh_process", stop)
    answer = run(capsys, *BENCH, "--optimizers", "sgd", "--out", "one.json")
    assert (answer.code, answer.err) == (130, "steprule: stopped; nothing was kept.\n")
    assert not list(small_and_quick.glob("one*"))


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "stopped; 2 of 3 rules are done and kept in one.json."),
        (LabError("it failed."), 2, "it failed. 2 of 3 rules are done and kept in one.json."),
    ],
)
def test_what_is_done_when_it_ends_early_is_shown_and_kept(
    small_and_quick: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    told: str,
) -> None:
    def stop_at_sgd(rule: Any, *rest: Any) -> Any:
        if rule is steprule.SGD:
            raise error
        return bench_measure.iterations(rule, *rest)

    monkeypatch.setattr(bench, "iterations", stop_at_sgd)
    answer = run(capsys, *BENCH, "--optimizers", "adamw,lion,sgd", "--out", "one.json")
    assert (answer.code, answer.err) == (code, f"steprule: {told}\n")
    kept = json.loads((small_and_quick / "one.json").read_text())
    assert [rule["rule"] for rule in kept["rules"]] == ["AdamW", "Lion"]
    assert kept["import"] == {"torch": 1000.0, "steprule": 20.0}
    assert (small_and_quick / "one.svg").is_file()
    rows = [line.split()[0] for line in answer.out.splitlines() if line.strip()]
    assert rows.count("AdamW") >= 3
    assert "SGD" not in rows


@pytest.mark.usefixtures("no_processes")
def test_it_says_how_long_it_will_take_before_it_begins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure_nothing(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "entrants", measure_nothing)
    answer = run(capsys, *BENCH, "--optimizers", "sgd")
    assert re.search(
        r"^time +about 10 seconds; Ctrl-C keeps the rules that are done$", answer.out, re.MULTILINE
    )


@pytest.mark.parametrize(
    ("seconds", "said"), [(3, "10 seconds"), (74, "70 seconds"), (100, "2 minutes"), (9000, "2.5 hours")]
)
def test_how_an_estimate_is_said(seconds: float, said: str) -> None:
    screen = io.StringIO()
    bench_report.print_estimate(Console(file=screen, width=80), seconds)
    assert f"about {said};" in screen.getvalue()


def test_the_estimate_counts_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_machine, "fresh_process", lambda *_: time.sleep(0.5))
    monkeypatch.setattr(bench_measure, "SAMPLE_SECONDS", 0.02)
    params = make_params((8, 8))
    estimates = [
        bench_estimate.estimate(rules, params, repeats)
        for rules, repeats in (([steprule.AdamW], 10), ([steprule.AdamW] * 3, 10), ([steprule.AdamW], 100))
    ]
    count = len(entrants(steprule.AdamW, params).optimizers) + 3
    assert estimates[0] > 2 * 0.5 + 10 * count * 0.02
    assert estimates[1] > 2 * estimates[0]
    assert estimates[2] - estimates[0] > 80 * count * 0.02


def test_a_rule_measured_on_a_busy_machine_is_marked() -> None:
    results = json.loads((SOURCE.parent / "benchmarks/results/xeon-2-cores/all-rules/gpt2.json").read_text())
    results["rules"] = results["rules"][:2]
    for rule, unsteady in zip(results["rules"], (True, False), strict=True):
        rule["unsteady"] = unsteady
    for width in (40, 60, 80, 160):
        screen = io.StringIO()
        bench_report.print_tables(Console(file=screen, width=width), results)
        lines = screen.getvalue().splitlines()
        first, second = (rule["rule"] for rule in results["rules"])
        assert [line for line in lines if line.startswith(f"{first} *")]
        assert not [line for line in lines if line.startswith(f"{second} *")]
        assert "* the machine was busy" in screen.getvalue()
        assert max(map(len, lines)) <= width


@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_samples_that_differ_are_called_unsteady(monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    def samples(actions: Any, *_: object) -> dict[str, list[float]]:
        return {name: [1 - spread, 1.0, 1.0, 1.0, 1 + spread, 1 + spread] for name in actions}

    monkeypatch.setattr(bench, "samples_of", samples)
    plan = bench.Plan(bench_models.load_model("own.py:shapes"), [steprule.Lion], torch.float32, CPU, 5)
    measured = bench._measure_steps(plan, steprule.Lion, make_params((4, 4)), lambda _: None)
    assert measured["unsteady"] == (spread > 0.1)


def test_labels_of_the_chart_stay_right_of_the_floor(tmp_path: Path) -> None:
    results = json.loads((SOURCE.parent / "benchmarks/results/xeon-2-cores/all-rules/gpt2.json").read_text())
    for slowest in (1.0, 100.0):
        for number, rule in enumerate(results["rules"]):
            rule["step"][OURS]["times_floor"] = (0.4 + 0.1 * number) * (slowest if number == 0 else 1)
        bench_chart.draw_chart(tmp_path / "chart.svg", {**results, "model": "a_very_long_name-" * 8})
        svg = (tmp_path / "chart.svg").read_text()
        assert_readable(svg)
        labels = [text for text in texts_in(svg) if text.text.endswith(" ×")]
        (floor,) = (text for text in texts_in(svg) if text.text == "floor")
        assert len(labels) >= len(results["rules"])
        assert all((floor.left + floor.right) / 2 < label.left for label in labels)
