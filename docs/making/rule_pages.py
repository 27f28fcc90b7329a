"""One page for each rule and each modifier, from what it says about itself and from what was measured."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from making import listings, measured
from making.markdown import code, folded, prose, section, table
from torch import nn

import steprule
from steprule.catalogue import PRESETS, Description, HyperParameter
from steprule.engine.rule import FLAGS, OPTIONS, RuleOptimizer

__all__ = ["modifier_pages", "rule_pages"]

ROOT = Path(__file__).parents[2]
SIDE = 1024
# Where rules and modifiers stand. Words have a page of their own.
FOLDERS = ("steprule.elementwise.", "steprule.modifiers.")
# Tutorials on one rule.
TUTORIALS = {
    "AdaBelief": "[AdaBelief's first five steps](../tutorials/what-it-holds.md#adabeliefs-first-five-steps)",
    "LBFGS": "[Closures and L-BFGS](../tutorials/closures.md)",
    "Muon": "[Muon and AdamW](../tutorials/muon.md)",
}
STORAGES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"state_dtype": "bf16"},
    "int8": {"state_dtype": "int8"},
}


def rule_pages() -> dict[str, str]:
    """The pages of all rules and presets by file name, and a page that lists them."""
    rules = steprule.catalogue()
    pages = {name.lower(): _rule_page(rule) for name, rule in rules.items()}
    pages |= {name: _preset_page(name) for name in PRESETS}
    kinds = {
        "Rules on single elements": [x for x, rule in rules.items() if ".elementwise." in rule.__module__],
        "Rules on whole matrices": [x for x, rule in rules.items() if ".matrix." in rule.__module__],
        "Rules that call the loss again": [x for x, rule in rules.items() if ".closure." in rule.__module__],
        "Presets": list(PRESETS),
    }
    parts = [section(heading, _list_of(names)) for heading, names in kinds.items()]
    introduction = (
        "What each rule says about itself, with the program and the kernels that are made of it. *State* is "
        "the number of values that are kept for each element of a matrix, with the default values."
    )
    return {**pages, "index": _joined("# Rules", introduction, *parts, _tree(sorted(pages)))}


def modifier_pages() -> dict[str, str]:
    """The same of all modifiers."""
    modifiers = steprule.modifier_catalogue()
    pages = {name: _modifier_page(kind) for name, kind in modifiers.items()}
    introduction = (
        "A modifier is added to a rule: `AdamW(model, modifiers=[Cautious()])`, or `adamw+cautious` in a name. "
        "*State* is the number of values that it keeps for each element."
    )
    return {
        **pages,
        "index": _joined("# Modifiers", introduction, _list_of(list(modifiers)), _tree(sorted(pages))),
    }


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _tree(names: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", "", *names, "```"])


def _list_of(names: list[str]) -> str:
    rows: list[list[str]] = []
    for name in names:
        about = steprule.describe(name)
        page = name.lower()
        rows.append([f"[{about.name}]({page}.md)", prose(about.summary), f"{about.numbers_per_parameter:g}"])
    return table(["Name", "What it does", "State"], rows, numbers_from=2) if rows else ""


# Rules


def _rule_page(rule: type[Any]) -> str:
    about = steprule.describe(rule)
    found = listings.listings_of(rule)
    return _joined(
        f"# {about.name}",
        prose(about.summary),
        _when(about),
        code(f"from steprule import {about.name}\n\noptimizer = {_made(rule)}"),
        _formula(about),
        f"Step by step: {TUTORIALS[about.name]}." if about.name in TUTORIALS else "",
        section("Hyper-parameters", _hyper_table(about), _shared(about)),
        section("State", prose(about.state), _state_table(rule)),
        section("Differences", _differs(about), _torch_defaults(rule)),
        section("The rule", _source(rule)),
        _listings(found),
        _measured(about.name),
        _measured_on_matrices(about.name),
        _race(about.name),
        section("Source", prose(about.source)),
    )


def _made(rule: type[Any]) -> str:
    lr = next((x for x in steprule.describe(rule).hyperparameters if x.name == "lr"), None)
    return f"{rule.__name__}(model)" if lr is None else f"{rule.__name__}(model, lr={lr.default})"


def _when(about: Description) -> str:
    return f"**When:** {prose(about.when)}" if about.when else ""


def _differs(about: Description) -> str:
    """What docstrings say after "Differs:", as a sentence."""
    text = about.differs
    if text.startswith("from "):
        return prose(f"It differs {text}")
    # The names of libraries begin with a small letter.
    return prose(text if text.startswith(("torch", "optax", "timm")) else text[:1].upper() + text[1:])


def _formula(about: Description) -> str:
    return section("Formula", f"```{{formula}}\n{about.formula}\n```") if about.formula else ""


def _hyper_table(about: Description) -> str:
    own = [x for x in about.hyperparameters if x.name not in (*FLAGS, *OPTIONS)]
    rows = [[f"`{x.name}`", f"`{x.default}`", prose(x.allowed), _search(x), prose(x.meaning)] for x in own]
    return table(["Name", "Default", "Allowed", "Search range", "Meaning"], rows) if rows else ""


def _search(hyper: HyperParameter) -> str:
    return "" if hyper.search is None else f"{hyper.search[0]:g} – {hyper.search[1]:g}"


def _shared(about: Description) -> str:
    shared = [f"`{x.name}={x.default}`" for x in about.hyperparameters if x.name in (*FLAGS, *OPTIONS)]
    return "\n\n".join(["Options that it shares with other rules:", ", ".join(shared)]) if shared else ""


def _state_table(rule: type[Any]) -> str:
    """Bytes of state per element of a matrix, for each way to keep it."""
    if ".closure." in rule.__module__:
        return ""
    rows: list[list[str]] = []
    for name, options in STORAGES.items():
        if options and "state_dtype" not in rule.fields:
            continue
        try:
            optimizer = rule([nn.Parameter(torch.empty(SIDE, SIDE))], **options)
        except ValueError as error:
            rows.append([name, "–", prose(str(error))])
            continue
        report = steprule.memory_report(optimizer)
        slots = ", ".join(f"`{row.entry} {row.kept_as.removeprefix('torch.')}`" for row in report.rows)
        rows.append([name, f"{report.state_bytes / report.parameters:.3g}", slots])
    headings = ["Kept in", "Bytes per element", "State of a 1024 × 1024 matrix"]
    return table(headings, rows)


def _torch_defaults(rule: type[Any]) -> str:
    """Which defaults are not those of the class of the same name in torch.optim."""
    theirs = getattr(torch.optim, rule.__name__, None)
    if theirs is None:
        return ""
    known = inspect.signature(theirs).parameters
    other = [
        [f"`{field.name}`", f"`{field.default}`", f"`{known[field.name].default}`"]
        for field in rule.fields.values()
        if field.name in known and known[field.name].default != field.default
    ]
    if not other:
        return "Arguments, defaults and the keys of checkpoints are those of torch.optim."
    return "Other defaults than in torch.optim:\n\n" + table(["Name", "Here", "torch.optim"], other)


def _reading(kind: type[Any]) -> str:
    """What the names in a method are."""
    change = ", `u` the change that the rule makes" if issubclass(kind, steprule.Modifier) else ""
    words = "[Words of rules](../api/words.md)"
    if ".matrix." in kind.__module__:
        words += " and [words on whole matrices](../api/matrix_words.md)"
    explain = "explain" if ".matrix." in kind.__module__ else "explains"
    return (
        "`h` are the hyper-parameters, `p` is the parameter (θ in the formula), `g` its gradient"
        f"{change}, `s` are the slots, and `t` is the number of the step, from 1. {words} {explain} `ema`, "
        "`sqrt` and the others."
    )


def _source(kind: type[Any]) -> str:
    """The class without its docstring, and what it uses: of its file, and functions of other rules' files."""
    parts = [_reading(kind)] if issubclass(kind, (RuleOptimizer, steprule.Modifier)) else []
    todo = [(kind.__module__, kind.__name__)]
    for module, name in todo:
        file = Path(inspect.getfile(import_module(module))).resolve()
        lines = file.read_text(encoding="utf-8").splitlines()
        tree = ast.parse("\n".join(lines))
        wanted = _needed(tree, name)
        shown = [_text(lines, node) for node in tree.body if _name(node) in wanted]
        parts += [f"`{file.relative_to(ROOT)}`", code("\n\n\n".join(shown))]
        todo += [x for x in _imported(tree, wanted) if x not in todo]
    return "\n\n".join(parts)


