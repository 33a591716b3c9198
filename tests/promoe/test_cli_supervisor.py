"""Supervision of real processes: crash, restart, giving up, stopping, and dying with the parent."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from promoe.cli import supervisor
from promoe.cli.stop_signals import StopSignals
from promoe.cli.supervisor import RestartPolicy, Service, ServiceCommand, ServiceState, launch_arguments
from promoe.errors import Unavailable

DEADLINE_S = 20.0
QUICK = RestartPolicy(max_restarts=2, first_delay_s=0.01, max_delay_s=0.05)


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.perf_counter() + DEADLINE_S
    while not condition():
        assert time.perf_counter() < end_s, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the children's import path."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


@pytest.fixture
def make_service(modules: Path, tmp_path: Path) -> Iterator[Callable[[str], Service]]:
    services: list[Service] = []

    def make(code: str, policy: RestartPolicy = QUICK) -> Service:
        (modules / "tiny_service.py").write_text(code)
        command = ServiceCommand("tiny service", "tiny_service", ("--flag", "a b"), tmp_path / "tiny.log", 5.0)
        services.append(Service(command, policy))
        return services[-1]

    yield make
    for service in services:
        service.kill()
        assert service.is_gone


SLEEP = "import sys, time\nprint('up', sys.argv, flush=True)\ntime.sleep(60)\n"


def test_runs_a_module_with_its_arguments_in_a_group_of_its_own(make_service: Callable[[str], Service]) -> None:
    service = make_service(SLEEP)
    service.start()
    wait_for(lambda: "up" in service.last_words())
    assert service.last_words().endswith("'--flag', 'a b']")
    assert service.pid is not None
    assert os.getpgid(service.pid) == service.pid != os.getpgid(0)
    service.check_alive()
    service.terminate()
    wait_for(lambda: service.is_gone)
    assert service.exit_code() == -signal.SIGTERM


def test_a_crash_is_answered_with_a_restart(make_service: Callable[[str], Service]) -> None:
    service = make_service(SLEEP)
    service.start()
    first = service.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: service.is_gone)
    service.watch()
    assert (service.state, service.num_crashes, service.pid) == (ServiceState.BACKOFF, 1, None)
    assert "was killed by SIGKILL" in service.obituary()

    def is_running_again() -> bool:
        service.watch()
        return service.state is ServiceState.RUNNING

    wait_for(is_running_again)
    assert service.pid != first


def test_gives_up_with_the_last_words_of_the_last_life(make_service: Callable[[str], Service]) -> None:
    service = make_service("import sys\nprint('no memory for 7 GiB', file=sys.stderr)\nsys.exit(3)\n")
    service.start()

    def watch_until_it_gives_up() -> None:
        wait_for(lambda: service.watch() is not None)  # type: ignore[func-returns-value]  # watch raises in the end

    with pytest.raises(Unavailable, match=r"(?s)ended with exit code 3.*no memory for 7 GiB.*restarted 2 times"):
        watch_until_it_gives_up()
    assert (service.state, service.num_crashes) == (ServiceState.FAILED, 3)
    assert service.command.log.read_text().count("no memory") == 3
    assert service.last_words() == "no memory for 7 GiB"


@pytest.fixture
def small_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MAX_LOG_NBYTES", 1000)


def test_a_long_log_is_begun_anew_under_a_running_service(
    small_logs: None, make_service: Callable[[str], Service], tmp_path: Path
) -> None:
    service = make_service(
        "import pathlib, time\n"
        "print('old' * 400, flush=True)\n"
        f"log = pathlib.Path({str(tmp_path / 'tiny.log')!r})\n"
        "while log.stat().st_size: time.sleep(0.01)\n"
        "print('new', flush=True)\n"
        "time.sleep(60)\n"
    )
    log = service.command.log
    service.start()

    def has_begun_anew() -> bool:
        service.watch()
        return service.last_words() == "new"

    wait_for(has_begun_anew)
    assert log.read_text() == "new\n"
    assert log.with_name("tiny.log.1").read_text() == "old" * 400 + "\n"


def test_a_long_log_of_former_services_is_put_aside_at_the_start(
    small_logs: None, make_service: Callable[[str], Service]
) -> None:
    service = make_service("print('hello')")
    log = service.command.log
    log.with_name("tiny.log.1").write_text("older")
    log.write_text("old" * 400)
    service.start()
    wait_for(lambda: service.last_words() == "hello")
    assert log.read_text() == "hello\n"
    assert log.with_name("tiny.log.1").read_text() == "old" * 400


def test_without_room_for_the_former_log_the_new_one_goes_on(
    small_logs: None, make_service: Callable[[str], Service]
) -> None:
    service = make_service("print('hello')")
    service.command.log.write_text("old" * 400)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # Python ignores SIGXFSZ
    try:
        service.start()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    wait_for(lambda: service.last_words() == "hello")
    assert not service.command.log.with_name("tiny.log.1").exists()


def test_a_long_life_starts_a_new_row_of_crashes(make_service: Callable[..., Service]) -> None:
    service = make_service("", RestartPolicy(max_restarts=1, first_delay_s=0.0, stable_s=0.0))
    service.start()

    def has_crashed_often() -> bool:
        service.watch()
        return service.num_crashes >= 3

    wait_for(has_crashed_often)


def test_without_a_limit_it_is_restarted_for_ever(make_service: Callable[..., Service]) -> None:
    service = make_service("", RestartPolicy(max_restarts=None, first_delay_s=0.0, max_delay_s=0.0))
    service.start()

    def has_crashed_often() -> bool:
        service.watch()
        return service.crashes_in_row >= 7

    wait_for(has_crashed_often)
    service.crashes_in_row = 10**6  # years later
    wait_for(lambda: service.watch() is None and service.crashes_in_row > 10**6)  # type: ignore[func-returns-value]


def test_an_end_before_it_was_ready_is_told_at_once(make_service: Callable[[str], Service]) -> None:
    service = make_service("raise SystemExit('error: pack is damaged')")
    service.start()
    wait_for(lambda: service.is_gone)
    with pytest.raises(Unavailable, match=r"(?s)tiny service ended with exit code 1.*tiny\.log.*pack is damaged"):
        service.check_alive()
    assert service.state is ServiceState.FAILED


def test_one_that_will_not_stop_is_killed_with_its_children(make_service: Callable[[str], Service]) -> None:
    service = make_service(
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    service.start()
    wait_for(lambda: service.last_words() != "")
    grandchild = int(service.last_words())
    service.terminate()
    assert not service.is_gone
    service.kill()
    assert service.is_gone
    wait_for(lambda: not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == "zombie")


def test_children_die_with_a_parent_that_is_killed(modules: Path) -> None:
    (modules / "tiny_service.py").write_text(SLEEP)
    code = (
        "import subprocess, time\n"
        "from promoe.cli.supervisor import launch_arguments\n"
        "child = subprocess.Popen(launch_arguments('tiny_service', ()), process_group=0)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert parent.stdout.readline().startswith("up")  # the child's first line: it has asked the kernel by now
        parent.kill()
        wait_for(lambda: not child.is_running() or child.status() == "zombie")


def test_a_child_whose_parent_is_gone_already_does_not_start() -> None:
    arguments = launch_arguments("this", ())
    arguments[arguments.index(str(os.getpid()))] = "1"
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "Zen of Python" not in ended.stdout


def test_files_of_the_current_folder_are_not_imported(tmp_path: Path) -> None:
    (tmp_path / "runpy.py").write_text("raise SystemExit(7)")
    (tmp_path / "this.py").write_text("raise SystemExit(8)")
    arguments = launch_arguments("this", ())
    ended = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "Zen of Python" in ended.stdout


def test_signals_are_counted_and_wake_the_loop() -> None:
    with StopSignals() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        begin_s = time.perf_counter()
        stop.wait(30)
        assert time.perf_counter() - begin_s < 10
        assert stop.asked
        assert not stop.asked_twice
        os.kill(os.getpid(), signal.SIGTERM)
        stop.wait(30)
        assert stop.asked_twice
        stop.wait(0.0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
