"""`kvprism eval`: run a task with progress, print one table a cell, write rows."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kvprism.commands import console
from kvprism.commands.options import EvaluationOptions, names
from kvprism.errors import BadInput
from kvprism.evaluate.arms import RAW, Arm, SavedProfile, arms_of
from kvprism.evaluate.longbench import LongBench
from kvprism.evaluate.longbench_data import TASKS as LONGBENCH
from kvprism.evaluate.longbench_data import read_task
from kvprism.evaluate.measure import LoadedModel
from kvprism.evaluate.needle import Needle
from kvprism.evaluate.perplexity import Perplexity
from kvprism.evaluate.records import Task, collect, load_records
from kvprism.evaluate.recovery import Recovery, recoveries
from kvprism.evaluate.rows import Row, write_rows
from kvprism.evaluate.ruler import SUBTASKS, Ruler
from kvprism.evaluate.summary import Comparison, compare, rows_of
from kvprism.evaluate.texts import read_text
from kvprism.evictions import Protection
from kvprism.integrations.hf import load_config, shape_of
from kvprism.planning import PlanOptions, code_of
from kvprism.policies import POLICIES
from kvprism.retention import Decode, Retention, parse_tokens, phase_of
from kvprism.routes import FULL


class Heading(NamedTuple):
    """How a metric is shown: its name, the scale of its values, scale and unit of its changes."""

    text: str
    scale: float = 1
    change_scale: float = 1
    change_unit: str = ""

    def change(self, delta: float) -> str:
        return f"{_signed(self.change_scale * delta)}{self.change_unit}"

    def interval(self, low: float, high: float) -> str:
        bounds = (_signed(self.change_scale * bound) for bound in (low, high))
        return f"[{', '.join(bounds)}]"


def _signed(value: float) -> str:
    return f"{value:+.0f}" if abs(value) >= 1000 else f"{value:+.3g}"


HEADINGS = {
    "perplexity": Heading("perplexity", change_scale=100, change_unit=" %"),
    "kl_mean": Heading("KL to raw x1000", 1000, 1000),
    "kl_p99": Heading("KL p99 x1000", 1000, 1000),
    "top1_flips_per_1000": Heading("top-1 flips /1000"),
    "exact_match": Heading("exact match %", 100, 100),
    "digit_nll": Heading("digit NLL"),
    "answers_right": Heading("answers right %", 100, 100),
    "answer_nll": Heading("answer NLL"),
    "score": Heading("score", 100, 100),
}
HIGHER_IS_BETTER = {"exact_match", "answers_right", "score"}
SIGNIFICANT = 0.05


def parse_arms(given: EvaluationOptions) -> tuple[Arm, ...]:
    """The arms that the command line names.

    Raises:
        UnknownName: no such policy, importance or codec.
        BadInput: a budgeted policy and no budget, a file that is no profile, or protected tokens
            that are no two numbers.
        Unsupported: a policy that does not evict while tokens are generated.
        ProfileMismatch: a profile that was edited, of another version, or without a route that a
            decode phase follows.
    """
    protection = None if given.protect is None else Protection.parse(given.protect)
    options = PlanOptions(
        importance=given.importance, codec=given.codec, seed=given.seed, protection=protection
    )
    saved = None if given.profile is None else SavedProfile.named(given.profile)
    decode = decode_phases(given.decode_policy, given.decode_budget, saved)
    return arms_of(names(given.policy), names(given.budget), options, saved, decode)


def decode_phases(
    policies: str | None, budget: str | None, saved: SavedProfile | None = None
) -> list[Decode]:
    """`full,h2o,polykv` at `256tok`, which is not for `full`; errors as `parse_arms`."""
    names = [name.strip() for name in (policies or FULL).split(",")]
    if budget is not None and set(names) == {FULL}:
        raise BadInput(f"--decode-budget {budget} without a --decode-policy that evicts, like h2o")
    return [_decode_phase(name, None if name == FULL else budget, saved) for name in names]


def _decode_phase(name: str, budget: str | None, saved: SavedProfile | None) -> Decode:
    if name not in POLICIES or not POLICIES[name].routed:
        return Retention.parse(name, budget)
    if budget is None:
        raise BadInput(f"decode-phase policy {name!r} needs a budget such as 256tok, got none")
    routes = () if saved is None else saved.profile.routes
    return phase_of(routes, name, parse_tokens(budget))


def run_perplexity(model: str, text: Path, **settings: Any) -> Perplexity:
    """The task that `kvprism eval perplexity` asks for."""
    read_text(text)  # an unreadable file is found before the model is loaded
    return Perplexity(_loaded(model, settings["arms"]), text, **settings)


def run_needle(model: str, **settings: Any) -> Needle:
    """The task that `kvprism eval needle` asks for."""
    return Needle(_loaded(model, settings["arms"]), **settings)


def run_ruler(model: str, tasks: str | None, **settings: Any) -> Ruler:
    """The task that `kvprism eval ruler` asks for; tasks: names with commas between them."""
    names = list(SUBTASKS) if tasks is None else [name.strip() for name in tasks.split(",")]
    for name in names:  # an unknown one is found before the model is loaded
        SUBTASKS[name]
    return Ruler(_loaded(model, settings["arms"]), subtasks=names, **settings)


def run_longbench(
    model: str, data: str, tasks: str | None, dtype: str, device: str, **settings: Any
) -> LongBench:
    """The task that `kvprism eval longbench` asks for; tasks: names with commas between them."""
    names = list(LONGBENCH) if tasks is None else [name.strip() for name in tasks.split(",")]
    read_task(data, names[0])  # data that is not there is found before the model is loaded
    subject = _loaded(model, settings["arms"], dtype=dtype, device=device)
    return LongBench(subject, data=data, tasks=names, **settings)


def _loaded(name: str, arms: Sequence[Arm], **placed: str) -> LoadedModel:
    """The model, once its arms have what they need of the profile; placed: as `LoadedModel.load`.

    Raises:
        ProfileMismatch: a profile of another model, or one that lacks what an arm needs.
    """
    with console.status(f"loading {name}"):
        shape = shape_of(load_config(name), 1)
        for arm in arms:
            code_of(shape, arm.policy, arm.options, arm.profile)
        subject = LoadedModel.load(name, **placed)
    for profile in {arm.profile for arm in arms if arm.profile is not None}:
        profile.check(bytes.fromhex(subject.fingerprint))
    return subject


RUNS: dict[str, Callable[..., Task]] = {
    "perplexity": run_perplexity,
    "needle": run_needle,
    "ruler": run_ruler,
    "longbench": run_longbench,
}


def evaluate_and_show(name: str, settings: dict[str, Any], options: EvaluationOptions) -> None:
    """Measure what is missing of the task `name`, print a table per cell, and write the rows."""
    arms = parse_arms(options)
    task = RUNS[name](arms=arms, seed=options.seed, cache_dtype=options.cache_dtype, **settings)
    with console.progress(f"{task.header.task} on {task.header.model}") as advance:
        measured = collect(task, options.records, advance)
    rows = rows_of(measured)
    show_rows(rows)
    if options.json is not None:
        write_rows(options.json, rows)


def load_and_show(records: Sequence[Path], json: Path | None) -> None:
    """The same from record files, whatever they hold so far."""
    rows = [row for path in records for row in rows_of(load_records(path))]
    show_rows(rows)
    if json is not None:
        write_rows(json, rows)


def show_rows(rows: Sequence[Row]) -> None:
    """One table per cell: an arm a line, intervals below its figures."""
    for cell, group in groupby(rows, _cell):
        arms = [list(arm) for _, arm in groupby(group, _name)]
        first = arms[0][0]
        title = f"{first.task}{_protocol(first)}: {cell}, n = {first.n}"
        columns = ["arm", "of 16-bit", *(HEADINGS[row.metric].text for row in arms[0])]
        measured = [arm for arm in arms if arm[0].value is not None]
        console.table(title, columns, map(_line, measured))
        for arm in arms:
            if arm[0].value is None:
                console.say(f"{_name(arm[0])}: infeasible, {arm[0].reason}")
            elif not arm[0].fixed_rate and _whole(arm[0]):
                console.say(f"{_name(arm[0])}: no compression, the budget is all of the cache")
    console.say("Below each figure: the 95 % interval of its change from raw, by document.")


def _whole(row: Row) -> bool:
    """Whether what was sent is as large as the cache itself: every token, as it is."""
    return row.fraction_native is not None and row.fraction_native >= 1


def _cell(figure: Row | Comparison | Recovery) -> str:
    # LongBench's prompts are as long as they are, and only the longest are cut.
    cell = f"{'up to ' if figure.task == 'longbench' else ''}{figure.length} tokens"
    if figure.distractors is not None:
        cell += f", {figure.distractors} distractors"
    return cell if figure.subtask is None else f"{cell}, {figure.subtask}"


def _protocol(figure: Row | Comparison | Recovery) -> str:
    parts = ["query-aware"] if figure.query_aware else []
    if figure.protection is not None:
        parts.append(f"protecting {figure.protection}")
    return f" ({', '.join(parts)})" if parts else ""


def _line(arm: list[Row]) -> list[str]:
    assert arm[0].fraction is not None
    return [_name(arm[0]), console.percent(arm[0].fraction), *(_figure(row) for row in arm)]


def _name(row: Row) -> str:
    budget = "" if row.budget is None else f" {row.budget}"
    decode = "" if row.decode is None else f", decode {row.decode}"
    return f"{row.policy}{budget}{_code(row.codec)}{decode}"


def _code(codec: str) -> str:
    return "" if codec == "nested" else f" ({codec})"


def _figure(row: Row) -> str:
    """A value, and below it the interval of its change from raw."""
    assert row.value is not None and row.ci_low is not None and row.ci_high is not None
    heading = HEADINGS[row.metric]
    value = f"{heading.scale * row.value:.4g}"
    if row.policy == RAW and row.decode is None:
        return value
    return f"{value}\n{heading.interval(row.ci_low, row.ci_high)}{heading.change_unit}"


def show_comparisons(comparisons: Sequence[Comparison]) -> None:
    """One table per task and metric: a policy against others on the same documents."""
    for _, found in groupby(comparisons, _table):
        group = list(found)
        first = group[0]
        parts = [name for name, _ in _parts(first)]
        columns = ["at", "from", "of 16-bit", *parts, "n", "difference", "95 % interval", "Holm p"]
        title = (
            f"{first.task}{_protocol(first)}, {HEADINGS[first.metric].text}: "
            f"{first.policy}{_code(first.codec)} against others, paired by document"
        )
        measured = [comparison for comparison in group if comparison.delta is not None]
        console.table(title, [*columns, "verdict"], map(_comparison_line, measured))
    console.say(f"A verdict needs a Holm-adjusted p below {SIGNIFICANT} in its table.")
    for note in dict.fromkeys(note for c in comparisons for note in _notes(c)):
        console.say(note)


def _table(c: Comparison) -> tuple[object, ...]:
    """What a table of comparisons has in common; in the order of the tables."""
    return c.task, c.query_aware, c.protection, list(HEADINGS).index(c.metric)


def _parts(c: Comparison) -> list[tuple[str, str]]:
    """Columns that say which cell it is."""
    parts = [("tokens", c.length), ("distractors", c.distractors), ("subtask", c.subtask)]
    return [(name, str(part)) for name, part in parts if part is not None]


def _comparison_line(c: Comparison) -> list[str]:
    assert c.delta is not None and c.ci_low is not None and c.ci_high is not None
    heading = HEADINGS[c.metric]
    return [
        ("fixed" if c.budget is None else str(c.budget)) + (f", {c.decode}" if c.decode else ""),
        _versus(c),
        "" if c.versus_fraction is None else console.percent(c.versus_fraction),
        *(part for _, part in _parts(c)),
        str(c.n),
        heading.change(c.delta),
        heading.interval(c.ci_low, c.ci_high),
        "" if c.p_holm is None else f"{c.p_holm:.4f}",
        _verdict(c),
    ]


def _versus(c: Comparison) -> str:
    budget = "" if c.versus_budget is None else f" {c.versus_budget}"
    return f"{c.versus}{budget}{_code(c.versus_codec)}"


def _verdict(c: Comparison) -> str:
    """Whether the first policy is better or worse; `open` where the data does not say."""
    if c.not_ranked:
        return "not ranked"
    if c.delta is None or c.p_holm is None or c.p_holm >= SIGNIFICANT:
        return "open"
    return "better" if (c.delta > 0) == (c.metric in HIGHER_IS_BETTER) else "worse"


def _notes(c: Comparison) -> Iterator[str]:
    if c.not_ranked:
        yield f"not ranked: {_cell(c)}: {c.not_ranked}"
    if c.reason:
        yield f"infeasible: {_cell(c)}: {c.policy} {c.budget} from {_versus(c)}: {c.reason}"


def compare_and_show(
    records: Sequence[Path], policy: str, versus: Sequence[str], json: Path | None
) -> None:
    """Paired differences from record files."""
    found = [c for path in records for c in compare(load_records(path), policy, versus)]
    found.sort(key=_table)
    show_comparisons(found)
    console.write_json(json, msgspec.to_builtins(found))


def recover_and_show(
    records: Sequence[Path], policy: str, versus: Sequence[str], json: Path | None
) -> None:
    """What a policy wins back, from record files."""
    found = [r for path in records for r in recoveries(load_records(path), policy, versus)]
    columns = ["cell", "from", "budgets", "n", "won back", "95 % interval", "least difference"]
    for metric, group in groupby(found, key=lambda r: r.metric):
        title = f"{HEADINGS[metric].text}: what {policy} wins back of what others lose against raw"
        console.table(title, columns, map(_recovery_line, group))
    for r in found:
        if r.reason:
            console.say(f"no figure: {_cell(r)}: {policy} from {r.versus}: {r.reason}")
    console.write_json(json, msgspec.to_builtins(found))


def _recovery_line(r: Recovery) -> list[str]:
    cell = f"{_cell(r)}{_protocol(r)}"
    if r.value is None or r.ci_low is None or r.ci_high is None:
        return [cell, r.versus, ", ".join(r.budgets), str(r.n), "", "", ""]
    heading = HEADINGS[r.metric]
    worst = min if r.metric in HIGHER_IS_BETTER else max
    return [
        cell,
        r.versus,
        ", ".join(r.budgets),
        str(r.n),
        console.percent(r.value),
        f"[{console.percent(r.ci_low)}, {console.percent(r.ci_high)}]",
        heading.change(worst(r.differences.values())),
    ]
