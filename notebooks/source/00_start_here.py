# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # 00 · Start here
#
# You have a trained model and want it to do something else. Tune all its weights, and you own a second model as large as
# the first. **LoRA** (low-rank adaptation, Hu et al. 2021) freezes the model and trains two thin matrices beside each
# weight matrix that you choose. What you keep is a small file, and it can be added into the weights afterwards.
#
# **Afterwards you can** say what LoRA is and where it stands among the ways to tune a model; load an adapter, see it
# change a model, and merge it; find your way through these chapters.
#
# **You should know** PyTorch, and what a matrix product is.
#
# **Time**: 5 minutes to read, one to run. Run the cells from the top, with Shift + Enter.

# %% tags=["setup"]
import torch

from lora_edu import counting, doctor, exercises, explore, plots
from lora_edu.data import adapter_folder, load_checkpoint, load_corpus, load_sweeps
from lora_edu.data.runs import best
from lora_edu.data.shipped import data_file
from lora_edu.lora import load_adapter, merge_lora, remove_lora
from lora_edu.tinylm import TinyLM
from lora_edu.training import evaluate

# %% [markdown]
# ## 1 · LoRA in one picture
#
# A linear layer computes *h* = *W* *x*. LoRA leaves *W* alone and adds a second way from *x* to *h*:
#
# > *h* = *W* *x* + *s* · *B* *A* *x*
#
# *A* turns *x* into *r* numbers, and *B* turns these into a change of *h*. *r* is the **rank**, *s* a fixed number. Here
# is the last layer of the model we are about to load, with *r* = 8 and every length to one scale. (*W* and *B* are too
# tall for the page: each is cut into ten pieces, laid side by side.)

# %%
figure, axes = plots.subplots(size=(7.2, 3.0))
plots.to_scale(axes, rows=10_000, columns=100, rank=8)
plots.show(
    figure,
    "W, 10 000 × 100, frozen, as ten grey strips; plus s times B, 10 000 × 8, as ten thin lines, "
    "times A, 8 × 100, a short line.",
)

# %%
trained = counting.lora_parameters(10_000, 100, rank=8)
print(f"trained: {trained:,} of {10_000 * 100:,}, that is {counting.share(10_000, 100, 8):.2%}")
print(f"a 12,288 × 12,288 matrix of GPT-3 at r = 4: {counting.share(12_288, 12_288, 4):.3%}")
assert trained == 8 * (10_000 + 100) == 80_800

# %% [markdown]
# *r* · (rows + columns) numbers instead of rows · columns. Our matrix is only 100 wide; the larger a matrix, the smaller
# the share.
#
# ## 2 · One adapter, one change
#
# The base is a small language model: 2.7 million weights, trained on the source code of Python's standard library.
# `reference_r8` is an adapter for it: the *A* and *B* of rank 8 for every matrix, trained on the docstrings of numpy and
# matplotlib.
#
# The measure is the loss on docstrings that neither has seen: the mean of −ln *p* of the right next token, in nats.

# %% tags=["setup", "nbval-ignore-output"]
base, reference = load_checkpoint("base"), load_corpus("reference")
held_out = reference.test.unfold(0, 256, 2048).flatten()  # an eighth of it, spread over all its documents
model = TinyLM.from_state_dict(base)
tuned = load_adapter(TinyLM.from_state_dict(base), adapter_folder("reference_r8"))
before, after = evaluate(model, held_out), evaluate(tuned, held_out)
print(f"held-out docstrings: {before:.2f} nats a token, with the adapter {after:.2f}")
assert before > 5.8 and after < 4.3 and before - after > 1.61

# %% [markdown]
# More than 1.6 nats less: in the geometric mean, the right token has become five times as likely (e^1.6 ≈ 5). What does
# that look like? **Predict**: how will each of the two go on after `Return the array`?

# %% tags=["setup", "nbval-ignore-output"]
prompt, tokenizer = "Return the array", reference.tokenizer


def write(model):
    tokens = torch.tensor(tokenizer.encode(prompt).ids)
    return tokenizer.decode(model.generate(tokens, 80, temperature=0.7, seed=1).tolist())


