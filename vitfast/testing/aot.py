"""Ahead-of-time compilation of every Triton kernel for GPUs that are not here.

    python -m vitfast.testing.aot --check      # in a checkout, against tests/gpu/resources.json
    python -m vitfast.testing.aot --write                    # make that table anew
    python -m vitfast.testing.aot --check --target sm_90 --op attention --shard 1/4
    python -m vitfast.testing.aot --model --target sm_90 --op attention    # bounds, by a model

For each kernel x config x dtype x target: registers, bytes spilled, shared memory, and the number
of matrix instructions. Spilling is refused on sm_80 and newer, gfx942 and gfx950, but for a few
registers that wait out a loop; a kernel that claims matrix instructions must have some; shared
memory must fit; no pointer offset may be a 32-bit product with a stride.

Compiling an op for all targets takes minutes to hours. Where its kernels changed and were not all
compiled anew, the table names it under "pending" for those targets, and knows nothing of it there;
`--write` takes it off.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import math
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vitfast.runtime import launches
from vitfast.runtime import triton as triton_runtime
from vitfast.runtime.launches import TARGETS, Arch, Launch, Variant
from vitfast.testing import model, model_page, sass
from vitfast.testing.recorded import modules

TABLE = Path("tests", "gpu", "resources.json")
"""In a checkout."""
_MAY_SPILL = {"sm_75", "gfx90a", "gfx1100", "gfx1201"}
_FEW = 16
"""Bytes a thread that may be spilled outside of loops: one version of ptxas has room for the last
four registers there, and another does not."""
_MATRIX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)|\bv_(?:mfma|wmma|swmmac)_")


def variants(target: str, ops: set[str] | None = None) -> Iterator[tuple[str, Variant]]:
    """(unique name, variant) of every kernel x config x dtype that a target gets.

    Ops that live on matrix products refuse targets without matrix instructions: no kernels there.
    """
    arch = Arch(target)
    for op, module in modules().items():
        if ops is None or op in ops:
            found = module.variants(arch)
            if arch.has_dot or not any(v.dots for v in found):
                for v in found:
                    yield f"{op}/{v.name}", v


def tabled(target: str) -> Iterator[tuple[str, Variant]]:
    """(unique name, variant) of every kernel that the package's launch table gives a config to.

    An entry serves each problem that it is near enough to (see `launches.launch_of`): of these, the
    ones that are compiled ahead of time, in all dtypes and forms.
    """
    arch = Arch(target)
    for kernel, entries in launches.packaged(target)["kernels"].items():
        for number, entry in enumerate(entries):
            if "blocks" not in entry:  # a choice among vendors
                continue
            given = Launch(entry["blocks"], entry["num_warps"], entry["num_stages"])
            serves = functools.partial(_serving, kernel, entry["key"], given)
            with launches.watching(serves):
                found = {op: module.variants(arch) for op, module in modules().items()}
            for op, made in found.items():
                for v in made:
                    if v.launch is given:
                        yield f"{op}/{v.name} by {kernel}[{number}]", v


def _serving(
    kernel: str, entry: Mapping[str, int | str], given: Launch, asked: str,
    key: Mapping[str, int | str], otherwise: Launch,
) -> Launch:  # fmt: skip
    """The config for a problem: an entry's where the entry serves it."""
    near = asked == kernel and launches.distance(key, entry) < math.inf
    return given if near else otherwise


def faults_of_tables(target: str) -> list[str]:
    """What is wrong with the kernels that the package's launch table gives a config to."""
    found = []
    for name, v in tabled(target):
        try:
            why = faults(v, target, resources(compile_variant(v, target), target))
        except Exception as error:  # whatever a compiler may raise
            why = [f"does not compile: {type(error).__name__}: {error}"]
        found += [f"{target} {name}: {reason}" for reason in why]
    return found


