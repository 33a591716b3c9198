"""The house's machine-checkable rules: each takes one module and yields a sentence per violation."""

import ast
import re
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

from tests.source_tree import SERVICES, SourceModule

Violations: TypeAlias = Iterator[str]
Rule: TypeAlias = Callable[[SourceModule], Violations]

MAX_FILE_LINES: Final = 400
MAX_FUNCTION_LINES: Final = 60
MAX_PARAMETERS: Final = 6

CLI_FOLDER: Final = "proto/promoe/cli"
BENCH_FOLDER: Final = "tests/bench"
TORCH_FOLDERS: Final = ("expert_store/pack", "expert_store/demo_model", "predictor_service/training")
"""The parts of torch-free services that their running processes never import."""

BANNED_NAMES: Final = frozenset(
    {"utils", "util", "helpers", "helper", "common", "misc", "base", "core", "manager", "handler", "types", "cache"}
)
"""House rule 6; `cache` because the glossary knows an expert cache and a KV cache, never a bare one."""

PROCESS_EDGES: Final = frozenset(
    {
        # Every RPC: a bug becomes INTERNAL and a log entry (house rule 16).
        ("proto/promoe/rpc.py", "guarded"),
        ("proto/promoe/threaded_rpc.py", "guarded"),
        # Every call of a predictor plug-in, which may be anybody's: it ends its session, never the service.
        ("predictor_service/session.py", "_guarded"),
        # What a predictor says, and what is told to it, on the engine thread: a bug ends the session, never the node.
        ("compute_node/conversation_client.py", "receive"),
        ("compute_node/conversation_client.py", "encode_event"),
        ("predictor_service/service.py", "converse"),
        ("predictor_service/versions.py", "_try_out"),
        ("predictor_service/shadow/__main__.py", "main"),
        # A bug in training is told to who waits for a candidate; what is gathered stays.
        ("predictor_service/learner/candidate_thread.py", "_run"),
    }
)
"""File and function of each `except Exception` that does not raise again."""

