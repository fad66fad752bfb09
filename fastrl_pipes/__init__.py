"""Reinforcement learning as a pipeline that can be read.

Importing the package loads nothing heavy: each room is imported by its own name, as in
`from fastrl_pipes.agents.ddpg import *`."""

from importlib.metadata import PackageNotFoundError, version

try: __version__ = version("fastrl_pipes")
except PackageNotFoundError: __version__ = "0+unknown"  # run from a tree that was never installed
