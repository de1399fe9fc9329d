# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # 00 · Start here
#
# You have a trained model, and you want it to do something else. If you tune all its weights, you own a second model as
# large as the first. **LoRA** (low-rank adaptation, Hu et al. 2021) freezes the model and trains two thin matrices beside
# each weight matrix that you choose. What you keep is a small file, and later it can be added into the weights.
#
# **Afterwards you can** say what LoRA is and where it stands among the ways to tune a model; load an adapter, see it
# change a model, and merge it; find your way through these chapters.
#
# **You should know** PyTorch, and what a matrix product is.
#
# **Time**: 5 minutes to read, one to run. Run the cells from the top, with Shift + Enter.
#
# Here is the subject in one slider. The base is a small language model, trained on the source code of Python's standard
# library. For it there are five LoRA adapters of rank 1, 2, 4, 8 and 16, all trained on docstrings of numpy and
# matplotlib. The base, alone and with each adapter, continues the same three words. (This takes some seconds.)

# %% tags=["setup"]
import math

import torch

from lora_edu import counting, doctor, explore, plots
from lora_edu.data import adapter_folder, load_base_losses, load_checkpoint, load_corpus, load_sweeps
from lora_edu.data.runs import best
from lora_edu.data.shipped import data_file
from lora_edu.exercises import chapter_00 as exercises
from lora_edu.lora import load_adapter, merge_lora, remove_lora
from lora_edu.tinylm import TinyLM
from lora_edu.training import evaluate

base, reference = load_checkpoint("base"), load_corpus("reference")
models = {0: TinyLM.from_state_dict(base)}
for r in (1, 2, 4, 8, 16):
    models[r] = load_adapter(TinyLM.from_state_dict(base), adapter_folder(f"reference_r{r}"))

# %%
prompt, tokenizer = "Return the array", reference.tokenizer


def write(model):
    tokens = torch.tensor(tokenizer.encode(prompt).ids)
    return tokenizer.decode(model.generate(tokens, 80, temperature=0.7, seed=1).tolist())


texts = {r: write(model) for r, model in models.items()}

# %% tags=["nbval-ignore-output"]
# Losses were recorded, on 61 000 tokens; section 2 computes two of them again.
rows, run = load_sweeps(), {"text": "reference", "steps": 200, "seed": 0}
lora = {r: best(rows, method="lora", rank=r, targets="all", scale=1.0, **run) for r in models if r}
losses = {0: load_base_losses()["reference"]["test"]} | {r: row["test"] for r, row in lora.items()}
full = best(rows, method="full", **run)["test"]
file = "adapter_model.safetensors"
sizes = {r: (adapter_folder(f"reference_r{r}") / file).stat().st_size for r in lora}
base_bytes = data_file("base.safetensors").stat().st_size
assert losses[0] > losses[1] > losses[2] > losses[4] > losses[8] > losses[16] > full
explore.what_each_rank_writes(prompt, texts, losses, sizes, full=(base_bytes, full))

# %% [markdown]
# Move the slider: drag it, or click it and use the arrow keys. At rank 0 there is no adapter, and the model writes code.
# With an adapter it writes something like a page of a reference manual. On the right, each dot is an adapter: how large its
# file is, and how well the model then predicts docstrings that it has not seen (lower is better). The red square is full
# tuning of all weights. This chapter says what these adapters are; the others say why the dots lie where they do.
#
# ## 1 · LoRA in one picture
#
# A linear layer computes $h = W x$. LoRA leaves $W$ alone and adds a second way from $x$ to $h$:
#
# $$h = W x + s \cdot B A x$$
#
# $A$ turns $x$ into $r$ numbers, and $B$ turns these into a change of $h$. The number $r$ is the **rank**; $s$ is a fixed
# number. Here is the last layer of the model above, with $r = 8$ and every length to one scale. ($W$ and $B$ are too tall
# for the page: each is cut into ten pieces, which lie side by side.)

# %%
figure, axes = plots.subplots(size=(7.2, 3.0))
plots.to_scale(axes, rows=10_000, columns=100, rank=8)
plots.show(
    figure,
    "W, 10 000 × 100, frozen, as ten grey strips; plus s times B, 10 000 × 8, as ten thin lines, "
    "times A, 8 × 100, a short line.",
)