_MUTABLE_CALLS: Final = frozenset(
    (
        *("dict", "list", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"),
        *("Lock", "RLock", "Condition", "Event", "Semaphore", "Queue"),
    )
)


def imports_no_other_service(module: SourceModule) -> Violations:
    """Services never import each other; the contract and its CLI import none."""
    for name in module.imported_names:
        package = name.partition(".")[0]
        if package in SERVICES and package != module.package:
            yield f"imports {name}: {module.package} reaches {package} over gRPC only"


def keeps_wire_types_at_the_edge(module: SourceModule) -> Violations:
    """`*_pb2` only in service.py, *_client.py, client.py and inside promoe."""
    at_the_edge = module.file_name in ("service.py", "client.py") or module.file_name.endswith("_client.py")
    if at_the_edge or module.package == "promoe":
        return
    for name in module.imported_names:
        if re.search(r"_pb2(_grpc)?(\.|$)", name):
            yield f"imports {name}: wire types stop at the edge"


def keeps_torch_out_of_light_services(module: SourceModule) -> Violations:
    """The store computes nothing and the predictor little; only packing, the demo model and training import torch."""
    if module.package not in ("expert_store", "predictor_service") or module.is_in(*TORCH_FOLDERS):
        return
    for name in module.imported_names:
        if name.partition(".")[0] in ("torch", "transformers", "accelerate"):
            yield f"imports {name}: {module.package} is torch-free"


def flows_in_one_direction(module: SourceModule) -> Violations:
    """`__main__ -> service -> engine -> domain`; `node` is the half of its composition root that `__main__` starts."""
    for name in module.imported_names:
        parts = name.split(".")
        if "__main__" in parts:
            yield f"imports {name}: nothing imports the composition root"
        if "service" in parts[1:] and parts[0] in SERVICES and module.file_name not in ("__main__.py", "node.py"):
            yield f"imports {name}: only the composition root wires the service"
        if "node" in parts[1:] and parts[0] in SERVICES and module.file_name != "__main__.py":
            yield f"imports {name}: only __main__ starts the node"
        if parts[:2] == ["promoe", "cli"] and not module.is_in(CLI_FOLDER):
            yield f"imports {name}: the CLI is on top"


def reads_config_at_the_root_only(module: SourceModule) -> Violations:
    """Settings are read by the composition roots and the CLI; everything else is handed values."""
    if module.file_name == "__main__.py" or module.is_in(CLI_FOLDER):
        return
    if "promoe.config.Settings" in module.imported_names:
        yield "imports Settings: only __main__ and the CLI read configuration"


def is_named_after_what_it_defines(module: SourceModule) -> Violations:
    """No catch-all module names; no class named by a bare word of the glossary."""
    for part in module.name.split("."):
        if part in BANNED_NAMES:
            yield f"is named {part!r}: name it after what it defines"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and node.name in ("Cache", "Manager", "Handler", "Base"):
            yield f"defines a bare {node.name}"


def keeps_its_sizes(module: SourceModule) -> Violations:
    """Files, functions and parameter lists stay readable."""
    if module.num_lines > MAX_FILE_LINES:
        yield f"has {module.num_lines} lines; at most {MAX_FILE_LINES}"
    for function in module.functions():
        num_lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if num_lines > MAX_FUNCTION_LINES:
            yield f"{function.name} has {num_lines} lines; at most {MAX_FUNCTION_LINES}"
        arguments = function.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        num_parameters = len([name for name in names if name not in ("self", "cls")])
        if num_parameters > MAX_PARAMETERS:
            yield f"{function.name} has {num_parameters} parameters; at most {MAX_PARAMETERS}"


def keeps_packages_empty(module: SourceModule) -> Violations:
    """`__init__.py` is empty except promoe's, which names the public API."""
    if module.file_name == "__init__.py" and module.path != "proto/promoe/__init__.py" and module.source.strip():
        yield "is not empty"


def imports_absolutely(module: SourceModule) -> Violations:
    """No relative imports, no star imports, no pickles, no escape from the type checker."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            yield f"line {node.lineno}: relative import"
    for name in module.imported_names:
        if name.endswith(".*"):
            yield f"imports {name}"
        if name.partition(".")[0] in ("pickle", "dill", "cloudpickle"):
            yield f"imports {name}: nothing is pickled"
        if name == "typing.Any":
            yield "imports typing.Any"


def prints_nothing(module: SourceModule) -> Violations:
    """Only the CLI's console and the benches print."""
    if module.is_in(CLI_FOLDER, BENCH_FOLDER):
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"line {node.lineno}: print"


def catches_what_it_can_name(module: SourceModule) -> Violations:
    """`except Exception` only at the process edges, or where it cleans up and raises again."""
    function_of = {
        inner: function.name
        for function in module.functions()  # outer functions come first, so the innermost one stays
        for inner in ast.walk(function)
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler) and _is_broad(node) and not _raises_again(node):
            name = function_of.get(node, "the module")
            if (module.path, name) not in PROCESS_EDGES:
                yield f"line {node.lineno}: broad except in {name}"


def holds_no_state_at_import(module: SourceModule) -> Violations:
    """No module-level singletons, nothing registered at import; a table is an UPPER_CASE `Final`."""
    for function_node in ast.walk(module.tree):
        if isinstance(function_node, ast.Global):
            yield f"line {function_node.lineno}: global statement"
    for node in module.statements():
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and not _is_main_guarded(module, node):
            yield f"line {node.lineno}: a call at import"
        if isinstance(node, ast.Assign) and _is_mutable(node.value):
            names = [target.id for target in node.targets if isinstance(target, ast.Name) and target.id != "__all__"]
            yield from (
                f"line {node.lineno}: {name} is mutable; make it a Final table or an object's" for name in names
            )
        if isinstance(node, ast.AnnAssign) and node.value is not None and _is_mutable(node.value):
            name = ast.unparse(node.target).lstrip("_")
            if "Final" not in ast.unparse(node.annotation) or name != name.upper():
                yield f"line {node.lineno}: {name} is mutable; make it a Final table or an object's"


def names_experts_one_way(module: SourceModule) -> Violations:
    """An expert is an ExpertId: never a bare (layer, expert) pair."""
    for function in module.functions():
        names = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
        if {"layer", "expert"} <= names:
            yield f"{function.name} takes layer and expert: take an ExpertId"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
            if "expert" in name and "tuple[int, int]" in ast.unparse(node.annotation):
                yield f"line {node.lineno}: {name} is a bare pair"


def measures_intervals_monotonically(module: SourceModule) -> Violations:
    """Intervals come from `time.perf_counter()`; the wall clock jumps, and where it is meant it says `unix_s`."""
    lines = module.source.splitlines()
    calls = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call)]
    for node in calls:
        clock = ast.unparse(node.func)
        if clock in ("time.time", "time.time_ns") and "unix_" not in lines[node.lineno - 1]:
            yield f"line {node.lineno}: {clock}"


def mocks_nothing(module: SourceModule) -> Violations:
    """Tests use second implementations of a seam, not mocks."""
    for name in module.imported_names:
        if name.startswith("unittest.mock") or name.partition(".")[0] in ("mock", "pytest_mock"):
            yield f"imports {name}"


def _is_broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(node, ast.Name) and node.id in ("Exception", "BaseException") for node in caught)


def _raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    return isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] in _MUTABLE_CALLS


def _is_main_guarded(module: SourceModule, node: ast.stmt) -> bool:
    guards = [
        outer for outer in module.tree.body if isinstance(outer, ast.If) and "__name__" in ast.unparse(outer.test)
    ]
    return any(inner is node for guard in guards for inner in ast.walk(guard))


PRODUCT_RULES: Final[tuple[Rule, ...]] = (
    imports_no_other_service,
    keeps_wire_types_at_the_edge,
    keeps_torch_out_of_light_services,
    flows_in_one_direction,
    reads_config_at_the_root_only,
    is_named_after_what_it_defines,
    keeps_its_sizes,
    keeps_packages_empty,
    imports_absolutely,
    prints_nothing,
    catches_what_it_can_name,
    holds_no_state_at_import,
    names_experts_one_way,
    measures_intervals_monotonically,
)

TEST_RULES: Final[tuple[Rule, ...]] = (keeps_its_sizes, imports_absolutely, prints_nothing, mocks_nothing)
