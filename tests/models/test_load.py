"""The one loader of base and adapter: what is damaged or belongs to another model is refused, and no strangers' code runs."""

import ast
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

import atlas
from atlas.eval import generate, harness
from atlas.eval import run as evaluation
from atlas.eval.store import read_metrics
from atlas.models import load, merge
from atlas.models.tokenizer import stop_ids
from atlas.pocket.base import PocketPaths
from rows import ROOT
from runs import TrainedRun

WEIGHTS = "adapter_model.safetensors"


def commands(lab: PocketPaths, base: Path, adapter: Path, out: Path) -> dict[str, Callable[[], int]]:
    """Every command that loads an adapter, on this one."""
    config = [
        "--config",
        str(ROOT / "configs" / "sft_pocket.yaml"),
        f"model.name={base}",
        f"eval.data.ifeval={lab.eval}",
    ]
    scoring = [*config, f"output.results_dir={out}", "--limit", "1", "eval.tasks=[{name: ifeval, max_gen_toks: 4}]"]
    return {
        "generate": lambda: generate.main(["--adapter", str(adapter), "--max-new-tokens", "2", "Hi"]),
        "eval": lambda: evaluation.main([*scoring, "--adapter", str(adapter)]),
        "merge": lambda: merge.main([str(adapter), "--to", str(out / "merged")]),
    }


