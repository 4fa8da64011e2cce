"""The house rules that can be read off the source: imports, sizes, broad excepts, patterns."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "vtriune_jax").rglob("*.py"))
SOURCES = [
    path
    for folder in ("vtriune_jax", "configs", "launch", "tests", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".sh")
]

MAY_IMPORT = {
    "types": [],
    "errors": [],
    "rewards": ["types"],
    "models": ["types"],
    "data": ["types", "models.layout", "models.config"],
    "verifiers": ["types", "rewards", "loop"],
    "rollout": ["types", "models", "sharding", "hosts", "loop"],
    "rollout.simulate": ["rollout", "models", "config", "commands", "main"],  # an entry point
    "rl": ["types", "models", "sharding", "optim"],
    "sharding": ["types"],
    "optim": ["types"],
    "config": ["config_tables"],
    "config_tables": [],
}
"""Part of the package → the other parts that it may know; a module's own line goes before its
package's. `errors` is everyone's; parts that are not listed (train, main, …) may know all."""

LIBRARIES = {
    "types": {"jax", "numpy", "jaxtyping"},
    "errors": set(),
    "rewards": {"jax", "numpy", "jaxtyping", "optax"},  # optax: its Hungarian algorithm
    "models": {"jax", "numpy", "jaxtyping", "flax", "safetensors", "xxhash"},
    "models.layout": {"numpy", "jaxtyping"},
}
"""Part → the only libraries, besides the standard one, that it may use."""

NOT_IN = {
    "": {"torch", "torchvision", "jax.experimental.pjit", "jax.experimental.maps"},
    "verifiers": {"flax", "transformers", "optax", "datasets", "orbax"},
    "config": {"jax", "flax", "transformers"},
    "config_tables": {"jax", "flax", "transformers"},
}
"""Part ("" is all) → what must not be imported there."""

BROAD_EXCEPT = {
    "vtriune_jax/verifiers/worker.py": "a verifier may fail in any way on any completion; that "
    "becomes a verdict of status error, which is masked and counted",
    "vtriune_jax/checkpoint.py": "for an unreadable array Orbax raises a plain Exception; all "
    "narrower ones that are not expected are raised again",
}
"""File → why it may once catch every Exception."""


def name_of(path: Path) -> str:
    """vtriune_jax/rl/update.py → rl.update"""
    parts = path.relative_to(ROOT / "vtriune_jax").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, anywhere in it; `from a import b` gives a.b."""
    package = ["vtriune_jax", *path.relative_to(ROOT / "vtriune_jax").parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            origin = ".".join(filter(None, (origin, node.module)))
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, parts) -> bool:
    return any(part == "" or name == part or name.startswith(f"{part}.") for part in parts)


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_imports_go_one_way(path):
    name, found = name_of(path), imports(path)
    ours = {
        module.removeprefix("vtriune_jax.") for module in found if inside(module, ["vtriune_jax"])
    }
    part = name if name in MAY_IMPORT else name.split(".")[0]
    if part in MAY_IMPORT:
        allowed = [part, "errors", *MAY_IMPORT[part]]
        assert not [module for module in ours if not inside(module, allowed)]
    for owner, libraries in LIBRARIES.items():
        if inside(name, [owner]):
            known = libraries | {"vtriune_jax"} | sys.stdlib_module_names
            outside = [module for module in found if not inside(module, known)]
            assert not outside, f"{owner} may use {sorted(libraries)} only"
    for owner, banned in NOT_IN.items():
        if inside(name, [owner]):
            assert not [module for module in found if inside(module, banned)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_finished(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert not re.search(r"# *(TODO|FIXME|XXX)", text)


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_no_star_imports_and_no_broad_excepts(path):
    tree = ast.parse(path.read_text())
    assert not [module for module in imports(path) if module.endswith(".*")]
    allowed = int(str(path.relative_to(ROOT)) in BROAD_EXCEPT)
    broad = [node.lineno for node in ast.walk(tree) if is_broad(node)]
    assert len(broad) <= allowed, f"lines {broad}: name the exceptions that are expected"


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_no_groups_are_repeated_possessively(path):
    """Before 3.11.5 Python then finds no match (gh-106052); atomic groups are right."""
    found = re.findall(r"\)(?:[*+?]|\{[0-9,]+\})\+", path.read_text())
    assert not found, "write (?>(?:…)*) instead of (?:…)*+"


def is_broad(node: ast.AST) -> bool:
    """`except:`, `except Exception`, and the same as suppress(Exception)."""
    if isinstance(node, ast.ExceptHandler):
        return node.type is None or names_all(node.type)
    is_suppress = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress")
    return is_suppress and any(names_all(argument) for argument in node.args)


def names_all(kinds: ast.expr) -> bool:
    return any(
        isinstance(node, ast.Name) and node.id in ("Exception", "BaseException")
        for node in ast.walk(kinds)
    )
