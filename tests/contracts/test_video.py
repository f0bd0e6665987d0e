"""Videos: written frames are read again in order, and errors name the file."""

from pathlib import Path

import numpy as np
import pytest

from dino_ssl.errors import UserError
from dino_ssl.viz.rendering import save_image
from dino_ssl.viz.video import open_video, write_video


def frames(count: int, height: int = 64, width: int = 96) -> list[np.ndarray]:
    """Return gray frames of increasing brightness with a red upper left corner."""
    made = []
    for i in range(count):
        frame = np.full((height, width, 3), 30 + 20 * i, np.uint8)
        frame[: height // 2, : width // 2] = (250, 0, 0)
        made.append(frame)
    return made


def test_written_frames_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "video.mp4"
    assert write_video(path, iter(frames(6, 65, 97)), 10.0) == 6  # odd sides lose a line of pixels
    video = open_video(path)
    assert (video.fps, video.num_frames) == (10.0, 6)
    read = list(video)
    assert len(read) == 6
    assert read[0].shape == (64, 96, 3)
    for got, expected in zip(read, frames(6, 65, 97), strict=True):
        assert np.abs(got[40:, 60:].astype(int).mean() - expected[40:64, 60:96].mean()) < 8
        assert got[8:20, 8:30, 0].mean() > 200  # red, not blue
        assert got[8:20, 8:30, 2].mean() < 60
    assert len(list(video)) == 6  # iterating again starts at the first frame
    assert [file.name for file in path.parent.iterdir()] == ["video.mp4"]


def test_images_of_a_folder_are_frames_in_natural_order(tmp_path: Path) -> None:
    for number, frame in enumerate(frames(11)):
        save_image(tmp_path / f"frame{number}.png", frame)
    (tmp_path / "notes.txt").touch()
    video = open_video(tmp_path, fps=4)
    assert (video.fps, video.num_frames) == (4, 11)
    levels = [int(frame[-1, -1, 0]) for frame in video]
    assert levels == [30 + 20 * i for i in range(11)]  # frame10 is the last
    assert list(video.frame_names()) == [f"frame{i}" for i in range(11)]
    save_image(tmp_path / "frame3.jpg", frames(1)[0])
    with pytest.raises(UserError, match="suffix"):
        open_video(tmp_path).frame_names()


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        open_video(tmp_path / "missing.mp4")
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(UserError, match="OpenCV cannot read the video"):
        open_video(tmp_path / "text.mp4")
    folder = tmp_path / "frames"
    save_image(folder / "0.png", frames(1)[0])
    with pytest.raises(UserError, match="fps"):
        open_video(folder, fps=0)
    (folder / "1.png").write_text("hello")
    with pytest.raises(UserError, match=r"frame 1\.png cannot be read"):
        open_video(folder)


def test_a_video_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    def interrupted():
        yield from frames(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "video.mp4", interrupted(), 10)
    with pytest.raises(UserError, match="no frames"):
        write_video(tmp_path / "video.mp4", [], 10)
    with pytest.raises(UserError, match="one size"):
        write_video(tmp_path / "video.mp4", [*frames(1), *frames(1, 32, 32)], 10)
    assert list(tmp_path.iterdir()) == []
