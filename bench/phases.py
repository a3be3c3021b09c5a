"""The decode phase of several routes: after the whole prompt, and after each route's own prompt.

python -m bench.phases MODEL --profile PROFILE --policy polykv,polykv-cosine-entropy --json OUT:
resumes from OUT.records.jsonl. `kvprism eval --decode-policy` has every prompt under every phase.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from kvprism.commands import console
from kvprism.evaluate.arms import RAW, Arm, SavedProfile, arms_of
from kvprism.evaluate.measure import LoadedModel
from kvprism.evaluate.records import collect
from kvprism.evaluate.rows import write_rows
from kvprism.evaluate.ruler import Ruler
from kvprism.evaluate.summary import rows_of
from kvprism.retention import parse_tokens, phase_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--policy", required=True, help="routes, with commas between them")
    parser.add_argument("--budget", default="256tok", help="of both phases")
    parser.add_argument("--task", required=True, help="kinds, with commas between them")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--trials", type=int, default=5)
    given = parser.parse_args()
    arms = tuple(dict.fromkeys(_arms(given.policy.split(","), given.budget, given.profile)))
    subject = LoadedModel.load(given.model)
    task = Ruler(subject, arms, (given.length,), given.task.split(","), given.trials)
    with console.progress(f"phases of {subject.name}") as advance:
        measured = collect(task, given.json.with_suffix(".records.jsonl"), advance)
    write_rows(given.json, rows_of(measured))


def _arms(policies: list[str], budget: str, profile: Path) -> Iterator[Arm]:
    """Raw, the baseline, first; then of each route the decode phase alone, and both."""
    saved = SavedProfile.named(profile)
    for policy in policies:
        decode = phase_of(saved.profile.routes, policy, parse_tokens(budget))
        yield from arms_of([RAW, policy], [budget], saved=saved, decode=[decode])


if __name__ == "__main__":
    main()