def _needed(tree: ast.Module, name: str) -> set[str]:
    """The names in a file that a class or a function uses, and those that they use."""
    nodes = {_name(node): node for node in tree.body if _name(node)}
    found: set[str] = set()
    todo = [name]
    while todo:
        one = todo.pop()
        found.add(one)
        todo += [x for x in _used(nodes[one]) & nodes.keys() if x not in found]
    return found


def _used(node: ast.AST) -> set[str]:
    return {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}


def _imported(tree: ast.Module, wanted: set[str]) -> list[tuple[str, str]]:
    """The functions of other rules' files that are used: module and name."""
    used = set[str]().union(*(_used(node) for node in tree.body if _name(node) in wanted))
    return [
        (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(FOLDERS)
        for alias in node.names
        if alias.name in used and inspect.isfunction(getattr(import_module(node.module), alias.name))
    ]


def _name(node: ast.stmt) -> str:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return target.id if isinstance(target, ast.Name) else ""


def _text(lines: list[str], node: Any) -> str:
    """A piece of a file with the comment above it; of a class, the page has the docstring already."""
    first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])
    while first > 1 and lines[first - 2].startswith("#"):
        first -= 1
    body = lines[first - 1 : node.end_lineno]
    if isinstance(node, ast.ClassDef) and ast.get_docstring(node):
        said = node.body[0]
        start, end = said.lineno - first, (said.end_lineno or 0) - first
        after = body[end + 1 :]
        body = [*body[:start], *(after[1:] if after and not after[0].strip() else after)]
    return "\n".join(body).rstrip()


