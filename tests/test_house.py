"""The house's limits (CONTRIBUTING.md): sizes, and imports that only run downwards; lazy imports count."""

import ast
import functools
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FILE_LINES, FUNCTION_LINES = 350, 60
PRODUCT_LINES, TEST_LINES, GOLDEN_LINES = 34_290, 36_750, 1_500

# A package or module may import what stands in its own line or above it. Tables of names that checks and configs read
# stand apart from the rest of their package.
TABLES = (
    "method.objectives",
    "method.weights",
    "method.extraction",
    "method.condition",
    "method.parameters",
    "method.table",
)
LAYERS = (
    ("errors", "files", "documents", "tables", "pools"),
    ("fields", "robots", "configs", "mixture", "experiments", "experiments_r1", "overrides", "checks", *TABLES),
    ("storage", "runtime", "accelerators", "gpu_environment"),
    ("data",),
    ("models",),
    ("train",),
    ("method",),
    ("plan", "sim", "evaluate", "report", "serve", "export", "prepare", "stages"),
    ("client",),
    ("replay",),
    ("clusters", "jobs", "launch", "site"),
    ("benchmark",),
    ("cli",),
)
RUNTIME_MAY_IMPORT = ("errors", "files", "documents")
BELOW = {"evaluate": ("sim",), "serve": ("export",)}  # within the line of several

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def tracked() -> tuple[str, ...]:
    return tuple(subprocess.check_output(["git", "-C", str(ROOT), "ls-files"], text=True).split())


def product() -> list[str]:
    folders = ("hvd/", "launch/", "slurm/", "docker/")
    return [name for name in tracked() if name.startswith(folders) and not name.startswith("docker/requirements")]


def lines(names) -> int:
    return sum((ROOT / name).read_bytes().count(b"\n") for name in names if (ROOT / name).is_file())


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Path -> syntax tree of the product's Python."""
    return {name: ast.parse((ROOT / name).read_text()) for name in product() if name.endswith(".py")}


def dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def imports() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, anywhere in its file."""
    known = {dotted(path) for path in modules()}
    found = {}
    for path, tree in modules().items():
        names = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import"
                each = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in known else node.module or "" for name in each}
        found[dotted(path)] = {name for name in names if name in known} - {dotted(path)}
    return found


def layer(module: str) -> tuple[int, str] | None:
    """Number of the layer, and the name in it; None for `hvd` itself and launch/, which are above all."""
    parts = module.split(".")
    if parts[0] != "hvd" or len(parts) == 1:
        return None
    for name in (".".join(parts[1:3]), parts[1]):
        for number, names in enumerate(LAYERS):
            if name in names:
                return number, name
    raise AssertionError(f"{module} is in none of tests/test_house.py's LAYERS")


def test_files_and_functions_are_short():
    assert not [name for name in product() if lines([name]) > FILE_LINES]
    functions = {
        f"{path}: {node.name}"
        for path, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS) and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES
    }
    assert not functions


def test_the_whole_is_no_larger_than_promised():
    tests = [name for name in tracked() if name.startswith("tests/") and name.endswith((".py", ".sh"))]
    golden = [name for name in tracked() if name.startswith("tests/") and "/golden/" in name]
    sizes = lines(product()), lines(set(tests) - set(golden)), lines(golden)
    assert all(size <= most for size, most in zip(sizes, (PRODUCT_LINES, TEST_LINES, GOLDEN_LINES), strict=True)), sizes


def test_every_file_is_named_by_what_it_holds():
    vague = {"utils", "util", "common", "helpers", "misc"}
    assert not [name for name in tracked() if vague & {part.split(".")[0] for part in name.split("/")}]


def test_imports_run_downwards():
    upwards = set()
    for module, targets in imports().items():
        here = layer(module)
        for target in targets:
            there = layer(target)
            if here is None or there is None or here[1] == there[1]:
                continue
            allowed = there[0] <= here[0]
            if here[1] == "runtime":
                allowed = there[1] in RUNTIME_MAY_IMPORT
            if here[1] in BELOW.get(there[1], ()):
                allowed = False
            if not allowed:
                upwards.add(f"{module} -> {target}")
    assert not upwards, sorted(upwards)


def test_no_import_runs_in_a_circle():
    graph, done = imports(), set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        if module in way:
            pytest.fail(" -> ".join([*way[way.index(module) :], module]))
        if module not in done:
            for target in graph[module]:
                visit(target, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())
