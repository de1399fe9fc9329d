# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # LoRA, measured
#
# Low-rank adaptation from the singular value decomposition to the GPU. What can be computed in a minute is computed on
# your machine while you read; longer runs were recorded, and are called so. You need no network and no graphics card, and
# every slider answers at once.
#
# Here is one: a small language model, tuned with adapters of rank 1 to 16. It shows what the model writes after the same
# three words, how well it predicts text that it has not seen, and how large the adapter's file is. (In JupyterLab, run the
# cell first, with Shift + Enter; its code is folded away.)

# %% tags=["folded", "nbval-ignore-output"]
import torch

from lora_edu import explore
from lora_edu.data import adapter_folder, load_base_losses, load_checkpoint, load_corpus, load_sweeps
from lora_edu.data.runs import best
from lora_edu.data.shipped import data_file
from lora_edu.lora import load_adapter
from lora_edu.tinylm import TinyLM

base, tokenizer, prompt = load_checkpoint("base"), load_corpus("reference").tokenizer, "Return the array"
rows, run = load_sweeps(), {"text": "reference", "steps": 200, "seed": 0}
words = torch.tensor(tokenizer.encode(prompt).ids)
texts, losses, sizes = {}, {0: load_base_losses()["reference"]["test"]}, {}
for r in (0, 1, 2, 4, 8, 16):
    model, adapter = TinyLM.from_state_dict(base), adapter_folder(f"reference_r{r or 1}")
    if r:
        load_adapter(model, adapter)
        sizes[r] = (adapter / "adapter_model.safetensors").stat().st_size
        losses[r] = best(rows, method="lora", rank=r, targets="all", scale=1.0, **run)["test"]
    texts[r] = tokenizer.decode(model.generate(words, 80, temperature=0.7, seed=1).tolist())
full = data_file("base.safetensors").stat().st_size, best(rows, method="full", **run)["test"]
assert full[1] < losses[16] < losses[8] < losses[1] < losses[0] - 1
explore.what_each_rank_writes(prompt, texts, losses, sizes, full)

