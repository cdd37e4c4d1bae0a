"""How much memory training has in use at its peak, from the model's shape; benchmarks/memory.py compares it with measured peaks.
A process may hold more of it than is in use: on a CPU up to 1.7 times as much was measured."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from atlas.config import Config
from atlas.config.schema import NONE
from atlas.data.batches import PACK
from atlas.device import DevicePlan
from atlas.train.batching import PACKS, open_ways
from atlas.train.strategy import DDP, FSDP2, SHARDED, SINGLE, ZERO2, ZERO3

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

HEAD_BYTES = 2 * 128 * 2**20  # at most: one chunk's logits and their exponentials (train/head.py)
LENGTH_IF_OPEN = 1024
# Bytes that `train.optim` keeps for a trained number, where it is not AdamW with two moments in float32: none, or sums of rows and
# columns, or one byte for each moment. In 8 bits bitsandbytes leaves embeddings and norms out (transformers asks it to).
STATE = {"sgd": 0, "adafactor": 0, "lion_32bit": 4, "lion_8bit": 1, "paged_lion_8bit": 1} | dict.fromkeys(
    ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), 2
)
LIVE = 10**9  # DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance


class Shape(NamedTuple):
    """What memory depends on, as read from a model without weights."""

    linear: int
    """Parameters of the layers that 4 bits apply to."""
    other: int
    """Parameters of all others: embeddings, norms, biases."""
    trained: int
    """Of the adapter, or with full fine-tuning all."""
    layers: int
    hidden: int
    attention: int
    """Heads times their size."""
    heads: int
    mlp: int
    gate: int
    """Numbers that the activation of a layer keeps for the backward pass of a token, its product apart."""
    vocabulary: int
    largest: int
    """Parameters of the largest layer of `linear`."""
    lora_inputs: int
    """Sizes of the inputs of all modules with an adapter, summed up; 0 without one."""

    @staticmethod
    def of(model: "PeftModel | PreTrainedModel") -> "Shape":
        import torch
        from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

        from atlas.models.swiglu import gated_layers

        config, head = model.config.get_text_config(), model.get_output_embeddings()
        linear = [
            module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not head and "lora_" not in name
        ]
        added = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
        sizes = [layer.weight.numel() for layer in linear]
        total = sum(p.numel() for p in model.parameters()) - added
        adapted = [
            module for module in model.modules() if getattr(module, "lora_A", None) and hasattr(module, "in_features")
        ]
        heads = config.num_attention_heads
        mlp = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        return Shape(
            linear=sum(sizes),
            other=total - sum(sizes),
            trained=added or total,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            attention=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
            heads=heads,
            mlp=mlp,
            gate=(2 if gated_layers(model) else 3) * mlp,
            vocabulary=model.get_input_embeddings().weight.shape[0],
            largest=max(sizes),
            lora_inputs=sum(module.in_features for module in adapted),
        )


class PerDevice(NamedTuple):
    """Bytes on each device, whatever the micro-batch is."""

    frozen: int
    """Weights that are not trained."""
    trained: int
    """Weights that are trained: in float32, and the copy in half precision that DeepSpeed computes with."""
    gradients: int
    optimizer: int
    """AdamW's two moments, or what `STATE` says of `train.optim`."""
    passing: int
    """What comes and goes: gradients in the buckets that are sent, gathered layers, weights in another precision."""
    stepping: int
    """DeepSpeed's gradients and their copies at the optimizer's step, when activations and what else passes are gone."""

    def peak(self, activations: int = 0) -> int:
        """In all, with so many bytes of activations."""
        kept = self.frozen + self.trained + self.optimizer
        return kept + max(self.gradients + self.passing + activations, self.stepping)


def per_device_bytes(
    config: Config, plan: DevicePlan, shape: Shape, strategy: str = SINGLE, processes: int = 1
) -> PerDevice:
    """What weights, gradients and optimizer take on each of so many processes.

    NF4: half a byte per weight and one constant per 64 of them, of 4 bytes, or, quantised again, of 1 byte and 4/256
    (https://arxiv.org/abs/2305.14314, section 3). Parts: the stages of ZeRO (https://arxiv.org/abs/1910.02054, section 5), FSDP
    shards as stage 3 does. What the libraries add was read in accelerate 1.15, torch 2.13 and DeepSpeed 0.19, and compared with two
    processes on a CPU (benchmarks/scaling.py).
    """
    width, numbers, full = 4 if plan.dtype == "float32" else 2, shape.trained, config.lora is None
    each = 0.5 + (1 + 4 / 256 if config.quantization.bnb_4bit_use_double_quant else 4) / 64
    linear = shape.linear * (each if config.quantization.load_in_4bit else width)
    frozen = 0 if full else linear + shape.other * width
    if config.train_schema.reference and config.model.adapter != NONE:
        frozen += 4 * numbers  # the reference adapter, in float32
    parts = processes if strategy in SHARDED else 1

    kept, gradient, of_optimizer, stepping = 4.0 * numbers / parts, 4 * numbers / parts, parts, 0.0
    # Autocast's copies of what is trained, which are kept until the forward pass has ended.
    passing = 0.0 if width == 4 else 2 * (shape.linear if full else numbers)
    if strategy == DDP:
        passing += 4 * numbers  # the buckets
    elif strategy in (ZERO2, ZERO3):
        # The float32 numbers lie in parts beside those that it computes with, which have its gradients' precision.
        kept, of_optimizer = width * numbers / parts + 4 * numbers / processes, processes
        gradient = width * numbers / processes
        # A bucket (launch/zero2.yaml), and the copy of the one gradient that is far larger.
        embeddings = shape.vocabulary * shape.hidden if full else 0
        passing = width * (shape.hidden**2 + embeddings)
        if strategy == ZERO3:  # It gives back only what is not used again within a billion numbers.
            passing += min(1, LIVE / (shape.linear + shape.other)) * (linear + shape.other * width)
        # The gradients as they came and in one tensor, then that in float32. Before, the norm's copy of one in 64 bits.
        stepping = max(8 * numbers / processes, gradient + 8 * min(embeddings, numbers / processes))
    elif strategy == FSDP2:
        # A layer and the next one, what is outside the layers, and a layer's gradients before and after they are sent.
        of_a_layer, outside = (shape.linear if full else numbers) / shape.layers, shape.other if full else 0
        passing = 2 * linear / shape.layers + shape.other * width + (width + 4) * (of_a_layer + outside)
    state = STATE.get(config.train_value("optim"), 8)
    moments = state * numbers + (3 * state * shape.other if full and state in (1, 2) else 0)
    found = frozen / parts, kept, gradient, moments / of_optimizer, passing, stepping
    return PerDevice(*map(int, found))


