"""Reference checks of retrieval and copy detection against the official scorers."""

import json
from pathlib import Path

import numpy as np
import torch

from golden import SINGLE, Check, Result, network_of, read


def retrieval(path: Path) -> Result:
    """Check mAP, AP per query and mean precision of given ranks, exactly."""
    from dino_ssl.data.benchmarks.revisited import Truth
    from dino_ssl.evals.retrieval import protocol_scores

    data, check = json.loads(path.read_text()), Check()
    ranks = np.asarray(data["ranks"])
    by_kind = [
        Truth(*(np.flatnonzero(np.isin(ranks[:, q], lists[kind])) for kind in Truth._fields))
        for q, lists in enumerate(data["gnd"])
    ]
    for protocol, expected in data["expected"].items():
        scores = protocol_scores(by_kind, protocol, data["kappas"])
        check.equal(f"{protocol}/map", scores.mean_ap, expected["map"])
        check.equal(f"{protocol}/aps", scores.ap, expected["aps"])
        check.equal(f"{protocol}/precision_at", list(scores.precision), expected["precision_at"])
    return check.result()


def copy_detection_ap(path: Path) -> Result:
    """Check AP from the ranks of the positives, exactly."""
    from dino_ssl.evals.ranking import average_precision

    check = Check()
    for i, case in enumerate(json.loads(path.read_text())):
        check.equal(f"case {i}", average_precision(case["ranks"], case["nres"]), case["ap"])
    return check.result()


def copy_detection_descriptor(path: Path) -> Result:
    """Check [CLS || GeM of patches] of the network of vit.npz, and a whitening up to the signs of eigenvectors."""
    from dino_ssl.evals.copy_detection import copy_descriptor, fit_whitening, whiten

    data, check = read(path), Check()
    network = network_of(read(path.with_name("vit.npz")))
    with torch.no_grad():
        check.close("descriptor", copy_descriptor(network, torch.from_numpy(data["input"])), data["descriptor"], SINGLE)
    fit, inputs, expected = (torch.from_numpy(data[f"whiten_{part}"]) for part in ("fit", "in", "out"))
    whitening = fit_whitening(fit, expected.shape[1], center=False)  # as the reference
    actual = whiten(inputs, whitening)
    signs = (actual * expected).sum(0).sign()
    check.close("whitening", actual * signs, expected, SINGLE)
    return check.result()
