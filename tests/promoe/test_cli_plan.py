"""`promoe plan` without its services: what is short is named with its mend, scripts get a code, it fits a terminal."""

import json
import resource
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from promoe.cli import plan as plan_command
from promoe.cli import plan_inquiry, plan_resources
from promoe.cli.diagnosis import Verdict, fail
from promoe.cli.pack_cache import PackPlan, ToolCommand
from promoe.cli.plan import PlanFlags
from promoe.cli.plan_inquiry import StoreAnswer, ask_store, footprint_source
from promoe.cli.plan_resources import Resource, device_resources, host_resources
from promoe.cli.plan_view import plan_view, suggestion
from promoe.errors import InternalError
from promoe.footprint import ModelFootprint
from promoe.model_spec import Dtype
from tests.promoe.command_line import CommandLine
from tests.promoe.plans import GIB, footprint, node_answer, store_answer


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


class Services:
    """Answer in the place of the store's and the node's modules; remember what the node was asked."""

    def __init__(self, store: StoreAnswer, node: dict[str, object]) -> None:
        self._store = store
        self._node = node
        self.arguments: tuple[str, ...] = ()

    def ask_store(self, pack: PackPlan, dtype: str | None) -> StoreAnswer:
        return self._store

    def ask_node(self, footprint: ModelFootprint, arguments: Sequence[str]) -> dict[str, object]:
        self.arguments = tuple(arguments)
        return self._node


def connect(monkeypatch: pytest.MonkeyPatch, services: Services) -> Services:
    monkeypatch.setattr(plan_command, "ask_store", services.ask_store)
    monkeypatch.setattr(plan_command, "ask_node", services.ask_node)
    return services


def by_name(resources: Sequence[Resource]) -> dict[str, Resource]:
    return {each.name: each for each in resources}


