"""How much memory this process may still take for an arena."""

from typing import Final

from promoe.errors import InsufficientMemory
from promoe.footprint import HostRoom
from promoe.host_memory import host_memory

# What the store's own process and the kernel's tables need beside the arena.
_RESERVE_NBYTES: Final = 128 << 20


def check_room_for(arena_nbytes: int) -> None:
    """Raises InsufficientMemory naming the number that is short."""
    room = host_room()
    wanted = arena_nbytes + room.reserve_nbytes
    if wanted > room.nbytes:
        raise InsufficientMemory(
            f"The arena needs {_gib(wanted)} GiB, but {room.limit} leaves {_gib(room.nbytes)} GiB: "
            f"{_gib(wanted - room.nbytes)} GiB are short. Free memory or raise the limit (docker: mem_limit)."
        )


def host_room() -> HostRoom:
    """What the tightest limit leaves at this moment."""
    memory = host_memory()
    return HostRoom(memory.free_nbytes, memory.limit, _RESERVE_NBYTES)


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f}"
