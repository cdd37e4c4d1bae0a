"""Phase dpo: its loss against one that is written by hand, its reference, the adapter that it saves, and what it refuses."""

import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from atlas.config import load_config
from atlas.errors import RunError
from atlas.files import sha256
from atlas.models.adapters import base_of
from atlas.train import dpo, preflight
from atlas.train.checkpoints import checkpoints
from atlas.train.dpo import DPO, LOSSES
from atlas.train.preflight.estimate import per_device_bytes
from atlas.train.run import FinishedRun, open_run
from hub_commands import atlas
from hub_server import HubServer
from runs import Started, TrainedRun, broken_off, loaded, pair_arguments, together, trace, train_pairs

WEIGHTS = "adapter_model.safetensors"
LN2 = math.log(2)
FP32 = ["quantization.load_in_4bit=false"]
# The trained weights change by the gradient itself.
SGD = ["train.optim=sgd", "train.learning_rate=2", "train.lr_scheduler_type=constant", "train.max_grad_norm=0"]
Rows = list[dict[str, list[int]]]


def losses(run: FinishedRun) -> list[float]:
    assert run.trainer is not None
    return [line["loss"] for line in run.trainer.state.log_history if "loss" in line]


class ByHand:
    """DPO as its paper has it (https://arxiv.org/abs/2305.18290, equation 7), in float64: log-probabilities from the full logits of
    each side by itself, without padding, and a second whole model as the reference, with the adapter merged into its weights."""

    def __init__(self, base: Path, adapter: Path, beta: float = 0.1) -> None:
        models = [AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64) for _ in range(2)]
        policy, reference = (PeftModel.from_pretrained(model, adapter, is_trainable=True).double() for model in models)
        self.policy, self.reference, self.beta = policy.eval(), reference.merge_and_unload().eval(), beta

    @staticmethod
    def log_prob(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert logits.dtype == torch.float64
        return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].sum()

    def margins(self, rows: Rows) -> torch.Tensor:
        """Of the rewards, without beta: what the loss of each pair is made of."""
        found = []
        for row in rows:
            sides = []
            for side in ("chosen_ids", "rejected_ids"):
                with torch.no_grad():
                    reference = self.log_prob(self.reference, row["prompt_ids"], row[side])
                sides.append(self.log_prob(self.policy, row["prompt_ids"], row[side]) - reference)
            found.append(sides[0] - sides[1])
        return torch.stack(found)

    def loss(self, rows: Rows, smoothing: float = 0.0) -> torch.Tensor:
        """`smoothing`: the share of wrong pairs that `robust` takes out of the loss (https://arxiv.org/abs/2403.00409)."""
        margins, log = self.beta * self.margins(rows), torch.nn.functional.logsigmoid
        return (-(1 - smoothing) * log(margins) + smoothing * log(-margins)).mean() / (1 - 2 * smoothing)

    def train(self, rows: Rows, steps: int, rate: float, smoothing: float = 0.0) -> list[float]:
        """Plain gradient descent, all rows in each step; the losses."""
        trained, found = [p for p in self.policy.parameters() if p.requires_grad], []
        for _ in range(steps):
            loss = self.loss(rows, smoothing)
            found.append(loss.item())
            with torch.no_grad():
                for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                    parameter -= rate * gradient
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(self.policy)


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """The largest difference of two adapters, as a share of the largest change since the start."""
    assert found.keys() == expected.keys() == start.keys()
    change = max((expected[name].double() - start[name].double()).abs().max() for name in start)
    return float(max((found[name].double() - expected[name].double()).abs().max() for name in start) / change)


# 5 pairs are one step, in micro-batches of these sizes.
WAYS: dict[str, tuple[int, int, list[str]]] = {
    "at once": (5, 1, []),
    "2 + 2 + 1": (2, 3, []),
    "4 + 1, padded": (4, 2, ["train.batching=pad"]),
    "2 + 2 + 1, by length": (2, 3, ["train.batching=group"]),
    "2 + 2 + 1, in a row": (2, 3, ["train.batching=pack"]),
    "eager, in a row": (5, 1, ["train.batching=pack", "model.attn_implementation=eager"]),
    "checkpointing": (2, 3, ["train.gradient_checkpointing=true"]),
}


