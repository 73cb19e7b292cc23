"""Paths in records: none leads out of the record, and images that are missing or broken are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fmp_core.data.attack_record import read_attack_record
from fmp_core.errors import UserError
from PIL import Image
from small_record import PIXELS, Edit, images_in, set_to


@pytest.mark.parametrize(
    "text",
    [
        "./record/mine/bd_test_dataset/../../../secret.png",
        "../secret.png",
        "a/b/c/../../secret.png",
        "./record/mine/bd_test_dataset/..\\..\\..\\secret.png",
    ],
)
def test_a_path_that_climbs_out_is_refused(text: str, record: Path, edit_record: Edit):
    for folder in (record.parent, record.parent.parent):
        Image.new("RGB", (4, 4)).save(folder / "secret.png")
    edit_record(record, set_to("bd_test", "bd_data_container", "data_dict", 4, "path", value=text))
    with pytest.raises(UserError, match="names an image outside its folder") as caught:
        read_attack_record(record)
    assert text in str(caught.value)


def test_an_absolute_path_stays_in_the_record(record: Path, tmp_path: Path, edit_record: Edit):
    secret = tmp_path / "a" / "b" / "secret.png"
    secret.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(secret)
    edit_record(record, set_to("bd_test", "bd_data_container", "data_dict", 4, "path", value=str(secret)))
    with pytest.raises(UserError, match="1 of 4 poisoned test images are missing"):
        read_attack_record(record)


def test_a_symlink_out_of_the_record_is_refused(record: Path, tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    file = record / "bd_test_dataset" / "2" / "4.png"
    file.unlink()
    file.symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="outside its folder"):
        read_attack_record(record)


def test_the_image_folder_may_lie_on_another_disk(record: Path, tmp_path: Path):
    """... behind a link; but nothing in it may lead elsewhere."""
    (record / "bd_test_dataset").rename(tmp_path / "images")
    (record / "bd_test_dataset").symlink_to(tmp_path / "images")
    assert torch.equal(images_in(record), PIXELS)
    (tmp_path / "images" / "2").rename(tmp_path / "two")
    (tmp_path / "images" / "2").symlink_to(tmp_path / "two")
    with pytest.raises(UserError, match="outside its folder"):
        read_attack_record(record)


def test_a_symlink_loop_is_refused(record: Path):
    file = record / "bd_test_dataset" / "2" / "4.png"
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(UserError):
        read_attack_record(record)


def test_an_overlong_path_is_refused(record: Path, edit_record: Edit):
    edit_record(
        record, set_to("bd_test", "bd_data_container", "data_dict", 4, "path", value=f"bd_test_dataset/2/{'c' * 300}.png")
    )
    with pytest.raises(UserError):
        read_attack_record(record)


def test_missing_images_are_counted_and_the_first_named(record: Path):
    (record / "bd_test_dataset" / "3" / "6.png").unlink()
    (record / "bd_test_dataset" / "2" / "4.png").unlink()
    with pytest.raises(UserError, match=r"2 of 4 poisoned test images are missing, first .*2/4\.png; copy the whole record"):
        read_attack_record(record)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_broken_image_is_named(content: bytes | None, record: Path):
    file = record / "bd_test_dataset" / "2" / "4.png"
    file.write_bytes(file.read_bytes()[:60] if content is None else content)
    with pytest.raises(UserError, match=r"2/4\.png cannot be decoded"):
        images_in(record)


def test_an_image_beside_the_record_file_may_be_no_link_out_of_it(record: Path, tmp_path: Path, edit_record: Edit):
    edit_record(record, set_to("bd_test", "bd_data_container", "data_dict", 4, "path", value="a.png"))
    Image.new("RGB", (4, 4)).save(record / "a.png")
    assert read_attack_record(record).bd_test.images[1].name == "a.png"
    (record / "a.png").rename(tmp_path / "secret.png")
    (record / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="names an image outside its folder"):
        read_attack_record(record)


def test_files_that_decode_to_very_many_pixels_are_refused(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmp_core.data.images.MOST_PIXELS", 300)
    monkeypatch.setattr("fmp_core.data.images.MAX_MEAN_ENLARGEMENT", 1)
    for file in (record / "bd_test_dataset").rglob("*.png"):
        Image.new("RGB", (20, 15)).save(file)
    with pytest.raises(UserError, match="it has 20x15 pixels"):
        images_in(record)
