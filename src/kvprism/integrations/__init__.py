"""Where models live: transformers behind `hf`; `tiny` finds the built-in models by name."""
