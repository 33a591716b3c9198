"""promoe: serves Mixture-of-Experts language models that are larger than the GPU. This is the client's public API."""

from promoe.cache_map import CacheMap, ExpertBit
from promoe.client import AsyncClient, AsyncGenerationStream, Client, GenerationStream
from promoe.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    ModelMismatch,
    Overloaded,
    PromoeError,
    Unavailable,
)
from promoe.generation import Answer, Delta, ExpertUse, FinishReason, GeneratedToken, GenerateOptions, Prompt, Usage
from promoe.node_report import CacheStats, NodeInfo
from promoe.retry import RetryPolicy

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncGenerationStream",
    "CacheMap",
    "CacheStats",
    "Client",
    "DeadlineExceeded",
    "Delta",
    "ExpertBit",
    "ExpertUse",
    "FinishReason",
    "GenerateOptions",
    "GeneratedToken",
    "GenerationStream",
    "InternalError",
    "InvalidInput",
    "ModelMismatch",
    "NodeInfo",
    "Overloaded",
    "PromoeError",
    "Prompt",
    "RetryPolicy",
    "Unavailable",
    "Usage",
]
