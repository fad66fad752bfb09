"""Who reads a tensor back to the host, or waits for its device? On a CPU nothing would be seen of it, so every way that
there is out of a tensor is watched: operators that give Python a number or whose output has a size that depends on values,
copies to another device, NumPy in either direction."""
from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive", "bincount", "histc"}
MAKES = {"lift_fresh", "lift_fresh_copy", "lift"}  # a tensor out of numbers of the host
METHODS = ("numpy", "__array__", "tolist", "item", "cpu", "__bool__", "__int__", "__float__", "__index__", "__dlpack__")


class HostRead(AssertionError):
    "Something has left the device, or come from the host"


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS or name in MAKES:
            raise HostRead(f"aten.{name}")
        if name == "repeat_interleave" and len(args) and isinstance(args[0], torch.Tensor) and (kwargs or {}).get("output_size") is None:
            raise HostRead("aten.repeat_interleave: the size of its output is a value")
        if name.startswith(("index", "_index_put")) and any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in _indices(args)):
            raise HostRead(f"aten.{name} with a mask: the size of its output is a value")
        before = {x.device for x in args if isinstance(x, torch.Tensor) and x.dim()}
        out = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_", "to") and isinstance(out, torch.Tensor) and before - {out.device}:
            raise HostRead(f"aten.{name} from {before} to {out.device}")
        return out


def _indices(args):
    return next((a for a in args[1:] if isinstance(a, (list, tuple))), ())


@contextlib.contextmanager
def no_host_reads(allowed: tuple[str, ...] = ()) -> Iterator[None]:
    "Inside of the block, whatever reads a tensor on the host raises HostRead with the line that does"
    with contextlib.ExitStack() as stack:
        for method in METHODS:
            if method not in allowed:
                stack.enter_context(mock.patch.object(torch.Tensor, method, _raising(method)))
        for function in ("from_numpy", "asarray"):
            stack.enter_context(mock.patch.object(torch, function, _raising(function)))
        stack.enter_context(_Watch())
        yield


def _raising(name):
    def raising(*args, **kwargs):
        line = next((f for f in reversed(traceback.extract_stack()[:-1]) if "host_reads" not in f.filename), None)
        raise HostRead(f"{name}, called by {line.filename}:{line.lineno}" if line else name)
    return raising
