"""What a capture records for eviction policies, against an independent forward pass."""

import pytest
import recompute
import torch
from samples import tokens

from kvprism.errors import UnknownName
from kvprism.integrations import hf

N_PROMPT = 60


def inputs_of(model, signals=()):
    """A capture, and each layer's queries and keys of all positions."""
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, i=i: inputs.__setitem__(i, args[0][0]))
        for i, layer in enumerate(model.model.layers)
    ]
    _, views = hf.capture(model, tokens(N_PROMPT)[0], signals=signals)
    for hook in hooks:
        hook.remove()
    layers = [
        recompute.queries_keys_values(model, model.model.layers[i], inputs[i])[:2]
        for i in range(len(views))
    ]
    return views, layers


def test_the_mass_is_what_all_queries_paid(model, monkeypatch):
    monkeypatch.setattr("kvprism.score.accumulated.CHUNK", 16)  # several chunks of this prompt
    views, layers = inputs_of(model, {"mass"})
    cap = getattr(model.config, "attn_logit_softcapping", None)
    for view, (q, k), window in zip(views, layers, recompute.windows(model), strict=True):
        group = len(q) // len(k)
        mask = torch.ones(N_PROMPT, N_PROMPT, dtype=torch.bool).tril()
        mask = mask if window is None else mask.triu(1 - window)
        logits = q @ k.repeat_interleave(group, 0).mT * recompute.softmax_scale(model)
        weights = recompute.capped(logits, cap).masked_fill(~mask, -torch.inf).softmax(-1)
        expected = weights.sum(dim=1).unflatten(0, (-1, group)).mean(dim=1)
        held = len(view.kv.positions)
        # Up to 60 probabilities are added, each as near as captured keys and queries are (1e-4).
        torch.testing.assert_close(view.mass, expected[:, -held:], atol=1e-3, rtol=1e-3)
        assert window is not None or abs(float(view.mass.sum()) / len(k) - N_PROMPT) < 1e-3
        assert view.future_queries is None


def test_query_statistics_are_those_of_the_queries_before_rope(model):
    views, layers = inputs_of(model, {"future_queries"})
    rope = model.config.rope_parameters
    for view, (q, _) in zip(views, layers, strict=True):
        half = q.shape[-1] // 2
        plain = recompute.rotate(q, -torch.arange(N_PROMPT), rope)[:, 4:]
        eye = torch.eye(2 * half)[None].expand(512, -1, -1)
        ahead = N_PROMPT + torch.arange(512)
        turned = (
            torch.stack(
                [
                    recompute.rotate(m, at.expand(2 * half), rope)
                    for m, at in zip(eye, ahead, strict=True)
                ]
            )
            .mean(dim=0)
            .T
        )  # columns: what becomes of each channel
        mean = plain.mean(dim=1) @ turned.T
        centred = plain - plain.mean(dim=1, keepdim=True)
        covariance = turned @ (centred.mT @ centred / centred.shape[1]) @ turned.T
        size = float(q.norm(dim=-1).max())
        torch.testing.assert_close(view.future_queries.mean, mean, atol=1e-4 * size, rtol=0)
        torch.testing.assert_close(
            view.future_queries.covariance, covariance, atol=1e-4 * size**2, rtol=0
        )
        assert view.mass is None


def test_norms_are_those_of_values_after_the_output_matrix(model):
    _, views = hf.capture(model, tokens(N_PROMPT)[0], signals={"output_norms"})
    for view, layer in zip(views, model.model.layers, strict=True):
        values = view.kv.components["v"]
        matrix = layer.self_attn.o_proj.weight.detach()
        group = matrix.shape[1] // values.shape[2] // len(values)
        for head, rows in enumerate(values):
            expected = torch.zeros(len(view.kv.positions), dtype=torch.float64)
            for q_head in range(head * group, (head + 1) * group):
                columns = slice(q_head * values.shape[2], (q_head + 1) * values.shape[2])
                # What this query head adds to the output if it attends to the token alone.
                expected += (rows.double() @ matrix[:, columns].double().T).abs().sum(-1)
            got = view.output_norms[head].double()
            torch.testing.assert_close(got, expected / group, rtol=1e-5, atol=0)


def test_signals_perturb_nothing(llama):
    plain_kv, plain = hf.capture(llama, tokens(N_PROMPT))
    kv, views = hf.capture(
        llama, tokens(N_PROMPT), signals={"mass", "future_queries", "output_norms"}
    )
    for a, b, x, y in zip(plain_kv.layers, kv.layers, plain, views, strict=True):
        assert all(torch.equal(a.components[name], b.components[name]) for name in "kv")
        assert torch.equal(x.queries, y.queries)
        assert x.mass is None and x.future_queries is None and y.mass is not None


def test_an_unknown_signal_is_refused(llama):
    with pytest.raises(
        UnknownName, match="unknown signal 'masses'; known: mass, future_queries, output_norms"
    ):
        hf.capture(llama, tokens(10), signals={"masses"})
