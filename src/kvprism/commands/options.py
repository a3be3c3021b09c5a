"""Options that several commands share. Light: `--help` reads this file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kvprism.errors import BadInput

# What a group of commands is made with. The newest typer imports pydantic, a fifth of a second, to
# convert the absent value of its own --help; a value that is a bool already it takes as it is.
GROUP: dict[str, Any] = {
    "no_args_is_help": True,
    "rich_markup_mode": None,  # plain help: at once, and the same in a terminal and in a log
    "context_settings": {"default_map": {"help": False}},
}

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
Policies = Annotated[
    str,
    typer.Option(
        "--policy",
        help="Policies, with commas between them; spectrum:hadamard is one in another code.",
    ),
]
BudgetText = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="Cap on all wire bytes: 0.30 or 30% of the cache at 16 bits, 512MiB, or 512tok.",
    ),
]
Budgets = Annotated[
    str,
    typer.Option(
        "--budget",
        help="Budgets, with commas between them; floor+0.04 counts from a policy's smallest plan.",
    ),
]
Importance = Annotated[
    str, typer.Option("--importance", help="What ranks tokens: attention, position or norm.")
]
Codec = Annotated[
    str,
    typer.Option(
        "--codec",
        help="The code of INT8 and INT4: nested, conditioned, the papers' published, or for "
        "comparison affine, hadamard, grouped.",
    ),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option(
        "--profile", help="The model's profile; both sides need the same, or none on either side."
    ),
]
CacheDtype = Annotated[
    str,
    typer.Option(
        "--cache-dtype", help="Dtype of the prefill side's cache: bfloat16, float16 or float32."
    ),
]
DecodePolicy = Annotated[
    str | None,
    typer.Option(
        "--decode-policy",
        help="Evict while tokens are generated too: full,h2o has every arm without and with it; "
        "polykv and its like follow the profile's route for the decode budget.",
    ),
]
Chunk = Annotated[
    int | None,
    typer.Option(
        "--chunk",
        min=1,
        help="Prefill N tokens at a time and send each chunk at 4 bits while the next is computed; "
        "upgrades follow the last one, all within the budget.",
    ),
]
SideDecodePolicy = Annotated[
    str,
    typer.Option(
        "--decode-policy",
        help="By what the decode side evicts while it generates, such as h2o; both sides need it.",
    ),
]
DecodeBudget = Annotated[
    str | None,
    typer.Option("--decode-budget", help="What a layer may hold then, such as 256tok."),
]
Protect = Annotated[
    str | None,
    typer.Option(
        "--protect",
        help="4+32: all eviction policies keep the first 4 and the last 32 tokens of a prompt, so "
        "that they differ by their choice alone; by default each keeps its own.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
Records = Annotated[
    Path | None,
    typer.Option("--records", help="Keep every measurement here; the same command resumes."),
]


@dataclass(frozen=True)
class EvaluationOptions:
    """What every evaluation takes: its arms, and where its results go."""

    policy: Policies = "raw,int8,int4,spectrum,sinks-recent,pdtrim,random-drop,random-tiers"
    budget: Budgets = "0.30,0.52"
    importance: Importance = "attention"
    codec: Codec = "nested"
    profile: ProfileFile = None
    cache_dtype: CacheDtype = "bfloat16"
    decode_policy: DecodePolicy = None
    decode_budget: DecodeBudget = None
    protect: Protect = None
    seed: Seed = 0
    records: Records = None
    json: Json = None


def names(text: str) -> list[str]:
    """Names between commas; what is empty is none.

    Example:
        >>> names("int4, spectrum,")
        ['int4', 'spectrum']
    """
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str, what: str) -> list[int]:
    """Whole numbers between commas.

    Example:
        >>> numbers("1024,2048", "--length")
        [1024, 2048]

    Raises:
        BadInput: anything else; names `what` it was meant for.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(f"{what} takes whole numbers such as 1024,2048, got {text!r}") from error
