"""The repository's own files as data: parsed modules, their imports, and every text file that people read."""

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
SERVICES: Final = ("compute_node", "expert_store", "predictor_service")
PRODUCT_FOLDERS: Final = ("proto/promoe", *SERVICES, "deploy")
GENERATED_FOLDER: Final = "proto/promoe/v1"
_IGNORED_FOLDERS: Final = frozenset({"__pycache__", "build", "dist"})
_READABLE_SUFFIXES: Final = frozenset({"", ".py", ".md", ".toml", ".yaml", ".yml", ".proto", ".lock", ".txt", ".json"})


@dataclass(frozen=True)
class SourceModule:
    """One Python file.

    Attributes:
        path: relative to the root, with slashes.
        source: its text.
    """

    path: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return ast.parse(self.source, self.path)

    @property
    def name(self) -> str:
        """The dotted import name; a package's is that of its folder."""
        parts = PurePosixPath(self.path.removeprefix("proto/")).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def package(self) -> str:
        """The top-level import name."""
        return self.name.partition(".")[0]

    @property
    def file_name(self) -> str:
        """For example `service.py`."""
        return PurePosixPath(self.path).name

    @property
    def num_lines(self) -> int:
        """Lines, blank ones included."""
        return len(self.source.splitlines())

    @property
    def num_written_lines(self) -> int:
        """Lines that are not blank."""
        return sum(bool(line.strip()) for line in self.source.splitlines())

    def is_in(self, *folders: str) -> bool:
        """True below one of these folders."""
        return any(self.path.startswith(f"{folder}/") for folder in folders)

    @cached_property
    def imported_names(self) -> tuple[str, ...]:
        """Everything it imports, anywhere in the file; `from a import b` counts as `a.b`."""
        return tuple(_imported_names(ast.walk(self.tree)))

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """All functions and methods, nested ones included."""
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    def statements(self) -> Iterator[ast.stmt]:
        """What runs at import: the module's statements and those inside its top-level `if`, `try` and `with`."""
        pending: list[ast.AST] = list(self.tree.body)
        while pending:
            node = pending.pop(0)
            if isinstance(node, ast.stmt):
                yield node
            if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
                pending.extend(ast.iter_child_nodes(node))


def _imported_names(nodes: Iterator[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if name not in _IGNORED_FOLDERS
            and not name.endswith(".egg-info")
            and (name == ".ci" or not name.startswith("."))
        )
        yield from (Path(parent) / name for name in sorted(files))


@cache
def _load(folders: tuple[str, ...]) -> tuple[SourceModule, ...]:
    paths = [path for folder in folders for path in _files_below(ROOT / folder) if path.suffix == ".py"]
    modules = (SourceModule(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths)
    return tuple(module for module in modules if not module.is_in(GENERATED_FOLDER))


def product_modules() -> tuple[SourceModule, ...]:
    """Hand-written product code."""
    return _load(PRODUCT_FOLDERS)


def modules_of_tests() -> tuple[SourceModule, ...]:
    """Tests and benches."""
    return _load(("tests",))


def texts() -> Iterator[tuple[str, str]]:
    """Path and text of every file that people read: code, documents, build files."""
    for path in _files_below(ROOT):
        if path.suffix in _READABLE_SUFFIXES and path.stat().st_size < 1 << 20:
            try:
                yield path.relative_to(ROOT).as_posix(), path.read_text()
            except UnicodeDecodeError:
                continue
