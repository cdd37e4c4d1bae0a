"""Where atlas depends on details of other libraries: versions that do not fit, and names that a new version may change.

A name with a leading underscore is no promise of its library, so atlas uses the public way wherever there is one. Where there is
none, `PRIVATE` lists the name, and a small function below, named after what it does, is the only place that uses it. To add one:
put module or class and name into `PRIVATE` (with the parameters that atlas passes), write the function, which gets at the name
through `private` and says why no public way will do, and test what it returns on a real object in tests/test_compat.py. A method
that atlas overrides needs the line in `PRIVATE` alone. Where a new version has changed a name, `make test` says "transformers X.Y
has no ...: see PRIVATE in atlas/compat.py", and so does the run that needs it.
"""

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from atlas.errors import RunError, UserError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

# Module or module:Class -> name -> the parameters that atlas relies on, by position or name.
PRIVATE: dict[str, dict[str, tuple[str, ...]]] = {
    "transformers.utils.chat_template_utils": {
        "_compile_jinja_template": ("chat_template",),
        "_render_with_assistant_indices": (
            "compiled_template",
            "messages",
            "tools",
            "documents",
            "add_generation_prompt",
        ),
        "_plain_template_data": ("value",),
        "_alias_reasoning_fields": ("chat",),
    },
    "transformers.trainer:Trainer": {  # overridden or called in train/resume.py
        "_run_epoch": ("epoch",),
        "_save_checkpoint": ("model", "trial"),
        "_save": ("output_dir", "state_dict"),
        "_evaluate": ("trial", "ignore_keys_for_eval"),
        "_determine_best_metric": ("metrics", "trial"),
        "_load_best_model": (),
        "_get_train_sampler": (),
        "_move_model_to_device": ("model", "device"),
        "_issue_warnings_after_load": ("load_result",),
    },
    "trl.trainer.dpo_trainer:DPOTrainer": {  # overridden in train/dpo_trainer.py
        "_prepare_dataset": ("dataset",),
        "_precompute_ref_logps": ("dataset", "name", "batch_size"),
    },
    "trl.trainer.utils": {  # what TRL's fused LM head is made of; replaced while atlas' own computes
        "_use_triton": ("device",),
        "_ChunkedLogProbFunction": (),
    },
}
# Of a Trainer while it trains: the sums of its log since the last line, and with how many steps its mean loss is taken.
_LOG = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step")


def private(owner: str, name: str) -> Any:
    """The private `name` of a module or class (`module` or `module:Class`), which `PRIVATE` lists. Raises `RunError`, which names
    library and version, where it is not there or takes other parameters."""
    module, _, of = owner.partition(":")
    library = module.partition(".")[0]
    try:
        found = import_module(module)
        found = getattr(getattr(found, of) if of else found, name)
        changed = [p for p in PRIVATE[owner][name] if p not in inspect.signature(found).parameters]
    except (ImportError, AttributeError):
        problem = f"has no {owner}.{name}"
    else:
        if not changed:
            return found
        problem = f"has another {owner}.{name}, which does not take {', '.join(changed)}"
    raise RunError(
        f"{library} {version(library)} {problem}: see PRIVATE in atlas/compat.py. Install a version that was tested with atlas"
    )


@cache
def _renderer(name: str) -> Any:
    return private("transformers.utils.chat_template_utils", name)


def render_template(template: str, values: dict[str, Any], marked: bool) -> tuple[str, list[tuple[int, int]]]:
    """A chat template's text, and where it is `marked` the character spans inside its generation markers. The public
    `render_jinja_template` replaces functions among the values by their names, so that it cannot be given a date."""
    compiled = _renderer("_compile_jinja_template")(template)
    if not marked:
        return str(compiled.render(**values)), []
    text, spans = _renderer("_render_with_assistant_indices")(compiled, **values)
    return str(text), spans


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as `render_jinja_template` gives them to a template: plain types, and reasoning under each of its names."""
    plain: list[dict[str, Any]] = _renderer("_plain_template_data")(messages)
    return list(_renderer("_alias_reasoning_fields")(plain))


def log_sums(trainer: Any) -> dict[str, Any]:
    """What a Trainer has summed up for its log since the last line, which its checkpoints lack; TRL's part where there is one."""
    loss, total, last, _ = (_attribute(trainer, name) for name in _LOG)
    return {"loss": loss.item(), "total_loss": total, "last_logged": last, **metric_sums(trainer)}


def metric_sums(trainer: Any) -> dict[str, Any]:
    """TRL's part of that."""
    metrics = getattr(trainer, "_metrics", {"train": {}})["train"]
    return {
        "total_tokens": getattr(trainer, "_total_train_tokens", None),
        "metrics": {name: list(values) for name, values in metrics.items()},
    }


