"""The functions of the package that make a learner, for tests that hold every one of them."""
import importlib
import inspect
import pkgutil

from fastrl_pipes import agents


def learners():
    "name -> function, of every module of `agents`"
    found = {}
    for module in pkgutil.iter_modules(agents.__path__, "fastrl_pipes.agents."):
        for name, thing in vars(importlib.import_module(module.name)).items():
            if name.endswith("Learner") and inspect.isfunction(thing) and thing.__module__ == module.name:
                found[name] = thing
    return found
