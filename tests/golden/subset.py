"""Write the small reference files of tests/golden/data from the full ones: `python tests/golden/subset.py FULL_DIR`.

The training trajectories, the DAVIS sequences and the whitening of copy detection are too large for the repository.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

DATA = Path(__file__).with_name("data")
WHOLE = ("schedules.npz", "param_groups.json", "knn.npz", "attention_threshold.npz", "retrieval.json",
         "copy_detection_ap.json", "video_propagation.npz")  # fmt: skip
PARTS: dict[str, Callable[[str], bool]] = {
    "vit.npz": lambda name: name.startswith("weights/") or name.endswith("/local"),  # interpolates the positions
    "head.npz": lambda name: name.startswith(("bn/", "one_layer/")),
    "loss.npz": lambda name: not name.endswith(("/2", "/3", "/4")),  # the first two of five steps
}
"""File -> which of its arrays are kept."""
RELEASED = ("vit_small_patch16", "vit_base_patch8", "resnet50")


def main(full: Path) -> None:
    """Write all files of tests/golden/data."""
    DATA.mkdir(exist_ok=True)
    for name in WHOLE:
        shutil.copyfile(full / name, DATA / name)
    for name, keep in PARTS.items():
        arrays = np.load(full / name)
        np.savez_compressed(
            DATA / name, **{key: arrays[key] for key in [*filter(keep, arrays.files), "config"] if key in arrays.files}
        )
    keys = json.loads((full / "official_state_dict_keys.json").read_text())
    (DATA / "official_state_dict_keys.json").write_text(json.dumps({name: keys[name] for name in RELEASED}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