@pytest.fixture(scope="session")
def rows(trained_run: TrainedRun, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Those of the runs below."""
    with open_run(
        DPO, loaded(pair_arguments(trained_run, f"{pairs_file}:5", tmp_path_factory.mktemp("rows"))), "never"
    ) as run:
        run.prepare()
        return [*run.train_dataset]


@pytest.fixture(scope="session")
def by_hand(trained_run: TrainedRun, rows: Rows) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps by hand, and the adapter after them."""
    hand = ByHand(trained_run.base, trained_run.folder)
    return hand.train(rows, 3, 2), hand.weights()


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradients_are_those_of_a_float64_computation(
    way: str, by_hand, dpo_args: list[str], trained_run: TrainedRun, pairs_file: Path
):
    """5e-7 is measured. The reference of a run is an adapter, that of the computation a second model."""
    expected, weights = by_hand
    each, steps, more = WAYS[way]
    sizes = [f"train.per_device_train_batch_size={each}", f"train.gradient_accumulation_steps={steps}"]
    run = train_pairs(dpo_args, *FP32, *SGD, *sizes, *more, f"data.train={pairs_file}:5")
    assert losses(run) == pytest.approx(expected, abs=1e-5)
    assert expected[0] == pytest.approx(LN2, abs=1e-9) and expected[0] - expected[2] > 0.01
    assert apart(load_file(run.folder / WEIGHTS), weights, load_file(trained_run.folder / WEIGHTS)) < 1e-5


class Stock(DPOTrainer):
    """TRL's trainer, on rows that are tokenised already."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def test_trl_weighs_a_smaller_micro_batch_more(by_hand, trained_run: TrainedRun, rows: Rows, tmp_path: Path):
    """So that a pair alone in its micro-batch counts as much as two: half of the update is another one. At once TRL is exact. The
    day that this fails, TRL takes the mean over the step as well."""
    start, found = load_file(trained_run.folder / WEIGHTS), {}
    for each, steps in ((5, 1), (2, 3)):
        base = AutoModelForCausalLM.from_pretrained(trained_run.base, dtype=torch.float32)
        arguments = DPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            gradient_checkpointing=False,
            optim="sgd",
            learning_rate=2,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            max_steps=3,
            max_length=None,
            per_device_train_batch_size=each,
            gradient_accumulation_steps=steps,
        )
        trainer = Stock(
            model=PeftModel.from_pretrained(base, trained_run.folder, is_trainable=True),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(trained_run.folder),
        )
        trainer.train()
        found[each] = apart(get_peft_model_state_dict(trainer.model), by_hand[1], start)
    assert found[5] < 1e-5 and found[2] > 0.1, found


@pytest.mark.parametrize(
    "kind",
    [[], [*FP32, "model.dtype=bfloat16"], ["model.dtype=bfloat16"], ["train.gradient_checkpointing=true"]],
    ids=["NF4", "bf16", "NF4, bf16", "checkpointing"],
)
def test_policy_and_reference_begin_as_one(kind: list[str], dpo_args: list[str]):
    """Also where TRL leaves the policy in bf16 and the reference in float32, and under autocast."""
    run = train_pairs(dpo_args, *kind, "train.max_steps=1", "train.per_device_train_batch_size=4")
    first = next(line for line in run.trainer.state.log_history if "loss" in line)
    assert first["loss"] == pytest.approx(LN2, abs=1e-6)
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0.0
    adapters = {n: p for n, p in run.trainer.model.named_parameters() if "lora_" in n}
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    assert {n for n, p in adapters.items() if p.requires_grad} == {n for n in adapters if ".default." in n}


BETA, SMOOTHING = 0.1, 0.1
# Of equal models, from the formulas in the papers that TRL names beside each. `sft` is the mean over the chosen tokens.
START = dict.fromkeys(("sigmoid", "robust", "aot", "aot_unpaired", "sigmoid_norm"), LN2)
START |= {"hinge": 1, "ipo": (1 / (2 * BETA)) ** 2, "sppo_hard": 2 * (0.5 / BETA) ** 2, "apo_zero": 1, "apo_down": 1}
START |= {"nca_pair": 2 * LN2, "bco_pair": 2 * LN2, "discopop": (LN2 + 1) / 2}
START |= {"exo_pair": -LN2 - (math.log(1 - SMOOTHING) + math.log(SMOOTHING)) / 2}


def test_each_loss_of_trl_takes_a_step_from_where_equal_models_begin(dpo_args: list[str], trained_run: TrainedRun):
    more = ["train.loss_type=[robust]", f"train.label_smoothing={SMOOTHING}", "train.per_device_train_batch_size=5"]
    with open_run(DPO, loaded([*dpo_args, *FP32, *more]), "never") as run:
        run.prepare()
        trainer = run.trainer(run.load_base_model())
        batch = next(iter(trainer.get_train_dataloader()))
        hand = ByHand(trained_run.base, trained_run.folder)
        scored = [
            (mask.nonzero()[0, 0], ids[: mask.nonzero().max() + 1].tolist())
            for ids, mask in zip(*(batch[name][:5] for name in ("input_ids", "completion_mask")), strict=True)
        ]
        with torch.no_grad():
            chosen = sum(hand.log_prob(hand.policy, ids[:start], ids[start:]) for start, ids in scored)
        start = START | {"sft": -float(chosen) / int(batch["completion_mask"][:5].sum())}
        assert {*start} == {*LOSSES}
        trainer.model.train()
        for name, expected in start.items():
            trainer.loss_types = [name]
            trainer.model.zero_grad()
            loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(5))
            assert float(loss) == pytest.approx(expected, rel=1e-5), name
            halves = trainer.halves(batch)
            assert (len(halves) == 1) == (name in ("aot", "aot_unpaired", "sft"))
            parts = [trainer.compute_loss(trainer.model, half, num_items_in_batch=torch.tensor(5)) for half in halves]
            assert sum(map(float, parts)) == pytest.approx(float(loss), rel=1e-5), name
            loss.backward()
            norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]).norm()
            assert 0 < norm < math.inf, name
        trainer.loss_types = ["nosuch"]
        with pytest.raises(ValueError) as raised:
            trainer.compute_loss(trainer.model, dict(batch))
        assert tuple(re.findall(r"'(\w+)'", str(raised.value).partition("one of")[2])) == LOSSES  # as atlas lists them


def test_label_smoothing(dpo_args: list[str], trained_run: TrainedRun, rows: Rows, pairs_file: Path, capfd):
    """Three steps of the loss that takes it, against the formula. TRL's `sigmoid` takes no notice of it."""
    hand = ByHand(trained_run.base, trained_run.folder)
    expected = hand.train(rows, 3, 2, smoothing=0.2)
    asked = [*dpo_args, *FP32, *SGD, f"data.train={pairs_file}:5", "train.per_device_train_batch_size=5"]
    run = train_pairs(asked, "train.loss_type=[robust]", "train.label_smoothing=0.2")
    assert losses(run) == pytest.approx(expected, abs=1e-5)
    assert apart(load_file(run.folder / WEIGHTS), hand.weights(), load_file(trained_run.folder / WEIGHTS)) < 1e-5
    for more, said in (
        (["train.label_smoothing=0.2"], "train.label_smoothing=0.2: the loss sigmoid takes no notice of it"),
        (["train.loss_type=[exo_pair]"], "exo_pair"),
        (["train.loss_type=[sigmoids]"], "train.loss_type=sigmoids: TRL has no such loss"),
        (["train.beta=0"], "train.beta must be above 0"),
    ):
        assert preflight.main([*dpo_args, *more]) == 2
        assert said in (message := "".join(capfd.readouterr())), message


@pytest.mark.parametrize("each", [1, 3, 7])
def test_the_held_out_loss_is_the_mean_over_the_pairs(
    each: int, dpo_args: list[str], trained_run: TrainedRun, pairs_file: Path
):
    asked = [*dpo_args, *FP32, "train.learning_rate=1e-2", "data.eval_rows=7", f"data.train={pairs_file}"]
    run = train_pairs(asked, f"train.per_device_eval_batch_size={each}")
    held_out = [*run.trainer.eval_dataset]
    assert len(held_out) == 7
    hand = ByHand(trained_run.base, trained_run.folder)
    hand.policy.load_adapter(run.folder, "trained")
    hand.policy.set_adapter("trained")
    with torch.no_grad():
        margins = hand.beta * hand.margins(held_out)
    line = next(line for line in run.trainer.state.log_history if "eval_loss" in line)
    found = [line["eval_loss"], line["eval_rewards/margins"], line["eval_rewards/accuracies"]]
    expected = [-torch.nn.functional.logsigmoid(margins), margins, (margins > 0).double()]
    assert found == pytest.approx([float(values.mean()) for values in expected], abs=1e-5)
    assert abs(found[0] - LN2) > 1e-3 and run.manifest["result"]["eval_loss"] == found[0]


# The adapter


def test_one_adapter_comes_out_and_loads_like_any_other(dpo_args: list[str], trained_run: TrainedRun):
    run = train_pairs(dpo_args, *FP32, "train.save_steps=1", "train.learning_rate=1e-2")
    assert [path.name for path in checkpoints(run.folder)] == ["checkpoint-3", "checkpoint-2"]
    names = {*load_file(trained_run.folder / WEIGHTS)}
    for folder in (run.folder, *checkpoints(run.folder)):
        assert [
            path.relative_to(folder)
            for path in folder.rglob(WEIGHTS)
            if "checkpoint" not in str(path.relative_to(folder))
        ] == [Path(WEIGHTS)]
        assert not [*folder.rglob("ref")] and {*load_file(folder / WEIGHTS)} == names
    assert run.manifest["adapter_sha256"] == sha256(run.folder / WEIGHTS) != sha256(trained_run.folder / WEIGHTS)
    assert 0.001 < run.manifest["result"]["adapter_change"] < 1
    settings = [json.loads((folder / "adapter_config.json").read_text()) for folder in (run.folder, trained_run.folder)]
    same = ("r", "lora_alpha", "target_modules", "task_type", "peft_type", "base_model_name_or_path")
    assert [{*settings[0][n]} if n == "target_modules" else settings[0][n] for n in same] == [
        {*settings[1][n]} if n == "target_modules" else settings[1][n] for n in same
    ]
    base = AutoModelForCausalLM.from_pretrained(trained_run.base, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(run.folder)(trained_run.text, return_tensors="pt")
    with torch.no_grad():
        live = run.trainer.model.eval()(**ids).logits
        again = PeftModel.from_pretrained(base, run.folder).eval()
        assert [*again.peft_config] == ["default"]
        assert torch.equal(again(**ids).logits, live)
    assert not torch.allclose(live, trained_run.logits, atol=1e-3)


def another(trained_run: TrainedRun, folder: Path, change: Callable[[dict], dict] | None = None) -> Path:
    """A copy of the SFT adapter; one with other numbers has no manifest that could say what they were."""
    shutil.copytree(trained_run.folder, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    if change is not None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / "manifest.json").unlink()
    return folder


def test_the_adapters_own_settings_win(dpo_args: list[str], trained_run: TrainedRun, tmp_path: Path, capfd):
    small = another(
        trained_run,
        tmp_path / "small",
        lambda tensors: {n: (t[:4] if "lora_A" in n else t[:, :4]).contiguous() for n, t in tensors.items()},
    )
    settings = json.loads((small / "adapter_config.json").read_text())
    (small / "adapter_config.json").write_text(json.dumps(settings | {"r": 4, "lora_alpha": 12}))
    asked = [*dpo_args, f"model.adapter={small}"]
    run = train_pairs([*asked, "lora.r=4", "train.max_steps=1"])
    assert "adapter r=4 alpha=12: " in capfd.readouterr().out
    assert [run.manifest["config"]["lora"][name] for name in ("r", "lora_alpha")] == [4, 12]
    assert dpo.main([*asked, "train.max_steps=1", "--print-config"]) == 0
    printed = capfd.readouterr().out
    assert re.search(r"r: 4 +# the adapter", printed)
    (tmp_path / "printed.yaml").write_text(printed)
    assert load_config(tmp_path / "printed.yaml").config_hash == run.manifest["config_hash"]
    assert preflight.main(["--config", str(tmp_path / "printed.yaml"), "output.dir=again"]) == 0
    for key, value in (("r", 16), ("lora_alpha", 32), ("use_rslora", "true"), ("target_modules", "[q_proj]")):
        assert preflight.main([*asked, f"lora.{key}={value}"]) == 2
        assert re.search(
            rf"lora\.{key}=.*: the adapter \S+ has .*take the key out", capfd.readouterr().out + capfd.readouterr().err
        ), key


def broken(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    next(iter(tensors.values()))[0, 0] = math.nan
    return tensors


def test_an_adapter_that_cannot_be_gone_on_from_is_refused(
    dpo_args: list[str], trained_run: TrainedRun, instruct_folder: Path, tmp_path: Path, capfd
):
    other_base = tmp_path / "other_base"
    shutil.copytree(trained_run.base, other_base)
    weights = load_file(other_base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 0.5
    save_file(weights, other_base / "model.safetensors", metadata={"format": "pt"})
    cut, changed = another(trained_run, tmp_path / "cut"), another(trained_run, tmp_path / "changed")
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-100])
    tensors = load_file(changed / WEIGHTS)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, changed / WEIGHTS, metadata={"format": "pt"})
    nan = another(trained_run, tmp_path / "nan", broken)
    unfit = another(trained_run, tmp_path / "unfit", lambda tensors: dict([*tensors.items()][2:]))
    foreign = another(trained_run, tmp_path / "foreign")
    (foreign / "manifest.json").unlink(missing_ok=True)
    noted = json.loads((foreign / "adapter_config.json").read_text())
    named = noted | {"base_model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct"}
    (foreign / "adapter_config.json").write_text(json.dumps(named))
    cases = {
        "model.adapter=null": "phase dpo goes on from an adapter",
        f"model.adapter={tmp_path / 'none'}": "there is no folder",
        f"model.adapter={cut}": "is damaged",
        f"model.adapter={changed}": "is not the file that its manifest.json names (adapter_sha256)",
        f"model.adapter={nan}": "holds numbers that are not finite",
        f"model.adapter={unfit}": "does not fit on the base model",
        f"model.name={other_base}": "was trained on another base model than",
        f"model.tokenizer_name={instruct_folder}": "has another chat template than the one that",
        f"model.adapter={foreign}": "was trained on Qwen/Qwen2.5-0.5B-Instruct, as its adapter_config.json says",
        "model.adapter=last": "holds no finished SFT run",
        "train.loss_type=[aot]": "sorts the pairs of a micro-batch",
        "lora=null": "phase dpo trains an adapter",
    }
    for case, said in cases.items():
        assert dpo.main([*dpo_args, case, f"output.dir={tmp_path / 'elsewhere' / 'dpo'}"]) == 2, case
        out, err = capfd.readouterr()
        assert said in out + err and "Traceback" not in err, (case, out, err)
    assert not [*(tmp_path / "elsewhere").rglob("checkpoint-*")]
    assert dpo.main([*dpo_args, f"model.adapter={cut}", "data.train=nowhere.jsonl", "train.optim=adamw_none"]) == 2
    err = capfd.readouterr().err
    assert "3 things would end" in err and "is damaged" in err and "nowhere.jsonl" in err and "adamw_none" in err
    own = another(trained_run, tmp_path / "own")
    shutil.copytree(own, own / "checkpoint-3")
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    for adapter in (own, own / "checkpoint-3"):
        assert dpo.main([*dpo_args, f"model.adapter={adapter}", f"output.dir={own}", "--resume", "never"]) == 2
        assert "lies in output.dir" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before


def test_last_is_the_newest_finished_sft_run(dpo_args: list[str], trained_run: TrainedRun, tmp_path: Path, capfd):
    for name, date in (
        ("a", "2026-01-01T00:00:00+00:00"),
        ("b", "2026-03-01T00:00:00+00:00"),
        ("c", "2026-02-01T00:00:00+00:00"),
    ):
        manifest = another(trained_run, tmp_path / name) / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"date": date}))
    (another(trained_run, tmp_path / "unfinished") / "manifest.json").unlink()
    run = train_pairs(dpo_args, "model.adapter=last", "train.max_steps=1")
    assert f"{tmp_path / 'b'}: r=16 alpha=32, trained by phase sft" in capfd.readouterr().out
    assert run.manifest["config"]["model"]["adapter"] == str(tmp_path / "b")


