"""Reference check of the masks that keep 60 % of the attention."""

from pathlib import Path

import numpy as np

from golden import Check, Result, read


def attention_threshold(path: Path) -> Result:
    """Check the mask of each head, exactly."""
    from dino_ssl.evals.attention_masks import top_mass_mask

    data, check = read(path), Check()
    check.equal("mask", top_mass_mask(np.asarray(data["attention"]), float(data["keep_mass"])), data["mask"])
    return check.result()