def edit(path: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    held = json.loads(path.read_text())
    how(held)
    path.write_text(json.dumps(held))


def retensor(folder: Path, how: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        tensors |= how(name, tensor)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights cut off": (lambda f: cut(f / WEIGHTS, 5000), "adapter_model.safetensors is damaged"),
    "weights empty": (lambda f: cut(f / WEIGHTS, 0), "adapter_model.safetensors is damaged"),
    "weights are a pickle": (pickled, "is a pickle, which could run code"),
    "half of the tensors": (lambda f: retensor(f, lambda n, t: {n: t} if "layers.0" in n else {}), "lacks 14 weights"),
    "no tensor": (lambda f: retensor(f, lambda n, t: {}), "lacks 28 weights"),
    "all names wrong": (lambda f: retensor(f, lambda n, t: {f"x.{n}": t}), "28 weights"),
    "a tensor too many": (
        lambda f: retensor(f, lambda n, t: {n: t, n.replace("layers.1", "layers.7"): t.clone()}),
        "has unknown 14 weights",
    ),
    "a scale that is none": (
        lambda f: edit(f / "adapter_config.json", lambda c: c.update(lora_alpha=float("nan"))),
        "adapter_config.json is damaged (ValueError: NaN is not a finite number)",
    ),
    "a scale that is too large": (
        lambda f: edit(f / "adapter_config.json", lambda c: c.update(lora_alpha=1e39)),
        "run is broken: its logits are not finite",
    ),
    "a number that is none": (lambda f: retensor(f, lambda n, t: {n: t / 0}), "numbers that are not finite"),
    "other shapes": (lambda f: retensor(f, lambda n, t: {n: t[:, :3].contiguous()}), "size mismatch for base_model."),
    "rank of another": (
        lambda f: edit(f / "adapter_config.json", lambda c: c.update(r=4)),
        "size mismatch for base_model.",
    ),
    "config is empty": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "adapter_config.json is damaged (ValueError: it names no peft_type)",
    ),
    "config is no JSON": (lambda f: cut(f / "adapter_config.json", 40), "adapter_config.json is damaged"),
    "config is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "adapter_config.json is damaged"),
    "config of another method": (
        lambda f: edit(f / "adapter_config.json", lambda c: c.update(peft_type="SOMETHING")),
        "unknown name 'SOMETHING'",
    ),
    "manifest cut off": (lambda f: cut(f / "manifest.json", 300), "manifest.json is damaged"),
    "manifest without a model": (
        lambda f: edit(f / "manifest.json", lambda m: m["config"].pop("model")),
        "manifest.json is",
    ),
    "manifest with a list": (
        lambda f: edit(f / "manifest.json", lambda m: m.update(config=[])),
        "manifest.json is damaged",
    ),
    "manifest names a number": (
        lambda f: edit(f / "manifest.json", lambda m: m["config"]["model"].update(name=7)),
        "manifest.json is damaged",
    ),
    "tokenizer cut off": (lambda f: cut(f / "tokenizer.json", 300), "the tokenizer of"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_adapter_is_refused(
    kind: str, trained_run: TrainedRun, lab: PocketPaths, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = Path(shutil.copytree(trained_run.folder, tmp_path / "run"))
    how, said = DAMAGE[kind]
    how(folder)
    for name, command in commands(lab, trained_run.base, folder, tmp_path / "out").items():
        assert command() == 2, name
        err = capsys.readouterr().err
        assert said in err and err.count("error: ") == 1 and "Traceback" not in err, (name, err)
    assert not list((tmp_path).glob("out/merged*")) and not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_with_a_weight_that_is_no_number_is_refused(
    value: float, trained_run: TrainedRun, lab: PocketPaths, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Greedy decoding on it ends at once, which would pass for a short reply; the adapter on it is sound."""
    base = Path(shutil.copytree(trained_run.base, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    tuned = Path(shutil.copytree(trained_run.folder, tmp_path / "run"))
    edit(
        tuned / "manifest.json", lambda m: (m["base"].update(content=None), m["config"]["model"].update(name=str(base)))
    )
    of_adapter = commands(lab, base, tuned, tmp_path / "out")
    scoring = ["--config", str(ROOT / "configs" / "sft_pocket.yaml"), f"model.name={base}", "--base", "--limit", "1"]
    scoring += [f"eval.data.ifeval={lab.eval}", f"output.results_dir={tmp_path / 'out'}"]
    alone = {
        "generate a base": lambda: generate.main(["--model", str(base), "Hi"]),
        "sample a base": lambda: generate.main(["--model", str(base), "--temperature", "1", "Hi"]),
        "eval --base": lambda: evaluation.main([*scoring, "eval.tasks=[{name: ifeval, max_gen_toks: 4}]"]),
    }
    for name, command in (of_adapter | alone).items():
        assert command() == 2, name
        out, err = capsys.readouterr()
        assert f"error: '{base}' is broken: its logits are not finite" in err and "stops by itself" not in out, name
    assert not list(tmp_path.glob("out/merged*")) and not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("without", ["manifest", "content"])
def test_a_base_that_cannot_be_checked_is_said(without: str, trained_run: TrainedRun, lab, tmp_path: Path, capsys):
    folder = Path(shutil.copytree(trained_run.folder, tmp_path / "run"))
    (folder / "manifest.json").unlink()
    if without == "content":
        (folder / "manifest.json").write_text('{"format": 2}')
    does = commands(lab, trained_run.base, folder, tmp_path / "out")
    for name in ("generate", "merge"):
        assert does[name]() == 0
        notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
        assert len(notes) == 1 and str(trained_run.base) in notes[0] and "cannot be checked" in notes[0], name
    checked = commands(lab, trained_run.base, trained_run.folder, tmp_path / "out")
    assert checked["generate"]() == 0 and "note: " not in capsys.readouterr().err


def test_an_adapter_of_eight_bit_floats(trained_run: TrainedRun, lab: PocketPaths, tmp_path: Path, capsys):
    folder = Path(shutil.copytree(trained_run.folder, tmp_path / "run"))
    retensor(folder, lambda name, tensor: {name: tensor.to(torch.float8_e4m3fn)})
    for name, command in commands(lab, trained_run.base, folder, tmp_path / "out").items():
        assert command() == 0, (name, capsys.readouterr().err)
    retensor(folder, lambda name, tensor: {name: (tensor.float() / 0).to(torch.float8_e4m3fn)})
    assert commands(lab, trained_run.base, folder, tmp_path / "out")["generate"]() == 2
    assert "holds numbers that are not finite" in capsys.readouterr().err


def test_an_adapter_without_template(
    trained_run: TrainedRun, lab: PocketPaths, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = Path(shutil.copytree(trained_run.folder, tmp_path / "run"))
    (folder / "chat_template.jinja").unlink()
    does = commands(lab, trained_run.base, folder, tmp_path / "out")
    assert (does["generate"](), does["eval"]()) == (2, 2)
    assert capsys.readouterr().err.count("has no chat template") == 2
    assert does["merge"]() == 0  # plain text is as good a probe


def cached(folder: Path, home: Path, name: str) -> str:
    """Put a model into a Hub cache at `home`, as its branch main; returns its commit."""
    revision = "".join(f"{ord(c) % 16:x}" for c in f"{folder.name:x<40}"[:40])
    repo = home / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repo / "snapshots" / revision)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(revision)
    return revision


@pytest.mark.parametrize("written", ["in the config", "by the run"])
def test_the_revision_of_the_base_is_that_of_the_training(
    written: str, trained_run: TrainedRun, lab: PocketPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """The base has gone on since: main is another model now, on which the adapter would say something else."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    pinned = cached(trained_run.base, tmp_path / "cache", "ann/base")
    changed = Path(shutil.copytree(trained_run.base, tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    save_file({k: -v for k, v in tensors.items()}, changed / "model.safetensors", metadata={"format": "pt"})
    assert cached(changed, tmp_path / "cache", "ann/base") != pinned
    folder = Path(shutil.copytree(trained_run.folder, tmp_path / "run"))
    in_config, by_run = (pinned, None) if written == "in the config" else (None, pinned)
    edit(folder / "manifest.json", lambda m: m["config"]["model"].update(name="ann/base", revision=in_config))
    edit(folder / "manifest.json", lambda m: m["base"].update(commit=by_run))
    edit(folder / "adapter_config.json", lambda c: c.update(base_model_name_or_path="ann/base", revision=None))

    asked = ["--max-new-tokens", "6", "Where does Mira live?"]
    assert generate.main(["--adapter", str(trained_run.folder), *asked]) == 0
    expected = capsys.readouterr().out
    assert generate.main(["--adapter", str(folder), *asked]) == 0
    assert capsys.readouterr().out == expected
    assert generate.main(["--adapter", str(folder), "--model", "ann/base", *asked]) == 2
    assert "trained on another base model than 'ann/base' holds now" in capsys.readouterr().err
    does = commands(lab, Path("ann/base"), folder, tmp_path)
    assert does["eval"]() == 0 and does["merge"]() == 0
    (row,) = read_metrics(tmp_path).runs
    assert row.model_revision == pinned
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["base_revision"] == pinned


def test_another_base_of_the_same_shape_is_refused(
    trained_run: TrainedRun, lab: PocketPaths, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """The folder of the base holds another model since, or the user names another one."""
    other = Path(shutil.copytree(trained_run.base, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    moved = Path(shutil.copytree(trained_run.base, tmp_path / "moved"))
    folder = Path(shutil.copytree(trained_run.folder, tmp_path / "run"))
    edit(folder / "manifest.json", lambda m: m["config"]["model"].update(name=str(other)))
    for name, command in commands(lab, other, folder, tmp_path / "out").items():
        assert command() == 2, name
        err = capsys.readouterr().err
        assert "was trained on another base model" in err and str(other) in err and err.count("error: ") == 1
    edit(
        folder / "manifest.json", lambda m: m["config"]["model"].update(name=str(moved))
    )  # another place, the same model
    for name, command in commands(lab, moved, folder, tmp_path / "out").items():
        assert command() == 0, name


def test_a_local_base_is_not_looked_for_on_the_hub(
    trained_run: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = Path(shutil.copytree(trained_run.folder, tmp_path / "run"))

    def elsewhere(manifest: dict[str, Any]) -> None:
        manifest["config"]["model"]["name"] = "outputs/base"
        manifest["local"] = ["outputs/base"]

    edit(folder / "manifest.json", elsewhere)
    assert generate.main(["--adapter", str(folder), "Hi"]) == 2
    err = capsys.readouterr().err
    assert "there is no folder ./outputs/base" in err and "--model" in err


def test_four_bits_are_those_of_the_training(
    trained_run: TrainedRun, lab: PocketPaths, tmp_path: Path, monkeypatch, capsys
):
    folder = Path(shutil.copytree(trained_run.folder, tmp_path / "run"))
    trained = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    edit(folder / "manifest.json", lambda m: m["config"]["quantization"].update(trained))
    states, real = [], harness.run_task

    def spy(model: Any, *given: Any, **named: Any) -> Any:
        states.extend(
            m.weight.quant_state for m in model.modules() if hasattr(m, "compute_state") or "4bit" in type(m).__name__
        )
        return real(model, *given, **named)

    monkeypatch.setattr(evaluation, "run_task", spy)
    config = ["--config", str(ROOT / "configs" / "sft_pocket.yaml"), f"model.name={trained_run.base}"]
    config += [
        f"eval.data.ifeval={lab.eval}",
        f"output.results_dir={tmp_path}",
        "--limit",
        "1",
        "eval.load_in_4bit=true",
    ]
    assert evaluation.main([*config, "eval.tasks=[{name: ifeval, max_gen_toks: 4}]", "--adapter", str(folder)]) == 0
    states = [state for state in states if state is not None]
    assert states and {(state.quant_type, state.nested) for state in states} == {("fp4", False)}
    (row,) = read_metrics(tmp_path).runs
    assert row.quantization == "fp4 without double quantisation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("chat", "document"),
    [("<|eot_id|>", "<|end_of_text|>"), ("<end_of_turn>", "<eos>"), ("<|im_end|>", "<|endoftext|>")],
)
def test_every_token_that_ends_a_text_ends_a_reply(chat: str, document: str, lab: PocketPaths):
    """Families whose base model ends a document with another token than a chat ends a turn with."""
    tokenizer = AutoTokenizer.from_pretrained(lab.base)
    tokenizer.add_special_tokens({"additional_special_tokens": [chat, document]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '" + chat + "' }}{% endfor %}"
    tokenizer.eos_token = chat
    ids = tokenizer.convert_tokens_to_ids([chat, document])
    assert set(ids) <= set(stop_ids(tokenizer)) and stop_ids(tokenizer)[0] == ids[0]


def test_what_the_base_model_ends_with_ends_a_reply(lab: PocketPaths):
    model, tokenizer = load.load_model(lab.base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<fin>"]})
    fin = tokenizer.convert_tokens_to_ids("<fin>")
    word = tokenizer("the", add_special_tokens=False)["input_ids"][0]
    before = stop_ids(tokenizer, model)
    assert before == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for eos, more in ((fin, [fin]), ([fin, word], [fin]), (None, [])):  # an ordinary word is a mistake in the config
        model.generation_config = GenerationConfig(eos_token_id=eos)
        assert stop_ids(tokenizer, model) == [*before, *more]
    harness.set_generation(model, tokenizer)
    assert model.generation_config.eos_token_id == before


EVIL = """
from pathlib import Path
Path({marker!r}).write_text("strangers' code has run")
class C: pass
"""


def test_code_of_a_model_never_runs_and_nothing_is_asked(
    trained_run: TrainedRun, lab: PocketPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """transformers would ask on standard input whether to run it, and the prompt would answer."""
    evil, marker = Path(shutil.copytree(trained_run.base, tmp_path / "evil")), tmp_path / "marker"
    (evil / "evil.py").write_text(EVIL.format(marker=str(marker)))
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C", "AutoTokenizer": ["evil.C", None]}
    edit(evil / "config.json", lambda c: c.update(model_type="evil", auto_map=code))
    edit(evil / "tokenizer_config.json", lambda c: c.update(tokenizer_class="Evil", auto_map=code))
    folder = Path(shutil.copytree(trained_run.folder, tmp_path / "run"))
    edit(folder / "manifest.json", lambda m: m["config"]["model"].update(name=str(evil)))
    edit(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class="Evil", auto_map=code))
    shutil.copy(evil / "evil.py", folder)

    bare = ["--config", str(ROOT / "configs" / "sft_pocket.yaml"), f"model.name={evil}", f"eval.data.ifeval={lab.eval}"]
    does = commands(lab, evil, folder, tmp_path / "out") | {
        "generate --model": lambda: generate.main(["--model", str(evil), "-"]),
        "eval --base": lambda: evaluation.main([*bare, "--base", f"output.results_dir={tmp_path}"]),
        "eval --merged": lambda: evaluation.main([*bare, "--merged", str(evil), f"output.results_dir={tmp_path}"]),
    }
    for name, command in does.items():
        stdin = io.StringIO("yes\n" * 9)
        monkeypatch.setattr("sys.stdin", stdin)
        assert command() == 2, name
        out, err = capsys.readouterr()
        assert stdin.tell() == 0 and not marker.exists() and "[y/N]" not in out + err, name
        assert err.count("error: ") == 1 and "Traceback" not in err, name


def test_no_call_leaves_the_choice_to_run_code_open():
    """Every call in the source that reads a model, a tokenizer or data from files that may be a stranger's."""
    loose, seen = [], set()
    for path in sorted(Path(str(atlas.__file__)).parent.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            function = ast.unparse(call.func)
            flags = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            owner, _, method = function.rpartition(".")
            if method in ("from_pretrained", "from_config"):
                seen.add(function)
                # These read one JSON file each, and have no such flag.
                if owner not in ("GenerationConfig", "PeftConfig") and flags.get("trust_remote_code") != "False":
                    loose.append(f"{path.name}: {function}")
                if (
                    owner.startswith("AutoModelFor")
                    and method == "from_pretrained"
                    and flags.get("use_safetensors") != "True"
                ):
                    loose.append(f"{path.name}: {function} reads pickles")
            elif method == "load_dataset" or function == "load_dataset":
                seen.add("load_dataset")
                if "trust_remote_code" in flags:  # datasets 5 runs no code of data sets any more
                    loose.append(f"{path.name}: load_dataset")
    assert loose == []
    assert seen == {
        "AutoModelForSequenceClassification.from_pretrained",  # a reward model
        *("AutoModelForCausalLM.from_pretrained", "AutoModelForCausalLM.from_config", "AutoConfig.from_pretrained"),
        *(
            "AutoTokenizer.from_pretrained",
            "GenerationConfig.from_pretrained",
            "PeftConfig.from_pretrained",
            "load_dataset",
        ),
    }
