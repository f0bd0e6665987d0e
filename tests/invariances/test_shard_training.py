"""Training from shards is bit-identical to training from their folder."""

from pathlib import Path

from tiny import fit, same_training, tiny

from dino_ssl.data.folder import Folder
from dino_ssl.data.shard_writer import pack
from dino_ssl.data.shards import PackSettings
from dino_ssl.data.synthetic.scenes import Scenes


def test_training_from_shards_is_bit_equal_and_either_resumes_the_other(tmp_path: Path) -> None:
    Scenes(count=24, size=32, classes=4).write(tmp_path / "photos")
    pack(tmp_path / "photos", tmp_path / "shards", PackSettings(shard_size=0.01))
    photos, shards = (Folder(path=str(tmp_path / name)) for name in ("photos", "shards"))
    from_folder = tiny(tmp_path / "a", data=photos, optim=dict(epochs=2))
    from_both = tiny(tmp_path / "b", data=shards, optim=dict(epochs=2))
    fit(from_folder)
    fit(from_both, until=4)
    fit(tiny(tmp_path / "b", data=photos, optim=dict(epochs=2)), resume=True)
    assert not same_training(from_folder, from_both)
