"""The shape of the repository: which module may import which, and what lies at the top level. No import is executed."""

from __future__ import annotations

import ast
import graphlib
import subprocess
from pathlib import Path

import pytest

from dba_kernels.backends import STEMS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dba_kernels"

TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "dba_kernels", "tests", "bench", "csrc"}
MAX_FILE_BYTES = 1 << 20

PUBLIC = "public names"
"""The package itself, its modules of Python-level API, and a folder's own files; nothing with a leading underscore."""

# Module, or folder for all its files → the layers it may import. `formats` is data without arithmetic: open to everyone
# above it. A folder's files may import each other; a kernel written from the reference would be no evidence for it.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {PUBLIC},
    "formats": set(),
    "captured": set(),
    "stepdata": {"formats"},
    "factors": {"formats"},
    "schedule": {"formats"},
    "reference": {"formats", "factors", "stepdata", "reference"},
    "kernels": {"formats", "stepdata", "captured", "kernels"},
    "native": {"formats", "stepdata", "native"},
    "backends": {"formats"},
    "operators": {"backends", "formats", "stepdata"},
    "contracts": {"formats", "stepdata"},
    "ops": {"operators", "backends", "contracts", "formats", "stepdata"},
    "distributed": {"formats"},
    "global_gradient": {
        *(
            "ops",
            "backends",
            "contracts",
            "distributed",
            "formats",
            "factors",
            "tensor_files",
            "descriptions",
            "base_model",
            "records",
        ),
        "curvature_records",
        "gradient_file",
    },
    "gradient_file": {"base_model", "curvature_records", "descriptions", "records", "tensor_files"},
    "collect": {
        *("collector", "batches", "calibration", "curvature_records", "distributed", "global_gradient", "identity"),
        *("formats", "records"),
    },
    "collector": {
        "ops",
        "distributed",
        "global_gradient",
        "formats",
        "files",
        "tensor_files",
        "base_model",
        "records",
        "batches",
        "sums",
        "snapshots",
        "passes",
        "curvature",
        "curvature_records",
        "calibration",
        "identity",
        "weights",
    },
    "method": {"schedule", "formats", "distributed", "stepdata", "global_gradient"},
    "optim": {
        *("ops", "distributed", "global_gradient", "base_model", "formats", "stepdata", "method", "metrics", "plan"),
        *("state", "saved_state", "param_groups"),
    },
    "metrics": {"plan", "stepdata"},
    # Modules that the three above were cut into, to keep each of them short: at most what the whole may import.
    "files": {"formats"},
    "tensor_files": {"formats", "files"},
    "descriptions": set(),
    "base_model": {"distributed", "formats", "descriptions"},
    "records": {"ops", "formats", "tensor_files", "descriptions"},
    "batches": set(),
    "identity": {"tensor_files"},
    "weights": {"distributed"},
    "passes": {"distributed", "sums", "weights"},
    "snapshots": {"distributed", "files", "formats", "tensor_files", "sums"},
    "sketch": set(),
    "curvature": {"ops", "distributed", "formats", "factors", "sketch"},
    "sums": {"ops", "distributed", "formats", "tensor_files", "records", "curvature", "descriptions"},
    "curvature_records": {"formats", "factors", "tensor_files"},
    "calibration": {"backends", "distributed", "factors"},
    "anchored": {"ops", "backends", "distributed", "formats", "factors", "stepdata"},
    "param_groups": {"formats"},
    "saved_state": {"distributed", "backends", "formats"},
    "state": {"distributed", "backends", "base_model", "formats", "saved_state"},
    "checks": {"distributed", "formats", "stepdata"},
    "plan": {
        *("ops", "state", "distributed", "global_gradient", "base_model", "formats", "factors", "stepdata", "anchored"),
        *("captured", "checks", "contracts"),
    },
    "integrations": {PUBLIC, "integrations"},
    "cli": {PUBLIC, "cli"},
    "__main__": {PUBLIC, "cli"},
}
PUBLIC_LAYERS = {"dba_kernels", "formats", "schedule", "backends", "global_gradient", "collect", "optim", "saved_state"}
LAZY = {"backends": {"reference", "kernels", "native"}}
"""Layers that may be imported when first used, inside a function, but not by importing the module."""


