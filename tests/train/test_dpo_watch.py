"""What watches a run on pairs: `atlas sanity` finds each planted fault, meters and warnings have the numbers, report and card say
what a run on pairs is."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from atlas.config import load_config
from atlas.eval import run as evaluation
from atlas.pocket.base import PocketPaths
from atlas.report.folder import Folder
from atlas.report.page import write_report_page
from atlas.report.scores import scored
from atlas.report.verdict import verdict
from atlas.train import dpo, preflight, sanity, sft
from atlas.train.callbacks import preference
from atlas.train.canary import FAIL, PASS, SKIP
from atlas.train.dpo import DPO
from atlas.train.phase import Phase
from atlas.train.run import phase_command
from hub_commands import atlas
from hub_server import HubServer
from rows import write_rows
from runs import TrainedRun, broken_off, pair_arguments, together, trace, train_pairs

Found = dict[str, tuple[str, str]]


@pytest.fixture
def easy_args(trained_run: TrainedRun, tmp_path: Path) -> list[str]:
    """Pairs that a random model of 0.1 M parameters can learn in 20 steps."""
    rows = [
        {"prompt": f"Where is house {n}?", "chosen": f"House {n} stands by the river.", "rejected": f"No, no, {n} no."}
        for n in range(48)
    ]
    return pair_arguments(trained_run, write_rows(tmp_path / "easy.jsonl", rows), tmp_path)


def verdicts(asked: list[str], *more: str, phase: Phase = DPO) -> Found:
    given = ["train.max_steps=-1", "train.learning_rate=1e-3", "train.per_device_train_batch_size=4"]
    config = load_config(asked[1], [*asked[2:], *given, *more])
    return {line.name: (line.status, line.text) for line in sanity.sanity(config, phase)}


def failed(found: Found) -> set[str]:
    return {name for name, (status, _) in found.items() if status == FAIL}


def trainer_with(change: Callable[[Any, dict[str, Any]], dict[str, Any]]) -> Phase:
    """Phase dpo with a trainer that gets other micro-batches."""

    def changed() -> type:
        class Changed(DPO.trainer()):
            def compute_loss(self, model, inputs, *args, **kwargs):
                return super().compute_loss(model, change(self, dict(inputs)), *args, **kwargs)

        return Changed

    return replace(DPO, trainer=changed)


def exchanged(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Rejected before chosen."""
    for name in ("input_ids", "attention_mask", "completion_mask"):
        inputs[name] = inputs[name].flip(0) if len(inputs[name]) == 2 else torch.cat(inputs[name].chunk(2)[::-1])
    return inputs


