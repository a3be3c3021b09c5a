"""The INT4 probe: SpectrumKV's three needles, and beyond them why INT4 fails and what helps.

The needles alone do not see everything: a model of which one layer was ruined found all three of
them. The keys' own error misleads: a constant channel of 300 *lowers* it at INT4, from 11 to 7 %,
and ruins the attention. So the verdict has two parts:

1. *The attention errors propose.* A layer's setting is `plain` where INT4 moves the layer's
   attention output, under the prompt's real last queries, by at most `ATTENTION_LIMIT`; else
   `conditioned` where the profile's key conditioning brings it below; else `no-int4`.
2. *The needles confirm.* The proposed settings must find the needles at exact b = 0.30. If they do
   not, plain layers that have a conditioning are conditioned; if that fails too, INT4 is off.

Where the model itself misses a needle at 16 bits the needles confirm nothing: `inconclusive`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import ceil
from typing import Literal

import msgspec
import torch

from kvprism.errors import BadInput
from kvprism.evaluate.arms import sent
from kvprism.evaluate.diagnosis import (
    ATTENTION_LIMIT,
    LayerDiagnosis,
    diagnose,
    percent,
    rounded,
    setting_of,
)
from kvprism.evaluate.haystack import needle_case
from kvprism.evaluate.measure import Case, LoadedModel, check_fits, continue_on, divergence
from kvprism.evaluate.needle import case_of
from kvprism.evaluate.rows import provenance
from kvprism.integrations.hf import capture
from kvprism.planning import DEFAULT_OPTIONS, PlanOptions, plan, plan_shape, smallest_nbytes
from kvprism.profiles import LayerSetting, ProbeRecord, Profile, Verdict
from kvprism.routes import ranges_of
from kvprism.tensors import KeyConditioning, LayerView, RequestKV

CONTEXT = 2048
DEPTHS = (0.25, 0.50, 0.75)
BUDGET = 0.30
# SpectrumKV's probe: at least two of the three trials enable INT4.
ENOUGH = 2
Say = Callable[[str], None]


class Needles(msgspec.Struct, frozen=True):
    """How many of the probe's needles were found, all tokens of the value right."""

    successes: int
    trials: int

    def __str__(self) -> str:
        return f"{self.successes} of {self.trials}"


class Trials(Needles, frozen=True):
    """The needles on a cache that went through the wire.

    int4: `yes` from `ENOUGH` successes on; kl: mean KL(raw || arm) per fed token in nats; fraction:
    wire bytes over the cache at 16 bits.
    """

    int4: Verdict
    kl: float
    fraction: float


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured, and the layers' final settings.

    raw: the needles on the cache at 16 bits; published: SpectrumKV's own probe, greedy at nominal
    b = 0.30 in the published code; ours: `spectrum` at exact b = 0.30 in `kvp.nested/1`;
    conditioned: the same with conditioned keys, null without a conditioning in the profile;
    confirmed: the recommended policy at the same budget. A layer's setting is what it needs:
    `spectrum-adaptive` conditions plain layers that have a conditioning too as soon as one layer
    needs it, because a request has one quantised code.
    """

    raw: Needles
    published: Trials
    ours: Trials
    conditioned: Trials | None
    confirmed: Trials
    layers: tuple[LayerDiagnosis, ...]

    @property
    def settings(self) -> tuple[LayerSetting, ...]:
        return tuple(layer.setting for layer in self.layers)

    @property
    def conclusive(self) -> bool:
        return self.raw.successes == self.raw.trials


class ProbeReport(Evidence, frozen=True, kw_only=True):
    """What the probe found and what follows from it.

    context: tokens, fewer than the `context_wanted` where the model has no more positions; verdict:
    the strictest setting of any layer; keeps_all_from: where layers are without INT4, the least
    budget in whole percent of 16 bits at which the recommended policy drops no token.
    """

    model: str
    seed: int
    context: int
    context_wanted: int
    depths: tuple[float, ...]
    outlier_layers: tuple[int, ...]
    verdict: LayerSetting | Literal["inconclusive"]
    policy: str
    recommended: str
    keeps_all_from: float | None
    reason: str
    commit: str
    versions: dict[str, str]
    kind: str = "probe"

    @property
    def record(self) -> ProbeRecord:
        """The profile's section: the verdicts on the codes that this package sends."""
        return ProbeRecord(
            int4=self.ours.int4,
            conditioned="inconclusive" if self.conditioned is None else self.conditioned.int4,
            settings=self.settings,
            reason=self.reason,
        )


