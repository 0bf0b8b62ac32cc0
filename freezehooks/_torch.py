"""Every private part of torch that freezehooks uses, each with the versions it was seen in.

Nothing here is imported from torch before it is used, so a name that a later torch drops breaks the one feature that
needs it, and not the import of the package.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Autograd


graph_task_id: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)
"""Returns the number of the backward pass that this thread is in, or -1 outside (torch 2.0 to 2.14)."""


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call a function once the running backward pass has accumulated all gradients (torch 1.5 to 2.14).

    A callback that is queued by another callback runs after all those queued before it.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


kept_gradient_hooks: Callable[[Tensor], Any] = operator.attrgetter("_post_accumulate_grad_hooks")
"""Returns the dict in which torch keeps a tensor's post-accumulate hooks, or None (torch 2.1 to 2.14)."""


def gradient_hooks(parameter: Tensor) -> MutableMapping[int, Any]:
    """Return the post-accumulate hooks of a tensor, in the order in which they are called (torch 2.1 to 2.14)."""
    return kept_gradient_hooks(parameter) or {}


def tensor_hooks(tensor: Tensor) -> MutableMapping[int, Any]:
    """Return the hooks that were registered with `Tensor.register_hook` (torch 1.0 to 2.14)."""
    return tensor._backward_hooks or {}  # type: ignore[return-value]


def reconnect_hooks(parameter: Tensor) -> None:
    """Make autograd call a tensor's hooks again after `torch.utils.swap_tensors` (torch 2.3 to 2.14).

    The swapped tensor keeps the dicts of hooks and loses the nodes that call them; assigning a dict makes a new node.
    """
    parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    if parameter._backward_hooks:
        parameter._backward_hooks = parameter._backward_hooks


def has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor has memory: a batch of tensors inside vmap has none of its own (torch 2.6 to 2.14)."""
    found: bool = torch._C._has_storage(tensor)
    return found


class MemoryIdentity:
    """Tells whether a tensor uses a remembered piece of memory, without keeping it alive (torch 1.12 to 2.14).

    The weak reference to the storage keeps a later storage from getting the same address.
    """

    __slots__ = ("_storage",)

    def __init__(self, tensor: Tensor) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        self._storage = StorageWeakRef(tensor.untyped_storage())

    def is_of(self, tensor: Tensor) -> bool:
        """Return whether a tensor uses that memory."""
        same: bool = self._storage.cdata == tensor.untyped_storage()._cdata
        return same


class TensorIdentity:
    """Tells whether a tensor is the same as before, without keeping it alive (torch 1.12 to 2.14).

    A weak reference in Python would not do: torch refuses to swap a tensor that has one.
    """

    __slots__ = ("_memory", "_number")

    def __init__(self, tensor: Tensor) -> None:
        self._number = tensor._cdata
        self._memory = MemoryIdentity(tensor)

    def is_of(self, tensor: Tensor) -> bool:
        """Return whether this is the same tensor, in the same memory."""
        return self._number == tensor._cdata and self._memory.is_of(tensor)


# Compilers and transforms


def is_exporting() -> bool:
    """Return whether torch.export is tracing (torch 2.7 to 2.14; earlier versions do not tell).

    The public function of the same name is True in every frame that torch.compile of torch 2.7 to 2.12 traces.
    """
    return getattr(torch.compiler, "_is_exporting_flag", False)


def is_tracing() -> bool:
    """Return whether torch.jit.trace is running (torch 1.0 to 2.14)."""
    return torch._C._get_tracing_state() is not None


def is_transformed() -> bool:
    """Return whether the caller runs inside torch.func, forward-mode differentiation or torch.jit.trace.

    An autograd function would need special support inside these (torch 2.0 to 2.14).
    """
    is_forward_mode = torch.autograd.forward_ad._current_level >= 0
    return is_forward_mode or torch._C._functorch.maybe_current_level() is not None or is_tracing()


def traced_as_constant(function: _Function) -> _Function:
    """Have torch.compile run a function while it traces and use the result as a constant (torch 2.0 to 2.14).

    Does what `torch.compiler.assume_constant_result` does, without importing the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def not_compiled(function: _Function) -> _Function:
    """Do what `torch.compiler.disable` does to a function, without importing the compiler (torch 2.0 to 2.14).

    torch.compile does not trace into a function with the mark. Before torch 2.7 it still compiles the function's own
    frame, and so those that the function calls, unless it is switched off meanwhile.
    """

    @wraps(function)
    def uncompiled(*args: Any, **kwargs: Any) -> Any:
        switch = torch._C._dynamo.eval_frame.set_eval_frame
        compiler = switch(None)
        try:
            return function(*args, **kwargs)
        finally:
            switch(compiler)

    uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined]
    return uncompiled  # type: ignore[return-value]


