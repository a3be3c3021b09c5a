"""Hand-made rows of every LongBench task, in the benchmark's own format; the text is our own."""

import json
import zipfile
from pathlib import Path
from typing import Any

TASKS: dict[str, list[dict[str, Any]]] = {}


def _add(
    task: str,
    language: str,
    rows: list[tuple[str, str, list[str]]],
    classes: list[str] | None = None,
) -> None:
    """rows: (context, input, answers)."""
    TASKS[task] = [
        {
            "input": question,
            "context": context,
            "answers": answers,
            "length": len(context.split()) if language == "en" else len(context),
            "dataset": task,
            "language": language,
            "all_classes": classes,
            "_id": f"{task}{number:040d}",
        }
        for number, (context, question, answers) in enumerate(rows)
    ]


STORY = (
    "The keeper of the north lighthouse wrote every evening in a green book. On the third of May "
    "he wrote that the lamp had been lit by his daughter Ines. "
) * 6
PASSAGES = (
    "Passage 1:\nIrvel\nIrvel is a town on the river Oma.\n\n"
    "Passage 2:\nOma\nThe Oma rises in the hills of Tarn and reaches the sea at Port Lew.\n\n"
) * 4
MEETING = "Chair: The first item is the bridge. Engineer: It needs two new cables by June. " * 6
DIALOGUES = (
    "Dialogue: Ana: Are you coming? Bo: At eight.\nSummary: Bo comes at eight.\n\n"
    "Dialogue: Cy: Where is the key? Di: Under the pot.\nSummary: The key is under the pot."
)
PARAGRAPHS = "\n\n".join(
    f"Paragraph {i}: Hall {i} of the museum shows {what}."
    for i, what in enumerate(("clocks", "maps", "ships", "coins"), start=1)
)
QUESTIONS = (
    "Question: What is a lynx ?\nType: Animal\n"
    "Question: Where does the Oma end ?\nType: Location\n"
    "Question: Who lit the lamp ?\nType: Individual"
)
CODE = "def area(width, height):\n    return width * height\n\n" * 6 + "def cube(side):\n"
ZH_STORY = (
    "北边灯塔的看守人每天晚上都在一本绿色的书里写字。五月三日，他写道，灯是他的女儿点亮的。" * 5
)
ZH_NEWS = "新闻：河上的新桥今天开通。\n类别：交通\n新闻：球队昨晚赢得了比赛。\n类别：体育"

_add("narrativeqa", "en", [(STORY, "Who lit the lamp?", ["Ines", "His daughter Ines"])])
_add("qasper", "en", [(STORY, "Is the book red?", ["no"])])
_add("multifieldqa_en", "en", [(STORY, "What colour is the book?", ["Green", "It is green."])])
_add("multifieldqa_zh", "zh", [(ZH_STORY, "谁点亮了灯？", ["他的女儿"])])
_add(
    "hotpotqa",
    "en",
    [
        (PASSAGES, "Where does the river of Irvel reach the sea?", ["Port Lew"]),
        (PASSAGES, "In which hills does the river of Irvel rise?", ["Tarn", "the hills of Tarn"]),
        (STORY, "In what does the keeper write?", ["a green book"]),
    ],
)
_add("2wikimqa", "en", [(PASSAGES, "Which town is on the Oma?", ["Irvel"])])
_add("musique", "en", [(PASSAGES, "Where does the Oma end?", ["Port Lew"])])
_add("dureader", "zh", [(ZH_STORY, "书是什么颜色？", ["书是绿色的。", "绿色"])])
_add(
    "gov_report", "en", [(MEETING, "", ["The bridge needs two new cables. They are due in June."])]
)
_add("qmsum", "en", [(MEETING, "What does the bridge need?", ["Two new cables by June."])])
_add("multi_news", "en", [(MEETING, "", ["A bridge is to have two new cables."])])
_add("vcsum", "zh", [(ZH_STORY, "", ["看守人写道，灯是女儿点亮的。"])])
_add(
    "trec",
    "en",
    [(QUESTIONS, "Question: Where is Irvel ?\nType:", ["Location"])],
    ["Animal", "Location", "Individual", "Other location"],
)
_add("triviaqa", "en", [(PASSAGES, "Passage:\nOma\nQuestion:\nWhat is it?\nAnswer:", ["a river"])])
_add(
    "samsum",
    "en",
    [
        (
            DIALOGUES,
            "Dialogue: Ed: Is it open? Flo: Until six.\nSummary: ",
            ["It is open until six."],
        )
    ],
)
_add("lsht", "zh", [(ZH_NEWS, "新闻：火车晚点了。\n类别：", ["交通"])], ["交通", "体育", "天气"])
_add("passage_count", "en", [(PARAGRAPHS, "", ["4"])])
_add(
    "passage_retrieval_en",
    "en",
    [(PARAGRAPHS, "A hall for what sailed.", ["Paragraph 3"])],
)
_add("passage_retrieval_zh", "zh", [("段落1：钟。\n\n段落2：地图。", "看时间的东西。", ["段落1"])])
_add("lcc", "python", [(CODE, "", ["    return side ** 3"])])
_add("repobench-p", "python", [(CODE, "def half(x):\n", ["    return x / 2"])])


def write_directory(folder: Path, tasks: dict[str, list[dict[str, Any]]] = TASKS) -> Path:
    """`TASK.jsonl` for every task, as the benchmark's archive has them."""
    folder.mkdir(exist_ok=True)
    for name, rows in tasks.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def write_archive(path: Path, folder: Path) -> Path:
    """The files of a directory as `data/TASK.jsonl`, and what some systems leave beside."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.glob("*.jsonl")):
            archive.writestr(f"__MACOSX/data/._{file.name}", b"\0\5\x16\7")
            archive.write(file, f"data/{file.name}")
    return path
