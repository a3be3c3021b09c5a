"""Does greedy generation say what teacher-forced scoring says? One cell, both ways, the same cases.

python -m bench.greedy MODEL --profile PROFILE --policy raw,polykv-best --budget 256tok --json OUT
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvprism.evaluate.arms import Arm, SavedProfile, arms_of, through_the_wire
from kvprism.evaluate.measure import Case, LoadedModel, capture_for, feed, generate_on, score
from kvprism.evaluate.rows import provenance
from kvprism.evaluate.ruler import Ruler, RulerId
from kvprism.tensors import RequestKV


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--policy", required=True, help="names, with commas between them")
    parser.add_argument("--budget", default="256tok")
    parser.add_argument("--task", default="kv-recall", help="a kind with one answer")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--cases", type=int, default=33)
    given = parser.parse_args()
    subject, saved = LoadedModel.load(given.model), SavedProfile.named(given.profile)
    arms = arms_of(given.policy.split(","), [given.budget], saved=saved)
    found: dict[Arm, list[tuple[bool, bool]]] = {arm: [] for arm in arms}
    cases = Ruler(subject, arms, (given.length,), (given.task,))
    for number in range(given.cases):
        case = cases.case(RulerId(given.length, given.task, number)).case
        kv, view = capture_for(subject.model, case.context, arms, "bfloat16")
        for arm in arms:
            found[arm].append(_both(subject.model, through_the_wire(kv, view, arm)[0], case))
    given.json.write_text(json.dumps(list(_rows(subject, given, found)), indent=1) + "\n")


def _both(model: Any, restored: RequestKV, case: Case) -> tuple[bool, bool]:
    """Whether the answer is right by the logits of the true one, and as it is generated."""
    [answer] = case.answers
    logits, _ = feed(model, restored, case.fed, None)
    made = generate_on(model, restored, case.question, answer.stop - answer.start, ())
    return score(logits, case.continuation, answer)[1], made.equal(case.continuation[answer])


def _rows(
    subject: LoadedModel, given: Any, found: dict[Arm, list[tuple[bool, bool]]]
) -> Iterator[dict[str, Any]]:
    made_by = provenance(subject.model)
    for arm, pairs in found.items():
        yield {
            "model": subject.name,
            "task": given.task,
            "length": given.length,
            "policy": arm.policy,
            "budget": arm.budget,
            "n": len(pairs),
            "forced": sum(forced for forced, _ in pairs),
            "generated": sum(generated for _, generated in pairs),
            "agree": sum(forced == generated for forced, generated in pairs),
            "commit": made_by.commit,
            "versions": made_by.versions,
        }


if __name__ == "__main__":
    main()
