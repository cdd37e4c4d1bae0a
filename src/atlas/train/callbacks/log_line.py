"""One line of progress per `train.logging_steps`."""

import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas.console import duration


class LogLine(TrainerCallback):
    """Prints loss, of pairs what the rewards say, learning rate, gradient norm, tokens per second (supervised ones too, where they
    are logged), memory and time left, which counts from `begin`."""

    def begin(self, state: TrainerState) -> None:
        """Training begins, or goes on from a checkpoint that has been restored."""
        self._began = (time.perf_counter(), state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:  # `logging_steps` may not meet the last one, whose loss is the result
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            print(
                f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}{_rewards(logs, 'eval_')}",
                flush=True,
            )
        if "loss" not in logs:
            return
        steps = max(state.global_step - self._began[1], 1)
        left = (time.perf_counter() - self._began[0]) / steps * (state.max_steps - state.global_step)
        rates = {" supervised tok/s": "supervised_tokens_per_second", " tok/s": "tokens_per_second"}
        width = len(str(state.max_steps))
        parts = [
            f"step {state.global_step:>{width}}/{state.max_steps}",
            f"loss {logs['loss']:.4f}{_rewards(logs)}",
            f"lr {logs['learning_rate']:.2e}",
            f"grad {logs['grad_norm']:.3f}" if "grad_norm" in logs else "grad skipped",  # by the loss scaler
            *(f"{logs[name]:,.0f}{unit}" for unit, name in rates.items() if logs.get(name, 0) > 0),
            *([f"{logs['peak_memory_gib']:.2f} GiB"] if "peak_memory_gib" in logs else []),
            f"{duration(left)} left",
        ]
        print("  ".join(parts), flush=True)


def _rewards(logs: Mapping[str, float], prefix: str = "") -> str:
    """Of pairs: how many are the right way round, and by how much."""
    if f"{prefix}rewards/margins" not in logs:
        return ""
    return f"  pairs right {logs[f'{prefix}rewards/accuracies']:.0%}  margin {logs[f'{prefix}rewards/margins']:+.3f}"
