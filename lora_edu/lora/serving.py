"""Many adapters on one base: switched without touching its weights, or one for each row of a batch.

Not for training (inject.py), nor for merging adapters into one (combine.py). The products are in functional.py.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_edu.text import did_you_mean

from .adapter_files import Adapter, AdapterError, Factors, read_adapter
from .checks import POOLED
from .functional import Part, adapter_parts, add_by_row
from .inject import lora_layers, refuse_at, unwrap
from .peft_format import all_tensors, check_fits, factors_dtype, same_values
from .quant import weight_like, weight_shape


class Stack(NamedTuple):
    """The factors of one layer's adapters of one rank, as grouped_lora_linear takes them; s is part of lora_B."""

    names: list[str]
    lora_A: Tensor
    lora_B: Tensor


class AdapterPool:
    """Many LoRA adapters on one base, of which every batch, or every row of a batch, uses another.

        pool = AdapterPool(model, {"code": "adapters/code", "mail": "adapters/mail"})
        with pool.use("code"):                     # the whole batch; None is the base
            model(tokens)
        with pool.use(["code", None, "mail"]):     # a name, or None, for each of the three rows
            model(tokens)

    An adapter costs the memory of its factors and nothing else. The base's weights are neither copied nor changed:
    its modules and Parameters stay where they are, and each layer that an adapter names has the factors as a child
    and a forward hook that adds s · B A x to its output. So `state_dict` is the base's, ties stay ties (an adapted
    embedding leaves a tied head alone, as in PEFT), and outside of `use` the model is the base bit for bit.

    Adapters may differ in ranks, alphas and layers. A layer keeps one stack of factors for each rank that occurs:
    nothing is padded, and rows with adapters of one rank still share their products. A stack is copied when an
    adapter joins or leaves it.

    For inference: inside of `use` no gradient is recorded, and dropout of the adapters is not applied. The first
    dimension of a layer's input has to be the batch, which is not so where a model flattens batch and tokens or
    sends tokens to experts. One `use` at a time: threads need a model each. Sources: S-LoRA (Sheng et al. 2023),
    Punica (Chen et al. 2023); PEFT's `adapter_names=` gives the same output.

    model: any model that `load_adapter` takes, without LoRA in it. adapters: name → folder or `read_adapter`'s result.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, str | Path | Adapter] | None = None):
        self.model = unwrap(model)
        self._names: list[str] = []
        self._layers: dict[str, _Pooled] = {}
        self._in_use = False
        self._check_model()
        try:
            for name, adapter in (adapters or {}).items():
                self.add(name, adapter)
        except BaseException:
            self.remove()
            raise

    @property
    def names(self) -> list[str]:
        """The adapters in the pool, in the order in which they came."""
        return list(self._names)

    def adapter_bytes(self) -> int:
        """Bytes that the factors of all adapters take together."""
        tensors = [
            each
            for layer in self._layers.values()
            for stack in layer.stacks.values()
            for each in (stack.lora_A, stack.lora_B)
        ]
        return sum(each.numel() * each.element_size() for each in tensors)

    def add(self, name: str, adapter: str | Path | Adapter) -> None:
        """Put an adapter into the pool, under a name of its own.

        adapter: a folder or file, or what `read_adapter` made of it. Ranks and alphas are the file's, module by
        module. The factors keep the file's dtype, or the weight's where that is wider; s is multiplied into B once.

        Raises ValueError for a name that is taken and for a model that has other LoRA in it, RuntimeError inside of
        `use`, AdapterError for what `load_adapter` refuses (damaged, for another model, DoRA, …), for an embedding
        with max_norm, and for an adapter that holds more than factors (modules_to_save, biases, token rows): these
        replace weights of the base, which the pool's adapters share. The pool and the model are then unchanged.
        """
        self._idle("add")
        if not isinstance(name, str) or not name:
            raise ValueError(f"an adapter's name must be a text of at least one letter; got {name!r}")
        if name in self._names:
            raise ValueError(
                f"the pool has an adapter called {name!r} already; drop it first, or choose another name"
            )
        self._check_model()
        adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
        check_fits(self.model, adapter)
        self._refuse_beside(adapter)
        if not adapter.layers:
            raise AdapterError(
                f"{adapter.path} has no factors of any layer, so that there is nothing to serve"
            )
        ready = {}
        for layer_name, factors in adapter.layers.items():
            layer = self.model.get_submodule(layer_name)
            if layer_name not in self._layers:
                self._refuse_layer(layer_name, layer)
            ready[layer_name] = _scaled(factors, weight_like(layer))
        if len({id(self.model.get_submodule(each)) for each in ready}) < len(ready):
            raise AdapterError(
                "two layers of the adapter are one module of the model; it must have one pair of factors"
            )
        for layer_name, (lora_A, lora_B) in ready.items():
            if layer_name not in self._layers:
                self._layers[layer_name] = _Pooled(layer_name, self.model.get_submodule(layer_name))
            self._layers[layer_name].put(name, lora_A, lora_B)
        self._names.append(name)

    def drop(self, name: str) -> None:
        """Take an adapter out of the pool; a layer that no other adapter names is free of the pool again.

        Raises ValueError for an unknown name, RuntimeError inside of `use`.
        """
        self._idle("drop")
        self._check_known(name)
        for layer_name, pooled in list(self._layers.items()):
            pooled.drop(name)
            if not pooled.stacks:
                self._layers.pop(layer_name).leave()
        self._names.remove(name)

    @contextlib.contextmanager
    def use(self, rows: str | Sequence[str | None] | None) -> Iterator[nn.Module]:
        """While it lasts, the model runs with the adapters named; a context manager that gives the model.

        rows: a name, or None for the base, for batches of any size; or a sequence with one for each row of the
        batch. No gradient is recorded inside. A `use` inside another one counts until its own end.

        Raises ValueError for an unknown name, TypeError for what is no name, RuntimeError if a layer was resized
        since its adapters came. A batch of another number of rows raises ValueError in the first layer that one of
        the adapters named changes.
        """
        each_row = None if rows is None or isinstance(rows, str) else list(rows)
        for name in [rows] if each_row is None else each_row:
            if name is not None:
                self._check_known(name)
        if each_row == []:
            raise ValueError("name an adapter, or None for the base, for at least one row")
        for pooled in self._layers.values():
            pooled.check_size()
        before = [(pooled, pooled.now) for pooled in self._layers.values()]
        was_in_use, made = self._in_use, {}
        try:
            self._in_use = True
            for pooled in self._layers.values():
                pooled.now = pooled.plan(rows if each_row is None else each_row, made)
            with torch.no_grad():
                yield self.model
        finally:
            self._in_use = was_in_use
            for pooled, now in before:
                pooled.now = now

    def remove(self) -> nn.Module:
        """Drop every adapter and take the pool out of the model; returns the model, which is what it was."""
        self._idle("remove")
        for pooled in self._layers.values():
            pooled.leave()
        self._layers.clear()
        self._names.clear()
        return self.model

    def _idle(self, what: str) -> None:
        if self._in_use:
            raise RuntimeError(
                f"{what} can't be called while the pool is in use; leave the `with pool.use(…)` block first"
            )

    def _check_known(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"rows must be names of adapters, or None for the base; got {name!r}")
        if name not in self._names:
            there = (
                f"There are: {', '.join(self._names)}"
                if self._names
                else "The pool is empty; add(name, folder) first"
            )
            raise ValueError(
                f"the pool has no adapter called {name!r}{did_you_mean(name, self._names)} {there}"
            )

    def _check_model(self) -> None:
        """Raise ValueError if somebody else's LoRA is in the model."""
        if lora_layers(self.model):
            raise ValueError(
                f"the model has LoRA already, on {next(iter(lora_layers(self.model)))}; remove_lora it first (or "
                "merge it: remove_lora(model, merge=True))"
            )
        ours = {id(each) for each in self._layers.values()}
        for name, module in self.model.named_modules():
            if isinstance(module, _Pooled) and id(module) not in ours:
                raise ValueError(
                    f"the model has another AdapterPool already, on {name.rpartition('.')[0]}; add the adapters to "
                    "that one, or remove() it first"
                )
            if type(module).__module__.startswith("peft."):
                raise ValueError(
                    f"the model is wrapped by PEFT ({type(module).__name__}); take the base out of it first, with "
                    "unload() or merge_and_unload()"
                )

    def _refuse_beside(self, adapter: Adapter) -> None:
        tensors = all_tensors(self.model)
        replaced = list(adapter.rows)
        for name, tensor in adapter.whole.items():
            mine = tensors.get(name)
            if mine is None or mine.shape != tensor.shape or not same_values(mine.detach(), tensor):
                replaced.append(name)
        if replaced:
            raise AdapterError(
                f"the adapter holds its own {replaced[0]} beside the factors, and the adapters of a pool share the "
                "base's; load_adapter takes it, alone on a model"
            )

    def _refuse_layer(self, name: str, layer: nn.Module) -> None:
        try:
            refuse_at(self.model, name, layer, tied="separate")
        except (TypeError, ValueError) as error:
            raise AdapterError(str(error)) from None
        if getattr(layer, "max_norm", None) is not None:
            raise AdapterError(
                f"{name} has max_norm={layer.max_norm}: torch rescales its table in place at every look-up, and the "
                "pool leaves the base's weights alone; load_adapter takes it, alone on a model"
            )


