"""The wheel, installed without the source tree: the commands run, and all data files are inside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = """
import sys
from importlib.resources import files
from pathlib import Path

import dino_ssl
from dino_ssl.html import STYLE

package = Path(dino_ssl.__file__).parent
assert package.parent == Path(sys.argv[1]), package
assert files("dino_ssl").joinpath("py.typed").is_file()
assert STYLE == (package / "html.css").read_text(encoding="utf-8") and "{" in STYLE
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory into which a wheel of this source tree is installed, without its dependencies."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=100)
    (wheel,) = wheels.glob("*.whl")
    install = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True, timeout=100)
    return target


def run(installed: Path, *arguments: str) -> str:
    """Run Python outside of the source tree, with the installed package before everything else; return its output."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "110"}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=installed, env=environment, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_package_and_data_files_come_from_the_wheel(installed: Path) -> None:
    run(installed, "-c", CHECK, str(installed))


def test_commands_run(installed: Path) -> None:
    (version,) = [path.name.split("-")[1] for path in installed.glob("dino_ssl-*.dist-info")]
    assert version.removesuffix(".dist") in run(installed, "-m", "dino_ssl", "--version")
    assert "vits16" in run(installed, "-m", "dino_ssl", "presets")


def test_the_wheel_declares_the_command(installed: Path) -> None:
    (entry_points,) = installed.glob("dino_ssl-*.dist-info/entry_points.txt")
    assert "dino = dino_ssl.cli:main" in entry_points.read_text()
