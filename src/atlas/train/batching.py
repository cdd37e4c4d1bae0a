"""`train.batching`: what the config leaves open, what the rows' lengths make of it, and what follows for the trainer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from atlas.config import Config
from atlas.data.batches import GROUP, PACK, PAD, LengthGroups, Work, padded
from atlas.errors import UserError
from atlas.models.adapters import base_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from atlas.device import DevicePlan
    from atlas.train.preflight import Ready

PACKS = "packs"
"""TRL's, which are made before training and hold whole rows up to max_length (train.packing)."""
_WORTH = {PACK: 0.05, GROUP: 0.1}
"""What a way has to save, by the estimate, so that a simpler one is left for it. pack trains the same rows in each step as pad."""
_MIXED = 4
"""Micro-batches of a step from which auto takes groups: a step of one of them is all short or all long rows."""
PADDING_FREE: Mapping[str, Any] = {"padding_free": True, "max_length": None}
_APART = {"full_attention", "sliding_attention", "chunked_attention"}


def open_ways(config: Config) -> tuple[list[str], str]:
    """The ways to batch that the config leaves open, and the keys that leave no more than one. Raises `UserError` for keys that
    contradict each other."""
    train, any_order = config.train, {PAD, PACK, PACKS}
    fits: dict[str, set[str]] = {}
    if train.get("packing"):
        fits["train.packing=true"] = {PACKS}
    if (free := train.get("padding_free")) is not None:
        fits[f"train.padding_free={str(free).lower()}"] = {PACK, PACKS} if free else {PAD, GROUP, PACKS}
    if strategy := train.get("train_sampling_strategy"):
        ways = {"group_by_length": {GROUP}, "batch_rebalance": {PAD, PACKS}}
        fits[f"train.train_sampling_strategy={strategy}"] = ways.get(strategy, any_order)
    if config.data.curriculum != "none":
        fits[f"data.curriculum={config.data.curriculum}"] = any_order
    if config.data.streaming:
        fits["data.streaming=true"] = any_order
    if noise := train.get("neftune_noise_alpha"):  # divided by the root of a batch row's length, which is a pack's here
        fits[f"train.neftune_noise_alpha={noise}"] = {PAD, GROUP, PACKS}
    own = "batching" in config.train_schema.own
    if own and (asked := config.train_value("batching")) != "auto":
        fits[f"train.batching={asked}"] = {asked}
    for number, (key, ways_of_key) in enumerate(fits.items()):
        for other in list(fits)[:number]:
            if not fits[other] & ways_of_key:
                raise UserError(f"{other} and {key} contradict each other: keep one of them")
    known = [PAD, PACK, GROUP] if not train.get("packing") else [PACKS]
    found = [way for way in known if all(way in ways for ways in fits.values())]
    found = found if own else found[:1]  # else as the phase's trainer has it
    alone = [key for key, ways_of_key in fits.items() if len(ways_of_key) == 1]
    return found, " and ".join(alone or fits) if len(found) == 1 else ""


def packs_apart(model: "PreTrainedModel") -> bool:
    """Does the model keep the rows of a pack apart? transformers' attention does, by a mask made from `position_ids`; a layer that
    carries a state from token to token may not."""
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return model.is_backend_compatible() and {*layers} <= _APART


def row_by_row(plan: "DevicePlan", text_config: Any) -> bool:
    """Does attention take each row of a pack by itself? Else it looks at all pairs of positions in it, under a mask."""
    layers = {*(getattr(text_config, "layer_types", None) or ())}
    by_atlas = plan.device == "cpu" and plan.attn_implementation == "sdpa" and layers <= {"full_attention"}
    return by_atlas or "flash" in plan.attn_implementation


