"""One page for each way to keep state and 16-bit parameters, with what it costs and which rules take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from making import measured
from making.markdown import code, prose, section, table
from torch import nn

import steprule
from steprule.engine.rule import RuleOptimizer

__all__ = ["format_pages"]

SIDE = 1024
RULES: dict[Any, dict[str, Any]] = {
    steprule.SGD: {"momentum": 0.9},
    steprule.AdamW: {},
    steprule.AdaBelief: {},
    steprule.Lion: {},
}


@dataclass(frozen=True)
class Format:
    """A way to keep values: an option of an optimizer, and what is said about it."""

    title: str
    option: str
    value: str
    summary: str
    when: str
    kept: str
    rounding: str

    @property
    def options(self) -> dict[str, str]:
        """The option as an argument."""
        return {self.option: self.value}

    @property
    def of_parameters(self) -> bool:
        """Whether it is about 16-bit parameters; otherwise about state."""
        return self.option == "low_precision"


FORMATS = {
    "fp32": Format(
        "fp32 state",
        "state_dtype",
        "fp32",
        "State in 32 bits, also for parameters in 16.",
        "the parameters are in 16 bits and there is memory for averages in 32. State of fp32 parameters is in "
        "fp32 by itself.",
        "The value, 4 bytes.",
        "None in the state.",
    ),
    "bf16": Format(
        "bf16 state",
        "state_dtype",
        "bf16",
        "State in 16 bits, half as large, rounded up or down at random.",
        "memory is short and every rule should go on as before. It is also faster where memory is the limit.",
        "The upper 16 bits of a float32: a sign, 8 bits of exponent and 7 of mantissa; 2 bytes.",
        "At random, up or down, with the probability that makes the mean right: an average that moves by less "
        "than one unit per step still moves. The random numbers depend on the position of the parameter and on "
        "the step, not on torch's seed.",
    ),
    "fp16": Format(
        "fp16 state",
        "state_dtype",
        "fp16",
        "State in 16 bits with three more bits of mantissa than bf16, and a narrow range.",
        "a slot holds values near 1. Slots that a step divides by are refused: nothing is between 0 and 6e-8.",
        "A sign, 5 bits of exponent and 10 of mantissa; 2 bytes.",
        "To the nearest.",
    ),
    "int8": Format(
        "8-bit state",
        "state_dtype",
        "int8",
        "State in 8 bits: small floats, and a scale that 128 neighbours share.",
        "memory is the limit: AdamW keeps 2.02 bytes per parameter in place of 8.",
        "A code of 8 bits for each element: a sign, 4 bits of exponent and 3 of mantissa, or without a sign 5 "
        "bits of exponent and 3 of mantissa for slots that are never negative. 128 neighbours share "
        "a power of two, in one byte. Tensors below 4096 elements stay in fp32.",
        "At random, as bf16. A block whose values are not finite says so in its scale and gives NaN.",
    ),
    "master": Format(
        "fp32 parameters in two halves",
        "low_precision",
        "master",
        "Exact fp32 parameters: the model holds the upper 16 bits, the optimizer the lower 16.",
        "you train in bf16 and want the numbers of fp32 parameters.",
        "The lower half of the fp32 value as int16, 2 bytes per parameter.",
        "None: both halves together are the fp32 value.",
    ),
    "kahan": Format(
        "Kahan summation",
        "low_precision",
        "kahan",
        "What rounding a bf16 parameter loses is kept in a second bf16 tensor, and added in the next step.",
        "you train in bf16 and can spare 2 bytes per parameter. It works for fp16 parameters, too.",
        "A compensation in 16 bits, 2 bytes per parameter.",
        "To the nearest; what is lost stays in the compensation.",
    ),
    "stochastic": Format(
        "Stochastic rounding",
        "low_precision",
        "stochastic",
        "bf16 parameters are rounded up or down at random, so that small updates are not lost.",
        "you train in bf16 and have no memory to spare.",
        "A key for the random numbers, 8 bytes per tensor.",
        "At random, with the probability that makes the mean right.",
    ),
}


def format_pages() -> dict[str, str]:
    """The pages by file name, and a page that lists them."""
    rows = [
        [f"[{x.title}]({name}.md)", f'`{x.option}="{x.value}"`', prose(x.summary)]
        for name, x in FORMATS.items()
    ]
    introduction = (
        "How an optimizer keeps its state, and how it steps parameters in 16 bits. Rules on single elements "
        "take most of them; where one would break a rule, the constructor refuses it and says why."
    )
    tree = "\n".join(["```{toctree}", ":hidden:", "", *FORMATS, "```"])
    index = ["# Storage formats", introduction, table(["Format", "Option", "What it does"], rows), tree]
    pages = {name: _page(one) for name, one in FORMATS.items()}
    return {**pages, "index": "\n\n".join(index) + "\n"}


def _page(one: Format) -> str:
    dtype = ", dtype=torch.bfloat16" if one.of_parameters else ""
    rule = "AdamW" if one.value != "fp16" else "Lion"
    made = f'{rule}(model, {one.option}="{one.value}")'
    shown = (
        f"import torch\nfrom steprule import {rule}\n\n"
        f"model = torch.nn.Linear(256, 256{dtype})\n"
        f"optimizer = {made}"
    )
    parts = [
        f"# {one.title}",
        prose(one.summary),
        f"**When:** {prose(one.when)}",
        code(shown),
        section("What is kept", prose(one.kept)),
        section("Rounding", prose(one.rounding)),
        section("Bytes", _bytes(one)),
        section("The final loss", *_losses(one)),
        section("Refused", *_refused(one)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _made(rule: type[Any], one: Format, side: int = SIDE, **options: Any) -> Any:
    dtype = torch.bfloat16 if one.of_parameters else torch.float32
    return rule([nn.Parameter(torch.empty(side, side, dtype=dtype))], **one.options, **options)


def _bytes(one: Format) -> str:
    rows: list[list[str]] = []
    for rule, options in RULES.items():
        try:
            report = steprule.memory_report(_made(rule, one, **options))
        except ValueError:
            continue
        plain = steprule.memory_report(rule([nn.Parameter(torch.empty(SIDE, SIDE))], **options))
        rows.append(
            [
                f"[{rule.__name__}](../rules/{rule.__name__.lower()}.md)",
                f"{report.state_bytes / report.parameters:.3g}",
                f"{plain.state_bytes / plain.parameters:.3g}",
            ]
        )
    introduction = (
        "Bytes of state per element of a 1024 × 1024 matrix, beside those of fp32 parameters with fp32 state. "
        "The parameters themselves are not counted."
    )
    return "\n\n".join([introduction, table(["Rule", "So kept", "fp32"], rows, numbers_from=1)])


def _losses(one: Format) -> list[str]:
    """How far the final loss of each rule was from that in fp32, at most, over all tasks."""
    kept = f"bf16 {one.value}" if one.of_parameters else f"state {one.value}"
    rows: dict[str, dict[str, float]] = {}
    for _, _, results in measured.losses_in_fewer_bits():
        for row in results:
            if row["kept"] == kept:
                rows.setdefault(row["rule"], {})[row["task"]] = row["z"]
    if not rows:
        return []
    tasks = sorted({task for found in rows.values() for task in found})
    cells = [
        [f"`{rule}`", *(f"{found[x]:+.2f}" if x in found else "–" for x in tasks)]
        for rule, found in rows.items()
    ]
    introduction = (
        "How far the mean final loss on held-out data was from that of fp32, in units of fp32's own standard "
        "deviation over five seeds, for each task. Where and when it was measured: [Numbers](../numbers.md)."
    )
    if one.value == "int8":
        introduction += " Slots that refuse 8 bits were in bf16."
    return [introduction, table(["Rule", *(f"`{task}`" for task in tasks)], cells, numbers_from=1)]


def _refused(one: Format) -> list[str]:
    """Why some rules do not take it, in their own words, and which."""
    found: dict[str, list[str]] = {}
    for name, rule in steprule.catalogue().items():
        if not issubclass(rule, RuleOptimizer) or one.option not in rule.fields:
            found.setdefault("It has no such option.", []).append(name)
            continue
        try:
            _made(rule, one, 64)
        except ValueError as error:
            # Without the names of the rule and of the slot, which differ where the reason is the same.
            found.setdefault(_sentence(str(error).split(": ", 2)[-1]), []).append(name)
    rows = [[prose(reason), ", ".join(names)] for reason, names in found.items()]
    return [table(["What they say", "Rules"], rows)] if rows else []


def _sentence(text: str) -> str:
    return text if text.startswith("fp16") else text[:1].upper() + text[1:]
