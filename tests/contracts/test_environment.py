"""OpenMP threads spin while they wait on an idle machine, and sleep on a busy one."""

import os

import pytest

from dino_ssl import environment
from dino_ssl.cli import main


@pytest.mark.parametrize(
    ("load", "variables", "expected"),
    [
        (0.3, {}, None),
        (3.0, {}, "passive"),
        (1.6, {}, None),
        (2.4, {}, "passive"),
        (3.0, {"OMP_WAIT_POLICY": "active"}, "active"),
        (3.0, {"GOMP_SPINCOUNT": "100"}, None),
        (0.3, {"OMP_WAIT_POLICY": "passive"}, "passive"),
    ],
)
def test_threads_sleep_on_a_busy_machine_unless_set_by_the_user(
    load: float, variables: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    environment.prepare()
    assert os.environ.get("OMP_WAIT_POLICY") == expected


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_unknown_load_counts_as_busy(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> None:
        raise error

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(os, "getloadavg", unknown)
    environment.prepare()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


def test_command_line_prepares_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = []
    monkeypatch.setattr(environment, "prepare", lambda: prepared.append(True))
    assert main(["--version"]) == 0
    assert prepared == [True]
    assert capsys.readouterr().out.strip()
