"""Checks of what is reached over the network: the Hub and the tracker."""

import contextlib
import io
import re

from atlas.errors import RunError, UserError, first_line
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
    """Can the trackers of train.report_to start?"""
    from transformers.integrations import get_available_reporting_integrations

    names, wandb_off = available_trackers(ready.loaded.config.train_value("report_to"))
    known = {"none", "all", *get_available_reporting_integrations()}
    if missing := [name for name in names if name not in known]:
        raise UserError(
            f"train.report_to: {missing[0]!r} is not installed, or transformers knows no such tracker: install its package, or set "
            "train.report_to=none"
        )
    if wandb_off:
        return "warn", f"wandb off: {wandb_off}"
    if names == ["none"]:
        return "skip", "train.report_to is none"
    if "wandb" in names and not wandb_is_offline() and is_main_process():
        import wandb

        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                wandb.login(verify=True)
        # AuthenticationError for a wrong key and for no network alike, UsageError for a malformed key
        except Exception as error:
            refused = not re.search(r"respond|connect|timed|50\d", str(error))
            raise (UserError if refused else RunError)(
                f"train.report_to: wandb cannot be used ({first_line(error)}): log in again (`wandb login`), or set "
                "WANDB_MODE=offline, or train.report_to=none"
            ) from None
    return ", ".join(names)
