"""A log of a training loop of your own, in the files that `steprule report` reads."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from torch.optim import Optimizer

from steprule.lab.errors import LabError
from steprule.lab.mirrors import check_mirrors, mirroring
from steprule.lab.run_folder import RunFolder

__all__ = ["Logger", "measured_by"]

RESERVED = ("split", "step", "seconds")


class Logger:
    """Keeps the numbers of your own training loop, for `steprule report` and, if you like, TensorBoard.

    When: you have a loop of your own, and want its curves beside those of `steprule train` or of each other.

        log = Logger("runs/mine", optimizer)
        for step, batch in enumerate(batches, 1):
            ...
            optimizer.step()
            log(step=step, loss=loss)
        log(step=step, split="validation", loss=validation_loss)

    folder: gets `metrics.jsonl`, one JSON object a line; it is made if it is not there. optimizer: its lr is
    added to every line of split "train", and what it measures: `gradient_norm`, of all gradients before
    clipping, and `update_to_weight`, the length of the update relative to the weights, with the modifier
    `steprule.Metrics()` (`gradient_norm` also with `GlobalNormClip`), and `skipped_steps` with
    nonfinite="skip". to: "tensorboard", "wandb" or "trackio", where the numbers go as well. continue_after:
    the step after which a log that is in the folder goes on; what it has of later steps is dropped.

    Raises: LabError if the folder cannot be written, already holds a log, or is in use by another process, or
    if `to` names something that is unknown or not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        optimizer: Optimizer | None = None,
        *,
        to: Sequence[str] = (),
        continue_after: int | None = None,
    ) -> None:
        names = (to,) if isinstance(to, str) else tuple(to)
        check_mirrors(names)
        self._folder = RunFolder(Path(folder))
        self._optimizer = optimizer
        self._step = 0
        try:
            self._folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LabError(f"cannot make the folder '{folder}': {error.strerror}.") from error
        self._opened = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:
            opening.enter_context(self._folder.opened())
            before = self._earlier(continue_after)
            opening.enter_context(mirroring(names, self._folder, {}))
            self._opened = opening.pop_all()
        self._began = time.perf_counter() - before

    def _earlier(self, after: int | None) -> float:
        """Keep what the folder has up to a step; returns its seconds."""
        if after is None:
            if self._folder.has_begun:
                raise LabError(
                    f"'{self._folder.path}' already holds a log. Give another folder, or go on with it: "
                    "continue_after= the last step to keep."
                )
            return 0.0
        kept = self._folder.cut_metrics_after(after)
        self._step = max((int(line["step"]) for line in kept), default=0)
        return max((float(line.get("seconds") or 0.0) for line in kept), default=0.0)

    def __call__(self, step: int | None = None, split: str = "train", **numbers: Any) -> None:
        """Log some numbers; the same as `log`."""
        self.log(step, split, **numbers)

    def log(self, step: int | None = None, split: str = "train", **numbers: Any) -> None:
        """Add a line.

        step: from 1; left out, one more than the last one for "train", and the last one for other splits.
        split: "train", "validation" or "test". numbers: by name, as floats or tensors of one element. NaN and
        infinity are kept as null.

        Raises: TypeError if something is not a number; LabError if the file cannot be written.
        """
        if step is None:
            step = self._step + (split == "train")
        known: dict[str, float | None] = {name: _as_number(name, value) for name, value in numbers.items()}
        if split == "train" and self._optimizer is not None:
            known = {**measured_by(self._optimizer), **known}
        self._step = int(step)
        seconds = round(time.perf_counter() - self._began, 3)
        self._folder.add_metrics({"split": split, "step": int(step), **known, "seconds": seconds})

    def close(self) -> None:
        """Let go of the folder; wandb and trackio then know that the run is complete."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_number(name: str, value: Any) -> float | None:
    if name in RESERVED:
        raise TypeError(f"Logger: '{name}' is written by the logger itself. Give the number another name.")
    try:
        return _finite(float(value.detach() if isinstance(value, Tensor) else value))
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(value).__name__
        raise TypeError(f"Logger: {name} is of type {kind}, must be one number, or a tensor of one.") from error


def _finite(value: float) -> float | None:
    """The number, or None: JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def measured_by(optimizer: Optimizer) -> dict[str, float | None]:
    """The lr of an optimizer's first group, and what it measured at its last step; None if it is not finite."""
    groups: Sequence[Mapping[str, Any]] = optimizer.param_groups
    found = {"lr": float(groups[0]["lr"])} if "lr" in groups[0] else {}
    measuring: Any = optimizer
    if any("metrics" in (group.get("modifiers") or ()) for group in groups):
        metrics = measuring.metrics()
        found |= {name: metrics[name] for name in ("gradient_norm", "update_to_weight")}
    elif any("global_norm_clip.norm" in group for group in groups):
        found["gradient_norm"] = float(measuring.gradient_norm)
    skipped = [float(group["skipped_steps"]) for group in groups if "skipped_steps" in group]
    found |= {"skipped_steps": sum(skipped)} if skipped else {}
    return {name: _finite(value) for name, value in found.items()}
