"""Recompute the authors' reference numbers with this project's code.

    python tests/reference/check.py DIR [--json docs/benchmarks/reference.json]

Prints one line per file of DIR, `ok|FAIL  NAME  max_abs_error=...  tolerance=...`, for the error that is largest
relative to its tolerance. The exit code is 1 if a line fails, if a file is missing, or if a file has no check. Sizes,
seeds and hyper-parameters are read from the files. The JSON has the largest difference at each tolerance of a file.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "src")]  # this checkout, installed or not
sys.path.append(str(ROOT / "benchmarks"))

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
"""File name or pattern -> module:function in this folder, `check(path) -> Result`."""

OPTIONAL = {"official_state_dict_keys.json"}
IGNORED = {"README.md"}


def entries(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Yield (name, check) for every file of the folder (None: no check) and every check without a file."""
    present = sorted(p.name for p in folder.iterdir() if p.name not in IGNORED and not p.name.startswith("."))
    for pattern, check in CHECKS.items():
        matches = [name for name in present if fnmatch(name, pattern)]
        yield from ((name, check) for name in matches)
        if not matches and pattern not in OPTIONAL:
            yield pattern, check
    yield from ((name, None) for name in present if not any(fnmatch(name, pattern) for pattern in CHECKS))


def run(folder: Path, name: str, check: str | None) -> Result:
    """Return the comparison of one file; an exception of a check is a failure."""
    if check is None:
        return Result(float("inf"), 0.0, False, "unknown file: it has no check")
    if not (folder / name).exists():
        return Result(float("inf"), 0.0, False, "missing")
    module, function = check.split(":")
    try:
        return getattr(importlib.import_module(module), function)(folder / name)
    except Exception as error:
        return Result(float("inf"), 0.0, False, f"{type(error).__name__}: {error}")


def save_json(options: argparse.Namespace, results: Mapping[str, Result]) -> None:
    """Write the largest difference at each tolerance of each file, or the reason of its failure."""
    from common import about, save

    rows: list[dict[str, Any]] = []
    for name, result in results.items():
        if not result.ok:
            rows.append({"file": name, "failed": result.where})
            continue
        rows += [
            {"file": name, "difference": each.max_abs_error, "tolerance": each.tolerance, "where": each.where}
            for each in result.by_tolerance
        ]
    save(options.json, {"benchmark": "check", **about(vars(options), "tests/reference"), "rows": rows})


def main(arguments: list[str]) -> int:
    """Check all files and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with the authors' reference numbers")
    parser.add_argument("--json", type=Path, help="output file")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    results: dict[str, Result] = {}
    for name, check in entries(options.folder):
        results[name] = result = run(options.folder, name, check)
        line = f"{'ok' if result.ok else 'FAIL'}  {name}  max_abs_error={result.max_abs_error:.3g}"
        print(f"{line}  tolerance={result.tolerance:.3g}{'' if result.ok else f'  {result.where}'}", flush=True)
    if options.json is not None:
        save_json(options, results)
    return int(not all(result.ok for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
