"""The connector against vLLM 0.32's interface: its shape, its order of calls, its refusals."""

import inspect
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_vllm
import pytest
import torch

from kvprism.codec import backend, cpu
from kvprism.errors import BadInput, BudgetTooSmall, CodecError, ProfileMismatch, Unsupported
from kvprism.integrations import tiny
from kvprism.integrations.hf import load_config
from kvprism.integrations.vllm.counts import COUNTS
from kvprism.profiles import Profile
from kvprism.transport.token import create_token

BLOCKS, SLOTS = 8, 32
ASKED = {"do_remote_decode": True, "do_remote_prefill": False}


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    with fake_vllm.installed() as connector:
        yield connector


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    create_token(tmp_path / "token")
    return str(tmp_path / "token")


def engine_config(role: str, extra: dict[str, Any], model: str = "tiny", **changes: Any) -> Any:
    """A `VllmConfig` of a server in that role."""
    loaded = load_config(model)
    layers = {
        f"model.layers.{i}.self_attn.attn": SimpleNamespace(
            isa="vec", get_attn_backend=lambda: SimpleNamespace(get_name=lambda: "CPU_ATTN")
        )
        for i in range(loaded.num_hidden_layers)
    }
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config=extra,
            engine_id="engine",
            is_kv_producer=role in ("kv_producer", "kv_both"),
            is_kv_consumer=role in ("kv_consumer", "kv_both"),
        ),
        model_config=SimpleNamespace(
            hf_config=loaded,
            model=model,
            tokenizer=str(tiny.find(model)),
            dtype=torch.float32,
            max_model_len=1024,
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        speculative_config=None,
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )
    for path, value in changes.items():
        owner, _, name = path.rpartition("__")
        setattr(getattr(config, owner) if owner else config, name, value)
    return config


def cache_config(*specs: type) -> Any:
    specs = specs or (fake_vllm.FullAttentionSpec,)
    return SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec()) for spec in specs]
    )