def sent_bytes(config: Config, plan: DevicePlan, shape: Shape, strategy: str, processes: int) -> int:
    """What each process sends to others in an optimizer step: (N - 1) / N of what is gathered or scattered, as in a ring. DDP sends
    gradients twice round once a step, the others in each micro-batch (https://arxiv.org/abs/1910.02054, section 7)."""
    width, numbers = 4 if plan.dtype == "float32" else 2, shape.trained
    whole = per_device_bytes(config, plan, shape).frozen + width * numbers  # as it computes
    batches = config.train_value("gradient_accumulation_steps")
    passed = {
        DDP: 2 * 4 * numbers,
        # Gradients, which DeepSpeed sends to all (use_multi_rank_bucket_allreduce); at the end what is trained, from its owner.
        ZERO2: (2 * batches + 1) * width * numbers,
        ZERO3: batches * (2 * whole + width * numbers),  # layers in the forward and the backward pass; gradients
        FSDP2: batches * (2 * whole + 4 * numbers),
    }
    return int(passed.get(strategy, 0) * (processes - 1) / processes)


def largest_batch(
    config: Config, way: str | None = None, lengths: np.ndarray | None = None, rows: int | None = None
) -> tuple[int, int]:
    """Rows and tokens a row of the largest micro-batch, as the model gets it: the rows of a pack are one, those of a pair two.

    `way` to batch (None: as the config says so far), `lengths` in tokens of all rows (None: each may have max_length), `rows` of a
    micro-batch (None: as in the config).
    """
    sequences = config.train_schema.sequences
    rows = (rows or int(config.train_value("per_device_train_batch_size"))) * sequences
    way = way or open_ways(config)[0][0]
    known = config.train_value("max_length") if "max_length" in config.train_schema.fields() else None
    most = int(known or LENGTH_IF_OPEN)
    longest = [most] * rows if lengths is None or way == PACKS else np.repeat(np.sort(lengths), sequences)[-rows:]
    return (1, int(sum(longest))) if way == PACK else (rows, int(max(longest)))


def activation_bytes(
    config: Config, plan: DevicePlan, shape: Shape, checkpointing: bool, batch: tuple[int, int], masked: bool
) -> int:
    """What a training step on a micro-batch takes at its peak beside `per_device_bytes`. `batch`: its rows and the tokens of one.
    `masked`: attention looks at all pairs of a pack's positions, under a mask."""
    rows, length = batch
    tokens, width = rows * length, 4 if plan.dtype == "float32" else 2
    fp32_cpu = plan.device == "cpu" and width == 4
    hidden, attention, mlp = shape.hidden, shape.attention, shape.mlp

    # Of one token in one layer, kept for the backward pass:
    # The inputs of the two norms, which compute in float32, and what their weights multiply where these are trained.
    norms = (2 if config.lora is not None else 4) * hidden * 4
    # query, and key and value repeated for each head of it, and the result
    heads = 4 * attention * width
    gate = shape.gate * width
    # The inputs of the adapter's modules, or of the trained layers. q, k, v have one in common, and gate, up. Dropout keeps a mask
    # of one byte for each module, and, but for models/dropout.py, each one's own dropped input.
    own, common = shape.lora_inputs / shape.layers, 2 * hidden + attention + mlp
    dropout = config.lora is not None and config.lora.lora_dropout > 0
    inputs = common * width + own * dropout if fp32_cpu or not dropout else own * (width + 1)
    scores = shape.heads * length * (4 if width == 4 else 6) if plan.attn_implementation == "eager" else 0
    layer = tokens * (norms + heads + gate + inputs + scores)
    # The mask of all pairs, and attention's copy of it.
    mask = 2 * 4 * tokens * length if masked else 0

    # On top of what is kept: the head's chunks with the hidden states and their gradient, or a layer's backward pass.
    logits = min(HEAD_BYTES, 2 * tokens * shape.vocabulary * 4)
    if config.lora is None:
        logits += shape.vocabulary * hidden * 4  # the gradient of the head's weight
    head = logits + 3 * tokens * hidden * width
    # Gradients of gate, its SiLU, up and their product; one weight of a layer, dequantised
    backward = tokens * 4 * mlp * width + (shape.largest * width if config.quantization.load_in_4bit else 0)
    kept = shape.layers * (tokens * hidden * width if checkpointing else layer)
    peak = max(head, backward + (layer if checkpointing else 0))
    return int(kept + mask + peak)