def compile_variant(v: Variant, target: str) -> Any:
    """Triton's compiled kernel; asks no driver."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arch = Arch(target)
    signature = {
        name: "constexpr" if name in v.constants else v.signature[name]
        for name in v.kernel.arg_names
    }
    constants = {(v.kernel.arg_names.index(name),): value for name, value in v.constants.items()}
    attrs = _attrs(v, arch)
    source = ASTSource(fn=v.kernel, signature=signature, constexprs=constants, attrs=attrs)
    gpu = (
        GPUTarget("hip", target, arch.warp_size)
        if arch.is_amd
        else GPUTarget("cuda", arch.capability, 32)
    )
    return triton.compile(source, target=gpu, options=v.launch.options())


_UNEVEN = {
    *triton_runtime.COUNTS, "mask_q", "mask_k", "bias_h", "bias_q", "bias_k", "z_value", "z_gate",
}  # fmt: skip
"""Integer arguments that real models do not give in multiples of 16."""


def _attrs(v: Variant, arch: Arch) -> dict[tuple[int, ...], list[list[Any]]]:
    """Triton's own specialisation: pointers and strides of real models divide by 16.

    On AMD it also tells tensors below 2 GiB, for which there are loads with a 32-bit offset.
    """
    found: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(v.kernel.arg_names):
        if name in v.constants or name in _UNEVEN or name in v.uneven:
            continue
        if v.signature[name].startswith("*"):
            small = [["tt.pointer_range", 32]] if arch.is_amd else []
            found[(i,)] = [["tt.divisibility", 16], *small]
        elif v.signature[name] == "i32":
            found[(i,)] = [["tt.divisibility", 16]]
    return found


def resources(compiled: Any, target: str) -> dict[str, int]:
    """Registers, spilled bytes, shared bytes and matrix instructions of a compiled kernel; where
    NVIDIA's spill, also how many instructions in loops do."""
    looped = {}
    if Arch(target).is_amd:
        text = compiled.asm["amdgcn"]
        registers = _number(text, r"\.vgpr_count:\s+(\d+)")
        spilled = 4 * _number(text, r"\.vgpr_spill_count:\s+(\d+)")
    else:
        text = compiled.asm["ptx"]
        registers, spilled = sass.usage(compiled.asm["cubin"])
        if spilled:
            looped = {"spills_in_loops": sass.spills_in_loops(compiled.asm["cubin"])}
    return {
        "registers": registers,
        "spilled": spilled,
        **looped,
        "shared": compiled.metadata.shared,
        "matrix": len(_MATRIX.findall(text)),
    }


def _number(text: str, pattern: str) -> int:
    return max(int(n) for n in re.findall(pattern, text))


def faults(v: Variant, target: str, found: dict[str, int]) -> list[str]:
    """What is wrong with a kernel that compiled."""
    arch, why = Arch(target), []
    few = found["spilled"] <= _FEW and not found.get("spills_in_loops", 1)
    if found["spilled"] and not few and target not in _MAY_SPILL:
        why.append(f"spills {found['spilled']} bytes a thread")
    if found["shared"] > arch.shared_bytes:
        why.append(f"needs {found['shared']} bytes of shared memory; {arch.shared_bytes} exist")
    if v.dots and not found["matrix"]:
        why.append("has no matrix instruction")
    return why


_DEFINITION = re.compile(r"(%[\w#]+)(?::\d+)? = \"?([\w.]+)\"?[ (](.*)")
_PASSING = {
    "arith.addi", "arith.subi", "tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi",
    "tt.reshape", "tt.trans", "arith.select", "arith.minsi", "arith.maxsi",
}  # fmt: skip


def narrow_products(ttir: str) -> list[str]:
    """Pointer offsets that hold a 32-bit product with a run-time number, such as a stride.

    Such a product wraps at 2^31 elements; the row has to be widened before. Products with
    constants (a block's size times its number) are counted as harmless.
    """
    lines = [m for line in ttir.splitlines() if (m := _DEFINITION.search(line))]
    made = {m[1]: (m[2], re.findall(r"%[\w#]+", m[3]), m[3]) for m in lines}

    def is_constant(name: str) -> bool:
        kind, operands, _ = made.get(name, ("argument", [], ""))
        return kind == "arith.constant" or (
            kind in _PASSING and bool(operands) and all(map(is_constant, operands))
        )

    def products(name: str, seen: set[str]) -> Iterator[str]:
        kind, operands, text = made.get(name, ("argument", [], ""))
        if name in seen or (kind != "arith.muli" and kind not in _PASSING):
            return
        seen.add(name)
        narrow = re.search(r"(?:x| : )i32\b", text.split(" loc")[0]) is not None
        if kind == "arith.muli" and narrow and not any(map(is_constant, operands)):
            yield name
        for operand in operands:
            yield from products(operand, seen)

    found = []
    for kind, operands, _ in made.values():
        if kind == "tt.addptr":
            found += [f"{p} in {made[p][2].split(' loc')[0]}" for p in products(operands[1], set())]
    return sorted(set(found))


