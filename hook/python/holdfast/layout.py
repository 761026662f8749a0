"""Layout documents (docs/layout-grammar.md) for the common case: data parallel, everything
replicated.

Any other layout is a document of the user's own; this file makes none up.
"""

from __future__ import annotations

from typing import Any, Collection, Dict, Mapping, Tuple

from .errors import InvalidArgument
from .memory import Memory


def split_name(buffer: str) -> Tuple[str, str]:
    """ "<state>/<tensor>" as (state, tensor). Raises InvalidArgument."""
    state, slash, tensor = buffer.partition("/")
    if not (state and slash and tensor):
        raise InvalidArgument(f"array '{buffer}': expected a name '<state>/<tensor>'")
    return state, tensor


def replicated(arrays: Mapping[str, Memory], world_size: int,
               rank_0_states: Collection[str] = ()) -> Dict[str, Any]:
    """The document in which each of `world_size` ranks holds every array.

    arrays: by buffer name, "<state>/<tensor>". States in rank_0_states lie on rank 0 alone.

    A state of another shape than the tensor's first one (Adam's `step` of a matrix) becomes a tensor
    of its own, named "<tensor>.<state>". (The grammar could say its shape; checkpoints that are there
    have the name.)
    """
    tensors: Dict[str, Dict[str, Any]] = {}
    apart: Dict[str, Dict[str, Any]] = {}
    for buffer, memory in arrays.items():
        state_name, name = split_name(buffer)
        state: Dict[str, Any] = {"state": state_name, "dtype": memory.dtype}
        if state_name in rank_0_states:
            state["place"] = [{"op": "place", "axis": "dp", "coordinates": [0]}]
        shape = list(memory.shape)
        tensor = tensors.setdefault(name, {"name": name, "shape": shape, "states": []})
        if tensor["shape"] != shape:
            state["buffer"] = buffer
            name = f"{name}.{state_name}"
            tensor = apart[name] = {"name": name, "shape": shape, "states": []}
        tensor["states"].append(state)
    for name in apart:
        if name in tensors:
            raise InvalidArgument(f"tensor '{name}' is there already: a state of another shape "
                                  "than its tensor would get that name")
    return {"holdfast_layout": 1, "mesh": [{"axis": "dp", "size": world_size}],
            "tensors": list(tensors.values()) + list(apart.values())}
