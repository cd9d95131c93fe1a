"""How many bytes tensors hold at once, and how many of them FSDP needs to gather layers.

    with LiveBytes() as memory: ...          memory.peak, memory.gathered_at_peak

tools/plan.py uses it on fake tensors, tests on real ones. FSDP is watched through two of its private
methods, which torch may move. `fsdp_param_group` is the only place that names them.
"""
import contextlib
import importlib
import weakref
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from cli import InputError


def fsdp_param_group():
    """FSDP's class whose methods `unshard` and `wait_for_unshard` gather a layer. Raises an InputError that
    names torch's version where they are no longer there."""
    where = "torch.distributed.fsdp._fully_shard._fsdp_param_group"
    try:
        group = importlib.import_module(where).FSDPParamGroup
        group.unshard, group.wait_for_unshard  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise InputError(f"torch {torch.__version__}: its FSDP has changed ({error}), so what it gathers "
                         "cannot be counted; use another torch, or correct tools/live_bytes.py") from None
    return group


class LiveBytes(TorchDispatchMode):
    """Counts the bytes that tensors made within it hold at once: `live` now, `peak` at most.

    It does not ask the process or the GPU, whose numbers depend on the allocator. `gathered`: the part of
    these bytes into which FSDP gathers layers.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.gathered = self.gathered_at_peak = 0
        self.sizes, self.of_fsdp = {}, set()  # {storage: its bytes}, the storages that FSDP gathers into
        self.gathering = False  # whether FSDP is gathering a layer

    def __enter__(self):
        group, resize = fsdp_param_group(), torch.UntypedStorage.resize_

        def resized(storage, size):  # so FSDP frees the memory of a gathered layer, and takes it again
            resize(storage, size)
            if storage._cdata in self.sizes:
                self._holds(storage._cdata, size)

        def noted(action):
            def gather(*arguments, **named):
                self.gathering = True
                action(*arguments, **named)
                self.gathering = False
            return gather
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(patch.object(torch.UntypedStorage, "resize_", resized))
        self.patches.enter_context(patch.multiple(group, unshard=noted(group.unshard),
                                                  wait_for_unshard=noted(group.wait_for_unshard)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # A loss or a norm is asked for as a number, and a fake tensor has none.
            return 1.0 if args[0].is_floating_point() else 1
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor, what this rank holds
                self._found(local.untyped_storage())
        return result

    def _found(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = 0
            if self.gathering:
                self.of_fsdp.add(key)
            self._holds(key, storage.nbytes())
            weakref.finalize(storage, self._freed, key)

    def _holds(self, key, size):
        grown, self.sizes[key] = size - self.sizes[key], size
        self.live += grown
        self.gathered += grown * (key in self.of_fsdp)
        if self.live > self.peak:
            self.peak, self.gathered_at_peak = self.live, self.gathered

    def _freed(self, key):
        self._holds(key, 0)
        del self.sizes[key]
        self.of_fsdp.discard(key)

    def during(self, action):
        """(bytes at the peak of `action()` beyond those before it, gathered layers among them)"""
        before, self.peak = self.live, self.live
        action()
        return self.peak - before, self.gathered_at_peak
