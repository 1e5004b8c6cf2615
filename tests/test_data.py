"""Images: every odd Pillow format, unreadable files, deterministic crops and order, the bundled photographs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from vqkernels.models import ImageFolder, bundled_photographs, held_out_photograph, list_images, load_image
from vqkernels.models import data as data_module
from vqkernels.models.data import EndlessBatches, _with_other_colours, to_picture, to_tensor


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """A smooth picture with a little noise, different in all corners."""
    noise = np.random.default_rng(seed).integers(0, 16, (height, width, 3))
    down, across = np.mgrid[0:height, 0:width]
    ramp = np.stack([down * 200 // height, across * 200 // width, (down + across + 40 * seed) % 200], axis=-1)
    return Image.fromarray((ramp + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    (root / "deep" / "er").mkdir(parents=True)
    for number, place in enumerate(["a.png", "deep/b.jpg", "deep/er/c.WEBP", "d.bmp", "e.tif"]):
        picture(seed=number).save(root / place)
    return root


def test_folder_is_searched_recursively_in_one_order(folder):
    (folder / "notes.txt").write_text("no picture")
    names = [file.relative_to(folder).as_posix() for file in list_images(folder)]
    assert names == ["a.png", "d.bmp", "deep/b.jpg", "deep/er/c.WEBP", "e.tif"]
    images = ImageFolder(folder, 16)
    assert len(images) == 5
    assert images.skipped == []
    assert images[3].shape == (3, 16, 16)
    assert images[3].dtype == torch.float32
    assert images[3].abs().max() <= 1


def test_pixels_survive_the_way_to_a_tensor_and_back():
    original = picture()
    assert np.array_equal(np.asarray(to_picture(to_tensor(original))), np.asarray(original))
    assert to_tensor(Image.new("RGB", (1, 1), (0, 255, 0))).flatten().tolist() == [-1.0, 1.0, -1.0]


def grey_ramp() -> np.ndarray:
    return np.linspace(0, 1, 32 * 32).reshape(32, 32)


def grey_picture() -> Image.Image:
    return Image.fromarray((grey_ramp() * 255).astype(np.uint8))


ODD_PICTURES = {
    "grey.png": (lambda: grey_picture(), grey_ramp),
    "grey16.png": (lambda: Image.fromarray((grey_ramp() * 65535).astype(np.uint16)), grey_ramp),
    "grey16.tif": (lambda: Image.fromarray((grey_ramp() * 65535).astype(np.uint16)), grey_ramp),
    "grey32.tif": (lambda: Image.fromarray((grey_ramp() * 65535).astype(np.int32)), grey_ramp),
    "float.tif": (lambda: Image.fromarray(grey_ramp().astype(np.float32)), grey_ramp),
    "bilevel.png": (lambda: Image.fromarray(grey_ramp() > 0.5), lambda: (grey_ramp() > 0.5).astype(float)),
    "palette.gif": (lambda: grey_picture().convert("P"), grey_ramp),
    "cmyk.jpg": (lambda: grey_picture().convert("RGB").convert("CMYK"), grey_ramp),
    "ycbcr.jpg": (lambda: grey_picture().convert("YCbCr"), grey_ramp),
}


@pytest.mark.parametrize("name", ODD_PICTURES)
def test_odd_formats_keep_their_brightness(name, tmp_path):
    make, expected = ODD_PICTURES[name]
    make().save(tmp_path / name)
    found = load_image(tmp_path / name)
    assert found.shape == (3, 32, 32)
    assert torch.from_numpy(expected() * 2 - 1).sub(found).abs().max() < 0.06


def test_transparency_is_laid_on_white(tmp_path):
    layer = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    layer.paste((0, 0, 255, 255), (0, 0, 8, 16))
    layer.save(tmp_path / "rgba.png")
    Image.new("LA", (16, 16), (0, 0)).save(tmp_path / "la.png")
    indexed = Image.new("P", (16, 16), 0)
    indexed.putpalette([255, 0, 0, 0, 0, 255])
    indexed.save(tmp_path / "palette.png", transparency=0)
    rgba = load_image(tmp_path / "rgba.png")
    assert rgba[:, 0, 0].tolist() == [-1, -1, 1]
    assert rgba[:, 0, 15].tolist() == [1, 1, 1]
    assert (load_image(tmp_path / "la.png") == 1).all()
    assert (load_image(tmp_path / "palette.png") == 1).all()


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways: turn by 90 degrees clockwise
    upright = Image.new("RGB", (32, 16), (0, 0, 0))
    upright.paste((255, 255, 255), (0, 0, 8, 16))
    upright.save(tmp_path / "turned.png", exif=exif)
    found = load_image(tmp_path / "turned.png")
    assert found.shape == (3, 32, 16)
    assert (found[:, :7] == 1).all()
    assert (found[:, 9:] == -1).all()


def test_unreadable_files_are_named_counted_and_left_out(folder):
    (folder / "broken.png").write_bytes(b"this is no picture")
    (folder / "empty.jpg").write_bytes(b"")
    whole = (folder / "deep" / "b.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    images = ImageFolder(folder, 16)
    assert len(images) == 5
    assert sorted(path.name for path, _ in images.skipped) == ["broken.png", "empty.jpg", "pixel.png", "truncated.jpg"]
    reasons = {path.name: reason for path, reason in images.skipped}
    assert "broken.png" in reasons["broken.png"]
    assert "1x1 pixels, expected at least 8x8" in reasons["pixel.png"]


def test_a_file_that_fails_later_is_replaced_and_named(folder):
    images = ImageFolder(folder, 16, augment=False, cache_bytes=0)
    wanted = images[1]
    (folder / "a.png").unlink()
    with pytest.warns(UserWarning, match="skipped.*a.png"):
        found = images[0]
    assert torch.equal(found, wanted)
    assert [path.name for path, _ in images.skipped] == ["a.png"]


def test_folders_without_images_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image folder .*nowhere.* does not exist"):
        ImageFolder(tmp_path / "nowhere", 16)
    with pytest.raises(ValueError, match="holds no images of a format that Pillow reads"):
        ImageFolder(tmp_path, 16)
    (tmp_path / "broken.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"holds no readable image; 1 could not be read, the first: .*broken.png"):
        ImageFolder(tmp_path, 16)
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        ImageFolder(tmp_path, 0)


@pytest.mark.parametrize("size", [(9, 200), (200, 9), (8, 8), (64, 64)])
@pytest.mark.parametrize("augment", [False, True])
def test_small_and_narrow_pictures_are_enlarged(tmp_path, size, augment):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "small.png")
    crop = ImageFolder(tmp_path, 64, augment=augment)[0]
    assert crop.shape == (3, 64, 64)
    assert torch.allclose(crop, load_image(tmp_path / "small.png")[:, :1, :1].expand(3, 64, 64), atol=0.02)


def test_a_crop_is_a_function_of_seed_epoch_and_index(folder):
    one, other = ImageFolder(folder, 16, seed=3), ImageFolder(folder, 16, seed=3, cache_bytes=0)
    torch.manual_seed(1)
    first = one[7, 2]
    torch.manual_seed(2)
    assert torch.equal(other[7, 2], first)
    assert not torch.equal(one[8, 2], first)
    assert not torch.equal(ImageFolder(folder, 16, seed=4)[7, 2], first)
    assert torch.equal(one[2], one[0, 2])


def test_random_crops_flip_and_move_and_centre_crops_do_not(folder):
    crops = ImageFolder(folder, 16)
    reddest_side = {bool(crop[1, :, :4].mean() > crop[1, :, -4:].mean()) for crop in (crops[e, 0] for e in range(16))}
    assert reddest_side == {True, False}
    still = ImageFolder(folder, 16, augment=False)
    assert torch.equal(still[3, 1], still[9, 1])


def test_order_is_a_permutation_every_epoch_and_starts_anywhere():
    def first_batches(order, count):
        batches = iter(order)
        return [next(batches) for _ in range(count)]

    whole = first_batches(EndlessBatches(10, 4, seed=5), 10)
    keys = [key for batch in whole for key in batch]
    for epoch in range(4):
        assert sorted(index for e, index in keys if e == epoch) == list(range(10))
    assert [i for e, i in keys if e == 0] != [i for e, i in keys if e == 1]
    assert first_batches(EndlessBatches(10, 4, seed=5, first_batch=6), 4) == whole[6:]
    assert first_batches(EndlessBatches(10, 4, seed=6), 10) != whole
    ranks = [first_batches(EndlessBatches(10, 2, seed=5, rank=rank, ranks=2), 10) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole


def test_workers_do_not_change_the_batches(folder):
    def batches(workers):
        loader = DataLoader(ImageFolder(folder, 16), batch_sampler=EndlessBatches(5, 4), num_workers=workers)
        iterator = iter(loader)
        return [next(iterator) for _ in range(3)]

    for alone, shared in zip(batches(0), batches(2), strict=True):
        assert torch.equal(alone, shared)


def test_cache_stays_within_its_bound(folder):
    one_picture = 3 * 40 * 30
    images = ImageFolder(folder, 16, cache_bytes=2 * one_picture)
    for index in range(5):
        images[index]
    assert len(images.cache.pictures) == 2
    assert images.cache.bytes == 2 * one_picture


def test_bundled_photographs_hold_the_astronaut_out():
    photographs = bundled_photographs()
    assert len(photographs) == 6
    assert held_out_photograph().name == "astronaut.png"
    assert held_out_photograph() not in photographs.values()
    assert load_image(held_out_photograph()).shape == (3, 512, 512)
    images = ImageFolder(None, 64)
    assert len(images) == 6
    assert images.skipped == []


def test_without_scikit_image_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(data_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vqkernels\[demo\]'"):
        ImageFolder(None, 64)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_color_jitter_keeps_grey_grey_and_is_the_same_for_a_key(folder, strength: float):
    plain, changed = (ImageFolder(folder, 16, seed=3, color_jitter=each) for each in (0.0, strength))
    again = ImageFolder(folder, 16, seed=3, color_jitter=strength)
    for index in range(len(plain)):
        image = changed[4, index]
        assert torch.equal(image, again[4, index])
        assert image.min() >= -1
        assert image.max() <= 1
    assert any(not torch.equal(changed[4, index], plain[4, index]) for index in range(len(plain)))
    grey = torch.linspace(-0.4, 0.4, 16).expand(3, 16, 16)
    for seed in range(20):
        turned = _with_other_colours(grey, strength, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(turned[0], turned[1])
        torch.testing.assert_close(turned[0], turned[2])
    with pytest.raises(ValueError, match=r"color_jitter must lie in \[0, 1\], got 1.5"):
        ImageFolder(folder, 16, color_jitter=1.5)


def test_a_third_of_a_turn_moves_every_channel_to_the_next(monkeypatch):
    image = torch.linspace(-0.4, 0.4, 48).reshape(3, 4, 4)
    draws = torch.tensor([5 / 6, 0.5, 0.5], dtype=torch.float64)  # 2/3 of half a turn, nothing else
    monkeypatch.setattr(data_module.torch, "rand", lambda *_, **__: draws)
    turned = _with_other_colours(image, 1.0, torch.Generator())
    torch.testing.assert_close(turned, image[[2, 0, 1]])
