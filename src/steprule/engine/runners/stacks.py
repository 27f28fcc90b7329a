"""Steps batches of several groups side by side, so that all their equal matrices are worked on at once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from steprule import matrix_errors
from steprule.engine.program import sums
from steprule.engine.program.phases import Asked, Going, OnMatrices, Part, Stages
from steprule.engine.program.sums import Partial
from steprule.engine.runners.matrices import MatrixWork
from steprule.engine.sharding.operands import MatrixParts


class BeforeSweep(NamedTuple):
    """What a batch asks for before each of its sweeps: the words on its whole matrices."""

    number: int
    batch: Any
    group: dict[str, Any]
    gradients: Sequence[Tensor]
    states: Sequence[dict[str, Any]]


Sweeps = Generator[BeforeSweep | Asked, Mapping[Any, float] | None, None]


class Member(NamedTuple):
    """A batch. start: begins its step. names: of its parameters, for messages."""

    start: Callable[[], Sweeps]
    names: Callable[[], list[str]]


@dataclass(frozen=True)
class Stack:
    """The step of batches that are at the same sweep all the time.

    who: how messages call their rule. alike: what steps have in common that may be taken together; None: it is
    not. size: the bytes that are in memory between sweeps. most: how many there may be of several together.
    """

    who: str
    alike: Hashable
    size: int
    most: int
    members: tuple[Member, ...]

    def part(self, stages: Stages, may_raise: bool) -> Part:
        """These batches as a part of a step."""
        return Part(self.start if stages else self._to_the_end, stages, may_raise, stack=self)

    def _to_the_end(self) -> None:
        for _ in self.start():
            raise AssertionError("no sum over several tensors was asked for")

    def start(self) -> Going:
        """Take the step; after it nothing of it stays in memory, whether it ends or is given up."""
        sweeps = [member.start() for member in self.members]
        work: Any = None  # MatrixWork or, of parts, MatrixParts
        states: list[Any] = []
        known: Mapping[Any, float] | None = None
        try:
            while asked := [x for x in (_next(sweep, known) for sweep in sweeps) if x is not None]:
                before = [x for x in asked if isinstance(x, BeforeSweep)]
                sums_asked = [x for x in asked if not isinstance(x, BeforeSweep)]
                if before:
                    works = [x.batch.work for x in before]
                    if work is None:
                        work = works[0] if len(works) == 1 else MatrixWork.of_all(works)
                    states = [state for x in before for state in x.states]
                    # Of parts there is one batch, whose words other processes carry out, too.
                    if _offered(before[0]):
                        yield OnMatrices(before[0].number).asked
                    _carry_out(work, before, states)
                known = (yield _added(sums_asked)) if sums_asked else None
            if work is not None:
                work.store(states)
        except matrix_errors.WordFailed as failed:
            names = [name for member in self.members for name in member.names()]
            raise matrix_errors.word_failed(self.who, failed, names) from None
        finally:
            for sweep in sweeps:
                sweep.close()
            if work is not None:
                work.forget()


def stacked(steps: Sequence[tuple[dict[str, Any], list[Part]]]) -> list[tuple[dict[str, Any], list[Part]]]:
    """The parts of each group, where the first of several whose matrices can be stacked takes the others in.

    What is in memory between sweeps stays below what the stacks allow.
    """
    found: list[tuple[dict[str, Any], list[Part]]] = []
    # The list and the place in it of the last part of each kind.
    last: dict[Hashable, tuple[list[Part], int]] = {}
    for group, parts in steps:
        kept: list[Part] = []
        for part in parts:
            stack: Stack | None = part.stack
            if stack is None or stack.alike is None:
                kept.append(part)
                continue
            own, place = last.get(stack.alike, (kept, len(kept)))
            first: Stack | None = own[place].stack if stack.alike in last else None
            if first is not None and first.size + stack.size <= first.most:
                size, members = first.size + stack.size, (*first.members, *stack.members)
                own[place] = replace(first, size=size, members=members).part(part.stages, part.may_raise)
            else:
                last[stack.alike] = kept, len(kept)
                kept.append(part)
        found.append((group, kept))
    return found


def _next(sweep: Sweeps, known: Mapping[Any, float] | None) -> BeforeSweep | Asked | None:
    """What a batch asks for next, or None at its end."""
    try:
        return sweep.send(known)  # type: ignore[arg-type]
    except StopIteration:
        return None


def _offered(before: BeforeSweep) -> bool:
    """Whether other processes take part in the words before a sweep of this batch, which are then offered."""
    number, batch, *given = before
    return batch.offer(number, *given)


def _carry_out(work: MatrixWork | MatrixParts, before: Sequence[BeforeSweep], states: Sequence[Any]) -> None:
    """The words on whole matrices before a sweep of these batches."""
    number = before[0].number
    rows = [row for x in before for row in x.batch.rows]
    gradients = [gradient for x in before for gradient in x.gradients]
    made = work.begin() if not number else {}
    if number < len(before[0].batch.program.stages):
        made |= work.run(number, rows, range(len(rows)), gradients, states)
    for name, addresses in made.items():
        first = 0
        for x in before:
            x.batch.launch.place(name, addresses[first : first + len(x.gradients)])
            first += len(x.gradients)


def _added(asked: Sequence[Asked]) -> Asked:
    """What several batches ask for, which all have their shares of the same sums."""
    if len(asked) == 1:
        return asked[0]
    found: dict[Any, tuple[str, Partial]] = {}
    for key, (word, share) in asked[0].items():
        shares = [own[key][1] for own in asked]
        found[key] = word, sums.together(word, shares) if word else share
    return found
