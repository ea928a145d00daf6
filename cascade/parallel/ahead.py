"""Compiles a stage's training step or sampler ahead of time, for devices that needn't be here.

`cascade.parallel.plan` runs this module as a process of its own, since libtpu reads its environment
once and a compiler may take more memory than there is. A request comes in as a line of JSON; lines
of JSON go out: {"phase": ...} while it works, then {"measured": ...} or {"error": sentence}.
"""

import functools
import json
import math
import os
import re
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from cascade import config as configs
from cascade.errors import UserError
from cascade.networks import cost
from cascade.parallel import hlo
from cascade.parallel import mesh as meshes
from cascade.parallel.before_code import Memory, compile_until_code
from cascade.parallel.collectives import collectives, ideal_bytes
from cascade.parallel.layout import Layout
from cascade.parallel.rules import of_config, shardings
from cascade.parallel.topology import LOCAL, parse
from cascade.stage import Stage
from cascade.training.optim import make_optimizer
from cascade.training.state import init_state, jit_train_step, with_shardings


class Program(NamedTuple):
    """What is compiled: a jitted function and the shapes and places of its arguments."""

    run: Callable
    arguments: tuple
    static: dict[str, Any]
    params: Any  # shapes with shardings


def training_program(config: ConfigDict, stage: Stage, mesh) -> Program:
    """The step that `cascade.training.loop` jits, its state donated."""
    settings = config.train
    meshes.check_batch(settings.batch_size, settings.microbatches, mesh)
    optimizer = make_optimizer(settings)
    create = functools.partial(init_state, stage, optimizer)
    abstract = jax.eval_shape(create, jax.random.key(0))
    placed = shardings(abstract, mesh, of_config(config))
    image, cond = stage.given_shapes(settings.batch_size)
    batch = {"image": image, **cond}
    run = jit_train_step(stage, optimizer, settings, mesh, placed)
    state = with_shardings(abstract, placed)
    key = _placed(jax.eval_shape(jax.random.key, 0), meshes.replicated(mesh))
    batch = _placed(batch, meshes.batch_sharding(mesh))
    return Program(run, (state, batch, key), {}, state.params)


def sampling_program(config: ConfigDict, stage: Stage, mesh) -> Program:
    """The stage's sampler at the size it draws, for a batch split over the mesh."""
    rows, size = config.train.batch_size, (config.stage.resolution,) * 2
    meshes.check_batch(rows, 1, mesh)
    params = jax.eval_shape(stage.init, jax.random.key(0))
    params = with_shardings(params, shardings(params, mesh, of_config(config)))
    _, cond = stage.given_shapes(rows, size)
    null = {name: cond[name] for name in ("text_emb", "text_mask")}
    keys = jax.eval_shape(functools.partial(jax.random.split, num=rows), jax.random.key(0))
    cond, null, keys = _placed((cond, null, keys), meshes.batch_sharding(mesh))
    run = jax.jit(
        stage.sample,
        static_argnames=("settings", "size"),
        out_shardings=meshes.batch_sharding(mesh),
        compiler_options=meshes.compiler_options(mesh),
    )
    static = {"settings": stage.settings(), "size": size}
    return Program(run, (params, cond, null, keys), static, params)