# %%
explore.predict(
    "W has a million numbers. How many does LoRA train beside it at r = 8?",
    {
        "about 800": "That is A, 8 × 100. B is as tall as W: look at the ten thin lines in the picture.",
        "about 80 000": "8 × 100 in A and 10 000 × 8 in B. Most of it is B, because W is so tall.",
        "about 500 000": "The lines in the picture are thinner than that. Count A, 8 × 100, and B, 10 000 × 8.",
    },
)

# %%
head = models[8].head
trained = head.lora_A.numel() + head.lora_B.numel()
print(f"trained: {trained:,} of {head.weight.numel():,}, that is {trained / head.weight.numel():.2%}")
print(f"a 12,288 × 12,288 matrix of GPT-3 at r = 4: {counting.share(12_288, 12_288, 4):.3%}")
assert trained == 8 * (10_000 + 100) and 20 * trained > head.weight.numel() > 12 * trained

# %% [markdown]
# $r \cdot (\text{rows} + \text{columns})$ numbers instead of $\text{rows} \cdot \text{columns}$. Our matrix is only 100
# wide; the larger both sides of a matrix are, the smaller the share.
#
# ## 2 · One adapter, one change
#
# The base has 2.7 million weights. `reference_r8` is the adapter of rank 8: an $A$ and a $B$ for every matrix of the
# model. How much better does it predict? The measure is the **loss** on docstrings that neither model has seen: the mean of
# $-\ln p$ of the right next token, in nats. (61 000 tokens; this takes some ten seconds.)

# %% tags=["nbval-ignore-output"]
model, tuned = models[0], models[8]
before, after = evaluate(model, reference.test), evaluate(tuned, reference.test)
print(f"held-out docstrings: {before:.2f} nats a token, with the adapter {after:.2f}")
print(f"the right token has become {math.exp(before - after):.1f} times as likely, in the geometric mean")
assert math.exp(before - after) > 5
assert abs(before - losses[0]) < 0.01 and abs(after - losses[8]) < 0.01, "as the slider says"

# %% [markdown]
# The slider shows one text for each rank. One text may be luck, so let us draw two dozen from the base and two dozen with
# the adapter of rank 8. Signs of a manual are `Parameters`, `Returns`, `----` and `>>>`; signs of code are `self.` and
# `def`.

# %%
explore.predict(
    "In how many of its 24 texts will the tuned model show a sign of a manual?",
    {
        "about 6": "One text was luck, you think. Then the loss should hardly have moved, but it fell by 1.7 nats.",
        "about 12": "A fair guess after one text. Compare with how often the base shows such a sign, too.",
        "20 or more": "You expect that the kind of text has changed as a whole. See whether code has gone as well.",
    },
)

# %% tags=["nbval-ignore-output"]
manual, code = ("Parameters", "Returns", "----", ">>>"), ("self.", "def ")


@torch.no_grad()
def draw(model, count=24, length=48):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor(tokenizer.encode(prompt).ids).expand(count, -1)
    for _ in range(length):  # a token at a time, drawn from what the model predicts after those before
        logits = model.head(model.hidden(tokens)[:, -1])
        drawn = torch.multinomial((logits / 0.7).softmax(1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn], 1)
    return tokenizer.decode_batch(tokens.tolist())


share = lambda texts, marks: sum(any(mark in text for mark in marks) for text in texts) / len(texts)
like_manual, like_code = {}, {}
for name, each in {"the base": model, "with the adapter": tuned}.items():
    drawn = draw(each)
    like_manual[name], like_code[name] = share(drawn, manual), share(drawn, code)
    print(f"{name:17} signs of a manual in {like_manual[name]:4.0%}, of code in {like_code[name]:4.0%}")
assert like_manual["the base"] < 0.4 < 0.6 < like_manual["with the adapter"]
assert like_code["the base"] > like_code["with the adapter"] + 0.15

# %% [markdown]
# It was not luck: the *kind* of text has changed. (Neither text means anything. A model of this size has little to say.)
# And the base is still in there, to the last bit:

