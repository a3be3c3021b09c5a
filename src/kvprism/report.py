"""The demo's result as one self-contained HTML page: plain data in, a file out."""

import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import category

import matplotlib
from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from kvprism.errors import BadInput

Row = Mapping[str, Any]


class TierStyle(NamedTuple):
    """How one tier is called: letter in `tier_of_token`, key in `tiers`, name on the page, bits."""

    letter: str
    key: str
    name: str
    bits: int


TIERS = (
    TierStyle("n", "native", "native", 16),
    TierStyle("8", "int8", "INT8", 8),
    TierStyle("4", "int4", "INT4", 4),
    TierStyle(".", "drop", "dropped", 0),
)
# The decode worker recomputes the last prompt position, so its row may be absent from the cache.
RECOMPUTED = "r"
PHASES = ("prefill", "plan", "encode", "transfer", "decode", "first_token")
# Decode runs at the receiver while layers are still being encoded and sent: no part of the total.
AFTER_PREFILL = ("plan", "encode", "transfer", "first_token")

MODEL_KEYS = ("name", "architecture", "layers", "kv_heads", "head_dim", "parameters")
RESULT_KEYS = (
    *("model", "context_tokens", "reference_bytes", "native_bytes", "machine", "date", "commit"),
    *("versions", "seconds", "prompt", "needles", "arms"),
)
NEEDLE_KEYS = ("key", "value", "start", "stop", "line")
ANSWER_KEYS = ("question", "expected", "got", "right")
NUMBER_KEYS = (
    *("wire_bytes", "fraction", "fraction_native", "answers_right", "answers_total", "kl_to_raw"),
    *(f"{phase}_ms" for phase in (*PHASES, "ttft", "second_token")),
)
MEASURED_KEYS = (*NUMBER_KEYS, "answers", "tiers", "tier_of_token")

NEAR_BYTES = 0.02  # arms whose fractions differ by less are "at about the same bytes"


def write_demo_report(result: Row, path: Path) -> None:
    """Write the page of `kvprism demo`: complete or not at all.

    Raises:
        BadInput: a key is missing, a value contradicts another one, or the file cannot be written.
    """
    page = _page(result)
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error


def demo_figure(result: Row, width: int = 1040, height: int = 460) -> str:
    """Quality against bytes as an SVG of `width` x `height` pixels: one mark per measured arm.

    Text stays text, and colours are CSS variables with light fall-backs: a page may restyle both.

    Raises:
        BadInput: as `write_demo_report`.
    """
    _check(result)
    salt = f"kvprism-{width}"  # ids must differ between two figures on one page
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 13}):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _draw(axes, [arm for arm in result["arms"] if "error" not in arm], narrow=width < 600)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _themed(file.getvalue())


def _page(result: Row) -> str:
    _check(result)
    story = tell(result)
    measured = [arm for arm in result["arms"] if "error" not in arm]
    shown = story.hero or measured[0] if measured else None
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        size=size, percent=percent, kl=kl_text, ms=ms, visible=visible, count="{:,}".format
    )
    source = files("kvprism").joinpath("report.html.j2").read_text("utf-8")
    return environment.from_string(source).render(
        result=result,
        story=story,
        measured=measured,
        shown=shown,
        passages=list(_passages(result, shown)),
        figures=[demo_figure(result), demo_figure(result, 350, 460)] if measured else [],
        tiers=TIERS,
        phases=PHASES,
        after_prefill=AFTER_PREFILL,
        strip=_strip,
        full_fraction=max([1.0, *(arm["fraction"] for arm in measured)]),
        full_ms=max([after_prefill_ms(arm) for arm in measured], default=0) or 1.0,
        native_differs=result["native_bytes"] != result["reference_bytes"],
        recomputed=RECOMPUTED,
    )


def _check(result: Row) -> None:
    _require(result, ("kind", *RESULT_KEYS), "the demo's result")
    if result["kind"] != "demo":
        raise BadInput(f"a demo report needs a result of kind 'demo', got {result['kind']!r}")
    _require(result["model"], MODEL_KEYS, "the demo's model")
    if len(result["prompt"]) != result["context_tokens"]:
        raise BadInput(
            f"prompt has {len(result['prompt'])} tokens, but context_tokens is "
            f"{result['context_tokens']}"
        )
    _check_needles(result)
    for arm in result["arms"]:
        _require(arm, ("label", "policy", "budget"), "an arm")
        if "error" not in arm:
            _check_arm(arm, result["context_tokens"])
    questions = {arm["label"]: _questions(arm) for arm in result["arms"] if "error" not in arm}
    if len(set(questions.values())) > 1:
        raise BadInput(f"the arms were asked different questions: {', '.join(questions)}")


