"""LoRA+: B learns faster than A (Hayou et al. 2024, arXiv 2402.12354).

Not another model or optimiser: parameter groups with two rates, for any optimiser of torch.
"""

import math

from torch import nn

from lora_edu.lora import lora_layers


def lora_plus(
    model: nn.Module, rate: float, ratio: float = 16.0, *, embedding_rate: float | None = None
) -> list[dict]:
    """Parameter groups for an optimiser: A at `rate` η, B at λη with λ = `ratio`; `Adam(lora_plus(model, 1e-3))`.

    With Adam's steps of one size, A x adds up over the width n of the input while B's sum is over r only, so that both
    learn features at large n where η_A = Θ(1/n) and η_B = Θ(1) (§3; the paper proposes λ = 2⁴). In an embedding x has a
    single 1, so that neither factor sums over n: both get `embedding_rate`, η unless given (PEFT has a separate rate
    there, too). Whatever else is trained gets η. Groups that would be empty are left out; each has a "name".

    Raises ValueError for a rate or ratio that isn't above 0, or where no factor is trained.
    """
    numbers = {
        "rate": rate,
        "ratio": ratio,
        "embedding_rate": rate if embedding_rate is None else embedding_rate,
    }
    for name, value in numbers.items():
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be a finite number above 0; got {value!r}")
    layers = lora_layers(model).values()
    tables = [layer for layer in layers if isinstance(layer, nn.Embedding)]
    linear = [layer for layer in layers if not isinstance(layer, nn.Embedding)]
    groups = {
        "lora_A": ([layer.lora_A for layer in linear], rate),
        "lora_B": ([layer.lora_B for layer in linear], rate * ratio),
        "embedding": (
            [factor for layer in tables for factor in (layer.lora_A, layer.lora_B)],
            numbers["embedding_rate"],
        ),
    }
    seen = {id(each) for factors, _ in groups.values() for each in factors}
    groups["other"] = ([each for each in model.parameters() if id(each) not in seen], rate)
    found = []
    for name, (parameters, own) in groups.items():
        trained = [each for each in parameters if each.requires_grad]
        if trained:
            found.append({"params": trained, "lr": own, "name": name})
    if not any(group["name"] != "other" for group in found):
        raise ValueError("no factor of LoRA is trained here; add_lora the model first")
    return found
