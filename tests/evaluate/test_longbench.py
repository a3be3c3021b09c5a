"""LongBench on the built-in model: prompts are the benchmark's, answers those of the real path."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import longbench_rows
import msgspec
import pytest
import torch

from kvprism.errors import BadInput, MissingExtra, UnknownName
from kvprism.evaluate.arms import arms_of, through_the_wire
from kvprism.evaluate.longbench import LongBench, LongBenchId, chat_around, cut_middle
from kvprism.evaluate.longbench_data import TASKS, read_task
from kvprism.evaluate.longbench_scores import CHINESE
from kvprism.evaluate.measure import LoadedModel, generate_on
from kvprism.evaluate.records import Record, collect, load_records
from kvprism.evaluate.summary import compare, rows_of
from kvprism.integrations.hf import capture, restore
from kvprism.retention import Retention

RAW = arms_of(["raw"], [])
SPOKEN = [name for name, task in TASKS.items() if task.score not in CHINESE]
CHAT = (
    "{% for m in messages %}<user>{{ m['content'] | trim }}</user>{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(longbench_rows.write_directory(tmp_path_factory.mktemp("longbench")))


@pytest.fixture(scope="module")
def bench(subject: LoadedModel, data: str) -> LongBench:
    return LongBench(subject, RAW, data, SPOKEN)


def text_of(bench: LongBench, ids: torch.Tensor) -> str:
    return str(bench.subject.tokenizer.decode(ids.tolist()))


@pytest.mark.parametrize("name", SPOKEN)
@pytest.mark.parametrize("tokenizer", ["own", "merging"])
def test_a_prompt_is_the_benchmarks_own_and_apart_where_the_context_ends(
    bench: LongBench, request: pytest.FixtureRequest, name: str, tokenizer: str
) -> None:
    if tokenizer == "merging":
        merging = request.getfixturevalue("merging_tokenizer")
        bench = replace(bench, subject=LoadedModel("tiny", bench.subject.model, merging))
    before, after = TASKS[name].fill(read_task(bench.data, name).rows[0])
    context, question = bench.prompt(LongBenchId(name, 0))
    whole = bench.subject.tokenizer.encode(before + after)
    assert torch.cat([context, question]).tolist() == whole
    sent = text_of(bench, context)
    # One token may join the end of the context with what follows it.
    assert before.startswith(sent) and len(before) - len(sent) < 20
    assert text_of(bench, question).endswith(after)


def test_a_context_is_the_same_whatever_is_asked(bench: LongBench) -> None:
    first, second = (bench.prompt(LongBenchId("hotpotqa", number)) for number in (0, 1))
    assert torch.equal(first.context, second.context)
    assert not torch.equal(first.question, second.question)


def test_with_the_question_known_all_but_the_last_token_is_sent(bench: LongBench) -> None:
    blind, aware = (
        replace(bench, query_aware=known).prompt(LongBenchId("qasper", 0))
        for known in (False, True)
    )
    assert torch.equal(torch.cat(blind), torch.cat(aware))
    assert len(aware.question) == 1 < len(blind.question)


def test_a_long_prompt_loses_its_middle(bench: LongBench) -> None:
    whole = torch.cat(bench.prompt(LongBenchId("qmsum", 0)))
    short = replace(bench, max_length=101)
    context, question = short.prompt(LongBenchId("qmsum", 0))
    assert torch.equal(torch.cat([context, question]), torch.cat([whole[:50], whole[-50:]]))
    assert torch.equal(question, bench.prompt(LongBenchId("qmsum", 0)).question[-50:])


@pytest.mark.parametrize(
    ("n", "limit", "kept"),
    [(7, 10, 7), (7, 11, 7), (2, 6, 2), (3, 6, 3), (5, 6, 3), (7, 6, 3), (9, 6, 5), (10, 6, 6)],
)
def test_of_the_context_that_is_left_which_was_not_cut(n: int, limit: int, kept: int) -> None:
    ids, left = cut_middle(torch.arange(10), n, limit)
    assert left == kept == int((ids < n).sum())


def test_chat_models_get_their_template_but_for_few_shot_and_code(bench: LongBench) -> None:
    tokenizer = bench.subject.tokenizer.__class__(
        tokenizer_object=bench.subject.tokenizer.backend_tokenizer, chat_template=CHAT
    )
    chat = replace(bench, subject=LoadedModel("tiny", bench.subject.model, tokenizer), chat=True)
    plain = text_of(bench, torch.cat(bench.prompt(LongBenchId("passage_count", 0))))
    wrapped = chat.prompt(LongBenchId("passage_count", 0))
    assert text_of(bench, torch.cat(wrapped)) == f"<user>{plain}</user><answer>"
    assert text_of(bench, wrapped.question).endswith("is: </user><answer>")
    for name in ("lcc", "trec"):
        same = (torch.cat(each.prompt(LongBenchId(name, 0))) for each in (bench, chat))
        assert torch.equal(*same)
    assert chat.header.digest != bench.header.digest
    with pytest.raises(BadInput, match="no chat template; leave out --chat"):
        chat_around(bench.subject.tokenizer)


@pytest.mark.parametrize("policy", ["raw", "int4", "streaming-llm"])
def test_an_answer_is_what_transformers_generates_on_the_same_cache(
    bench: LongBench, policy: str
) -> None:
    model, (context, question) = bench.subject.model, bench.prompt(LongBenchId("hotpotqa", 2))
    arm = arms_of([policy], [] if policy in ("raw", "int4") else ["0.3"])[-1]
    restored, _ = through_the_wire(*capture(model, context), arm)
    answer = generate_on(model, restored, question, 12, stops=())
    whole = torch.cat([context, question])[None]
    expected = model.generate(
        whole,
        **restore(model, restored).kwargs,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    assert answer.tolist() == expected[0, whole.shape[1] :].tolist()


def test_generation_ends_with_a_stop_which_may_be_kept_from_coming_first(bench: LongBench) -> None:
    model, (context, question) = bench.subject.model, bench.prompt(LongBenchId("hotpotqa", 2))
    kv, _ = capture(model, context)
    free = generate_on(model, kv, question, 6, stops=()).tolist()
    at = free.index(free[3])
    assert generate_on(model, kv, question, 6, stops=(free[3],)).tolist() == free[: at + 1]
    assert generate_on(model, kv, question, 6, stops=(free[0],)).tolist() == free[:1]
    later = generate_on(model, kv, question, 6, stops=(free[0],), fewest=1).tolist()
    assert later[0] != free[0] and len(later) > 1


def test_answers_are_generated_under_the_arms_decode_phase(bench: LongBench) -> None:
    model, (context, question) = bench.subject.model, bench.prompt(LongBenchId("hotpotqa", 2))
    kv, _ = capture(model, context)
    free = generate_on(model, kv, question, 12, stops=())
    roomy = Retention("tova", len(context) + len(question) + 12)
    assert torch.equal(generate_on(model, kv, question, 12, (), roomy), free)
    tight = generate_on(model, kv, question, 12, (), Retention("tova", 16))
    assert not torch.equal(tight, free)


@pytest.fixture(scope="module")
def answered(subject: LoadedModel, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose true answer is what the model says without kvprism."""
    folder = tmp_path_factory.mktemp("answered")
    names, rows = ("hotpotqa", "lcc"), longbench_rows.TASKS
    own = {}
    for name in names:
        said = [plainly(subject, data, name, number) for number in range(len(rows[name]))]
        pairs = zip(rows[name], said, strict=True)
        own[name] = [{**row, "answers": ["nothing of it", text]} for row, text in pairs]
    return longbench_rows.write_directory(folder / "rows", own)