def _listings(found: listings.Listings) -> str:
    parts = [
        folded("The traced program", code(found.program, "text")) if found.program else "",
        folded("The CPU kernel, for fp32", code(found.cpu)) if found.cpu else "",
        folded("The GPU kernel, for fp32", code(found.gpu)) if found.gpu else "",
    ]
    introduction = (
        "The rule is traced once into a list of words, which every runner follows. `r` are values per element, "
        "`s` and `c` plain numbers."
    )
    return section("What it becomes", introduction, *parts) if any(parts) else ""


# Measurements


def _measured(name: str) -> str:
    latest: dict[tuple[str, str], measured.Bench] = {}
    for bench in sorted(measured.benches(), key=lambda bench: bench.facts["date"]):
        if name in bench.rules:
            latest[bench.facts["processor"], bench.facts["model"]] = bench
    rows: dict[str, list[list[str]]] = {}
    for bench in sorted(latest.values(), key=lambda bench: -bench.facts["numbers"]):
        rows.setdefault(measured.facts_of(bench.facts), []).append(_bench_row(bench, bench.rules[name]))
    introduction = (
        "Milliseconds of one step, parameters in fp32, medians. Floor: the bytes that an fp32 step must move, "
        "divided by the bandwidth measured alongside. torch: the fastest of its for-loop, foreach and fused."
    )
    headings = ["Model", "Elements", "steprule", "Floor", "torch", "bf16 state", "int8 state"]
    parts = [f"{table(headings, cells, numbers_from=1)}\n\n*{facts}*" for facts, cells in rows.items()]
    if not parts:
        return ""
    return section("Measured", introduction, *parts, "What else was measured: [Numbers](../numbers.md).")


def _measured_on_matrices(name: str) -> str:
    parts: list[str] = []
    for _, facts, times in measured.matrix_times():
        if not any(what == name for _, what in times):
            continue
        whats = ["products", name, f"{name} int8", "torch Muon"]
        rows = [
            [measured.SETS[which], *(measured.ms(times.get((which, what))) for what in whats)]
            for which in measured.SETS
            if (which, name) in times
        ]
        headings = ["Matrices", "Products alone", name, "int8 state", "torch.optim.Muon"]
        parts += [table(headings, rows, numbers_from=1), f"*{measured.facts_of(facts)}*"]
    introduction = (
        "Milliseconds of one step, parameters in fp32, medians, beside the matrix products alone that five "
        "Newton-Schulz steps take."
    )
    return section("Measured", introduction, *parts) if parts else ""


def _bench_row(bench: measured.Bench, rule: dict[str, Any]) -> list[str]:
    times = {key: step["ms"]["median"] for key, step in rule["step"].items()}
    theirs = [value for key, value in times.items() if key.startswith("torch")]
    return [
        f"`{bench.facts['model']}`",
        f"{bench.facts['numbers']:,}",
        measured.ms(times["steprule"]),
        measured.ms(rule["floor"]["median"]),
        measured.ms(min(theirs, default=None)),
        measured.ms(times.get("steprule bf16 state")),
        measured.ms(times.get("steprule int8 state")),
    ]


def _race(name: str) -> str:
    parts: list[str] = []
    for path, race in measured.races():
        chart = measured.learning_rate_chart(race)
        if chart and any(entry.label == name for entry in race.entries):
            file = path.relative_to(ROOT)
            parts += [f"```{{raw}} html\n{chart}\n```", f"Task {race.plan.task}: `{file}`."]
    introduction = (
        "Final loss of every training of a race against its learning rate. Filled: chosen; in a ring: the "
        "default; faint: stopped early; cross: diverged."
    )
    return section("Learning rate", introduction, *parts) if parts else ""


# Presets and modifiers


def _preset_page(name: str) -> str:
    about = steprule.describe(name)
    made = f'import steprule\n\noptimizer = steprule.create("{name}", model)'
    return _joined(
        f"# {name}",
        prose(about.summary),
        _when(about),
        code(made),
        section("What it stands for", code(about.formula, "text")),
        section("Hyper-parameters", _hyper_table(about), _shared(about)),
        section("State", prose(about.state)),
        section("Differences", _differs(about)),
        section("Source", prose(about.source)),
    )


def _modifier_page(kind: type[steprule.Modifier]) -> str:
    about = steprule.describe(kind)
    refused = [[f"`{name}`", prose(why)] for name, why in kind.not_with.items()]
    made = f"from steprule import AdamW, {about.name}\n\noptimizer = AdamW(model, modifiers=[{about.name}()])"
    return _joined(
        f"# {about.name}",
        prose(about.summary),
        _when(about),
        code(made),
        _formula(about),
        section("Hyper-parameters", _hyper_table(about)),
        section("State", prose(about.state)),
        section("Not with", table(["Name", "Why"], refused) if refused else ""),
        section("Differences", _differs(about)),
        section("The modifier", _source(kind)),
        _listings(listings.listings_with(kind)),
        _measured(f"AdamW+{kind.name}"),
        section("Source", prose(about.source)),
    )
