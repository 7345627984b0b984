"""Packages and, later, the native library; everything else is in pyproject.toml.

The folder `kernels` is installed as `ppap.kernels`: a top-level package called `kernels` exists already.
"""

from setuptools import find_packages, setup

setup(
    packages=["ppap", *(f"ppap.{name}" for name in find_packages("ppap")), "ppap.kernels"]
    + [f"ppap.kernels.{name}" for name in find_packages("kernels")],
    package_dir={"ppap": "ppap", "ppap.kernels": "kernels"},
)