def plainly(subject: LoadedModel, data: str, name: str, number: int) -> str:
    row = read_task(data, name).rows[number]
    ids = torch.tensor([subject.tokenizer.encode("".join(TASKS[name].fill(row)))])
    made = subject.model.generate(ids, max_new_tokens=TASKS[name].new_tokens, do_sample=False)
    text = str(subject.tokenizer.decode(made[0, ids.shape[1] :].tolist(), skip_special_tokens=True))
    return text.lstrip("\n").split("\n")[0] if name == "lcc" else text


def measured(
    subject: LoadedModel, data: Path, path: Path | None = None, **settings: Any
) -> tuple[LongBench, Sequence[Record]]:
    arms = arms_of(["int8", "sinks-recent"], ["0.10"])
    task = LongBench(
        subject, arms, str(data), ["hotpotqa", "lcc"], cache_dtype="float32", **settings
    )
    return task, collect(task, path).records


def test_raw_says_what_the_model_says_without_kvprism_and_a_bad_arm_does_not(
    subject: LoadedModel, answered: Path, tmp_path: Path
) -> None:
    task, records = measured(subject, answered, tmp_path / "records")
    assert [record.document for record in records[:: len(task.arms)]] == task.documents
    assert list(task.documents) == ["hotpotqa-0", "lcc-0", "hotpotqa-1", "hotpotqa-2"]
    found = load_records(tmp_path / "records")
    assert found.records == records
    rows = {(row.subtask, row.policy, row.metric): row for row in rows_of(found)}
    assert {(row.task, row.length, row.query_aware) for row in rows.values()} == {
        ("longbench", task.length, False)
    }
    for name, n in (("hotpotqa", 3), ("lcc", 1), ("average", 4)):
        assert rows[name, "raw", "score"].n == n
        assert rows[name, "raw", "score"].value == 1
        assert rows[name, "raw", "kl_mean"].value == 0
        bad = rows[name, "sinks-recent", "score"].value
        assert bad is not None and bad < 0.9
    for record in records:
        assert record.outcome is not None and record.outcome.score is not None
        which = LongBenchId(*record.document.split("-")[:1], int(record.document.split("-")[1]))
        row = read_task(str(answered), which.task).rows[which.number]
        assert record.outcome.score == TASKS[which.task].score_of(record.outcome.text, row)
        assert len(record.outcome.kl) == record.outcome.targets <= TASKS[which.task].new_tokens
        assert record.outcome.exact == (record.outcome.flips == 0)
    close, far = (rows["average", policy, "kl_mean"].value for policy in ("int8", "sinks-recent"))
    assert close is not None and far is not None and 0 < close < far
    compared = compare(found, "int8", ["sinks-recent"])
    assert {c.not_ranked for c in compared if c.subtask == "lcc"} == {"n = 1 is below 100"}