def _check_needles(result: Row) -> None:
    end = 0
    for needle in sorted(result["needles"], key=lambda needle: int(needle.get("start", 0))):
        _require(needle, NEEDLE_KEYS, "a needle")
        if not end <= needle["start"] < needle["stop"] <= result["context_tokens"]:
            raise BadInput(
                f"needle {needle['key']!r} spans tokens {needle['start']} to {needle['stop']}: "
                f"expected a span of its own within {result['context_tokens']} tokens"
            )
        end = needle["stop"]


def _check_arm(arm: Row, tokens: int) -> None:
    name = f"arm {arm['label']!r}"
    _require(arm, MEASURED_KEYS, name)
    for key in NUMBER_KEYS:
        if not isinstance(arm[key], int | float) or not math.isfinite(arm[key]):
            raise BadInput(f"{name}: {key} must be a finite number, got {arm[key]!r}")
    for answer in arm["answers"]:
        _require(answer, ANSWER_KEYS, f"an answer of {name}")
    counts = (sum(bool(answer["right"]) for answer in arm["answers"]), len(arm["answers"]))
    if counts != (arm["answers_right"], arm["answers_total"]):
        raise BadInput(
            f"{name}: claims {_score(arm)} answers right, lists {counts[0]} of {counts[1]}"
        )
    _require(arm["tiers"], [tier.key for tier in TIERS], f"tiers of {name}")
    letters = arm["tier_of_token"]
    if tokens - len(letters) not in (0, 1) or not set(letters) <= {tier.letter for tier in TIERS}:
        raise BadInput(
            f"{name}: tier_of_token must be {tokens} letters out of 'n84.' (one fewer if the last "
            f"token is recomputed), got {len(letters)} out of {''.join(sorted(set(letters)))!r}"
        )
    for tier in TIERS:
        if letters.count(tier.letter) != arm["tiers"][tier.key]:
            raise BadInput(
                f"{name}: tiers counts {arm['tiers'][tier.key]} {tier.key} tokens, tier_of_token "
                f"has {letters.count(tier.letter)}"
            )


def _require(mapping: Row, keys: Sequence[str], name: str) -> None:
    missing = [key for key in keys if key not in mapping]
    if missing:
        raise BadInput(f"{name} lacks {', '.join(map(repr, missing))}")


def _questions(arm: Row) -> tuple[tuple[str, str], ...]:
    return tuple((answer["question"], answer["expected"]) for answer in arm["answers"])


@dataclass(frozen=True)
class Story:
    """The page's first words, derived from the data; `hero` is the arm that they are about."""

    title: str
    sentences: tuple[str, ...]
    raw: Row | None
    hero: Row | None
    failures: tuple[Row, ...]


def tell(result: Row) -> Story:
    """Choose the smallest arm that lost no answer, or say in plain words that there is none."""
    measured = [arm for arm in result["arms"] if "error" not in arm]
    failures = tuple(arm for arm in result["arms"] if "error" in arm)
    raw = next((arm for arm in measured if arm["policy"] == "raw"), None)
    if raw is None:
        title = "There is no uncompressed arm to compare with"
        return Story(title, ("Bytes and answers below stand alone.",), None, None, failures)
    smaller = [arm for arm in measured if arm["wire_bytes"] < raw["wire_bytes"]]
    kept = [arm for arm in smaller if _keeps_answers(arm, raw)]
    if not smaller:
        title, hero, words = "No compressed arm was measured", None, []
    elif not raw["answers_right"]:
        title = "The model finds no answer even without compression"
        hero, words = None, ["So the answers cannot compare the arms; only KL to raw can."]
    elif kept:
        hero = min(kept, key=lambda arm: (arm["wire_bytes"], arm["kl_to_raw"]))
        title, words = _title(hero, raw), _success(hero, raw, smaller)
    else:
        hero = min(smaller, key=lambda arm: (-arm["answers_right"], arm["wire_bytes"]))
        title = "No compressed arm kept every answer"
        words = [
            f"Uncompressed: {_score(raw)} right. Closest: {hero['label']}, {_score(hero)} right at "
            f"{percent(hero['fraction'])} of the 16-bit bytes."
        ]
    return Story(title, tuple(words), raw, hero, failures)


def _keeps_answers(arm: Row, raw: Row) -> bool:
    pairs = zip(arm["answers"], raw["answers"], strict=True)
    return all(mine["right"] or not theirs["right"] for mine, theirs in pairs)


