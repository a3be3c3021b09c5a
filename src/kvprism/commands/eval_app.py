"""`kvprism eval`: its commands, thin as those of `cli.py`, and as light to import."""

from collections.abc import Callable
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from kvprism.commands import console
from kvprism.commands.options import GROUP, EvaluationOptions, Json, Model, PolicyName, numbers

app = typer.Typer(help="Measure quality at exact bytes.", **GROUP)
Lengths = Annotated[str, typer.Option("--length", help="Context tokens, with commas between them.")]
Haystack = Annotated[
    Path | None, typer.Option("--haystack", help="A text file instead of generated text.")
]
Settings = dict[str, Any]


def evaluation(epilog: str) -> Callable[[Callable[..., Settings]], Callable[..., Settings]]:
    """A command of what gives a task's settings: those options, then all `EvaluationOptions`."""

    def register(settings_of: Callable[..., Settings]) -> Callable[..., Settings]:
        own, shared = signature(settings_of).parameters, signature(EvaluationOptions).parameters

        def command(**given: Any) -> None:
            options = EvaluationOptions(**{name: given.pop(name) for name in shared})
            with console.one_line_errors(options.json, options.records):
                console.load("kvprism.commands.evaluate")
                from kvprism.commands.evaluate import evaluate_and_show

                evaluate_and_show(settings_of.__name__, settings_of(**given), options)

        command.__signature__ = Signature([*own.values(), *shared.values()])  # type: ignore[attr-defined]
        command.__doc__ = settings_of.__doc__
        app.command(settings_of.__name__, epilog=epilog)(command)
        return settings_of

    return register


@evaluation(
    epilog="Example: kvprism eval perplexity --text book.txt --policy int4,spectrum --budget 0.30"
)
def perplexity(
    text: Annotated[Path, typer.Option("--text", help="Any UTF-8 text file.")],
    model: Model = "tiny",
    context: Annotated[
        int, typer.Option("--context", min=2, help="Prompt tokens of a document.")
    ] = 1536,
    continuation: Annotated[
        int, typer.Option("--continuation", min=1, help="Scored tokens after it.")
    ] = 512,
    documents: Annotated[
        int, typer.Option("--documents", min=1, help="Documents, spread over the text.")
    ] = 40,
) -> Settings:
    """Perplexity, KL and flips of continuations on restored caches.

    For every policy at every budget: perplexity, mean and p99 KL to raw, and how often the most
    likely token differs, with paired 95 % intervals over documents.
    """
    return {
        "model": model,
        "text": text,
        "context": context,
        "continuation": continuation,
        "n_documents": documents,
    }


@evaluation(
    epilog="Example: kvprism eval needle --length 1024 --distractors 0,3 --records needle.jsonl"
)
def needle(
    model: Model = "tiny",
    length: Lengths = "1024,2048",
    depths: Annotated[
        int, typer.Option("--depths", min=1, help="Depths, evenly spread from start to end.")
    ] = 11,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Cases per depth.")] = 5,
    distractors: Annotated[
        str, typer.Option("--distractors", help="Other facts beside it, with commas between them.")
    ] = "0,3",
    haystack: Haystack = None,
) -> Settings:
    """Facts hidden in a long text, asked for on restored caches.

    For every policy at every budget: exact match, digit NLL and mean KL to raw, with paired 95 %
    intervals over cases.
    """
    return {
        "model": model,
        "lengths": numbers(length, "--length"),
        "depths": depths,
        "trials": trials,
        "distractors": numbers(distractors, "--distractors"),
        "haystack": haystack,
    }


@evaluation(
    epilog="Example: kvprism eval ruler --length 2048 --trials 10 --task multi-key,copying "
    "--policy raw,spectrum,int4 --budget 0.30"
)
def ruler(
    model: Model = "tiny",
    length: Lengths = "2048",
    task: Annotated[
        str | None,
        typer.Option("--task", help="Subtasks, with commas between them; all when left out."),
    ] = None,
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="Cases per subtask and depth; there are 11.")
    ] = 10,
    query_aware: Annotated[
        bool, typer.Option("--query-aware", help="Plan with the question known: a protocol apart.")
    ] = False,
    haystack: Haystack = None,
) -> Settings:
    """Ten long-context tasks after RULER on restored caches.

    For every policy at every budget: exact match, share of answers right, answer NLL, mean KL to
    raw and flips, for every subtask and their average, with paired 95 % intervals over cases.
    """
    return {
        "model": model,
        "tasks": task,
        "lengths": numbers(length, "--length"),
        "trials": trials,
        "haystack": haystack,
        "query_aware": query_aware,
    }


