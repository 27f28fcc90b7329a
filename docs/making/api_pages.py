"""The reference: every public function and class that has no page of its own, from its docstring."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterable
from typing import Any

from making.markdown import code, prose

import steprule
from steprule import groups, lab, schedules, words
from steprule.matrix import words as matrix_words

__all__ = ["api_pages"]

METHODS = (
    *("step", "zero_grad", "add_param_group", "init_state", "state_dict", "load_state_dict", "explain"),
    *("train", "eval", "averaged_weights", "update_hessian", "climb", "metrics", "to"),
    *("offload_state", "reload_state"),
)


def api_pages() -> dict[str, str]:
    """The pages by file name, and a page that lists them."""
    pages = {
        "optimizers": _page("Every optimizer", _ABOUT["optimizers"], _methods()),
        "making": _page("Make and inspect optimizers", _ABOUT["making"], _named(steprule, MAKING)),
        "checkpoints": _page("Checkpoints", _ABOUT["checkpoints"], _named(steprule, CHECKPOINTS)),
        "groups": _page("Parameter groups", _ABOUT["groups"], [*_named(groups, ["build", "Groups"])]),
        "schedules": _page("Schedules", _said(schedules), _named(schedules, schedules.__all__)),
        "rules": _page("Write a rule", _ABOUT["rules"], _named(steprule, WRITING)),
        "words": _page("Words of rules", _said(words), _named(words, _lower(words.__all__))),
        "matrix_words": _page("Words on whole matrices", _said(matrix_words), _of_module(matrix_words)),
        "lab": _page("The lab in Python", _said(lab), _named(lab, lab.__all__)),
    }
    tree = "\n".join(["```{toctree}", ":maxdepth: 1", "", *pages, "```"])
    introduction = (
        "Rules, modifiers and storage formats have pages of their own: [Rules](../rules/index.md), "
        "[Modifiers](../modifiers/index.md), [Storage formats](../formats/index.md)."
    )
    return {**pages, "index": "\n\n".join(["# API reference", introduction, tree]) + "\n"}


MAKING = ("create", "find", "describe", "catalogue", "modifier_catalogue", "explain", "memory_report")
MAKING += ("split", "audit", "hutchinson", "step_in_backward", "StepInBackward", "shard_state", "state_on_host")
CHECKPOINTS = ("save_checkpoint", "load_checkpoint", "convert_state", "LoadReport")
WRITING = ("Elementwise", "Matrix", "Modifier", "GenericAdaptiveOptimizer")
WRITING += ("hyper", "decay", "slot", "scalar_slot", "WeightDecay")
_ABOUT = {
    "optimizers": "What every optimizer of steprule has, beside what `torch.optim.Optimizer` has.",
    "making": "Make an optimizer by name or of two rules, and see what it does.",
    "checkpoints": "Save, load and convert; `load_state_dict` is with [every optimizer](optimizers.md).",
    "groups": "Sort the parameters of a model into groups by pattern, by kind and by depth.",
    "rules": "What a rule, a modifier and their fields are declared with.",
}


def _page(title: str, about: str, parts: Iterable[str]) -> str:
    return "\n\n".join([f"# {title}", about, *parts]) + "\n"


def _lower(names: Iterable[str]) -> list[str]:
    return [name for name in names if name[0].islower()]


def _of_module(module: Any) -> list[str]:
    names = [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__ and name[0].islower() and value.__doc__
    ]
    return _named(module, names)


def _methods() -> list[str]:
    parts: list[str] = []
    for name in METHODS:
        method = getattr(steprule.Elementwise, name)
        module = inspect.getmodule(inspect.unwrap(method))
        # What torch documents is left to torch.
        if module is not None and module.__name__.startswith("steprule"):
            parts.append(_entry(name, method))
    return parts


def _named(module: Any, names: Iterable[str]) -> list[str]:
    return [_entry(name, getattr(module, name)) for name in names]


def _entry(name: str, what: Any) -> str:
    """The heading, the signature, the docstring, and of a class the methods that it has beside it."""
    parts = [f"## {name}"]
    if callable(what):
        parts.append(code(f"{name}{_signature(what)}"))
    parts.append(_documented(what))
    if inspect.isclass(what) and what.__name__ in ("StepInBackward", "Logger", "Groups"):
        own = {key: value for key, value in vars(what).items() if key[0] != "_" and callable(value)}
        parts += [f"{code(key + _signature(value))}\n\n{_documented(value)}" for key, value in own.items()]
    return "\n\n".join(part for part in parts if part)


def _signature(what: Any) -> str:
    """The arguments without their types, which the text tells."""
    try:
        found = inspect.signature(what)
    except ValueError:
        return "(…)"
    plain = [
        one.replace(annotation=inspect.Parameter.empty, default=_Shown.of(one.default))
        for name, one in found.parameters.items()
        if name != "self" and not name.startswith("_")
    ]
    text = str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    if len(text) <= 80:
        return text
    return "(\n" + "".join(f"    {one},\n" for one in map(str, plain) if one != "*") + ")"


class _Shown(str):
    """A default that is shown by its name."""

    __slots__ = ()

    @staticmethod
    def of(default: Any) -> Any:
        """The default itself, unless it is a class."""
        is_kind = inspect.isclass(default) and default is not inspect.Parameter.empty
        return _Shown(default.__name__) if is_kind else default

    def __repr__(self) -> str:
        return str(self)


def _said(module: Any) -> str:
    return _markdown(inspect.getdoc(module) or "")


def _documented(what: Any) -> str:
    """A docstring; the arguments that it tells about begin points of a list."""
    target = what.__init__ if inspect.isclass(what) else what
    try:
        names = tuple(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        names = ()
    return _markdown(inspect.getdoc(what) or "", names)


def _markdown(docstring: str, names: tuple[str, ...] = ()) -> str:
    """A docstring as Markdown: what is indented is code."""
    text = docstring.partition("\nArgs:\n")[0].strip("\n")
    blocks: list[str] = []
    for is_code, lines in itertools.groupby(text.splitlines(), _Kinds()):
        block = "\n".join(lines)
        if is_code and block.strip():
            dedented = textwrap.dedent(block)
            blocks.append(code(dedented, _language(dedented)))
        elif not is_code:
            blocks += [_paragraph(part, names) for part in re.split(r"\n\n+", block.strip("\n")) if part]
    return "\n\n".join(blocks)


class _Kinds:
    """Tells code from prose, line by line: empty lines and answers of a session go with what is above."""

    def __init__(self) -> None:
        self.code = False

    def __call__(self, line: str) -> bool:
        session = line.startswith(">>>") or (self.code and self._session and bool(line.strip()))
        self._session = session
        if line.strip():
            self.code = session or (line.startswith("    "))
        return self.code

    _session = False


def _paragraph(text: str, names: tuple[str, ...]) -> str:
    lines = text.splitlines()
    if lines[0].startswith("|"):
        return text
    if lines[0].startswith("* "):
        return "\n".join(f"* {prose(x[2:])}" if x.startswith("* ") else f"  {prose(x.strip())}" for x in lines)
    joined = prose(" ".join(lines))
    joined = re.sub(r"(^|(?<=\. ))(Raises|When): ", r"\n\n**\2:** ", joined)
    known = "|".join(name for name in names if name not in ("self", "args", "kwargs"))
    if known:
        point = rf"(^|(?<=[.)\"\]] ))((?:{known})(?:, (?:{known}))*): "
        joined = re.sub(point, lambda found: f"\n- {_as_code(found[2])}: ", joined)
    return joined.strip()


def _language(text: str) -> str:
    if ">>>" in text:
        return "pycon"
    try:
        ast.parse(text)
    except SyntaxError:
        return "text"
    return "python"


def _as_code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))
