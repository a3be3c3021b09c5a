"""The model under training: transformers' own class, with an initialisation by fan-in."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kvprism.errors import BadInput
from kvprism.integrations.hf import load
from training import attention
from training.recipe import Optimizer, Recipe

SPECIAL = {
    "bos_token": "<|bos|>",
    "eos_token": "<|eos|>",
    "pad_token": "<|pad|>",
    "unk_token": "<unk>",
}


EMBEDDING_STD = 0.02
# The norms through which Gemma-2's attention and MLP add to the residual.
GEMMA_OUTPUTS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")


def train_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """Byte-level BPE with every digit a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def build(recipe: Recipe, seed: int) -> Any:
    """A float32 model with seeded weights, or with those of the recipe's `start`.

    Normal, 1 / sqrt(fan-in); what adds to the residual starts at zero. Drawn like the rest it would
    drown the embeddings, and copying, which everything here needs, would not be learnt.

    Raises:
        BadInput: a `start` of another shape.
    """
    attention.register()
    torch.manual_seed(seed)
    settings = {key: value for key, value in recipe.model.items() if key != "model_type"}
    config = AutoConfig.for_model(
        recipe.model["model_type"],
        vocab_size=recipe.vocabulary,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **settings,
    )
    auto_model: Any = AutoModelForCausalLM
    model = auto_model.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(
                    std=EMBEDDING_STD if "embed" in name else parameter.shape[1] ** -0.5
                )
            if recipe.model["model_type"] == "gemma2":
                # Norms count from 1, and a norm of zeros has no useful gradient.
                if name.endswith(GEMMA_OUTPUTS):
                    parameter.fill_(-1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    if isinstance(recipe.start, str):
        _take_weights(model, recipe.start)
    return model.train()


def _take_weights(model: Any, start: str) -> None:
    given, _ = load(start)
    shapes, found = ({n: x.shape for n, x in m.named_parameters()} for m in (model, given))
    if shapes != found:
        other = sorted(n for n in {*shapes, *found} if shapes.get(n) != found.get(n))
        raise BadInput(f"{start} does not fit the recipe's model: other shapes for {other}")
    model.load_state_dict(given.state_dict())


def optimizer_of(model: Any, settings: Optimizer) -> torch.optim.AdamW:
    """Two rates, decay on the hidden matrices alone; `peak` keeps each group's own rate."""
    matrices: list[Any] = []
    others: list[Any] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() == 2 and "embed" not in name else others).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay, "peak": settings.learning_rate},
        {"params": others, "weight_decay": 0.0, "peak": settings.embedding_learning_rate},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)


def compute_dtype() -> torch.dtype:
    """bfloat16 where this machine multiplies it in hardware; elsewhere float32 is faster."""
    if torch.cuda.is_available():
        return torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


class Compute:
    """What runs forward and backward: the masters, or a copy in a lower precision."""

    def __init__(self, masters: Any, dtype: torch.dtype) -> None:
        self.masters = masters
        self.model = masters
        if dtype != torch.float32:
            self.model = type(masters)(masters.config).to(dtype).train()
            self.refresh()

    def refresh(self) -> None:
        """Copy the masters' values."""
        if self.model is not self.masters:
            with torch.no_grad():
                pairs = zip(self.model.parameters(), self.masters.parameters(), strict=True)
                for ours, master in pairs:
                    ours.copy_(master)

    def hand_over_gradients(self) -> None:
        """Give the masters this step's gradients, in float32."""
        if self.model is not self.masters:
            pairs = zip(self.model.parameters(), self.masters.parameters(), strict=True)
            for ours, master in pairs:
                master.grad = None if ours.grad is None else ours.grad.float()
                ours.grad = None


def export(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """A genuine transformers checkpoint in bfloat16."""
    saved = type(model)(model.config)
    saved.load_state_dict(model.state_dict())
    saved.to(torch.bfloat16).eval().save_pretrained(folder)
    wrapped: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )
    wrapped.save_pretrained(folder)
