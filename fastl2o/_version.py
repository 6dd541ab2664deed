"""The installed version, from the package's metadata."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fastl2o")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0.0.0+uninstalled"
