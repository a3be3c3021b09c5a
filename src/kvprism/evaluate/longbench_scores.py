"""LongBench's scores (Bai et al. 2024, arXiv 2308.14508): a prediction against one true answer.

Each is in [0, 1]. They follow the benchmark's own scorer in everything that changes a figure, its
oddities included, which are named where they are; `tests/evaluate/test_longbench_scores.py` holds
them against the libraries that it uses.
"""

import difflib
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from kvprism.errors import MissingExtra
from kvprism.registry import Registry

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = frozenset(string.punctuation)
CHINESE_PUNCTUATION = PUNCTUATION | frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"
    "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)
# In `rouge`, so that no precision and no recall divide by something.
SMALLEST = 1e-8


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of the words, without case, punctuation and articles.

    Example:
        >>> qa_f1("The Eiffel Tower.", "eiffel tower, Paris")
        0.8
    """
    return _f1(_words(prediction), _words(answer))


def qa_f1_zh(prediction: str, answer: str) -> float:
    """F1 of the words that jieba finds, without case and punctuation.

    Raises:
        MissingExtra: jieba is not installed.
    """
    return _f1(_chinese_words(prediction), _chinese_words(answer))


def rouge(prediction: str, answer: str) -> float:
    """F of ROUGE-L over whole summaries, as the library `rouge` 1.0.1 has it.

    1. A sentence ends at every full stop; words are what is between blanks.
    2. In the union are the *different* words of the longest common subsequence of every sentence of
       the answer with every one of the prediction.
    3. Recall and precision are its size over the number of different words of either side.

    Where that library runs out of stack, on sentences of about a thousand words, and the benchmark
    then counts 0, this has the value.

    Example:
        >>> round(rouge("the cat sat. it slept", "a cat sat. then it slept"), 4)
        0.7273
    """
    predicted, true = _sentences(prediction), _sentences(answer)
    if not predicted or not true:
        return 0.0
    common: set[str] = set()
    for reference in true:
        for candidate in predicted:
            common.update(_common_subsequence(reference, candidate))
    recall = len(common) / len({word for sentence in true for word in sentence})
    precision = len(common) / len({word for sentence in predicted for word in sentence})
    return 2 * precision * recall / (precision + recall + SMALLEST)


def rouge_zh(prediction: str, answer: str) -> float:
    """`rouge` of the words that jieba finds.

    Raises:
        MissingExtra: jieba is not installed.
    """
    return rouge(" ".join(_segments(prediction)), " ".join(_segments(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the prediction names, if the right one is among them.

    Example:
        >>> classification("City or country", "Country", ["City", "Country"])
        0.0
        >>> classification("City, Country", "Country", ["City", "Country"])
        0.5
    """
    named = [name for name in classes if name in prediction]
    at = 0
    while at < len(named):
        # A name that is a part of the right one does not count.
        if named[at] in answer and named[at] != answer:
            del named[at]
        # After a removal too: the benchmark passes over the name that moved up, and so do its
        # published scores.
        at += 1
    return 1 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """The share of the prediction's numbers that are the right paragraph's.

    Example:
        >>> retrieval("Paragraph 7, or 17", "Paragraph 7")
        0.5
    """
    return _share_of_numbers(prediction, _number_after("Paragraph ", answer))


def retrieval_zh(prediction: str, answer: str) -> float:
    """The share of the prediction's numbers that are the right paragraph's."""
    return _share_of_numbers(prediction, _number_after("段落", answer))


def count(prediction: str, answer: str) -> float:
    """The share of the prediction's numbers that are the right one.

    Example:
        >>> count("There are 12.", "12"), count("none", "12")
        (1.0, 0.0)
    """
    return _share_of_numbers(prediction, answer)


def code_sim(prediction: str, answer: str) -> float:
    """Similarity of the first line that is code, in whole percent.

    A line with a backtick, `#` or `//` is no code. Similarity is difflib's, which is what the
    benchmark's library uses where no faster one is installed beside it.

    Example:
        >>> code_sim("# here it is\\nx = 1", "x = 1")
        1.0
    """
    lines = prediction.lstrip("\n").split("\n")
    code = (line for line in lines if not any(mark in line for mark in ("`", "#", "//")))
    ratio = difflib.SequenceMatcher(None, next(code, ""), answer).ratio()
    return round(100 * ratio) / 100


Score = Callable[[str, str, Sequence[str]], float]


def _of_two(score: Callable[[str, str], float]) -> Score:
    """A score for which it does not matter which classes there are."""
    return lambda prediction, answer, classes: score(prediction, answer)


SCORES: Registry[Score] = Registry(
    "LongBench score",
    [
        *(
            (score.__name__, _of_two(score))
            for score in (qa_f1, qa_f1_zh, rouge, rouge_zh, retrieval, retrieval_zh, count)
        ),
        (code_sim.__name__, _of_two(code_sim)),
        (classification.__name__, classification),
    ],
)
CHINESE = frozenset({"qa_f1_zh", "rouge_zh"})


@cache
def chinese_segmenter() -> Any:
    """jieba's tokenizer.

    Raises:
        MissingExtra: jieba is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of setuptools and of its own escape sequences
            jieba = import_module("jieba")
    except ModuleNotFoundError as error:
        what = "LongBench's Chinese question answering and summarizing"
        raise MissingExtra(what, "jieba", "eval") from error
    segmenter = jieba.Tokenizer()
    # Left to itself it would take the dictionary from a file that anyone may leave in the temporary
    # folder.
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter


def _segments(text: str) -> list[str]:
    return list(chinese_segmenter().cut(text, cut_all=False))


def _words(text: str) -> list[str]:
    bare = "".join(char for char in text.lower() if char not in PUNCTUATION)
    return ARTICLES.sub(" ", bare).split()


def _chinese_words(text: str) -> list[str]:
    bare = (
        "".join(char for char in word.lower() if char not in CHINESE_PUNCTUATION)
        for word in _segments(text)
    )
    return [joined for word in bare if (joined := "".join(word.split()))]


def _f1(predicted: Sequence[str], true: Sequence[str]) -> float:
    common = (Counter(predicted) & Counter(true)).total()
    return 2 * common / (len(predicted) + len(true)) if common else 0.0


def _sentences(text: str) -> list[list[str]]:
    # A sentence of blanks alone is one empty word, in the library too.
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """The words of a longest common subsequence; of several, that of the library `rouge`."""
    lengths = [[0] * (len(b) + 1)]
    for word in a:
        above, row = lengths[-1], [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        lengths.append(row)
    i, j, common = len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            common.append(a[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return common


def _number_after(word: str, answer: str) -> str:
    found = re.search(word + r"(\d+)", answer)
    assert found is not None, answer  # rows are checked when they are read
    return found[1]


def _share_of_numbers(prediction: str, right: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(right) / len(numbers) if numbers else 0.0
