"""Command lines of the services: what was asked for reaches them, and what the stack needs wins."""

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe.cli.pack_cache import PackPlan
from promoe.cli.run_dir import DEFAULT_LISTEN, RunDir
from promoe.cli.stack_plan import StackPlan, check_port_free, plan_stack
from promoe.cli.up import UpOptions
from promoe.config import Settings
from promoe.errors import AlreadyRunning, InvalidInput

RUN_DIR = RunDir(Path("/tmp/promoe-test"))


def plan_with(*assignments: str, config: Path | None = None, pack: str = "/packs/demo") -> StackPlan:
    return plan_stack(PackPlan("demo", Path(pack), ()), RUN_DIR, config, assignments)


def settings_of(arguments: tuple[str, ...]) -> Settings:
    """What a service would read from its command line."""
    config = Path(arguments[arguments.index("--config") + 1]) if "--config" in arguments else None
    flags = [arguments[i + 1] for i, flag in enumerate(arguments) if flag == "--set"]
    return Settings(config, flags)


def test_both_services_get_the_same_settings() -> None:
    plan = plan_with("compute.cache_rate=0.5", "log.level=debug")
    assert plan.store.arguments == plan.node.arguments
    settings = settings_of(plan.node.arguments)
    assert settings.asked("compute", "cache_rate", float) == 0.5
    assert settings.asked("log", "level", str) == "debug"
    assert settings.asked("compute", "pack", Path) == settings.asked("store", "pack", Path) == Path("/packs/demo")
    for section, key in (("compute", "store_endpoint"), ("store", "listen")):
        assert settings.asked(section, key, str) == RUN_DIR.store_endpoint
    assert settings.asked("store", "run_dir", Path) == RUN_DIR.path
    assert (plan.store.module, plan.node.module) == ("expert_store", "compute_node")


def test_a_predictor_is_started_where_the_node_looks_for_it() -> None:
    plan = plan_with("predictor.predictor=frequency", "predictor.drain_deadline_s=20")
    assert plan.predictor is not None
    assert (plan.predictor.module, plan.predictor.name) == ("predictor_service", "predictor")
    assert plan.predictor.arguments == plan.node.arguments
    assert plan.predictor.stop_deadline_s == 30
    assert plan.predictor.log == RUN_DIR.log("predictor")
    settings = settings_of(plan.predictor.arguments)
    assert settings.asked("predictor", "predictor", str) == "frequency"
    assert settings.asked("predictor", "pack", Path) == Path("/packs/demo")
    for section, key in (("predictor", "listen"), ("compute", "predictor_endpoint")):
        assert settings.asked(section, key, str) == RUN_DIR.predictor_endpoint
    assert plan_with().predictor is not None


def test_versions_are_looked_for_where_they_are_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMOE_HOME", "/homes/promoe")
    plan = plan_with()
    assert plan.predictor is not None
    assert settings_of(plan.predictor.arguments).asked("predictor", "registry", str) == "/homes/promoe/predictors"
    own = plan_with("predictor.registry=/mine")
    assert own.predictor is not None
    assert settings_of(own.predictor.arguments).asked("predictor", "registry", str) == "/mine"


def test_no_predictor_is_started_for_none_or_beside_another_one() -> None:
    plan = plan_with("predictor.predictor=none")
    assert plan.predictor is None
    assert settings_of(plan.node.arguments).asked("compute", "predictor_endpoint", str) is None
    elsewhere = plan_with("compute.predictor_endpoint=unix:/x/p.sock")
    assert elsewhere.predictor is None
    assert settings_of(elsewhere.node.arguments).asked("compute", "predictor_endpoint", str) == "unix:/x/p.sock"


@given(
    st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=20).map(str.strip)
)
def test_any_path_survives_the_command_line(name: str) -> None:
    plan = plan_with(pack=f"/packs/{name}")
    assert settings_of(plan.store.arguments).asked("store", "pack", Path) == Path(f"/packs/{name}")


def test_listens_by_flag_then_file_then_default(tmp_path: Path) -> None:
    config = tmp_path / "promoe.toml"
    config.write_text('[compute]\nlisten = "127.0.0.1:7001"\ndrain_deadline_s = 100\n')
    assert plan_with().endpoint == DEFAULT_LISTEN
    from_file = plan_with(config=config)
    assert (from_file.endpoint, from_file.node.stop_deadline_s) == ("127.0.0.1:7001", 110)
    by_flag = plan_with("compute.listen=0.0.0.0:7002", config=config)
    assert by_flag.endpoint == "127.0.0.1:7002"
    assert settings_of(by_flag.node.arguments).asked("compute", "listen", str) == "0.0.0.0:7002"
    assert plan_with("compute.listen=[::]:7003").endpoint == "[::1]:7003"
    assert plan_with("compute.listen=unix:/x/n.sock").endpoint == "unix:/x/n.sock"


def test_services_may_drain_as_long_as_was_asked() -> None:
    usual = plan_with()
    patient = plan_with("store.drain_deadline_s=100", "compute.drain_deadline_s=200")
    assert (patient.store.stop_deadline_s, patient.node.stop_deadline_s) == (110, 210)
    only_store = plan_with("store.drain_deadline_s=0.5")
    assert only_store.store.stop_deadline_s == 10.5
    assert only_store.node.stop_deadline_s == usual.node.stop_deadline_s


def test_port_zero_becomes_a_free_port() -> None:
    endpoint = plan_with("compute.listen=127.0.0.1:0").endpoint
    host, _, port = endpoint.partition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0
    check_port_free(endpoint)


@pytest.mark.parametrize("listen", ["nonsense", "host:", "host:99999", ":x"])
def test_no_address(listen: str) -> None:
    with pytest.raises(InvalidInput, match="is not an address to listen on; write host:port or unix:PATH"):
        check_port_free(plan_with(f"compute.listen={listen}").endpoint)


def test_a_port_in_use_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(AlreadyRunning, match=rf"{endpoint} cannot be listened on .*--listen"):
            check_port_free(endpoint)
    check_port_free(endpoint)
    check_port_free("unix:/anything")


def test_the_flags_of_up_come_after_its_settings() -> None:
    options = UpOptions(
        cache_rate=0.25,
        expert_slots=4,
        memory=8 << 30,
        device="cpu",
        listen="127.0.0.1:1",
        link_bytes_per_s=10**9,
        predictor="transition",
        settings=["compute.cache_rate=1.0", "log.level=debug"],
    )
    settings = Settings(None, options.assignments())
    assert settings.asked("compute", "cache_rate", float) == 0.25
    assert settings.asked("compute", "expert_slots", int) == 4
    assert settings.asked("compute", "memory_bytes", int) == 8 << 30
    assert settings.asked("compute", "device", str) == "cpu"
    assert settings.asked("compute", "link_bytes_per_s", float) == 10**9
    assert settings.asked("log", "level", str) == "debug"
    assert settings.asked("predictor", "predictor", str) == "transition"
    assert UpOptions().assignments() == ()
