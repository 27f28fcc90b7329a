"""Runs the parts of a step side by side: a sum over all parameters needs a sweep of each before any goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from steprule.engine.program import sums
from steprule.engine.program.program import Program, Reduction
from steprule.engine.program.sums import Partial

# What a part asks for: for each key a word and the part's own share of it. It is sent what they come to.
Asked = Mapping[Any, tuple[str, Partial]]
Going = Generator[Asked, Mapping[Any, float], None]
Stages = tuple[frozenset[Any], ...]


# What a part asks for when nothing in it can raise any more, and nothing has moved yet.
BEFORE_STORING = "before storing"
NOTHING_RAISES: Asked = {BEFORE_STORING: ("", Partial(0.0, 0))}


class Part(NamedTuple):
    """Parameters of one group that one runner steps, prepared so that nothing in them raises any more.

    start: runs the step, or returns what runs it between sums. stages: the keys of the sums that it takes part
    in, those together that it asks for at once, in order. may_raise: a word on whole matrices may still raise
    before the part asks for `BEFORE_STORING`.
    """

    start: Callable[[], Going | None]
    stages: Stages = ()
    may_raise: bool = False

    @property
    def keys(self) -> frozenset[Any]:
        """The keys of all sums that it takes part in."""
        return frozenset[Any]().union(*self.stages)


class _Waiting(NamedTuple):
    part: Going
    asked: Asked


def run(parts: Iterable[Part], stop: Callable[[Mapping[Any, float]], bool] = lambda known: False) -> bool:
    """Run all parts to their end, and return whether they were.

    stop: is told every sum when it is known, and says whether to give up; before the first one nothing that
    waits for a sum has moved.
    """
    parts = list(parts)
    members = Counter(chain.from_iterable(part.keys for part in parts))
    shares: dict[Any, list[Partial]] = {}
    waiting: list[_Waiting] = []
    may_raise: dict[Going, bool] = {}

    moved = False

    def go(going: Going, answers: Mapping[Any, float] | None) -> None:
        try:
            asked = going.send(answers)  # type: ignore[arg-type]
        except StopIteration:
            return
        except Exception as error:
            error.nothing_moved = not moved  # type: ignore[attr-defined]
            raise
        for key, (_, share) in asked.items():
            shares.setdefault(key, []).append(share)
        waiting.append(_Waiting(going, asked))

    moving = [part for part in parts if not part.keys] if BEFORE_STORING in members else []
    for part in (x for x in parts if x not in moving):
        going = part.start()
        if going is not None:
            go(going, None)
            may_raise[going] = part.may_raise
    while waiting:
        ready = [x for x in waiting if all(len(shares[key]) == members[key] for key in x.asked)]
        if not ready:
            raise AssertionError("sums that wait for each other are found before a step")
        # What may raise goes on first, so that nothing has moved if it does.
        ready = [x for x in ready if may_raise[x.part] and BEFORE_STORING not in x.asked] or ready
        waiting = [x for x in waiting if x not in ready]
        asked = {key: word for x in ready for key, (word, _) in x.asked.items()}
        asked.pop(BEFORE_STORING, None)
        known = {key: sums.finished(word, shares[key]) for key, word in asked.items()}
        if stop(known):
            for x in (*ready, *waiting):
                x.part.close()
            return False
        for x in ready:
            moved = moved or BEFORE_STORING in x.asked or not may_raise[x.part]
            go(x.part, {key: known[key] for key in x.asked if key in known})
    for part in moving:
        part.start()
    return True


def key_in(group: dict[str, Any], reduction: Reduction) -> Any:
    """What says that a sum is the same in several parts: in all, or in those of one group."""
    return (id(group), *reduction.key) if reduction.over == "group" else reduction.key


def stages_of(program: Program, group: dict[str, Any]) -> Stages:
    """The keys of the sums over several tensors in a program, in the order in which kernels and lists ask."""
    stages = [
        frozenset(key_in(group, x) for part in parts if part is not None for x in part.reductions if x.shared)
        for parts in zip_longest(program.columns, program.passes)
    ]
    if program.may_raise:
        stages.insert(len(stages) - 1, frozenset({BEFORE_STORING}))
    return tuple(filter(None, stages))


def waiting(parts: Iterable[Part]) -> set[Stages]:
    """The stages of parts that would wait for each other's sums forever."""
    # Parts with the same stages are always at the same one.
    left = {part.stages: 0 for part in parts if part.stages}
    if len(left) < 2:
        return set()
    members = Counter(chain.from_iterable(chain.from_iterable(left)))
    asked = Counter(chain.from_iterable(stages[0] for stages in left))
    while left:
        ready = [x for x, place in left.items() if all(asked[key] == members[key] for key in x[place])]
        if not ready:
            break
        for stages in ready:
            left[stages] += 1
            if left[stages] == len(stages):
                del left[stages]
            else:
                asked.update(stages[left[stages]])
    # Who waits at its last stage holds nobody up.
    return {stages for stages, place in left.items() if place < len(stages) - 1}
