"""One run from nothing: stages gated on the learning curve, resumable at any step."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from kvprism.errors import BadInput
from training import state
from training.mix import TASKS, Batch, Sampler, training_lexicon
from training.network import Compute, build, compute_dtype, export, optimizer_of, train_tokenizer
from training.recipe import Recipe, Stage

CURVE = "curve.jsonl"
REPORT_STEPS, SAVE_SECONDS = 50, 120
LOSS = " loss"  # how the names of figures end that must fall, not rise
MEMORY = 0.98  # of a running average, per step in which its figure occurs


class Point(msgspec.Struct, kw_only=True):
    """One line of the learning curve; figures: running averages, losses in nats per token."""

    step: int
    tokens: int
    seconds: float
    stage: int
    length: int
    learning_rate: float
    tokens_per_second: float
    figures: dict[str, float]


class GateMissed(BadInput):
    """A required figure was not reached within the stage's tokens."""


@dataclass(eq=False)
class Run:
    """A recipe, a seed and a text, and how far it is.

    Raises:
        BadInput: `folder` holds another run.
    """

    recipe: Recipe
    seed: int
    text: str
    folder: Path
    on_point: Callable[[Point], None] = lambda point: None
    progress: state.Progress = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = train_tokenizer(self.text, self.recipe.vocabulary)
        self.sampler = Sampler(
            np.array(self._encode(self.text), np.int64),
            self._encode,
            training_lexicon(self.text),
            bos=0,
            vocabulary=self.recipe.vocabulary,
        )
        self.model = build(self.recipe, self.seed)
        self.compute = Compute(self.model, compute_dtype())
        self.optimizer = optimizer_of(self.model, self.recipe.optimizer)
        parameters = dict(self.model.named_parameters())
        self.progress = state.resume(self.folder, self._digest(), parameters, self.optimizer)
        self.compute.refresh()

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _digest(self) -> str:
        described = msgspec.json.encode([self.recipe, self.seed], order="deterministic")
        return hashlib.sha256(described + self.text.encode()).hexdigest()

    @property
    def finished(self) -> bool:
        return self.progress.stage == len(self.recipe.stages)

    def train(self) -> Path:
        """Go on from where the run stands to its end; the folder of the finished checkpoint.

        Raises:
            GateMissed: a required gate stayed shut.
        """
        saved = time.monotonic()
        while not self.finished:
            started, before = time.monotonic(), self.progress.tokens
            for _ in range(REPORT_STEPS):
                self._step()
                if self._leave_stage():
                    break
            seconds = time.monotonic() - started
            self.progress.seconds += seconds
            self._report((self.progress.tokens - before) / seconds)
            if self.finished or time.monotonic() - saved > SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
        export(self.model, self.tokenizer, self.folder / "model")
        return self.folder / "model"

    @property
    def _stage(self) -> Stage:
        return self.recipe.stages[min(self.progress.stage, len(self.recipe.stages) - 1)]

    def _step(self) -> None:
        stage, progress = self._stage, self.progress
        if progress.stage_tokens == 0:
            progress.averages = {}  # a gate counts its own stage
        batch = self.sampler.batch(
            (self.seed, progress.step),
            stage.length,
            stage.batch,
            stage.mixture,
            stage.tasks,
            stage.text_length,
        )
        losses, hits = self._forward_backward(batch)
        self.compute.hand_over_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.compute.refresh()
        progress.step += 1
        progress.tokens += batch.inputs.size
        progress.stage_tokens += batch.inputs.size
        for name, value in figures_of(batch, losses, hits).items():
            old = progress.averages.get(name, value)
            progress.averages[name] = MEMORY * old + (1 - MEMORY) * value

    def _forward_backward(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Loss and whether the likeliest token was right, `[sequence, token]` each."""
        inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
        weights = torch.from_numpy(batch.weights)
        logits = self.compute.model(inputs, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
        ).view_as(weights)
        loss: Any = (losses * weights).sum() / weights.sum()
        loss.backward()
        with torch.no_grad():
            hits = logits.argmax(dim=-1) == targets
        return losses.detach().numpy(), hits.numpy()

    def _rate(self) -> float:
        stage, progress = self._stage, self.progress
        start, stop = stage.learning_rate
        part = min(1.0, progress.stage_tokens / stage.tokens[1])
        warm = min(1.0, (progress.step + 1) / self.recipe.optimizer.warmup_steps)
        return warm * (start + (stop - start) * part)

    def _leave_stage(self) -> bool:
        """Go to the next stage when this one's gate is open, or its tokens are used up."""
        stage, progress = self._stage, self.progress
        fewest, most = stage.tokens
        shut = {name: value for name, value in stage.gate.items() if not self._reached(name, value)}
        if progress.stage_tokens < fewest or (shut and progress.stage_tokens < most):
            return False
        if shut and stage.required:
            self._save()
            raise GateMissed(
                f"stage {progress.stage} used {progress.stage_tokens} tokens and its figures are "
                f"{ {name: round(progress.averages.get(name, 0.0), 3) for name in shut} }, needed "
                f"{shut}; try another seed"
            )
        progress.stage, progress.stage_tokens = progress.stage + 1, 0
        return True

    def _reached(self, name: str, value: float) -> bool:
        if name not in self.progress.averages:
            return False
        found = self.progress.averages[name]
        return found <= value if name.endswith(LOSS) else found >= value

    def _report(self, speed: float) -> None:
        progress = self.progress
        point = Point(
            step=progress.step,
            tokens=progress.tokens,
            seconds=round(progress.seconds, 1),
            stage=progress.stage,
            length=self._stage.length,
            learning_rate=round(self.recipe.optimizer.learning_rate * self._rate(), 7),
            tokens_per_second=round(speed),
            figures={name: round(x, 4) for name, x in sorted(progress.averages.items())},
        )
        with (self.folder / CURVE).open("ab") as file:
            file.write(msgspec.json.encode(point) + b"\n")
        self.on_point(point)

    def _save(self) -> None:
        parameters = dict(self.model.named_parameters())
        state.save(self.folder, self.progress, parameters, self.optimizer)


def figures_of(batch: Batch, losses: Any, hits: Any) -> dict[str, float]:
    """This step's figures: loss of text and copies, share of answer tokens right per task."""
    found: dict[str, float] = {}
    for kind in ("text", "echo", "copy"):
        rows = [i for i, name in enumerate(batch.kinds) if name == kind]
        counted = batch.weights[rows] > 0
        if counted.any():
            found[kind + LOSS] = float(losses[rows][counted].mean())
    for index, name in enumerate(TASKS):
        answers = batch.task == index
        if answers.any():
            found[name] = float(hits[answers].mean())
    return found
