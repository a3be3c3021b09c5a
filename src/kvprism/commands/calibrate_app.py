"""`kvprism calibrate`: its options, as light to import as `cli.py`."""

from pathlib import Path
from typing import Annotated

import typer

from kvprism.commands import console
from kvprism.commands.options import Json, Seed

EXAMPLE = "kvprism calibrate tiny --text book.txt --out tiny.profile.json --budget 256tok"
PAPER = "streaming-llm,h2o,tova,snapkv,cake,scissorhands"
DecodePhase = Annotated[
    bool,
    typer.Option("--decode", help="Give polykv's routes a decode phase by signals of its own."),
]
Routes = Annotated[
    str,
    typer.Option(
        "--route",
        help="Whose routes: polykv, polykv-best, or polykv by other signals, such as "
        "polykv-cosine-entropy. Those of others stay as the profile has them.",
    ),
]


def calibrate(
    model: Annotated[str, typer.Argument(help="Built-in model or directory of a checkpoint.")],
    text: Annotated[Path, typer.Option("--text", help="A UTF-8 text, not the evaluation's.")],
    out: Annotated[Path, typer.Option("--out", help="The profile; what it holds already is kept.")],
    budget: Annotated[
        str, typer.Option("--budget", help="Tokens a layer on average, with commas between them.")
    ] = "128tok,256tok,512tok",
    context: Annotated[
        int, typer.Option("--context", min=64, help="Tokens of a calibration document.")
    ] = 2048,
    continuation: Annotated[
        int, typer.Option("--continuation", min=1, help="Scored tokens after a text's context.")
    ] = 128,
    documents: Annotated[
        int, typer.Option("--documents", min=2, help="Documents, spread over the text.")
    ] = 8,
    trials: Annotated[int, typer.Option("--trials", min=2, help="Tasks of each kind.")] = 4,
    task: Annotated[
        str | None,
        typer.Option("--task", help="Kinds of task, with commas between them; all when left out."),
    ] = None,
    paper: Annotated[str, typer.Option("--paper", help="Candidate policies of polykv.")] = PAPER,
    policy: Annotated[
        str, typer.Option("--policy", help="Candidate policies of polykv-best.")
    ] = PAPER + ",keydiff,expected-attention,ada-kv,lava,defensivekv",
    singles: Annotated[
        str | None,
        typer.Option("--singles", help="Whole policies, to name the best; all when left out."),
    ] = None,
    preference: Annotated[
        str, typer.Option("--preference", help="polykv's policies by: perplexity or cosine.")
    ] = "perplexity",
    sharing: Annotated[
        str, typer.Option("--sharing", help="polykv's budgets: uniform, entropy or perplexity.")
    ] = "uniform",
    route: Routes = "polykv,polykv-best",
    decode: DecodePhase = False,
    sweeps: Annotated[
        int, typer.Option("--sweeps", min=0, help="Passes of coordinate descent for polykv-best.")
    ] = 2,
    seed: Seed = 0,
    records: Annotated[
        Path | None,
        typer.Option("--records", help="Keep measurements here; by default beside the profile."),
    ] = None,
    json: Json = None,
) -> None:
    """Which eviction policy, and how many tokens, for which layer?

    Measures on a text and on generated tasks what each policy costs in each layer, makes the routes
    of polykv (the paper's algorithm) and polykv-best (an allocator on marginal losses) at every
    budget, and puts them into the profile. Every measurement is kept: the same command resumes.
    """
    with console.one_line_errors(json, out, records):
        console.load("kvprism.commands.calibrate")
        from kvprism.commands.calibrate import Settings, run_calibrate, show_calibrated

        settings = Settings(
            context=context,
            continuation=continuation,
            documents=documents,
            trials=trials,
            tasks=task,
            budgets=budget,
            paper=paper,
            policies=policy,
            singles=singles,
            preference=preference,
            sharing=sharing,
            sweeps=sweeps,
            seed=seed,
            routes=route,
            decode=decode,
        )
        result = run_calibrate(model, text, out, records, settings)
        show_calibrated(result)
        result.profile.save(out)
        console.say(f"profile: {out}; give both ends --profile {out}")
        console.write_json(json, result.json)
