"""What a model will take, before a weight of it is read: what the expert store tells whoever plans for it.

One side reads configs and safetensors headers, the other shares memory out; they are processes of two services, and
this is the document that goes from one to the other.
"""

from dataclasses import asdict, dataclass

from promoe.errors import InvalidInput
from promoe.model_spec import ModelSpec
from promoe.pack_manifest import spec_document, spec_of


@dataclass(frozen=True)
class ModelFootprint:
    """One model in one number format.

    Attributes:
        spec: its geometry; the fingerprint is empty where nothing is packed yet.
        config: Transformers' configuration of the model, as its pack has it.
        dense_nbytes: everything but the experts, parameters and buffers, as it lies on the device.
        lookup_nbytes: of these, embeddings of which a token reads one row only.
        arena_nbytes: the experts in the host's memory.
        pack_nbytes: all files of the pack.
        source_nbytes: what comes onto the disk before packing begins (a download, the demo model's checkpoint); 0 when
            it is there.
        source_folder: where that comes to lie; empty when it is there.
        is_packed: it is a pack already.
        read_from: what was looked at, for people.
    """

    spec: ModelSpec
    config: dict[str, object]
    dense_nbytes: int
    lookup_nbytes: int
    arena_nbytes: int
    pack_nbytes: int
    source_nbytes: int
    source_folder: str
    is_packed: bool
    read_from: str

    def as_document(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "spec": spec_document(self.spec)}

    @classmethod
    def of_document(cls, document: object) -> "ModelFootprint":
        """Raises InvalidInput for a document that `as_document` did not make."""
        if not isinstance(document, dict):
            raise InvalidInput("A footprint is a JSON object.")
        try:
            return cls(**{**document, "spec": spec_of(document["spec"])})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"This is not a model's footprint ({error!r}).") from error


@dataclass(frozen=True)
class HostRoom:
    """How much memory the store may take for an arena, by its own rule.

    Attributes:
        nbytes: before what `reserve_nbytes` says.
        limit: what sets it, for people.
        reserve_nbytes: what the store wants to be free beside the arena.
    """

    nbytes: int
    limit: str
    reserve_nbytes: int

    @classmethod
    def of_document(cls, document: object) -> "HostRoom":
        """Raises InvalidInput for anything but its fields."""
        if not isinstance(document, dict):
            raise InvalidInput("A host's room is a JSON object.")
        try:
            return cls(int(document["nbytes"]), str(document["limit"]), int(document["reserve_nbytes"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"This is not a host's room ({error!r}).") from error