def with_prompt(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The prompt is scored too, but for its first token."""
    mask = inputs["attention_mask"].clone()
    mask[:, 0] = 0
    return {**inputs, "completion_mask": mask}


def moving(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The reference follows the policy, half of the way in each step."""
    parameters = dict(trainer.model.named_parameters())
    for name, parameter in parameters.items():
        if ".ref." in name:
            parameter.data.lerp_(parameters[name.replace(".ref.", ".default.")].data, 0.5)
    return inputs


def frozen(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """No gradient comes to the adapter."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)
    return inputs


@pytest.mark.slow
def test_a_sound_config_of_pairs_passes(easy_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # `last` is beside the config's own output.dir, and not beside the folders of the check.
    last = [f"output.dir={tmp_path / 'runs' / 'dpo'}", "model.adapter=last"]
    adapter = Path(next(given for given in easy_args if given.startswith("model.adapter=")).partition("=")[2])
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sft").symlink_to(adapter)
    found = verdicts(easy_args, *last)
    assert failed(found) == set(), found
    assert {name for name, (status, _) in found.items() if status == SKIP} <= {"replies"}
    assert found["start"] == (
        PASS,
        "the first rewards are 0, the first loss is 0.693147: policy and reference begin alike",
    )
    assert found["adapter"][1].startswith("the adapter has changed by ")
    assert "bit for bit" in found["same again"][1] and "the same as the trainer's" in found["canary"][1]
    assert "content" not in found["trained text"][1] and "steps in" in found["whole run"][1]
    out = capsys.readouterr().out
    assert out.count("prompt  ") == 4 and [path.name for path in (tmp_path / "runs").iterdir()] == ["sft"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "line", "said"),
    [
        (exchanged, "canary", "the sides are exchanged, so that the rejected answer is preferred"),
        (with_prompt, "canary", "the loss scores other tokens than content and stop token after the prompt"),
        (moving, "canary", "the reference has moved"),
        (frozen, "adapter", "the adapter is as it was"),
    ],
)
def test_a_planted_fault_is_named(easy_args: list[str], plant: Callable[..., Any], line: str, said: str):
    found = verdicts(easy_args, phase=trainer_with(plant))
    assert found[line][0] == FAIL and said in found[line][1], found


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "said"), [("10", "ower train.learning_rate"), ("1e-9", "Raise train.learning_rate")])
def test_a_learning_rate_that_is_much_too_high_or_too_low(easy_args: list[str], rate: str, said: str):
    found = verdicts(easy_args, f"train.learning_rate={rate}")
    named = failed(found) & {"loss", "gradients", "adapter"}
    assert named and said in found[min(named)][1], found


# Meters

STEADY = [
    "train.lr_scheduler_type=constant",
    "train.warmup_steps=0",
    "train.learning_rate=5e-3",
    "train.max_grad_norm=0",
]
KEPT = ["train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=null"]


def lines_of(run: Any) -> list[dict[str, Any]]:
    return [line for line in run.trainer.state.log_history if "loss" in line]


def warned(run: Any) -> list[str]:
    return [line["warning"] for line in run.trainer.state.log_history if "warning" in line]


def log_prob(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    return float(logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].sum())


def test_the_meters_have_the_numbers_of_a_computation_by_hand(
    dpo_args: list[str], trained_run: TrainedRun, monkeypatch: pytest.MonkeyPatch
):
    """Of step 2, whose policy is that of checkpoint-1: micro-batches of 2 pairs, 4 of them."""
    monkeypatch.setattr(preference, "FEWEST", 8)
    more = ["train.max_steps=2", "train.gradient_accumulation_steps=4", "train.batching=pad"]
    more += ["quantization.load_in_4bit=false"]
    run = train_pairs(dpo_args, *STEADY, *KEPT, *more)
    policy, reference = (
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(trained_run.base, dtype=torch.float32), folder
        ).eval()
        for folder in (run.folder / "checkpoint-1", trained_run.folder)
    )
    assert run.trainer is not None
    order = [n for batch in run.trainer.get_train_dataloader().batch_sampler for n in batch]
    rows = [run.trainer.train_dataset[number] for number in order[8:16]]
    lengths, gains = ({side: [] for side in ("chosen", "rejected")} for _ in range(2))
    for row in rows:
        for side in lengths:
            prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
            lengths[side].append(len(answer))
            gains[side].append(log_prob(policy, prompt, answer) - log_prob(reference, prompt, answer))
    first, line = lines_of(run)
    for side in lengths:
        assert line[f"lengths/{side}"] == pytest.approx(fmean(lengths[side]))
        assert line[f"drift/{side}"] == pytest.approx(sum(gains[side]) / sum(lengths[side]), rel=1e-3)
        assert abs(line[f"drift/{side}"]) > 1e-3 and first[f"drift/{side}"] == 0
    margins = [0.1 * (a - b) for a, b in zip(gains["chosen"], gains["rejected"], strict=True)]
    longer = [a - b for a, b in zip(lengths["chosen"], lengths["rejected"], strict=True)]
    pairs = [slice(n, n + 2) for n in range(0, 8, 2)]
    # The four micro-batches of step 1 have margins of 0.
    before = [run.trainer.train_dataset[number] for number in order[:8]]
    known = [len(row["chosen_ids"]) - len(row["rejected_ids"]) for row in before]
    expected = correlation(
        [0.0] * 4 + [fmean(margins[part]) for part in pairs],
        [fmean(known[part]) for part in pairs] + [fmean(longer[part]) for part in pairs],
    )
    assert line["length_correlation"] == pytest.approx(expected, abs=1e-3) and "length_correlation" not in first


def test_the_meters_go_on_after_a_kill(dpo_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a line in every second step, so that a checkpoint lies between two of them."""
    monkeypatch.setattr(preference, "FEWEST", 4)
    more = ["train.max_steps=5", "train.logging_steps=2", *STEADY, *KEPT]
    whole = train_pairs(dpo_args, *more)
    folder = broken_off(whole.folder, tmp_path / "killed", 3)
    resumed = train_pairs(dpo_args, *more, f"output.dir={folder}")
    assert trace(resumed) == trace(whole) and "length_correlation" in lines_of(whole)[-1]
    assert {"lengths/chosen", "drift/rejected", "length_correlation"} <= lines_of(resumed)[-1].keys()


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_two_processes_have_the_meters_of_one(dpo_args: list[str], tmp_path: Path):

    step = ["train.max_steps=4", "train.batching=pad", *STEADY]
    one = train_pairs(dpo_args, *step, "train.gradient_accumulation_steps=2")
    ranks = together(2, "dpo", *dpo_args, *step, f"output.dir={tmp_path / 'two'}")
    assert [rank.end() for rank in ranks] == [0, 0], [rank.said() for rank in ranks]
    log = [json.loads(line) for line in (tmp_path / "two" / "train_log.jsonl").read_text().splitlines()]
    names = ["loss", "lengths/chosen", "lengths/rejected", "rewards/margins", "rewards/accuracies"]
    for line, other in zip(lines_of(one), [line for line in log if "loss" in line], strict=True):
        assert [other[name] for name in names] == pytest.approx([line[name] for name in names], abs=1e-5)
        # A mean of the processes' lengths under a mean of all rewards.
        assert other["drift/chosen"] == pytest.approx(line["drift/chosen"], abs=1e-5)


def wordy(folder: Path, count: int) -> Path:
    """Pairs whose chosen answer is always the longer one, by 1 to 12 words."""
    rows = [
        {
            "prompt": f"Where is house {n}?",
            "chosen": "It stands by the river." + " It is red." * (1 + n % 12),
            "rejected": "It stands by the river.",
        }
        for n in range(count)
    ]
    return write_rows(folder / "wordy.jsonl", rows)


FIFTY = ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=10", "train.max_steps=7"]
FIFTY += ["train.batching=pad"]
LENGTH, FALL = "length explains the margins", "the chosen answers have become less likely"


def test_length_that_explains_the_margins_is_said(
    trained_run: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = pair_arguments(trained_run, wordy(tmp_path, 60), tmp_path / "run")
    run = train_pairs(given, *FIFTY, *STEADY, "train.learning_rate=1e-3")
    (said,) = warned(run)
    assert (
        said.startswith(LENGTH)
        and "learns to prefer longer answers" in said
        and f"warning: {said}" in capsys.readouterr().out
    )
    assert lines_of(run)[-1]["length_correlation"] > 0.5


def test_chosen_answers_that_become_less_likely_are_said_once(dpo_args: list[str]):
    """apo_down is made to lower them."""
    run = train_pairs(dpo_args, *STEADY, "train.loss_type=[apo_down]", "train.max_steps=8", "train.beta=1")
    assert [text[: len(FALL)] for text in warned(run)] == [FALL]
    assert lines_of(run)[-1]["drift/chosen"] < -0.1


def test_sound_pairs_get_no_warning(dpo_args: list[str]):
    run = train_pairs(dpo_args, *FIFTY, *STEADY)
    assert warned(run) == [] and "length_correlation" in lines_of(run)[-1]


@pytest.mark.parametrize("metric", ["eval_loss", "eval_rewards/accuracies"])
def test_a_run_stops_early_by_what_is_held_out(dpo_args: list[str], metric: str):
    """At this rate nothing changes after the first evaluation that could be better by 0.5."""
    early = ["data.eval_rows=8", "train.eval_strategy=steps", "train.eval_steps=1", "train.early_stopping_patience=2"]
    early += ["train.early_stopping_threshold=0.5", f"train.metric_for_best_model={metric}", "train.max_steps=8"]
    run = train_pairs(dpo_args, *early, "train.learning_rate=1e-4")
    assert run.manifest["result"]["stopped_early"] and run.manifest["result"]["steps"] == 3
    evaluated = [line for line in run.trainer.state.log_history if "eval_loss" in line]
    assert len(evaluated) == 3 and 0 < evaluated[-1]["eval_rewards/accuracies"] <= 1


def test_a_tracker_gets_the_names(dpo_args: list[str]):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train_pairs(
        dpo_args, "train.report_to=tensorboard", "data.eval_rows=8", "train.eval_strategy=steps", "train.eval_steps=3"
    )
    (place,) = {path.parent for path in (run.folder / "runs").rglob("events*")}
    events = EventAccumulator(str(place)).Reload()
    names = {
        "rewards/margins",
        "rewards/accuracies",
        "drift/chosen",
        "drift/rejected",
        "lengths/chosen",
        "lengths/rejected",
    }
    shown = {*events.Tags()["scalars"]}
    assert {f"train/{name}" for name in names} | {"eval/rewards/accuracies", "eval/rewards/margins"} <= shown
    assert [event.value for event in events.Scalars("train/lengths/chosen")] == pytest.approx(
        [line["lengths/chosen"] for line in lines_of(run)]
    )


# Preflight


def another(run: TrainedRun, folder: Path, **settings: Any) -> Path:
    """A copy of the SFT adapter with other settings, of another tool: without a manifest."""
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("manifest.json", "checkpoint-*"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_what_cannot_be_gone_on_from_is_refused_in_one_message(
    dpo_args: list[str], trained_run: TrainedRun, rows_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    pickled, empty = another(trained_run, tmp_path / "pickled"), another(trained_run, tmp_path / "empty")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    (empty / "adapter_model.safetensors").unlink()
    ia3 = another(trained_run, tmp_path / "ia3", peft_type="IA3", feedforward_modules=["down_proj"])
    dora = another(trained_run, tmp_path / "dora", use_dora=True)
    ranks = another(trained_run, tmp_path / "ranks", rank_pattern={"q_proj": 4})
    saved = another(trained_run, tmp_path / "saved", modules_to_save=["lm_head"])
    cases = {
        f"model.adapter={pickled}": "adapter_model.safetensors missing. Its adapter_model.bin is a pickle",
        f"model.adapter={empty}": "holds no adapter: adapter_model.safetensors missing",
        f"model.adapter={ia3}": "is a IA3 adapter; only LoRA is gone on from",
        f"model.adapter={dora}": "does not fit on the base model",
        f"model.adapter={ranks}": "does not fit on the base model",
        f"model.adapter={saved}": "model.adapter: ",
        "model.adapter=nobody/nothing": "nobody/nothing",
        f"data.train={rows_file}": "fits no known format. Columns seen: 'messages'. Known: preference (chosen, rejected)",
        f"data.train={rows_file}:5": "fits no known format",
        "train.max_length=8": "at least 32",
        "phase=sft": "model.adapter: phase sft starts from a base model",
    }
    for case, said in cases.items():
        assert preflight.main([*dpo_args, case]) == 2, case
        err = capfd.readouterr().err
        assert said in err and "Traceback" not in err and err.count("error:") == 1, (case, err)


def test_the_command_of_the_other_phase_is_refused(
    dpo_args: list[str], sft_args: list[str], capfd: pytest.CaptureFixture[str]
):
    assert phase_command("sft", sft.train)(dpo_args) == 2
    assert "`atlas sft` does not train phase dpo: run `atlas dpo --config" in capfd.readouterr().err
    assert phase_command("dpo", dpo.train)(sft_args) == 2
    assert "model.adapter: phase dpo goes on from an adapter" in capfd.readouterr().err


def test_a_max_length_that_no_pair_fits_in(dpo_args: list[str], capfd: pytest.CaptureFixture[str]):
    assert dpo.main([*dpo_args, "train.max_length=32"]) == 2
    said = capfd.readouterr().err
    assert "prompt longer than max_length" in said and "raise train.max_length" in said, said


# Report and card


def said_of(folder: Path) -> tuple[str, str, list[str]]:
    read = Folder.read(folder)
    colour, headline, lines = verdict(read, scored(read))
    return colour, headline, [line.text for line in lines]


def test_the_report_speaks_of_pairs(easy_args: list[str], trained_run: TrainedRun, tmp_path: Path):
    held_out = ["data.eval_rows=8", "train.eval_strategy=steps", "train.eval_steps=10", "train.max_steps=20"]
    run = train_pairs(easy_args, *held_out, "train.per_device_train_batch_size=4", "train.sample_steps=1")
    last = [line for line in run.trainer.state.log_history if "eval_loss" in line][-1]
    share, margin = last["eval_rewards/accuracies"], last["eval_rewards/margins"]
    _, headline, lines = said_of(run.folder)
    text = "\n".join(lines)
    assert f"{share:.0%} of held-out pairs right" in headline and share > 0.86
    assert "policy and reference began alike: the first rewards were 0, the first loss 0.6931 (ln 2)" in lines
    assert (
        f"the chosen answer has the higher reward in {share:.0%} of the held-out pairs (mean margin {margin:+.3g})"
        in text
    )
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    for title in ("pairs the right way round", "margin of the rewards", "drift from the reference", "goes on from"):
        assert title in page, title
    both = write_report_page(run.folder, trained_run.folder, to=tmp_path / "both.html").read_text(encoding="utf-8")
    assert "direct preference optimisation (DPO)" in both and "supervised fine-tuning" in both and "train.beta" in both


def test_pairs_that_are_no_better_than_chance_are_said(dpo_args: list[str]):
    held_out = ["data.eval_rows=16", "train.eval_strategy=steps", "train.eval_steps=3", "train.learning_rate=1e-6"]
    _, headline, lines = said_of(train_pairs(dpo_args, *held_out).folder)
    assert "pairs no better than chance" in headline and any(
        "chance alone reaches 75% of the" in line for line in lines
    )


@pytest.mark.slow
def test_scores_are_compared_with_those_of_the_adapter_before(
    trained_run: TrainedRun, pairs_file: Path, lab: PocketPaths, tmp_path: Path
):
    given = pair_arguments(trained_run, pairs_file, tmp_path)
    asked = [f"eval.data.ifeval={lab.eval}", "eval.tasks=[{name: ifeval, max_gen_toks: 8}]"]
    folder = train_pairs([*given, *asked]).folder
    assert evaluation.main([*given, *asked, "--adapter", str(trained_run.folder), "--name", "sft"]) == 0
    assert evaluation.main([*given, *asked]) == 0
    _, headline, lines = said_of(folder)
    assert re.search(r"ifeval: \w[\w ]* (to|than) sft", headline) and any("prompt_strict" in line for line in lines)


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_card_and_manifest_hold_the_whole_chain_on_the_hub(
    dpo_args: list[str], trained_run: TrainedRun, pairs_file: Path, rows_file: Path, hub: HubServer, tmp_path: Path
):
    """SFT, DPO on it from the Hub, DPO on that: pushed, pulled, and used."""
    pushed = atlas(hub, "push", str(trained_run.folder), "ann/sft")
    first = atlas(hub, "dpo", *dpo_args, "model.adapter=ann/sft", "output.hub_repo=ann/dpo")
    assert pushed.status == first.status == 0, first.message
    again = [*dpo_args, "model.adapter=ann/dpo", f"output.dir={tmp_path / 'second'}", "train.beta=0.3"]
    second = atlas(hub, "dpo", *again, "output.hub_repo=ann/second")
    assert second.status == 0, second.message
    pulled = atlas(hub, "pull", "ann/second", "--to", str(tmp_path / "pulled"))
    assert pulled.status == 0, pulled.message
    manifest = json.loads((tmp_path / "pulled" / "manifest.json").read_text())
    before = manifest["parent"]["manifest"]
    assert manifest["parent"]["name"] == "ann/dpo" and manifest["parent"]["sha256"] == before["adapter_sha256"]
    assert before["parent"]["name"] == "ann/sft" and before["parent"]["manifest"]["phase"] == "sft"
    assert (
        before["parent"]["sha256"] == before["parent"]["manifest"]["adapter_sha256"]
        and len(before["parent"]["revision"]) == 40
    )
    card = (tmp_path / "pulled" / "README.md").read_text()
    assert re.search(
        r"goes on from the adapter ann/dpo .*, made by direct preference optimisation .*: 3 steps, itself made by", card
    )
    assert (
        card.count(f"| <code>{pairs_file.name}</code> | 60 | 60 |") == 2
        and f"| <code>{rows_file.name}</code> | 120 | 120 |" in card
    )
    assert (
        "| <code>train.beta</code> | <code>0.3</code> |" in card
        and "| <code>train.beta</code> | <code>0.1</code> |" in card
    )
    assert str(tmp_path) not in card and "better than the adapter before is not known" in card
    assert (
        "Of the pairs it learned from: chosen 27 tokens on average, rejected 27; the chosen one is longer in 48%"
        in card
    )
    asked = ["--max-new-tokens", "6", "Where is house 3?"]
    local = atlas(hub, "generate", "--adapter", str(tmp_path / "second"), *asked)
    assert atlas(hub, "generate", "--adapter", "ann/second", *asked).out.strip() == local.out.strip() != ""
