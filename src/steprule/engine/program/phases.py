"""Runs the parts of a step side by side: a sum over all parameters needs a sweep of each before any goes on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, NamedTuple

from steprule.engine.program import sums
from steprule.engine.program.program import Program, Reduction
from steprule.engine.program.sums import Partial

# What a part asks for: for each key a word and the part's own share of it. It is sent what they come to.
Asked = Mapping[Any, tuple[str, Partial]]
Going = Generator[Asked, Mapping[Any, float], None]


class Part(NamedTuple):
    """Parameters of one group that one runner steps, prepared so that nothing in them raises any more.

    start: runs the step, or returns what runs it between sums. keys: of the sums that it takes part in.
    """

    start: Callable[[], Going | None]
    keys: frozenset[Any] = frozenset()


class _Waiting(NamedTuple):
    part: Going
    asked: Asked


def run(parts: Iterable[Part], stop: Callable[[Mapping[Any, float]], bool] = lambda known: False) -> bool:
    """Run all parts to their end, and return whether they were.

    stop: is told every sum when it is known, and says whether to give up; before the first one nothing that
    waits for a sum has moved.
    """
    parts = list(parts)
    members = {key: sum(key in part.keys for part in parts) for part in parts for key in part.keys}
    shares: dict[Any, list[Partial]] = {}
    waiting: list[_Waiting] = []

    def go(going: Going, answers: Mapping[Any, float] | None) -> None:
        try:
            asked = going.send(answers)  # type: ignore[arg-type]
        except StopIteration:
            return
        for key, (_, share) in asked.items():
            shares.setdefault(key, []).append(share)
        waiting.append(_Waiting(going, asked))

    for part in parts:
        going = part.start()
        if going is not None:
            go(going, None)
    while waiting:
        ready = [x for x in waiting if all(len(shares[key]) == members[key] for key in x.asked)]
        if not ready:
            raise RuntimeError("the sums of these rules wait for each other; put them into two optimizers")
        waiting = [x for x in waiting if x not in ready]
        asked = {key: word for x in ready for key, (word, _) in x.asked.items()}
        known = {key: sums.finished(word, shares[key]) for key, word in asked.items()}
        if stop(known):
            for x in (*ready, *waiting):
                x.part.close()
            return False
        for x in ready:
            go(x.part, {key: known[key] for key in x.asked})
    return True


def key_in(group: dict[str, Any], reduction: Reduction) -> Any:
    """What says that a sum is the same in several parts: in all, or in those of one group."""
    return (id(group), *reduction.key) if reduction.over == "group" else reduction.key


def keys_of(program: Program, group: dict[str, Any]) -> frozenset[Any]:
    """The keys of all sums over several tensors in a program."""
    return frozenset(key_in(group, x) for x in program.reductions if x.shared)