def _title(hero: Row, raw: Row) -> str:
    share = percent(hero["fraction"]).replace(".0\u00a0", "\u00a0")
    # With a 32-bit cache the uncompressed arm sends twice the 16-bit bytes: say which are meant.
    what = "bytes" if abs(raw["fraction"] - 1) < NEAR_BYTES else "16-bit bytes"
    if hero["answers_right"] == hero["answers_total"]:
        return f"{share} of the {what}, all {hero['answers_total']} answers right"
    return f"{share} of the {what}, no answer lost"


def _success(hero: Row, raw: Row, arms: Sequence[Row]) -> list[str]:
    equal = hero["answers_right"] == raw["answers_right"]
    sentences = [
        f"{hero['label']} sent {size(hero['wire_bytes'])} of KV cache where the uncompressed one "
        f"takes {size(raw['wire_bytes'])}. The process that received it answered {_score(hero)} "
        f"questions correctly, {'as many as' if equal else _score(raw)} without compression."
    ]
    worse = [
        f"{arm['label']} {_score(arm)}"
        for arm in arms
        if abs(arm["fraction"] - hero["fraction"]) < NEAR_BYTES
        and arm["answers_right"] < hero["answers_right"]
    ]
    if worse:
        sentences.append(f"At about the same bytes: {', '.join(worse)}.")
    return sentences


def _score(arm: Row) -> str:
    return f"{arm['answers_right']} of {arm['answers_total']}"


def after_prefill_ms(arm: Row) -> float:
    return sum(float(arm[f"{phase}_ms"]) for phase in AFTER_PREFILL)


def size(nbytes: float) -> str:
    """`1234567` -> `1.18 MiB`; the space does not break."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f}\u00a0B" if unit == "B" else f"{nbytes:.2f}\u00a0{unit}"
        nbytes /= 1024
    return f"{nbytes:.2f}\u00a0GiB"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}\u00a0%"


def ms(value: float) -> str:
    """One decimal where it says something."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def kl_text(nats: float) -> str:
    """Two significant digits; powers of ten where a row of zeros would hide them."""
    if abs(nats) < 1e-12:
        return "0"
    if 1e-3 <= abs(nats) < 100:
        return f"{nats:.2g}"
    digits, exponent = f"{nats:.1e}".split("e")
    return f"{digits}\u00a0×\u00a0{power_of_ten(int(exponent))}"


