"""The demo's page: what it shows, what it lets through, and words that follow the data."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvprism import report
from kvprism.errors import BadInput
from kvprism.report import demo_figure, tell, write_demo_report

HOSTILE = '<script>alert("1")</script>'
PROMPT = [
    "<|bos|>",
    " The",
    " code",
    " of",
    " Oslo",
    " is",
    " 12",
    " .",
    "\n",
    HOSTILE,
    " &",
    " end",
]
REFERENCE = 1_000_000
TIER_NAMES = {"n": "native", "8": "int8", "4": "int4", ".": "drop"}


def arm(
    label: str, policy: str, fraction: float, letters: str, right: list[bool], kl: float
) -> dict[str, Any]:
    answers = [
        {
            "question": f"Code {i} is",
            "expected": f"1{i}",
            "got": f"1{i} ." if ok else "no",
            "right": ok,
        }
        for i, ok in enumerate(right)
    ]
    phases = {"prefill_ms": 400.0, "plan_ms": 5.25, "encode_ms": 21.5, "transfer_ms": 6.75}
    return {
        "label": label,
        "policy": policy,
        "budget": None if policy == "raw" else f"{100 * fraction:.0f}%",
        "wire_bytes": round(REFERENCE * fraction),
        "fraction": fraction,
        "fraction_native": fraction,
        **phases,
        "decode_ms": 11.5,
        "first_token_ms": 15.5,
        "ttft_ms": sum(phases.values()) + 15.5,
        "second_token_ms": 7.25,
        "answers_right": sum(right),
        "answers_total": len(right),
        "answers": answers,
        "kl_to_raw": kl,
        "tiers": {name: letters.count(letter) for letter, name in TIER_NAMES.items()},
        "tier_of_token": letters,
    }


def example() -> dict[str, Any]:
    return {
        "kind": "demo",
        "model": {
            "name": "tiny",
            "architecture": "LlamaForCausalLM",
            "layers": 4,
            "kv_heads": 2,
            "head_dim": 64,
            "parameters": 3_281_152,
        },
        "context_tokens": len(PROMPT),
        "reference_bytes": REFERENCE,
        "native_bytes": REFERENCE,
        "machine": "a machine with 2 cores",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123abc",
        "versions": {"kvprism": "0.1.0", "torch": "2.13.0"},
        "seconds": 47.2,
        "prompt": list(PROMPT),
        "needles": [
            {
                "key": "Oslo",
                "value": "12",
                "start": 1,
                "stop": 8,
                "line": "The code of Oslo is 12 .",
            }
        ],
        "arms": [
            arm("raw", "raw", 1.0, "n" * 11, [True, True, True], 0.0),
            arm("INT8", "int8", 0.516, "8" * 11, [True, True, True], 7e-6),
            arm("SpectrumKV 30 %", "spectrum", 0.2999, "nn884444444", [True, True, True], 0.00137),
            arm("PDTrim 30 %", "pdtrim", 0.2998, "nn.......nn", [False, True, False], 0.53),
        ],
    }


@pytest.fixture
def result() -> dict[str, Any]:
    return example()


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the unchanged example."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_demo_report(example(), path)
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a browser would see: tags with attributes, table rows as text, tokens, all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.tokens: list[tuple[str, str]] = []
        self.text = ""
        self._open: str | None = None
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._open = tag
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True
        elif tag == "span" and self._inside_tokens() and "data-t" in attributes:
            self.tokens.append((attributes["data-t"] or "", ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = None
        self._in_cell &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._open in ("style", "script"):
            return
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data
        if self.tokens and self._open == "span" and "data-t" in self.tags[-1][1]:
            letter, text = self.tokens[-1]
            self.tokens[-1] = (letter, text + data)

    def _inside_tokens(self) -> bool:
        return any(attributes.get("id") == "tokens" for _, attributes in self.tags)

    def row(self, label: str) -> list[str]:
        """The cells of the first row that begins with `label`, blanks collapsed."""
        cells = next(row for row in self.rows if row and row[0].startswith(label))
        return [" ".join(cell.split()) for cell in cells]


def page_of(result: dict[str, Any], tmp_path: Path) -> Page:
    path = tmp_path / "report.html"
    write_demo_report(result, path)
    return Page(path.read_text(encoding="utf-8"))


def fail(result: dict[str, Any], label: str, error: str) -> None:
    for i, old in enumerate(result["arms"]):
        if old["label"] == label:
            kept = {key: old[key] for key in ("label", "policy", "budget")}
            result["arms"][i] = {**kept, "error": error}


def test_text_from_the_prompt_and_the_model_cannot_become_markup(
    result: dict[str, Any], tmp_path: Path
) -> None:
    result["arms"][3]["label"] = HOSTILE
    result["arms"][3]["answers"][0]["got"] = HOSTILE
    result["needles"][0]["key"] = f'"{HOSTILE}'
    result["machine"] = HOSTILE
    fail(result, "INT8", HOSTILE)
    page = page_of(result, tmp_path)
    assert [tag for tag, _ in page.tags].count("script") == 1  # the page's own
    assert [text for _, text in page.tokens][9] == HOSTILE
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("alert(") >= 5


def test_every_arm_is_shown_with_its_numbers(html: str) -> None:
    page = Page(html)
    assert page.row("INT8")[1:] == ["503.91 KiB516,000 B", "51.6 %", "3 of 3", "7.0 × 10⁻⁶"]
    assert page.row("SpectrumKV")[1:] == ["292.87 KiB299,900 B", "30.0 %", "3 of 3", "0.0014"]
    assert page.row("PDTrim")[1:] == ["292.77 KiB299,800 B", "30.0 %", "1 of 3", "0.53"]
    timings = [row for row in page.rows if "(11.5)" in row]
    assert [row[0] for row in timings] == [arm["label"] for arm in example()["arms"]]
    numbers = ["400", "5.2", "21.5", "6.8", "(11.5)", "15.5", "449", "7.2"]
    assert all(row[1:9] == numbers for row in timings)


def test_answers_are_shown_right_or_wrong_in_words(html: str) -> None:
    row = Page(html).row("Code 2 is")
    assert row == ["Code 2 is", "12", *["✓right: 12 ."] * 3, "✗wrong: no"]


def test_provenance_is_on_the_page(html: str) -> None:
    text = Page(html).text
    for word in ("a machine with 2 cores", "2026-01-02", "0123abc", "torch 2.13.0", "3.3 M"):
        assert word in text


def test_the_page_asks_the_network_for_nothing(html: str) -> None:
    page = Page(html)
    loading = ("src", "href", "xlink:href", "srcset", "action", "data")
    targets = [a[name] or "" for _, a in page.tags for name in loading if name in a]
    assert all(target.startswith("#") for target in targets), targets
    assert re.findall(r"@import|url\((?!#)", html) == []
    assert "default-src 'none'" in html


def test_ids_on_the_page_are_unique(html: str) -> None:
    ids = [a["id"] for _, a in Page(html).tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_headline_praises_the_smallest_arm_that_lost_no_answer(result: dict[str, Any]) -> None:
    story = tell(result)
    assert story.title == "30\u00a0% of the bytes, all 3 answers right"
    assert "SpectrumKV 30 % sent 292.87\u00a0KiB" in story.sentences[0]
    assert "3 of 3 questions correctly, as many as without" in story.sentences[0]
    assert story.sentences[1] == "At about the same bytes: PDTrim 30 % 1 of 3."


def test_the_headline_moves_to_a_larger_arm_when_the_smallest_lost_an_answer(
    result: dict[str, Any],
) -> None:
    result["arms"][2] = arm("SpectrumKV", "spectrum", 0.3, "n" * 11, [True, False, True], 0.1)
    assert tell(result).title == "51.6\u00a0% of the bytes, all 3 answers right"


def test_the_headline_says_when_no_arm_kept_every_answer(result: dict[str, Any]) -> None:
    result["arms"][1:] = [
        arm("A", "int8", 0.516, "8" * 11, [True, False, True], 0.1),
        arm("B", "pdtrim", 0.3, "." * 11, [False, False, True], 0.5),
    ]
    story = tell(result)
    assert story.title == "No compressed arm kept every answer"
    assert story.sentences[0].startswith(
        "Uncompressed: 3 of 3 right. Closest: A, 2 of 3 right at 51.6"
    )


def test_the_headline_claims_no_more_than_raw_can_answer(result: dict[str, Any]) -> None:
    result["arms"] = [
        arm("raw", "raw", 1.0, "n" * 11, [True, True, False], 0.0),
        arm("A", "int4", 0.27, "4" * 11, [True, True, False], 0.1),
        arm("B", "pdtrim", 0.2, "4" * 11, [True, False, True], 0.1),
    ]
    assert tell(result).title == "27\u00a0% of the bytes, no answer lost"


def test_the_headline_says_when_the_model_answers_nothing(result: dict[str, Any]) -> None:
    result["arms"] = [
        arm("raw", "raw", 1.0, "n" * 11, [False], 0.0),
        arm("A", "int4", 0.27, "4" * 11, [False], 0.1),
    ]
    assert tell(result).title == "The model finds no answer even without compression"


def test_a_32_bit_cache_makes_the_headline_name_its_base(result: dict[str, Any]) -> None:
    result["arms"][0] = arm("raw", "raw", 2.0, "n" * 11, [True, True, True], 0.0)
    assert tell(result).title.startswith("30\u00a0% of the 16-bit bytes")


def test_an_arm_with_an_error_is_shown_as_not_measured(
    result: dict[str, Any], tmp_path: Path
) -> None:
    fail(result, "PDTrim 30 %", "BudgetTooSmall: at least 2000 bytes needed")
    page = page_of(result, tmp_path)
    assert "1 of 4 arms was not measured" in page.text
    assert page.row("PDTrim")[1] == "not measured: BudgetTooSmall: at least 2000 bytes needed"
    assert tell(result).title.startswith("30\u00a0%")
    assert "PDTrim" not in " ".join(tell(result).sentences)


@pytest.mark.parametrize("failing", [["raw"], ["raw", "INT8", "SpectrumKV 30 %", "PDTrim 30 %"]])
def test_without_a_measured_raw_arm_nothing_is_claimed(
    result: dict[str, Any], tmp_path: Path, failing: list[str]
) -> None:
    for label in failing:
        fail(result, label, "PeerLost: gone")
    assert tell(result).title == "There is no uncompressed arm to compare with"
    page = page_of(result, tmp_path)
    assert page.text.count("not measured: PeerLost: gone") == len(failing)


def test_every_token_is_shown_at_its_tier_and_the_legend_counts_them(html: str) -> None:
    page = Page(html)
    assert "".join(letter for letter, _ in page.tokens) == "nn884444444" + report.RECOMPUTED
    shown = [text for _, text in page.tokens]
    assert shown == [*PROMPT[:8], "↵\n", *PROMPT[9:]]
    maps = [a["data-letters"] for _, a in page.tags if "data-letters" in a]
    assert maps == [arm["tier_of_token"] for arm in example()["arms"]]
    words = " ".join(page.text.split())
    assert "native2 18.2 % INT82 18.2 % INT47 63.6 % dropped0 0.0 % recomputed1" in words


def test_needles_are_marked_where_they_stand(html: str) -> None:
    marked = re.findall(r"<mark[^>]*>(.*?)</mark>", html, re.DOTALL)
    assert [re.sub("<[^>]*>", "", mark) for mark in marked] == ["".join(PROMPT[1:8])]


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("\x00", "⟨U+0000⟩"),
        ("\u202e", "⟨U+202E⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("\n", "↵\n"),
        ("é", "é"),
    ],
)
def test_characters_that_a_browser_would_obey_are_spelled_out(token: str, shown: str) -> None:
    assert report.visible(token) == shown


def paths_into(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key that the page needs, as a path; only the first item of each list."""
    if isinstance(value, list):
        return paths_into(value[0], (*path, 0)) if value else []
    if not isinstance(value, dict):
        return []
    own = [(*path, key) for key in value if path[-1:] != ("versions",)]
    return own + [deep for key in value for deep in paths_into(value[key], (*path, key))]


