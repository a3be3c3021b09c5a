"""LongBench's scores: figures of the libraries that the benchmark scores with, and its own rules.

The figures were computed once by `rouge` 1.0.1, `fuzzywuzzy` 0.18.0 without python-Levenshtein,
`jieba` 0.42.1 and torchmetrics' SQuAD F1. Where `rouge` is installed, it is asked again.
"""

import random
import sys

import pytest

from kvprism.errors import MissingExtra
from kvprism.evaluate import longbench_scores
from kvprism.evaluate.longbench_scores import (
    CHINESE,
    SCORES,
    chinese_segmenter,
    classification,
    code_sim,
    count,
    qa_f1,
    qa_f1_zh,
    retrieval,
    retrieval_zh,
    rouge,
    rouge_zh,
)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1),
        ("an island in the North Sea", "North Sea", 2 * 2 / (4 + 2)),
        ("sea sea sea", "sea", 2 * 1 / (3 + 1)),  # a word counts as often as in both
        ("river-bank", "river bank", 0),
        ("It's", "its", 1),
        ("no", "yes", 0),
        ("the", "a", 0),  # nothing is left of either
        ("", "yes", 0),
    ],
)
def test_qa_f1(prediction: str, answer: str, expected: float) -> None:
    assert qa_f1(prediction, answer) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("the cat sat. it slept", "a cat sat. then it slept", 0.7272727223140496),
        (
            "The bridge is closed. It opens in May. ",
            "It opens in June. The old bridge is closed",
            0.7777777727777778,  # the blank after the last stop is a word
        ),
        ("word word word", "word other word", 0.6666666622222223),
        ("b a c", "a b c", 0.6666666616666668),  # in order
        ("...", "a", 0),
        (" ", "a", 0),
        ("no end", "", 0),
    ],
)
def test_rouge_is_that_of_the_library(prediction: str, answer: str, expected: float) -> None:
    assert rouge(prediction, answer) == pytest.approx(expected, abs=1e-14)


def test_rouge_against_the_library_itself() -> None:
    library = pytest.importorskip("rouge", reason="needs rouge, of the dependency group `test`")
    scorer = library.Rouge(metrics=["rouge-l"])
    rng, words = random.Random(0), ["the", "a", "cat", ".", "it", ",", "the.", ".end", "by\n", ""]
    for _ in range(300):
        prediction, answer = (
            "x" + " ".join(rng.choice(words) for _ in range(rng.randrange(30))) for _ in range(2)
        )
        expected = scorer.get_scores(prediction, answer)[0]["rouge-l"]["f"]
        assert rouge(prediction, answer) == pytest.approx(expected, abs=1e-14)


def test_rouge_of_sentences_on_which_the_library_runs_out_of_stack() -> None:
    text = " ".join(str(i) for i in range(1200))
    assert rouge(text, text) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("return side * 3", "    return side ** 3", 0.86),
        ("    return x/2\nreturn 3", "    return x / 2", 0.93),  # the first line alone
        ("x = 1", "y = 2", 0.6),
        ("\n\nx = 1", "x = 1", 1),
        ("```python\n# half of it\n// or so\nx = 1", "x = 1", 1),
        ("# only a comment", "x = 1", 0),
        ("", "a", 0),
    ],
)
def test_code_sim(prediction: str, answer: str, expected: float) -> None:
    assert code_sim(prediction, answer) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Location", "Location", 1),
        ("It is a Location.", "Location", 1),
        ("Animal or Location", "Location", 1 / 2),
        ("Animal", "Location", 0),
        ("something", "Location", 0),
        ("Other Location", "Other Location", 1),  # "Location" is a part of it, and does not count
    ],
)
def test_classification(prediction: str, answer: str, expected: float) -> None:
    classes = ["Animal", "Location", "Other Location"]
    assert classification(prediction, answer, classes) == expected


def test_a_removed_class_hides_the_next_from_the_rule_as_in_the_benchmark() -> None:
    assert classification("Other Location", "Other Location", ["Loc", "Location"]) == 0
    names = ["Loc", "Location", "Other Location"]
    assert classification("Other Location", "Other Location", names) == 1 / 2


def test_numbers_are_shared_by_all_that_are_named() -> None:
    assert retrieval("Paragraph 3", "Paragraph 3") == 1
    assert retrieval("It is 3, not 13, not 30.", "Paragraph 3") == pytest.approx(1 / 3)
    assert retrieval("Paragraph three", "Paragraph 3") == 0
    assert retrieval_zh("段落3", "段落3") == 1
    assert retrieval_zh("第3段或第4段", "段落3") == 1 / 2
    assert count("There are 4 of 4", "4") == 1
    assert count("04", "4") == 0
    assert count("many", "4") == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "f1", "rouge_l"),
    [
        ("看守人的女儿点亮了灯。", "灯是他的女儿点亮的。", 4 / 7, 0.5333333283555556),
        ("书是绿色的！", "书是绿色的。", 1, 0.7999999950000002),
        ("会议", "新桥今天开通", 0, 0),
    ],
)
def test_chinese_scores_are_over_the_words_that_jieba_finds(
    prediction: str, answer: str, f1: float, rouge_l: float
) -> None:
    pytest.importorskip("jieba", reason="needs the extra `eval`", exc_type=ImportError)
    assert qa_f1_zh(prediction, answer) == pytest.approx(f1, abs=1e-15)
    assert rouge_zh(prediction, answer) == pytest.approx(rouge_l, abs=1e-14)


def test_without_jieba_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    chinese_segmenter.cache_clear()
    with pytest.raises(MissingExtra, match=r"needs jieba: pip install 'kvprism\[eval\]'") as caught:
        qa_f1_zh("书", "书")
    assert (caught.value.library, caught.value.extra) == ("jieba", "eval")


def test_every_score_is_found_by_its_name() -> None:
    for name, score in SCORES.items():
        if name not in CHINESE:
            answer = {"retrieval": "Paragraph 1", "retrieval_zh": "段落1", "count": "1"}.get(
                name, "x"
            )
            assert score(answer, answer, [answer]) == pytest.approx(1, abs=1e-8)
            assert callable(getattr(longbench_scores, name))
