"""dino train --method NAME: the flags of the method, and its plan."""

import pytest

NETWORK = ("--network", "vit_tiny/8", "--backbone.width", "24", "--backbone.depth", "1", "--backbone.heads", "2")


@pytest.mark.parametrize(
    ("name", "present", "absent"),
    [
        ("byol", "--method.predictor", "--method.queue"),
        ("moco", "--method.queue INT", "--method.out-dim"),
        ("swav", "--method.freeze-prototypes", "--method.center-momentum"),
        ("supervised", "--method.mixup", "--method.momentum"),
    ],
)
def test_help_has_the_flags_of_the_method_only(dino, name: str, present: str, absent: str):
    output = dino("train", "--method", name, "--help-all")
    assert output.code == 0
    assert present in output.out
    assert absent not in output.out
    assert "dino,byol,moco,swav,supervised}" in output.out


def test_plan_of_a_method_has_the_users_settings(dino, photos):
    line = ["--method", "byol", "--method.head-hidden", "40", "--optim.epochs", "2", "--dry-run", "--json"]
    output = dino("train", photos, *NETWORK, *line)
    assert output.code == 0, output.err
    run, plan = output.json["run"], {row["name"]: row for row in output.json["plan"]}
    assert run["method"]["type"] == "BYOLConfig"
    assert (run["method"]["head_hidden"], run["method"]["momentum"]) == (40, 0.97)  # the user's; the plan's
    assert run["views"]["local"] == 0
    assert plan["teacher"]["value"] == "momentum 0.97 to 0.98"
    assert plan["method"]["value"] == "BYOL"
    assert plan["method.head_hidden"]["reason"].startswith("set by you")


def test_preset_with_another_method(dino, photos, tiny_preset):
    line = ["--method", "swav", "--method.out-dim", "30", "--optim.batch-size", "8", "--dry-run", "--json"]
    output = dino("train", photos, "--preset", "tiny_recipe:run", *line)
    assert output.code == 0, output.err
    run, plan = output.json["run"], {row["name"]: row for row in output.json["plan"]}
    assert run["method"]["type"] == "SwAVConfig"
    assert (run["method"]["out_dim"], run["method"]["head_hidden"]) == (30, 2048)
    assert plan["preset"]["value"].endswith("K 32")
    assert "SwAV" in plan["method"]["value"]