def test_without_an_adapter_the_base_is_the_reference(dpo_args: list[str], trained_run: TrainedRun):
    run = train_pairs(dpo_args, *FP32, "model.adapter=none", f"model.tokenizer_name={trained_run.folder}")
    assert losses(run)[0] == pytest.approx(LN2, abs=1e-6) and run.manifest["result"]["lora_b_norm"] > 0
    assert [*run.trainer.model.peft_config] == ["default"] and not [*run.folder.rglob("ref")]
    assert run.trainer.decided()["reference"].startswith("the base model")


@pytest.mark.xdist_group("processes")
def test_an_adapter_on_the_hub(dpo_args: list[str], trained_run: TrainedRun, hub: HubServer, tmp_path: Path):
    pushed = atlas(hub, "push", str(trained_run.folder), "ann/sft")
    assert pushed.status == 0, pushed.message
    asked = [*dpo_args, "model.adapter=ann/sft", "train.max_steps=1"]
    done = atlas(hub, "dpo", *asked, f"model.adapter_revision={pushed.revision}")
    assert done.status == 0, done.message
    assert "ann/sft: r=16 alpha=32, trained by phase sft" in done.out and "loss 0.6931" in done.out
    assert atlas(hub, "dpo", *asked, "model.adapter_revision=" + "0" * 40, "--resume", "never").status == 2
    assert atlas(hub, "dpo", *asked, "model.adapter=ann/nothing", "--resume", "never").status == 2