@contextmanager
def outside_tracing() -> Iterator[None]:
    """Suspend torch.export, whose tensors have no numbers while it traces, inside the block (torch 2.0 to 2.14)."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch._C.DisableTorchFunction(), outside_transforms():
        yield


def outside_transforms() -> AbstractContextManager[Any]:
    """Suspend torch.func transforms and torch.jit.trace inside the block.

    The transforms forbid writes to captured tensors, and the trace would record them in its program.
    """
    if torch._C._functorch.maybe_current_level() is not None:  # torch 2.0 to 2.14
        from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack  # torch 2.0 to 2.14

        return temporarily_clear_interpreter_stack()
    return _untraced() if is_tracing() else nullcontext()


@contextmanager
def _untraced() -> Iterator[None]:
    state = torch._C._get_tracing_state()  # torch 1.0 to 2.14
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


# Hooks


def call_first(hooks: MutableMapping[int, Any], number: int) -> None:
    """Move a hook of a module or an optimizer to the front, so that it is called before the others.

    The others are taken out and put in again. `prepend` and `move_to_end` would leave the OrderedDict in another order
    than the plain dict underneath, which torch.compile of torch 2.7 to 2.12 goes by: it would mix up the hooks.
    """
    for other in [each for each in hooks if each != number]:
        hooks[other] = hooks.pop(other)


def has_module_hooks_for_all() -> bool:
    """Return whether a global forward hook is registered, one that runs for every module (torch 1.8 to 2.14)."""
    return bool(torch.nn.modules.module._global_forward_hooks)


# Modules


def is_replica(module: nn.Module) -> bool:
    """Return whether a module is a copy that nn.DataParallel made for one forward (torch 1.5 to 2.14)."""
    return "_is_replica" in vars(module)


def is_scripted(module: nn.Module) -> bool:
    """Return whether torch.jit has compiled or traced a module, which then has no dicts (torch 1.2 to 2.14)."""
    return isinstance(module, torch.jit.ScriptModule)


def is_inside_functional_call() -> bool:
    """Return whether the caller runs inside `torch.func.functional_call` (torch 1.13 to 2.14)."""
    code = torch.nn.utils.stateless._functional_call.__code__
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


# Tensors that wrap other tensors


def is_tensor_subclass(tensor: Tensor) -> bool:
    """Return whether a tensor's data lies in other tensors, as in quantized ones (torch 2.1 to 2.14)."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def is_expanded_weight(tensor: Tensor) -> bool:
    """Return whether a tensor wraps a parameter to get its gradient for each sample (torch 1.13 to 2.14)."""
    module = sys.modules.get("torch.nn.utils._expanded_weights.expanded_weights_impl")
    return module is not None and isinstance(tensor, module.ExpandedWeight)


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor; there is none before torch has imported their module (2.5 to 2.14)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_tensor(tensor: Any) -> Tensor:
    """Return a DTensor's shard on this rank, without the autograd node that `to_local` adds (torch 2.5 to 2.14)."""
    return tensor._local_tensor  # type: ignore[no-any-return]


def has_fsdp2(model: nn.Module) -> bool:
    """Return whether `fully_shard` was applied to a module of the model (torch 2.6 to 2.14)."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: no module uses it
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def fsdp2_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield the sharded parameters of FSDP2, each after its module and its name there (torch 2.6 to 2.14)."""
    kind = sys.modules["torch.distributed.fsdp"].FSDPModule
    for module in model.modules():
        if isinstance(module, kind):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch 2.6: one group
            for parameter in (each for group in groups if group is not None for each in group.fsdp_params):
                where = parameter._module_info
                yield where.module, where.param_name, parameter.sharded_param


def is_inside_ddp_training() -> bool:
    """Return whether DistributedDataParallel is running a forward in which all ranks take part (torch 2.0 to 2.14).

    One rank may evaluate without the others, and in `join()` a rank may have no batch left.
    """
    running = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    return running is not None and torch.is_grad_enabled() and not running._join_config.enable
