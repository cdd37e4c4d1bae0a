"""Push a finished run to the Hugging Face Hub: everything is on disk first, and only an allow-list goes up."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from atlas.errors import DONE, FAILED, UserError, run_main

# Never training_args.bin (it pickles its arguments), checkpoints or logs.
ALLOWED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "manifest.json",
)


def check_access(repo: str, *, private: bool) -> None:
    """Make sure that `repo` exists (created, private unless said otherwise) and that this token may write to it.

    `create_repo(exist_ok=True)` alone succeeds with a read-only token on an existing repo. Raises `UserError`.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.auth_check(repo, write=True)
    except Exception as error:  # HfHubHTTPError, httpx errors, LocalTokenNotFoundError, ...: all mean no push
        raise UserError(
            f"output.hub_repo: {repo!r} cannot be written to: {str(error).strip().splitlines()[0]}. Log in with a write token "
            "(`hf auth login`, or HF_TOKEN), or run with --no-push-to-hub and push later"
        ) from None


def push(folder: Path, repo: str) -> int:
    """Upload the allow-list in one commit. A failure leaves the folder as it is and prints the command that finishes the job."""
    from huggingface_hub import HfApi

    try:
        commit = HfApi().upload_folder(
            folder_path=folder,
            repo_id=repo,
            allow_patterns=list(ALLOWED),
            commit_message="Adapter, tokenizer and manifest by atlas",
        )
    except Exception as error:
        print(f"error: the push to {repo} failed: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        print(f"the adapter is safe in {folder}; finish with: atlas push {folder} {repo}", file=sys.stderr)
        return FAILED
    print(f"pushed to {repo}, revision {commit.oid}")
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="atlas push", description="Push a finished run to the Hub.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("repo", metavar="namespace/name")
    parser.add_argument("--public", action="store_true", help="where the repo is created, make it public")
    arguments = parser.parse_args(argv)

    def go() -> int:
        if not (arguments.folder / "adapter_config.json").is_file():
            raise UserError(f"{arguments.folder} holds no adapter (adapter_config.json)")
        check_access(arguments.repo, private=not arguments.public)
        return push(arguments.folder, arguments.repo)

    return run_main(go)


if __name__ == "__main__":
    sys.exit(main())
