"""dino train --method NAME: its flags, its plan, its mistakes."""

import pytest

QUICK = "--network vit_tiny/8 --backbone.width 24 --backbone.depth 1 --backbone.heads 2".split()  # noqa: SIM905


@pytest.mark.parametrize(
    ("name", "own", "foreign"),
    [
        ("byol", "--method.predictor", "--method.queue"),
        ("moco", "--method.queue INT", "--method.out-dim"),
        ("swav", "--method.freeze-prototypes", "--method.center-momentum"),
        ("supervised", "--method.mixup", "--method.momentum"),
    ],
)
def test_the_flags_are_the_methods_own(dino, name: str, own: str, foreign: str):
    ran = dino("train", "--method", name, "--help")
    assert ran.code == 0
    assert own in ran.out
    assert foreign not in ran.out
    assert "dino,byol,moco,swav,supervised}" in ran.out


def test_a_method_is_planned_with_what_is_set(dino, photos):
    line = ["--method", "byol", "--method.head-hidden", "40", "--optim.epochs", "2", "--dry-run", "--json"]
    ran = dino("train", photos, *QUICK, *line)
    assert ran.code == 0, ran.err
    run, plan = ran.json["run"], {row["name"]: row for row in ran.json["plan"]}
    assert run["method"]["type"] == "BYOLConfig"
    assert (run["method"]["head_hidden"], run["method"]["momentum"]) == (40, 0.97)  # set; the plan's
    assert run["views"]["local"] == 0
    assert plan["method"]["value"] == "BYOL"
    assert plan["--method.head-hidden"]["why"].startswith("you set it")


def test_a_preset_takes_another_method(dino, photos, tiny_preset):
    line = ["--method", "swav", "--method.out-dim", "30", "--optim.batch-size", "8", "--dry-run", "--json"]
    ran = dino("train", photos, "--preset", "tiny_recipe:run", *line)
    assert ran.code == 0, ran.err
    run, plan = ran.json["run"], {row["name"]: row for row in ran.json["plan"]}
    assert run["method"]["type"] == "SwAVConfig"
    assert (run["method"]["out_dim"], run["method"]["head_hidden"]) == (30, 2048)
    assert plan["recipe"]["value"].endswith("K 32")  # as the preset says
    assert "SwAV" in plan["method"]["value"]


def test_a_method_that_is_none_is_refused(dino, photos):
    assert dino("train", photos, "--method", "simclr", "--dry-run").code == 2
    ran = dino("train", "--resume", "runs/nothing", "--method", "byol")
    assert ran.code == 2
