"""What `make release` refuses, through the real target on a copy; and the files that GitHub and citations read."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import atlas
from rows import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import release

COPIED = ("Makefile", "scripts/release.py", "src/atlas/__init__.py", "CHANGELOG.md", "CITATION.cff")
GIT = ("git", "-c", "user.name=ann", "-c", "user.email=ann@example.org")


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A commit of what a release looks at first, with nothing under Unreleased."""
    for name in COPIED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    changelog = tmp_path / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8")
    changelog.write_text(re.sub(r"(?s)(## \[Unreleased\]\n).*?(?=## \[)", r"\1\n", text), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    commit()
    return tmp_path


def commit() -> None:
    subprocess.run(["git", "add", "-A"], check=True)
    subprocess.run([*GIT, "commit", "-q", "--allow-empty", "-m", "all"], check=True)


def change(path: Path, pattern: str, by: str) -> None:
    text = path.read_text(encoding="utf-8")
    changed = re.sub(pattern, by, text, count=1, flags=re.M)
    assert changed != text
    path.write_text(changed, encoding="utf-8")


def test_this_version_has_its_entry_and_its_citation(copy: Path):
    assert release.version() == atlas.__version__
    assert release.refusals(atlas.__version__) == []


@pytest.mark.parametrize(
    ("name", "pattern", "by", "says"),
    [
        (
            "src/atlas/__init__.py",
            r'^__version__ = ".*"',
            '__version__ = "7.0.0"',
            ("`## [7.0.0] - ", "`version: 7.0.0`"),
        ),
        (
            "CHANGELOG.md",
            r"^## \[Unreleased\]\n",
            "## [Unreleased]\n\n- More.\n",
            ("newest with a text is '[Unreleased]'",),
        ),
        ("CHANGELOG.md", r"^(## \[\d.*) - .*$", r"\1", (f"`## [{atlas.__version__}] - YYYY-MM-DD`",)),
        ("CITATION.cff", r"^version: .*$", "version: 0.0.9", (f"CITATION.cff: write `version: {atlas.__version__}`",)),
    ],
)
def test_a_release_that_is_not_written_up_is_refused(
    copy: Path, name: str, pattern: str, by: str, says: tuple[str, ...]
):
    change(copy / name, pattern, by)
    commit()
    done = subprocess.run(["make", "release", f"PYTHON={sys.executable}"], capture_output=True, text=True)
    assert done.returncode != 0 and all(words in done.stderr for words in says), done.stderr
    assert "commit these changes" not in done.stderr and not (copy / "dist").exists()


def test_a_release_is_one_commit_and_has_one_tag(copy: Path):
    (copy / "left.txt").touch()
    done = subprocess.run(["make", "release", f"PYTHON={sys.executable}"], capture_output=True, text=True)
    assert done.returncode != 0 and "?? left.txt" in done.stderr
    subprocess.run(["git", "tag", f"v{atlas.__version__}"], check=True)
    (copy / "left.txt").unlink()
    assert release.refusals(atlas.__version__) == []  # the tag is on this commit
    commit()
    (found,) = release.refusals(atlas.__version__)
    assert f"another commit has the tag v{atlas.__version__}" in found


def test_a_wheel_holds_each_file_and_nothing_else(tmp_path: Path):
    source, wheel = tmp_path / "source", tmp_path / "atlas.whl"
    for name in ("src/atlas/py.typed", "src/atlas/pages/new.jinja", "configs/base.yaml", "configs/launch/job.sbatch"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    inside = {
        "atlas/py.typed": "src/atlas/py.typed",
        "atlas/pages/new.jinja": "src/atlas/pages/new.jinja",
        "atlas/configs/base.yaml": "configs/base.yaml",
        "atlas/configs/launch/job.sbatch": "configs/launch/job.sbatch",
        "atlas_posttraining-1.dist-info/METADATA": "",
    }

    def difference(held: dict[str, str]) -> list[str]:
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in held.items():
                archive.writestr(name, text)
        return release.difference(source, wheel)

    assert difference(inside) == []
    wrong = {**inside, "atlas/configs/base.yaml": "stale", "atlas/old.py": ""}
    del wrong["atlas/pages/new.jinja"]
    assert difference(wrong) == ["* atlas/configs/base.yaml", "+ atlas/old.py", "- atlas/pages/new.jinja"]


def test_a_build_forgets_what_an_earlier_one_has_left(tmp_path: Path):
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "src/atlas/__init__.py", "configs/base.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("src/atlas/audit.py", "configs/old.yaml"):
        (tmp_path / name).touch()

    def built() -> set[str]:
        subprocess.run([sys.executable, "setup.py", "-q", "build_py"], cwd=tmp_path, check=True)
        lib = tmp_path / "build" / "lib"
        return {str(path.relative_to(lib)) for path in lib.rglob("*") if path.is_file()}

    now = {"atlas/__init__.py", "atlas/configs/base.yaml"}
    assert built() == now | {"atlas/audit.py", "atlas/configs/old.yaml"}
    for name in ("src/atlas/audit.py", "configs/old.yaml"):  # as `git pull` does
        (tmp_path / name).unlink()
    assert built() == now


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.citation-file-format", "CITATION.cff"),
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("custom.github-workflows-require-timeout", ".github/workflows/*.yml"),
        ("vendor.github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
    ],
)
def test_the_files_for_others_are_as_their_schemas_say(schema: str, files: str, capsys: pytest.CaptureFixture[str]):
    check = pytest.importorskip("check_jsonschema")  # it brings the schemas along
    paths = sorted(map(str, ROOT.glob(files)))
    assert paths
    with pytest.raises(SystemExit) as done:
        check.main(["--builtin-schema", schema, *paths])
    assert done.value.code == 0, capsys.readouterr().out


def test_the_workflow_runs_targets_of_the_makefile_and_may_only_read():
    workflow = YAML(typ="safe").load(ROOT / ".github" / "workflows" / "ci.yml")
    (job,) = workflow["jobs"].values()
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (
        {"lint", "test", "docs"} == set(job["strategy"]["matrix"]["target"]) <= set(re.findall(r"make (\S+)", listed))
    )
    assert workflow["permissions"] == {"contents": "read"} and "permissions" not in job
    uses = [step["uses"] for step in job["steps"] if "uses" in step]
    assert uses and all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in uses)
