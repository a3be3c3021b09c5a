"""The INT4 probe on the built-in model and on twins of it with planted defects."""

import copy
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch

from kvprism.errors import BadInput, ProfileMismatch
from kvprism.evaluate.diagnosis import ATTENTION_LIMIT
from kvprism.evaluate.measure import LoadedModel
from kvprism.evaluate.probe import ProbeReport, probe
from kvprism.integrations.hf import rope_frequencies
from kvprism.profiles import Profile
from kvprism.tensors import KeyConditioning

CONTEXT = 1024
PAIR, FACTOR = 3, 32.0


def fragile(model: Any, layers: Sequence[int]) -> Any:
    """One RoPE pair of every KV head times 32 in the keys and times 1/32 in the queries."""
    twin = copy.deepcopy(model)
    channels = twin.config.head_dim
    for layer in layers:
        attention = twin.model.layers[layer].self_attn
        for projection, factor in ((attention.k_proj, FACTOR), (attention.q_proj, 1 / FACTOR)):
            heads = projection.weight.data.view(-1, channels, projection.in_features)
            heads[:, [PAIR, PAIR + channels // 2]] *= factor
    return twin


def undone(subject: LoadedModel, layers: Sequence[int]) -> Profile:
    """The profile that divides the planted factor out again."""
    config = subject.model.config
    heads, channels = config.num_key_value_heads, config.head_dim
    scale = torch.ones(heads, channels // 2)
    scale[:, PAIR] = FACTOR
    frequencies = rope_frequencies(subject.model)
    remedy = KeyConditioning(torch.zeros(heads, channels), scale, frequencies)
    number = config.num_hidden_layers
    conditioning = tuple(remedy if layer in layers else None for layer in range(number))
    return Profile(subject.fingerprint, conditioning=conditioning)


ALL, ONE = (0, 1, 2, 3), (3,)


@pytest.fixture(scope="module")
def all_fragile(subject: LoadedModel) -> LoadedModel:
    return LoadedModel("fragile", fragile(subject.model, ALL), subject.tokenizer)


@pytest.fixture(scope="module")
def one_fragile(subject: LoadedModel) -> LoadedModel:
    return LoadedModel("one-fragile", fragile(subject.model, ONE), subject.tokenizer)


@pytest.fixture(scope="module")
def untouched(subject: LoadedModel) -> ProbeReport:
    return probe(subject)


@pytest.fixture(scope="module")
def collapsed(all_fragile: LoadedModel) -> ProbeReport:
    return probe(all_fragile, context=CONTEXT)


@pytest.fixture(scope="module")
def repaired(all_fragile: LoadedModel) -> ProbeReport:
    return probe(all_fragile, context=CONTEXT, profile=undone(all_fragile, ALL))


def test_the_built_in_model_tolerates_int4(untouched: ProbeReport) -> None:
    assert untouched.context == untouched.context_wanted == 2048
    assert untouched.raw.successes == untouched.raw.trials == 3
    for trials in (untouched.published, untouched.ours, untouched.confirmed):
        assert (trials.successes, trials.trials, trials.int4) == (3, 3, "yes")
    assert untouched.conditioned is None
    assert untouched.verdict == "plain"
    assert untouched.recommended == "spectrum (0-3: plain)"
    assert untouched.outlier_layers == ()


def test_the_published_budget_is_nominal_and_ours_is_exact(untouched: ProbeReport) -> None:
    """Nominal 0.30 is 0.2 x 8 + 0.8 x 4 bits of 16, and a float16 scale per row of 64 on top."""
    scales = 2 / (64 * 2)
    assert 0.30 + scales < untouched.published.fraction < 0.30 + scales + 0.01
    assert 0.29 < untouched.ours.fraction <= 0.30


def test_the_diagnosis_orders_the_tiers(untouched: ProbeReport) -> None:
    for layer in untouched.layers:
        for name in ("keys", "values", "output"):
            assert 0 < 5 * getattr(layer.int8, name) < getattr(layer.int4, name)
        assert 0 <= layer.int8.kl < layer.int4.kl
        assert layer.conditioned is None


def test_the_twin_computes_the_same(subject: LoadedModel, all_fragile: LoadedModel) -> None:
    ids = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(subject.model(ids).logits, all_fragile.model(ids).logits)


def test_a_collapse_is_found_and_its_channels_are_named(collapsed: ProbeReport) -> None:
    assert collapsed.raw.successes == 3
    assert collapsed.published.successes <= 1 and collapsed.published.int4 == "no"
    assert collapsed.ours.successes <= 1 and collapsed.ours.int4 == "no"
    assert collapsed.outlier_layers == ALL
    named = {(o.layer, o.head, o.channel) for layer in collapsed.layers for o in layer.outliers}
    planted = {(layer, head, c) for layer in ALL for head in (0, 1) for c in (PAIR, PAIR + 32)}
    assert named == planted
    assert all(layer.int4.output > ATTENTION_LIMIT for layer in collapsed.layers)


def test_without_a_remedy_int4_is_switched_off(collapsed: ProbeReport) -> None:
    assert collapsed.verdict == "no-int4"
    assert collapsed.recommended == "spectrum-2tier (0-3: no-int4)"
    assert str(collapsed.published) in collapsed.reason
    assert "key channel 3" in collapsed.reason and "no key conditioning" in collapsed.reason
    assert collapsed.keeps_all_from == 0.52  # all tokens at INT8 take 0.516
    assert collapsed.record.settings == ("no-int4",) * 4
    assert (collapsed.record.int4, collapsed.record.conditioned) == ("no", "inconclusive")


def test_a_conditioning_that_undoes_the_defect_brings_int4_back(repaired: ProbeReport) -> None:
    assert repaired.published.int4 == "no"
    assert repaired.conditioned is not None
    assert (repaired.conditioned.successes, repaired.conditioned.int4) == (3, "yes")
    assert repaired.conditioned.fraction <= 0.30
    assert repaired.recommended == "spectrum-conditioned (0-3: conditioned)"
    assert repaired.verdict == "conditioned" and repaired.keeps_all_from is None
    assert repaired.confirmed == repaired.conditioned
    assert (repaired.record.int4, repaired.record.conditioned) == ("no", "yes")
    assert repaired.conditioned.kl < repaired.ours.kl / 10
    for layer in repaired.layers:
        assert layer.conditioned is not None
        assert layer.conditioned.output <= ATTENTION_LIMIT < layer.int4.output


def test_a_defect_that_the_needles_miss_shows_in_the_attention(one_fragile: LoadedModel) -> None:
    """Seen: the needles are found although one layer's attention is ruined."""
    report = probe(one_fragile, context=CONTEXT, profile=undone(one_fragile, ONE))
    assert report.ours.int4 == "yes"
    assert report.outlier_layers == ONE
    assert report.recommended == "spectrum-adaptive (0-2: plain, 3: conditioned)"
    assert report.confirmed.int4 == "yes"
    assert report.confirmed.kl < report.ours.kl / 2


def test_a_layer_without_a_remedy_alone_loses_int4(one_fragile: LoadedModel) -> None:
    report = probe(one_fragile, context=CONTEXT)
    assert report.recommended == "spectrum-adaptive (0-2: plain, 3: no-int4)"
    # Three layers at INT4 and one at INT8 take (3 x 0.266 + 0.516) / 4 = 0.329, the sinks 0.002.
    assert report.keeps_all_from == 0.34
    assert report.confirmed.int4 == "yes"


def test_a_model_that_finds_no_needle_is_inconclusive(subject: LoadedModel) -> None:
    model = copy.deepcopy(subject.model)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    report = probe(LoadedModel("deaf", model, subject.tokenizer), context=512)
    assert report.raw.successes < 3
    assert {report.published.int4, report.ours.int4, report.verdict} == {"inconclusive"}
    assert report.recommended == "spectrum (0-3: plain)"
    assert "attention errors alone" in report.reason


def test_a_context_beyond_the_models_positions_is_shortened(subject: LoadedModel) -> None:
    model = copy.deepcopy(subject.model)
    model.config.max_position_embeddings = 600
    report = probe(LoadedModel("short", model, subject.tokenizer))
    assert report.context_wanted == 2048
    assert 500 < report.context < 600


def test_a_context_without_room_for_a_needle_is_refused(subject: LoadedModel) -> None:
    with pytest.raises(BadInput, match="length 8 holds no text"):
        probe(subject, context=8)


def test_another_models_profile_is_refused(subject: LoadedModel) -> None:
    with pytest.raises(ProfileMismatch):
        probe(subject, profile=Profile("0" * 64))


def test_a_report_survives_json(collapsed: ProbeReport) -> None:
    stored = msgspec.json.encode(collapsed)
    assert msgspec.json.decode(stored, type=ProbeReport) == collapsed
    assert msgspec.to_builtins(collapsed)["published"]["successes"] == collapsed.published.successes