def probe(
    subject: LoadedModel,
    seed: int = 0,
    context: int = CONTEXT,
    profile: Profile | None = None,
    say: Say = lambda _: None,
) -> ProbeReport:
    """Run the published probe, diagnose every layer, and recommend a setting.

    profile: its key conditioning is tried too; other sections do not matter here. A context for
    which the model has no positions is shortened, and the report says so.

    Raises:
        BadInput: a context that holds no needle, or logits that are not finite.
        ProfileMismatch: a profile for another model.
        BudgetTooSmall: heads so small that no policy reaches b = 0.30.
    """
    if profile is not None:
        profile.check(bytes.fromhex(subject.fingerprint))
    cases = _cases(subject, seed, context)
    runs = []
    for number, case in enumerate(cases, 1):
        say(f"needle {number} of {len(cases)}: prefill of {len(case.context)} tokens")
        runs.append(_Run.of(subject, case))
    bench = _Bench(subject, runs, profile or Profile(subject.fingerprint))
    return _report(bench, seed, context, _evidence(bench, say))


@dataclass(frozen=True, eq=False)
class _Run:
    """One case with its cache at 16 bits and the logits `[token, vocabulary]` that it gives."""

    case: Case
    kv: RequestKV
    view: tuple[LayerView, ...]
    logits: torch.Tensor

    @classmethod
    def of(cls, subject: LoadedModel, case: Case) -> "_Run":
        kv, view = capture(subject.model, case.context, cache_dtype=torch.bfloat16)
        logits = continue_on(subject.model, kv, case.fed)
        if not bool(logits.isfinite().all()):
            raise BadInput(f"the logits of {subject.name} are not finite on the probe's text")
        return cls(case, kv, view, logits)

    def found(self, logits: torch.Tensor) -> bool:
        """Greedy decoding gives the hidden value."""
        [answer] = self.case.answers
        chosen = logits[answer.start - 1 : answer.stop - 1].argmax(dim=-1).cpu()
        return torch.equal(chosen, self.case.continuation[answer])


class _Arm(msgspec.Struct, frozen=True):
    """A policy as the probe sends it; `planning.plan` says what the fields mean."""

    policy: str
    budget: float | None = BUDGET
    nominal: bool = False
    options: PlanOptions = DEFAULT_OPTIONS


_PUBLISHED = _Arm("spectrum-greedy", nominal=True, options=PlanOptions(codec="published"))
_OURS = _Arm("spectrum")
_CONDITIONED = _Arm("spectrum-conditioned")


@dataclass(frozen=True, eq=False)
class _Bench:
    """The captured cases, on which arms are tried."""

    subject: LoadedModel
    runs: Sequence[_Run]
    profile: Profile

    @property
    def raw(self) -> Needles:
        return Needles(sum(run.found(run.logits) for run in self.runs), len(self.runs))

    @property
    def conditioning(self) -> tuple[KeyConditioning | None, ...]:
        """Of every layer."""
        return self.profile.conditioning or (None,) * len(self.runs[0].view)

    def following(self, settings: Sequence[LayerSetting]) -> "_Bench":
        """With a profile that `spectrum-adaptive` follows to these settings."""
        record = ProbeRecord(
            int4="inconclusive", conditioned="inconclusive", settings=tuple(settings), reason=""
        )
        return replace(self, profile=replace(self.profile, probe=record))

    def try_arm(self, arm: _Arm) -> Trials:
        found = 0
        kl: list[float] = []
        fractions: list[float] = []
        for run in self.runs:
            restored, fraction = _through_the_wire(run, arm, self.profile)
            logits = continue_on(self.subject.model, restored, run.case.fed)
            found += run.found(logits)
            kl += divergence(run.logits, logits)[0]
            fractions.append(fraction)
        int4 = _int4(found, self.raw)
        return Trials(found, len(self.runs), int4, _mean(kl), _mean(fractions))