def test_what_fits_exits_with_0_and_what_does_not_with_1(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(monkeypatch, Services(store_answer(is_packed=True), node_answer()))
    fits = command_line.run("plan", "owner/name")
    assert fits.code == 0, fits.err
    assert "Suggestion: --cache-rate 0.5 (2 slots a layer): TPOT between 50 ms and 100 ms" in fits.out
    assert "short" not in fits.out
    connect(monkeypatch, Services(store_answer(is_packed=True), node_answer(slots_short_nbytes=GIB // 2)))
    short = command_line.run("plan", "owner/name")
    assert short.code == 1
    assert "Expert slots: 1.00 GiB needed, 512 MiB there, 512 MiB short. Give --cache-rate 0.25" in short.out
    connect(monkeypatch, Services(store_answer(room_nbytes=2 * GIB, is_packed=True), node_answer()))
    assert command_line.run("plan", "owner/name").code == 1
    wrong = command_line.run("plan", "owner/name", "--gpu-memory", "much")
    assert (wrong.code, "is not a size" in wrong.err) == (2, True)
    unknown = command_line.run("plan", "owner/name", "--dtype", "int3")
    assert (unknown.code, "allowed: float32, float16, bfloat16" in unknown.err) == (2, True)


def test_scripts_get_a_document(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(monkeypatch, Services(store_answer(is_packed=True), node_answer(slots_short_nbytes=GIB)))
    ran = command_line.run("plan", "owner/name", "--json")
    document = json.loads(ran.out)
    assert (ran.code, document["fits"], document["suggested_slots"]) == (1, False, 1)
    assert [each["verdict"] for each in document["resources"] if each["name"] == "expert slots"] == ["fail"]
    assert document["short"][0].endswith("Give --cache-rate 0.25, or --max-context 32.")
    assert document["model"]["spec"]["num_experts"] == 4
    assert document["suggestion"].startswith("Suggestion: --cache-rate 0.25")


def test_every_flag_reaches_the_node(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    services = connect(monkeypatch, Services(store_answer(is_packed=True), node_answer()))
    flags = (
        "--gpu-memory", "24GiB", "--host-memory", "64GiB", "--link", "25GB/s", "--memory-bandwidth", "1000GB/s",
        "--resident-tpot", "12.5", "--context", "8192", "--concurrency", "4", "--cache-rate", "0.5", "--device", "cuda",
        "--memory", "20GiB", "--trace", "a.trace", "--set", "compute.policy=lru",
    )  # fmt: skip
    assert command_line.run("plan", "owner/name", *flags).code == 0
    pairs = set(zip(services.arguments[::2], services.arguments[1::2], strict=True))
    expected = {
        ("--gpu-memory", str(24 * GIB)), ("--host-memory", str(64 * GIB)), ("--link", "25000000000"),
        ("--memory-bandwidth", "1000000000000"), ("--resident-tpot", "0.0125"), ("--requests", "4"),
        ("--set", "compute.max_context_tokens=8192"), ("--set", "compute.max_concurrent_requests=4"),
        ("--set", "compute.cache_rate=0.5"), ("--set", "compute.device=cuda"), ("--set", "compute.policy=lru"),
        ("--set", f"compute.memory_bytes={20 * GIB}"), ("--trace", str(Path("a.trace").absolute())),
    }  # fmt: skip
    assert expected <= pairs
    assert ("--set", "compute.expert_slots=2") in list(
        zip(*[iter(PlanFlags(expert_slots=2).node_arguments(Path("p")))] * 2, strict=True)
    )


def test_the_hosts_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_dir = tmp_path / "packs" / "not there yet"
    found = by_name(list(host_resources(store_answer(), None, pack_dir)))
    assert list(found) == ["host arena", "pack on disk", "memlock", "/dev/shm"]
    arena = found["host arena"]
    assert (arena.need_nbytes, arena.have_nbytes, arena.verdict) == (5 * GIB, 16 * GIB, Verdict.OK)
    assert (found["memlock"].need_nbytes, found["/dev/shm"].need_nbytes) == (None, None)
    elsewhere = by_name(list(host_resources(store_answer(dtype=Dtype.FLOAT32), 2 * GIB, pack_dir)))["host arena"]
    assert elsewhere.sentence.startswith("Host arena: 5.00 GiB needed, 2.00 GiB there, 3.00 GiB short. --dtype bf")
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    memfd = fail("shared memory", "no sealed memfd: not permitted", "allow memfd_create in the seccomp profile")
    monkeypatch.setattr(plan_resources, "check_shared_memory", lambda: [memfd])
    barred = by_name(list(host_resources(store_answer(is_packed=True), None, pack_dir)))
    assert barred["memlock"].have_nbytes is None
    assert barred["shared memory"].sentence == (
        "Shared memory: no sealed memfd: not permitted. Allow memfd_create in the seccomp profile."
    )
    assert barred["pack on disk"].need_nbytes == 0


def test_a_download_lies_on_the_same_disk_or_on_another(tmp_path: Path) -> None:
    here = by_name(list(host_resources(store_answer(source_folder=str(tmp_path / "hub")), None, tmp_path / "pack")))
    assert here["pack on disk"].need_nbytes == 11 * GIB
    assert "download" not in here
    there = by_name(list(host_resources(store_answer(source_folder="/dev/shm"), None, tmp_path / "pack")))
    assert (there["download"].need_nbytes, there["pack on disk"].need_nbytes) == (6 * GIB, 5 * GIB)


def test_a_device_that_nothing_mends_says_so() -> None:
    node = {**node_answer(slots_short_nbytes=GIB), "mends": []}
    short = by_name(list(device_resources(node)))["expert slots"]
    assert short.mend == "No flag mends it: it takes a larger device."


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("short_nbytes", [0, GIB // 2])
def test_it_fits_the_terminal(columns: int, short_nbytes: int, tmp_path: Path) -> None:
    node = node_answer(short_nbytes)
    resources = [*device_resources(node), *host_resources(store_answer(), None, tmp_path)]
    console = Console(width=columns, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115 - lives as long
    console.print(plan_view(footprint(), resources, node))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= columns
    assert any("◂ suggested" in line for line in lines)
    assert any(line.startswith("short") for line in lines) == bool(short_nbytes)
    assert any("does not fit" in line for line in lines)
    assert "…" not in "".join(lines)
    console.file.close()


def test_a_given_tpot_is_said_to_be_given() -> None:
    node = node_answer()
    forecast = node["forecast"]
    assert isinstance(forecast, dict)
    assert suggestion(forecast, 2).endswith("for each of 4 requests at once.")
    forecast["is_resident_given"] = True
    forecast["num_requests"] = 1
    assert suggestion(forecast, 2).endswith("tokens/s.")


def test_the_store_looks_at_the_pack_or_at_its_source(tmp_path: Path) -> None:
    step = ToolCommand("pack", "expert_store.pack", (str(tmp_path), "dir"))
    assert footprint_source(PackPlan("m", tmp_path / "pack", ())) == str(tmp_path / "pack")
    assert footprint_source(PackPlan("m", tmp_path / "pack", (step,))) == str(tmp_path)
    assert footprint_source(PackPlan("demo", tmp_path / "pack", (step,))) == "demo"
    (tmp_path / "config.json").write_text("{}")
    assert footprint_source(PackPlan("demo", tmp_path / "pack", (step,))) == str(tmp_path)


def test_what_a_module_refuses_is_told_in_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = PackPlan("m", tmp_path, ())
    # It ends with status 2 after a line that begins with its name and `error: `, as a wrong command line does.
    monkeypatch.setattr(plan_inquiry, "_FOOTPRINT_MODULE", "json.tool")
    with pytest.raises(ValueError, match=r"^argument infile: can't open"):
        ask_store(pack, None)
    # It ends with a traceback, as a bug does.
    monkeypatch.setattr(plan_inquiry, "_FOOTPRINT_MODULE", "promoe.cli.launch")
    with pytest.raises(InternalError, match=r"promoe\.cli\.launch failed"):
        ask_store(pack, None)