def layer_of(path: Path) -> str:
    """``optim`` for dba_kernels/optim.py, ``kernels`` for dba_kernels/kernels/step.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(source: str, path: Path) -> list[tuple[str, list[str], bool]]:
    """Every import of this package in ``source``: (dotted module, imported names, whether inside a function)."""
    package = ["dba_kernels", *path.relative_to(PACKAGE).parts[:-1]]
    found: list[tuple[str, list[str], bool]] = []

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, [], in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.append((module, [alias.name for alias in node.names], in_function))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            # A name built at run time counts as an import of every layer that its text mentions.
            text = ast.unparse(node)
            found.extend((f"dba_kernels.{layer}", [], in_function) for layer in MAY_IMPORT if layer in text)
        in_function = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, in_function)

    visit(ast.parse(source), False)
    return [entry for entry in found if entry[0].split(".")[0] == "dba_kernels"]


def imported_layers(source: str, path: Path) -> set[tuple[str, bool]]:
    """(layer, whether lazily) of every import of this package; ``from . import formats`` is one of ``formats``."""
    layers = set()
    for module, names, lazily in imported_modules(source, path):
        parts = module.split(".")
        if len(parts) > 1:
            layers.add((parts[1], lazily))
        else:
            known = [name for name in names if name in MAY_IMPORT]
            layers.update((name, lazily) for name in known)
            if len(known) < len(names) or not names:
                layers.add(("dba_kernels", lazily))
    return layers


def check_imports(source: str, path: Path) -> None:
    layer = layer_of(path)
    assert layer in MAY_IMPORT, f"{path.name} has no row in the table of layers"
    allowed = set(MAY_IMPORT[layer])
    if PUBLIC in allowed:
        allowed |= PUBLIC_LAYERS
        names = [name for _, names, _ in imported_modules(source, path) for name in names]
        private = [name for name in names if name.startswith("_") and not name.startswith("__")]
        assert not private, f"{path.name} imports private names: {private}"
    for imported, lazily in imported_layers(source, path):
        ok = imported in allowed or (lazily and imported in LAZY.get(layer, set()))
        assert ok, f"{path.relative_to(ROOT)} imports {imported}; allowed: {sorted(allowed)}"


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_import_column(path: Path) -> None:
    """Protects the layers: each module imports only what the design's table gives it, lazily where it says lazily."""
    check_imports(path.read_text(), path)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kernels/step.py", "from ..reference import step"),
        ("kernels/step.py", "def f():\n    from dba_kernels.reference.quantize import encode"),
        ("kernels/step.py", "import importlib\nimportlib.import_module('dba_kernels.reference.step')"),
        ("kernels/step.py", "import dba_kernels"),
        ("native/step.py", "from ..reference.remainder import mix32"),
        ("native/step.py", "from .. import reference"),
        ("reference/step.py", "from ..kernels import common"),
        ("formats.py", "from . import schedule"),
        ("backends.py", "from .kernels import step"),
        ("optim.py", "from .reference import similarity"),
        ("ops.py", "from .optim import DBAAdamW"),
        ("cli/demo/comparison.py", "from dba_kernels.optim import _private"),
        ("integrations/trl.py", "from ..reference import step"),
        ("plan.py", "from .reference import step"),
        ("files.py", "from .plan import Plan"),
        ("plan.py", "from .optim import DBAAdamW"),
        ("plan.py", "if TYPE_CHECKING:\n    from .optim import DBAAdamW"),
        ("reference/step.py", "if TYPE_CHECKING:\n    from ..kernels import common"),
        ("stray.py", ""),
    ],
)
def test_import_column_notices(file: str, source: str) -> None:
    """Negative control: each forbidden import, in each way of writing it, is seen."""
    with pytest.raises(AssertionError):
        check_imports(source, PACKAGE / file)


def test_lazy_import_of_backends_is_allowed() -> None:
    """Protects the exception for backends.py: the same import is right inside a function and wrong outside one."""
    check_imports("def f():\n    from .kernels import step", PACKAGE / "backends.py")