@evaluation(
    epilog="Example: kvprism eval longbench --model ./Llama-3.1-8B-Instruct --chat "
    "--data THUDM/LongBench --policy snapkv,cake --budget 512tok --query-aware --records lb.jsonl"
)
def longbench(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Directory of the benchmark's .jsonl files, its data.zip, or the data set's name "
            "on the hub, OWNER/NAME, which is then downloaded.",
        ),
    ],
    model: Model = "tiny",
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", "--task", help="Tasks, with commas between them; all 21 if none."),
    ] = None,
    documents: Annotated[
        int | None, typer.Option("--documents", min=1, help="Only the first N rows of every task.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length", min=2, help="Longer prompts lose their middle; as the model by default."
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Use the model's chat template, where the benchmark does."),
    ] = False,
    query_aware: Annotated[
        bool,
        typer.Option(
            "--query-aware", help="Send the question's cache too, as papers on eviction do."
        ),
    ] = False,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of weights and arithmetic; float32, bfloat16, float16.")
    ] = "float32",
    device: Annotated[str, typer.Option("--device", help="As torch calls it.")] = "cpu",
) -> Settings:
    """LongBench's 21 tasks, answered on restored caches.

    For every policy at every budget: the benchmark's own score of what was generated greedily, mean
    KL to raw and flips on raw's answer, for every task and their average, with paired 95 %
    intervals over rows.
    """
    return {
        "model": model,
        "data": data,
        "tasks": tasks,
        "dtype": dtype,
        "device": device,
        "n_documents": documents,
        "max_length": max_length,
        "chat": chat,
        "query_aware": query_aware,
    }


@app.command(
    epilog="Example: kvprism eval compare needle.jsonl --policy spectrum --versus random-tiers,int4"
)
def compare(
    records: Annotated[list[Path], typer.Argument(help="Files written by --records.")],
    policy: PolicyName = "spectrum",
    versus: Annotated[
        str,
        typer.Option("--versus", help="Policies to compare with; policy:codec in another code."),
    ] = "random-tiers,int4",
    json: Json = None,
) -> None:
    """Paired differences of one policy from others, from records."""
    with console.one_line_errors(json):
        console.load("kvprism.commands.evaluate")
        from kvprism.commands.evaluate import compare_and_show

        compare_and_show(records, policy, versus.split(","), json)


@app.command(
    epilog="Example: kvprism eval recovery routes.jsonl --policy polykv-best --versus keydiff"
)
def recovery(
    records: Annotated[list[Path], typer.Argument(help="Files written by --records.")],
    policy: PolicyName = "polykv-best",
    versus: Annotated[
        str,
        typer.Option(
            "--versus",
            help="Policies to compare with, with commas between them; one for each budget as in "
            "tova@128tok+cake@512tok.",
        ),
    ] = "snapkv",
    json: Json = None,
) -> None:
    """What one policy wins back of what others lose.

    Of every metric whose best is raw's: the sum over budgets of policy minus other, over that of
    raw minus other, with a paired 95 % interval over documents.
    """
    with console.one_line_errors(json):
        console.load("kvprism.commands.evaluate")
        from kvprism.commands.evaluate import recover_and_show

        recover_and_show(records, policy, versus.split(","), json)


@app.command(epilog="Example: kvprism eval rows ruler.jsonl --json rows.json")
def rows(
    records: Annotated[list[Path], typer.Argument(help="Files written by --records.")],
    json: Json = None,
) -> None:
    """Tables and rows of records, of an unfinished run too.

    Of the documents that every arm has measured.
    """
    with console.one_line_errors(json):
        console.load("kvprism.commands.evaluate")
        from kvprism.commands.evaluate import load_and_show

        load_and_show(records, json)