# %%
state = tuned.state_dict()
x = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
W, A, B, s = head.weight, head.lora_A, head.lora_B, head.scaling
by_hand = x @ W.T + s * (x @ A.T) @ B.T  # the formula of section 1; here each x is a row
base_is_there = all(torch.equal(state[name], tensor) for name, tensor in base.items())
print(f"all {len(base)} tensors of the base are there unchanged: {base_is_there}")
print(f"the last layer computes the formula: {torch.allclose(head(x), by_hand, atol=1e-3)}")
assert base_is_there and torch.allclose(head(x), by_hand, atol=1e-3)
assert not torch.allclose(x @ W.T, by_hand, atol=0.1)  # and the second way is no trifle

# %% [markdown]
# ## 3 · Nothing is left at inference
#
# $W x + s \cdot B A x = (W + s \cdot B A) x$. So the update can be added into $W$, once, and then $A$ and $B$ are no
# longer needed.

# %%
explore.predict(
    "How much larger is the merged model than the base?",
    {
        "not at all": "BA has the shape of W, so the sum has it, too. The cell below counts.",
        "a tenth": "That is A and B, kept beside W. But after the addition nobody needs them any more.",
        "twice as large": "BA is as large as W, that is right. But it is added to W, not stored beside it.",
    },
)

# %%
merged = load_adapter(TinyLM.from_state_dict(base), adapter_folder("reference_r8"))
merge_lora(merged)  # W becomes W + s · BA in every layer
remove_lora(merged, merge=True)  # A and B are thrown away, torch's own layers are left, with the new W

tokens = reference.test[None, :64]
same_outputs = torch.allclose(merged(tokens), tuned(tokens), atol=1e-3)
kinds, of_base = ([type(layer) for layer in each.modules()] for each in (merged, model))
numbers = sum(W.numel() for W in merged.parameters())
print("the outputs of the tuned model:", same_outputs)
print("the layers of the base:", kinds == of_base)
print(f"numbers: {numbers:,}; in the base: {sum(W.numel() for W in base.values()):,}")
assert same_outputs and kinds == of_base and numbers == sum(W.numel() for W in base.values())
assert not torch.allclose(model(tokens), tuned(tokens), atol=1)  # the base's outputs are others

# %% [markdown]
# Not at all. The merged model *is* a model of the base's shape: as large, as fast, with other numbers in it. The file that
# you keep and send is the adapter. Both are stored with two bytes a number:

# %%
print(f"base {base_bytes / 1e6:.2f} MB, adapter {sizes[8] / 1e6:.2f} MB: {sizes[8] / base_bytes:.0%}")
assert 10 < base_bytes / sizes[8] < 12

# %% [markdown]
# ## 4 · How large must r be?
#
# Back to the slider's dots. All five adapters were trained on the same text for the same 200 steps of 8 × 256 tokens, with
# one seed, each with a learning rate that suits its rank. Full tuning had the same text, steps and seed, and its own
# learning rate. Call what full tuning gains over the base 100 %.

# %%
explore.predict(
    "At r = 1, LoRA trains one number for every 88 of the model. How much of full tuning's gain does it reach?",
    {
        "about 1 %": "That would be in proportion to the numbers. But they are not spread at random: training chose "
        "where A and B point.",
        "about a third": "More than its share of the numbers, you say. Look at the slider again: where is the dot of "
        "rank 1, between the base's line and the red square?",
        "about two thirds": "So the first direction of each matrix does most of the work. See what each doubling adds.",
    },
)

# %%
gain = {r: (losses[0] - losses[r]) / (losses[0] - full) for r in lora}
for r in lora:
    print(
        f"r = {r:2}: {lora[r]['parameters']:7,} numbers, {losses[r]:.2f} nats, {gain[r]:.0%} of full tuning's gain"
    )
print(f"full:   {sum(W.numel() for W in base.values()):,} numbers, {full:.2f} nats")
assert 0.64 < gain[1] < 0.69 and 0.84 < gain[8] < 0.89 and 0.90 < gain[16] < 0.94
assert all(0.04 < gain[2 * r] - gain[r] < 0.09 for r in (1, 2, 4, 8))
assert 87 < sum(W.numel() for W in base.values()) / lora[1]["parameters"] < 89 and 70_000 < sizes[1] < 71_500

