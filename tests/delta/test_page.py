"""The page of a report: one file, every number as measured, small, and nothing in it that a file's names could run."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_edu import cli
from lora_edu.delta import compare, page
from lora_edu.delta.measure import rank_grid


def write_pair(folder, count=3, sides=(40, 30), dtype=torch.float32):
    torch.manual_seed(0)
    before = {f"model.layers.{i}.q.weight": torch.randn(sides).to(dtype) for i in range(count)}
    update = lambda: 0.1 * torch.randn(sides[0], 3) @ torch.randn(3, sides[1])
    after = {name: (W.float() + update()).to(dtype) for name, W in before.items()}
    save_file(before, folder / "b.safetensors")
    save_file(after, folder / "a.safetensors")
    return folder / "b.safetensors", folder / "a.safetensors"


def data_of(text: str) -> dict:
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    )


def test_the_page_has_every_spectrum_as_measured(tmp_path, capsys):
    pair = write_pair(tmp_path, dtype=torch.bfloat16)
    assert cli.main(["delta", *map(str, pair), "--html", str(tmp_path / "page.html"), "--quiet"]) == 0
    assert "page.html has " in capsys.readouterr().err
    found = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    figures = compare(*pair).figures
    assert [each["name"] for each in found["matrices"]] == [name.removesuffix(".weight") for name in figures]
    for row, each in zip(found["matrices"], figures.values(), strict=True):
        ranks = [k for k in found["ranks"] if k < row["last"]] + [row["last"]]
        assert ranks == [k for k, _, _ in each.spectrum] == rank_grid(30)
        assert row["sigma"] == pytest.approx([s for _, s, _ in each.spectrum], rel=1e-3)
        assert row["energy"] == pytest.approx([e for _, _, e in each.spectrum], rel=1e-4)
        assert row["floor"] == pytest.approx(each.edge, rel=1e-3) and row["above"] == each.above
        assert sum(s > row["floor"] for s in row["sigma"]) == each.above


def test_the_spectrum_is_that_of_the_difference(tmp_path):
    pair = write_pair(tmp_path, count=1)
    (each,) = compare(*pair).figures.values()
    (old,), (new,) = (load_file(path).values() for path in pair)
    S = torch.linalg.svdvals((new - old).double())
    assert [s for _, s, _ in each.spectrum[:3]] == pytest.approx(S[:3].tolist(), rel=1e-4)
    shares = S.square().cumsum(0) / S.square().sum()
    assert [e for _, _, e in each.spectrum] == pytest.approx(shares.tolist()[: len(each.spectrum)], rel=1e-4)


@pytest.mark.parametrize("most", [1, 2, 31, 32, 33, 36, 40, 63, 64, 65, 300, 4096])
def test_the_grid_has_halves_and_quarters_of_usual_ranks(most):
    ranks = rank_grid(most)
    assert ranks[0] == 1 and ranks[-1] == most and ranks == sorted(set(ranks)) and len(ranks) <= 32 + 8 * 7
    assert {2**k for k in range(13) if 2**k <= most} <= set(ranks)


def test_it_is_one_file_that_fetches_nothing(tmp_path):
    text = page.of_comparison(compare(*write_pair(tmp_path))).decode()
    assert "default-src 'none'" in text and not re.findall(r"https?://(?!www\.w3\.org)", text)
    assert not re.findall(r"<(?:link|img|iframe|script src)", text)


def test_two_hundred_matrices_of_full_size_stay_below_a_megabyte():
    torch.manual_seed(0)
    entries = []
    for number in range(200):
        S = torch.rand(4096, dtype=torch.float64).sort(descending=True).values
        shares = S.square().cumsum(0) / S.square().sum()
        spectrum = [(k, float(S[k - 1]), float(shares[k - 1])) for k in rank_grid(4096)]
        name = f"model.layers.{number}.self_attn.q_proj"
        entries.append(page.Entry(name, "model.layers.*.q", (4096, 4096), 1, 3.0, spectrum, 0.5, 7, 99, ""))
    assert len(page.page("ΔW", ["words"], entries, "floor", "are larger")) < 600_000


def test_nothing_to_show_is_said(tmp_path, capsys):
    pair = write_pair(tmp_path)
    assert cli.main(["delta", str(pair[0]), str(pair[0]), "--html", str(tmp_path / "p.html"), "--quiet"]) == 0
    assert "p.html not written: no matrix has a spectrum" in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()
    with pytest.raises(ValueError, match="no matrix was measured"):
        page.page("ΔW", [], [], "floor", "are larger")
