"""The command line: thin; every command parses, calls one function and prints its result."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvprism.commands import bench_app, calibrate_app, console, eval_app
from kvprism.commands.options import (
    GROUP,
    AllowRemote,
    BudgetText,
    CacheDtype,
    Chunk,
    Codec,
    DecodeBudget,
    First,
    Importance,
    Json,
    Model,
    NewTokens,
    PolicyName,
    ProfileFile,
    Prompt,
    Seed,
    SideDecodePolicy,
    TokenFile,
)

app = typer.Typer(
    name="kvprism",
    help="Send far fewer KV-cache bytes from prefill to decode, at the same answer quality.",
    epilog="Start with: kvprism demo",
    add_completion=False,
    pretty_exceptions_enable=False,
    **GROUP,
)
app.add_typer(eval_app.app, name="eval")
app.add_typer(bench_app.app, name="bench")


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
    profile: ProfileFile = None,
    cache_dtype: CacheDtype = "bfloat16",
    seed: Seed = 0,
    tokens: First = None,
    chunk: Chunk = None,
    new_tokens: NewTokens = 32,
    transport: Annotated[
        str,
        typer.Option("--transport", help="What carries the cache: tcp, or shm: shared memory."),
    ] = "tcp",
    save: Annotated[
        Path | None, typer.Option("--save", help="Also save the stream here, mode 0600.")
    ] = None,
    json: Json = None,
) -> None:
    """Prefill a file, send its cache to another process, go on there."""
    with console.one_line_errors(json, save):
        from kvprism.integrations.worker import ANYWHERE, place_of, worker_pair

        places = ANYWHERE, place_of(transport)
        with (
            console.status("starting a prefill and a decode worker") as say,
            worker_pair(model, cache_dtype, profile, places) as pair,
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
                profile=profile,
                chunk=chunk,
            )
        show_transfer(result)
        console.write_json(json, result)


@app.command(
    epilog="Example: kvprism prefill --file prompt.txt --to 127.0.0.1:7000 --token-file token "
    "--policy spectrum --budget 30%"
)
def prefill(
    file: Prompt,
    to: Annotated[
        str,
        typer.Option(
            "--to", help="HOST:PORT, or shm:PORT, that kvprism decode says it listens on."
        ),
    ],
    token_file: TokenFile,
    model: Model = "tiny",
    policy: PolicyName = "spectrum",
    budget: BudgetText = None,
    importance: Importance = "attention",
    codec: Codec = "nested",
    profile: ProfileFile = None,
    cache_dtype: CacheDtype = "bfloat16",
    seed: Seed = 0,
    tokens: First = None,
    chunk: Chunk = None,
    decode_policy: SideDecodePolicy = "full",
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
                profile=profile,
                decode_policy=decode_policy,
                chunk=chunk,
            )
        show_transfer(result)
        console.write_json(json, result)


@app.command(epilog="Example: kvprism decode --file prompt.txt --port 7000 --token-file token")
def decode(
    file: Prompt,
    token_file: TokenFile,
    model: Model = "tiny",
    host: Annotated[
        str,
        typer.Option(
            "--host", help="Address to listen on; shm: shared memory, from this machine alone."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: any free one.")
    ] = 0,
    tokens: First = None,
    new_tokens: NewTokens = 32,
    profile: ProfileFile = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, help="Seconds to wait for a cache.")
    ] = 600.0,
    decode_policy: SideDecodePolicy = "full",
    decode_budget: DecodeBudget = None,
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
                profile=profile,
                decode_policy=decode_policy,
                decode_budget=decode_budget,
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
    profile: ProfileFile = None,
    chunk: Chunk = None,
    json: Json = None,
) -> None:
    """Dry run: bytes per tier, smallest budget, time on a link.

    From the model's shape alone: neither weights nor a prompt are needed.
    """
    with console.one_line_errors(json):
        console.load("kvprism.commands.dry_run")
        from kvprism.commands.dry_run import dry_run, show_dry_run

        result = dry_run(model, policy, budget, tokens, link, codec, profile, chunk)
        show_dry_run(result)
        console.write_json(json, result)


@app.command(epilog="Example: kvprism probe tiny --out tiny.profile.json --json probe.json")
def probe(
    model: Annotated[
        str, typer.Argument(help="Built-in model or directory of a local checkpoint.")
    ] = "tiny",
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the profile that both ends share here.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Calibrate on this UTF-8 text instead of generated text."),
    ] = None,
    context: Annotated[
        int, typer.Option("--context", min=64, help="Tokens that hide a needle.")
    ] = 2048,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Does the model tolerate INT4, and if not, why, and what helps?

    SpectrumKV's needle probe as published and in our code, then the attention errors of every
    layer, its outlier key channels and a key conditioning fitted against them; the verdict and the
    conditioning go into the profile.
    """
    with console.one_line_errors(json, out):
        with console.status(f"loading {model}") as say:
            console.load("kvprism.commands.probe")
            from kvprism.commands.probe import run_probe, show_probe

            result = run_probe(model, text, context=context, seed=seed, say=say)
        show_probe(result)
        if out is not None:
            result.profile.save(out)
            console.say(f"profile: {out}; give both ends --profile {out}")
        console.write_json(json, result.json)


app.command(epilog=f"Example: {calibrate_app.EXAMPLE}")(calibrate_app.calibrate)


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


@app.command(hidden=True)
def worker(
    role: str,
    model: Annotated[str, typer.Option("--model")],
    token_file: Annotated[Path, typer.Option("--token-file")],
    cache_dtype: Annotated[str, typer.Option("--cache-dtype")] = "bfloat16",
    profile: Annotated[Path | None, typer.Option("--profile")] = None,
    host: Annotated[str, typer.Option("--host")] = "127.0.0.1",
) -> None:
    """Be the prefill or the decode worker of a parent that speaks JSON lines."""
    from kvprism.integrations.worker import serve

    serve(role, model, token_file, cache_dtype, profile, host)


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