def edges_of(sources: dict[Path, str]) -> dict[str, set[str]]:
    """Module → modules of this package that it imports, inside functions and for type checkers too."""
    dotted = {path: ".".join(("dba_kernels", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in sources}
    names = {path: name.removesuffix(".__init__") for path, name in dotted.items()}
    edges: dict[str, set[str]] = {}
    for path, source in sources.items():
        found = edges.setdefault(names[path], set())
        for module, imported, _ in imported_modules(source, path):
            inner = {f"{module}.{name}" for name in imported} & set(names.values())
            found |= inner or {module}
    return edges


def check_no_circles(sources: dict[Path, str]) -> None:
    try:
        graphlib.TopologicalSorter(edges_of(sources)).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(f"modules import each other: {' → '.join(error.args[1])}") from error


def test_no_module_imports_itself_through_others() -> None:
    """Protects the order of the layers within a folder too: there is a module to read first."""
    check_no_circles({path: path.read_text() for path in MODULES})


@pytest.mark.parametrize(
    "written", ["from . import b", "if TYPE_CHECKING:\n    from .b import B", "def f():\n    from .b import g"]
)
def test_circles_are_noticed(written: str) -> None:
    """Negative control: a circle of two and of three modules, however one of the imports is written."""
    a, b, c = (PACKAGE / "cli" / f"{name}.py" for name in "abc")
    check_no_circles({a: written, b: "from .c import f", c: ""})
    for circle in ({a: written, b: "from .a import f"}, {a: written, b: "from .c import f", c: "from . import a"}):
        with pytest.raises(AssertionError, match="import each other"):
            check_no_circles(circle)


@pytest.mark.parametrize("stem", STEMS)
def test_a_stem_names_one_file_everywhere(stem: str) -> None:
    """Protects the promise of the layout: who knows one operation's files knows all."""
    places = [f"dba_kernels/{folder}/{stem}.py" for folder in ("reference", "kernels", "native")]
    places += [f"csrc/{stem}.h", f"tests/test_{stem}.py", f"bench/bench_{stem}.py"]
    assert [place for place in places if not (ROOT / place).is_file()] == []


MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80
LONG_KERNELS = {"coefficients_kernel"}
"""One straight list of scalars; cut in two it would pass twenty of them on."""


def too_long(source: str) -> list[str]:
    found = [f"{len(source.splitlines())} lines"] if len(source.splitlines()) > MAX_FILE_LINES else []
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    lengths = {f.name: (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions}
    return found + [
        f"{name}: {n}" for name, n in lengths.items() if n > MAX_FUNCTION_LINES and name not in LONG_KERNELS
    ]


def test_files_and_functions_are_short() -> None:
    """Protects the reader: no file above 400 lines, no function above 80."""
    found = {str(path.relative_to(ROOT)): too_long(path.read_text()) for path in MODULES}
    assert {path: why for path, why in found.items() if why} == {}
    assert too_long("def f():\n" + "    x = 1\n" * 80) == ["f: 81"]
    assert too_long("x = 1\n" * 401) == ["401 lines"]


def test_kernels_and_native_never_reach_the_reference() -> None:
    """Protects the independence of the implementations, through any chain of imports."""
    edges = {layer: set() for layer in MAY_IMPORT}
    for path in MODULES:
        edges[layer_of(path)] |= {imported for imported, _ in imported_layers(path.read_text(), path)}
    for start in ("kernels", "native"):
        reached, frontier = set(), {start}
        while frontier:
            reached |= frontier
            frontier = set().union(*(edges.get(layer, set()) for layer in frontier)) - reached
        assert "reference" not in reached, f"{start} reaches {sorted(reached)}"


def tracked_files() -> list[Path]:
    """Paths under version control, relative to the root."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listing.split("\0") if name]


def check_top_level(names: set[str]) -> None:
    stray = {name for name in names if not name.startswith(".")} - TOP_LEVEL
    assert not stray, f"top level: {sorted(stray)} do not belong there"


def test_top_level_and_file_sizes() -> None:
    """Protects the repository's shape: seven entries and dotfiles, nothing above 1 MiB."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files are tracked is unknown")
    files = tracked_files()
    check_top_level({path.parts[0] for path in files})
    large = [path for path in files if (ROOT / path).is_file() and (ROOT / path).stat().st_size > MAX_FILE_BYTES]
    assert not large, f"files above 1 MiB: {large}"
    with pytest.raises(AssertionError):
        check_top_level({"README.md", "notes.txt"})