def measure(job: tuple[str, str]) -> tuple[str, str, dict[str, int], list[str]]:
    """(target, name) to (target, name, resources, faults); runs in a worker process."""
    target, name = job
    v = dict(variants(target, {name.split("/")[0]}))[name]
    try:
        compiled = compile_variant(v, target)
        found = resources(compiled, target)
    except Exception as error:  # whatever a compiler may raise
        return target, name, {}, [f"does not compile: {type(error).__name__}: {error}"]
    why = faults(v, target, found)
    why += [f"32-bit product {p}" for p in narrow_products(compiled.asm["ttir"])]
    return target, name, found, why


def run(
    targets: list[str], ops: set[str] | None = None, shard: tuple[int, int] = (0, 1),
    workers: int = 2,
) -> tuple[dict[str, dict[str, dict[str, int]]], list[str]]:  # fmt: skip
    """Resources by target and name, and all faults, of one shard of the kernels."""
    jobs = [
        (target, name)
        for target in targets
        for name, _ in variants(target, ops)
        if zlib.crc32(f"{target}/{name}".encode()) % shard[1] == shard[0]
    ]
    table: dict[str, dict[str, dict[str, int]]] = {}
    wrong: list[str] = []
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        for target, name, found, why in pool.map(measure, jobs):
            table.setdefault(target, {})[name] = found
            wrong += [f"{target} {name}: {reason}" for reason in why]
    return table, wrong


def differences(table: dict[str, dict[str, dict[str, int]]], known: dict[str, Any]) -> list[str]:
    """Where kernels that were compiled are not what the committed table says; it knows nothing of
    ops that it calls pending."""
    kernels, pending = known["kernels"], known.get("pending", {})
    return [
        f"{target} {name}: {found}, the table says {kernels.get(target, {}).get(name)}"
        for target, entries in table.items()
        for name, found in entries.items()
        if kernels.get(target, {}).get(name) != found
        and name.split("/")[0] not in pending.get(target, ())
    ]


def merged(known: dict[str, Any], table: dict[str, dict[str, dict[str, int]]]) -> dict[str, Any]:
    """The committed table with what was compiled, all kernels of an op or a part of them.

    An op stays pending for a target until all its kernels there are in.
    """
    kernels, pending = dict(known["kernels"]), dict(known.get("pending", {}))
    for target, entries in table.items():
        real = {name for name, _ in variants(target)}
        both = {**kernels.get(target, {}), **entries}
        kernels[target] = {name: both[name] for name in sorted(both) if name in real}
        missing = {name.split("/")[0] for name in real if name not in both}
        pending[target] = [op for op in pending.get(target, ()) if op in missing]
    return {"pending": {t: ops for t, ops in pending.items() if ops}, "kernels": kernels}


def _as_text(version: str, table: dict[str, Any]) -> str:
    """The table as JSON with a line a kernel, so that a diff shows which changed."""
    targets = [
        f" {json.dumps(target)}: {{\n"
        + ",\n".join(f"  {json.dumps(n)}: {json.dumps(found)}" for n, found in entries.items())
        + "\n }"
        for target, entries in table["kernels"].items()
    ]
    head = f'{{"triton": "{version}", "pending": {json.dumps(table["pending"])}, "kernels": {{\n'
    return head + ",\n".join(targets) + "\n}}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="replace the committed table")
    action.add_argument("--check", action="store_true", help="compare with the committed table")
    action.add_argument(
        "--model", action="store_true", help="print what bounds the kernels, by a model"
    )
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--op", action="append", help="default: all")
    parser.add_argument("--shard", default="1/1", help="such as 2/4: the second quarter")
    args = parser.parse_args(argv)
    ops = args.op and set(args.op)
    if args.model:
        known = [t for t in args.target or model.TARGETS if t in model.TARGETS]
        if not known:
            parser.error(f"--model knows {', '.join(model.TARGETS)}")
        print(model_page.page(known, ops))
        return 0
    part, parts = map(int, args.shard.split("/"))
    table, wrong = run(args.target or list(TARGETS), ops, (part - 1, parts))
    import triton

    known = json.loads(TABLE.read_text()) if TABLE.exists() else {"kernels": {}}
    if args.write:
        TABLE.write_text(_as_text(triton.__version__, merged(known, table)))
    elif known.get("triton") == triton.__version__:
        wrong += differences(table, known)
    count = sum(len(entries) for entries in table.values())
    print("\n".join([*wrong, f"{count} kernels compiled, {len(wrong)} faults"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
