"""The house: imports go down only, and each decision has one home. Read from the source, nothing is run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

LAYERS = [
    {"errors", "environment", "units"},
    {"files", "dist"},
    {"objectives", "schedules", "config"},
    {"models"},
    {"data", "optim"},
    {"methods", "evals"},
    {"runtime", "checkpoint", "fast", "logs", "vitals"},
    {"events", "meter", "signals", "run"},
    {"training"},
    {"presets", "analysis"},
    {"terminal"},
    {"live"},
    {"session"},
    {"api"},
    {"cli"},
    {"", "__main__"},  # "" is the package itself
]
"""From the ground up. A module may import what lies below it, and its own box (the name after `dino.`)."""

SIDEWAYS = {
    ("runtime", "fast"): "the one place that chooses the fast twins",
    ("run", ""): "the version that run.json names",
    ("api", ""): "the version that results name",
    ("cli", ""): "the version",
    ("analysis", "presets"): "both are at the top",
    ("presets", "analysis"): "both are at the top",
}
"""Imports that do not go down, each with its reason."""

GROUND = {"objectives", "schedules", "dist", "config", "errors"}
LEVEL = {box: height for height, boxes in enumerate(LAYERS) for box in boxes}


def modules() -> list[Path]:
    return sorted((SRC / "dino").rglob("*.py"))


def box_of(dotted: str) -> str:
    """`dino_ssl.models.vit` -> `models`; `dino` -> ``."""
    return [*dotted.split("."), ""][1]


def dotted(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of all that a file imports, also inside functions and `if TYPE_CHECKING`."""
    package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            # `from dino_ssl import dist` names a module, `from dino_ssl.optim import Optim` does not
            inner = base == "dino"
            yield from ((node.lineno, f"dino.{a.name}" if inner and is_module(a.name) else base) for a in node.names)


def is_module(name: str) -> bool:
    return (SRC / "dino" / name).is_dir() or (SRC / "dino" / f"{name}.py").is_file()


def violation(importer: str, name: str) -> str | None:
    """Why box `importer` may not import the dotted name, or None."""
    target = box_of(name)
    if target == importer or (importer, target) in SIDEWAYS:
        return None
    if target == "fast":
        return "fast is imported by runtime alone"
    if LEVEL[target] >= LEVEL[importer]:
        return f"{importer or 'dino'} may not import {target or 'dino'}: imports go down only"
    return None


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_go_down_only(path: Path) -> None:
    importer = box_of(dotted(path))
    assert importer in LEVEL, f"{importer} has no layer: give it one in LAYERS"
    ours = [(line, name) for line, name in imported(path) if name.split(".")[0] == "dino"]
    found = [f"{path}:{line}: {why}" for line, name in ours if (why := violation(importer, name))]
    assert not found, "\n".join(found)


def test_the_ground_needs_torch_and_the_standard_library_only() -> None:
    import sys

    allowed = {"torch", "dino", *sys.stdlib_module_names}
    for path in modules():
        if box_of(dotted(path)) in GROUND:
            foreign = [name for _, name in imported(path) if name.split(".")[0] not in allowed]
            assert not foreign, f"{path} imports {foreign}"


@pytest.mark.parametrize(
    ("importer", "name", "fine"),
    [
        ("methods", "dino_ssl.evals.knn", False),
        ("evals", "dino_ssl.methods.dino", False),
        ("models", "dino_ssl.objectives", True),
        ("objectives", "dino_ssl.models.vit", False),
        ("optim", "dino_ssl.training", False),
        ("data", "dino_ssl.optim", False),
        ("models", "dino_ssl.checkpoint", False),
        ("training", "dino_ssl.kernels.attention", False),
        ("runtime", "dino_ssl.kernels.attention", True),
        ("evals", "dino_ssl.data.dataset", True),
        ("objectives", "dino_ssl.schedules", False),
        ("config", "dino_ssl.errors", True),
        ("training", "dino_ssl.report.run_report", False),
    ],
)
def test_the_rule_itself(importer: str, name: str, fine: bool) -> None:
    assert (violation(importer, name) is None) == fine


def test_a_file_of_every_kind_of_import_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "dino" / "models"
    package.mkdir(parents=True)
    (tmp_path / "dino" / "dist.py").touch()
    file = package / "net.py"
    file.write_text(
        "import torch\nfrom dino_ssl import dist, load\nfrom ..data import views\nfrom .vit import ViT\n"
        "def later():\n    import dino_ssl.training\n"
    )
    monkeypatch.setattr("test_layers.SRC", tmp_path)
    names = [name for _, name in imported(file)]
    assert names == [
        "torch",
        "dino_ssl.distributed",
        "dino",
        "dino_ssl.data",
        "dino_ssl.models.vit",
        "dino_ssl.training",
    ]


def test_decisions_about_the_machine_have_one_home() -> None:
    """No `.cuda()`, no process groups and no environment of torchrun outside runtime.py and dist.py.

    The command line may look at RANK: it must be silent on all ranks but the first before torch is there.
    """
    found = []
    for path in modules():
        box = box_of(dotted(path))
        if box in {"runtime", "dist"}:
            continue
        kept = {"WORLD_SIZE", "LOCAL_RANK"} | (set() if box in {"cli", "terminal"} else {"RANK"})
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
                found.append(f"{path}:{node.lineno}: .cuda()")
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in kept:
                found.append(f"{path}:{node.lineno}: {node.value}")
        found += [f"{path}:{line}: {n}" for line, n in imported(path) if n.startswith("torch.distributed")]
    assert not found, "\n".join(found)
