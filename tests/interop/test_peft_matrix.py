"""Adapters of every family of models, and of one model with every setting: as peft_matrix.py says, in its small form.

`python tests/interop/peft_matrix.py` does all families with all settings.
"""

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
import peft_matrix as matrix

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def check(family: str, setting: str) -> matrix.Outcome | str:
    ((_, _, found),) = matrix.cases([family], [setting])
    return found


@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_every_family_is_measured_and_loads(family):
    found = check(family, "plain")
    assert not isinstance(found, str), found
    assert not found.fault and found.measured == found.layers > 0 and not found.loaded


@pytest.mark.parametrize(
    "setting", [each for each in matrix.SETTINGS if each not in ("experts", "experts, rslora")]
)
def test_every_setting_is_measured_or_refused_by_name(setting):
    family = "vit" if setting == "convolution" else "llama"
    found = check(family, setting)
    assert not isinstance(found, str), found
    assert not found.fault


@pytest.mark.parametrize("setting", ["experts", "experts, rslora", "all-linear"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_stacked_experts_have_the_rank_and_alpha_that_peft_gave_them(family, setting):
    """all-linear fuses two parameters of each expert, with twice the rank for them."""
    found = check(family, setting)
    assert not isinstance(found, str) and not found.fault and found.measured == found.layers > 0


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("t5", "embedding"),
        ("gpt2", "embedding"),
        ("bert", "modules_to_save"),
        ("opt", "bias all"),
        ("wav2vec2", "convolution"),
    ],
)
def test_what_is_of_its_own_kind(family, setting):
    """A shared table, Conv1D, a classifier, biases everywhere, a convolution of one axis."""
    found = check(family, setting)
    assert not isinstance(found, str) and not found.fault
