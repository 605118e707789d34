"""The packages of the distribution; everything else about it is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["megatron_zj", "megatron_zj.*", "kernels", "kernels.*"]), "megatron_zj.conf"],
    package_dir={"megatron_zj.conf": "conf"},
    package_data={"megatron_zj.conf": ["**/*.yaml"], "": ["*.json"]},
)
