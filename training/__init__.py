"""How the built-in models are made: recipes, the mixture of texts and tasks, the loop, the gates.

Not part of the installed package. `scripts/train-tiny RECIPE --text FILE` runs it.
"""
