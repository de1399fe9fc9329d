"""Adapters of two layers as files of every layout, with the spectrum that a test asks for."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
SPECTRUM = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
PREFIX = "base_model.model."
CONFIG = {
    "peft_type": "LORA",
    "r": len(SPECTRUM),
    "lora_alpha": 12,  # s = 2
    "target_modules": ["q_proj", "down_proj"],
}


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))[0]


def pair(
    rows: int = 12, columns: int = 10, spectrum=SPECTRUM, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) with s · BA of the given singular values for s = 2, neither of them balanced nor orthogonal."""
    U, V = orthonormal(rows, len(spectrum), seed), orthonormal(columns, len(spectrum), seed + 1)
    mixing = torch.eye(len(spectrum)) + 0.3 * torch.randn(
        len(spectrum), len(spectrum), generator=torch.Generator().manual_seed(seed + 2)
    )
    A = mixing @ V.T
    B = (U * torch.tensor(spectrum) / 2) @ torch.linalg.inv(mixing)
    return A.contiguous(), B.contiguous()


def peft_tensors(**options) -> dict[str, torch.Tensor]:
    held = {}
    for number, name in enumerate(LAYERS):
        A, B = pair(seed=10 * number, **options)
        held |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
    return held


def peft_folder(folder: Path, tensors=None, **settings) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(peft_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | settings), encoding="utf-8")
    return folder


def kohya_file(path: Path) -> Path:
    """The second layer is a convolution with a 3 × 3 kernel."""
    A, B = pair()
    C, D = pair(rows=8, columns=18, seed=5)
    names = ["lora_unet_mid_attn_to_q", "lora_unet_down_conv1"]
    held = {
        f"{names[0]}.lora_down.weight": A,
        f"{names[0]}.lora_up.weight": B,
        f"{names[0]}.alpha": torch.tensor(12.0),
        f"{names[1]}.lora_down.weight": C.reshape(6, 2, 3, 3),
        f"{names[1]}.lora_up.weight": D.reshape(8, 6, 1, 1),
        f"{names[1]}.alpha": torch.tensor(12.0),
    }
    save_file(held, path, metadata={"ss_network_dim": "6", "ss_base_model_version": "sd_v1"})
    return path


def diffusers_file(path: Path) -> Path:
    """Without an alpha, so that s = 1."""
    held = {}
    for number in range(2):
        A, B = pair(seed=number)
        name = f"unet.down_blocks.{number}.attn.to_q"
        held |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": 2 * B}
    save_file(held, path)
    return path


def mlx_folder(folder: Path) -> Path:
    folder.mkdir()
    held = {}
    for number, name in enumerate(LAYERS):
        A, B = pair(seed=number)
        held |= {f"{name}.lora_a": A.T.contiguous(), f"{name}.lora_b": B.T.contiguous()}
    save_file(held, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 6, "scale": 2.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
