"""What the package needs of torchdata, and nothing more: a `BaseNode` of our own, so that we could leave it in a day."""
import sys
from types import ModuleType


class BaseNode:
    "Three verbs: `reset(state)`, `next()`, `get_state()`; the first pull, or the first question for the state, resets"

    def __init__(self, *args, **kwargs):
        self._ready = False

    def __iter__(self):
        return self

    def reset(self, initial_state=None):
        self._ready = True

    def __next__(self):
        if not self._ready:
            self.reset(None)
        return self.next()

    def state_dict(self):
        if not self._ready:
            self.reset(None)
        return self.get_state()


def install():
    "Stand in for `torchdata.nodes`; before the package is imported"
    assert "fastrl_pipes" not in sys.modules and "torchdata" not in sys.modules
    package, nodes = ModuleType("torchdata"), ModuleType("torchdata.nodes")
    nodes.BaseNode, package.nodes = BaseNode, nodes
    sys.modules.update({"torchdata": package, "torchdata.nodes": nodes})
