"""The checkout's configs travel in the wheel, as atlas/configs. All else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable install reads them from the checkout
            folder = Path(self.build_lib) / "atlas" / "configs"
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(path for path in Path("configs").rglob("*") if path.suffix in (".yaml", ".sbatch")):
                target = folder / path.relative_to("configs")
                target.parent.mkdir(exist_ok=True)
                self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": WithConfigs})
