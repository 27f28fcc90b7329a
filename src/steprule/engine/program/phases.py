"""Runs the parts of a step side by side: a sum over all parameters needs a sweep of each before any goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, NamedTuple, Protocol

from steprule.engine.program import sums
from steprule.engine.program.program import Program, Reduction
from steprule.engine.program.sums import Partial

# What a part asks for: for each key a word and the part's own share of it. It is sent what they come to.
Asked = Mapping[Any, tuple[str, Partial]]
Going = Generator[Asked, Mapping[Any, float], None]
Stages = tuple[frozenset[Any], ...]


# What a part asks for when nothing in it can raise any more, and nothing has moved yet.
BEFORE_STORING = "before storing"
# The key of a group under which it names the one that it is a part of.
PART_OF = "part of"
# That of the places in it that its parameters have.
PLACES = "places"
# And that of what takes operands of words on whole matrices to where the whole matrices are.
OPERANDS = "operands"
NOTHING_RAISES: Asked = {BEFORE_STORING: ("", Partial(0.0, 0))}


@dataclass(frozen=True)
class OnMatrices:
    """What a part asks for whose parameters are split: the words on whole matrices before this sweep."""

    number: int

    @property
    def asked(self) -> Asked:
        """This alone."""
        return {self: ("", Partial(0.0, 0))}


def waits_to_store(program: Program, split: bool) -> bool:
    """Whether a part asks for `BEFORE_STORING`: a word on whole matrices may raise, here or elsewhere.

    split: whether other processes have other parts of its parameters.
    """
    return program.may_raise or (split and any(program.stages))


def matrices_elsewhere(program: Program) -> list[Any]:
    """What a part of this program asks for if its parameters are split, besides sums."""
    found: list[Any] = [OnMatrices(i) for i, stage in enumerate(program.stages) if stage is not None]
    return [*found, BEFORE_STORING] if found else []


class Part(NamedTuple):
    """Parameters of one group that one runner steps, prepared so that nothing in them raises any more.

    start: runs the step, or returns what runs it between sums. stages: the keys of the sums that it takes part
    in, those together that it asks for at once, in order. may_raise: a word on whole matrices may still raise
    before the part asks for `BEFORE_STORING`. counts: whether its shares count in sums over all processes: of
    what several processes repeat, those of one do. stack: if it works on whole matrices, how it can do so
    together with other parts (see `runners.stacks`).
    """

    start: Callable[[], Going | None]
    stages: Stages = ()
    may_raise: bool = False
    counts: bool = True
    stack: Any = None

    @property
    def keys(self) -> frozenset[Any]:
        """The keys of all sums that it takes part in."""
        return frozenset[Any]().union(*self.stages)


def never(known: Mapping[Any, float]) -> bool:
    """Do not stop, whatever is known."""
    return False


class _Waiting(NamedTuple):
    part: Part
    going: Going
    asked: Asked


class Everywhere(Protocol):
    """What takes sums over all processes."""

    @property
    def keys(self) -> Collection[Any]:
        """Which sums are not known yet."""
        ...

    def known(self, complete: Mapping[Any, Sequence[Partial]]) -> dict[Any, float]:
        """Which sums are known now that every process has given what is complete in it."""
        ...

    def end(self) -> None:
        """Wait until all processes have run all their parts."""
        ...


def run(
    parts: Iterable[Part],
    stop: Callable[[Mapping[Any, float]], bool] = never,
    everywhere: Everywhere | None = None,
) -> bool:
    """Run all parts to their end, and return whether they were.

    stop: is told every sum when it is known, and says whether to give up; before the first one nothing that
    waits for a sum has moved. everywhere: what takes sums over all processes, if there are several.
    """
    return _Run(list(parts), everywhere).to_the_end(stop)


class _Run:
    """Parts on their way."""

    def __init__(self, parts: list[Part], everywhere: Everywhere | None):
        self._parts = parts
        self._everywhere = everywhere
        self._members = Counter(chain.from_iterable(part.keys for part in parts))
        self._shares: dict[Any, list[Partial]] = {}
        self._known: dict[Any, float] = {}
        self._waiting: list[_Waiting] = []
        self._moved = False

    def to_the_end(self, stop: Callable[[Mapping[Any, float]], bool]) -> bool:
        """Run all of them, unless they are stopped."""
        everywhere = self._everywhere
        moving = [x for x in self._parts if not x.keys] if self._members[BEFORE_STORING] else []
        for part in (x for x in self._parts if x not in moving):
            going = part.start()
            if going is not None:
                self._go(part, going, None)
        while self._waiting or (everywhere is not None and everywhere.keys):
            new = self._added_up()
            self._known |= new
            if new and stop(new):
                for x in self._waiting:
                    x.going.close()
                return False
            ready = self._ready()
            # What may raise goes on first, so that nothing has moved if it does.
            ready = [x for x in ready if x.part.may_raise and BEFORE_STORING not in x.asked] or ready
            self._waiting = [x for x in self._waiting if x not in ready]
            for x in ready:
                self._moved = self._moved or BEFORE_STORING in x.asked or not x.part.may_raise
                self._go(x.part, x.going, {key: self._known[key] for key in x.asked})
        for part in moving:
            part.start()
        if everywhere is not None:
            everywhere.end()
        return True

    def _go(self, part: Part, going: Going, answers: Mapping[Any, float] | None) -> None:
        """Run a part until it asks for the next sums."""
        try:
            asked = going.send(answers)  # type: ignore[arg-type]
        except StopIteration:
            return
        except Exception as error:
            error.nothing_moved = not self._moved  # type: ignore[attr-defined]
            raise
        for key, (_, share) in asked.items():
            self._shares.setdefault(key, []).append(share if part.counts else sums.counted_elsewhere(share))
        self._waiting.append(_Waiting(part, going, asked))

    def _ready(self) -> list[_Waiting]:
        return [x for x in self._waiting if all(key in self._known for key in x.asked)]

    def _added_up(self) -> dict[Any, float]:
        """The sums that are complete now and were not before."""
        words = {key: word for x in self._waiting for key, (word, _) in x.asked.items()}
        if self._everywhere is None:
            new = [key for key in words if key not in self._known and self._complete(key)]
            if not new and not self._ready():
                raise AssertionError("sums that wait for each other are found before a step")
            return {key: sums.finished(words[key], self._shares[key]) if words[key] else 0.0 for key in new}
        if self._ready():
            return {}
        mine = {key: self._shares.get(key, []) for key in self._everywhere.keys if self._complete(key)}
        return self._everywhere.known(mine)

    def _complete(self, key: Any) -> bool:
        """Whether all parts have given their shares."""
        return len(self._shares.get(key, ())) == self._members[key]


def key_in(group: dict[str, Any], reduction: Reduction) -> Any:
    """What says that a sum is the same in several parts: in all, or in those of one group."""
    whole = group.get(PART_OF, group)
    return (id(whole), *reduction.key) if reduction.over == "group" else reduction.key


def keys_of(group: dict[str, Any], reduction: Reduction, places: Sequence[int]) -> list[Any]:
    """The keys of a reduction: one if it goes over several tensors, otherwise one for each of these.

    places: of parameters of which this process has a part, in the group that it is a part of.
    """
    if reduction.shared:
        return [key_in(group, reduction)]
    whole = id(group.get(PART_OF, group))
    # Programs that are decided between before a step may count different sums in the same way.
    return [(whole, place, reduction.index, reduction.word) for place in places]


def stages_of(program: Program, group: dict[str, Any], places: Sequence[int] = ()) -> Stages:
    """The keys of the sums that a program waits for, in the order in which kernels and lists ask.

    places: as in `keys_of`.
    """
    split, found = bool(places), list[frozenset[Any]]()
    for number, parts in enumerate(zip_longest(program.columns, program.passes, program.stages)):
        if split and parts[2] is not None:
            found.append(frozenset({OnMatrices(number)}))
        if number == len(program.passes) - 1 and waits_to_store(program, split):
            found.append(frozenset({BEFORE_STORING}))
        reductions = [x for part in parts[:2] if part is not None for x in part.reductions]
        found.append(frozenset(key for x in reductions for key in keys_of(group, x, places)))
    return tuple(filter(None, found))


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
