"""Runs go on where they stopped, to the same weights; gates open, or stop the run."""

import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from kvprism.errors import BadInput
from kvprism.integrations.hf import load
from training import curve
from training.__main__ import main
from training.loop import CURVE, GateMissed, Run, figures_of
from training.mix import NO_TASK, TASKS, Batch
from training.network import Compute, build
from training.recipe import Recipe


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in run.model.named_parameters()}


def test_an_interrupted_run_ends_at_the_same_bits(recipe: Recipe, text: str, tmp_path: Path):
    whole = Run(recipe, 1, text, tmp_path / "whole")
    whole.train()
    first = Run(recipe, 1, text, tmp_path / "parts")
    for _ in range(7):
        first._step()
    assert first.progress.stage == 0
    first._save()
    second = Run(recipe, 1, text, tmp_path / "parts")
    assert second.progress.step == 7
    second.train()
    for (name, a), b in zip(weights(whole).items(), weights(second).values(), strict=True):
        assert torch.equal(a, b), name


def test_the_result_is_a_checkpoint_that_kvprism_loads(recipe, text, tmp_path):
    folder = Run(recipe, 1, text, tmp_path / "run").train()
    model, tokenizer = load(str(folder))
    assert model.config.num_hidden_layers == 2
    assert tokenizer.bos_token_id == 0
    assert tokenizer.encode(" 12345", add_special_tokens=False)[1:] == [
        tokenizer.convert_tokens_to_ids(digit) for digit in "12345"
    ]


def test_text_is_learnt_and_the_curve_says_so(recipe, text, tmp_path):
    points = []
    Run(recipe, 1, text, tmp_path, on_point=points.append).train()
    stored = curve.read(tmp_path)
    assert stored == points
    assert [point.stage for point in points][-1] == len(recipe.stages)
    assert points[-1].figures["text loss"] < np.log(recipe.vocabulary) - 0.5
    assert "few-shot" in points[-1].figures
    assert curve.draw(tmp_path, "small").read_text().startswith("<?xml")


def test_a_resumed_curve_tells_repeated_steps_once(recipe, text, tmp_path):
    run = Run(recipe, 1, text, tmp_path)
    for step in (1, 2, 1, 2, 3):
        run.progress.step = step
        run._report(1.0)
    assert [point.step for point in curve.read(tmp_path)] == [1, 2, 3]


def test_an_open_gate_ends_a_stage_early_and_a_shut_one_at_its_most_tokens(recipe, text, tmp_path):
    def tokens_of_first_stage(gate: dict[str, float], folder: str) -> int:
        first = msgspec.structs.replace(recipe.stages[0], gate=gate)
        stages = (first, recipe.stages[1])
        run = Run(msgspec.structs.replace(recipe, stages=stages), 1, text, tmp_path / folder)
        while run.progress.stage == 0:
            run._step()
            run._leave_stage()
        return run.progress.tokens

    fewest, most = recipe.stages[0].tokens
    assert tokens_of_first_stage({"copy loss": 9.0}, "open") == fewest
    assert tokens_of_first_stage({"copy loss": 0.1}, "shut") == most
    assert tokens_of_first_stage({"needle": 0.5}, "never seen") == most


def test_a_required_gate_stops_the_run_and_says_what_was_reached(recipe, text, tmp_path):
    first = msgspec.structs.replace(recipe.stages[0], gate={"needle": 0.5}, required=True)
    run = Run(msgspec.structs.replace(recipe, stages=(first,)), 1, text, tmp_path)
    with pytest.raises(GateMissed, match=r"12800 tokens.*'needle': 0.0.*needed.*0.5"):
        run.train()


def test_a_folder_of_another_run_is_refused(recipe, text, tmp_path):
    Run(recipe, 1, text, tmp_path)._save()
    with pytest.raises(BadInput, match="another recipe, seed or text"):
        Run(recipe, 2, text, tmp_path)


def test_figures_count_answers_by_task_and_losses_where_there_is_weight():
    batch = Batch(
        inputs=np.zeros((2, 4), np.int64),
        targets=np.zeros((2, 4), np.int64),
        weights=np.array([[1, 1, 0, 0], [1, 1, 1, 1]], np.float32),
        task=np.array([[NO_TASK] * 4, [NO_TASK, 2, 2, 2]], np.int8),
        kinds=("text", "hidden"),
    )
    losses = np.array([[1.0, 3.0, 9.0, 9.0], [0, 0, 0, 0]])
    hits = np.array([[False] * 4, [True, True, False, True]])
    assert figures_of(batch, losses, hits) == {"text loss": 2.0, TASKS[2]: pytest.approx(2 / 3)}


def test_low_precision_computes_and_float32_learns(recipe):
    """The masters get float32 gradients, and the copy follows them: half a bfloat16 step away."""
    masters = build(recipe, 1)
    compute = Compute(masters, torch.bfloat16)
    ids = torch.arange(20)[None]
    compute.model(ids, labels=ids).loss.backward()
    compute.hand_over_gradients()
    for parameter in masters.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        parameter.data.add_(parameter.grad, alpha=-0.01)
    compute.refresh()
    for ours, master in zip(compute.model.parameters(), masters.parameters(), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), master.data, rtol=2**-8, atol=0)


def test_the_command_says_what_is_wrong(tmp_path, recipe_file, monkeypatch, capsys):
    def command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["scripts/train-tiny", "--threads", "1", *arguments])
        assert main() == 2
        return capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    assert "no recipe 'huge'" in command("huge", "--text", str(recipe_file))
    assert "none.txt" in command(str(recipe_file), "--text", str(tmp_path / "none.txt"))
    assert not list(tmp_path.rglob(CURVE))