def _scaled(factors: Factors, weight: Tensor) -> tuple[Tensor, Tensor]:
    """lora_A and s · lora_B, on the weight's device."""
    dtype = factors_dtype(factors, weight)
    wide = torch.promote_types(dtype, torch.float32)
    lora_B = (factors.scaling * factors.lora_B.to(wide)).to(dtype)
    return factors.lora_A.to(weight.device, dtype), lora_B.to(weight.device)


class _Now(NamedTuple):
    """What a layer adds at present: the rows that the batch must have (None: any), and the parts for each rank."""

    batch: int | None
    parts: dict[int, list[Part]]


class _Pooled(nn.Module):
    """A layer's adapters, as its child, so that they follow `.to(…)`; its hook adds them to the layer's output.

    They are no buffers: the model's state_dict stays the base's. Not a module in the layer's place, because then a
    layer that computes W x in a way of its own (Conv1D) would have to be computed again, with other rounding.
    """

    def __init__(self, name: str, layer: nn.Module):
        super().__init__()
        self.name = name
        self.embedding = isinstance(layer, nn.Embedding)
        self.shape = weight_shape(layer)
        self.stacks: dict[int, Stack] = {}
        self.now = _Now(None, {})
        self.train(layer.training)
        self._layer = (layer,)  # in a tuple, so that it is not a child
        self._handle = layer.register_forward_hook(self.add, with_kwargs=True)
        layer.add_module(POOLED, self)

    def leave(self) -> None:
        self._handle.remove()
        del self._layer[0]._modules[POOLED]

    def put(self, name: str, lora_A: Tensor, lora_B: Tensor) -> None:
        rank, names, lora_A, lora_B = lora_B.shape[1], [name], lora_A[None], lora_B[None]
        if rank in self.stacks:
            stack = self.stacks[rank]
            names, lora_A, lora_B = (
                [*stack.names, name],
                torch.cat([stack.lora_A, lora_A]),
                torch.cat([stack.lora_B, lora_B]),
            )
        self.stacks[rank] = Stack(names, lora_A, lora_B)

    def drop(self, name: str) -> None:
        for rank, stack in list(self.stacks.items()):
            left = [slot for slot, each in enumerate(stack.names) if each != name]
            if not left:
                del self.stacks[rank]
            elif len(left) < len(stack.names):
                names = [stack.names[slot] for slot in left]
                self.stacks[rank] = Stack(names, stack.lora_A[left], stack.lora_B[left])

    def check_size(self) -> None:
        now = weight_shape(self._layer[0])
        if now != self.shape:
            mine, was = (" × ".join(map(str, each)) for each in (now, self.shape))
            raise RuntimeError(
                f"the weight of {self.name} is {mine} and was {was} when its adapters came (resize_token_embeddings?): "
                "pool.remove(), then resize, then a new pool"
            )

    def plan(self, rows: str | list[str | None] | None, made: dict) -> _Now:
        """What to add for these rows. made: plans by the names in a stack, which most layers have in common."""
        each_row, parts = isinstance(rows, list), {}
        for rank, stack in self.stacks.items():
            slots = {name: slot for slot, name in enumerate(stack.names)}
            device = stack.lora_A.device
            size = stack.lora_B[0].numel() + (0 if self.embedding else stack.lora_A[0].numel())
            key = (device, size, *stack.names)
            if key not in made and each_row:
                made[key] = adapter_parts([slots.get(name, -1) for name in rows], len(slots), size, device)
            elif key not in made:
                made[key] = [(slice(None), slots[rows])] if rows in slots else []
            if made[key]:
                parts[rank] = made[key]
        return _Now(len(rows) if each_row else None, parts)

    def add(self, layer: nn.Module, arguments: tuple, named: dict, out: Tensor) -> Tensor:
        if not self.now.parts:
            return out
        x = arguments[0] if arguments else next(iter(named.values()))
        batch = self.now.batch
        if x.dim() == 0 or (x.dim() == 1 and not self.embedding):
            raise ValueError(
                f"the input of {self.name} must have a batch as its first dimension; it is {tuple(x.shape)}"
            )
        if batch is not None and x.shape[0] != batch:
            raise ValueError(
                f"use() named {batch} rows, and the input of {self.name} has {x.shape[0]}: {tuple(x.shape)}. Name one "
                "adapter, or None for the base, for each row of the batch; what the rows share (positions) must be "
                "given for each of them"
            )
        padding = getattr(layer, "padding_idx", None) if self.embedding else None
        for rank, parts in self.now.parts.items():
            stack = self.stacks[rank]
            out = add_by_row(out, x, stack.lora_A, stack.lora_B, parts, self.embedding, padding)
        return out

    def extra_repr(self) -> str:
        return ", ".join(f"rank {rank}: {len(stack.names)}" for rank, stack in sorted(self.stacks.items()))

    def _apply(self, function, recurse=True):
        super()._apply(function, recurse)
        for rank, stack in self.stacks.items():
            self.stacks[rank] = Stack(stack.names, function(stack.lora_A), function(stack.lora_B))
        return self