# %% [markdown]
# Rank 1, a file of 71 kB, goes about two thirds of the way. Each doubling of $r$ then adds five to eight points. (One run
# for each dot; chapter 07 has three seeds.) Why is so little enough?

# %%
explore.predict(
    "Full tuning changes W by some ΔW. Is LoRA good because that ΔW is of low rank?",
    {
        "yes": "That is the usual reason, and the name suggests it. Chapter 03 measures: some ΔW lose little when they "
        "are cut to a low rank, others lose more than half. So it cannot be the whole reason.",
        "no": "For one tuning of this model you are right: cut to rank 8, its ΔW loses more than half of the gain. "
        "For gentler ones far less is lost. Chapter 03 has both.",
        "it depends": "On the learning rate, the number of steps, the task and the model: chapter 03 shows on what.",
    },
)

# %% [markdown]
# It depends on how the model was tuned. When this model was fully tuned on this text at a high rate ($6 \cdot 10^{-3}$, 260
# steps of 16 × 256 tokens, two seeds), its $\Delta W$ cut to rank 8 keeps less than half of the gain. The same model tuned
# gently ($10^{-3}$) keeps about four fifths. And a BERT that others tuned and published still takes three of four decisions
# as before (91 of 125) when every $\Delta W$ is cut to rank 8, with 43 % of the energy. Chapter 03 shows all three, and chapter 07 asks
# how a *trained* rank 8 compares with a cut one.
#
# ## 5 · Where LoRA stands
#
# Many ways to tune a model train few numbers instead of all. Ask each of them what is left when the trained model is used:
#
# | | what is trained | what is left at inference |
# | --- | --- | --- |
# | added layers: bottleneck adapters (Houlsby et al. 2019) | small layers *between* the model's own | those layers: every token passes through them |
# | tuned inputs: prompt tuning, P-Tuning, prefix tuning | vectors put *before* the text | those vectors: every token attends to them |
# | a few of the model's own numbers: BitFit (the biases), sparse updates (chosen entries); (IA)³ trains a factor for each of some activations | numbers that the model has, or factors on its activations | nothing: numbers take the place of numbers; (IA)³'s factors can be multiplied into $W$ |
# | LoRA | two thin matrices *beside* each weight | nothing: $W + s \cdot B A$ takes the place of $W$ |
#
# LoRA adds matrices while it trains, so it is often listed under added layers. But no nonlinearity stands between $B$ and
# $A$, nor between them and $W$, and only for that reason can they be added up. (The paper's §3 sets LoRA apart from the
# first two rows: added layers cost time at inference, tuned inputs take up places in the context.) LoRA shares 'nothing is
# left' with the third row, and differs from it in what it changes: every entry of $W$, by a matrix of rank $r$.
#
# One word, two things: an **adapter** is the file with the trained $A$ and $B$ of all layers, as in PEFT and everywhere
# in this series. Houlsby's extra layers are called *adapters* in their paper; here they are always **bottleneck
# adapters**.
#
# ## 6 · How to use these chapters
#
# - **Predict** before you run: click what you think. A wrong guess teaches more than a right answer that you have read.
# - **Sliders** work once their cell has run. All pictures are in the page then, and switching them needs no kernel.
# - **Exercises** end each chapter. Put your answer in place of `None` and run the cell: a wrong answer is told what is
#   wrong with it. An open exercise stops nothing. Solutions are in the folder `solutions`.
# - **Numbers** in the text are asserted in the cells. What could not be computed while you wait is called *recorded*.
#
# | you ask | chapter |
# | --- | --- |
# | What is the rank of a matrix, and what is lost when I cut it? | [01 · Low rank](01_low_rank.ipynb) |
# | In how few dimensions can a model be tuned, and is that the same as low rank? | [02 · Intrinsic dimension](02_intrinsic_dimension.ipynb) |
# | What does full tuning change in the weights? When is the change of low rank? | [03 · What fine-tuning changes](03_finetuning_deltas.ipynb) |
# | Why is $r$ so much smaller than the matrix? What do I save: parameters, memory, time? | [04 · Counting](04_counting.ipynb) |
# | How do I write it? What does a step of $A$ and $B$ do? What are $s$ and alpha? | [05 · LoRA for a linear layer](05_lora_linear.ipynb) |
# | And for an embedding, where nothing is multiplied? What does a GPU make of it? | [06 · LoRA for an embedding](06_lora_embedding_gpu.ipynb) |
# | Which $r$, alpha, learning rate and layers? Is it as good as full tuning? What is forgotten? | [07 · Training with LoRA](07_train_with_lora.ipynb) |
#
# They are written to be read in order, and each says what it needs. If you have one evening only, take 05 and 07. The
# next cell says what this machine has, and which chapters can run on it (in a terminal: `lora-edu doctor`).