def test_the_estimate_counts_both_sides_and_the_reference(dpo_args: list[str], trained_run: TrainedRun, capfd):
    """A step's tokens are those of the two sequences of each pair; preflight has room for the frozen adapter."""
    found = []
    for more in ([], ["model.adapter=none", f"model.tokenizer_name={trained_run.folder}"]):
        with open_run(DPO, loaded([*dpo_args, *more]), "never") as run:
            run.prepare()
            found.append(per_device_bytes(run.loaded.config, run.ready.plan, run.ready.shape).frozen)
            trained, rows = run.ready.shape.trained, [*run.train_dataset]
    assert found[0] - found[1] == 4 * trained > 0
    tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    said = re.search(r"a step holds 2 pairs, (\d+) tokens of both sides on average", capfd.readouterr().out)
    assert said and int(said[1]) == pytest.approx(tokens / 30, abs=0.5)


# The start


def test_a_reference_that_is_the_base_model_is_refused(
    dpo_args: list[str], trained_run: TrainedRun, tmp_path: Path, capfd
):
    """An adapter without effect that is not zero."""

    def without_effect(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(t) if "lora_A" in name else t for name, t in tensors.items()}

    adapter = another(trained_run, tmp_path / "idle", without_effect)
    assert dpo.main([*dpo_args, f"model.adapter={adapter}"]) == 1
    assert "the reference gives the same log-probabilities as the base model" in capfd.readouterr().err
    assert not [*(tmp_path / "dpo").glob("checkpoint-*")]


