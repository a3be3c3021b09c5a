"""`kvprism calibrate`: measure layers and routes, put the routes into the profile."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec

from kvprism.commands import console
from kvprism.commands.options import names
from kvprism.errors import BadInput, UnknownName
from kvprism.evaluate.layers import CalibrationSet, LayerLosses, Ledger
from kvprism.evaluate.measure import LoadedModel
from kvprism.evaluate.route_search import (
    BudgetReport,
    Preference,
    RouteSearch,
    Sharing,
    Variant,
    check_decode,
    check_routed,
)
from kvprism.evaluate.tasks import KINDS
from kvprism.evaluate.texts import read_text
from kvprism.evictions import EVICTIONS
from kvprism.profiles import Profile, StoredRoute
from kvprism.routes import Route, line_of

SHOWN = 12


@dataclass(frozen=True)
class Settings:
    """What `kvprism calibrate` was asked for, as the command line has it.

    Raises:
        UnknownName: a signal, a kind of task or a policy that there is not, or one without routes.
        BadInput: budgets that are not in tokens, or a decode phase that no route can have.
    """

    context: int
    documents: int
    trials: int
    tasks: str | None
    budgets: str
    paper: str
    policies: str
    singles: str | None
    preference: str
    sharing: str
    sweeps: int
    continuation: int
    seed: int
    routes: str
    decode: bool = False

    def __post_init__(self) -> None:
        # Errors come before the model is loaded.
        assert self.tokens and self.variant
        for name in self.wanted:
            check_routed(name)
        for name in self.kinds:
            KINDS[name]
        for name in (*names(self.paper), *names(self.policies), *self.whole):
            EVICTIONS[name]
        if self.decode:
            check_decode(self.wanted, names(self.paper))

    @property
    def kinds(self) -> list[str]:
        return list(KINDS) if self.tasks is None else names(self.tasks)

    @property
    def whole(self) -> list[str]:
        """The whole policies of which the best is named."""
        return list(EVICTIONS) if self.singles is None else names(self.singles)

    @property
    def wanted(self) -> list[str]:
        """The policies whose routes are made."""
        return names(self.routes)

    @property
    def tokens(self) -> list[int]:
        """Each budget once, in tokens a layer."""
        found = [re.fullmatch(r"([0-9]+)tok", part.strip()) for part in self.budgets.split(",")]
        numbers = [int(match[1]) for match in found if match is not None]
        if len(numbers) < len(found):
            raise BadInput(
                f"--budget takes tokens a layer such as 128tok,256tok, got {self.budgets!r}"
            )
        return list(dict.fromkeys(numbers))

    @property
    def variant(self) -> Variant:
        for kind, name, known in (
            ("preference", self.preference, get_args(Preference)),
            ("sharing", self.sharing, get_args(Sharing)),
        ):
            if name not in known:
                raise UnknownName(kind, name, list(known))
        return Variant(self.preference, self.sharing)  # type: ignore[arg-type]


class Calibrated(NamedTuple):
    """What `kvprism calibrate` found, and the profile to write."""

    profile: Profile
    routes: list[Route]
    reports: list[BudgetReport]

    @property
    def json(self) -> dict[str, Any]:
        return {
            "kind": "calibrate",
            "profile": self.profile.hash.hex(),
            "routes": [msgspec.to_builtins(StoredRoute.of(route)) for route in self.routes],
            "budgets": msgspec.to_builtins(self.reports),
        }


def run_calibrate(
    model: str, text: Path, out: Path, records: Path | None, settings: Settings
) -> Calibrated:
    """Calibrate, and add the routes to what the profile at `out` holds already.

    records: where measurements are kept, by default beside `out`; the same command goes on there.

    Raises:
        UnknownName, Unsupported: the model.
        BadInput: the text, or records of another run.
        ProfileMismatch: the profile at `out` is of another model.
    """
    read_text(text)  # an unreadable file is found before the model is loaded
    with console.status(f"loading {model}"):
        subject = LoadedModel.load(model)
        profile = Profile.load(out) if out.exists() else Profile(subject.fingerprint)
        profile.check(bytes.fromhex(subject.fingerprint))
        calibration = CalibrationSet(
            subject,
            text,
            context=settings.context,
            continuation=settings.continuation,
            n_documents=settings.documents,
            trials=settings.trials,
            kinds=settings.kinds,
            seed=settings.seed,
        )
        ledger = Ledger(calibration.header, records or out.with_name(out.name + ".records.jsonl"))
    routes, reports = search_of(calibration, ledger, settings).routes()
    return Calibrated(with_routes(profile, routes), routes, reports)


def search_of(calibration: CalibrationSet, ledger: Ledger, settings: Settings) -> RouteSearch:
    """The search that the settings ask for, with progress on stderr."""
    paper, policies = names(settings.paper), names(settings.policies)
    wanted = dict.fromkeys((*paper, *policies, *settings.whole))
    return RouteSearch(
        LayerLosses(calibration, ledger, list(wanted)),
        settings.tokens,
        settings.variant,
        paper,
        policies,
        settings.whole,
        sweeps=settings.sweeps,
        stage=console.progress,
        wanted=settings.wanted,
        decode=settings.decode,
    )


def with_routes(profile: Profile, routes: Sequence[Route]) -> Profile:
    """The profile with these routes; its others, and its other sections, stay.

    Example:
        >>> from kvprism.routes import LayerRoute
        >>> made = Route("polykv", 64, (LayerRoute("tova", 64),))
        >>> len(with_routes(with_routes(Profile("ab" * 32), [made]), [made]).routes)
        1
    """
    kept = {(route.policy, route.tokens): route for route in (*profile.routes, *routes)}
    return replace(profile, routes=tuple(kept[key] for key in sorted(kept)))


def show_calibrated(result: Calibrated) -> None:
    """Print the routes, and what they were chosen from."""
    lines = []
    for r in result.routes:
        lines.append([r.policy, f"{r.tokens}tok", r.note, str(r)])
        if r.decode:
            lines.append(["", "", "its decode phase", line_of(r.decode)])
    console.table("routes", ["policy", "budget", "from", "layers"], lines, words=True)
    for report in result.reports:
        title = (
            f"{report.tokens} tokens a layer: increase of the NLL per token over the full cache, "
            "mean and worst group added"
        )
        tried = sorted(report.candidates, key=lambda candidate: candidate.making)
        rows = [
            [c.name, f"{c.making:.4f}", "" if c.choosing is None else f"{c.choosing:.4f}"]
            for c in tried[:SHOWN]
        ]
        console.table(title, ["tried", "making half", "choosing half"], rows)
        console.say(f"best single policy on both halves: {report.single}")