def restore_log_sums(trainer: Any, sums: Mapping[str, Any]) -> None:
    """The sums of a checkpoint, after the Trainer has set its own to 0. The mean loss is then that of all steps."""
    for name in _LOG:
        _attribute(trainer, name)
    trainer._tr_loss.fill_(sums["loss"])
    trainer._total_loss_scalar, trainer._globalstep_last_logged = sums["total_loss"], sums["last_logged"]
    trainer._initial_global_step = 0
    restore_metric_sums(trainer, sums)


def restore_metric_sums(trainer: Any, sums: Mapping[str, Any]) -> None:
    """What `metric_sums` has returned."""
    if sums["total_tokens"] is not None:
        trainer._total_train_tokens = sums["total_tokens"]
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update({name: list(values) for name, values in sums["metrics"].items()})


def evaluation_metrics(trainer: Any) -> dict[str, list[float]]:
    """What a trainer of TRL has noted of each batch of an evaluation; its log has the mean of each list."""
    metrics: dict[str, list[float]] = _attribute(trainer, "_metrics", "trl")["eval"]
    return metrics


def head_is_fused(device: Any) -> bool:
    """Does TRL's LM head score supervised positions alone on this torch device? It does where it has a kernel in Triton."""
    return bool(private("trl.trainer.utils", "_use_triton")(device))


@contextlib.contextmanager
def fused_head(log_prob: Any) -> Iterator[None]:
    """While this is open, TRL's fused LM head takes supervised positions alone, and computes them with `log_prob`, which has the
    arguments and results of TRL's own function and gets that as its first argument. TRL offers no choice of the function."""
    from trl.trainer import utils

    own, everywhere = (private("trl.trainer.utils", name) for name in ("_ChunkedLogProbFunction", "_use_triton"))
    utils._ChunkedLogProbFunction = SimpleNamespace(apply=partial(log_prob, own.apply))
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction, utils._use_triton = own, everywhere


def _attribute(trainer: Any, name: str, library: str = "transformers") -> Any:
    if not hasattr(trainer, name):
        raise RunError(f"{library} {version(library)} has no Trainer.{name}: see its use in atlas/compat.py")
    return getattr(trainer, name)


_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "huggingface_hub")


def versions(*more: str) -> dict[str, str]:
    """Installed versions of atlas, Python and the libraries it stands on; `more` names further packages."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("atlas-posttraining", *_PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def dataset_fingerprint(rows: "Dataset") -> str:
    """The name under which datasets knows the content of rows: after equal steps from an equal file it is equal. There is no public
    way to it, and the attribute is set on each object, so that `PRIVATE` cannot list it."""
    return str(rows._fingerprint)


def check_libraries() -> str:
    """Look at atlas' own requirements, and at every optional package that PEFT uses if it is installed.

    PEFT raises for a package that is too old (torchao 0.10 on Colab's and Kaggle's images), even if nothing would use it. If
    bitsandbytes cannot be imported, PEFT cannot be imported either.

    Returns:
        The versions of the libraries that matter most.

    Raises:
        UserError: one line for each package, with the command that mends it.
    """
    wrong = [f"{name} {found} is installed, atlas needs {needed}: {mend}" for name, found, needed, mend in _too_old()]
    if not wrong and find_spec("bitsandbytes") is not None:
        try:
            import_module("bitsandbytes")
        except Exception as error:  # a wheel for another CUDA raises RuntimeError, OSError or an error of its own
            wrong.append(
                f"bitsandbytes is installed, but cannot be imported ({first_line(error)}): install one that fits this torch "
                "(`pip install -U bitsandbytes`), or remove it and set quantization.load_in_4bit=false"
            )
    if not wrong:
        from peft import import_utils

        for name, is_available in inspect.getmembers(import_utils, callable):
            package = name.removeprefix("is_").removesuffix("_available")
            if name == f"is_{package}_available":
                try:
                    is_available()
                except ImportError as error:
                    wrong.append(f"PEFT refuses {package} ({first_line(error)}): `pip uninstall -y {package}`")
    if wrong:
        raise UserError("libraries: " + "; ".join(wrong))
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))


def _too_old() -> list[tuple[str, str, str, str]]:
    """Package, version, what is needed and how to get it, for each requirement of atlas that is not met."""
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(line) for line in requires("atlas-posttraining") or ()]
    except PackageNotFoundError:  # not installed, run from a checkout
        return []
    found = []
    for one in needed:
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            try:
                installed = version(one.name)
            except PackageNotFoundError:
                continue  # its import says so; bitsandbytes is not needed everywhere
            if not one.specifier.contains(installed, prereleases=True):
                found.append((one.name, installed, str(one.specifier), f"`pip install -U '{one.name}{one.specifier}'`"))
    return found
