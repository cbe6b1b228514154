"""No circle of files: nothing in src/pensieve knows, over however many imports, a file that knows it back.

import-linter's layers see neither circles within a layer nor imports for annotations alone. Here every import counts: at the
top of a file, inside a function, and under `TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import pensieve

ROOT = Path(pensieve.__file__).parent


def modules(root: Path) -> dict[str, Path]:
    """Every file by the name it is imported by."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(source: str, known: Iterable[str]) -> set[str]:
    """The files that a file's imports name. `from package import name` names the package only if `name` is no file."""
    names: set[str] = set()
    known = set(known)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not resolved here"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                names.add(name if name in known else str(node.module))
    return names & known


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of files that import each other, each in order of name (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(imports[name]):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            at = stack.index(name)
            members = stack[at:]
            del stack[at:]
            if len(members) > 1 or name in imports[name]:
                found.append(sorted(members))

    for name in sorted(imports):
        if name not in order:
            visit(name)
    return found


def test_no_files_import_each_other_in_a_circle() -> None:
    files = modules(ROOT)
    assert len(files) > 100
    imports = {name: imports_of(path.read_text(), files) for name, path in files.items()}
    found = circles(imports)
    assert not found, "files import each other in a circle: " + "; ".join(" <-> ".join(one) for one in found)


def test_a_circle_is_found_and_named() -> None:
    known = ["p", "p.a", "p.b", "p.c"]
    imports = {
        "p": set(),
        "p.a": imports_of("def later():\n    from p import b", known),
        "p.b": imports_of("if TYPE_CHECKING:\n    from p.c import C", known),
        "p.c": imports_of("import p.a", known),
    }
    assert circles(imports) == [["p.a", "p.b", "p.c"]]
    assert circles({**imports, "p.c": imports_of("from p import value", known)}) == []
    assert circles({"p.a": {"p.a"}}) == [["p.a"]]
