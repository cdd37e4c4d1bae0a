"""What is installed beside atlas and cannot live with it, said before it fails in the middle of a library."""

import inspect
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from atlas.errors import UserError, first_line

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


def check_libraries() -> str:
    """Look at atlas' own requirements, and at every optional package that PEFT would use where it is installed.

    PEFT raises for a package that is too old (torchao 0.10 on Colab's and Kaggle's images), also where nothing would use it.

    Returns:
        The versions of the libraries that matter most.

    Raises:
        UserError: one line for each package, with the command that mends it.
    """
    wrong = [f"{name} {found} is installed, atlas needs {needed}: {mend}" for name, found, needed, mend in _too_old()]
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