def test_a_missing_key_is_named(result: dict[str, Any], tmp_path: Path) -> None:
    paths = paths_into(result)
    assert len(paths) > 45
    for *parents, key in paths:
        broken = copy.deepcopy(result)
        holder: Any = broken
        for parent in parents:
            holder = holder[parent]
        del holder[key]
        with pytest.raises(BadInput, match=f"'{key}'"):
            write_demo_report(broken, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kind", "run", "kind 'demo'"),
        ("context_tokens", 3, "context_tokens is 3"),
        ("needles", [{"key": "k", "value": "v", "start": 5, "stop": 99, "line": ""}], "5 to 99"),
    ],
)
def test_a_result_that_contradicts_itself_is_refused(
    result: dict[str, Any], key: str, value: Any, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        demo_figure({**result, key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kl_to_raw", float("nan"), "kl_to_raw must be a finite number"),
        ("encode_ms", None, "encode_ms must be a finite number"),
        ("answers_right", 2, "claims 2 of 3 answers right, lists 3 of 3"),
        ("tier_of_token", "n" * 10, "got 10 out of 'n'"),
        ("tier_of_token", "x" * 11, "out of 'x'"),
        ("tier_of_token", "8" * 11, "counts 2 native tokens, tier_of_token has 0"),
        ("answers", [], "claims 3 of 3 answers right, lists 0 of 0"),
    ],
)
def test_an_arm_that_contradicts_itself_is_refused(
    result: dict[str, Any], key: str, value: Any, message: str
) -> None:
    result["arms"][2][key] = value
    with pytest.raises(BadInput, match=f"'SpectrumKV 30 %': .*{re.escape(message)}"):
        demo_figure(result)


def test_arms_that_were_asked_different_questions_are_refused(result: dict[str, Any]) -> None:
    result["arms"][2]["answers"][0]["question"] = "Another one?"
    with pytest.raises(BadInput, match="different questions"):
        demo_figure(result)


def test_a_page_is_replaced_at_once_or_not_at_all(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(BadInput):
        write_demo_report({**result, "kind": "run"}, path)
    assert path.read_text() == "old"
    before = path.stat().st_ino
    write_demo_report(result, path)
    assert path.stat().st_ino != before  # a new file took the name; nobody read a half-written one
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_place_that_cannot_be_written_is_bad_input(
    result: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"cannot write .*nowhere"):
        write_demo_report(result, tmp_path / "nowhere" / "report.html")


def test_the_same_result_gives_the_same_page(result: dict[str, Any], tmp_path: Path) -> None:
    pages = [tmp_path / "a.html", tmp_path / "b.html"]
    for path in pages:
        write_demo_report(json.loads(json.dumps(result)), path)
    assert pages[0].read_bytes() == pages[1].read_bytes()


def labels_of(svg: str) -> dict[str, tuple[float, float]]:
    """Every line of text in the figure -> where it starts."""
    found = re.findall(r'translate\(([\d.]+) ([\d.]+)\)"?>([^<]+)</text>', svg)
    return {text: (float(x), float(y)) for x, y, text in found}


@pytest.mark.parametrize("width", [350, 1040])
def test_labels_of_arms_that_nearly_coincide_do_not_overlap(
    result: dict[str, Any], width: int
) -> None:
    result["arms"] = [
        arm(f"arm{i}", "int8", 0.516 + 0.002 * i, "8" * 11, [True, True, True], 7e-6 * (1 + i / 9))
        for i in range(5)
    ]
    places = labels_of(demo_figure(result, width))
    corners = [places[f"arm{i}"] for i in range(5)]
    for i, (x, y) in enumerate(corners):
        assert 0 < x < width
        for other_x, other_y in corners[:i]:  # a label is two lines of 13 pixels, 80 wide
            assert abs(x - other_x) > 70 or abs(y - other_y) > 26


def test_the_figure_takes_its_colours_from_the_page(result: dict[str, Any]) -> None:
    svg = demo_figure(result)
    assert svg.startswith("<svg")
    assert "var(--ink, #1a1d22)" in svg
    assert "SpectrumKV 30 %" in svg
    result["arms"][1]["label"] = "$x_$ <b>"
    assert "$x_$ &lt;b&gt;" in demo_figure(result)


def contrast(first: str, second: str) -> float:
    """The contrast ratio of WCAG 2.2 between two `#rrggbb` colours."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


READABLE = [
    "ink/page",
    "ink/card",
    "ink/wash",
    "muted/page",
    "muted/card",
    "accent/page",
    "bad/card",
]
READABLE += ["bad/bad-wash", "ink/bad-wash", "good/card", "on-native/native", "on-int8/int8"]
READABLE += ["on-int4/int4", "card/fact"]
DISTINCT = ["native/card", "int8-mark/card", "fact/card", "fact/int4", "accent/card"]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_contrast_in_both_schemes(html: str, scheme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    colour = dict(re.findall(r"--([\w-]+): (#\w{6});", blocks[scheme]))
    ratio = {pair: contrast(*(colour[name] for name in pair.split("/"))) for pair in READABLE}
    assert {pair: found for pair, found in ratio.items() if found < 4.5} == {}
    ratio = {pair: contrast(*(colour[name] for name in pair.split("/"))) for pair in DISTINCT}
    assert {pair: found for pair, found in ratio.items() if found < 3} == {}
