"""Where models live: `hf` alone imports transformers; `tiny` finds the built-in models by name."""
