"""`kvprism probe`: fit the key conditioning, run the INT4 probe, put both into one profile."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from kvprism.calibrate import Fit, calibrate_conditioning
from kvprism.commands import console
from kvprism.errors import BadInput
from kvprism.evaluate.diagnosis import Errors, LayerDiagnosis, Outlier, percent
from kvprism.evaluate.haystack import generated_ids
from kvprism.evaluate.measure import LoadedModel
from kvprism.evaluate.probe import BUDGET, CONTEXT, ProbeReport, Say, Trials, probe
from kvprism.evaluate.texts import Ids, encode, read_text
from kvprism.integrations.hf import capture, rope_frequencies
from kvprism.profiles import Profile

# The probe's cases are drawn from (the user's seed, the case's number): never from this.
CALIBRATION_SEED = 2**63
PROMPTS, PROMPT_TOKENS, QUERIES = 4, 1024, 128
MOST_CHARACTERS = 64  # of a token, on average
SHOWN_OUTLIERS = 2


class Probed(NamedTuple):
    """What `kvprism probe` found, and the profile that it can write.

    fits: the key conditioning of every layer, by name, `none` where keys stay as they are.
    """

    report: ProbeReport
    profile: Profile
    fits: tuple[str, ...]

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.to_builtins(self.report)
        return found | {"conditioning": list(self.fits), "profile": self.profile.hash.hex()}


def run_probe(
    model: str, text: Path | None = None, *, context: int = CONTEXT, seed: int = 0, say: Say
) -> Probed:
    """Calibrate on `text` (on generated text without one), then probe.

    Raises:
        UnknownName, Unsupported: the model.
        BadInput: the text, or a context that holds no needle.
    """
    if text is not None:
        read_text(text)  # an unreadable file is found before the model is loaded
    return probe_model(LoadedModel.load(model), text, context=context, seed=seed, say=say)


def probe_model(
    subject: LoadedModel,
    text: Path | None = None,
    *,
    context: int = CONTEXT,
    seed: int = 0,
    say: Say,
) -> Probed:
    """`run_probe` on a model that is loaded."""
    fits = calibrate(subject, text, say)
    fitted = Profile(subject.fingerprint, conditioning=tuple(fit.conditioning for fit in fits))
    report = probe(subject, seed, context, fitted, say)
    profile = replace(fitted, probe=report.record)
    return Probed(report, profile, tuple(fit.name for fit in fits))


def calibrate(subject: LoadedModel, text: Path | None, say: Say) -> list[Fit]:
    """The key conditioning of every layer, fitted on `PROMPTS` prompts.

    Raises:
        BadInput: a text that is too short.
        Unsupported: a model whose RoPE cannot be undone.
    """
    frequencies = rope_frequencies(subject.model)  # before minutes of work
    captures = []
    for number, ids in enumerate(_prompts(subject, text), 1):
        say(f"calibration: prompt {number} of {PROMPTS}, {len(ids)} tokens")
        _, view = capture(subject.model, ids, window=QUERIES, cache_dtype=torch.bfloat16)
        captures.append(view)
    fits = []
    for fit in calibrate_conditioning(captures, frequencies):
        fits.append(fit)
        say(f"calibration: key conditioning of layer {len(fits) - 1} of {len(captures[0])}")
    return fits


def _prompts(subject: LoadedModel, text: Path | None) -> Iterator[torch.Tensor]:
    """Token ids of each calibration prompt, behind the begin-of-text token."""
    bos = [t for t in [subject.tokenizer.bos_token_id] if t is not None]
    length = min(PROMPT_TOKENS, subject.model.config.max_position_embeddings) - len(bos)
    if text is None:
        rng = np.random.default_rng(CALIBRATION_SEED)
        found = generated_ids(subject.tokenizer, PROMPTS * length, rng)
        windows = np.split(found[: PROMPTS * length], PROMPTS)
    else:
        windows = _windows(subject, text, length)
    for ids in windows:
        yield torch.tensor([*bos, *ids])


def _windows(subject: LoadedModel, text: Path, length: int) -> list[Ids]:
    """`PROMPTS` windows of `length` tokens, spread evenly over the text."""
    whole = read_text(text)
    part = len(whole) // PROMPTS
    # A long text need not become tokens as a whole: that takes longer than all of the probe.
    pieces = [whole[i * part :][: min(part, MOST_CHARACTERS * length)] for i in range(PROMPTS)]
    windows = [encode(subject.tokenizer, piece)[:length] for piece in pieces]
    shortest = min(len(ids) for ids in windows)
    if shortest < length:
        raise BadInput(
            f"{text}: one of {PROMPTS} equal parts has {shortest} tokens, calibration takes "
            f"{length} of each; give a longer text, or none to calibrate on generated text"
        )
    return windows


def show_probe(result: Probed) -> None:
    """Print the needles, the layers and the verdict."""
    report = result.report
    depths = ", ".join(f"{depth:.2f}" for depth in report.depths)
    title = f"INT4 probe of {report.model}: {report.context} tokens, needles at depths {depths}"
    columns = ["cache", "needles", "of 16-bit", "KL to raw x1000", "INT4"]
    console.table(title, columns, _needle_lines(report))
    if report.context < report.context_wanted:
        console.say(
            f"shortened from {report.context_wanted} tokens: the model has no more positions\n"
        )
    columns = ["layer", "setting", "keys", "values", "attention output", "KL", "conditioned"]
    lines = [_layer_line(*pair) for pair in zip(report.layers, result.fits, strict=True)]
    title = "errors at INT4, and at INT8 below; attention under the prompt's last queries"
    console.table(title, [*columns, "outlier key channels"], lines)
    console.say(f"verdict: {report.verdict}. {report.reason}")
    console.say(f"recommended: {report.recommended}")
    if report.keeps_all_from is not None:
        console.say(f"from {report.keeps_all_from:.0%} of 16 bits on it drops no token")


def _needle_lines(report: ProbeReport) -> Iterator[list[str]]:
    arms = {
        f"published: greedy, nominal {BUDGET:.2f}": report.published,
        f"spectrum {BUDGET:.2f}": report.ours,
        f"spectrum-conditioned {BUDGET:.2f}": report.conditioned,
        f"{report.policy} {BUDGET:.2f}": report.confirmed,
    }
    yield ["16 bits", str(report.raw), console.percent(1), "0", ""]
    for name, trials in arms.items():
        if trials is not None:
            yield [name, *_trial_cells(trials)]


def _trial_cells(trials: Trials) -> list[str]:
    kl = f"{1000 * trials.kl:.4g}"
    return [str(trials), console.percent(trials.fraction), kl, trials.int4]


def _layer_line(layer: LayerDiagnosis, fit: str) -> list[str]:
    return [
        str(layer.layer),
        layer.setting,
        *(_pair(layer, name) for name in ("keys", "values", "output")),
        f"{layer.int4.kl:.3g}\n{layer.int8.kl:.3g}",
        "" if layer.conditioned is None else f"{percent(layer.conditioned.output)}\n{fit}",
        _outliers(layer.outliers),
    ]


def _pair(layer: LayerDiagnosis, name: str) -> str:
    of: list[Errors] = [layer.int4, layer.int8]
    return "\n".join(percent(getattr(errors, name)) for errors in of)


def _outliers(outliers: tuple[Outlier, ...]) -> str:
    """Such as `h0 c3 x40, h1 c35 x36`, and how many more."""
    shown = ", ".join(f"h{o.head} c{o.channel} x{o.ratio:.0f}" for o in outliers[:SHOWN_OUTLIERS])
    more = len(outliers) - SHOWN_OUTLIERS
    return f"{shown}\nand {more} more" if more > 0 else shown