def power_of_ten(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def visible(text: str) -> str:
    """`text` with every character that a browser would swallow, or obey, spelled out."""
    return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥\t"
    # Controls, directional marks, surrogates, unassigned code points.
    return f"⟨U+{ord(character):04X}⟩" if category(character)[0] == "C" else character


class Passage(NamedTuple):
    """Consecutive tokens, either of one needle or of none: (text, tier letter) each."""

    needle: Row | None
    number: int
    tokens: list[tuple[str, str]]


def _passages(result: Row, arm: Row | None) -> Iterator[Passage]:
    letters = "" if arm is None else arm["tier_of_token"]
    letters = letters.ljust(len(result["prompt"]), RECOMPUTED)
    tokens = list(zip(result["prompt"], letters, strict=True))
    end = 0
    needles = sorted(result["needles"], key=lambda needle: int(needle["start"]))
    for number, needle in enumerate(needles, 1):
        yield Passage(None, 0, tokens[end : needle["start"]])
        yield Passage(needle, number, tokens[needle["start"] : needle["stop"]])
        end = needle["stop"]
    yield Passage(None, 0, tokens[end:])


def _strip(letters: str) -> dict[str, str]:
    """SVG path per tier letter: a box per run of tokens, 1 wide per token and 1 high per bit."""
    bits = {tier.letter: tier.bits for tier in TIERS}
    paths = {tier.letter: "" for tier in TIERS if tier.bits}
    start = 0
    for letter, run in groupby(letters):
        length = len(list(run))
        if bits[letter]:
            paths[letter] += f"M{start} 16v-{bits[letter]}h{length}v{bits[letter]}z"
        start += length
    return paths


# matplotlib writes literal colours; these stand for CSS variables, which `_themed` puts in.
INK, MUTED, GRID, ACCENT = "#1a1d22", "#5a626c", "#dcddd8", "#2f4b8f"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", ACCENT: "accent"}


def _themed(svg: str) -> str:
    """The bare `<svg>` element, coloured by CSS variables."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Groups are named alike in every figure, and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name}, {colour})")
    return svg


def _draw(axes: Axes, arms: Sequence[Row], narrow: bool) -> None:
    floor = _kl_floor(arms)
    _draw_axes(axes, arms, floor, narrow)
    points = [(arm["fraction"], max(arm["kl_to_raw"], floor)) for arm in arms]
    for arm, (x, y) in zip(arms, points, strict=True):
        kept = arm["answers_right"] == max(other["answers_right"] for other in arms)
        face = ACCENT if kept else "none"
        axes.plot(x, y, "o", ms=9, mfc=face, mec=ACCENT, mew=2, zorder=3, clip_on=False)
    _place_labels(axes, arms, points)


def _kl_floor(arms: Sequence[Row]) -> float:
    """Where the logarithmic axis shows a KL of 0: one to two decades below the smallest other."""
    positive = [arm["kl_to_raw"] for arm in arms if arm["kl_to_raw"] > 1e-12]
    return float(10.0 ** (math.floor(math.log10(min(positive, default=1e-4))) - 1))


def _draw_axes(axes: Axes, arms: Sequence[Row], floor: float, narrow: bool) -> None:
    top = max([10 * floor, *(arm["kl_to_raw"] for arm in arms)])
    decades = range(round(math.log10(floor)) + 1, math.ceil(math.log10(top)) + 1)
    axes.set_yscale("log")
    axes.set_ylim(floor / 2.5, 10.0 ** decades[-1] * 8)  # the room above holds labels
    axes.set_yticks([floor, *(10.0**n for n in decades)], ["0", *map(power_of_ten, decades)])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, 1.12 * max([1.0, *(arm["fraction"] for arm in arms)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f}\u00a0%"))
    axes.set_xlabel("wire bytes, share of the 16-bit cache", color=MUTED, labelpad=8)
    title = "KL to raw, nats per token" + ("" if narrow else " (logarithmic; 0 = identical)")
    axes.set_title(title, loc="left", color=MUTED, fontsize=13, pad=10)
    axes.grid(color=GRID, linewidth=1)
    axes.axhline(floor, color=MUTED, linewidth=1, linestyle=(0, (4, 4)), zorder=1)
    axes.tick_params(length=0, labelcolor=MUTED, pad=6)
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)


def _place_labels(axes: Axes, arms: Sequence[Row], points: Sequence[tuple[float, float]]) -> None:
    """Put each arm's label at the nearest free place around its mark; a line leads to a far one."""
    axes.figure.canvas.draw()  # settles the layout, which the labels then take as given
    marks = [axes.transData.transform(point) for point in points]
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in marks]
    frame = axes.get_window_extent()
    # From right to left: of two marks that nearly coincide, the right one is labelled on its right.
    pairs = sorted(zip(arms, points, strict=True), key=lambda pair: pair[1], reverse=True)
    for arm, point in pairs:
        text = axes.annotate(
            f"{arm['label']}\n{_score(arm)} right",
            point,
            xytext=(0, 0),
            textcoords="offset pixels",
            color=INK,
            va="center",
            linespacing=1.25,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "shrinkA": 1, "shrinkB": 7},
            in_layout=False,
        )
        box = text.get_window_extent()
        x, y = axes.transData.transform(point)
        place = _free_place(box, (x, y), taken, frame)
        text.set_position((place.x0 - box.x0, place.y0 - box.y0))
        taken.append(place)
        gap = math.hypot(max(place.x0 - x, 0, x - place.x1), max(place.y0 - y, 0, y - place.y1))
        if text.arrow_patch is not None:
            text.arrow_patch.set_visible(gap > 16)


def _free_place(box: Bbox, point: tuple[float, float], taken: Sequence[Bbox], frame: Bbox) -> Bbox:
    """The nearest place for `box` around `point` that covers nothing and stays in the frame."""
    places = [
        Bbox.from_bounds(
            point[0] + dx * (distance + box.width / 2) - box.width / 2,
            point[1] + dy * (distance + box.height / 2) - box.height / 2,
            box.width,
            box.height,
        )
        for distance in range(12, 200, 8)
        for dx, dy in _DIRECTIONS
    ]
    inside = [p for p in places if p.x0 >= frame.x0 and p.x1 <= frame.x1]
    inside = [p for p in inside if p.y0 >= frame.y0 and p.y1 <= frame.y1] or places
    return next((p for p in inside if not p.count_overlaps(taken)), inside[0])


_DIRECTIONS = ((1, 0), (-1, 0), (1, 0.7), (1, -0.7), (-1, 0.7), (-1, -0.7), (0, 1), (0, -1))