def test_a_policy_that_does_not_begin_as_its_reference_is_refused(dpo_args: list[str]):
    with open_run(DPO, loaded(dpo_args), "never") as run:
        run.prepare()
        trainer = run.trainer(run.load_base_model())
        for name, parameter in trainer.model.named_parameters():
            if ".ref." in name:  # as TRL rounds it
                parameter.data = parameter.data.bfloat16().float()
        with pytest.raises(RunError, match=r"the policy does not begin as its reference: a reward .* is off by"):
            run.fit(trainer)


# Out of memory, kill and resume


def run_on(arguments: list[str], *, little_memory: bool) -> FinishedRun:
    """With little memory there is room for six padded sequences from step 2 on, or for 800 tokens in a row: the backward pass of
    more breaks off at the first layer."""
    with open_run(DPO, loaded(arguments), "never") as run:
        run.prepare()
        trainer = run.trainer(run.load_base_model())

        def look(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            sequences, tokens, _ = output.shape
            if trainer.state.global_step and output.requires_grad and (sequences > 6 or tokens > 800):
                output.register_hook(no_room)

        if little_memory:
            base_of(trainer.model).model.layers[0].register_forward_hook(look)
        run.fit(trainer)
        return run.close(trainer)


def no_room(gradient: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 1 GiB")


@pytest.mark.parametrize("way", ["pad", "pack"])
def test_halves_of_the_pairs_give_the_loss_and_gradient_of_the_whole(
    way: str, dpo_args: list[str], tmp_path: Path, capfd
):
    asked = [*dpo_args, *SGD, f"train.batching={way}", "train.per_device_train_batch_size=5"]
    asked += ["train.gradient_accumulation_steps=2"]
    whole = run_on(asked, little_memory=False)
    split = run_on([*asked, f"output.dir={tmp_path / 'split'}"], little_memory=True)
    assert capfd.readouterr().out.count("out of memory in step 2 (tried to allocate 2.50 GiB)") == 1
    assert losses(split) == pytest.approx(losses(whole), abs=1e-6)
    result, expected = split.manifest["result"], whole.manifest["result"]
    assert result["halved_from_step"] == 2 and result["supervised_tokens"] == expected["supervised_tokens"]
    start = load_file(Path(asked[3].partition("=")[2]) / WEIGHTS)
    assert apart(load_file(split.folder / WEIGHTS), load_file(whole.folder / WEIGHTS), start) < 1e-5


EVALUATED = ["train.max_steps=7", "train.save_steps=1", "train.save_total_limit=null", "data.eval_rows=4"]
EVALUATED += ["train.eval_strategy=steps", "train.eval_steps=2", "train.logging_steps=3"]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], marks=pytest.mark.slow, id="NF4"),
        pytest.param(["train.batching=group", "train.gradient_accumulation_steps=3"], id="groups"),
    ],
)
def test_a_resumed_run_equals_the_unbroken_one(more: list[str], dpo_args: list[str], pairs_file: Path, tmp_path: Path):
    """Past the first epoch; the log's lines do not fall on checkpoints."""
    asked = [*dpo_args, *EVALUATED, *more, f"data.train={pairs_file}:14"]
    whole = train_pairs(asked)
    assert len({line["eval_loss"] for line in trace(whole)[1] if "eval_loss" in line}) >= 3
    for step in (4, 6):
        resumed = train_pairs(asked, f"output.dir={broken_off(whole.folder, tmp_path / str(step), step)}")
        assert resumed.manifest["result"]["resumed_from"] == f"checkpoint-{step}"
        assert trace(resumed) == trace(whole)
        assert not [*resumed.folder.rglob("ref")]


