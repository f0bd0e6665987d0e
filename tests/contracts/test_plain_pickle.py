"""Pickles from strangers: plain data reads as Python reads it, and nothing else runs."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_ssl.data.benchmarks.plain_pickle import loads, read_plain_pickle
from dino_ssl.errors import UserError

PLAIN = {
    "imlist": ["a", "ü", "b" * 300],
    "gnd": [{"bbx": [1.5, 2, 3.0, 4], "easy": [1, 2**40, -3], "junk": (), "none": None, "yes": True}],
    "set": {1, 2},
    "bytes": b"\x00\xff",
    "complex": [1j, float("inf")],
}
ARRAYS = [
    np.arange(6).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    np.array([True, False]),
    np.array(["one", "three"]),
    np.array([b"one", b"three"]),
    np.arange(3, dtype=">i2"),
    np.zeros((0, 4)),
    np.array(7.5),
]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_reads_as_python_reads_it(protocol: int) -> None:
    assert loads(pickle.dumps(PLAIN, protocol)) == PLAIN


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_numbers_and_texts(protocol: int) -> None:
    read = loads(pickle.dumps({"deep": [ARRAYS]}, protocol))["deep"][0]
    for one, expected in zip(read, ARRAYS, strict=True):
        assert isinstance(one, np.ndarray)
        assert one.dtype == expected.dtype
        np.testing.assert_array_equal(one, expected)
    numbers = loads(pickle.dumps([np.float64(0.1), np.int32(-4), np.array([1, "a"], dtype=object)], protocol))
    assert numbers == [0.1, -4, [1, "a"]]


def test_what_occurs_twice_stays_one() -> None:
    twice = [1, 2]
    read = loads(pickle.dumps([twice, twice]))
    assert read[0] is read[1]


def test_the_official_files(shared: Path) -> None:
    for name in ("gnd_roxford5k.pkl", "gnd_rparis6k.pkl"):
        file = shared / "data" / "rparis_mini" / name
        assert read_plain_pickle(file) == pickle.loads(file.read_bytes())


class Attack:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_a_program_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
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
        with pytest.raises(UserError, match=r"was not opened: it asks for .*can run any program"):
            read_plain_pickle(file)
        assert not trace.exists()
    pickle.loads(pickle.dumps(attacks[0], protocol))  # the same file does run where it is not refused
    assert trace.exists()


REACHES = {
    "asks for numpy.save": b"cnumpy\nsave\n.",
    "asks for numpy.core.multiarray.fromfile": b"cnumpy.core.multiarray\nfromfile\n.",
    "asks for numpy.ndarray.__init__": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
    "asks for builtins.getattr": b"cbuiltins\ngetattr\n.",
    "asks for dino_ssl.data.benchmarks.plain_pickle._Call": b"cdino.data.plain_pickle\n_Call\n.",
    "holds a function or a type": b"cnumpy\ndtype\n.",
    "changes a function": b"c_codecs\nencode\n(N}X\x09\x00\x00\x00_functionK\x01stb.",
    "array of objects": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00O8tRC\x08AAAAAAAAtR.",
    "array of type 'i4,i4'": b"cnumpy\ndtype\n(X\x05\x00\x00\x00i4,i4tR.",
    "makes bytes of int": b"cbuiltins\nbytes\n(J\xff\xff\xff\x7ftR.",
    "persistent id": b"Pname\n.",
    "unregistered extension": b"\x82\x01.",
}
"""Ways out of plain data, by what is said of each."""


@pytest.mark.parametrize("said", REACHES)
def test_back_doors(said: str, tmp_path: Path) -> None:
    (tmp_path / "gnd.pkl").write_bytes(REACHES[said])
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        read_plain_pickle(tmp_path / "gnd.pkl")


@pytest.mark.parametrize("kept", [0, 1, 10, -1])
def test_a_file_that_is_cut_short(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "gnd.pkl"
    file.write_bytes(pickle.dumps(PLAIN)[:kept])
    with pytest.raises(UserError, match="no whole pickle"):
        read_plain_pickle(file)
    file.write_bytes(b"\x89PNG, not a pickle")
    with pytest.raises(UserError, match=r"gnd\.pkl"):
        read_plain_pickle(file)
    with pytest.raises(UserError, match="Cannot read"):
        read_plain_pickle(tmp_path / "none.pkl")
