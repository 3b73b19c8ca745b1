"""What pyproject.toml cannot say: the folder configs/ of the checkout lies inside the package rl in a wheel."""

import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # an editable installation reads them where they are
            for path in sorted(pathlib.Path("configs").rglob("*.yml")):
                target = pathlib.Path(self.build_lib, "rl", path)
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": BuildWithConfigs})
