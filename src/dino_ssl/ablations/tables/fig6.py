"""Fig. 6: the teacher beside the student, and other teachers."""

from dino_ssl.ablations.bases import conv, vit_300
from dino_ssl.ablations.table import KNN, LOSS, QUALITY, STUDENT, STUDENTS, Row, Table
from dino_ssl.config import edit
from dino_ssl.run import Run


def small() -> Run:
    """Measured after every epoch: the curves are the figure."""
    return edit(conv(), online_eval=dict(every_epochs=1))


TABLE = Table(
    name="fig6",
    title="Fig. 6: teacher and student over time, and four teachers",
    protocol="ViT-S/16 on ImageNet, 300 epochs; 20-NN. Left: both networks while training. Right: after it. The left "
    "figure is a plot: by eye, about 67 and 68 for student and teacher after 100 epochs, 72.2 and 72.4 after 300.",
    paper=vit_300,
    small=small,
    figures=(KNN, STUDENT),
    curves=(QUALITY, STUDENTS, LOSS),
    students=True,
    rows=(
        Row("momentum", "momentum teacher", {"method": {"teacher": "momentum"}}, paper={"20-NN": 72.8}),
        Row("student", "copy of the student", {"method": {"teacher": "student"}}, paper={"20-NN": 0.1}),
        Row(
            "previous-step",
            "student of the previous iteration",
            {"method": {"teacher": "previous-step"}},
            paper={"20-NN": 0.1},
        ),
        Row(
            "previous-epoch",
            "student of the previous epoch",
            {"method": {"teacher": "previous-epoch"}},
            paper={"20-NN": 66.6},
        ),
    ),
    shows="The teacher is better than the student all along. Without momentum it must at least lag behind: a copy and "
    "the previous iteration fail, the previous epoch learns.",
)
