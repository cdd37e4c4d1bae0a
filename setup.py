"""The checkout's configs travel in the wheel, as atlas/configs. All else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithConfigs(build_py):
    def run(self) -> None:
        built = Path(self.build_lib) / "atlas"
        # pip builds in the checkout and leaves build/ there. What is removed or renamed since would go into the next wheel.
        shutil.rmtree(built, ignore_errors=True)
        super().run()
        if not self.editable_mode:  # an editable install reads them from the checkout
            folder = built / "configs"
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(path for path in Path("configs").rglob("*") if path.suffix in (".yaml", ".sbatch")):
                target = folder / path.relative_to("configs")
                target.parent.mkdir(exist_ok=True)
                self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": WithConfigs})