def _placed(tree, sharding):
    """Shapes with where each of them lies."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def find_devices(topology: str) -> list[jax.Device]:
    """The devices that are here, or descriptions of a topology's.

    Raises:
      UserError: libtpu knows no such topology.
    """
    if topology == LOCAL:
        return jax.devices()
    wished = parse(topology)
    # Two TensorCores of a v4 chip are one device, as Cloud TPU sets them up.
    chip = {"chip_config_name": "megacore"} if wished.generation == "v4" else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=wished.wiring, num_slices=wished.slices, **chip
        )
    except Exception as error:  # libtpu's own, of many kinds
        said = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"libtpu can't describe {topology} ({said}); choose another topology, or "
            "pip install --upgrade libtpu."
        ) from error
    return list(described.devices)


def measure(request: dict, tell: Callable[[str], None]) -> dict:
    """Compiles what is asked for and reads the result.

    Args:
      request: "config" as `cascade.config.to_json` gives it, "topology", "sample"; "dump", the
        folder that XLA was told of where machine code isn't wanted, else None.
      tell: is given each of `cascade.parallel.plan.PHASES` as it begins.

    Returns:
      What `cascade.parallel.plan.Measured` names. Where the program doesn't fit the chip's memory,
      the compiler says how much it would take, and nothing else is known of it.

    Raises:
      UserError: the mesh doesn't fit the devices or the batch.
    """
    config = configs.from_json(request["config"])
    devices = find_devices(request["topology"])
    mesh = meshes.make_mesh(**config.mesh, devices=devices)
    stage = Stage(config.stage, layout=Layout.of(mesh, of_config(config)))
    tell("trace")
    build = sampling_program if request["sample"] else training_program
    program = build(config, stage, mesh)
    start = time.monotonic()
    traced = program.run.trace(*program.arguments, **program.static)
    plain = functools.partial(program.run.__wrapped__, **program.static)
    flops = cost.count(plain, *program.arguments).total()
    sizes = [math.prod(p.shape) for p in jax.tree.leaves(program.params)]
    split = [
        math.prod(p.shape)
        for p in jax.tree.leaves(program.params)
        if not p.sharding.is_fully_replicated
    ]
    measured = {
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "device_bytes": _memory_here(devices[0]) if request["topology"] == LOCAL else None,
        "mesh": dict(mesh.shape),
        "parameters": sum(sizes),
        "flops": flops,
        "model_flops": flops
        if request["sample"]
        else 3 * stage.forward_flops * config.train.batch_size,
        "ideal_bytes": ideal_bytes(
            sum(split), sum(sizes) - sum(split), mesh.shape["fsdp"], mesh.shape["data"]
        ),
    }
    tell("lower")
    lowered = traced.lower()
    tell("compile")
    try:
        if request["dump"] is None:
            compiled = lowered.compile()
            memory, text = memory_of(compiled), compiled.as_text()
        else:
            memory, text = compile_until_code(lowered, request["dump"])
        measured["compile_seconds"] = time.monotonic() - start
        tell("read")
        slices = {getattr(device, "slice_index", None) for device in devices}
        measured |= read(memory, text, len(devices), len(slices))
    except jax.errors.JaxRuntimeError as error:
        measured["peak_bytes"] = needed_bytes(error, argument_bytes(program.arguments))
        measured["compile_seconds"] = time.monotonic() - start
    measured["host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return measured


def memory_of(compiled) -> Memory:
    """What a compiled program takes of one chip."""
    memory = compiled.memory_analysis()
    return Memory(
        argument=memory.argument_size_in_bytes,
        donated=memory.alias_size_in_bytes,
        # Results that take the place of a donated argument need none of their own.
        result=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )


def read(memory: Memory, text: str, devices: int, slices: int) -> dict:
    """Memory, sent bytes and memory traffic of a compiled program, each of one chip."""
    module = hlo.parse(text)
    parts = {f"{name}_bytes": size for name, size in memory._asdict().items()}
    resident = memory.argument + memory.result + memory.temporary
    return parts | {
        "peak_bytes": resident + (memory.code or 0),
        "sent": {k: list(sent) for k, sent in collectives(module, devices, slices).items()},
        "traffic_bytes": hlo.traffic(module),
    }


def argument_bytes(arguments) -> int:
    """One device's part of arrays with shardings."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(arguments)
    )


def needed_bytes(error: Exception, arguments: int) -> float:
    """What a program that doesn't fit would take, from the TPU compiler's refusal.

    It tells either all of it ("Used 20.5G of 15.75G hbm") or the temporaries alone, to which
    `arguments` bytes are added.

    Raises:
      Exception: `error` itself, where it says something else.
    """
    match = re.search(r"(Used |HLO temporaries \()([\d.]+)([KMGT]?)", str(error))
    if not match or "emory" not in str(error):
        raise error
    size = float(match[2]) * 1024 ** " KMGT".index(match[3] or " ")
    return size if match[1] == "Used " else size + arguments


def _memory_here(device: jax.Device) -> int | None:
    """Bytes that this process may use of a device's memory; None where it doesn't say."""
    statistics = device.memory_stats()
    return statistics.get("bytes_limit") if statistics else None


def end_with_parent(dump: str | None):
    """Ends this process where its standard input does: whoever asked is gone, and cleans nothing.

    Args:
      dump: a folder to remove then.
    """
    sys.stdin.read()
    if dump:
        shutil.rmtree(dump, ignore_errors=True)
    os._exit(1)


def main():
    """Answers the request on standard input."""

    def tell(kind, value):
        print(json.dumps({kind: value}), flush=True)

    request = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, args=(request["dump"],), daemon=True).start()
    try:
        tell("measured", measure(request, functools.partial(tell, "phase")))
    except UserError as error:
        tell("error", str(error))
    os._exit(0)  # the compiler may still be at what isn't wanted of it


if __name__ == "__main__":
    main()