def test_a_run_does_not_resume_on_another_adapter(dpo_args: list[str], trained_run: TrainedRun, tmp_path: Path, capfd):
    """The reference would be another one in the middle of the run."""
    parent = another(trained_run, tmp_path / "parent")
    asked = [*dpo_args, f"model.adapter={parent}", *EVALUATED]
    whole = train_pairs(asked)
    folder = broken_off(whole.folder, tmp_path / "broken", 4)
    shutil.rmtree(parent)
    another(trained_run, parent, lambda tensors: {name: t * 1.01 for name, t in tensors.items()})
    capfd.readouterr()
    for at in (folder, whole.folder):
        assert dpo.main([*asked, f"output.dir={at}"]) == 2
        message = capfd.readouterr().err
        assert "model.adapter" in message and "--resume never" in message, message


@pytest.mark.xdist_group("processes")
def test_killed_and_resumed_it_gives_the_same_adapter(dpo_args: list[str], tmp_path: Path):
    asked = [*dpo_args, *EVALUATED, "train.max_steps=12", "train.logging_steps=1"]
    started = Started("dpo", *asked)
    started.wait_for("step  5/12")
    started.end(signal.SIGKILL)
    assert not (tmp_path / "dpo" / "manifest.json").exists()
    resumed = train_pairs(asked)
    assert resumed.manifest["result"]["resumed_from"]
    assert trace(resumed) == trace(train_pairs(asked, f"output.dir={tmp_path / 'alone'}"))