def _through_the_wire(run: _Run, arm: _Arm, profile: Profile) -> tuple[RequestKV, float]:
    """What the decode side would hold, and its wire bytes over the cache at 16 bits."""
    chosen = plan(
        run.view,
        arm.policy,
        arm.budget,
        nominal=arm.nominal,
        options=arm.options,
        profile=profile,
    )
    return sent(run.kv, chosen, profile), chosen.fraction


def _int4(found: int, raw: Needles) -> Verdict:
    if raw.successes < raw.trials:
        return "inconclusive"
    return "yes" if found >= ENOUGH else "no"


def _mean(values: Sequence[float]) -> float:
    return rounded(sum(values) / len(values))


def _cases(subject: LoadedModel, seed: int, context: int) -> list[Case]:
    """One needle per depth; as long as asked for, or as long as the model has positions."""
    cases = [_case(subject, seed, context, number) for number in range(len(DEPTHS))]
    room = subject.model.config.max_position_embeddings - max(len(case.fed) for case in cases)
    if room < context:
        cases = [_case(subject, seed, room, number) for number in range(len(DEPTHS))]
    for case in cases:
        check_fits(subject.model, case)
    return cases


def _case(subject: LoadedModel, seed: int, context: int, number: int) -> Case:
    return case_of(needle_case(subject.tokenizer, context, DEPTHS[number], seed=(seed, number)))


def _evidence(bench: _Bench, say: Say) -> Evidence:
    say("SpectrumKV's own probe")
    published = bench.try_arm(_PUBLISHED)
    say("the same needles in kvp.nested/1")
    ours = bench.try_arm(_OURS)
    conditioned = None if bench.profile.conditioning is None else bench.try_arm(_CONDITIONED)
    say("attention errors, layer by layer")
    layers = _diagnose(bench)
    say("the recommended setting")
    known = {_OURS.policy: ours, _CONDITIONED.policy: conditioned}
    settings, confirmed = _settle(bench, layers, known)
    layers = tuple(
        msgspec.structs.replace(layer, setting=setting)
        for layer, setting in zip(layers, settings, strict=True)
    )
    return Evidence(
        raw=bench.raw,
        published=published,
        ours=ours,
        conditioned=conditioned,
        confirmed=confirmed,
        layers=layers,
    )


def _report(bench: _Bench, seed: int, context: int, found: Evidence) -> ProbeReport:
    policy, made_by = _policy(found.settings), provenance(bench.subject.model)
    strictest = max(found.settings, key=_ORDER.index)
    return ProbeReport(
        **msgspec.structs.asdict(found),
        model=bench.subject.name,
        seed=seed,
        context=len(bench.runs[0].case.context),
        context_wanted=context,
        depths=DEPTHS,
        outlier_layers=tuple(layer.layer for layer in found.layers if layer.outliers),
        verdict=strictest if found.conclusive else "inconclusive",
        policy=policy,
        recommended=f"{policy} ({ranges_of(found.settings)})",
        keeps_all_from=_keeps_all_from(bench, policy, found.settings),
        reason=_reason(found),
        commit=made_by.commit,
        versions=made_by.versions,
    )


def _keeps_all_from(bench: _Bench, policy: str, settings: Sequence[LayerSetting]) -> float | None:
    if "no-int4" not in settings:
        return None
    profile, shape = bench.following(settings).profile, bench.runs[0].kv.shape()
    least = smallest_nbytes(shape, policy, profile=profile) / shape.reference_nbytes
    budgets = (whole / 100 for whole in count(ceil(100 * least)))
    plans = ((b, plan_shape(shape, policy, b, profile=profile)) for b in budgets)
    return next(b for b, dry in plans if not dry.histogram()["drop"])


_ORDER: list[LayerSetting] = ["plain", "conditioned", "no-int4"]
_ALONE = {"plain": "spectrum", "conditioned": "spectrum-conditioned", "no-int4": "spectrum-2tier"}


def _policy(settings: Sequence[LayerSetting]) -> str:
    """The policy that does this; where all layers agree it needs no settings in the profile."""
    return _ALONE[settings[0]] if len(set(settings)) == 1 else "spectrum-adaptive"


def _settle(
    bench: _Bench, layers: Sequence[LayerDiagnosis], known: Mapping[str, Trials | None]
) -> tuple[tuple[LayerSetting, ...], Trials]:
    """The first of the proposed settings that the needles do not speak against."""
    for settings in dict.fromkeys(_proposals(bench, layers)):
        policy = _policy(settings)
        trials = known.get(policy) or bench.following(settings).try_arm(_Arm(policy))
        if trials.int4 != "no":
            break
    return settings, trials


