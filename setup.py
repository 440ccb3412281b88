"""Build the package; all its metadata comes from settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(root / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]


class BuildWithNotebooks(build_py):
    """A built package holds the notebooks, and what they read, for `vae_nb lab`; an editable one has them beside it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / cfg["lib_path"] / "notebooks"
        for path in [
            root / "README.md",
            *root.glob("results/*.json*"),
            *(root / cfg["nbs_path"]).rglob("*.ipynb"),
        ]:
            if ".ipynb_checkpoints" in path.parts:
                continue
            (target / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(path), str(target / path.relative_to(root)))


lab = cfg["lab_requirements"].split()
dev, docs = cfg["dev_requirements"].split(), cfg["docs_requirements"].split()
package = cfg["lib_path"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license={"apache2": "Apache-2.0"}[cfg["license"]],
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Framework :: Jupyter",
        f"Intended Audience :: {cfg['audience']}",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=[package, f"{package}.*"]),
    package_data={
        package: ["py.typed", "*.pyi", "pretrained/*/*", "explore/*.js", "explore/*.css"]
    },
    cmdclass={"build_py": BuildWithNotebooks},
    zip_safe=False,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"lab": lab, "dev": dev + lab, "docs": docs},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
