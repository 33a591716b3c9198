"""Messages of a released schema, from its record: what peers out there were made from."""

from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

RELEASED = Path(__file__).resolve().parents[2] / "proto/released"


class ReleasedSchema:
    """The message classes of one version; they know nothing of fields that came later."""

    def __init__(self, version: str) -> None:
        self.version = version
        files = descriptor_pb2.FileDescriptorSet.FromString((RELEASED / f"{version}.binpb").read_bytes())
        self._pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            self._pool.Add(file)

    def message(self, name: str) -> type[Message]:
        """A message of `promoe.v1`."""
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(f"promoe.v1.{name}"))