def _proposals(
    bench: _Bench, layers: Sequence[LayerDiagnosis]
) -> Iterator[tuple[LayerSetting, ...]]:
    """By the attention errors; with all conditioned that can be; with INT4 off. Ever stricter."""
    settings = tuple(layer.setting for layer in layers)
    yield settings
    stricter: list[LayerSetting] = [
        "conditioned" if setting == "plain" and remedy is not None else setting
        for setting, remedy in zip(settings, bench.conditioning, strict=True)
    ]
    yield tuple(stricter)
    off: LayerSetting = "no-int4"
    yield (off,) * len(layers)


def _diagnose(bench: _Bench) -> tuple[LayerDiagnosis, ...]:
    """Every layer of the middle case, whole at one tier."""
    run = bench.runs[len(bench.runs) // 2]
    arms = {"int8": _Arm("int8", None), "int4": _Arm("int4", None)}
    if any(each is not None for each in bench.conditioning):
        arms["conditioned"] = _Arm("int4", None, options=PlanOptions(codec="conditioned"))
    sent = {tier: _through_the_wire(run, arm, bench.profile)[0] for tier, arm in arms.items()}
    return tuple(
        diagnose(
            view,
            {tier: kv.layers[i] for tier, kv in sent.items()},
            bench.conditioning[i] is not None,
        )
        for i, view in enumerate(run.view)
    )


def _reason(found: Evidence) -> str:
    """The verdict in words, with the figures that it rests on."""
    parts = (_about_needles, _about_attention, _about_outliers, _about_remedy, _about_confirmation)
    return " ".join(filter(None, (about(found) for about in parts)))


def _about_needles(found: Evidence) -> str:
    if not found.conclusive:
        return (
            f"The model itself finds {found.raw} needles at 16 bits, so that they say nothing "
            "about INT4; the settings follow from the attention errors alone."
        )
    return (
        f"INT4 finds {found.published} needles in the published probe and {found.ours} at exact "
        f"b = {BUDGET:.2f} (16 bits: {found.raw})."
    )


def _about_attention(found: Evidence) -> str:
    worst = max(found.layers, key=lambda layer: layer.int4.output)
    above = [layer for layer in found.layers if layer.int4.output > ATTENTION_LIMIT]
    limit = f"the limit of {percent(ATTENTION_LIMIT)}"
    within = f", within {limit}"
    beyond = f"; {len(above)} of {len(found.layers)} layers are above {limit}"
    return (
        f"INT4 moves the attention output by up to {percent(worst.int4.output)} (layer "
        f"{worst.layer}; INT8 {percent(worst.int8.output)}){beyond if above else within}."
    )


def _about_outliers(found: Evidence) -> str:
    outliers = [outlier for layer in found.layers for outlier in layer.outliers]
    if not outliers:
        return ""
    largest = max(outliers, key=lambda outlier: outlier.ratio)
    return f"{len(outliers)} key channels are outliers; the largest is {largest}."


def _about_remedy(found: Evidence) -> str:
    needed = set(found.settings) != {"plain"}
    errors = [layer.conditioned.output for layer in found.layers if layer.conditioned is not None]
    if found.conditioned is None or not errors:
        return "There is no key conditioning to try." if needed else ""
    if needed:
        return (
            f"With conditioned keys the attention output moves by at most {percent(max(errors))}, "
            f"in the layers that have a conditioning, and {found.conditioned} needles are found."
        )
    return (
        f"Conditioned keys would change the KL to raw from {found.ours.kl:.2g} to "
        f"{found.conditioned.kl:.2g} nats per token at the same bytes."
    )


def _about_confirmation(found: Evidence) -> str:
    if not found.conclusive:
        return ""
    proposed = tuple(setting_of(layer.int4, layer.conditioned) for layer in found.layers)
    text = f"The recommended setting finds {found.confirmed}."
    if proposed != found.settings:
        return f"The errors alone would allow {ranges_of(proposed)}; the needles do not. {text}"
    return "" if found.confirmed in (found.ours, found.conditioned) else text
