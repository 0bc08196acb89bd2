"""The rooms' doors open one way: the imports of every file, read and not run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "intarsia"
# Each room may import itself and those named here.
DOORS = {
    "base": set(),
    "arch": {"base"},
    "ops": {"base", "arch"},
    "model": {"base", "arch", "ops"},
    "formats": {"base", "arch", "ops", "model"},
    "hf": {"base", "arch", "ops", "model", "formats"},
    "data": {"base"},
    "engine": {"base", "arch", "ops", "model", "formats", "data"},
    "evaluate": {"base", "arch", "ops", "model", "formats", "data", "engine"},
    "train": {"base", "arch", "ops", "model", "formats", "data", "evaluate"},
    "compress": {"base", "arch", "ops", "model", "formats", "data", "engine", "evaluate", "train", "report"},
    "report": {"base", "arch"},
    "doctor": {"base", "ops", "data", "formats"},
    "commands": {"base", "arch", "formats", "data", "engine", "evaluate", "compress", "report", "doctor", "train"},
    "cli": {"base", "commands"},
    "__main__": {"cli"},
    "__init__": {"formats", "engine", "evaluate", "compress", "train"},  # the lazy verbs of the Python API
}
NO_TORCH = ("base", "arch", "data", "report", "compress/solve.py", "compress/targets.py", "compress/baselines.py",
            "compress/grid.py")  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    """`base`, `compress`, ...; a file beside the rooms is its own room."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Every module that a file imports anywhere in it, dotted; `from a import b` counts as both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> set[str]:
    package = ("intarsia", *path.relative_to(ROOT).parts[:-1])
    return set(imports(ast.parse(path.read_text(encoding="utf-8")), package))


def rooms_of(modules: set[str]) -> set[str]:
    known = {name for name in DOORS} | {room(path) for path in FILES}
    return {parts[1] for parts in (m.split(".") for m in modules) if parts[0] == "intarsia" and parts[1:2]
            and parts[1] in known}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_uses_only_its_rooms_doors(path):
    here = room(path)
    assert here in DOORS, f"the room {here} is not on the plan: say in DOORS what it may stand on"
    wrong = rooms_of(imports_of(path)) - DOORS[here] - {here}
    assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}, which {here} must not"


def no_torch_files() -> list[Path]:
    return [f for f in FILES if str(f.relative_to(ROOT)).startswith(NO_TORCH)]


@pytest.mark.parametrize("path", no_torch_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_without_torch(path):
    heavy = {module.split(".")[0] for module in imports_of(path)} & {"torch", "transformers"}
    assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


def test_only_the_hf_room_imports_transformers():
    users = {room(path) for path in FILES if any(m.split(".")[0] == "transformers" for m in imports_of(path))}
    assert users <= {"hf"}


def test_the_reader_sees_every_way_to_import():
    source = "import intarsia.model as m\ndef f():\n from intarsia import cli\n from ..ops import x\n from . import y"
    found = set(imports(ast.parse(source), ("intarsia", "arch")))
    assert rooms_of(found) == {"model", "cli", "ops", "arch"}


def test_the_plan_has_no_circle():
    left = {name: set(doors) for name, doors in DOORS.items()}
    while left:
        free = [name for name, doors in left.items() if not doors & left.keys()]
        assert free, f"these rooms stand on each other: {sorted(left)}"
        for name in free:
            del left[name]
