"""The page of numbers: everything in benchmarks/results, as tables, with where and when it was measured."""

from __future__ import annotations

from pathlib import Path

from making import measured
from making.markdown import prose, section, table

__all__ = ["numbers_page"]

ROOT = Path(__file__).parents[2]
VARIANTS = {
    "steprule": "steprule",
    "steprule foreach": "foreach",
    "steprule reference": "loop",
    "torch for-loop": "torch for-loop",
    "torch foreach": "torch foreach",
    "torch fused": "torch fused",
    "steprule bf16 state": "bf16 state",
    "steprule int8 state": "int8 state",
}


def numbers_page() -> str:
    """The page."""
    introduction = (
        "Every table here is made from a file in `benchmarks/results` while this page is built. "
        "`benchmarks/README.md` says how each is measured. Measure your own machine with `steprule bench`."
    )
    parts = [
        "# Numbers",
        introduction,
        *_steps(),
        *_gpus(),
        *_on_hosts(),
        *_iterations(),
        *_matrices(),
        *_matrix_peers(),
        *_storage(),
        *_races(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _file(path: Path) -> str:
    return f"`{path.relative_to(ROOT)}`"


def _steps() -> list[str]:
    parts: list[str] = []
    for bench in measured.benches():
        shown = {
            key: name for key, name in VARIANTS.items() if any(key in x["step"] for x in bench.rules.values())
        }
        rows = [
            [
                f"`{name}`" if "+" in name else name,
                measured.ms(rule["floor"]["median"]),
                *(measured.ms(rule["step"].get(key, {}).get("ms", {}).get("median")) for key in shown),
            ]
            for name, rule in bench.rules.items()
        ]
        size = f"{bench.facts['numbers']:,} elements in {bench.facts['tensors']} tensors"
        title = f"### {bench.facts['model']}, {size}"
        facts = f"{_file(bench.path)}: {measured.facts_of(bench.facts)}, {bench.facts['repeats']} samples each."
        parts += [title, table(["Rule", "Floor", *shown.values()], rows, numbers_from=1), facts]
    introduction = (
        "Milliseconds of one step with parameters in fp32, medians. Floor: the bytes that an fp32 step must "
        "move, divided by the bandwidth measured alongside, which varies from moment to moment; a step below "
        "its floor means no more than that."
    )
    return [section("A step", introduction), *parts]


def _gpus() -> list[str]:
    parts: list[str] = []
    for path, facts in measured.steps_on_gpus():
        rows: list[list[str]] = []
        for row in facts["steps"]:
            options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
            what = f"{row['name']}, {options}" if options else row["name"]
            times, alone = row["step_ms"], row["kernels_ms"]
            torch_alone = next((x for key, x in alone.items() if key.startswith("torch")), None)
            cells = [times.get("steprule"), alone.get("steprule"), times.get("torch fused"), torch_alone]
            cells.append(times.get("torch foreach", times.get("torch")))
            rows.append([f"`{what}`", row["dtype"], *map(measured.ms, cells)])
        headings = [
            "Optimizer",
            "Parameters",
            "steprule",
            "kernels alone",
            "torch fused",
            "kernels alone",
            "torch",
        ]
        copied = f"A copy moves {facts['copy_gb_per_second']:,} GB/s there. {facts.get('note', '')}".strip()
        parts += [table(headings, rows, numbers_from=2), f"{_file(path)}: {measured.facts_of(facts)}. {copied}"]
    introduction = (
        "Milliseconds of one step on a GPU with the parameters of GPT-2 small (Muon: its 48 matrices), and "
        "what the kernels alone take. The last column is torch's default, which works on lists of tensors. "
        "Where a step takes longer than its kernels, the host is slower than the device; in training it runs "
        "ahead."
    )
    return [section("A step on a GPU", introduction, *parts)] if parts else []


def _on_hosts() -> list[str]:
    parts: list[str] = []
    for path, facts in measured.iterations_on_hosts():
        times = {(x["where"], x["state"]): x["ms"] for x in facts["iterations"]}
        kept = list(dict.fromkeys(state for _, state in times))
        rows = [
            [where.capitalize(), *(measured.ms(times.get((where, state))) for state in kept)]
            for where in dict.fromkeys(where for where, _ in times)
        ]
        parts += [table(["AdamW steps", *(f"{x} state" for x in kept)], rows, numbers_from=1)]
        parts += [f"{_file(path)}: {measured.facts_of(facts)}. {facts.get('note', '')}".strip()]
    introduction = (
        "Milliseconds of a training iteration of 12 transformer layers of width 768 on a GPU, in bf16 autocast "
        "with 8 × 1,024 tokens, with the optimizer's state on the GPU and in main memory."
    )
    return [section("State in main memory", introduction, *parts)] if parts else []


def _iterations() -> list[str]:
    """A training iteration, and the first step; the same small network whatever the model of the file."""
    rows: list[list[str]] = []
    files: list[str] = []
    for bench in measured.benches():
        if bench.path.parent.parent != measured.RESULTS:
            continue
        files.append(f"{_file(bench.path)}: {measured.facts_of(bench.facts)}.")
        for name, rule in bench.rules.items():
            times = {key: x["ms"]["median"] for key, x in rule["iteration"].items()}
            cells = [times.get(key) for key in ("steprule", "torch default", "torch fused")]
            first = [rule["first_step"]["cold"], rule["first_step"]["warm"]]
            rows.append([name, bench.facts["model"], *map(measured.ms, [*cells, *first])])
    introduction = (
        "Milliseconds of forward, backward and step of four 1024 × 1024 layers on 32 inputs, and of the first "
        "step in a new process, with an empty kernel cache and with a filled one."
    )
    headings = ["Rule", "Measured with", "steprule", "torch", "torch fused", "First step", "Cached"]
    return [
        section("A training iteration", introduction, table(headings, rows, numbers_from=2), "\\\n".join(files))
    ]


def _matrices() -> list[str]:
    parts: list[str] = []
    for path, facts, times in measured.matrix_times():
        whats = list(dict.fromkeys(what for _, what in times))
        sets = [name for name in measured.SETS if any(key[0] == name for key in times)]
        rows = [
            [measured.SETS[name], *(measured.ms(times.get((name, what))) for what in whats)] for name in sets
        ]
        parts += [table(["Matrices", *whats], rows, numbers_from=1)]
        parts += [f"{_file(path)}: {measured.facts_of(facts)}."]
    introduction = (
        "Milliseconds of one step of rules on whole matrices, beside the matrix products alone that five "
        "Newton-Schulz steps take."
    )
    return [section("Rules on whole matrices", introduction, *parts)] if parts else []


def _matrix_peers() -> list[str]:
    """Milliseconds by what was measured and by set, and for a step how many times its products that is."""
    parts: list[str] = []
    for path, content in measured.matrix_peers():
        found = {(row["what"], row["set"]): row for row in content["results"]}
        sets = [name for name in measured.SETS if any(key[1] == name for key in found)]
        rows: list[list[str]] = []
        for what in dict.fromkeys(what for what, _ in found):
            own = [found.get((what, name), {}) for name in sets]
            cells = [
                measured.ms(row.get("ms")) + (f" ({row['products']:.2f} ×)" if "products" in row else "")
                for row in own
            ]
            rows.append([what, *cells])
            if any("with_refreshes" in row for row in own):
                amortised = [measured.ms(row.get("with_refreshes")) for row in own]
                rows.append([f"{what}, with a refresh every {content['every']} steps", *amortised])
        versions = ", ".join(f"{package} {version}" for package, version in content["peers"].items())
        headings = ["Milliseconds", *(measured.SETS[name] for name in sets)]
        facts = [measured.facts_of(content["machine"]), *([versions] if versions else [])]
        parts += [table(headings, rows, numbers_from=1), f"{_file(path)}: {', '.join(facts)}."]
    introduction = (
        "One step of Muon and of SOAP between refreshes, and how many times the rule's matrix products alone "
        "that is. `benchmarks/matrix_peers.py` says with which options each ran, and in what they differ; "
        "heavyball ran without torch.compile, which it uses otherwise."
    )
    return [section("Muon and SOAP of other libraries", introduction, *parts)] if parts else []


def _storage() -> list[str]:
    """How far the final loss is from that in fp32, in standard deviations over seeds."""
    parts: list[str] = []
    for path, facts, results in measured.losses_in_fewer_bits():
        kept = [x for x in dict.fromkeys(row["kept"] for row in results) if x != "fp32"]
        far = {(row["rule"], row["kept"]): f"{row['z']:+.2f}" for row in results}
        rules = dict.fromkeys(row["rule"] for row in results)
        rows = [[rule, *(far.get((rule, x), "–") for x in kept)] for rule in rules]
        parts += [f"### {results[0]['task']}", table(["Rule", *kept], rows, numbers_from=1)]
        parts += [f"{_file(path)}: {measured.facts_of(facts)}."]
    introduction = (
        "How far the mean final loss on held-out data is from that of fp32, in units of fp32's own standard "
        "deviation over five seeds. State formats train fp32 parameters; the others train bf16 parameters. "
        "With `state int8`, slots that refuse 8 bits are in bf16. A rule with other weights to evaluate with, "
        "such as an average, is evaluated with these."
    )
    return [section("The final loss in fewer bits", introduction, *parts)] if parts else []


def _races() -> list[str]:
    parts: list[str] = []
    for path, race in measured.races():
        verdict = race.verdict
        if verdict is None:
            continue
        rows = [
            [
                entry.label,
                ", ".join(f"{name} {value:g}" for name, value in entry.standing.setting.items()),
                f"{entry.standing.loss:.3g}",
                " – ".join(f"{x:.3g}" for x in entry.standing.interval),
                f"{entry.standing.state_bytes_per_element:.3g}",
            ]
            for entry in race.entries
            if entry.standing is not None and entry.standing.loss is not None and entry.standing.interval
        ]
        headings = ["Optimizer", "Setting", "Final loss", "95 % interval", "Bytes of state per element"]
        parts += [f"### {race.plan.task}", " ".join(map(prose, verdict.sentences))]
        parts += [table(headings, rows, numbers_from=1)]
        parts += [f"```{{raw}} html\n{measured.learning_rate_chart(race)}\n```"]
        parts += [
            "\n".join(f"- {prose(note)}" for note in verdict.notes),
            f"{_file(path)}: `{race.plan.command}`",
        ]
    return [section("Races", *parts)] if parts else []
