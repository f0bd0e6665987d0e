"""Settings: edited by copy, written as JSON, and read by declared types, never by arbitrary names in the file."""

import json
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from dino_ssl.config import edit, from_dict, to_dict
from dino_ssl.errors import UserError
from dino_ssl.optim import Optim
from dino_ssl.schedules import Cosine, EpochRamp, Schedule, Warmup


@dataclass(frozen=True, kw_only=True)
class Cat:
    lives: int = 9


@dataclass(frozen=True, kw_only=True)
class Dog:
    name: str = "Rex"
    tail: float | None = None


@dataclass(frozen=True, kw_only=True)
class House:
    pet: Cat | Dog = field(default_factory=Cat)
    rooms: tuple[int, ...] = (1, 2)
    size: tuple[float, float] = (3.0, 4.0)
    heating: Literal["gas", "wood"] = "gas"
    price: float = 1.5
    sold: bool = False
    notes: tuple[tuple[str, str], ...] = ()
    garden: Cat | None = None


@dataclass(frozen=True, kw_only=True)
class Street:
    first: House = field(default_factory=House)
    second: House = field(default_factory=House)
    curve: Schedule = Cosine(1.0, 0.0)  # noqa: RUF009


@dataclass(frozen=True, kw_only=True)
class Strict:
    needed: int


# -- edit ---------------------------------------------------------------------------------------------------


def test_edit_copies_and_reaches_into_nested_values() -> None:
    street = Street()
    changed = edit(street, second=dict(price=2.0, pet=dict(lives=7)))
    assert changed == Street(second=House(price=2.0, pet=Cat(lives=7)))
    assert street == Street()


def test_edit_can_replace_a_nested_value() -> None:
    assert edit(House(), pet=Dog(name="Ada")).pet == Dog(name="Ada")
    assert edit(House(), garden=Cat()).garden == Cat()


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (dict(prise=2.0), ["House has no field 'prise'", "did you mean 'price'", "rooms"]),
        (dict(pet=dict(live=2)), ["Cat has no field 'live'", "did you mean 'lives'"]),
        (dict(zzz=1), ["House has no field 'zzz'", "heating"]),
    ],
)
def test_edit_error_names_the_unknown_field(change: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        edit(House(), **change)
    for message in messages:
        assert message in str(caught.value)


# -- round trip ----------------------------------------------------------------------------------------------


def back(kind: Any, value: Any) -> Any:
    return from_dict(kind, json.loads(json.dumps(to_dict(value))))


@pytest.mark.parametrize(
    "value",
    [
        Street(),
        Street(first=House(pet=Dog(tail=1.0), rooms=(), garden=Cat(lives=1)), curve=Warmup(1.5, Cosine(1.0, 0.5))),
        Street(curve=EpochRamp(0.04, 0.07, 30)),
        Street(first=House(notes=(("a", "1"), ("b", "2")), heating="wood", sold=True)),
    ],
)
def test_to_dict_and_back_through_json(value: Street) -> None:
    assert back(Street, value) == value


def test_a_tuple_comes_back_as_a_tuple_and_an_integer_price_as_a_float() -> None:
    house = back(House, House(rooms=(3,), price=2))
    assert house.rooms == (3,)
    assert isinstance(house.rooms, tuple)
    assert isinstance(house.price, float)


def test_missing_fields_keep_their_defaults() -> None:
    assert from_dict(House, {}) == House()
    assert from_dict(Street, {"second": {"price": 2.0}}) == Street(second=House(price=2.0))


# -- invalid data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "data", "messages"),
    [
        (House, {"prise": 1}, ["House has no field 'prise'", "did you mean 'price'"]),
        (
            Street,
            {"first": {"pet": {"type": "Cat", "live": 1}}},
            ["Street.first.pet has no field 'live'", "'lives'"],
        ),
        (House, {"rooms": 3}, ["House.rooms", "expected a list", "3"]),
        (House, {"rooms": [1, "two"]}, ["House.rooms[1]", "expected int", "'two'"]),
        (House, {"rooms": [1.5]}, ["House.rooms[0]", "expected int", "1.5"]),
        (House, {"size": [1.0]}, ["House.size", "list of 2 values", "1"]),
        (House, {"heating": "coal"}, ["House.heating", "'gas', 'wood'", "'coal'"]),
        (House, {"heating": ["gas"]}, ["House.heating", "'gas', 'wood'"]),
        (House, {"price": "cheap"}, ["House.price", "expected float", "'cheap'"]),
        (House, {"price": True}, ["House.price", "expected float", "True"]),
        (House, {"price": None}, ["House.price", "expected float", "None"]),
        (House, {"sold": 1}, ["House.sold", "expected bool", "1"]),
        (House, {"pet": 3}, ["House.pet", "3"]),
        (House, {"pet": {"type": "Cat", "lives": True}}, ["House.pet.lives", "expected int", "True"]),
        (House, {"pet": {"type": "Kat"}}, ["House.pet", "Cat, Dog", "'Kat'", "did you mean 'Cat'"]),
        (House, {"pet": {"lives": 3}}, ["House.pet", "Cat, Dog"]),
        (House, {"type": "Cat"}, ["House", "Cat"]),
        (House, [1], ["House", "[1]"]),
        (Street, {"first": "here"}, ["Street.first", "'here'"]),
        (Street, {"curve": {"type": "Cosine", "start": 1.0}}, ["Street.curve", "stop"]),
        (Strict, {}, ["Strict", "needed"]),
        (Optim, {"micro_batch": 1.5}, ["Optim.micro_batch", "int", "'auto'", "1.5"]),
    ],
)
def test_the_error_for_invalid_data_names_the_field(kind: Any, data: Any, messages: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(kind, data)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    "tag",
    ["os.system", "subprocess.Popen", "Popen", "builtins.eval", "House", "", None, 3, ["Cat"], {"a": 1}],
)
def test_a_type_name_is_only_looked_up_among_the_expected_types(tag: Any) -> None:
    with pytest.raises(UserError, match=r"House\.pet"):
        from_dict(House, {"pet": {"type": tag, "args": "touch owned"}})
    with pytest.raises(UserError):
        from_dict(House, {"type": tag} if tag != "House" else {"type": "Dog"})