# %% tags=["nbval-ignore-output"]
files = list(doctor.data_files())
damaged = [name for name, right, _ in files if not right]
print(f"{doctor.device()}\nshipped files: {len(files)}, damaged: {len(damaged)}")
for chapter, lacks in doctor.chapters(damaged):
    print(chapter, "can run here" if not lacks else f"lacks: {'; '.join(lacks)}")
assert not damaged

# %% [markdown]
# ## What to remember
#
# - LoRA: $W$ stays, and $s \cdot B A$ of rank $r$ is trained beside it: $r \cdot (\text{rows} + \text{columns})$ numbers
#   instead of $\text{rows} \cdot \text{columns}$.
# - Merged, nothing is left at inference: the model has the base's shape and size.
# - An adapter is a small file that changes what a model writes, and the base under it stays as it was.
# - LoRA works whether or not full tuning's $\Delta W$ is of low rank. When it is, chapter 03 measures.
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# **Exercise 1.** Our model's blocks have a matrix `up` of 400 × 100. How many numbers does LoRA of rank 4 train beside it?

# %% tags=["exercise"]
numbers_trained = None
print(exercises.check_00_1(numbers_trained))

# %% tags=["solution"]
numbers_trained = 4 * (400 + 100)
print(exercises.check_00_1(numbers_trained))

# %% [markdown] tags=["exercise"]
# **Exercise 2.** You tune the base to 20 tasks, each with an adapter as large as `reference_r8`. You can keep one base and
# 20 adapters on disk, or 20 merged models. How many times as much disk do the merged models take? (`base.safetensors` has
# 5.47 MB, the adapter 0.50 MB.)

# %% tags=["exercise"]
times_as_much = None
print(exercises.check_00_2(times_as_much))

# %% tags=["solution"]
times_as_much = 20 * 5.47 / (5.47 + 20 * 0.50)
print(exercises.check_00_2(times_as_much))

# %% [markdown] tags=["exercise"]
# **Exercise 3.** Write the formula of section 1 for a batch: `with_lora(x, W, A, B, s)`. Here `x` is (n, in), an input in
# each row; `W` is (out, in), `A` is (r, in), `B` is (out, r), and `s` is a number. The result is (n, out).

# %% tags=["exercise"]
with_lora = None
print(exercises.check_00_3(with_lora))


# %% tags=["solution"]
def with_lora(x, W, A, B, s):
    return x @ W.T + s * (x @ A.T) @ B.T


print(exercises.check_00_3(with_lora))

# %% [markdown]
# ## Where to read on
#
# - Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models* (arXiv 2106.09685v2): §4.1 is the method, §3
#   what is wrong with the other ways.
# - Houlsby et al. 2019, *Parameter-Efficient Transfer Learning for NLP* (arXiv 1902.00751): bottleneck adapters.
# - Lester et al. 2021 (arXiv 2104.08691), prompt tuning; Li & Liang 2021 (arXiv 2101.00190), prefix tuning.
# - Ben Zaken et al. 2021 (arXiv 2106.10199), BitFit; Liu et al. 2022 (arXiv 2205.05638), (IA)³; Guo et al. 2020 (arXiv
#   2012.07463), *diff pruning*, a sparse update.
# - Here: chapter 01.
