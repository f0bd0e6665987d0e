"""What is learnt from a pack is what is learnt from its folder, bit for bit."""

from pathlib import Path

from tiny import fit, same_training, tiny

from dino_ssl.data.folder import Folder
from dino_ssl.data.packing import Packing
from dino_ssl.data.synthetic.scenes import Scenes


def test_training_from_a_pack_is_training_from_its_folder(tmp_path: Path) -> None:
    """From its first steps; and a run that began with the one goes on with the other."""
    Scenes(count=24, size=32, classes=4).write(tmp_path / "photos")
    with Packing(str(tmp_path / "photos"), str(tmp_path / "photos.ds")) as job:
        job.look()
        job.write()
    photos, pack = (Folder(path=str(tmp_path / name)) for name in ("photos", "photos.ds"))
    whole = tiny(tmp_path / "a", data=photos, optim=dict(epochs=2))
    packed = tiny(tmp_path / "b", data=pack, optim=dict(epochs=2))
    fit(whole)
    fit(packed, until=4)
    fit(tiny(tmp_path / "b", data=photos, optim=dict(epochs=2)), resume=True)
    assert not same_training(whole, packed)
