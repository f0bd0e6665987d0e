"""Pickles of plain data read as Python reads them, and no pickle can run code."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_ssl.data.benchmarks.revisited import read_plain
from dino_ssl.errors import UserError

PLAIN = {
    "imlist": ["a", "ü", "b" * 300],
    "gnd": [{"bbx": [1.5, 2, 3.0, 4], "easy": [1, 2**40, -3], "junk": (), "none": None, "yes": True}],
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_is_read_as_by_pickle(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(PLAIN, protocol))
    assert read_plain(tmp_path / "gnd.pkl") == PLAIN


def test_official_files(shared: Path) -> None:
    for name in ("gnd_roxford5k.pkl", "gnd_rparis6k.pkl"):
        file = shared / "data" / "rparis_mini" / name
        assert read_plain(file) == pickle.loads(file.read_bytes())


class Attack:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_code_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "ran"
    attacks = [
        Attack(os.system, f"touch {trace}"),
        Attack(eval, f"open({str(trace)!r}, 'w')"),
        Attack(Path.touch, trace),
        Attack(getattr, "text", "format"),
    ]
    for attack in attacks:
        file = tmp_path / "gnd.pkl"
        file.write_bytes(pickle.dumps({"imlist": ["a"], "gnd": [attack]}, protocol))
        with pytest.raises(UserError, match=r"was not opened: it refers to .*could run any program"):
            read_plain(file)
        assert not trace.exists()
    pickle.loads(pickle.dumps(attacks[0], protocol))  # the file does run code if it is not refused
    assert trace.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cnumpy\nsave\n.", r"numpy\.save"),
        (b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", r"numpy\.ndarray\.__init__"),
        (b"cbuiltins\ngetattr\n.", r"builtins\.getattr"),
        (pickle.dumps(np.arange(3)), r"numpy\."),
        (b"Pname\n.", "persistent id"),
        (b"\x82\x01.", "unregistered extension"),
    ],
)
def test_other_references_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "gnd.pkl").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_plain(tmp_path / "gnd.pkl")


@pytest.mark.parametrize("kept", [0, 1, 10, -1])
def test_damaged_files(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "gnd.pkl"
    file.write_bytes(pickle.dumps(PLAIN)[:kept])
    with pytest.raises(UserError, match="was not opened"):
        read_plain(file)
    file.write_bytes(b"\x89PNG, not a pickle")
    with pytest.raises(UserError, match=r"gnd\.pkl"):
        read_plain(file)
    with pytest.raises(UserError, match=r"was not opened: .*No such file"):
        read_plain(tmp_path / "none.pkl")
