"""The commands of `kvprism bench`. Light, as cli.py is: heavy imports inside the commands."""

from pathlib import Path
from typing import Annotated

import typer

from kvprism.commands import console
from kvprism.commands.options import (
    GROUP,
    Budgets,
    CacheDtype,
    Json,
    Model,
    Policies,
    names,
    numbers,
)

app = typer.Typer(help="Measure speed.", **GROUP)

Mib = Annotated[
    str, typer.Option("--mib", help="Sizes of the cache in MiB, with commas between them.")
]


@app.command(epilog="Example: kvprism bench codec --mib 256 --json codec.json")
def codec(
    mib: Mib = "1,16,256",
    threads: Annotated[
        str, typer.Option("--threads", help="Threads of the codec, with commas between them.")
    ] = "1,2",
    dtype: CacheDtype = "bfloat16",
    channels: Annotated[int, typer.Option("--channels", min=2, help="Channels of a head.")] = 128,
    code: Annotated[
        str,
        typer.Option(
            "--codec",
            help="Codes, with commas between them: nested, published, affine, hadamard, grouped, "
            "kivi (of keys), fp8.",
        ),
    ] = "nested",
    repeats: Annotated[
        int, typer.Option("--repeats", min=15, help="Times that codec and copy take turns.")
    ] = 15,
    json: Json = None,
) -> None:
    """INT8 and INT4, encode and decode, against a copy of the same bytes.

    Every result is compared with the reference before it is timed; codec and memcpy take turns, and
    the ratio is the median over the turns. The roofline counts bytes read and written.
    """
    with console.one_line_errors(json):
        console.load("kvprism.commands.bench")
        from kvprism.commands.bench import run_bench, show_bench, with_provenance

        sizes, counts = numbers(mib, "--mib"), numbers(threads, "--threads")
        with console.progress("cases") as advance:
            rows = run_bench(sizes, counts, dtype, channels, repeats, advance, names(code))
        show_bench(rows)
        console.write_json(json, with_provenance(rows))


@app.command(epilog="Example: kvprism bench transport --mib 8,64 --json transport.json")
def transport(
    mib: Mib = "8,64",
    repeats: Annotated[
        int, typer.Option("--repeats", min=2, help="Requests over each transport, in turn.")
    ] = 15,
    json: Json = None,
) -> None:
    """TCP on loopback beside shared memory, two processes.

    Raw caches, compared with what was sent before they are timed; the gain is the median over the
    turns. A plain copy of as many bytes stands beside it: the receiver makes one.
    """
    with console.one_line_errors(json):
        console.load("kvprism.commands.bench_transport")
        from kvprism.commands.bench import with_provenance
        from kvprism.commands.bench_transport import bench_transport, show_transport

        with console.progress("sizes") as advance:
            rows = bench_transport(numbers(mib, "--mib"), repeats, advance)
        show_transport(rows)
        console.write_json(json, with_provenance(rows))


@app.command(
    epilog="Example: kvprism bench ttft --context 4096 --link 0.05Gbps,1Gbps --json ttft.json"
)
def ttft(
    model: Model = "tiny",
    context: Annotated[
        str, typer.Option("--context", help="Prompt tokens, with commas between them.")
    ] = "4096",
    link: Annotated[
        str,
        typer.Option(
            "--link",
            help="Link speeds, with commas between them; prefill: the one on which raw transfer "
            "takes as long as a prefill.",
        ),
    ] = "0.05Gbps,0.1Gbps,0.2Gbps,1Gbps",
    policy: Policies = "raw,int8,spectrum-layer,spectrum,pdtrim",
    budget: Budgets = "0.30,0.52",
    repeats: Annotated[
        int, typer.Option("--repeats", min=2, help="Requests of every arm on every link.")
    ] = 30,
    shaping: Annotated[
        str,
        typer.Option(
            "--shaping",
            help="What slows the link: tc (network namespaces, needs root), pacing (the sender's "
            "kernel), none, or auto: tc where it works, else pacing.",
        ),
    ] = "auto",
    pin: Annotated[
        bool, typer.Option(help="Pin each worker to a core, of those that are allowed here.")
    ] = True,
    chunk: Annotated[
        int | None,
        typer.Option(
            "--chunk",
            min=1,
            help="Also prefill in chunks of so many tokens, for policies that wait for the whole "
            "prompt otherwise: a chunk leaves while the next is computed.",
        ),
    ] = None,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Add a model of Llama-3.1-8B and 70B; labelled.")
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw a PNG here.")] = None,
    json: Json = None,
) -> None:
    """Time to first token in two processes over a shaped link, phase by phase.

    Every arm is warm and takes turns with the others; p50 and p95 over the repeats, beside the
    bound that this link sets, and where compression loses.
    """
    with console.one_line_errors(json, plot):
        console.load("kvprism.commands.bench_ttft")
        from kvprism.commands.bench_ttft import bench_ttft, show_ttft

        result = bench_ttft(
            model,
            numbers(context, "--context"),
            policy,
            budget,
            link,
            repeats=repeats,
            shaping=shaping,
            pin=pin,
            extrapolate=extrapolate,
            chunk=chunk,
        )
        show_ttft(result)
        console.write_json(json, result)
        if plot is not None:
            from kvprism.plots import write_ttft_plot

            write_ttft_plot(result["rows"], plot)


@app.command(epilog="Example: kvprism bench plan --tokens 4096,131072 --policy spectrum,ada-kv")
def plan(
    tokens: Annotated[
        str, typer.Option("--tokens", help="Prompt tokens, with commas between them.")
    ] = "4096,8192,16384,32768,65536,131072",
    policy: Policies = "spectrum,spectrum-layer,snapkv,ada-kv",
    budget: Annotated[str, typer.Option("--budget", help="As a fraction, or in bytes.")] = "0.30",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Plans of each kind.")] = 3,
    json: Json = None,
) -> None:
    """What ranking and solving cost as the prompt grows, on drawn scores.

    For the built-in model's shape and an 8B model's. What scores cost is in `bench ttft`.
    """
    with console.one_line_errors(json):
        console.load("kvprism.commands.bench_plan")
        from kvprism.commands.bench_plan import bench_plan, show_plan

        with console.progress("plans") as advance:
            result = bench_plan(numbers(tokens, "--tokens"), policy, budget, repeats, advance)
        show_plan(result["rows"])
        console.write_json(json, result)