@pytest.mark.xdist_group("processes")
@pytest.mark.slow
@pytest.mark.parametrize("way", ["pad", "pack"])
def test_two_processes_train_and_measure_what_one_does(way: str, dpo_args: list[str], pairs_file: Path, tmp_path: Path):
    """And resume after SIGKILL. In each of two epochs the last pairs fill no batch for both processes and are left out, as one
    process does with dataloader_drop_last; of 7 held-out ones accelerate would count one twice."""
    asked = [
        *dpo_args,
        *FP32,
        f"train.batching={way}",
        f"data.train={pairs_file}:19",
        "data.eval_rows=7",
        "train.max_steps=6",
        "train.dataloader_drop_last=true",
    ]
    asked += ["train.per_device_eval_batch_size=2", "train.save_steps=1", "train.save_total_limit=null"]
    alone = train_pairs(asked, f"output.dir={tmp_path / 'alone'}", "train.per_device_train_batch_size=4", *SGD)
    held_out = alone.manifest["data"]["held_out"]
    started = together(2, "dpo", *asked, *SGD)
    assert [process.end() for process in started] == [0, 0], [process.said() for process in started]
    folder = tmp_path / "dpo"
    result, expected = json.loads((folder / "manifest.json").read_text())["result"], alone.manifest["result"]
    for name in ("loss_first", "loss_last", "eval_loss"):
        assert result[name] == pytest.approx(expected[name], abs=1e-6), (name, held_out)
    assert result["supervised_tokens"] == expected["supervised_tokens"]
    start = load_file(Path(asked[3].partition("=")[2]) / WEIGHTS)
    assert apart(load_file(folder / WEIGHTS), load_file(alone.folder / WEIGHTS), start) < 1e-4
    weights = (folder / WEIGHTS).read_bytes()
    again = together(2, "dpo", *asked, *SGD, "--resume", "never", f"output.dir={tmp_path / 'killed'}")
    again[0].wait_for("step 5/6")
    for process in again:
        process.end(signal.SIGKILL)
    again = together(2, "dpo", *asked, *SGD, f"output.dir={tmp_path / 'killed'}")
    assert [process.end() for process in again] == [0, 0], [process.said() for process in again]
    assert "resume from" in again[0].said()[0] and (tmp_path / "killed" / WEIGHTS).read_bytes() == weights
