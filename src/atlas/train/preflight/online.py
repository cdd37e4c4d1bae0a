"""Checks of what is reached over the network: the Hub and the tracker."""

import contextlib
import io
import re

from atlas.errors import UserError, first_line
from atlas.hub.push import check_access
from atlas.hub_client import check_network
from atlas.launch import is_main_process
from atlas.train.arguments import available_trackers, wandb_is_offline
from atlas.train.preflight.checklist import Found, Ready


def hub(ready: Ready) -> Found:
    """May this token write to output.hub_repo?"""
    from huggingface_hub import constants

    output = ready.loaded.config.output
    if output.hub_repo is None:
        return "skip", "nothing is pushed (output.hub_repo is not set, or --no-push-to-hub)"
    if not is_main_process():
        return "skip", "the first process asks"
    if constants.HF_HUB_OFFLINE:
        return "skip", f"HF_HUB_OFFLINE is set: you can push to {output.hub_repo} later"
    check_access(output.hub_repo, private=output.hub_private)
    return f"{output.hub_repo} can be written to"


def network(ready: Ready, needed: bool) -> Found:
    """Does the Hub answer, if a model or data have to come from it?"""
    from huggingface_hub import constants

    if needed and not constants.HF_HUB_OFFLINE:
        check_network()
    ready.network = constants.ENDPOINT
    if not needed:
        return "skip", "everything is on this machine"
    return ("skip", "HF_HUB_OFFLINE is set: what is cached is used") if constants.HF_HUB_OFFLINE else ready.network


def tracker(ready: Ready) -> Found:
    """Which trackers of train.report_to can start? Only a name that nobody knows and a key that W&B refuses are failures."""
    from transformers.integrations import get_available_reporting_integrations

    ready.trackers, off = available_trackers(ready.loaded.config.train_value("report_to"))
    known = {*get_available_reporting_integrations()}
    if missing := [name for name in ready.trackers if name not in known]:
        raise UserError(
            f"train.report_to: {missing[0]!r} is not installed, or transformers knows no such tracker: install its package, or set "
            "train.report_to=none"
        )
    if "wandb" in ready.trackers and not wandb_is_offline() and is_main_process():
        import wandb

        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                wandb.login(verify=True)
        # AuthenticationError for a wrong key and for no network alike, UsageError for a malformed key
        except Exception as error:
            if not re.search(r"respond|connect|timed|50\d", str(error)):
                raise UserError(
                    f"train.report_to: wandb cannot be used ({first_line(error)}): log in again (`wandb login`), or set "
                    "WANDB_MODE=offline, or train.report_to=none"
                ) from None
            off["wandb"] = (
                f"its server does not answer ({first_line(error)}); WANDB_MODE=offline keeps the log on the disk"
            )
            ready.trackers.remove("wandb")
    without = [f"{name} off: {problem}" for name, problem in off.items()]
    if without:
        return "warn", "; ".join([*without, *ready.trackers])
    return ", ".join(ready.trackers) if ready.trackers else ("skip", "train.report_to is none")