def test_types_from_outside_are_imported_only_if_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        f"from dataclasses import dataclass\nfrom {__name__} import Cat\n"
        "@dataclass(frozen=True)\nclass Lion(Cat):\n    pass\n"
    )
    (tmp_path / "outside_pets.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    data = {"pet": {"type": "outside_pets:Lion"}}
    with pytest.raises(UserError, match="trust"):
        from_dict(House, data)
    assert "outside_pets" not in sys.modules
    assert type(from_dict(House, data, trust=True).pet).__name__ == "Lion"


# -- the settings of the project ----------------------------------------------------------------------------


def other(value: Any) -> Any:
    """Another value of the same type, so that no field can come back by its default."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value * 0.75 + 0.125
        case _:
            return value


def test_a_whole_run_and_every_choice_inside_it_survive_json() -> None:
    from dino_ssl.data.folder import Folder
    from dino_ssl.data.synthetic.scenes import Scenes
    from dino_ssl.models.timm import Timm
    from dino_ssl.models.vit import ViT
    from dino_ssl.run import Run

    runs = [
        Run(data=data, backbone=backbone)
        for data in (Folder(path="some photos/ü"), Scenes(count=50, size=32, seed=3))
        for backbone in (
            ViT(size="tiny", patch=8, registers=4, width=48, heads=3, depth=2),
            Timm(name="resnet18"),
        )
    ]
    default = Run()
    for name in (f.name for f in fields(default)):
        old = getattr(default, name)
        for inner in (f.name for f in fields(old)) if is_dataclass(old) else ():
            value = getattr(old, inner)
            try:
                runs.append(edit(default, **{name: {inner: other(value)}}))
            except UserError:  # a field whose other value is invalid in combination
                continue
        runs.append(edit(default, **{name: other(old)}))
    assert len(runs) > 40
    for run in runs:
        assert back(Run, run) == run


def test_a_run_is_not_read_from_settings_that_cannot_be() -> None:
    from dino_ssl.run import Run

    for wrong in (
        {"optim": {"epochs": 0}},
        {"method": {"out_dim": 1}},
        {"workers": "two"},
        {"presicion": "float32"},
    ):
        with pytest.raises(UserError):
            from_dict(Run, wrong)


@pytest.mark.parametrize(
    "content", [b"\xff", b"{", b"[]", b'{"format": 9}', b'{"format": 1}', b'{"format": 1, "run": []}']
)
def test_a_damaged_run_json_is_a_user_error(tmp_path: Path, content: bytes) -> None:
    from dino_ssl.run import read_run

    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError):
        read_run(tmp_path)
