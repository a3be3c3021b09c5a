"""The command line: thin; every command parses, calls one function and prints its result."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvprism.commands import console

app = typer.Typer(
    name="kvprism",
    help="Send far fewer KV-cache bytes from prefill to decode, at the same answer quality.",
    epilog="Start with: kvprism demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: at once, and the same in a terminal and in a log
)
evaluate_app = typer.Typer(
    help="Measure quality at exact bytes.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(evaluate_app, name="eval")

Json = Annotated[Path | None, typer.Option("--json", help="Also write the result here as JSON.")]
Model = Annotated[
    str, typer.Option("--model", help="Built-in model or directory of a local checkpoint.")
]
Prompt = Annotated[Path, typer.Option("--file", help="The prompt: a UTF-8 text file.")]
First = Annotated[
    int | None, typer.Option("--tokens", min=2, help="Take only the first N tokens of the prompt.")
]
NewTokens = Annotated[
    int, typer.Option("--new-tokens", min=1, help="Generate at most this many tokens, greedily.")
]
TokenFile = Annotated[
    Path, typer.Option("--token-file", help="The shared secret; make one with: kvprism token FILE")
]
AllowRemote = Annotated[
    bool,
    typer.Option(
        "--allow-remote",
        help="Allow addresses off loopback. Peers are authenticated, but nothing is encrypted.",
    ),
]
PolicyName = Annotated[
    str, typer.Option("--policy", help="What is sent how precisely; kvprism policies lists them.")
]
Policies = Annotated[str, typer.Option("--policy", help="Policies, with commas between them.")]
BudgetText = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="Cap on all wire bytes: 0.30 or 30% of the cache at 16 bits, 512MiB, or 512tok.",
    ),
]
Budgets = Annotated[str, typer.Option("--budget", help="Budgets, with commas between them.")]
Importance = Annotated[
    str, typer.Option("--importance", help="What ranks tokens: attention, position or norm.")
]
Codec = Annotated[
    str,
    typer.Option("--codec", help="The code of INT8 and INT4: nested, or the papers' published."),
]
CacheDtype = Annotated[
    str,
    typer.Option(
        "--cache-dtype", help="Dtype of the prefill side's cache: bfloat16, float16 or float32."
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
Records = Annotated[
    Path | None,
    typer.Option("--records", help="Keep every measurement here; the same command resumes."),
]
ALL_POLICIES = "raw,int8,int4,spectrum,sinks-recent,pdtrim,random-drop,random-tiers"


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(f"kvprism {metadata.version('kvprism')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None: ...


@app.command(epilog="Example: kvprism demo --json demo.json --report report.html")
def demo(
    model: Model = "tiny",
    context: Annotated[int, typer.Option("--context", min=1, help="Prompt tokens.")] = 3072,
    seed: Seed = 0,
    json: Json = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Also write an HTML page here.")
    ] = None,
) -> None:
    """Prefill here, decode there: what each policy sends and keeps.

    Hides facts in a long text, prefills it, sends its cache to a second process under six policies,
    and asks for the facts there. Needs no network and no argument.
    """
    with console.one_line_errors(json, report):
        from kvprism.integrations.worker import worker_pair

        with (
            console.status("starting a prefill and a decode worker") as say,
            worker_pair(model) as pair,
        ):
            # While the workers import torch, this process does.
            console.load("kvprism.commands.demo", *["kvprism.report"] * (report is not None))
            from kvprism.commands.demo import run_demo, show_demo

            result = run_demo(pair, model, context, seed, say)
        show_demo(result)
        console.write_json(json, result)
        if report is not None:
            from kvprism.report import write_demo_report

            write_demo_report(result, report)
            console.say(f"report: {report}")


@app.command(epilog="Example: kvprism run --file prompt.txt --policy spectrum --budget 30%")
def run(
    file: Prompt,
    model: Model = "tiny",
    policy: PolicyName = "spectrum",
    budget: BudgetText = None,
    importance: Importance = "attention",
    codec: Codec = "nested",
    cache_dtype: CacheDtype = "bfloat16",
    seed: Seed = 0,
    tokens: First = None,
    new_tokens: NewTokens = 32,
    save: Annotated[
        Path | None, typer.Option("--save", help="Also save the stream here, mode 0600.")
    ] = None,
    json: Json = None,
) -> None:
    """Prefill a file, send its cache to another process, go on there."""
    with console.one_line_errors(json, save):
        from kvprism.integrations.worker import worker_pair

        with (
            console.status("starting a prefill and a decode worker") as say,
            worker_pair(model, cache_dtype) as pair,
        ):
            console.load("kvprism.commands.transfer")
            from kvprism.commands.transfer import run_file, show_transfer

            result = run_file(
                pair,
                model,
                file,
                policy,
                budget,
                {"importance": importance, "codec": codec, "seed": seed},
                tokens=tokens,
                new_tokens=new_tokens,
                save=save,
                say=say,
            )
        show_transfer(result)
        console.write_json(json, result)


@app.command(
    epilog="Example: kvprism prefill --file prompt.txt --to 127.0.0.1:7000 --token-file token "
    "--policy spectrum --budget 30%"
)
def prefill(
    file: Prompt,
    to: Annotated[str, typer.Option("--to", help="HOST:PORT that kvprism decode listens on.")],
    token_file: TokenFile,
    model: Model = "tiny",
    policy: PolicyName = "spectrum",
    budget: BudgetText = None,
    importance: Importance = "attention",
    codec: Codec = "nested",
    cache_dtype: CacheDtype = "bfloat16",
    seed: Seed = 0,
    tokens: First = None,
    allow_remote: AllowRemote = False,
    json: Json = None,
) -> None:
    """Prefill a file here and send its cache to a kvprism decode."""
    with console.one_line_errors(json):
        with console.status("loading the model") as say:
            console.load("kvprism.commands.transfer")
            from kvprism.commands.transfer import prefill_here, show_transfer

            result = prefill_here(
                model,
                file,
                to,
                token_file,
                policy,
                budget,
                {"importance": importance, "codec": codec, "seed": seed},
                tokens=tokens,
                cache_dtype=cache_dtype,
                allow_remote=allow_remote,
                say=say,
            )
        show_transfer(result)
        console.write_json(json, result)


@app.command(epilog="Example: kvprism decode --file prompt.txt --port 7000 --token-file token")
def decode(
    file: Prompt,
    token_file: TokenFile,
    model: Model = "tiny",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: any free one.")
    ] = 0,
    tokens: First = None,
    new_tokens: NewTokens = 32,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, help="Seconds to wait for a cache.")
    ] = 600.0,
    allow_remote: AllowRemote = False,
    json: Json = None,
) -> None:
    """Listen for the cache of a prompt and continue the prompt here.

    Prints the address that it listens on. Both sides are given the prompt, as behind a proxy: only
    the cache crosses the wire.
    """
    with console.one_line_errors(json):
        with console.status("loading the model") as say:
            console.load("kvprism.commands.transfer")
            from kvprism.commands.transfer import decode_here, show_transfer

            result = decode_here(
                model,
                file,
                token_file,
                host=host,
                port=port,
                tokens=tokens,
                new_tokens=new_tokens,
                timeout_s=timeout,
                allow_remote=allow_remote,
                say=say,
            )
        show_transfer(result)
        console.write_json(json, result)


@app.command(epilog="Example: kvprism token ~/kvprism.token")
def token(
    file: Annotated[Path, typer.Argument(help="The file to make; it must not exist.")],
) -> None:
    """Make the secret that kvprism prefill and decode share.

    32 random bytes in a file that only its owner may read; copy it to the other side.
    """
    with console.one_line_errors():
        from kvprism.transport.token import create_token

        create_token(file)
        console.say(f"{file}: mode 0600; give the other side the same file")


@app.command(epilog="Example: kvprism plan --budget 30% --tokens 4096 --link 10Gbps,100Gbps")
def plan(
    model: Model = "tiny",
    policy: PolicyName = "spectrum",
    budget: BudgetText = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Prompt tokens.")] = 2048,
    link: Annotated[
        str, typer.Option("--link", help="Link speeds, with commas between them.")
    ] = "1Gbps,10Gbps,100Gbps",
    codec: Codec = "nested",
    json: Json = None,
) -> None:
    """Dry run: bytes per tier, smallest budget, time on a link.

    From the model's shape alone: neither weights nor a prompt are needed.
    """
    with console.one_line_errors(json):
        console.load("kvprism.commands.dry_run")
        from kvprism.commands.dry_run import dry_run, show_dry_run

        result = dry_run(model, policy, budget, tokens, link, codec)
        show_dry_run(result)
        console.write_json(json, result)


@app.command(epilog="Example: kvprism inspect saved.kvp")
def inspect(
    file: Annotated[Path, typer.Argument(help="A stream that kvprism run --save wrote.")],
    json: Json = None,
) -> None:
    """Verify every byte of a saved stream and say what is in it."""
    with console.one_line_errors(json):
        console.load("kvprism.commands.inspection")
        from kvprism.commands.inspection import inspect_stream, show_stream

        result = inspect_stream(file)
        show_stream(result)
        console.write_json(json, result)


@app.command(epilog="Example: kvprism doctor --json doctor.json")
def doctor(json: Json = None) -> None:
    """Check this installation: versions, models, loopback, codec speed."""
    with console.one_line_errors(json):
        console.load("kvprism.commands.doctor")
        from kvprism.commands.doctor import examine, show_findings

        findings = examine()
        show_findings(findings)
        console.write_json(json, findings)
        if any(finding["state"] == "broken" for finding in findings):
            raise typer.Exit(console.EXIT_OTHER)


@app.command(epilog="Example: kvprism policies --json policies.json")
def policies(json: Json = None) -> None:
    """List the policies."""
    with console.one_line_errors(json):
        console.load("kvprism.policies")
        from kvprism.policies import POLICIES

        rows = [
            [name, "exact budget" if row.budgeted else "fixed rate", row.tempo, row.summary]
            for name, row in POLICIES.items()
        ]
        console.table("policies", ["policy", "size", "tempo", "what it sends"], rows, words=True)
        keys = ("policy", "size", "tempo", "summary")
        console.write_json(json, [dict(zip(keys, row, strict=True)) for row in rows])


@evaluate_app.command(
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
    cache_dtype: CacheDtype = "bfloat16",
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
            arms=parse_arms(policy, budget, importance, codec, seed),
            context=context,
            continuation=continuation,
            n_documents=documents,
            seed=seed,
            cache_dtype=cache_dtype,
        )
        measure_and_show(task, records, json)


@evaluate_app.command(
    epilog="Example: kvprism eval needle --length 1024 --distractors 0,3 --records needle.jsonl"
)
def needle(
    model: Model = "tiny",
    length: Annotated[
        str, typer.Option("--length", help="Context tokens, with commas between them.")
    ] = "1024,2048",
    depths: Annotated[
        int, typer.Option("--depths", min=1, help="Depths, evenly spread from start to end.")
    ] = 11,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Cases per depth.")] = 5,
    distractors: Annotated[
        str, typer.Option("--distractors", help="Other facts beside it, with commas between them.")
    ] = "0,3",
    policy: Policies = ALL_POLICIES,
    budget: Budgets = "0.30,0.52",
    haystack: Annotated[
        Path | None, typer.Option("--haystack", help="A text file instead of generated text.")
    ] = None,
    importance: Importance = "attention",
    codec: Codec = "nested",
    cache_dtype: CacheDtype = "bfloat16",
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


@evaluate_app.command(
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
    # Idle OpenMP threads spin by default: with a second worker, or anything else, on the same cores
    # everything takes up to a hundred times longer. Read when torch is loaded; workers inherit it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except SystemExit as done:
        console.end_at_once_if_loading(done.code)
        raise
