"""Hand the values of settings.ini to setuptools; pyproject.toml lists them as dynamic."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here/"settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

def lines(key): return [o.strip() for o in cfg[key].splitlines() if o.strip()]

suffix = "_requirements"
setup(
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    license_expression=cfg["license"],
    classifiers=lines("classifiers"),
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["fastrl_pipes", "fastrl_pipes.*"]),
    package_data={"fastrl_pipes": ["py.typed", "presets/*.yaml"]},
    install_requires=lines("requirements"),
    extras_require={k.removesuffix(suffix): lines(k) for k in cfg if k.endswith(suffix)},
    entry_points={"console_scripts": lines("console_scripts"),
                  "nbdev": ["fastrl_pipes = fastrl_pipes._modidx:d"]},
)
