"""Recompute the authors' reference numbers with this project's code: `python tests/reference/check.py DIR`.

Prints one line per file of DIR, `ok|FAIL|todo  NAME  max_abs_error=...  tolerance=...`, and exits non-zero if
a line fails, a file is missing, or a file is there that nobody checks. Nothing about DIR is assumed but its
layout: sizes, seeds and hyper-parameters are read from its files.
"""

import importlib
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "src")]  # this checkout, installed or not

from golden import Result  # noqa: E402

CHECKS = {
    "vit.npz": "golden_models:vit",
    "head.npz": "golden_models:head",
    "official_state_dict_keys.json": "golden_models:official_state_dict_keys",
    "loss.npz": "golden_training:loss",
    "schedules.npz": "golden_training:schedules",
    "param_groups.json": "golden_training:param_groups",
    "trajectory_*.npz": "golden_training:trajectory",
    "knn.npz": "golden_evals:knn",
    "attention_threshold.npz": "golden_attention_masks:attention_threshold",
    "retrieval.json": "golden_retrieval:retrieval",
    "copy_detection_ap.json": "golden_retrieval:copy_detection_ap",
    "copy_detection_descriptor.npz": "golden_retrieval:copy_detection_descriptor",
    "video_propagation.npz": "golden_video:video_propagation",
    "davis_mini": "golden_video:davis_mini",
}
"""File name or pattern -> module:function beside this file; `check(path) -> Result`."""

OPTIONAL = {"official_state_dict_keys.json"}
IGNORED = {"README.md"}


class TodoError(Exception):
    """The part of the project that a file is about does not exist yet."""


def entries(folder: Path) -> Iterator[tuple[str, str | None]]:
    """(name, its check) for every file of the folder and every check without a file; None where there is no
    check.
    """
    present = sorted(p.name for p in folder.iterdir() if p.name not in IGNORED and not p.name.startswith("."))
    for pattern, check in CHECKS.items():
        matches = [name for name in present if fnmatch(name, pattern)]
        yield from ((name, check) for name in matches)
        if not matches and pattern not in OPTIONAL:
            yield pattern, check
    yield from ((name, None) for name in present if not any(fnmatch(name, pattern) for pattern in CHECKS))


def find(check: str):
    """The function behind "module:function", or TodoError where it is not written yet."""
    module, function = check.split(":")
    if not (HERE / f"{module}.py").exists():
        raise TodoError(f"no tests/reference/{module}.py yet")
    found = getattr(importlib.import_module(module), function, None)
    if found is None:
        raise TodoError(f"no {function} in tests/reference/{module}.py yet")
    return found


def run(folder: Path, name: str, check: str | None) -> Result:
    """One file's comparison. Raises TodoError; any other exception of a check is a failed line."""
    if check is None:
        return Result(float("inf"), 0.0, False, "unknown file: no check is named for it")
    if not (folder / name).exists():
        return Result(float("inf"), 0.0, False, "missing")
    try:
        return find(check)(folder / name)
    except TodoError:
        raise
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "dino":
            raise TodoError(f"no module {error.name} yet") from error
        return Result(float("inf"), 0.0, False, f"{type(error).__name__}: {error}")
    except Exception as error:
        return Result(float("inf"), 0.0, False, f"{type(error).__name__}: {error}")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: check.py DIR, a folder laid out like the authors' reference numbers", file=sys.stderr)
        return 2
    failed = False
    for name, check in entries(Path(arguments[0])):
        try:
            result = run(Path(arguments[0]), name, check)
        except TodoError as todo:
            print(f"todo  {name}  {todo}", flush=True)
            continue
        failed |= not result.ok
        line = f"{'ok' if result.ok else 'FAIL'}  {name}  max_abs_error={result.max_abs_error:.3g}"
        print(f"{line}  tolerance={result.tolerance:.3g}{'' if result.ok else f'  {result.where}'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
