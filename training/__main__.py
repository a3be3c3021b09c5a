"""`scripts/train-tiny RECIPE --text FILE`: train a built-in model from nothing."""

import argparse
import os
import sys
from pathlib import Path

import torch

from kvprism.errors import KVPrismError
from kvprism.evaluate.texts import read_text
from training import curve
from training.loop import Point, Run
from training.recipe import Recipe


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/train-tiny", description=__doc__)
    parser.add_argument("recipe", help="a name in training/recipes, or a TOML file")
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's train.txt")
    parser.add_argument("--seed", type=int, help="instead of the recipe's")
    parser.add_argument(
        "--out", type=Path, help="default: build/training/RECIPE-SEED; resumes there"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        recipe = Recipe.read(options.recipe)
        seed = recipe.seed if options.seed is None else options.seed
        folder = options.out or Path("build/training") / f"{recipe.name}-{seed}"
        print(f"{recipe.name}, seed {seed}: learning curve in {folder / 'curve.svg'}", flush=True)

        def on_point(point: Point) -> None:
            show(point)
            curve.draw(folder, f"{recipe.name}, seed {seed}")

        run = Run(recipe, seed, read_text(options.text), folder, on_point)
        print(f"trained; use it as --model {run.train()}")
    except KVPrismError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def show(point: Point) -> None:
    figures = "  ".join(f"{name} {value:.3f}" for name, value in point.figures.items())
    print(
        f"{point.seconds / 60:6.1f} min  {point.tokens / 1e6:6.2f}M tokens  stage {point.stage} "
        f"({point.length})  {point.tokens_per_second:.0f}/s  {figures}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
