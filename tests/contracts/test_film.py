"""Films: what is written is read again, frames come in order, and what is no film is named."""

from pathlib import Path

import numpy as np
import pytest

from dino_ssl.errors import UserError
from dino_ssl.viz.rendering import save
from dino_ssl.viz.video import open_video, write_video


def frames(count: int, height: int = 64, width: int = 96) -> list[np.ndarray]:
    """Grey frames, each lighter than the one before, the upper left corner red."""
    made = []
    for i in range(count):
        frame = np.full((height, width, 3), 30 + 20 * i, np.uint8)
        frame[: height // 2, : width // 2] = (250, 0, 0)
        made.append(frame)
    return made


def test_a_film_comes_back_frame_by_frame(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "film.mp4"
    assert write_video(path, iter(frames(6, 65, 97)), 10.0) == 6  # odd sides lose a line of pixels
    film = open_video(path)
    assert (film.fps, film.count) == (10.0, 6)
    read = list(film)
    assert len(read) == 6
    assert read[0].shape == (64, 96, 3)
    for got, sent in zip(read, frames(6, 65, 97), strict=True):
        assert np.abs(got[40:, 60:].astype(int).mean() - sent[40:64, 60:96].mean()) < 8
        assert got[8:20, 8:30, 0].mean() > 200  # red, not blue
        assert got[8:20, 8:30, 2].mean() < 60
    assert len(list(film)) == 6  # and again from the start
    assert [file.name for file in path.parent.iterdir()] == ["film.mp4"]


def test_the_pictures_of_a_folder_are_frames_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number, frame in enumerate(frames(11)):
        save(tmp_path / f"frame{number}.png", frame)
    (tmp_path / "notes.txt").touch()
    film = open_video(tmp_path, fps=4)
    assert (film.fps, film.count) == (4, 11)
    levels = [int(frame[-1, -1, 0]) for frame in film]
    assert levels == [30 + 20 * i for i in range(11)]  # frame10 is the last


def test_what_is_no_film_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no video"):
        open_video(tmp_path / "missing.mp4")
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(UserError, match="OpenCV can read"):
        open_video(tmp_path / "text.mp4")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no frames"):
        open_video(empty)
    with pytest.raises(UserError, match="fps"):
        open_video(empty, fps=0)
    (empty / "0.png").write_text("hello")
    with pytest.raises(UserError, match="frame cannot be read"):
        list(open_video(empty))


def test_a_film_is_whole_or_not_there(tmp_path: Path) -> None:
    def breaks():
        yield from frames(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "film.mp4", breaks(), 10)
    with pytest.raises(UserError, match="no frames"):
        write_video(tmp_path / "film.mp4", [], 10)
    with pytest.raises(UserError, match="one size"):
        write_video(tmp_path / "film.mp4", [*frames(1), *frames(1, 32, 32)], 10)
    assert list(tmp_path.iterdir()) == []
