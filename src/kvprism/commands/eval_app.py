"""`kvprism eval`: its commands, thin as those of `cli.py`, and as light to import."""

from pathlib import Path
from typing import Annotated

import typer

from kvprism.commands import console
from kvprism.commands.options import (
    Budgets,
    CacheDtype,
    Codec,
    DecodeBudget,
    DecodePolicy,
    Importance,
    Json,
    Model,
    Policies,
    PolicyName,
    ProfileFile,
    Records,
    Seed,
    numbers,
)

app = typer.Typer(
    help="Measure quality at exact bytes.", no_args_is_help=True, rich_markup_mode=None
)
ALL_POLICIES = "raw,int8,int4,spectrum,sinks-recent,pdtrim,random-drop,random-tiers"
Lengths = Annotated[str, typer.Option("--length", help="Context tokens, with commas between them.")]
Haystack = Annotated[
    Path | None, typer.Option("--haystack", help="A text file instead of generated text.")
]


@app.command(
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
    policy: Policies = ALL_POLICIES,
    budget: Budgets = "0.30,0.52",
    importance: Importance = "attention",
    codec: Codec = "nested",
    profile: ProfileFile = None,
    cache_dtype: CacheDtype = "bfloat16",
    decode_policy: DecodePolicy = None,
    decode_budget: DecodeBudget = None,
    seed: Seed = 0,
    records: Records = None,
    json: Json = None,
) -> None:
    """Perplexity, KL and flips of continuations on restored caches.

    For every policy at every budget: perplexity, mean and p99 KL to raw, and how often the most
    likely token differs, with paired 95 % intervals over documents.
    """
    with console.one_line_errors(json, records):
        console.load("kvprism.commands.evaluate")
        from kvprism.commands.evaluate import measure_and_show, parse_arms, run_perplexity

        task = run_perplexity(
            model,
            text,
            arms=parse_arms(
                policy, budget, importance, codec, seed, profile, decode_policy, decode_budget
            ),
            context=context,
            continuation=continuation,
            n_documents=documents,
            seed=seed,
            cache_dtype=cache_dtype,
        )
        measure_and_show(task, records, json)


@app.command(
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
    policy: Policies = ALL_POLICIES,
    budget: Budgets = "0.30,0.52",
    haystack: Haystack = None,
    importance: Importance = "attention",
    codec: Codec = "nested",
    profile: ProfileFile = None,
    cache_dtype: CacheDtype = "bfloat16",
    decode_policy: DecodePolicy = None,
    decode_budget: DecodeBudget = None,
    seed: Seed = 0,
    records: Records = None,
    json: Json = None,
) -> None:
    """Facts hidden in a long text, asked for on restored caches.

    For every policy at every budget: exact match, digit NLL and mean KL to raw, with paired 95 %
    intervals over cases.
    """
    with console.one_line_errors(json, records):
        console.load("kvprism.commands.evaluate")
        from kvprism.commands.evaluate import measure_and_show, parse_arms, run_needle

        task = run_needle(
            model,
            arms=parse_arms(
                policy, budget, importance, codec, seed, profile, decode_policy, decode_budget
            ),
            lengths=numbers(length, "--length"),
            depths=depths,
            trials=trials,
            distractors=numbers(distractors, "--distractors"),
            seed=seed,
            haystack=haystack,
            cache_dtype=cache_dtype,
        )
        measure_and_show(task, records, json)


@app.command(
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
    policy: Policies = ALL_POLICIES,
    budget: Budgets = "0.30,0.52",
    query_aware: Annotated[
        bool, typer.Option("--query-aware", help="Plan with the question known: a protocol apart.")
    ] = False,
    haystack: Haystack = None,
    importance: Importance = "attention",
    codec: Codec = "nested",
    profile: ProfileFile = None,
    cache_dtype: CacheDtype = "bfloat16",
    decode_policy: DecodePolicy = None,
    decode_budget: DecodeBudget = None,
    seed: Seed = 0,
    records: Records = None,
    json: Json = None,
) -> None:
    """Ten long-context tasks after RULER on restored caches.

    For every policy at every budget: exact match, share of answers right, answer NLL, mean KL to
    raw and flips, for every subtask and their average, with paired 95 % intervals over cases.
    """
    with console.one_line_errors(json, records):
        console.load("kvprism.commands.evaluate")
        from kvprism.commands.evaluate import measure_and_show, parse_arms, run_ruler

        suite = run_ruler(
            model,
            task,
            arms=parse_arms(
                policy, budget, importance, codec, seed, profile, decode_policy, decode_budget
            ),
            lengths=numbers(length, "--length"),
            trials=trials,
            seed=seed,
            haystack=haystack,
            cache_dtype=cache_dtype,
            query_aware=query_aware,
        )
        measure_and_show(suite, records, json)


@app.command(
    epilog="Example: kvprism eval compare needle.jsonl --policy spectrum --versus random-tiers,int4"
)
def compare(
    records: Annotated[list[Path], typer.Argument(help="Files written by --records.")],
    policy: PolicyName = "spectrum",
    versus: Annotated[
        str, typer.Option("--versus", help="Policies to compare with, with commas between them.")
    ] = "random-tiers,int4",
    json: Json = None,
) -> None:
    """Paired differences of one policy from others, from records."""
    with console.one_line_errors(json):
        console.load("kvprism.commands.evaluate")
        from kvprism.commands.evaluate import compare_and_show

        compare_and_show(records, policy, versus.split(","), json)
