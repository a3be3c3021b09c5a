"""Routes from losses: Algorithm 1 by its definition, and ours the best on what it did not see."""

import math
from pathlib import Path

import pytest

from kvprism.allocate import largest_remainder
from kvprism.errors import BadInput, UnknownName
from kvprism.evaluate.layers import (
    CalibrationSet,
    DecodePhase,
    Document,
    LayerLosses,
    Ledger,
    Loss,
    key_of,
)
from kvprism.evaluate.measure import LoadedModel
from kvprism.evaluate.route_search import BudgetReport, RouteSearch, Variant
from kvprism.layer_signals import worst_case
from kvprism.routes import LayerRoute, Route, parse_layers

CONTEXT, TOKENS, LAYERS = 160, 64, 4
PAPER, POLICIES = ("tova", "streaming-llm"), ("keydiff", "tova")


def search_of(subject: LoadedModel, text: Path, **changes: object) -> RouteSearch:
    calibration = CalibrationSet(
        subject, text, CONTEXT, continuation=12, n_documents=2, trials=2, kinds=("needle",)
    )
    policies = (*PAPER, *POLICIES, "expected-attention")
    losses = LayerLosses(calibration, Ledger(calibration.header, None), policies)
    given = {"tokens": (TOKENS,), "paper": PAPER, "policies": POLICIES, "sweeps": 1}
    return RouteSearch(losses, singles=POLICIES, **{**given, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def search(subject: LoadedModel, text_file: Path) -> RouteSearch:
    return search_of(subject, text_file)


@pytest.fixture(scope="module")
def found(search: RouteSearch) -> tuple[list[Route], list[BudgetReport]]:
    return search.routes()


def losses(search: RouteSearch, document: Document, key: str) -> Loss:
    return search.losses.ledger.of(document)[key]


def sensitivity(search: RouteSearch, layer: int, policy: str) -> float:
    """PPL of the making half's only text with one layer evicted, less without."""
    parts = ["0-3: full", ""]
    around = ["full"] * LAYERS
    around[layer] = f"{policy}@{TOKENS}"
    before = f"0-{layer - 1}: full, " if layer > 1 else "0: full, " * layer
    after = {3: "", 2: ", 3: full"}.get(layer, f", {layer + 1}-3: full")
    parts[1] = f"{before}{layer}: {around[layer]}{after}"
    full, evicted = (losses(search, Document("text", 0), part) for part in parts)
    return math.exp(evicted.nll / evicted.targets) - math.exp(full.nll / full.targets)


def test_the_papers_route_is_algorithm_1(
    search: RouteSearch, found: tuple[list[Route], list[BudgetReport]]
) -> None:
    signals = [{p: sensitivity(search, la, p) for p in PAPER} for la in range(LAYERS)]
    expected = [min(PAPER, key=lambda p, layer=layer: layer[p]) for layer in signals]
    route = found[0][0]
    assert (route.policy, route.tokens) == ("polykv", TOKENS)
    assert [layer.policy for layer in route.layers] == expected
    assert {layer.tokens for layer in route.layers} == {TOKENS}
    inverse = search.polykv(TOKENS, Variant(), inverse=True)
    other = [max(PAPER, key=lambda p, layer=layer: layer[p]) for layer in signals]
    assert [layer.policy for layer in inverse.layers] == other and "inverse" in inverse.note


def test_variants_are_wanted_by_name_and_ours_alone_needs_curves(
    subject: LoadedModel, text_file: Path
) -> None:
    search = search_of(subject, text_file, wanted=("polykv-cosine-perplexity", "polykv"))
    routes, reports = search.routes()
    assert [route.policy for route in routes] == ["polykv-cosine-perplexity", "polykv"]
    assert routes[0].layers == search.polykv(TOKENS, Variant("cosine", "perplexity")).layers
    assert routes[0].note == "Algorithm 1, preference cosine, budgets perplexity"
    assert routes[1].layers == search.polykv(TOKENS, Variant()).layers
    assert not reports and not search.losses.ledger.of(Document("needle", 0))


def test_a_decode_phase_has_signals_of_its_own(subject: LoadedModel, text_file: Path) -> None:
    """The same definitions, on losses of layers that evict while tokens are fed."""
    paper = (*PAPER, "expected-attention")  # evicts prompts alone
    wanted = ("polykv", "polykv-cosine-perplexity")
    search = search_of(subject, text_file, paper=paper, decode=True, wanted=wanted)
    (default, variant), _ = search.routes()
    plain = search_of(subject, text_file, paper=paper, wanted=wanted).routes()[0]
    assert [route.layers for route in (default, variant)] == [route.layers for route in plain]
    assert not any(route.decode for route in plain)
    text = Document("text", 0)
    full = losses(search, text, "0-3: full")

    def signals(layer: int, policy: str) -> Loss:
        alone = search.losses.alone(layer, LayerRoute(policy, TOKENS))
        return losses(search, text, key_of(DecodePhase(alone)))

    def more(layer: int, policy: str) -> float:
        found = signals(layer, policy)
        return math.exp(found.nll / found.targets) - math.exp(full.nll / full.targets)

    each = range(LAYERS)
    lowest = [min(PAPER, key=lambda p, la=la: more(la, p)) for la in each]
    highest = [max(PAPER, key=lambda p, la=la: signals(la, p).cosine or 0.0) for la in each]
    assert [layer.policy for layer in default.decode] == lowest
    assert [layer.policy for layer in variant.decode] == highest
    worst = [max(0.0, *(more(la, p) for p in PAPER)) + 1e-6 for la in each]
    spare = [LAYERS * (TOKENS - 37) * m / sum(worst) for m in worst]
    shares = largest_remainder(LAYERS * TOKENS, [37 + share for share in spare])
    assert [layer.tokens for layer in variant.decode] == shares


def test_a_decode_phase_needs_a_route_and_a_policy_that_evicts_then(
    subject: LoadedModel, text_file: Path
) -> None:
    with pytest.raises(BadInput, match=r"none of \['expected-attention'\] evicts .*'tova'"):
        search_of(subject, text_file, paper=("expected-attention",), decode=True)
    with pytest.raises(BadInput, match=r"only polykv's routes .*\['polykv-best'\]"):
        search_of(subject, text_file, wanted=("polykv-best",), decode=True)


def test_cosines_and_the_other_budgets_are_algorithm_1(
    search: RouteSearch, found: tuple[list[Route], list[BudgetReport]]
) -> None:
    route = search.polykv(TOKENS, Variant("cosine", "entropy"))
    cosines = [
        {
            p: losses(
                search, Document("text", 0), key_of(search.losses.alone(la, LayerRoute(p, TOKENS)))
            ).cosine
            for p in PAPER
        }
        for la in range(LAYERS)
    ]
    expected = [max(PAPER, key=lambda p, layer=layer: layer[p]) for layer in cosines]
    assert [layer.policy for layer in route.layers] == expected
    entropies, least = search.losses.entropies(), 37  # streaming-llm protects 4 and 32
    spare = [LAYERS * (TOKENS - least) * (s + 1e-6) / sum(s + 1e-6 for s in entropies)
             for s in entropies]  # fmt: skip
    shares = largest_remainder(LAYERS * TOKENS, [least + share for share in spare])
    assert [layer.tokens for layer in route.layers] == shares
    by_perplexity = search.sensitivities(TOKENS, "perplexity")
    assert by_perplexity == pytest.approx(
        [worst_case({p: sensitivity(search, la, p) for p in PAPER}) for la in range(LAYERS)]
    )


def test_ours_is_the_finalist_with_the_least_loss_on_the_choosing_half(
    search: RouteSearch, found: tuple[list[Route], list[BudgetReport]]
) -> None:
    (_, best), (report,) = found
    assert best.policy == "polykv-best"
    assert sum(layer.tokens or 0 for layer in best.layers) == LAYERS * TOKENS
    assert {layer.policy for layer in best.layers} <= {*POLICIES, *PAPER}
    finalists = [c for c in report.candidates if c.choosing is not None]
    assert len(finalists) == 4
    chosen = min(finalists, key=lambda c: c.choosing or 0.0)
    assert search.loss(search.choosing, best.layers) == chosen.choosing
    descent = next(c for c in report.candidates if c.name == "descent")
    assert descent.making == min(c.making for c in report.candidates)
    names = {c.name for c in report.candidates}
    assert {"keydiff everywhere", "allocator, worst", "allocator, mean, tova"} <= names
    assert sum(name.startswith("Algorithm 1") for name in names) == 6


def test_losses_are_by_group_and_of_the_right_half(
    search: RouteSearch, found: tuple[list[Route], list[BudgetReport]]
) -> None:
    layers = parse_layers(f"0-3: tova@{TOKENS}")
    groups = search.groups(search.making, layers)
    for group in ("text", "needle"):
        whole = losses(search, Document(group, 0), "0-3: full")
        evicted = losses(search, Document(group, 0), f"0-3: tova@{TOKENS}")
        assert groups[group] == (evicted.nll - whole.nll) / whole.targets
    expected = sum(groups.values()) / 2 + max(groups.values())
    assert search.loss(search.making, layers) == expected
    assert [d.name for d in search.choosing] == ["text-1", "needle-1"]
    single = found[1][0]
    assert single.single == min(single.singles, key=lambda p: single.singles[p])
    assert set(single.singles) == set(POLICIES)


def test_curves_end_at_the_context_without_loss(
    search: RouteSearch, found: tuple[list[Route], list[BudgetReport]]
) -> None:
    for curve in search.curves("worst"):
        assert min(curve[key] for key in curve if key[1] == CONTEXT) == 0.0
        assert {tokens for _, tokens in curve} == {*search.grid, CONTEXT}
    assert search.grid == [37, 64, 128]


def test_settings_that_cannot_be_are_refused(subject: LoadedModel, text_file: Path) -> None:
    with pytest.raises(BadInput, match=r"budget of 36 tokens .* at least 37"):
        search_of(subject, text_file, tokens=(36,))
    with pytest.raises(BadInput, match="fewer than the context's 160"):
        search_of(subject, text_file, tokens=(160,))
    with pytest.raises(UnknownName, match="unknown eviction policy 'full'"):
        search_of(subject, text_file, paper=("full",))
    with pytest.raises(UnknownName, match="unknown routed policy 'snapkv'; known: polykv, "):
        search_of(subject, text_file, wanted=("snapkv",))
    with pytest.raises(BadInput, match="at least one candidate"):
        search_of(subject, text_file, policies=())


def test_the_uniform_control_is_the_best_policy_everywhere(
    search: RouteSearch, found: tuple[list[Route], list[BudgetReport]]
) -> None:
    control = search.uniform(TOKENS)
    everywhere = {p: parse_layers(f"0-3: {p}@{TOKENS}") for p in POLICIES}
    best = min(POLICIES, key=lambda p: search.loss(search.making, everywhere[p]))
    assert control.layers == everywhere[best]
