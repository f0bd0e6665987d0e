"""Is it learning, or has it collapsed? Fig. 7's two failures by name, from numbers that are logged anyway."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dino.objectives import D_KL, P, h, log_P


def outputs_health(
    student_logits: Tensor,  # [..., K]
    teacher_logits: Tensor,  # [..., K], of the same pictures
    *,
    center: Tensor | float,
    student_temp: float,
    teacher_temp: float,
) -> dict[str, float]:
    """Eq. 5's two terms and how the prototypes are used, over a batch.

    teacher_entropy: 0 is one prototype, ln K is uniform; kl: 0 means that nothing is left to learn (Fig. 7);
    prototypes_used: exp of the entropy of the mean teacher output, as a share of K; center_norm: Eq. 4's |c|.
    """
    teacher = P(teacher_logits, teacher_temp, center)
    count = teacher.shape[-1]
    mean = teacher.reshape(-1, count).mean(dim=0)
    return {
        "teacher_entropy": h(teacher).mean().item(),
        "kl": D_KL(teacher, log_P(student_logits, student_temp)).mean().item(),
        "prototypes_used": (h(mean).exp() / count).item(),
        "center_norm": torch.as_tensor(center).float().norm().item(),
    }


def rank_me(features: Tensor) -> float:
    """RankMe (Garrido et al., 2023): exp of the entropy of the normalised singular values of features [N, D].

    Between 1 (all features on one line: collapsed) and min(N, D); no labels are needed.
    """
    values = torch.linalg.svdvals(features.float())
    return h(values / values.sum().clamp(min=1e-12)).exp().item()


def diagnose(history: Sequence[Mapping[str, float | None]], prototypes: int | None) -> list[str]:
    """What is wrong, in sentences that say what to do; empty where nothing is.

    history: logged training metrics in order (loss, teacher_entropy, kl; marginal_entropy where there is
    one); prototypes: K, None for a method without. A non-finite value is None or NaN.
    """
    rows = [row for row in history if "loss" in row]
    for row in rows:
        if not _finite(row.get("loss")):
            return [
                f"The loss stopped being a number at step {row.get('step', '?')}. Resume from the last "
                "checkpoint with a lower learning rate, clip 1 or less, or in float32."
            ]
    if len(rows) < 5 or prototypes is None:
        return []
    top = math.log(prototypes)
    recent = rows[-max(3, len(rows) // 10) :]
    loss, entropy, kl = (_mean(recent, name) for name in ("loss", "teacher_entropy", "kl"))
    if entropy is not None and kl is not None and loss is not None:
        if entropy > 0.995 * top and loss > 0.995 * top:
            return [
                f"Uniform collapse: loss and teacher entropy stand at ln K = {top:.2f}, so the teacher gives "
                "every picture all prototypes alike (Fig. 7, without sharpening). Lower the teacher's "
                "temperature or the learning rate, or warm both up for longer."
            ]
        if entropy < 0.02 * top and kl < 0.02 * top:
            return [
                f"Collapse to one prototype: teacher entropy {entropy:.3f} and KL {kl:.3f} are close to 0: "
                "one output takes every picture (Fig. 7, without centering). Check that centering is on, "
                "raise the teacher's temperature, or lower the center's momentum."
            ]
    first = _mean(rows[: max(3, len(rows) // 10)], "loss")
    if loss is not None and first is not None and loss > 0.9 * top and first - loss < 0.1 * top:
        return [
            f"Not learning yet: the loss is {loss:.2f} of ln K = {top:.2f}, near to guessing. Early "
            "on this is usual. If it stays: raise the learning rate, lower the teacher's momentum (0.99 for "
            "small data), or take fewer prototypes."
        ]
    return []


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _mean(rows: Sequence[Mapping[str, float | None]], name: str) -> float | None:
    values = [float(value) for row in rows if (value := row.get(name)) is not None and math.isfinite(value)]
    return sum(values) / len(values) if values else None