# %% [markdown]
# You should be able to read PyTorch and remember what a matrix product is. Begin with
# [Start here](00_start_here.ipynb): it takes five minutes. Each chapter says what it needs, and ends with exercises
# whose checks tell you what is wrong with an answer.
#
# | chapter | afterwards you can | minutes to read | to run |
# | --- | --- | --- | --- |
# | [00 · Start here](00_start_here.ipynb) ([solutions](solutions/00_start_here.ipynb)) | say what LoRA is and where it stands among the ways to tune a model, load an adapter, see it change a model, merge it, find your way through the series | 5 | 1 |
# | [01 · Low rank](01_low_rank.ipynb) ([solutions](solutions/01_low_rank.ipynb)) | define rank, read a spectrum, state and check Eckart–Young, tell structured matrices from random ones, know when to use a randomised SVD | 40 | 1 |
# | [02 · Intrinsic dimension](02_intrinsic_dimension.ipynb) ([solutions](solutions/02_intrinsic_dimension.ipynb)) | train any model in a random subspace, find its d₉₀ and say of what it is 90 %, project into millions of dimensions without storing the projection, tell low dimension from low rank | 40 | 1 |
# | [03 · What fine-tuning changes](03_finetuning_deltas.ipynb) ([solutions](solutions/03_finetuning_deltas.ipynb)) | compute ΔW between two checkpoints, say how much of the behaviour each rank keeps, compare runs by subspace, tell rounding and rare rows from signal, do it all on two checkpoints of your own | 75 | 2 |
# | [04 · Counting](04_counting.ipynb) ([solutions](solutions/04_counting.ipynb)) | count the parameters, bytes and FLOPs of LoRA for any shape and rank, find the rank from which on it saves nothing, recompute the LoRA paper's counts, predict the memory of a training step and check it | 45 | 1 |
# | [05 · LoRA for a linear layer](05_lora_linear.ipynb) ([solutions](solutions/05_lora_linear.ipynb)) | write LoRA for a linear layer in a dozen lines, say what a step of A and B does to ΔW, explain the two inits, alpha / r and the dropout, average two adapters without ruining them, merge and unmerge exactly | 60 | 1 |
# | [06 · LoRA for an embedding](06_lora_embedding_gpu.ipynb) ([solutions](solutions/06_lora_embedding_gpu.ipynb)) | write LoRA for an embedding, say which rows of the table a step moves and why the inits are swapped, read loralib's `Embedding` line by line, count the bytes a step must move, merge when the output layer shares the table, place a look-up on a GPU's roofline, read and break a fused Triton kernel | 75 | 2 |
# | [07 · Training with LoRA](07_train_with_lora.ipynb) ([solutions](solutions/07_train_with_lora.ipynb)) | tune a model with LoRA, say what a trained rank buys over a truncated one, choose r, learning rate, alpha and matrices by measurement, compare forgetting and directions fairly | 60 | 2 |
# | [08 · Every other way to tune](08_other_ways.ipynb) ([solutions](solutions/08_other_ways.ipynb)) | write BitFit, bottleneck adapters, (IA)³, prompt tuning, P-Tuning and prefix tuning in a few lines each, say where each acts and how many numbers it trains and stores, read a comparison of methods and say what it held equal, say what each costs in memory and time, ask of a table how much of its order is chance | 60 | 2 |
# | [09 · The variants](09_variants.ipynb) ([solutions](solutions/09_variants.ipynb)) | write rsLoRA, LoRA+, DoRA, PiSSA, LoRA-GA, VeRA, LoRA-XS, AdaLoRA, scaled AdamW and Muon in a few lines each, say before a comparison how large a difference must be to show over three seeds, tell what a variant gains from what a learning rate of its own gains, explain how the best rate goes with rank, scaling and start, tell which optimisers see ΔW alone | 60 | 1 |
# | [10 · Serving adapters](10_serve.ipynb) ([solutions](solutions/10_serve.ipynb)) | say what lies in an adapter's file, extract an adapter from a full fine-tune, see which rank it uses and cut it, say when to train high and cut, merge into bfloat16 without losing a small update, add, average and negate adapters and say where it breaks, serve a batch whose rows use different adapters | 60 | 1 |
# | [11 · A real encoder](11_real_encoder.ipynb) ([solutions](solutions/11_real_encoder.ipynb)) | split data so that nothing leaks, measure a search, write the contrastive loss, tune a published sentence encoder with LoRA to find Python functions and say with an interval whether full tuning finds more, choose rank, rate and matrices for it, open the adapter with PEFT, say how low the rank of such an update is | 50 | 4 |
# | [12 · A real language model](12_real_llm.ipynb) ([solutions](solutions/12_real_llm.ipynb)) | put the loss on an answer alone, measure what a language model writes, tune one of 135 million parameters with LoRA in three minutes and say with an interval whether full tuning does better, merge and save LoRA on a tied embedding without losing it, say what a training step holds in memory and what a base in four bits saves, write NF4 with double quantisation and train LoRA on top of it, test whether intruder directions cause forgetting, compare how low the rank of an update is in five cases | 60 | 3 |
#
# Opened through `make lab`, these notebooks are your own copies: change what you like. Delete one, and the next
# start brings it back as it was.
#
# ## Is everything here?
#
# Run the cell below (Shift + Enter). It names what a chapter lacks on this machine, and how to get it.

# %% tags=["nbval-ignore-output"]
from lora_edu import doctor

damaged = [name for name, right, _ in doctor.data_files() if not right]
missing = dict(doctor.chapters(damaged))
for chapter, lacks in missing.items():
    print(chapter, "can run here" if not lacks else f"lacks: {'; '.join(lacks)}")
assert not any(missing.values())