written = write(model)
print(f"--- the base:\n{written}\n\n--- with the adapter:\n{write(tuned)}")
assert before - after > 1.61

# %% [markdown]
# The base goes on with code, the tuned model with an entry of a reference manual: headings, rules, `name : type`. Neither
# means anything by it; what has changed is the *kind* of text. Is that one lucky draw? Two dozen of each:

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
# It was not luck. And the base is still in there, to the last bit:

# %%
head, x = tuned.head, torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
W, A, B, s = head.weight, head.lora_A, head.lora_B, head.scaling
by_hand = x @ W.T + s * (x @ A.T) @ B.T  # the formula of section 1; here x is a row
print(f"W {tuple(W.shape)} is the base's: {torch.equal(W, base['head.weight'])}")
print(f"A {tuple(A.shape)} and B {tuple(B.shape)} do the rest: {torch.allclose(head(x), by_hand, atol=1e-3)}")
assert torch.equal(W, base["head.weight"]) and torch.allclose(head(x), by_hand, atol=1e-3)

# %% [markdown]
# ## 3 · Nothing is left at inference
#
# *W* *x* + *s* · *B* *A* *x* = (*W* + *s* · *B* *A*) *x*. So the update can be added into *W*, once, and *A* and *B*
# thrown away. **Predict**: how much larger is the merged model than the base?

# %%
merged = load_adapter(TinyLM.from_state_dict(base), adapter_folder("reference_r8"))
merge_lora(merged)  # W becomes W + s · BA in every layer
remove_lora(merged, merge=True)  # A and B are thrown away, torch's own layers are left, with the new W

tokens = held_out[None, :64]
same_outputs = torch.allclose(merged(tokens), tuned(tokens), atol=1e-3)
kinds, of_base = ([type(layer) for layer in each.modules()] for each in (merged, model))
numbers = sum(W.numel() for W in merged.parameters())
print("the outputs of the tuned model:", same_outputs)
print("the layers of the base:", kinds == of_base)
print(f"numbers: {numbers:,}; in the base: {sum(W.numel() for W in base.values()):,}")
assert same_outputs and kinds == of_base and numbers == sum(W.numel() for W in base.values())

# %% [markdown]
# Not at all. The merged model *is* a model of the base's shape: as large, as fast, with other numbers in it. The file that
# you keep and send is the adapter. Both are stored with two bytes a number:

# %%
base_bytes = data_file("base.safetensors").stat().st_size
adapter_bytes = (adapter_folder("reference_r8") / "adapter_model.safetensors").stat().st_size
print(
    f"base {base_bytes / 1e6:.2f} MB, adapter {adapter_bytes / 1e6:.2f} MB: {adapter_bytes / base_bytes:.0%}"
)
assert 10 < base_bytes / adapter_bytes < 12

# %% [markdown]
# ## 4 · How large must *r* be?
#
# Five adapters, trained on the same text for the same 200 steps, each with a learning rate that suits it. **Predict**: how
# much of full tuning's gain does *r* = 1 reach? Full tuning with as many steps is recorded; the rest is computed here,
# in some ten seconds.

# %% tags=["nbval-ignore-output"]
texts, losses, sizes = {0: written}, {0: before}, {}
for r in (1, 2, 4, 8, 16):
    adapted = load_adapter(TinyLM.from_state_dict(base), adapter_folder(f"reference_r{r}"))
    texts[r], losses[r] = write(adapted), evaluate(adapted, held_out)
    sizes[r] = (adapter_folder(f"reference_r{r}") / "adapter_model.safetensors").stat().st_size
full = best(load_sweeps(), method="full", text="reference", steps=200)["test"]  # recorded
gain = {r: (before - loss) / (before - full) for r, loss in losses.items()}
for r in sizes:
    print(f"r = {r:2}: {losses[r]:.1f} nats a token, {gain[r]:.0%} of full tuning's gain")
assert 0.6 < gain[1] < 0.72 and 0.8 < gain[8] < gain[16] < 0.95
assert all(0.01 < gain[2 * r] - gain[r] < 0.12 for r in (1, 2, 4, 8))

# %% tags=["nbval-ignore-output"]
assert full < losses[16] < before and 70_000 < sizes[1] < 71_500
explore.what_each_rank_writes(prompt, texts, losses, sizes, full=(base_bytes, full))

