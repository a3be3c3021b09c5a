"""The command line: thin; every command parses, calls one function and prints its result."""

from pathlib import Path
from typing import Annotated

import typer

from kvprism.commands import console

app = typer.Typer(
    name="kvprism",
    help="Send far fewer KV-cache bytes from prefill to decode, at the same answer quality.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
evaluate_app = typer.Typer(help="Measure quality at exact bytes.", no_args_is_help=True)
app.add_typer(evaluate_app, name="eval")

Json = Annotated[Path | None, typer.Option("--json", help="Also write the result here as JSON.")]
Model = Annotated[str, typer.Option("--model", help="Built-in name or local checkpoint directory.")]
PolicyName = Annotated[str, typer.Option("--policy", help="A name from `kvprism policies`.")]
Policies = Annotated[str, typer.Option("--policy", help="Comma-separated policy names.")]
BudgetText = Annotated[
    str | None, typer.Option("--budget", help="0.30, 30%, 512MiB or 512tok: all wire bytes.")
]
Budgets = Annotated[str, typer.Option("--budget", help="Comma-separated budgets.")]
Importance = Annotated[str, typer.Option("--importance", help="attention, position or norm.")]
Codec = Annotated[str, typer.Option("--codec", help="nested (ours) or published (the papers').")]
CacheDtype = Annotated[
    str, typer.Option("--cache-dtype", help="Precision of the prefill side's cache.")
]
RecordFile = Annotated[
    Path | None,
    typer.Option("--records", help="Keep every measurement here; a second run resumes."),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]


@app.command()
def demo(
    model: Model = "tiny",
    context: Annotated[int, typer.Option(help="Prompt length in tokens.")] = 3072,
    seed: Seed = 0,
    json: Json = None,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML page here.")] = None,
) -> None:
    """Prefill in one process, continue in another, and compare what each policy sends and keeps."""
    with console.one_line_errors():
        from kvprism.commands.demo import run_demo, show_demo

        with console.status("starting a prefill and a decode worker") as say:
            result = run_demo(model, context, seed, say)
        show_demo(result)
        console.write_json(json, result)
        if report is not None:
            from kvprism.report import write_demo_report

            write_demo_report(result, report)
            console.out.print(f"report: {report}")


@app.command()
def run(
    file: Annotated[Path, typer.Option("--file", help="Text to prefill.")],
    model: Model = "tiny",
    policy: PolicyName = "spectrum",
    budget: BudgetText = None,
    importance: Importance = "attention",
    codec: Codec = "nested",
    seed: Seed = 0,
    tokens: Annotated[int | None, typer.Option(help="Use only the first N tokens.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    save: Annotated[Path | None, typer.Option(help="Save the stream here (mode 0600).")] = None,
    json: Json = None,
) -> None:
    """Prefill a file here, send its cache to a second process, continue there."""
    with console.one_line_errors():
        from kvprism.commands.demo import run_file, show_run

        options = {"importance": importance, "codec": codec, "seed": seed}
        with console.status("starting a prefill and a decode worker") as say:
            result = run_file(model, file, policy, budget, options, tokens, new_tokens, save, say)
        show_run(result)
        console.write_json(json, result)


@app.command()
def plan(
    model: Model = "tiny",
    policy: PolicyName = "spectrum",
    budget: BudgetText = None,
    tokens: Annotated[int, typer.Option(help="Prompt length in tokens.")] = 2048,
    link: Annotated[str, typer.Option(help="Link speed, such as 10Gbps.")] = "10Gbps",
    codec: Codec = "nested",
    json: Json = None,
) -> None:
    """Dry run from the model's shape alone: bytes per tier, smallest budget, time on a link."""
    with console.one_line_errors():
        from kvprism.commands.dry_run import dry_run, show_dry_run

        result = dry_run(model, policy, budget, tokens, link, codec)
        show_dry_run(result)
        console.write_json(json, result)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A saved stream.")], json: Json = None
) -> None:
    """Verify a saved stream and say what is in it."""
    with console.one_line_errors():
        from kvprism.commands.inspection import inspect_stream, show_stream

        result = inspect_stream(file)
        show_stream(result)
        console.write_json(json, result)


@app.command()
def doctor(json: Json = None) -> None:
    """Check this installation: versions, built-in models, loopback, codec speed."""
    with console.one_line_errors():
        from kvprism.commands.doctor import examine, show_findings

        findings = examine()
        show_findings(findings)
        console.write_json(json, findings)
    if any(finding["state"] == "broken" for finding in findings):
        raise typer.Exit(console.EXIT_OTHER)


@app.command()
def policies(json: Json = None) -> None:
    """List the policies."""
    with console.one_line_errors():
        from kvprism.policies import POLICIES

        rows = [
            [name, "exact budget" if row.budgeted else "fixed rate", row.tempo, row.summary]
            for name, row in POLICIES.items()
        ]
        console.table("policies", ["policy", "size", "tempo", "what it sends"], rows, words=True)
        keys = ("policy", "size", "tempo", "summary")
        console.write_json(json, [dict(zip(keys, row, strict=True)) for row in rows])


@evaluate_app.command()
def perplexity(
    text: Annotated[Path, typer.Option("--text", help="Any UTF-8 text file.")],
    model: Model = "tiny",
    context: Annotated[int, typer.Option(help="Prompt tokens of a document.")] = 1536,
    continuation: Annotated[int, typer.Option(help="Scored tokens after it.")] = 512,
    documents: Annotated[int, typer.Option(help="Documents, spread over the text.")] = 40,
    policy: Policies = "raw,int8,int4,spectrum,sinks-recent,pdtrim,random-drop,random-tiers",
    budget: Budgets = "0.30,0.52",
    importance: Importance = "attention",
    codec: Codec = "nested",
    cache_dtype: CacheDtype = "bfloat16",
    seed: Seed = 0,
    records: RecordFile = None,
    json: Json = None,
) -> None:
    """Perplexity, KL to raw and top-1 flips of a continuation on the restored cache."""
    with console.one_line_errors():
        from kvprism.commands.evaluate import measure_and_show, parse_arms, run_perplexity

        task = run_perplexity(
            model,
            text,
            arms=parse_arms(policy, budget, importance, codec, seed),
            context=context,
            continuation=continuation,
            n_documents=documents,
            seed=seed,
            cache_dtype=cache_dtype,
        )
        measure_and_show(task, records, json)


@evaluate_app.command()
def needle(
    model: Model = "tiny",
    length: Annotated[str, typer.Option(help="Comma-separated context lengths.")] = "1024,2048",
    depths: Annotated[int, typer.Option(help="Depths, evenly spread from start to end.")] = 11,
    trials: Annotated[int, typer.Option(help="Cases per depth.")] = 5,
    distractors: Annotated[str, typer.Option(help="Comma-separated counts.")] = "0,3",
    policy: Policies = "raw,int8,int4,spectrum,sinks-recent,pdtrim,random-drop,random-tiers",
    budget: Budgets = "0.30,0.52",
    haystack: Annotated[
        Path | None, typer.Option(help="A text file instead of generated text.")
    ] = None,
    importance: Importance = "attention",
    codec: Codec = "nested",
    cache_dtype: CacheDtype = "bfloat16",
    seed: Seed = 0,
    records: RecordFile = None,
    json: Json = None,
) -> None:
    """Facts hidden in a long text, asked for on the restored cache."""
    with console.one_line_errors():
        from kvprism.commands.evaluate import measure_and_show, numbers, parse_arms, run_needle

        task = run_needle(
            model,
            arms=parse_arms(policy, budget, importance, codec, seed),
            lengths=numbers(length, "--length"),
            depths=depths,
            trials=trials,
            distractors=numbers(distractors, "--distractors"),
            seed=seed,
            haystack=haystack,
            cache_dtype=cache_dtype,
        )
        measure_and_show(task, records, json)


@evaluate_app.command()
def compare(
    records: Annotated[list[Path], typer.Argument(help="Files written by --records.")],
    policy: PolicyName = "spectrum",
    versus: Annotated[str, typer.Option(help="Comma-separated policies.")] = "random-tiers,int4",
    json: Json = None,
) -> None:
    """Paired differences of one policy against others, from recorded documents."""
    with console.one_line_errors():
        from kvprism.commands.evaluate import compare_and_show

        compare_and_show(records, policy, versus.split(","), json)


@app.command(hidden=True)
def worker(
    role: str,
    model: Annotated[str, typer.Option("--model")],
    token_file: Annotated[Path, typer.Option("--token-file")],
    cache_dtype: Annotated[str, typer.Option("--cache-dtype")] = "bfloat16",
) -> None:
    """Be the prefill or the decode worker of a parent that speaks JSON lines."""
    from kvprism.integrations.worker import serve

    serve(role, model, token_file, cache_dtype)


def main() -> None:
    """Entry point of the `kvprism` command."""
    app()