class Engine:
    """One server: both halves, its blocks, and the calls of a step in the order of vLLM."""

    def __init__(self, module: ModuleType, role: str, extra: dict[str, Any]) -> None:
        config = engine_config(role, extra)
        roles = fake_vllm.KVConnectorRole
        self.scheduler = module.KVPrismConnector(config, roles.SCHEDULER, cache_config())
        self.worker = module.KVPrismConnector(config, roles.WORKER, cache_config())
        model = config.model_config.hf_config
        shape = (BLOCKS, model.num_key_value_heads, SLOTS, 2 * model.head_dim)
        layers = config.compilation_config.static_forward_context
        self.blocks = {name: torch.randn(shape) for name in layers}
        self.worker.register_kv_caches(self.blocks)

    def step(
        self, new: dict[str, int], table: dict[str, list[int]], ended: set[str] | None = None
    ) -> set[str]:
        """Schedule `new` tokens of requests that begin; the requests whose loads have ended."""
        output = SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(req_id=r, num_computed_tokens=0) for r in new],
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
            num_scheduled_tokens=new,
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda r: (table[r],)),
        )
        self.worker.bind_connector_metadata(self.scheduler.build_connector_meta(output))
        for name, kv in self.blocks.items():
            self.worker.wait_for_layer_load(name)
            self.worker.save_kv_layer(name, kv, None)
        self.worker.start_load_kv(None)
        self.worker.wait_for_save()
        _, received = self.worker.get_finished(ended or set())
        self.worker.clear_connector_metadata()
        return received or set()

    def rows(self, blocks: list[int], n: int) -> torch.Tensor:
        """All keys and values of a request's first `n` tokens."""
        cache = self.worker._worker.cache
        return torch.cat([torch.cat(cache.gather(i, blocks, 0, n)) for i in cache.layers])

    def close(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()


@pytest.fixture
def pair(module: ModuleType, token_file: str) -> Iterator[tuple[Engine, Engine]]:
    extra = {"token_file": token_file, "listen": "127.0.0.1:0"}
    decode = Engine(module, "kv_consumer", extra)
    host, port = decode.worker._worker.addresses[0]
    extra = {"token_file": token_file, "decode_address": f"{host}:{port}"}
    prefill = Engine(module, "kv_producer", extra)
    yield prefill, decode
    prefill.close()
    decode.close()


def test_overrides_have_the_parameters_of_the_interface(module: ModuleType) -> None:
    known = fake_vllm.signatures(fake_vllm.KVConnectorBase_V1)
    own = vars(module.KVPrismConnector)
    public = {name for name in own if not name.startswith("_")}
    assert public <= set(known), "methods that vLLM would never call"
    for name in public:
        parameters = list(inspect.signature(getattr(module.KVPrismConnector, name)).parameters)
        assert parameters == known[name], name


def test_the_package_gives_the_class_that_vllm_asks_for(module: ModuleType) -> None:
    import kvprism.integrations.vllm as package

    assert package.KVPrismConnector is module.KVPrismConnector
    with pytest.raises(AttributeError, match="OtherConnector"):
        package.OtherConnector  # noqa: B018


def test_no_graph_has_to_be_cut_for_it(module: ModuleType) -> None:
    """Copies are made after the forward pass and loads between steps, outside of any graph.

    Unless every layer is followed as it is computed.
    """
    needs = module.KVPrismConnector.requires_piecewise_for_cudagraph
    assert not needs({}) and not needs({"send": "chunk", "importance": "norm"})
    assert needs({"send": "layer"}) and needs({"importance": "attention"})


def test_a_prompt_travels_from_engine_to_engine(pair: tuple[Engine, Engine]) -> None:
    prefill, decode = pair
    ids = [*range(5, 75)]
    asked = fake_vllm.request("p", ids, dict(ASKED))
    prefill.scheduler.on_new_request(asked)
    assert prefill.scheduler.get_num_new_matched_tokens(asked, 0) == (0, False)
    prefill.step({"p": 70}, {"p": [3, 1, 6]})
    delay, params = prefill.scheduler.request_finished(asked, [3, 1, 6])
    assert not delay and params is not None  # blocks are free at once

    wanted = fake_vllm.request("d", ids, params)
    decode.scheduler.on_new_request(wanted)
    assert decode.scheduler.get_num_new_matched_tokens(wanted, 0) == (69, True)
    blocks = SimpleNamespace(get_block_ids=lambda: ([2, 7, 0],))
    decode.scheduler.update_state_after_alloc(wanted, blocks, 69)
    deadline, ended = time.monotonic() + 20, decode.step({}, {})
    while not ended and time.monotonic() < deadline:
        ended = decode.step({}, {})
    assert ended == {"d"}
    assert decode.worker.get_block_ids_with_load_errors() == set()
    assert torch.equal(decode.rows([2, 7, 0], 69), prefill.rows([3, 1, 6], 69))


def test_counts_reach_the_log_and_the_metrics_page(pair: tuple[Engine, Engine]) -> None:
    prefill, _ = pair
    asked = fake_vllm.request("p", [1, 2, 3], ASKED | {"remote_host": "10.0.0.1", "remote_port": 1})
    prefill.scheduler.on_new_request(asked)
    stats = prefill.scheduler.get_kv_connector_stats()
    assert stats.data == {"skipped:peer_not_allowed": 1}
    assert prefill.scheduler.get_kv_connector_stats() is None
    connector = type(prefill.scheduler)
    again = connector.build_kv_connector_stats(dict(stats.data)).aggregate(stats)
    assert again.reduce() == {"skipped:peer_not_allowed": 2} and not again.is_empty()

    counters: dict[str, Any] = {}

    class Counter:
        def __init__(self, name: str, documentation: str, labelnames: list[str]) -> None:
            self.values: dict[tuple[object, ...], float] = {}
            counters[name] = self
            assert documentation and labelnames[:2] == ["model_name", "engine"]

        def labels(self, *values: object) -> Any:
            def inc(amount: float) -> None:
                self.values[values] = self.values.get(values, 0) + amount

            return SimpleNamespace(inc=inc)

    labels: dict[int, list[object]] = {0: ["tiny", "0"]}
    shown = connector.build_prom_metrics(
        None, {"counter": Counter}, ["model_name", "engine"], labels
    )
    shown.observe(again.data)
    assert set(counters) == {f"vllm:kvprism_{name}" for name in COUNTS}
    assert counters["vllm:kvprism_skipped"].values == {("tiny", "0", "peer_not_allowed"): 2}


REFUSALS: list[tuple[dict[str, Any], tuple[type, ...], str]] = [
    ({"parallel_config__tensor_parallel_size": 2}, (), "tensor_parallel_size 2"),
    ({"parallel_config__pipeline_parallel_size": 2}, (), "pipeline_parallel_size 2"),
    ({"cache_config__cache_dtype": "fp8"}, (), "a cache of fp8"),
    ({"speculative_config": object()}, (), "speculative decoding"),
    ({}, (fake_vllm.MLAAttentionSpec,), r"\['MLAAttentionSpec'\].*no MLA"),
    ({}, (fake_vllm.FullAttentionSpec,) * 2, "only one group of FullAttentionSpec"),
]


@pytest.mark.parametrize(("changes", "specs", "message"), REFUSALS)
def test_what_was_not_tried_is_refused_at_the_start(
    module: ModuleType,
    token_file: str,
    changes: dict[str, Any],
    specs: tuple[type, ...],
    message: str,
) -> None:
    extra = {"token_file": token_file, "listen": "127.0.0.1:0"}
    config = engine_config("kv_consumer", extra, **changes)
    with pytest.raises(Unsupported, match=message):
        module.KVPrismConnector(config, fake_vllm.KVConnectorRole.WORKER, cache_config(*specs))


def test_sliding_windows_are_refused_by_name(module: ModuleType, token_file: str) -> None:
    extra = {"token_file": token_file, "listen": "127.0.0.1:0"}
    config = engine_config("kv_consumer", extra)
    config.model_config.hf_config = load_config("tiny-mistral")
    config.model_config.hf_config.sliding_window = 128
    with pytest.raises(Unsupported, match="sliding window"):
        module.KVPrismConnector(config, fake_vllm.KVConnectorRole.WORKER, cache_config())


def test_a_server_does_not_start_with_the_slow_codec_unless_told(
    module: ModuleType, token_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra, roles = {"token_file": token_file, "listen": "127.0.0.1:0"}, fake_vllm.KVConnectorRole
    config = engine_config("kv_consumer", extra)
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "library", lambda: None)
    with pytest.raises(CodecError, match="was not compiled"):
        module.KVPrismConnector(config, roles.WORKER, cache_config())
    monkeypatch.setenv(backend.VARIABLE, backend.REFERENCE)
    module.KVPrismConnector(config, roles.WORKER, cache_config())


def test_untried_versions_are_refused_unless_a_flag_says_otherwise(
    module: ModuleType, token_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.vllm, "__version__", "0.99.0")
    roles = fake_vllm.KVConnectorRole
    extra: dict[str, Any] = {"token_file": token_file, "listen": "127.0.0.1:0"}
    config = engine_config("kv_consumer", extra)
    with pytest.raises(Unsupported, match=r"vLLM 0\.99\.0.*allow_untried_vllm"):
        module.KVPrismConnector(config, roles.WORKER, cache_config())
    extra["allow_untried_vllm"] = True
    module.KVPrismConnector(config, roles.WORKER, cache_config())


def test_wrong_settings_end_the_start(module: ModuleType, token_file: str, tmp_path: Path) -> None:
    roles = fake_vllm.KVConnectorRole
    extra: dict[str, Any] = {"token_file": token_file, "decode_address": "127.0.0.1:1"}
    wrong: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"budgett": 0.3}, BadInput),
        ({"policy": "random-drop", "budget": "0.5"}, Unsupported),
        ({"policy": "spectrum", "budget": "0.1"}, BudgetTooSmall),
    ]
    for keys, error in wrong:
        config = engine_config("kv_producer", extra | keys)
        with pytest.raises(error):
            module.KVPrismConnector(config, roles.SCHEDULER, cache_config())
    Profile("00" * 32).save(tmp_path / "profile.json")
    config = engine_config("kv_producer", extra | {"profile": str(tmp_path / "profile.json")})
    with pytest.raises(ProfileMismatch):
        module.KVPrismConnector(config, roles.WORKER, cache_config()).register_kv_caches({})
