"""Checkpointer for PyTorch: a model, an optimizer, a scheduler and the random number generator.

    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters())
    with holdfast.torch.Checkpointer(model, optimizer, every=100) as checkpointer:
        resumed = checkpointer.restore()
        step = resumed.step if resumed else 0
        ...
            optimizer.step()                  # waits for the capture by itself
            checkpointer.after_step(step)

Data parallel with everything replicated (DistributedDataParallel, or one process), tensors in host
memory or on CUDA devices. Another number of ranks can go on. Sharded models (FSDP, DTensor) need
`holdfast.Checkpointer` with a layout document.

What is saved: every parameter, as state "param"; every persistent buffer, as state "buffer", of
rank 0 (its batch statistics, as DistributedDataParallel holds it); every tensor of the optimizer's
state, by its key; the optimizer's other values and param_groups, the scheduler's state_dict, and
each rank's random number generators (of the CPU, and of the CUDA devices that hold parameters). An
optimizer that makes its state in its first step gets
that of the checkpoint before it. On another number of ranks the generators are left as they are.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from . import checkpointer as _checkpointer
from . import witness
from .checkpointer import Resumed
from .errors import DataLoss, InvalidArgument
from .job import COMMIT_SECONDS, RESTORE_SECONDS
from .layout import split_name
from .monitor import Communicator, Kind, Operation

PARAMETER = "param"
BUFFER = "buffer"
STATE_BYTES_MAX = 1 << 20


class Checkpointer(_checkpointer.Checkpointer):
    """See the module, and holdfast.Checkpointer for everything else. Threads: one at a time."""

    def __init__(self, model: torch.nn.Module, optimizer: Optional[torch.optim.Optimizer] = None, *,
                 scheduler: Any = None, rng: bool = True, state_bytes_max: int = STATE_BYTES_MAX,
                 **options: Any):
        """Opens the job, and hooks into the model and the optimizer (until `close`): the
        optimizer's step waits for the capture of all tensors, the model's forward for that of its
        buffers.

        scheduler: anything with state_dict() and load_state_dict(). rng: save and restore the random
        number generators. options: of holdfast.Checkpointer (every, on_error, ...) and of
        holdfast.Job (job, root, ...).
        """
        self._module = _unwrap(model)
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._rng = rng
        self._parameters: Dict[str, torch.nn.Parameter] = dict(self._module.named_parameters())
        self._names = {parameter: name for name, parameter in self._parameters.items()}
        self._check_optimizer()
        buffer_states = (BUFFER,) if self._buffers() else ()
        super().__init__(self._tensors, prepare=self._make_optimizer_state,
                         rank_0_states=buffer_states, first_states=buffer_states,
                         state_bytes_max=state_bytes_max, **options)
        witness.start(job=options.get("job"), attempt_key=options.get("attempt_key"),
                      rank=options.get("rank"), world_size=options.get("world_size"),
                      socket_path=options.get("socket"))
        self._hooks: List[Any] = []
        if buffer_states:
            self._hooks.append(model.register_forward_pre_hook(lambda *_: self.before_forward()))
        if optimizer is not None:
            self._hooks.append(optimizer.register_step_pre_hook(lambda *_: self.before_update()))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        super().close()

    def restore(self, *, timeout: Optional[float] = RESTORE_SECONDS) -> Optional[Resumed]:
        """Fills model, optimizer, scheduler and generator from the newest committed checkpoint.
        None: there is none. The result's state and rank_state are those given to `after_step` or
        `save`."""
        resumed = super().restore(timeout=timeout)
        if resumed is None:
            return None
        try:
            state = dict(resumed.state)
            self._load_optimizer_values(state["optimizer"])
            if self._scheduler is not None and state["scheduler"] is not None:
                self._scheduler.load_state_dict(state["scheduler"])
            rank_state = dict(resumed.rank_state) if resumed.rank_state is not None else {}
            if self._rng and rank_state.get("torch_rng") is not None:
                torch.set_rng_state(_bytes_tensor(rank_state["torch_rng"]))
                # A rank that has other devices now leaves those as they are.
                for device, rng_state in zip(self._devices(), rank_state.get("cuda_rng") or ()):
                    torch.cuda.set_rng_state(_bytes_tensor(rng_state), device)
        except (KeyError, TypeError) as error:
            raise DataLoss(f"the checkpoint of step {resumed.step} was not saved by "
                           f"holdfast.torch.Checkpointer: {error!r}") from error
        return dataclasses.replace(resumed, state=state.get("user"),
                                   rank_state=rank_state.get("user"))

    def rank_state_of(self, old_rank: int) -> Any:
        value = super().rank_state_of(old_rank)
        return value.get("user") if isinstance(value, dict) else None

    def save(self, step: int, state: Any = None, rank_state: Any = None) -> bool:
        return super().save(step, *self._with_ours(state, rank_state))

    def commit(self, step: int, state: Any = None, rank_state: Any = None, *,
               timeout: float = COMMIT_SECONDS) -> None:
        super().commit(step, *self._with_ours(state, rank_state), timeout=timeout)

    # ---- Values

    def _with_ours(self, state: Any, rank_state: Any) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        scheduler = self._scheduler.state_dict() if self._scheduler is not None else None
        rank_values: Dict[str, Any] = {"user": rank_state, "torch_rng": None}
        if self._rng:
            rank_values["torch_rng"] = bytes(torch.get_rng_state().tolist())
            rank_values["cuda_rng"] = [bytes(torch.cuda.get_rng_state(device).tolist())
                                       for device in self._devices()]
        return ({"user": state, "optimizer": self._optimizer_values(), "scheduler": scheduler},
                rank_values)

    def _devices(self) -> List[torch.device]:
        """The CUDA devices that hold parameters, in their order."""
        return sorted({parameter.device for parameter in self._parameters.values()
                       if parameter.device.type == "cuda"}, key=lambda device: device.index)

    def _optimizer_values(self) -> Any:
        if self._optimizer is None:
            return None
        groups = [{key: value for key, value in group.items() if key != "params"}
                  for group in self._optimizer.param_groups]
        values = {}
        for name, parameter in self._parameters.items():
            own = {key: value for key, value in self._optimizer.state.get(parameter, {}).items()
                   if not isinstance(value, torch.Tensor)}
            if own:
                values[name] = own
        return {"param_groups": groups, "state": values}

    def _load_optimizer_values(self, saved: Any) -> None:
        if self._optimizer is None or saved is None:
            return
        groups = self._optimizer.param_groups
        if len(saved["param_groups"]) != len(groups):
            raise InvalidArgument(f"optimizer: expected {len(saved['param_groups'])} param_groups "
                                  f"as in the checkpoint, found {len(groups)}")
        for group, values in zip(groups, saved["param_groups"]):
            group.update(values)
        for name, values in saved["state"].items():
            self._optimizer.state[self._parameter(name)].update(values)

    # ---- Tensors

    def _check_optimizer(self) -> None:
        for index, group in enumerate(self._optimizer.param_groups if self._optimizer else ()):
            for place, parameter in enumerate(group["params"]):
                if parameter not in self._names:
                    raise InvalidArgument(
                        f"optimizer: parameter {place} of param_groups[{index}], of shape "
                        f"{tuple(parameter.shape)}, is not one of the model's")

    def _parameter(self, name: str) -> torch.nn.Parameter:
        if name not in self._parameters:
            raise InvalidArgument(f"the checkpoint has optimizer state of parameter '{name}', "
                                  "which the model does not have")
        return self._parameters[name]

    def _buffers(self) -> Dict[str, torch.Tensor]:
        """The persistent ones; one that has several names, under the first."""
        seen: List[int] = [id(parameter) for parameter in self._parameters.values()]
        buffers = {}
        for name, value in self._module.state_dict(keep_vars=True).items():
            if not isinstance(value, torch.Tensor):
                raise InvalidArgument(f"model: '{name}' is no tensor; give it as state")
            if id(value) not in seen:
                seen.append(id(value))
                buffers[name] = value
        return buffers

    def _tensors(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        tensors: Dict[str, Dict[str, torch.Tensor]] = {
            PARAMETER: dict(self._parameters), BUFFER: self._buffers()}
        state = self._optimizer.state if self._optimizer is not None else {}
        for name, parameter in self._parameters.items():
            for key, value in state.get(parameter, {}).items():
                if not isinstance(value, torch.Tensor):
                    continue
                if key in (PARAMETER, BUFFER) or "/" in key:
                    raise InvalidArgument(
                        f"optimizer: state '{key}' of '{name}': the name is taken")
                tensors.setdefault(key, {})[name] = value
        return tensors

    def _make_optimizer_state(self, saved: Mapping[str, Tuple[str, Tuple[int, ...]]]) -> None:
        """What restore will fill: the tensors that the optimizer would make in its first step."""
        if self._optimizer is None:
            return
        for array, (dtype, shape) in saved.items():
            key, name = split_name(array)
            if key in (PARAMETER, BUFFER):
                continue
            parameter = self._parameter(name)
            state = self._optimizer.state[parameter]
            if key not in state:
                state[key] = torch.zeros(shape, dtype=getattr(torch, dtype),
                                         device=self._state_device(key, parameter))

    def _state_device(self, key: str, parameter: torch.nn.Parameter) -> Any:
        """Where the optimizer would make it: with the parameter; its count of steps in host memory
        unless its kernels read it (as torch.optim.Optimizer.load_state_dict has it)."""
        group = next((group for group in self._optimizer.param_groups
                      if any(parameter is member for member in group["params"])), {})
        if key == "step" and not (group.get("capturable") or group.get("fused")):
            return "cpu"
        return parameter.device


def _bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def watch(model: torch.nn.parallel.DistributedDataParallel, *, name: str = "gradients",
          id: Optional[int] = None) -> Communicator:
    """Tells the monitor (docs/MONITOR.md) of every all-reduce of the model's gradients, and of every
    broadcast of its buffers (batch statistics) before a forward, for backends that have no profiler
    plugin, as gloo. To be called on all ranks, before the first backward, and after the job is
    opened where only that names it: it registers the model's communication hook, which must be free,
    and does what happens without one. What else the program communicates is not seen.
    `name` and `id` are the communicator's, as in holdfast.monitor; without `id` it is made of the
    name and the ranks: give each of several models a name of its own."""
    witness.start(rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size())
    group = model.process_group
    ranks = torch.distributed.get_process_group_ranks(group)
    if id is None:
        id = zlib.crc32(repr((name, ranks)).encode())
    communicator = Communicator(id=id, ranks=len(ranks),
                                rank=torch.distributed.get_rank(group), name=name)

    def reduce(group, bucket):  # type: ignore  # torch refuses annotations that are strings
        operation = Operation(communicator, Kind.ALL_REDUCE, bucket.buffer().nbytes)
        operation.start()

        def ended(future: torch.futures.Future) -> torch.Tensor:
            reduced = future.value()  # raises if it has failed: then it never ends, on the board
            operation.end()
            return reduced

        return default_hooks.allreduce_hook(group, bucket).then(ended)

    model.register_comm_hook(group, reduce)
    _watch_buffers(model, communicator)
    return communicator


def _watch_buffers(model: torch.nn.parallel.DistributedDataParallel,
                   communicator: Communicator) -> None:
    """DDP has no hook for this that leaves it as it is: a buffer hook of its own is not told which
    rank the others agree upon when some of them have no more data (`model.join`). So its own
    function is wrapped, the last one before the process group's. A torch that has none goes
    unwatched here: who stands in it is found by heartbeats."""
    broadcast = getattr(model, "_distributed_broadcast_coalesced", None)
    if broadcast is None:
        return

    def watched(tensors: Any, buffer_size: int, authoritative_rank: int = 0) -> None:
        nbytes = sum(tensor.nbytes for tensor in tensors)
        # One that has failed is over, too: nobody stands in it, and the program may go on.
        with communicator.operation(Kind.BROADCAST, nbytes, authoritative_rank):
            broadcast(tensors, buffer_size, authoritative_rank)

    model._distributed_broadcast_coalesced = watched


def _unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The module whose names are those of the model on one process."""
    for module in model.modules():
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__):
            raise InvalidArgument("model: FullyShardedDataParallel shards its parameters; expected "
                                  "a replicated model, or holdfast.Checkpointer with a layout "
                                  "document")
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
