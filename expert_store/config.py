"""What an expert store can be asked for; defaults live here and nowhere else."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from promoe.rpc import MAX_SOCKET_PATH_NBYTES


def default_run_dir() -> Path:
    """The user's runtime folder where there is one (it differs per host and user), else one under /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "promoe" if runtime else Path(f"/tmp/promoe-{os.getuid()}")


@dataclass(frozen=True)
class StoreConfig:
    """The `[store]` table.

    Attributes:
        pack: folder of the expert pack.
        run_dir: folder of the store's sockets, lock and state; one store per folder.
        listen: gRPC endpoint, `unix:PATH` or `host:port`; empty: `store.sock` in `run_dir`.
        metrics_listen: `host:port` of the Prometheus page; empty for none.
        arena_kind: kind of the shared memory.
        fill_threads: parallel reads of the pack.
        adopt_wait_s: how long a restarted store waits for a living compute node to hand the arena back.
        scrub_interval_s: pause between two checks of all blobs in the arena; 0: only after adopting one.
        allowed_uids: comma-separated user ids that may attach besides the store's own and root. They need the group
            of `run_dir` too: its sockets are for owner and group.
        drain_deadline_s: how long SIGTERM waits for running calls.
    """

    pack: Path
    run_dir: Path = field(default_factory=default_run_dir)
    listen: str = ""
    metrics_listen: str = ""
    arena_kind: str = "memfd"
    fill_threads: int = 8
    adopt_wait_s: float = 10.0
    scrub_interval_s: float = 0.0
    allowed_uids: str = ""
    drain_deadline_s: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.fill_threads <= 256:
            raise ValueError(f"store.fill_threads is {self.fill_threads}; allowed: 1 to 256")
        for name, seconds in (
            ("adopt_wait_s", self.adopt_wait_s),
            ("scrub_interval_s", self.scrub_interval_s),
            ("drain_deadline_s", self.drain_deadline_s),
        ):
            if not seconds >= 0:
                raise ValueError(f"store.{name} is {seconds}; allowed: 0 or more")
        if not all(uid.strip().isdecimal() for uid in self.allowed_uids.split(",") if uid.strip()):
            raise ValueError(f"store.allowed_uids is {self.allowed_uids!r}; expected numbers with commas between")
        for path in (self.fd_socket, self.listen_socket):
            if path is not None and len(os.fsencode(path.absolute())) > MAX_SOCKET_PATH_NBYTES:
                raise ValueError(
                    f"the socket path {path} is longer than {MAX_SOCKET_PATH_NBYTES} bytes; set store.run_dir shorter"
                )

    @property
    def endpoint(self) -> str:
        """Where gRPC is served."""
        return self.listen or f"unix:{self.run_dir / 'store.sock'}"

    @property
    def listen_socket(self) -> Path | None:
        """The path of gRPC's unix socket, if it is one."""
        return Path(self.endpoint.removeprefix("unix:")) if self.endpoint.startswith("unix:") else None

    @property
    def fd_socket(self) -> Path:
        """The unix socket that hands out the arena's descriptor."""
        return self.run_dir / "arena.sock"

    @property
    def peer_uids(self) -> frozenset[int]:
        """Users whose compute nodes may attach."""
        return frozenset({os.geteuid(), 0, *(int(uid) for uid in self.allowed_uids.split(",") if uid.strip())})