def joins(text_config: Any) -> bool:
    """Does a row's loss stay the same in a larger micro-batch? Some rotary embeddings depend on the longest row beside it."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    return "longrope" not in str(rope) and "dynamic" not in str(rope)


def work(ready: "Ready") -> Work:
    """What the model costs on this machine, in units of one token's linear layers.

    Each weight of a linear layer takes 4 operations for a token (forward, and backward to the layer's input), and 6 where it is
    trained itself. Two positions take 14 for each layer and each number of its heads (forward 4, backward 10). On a CPU both run at
    about the same rate: a pair measured 2.0e-3 tokens with 1 M parameters, 1.1e-4 (packs of 1,024) and 2.5e-4 (2,048) with 0.5B; by
    this formula 2.1e-3 and 2.1e-4. On a GPU attention is taken to reach half of the rate, which has not been measured. A
    micro-batch of no length measured 35 tokens' work with 0.5B in NF4 (it dequantises all weights), and 190 with 1 M (it starts
    operations).
    """
    config = ready.empty.config.get_text_config()
    heads, hidden, layers = (
        getattr(config, name, None) or 0 for name in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    width = heads * (getattr(config, "head_dim", None) or hidden // max(heads, 1))
    rate = 0.5 if ready.plan.device == "cuda" else 1
    linear = max(ready.shape.linear, 1)
    return Work(
        pair=14 / (4 if ready.loaded.config.lora is not None else 6) * layers * width / linear / rate,
        each=35 + 3.5e7 * layers / linear,
        by_row=row_by_row(ready.plan, config),
        flash="flash" in ready.plan.attn_implementation,
    )


@dataclass(frozen=True)
class Batching:
    """How a run's rows stand in micro-batches."""

    way: str
    reason: str
    before: float | None = None
    """Share of padding in the tokens of an epoch in random (or the given) order, padded; None: lengths are not known."""
    after: float | None = None
    """The same as it is trained."""
    follows: Mapping[str, Any] = field(default_factory=dict)
    """What follows for the trainer's arguments. Rows are cut already, so TRL need not know max_length, which it refuses beside
    padding_free."""
    streamed: bool = False
    what: str = "rows"
    """What the phase's rows are."""

    @staticmethod
    def of(ready: "Ready", lengths: np.ndarray | None, kept: str, read: np.ndarray | None = None) -> "Batching":
        """The one way for a run. `lengths`: tokens of each row in the dataset's order, or of a stream's first rows. `kept`: the way
        of the checkpoint from which the run resumes, or nothing. `read`: tokens of all sequences of a row, where it has several.
        Raises `UserError` where it cannot be had."""
        config, arguments = ready.loaded.config, ready.arguments
        ways, reason = open_ways(config)
        apart = packs_apart(base_of(ready.empty))
        if ways == [PACK] and not apart:
            raise UserError(
                f"{reason}: a model of type {ready.empty.config.model_type} may not keep rows apart in a pack"
            )
        if lengths is None:
            if ways[0] == GROUP:
                raise UserError(f"{reason}: the lengths of the rows of phase {config.phase} are not known")
            return Batching(ways[0], reason or "the lengths of the rows are not known")
        ways = [way for way in ways if way != PACK or apart]
        rows, model, sequences = arguments.per_device_train_batch_size, work(ready), config.train_schema.sequences
        read = lengths if read is None else read
        order = np.arange(len(lengths))
        if arguments.train_sampling_strategy != "sequential":
            order = np.random.default_rng(arguments.seed).permutation(order)
        # Of one sequence: padded it is as long as the longest one of its row, in a pack as long as it is.
        orders = {PAD: lengths[order], PACK: read[order] / sequences}
        orders[GROUP] = lengths[sampler(lengths, arguments).order()]
        # Of a stream only the first rows are known.
        may_join = model.by_row and not arguments.dataloader_drop_last and not config.data.streaming
        may_join = may_join and joins(ready.empty.config.get_text_config())
        joined = larger(arguments, lengths) if may_join else {}
        of_pack = joined.get("per_device_train_batch_size", rows)
        costs = {way: model.of(way, orders[way], of_pack if way == PACK else rows) for way in ways if way != PACKS}
        if len(ways) > 1 and arguments.gradient_accumulation_steps * arguments.world_size < _MIXED and kept != GROUP:
            ways = [way for way in ways if way != GROUP]
        way = ways[0]
        for other in ways[1:]:
            way = other if costs[other] < costs[way] * (1 - _WORTH[other]) else way
        if kept in ways:
            way, reason = kept, reason or "as in the checkpoint"
        elif not reason and len(ways) > 1:
            needs = [f"{other} {costs[other] / costs[PAD]:.0%}" for other in ways if other != PAD]
            reason = f"by the estimate {' and '.join(needs)} of the work of pad"
            if way == PAD:
                reason += ", which saves too little" if rows > 1 else ": each micro-batch is one row"
        reason = reason or "the phase knows no other"
        if way == PACKS and rows > 1 and not model.by_row and arguments.packing_strategy != "wrapped":
            steps = rows * arguments.gradient_accumulation_steps
            reason += (
                f"; attention looks at all pairs of the {rows} packs of a micro-batch, so "
                f"train.per_device_train_batch_size=1 with train.gradient_accumulation_steps={steps} would be faster"
            )
        multiple = getattr(arguments, "pad_to_multiple_of", None)
        multiple = multiple if isinstance(multiple, int) else 1
        tokens = read.sum()
        before = 1 - tokens / padded(orders[PAD], rows, multiple) / sequences
        after = 1 - tokens / padded(orders.get(way, orders[PAD]), rows, multiple) / sequences
        if way in (PACK, PACKS):
            after = 1 - tokens / padded(read[order], rows, multiple, packed=True)
        follows = dict(PADDING_FREE if way == PACK else {})
        if way == GROUP:
            follows["shuffle_dataset"] = False  # each epoch is
        if way == PACK:
            follows |= joined
        what = config.train_schema.rows
        shares = round(float(before), 4), round(float(after), 4)
        return Batching(way, reason, *shares, follows, streamed=config.data.streaming, what=what)

    def apply(self, arguments: "TrainingArguments") -> None:
        for name, value in self.follows.items():
            if hasattr(arguments, name):
                setattr(arguments, name, value)

    def manifest(self) -> dict[str, Any]:
        return {"way": self.way, "reason": self.reason, "padding_before": self.before, "padding": self.after}

    def sampler(self, arguments: "TrainingArguments", lengths: np.ndarray | None) -> LengthGroups | None:
        return sampler(lengths, arguments) if self.way == GROUP and lengths is not None else None

    def line(self, arguments: "TrainingArguments", read: np.ndarray, count: int) -> str:
        """What was chosen and what a step holds. `read`: tokens of each row, of both sides of a pair. `count`: of rows, or of TRL's
        packs."""
        step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        what, most = self.what, int(np.sort(read)[-step:].sum())
        if self.way == PACKS:
            what, most = "packs", min(step * arguments.max_length, int(read.sum()))
        step = step if self.streamed else min(step, count)
        joined, sides = "", " of both sides" if self.what == "pairs" else ""
        if "gradient_accumulation_steps" in self.follows:
            joined = f", in micro-batches of {arguments.per_device_train_batch_size} {self.what}"
        return (
            f"batching {self.way} ({self.reason}): padding {self.before:.1%} -> {self.after:.1%}; a step holds {step:,} {what}, "
            f"{step * read.sum() / count:,.0f} tokens{sides} on average, at most {most:,}{joined}"
        )


def sampler(lengths: np.ndarray, arguments: "TrainingArguments") -> LengthGroups:
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    return LengthGroups(lengths, arguments.per_device_train_batch_size, arguments.world_size, seed)


def larger(arguments: "TrainingArguments", lengths: np.ndarray) -> dict[str, int]:
    """More rows in a micro-batch, fewer micro-batches in a step: where attention takes a pack row by row, a long one costs no more,
    and 4-bit weights are dequantised once per micro-batch. No more tokens than as many rows of max_length as were asked for.
    Nothing where there is nothing to join."""
    rows, steps = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    longest = np.sort(lengths)[::-1]
    most = rows * (getattr(arguments, "max_length", None) or int(longest[0]))
    fits = [times for times in range(1, steps + 1) if steps % times == 0 and longest[: rows * times].sum() <= most]
    times = max(fits, default=1)
    if times == 1:
        return {}
    return {"per_device_train_batch_size": rows * times, "gradient_accumulation_steps": steps // times}
