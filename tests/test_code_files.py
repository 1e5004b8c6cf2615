"""Codes on disk: exact round trip, small types, and refusal of what does not belong to the model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from vqkernels.models import VQVAE, CodesWriter, QuantizerConfig, VQVAEConfig, open_codes
from vqkernels.models.code_files import code_dtype


def make_model(seed: int = 0, codes: int = 32) -> VQVAE:
    torch.manual_seed(seed)
    return VQVAE(
        VQVAEConfig(
            patch_size=4,
            channels=8,
            channel_multipliers=[1],
            blocks=1,
            latent_channels=4,
            quantizer=QuantizerConfig(codebook_size=codes),
        )
    ).eval()


@pytest.fixture
def model() -> VQVAE:
    return make_model()


@pytest.fixture
def written(model, tmp_path):
    """Codes of five images in batches of 2, 2, 1."""
    images = torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = model.encode(images)
    with CodesWriter(tmp_path / "codes", model) as writer:
        for first in range(0, 5, 2):
            names = [f"sub/{number}.png" for number in range(5)][first : first + 2]
            writer.append(codes[first : first + 2], names)
    return tmp_path / "codes", codes


def test_round_trip_is_exact_and_memory_mapped(written, model):
    folder, codes = written
    opened = open_codes(folder, model)
    assert isinstance(opened.codes, np.memmap)
    assert not opened.codes.flags.writeable
    assert opened.codes.dtype == np.uint16
    assert np.array_equal(opened.codes, codes.numpy())
    assert len(opened) == 5
    assert opened.meta.shape == [5, 4, 6]
    assert opened.meta.files == [f"sub/{number}.png" for number in range(5)]
    assert (opened.meta.codebook_size, opened.meta.factor) == (32, 4)
    assert opened.meta.fingerprint == model.fingerprint()
    images = model.decode(torch.from_numpy(opened.codes[1:3].astype(np.int64)))
    assert torch.equal(images, model.decode(codes[1:3]))
    assert np.array_equal(np.load(folder / "codes.npy"), codes.numpy())
    assert open_codes(folder / "codes.npy").meta == opened.meta
    assert sorted(path.name for path in folder.iterdir()) == ["codes.npy", "meta.json"]


@pytest.mark.parametrize(("size", "dtype"), [(2, "uint16"), (65536, "uint16"), (65537, "int32"), (2**18, "int32")])
def test_the_smallest_type_that_holds_all_codes(size, dtype):
    assert code_dtype(size).name == dtype


def test_large_codebooks_are_written_as_int32(tmp_path):
    model = make_model(codes=70_000)
    with CodesWriter(tmp_path, model) as writer:
        writer.append(torch.tensor([[[69_999, 0]]]), ["a.png"])
    opened = open_codes(tmp_path, model)
    assert opened.codes.dtype == np.int32
    assert opened.codes.tolist() == [[[69_999, 0]]]


def test_codes_of_another_model_are_refused_by_name(written):
    folder, _ = written
    other = make_model(seed=1)
    with pytest.raises(ValueError, match=rf"made by model [0-9a-f]{{32}}, and this is model {other.fingerprint()}"):
        open_codes(folder, other)
    assert len(open_codes(folder)) == 5


def test_codes_out_of_range_are_refused_on_writing_and_on_reading(written, model, tmp_path):
    with (
        pytest.raises(ValueError, match=r"codes of 'bad.png' must lie in \[0, 31\], got -1 to 3"),
        CodesWriter(tmp_path / "new", model) as writer,
    ):
        writer.append(torch.tensor([[[0, 1]], [[-1, 3]]]), ["good.png", "bad.png"])
    assert list((tmp_path / "new").iterdir()) == []
    folder, _ = written
    edited = np.load(folder / "codes.npy")
    edited[4, 3, 5] = 32
    np.save(folder / "codes.npy", edited)
    with pytest.raises(ValueError, match=r"codes.npy: codes must lie in \[0, 31\], got \d+ to 32"):
        open_codes(folder, model)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda f: (f / "meta.json").unlink(), FileNotFoundError, "holds no meta.json"),
        (lambda f: (f / "codes.npy").unlink(), FileNotFoundError, "holds no codes.npy"),
        (lambda f: (f / "meta.json").write_text("{"), ValueError, "meta.json cannot be read"),
        (lambda f: (f / "meta.json").write_text('{"format": "other"}'), ValueError, "format must be"),
        (lambda f: (f / "codes.npy").write_bytes((f / "codes.npy").read_bytes()[:-9]), ValueError, "is truncated"),
        (lambda f: np.save(f / "codes.npy", np.zeros((5, 4, 6), np.int64)), ValueError, "must be uint16"),
        (lambda f: np.save(f / "codes.npy", np.zeros((5, 4, 5), np.uint16)), ValueError, r"must be uint16 \[5, 4, 6\]"),
    ],
)
def test_damaged_files_are_refused_by_name(written, model, damage, kind, message):
    folder, _ = written
    damage(folder)
    with pytest.raises(kind, match=message):
        open_codes(folder, model)


def test_an_interrupted_writer_leaves_the_old_codes_alone(written, model):
    folder, codes = written

    def interrupted() -> None:
        with CodesWriter(folder, model) as writer:
            writer.append(codes[:1], ["x.png"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert np.array_equal(open_codes(folder, model).codes, codes.numpy())
    assert sorted(path.name for path in folder.iterdir()) == ["codes.npy", "meta.json"]


def test_what_does_not_fit_together_is_refused(model, tmp_path):
    with CodesWriter(tmp_path, model) as writer:
        writer.append(torch.zeros(1, 2, 3, dtype=torch.long), ["a.png"])
        with pytest.raises(ValueError, match=r"grid of \(2, 3\) like those before, got \(3, 2\)"):
            writer.append(torch.zeros(1, 3, 2, dtype=torch.long), ["b.png"])
        with pytest.raises(ValueError, match=r"codes must be \[2, h, w\] for 2 files, got \[1, 2, 3\]"):
            writer.append(torch.zeros(1, 2, 3, dtype=torch.long), ["b.png", "c.png"])
    assert json.loads((tmp_path / "meta.json").read_text())["shape"] == [1, 2, 3]
    with pytest.raises(ValueError, match="no codes were written"), CodesWriter(tmp_path / "none", model):
        pass
