"""The layers of docs/architecture.md, read from the source with ast: imports go down only, without exceptions."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "dino_ssl"

LAYERS = [
    ["__main__", "__init__"],
    ["cli", "explore"],
    ["ablations", "api", "report"],
    ["search", "segmentation", "viz", "profiling", "presets", "collapse"],
    ["training", "training_evals", "state", "events", "signals", "run", "loading"],
    ["evals", "methods", "kernels"],
    ["data", "optim", "metrics", "feature_stats", "checkpoint"],
    ["models", "preprocessing", "discovery"],
    [
        "runtime",
        "objectives",
        "schedules",
        "distributed",
        "terminal",
        "config",
        "names",
        "html",
        "files",
        "progress",
        "formatting",
    ],
    ["errors", "environment"],
]
"""From the top. A module may import the layers below, and in its own layer what is to its right."""

SEPARATE = {"evals", "methods", "kernels"}
"""These do not import each other: kernels are handed to methods when they are built."""

STANDARD_ONLY = {"objectives", "schedules", "distributed", "config", "errors", "progress", "formatting"}
"""Modules that need torch and the standard library only."""

RANK = {box: (row, column) for row, boxes in enumerate(LAYERS) for column, box in enumerate(boxes)}


def box_of(dotted: str) -> str:
    """Return the layer entry of a module: `dino_ssl.models.vit` -> `models`; `dino_ssl` -> `__init__`."""
    return [*dotted.split("."), "__init__"][1]


def dotted(path: Path, src: Path = SRC) -> str:
    parts = path.relative_to(src.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, src: Path = SRC) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute module) of every import, also inside functions and `if TYPE_CHECKING`."""
    package = dotted(path, src) if path.name == "__init__.py" else dotted(path, src).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                base = f"{parent}.{base}".rstrip(".")
            for alias in node.names:
                module = src.parent.joinpath(*base.split("."), alias.name)
                is_module = module.is_dir() or module.with_suffix(".py").is_file()
                yield node.lineno, f"{base}.{alias.name}" if is_module else base


def violation(importer: str, target: str) -> str | None:
    """Return why one layer entry may not import another; None if it may."""
    if importer == target or target == "__init__":  # the package itself: the version
        return None
    if {importer, target} <= SEPARATE:
        return f"{importer} and {target} must not import each other"
    (row, column), (target_row, target_column) = RANK[importer], RANK[target]
    if target_row > row or (target_row == row and target_column > column):
        return None
    return f"{importer} may not import {target}: imports go down, and to the right within a layer"


def test_imports_go_down_only() -> None:
    problems = []
    for path in sorted(SRC.rglob("*.py")):
        importer = box_of(dotted(path))
        assert importer in RANK, f"{importer} has no layer: add it to LAYERS"
        for line, module in imported(path):
            if module.split(".")[0] == "dino_ssl" and (reason := violation(importer, box_of(module))):
                problems.append(f"{path}:{line}: {reason}")
    assert not problems, "\n".join(problems)


def test_there_are_no_circular_imports() -> None:
    """Imports at the top of a file, module by module: a depth-first search meets no module that it is still in."""
    graph = {}
    for path in SRC.rglob("*.py"):
        tree = ast.parse(path.read_text())
        top = {node.lineno for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
        graph[dotted(path)] = {module for line, module in imported(path) if line in top}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_lowest_modules_need_only_torch_and_the_standard_library() -> None:
    allowed = {"torch", "dino_ssl", *sys.stdlib_module_names}
    for path in SRC.rglob("*.py"):
        if box_of(dotted(path)) in STANDARD_ONLY:
            foreign = [name for _, name in imported(path) if name.split(".")[0] not in allowed]
            assert not foreign, f"{path} imports {foreign}"


def test_the_device_and_ranks_are_chosen_in_one_place() -> None:
    """No `.cuda()`, process group or torchrun variable outside runtime.py and distributed.py.

    The command line and the terminal may read RANK, to print on one rank before torch is imported.
    """
    problems = []
    for path in SRC.rglob("*.py"):
        box = box_of(dotted(path))
        if box in {"runtime", "distributed"}:
            continue
        variables = {"WORLD_SIZE", "LOCAL_RANK"} | (set() if box in {"cli", "terminal"} else {"RANK"})
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
                problems.append(f"{path}:{node.lineno}: .cuda()")
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in variables:
                problems.append(f"{path}:{node.lineno}: {node.value}")
        problems += [f"{path}:{line}: {n}" for line, n in imported(path) if n.startswith("torch.distributed")]
    assert not problems, "\n".join(problems)


def test_errors_of_the_library_name_fields_and_not_flags() -> None:
    problems = []
    for path in SRC.rglob("*.py"):
        if box_of(dotted(path)) == "cli":
            continue
        raised = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise))
        for node in (child for statement in raised for child in ast.walk(statement)):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            is_command = "dino " in text or "torchrun" in text
            if not is_command and any(word[:2] == "--" and word[2:3].isalpha() for word in text.split()):
                problems.append(f"{path}:{node.lineno}: {text[:80]!r}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("importer", "target", "allowed"),
    [
        ("methods", "evals", False),
        ("evals", "methods", False),
        ("kernels", "methods", False),
        ("models", "objectives", True),
        ("objectives", "models", False),
        ("training", "kernels", True),
        ("runtime", "data", False),
        ("ablations", "api", True),
        ("api", "ablations", False),
        ("training", "report", False),
        ("config", "errors", True),
    ],
)
def test_the_rule(importer: str, target: str, allowed: bool) -> None:
    assert (violation(importer, target) is None) == allowed


def test_every_form_of_import_is_read(tmp_path: Path) -> None:
    src = tmp_path / "dino_ssl"
    (src / "models").mkdir(parents=True)
    (src / "distributed.py").touch()
    (src / "models" / "vit.py").touch()
    file = src / "models" / "net.py"
    file.write_text(
        "import torch\nfrom dino_ssl import distributed, load\nfrom ..data import views\nfrom .vit import ViT\n"
        "def later():\n    import dino_ssl.training\n"
    )
    names = [name for _, name in imported(file, src)]
    expected = ["torch", "dino_ssl.distributed", "dino_ssl", "dino_ssl.data", "dino_ssl.models.vit"]
    assert names == [*expected, "dino_ssl.training"]
