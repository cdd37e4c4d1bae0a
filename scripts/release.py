"""Build a release, and try it as a stranger would: `make release`. Nothing is uploaded; the command that does it is printed.

1. It is refused before anything is built: changes that are not committed, a version (`__version__` in src/atlas/__init__.py) that
   is not the newest entry of CHANGELOG.md or that has a tag already, a CITATION.cff of another version.
2. sdist and wheel are built from the commit alone, so that no file that lies about gets in. The wheel must hold each file of
   src/atlas and each config, and nothing else. A wheel of the sdist must be the same, byte by byte. `twine check --strict` reads
   both.
3. The wheel is installed in a new environment in a temporary folder, with the newest libraries that it allows. There `atlas pocket`
   runs in an empty folder.

Only Python's own library is needed: build and twine get an environment of their own in outputs/release. The new environment takes
about as much room as .venv; TMPDIR says where. Exit status 0: all is well; 1: a step failed; 2: refused.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

DIST = Path("dist")
TOOLS = Path("outputs/release")
CONFIGS = (".yaml", ".sbatch")  # of configs/, as in setup.py


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def version() -> str:
    (found,) = re.findall(r'^__version__ = "(.+)"$', Path("src/atlas/__init__.py").read_text(encoding="utf-8"), re.M)
    return str(found)


def refusals(version: str) -> list[str]:
    """What has to be done before `version` can be built."""
    found = []
    if changes := output("git", "status", "--porcelain"):
        found.append(f"commit these changes first, or remove them:\n{changes}")
    entries = re.split(r"^## ", Path("CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    written = [entry.partition("\n") for entry in entries]
    newest = next((title for title, _, text in written if text.strip()), "none")
    if not re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", newest):
        found.append(
            f"CHANGELOG.md: write an entry `## [{version}] - YYYY-MM-DD`; the newest with a text is {newest!r}"
        )
    if f"\nversion: {version}\n" not in Path("CITATION.cff").read_text(encoding="utf-8"):
        found.append(f"CITATION.cff: write `version: {version}`")
    if (tag := f"v{version}") in output("git", "tag").split() and tag not in output(
        "git", "tag", "--points-at"
    ).split():
        found.append(f"another commit has the tag {tag}: raise __version__ in src/atlas/__init__.py")
    return found


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def difference(source: Path, wheel: Path) -> list[str]:
    """Files that the wheel lacks (-) or should not hold (+), or that are not as in `source` (*), beside its own metadata."""
    package, configs = source / "src" / "atlas", source / "configs"
    paths = {f"atlas/{path.relative_to(package).as_posix()}": path for path in package.rglob("*") if path.is_file()}
    for path in configs.rglob("*"):
        if path.suffix in CONFIGS:
            paths[f"atlas/configs/{path.relative_to(configs).as_posix()}"] = path
    held = {name: data for name, data in contents(wheel).items() if ".dist-info/" not in name}
    lacks, more = (f"- {name}" for name in paths.keys() - held), (f"+ {name}" for name in held.keys() - paths)
    return sorted(
        [*lacks, *more, *(f"* {name}" for name in paths.keys() & held if paths[name].read_bytes() != held[name])]
    )


def environment(folder: Path, *packages: str) -> Path:
    """A new virtual environment with `packages`; its folder of commands."""
    venv.create(folder, with_pip=True, clear=True)
    commands = folder / "bin"
    subprocess.run([commands / "pip", "install", "--quiet", "--disable-pip-version-check", *packages], check=True)
    return commands


def build(temporary: Path) -> tuple[Path, Path]:
    """sdist and wheel of the commit, in dist/."""
    source, again = temporary / "source", temporary / "again"
    source.mkdir()
    with subprocess.Popen(["git", "-c", "tar.umask=022", "archive", "HEAD"], stdout=subprocess.PIPE) as archive:
        subprocess.run(["tar", "-x", "-C", source], stdin=archive.stdout, check=True)
    commands = environment(TOOLS, "build", "twine")
    os.environ["SOURCE_DATE_EPOCH"] = output("git", "log", "-1", "--format=%ct")  # the same commit is the same wheel
    python = (commands / "python", "-m", "build")
    subprocess.run(
        [*python, "--outdir", DIST, source], check=True, stdout=subprocess.DEVNULL
    )  # the wheel from the sdist
    subprocess.run([*python, "--wheel", "--outdir", again, source], check=True, stdout=subprocess.DEVNULL)
    (direct,) = again.iterdir()
    wheel = DIST / direct.name
    sdist = DIST / f"{'-'.join(direct.name.split('-')[:2])}.tar.gz"
    if wrong := difference(source, wheel):
        raise SystemExit("\n".join(["the wheel differs from src/atlas and configs:", *wrong]))
    if wheel.read_bytes() != direct.read_bytes():
        differ = contents(wheel).items() ^ contents(direct).items()
        raise SystemExit(f"the sdist builds another wheel: {sorted({name for name, _ in differ}) or 'its zip file'}")
    subprocess.run([commands / "twine", "check", "--strict", sdist, wheel], check=True)
    return sdist, wheel


def try_out(wheel: Path, temporary: Path, version: str) -> None:
    """Install the wheel in a new environment and run the pocket lab there, in an empty folder."""
    started = time.monotonic()
    commands = environment(temporary / "env", f"{wheel.resolve()}[eval]")
    print(f"installed in {time.monotonic() - started:.0f} s")
    empty = temporary / "empty"
    empty.mkdir()
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    own["PATH"] = f"{commands}:{own['PATH']}"
    told = subprocess.run(
        [commands / "atlas", "--version"], cwd=empty, env=own, check=True, capture_output=True, text=True
    )
    if told.stdout.strip() != f"atlas {version}":
        raise SystemExit(f"the installed command says {told.stdout.strip()!r}, not version {version}")
    subprocess.run([commands / "atlas", "pocket"], cwd=empty, env=own, check=True)
    report = json.loads((empty / "outputs/pocket/results/pocket.json").read_text(encoding="utf-8"))
    print(f"tried with {', '.join(f'{name} {found}' for name, found in report['versions'].items())}")


def main() -> int:
    wanted = version()
    if found := refusals(wanted):
        print(f"error: {wanted} cannot be released yet", *found, sep="\n", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="atlas-release-") as temporary:
        print(f"== build {wanted} from commit {output('git', 'rev-parse', '--short', 'HEAD')}", flush=True)
        built = build(Path(temporary))
        print("\n== install the wheel in a new environment and run `atlas pocket` in an empty folder", flush=True)
        try_out(built[1], Path(temporary), wanted)
    print(f"\n== atlas {wanted} is ready. Nothing has been uploaded")
    for path in built:
        print(f"{path}  {path.stat().st_size:,} bytes  sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    print(f"to publish:  git tag -a v{wanted} -m 'atlas {wanted}' && git push origin v{wanted}")
    print(f"             {TOOLS}/bin/twine upload {built[0]} {built[1]}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"error: {' '.join(map(str, error.cmd))} ended with exit status {error.returncode}") from None
