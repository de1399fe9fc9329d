"""LoRA's variants against PEFT's: values, gradients, and files both ways, in float64 where PEFT allows it."""

import warnings

import pytest
import torch
from torch import nn

from lora_edu.lora import load_adapter, lora_layers, remove_lora, save_adapter, trainable_parameters
from lora_edu.tuning import load_tuned, save_tuned
from lora_edu.tuning.variants import as_lora, dora, fold_dora, pissa

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_matrix import FAMILIES  # noqa: E402 (needs both)
from safetensors.torch import load_file  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own: fan_in_fan_out, tied weights

TARGETS = {
    "llama": ["q_proj", "down_proj", "embed_tokens"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "output.dense"],
}


def base(family):
    return FAMILIES[family].make().double().eval()


def outputs(model, family):
    return model(**FAMILIES[family].inputs()).logits


def distance(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


def plain(name):
    """A parameter's name in PEFT's model as it is in the file."""
    return name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")


def randomise(model):
    """Whatever is trained gets numbers that depend on its name alone, near where it starts."""
    for name, each in sorted(model.named_parameters()):
        if each.requires_grad:
            generator = torch.Generator().manual_seed(sum(map(ord, plain(name))))
            each.data += 0.2 * torch.randn(each.shape, generator=generator).to(each)
    return model


def theirs_with(family, config):
    torch.manual_seed(7)
    return randomise(peft.get_peft_model(base(family), config).double().eval())


def opened_in_peft(family, folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base(family), folder, is_trainable=True).double().eval()
    assert not [each for each in caught if "missing" in str(each.message) or "nexpected" in str(each.message)]
    return model


def gradients_as_files(mine, theirs, family, tmp_path):
    """Every gradient of the two models under the name that its parameter has in a file."""
    found = []
    for model, save in ((mine, save_tuned), (theirs, lambda model, folder: model.save_pretrained(folder))):
        outputs(model, family).square().sum().backward()
        for each in trainable_parameters(model):
            each.data, each.grad = each.grad, None
        folder = tmp_path / f"gradients{len(found)}"
        save(model, folder)
        found.append(load_file(folder / "adapter_model.safetensors"))
    return found


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("stabilised", [False, True])
def test_dora_is_pefts_both_ways(family, stabilised, tmp_path):
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_dora=True,
        use_rslora=stabilised,
        target_modules=TARGETS[family],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
    )
    theirs = theirs_with(family, config)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = load_tuned(base(family), tmp_path / "theirs")
    expected = outputs(theirs, family).detach()
    assert distance(outputs(mine, family), expected) < 1e-12
    assert distance(outputs(base(family), family), expected) > 1e-3
    save_tuned(mine, tmp_path / "ours")
    again = opened_in_peft(family, tmp_path / "ours")
    assert distance(outputs(again, family), expected) < 1e-12
    own, other = gradients_as_files(mine, again, family, tmp_path)
    for key, gradient in own.items():
        assert distance(gradient, other[key]) < 1e-10, key
    files = [load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs")]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    mine = load_tuned(base(family), tmp_path / "theirs")
    assert distance(outputs(fold_dora(mine), family), outputs(theirs.merge_and_unload(), family)) < 1e-12


def test_dora_starts_where_pefts_does():
    mine = dora(base("llama"), 3, 5, TARGETS["llama"])
    theirs = peft.get_peft_model(
        base("llama"), peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=TARGETS["llama"])
    )
    for name, layer in mine.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding) and hasattr(layer, "dora"):
            magnitude = theirs.base_model.model.get_submodule(name).lora_magnitude_vector["default"].weight
            assert distance(layer.dora.magnitude, magnitude.double()) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("stabilised", [False, True])
def test_pissa_starts_and_is_converted_as_in_peft(family, stabilised, tmp_path):
    """PEFT takes no float64 for PiSSA: both start in float32, move alike and become LoRA of twice the rank."""
    targets = ["q_proj", "down_proj"] if family == "llama" else ["c_attn", "c_fc"]
    options = {"r": 3, "lora_alpha": 6, "use_rslora": stabilised, "target_modules": targets}
    theirs = peft.get_peft_model(
        base(family).float(), peft.LoraConfig(init_lora_weights="pissa", **options)
    ).eval()
    mine = pissa(base(family).float(), 3, 6, targets, rank_stabilised=stabilised)
    for name, layer in lora_layers(mine).items():
        other = theirs.base_model.model.get_submodule(name)
        assert distance(layer.weight, other.base_layer.weight) < 1e-5
        assert distance(layer.delta_weight(), other.get_delta_weight("default")) < 1e-5
        sign = torch.sign((layer.lora_A * other.lora_A["default"].weight).sum(1))
        assert distance(sign[:, None] * layer.lora_A, other.lora_A["default"].weight) < 1e-4
        assert distance(sign * layer.lora_B, other.lora_B["default"].weight) < 1e-4
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    for model in (theirs, mine):
        for layer in model.modules():
            if hasattr(layer, "lora_A"):
                A, B = (getattr(layer, each) for each in ("lora_A", "lora_B"))
                A, B = (A, B) if isinstance(A, nn.Parameter) else (A["default"].weight, B["default"].weight)
                A.data, B.data = 1.1 * A.data, 0.7 * B.data
    expected = outputs(theirs, family).detach()
    assert distance(outputs(mine, family), expected) < 1e-4
    theirs.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    opened = load_adapter(base(family).float(), tmp_path / "converted")
    assert distance(outputs(opened, family), expected) < 1e-5
    save_adapter(as_lora(mine), tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(family).float(), tmp_path / "ours").eval()
    assert distance(outputs(again, family), outputs(mine, family)) < 1e-5
    for name, layer in lora_layers(opened).items():
        other = lora_layers(mine)[name]
        assert layer.rank == other.rank == 6 and abs(layer.alpha / other.alpha - 1) < 1e-12
        assert distance(other.delta_weight(), layer.delta_weight()) < 1e-4
    remove_lora(mine)
    assert torch.equal(outputs(mine, family), outputs(base(family).float(), family))
