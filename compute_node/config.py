"""What a compute node can be asked for; defaults live here and nowhere else."""

import math
import re
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Final

from compute_node.eviction import eviction_named
from compute_node.schedule import HintUse, SchedulePolicy, SlotSplit, policy_named

_MAX_COUNT: Final = 2**32 - 1
"""GetInfo reports counts in 32 bits."""

_MAX_PORT: Final = 65535

_LONGEST_ENDPOINT: Final = 300

_OTLP_ENDPOINT: Final = re.compile(r"https?://[^/\s]+:\d+/?")


class DeviceChoice(Enum):
    """`auto` takes CUDA when it is there and says why not when it is not."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


class EngineChoice(Enum):
    """`auto` tries one token on continuous batching and takes the interleaved engine if that fails."""

    AUTO = "auto"
    CONTINUOUS = "continuous"
    INTERLEAVED = "interleaved"


@dataclass(frozen=True)
class ComputeConfig:
    """The `[compute]` table.

    Attributes:
        pack: folder of the expert pack.
        store_endpoint: gRPC endpoint of the expert store, `unix:PATH` or `host:port`.
        predictor_endpoint: gRPC endpoint of the predictor, `unix:PATH` or `host:port`; empty for none.
        predictor_trial_s: a predictor that took over while the node served and fails within this time is left for the
            one before it; 0: the node stays with it.
        attach_deadline_s: how long start-up waits for the store to be filled.
        listen: gRPC endpoint to serve on; port 0 takes a free one.
        metrics_listen: `host:port` of the Prometheus page; empty for none.
        http_listen: `host:port` of the OpenAI-compatible HTTP API; port 0 takes a free one, empty for none.
        http_api_keys_file: keys of which clients must send one, a line each; `PROMOE_API_KEYS` may have further ones.
        http_anonymous: others than this host may use the HTTP API without a key.
        http_cors_origins: origins whose web pages may use the HTTP API, separated by commas.
        http_max_body_bytes: longest body of an HTTP request.
        otlp_endpoint: `http://host:port` (or https) of an OpenTelemetry collector that spans of requests are sent to,
            by gRPC; empty: as `OTEL_EXPORTER_OTLP_ENDPOINT` says, or none. Needs `pip install promoe[otel]`.
        device: `auto`, `cuda` or `cpu`.
        engine: `auto`, `continuous` or `interleaved`.
        cache_rate: device slots divided by all experts, in (0, 1]; None: as many as the memory budget allows.
        expert_slots: device slots per MoE layer, instead of `cache_rate`.
        memory_bytes: device memory for dense weights, slots and KV together; None: 90% of what is free.
        max_context_tokens: longest prompt plus answer; None: the model's own limit, at most 8192.
        max_concurrent_requests: requests that are in one batch.
        max_queued_requests: accepted requests that wait; further ones are refused.
        max_batch_tokens: tokens of one step, prefill included.
        max_prompt_bytes: longest prompt text.
        policy: a named set of the scheduling settings that follow (`lru`, `promoe`, `proactive`); those that are given
            override the set's (see `compute_node.schedule`).
        eviction: a row of the eviction table.
        slot_split: `layer` or `global`.
        hints: `ignore`, `top` or `budgeted`.
        early_preemption: all of a layer's misses are asked for when its routing is known.
        reorder: experts are computed in order of arrival.
        stream_prefill: a prefill's next layers are loaded in order.
        chunk_bytes: unit of one copy; None: a share of an expert.
        max_chunks_in_flight: copies under way at once.
        link_bytes_per_s: throttles the CPU's link to play another one; None: not throttled.
        serial: computes a layer only when all its experts have arrived (the oracle of the overlapped loop).
        num_threads: torch's threads on the CPU; None: torch's own choice.
        drain_deadline_s: how long SIGTERM waits for running requests.
        request_deadline_s: longest life of one request, queueing included.
    """

    pack: Path
    store_endpoint: str
    predictor_endpoint: str = ""
    predictor_trial_s: float = 60.0
    attach_deadline_s: float = 1800.0
    listen: str = "127.0.0.1:50051"
    metrics_listen: str = ""
    http_listen: str = ""
    http_api_keys_file: Path | None = None
    http_anonymous: bool = False
    http_cors_origins: str = ""
    http_max_body_bytes: int = 16 << 20
    otlp_endpoint: str = ""
    device: DeviceChoice = DeviceChoice.AUTO
    engine: EngineChoice = EngineChoice.AUTO
    cache_rate: float | None = None
    expert_slots: int | None = None
    memory_bytes: int | None = None
    max_context_tokens: int | None = None
    max_concurrent_requests: int = 8
    max_queued_requests: int = 64
    max_batch_tokens: int = 512
    max_prompt_bytes: int = 4 << 20
    policy: str = "proactive"
    eviction: str | None = None
    slot_split: SlotSplit | None = None
    hints: HintUse | None = None
    early_preemption: bool | None = None
    reorder: bool | None = None
    stream_prefill: bool | None = None
    chunk_bytes: int | None = None
    max_chunks_in_flight: int | None = None
    link_bytes_per_s: float | None = None
    serial: bool = False
    num_threads: int | None = None
    drain_deadline_s: float = 30.0
    request_deadline_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.cache_rate is not None and self.expert_slots is not None:
            raise ValueError("compute.cache_rate and compute.expert_slots say the same thing; give one of them")
        if self.cache_rate is not None and not 0 < self.cache_rate <= 1:
            raise ValueError(f"compute.cache_rate is {self.cache_rate}; allowed: above 0, up to 1")
        positive = {
            "expert_slots": self.expert_slots,
            "memory_bytes": self.memory_bytes,
            "max_context_tokens": self.max_context_tokens,
            "max_concurrent_requests": self.max_concurrent_requests,
            "max_batch_tokens": self.max_batch_tokens,
            "max_prompt_bytes": self.max_prompt_bytes,
            "http_max_body_bytes": self.http_max_body_bytes,
            "chunk_bytes": self.chunk_bytes,
            "max_chunks_in_flight": self.max_chunks_in_flight,
            "link_bytes_per_s": self.link_bytes_per_s,
            "num_threads": self.num_threads,
            "request_deadline_s": self.request_deadline_s,
            "attach_deadline_s": self.attach_deadline_s,
        }
        for name, value in positive.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"compute.{name} is {value}; allowed: above 0")
        for name, least in (
            ("max_queued_requests", self.max_queued_requests),
            ("drain_deadline_s", self.drain_deadline_s),
            ("predictor_trial_s", self.predictor_trial_s),
        ):
            if not 0 <= least < math.inf:
                raise ValueError(f"compute.{name} is {least}; allowed: 0 or more")
        for name, count in (
            ("max_concurrent_requests", self.max_concurrent_requests),
            ("max_queued_requests", self.max_queued_requests),
            ("max_prompt_bytes", self.max_prompt_bytes),
            ("chunk_bytes", self.chunk_bytes),
            ("max_chunks_in_flight", self.max_chunks_in_flight),
        ):
            if count is not None and count > _MAX_COUNT:
                raise ValueError(f"compute.{name} is {count}; allowed: up to {_MAX_COUNT}")
        self._check_addresses()

    def _check_addresses(self) -> None:
        for name, address in (("metrics_listen", self.metrics_listen), ("http_listen", self.http_listen)):
            if address and not _is_host_and_port(address):
                raise ValueError(f"compute.{name} is {address!r}; expected host:port")
        if self.otlp_endpoint and not _OTLP_ENDPOINT.fullmatch(self.otlp_endpoint):
            raise ValueError(
                f"compute.otlp_endpoint is {self.otlp_endpoint!r}; expected http://host:port or https://host:port"
            )
        if self.predictor_endpoint:
            check_predictor_endpoint("compute.predictor_endpoint", self.predictor_endpoint)

    def schedule(self) -> SchedulePolicy:
        """The named set with what was asked for otherwise.

        Raises:
            SettingUnfit: no such set, or no such eviction.
        """
        asked = {
            "eviction": self.eviction,
            "slot_split": self.slot_split,
            "hints": self.hints,
            "early_preemption": self.early_preemption,
            "reorder": self.reorder,
            "stream_prefill": self.stream_prefill,
            "chunk_nbytes": self.chunk_bytes,
            "max_chunks_in_flight": self.max_chunks_in_flight,
        }
        overrides = {name: value for name, value in asked.items() if value is not None}
        policy = replace(policy_named(self.policy), serial=self.serial, **overrides)  # type: ignore[arg-type]
        eviction_named(policy.eviction)
        return policy


def check_predictor_endpoint(name: str, endpoint: str) -> None:
    """Raises ValueError for what no predictor can be at; whether one is there is another question."""
    is_address = endpoint.removeprefix("unix:") if endpoint.startswith("unix:") else _is_host_and_port(endpoint)
    if not is_address or len(endpoint) > _LONGEST_ENDPOINT or not endpoint.isprintable():
        raise ValueError(f"{name} is {endpoint[:_LONGEST_ENDPOINT]!r}; expected unix:PATH or host:port")


def _is_host_and_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(host) and port.isdecimal() and int(port) <= _MAX_PORT
