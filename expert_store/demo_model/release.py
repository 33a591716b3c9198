"""One published demo model: which base and which delta it is made of, and what must come out."""

from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable


@dataclass(frozen=True)
class Release:
    """Checksums of everything that goes into a demo model and of its weights."""

    wheel_sha256: str
    gguf_sha256: str
    delta_sha256: str
    weights_sha256: str
    """`moe_weights.weights_digest` of base + delta: every machine builds the same bits."""
    data_dir: Traversable
    """Holds `delta.safetensors` and the checkpoint's `config.json`."""


DEMO_RELEASE = Release(
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    delta_sha256="7a492cb12c67159c4f797b6c76b90cd73827c9d399d0e33eee58b53568f8cf02",
    weights_sha256="fa3d8adac5f7940b2dcf73122749b94f4de075332b92e1153d5c06676f105c9c",
    data_dir=files("expert_store.demo_model"),
)