def test_a_run_resumes_and_another_one_is_not_mixed_in(
    subject: LoadedModel, answered: Path, tmp_path: Path
) -> None:
    path = tmp_path / "records"
    _, records = measured(subject, answered, path, n_documents=1)
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-2]))
    assert measured(subject, answered, path, n_documents=1)[1] == records
    assert path.read_bytes() == whole
    for change, said in (
        ({"query_aware": True}, "query_aware: False, now True"),
        ({"max_length": 200}, "max_length: .*, now 200"),
    ):
        with pytest.raises(BadInput, match=said):
            measured(subject, answered, path, n_documents=1, **change)


def test_with_the_question_known_more_is_sent_and_rows_say_so(
    subject: LoadedModel, answered: Path
) -> None:
    blind, aware = (
        measured(subject, answered, n_documents=1, query_aware=known)[1] for known in (False, True)
    )
    for ours, theirs in zip(blind, aware, strict=True):
        assert ours.outcome is not None and theirs.outcome is not None
        assert ours.outcome.reference_bytes < theirs.outcome.reference_bytes
    task = LongBench(subject, RAW, str(answered), ["lcc"], query_aware=True)
    assert all(row.query_aware for row in rows_of(collect(task)))


def test_a_budget_that_is_too_small_is_a_record_with_its_reason(
    subject: LoadedModel, data: str
) -> None:
    task = LongBench(subject, arms_of(["spectrum"], ["0.05"]), data, ["passage_count"])
    raw, small = collect(task).records
    assert raw.outcome is not None and small.outcome is None
    assert small.reason is not None and "budget too small" in small.reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ()}, "at least one task is needed"),
        ({"n_documents": 0}, "documents must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"max_length": 1}, "prompts of 1 tokens: with 32 generated ones"),
        ({"max_length": 4322}, "this model has positions for 2 to 4321"),
        ({"cache_dtype": "int3"}, "cache dtype 'int3' is not in"),
        ({"data": "nowhere"}, "neither a directory, nor a file"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    subject: LoadedModel, data: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        LongBench(subject, RAW, **{"data": data, "tasks": ["hotpotqa"], **change})


def test_an_unknown_task_is_refused_at_once(subject: LoadedModel, data: str) -> None:
    with pytest.raises(UnknownName, match="unknown LongBench task 'chess'; known: narrativeqa"):
        LongBench(subject, RAW, data, ["chess"])


def test_a_chinese_task_names_the_extra_before_anything_is_measured(
    subject: LoadedModel, data: str
) -> None:
    try:
        LongBench(subject, RAW, data, ["vcsum"])
    except MissingExtra as error:
        assert error.extra == "eval"
    else:
        pytest.skip("jieba is installed")


def test_a_model_is_loaded_in_the_dtype_and_onto_the_device_that_are_named() -> None:
    assert LoadedModel.load("tiny", "bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(BadInput, match="dtype 'int3' is not in"):
        LoadedModel.load("tiny", "int3")
    with pytest.raises(BadInput, match="device 'nowhere': "):
        LoadedModel.load("tiny", device="nowhere")


def test_outcomes_of_other_tasks_are_written_as_before(subject: LoadedModel, data: str) -> None:
    outcome = collect(LongBench(subject, RAW, data, ["trec"], n_documents=1)).records[0].outcome
    assert outcome is not None
    plain = msgspec.structs.replace(outcome, text="", score=None)
    assert set(msgspec.to_builtins(outcome)) - set(msgspec.to_builtins(plain)) == {"text", "score"}
