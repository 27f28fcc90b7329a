"""Which trainings belong together, what they are called, and which of their numbers come first."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from steprule.lab.errors import LabError
from steprule.lab.optimizer_classes import optimizer_label, usual_settings
from steprule.lab.reporting.logs import Key, Log, Number, falls
from steprule.lab.reporting.words import Words
from steprule.lab.run_folder import RunConfig
from steprule.lab.tasks import task_options

__all__ = ["LR", "Group", "Quantities", "groups_of", "lowest_of", "own_settings", "train_command"]

LOSS, LR = "loss", "lr"
NAMES = {
    LOSS: "loss",
    LR: "learning rate",
    "gradient_norm": "gradient norm",
    "update_to_weight": "update relative to weights",
    "skipped_steps": "skipped steps",
}
PARTS = ("validation", "train", "", "test")


@dataclass(frozen=True)
class Group:
    """Trainings that are the same except for their seed."""

    label: str
    logs: Sequence[Log]

    @property
    def config(self) -> RunConfig | None:
        """The configuration of the first one, if it is a run of `steprule train`."""
        return self.logs[0].config

    @property
    def steps(self) -> float:
        """The last step of any of them."""
        return max(number.step for log in self.logs for curve in log.curves.values() for number in curve)

    @property
    def seconds(self) -> float:
        """How long one took, in the median; NaN if that is not known."""
        times = [
            max((number.seconds for number in numbers if math.isfinite(number.seconds)), default=math.nan)
            for log in self.logs
            for numbers in [[number for curve in log.curves.values() for number in curve]]
        ]
        known = [time for time in times if math.isfinite(time)]
        return statistics.median(known) if known else math.nan

    def last(self, key: Key) -> list[float]:
        """The last number of each training; infinite instead of NaN, which has no order."""
        values = [log.curves[key][-1].value for log in self.logs if log.curves.get(key)]
        return [math.inf if math.isnan(value) else value for value in values]

    def middle(self, key: Key) -> float:
        """The median of the last numbers; infinite if there are none."""
        values = self.last(key)
        return statistics.median(values) if values else math.inf

    def curves(self, key: Key) -> list[Sequence[Number]]:
        """The numbers of each training."""
        return [log.curves.get(key, ()) for log in self.logs]


class Quantities:
    """What was measured, in the order in which it matters, and how it is called.

    keys: losses come first, and validation before training. main: the one by which trainings are compared.
    """

    def __init__(self, groups: Sequence[Group], say: Words) -> None:
        there = dict.fromkeys(key for group in groups for log in group.logs for key in log.curves)

        def rank(key: Key) -> tuple[bool, bool, int]:
            part, name = key
            return not falls(name), name != LOSS, PARTS.index(part) if part in PARTS else len(PARTS)

        self._say = say
        self._config = groups[0].config
        self.keys: list[Key] = sorted(there, key=rank)
        self.main = self.keys[0]

    def of(self, name: str) -> list[Key]:
        """All parts of the data of which there is a quantity."""
        return [key for key in self.keys if key[1] == name]

    @property
    def names(self) -> list[str]:
        """The quantities, without the parts of the data."""
        return list(dict.fromkeys(name for _, name in self.keys))

    def part(self, key: Key) -> str:
        """The part of the data in words."""
        return self._say(key[0]) if key[0] in PARTS and key[0] else key[0]

    def quantity(self, name: str) -> str:
        """A quantity in words."""
        return self._say(NAMES[name]) if name in NAMES else name

    def full(self, key: Key) -> str:
        """A quantity with the part of the data, unless that goes without saying."""
        alone = len(self.of(key[1])) == 1 and key[0] == "train" and not falls(key[1])
        return " ".join(filter(None, ("" if alone else self.part(key), self.quantity(key[1]))))

    def axis(self, name: str) -> str:
        """A quantity with its unit, as far as the run says it."""
        facts: Mapping[str, str] = self._config.facts if self._config is not None else {}
        if name == LOSS:
            return facts.get("loss") or self.quantity(name)
        score = facts.get("score", "")
        return score if score.startswith(name) else self.quantity(name)


def groups_of(logs: Sequence[Log]) -> list[Group]:
    """The trainings, those that differ in nothing but the seed together."""
    found: dict[object, list[Log]] = {}
    for log in logs:
        found.setdefault(str(log.path) if log.config is None else _but_for_the_seed(log.config), []).append(log)
    sets = [*found.values()]
    configs = [some[0].config for some in sets]
    known = [config for config in configs if config is not None]
    labels = [
        some[0].name if config is None else _label(config, known)
        for some, config in zip(sets, configs, strict=True)
    ]
    return [
        Group(label if labels.count(label) == 1 else f"{label} ({some[0].name})", some)
        for label, some in zip(labels, sets, strict=True)
    ]


def _but_for_the_seed(config: RunConfig) -> object:
    rest = (config.task, config.schedule, config.epochs, config.batch_size, config.clip_norm, config.device)
    return repr((config.optimizer, sorted(config.hyperparameters.items()), rest))


def _label(config: RunConfig, all_configs: Sequence[RunConfig]) -> str:
    """The optimizer, with the settings in which runs of it differ."""
    same = [other for other in all_configs if other.optimizer == config.optimizer]
    differ = [
        f"{name} {value}"
        for name, value in config.hyperparameters.items()
        if any(other.hyperparameters.get(name) != value for other in same)
    ]
    for name in ("schedule", "epochs", "batch_size", "clip_norm", "device"):
        if any(getattr(other, name) != getattr(config, name) for other in same):
            differ.append(f"{name.replace('_', ' ')} {getattr(config, name)}")
    return ", ".join([optimizer_label(config.optimizer), *differ])


def lowest_of(curve: Sequence[Number]) -> Number:
    """The lowest number of a curve."""
    return min(curve, key=lambda number: math.inf if math.isnan(number.value) else number.value)


def own_settings(config: RunConfig) -> dict[str, Any]:
    """The learning rate, and every other hyper-parameter that is not at its default."""
    try:
        usual = usual_settings(config.optimizer)
    except LabError:  # a class of a file that is not here
        usual = {}
    return {
        name: value
        for name, value in config.hyperparameters.items()
        if name == LR or (value is not None and (name not in usual or usual[name] != value))
    }


def train_command(config: RunConfig) -> str:
    """The command that repeats a run; what is at its default is left out."""
    parts = ["steprule", "train", *task_options(config.task), "--optimizer", config.optimizer]
    for name, value in own_settings(config).items():
        text = ",".join(map(str, cast("tuple[Any, ...]", value))) if isinstance(value, tuple) else str(value)
        parts += ["--lr", text] if name == LR else ["--set", f"{name}={text}"]
    parts += ["--schedule", config.schedule] if config.schedule != "none" else []
    parts += [
        "--epochs",
        str(config.epochs),
        "--batch-size",
        str(config.batch_size),
        "--seed",
        str(config.seed),
    ]
    parts += [] if config.clip_norm is None else ["--clip-norm", f"{config.clip_norm:g}"]
    parts += [] if config.device == "cpu" else ["--device", config.device]
    return shlex.join(parts)
