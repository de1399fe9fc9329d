"""LoRA's variants against PEFT's: values, gradients, and files both ways, in float64 where PEFT allows it."""

import warnings

import pytest
import torch
from torch import nn

from lora_edu.lora import load_adapter, lora_layers, remove_lora, save_adapter, trainable_parameters
from lora_edu.tuning import load_tuned, save_tuned
from lora_edu.tuning.variants import (
    RankBudget,
    as_lora,
    dora,
    first_gradient,
    fold_adalora,
    fold_dora,
    fold_vera,
    lora_ga,
    lora_plus,
    orthogonality,
    pissa,
    scaled_steps,
    vera,
)

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer  # noqa: E402
from peft.tuners.lora.config import LoraGAConfig  # noqa: E402
from peft.tuners.lora.loraga import preprocess_loraga  # noqa: E402
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
    model = peft.get_peft_model(base(family), config).double().eval()
    for name, each in model.named_parameters():
        if (
            "ranknum" in name
        ):  # the divisor of AdaLoRA's scaling, which PEFT 0.21 leaves trainable and doesn't save
            each.requires_grad_(False)
    return randomise(model)


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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pefts_own_file_of_pissa_is_opened(family, tmp_path):
    """The file has A and B alone; W_res comes from the W that the model has, as when PEFT opens it."""
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        init_lora_weights="pissa",
        target_modules=LINEAR[family],
        rank_pattern={r".*1\..*": 2},
    )
    theirs = randomise(peft.get_peft_model(base(family).float(), config).eval())
    theirs.save_pretrained(tmp_path)
    expected = outputs(theirs, family).detach()
    mine = load_tuned(base(family).float(), tmp_path)
    assert distance(outputs(mine, family), expected) < 1e-4
    again = peft.PeftModel.from_pretrained(base(family).float(), tmp_path).eval()
    assert distance(outputs(again, family), expected) < 1e-4
    save_adapter(as_lora(mine), tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(base(family).float(), tmp_path / "lora").eval()
    assert distance(outputs(again, family), expected) < 1e-4
    assert distance(outputs(base(family).float(), family), expected) > 1e-2


LINEAR = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def test_lora_ga_has_pefts_gradient_and_its_two_subspaces():
    """PEFT's stable scale leaves A alone and multiplies B by the singular values: other lengths, same directions."""
    loss = lambda model, inputs, targets: model(input_ids=inputs).logits.square().mean()
    ids = FAMILIES["llama"].inputs()["input_ids"]
    batches = [(ids, None), (ids.flip(1), None)]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=LINEAR["llama"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    model = base("llama").float()
    preprocess_loraga(model, config, lambda: [loss(model, *each).backward() for each in batches])
    gradients = first_gradient(base("llama").float(), batches, LINEAR["llama"], loss)
    for name, gradient in gradients.items():
        assert distance(gradient, model.get_submodule(name)._peft_loraga_grad) < 1e-4
    theirs = peft.get_peft_model(model, config)
    mine = lora_ga(base("llama").float(), gradients, 4, 6)
    for name, layer in lora_layers(mine).items():
        other = theirs.base_model.model.get_submodule(name)
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        c = layer.lora_B.shape[0] ** 0.25 / 4
        S = torch.linalg.svdvals(gradients[name])
        assert layer.scaling == other.scaling["default"]
        sign = torch.sign((layer.lora_A * A).sum(1, keepdim=True))
        assert distance(sign * layer.lora_A, c * A) < 1e-2
        sign = torch.sign((layer.lora_B * B).sum(0))
        assert distance(sign * layer.lora_B * S[4:8], B) < 1e-2


@pytest.mark.parametrize("family", LINEAR)
@pytest.mark.parametrize("stored", [True, False])
def test_vera_is_pefts_both_ways(family, stored, tmp_path):
    config = peft.VeraConfig(
        r=5, target_modules=LINEAR[family], projection_prng_key=11, save_projection=stored
    )
    theirs = theirs_with(family, config)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = load_tuned(base(family), tmp_path / "theirs")
    expected = outputs(theirs, family).detach()
    assert distance(outputs(mine, family), expected) < 1e-12
    assert distance(outputs(base(family), family), expected) > 1e-3
    fresh = vera(base(family), 5, LINEAR[family], seed=11)
    parts = {name: each.vera for name, each in mine.named_modules() if hasattr(each, "vera")}
    for name, part in parts.items():
        assert torch.equal(fresh.get_submodule(name).vera.shared.A, part.shared.A)
        assert torch.equal(fresh.get_submodule(name).vera.shared.B, part.shared.B)
    save_tuned(mine, tmp_path / "ours")
    again = opened_in_peft(family, tmp_path / "ours")
    assert distance(outputs(again, family), expected) < 1e-12
    own, other = gradients_as_files(mine, again, family, tmp_path)
    for key, gradient in own.items():
        assert distance(gradient, other[key]) < 1e-10, key
    assert sum(each.numel() for key, each in own.items() if "lambda" in key) == sum(
        5 + len(part.b) for part in parts.values()
    )
    mine = load_tuned(base(family), tmp_path / "theirs")
    assert distance(outputs(fold_vera(mine), family), outputs(theirs.merge_and_unload(), family)) < 1e-12


def adalora_pair(family, tmp_path):
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=5, total_step=8, tinit=1, tfinal=2, target_modules=LINEAR[family]
    )
    theirs = theirs_with(family, config)
    theirs.save_pretrained(tmp_path / "start")
    return theirs, load_tuned(base(family), tmp_path / "start")


@pytest.mark.parametrize("family", LINEAR)
def test_adalora_is_pefts_both_ways(family, tmp_path):
    theirs, mine = adalora_pair(family, tmp_path)
    expected = outputs(theirs, family).detach()
    assert distance(outputs(mine, family), expected) < 1e-12
    assert distance(outputs(base(family), family), expected) > 1e-3
    inputs = FAMILIES[family].inputs()
    labelled = lambda model: model(**inputs, labels=inputs["input_ids"]).loss
    added = labelled(theirs.base_model) - labelled(mine)  # transformers makes its loss in float32
    assert abs(added - 0.5 * orthogonality(mine)) < 1e-5
    save_tuned(mine, tmp_path / "ours")
    again = opened_in_peft(family, tmp_path / "ours")
    assert distance(outputs(again, family), expected) < 1e-12
    own, other = gradients_as_files(mine, again, family, tmp_path)
    assert own.keys() == other.keys()
    for key, gradient in own.items():
        assert distance(gradient, other[key]) < 1e-10, key
    mine = load_tuned(base(family), tmp_path / "start")
    assert distance(outputs(fold_adalora(mine), family), outputs(theirs.merge_and_unload(), family)) < 1e-12


def test_adalora_takes_the_same_singular_values_away_as_peft(tmp_path):
    theirs, mine = adalora_pair("llama", tmp_path)
    budget = RankBudget(mine, 2, 8, start=1, end=2)
    optimizers = [torch.optim.SGD(trainable_parameters(model), 0.01) for model in (mine, theirs)]
    for step in range(8):
        for model, optimizer in zip((mine, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            outputs(model, "llama").square().mean().backward()
            optimizer.step()
        budget.after_step(step)
        theirs.base_model.update_and_allocate(step)
        for name, layer in budget.layers.items():
            other = theirs.base_model.model.get_submodule(name).lora_E["default"]
            assert torch.equal(layer.singular == 0, other == 0), (step, name)
            assert (layer.singular - other).abs().max() < 1e-12
        if step > 1:
            left = sum(int((layer.singular != 0).sum()) for layer in budget.layers.values())
            assert left == budget.budget(step) or step > 6
    assert sum(budget.ranks().values()) == 2 * len(budget.layers)
    expected = outputs(theirs, "llama").detach()
    theirs.save_pretrained(tmp_path / "allocated")
    opened = load_tuned(base("llama"), tmp_path / "allocated")
    assert distance(outputs(opened, "llama"), expected) < 1e-12
    ranks = {
        name: len(each.adalora.singular) for name, each in opened.named_modules() if hasattr(each, "adalora")
    }
    assert ranks == budget.ranks()
    save_tuned(opened, tmp_path / "ours")
    assert distance(outputs(opened_in_peft("llama", tmp_path / "ours"), "llama"), expected) < 1e-12


def lora_pair(tmp_path):
    theirs = theirs_with("llama", peft.LoraConfig(r=3, lora_alpha=5, target_modules=LINEAR["llama"]))
    theirs.save_pretrained(tmp_path / "lora")
    return theirs, load_adapter(base("llama"), tmp_path / "lora")


def three_steps(model, optimizer):
    for _ in range(3):
        optimizer.zero_grad()
        outputs(model, "llama").square().mean().backward()
        optimizer.step()
    return outputs(model, "llama").detach()


def test_lora_plus_steps_as_pefts(tmp_path):
    theirs, mine = lora_pair(tmp_path)
    before = outputs(mine, "llama").detach()
    other = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0)
    own = torch.optim.AdamW(lora_plus(mine, 1e-2, 8.0), weight_decay=0.0)
    one, two = three_steps(mine, own), three_steps(theirs, other)
    assert distance(one, two) < 1e-9 and distance(before, two) > 1e-3


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_scaled_steps_are_pefts_riemannian_ones(kind, tmp_path):
    theirs, mine = lora_pair(tmp_path)
    before = outputs(mine, "llama").detach()
    other = create_riemannian_optimizer(theirs, kind, lr=1e-2, reg=1e-2)
    own = scaled_steps(kind(trainable_parameters(mine), lr=1e-2), mine, 1e-2)
    one, two = three_steps(mine, own), three_steps(theirs, other)
    assert distance(one, two) < 1e-9 and distance(before, two) > 1e-3
