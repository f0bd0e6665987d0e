"""The authors' masks of 60 % of the attention: recomputed with the project's own code."""

from pathlib import Path

import numpy as np

from golden import Check, Result, read


def attention_threshold(path: Path) -> Result:
    from dino_ssl.evals.attention_masks import top_mass_mask

    data, check = read(path), Check()
    check.equal("mask", top_mass_mask(np.asarray(data["attention"]), float(data["keep_mass"])), data["mask"])
    return check.result()