# %% [markdown]
# Move the slider: drag it, or click it and use the arrow keys. (The red square is full tuning.) One rank alone, a file of
# 71 kB, goes about two thirds of the way, and each doubling adds four to eight points. Why is so little enough?
# Because full
# tuning's change is of low rank? (No, says chapter 03.) Then why? That is what the series is about. Each dot is one run;
# chapter 07 has several seeds.
#
# ## 5 · Where LoRA stands
#
# Most ways to train few numbers instead of all are of two families, and LoRA belongs to neither:
#
# | | what is trained | what is left at inference |
# | --- | --- | --- |
# | added layers: bottleneck adapters (Houlsby et al. 2019) | small layers *between* the model's own | those layers: every token passes through them |
# | tuned inputs: prompt tuning, P-Tuning, prefix tuning | vectors put *before* the text | those vectors: every token attends to them |
# | LoRA | two thin matrices *beside* each weight | **nothing**: *W* + *s* · *BA* takes *W*'s place |
#
# LoRA adds matrices while it trains, so it is often filed under added layers. What tells it apart is that no nonlinearity
# stands between *B* and *A*, nor between them and *W*: only for that reason can they be added up. (§3 of the paper sets
# LoRA apart from both: added layers cost time at inference, tuned inputs cost places in the context.)
#
# One word, two things: an **adapter** is the file with the trained *A* and *B* of all layers, as in PEFT and everywhere
# in this series. Houlsby's extra layers are called *adapters* in their paper; here they are always **bottleneck
# adapters**.
#
# ## 6 · How to use these chapters
#
# - **Predict** before you run. A wrong guess is worth more than a right answer that you have read.
# - **Sliders** work once their cell has run: all pictures are in the page then, and it needs no kernel to switch them.
# - **Exercises** end each chapter. Put your answer in place of `None` and run the cell: a wrong answer is told what is
#   wrong with it. An open one disturbs nothing. Solutions are in the folder `solutions`.
# - **Numbers** in the text are asserted in the cells. What could not be computed while you wait is called *recorded*.
#
# | you ask | chapter |
# | --- | --- |
# | What is the rank of a matrix, and what is lost when I cut it? | [01 · Low rank](01_low_rank.ipynb) |
# | In how few dimensions can a model be tuned, and is that the same as low rank? | [02 · Intrinsic dimension](02_intrinsic_dimension.ipynb) |
# | What does full tuning change in the weights? Is the change of low rank? | [03 · What fine-tuning changes](03_finetuning_deltas.ipynb) |
# | Why is *r* so much smaller than the matrix? What do I save: parameters, memory, time? | [04 · Counting](04_counting.ipynb) |
# | How do I write it? What does a step of *A* and *B* do? What are *s* and alpha? | [05 · LoRA for a linear layer](05_lora_linear.ipynb) |
# | And for an embedding, where nothing is multiplied? What does a GPU make of it? | [06 · LoRA for an embedding](06_lora_embedding_gpu.ipynb) |
# | Which *r*, alpha, learning rate and layers? Is it as good as full tuning? What is forgotten? | [07 · Training with LoRA](07_train_with_lora.ipynb) |
#
# They are written to be read in order, and each says what it needs. With one evening only, take 05 and 07. What this
# machine has, and which chapters can run on it (in a terminal: `lora-edu doctor`):

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
# - LoRA: *W* stays, *s* · *BA* of rank *r* is trained beside it, *r* · (rows + columns) numbers instead of rows · columns.
# - Merged, nothing is left at inference: the model has the base's shape and size.
# - An adapter is a small file that changes what a model writes, and the base comes back unharmed.
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

# %% [markdown]
# ## Where to read on
#
# - Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models* (arXiv 2106.09685v2): §4.1 is the method, §3
#   what is wrong with its rivals.
# - Houlsby et al. 2019, *Parameter-Efficient Transfer Learning for NLP* (arXiv 1902.00751): bottleneck adapters.
# - Lester et al. 2021 (arXiv 2104.08691), prompt tuning; Li & Liang 2021 (arXiv 2101.00190), prefix tuning.
# - Here: chapter 01.
