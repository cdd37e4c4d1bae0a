"""`manifest.json`: what made this adapter, in enough detail to make it again."""

import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.compat import versions
from atlas.config import Config, LoadedConfig, experiment
from atlas.config.render import config_lines
from atlas.device import DevicePlan
from atlas.files import digest
from atlas.launch import command_line, processes

if TYPE_CHECKING:
    from atlas.models.adapters import Adapter
    from atlas.models.load import BaseFiles


def build_manifest(
    loaded: LoadedConfig,
    plan: DevicePlan,
    base: "BaseFiles",
    method: str,
    rows: dict[str, Any],
    chat_template: str,
    result: dict[str, Any],
    parent: "tuple[Adapter, str] | None" = None,
) -> dict[str, Any]:
    """The manifest as plain JSON types. `rows` is what there is to say of the data, `result` what the run found out (steps, losses,
    tokens, times), `parent` the adapter that it goes on from and the SHA-256 of its weights; its own manifest is kept within."""
    gone_on_from = {}
    if parent is not None:
        adapter, sha256 = parent
        known = {"name": adapter.name, "revision": adapter.revision, "sha256": sha256}
        gone_on_from = {"parent": {**known, "manifest": adapter.manifest or None}}
    return {
        "format": 2,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "phase": loaded.config.phase,
        "method": method,
        "config_hash": loaded.config_hash,
        "config": loaded.config.model_dump(mode="json"),
        "config_lines": config_lines(loaded, plan.decided),
        "experiment": experiment(loaded.config),
        "local": local_names(loaded.config),
        "base": {"content": base.content, "commit": base.commit},
        **gone_on_from,
        "processes": processes(),
        "strategy": plan.decided["train.strategy"][0],
        "device": {"hardware": plan.hardware, **{key: value for key, (value, _) in plan.decided.items()}},
        "versions": versions(),
        "git": git_state(),
        **rows,
        "chat_template_sha256": digest(chat_template),
        "result": result,
    }


def local_names(config: Config) -> list[str]:
    """Which names of models and sources are paths on this machine; elsewhere they could pass for Hub ids."""
    model = config.model
    names = {model.name, model.tokenizer_name, model.adapter, *(s.name for s in config.data.train)}
    return sorted(name for name in names if name is not None and Path(name).exists())


def git_state() -> dict[str, Any] | None:
    """Commit of the atlas checkout that runs, and whether it has local changes; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
