"""The house keeps its shape: who may import whom, and what stays light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "isoflop"

LIGHT = {"arch", "count", "hardware", "laws", "runs", "plan"}
HEAVY = {"attention", "model", "infer", "train"}

#: part -> the parts it may import, besides errors and quantity (docs/architecture.md).
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "quantity": set(),
    "arch": set(),
    "count": {"arch"},
    "hardware": set(),
    "laws": set(),
    "runs": set(),
    "plan": {"arch", "count", "hardware", "laws"},
    "attention": set(),
    "model": {"arch", "attention", "runs"},
    "infer": {"arch", "attention", "model"},
    "train": {"arch", "model", "runs"},
    "study": LIGHT | {"model", "train", "check"},
    "check": LIGHT | HEAVY,
    "report": LIGHT | {"study"},
    "cli": LIGHT | HEAVY | {"study", "check", "report"},
}
BASE = {"errors", "quantity"}

#: third-party packages that cost start-up time, and the parts that may load them.
COSTLY = {
    "torch",
    "numpy",
    "scipy",
    "pandas",
    "matplotlib",
    "tokenizers",
    "transformers",
    "triton",
    "pydantic",
    "rich",
}
MAY_LOAD: dict[str, set[str]] = {
    "attention": {"torch", "triton"},
    "model": {"torch"},
    "infer": {"tokenizers", "torch"},
    "train": {"torch", "numpy", "pydantic"},
    "check": {"torch", "numpy"},
    "study": {"torch", "numpy"},
    "report": {"numpy", "matplotlib"},
    "cli": {"torch", "rich", "pydantic"},
}
#: single modules that may load more than their part; nobody light may import these.
MODULES_MAY_LOAD = {
    "laws.fit": {"numpy", "scipy"},
    "check.step_fit": {"numpy", "scipy"},
    "arch.toml": {"pydantic"},
    "plan.search": {"numpy"},
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, path


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every import of a file, those inside functions too, as full dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def allowed_loads(module: str) -> set[str]:
    extra = {
        p
        for name, packages in MODULES_MAY_LOAD.items()
        if module.startswith(name)
        for p in packages
    }
    return MAY_LOAD.get(module.split(".", maxsplit=1)[0], set()) | extra


def broken_imports(module: str, path: Path) -> Iterator[str]:
    part = module.split(".", maxsplit=1)[0]
    assert part in MAY_IMPORT, f"{path}: add {part!r} to MAY_IMPORT and to docs/architecture.md"
    for name, line in imports(path):
        top, *rest = name.split(".")
        if (
            top == "isoflop"
            and rest
            and rest[0] not in MAY_IMPORT[part] | BASE | {part, "__version__"}
        ):
            yield f"{path}:{line} {module} may not import {name}"
        if (
            part in LIGHT
            and name.startswith("isoflop.laws.fit")
            and not module.startswith("laws.fit")
        ):
            yield f"{path}:{line} {module} is light and may not import {name}"
        if top in COSTLY - allowed_loads(module):
            yield f"{path}:{line} {module} may not load {name}"


def test_every_import_follows_the_table() -> None:
    named = [(m, p) for m, p in modules() if m not in ("__init__", "__main__", "")]
    wrong = [line for module, path in named for line in broken_imports(module, path)]
    assert not wrong, "\n".join(wrong)


def test_light_and_heavy_never_meet_below_the_bridge() -> None:
    assert not any(MAY_IMPORT[part] & HEAVY for part in LIGHT)
    assert not any(MAY_IMPORT[part] & (LIGHT - {"arch", "runs"}) for part in HEAVY)


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()
    while ready := {m for m in MAY_IMPORT if m not in done and MAY_IMPORT[m] <= done}:
        done |= ready
    assert done == set(MAY_IMPORT), f"cycle among {set(MAY_IMPORT) - done}"


def loaded_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after a statement."""
    code = f"{statement}; import sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "part", ["isoflop", "isoflop.plan, isoflop.count", "isoflop.laws", "isoflop.cli.app"]
)
def test_planner_loads_nothing_heavy(part: str) -> None:
    heavy = {"torch", "numpy", "scipy", "pandas", "matplotlib", "pydantic"}
    assert not heavy & loaded_after(f"import {part}")


def test_the_lightness_test_can_fail() -> None:
    assert "numpy" in loaded_after("import isoflop.plan, numpy")
