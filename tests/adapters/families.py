"""One tiny model of each family that stores its weights in a way of its own, and a full fine-tune of it."""

import copy

import torch
import transformers

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
IDS = torch.arange(12).reshape(2, 6)
transformers.logging.set_verbosity_error()


def model(family: str, seed: int = 0, **options):
    torch.manual_seed(seed)
    made = {
        "bert": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=32, **options)
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=40,
                n_embd=16,
                n_layer=1,
                n_head=2,
                n_positions=32,
                bos_token_id=0,
                eos_token_id=0,
                **options,
            )
        ),
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SIZES, intermediate_size=24, **options)
        ),
        "opt": lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(
                **SIZES, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16, **options
            )
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=40, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8, **options
            )
        ),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SIZES, **EXPERTS, intermediate_size=24, **options)
        ),
        "gpt_oss": lambda: transformers.GptOssForCausalLM(
            transformers.GptOssConfig(**SIZES, **EXPERTS, intermediate_size=24, head_dim=8, **options)
        ),
    }[family]()
    with torch.no_grad():  # biases and norms start at 0 and 1: no test would see them lost
        for name, each in made.named_parameters():
            if each.ndim < 2:
                each += 0.1 * torch.randn(each.shape)
            if "relative_attention_bias" in name:
                each += torch.randn(each.shape)
    return made.eval()


def logits(made) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if made.config.is_encoder_decoder else {}
    with torch.no_grad():
        return made(input_ids=IDS, **more).logits


def moved(made, size: float = 0.05, matrices: bool = True, vectors: bool = False):
    """Another such model, with every matrix changed in full, or every vector."""
    tuned = copy.deepcopy(made)
    torch.manual_seed(7)
    with torch.no_grad():
        for each in tuned.parameters():  # a shared one once
            if (matrices and each.ndim > 1) or (vectors and each.ndim == 1):
                each += size * torch.randn(each.shape)
    return tuned


def truncated(before, after, rank: int):
    """The first model with ΔW of rank r added to each of its matrices; of a stack, to each expert's part of it."""
    cut = copy.deepcopy(before)
    gated = {"gate_up_proj"} if before.config.model_type == "mixtral" else set()
    with torch.no_grad():
        for (name, old), new in zip(cut.named_parameters(), after.parameters(), strict=True):
            if old.ndim < 2 or name.endswith("bias") or "embed_positions" in name:  # not for LoRA
                continue
            halves = 2 if name.rpartition(".")[2] in gated else 1  # w1 and w3, which its files hold apart
            for half, full in zip(old.chunk(halves, -2), (new - old).chunk(halves, -2), strict=True):
                U, S, Vh = torch.linalg.svd(full, full_matrices=False)
                half += (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]
    return cut
