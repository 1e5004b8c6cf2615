"""The audit counts what is wrong by construction, leaves ties alone, and reads what users have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from vqkernels.models import VQVAE

from vqkernels.audit import EUCLIDEAN_FORMS, FORMS, Form, audit, verdict
from vqkernels.cli.main import main
from vqkernels.nn.normalize import l2_normalize
from vqkernels.testing import wrong_codes

STEP = 2.0**-10  # of the mantissas: one that TF32 and fp16 still hold and bf16 does not


def _pair(step: float, near: int, far: int) -> tuple[Tensor, Tensor]:
    """Codes (1, 0) and (1 + step, 0); so many tokens on the first and on the second."""
    codebook = torch.tensor([[1.0, 0.0], [1.0 + step, 0.0]])
    return codebook.repeat_interleave(torch.tensor([near, far]), 0), codebook


def _wrong(x: Tensor, codebook: Tensor, metric: str = "euclidean") -> dict[str, int]:
    return {form.name: form.wrong for form in audit(x, codebook, metric=metric).forms}


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------ known answers


def test_bf16_gets_wrong_what_its_mantissa_cannot_hold():
    """1 + 2^-10 is 1 in bf16, so every token on the second code goes to the first, at a distance of 2^-10."""
    x, codebook = _pair(STEP, 30, 12)
    result = audit(x, codebook)
    forms = {form.name: form for form in result.forms}
    bf16 = forms["bf16 autocast"]
    assert bf16.wrong == 12
    assert bf16.mse_increase == pytest.approx(12 * STEP**2 / x.numel())
    assert bf16.worst_excess == STEP**2
    assert bf16.worst_token == 30
    assert (bf16.used, bf16.perplexity) == (1, 1.0)
    assert forms["TF32, rounded"].wrong == forms["TF32, cut off"].wrong == 0
    assert all(form.wrong == 0 for form in result.forms if not form.half)
    assert (result.mse, result.used) == (0.0, 2)
    assert "bf16 autocast gets 12 of 42 codes wrong (28.57%); fp32 gets none wrong here." in verdict(result)


def test_tf32_gets_wrong_what_its_mantissa_cannot_hold():
    """1 + 2^-11 is 1 in TF32. Cut off, 1 + 1.5 x 2^-10 becomes 1 + 2^-10; to the nearest even it becomes 1 + 2^-9."""
    wrong = _wrong(*_pair(STEP / 2, 5, 7))
    assert wrong["TF32, rounded"] == wrong["TF32, cut off"] == wrong["bf16 autocast"] == 7
    assert wrong["fp32, expanded"] == wrong["fp32, torch.cdist"] == wrong["fp32, without x^2"] == 0
    three = torch.tensor([[1.0], [1.0 + STEP], [1.0 + 1.5 * STEP], [1.0 + 2 * STEP]])
    seen = {form.name: form.search(three, three) for form in EUCLIDEAN_FORMS}
    assert seen["fp32, expanded"].tolist() == [0, 1, 2, 3]
    assert seen["TF32, cut off"].tolist() != seen["TF32, rounded"].tolist()


def test_ties_are_not_wrong():
    codebook = _randn(20, 8, seed=0).repeat(3, 1)
    backwards = Form("last of ties", "", lambda x, c: len(c) - 1 - torch.cdist(x, c.flip(0)).argmin(1))
    result = audit(_randn(50, 8, seed=1), codebook, forms=(backwards,))
    assert result.forms[0].wrong == 0
    mirrored = torch.tensor([[1.0, 0.5], [-1.0, 0.5]])  # tied over the real numbers, though no row repeats
    assert audit(torch.tensor([[0.0, 3.0]]), mirrored, forms=(backwards,)).forms[0].wrong == 0


def _recorded(form: Form, seen: list[Tensor]) -> Form:
    def search(x: Tensor, codebook: Tensor) -> Tensor:
        seen.append(form.search(x, codebook))
        return seen[-1]

    return Form(form.name, form.formula, search, form.half)


@pytest.mark.parametrize("metric", list(FORMS))
def test_counts_agree_with_exact_arithmetic(monkeypatch, metric: str):
    """In blocks of tokens and of scores; near-duplicates a rounding apart, so that float64 cannot tell every pair."""
    monkeypatch.setattr("vqkernels.audit.BLOCK_ENTRIES", 400)
    monkeypatch.setattr("vqkernels.audit.BLOCK_SCORES", 5000)
    x, codebook = _randn(90, 6, seed=2), _randn(300, 6, seed=3)
    codebook[200:] = codebook[:100] * (1 + 2.0**-22)
    seen: dict[str, list[Tensor]] = {form.name: [] for form in FORMS[metric]}
    result = audit(x, codebook, metric=metric, forms=tuple(_recorded(f, seen[f.name]) for f in FORMS[metric]))
    if metric == "cosine":
        x, codebook = l2_normalize(x), l2_normalize(codebook)
    truth = torch.cdist(x.double(), codebook.double()).amin(1).square().mean() / 6
    assert result.mse == pytest.approx(truth.item(), rel=1e-5)
    for form in result.forms:
        codes = torch.cat(seen[form.name])
        assert len(seen[form.name]) > 4
        assert form.wrong == int(wrong_codes(codes, x, codebook, metric).sum()), form.name
        assert form.used == len(codes.unique())
    assert result.forms[-1].wrong > 5
    assert result.forms[-1].mse_increase > 0


def test_the_usual_start_of_a_codebook_is_where_fp32_fails_too():
    codebook = (torch.rand(4096, 64, generator=torch.Generator().manual_seed(4)) * 2 - 1) / 4096
    wrong = _wrong(_randn(300, 64, seed=5), codebook)
    assert wrong["fp32, torch.cdist"] > 0
    assert wrong["fp32, without x^2"] == 0


def test_tokens_that_are_not_finite_are_left_out_and_counted():
    x, codebook = _pair(STEP, 3, 4)
    x[1, 0], x[5, 1] = float("nan"), float("inf")
    result = audit(x, codebook)
    assert (result.non_finite, result.tokens) == (2, 5)
    assert {form.name: form.wrong for form in result.forms}["bf16 autocast"] == 3
    with pytest.raises(ValueError, match="expected tokens without NaN"):
        audit(torch.full((3, 2), float("nan")), codebook)
    with pytest.raises(ValueError, match="codebook"):
        audit(x, codebook * float("inf"))
    with pytest.raises(ValueError, match=r"x: expected \[N, D\]"):
        audit(x[:, :1], codebook)


# ------------------------------------------------------------------------------------------ command


def _audited(words: list[str], folder: Path, capsys) -> dict:
    assert main(["audit", *words, "--device", "cpu", "--json", str(folder / "out" / "audit.json")]) == 0
    document = json.loads((folder / "out" / "audit.json").read_text())
    shown = capsys.readouterr().out
    assert document["verdict"] in " ".join(shown.split())
    assert all(form["name"] in shown for form in document["forms"])
    return document


def _bf16(document: dict) -> int:
    return {form["name"]: form["wrong"] for form in document["forms"]}["bf16 autocast"]


def test_arrays_in_either_layout(tmp_path, capsys):
    x, codebook = _pair(STEP, 12, 12)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "c.npy", codebook.numpy())
    maps = x.view(2, 3, 4, 2).permute(0, 3, 1, 2)  # [B, D, H, W]
    np.save(tmp_path / "maps.npy", maps.numpy())
    document = _audited([str(tmp_path / "x.npy"), "--codebook", str(tmp_path / "c.npy")], tmp_path, capsys)
    assert (document["tokens"], document["codes"], document["dim"], _bf16(document)) == (24, 2, 2, 12)
    words = [str(tmp_path / "maps.npy"), "--codebook", str(tmp_path / "c.npy"), "--channels", "first"]
    assert _bf16(_audited(words, tmp_path, capsys)) == 12
    words = [str(tmp_path / "c.npy"), "--latents", str(tmp_path / "x.npy"), "--tokens", "6"]
    assert _audited(words, tmp_path, capsys)["tokens"] == 6


def test_checkpoints_of_other_projects(tmp_path, capsys):
    x, codebook = _pair(STEP, 5, 9)
    np.save(tmp_path / "x.npy", x.numpy())
    state = {"encoder.weight": torch.zeros(7, 7), "quantize.embedding.weight": codebook, "decoder.bias": torch.zeros(3)}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "a.pt")
    save_file(
        {"vq._codebook.embed": codebook[None].clone(), "vq._codebook.embed_avg": x[None, :2].clone()},
        tmp_path / "b.safetensors",
    )
    torch.save({"embed": codebook.T.clone(), "cluster_size": torch.ones(2)}, tmp_path / "c.pth")
    for name in ("a.pt", "b.safetensors"):
        document = _audited([str(tmp_path / name), "--latents", str(tmp_path / "x.npy")], tmp_path, capsys)
        assert _bf16(document) == 9
    wide = torch.cat([codebook, codebook + 9])
    torch.save({"embed": wide.T.clone()}, tmp_path / "c.pth")
    assert _bf16(_audited([str(tmp_path / "c.pth"), "--latents", str(tmp_path / "x.npy")], tmp_path, capsys)) == 9


def test_a_model_with_images(tmp_path, capsys):
    from PIL import Image

    torch.manual_seed(0)
    options = {"codebook_size": 16, "dead_code_threshold": 0.0, "metric": "cosine"}
    shape = {"channels": 8, "channel_multipliers": [1, 2], "blocks": 1, "latent_channels": 4}
    model = VQVAE({**shape, "quantizer": options}).eval()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    for number, values in enumerate(pixels):
        Image.fromarray(values).save(tmp_path / "images" / f"{number}.png")
    document = _audited([str(tmp_path / "model"), "--images", str(tmp_path / "images")], tmp_path, capsys)
    assert document["metric"] == "cosine"
    assert document["tokens"] == 2 * 16 * 24 // model.factor**2
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    assert document["used"] == len(model.encode(images).unique())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.npy"], "expected one of --codebook FILE"),
        (["nowhere.npy", "--codebook", "c.npy"], "nowhere.npy: no such file"),
        (["x.npy", "--codebook", "x.txt"], "expected a file that ends in .npy"),
        (["x.npy", "--codebook", "other.npy"], "expected [K, 2] to match the latents, got [4, 3]"),
        (["two.pt", "--latents", "x.npy"], "found a.codebook [2, 2], b.codebook [2, 2]; name it with --key"),
        (["two.pt", "--latents", "x.npy", "--key", "c"], "expected the name of a tensor in two.pt, got 'c'"),
        (["pickled.pt", "--latents", "x.npy"], "refused, nothing of it was run"),
        (["x.npy", "--codebook", "c.npy", "--tokens", "0"], "--tokens: expected at least 1"),
        (["x.npy", "--images", "folder"], "expected a folder with a model"),
        (["x.npy", "--codebook", "c.npy", "--channels", "first"], "expected latents [B, D, ...]"),
        (["."], "config.json"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, monkeypatch, capsys, words: list[str], message: str):
    monkeypatch.chdir(tmp_path)
    x, codebook = _pair(STEP, 3, 3)
    np.save("x.npy", x.numpy())
    np.save("c.npy", codebook.numpy())
    np.save("other.npy", np.zeros((4, 3), dtype=np.float32))
    Path("x.txt").write_text("1 2")
    torch.save({"a": {"codebook": codebook}, "b": {"codebook": codebook}}, "two.pt")
    torch.save({"config": Form("", "", max)}, "pickled.pt")
    assert main(["audit", *words]) == 2
    assert message in capsys.readouterr().err
