"""What setup.cfg cannot say: the manual page and the completions are made when a wheel is built, from the parser."""
from __future__ import annotations

import sys
from pathlib import Path

import setuptools  # before distutils, whose place it takes

from distutils.command.install_data import install_data  # isort: skip

ROOT = Path(__file__).resolve().parent


class InstallData(install_data):
    def run(self):
        super().run()
        sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "lib")]
        from xencrash import manual

        for name, text in manual.files().items():
            path = Path(self.install_dir, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            self.outfiles.append(str(path))


# A folder of data, without files: install_data is run for such alone.
setuptools.setup(cmdclass={"install_data": InstallData}, data_files=[("share/man/man1", [])])
